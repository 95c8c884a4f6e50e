"""Every data set by name: where its images are, its classes in order, prompts, sizes, teacher.

    split = open_split("imagenet", "data/imagenet", "train")
    split.folders[0], split.prompts[0], len(split.items[0])    # 'n01440764', 'tench, ...', 1300
    split.read(split.items[0][0])                              # a PIL image in RGB

A new data set is one entry of `ALL`, its prompts in label-prompt/NAME.txt, and its launchers.

Class index = position of the folder name in sorted order, for real and synthetic images alike, as
torchvision's ImageFolder has it. Everything is keyed by class index and folder name, never by
prompt: two ImageNet classes share the word "crane".
"""

import csv
import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation.label_files import WNID as WNID
from distillation.label_files import known_prompts, nfc, read_label_file
from scripts import files
from scripts.runtime import CHOICE, generator, number, refuse, warn

# those of torchvision's ImageFolder; not imported from it, which takes a second
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
# what lies beside images; any other file that is left out is said
BESIDE = set(".txt .json .jsonl .csv .tsv .xml .md .html .db .ini .yaml .yml .log .mat .py".split())
# where systems keep thumbnails, and what was deleted or unpacked; hidden folders are left out too
ASIDE = {"@eadir", "@__thumb", "thumbs", "thumbnails", "__macosx", "lost+found"}
ASIDE |= {"@recycle", "#recycle", "$recycle.bin", "system volume information"}
# the usual names of splits, in any case; the first group that is there is taken
SPLITS = {"train": [["train", "training", "trn"], ["trainval"]]}
SPLITS["val"] = [["val", "valid", "validation", "dev", "eval", "evaluation"]]
SPLITS["val"] += [["test", "testing", "tst"]]
EVERY_SPLIT = {name for groups in SPLITS.values() for group in groups for name in group}

note = lru_cache(warn)  # once per run


class BadImage(ValueError):
    """A file that is no image, or cannot be turned into RGB faithfully; the text names it."""


@dataclass(frozen=True)
class Split:
    """The images of one split by class.

    folders, prompts, class_ids   one entry per class; class_ids are positions in the whole data
                                  set, so that a class keeps its seeds when --classes selects a part
    items                         items[c]: what `read` takes, one entry per image, in sorted order
    arrays                        (N, H, W, 3) uint8 if the images live in memory, else None
    """

    dataset: str
    name: str
    folders: tuple
    prompts: tuple
    class_ids: tuple
    items: tuple
    arrays: np.ndarray | None = None

    @property
    def count(self):
        return sum(map(len, self.items))

    def read(self, item):
        """One image as PIL RGB. Raises BadImage."""
        return read_rgb(item) if self.arrays is None else Image.fromarray(self.arrays[item])

    def describe(self, item):
        """What an error message calls this image."""
        return str(item) if self.arrays is None else f"image {item} of {self.dataset} {self.name}"

    def fingerprint(self, positions=None, missing_ok=False):
        """A hash of which images there are: names and file sizes, or pixels of those in memory.

        missing_ok   a broken link is one of them, for --on_bad_image skip; else OSError
        """
        state = hashlib.sha256()
        for position in range(len(self.folders)) if positions is None else positions:
            state.update(f"{self.folders[position]}\n".encode())
            for item in self.items[position]:
                state.update(self._mark(item, missing_ok))
        return state.hexdigest()

    def _mark(self, item, missing_ok):
        if self.arrays is not None:
            return self.arrays[item].tobytes()
        if missing_ok and not os.path.exists(item):
            return f"{item.name} missing\n".encode()
        status = os.stat(item)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            refuse(f"{item}: not a file")
        return f"{item.name} {status.st_size}\n".encode()

    def digest(self):
        """sha256 over folder names and image contents: which images a model was trained on."""
        state, arrays = hashlib.sha256(), self.arrays
        for folder, items in zip(self.folders, self.items):
            state.update(f"{folder} {len(items)}\n".encode())
            for item in items:
                state.update(item.read_bytes() if arrays is None else arrays[item].tobytes())
        return state.hexdigest()


def class_table(split):
    """The ordered class list of a manifest."""
    rows = zip(split.class_ids, split.folders, split.prompts)
    return [{"index": c, "folder": folder, "prompt": prompt} for c, folder, prompt in rows]


def check_class_sizes(split, ipc, on_small_class=None, flag="--data_dir"):
    """Refuse, before any work, an empty class, and one with fewer than `ipc` images."""
    hint = " (--on_small_class repeat repeats them)" if on_small_class else ""
    for folder, items in zip(split.folders, split.items):
        if not items:
            refuse(f"{flag}: class {folder} has no images")
        if len(items) < ipc and on_small_class != "repeat":
            refuse(f"--ipc {ipc}: class {folder} has only {len(items)} images{hint}")


def choose_images(split, ipc, seed):
    """The split with at most `ipc` random images per class: the same ones for each use of a seed"""

    def chosen(items, class_id):
        order = torch.randperm(len(items), generator=generator(seed, CHOICE, class_id))
        return tuple(items[i] for i in order[:ipc].tolist())

    return replace(split, items=tuple(map(chosen, split.items, split.class_ids)))


# ---- images


def read_rgb(path):
    """A file as PIL RGB: no alpha, first frame, no EXIF rotation (as the release). Raises BadImage.

    16-bit gray is scaled to 8 bits; Pillow alone would clip it to white.
    """
    try:
        with Image.open(path) as image:
            is_deep = image.mode.startswith("I") or image.mode == "F"
            return _eight_bit_gray(image) if is_deep else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise struct.error, IndexError, zlib.error ...
        reason = str(error) or type(error).__name__
        raise BadImage(f"{path}: not an image that can be read: {reason}") from None


def _eight_bit_gray(image):
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{image.mode} pixels of {values.min()} to {values.max()}, no 16-bit gray")
    return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")


def squash(image, size):
    """PIL image -> (size, size), antialiased bilinear, aspect ratio not kept, as the release."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


# ---- where images are: (dataset, root, split, flag, download) -> ({class folder: items}, arrays)


def class_folders(flag, root):
    """The names of the folders in `root`, sorted. A broken link would be a class lost silently."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    entries = [entry for entry in entries if not _is_aside(entry.name)]
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry):
            refuse(f"{flag} {root}: {entry.path} is a broken link, to {os.readlink(entry)}")
    return [entry.name for entry in entries if entry.is_dir()]


def _is_aside(name):
    return name.startswith(".") or name.casefold() in ASIDE


def _words(name):  # ILSVRC2012_img_val: {"ilsvrc", "val"}; TrainImages, traindata: {"train"}
    parts = re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    words = {re.sub(r"(?<=.)(set|data|img|images?)$", "", word) for word in parts}
    if words >= {"train", "val"}:  # train_val
        words = words - {"train", "val"} | {"trainval"}
    return frozenset(words - {"", "set", "img", "image", "images", "data"})


def _is_split(name, others=()):
    """train2017 and img_train are; bullet_train is a class, but a split beside bullet_test."""
    words, plain = _words(name), _words(name) - EVERY_SPLIT
    pair = any(plain == other - EVERY_SPLIT for other in {*map(_words, others)} - {words, plain})
    return bool(words & EVERY_SPLIT) and (pair or plain <= {"ilsvrc"})


def split_folder(flag, root, split, known=()):
    """Where the class folders of one split are: in a folder of `root` that is called like the
    split, or in `root` itself where it has no splits. What is not plain is said, or refused.

    known   names of classes; () where any may be one
    """
    names = class_folders(flag, root)
    exact = [name for name in names if name.lower() in EVERY_SPLIT]
    like = [name for name in names if _words(name) & EVERY_SPLIT]
    splits = exact or [name for name in like if _is_split(name, like)]
    others = [name for name in names if name not in splits] if splits else []
    flat = any(n in known or (not known and _holds_image(root / n)) for n in others)
    nested = [name for name in splits if class_folders(flag, root / name)]
    if not splits or (flat and len(nested) < (1 if exact else 2)):  # a class may be called train
        base = _unwrapped(flag, root, split, known)
        if base == root and not _is_split(Path(os.path.abspath(root)).name):
            _refuse_splits_below(flag, root, known)
        return base
    groups = [[name for name in splits if _words(name) & {*called}] for called in SPLITS[split]]
    found, *rest = [*filter(None, groups), []]
    if len(found) != 1 or (flat and len(nested) == 1) or (others and not exact):
        wanted = f"expected one folder of {split} images ({', '.join(sum(SPLITS[split], []))})"
        other = f"or another {'--val_dir' if split == 'val' else flag}"
        refuse(f"{flag} {root}: holds {', '.join(names[:5])}; {wanted}, {other}")
    if found != [split] or any(rest):
        instead = f", not {rest[0][0]}" if any(rest) else ""
        note(f"{flag} {root}: its {split} images are those of {found[0]}{instead}")
    return _unwrapped(flag, root / found[0], split, known)


def _unwrapped(flag, root, split, known):
    """`root`, or the only folder in it where that one holds the splits or the classes."""
    inner, names = root, class_folders(flag, root)
    for _ in range(3):
        if len(names) != 1 or names[0] in known:
            break
        inner, names = inner / names[0], class_folders(flag, inner / names[0])
        if any(name in known or name.lower() in EVERY_SPLIT for name in [inner.name, *names]):
            note(f"{flag} {root}: taken is its only folder, {inner.relative_to(root)}")
            return split_folder(flag, inner, split, known)
    if inner != root and len(names) > 1 and not known:
        what = f"one class, {inner.relative_to(root)}, of {len(names)} folders, first {names[0]}"
        refuse(f"{flag} {root}: {what}; if these are the classes: {flag} {inner}")
    for name in class_folders(flag, root) if not known else ():
        if name.lower() in EVERY_SPLIT and (held := class_folders(flag, root / name)):
            what = f"{name} is taken as a class, though it holds {', '.join(held[:3])}"
            note(f"{flag} {root}: {what}")
    return root


def _refuse_splits_below(flag, root, known):
    """Refuse classes that hold splits: data/{train,val}/ beside previews/. Warn of classes that all
    hold the same folders, as fold1/ and fold2/ do."""
    names, held = class_folders(flag, root), set()
    for name in names:
        below = [*os.scandir(root / name)] if name in known or not known else []
        folders = sorted(e.name for e in below if e.is_dir() and not _is_aside(e.name))
        inner = [folder for folder in folders if folder.lower() in EVERY_SPLIT]
        if inner:
            what = f"{name} would be a class, but holds {', '.join(inner)}"
            refuse(f"{flag} {root}: {what}; if these are the splits: {flag} {root / name}")
        held.add(tuple(folders))
    if len(names) > 1 and len(held) == 1 and len(*held) > 1:
        what = f"classes are {', '.join(names[:3])}, which all hold {', '.join(folders[:3])}"
        tests = {name for name in names if _words(name) & {*sum(SPLITS["val"], [])}}
        first = next((name for name in names if name not in tests), names[0])  # not the test images
        say = refuse if any(_words(name) & EVERY_SPLIT for name in names) else note
        say(f"{flag} {root}: {what}; if these are the classes: {flag} {root / first}")


def _deeper(base, known):
    """The folder further below `base` that one may point at for the classes `known`, or None."""
    for depth in range(1, 5):
        for path in sorted(base.glob("*/" * depth + next(iter(known)))):
            if _holds_image(path):  # Kaggle's Annotations/ have wnids, too
                above = path.parent
                return above.parent if above.name.lower() in EVERY_SPLIT else above
    return None


def _holds_image(folder):  # or a folder in it does
    paths = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))
    return any(path.suffix.lower() in EXTENSIONS for path in paths)


def in_folders(dataset, root, split, flag, download=False):
    """ROOT/split/<class>/, or ROOT/<class>/."""
    known, left = known_prompts(dataset), defaultdict(list)
    base = split_folder(flag, root, split, known)
    names = class_folders(flag, base)
    ours = [name for name in names if not known or name in known]
    if not ours:
        what = f"no class folders in {base}" + f", but {', '.join(names[:3])}" * bool(names)
        deeper = known and _deeper(base, known)
        what += f" (its classes are in {deeper}: {flag} {deeper})" if deeper else ""
        refuse(f"{flag} {root}: {what}; {dataset} needs {ALL[dataset].needs}")
    found = {name: images_below(base / name, left) for name in ours}
    look_beside(base, left)
    say_left(f"{flag} {root}", left)
    return found, None


def images_below(folder, left):
    """The images in `folder` and below, sorted; what is left out goes to left[what it is].

    Not torchvision's `make_dataset`: it takes hidden files and follows a link in circles.
    """

    def stop(error):  # os.walk alone would pass over a folder that may not be read
        raise error

    found = []  # without a stat: there may be a million
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        for link in filter(os.path.islink, (os.path.join(parent, name) for name in folders)):
            if Path(parent).resolve().is_relative_to(Path(link).resolve()):
                refuse(f"{link}: a link to {os.readlink(link)}, a folder that it is in")
        left["hidden or thumbnail folders"] += [Path(parent, n) for n in folders if _is_aside(n)]
        folders[:] = [name for name in folders if not _is_aside(name)]
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS and not name.startswith("."):
                found.append(Path(parent, name))
            elif extension not in BESIDE and not _is_aside(name):
                left["files of other formats"].append(Path(parent, name))
    return sorted(found)


def look_beside(base, left):
    """Adds to `left` the images beside class folders, and folders that may have been meant as such:
    .airplane, thumbs."""
    for path in sorted(base.iterdir()):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            left["images beside the class folders"].append(path)
        elif _is_aside(path.name) and path.is_dir() and _holds_image(path):
            left["hidden or thumbnail folders"].append(path)


def say_left(where, left):
    """Warn about what `images_below` left out."""
    for what, paths in left.items():
        if paths:
            note(f"{where}: {len(paths)} {what} are left out, first {paths[0]}")


def in_wnid_folders(dataset, root, split, flag, download=False):
    """`in_folders`, or a flat val/ with one of the files in GROUND_TRUTH."""
    known = known_prompts(dataset)
    base = split_folder(flag, root, split, known)
    if split != "val" or any((base / wnid).is_dir() for wnid in known) or _deeper(base, known):
        return in_folders(dataset, root, split, flag)
    places = [base, root]
    for above in Path(os.path.abspath(base)).parents[:4]:  # Kaggle's is above ILSVRC/Data/CLS-LOC
        places += [above, *above.glob("*devkit*"), *above.glob("*devkit*/data")]
    paths = [place / name for place in places for name in GROUND_TRUTH]
    path = next(filter(os.path.isfile, paths), None)
    if not path:
        wanted = f"no ground truth is beside it: {', '.join(GROUND_TRUTH)}"
        refuse(f"{flag} {root}: {base} has no class folders of {dataset}, and {wanted}")
    try:
        wnid_of = GROUND_TRUTH[path.name](path)
    except Exception as error:  # whatever is wrong inside somebody's file
        refuse(f"{path}: cannot be read as ground truth: {type(error).__name__}: {error}")
    by_class = {}
    for image in images_below(base, defaultdict(list)):
        if image.name not in wnid_of:
            refuse(f"{flag} {root}: {image.name} has no line in {path.name}")
        by_class.setdefault(wnid_of[image.name], []).append(image)
    return by_class, None


def _kaggle(path):  # ImageId,"wnid x y x y ..."
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in rows}


def _wnids(path):  # line i = wnid of image i
    return _by_number(path.read_text(encoding="utf-8").split())


def _devkit(path):  # line i of the file beside it = number of image i's class
    from scipy.io import loadmat

    synsets = loadmat(path, squeeze_me=True)["synsets"]
    wnid_of = {str(int(s["ILSVRC2012_ID"])): str(s["WNID"]) for s in synsets}
    numbers = path.with_name("ILSVRC2012_validation_ground_truth.txt").read_text().split()
    return _by_number(wnid_of[n] for n in numbers)


def _by_number(wnids):
    return {f"ILSVRC2012_val_{i:08d}.JPEG": wnid for i, wnid in enumerate(wnids, 1)}


def _tiny_imagenet(path):  # val_0.JPEG<tab>wnid<tab>box
    lines = filter(None, path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("\t")[:2] for line in lines)


# {file: function that reads {name of an image: wnid} from it}
GROUND_TRUTH = {
    "LOC_val_solution.csv": _kaggle,
    "imagenet_2012_validation_synset_labels.txt": _wnids,
    "meta.mat": _devkit,
    "val_annotations.txt": _tiny_imagenet,
}


def in_cifar(dataset, root, split, flag, download=False):
    """torchvision's CIFAR, held in memory; `in_folders` where there are class folders."""
    base = split_folder(flag, root, split, known_prompts(dataset))
    if base != root or set(class_folders(flag, root)) & set(known_prompts(dataset)):
        return in_folders(dataset, root, split, flag)
    import torchvision

    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    root = root.parent if root.name == cls[dataset].base_folder else root
    try:
        data = cls[dataset](root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # damaged, or cannot be downloaded
        if download:
            refuse(f"--download: {error}; unpack {cls[dataset].url} in {root} by hand")
        refuse(f"{flag} {root}: {error}; {dataset} needs {ALL[dataset].needs}")
    targets = np.asarray(data.targets)
    rows = {name: np.flatnonzero(targets == c).tolist() for c, name in enumerate(data.classes)}
    return rows, data.data


def in_scikit_learn(dataset, root, split, flag, download=False):
    """1,797 scans of handwritten digits, 8 x 8; every fourth of a class is a test image."""
    home = Path(find_spec("sklearn").origin).parent  # to import it takes a second, for one file
    table = np.loadtxt(home / "datasets/data/digits.csv.gz", delimiter=",")
    gray = (table[:, :64].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    by_class = {}
    for c in range(10):
        rows = np.flatnonzero(table[:, 64] == c)
        is_test = np.arange(len(rows)) % 4 == 3
        by_class[str(c)] = rows[is_test if split == "val" else ~is_test].tolist()
    return by_class, np.repeat(gray[..., None], 3, axis=3)  # (N, 8, 8, 3)


# ---- the data sets


class TeacherRecipe(NamedTuple):
    """Defaults of matching.train_teacher for one data set."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_epochs: int
    augment: str
    flip: float


@dataclass(frozen=True)
class DataSet:
    """All that is fixed for one data set.

    find          where its images are: a function like `in_folders`
    needs         what `find` expects in the root, for messages; None: it needs no root
    teacher       how its teacher is trained: has no default, so that none is forgotten
    train_images  in the training split; None: not known
    image_size    pixels of a saved synthetic image, and of the student's input
    encode_size   pixels at which real images enter the VAE: 512 as the release
    mean, std     of RGB in [0, 1], for teachers and students
    """

    find: Callable
    needs: str | None
    teacher: TeacherRecipe
    train_images: int | None
    image_size: int = 224
    encode_size: int = 512
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)


# The paper names its teachers and their accuracies only. ImageNet: PyTorch's classification script.
# Tiny-ImageNet: the public 64-px ResNet recipe. CIFAR: the usual one of 32-px networks.
IMAGENET_TEACHER = TeacherRecipe(90, 256, 0.1, 1e-4, 5, "rrc", 0.5)
TINY_TEACHER = TeacherRecipe(200, 256, 0.2, 1e-4, 5, "rrc", 0.5)
CIFAR_TEACHER = TeacherRecipe(200, 128, 0.1, 5e-4, 0, "pad_crop", 0.5)
# short; digits are not flipped
DIGITS_TEACHER = TeacherRecipe(15, 50, 0.02, 5e-4, 1, "pad_crop", 0.0)

WNIDS = "train/<wnid>/ for training, val/<wnid>/ (or flat val/ with its ground truth) for tests"
CIFAR10 = "cifar-10-batches-py/ (--download fetches it), or train/<class name>/ with images"
CIFAR100 = "cifar-100-python/ (--download fetches it), or train/<class name>/ with images"
ANY = "train/<class>/ with images (val/<class>/ for tests), or the <class>/ folders themselves"

CIFAR10_COLOURS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_COLOURS = ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))
DIGITS_COLOURS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# find, needs, teacher, train_images, image_size, encode_size, mean, std
ALL = {
    "imagenet": DataSet(in_wnid_folders, WNIDS, IMAGENET_TEACHER, 1281167),
    "imagenette": DataSet(in_wnid_folders, WNIDS, IMAGENET_TEACHER, 9469),
    "imagewoof": DataSet(in_wnid_folders, WNIDS, IMAGENET_TEACHER, 9025),
    "imagenet100": DataSet(in_wnid_folders, WNIDS, IMAGENET_TEACHER, 126689),
    "tiny_imagenet": DataSet(in_wnid_folders, WNIDS, TINY_TEACHER, 100000, 64),
    "cifar10": DataSet(in_cifar, CIFAR10, CIFAR_TEACHER, 50000, 32, 512, *CIFAR10_COLOURS),
    "cifar100": DataSet(in_cifar, CIFAR100, CIFAR_TEACHER, 50000, 32, 512, *CIFAR100_COLOURS),
    "digits": DataSet(in_scikit_learn, None, DIGITS_TEACHER, 1352, 32, 32, *DIGITS_COLOURS),
    "imagefolder": DataSet(in_folders, ANY, IMAGENET_TEACHER, None),
}


def name(text):
    """argparse type: a data set's name; `-` and `_` are equal."""
    if text.replace("-", "_") not in ALL:
        refuse(f"--dataset {text}: expected one of {', '.join(ALL)}")
    return text.replace("-", "_")


def usual_root(dataset):
    """Where the launchers look for the real images; None for those that come with scikit-learn."""
    folder = {"imagenet100": "imagenet", "tiny_imagenet": "tiny-imagenet-200"}
    return Path("data", folder.get(dataset, dataset)) if ALL[dataset].needs else None


def default(fact):
    """The default of a flag that depends on the data set: its `fact`, such as "image_size"."""
    return lambda args: getattr(ALL[args.dataset], fact)


def add_dataset_flags(parser):
    """The flags that say which real images a stage reads."""
    parser.heading("real images")
    parser.setting("--dataset", type=name, default="imagenet", help=", ".join(ALL))
    parser.flag("--data_dir", help="the data set's root (not for digits)")
    parser.flag("--label_file_path", help="prompts, one per line [our list, or folder names]")
    part = "only these: folder names, class indices, or ranges such as 0-9"
    parser.setting("--classes", nargs="+", metavar="C", short="classes", help=part)
    limit = {"type": number(int, 0), "default": 0, "short": "max"}
    parser.setting("--max_images_per_class", **limit, help="for rehearsals; 0 takes all")
    parser.flag("--download", action="store_true", help="let torchvision download CIFAR")


def open_split(
    dataset,
    root,
    split="train",
    label_file=None,
    classes=None,
    max_per_class=0,
    download=False,
    flag="--data_dir",
):
    """The Split of one `split`, "train" or "val"; its classes keep the data set's order.

    classes    None for all, or folder names, indices and ranges ("0-9") of the class list
    """
    facts, where = ALL[dataset], f"{flag} {root or ''}".strip()
    if download and facts.find is not in_cifar:
        refuse(f"--download: CIFAR-10 and CIFAR-100 can be downloaded, not {dataset}")
    if download and root:
        Path(root).mkdir(parents=True, exist_ok=True)
    if facts.needs and not (root and Path(root).is_dir()):
        refuse(f"{where}: no such folder; {dataset} needs {facts.needs}")
    by_class, arrays = facts.find(dataset, root and Path(root), split, flag, download)
    known = known_prompts(dataset)
    # differs from the release: classes are keyed by folder name and index, not by prompt
    folders = list(known) or sorted(by_class)
    for folder in folders:
        if not files.safe_name(folder):
            refuse(f"{where}: class folder {folder!r}: not a safe name on every system; rename it")
    same = files.colliding_names(folders)
    if same:
        refuse(f"{where}: class folders {same[0]!r} and {same[1]!r} are one on some file systems")
    if label_file:
        prompts = read_label_file(label_file, folders, dataset)
    else:
        prompts = list(known.values()) or folder_prompts(folders)
    chosen, most = class_positions(classes, folders), max_per_class or None
    missing = [folders[c] for c in chosen if folders[c] not in by_class]
    if missing:
        count = f"{len(missing)} of {len(chosen)} classes of {dataset} are not there"
        refuse(f"{where}: {count}, first {missing[0]}; expected {facts.needs}")
    rows = [(folders[c], prompts[c], c, tuple(by_class[folders[c]][:most])) for c in chosen]
    return Split(dataset, split, *zip(*rows), arrays)


def folder_prompts(folders):
    """Prompts from the names of folders: of wnids ImageNet's, else without the number or wnid that
    each begins with."""
    known = known_prompts("imagenet")
    if all(folder.lower() in known for folder in folders):
        note(f"prompts of wnids are ImageNet's: {folders[0]} is {known[folders[0].lower()]!r}")
        return [known[folder.lower()] for folder in folders]
    names = [re.sub(r"[_\s]+", " ", folder).strip() for folder in folders]
    bare = [re.sub(r"^(?:\d+\.(?!\d)|n\d{8}[ .-])\s*", "", name) for name in names]
    numbers = sorted(int(m[1]) for m in (re.match(r"(\d+) \D", name) for name in names) if m)
    if numbers in [[*range(n, n + len(names))] for n in (0, 1)]:  # 0_airplane, not 3_wheeler
        bare = [name.split(" ", 1)[1] for name in names]
    is_same = any(not name or name == whole for name, whole in zip(bare, names))
    if is_same or len({*bare}) < len(bare):
        return names
    note(f"prompts are the folders' names without number or wnid: {names[0]!r} is {bare[0]!r}")
    return bare


def of_all(dataset, count):
    """What a result says where classes are missing: "9 of 10 classes", else ""."""
    known = len(known_prompts(dataset))
    return f"{count} of {known} classes" if known > count else ""


def class_positions(classes, folders):
    """--classes (names, indices, ranges; None for all) -> sorted positions in `folders`."""
    if not classes:
        return list(range(len(folders)))
    chosen, last, places = set(), len(folders) - 1, {nfc(f): c for c, f in enumerate(folders)}
    for word in classes:
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if nfc(word) in places:
            chosen.add(places[nfc(word)])
        elif span and int(span[1]) <= int(span[2] or span[1]) <= last:
            chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        else:
            what = "neither a class folder nor an index or range"
            refuse(f"--classes {word}: {what} within 0-{last}")
    return sorted(chosen)
