#!/bin/sh
# Stage 4 by CDA's recipe (arXiv 2311.18838): the release's with batches of 128 instead of 1024 (128
# is from an issue thread of its repository, not from its code).
# Its labels: BATCH_SIZE=128 sh matching/matching.sh
# Other images: IMAGES=imagenet_ipc10_random; other data sets: DATASET=cifar10 sh ..., after a
# teacher of theirs was trained.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATASET="${DATASET:-imagenet}"
OUT="${OUT:-output}"
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
STUDENT="${STUDENT:-resnet18}"
EPOCHS="${EPOCHS:-300}"
BATCH_SIZE="${BATCH_SIZE:-128}"
LABELS="${LABELS-$(labels_name)}"
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    ${LABELS:+--fkd_path "$OUT/labels/$LABELS"} \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --bn_batch "$BATCH_SIZE" \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops 0.08 \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --adamw_lr 0.001 \
    --adamw_weight_decay 0.01 \
    --schedule cosine \
    --cos_stretch 1 \
    --loss kl \
    --temperature 20 \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
