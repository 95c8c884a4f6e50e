"""The sbatch files, by sh with stand-ins for Slurm: shards, warnings passed on, put back."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.conftest import ROOT

SBATCH = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
ARRAY = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
PYTHON = """#!/bin/sh
echo "$0" "$@" >> "$RECORD"
[ -n "${SLEEP:-}" ] || exit "${STATUS:-0}"
trap 'echo TERM >> "$RECORD"; sleep 0.2; exit "${STATUS:-75}"' TERM
touch "$RECORD.started"
while :; do sleep 0.05; done
"""
PROGRAMS = {"python": PYTHON}
PROGRAMS["scontrol"] = """#!/bin/sh
echo scontrol "$@" >> "$RECORD"
[ "$1" != show ] || echo node17
"""
# as Slurm's: a SIGTERM to srun itself kills the step
PROGRAMS["srun"] = """#!/bin/sh
shift
"$@" &
echo $! > "$RECORD.step"
trap 'kill -KILL $!; exit 143' TERM HUP
wait $!
"""
PROGRAMS["scancel"] = """#!/bin/sh
echo scancel "$@" >> "$RECORD"
kill -TERM "$(cat "$RECORD.step")"
"""


@pytest.fixture
def slurm(tmp_path):
    """slurm(file, *flags, **variables) -> a running sbatch script; it records at tmp_path/record"""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    surroundings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    surroundings |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41"}
    surroundings["SLURM_JOB_NODELIST"] = "node[17-18]"

    def start(file, *flags, **variables):
        command, environment = ["sh", str(file), *flags], {**surroundings, **variables}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def is_array(file):
    return "#SBATCH --array=0-" in file.read_text()


def record(tmp_path):
    return (tmp_path / "record").read_text().splitlines()


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.stem)
def test_a_finished_job_is_not_put_back(file, slurm, tmp_path):
    options = re.findall(r"^#SBATCH (--[a-z-]+)", file.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode", "--signal", "--time", "--gres", "--output"} <= set(options)
    job = slurm(file, "--seed", "1", **ARRAY)
    assert job.wait(20) == 0, job.stderr.read()
    [line] = [line for line in record(tmp_path) if not line.startswith("scontrol show")]
    module = {"matching": "matching.generate_soft_label", "train_FKD": "validate.train_FKD"}
    assert f"-m {module.get(file.stem, f'distillation.{file.stem}')} " in line
    if is_array(file):
        assert line.startswith(f"{tmp_path}/python") and line.endswith("--shard 2/4 --seed 1")
    else:
        assert f"{tmp_path}/python -m scripts.torchrun --nnodes 1 --nproc_per_node 8" in line
        assert "node17:29500" in line and line.endswith("--seed 1")


def warned(slurm, tmp_path, file, number, **variables):
    """(exit status, what was called after the stage's SIGTERM) of a job that gets a signal."""
    (tmp_path / "record.started").unlink(missing_ok=True)
    job = slurm(file, SLEEP="1", **ARRAY, **variables)
    while not (tmp_path / "record.started").exists() and job.poll() is None:
        time.sleep(0.02)
    begun = len(record(tmp_path))
    job.send_signal(number)
    status, passed = job.wait(20), [] if is_array(file) else ["scancel --signal=TERM 41"]
    lines = record(tmp_path)[begun:]
    assert lines[: len(passed) + 1] == [*passed, "TERM"]
    return status, lines[len(passed) + 1 :]


@pytest.mark.parametrize("file", [SBATCH[0], SBATCH[-1]], ids=["array", "torchrun"])
def test_a_warned_job_is_put_back_and_a_cancelled_one_stays_out(file, slurm, tmp_path):
    again = ["scontrol requeue 40_2"]
    assert warned(slurm, tmp_path, file, signal.SIGUSR1) == (75, again)
    assert warned(slurm, tmp_path, file, signal.SIGTERM) == (75, [])
    assert warned(slurm, tmp_path, file, signal.SIGUSR1, STATUS="2") == (2, [])


def test_a_job_that_is_refused_stays_out_of_the_queue(slurm, tmp_path):
    assert slurm(SBATCH[0], STATUS="2").wait(20) == 2
    assert not [line for line in record(tmp_path) if "requeue" in line]


@pytest.mark.parametrize("file", SBATCH, ids=lambda file: file.stem)
def test_a_job_from_another_folder_is_told_where_to_submit(file, slurm, tmp_path):
    job = slurm(file, SLURM_SUBMIT_DIR=str(tmp_path))
    assert job.wait(20) == 2 and job.stderr.read() == f"error: {tmp_path}: submit from D4M's root\n"


@pytest.mark.parametrize("count, last", [("1", "2"), ("2", "3")], ids=["2", "2-3"])
def test_an_array_of_a_part_needs_the_number_of_shards(count, last, slurm, tmp_path):
    part = {**ARRAY, "SLURM_ARRAY_TASK_MAX": last, "SLURM_ARRAY_TASK_COUNT": count}
    job = slurm(SBATCH[0], **part)
    assert job.wait(20) == 2 and "set SHARDS" in job.stderr.read()
    for again in ("0", "1"):  # a requeued element makes the same shard
        assert slurm(SBATCH[0], SHARDS="4", SLURM_RESTART_COUNT=again, **part).wait(20) == 0
    first, second = record(tmp_path)
    assert first == second and first.endswith("--shard 2/4")
