#!/bin/sh
# Stage 4 by RD3's recipe as far as it is known: it has no repository, and what is here was read in
# a summary of its paper. RDED's with 400 epochs, batches of 50, and a cosine stretched by zeta = 1
# for ResNet-18, 2 for others. Guessed: AdamW's weight decay, the same values on every data set, and
# that it does not shuffle patches.
# ImageNet-1K, R18, D4M images: 45.4 at IPC 10 and 60.2 at IPC 50 (that summary's; not measured
# here).
# Other images: IMAGES=imagenet_ipc10_random; other data sets: DATASET=cifar10 sh ..., after a
# teacher of theirs was trained.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATASET="${DATASET:-imagenet}"
OUT="${OUT:-output}"
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
STUDENT="${STUDENT:-resnet18}"
case "$STUDENT" in
    resnet18) ZETA="${ZETA:-1}" ;;
    *) ZETA="${ZETA:-2}" ;;
esac
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    --online \
    --arch "$TEACHER" \
    --teacher_checkpoint "$TEACHER_CHECKPOINT" \
    --no_use_fp16 \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs 400 \
    --batch_size 50 \
    --bn_batch 50 \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops 0.5 \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --adamw_lr 0.001 \
    --adamw_weight_decay 0.01 \
    --schedule cosine \
    --cos_stretch "$ZETA" \
    --loss kl \
    --temperature 20 \
    --bn_refresh \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
