"""The sbatch files, run by sh with stand-ins for Slurm: shards, a warning passed on, a job put back into the queue."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tree
from reliability import STAGE_1

ROOT = Path(__file__).parent.parent
SBATCH = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
PYTHON = """#!/bin/sh
echo "$0" "$@" >> "$RECORD"
[ -n "${SLEEP:-}" ] || exit "${STATUS:-0}"
trap 'echo TERM >> "$RECORD"; sleep 0.2; exit "${STATUS:-75}"' TERM
touch "$RECORD.started"
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/sh
echo scontrol "$@" >> "$RECORD"
[ "$1" != show ] || echo node17
"""
# as Slurm's: a SIGTERM to srun itself kills the step
SRUN = """#!/bin/sh
shift
"$@" &
echo $! > "$RECORD.step"
trap 'kill -KILL $!; exit 143' TERM HUP
wait $!
"""
SCANCEL = """#!/bin/sh
echo scancel "$@" >> "$RECORD"
kill -TERM "$(cat "$RECORD.step")"
"""


@pytest.fixture
def slurm(tmp_path):
    """slurm(file, **variables) -> a running sbatch script; its record grows at tmp_path/record."""
    stand_ins = {"python": PYTHON, "torchrun": PYTHON, "scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PYTHON", "TORCHRUN", "NUM_GPUS"))}

    def start(file, *flags, **variables):
        environment = {
            **clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record"),
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[17-18]", **variables,
        }  # fmt: skip
        return subprocess.Popen(["sh", str(file), *flags], env=environment, stderr=subprocess.PIPE, text=True)

    return start


ARRAY = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}


def is_array(file):
    return "#SBATCH --array=0-" in file.read_text()


@pytest.mark.parametrize("file", SBATCH, ids=lambda f: f.stem)
def test_a_finished_job_is_not_put_back(file, slurm, tmp_path):
    job = slurm(file, "--seed", "1", **ARRAY)
    assert job.wait(20) == 0, job.stderr.read()
    [line] = [line for line in (tmp_path / "record").read_text().splitlines() if not line.startswith("scontrol show")]
    module = {"matching": "matching.generate_soft_label", "train_FKD": "validate.train_FKD"}.get(
        file.stem, f"distillation.{file.stem}"
    )
    assert f"-m {module} " in line
    if is_array(file):
        assert line.startswith(f"{tmp_path}/python") and line.endswith("--shard 2/4 --seed 1")
    else:
        assert f"{tmp_path}/torchrun --nnodes 1 --nproc_per_node 8" in line and "node17:29500" in line
        assert line.endswith("--seed 1")


def warned(slurm, tmp_path, file, number, **variables):
    """(exit status, what was called after the start) of a job that gets a signal."""
    job = slurm(file, SLEEP="1", **ARRAY, **variables)
    while not (tmp_path / "record.started").exists() and job.poll() is None:
        time.sleep(0.02)
    begun = len((tmp_path / "record").read_text().splitlines())
    job.send_signal(number)
    status, passed = job.wait(20), [] if is_array(file) else ["scancel --signal=TERM 41"]
    lines = (tmp_path / "record").read_text().splitlines()[begun:]
    assert lines[: len(passed) + 1] == [*passed, "TERM"]
    return status, lines[len(passed) + 1 :]


@pytest.mark.parametrize("file", SBATCH, ids=lambda f: f.stem)
def test_a_warning_reaches_the_stage_and_the_job_goes_back_into_the_queue(file, slurm, tmp_path):
    assert warned(slurm, tmp_path, file, signal.SIGUSR1) == (75, ["scontrol requeue 40_2"])


@pytest.mark.parametrize("file", SBATCH, ids=lambda f: f.stem)
def test_a_cancelled_job_stays_out_of_the_queue(file, slurm, tmp_path):
    assert warned(slurm, tmp_path, file, signal.SIGTERM) == (75, [])


def test_a_job_that_is_refused_after_its_warning_stays_out_of_the_queue(slurm, tmp_path):
    assert warned(slurm, tmp_path, SBATCH[0], signal.SIGUSR1, STATUS="2") == (2, [])


def test_a_failed_job_stays_out_of_the_queue(slurm, tmp_path):
    job = slurm(SBATCH[0], STATUS="2")
    assert job.wait(20) == 2 and "requeue" not in (tmp_path / "record").read_text()


@pytest.mark.parametrize("count, last", [("1", "2"), ("2", "3")], ids=["2", "2-3"])
def test_an_array_of_a_part_needs_the_number_of_shards(count, last, slurm, tmp_path):
    part = {**ARRAY, "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": last, "SLURM_ARRAY_TASK_COUNT": count}
    job = slurm(SBATCH[0], **part)
    assert job.wait(20) == 2 and "set SHARDS" in job.stderr.read()
    assert slurm(SBATCH[0], SHARDS="4", **part).wait(20) == 0
    assert (tmp_path / "record").read_text().rstrip().endswith("--shard 2/4")


def test_a_requeued_element_makes_the_same_shard(slurm, tmp_path):
    whole = {**ARRAY, "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "3"}
    assert [slurm(SBATCH[0], SLURM_RESTART_COUNT=n, **whole).wait(20) for n in ("0", "1")] == [0, 0]
    first, second = (tmp_path / "record").read_text().splitlines()
    assert first == second and first.endswith("--shard 2/4")


@pytest.mark.slow
def test_a_warned_stage_leaves_and_its_requeued_job_completes_it(slurm, made, model, tmp_path):
    """A real stage 1 behind a real sbatch file: warned after its first class, put back, and started again."""
    (tmp_path / "python").unlink()
    launcher, out = tmp_path / "launcher.sh", tmp_path / "out"
    slow = "import sys, time; from distillation import gen_prototype as g; f = g.write_class\n"
    slow += "g.write_class = lambda *a: (f(*a), time.sleep(1)); g.main(sys.argv[1:])"
    argv = " ".join([*STAGE_1, *model, "--save_prototype_path", str(out)])
    launcher.write_text(f"exec {sys.executable} -c '{slow}' {argv} \"$@\"\n")
    variables = {"LAUNCHER": str(launcher), "PYTHONPATH": str(ROOT)}
    job = slurm(ROOT / "scripts/slurm/gen_prototype.sbatch", **variables)
    while not list(out.rglob("0000_0.json")) and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == 75 and "scontrol requeue 41" in (tmp_path / "record").read_text()
    assert not list(out.rglob("manifest.json"))
    assert slurm(ROOT / "scripts/slurm/gen_prototype.sbatch", **variables).wait(120) == 0
    assert tree(out / made[0].name) == tree(made[0])


@pytest.mark.parametrize("file", SBATCH, ids=lambda f: f.stem)
def test_every_file_asks_to_be_put_back_after_preemption(file):
    text = file.read_text()
    options = re.findall(r"^#SBATCH (--[a-z-]+)", text, re.MULTILINE)
    assert {"--requeue", "--open-mode", "--signal", "--time", "--gres", "--output"} <= set(options)
    assert len(SBATCH) == 4 and max(map(len, text.splitlines())) <= 119
