#!/bin/sh
# D4M-G of table 2: the 200 Tiny-ImageNet classes taken out of the distilled ImageNet-1K by wnid,
# saved at 64 px. Seconds.
# Then: IMAGES=tiny_imagenet_ipc50_from_imagenet_ipc50_s0.7_g8_kmexpand1 \
#     sh matching/matching_tnimgnt.sh
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-50}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"

run -m distillation.take_classes \
    --image_path "$OUT/images/$(d4m_images imagenet)" \
    --dataset tiny_imagenet \
    --image_size 64 \
    --save_init_image_path "$OUT/images" \
    "$@"
