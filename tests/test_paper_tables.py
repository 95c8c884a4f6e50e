"""The right cell gets the right number, every D4M cell has its command, and --smoke runs the same commands."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matching import generate_soft_label, train_teacher
from matching.soft_labels import generator_of, real_images_of
from scripts.checkpoints import DEFAULT_CHECKPOINT
from validate import paper_tables, run_table
from validate.paper_tables import TABLES, images_name, paper_cells, paper_recipe, paper_rows

ROOT = Path(__file__).resolve().parent.parent


def plan(table, *flags):
    return run_table.plan_of(run_table.get_args(["--table", str(table), *flags]))


# ---- the published numbers and their commands


def test_every_published_number_is_there():
    rows = paper_rows()
    assert len(rows) == 127
    assert [row for row in rows if row["method"].startswith("D4M")] == [cell.paper for cell in paper_cells()]
    assert [len(paper_cells(table)) for table in TABLES] == [4, 24, 18, 12, 15, 2]
    d4m = {(c.dataset, c.ipc): c.paper["top1"] for c in paper_cells(2) if c.student == "resnet18" and c.arm == "d4m"}
    assert d4m == {
        ("imagenet", 10): 27.9, ("imagenet", 50): 55.2, ("imagenet", 100): 59.3, ("imagenet", 200): 62.6,
        ("tiny_imagenet", 50): 46.2, ("tiny_imagenet", 100): 51.4,
    }  # fmt: skip
    assert {(c.teacher, c.student) for c in paper_cells(5)} == {
        (t, s)
        for t in ("resnet18", "mobilenet_v2", "swin_t")
        for s in ("resnet18", "mobilenet_v2", "efficientnet_b0", "swin_t", "vit_b_16")
    }


def test_every_cells_command_makes_that_cell_alone(capsys):
    paper_tables.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    cells = paper_cells()
    assert len(lines) == len(cells) == 75 and len(set(lines)) == 75
    for line, cell in zip(lines, cells):
        words = shlex.split(line.split("#")[0])
        assert words[:2] == ["sh", f"validate/table{cell.table}.sh"] and (ROOT / words[1]).is_file()
        made = plan(cell.table, *words[2:])
        chosen = [c for c, _, _ in made]
        assert [c for c in chosen if c.arm != "text"] == [cell]
        assert (cell.arm == "noise") == any(c.arm == "text" for c in chosen)
        for step in (step for _, steps, _ in made for step in steps):
            args = vars(run_table.parsed(step.module, step.argv))  # the stage knows every flag, and reads its value
            for flag, word in zip(step.argv, step.argv[1:]):
                if flag.startswith("--") and not word.startswith("--") and flag != "--data":
                    assert word in map(str, values_of(args[flag[2:]])), f"{step.module} {flag} {word}"


def values_of(value):
    """All ways of writing a parsed value down: 1 and 1.0 are one number."""
    flat = value if isinstance(value, list) else [value]
    return [*flat, *(f"{v:g}" for v in flat if isinstance(v, float))]


def test_the_table_launchers_start_the_runner(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    stub.chmod(0o755)
    clean = {"PATH": os.environ["PATH"], "PYTHON": str(stub)}
    for table in TABLES:
        run = ["sh", f"table{table}.sh", "--smoke"]
        for environment in (clean, {**clean, "OUT": "x y", "DIFFUSION_CHECKPOINT": "my model", "NUM_GPUS": "8"}):
            out = subprocess.run(
                run, cwd=ROOT / "validate", env=environment, check=True, capture_output=True, text=True
            )
            argv = out.stdout.split("\0")[:-1]
            assert argv[:2] == ["-m", "validate.run_table"]
            args = run_table.get_args(argv[2:])
            assert args.table == table and args.smoke
            assert args.out == environment.get("OUT", "output") and args.jobs == int(environment.get("NUM_GPUS", 1))
            assert args.diffusion_checkpoints_path == environment.get("DIFFUSION_CHECKPOINT", "misc/tiny-sd-digits")


# ---- --smoke changes values of flags, never flags


def shape(step):
    """(module, its flags without their values) of a command."""
    return step.module, tuple(word for word in step.argv if re.match(r"--[a-z]", word))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("more", [[], ["--online"], ["--baseline", "none"]])
def test_smoke_runs_the_same_commands(table, more):
    full, smoke = plan(table, *more), plan(table, "--smoke", *more)
    assert [c for c, _, _ in full] == [c for c, _, _ in smoke]
    for (cell, steps, folders), (_, toy, toy_folders) in zip(full, smoke):
        # the one addition: stand-ins for the teachers that torchvision would send
        extra = [step for step in toy if step.kind == "stand-in"]
        assert not [step for step in steps if step.kind == "stand-in"]
        assert bool(extra) == (cell.dataset == "imagenet" and table != 6)
        assert [shape(s) for s in toy if s.kind != "stand-in"] == [shape(s) for s in steps], cell.command
        assert list(folders) == list(toy_folders)
        networks = [[(s.kind, w) for w in s.argv if w in paper_tables.MODEL_TITLES] for s in steps]
        assert [n for n, s in zip(networks, steps)] == [
            [(s.kind, w) for w in s.argv if w in paper_tables.MODEL_TITLES] for s in toy if s.kind != "stand-in"
        ]


def test_the_recorded_commands_are_these(capsys):
    run_table.main(["--table", "1", "--smoke", "--commands"])
    lines = capsys.readouterr().out.splitlines()
    steps = [step for _, own, _ in plan(1, "--smoke") for step in own]
    assert [line for line in lines if not line.startswith("#")] == [step.line() for step in steps]
    run_table.main(["--table", "1", "--commands", "--jobs", "8", "--dataset", "cifar10", "--ipc", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torchrun --standalone --nproc_per_node 8 -m distillation.gen_syn") for line in lines)
    assert all(line.startswith("python -m") for line in lines if "validate.train_FKD" in line)
    run_table.main(["--table", "1", "--smoke", "--commands", "--jobs", "8"])  # all in this process, or two
    assert "torchrun" not in capsys.readouterr().out


# ---- the commands are the launchers', and name their output as the stages do


def launcher_args(path, module, tmp_path, **variables):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), **variables}
    out = subprocess.run(["sh", str(ROOT / path)], env=environment, check=True, capture_output=True, text=True).stdout
    argv = out.split("\0")[:-1]
    assert argv[1] == module
    return vars(run_table.parsed(module, argv[2:]))


@pytest.mark.parametrize(
    "dataset, stem, teacher",
    [("imagenet", "imgnt", "resnet18"), ("tiny_imagenet", "tnimgnt", "resnet18"), ("cifar10", "cf10", "convnet_w128")],
)
def test_a_cell_has_the_launchers_values(dataset, stem, teacher, tmp_path):
    """The same stages by hand, IPC=50 sh gen_prototype_... and so on, make the same cell."""
    table = 1 if dataset == "cifar10" else 2
    [(_, steps, _)] = plan(
        table, "--dataset", dataset, "--ipc", "50", "--student", teacher, "--method", "d4m", "--baseline", "none"
    )
    own = "" if dataset == "imagenet" else f"_{stem}"
    launchers = {
        "teacher": f"matching/train_teacher_{stem}.sh",
        "prototypes": f"distillation/gen_prototype_{stem}.sh",
        "images": f"distillation/gen_syn_image_{stem}.sh",
        "labels": f"matching/matching{own}.sh",
        "student": f"validate/train_FKD{own}.sh",
    }
    free = {"seeds", "latent_cache", "num_workers"}  # of no consequence, or the table's own
    for step in steps:
        by_hand = launcher_args(launchers[step.kind], step.module, tmp_path, IPC="50")
        ours = vars(run_table.parsed(step.module, step.argv))
        # values that a launcher leaves to their defaults
        for args in (ours, by_hand):
            args["teacher_checkpoint"] = [
                c for c in args.get("teacher_checkpoint") or [] if c != "torchvision"
            ] or None
            args["image_size"] = args.get("image_size") or run_table.FULL[dataset].get("image_size", 224)
            if step.kind == "student":
                args |= {"fkd_seed": None}
        assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in by_hand.items() if k not in free}


@pytest.mark.parametrize("table", (1, 2, 3, 4, 5))
def test_what_the_commands_make_fills_their_cells(table):
    """Students and teachers of the full commands have the recipes that a result needs to fill a cell."""
    from test_recipes import arguments_of

    for cell, steps, _ in plan(table):
        for step in steps:
            args = run_table.parsed(step.module, step.argv)
            if step.kind == "student":
                arguments = arguments_of(args, cell.dataset)
                recipe = paper_recipe(cell.dataset)
                assert paper_tables.recipe_differences(recipe, arguments, cell.ipc) == [], step.line()
            elif step.kind == "teacher":
                recorded = {**vars(args), **train_teacher.recipe_of(args)._asdict()}
                assert args.bn_batch == recorded["batch_size"], "BatchNorm would see what one of several GPUs holds"
                assert {"train_images None", "val_images None"} == set(paper_tables.teacher_differences(recorded))


def test_cells_find_their_images_by_the_stages_own_names():
    for table in (1, 2, 3, 4, 5):
        for cell, steps, folders in plan(table):
            made = [s.folder.name for s in steps if s.kind in ("images", "stm", "taken", "random")]
            assert images_name(cell.dataset, cell.ipc, cell.arm) in made, cell.command
            assert images_name(cell.dataset, cell.ipc, "random") in made
            assert set(folders) == {"result", "random", "hard"}


def test_plan_counts_each_shared_command_once(capsys):
    run_table.main(["--table", "5", "--plan"])
    head, *lines = capsys.readouterr().out.splitlines()
    # stages 1 and 2, random images; labels of 2 image sets by 3 teachers; 15 + 15 + 5 students
    assert "15 cells, 44 commands, 0 on disk" in head and len(lines) == 15
    assert all(re.search(r"of \d+ commands on disk; .+ on one H200, \d+ GB if run alone", line) for line in lines)


def test_plan_says_done_and_counts_no_encode_twice(tmp_path, capsys):
    argv = ["--table", "1", "--dataset", "cifar10", "--ipc", "10", "--out", str(tmp_path)]
    steps = {step.kind: step for _, own, _ in plan(*argv[1:]) for step in own}
    encode = steps["prototypes"].once[1]
    assert encode == pytest.approx(50000 / run_table.ENCODE / 3600)
    # a ConvNet of 320,010 weights trains no faster than its steps can be started: 5 seeds x 500 epochs x 1 batch
    assert steps["student"].hours >= 5 * 500 * run_table.STEP / 3600
    assert steps["teacher"].hours >= 200 * 390 * run_table.STEP / 3600
    cache = tmp_path / "latents" / "cifar10-latents-0123456789ab"
    cache.mkdir(parents=True)
    for n in range(10):
        assert plan(*argv[1:])[0][1][1].once[1] == pytest.approx(encode * (1 - n / 10))
        (cache / f"{n:04d}_x.safetensors").touch()
    assert plan(*argv[1:])[0][1][1].once[1:] == (0, 0)
    for step in steps.values():
        step.folder.mkdir(parents=True, exist_ok=True)
        (step.folder / "manifest.json").write_text("{}")
    run_table.main([*argv, "--plan"])
    assert "commands on disk" in capsys.readouterr().out.splitlines()[1]  # labels and students of the baselines
    for step in (step for _, own, _ in plan(*argv[1:]) for step in own):
        step.folder.mkdir(parents=True, exist_ok=True)
        (step.folder / "manifest.json").write_text("{}")
    run_table.main([*argv, "--plan"])
    [head, line] = capsys.readouterr().out.splitlines()
    assert line.endswith("--student convnet_w128  # done") and "left: nothing" in head


def test_what_is_the_papers_value_is_no_change():
    def changed(table, *flags):
        return list(run_table.changes(run_table.get_args(["--table", str(table), *flags])))

    own = ["--size", "512", "--epochs", "300", "--batch_size", "1024"]
    assert changed(2, *own) == [] and changed(2, *own[:3], "299", *own[4:]) == ["epochs"]
    assert changed(1, *own) == ["epochs", "batch_size"]  # CIFAR's are others
    assert changed(2, "--dataset", "tiny_imagenet", "--teacher_epochs", "200") == []
    assert changed(2, "--dataset", "tiny_imagenet", "--teacher_epochs", "90") == ["teacher_epochs"]
    assert changed(2, "--classes", "0-999") == ["classes"]


def test_flags_that_do_not_go_together_are_refused(refused):
    refused(run_table.main, ["--table", "1", "--plan", "--baseline", "none", "random"], "--baseline none random")
    for flag, value in (("ipc", "50"), ("student", "resnet18"), ("epochs", "3")):
        refused(run_table.main, ["--table", "6", "--plan", f"--{flag}", value], "--table 6", f"--{flag}")
    refused(run_table.main, ["--table", "1", "--smoke", "--epochs", "500"], "--smoke", "--epochs")


def test_choosing_nothing_is_refused(refused):
    refused(run_table.main, ["--table", "2", "--dataset", "cifar10"], "--table 2", "ImageNet-1K")
    refused(run_table.main, ["--table", "2", "--student", "resnet81"], "resnet81")


# ---- the right cell gets the right number


def teacher_arguments(dataset, arch, **changed):
    """What train_teacher records of a teacher by its own recipe."""
    from distillation.datasets import DATASETS
    from matching.train_teacher import default_recipe
    from validate.paper_tables import TEST_IMAGES, TRAIN_IMAGES

    own = {"input_size": DATASETS[dataset].image_size, "momentum": 0.9, "schedule": "cosine", "label_smoothing": 0.0}
    own |= {"classes": None, "max_images_per_class": 0, "amp": "none", "val_images": TEST_IMAGES[dataset], "seed": 0}
    own |= {"train_images": TRAIN_IMAGES[dataset], "min_scale_crops": 0.08, "max_scale_crops": 1.0}
    recipe = default_recipe(dataset, arch)
    own["bn_batch"] = recipe.batch_size
    return {"dataset": dataset, "arch": arch, **recipe._asdict(), **own, **changed}


def fake(
    root,
    name,
    dataset,
    ipc,
    arm,
    images,
    student,
    teacher,
    mean,
    labels="stored",
    n=3,
    weights=None,
    classes=None,
    generator=DEFAULT_CHECKPOINT,
    unet="u",
    teacher_changed=None,
    labelled=None,
    real_images=None,
    **changed,
):
    """A results.json as stage 4 writes it, with top-1 values around `mean`."""
    from matching.models import TEACHER_WEIGHTS
    from validate.paper_tables import CLASSES, RECIPES, TEST_IMAGES, TRAIN_IMAGES

    recipe = RECIPES[paper_recipe(dataset)]
    arguments = {"model": student, "labels": labels, "dataset": dataset, "amp": "none"}
    arguments |= {k: v({**arguments, "ipc": ipc}) if callable(v) else v for k, v in recipe.items()}
    arguments["test_images"] = TEST_IMAGES[dataset]
    classes = classes or CLASSES[dataset]
    hashes = {"unet_sha256": unet, "vae_sha256": "v", "text_encoder_sha256": "t"}
    real_images = real_images or TRAIN_IMAGES["imagenet" if arm == "d4m-g" else dataset]
    made_by = None if arm == "random" else {"model": generator, "revision": None, **hashes}
    if weights is None:
        weights = f"torchvision {TEACHER_WEIGHTS[teacher]}" if dataset == "imagenet" else "train_teacher"
    if labels == "hard":
        arguments |= {"loss": "ce", "temperature": 3.0}
        teacher = None
    made_with = teacher_arguments(dataset, teacher) if weights == "train_teacher" and teacher else None
    if teacher_changed:
        made_with |= teacher_changed
    values = [mean + (i - (n - 1) / 2) for i in range(n)]
    std = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5 if n > 1 else None
    top1 = {"mean": mean, "std": std, "n": n, "values": values}
    results = {
        "arguments": {**arguments, **changed},
        "images": {
            "name": images,
            "arm": arm,
            "ipc": ipc,
            "classes": classes,
            "count": ipc * classes,
            "generator": made_by,
            "real_images": real_images,
        },
        "teacher": [{"arch": teacher, "weights": weights, "sha256": "y", "arguments": made_with}] if teacher else [],
        "labels": {"amp": "none", "channels_last": False, **(labelled or {})} if teacher else None,
        "summary": {"last": {"top1": top1, "top5": top1}, "best": {"top1": {**top1, "mean": mean + 0.5}}},
        "seeds": [],
    }
    folder = root / "students" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def value_of(cell, which):
    """A number that no other cell, baseline or decoy has."""
    key = (cell.dataset, cell.ipc, cell.arm if which != "random" else "random", cell.student)
    key += (cell.teacher if which != "hard" else None, which == "hard")
    return VALUES.setdefault(key, 1 + 0.1 * len(VALUES))


VALUES = {}
TEACHER_DECOYS = {
    "m": {"epochs": 3}, "o": {"bn_batch": 16}, "p": {"min_scale_crops": 0.5}, "q": {"max_scale_crops": 0.9},
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of every cell and baseline of every table, among decoys that differ in one thing each."""
    root, made = tmp_path_factory.mktemp("output"), set()
    cells = [cell for table in (1, 2, 3, 4, 5) for cell in run_table.table_cells(table)]
    for cell in cells:
        for which, arm, labels in (
            ("result", cell.arm, "stored"),
            ("random", "random", "stored"),
            ("hard", cell.arm, "hard"),
        ):
            mean, name = value_of(cell, which), images_name(cell.dataset, cell.ipc, arm)
            if mean in made:
                continue
            made.add(mean)
            own = (cell.dataset, cell.ipc, "d4m-g" if arm == "d4m-g" else arm, name, cell.student, cell.teacher)
            fake(root, f"{len(made):03d}", *own, mean, labels)
            if which == "result" and cell.table in (1, 2):
                decoy = 90 + len(made) / 100
                fake(root, f"{len(made):03d}a", *own, decoy, labels, batch_size=7, n=9)  # another recipe
                fake(root, f"{len(made):03d}b", *own, decoy, labels, n=1)  # fewer seeds
                other = own[:3] + (name.replace("s0.7", "s0.5") + "_seed1",) + own[4:]
                fake(root, f"{len(made):03d}c", *other, decoy, labels, n=9)  # other images
                fake(root, f"{len(made):03d}d", *own[:5], "vgg11", decoy, labels, n=9)  # another teacher
                fake(root, f"{len(made):03d}e", *own, decoy, labels, n=9, weights="file")  # its other weights
                fake(root, f"{len(made):03d}f", *own, decoy, labels, n=9, classes=7)  # a part of the classes
                fake(root, f"{len(made):03d}g", *own, decoy, labels, n=9, amp="bf16")  # another precision
                fake(root, f"{len(made):03d}h", *own, decoy, labels, n=9, generator="sd15-tuned")  # another model
                fake(root, f"{len(made):03d}i", *own, decoy, labels, n=9, unet="w")  # one of the same name
                fake(root, f"{len(made):03d}j", *own, decoy, labels, n=9, bn_batch=1024)  # other BatchNorm batches
                fake(root, f"{len(made):03d}k", *own, decoy, labels, n=9, input_size=128)  # another size
                fake(root, f"{len(made):03d}l", *own, decoy, labels, n=9, test_images=100)  # a part of the test set
                fake(root, f"{len(made):03d}n", *own, decoy, labels, n=9, real_images=500)  # a part of the data
                # labels of another precision, or memory layout
                fake(root, f"{len(made):03d}r", *own, decoy, labels, n=9, labelled={"amp": "bf16"})
                fake(root, f"{len(made):03d}s", *own, decoy, labels, n=9, labelled={"channels_last": True})
                if cell.dataset != "imagenet":  # a teacher that was trained otherwise
                    for suffix, changed in TEACHER_DECOYS.items():
                        fake(root, f"{len(made):03d}{suffix}", *own, decoy, labels, n=9, teacher_changed=changed)
    return root


@pytest.mark.parametrize("table", (1, 2, 3, 4, 5))
def test_the_right_cell_gets_the_right_number(results, table):
    found = paper_tables.find_results(results)
    rows = paper_tables.table_rows(table, lambda cell: paper_tables.match_all(cell, found))
    ours = [row for row in rows if row["ours"]]
    cells = run_table.table_cells(table)
    assert len(ours) == len(cells)
    for row, cell in zip(ours, cells):
        for which in ("result", "random", "hard"):
            assert row[which]["last"]["mean"] == pytest.approx(value_of(cell, which)), (cell.command, which)
        assert row["result"]["last"]["n"] == 3 and row["result"]["last"]["std"] == pytest.approx(1)
        assert row["paper"] == cell.paper["top1"]
    others = [row for row in rows if not row["ours"]]
    assert not [row for row in others if row.get("result") or row.get("random") or row.get("hard")]


DECOYS = {  # suffix of its folder -> what it is listed with
    "a": "batch_size 7", "b": "another result over as many seeds or more is shown", "c": "images ",
    "d": "teacher vgg11", "e": "weights file", "f": "classes 7", "g": "precision bf16", "h": "generator sd15-tuned",
    "i": f"generator {DEFAULT_CHECKPOINT} (unet w)", "j": "bn_batch 1024", "k": "input_size 128",
    "l": "test images 100", "m": "teacher's epochs 3", "n": "real images 500", "o": "teacher's bn_batch 16",
    "p": "teacher's min_scale_crops 0.5", "q": "teacher's max_scale_crops 0.9", "r": "labels' precision bf16",
    "s": "labels' channels_last True",
}  # fmt: skip


def test_what_is_no_cells_number_is_listed_aside(results, tmp_path, capsys):
    others = paper_tables.other_rows(paper_tables.find_results(results))
    names = [Path(row["result"]["path"]).parent.name for row in others]
    assert names == sorted(p.name for p in (results / "students").iterdir() if p.name[3:])
    for name, row in zip(names, others):
        why = ", ".join(row["why"])
        assert why.startswith(DECOYS[name[3:]]), (name, why)
    paper_tables.main(["--output_root", str(results), "--table", "1", "--dataset", "cifar10"])
    text = capsys.readouterr().out.split("### Other results")[1]
    lines = [line for line in text.splitlines() if line.startswith("| CIFAR-10 ")]
    assert len(lines) == sum(row["dataset"] == "cifar10" for row in others) > 0
    for form, suffix in (("latex", "tex"), ("json", "json"), ("markdown", "md")):
        paper_tables.main(["--output_root", str(results), "--format", form, "--output", str(tmp_path)])
        assert "sd15-tuned" in (tmp_path / f"other_results.{suffix}").read_text()


def test_another_generator_fills_cells_only_where_it_is_named(results, capsys):
    rows = paper_tables.find_results(results)
    for cell in run_table.table_cells(2):
        found = paper_tables.match_all(cell, rows, "sd15-tuned")
        assert found["result"]["generator"] == "sd15-tuned" and found["result"]["last"]["mean"] > 90
        assert found["random"]["last"]["mean"] == pytest.approx(value_of(cell, "random"))  # no model made these
        assert found["hard"] is None
    argv = ["--output_root", str(results), "--table", "2", "--diffusion_checkpoints_path", "sd15-tuned"]
    paper_tables.main(argv)
    head = capsys.readouterr().out.splitlines()[0]
    assert "Images by sd15-tuned" in head
    paper_tables.main(argv[:4])
    assert "Images by" not in capsys.readouterr().out


def test_of_several_teachers_the_table_takes_those_of_its_recipe(tmp_path):
    def teacher(name, top1, arch="convnet_w128", **changed):
        arguments = teacher_arguments("cifar10", arch, **changed)
        scores = {which: {"epoch": 1, "top1": top1, "top5": 99.0} for which in ("last", "best")}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(
            json.dumps({"arguments": arguments, "parameters": 1, "rows": [], **scores})
        )

    def full_row():
        rows = paper_tables.table_rows(1, lambda cell: {}, paper_tables.find_teachers(tmp_path))
        return next(row for row in rows if (row["dataset"], row["method"]) == ("CIFAR-10", "Full dataset"))

    teacher("z", 70.0, epochs=5)
    assert paper_tables.find_teachers(tmp_path)["cifar10", "convnet_w128"]["differs"] == ["epochs 5"]
    assert full_row()["result"] is None
    teacher("a", 84.0)
    teacher("b", 86.0, seed=1)
    teacher("c", 60.0, classes=["0-4"])
    teacher("y", 50.0, val_images=100)
    teacher("x", 40.0, bn_batch=16)
    teacher("w", 30.0, max_scale_crops=0.9)
    teacher("d", 95.0, arch="resnet18")
    assert full_row()["result"]["last"] == {"mean": 85.0, "std": pytest.approx(2**0.5), "n": 2, "values": [84.0, 86.0]}


def test_markdown_latex_and_json_agree(results, tmp_path, capsys):
    for form in ("markdown", "latex", "json"):
        paper_tables.main(["--output_root", str(results), "--format", form, "--output", str(tmp_path)])
    capsys.readouterr()
    for table in (1, 2, 3, 4, 5):
        text = (tmp_path / f"table{table}.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len({len(line.split("|")) for line in lines}) == 1
        data = json.loads((tmp_path / f"table{table}.json").read_text())
        tex = (tmp_path / f"table{table}.tex").read_text()
        body = [line for line in tex.splitlines() if line.endswith("\\\\")]
        assert len(body) == len(data["rows"]) + 1 == len(lines) - 1
        assert len({line.count(" & ") for line in body}) == 1 and tex.count("\\toprule") == 1
        assert not re.search(r"(?<!\\)[%#_](?!\\usepackage)", tex.replace("% \\usepackage", ""))
        for row in data["rows"]:
            if row["ours"]:
                mean = f"{row['result']['last']['mean']:.1f}"
                assert any(f" {mean} ± 1.0 " in line for line in lines)
                assert any(f" {mean} $\\pm$ 1.0 " in line for line in body)
                assert Path(row["result"]["path"]).is_file()


def test_a_baseline_over_other_seeds_says_so(tmp_path, capsys):
    name = {arm: images_name("cifar10", 10, arm) for arm in ("d4m", "random")}
    for arm, n in (("d4m", 3), ("random", 2)):
        fake(tmp_path, arm, "cifar10", 10, arm, name[arm], "convnet_w128", "convnet_w128", 50.0, n=n)
    fake(tmp_path, "hard", "cifar10", 10, "d4m", name["d4m"], "convnet_w128", None, 40.0, labels="hard", n=3)
    paper_tables.main(["--output_root", str(tmp_path), "--table", "1"])
    [line] = [text for text in capsys.readouterr().out.splitlines() if "| 56.2 ± 0.4 |" in text]
    assert [word.strip() for word in line.split("|")[9:-1]] == ["3", "50.0 ± 0.7 (n = 2)", "40.0 ± 1.0"]


def test_what_was_not_run_is_blank(tmp_path, capsys):
    paper_tables.main(["--output_root", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("### Table") == 6
    numbers = {
        f"{row[key]:.1f}" for row in paper_rows() for key in ("top1", "std", "sec_per_image", "gpu_gb") if key in row
    }
    cells = [word.strip() for line in text.splitlines() if line.startswith("|") for word in line.split("|")]
    shown = {part for word in cells for part in re.findall(r"\d+\.\d+", word) if "T" not in word}
    assert shown == numbers
    paper_tables.main(["--output_root", str(tmp_path), "--format", "json", "--output", str(tmp_path)])
    for table in TABLES:
        for row in json.loads((tmp_path / f"table{table}.json").read_text())["rows"]:
            assert not any(row.get(name) for name in ("result", "random", "hard", "one", "batch"))


def test_a_runs_own_table_says_what_is_not_the_papers(tmp_path, capsys):
    """The cell that was asked for is shown all the same, with a heading that says what it is."""
    argv = ["--table", "1", "--dataset", "cifar10", "--ipc", "10", "--out", str(tmp_path)]
    args = run_table.get_args(argv)
    made = run_table.plan_of(args)
    [(_, _, folders)] = made
    for which, arm, labels in (("result", "d4m", "stored"), ("random", "random", "stored"), ("hard", "d4m", "hard")):
        name = images_name("cifar10", 10, arm)
        own = ("cifar10", 10, arm, name, "convnet_w128", "convnet_w128", 50.0, labels)
        fake(tmp_path, folders[which].name, *own, real_images=500 if which == "random" else None)
        (folders[which] / "manifest.json").write_text("{}")
    run_table.print_table(args, made)
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "### Table 1: CIFAR-10/100. Measured with real images 500, not as the paper"
    [line] = [text for text in out.splitlines() if "| 56.2 ± 0.4 |" in text]
    assert line.count("50.0 ± 1.0") == 3 and "Other results" not in out
    path = folders["random"] / "results.json"
    path.write_text(path.read_text().replace('"real_images": 500', '"real_images": 50000'))
    run_table.print_table(args, made)
    assert capsys.readouterr().out.splitlines()[0] == "### Table 1: CIFAR-10/100"


def test_a_cost_is_the_papers_generators_at_512_pixels(tmp_path):
    for name, batch_size, seconds in (("batch1", 1, 200.0), ("batch32", 32, 50.0)):
        for n, (model, size) in enumerate((("sd-tiny", 512), (DEFAULT_CHECKPOINT, 256), (DEFAULT_CHECKPOINT, 512))):
            folder = tmp_path / "cost" / name / "images" / f"imagenet_ipc10_s0.7_{n}"
            folder.mkdir(parents=True)
            made = {"model": model, "revision": None, "batch_size": batch_size, "prototype_arguments": {"size": size}}
            (folder / "args.json").write_text(json.dumps(made))
            (folder / "manifest.json").write_text(json.dumps({"count": 100}))
            timing = {"units": 100, "process_seconds": seconds * (1 if n == 2 else 100), "cuda_mib": 6144}
            (folder / "timing.json").write_text(json.dumps(timing))
    found = paper_tables.find_costs(tmp_path, "imagenet")
    assert found["one"] == {"sec_per_image": 2.0, "gpu_gb": 6.0, "count": 100, "resumed": False}
    assert found["batch"]["sec_per_image"] == 0.5
    assert paper_tables.find_costs(tmp_path, "imagenet", "sd-tiny")["one"]["sec_per_image"] == 200
    assert paper_tables.find_costs(tmp_path, "tiny_imagenet") == {"one": None, "batch": None}


def test_a_cost_of_a_resumed_run_is_that_of_the_images_it_made(tmp_path, capsys):
    for name, batch_size, units in (("batch1", 1, 40), ("batch32", 32, 0)):
        folder = tmp_path / "cost" / name / "images" / "imagenet_ipc10_s0.7"
        folder.mkdir(parents=True)
        made = {"model": DEFAULT_CHECKPOINT, "revision": None, "batch_size": batch_size}
        (folder / "args.json").write_text(json.dumps({**made, "prototype_arguments": {"size": 512}}))
        (folder / "manifest.json").write_text(json.dumps({"count": 100}))
        timing = {"units": units, "process_seconds": 2.0 * units + 1e-9, "cuda_mib": 6144}
        (folder / "timing.json").write_text(json.dumps(timing))
    paper_tables.main(["--output_root", str(tmp_path), "--table", "6", "--dataset", "imagenet"])
    [line] = [text for text in capsys.readouterr().out.splitlines() if "| D4M " in text]
    words = [word.strip() for word in line.split("|")[1:-1]]
    assert words[4:6] == ["2.00*", ""] and words[7:] == ["6.0*", ""]


@pytest.mark.parametrize("arm", ["d4m", "noise", "text"])
def test_images_of_another_vae_size_are_refused(arm, tmp_path, refused):
    """They would be skipped as done, and fill the cell, if their name says no size or somebody renamed them."""
    argv = ["--table", "4", "--dataset", "tiny_imagenet", "--student", "resnet18", "--out", str(tmp_path)]
    args = run_table.get_args(argv)
    planned = [entry for entry in run_table.plan_of(args) if entry[0].arm == arm]
    [folder] = {step.folder for _, steps, _ in planned for step in steps if step.kind == "images"}
    folder.mkdir(parents=True)
    made = {"model": DEFAULT_CHECKPOINT, "prototype_arguments": {"size": 512}}
    (folder / "args.json").write_text(json.dumps(made))
    run_table.check_generator(args, planned)
    made["prototype_arguments"]["size"] = 256
    (folder / "args.json").write_text(json.dumps(made))
    refused(lambda _: run_table.check_generator(args, planned), [], "--size 512", folder, "made with 256")


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("arguments", "dataset"), None, "no dataset in its arguments"),
        (("arguments", "dataset"), "mnist", "'mnist', which is unknown"),
        (("images", "arm"), None, "no arm in its images"),
        (("summary", "last", "top1"), None, "no top1 in its summary.last"),
        (("teacher", 0, "arch"), None, "no arch in its teacher"),
        (("teacher", 0, "arguments", "dataset"), None, "no dataset in its teacher.arguments"),
        (("teacher",), None, "no list of teachers"),
    ],
)
def test_a_result_that_does_not_say_what_it_is_is_one_line(where, value, words, tmp_path, refused):
    name = images_name("cifar10", 10, "d4m")
    fake(tmp_path, "a", "cifar10", 10, "d4m", name, "convnet_w128", "convnet_w128", 50.0)
    path = tmp_path / "students" / "a" / "results.json"
    found = part = json.loads(path.read_text())
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    if value is None:
        del part[where[-1]]
    path.write_text(json.dumps(found))
    refused(paper_tables.main, ["--output_root", tmp_path], path, words)


def test_a_trained_teacher_that_does_not_say_its_data_set_is_one_line(tmp_path, refused):
    (tmp_path / "results.json").write_text(json.dumps({"arguments": {"arch": "resnet18"}, "parameters": 1}))
    refused(paper_tables.main, ["--output_root", tmp_path], "results.json: no dataset in its arguments")


def test_a_missing_root_is_refused(tmp_path, refused):
    refused(paper_tables.main, ["--output_root", tmp_path / "nowhere"], "--output_root")


# ---- running


@pytest.fixture
def started(monkeypatch):
    """started(status_of) -> a list that grows by (step, processes) as steps are run; each makes its manifest."""

    def replace(status_of=lambda step: 0):
        ran = []

        def run(self, step, processes, device=None):
            ran.append((step, processes))
            if status_of(step) == 0:
                step.folder.mkdir(parents=True)
                (step.folder / "manifest.json").write_text("{}")
            return status_of(step)

        monkeypatch.setattr(run_table.Children, "run", run)
        return ran

    return replace


def table_one(tmp_path):
    return run_table.unique([s for _, steps, _ in plan(1, "--out", str(tmp_path)) for s in steps])


def test_steps_run_in_order_and_once(started, tmp_path):
    ran, steps = started(), table_one(tmp_path)
    run_table.run_steps(steps, 1, False)
    assert ran == [(step, 1) for step in steps] and len({step.folder for step in steps}) == len(steps)
    run_table.run_steps(steps, 1, False)  # all is on disk
    assert len(ran) == len(steps)


def test_jobs_give_stages_1_to_3_all_gpus_and_a_student_one(started, tmp_path):
    ran, steps = started(), table_one(tmp_path)
    run_table.run_steps(steps, 4, False)
    wide = [step for step in steps if step.kind != "student"]
    assert ran[: len(wide)] == [(step, 4) for step in wide]
    students = [step for step in steps if step.kind == "student"]
    assert sorted(ran[len(wide) :]) == sorted((step, 1) for step in students)


@pytest.mark.parametrize(
    "status, left", [(2, 2), (run_table.EXIT_STOPPED, run_table.EXIT_STOPPED), (-15, 75), (-9, 1)]
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_step_that_fails_ends_the_run(started, tmp_path, capsys, status, left, jobs):
    steps = table_one(tmp_path)
    bad = next(step for step in steps if step.kind == "student")
    ran = started(lambda step: status if step == bad else 0)
    with pytest.raises(SystemExit) as leaving:
        run_table.run_steps(steps, jobs, False)
    assert leaving.value.code == left
    assert ("run the same command" if left == 75 else bad.line()) in capsys.readouterr().err
    assert len(ran) == (steps.index(bad) + 1 if jobs == 1 else len(steps))  # other students finish all the same


def test_a_real_step_that_refuses_ends_the_run(tmp_path, capfd):
    argv = ["--table", "6", "--dataset", "imagenet", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as leaving:
        run_table.main([*argv, "--imagenet_dir", str(tmp_path / "nowhere")])
    assert leaving.value.code == 2
    err = capfd.readouterr().err
    assert "no such folder" in err and "left with status 2: python -m distillation.gen_prototype" in err


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.05)


STOPPED = """
import sys
from pathlib import Path
from validate import run_table

sys.executable = sys.argv[2] or sys.executable
step = run_table.Step("images", "sleeper", (), Path(sys.argv[1]) / "made")
run_table.run_steps([step], 2, False)
"""


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stop_signal_to_several_jobs_is_status_75(real, tmp_path):
    """torchrun, when it is stopped, leaves with status 1 itself; the stand-in does the same."""
    stub = tmp_path / "torchrun"
    stub.write_text(f"#!/bin/sh\ntrap 'exit 1' TERM\ntouch {tmp_path}/started\nwhile :; do sleep 0.1; done\n")
    stub.chmod(0o755)
    (tmp_path / "sleeper.py").write_text(
        f"import time\nopen({str(tmp_path / 'started')!r}, 'w').close()\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-c", STOPPED, str(tmp_path), "" if real else str(stub)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            wait_for(tmp_path / "started")
            running.send_signal(signal.SIGTERM)
            _, err = running.communicate(timeout=120)
        finally:
            running.kill()
    assert running.returncode == run_table.EXIT_STOPPED and "run the same command to go on" in err


# ---- a whole cell, end to end, at toy scale


def test_smoke_cell_end_to_end(tiny_sd, tmp_path, capsys, monkeypatch, refused):
    argv = ["--table", "1", "--smoke", "--dataset", "cifar10", "--ipc", "10", "--out", str(tmp_path)]
    argv += ["--diffusion_checkpoints_path", str(tiny_sd)]
    run_table.main(argv)
    out = capsys.readouterr().out
    assert "SMOKE TEST" in out
    [line] = [
        line for line in out.splitlines() if line.startswith("| CIFAR-10 ") and "| D4M " in line and "| 10 " in line
    ]
    words = [word.strip() for word in line.split("|")[1:-1]]
    assert words[5] == "56.2 ± 0.4" and all("±" in words[n] for n in (6, 7, 9, 10)) and words[8] == "2"
    rows = json.loads((tmp_path / "smoke" / "tables" / "table1.json").read_text())["rows"]
    [row] = [row for row in rows if row.get("result")]
    for which, labels in (("result", "stored"), ("random", "stored"), ("hard", "hard")):
        found = json.loads(Path(row[which]["path"]).read_text())
        assert found["arguments"]["labels"] == labels and found["summary"]["last"]["top1"] == row[which]["last"]
        assert found["images"]["arm"] == ("random" if which == "random" else "d4m")
        assert row[which]["generator"] == (None if which == "random" else tiny_sd.name)
    # the same command again finds all on disk
    monkeypatch.setattr(run_table, "run_here", lambda step: pytest.fail(step.line()))
    run_table.main(argv)
    assert "9 on disk" in capsys.readouterr().out
    # folders are not named by the model that made them
    other = ["--diffusion_checkpoints_path", "another/model"]
    refused(run_table.main, argv[:-2] + other, "another/model", f"was made with {tiny_sd.name}")


def test_smoke_cost_end_to_end(tiny_sd, tmp_path, capsys):
    argv = ["--table", "6", "--smoke", "--dataset", "imagenet", "--out", str(tmp_path)]
    run_table.main([*argv, "--diffusion_checkpoints_path", str(tiny_sd)])
    capsys.readouterr()
    rows = json.loads((tmp_path / "smoke" / "tables" / "table6.json").read_text())["rows"]
    [row] = [row for row in rows if row["one"]]
    assert row["method"] == "D4M" and row["paper"] == 2.7 and row["one"]["count"] == row["batch"]["count"] == 6
    assert row["one"]["sec_per_image"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("3", "--method", "stm", "--teacher", "resnet18", "--student", "resnet18"),
        ("2", "--method", "d4m-g", "--ipc", "50", "--student", "resnet18"),
        ("4", "--dataset", "imagenet", "--method", "noise", "--student", "resnet18", "--online"),
    ],
)
def test_smoke_cells_end_to_end(flags, tiny_sd, tmp_path, capsys):
    argv = ["--table", *flags, "--smoke", "--out", str(tmp_path), "--diffusion_checkpoints_path", str(tiny_sd)]
    run_table.main(argv)
    rows = json.loads((tmp_path / "smoke" / "tables" / f"table{flags[0]}.json").read_text())["rows"]
    rows = [row for row in rows if row.get("result") and row.get("random") and row.get("hard")]
    assert rows and all(row["result"]["generator"] == tiny_sd.name for row in rows)


def test_torchvisions_teacher_can_be_named(monkeypatch, tmp_path):
    """--teacher_checkpoint torchvision, as the tables say it, is the default."""
    from matching import models

    asked = []
    monkeypatch.setattr(
        models, "_public_weights", lambda name, size, dataset: asked.append(name) or pytest.skip("as it should")
    )
    with pytest.raises(pytest.skip.Exception):
        generate_soft_label.load_teachers(["resnet18"], ["torchvision"], "imagenet", ["n01440764"], 224, "cpu")
    assert asked == ["resnet18"]


def test_a_generator_is_what_the_images_come_from_in_the_end():
    own = {"model": "sd15", "revision": "abc", "unet_sha256": "1", "vae_sha256": "2", "strength": 0.7}
    expected = {"model": "sd15", "revision": "abc", "unet_sha256": "1", "vae_sha256": "2"}
    stm = {"arm": "stm", "source_arguments": own, "teacher_sha256": "3"}
    for arguments in (own, stm, {"arm": "stm-g", "source_arguments": stm}):
        assert generator_of(arguments) == expected
    assert generator_of({"arm": "random", "images_sha256": "4"}) is None
    own["prototype_arguments"] = {"images": 50000}
    assert real_images_of({"source_arguments": own}) == 50000 == real_images_of({"arm": "random", "images": 50000})
    assert real_images_of({**own, "prototype_arguments": None}) is None


# ---- a cell on CIFAR-10 photographs, from the launcher to the table


@pytest.mark.skipif("D4M_TEST_DATA" not in os.environ, reason="D4M_TEST_DATA names a folder of real photographs")
def test_table_1_on_cifar10_photographs(tmp_path, capsys, monkeypatch):
    """Three classes, a small generator and few epochs, by the launcher's flags: the right cell gets the right number.

    The number is computed again from the student's weights and the test images on disk.
    """
    data = tmp_path / "cifar10"
    for split, count in (("train", 20), ("val", 40)):
        for folder in sorted((Path(os.environ["D4M_TEST_DATA"]) / "cifar10" / split).iterdir()):
            (data / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, data / split / folder.name)
    small = ["--ipc", "10", "--dataset", "cifar10", "--classes", "0-2", "--size", "32", "--epochs", "4"]
    small += ["--batch_size", "10", "--teacher_epochs", "3", "--seeds", "0", "1", "--num_workers", "0"]
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), "CIFAR10_DIR": str(data)}
    environment |= {"OUT": str(tmp_path / "out"), "DIFFUSION_CHECKPOINT": str(ROOT / "misc" / "tiny-sd-digits")}
    run = ["sh", str(ROOT / "validate" / "table1.sh"), *small]
    argv = subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout.split("\0")[2:-1]

    # the stages themselves, without a Python process each
    monkeypatch.setattr(run_table.Children, "run", lambda self, step, *_: run_table.run_here(step) and None)
    run_table.main(argv)
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "tables" / "table1.json").read_text())
    assert "tiny-sd-digits" in table["title"] and "--epochs 4" in table["title"] and table["title"] in printed
    filled = [row for row in table["rows"] if any(row.get(which) for which in ("result", "random", "hard"))]
    [row] = filled
    assert (row["dataset"], row["ipc"], row["method"], row["paper"]) == ("CIFAR-10", 10, "D4M", 56.2)
    seen = set()
    for which, arm, labels in (("result", "d4m", "stored"), ("random", "random", "stored"), ("hard", "d4m", "hard")):
        folder = Path(row[which]["path"]).parent
        found = json.loads((folder / "results.json").read_text())
        assert (found["images"]["arm"], found["arguments"]["labels"]) == (arm, labels)
        images = found["images"]
        assert (images["count"], images["real_images"], found["arguments"]["dataset"]) == (30, 60, "cifar10")
        assert [t["arguments"]["epochs"] for t in found["teacher"]] == ([] if which == "hard" else [3])
        values = [top1_again(folder / f"student_seed{seed}.safetensors", data) for seed in (0, 1)]
        assert row[which]["last"]["values"] == pytest.approx(values)
        assert row[which]["last"]["mean"] == pytest.approx(sum(values) / 2) and row[which]["last"]["n"] == 2
        seen.add(folder)
    assert len(seen) == 3
    facts = json.loads((Path(row["result"]["path"]).parent / "manifest.json").read_text())
    assert [c["folder"] for c in facts["classes"]] == ["airplane", "automobile", "bird"]
    assert facts["images"]["generator"]["model"] == "tiny-sd-digits" and facts["images"]["real_images"] == 60

    # of the paper's own cell this is no number: it stays blank, and the results stand aside with what differs
    paper_tables.main(["--output_root", str(tmp_path / "out"), "--table", "1"])
    first, aside = capsys.readouterr().out.split("### Other results")
    [line] = [
        line for line in first.splitlines() if line.startswith("| CIFAR-10 ") and " D4M " in line and "| 10" in line
    ]
    assert [word.strip() for word in line.split("|")[6:-1]] == ["56.2 ± 0.4"] + [""] * 5
    lines = [line for line in aside.splitlines() if line.startswith("| CIFAR-10 ")]
    by_the_model = [line for line in lines if "| tiny-sd-digits |" in line and "| generator, images," in line]
    assert len(lines) == 3 and len(by_the_model) == 2


def top1_again(weights, data):
    """Top-1 in percent of a ConvNet-W128 of three classes on the test images in `data`, written out."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from matching.models import create_model

    model = create_model("convnet_w128", 3, 32).eval()
    model.load_state_dict(load_file(weights))
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    right = count = 0
    for label, name in enumerate(("airplane", "automobile", "bird")):
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((data / "val" / name).iterdir())])
        x = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            right += int((model(x).argmax(1) == label).sum())
        count += len(x)
    return 100 * right / count
