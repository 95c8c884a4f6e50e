#!/bin/sh
# Table 5: across architectures, ImageNet-1K, IPC 50.
# Teachers ResNet-18, MobileNet-V2, Swin-T; students ResNet-18, MobileNet-V2, EfficientNet-B0, Swin-T, ViT-B.
# The paper: 55.2 from R18 to R18, 27.5 from Swin-T to R18. 30 GB of labels a teacher; --online needs none.
# --plan says what it will do, time and disk; one cell: sh validate/table5.sh --teacher resnet18 --student swin_t
# --jobs 8: stages 1-3 on 8 GPUs, then one student a GPU; --smoke: the same commands at toy scale on a CPU, under 5 min.
set -eu
cd "$(dirname "$0")/.."

IMAGENET_DIR="${IMAGENET_DIR:-data/imagenet}"
OUT="${OUT:-output}"

exec "${PYTHON:-python}" -m validate.run_table \
    --table 5 \
    --imagenet_dir "$IMAGENET_DIR" \
    --jobs "${NUM_GPUS:-1}" \
    --baseline random hard \
    --seeds 0 1 2 \
    ${DIFFUSION_CHECKPOINT:+--diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT"} \
    --out "$OUT" \
    "$@"
