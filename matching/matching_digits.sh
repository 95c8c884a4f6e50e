#!/bin/sh
# Stage 3 on digits: a teacher's soft labels for the crops of every epoch, as scripts/demo.sh has
# them.
# Digits are not flipped, and a crop keeps at least half of one: a 6 stays a 6.
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
TEACHER_CHECKPOINT="${TEACHER_CHECKPOINT:-$OUT/teachers/$(teacher_name digits "$TEACHER")}"
EPOCHS="${EPOCHS:-75}"
BATCH_SIZE="${BATCH_SIZE:-25}"
CROPS="${CROPS:-0.5}"
FKD_SEED="${FKD_SEED:-42}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run -m matching.generate_soft_label \
    --data "$OUT/images/$IMAGES" \
    --arch "$TEACHER" \
    --teacher_checkpoint "$TEACHER_CHECKPOINT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --fkd_seed "$FKD_SEED" \
    --input_size 32 \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --flip 0 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --use_fp16 \
    --mode fkd_save \
    --num_workers 0 \
    --fkd_path "$OUT/labels" \
    "$@"
