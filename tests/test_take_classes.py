"""D4M-G: classes taken out of a larger distilled data set, by folder name."""

import os

import numpy as np
import pytest
from PIL import Image

from distillation import datasets, image_folder, random_real, take_classes
from tests.conftest import copy, picture_folder, reseal

WNIDS = list(datasets.known_prompts("imagenette"))


def of_imagenet(wnids):
    """A finished image folder of some ImageNet classes, two images each."""
    picture_folder("data", wnids)
    flags = ["--dataset", "imagenet", "--data_dir", "data", "--ipc", "2", "--image_size", "32"]
    return random_real.main([*flags, "--classes", *wnids])


def test_all_200_classes_of_tiny_imagenet_are_among_imagenets_1000():
    prompts = datasets.known_prompts("imagenet")
    source = {"classes": [{"folder": f, "prompt": p} for f, p in prompts.items()]}
    taken = take_classes.taken_classes("tiny_imagenet", source, "x")
    assert [c["folder"] for c in taken] == list(datasets.known_prompts("tiny_imagenet"))
    assert [c["index"] for c in taken] == list(range(200))


def test_classes_are_taken_by_name_and_resized_as_pillow_does():
    source = of_imagenet([*WNIDS, "n01443537"])
    argv = ["--image_path", str(source), "--dataset", "imagenette", "--image_size", "20"]
    folder = take_classes.main(argv)
    assert folder.name == f"imagenette_ipc2_from_{source.name}_imagesize20"
    for name in (f"{WNIDS[1]}/{WNIDS[1]}_0001.png", f"{WNIDS[0]}/{WNIDS[0]}_0000.png"):
        theirs = Image.open(source / name).resize((20, 20))
        assert np.array_equal(np.array(Image.open(folder / name)), np.array(theirs))
    manifest = image_folder.read_images("--data", folder)
    assert manifest["arm"] == "random-g" and manifest["dataset"] == "imagenette"
    assert [c["index"] for c in manifest["classes"]] == list(range(10))
    assert manifest["classes"][0]["prompt"] == "tench, Tinca tinca"
    assert image_folder.origin(manifest) == {"generator": None, "real_images": 33}
    assert "classes taken out" in (folder / "README.md").read_text()


def test_a_missing_class_is_named(refused):
    argv = ["--image_path", of_imagenet(WNIDS[:1]), "--dataset", "imagenette"]
    refused(take_classes.main, argv, "lacks 9 of its 10 classes", "n02102040")


FORGED = {"ipc": 3, "dataset": "unknown"}
FORGED |= {"classes": [{"index": 0, "folder": "../x", "prompt": "x"}]}


@pytest.mark.parametrize("name", [*FORGED, "an image", "the manifest"])
def test_images_that_changed_and_odd_or_edited_manifests_are_refused(name, images, refused):
    mine, words = copy(images, "."), ""
    if name == "an image":
        path = mine / "1/1_0000.png"
        data, times = bytearray(path.read_bytes()), path.stat().st_mtime_ns
        data[-20] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times, times))  # noticed also where the clock does not tell
        words = "1/1_0000.png"
    elif name == "the manifest":
        text = (mine / "manifest.json").read_text()
        (mine / "manifest.json").write_text(text.replace('"ipc": 2', '"ipc": 1'))
        words = "edited or damaged"
    else:
        reseal(mine, **{name: FORGED[name]})
    argv = ["--image_path", mine, "--dataset", "imagefolder"]
    refused(take_classes.main, argv, f"--image_path {mine}", words)
    assert not list(mine.parent.glob("output/**/1_0000.png"))


def test_a_dry_run_without_images(capsys):
    take_classes.main(["--image_path", "output/imagenet_ipc10_x", "--dry_run"])
    assert "0 done, 2000 files to do" in (printed := capsys.readouterr().out)
    assert "waits for output/imagenet_ipc10_x: python -m distillation.gen_syn_image" in printed
