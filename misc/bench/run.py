"""The run: what the stages share, and their rows as one JSON value."""

import copy
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from misc.bench.inputs import photographs, replay_set
from misc.bench.measure import ceilings, commit, compare, flops_of, in_turns, machine, top_costs
from misc.bench.networks import pipelines, real_flops
from misc.bench.stage_1 import stage_1
from misc.bench.stage_2 import stage_2
from misc.bench.stage_3 import stage_3
from misc.bench.stage_4 import stage_4
from misc.bench.tables import table
from scripts.files import library_versions
from scripts.runtime import forget_peak_memory, peak_memory

SECONDS = 480  # of a whole run
STAGES = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4}


class Size(NamedTuple):
    """How much is timed. Every number is of units a turn, so that a run stays below 8 minutes."""

    turns: int
    real: bool  # Stable Diffusion 1.5 and ResNets, or small networks
    faster: tuple  # stages 1-2: what else is timed beside the stage's defaults
    pictures: int  # different photographs, for replay
    encode: tuple  # stage 1: images of a class by the release's way; classes by ours, and images of each
    workers: int  # stage 1: readers, as the release's launcher
    ipcs: tuple  # stage 1: prototypes of a class; all of them from the cache, the first from images
    cached: tuple  # stage 1: classes in the cache, and latents of each
    synthesis: tuple  # stage 2: images by the release's way, by ours
    steps: int  # stage 2: num_inference_steps
    batch: int  # stages 3-4
    epoch: int  # stage 3-4: images an epoch, for networks
    side: int  # stage 3-4: pixels, for networks
    spawned: int  # stage 3-4: workers that the release starts for an epoch
    matmul: int


SIZES = {
    "cuda": Size(
        2,
        True,
        ("channels_last + compile",),
        256,
        (512, 3, 1300),
        4,
        (10, 200),
        (3, 1300),
        (3, 64),
        50,
        1024,
        10240,
        224,
        8,
        8192,
    ),
    "cpu": Size(3, False, (), 256, (16, 1, 16), 0, (10, 200), (1, 1300), (4, 16), 10, 1024, 1024, 64, 2, 1536),
    "quick": Size(1, False, ("channels_last",), 16, (8, 2, 12), 0, (2, 4), (2, 12), (2, 4), 4, 8, 16, 32, 1, 64),
}


class Bench:
    """What the stages share: device, sizes, pictures, a temporary folder; the rows as they come."""

    def __init__(self, device, size, pictures, root, profile, log, arch=None):
        self.device, self.size, self.pictures, self.root = device, size, pictures, root
        self.profile, self.rows, self.facts, self.log = profile, [], {}, log
        self.images = SimpleNamespace(folders=tuple(range(1000)), dataset="imagenet")
        self.archs = (arch,) if arch else ("resnet18", "resnet101") if size.real else ("convnet_mini",)  # stages 3-4
        self.started = time.perf_counter()
        self.spawned = size.spawned if device.type == "cuda" else 0  # the release's workers beside the networks
        self.limits = ceilings(device, size.matmul)
        self._network_set, self._pipelines = None, (None, None)

    def pipelines(self, side):
        """(stage 1's pipeline, stage 2's) for pictures of `side` px, made once: random numbers take seconds."""
        if self._pipelines[0] != side:
            self._pipelines = side, pipelines(self.size.real, side, self.device, self.root)
        return self._pipelines[1]

    def drop_pipelines(self):
        """Their memory is none of stage 3's and 4's."""
        self._pipelines = None, None

    def warm_up(self, *ways):
        """On a GPU: memory is taken, kernels are chosen or compiled, before anything is timed."""
        for way in ways if self.device.type == "cuda" else ():
            way()

    def add(self, row, ways=None):
        if row.get("tflops") and row.get("ceiling"):
            row["share"] = row["tflops"] / self.limits[row["ceiling"]]
            if row.get("share_target"):
                row["met"] = bool(row.get("met") and row["share"] >= row["share_target"])
        if self.profile and ways:
            row["top_costs"] = {
                name: [[what, round(s, 4)] for what, s in top_costs(way, self.device)]
                for name, way in ways.items()
                if name in ("release", "ours")
            }
        self.rows.append(row)
        self.log(table([row], head=len(self.rows) == 1), flush=True)

    def network_set(self):
        """The images and labels on which networks run, made once."""
        if self._network_set is None:
            size = self.size
            self._network_set = replay_set(self.pictures, self.root, size.epoch, size.side, size.batch, self.device)
        return self._network_set

    def each_arch(self, stage, rows):
        """`rows(bench, arch)` of each network; a second one only while time and the GPU's memory last."""
        seconds = 0
        for number, arch in enumerate(self.archs):
            before = time.perf_counter()
            # it has four times the operations; beside them both wait for pictures and workers
            if number and before - self.started + 2 * seconds > SECONDS:
                self.leave_out(f"stage {stage}, {arch}: the run would have taken longer than {SECONDS} s")
                continue
            try:
                rows(self, arch)
            except torch.OutOfMemoryError as error:
                if not number:
                    raise
                self.leave_out(f"stage {stage}, {arch}: out of GPU memory: {str(error).splitlines()[0]}")
            seconds = time.perf_counter() - before

    def leave_out(self, what):
        self.facts.setdefault("left_out", []).append(what)
        self.log(f"left out: {what}", flush=True)

    def network_rows(self, stage, what, ways, model, training, targets, closeness, note=""):
        """Rows of an epoch by each way; model: what "release" and "ours" run, for its operations.

        targets, closeness   by way: the ratio to reach, and how far its output may be from the release's relative to
                             the largest; without one, since it approximates or since BatchNorm sees other images: 0.5
        """
        size, device, model = self.size, self.device, copy.deepcopy(model).train(training)

        def run_model(count):
            x = torch.randn(count, 3, size.side, size.side, device=device)
            with torch.set_grad_enabled(training):
                outputs = model(x)
            if training:
                outputs.sum().backward()

        self.warm_up(lambda: run_model(size.batch // (2 if training else 1)), *list(ways.values())[1:])
        times, found = in_turns(ways, size.turns, device)
        flops = flops_of(lambda: run_model(2)) / 2
        for name in list(ways)[1:]:
            a, b = (torch.as_tensor(found[k]).float() for k in ("release", name))
            off = float((a - b).abs().max() / a.abs().max())
            ceiling = "bf16_tflops" if "bf16" in name else "tf32_tflops" if device.type == "cuda" else "fp32_tflops"
            self.add(
                compare(
                    stage, f"{what}, {size.side} px{'' if name == 'ours' else ', ' + name}", "image", times,
                    dict.fromkeys(ways, size.epoch), device, ours=name,
                    same=f"{'losses' if training else 'logits'} differ by {off:.1e} at most", flops=flops,
                    agree=off <= closeness.get(name, 0.5), ceiling=ceiling,
                    target=targets.get(name) if size.real else None,
                    note="; ".join(filter(None, [note, "" if size.real else "no worker on either side"])),
                ),
                {"release": ways["release"], "ours": ways[name]},
            )  # fmt: skip


def differing(result):
    """What says in the result that our outputs are not the release's: one text each."""
    rows = [f"stage {row['stage']}, {row['what']}: {row['same']}" for row in result["rows"] if not row["agree"]]
    crops = result["facts"].get("crop_bytes_that_differ", {})
    return rows + [f"stage 3, crops of {s} px on the device: {n} bytes differ" for s, n in crops.items() if n]


def run(device, size, stages, images=None, profile=False, arch=None, save=lambda result: None, log=print):
    """Everything that is measured, as one JSON value; save: called with what there is after each stage."""
    started, before = time.perf_counter(), os.getloadavg() if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory(prefix="d4m-benchmark-") as root:
        pictures, kind = photographs(images, size.pictures)
        bench = Bench(device, size, pictures, Path(root), profile, log, arch)
        result = {
            "command": f"python -m misc.benchmark --device {device.type} --stage {' '.join(map(str, stages))}"
            + (f" --arch {arch}" if arch else "")
            + " --profile" * profile,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(device),
            "load_before": before,
            "versions": library_versions(),
            "inputs": kind,
            "ceilings": bench.limits,
            "flops": real_flops(),
            "peak_memory": {},
            "facts": bench.facts,
            "rows": bench.rows,
        }
        for stage in stages:
            torch.cuda.empty_cache()  # what the stage before has freed counts as free; nothing without CUDA
            forget_peak_memory(device)
            STAGES[stage](bench)
            result["differ"] = differing(result)
            result["peak_memory"][stage] = peak_memory(device)
            result["seconds"] = round(time.perf_counter() - started, 1)
            save(result)
    return result
