"""Peak memory is the stage's own, stands in timing.json and in the line that the stage prints."""

import numpy as np
import pytest
import torch

from scripts import runtime
from scripts.files import read_json, write_timing
from scripts.runtime import Process, Stopwatch, log_run, peak_memory, this_process

MIB = 2**20
CPU = Process(0, 1, torch.device("cpu"))


def touch(mib):
    np.ones(mib * MIB, np.uint8)


@pytest.fixture
def linux():
    if not (runtime.PROC / "clear_refs").exists():
        pytest.skip("this system cannot set the mark back")


def test_a_stage_starts_from_what_is_held_then(linux):
    touch(400)
    after_one = peak_memory()["host_mib"]
    this_process("cpu")
    assert peak_memory()["host_mib"] < after_one - 300
    before = peak_memory()["host_mib"]
    touch(100)
    assert 90 < peak_memory()["host_mib"] - before < 150 and set(peak_memory()) == {"host_mib"}


def test_two_runs_of_a_process_have_a_peak_each(linux, tmp_path):
    this_process("cpu")
    touch(400)
    said = [log_run(tmp_path, CPU, Stopwatch(), 3)]
    first = read_peak(tmp_path)
    (tmp_path / "log.jsonl").unlink()
    touch(50)
    said.append(log_run(tmp_path, CPU, Stopwatch(), 3))
    assert first - read_peak(tmp_path) > 250
    for line, mib in zip(said, (first, read_peak(tmp_path))):
        assert line == f"0 s, peak memory {mib / 2**10:.2f} GiB"


def read_peak(folder):
    write_timing(folder)
    return read_json(folder / "timing.json")["host_mib"]


def test_a_mark_that_cannot_be_set_back_is_said_to_be_the_whole_processs(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "PROC", tmp_path / "none")
    monkeypatch.setattr(runtime, "_whole_process", False)
    this_process("cpu")
    assert log_run(tmp_path, CPU, Stopwatch(), 1).endswith(" GiB (the whole process)")
    write_timing(tmp_path)
    timing = read_json(tmp_path / "timing.json")
    assert timing["since_start_of_process"] is True and timing["host_mib"] > 50


def test_the_gpus_peak_is_printed_and_forgotten_too(tmp_path, monkeypatch):
    """CUDA stood in for: which of its functions are called, with the device, in which order."""
    calls, device = [], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: calls.append(("read", d)) or 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: calls.append(("reset", d)))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    said = log_run(tmp_path, Process(0, 1, device), Stopwatch(), 1)
    assert said.endswith("GiB, 1.50 GiB on the GPU") and calls == [("read", device), ("reset", device)]
    write_timing(tmp_path)
    assert read_json(tmp_path / "timing.json")["cuda_mib"] == 1536


def test_stages_that_share_a_process_say_so(tmp_path):
    assert log_run(tmp_path, CPU, Stopwatch(), 1, "stages 1 and 2").endswith("GiB (stages 1 and 2)")
    write_timing(tmp_path)
    assert read_json(tmp_path / "timing.json")["peak_of"] == "stages 1 and 2"
