"""23 odd images: each gives a one-line error with its path, or a defined picture; identical ones are warned about."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from reliability import image_folder, picture

from distillation import gen_prototype
from distillation.datasets import BadImage, read_rgb

RGB = picture(1)


def saved(array_or_image, form, **options):
    image = Image.fromarray(array_or_image) if isinstance(array_or_image, np.ndarray) else array_or_image
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def flipped(data, at):
    """One bit of the byte at share `at` turned over."""
    place = int(len(data) * at)
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def png(width, height, depth, colour, rows):
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
CMYK = Image.fromarray(RGB).convert("CMYK")
ALPHA = np.dstack([RGB, np.tile(np.arange(24, dtype=np.uint8) * 10, (24, 1))])
JPEG = saved(RGB, "JPEG")
AS_GRAY = np.repeat(RGB[..., :1], 3, axis=2)

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
    "32-bit float TIFF": ("x.tif", saved(Image.fromarray(np.full((24, 24), 0.5, np.float32)), "TIFF"), None),
    "negative 32-bit integers": ("x.tif", saved(Image.fromarray(np.full((24, 24), -7, np.int32)), "TIFF"), None),
    "CMYK JPEG": ("x.jpg", saved(CMYK, "JPEG", quality=95), "close"),
    "gray": ("x.png", saved(RGB[..., 0], "PNG"), AS_GRAY),
    "gray with alpha": ("x.png", saved(Image.fromarray(RGB).convert("LA"), "PNG"), "luma"),
    "1 bit": ("x.png", saved(Image.fromarray(RGB[..., 0] > 127), "PNG"), np.where(AS_GRAY > 127, 255, 0)),
    "16-bit gray": ("x.png", saved(GRAY16, "PNG"), np.repeat((GRAY16 / 257).round()[..., None], 3, axis=2)),
    "16-bit RGB": (
        "x.png",
        png(24, 24, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(int) * 257)),
        RGB,
    ),
    "palette with transparency": (
        "x.png",
        saved(palette_with_transparency(), "PNG"),
        np.array(palette_with_transparency().convert("RGBA"))[..., :3],
    ),
    "RGBA": ("x.png", saved(ALPHA, "PNG"), RGB),
    "animated WebP": ("x.webp", animated("WEBP"), RGB),
    "rotated by EXIF": ("x.png", rotated_by_exif(), picture(1, (24, 16))),
    "PNG called .JPEG": ("x.JPEG", saved(RGB, "PNG"), RGB),
    "1 x 300 pixels": ("x.png", saved(picture(2, (300, 1)), "PNG"), picture(2, (300, 1))),
}


def test_there_are_23_of_them():
    assert len(ODD) == 23 and len({data for _, data, _ in ODD.values()}) >= 22  # .JPEG is a good PNG


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
        wanted = RGB if expected == "close" else np.array(Image.fromarray(RGB).convert("L"))[..., None]
        assert np.abs(np.array(image).astype(int) - wanted).mean() < 8
    else:
        assert np.array_equal(np.array(image), expected)


def odd_data_set(root):
    """A class of three good images, and one of three and all 23 odd ones."""
    image_folder(root, ["good", "odd"])
    for n, (file, data, _) in enumerate(ODD.values()):
        (root / f"train/odd/{n:02d}_{file}").write_bytes(data)
    return root


def argv(root, tiny_sd, *more):
    flags = ["--dataset", "imagefolder", "--data_dir", root, "--ipc", "2", "--size", "32", "--device", "cpu"]
    return [str(a) for a in [*flags, "--diffusion_checkpoints_path", tiny_sd, "--num_workers", "0", *more]]


def test_skip_leaves_out_the_bad_ones_with_a_list_and_error_names_the_first(tmp_path, tiny_sd, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = odd_data_set(tmp_path / "data")
    bad = [f"{n:02d}_{file}" for n, (file, _, expected) in enumerate(ODD.values()) if expected is None]
    folder = gen_prototype.main(argv(root, tiny_sd, "--on_bad_image", "skip"))
    facts = json.loads((folder / "0001_odd.json").read_text())
    assert sorted(path.rsplit("/", 1)[1] for path in facts["skipped"]) == bad and len(bad) == 11
    assert facts["images"] == 3 + 23 - 11 == sum(facts["cluster_sizes"])
    line = refused(gen_prototype.main, argv(root, tiny_sd, "--save_prototype_path", "b"), "--on_bad_image skip")
    assert any(f"{root}/train/odd/{name}" in line for name in bad)


def test_each_bad_image_alone_stops_stage_1_with_its_path(tmp_path, tiny_sd, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, (file, data, expected) in enumerate(ODD.values()):
        if expected is None:
            root = image_folder(tmp_path / f"data{n}", ["c"])
            (root / f"train/c/{file}").write_bytes(data)
            refused(gen_prototype.main, argv(root, tiny_sd, "--save_prototype_path", f"o{n}"), root / "train/c" / file)
            assert not list((tmp_path / f"o{n}").rglob("*.json")) or not list((tmp_path / f"o{n}").rglob("0000*"))


def test_identical_images_in_a_class_are_warned_about(tmp_path, tiny_sd, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = image_folder(tmp_path / "data", ["c"])
    (root / "train/c/again.png").write_bytes((root / "train/c/0.png").read_bytes())
    gen_prototype.main(argv(root, tiny_sd))
    assert "warning: class c: 1 of 4 images are copies" in capsys.readouterr().err


def test_files_of_other_extensions_are_not_left_out_in_silence(tmp_path, tiny_sd, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = image_folder(tmp_path / "data", ["c"])
    Image.fromarray(RGB).save(root / "train/c/moving.gif")
    gen_prototype.main(argv(root, tiny_sd))
    assert "moving.gif" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_any_flipped_byte_or_cut_is_a_picture_or_a_bad_image(form, tmp_path):
    """2,000 damaged files a format."""
    data, random = saved(RGB, form), np.random.default_rng(0)
    path = tmp_path / f"x.{form.lower()}"
    for _ in range(2000):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 6)):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(0, len(data))] if random.random() < 0.3 else damaged)
        try:
            assert read_rgb(path).mode == "RGB"
        except BadImage as error:
            assert str(path) in str(error)
