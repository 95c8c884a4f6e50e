#!/bin/sh
# The best that we know for D4M, on CIFAR-10 with the small Stable Diffusion of misc/: its images as
# they are, since nothing that may lift them is seen to (docs/gains.md), and students by RD3's
# recipe, the one other recipe that was tried on them. As many random real images beside them, by
# the same recipe. Top-1 with soft labels, 8 draws of images (misc/results/cifar10_small.md):
# D4M 55.4, random real 53.6; by D4M's own recipe 53.9 and 51.1. The report's +- is over students of
# one draw; SEED=1 is another draw. The teacher sees 500 pictures per class.
#
#   sh validate/best_cifar10_small.sh    on a CPU; DATA_DIR, IPC, STUDENT, SEEDS: the launchers'
#   SEED=1 sh ...                        another draw of images
#   DRY_RUN=1 sh ...                     prints the commands; --dry_run checks them
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."

DATASET=cifar10 METHOD= SMOKE= GIVEN_OUT="${OUT:-}"
TEACHER="${TEACHER:-convnet_w64}"
TEACHER_EPOCHS="${TEACHER_EPOCHS:-60}"
TEACHER_BATCH="${TEACHER_BATCH:-50}"
SIZE=32
DIFFUSION_CHECKPOINT="${DIFFUSION_CHECKPOINT:-misc/tiny-sd-cifar10}"
export TEACHER_EPOCHS TEACHER_BATCH SIZE DIFFUSION_CHECKPOINT TEACHER_CHECKPOINT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more
. scripts/tables.sh
[ -n "$GIVEN_OUT" ] || OUT=output/cifar10_small/best

cell() {
    stage distillation/gen_prototype
    stage distillation/gen_syn_image
    stage distillation/random_real
    if [ -z "${TEACHER_CHECKPOINT:-}" ]; then
        stage matching/train_teacher --max_images_per_class 500
        TEACHER_CHECKPOINT="$OUT/teachers/$(teacher_name cifar10 "$TEACHER")_max500"
    fi
    for IMAGES in "$IMAGES" "cifar10_ipc${IPC}_random$(unless seed "${SEED:-0}" 0)"; do
        stage validate/train_FKD_rd3
    done
}

cells cifar10 "${IPC:-10}" d4m "$TEACHER" "${STUDENT:-$TEACHER}"
NUM_GPUS=1 TORCHRUN_ARGS= # one process
[ -n "$CHECK" ] || step run -m misc.report "$OUT"
