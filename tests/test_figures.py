"""Every figure from small outputs: what is drawn, its files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_paper_tables import fake

from distillation import gen_prototype, random_real
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
    folders = figures.choose_classes(args.classes, sets[0][1], 10)
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
    assert len(figures.row(figures.get_args(argv)).axes) == 2 * 4  # as many as there are


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """D4M and random real at two IPCs, with the seconds that their images took."""
    root = tmp_path_factory.mktemp("output")
    for arm, means, hours in (("d4m", (30.0, 50.0), 2), ("random", (20.0, 40.0), 0)):
        for ipc, mean in zip((10, 50), means):
            name = images_name("imagenet", ipc, arm)
            fake(root, f"{arm}{ipc}", "imagenet", ipc, arm, name, "resnet18", "resnet18", mean)
            folders = [root / "images" / name]
            folders += [root / "prototypes" / f"imagenet-ipc{ipc}-kmexpand1"] if arm == "d4m" else []
            for folder in folders:
                folder.mkdir(parents=True)
                seconds = 3600 * hours * ipc / 10 + 36
                (folder / "timing.json").write_text(json.dumps({"process_seconds": seconds}))
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
        assert len(lines) == 2 + 6


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
    refused(figures.main, ["grid", "--images", *images, "--image", "4"], "has 4 images")
    refused(figures.main, ["grid", "--images", tmp_path / "no"], "--images")
    refused(figures.main, ["ipc", "--output_root", tmp_path, "--dataset", "imagewoof"], "imagewoof")
    refused(figures.main, ["latents", "--latent_cache", tmp_path, "--prototype_path", tmp_path], "--prototype_path")
