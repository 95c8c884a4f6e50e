"""Every data set by name: where its images are, its class folders in index order, its prompts, its sizes.

    split = open_split("imagenet", "data/imagenet", "train")
    split.folders[0], split.prompts[0], len(split.items[0])       # 'n01440764', 'tench, Tinca tinca', 1300
    split.read(split.items[0][0])                                 # a PIL image in RGB

Class index = position of the folder name in sorted order, for real and synthetic images alike, which is what
torchvision's ImageFolder gives and what its ImageNet teachers were trained with. Everything is keyed by class index
and folder name, never by prompt: two ImageNet classes share the word "crane".
"""

import contextlib
import csv
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from scripts.files import colliding_names, safe_name
from scripts.runtime import natural, refuse, warn

LABEL_FOLDER = Path(__file__).parent / "label-prompt"
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's ImageFolder
# images all the same, to look at; torchvision's ImageFolder leaves them out too
OTHER_EXTENSIONS = {".gif", ".jfif", ".jpe", ".jp2", ".heic", ".avif", ".tga"}
WNID = re.compile(r"n\d{8}$")


class Facts(NamedTuple):
    """What is fixed for one data set.

    image_size    pixels of a saved synthetic image, and of the student's input
    mean, std     of RGB in [0, 1], for teachers and students
    """

    image_size: int
    mean: tuple
    std: tuple


DATASETS = {
    "imagenet": Facts(224, *IMAGENET_STATISTICS),
    "imagenette": Facts(224, *IMAGENET_STATISTICS),
    "imagewoof": Facts(224, *IMAGENET_STATISTICS),
    "imagenet100": Facts(224, *IMAGENET_STATISTICS),
    "tiny_imagenet": Facts(64, *IMAGENET_STATISTICS),
    "cifar10": Facts(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Facts(32, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "digits": Facts(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagefolder": Facts(224, *IMAGENET_STATISTICS),
}


def dataset_name(text):
    """argparse type: a data set's name, `-` and `_` taken alike."""
    name = text.replace("-", "_")
    if name not in DATASETS:
        refuse(f"--dataset {text}: expected one of {', '.join(DATASETS)}")
    return name


class BadImage(ValueError):
    """A file that is no image, or one that cannot be turned into RGB faithfully; the text names it."""


@dataclass(frozen=True)
class Split:
    """The images of one split by class.

    folders, prompts, class_ids    one entry a class; class_ids are positions in the whole data set, so that a class
                                   keeps its seeds when --classes selects a part
    items                          items[c]: what `read` takes, one entry an image, in sorted order
    arrays                         (N, H, W, 3) uint8 if the images live in memory (CIFAR, digits), else None
    """

    dataset: str
    name: str
    folders: tuple
    prompts: tuple
    class_ids: tuple
    items: tuple
    arrays: np.ndarray | None = None

    def read(self, item):
        """One image as PIL RGB. Raises BadImage."""
        return Image.fromarray(self.arrays[item]) if self.arrays is not None else read_rgb(item)

    def describe(self, item):
        """How an error message calls this image."""
        return f"image {item} of {self.dataset} {self.name}" if self.arrays is not None else str(item)

    def fingerprint(self, positions=None, missing_ok=False):
        """A hash of which images there are: names and file sizes, or pixels where they live in memory.

        missing_ok   a broken link is one of them, for --on_bad_image skip; else the OSError of a missing file
        """
        state = hashlib.sha256()
        for position in range(len(self.folders)) if positions is None else positions:
            state.update(f"{self.folders[position]}\n".encode())
            for item in self.items[position]:
                if self.arrays is not None:
                    state.update(self.arrays[item].tobytes())
                elif missing_ok and not os.path.exists(item):
                    state.update(f"{item.name} missing\n".encode())
                else:
                    status = os.stat(item)
                    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                        refuse(f"{item}: not a file")
                    state.update(f"{item.name} {status.st_size}\n".encode())
        return state.hexdigest()

    def digest(self):
        """sha256 over folder names and image contents: says which images a model was trained on."""
        state = hashlib.sha256()
        for folder, items in zip(self.folders, self.items):
            state.update(f"{folder} {len(items)}\n".encode())
            for item in items:
                state.update(self.arrays[item].tobytes() if self.arrays is not None else Path(item).read_bytes())
        return state.hexdigest()


# ---- images


def read_rgb(path):
    """A file as PIL RGB: alpha dropped, palettes resolved, the first frame of an animation, no EXIF rotation (as the
    release).

    16-bit gray is scaled to 8 bits; PIL alone would clip it to white. Raises BadImage.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I") or image.mode == "F":
                image = _sixteen_bit_gray(image)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise BadImage(f"{path}: {error}") from None
    except UnidentifiedImageError:
        size = Path(path).stat().st_size
        raise BadImage(f"{path}: {'an empty file' if size == 0 else 'not an image'} ({size} bytes)") from None
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders let anything out: struct.error, IndexError, zlib.error ...
        raise BadImage(f"{path}: cannot be decoded: {str(error) or type(error).__name__}") from None


def _sixteen_bit_gray(image):
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise BadImage(
            f"{image.filename}: mode {image.mode} with values {values.min()} to {values.max()} has no known range"
        )
    return Image.fromarray((values.astype(np.float64) / 257).round().astype(np.uint8))


def squash(image, size):
    """PIL image -> (size, size) by antialiased bilinear, aspect ratio not kept: how the release feeds the VAE."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


# ---- label files


def read_label_file(path, folders, dataset="imagefolder", flag="--label_file_path"):
    """The prompts of `folders` from a text file: line i = prompt of class i, or `folder<TAB>prompt` (also `wnid
    prompt`).

    A BOM, CRs, outer spaces and balanced outer quotes are taken off. Refuses, with its line number, a blank line, a
    stray quote, a control character, a wrong count, an unknown or repeated folder, and - against our own list of a
    known data set - rows in another order or with their spaces gone. A prompt that two classes share is only warned
    about.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        refuse(f"{flag} {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        refuse(f"{flag} {path}: not UTF-8 at byte {error.start}")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    if lines == [""]:
        refuse(f"{flag} {path}: is empty, expected {len(folders)} prompts")
    rows = [_label_row(line, f"{flag} {path}, line {number}") for number, line in enumerate(lines, 1)]
    keyed = [folder is not None for folder, _ in rows]
    if any(keyed) and not all(keyed):
        odd = keyed.index(not keyed[0]) + 1
        refuse(f"{flag} {path}, line {odd}: {'has' if keyed[odd - 1] else 'lacks'} a folder name, unlike line 1")
    if all(keyed):
        prompts = _by_folder(rows, folders, f"{flag} {path}")
    else:
        if len(rows) != len(folders):
            refuse(f"{flag} {path}: has {len(rows)} prompts, there are {len(folders)} classes")
        prompts = [prompt for _, prompt in rows]
        _check_order(prompts, folders, dataset, f"{flag} {path}")
    seen = {}
    for folder, prompt in zip(folders, prompts):
        if prompt in seen:
            warn(f"{flag} {path}: classes {seen[prompt]} and {folder} share the prompt {prompt!r}")
        seen.setdefault(prompt, folder)
    return prompts


def _label_row(line, where):
    """One line -> (folder or None, prompt)."""
    control = re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", line)
    if control:
        refuse(f"{where}: holds the control character {control[0]!r}")
    if not line.strip():
        refuse(f"{where}: is blank")
    folder, tab, prompt = line.partition("\t")
    if not tab:
        head, space, rest = line.strip().partition(" ")
        folder, prompt = (head, rest) if space and WNID.match(head) else (None, line)
    if "\t" in prompt:
        refuse(f"{where}: has more than one tab")
    prompt = prompt.strip()
    if len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "\"'":
        prompt = prompt[1:-1].strip()
    if '"' in prompt or prompt[:1] == "'" or prompt[-1:] == "'":
        refuse(f"{where}: has a stray quote mark: {prompt}")
    if not prompt:
        refuse(f"{where}: has no prompt")
    return (folder.strip() if folder is not None else None), prompt


def _by_folder(rows, folders, where):
    prompts = {}
    known = set(folders) | set(known_prompts("imagenet"))
    for number, (folder, prompt) in enumerate(rows, 1):
        if folder in prompts:
            refuse(f"{where}, line {number}: the folder {folder} stands twice")
        if folder not in known:
            refuse(f"{where}, line {number}: there is no class folder {folder!r}")
        prompts[folder] = prompt
    missing = [folder for folder in folders if folder not in prompts]
    if missing:
        refuse(f"{where}: has no line for the class folder {missing[0]} ({len(missing)} of {len(folders)} missing)")
    return [prompts[folder] for folder in folders]


def _check_order(prompts, folders, dataset, where):
    """A bare prompt list of a known data set must not be our own list in another order or without its spaces."""
    ours = known_prompts(dataset) if dataset != "imagefolder" else {}
    ours = {
        **({} if dataset != "imagefolder" or not all(map(WNID.match, folders)) else known_prompts("imagenet")),
        **ours,
    }
    owner = {}
    for folder, prompt in ours.items():
        owner.setdefault(_loose(prompt), folder)
    for number, (folder, prompt) in enumerate(zip(folders, prompts), 1):
        if folder not in ours or prompt == ours[folder]:
            continue
        other = owner.get(_loose(prompt))
        if other == folder and len(prompt) < len(ours[folder]) and " " in ours[folder] and " " not in prompt:
            refuse(f"{where}, line {number}: {prompt!r} has lost its spaces, expected {ours[folder]!r}")
        if other not in (None, folder):
            refuse(
                f"{where}, line {number}: {prompt!r} is the prompt of {other}, expected {folder}'s {ours[folder]!r}"
            )


def _loose(prompt):
    return re.sub(r"[^a-z0-9]", "", prompt.lower())


def known_prompts(dataset):
    """{class folder: prompt} of a data set whose classes are known, in class order; {} for `imagefolder`."""
    # differs from the release: its lists swap two ImageNet classes, misorder CIFAR-100 and lose Tiny-ImageNet's spaces
    path = LABEL_FOLDER / f"{dataset}.txt"
    if dataset == "imagefolder":
        return {}
    return dict(line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())


# ---- splits


def add_dataset_flags(parser, data_flag="--data_dir"):
    """The flags that say which real images a script reads."""
    group = parser.add_argument_group("real images")
    group.add_argument("--dataset", type=dataset_name, default="imagenet", metavar="NAME", help=", ".join(DATASETS))
    group.add_argument(data_flag, default=None, help="the data set's root (not for digits)")
    group.add_argument(
        "--label_file_path",
        default=None,
        help="prompts, one a line in class order or `folder<TAB>prompt`; default: the data set's own list, for "
        "imagefolder the folder names",
    )
    group.add_argument(
        "--classes",
        nargs="+",
        default=None,
        metavar="C",
        help="only these: folder names, class indices, or ranges such as 0-9",
    )
    group.add_argument(
        "--max_images_per_class", type=natural, default=0, help="rehearse on the first so many; 0 takes all"
    )
    group.add_argument(
        "--download", action="store_true", help="let torchvision download CIFAR into the data set's root"
    )


def open_split(
    dataset, root, split="train", label_file=None, classes=None, max_per_class=0, download=False, flag="--data_dir"
):
    """Find the images of one `split` ("train" or "val"); refuses, naming `flag` and what is expected where.

    classes    None for all, or folder names, indices and ranges ("0-9") of the data set's class list
    Returns a Split; the classes keep the data set's order.
    """
    if dataset == "digits":
        by_class, arrays = _digits(split)
    elif root is None:
        refuse(f"{flag}: missing; {dataset} needs {_expected(dataset)}")
    elif not Path(root).is_dir():
        refuse(f"{flag} {root}: no such folder; {dataset} needs {_expected(dataset)}")
    elif dataset in ("cifar10", "cifar100") and not _has_folders(Path(root) / split):
        by_class, arrays = _torchvision_cifar(dataset, root, split, download, flag)
    else:
        by_class, arrays = _folders(dataset, Path(root), split, flag), None
    # differs from the release: classes are keyed by folder name and index, not by prompt, and folders not by number
    folders = list(known_prompts(dataset)) or sorted(by_class)
    for folder in folders:
        if not safe_name(folder):
            refuse(
                f"{flag} {root}: the class folder {folder!r} is no name that is safe on every file system; rename it"
            )
    collision = colliding_names(folders)
    if collision:
        refuse(f"{flag} {root}: the class folders {collision[0]!r} and {collision[1]!r} are one on some file systems")
    if label_file:
        prompts = read_label_file(label_file, folders, dataset)
    else:
        prompts = list(known_prompts(dataset).values()) or [re.sub(r"[_\s]+", " ", f).strip() for f in folders]
    chosen = class_positions(classes, folders)
    missing = [folders[c] for c in chosen if folders[c] not in by_class]
    if missing:
        refuse(
            f"{flag} {root}: {len(missing)} of {len(chosen)} classes of {dataset} are not there, first {missing[0]}; "
            f"expected {_expected(dataset)}"
        )
    return Split(
        dataset,
        split,
        tuple(folders[c] for c in chosen),
        tuple(prompts[c] for c in chosen),
        tuple(chosen),
        tuple(tuple(by_class[folders[c]][: max_per_class or None]) for c in chosen),
        arrays,
    )


def class_positions(classes, folders):
    """--classes (names, indices, ranges; None for all) -> sorted positions in `folders`."""
    if not classes:
        return list(range(len(folders)))
    chosen = set()
    for word in classes:
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if word in folders:
            chosen.add(folders.index(word))
        elif span and int(span[1]) <= int(span[2] or span[1]) < len(folders):
            chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        else:
            refuse(f"--classes {word}: neither a class folder nor an index or range within 0-{len(folders) - 1}")
    return sorted(chosen)


def _expected(dataset):
    return {
        "cifar10": "cifar-10-batches-py/ (--download fetches it), or train/<class name>/ with images",
        "cifar100": "cifar-100-python/ (--download fetches it), or train/<class name>/ with images",
        "imagenet": "train/<wnid>/ for training and val/<wnid>/ (or flat val/ with its ground-truth file) for testing",
        "tiny_imagenet": "train/<wnid>/images/ for training and val/images/ with val/val_annotations.txt for testing",
        "imagefolder": "train/<class>/ with images (and val/<class>/ for testing), or the <class>/ folders themselves",
    }.get(dataset, "train/<wnid>/ for training and val/<wnid>/ for testing")


def _has_folders(path):
    return path.is_dir() and any(p.is_dir() for p in path.iterdir())


def _images_below(folder, others=None):
    """The images in `folder` and below, sorted; what looks like one and is not taken goes to `others`."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):  # asks no file for its status: a million
        for link in (os.path.join(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))):
            if Path(parent).resolve().is_relative_to(Path(link).resolve()):  # each image would be found 40 times
                refuse(f"{link}: a link to {os.readlink(link)}, a folder that it is in")
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS and not name.startswith("."):
                found.append(Path(parent, name))
            elif extension in OTHER_EXTENSIONS and others is not None:
                others.append(Path(parent, name))
    return sorted(found)


def class_folders(flag, root):
    """The names of the folders in `root`, sorted; refuses a broken link, which would be a class lost in silence."""
    paths = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    broken = next((p for p in paths if p.is_symlink() and not p.exists()), None)
    if broken:
        refuse(f"{flag} {root}: {broken} is a broken link, to {os.readlink(broken)}")
    return [p.name for p in paths if p.is_dir()]


def _folders(dataset, root, split, flag):
    """{class folder: sorted image paths} of ROOT/split/<class>/, or of ROOT/<class>/ if ROOT is the split itself."""
    base = root / split if (root / split).is_dir() else root
    annotations = base / "val_annotations.txt"
    if (
        dataset == "tiny_imagenet"
        and annotations.is_file()
        and not (base / next(iter(known_prompts(dataset)))).is_dir()
    ):
        return _by_annotation(base / "images", _tiny_annotations(annotations), flag)
    if dataset.startswith("image") and split == "val" and dataset != "imagefolder" and not _has_folders(base):
        return _by_annotation(base, _imagenet_ground_truth(root, base, flag), flag)
    if not _has_folders(base):
        refuse(f"{flag} {root}: no class folders in {base}; {dataset} needs {_expected(dataset)}")
    wanted = known_prompts(dataset)
    names, others = class_folders(flag, base), []
    found = {name: _images_below(base / name, others) for name in names if not wanted or name in wanted}
    if others:
        warn(f"{flag} {root}: {len(others)} files with other extensions are left out, first {others[0]}")
    return found


def _by_annotation(folder, wnid_of, flag):
    by_class = {}
    for path in _images_below(folder):
        if path.name not in wnid_of:
            refuse(f"{flag} {folder}: {path.name} has no line in the ground-truth file")
        by_class.setdefault(wnid_of[path.name], []).append(path)
    return by_class


@contextlib.contextmanager
def _as_ground_truth(path):
    """Whatever is wrong inside somebody's file is one line that names it."""
    try:
        yield
    except Exception as error:
        refuse(f"{path}: cannot be read as ground truth: {type(error).__name__}: {error}")


def _tiny_annotations(path):
    """val_annotations.txt: `val_0.JPEG<TAB>n03444034<TAB>box` -> {file name: wnid}."""
    with _as_ground_truth(path):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not WNID.match(row[1]):
            refuse(f"{path}, line {number}: expected file name, tab, wnid")
    return {row[0]: row[1] for row in rows}


def _imagenet_ground_truth(root, base, flag):
    """{file name: wnid} of a flat ImageNet val/, from whichever of the three usual files is there."""

    def found(name):
        return next((p for p in (base / name, root / name, base.parent / name) if p.is_file()), None)

    kaggle = found("LOC_val_solution.csv")  # ImageId,"wnid x y x y ..."
    if kaggle:
        with _as_ground_truth(kaggle), open(kaggle, newline="", encoding="utf-8") as file:
            return {f"{row['ImageId']}.JPEG": row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    wnids = found("imagenet_2012_validation_synset_labels.txt")  # line i = wnid of image i
    if wnids:
        with _as_ground_truth(wnids):
            lines = wnids.read_text(encoding="utf-8").split()
        return {f"ILSVRC2012_val_{i:08d}.JPEG": wnid for i, wnid in enumerate(lines, 1)}
    name = "ILSVRC2012_validation_ground_truth.txt"  # line i = ILSVRC id of image i, needs meta.mat
    truth = next((p for pattern in ("", "*devkit*/", "*devkit*/data/") for p in root.glob(pattern + name)), None)
    if truth and (truth.parent / "meta.mat").is_file():
        from scipy.io import loadmat

        with _as_ground_truth(truth.parent / "meta.mat"):
            synsets = loadmat(truth.parent / "meta.mat", squeeze_me=True)["synsets"]
            wnid_of_id = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
        with _as_ground_truth(truth):
            ids = [int(line) for line in truth.read_text(encoding="utf-8").split()]
            return {f"ILSVRC2012_val_{i:08d}.JPEG": wnid_of_id[number] for i, number in enumerate(ids, 1)}
    refuse(
        f"{flag} {root}: {base} is flat and no ground truth is beside it: LOC_val_solution.csv, "
        "imagenet_2012_validation_synset_labels.txt, or the devkit's "
        "ILSVRC2012_validation_ground_truth.txt with meta.mat"
    )


def _torchvision_cifar(dataset, root, split, download, flag):
    import torchvision

    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    try:
        data = cls(root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:  # damaged; not to be downloaded
        refuse(f"{flag} {root}: {error}; {dataset} needs {_expected(dataset)}")
    targets = np.asarray(data.targets)
    return {name: np.flatnonzero(targets == c).tolist() for c, name in enumerate(data.classes)}, data.data


def _digits(split):
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8; of each class every fourth is a test image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.repeat((data.images * (255 / 16)).round().astype(np.uint8)[..., None], 3, axis=3)  # (N, 8, 8, 3)
    by_class = {}
    for c in range(10):
        rows = np.flatnonzero(data.target == c)
        is_test = np.arange(len(rows)) % 4 == 3
        by_class[str(c)] = rows[is_test if split == "val" else ~is_test].tolist()
    return by_class, images
