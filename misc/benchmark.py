"""How fast each stage is: the release's way of working and ours, in turns, on the same inputs.

    python -m misc.benchmark                             # all stages, on the GPU if there is one
    python -m misc.benchmark --device cpu --stage 3 4

The release's way is a small reference of ours at the settings of its launchers: what is called
`release` here. On a GPU both run Stable Diffusion 1.5's configuration with random weights (speed
does not depend on them) and a ResNet, on a CPU small networks. Rates are units per second on a GPU,
and per CPU-second, child processes included, on a CPU. Writes OUT/NAME.json and OUT/NAME.md, anew
after each stage. Outputs that differ end it with status 1.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF

from distillation import datasets, gen_prototype, gen_syn_image, image_folder, prototype_files
from distillation.latent_cache import LatentCache
from distillation.prototypes import Prototypes
from matching import batches, crops, generate_soft_label, labels, models, ranks, training
from matching.feed import Feed
from matching.lessons import Lessons
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, generator, refuse
from validate import train_FKD

CPU = torch.device("cpu")
# units per turn. real, synthesis: images by the release, by us; batch, epoch, side: of stages 3-4;
# encode, pixels: of the generator in stages 1 and 2; spawned: of the release's 8 workers
SIZES = {
    "cuda": {"turns": 2, "real": (128, 640), "synthesis": (2, 32), "steps": 50, "pixels": 512}
    | {"encode": 512, "matrix": 8192}
    | {"batch": 1024, "epoch": 5120, "side": 224, "spawned": 8, "workers": 4},
    "cpu": {"turns": 3, "real": (16, 16), "synthesis": (4, 16), "steps": 10, "pixels": 64}
    | {"encode": 512, "matrix": 1024}
    | {"batch": 1024, "epoch": 1024, "side": 64, "spawned": 2, "workers": 0},
    "quick": {"turns": 1, "real": (8, 12), "synthesis": (2, 4), "steps": 4, "pixels": 64}
    | {"encode": 64, "matrix": 256}
    | {"batch": 8, "epoch": 16, "side": 32, "spawned": 1, "workers": 0},
}


# ---- measuring


def spent(device):
    """(seconds, CPU-seconds of this process and its ended children) so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def commit():
    """The commit of this tree, "+changes" if its code has any; None outside a repository."""

    def git(*words):
        command = ["git", "-C", Path(__file__).parents[1], *words]
        return subprocess.run(command, capture_output=True, text=True)

    last = git("rev-parse", "--short", "HEAD").stdout.strip()
    dirty = git("diff", "--quiet", "HEAD", "--", ".", ":!misc/results", ":!misc/benchmarks")
    return last + "+changes" * bool(dirty.returncode) if last else None


def machine(device):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    found = {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def per_second(function, device, least=0.3):
    """How often a call ends per second, in the median of at least `least` seconds."""
    from torch.utils.benchmark import Timer

    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    function()  # kernels are chosen
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1 / timer.blocked_autorange(min_run_time=least).median


def ceilings(device, n):
    """What the device reaches: {precision: TFLOP/s of a matrix product, "copy": GB/s, read + write}

    n    of the (n, n) matrices: random, as zeros run faster
    """
    found, a = {}, torch.randn(n, n, device=device)
    for name, dtype in generators.DTYPES.items():
        x = a.to(dtype)
        found[name] = 2 * n**3 * per_second(lambda x=x: x @ x, device) / 1e12
    if device.type == "cuda":  # what PyTorch's convolutions use for fp32
        torch.set_float32_matmul_precision("high")
        found["tf32"] = 2 * n**3 * per_second(lambda: a @ a, device) / 1e12
        torch.set_float32_matmul_precision("highest")
    source = torch.randn(16 * n * n, device=device)  # far more than any cache
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    found["copy"] = moved * per_second(lambda: target.copy_(source), device) / 1e9
    return found


def equal(a, b, _=None):
    same = torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return "same bits" if same else "DIFFERENT", same


def close(what, limit, others=0.5):
    """How far a result is from the release's, relative to the largest.

    limit    of our own way;   others: of ways that only approximate it
    """

    def same(a, b, name):
        a, b = (torch.as_tensor(np.asarray(x, np.float32)) for x in (a, b))
        off = float((a - b).abs().max() / a.abs().max())
        return f"{what} differ by {off:.1e} at most", off <= (limit if name == "ours" else others)

    return same


@contextmanager
def one_thread(device):
    """On a CPU, threads that wait for each other would count as CPU-seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    yield
    torch.set_num_threads(threads)


class Bench:
    """Device, sizes, pictures and a temporary folder; the rows as they come."""

    def __init__(self, device, size, pictures, root, arch):
        self.device, self.size, self.pictures, self.root = device, size, pictures, root
        self.arch, self.rows, self.gpu = arch, [], device.type == "cuda"
        self.process, self.folders = runtime.Process(0, 1, device), 0

    def output(self, stage, settings):
        """A new output folder, as a stage writes to."""
        self.folders += 1
        where = ("--out", self.root, f"{stage}-{self.folders}", stage)
        return output.Output(*where, settings, {}, self.process)

    @functools.cached_property
    def ceilings(self):
        with one_thread(self.device):
            return ceilings(self.device, self.size["matrix"])

    @functools.cached_property
    def model(self):
        """The generator of stages 1 and 2, with random weights."""
        return generators.load(str(generator_folder(self.root, self.size, self.gpu)), self.device)

    def race(self, stage, what, unit, ways, counts, same, device=CPU, turns=None, **facts):
        """Run all ways in turns; one row for each beside "release".

        ways     {name: function};   counts   units of the release's way, and of the others
        same     (the release's result, another's, its name) -> (words, whether they agree)
        facts    target: ratio, or 0; least: units; note, known;
                 precision: of its networks; bytes: the fewest that one unit must move
        """
        turns, clock = turns or self.size["turns"], 0 if device.type == "cuda" else 1
        target, precision = facts.pop("target", 0), facts.pop("precision", None)
        moved = facts.pop("bytes", 0)
        times, results, operations = {name: [] for name in ways}, {}, 0
        units = {name: counts[name != "release"] for name in ways}
        with one_thread(device):
            for name in ways if device.type == "cuda" else ():  # kernels are chosen
                ways[name]()
            if precision:
                with FlopCounterMode(display=False) as counter:
                    ways["ours"]()
                operations = counter.get_total_flops() / units["ours"]
            for turn in range(turns):
                for name in list(ways)[:: -1 if turn % 2 else 1]:
                    before = spent(device)
                    results[name] = ways[name]()
                    times[name].append(spent(device)[clock] - before[clock])
        rates = {name: [units[name] / max(t, 1e-9) for t in times[name]] for name in ways}
        for name in list(ways)[1:]:
            words, agree = same(results["release"], results[name], name)
            ratios = [b / a for a, b in zip(rates["release"], rates[name])]
            row = {"stage": stage, "what": what if name == "ours" else f"{what}, {name}"}
            row |= {"unit": unit, "per": "CPU-second" if clock else "second"}
            row |= {"release": median(rates["release"]), "ours": median(rates[name])}
            row |= {"ratio": median(ratios), "ratios": ratios, "n": turns}
            row |= {"agree": bool(agree), "same": words, **facts}
            if precision:
                used = "bf16" if "bf16" in name else precision
                row["gflop"], row["tflops"] = operations / 1e9, operations * row["ours"] / 1e12
                row["share"] = [row["tflops"] / self.ceilings[used], used]
            if moved:  # the fewest bytes that must move
                row["gb_per_s"] = moved * row["ours"] / 1e9
                row["share"] = [row["gb_per_s"] / self.ceilings["copy"], "copy"]
            if target:
                fast = row["ratio"] >= target and row["ours"] >= row.get("least", 0)
                row |= {"target": target, "met": bool(agree and fast)}
            self.rows.append(row)
            print(table([row], head=len(self.rows) == 1), flush=True)


def generator_folder(root, size, full):
    """A checkpoint with random weights below `root`: Stable Diffusion 1.5's configuration or, if
    not `full`, a small one."""
    from misc import train_tiny_sd

    folder, small = root / "generator", (0, size["pixels"], (4,) * 4, (16, 32), 32)
    if not folder.exists():
        pipe = stable_diffusion() if full else train_tiny_sd.tiny_pipeline(*small, 77)
        pipe.save_pretrained(folder)
    return folder


def stable_diffusion():
    """Stable Diffusion 1.5's configuration with random weights, fp16."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from misc import train_tiny_sd

    tokenizer = train_tiny_sd.make_tokenizer([], 77)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2}
    blocks |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), **blocks).half()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half()
    width = {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": len(tokenizer)}
    depth = {"num_hidden_layers": 12, "num_attention_heads": 12}
    text_encoder = CLIPTextModel(CLIPTextConfig(**width, **depth)).half()
    return train_tiny_sd.make_pipeline(vae, text_encoder, tokenizer, unet)


def photographs(root, count):
    """`count` RGB pictures of 224 px: those below `root`, else made from noise; what they are."""
    if root is not None:
        paths = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in datasets.EXTENSIONS)
        if not paths:
            refuse(f"--images {root}: no images there")
        found = [datasets.read_rgb(path).resize((224, 224)) for path in paths[:count]]
        return [found[i % len(found)] for i in range(count)], "photographs"
    draw, found = np.random.default_rng(0), []
    for _ in range(count):  # clouds and grain: a PNG of 224 px has about 100 kB, as a photograph
        clouds = Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        picture = np.asarray(clouds.resize((224, 224))) + draw.normal(0, 6, (224, 224, 3))
        found.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return found, "pictures made from noise"


# ---- stage 1


def release_images(items):
    """[(path, size)] -> (B, 3, size, size) float32, as its readers hand them over."""
    found = []
    for path, size in items:
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        found.append(TF.to_tensor(image))
    return torch.stack(found)


def release_prototypes(model, paths, size, workers, ipc, target):
    """Floats from the readers in batches of 10, text encoded for every image and thrown away, a
    wait for each image's latent, k-means in between, its float64 centres as JSON."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(n_clusters=ipc, random_state=0, batch_size=ipc, n_init="auto")
    items, latents = [(path, size) for path in paths], []
    loader = torch.utils.data.DataLoader(items, 10, num_workers=workers, collate_fn=release_images)
    for pixels in loader:
        keys = range(len(latents), len(latents) + len(pixels))
        draws = [generator(0, runtime.POSTERIOR, 0, key) for key in keys]
        for _ in draws:
            model.condition.__wrapped__("tench")
        for latent in model.encoder(pixels.to(model.device), draws):
            latents.append(latent.half().cpu().numpy())
            if len(latents) % ipc == 0:
                kmeans.partial_fit(np.stack(latents[-ipc:]).reshape(ipc, -1).astype(np.float64))
    target.write_text(json.dumps(kmeans.cluster_centers_.tolist()))
    return np.stack(latents)


def stage_1(bench):
    few, many = bench.size["real"]
    folder, side = bench.root / "real" / "train" / "tench", bench.size["encode"]
    folder.mkdir(parents=True)
    for i in range(few):  # JPEGs as large as ImageNet's
        picture = bench.pictures[i % len(bench.pictures)].resize((500, 375))
        picture.save(folder / f"{i:05d}.jpeg", quality=92)
    split = datasets.open_split("imagefolder", bench.root / "real")
    paths, squashed = split.items[0], gen_prototype.SquashedImages(split, 512)
    some = range(min(few, 64))
    ways = {"release": lambda: release_images([(paths[i], 512) for i in some]).mul(255).byte()}
    ways["ours"] = lambda: squashed[0, some][0]
    note = {"known": 200, "note": "decoding and resizing are most of it, on both sides"}
    counts, what = [len(some)] * 2, "JPEGs read and squashed to 512 px"
    bench.race(1, what, "image", ways, counts, equal, **note)

    items = tuple(paths[i % few] for i in range(many))
    split, model = dataclasses.replace(split, items=(items,)), bench.model
    order = np.argsort(gen_prototype.class_order(split, 0, 0))[:few]
    argv = ["--size", str(side), "--km_expand", "1", "--on_small_class", "repeat"]
    stage, workers = gen_prototype.get_args(argv).settings, bench.size["workers"]
    kmeans = gen_prototype.resolve_kmeans_device("auto", bench.device)

    def ours(cache=None, ipc=10, form="json"):
        settings = {**stage, "ipc": ipc}
        how = (settings, cache, workers, True)
        with bench.output("prototypes", settings) as out:
            [(_, rows, _)] = gen_prototype.class_latents(model, split, [0], *how)
            found = gen_prototype.cluster(rows, settings, kmeans, "tench")
            out.write(f"0.{form}", prototype_files.class_bytes(found, {"prompt": "tench"}, form))
        return rows if cache else rows[order]

    target = bench.root / "release.json"
    reading = (paths, side, workers, min(10, few), target)
    ways = {"release": lambda: release_prototypes(model, *reading), "ours": ours}
    same, facts = close("latents", 0.05 if bench.gpu else 1e-3), {"device": bench.device}
    how = {"target": 2.5 * bench.gpu, "precision": model.facts["precision"], **facts}
    bench.race(1, "images to prototypes", "image", ways, (few, many), same, **how)

    shape = (1300, *model.latent_shape(side))
    latents = np.random.default_rng(0).normal(0, 1, shape).astype(np.float16)
    cache = LatentCache(bench.root, split, stage, model.facts, lambda **_: None)
    cache.save(0, latents, [], 1.0)
    ways = {"release": ours}
    for ipc in (10, 200):
        for form in prototype_files.FORMATS:
            ways[f"{ipc} per class, {form}"] = partial(ours, cache, ipc, form)
    facts |= {"target": 12, "note": "against our own way from images"}
    same = lambda a, b, _: equal(latents, b)  # noqa: E731
    bench.race(1, "another IPC, from the cache", "image", ways, (many, 1300), same, **facts)

    found, path = Prototypes(latents[:10], np.ones(10)), bench.root / "0.safetensors"
    path.write_bytes(prototype_files.class_bytes(found, {"prompt": "tench"}, "safetensors"))
    target.write_text(json.dumps({f"tench {c}": latents[:10].tolist() for c in range(3)}))
    digest = files.sha256(path)

    def read_release():
        table = json.loads(target.read_text())
        return [torch.tensor(rows, dtype=torch.float16) for rows in table.values()][0]

    def read_ours():
        for _ in range(60):
            data = path.read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest  # as stage 2 does
            rows = prototype_files.read_class(path, data)[0].latents
        return torch.from_numpy(rows)

    ways = {"release": read_release, "ours": read_ours}
    what = "prototypes read, 10 per class: JSON, safetensors and its sha256"
    bench.race(1, what, "class", ways, (3, 60), equal, target=100)


# ---- stage 2


def stage_2(bench):
    few, many = bench.size["synthesis"]
    model, draw, steps = bench.model, np.random.default_rng(1), str(bench.size["steps"])
    argv = ["--prototype_path", "x", "--ipc", "10", "--num_inference_steps", steps]
    settings = gen_syn_image.of_arm(gen_syn_image.get_args(argv).settings, "d4m")
    names = range(-(-many // 10))
    classes = [{"index": c, "folder": f"c{c}", "prompt": f"tench {c}"} for c in names]
    jobs = image_folder.list_jobs(classes, 10, 10)[:many]
    shape = (10, *model.latent_shape(bench.size["pixels"]))
    rows = [draw.normal(0, 1, shape).astype(np.float16) for _ in classes]

    def release():  # one image at a time, both prompts encoded for each, saved before the next
        names = ("strength", "guidance_scale", "num_inference_steps")
        options = {name: settings[name] for name in names} | {"eta": 0.0}
        folder = Path(tempfile.mkdtemp(dir=bench.root))
        for n, job in enumerate(jobs[:few]):
            latents = torch.from_numpy(rows[job.position][job.prototype : job.prototype + 1])
            noise = [generator(*gen_syn_image.image_key(0, job, 0))]
            texts = {"prompt": [job.prompt], "negative_prompt": [settings["negative_prompt"]]}
            image = model.pipeline(latents=latents, generator=noise, **texts, **options).images[0]
            image.resize((224, 224)).save(folder / f"{n}.png")
        return np.stack([datasets.read_rgb(folder / f"{n}.png") for n in range(few)])

    def ours(model=model, settings=settings):
        def stream(positions, _):
            return ((p, Prototypes(rows[p], np.ones(10))) for p in positions)

        parts, work = gen_syn_image.cut(jobs, 32), gen_syn_image.Synthesizer(model, settings)
        with bench.output("images", settings) as out:
            gen_syn_image.make_images(out, parts, work, stream)
            out.flush()
        return np.stack([datasets.read_rgb(out.folder / job.file) for job in jobs[:few]])

    def same(a, b, _):
        off = np.abs(a.astype(int) - b.astype(int))
        words = f"pixels differ by {off.max()} of 255 at most, {off.mean():.2g} in the mean"
        return words, off.mean() <= 4 if bench.gpu else off.max() <= 4  # fp16 on a GPU

    ways, facts = {"release": release, "ours": ours}, {"device": bench.device}
    facts |= {"target": 6 * bench.gpu, "precision": model.facts["precision"]}
    bench.race(2, "prototypes to PNGs", "image", ways, (few, many), same, **facts)

    changes = {"num_inference_steps": 50}, {"num_inference_steps": 20, "noise_level": "paper"}
    facts = settings.defaults, settings.shorts
    own, fewer = (runtime.Settings({**settings, **changed}, *facts) for changed in changes)
    folder = str(generator_folder(bench.root, bench.size, bench.gpu))
    other = generators.load(folder, bench.device, scheduler="dpmpp")
    ways = {"release": partial(ours, settings=own), "DPM++, 20 steps": partial(ours, other, fewer)}
    note = "against our own way with PNDM, 50 steps, from the same noise level"
    facts = {"device": bench.device, "note": note}
    words = lambda *_: ("another sampler's images", True)  # noqa: E731
    bench.race(2, "prototypes to PNGs", "image", ways, (many, many), words, **facts)


# ---- stages 3 and 4


class ReleaseFeed(torch.utils.data.Dataset):
    """Batch by batch: every PNG opened anew, cropped, flipped and normalised by itself, stacked;
    labels unpickled. Its workers are spawned every epoch; that cost has a row of its own, and here
    they are forked."""

    def __init__(self, paths, drawn, size, pickles):
        self.paths, self.drawn, self.size, self.pickles = paths, drawn, size, pickles

    def __len__(self):
        return len(self.drawn)

    def crops(self, number):
        batch = self.drawn[number]
        bilinear, size = TF.InterpolationMode.BILINEAR, [self.size, self.size]
        for i, box, flip in zip(*(t.tolist() for t in (batch.index, batch.crop, batch.flip))):
            with open(self.paths[i], "rb") as file:
                image = Image.open(file).convert("RGB")
            image = TF.resized_crop(image, *box, size, bilinear)
            yield TF.hflip(image) if flip else image

    def __getitem__(self, number):
        facts, tensors = datasets.ALL["imagenet"], map(TF.to_tensor, self.crops(number))
        x = torch.stack([TF.normalize(x, facts.mean, facts.std) for x in tensors])
        return number, x, load_pickle(self.pickles, number)

    def mixed(self, device, workers):
        """(batch, mixed images, logits) of an epoch, on the device."""
        options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
        for number, x, logits in torch.utils.data.DataLoader(self, batch_size=None, **options):
            batch = self.drawn[number]
            yield batch, batches.mix(x.to(device), batch, "cutmix"), logits.to(device)


def save_pickle(folder, number, batch, logits):
    """What its stage 3 stores of a batch."""
    draws = [batch.crop.float(), batch.flip, batch.partner, batch.lam, batch.box.tolist()]
    torch.save([*draws, logits.clone()], folder / f"batch_{number}.tar")


def load_pickle(folder, number):
    return torch.load(folder / f"batch_{number}.tar", weights_only=True)[5]


class Replay:
    """A distilled set of `count` images of `side` px, and labels of one epoch in both forms."""

    def __init__(self, bench, count, side, batch_size, device):
        self.folder, self.images = Path(tempfile.mkdtemp(dir=bench.root)), SimpleNamespace()
        pictures = [p if side == 224 else p.resize((side, side)) for p in bench.pictures[:count]]
        for i, picture in enumerate(pictures):
            picture.save(self.folder / f"{i:05d}.png")
        which = [i % len(pictures) for i in range(count)]
        paths = [self.folder / f"{i:05d}.png" for i in which]
        self.arrays = [np.asarray(pictures[i]) for i in which]
        self.protocol = {**batches.PROTOCOL, "epochs": 1, "batch_size": batch_size}
        self.protocol |= {"input_size": side, "mix_type": "cutmix"}
        self.sizes = torch.full((count, 2), side)
        parts = batches.epoch_batches(self.protocol["fkd_seed"], 0, count, batch_size)
        draw = partial(batches.draw_batch, self.protocol, 0)
        self.drawn = [draw(n, i, self.sizes[i]) for n, i in enumerate(parts)]
        logits = torch.randn(count, 1000, generator=generator(0)).half()
        with bench.output("soft_labels", self.protocol) as out:
            labels.write_epoch(out, 0, self.drawn, logits)
        self.file = out.folder / labels.label_file(0)
        self.stored = out.folder, {self.file.name: files.sha256(self.file)}
        for n, rows in enumerate(logits.split([len(batch.index) for batch in self.drawn])):
            save_pickle(self.folder, n, self.drawn[n], rows)
        self.images.folders, self.images.dataset = tuple(range(1000)), "imagenet"
        self.images.files, self.images.foreign = paths, False
        self.images.targets = torch.zeros(count, dtype=torch.int64)
        self.keys = [(0, n) for n in range(len(self.drawn))]
        self.feed = self.new_feed(device, self.stored)
        self.release = ReleaseFeed(paths, self.drawn, side, self.folder)

    def new_feed(self, device, stored=None):
        return Feed(list(self.arrays), self.images, self.protocol, device, stored)

    def forget(self):
        """So that the labels' file is opened, hashed and checked again."""
        self.feed.checked.clear()
        self.feed.opened, self.feed.kept = (None, None), {}


def stage_3(bench):
    size, device = bench.size, bench.device
    replay = Replay(bench, min(size["batch"], 1024), 224, size["batch"], CPU)
    batch, counts = replay.drawn[0], [len(replay.drawn[0].index)] * 2
    draws = (batch.index, batch.crop, batch.flip, 224)
    ways = {"release": lambda: np.stack([np.asarray(crop) for crop in replay.release.crops(0)])}
    ways["ours"] = lambda: crops.crop_on_cpu(replay.arrays, *draws).numpy()

    def same(a, b, _):
        odd = int((a != b).sum())
        return f"{odd} of {a.size / 1e6:.0f} M bytes differ", not odd

    bench.race(3, "crops replayed: PNG, crop, flip", "image", ways, counts, same, known=427)

    def fed():
        replay.forget()
        item = replay.feed[0, 0]
        return replay.feed.mixed(item), item.logits

    def both(a, b, _):
        return equal(*(torch.cat([t.flatten() for t in pair]) for pair in (a, b)))

    ways = {"release": lambda: next(replay.release.mixed(CPU, 0))[1:], "ours": fed}
    what = "feeding: crop, flip, mix, labels to a normalised batch, hash included"
    bench.race(3, what, "image", ways, counts, both, target=2.5, least=1000)

    replay = Replay(bench, size["epoch"], size["side"], size["batch"], device)
    feed, workers = replay.new_feed(device), size["spawned"] * bench.gpu
    if bench.gpu:

        def last(stream):
            for x in stream:
                found = x
            return found

        ways = {"release": lambda: last(x for _, x, _ in replay.release.mixed(device, workers))}
        ways["ours"] = lambda: last(map(feed.mixed, feed.loader(replay.keys)))
        pixels = 3 * size["side"] ** 2  # each a byte that is read and a float that is written
        facts, counts = {"device": device, "bytes": 5 * pixels}, [size["epoch"]] * 2
        bench.race(3, "feeding on the GPU", "image", ways, counts, close("pixels", 1e-6), **facts)
    with training.seeded(0):
        teacher = models.create_model(bench.arch, 1000, size["side"]).eval().to(device)

    @torch.no_grad()
    def made_release():
        found = []
        for n, (batch, x, _) in enumerate(replay.release.mixed(device, workers)):
            found.append(teacher(x).half().cpu())
            save_pickle(replay.folder, n, batch, found[-1])
        return torch.cat(found)

    def made(teacher, amp="none", channels_last=False):
        settings = {**replay.protocol, "amp": amp, "channels_last": channels_last}
        work = (feed.loader(replay.keys), len(replay.keys), [teacher])
        with bench.output("soft_labels", settings) as out, runtime.progress(quiet=True) as bar:
            how = {**settings, "use_fp16": True}
            drawn, logits = generate_soft_label.label_epoch(feed, *work, how, bar)
            labels.write_epoch(out, 0, drawn, logits)
        return logits

    fast = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    ways = {"release": made_release, "ours": partial(made, teacher)}
    ways["bf16 + channels_last"] = partial(made, fast, "bf16", True)
    ways = ways if bench.gpu else dict(list(ways.items())[:2])
    facts, counts = {"device": device, "target": 5 * bench.gpu}, [size["epoch"]] * 2
    facts["precision"] = "tf32" if bench.gpu else "fp32"
    what, same = f"labels made by {bench.arch}, {size['side']} px", close("logits", 0.01)
    bench.race(3, what, "image", ways, counts, same, **facts)


def release_epoch(model, replay, device, workers):
    """Two accumulation steps per batch, meters read after each; the sum of the losses."""
    optimizer, losses = training.make_optimizer(model.train(), False, 1e-3, 0.01), []
    for batch, x, logits in replay.release.mixed(device, workers):
        optimizer.zero_grad()
        count = len(batch.index)
        for first, end in ranks.chunks_of(count, -(-count // 2)):
            goal = training.Goal(logits[first:end], None, None)
            loss = training.kl_loss(model(x[first:end]), goal, temperature=20.0) / count
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return sum(losses)


def our_epoch(bench, replay, bn_batch, **flags):
    """A function that trains the same first epoch of a student at every call; the network."""
    argv = ["--train_dir", "x", "--val_dir", "x", "--fkd_path", "x", "--cos", "-T", "20"]
    settings = train_FKD.get_args([*argv, "--model", bench.arch]).settings.filled(**replay.protocol)
    settings.update(flags, bn_batch=bn_batch)
    how = (settings[name] for name in ("amp", "channels_last", "compile"))
    forward = training.Forward(bench.device, *how)
    lessons = Lessons(replay.images, settings, bench.process, 0)
    lessons.stored, lessons.feed = replay.stored, replay.feed
    learner = training.Learner(lessons, 0, forward)
    network = learner.model
    start = copy.deepcopy(network.state_dict())

    def epoch():
        replay.forget()
        network.load_state_dict(start)
        learner.optimizer.state.clear()
        with runtime.progress(quiet=True) as bar:
            row = learner.train_epoch(replay.feed.loader(replay.keys), bench.process, bar)
        return row["loss"] * len(replay.keys)

    return epoch, network


def stage_4(bench):
    size, turns = bench.size, 2 * bench.size["turns"] + 1

    def ours(replay, check=True):
        batch_size = replay.protocol["batch_size"]
        opened = labels.EpochLabels(replay.stored[0], 0, len(replay.sizes), batch_size)
        if check:
            opened.check(replay.sizes, 1000, 32, replay.stored[1][replay.file.name])
        return [opened.batch(n)[1].clone()[:1] for n in range(10)][0]

    for batch in sorted({size["batch"], min(size["batch"], 100)}, reverse=True):
        replay = Replay(bench, 10 * batch, 32, batch, CPU)
        pickles = replay.folder
        release = lambda f=pickles: [load_pickle(f, n)[:1] for n in range(10)][0]  # noqa: E731
        for words in ("", ", hashed and checked: once per file; the release never does"):
            ways = {"release": release, "ours": partial(ours, replay, bool(words))}
            target = 2.5 * (batch == size["batch"] and not words)
            what = f"labels read, batch {batch}{words}"
            bench.race(4, what, "batch", ways, (10, 10), equal, turns=turns, target=target)

    def spawn():
        options = {"num_workers": size["spawned"], "multiprocessing_context": "spawn"}
        list(torch.utils.data.DataLoader(torch.zeros(1), **options))

    what = f"start of an epoch: {size['spawned']} of the release's 8 workers, our labels opened"
    ways, nothing = {"release": spawn, "ours": partial(ours, replay)}, ("nothing to compare", True)
    bench.race(4, what, "epoch", ways, (1, 1), lambda *_: nothing, target=50)

    replay = Replay(bench, size["epoch"], size["side"], size["batch"], bench.device)
    half = -(-size["batch"] // 2)
    chunk, fast = min(73, half - 1), {"amp": "bf16", "channels_last": True, "fused": True}
    epoch, network = our_epoch(bench, replay, chunk)
    model, workers = copy.deepcopy(network), size["spawned"] * bench.gpu

    def release():
        return release_epoch(copy.deepcopy(model), replay, bench.device, workers)

    ways = {"release": release, "ours": epoch}
    ways["bf16 + channels_last + fused"], _ = our_epoch(bench, replay, chunk, **fast)
    ways[f"{half} images per pass"], _ = our_epoch(bench, replay, half)
    note = f"{chunk} images per pass where no other number is named, the release's {half}"
    facts, counts = {"target": 8 * bench.gpu, "note": note}, [size["epoch"]] * 2
    facts["precision"] = "tf32" if bench.gpu else "fp32"
    what, same = f"an epoch of {bench.arch}, {size['side']} px", close("losses", 0.5)
    bench.race(4, what, "image", ways, counts, same, bench.device, **facts)


STAGES = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4}


# ---- the report


def rounded(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows, head=True):
    lines = ["| stage | what | release | ours | unit | ratio | of the ceiling | outputs | target |"]
    lines = (lines + ["|---" * 9 + "|"]) * head
    for row in rows:
        low, high = min(row["ratios"]), max(row["ratios"])
        least = f", {row.get('least')} per {row['per']}" * ("least" in row)
        met = "met" if row.get("met") else "NOT MET"
        target = f"{row.get('target')}x{least}: {met}" * ("met" in row)
        what = row["what"] + f"; {row.get('note')}" * ("note" in row)
        release = rounded(row["release"]) + f" (known: {row.get('known')})" * ("known" in row)
        ratio = f"{row['ratio']:.3g} ({low:.3g} to {high:.3g}, n = {row['n']})"
        cells = [f"{row['stage']}", what, release, rounded(row["ours"])]
        rate = ""
        if "share" in row:
            used = f"{rounded(row['tflops'])} TFLOP/s" if "tflops" in row else ""
            used = used or f"{rounded(row['gb_per_s'])} GB/s"
            rate = f"{used}, {row['share'][0]:.0%} of {row['share'][1]}"
        cells += [f"{row['unit']} / {row['per']}", ratio, rate, row["same"], target]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(result):
    m, versions = result["machine"], result["versions"]
    made = f"commit {result['commit']}, {result['date']}, {result['seconds']} s"
    where = f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} torch threads"
    where += f"; load before: {result['load_before'][0]:.2f}; inputs: {result['inputs']}"
    lines = [
        f"# The release's way and ours on {m.get('gpu') or m['cpu']}",
        f"`{result['command']}`, {made}. {where}; torch {versions['torch']}.",
        "All measured, both sides in this run, in turns; rates and ratios are medians (least to "
        "most, n turns); one torch thread wherever CPU-seconds are counted.",
        table(result["rows"]),
        f"Ceilings measured here, TFLOP/s of a matrix product and GB/s of a copy (read + written): "
        f"{', '.join(f'{name} {rounded(x)}' for name, x in result['ceilings'].items())}.",
        f"Peak memory up to each stage, both ways in it: {json.dumps(result['peak_memory'])}.",
    ]
    return "\n\n".join(lines) + "\n"


def get_args(argv=None):
    parser = Parser("misc.benchmark", __doc__)
    parser.flag("--device", default="auto", help="auto, cpu or cuda")
    parser.flag("--stage", nargs="+", type=int, choices=STAGES, default=list(STAGES))
    words = "photographs [$D4M_TEST_DATA, else pictures made from noise]"
    parser.flag("--images", default=os.environ.get("D4M_TEST_DATA"), metavar="DIR", help=words)
    words = "of stages 3-4 [resnet18; on a CPU convnet_mini]"
    parser.flag("--arch", type=models.model_name, help=words)
    words = "only see that all of it runs; the figures mean nothing"
    parser.flag("--quick", action="store_true", help=words)
    folder = Path("output/benchmarks")
    parser.flag("--out", type=Path, default=folder, help="folder of NAME.json and NAME.md")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    device, stages = runtime.this_process(args.device).device, sorted(set(args.stage))
    name = "cpu"
    if device.type == "cuda":
        name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    name += "-stage" + "".join(map(str, stages)) if stages != list(STAGES) else ""
    name += f"-{args.arch}".replace(":", "-") * bool(args.arch)
    arch = args.arch or ("resnet18" if device.type == "cuda" else "convnet_mini")
    words = ["python -m misc.benchmark --device", device.type, "--stage", *map(str, stages)]
    words += ["--arch", arch] * bool(args.arch)
    started, size = time.perf_counter(), SIZES["quick" if args.quick else device.type]
    pictures, kind = photographs(args.images, 16 if args.quick else 256)
    result = {"command": " ".join(words), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    result |= {"machine": machine(device), "load_before": os.getloadavg(), "inputs": kind}
    result |= {"versions": output.library_versions(), "peak_memory": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="d4m-benchmark-") as root:
        bench = Bench(device, size, pictures, Path(root), arch)
        result["ceilings"] = bench.ceilings
        for stage in stages:
            STAGES[stage](bench)
            result["peak_memory"][stage] = output.peak_memory(device)
            result |= {"seconds": round(time.perf_counter() - started, 1), "rows": bench.rows}
            odd = [row for row in bench.rows if not row["agree"]]
            result["differ"] = [f"stage {r['stage']}, {r['what']}: {r['same']}" for r in odd]
            files.write(args.out / f"{name}.json", files.json_text(result))
            files.write(args.out / f"{name}.md", markdown(result))
    print(f"\n{args.out / name}.json, {args.out / name}.md: {result['seconds']} s")
    for what in result["differ"]:
        print(f"error: outputs differ: {what}", file=sys.stderr)
    if result["differ"]:
        raise SystemExit(1)
    return args.out / f"{name}.json"


if __name__ == "__main__":
    main()
