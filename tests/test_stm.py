"""Synthesis-time matching: the recover step of SRe2L, started from images of stage 2."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from distillation import datasets
from distillation.image_folder import Job
from matching import models, stm
from matching.images import open_images
from scripts.runtime import generator
from tests.conftest import copy, everything, exits, reseal, tree


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two real images of four digits in stage 2's form, 32 px."""
    from distillation import random_real

    flags = ["--dataset", "digits", "--classes", "0-3", "--ipc", "2"]
    root = str(tmp_path_factory.mktemp("images"))
    return random_real.main([*flags, "--save_init_image_path", root])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-18 with random weights whose running statistics are those of some noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.create_model("resnet18", 4, 32).train()
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


def test_shards_give_the_same_bytes(images, weights, capsys):
    whole = stm.main(arguments(images, weights, "a"))
    assert "8 of 8 images made" in capsys.readouterr().out
    assert whole.name == f"{images.name}_stm_it2_b3"
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["arm"] == "stm" and manifest["count"] == 8 and manifest["image_size"] == 32
    assert manifest["inputs"]["source_manifest"]["arguments"]["dataset"] == "digits"
    row = json.loads((whole / "images.jsonl").read_text().splitlines()[0])
    assert row["source"] == "0/0_0000.png" and row["matched"] == "resnet18"
    name = "3/3_0001.png"
    with Image.open(whole / name) as made, Image.open(images / name) as source:
        assert made.size == (32, 32) and made.tobytes() != source.tobytes()
    stm.main(arguments(images, weights, "b", "--shard", "0/2"))
    [again] = [path for path in (whole.parents[1] / "b").iterdir()]
    assert not (again / "manifest.json").exists() and len(list(again.rglob("*.png"))) == 6
    stm.main(arguments(images, weights, "b", "--shard", "1/2"))
    assert tree(again) == tree(whole)
    # stages 3 and 4 take them, and know what they come from
    facts = open_images("--data", whole).facts()
    assert facts["arm"] == "stm" and facts["real_images"] == 542 and facts["generator"] is None


def test_what_cannot_be_matched_is_refused(images, weights, tmp_path, refused):
    argv = arguments(images, weights, "out")
    refused(stm.main, [*argv, "--arch", "convnet_w128"], "convnet_w128")
    refused(stm.main, [*argv, "--image_path", tmp_path], "--image_path", tmp_path)
    refused(stm.main, [*argv, "--lr", "0"], "--lr")
    more = copy(images, tmp_path)
    (more / "0/0_0001.png").rename(more / "0/0_0002.png")
    reseal(more)
    refused(stm.main, [*argv, "--image_path", more], "0/0_0001.png")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_images(images, weights, tmp_path, capsys):
    before = everything(tmp_path)
    with exits(0):
        stm.main(arguments(images, weights, "out", "--dry_run"))
    line = capsys.readouterr().out
    assert line.startswith(f"plan: out/{images.name}_stm_it2_b3: 0 done, 8 to do, 0.0 MiB")
    with exits(0):
        stm.main(["--image_path", "out/imagenet_ipc10_s0.7_g8_kmexpand1", "--dry_run"])
    line = capsys.readouterr().out
    assert "imagenet_ipc10_s0.7_g8_kmexpand1_stm: 0 done, 10000 to do, 1435.5 MiB" in line
    assert "kmexpand1: python -m distillation.gen_syn_image makes it" in line
    assert everything(tmp_path) == before


# ---- SRe2L's


def test_the_batchnorm_distance_is_the_formula():
    draw = generator(1)
    norm = torch.nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_(generator=draw)
    norm.running_var.uniform_(0.5, 2, generator=draw)
    model = torch.nn.Sequential(norm, torch.nn.BatchNorm2d(4).eval())
    x = torch.randn(5, 4, 3, 3, generator=draw)
    with stm.BatchNormStatistics(model, 10.0) as statistics:
        between = norm(x)
        model(x)
        rows = [batch.permute(1, 0, 2, 3).reshape(4, -1) for batch in (x, between)]
        distance = [
            torch.linalg.vector_norm(layer.running_mean - r.mean(1))
            + torch.linalg.vector_norm(layer.running_var - r.var(1, correction=0))
            for layer, r in zip(model, rows)
        ]
        assert torch.allclose(statistics.loss(), 10 * distance[0] + distance[1])
    assert not norm._forward_hooks


def test_matching_lowers_both_losses(weights):
    folders = [str(c) for c in range(4)]
    teacher, _ = models.load_teacher("resnet18", weights, "digits", folders, 32)
    x, targets = torch.rand(2, 3, 32, 32, generator=generator(7)) * 2 - 1, torch.arange(2)

    def match(iterations):
        settings = {"iterations": iterations, "lr": 0.05, "jitter": 0}
        settings |= {"r_bn": 0.01, "first_bn_multiplier": 10.0}
        bar, facts = SimpleNamespace(update=lambda: None), datasets.ALL["digits"]
        return stm.match_batch(teacher, x, targets, generator(0), settings, facts, bar)

    (first, before), (last, after) = match(1), match(8)
    assert after["ce"] + 0.01 * after["bn"] < before["ce"] + 0.01 * before["bn"]
    assert first.shape == x.shape and last.abs().max() <= 1


def test_defaults_schedule_and_batches():
    rates = [round(stm.cosine_lr(0.25, t, 4000), 4) for t in (0, 2000, 4000)]
    assert rates == [0.25, 0.125, 0.0]
    settings = stm.get_args(["--image_path", "x"]).settings
    names = ("iterations", "lr", "r_bn", "first_bn_multiplier", "batch_size")
    assert [settings[name] for name in names] == [4000, 0.25, 0.01, 10.0, 100]
    assert stm.default_jitter(224) == 32
    jobs = [Job(c, c, str(c), str(c), i, i) for c in range(5) for i in range(2)]
    units = stm.class_batches(jobs, 2, 2)
    assert [[job.position for job in unit] for unit in units] == [[0, 1], [2, 3], [4]] * 2
    assert [{job.i for job in unit} for unit in units] == [{0}] * 3 + [{1}] * 3
