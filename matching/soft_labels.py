"""One training batch: drawn from a seed, stored, and replayed with the same pixels (paper, section 3.3; FKD).

    batch = draw_batch(seed, epoch, number, index, sizes, input_size, protocol)       # every draw, explicit
    pixels = crop_on_cpu(images, batch.index, batch.crop, batch.flip, input_size)     # (B, S, S, 3) uint8
    x = mix(normalise(pixels, mean, std), batch)                                      # what teacher and student see

Stage 3 writes one safetensors file an epoch that states all draws of all batches and the teacher's logits; stage 4
replays them. Nothing is re-derived from a sampler's seed later, and stages 3 and 4 share each line of this file.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation.datasets import DATASETS, EXTENSIONS, BadImage, class_folders, known_prompts, read_rgb
from distillation.gen_syn_image import read_image_manifest
from scripts.files import (
    check_unit,
    content_digest,
    is_complete,
    output_name,
    read_manifest,
    safe_name,
    sha256,
    write_bytes,
)
from scripts.runtime import (
    BATCH,
    ORDER,
    epoch_count,
    generator,
    natural,
    positive,
    positive_int,
    progress,
    refuse,
    unit_interval,
    warn,
)

# differs from the release: one input size for both stages (its stage 4 always crops to 224)
# The release's ImageNet protocol; `cutmix` is what its launcher asks for with --mix_type.
PROTOCOL = {
    "epochs": 300,
    "batch_size": 1024,
    "input_size": None,
    "min_scale_crops": 0.08,
    "max_scale_crops": 1.0,
    "flip": 0.5,
    "mix_type": "none",
    "mixup": 0.8,
    "cutmix": 1.0,
    "fkd_seed": 42,
}
RATIO = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop
CROP_TRIES = 10


def probability(text):
    """argparse type: a float in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def add_protocol_flags(parser, stored):
    """The flags that say what a training batch is; with `stored`, their default is what the labels were made with."""

    def flag(*names, help, default=None, **kwargs):
        default = PROTOCOL[default or names[-1].lstrip("-")]
        text = "the images' size" if default is None else str(default)
        parser.add_argument(
            *names, default=None, help=f"{help} (default: {'the labels’, else ' if stored else ''}{text})", **kwargs
        )

    flag("--epochs", type=epoch_count, help="epochs")
    flag("-b", "--batch_size", type=positive_int, help="images a batch, over all processes")
    flag("--input_size", type=positive_int, help="pixels of the teacher's and student's input")
    flag("--min_scale_crops", type=unit_interval, help="least share of the image's area in a crop")
    flag("--max_scale_crops", type=unit_interval, help="largest share")
    flag("--flip", type=probability, help="probability of a horizontal flip; 0 for digits and text")
    flag("--mix_type", choices=("mixup", "cutmix", "none"), help="how two images of a batch are mixed")
    flag("--mixup", type=positive, help="alpha of mixup's Beta(alpha, alpha)")
    flag("--cutmix", type=positive, help="alpha of CutMix's Beta(alpha, alpha)")
    flag("--fkd_seed", type=natural, help="seed of every draw of a batch")


def protocol_of(given, image_size):
    """{flag: value}: what was given on the command line, and PROTOCOL for the rest."""
    protocol = {name: default if given.get(name) is None else given[name] for name, default in PROTOCOL.items()}
    protocol["input_size"] = protocol["input_size"] or image_size
    check_scales(protocol["min_scale_crops"], protocol["max_scale_crops"])
    return protocol


def check_scales(least, largest):
    """Refuse a range of crops that is none."""
    if least > largest:
        refuse(f"--min_scale_crops {least}: above --max_scale_crops {largest}")


def labels_name(images, archs, protocol, image_size, extra=None):
    """The name of a labels folder, from the images' folder, the teachers and the protocol.

    labels_name("imagenet_ipc10_s0.7_g8_kmexpand1", ["resnet18"], {... cutmix ...}, 224) is
    "imagenet_ipc10_s0.7_g8_kmexpand1_resnet18_mix-cutmix".
    """
    alpha = protocol.get(protocol["mix_type"])
    options = {
        "epochs": protocol["epochs"],
        "b": protocol["batch_size"],
        "size": protocol["input_size"],
        "crops": f"{protocol['min_scale_crops']:g}-{protocol['max_scale_crops']:g}",
        "flip": protocol["flip"],
        "mix": protocol["mix_type"],
        "alpha": alpha,
        "seed": protocol["fkd_seed"],
        **{name: value for name, (value, _) in (extra or {}).items()},
    }
    defaults = {
        "epochs": PROTOCOL["epochs"],
        "b": PROTOCOL["batch_size"],
        "size": image_size,
        "crops": "0.08-1",
        "flip": PROTOCOL["flip"],
        "mix": "none",
        "alpha": PROTOCOL.get(protocol["mix_type"]),
        "seed": PROTOCOL["fkd_seed"],
        **{name: default for name, (_, default) in (extra or {}).items()},
    }
    return output_name(f"{images}_{'-'.join(re.sub('[^A-Za-z0-9_.-]', '-', a) for a in archs)}", options, defaults)


# ---- the synthetic set


class ImageSet(NamedTuple):
    """A folder of training images, one sub-folder a class.

    folders      class folders in index order = sorted, as torchvision's ImageFolder
    files        relative paths, class by class; targets[i] is the class of files[i]
    image_size   pixels of the saved images, or None if they differ (a foreign folder)
    content      digest of all files; None for a foreign folder until its pixels were read
    digests      {file: sha256} from the manifest; {} for a foreign folder
    generator    the Stable Diffusion that made them (`generator_of`); None for real images and a foreign folder
    real_images  how many real images they were distilled or chosen from; None where that is not known
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
    generator: dict | None
    real_images: int | None

    def facts(self):
        """What labels and results record of the images; stage 4 compares the labels' with its own."""
        return {
            "content": self.content,
            "count": len(self.files),
            "arm": self.arm,
            "ipc": self.ipc,
            "image_size": self.image_size,
            "foreign": self.foreign,
            "generator": self.generator,
            "real_images": self.real_images,
        }


def generator_of(arguments):
    """{"model", "revision", "vae_sha256", "unet_sha256", ...} from the arguments of an image folder's manifest.

    None where no diffusion model had a part.
    """
    arguments = _origin(arguments)
    if "model" not in arguments:
        return None
    hashes = {name: value for name, value in arguments.items() if name.endswith("_sha256")}
    return {"model": arguments["model"], "revision": arguments.get("revision"), **hashes}


def real_images_of(arguments):
    """How many real images there were, from the same arguments; None where they do not say it."""
    arguments = _origin(arguments)
    return (arguments.get("prototype_arguments") or arguments).get("images")


def _origin(arguments):
    """Images that were taken or optimised further name what they come from."""
    while isinstance(arguments.get("source_arguments"), dict):
        arguments = arguments["source_arguments"]
    return arguments


def open_images(flag, root, dataset=None):
    """An ImageSet from an output of stage 2, or from anybody's folder of class folders (`foreign`); reads no pixels.

    dataset   what --dataset says; None takes the manifest's, or for a foreign folder guesses it from the class names
    """
    root = Path(root)
    if not root.is_dir():
        refuse(f"{flag} {root}: no such folder")
    found = _class_files(flag, root)
    name = root.resolve().name
    if not is_complete(root):
        if (root / "args.json").exists():
            read_manifest(flag, root, "images")  # begun and not finished: refuses, and says so
        return _foreign(flag, root, name, found, dataset)
    manifest = read_image_manifest(flag, root)
    folders = [c["folder"] for c in manifest["classes"]]
    if dataset not in (None, manifest["dataset"]):
        refuse(f"--dataset {dataset}: {flag} {root} was made for {manifest['dataset']}")
    odd = sorted(set(found) ^ set(folders))
    if odd:
        refuse(f"{flag} {root}: its class folders are not those of its manifest, first {odd[0]}")
    if list(found) != folders:
        refuse(f"{flag} {root}: its manifest lists the classes in another order than ImageFolder's (sorted)")
    files = [f"{folder}/{file}" for folder, names in found.items() for file in names]
    extra = [file for file in files if file not in manifest["files"]]
    if extra:
        refuse(f"{flag} {root}: {extra[0]} is not in its manifest ({len(extra)} such files)")
    return ImageSet(
        root,
        name,
        manifest["dataset"],
        tuple(folders),
        tuple(files),
        _targets(found),
        manifest["image_size"],
        manifest["content"],
        {file: manifest["files"][file]["sha256"] for file in files},
        manifest["arm"],
        manifest["ipc"],
        False,
        generator_of(manifest["arguments"]),
        real_images_of(manifest["arguments"]),
    )


def _class_files(flag, root):
    """{class folder: sorted image files}, folders sorted; refuses an empty class."""
    found = {}
    for folder in class_folders(flag, root):
        if not safe_name(folder):
            refuse(f"{flag} {root}: the class folder {folder!r} is no name that is safe on every file system")
        found[folder] = sorted(
            p.name
            for p in (root / folder).iterdir()
            if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and p.is_file()
        )
        if not found[folder]:
            refuse(f"{flag} {root}: the class folder {folder} holds no image")
    if not found:
        refuse(f"{flag} {root}: no class folders with images in it")
    return found


def _targets(found):
    counts = torch.tensor([len(names) for names in found.values()])
    return torch.arange(len(found)).repeat_interleave(counts)


def _foreign(flag, root, name, found, dataset):
    folders = list(found)
    dataset = dataset or _guess_dataset(folders)
    known = list(known_prompts(dataset))
    shown = folders
    if known and not set(folders) <= set(known):
        numbers = [int(re.search(r"\d+$", f)[0]) if re.search(r"\d+$", f) else None for f in folders]
        if numbers == list(range(len(known))):  # SRe2L's new000 ... new999, RDED's 00000 ...
            warn(f"{flag} {root}: its {len(folders)} numbered folders are taken as {dataset}'s classes in order")
            shown = known
        else:
            odd = next(f for f in folders if f not in known)
            refuse(f"{flag} {root}: the class folder {odd!r} is no class of --dataset {dataset}")
    warn(f"{flag} {root}: no manifest, another method's images of {dataset}: hashed, recorded and used as they are")
    files = [f"{folder}/{file}" for folder, names in found.items() for file in names]
    sizes = {_size_of(root / file) for file in files}
    side = sizes.pop() if len(sizes) == 1 else (0, 1)
    counts = {len(names) for names in found.values()}
    return ImageSet(
        root,
        name,
        dataset,
        tuple(shown),
        tuple(files),
        _targets(found),
        side[0] if side[0] == side[1] else None,
        None,
        {},
        "foreign",
        counts.pop() if len(counts) == 1 else None,
        True,
        None,
        None,
    )


def _size_of(path):
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        refuse(f"{path}: not an image: {error}")


def _guess_dataset(folders):
    for dataset in DATASETS:
        if dataset != "digits" and list(known_prompts(dataset)) == folders:
            return dataset
    return "imagenet" if set(folders) <= set(known_prompts("imagenet")) else "imagefolder"


def in_threads(function, items, num_workers, desc):
    """[function(item)], by threads and with a bar where there are many: Pillow decodes without the GIL."""
    if len(items) <= 256:
        return [function(item) for item in items]
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        return list(progress(pool.map(function, items), total=len(items), desc=desc, unit="image", leave=False))


def load_pixels(flag, images, num_workers=0):
    """(arrays, images): each image once as (H, W, 3) uint8, in memory, its file hashed as it is read.

    Returns the ImageSet with `content` filled in if it was foreign. Refuses a file that is not what the manifest says.
    """

    def read(file):
        path = images.root / file
        digest = sha256(path)
        if images.digests and digest != images.digests[file]:
            return None, f"{flag} {images.root}: {file} is not what its manifest says: changed since it was made"
        try:
            return np.asarray(read_rgb(path)), digest
        except BadImage as error:
            return None, f"{flag} {error}"

    pairs = in_threads(read, images.files, num_workers, "reading images")
    for array, message in pairs:
        if array is None:
            refuse(message)
    if images.foreign:
        entries = {file: {"sha256": digest} for file, (_, digest) in zip(images.files, pairs)}
        images = images._replace(content=content_digest(entries))
    return [array for array, _ in pairs], images


# ---- draws


class Batch(NamedTuple):
    """Every draw of one training batch of B images.

    index     (B,) int64     which images
    crop      (B, 4) int64   top, left, height, width, in pixels of the saved image
    flip      (B,) bool      mirrored after the crop
    partner   (B,) int64     position in the batch of the image mixed in; its own without mixing
    box       (4,) int64     top, left, bottom, right of CutMix's box, in pixels of the input; zeros without
    lam       float          share of the image itself; for CutMix the box's real area is what is left
    """

    index: torch.Tensor
    crop: torch.Tensor
    flip: torch.Tensor
    partner: torch.Tensor
    box: torch.Tensor
    lam: float


def cuts(count, size):
    """[0, size, 2 size, ..., count]: where `count` rows are cut; a last piece of one row joins the one before.

    BatchNorm cannot train on a single image.
    """
    ends = [*range(size, count, size), count]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        ends.pop(-2)
    return [0, *ends]


def batches_of(count, batch_size):
    """Number of batches of an epoch."""
    return len(cuts(count, batch_size)) - 1


def epoch_batches(seed, epoch, count, batch_size):
    """Image indices of each batch of an epoch: a permutation of `count`, cut; the last batch is shorter."""
    order = torch.randperm(count, generator=generator(seed, ORDER, epoch))
    return order.tensor_split(cuts(count, batch_size)[1:-1])


def draw_batch(seed, epoch, number, index, sizes, input_size, protocol):
    """The draws of batch `number` of `epoch`, from (seed, epoch, number) alone.

    index   (B,) int64; sizes (B, 2) int64, height and width of those images
    """
    g = generator(seed, BATCH, epoch, number)
    count = len(index)
    crop = draw_crops(sizes, (protocol["min_scale_crops"], protocol["max_scale_crops"]), g)
    flip = torch.rand(count, generator=g, dtype=torch.float64) < protocol["flip"]
    mix_type = protocol["mix_type"]
    partner, box, lam = torch.arange(count), torch.zeros(4, dtype=torch.int64), 1.0
    if mix_type != "none":
        partner = torch.randperm(count, generator=g)
        lam = _beta(protocol[mix_type], torch.rand((), generator=g, dtype=torch.float64).item())
    if mix_type == "cutmix":
        box, lam = _cutmix_box(lam, input_size, torch.rand(2, generator=g, dtype=torch.float64).tolist())
    return Batch(index, crop, flip, partner, box, lam)


def draw_crops(sizes, scale, g):
    """RandomResizedCrop's boxes, distributed as torchvision's get_params: (B, 2) height, width -> (B, 4) top, left, h,
    w.

    Up to ten tries of an area in `scale` and a log-uniform ratio in 3/4 .. 4/3; then the largest central crop in that
    range.
    """
    height, width = sizes.to(torch.float64).unbind(1)
    u = torch.rand(4, CROP_TRIES, len(sizes), generator=g, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])  # (tries, B)
    ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * u[1])
    w = torch.round(torch.sqrt(area * ratio))
    h = torch.round(torch.sqrt(area / ratio))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    top = torch.floor(u[2] * (height - h + 1))
    left = torch.floor(u[3] * (width - w + 1))
    first = fits.to(torch.uint8).argmax(0, keepdim=True)  # the first try that fits
    crop = torch.stack([t.gather(0, first)[0] for t in (top, left, h, w)], 1)  # (B, 4)
    whole = width / height
    h = torch.where(whole < RATIO[0], torch.round(width / RATIO[0]), height)
    w = torch.where(whole > RATIO[1], torch.round(height * RATIO[1]), width)
    central = torch.stack([torch.floor((height - h) / 2), torch.floor((width - w) / 2), h, w], 1)
    return torch.where(fits.any(0)[:, None], crop, central).to(torch.int64)


def _beta(alpha, u):
    """Beta(alpha, alpha) by its inverse distribution function."""
    if alpha == 1:
        return u
    from scipy.special import betaincinv

    return float(betaincinv(alpha, alpha, u))


def _cutmix_box(lam, size, u):
    """CutMix's box of area (1 - lam), clipped at the borders, and the lambda that its real area gives."""
    # differs from the release: which stores the lambda drawn; only hard labels use it
    cut = int(size * math.sqrt(1 - lam))
    y, x = int(u[0] * size), int(u[1] * size)
    top, left = max(y - cut // 2, 0), max(x - cut // 2, 0)
    bottom, right = min(y + cut // 2, size), min(x + cut // 2, size)
    return torch.tensor([top, left, bottom, right]), 1 - (bottom - top) * (right - left) / size**2


# ---- replay


def resize_exact(image, size):
    """PIL image -> (size, size), bilinear, horizontal pass first.

    That is what every Pillow does when it enlarges; when it shrinks, Pillow 13 chooses the order by shape, older ones
    do not, so the two passes are asked for one by one.
    """
    if image.width > size or image.height > size:
        image = image.resize((size, image.height), Image.Resampling.BILINEAR)
    return image.resize((size, size), Image.Resampling.BILINEAR)


def crop_on_cpu(arrays, index, crop, flip, size):
    """Crop, resize and flip by Pillow: the bytes of torchvision's `resized_crop` + `hflip`.   -> (B, size, size, 3)
    uint8

    arrays   list of (H, W, 3) uint8
    """
    out = np.empty((len(index), size, size, 3), np.uint8)
    for k, (i, (top, left, h, w), mirrored) in enumerate(zip(index.tolist(), crop.tolist(), flip.tolist())):
        piece = resize_exact(Image.fromarray(arrays[i][top : top + h, left : left + w]), size)
        out[k] = np.asarray(piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else piece)
    return torch.from_numpy(out)


CACHED = 2**17  # elements that stay in a core's cache over a few operations
PRECISION_BITS = 22  # Pillow: 32 bits, less 8 of the pixel, less 2 of head-room


def _triangle_taps(start, length, bound, size, taps):
    """Pillow's fixed-point bilinear weights along one axis (its precompute_coeffs and normalize_coeffs_8bpc).

    start, length   (B,) int64, the crop's first pixel and extent; bound: extent of the whole image, for clamping only
    taps            K, at least the most pixels that a weight function covers
    Returns (positions (B, size, K) int64 pixels of the image, weights (B, size, K) int32 that sum to about 2^22).
    """
    n = length.to(torch.float64)[:, None]  # (B, 1)
    scale = n / torch.full((), float(size), dtype=torch.float64, device=n.device)  # by a number, CUDA: * (1 / size)
    support = scale.clamp(min=1)
    centre = (torch.arange(size, dtype=torch.float64, device=n.device) + 0.5) * scale  # (B, size)
    low = torch.trunc(centre - support + 0.5).clamp(min=0)
    high = torch.minimum(torch.trunc(centre + support + 0.5), n)
    inverse = 1.0 / support
    positions, weights, total = [], [], torch.zeros_like(centre)
    for k in range(taps):
        distance = (low + k - centre + 0.5).mul(inverse).abs()
        weight = torch.where((distance < 1) & (low + k < high), 1 - distance, 0)
        total = total + weight  # in order, as Pillow sums
        weights.append(weight)
        positions.append((low + k).to(torch.int64))
    fixed = [(w / total * (1 << PRECISION_BITS) + 0.5).to(torch.int32) for w in weights]
    positions = torch.stack(positions, 2) + start[:, None, None]
    return positions.clamp(max=bound - 1), torch.stack(fixed, 2)


def sent(tensor, device):
    """`tensor` on `device`, without waiting for what the device has yet to do, as a copy from unpinned memory would.

    The loader pins what it hands out; an indexed part of it is new memory.
    """
    tensor = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return tensor.to(device, non_blocking=True)


def resized_crop_batch(images, boxes, flips, size, rows=128):
    """Crop, resize and flip a whole batch on any device, with the bytes of `crop_on_cpu`.   -> (B, size, size, 3)
    uint8

    images   (B, H, W, 3) uint8; boxes (B, 4) int64 top, left, height, width; flips (B,) bool, both best on the CPU,
             since the largest box is looked at
    Two separable passes of integer weights, rounded to bytes in between, as Pillow; 32-bit sums suffice (255 * 2^22 <
    2^31).
    """
    taps = [math.ceil(2 * max(1.0, int(boxes[:, k].max()) / size)) for k in (2, 3)]
    boxes, flips = (sent(t, images.device) for t in (boxes, flips))
    parts = [
        _resized_crop(images[i : i + rows], boxes[i : i + rows], flips[i : i + rows], size, *taps)
        for i in range(0, len(images), rows)
    ]
    return torch.cat(parts)


def _resized_crop(images, boxes, flips, size, taps_y, taps_x):
    top, left, height, width = boxes.unbind(1)
    b = torch.arange(len(images), device=images.device)
    x, wx = _triangle_taps(left, width, images.shape[2], size, taps_x)  # (B, S, K)
    x, wx = torch.where(flips[:, None, None], x.flip(1), x), torch.where(flips[:, None, None], wx.flip(1), wx)
    y, wy = _triangle_taps(top, height, images.shape[1], size, taps_y)
    half = _weighted_sum(lambda k: images[b[:, None], :, x[:, :, k]], wx[:, :, None, :])  # (B, S, H, 3), x before y
    full = _weighted_sum(lambda k: half[b[:, None], :, y[:, :, k]], wy[:, :, None, :])  # (B, S, S, 3): y, x
    return full


def _weighted_sum(gather, weights):
    total = 1 << (PRECISION_BITS - 1)
    for k in range(weights.shape[-1]):
        total = total + gather(k).to(torch.int32) * weights[..., k : k + 1]
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)


def normalise(pixels, mean, std, out=None, cutmix=None):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float32, as torchvision's ToTensor and Normalize (same bits).

    out      float32 memory of at least that size to write to; fresh memory costs a CPU more than the arithmetic
    cutmix   (partner, box) of `mix`, done on the way
    """
    b, h, w, _ = pixels.shape
    x = torch.empty((b, 3, h, w), device=pixels.device) if out is None else out[:b]
    mean, std = _per_channel(tuple(mean), x.device), _per_channel(tuple(std), x.device)
    cpu = x.device.type == "cpu"
    rows = max(1, CACHED // (3 * h * w)) if cpu else max(b, 1)
    full = 255 if cpu else _per_channel((255.0,), x.device)  # a GPU divides by a number as times its reciprocal
    for first in range(0, b, rows):
        y = x[first : first + rows].copy_(pixels[first : first + rows].permute(0, 3, 1, 2))
        if cutmix is not None:
            partner, (top, left, bottom, right) = cutmix
            other = pixels[partner[first : first + rows], top:bottom, left:right]
            y[:, :, top:bottom, left:right] = other.permute(0, 3, 1, 2)
        y.div_(full).sub_(mean).div_(std)
    return x


@lru_cache(maxsize=32)
def _per_channel(values, device):
    """(1, n, 1, 1) on the device, made once: making it anew would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def mix(x, batch, mix_type, rows=None, held=None):
    """Mix each image with its partner: (B, 3, S, S) normalised (CutMix: or bytes) -> rows of the mixed batch.

    rows   which rows of the batch are wanted (None: all); held: which rows `x` holds, sorted (None: all)
    """
    partner, own = batch.partner, x
    if rows is not None:
        partner = torch.searchsorted(held, partner[rows])
        own = x[sent(torch.searchsorted(held, rows), x.device)]
    partner = sent(partner, x.device)
    if mix_type == "mixup":
        return own.mul(batch.lam).add_(x[partner], alpha=1 - batch.lam)
    if mix_type == "cutmix":
        top, left, bottom, right = batch.box.tolist()
        own = own.clone() if rows is None else own
        own[:, :, top:bottom, left:right] = x[:, :, top:bottom, left:right][partner]
    return own


def rows_needed(batch, rows):
    """The rows whose pixels are needed to mix `rows`: themselves and their partners, sorted."""
    return torch.unique(torch.cat([rows, batch.partner[rows]]))


# ---- label files


class LabelError(ValueError):
    """A label file that is not what its manifest or the images promise; the text names the file and both values."""


def label_file(epoch):
    return f"epoch_{epoch:04d}.safetensors"


def write_epoch(folder, epoch, batches, logits, settings_sha256=None):
    """All draws of an epoch, batch by batch, and its logits, as one safetensors file that is whole or absent.

    logits            (N, classes), rows in the order of the batches
    settings_sha256   digest of the run that makes it; None: of no run
    """
    import safetensors.torch

    lengths = torch.tensor([len(batch.index) for batch in batches])
    tensors = {
        "epoch": torch.tensor([epoch]),
        "start": torch.cat(
            [torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]
        ),  # batch b is rows start[b]:start[b + 1]
        "index": torch.cat([batch.index for batch in batches]).to(torch.int32),
        "crop": torch.cat([batch.crop for batch in batches]).to(torch.int32),
        "flip": torch.cat([batch.flip for batch in batches]),
        "partner": torch.cat([batch.partner for batch in batches]).to(torch.int32),
        "box": torch.stack([batch.box for batch in batches]).to(torch.int32),
        "lam": torch.tensor([batch.lam for batch in batches], dtype=torch.float64),
        "logits": logits.contiguous(),
    }
    if settings_sha256:  # a tensor: safetensors writes two metadata in any order, so not always the same bytes
        tensors["settings_sha256"] = torch.tensor(list(bytes.fromhex(settings_sha256)), dtype=torch.uint8)
    write_bytes(Path(folder) / label_file(epoch), safetensors.torch.save(tensors, {"epoch": str(epoch)}))


def check_epoch(path, settings_sha256):
    """Refuse a file that is no label file of its epoch, or one made with other settings."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            epoch, found = int(file.get_tensor("epoch")[0]), bytes(file.get_tensor("settings_sha256").tolist()).hex()
    except Exception as error:  # safetensors has its own errors for damaged headers and missing names
        refuse(f"{path}: is no label file of this run ({str(error)[:200]}); remove it to have it made again")
    check_unit(path, found, settings_sha256)
    if Path(path).name != label_file(epoch):
        refuse(f"{path}: holds epoch {epoch}; remove it to have it made again")


def label_bytes(count, classes, batches, half):
    """Bytes of one epoch's file."""
    return count * (4 + 16 + 1 + 4 + classes * (2 if half else 4)) + batches * 32 + 1500


class EpochLabels:
    """One epoch's label file, mapped: draws in memory, logits read batch by batch.

    sizes     (N, 2) int64 heights and widths of the images; classes: columns of the logits; digest: sha256 or None
    checked   somebody else answers for the file: hashing and checking take several times longer than reading
    Raises LabelError for whatever does not fit.
    """

    def __init__(self, folder, epoch, sizes, classes, batch_size, input_size, digest, checked=False):
        import safetensors

        self.path = Path(folder) / label_file(epoch)
        if digest is not None and not checked and sha256(self.path) != digest:
            raise LabelError(f"{self.path}: not what its manifest says: changed since it was made")
        try:
            self.file = safetensors.safe_open(self.path, framework="pt")
            self.draws = {name: self.file.get_tensor(name) for name in self.file.keys() if name != "logits"}
            self.logits = self.file.get_slice("logits")
        except Exception as error:  # safetensors has its own errors for damaged headers and missing names
            raise LabelError(f"{self.path}: cannot be read as labels: {str(error)[:200]}") from None
        self.start = cuts(len(sizes), batch_size)
        if not checked:
            self._check(epoch, sizes, classes, input_size)
        self.index, self.crop = self.draws["index"].long(), self.draws["crop"].long()

    def _check(self, epoch, sizes, classes, input_size):
        draws, start, count = self.draws, self.start, len(sizes)
        shape, stated = list(self.logits.get_shape()), (self.file.metadata() or {}).get("epoch")
        names = {"epoch", "start", "index", "crop", "flip", "partner", "box", "lam"}
        if not names <= set(draws) <= names | {"settings_sha256"}:
            raise LabelError(f"{self.path}: holds {sorted(draws)}, expected {sorted(names)}")
        found = {int(draws["epoch"][0]), int(stated) if str(stated).isdigit() else stated}
        if found != {epoch}:
            raise LabelError(f"{self.path}: holds epoch {', '.join(map(str, found - {epoch}))}, expected {epoch}")
        if shape != [count, classes]:
            raise LabelError(f"{self.path}: logits of shape {shape}, expected {[count, classes]}")
        index = draws["index"].long()
        if index.shape != (count,) or not torch.equal(index.sort().values, torch.arange(count)):
            raise LabelError(f"{self.path}: its image indices are not the {count} images, each once")
        if draws["start"].tolist() != start:
            raise LabelError(f"{self.path}: its batches begin at {draws['start'].tolist()[:4]}, expected {start[:4]}")
        crop = draws["crop"].long()
        bound = sizes[index]
        if (
            crop.shape != (count, 4)
            or crop.min() < 0
            or crop[:, 2:].min() < 1
            or (crop[:, :2] + crop[:, 2:] > bound).any()
        ):
            raise LabelError(f"{self.path}: holds crops outside the images")
        lengths = torch.tensor(start).diff().repeat_interleave(torch.tensor(start).diff())
        if draws["partner"].shape != (count,) or draws["partner"].min() < 0 or (draws["partner"] >= lengths).any():
            raise LabelError(f"{self.path}: holds mix partners outside their batch")
        if draws["box"].shape != (len(start) - 1, 4) or draws["box"].min() < 0 or draws["box"].max() > input_size:
            raise LabelError(f"{self.path}: holds CutMix boxes outside {input_size} px")
        if draws["lam"].shape != (len(start) - 1,) or not ((0 <= draws["lam"]) & (draws["lam"] <= 1)).all():
            raise LabelError(f"{self.path}: holds lambdas outside 0 to 1")
        if draws["flip"].shape != (count,) or draws["flip"].dtype != torch.bool:
            raise LabelError(f"{self.path}: holds no flips")
        for number, (first, end) in enumerate(zip(start, start[1:])):
            # NaN comes through both; by halves 30 times faster than isfinite().all()
            if not all(extreme.isfinite() for extreme in self.logits[first:end].aminmax()):
                raise LabelError(f"{self.path}: batch {number} holds logits that are not finite")

    def batch(self, number):
        """(Batch, logits (B, classes)) of batch `number`."""
        rows = slice(self.start[number], self.start[number + 1])
        draws = self.draws
        batch = Batch(
            self.index[rows],
            self.crop[rows],
            draws["flip"][rows],
            draws["partner"][rows].long(),
            draws["box"][number].long(),
            float(draws["lam"][number]),
        )
        return batch, self.logits[rows]


# ---- feeding


KEPT_BYTES = 2**28  # of replayed batches
RESIDENT_SHARE = 0.5  # of the free GPU memory that images may take; networks and batches need the rest


def fits_gpu(what, needed, device, otherwise):
    """Whether `needed` bytes may be kept on a CUDA device; a warning with both sizes if not."""
    # what PyTorch keeps for itself but does not use, after an earlier stage in this process, is free for us
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = RESIDENT_SHARE * (torch.cuda.mem_get_info(device)[0] + kept)
    if needed > room:
        warn(
            f"{what} need {needed / 2**20:.1f} MiB of GPU memory, {room / 2**20:.1f} MiB may be used for them "
            f"({RESIDENT_SHARE:.0%} of what is free): {otherwise}"
        )
    return needed <= room


class Item(NamedTuple):
    """One batch on its way to the device.

    rows     the rows of the batch that this process wants mixed, held: those it has pixels of; None: all
    pixels   (n, S, S, 3) uint8; None if the device crops them itself
    logits   (B, classes) if they come from labels, else None
    """

    epoch: int
    number: int
    batch: Batch
    rows: torch.Tensor | None
    held: torch.Tensor | None
    pixels: torch.Tensor | None
    logits: torch.Tensor | None


class Feed(torch.utils.data.Dataset):
    """Item (epoch, number) -> that whole batch, replayed from stored labels or drawn from the seed.

    One `__getitem__` is one batch, so stock PyTorch loads it (`batch_size=None`) and worker processes live for all
    epochs. On a CUDA device that has room for the images they are kept there and cropped there, with the same bytes;
    else Pillow crops them on the CPU, and a warning says so.

    arrays    list of (H, W, 3) uint8; emptied when they have gone to the device
    labels    (folder, {file: sha256}) of stored labels, or None
    rows_of   count -> the rows of a batch of `count` that this process trains on; None: all
    """

    def __init__(self, arrays, images, protocol, device, labels=None, rows_of=None):
        self.arrays, self.protocol, self.device = arrays, protocol, torch.device(device)
        self.labels, self.rows_of, self.classes = labels, rows_of, len(images.folders)
        self.sizes = torch.tensor([array.shape[:2] for array in arrays])
        self.facts = DATASETS[images.dataset]
        self.order = (None, None)  # of the last epoch asked for
        self.out = None  # memory of `mixed`
        self.kept = {}  # replayed batches of a small set, for the next seed
        self.background = None  # where the next epoch's labels are hashed
        self.forget_labels()
        self.resident = self._on_device()

    def _on_device(self):
        if self.device.type != "cuda":
            return None
        shapes = self.sizes.unique(dim=0).tolist()
        if len(shapes) > 1:
            warn(
                f"images of {len(shapes)} sizes, such as {shapes[0]} and {shapes[-1]}: cropped on the CPU, not the GPU"
            )
            return None
        if not fits_gpu("the images", sum(array.nbytes for array in self.arrays), self.device, "cropped on the CPU"):
            return None
        resident = torch.empty((len(self.arrays), *self.arrays[0].shape), dtype=torch.uint8, device=self.device)
        for i in range(0, len(self.arrays), 1024):
            resident[i : i + 1024] = torch.from_numpy(np.stack(self.arrays[i : i + 1024])).to(self.device)
        self.arrays.clear()  # no second copy in host memory
        return resident

    def _drawn(self, epoch, number):
        p = self.protocol
        if self.order[0] != epoch:
            self.order = epoch, epoch_batches(p["fkd_seed"], epoch, len(self.sizes), p["batch_size"])
        index = self.order[1][number]
        return draw_batch(p["fkd_seed"], epoch, number, index, self.sizes[index], p["input_size"], p)

    def forget_labels(self):
        """Open, hash and check every label file anew when it is asked for next."""
        self.open = (None, None)  # the last epoch asked for, and its labels
        self.checked, self.ahead, self.following = set(), {}, {}  # epochs; their futures; {epoch: the next one}

    def labels_of(self, epoch, checked=False):
        """The epoch's EpochLabels, hashed and checked here unless that was done or is said to be done elsewhere.

        The file of the epoch after it is then opened, hashed and checked beside the training of this one: hashing does
        not hold the interpreter's lock, so with a core to spare nobody waits for it.
        """
        if self.open[0] != epoch:
            checked = checked or epoch in self.checked
            future = self.ahead.pop(epoch, None)
            self.open = epoch, future.result() if future else self._open_labels(epoch, checked)
            if not checked:
                self.checked.add(epoch)
            after = self.following.get(epoch)
            if self.background and after is not None and after not in self.checked and after not in self.ahead:
                self.ahead[after] = self.background.submit(self._open_labels, after)
        return self.open[1]

    def _open_labels(self, epoch, checked=False):
        folder, digests = self.labels
        p, digest = self.protocol, digests.get(label_file(epoch))
        return EpochLabels(folder, epoch, self.sizes, self.classes, p["batch_size"], p["input_size"], digest, checked)

    def _stored(self, epoch, number):
        # who reads batch 0 answers for the file: the loader keeps the order, so its error is met before all else
        return self.labels_of(epoch, checked=number > 0).batch(number)

    def __getitem__(self, key):
        if key in self.kept:
            return self.kept[key]
        epoch, number = key
        try:
            batch, logits = self._stored(*key) if self.labels else (self._drawn(*key), None)
        except LabelError as error:
            return error  # raised in a worker process it would come with a traceback
        rows = self.rows_of(len(batch.index)) if self.rows_of else None
        held = rows_needed(batch, rows) if rows is not None else None
        pixels = None
        if self.resident is None:
            which = slice(None) if held is None else held
            pixels = crop_on_cpu(
                self.arrays, batch.index[which], batch.crop[which], batch.flip[which], self.protocol["input_size"]
            )
        return Item(epoch, number, batch, rows, held, pixels, logits)

    def loader(self, keys, num_workers=0):
        """Iterator of Items for a list of (epoch, number), over all epochs: no process is started for an epoch."""
        workers = 0 if self.resident is not None else min(num_workers, len(keys))
        volume = len(set(keys)) * self.protocol["batch_size"] * self.protocol["input_size"] ** 2 * 3
        keep = not workers and len(set(keys)) < len(keys) and volume < KEPT_BYTES
        if self.labels and not workers:  # a worker process hashes beside the training as it is
            epochs = list(dict.fromkeys(epoch for epoch, _ in keys))
            self.following, self.background = dict(zip(epochs, epochs[1:])), ThreadPoolExecutor(1)
        else:
            self.following, self.ahead = {}, {}  # no thread outlives a fork
        # forked, not spawned: the images are shared, not copied, and torch is not imported again
        context = "fork" if workers and "fork" in torch.multiprocessing.get_all_start_methods() else None
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            multiprocessing_context=context,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or it would draw a seed, which nobody uses, from the global one
        )
        try:
            for item in loader:
                if isinstance(item, LabelError):
                    refuse(item)
                if keep:
                    self.kept[item.epoch, item.number] = item
                yield item
        finally:
            if self.background:
                self.background.shutdown()
                self.background = None

    def _pixels(self, item):
        """The held rows of an item, cropped, on the device: (n, S, S, 3) uint8."""
        if item.pixels is not None:
            return sent(item.pixels, self.device)
        batch, which = item.batch, slice(None) if item.held is None else item.held
        index = sent(batch.index[which], self.device)
        return resized_crop_batch(
            self.resident[index], batch.crop[which], batch.flip[which], self.protocol["input_size"]
        )

    def unmixed(self, item):
        """The held rows of an item, cropped and normalised, on the device: (n, 3, S, S) float32."""
        return normalise(self._pixels(item), self.facts.mean, self.facts.std)

    def mixed(self, item):
        """The wanted rows of an item, cropped, normalised and mixed, on the device: (n, 3, S, S) float32.

        Without mixup, on a CPU, the same memory at the next call.
        """
        mix_type = self.protocol["mix_type"]
        if mix_type == "mixup":
            return mix(self.unmixed(item), item.batch, mix_type, item.rows, item.held)
        pixels, cutmix = self._pixels(item), None
        if mix_type == "cutmix" and item.rows is None:  # mixed as bytes: the same bits, a quarter moved
            cutmix = sent(item.batch.partner, pixels.device), item.batch.box.tolist()
        else:
            pixels = mix(pixels.permute(0, 3, 1, 2), item.batch, mix_type, item.rows, item.held).permute(0, 2, 3, 1)
        if self.device.type == "cpu" and (self.out is None or len(self.out) < len(pixels)):
            self.out = torch.empty((len(pixels), 3, *pixels.shape[1:3]))
        return normalise(pixels, self.facts.mean, self.facts.std, self.out, cutmix)


# ---- teachers

TEACHER_ROWS = 256  # images a forward pass of the teacher: fixed, since a network's last bits depend on its batch


@torch.no_grad()
def teacher_logits(teachers, x, amp="none", half=True):
    """Mean logits of the teachers (EDC: several), in fp16 as they are stored: (B, 3, S, S) -> (B, classes)."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    parts = []
    for part in x.split(TEACHER_ROWS):
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = [teacher(part).float() for teacher in teachers]
        parts.append(outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(0))
    logits = torch.cat(parts)
    return logits.half() if half else logits
