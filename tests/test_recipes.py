"""Every recipe's launcher: its values, its learning rates, and its loss on one stored batch, against the formulas."""

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distillation import random_real
from matching import generate_soft_label
from matching.models import create_model
from matching.soft_labels import EpochLabels, crop_on_cpu, load_pixels, mix, normalise, open_images
from matching.training import chunk_size, lr_factor, seeded
from scripts.files import read_json
from scripts.runtime import WEIGHTS
from validate import train_FKD
from validate.paper_tables import RDED_LR, RECIPES, recipe_differences, recipe_name

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = {"d4m": "", "cda": "_cda", "rded": "_rded", "rd3": "_rd3", "edc": "_edc", "minimax-hard": "_minimax"}


def flags_of(launcher, tmp_path, **variables):
    """The flags that a launcher of validate/ gives its stage, recorded by a stub python."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), **variables}
    out = subprocess.run(
        ["sh", str(ROOT / "validate" / launcher)], env=environment, check=True, capture_output=True, text=True
    ).stdout
    argv = out.split("\0")[:-1]
    assert argv[:2] == ["-m", "validate.train_FKD"]
    return argv[2:]


def parsed(recipe, tmp_path, **variables):
    return train_FKD.get_args(flags_of(f"train_FKD{LAUNCHERS[recipe]}.sh", tmp_path, **variables))


def arguments_of(args, dataset):
    """What results.json will record of these flags."""
    protocol = train_FKD.protocol_of(vars(args), 224)
    labels = "hard" if args.hard_label else "online" if args.online else "stored"
    chunk = chunk_size(protocol["batch_size"], 1, args.gradient_accumulation_steps, args.bn_batch)
    recorded = {"labels": labels, "model": args.model, "dataset": dataset, "bn_batch": chunk, "use_fp16": True}
    return {**recorded, **protocol, **train_FKD.recipe_of(args)._asdict()}


def dataset_of(recipe):
    return "imagenette" if recipe == "minimax-hard" else "imagenet"


@pytest.mark.parametrize("recipe", LAUNCHERS)
def test_a_launcher_makes_its_recipe(recipe, tmp_path):
    arguments = arguments_of(parsed(recipe, tmp_path), dataset_of(recipe))
    assert recipe_differences(recipe, arguments, 10) == [] and recipe_name(arguments, 10) == recipe
    for name in RECIPES[recipe]:
        other = {**arguments, name: 7.5}
        assert f"{name} 7.5" in recipe_differences(recipe, other, 10), f"{name} is no part of what tells {recipe}"
        assert recipe_name(other, 10) != recipe


@pytest.mark.parametrize("recipe", LAUNCHERS)
@pytest.mark.parametrize("ipc", ["10", "50", "100"])
@pytest.mark.parametrize("student", ["resnet18", "mobilenet_v2"])
def test_a_recipe_is_told_at_every_ipc_and_student(recipe, ipc, student, tmp_path):
    for dataset in ("imagenet", "imagenette"):
        args = parsed(recipe, tmp_path, IPC=ipc, STUDENT=student, DATASET=dataset)
        assert recipe_name(arguments_of(args, dataset), int(ipc)) == recipe


def test_hard_labels_have_the_recipe_they_are_the_baseline_of(tmp_path):
    arguments = arguments_of(parsed("d4m", tmp_path), "imagenet") | {"labels": "hard", "loss": "ce", "temperature": 3}
    assert recipe_name(arguments, 10) == "d4m" and recipe_name({**arguments, "bn_batch": 64}, 10) is None


@pytest.mark.parametrize("recipe, name, short", [("rded", "batch_size", 100), ("minimax-hard", "epochs", 2000)])
def test_other_images_have_the_values_of_their_own_ipc(recipe, name, short, tmp_path):
    """IMAGES=imagenet_ipc50_random alone says how many images there are; IPC says it of a folder that does not."""
    dataset, long = dataset_of(recipe), {"batch_size": 200, "epochs": 1500}[name]
    for images in (f"{dataset}_ipc50_random", f"{dataset}_ipc50_s0.7_g8_kmexpand1_stm", "a_ipc50_from_b_ipc10_text"):
        args = parsed(recipe, tmp_path, IMAGES=images)
        assert args.train_dir == f"output/images/{images}" and getattr(args, name) == long
        arguments = arguments_of(args, dataset)
        assert recipe_name(arguments, 50) == recipe and recipe_name(arguments, 10) != recipe
    assert getattr(parsed(recipe, tmp_path, IMAGES="x_ipc9"), name) == short
    assert getattr(parsed(recipe, tmp_path, IMAGES="of_ipcs"), name) == short
    assert getattr(parsed(recipe, tmp_path, IMAGES="mine", IPC="50"), name) == long


# learning rate at epochs 0, E / 2 and E - 1, written out
LEARNING_RATES = {
    "d4m": (300, 1e-3, [1, 0.5, (1 + math.cos(math.pi * 299 / 300)) / 2]),
    "cda": (300, 1e-3, [1, 0.5, (1 + math.cos(math.pi * 299 / 300)) / 2]),
    "rded": (300, 1e-3, [1, (1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(math.pi * 299 / 600)) / 2]),
    "rd3": (400, 1e-3, [1, 0.5, (1 + math.cos(math.pi * 399 / 400)) / 2]),
    "edc": (300, 1e-3, [1, (1 + math.cos(math.pi / 4)) / 2, (1 + math.cos(math.pi * 299 / 600)) / 2]),
    "minimax-hard": (2000, 0.01, [1, 1, 0.04]),
}


@pytest.mark.parametrize("recipe", LAUNCHERS)
def test_learning_rates(recipe, tmp_path):
    args = parsed(recipe, tmp_path)
    epochs, peak, factors = LEARNING_RATES[recipe]
    r = train_FKD.recipe_of(args)
    assert args.epochs == epochs
    for epoch, factor in zip((0, epochs // 2, epochs - 1), factors):
        now = r.lr * lr_factor(r.schedule, epoch, epochs, r.cos_stretch, r.warmup_epochs, r.step_factor)
        assert now == pytest.approx(peak * factor, rel=1e-9)


def test_values_that_depend_on_ipc_or_student(tmp_path):
    for student, lr in RDED_LR.items():
        assert parsed("rded", tmp_path, STUDENT=student).adamw_lr == lr
    assert [parsed("rded", tmp_path, IPC=ipc).batch_size for ipc in ("1", "10", "50", "100")] == [100, 100, 200, 200]
    small = [parsed("rded", tmp_path, IPC=ipc, DATASET="imagenette").batch_size for ipc in ("10", "50")]
    assert small == [50, 100]
    assert parsed("rd3", tmp_path).cos_stretch == 1 and parsed("rd3", tmp_path, STUDENT="resnet50").cos_stretch == 2
    epochs = {ipc: parsed("minimax-hard", tmp_path, IPC=ipc).epochs for ipc in ("10", "20", "50", "100")}
    assert epochs == {"10": 2000, "20": 1500, "50": 1500, "100": 1000}
    edc = parsed("edc", tmp_path)
    assert edc.arch == ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0"]
    assert edc.teacher_checkpoint == ["torchvision"] * 4
    for recipe in LAUNCHERS:
        assert parsed(recipe, tmp_path).bn_refresh == (recipe in ("rded", "rd3"))


# ---- the loss on one stored batch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return random_real.main(["--dataset", "digits", "--ipc", "1", "--save_init_image_path", str(root)])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two networks with random weights, sharp enough that their labels differ from uniform."""
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = create_model("convnet_mini", 10, 32).state_dict()
        last = list(state)[-2]
        state[last] = state[last] * 30
        paths.append(str(tmp_path_factory.mktemp("teacher") / "weights.safetensors"))
        save_file(state, paths[-1])
    return paths


def softmax(x, temperature=1.0):
    e = np.exp((x - x.max(1, keepdims=True)) / temperature)
    return e / e.sum(1, keepdims=True)


def formula(recipe, z, t, y, y2, lam):
    """The mean loss over a batch, in float64.   z student's, t teacher's logits (B, C); y, y2 classes (B,)"""
    rows = np.arange(len(z))
    ce = -lam * np.log(softmax(z)[rows, y]) - (1 - lam) * np.log(softmax(z)[rows, y2])
    if recipe == "minimax-hard":
        return ce.mean()
    if recipe == "edc":
        return (((z - t) ** 2).mean(1) + 0.025 * ce).mean()
    p, q = softmax(z, 20), softmax(t, 20)
    return (q * (np.log(q) - np.log(p))).sum(1).mean()  # no T^2


@pytest.mark.parametrize("recipe", LAUNCHERS)
def test_loss_on_one_stored_batch(recipe, images, teachers, tmp_path):
    argv = flags_of(f"train_FKD{LAUNCHERS[recipe]}.sh", tmp_path)
    own = teachers if recipe == "edc" else teachers[:1]
    common = ["--epochs", "4", "--batch_size", "10", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]
    args = train_FKD.get_args(argv)
    crops = ["--min_scale_crops", str(args.min_scale_crops or 0.08), "--mix_type", args.mix_type]
    teacher = ["--arch", *["convnet_mini"] * len(own), "--teacher_checkpoint", *own]
    labels = generate_soft_label.main(["--data", str(images), "--fkd_path", str(tmp_path), *teacher, *common, *crops])[
        0
    ]
    argv += [
        "--train_dir",
        str(images),
        "--output_dir",
        str(tmp_path / "students"),
        "--model",
        "convnet_mini",
        *common,
    ]
    argv += ["--seeds", "0", "--eval_every", "4"]
    if args.online:
        argv += teacher
    elif args.hard_label:
        argv += ["--color_jitter", "0", "--lighting", "0"]
    else:
        argv += ["--fkd_path", str(labels)]
    rows = read_json(train_FKD.main(argv) / "results.json")["seeds"][0]["rows"]

    stored, _ = open_images("", images), None
    arrays, stored = load_pixels("", stored)
    epoch = EpochLabels(labels, 0, torch.full((10, 2), 32), 10, 10, 32, None)
    batch, logits = epoch.batch(0)
    pixels = crop_on_cpu(arrays, batch.index, batch.crop, batch.flip, 32)
    with seeded(0, WEIGHTS):
        student = create_model("convnet_mini", 10, 32)
    with torch.no_grad():
        z = student.train()(mix(normalise(pixels, (0.5,) * 3, (0.5,) * 3), batch, "cutmix"))
    y = stored.targets[batch.index].numpy()
    expected = formula(recipe, z.double().numpy(), logits.double().numpy(), y, y[batch.partner.numpy()], batch.lam)
    assert rows[0]["loss"] == pytest.approx(expected, rel=2e-4)
    peak = LEARNING_RATES[recipe][1]
    stretch = 2 if recipe in ("rded", "edc") else 1
    factors = (
        [1, 1, 0.2, 0.04] if args.hard_label else [(1 + math.cos(math.pi * e / (4 * stretch))) / 2 for e in range(4)]
    )
    assert [row["lr"] for row in rows] == pytest.approx([peak * f for f in factors])
