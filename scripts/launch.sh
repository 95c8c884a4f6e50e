# Sourced by every launcher, from the repository root. POSIX sh.
#
# RUN            how Python is started: one process, or torchrun for NUM_GPUS > 1 or any TORCHRUN_ARGS
# plain X        prints a number as folder names have it: 0.70 as 0.7, 8.0 as 8
# of_dataset     sets what nobody set of DATA_DIR, INPUT_SIZE, TEACHER and TEACHER_CHECKPOINT as the launchers of $DATASET do
# ipc_of X D     prints the images a class that the folder name X says (_ipc50_), else D
# unless N V D   prints _NV where the value V is not the default D: how folder names say what is not the default
#
# torchrun, not `accelerate launch`: the latter silently reads a per-user configuration file.

case "${NUM_GPUS:-1}" in
    *[!0-9]* | 0) echo "error: NUM_GPUS=$NUM_GPUS: expected a number of at least 1" >&2 && exit 2 ;;
esac
RUN="${PYTHON:-python}"
if [ -n "${TORCHRUN_ARGS:-}" ] || [ "${NUM_GPUS:-1}" -gt 1 ]; then
    RUN="torchrun ${TORCHRUN_ARGS:---standalone --nproc_per_node $NUM_GPUS}"
fi

unless() {
    [ "$2" = "$3" ] || printf '_%s%s' "$1" "$2"
}

plain() {
    printf '%g' "$1"
}

of_dataset() {
    PLACE="data/$DATASET" SIZE=224 NETWORK=resnet18 # of ImageNet, its subsets, and a set of your own
    case "$DATASET" in
        cifar10 | cifar100) SIZE=32 NETWORK=convnet_w128 ;;
        tiny_imagenet) SIZE=64 PLACE=data/tiny-imagenet-200 ;;
        imagenet100) PLACE=data/imagenet ;;
    esac
    DATA_DIR="${DATA_DIR:-$PLACE}"
    INPUT_SIZE="${INPUT_SIZE:-$SIZE}"
    TEACHER="${TEACHER:-$NETWORK}"
    CHECKPOINTS=
    for NETWORK in $TEACHER; do # nobody publishes those of small images: train_teacher makes them
        case "$SIZE" in 224) CHECKPOINT=torchvision ;; *) CHECKPOINT="$OUT/teachers/${DATASET}_$NETWORK" ;; esac
        CHECKPOINTS="${CHECKPOINTS:+$CHECKPOINTS }$CHECKPOINT"
    done
    TEACHER_CHECKPOINT="${TEACHER_CHECKPOINT:-$CHECKPOINTS}"
}

ipc_of() {
    case "$1" in
        *_ipc[1-9]*) set -- "${1#*_ipc}" && printf '%s' "${1%%[!0-9]*}" ;;
        *) printf '%s' "$2" ;;
    esac
}
