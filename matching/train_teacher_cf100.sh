#!/bin/sh
# A teacher for CIFAR-100, which nobody publishes.
# Recipe: the usual one for 32-px networks (200 epochs, SGD, cosine, pad by 4 and crop, flip); the
# paper gives none.
# Learning rate 0.1, and 0.01 for ConvNets (as DC, DM, MTT): at 0.1 ConvNet-W128 stays at chance
# (tried on 1,500 images).
# Expect: ConvNet-W128 56.2 +- 0.3 (the paper's; 5 trainings), the default. TEACHER=resnet18: about
# 76 (public repositories).
# A run that was stopped goes on where it was with the same command; NUM_GPUS=8 trains on 8.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

TEACHER="${TEACHER:-convnet_w128}"
DATA_DIR="${DATA_DIR:-data/cifar100}"
OUT="${OUT:-output}"
case "$TEACHER" in
    convnet*) LR="${LR:-0.01}" ;;
    *) LR="${LR:-0.1}" ;;
esac

run -m matching.train_teacher \
    --dataset cifar100 \
    --data_dir "$DATA_DIR" \
    --arch "$TEACHER" \
    --input_size 32 \
    --epochs 200 \
    --batch_size 128 \
    --bn_batch 128 \
    --learning_rate "$LR" \
    --momentum 0.9 \
    --weight_decay 5e-4 \
    --warmup_epochs 0 \
    --schedule cosine \
    --augment pad_crop \
    --flip 0.5 \
    --seed 0 \
    --eval_every 10 \
    --num_workers 8 \
    --output_dir "$OUT/teachers" \
    "$@"
