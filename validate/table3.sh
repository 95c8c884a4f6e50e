#!/bin/sh
# Table 3: synthesis-time matching (STM) on ImageNet-1K, IPC 10.
# D4M images as they are, and optimised further by SRe2L's recover step with ResNet-18 (4000 iterations, batch 100, lr 0.25);
# teachers and students ResNet-18, 50, 101. The paper, R18 and R18: 27.9 without, 23.6 with.
# --plan says what it will do, time and disk; one cell: sh validate/table3.sh --method stm --teacher resnet18 --student resnet18
# --jobs 8: stages 1-3 on 8 GPUs, then one student a GPU; --smoke: the same commands at toy scale on a CPU, under 5 min.
set -eu
cd "$(dirname "$0")/.."

IMAGENET_DIR="${IMAGENET_DIR:-data/imagenet}"
OUT="${OUT:-output}"

exec "${PYTHON:-python}" -m validate.run_table \
    --table 3 \
    --imagenet_dir "$IMAGENET_DIR" \
    --jobs "${NUM_GPUS:-1}" \
    --baseline random hard \
    --seeds 0 1 2 \
    ${DIFFUSION_CHECKPOINT:+--diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT"} \
    --out "$OUT" \
    "$@"
