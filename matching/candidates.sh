#!/bin/sh
# Of CANDIDATES images per prototype the one that a teacher takes for its class: KEEP=confident, or
# hard (CaO2, arXiv 2506.22637). Before it, for four of each of ten:
#     sh distillation/gen_syn_image_imgnt.sh --ipc 40 --num_prototypes 10
# Other data sets: DATASET=cifar10 sh ...; then IMAGES=... sh matching/matching_cf10.sh
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
CANDIDATES="${CANDIDATES:-4}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
KEEP="${KEEP:-confident}"
DATASET="${DATASET:-imagenet}"
OUT="${OUT:-output}"
of_dataset
IMAGES="${IMAGES:-$(d4m_candidates "$DATASET")}"

run -m matching.candidates \
    --image_path "$OUT/images/$IMAGES" \
    --keep "$KEEP" \
    --arch "$TEACHER" \
    --teacher_checkpoint "$TEACHER_CHECKPOINT" \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
