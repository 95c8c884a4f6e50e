#!/bin/sh
# Table 6: cost of an image at 512 px: seconds and peak GPU memory of stage 2 over 100 images, one
# at a time as the paper, and 32 at a time. The paper: 2.7 s and 6.1 GB on a V100.
#
#   DATASET=imagenet sh validate/table6.sh     one cell
# Everything else as in table1.sh.
set -eu
cd "$(dirname "$(readlink -f "$0")")/.."
. scripts/tables.sh

cell() {
    prototypes="$OUT/cost/prototypes"
    stage distillation/gen_prototype --classes 0-9 --save_prototype_path "$prototypes"
    for batch in 1 32; do
        stage distillation/gen_syn_image --batch_size "$batch" \
            --prototype_path "$prototypes/$DATASET-ipc$IPC-kmexpand${KM_EXPAND}_classes-0-9" \
            --save_init_image_path "$OUT/cost/batch$batch/images"
    done
}

cells "imagenet tiny_imagenet" 10 d4m none none # nothing is trained
table 6
