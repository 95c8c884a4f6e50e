#!/bin/sh
# Stage 1 on ImageNet-100 (the IDC and Minimax subset): images -> Stable Diffusion latents ->
# k-means prototypes of each class.
# 100 classes of ImageNet, about 128,000 images. DATA_DIR holds train/<wnid>/; an ImageNet root
# does.
# Not in the paper.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-512}"
SEED="${SEED:-0}"
DATA_DIR="${DATA_DIR:-data/imagenet}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.gen_prototype \
    --dataset imagenet100 \
    --data_dir "$DATA_DIR" \
    --label_file_path distillation/label-prompt/imagenet100.txt \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 8 \
    --save_prototype_path "$OUT/prototypes" \
    "$@"
