#!/bin/sh
# Stage 3, training-time matching, on ImageNet-100 (the IDC and Minimax subset): a teacher's soft
# labels for the crops of every epoch.
# Teacher: torchvision's ResNet-18; the hundred columns of these classes are taken out of
# its thousand.
# Not in the paper: ImageNet's batch of 1024 would be one step per epoch at IPC 10, so the batch is
# 100, RDED's there: ten steps per epoch.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images imagenet100)}"
TEACHER="${TEACHER:-resnet18}"
EPOCHS="${EPOCHS:-300}"
BATCH_SIZE="${BATCH_SIZE:-100}"
CROPS="${CROPS:-0.08}"
FKD_SEED="${FKD_SEED:-42}"

run -m matching.generate_soft_label \
    --data "$OUT/images/$IMAGES" \
    --arch "$TEACHER" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --fkd_seed "$FKD_SEED" \
    --input_size 224 \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --use_fp16 \
    --mode fkd_save \
    --num_workers 8 \
    --fkd_path "$OUT/labels" \
    "$@"
