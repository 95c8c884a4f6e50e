#!/bin/sh
# Stages 1 and 2 with Stable Diffusion XL on ImageNet-1K or a subset (DATASET=imagenette).
# Not run with the public weights. Guidance 5 is diffusers' for SDXL. Strength 0.7 is the paper's
# noise level. On a card of 12 to 24 GB add --offload --batch_size 2 (docs/generators.md). A turbo:
# DIFFUSION_CHECKPOINT=stabilityai/sdxl-turbo SIZE=512 STEPS=4 GUIDANCE=1 (off, as it was trained).
# Stage 4 on its images: SIZE=1024 GUIDANCE=5 sh validate/train_FKD_minimax.sh, or train_FKD_rded.sh.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

DATASET="${DATASET:-imagenet}"
IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-1024}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-5}"
STEPS="${STEPS:-50}"
SEED="${SEED:-0}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stabilityai/stable-diffusion-xl-base-1.0}"
of_dataset

run -m distillation.distill \
    --dataset "$DATASET" \
    --data_dir "$DATA_DIR" \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --noise_level paper \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps "$STEPS" \
    --negative_prompt "cartoon, anime, painting" \
    --seed "$SEED" \
    --batch_size 8 \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
