"""Every figure from small outputs: what is drawn, its files, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_paper_tables import fake

from distillation import gen_prototype, random_real
from matching import soft_labels
from matching.models import create_model
from misc import figures
from validate.paper_tables import images_name


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two image folders of digits, 4 images a class."""
    root = str(tmp_path_factory.mktemp("images"))
    argv = ["--dataset", "digits", "--ipc", "4", "--save_init_image_path", root]
    return [str(random_real.main([*argv, "--seed", seed])) for seed in ("0", "1")]


def check_files(paths):
    png, pdf = paths
    assert png.suffix == ".png" and pdf.read_bytes()[:5] == b"%PDF-"
    with Image.open(png) as image:
        image.load()
        assert min(image.size) > 100
        return np.asarray(image.convert("RGB"))


def test_grid_shows_the_images_where_they_belong(images, tmp_path):
    argv = ["grid", "--images", *images, "--names", "A", "A much longer name", "--classes", "0", "3-5", "--image", "1"]
    pixels = check_files(figures.main([*argv, "--output", str(tmp_path / "figure4")]))
    args = figures.get_args(argv)
    sets = figures.open_sets(args.images, args.names)
    folders = figures.choose_classes(args.classes, sets[0][1].folders, 10)
    assert folders == ["0", "3", "4", "5"]
    drawn = []
    figure = figures.grid(args)
    for axes in figure.axes:
        drawn.append(np.asarray(axes.get_images()[0].get_array()))
    for r, root in enumerate(images):
        for c, folder in enumerate(folders):
            with Image.open(f"{root}/{folder}/{folder}_0001.png") as image:
                assert (drawn[r * 4 + c] == np.asarray(image.convert("RGB"))).all()
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == ["zero", "three", "four", "five"] and not figure.axes[4].get_title()
    for text in figure.texts:  # a long name fits beside its row
        assert text.get_window_extent().height <= figure.axes[0].get_window_extent().height + 1
    again = figures.main([*argv, "--output", str(tmp_path / "again")])
    assert (np.asarray(Image.open(again[0]).convert("RGB")) == pixels).all()


def test_row_is_one_class(images, tmp_path):
    argv = ["row", "--images", *images, "--class_folder", "7", "--count", "9"]
    check_files(figures.main([*argv, "--output", str(tmp_path / "figure5")]))
    figure = figures.row(figures.get_args(argv))
    assert len(figure.axes) == 2 * 4  # as many as there are
    assert [axes.get_title() for axes in figure.axes] == ["seven"] + [""] * 7


def made(root, kind, name, seconds, count=0, **arguments):
    """A folder of stage 1 or 2, as far as its time goes: `seconds` it took."""
    folder = root / kind / name
    folder.mkdir(parents=True)
    (folder / "timing.json").write_text(json.dumps({"process_seconds": seconds}))
    (folder / "args.json").write_text(json.dumps(arguments))
    (folder / "manifest.json").write_text(json.dumps({"count": count}))
    return arguments


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """D4M and random real at two IPCs, STM and D4M-G, with the seconds that their images took."""
    root = tmp_path_factory.mktemp("output")
    stage1 = {"dataset": "imagenet", "km_expand": 1, "size": 512, "seed": 0, "kmeans": "minibatch", "classes": None}
    stage1 |= {"max_images_per_class": 0, "dtype": "auto"}
    for ipc, d4m_mean, random_mean in ((10, 30.0, 20.0), (50, 50.0, 40.0)):
        d4m, random = (images_name("imagenet", ipc, arm) for arm in ("d4m", "random"))
        for arm, name, mean in (("d4m", d4m, d4m_mean), ("random", random, random_mean)):
            fake(root, f"{arm}{ipc}", "imagenet", ipc, arm, name, "resnet18", "resnet18", mean)
        hours = 3600 * ipc / 10
        made(root, "prototypes", f"imagenet-ipc{ipc}-kmexpand1", 2 * hours + 36)
        prototypes = {"prototype_arguments": {**stage1, "ipc": ipc}, "prototypes": "sha"}
        own = made(root, "images", d4m, 2 * hours + 36, 1000 * ipc, arm="d4m", ipc=ipc, **prototypes)
        made(root, "images", random, 36, 1000 * ipc, arm="random", ipc=ipc)
        from_d4m = {"source": "sha", "source_arguments": own}
        made(root, "images", images_name("imagenet", ipc, "stm"), hours, 1000 * ipc, arm="stm", **from_d4m)
        taken = images_name("tiny_imagenet", ipc, "d4m-g")
        made(root, "images", taken, 36, 200 * ipc, arm="d4m-g", **from_d4m)
    for arm, dataset in (("stm", "imagenet"), ("d4m-g", "tiny_imagenet")):
        fake(root, arm, dataset, 50, arm, images_name(dataset, 50, arm), "resnet18", "resnet18", 45.0)
    # not the same curve: another model, another strength, another recipe
    d4m = "imagenet", 10, "d4m", images_name("imagenet", 10, "d4m"), "resnet18", "resnet18"
    fake(root, "other1", *d4m, 1.0, n=5, generator="sd15-tuned")
    fake(root, "other2", *d4m[:3], d4m[3].replace("s0.7", "s0.5"), *d4m[4:], 2.0, n=5)
    fake(root, "other3", *d4m, 3.0, n=5, epochs=7)
    fake(root, "fewer", *d4m, 4.0, n=1)
    return root


def lines_of(figure):
    return {
        label: np.round(handle[0].get_xydata(), 4).tolist()
        if hasattr(handle, "lines")
        else handle.get_xydata().tolist()
        for handle, label in zip(*figure.axes[0].get_legend_handles_labels())
    }


def test_accuracy_over_ipc_and_time(results, tmp_path):
    for kind, x_d4m in (("ipc", [10, 50]), ("time", [4.02, 20.02])):
        argv = [kind, "--output_root", str(results), "--dataset", "imagenet"]
        check_files(figures.main([*argv, "--output", str(tmp_path / kind)]))
        lines = lines_of(getattr(figures, kind)(figures.get_args(argv)))
        assert lines["D4M (ResNet-18)"] == [[x_d4m[0], 30.0], [x_d4m[1], 50.0]]
        assert [y for _, y in lines["Random real (ResNet-18)"]] == [20.0, 40.0]
        paper = lines["D4M (ResNet-18), paper"]
        assert [y for _, y in paper] == [27.9, 55.2, 59.3, 62.6]
        assert paper[0][0] == pytest.approx(10 if kind == "ipc" else 10 * 1000 * 2.7 / 3600)
        others = {label: [y for _, y in points] for label, points in lines.items() if "D4M (ResNet-18, " in label}
        expected = {"sd15-tuned": [1.0], "s0.5_g8_kmexpand1": [2.0], "own recipe": [3.0]}
        if kind == "time":  # nobody knows what the images at strength 0.5 took
            del expected["s0.5_g8_kmexpand1"]
        assert others == {f"D4M (ResNet-18, {word})": y for word, y in expected.items()}
        assert len(lines) == 2 + len(others) + 6


def test_time_is_that_of_all_that_made_the_images(results):
    hours = {
        Path(row["path"]).parent.name: figures.distillation_seconds(row) / 3600
        for row in figures.find_results(results)
        if row["path"].split("/")[-2] in ("d4m50", "random50", "stm", "d4m-g")
    }
    d4m = 2 * 10 + 2 * 0.01
    assert hours == pytest.approx({"d4m50": d4m, "random50": 0.01, "stm": d4m + 5, "d4m-g": 0.01 + d4m / 5})


def test_time_counts_the_latents_that_a_cache_held(results, tmp_path):
    root = tmp_path / "output"
    shutil.copytree(results, root)
    [row] = [row for row in figures.find_results(root) if Path(row["path"]).parent.name == "d4m50"]
    timing = root / "prototypes" / "imagenet-ipc50-kmexpand1" / "timing.json"
    for cached, hours in ((3600.0, 2 * 10 + 2 * 0.01 + 1), (None, None)):
        timing.write_text(json.dumps({"process_seconds": 10 * 3600 + 36, "cached_seconds": cached}))
        seconds = figures.distillation_seconds(row)
        assert seconds == (None if hours is None else pytest.approx(hours * 3600))


def test_time_with_a_part_missing_is_none(results, tmp_path):
    root = tmp_path / "output"
    shutil.copytree(results, root)
    shutil.rmtree(root / "prototypes" / "imagenet-ipc50-kmexpand1")
    rows = {Path(row["path"]).parent.name: row for row in figures.find_results(root)}
    assert [figures.distillation_seconds(rows[name]) for name in ("d4m50", "stm", "d4m-g")] == [None] * 3
    assert figures.distillation_seconds(rows["d4m10"]) > 0


def test_tsne_of_real_and_synthetic(images, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    save_file(create_model("convnet_mini", 10, 32).state_dict(), weights)
    argv = ["tsne", "--images", *images, "--names", "A", "B", "--arch", "convnet_mini", "--teacher_checkpoint"]
    argv += [str(weights), "--classes", "0-2", "--real_per_class", "8", "--device", "cpu"]
    check_files(figures.main([*argv, "--output", str(tmp_path / "figure7")]))
    figure = figures.tsne(figures.get_args(argv))
    for axes in figure.axes:
        real, own = axes.collections
        assert len(real.get_offsets()) == 3 * 8 and len(own.get_offsets()) == 3 * 4
    first, second = (axes.collections[0].get_offsets() for axes in figure.axes)
    assert (first == second).all()  # one embedding for all panels


def test_tsne_of_many_classes_takes_ten_spread_evenly_and_opens_no_others_images(tmp_path, monkeypatch):
    names = [f"c{n:02d}" for n in range(19)]
    noise = np.random.default_rng(0).integers(0, 256, (2 * len(names), 32, 32, 3), dtype=np.uint8)
    for n, name in enumerate(names):
        for root in ("data/val", "images"):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(noise[2 * n + i]).save(tmp_path / root / name / f"{i}.png")
    torch.manual_seed(0)
    save_file(create_model("convnet_mini", 19, 32).state_dict(), tmp_path / "weights.safetensors")
    opened, original = [], soft_labels.read_rgb
    monkeypatch.setattr(soft_labels, "read_rgb", lambda path: opened.append(path.parent.name) or original(path))
    argv = ["tsne", "--images", str(tmp_path / "images"), "--data_dir", str(tmp_path / "data"), "--device", "cpu"]
    argv += ["--arch", "convnet_mini", "--teacher_checkpoint", str(tmp_path / "weights.safetensors")]
    [axes] = figures.tsne(figures.get_args(argv)).axes
    assert opened == sorted(2 * names[::2])
    assert [len(points.get_offsets()) for points in axes.collections] == [20, 20]


def test_latents_with_their_prototypes(tiny_sd, tmp_path):
    argv = ["--dataset", "digits", "--diffusion_checkpoints_path", str(tiny_sd), "--ipc", "2", "--km_expand", "1"]
    argv += ["--classes", "0-1", "--max_images_per_class", "9", "--latent_cache", str(tmp_path / "latents")]
    argv += ["--num_workers", "0", "--save_prototype_path", str(tmp_path)]
    folder = gen_prototype.main(argv)
    argv = ["latents", "--latent_cache", str(tmp_path / "latents"), "--prototype_path", str(folder)]
    check_files(figures.main([*argv, "--output", str(tmp_path / "latents_figure")]))
    figure = figures.latents(figures.get_args(argv))
    for axes in figure.axes:
        points, stars = axes.collections
        assert len(points.get_offsets()) == 9 and len(stars.get_offsets()) == 2


def test_figures_refuse(images, tmp_path, refused):
    refused(figures.main, ["grid", "--images", *images, "--names", "A"], "--names", "1 names for 2")
    refused(figures.main, ["grid", "--images", *images, "--classes", "11"], "--classes 11")
    refused(figures.main, ["grid", "--images", *images, "--classes", "2-1"], "--classes 2-1", "within 0-9")
    refused(figures.main, ["row", "--images", *images, "--class_folder", "2-1"], "2-1")
    refused(figures.main, ["grid", "--images", *images, "--image", "4"], "has 4 images")
    refused(figures.main, ["grid", "--images", tmp_path / "no"], "--images")
    refused(figures.main, ["ipc", "--output_root", tmp_path, "--dataset", "imagewoof"], "imagewoof")
    for kind in ("ipc", "time"):  # the paper's curves alone are no figure of what is not there
        refused(figures.main, [kind, "--output_root", tmp_path / "nowhere"], "nowhere: no such folder")
    refused(figures.main, ["latents", "--latent_cache", tmp_path, "--prototype_path", tmp_path], "--prototype_path")
