"""D4M-G: classes taken out of a larger distilled data set, by folder name."""

import numpy as np
import pytest
from PIL import Image

from distillation import datasets, gen_syn_image, take_classes
from scripts import files, output
from scripts.runtime import this_process
from tests.conftest import copy, exits, picture, reseal


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
        for job in out.todo(jobs, lambda job: [job.file], 1):
            pixels = picture(10 * job.position + job.i, (size, size))
            image_folder.save_png(out, job.file, pixels, size)
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


def test_an_image_that_changed_is_refused(images, refused):
    mine = copy(images, ".")
    Image.fromarray(picture(5, (32, 32))).save(mine / "1/1_0000.png")
    argv = ["--image_path", mine, "--dataset", "imagefolder"]
    refused(take_classes.main, argv, "1/1_0000.png")


ODD = {
    "ipc": 3,
    "classes": [{"index": 0, "folder": "../x", "prompt": "x"}],
    "arm": "../x",
    "dataset": "unknown",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_in_a_manifest(name, images, refused):
    mine = copy(images, ".")
    reseal(mine, **{name: ODD[name]})
    argv = ["--image_path", mine, "--dataset", "imagefolder"]
    refused(take_classes.main, argv, f"--image_path {mine}")
    assert not list(mine.parent.glob("output/**/*.png"))


def test_an_edited_manifest_and_a_dry_run_without_images(images, refused, capsys):
    mine = copy(images, ".")
    text = (mine / "manifest.json").read_text()
    (mine / "manifest.json").write_text(text.replace('"ipc": 2', '"ipc": 1'))
    argv = ["--image_path", mine, "--dataset", "imagefolder"]
    refused(take_classes.main, argv, "edited or damaged")
    with exits(0):
        take_classes.main(["--image_path", "output/gone", "--dry_run"])
    assert "waits for output/gone" in capsys.readouterr().out
    assert files.free_space(".") > 0
