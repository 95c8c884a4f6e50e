"""Each recipe's launcher, through stage 4: its loss on one batch, by the formula in numpy."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distillation import random_real
from matching import batches, generate_soft_label, images, labels, models, training
from matching.crops import crop_on_cpu
from scripts import files
from scripts.runtime import WEIGHTS
from tests.test_launchers import commands
from validate import train_FKD

SMALL = ["--epochs", "4", "--batch_size", "10", "--input_size", "32", "--num_workers", "0"]
SMALL += ["--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One real digit per class."""
    root = str(tmp_path_factory.mktemp("images"))
    return random_real.main(["--dataset", "digits", "--ipc", "1", "--save_init_image_path", root])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two networks with random weights, sharp enough that their labels differ from uniform."""
    paths = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = models.create_model("convnet_mini", 10, 32).state_dict()
        last = list(state)[-2]
        state[last] = state[last] * 30
        paths.append(str(tmp_path_factory.mktemp("teacher") / "weights.safetensors"))
        save_file(state, paths[-1])
    return paths


def softmax(x, temperature=1.0):
    e = np.exp((x - x.max(1, keepdims=True)) / temperature)
    return e / e.sum(1, keepdims=True)


def formula(recipe, z, t, y, y2, lam):
    """The mean loss over a batch.   z student's, t teacher's logits (B, C); y, y2 classes (B,)"""
    rows = np.arange(len(z))
    ce = -lam * np.log(softmax(z)[rows, y]) - (1 - lam) * np.log(softmax(z)[rows, y2])
    if recipe == "_minimax":
        return ce.mean()
    if recipe == "_edc":
        return (((z - t) ** 2).mean(1) + 0.025 * ce).mean()
    p, q = softmax(z, 20), softmax(t, 20)
    return (q * (np.log(q) - np.log(p))).sum(1).mean()  # no T^2


@pytest.mark.parametrize("recipe", ["", "_cda", "_rded", "_rd3", "_edc", "_minimax"])
def test_the_loss_of_a_recipe_on_one_batch(recipe, made, teachers, tmp_path):
    [(_, _, argv)] = commands(f"validate/train_FKD{recipe}.sh")
    args = train_FKD.get_args(argv)
    own = teachers if recipe == "_edc" else teachers[:1]
    teacher = ["--arch", *["convnet_mini"] * len(own), "--teacher_checkpoint", *own]
    drawn = ["--min_scale_crops", str(args.min_scale_crops), "--mix_type", args.mix_type]
    flags = ["--data", str(made), "--fkd_path", str(tmp_path), *teacher, *SMALL, *drawn]
    [stored] = generate_soft_label.main(flags)
    argv = [*argv, *SMALL, "--train_dir", str(made), "--model", "convnet_mini", "--seeds", "0"]
    argv += ["--bn_batch", "10", "--eval_every", "4", "--output_dir", str(tmp_path / "students")]
    if args.online:
        argv += teacher
    elif args.hard_label:
        argv += ["--color_jitter", "0", "--lighting", "0"]
    else:
        argv += ["--fkd_path", str(stored)]
    rows = files.read_json(train_FKD.main(argv) / "results.json")["seeds"][0]["rows"]

    arrays, image_set = images.load_pixels("", images.open_images("", made))
    batch, logits = labels.EpochLabels(stored, 0, 10, 10).batch(0)
    pixels = crop_on_cpu(arrays, batch.index, batch.crop, batch.flip, 32)
    x = batches.mix(batches.normalise(pixels, (0.5,) * 3, (0.5,) * 3), batch, "cutmix")
    with training.seeded(0, WEIGHTS):
        student = models.create_model("convnet_mini", 10, 32)
    with torch.no_grad():
        z = student.train()(x).double().numpy()
    y = image_set.targets[batch.index].numpy()
    other = y[batch.partner.numpy()]
    expected = formula(recipe, z, logits.double().numpy(), y, other, batch.lam)
    assert rows[0]["loss"] == pytest.approx(expected, rel=2e-4)
