#!/bin/sh
# Stage 1 on ImageNet-1K: images -> Stable Diffusion latents -> k-means prototypes of each class.
# 1,281,167 images. One H200: 2.5 h (from 141 images/s, misc/benchmarks/h200.md); 1.1 GB of JSON at
# IPC 10, 0.33 GB with --prototype_format safetensors.
# DATA_DIR holds train/<wnid>/.
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
    --dataset imagenet \
    --data_dir "$DATA_DIR" \
    --label_file_path distillation/label-prompt/imagenet.txt \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 8 \
    --save_prototype_path "$OUT/prototypes" \
    "$@"
