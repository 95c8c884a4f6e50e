#!/bin/sh
# Stage 1 on Tiny-ImageNet: images -> Stable Diffusion latents -> k-means prototypes of each class.
# 100,000 images of 64 px, resized to 512. DATA_DIR holds train/<wnid>/images/.
# The paper gives no km_expand or guidance for this set: the ImageNet values are kept.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-50}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-512}"
SEED="${SEED:-0}"
DATA_DIR="${DATA_DIR:-data/tiny-imagenet-200}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-stable-diffusion-v1-5/stable-diffusion-v1-5}"

run -m distillation.gen_prototype \
    --dataset tiny_imagenet \
    --data_dir "$DATA_DIR" \
    --label_file_path distillation/label-prompt/tiny_imagenet.txt \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 8 \
    --save_prototype_path "$OUT/prototypes" \
    "$@"
