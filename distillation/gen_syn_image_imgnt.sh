#!/bin/sh
# Stage 2 on ImageNet-1K: prototypes -> noised, denoised under the class prompt, decoded -> PNGs.
# 10,000 images at IPC 10. One H200: about 25 min (estimate); 0.8 GB of PNGs; fits a 12 GB GPU at
# --batch_size 8.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.gen_syn_image \
    --dataset imagenet \
    --prototype_path "$OUT/prototypes/imagenet-ipc${IPC}-kmexpand${KM_EXPAND}" \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps 50 \
    --negative_prompt "cartoon, anime, painting" \
    --batch_size 32 \
    --save_init_image_path "$OUT/images" \
    "$@"
