#!/bin/sh
# Any image folders under one recipe, that of the data set's own launcher: ours, SRe2L's, RDED's,
# anybody's ImageFolder, and as many random real images. Each gives students on soft labels (made
# by the teacher while they train, not stored) and on hard ones, over SEEDS: a table (printed, and
# OUT/results.csv, OUT/report.html) and a picture of each class (OUT/compare_cifar10_ipc10.png). The
# folders hold equally many images of each class.
#
#   sh validate/compare.sh output/images/cifar10_ipc10_s0.7_g8_kmexpand1 /data/rded
#   DATASET=cifar10 sh validate/compare.sh /data/sre2l /data/rded    where no folder says it
#   TEACHER_CHECKPOINT=output/teachers/mine sh validate/compare.sh ...   else the data set's own:
#                                          that in output/teachers, or it is trained first
#   DATASET=imagefolder DATA_DIR=my-images TEACHER_CHECKPOINT=... BATCH_SIZE=50 sh ...     your own
#   sh validate/compare.sh A B --dry_run       checks everything, says what would be made
#   DRY_RUN=1 sh validate/compare.sh A B       prints the commands
#
# STUDENT, EPOCHS, BATCH_SIZE ...: the launcher's. What is on disk is not made again.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
GIVEN_OUT="${OUT:-}"
. scripts/tables.sh
[ -n "$GIVEN_OUT" ] || OUT="$OUT/compare"

per_class() { # FOLDER: how many images its class folders hold, each number once
    (
        cd "$1/train" 2>/dev/null || cd "$1"
        FORMATS='png|jpe?g|webp|bmp|p[pg]m|tiff?'
        find -L . -path './*/*' | LC_ALL=C grep -iE "/[^./][^/]*[.]($FORMATS)$" |
            sed 's:/[^/]*$::' | sort | uniq -c | awk '{ print $1 }' | sort -nu
    )
}

FOLDERS= DATASET="${DATASET:-}" IPC="${IPC:-}"
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    FOLDER="${1%/}" && shift
    case "$CALLER/" in # seen from where it was started
        "$(pwd -P)"/*) ;;
        *) [ ! -d "$CALLER/$FOLDER" ] || FOLDER="$CALLER/$FOLDER" ;;
    esac
    [ -d "$FOLDER" ] || [ "${DRY_RUN:-0}" != 0 ] || refuse "$FOLDER: no such folder"
    NAME="${FOLDER##*/}" SAID="$(ipc_of "${FOLDER##*/}" "")" MADE_FOR=
    if [ -d "$FOLDER" ]; then # what it holds counts, not what it is called
        SAID="$(per_class "$FOLDER")"
        MADE_FOR="$(sed -n 's/^  "dataset": "\(.*\)",*$/\1/p' "$FOLDER/args.json" 2>/dev/null)" || :
        case "$SAID" in
            "" | *"$NEWLINE"*) refuse "$FOLDER: its class folders hold" ${SAID:-0} "images" ;;
        esac
    fi
    case "$NAME" in *_ipc[1-9]*) DATASET="${DATASET:-${MADE_FOR:-${NAME%%_ipc*}}}" ;; esac
    DATASET="${DATASET:-$MADE_FOR}" IPC="${IPC:-$SAID}"
    [ "${SAID:-$IPC}" = "$IPC" ] || refuse "$FOLDER: $SAID images per class, not IPC=$IPC"
    [ "${MADE_FOR:-$DATASET}" = "$DATASET" ] ||
        refuse "$FOLDER: images of $MADE_FOR, not DATASET=$DATASET"
    FOLDERS="$FOLDERS $(quoted "$FOLDER")"
done
[ -n "$FOLDERS" ] || refuse "no folder: sh validate/compare.sh FOLDER FOLDER ..."
[ -n "$IPC" ] && [ -n "$DATASET" ] || refuse "no folder says its data set: set DATASET"
FLAGS="$(quoted "$@")" GIVEN="$(quoted "$@")"
eval "set -- $FOLDERS"
set -- "$@" "$OUT/images/${DATASET}_ipc${IPC}_random$(unless seed "${SEED:-0}" 0)"
if [ -z "$GIVEN_OUT${TEACHER_CHECKPOINT:-}" ]; then # what train_teacher has made already
    TEACHER_CHECKPOINT="$(OUT="${OUT%/compare}" && of_dataset && echo "$TEACHER_CHECKPOINT")"
    [ -f "$TEACHER_CHECKPOINT/manifest.json" ] || TEACHER_CHECKPOINT=
fi
made() { sed -n "s/^ \"$1\": \"*\([^\",]*\)\"*,*\$/\1/p" "$TEACHER_CHECKPOINT/manifest.json"; }
if [ -f "${TEACHER_CHECKPOINT:-}/manifest.json" ]; then
    TEACHER="${TEACHER:-$(made arch)}" INPUT_SIZE="${INPUT_SIZE:-$(made image_size)}"
    export INPUT_SIZE
elif [ "$DATASET:${TEACHER_CHECKPOINT:-}" = imagefolder: ]; then
    refuse "DATASET=imagefolder: set TEACHER_CHECKPOINT, a folder of matching.train_teacher"
fi
if [ "$DATASET" = imagefolder ]; then
    [ -n "${TEACHER:-}" ] || refuse "$TEACHER_CHECKPOINT: has no manifest.json; set TEACHER"
    STUDENT="${STUDENT:-$TEACHER}"
fi
FIGURE="$OUT/compare_${DATASET}_ipc$IPC"
TWICE="$(printf '%s\n' "$@" | sed 's:.*/::' | sort | uniq -d)"
[ -z "$TWICE" ] || refuse "two folders are called" $TWICE"; rename one"
TOLD="${LAUNCHER##*/}: DATASET=$DATASET IPC=$IPC OUT=$OUT"
[ "${DRY_RUN:-0}" != 0 ] || echo "$TOLD" >&2

IS_GIVEN="${TEACHER_CHECKPOINT:-}"
of_dataset
stage distillation/random_real

if [ -z "$CHECK" ]; then # D4M's are called by what one has and another has not
    NAMES="$(printf '%s\n' "$@" | sed "s:.*/::; s:^${DATASET}_ipc${IPC}_::" | awk -F_ '
        { name[NR] = $0 }
        /^s[0-9.]+_g[0-9]/ { sets++; for (i = 1; i <= NF; i++) seen[$i]++ }
        END {
            for (k = 1; k <= NR; k++) {
                n = split(name[k], part); title = "D4M"
                if (name[k] !~ /^s[0-9.]+_g[0-9]/) { n = 0; title = name[k] }
                for (i = 1; i <= n; i++) if (seen[part[i]] < sets) title = title " " part[i]
                print title == "random" ? "random real" : title
            }
        }')"
    (
        NUM_GPUS=1 TORCHRUN_ARGS= IFS="$NEWLINE"
        set -f
        step run -m misc.figures grid --dataset "$DATASET" --output "$FIGURE" \
            --images "$@" --names $NAMES
    )
fi

case "$IS_GIVEN:$DATASET" in # behind the figure, which wants the right classes
    :cifar* | :tiny_imagenet | :digits) stage matching/train_teacher ;;
esac
for FOLDER; do
    IMAGES="${FOLDER##*/}"
    FLAGS="$(quoted --train_dir "$FOLDER" --dataset "$DATASET") $GIVEN"
    stage validate/train_FKD --online --arch "$TEACHER" --teacher_checkpoint "$TEACHER_CHECKPOINT"
    stage validate/train_FKD --hard_label
done
NUM_GPUS=1 TORCHRUN_ARGS= # one process
[ -n "$CHECK" ] || {
    step run -m misc.report "$OUT"
    [ "${DRY_RUN:-0}" != 0 ] || echo "$FIGURE.png"
}
