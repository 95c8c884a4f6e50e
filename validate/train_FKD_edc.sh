#!/bin/sh
# Stage 4 by EDC's recipe (arXiv 2404.13733), as its repository's code and scripts are: the mean
# logits of several teachers, squared error of logits + 0.025 cross-entropy with the image's own
# class (not mixed), averaged weights (decay 0.99), half the picture or more in a crop, CutMix.
# ImageNet-1K: linear from 1 to 0.5 (its `--ls-type cos` falls through to that), torchvision's V1
# weights.
# TEACHER_CHECKPOINT has as many words as TEACHER.
# Other images: IMAGES=imagenet_ipc10_random; other data sets: DATASET=cifar10 sh ..., after a
# teacher of theirs was trained.
# Differs from the repository: labels are made during training, with the same values as stored ones
# (CIFAR-10's teachers run in half precision there); beside ImageNet-1K it applies RandAugment
# before the crop; its teachers of ImageNet's subsets are trained on them (its only one is an
# ImageNet-10), here the subset's columns of ImageNet's heads are taken; on CIFAR and Tiny-ImageNet
# it has ResNet-18, ConvNet-W128, MobileNet-V2, ShuffleNet-V2-0.5 of its own and WRN-16-2 (CIFAR-10:
# and three ConvNets), here the first four from train_teacher; the batch of 50 on CIFAR-10 above
# IPC 1 is ours, as its script there has IPC 1 alone; CIFAR is normalised by its own mean and std,
# CIFAR-10 there by CIFAR-100's; tests at epochs 0, 30, ... and the last, there at others on CIFAR.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

IPC="${IPC:-10}"
KM_EXPAND="${KM_EXPAND:-1}"
STRENGTH="${STRENGTH:-0.7}"
GUIDANCE="${GUIDANCE:-8}"
DATASET="${DATASET:-imagenet}"
OUT="${OUT:-output}"
case "$DATASET" in
    imagenet) NETWORKS="resnet18 mobilenet_v2 shufflenet_v2_x0_5 alexnet" ;;
    cifar10 | cifar100 | tiny_imagenet | digits)
        NETWORKS="resnet18 convnet_w128 mobilenet_v2 shufflenet_v2_x0_5"
        ;;
    *) NETWORKS="resnet18 mobilenet_v2 efficientnet_b0 shufflenet_v2_x0_5" ;;
esac
TEACHER="${TEACHER:-$NETWORKS}"
PUBLIC_WEIGHTS="${PUBLIC_WEIGHTS:-torchvision:IMAGENET1K_V1}"
of_dataset
IMAGES="${IMAGES:-$(d4m_images "$DATASET")}"
IPC="$(ipc_of "$IMAGES" "$IPC")" # what is below depends on what the images are
STUDENT="${STUDENT:-resnet18}"
HALF=--no_use_fp16 CROPS=0.5 SGD= FACTOR=0.2
PASSES=1000 BATCH=50 SCHEDULE=cos2 # ImageNet-10, and sets of your own
case "$DATASET" in
    imagenet) PASSES=300 BATCH=100 SCHEDULE=linear HALF=--use_fp16 ;;
    tiny_imagenet) PASSES=300 BATCH=100 SCHEDULE=cosine SGD=1 ;;
    cifar100) SGD=1 ;;
    cifar10 | digits) SCHEDULE=multistep FACTOR=0.5 CROPS=0.08 ;;
esac
case "$DATASET:$IPC" in
    tiny_imagenet:1) PASSES=1000 ;;
    cifar10:1 | digits:1) BATCH=10 ;;
esac
EPOCHS="${EPOCHS:-$PASSES}"
BATCH_SIZE="${BATCH_SIZE:-$BATCH}"
SEEDS="${SEEDS:-0 1 2}"

run -m validate.train_FKD \
    --train_dir "$OUT/images/$IMAGES" \
    --online \
    --arch $TEACHER \
    --teacher_checkpoint "$TEACHER_CHECKPOINT" \
    $HALF \
    --val_dir "$DATA_DIR" \
    --model "$STUDENT" \
    --epochs "$EPOCHS" \
    --batch_size "$BATCH_SIZE" \
    --bn_batch "$BATCH_SIZE" \
    --input_size "$INPUT_SIZE" \
    --min_scale_crops "$CROPS" \
    --max_scale_crops 1 \
    --mix_type cutmix \
    --cutmix 1.0 \
    --adamw_lr 0.001 \
    --adamw_weight_decay 0.01 \
    ${SGD:+--sgd} \
    --learning_rate 0.1 \
    --momentum 0.875 \
    --weight_decay 5e-4 \
    --schedule "$SCHEDULE" \
    --cos_stretch 2 \
    --step_factor "$FACTOR" \
    --loss mse_ce \
    --ce_weight 0.025 \
    --ema 0.99 \
    --seeds $SEEDS \
    --eval_every 30 \
    --num_workers 8 \
    --output_dir "$OUT/students" \
    "$@"
