"""D4M-G: classes taken out of a larger distilled data set, by folder name."""

import os

import numpy as np
import pytest
from PIL import Image

from distillation import datasets, image_folder, take_classes
from scripts import output
from scripts.runtime import this_process
from tests.conftest import copy, picture, reseal


def distilled(root, folders, ipc=1, size=32):
    """A finished image folder of ImageNet classes; i-th image of class c is picture(10 c + i)."""
    prompts = datasets.known_prompts("imagenet")
    settings = {"dataset": "imagenet", "arm": "d4m", "ipc": ipc, "image_size": size}
    where = ("--save_init_image_path", root, f"imagenet_ipc{ipc}", "images")
    inputs = {"generator": {"model": "tiny"}, "real_images": 7}
    order = {wnid: n for n, wnid in enumerate(prompts)}
    classes = [{"index": order[f], "folder": f, "prompt": f"of {prompts[f]}"} for f in folders]
    with output.Output(*where, settings, inputs, this_process("cpu")) as out:
        jobs = image_folder.list_jobs(classes, ipc, ipc)
        pictures = [Image.fromarray(picture(10 * j.position + j.i, (size, size))) for j in jobs]
        image_folder.save_each(out, jobs, dict(zip(jobs, pictures)).get, size)
        image_folder.finish_images(out, jobs, classes, lambda job: {})
    return out.folder


def test_all_200_classes_of_tiny_imagenet_are_among_imagenets_1000():
    prompts = datasets.known_prompts("imagenet")
    source = {"classes": [{"folder": f, "prompt": p} for f, p in prompts.items()]}
    taken = take_classes.taken_classes("tiny_imagenet", source, "x")
    assert [c["folder"] for c in taken] == list(datasets.known_prompts("tiny_imagenet"))
    assert [c["index"] for c in taken] == list(range(200))


def test_classes_are_taken_by_name_and_resized_as_pillow_does():
    wnids = list(datasets.known_prompts("imagenette"))
    source = distilled("source", sorted([*wnids, "n01443537"]), ipc=2)
    argv = ["--image_path", str(source), "--dataset", "imagenette", "--image_size", "20"]
    folder = take_classes.main(argv)
    assert folder.name == "imagenette_ipc2_from_imagenet_ipc2_imagesize20"
    for name in (f"{wnids[1]}/{wnids[1]}_0001.png", f"{wnids[0]}/{wnids[0]}_0000.png"):
        theirs = Image.open(source / name).resize((20, 20))
        assert np.array_equal(np.array(Image.open(folder / name)), np.array(theirs))
    manifest = image_folder.read_images("--data", folder)
    assert manifest["arm"] == "d4m-g" and manifest["dataset"] == "imagenette"
    assert [c["index"] for c in manifest["classes"]] == list(range(10))
    assert manifest["classes"][0]["prompt"] == "of tench, Tinca tinca"
    assert image_folder.origin(manifest) == {"generator": {"model": "tiny"}, "real_images": 7}
    assert "classes taken out" in (folder / "README.md").read_text()


def test_a_missing_class_is_named(refused):
    source = distilled("source", ["n01440764"])
    argv = ["--image_path", source, "--dataset", "imagenette"]
    refused(take_classes.main, argv, "lacks 9 of its 10 classes", "n02102040")


ODD = {
    "ipc": 3,
    "classes": [{"index": 0, "folder": "../x", "prompt": "x"}],
    "arm": "../x",
    "dataset": "unknown",
}


@pytest.mark.parametrize("name", [*ODD, "an image", "the manifest"])
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
        reseal(mine, **{name: ODD[name]})
    argv = ["--image_path", mine, "--dataset", "imagefolder"]
    refused(take_classes.main, argv, f"--image_path {mine}", words)
    assert not list(mine.parent.glob("output/**/1_0000.png"))


def test_a_dry_run_without_images(capsys):
    take_classes.main(["--image_path", "output/imagenet_ipc10_x", "--dry_run"])
    assert "0 done, 2000 to do" in (printed := capsys.readouterr().out)
    assert "waits for output/imagenet_ipc10_x: python -m distillation.gen_syn_image" in printed
