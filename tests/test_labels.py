"""Stored labels: named by their settings, and refused where they do not fit the images."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from matching import batches, generate_soft_label, labels
from matching.feed import Feed
from matching.images import load_pixels, open_images
from scripts import files
from tests.conftest import TEACHER, copy, everything, reseal

# ---- the name

NAMED = {
    "": "resnet18",
    "--mix_type cutmix": "resnet18_mix-cutmix",
    "--arch resnet18 timm:some/net.a1 --mix_type mixup --mixup 0.5": (
        "resnet18-timm-some-net.a1_mix-mixup_alpha0.5"
    ),
    "--mixup 0.5": "resnet18",  # nothing is mixed
    "--epochs 75 -b 25 --min_scale_crops 0.5 --flip 0 --mix_type cutmix": (
        "resnet18_epochs75_b25_crops-0.5-1_flip0_mix-cutmix"
    ),
    "--input_size 64 --fkd_seed 1234567": "resnet18_size64_seed1234567",
    "--no_use_fp16 --amp bf16 --channels_last": "resnet18_no-fp16_amp-bf16_channelslast",
}


@pytest.mark.parametrize("flags", NAMED)
def test_folders_are_named_by_what_is_not_the_default(flags):
    args = generate_soft_label.get_args(["--data", "x", *flags.split()])
    settings = args.settings.filled(input_size=224)
    assert labels.labels_name("set", args.arch, settings) == f"set_{NAMED[flags]}"


# ---- one file

SPOILT = {
    "epoch": ("epoch", lambda t: t + 1, "holds epoch 3, expected 2"),
    "an image twice": ("index", lambda t: torch.where(t == 5, 6, t), "each once"),
    "an unknown image": ("index", lambda t: torch.where(t == 5, 99, t), "each once"),
    "crop outside": ("crop", lambda t: t + torch.tensor([20, 0, 0, 0]), "outside the images"),
    "empty crop": ("crop", lambda t: t * torch.tensor([1, 1, 0, 1]), "outside the images"),
    "partner outside": ("partner", lambda t: t + 8, "mix partners"),
    "box outside": ("box", lambda t: t + 32, "boxes outside 32"),
    "lambda": ("lam", lambda t: t + 2, "lambdas"),
    "lambda of nothing": ("lam", lambda t: t * torch.nan, "lambdas"),
    "other batches": ("start", lambda t: torch.tensor([0, 10, 20, 21]), "begin at [0, 10"),
    "fewer classes": ("logits", lambda t: t[:, :2], "[21, 2]"),
    "fewer images": ("logits", lambda t: t[:20], "[20, 3]"),
    "NaN": ("logits", lambda t: torch.where(t == t[9, 1], torch.nan, t), "not finite"),
    "flips": ("flip", lambda t: t.int(), "flip"),
    "no lambda": ("lam", None, "expected ["),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Epoch 2 of 21 images in batches of 8, without a teacher: its tensors."""
    folder = tmp_path_factory.mktemp("stored")
    arrays = [torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()] * 21
    protocol = {**batches.PROTOCOL, "batch_size": 8, "mix_type": "cutmix", "input_size": 32}
    feed = Feed(arrays, SimpleNamespace(folders="012", dataset="digits"), protocol, "cpu")
    drawn = [feed[2, number].batch for number in range(3)]
    out = SimpleNamespace(write=lambda name, data: (folder / name).write_bytes(data))
    labels.write_epoch(out, 2, drawn, torch.randn(21, 3).half())
    return load_file(folder / labels.label_file(2))


def check(folder, digest=None):
    epoch = labels.EpochLabels(folder, 2, 21, 8)
    epoch.check(torch.full((21, 2), 32), 3, 32, digest)


@pytest.mark.parametrize("what", SPOILT)
def test_a_file_that_does_not_fit_is_refused(stored, tmp_path, what):
    name, change, words = SPOILT[what]
    tensors = dict(stored)
    if change is None:
        del tensors[name]
    else:
        changed = change(tensors[name])
        tensors[name] = (
            changed if what == "flips" else changed.to(stored[name].dtype)
        ).contiguous()
    (tmp_path / "epoch_0002.safetensors").write_bytes(save(tensors))
    with pytest.raises(labels.LabelError) as error:
        check(tmp_path)
    assert words in str(error.value) and "epoch_0002" in str(error.value)


def test_truncated_and_foreign_files_are_refused(stored, tmp_path):
    data, path = save(stored), tmp_path / "epoch_0002.safetensors"
    for content in (b"", data[:100], data[:-1], b"\x80\x04cos\nsystem\n."):
        path.write_bytes(content)
        with pytest.raises(labels.LabelError, match="not a label file"):
            check(tmp_path)
    path.write_bytes(data)
    check(tmp_path, files.sha256(path))
    with pytest.raises(labels.LabelError, match="changed since"):
        check(tmp_path, "0" * 64)


# ---- labels of other images, or made otherwise


def used(images, folder, dataset=None, **given):
    """What stage 4 does with labels: open them, then read every batch."""
    found = open_images("--train_dir", images, dataset)
    arrays, found = load_pixels("--train_dir", found)
    folder, manifest = labels.open_labels(folder, found, given)
    digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    settings = manifest["arguments"]
    feed = Feed(arrays, found, settings, "cpu", (folder, digests))
    keys = [(epoch, number) for epoch in range(settings["epochs"]) for number in range(3)]
    return list(feed.loader(keys))


def _turn(folder, name="1/1_0002.png"):
    with Image.open(folder / name) as image:
        turned = image.rotate(90)
    turned.save(folder / name)


def _tensor(folder, name, change, epoch=1):
    path = folder / labels.label_file(epoch)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    path.write_bytes(save(tensors))
    reseal(folder)


def _swap(a, b):
    third = a.with_name("third")
    a.rename(third)
    b.rename(a)
    third.rename(b)


def _another_seed(images, folder):
    _turn(images)
    reseal(images)


def _exchange(images, folder):
    _swap(images / "0/0_0001.png", images / "2/2_0001.png")
    reseal(images)


def _remove(images, folder):
    (images / "2/2_0003.png").unlink()
    reseal(images, count=11)


def _rename_class(images, folder):
    (images / "1").rename(images / "1b")
    manifest = files.read_json(images / "manifest.json")
    classes = [{**c, "folder": c["folder"].replace("1", "1b")} for c in manifest["classes"]]
    reseal(images, classes=classes)


def _remove_class(images, folder):
    shutil.rmtree(images / "2")
    reseal(images, classes=files.read_json(images / "manifest.json")["classes"][:2])


def _other_size(images, folder):
    for path in images.glob("*/*.png"):
        with Image.open(path) as image:
            larger = image.resize((48, 48))
        larger.save(path)
    reseal(images, image_size=48)


def _other_epoch(images, folder):
    shutil.copy(folder / labels.label_file(0), folder / labels.label_file(1))
    reseal(folder)


def _two_epochs(images, folder):
    _swap(folder / labels.label_file(0), folder / labels.label_file(1))


def _epoch_missing(images, folder):
    (folder / labels.label_file(2)).unlink()
    reseal(folder)


def _flip_a_bit(images, folder):
    path = folder / labels.label_file(1)
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _cut_short(images, folder):
    path = folder / labels.label_file(1)
    path.write_bytes(path.read_bytes()[:-8])


def _edit(images, folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"cutmix": 1.0', '"cutmix": 0.5'))


# Each changes one thing in real outputs of stages 2 and 3:
# (change of images and labels, what the command line says, words of the line)
MISMATCHES = {
    "images made again with another seed": (_another_seed, {}, "content"),
    "two images exchanged between classes": (_exchange, {}, "content"),
    "an image removed": (_remove, {}, "11"),
    "a class renamed": (_rename_class, {}, "1b"),
    "a class removed": (_remove_class, {}, "class 2"),
    "images of another size": (_other_size, {}, "48"),
    "images of another arm": (lambda i, n: reseal(i, arm="d4m"), {}, "d4m"),
    "another mix type": (None, {"mix_type": "mixup"}, "--mix_type mixup"),
    "another alpha": (None, {"cutmix": 0.5}, "--cutmix 0.5"),
    "another input size": (None, {"input_size": 64}, "--input_size 64"),
    "another batch size": (None, {"batch_size": 4}, "--batch_size 4"),
    "more epochs than labels": (None, {"epochs": 4}, "with 3"),
    "another seed of the draws": (None, {"fkd_seed": 1}, "--fkd_seed 1"),
    "other crops": (None, {"min_scale_crops": 0.5}, "0.08"),
    "other flips": (None, {"flip": 0.0}, "--flip 0"),
    "another precision": (None, {"use_fp16": False}, "--use_fp16 False"),
    "another teacher": (None, {"arch": ["resnet18"]}, "with convnet_mini"),
    "two epochs' files exchanged": (_two_epochs, {}, "epoch_000"),
    "a file of another epoch, manifest and all": (_other_epoch, {}, "holds epoch 0"),
    "a bit of the logits flipped": (_flip_a_bit, {}, "epoch_0001"),
    "a label file cut short": (_cut_short, {}, "epoch_0001"),
    "a label file missing": (lambda i, n: (n / labels.label_file(1)).unlink(), {}, "epoch_0001"),
    "an epoch missing, manifest and all": (_epoch_missing, {}, "2 files"),
    "logits of another number of classes": (
        lambda i, n: _tensor(n, "logits", lambda t: torch.cat([t, t], 1)),
        {},
        "[12, 6]",
    ),
    "an image twice in an epoch": (
        lambda i, n: _tensor(n, "index", lambda t: torch.where(t == 3, 4, t)),
        {},
        "each once",
    ),
    "crops of larger images": (
        lambda i, n: _tensor(n, "crop", lambda t: t * 2),
        {},
        "outside the images",
    ),
    "logits that are not finite": (
        lambda i, n: _tensor(n, "logits", lambda t: t * torch.inf),
        {},
        "not finite",
    ),
    "the labels' manifest edited": (_edit, {}, "checksum"),
    "another normalisation": (lambda i, n: reseal(n, mean=[0.1, 0.2, 0.3]), {}, "mean [0.1"),
    "labels of another data set": (lambda i, n: reseal(n, dataset="cifar10"), {}, "cifar10"),
    "labels that are not finished": (
        lambda i, n: (n / "manifest.json").unlink(),
        {},
        "not finished",
    ),
    "a teacher that is not there": (None, {"teacher_checkpoint": ["a"]}, "a: no such file"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_is_refused_in_one_line(random, request, tmp_path, refused, what):
    change, given, words = MISMATCHES[what]
    images, folder = copy(random, tmp_path), copy(request.getfixturevalue("labels"), tmp_path)
    if change:
        change(images, folder)
    refused(lambda argv: used(images, folder, **given), [], words)


def test_other_weights_of_the_teacher_are_refused(random, teacher, request, tmp_path, refused):
    from matching import train_teacher

    folder = request.getfixturevalue("labels")
    other = train_teacher.main([*TEACHER, "--output_dir", str(tmp_path), "--seed", "5"])
    for given in ([other], [teacher, teacher]):
        given = [str(path) for path in given]
        refused(lambda argv: used(random, folder, teacher_checkpoint=argv), given, "sha256")
    assert used(random, folder, teacher_checkpoint=[str(teacher)], arch=["convnet_mini"], epochs=2)


def test_images_are_no_labels(random, refused):
    refused(lambda argv: used(random, random), [], "stage")


def test_labels_are_found_below_a_root(random, request, tmp_path, refused):
    folder = request.getfixturevalue("labels")
    assert len(used(random, folder.parent)) == 9
    before = everything(folder)
    refused(lambda argv: used(random, tmp_path), [], "no finished labels")
    for name in ("x", "y"):
        shutil.copytree(folder, tmp_path / f"{random.name}_{name}")
    refused(lambda argv: used(random, tmp_path), [], "2 label folders fit")
    refused(lambda argv: used(random, tmp_path, flip=0.0), [], "2 label folders, none fits")
    refused(lambda argv: used(random, tmp_path / "z"), [], "no such folder")
    assert everything(folder) == before
