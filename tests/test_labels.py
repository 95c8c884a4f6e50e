"""Stored labels: named by their settings, and refused where they do not fit the images."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from matching import batches, generate_soft_label
from matching import labels as module
from matching.images import open_images
from matching.labels import EpochLabels, LabelError, label_file, open_labels
from scripts import files
from tests.conftest import copy, reseal

NAMED = {
    "--arch resnet18 timm:some/net.a1 --mix_type mixup --mixup 0.5": (
        "resnet18-timm-some-net.a1_mix-mixup_alpha0.5"
    ),
    "--mixup 0.5 --no_use_fp16 --amp bf16": "resnet18_no-fp16_amp-bf16",  # nothing is mixed
    "--epochs 75 -b 25 --min_scale_crops 0.5 --flip 0 --mix_type cutmix --fkd_seed 1234567": (
        "resnet18_epochs75_b25_crops-0.5-1_flip0_mix-cutmix_seed1234567"
    ),
}


@pytest.mark.parametrize("flags", NAMED)
def test_folders_are_named_by_what_is_not_the_default(flags):
    args = generate_soft_label.get_args(["--data", "x", *flags.split()])
    assert module.labels_name("set", args.arch, args.settings) == f"set_{NAMED[flags]}"


# ---- one file

SPOILT = {  # tensor, change, what the error says
    "epoch": ("epoch", lambda t: t + 1, "another epoch than 2"),
    "an image twice": ("index", lambda t: torch.where(t == 5, 6, t).int(), "each image once"),
    "crop outside": ("crop", lambda t: t + torch.tensor([20, 0, 0, 0]).int(), "crops outside"),
    "empty crop": ("crop", lambda t: t * torch.tensor([1, 1, 0, 1]).int(), "crops outside"),
    "partner outside": ("partner", lambda t: t + 8, "partners"),
    "box outside": ("box", lambda t: t + 32, "boxes outside"),
    "lambda": ("lam", lambda t: t + 2, "lambdas"),
    "lambda of nothing": ("lam", lambda t: t * torch.nan, "lambdas"),
    "other batches": ("start", lambda t: torch.tensor([0, 10, 20, 21]), "batches not at [0, 8"),
    "fewer classes": ("logits", lambda t: t[:, :2].contiguous(), "[21, 2]"),
    "NaN": ("logits", lambda t: torch.where(t == t[9, 1], torch.nan, t), "not finite"),
    "flips": ("flip", lambda t: t.int(), "holds flip of (torch.int32"),
    "no lambda": ("lam", lambda t: None, "holds lam of None"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Epoch 2 of 21 images in batches of 8, without a teacher: its tensors."""
    folder, sizes = tmp_path_factory.mktemp("stored"), torch.full((21, 2), 32)
    protocol = {**batches.PROTOCOL, "mix_type": "cutmix", "input_size": 32}
    parts = enumerate(batches.epoch_batches(42, 2, 21, 8))
    drawn = [batches.draw_batch(protocol, 2, nth, index, sizes[index]) for nth, index in parts]
    out = SimpleNamespace(write=lambda name, data: (folder / name).write_bytes(data))
    module.write_epoch(out, 2, drawn, torch.randn(21, 3).half())
    return load_file(folder / label_file(2))


def check(folder, digest=None, temperature=None):
    EpochLabels(folder, 2, 21, 8).check(torch.full((21, 2), 32), 3, 32, digest, temperature)


@pytest.mark.parametrize("what", SPOILT)
def test_a_file_that_does_not_fit_is_refused(stored, tmp_path, what):
    name, change, words = SPOILT[what]
    tensors = {**stored, name: change(stored[name])}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (tmp_path / label_file(2)).write_bytes(save(tensors))
    with pytest.raises(LabelError) as error:
        check(tmp_path)
    assert words in str(error.value) and "epoch_0002" in str(error.value)


# ---- the largest logits only


SPOILT_TOP = {
    "a class twice": ("top", lambda t: t[:, :1].repeat(1, 2), "not 2 of 3 classes"),
    "a class outside": ("top", lambda t: t + 1, "not 2 of 3 classes"),
    "a class before the first": ("top", lambda t: t - 1, "not 2 of 3 classes"),
    "another width": ("top", lambda t: t[:, :1].contiguous(), "holds top of ('I16', [21, 1])"),
    "classes as floats": ("top", lambda t: t.half(), "holds top of ('F16'"),
    "all classes": ("logits", lambda t: torch.cat([t, t[:, :1]], 1), "[21, 3]"),
    "NaN in the rest": ("rest", lambda t: t * torch.nan, "rests that are not finite"),
    "no rest": ("rest", lambda t: None, "holds rest of None"),
    "another temperature": ("temperature", lambda t: t + 1, "temperature than 0.1"),
}


def write_top(folder, stored, top_k=2, temperature=0.1):
    """The labels of `stored`, written with --label_top_k; the file's path."""
    stored_at = folder / "whole"
    stored_at.mkdir()
    (stored_at / label_file(2)).write_bytes(save(stored))
    opened = EpochLabels(stored_at, 2, 21, 8)
    drawn = [opened.batch(n)[0] for n in range(3)]
    out = SimpleNamespace(write=lambda name, data: (folder / name).write_bytes(data))
    module.write_epoch(out, 2, drawn, stored["logits"], top_k, temperature)
    return folder / label_file(2)


@pytest.mark.parametrize("what", SPOILT_TOP)
def test_top_logits_that_do_not_fit_are_refused(stored, tmp_path, what):
    path, (name, change, words) = write_top(tmp_path, stored), SPOILT_TOP[what]
    check(tmp_path, temperature=0.1)
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    path.write_bytes(save({name: tensor for name, tensor in tensors.items() if tensor is not None}))
    with pytest.raises(LabelError) as error:
        check(tmp_path, temperature=0.1)
    assert words in str(error.value) and "epoch_0002" in str(error.value)


def test_top_logits_are_the_largest_and_the_rest_is_what_the_others_weigh(stored, tmp_path):
    write_top(tmp_path, stored, 1, 4.0)
    _, found, top = EpochLabels(tmp_path, 2, 21, 8).batch(1)
    whole = stored["logits"][8:16].double().numpy()
    assert top[:, 0].tolist() == whole.argmax(1).tolist()
    assert found[:, 0].tolist() == whole.max(1).tolist()  # the stored halves themselves
    weighs = [np.exp(np.delete(row, row.argmax()) / 4).sum() for row in whole]
    assert np.exp(found[:, 1].numpy() / 4) == pytest.approx(weighs, rel=1e-5)


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("half", [True, False])
def test_label_bytes_are_those_of_the_file(stored, tmp_path, half, top_k):
    settings = {"batch_size": 8, "use_fp16": half, "label_top_k": top_k}
    stored = {**stored, "logits": stored["logits"].to(torch.half if half else torch.float)}
    path = write_top(tmp_path, stored, top_k, top_k and 4.0)
    estimate, once = module.label_bytes(21, 3, settings), ("epoch", "temperature")
    tensors = {name: t for name, t in load_file(path).items() if name not in once}
    tensors["start"] = tensors["start"][1:]
    assert estimate - 1500 == sum(tensor.nbytes for tensor in tensors.values())
    assert path.stat().st_size <= estimate


def test_truncated_and_foreign_files_are_refused(stored, tmp_path):
    data, path = save(stored), tmp_path / label_file(2)
    for content in (b"", data[:-1], b"\x80\x04cos\nsystem\n."):
        path.write_bytes(content)
        with pytest.raises(LabelError, match="not a label file"):
            check(tmp_path)
    path.write_bytes(data)
    check(tmp_path, files.sha256(path))
    with pytest.raises(LabelError, match="changed since"):
        check(tmp_path, "0" * 64)


# ---- labels of other images: most mismatches are tested where a student meets them, test_train_FKD


def opened(images, folder, verify=False, **given):
    return open_labels(folder, open_images("--train_dir", images), given, verify)


def test_labels_of_other_images_or_epochs_are_refused(random, labels, tmp_path, refused):
    images = copy(random, tmp_path)
    shutil.rmtree(images / "2")
    reseal(images, classes=files.read_json(images / "manifest.json")["classes"][:2])
    refused(lambda argv: opened(images, labels), [], "class 2 = 2", "count 12")
    theirs = copy(labels, tmp_path)
    reseal(theirs, std=[0.5, 0.5, 0.4])
    refused(lambda argv: opened(random, theirs), [], "made for std [0.5")
    (theirs / label_file(2)).rename(theirs / label_file(7))
    entries = files.read_json(theirs / "manifest.json")["files"]
    entries[label_file(7)] = entries.pop(label_file(2))
    reseal(theirs, files=entries)
    refused(lambda argv: opened(random, theirs), [], "lists 3 files for 3 epochs")


def test_what_is_given_must_fit(random, teacher, labels, refused):
    given = {"teacher_checkpoint": [str(teacher)], "arch": ["convnet_mini"], "use_fp16": True}
    folder, manifest = opened(random, labels, **given, epochs=2, mix_type="cutmix", flip=None)
    assert folder == labels and manifest["arguments"]["epochs"] == 3
    for odd, words in (
        ({"teacher_checkpoint": [str(teacher)] * 2}, "--teacher_checkpoint sha256:"),
        ({"teacher_checkpoint": ["a"]}, "a: No such file"),
        ({"epochs": 4, "flip": 0.0, "mixup": 1.0}, "--flip 0.0"),
    ):
        refused(lambda argv, odd=odd: opened(random, labels, **odd), [], words)


def test_one_of_many_label_folders_is_found(random, labels, tmp_path, refused):
    assert opened(random, labels.parent)[0] == labels
    refused(lambda argv: opened(random, tmp_path), [], "of 0 finished labels 0 fit")
    for name in ("x", "y"):
        shutil.copytree(labels, tmp_path / f"{random.name}_{name}")
    refused(lambda argv: opened(random, tmp_path), [], "of 2 finished labels 2 fit")
    refused(lambda argv: opened(random, tmp_path, flip=0.0), [], "of 2 finished labels 0 fit")
    args = files.read_json(tmp_path / f"{random.name}_y" / "args.json")["arguments"]
    reseal(tmp_path / f"{random.name}_y", arguments={**args, "flip": 0.25})
    assert opened(random, tmp_path, flip=0.25)[0].name == f"{random.name}_y"


def test_a_large_set_is_hashed_at_the_start_only_on_request(
    random, labels, tmp_path, refused, monkeypatch
):
    folder = copy(labels, tmp_path)
    path = folder / label_file(1)
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # also where the clock does not tell
    refused(lambda argv: opened(random, folder), [], "epoch_0001", "changed since")
    monkeypatch.setattr(module, "HASHED_AT_START", 0)
    assert opened(random, folder)[0] == folder  # found when it is read: test_feed
    refused(lambda argv: opened(random, folder, verify=True), [], "epoch_0001", "changed since")
