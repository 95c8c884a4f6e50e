#!/bin/sh
# Table 3's synthesis-time matching on ImageNet-1K: SRe2L's recover step by its published numbers,
# from the D4M images on.
# 100 batches of 100 images at IPC 10. Then:
#     IMAGES=..._stm sh matching/matching.sh
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

run -m matching.stm \
    --image_path "$OUT/images/$IMAGES" \
    --arch "$TEACHER" \
    --teacher_checkpoint torchvision \
    --iterations 4000 \
    --batch_size 100 \
    --lr 0.25 \
    --r_bn 0.01 \
    --first_bn_multiplier 10 \
    --jitter 32 \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
