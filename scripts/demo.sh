#!/bin/sh
# All four stages on scikit-learn's handwritten digits with the tiny Stable Diffusion in
# misc/tiny-sd-digits: the scripts and code paths of ImageNet, nothing to download, in under two
# minutes on 2 CPU cores. Run it again and it goes on, or is done.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/launch.sh

[ $# -eq 0 ] || refuse "$*: the demo takes no flags"
OUT="${OUT:-output/demo}"
export D4M_NEXT=none
MODEL="misc/tiny-sd-digits"
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # networks this small are slower on more threads
D4M=digits_ipc10_s0.7_g8_kmexpand1

# The teacher: nobody publishes one for digits.
step run -m matching.train_teacher --dataset digits --arch convnet_mini --num_workers 0 \
    --output_dir "$OUT/teachers"

# Stages 1 and 2, and what D4M is compared with.
step run -m distillation.gen_prototype --dataset digits --ipc 10 --km_expand 1 --num_workers 0 \
    --diffusion_checkpoints_path "$MODEL" --save_prototype_path "$OUT/prototypes"
step run -m distillation.gen_syn_image --dataset digits --ipc 10 --km_expand 1 --strength 0.7 \
    --guidance_scale 8 --prototype_path "$OUT/prototypes/digits-ipc10-kmexpand1" \
    --arm d4m decoded text --batch_size 50 \
    --diffusion_checkpoints_path "$MODEL" --save_init_image_path "$OUT/images"
step run -m distillation.random_real --dataset digits --ipc 10 --save_init_image_path "$OUT/images"

# Stage 3: soft labels for all four sets.
step run -m matching.generate_soft_label --arch convnet_mini \
    --teacher_checkpoint "$OUT/teachers/digits_convnet_mini" \
    --data "$OUT/images/$D4M" "$OUT/images/digits_ipc10_random" \
    "$OUT/images/digits_ipc10_decoded" "$OUT/images/digits_ipc10_text" \
    --epochs 75 --batch_size 25 --min_scale_crops 0.5 --flip 0 --mix_type cutmix --num_workers 0 \
    --fkd_path "$OUT/labels"

# Stage 4: three students on each set, tested on the test split; soft and hard labels side by side.
for images in $D4M digits_ipc10_random digits_ipc10_decoded digits_ipc10_text; do
    run -m validate.train_FKD --train_dir "$OUT/images/$images" --model convnet_mini \
        --fkd_path "$OUT/labels/${images}_convnet_mini_epochs75_b25_crops-0.5-1_flip0_mix-cutmix" \
        --seeds 0 1 2 --temperature 20 --cos --adamw_lr 0.005 --num_workers 0 \
        --output_dir "$OUT/students" &
    soft=$!
    (
        export TQDM_DISABLE=1 # one bar is enough
        run -m validate.train_FKD --train_dir "$OUT/images/$images" --model convnet_mini \
            --hard_label --epochs 75 --batch_size 25 --min_scale_crops 0.5 --flip 0 \
            --mix_type cutmix --seeds 0 1 2 --cos --adamw_lr 0.005 --num_workers 0 \
            --output_dir "$OUT/students"
    ) &
    await $soft $!
done

step run -m misc.report "$OUT"
