"""What the reliability tests share: flags of small runs, tiny data sets on disk, hostile names."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

STAGE_1 = ["--dataset", "digits", "--classes", "0-2", "--ipc", "2", "--km_expand", "2", "--max_images_per_class", "9"]
STAGE_1 += ["--batch_size", "4", "--num_workers", "0"]
STAGE_2 = ["--dataset", "digits", "--ipc", "2", "--km_expand", "2", "--num_inference_steps", "2", "--batch_size", "2"]


def picture(seed, size=(24, 24)):
    """A smooth RGB picture, (H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.array(small.resize(size, Image.Resampling.BICUBIC))


def image_folder(root, classes, count=3):
    """root/train/<class>/<n>.png for an `imagefolder` data set; returns root."""
    for number, name in enumerate(classes):
        folder = Path(root) / "train" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(100 * number + i)).save(folder / f"{i}.png")
    return root


def everything(root):
    """Every path below `root`: what a test compares to see that nothing was written outside an output folder."""
    return {str(p.relative_to(root)) for p in Path(root).rglob("*")}


# 19 names that a class folder, a prompt or a manifest may hold
HOSTILE = {
    "empty": "",
    "dot": ".",
    "parent": "..",
    "climbing": "../../escaped",
    "absolute": f"{tempfile.gettempdir()}/d4m-escaped",
    "separator": "cat/dog",
    "backslash": "..\\escaped",
    "nul": "cat\x00dog",
    "newline": "cat\ndog",
    "control": "cat\x1b[2Jdog",
    "300 bytes": "c" * 300,
    "255 bytes": "c" * 255,
    "leading dash": "-rf",
    "trailing dot and space": "cat. ",
    "drive": "C:cat",
    "wildcard": "*?",
    "device": "nul.txt",
    "lone surrogate": "cat\udcff",
    "right-to-left override": "cat\u202egpj",
}
