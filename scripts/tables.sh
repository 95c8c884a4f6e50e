# Sourced by validate/table1.sh ... table6.sh, compare.sh and best_*.sh, from the repository root.
# POSIX sh.
#
# A table defines `cell`: the stages that make one of its numbers, in the order of the method. Then
#
# cells DATASETS IPCS METHODS TEACHERS STUDENTS   runs `cell` for all combinations that are wanted
# table NUMBER                                    prints the table, the paper's number beside ours,
#                                                 and writes the report
#
# and in a cell
#
# stage LAUNCHER [FLAGS]   runs this launcher of DATASET, once for all cells that share it
# baselines                what a number is compared with, by the same teacher and recipe: as many
#                          random real images, and hard labels
#
# From outside:
# DATASET, IPC, METHOD, TEACHER, STUDENT   only these cells; one word or several
# BASELINES="random hard"                  "": none
# ONLY="distillation/gen_prototype ..."    only these stages
# ONLINE=1                 the teacher labels while the student trains: no labels on disk
# STUDENT_FLAGS="..."      more flags for stage 4
# CIFAR10_DIR, CIFAR100_DIR, IMAGENET_DIR, TINY_IMAGENET_DIR   where the real images are
# DRY_RUN=1                only prints the commands
# SMOKE=1                  a rehearsal: the same stages on digits, with the tiny model of misc/
# Flags behind the table's name go to every stage; --dry_run checks all of them and adds up.

. scripts/launch.sh

export D4M_NEXT=none # a table says the whole of it
DATASETS="${DATASET:-}" IPCS="${IPC:-}" METHODS="${METHOD:-}"
TEACHERS="${TEACHER:-}" STUDENTS="${STUDENT:-}"
OUT="${OUT:-output}${SMOKE:+/smoke}"
KM_EXPAND="${KM_EXPAND:-1}" STRENGTH="${STRENGTH:-0.7}" GUIDANCE="${GUIDANCE:-8}"
export DATASET IPC TEACHER STUDENT IMAGES DATA_DIR OUT KM_EXPAND STRENGTH GUIDANCE
FLAGS="$(quoted "$@")" GIVEN_DIR="${DATA_DIR:-}" COMMANDS= PLANS= CHECK=
case " $* " in *" --dry_run "* | *" --dry-run "*) CHECK=1 ;; esac
[ "${DRY_RUN:-0}" = 0 ] || CHECK=
if [ -n "${SMOKE:-}" ]; then
    EPOCHS="${EPOCHS:-20}" SEEDS="${SEEDS:-0 1}" HF_HUB_OFFLINE=1
    export EPOCHS SEEDS HF_HUB_OFFLINE
    [ "${DRY_RUN:-0}" != 0 ] ||
        echo "A rehearsal (SMOKE=1): digits, a tiny model, few epochs; no number is the paper's."
fi
for baseline in ${BASELINES-random hard}; do
    case "$baseline" in
        random | hard) ;;
        *) refuse "BASELINES=$baseline: expected random or hard" ;;
    esac
done

cells() {
    for DATASET in $(among "$DATASETS" "$1"); do
        for IPC in $(among "$IPCS" "$2"); do
            for METHOD in $(among "$METHODS" "$3"); do
                for TEACHER in $(among "$TEACHERS" "$4"); do
                    for STUDENT in $(among "$STUDENTS" "$5"); do
                        [ -z "${SMOKE:-}" ] || rehearsed
                        IMAGES="$(d4m_images "$DATASET")"
                        cell
                    done
                done
            done
        done
    done
}

among() { # WANTED ALL: the words of ALL that are wanted; where none is named, all
    for word in $2; do
        case " $1 " in "  " | *" $word "*) echo "$word" ;; esac
    done
}

rehearsed() {
    DATASET=digits TEACHER=convnet_mini STUDENT=convnet_mini
}

baselines() {
    distilled="$IMAGES"
    for baseline in ${BASELINES-random hard}; do
        case "$baseline" in
            random)
                stage distillation/random_real
                IMAGES="${DATASET}_ipc${IPC}_random$(unless seed "${SEED:-0}" 0)"
                stage matching/matching
                stage validate/train_FKD
                IMAGES="$distilled"
                ;;
            hard) stage validate/train_FKD --hard_label ;;
        esac
    done
}

stage() {
    case " ${ONLY:-$1} " in *" $1 "*) ;; *) return 0 ;; esac
    [ -z "${SMOKE:-}" ] || rehearsed
    case "$1${ONLINE:+ online}${2:-}" in
        "matching/matching online") return 0 ;;
        "validate/train_FKD online") # not with hard labels
            TEACHER_CHECKPOINT=
            of_dataset
            set -- "$@" --online --arch "$TEACHER" --teacher_checkpoint "$TEACHER_CHECKPOINT"
            ;;
    esac
    case "$1" in validate/train_FKD) set -- "$@" ${STUDENT_FLAGS:-} ;; esac
    case "$DATASET" in
        imagenet) SUFFIX=_imgnt DATA_DIR="${IMAGENET_DIR:-$GIVEN_DIR}" ;;
        tiny_imagenet) SUFFIX=_tnimgnt DATA_DIR="${TINY_IMAGENET_DIR:-$GIVEN_DIR}" ;;
        cifar10) SUFFIX=_cf10 DATA_DIR="${CIFAR10_DIR:-$GIVEN_DIR}" ;;
        cifar100) SUFFIX=_cf100 DATA_DIR="${CIFAR100_DIR:-$GIVEN_DIR}" ;;
        *) SUFFIX="_$DATASET" DATA_DIR="$GIVEN_DIR" ;;
    esac
    launcher="$1$SUFFIX.sh"
    [ -f "$launcher" ] || launcher="$1.sh" # of ImageNet, or of every data set
    [ -f "$launcher" ] || refuse "$1$SUFFIX.sh: no such launcher"
    shift
    eval "set -- \"\$@\" --wait $FLAGS"
    command="$(DRY_RUN=1 sh "$launcher" "$@")"
    case "$NEWLINE$COMMANDS" in *"$NEWLINE$command$NEWLINE"*) return 0 ;; esac # of another cell
    COMMANDS="$COMMANDS$command$NEWLINE"
    if [ "${DRY_RUN:-0}" != 0 ]; then
        printf '%s\n' "$command"
    elif [ -n "$CHECK" ]; then
        plan="$(NUM_GPUS=1 TORCHRUN_ARGS= sh "$launcher" "$@")"
        printf '%s\n' "$plan"
        PLANS="$PLANS$plan$NEWLINE"
    else
        [ -n "$TOLD" ] || { # what was asked for; the launchers say the rest
            TOLD="DATASET='${DATASETS:-all}' IPC='${IPCS:-all}' METHOD='${METHODS:-all}'"
            TOLD="$TOLD TEACHER='${TEACHERS:-all}' STUDENT='${STUDENTS:-all}' ONLY='${ONLY:-all}'"
            echo "${LAUNCHER##*/}: $TOLD BASELINES='${BASELINES-random hard}' OUT='$OUT'" >&2
        }
        step sh "$launcher" "$@"
    fi
}

table() {
    if [ -z "$COMMANDS" ]; then
        wanted="${DATASETS:+ DATASET=$DATASETS}${IPCS:+ IPC=$IPCS}${METHODS:+ METHOD=$METHODS}"
        wanted="$wanted${TEACHERS:+ TEACHER=$TEACHERS}${STUDENTS:+ STUDENT=$STUDENTS}"
        wanted="$wanted${ONLY:+ ONLY=$ONLY}"
        refuse "table $1 has no cell with$wanted"
    fi
    if [ -n "$CHECK" ]; then
        printf %s "$PLANS" | awk '
            match($0, /: [0-9]+ done, [0-9]+ files to do, [0-9.]+ MiB of [0-9]+ MiB free/) {
                split(substr($0, RSTART + 2), word, " ")
                folders++; done += word[1]; todo += word[3]; needed += word[7]; free = word[10]
            }
            END {
                printf "sum: %d folders: %d done, %d files to do, %.1f MiB of %d MiB free\n",
                    folders, done, todo, needed, free
            }'
    else
        NUM_GPUS=1 TORCHRUN_ARGS= # one process
        step run -m validate.paper_tables --table "$1" --output_root "$OUT" \
            ${SMOKE:+--dataset digits} \
            ${DIFFUSION_CHECKPOINT:+--diffusion_checkpoints_path "$DIFFUSION_CHECKPOINT"}
        step run -m misc.report "$OUT"
    fi
}
