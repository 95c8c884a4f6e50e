"""Stage 3: the same labels for any number of processes and restarts, and nothing of what is odd."""

import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from matching import generate_soft_label, models
from scripts import files
from tests.conftest import BATCHES, TEACHER, copy, everything, exits, make_random, tree

NAME = "digits_ipc4_random_classes-0-2_max12_convnet_mini_epochs3_b5_mix-cutmix"


def label(images, teacher, root, *more):
    flags = ["--arch", "convnet_mini", "--teacher_checkpoint", str(teacher)]
    flags += ["--fkd_path", str(root), *BATCHES, *more]
    return generate_soft_label.main(["--data", str(images), *flags])[0]


def logits(folder, epoch=0):
    return load_file(folder / f"epoch_{epoch:04d}.safetensors")["logits"]


def test_any_number_of_processes_and_restarts_write_the_same(random, teacher, labels, monkeypatch):
    assert labels.name == NAME
    for shard in ("1/2", "0/2"):
        halves = label(random, teacher, "two", "--shard", shard)
        assert (halves / "manifest.json").exists() == (shard == "0/2")
    assert tree(labels) == tree(halves)

    calls, original = [], generate_soft_label.teacher_logits

    def counted(teachers, x, *args):
        calls.append(len(x))
        if len(calls) == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(teachers, x, *args)

    monkeypatch.setattr(generate_soft_label, "teacher_logits", counted)
    with exits(75):
        label(random, teacher, "stopped")
    assert calls == [5, 5, 2] * 2
    calls.clear()
    again = label(random, teacher, "stopped")
    assert calls == [5, 5, 2]  # the third epoch only
    assert tree(again) == tree(labels)
    calls.clear()
    label(random, teacher, "stopped", "--num_workers", "2")
    assert calls == []


def test_reading_processes_change_nothing(random, teacher, labels):
    assert tree(label(random, teacher, "workers", "--num_workers", "2")) == tree(labels)


def test_the_manifest_says_what_stage_4_must_know(random, teacher, labels):
    manifest = files.read_json(labels / "manifest.json")
    assert manifest["stage"] == "soft_labels" and manifest["dataset"] == "digits"
    assert [c["folder"] for c in manifest["classes"]] == ["0", "1", "2"]
    content = files.read_json(random / "manifest.json")["content"]
    assert manifest["images"]["content"] == manifest["inputs"]["images"] == content
    weights = files.sha256(teacher / "model.safetensors")
    assert manifest["teacher"][0]["sha256"] == manifest["inputs"]["teacher"][0] == weights
    settings = manifest["arguments"]
    assert settings["batch_size"] == 5 and settings["fkd_seed"] == 42
    assert settings["input_size"] == 32 and settings["arch"] == ["convnet_mini"]
    assert logits(labels).dtype == torch.float16
    for name in ("manifest.json", "args.json"):
        assert str(random.parent) not in (labels / name).read_text()  # no absolute path


def test_several_folders_and_several_teachers(random, teacher, tmp_path):
    second = make_random(tmp_path, "--ipc", "2", "--seed", "8")
    other = train(tmp_path, 1)
    flags = ["--fkd_path", "labels", *BATCHES, "--epochs", "1", "--no_use_fp16"]
    both = generate_soft_label.main(
        ["--data", str(random), str(second), "--arch", "convnet_mini", "convnet_mini"]
        + ["--teacher_checkpoint", str(teacher), str(other), *flags]
    )
    assert [f.name.split("_class")[0] for f in both] == [
        "digits_ipc4_random",
        "digits_ipc2_random_seed8",
    ]
    single = [label(random, t, f"{t}-labels", *flags[2:]) for t in (teacher, other)]
    a, b, mean = (logits(f) for f in (*single, both[0]))
    assert mean.dtype == torch.float32
    torch.testing.assert_close((a + b) / 2, mean)


def train(root, seed):
    from matching import train_teacher

    return train_teacher.main([*TEACHER, "--seed", str(seed), "--output_dir", str(root)])


def test_labels_do_not_depend_on_the_batch_of_the_teacher(random, teacher, monkeypatch):
    """A network's last bits depend on its batch: passes have a fixed size."""
    monkeypatch.setattr(generate_soft_label, "TEACHER_ROWS", 4)
    sizes, original = [], models.ConvNet.forward

    def noted(self, x):
        sizes.append(len(x))
        return original(self, x)

    monkeypatch.setattr(models.ConvNet, "forward", noted)
    label(random, teacher, "labels", "--batch_size", "6", "--epochs", "1")
    assert sizes == [4, 2, 4, 2]


def test_a_run_over_other_inputs_is_not_continued(random, teacher, tmp_path, refused):
    folder = label(random, teacher, "labels", "--shard", "0/2")
    other = train(tmp_path, 1)
    line = refused(lambda argv: label(random, other, "labels"), [], "teacher", "begun with")
    assert files.sha256(other / "model.safetensors")[:12] in line
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_logits_that_are_not_finite_are_not_stored(random, teacher, refused, monkeypatch, value):
    original = generate_soft_label.teacher_logits

    def broken(*args):
        found = original(*args)
        found[1, 2] = value
        return found

    monkeypatch.setattr(generate_soft_label, "teacher_logits", broken)
    words = ["convnet_mini", "epoch 0", "NaN or infinite", "--no_use_fp16"]
    refused(lambda argv: label(random, teacher, "labels"), [], *words)
    assert not list(os.scandir(f"labels/{NAME}"))[0].name.startswith("epoch")


def test_out_of_gpu_memory_names_a_flag(random, teacher, refused, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate_soft_label, "teacher_logits", full)
    refused(lambda argv: label(random, teacher, "labels"), [], "GPU memory in labelling", "--amp")


def test_odd_flags_and_inputs_are_refused(random, teacher, tmp_path, refused):
    main = generate_soft_label.main
    base = ["--data", random, "--fkd_path", "labels", *BATCHES]
    mine = [*base, "--arch", "convnet_mini", "--teacher_checkpoint", teacher]
    refused(main, ["--data", "none"], "--data none", "no such folder")
    refused(main, [*base, "--arch", "convnet_mini"], "nobody publishes")
    refused(main, [*mine, teacher], "2 paths for 1 --arch")
    refused(main, [*mine, "--input_size", "64"], "input size", "32", "64")
    scales = ["--min_scale_crops", "0.5", "--max_scale_crops", "0.2"]
    refused(main, [*mine, *scales], "0.5", "0.2")
    refused(main, [*mine, "--dataset", "cifar10"], "cifar10", "digits")
    refused(main, [*mine, "--gpu", "0"], "--gpu", "--device")
    refused(main, [*mine, "--seed", "1"], "--fkd_seed")
    for flag, value in (
        ("--cutmix", "0"),
        ("--epochs", "0"),
        ("--epochs", "1000000000"),
        ("--batch_size", "0"),
        ("--flip", "1.5"),
        ("--min_scale_crops", "nan"),
        ("--fkd_seed", "-1"),
        ("--mix_type", "zoom"),
    ):
        refused(main, [*mine, flag, value], flag)
    changed = copy(random, tmp_path)
    path = changed / "1" / "1_0002.png"
    with Image.open(path) as image:
        turned = image.rotate(90)
    turned.save(path)
    refused(main, ["--data", changed, *mine[2:]], "1/1_0002.png")
    assert not os.path.exists("labels")


def test_too_little_space_is_refused_before_work(random, teacher, refused, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda folder: 1000)
    refused(lambda argv: label(random, teacher, "labels"), [], "--fkd_path", "MiB")
    assert not list(os.scandir("labels/" + NAME))[1:]  # args.json only


# ---- --dry_run


def test_a_dry_run_names_folder_epochs_and_bytes(random, teacher, tmp_path, capsys, refused):
    with exits(0):
        label(random, teacher, "labels", "--dry_run")
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"plan: labels/{NAME}: 0 done, 3 to do, 0.0 MiB")
    main = generate_soft_label.main
    nobody = ["--data", random, "--arch", "convnet_mini", "--dry_run"]
    refused(main, nobody, "nobody publishes")
    refused(main, [*nobody, "--teacher_checkpoint", "torchvision"], "nobody publishes")
    assert everything(tmp_path) == set()


def test_a_dry_run_before_the_inputs_are_made(random, capsys, refused):
    """Images of 10 classes that stage 2 has yet to make, and a teacher that nobody has trained."""
    main = generate_soft_label.main
    argv = ["--data", "images/cifar10_ipc10_s0.7_g8_kmexpand1", str(random), "--dry_run"]
    with exits(0):
        main([*argv, "--teacher_checkpoint", "teachers/x", "--mix_type", "cutmix"])
    first, second = capsys.readouterr().out.splitlines()
    name = "cifar10_ipc10_s0.7_g8_kmexpand1_resnet18_mix-cutmix"
    assert first.startswith(f"plan: output/labels/{name}: 0 done, 300 to do, 1.7 MiB")
    assert "kmexpand1: python -m distillation.gen_syn_image makes it" in first
    assert "teachers/x: python -m matching.train_teacher makes it" in first
    assert f"{random.name}_resnet18_mix-cutmix: 0 done, 300 to do, 0.5 MiB" in second
    assert "cifar10" not in second
    refused(main, [*argv, "--dataset", "cifar100", "--data", random, "x"], "cifar100", "digits")
