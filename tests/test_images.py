"""Which images a folder holds: an output of stage 2, or anybody's folder of class folders."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from distillation import datasets
from matching.images import fits_gpu, load_pixels, open_images
from tests.conftest import copy, picture, reseal


def folders(root, names, sizes=(24,)):
    """root/<name>/<k>.png, one picture per size."""
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k, side in enumerate(sizes):
            image = Image.fromarray(picture(10 * c + k, (side, side)))
            image.save(root / name / f"{k}.png")
    return root


def opened(root, dataset=None):
    return load_pixels("--data", open_images("--data", root, dataset))


def test_a_folder_of_stage_2(random, images, tiny_sd, refused):
    arrays, chosen = opened(random)
    assert chosen.folders == ("0", "1", "2") and chosen.files[4] == "1/1_0000.png"
    assert chosen.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with Image.open(random / chosen.files[5]) as image:
        assert len(arrays) == 12 and np.array_equal(arrays[5], np.asarray(image.convert("RGB")))
    facts = {"arm": "random", "ipc": 4, "count": 12, "image_size": 32, "real_images": 36}
    facts |= {"generator": None, "foreign": False, "content": chosen.content}
    assert chosen.facts() == facts
    facts = open_images("--data", images).facts()  # those of a diffusion model name it
    assert facts["real_images"] == 36 and facts["generator"]["model"] == tiny_sd.name
    refused(lambda argv: open_images("--data", random, "cifar10"), [], "cifar10", "digits")


def _reorder(folder):
    classes = [{"index": c, "folder": str(c), "prompt": ""} for c in (1, 0, 2)]
    reseal(folder, classes=classes)


ODD = {  # change of the folder, what the line says; more in test_train_FKD
    "an image added": (lambda f: shutil.copy(f / "0/0_0000.png", f / "0/0_0004.png"), "0_0004"),
    "an image removed": (lambda f: (f / "2/2_0003.png").unlink(), "2/2_0003.png"),
    "a class renamed": (lambda f: (f / "1").rename(f / "1b"), "1/1_0000.png"),
    "a class added": (lambda f: folders(f, ["3"]), "3/0.png is not in its manifest"),
    "an empty class": (lambda f: (f / "3").mkdir(), "3 holds no image"),
    "not finished": (lambda f: (f / "manifest.json").unlink(), "not finished"),
    "classes in another order": (_reorder, "order"),
    "not there": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_folder_that_does_not_fit_its_manifest_is_refused(random, tmp_path, refused, what):
    change, words = ODD[what]
    folder = copy(random, tmp_path)
    change(folder)
    refused(lambda argv: opened(folder), [], "--data", words)


def test_an_image_that_vanishes_or_breaks_is_one_line(random, tmp_path, refused):
    folder = copy(random, tmp_path)
    images = open_images("--data", folder)
    path = folder / images.files[7]
    path.write_bytes(path.read_bytes()[:-40])
    refused(lambda argv: load_pixels("--data", images), [], images.files[7], "changed since")
    foreign = images._replace(digests=None)  # whose manifest says nothing
    refused(lambda argv: load_pixels("--data", foreign), [], images.files[7], "image")
    path.unlink()
    refused(lambda argv: load_pixels("--data", images), [], images.files[7], "No such file")


# ---- anybody's folder


def test_a_foreign_folder_is_hashed_and_warned_about_once(tmp_path, capsys):
    root = folders(tmp_path / "theirs", "012", sizes=(20, 32, 40))
    arrays, images = opened(root, "digits")
    assert capsys.readouterr().err.count("no manifest") == 1
    assert images.foreign and images.image_size is None and images.ipc == 3
    assert [a.shape[0] for a in arrays] == [20, 32, 40] * 3
    Image.fromarray(picture(99, (32, 32))).save(root / "1" / "1.png")
    assert opened(root, "digits")[1].content != images.content
    same = open_images("--data", folders(tmp_path / "same", "012", sizes=(32, 32)), "digits")
    assert same.image_size == 32


def test_the_number_of_a_folder_is_its_class(tmp_path, capsys, refused):
    """SRe2L's new000 ...; the release's 0, 1, 10, 100, ..., which sort as text."""
    classes = tuple(datasets.known_prompts("cifar100"))
    for form in ("new{:03d}", "{}"):
        names = [form.format(n) for n in range(100)]
        root = folders(tmp_path / form, names, sizes=(24, 24))
        images = open_images("--data", root, "cifar100")
        assert images.folders == classes and "classes, by number" in capsys.readouterr().err
        assert images.files == tuple(f"{n}/{k}.png" for n in sorted(names) for k in range(2))
        assert [str(root / path) for path in images.files] == [p for p, _ in ImageFolder(root).imgs]
        owners = [images.files[n].split("/")[0] for n in range(200)]
        assert images.targets.tolist() == [names.index(owner) for owner in owners]
    assert images.targets[:8].tolist() == [0, 0, 1, 1, 10, 10, 11, 11]
    (tmp_path / "{}" / "99").rename(tmp_path / "{}" / "100")
    refused(lambda argv: open_images("--data", root, "cifar100"), [], "'0'", "cifar100")
    named = folders(tmp_path / "named", [f"{c}_{99 - n}" for n, c in enumerate(classes)])
    refused(lambda argv: open_images("--data", named, "cifar100"), [], "'apple_99' is no class")


def test_the_data_set_is_recognised_by_its_classes(tmp_path):
    wnids = list(datasets.known_prompts("imagenet"))[5:8]
    known = {"imagefolder": ["cat", "dog"], "cifar10": datasets.known_prompts("cifar10")}
    for dataset, names in {**known, "imagenet": wnids}.items():
        assert open_images("--data", folders(tmp_path / dataset, names)).dataset == dataset


def test_a_missing_class_is_named(tmp_path, capsys):
    """Said whether the data set is named or recognised by its other classes."""
    names = [name for name in datasets.known_prompts("cifar10") if name != "cat"]
    root = folders(tmp_path / "nine", names)
    for dataset in ("cifar10", None):
        images = open_images("--data", root, dataset)
        assert images.dataset == "cifar10" and len(images.folders) == 9
        said = capsys.readouterr().err
        assert "1 of cifar10's 10 classes are missing, first cat" in said


def test_what_is_no_image_of_a_foreign_folder_is_said(tmp_path, capsys, refused):
    root = folders(tmp_path / "theirs" / "train", ["ant", "bee"], sizes=(24, 24))
    folders(root / "ant", ["more", "@eaDir"])  # ImageFolder, too, takes what is below
    shutil.copy(root / "ant/0.png", root / "bee/0.jfif")
    images = open_images("--data", root.parent)
    assert images.name == "theirs" and images.root == root and images.ipc is None
    assert images.files == ("ant/0.png", "ant/1.png", "ant/more/0.png", "bee/0.png", "bee/1.png")
    shutil.rmtree(root / "ant/@eaDir")
    assert [str(root / path) for path in images.files] == [
        path for path, _ in ImageFolder(root).imgs
    ]
    said = capsys.readouterr().err
    assert "1 hidden or thumbnail folders are left out, first" in said
    assert "1 files of other formats are left out, first" in said and "bee/0.jfif" in said
    (root / "bee/2.png").symlink_to("gone")
    refused(lambda argv: open_images("--data", root), [], "bee/2.png: not a file")


def test_odd_foreign_folders_are_refused(tmp_path, refused):
    refused(lambda argv: open_images("--data", tmp_path), [], "no class folders")
    root = folders(tmp_path / "a", ["cat", "dog"])
    (root / "eel").symlink_to("gone")
    refused(lambda argv: open_images("--data", root), [], "broken link", "gone")
    (root / "eel").unlink()
    (root / "dog" / "1.png").write_bytes(b"no image")
    refused(lambda argv: open_images("--data", root), [], "dog/1.png: not an image")
    folders(root, ["c:"])
    refused(lambda argv: open_images("--data", root), [], "'c:'", "not safe")


def test_gpu_memory_that_pytorch_keeps_unused_counts_as_free(monkeypatch):
    answers = {"mem_get_info": (100, 1000), "memory_reserved": 800, "memory_allocated": 300}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert fits_gpu("the images", 300, "cuda", "") and not fits_gpu("the images", 301, "cuda", "")
