#!/bin/sh
# What of D4M's claims is seen on real photographs: CIFAR-10 and a small Stable Diffusion of our own (misc/train_tiny_sd_cf10.sh).
# From that checkpoint on: teachers, then the arms one after the other - images, soft labels, students with soft and with hard
# labels - until MINUTES are over, then the table. The same command goes on where it was; nothing is made twice.
#
#   sh validate/cifar10_small.sh               CPU scale, 2 cores: ConvNet-W64 teacher (500 pictures a class) and student, IPC 10
#   SCALE=gpu sh validate/cifar10_small.sh     GPU scale: IPC 10 and 50, 2 teachers, 3 students, 2 recipes. For sessions that end:
#                                              timeout 540 sh ... stops it after 9 minutes, and the same command goes on
#   ARMS="d4m random" SCALE=gpu sh ...         only these
#
# The paper has no such experiment. Recipe d4m: its losses, temperature, crops and CutMix at 32 px, batches of 25 (CPU) or 100.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

SCALE="${SCALE:-cpu}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output/cifar10_small/$SCALE}"
KM_EXPAND="${KM_EXPAND:-1}"
EPOCHS="${EPOCHS:-300}" # of recipe d4m
SEEDS="${SEEDS:-0 1 2}"
ARMS="${ARMS:-d4m random text decoded vae noise full s0.3 s0.5 s0.9 g1 g2 g4}"
case "$SCALE" in
cpu)
    MINUTES="${MINUTES:-85}" JOBS="${JOBS:-2}"
    MODEL="${MODEL:-misc/tiny-sd-cifar10}"
    IPCS="${IPCS:-10}" TEACHERS="${TEACHERS:-convnet_w64}" STUDENTS="${STUDENTS:-convnet_w64}" RECIPES="${RECIPES:-d4m}"
    TEACHER_IMAGES="${TEACHER_IMAGES:-500}" TEACHER_EPOCHS="${TEACHER_EPOCHS:-60}" BATCH_SIZE="${BATCH_SIZE:-25}"
    WORKERS=0
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more threads
    ;;
gpu)
    MINUTES="${MINUTES:-1000}" JOBS="${JOBS:-1}"
    MODEL="${MODEL:-output/cifar10_small/models/tiny-sd-cifar10}"
    IPCS="${IPCS:-10 50}" TEACHERS="${TEACHERS:-resnet18 convnet_w128}" RECIPES="${RECIPES:-d4m rd3}"
    STUDENTS="${STUDENTS:-convnet_w128 resnet18 mobilenet_v2}"
    TEACHER_IMAGES="${TEACHER_IMAGES:-0}" TEACHER_EPOCHS="${TEACHER_EPOCHS:-50}" BATCH_SIZE="${BATCH_SIZE:-100}"
    WORKERS=4
    ;;
*)
    echo "error: SCALE $SCALE: expected cpu or gpu" >&2
    exit 2
    ;;
esac
if [ ! -f "$MODEL/manifest.json" ]; then
    echo "error: MODEL $MODEL: no finished model there; make it with MODEL=$MODEL sh misc/train_tiny_sd_cf10.sh" >&2
    exit 2
fi
PY="${PYTHON:-python}"
BEGAN=$(date +%s)
trap : TERM USR1 # the stage at hand finishes its unit and leaves with status 75, and so does this launcher

late() {
    [ $(($(date +%s) - BEGAN)) -ge $((MINUTES * 60)) ]
}

# both A B: the functions A and B, side by side if JOBS allows; fails if one of them does
both() {
    if [ "$JOBS" -lt 2 ]; then
        "$1"
        "$2"
        return
    fi
    "$1" &
    first=$!
    "$2" &
    second=$!
    status=0
    for pid in $first $second; do
        code=0
        wait $pid || code=$?
        [ $code -le 128 ] || { code=0; wait $pid || code=$?; } # a signal ended the wait, not the job
        [ $code -eq 0 ] || status=$code
    done
    return $status
}

# teacher ARCH: trains it (or finds it done); its folder is $(teacher_folder ARCH)
teacher_folder() {
    echo "$OUT/teachers/cifar10_$1_epochs${TEACHER_EPOCHS}_b50$(unless max "$TEACHER_IMAGES" 0)"
}
teacher() {
    case "$1" in
    convnet*) lr=0.01 ;; # a ConvNet stays at chance at 0.1
    *) lr=0.1 ;;
    esac
    $PY -m matching.train_teacher --dataset cifar10 --data_dir "$DATA_DIR" --arch "$1" \
        --max_images_per_class "$TEACHER_IMAGES" --epochs "$TEACHER_EPOCHS" --batch_size 50 --learning_rate $lr \
        --weight_decay 5e-4 --augment pad_crop --flip 0.5 --eval_every 10 --num_workers $WORKERS --output_dir "$OUT/teachers"
}

# prototypes KMEANS: stage 1; every IPC and way of clustering takes the latents from the cache
prototypes() {
    $PY -m distillation.gen_prototype --dataset cifar10 --data_dir "$DATA_DIR" --size 32 --ipc "$IPC" \
        --km_expand $KM_EXPAND --kmeans "$1" --latent_cache "$OUT/latents" --batch_size 250 --num_workers $WORKERS \
        --diffusion_checkpoints_path "$MODEL" --save_prototype_path "$OUT/prototypes"
}

# synthesis ARM STRENGTH GUIDANCE [SUFFIX]: stage 2, from the prototypes of stage 1 that have this suffix
synthesis() {
    $PY -m distillation.gen_syn_image --dataset cifar10 --ipc "$IPC" --km_expand $KM_EXPAND --arm "$1" --strength "$2" \
        --guidance_scale "$3" --batch_size 50 --diffusion_checkpoints_path "$MODEL" \
        --prototype_path "$OUT/prototypes/cifar10-ipc$IPC-kmexpand${KM_EXPAND}_size32${4:-}" \
        --save_init_image_path "$OUT/images"
}

# images ARM: makes its images of IPC a class; IMAGES is then their folder's name
images() {
    d4m="cifar10_ipc${IPC}_s0.7_g8_kmexpand${KM_EXPAND}_size32"
    case "$1" in
    random) IMAGES="cifar10_ipc${IPC}_random" ;;
    vae) IMAGES="cifar10_ipc${IPC}_decoded_size32_kmeans-none" ;;
    decoded) IMAGES="cifar10_ipc${IPC}_decoded_size32" ;;
    text | noise) IMAGES="cifar10_ipc${IPC}_$1" ;;
    d4m) IMAGES="$d4m" ;;
    full) IMAGES="${d4m}_kmeans-full" ;;
    s*) IMAGES="cifar10_ipc${IPC}_${1}_g8_kmexpand${KM_EXPAND}_size32" ;;
    g*) IMAGES="cifar10_ipc${IPC}_s0.7_${1}_kmexpand${KM_EXPAND}_size32" ;;
    esac
    [ ! -f "$OUT/images/$IMAGES/manifest.json" ] || return 0
    case "$1" in
    random)
        $PY -m distillation.random_real --dataset cifar10 --data_dir "$DATA_DIR" --ipc "$IPC" \
            --save_init_image_path "$OUT/images"
        ;;
    vae) prototypes none && synthesis decoded 0.7 8 _kmeans-none ;;
    full) prototypes full && synthesis d4m 0.7 8 _kmeans-full ;;
    s*) prototypes minibatch && synthesis d4m "${1#s}" 8 ;;
    g*) prototypes minibatch && synthesis d4m 0.7 "${1#g}" ;;
    *) prototypes minibatch && synthesis "$1" 0.7 8 ;;
    esac
}

# student FLAGS: one model, one recipe, soft or hard labels, all seeds
student() {
    $PY -m validate.train_FKD --train_dir "$OUT/images/$IMAGES" --val_dir "$DATA_DIR" --model "$STUDENT" --seeds $SEEDS \
        --adamw_lr 0.001 --adamw_weight_decay 0.01 --mix_type cutmix --cutmix 1.0 --num_workers $WORKERS \
        --eval_every 1000 --output_dir "$OUT/students" "$@"
}
schedule() { # of the recipe: RD3 runs 400 epochs in batches of 50, its cosine ends at 0 for ResNet-18 and at half for others
    case "$RECIPE" in
    d4m) echo "--epochs $EPOCHS --batch_size $BATCH_SIZE --bn_batch $BATCH_SIZE --min_scale_crops 0.08 --cos" ;;
    rd3)
        zeta=2
        [ "$STUDENT" != resnet18 ] || zeta=1
        echo "--epochs 400 --batch_size 50 --bn_batch 50 --min_scale_crops 0.5 --cos --cos_stretch $zeta --bn_refresh"
        ;;
    *)
        echo "error: RECIPES $RECIPE: expected d4m or rd3" >&2
        return 2
        ;;
    esac
}
hard() {
    student --hard_label $FLAGS
}
soft() {
    for TEACHER in $TEACHERS; do
        case "$RECIPE" in
        d4m)
            labels="$OUT/labels/${IMAGES}_${TEACHER}$(unless epochs "$EPOCHS" 300)_b${BATCH_SIZE}_mix-cutmix"
            [ -f "$labels/manifest.json" ] ||
                $PY -m matching.generate_soft_label --arch "$TEACHER" --teacher_checkpoint "$(teacher_folder "$TEACHER")" \
                    --data "$OUT/images/$IMAGES" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE" --min_scale_crops 0.08 \
                    --mix_type cutmix --cutmix 1.0 --num_workers $WORKERS --fkd_path "$OUT/labels"
            student --fkd_path "$labels" --temperature 20 --loss kl $FLAGS
            ;;
        rd3)
            student --online --arch "$TEACHER" --teacher_checkpoint "$(teacher_folder "$TEACHER")" --temperature 20 --loss kl \
                $FLAGS
            ;;
        esac
    done
}

for TEACHER in $TEACHERS; do teacher "$TEACHER"; done
for ARM in $ARMS; do
    for IPC in $IPCS; do
        ! late || break 2
        images "$ARM"
        for RECIPE in $RECIPES; do
            for STUDENT in $STUDENTS; do
                ! late || break 4
                FLAGS=$(schedule)
                both soft hard
            done
        done
    done
done
! late || echo "MINUTES $MINUTES are over; what is not in the table was not run; the same command goes on"
trap - TERM USR1

$PY -m misc.small_results --output_root "$OUT" --scale "$SCALE" --model "$MODEL" --data_dir "$DATA_DIR" "$@"
