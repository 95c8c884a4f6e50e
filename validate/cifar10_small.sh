#!/bin/sh
# What is D4M worth, and what lifts it, on real photographs: CIFAR-10, and a small Stable Diffusion
# of our own (misc/train_tiny_sd_cf10.sh). One draw is one seed of everything: the order in which
# k-means sees the images, which real ones are chosen, the noise of synthesis, crops and CutMix, and
# the student's initial weights. The mean over draws is the result; arms are compared draw by draw.
# The primary claims stand in misc/small_results.py.
#
#   sh validate/cifar10_small.sh       goes on where it was, for MINUTES, on one core; then the page
#   DRAWS="1 3 5 7" sh ...             only these draws; another core may take the others
#   ARMS="d4m random" IPCS=10 STUDENTS=convnet_w64 RECIPES=d4m LABELS=soft sh ...    only these rows
#   RESULTS=misc/results sh ...        the committed page: a row that stands there is not run again
#   DRY_RUN=1 sh ...                   every command, in this order, each row's name before it
#   SCALE=gpu sh ...                   the same design for larger networks (never run)
#
# All rows take about 11 hours of a CPU core; those of the primary claims 2.5. DATA_DIR holds
# {train,val}/CLASS/*.png, or cifar-10-batches-py. The paper has no such experiment: recipe d4m has
# its loss, temperature, crops and CutMix at 32 px, in batches of 25: its own batch of 1024 would be
# one AdamW step per epoch on up to 500 images.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh
NUM_GPUS=1 TORCHRUN_ARGS= # one process

SCALE="${SCALE:-cpu}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output/cifar10_small/$SCALE}"
RESULTS="${RESULTS:-$OUT/page}"
MINUTES="${MINUTES:-85}"
BATCH_SIZE="${BATCH_SIZE:-25}"
EPOCHS="${EPOCHS:-}" # of every row, instead of the design's
ARMS="${ARMS:-}" IPCS="${IPCS:-}" DRAWS="${DRAWS:-}" STUDENTS="${STUDENTS:-}"
RECIPES="${RECIPES:-}" LABELS="${LABELS:-}"
case "$SCALE" in
    cpu)
        MODEL="${MODEL:-misc/tiny-sd-cifar10}" WORKERS=0 NETWORK=convnet_w64
        TEACHER_IMAGES="${TEACHER_IMAGES:-500}" TEACHER_BATCH=50
        TEACHER_EPOCHS="${TEACHER_EPOCHS:-60}"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more
        ;;
    gpu)
        MODEL="${MODEL:-output/cifar10_small/models/tiny-sd-cifar10}" WORKERS=4
        NETWORK=convnet_w128
        TEACHER_IMAGES="${TEACHER_IMAGES:-0}" TEACHER_BATCH=128
        TEACHER_EPOCHS="${TEACHER_EPOCHS:-200}"
        ;;
    *) refuse "SCALE $SCALE: expected cpu or gpu" ;;
esac

# By worth. The main student has 1,200 AdamW steps at every IPC: with fewer, students of soft labels
# are far from trained (the page's last table); the others are too slow for that. Draws 9 and 10
# choose settings, and count in no claim
design() {
    MAIN="d4m random text noise decoded"
    rows 300 "$MAIN" 10 "1 2 3 4 5 6 7 8" $NETWORK d4m
    rows 300 "text text_g1 text_g2 text_g4" 10 "9 10" $NETWORK d4m soft
    rows 300 text_g4 10 "1 2 3 4 5 6 7 8" $NETWORK d4m # the best of these
    rows 1200 "$MAIN" 1 "1 2 3 4" $NETWORK d4m
    for N in 300 100 60; do rows $N "d4m random" 10 "9 10" $NETWORK d4m; done
    rows 1000 "d4m random" 10 "9 10" $NETWORK d4m soft
    rows 60 "$MAIN" 50 "1 2 3 4" $NETWORK d4m
    rows 100 "d4m random" 10 "1 2 3 4" mobilenet_v2 d4m soft # 2 minutes a row
    rows 60 "d4m random" 10 "1 2 3 4" resnet18 d4m soft # 6 minutes a row
    rows 400 "d4m random" 10 "1 2 3 4 5 6 7 8" $NETWORK rd3
    GAINS="weighted mode keep_confident keep_hard gmm combined" # may lift D4M (docs/gains.md)
    rows 300 "$GAINS" 10 "1 2 3 4 5 6 7 8" $NETWORK d4m
    rows 300 dpmpp 10 "1 2 3 4 5 6 7 8" $NETWORK d4m # another sampler (docs/generators.md)
    rows 300 top_1 10 "1 2 3 4 5 6 7 8" $NETWORK d4m soft # a tenth of the labels, as 100 of 1000
}

# ARM: its stages' flags beside D4M's, and what they add to the names of prototypes and images
# (PARTS_1) or of images alone (PARTS_2). A new arm is one line here, and a place in the design
arm() {
    KIND=d4m STRENGTH=0.7 GUIDANCE=8 COUNT=$IPC KEEP= STORED=
    STAGE_1= PARTS_1= STAGE_2= PARTS_2= STAGE_4=
    case "$1" in
        d4m) ;;
        random | text | noise | decoded) KIND="$1" ;;
        text_g[1-9]*) KIND=text GUIDANCE="${1#text_g}" PARTS_2="_g$GUIDANCE" ;;
        weighted) STAGE_4="--loss_weights cluster" ;;
        top_1) STORED="--label_top_k 1 --temperature 20" ;;
        gmm) STAGE_1="--kmeans gmm" PARTS_1=_kmeans-gmm ;;
        dpmpp)
            STAGE_2="--scheduler dpmpp --num_inference_steps 20 --noise_level paper"
            PARTS_2=_noise-paper_steps20_scheduler-dpmpp
            ;;
        mode) STRENGTH=1 STAGE_2="--guide mode" PARTS_2=_guide-mode ;;
        keep_confident | keep_hard | combined) # of four images per prototype
            KEEP="${1#keep_}" COUNT=$((4 * IPC))
            STAGE_2="--num_prototypes $IPC" PARTS_2="_protos$IPC"
            if [ "$1" = combined ]; then # with all but the weights, which cost
                KEEP=confident STRENGTH=1 STAGE_1="--kmeans gmm" PARTS_1=_kmeans-gmm
                STAGE_2="$STAGE_2 --guide mode" PARTS_2="_guide-mode$PARTS_2"
            fi
            ;;
        *) refuse "ARMS $1: expected d4m, random, text, text_g2, noise, decoded, weighted, ..." ;;
    esac
    IMAGES="$KIND"
    [ "$KIND" != d4m ] || IMAGES="s${STRENGTH}_g${GUIDANCE}_kmexpand1"
    IMAGES="cifar10_ipc${COUNT}_$IMAGES${PARTS_2}_seed$DRAW"
    [ "$KIND" = random ] || IMAGES="${IMAGES}_size32$PARTS_1"
    [ -z "$KEEP" ] || IMAGES="cifar10_ipc${IPC}_${KEEP}_${NETWORK}_from_$IMAGES"
}

recipe() { # RECIPE EPOCHS: its flags for STUDENT
    N="${EPOCHS:-$2}" B=$BATCH_SIZE FLAGS=
    case "$1:$STUDENT" in
        d4m:*) CROPS=0.08 ;;
        rd3:resnet18) CROPS=0.5 B=50 FLAGS="--bn_refresh" ;;
        rd3:*) CROPS=0.5 B=50 FLAGS="--bn_refresh --cos_stretch 2" ;;
    esac
    FLAGS="--epochs $N --batch_size $B --bn_batch $B --min_scale_crops $CROPS $FLAGS"
}

images() { # EPOCHS: of the arm: the teacher, stages 1 and 2, and 3 where its labels are stored
    run -m matching.train_teacher --dataset cifar10 --data_dir "$DATA_DIR" --arch $NETWORK \
        --max_images_per_class $TEACHER_IMAGES --epochs "$TEACHER_EPOCHS" \
        --batch_size $TEACHER_BATCH --learning_rate 0.01 --weight_decay 5e-4 --augment pad_crop \
        --flip 0.5 --seed 0 --eval_every 10 --num_workers $WORKERS --output_dir "$OUT/teachers"
    if [ "$KIND" = random ]; then
        run -m distillation.random_real --dataset cifar10 --data_dir "$DATA_DIR" --ipc "$IPC" \
            --seed "$DRAW" --save_init_image_path "$OUT/images"
        return
    fi
    prototypes="$OUT/prototypes/cifar10-ipc$IPC-kmexpand1_size32_seed$DRAW$PARTS_1"
    run -m distillation.gen_prototype --dataset cifar10 --data_dir "$DATA_DIR" --size 32 \
        --ipc "$IPC" --km_expand 1 --seed "$DRAW" --latent_cache "$OUT/latents" --batch_size 250 \
        --num_workers $WORKERS --diffusion_checkpoints_path "$MODEL" \
        --save_prototype_path "$OUT/prototypes" $STAGE_1
    run -m distillation.gen_syn_image --dataset cifar10 --prototype_path "$prototypes" \
        --ipc "$COUNT" --km_expand 1 --seed "$DRAW" --arm "$KIND" --strength "$STRENGTH" \
        --guidance_scale "$GUIDANCE" --batch_size 50 --diffusion_checkpoints_path "$MODEL" \
        --save_init_image_path "$OUT/images" $STAGE_2
    [ -z "$KEEP" ] || run -m matching.candidates --image_path "$OUT/images/${IMAGES#*_from_}" \
        --keep "$KEEP" --arch $NETWORK --teacher_checkpoint "$OUT/teachers/$TEACHER" \
        --save_init_image_path "$OUT/images"
    [ -z "$STORED" ] || run -m matching.generate_soft_label --data "$OUT/images/$IMAGES" \
        --arch $NETWORK --teacher_checkpoint "$OUT/teachers/$TEACHER" --epochs "${EPOCHS:-$1}" \
        --batch_size $BATCH_SIZE --min_scale_crops 0.08 --mix_type cutmix --cutmix 1.0 \
        --fkd_seed "$DRAW" --num_workers $WORKERS --fkd_path "$OUT/labels" $STORED
}

student() { # LABEL: one row
    printf 'arm=%s ipc=%s draw=%s student=%s ' "$ARM" "$IPC" "$DRAW" "$STUDENT"
    printf 'recipe=%s epochs=%s batch_size=%s labels=%s ' "$RECIPE" "$N" "$B" "$1"
    case "$1" in
        hard) set -- --hard_label ;;
        soft) # labelled while the student trains: the numbers of stage 3, and each crop made once
            set -- --online --arch $NETWORK --temperature 20 --loss kl \
                --teacher_checkpoint "$OUT/teachers/$TEACHER"
            [ -z "$STORED" ] || set -- --fkd_path "$OUT/labels" --temperature 20 --loss kl
            ;;
    esac
    run -m validate.train_FKD --train_dir "$OUT/images/$IMAGES" --val_dir "$DATA_DIR" \
        --model "$STUDENT" --seeds "$DRAW" --fkd_seed "$DRAW" $FLAGS --cos --adamw_lr 0.001 \
        --adamw_weight_decay 0.01 --mix_type cutmix --cutmix 1.0 --num_workers $WORKERS \
        --eval_every 0 --output_dir "$OUT/students" "$@" $STAGE_4
}

rows() { # EPOCHS ARMS IPCS DRAWS STUDENTS RECIPES [LABELS]: all of them; both kinds of labels
    S="$(among "$STUDENTS" "$5")" R="$(among "$RECIPES" "$6")" L="$(among "$LABELS" "${7:-soft hard}")"
    [ -n "$S" ] && [ -n "$R" ] && [ -n "$L" ] || return 0 # nor images for no student
    for IPC in $(among "$IPCS" "$3"); do
        for DRAW in $(among "$DRAWS" "$4"); do
            for ARM in $(among "$ARMS" "$2"); do
                arm "$ARM"
                images "$1"
                for STUDENT in $S; do
                    for RECIPE in $R; do
                        recipe "$RECIPE" "$1"
                        for LABEL in $L; do student "$LABEL"; done
                    done
                done
            done
        done
    done
}

among() { # WANTED OFFERED: those of OFFERED that are wanted; nothing wanted means all
    for one in $2; do
        case " ${1:-$one} " in *" $one "*) echo "$one" ;; esac
    done
}

TEACHER="$(TEACHER_LR=0.01 teacher_name cifar10 $NETWORK)$(unless max $TEACHER_IMAGES 0)_seed0"
[ -f "$MODEL/manifest.json" ] || [ "${DRY_RUN:-0}" != 0 ] ||
    refuse "MODEL $MODEL: not there; make it with MODEL=$MODEL sh misc/train_tiny_sd_cf10.sh"
PLAN="$(DRY_RUN=1 && design)"
[ -n "$PLAN" ] || refuse "ARMS, IPCS, DRAWS, STUDENTS, RECIPES, LABELS: the design has no such row"
[ "${DRY_RUN:-0}" = 0 ] || printf '%s\n' "$PLAN"
exec 3<<END
$PLAN
END
step run -m misc.small_results --plan /dev/fd/3 --minutes "$MINUTES" --output_root "$OUT" \
    --model "$MODEL" --results "$RESULTS" "$@"
