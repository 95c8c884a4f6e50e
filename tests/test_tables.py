"""The table scripts: what they print, choose, pass on, and make; cells that are made at once."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.functional import normalize, to_tensor

from distillation import datasets
from matching import models, train_teacher
from scripts import output
from tests.conftest import ROOT, everything
from tests.test_launchers import SHELL, commands, shell


def lines_of(table, *flags, **variables):
    """[(module, arguments)] of a table's stages, without those that print it and the report."""
    found = commands(f"validate/table{table}.sh", *flags, **variables)
    assert [module for _, module, _ in found[-2:]] == ["validate.paper_tables", "misc.report"]
    return [(module, arguments) for _, module, arguments in found[:-2]]


def stub(path, text):
    """A stand-in for Python that appends its arguments to `path`/calls, then runs `text`."""
    program = path / "python"
    program.write_text(f'#!/bin/sh\necho "$*" >> "{path}/calls"\n{text}\n')
    program.chmod(0o755)
    return str(program)


# ---- DRY_RUN


@pytest.mark.parametrize("table", range(1, 7))
def test_dry_run_prints_each_stage_command_once_and_makes_nothing(table, tmp_path):
    lines = lines_of(table, cwd=tmp_path)
    assert len({(module, *words) for module, words in lines}) == len(lines)
    for module, words in lines:
        args = importlib.import_module(module).get_args(words)
        assert args.wait and not args.dry_run
        if module == "matching.train_teacher":  # the launcher's recipe is the data set's own
            own = train_teacher.get_args(["--dataset", args.dataset, "--arch", args.arch])
            odd = {name for name, v in args.settings.items() if own.settings[name] != v}
            assert odd <= {"eval_every", "bn_batch"} and args.bn_batch == args.batch_size
    assert not everything(tmp_path)


def test_a_cell_is_its_launchers_in_the_order_of_the_method():
    cell = {"DATASET": "tiny_imagenet", "IPC": "50", "METHOD": "d4m", "STUDENT": "resnet50"}
    made = lines_of(2, BASELINES="", **cell)
    names = ["distillation/gen_prototype", "distillation/gen_syn_image", "matching/train_teacher"]
    names += ["matching/matching", "validate/train_FKD"]
    for (module, words), name in zip(made, names, strict=True):
        [(_, own, theirs)] = commands(f"{name}_tnimgnt.sh", IPC="50", STUDENT="resnet50")
        extra = ["--latent_cache", "output/latents"] if name.endswith("prototype") else []
        assert (module, words) == (own, [*theirs, *extra, "--wait"])


def test_baselines_are_random_real_images_and_hard_labels():
    cell = {"DATASET": "cifar10", "IPC": "10"}
    made = [words for module, words in lines_of(1, **cell) if module == "validate.train_FKD"]
    images = ["cifar10_ipc10_s0.7_g8_kmexpand1", "cifar10_ipc10_random"]
    names = [words[1].removeprefix("output/images/") for words in made]
    assert names == [*images, images[0]]
    assert ["--hard_label" in words for words in made] == [False, False, True]
    assert len(lines_of(1, BASELINES="hard", **cell)) == len(lines_of(1, BASELINES="", **cell)) + 1


def test_variables_choose_cells_and_flags_go_to_every_stage():
    networks, trained = {"TEACHER": "swin_t resnet18", "STUDENT": "vit_b_16"}, []
    for module, words in lines_of(5, "--num_workers", "2", IMAGENET_DIR="my data", **networks):
        args = importlib.import_module(module).get_args(words)
        assert args.num_workers == 2
        assert getattr(args, "data_dir", getattr(args, "val_dir", "my data")) == "my data"
        trained += [args.model] if module == "validate.train_FKD" else []
    assert trained == ["vit_b_16"] * 5  # two teachers, on two sets of images; hard labels
    only = lines_of(5, ONLY="distillation/gen_prototype validate/train_FKD", **networks)
    names = {module for module, _ in only}
    assert names == {"distillation.gen_prototype", "validate.train_FKD"}
    chosen = {"METHOD": "stm", "TEACHER": "resnet50", "STUDENT": "resnet18", "BASELINES": ""}
    [stm] = [words for module, words in lines_of(3, **chosen) if module == "matching.stm"]
    assert stm[stm.index("--arch") + 1] == "resnet18"  # whoever labels the images later


def test_online_needs_no_labels():
    made = lines_of(1, DATASET="cifar10", IPC="10", ONLINE="1", STUDENT_FLAGS="--amp bf16")
    assert "matching.generate_soft_label" not in [module for module, _ in made]
    trained = [words for module, words in made if module == "validate.train_FKD"]
    assert [("--online" in w, "--hard_label" in w) for w in trained] == [(1, 0), (1, 0), (0, 1)]
    assert all(words[-3:] == ["--amp", "bf16", "--wait"] for words in trained)


REFUSED = [(1, "IPC", "20"), (2, "DATASET", "cifar10"), (6, "STUDENT", "resnet18")]


@pytest.mark.parametrize("table, name, value", [*REFUSED, (1, "BASELINES", "rnadom")])
def test_cells_that_a_table_does_not_have_are_refused(table, name, value):
    ended = shell(f"validate/table{table}.sh", PYTHON="false", **{name: value})
    assert ended.returncode == 2 and ended.stderr.startswith("error: ")
    assert f"{name}={value}" in ended.stderr


# ---- running, with a stand-in


@pytest.mark.parametrize("failing, status", [("gen_syn_image", 75), ("hard_label", 2)])
def test_a_stage_that_fails_ends_the_table_with_its_status(tmp_path, failing, status):
    python = stub(tmp_path, f'case "$*" in *{failing}*) exit {status} ;; esac')
    ended = shell("validate/table1.sh", PYTHON=python, DATASET="cifar10", IPC="10")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended.returncode == status and failing in calls[-1]
    told = ended.stderr.splitlines()[0]
    assert told.startswith("table1.sh: DATASET='cifar10' IPC='10' METHOD='all' TEACHER='all'")


def test_a_finished_table_is_printed(tmp_path):
    python = stub(tmp_path, "")
    ended = shell("validate/table1.sh", PYTHON=python, NUM_GPUS="1", OUT="x y")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended.returncode == 0 and len(calls) == len(lines_of(1, OUT="x y")) + 2
    assert calls[-2] == "-m validate.paper_tables --table 1 --output_root x y"
    assert calls[-1] == "-m misc.report x y"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_reaches_the_stage_and_ends_the_table(tmp_path, number):
    """The stage gets it as SIGTERM and is waited for; no other starts; the status is 75."""
    stage = f"trap 'sleep 0.2; echo > {tmp_path}/left; exit 75' TERM; echo > {tmp_path}/ready"
    python = stub(tmp_path, f"{stage}; while :; do sleep 0.02; done")
    how = {"env": {"PATH": os.environ["PATH"], "PYTHON": python}}
    # a test run in the background ignores Ctrl-C, and so would all that it starts
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    how |= {"stderr": subprocess.PIPE, "text": True}
    table = subprocess.Popen([SHELL, ROOT / "validate" / "table2.sh"], **how)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    table.send_signal(number)
    said = table.communicate(timeout=20)[1]
    assert table.returncode == 75 and (tmp_path / "left").exists()
    assert said.splitlines()[-1] == "table2.sh: stopped; run the same command to go on"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_dry_run_reaches_every_stage_and_the_last_line_is_the_sum(tmp_path):
    plan = 'echo "plan: a: b/$$: 3 done, 10 files to do, 1.5 MiB of 900 MiB free; waits for c: d"'
    python = stub(tmp_path, plan)
    ended = shell("validate/table1.sh", "--dry_run", PYTHON=python, NUM_GPUS="8", IPC="10")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended.returncode == 0 and all(call.endswith("--wait --dry_run") for call in calls)
    *plans, last = ended.stdout.splitlines()
    n = len(lines_of(1, IPC="10"))
    assert len(plans) == len(calls) == n
    total = f"{3 * n} done, {10 * n} files to do, {1.5 * n:.1f} MiB of 900 MiB free"
    assert last == f"sum: {n} folders: {total}"
    ended = shell("validate/table1.sh", "--dry_run", PYTHON=stub(tmp_path, "exit 2"))
    assert ended.returncode == 2


# ---- real stages: a rehearsal


def rehearsal(tmp_path, **variables):
    """A running rehearsal that is as short as it can be."""
    own = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "SMOKE": "1", "IPC": "10"}
    own |= {"EPOCHS": "2", "SEEDS": "0", "TQDM_DISABLE": "1", "PATH": os.environ["PATH"]}
    command, how = [SHELL, ROOT / "validate" / "table1.sh"], {"stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=own | variables, text=True, **how)


@torch.no_grad()
def top1_again(folder):
    """Top-1 in percent of a student on the test digits, from its weights, by torchvision."""
    split, facts = datasets.open_split("digits", None, "val"), datasets.ALL["digits"]
    model = models.create_model("convnet_mini", 10, 32).eval()
    model.load_state_dict(load_file(folder / "student_seed0.safetensors"))
    right = []
    for label, items in enumerate(split.items):
        images = [to_tensor(datasets.squash(split.read(item), 32)) for item in items]
        x = normalize(torch.stack(images), facts.mean, facts.std)
        right.append(model(x).argmax(1) == label)
    return 100 * torch.cat(right).double().mean().item()


@pytest.mark.slow
def test_two_rehearsals_at_once_make_every_number_and_another_one_nothing(tmp_path):
    """The same stages 1-3: one waits for the other's folders, says so, and goes on."""
    started = [rehearsal(tmp_path, BASELINES=baselines) for baselines in ("", "random hard")]
    printed = [table.communicate(timeout=500)[0] for table in started]
    assert [table.returncode for table in started] == [0, 0]
    assert any("waiting for process" in text for text in printed)
    assert "rehearsal" in printed[1].splitlines()[0] and printed[1].count("| dataset digits") == 3
    folders = [path.parent for path in (tmp_path / "out").rglob(output.ARGS)]
    for folder in folders:
        runs = [row for row in output.log_rows(folder) if row.get("event") == "run"]
        assert sum(row["units"] > 0 for row in runs) == 1, folder  # made once, by one of them
    results = sorted((tmp_path / "out").rglob("students/*/results.json"))
    assert (len(folders), len(results)) == (9, 3)
    for path in results:
        found = json.loads(path.read_text())["summary"]["last"]["top1"]
        assert found["mean"] == pytest.approx(top1_again(path.parent))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert rehearsal(tmp_path).wait() == 0
    written = [p for p, then in kept.items() if p.stat().st_mtime_ns != then]
    assert {p.name for p in written} <= {output.LOG, output.TIMING}
