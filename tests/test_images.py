"""Which images a folder holds: an output of stage 2, or anybody's folder of class folders."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_numbered_folders_are_the_classes_in_order(tmp_path, capsys, refused):
    names = [f"new{i:03d}" for i in range(10)]
    images = open_images("--data", folders(tmp_path / "new", names), "cifar10")
    assert images.folders == tuple(datasets.known_prompts("cifar10"))
    assert images.files[3] == "new003/0.png" and "classes in order" in capsys.readouterr().err
    # sorted by name, c10 would be class 2
    unpadded = folders(tmp_path / "c", [f"c{i}" for i in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8)])
    refused(lambda argv: open_images("--data", unpadded, "cifar10"), [], "'c0'", "cifar10")


def test_the_data_set_is_recognised_by_its_classes(tmp_path):
    wnids = list(datasets.known_prompts("imagenet"))[5:8]
    known = {"imagefolder": ["cat", "dog"], "cifar10": datasets.known_prompts("cifar10")}
    for dataset, names in {**known, "imagenet": wnids}.items():
        assert open_images("--data", folders(tmp_path / dataset, names)).dataset == dataset


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
