#!/bin/sh
# Stage 4 by Minimax's hard-label protocol (arXiv 2311.15529), as its repository's code is for
# ImageNet and its subsets: no teacher, ResNetAP-10, half the picture or more in a crop, flips,
# colour jitter, lighting and CutMix, in this order; weight decay on all parameters; epochs by IPC,
# two thirds of them on 100 classes; test images resized to the input's size, without a margin.
# ImageNette, IPC 10 / 20 / 50: random real images 54.2 / 63.5 / 76.1, D4M 60.9 / 66.3 / 77.7
# (published).
# Other images: IMAGES=imagenette_ipc10_random; other sets: DATASET=imagewoof; other networks:
# STUDENT=convnet6 or resnet18 (torchvision's, with BatchNorm; there with InstanceNorm).
# Differs from the repository: images of another size are cropped as they are, not resized first;
# crops are rounded to bytes; jitter is of normalised images taken back, so to rounding; tests at
# epochs 0, 100, ... and the last, there 100 times, and the best is its result; on CIFAR it has 1000
# epochs, DSA instead of this augmentation and mixes every second batch: not offered, which a warning
# says.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATASET="${DATASET:-imagenette}"
OUT="${OUT:-output}"
case "$DATASET" in
    cifar*) echo "warning: DATASET=$DATASET: this is not Minimax's recipe for CIFAR" >&2 ;;
esac
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
IPC="$(ipc_of "$IMAGES" "$IPC")" # what is below depends on what the images are
STUDENT="${STUDENT:-resnet_ap10}"
if [ "$IPC" -le 1 ]; then
    PASSES=3000
elif [ "$IPC" -le 10 ]; then
    PASSES=2000
elif [ "$IPC" -le 50 ]; then
    PASSES=1500
elif [ "$IPC" -le 200 ]; then
    PASSES=1000
elif [ "$IPC" -le 500 ]; then
    PASSES=500
else
    PASSES=300
fi
RATE=0.01 DECAY=5e-4 BATCH=64
case "$CLASSES" in
    100) PASSES=$((PASSES * 2 / 300 * 100)) ;; # rounded down to hundreds
    200 | 1000) RATE=0.1 DECAY=1e-4 BATCH=128 ;;
esac
EPOCHS="${EPOCHS:-$PASSES}"
BATCH_SIZE="${BATCH_SIZE:-$BATCH}"
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    --hard_label \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --bn_batch "$BATCH_SIZE" \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops 0.5 \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --color_jitter 0.4 \
    --lighting 0.1 \
    --sgd \
    --learning_rate $RATE \
    --momentum 0.9 \
    --weight_decay $DECAY \
    --decay_on all \
    --schedule step \
    --step_factor 0.2 \
    --test_resize "$INPUT_SIZE" \
    --seeds $SEEDS \
    --eval_every 100 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
