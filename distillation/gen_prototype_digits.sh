#!/bin/sh
# Stage 1 on scikit-learn's digits with the tiny model of misc/: a rehearsal of the other data sets.
# Nothing to download; seconds on a CPU.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE="${SIZE:-32}"
SEED="${SEED:-0}"
OUT="${OUT:-output}"
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-misc/tiny-sd-digits}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more threads

run -m distillation.gen_prototype \
    --dataset digits \
    --diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT" \
    --size "$SIZE" \
    --ipc "$IPC" \
    --km_expand "$KM_EXPAND" \
    --seed "$SEED" \
    --batch_size 32 \
    --num_workers 0 \
    --save_prototype_path "$OUT/prototypes" \
    "$@"
