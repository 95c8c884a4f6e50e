#!/bin/sh
# Stages 1 and 2 with DiT-XL/2 on ImageNet-1K or a subset (DATASET=imagenette): class ids, no prompts.
# Not run with the public weights. Guidance 4 is Minimax's and diffusers' for DiT. Strength 0.7 is the
# paper's noise level, on DiT's schedule t = 0.50 T. The 512-px model: SIZE=512
# DIFFUSION_CHECKPOINT=facebook/DiT-XL-2-512. Weights: CC BY-NC 4.0, so are the images.
# Stage 4 on its images: SIZE=256 GUIDANCE=4 sh validate/train_FKD_minimax.sh, or train_FKD_rded.sh.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

DATASET="${DATASET:-imagenet}"
IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-256}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-4}"
STEPS="${STEPS:-50}"
SEED="${SEED:-0}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-facebook/DiT-XL-2-256}"
case "$DIFFUSION_CHECKPOINT" in
    facebook/*) REVISION="${REVISION:-refs/pr/1}" ;; # main holds no safetensors
    *) REVISION="${REVISION:-}" ;;
esac
of_dataset

run -m distillation.distill \
    --dataset "$DATASET" \
    --data_dir "$DATA_DIR" \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    ${REVISION:+--revision "$REVISION"} \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --noise_level paper \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps "$STEPS" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
