#!/bin/sh
# A small class-prompted Stable Diffusion of CIFAR-10, from scratch: first a classifier for the VAE's perceptual loss (another
# one than judges the images later), then VAE, UNet and text encoder. misc/tiny-sd-cifar10 was made by this with PRESET=cpu.
# On one CPU core: 5 + 18 + 42 minutes. On a GPU PRESET=gpu is a larger one, meant to take 20 minutes (never run yet).
# Stop it whenever you like; the same command goes on. Look at $MODEL/samples/ while it trains.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

PRESET="${PRESET:-cpu}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output/cifar10_small}"
MODEL="${MODEL:-$OUT/models/tiny-sd-cifar10}"

${PYTHON:-python} -m matching.train_teacher \
    --dataset cifar10 \
    --data_dir "$DATA_DIR" \
    --arch convnet_w64 \
    --epochs 4 \
    --eval_every 2 \
    --num_workers 0 \
    --output_dir "$OUT/perceptual"

exec ${PYTHON:-python} -m misc.train_tiny_sd \
    --dataset cifar10 \
    --data_dir "$DATA_DIR" \
    --preset "$PRESET" \
    --seed 0 \
    --perceptual_checkpoint "$OUT/perceptual/cifar10_convnet_w64_epochs4" \
    --perceptual_weight 0.1 \
    --prompt_dropout 0.1 \
    --samples text \
    --output_dir "$MODEL" \
    "$@"
