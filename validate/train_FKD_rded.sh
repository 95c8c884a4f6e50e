#!/bin/sh
# Stage 4 by RDED's recipe (arXiv 2312.03526): the teacher labels during training, half the picture
# or more in a crop, small batches, a learning rate for each student that ends at half, BatchNorm
# refreshed on un-mixed images (--bn_refresh).
# Batch: 100 at IPC 10, 200 at IPC 50 and more, for 1000 classes; half of that on small sets.
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
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
IPC="$(ipc_of "$IMAGES" "$IPC")" # what is below depends on what the images are
STUDENT="${STUDENT:-resnet18}"
if [ "$IPC" -le 10 ]; then FULL=100; else FULL=200; fi
case "$DATASET" in imagenet) ;; *) FULL=$((FULL / 2)) ;; esac
BATCH_SIZE="${BATCH_SIZE:-$FULL}"
case "$STUDENT" in # RDED's learning rates
    efficientnet_b0) LR="${LR:-0.002}" ;;
    mobilenet_v2) LR="${LR:-0.0025}" ;;
    vgg11) LR="${LR:-0.0005}" ;;
    swin_t | vit_b_16) LR="${LR:-0.0001}" ;;
    *) LR="${LR:-0.001}" ;;
esac
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    --online \
    --arch "$TEACHER" \
    --teacher_checkpoint "$TEACHER_CHECKPOINT" \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs 300 \
    --batch_size "$BATCH_SIZE" \
    --bn_batch "$BATCH_SIZE" \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops 0.5 \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --adamw_lr "$LR" \
    --adamw_weight_decay 0.01 \
    --schedule cosine \
    --cos_stretch 2 \
    --loss kl \
    --temperature 20 \
    --bn_refresh \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
