"""Labels in the release's own form: the student sees the crops and the logits that they state."""

import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, one_hot
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop, to_tensor

from distillation import datasets
from matching import batches, import_labels, lessons
from scripts import files
from tests.conftest import picture
from validate import train_FKD

SIZE, COUNT, BATCH, CLASSES = 32, 130, 50, 100  # batches of 50, 50 and 30
ARGV = ["--dataset", "cifar100", "--num_workers", "0", "--device", "cpu"]


def teacher(x, target):
    """Logits that tell (B, 3, S, S) images in [0, 1] apart, largest at their class."""
    rows = torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(1))
    return adaptive_avg_pool2d(x, 4).flatten(1) @ rows + 60 * one_hot(target, CLASSES)


class Released(ImageFolder):
    """utils_fkd.py's data set when it saves: coordinates are shares of the image."""

    def __getitem__(self, n):
        path, target = self.samples[n]
        image = self.loader(path)
        i, j, h, w = RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        (width, height), flip = image.size, bool(torch.rand(1) < 0.5)
        coords = torch.FloatTensor((i / height, j / width, h / height, w / width))
        image = resized_crop(image, i, j, h, w, [SIZE, SIZE], InterpolationMode.BILINEAR)
        image, number = to_tensor(hflip(image) if flip else image), int(self.classes[target])
        return image, number, flip, coords


def write_labels(root, data, mix_type, epochs=2, seed=42):
    """generate_soft_label.py and its mix_aug, in short."""
    np.random.seed(3)
    found, generator = Released(data), torch.Generator().manual_seed(seed)
    sampler = RandomSampler(found, generator=generator)
    loader = DataLoader(found, batch_size=BATCH, sampler=sampler)
    for epoch in range(epochs):
        (root / f"epoch_{epoch}").mkdir(parents=True)
        for b, (images, target, flip, coords) in enumerate(loader):
            index = lam = box = None
            if mix_type != "none":
                index, lam, share = torch.randperm(len(images)), np.random.beta(1.0, 1.0), 1.0
            if mix_type == "mixup":
                images, share = lam * images + (1 - lam) * images[index], lam
            if mix_type == "cutmix":
                cut = int(SIZE * np.sqrt(1.0 - lam))
                cx, cy = np.random.randint(SIZE), np.random.randint(SIZE)
                corners = (cx - cut // 2, cy - cut // 2, cx + cut // 2, cy + cut // 2)
                box = x1, y1, x2, y2 = [np.clip(corner, 0, SIZE) for corner in corners]
                images[:, :, x1:x2, y1:y2] = images[index, :, x1:x2, y1:y2]
                share = 1 - (x2 - x1) * (y2 - y1) / SIZE**2
            if index is not None and share < 0.5:
                target = target[index]
            parts = [coords, flip, index, lam, box, teacher(images, target).half()]
            torch.save(parts, root / f"epoch_{epoch}" / f"batch_{b}.tar")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The release's folder: 0 ... 99, sorted as text; two classes in three have one picture."""
    root = tmp_path_factory.mktemp("images") / "theirs"
    for n in range(COUNT):
        path = root / str(n % 100) / f"{n % 100}-image{n // 100}0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(n, (40, 32))).save(path)
    return root


@pytest.fixture(scope="module")
def theirs(images, tmp_path_factory):
    return write_labels(tmp_path_factory.mktemp("labels") / "cutmix", images, "cutmix")


def imported(images, source, *flags):
    argv = ["--data", images, "--labels", source, "--arch", "resnet18", *ARGV, "--input_size", SIZE]
    return import_labels.main(list(map(str, [*argv, *flags])))


@pytest.mark.parametrize("mix_type", ["cutmix", "mixup", "none"])
def test_a_student_sees_their_crops_and_logits(images, mix_type, tmp_path, monkeypatch, capsys):
    source = write_labels(tmp_path / "labels", images, mix_type)
    folder = imported(images, source)
    assert "name the class" not in capsys.readouterr().err
    for shard in ("1/2", "0/2"):
        again = imported(images, source, "--fkd_path", "two", "--shard", shard)
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()

    seen, original = [], lessons.Lessons.part

    def part(self, item):
        found = original(self, item)
        seen.append((found.x.clone(), found.goal))  # the next batch may take its memory
        return found

    monkeypatch.setattr(lessons.Lessons, "part", part)
    for name in datasets.known_prompts("cifar100"):
        (tmp_path / "data/val" / name).mkdir(parents=True)
        Image.fromarray(picture(1)).save(tmp_path / "data/val" / name / "0.png")
    argv = ["--train_dir", images, "--val_dir", "data", "--fkd_path", folder, *ARGV]
    argv += ["--model", "convnet_mini", "--cos", "-T", 20, "--epochs", 2, "--batch_size", BATCH]
    argv += ["--mix_type", mix_type, "--min_scale_crops", 0.08]  # which the labels do not say
    student = train_FKD.main(list(map(str, argv)))
    assert len(seen) == 6 and files.read_json(student / "results.json")["labels"]["amp"] is None

    facts, worst = datasets.ALL["cifar100"], 0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (facts.mean, facts.std))
    for n, (x, goal) in enumerate(seen):
        stored = torch.load(source / f"epoch_{n // 3}/batch_{n % 3}.tar", weights_only=False)
        assert torch.equal(goal.logits, stored[5])
        target = goal.targets if goal.lam >= 0.5 else goal.partners
        worst = max(worst, (teacher(x * std + mean, target) - goal.logits).abs().max())
    assert worst < 0.1  # fp16, and Pillow 13's order of passes; another crop differs by 1 and more


def test_orders_are_those_of_the_installed_sampler():
    sampler = RandomSampler(range(7), generator=torch.Generator().manual_seed(42))
    loader = DataLoader(range(7), batch_size=3, sampler=sampler)
    for _, order in zip(range(4), batches.release_orders(7, 42)):
        assert torch.cat(list(loader)).equal(order)


def test_the_manifest_says_what_is_known_and_null_for_what_is_not(images, theirs, refused):
    folder = imported(images, theirs, "--epochs", 1, "--min_scale_crops", 0.08)
    assert folder.name == "theirs_resnet18_epochs1_b50_mix-cutmix_imported"
    manifest = files.read_json(folder / "manifest.json")
    known = {"epochs": 1, "batch_size": BATCH, "mix_type": "cutmix", "use_fp16": True}
    known |= {"input_size": SIZE, "fkd_seed": 42, "min_scale_crops": 0.08, "arch": ["resnet18"]}
    known |= dict.fromkeys(("max_scale_crops", "flip", "cutmix", "amp", "channels_last"))
    assert manifest["arguments"].items() >= known.items()
    assert manifest["teacher"][0]["arch"] == "resnet18" and not manifest["teacher"][0]["sha256"]
    assert list(manifest["files"]) == ["epoch_0000.safetensors"]
    (Path("weights.pt")).write_bytes(b"x")
    argv = ["--train_dir", images, "--fkd_path", folder, *ARGV, "--val_dir", images]
    wrong = ["--teacher_checkpoint", "weights.pt"]
    refused(train_FKD.main, [*argv, *wrong], "--teacher_checkpoint", "made with sha256:unknown")
    refused(train_FKD.main, [*argv, "--arch", "resnet50"], "--arch resnet50", "with resnet18")


def test_files_of_numpy_1_and_of_another_seed(images, theirs, tmp_path, capsys):
    mine = shutil.copytree(theirs, tmp_path / "old")
    for path in mine.glob("*/*.tar"):
        with zipfile.ZipFile(path) as file:
            content = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in content.items():
                file.writestr(
                    name, data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
                )
    old, new = imported(images, mine, "--fkd_path", "old"), imported(images, theirs)
    one, two = (files.read_json(folder / "manifest.json")["files"] for folder in (old, new))
    assert one == two and "name the class" not in capsys.readouterr().err
    imported(images, theirs, "--fkd_seed", 43, "--dry_run")
    assert "labels of epoch 0" in capsys.readouterr().err


def changed(part, change):
    """A change of one part of the last batch of the second epoch."""

    def apply(source):
        path = source / "epoch_1/batch_2.tar"
        parts = torch.load(path, weights_only=False)
        parts[part] = change(parts[part])
        torch.save(parts, path)

    return apply


class Evil:
    def __reduce__(self):
        return Path("harm").touch, ()


ODD = {  # change of the folder, flags, what the line says
    "a batch is missing": (
        lambda s: (s / "epoch_1/batch_1.tar").unlink(),
        "",
        "No such file",
    ),
    "an epoch is missing": (lambda s: shutil.rmtree(s / "epoch_1"), "--epochs 2", "holds 1"),
    "no last batch": (lambda s: (s / "epoch_0/batch_2.tar").unlink(), "", "do not fit the 130"),
    "no labels": (lambda s: shutil.rmtree(s / "epoch_0"), "", "holds no epoch_0/batch_0.tar"),
    "code": (lambda s: torch.save(Evil(), s / "epoch_0/batch_0.tar"), "", "not a batch of labels"),
    "fewer rows": (changed(0, lambda t: t[:-1]), "", "crops of torch.float32, (29, 4)"),
    "NaN": (changed(5, lambda t: t * math.nan), "", "batch_2.tar: holds logits that are NaN"),
    "other classes": (changed(5, lambda t: t[:, :10]), "", "(30, 10), expected"),
    "outside": (changed(0, lambda t: t + torch.tensor([1.0, 0, 0, 0])), "", "crops outside"),
    "another mix": (changed(4, lambda box: None), "", "mixed by mixup, not cutmix"),
    "a box of three": (changed(4, lambda box: box[:3]), "", "not a batch of labels: ValueError"),
    "lambda": (changed(3, lambda lam: math.nan), "", "holds lambda nan"),
    "partners": (changed(2, lambda t: t * 0), "", "partners that are not the rows"),
    "a mix": (lambda s: None, "--mix_type mixup", "--mix_type mixup:"),
    "a batch size": (lambda s: None, "--batch_size 64", "made with 50"),
    "an input size": (lambda s: None, "--input_size 64", "another --input_size than 64"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_does_not_fit_is_one_line(what, images, theirs, tmp_path, refused):
    change, flags, words = ODD[what]
    mine = shutil.copytree(theirs, tmp_path / "mine")
    change(mine)
    refused(lambda argv: imported(images, mine, *flags.split()), [], words)
    assert not Path("harm").exists()


def test_other_images_are_refused(images, theirs, tmp_path, refused):
    mine = shutil.copytree(images, tmp_path / "theirs")
    shutil.copy(mine / "7/7-image00.png", mine / "7/7-image99.png")
    refused(lambda argv: imported(mine, theirs), [], "(30, 4)", "expected", "(31, 4)")
    (mine / "7/7-image99.png").unlink()
    for path in mine.glob("*/*.png"):
        Image.open(path).resize((28, 28)).save(path)
    refused(lambda argv: imported(mine, theirs), [], "not whole pixels of these images")
