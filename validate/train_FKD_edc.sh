#!/bin/sh
# Stage 4 by EDC's recipe (arXiv 2404.13733): the mean logits of four teachers, squared error of
# logits + 0.025 cross-entropy, averaged weights (decay 0.99), cosine stretched by 2.
# TEACHER_CHECKPOINT has as many words as TEACHER.
# Other images: IMAGES=imagenet_ipc10_random; other data sets: DATASET=cifar10 sh ..., after a
# teacher of theirs was trained.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATASET="${DATASET:-imagenet}"
OUT="${OUT:-output}"
TEACHER="${TEACHER:-resnet18 mobilenet_v2 shufflenet_v2_x0_5 efficientnet_b0}"
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
STUDENT="${STUDENT:-resnet18}"
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    --online \
    --arch $TEACHER \
    --teacher_checkpoint $TEACHER_CHECKPOINT \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs 300 \
    --batch_size 100 \
    --bn_batch 100 \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops 0.5 \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --adamw_lr 0.001 \
    --adamw_weight_decay 0.01 \
    --schedule cosine \
    --cos_stretch 2 \
    --loss mse_ce \
    --ce_weight 0.025 \
    --ema 0.99 \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
