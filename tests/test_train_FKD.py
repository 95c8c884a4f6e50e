"""Stage 4: stored and online labels train the same student, and what does not fit is refused."""

import contextlib
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save

from distillation import datasets
from matching import generate_soft_label, lessons, ranks, train_teacher
from scripts import files, output
from scripts.runtime import Process
from tests.conftest import BATCHES, TEACHER, copy, make_random, picture_folder, reseal, tree
from tests.test_training import largest_difference, small_net, weights  # noqa: F401
from validate import train_FKD

STUDENT = ["--model", "convnet_mini", "--cos", "-T", "4", "--num_workers", "0", "--device", "cpu"]
STUDENT += ["--eval_every", "2"]


@pytest.fixture
def train(random, labels, tmp_path):
    """train(*flags, images=, labels=, root=): a student's folder."""
    stored = labels

    def run(*flags, images=random, labels=stored, root=tmp_path / "out"):
        data = ["--train_dir", images, "--output_dir", root, *STUDENT]
        data += BATCHES if labels is None else ["--fkd_path", labels]
        return train_FKD.main([*map(str, [*data, *flags])])

    return run


@pytest.fixture
def drawn(train):
    """drawn(*flags): the folder of a student without stored labels."""
    return partial(train, labels=None)


@pytest.fixture
def online(teacher):
    return ["--online", "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher)]


def results(folder):
    return files.read_json(folder / "results.json")


# ---- the same student


def test_stored_and_online_labels_train_the_same_student(train, drawn, online, tmp_path):
    before = torch.random.get_rng_state()
    stored, made = train("--seeds", 0, 1), drawn(*online, "--seeds", 0, 1)
    assert largest_difference(weights(stored), weights(made)) == 0
    assert results(stored)["seeds"] == results(made)["seeds"]
    again = train("--seeds", 0, 1, "--num_workers", 2, root=tmp_path / "again")
    assert tree(stored) == tree(again)  # results.json has no seconds in it
    alone = train("--seeds", 1, root=tmp_path / "alone")
    first, second = (load_file(stored / f"student_seed{n}.safetensors") for n in (0, 1))
    assert largest_difference(second, load_file(alone / "student_seed1.safetensors")) == 0
    assert largest_difference(first, second) > 0.01
    assert torch.equal(before, torch.random.get_rng_state())  # nobody drew from it


def test_results_say_what_was_trained(train, random, labels, tmp_path, capsys):
    folder = train("--seeds", 0, 1)
    *_, result, then = capsys.readouterr().out.splitlines()
    assert result.endswith("(n = 2) on 3 of 10 classes") and then.startswith("next: python -m ")
    found, made = results(folder), files.read_json(labels / "manifest.json")
    scores, said = found["summary"]["last"]["top1"], found["arguments"]
    top1 = [seed["last"]["top1"] for seed in found["seeds"]]
    assert scores["n"] == 2 and scores["std"] == pytest.approx(np.std(top1, ddof=1))
    rows = found["seeds"][0]["rows"]
    assert [("top1" in row, row["epoch"]) for row in rows] == [(True, 0), (False, 1), (True, 2)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 0.75e-3, 0.25e-3])
    known = {"temperature": 4, "schedule": "cosine", "mix_type": "cutmix", "bn_batch": 5}
    known |= {"test_images": 133, "dataset": "digits", "images": made["inputs"]["images"]}
    known |= {"labels_content": made["content"]}  # what a restart is compared with
    known |= {"teacher": [["convnet_mini", made["teacher"][0]["sha256"]]]}
    assert said.items() >= known.items() and found["images"]["count"] == 12
    assert str(tmp_path) not in json.dumps(found) and str(random.parent) not in json.dumps(found)
    assert folder.name.endswith("_mix-cutmix_convnet_mini_schedule-cosine_T4_seeds-0+1")


def test_a_student_that_begins_with_its_teachers_weights_is_named(train, capsys):
    train("--seeds", 0, 1000)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "began with" in line]
    assert said.startswith("warning: --seeds 1000: this student") and "convnet_mini" in said


def test_a_batch_of_all_images_is_named(drawn, capsys):
    drawn("--hard_label", "--batch_size", 12, "--epochs", 2)
    assert "--batch_size 12: all 12 images are one batch: 2 steps of the" in capsys.readouterr().err
    drawn("--hard_label", "--batch_size", 11, "--epochs", 2)
    assert "--batch_size 11" not in capsys.readouterr().err


def test_every_option_of_the_recipes_runs(train, drawn, online, small_net):  # noqa: F811
    flags = ["--loss", "mse_ce", "--ema", 0.9, "--model", small_net, "--epochs", 1]
    edc, plain = train(*flags, "--bn_refresh"), train(*flags)
    assert largest_difference(weights(edc), weights(plain)) > 0
    assert largest_difference(weights(plain), weights(drawn(*online, *flags))) == 0  # dropout
    flags = ["--hard_label", "--sgd", "-lr", 0.01, "--schedule", "step"]
    hard = drawn(*flags, "--color_jitter", 0.4, "--lighting", 0.1)
    assert results(hard)["teacher"] == [] and results(hard)["labels"] is None
    assert largest_difference(weights(hard), weights(drawn(*flags))) > 0


def test_draws_vary_with_the_seed_where_that_is_asked_for(drawn, online):
    def student(seed, *flags):
        folder = drawn(*online, "--epochs", 1, "--seeds", 5, seed, *flags)
        return load_file(folder / f"student_seed{seed}.safetensors")

    assert largest_difference(student(0), student(0, "--vary_draws")) == 0
    varied = student(1, "--vary_draws")
    assert largest_difference(varied, student(1, "--fkd_seed", 43)) == 0  # 42 + 1
    assert largest_difference(varied, student(1)) > 0


@pytest.mark.parametrize("teachers, first", [([], 300), ([None], 256)])
def test_no_batch_of_the_teacher_depends_on_the_processes(teachers, first):
    """With --online a process takes whole blocks of 256 rows, as the teacher does of the batch."""
    learnt = object.__new__(lessons.Lessons)
    learnt.settings, learnt.teachers = {"bn_batch": 300}, teachers
    learnt.process = Process(1, 2, torch.device("cpu"))
    assert learnt.own(600).tolist() == list(range(300, 600))
    assert learnt.needed(600).tolist() == list(range(first, 600))


def test_color_jitter_of_rows_is_rows_of_the_batch():
    x, facts = torch.randn(6, 3, 8, 8), datasets.ALL["cifar10"]

    def jittered(rows, *strength):
        g = torch.Generator().manual_seed(3)
        return lessons.color_jitter(x[rows], rows, 6, strength, facts, g)

    whole = jittered(torch.arange(6), 0.4, 0.1)
    torch.testing.assert_close(jittered(torch.tensor([1, 4]), 0.4, 0.1), whole[[1, 4]])
    torch.testing.assert_close(jittered(torch.arange(6), 0.0, 0.0), x)
    assert (whole - x).abs().max() > 0.05


def test_the_largest_logits_and_the_rest_train_the_student_of_all(
    train, random, labels, online, tmp_path, refused
):
    """Two of three logits: the rest is the third class, so the student is that of all labels."""
    flags = ["--data", random, "--fkd_path", tmp_path / "labels", *online[1:], *BATCHES]
    flags = [*map(str, flags), "--label_top_k", "2", "--temperature"]
    [short] = generate_soft_label.main([*flags, "4"])
    assert short.name == f"{labels.name}_top2_T4"
    exact = ["--amp", "fp64", "--bn_batch", 2]  # a chunk has its own rows
    made, whole = train(*exact, labels=short), train(*exact)
    assert largest_difference(weights(made), weights(whole)) < 1e-6
    assert results(made)["labels"]["label_top_k"] == 2
    assert "label_top_k" not in results(whole)["labels"]
    odd = [["-T", "3"], "--temperature 3.0", "made with 4.0"], [["--loss", "mse_ce"], "with kl"]
    for more, *words in odd:
        refused(lambda _, more=more: train(*more, labels=short), [], "--fkd_path", *words)
    [other] = generate_soft_label.main([*flags, "3"])
    found = train("-T", "3", labels=other.parent, root=tmp_path / "found")  # by its temperature
    assert found.name.startswith(other.name)
    path = short / EPOCH_1
    path.write_bytes((other / EPOCH_1).read_bytes())
    reseal(short)
    refused(lambda _: train(labels=short, root=tmp_path / "b"), [], "temperature than 4.0")


def test_results_say_in_which_precision_the_labels_were_made(train, random, online, tmp_path):
    flags = ["--data", random, "--fkd_path", tmp_path / "labels", *online[1:], *BATCHES]
    flags += ["--epochs", 1, "--amp", "bf16", "--channels_last"]
    [made] = generate_soft_label.main(list(map(str, flags)))
    fast = {"amp": "bf16", "channels_last": True}
    assert results(train(labels=made))["labels"] == fast
    own = results(train("--amp", "bf16", "--channels_last", "--epochs", 1))
    assert own["labels"] == {"amp": "none", "channels_last": False}
    assert own["arguments"].items() >= fast.items()


def test_hard_labels_are_the_images_own_classes(drawn):
    """Trained a little on class indices, digits are told apart: targets are not permuted."""
    flags = ["--hard_label", "--epochs", 25, "--mix_type", "none", "--flip", 0]
    folder = drawn(*flags, "--min_scale_crops", 0.8, "--adamw_lr", 0.005)
    assert results(folder)["summary"]["last"]["top1"]["mean"] > 70


def test_evaluate_gives_the_number_of_the_results(train, random, capsys, refused):
    folder = train()
    expected = results(folder)["seeds"][0]["last"]
    path = folder / "student_seed0.safetensors"
    flags = ["--evaluate", str(path), "--model", "convnet_mini", "--train_dir", str(random)]
    assert train_FKD.main(flags) == {name: expected[name] for name in ("top1", "top5")}
    assert "top-1" in capsys.readouterr().out
    other = [*flags[:3], "convnet_w128", *flags[4:]]
    refused(train_FKD.main, other, "--evaluate", "another architecture")
    refused(train_FKD.main, flags[:4], "--dataset")


def test_students_are_not_tested_on_what_their_images_come_from(drawn, tmp_path, capsys, refused):
    """Chosen from a flat folder, or that folder itself."""
    flat, sets = picture_folder(tmp_path, ["cat", "dog", "eel"]) / "train", tmp_path / "sets"
    chosen = make_random(
        sets,
        "--dataset",
        "imagefolder",
        "--data_dir",
        str(flat),
        "--classes",
        "cat",
        "dog",
        "--ipc",
        "2",
        "--image_size",
        "32",
        "--max_images_per_class",
        "2",
    )
    for images in (chosen, flat):
        run = partial(drawn, "--hard_label", "--val_dir", flat, "--epochs", 1, images=images)
        refused(lambda _, run=run: run(), [], "--val_dir", "the test set is the training set")
        assert run("--test_on_train").name.endswith("_ontrain")


def test_rows_go_to_a_tracker(train, monkeypatch):
    logged, tracker = [], SimpleNamespace(trackers=["mine"])
    tracker.log = lambda values, step: logged.append((step, sorted(values)))
    monkeypatch.setattr(ranks, "joined", lambda *_: contextlib.nullcontext(tracker))
    train("--epochs", 1, "--tracker", "mine")
    assert logged == [(0, [f"seed0/{name}" for name in ("loss", "lr", "top1", "top5")])]


# ---- what does not fit is refused: one change (images, labels) in real outputs of stages 2 and 3


def saved(path, change):
    with Image.open(path) as image:
        change(image).save(path)


def turn(images, labels=None):
    saved(images / "1/1_0002.png", lambda image: image.rotate(90))


def resealed(change, **changes):
    """A change after which the folder's manifest fits again."""

    def edit(images, labels):
        change(images, labels)
        reseal(images, **changes) if change in OF_IMAGES else reseal(labels, **changes)

    return edit


def exchange(a, b):
    third = a.rename(a.with_name("third"))
    b.rename(a)
    third.rename(b)


def exchange_images(images, labels):
    exchange(images / "0/0_0001.png", images / "2/2_0001.png")


def resize(images, labels):
    for path in images.glob("*/*.png"):
        saved(path, lambda image: image.resize((48, 48)))


OF_IMAGES = (turn, exchange_images, resize)


def rename_class(images, labels):
    (images / "1").rename(images / "1b")
    classes = files.read_json(images / "manifest.json")["classes"]
    reseal(images, classes=[{**c, "folder": c["folder"].replace("1", "1b")} for c in classes])


def remove_image(images, labels):
    (images / "2/2_0003.png").unlink()
    reseal(images, count=11)


def damage(change):
    """Change the bytes of an epoch's file, but not its time."""

    def edit(images, labels):
        path = labels / EPOCH_1
        data, stat = path.read_bytes(), path.stat()
        path.write_bytes(change(data))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return edit


def infinite(data):
    tensors = load(data)
    return save({**tensors, "logits": tensors["logits"] * torch.inf})


def gone(name):
    return lambda images, labels: (labels / name).unlink()


def another_epoch(images, labels):
    shutil.copy(labels / "epoch_0000.safetensors", labels / EPOCH_1)


def edit_manifest(images, labels):
    text = (labels / "manifest.json").read_text()
    (labels / "manifest.json").write_text(text.replace('"cutmix"', '"none"', 1))


def billion(images, labels):
    made = files.read_json(labels / "args.json")["arguments"]
    reseal(labels, arguments={**made, "epochs": 10**9})


EPOCH_1 = "epoch_0001.safetensors"
# {name: (the change, or flags, what the line says)}; more of single files in test_labels
MISMATCHES = {
    "images made again with another seed": (resealed(turn), "content"),
    "one image edited, its manifest not": (turn, "1/1_0002.png"),
    "two images exchanged between classes": (resealed(exchange_images), "content"),
    "an image removed": (remove_image, "2_0003"),
    "a class renamed": (rename_class, "1b"),
    "a class folder removed": (lambda i, n: shutil.rmtree(i / "2"), "2"),
    "images of another size": (resealed(resize, image_size=48), "48"),
    "images of another arm": (lambda i, n: reseal(i, arm="d4m"), "d4m"),
    "another data set": (["--dataset", "cifar10"], "cifar10"),
    "another mix type": (["--mix_type", "mixup"], "cutmix"),
    "another alpha": (["--cutmix", "0.5"], "--cutmix 0.5"),
    "another input size": (["--input_size", "64"], "--input_size 64"),
    "another batch size": (["--batch_size", "4"], "--batch_size 4"),
    "more epochs than labels": (["--epochs", "4"], "--epochs 4"),
    "another seed of the draws": (["--fkd_seed", "1"], "--fkd_seed 1"),
    "other crops": (["--min_scale_crops", "0.5"], "0.08"),
    "other flips": (["--flip", "0"], "--flip 0"),
    "another precision": (["--no_use_fp16"], "--use_fp16 False"),
    "another teacher": (["--arch", "resnet18"], "convnet_mini"),
    "other weights of the teacher": ("teacher", "sha256"),
    "two epochs' files exchanged": (
        lambda i, n: exchange(n / "epoch_0000.safetensors", n / EPOCH_1),
        "epoch_000",
    ),
    "a file of another epoch, manifest and all": (resealed(another_epoch), "epoch than 1"),
    "a bit of the logits flipped": (
        damage(lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
        "epoch_0001",
    ),
    "a label file cut short": (damage(lambda data: data[:-8]), "epoch_0001"),
    "a label file missing": (gone(EPOCH_1), "epoch_0001"),
    "an epoch missing, manifest and all": (resealed(gone(EPOCH_1)), "2 files"),
    "a billion epochs": (billion, "1000000000 epochs"),
    "logits that are not finite": (resealed(damage(infinite)), "not finite"),
    "the labels' arguments edited": (edit_manifest, "edited"),
    "another normalisation": (lambda i, n: reseal(n, mean=[0.1, 0.2, 0.3]), "mean [0.1"),
    "labels that are not finished": (gone("manifest.json"), "not finished"),
    "labels of another stage": (lambda i, n: reseal(n, stage="hard_labels"), "hard_labels"),
    "images given as labels": ("images", "stage"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_is_refused_in_one_line(what, train, random, labels, tmp_path, refused):
    change, word = MISMATCHES[what]
    images, labels, flags = copy(random, tmp_path), copy(labels, tmp_path), []
    if change == "teacher":
        flags = ["--output_dir", str(tmp_path / "teachers"), "--seed", "5"]
        flags = ["--teacher_checkpoint", train_teacher.main([*TEACHER, *flags])]
    elif change == "images":
        labels = images
    elif isinstance(change, list):
        flags = change
    else:
        change(images, labels)
    refused(lambda argv: train(*flags, images=images, labels=labels), [], word)
    assert not list(tmp_path.glob("out/*/student*")) and not list(tmp_path.glob("out/*/check*"))


def test_foreign_images_and_labels_of_them(train, random, online, tmp_path, capsys, refused):
    theirs = tmp_path / "theirs"
    for name in ("0", "1", "2"):
        shutil.copytree(random / name, theirs / name)
    flags = ["--data", theirs, "--dataset", "digits", "--fkd_path", tmp_path / "labels"]
    [labels] = generate_soft_label.main([*map(str, [*flags, *online[1:], *BATCHES])])
    folder = train("--dataset", "digits", images=theirs, labels=labels)
    assert results(folder)["images"]["foreign"]
    assert capsys.readouterr().err.count("no manifest") == 2
    assert largest_difference(weights(folder), weights(train())) == 0  # the same pixels
    turn(theirs)
    refused(lambda argv: train("--dataset", "digits", images=theirs, labels=labels), [], "content")


# ---- the folder


def test_a_folder_that_was_begun(train, labels, tmp_path, refused):
    folder = train()
    whole = (folder / "manifest.json").read_bytes()
    assert tree(folder) == tree(train(labels=labels.parent, root=tmp_path / "b"))  # found below
    for name in ("manifest.json", "student_seed0.safetensors"):  # rows alone are no finished seed
        (folder / name).unlink()
    assert (train() / "manifest.json").read_bytes() == whole
    (folder / "manifest.json").unlink()
    refused(lambda argv: train("--eval_every", 7), [], "eval_every 2", "7")
    rows = (folder / "seed0.json").read_text()
    for text in ('{"seed": 0, "rows": [1, 2, 3]}', "[]", rows.replace("top5", "top9")):
        (folder / "seed0.json").write_text(text)
        refused(lambda argv: train(), [], "seed0.json", "remove it to train this seed again")
    (folder / "seed0.json").write_text(rows)
    (train() / "student_seed0.safetensors").write_bytes(b"changed")
    refused(lambda argv: train(), [], "student_seed0", "7 bytes")


def test_other_test_images_are_not_taken_for_those_of_a_finished_run(tmp_path, refused):
    """As many, in the same classes: a --val_dir that was repaired."""
    for split, root in (("train", "data"), ("val", "data"), ("val", "other")):
        names = ["dog", "cat"] if root == "other" else ["cat", "dog"]
        picture_folder(tmp_path / root, names, split=split)
    flags = ["--dataset", "imagefolder", "--train_dir", tmp_path / "data/train", "--hard_label"]
    flags += ["--model", "convnet_mini", "--epochs", "1", "--device", "cpu", "--num_workers", "0"]
    argv = [*map(str, flags), "--output_dir", str(tmp_path), "--val_dir"]
    train_FKD.main([*argv, str(tmp_path / "data")])
    refused(train_FKD.main, [*argv, tmp_path / "other"], "test_sha256")


# ---- --dry_run and flags


def test_dry_run_says_what_would_be_trained_and_what_comes_before(
    train, labels, tmp_path, capsys, refused
):
    def plan(*flags, **options):
        capsys.readouterr()
        train("--dry_run", *flags, **options)
        return next(s for s in capsys.readouterr().out.splitlines() if s.startswith("plan: "))

    line = plan("--seeds", 0, 1)
    assert "_convnet_mini_schedule-cosine_T4_seeds-0+1: 0 done, 4 files to do" in line
    assert not (tmp_path / "out").exists()
    refused(lambda argv: train("--dry_run", "--batch_size", 4), [], "--batch_size 4")
    train()
    assert "2 done, 0 files to do" in plan()
    absent = tmp_path / "labels" / labels.name
    line = plan(labels=absent)
    assert f"waits for {absent}: python -m matching.generate_soft_label" in line
    assert f"{labels.name}_convnet_mini_schedule-cosine_T4: 0 done, 2 files to do, 0.0 MiB" in line
    begun = copy(labels, tmp_path)
    (begun / output.MANIFEST).unlink()
    assert f"waits for {begun}" in plan(labels=begun)
    line = plan(images=tmp_path / "digits_ipc4_random", labels=absent)
    assert "python -m distillation.random_real" in line
    nette = {"images": tmp_path / "imagenette_ipc1_random", "labels": absent}
    refused(lambda argv: train("--dry_run", **nette), [], "--val_dir")  # the rest is checked


def test_flags_that_make_no_sense_are_refused(random, labels, tmp_path, refused):
    data = ["--train_dir", random]
    stored = [*data, "--fkd_path", labels, "--output_dir", tmp_path]
    for argv, *words in (
        ([], "--train_dir"),
        (data, "--fkd_path: missing", "--online"),
        ([*stored, "--online"], "not with --online"),
        ([*data, "--online", "--hard_label"], "only one"),
        ([*data, "--hard_label", "--arch", "resnet18"], "no teacher"),
        ([*stored, "--color_jitter", "0.4"], "--hard_label"),
        ([*stored, "--vary_draws"], "--vary_draws", "not with --fkd_path"),
        ([*stored, "--shuffle_patches", "2"], "--shuffle_patches", "not with --fkd_path"),
        ([*stored, "--test_resize", "31"], "--test_resize 31: below the input's 32 px"),
        ([*stored, "--seeds", "1", "1"], "--seeds 1 1"),
        ([*stored, "--shard", "0/2"], "torchrun"),
        ([*stored, "--tracker", "nonsense"], "--tracker nonsense"),
        ([*stored, "--keep-topk", "1000"], "--keep_topk"),
        ([*data, "--online", "--label_top_k", "2"], "--label_top_k: a flag of stage 3"),
        ([*stored, "--model", "resnet19"], "resnet19"),
        ([*stored, "--temperature", "1e39"], "1e39"),  # infinite in float32
        ([*stored, "--warmup_epochs", "3"], "--warmup_epochs 3"),
        ([*data, "--fkd_path", tmp_path / "none"], "none", "no such folder"),
    ):
        refused(train_FKD.main, argv, *words)
