"""The crops of a batch: the same bytes by Pillow on the CPU and by integer sums on any device."""

import math

import numpy as np
import torch
from PIL import Image

from matching.batches import sent

CROPPED_AT_ONCE = 128  # images: bounds the memory of the integer sums
PRECISION_BITS = 22  # Pillow: 32 bits, less 8 of the pixel, less 2 of head-room


def resize_exact(image, size):
    """PIL image -> (size, size), bilinear, horizontal pass first; Pillow 13 would choose."""
    if image.width > size or image.height > size:
        image = image.resize((size, image.height), Image.Resampling.BILINEAR)
    return image.resize((size, size), Image.Resampling.BILINEAR)


def shuffled(images, orders):
    """RDED's ShufflePatches: rows and columns of patches in a new order, on any device.

    images (B, H, W, 3);   orders (B, 2, factor) on the CPU, of the patches in height and width
    """
    (rows, columns), b = zip(orders.unbind(1), images.shape[1:3]), torch.arange(len(images))
    b, rows, columns = (sent(t, images.device) for t in (b, places(*rows), places(*columns)))
    return images[b[:, None, None], rows[:, :, None], columns[:, None]]


def places(order, length):
    """Which pixels of an axis stand where, its patches in this order.   (n, factor) -> (n, length)

    differs from RDED: the last patch takes the remainder of a division, which is cut off there
    """
    step, factor = length // order.shape[1], order.shape[1]
    patches = torch.arange(length).tensor_split([k * step for k in range(1, factor)])
    moved = [patches[k] for k in order.flatten().tolist()]
    return torch.cat([torch.arange(0), *moved]).view(len(order), length)


def crop_on_cpu(arrays, index, crop, flip, size):
    """torchvision's `resized_crop` and `hflip`: [(H, W, 3)] uint8 -> (B, size, size, 3) uint8"""
    out = np.empty((len(index), size, size, 3), np.uint8)
    draws = zip(map(int, index), crop.tolist(), flip.tolist())
    for k, (i, (top, left, h, w), mirrored) in enumerate(draws):
        piece = resize_exact(Image.fromarray(arrays[i][top : top + h, left : left + w]), size)
        out[k] = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else piece
    return torch.from_numpy(out)


def resized_crop_batch(images, boxes, flips, size):
    """The bytes of `crop_on_cpu`, on any device: (B, H, W, 3) -> (B, size, size, 3) uint8

    boxes   (B, 4) int64 and flips (B,) bool, both on the CPU
    Two separable passes of integer weights, rounded to bytes in between, as in Pillow. 32-bit sums
    suffice: 255 * 2^22 < 2^31.
    """
    taps = [math.ceil(2 * max([size, *boxes[:, k].tolist()]) / size) for k in (2, 3)]
    batch = (images, sent(boxes, images.device), sent(flips, images.device))
    parts = zip(*(t.split(CROPPED_AT_ONCE) for t in batch))
    return torch.cat([_resized_crop(*part, size, *taps) for part in parts])


def _resized_crop(images, boxes, flips, size, taps_y, taps_x):
    top, left, height, width = boxes.unbind(1)
    b = torch.arange(len(images), device=images.device)[:, None]
    x, wx = _triangle_taps(left, width, images.shape[2], size, taps_x)  # (B, S, K)
    x, wx = (torch.where(flips[:, None, None], t.flip(1), t) for t in (x, wx))
    y, wy = _triangle_taps(top, height, images.shape[1], size, taps_y)
    half = _weighted_sum(lambda k: images[b, :, x[:, :, k]], wx[:, :, None])  # (B, S, H, 3): x, y
    return _weighted_sum(lambda k: half[b, :, y[:, :, k]], wy[:, :, None])  # (B, S, S, 3): y, x


def _triangle_taps(start, length, bound, size, taps):
    """Pillow's fixed-point bilinear weights on one axis (precompute_coeffs, normalize_coeffs_8bpc).

    start, length   (B,) the crop's first pixel and extent;   bound: extent of the whole image
    taps            K, at least as many pixels as any weight function covers
    Returns positions (B, size, K) int64 and weights (B, size, K) int32 that sum to about 2^22.
    """
    n = length.to(torch.float64)[:, None]  # (B, 1)
    # by a tensor: CUDA divides by a number as times its reciprocal
    scale = n / torch.full((), float(size), dtype=torch.float64, device=n.device)
    support = scale.clamp(min=1)
    centre = (torch.arange(size, dtype=torch.float64, device=n.device) + 0.5) * scale  # (B, size)
    low = torch.trunc(centre - support + 0.5).clamp(min=0)
    high = torch.minimum(torch.trunc(centre + support + 0.5), n)
    inverse, places, weights, total = 1.0 / support, [low + k for k in range(taps)], [], 0
    for place in places:
        distance = (place - centre + 0.5).mul(inverse).abs()
        weights.append(torch.where((distance < 1) & (place < high), 1 - distance, 0))
        total = total + weights[-1]  # in order, as Pillow sums
    fixed = [(w / total * (1 << PRECISION_BITS) + 0.5).to(torch.int32) for w in weights]
    positions = torch.stack(places, 2).to(torch.int64) + start[:, None, None]
    return positions.clamp(max=bound - 1), torch.stack(fixed, 2)


def _weighted_sum(gather, weights):
    """sum over k of gather(k) * weights[..., k], rounded to bytes."""
    total = 1 << (PRECISION_BITS - 1)
    for k in range(weights.shape[-1]):
        total = total + gather(k).to(torch.int32) * weights[..., k : k + 1]
    return (total >> PRECISION_BITS).clamp_(0, 255).to(torch.uint8)
