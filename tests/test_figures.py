"""Every figure from small outputs: what is drawn, its files, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from distillation import gen_prototype
from matching import images as image_sets
from matching.models import create_model
from misc import figures
from tests.conftest import STAGE_1, make_random, picture_folder
from tests.test_paper_tables import fake
from validate import paper_tables

D4M = "s0.7_g8_kmexpand1"


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Two image folders of the digits 0-2, 4 images each."""
    root = tmp_path_factory.mktemp("images")
    return [str(make_random(root, "--seed", seed)) for seed in ("0", "1")]


def drawn(kind, *argv):
    """The figure; it is also written as a PNG and as a PDF."""
    figure = figures.main([kind, *map(str, argv), "--output", "made/figure"])
    assert Path("made/figure.pdf").read_bytes()[:5] == b"%PDF-"
    with Image.open("made/figure.png") as image:
        assert min(image.size) > 100
    return figure


# ---- grids


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_grid_shows_the_images_where_they_belong(two_sets):
    which = ["--classes", "0", "1-2", "--image", "1"]
    figure = drawn("grid", "--images", *two_sets, "--names", "A", "A much longer name", *which)
    [axes] = figure.axes
    sheet = np.asarray(axes.get_images()[0].get_array())
    for r, root in enumerate(two_sets):
        for c in range(3):
            tile = sheet[2 + 34 * r :, 2 + 34 * c :][:32, :32]
            assert (tile == np.asarray(Image.open(f"{root}/{c}/{c}_0001.png"))).all()
    assert ticks(axes.xaxis) == ["zero", "one", "two"]
    assert ticks(axes.yaxis) == ["A", "A much longer name"]
    figure.canvas.draw()
    for label in axes.get_yticklabels():  # a long name fits beside its row
        assert label.get_window_extent().height <= axes.get_window_extent().height / 2


def test_row_is_one_class_with_as_many_images_as_there_are(two_sets):
    [axes] = drawn("row", "--images", *two_sets, "--class_folder", "2", "--count", "9").axes
    assert ticks(axes.xaxis) == ["two", "", "", ""]
    tile = np.asarray(axes.get_images()[0].get_array())[36:68, 104:136]
    assert (tile == np.asarray(Image.open(f"{two_sets[1]}/2/2_0003.png"))).all()


# ---- curves


def made(root, kind, name, seconds, count=0, arm=None, **inputs):
    """A finished folder as far as its time goes; its content is its name."""
    folder = root / kind / name
    folder.mkdir(parents=True)
    manifest = {"arm": arm, "count": count, "content": name, "inputs": inputs}
    (folder / "timing.json").write_text(json.dumps({"process_seconds": seconds}))
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """D4M and random real at two IPCs, STM and D4M-G, with the seconds that their images took."""
    root = tmp_path_factory.mktemp("output")
    networks = "resnet18", "resnet18"
    for ipc, d4m_mean, random_mean in ((10, 30.0, 20.0), (50, 50.0, 40.0)):
        d4m, random, count = f"imagenet_ipc{ipc}_{D4M}", f"imagenet_ipc{ipc}_random", 1000 * ipc
        fake(root, f"d4m{ipc}", "imagenet", ipc, "d4m", d4m, *networks, d4m_mean)
        fake(root, f"random{ipc}", "imagenet", ipc, "random", random, *networks, random_mean)
        hours, stage_1 = 3600 * ipc / 10, f"imagenet-ipc{ipc}-kmexpand1"
        made(root, "prototypes", stage_1, 2 * hours + 36)
        made(root, "images", d4m, 2 * hours + 36, count, "d4m", prototypes=stage_1)
        made(root, "images", random, 36, count, "random")
    made(root, "images", f"{d4m}_stm", hours, count, "stm", source=d4m)
    taken = f"tiny_imagenet_ipc50_from_{d4m}"
    made(root, "images", taken, 36, 200 * ipc, "d4m-g", source=d4m)
    fake(root, "stm", "imagenet", 50, "stm", f"{d4m}_stm", *networks, 45.0)
    fake(root, "d4m-g", "tiny_imagenet", 50, "d4m-g", taken, *networks, 45.0)
    # not the same curve: another model, another strength, another recipe
    d4m = "imagenet", 10, "d4m", f"imagenet_ipc10_{D4M}", *networks
    fake(root, "other1", *d4m, 1.0, n=5, **{"images.generator.model": "sd15-tuned"})
    fake(root, "other2", *d4m[:3], d4m[3].replace("0.7", "0.5"), *networks, 2.0, n=5)
    fake(root, "other3", *d4m, 3.0, n=5, **{"arguments.epochs": 7})
    fake(root, "fewer", *d4m, 4.0, n=1)
    return root


def lines_of(figure):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    lines = [handle[0] if hasattr(handle, "lines") else handle for handle in handles]
    return {label: line.get_xydata().round(4).tolist() for label, line in zip(labels, lines)}


@pytest.mark.parametrize("kind, x_d4m", [("ipc", [10, 50]), ("time", [4.02, 20.02])])
def test_accuracy_over_ipc_and_time(results, kind, x_d4m):
    lines = lines_of(drawn(kind, "--output_root", results, "--dataset", "imagenet"))
    before = [Path(f"made/figure.{form}").read_bytes() for form in ("png", "pdf")]
    drawn(kind, "--output_root", results, "--dataset", "imagenet")
    assert before == [Path(f"made/figure.{form}").read_bytes() for form in ("png", "pdf")]
    assert lines["D4M (ResNet-18)"] == [[x_d4m[0], 30.0], [x_d4m[1], 50.0]]
    assert [y for _, y in lines["Random real (ResNet-18)"]] == [20.0, 40.0]
    paper = lines["D4M (ResNet-18), paper"]
    assert [y for _, y in paper] == [27.9, 55.2, 59.3, 62.6]
    assert paper[0][0] == pytest.approx(10 if kind == "ipc" else 10 * 1000 * 2.7 / 3600)
    others = {label: xy[0][1] for label, xy in lines.items() if "D4M (ResNet-18, " in label}
    expected = {"sd15-tuned": 1.0, "s0.5_g8_kmexpand1": 2.0, "own recipe": 3.0}
    if kind == "time":  # nobody knows what the images at strength 0.5 took
        del expected["s0.5_g8_kmexpand1"]
    assert others == {f"D4M (ResNet-18, {word})": y for word, y in expected.items()}
    assert sum(label.endswith("paper") for label in lines) == len(lines) - 2 - len(others) > 0


def hours(root):
    rows = {Path(row["path"]).parent.name: row for row in paper_tables.find_results(root)}
    return {name: figures.hours(rows[name]) for name in ("d4m50", "random50", "stm", "d4m-g")}


def test_time_is_that_of_all_that_made_the_images(results, tmp_path):
    d4m = 2 * 10 + 2 * 0.01
    expected = {"d4m50": d4m, "random50": 0.01, "stm": d4m + 5, "d4m-g": 0.01 + d4m / 5}
    assert hours(results) == pytest.approx(expected)
    root = shutil.copytree(results, tmp_path / "output")
    timing = root / "prototypes" / "imagenet-ipc50-kmexpand1" / "timing.json"
    seconds = {"process_seconds": 10 * 3600 + 36}
    timing.write_text(json.dumps({**seconds, "cached_seconds": 3600.0}))  # latents of a cache
    assert hours(root)["d4m50"] == pytest.approx(d4m + 1)
    unknown = {"d4m50": None, "random50": pytest.approx(0.01), "stm": None, "d4m-g": None}
    timing.write_text(json.dumps({**seconds, "cached_seconds": None}))
    assert hours(root) == unknown
    shutil.rmtree(timing.parent)
    assert hours(root) == unknown


# ---- features and latents


def test_tsne_takes_ten_of_many_classes_and_opens_no_other_image(monkeypatch):
    names = [f"c{n:02d}" for n in range(19)]
    picture_folder("data", names, 2, "val")
    images = picture_folder("made", names, 2, "train") + "/train"
    save_file(create_model("convnet_mini", 19, 24).state_dict(), "teacher.safetensors")
    opened, original = [], figures.datasets.read_rgb

    def read(path):
        opened.append(path.parent.name)
        return original(path)

    for module in (figures.datasets, image_sets.datasets):
        monkeypatch.setattr(module, "read_rgb", read)
    argv = ["--images", images, images, "--data_dir", "data", "--real_per_class", "1"]
    argv += ["--arch", "convnet_mini", "--teacher_checkpoint", "teacher.safetensors"]
    figure = drawn("tsne", *argv, "--device", "cpu")
    assert sorted(opened) == sorted(5 * names[::2])  # one real, twice two of the set
    first, second = ([points.get_offsets() for points in a.collections] for a in figure.axes)
    assert [len(points) for points in first] == [10, 20]
    assert (first[0] == second[0]).all()  # one embedding for all panels


def test_latents_with_their_prototypes(model):
    argv = [*STAGE_1, *model, "--latent_cache", "latents", "--save_prototype_path", "."]
    folder = gen_prototype.main(argv)
    figure = drawn("latents", "--latent_cache", "latents", "--prototype_path", folder)
    for axes in figure.axes[:3]:
        points, stars, _ = axes.collections
        assert len(points.get_offsets()) == 12 and len(stars.get_offsets()) == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["grid", "--images", "IMAGES", "IMAGES", "--names", "A"], "--names: 1 names for 2"),
        (["grid", "--images", "IMAGES", "--classes", "11"], "--classes 11"),
        (["grid", "--images", "IMAGES", "--image", "4"], "has 4 images"),
        (["ipc", "--output_root", ".", "--dataset", "imagewoof"], "imagewoof"),
        # the paper's curves alone are no figure of what is not there
        (["time", "--output_root", "nowhere"], "nowhere: no such folder"),
        (["latents", "--latent_cache", ".", "--prototype_path", "."], "--prototype_path"),
    ],
)
def test_figures_refuse(two_sets, refused, argv, words):
    refused(figures.main, [two_sets[0] if a == "IMAGES" else a for a in argv], words)
