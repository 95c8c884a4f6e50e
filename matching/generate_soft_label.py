"""Stage 3, training-time matching (paper, section 3.3): soft labels for every epoch's crops.

    python -m matching.generate_soft_label --data output/images/imagenet_ipc10_s0.7_g8_kmexpand1 \\
        --arch resnet18 --mix_type cutmix
    sh matching/matching.sh

Writes FKD_PATH/<name>/epoch_0000.safetensors ... and manifest.json: one file per epoch, with every
draw of every batch and the teacher's logits in fp16 (FKD: fast knowledge distillation). The epoch
is the unit of work: made whole, split over processes, and skipped when it is on disk.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from distillation import datasets
from matching import batches, images, labels, models
from matching.feed import Feed
from scripts import output
from scripts.runtime import (
    Parser,
    add_process_flags,
    entry_point,
    memory_for,
    number,
    refuse,
    this_process,
)

RETIRED = {
    "--gpu": "choose with --device cuda:N, or leave it to torchrun",
    "--world_size": "torchrun --nproc_per_node sets it",
    "--rank": "torchrun sets it",
    "--dist_url": "torchrun sets it",
    "--dist_backend": "torchrun sets it",
    "--multiprocessing_distributed": "start the launcher with NUM_GPUS=8, or use torchrun",
    "--seed": "every draw comes from --fkd_seed",
}


def get_args(argv=None):
    parser = Parser("matching.generate_soft_label", __doc__, RETIRED)
    parser.flag("--data", nargs="+", required=True, metavar="DIR", help="image folders of stage 2")
    dataset = "a data set's name [what the images' manifest says]"
    parser.flag("--dataset", type=datasets.name, default=None, metavar="NAME", help=dataset)
    parser.flag("--fkd_path", default="output/labels", help="the labels' folder is made below it")
    parser.flag("--mode", choices=("fkd_save",), default="fkd_save", help="a flag of the release")
    batches.add_batch_flags(parser)
    add_teacher_flags(parser, ["resnet18"])
    parser.heading("speed (changes the labels' last digits)")
    precision = "precision of the teacher's convolutions"
    parser.setting("--amp", choices=AMP, default="none", short="amp", help=precision)
    layout = "memory layout for tensor cores"
    parser.setting("--channels_last", action="store_true", short="channelslast", help=layout)
    add_process_flags(parser)
    workers = {"type": number(int, 0), "default": argparse.SUPPRESS, "dest": "num_workers"}
    parser.flag("-j", "--workers", **workers, help="same as --num_workers")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    batches.check_scales(args.min_scale_crops, args.max_scale_crops)
    process = this_process(args.device, args.shard, args.dry_run, args.wait)
    ...
