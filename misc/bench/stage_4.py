"""Stage 4: labels read, the start of an epoch, a student's epoch."""

import copy
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from matching.soft_labels import EpochLabels, label_file
from matching.training import Forward, chunk_size, plain
from misc.bench.inputs import replay_set
from misc.bench.measure import compare, in_turns, spent
from misc.bench.release import ReleaseFeed, load_pickle, release_epoch, start_workers
from scripts.files import sha256
from scripts.runtime import Process
from validate.train_FKD import Job, Recipe, Student, train_epoch

CPU = torch.device("cpu")
RECIPE = Recipe(schedule="cosine", temperature=20.0)
BN_BATCH = 73  # of our launchers


def stage_4(bench):
    feeds = [labels(bench, n) for n in sorted({bench.size.batch, min(bench.size.batch, 100)}, reverse=True)]
    waiting(bench, feeds[0])
    start_of_epoch(bench, feeds[-1])
    bench.each_arch(4, student)


def labels(bench, batch_size):
    """Ten batches' labels read, by the file and by the pickle; returns their feed."""
    replay = replay_set(bench.pictures, bench.root, 10 * batch_size, 32, batch_size, CPU)
    feed, batches = replay.feed, len(replay.batches)
    folder, digests = feed.labels

    def ours(checked=True):
        digest = digests[label_file(0)]
        epoch = EpochLabels(folder, 0, feed.sizes, 1000, batch_size, 32, digest, checked)
        return [epoch.batch(n)[1].clone()[:1] for n in range(batches)][0]

    ways = {
        "release": lambda: [load_pickle(replay.pickles, n)[5][:1] for n in range(batches)][0],
        "ours": ours,
        "checked": lambda: ours(False),
        "hash": lambda: sha256(folder / label_file(0)),
    }
    times, found = in_turns(ways, 2 * bench.size.turns + 1, CPU)
    hashed = batches / max(statistics.median(t[1] for t in times["hash"]), 1e-9)
    same = torch.equal(found["release"], found["ours"]) and torch.equal(found["release"], found["checked"])
    for name in ("ours", "checked"):
        what = f"labels read, batch {batch_size}" + ("" if name == "ours" else ", hashed and checked too")
        bench.add(
            compare(
                4, what, "batch", times, dict.fromkeys(ways, batches), CPU, ours=name,
                same="same fp16" if same else "DIFFERENT", agree=same,
                target=2.5 if name == "ours" and batch_size == bench.size.batch else None,
                note="" if name == "ours" else f"once a file; the release checks nothing; sha256 alone: {hashed:,.0f}",
            ),
            {"release": ways["release"], "ours": ways[name]},
        )  # fmt: skip
    return feed


def waiting(bench, feed, nap=0.3):
    """Seconds that training waits for its second epoch's labels: hashed when asked for, or beside the first epoch,
    which is stubbed by `nap` seconds of sleep.
    """
    times = {"release": [], "ours": []}
    for _ in range(2 * bench.size.turns + 1):
        for name, following in (("release", {}), ("ours", {0: 1})):
            feed.forget_labels()
            feed.following, feed.background = following, ThreadPoolExecutor(1)
            feed.labels_of(0)
            time.sleep(nap)
            before = spent(CPU)
            feed.labels_of(1)
            times[name].append(tuple(b - a for a, b in zip(before, spent(CPU))))
            feed.background.shutdown()
            feed.background = None
    count = len(feed.sizes)
    bench.add(
        compare(
            4, f"wait for the labels of {count:,} images: hashed when asked for, against beside the epoch before",
            "wait", times, {"release": 1, "ours": 1}, CPU, clock=0, same="same file, same checks",
            note=f"ours on both sides; wall clock, a core to spare, the epoch stubbed by {nap} s of sleep",
        )
    )  # fmt: skip


def start_of_epoch(bench, feed):
    """Workers spawned against the labels' file opened, hashed and checked."""
    spawned = bench.size.spawned

    def ours():
        feed.forget_labels()
        feed.labels_of(0)

    ways = {"release": lambda: start_workers(spawned), "ours": ours}
    times, _ = in_turns(ways, bench.size.turns, CPU)
    bench.add(
        compare(
            4, f"start of an epoch: {spawned} of the release's 8 workers spawned, against our labels opened",
            "epoch", times, dict.fromkeys(ways, 1), CPU, same="nothing to compare", target=50,
            note=f"all 8 would be {8 // max(spawned, 1)} times as much; our readers, if any, live for all epochs",
        )
    )  # fmt: skip


def student(bench, arch):
    """An epoch of a student: the release's in two accumulation steps a batch, ours in the launchers' chunks.

    Both are ours in the extra row, so that BatchNorm sees the same images and the losses can be compared closely.
    """
    size, device, replay = bench.size, bench.device, bench.network_set()
    batches, process, folder = len(replay.batches), Process(0, 1, device), bench.root / "student"
    keys = [(0, n) for n in range(batches)]
    targets = torch.zeros(len(replay.files), dtype=torch.int64)
    chunk, half = chunk_size(size.batch, 1, 2, BN_BATCH), chunk_size(size.batch, 1, 2, None)
    faithful = Job(arch, RECIPE, replay.feed.protocol, 1000, targets, chunk, True, [], False, 50, 10)

    def way(forward, fused=False, chunk=chunk):
        job = faithful._replace(fused=fused, chunk=chunk)
        one = Student(job, 0, folder, forward)
        start = copy.deepcopy(plain(one.model).state_dict())

        def epoch():
            plain(one.model).load_state_dict(start)  # the same network and optimiser as at the first turn
            one.optimizer.state.clear()
            one.epoch = 0
            replay.feed.forget_labels()
            items = replay.feed.loader(keys)
            row = train_epoch(job, one, items, batches, replay.feed, process, forward, tqdm(disable=True))
            return row["loss"] * batches

        return one, epoch

    plain_student, ours = way(Forward(device))
    model = copy.deepcopy(plain_student.model)
    release = ReleaseFeed(replay.files, replay.batches, size.side, replay.pickles)
    ways = {
        "release": lambda: release_epoch(copy.deepcopy(model), release, device, bench.spawned),
        "ours": ours,
        "bf16 + channels_last + fused": way(Forward(device, "bf16", True), True)[1],
    }
    if "channels_last + compile" in size.faster and arch == bench.archs[0]:
        ways["bf16 + channels_last + fused + compile"] = way(Forward(device, "bf16", True, True), True)[1]
    targets = dict.fromkeys(ways, 8)
    same = f"{half} images a pass"
    ways[same] = way(Forward(device), chunk=half)[1]
    note = f"{chunk} images a pass where no other number is named, the release's {half}"
    bench.network_rows(4, f"an epoch of {arch}", ways, model, True, targets, {same: 0.02}, note)
