"""Stage 3, training-time matching (paper, section 3.3): soft labels for every epoch's crops.

    python -m matching.generate_soft_label --data output/images/imagenet_ipc10_s0.7_g8_kmexpand1 \\
        --arch resnet18 --mix_type cutmix
    sh matching/matching.sh

Writes FKD_PATH/<name>/epoch_0000.safetensors ... and manifest.json: one file per epoch, with every
draw of every batch and the teacher's logits in fp16 (FKD: fast knowledge distillation).
"""

import argparse
import re
from itertools import islice
from pathlib import Path

import torch

from distillation import datasets
from matching import batches, labels, models
from matching import images as image_sets
from matching.feed import Feed
from scripts import output, runtime
from scripts.runtime import Parser, entry_point, number, refuse

RETIRED = {
    "--gpu": "choose with --device cuda:N, or leave it to torchrun",
    **dict.fromkeys(("--world_size", "--rank", "--dist_url", "--dist_backend"), "torchrun sets it"),
    "--multiprocessing_distributed": "start the launcher with NUM_GPUS=8, or use torchrun",
    "--seed": "every draw comes from --fkd_seed",
}
TEACHER_ROWS = 256  # images per forward pass: fixed, as a network's last bits depend on its batch
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- teachers


def add_teacher_flags(parser, default_arch):
    """The flags that say which teacher; stage 4 has the same for --online."""
    parser.heading("teacher")
    name = {"nargs": "+", "type": models.model_name, "default": default_arch}
    several = f"teachers, whose logits are averaged (EDC): {models.known_names()}"
    parser.setting("-a", "--arch", **name, help=several)
    weights = "one per --arch: a folder of train_teacher, a file, or torchvision:IMAGENET1K_V1"
    weights += " [torchvision's pinned ones]"
    parser.flag("--teacher_checkpoint", nargs="+", metavar="PATH", help=weights)
    half = {"dest": "use_fp16", "default": True if default_arch else None}
    store = {"action": "store_true", "short": "fp16", "help": "store logits in fp16 [yes]"}
    parser.setting("--use_fp16", **half, **store)
    parser.flag("--no_use_fp16", **half, action="store_false", help="in fp32 [no]")


def load_teachers(archs, checkpoints, dataset, folders, image_size, device, channels_last=False):
    """([models], [facts]) of all teachers, on the device; see models.load_teacher."""
    checkpoints = checkpoints or [None] * len(archs)
    if len(checkpoints) != len(archs):
        counts = f"{len(checkpoints)} paths for {len(archs)} --arch"
        refuse(f"--teacher_checkpoint: {counts} ({' '.join(archs)})")
    pairs, which = zip(archs, checkpoints), (dataset, folders, image_size)
    teachers, known = zip(*(models.load_teacher(*pair, *which) for pair in pairs))
    for facts in known:
        if facts["columns"] is not None:
            kept = f"{len(folders)} of its {facts['classes']} columns: {facts['columns'][:10]} ..."
            print(f"teacher {facts['arch']}: {kept}")
    layout = torch.channels_last if channels_last else torch.preserve_format
    return [teacher.to(device, memory_format=layout) for teacher in teachers], known


@torch.no_grad()
def teacher_logits(teachers, x, amp="none", half=True):
    """Mean logits of the teachers (EDC has several), in eval mode.   (B, 3, S, S) -> (B, n)"""
    parts = []
    for part in x.split(TEACHER_ROWS):
        with torch.autocast(x.device.type, dtype=AMP[amp], enabled=amp != "none"):
            outputs = [teacher(part).float() for teacher in teachers]
        parts.append(outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0))
    logits = torch.cat(parts)
    return logits.half() if half else logits


def missing_inputs(images, checkpoints):
    """For --dry_run: what to run before these images and teachers can be read, or ""."""
    trained = [path for path in checkpoints or [] if not models.is_public(path)]
    sources = [output.awaited(path, "matching.train_teacher") for path in trained]
    maker = "random_real" if re.search("_random(?!.*_stm)", Path(images).name) else "gen_syn_image"
    return "; ".join(filter(None, [output.awaited(images, f"distillation.{maker}"), *sources]))


# ---- epochs


def label_epoch(feed, items, steps, teachers, settings, bar):
    """([Batch], logits (N, classes) on the CPU) of the next `steps` items of the feed."""
    drawn, logits = [], []
    for item in islice(items, steps):
        x = feed.mixed(item)
        if settings["channels_last"]:
            x = x.contiguous(memory_format=torch.channels_last)
        drawn.append(item.batch)
        # it stays on the device: nothing waits within an epoch
        logits.append(teacher_logits(teachers, x, settings["amp"], settings["use_fp16"]))
        bar.update(len(x))
    return drawn, torch.cat(logits).cpu()


def make_labels(images, settings, checkpoints, root, process, num_workers):
    """The labels folder of one image folder; returns its path."""
    facts, settings = datasets.ALL[images.dataset], settings.filled(input_size=images.pixels)
    which = images.dataset, images.folders, settings["input_size"], process.device
    archs, layout = settings["arch"], settings["channels_last"]
    labels.check_top_k(settings, len(images.folders))
    teachers, known = load_teachers(archs, checkpoints, *which, layout)
    arrays, images = image_sets.load_pixels("--data", images, num_workers)
    inputs = {"dataset": images.dataset, "images": images.content}
    inputs["teacher"] = [teacher["sha256"] for teacher in known]
    name, count = labels.labels_name(images.name, archs, settings), len(images.files)
    steps = batches.batches_of(count, settings["batch_size"])
    size = labels.label_bytes(count, len(images.folders), settings)
    with output.Output("--fkd_path", root, name, "soft_labels", settings, inputs, process) as out:
        todo = out.todo(range(settings["epochs"]), lambda e: [labels.label_file(e)], size)
        feed = Feed(arrays, images, settings, process.device)
        items = feed.loader([(epoch, nth) for epoch in todo for nth in range(steps)], num_workers)
        with out.progress(total=len(todo) * count, desc="soft labels", unit="image") as bar:
            for epoch in out.steps(todo):
                with runtime.memory_for("in labelling", "use --amp bf16, or fewer teachers"):
                    drawn, logits = label_epoch(feed, items, steps, teachers, settings, bar)
                top_k = settings["label_top_k"], settings["temperature"]
                out.later(labels.write_epoch, out, epoch, drawn, logits, *top_k)  # beside the next
        made_of = {"dataset": images.dataset, "images": images.facts(), "teacher": known}
        made_of["classes"] = [{"index": c, "folder": f} for c, f in enumerate(images.folders)]
        then = ["validate.train_FKD", "--train_dir", images.root, "--fkd_path", out.folder]
        root = output.data_dir_of(images.root) or datasets.usual_root(images.dataset)
        then += ["--model", archs[0], "--cos", "-T", settings["temperature"] or 20]
        then += ["--val_dir", root] if root else []
        out.finish({**made_of, "mean": facts.mean, "std": facts.std}, None, "epochs", then)
    return out.folder


# ---- main


def get_args(argv=None):
    parser = Parser("matching.generate_soft_label", __doc__, RETIRED)
    parser.flag("--data", nargs="+", required=True, metavar="DIR", help="image folders of stage 2")
    known = "the data set of the images [what their manifest says]"
    parser.flag("--dataset", type=datasets.name, metavar="NAME", help=known)
    parser.flag("--fkd_path", default="output/labels", help="the folder is made below this one")
    parser.flag("--mode", choices=("fkd_save",), default="fkd_save", help="a flag of the release")
    batches.add_batch_flags(parser)
    add_teacher_flags(parser, ["resnet18"])
    labels.add_top_k_flags(parser)
    parser.heading("speed (changes the labels' last digits)")
    precision = "precision of the teacher's convolutions"
    parser.setting("--amp", choices=AMP, default="none", short="amp", help=precision)
    layout = {"default": False, "short": "channelslast", "help": "layout for tensor cores"}
    parser.setting("--channels_last", action="store_true", **layout)
    runtime.add_process_flags(parser)
    workers = {"type": number(int, 0), "default": argparse.SUPPRESS}
    parser.flag("-j", "--workers", dest="num_workers", help="same as --num_workers", **workers)
    return parser.parse_args(argv)


def plan_labels(data, dataset, settings, root, waits_for):
    """--dry_run where the images or the teacher have yet to be made."""
    name, size, classes, count = image_sets.outlook("--data", data, dataset)
    settings = settings.filled(input_size=size)
    labels.check_top_k(settings, classes)
    folder = Path(root) / labels.labels_name(name, settings["arch"], settings)
    needed = labels.label_bytes(count, classes, settings) * settings["epochs"] * bool(count)
    output.plan(folder, 0, settings["epochs"], needed, waits_for)


@entry_point
def main(argv=None):
    args = get_args(argv)
    batches.check_scales(args.min_scale_crops, args.max_scale_crops)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    settings, checkpoints, root = args.settings, args.teacher_checkpoint, args.fkd_path
    missing = {data: args.dry_run and missing_inputs(data, checkpoints) for data in args.data}
    there = [data for data in args.data if not missing[data]]
    sets = {data: image_sets.open_images("--data", data, args.dataset) for data in there}
    return [
        plan_labels(data, args.dataset, settings, root, missing[data])
        if missing[data]
        else make_labels(sets[data], settings, checkpoints, root, process, args.num_workers)
        for data in args.data
    ]


if __name__ == "__main__":
    main()
