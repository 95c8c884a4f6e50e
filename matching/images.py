"""The images that teachers label and students learn from.

    images = open_images("--data", "output/images/cifar10_ipc10_s0.7_g8_kmexpand1")
    arrays, images = load_pixels("--data", images, num_workers=4)

They are an output of stage 2, or anybody's folder with one sub-folder per class.
"""

import json
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation import datasets, image_folder
from scripts import files, output
from scripts.runtime import progress, refuse, warn


class ImageSet(NamedTuple):
    """A folder of training images with one sub-folder per class."""

    root: Path
    name: str
    dataset: str
    folders: tuple  # of the classes, in index order
    files: tuple  # relative paths, folder by folder, sorted: in torchvision's ImageFolder's order
    targets: torch.Tensor  # (N,) int64: the class of each file
    image_size: int | None  # pixels of the saved images; None if they differ (a foreign folder)
    ipc: int | None  # None if it differs
    arm: str = "foreign"
    content: str | None = None  # digest of all files; of a foreign folder when its pixels are read
    digests: dict | None = None  # {file: sha256} from the manifest; None for a foreign folder
    generator: dict | None = None  # the diffusion model; None: none, or not known
    real_images: int | None = None  # how many they were distilled or chosen from; None: not known
    source: tuple = (None, 0)  # the fingerprint of those, and how many of each class at most

    @property
    def foreign(self):
        return self.digests is None

    @property
    def pixels(self):
        """The networks' usual input size."""
        return self.image_size or datasets.ALL[self.dataset].image_size

    def paths(self):
        """The paths of each class, in the order of `folders`."""
        found = [[] for _ in self.folders]
        for path, c in zip(self.files, self.targets.tolist()):
            found[c].append(self.root / path)
        return found

    def facts(self):
        """What labels and results record of the images; stage 4 compares the two."""
        names = ("content", "arm", "ipc", "image_size", "foreign", "generator", "real_images")
        return {"count": len(self.files), **{name: getattr(self, name) for name in names}}


def open_images(flag, root, dataset=None):
    """An ImageSet of the folder `root`; reads no pixels.

    dataset   what --dataset says; None: the manifest's, or what a foreign folder's classes suggest
    """
    root, where, manifest = Path(root), f"{flag} {root}", None
    if not root.is_dir() or (root / output.ARGS).exists() or output.is_complete(root):
        manifest = image_folder.read_images(flag, root)  # refuses one that is not finished
    name, found, left = root.resolve().name, {}, defaultdict(list)
    root = root if manifest else datasets.split_folder(flag, root, "train")
    for folder in datasets.class_folders(flag, root):
        paths = datasets.images_below(root / folder, left)
        paths.sort(key=lambda path: (str(path.parent), path.name))
        found[folder] = [path.relative_to(root).as_posix() for path in paths]
    if not manifest:
        datasets.look_beside(root, left)
    datasets.say_left(where, left)
    empty = next((folder for folder in found if not found[folder]), None)
    if empty:
        refuse(f"{where}: the class folder {empty} holds no image")
    if not found:
        refuse(f"{where}: no class folders in it")
    paths = [path for of_class in found.values() for path in of_class]
    counts, classes = [len(of_class) for of_class in found.values()], range(len(found))
    if manifest:
        about = _made(where, list(found), paths, manifest, dataset)
    else:
        classes, about = _foreign(where, list(found), [root / path for path in paths], dataset)
        about["ipc"] = counts[0] if len(set(counts)) == 1 else None
    targets = torch.tensor(classes).repeat_interleave(torch.tensor(counts))
    return ImageSet(root, name, files=tuple(paths), targets=targets, **about)


def _made(where, folders, paths, manifest, dataset):
    """The rest of an ImageSet, from a manifest of stage 2 that must fit the files."""
    if dataset not in (None, manifest["dataset"]):
        refuse(f"--dataset {dataset}: {where} was made for {manifest['dataset']}")
    extra = [path for path in paths if path not in manifest["files"]]
    if extra:
        refuse(f"{where}: {extra[0]} is not in its manifest ({len(extra)} such files)")
    if folders != [c["folder"] for c in manifest["classes"]]:
        refuse(f"{where}: its manifest lists the classes in another order than ImageFolder")
    digests = {path: manifest["files"][path]["sha256"] for path in paths}
    about = {n: manifest[n] for n in ("dataset", "image_size", "content", "arm", "ipc")}
    made = manifest
    while "source_manifest" in made["inputs"]:  # optimised, chosen or taken from other images
        made = made["inputs"]["source_manifest"]
    flags = {**(made["inputs"].get("prototype_arguments") or {}), **made["arguments"]}
    about["source"] = (made["inputs"].get("images"), flags.get("max_images_per_class"))
    return {**about, "folders": tuple(folders), "digests": digests, **image_folder.origin(manifest)}


def _foreign(where, folders, paths, dataset):
    """(class index of each folder, the rest of an ImageSet) of another method's images."""
    if dataset is None:  # the smallest that has all these classes, if most of its own are there
        known = {name: set(datasets.known_prompts(name)) for name in datasets.ALL}
        fit = [name for name in known if known[name] >= {*folders} and name != "digits"]
        most = min(fit, key=lambda name: len(known[name]), default="imagefolder")
        subset = "imagenet" if "imagenet" in fit else "imagefolder"
        dataset = most if 2 * len(folders) > len(known[most]) else subset
    unsafe = next((folder for folder in folders if not files.safe_name(folder)), None)
    if unsafe:
        refuse(f"{where}: the class folder {unsafe!r} has a name that is not safe everywhere")
    known = list(datasets.known_prompts(dataset))
    odd = [folder for folder in folders if known and folder not in known]
    numbers = [int((re.findall(r"\d+$", folder) or [-1])[0]) for folder in folders]
    classes, words = range(len(folders)), {re.sub(r"\d+$", "", folder) for folder in folders}
    # airplane_9 says its class by name
    if odd and len(words) == 1 and sorted(numbers) == list(range(len(known))):
        # the release's 0 ... 999, SRe2L's new000 ... new999, RDED's 00000 ...
        # differs from the release: ImageFolder takes its 0, 1, 10, 100, ... for classes 0, 1, 2, 3
        warn(f"{where}: its {len(folders)} numbered folders are {dataset}'s classes, by number")
        folders, classes = known, numbers
    elif odd:
        refuse(f"{where}: the class folder {odd[0]!r} is no class of --dataset {dataset}")
    warn(f"{where}: no manifest: taken as another method's images of {dataset}, and hashed")
    missing = [name for name in known if name not in folders]
    if missing:
        count = (
            f"{len(missing)} of {dataset}'s {len(known)} classes are missing, first {missing[0]}"
        )
        warn(f"{where}: {count}; students learn and are tested on the other {len(folders)}")
    sides = set()
    for path in paths:
        if not path.is_file():  # opening a pipe would wait for ever
            refuse(f"{path}: not a file")
        try:
            with Image.open(path) as image:
                sides.update(image.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            refuse(f"{path}: not an image: {error}")
    size = sides.pop() if len(sides) == 1 else None
    return classes, {"dataset": dataset, "folders": tuple(folders), "image_size": size}


def in_threads(function, items, num_workers, desc):
    """[function(item)], in threads, with a bar: Pillow decodes without the GIL."""
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        found = pool.map(function, items)
        return list(progress(found, total=len(items), desc=desc, unit="image", leave=False))


def load_pixels(flag, images, num_workers=0):
    """(arrays, images): each image as (H, W, 3) uint8 in memory, its file hashed as it is read.

    The ImageSet returned has its `content`, also of a foreign folder. Refuses a file that is not
    what the manifest says.
    """

    def read(path):
        digest = files.sha256(images.root / path)
        if not images.foreign and digest != images.digests[path]:
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


def read_rows(flag, root, manifest):
    """{image: its row of images.jsonl} of a finished image folder."""
    output.check_file(flag, root, "images.jsonl", manifest)
    lines = (Path(root) / "images.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return {row["file_name"]: row for row in map(json.loads, lines)}


def cluster_weights(flag, images):
    """What an image counts in the loss by the size of its cluster: (N,) float32, mean 1 per class

    DDOQ (arXiv 2501.07681): the prototypes quantise the data, and each stands for as many images as
    its cluster holds. w_i = n_i * ipc / (sum of n over the class); where a prototype gives several
    images, each has its part of n. Refuses images whose cluster sizes are not known.
    """
    where = f"{flag} {images.root}"
    if images.foreign:
        refuse(f"--loss_weights cluster: {where} has no manifest, so no cluster sizes")
    manifest = image_folder.read_images(flag, images.root)
    rows = read_rows(flag, images.root, manifest)
    sizes = image_folder.cluster_sizes(manifest["inputs"], rows.values())
    if not sizes:
        what = f"made as {images.arm}; only images of prototypes of our stage 1 have them"
        refuse(f"--loss_weights cluster: {where} has no cluster sizes ({what})")
    owners = [(rows[file]["folder"], rows[file]["prototype"]) for file in images.files]
    shares = Counter(owners)
    n = torch.tensor([sizes[owner] / shares[owner] for owner in owners])
    mean = torch.zeros(len(images.folders)).index_add(0, images.targets, n) / images.ipc
    return n / mean[images.targets]


def outlook(flag, path, dataset=None):
    """--dry_run: (name, pixels, classes, images) of a folder, or what the name of one that is not
    made yet says; None, 0 and 0 where it says nothing."""
    path = Path(path)
    if not output.awaited(path, ""):
        images = open_images(flag, path, dataset)
        return images.name, images.pixels, len(images.folders), len(images.files)
    found = re.match(r"(.+?)_ipc([0-9]{1,9})_", path.name)
    dataset = dataset or (found and found[1])
    if dataset not in datasets.ALL:
        return path.name, None, 0, 0
    classes = len(datasets.known_prompts(dataset))
    count = classes * int(found[2]) if found else 0
    return path.name, datasets.ALL[dataset].image_size, classes, count


RESIDENT_SHARE = 0.5  # of the free GPU memory that pixels may take; networks need the rest


def fits_gpu(what, needed, device, otherwise):
    """Whether `needed` bytes may be kept on a CUDA device; a warning with both sizes if not."""
    # what PyTorch has reserved but does not use, after an earlier stage, is free for us
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = RESIDENT_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)
    if needed > room:
        sizes = f"{needed / 2**20:.1f} MiB of GPU memory, {room / 2**20:.1f} MiB may be used"
        warn(f"{what} need {sizes}: {otherwise}")
    return needed <= room
