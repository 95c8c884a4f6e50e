#!/bin/sh
# Stage 1 on ImageNette: images -> Stable Diffusion latents -> k-means prototypes of each class.
# 10 classes of ImageNet, about 9,500 images. DATA_DIR holds train/<wnid>/; an ImageNet root does
# too.
# Not in the paper.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-512}"
SEED="${SEED:-0}"
DATA_DIR="${DATA_DIR:-data/imagenette}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.gen_prototype \
    --dataset imagenette \
    --data_dir "$DATA_DIR" \
    --label_file_path distillation/label-prompt/imagenette.txt \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 8 \
    --save_prototype_path "$OUT/prototypes" \
    "$@"
