#!/bin/sh
# Table 6: cost of an image at 512 px.
# Seconds and peak GPU memory of stage 2, 100 images, one at a time as the paper and 32 at a time.
# The paper: 2.7 s and 6.1 GB on a V100.
# --plan says what it will do, time and disk; one cell: sh validate/table6.sh --dataset imagenet
# --smoke: the same commands at toy scale on a CPU, in a minute.
set -eu
cd "$(dirname "$0")/.."

IMAGENET_DIR="${IMAGENET_DIR:-data/imagenet}"
TINY_IMAGENET_DIR="${TINY_IMAGENET_DIR:-data/tiny-imagenet-200}"
OUT="${OUT:-output}"

exec "${PYTHON:-python}" -m validate.run_table \
    --table 6 \
    --imagenet_dir "$IMAGENET_DIR" \
    --tiny_imagenet_dir "$TINY_IMAGENET_DIR" \
    --jobs "${NUM_GPUS:-1}" \
    ${DIFFUSION_CHECKPOINT:+--diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT"} \
    --out "$OUT" \
    "$@"
