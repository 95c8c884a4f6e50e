# Sourced by every launcher, from the repository root. POSIX sh.
#
# run -m MODULE FLAGS   becomes this Python: one process, or torchrun for NUM_GPUS > 1 or any
#                       TORCHRUN_ARGS; with DRY_RUN=1 it prints the command line, ready to paste.
#                       Several teachers' checkpoints stand one per line in "$TEACHER_CHECKPOINT"
# step COMMAND          for scripts of several commands: runs it, and leaves if it failed. A stop
#                       signal goes on to the command as SIGTERM; then this script leaves with 75
# values                prints, once, the variables of this launcher as they are
# refuse MESSAGE        one line on stderr and status 2, as the stages do
#
# What a stage's folder is called, so that the next one finds it:
# d4m_prototypes DATASET        by IPC, KM_EXPAND, and SIZE and SEED where they are set
# d4m_images DATASET            by STRENGTH, GUIDANCE, and STEPS where it is set, too
# d4m_candidates DATASET        of CANDIDATES images for each of IPC prototypes
# teacher_name DATASET NETWORK  by TEACHER_EPOCHS, TEACHER_BATCH, TEACHER_LR, TEACHER_SEED, if set
# labels_name [PARTS]   of IMAGES by TEACHER, by EPOCHS, BATCH_SIZE, and CROPS and FKD_SEED where
#                       they are set; PARTS: of other flips than the default
#
# of_dataset            sets what nobody set of DATA_DIR, INPUT_SIZE, TEACHER and
#                       TEACHER_CHECKPOINT (PUBLIC_WEIGHTS: which of the public ones) as the
#                       launchers of DATASET do, and CLASSES: 10 for a set of your own
# ipc_of NAME DEFAULT   prints the images per class that a folder's name says (_ipc50_)
# unless NAME VALUE DEFAULT   prints _NAMEVALUE where the value is not the default
# plain NUMBER          prints it as folder names have it: 0.70 as 0.7, 8.0 as 8
#
# What is set from outside means what it says in the folder where it is set: OUT=x of a launcher
# that is started from another folder is there, not here. Inside the repository paths are from here.
#
# torchrun, not `accelerate launch`: that one silently reads a configuration file of the user.

refuse() {
    echo "error: $*" >&2
    exit 2
}

plain() {
    LC_ALL=C printf '%g' "$1" # some languages have 0,7
}

case "${NUM_GPUS:-1}" in
    *[!0-9]* | 0) refuse "NUM_GPUS=$NUM_GPUS: expected a number of at least 1" ;;
esac
NEWLINE='
'
unset CDPATH PYTHONSAFEPATH # python -m looks for the stages here
LAUNCHER="$(cd "${OLDPWD:-.}" 2>/dev/null && readlink -f "$0")" || LAUNCHER="$0"
CALLER="$(cd "${OLDPWD:-.}" 2>/dev/null && pwd -P)" || CALLER="$(pwd -P)"
case "$CALLER/" in
    "$(pwd -P)"/*) ;;
    *)
        for NAME in OUT DATA_DIR CIFAR10_DIR CIFAR100_DIR IMAGENET_DIR TINY_IMAGENET_DIR MODEL \
            RESULTS DIFFUSION_CHECKPOINT TEACHER_CHECKPOINT PYTHON; do
            eval "VALUE=\"\${$NAME:-}\""
            case "$NAME:$VALUE" in
                *: | *:/*) ;; # not set; an absolute path
                OUT:* | PYTHON:*/* | [!P]*) # not PYTHON=python3
                    [ "$NAME" != OUT ] && [ ! -e "$CALLER/$VALUE" ] ||
                        eval "$NAME=\"\$CALLER/\$VALUE\""
                    ;;
            esac
        done
        case " $*" in
            *" --"*dir* | *" --"*path* | *" --"*checkpoint* | *" --"*cache*)
                echo "started in $CALLER: relative paths in flags are from $(pwd -P)" >&2
                ;;
        esac
        ;;
esac
[ -z "${DATASET:-}" ] || DATASET="$(printf %s "$DATASET" | tr - _)" # as --dataset takes it
for NAME in IPC KM_EXPAND SIZE SEED STEPS CANDIDATES EPOCHS BATCH_SIZE FKD_SEED \
    TEACHER_EPOCHS TEACHER_BATCH TEACHER_SEED STRENGTH GUIDANCE CROPS TEACHER_LR; do
    eval "WORDS=\"\${$NAME:-}\""
    for WORD in $WORDS; do
        case "$NAME:$WORD" in
            STRENGTH:* | GUIDANCE:* | CROPS:* | TEACHER_LR:*)
                plain "$WORD" >/dev/null 2>&1 || refuse "$NAME=$WORD: expected a number"
                ;;
            *:0) ;;
            *:0* | *:*[!0-9]*) refuse "$NAME=$WORD: expected a whole number, such as 10" ;;
        esac
    done
done
case " $* " in # hard labels and those made while the student trains have no folder
    *" --hard_label "* | *" --hard-label "* | *" --online "*) LABELS= ;;
esac

run() {
    FLAG=
    for WORD; do # turned round once, to the same words
        shift
        case "$FLAG:$WORD" in
            --teacher_checkpoint:*"$NEWLINE"*) IFS="$NEWLINE" && set -- "$@" $WORD && unset IFS ;;
            *) set -- "$@" "$WORD" ;;
        esac
        FLAG="$WORD"
    done
    TORCHRUN=
    if [ -n "${TORCHRUN_ARGS:-}" ] || [ "${NUM_GPUS:-1}" -gt 1 ]; then
        TORCHRUN="${TORCHRUN_ARGS:---standalone --nproc_per_node $NUM_GPUS}"
    fi
    [ -z "$TORCHRUN" ] || set -- -m scripts.torchrun $TORCHRUN "$@"
    command -v "${PYTHON:-python}" >/dev/null || PYTHON="${PYTHON:-python3}"
    case "$(command -v "${PYTHON:-python}")" in
        "") set -- $PYTHON "$@" ;; # a command of several words, such as conda run python
        *) set -- "${PYTHON:-python}" "$@" ;; # a program, whose path may hold spaces
    esac
    if [ "${DRY_RUN:-0}" != 0 ]; then
        printf '%s\n' "$(quoted "$@")"
        return
    fi
    command -v "$1" >/dev/null || refuse "${PYTHON:-$1}: no such program; PYTHON=... names another"
    values
    export D4M_NEXT="${D4M_NEXT-$(next_launcher)}"
    exec "$@"
}

next_launcher() { # what a finished stage names as the next command; the variables stay the same
    NAME="${LAUNCHER##*/}"
    case "$NAME" in
        gen_prototype*) set -- distillation/gen_syn_image "${NAME#gen_prototype}" ;;
        gen_syn_image*) set -- matching/matching "${NAME#gen_syn_image}" ;;
        distill*) set -- matching/matching "${NAME#distill}" ;;
        train_teacher*) set -- distillation/distill "${NAME#train_teacher}" ;;
        matching*) set -- validate/train_FKD "${NAME#matching}" ;;
        *) return 0 ;;
    esac
    [ -f "$1$2" ] || set -- "$1" .sh # of ImageNet
    [ ! -f "$1$2" ] || echo "sh $1$2, with the same variables"
}

TOLD=
case " $* " in
    *" --help "* | *" -h "*) # what stands at the top of the script, then the stage's own
        sed -n '2,${/^#/!q;s/^#$//;s/^# //;p;}' "$LAUNCHER"
        grep -q '^run -m' "$LAUNCHER" || exit 0
        TOLD=none
        ;;
esac
values() {
    [ -z "$TOLD" ] && [ "${DRY_RUN:-0}" = 0 ] || return 0
    TOLD="${LAUNCHER##*/}:"
    for NAME in $(tr ' ' '\n' <"$LAUNCHER" | sed -n 's/^\([A-Z][A-Z0-9_]*\)="\${\1:*-.*/\1/p') \
        DATA_DIR INPUT_SIZE TEACHER TEACHER_CHECKPOINT; do # the last four: by of_dataset
        case "$TOLD " in *" $NAME="*) continue ;; esac
        grep -q "[\$]{*$NAME" "$LAUNCHER" || continue
        eval "TOLD=\"\$TOLD $NAME=\$(quoted \"\${$NAME:-}\")\""
    done
    [ "$TOLD" = "${LAUNCHER##*/}:" ] || printf '%s\n' "$TOLD" >&2
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
    values
    trap 'STOPPED=75; [ -z "$CHILDREN" ] || kill $CHILDREN 2>/dev/null || :' \
        INT TERM USR1 USR2 XCPU HUP
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
    [ -z "$STOPPED" ] || {
        echo "${LAUNCHER##*/}: stopped; run the same command to go on" >&2
        exit 75
    }
    [ $failed -eq 0 ] || exit $failed
}

d4m_prototypes() {
    printf %s "$1-ipc$IPC-kmexpand$KM_EXPAND$(size_part "$1")$(unless seed "${SEED:-0}" 0)"
}

d4m_images() {
    printf %s "${1}_ipc${IPC}_s$(plain "$STRENGTH")_g$(plain "$GUIDANCE")_kmexpand$KM_EXPAND"
    printf %s "$(unless steps "${STEPS:-50}" 50)$(unless seed "${SEED:-0}" 0)$(size_part "$1")"
}

d4m_candidates() {
    whole="$(IPC=$((IPC * CANDIDATES)) && d4m_images "$1")"
    head="$(IPC=$((IPC * CANDIDATES)) SEED=0 SIZE= && d4m_images "$1")"
    printf %s "${head}_protos$IPC${whole#"$head"}"
}

size_part() { # DATASET: of stage 1, where it is not the usual one
    case "$1" in
        digits) unless size "${SIZE:-32}" 32 ;;
        *) unless size "${SIZE:-512}" 512 ;;
    esac
}

teacher_name() {
    case "$1:$2" in # its launcher's epochs, batch and learning rate
        digits:*) set -- "$1" "$2" 15 50 0.02 ;;
        tiny_imagenet:convnet*) set -- "$1" "$2" 200 256 0.01 ;;
        tiny_imagenet:*) set -- "$1" "$2" 200 256 0.2 ;;
        *:convnet*) set -- "$1" "$2" 200 128 0.01 ;;
        *) set -- "$1" "$2" 200 128 0.1 ;;
    esac
    printf %s "${1}_$2$(unless epochs "${TEACHER_EPOCHS:-$3}" "$3")"
    printf %s "$(unless b "${TEACHER_BATCH:-$4}" "$4")"
    printf %s "$(unless lr "$(plain "${TEACHER_LR:-$5}")" "$5")"
    printf %s "$(unless seed "${TEACHER_SEED:-1000}" 1000)"
}

labels_name() {
    printf %s "${IMAGES}_$TEACHER$(unless epochs "$EPOCHS" 300)$(unless b "$BATCH_SIZE" 1024)"
    [ "${CROPS:-0.08}" = 0.08 ] || printf %s "_crops-$(plain "$CROPS")-1"
    printf %s "${1:-}_mix-cutmix$(unless seed "${FKD_SEED:-42}" 42)"
}

of_dataset() {
    PLACE="data/$DATASET" PIXELS=224 NETWORK=resnet18 # ImageNet, its subsets, a set of your own
    CLASSES="${CLASSES:-10}"
    case "$DATASET" in
        imagenet) CLASSES=1000 ;;
        imagenet100) CLASSES=100 PLACE=data/imagenet ;;
        tiny_imagenet) CLASSES=200 PIXELS=64 PLACE=data/tiny-imagenet-200 ;;
        cifar10) PIXELS=32 NETWORK=convnet_w128 ;;
        cifar100) CLASSES=100 PIXELS=32 NETWORK=convnet_w128 ;;
        digits) PIXELS=32 NETWORK=convnet_mini ;;
    esac
    DATA_DIR="${DATA_DIR:-$PLACE}"
    INPUT_SIZE="${INPUT_SIZE:-$PIXELS}"
    TEACHER="${TEACHER:-$NETWORK}"
    CHECKPOINTS=
    for NETWORK in $TEACHER; do # nobody publishes those of small images: train_teacher makes them
        CHECKPOINT="${PUBLIC_WEIGHTS:-torchvision}"
        [ "$PIXELS" = 224 ] || CHECKPOINT="$OUT/teachers/$(teacher_name "$DATASET" "$NETWORK")"
        CHECKPOINTS="${CHECKPOINTS:+$CHECKPOINTS$NEWLINE}$CHECKPOINT"
    done
    case "$TEACHER:${TEACHER_CHECKPOINT:-}" in
        *" "*:*"$NEWLINE"* | *" "*:) ;;
        *" "*:*) TEACHER_CHECKPOINT="$(printf '%s\n' $TEACHER_CHECKPOINT)" ;;
    esac
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
