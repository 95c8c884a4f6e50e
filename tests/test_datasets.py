"""Class lists, prompts and folder layouts of every data set; odd images, folders, label files."""

import io
import os
import struct
import urllib.error
import zlib

import numpy as np
import pytest
import torchvision
from PIL import Image

from distillation import datasets
from distillation.datasets import BadImage, open_split, read_rgb
from distillation.label_files import known_prompts, read_label_file
from tests.conftest import picture, picture_folder

COUNTS = {"imagenet": 1000, "imagenette": 10, "imagewoof": 10, "imagenet100": 100}
COUNTS |= {"tiny_imagenet": 200, "cifar10": 10, "cifar100": 100, "digits": 10, "imagefolder": 0}


def opened(argv):
    return open_split(*argv)


def one_pixel(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (1, 1), (value, 0, 0)).save(path)


# ---- class lists and prompts


@pytest.mark.parametrize("name", datasets.ALL)
def test_a_data_sets_list_is_in_index_order(name):
    prompts = known_prompts(name)
    assert len(prompts) == COUNTS[name] and list(prompts) == sorted(prompts)
    assert all(p == p.strip() and '"' not in p for p in prompts.values())


def test_the_prompts_that_the_release_gets_wrong():
    imagenet = known_prompts("imagenet")
    in_order = list(imagenet.values())
    assert in_order.index("crane, bird") == 134 and in_order.index("crane, machine") == 517
    assert imagenet["n01629819"] == "European fire salamander, Salamandra salamandra"
    for name in ("imagenette", "imagewoof", "imagenet100", "tiny_imagenet"):
        assert known_prompts(name).items() <= imagenet.items()
    cifar = list(known_prompts("cifar100").items())
    assert cifar[:2] == [("apple", "apple"), ("aquarium_fish", "aquarium fish")]
    assert cifar[39] == ("keyboard", "keyboard")


def test_colours_are_those_of_published_weights():
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    imagenet = (tuple(published.mean), tuple(published.std))
    names = ("imagenet", "imagenette", "imagewoof", "imagenet100", "tiny_imagenet", "imagefolder")
    expected = dict.fromkeys(names, imagenet)
    expected["cifar10"] = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    expected["cifar100"] = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
    for name, colours in expected.items():
        assert (datasets.ALL[name].mean, datasets.ALL[name].std) == colours


def test_a_data_set_without_a_teacher_recipe_is_an_error():
    with pytest.raises(TypeError, match="teacher"):
        datasets.DataSet(datasets.in_folders, "folders", train_images=None)
    assert datasets.ALL["imagenet"].teacher == (90, 256, 0.1, 1e-4, 5, "rrc", 0.5)


def test_digits_are_split_by_class_and_never_overlap():
    train, val = open_split("digits", None), open_split("digits", None, "val")
    assert train.count + val.count == 1797 and train.count == datasets.ALL["digits"].train_images
    for c in range(10):
        assert not set(train.items[c]) & set(val.items[c]) and 43 <= len(val.items[c]) <= 45
    assert train.digest() != val.digest() == open_split("digits", None, "val").digest()


def test_imagefolders_prompts_are_its_folder_names_or_a_label_file(tmp_path):
    picture_folder(tmp_path, ["tabby_cat", "dog"], 1)
    split = open_split("imagefolder", tmp_path)
    assert split.folders == ("dog", "tabby_cat") and split.prompts == ("dog", "tabby cat")
    labels = tmp_path / "labels.txt"
    labels.write_bytes('\ufeffa dog\r\n"a tabby, striped"\r\n'.encode())
    prompts = open_split("imagefolder", tmp_path, label_file=labels).prompts
    assert prompts == ("a dog", "a tabby, striped")
    labels.write_text("tabby_cat\tstriped\ndog\tbarks\n")
    prompts = open_split("imagefolder", tmp_path / "train", label_file=labels).prompts
    assert prompts == ("barks", "striped")
    picture_folder(tmp_path, ["Eel"], 1)  # class indices are those of torchvision's ImageFolder
    theirs = torchvision.datasets.ImageFolder(tmp_path / "train").classes
    assert list(open_split("imagefolder", tmp_path).folders) == theirs


def test_a_part_of_the_classes_keeps_its_class_ids(refused):
    split = open_split("digits", None, classes=["7", "1-2", "9"], max_per_class=4)
    assert split.folders == ("1", "2", "7", "9") and split.class_ids == (1, 2, 7, 9)
    assert [len(items) for items in split.items] == [4] * 4
    refused(lambda argv: open_split("digits", None, classes=argv), ["8-11"], "8-11", "0-9")


# ---- layouts


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
    refused(opened, ["tiny_imagenet", tmp_path, "val"], "val_0.JPEG")


def test_a_flat_imagenet_val_with_each_of_its_ground_truth_files(tmp_path, refused):
    """Image i is of the i-th wnid read backwards."""
    from scipy.io import savemat

    wnids = list(known_prompts("imagenet"))[::-1]
    one_pixel(tmp_path / "pixel.png")
    (tmp_path / "val").mkdir()
    for i in range(1, 1001):
        os.link(tmp_path / "pixel.png", tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")

    def is_read():
        items = open_split("imagenet", tmp_path, "val").items
        assert all(len(one) == 1 for one in items)
        assert [items[0][0].stem[-4:], items[999][0].stem[-4:]] == ["1000", "0001"]

    argv = ["imagenet", tmp_path, "val"]
    refused(opened, argv, "--data_dir", "is flat", "LOC_val_solution.csv")
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 " for i, wnid in enumerate(wnids, 1)]
    kaggle = tmp_path / "LOC_val_solution.csv"
    kaggle.write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    is_read()
    kaggle.unlink()
    (tmp_path / GROUND_TRUTH_LINES).write_text("\n".join(wnids) + "\n")
    is_read()
    (tmp_path / GROUND_TRUTH_LINES).unlink()
    types = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    synsets = np.array([(i, wnid) for i, wnid in enumerate(wnids, 1)], dtype=types)
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": synsets})
    ids = "\n".join(map(str, range(1, 1001))) + "\n"
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(ids)
    is_read()


GROUND_TRUTH_LINES = "imagenet_2012_validation_synset_labels.txt"
DAMAGED = {
    "a column is missing": ("LOC_val_solution.csv", b"ImageId,Label\na,b\n", "KeyError"),
    "a wnid is missing": ("LOC_val_solution.csv", b"ImageId,PredictionString\na,\n", "IndexError"),
    "not text": (GROUND_TRUTH_LINES, b"\xff\xfe\x00", "UnicodeDecodeError"),
    "not MATLAB's": ("meta.mat", b"half a file", "meta.mat"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_ground_truth(what, tmp_path, refused):
    name, content, word = DAMAGED[what]
    (tmp_path / "val").mkdir()
    (tmp_path / name).write_bytes(content)
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    refused(opened, ["imagenette", tmp_path, "val"], name, "ground truth", word)


def test_a_missing_class_is_named_and_a_subset_is_found_in_a_whole_imagenet(tmp_path, refused):
    wnids = list(known_prompts("imagenette"))
    for wnid in [*wnids[:-1], "n01443537"]:
        one_pixel(tmp_path / "train" / wnid / "a.JPEG")
    refused(opened, ["imagenette", tmp_path], wnids[-1], "1 of 10")
    one_pixel(tmp_path / "train" / wnids[-1] / "a.JPEG")
    assert open_split("imagenette", tmp_path).folders == tuple(wnids)


def test_a_root_that_is_missing_and_a_failed_download(tmp_path, refused, monkeypatch):
    refused(lambda argv: open_split("cifar10", None), [], "--data_dir: missing", "cifar-10-batches")
    refused(opened, ["imagenet", "gone"], "--data_dir gone", "train/<wnid>/")

    def download(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    words = (tmp_path, "no route to host", "cifar-10-batches-py")
    refused(lambda argv: open_split(*argv, download=True), ["cifar10", tmp_path], *words)


def test_squash_is_the_releases_resize():
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    theirs = torchvision.transforms.Resize((32, 32))(image)
    assert np.array_equal(np.array(datasets.squash(image, 32)), np.array(theirs))


# ---- odd folders


ODD_FOLDERS = {
    "a loop": lambda cat: os.symlink(".", cat / "loop"),
    "a broken link": lambda cat: os.symlink("/gone/dog", cat.parent / "dog2"),
    "a pipe": lambda cat: os.mkfifo(cat / "z.png"),
    "a device": lambda cat: cat.rename(cat.with_name("nul")),
    "one on some file systems": lambda cat: (cat.parent / "CAT").mkdir(),
}
WORDS = {
    "a loop": "cat/loop: a link to ., a folder that it is in",
    "a pipe": "cat/z.png: not a file",
}
WORDS |= {
    "a broken link": "dog2 is a broken link, to /gone/dog",
    "a device": "'nul': not a safe name",
}


@pytest.mark.parametrize("what", ODD_FOLDERS)
def test_odd_folders(what, tmp_path, refused):
    ODD_FOLDERS[what](picture_folder(tmp_path, ["cat", "dog"]) / "train/cat")
    words = WORDS.get(what, f"'CAT' and 'cat' are {what}")
    refused(lambda argv: open_split("imagefolder", *argv).fingerprint(), [tmp_path], words)


def test_hidden_files_are_no_images_and_other_formats_are_warned_about(tmp_path, capsys):
    """macOS leaves ._0.png beside 0.png on other file systems."""
    cat = picture_folder(tmp_path, ["cat"]) / "train/cat"
    (cat / "._0.png").write_bytes(b"x")
    Image.fromarray(picture(1)).save(cat / "moving.gif")
    items = open_split("imagefolder", tmp_path).items[0]
    assert [path.name for path in items] == ["0.png", "1.png", "2.png"]
    assert "moving.gif" in capsys.readouterr().err


# ---- label files

DIGITS = list(known_prompts("digits").values())


def lines(prompts=DIGITS, end="\n"):
    return "".join(prompt + end for prompt in prompts).encode()


def keyed(folders):
    return lines([f"{folder}\t{prompt}" for folder, prompt in zip(folders, DIGITS)])


def changed(number, line):
    return lines([*DIGITS[: number - 1], line, *DIGITS[number:]])


# name: (the file, what the refusal says - or None if it is read as if it were well formed)
MALFORMED = {
    "byte order mark": (b"\xef\xbb\xbf" + lines(), None),
    "CR LF": (lines(end="\r\n"), None),
    "quotes around, spaces outside": (lines([f'  "{prompt}" ' for prompt in DIGITS]), None),
    "folders in another order": (b"".join(keyed("0123456789").splitlines(True)[::-1]), None),
    "empty": (b"", "line 1: is blank"),
    "blank line": (changed(4, ""), "line 4: is blank"),
    "stray quote": (changed(3, 'two"'), "line 3: has a stray quote mark"),
    "two tabs": (changed(2, "1\tone\tuno"), "line 2: has more than one tab"),
    "a folder twice": (keyed("0123446789"), "line 6: the folder 4 stands twice"),
    "a folder in one line": (changed(3, "2\ttwo"), "some lines have a folder name"),
    "an unknown folder": (keyed("012345678x"), "line 10: there is no class folder 'x'"),
    "a folder is missing": (keyed("012345678"), "no line for 1 class folders, first 9"),
    "wrong count": (lines(DIGITS[:9]), "has 9 prompts, there are 10 classes"),
    "wrong order": (lines(DIGITS[::-1]), "line 1: 'nine' is the prompt of 9"),
    "control character": (changed(8, "sev\x00en"), "line 8: holds the control character"),
    "UTF-16": ("\n".join(DIGITS).encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_label_file_is_normalised_or_refused_with_its_line(name, tmp_path, refused):
    content, words = MALFORMED[name]
    (tmp_path / "labels.txt").write_bytes(content)
    argv = [tmp_path / "labels.txt", list(known_prompts("digits")), "digits"]
    if words is None:
        assert read_label_file(*argv) == DIGITS
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


def flipped(data, at):
    """One bit of the byte at share `at` turned over."""
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def png(width, height, depth, colour, rows):
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def palette_with_transparency():
    image = Image.fromarray(RGB).quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def animated(form):
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    return saved(first, form, save_all=True, append_images=[second], duration=40, lossless=True)


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(1, (24, 16)), "PNG", exif=exif)


GRAY16 = np.linspace(0, 65535, 576).reshape(24, 24).astype(np.uint16)
GRAY8 = np.repeat((GRAY16 / 257).round()[..., None], 3, axis=2)
ROWS16 = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(int) * 257)
CMYK = Image.fromarray(RGB).convert("CMYK")
ALPHA = np.dstack([RGB, np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))])
JPEG = saved(RGB, "JPEG")
AS_GRAY = np.repeat(RGB[..., :1], 3, axis=2)
AS_BITS = np.where(AS_GRAY > 127, 255, 0)
PALETTE = np.array(palette_with_transparency().convert("RGBA"))[..., :3]
HALVES, SEVENS = np.full((24, 24), 0.5, np.float32), np.full((24, 24), -7, np.int32)

# name: (file name, its bytes, the picture that it is, or None for an error)
ODD = {
    "truncated JPEG": ("x.jpg", JPEG[: len(JPEG) // 2], None),
    "truncated PNG": ("x.png", saved(RGB, "PNG")[:-200], None),
    "bit-flipped PNG": ("x.png", flipped(saved(RGB, "PNG"), 0.5), None),
    "bit-flipped JPEG header": ("x.jpg", flipped(JPEG, 0.0), None),
    "empty": ("x.jpg", b"", None),
    "HTML as JPEG": ("x.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", None),
    "only zeros, as after a crash": ("x.jpg", bytes(4096), None),
    "bomb: 30,000 x 30,000 declared": ("x.png", png(30000, 30000, 8, 2, b"\0"), None),
    "zero pixels wide": ("x.png", png(0, 16, 8, 2, b""), None),
    "32-bit float TIFF": ("x.tif", saved(Image.fromarray(HALVES), "TIFF"), None),
    "negative 32-bit integers": ("x.tif", saved(Image.fromarray(SEVENS), "TIFF"), None),
    "CMYK JPEG": ("x.jpg", saved(CMYK, "JPEG", quality=95), "close"),
    "gray": ("x.png", saved(RGB[..., 0], "PNG"), AS_GRAY),
    "gray with alpha": ("x.png", saved(Image.fromarray(RGB).convert("LA"), "PNG"), "luma"),
    "1 bit": ("x.png", saved(Image.fromarray(RGB[..., 0] > 127), "PNG"), AS_BITS),
    "16-bit gray": ("x.png", saved(GRAY16, "PNG"), GRAY8),
    "16-bit RGB": ("x.png", png(24, 24, 16, 2, ROWS16), RGB),
    "palette with transparency": ("x.png", saved(palette_with_transparency(), "PNG"), PALETTE),
    "RGBA": ("x.png", saved(ALPHA, "PNG"), RGB),
    "animated WebP": ("x.webp", animated("WEBP"), RGB),
    "rotated by EXIF": ("x.png", rotated_by_exif(), picture(1, (24, 16))),
    "PNG called .JPEG": ("x.JPEG", saved(RGB, "PNG"), RGB),
    "1 x 300 pixels": ("x.png", saved(picture(2, (300, 1)), "PNG"), picture(2, (300, 1))),
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
    image = read_rgb(path)
    assert image.mode == "RGB"
    if isinstance(expected, str):
        luma = np.array(Image.fromarray(RGB).convert("L"))[..., None]
        wanted = RGB if expected == "close" else luma
        assert np.abs(np.array(image).astype(int) - wanted).mean() < 8
    else:
        assert np.array_equal(np.array(image), expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_any_flipped_byte_or_cut_is_a_picture_or_a_bad_image(form, tmp_path):
    """2,000 damaged files per format."""
    data, draw = saved(RGB, form), np.random.default_rng(0)
    path = tmp_path / f"x.{form.lower()}"
    for _ in range(2000):
        damaged = bytearray(data)
        for place in draw.integers(0, len(data), draw.integers(1, 6)):
            damaged[place] = draw.integers(0, 256)
        end = draw.integers(0, len(data)) if draw.random() < 0.3 else len(data)
        path.write_bytes(damaged[:end])
        try:
            assert read_rgb(path).mode == "RGB"
        except BadImage as error:
            assert str(path) in str(error)


def test_class_sizes_are_checked_before_anything_is_loaded(tmp_path, refused):
    picture_folder(tmp_path, ["big"], count=5)
    picture_folder(tmp_path, ["small"], count=3)

    def check(argv):
        datasets.check_class_sizes(open_split("imagefolder", tmp_path), 4, *argv)

    refused(check, ["error"], "--ipc 4", "small", "only 3 images", "--on_small_class repeat")
    check(["repeat"])
    (tmp_path / "train/void").mkdir()
    refused(check, ["repeat"], "void has no images")
