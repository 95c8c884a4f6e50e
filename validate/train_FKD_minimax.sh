#!/bin/sh
# Stage 4 by Minimax's hard-label protocol (arXiv 2311.15529) of the ten-class sets: no teacher,
# ResNetAP-10, CutMix, colour jitter and lighting. ImageNette, IPC 10 / 20 / 50: random real images
# 54.2 / 63.5 / 76.1, D4M 60.9 / 66.3 / 77.7 (published).
# Epochs: 2000 at IPC 10, 1500 at 20 and 50, 1000 at 100. Crops: half the picture or more.
# Other images: IMAGES=imagenette_ipc10_random; other sets: DATASET=imagewoof; other networks:
# STUDENT=convnet6 or resnet18.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATASET="${DATASET:-imagenette}"
OUT="${OUT:-output}"
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
IPC="$(ipc_of "$IMAGES" "$IPC")" # what is below depends on what the images are
STUDENT="${STUDENT:-resnet_ap10}"
case "$IPC" in
    [1-9] | 10) EPOCHS="${EPOCHS:-2000}" ;;
    [1-9][0-9]) EPOCHS="${EPOCHS:-1500}" ;;
    *) EPOCHS="${EPOCHS:-1000}" ;;
esac
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    --hard_label \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size 64 \
    --bn_batch 64 \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops 0.5 \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --color_jitter 0.4 \
    --lighting 0.1 \
    --sgd \
    --learning_rate 0.01 \
    --momentum 0.9 \
    --weight_decay 5e-4 \
    --schedule step \
    --step_factor 0.2 \
    --seeds $SEEDS \
    --eval_every 100 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
