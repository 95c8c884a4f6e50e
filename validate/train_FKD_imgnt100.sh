#!/bin/sh
# Stage 4 on ImageNet-100 (the IDC and Minimax subset): a student on synthetic images and
# soft labels, tested on real images.
# Not in the paper. Batch 100, RDED's for a hundred classes at IPC 10 (ten steps per epoch;
# ImageNet's 1024 would be one). Figures are +- over initial weights: the SEEDS share crops, order
# and CutMix.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATA_DIR="${DATA_DIR:-data/imagenet}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images imagenet100)}"
TEACHER="${TEACHER:-resnet18}"
STUDENT="${STUDENT:-resnet18}"
EPOCHS="${EPOCHS:-300}"
BATCH_SIZE="${BATCH_SIZE:-100}"
CROPS="${CROPS:-0.08}"
LABELS="${LABELS-$(labels_name)}"
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    ${LABELS:+--fkd_path "$OUT/labels/$LABELS"} \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --bn_batch "$BATCH_SIZE" \
    --adamw_lr 0.001 \
    --adamw_weight_decay 0.01 \
    --cos \
    --temperature 20 \
    --loss kl \
    --input_size 224 \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
