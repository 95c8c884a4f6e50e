"""Testing a network on real images: what it is shown, and its top-1 and top-5 (paper, 4.1)."""

import dataclasses
import filecmp
import os
import statistics
from collections import defaultdict
from functools import partial

import numpy as np
import torch
from PIL import Image

from distillation import datasets
from matching import batches, ranks
from matching.images import fits_gpu, in_threads
from scripts.runtime import Refusal, refuse, warn


def add_test_flag(parser):
    """The flag of teachers and students whose test images may be training images."""
    told = "test on training images: no number to publish"
    how = {"action": "store_true", "default": False, "short": "ontrain"}
    parser.setting("--test_on_train", help=told, **how)


def open_test(flag, root, dataset, folders, download=False, on_train=False):
    """The test images of the classes `folders`, in that order.

    on_train    --test_on_train: those of the training split where there are no others
    """
    known = list(folders) if datasets.known_prompts(dataset) else None
    opened = partial(datasets.open_split, dataset, root, download=download, flag=flag)
    try:
        split = opened("val", None, known)
    except Refusal as error:
        if not on_train:
            raise
        datasets.note(f"{error}; the test images are those of the training split")
        split = opened("train", None, known)
    places = {datasets.nfc(folder): n for n, folder in enumerate(split.folders)}
    missing = [folder for folder in folders if datasets.nfc(folder) not in places]
    if missing:
        count = f"{len(missing)} of {len(folders)} missing; it has {', '.join(split.folders[:3])}"
        refuse(f"{flag} {root}: has no class {missing[0]} ({count})")
    where = [places[datasets.nfc(folder)] for folder in folders]
    if other := [folder for n, folder in enumerate(split.folders) if n not in where]:
        what = f"{len(other)} classes that training does not know are left out"
        warn(f"{flag} {root}: {what}, first {other[0]}")
    names = ("folders", "prompts", "class_ids", "items")
    kept = {name: tuple(getattr(split, name)[i] for i in where) for name in names}
    split = dataclasses.replace(split, **kept)
    datasets.check_class_sizes(split, 1, flag=f"{flag} {root}")
    return split


def check_apart(flag, root, test, trained, sources, allowed):
    """Refuse, unless `allowed`, to test on what was trained on. A few shared images are warned of.

    trained   the training images' paths, class by class: ten test images of each of at most 100
              classes are compared with them, byte for byte
    sources   [(fingerprint, most images per class)] of what those, or a teacher, were made from
    """
    shared, compared, count = [], 0, len(test.items)
    for c in range(0, count if test.arrays is None else 0, -(-count // 100)):
        by_size = defaultdict(list)
        for path in trained[c]:
            by_size[os.path.getsize(path)].append(path)
        for path in test.items[c][:10]:
            same = (filecmp.cmp(path, one, False) for one in by_size[os.path.getsize(path)])
            shared += [path] if any(same) else []
            compared += 1
    firsts = [tuple(paths[: most or None] for paths in test.items) for _, most in sources]
    digests = [dataclasses.replace(test, items=items).fingerprint() for items in firsts]
    known = any(made_of == found for (made_of, _), found in zip(sources, digests))
    where, what = f"{flag} {root}", f"{len(shared)} of {compared} images compared"
    if (known or 2 * len(shared) > compared) and not allowed:
        use = "expected val/<class>/ below it, or another --val_dir (--test_on_train: all the same)"
        refuse(f"{where}: the test set is the training set ({what}); {use}")
    if shared:
        warn(f"{where}: {what} are training images, first {shared[0]}")


def validation_pixels(split, size, process, num_workers=0, resize=None, flag="--val_dir"):
    """Test images of this process: (n, size, size, 3) uint8, (n,) classes; on a GPU if they fit.

    resize   pixels of the shorter side before the centre crop; None: small data sets (CIFAR,
             Tiny-ImageNet, digits) are taken whole, others have 256/224 of `size`
    """
    whole = datasets.ALL[split.dataset].image_size <= 64 and not resize
    device = process.device
    items = [(item, c) for c, names in enumerate(split.items) for item in names]
    items = items[process.rank :: process.world]
    out = np.empty((len(items), size, size, 3), np.uint8)

    def read(k):
        try:
            image = split.read(items[k][0])
        except datasets.BadImage as error:
            refuse(f"{flag} {error}")
        as_it_is = size <= 64 and image.size == (size, size) and not resize
        cropped = partial(centre_crop, resize=resize)
        out[k] = (datasets.squash if whole or as_it_is else cropped)(image, size)

    in_threads(read, range(len(items)), num_workers, "reading test images")
    pixels, targets = torch.from_numpy(out), torch.tensor([c for _, c in items], dtype=torch.int64)
    if device.type == "cuda" and fits_gpu("the test images", out.nbytes, device, "sent each time"):
        return pixels.to(device), targets.to(device)
    return pixels, targets


def centre_crop(image, size, resize=None):
    """torchvision's Resize (256/224 of `size`) of the shorter side and CenterCrop, by Pillow."""
    short = resize or size * 256 // 224
    w, h = image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def evaluate(model, pixels, targets, forward, mean, std, world=1, rows=None):
    """{"top1", "top5"} in percent over all processes.   pixels (n, S, S, 3) uint8, targets (n,)"""
    model.eval()
    device = forward.device
    rows = rows or (64 if device.type == "cpu" else 256)  # 64 stay in the cache: twice as fast
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


def tester(split, size, forward, process, num_workers=0, resize=None):
    """The function network -> {"top1", "top5"} on the images of `split`."""
    pixels, targets = validation_pixels(split, size, process, num_workers, resize)
    facts = datasets.ALL[split.dataset]
    how = {"forward": forward, "mean": facts.mean, "std": facts.std, "world": process.world}
    return partial(evaluate, pixels=pixels, targets=targets, **how)


def summary(values):
    """{"mean", "std", "n", "values"} over seeds; the sample std, None for one seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}
