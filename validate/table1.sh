#!/bin/sh
# Table 1: CIFAR-10 and CIFAR-100.
# ConvNet-W128 student and teacher, IPC 10 and 50, five trainings a number. The paper: 56.2 / 72.8 and 45.0 / 48.8 top-1.
# The paper gives no recipe for CIFAR: DD-Ranking's is used (500 epochs, batch 100, AdamW, half cosine, T 20).
# Teachers that nobody publishes are trained first (the paper: 84.8 and 56.2).
# --plan says what it will do, time and disk; one cell: sh validate/table1.sh --dataset cifar10 --ipc 10
# --jobs 8: stages 1-3 on 8 GPUs, then one student a GPU; --smoke: the same commands at toy scale on a CPU, under 5 min.
set -eu
cd "$(dirname "$0")/.."

CIFAR10_DIR="${CIFAR10_DIR:-data/cifar10}"
CIFAR100_DIR="${CIFAR100_DIR:-data/cifar100}"
OUT="${OUT:-output}"

exec "${PYTHON:-python}" -m validate.run_table \
    --table 1 \
    --cifar10_dir "$CIFAR10_DIR" \
    --cifar100_dir "$CIFAR100_DIR" \
    --jobs "${NUM_GPUS:-1}" \
    --baseline random hard \
    --seeds 0 1 2 3 4 \
    ${DIFFUSION_CHECKPOINT:+--diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT"} \
    --out "$OUT" \
    "$@"
