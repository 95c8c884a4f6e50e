"""Stage 3: the same labels for any number of processes and restarts, and nothing of what is odd."""

import os
import signal
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file

from matching import generate_soft_label, models
from scripts import files
from tests.conftest import BATCHES, TEACHER, everything, exits, make_random, tree

NAME = "digits_ipc4_random_classes-0-2_max12_convnet_mini_epochs3_b5_mix-cutmix"
main = generate_soft_label.main


@pytest.fixture
def label(random, teacher):
    """label(root, *flags): stage 3 of `random` by `teacher`, or by others."""

    def run(root, *more, images=(random,), teachers=(teacher,)):
        flags = ["--data", *images, "--arch", *["convnet_mini"] * len(teachers)]
        flags += ["--teacher_checkpoint", *teachers, "--fkd_path", root, *BATCHES, *more]
        return main(list(map(str, flags)))

    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second teacher of the same classes."""
    from matching import train_teacher

    root = str(tmp_path_factory.mktemp("other"))
    return train_teacher.main([*TEACHER, "--seed", "1", "--output_dir", root])


def logits(folder, epoch=0):
    return load_file(folder / f"epoch_{epoch:04d}.safetensors")["logits"]


def test_any_number_of_processes_and_restarts_write_the_same(label, labels, monkeypatch):
    assert labels.name == NAME
    for shard in ("1/2", "0/2"):
        [halves] = label("two", "--shard", shard)
        assert (halves / "manifest.json").exists() == (shard == "0/2")
    assert tree(labels) == tree(halves) == tree(label("workers", "--num_workers", "2")[0])

    calls, original = [], generate_soft_label.teacher_logits

    def counted(teachers, x, *args):
        calls.append(len(x))
        if len(calls) == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(teachers, x, *args)

    monkeypatch.setattr(generate_soft_label, "teacher_logits", counted)
    with exits(75):
        label("stopped")
    assert calls == [5, 5, 2] * 2
    [again] = label("stopped")
    assert calls == [5, 5, 2] * 3 and tree(again) == tree(labels)  # the third epoch only


def test_the_manifest_says_what_stage_4_must_know(random, teacher, labels):
    manifest = files.read_json(labels / "manifest.json")
    assert [c["folder"] for c in manifest["classes"]] == ["0", "1", "2"]
    content = files.read_json(random / "manifest.json")["content"]
    assert manifest["images"]["content"] == manifest["inputs"]["images"] == content
    weights = files.sha256(teacher / "model.safetensors")
    assert manifest["teacher"][0]["sha256"] == manifest["inputs"]["teacher"][0] == weights
    known = {"batch_size": 5, "fkd_seed": 42, "input_size": 32, "arch": ["convnet_mini"]}
    assert manifest["arguments"].items() >= known.items()
    assert logits(labels).dtype == torch.float16
    for name in ("manifest.json", "args.json"):
        assert str(random.parent) not in (labels / name).read_text()  # no absolute path


def test_several_folders_and_several_teachers(label, random, teacher, other, tmp_path):
    second, flags = make_random(tmp_path, "--ipc", "2", "--seed", "8"), ["--epochs", "1"]
    flags += ["--no_use_fp16"]
    both = label("labels", *flags, images=(random, second), teachers=(teacher, other))
    names = ["digits_ipc4_random", "digits_ipc2_random_seed8"]
    assert [f.name.split("_class")[0] for f in both] == names
    a, b = (logits(label(f"of-{t.name}-{t}", *flags, teachers=[t])[0]) for t in (teacher, other))
    assert logits(both[0]).dtype == torch.float32
    torch.testing.assert_close((a + b) / 2, logits(both[0]))


def test_labels_do_not_depend_on_the_batch_of_the_teacher(label, monkeypatch):
    """A network's last bits depend on its batch: passes have a fixed size."""
    monkeypatch.setattr(generate_soft_label, "TEACHER_ROWS", 4)
    sizes, original = [], models.ConvNet.forward
    noted = lambda self, x: sizes.append(len(x)) or original(self, x)  # noqa: E731
    monkeypatch.setattr(models.ConvNet, "forward", noted)
    label("labels", "--batch_size", "6", "--epochs", "1")
    assert sizes == [4, 2, 4, 2]


def test_a_run_over_other_inputs_is_not_continued(label, other, refused):
    label("labels", "--shard", "0/2")
    weights = files.sha256(other / "model.safetensors")[:12]
    refused(lambda argv: label("labels", teachers=[other]), [], "teacher", "begun with", weights)


FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "result, words",
    [
        (torch.full((5, 3), torch.inf).half(), ["epoch 0", "NaN or infinite", "--no_use_fp16"]),
        (torch.full((5, 3), torch.nan), ["epoch 0", "NaN or infinite"]),
        (FULL, ["GPU memory in labelling", "--amp"]),
    ],
)
def test_logits_that_are_not_finite_are_not_stored(label, refused, monkeypatch, result, words):
    monkeypatch.setattr(generate_soft_label, "teacher_logits", MagicMock(side_effect=[result] * 9))
    refused(lambda argv: label("labels"), [], *words)
    assert not any(name.startswith("epoch") for name in os.listdir(f"labels/{NAME}"))


ODD = {
    "--teacher_checkpoint a b": "2 paths for 1 --arch",
    "--teacher_checkpoint torchvision --dry_run": "nobody publishes",
    "--input_size 64": "image_size is 32",
    "--min_scale_crops 0.5 --max_scale_crops 0.2": "--min_scale_crops 0.5: above",
    "--dataset cifar10": "made for digits",
    "--data none": "no such folder",
    "--gpu 0": "--device",
    "--epochs 1000000000": "--epochs",
    "--min_scale_crops nan": "--min_scale_crops",
    "--fkd_seed -1": "--fkd_seed",
    "--mix_type zoom": "--mix_type",
    "--label_top_k 2": "--temperature: one needs the other",
    "--temperature 20": "--temperature: one needs the other",
    "--label_top_k 3 -T 20": "--label_top_k 3: the images have 3 classes, at most 2",
}


@pytest.mark.parametrize("flags", ODD)
def test_odd_flags_are_refused(label, refused, tmp_path, flags):
    refused(lambda argv: label("labels", *flags.split()), [], ODD[flags])
    assert everything(tmp_path) == set()


def test_a_dry_run_names_folder_epochs_bytes_and_what_comes_before(
    label, random, tmp_path, capsys, refused
):
    label("labels", "--dry_run")
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"plan: labels/{NAME}: 0 done, 3 files to do, 0.0 MiB")
    # images of 10 classes that stage 2 has yet to make, and a teacher that nobody has trained
    argv = ["--data", "images/cifar10_ipc10_s0.7_g8_kmexpand1", str(random), "--dry_run"]
    main([*argv, "--teacher_checkpoint", "teachers/x", "--mix_type", "cutmix"])
    first, second = capsys.readouterr().out.splitlines()
    name = "cifar10_ipc10_s0.7_g8_kmexpand1_resnet18_mix-cutmix"
    assert first.startswith(f"plan: output/labels/{name}: 0 done, 300 files to do, 1.7 MiB")
    assert "kmexpand1: python -m distillation.gen_syn_image makes it" in first
    assert "teachers/x: python -m matching.train_teacher makes it" in first
    assert f"{random.name}_resnet18_mix-cutmix: 0 done, 300 files to do, 0.5 MiB" in second
    assert everything(tmp_path) == set()
    refused(main, [*argv, "--dataset", "cifar100"], "cifar100", "digits")
