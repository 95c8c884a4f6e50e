#!/bin/sh
# Stages 1 and 2 on ImageNet-100 (the IDC and Minimax subset) in one process, without a prototype
# file: the same PNGs.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATA_DIR="${DATA_DIR:-data/imagenet}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.distill \
    --dataset imagenet100 \
    --data_dir "$DATA_DIR" \
    --label_file_path distillation/label-prompt/imagenet100.txt \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size 512 \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps 50 \
    --negative_prompt "cartoon, anime, painting" \
    --batch_size 32 \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
