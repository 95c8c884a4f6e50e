"""Synthesis-time matching (STM; paper, table 3): D4M images, optimised further against a teacher.

    python -m matching.stm --image_path output/images/imagenet_ipc10_s0.7_g8_kmexpand1 --arch resnet18

The recover step of SRe2L (arXiv 2306.13092) by its published numbers, started from the D4M images instead of noise:

    min over x of   CE(f(a(x)), y) + r_bn sum_l w_l (|mean_l(a(x)) - running mean_l| + |var_l(a(x)) - running var_l|)

with w = first_bn_multiplier for the first BatchNorm and 1 for the others, and one random crop, flip and shift a() for
the whole batch in each of 4000 Adam steps. A batch holds image i of `batch_size` classes: it is the unit of work, its
PNGs are written when it is finished, and the same command goes on where a run stopped.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m matching.stm", file=sys.stderr)
    sys.exit(2)

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distillation.datasets import DATASETS
from distillation.gen_syn_image import finish_folder, list_jobs, picture_digest, save_png
from matching.models import load_teacher, model_name
from matching.soft_labels import draw_crops, load_pixels, normalise, open_images
from scripts.files import output_folder, output_name, read_manifest, require_space, write_timing
from scripts.runtime import (
    STM,
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    append_log,
    entry_point,
    generator,
    log_run,
    natural,
    not_negative,
    positive,
    positive_int,
    progress,
    refuse,
    this_process,
)

CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop as SRe2L calls it
ADAM = {"betas": (0.5, 0.9), "eps": 1e-8}
# SRe2L's numbers for ResNet-18 on ImageNet-1K; its L2 and TV weights are 0, so those terms are left out
SRE2L = {"iterations": 4000, "lr": 0.25, "r_bn": 0.01, "first_bn_multiplier": 10.0, "batch_size": 100}

# ---- the objective


class BatchNormStatistics:
    """`with BatchNormStatistics(teacher) as statistics:` after a forward pass, statistics.loss() is R_BN of SRe2L."""

    def __init__(self, teacher, first_multiplier):
        self.layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.weights = [first_multiplier] + [1.0] * (len(self.layers) - 1)
        self.distances = {}

    def __enter__(self):
        self.hooks = [layer.register_forward_hook(self._note) for layer in self.layers]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _note(self, layer, inputs, _output):
        x = inputs[0]  # (B, C, h, w)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        self.distances[layer] = (layer.running_mean - mean).norm() + (layer.running_var - var).norm()

    def loss(self):
        return sum(w * self.distances[layer] for w, layer in zip(self.weights, self.layers))


def augment(x, crop, flip, shift):
    """One crop (top, left, height, width), flip and cyclic shift (down, right) for the whole batch.   (B, 3, S, S)"""
    top, left, height, width = crop
    size = x.shape[-1]
    x = x[:, :, top : top + height, left : left + width]
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)  # always enlarges: no antialias
    return torch.roll(x.flip(3) if flip else x, shift, (2, 3))


def draw_augmentation(size, jitter, g):
    """(crop, flip, shift) of one iteration."""
    crop = draw_crops(torch.tensor([[size, size]]), CROP_SCALE, g)[0].tolist()
    flip = bool(torch.rand((), generator=g) < 0.5)
    return crop, flip, torch.randint(0, jitter + 1, (2,), generator=g).tolist()


def cosine_lr(lr, iteration, iterations):
    """lr (1 + cos(pi t / T)) / 2"""
    return lr * (1 + math.cos(math.pi * iteration / iterations)) / 2


def match_batch(teacher, x, targets, g, mean, std, iterations, lr, r_bn, first_bn_multiplier, jitter, bar=None):
    """Optimise one batch of normalised images: (B, 3, S, S) -> the same shape, and the last losses {"ce", "bn"}.

    teacher   frozen, in eval mode;  targets (B,);  g: the batch's own generator
    """
    x = x.clone().requires_grad_(True)
    low, high = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in _range(mean, std))
    optimizer = torch.optim.Adam([x], lr=lr, **ADAM)
    with BatchNormStatistics(teacher, first_bn_multiplier) as statistics:
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = cosine_lr(lr, iteration, iterations)
            outputs = teacher(augment(x, *draw_augmentation(x.shape[-1], jitter, g)))
            ce, bn = F.cross_entropy(outputs, targets), statistics.loss()
            optimizer.zero_grad()
            (ce + r_bn * bn).backward()
            optimizer.step()
            with torch.no_grad():
                torch.clamp(x, low, high, out=x)  # a pixel stays within 0 .. 255
            if bar is not None:
                bar.update()
    return x.detach(), {"ce": round(ce.item(), 4), "bn": round(bn.item(), 4)}


def _range(mean, std):
    """Normalised values of black and white, by channel."""
    return [[(edge - m) / s for m, s in zip(mean, std)] for edge in (0.0, 1.0)]


def to_pictures(x, mean, std):
    """(B, 3, S, S) normalised -> (B, S, S, 3) uint8 numpy array."""
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (mean, std))
    return ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ---- batches


def class_batches(jobs, ipc, batch_size):
    """[(image number, jobs)]: image i of `batch_size` consecutive classes, as SRe2L: a batch mixes classes."""
    batches = []
    for i in range(ipc):
        column = [job for job in jobs if job.i == i]
        batches += [(i, column[k : k + batch_size]) for k in range(0, len(column), batch_size)]
    return batches


def folder_name(source, settings, image_size):
    """`{source}_stm`, plus what is not SRe2L's."""
    names = {"iterations": "it", "lr": "lr", "r_bn": "bn", "first_bn_multiplier": "first", "batch_size": "b"}
    options = {short: settings[long] for long, short in names.items()}
    defaults = {short: SRE2L[long] for long, short in names.items()}
    options |= {"arch": settings["arch"], "jitter": settings["jitter"], "stmseed": settings["seed"]}
    defaults |= {"arch": "resnet18", "jitter": default_jitter(image_size), "stmseed": 0}
    return output_name(f"{source}_stm", options, defaults)


def default_jitter(image_size):
    """SRe2L shifts 224-px images by up to 32 pixels; smaller ones in proportion."""
    return round(image_size * 32 / 224)


# ---- main


def get_args(argv=None):
    parser = Parser(prog="matching.stm", description=__doc__.split("\n")[0])
    parser.add_argument("--image_path", required=True, metavar="DIR", help="images of stage 2, where it starts from")
    parser.add_argument("--arch", type=model_name, default="resnet18", help="the network that is matched")
    parser.add_argument(
        "--teacher_checkpoint", default=None, help="its weights [torchvision's]; a folder of train_teacher, or a file"
    )
    parser.add_argument("--iterations", type=positive_int, default=SRE2L["iterations"])
    parser.add_argument("--lr", type=positive, default=SRE2L["lr"], help="of Adam, in normalised pixels; cosine to 0")
    parser.add_argument("--r_bn", type=not_negative, default=SRE2L["r_bn"], help="weight of the BatchNorm distances")
    parser.add_argument("--first_bn_multiplier", type=not_negative, default=SRE2L["first_bn_multiplier"])
    parser.add_argument("--jitter", type=natural, default=None, help="largest shift in pixels [32 at 224 px]")
    parser.add_argument(
        "--batch_size", type=positive_int, default=SRE2L["batch_size"], help="classes that are optimised together"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of crops, flips and shifts")
    parser.add_argument("--save_init_image_path", default="output/images", help="the folder is made below this one")
    add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device, args.shard)
    manifest = read_manifest("--image_path", args.image_path, "images")
    images = open_images("--image_path", args.image_path)
    size, classes = images.image_size, manifest["classes"]
    jobs = list_jobs(classes, images.ipc, images.ipc)
    position = {file: n for n, file in enumerate(images.files)}
    if sorted(position) != sorted(job.file for job in jobs):
        refuse(f"--image_path {args.image_path}: holds other files than {images.ipc} images of each class")
    teacher, facts = load_teacher(
        args.arch, args.teacher_checkpoint, images.dataset, [c["folder"] for c in classes], size
    )
    if not any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules()):
        refuse(f"--arch {args.arch}: has no BatchNorm layer whose statistics could be matched")
    teacher.to(process.device)
    mean, std = DATASETS[images.dataset].mean, DATASETS[images.dataset].std
    settings = {
        "dataset": images.dataset, "arm": "stm", "ipc": images.ipc, "image_size": size, "source": images.content,
        "source_arguments": manifest["arguments"], "arch": args.arch, "teacher_sha256": facts["sha256"],
        "iterations": args.iterations, "lr": args.lr, "r_bn": args.r_bn,
        "first_bn_multiplier": args.first_bn_multiplier, "batch_size": args.batch_size, "seed": args.seed,
        "jitter": default_jitter(size) if args.jitter is None else args.jitter,
    }  # fmt: skip
    options = {k: settings[k] for k in ("iterations", "lr", "r_bn", "first_bn_multiplier", "jitter")}
    folder = Path(args.save_init_image_path) / folder_name(images.name, settings, size)
    require_space("--save_init_image_path", folder, len(jobs) * size**2 * 3)
    batches = class_batches(jobs, images.ipc, args.batch_size)
    watch = Stopwatch()
    with output_folder("--save_init_image_path", folder, settings, process) as settings:
        digest = picture_digest(settings)
        mine = list(enumerate(batches))[process.rank :: process.world]
        todo = [unit for unit in mine if not all((folder / job.file).exists() for job in unit[1][1])]
        pixels, _ = load_pixels("--image_path", images, args.num_workers) if todo else ([], images)
        with (
            StopSignals() as signals,
            progress(total=len(todo) * args.iterations, desc="stm", unit="step", quiet=not process.is_main) as bar,
        ):
            for number, (_, batch) in todo:
                rows = torch.stack([torch.from_numpy(pixels[position[job.file]].copy()) for job in batch])
                x = normalise(rows.to(process.device), mean, std)  # (B, 3, S, S)
                targets = torch.tensor([job.position for job in batch], device=process.device)
                g = generator(args.seed, STM, number)
                x, losses = match_batch(teacher, x, targets, g, mean, std, bar=bar, **options)
                if not x.isfinite().all():
                    refuse(f"--lr {args.lr}: batch {number} became NaN or infinite; use a smaller one")
                for job, picture in zip(batch, to_pictures(x, mean, std)):
                    matched = {"source": job.file, "matched": args.arch}
                    save_png(folder / job.file, picture, size, matched, digest)
                append_log(folder, event="batch", batch=number, **losses)
                bar.set_postfix(losses)
                signals.leave_if_asked()
            signals.leave_if_asked()
        cost = log_run(folder, process, watch, sum(len(batch) for _, (_, batch) in todo))
        missing = finish_folder(folder, jobs, settings, classes)
        if not missing:
            write_timing(folder)
    left = "; the rest is left to other processes" if missing else ""
    print(f"{folder}: {len(todo)} of {len(batches)} batches made in {cost}{left}")
    return folder


if __name__ == "__main__":
    main()
