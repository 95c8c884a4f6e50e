"""Class lists, prompts and folder layouts of every data set; odd images, folders, label files."""

import io
import os
import struct
import unicodedata
import urllib.error
import zlib

import numpy as np
import pytest
import torchvision
from PIL import Image

from distillation import datasets, random_real
from distillation.datasets import BadImage, open_split, read_rgb
from distillation.label_files import known_prompts, read_label_file
from tests.conftest import picture, picture_folder


def opened(argv):
    return open_split(*argv)


def one_pixel(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1), (value, 0, 0)).save(path)


# ---- class lists, prompts, numbers


def test_the_lists_are_in_index_order_and_without_the_releases_mistakes():
    known = {name: known_prompts(name) for name in datasets.ALL}
    assert [len(known[name]) for name in known] == [1000, 10, 10, 100, 200, 10, 100, 10, 0]
    for prompts in known.values():
        assert list(prompts) == sorted(prompts)
        assert all(p == p.strip() and '"' not in p for p in prompts.values())
    in_order = list(known["imagenet"].values())
    assert in_order.index("crane, bird") == 134 and in_order.index("crane, machine") == 517
    for name in ("imagenette", "imagewoof", "imagenet100", "tiny_imagenet"):
        assert known[name].items() <= known["imagenet"].items()
    cifar = list(known["cifar100"].items())
    assert cifar[1] == ("aquarium_fish", "aquarium fish") and cifar[39][0] == "keyboard"


def test_colours_are_those_of_published_weights():
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    imagenet = (tuple(published.mean), tuple(published.std))
    names = ("imagenet", "imagenette", "imagewoof", "imagenet100", "tiny_imagenet", "imagefolder")
    expected = dict.fromkeys(names, imagenet)
    expected["cifar10"] = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected["cifar100"] = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
    for name, colours in expected.items():
        assert (datasets.ALL[name].mean, datasets.ALL[name].std) == colours


def test_digits_are_split_by_class_and_never_overlap():
    train, val = open_split("digits", None), open_split("digits", None, "val")
    assert train.count + val.count == 1797 and train.count == datasets.ALL["digits"].train_images
    for c in range(10):
        assert not set(train.items[c]) & set(val.items[c]) and 43 <= len(val.items[c]) <= 45
    assert train.digest() != val.digest() == open_split("digits", None, "val").digest()


def test_a_part_of_the_classes_keeps_its_class_ids(refused):
    split = open_split("digits", None, classes=["7", "1-2", "9"], max_per_class=4)
    assert split.folders == ("1", "2", "7", "9") and split.class_ids == (1, 2, 7, 9)
    assert [len(items) for items in split.items] == [4] * 4
    refused(lambda argv: open_split("digits", None, classes=argv), ["8-11"], "8-11", "0-9")


def test_class_sizes_are_checked_before_anything_is_loaded(tmp_path, refused):
    picture_folder(tmp_path, ["big"], count=5)
    picture_folder(tmp_path, ["small"], count=3)

    def check(argv):
        datasets.check_class_sizes(open_split("imagefolder", tmp_path), 4, *argv)

    refused(check, ["error"], "--ipc 4", "small", "only 3 images", "--on_small_class repeat")
    check(["repeat"])
    (tmp_path / "train/void").mkdir()
    refused(check, ["repeat"], "void has no images")


# ---- layouts


def test_imagefolders_prompts_are_its_folder_names_or_a_label_file(tmp_path):
    picture_folder(tmp_path, ["tabby_cat", "dog", "Eel"], 1)
    split = open_split("imagefolder", tmp_path)
    assert split.folders == tuple(torchvision.datasets.ImageFolder(tmp_path / "train").classes)
    assert split.prompts == ("Eel", "dog", "tabby cat")
    labels = tmp_path / "labels.txt"
    labels.write_text("tabby_cat\tstriped\ndog\tbarks\nEel\tswims\n")
    prompts = open_split("imagefolder", tmp_path / "train", label_file=labels).prompts
    assert prompts == ("swims", "barks", "striped")


def test_numbers_and_wnids_of_folder_names_stay_out_of_prompts(capsys):
    """Of CUB and Stanford Dogs; where they may be words of the name they stay."""
    birds = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert datasets.folder_prompts(birds) == ["Black footed Albatross", "Laysan Albatross"]
    assert "'001.Black footed Albatross' is 'Black footed" in capsys.readouterr().err
    assert datasets.folder_prompts(["n02085620-Chihuahua"]) == ["Chihuahua"]
    assert datasets.folder_prompts(["0_airplane", "1_bird"]) == ["airplane", "bird"]
    wnids = datasets.folder_prompts(["n01440764", "N02102040"])
    assert wnids == ["tench, Tinca tinca", "English springer, English springer spaniel"]
    for names in (["1-lane", "2.5_ton"], ["3_wheeler", "4_leaf clover"], ["1_lane", "2_lane"]):
        assert datasets.folder_prompts(names) == [name.replace("_", " ") for name in names]


def test_tiny_imagenets_val_is_read_by_its_annotations(tmp_path, refused):
    wnids = list(known_prompts("tiny_imagenet"))
    for n, wnid in enumerate(wnids):
        one_pixel(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        one_pixel(tmp_path / "val" / "images" / f"val_{n}.JPEG", n)
    rows = [f"val_{n}.JPEG\t{wnid}\t0\t0\t63\t63\n" for n, wnid in enumerate(wnids)]
    (tmp_path / "val/val_annotations.txt").write_text("".join(rows))
    val = open_split("tiny_imagenet", tmp_path, "val")
    assert val.folders == tuple(wnids)
    assert [i[0].name for i in val.items][:2] == ["val_0.JPEG", "val_1.JPEG"]
    assert len(open_split("tiny_imagenet", tmp_path).items[0]) == 1
    (tmp_path / "val/val_annotations.txt").write_text("".join(rows[1:]))
    refused(opened, ["tiny_imagenet", tmp_path, "val"], "val_0.JPEG", "val_annotations.txt")


KAGGLE, LINES = "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt"


def test_a_flat_imagenet_val_with_each_of_its_ground_truth_files(tmp_path, refused):
    """Image i is of the i-th wnid read backwards."""
    from scipy.io import savemat

    wnids = list(known_prompts("imagenet"))[::-1]
    one_pixel(tmp_path / "pixel.png")
    (tmp_path / "val").mkdir()
    for i in range(1, 1001):
        os.link(tmp_path / "pixel.png", tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    refused(opened, ["imagenet", tmp_path, "val"], "--data_dir", "no ground truth", KAGGLE)

    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    types = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    synsets = np.array([(i, wnid) for i, wnid in enumerate(wnids, 1)], dtype=types)
    savemat(data / "meta.mat", {"synsets": synsets})
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 " for i, wnid in enumerate(wnids, 1)]
    written = {data / "ILSVRC2012_validation_ground_truth.txt": map(str, range(1, 1001))}
    written |= {tmp_path / LINES: wnids, tmp_path / KAGGLE: ["ImageId,PredictionString", *rows]}
    for path, lines in written.items():
        path.write_text("\n".join(lines) + "\n")
        items = open_split("imagenet", tmp_path, "val").items
        assert all(len(one) == 1 for one in items)
        assert [items[0][0].stem[-4:], items[999][0].stem[-4:]] == ["1000", "0001"]
        path.unlink()


def test_kaggles_imagenet_from_its_top_and_from_its_images(tmp_path, refused):
    wnids, root = list(known_prompts("imagenette")), tmp_path / "kag/ILSVRC/Data/CLS-LOC"
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 " for i, wnid in enumerate(wnids, 1)]
    for i, wnid in enumerate(wnids, 1):
        one_pixel(root / "train" / wnid / "0.JPEG")
        one_pixel(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
        (tmp_path / "kag/ILSVRC/Annotations/CLS-LOC/train" / wnid).mkdir(parents=True)
    (tmp_path / "kag" / KAGGLE).write_text("\n".join(["ImageId,PredictionString", *rows]))
    assert open_split("imagenette", root, "val").items[9][0].stem[-2:] == "10"
    for split in ("train", "val"):
        refused(opened, ["imagenette", tmp_path / "kag", split], f"--data_dir {root})")


DAMAGED = [
    (KAGGLE, b"ImageId,Label\na,b\n"),
    (LINES, b"\xff\xfe\x00"),
    ("meta.mat", b"half a file"),
]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_damaged_ground_truth(name, content, tmp_path, refused):
    (tmp_path / "val").mkdir()
    (tmp_path / name).write_bytes(content)
    refused(opened, ["imagenette", tmp_path, "val"], f"{name}: cannot be read as ground truth")


def test_a_missing_class_is_named_and_a_subset_is_found_in_a_whole_imagenet(tmp_path, refused):
    wnids = list(known_prompts("imagenette"))
    for wnid in [*wnids[:-1], "n01443537"]:
        one_pixel(tmp_path / "train" / wnid / "a.JPEG")
    refused(opened, ["imagenette", tmp_path], wnids[-1], "1 of 10")
    one_pixel(tmp_path / "train" / wnids[-1] / "a.JPEG")
    assert open_split("imagenette", tmp_path).folders == tuple(wnids)


def test_a_root_that_is_missing_and_a_failed_download(tmp_path, refused, monkeypatch):
    words = ("--data_dir: no such folder", "cifar-10-batches")
    refused(lambda argv: open_split("cifar10", None), [], *words)
    refused(opened, ["imagenet", "gone"], "--data_dir gone", "train/<wnid>/")

    def download(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    words = ("--download", "no route to host", "cifar-10-python.tar.gz", "new/data")
    refused(lambda argv: open_split(*argv, download=True), ["cifar10", "new/data"], *words)
    argv = ["--dataset", "cifar10", "--data_dir", "typo", "--download", "--dry_run"]
    refused(random_real.main, argv, "--data_dir typo: no such folder")
    words = ("--download", "not imagenet")
    refused(lambda argv: open_split(*argv, download=True), ["imagenet", "."], *words)


def test_squash_is_the_releases_resize():
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    theirs = torchvision.transforms.Resize((32, 32))(image)
    assert np.array_equal(np.array(datasets.squash(image, 32)), np.array(theirs))


# what is done to a class folder: what the refusal says
ODD_FOLDERS = {
    lambda cat: os.symlink(".", cat / "loop"): "cat/loop: a link to ., a folder that it is in",
    lambda cat: os.symlink("/gone", cat.parent / "dog2"): "dog2 is a broken link, to /gone",
    lambda cat: os.mkfifo(cat / "z.png"): "cat/z.png: not a file",
    lambda cat: cat.rename(cat.with_name("nul")): "'nul': not a safe name",
    lambda cat: (cat.parent / "CAT").mkdir(): "'CAT' and 'cat' are one on some file systems",
}


@pytest.mark.parametrize("change", ODD_FOLDERS, ids=list(ODD_FOLDERS.values()))
def test_odd_folders(change, tmp_path, refused):
    change(picture_folder(tmp_path, ["cat", "dog"]) / "train/cat")
    words = ODD_FOLDERS[change]
    refused(lambda argv: open_split("imagefolder", *argv).fingerprint(), [tmp_path], words)


def test_hidden_files_thumbnails_and_other_formats_are_left_out_and_said(tmp_path, capsys):
    """macOS leaves ._0.png beside 0.png on other file systems."""
    cat = picture_folder(tmp_path, ["cat"]) / "train/cat"
    for name in ("._0.png", "._0.gif", "notes.txt", "Thumbs.db", "a.gif", "b.jfif", "c"):
        (cat / name).write_bytes(b"x")
    for name in ("@eaDir", ".ipynb_checkpoints", "Thumbnails", "../../__MACOSX", "../thumbs"):
        one_pixel(cat / name / "0.png")
    one_pixel(cat.parent / "stray.png")
    items = open_split("imagefolder", tmp_path).items[0]
    assert [path.name for path in items] == ["0.png", "1.png", "2.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "4 hidden or thumbnail folders" in lines[0]
    assert "3 files of other formats are left out, first" in lines[1] and "/cat/" in lines[1]
    assert "1 images beside the class folders are left out, first" in lines[2]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, refused, monkeypatch):
    """Root may read everything, so the error is made here."""
    more, scandir = picture_folder(tmp_path, ["cat", "cat/more"]) / "train/cat/more", os.scandir

    def denied(path):
        if str(path) == str(more):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(opened, ["imagefolder", tmp_path], f"{more}: Permission denied")


# ---- splits

CATS, LONE = ("cat", "dog"), ("cat",)
# class folders of each folder: {split: the folder taken, or words of the refusal}; what is said
SPLITS = [
    ({"Train": CATS, "Test": CATS}, {"train": "Train", "val": "Test"}, "train images are those of"),
    ({"train": CATS, "test": CATS}, {"val": "test"}, "val images are those of test"),
    ({"train": CATS, "valid": CATS, "test": CATS}, {"val": "valid"}, "valid, not test"),
    ({"training_set": CATS, "test_set": CATS}, {"train": "training_set", "val": "test_set"}, ""),
    ({"mine/train": CATS, "mine/val": CATS, "__MACOSX": ()}, {"val": "mine/val"}, "only folder"),
    ({"train/train": CATS, "val": CATS}, {"train": "train/train", "val": "val"}, "only folder"),
    ({"train": CATS}, {"val": "holds train; expected one folder of val images"}, ""),
    ({"train": CATS, "Train": CATS}, {"train": "holds Train, train"}, ""),
    ({"train": CATS, "": CATS}, {"train": "holds cat, dog, train"}, ""),
    ({"seg_train": CATS, "seg_test": CATS, "": ("seg_pred",)}, {"train": "seg_pred, seg_t"}, ""),
    ({"train/a/images": CATS}, {"train": "one class, a/images, of 2 folders, first cat"}, ""),
    ({"": ("cat", "train", "val")}, {"train": "", "val": ""}, ""),  # CIFAR-100 has a class train
    ({"": ("cat", "zoo"), "train_station": CATS}, {"train": ""}, ""),
    ({"cat": LONE, "train": LONE, "zoo": LONE}, {"train": "holds cat, train, zoo; expected"}, ""),
    ({"train": CATS, "val": CATS, "samples": ("cat",)}, {"train": "train", "val": "val"}, ""),
    ({"": ("train", "val")}, {"train": "no class folders in"}, ""),
    ({"cat": LONE}, {"train": ""}, ""),
    ({"data": ("Train", "val"), "": ("previews",)}, {"train": "data would be a class, but"}, ""),
    ({"train/cat": ("train",), "train": ("dog",)}, {"train": "train"}, ""),
    ({"": ("bullet_train", "freight_train", "cat")}, {"train": ""}, ""),
    ({"train": ("train_station", "test_tube")}, {"train": "train"}, ""),
    ({"ILSVRC2012_img_train": CATS, "val2017": CATS}, {"val": "val2017"}, ""),
    ({"trn": CATS, "tst": CATS}, {"train": "trn", "val": "tst"}, ""),
    ({"fold1": CATS, "fold2": CATS}, {"train": ""}, "fold1, fold2, which all hold cat, dog"),
    ({"TrainImages": CATS, "TestImages": CATS}, {"train": "TrainImages", "val": "TestImages"}, ""),
    ({"traindata": CATS, "testdata": CATS}, {"train": "traindata", "val": "testdata"}, ""),
    ({"trainval": CATS, "test": CATS}, {"train": "trainval", "val": "test"}, "those of trainval"),
    ({"a_test": CATS, "b_train": CATS}, {"train": "which all hold cat, dog; if"}, ""),
    ({"train": CATS, "train/val": CATS}, {"train": "train"}, "val is taken as a class, though it"),
]


@pytest.mark.parametrize("folders, expected, said", SPLITS)
def test_the_usual_names_of_splits_are_found(folders, expected, said, tmp_path, refused, capsys):
    for parent, names in folders.items():
        for name in names or ["x"]:
            one_pixel(tmp_path / parent / name / "0.png")
    for split, words in expected.items():
        if " " in words:
            refused(opened, ["imagefolder", tmp_path, split], words)
        else:
            assert datasets.split_folder("--data_dir", tmp_path, split) == tmp_path / words
    assert said in capsys.readouterr().err


def test_the_splits_of_known_data_sets_are_found(tmp_path, refused):
    for dataset, names in (
        ("cifar10", ("TRAIN", "Test")),
        ("imagenette", ("img_train", "img_val")),
    ):
        root, known = tmp_path / "above" / dataset, list(known_prompts(dataset))
        for folder in names:
            for name in known:
                one_pixel(root / folder / name / "0.png")
        for split, folder in zip(("train", "val"), names):
            items = open_split(dataset, root, split).items
            assert len(items) == 10 and items[3][0].parts[-3] == folder
    refused(opened, ["imagenette", tmp_path], "no class folders in", "but above")
    (tmp_path / "above/imagenette").rename(tmp_path / "aside")
    assert open_split("cifar10", tmp_path / "above").count == 10
    for name in known_prompts("cifar10"):
        (root.parent / "cifar10/Test" / name / "0.png").unlink()
        (root.parent / "cifar10/Test" / name).rmdir()
    (root.parent / "cifar10/Test").rmdir()
    refused(opened, ["cifar10", tmp_path / "above", "val"], "holds TRAIN", "one folder of val")


def test_a_class_is_chosen_in_either_unicode_form(tmp_path):
    on_disk, typed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
    picture_folder(tmp_path, [on_disk, "dog"])
    assert open_split("imagefolder", tmp_path, classes=[typed]).folders == (on_disk,)


# ---- label files

DIGITS = list(known_prompts("digits").values())


def lines(prompts=DIGITS, end="\n"):
    return "".join(prompt + end for prompt in prompts).encode()


def keyed(folders):
    return lines([f"{folder}\t{prompt}" for folder, prompt in zip(folders, DIGITS)])


def changed(number, line):
    return lines([*DIGITS[: number - 1], line, *DIGITS[number:]])


# the file: what the refusal says - or None if it is read as if it were well formed
MALFORMED = {
    b"\xef\xbb\xbf" + lines(end="\r\n"): None,
    lines([f'  "{prompt}" ' for prompt in DIGITS]): None,
    b"".join(keyed("0123456789").splitlines(True)[::-1]): None,
    changed(4, ""): "has 9 prompts",
    changed(3, 'two"'): "line 3: has a stray quote mark",
    changed(2, "1\tone\tuno"): "line 2: has more than one tab",
    keyed("0123446789"): "line 6: the folder 4 stands twice",
    changed(3, "2\ttwo"): "some lines have a folder name",
    keyed("012345678x"): "line 10: there is no class folder 'x'",
    keyed("012345678"): "no line for 1 of 10 class folders, first 9",
    lines(DIGITS[:9]): "has 9 prompts, there are 10 classes",
    changed(8, "sev\x00en"): "line 8: holds the control character",
    "\n".join(DIGITS).encode("utf-16"): "not UTF-8",
}


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_label_file_is_normalised_or_refused_with_its_line(content, tmp_path, refused):
    (tmp_path / "labels.txt").write_bytes(content)
    argv, words = [tmp_path / "labels.txt", list(known_prompts("digits"))], MALFORMED[content]
    if words is None:
        assert read_label_file(*argv, "digits") == DIGITS
    else:
        refused(lambda _: read_label_file(*argv), [], f"--label_file_path {argv[0]}", words)


@pytest.mark.parametrize(
    "dataset, change, words",
    [
        ("cifar100", lambda p: ["beaver", *p[:3], *p[4:]], "'beaver' is the prompt of beaver"),
        ("imagenet", lambda p: p[:134] + [p[517]] + p[135:517] + [p[134]] + p[518:], "line 135"),
        ("tiny_imagenet", lambda p: [x.replace(" ", "") for x in p], "lost its spaces"),
    ],
)
def test_the_releases_three_faulty_lists_are_refused(dataset, change, words, tmp_path, refused):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(change(list(known_prompts(dataset).values()))) + "\n")
    folders = list(known_prompts(dataset))
    refused(lambda argv: read_label_file(*argv, folders, dataset), [path], words)


# ---- odd images

RGB = picture(1)


def saved(array_or_image, form, **options):
    is_array = isinstance(array_or_image, np.ndarray)
    stream, image = io.BytesIO(), Image.fromarray(array_or_image) if is_array else array_or_image
    image.save(stream, format=form, **options)
    return stream.getvalue()


PNG, JPEG = saved(RGB, "PNG"), saved(RGB, "JPEG")
HEAD = b"IHDR" + struct.pack(">II", 30000, 30000) + PNG[24:29]
BOMB = PNG[:12] + HEAD + struct.pack(">I", zlib.crc32(HEAD)) + PNG[33:]
OTHER = [Image.fromarray(255 - RGB)]
ANIMATED = saved(RGB, "WEBP", save_all=True, append_images=OTHER, duration=40, lossless=True)
TURNED = Image.Exif()
TURNED[0x0112] = 6
CMYK = Image.fromarray(RGB).convert("CMYK")
ALPHA = np.dstack([RGB, np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))])
GRAY16 = np.linspace(0, 65535, 576).reshape(24, 24).astype(np.uint16)
GRAY8 = np.repeat((GRAY16 / 257).round()[..., None], 3, axis=2)
BITS = RGB[..., 0] > 127
HALVES, SEVENS = np.full((24, 24), 0.5, np.float32), np.full((24, 24), -7, np.int32)
INDEXED = Image.fromarray(RGB).quantize(16)
INDEXED.info["transparency"] = bytes(range(0, 256, 16))

# name: (file name, its bytes, the picture that it is, or None for an error)
ODD = {
    "truncated JPEG": ("x.jpg", JPEG[: len(JPEG) // 2], None),
    "truncated PNG": ("x.png", PNG[:-200], None),
    "empty": ("x.jpg", b"", None),
    "HTML as JPEG": ("x.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", None),
    "bomb: 30,000 x 30,000 declared": ("x.png", BOMB, None),
    "32-bit float TIFF": ("x.tif", saved(HALVES, "TIFF"), None),
    "negative 32-bit integers": ("x.tif", saved(SEVENS, "TIFF"), None),
    "CMYK JPEG": ("x.jpg", saved(CMYK, "JPEG", quality=95), "close"),
    "1 bit": ("x.png", saved(BITS, "PNG"), np.dstack([BITS * 255] * 3)),
    "16-bit gray": ("x.png", saved(GRAY16, "PNG"), GRAY8),
    "palette": ("x.png", saved(INDEXED, "PNG"), np.array(INDEXED.convert("RGBA"))[..., :3]),
    "RGBA": ("x.png", saved(ALPHA, "PNG"), RGB),
    "animated WebP": ("x.webp", ANIMATED, RGB),
    "rotated by EXIF": ("x.png", saved(RGB, "PNG", exif=TURNED), RGB),
    "PNG called .JPEG": ("x.JPEG", PNG, RGB),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_an_error_with_its_path_or_a_defined_picture(name, tmp_path):
    file, data, expected = ODD[name]
    path = tmp_path / file
    path.write_bytes(data)
    if expected is None:
        with pytest.raises(BadImage) as error:
            read_rgb(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return
    found = np.array(read_rgb(path))
    if isinstance(expected, str):
        assert np.abs(found.astype(int) - RGB).mean() < 8
    else:
        assert np.array_equal(found, expected)
