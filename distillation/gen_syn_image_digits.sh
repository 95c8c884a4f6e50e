#!/bin/sh
# Stage 2 on digits with the tiny model of misc/: 100 images at IPC 10, saved at 32 px; seconds.
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
PROTOTYPES="${PROTOTYPES:-$(d4m_prototypes digits)}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-misc/tiny-sd-digits}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run -m distillation.gen_syn_image \
    --dataset digits \
    --prototype_path "$OUT/prototypes/$PROTOTYPES" \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --strength "$STRENGTH" \
    --guidance_scale "$GUIDANCE" \
    --num_inference_steps "$STEPS" \
    --negative_prompt "cartoon, anime, painting" \
    --seed "$SEED" \
    --batch_size 50 \
    --save_init_image_path "$OUT/images" \
    "$@"
