#!/bin/sh
# The table misc/benchmarks/accuracy.md from nothing: what --amp bf16, --channels_last, --fused and --compile do to a
# student.
# Digits: D4M images and labels of scripts/demo.sh. CIFAR-10: 500 random real images, labels of a short teacher.
# About half an hour on 2 CPU cores, the demo included (estimated: without --compile the students took 260 s and 934 s
# at commit 582256d, on shared cores). DATA_DIR: CIFAR-10.
set -eu
cd "$(dirname "$0")/../.."
. scripts/launch.sh

DATA_DIR="${DATA_DIR:-data/cifar10}"
DEMO="${DEMO:-output/demo}"
OUT="${OUT:-output/accuracy}"
IMAGES="digits_ipc10_s0.7_g8_kmexpand1"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

OUT="$DEMO" sh scripts/demo.sh
$RUN -m misc.bench.accuracy --name "Digits, D4M, IPC 10" --seeds 0 1 2 --out "$OUT" "$@" \
    --train_dir "$DEMO/images/$IMAGES" \
    --fkd_path "$DEMO/labels/${IMAGES}_convnet_mini_epochs75_b25_crops-0.5-1_flip0_mix-cutmix" \
    --model convnet_mini --temperature 20 --cos --adamw_lr 0.005 --num_workers 0

$RUN -m matching.train_teacher --dataset cifar10 --data_dir "$DATA_DIR" --max_images_per_class 1000 \
    --arch convnet_mini --epochs 10 --num_workers 0 --output_dir "$OUT/teachers"
$RUN -m distillation.random_real --dataset cifar10 --data_dir "$DATA_DIR" --max_images_per_class 1000 --ipc 50 \
    --save_init_image_path "$OUT/images"
$RUN -m matching.generate_soft_label --data "$OUT/images/cifar10_ipc50_random_max1000" --arch convnet_mini \
    --teacher_checkpoint "$OUT/teachers/cifar10_convnet_mini_epochs10_max1000" --epochs 50 --batch_size 100 \
    --mix_type cutmix --num_workers 0 --fkd_path "$OUT/labels"
$RUN -m misc.bench.accuracy --name "CIFAR-10, random real, IPC 50" --seeds 0 1 2 --out "$OUT" "$@" \
    --train_dir "$OUT/images/cifar10_ipc50_random_max1000" --fkd_path "$OUT/labels" --val_dir "$DATA_DIR" \
    --model convnet_mini --temperature 20 --cos --adamw_lr 0.005 --num_workers 0
