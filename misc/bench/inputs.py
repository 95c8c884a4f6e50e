"""What is timed on: photographs, a class of JPEGs, a distilled set with its stored labels."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation.datasets import EXTENSIONS, open_split, read_rgb
from matching.soft_labels import PROTOCOL, Feed, draw_batch, epoch_batches, label_file, write_epoch
from misc.bench.release import save_pickle
from scripts.files import sha256
from scripts.runtime import generator, refuse


def photographs(root, count, seed=0):
    """`count` RGB pictures of 224 px: those below `root` (mosaics are cut into tiles), else ones made from noise."""
    found = []
    if root is not None:
        for path in sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in EXTENSIONS):
            image = read_rgb(path)
            w, h = image.size
            if min(w, h) >= 448:
                spots = [(x, y) for y in range(0, h - 223, 224) for x in range(0, w - 223, 224)]
                tiles = (image.crop((x, y, x + 224, y + 224)) for x, y in spots)
            else:
                tiles = [image.resize((224, 224), Image.Resampling.BICUBIC)]
            found += [tile for tile in tiles if np.ptp(np.asarray(tile))]
            if len(found) >= count:
                break
        if not found:
            refuse(f"--images {root}: no images there")
        return [found[i % len(found)] for i in range(count)], "photographs"
    draw = np.random.default_rng(seed)
    for _ in range(count):  # clouds at three scales and some grain: a PNG of 224 px has about 100 kB, as a photograph
        picture = np.zeros((224, 224, 3), np.float32)
        for cells, height in ((4, 70), (20, 35), (80, 18)):
            noise = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += height / 64 * (np.asarray(noise.resize((224, 224), Image.Resampling.BICUBIC), np.float32) - 128)
        picture += draw.normal(0, 4, picture.shape)
        found.append(Image.fromarray(np.clip(picture / 1.5 + 128, 0, 255).astype(np.uint8)))
    return found, "pictures made from noise"


def write_real(pictures, root, count):
    """A class folder of `count` JPEGs of 500 x 375 px, as ImageNet's; returns the Split."""
    folder = root / "real" / "train" / "tench"
    folder.mkdir(parents=True)
    for i in range(count):
        pictures[i % len(pictures)].resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{i:05d}.jpeg", quality=92
        )
    return open_split("imagefolder", root / "real")


def repeated(split, count, classes=1):
    """The same split with the images of its one class repeated to `count`, in each of `classes` classes."""
    items = tuple(split.items[0][i % len(split.items[0])] for i in range(count))
    folders, prompts = ([f"{text} {c}" for c in range(classes)] for text in (split.folders[0], split.prompts[0]))
    return type(split)(split.dataset, split.name, folders, prompts, list(range(classes)), (items,) * classes)


class Replay(NamedTuple):
    """A distilled set and the labels of its epochs 0 and 1, in our form and as pickles."""

    files: list
    arrays: list
    batches: list  # the draws of epoch 0
    feed: Feed
    pickles: Path
    png_bytes: float


def replay_set(pictures, root, count, side, batch_size, device, classes=1000):
    """`count` images of `side` px (pictures repeat), stored; their CutMix draws and random logits of two epochs."""
    root = root / f"replay-{count}-{side}-{batch_size}"
    (root / "labels").mkdir(parents=True)
    files, arrays = [], []
    for i, picture in enumerate(pictures[:count]):
        picture = picture if side == 224 else picture.resize((side, side), Image.Resampling.BILINEAR)
        picture.save(root / f"{i:05d}.png")
        files.append(root / f"{i:05d}.png")
        arrays.append(np.asarray(picture))
    png_bytes = statistics.fmean(f.stat().st_size for f in files)
    files, arrays = ([kind[i % len(kind)] for i in range(count)] for kind in (files, arrays))
    protocol = {**PROTOCOL, "epochs": 2, "batch_size": batch_size, "input_size": side, "mix_type": "cutmix"}
    sizes = torch.full((count, 2), side)
    logits = torch.randn(count, classes, generator=generator(0)).half()
    for epoch in (1, 0):
        parts = epoch_batches(protocol["fkd_seed"], epoch, count, batch_size)
        batches = [
            draw_batch(protocol["fkd_seed"], epoch, n, i, sizes[i], side, protocol) for n, i in enumerate(parts)
        ]
        write_epoch(root / "labels", epoch, batches, logits)
    row = 0
    for n, b in enumerate(batches):
        save_pickle(root, n, b, logits[row : row + len(b.index)])
        row += len(b.index)
    digests = {label_file(e): sha256(root / "labels" / label_file(e)) for e in (0, 1)}
    images = SimpleNamespace(folders=tuple(range(classes)), dataset="imagenet")
    feed = Feed(list(arrays), images, protocol, device, (root / "labels", digests))
    return Replay(files, arrays, batches, feed, root, png_bytes)
