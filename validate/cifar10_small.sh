#!/bin/sh
# What of D4M's claims is seen on real photographs: CIFAR-10, and a small Stable Diffusion of our
# own (misc/train_tiny_sd_cf10.sh). Teachers first; then, arm by arm, the images, their soft labels,
# and students with soft and with hard labels, until MINUTES are over; then the page. The same
# command goes on where it was. The paper has no such experiment: recipe d4m has its loss,
# temperature, crops and CutMix at 32 px, in batches of 25 (CPU) or 100: its own batch of 1024 would
# be one AdamW step per epoch on 100 or 500 images.
#
#   sh validate/cifar10_small.sh            2 CPU cores: ConvNet-W64 teacher and student, IPC 10
#   SCALE=gpu sh validate/cifar10_small.sh  IPC 10 and 50, 2 teachers, 3 students, 2 recipes
#                                           (never run)
#   MINUTES=7 timeout 540 sh ...            in sessions of 9 minutes, which OUT has to outlive
#   ARMS="d4m random" sh ...                only these
#
# DATA_DIR holds {train,val}/CLASS/*.png, or cifar-10-batches-py. RESULTS=misc/results is the
# committed page. Seeds start at 1: seed 0 of the same network is the teacher.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh
NUM_GPUS=1 TORCHRUN_ARGS= # one process

SCALE="${SCALE:-cpu}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output/cifar10_small/$SCALE}"
RESULTS="${RESULTS:-$OUT/page}"
KM_EXPAND="${KM_EXPAND:-1}"
SIZE=32 SEED=0 STEPS=50 CROPS=0.08 FKD_SEED=42 # of stages 1 to 3
EPOCHS="${EPOCHS:-300}" # of recipe d4m
SEEDS="${SEEDS:-1 2 3}"
ARMS="${ARMS:-d4m random text decoded vae noise full s0.3 s0.5 s0.9 g1 g2 g4}"
case "$SCALE" in
    cpu)
        MODEL="${MODEL:-misc/tiny-sd-cifar10}" MINUTES="${MINUTES:-85}" JOBS="${JOBS:-2}" WORKERS=0
        IPCS="${IPCS:-10}" TEACHERS="${TEACHERS:-convnet_w64}" STUDENTS="${STUDENTS:-convnet_w64}"
        RECIPES="${RECIPES:-d4m}" BATCH_SIZE="${BATCH_SIZE:-25}"
        TEACHER_BATCH="${TEACHER_BATCH:-50}"
        TEACHER_IMAGES="${TEACHER_IMAGES:-500}" TEACHER_EPOCHS="${TEACHER_EPOCHS:-60}"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more
        ;;
    gpu)
        MODEL="${MODEL:-output/cifar10_small/models/tiny-sd-cifar10}"
        MINUTES="${MINUTES:-1000}" JOBS="${JOBS:-1}" WORKERS=4 IPCS="${IPCS:-10 50}"
        TEACHERS="${TEACHERS:-resnet18 convnet_w128}"
        STUDENTS="${STUDENTS:-convnet_w128 resnet18 mobilenet_v2}"
        RECIPES="${RECIPES:-d4m rd3}" BATCH_SIZE="${BATCH_SIZE:-100}"
        TEACHER_BATCH="${TEACHER_BATCH:-128}"
        TEACHER_IMAGES="${TEACHER_IMAGES:-0}" TEACHER_EPOCHS="${TEACHER_EPOCHS:-50}"
        ;;
    *) refuse "SCALE $SCALE: expected cpu or gpu" ;;
esac

arm() { # ARM: how its images are made, and their folder's name
    KIND=d4m KMEANS=minibatch STRENGTH=0.7 GUIDANCE=8
    case "$1" in
        d4m) ;;
        random | text | decoded | noise) KIND="$1" ;;
        vae) KIND=decoded KMEANS=none ;;
        full) KMEANS=full ;;
        s0.[1-9]*) STRENGTH="${1#s}" ;;
        g[1-9]*) GUIDANCE="${1#g}" ;;
        *) refuse "ARMS $1: expected d4m, random, text, decoded, vae, noise, full, s0.3 or g2" ;;
    esac
    STAGE_1="$(unless kmeans- "$KMEANS" minibatch)"
    case "$KIND" in
        d4m) IMAGES="$(d4m_images cifar10)$STAGE_1" ;;
        decoded) IMAGES="cifar10_ipc${IPC}_decoded$(unless kmexpand "$KM_EXPAND" 1)_size32$STAGE_1" ;;
        random) IMAGES="cifar10_ipc${IPC}_random" ;;
        *) IMAGES="cifar10_ipc${IPC}_${KIND}_size32" ;;
    esac
}

recipe() { # RECIPE: its flags for STUDENT
    case "$1" in
        d4m) FLAGS="--epochs $EPOCHS --batch_size $BATCH_SIZE --bn_batch $BATCH_SIZE" ;;
        rd3) FLAGS="--epochs 400 --batch_size 50 --bn_batch 50 --bn_refresh" ;;
        *) refuse "RECIPES $1: expected d4m or rd3" ;;
    esac
    case "$1:$STUDENT" in
        d4m:*) FLAGS="$FLAGS --min_scale_crops 0.08" ;;
        rd3:resnet18) FLAGS="$FLAGS --min_scale_crops 0.5" ;;
        *) FLAGS="$FLAGS --min_scale_crops 0.5 --cos_stretch 2" ;;
    esac
}

DONE=" "
once() { # FOLDER MODULE FLAGS: this stage, once per run; what another run made is checked by it
    case "$DONE" in *" $1 "*) return ;; esac
    DONE="$DONE$1 "
    shift
    step run -m "$@"
}

teacher() { # ARCH
    PARTS="$(unless epochs "$TEACHER_EPOCHS" 200)$(unless b "$TEACHER_BATCH" 128)"
    TEACHER_FOLDER="$OUT/teachers/cifar10_$1$PARTS$(unless max "$TEACHER_IMAGES" 0)"
    case "$1" in convnet*) LR=0.01 ;; *) LR=0.1 ;; esac # a ConvNet stays at chance at 0.1
    once "$TEACHER_FOLDER" matching.train_teacher --dataset cifar10 --data_dir "$DATA_DIR" \
        --arch "$1" --max_images_per_class "$TEACHER_IMAGES" --epochs "$TEACHER_EPOCHS" \
        --batch_size "$TEACHER_BATCH" --learning_rate $LR --weight_decay 5e-4 --augment pad_crop \
        --flip 0.5 --eval_every 10 --num_workers $WORKERS --output_dir "$OUT/teachers"
}

images() { # of the arm: stages 1 and 2
    prototypes="$OUT/prototypes/$(d4m_prototypes cifar10)$STAGE_1"
    if [ "$KIND" = random ]; then
        once "$IMAGES" distillation.random_real --dataset cifar10 --data_dir "$DATA_DIR" \
            --ipc "$IPC" --save_init_image_path "$OUT/images"
        return
    fi
    once "$prototypes" distillation.gen_prototype --dataset cifar10 --data_dir "$DATA_DIR" \
        --size 32 --ipc "$IPC" --km_expand "$KM_EXPAND" --kmeans "$KMEANS" \
        --latent_cache "$OUT/latents" --batch_size 250 --num_workers $WORKERS \
        --diffusion_checkpoints_path "$MODEL" --save_prototype_path "$OUT/prototypes"
    once "$IMAGES" distillation.gen_syn_image --dataset cifar10 --prototype_path "$prototypes" \
        --ipc "$IPC" --km_expand "$KM_EXPAND" --arm "$KIND" --strength "$STRENGTH" \
        --guidance_scale "$GUIDANCE" --batch_size 50 --diffusion_checkpoints_path "$MODEL" \
        --save_init_image_path "$OUT/images"
}

student() { # FLAGS: all seeds of STUDENT on IMAGES
    step run -m validate.train_FKD --train_dir "$OUT/images/$IMAGES" --val_dir "$DATA_DIR" \
        --model "$STUDENT" --seeds $SEEDS $FLAGS --cos --adamw_lr 0.001 --adamw_weight_decay 0.01 \
        --mix_type cutmix --cutmix 1.0 --num_workers $WORKERS --eval_every 1000 \
        --output_dir "$OUT/students" "$@"
}

hard() {
    student --hard_label
}

soft() { # by every teacher; RD3's labels while the student trains
    for TEACHER in $TEACHERS; do
        teacher "$TEACHER"
        if [ "$RECIPE" = rd3 ]; then
            student --online --arch "$TEACHER" --teacher_checkpoint "$TEACHER_FOLDER" \
                --temperature 20 --loss kl
            continue
        fi
        LABELS="$(labels_name)"
        once "$LABELS" matching.generate_soft_label --data "$OUT/images/$IMAGES" --arch "$TEACHER" \
            --teacher_checkpoint "$TEACHER_FOLDER" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE" \
            --min_scale_crops 0.08 --mix_type cutmix --cutmix 1.0 --num_workers $WORKERS \
            --fkd_path "$OUT/labels"
        student --fkd_path "$OUT/labels/$LABELS" --temperature 20 --loss kl
    done
}

both() { # A B: these functions, side by side where JOBS allows
    if [ "$JOBS" -lt 2 ] || [ "${DRY_RUN:-0}" != 0 ]; then
        "$1"
        "$2"
        return
    fi
    "$1" &
    first=$!
    "$2" &
    await $first $!
}

END=$(($(date +%s) + MINUTES * 60))
late() {
    [ "$(date +%s)" -ge $END ]
}

IPC=1 STUDENT=
for ARM in $ARMS; do arm "$ARM"; done # a typing error is refused before anything runs
for RECIPE in $RECIPES; do recipe "$RECIPE"; done
[ -f "$MODEL/manifest.json" ] || [ "${DRY_RUN:-0}" != 0 ] ||
    refuse "MODEL $MODEL: not there; make it with MODEL=$MODEL sh misc/train_tiny_sd_cf10.sh"

for TEACHER in $TEACHERS; do teacher "$TEACHER"; done
for RECIPE in $RECIPES; do # arms innermost: the first minutes compare all of them
    for IPC in $IPCS; do
        for STUDENT in $STUDENTS; do
            recipe "$RECIPE"
            for ARM in $ARMS; do
                ! late || break 4
                arm "$ARM"
                images
                both soft hard
            done
        done
    done
done
! late || echo "MINUTES $MINUTES are over: not all was run; the same command goes on" >&2

step run -m misc.small_results --output_root "$OUT" --scale "$SCALE" --model "$MODEL" \
    --data_dir "$DATA_DIR" --results "$RESULTS" "$@"
