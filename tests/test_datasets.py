"""Class lists, prompts and folder layouts of every data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distillation.datasets import DATASETS, known_prompts, open_split, read_label_file, squash

COUNTS = {
    "imagenet": 1000,
    "imagenette": 10,
    "imagewoof": 10,
    "imagenet100": 100,
    "tiny_imagenet": 200,
    "cifar10": 10,
    "cifar100": 100,
    "digits": 10,
}


def picture(path, value=100, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def test_every_known_data_set_has_its_list_in_index_order():
    for name in DATASETS:
        prompts = known_prompts(name)
        assert len(prompts) == COUNTS.get(name, 0)
        assert list(prompts) == sorted(prompts), name
        assert all(p == p.strip() and '"' not in p for p in prompts.values())


def test_the_prompts_that_the_release_gets_wrong():
    imagenet = known_prompts("imagenet")
    assert (
        list(imagenet.values()).index("crane, bird") == 134 and list(imagenet.values()).index("crane, machine") == 517
    )
    assert imagenet["n01629819"] == "European fire salamander, Salamandra salamandra"
    for name in ("imagenette", "imagewoof", "imagenet100", "tiny_imagenet"):
        assert known_prompts(name).items() <= imagenet.items()
    cifar = list(known_prompts("cifar100").items())
    assert cifar[:2] == [("apple", "apple"), ("aquarium_fish", "aquarium fish")] and cifar[39] == (
        "keyboard",
        "keyboard",
    )


def test_cifar_prompts_are_in_torchvisions_label_order():
    """torchvision's CIFAR classes are alphabetical by construction of the batches' meta file."""
    assert list(known_prompts("cifar10")) == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]


def test_digits_are_split_by_class_and_never_overlap():
    train, val = open_split("digits", None), open_split("digits", None, "val")
    assert sum(map(len, train.items)) + sum(map(len, val.items)) == 1797
    for c in range(10):
        assert not set(train.items[c]) & set(val.items[c]) and 43 <= len(val.items[c]) <= 45
    assert train.digest() != val.digest() == open_split("digits", None, "val").digest()


def test_imagefolder_prompts_are_folder_names_or_the_label_file(tmp_path):
    for name in ("tabby_cat", "dog"):
        picture(tmp_path / "train" / name / "a.png")
    split = open_split("imagefolder", tmp_path)
    assert split.folders == ("dog", "tabby_cat") and split.prompts == ("dog", "tabby cat")
    labels = tmp_path / "labels.txt"
    labels.write_bytes('\ufeffa dog\r\n"a tabby, striped"\r\n'.encode())
    assert open_split("imagefolder", tmp_path, label_file=labels).prompts == ("a dog", "a tabby, striped")
    labels.write_text("tabby_cat\tstriped\ndog\tbarks\n")
    assert open_split("imagefolder", tmp_path / "train", label_file=labels).prompts == ("barks", "striped")


def test_classes_and_max_images_choose_a_part_and_keep_class_ids(tmp_path):
    split = open_split("digits", None, classes=["7", "1-2", "9"], max_per_class=4)
    assert split.folders == ("1", "2", "7", "9") and split.class_ids == (1, 2, 7, 9)
    assert [len(items) for items in split.items] == [4] * 4


def test_unknown_classes_are_refused(refused):
    refused(lambda argv: open_split("digits", None, classes=argv), ["8-11"], "--classes 8-11", "0-9")


def test_tiny_imagenets_real_val_is_read_by_its_annotations(tmp_path):
    wnids = list(known_prompts("tiny_imagenet"))
    for wnid in wnids:
        picture(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    for n in range(len(wnids)):
        picture(tmp_path / "val" / "images" / f"val_{n}.JPEG", n)
    rows = [f"val_{n}.JPEG\t{wnid}\t0\t0\t63\t63\n" for n, wnid in enumerate(wnids)]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    val = open_split("tiny_imagenet", tmp_path, "val")
    assert val.folders == tuple(wnids) and [Path(i[0]).name for i in val.items][:2] == ["val_0.JPEG", "val_1.JPEG"]
    assert len(open_split("tiny_imagenet", tmp_path).items[0]) == 1


@pytest.fixture
def flat_imagenet(tmp_path):
    """val/ with one image a class, flat, class of image i = i-th wnid read backwards."""
    wnids = list(known_prompts("imagenet"))[::-1]
    pixel = picture(tmp_path / "pixel.JPEG", size=(1, 1)).read_bytes()
    (tmp_path / "val").mkdir()
    for i in range(1, 1001):
        (tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(pixel)
    return tmp_path, wnids


def test_flat_imagenet_val_with_each_of_its_ground_truth_files(flat_imagenet, refused):
    root, wnids = flat_imagenet

    def first_image():
        split = open_split("imagenet", root, "val")
        assert all(len(items) == 1 for items in split.items)
        return Path(split.items[0][0]).name, Path(split.items[999][0]).name

    last_first = ("ILSVRC2012_val_00001000.JPEG", "ILSVRC2012_val_00000001.JPEG")
    refused(lambda argv: first_image(), [], "--data_dir", "is flat", "LOC_val_solution.csv")
    kaggle = root / "LOC_val_solution.csv"
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 " for i, wnid in enumerate(wnids, 1)]
    kaggle.write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    assert first_image() == last_first
    kaggle.unlink()
    lines = root / "imagenet_2012_validation_synset_labels.txt"
    lines.write_text("\n".join(wnids) + "\n")
    assert first_image() == last_first
    lines.unlink()
    from scipy.io import savemat

    synsets = np.array([(i, wnid) for i, wnid in enumerate(wnids, 1)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, range(1, 1001))) + "\n")
    assert first_image() == last_first


def test_a_missing_class_folder_is_named(tmp_path, refused):
    wnids = list(known_prompts("imagenette"))
    for wnid in wnids[:-1]:
        picture(tmp_path / "train" / wnid / "a.JPEG")
    refused(lambda argv: open_split("imagenette", tmp_path), [], "--data_dir", wnids[-1], "1 of 10")


def test_a_subset_is_found_in_a_whole_imagenet(tmp_path):
    for wnid in [*known_prompts("imagenette"), "n01443537"]:
        picture(tmp_path / "train" / wnid / "a.JPEG")
    assert open_split("imagenette", tmp_path).folders == tuple(known_prompts("imagenette"))


@pytest.mark.parametrize(
    "dataset, change, words",
    [
        ("cifar100", lambda p: sorted(p, reverse=True), "line 1"),
        ("imagenet", lambda p: p[:134] + [p[517]] + p[135:517] + [p[134]] + p[518:], "line 135"),
        ("tiny_imagenet", lambda p: [x.replace(" ", "") for x in p], "lost its spaces"),
    ],
)
def test_the_releases_three_faulty_lists_are_refused(tmp_path, refused, dataset, change, words):
    (tmp_path / "labels.txt").write_text("\n".join(change(list(known_prompts(dataset).values()))) + "\n")
    refused(
        lambda argv: read_label_file(argv[0], list(known_prompts(dataset)), dataset), [tmp_path / "labels.txt"], words
    )


def test_squash_is_the_releases_resize():
    from torchvision.transforms import Resize

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    assert np.array_equal(np.array(squash(image, 32)), np.array(Resize((32, 32))(image)))
