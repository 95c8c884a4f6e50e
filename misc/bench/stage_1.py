"""Stage 1: reading, encoding, the latent cache, prototype files."""

import json
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from torchvision.transforms.functional import to_tensor

from distillation import gen_prototype
from distillation.prototypes import FORMATS, Prototypes, class_file, class_prototypes, read_class, write_class
from misc.bench.inputs import repeated, write_real
from misc.bench.measure import clock_of, compare, flops_of, in_turns
from misc.bench.networks import sped_up
from scripts.files import sha256
from scripts.runtime import POSTERIOR, generator

READS = 200  # known of the release's way, images a CPU-second, decoding and resizing alone
CPU = torch.device("cpu")


def stage_1(bench):
    side = 512 if bench.size.real or bench.size.encode[0] > 8 else 64
    split = write_real(bench.pictures, bench.root, bench.size.encode[0])
    reading(bench, split, side)
    rate = encoding(bench, split, side)
    latents = cache(bench, split, side, rate)
    prototype_files(bench, latents)


def reading(bench, split, side):
    images, count = gen_prototype.SquashedImages(split, side), min(bench.size.encode[0], 64)
    ways = {
        "release": lambda: [release_images([(split, i, side)]) for i in range(count)],
        "ours": lambda: [images[0, i] for i in range(count)],
    }
    times, found = in_turns(ways, bench.size.turns, CPU)
    same = all(torch.equal((a[0] * 255).round().byte(), b) for a, b in zip(found["release"], found["ours"]))
    bench.add(
        compare(
            1, f"JPEGs read and squashed to {side} px", "image", times, dict.fromkeys(ways, count), CPU,
            same="same pixels" if same else "DIFFERENT", agree=same, known=READS,
            note="decoding and PIL's resize are most of it, on both sides",
        ),
        ways,
    )  # fmt: skip


def release_prototypes(pipeline, text, split, size, batch_size, workers, ipc, path):
    """The release's way: floats from the readers, text encoded for every image and thrown away, a wait for each one's
    latent, k-means between the batches, its float64 centres as JSON. km_expand 1: buffers of ipc rows, the last one
    dropped. Returns the latents, in the order of encoding.
    """
    order = gen_prototype.class_order(split, 0, 0)
    loader = torch.utils.data.DataLoader(
        [(split, i, size) for i in order], batch_size=batch_size, num_workers=workers, collate_fn=release_images
    )
    latents, buffer = [], []
    kmeans = MiniBatchKMeans(n_clusters=ipc, random_state=0, batch_size=ipc, n_init="auto")
    for number, images in enumerate(loader):
        keys = order[number * batch_size : (number + 1) * batch_size]
        for _ in keys:
            text()
        found = pipeline(images.to(pipeline.vae.device), [generator(0, POSTERIOR, 0, i) for i in keys])
        for latent in found:
            latents.append(latent.to(torch.float16).cpu().numpy())
            buffer.append(latents[-1].reshape(-1))
            if len(buffer) == ipc:
                kmeans.partial_fit(np.stack(buffer).astype(np.float64))
                buffer = []
    path.write_text(json.dumps({split.prompts[0]: kmeans.cluster_centers_.reshape(ipc, *latents[0].shape).tolist()}))
    return np.stack(latents)


def release_images(items):
    """[(split, image, size)] -> (B, 3, size, size) float32, as its readers hand them over."""
    images = []
    for split, i, size in items:
        with open(split.items[0][i], "rb") as file:
            image = Image.open(file).convert("RGB")
        images.append(to_tensor(image.resize((size, size), Image.Resampling.BILINEAR)))
    return torch.stack(images)


def our_prototypes(units, prompts, ipc, folder, form, kmeans):
    """As stage 1's main: k-means and file of a class beside the latents of the next. Returns the first one's latents.

    units   of `class_latents`
    """

    def finish_class(position, latents):
        found = class_prototypes(latents, ipc, ipc, "minibatch", kmeans)
        facts = {"class_index": position, "folder": str(position), "prompt": prompts[position]}
        write_class(folder / class_file(position, str(position), form), found, facts)

    first, pending = None, None
    with ThreadPoolExecutor(1) as background:
        for position, latents, _ in units:
            first = latents if first is None else first
            if pending:
                pending.result()
            pending = background.submit(finish_class, position, latents)
        pending.result()
    return first


def by_image(latents, split):
    """Latents in the order of the class's images, from the order in which it is encoded."""
    return latents[np.argsort(gen_prototype.class_order(split, 0, 0))]


def encoding(bench, split, side):
    """Images to prototype files; returns our rate, as plain as the stage's defaults."""
    size, device = bench.size, bench.device
    pipeline = bench.pipelines(side)[0]
    tokens = torch.zeros(1, 77, dtype=torch.long, device=device)
    kmeans = gen_prototype.resolve_kmeans_device("auto", device)

    @torch.no_grad()
    def text():
        pipeline.text_encoder(tokens)

    few, classes, many = size.encode
    enough, ipc = repeated(split, many, classes), size.ipcs[0]

    def release(split=split):
        path = bench.root / "encoded.json"
        return by_image(release_prototypes(pipeline, text, split, side, 10, size.workers, ipc, path), split)

    def ours(pipeline=pipeline, split=enough):
        units = gen_prototype.class_latents(
            pipeline, split, range(len(split.items)), side, 32, 0, num_workers=size.workers, quiet=True
        )
        return by_image(our_prototypes(units, split.prompts, ipc, bench.root, "json", kmeans), split)[:few]

    ways = {"release": release, "ours": ours}
    ways |= {
        name: lambda other=other, **of: ours(other, **of) for name, other in sped_up(pipeline, size.faster).items()
    }
    some = repeated(split, 32 + many % 32)  # every length of a batch of ours, or it would be compiled when timed
    bench.warm_up(*(lambda way=way: way(split=some) for way in ways.values()))
    times, found = in_turns(ways, size.turns, device)
    flops = flops_of(lambda: pipeline(torch.zeros(1, 3, side, side, device=device)))
    scale, rates = np.abs(found["release"].astype(np.float32)).max(), {}
    for name in list(ways)[1:]:
        off = np.abs(found["release"].astype(np.float32) - found[name].astype(np.float32)).max()
        off /= scale
        row = compare(
            1, f"images to prototypes{'' if name == 'ours' else ', ' + name}", "image", times,
            {**dict.fromkeys(ways, classes * many), "release": few}, device, ours=name,
            same=f"latents differ by {off:.1e} at most",
            agree=off <= (0.05 if device.type == "cuda" else 1e-3), flops=flops,  # fp16 on a GPU
            ceiling="fp16_tflops" if device.type == "cuda" else "fp32_tflops",
            target=2.5 if size.real else None,
            note="" if size.real else "a tiny encoder, bound by memory: a batch gains nothing on a CPU",
        )  # fmt: skip
        bench.add(row, {"release": ways["release"], "ours": ways[name]})
        rates[name] = row["ours"]
    return rates["ours"]


def cache(bench, split, side, rate):
    """Classes of ImageNet's size at another IPC, prototype files included, against `rate` from images.

    Returns a class's latents.
    """
    size, device, clock = bench.size, bench.device, clock_of(bench.device)
    classes, count = size.cached
    several = repeated(split, count, classes)
    cached = gen_prototype.LatentCache(bench.root / "cache", several, {"side": side})
    draw = np.random.default_rng(0)
    latents = draw.normal(0, 1, (count, 4, side // 8, side // 8)).astype(np.float16)
    for position in range(classes):
        cached.save(position, latents, [])
    kmeans = gen_prototype.resolve_kmeans_device("auto", device)

    def from_cache(ipc, form):
        units = gen_prototype.class_latents(None, several, range(classes), side, 32, 0, cached)
        return our_prototypes(units, several.prompts, ipc, bench.root, form, kmeans)

    ways = {
        (ipc, form): lambda ipc=ipc, form=form: from_cache(ipc, form) for ipc in size.ipcs for form in sorted(FORMATS)
    }
    bench.warm_up(*ways.values())
    times, found = in_turns(ways, size.turns, device)
    for (ipc, form), way in ways.items():
        rates = [classes * count / max(t[clock], 1e-9) for t in times[ipc, form]]
        ratio, same = statistics.median(rates) / rate, np.array_equal(found[ipc, form], latents)
        bench.add({
            "stage": 1, "what": f"another IPC, {ipc} a class, {form}: from the cache, against our own way from images",
            "unit": "image", "per": "second" if clock == 0 else "CPU-second", "release": rate,
            "ours": statistics.median(rates), "ratio": ratio, "ratios": [r / rate for r in rates], "n": len(rates),
            "target": 12, "met": same and ratio >= 12, "same": "same latents" if same else "DIFFERENT", "agree": same,
            "note": f"files written on both sides, from images at IPC {size.ipcs[0]} as JSON",
        }, {"ours": way})  # fmt: skip
    return latents


def prototype_files(bench, latents, classes=3):
    """The release's one JSON of nested lists against a safetensors file a class, hashed as stage 2 does."""
    count, prompt, path = max(bench.size.ipcs[0], 2), "tench, Tinca tinca", bench.root / "0000_a.safetensors"
    prototypes = Prototypes(latents[:count], np.ones(count, np.int64))
    write_class(path, prototypes, {"class_index": 0, "folder": "a", "prompt": prompt})
    table = {f"{prompt} {c}": prototypes.latents.astype(np.float64).tolist() for c in range(classes)}
    (bench.root / "release.json").write_text(json.dumps(table))

    digest = sha256(path)

    def read_release():
        with open(bench.root / "release.json") as file:
            return [torch.tensor(rows, dtype=torch.float16) for rows in json.load(file).values()]

    def read_ours():
        for _ in range(20 * classes):
            found = read_class(path, digest=digest)[0].latents  # hashed as stage 2 does
        return found

    ways = {"release": read_release, "ours": read_ours}
    times, found = in_turns(ways, bench.size.turns, CPU)
    same = np.array_equal(found["release"][0].numpy(), found["ours"])
    bench.add(
        compare(
            1, f"prototypes read, {count} a class: JSON, safetensors and its sha256", "class", times,
            {"release": classes, "ours": 20 * classes}, CPU, same="same fp16" if same else "DIFFERENT", agree=same,
            target=100,
        ),
        ways,
    )  # fmt: skip
