#!/bin/sh
# Stage 3, training-time matching, on CIFAR-100: a teacher's soft labels for the crops of every
# epoch.
# Teacher: ours, from train_teacher_cf100.sh (nobody publishes one). 0.1 GB of labels at IPC 10.
# The paper gives no hyper-parameters for this set: epochs and batch are
# DD-Ranking's for D4M-like methods on CIFAR. Batch 100: ImageNet's 1024 would be one step per epoch
# at IPC 10 (1,000 images); 100 makes ten.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
OUT="${OUT:-output}"
IMAGES="${IMAGES:-$(d4m_images cifar100)}"
TEACHER="${TEACHER:-convnet_w128}"
TEACHER_CHECKPOINT="${TEACHER_CHECKPOINT:-$OUT/teachers/$(teacher_name cifar100 "$TEACHER")}"
EPOCHS="${EPOCHS:-500}"
BATCH_SIZE="${BATCH_SIZE:-100}"
CROPS="${CROPS:-0.08}"
FKD_SEED="${FKD_SEED:-42}"

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
    --mix_type cutmix \
    --cutmix 1.0 \
    --use_fp16 \
    --mode fkd_save \
    --num_workers 8 \
    --fkd_path "$OUT/labels" \
    "$@"
