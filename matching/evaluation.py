"""Testing a network on real images: what it is shown, and its top-1 and top-5 (paper, 4.1)."""

import dataclasses
import statistics
from functools import partial

import numpy as np
import torch
from PIL import Image

from distillation import datasets
from matching import batches, ranks
from matching.images import fits_gpu, in_threads
from scripts.runtime import refuse


def open_test(flag, root, dataset, folders, download=False):
    """The test images of the classes `folders`, in that order."""
    known = list(folders) if datasets.known_prompts(dataset) else None
    split = datasets.open_split(dataset, root, "val", None, known, download=download, flag=flag)
    missing = [folder for folder in folders if folder not in split.folders]
    if missing:
        count = f"{len(missing)} of {len(folders)} missing"
        refuse(f"{flag} {root}: has no class {missing[0]} ({count})")
    where = [split.folders.index(folder) for folder in folders]
    names = ("folders", "prompts", "class_ids", "items")
    kept = {name: tuple(getattr(split, name)[i] for i in where) for name in names}
    split = dataclasses.replace(split, **kept)
    datasets.check_class_sizes(split, 1, flag=f"{flag} {root}")
    return split


def validation_pixels(split, size, process, num_workers=0, flag="--val_dir"):
    """Test images of this process: (n, size, size, 3) uint8, (n,) classes; on a GPU if they fit.

    Those of small data sets (CIFAR, Tiny-ImageNet, digits) are taken whole; others are cropped.
    """
    whole, device = datasets.ALL[split.dataset].image_size <= 64, process.device
    items = [(item, c) for c, names in enumerate(split.items) for item in names]
    items = items[process.rank :: process.world]
    out = np.empty((len(items), size, size, 3), np.uint8)

    def read(k):
        try:
            image = split.read(items[k][0])
        except datasets.BadImage as error:
            refuse(f"{flag} {error}")
        as_it_is = size <= 64 and image.size == (size, size)
        out[k] = datasets.squash(image, size) if whole or as_it_is else centre_crop(image, size)

    in_threads(read, range(len(items)), num_workers, "reading test images")
    pixels, targets = torch.from_numpy(out), torch.tensor([c for _, c in items], dtype=torch.int64)
    if device.type == "cuda" and fits_gpu("the test images", out.nbytes, device, "sent each time"):
        return pixels.to(device), targets.to(device)
    return pixels, targets


def centre_crop(image, size):
    """torchvision's Resize(size * 256 / 224) of the shorter side and CenterCrop, by Pillow."""
    short = size * 256 // 224
    w, h = image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def evaluate(model, pixels, targets, forward, mean, std, world=1, rows=256):
    """{"top1", "top5"} in percent over all processes.   pixels (n, S, S, 3) uint8, targets (n,)"""
    model.eval()
    device = forward.device
    correct = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images
    correct[2] = len(targets)
    for part, target in zip(pixels.split(rows), targets.split(rows)):
        outputs = forward(model, batches.normalise(part.to(device, non_blocking=True), mean, std))
        best = outputs.topk(min(5, outputs.shape[1]), 1).indices
        hits = best == target.to(device, non_blocking=True)[:, None]
        correct[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
    ranks.sum_over_ranks([correct], world)
    top1, top5, count = correct.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


def tester(split, size, forward, process, num_workers=0):
    """The function network -> {"top1", "top5"} on the images of `split`."""
    pixels, targets = validation_pixels(split, size, process, num_workers)
    facts = datasets.ALL[split.dataset]
    how = {"forward": forward, "mean": facts.mean, "std": facts.std, "world": process.world}
    return partial(evaluate, pixels=pixels, targets=targets, **how)


def summary(values):
    """{"mean", "std", "n", "values"} over seeds; the sample std, None for one seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}
