#!/bin/sh
# A teacher for CIFAR-10, which nobody publishes.
# Recipe: the usual one for 32-px networks (200 epochs, SGD, cosine, pad by 4 and crop, flip); the
# paper gives none.
# Learning rate 0.1, and 0.01 for ConvNets (as DC, DM, MTT): at 0.1 ConvNet-W128 stays at chance
# (tried on 1,500 images).
# Expect: ConvNet-W128 84.8 +- 0.1 (the paper's; 5 trainings), the default. TEACHER=resnet18: about
# 95 (public repositories).
# A run that was stopped goes on where it was with the same command; NUM_GPUS=8 trains on 8.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

TEACHER="${TEACHER:-convnet_w128}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output}"
TEACHER_EPOCHS="${TEACHER_EPOCHS:-200}"
TEACHER_BATCH="${TEACHER_BATCH:-128}"
case "$TEACHER" in
    convnet*) RATE=0.01 ;;
    *) RATE=0.1 ;;
esac
TEACHER_LR="${TEACHER_LR:-${LR:-$RATE}}"
TEACHER_SEED="${TEACHER_SEED:-1000}"

run -m matching.train_teacher \
    --dataset cifar10 \
    --data_dir "$DATA_DIR" \
    --arch "$TEACHER" \
    --input_size 32 \
    --epochs "$TEACHER_EPOCHS" \
    --batch_size "$TEACHER_BATCH" \
    --bn_batch "$TEACHER_BATCH" \
    --learning_rate "$TEACHER_LR" \
    --momentum 0.9 \
    --weight_decay 5e-4 \
    --decay_on all \
    --warmup_epochs 0 \
    --schedule cosine \
    --augment pad_crop \
    --flip 0.5 \
    --seed "$TEACHER_SEED" \
    --eval_every 10 \
    --num_workers 8 \
    --output_dir "$OUT/teachers" \
    "$@"
