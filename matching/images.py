"""The images that teachers label and students learn from.

    images = open_images("--data", "output/images/cifar10_ipc10_s0.7_g8_kmexpand1")
    arrays, images = load_pixels("--data", images, num_workers=4)

They are an output of stage 2, or anybody's folder with one sub-folder per class.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation import datasets, gen_syn_image
from scripts import files, output
from scripts.runtime import Refusal, progress, refuse, warn


class ImageSet(NamedTuple):
    """A folder of training images with one sub-folder per class.

    folders      class folders in index order: sorted, as torchvision's ImageFolder
    files        relative paths, class by class;   targets[i]: the class of files[i]
    image_size   pixels of the saved images, or None if they differ (a foreign folder)
    content      digest of all files; None for a foreign folder until its pixels were read
    digests      {file: sha256} from the manifest; {} for a foreign folder
    generator    the diffusion model that made them; None: none did, or it is not known
    real_images  how many real images they were distilled or chosen from; None: not known
    """

    root: Path
    name: str
    dataset: str
    folders: tuple
    files: tuple
    targets: torch.Tensor
    image_size: int | None
    content: str | None
    digests: dict
    arm: str
    ipc: int | None
    foreign: bool
    generator: dict | None = None
    real_images: int | None = None

    def facts(self):
        """What labels and results record of the images; stage 4 compares the two."""
        names = ("content", "arm", "ipc", "image_size", "foreign", "generator", "real_images")
        return {"count": len(self.files), **{name: getattr(self, name) for name in names}}


def open_images(flag, root, dataset=None):
    """An ImageSet of the folder `root`; reads no pixels.

    dataset   what --dataset says; None: the manifest's, or what a foreign folder's classes suggest
    """
    root = Path(root)
    if not root.is_dir() or (root / output.ARGS).exists() or output.is_complete(root):
        manifest = gen_syn_image.read_images(flag, root)  # refuses one that is not finished
    else:
        manifest = None
    found = _class_files(flag, root)
    paths = tuple(f"{folder}/{name}" for folder, names in found.items() for name in names)
    counts = [len(names) for names in found.values()]
    if manifest:
        about = _made(f"{flag} {root}", found, paths, manifest, dataset)
    else:
        about = _foreign(f"{flag} {root}", root, found, paths, dataset)
    targets = torch.arange(len(found)).repeat_interleave(torch.tensor(counts))
    return ImageSet(root, root.resolve().name, files=paths, targets=targets, **about)


def _class_files(flag, root):
    """{class folder: sorted image files}, folders sorted; refuses an empty class."""
    found = {}
    for folder in datasets.class_folders(flag, root):
        if not files.safe_name(folder):
            refuse(
                f"{flag} {root}: the class folder {folder!r} has a name that is not safe everywhere"
            )
        found[folder] = sorted(
            p.name
            for p in (root / folder).iterdir()
            if p.suffix.lower() in datasets.EXTENSIONS and p.name[0] != "." and p.is_file()
        )
        if not found[folder]:
            refuse(f"{flag} {root}: the class folder {folder} holds no image")
    if not found:
        refuse(f"{flag} {root}: no class folders with images in it")
    return found


def _made(where, found, paths, manifest, dataset):
    """The rest of an ImageSet, from a manifest of stage 2 that must fit the files."""
    if dataset not in (None, manifest["dataset"]):
        refuse(f"--dataset {dataset}: {where} was made for {manifest['dataset']}")
    folders = [c["folder"] for c in manifest["classes"]]
    odd = sorted(set(found) ^ set(folders))
    if odd:
        refuse(f"{where}: its class folders differ from its manifest, first {odd[0]}")
    if list(found) != folders:
        refuse(f"{where}: its manifest lists the classes in another order than ImageFolder")
    extra = [path for path in paths if path not in manifest["files"]]
    if extra:
        refuse(f"{where}: {extra[0]} is not in its manifest ({len(extra)} such files)")
    names = ("dataset", "image_size", "content", "arm", "ipc")
    digests = {path: manifest["files"][path]["sha256"] for path in paths}
    about = {"folders": tuple(folders), "digests": digests, "foreign": False}
    return {**about, **{n: manifest[n] for n in names}, **gen_syn_image.origin(manifest)}


def _foreign(where, root, found, paths, dataset):
    """The rest of an ImageSet of another method's images."""
    dataset = dataset or _guess_dataset(list(found))
    folders = _as_classes(where, list(found), dataset)
    warn(f"{where}: no manifest: taken as another method's images of {dataset}, and hashed")
    sides = {side for path in paths for side in _size_of(root / path)}
    counts = {len(names) for names in found.values()}
    return {
        "dataset": dataset,
        "folders": tuple(folders),
        "image_size": sides.pop() if len(sides) == 1 else None,
        "content": None,
        "digests": {},
        "arm": "foreign",
        "ipc": counts.pop() if len(counts) == 1 else None,
        "foreign": True,
    }


def _as_classes(where, folders, dataset):
    """The class names behind a foreign folder's sub-folders, in their order."""
    known = list(datasets.known_prompts(dataset))
    if not known or set(folders) <= set(known):
        return folders
    digits = [re.search(r"\d+$", folder) for folder in folders]
    if [found and int(found[0]) for found in digits] == list(range(len(known))):
        # SRe2L's new000 ... new999, RDED's 00000 ...
        warn(f"{where}: its {len(folders)} numbered folders are {dataset}'s classes in order")
        return known
    odd = next(folder for folder in folders if folder not in known)
    refuse(f"{where}: the class folder {odd!r} is no class of --dataset {dataset}")


def _guess_dataset(folders):
    for dataset in datasets.ALL:
        if dataset != "digits" and list(datasets.known_prompts(dataset)) == folders:
            return dataset
    return "imagenet" if set(folders) <= set(datasets.known_prompts("imagenet")) else "imagefolder"


def _size_of(path):
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        refuse(f"{path}: not an image: {error}")


def in_threads(function, items, num_workers, desc):
    """[function(item)], with threads and a bar for many: Pillow decodes without the GIL.

    What a thread refuses is refused here, the first item's first.
    """
    if len(items) <= 256:
        return [function(item) for item in items]
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        found = pool.map(function, items)
        try:
            return list(progress(found, total=len(items), desc=desc, unit="image", leave=False))
        except Refusal as refusal:
            refuse(refusal.code)


def load_pixels(flag, images, num_workers=0):
    """(arrays, images): each image as (H, W, 3) uint8 in memory, its file hashed as it is read.

    The ImageSet returned has its `content`, also of a foreign folder. Refuses a file that is not
    what the manifest says.
    """

    def read(path):
        digest = files.sha256(images.root / path)
        if digest != images.digests.get(path, digest):
            where = f"{flag} {images.root}: {path}"
            refuse(f"{where} is not what its manifest says: changed since it was made")
        try:
            return np.asarray(datasets.read_rgb(images.root / path)), {"sha256": digest}
        except datasets.BadImage as error:
            refuse(f"{flag} {error}")

    arrays, entries = zip(*in_threads(read, images.files, num_workers, "reading images"))
    if images.foreign:
        content = output.content_digest(dict(zip(images.files, entries)))
        images = images._replace(content=content)
    return list(arrays), images


# ---- --dry_run before the images are made


def awaited(paths, module):
    """[what to run first], for those of `paths` that `python -m module` has yet to make."""

    def made(path):
        begun = (path / output.ARGS).exists() and not output.is_complete(path)
        return path.exists() and not begun

    return [f"{path}: python -m {module} makes it" for path in map(Path, paths) if not made(path)]


def outlook(flag, path, dataset=None):
    """(name, pixels, classes, images) of a folder, or what the name of one to be made says."""
    path = Path(path)
    if not awaited([path], ""):
        images = open_images(flag, path, dataset)
        size = images.image_size or datasets.ALL[images.dataset].image_size
        return images.name, size, len(images.folders), len(images.files)
    found = re.match(r"(.+?)_ipc([0-9]{1,9})_", path.name)
    dataset = dataset or (found and found[1])
    if dataset not in datasets.ALL:
        return path.name, None, 0, 0
    classes = len(datasets.known_prompts(dataset))
    count = classes * int(found[2]) if found else 0
    return path.name, datasets.ALL[dataset].image_size, classes, count


# ---- GPU memory

RESIDENT_SHARE = 0.5  # of the free GPU memory that pixels may take; networks need the rest


def fits_gpu(what, needed, device, otherwise):
    """Whether `needed` bytes may be kept on a CUDA device; a warning with both sizes if not."""
    # what PyTorch has reserved but does not use, after an earlier stage, is free for us
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = RESIDENT_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)
    if needed > room:
        warn(
            f"{what} need {needed / 2**20:.1f} MiB of GPU memory, {room / 2**20:.1f} MiB may be "
            f"used for them ({RESIDENT_SHARE:.0%} of what is free): {otherwise}"
        )
    return needed <= room
