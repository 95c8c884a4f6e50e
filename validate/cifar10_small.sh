#!/bin/sh
# What of D4M's claims is seen on real photographs: CIFAR-10 and a small Stable Diffusion of our own (misc/train_tiny_sd_cf10.sh).
# From that checkpoint on: teachers, then the arms one after the other - images, soft labels, students with soft and with hard
# labels - until MINUTES are over, then the page. The same command goes on where it was; nothing is made twice.
#
#   sh validate/cifar10_small.sh               CPU scale, 2 cores: ConvNet-W64 teacher (500 pictures a class) and student, IPC 10
#   SCALE=gpu sh validate/cifar10_small.sh     GPU scale: IPC 10 and 50, 2 teachers, 3 students, 2 recipes (never run yet)
#   MINUTES=7 timeout 540 sh ...               in sessions of 9 minutes: 7 of work and the page, or a clean stop; OUT has to last
#   ARMS="d4m random" sh ...                   only these
#
# DATA_DIR holds {train,val}/CLASS/*.png, or torchvision's cifar-10-batches-py. RESULTS=misc/results is the committed page.
# The paper has no such experiment. Recipe d4m: its losses, temperature, crops and CutMix at 32 px, batches of 25 (CPU) or 100.
# Students start at seed 1: the teacher is a seed 0 of the same architecture, and would share its first weights with one of them.
set -eu
cd "$(dirname "$0")/.."
. scripts/launch.sh

SCALE="${SCALE:-cpu}"
DATA_DIR="${DATA_DIR:-data/cifar10}"
OUT="${OUT:-output/cifar10_small/$SCALE}"
RESULTS="${RESULTS:-$OUT/page}"
KM_EXPAND="${KM_EXPAND:-1}"
EPOCHS="${EPOCHS:-300}" # of recipe d4m
SEEDS="${SEEDS:-1 2 3}"
ARMS="${ARMS:-d4m random text decoded vae noise full s0.3 s0.5 s0.9 g1 g2 g4}"
case "$SCALE" in
cpu)
    MINUTES="${MINUTES:-85}" JOBS="${JOBS:-2}"
    MODEL="${MODEL:-misc/tiny-sd-cifar10}"
    IPCS="${IPCS:-10}" TEACHERS="${TEACHERS:-convnet_w64}" STUDENTS="${STUDENTS:-convnet_w64}" RECIPES="${RECIPES:-d4m}"
    TEACHER_IMAGES="${TEACHER_IMAGES:-500}" TEACHER_EPOCHS="${TEACHER_EPOCHS:-60}" TEACHER_BATCH="${TEACHER_BATCH:-50}"
    BATCH_SIZE="${BATCH_SIZE:-25}"
    WORKERS=0
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more threads
    ;;
gpu)
    MINUTES="${MINUTES:-1000}" JOBS="${JOBS:-1}"
    MODEL="${MODEL:-output/cifar10_small/models/tiny-sd-cifar10}"
    IPCS="${IPCS:-10 50}" TEACHERS="${TEACHERS:-resnet18 convnet_w128}" RECIPES="${RECIPES:-d4m rd3}"
    STUDENTS="${STUDENTS:-convnet_w128 resnet18 mobilenet_v2}"
    TEACHER_IMAGES="${TEACHER_IMAGES:-0}" TEACHER_EPOCHS="${TEACHER_EPOCHS:-50}" TEACHER_BATCH="${TEACHER_BATCH:-128}"
    BATCH_SIZE="${BATCH_SIZE:-100}"
    WORKERS=4
    ;;
*)
    echo "error: SCALE $SCALE: expected cpu or gpu" >&2
    exit 2
    ;;
esac
for ARM in $ARMS; do
    case "$ARM" in
    d4m | random | text | decoded | vae | noise | full | s0.[1-9]* | g[1-9]*) ;;
    *)
        echo "error: ARMS $ARM: expected d4m, random, text, decoded, vae, noise, full, s0.3 (a strength) or g2 (a guidance)" >&2
        exit 2
        ;;
    esac
done
for RECIPE in $RECIPES; do
    case "$RECIPE" in
    d4m | rd3) ;;
    *)
        echo "error: RECIPES $RECIPE: expected d4m or rd3" >&2
        exit 2
        ;;
    esac
done
if [ ! -f "$MODEL/manifest.json" ]; then
    echo "error: MODEL $MODEL: no finished model there; make it with MODEL=$MODEL sh misc/train_tiny_sd_cf10.sh" >&2
    exit 2
fi
BEGAN=$(date +%s)
STOPPED="" CHILD="" DONE=" "

late() {
    [ $(($(date +%s) - BEGAN)) -ge $((MINUTES * 60)) ]
}

# A signal goes on to the stage at hand, which finishes its unit and leaves; then so does this launcher, with status 75.
catch() {
    trap 'STOPPED=75; [ -z "$CHILD" ] || kill $CHILD 2>/dev/null || :' INT TERM USR1
}
await() { # PIDS: until all have ended; leaves if one failed or a signal came. A signal ends a wait, not the process
    failed=0
    [ -z "$STOPPED" ] || kill "$@" 2>/dev/null || : # it came before the trap knew of them
    for pid in "$@"; do
        wait "$pid" || failed=$?
        while [ -n "$STOPPED" ] && kill -0 "$pid" 2>/dev/null; do wait "$pid" || :; done
    done
    CHILD=""
    [ -z "$STOPPED" ] || exit 75
    [ $failed -eq 0 ] || exit $failed
}
run() { # MODULE FLAGS: a stage
    [ -z "$STOPPED" ] || exit 75
    ${PYTHON:-python} -m "$@" &
    CHILD=$!
    await $CHILD
}
both() { # A B: these two functions, side by side if JOBS allows
    if [ "$JOBS" -lt 2 ]; then
        "$1"
        "$2"
        return
    fi
    (catch && "$1") &
    first=$!
    (catch && "$2") &
    CHILD="$first $!"
    await $CHILD
}

# teacher ARCH: trains it; its folder is $(teacher_folder ARCH)
teacher_folder() {
    printf %s "$OUT/teachers/cifar10_$1$(unless epochs "$TEACHER_EPOCHS" 200)$(unless b "$TEACHER_BATCH" 128)"
    printf %s "$(unless max "$TEACHER_IMAGES" 0)"
}
teacher() {
    case "$1" in
    convnet*) lr=0.01 ;; # a ConvNet stays at chance at 0.1
    *) lr=0.1 ;;
    esac
    run matching.train_teacher --dataset cifar10 --data_dir "$DATA_DIR" --arch "$1" \
        --max_images_per_class "$TEACHER_IMAGES" --epochs "$TEACHER_EPOCHS" --batch_size "$TEACHER_BATCH" \
        --learning_rate $lr --weight_decay 5e-4 --augment pad_crop --flip 0.5 --eval_every 10 --num_workers $WORKERS \
        --output_dir "$OUT/teachers"
}

# prototypes KMEANS: stage 1; every IPC and way of clustering takes the latents from the cache
prototypes() {
    run distillation.gen_prototype --dataset cifar10 --data_dir "$DATA_DIR" --size 32 --ipc "$IPC" \
        --km_expand "$KM_EXPAND" --kmeans "$1" --latent_cache "$OUT/latents" --batch_size 250 --num_workers $WORKERS \
        --diffusion_checkpoints_path "$MODEL" --save_prototype_path "$OUT/prototypes"
}

# synthesis ARM STRENGTH GUIDANCE [SUFFIX]: stage 2, from the prototypes of stage 1 that have this suffix
synthesis() {
    run distillation.gen_syn_image --dataset cifar10 --ipc "$IPC" --km_expand "$KM_EXPAND" --arm "$1" --strength "$2" \
        --guidance_scale "$3" --batch_size 50 --diffusion_checkpoints_path "$MODEL" \
        --prototype_path "$OUT/prototypes/cifar10-ipc$IPC-kmexpand${KM_EXPAND}_size32${4:-}" \
        --save_init_image_path "$OUT/images"
}

# images ARM: makes its images of IPC a class; IMAGES is then their folder's name
images() {
    stem="cifar10_ipc${IPC}"
    decoded="${stem}_decoded$(unless kmexpand "$KM_EXPAND" 1)_size32"
    case "$1" in
    random) IMAGES="${stem}_random" ;;
    vae) IMAGES="${decoded}_kmeans-none" ;;
    decoded) IMAGES="$decoded" ;;
    text | noise) IMAGES="${stem}_${1}_size32" ;;
    d4m) IMAGES="${stem}_s0.7_g8_kmexpand${KM_EXPAND}_size32" ;;
    full) IMAGES="${stem}_s0.7_g8_kmexpand${KM_EXPAND}_size32_kmeans-full" ;;
    s*) IMAGES="${stem}_${1}_g8_kmexpand${KM_EXPAND}_size32" ;;
    g*) IMAGES="${stem}_s0.7_${1}_kmexpand${KM_EXPAND}_size32" ;;
    esac
    case "$DONE" in *" $IMAGES "*) return ;; esac # once in a run: what is there from another is checked by its stage
    case "$1" in
    random)
        run distillation.random_real --dataset cifar10 --data_dir "$DATA_DIR" --ipc "$IPC" \
            --save_init_image_path "$OUT/images"
        ;;
    vae)
        prototypes none
        synthesis decoded 0.7 8 _kmeans-none
        ;;
    full)
        prototypes full
        synthesis d4m 0.7 8 _kmeans-full
        ;;
    *)
        prototypes minibatch
        case "$1" in
        s*) synthesis d4m "${1#s}" 8 ;;
        g*) synthesis d4m 0.7 "${1#g}" ;;
        *) synthesis "$1" 0.7 8 ;;
        esac
        ;;
    esac
    DONE="$DONE$IMAGES "
}

# student FLAGS: one model, one recipe, soft or hard labels, all seeds
student() {
    run validate.train_FKD --train_dir "$OUT/images/$IMAGES" --val_dir "$DATA_DIR" --model "$STUDENT" --seeds $SEEDS \
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
    esac
}
hard() {
    student --hard_label $FLAGS
}
soft() {
    for TEACHER in $TEACHERS; do
        case "$RECIPE" in
        d4m)
            labels="${IMAGES}_${TEACHER}$(unless epochs "$EPOCHS" 300)$(unless b "$BATCH_SIZE" 1024)_mix-cutmix"
            case "$DONE" in
            *" $labels "*) ;;
            *)
                run matching.generate_soft_label --arch "$TEACHER" --teacher_checkpoint "$(teacher_folder "$TEACHER")" \
                    --data "$OUT/images/$IMAGES" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE" --min_scale_crops 0.08 \
                    --mix_type cutmix --cutmix 1.0 --num_workers $WORKERS --fkd_path "$OUT/labels"
                DONE="$DONE$labels "
                ;;
            esac
            student --fkd_path "$OUT/labels/$labels" --temperature 20 --loss kl $FLAGS
            ;;
        rd3)
            student --online --arch "$TEACHER" --teacher_checkpoint "$(teacher_folder "$TEACHER")" --temperature 20 --loss kl \
                $FLAGS
            ;;
        esac
    done
}

catch
for TEACHER in $TEACHERS; do teacher "$TEACHER"; done
for RECIPE in $RECIPES; do # arms innermost: the first minutes compare all of them, on one recipe, IPC and student
    for IPC in $IPCS; do
        for STUDENT in $STUDENTS; do
            FLAGS=$(schedule)
            for ARM in $ARMS; do
                ! late || break 4
                images "$ARM"
                both soft hard
            done
        done
    done
done
! late || echo "MINUTES $MINUTES are over; what is not in the table was not run; the same command goes on"

run misc.small_results --output_root "$OUT" --scale "$SCALE" --model "$MODEL" --data_dir "$DATA_DIR" --results "$RESULTS" "$@"
