"""Stage 3: crops, feeding, labels made by a teacher."""

import copy

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from matching.generate_soft_label import label_epoch
from matching.models import create_model
from matching.soft_labels import PROTOCOL, Feed, crop_on_cpu, draw_batch, resized_crop_batch, write_epoch
from matching.training import seeded
from misc.bench.inputs import replay_set
from misc.bench.measure import compare, in_turns
from misc.bench.release import ReleaseFeed, save_pickle

CROPS = 427  # known of the release's way, images a CPU-second
CPU = torch.device("cpu")


def stage_3(bench):
    replaying(bench)
    bench.facts["crop_bytes_that_differ"] = {s: device_crops(bench.pictures, bench.device, s) for s in (224, 64, 32)}
    bench.each_arch(3, labelling)


def replaying(bench):
    """224-px crops by themselves, and whole normalised batches with their labels, on the CPU."""
    count, turns = min(bench.size.batch, 1024), bench.size.turns
    replay = replay_set(bench.pictures, bench.root, count, 224, bench.size.batch, CPU)
    bench.facts["png_bytes_224"] = replay.png_bytes
    release = ReleaseFeed(replay.files, replay.batches, 224, replay.pickles)
    batch = replay.batches[0]
    draws = list(zip(batch.index.tolist(), batch.crop.tolist(), batch.flip.tolist()))
    counts = {"release": len(draws), "ours": len(draws)}
    ways = {
        "release": lambda: np.stack([np.asarray(release.crop(*d)) for d in draws]),
        "ours": lambda: crop_on_cpu(replay.arrays, batch.index, batch.crop, batch.flip, 224).numpy(),
    }
    times, found = in_turns(ways, turns, CPU)
    differ = int((found["release"] != found["ours"]).sum())
    bench.add(
        compare(
            3, "crops replayed: PNG, crop, flip", "image", times, counts, CPU,
            same=f"{differ} of {found['ours'].size / 1e6:.0f} M bytes differ", agree=not differ, known=CROPS,
        ),
        ways,
    )  # fmt: skip

    def fed():
        replay.feed.forget_labels()  # so that the file is opened, hashed and checked again
        item = replay.feed[0, 0]
        return replay.feed.mixed(item), item.logits

    ways = {"release": lambda: next((x, logits) for _, x, logits in release.mixed(CPU, 0)), "ours": fed}
    times, found = in_turns(ways, turns, CPU)
    same = all(torch.equal(a, b) for a, b in zip(found["release"], found["ours"]))
    bench.add(
        compare(
            3, "feeding: crop, flip, mix, labels to a normalised batch, hash included", "image", times, counts, CPU,
            same="same bits" if same else "DIFFERENT", agree=same, target=2.5, least=1000,
        ),
        ways,
    )  # fmt: skip


def device_crops(pictures, device, side, count=1000):
    """Bytes that differ between `resized_crop_batch` on the device and Pillow, over `count` random crops."""
    arrays = [np.asarray(p.resize((side, side), Image.Resampling.BILINEAR)) for p in pictures[:100]]
    count = count if len(arrays) >= 100 else 4 * len(arrays)
    index = torch.arange(count) % len(arrays)
    batch = draw_batch(7, 0, 0, index, torch.full((count, 2), side), side, PROTOCOL)
    images = torch.from_numpy(np.stack(arrays)).to(device)
    found = resized_crop_batch(images[index.to(device)], batch.crop, batch.flip, side).cpu()
    return int((found != crop_on_cpu(arrays, index, batch.crop, batch.flip, side)).sum())


def labelling(bench, arch):
    """An epoch's labels, from images to the file."""
    size, device, replay = bench.size, bench.device, bench.network_set()
    folder, keys = bench.root / f"made-{arch}", [(0, n) for n in range(len(replay.batches))]
    folder.mkdir()
    with seeded(0):
        teacher = create_model(arch, 1000, size.side).eval().to(device)
    release = ReleaseFeed(replay.files, replay.batches, size.side)
    feed = Feed(list(replay.arrays), bench.images, replay.feed.protocol, device)  # once for all epochs: not timed

    def ours(teacher=teacher, amp="none", channels_last=False):
        drawn, logits = label_epoch(
            feed, feed.loader(keys), len(keys), [teacher], amp, channels_last, True, tqdm(disable=True)
        )
        write_epoch(folder, 0, drawn, logits)
        return logits

    @torch.no_grad()
    def release_labelled():
        logits = []
        for n, (batch, x, _) in enumerate(release.mixed(device, bench.spawned)):
            logits.append(teacher(x).half().cpu())
            save_pickle(folder, n, batch, logits[-1])
        return torch.cat(logits)

    ways = {"release": release_labelled, "ours": ours}
    if size.faster:
        fast = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
        ways["bf16 + channels_last"] = lambda: ours(fast, "bf16", True)
    targets, closeness = {"ours": 5, "bf16 + channels_last": 8}, {"ours": 0.01}
    bench.network_rows(3, f"labels made by {arch}", ways, teacher, False, targets, closeness)
