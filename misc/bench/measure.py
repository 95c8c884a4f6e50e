"""Measuring: two ways in turns, operations, ceilings of the machine, what time is spent in."""

import cProfile
import io
import os
import platform
import pstats
import re
import resource
import statistics
import subprocess
import time
from pathlib import Path

import torch


def spent(device):
    """(seconds, CPU-seconds of this process and its ended children) so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def in_turns(ways, turns, device):
    """Every way once a turn, in alternating order: ({name: [(seconds, CPU-seconds)]}, {name: last result})."""
    times, results, threads = {name: [] for name in ways}, {}, torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as CPU-seconds
    for turn in range(turns):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            before = spent(device)
            results[name] = ways[name]()
            times[name].append(tuple(b - a for a, b in zip(before, spent(device))))
    torch.set_num_threads(threads)
    return times, results


def clock_of(device):
    """Which of `spent`'s two numbers counts: seconds on a GPU, CPU-seconds on a CPU."""
    return 0 if device.type == "cuda" else 1


def compare(stage, what, unit, times, counts, device, release="release", ours="ours", agree=True, clock=None, **facts):
    """One row of the table. counts: units a turn of each way; facts: same, known, target, flops (a unit), ...

    agree   whether the outputs do, where there are any to compare: nothing is met by a way that makes others
    clock   which of `spent`'s two numbers; default: the device's
    """
    clock = clock_of(device) if clock is None else clock
    rates = {name: [counts[name] / max(t[clock], 1e-9) for t in times[name]] for name in (release, ours)}
    ratios = [b / a for a, b in zip(rates[release], rates[ours])]
    row = {
        "stage": stage,
        "what": what,
        "unit": unit,
        "per": "second" if clock == 0 else "CPU-second",
        "release": statistics.median(rates[release]),
        "ours": statistics.median(rates[ours]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "n": len(ratios),
        "agree": bool(agree),
        **facts,
    }
    if facts.get("flops"):
        seconds = [counts[ours] / max(t[0], 1e-9) for t in times[ours]]
        row["tflops"] = facts["flops"] * statistics.median(seconds) / 1e12
    target = facts.get("target")
    if target:
        row["met"] = bool(agree and row["ratio"] >= target and row["ours"] >= facts.get("least", 0))
    return row


def ceilings(device, n):
    """Measured TFLOP/s of an n x n matrix product by precision, and GB/s of a copy (read + written)."""
    found = {}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        dtypes |= {"tf32": torch.float32, "fp16": torch.float16}
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in dtypes.items():
        size = 256 if device.type == "cpu" and name == "bf16" else n  # seconds a product, without hardware for it
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        found[f"{name}_tflops"] = 2 * size**3 / best(lambda a=a, b=b: a @ b, device) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = before
    x = torch.empty(4 * 1536**2 if device.type == "cpu" else 4 * n * n, dtype=torch.float32, device=device)
    y = torch.ones_like(x)
    found["copy_gb_per_s"] = 2 * x.nbytes / best(lambda: x.copy_(y), device) / 1e9
    return found


def best(function, device, repeats=6, inner=4):
    seconds = []
    for _ in range(repeats):
        start = spent(device)[0]
        for _ in range(inner):
            function()
        seconds.append((spent(device)[0] - start) / inner)
    return min(seconds)


def flops_of(function):
    """Floating-point operations of a call, by PyTorch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def top_costs(function, device, rows=8):
    """[(what, seconds)] that a call spends most of its time in: kernels on a GPU, else functions."""
    if device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            function()
            torch.cuda.synchronize(device)
        events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:rows]
        return [(event.key[:80], event.self_device_time_total / 1e6) for event in events]
    profiler = cProfile.Profile()
    profiler.runcall(function)
    stats = pstats.Stats(profiler, stream=io.StringIO()).stats
    top = sorted(stats.items(), key=lambda item: -item[1][2])[:rows]
    return [(f"{Path(file).name}:{name}" if line else name, row[2]) for (file, line, name), row in top]


def commit():
    here = Path(__file__).parent
    try:
        found = [
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except OSError:
        return None
    return found[0] + (" + changes" if found[1] else "") if found[0] else None


def machine(device):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
