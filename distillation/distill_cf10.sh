#!/bin/sh
# Stages 1 and 2 on CIFAR-10 in one process, without a prototype file: the same PNGs.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-512}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
STEPS="${STEPS:-50}"
SEED="${SEED:-0}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.distill \
    --dataset cifar10 \
    --data_dir "$DATA_DIR" \
    --label_file_path distillation/label-prompt/cifar10.txt \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps "$STEPS" \
    --negative_prompt "cartoon, anime, painting" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
