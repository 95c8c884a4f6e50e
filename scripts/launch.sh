# Sourced by every launcher, from the repository root. POSIX sh.
#
# run -m MODULE FLAGS   becomes this Python: one process, or torchrun for NUM_GPUS > 1 or any
#                       TORCHRUN_ARGS; with DRY_RUN=1 it prints the command line, ready to paste
# step COMMAND          for scripts of several commands: runs it, and leaves if it failed. A stop
#                       signal goes on to the command as SIGTERM; then this script leaves with 75
# refuse MESSAGE        one line on stderr and status 2, as the stages do
# d4m_images DATASET    prints the name of the images that stages 1 and 2 make of it
# labels_name [PARTS]   prints the name of the soft labels of IMAGES by TEACHER; PARTS: of other
#                       crops or flips than the default
# of_dataset            sets what nobody set of DATA_DIR, INPUT_SIZE, TEACHER and
#                       TEACHER_CHECKPOINT as the launchers of DATASET do
# ipc_of NAME DEFAULT   prints the images per class that a folder's name says (_ipc50_)
# unless NAME VALUE DEFAULT   prints _NAMEVALUE where the value is not the default
# plain NUMBER          prints it as folder names have it: 0.70 as 0.7, 8.0 as 8
#
# torchrun, not `accelerate launch`: that one silently reads a configuration file of the user.

refuse() {
    echo "error: $*" >&2
    exit 2
}

case "${NUM_GPUS:-1}" in
    *[!0-9]* | 0) refuse "NUM_GPUS=$NUM_GPUS: expected a number of at least 1" ;;
esac
RUN="${PYTHON:-python}"
if [ -n "${TORCHRUN_ARGS:-}" ] || [ "${NUM_GPUS:-1}" -gt 1 ]; then
    RUN="torchrun ${TORCHRUN_ARGS:---standalone --nproc_per_node $NUM_GPUS}"
fi
case " $* " in # hard labels and those made while the student trains have no folder
    *" --hard_label "* | *" --hard-label "* | *" --online "*) LABELS= ;;
esac

run() {
    case "${DRY_RUN:-0}" in
        0) exec $RUN "$@" ;;
        *) printf '%s\n' "$(quoted $RUN "$@")" ;;
    esac
}

quoted() { # the words, so that a shell reads them back
    between=
    for word; do
        case "$word" in
            "" | *[!A-Za-z0-9_./:=,+@%-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
        esac
        printf '%s%s' "$between" "$word"
        between=" "
    done
}

STOPPED= CHILDREN=
step() {
    trap 'STOPPED=75; [ -z "$CHILDREN" ] || kill $CHILDREN 2>/dev/null || :' INT TERM USR1
    "$@" &
    await $!
}

await() { # PIDS: a signal ends a wait, not the process
    CHILDREN="$*" failed=0
    [ -z "$STOPPED" ] || kill "$@" 2>/dev/null || : # it came before the trap knew of them
    for pid; do
        wait "$pid" || failed=$?
        while [ -n "$STOPPED" ] && kill -0 "$pid" 2>/dev/null; do wait "$pid" || :; done
    done
    CHILDREN=
    [ -z "$STOPPED" ] || exit 75
    [ $failed -eq 0 ] || exit $failed
}

d4m_images() {
    printf %s "${1}_ipc${IPC}_s$(plain "$STRENGTH")_g$(plain "$GUIDANCE")_kmexpand$KM_EXPAND"
}

labels_name() {
    printf %s "${IMAGES}_$TEACHER$(unless epochs "$EPOCHS" 300)$(unless b "$BATCH_SIZE" 1024)"
    printf %s "${1:-}_mix-cutmix"
}

of_dataset() {
    PLACE="data/$DATASET" SIZE=224 NETWORK=resnet18 # ImageNet, its subsets, a set of your own
    case "$DATASET" in
        cifar10 | cifar100) SIZE=32 NETWORK=convnet_w128 ;;
        digits) SIZE=32 NETWORK=convnet_mini ;;
        tiny_imagenet) SIZE=64 PLACE=data/tiny-imagenet-200 ;;
        imagenet100) PLACE=data/imagenet ;;
    esac
    DATA_DIR="${DATA_DIR:-$PLACE}"
    INPUT_SIZE="${INPUT_SIZE:-$SIZE}"
    TEACHER="${TEACHER:-$NETWORK}"
    CHECKPOINTS=
    for NETWORK in $TEACHER; do # nobody publishes those of small images: train_teacher makes them
        CHECKPOINT=torchvision
        [ "$SIZE" = 224 ] || CHECKPOINT="$OUT/teachers/${DATASET}_$NETWORK"
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

unless() {
    [ "$2" = "$3" ] || printf '_%s%s' "$1" "$2"
}

plain() {
    printf '%g' "$1"
}
