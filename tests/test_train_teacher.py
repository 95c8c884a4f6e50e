"""Training a teacher on real images: what it learns, from which images, by which recipe."""

import dataclasses
import shutil
import unicodedata

import torch
from PIL import Image

from distillation import datasets
from matching import models, train_teacher
from scripts import files, output
from tests.conftest import TEACHER, picture_folder, tree


def train(root, *more):
    return train_teacher.main([*TEACHER, "--output_dir", str(root), *map(str, more)])


def photos(root):
    """An `imagefolder` data set of cats and dogs, for training and testing."""
    for split in ("train", "val"):
        picture_folder(root, ["cat", "dog"], split=split)
    flags = ["--dataset", "imagefolder", "--data_dir", str(root), "--arch", "convnet_mini"]
    return [*flags, "--device", "cpu", "--num_workers", "0", "--epochs", "1", "--bn_batch", "2"]


def test_digits_are_learnt(tmp_path):
    """The demo's teacher at 5 of its 15 epochs (in full: 99 %)."""
    flags = ["--dataset", "digits", "--arch", "convnet_mini", "--epochs", "5", "--device", "cpu"]
    folder = train_teacher.main([*flags, "--output_dir", str(tmp_path)])
    results = files.read_json(folder / "results.json")
    assert folder.name == "digits_convnet_mini_epochs5" and results["last"]["top1"] > 94
    assert results["parameters"] == 15_402 and len(results["rows"]) == 5
    assert results["arguments"]["learning_rate"] == 0.02
    assert results["arguments"]["train_images"] == 1352
    manifest = output.read_manifest("--output_dir", folder, "teacher")
    assert manifest["top1"] == results["last"]["top1"]


def test_large_photographs_are_read_by_workers(tmp_path):
    """Sets above 64 px are not held in memory; the same bytes for any number of workers."""
    flags = [*photos(tmp_path / "data"), "--input_size", "64", "--batch_size", "4", "--output_dir"]
    alone, fed = (train_teacher.main([*flags, n, "--num_workers", n]) for n in "02")
    assert tree(alone) == tree(fed)
    classes = output.read_manifest("--output_dir", alone, "teacher")["classes"]
    assert [c["folder"] for c in classes] == ["cat", "dog"]


def test_teachers_are_not_tested_on_their_training_images(tmp_path, refused, capsys):
    flags = [*photos(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    root = tmp_path / "data"
    shutil.rmtree(root / "val")
    flat = [*flags, "--data_dir", str(root / "train")]
    words = ("--data_dir", "the test set is the training set (6 of 6", "val/<class>/", "--val_dir")
    refused(train_teacher.main, flat, *words)
    (root / "val").symlink_to("train")
    refused(train_teacher.main, flags, *words)
    (root / "val").unlink()
    shutil.copytree(root / "train", root / "val")
    for n, path in enumerate(sorted((root / "val").rglob("*.png"))):
        path.rename(path.with_name(f"other_{n}.png"))
    refused(train_teacher.main, flags, *words)
    for path in (root / "val").rglob("other_*[1245].png"):
        with Image.open(path) as image:
            image.rotate(90).save(path)
    assert train_teacher.main(flags).name == "imagefolder_convnet_mini_epochs1_size24"
    assert "2 of 6 images compared are training images" in capsys.readouterr().err
    assert train_teacher.main([*flat, "--test_on_train"]).name.endswith("_size24_ontrain")


def test_an_imagefolder_is_trained_at_the_size_of_its_images(tmp_path, refused):
    """24 px here: where all agree; else 224, which the folder's name does not say, as before."""
    flags = [*photos(tmp_path / "data"), "--output_dir", str(tmp_path)]
    folder = train_teacher.main(flags)
    manifest = output.read_manifest("--output_dir", folder, "teacher")
    assert manifest["image_size"] == 24 and folder.name.endswith("_size24")
    one = [*flags, "--arch", "shufflenet_v2_x0_5", "--bn_batch", "1"]
    refused(train_teacher.main, one, "--bn_batch 1: shufflenet_v2_x0_5 cannot train", "BatchNorm")
    path = tmp_path / "data/train/dog/0.png"
    with Image.open(path) as image:
        image.resize((24, 25)).save(path)
    assert "size" not in train_teacher.main([*flags, "--dry_run"]).name


def test_class_names_are_one_in_both_unicode_forms(tmp_path):
    """A teacher keeps the training folder's own, and labels images of folders of the other."""
    on_mac, usual = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
    for split, name in (("train", on_mac), ("val", usual)):
        picture_folder(tmp_path / "data", [name, "dog"], split=split)
    flags = [*photos(tmp_path / "cats"), "--data_dir", str(tmp_path / "data")]
    folder = train_teacher.main([*flags, "--output_dir", str(tmp_path)])
    classes = output.read_manifest("--output_dir", folder, "teacher")["classes"]
    assert [c["folder"] for c in classes] == [on_mac, "dog"]
    models.load_teacher("convnet_mini", folder, "imagefolder", [usual, "dog"], 24)


def test_the_recipe_is_that_of_the_data_set():
    def recipe(*flags):
        return vars(train_teacher.get_args(["--arch", "resnet18", *flags]))

    cifar, tiny = recipe("--dataset", "cifar10"), recipe("--dataset", "tiny_imagenet")
    assert (cifar["epochs"], cifar["batch_size"], cifar["augment"]) == (200, 128, "pad_crop")
    assert (tiny["learning_rate"], tiny["warmup_epochs"], tiny["augment"]) == (0.2, 5, "rrc")
    assert recipe("--dataset", "digits")["flip"] == 0
    for dataset, peak in (("cifar10", 0.01), ("digits", 0.02)):
        assert recipe("--dataset", dataset, "--arch", "convnet_w128")["learning_rate"] == peak


def test_a_data_set_without_a_recipe_is_an_error(monkeypatch, refused, tmp_path):
    bare = dataclasses.replace(datasets.ALL["digits"], teacher=None)
    monkeypatch.setitem(datasets.ALL, "bare", bare)
    flags = ["--dataset", "bare", "--arch", "convnet_mini", "--output_dir", tmp_path]
    given = ["--epochs", "1", "--batch_size", "50", "--learning_rate", "0.01", "--flip", "0"]
    given += ["--weight_decay", "0", "--warmup_epochs", "0", "--augment", "none"]
    assert train_teacher.get_args([*map(str, flags), *given]).learning_rate == 0.01
    refused(train_teacher.main, [*flags, *given[:-2]], "no recipe of bare", "--augment")


def test_augmented_images_are_shifted_and_flipped_copies():
    split = datasets.open_split("digits", None, "train", classes=["3"], max_per_class=2)
    settings = {"input_size": 32, "augment": "pad_crop", "flip": 0.5, "seed": 0}
    images = train_teacher.RealImages(split, settings, None, 0)
    images.loader([])
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        mirrored = torch.rand((), generator=g).item() < 0.5
        top, left = torch.randint(9, (2,), generator=g).tolist()
        padded = torch.nn.functional.pad(torch.tensor(images.arrays[1]), (0, 0, 4, 4, 4, 4))
        expected = padded[top : top + 32, left : left + 32]
        found = images.augmented(1, torch.Generator().manual_seed(seed))
        assert (found == (expected.flip(1) if mirrored else expected).numpy()).all()


def test_flags_that_make_no_sense_are_refused(tmp_path, capsys, refused):
    train(tmp_path / "out", "--dry_run", "--bn_batch", 5)
    assert not (tmp_path / "out").exists()
    name = "digits_convnet_mini_epochs1_classes-0-2_max12"
    assert f"{name}: 0 done, 2 files to do" in capsys.readouterr().out
    crops = ["--min_scale_crops", "0.9", "--max_scale_crops", "0.1"]
    for argv, *words in (
        (["--dataset", "cifar10", "--data_dir", tmp_path / "none", "--dry_run"], "--data_dir"),
        (["--shard", "0/2"], "torchrun"),
        (["--flip", "2"], "--flip"),
        (["--warmup_epochs", "3"], "--warmup_epochs 3"),
        (crops, "--min_scale_crops 0.9", "0.1"),
    ):
        refused(train_teacher.main, [*TEACHER, *argv], *words)


def test_what_a_finished_folder_was_made_of_must_not_change(tmp_path, refused):
    """As many test images, in the same classes, are a --val_dir that was repaired."""
    flags = [*photos(tmp_path / "data"), "--output_dir", str(tmp_path)]
    folder = train_teacher.main(flags)
    assert train_teacher.main(flags) == folder
    picture_folder(tmp_path / "other", ["dog", "cat"], split="val")
    refused(train_teacher.main, [*flags, "--val_dir", tmp_path / "other"], "val_sha256")
    (folder / "model.safetensors").write_bytes(b"changed")
    refused(train_teacher.main, flags, "model.safetensors")
    for path in (tmp_path / "other/val/dog").iterdir():
        path.unlink()
    refused(train_teacher.main, [*flags, "--val_dir", tmp_path / "other"], "dog has no images")
