#!/bin/sh
# As many random real images per class, saved at the size of the distilled ones: what D4M is
# compared with. Of any data set: DATASET=cifar10 IPC=50 sh distillation/random_real.sh
# Then: IMAGES=cifar10_ipc50_random sh matching/matching_cf10.sh, and train_FKD_cf10.sh likewise.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
SEED="${SEED:-0}"
DATASET="${DATASET:-imagenet}"
OUT="${OUT:-output}"
of_dataset

run -m distillation.random_real \
    --dataset "$DATASET" \
    --data_dir "$DATA_DIR" \
    --ipc "$IPC" \
    --seed "$SEED" \
    --num_workers 8 \
    --save_init_image_path "$OUT/images" \
    "$@"
