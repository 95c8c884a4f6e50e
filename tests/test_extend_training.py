"""Where a newcomer would look: a student is one line, a recipe is a launcher and one loss."""

import os
import stat
import subprocess
import sys

import torch
import torch.nn.functional as F

from matching import models, training
from scripts import files
from tests.conftest import BATCHES, ROOT, TEACHER
from validate import train_FKD


def linear(num_classes, image_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * image_size**2, num_classes))


def test_a_student_is_one_line(random, labels, monkeypatch, refused, capsys):
    data = ["--train_dir", str(random), "--fkd_path", str(labels), "--num_workers", "0"]
    refused(train_FKD.main, [*data, "--model", "linear"], "linear", "convnet_w128")
    monkeypatch.setitem(models.MODELS, "linear", linear)
    folder = train_FKD.main([*data, "--model", "linear", "--epochs", "2", "--output_dir", "out"])
    results = files.read_json(folder / "results.json")
    assert results["arguments"]["model"] == "linear" and folder.name.endswith("_linear_train2")
    weights = models.read_state_dict(folder / "student_seed0.safetensors", "")
    assert weights["1.weight"].shape == (3, 3 * 32**2)
    from matching import train_teacher

    teacher = train_teacher.main([*TEACHER, "--arch", "linear", "--output_dir", "teachers"])
    online = ["--train_dir", str(random), "--online", "--arch", "linear", *BATCHES]
    online += ["--teacher_checkpoint", str(teacher), "--model", "linear", "--output_dir", "out"]
    assert train_FKD.main(online).name.endswith("_online_linear")


def test_a_loss_is_one_function_and_one_entry(random, labels, monkeypatch, refused, capsys):
    """It takes the settings that it names, such as --ce_weight."""

    def reversed_kl(outputs, goal, temperature, ce_weight, **_):
        p, q = (F.log_softmax(t.float() / temperature, 1) for t in (outputs, goal.logits))
        kl = F.kl_div(q, p, reduction="sum", log_target=True)
        return kl + ce_weight * training.hard_loss(outputs, goal)

    data = ["--train_dir", str(random), "--fkd_path", str(labels), "--num_workers", "0"]
    argv = [*data, "--model", "convnet_mini", "--output_dir", "out", "--loss", "reversed-kl"]
    refused(train_FKD.main, argv, "--loss", "kl", "mse_ce")
    monkeypatch.setitem(training.LOSSES, "reversed-kl", reversed_kl)
    folder = train_FKD.main(argv)
    assert folder.name.endswith("_convnet_mini_loss-reversed-kl")
    other = train_FKD.main([*argv, "--ce_weight", "1"])
    rows, more = (files.read_json(f / "results.json")["seeds"][0]["rows"] for f in (folder, other))
    assert more[0]["loss"] > rows[0]["loss"] > 0


LAUNCHER = """#!/bin/sh
set -eu
. {root}/scripts/launch.sh
IMAGES="${{IMAGES:-NAME}}"
run -m validate.train_FKD --train_dir "$IMAGES" --hard_label --model convnet_mini --epochs 2 \\
    --batch_size 5 --mix_type cutmix --sgd --learning_rate 0.05 --num_workers 0 \\
    --output_dir "${{OUT:-output}}/students" "$@"
"""


def test_a_recipe_is_a_launcher(random, tmp_path):
    path = tmp_path / "train_FKD_mine.sh"
    path.write_text(LAUNCHER.format(root=ROOT))
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    environment = {"IMAGES": str(random), "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    environment |= {**os.environ, "PYTHONPATH": str(ROOT)} | environment
    command = ["sh", str(path), "--momentum", "0.5", "--device", "cpu"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    [folder] = (tmp_path / "out/students").iterdir()
    arguments = files.read_json(folder / "results.json")["arguments"]
    assert arguments["hard_label"] and arguments["learning_rate"] == 0.05
    assert folder.name.endswith("_convnet_mini_opt-sgd_lr0.05_momentum0.5")
