#!/bin/sh
# Stage 4 on digits: three students of 15,402 parameters, as scripts/demo.sh trains them; seconds.
# Batch 25: four steps per epoch at IPC 10. Figures are +- over initial weights: the students share
# crops, order and CutMix.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images digits)}"
TEACHER="${TEACHER:-convnet_mini}"
STUDENT="${STUDENT:-convnet_mini}"
EPOCHS="${EPOCHS:-75}"
BATCH_SIZE="${BATCH_SIZE:-25}"
CROPS="${CROPS:-0.5}"
LABELS="${LABELS-$(labels_name _flip0)}"
SEEDS="${SEEDS:-0 1 2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    ${LABELS:+--fkd_path "$OUT/labels/$LABELS"} \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --bn_batch "$BATCH_SIZE" \
    --adamw_lr 0.005 \
    --adamw_weight_decay 0.01 \
    --cos \
    --temperature 20 \
    --loss kl \
    --input_size 32 \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --flip 0 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --seeds $SEEDS \
    --eval_every 50 \
    --num_workers 0 \
    --output_dir "$OUT/students" \
    "$@"
