"""Table 3's synthesis-time matching and D4M-G's class choice."""

import json

import pytest
import torch
from conftest import tree
from PIL import Image
from safetensors.torch import save_file

from distillation import random_real, take_classes
from distillation.gen_syn_image import Job, data_card
from matching import stm
from matching.models import create_model
from scripts.runtime import generator


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two real images of four digits in stage 2's form, 32 px."""
    root = tmp_path_factory.mktemp("images")
    return random_real.main(
        ["--dataset", "digits", "--classes", "0-3", "--ipc", "2", "--save_init_image_path", str(root)]
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-18 with random weights whose running statistics are those of some noise."""
    torch.manual_seed(0)
    model = create_model("resnet18", 4, 32).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(model.state_dict(), path)
    return path


def arguments(images, weights, out, *more):
    argv = ["--image_path", images, "--teacher_checkpoint", weights, "--save_init_image_path", out]
    argv += ["--iterations", 2, "--batch_size", 3, "--device", "cpu", "--num_workers", 0, *more]
    return [str(a) for a in argv]


def test_stm_resumes_to_the_same_bytes(images, weights, tmp_path, capsys):
    whole = stm.main(arguments(images, weights, tmp_path / "a"))
    assert " s, peak memory " in capsys.readouterr().out and "host_mib" in (whole / "timing.json").read_text()
    assert whole.name == f"{images.name}_stm_it2_b3"
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["arm"] == "stm" and manifest["count"] == 8 and manifest["image_size"] == 32
    assert len(json.loads((whole / "images.jsonl").read_text().splitlines()[0])["source"]) > 0
    with Image.open(whole / "3" / "3_0001.png") as made, Image.open(images / "3" / "3_0001.png") as source:
        assert made.size == (32, 32) and made.tobytes() != source.tobytes()
    # two shards, one after the other
    again = tmp_path / "b" / whole.name
    stm.main(arguments(images, weights, tmp_path / "b", "--shard", "0/2"))
    assert not (again / "manifest.json").exists() and len(list(again.rglob("*.png"))) == 6
    stm.main(arguments(images, weights, tmp_path / "b", "--shard", "1/2"))
    assert tree(again) == tree(whole)


def test_stm_refuses(images, weights, tmp_path, refused):
    argv = arguments(images, weights, tmp_path)
    refused(stm.main, [*argv, "--arch", "convnet_w128"], "convnet_w128")
    refused(stm.main, [*argv, "--image_path", tmp_path], "--image_path", tmp_path)


def test_batchnorm_distance_is_the_formula(weights):
    torch.manual_seed(1)
    norm = torch.nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model, x = torch.nn.Sequential(norm, torch.nn.BatchNorm2d(4).eval()), torch.randn(5, 4, 3, 3)
    with stm.BatchNormStatistics(model, 10.0) as statistics:
        between = norm(x)
        model(x)
        rows = [x.permute(1, 0, 2, 3).reshape(4, -1), between.permute(1, 0, 2, 3).reshape(4, -1)]
        distance = [
            torch.linalg.vector_norm(layer.running_mean - r.mean(1))
            + torch.linalg.vector_norm(layer.running_var - r.var(1, correction=0))
            for layer, r in zip(model, rows)
        ]
        assert torch.allclose(statistics.loss(), 10 * distance[0] + distance[1])
    assert not norm._forward_hooks


def test_matching_lowers_both_losses(weights):
    from matching.models import load_teacher

    teacher, _ = load_teacher("resnet18", weights, "digits", [str(c) for c in range(4)], 32)
    x, targets = generator_images(2), torch.arange(2)
    options = dict(mean=(0.5,) * 3, std=(0.5,) * 3, lr=0.05, r_bn=0.01, first_bn_multiplier=10.0, jitter=0)
    first, before = stm.match_batch(teacher, x, targets, generator(0), iterations=1, **options)
    last, after = stm.match_batch(teacher, x, targets, generator(0), iterations=8, **options)
    assert after["ce"] + 0.01 * after["bn"] < before["ce"] + 0.01 * before["bn"]
    assert first.shape == x.shape and last.abs().max() <= 1


def generator_images(count):
    return torch.rand(count, 3, 32, 32, generator=generator(7)) * 2 - 1


def test_schedule_and_batches_are_sre2ls():
    assert [round(stm.cosine_lr(0.25, t, 4000), 4) for t in (0, 2000, 4000)] == [0.25, 0.125, 0.0]
    assert stm.SRE2L == {"iterations": 4000, "lr": 0.25, "r_bn": 0.01, "first_bn_multiplier": 10.0, "batch_size": 100}
    assert stm.default_jitter(224) == 32
    jobs = [Job(c, c, str(c), str(c), i, i) for c in range(5) for i in range(2)]
    batches = stm.class_batches(jobs, 2, 2)
    assert [(i, [job.position for job in batch]) for i, batch in batches][:3] == [(0, [0, 1]), (0, [2, 3]), (0, [4])]
    assert all(job.i == i for i, batch in batches for job in batch)


# ---- D4M-G


def test_take_classes_by_name(images, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(take_classes, "known_prompts", lambda dataset: {"1": "one", "3": "three"})
    argv = ["--image_path", str(images), "--dataset", "digits", "--image_size", "16", "--save_init_image_path"]
    folder = take_classes.main([*argv, str(tmp_path)])
    assert folder.name == f"digits_ipc2_from_{images.name}_imagesize16"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arm"] == "random-g"
    assert [(c["index"], c["folder"]) for c in manifest["classes"]] == [(0, "1"), (1, "3")]
    with Image.open(folder / "3" / "3_0001.png") as image, Image.open(images / "3" / "3_0001.png") as source:
        assert image.size == (16, 16) and image.tobytes() == source.resize((16, 16)).tobytes()
    monkeypatch.setattr(take_classes, "known_prompts", lambda dataset: {"3": "three", "n01": "eleven"})
    refused(take_classes.main, [*argv, tmp_path / "x"], "digits", "n01")


def test_tiny_imagenet_is_within_imagenet():
    from distillation.datasets import known_prompts

    table = {
        "classes": [
            {"folder": f, "prompt": p, "index": n} for n, (f, p) in enumerate(known_prompts("imagenet").items())
        ]
    }
    taken = take_classes.taken_classes("tiny_imagenet", table, "")
    assert len(taken) == 200 and [c["folder"] for c in taken] == list(known_prompts("tiny_imagenet"))
    assert [c["index"] for c in taken] == list(range(200))


def test_cards_name_the_arms():
    for arm in ("stm", "d4m-g", "random-g"):
        assert "Made as: " in data_card({"dataset": "digits", "arm": arm, "ipc": 1, "image_size": 32}, 10)
