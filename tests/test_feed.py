"""Batches on their way to the device: the same from anywhere, cropped once, read in one piece."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from matching import batches, crops, feed
from matching.feed import Feed
from matching.labels import label_file, write_epoch
from scripts import files
from scripts.runtime import generator
from tests.conftest import picture

IMAGES = SimpleNamespace(folders=("0", "1", "2"), dataset="digits")
ARRAYS = [picture(n, (32, 32)) for n in range(21)]
KEYS = [(2, 0), (2, 1), (2, 2)]


def fed(labels=None, rows_of=None, device="cpu", arrays=ARRAYS, mix_type="cutmix", factor=1):
    protocol = {**batches.PROTOCOL, "batch_size": 8, "mix_type": mix_type, "input_size": 32}
    protocol["shuffle_patches"] = factor
    return Feed(list(arrays), IMAGES, protocol, device, labels, rows_of)


def store(folder, epochs=(2,)):
    """Labels of 21 images in batches of 8, without a teacher; (folder, {file: sha256})."""
    out = SimpleNamespace(write=lambda name, data: (folder / name).write_bytes(data))
    for epoch in epochs:
        items = list(fed().loader([(epoch, number) for number in range(3)]))
        logits = torch.randn(21, 3, generator=generator(epoch)).half()
        write_epoch(out, epoch, [item.batch for item in items], logits)
    return folder, {path.name: files.sha256(path) for path in folder.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_draw_store_replay_gives_the_same_pixels(tmp_path, workers):
    one, replayed, found = fed(), fed(store(tmp_path)), []
    for a, b in zip(one.loader(KEYS), replayed.loader(KEYS, workers), strict=True):
        found.append(b.logits)
        assert torch.equal(one.mixed(a), replayed.mixed(b))
    assert torch.equal(torch.cat(found), torch.randn(21, 3, generator=generator(2)).half())


@pytest.mark.parametrize("mix_type", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("which", [[1, 3], []])
def test_rows_of_a_process_are_rows_of_the_batch(mix_type, resident, which):
    """A process crops only what its rows take, and shuffles patches as any other."""
    rows, seen = torch.tensor(which, dtype=torch.int64), []
    how = {"mix_type": mix_type, "factor": 3}
    whole, part = fed(**how), fed(rows_of=lambda count: rows, **how)
    if resident:  # as on a CUDA device with room for the images
        part.resident = torch.from_numpy(np.stack(part.arrays))

    def shifted(x, cropped, count):
        seen.append((len(x), count))
        return x + cropped.view(-1, 1, 1, 1)

    for a, b in zip(whole.loader(KEYS), part.loader(KEYS)):
        assert (b.pixels is None) == resident
        assert torch.equal(part.mixed(b), whole.mixed(a)[rows])
        assert torch.equal(part.mixed(b, shifted), whole.mixed(a, shifted)[rows])
    assert [count for _, count in seen] == [8, 8, 8, 8, 5, 5]
    assert max(taken for taken, _ in seen[::2]) <= 2 * len(which)


def test_patches_are_shuffled_image_by_image():
    """Columns, then rows of patches; the last takes the remainder, which RDED cuts off."""
    array, orders = picture(0, (34, 33)), torch.tensor([[[2, 0, 1], [1, 2, 0]], [[0, 1, 2]] * 2])
    a, b, c = np.split(array, [11, 22], axis=1)
    wide = np.concatenate([b, c, a], axis=1)
    d, e, f = np.split(wide, [11, 22], axis=0)
    expected = np.concatenate([f, d, e], axis=0)
    pair = torch.from_numpy(np.stack([array, array]))
    assert np.array_equal(crops.shuffled(pair, orders), np.stack([expected, array]))
    [item] = fed(factor=2).loader(KEYS[:1])
    assert len({tuple(order.flatten().tolist()) for order in item.patches}) > 2
    assert fed(factor=2)[2, 0, 42].pixels.equal(item.pixels)  # fkd_seed is 42
    assert not fed(factor=2)[2, 0, 43].pixels.equal(item.pixels)


def test_images_that_do_not_fit_the_gpu_are_cropped_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**15, 2**30))
    one = fed(device="cuda")  # 21 images have 63 KiB
    assert one.resident is None and len(one.arrays) == 21
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the images need 0.1 MiB of GPU memory, 0.0 MiB may")
    two_sizes = [*ARRAYS, np.zeros((40, 32, 3), np.uint8)]
    assert fed(device="cuda", arrays=two_sizes).resident is None
    assert "images of 2 sizes, such as [32, 32] and [40, 32]" in capsys.readouterr().err


@pytest.mark.parametrize("mix_type", ["mixup", "cutmix"])
@pytest.mark.parametrize("rows_of", [None, lambda count: torch.tensor([1, 3])])
def test_a_batch_is_made_without_waiting_for_the_device(mix_type, rows_of, monkeypatch):
    """On the meta device, which has no values: whatever would read one back fails here."""
    one = fed(rows_of=rows_of, mix_type=mix_type, factor=2)
    one.device = torch.device("meta")
    one.resident = torch.empty((21, 32, 32, 3), dtype=torch.uint8, device="meta")
    [item] = one.loader([(0, 1)])
    to, waits = torch.Tensor.to, []

    def noted(tensor, *args, non_blocking=False, **more):
        found = to(tensor, *args, non_blocking=non_blocking, **more)
        waits.append(found.device != tensor.device and not non_blocking)
        return found

    monkeypatch.setattr(torch.Tensor, "to", noted)
    x = one.mixed(item)
    assert waits and not any(waits)
    assert x.device.type == "meta" and x.shape == (2 if rows_of else 8, 3, 32, 32)


def test_small_sets_are_cropped_once_for_all_seeds(monkeypatch):
    calls, crop = [], crops.crop_on_cpu
    monkeypatch.setattr(crops, "crop_on_cpu", lambda *a: calls.append(1) or crop(*a))
    assert len(list(fed().loader([*KEYS, *KEYS]))) == 6 and len(calls) == 3
    monkeypatch.setattr(feed, "KEPT_BYTES", 0)  # large ones do not stay in memory
    assert len(list(fed().loader([*KEYS, *KEYS]))) == 6 and len(calls) == 3 + 6


@pytest.mark.parametrize("workers", [0, 2])
def test_every_label_file_is_hashed_once_before_its_first_batch(
    tmp_path, refused, monkeypatch, workers
):
    stored, seen, hashed, sha256 = store(tmp_path, range(3)), [], [], files.sha256
    path = tmp_path / label_file(2)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a bit of the logits
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    monkeypatch.setattr(feed, "KEPT_BYTES", 0)  # a second seed reads again

    def run(argv):
        keys = [(epoch, number) for epoch in (0, 1, 0, 1, 2) for number in range(3)]
        seen.extend(item.epoch for item in fed(stored).loader(keys, workers))

    refused(run, [], "epoch_0002", "changed since")
    assert seen == [0, 0, 0, 1, 1, 1] * 2
    assert workers or hashed == [label_file(epoch) for epoch in range(3)]
    path.unlink()  # it vanishes while a student is trained
    refused(run, [], "epoch_0002", "not a label file")


def test_a_reading_process_that_is_killed_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(crops, "crop_on_cpu", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    loading = lambda argv: list(fed().loader(KEYS, num_workers=1))  # noqa: E731
    refused(loading, [], "a reading process died, probably out of memory; --num_workers 0")
