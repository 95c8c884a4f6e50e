"""Training a teacher: accuracy on digits, resumed = straight, what the other stages read of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tree
from PIL import Image
from stage34 import TEACHER

from matching import train_teacher
from scripts.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def train(root, *more):
    return train_teacher.main([*TEACHER, "--num_workers", "0", "--output_dir", str(root), *map(str, more)])


def test_digits_are_learnt(tmp_path):
    """The demo teacher at 5 of its 15 epochs (in full: 99 %)."""
    flags = ["--dataset", "digits", "--arch", "convnet_mini", "--epochs", "5", "--output_dir", str(tmp_path)]
    folder = train_teacher.main(flags)
    results = read_json(folder / "results.json")
    assert folder.name == "digits_convnet_mini_epochs5" and results["last"]["top1"] > 94
    assert read_json(folder / "manifest.json")["top1"] == results["last"]["top1"]
    assert results["parameters"] == 15_402


@pytest.mark.parametrize("variable, bars", [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_tqdms_own_variable_turns_the_bar_off(variable, bars, tmp_path):
    command = [sys.executable, "-m", "matching.train_teacher", *TEACHER, "--epochs", "1", "--num_workers", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    ended = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, env={**environment, **variable}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ("image/s]" in ended.stderr) == bars and "top-1" in ended.stdout


def test_no_stage_has_a_bar_of_its_own():
    """Each is runtime's, which knows who draws and heeds the variable."""
    for folder in ("distillation", "matching", "validate"):
        for path in sorted((ROOT / folder).glob("*.py")):
            assert "tqdm import" not in path.read_text(), path


def test_interrupted_and_resumed_is_straight_through(tmp_path, monkeypatch):
    flags = ["--epochs", 3, "--checkpoint_every", 1, "--batch_size", 8]
    straight = train(tmp_path / "straight", *flags)
    steps, original = [], train_teacher.train_step

    def stopping(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(train_teacher, "train_step", stopping)
    with pytest.raises(SystemExit) as leaving:
        train(tmp_path / "stopped", *flags)
    assert leaving.value.code == 75 and len(steps) == 10
    stopped = train(tmp_path / "stopped", *flags)
    assert len(steps) == 15 and tree(stopped) == tree(straight)
    train(tmp_path / "stopped", *flags)
    assert len(steps) == 15


def test_cut_of_the_batch_changes_nothing(tmp_path):
    from safetensors.torch import load_file

    flags = ["--epochs", 1, "--amp", "fp64", "--label_smoothing", 0.1]
    a = load_file(train(tmp_path / "a", *flags) / "model.safetensors")
    b = load_file(train(tmp_path / "b", *flags, "--bn_batch", 7) / "model.safetensors")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-9


def test_folder_of_photos_is_read_by_workers(tmp_path):
    """Sets above 64 px are not held in memory: RandomResizedCrop from disk, the same for any number of workers."""
    torch.manual_seed(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(0, 256, (60 + 9 * i, 80, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{i}.png")
    flags = ["--dataset", "imagefolder", "--data_dir", str(tmp_path / "photos"), "--arch", "convnet_mini"]
    flags += ["--input_size", "64", "--epochs", "2", "--batch_size", "4"]
    folders = [
        train_teacher.main([*flags, "--output_dir", str(tmp_path / str(n)), "--num_workers", str(n)]) for n in (0, 2)
    ]
    assert tree(folders[0]) == tree(folders[1])
    assert [c["folder"] for c in read_json(folders[0] / "manifest.json")["classes"]] == ["cat", "dog"]


def test_refusals(tmp_path, refused):
    main = train_teacher.main
    refused(main, ["--dataset", "cifar10", "--output_dir", tmp_path], "--data_dir", "cifar10")
    refused(main, [*TEACHER, "--shard", "0/2"], "torchrun")
    refused(main, [*TEACHER, "--arch", "resnet19"], "resnet19")
    refused(main, [*TEACHER, "--flip", "2"], "--flip")
    folder = train(tmp_path, "--epochs", 1)
    (folder / "model.safetensors").write_bytes(b"")
    refused(lambda argv: train(tmp_path, "--epochs", 1), [], "model.safetensors")
