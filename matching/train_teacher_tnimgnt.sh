#!/bin/sh
# A teacher for Tiny-ImageNet, which nobody publishes.
# Recipe: the public one of 64-px ResNets (3x3 stem, no max-pool; SGD 0.2, cosine, 5 warm-up
# epochs): R18 59.6 / 60.2 / 60.5 after 50 / 100 / 200 epochs. The paper's, by PyTorch's
# classification script: ResNet-18 61.9 (the default), TEACHER=resnet50 62.0, TEACHER=resnet101
# 62.3.
# A run that was stopped goes on where it was with the same command; NUM_GPUS=8 trains on 8.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

TEACHER="${TEACHER:-resnet18}"
DATA_DIR="${DATA_DIR:-data/tiny-imagenet-200}"
OUT="${OUT:-output}"
TEACHER_EPOCHS="${TEACHER_EPOCHS:-200}"
TEACHER_BATCH="${TEACHER_BATCH:-256}"
case "$TEACHER" in
    convnet*) RATE=0.01 ;;
    *) RATE=0.2 ;;
esac
TEACHER_LR="${TEACHER_LR:-${LR:-$RATE}}"
TEACHER_SEED="${TEACHER_SEED:-1000}"

run -m matching.train_teacher \
    --dataset tiny_imagenet \
    --data_dir "$DATA_DIR" \
    --arch "$TEACHER" \
    --input_size 64 \
    --epochs "$TEACHER_EPOCHS" \
    --batch_size "$TEACHER_BATCH" \
    --bn_batch "$TEACHER_BATCH" \
    --learning_rate "$TEACHER_LR" \
    --momentum 0.9 \
    --weight_decay 1e-4 \
    --decay_on all \
    --warmup_epochs 5 \
    --schedule cosine \
    --augment rrc \
    --flip 0.5 \
    --seed "$TEACHER_SEED" \
    --eval_every 10 \
    --num_workers 8 \
    --output_dir "$OUT/teachers" \
    "$@"
