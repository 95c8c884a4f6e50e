#!/bin/sh
# Stage 4 on ImageNet-1K: a student on synthetic images and soft labels, tested on real images.
# Paper: 27.9 at IPC 10, 55.2 at 50, 59.3 at 100, 62.6 at 200 (ResNet-18, top-1). Random real images
# with soft labels: 28.8 at IPC 10, 58.1 at 50, 62.9 at 100 (published by others), above D4M.
# Batch 1024, the release's: ten AdamW steps per epoch at IPC 10. --seeds 0 1 2 gives +- over
# initial weights: the students share crops, order and CutMix (--fkd_seed 42).
# DATA_DIR holds val/<wnid>/, or a flat val/ with its ground-truth file.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATA_DIR="${DATA_DIR:-data/imagenet}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images imagenet)}"
TEACHER="${TEACHER:-resnet18}"
STUDENT="${STUDENT:-resnet18}"
EPOCHS="${EPOCHS:-300}"
INPUT_SIZE="${INPUT_SIZE:-224}"
BATCH_SIZE="${BATCH_SIZE:-1024}"
CROPS="${CROPS:-0.08}"
BN_BATCH="${BN_BATCH:-73}" # the release: 1024 / 7 GPUs / 2 accumulation steps
LABELS="${LABELS-$(labels_name)}"
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    ${LABELS:+--fkd_path "$OUT/labels/$LABELS"} \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps 2 \
    --bn_batch "$BN_BATCH" \
    --adamw_lr 0.001 \
    --adamw_weight_decay 0.01 \
    --cos \
    --temperature 20 \
    --loss kl \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
