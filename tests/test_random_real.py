"""The baseline of real images: the data set's own, chosen by the seed."""

from pathlib import Path

import numpy as np
from PIL import Image

from distillation import image_folder, random_real
from distillation.datasets import choose_images, open_split
from tests.conftest import picture, picture_folder

ARGV = ["--dataset", "digits", "--classes", "0-2", "--ipc", "3", "--image_size", "8"]


def test_the_images_are_the_data_sets_own_and_change_with_the_seed():
    folders = random_real.main(ARGV), random_real.main([*ARGV, "--seed", "1"])
    assert folders[1].name == "digits_ipc3_random_seed1_imagesize8_classes-0-2"
    split = open_split("digits", None)
    real = {split.arrays[row].tobytes() for row in split.items[1]}
    chosen, others = (
        [np.array(Image.open(path)).tobytes() for path in sorted((folder / "1").iterdir())]
        for folder in folders
    )
    assert len(set(chosen)) == 3 and set(chosen) <= real and chosen != others
    manifest = image_folder.read_images("--data", folders[0])
    assert manifest["arm"] == "random" and manifest["classes"][1]["prompt"] == "one"
    assert '"prompt": "zero", "source": "' in (folders[0] / "images.jsonl").read_text()
    assert image_folder.origin(manifest) == {"generator": None, "real_images": 404}


def test_each_class_has_a_choice_of_its_own():
    split = open_split("digits", None, max_per_class=40)
    chosen = choose_images(split, 8, seed=0)
    places = [tuple(map(every.index, some)) for every, some in zip(split.items, chosen.items)]
    assert len(set(places)) == 10
    part = choose_images(open_split("digits", None, classes=["7"], max_per_class=40), 8, seed=0)
    assert part.items == chosen.items[7:8]  # also without the other classes


def test_the_aspect_ratio_is_kept():
    image = Image.fromarray(picture(1, (40, 20)))
    square = random_real.centre_square(image, 10)
    theirs = image.resize((20, 10), Image.Resampling.BILINEAR).crop((5, 0, 15, 10))
    assert np.array_equal(np.array(square), np.array(theirs))


def test_fewer_images_than_ipc_and_bad_images_are_refused(refused):
    refused(random_real.main, [*ARGV, "--max_images_per_class", "2"], "--ipc 3", "only 2 images")
    bad = Path(picture_folder("data", ["cat"]), "train/cat/1.png")
    bad.write_bytes(b"x")
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--ipc", "3"]
    refused(random_real.main, argv, f"{bad}: not an image")
