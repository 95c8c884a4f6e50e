#!/bin/sh
# Stage 3, training-time matching, on Tiny-ImageNet: a teacher's soft labels for the crops of every
# epoch.
# Teacher: ours, from train_teacher_tnimgnt.sh (nobody publishes one). 1.2 GB of labels at IPC 50.
# The paper gives no hyper-parameters for this set: its ImageNet values are kept, at 64 px. Batch
# 1024: ten steps per epoch at IPC 50 (10,000 images), as ImageNet has at IPC 10.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-50}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images tiny_imagenet)}"
TEACHER="${TEACHER:-resnet18}"
TEACHER_CHECKPOINT="${TEACHER_CHECKPOINT:-$OUT/teachers/$(teacher_name tiny_imagenet "$TEACHER")}"
EPOCHS="${EPOCHS:-300}"
BATCH_SIZE="${BATCH_SIZE:-1024}"
CROPS="${CROPS:-0.08}"
FKD_SEED="${FKD_SEED:-42}"

run -m matching.generate_soft_label \
    --data "$OUT/images/$IMAGES" \
    --arch "$TEACHER" \
    --teacher_checkpoint "$TEACHER_CHECKPOINT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --fkd_seed "$FKD_SEED" \
    --input_size 64 \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --use_fp16 \
    --mode fkd_save \
    --num_workers 8 \
    --fkd_path "$OUT/labels" \
    "$@"
