"""Stage 3, training-time matching (paper, section 3.3): a teacher's soft labels for the crops of every epoch.

    python -m matching.generate_soft_label --data output/images/imagenet_ipc10_s0.7_g8_kmexpand1 \\
        --arch resnet18 --mix_type cutmix
    sh matching/matching.sh

Writes FKD_PATH/<name>/epoch_0000.safetensors ... and manifest.json, one file an epoch with every draw of every batch
and the logits in fp16 (FKD: fast knowledge distillation). The epoch is the unit of work: it is redone whole, split
over processes, and skipped when it is on disk, so the same command continues a stopped run.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m matching.generate_soft_label", file=sys.stderr)
    sys.exit(2)

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from distillation.datasets import DATASETS, dataset_name
from matching.models import load_teacher, model_name, ranges
from matching.soft_labels import (
    Feed,
    add_protocol_flags,
    batches_of,
    check_epoch,
    label_bytes,
    label_file,
    labels_name,
    load_pixels,
    open_images,
    protocol_of,
    teacher_logits,
    write_epoch,
)
from scripts.files import output_folder, require_space, settings_digest, write_manifest, write_timing
from scripts.runtime import (
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    entry_point,
    log_run,
    memory_for,
    natural,
    progress,
    refuse,
    result_of,
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


def add_teacher_flags(parser, default_arch):
    """The flags that say which teacher; stage 4 has the same for --online."""
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "-a",
        "--arch",
        nargs="+",
        type=model_name,
        default=default_arch,
        help="teachers by name, see matching/models.py; the labels of several are averaged (EDC)",
    )
    group.add_argument(
        "--teacher_checkpoint",
        nargs="+",
        default=None,
        metavar="PATH",
        help="one for each --arch: a folder of train_teacher, or a state dict's file; default: torchvision's weights",
    )
    default = True if default_arch else None
    group.add_argument("--use_fp16", action="store_true", default=default, help="logits in fp16 (the default)")
    group.add_argument("--no_use_fp16", dest="use_fp16", action="store_false", default=default, help="in float32")


def get_args(argv=None):
    parser = Parser(prog="matching.generate_soft_label", description=__doc__.split("\n")[0], retired=RETIRED)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="DIR", help="image folders of stage 2, or any other"
    )
    parser.add_argument(
        "--dataset", type=dataset_name, default=None, metavar="NAME", help="default: what the images' manifest says"
    )
    parser.add_argument("--fkd_path", default="output/labels", help="labels go to a folder below, named by the flags")
    parser.add_argument("--mode", choices=("fkd_save",), default="fkd_save", help="only this (a flag of the release)")
    add_teacher_flags(parser, ["resnet18"])
    add_protocol_flags(parser, stored=False)
    group = parser.add_argument_group("speed (changes the labels' last digits)")
    group.add_argument(
        "--amp", choices=("none", "bf16", "fp16"), default="none", help="precision of the teacher's convolutions"
    )
    group.add_argument("--channels_last", action="store_true", help="memory layout for tensor cores")
    add_process_flags(parser)
    parser.add_argument(
        "-j", "--workers", dest="num_workers", type=natural, default=argparse.SUPPRESS, help="same as --num_workers"
    )
    return parser.parse_args(argv)


def load_teachers(archs, checkpoints, dataset, folders, image_size, device, channels_last=False):
    """([models], [facts]) of all teachers, on the device."""
    if checkpoints and len(checkpoints) != len(archs):
        refuse(f"--teacher_checkpoint: {len(checkpoints)} paths for {len(archs)} --arch ({' '.join(archs)})")
    pairs = [
        load_teacher(arch, checkpoint, dataset, folders, image_size)
        for arch, checkpoint in zip(archs, checkpoints or [None] * len(archs))
    ]
    for _, facts in pairs:
        if facts["columns"] is not None:
            print(
                f"teacher {facts['arch']}: {len(facts['columns'])} of its {facts['classes']} columns: "
                f"{ranges(facts['columns'])}"
            )
    layout = {"memory_format": torch.channels_last} if channels_last else {}
    return [model.to(device, **layout) for model, _ in pairs], [facts for _, facts in pairs]


def label_settings(protocol, images, teachers, use_fp16, amp, channels_last):
    """All that decides the bytes of a labels folder."""
    return {
        **protocol,
        "use_fp16": use_fp16,
        "amp": amp,
        "channels_last": channels_last,
        "arch": [t["arch"] for t in teachers],
        "teacher_sha256": [t["sha256"] for t in teachers],
        "images": images.content,
        "dataset": images.dataset,
    }


def name_extras(use_fp16, amp, channels_last):
    return {"fp16": (use_fp16, True), "amp": (amp, "none"), "channelslast": (channels_last, False)}


def label_epoch(feed, items, batches, teachers, amp, channels_last, half, bar):
    """The next `batches` items of `feed` and the teachers' logits of them, on the CPU: [Batch], (N, classes)."""
    drawn, logits = [], []
    for item in islice(items, batches):
        x = feed.mixed(item)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        drawn.append(item.batch)
        logits.append(teacher_logits(teachers, x, amp, half))  # stays on the device: nothing waits within an epoch
        bar.update(len(x))
    return drawn, torch.cat(logits).cpu()


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device, args.shard)
    sets = [open_images("--data", data, args.dataset) for data in args.data]
    if len({images.name for images in sets}) < len(sets):
        refuse(f"--data: two folders are called {sorted(images.name for images in sets)[0]}; their labels would meet")
    teachers = {}  # loaded once for all folders of the same classes and size
    folders = []
    for images in sets:
        protocol = protocol_of(vars(args), images.image_size or DATASETS[images.dataset].image_size)
        key = (images.dataset, images.folders, protocol["input_size"])
        if key not in teachers:
            teachers[key] = load_teachers(args.arch, args.teacher_checkpoint, *key, process.device, args.channels_last)
        folders.append(label_images(args, images, protocol, *teachers[key], process))
    return folders


def label_images(args, images, protocol, teachers, teacher_facts, process):
    """Every epoch's labels of one image folder; returns the labels' folder."""
    watch = Stopwatch()
    extras = name_extras(args.use_fp16, args.amp, args.channels_last)
    folder = Path(args.fkd_path) / labels_name(images.name, args.arch, protocol, images.image_size, extras)
    count, epochs = len(images.files), protocol["epochs"]
    batches = batches_of(count, protocol["batch_size"])
    files = [label_file(epoch) for epoch in range(epochs)]
    left = sum(not (folder / file).exists() for file in files)
    require_space("--fkd_path", folder, left * label_bytes(count, len(images.folders), batches, args.use_fp16))
    arrays, images = load_pixels("--data", images, args.num_workers)
    settings = label_settings(protocol, images, teacher_facts, args.use_fp16, args.amp, args.channels_last)
    facts = DATASETS[images.dataset]
    with output_folder("--fkd_path", folder, settings, process) as settings:
        digest = settings_digest(settings)
        mine = range(process.rank, epochs, process.world)
        todo = [epoch for epoch in mine if not (folder / files[epoch]).exists()]
        feed = Feed(arrays, images, protocol, process.device)
        loader = feed.loader([(epoch, b) for epoch in todo for b in range(batches)], args.num_workers)
        bar = progress(total=len(todo) * count, desc="soft labels", unit="image", quiet=not process.is_main)

        def finish_epoch(epoch, drawn, logits):
            if not all(extreme.isfinite() for extreme in logits.aminmax()):  # NaN comes through both
                hint = "; --no_use_fp16 keeps numbers above 65,504" if args.use_fp16 else ""
                refuse(f"--arch {' '.join(args.arch)}: logits of epoch {epoch} are NaN or infinite{hint}")
            write_epoch(folder, epoch, drawn, logits, digest)

        # one epoch is checked and written beside the labelling of the next
        with StopSignals() as signals, bar, ThreadPoolExecutor(1) as background:
            pending = None
            for epoch in todo:
                with memory_for("in labelling", "use --amp bf16, or fewer teachers at once"):
                    drawn, logits = label_epoch(
                        feed, loader, batches, teachers, args.amp, args.channels_last, args.use_fp16, bar
                    )
                if pending:
                    result_of(pending)
                pending = background.submit(finish_epoch, epoch, drawn, logits)
                if signals.name:
                    result_of(pending)
                    signals.leave_if_asked()
            if pending:
                result_of(pending)
        cost = log_run(folder, process, watch, len(todo))
        manifest_facts = {
            "dataset": images.dataset,
            "classes": [{"index": c, "folder": f} for c, f in enumerate(images.folders)],
            "images": images.facts(),
            "teacher": teacher_facts,
            "mean": facts.mean,
            "std": facts.std,
        }
        missing = write_manifest(
            folder, "soft_labels", settings, files, manifest_facts, partial(check_epoch, settings_sha256=digest)
        )
        if not missing:
            write_timing(folder)
    left = f"; {len(missing)} epochs are left to other processes" if missing else ""
    print(f"{folder}: {len(todo)} of {epochs} epochs labelled in {cost}{left}")
    return folder


if __name__ == "__main__":
    main()
