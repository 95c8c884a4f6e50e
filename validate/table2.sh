#!/bin/sh
# Table 2: ImageNet-1K (IPC 10, 50, 100, 200) and Tiny-ImageNet (IPC 50, 100).
# ResNet-18 teacher; ResNet-18, 50 and 101 students. The paper's D4M with R18: 27.9 / 55.2 / 59.3 / 62.6; 46.2 / 51.4;
# D4M-G, Tiny-ImageNet's classes taken out of the distilled ImageNet-1K: 46.8 / 53.3.
# --plan says what it will do, time and disk; one cell: sh validate/table2.sh --dataset imagenet --ipc 10 --student resnet18
# --jobs 8: stages 1-3 on 8 GPUs, then one student a GPU; --smoke: the same commands at toy scale on a CPU, under 5 min.
set -eu
cd "$(dirname "$0")/.."

IMAGENET_DIR="${IMAGENET_DIR:-data/imagenet}"
TINY_IMAGENET_DIR="${TINY_IMAGENET_DIR:-data/tiny-imagenet-200}"
OUT="${OUT:-output}"

exec "${PYTHON:-python}" -m validate.run_table \
    --table 2 \
    --imagenet_dir "$IMAGENET_DIR" \
    --tiny_imagenet_dir "$TINY_IMAGENET_DIR" \
    --jobs "${NUM_GPUS:-1}" \
    --baseline random hard \
    --seeds 0 1 2 \
    ${DIFFUSION_CHECKPOINT:+--diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT"} \
    --out "$OUT" \
    "$@"
