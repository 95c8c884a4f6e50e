"""A batch: drawn from its key alone, cropped to Pillow's and torchvision's bytes, mixed."""

import numpy as np
import pytest
import torch
from PIL import Image

from distillation import datasets
from matching import batches, crops
from scripts.runtime import generator


def photos(count, size):
    shape = (count, size, size, 3)
    return np.random.default_rng(size).integers(0, 256, shape, dtype=np.uint8)


def draw(nth, count=2, epoch=0, **changes):
    protocol = {**batches.PROTOCOL, "input_size": 32, "mix_type": "cutmix", **changes}
    sizes = torch.full((count, 2), 32)
    return batches.draw_batch(protocol, epoch, nth, torch.arange(count), sizes)


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    n, size, scale = 2000, 64, (0.08, 1.0)
    ours = batches.draw_crops(torch.full((n, 2), size), scale, generator(0)).double()
    image = Image.new("RGB", (size, size))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    statistics = (lambda c: c[:, 2] * c[:, 3] / size**2, lambda c: (c[:, 3] / c[:, 2]).log())
    for of in (*statistics, lambda c: c[:, 0]):
        a, b = of(ours).sort().values, of(torch.tensor(params).double()).sort().values
        assert (a.mean() - b.mean()).abs() < 4 * (a.var() / n + b.var() / n).sqrt()
        assert (a[:: n // 10] - b[:: n // 10]).abs().max() < 0.1 * b.std() + 1


def test_crops_of_odd_images_fall_back_to_the_centre():
    sizes = torch.tensor([[10, 100], [100, 10], [50, 50]])
    boxes = batches.draw_crops(sizes, (0.99, 1.0), generator(1)).tolist()
    assert boxes[:2] == [[0, 43, 10, 13], [43, 0, 13, 10]] and boxes[2][2] >= 48


def test_draws_depend_on_their_key_alone():
    first = draw(1, 8, 3)
    for a, b in zip(first, draw(1, 8, 3)):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for other in (draw(1, 8, 3, fkd_seed=43), draw(1, 8, 4), draw(2, 8, 3)):
        assert not torch.equal(first.crop, other.crop) and not torch.equal(first.box, other.box)


def test_an_epoch_is_a_permutation_cut_into_batches():
    orders = [torch.cat(batches.epoch_batches(42, epoch, 20, 6)) for epoch in (0, 1)]
    assert all(order.sort().values.tolist() == list(range(20)) for order in orders)
    assert not torch.equal(*orders)
    assert [len(b) for b in batches.epoch_batches(42, 0, 20, 6)] == [6, 6, 6, 2]
    # BatchNorm cannot train on one image: it joins the batch before
    assert [len(b) for b in batches.epoch_batches(42, 0, 19, 6)] == [6, 6, 7]
    assert batches.batches_of(19, 6) == 3 and batches.batches_of(1, 6) == 1


def test_flips_have_their_probability_and_lambda_is_beta_and_the_boxs_real_area():
    assert not draw(0, 50, flip=0.0).flip.any() and draw(0, 50, flip=1.0).flip.all()
    mixup, a = [draw(n, mix_type="mixup").lam for n in range(1000)], 0.8
    assert abs(np.mean(mixup) - 0.5) < 0.03
    assert abs(np.var(mixup) - 1 / (4 * (2 * a + 1))) < 0.01
    for n in range(200):
        batch = draw(n, epoch=1)
        top, left, bottom, right = batch.box.tolist()
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
        assert batch.lam == 1 - (bottom - top) * (right - left) / 1024


# ---- pixels


@pytest.mark.parametrize("size", [224, 32])
def test_replayed_bytes_are_torchvisions(size):
    from torchvision.transforms import InterpolationMode, Normalize
    from torchvision.transforms import functional as F

    arrays, index = list(photos(3, size)), torch.arange(24) % 3
    boxes = batches.draw_crops(torch.full((24, 2), size), (0.08, 1.0), generator(5))
    flips, facts = torch.arange(24) % 2 == 0, datasets.ALL["imagenet"]
    ours = crops.crop_on_cpu(arrays, index, boxes, flips, size)
    x = batches.normalise(ours, facts.mean, facts.std)
    for k in range(24):
        image, out = Image.fromarray(arrays[index[k]]), [size, size]
        theirs = F.resized_crop(image, *boxes[k].tolist(), out, InterpolationMode.BILINEAR)
        theirs = F.hflip(theirs) if flips[k] else theirs
        assert np.array_equal(ours[k].numpy(), np.asarray(theirs))
        assert torch.equal(x[k], Normalize(facts.mean, facts.std)(F.to_tensor(theirs)))


EDGES = [(1, 1), (1, 40), (40, 1), (40, 40), (2, 3), (39, 17), (5, 40)]
EDGES = [(top, left, h, w) for h, w in EDGES for top, left in ((0, 0), (40 - h, 40 - w))]
SIZES = [(224, 224, 100), (32, 32, 400), (224, 64, 100), (64, 224, 30), (33, 47, 150)]


@pytest.mark.parametrize("saved, size, count", [*SIZES, (40, 8, 0), (40, 96, 0)])
def test_the_gpus_crop_has_pillows_bytes(saved, size, count):
    """Random crops, enlarged and shrunk, and boxes of every odd shape: 0 bytes differ."""
    g, images = generator(saved, size), photos(8, saved)
    boxes = batches.draw_crops(torch.full((count, 2), saved), (0.02, 1.0), g)
    boxes = boxes if count else torch.tensor(EDGES)
    flips, index = torch.rand(len(boxes), generator=g) < 0.5, torch.arange(len(boxes)) % 8
    expected = crops.crop_on_cpu(list(images), index, boxes, flips, size)
    found = crops.resized_crop_batch(torch.from_numpy(images)[index], boxes, flips, size)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mix_type", ["mixup", "cutmix"])
def test_mix_is_the_formula(mix_type):
    pixels, statistics = torch.from_numpy(photos(6, 8)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    x, box = batches.normalise(pixels, *statistics), torch.tensor([1, 2, 5, 7])
    partner = torch.tensor([3, 0, 5, 1, 2, 4])
    batch = batches.Batch(torch.arange(6), None, None, partner, box, 0.3)
    whole = batches.mix(x, batch, mix_type)
    for i in range(6):
        other = x[partner[i]]
        expected = 0.3 * x[i] + 0.7 * other if mix_type == "mixup" else x[i].clone()
        if mix_type == "cutmix":
            expected[:, 1:5, 2:7] = other[:, 1:5, 2:7]
        torch.testing.assert_close(whole[i], expected)
    if mix_type == "cutmix":  # of bytes: the same bits
        mixed = batches.normalise(pixels, *statistics, (partner, box.tolist()))
        assert torch.equal(mixed, whole)
