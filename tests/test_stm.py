"""Synthesis-time matching: the recover step of SRe2L, started from images of stage 2."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distillation import datasets
from matching import models, stm
from matching.images import open_images
from scripts import files, runtime
from scripts.runtime import generator
from tests.conftest import everything, tree


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-18 with random weights whose running statistics are those of some noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.create_model("resnet18", 3, 32).train()
        with torch.no_grad():
            model(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def arguments(random, weights):
    """arguments(root, *flags): a command line of two steps in batches of two of three classes."""

    def listed(root, *more):
        argv = ["--image_path", random, "--teacher_checkpoint", weights, "--iterations", 2]
        argv += ["--batch_size", 2, "--device", "cpu", "--num_workers", 0]
        return [str(a) for a in (*argv, "--save_init_image_path", root, *more)]

    return listed


def test_shards_give_the_same_bytes(random, arguments, capsys, monkeypatch):
    keys, draw = [], runtime.generator
    monkeypatch.setattr(runtime, "generator", lambda *key: keys.append(key) or draw(*key))
    whole = stm.main(arguments("a", "--seed", "5"))
    assert keys == [(5, runtime.STM, nth) for nth in range(8)]  # every batch has its own crops
    assert "12 of 12 images made" in capsys.readouterr().out
    assert whole.name == f"{random.name}_stm_it2_b2_stmseed5"
    manifest = files.read_json(whole / "manifest.json")
    facts = {"arm": "stm", "count": 12, "image_size": 32, "ipc": 4, "dataset": "digits"}
    assert manifest.items() >= facts.items() and manifest["arguments"]["jitter"] == 5  # 32 / 224
    row = (whole / "images.jsonl").read_text().splitlines()[0]
    assert '"source": "0/0_0000.png"' in row and '"matched": "resnet18"' in row
    name = "2/2_0003.png"
    with Image.open(whole / name) as made, Image.open(random / name) as source:
        assert made.size == (32, 32) and made.tobytes() != source.tobytes()
    again = stm.main(arguments("b", "--seed", "5", "--shard", "0/2"))
    # image i of two classes is a batch, that of the last one the next
    mine = {f"{c}/{c}_000{i}.png" for i in range(4) for c in (0, 1)}
    assert {str(p.relative_to(again)) for p in again.rglob("*.png")} == mine
    stm.main(arguments("b", "--seed", "5", "--shard", "1/2"))
    assert tree(again) == tree(whole)
    # stages 3 and 4 take them, and know what they come from
    facts = open_images("--data", whole).facts()
    assert facts["arm"] == "stm" and facts["real_images"] == 36 and facts["generator"] is None


def test_what_cannot_be_matched_is_refused(arguments, weights, tmp_path, refused, monkeypatch):
    argv = arguments("out")
    refused(stm.main, [*argv, "--arch", "convnet_w128"], "convnet_w128")
    refused(stm.main, [*argv, "--image_path", tmp_path], "--image_path", tmp_path)
    refused(stm.main, [*argv, "--lr", "0"], "--lr")
    assert not Path("out").exists()
    monkeypatch.setattr(stm, "match_batch", lambda teacher, x, *_: (x * torch.nan, {}))
    refused(stm.main, argv, "--lr 0.25: batch 0 became NaN")
    assert not list(Path("out").rglob("*.png"))
    save_file({k: v * 2 for k, v in load_file(weights).items()}, tmp_path / "x.safetensors")
    other = [*argv, "--teacher_checkpoint", tmp_path / "x.safetensors"]
    refused(stm.main, other, "begun with teacher")  # a run is not continued with another teacher


def test_a_dry_run_plans_images(random, arguments, tmp_path, capsys):
    stm.main(arguments("out", "--dry_run"))
    line = capsys.readouterr().out
    assert line.startswith(f"plan: out/{random.name}_stm_it2_b2: 0 done, 12 files to do, 0.0 MiB")
    stm.main(["--image_path", "out/imagenet_ipc10_s0.7_g8_kmexpand1", "--dry_run"])
    line = capsys.readouterr().out
    assert "imagenet_ipc10_s0.7_g8_kmexpand1_stm: 0 done, 10000 files to do, 1435.5 MiB" in line
    assert "kmexpand1: python -m distillation.gen_syn_image makes it" in line
    assert everything(tmp_path) == set()


# ---- SRe2L's


def test_the_batchnorm_distance_is_the_formula():
    draw = generator(1)
    norm = torch.nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_(generator=draw)
    norm.running_var.uniform_(0.5, 2, generator=draw)
    model = torch.nn.Sequential(norm, torch.nn.BatchNorm2d(4).eval())
    x = torch.randn(5, 4, 3, 3, generator=draw)
    rows = [batch.permute(1, 0, 2, 3).reshape(4, -1) for batch in (x, norm(x))]
    expected = [
        torch.linalg.vector_norm(layer.running_mean - r.mean(1))
        + torch.linalg.vector_norm(layer.running_var - r.var(1, correction=0))
        for layer, r in zip(model, rows)
    ]
    with stm.batchnorm_distance(model, 10.0) as distance:
        model(x)
        assert torch.allclose(distance(), 10 * expected[0] + expected[1])
    assert not norm._forward_hooks


def test_matching_lowers_both_losses_along_a_cosine(weights, monkeypatch):
    folders, rates, adam = [str(c) for c in range(3)], [], torch.optim.Adam
    teacher, _ = models.load_teacher("resnet18", weights, "digits", folders, 32)
    x, targets = torch.rand(2, 3, 32, 32, generator=generator(7)) * 2 - 1, torch.arange(2)

    class Noted(adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["betas"] == (0.5, 0.9)  # SRe2L's
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Noted)

    def match(iterations):
        settings = {"iterations": iterations, "lr": 0.05, "jitter": 0}
        settings |= {"r_bn": 0.01, "first_bn_multiplier": 10.0}
        bar, facts = SimpleNamespace(update=lambda: None), datasets.ALL["digits"]
        return stm.match_batch(teacher, x, targets, generator(0), settings, facts, bar)

    (first, before), (last, after) = match(1), match(8)
    assert after["ce"] + 0.01 * after["bn"] < before["ce"] + 0.01 * before["bn"]
    assert first.shape == x.shape and last.abs().max() <= 1
    assert rates[1:] == pytest.approx([0.025 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])


def test_the_defaults_are_sre2ls():
    settings = stm.get_args(["--image_path", "x"]).settings
    names = ("iterations", "lr", "r_bn", "first_bn_multiplier", "batch_size")
    assert [settings[name] for name in names] == [4000, 0.25, 0.01, 10.0, 100]
