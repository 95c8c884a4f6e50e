"""Networks by name, and a teacher's weights in all their wrappings."""

import argparse
import os
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distillation import datasets
from matching import models
from tests.conftest import copy, reseal

NETTE = list(datasets.known_prompts("imagenette"))
IN_IMAGENET = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # as public listings say


def call(function, *args, **options):
    """For `refused`: a main that takes no flags."""
    return lambda argv: function(*args, **options)


# ---- networks


def test_every_network_is_built_and_sized_as_published():
    # each block of the ConvNet 147,840 after the first 3,840; the head 128 * 16 + 1 per class
    published = {("convnet_w128", 10, 32): 320_010}
    published |= {("convnet_w128", 200, 64): 3_840 + 3 * 147_840 + 200 * 2_049}
    published |= {("resnet18", 1000, 224): 11_689_512, ("resnet50", 1000, 224): 25_557_032}
    published |= {("mobilenet_v2", 1000, 224): 3_504_872, ("swin_t", 1000, 224): 28_288_354}
    small = [(name, 7, 64) for name in ("convnet_mini", "resnet_ap10", "resnet18", "mobilenet_v2")]
    others = [(name, 1000, 224) for name in models.MODELS]
    with torch.device("meta"):
        for name, classes, size in {*published, *small, *others}:
            model = models.create_model(name, classes, size)
            assert model(torch.zeros(2, 3, size, size)).shape == (2, classes)
            found = models.count_parameters(model)
            assert found == published.get((name, classes, size), found)
            if name == "resnet18":  # a small one keeps its map
                assert model.conv1.kernel_size == ((3, 3) if size == 64 else (7, 7))
                assert isinstance(model.maxpool, torch.nn.MaxPool2d) == (size == 224)


def test_unknown_names_are_refused(monkeypatch, refused):
    refused(call(models.model_name, "resnet19"), [], "resnet19", "convnet_w128")
    assert models.model_name("convnet-w128") == "convnet_w128"
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(call(models.create_model, "timm:vit_tiny", 10, 224), [], "timm is not installed")
    for name, reason in (("convnet6", "depth 6"), ("alexnet", "63 px")):
        too_small = call(models.create_model, name, 10, 32)
        refused(too_small, [], "--input_size 32", reason)


# ---- weights


@pytest.fixture(scope="module")
def network():
    """A network of ImageNet's 1000 classes with random weights."""
    torch.manual_seed(0)
    return models.create_model("mobilenet_v2", 1000, 224).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, network):
    path = tmp_path_factory.mktemp("teacher") / "net.pt"
    torch.save(network.state_dict(), path)
    return path


def load(path, dataset="imagenette", folders=NETTE, name="mobilenet_v2", size=224):
    return models.load_teacher(name, path, dataset, folders, size)


def test_a_subset_takes_the_right_columns(network, checkpoint):
    model, facts = load(checkpoint)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), network(x)[:, IN_IMAGENET])
    assert facts["columns"] == IN_IMAGENET and facts["classes"] == 1000
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    mine = load(checkpoint, "imagefolder", ["n01440764", "n02102040"])
    assert mine[1]["columns"] == [0, 217]
    whole = list(datasets.known_prompts("imagenet"))
    assert load(checkpoint, "imagenet", whole)[1]["columns"] is None


def test_weights_in_every_wrapping(tmp_path, network, checkpoint, capsys):
    state, x = network.state_dict(), torch.randn(1, 3, 64, 64)

    def below(prefix, but="nothing"):
        return {("" if k.startswith(but) else prefix) + k: v for k, v in state.items()}

    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9).state_dict()
    average, count = {"n_averaged": torch.tensor(3)}, np.int64(3)
    wrapped = [
        {"state_dict": below("module."), "epoch": 3},
        {"model": below("module._orig_mod."), "args": argparse.Namespace(lr=0.1)},
        # torchvision's older files have no counters of BatchNorm
        {k: v for k, v in state.items() if "num_batches" not in k},
        {"net": below("module."), "acc": np.float64(77), "rng": np.random.get_state()},
        {"model_state_dict": state, "optimizer": optimizer, "epoch": count},
        {"model": state, "model_ema": below("module.") | average},
        below("module.") | average,
        {"state_dict": below("model.") | {"criterion.weight": torch.ones(3)}},  # Lightning's
        below("backbone.", but="classifier."),
        below("_checkpoint_wrapped_module."),
        {"run": {"best": {"weights": {**state, "note": "half"}}}},
        state | below("ema."),
        state | {"criterion.weight": torch.ones(3)},
        below("1.") | {"0.mean": torch.tensor(datasets.ALL["imagenette"].mean).view(1, 3, 1, 1)},
    ]
    save_file(state, tmp_path / "0.safetensors")
    for n, content in enumerate(wrapped):
        torch.save(content, tmp_path / f"{n}.pt", _use_new_zipfile_serialization=n != 4)
    wanted = load(checkpoint)[0](x)
    for path in tmp_path.iterdir():
        model, facts = load(path)
        assert torch.equal(model(x), wanted) and facts["weights"] == "file"
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "taken are the weights called model, of model, model_ema" in said
    )


def test_the_names_of_cifars_usual_resnet(tmp_path):
    model = models.create_model("resnet18", 10, 32).eval()
    state = {k.replace("fc.", "linear."): v for k, v in model.state_dict().items()}
    state = {k.replace("downsample.", "shortcut."): v for k, v in state.items()}
    torch.save({"net": state}, tmp_path / "net.pth")
    folders, x = list(datasets.known_prompts("cifar10")), torch.randn(2, 3, 32, 32)
    loaded, _ = load(tmp_path / "net.pth", "cifar10", folders, "resnet18", 32)
    assert torch.equal(loaded(x), model(x))


def test_a_network_that_one_image_cannot_train_is_refused(refused):
    def check(name, size):
        models.check_single(partial(models.create_model, name, 10, size), size, "--bn_batch 1: it")

    before = torch.random.get_rng_state()
    refused(call(check, "shufflenet_v2_x0_5", 32), [], "--bn_batch 1: it cannot train", "BatchNorm")
    for name, size in (("resnet18", 32), ("convnet_w64", 8)):
        check(name, size)
    assert torch.equal(before, torch.random.get_rng_state())


class Boom:
    """Unpickling this would create a file."""

    def __reduce__(self):
        return open, ("executed", "w")


def test_bad_files_are_one_line(tmp_path, network, checkpoint, refused):
    whole, first = network.state_dict(), "features.0.0.weight"
    cases = {
        "empty": ({"epoch": 1}, ["no state dict"]),
        "shape": (whole | {first: torch.zeros(32, 3, 5, 5)}, ["[32, 3, 5, 5]", "[32, 3, 3, 3]"]),
        "less": ({k: v for k, v in whole.items() if k != first}, [first, "another architecture"]),
        "more": (whole | {"extra": torch.zeros(1)}, ["extra"]),
        "neck": ({f"a.{k}": v for k, v in whole.items()} | {"neck": torch.ones(1)}, ["neck"]),
        "colours": (whole | {"0.std": torch.ones(3)}, ["its 0.std is [1.0, 1.0, 1.0], images of"]),
        "evil": ({"state_dict": Boom()}, ["holds io.open", "only plain tensors"]),
        "whole": (models.create_model("convnet_mini", 2, 32), ["Sequential; if you trust it, sav"]),
        "two": ({"teacher": whole, "student": whole}, ["it holds teacher, student"]),
        "both": ({f"{n}.{k}": v for k, v in whole.items() for n in "ab"}, ["networks: a., b."]),
        "int8": (whole | {first: torch.zeros(32, 3, 3, 3).char()}, [f"{first} is of torch.int8"]),
        "fp8": ({k: v.to(torch.float8_e4m3fn) for k, v in whole.items()}, ["quantised weights"]),
        "sparse": (whole | {first: whole[first].to_sparse()}, [f"{first} is sparse"]),
        "nan": (whole | {first: whole[first] / 0}, [f"{first} holds NaN or infinite"]),
        "none": ({"optimizer": {"state": {0: {"step": torch.ones(1)}}}}, ["it holds optimizer"]),
    }
    for name, (state, words) in cases.items():
        torch.save(state, tmp_path / f"{name}.pt")
        refused(call(load, tmp_path / f"{name}.pt"), [], f"{name}.pt", *words)
    assert not (tmp_path / "executed").exists()
    line = refused(call(load, tmp_path / "whole.pt"), [], "torch.save(x.state_dict()")
    assert "\x1b" not in line
    refused(call(load, tmp_path / "gone.pt"), [], "gone.pt: no such file")
    save_file(whole, tmp_path / "a.pth")
    (tmp_path / "c.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "d.pth").write_text("\n<!DOCTYPE html><html>")
    kinds = {"a": "a safetensors file", "c": "a Git-LFS pointer", "d": "an HTML page"}
    for name, kind in kinds.items():
        refused(call(load, tmp_path / f"{name}.pth"), [], f"{name}.pth: it is {kind}")
    refused(call(load, checkpoint, name="resnet18"), [], "fc.bias", "resnet18")


def test_classes_that_a_head_does_not_have(tmp_path, checkpoint, refused):
    refused(call(load, checkpoint, "imagefolder", ["cat", "dog"]), [], "n01440764", "'cat'")
    torch.save(models.create_model("convnet_mini", 3, 32).state_dict(), tmp_path / "three.pt")
    of_two = ("convnet_mini", tmp_path / "three.pt", "digits", ["0", "1"], 32)
    refused(call(models.load_teacher, *of_two), [], "3 classes", "2")


def test_the_class_order_that_a_file_says(tmp_path, refused, capsys):
    """As a list, {name: column} or {column: name}, beside the weights."""
    folders = list(datasets.known_prompts("cifar10"))
    state = models.create_model("convnet_mini", 10, 32).state_dict()
    moved, path = folders[1:] + folders[:1], tmp_path / "net.pt"
    forms = {
        "classes": list,
        "class_to_idx": lambda order: {name: n for n, name in enumerate(order)},
        "idx_to_class": lambda order: dict(enumerate(order)),
    }
    for key, form in forms.items():
        torch.save({"state_dict": state, "args": argparse.Namespace(**{key: form(moved)})}, path)
        check = call(load, path, "cifar10", folders, "convnet_mini", 32)
        refused(check, [], "its class order is not the images': they are its columns [9, 0, 1")
        torch.save({"state_dict": state, key: form(["plane", *folders[1:]])}, path)
        assert check([])[1]["columns"] is None
    assert "order" not in capsys.readouterr().err


# ---- published weights


def test_published_weights_without_internet(monkeypatch, tmp_path, refused):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for checkpoint in (None, "torchvision"):
        line = refused(call(load, checkpoint, name="resnet18"), [], "resnet18-f37072fd.pth")
        assert f"put it at {tmp_path / 'checkpoints'}" in line
    for chosen, file in (("", "7ebf99e0"), (":IMAGENET1K_V1", "b0353104")):
        refused(call(load, f"torchvision{chosen}"), [], f"mobilenet_v2-{file}.pth")
    refused(call(load, "torchvision:V9"), [], "torchvision:V9: mobilenet_v2 has IMAGENET1K_V1")
    refused(call(load, "torchvision:V9", name="timm:x"), [], "part of timm:x")
    refused(call(load, None, name="resnet18", size=32), [], "32 px", "train_teacher")
    refused(call(load, None, name="convnet_w128"), [], "nobody publishes")


@pytest.fixture
def timm_net(monkeypatch):
    """timm_net(**pretrained_cfg): a module `timm` whose every network is one linear layer."""

    def place(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), classes=1000, **cfg):
        def create(_, pretrained, num_classes=classes):
            head = torch.nn.Linear(3, num_classes)
            net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)
            net.pretrained_cfg = {"mean": mean, "std": std, "input_size": (3, 224, 224), **cfg}
            return net

        monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create))

    return place


def test_timms_weights_want_the_images_that_they_were_trained_on(timm_net, refused):
    def load_timm(size=224):
        return load(None, name="timm:net", size=size)

    timm_net(fixed_input_size=True)
    model, facts = load_timm()
    assert facts["weights"] == "timm pretrained"
    assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 10)
    refused(call(load_timm, 256), [], "--input_size 256", "timm:net takes 224 x 224 px")
    timm_net(fixed_input_size=False)
    assert load_timm(256)[1]["classes"] == 1000  # a convolutional network takes any size
    timm_net(std=(1.0, 1.0, 1.0))
    refused(call(load_timm), [], "timm:net", "std (1.0, 1.0, 1.0)", "(0.229, 0.224, 0.225)")
    timm_net(classes=21_841)
    refused(call(load_timm), [], "21841 classes", "1000")


def test_a_teachers_folder_is_checked(teacher, tmp_path, refused):
    folder = copy(teacher, tmp_path)

    def load_folder(name="convnet_mini", dataset="digits", folders=("0", "1", "2"), size=32):
        return models.load_teacher(name, folder, dataset, folders, size)

    _, facts = load_folder()
    assert facts["weights"] == "train_teacher" and facts["columns"] is None
    assert (facts["arguments"]["arch"], facts["arguments"]["epochs"]) == ("convnet_mini", 1)
    assert load_folder(folders=("0", "2"))[0](torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    refused(call(load_folder, folders=("2", "0")), [], "class order", "[2, 0]")
    refused(call(load_folder, folders=("0", "7")), [], "'7'", "not among")
    refused(call(load_folder, "convnet_w128"), [], "arch", "convnet_mini", "convnet_w128")
    refused(call(load_folder, size=64), [], "image_size", "32", "64")
    refused(call(load_folder, dataset="cifar10"), [], "dataset", "digits", "cifar10")
    reseal(folder, mean=[0.1, 0.2, 0.3])
    refused(call(load_folder), [], "mean", "0.1", "0.5")
    classes = [{"index": c, "folder": str(c)} for c in (0, 1)]
    reseal(folder, mean=[0.5, 0.5, 0.5], classes=classes)
    refused(call(load_folder, folders=("0", "1")), [], "3 classes", "expected 2")
    path = folder / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    os.utime(path, ns=times)  # also where its time does not tell
    refused(call(load_folder), [], "model.safetensors", "changed")
