"""One training batch: drawn from a seed, and replayed with the same pixels (paper, 3.3; FKD).

    batch = draw_batch(protocol, epoch, nth, index, sizes)                          # every draw
    pixels = crops.crop_on_cpu(arrays, batch.index, batch.crop, batch.flip, size)   # (B, S, S, 3)
    x = mix(normalise(pixels, mean, std), batch, mix_type)                          # (B, 3, S, S)

Stage 3 stores the draws beside the teacher's logits and stage 4 replays them: nothing is derived
again from a sampler's seed. matching/feed.py mixes CutMix's bytes within `normalise` instead of
calling `mix`: the same bits, and less memory moved.
"""

import math
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch

from scripts.runtime import BATCH, ORDER, Parser, generator, number, refuse


def add_batch_flags(parser, stored=False):
    """What a training batch is; the defaults are the release's for ImageNet.

    stored   labels are read and say what was not given: every default is None
    """

    def setting(flag, default, help, *aliases, **options):
        usual = "the images' size" if default is None else default
        usual, default = (f"as the labels, else {usual}", None) if stored else (usual, default)
        parser.setting(*aliases, flag, default=default, help=f"{help} [{usual}]", **options)

    known = " (stored labels fix them: a flag that differs is refused)" if stored else ""
    parser.heading(f"batches{known}")
    count, share = number(int, 1), number(float, above=0, most=1)
    alpha = {"type": number(float, above=0), "short": "alpha"}
    kinds = ("mixup", "cutmix", "none")
    setting("--epochs", 300, "epochs", type=number(int, 1, 10**6), short="epochs")
    setting("--batch_size", 1024, "images, over all processes", "-b", type=count, short="b")
    # differs from the release: one size for both stages (its stage 4 always crops to 224)
    setting("--input_size", None, "pixels of the networks' input", type=count, short="size")
    # `labels_name` writes both scales in one: crops-0.08-1
    setting("--min_scale_crops", 0.08, "least share of the area", type=share, short="crops")
    setting("--max_scale_crops", 1.0, "largest share of the area", type=share)
    setting("--flip", 0.5, "probability; 0 for digits", type=number(float, 0, 1), short="flip")
    # the release's launcher asks for cutmix
    setting("--mix_type", "none", "how two images are mixed", choices=kinds, short="mix")
    setting("--mixup", 0.8, "alpha of mixup's Beta(alpha, alpha)", **alpha)
    setting("--cutmix", 1.0, "alpha of CutMix's Beta(alpha, alpha)", **alpha)
    setting("--fkd_seed", 42, "seed of every draw", type=number(int, 0), short="seed")
    order = "of an epoch's images: our own; or what the release's reader of labels draws again"
    setting("--order", "own", order, choices=("own", "release"), short="order")


_parser = Parser("", "")
add_batch_flags(_parser)
PROTOCOL = dict(_parser.parse_args([]).settings)  # the flags' defaults: {"epochs": 300, ...}


def check_scales(least, largest):
    if least > largest:
        refuse(f"--min_scale_crops {least}: above --max_scale_crops {largest}")


# ---- draws

RATIO = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop
CROP_TRIES = 10


class Batch(NamedTuple):
    """Every draw of one training batch of B images."""

    index: torch.Tensor  # (B,) int64: which images
    crop: torch.Tensor  # (B, 4) int64: top, left, height, width, in pixels of the saved image
    flip: torch.Tensor  # (B,) bool: mirrored after the crop
    partner: torch.Tensor  # (B,) int64: row of the image mixed in; its own without mixing
    box: torch.Tensor  # (4,) int64: top, left, bottom, right of CutMix in the input; else zeros
    lam: float  # share of the image itself; for CutMix what the box leaves of it


def cuts(count, size):
    """[0, size, 2 size, ..., count]: where `count` rows are cut into batches.

    A last piece of one row joins the piece before: BatchNorm cannot train on a single image.
    """
    ends = [*range(size, count, size), count]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        ends.pop(-2)
    return [0, *ends]


def batches_of(count, batch_size):
    """Number of batches in an epoch."""
    return len(cuts(count, batch_size)) - 1


def release_orders(count, seed):
    """The image indices of one epoch after the other, endlessly: (count,) int64.

    As the release's RandomSampler draws them. Ours are drawn from (seed, epoch) alone.
    """
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=g)
        torch.randperm(count, generator=g)  # it draws a second, and takes none of it


@lru_cache(maxsize=2)
def epoch_batches(seed, epoch, count, batch_size, order="own"):
    """Image indices of each batch of an epoch: a permutation, cut; the last batch is shorter."""
    if order == "release":
        index = next(islice(release_orders(count, seed), epoch, None))
    else:
        index = torch.randperm(count, generator=generator(seed, ORDER, epoch))
    return index.tensor_split(cuts(count, batch_size)[1:-1])


def draw_batch(protocol, epoch, nth, index, sizes):
    """The draws of an epoch's nth batch, from (fkd_seed, epoch, nth) alone.

    index   (B,) int64;   sizes (B, 2) int64: height and width of those images
    """
    g = generator(protocol["fkd_seed"], BATCH, epoch, nth)
    count, mix_type = len(index), protocol["mix_type"]
    crop = draw_crops(sizes, (protocol["min_scale_crops"], protocol["max_scale_crops"]), g)
    flip = torch.rand(count, generator=g, dtype=torch.float64) < protocol["flip"]
    partner, box, lam = torch.arange(count), torch.zeros(4, dtype=torch.int64), 1.0
    if mix_type != "none":
        partner = torch.randperm(count, generator=g)
        alpha, lam = protocol[mix_type], torch.rand((), generator=g, dtype=torch.float64).item()
        if alpha != 1:  # Beta(alpha, alpha)
            from scipy.special import betaincinv  # takes 0.3 s

            lam = float(betaincinv(alpha, alpha, lam))
    if mix_type == "cutmix":  # a box of area 1 - lam, clipped at the borders
        size, centre = protocol["input_size"], torch.rand(2, generator=g, dtype=torch.float64)
        half = int(size * math.sqrt(1 - lam)) // 2
        top, left = (max(int(share * size) - half, 0) for share in centre.tolist())
        bottom, right = (min(int(share * size) + half, size) for share in centre.tolist())
        box = torch.tensor([top, left, bottom, right])
        # differs from the release: it stores the lambda that was drawn, not that of the clipped box
        lam = 1 - (bottom - top) * (right - left) / size**2
    return Batch(index, crop, flip, partner, box, lam)


def draw_crops(sizes, scale, g):
    """RandomResizedCrop's boxes, as torchvision draws them.   (B, 2) height, width -> (B, 4)

    Up to ten tries of an area in `scale` and a log-uniform ratio in 3/4 .. 4/3; then the largest
    central crop in that range. A box is top, left, height, width.
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


# ---- normalised and mixed

CACHED = 2**17  # elements that stay in a core's cache over a few operations


def sent(tensor, device):
    """`tensor` on `device`, without waiting for what the device still computes.

    Pinned first: what is indexed from a pinned tensor is not, and its copy would wait.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalise(pixels, mean, std, cutmix=None, out=None):
    """(B, S, S, 3) uint8 -> (n, 3, S, S) float32, the bits of torchvision's ToTensor and Normalize.

    cutmix   (partners (n,), box): the first n images, CutMix'ed with those at `partners`; of bytes,
             which gives the bits of `mix` and moves less; None: all images as they are
    out      float32 memory for at least n images; on a CPU, fresh memory costs more than the sums
    """
    count, (h, w) = len(cutmix[0] if cutmix else pixels), pixels.shape[1:3]
    x = torch.empty((count, 3, h, w), device=pixels.device) if out is None else out[:count]
    mean, std = (per_channel(tuple(values), x.device) for values in (mean, std))
    # by a tensor: CUDA divides by a number as times its reciprocal
    on_cpu, full = x.device.type == "cpu", per_channel((255.0,), x.device)
    step = max(1, CACHED // (3 * h * w) if on_cpu else count)
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        y = x[part].copy_(pixels[part].permute(0, 3, 1, 2))
        if cutmix:
            partner, (top, left, bottom, right) = cutmix
            other = pixels[partner[part], top:bottom, left:right]
            y[:, :, top:bottom, left:right] = other.permute(0, 3, 1, 2)
        y.div_(full).sub_(mean).div_(std)
    return x


@lru_cache(maxsize=32)
def per_channel(values, device):
    """(1, n, 1, 1) float32 on the device, made once: making it anew would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def mix(x, batch, mix_type, partners=None):
    """The first n images, each mixed with its partner: (B, 3, S, S) normalised -> (n, 3, S, S)

    partners   (n,) where in `x` the partners are; None: `x` is the whole batch
    """
    partners = sent(batch.partner, x.device) if partners is None else partners
    own = x[: len(partners)]
    if mix_type == "mixup":
        return own.mul(batch.lam).add_(x[partners], alpha=1 - batch.lam)
    if mix_type == "cutmix":
        (top, left, bottom, right), own = batch.box.tolist(), own.clone()
        own[:, :, top:bottom, left:right] = x[partners, :, top:bottom, left:right]
    return own
