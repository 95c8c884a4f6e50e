#!/bin/sh
# Stage 3, training-time matching, on ImageNet-1K: a teacher's soft labels for the crops of every
# epoch.
# Teacher: torchvision's ResNet-18 (69.76 top-1), downloaded once. 6 GB of labels at IPC 10, 120 GB
# at IPC 200: 300 epochs x images x 1000 classes x 2 bytes. Batch 1024, the release's.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images imagenet)}"
TEACHER="${TEACHER:-resnet18}"
EPOCHS="${EPOCHS:-300}"
INPUT_SIZE="${INPUT_SIZE:-224}"
BATCH_SIZE="${BATCH_SIZE:-1024}"
CROPS="${CROPS:-0.08}"
FKD_SEED="${FKD_SEED:-42}"

run -m matching.generate_soft_label \
    --data "$OUT/images/$IMAGES" \
    --arch "$TEACHER" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --fkd_seed "$FKD_SEED" \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --use_fp16 \
    --mode fkd_save \
    --num_workers 8 \
    --fkd_path "$OUT/labels" \
    "$@"
