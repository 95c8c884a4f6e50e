#!/bin/sh
# The best that we know for D4M, on ImageNet-1K: its images as they are, since on CIFAR-10 nothing
# that may lift them is seen to (docs/gains.md), students by RD3's recipe, and as many random real
# images by the same recipe. Never run. Published at IPC 10, ResNet-18: 27.9 by D4M's own recipe,
# 45.4 by RD3's; 33.1 by D4M's with cluster sizes as weights (DDOQ), which cost on CIFAR-10: for them
# sh validate/train_FKD_rd3.sh --loss_weights cluster, on the same images.
#
#   sh validate/best_imgnt.sh    DATA_DIR, IPC, TEACHER, STUDENT, SEEDS: the launchers'
#   DRY_RUN=1 sh ...             prints the commands; --dry_run checks them
#   SMOKE=1 sh ...               a rehearsal on digits
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."

DATASET=imagenet METHOD= TEACHER="${TEACHER:-resnet18}"
. scripts/tables.sh

cell() {
    stage distillation/gen_prototype --latent_cache "$OUT/latents"
    stage distillation/gen_syn_image
    stage distillation/random_real
    [ -z "${SMOKE:-}" ] || stage matching/train_teacher # else torchvision's
    for IMAGES in "$IMAGES" "${DATASET}_ipc${IPC}_random$(unless seed "${SEED:-0}" 0)"; do
        stage validate/train_FKD_rd3
    done
}

cells imagenet "${IPC:-10}" d4m "$TEACHER" "${STUDENT:-$TEACHER}"
NUM_GPUS=1 TORCHRUN_ARGS= # one process
[ -n "$CHECK" ] || step run -m misc.report "$OUT"
