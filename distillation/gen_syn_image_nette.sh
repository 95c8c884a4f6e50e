#!/bin/sh
# Stage 2 on ImageNette: prototypes -> noised, denoised under the class prompt, decoded -> PNGs.
# 100 images at IPC 10. Not in the paper.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
STEPS="${STEPS:-50}"
SEED="${SEED:-0}"
OUT="${OUT:-output}"
PROTOTYPES="${PROTOTYPES:-$(d4m_prototypes imagenette)}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.gen_syn_image \
    --dataset imagenette \
    --prototype_path "$OUT/prototypes/$PROTOTYPES" \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps "$STEPS" \
    --negative_prompt "cartoon, anime, painting" \
    --seed "$SEED" \
    --batch_size 32 \
    --save_init_image_path "$OUT/images" \
    "$@"
