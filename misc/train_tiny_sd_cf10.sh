#!/bin/sh
# A small class-prompted Stable Diffusion of CIFAR-10, from scratch: first a classifier for the
# VAE's perceptual loss (trained apart from the one that judges the images later), then VAE, UNet
# and text encoder. misc/tiny-sd-cifar10 was made by this.
# On one CPU core: 5 + 15 + 49 minutes (measured, another job on the other core). PRESET=gpu is a
# larger one, its steps set to fit into MINUTES of that GPU (never run yet). Stop it whenever you
# like; the same command goes on. Look at $MODEL/samples/.
# DATA_DIR holds {train,val}/CLASS/*.png, or torchvision's cifar-10-batches-py.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh
NUM_GPUS=1 TORCHRUN_ARGS= # one process

PRESET="${PRESET:-cpu}"
case "$PRESET" in
gpu) MINUTES="${MINUTES:-17}" ;;
*) MINUTES="${MINUTES:-0}" ;; # 0: the preset's own numbers of steps
esac
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output/cifar10_small}"
MODEL="${MODEL:-output/cifar10_small/models/tiny-sd-cifar10}"
CLASSIFIER="$OUT/perceptual/cifar10_convnet_w64_epochs4"

step run -m matching.train_teacher \
    --dataset cifar10 \
    --data_dir "$DATA_DIR" \
    --arch convnet_w64 \
    --epochs 4 \
    --eval_every 2 \
    --checkpoint_every 1 \
    --num_workers 0 \
    --output_dir "$OUT/perceptual"

run -m misc.train_tiny_sd \
    --dataset cifar10 \
    --data_dir "$DATA_DIR" \
    --preset "$PRESET" \
    --minutes "$MINUTES" \
    --seed 0 \
    --perceptual_checkpoint "$CLASSIFIER" \
    --perceptual_weight 0.1 \
    --prompt_dropout 0.1 \
    --samples text \
    --output_dir "$MODEL" \
    "$@"
