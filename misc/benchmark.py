"""How fast each stage is: the release's way of working and ours, in turns, on the same inputs.

    python -m misc.benchmark                             # all stages, on the GPU if there is one
    python -m misc.benchmark --device cpu --stage 3 4 --profile

The release's way is a small reference of ours at the settings of its launchers. On a GPU both run
Stable Diffusion 1.5's configuration with random weights (speed does not depend on them) and a
ResNet, on a CPU small networks. Rates are units per second on a GPU, and per CPU-second, child
processes included, on a CPU. Writes OUT/NAME.json and OUT/NAME.md, anew after each stage. Outputs
that differ end it with status 1.
"""

import copy
import cProfile
import dataclasses
import hashlib
import json
import os
import platform
import pstats
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from distillation import datasets, gen_prototype, gen_syn_image, prototypes
from matching import batches, generate_soft_label, labels, models, training
from matching.feed import Feed
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, generator, refuse
from validate import train_FKD

CPU = torch.device("cpu")
# units per turn: real (images by the release, by us), synthesis (likewise), epoch; side, pixels: of
# images for classifiers and of the generator; spawned: of the release's 8 workers
SIZES = {
    "cuda": {"turns": 2, "real": (512, 2600), "synthesis": (3, 64), "steps": 50, "pixels": 512}
    | {"batch": 1024, "epoch": 10240, "side": 224, "spawned": 8, "workers": 4},
    "cpu": {"turns": 3, "real": (16, 16), "synthesis": (4, 16), "steps": 10, "pixels": 64}
    | {"batch": 1024, "epoch": 1024, "side": 64, "spawned": 2, "workers": 0},
    "quick": {"turns": 1, "real": (8, 12), "synthesis": (2, 4), "steps": 4, "pixels": 64}
    | {"batch": 8, "epoch": 16, "side": 32, "spawned": 1, "workers": 0},
}


# ---- measuring


def spent(device):
    """(seconds, CPU-seconds of this process and its ended children) so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def flops_of(function):
    """Floating-point operations of a call, by PyTorch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ceiling(device, dtype):
    """Measured TFLOP/s of a matrix product."""
    from torch.utils.benchmark import Timer

    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange().median / 1e12


def top_costs(function, rows=8):
    """[(what, seconds)] that a call spends most of its time in."""
    profiler = cProfile.Profile()
    profiler.runcall(function)
    stats = pstats.Stats(profiler).stats
    top = sorted(stats.items(), key=lambda item: -item[1][2])[:rows]
    return [(f"{Path(file).name}:{name}", round(row[2], 4)) for (file, _, name), row in top]


def commit():
    """The commit of this tree, "+ changes" if it has any; None outside a repository."""

    def git(*words):
        run = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True)
        return run.stdout.decode().strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + " + changes" * bool(changes) or None
    except OSError:
        return None


def machine(device):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) or [cpu])[0]
    found = {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


class Bench:
    """Device, sizes, pictures and a temporary folder; the rows as they come."""

    def __init__(self, device, size, pictures, root, profile, arch):
        self.device, self.size, self.pictures, self.root = device, size, pictures, root
        self.profile, self.arch, self.rows, self.gpu = profile, arch, [], device.type == "cuda"
        self.process, self.folders = runtime.Process(0, 1, device), 0
        self.facts = {"crop_bytes_that_differ": {}}
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtypes = dtypes if self.gpu else {"fp32": torch.float32}
        self.ceilings = {f"{n}_tflops": ceiling(device, dtype) for n, dtype in dtypes.items()}

    def output(self, stage, settings):
        """A new output folder, as a stage writes to."""
        self.folders += 1
        where = ("--out", self.root, f"{stage}-{self.folders}", stage)
        return output.Output(*where, settings, {}, self.process)

    def model(self, **how):
        """The generator, with random weights."""
        from misc import train_tiny_sd

        folder, small = self.root / "generator", (0, self.size["pixels"], (4,) * 4, (16, 32), 32)
        if not folder.exists():
            pipe = stable_diffusion() if self.gpu else train_tiny_sd.tiny_pipeline(*small, 77)
            pipe.save_pretrained(folder)
        return generators.load(str(folder), self.device, **how)

    def race(self, stage, what, unit, ways, counts, same, device=CPU, turns=None, **facts):
        """Run all ways in turns; one row for each beside "release".

        ways     {name: function};   counts: {name: its units}, or one number for all
        same     (the release's result, another's) -> (words, whether they agree)
        facts    targets: {name: ratio}; least: units; flops: per unit; note, known
        """
        turns, clock = turns or self.size["turns"], 0 if device.type == "cuda" else 1
        targets, threads = facts.pop("targets", {}), torch.get_num_threads()
        times, results = {name: [] for name in ways}, {}
        for name in ways if device.type == "cuda" else ():  # kernels are chosen or compiled
            ways[name]()
        if device.type == "cpu":  # threads that wait for each other would count as CPU-seconds
            torch.set_num_threads(1)
        for turn in range(turns):
            for name in list(ways)[:: -1 if turn % 2 else 1]:
                before = spent(device)
                results[name] = ways[name]()
                times[name].append([b - a for a, b in zip(before, spent(device))])
        torch.set_num_threads(threads)
        counts = counts if isinstance(counts, dict) else dict.fromkeys(ways, counts)
        rates = {n: [counts[n] / max(t[clock], 1e-9) for t in times[n]] for n in ways}
        for name in list(ways)[1:]:
            words, agree = same(results["release"], results[name], name)
            ratios = [b / a for a, b in zip(rates["release"], rates[name])]
            row = {"stage": stage, "what": what if name == "ours" else f"{what}, {name}"}
            row |= {"unit": unit, "per": "CPU-second" if clock else "second"}
            row |= {"release": statistics.median(rates["release"])}
            row |= {"ours": statistics.median(rates[name]), "ratio": statistics.median(ratios)}
            row |= {"ratios": ratios, "n": turns, "agree": bool(agree), "same": words, **facts}
            if "flops" in row:
                seconds = statistics.median(t[0] for t in times[name]) / counts[name]
                row["tflops"] = row["flops"] / seconds / 1e12
                row["share"] = row["tflops"] / self.ceilings[row["ceiling"]]
            if targets.get(name):
                fast = row["ratio"] >= targets[name] and row["ours"] >= row.get("least", 0)
                row |= {"target": targets[name], "met": bool(agree and fast)}
            if self.profile:
                row["top_costs"] = {n: top_costs(ways[n]) for n in ("release", name)}
            self.rows.append(row)
            print(table([row], head=len(self.rows) == 1), flush=True)

    def networks(self, stage, what, ways, model, same, target, **facts):
        """Rows of an epoch by each way; model: what is run, in train mode if it is trained."""
        side, train = self.size["side"], model.training
        x = torch.randn(2, 3, side, side, device=self.device)

        def run():
            with torch.set_grad_enabled(train):
                out = copy.deepcopy(model)(x)
                return out.sum().backward() if train else out

        facts |= {"flops": flops_of(run) / 2, "ceiling": "fp32_tflops"}
        facts |= {"targets": dict.fromkeys(ways, target * self.gpu)}
        where = (self.size["epoch"], same, self.device)
        self.race(stage, f"{what}, {side} px", "image", ways, *where, **facts)


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


def real_flops():
    """Operations of that configuration and of ResNet-18, counted without computing."""
    with torch.device("meta"), torch.no_grad():
        pipe, words = stable_diffusion(), torch.empty(1, 77, 768).half()
        image, latent = torch.empty(1, 3, 512, 512).half(), torch.empty(1, 4, 64, 64).half()
        found = {"vae_encode": flops_of(lambda: pipe.vae.encode(image))}
        found["unet_step"] = flops_of(lambda: pipe.unet(latent, torch.zeros(1).half(), words))
        found["vae_decode"] = flops_of(lambda: pipe.vae.decode(latent))
        found["synthesis"] = 72 * found["unet_step"] + found["vae_decode"]
        resnet, x = models.create_model("resnet18", 1000, 224).eval(), torch.empty(1, 3, 224, 224)
        return {**found, "resnet18_forward": flops_of(lambda: resnet(x))}


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


def equal(a, b, _=None):
    same = torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return "same bits" if same else "DIFFERENT", same


def close(what, limit, others=0.5):
    """How far a result is from the release's, relative to the largest.

    limit    of our own way;   others: of ways that only approximate it
    """

    def same(a, b, name):
        a, b = (torch.as_tensor(np.asarray(x, np.float32)) for x in (a, b))
        off = float((a - b[: len(a)]).abs().max() / a.abs().max())
        return f"{what} differ by {off:.1e} at most", off <= (limit if name == "ours" else others)

    return same


# ---- stage 1


def release_images(items):
    """[(path, size)] -> (B, 3, size, size) float32, as its readers hand them over."""
    found = []
    for path, size in items:
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        found.append(TF.to_tensor(image))
    return torch.stack(found)


def release_prototypes(model, split, workers, ipc, path):
    """Floats from the readers in batches of 10, text encoded for every image and thrown away, a
    wait for each image's latent, k-means in between, its float64 centres as JSON."""
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(n_clusters=ipc, random_state=0, batch_size=ipc, n_init="auto")
    items, latents = (
        [(path, 8 * model.latent_shape(model.native_size)[1]) for path in split.items[0]],
        [],
    )
    loader = torch.utils.data.DataLoader(items, 10, num_workers=workers, collate_fn=release_images)
    for pixels in loader:
        draws = [generator(0, runtime.POSTERIOR, 0, len(latents) + n) for n in range(len(pixels))]
        for _ in draws:
            model.condition.__wrapped__("tench")
        for latent in model.encoder(pixels.to(model.device), draws):
            latents.append(latent.half().cpu().numpy())
            if len(latents) % ipc == 0:
                rows = np.stack(latents[-ipc:]).reshape(ipc, -1)
                kmeans.partial_fit(rows.astype(np.float64))
    path.write_text(json.dumps(kmeans.cluster_centers_.tolist()))
    return np.stack(latents)


def stage_1(bench):
    few, many = bench.size["real"]
    folder, gpu = bench.root / "real" / "train" / "tench", bench.gpu
    folder.mkdir(parents=True)
    for i in range(few):  # JPEGs as large as ImageNet's
        picture = bench.pictures[i % len(bench.pictures)].resize((500, 375))
        picture.save(folder / f"{i:05d}.jpeg", quality=92)
    split = datasets.open_split("imagefolder", bench.root / "real")
    paths, squashed = split.items[0][:64], gen_prototype.SquashedImages(split, 512)
    ways = {"release": lambda: release_images([(path, 512) for path in paths]).mul(255).byte()}
    ways["ours"] = lambda: torch.stack([squashed[0, i] for i in range(len(paths))])
    note = {"known": 200, "note": "decoding and resizing are most of it, on both sides"}
    bench.race(1, "JPEGs read and squashed to 512 px", "image", ways, len(paths), equal, **note)

    items = tuple(split.items[0][i % few] for i in range(many))
    whole, model = dataclasses.replace(split, items=(items,)), bench.model()
    argv = ["--size", bench.size["pixels"], "--km_expand", 1, "--on_small_class", "repeat"]
    stage = gen_prototype.get_args(list(map(str, argv))).settings
    kmeans = gen_prototype.resolve_kmeans_device("auto", bench.device)

    def make(model, cache=None, ipc=10, form="json"):
        settings = {**stage, "ipc": ipc}
        how = (settings, cache, bench.size["workers"], True)
        with bench.output("prototypes", settings) as out:
            [(_, rows, _)] = gen_prototype.class_latents(model, whole, [0], *how)
            found = gen_prototype.cluster(rows, settings, kmeans, "tench")
            facts = {"class_index": 0, "folder": "tench", "prompt": "tench"}
            out.write(f"0.{form}", prototypes.class_bytes(found, facts, form))
        order = gen_prototype.class_order(whole, 0, 0)
        return rows if cache else rows[np.argsort(order)][:few]

    path, workers = bench.root / "release.json", bench.size["workers"]
    ways = {"release": lambda: release_prototypes(model, split, workers, min(10, few), path)}
    ways["ours"] = lambda: make(model)
    if gpu:
        fast = bench.model(channels_last=True, compile=True)
        ways["channels_last + compile"] = lambda: make(fast)
    counts = {**dict.fromkeys(ways, many), "release": few}
    image = torch.zeros(1, 3, *[bench.size["pixels"]] * 2, dtype=torch.uint8)
    facts = {"flops": flops_of(lambda: model.encode(image, [generator(0)]))}
    facts |= {"ceiling": f"{'fp16' if gpu else 'fp32'}_tflops"}
    facts |= {"targets": dict.fromkeys(ways, 2.5 * gpu)}
    same = close("latents", 0.05 if gpu else 1e-3)
    bench.race(1, "images to prototypes", "image", ways, counts, same, bench.device, **facts)

    shape = (1300, *model.latent_shape(bench.size["pixels"]))
    latents = np.random.default_rng(0).normal(0, 1, shape).astype(np.float16)
    cache = gen_prototype.LatentCache(bench.root, whole, stage, model.facts, lambda **_: None)
    cache.save(0, latents, [], 1.0)
    ways = {"release": lambda: make(model)}
    for ipc, form in product((10, 200), ("json", "safetensors")):
        ways[f"{ipc} per class, {form}"] = partial(make, model, cache, ipc, form)
    counts, what = {**dict.fromkeys(ways, 1300), "release": many}, "another IPC, from the cache"
    facts = {"targets": dict.fromkeys(ways, 12), "note": "against our own way from images"}
    same = lambda a, b, name: equal(latents, b)  # noqa: E731
    bench.race(1, what, "image", ways, counts, same, bench.device, **facts)

    found, path = prototypes.Prototypes(latents[:10], np.ones(10)), bench.root / "0.safetensors"
    path.write_bytes(prototypes.class_bytes(found, {"prompt": "tench"}, "safetensors"))
    text = json.dumps({f"tench {c}": latents[:10].tolist() for c in range(3)})
    (bench.root / "release.json").write_text(text)
    digest = files.sha256(path)

    def release():
        table = json.loads((bench.root / "release.json").read_text())
        return [torch.tensor(rows, dtype=torch.float16) for rows in table.values()][0]

    def ours():
        for _ in range(60):
            data = path.read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest  # as stage 2 does
            rows = prototypes.read_class(path, data)[0].latents
        return torch.from_numpy(rows)

    ways, counts = {"release": release, "ours": ours}, {"release": 3, "ours": 60}
    what = "prototypes read, 10 per class: JSON, safetensors and its sha256"
    bench.race(1, what, "class", ways, counts, equal, targets={"ours": 100})


# ---- stage 2


def stage_2(bench):
    few, many = bench.size["synthesis"]
    model, draw, gpu = bench.model(), np.random.default_rng(1), bench.gpu
    argv = ["--prototype_path", "x", "--ipc", "10", "--num_inference_steps", bench.size["steps"]]
    settings = gen_syn_image.of_arm(gen_syn_image.get_args(list(map(str, argv))).settings, "d4m")
    classes = [
        {"index": c, "folder": f"c{c}", "prompt": f"tench {c}"} for c in range(-(-many // 10))
    ]
    jobs = gen_syn_image.list_jobs(classes, 10, 10)[:many]
    shape = (10, *model.latent_shape(bench.size["pixels"]))
    rows = {c["index"]: draw.normal(0, 1, shape).astype(np.float16) for c in classes}
    held = {c: prototypes.Prototypes(latents, np.ones(10)) for c, latents in rows.items()}

    def release():  # one image at a time, both prompts encoded for each, saved before the next
        names = ("strength", "guidance_scale", "num_inference_steps")
        options = {name: settings[name] for name in names} | {"eta": 0.0}
        folder = Path(tempfile.mkdtemp(dir=bench.root))
        for n, job in enumerate(jobs[:few]):
            latents = torch.from_numpy(rows[job.position][job.prototype : job.prototype + 1])
            noise = generator(*gen_syn_image.image_key(0, job, 0))
            texts = {"prompt": [job.prompt], "negative_prompt": [settings["negative_prompt"]]}
            image = model.pipeline(latents=latents, generator=[noise], **texts, **options).images[0]
            image.resize((224, 224)).save(folder / f"{n}.png")
        return np.stack([datasets.read_rgb(folder / f"{n}.png") for n in range(few)])

    def ours(model=model):
        parts, work = gen_syn_image.cut(jobs, 32), gen_syn_image.Synthesizer(model, settings)
        with bench.output("images", settings) as out:
            stream = lambda positions: ((p, held[p]) for p in positions)  # noqa: E731
            gen_syn_image.make_images(out, parts, work, stream)
            out.flush()
        return np.stack([datasets.read_rgb(out.folder / job.file) for job in jobs[:few]])

    def same(a, b, _):
        off = np.abs(a.astype(int) - b.astype(int))
        words = f"pixels differ by {off.max()} of 255 at most, {off.mean():.2g} in the mean"
        return words, off.mean() <= 4 if gpu else off.max() <= 1  # 36 steps in fp16 on a GPU

    ways = {"release": release, "ours": ours}
    if gpu:
        fast = bench.model(channels_last=True, compile=True)
        ways["channels_last + compile"] = lambda: ours(fast)
    work = gen_syn_image.Synthesizer(model, settings)
    facts = {"flops": flops_of(lambda: work.pictures(jobs[:1], held))}
    facts |= {
        "ceiling": f"{'bf16' if gpu else 'fp32'}_tflops",
        "targets": dict.fromkeys(ways, 6 * gpu),
    }
    counts = {**dict.fromkeys(ways, many), "release": few}
    bench.race(2, "prototypes to PNGs", "image", ways, counts, same, bench.device, **facts)


# ---- stages 3 and 4


class ReleaseFeed(torch.utils.data.Dataset):
    """Batch by batch: every PNG opened anew, cropped, flipped and normalised by itself, stacked;
    labels unpickled. Its workers are spawned: each imports torch anew, every epoch."""

    def __init__(self, paths, drawn, size, pickles=None):
        self.paths, self.drawn, self.size, self.pickles = paths, drawn, size, pickles

    def __len__(self):
        return len(self.drawn)

    def crop(self, i, box, flip):
        with open(self.paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        bilinear = TF.InterpolationMode.BILINEAR
        image = TF.resized_crop(image, *box, [self.size, self.size], bilinear)
        return TF.hflip(image) if flip else image

    def draws(self, number):
        batch = self.drawn[number]
        return list(zip(batch.index.tolist(), batch.crop.tolist(), batch.flip.tolist()))

    def __getitem__(self, number):
        facts = datasets.ALL["imagenet"]
        crops = (TF.to_tensor(self.crop(*draw)) for draw in self.draws(number))
        x = torch.stack([TF.normalize(crop, facts.mean, facts.std) for crop in crops])
        return number, x, load_pickle(self.pickles, number) if self.pickles else None

    def mixed(self, device, workers):
        """(batch, mixed images, logits) of an epoch, on the device."""
        spawn = {"multiprocessing_context": "spawn"} if workers else {}
        pin = device.type == "cuda"
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, num_workers=workers, pin_memory=pin, **spawn
        )
        for number, x, logits in loader:
            batch = self.drawn[number]
            x = batches.mix(x.to(device), batch, "cutmix")
            yield batch, x, logits if logits is None else logits.to(device)


def save_pickle(folder, number, batch, logits):
    """What its stage 3 stores of a batch."""
    draws = [batch.crop.float(), batch.flip, batch.partner, batch.lam, batch.box.tolist()]
    torch.save([*draws, logits.clone()], folder / f"batch_{number}.tar")


def load_pickle(folder, number):
    return torch.load(folder / f"batch_{number}.tar", weights_only=True)[5]


class Replay:
    """A distilled set of `count` images of `side` px, and labels of one epoch in both forms."""

    def __init__(self, bench, count, side, batch_size, device):
        self.folder = Path(tempfile.mkdtemp(dir=bench.root))
        pictures = [p if side == 224 else p.resize((side, side)) for p in bench.pictures[:count]]
        for i, picture in enumerate(pictures):
            picture.save(self.folder / f"{i:05d}.png")
        which = [i % len(pictures) for i in range(count)]
        self.paths = [self.folder / f"{i:05d}.png" for i in which]
        self.arrays = [np.asarray(pictures[i]) for i in which]
        self.protocol = {**batches.PROTOCOL, "epochs": 1, "batch_size": batch_size}
        self.protocol |= {"input_size": side, "mix_type": "cutmix"}
        sizes, seed = torch.full((count, 2), side), self.protocol["fkd_seed"]
        parts = batches.epoch_batches(seed, 0, count, batch_size)
        self.drawn = [
            batches.draw_batch(self.protocol, 0, n, i, sizes[i]) for n, i in enumerate(parts)
        ]
        logits = torch.randn(count, 1000, generator=generator(0)).half()
        with bench.output("soft_labels", self.protocol) as out:
            labels.write_epoch(out, 0, self.drawn, logits)
        name = labels.label_file(0)
        self.stored = out.folder, {name: files.sha256(out.folder / name)}
        for n, rows in enumerate(logits.split([len(batch.index) for batch in self.drawn])):
            save_pickle(self.folder, n, self.drawn[n], rows)
        self.images = SimpleNamespace(folders=tuple(range(1000)), dataset="imagenet", foreign=False)
        self.images.files, self.images.targets = self.paths, torch.zeros(count, dtype=torch.int64)
        self.keys = [(0, n) for n in range(len(self.drawn))]
        self.feed = Feed(list(self.arrays), self.images, self.protocol, device, self.stored)
        self.release = ReleaseFeed(self.paths, self.drawn, side, self.folder)

    def forget(self):
        """So that the labels' file is opened, hashed and checked again."""
        self.feed.checked.clear()
        self.feed.opened, self.feed.kept = (None, None), {}


def stage_3(bench):
    size, device = bench.size, bench.device
    replay = Replay(bench, min(size["batch"], 1024), 224, size["batch"], CPU)
    batch, release = replay.drawn[0], replay.release
    draws = (replay.arrays, batch.index, batch.crop, batch.flip, 224)
    ways = {"release": lambda: np.stack([release.crop(*draw) for draw in release.draws(0)])}
    ways["ours"] = lambda: batches.crop_on_cpu(*draws).numpy()

    def same(a, b, _):
        odd = int((a != b).sum())
        return f"{odd} of {a.size / 1e6:.0f} M bytes differ", not odd

    what, count = "crops replayed: PNG, crop, flip", len(batch.index)
    bench.race(3, what, "image", ways, count, same, known=427)

    def ours():
        replay.forget()
        item = replay.feed[0, 0]
        return replay.feed.mixed(item), item.logits

    ways = {"release": lambda: next(release.mixed(CPU, 0))[1:], "ours": ours}
    flat = lambda x: torch.cat([t.flatten().float() for t in x])  # noqa: E731
    both = lambda a, b, name: equal(flat(a), flat(b))  # noqa: E731
    what = "feeding: crop, flip, mix, labels to a normalised batch, hash included"
    facts = {"targets": {"ours": 2.5}, "least": 1000}
    bench.race(3, what, "image", ways, count, both, **facts)
    for side in (224, 64, 32):
        bench.facts["crop_bytes_that_differ"][side] = device_crops(bench.pictures, device, side)

    replay, side = Replay(bench, size["epoch"], size["side"], size["batch"], device), size["side"]
    with training.seeded(0):
        teacher = models.create_model(bench.arch, 1000, side).eval().to(device)
    fast = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
    spawned = size["spawned"] * bench.gpu

    @torch.no_grad()
    def release_labels():
        found = []
        for n, (batch, x, _) in enumerate(replay.release.mixed(device, spawned)):
            found.append(teacher(x).half().cpu())
            save_pickle(replay.folder, n, batch, found[-1])
        return torch.cat(found)

    def our_labels(teacher, amp, channels_last):
        settings = {**replay.protocol, "amp": amp, "channels_last": channels_last, "use_fp16": True}
        items, steps = feed_without_labels.loader(replay.keys), len(replay.keys)
        with bench.output("soft_labels", settings) as out, out.progress(disable=True) as bar:
            work = (items, steps, [teacher], settings, bar)
            drawn, logits = generate_soft_label.label_epoch(feed_without_labels, *work)
            labels.write_epoch(out, 0, drawn, logits)
        return logits

    feed_without_labels = Feed(list(replay.arrays), replay.images, replay.protocol, device)
    ways = {"release": release_labels, "ours": lambda: our_labels(teacher, "none", False)}
    if bench.gpu:
        ways["bf16 + channels_last"] = lambda: our_labels(fast, "bf16", True)
    bench.networks(3, f"labels made by {bench.arch}", ways, teacher, close("logits", 0.01), 5)


def device_crops(pictures, device, side):
    """Bytes that differ between `resized_crop_batch` and Pillow, over 1,000 random crops."""
    arrays = [np.asarray(p.resize((side, side))) for p in pictures[:100]]
    index = torch.arange(1000 if len(arrays) == 100 else 4 * len(arrays)) % len(arrays)
    protocol = {**batches.PROTOCOL, "input_size": side}
    batch = batches.draw_batch(protocol, 0, 0, index, torch.full((len(index), 2), side))
    pixels = torch.from_numpy(np.stack(arrays)).to(device)[index.to(device)]
    found = batches.resized_crop_batch(pixels, batch.crop, batch.flip, side).cpu()
    return int((found != batches.crop_on_cpu(arrays, index, batch.crop, batch.flip, side)).sum())


def release_epoch(model, replay, device, workers):
    """Two accumulation steps per batch, meters read after each; the sum of the losses."""
    optimizer, losses = training.make_optimizer(model, False, 1e-3, 0.01), []
    model.train()
    for batch, x, logits in replay.release.mixed(device, workers):
        optimizer.zero_grad()
        count = len(batch.index)
        for first, end in training.chunks_of(count, -(-count // 2)):
            goal = training.Goal(logits[first:end], None, None)
            loss = training.kl_loss(model(x[first:end]), goal, temperature=20.0) / count
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return sum(losses)


def our_epoch(bench, replay, bn_batch, **flags):
    """A function that trains the same first epoch of a student at every call; its network."""
    argv = ["--train_dir", "x", "--val_dir", "x", "--fkd_path", "x", "--cos", "-T", "20"]
    argv += ["--model", bench.arch, *(f"--{name}" for name, on in flags.items() if on is True)]
    settings = train_FKD.get_args(argv).settings.filled(**replay.protocol)
    settings |= {"bn_batch": bn_batch, **flags}
    names = ("amp", "channels_last", "compile")
    forward = training.Forward(bench.device, *(settings[name] for name in names))
    lessons = train_FKD.Lessons(replay.images, settings, bench.process, 0)
    lessons.settings, lessons.stored, lessons.feed = settings, replay.stored, replay.feed
    learner = training.Learner(lessons, 0, forward)
    start = copy.deepcopy(training.plain(learner.model).state_dict())

    def epoch():
        replay.forget()
        training.plain(learner.model).load_state_dict(start)
        learner.optimizer.state.clear()
        items = replay.feed.loader(replay.keys)
        with runtime.progress(quiet=True) as bar:
            return learner.train_epoch(items, bench.process, bar)["loss"] * len(replay.keys)

    return epoch, training.plain(learner.model)


class One(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        return torch.zeros(1)


def stage_4(bench):
    size, turns = bench.size, 2 * bench.size["turns"] + 1
    for batch in sorted({size["batch"], min(size["batch"], 100)}, reverse=True):
        replay = Replay(bench, 10 * batch, 32, batch, CPU)
        (folder, digests), sizes = replay.stored, torch.full((10 * batch, 2), 32)

        def ours(check=False, folder=folder, sizes=sizes, batch=batch, digests=digests):
            opened = labels.EpochLabels(folder, 0, len(sizes), batch)
            if check:
                opened.check(sizes, 1000, 32, *digests.values())
            return [opened.batch(n)[1].clone()[:1] for n in range(10)][0]

        pickles = replay.folder
        ways = {"release": lambda f=pickles: [load_pickle(f, n)[:1] for n in range(10)][0]}
        ways |= {"ours": ours, "hashed and checked too": partial(ours, True)}
        targets = {"ours": 2.5} if batch == size["batch"] else {}
        what, note = f"labels read, batch {batch}", "checked once per file; the release never does"
        facts = {"targets": targets, "note": note, "turns": turns}
        bench.race(4, what, "batch", ways, 10, equal, **facts)

    def spawn():
        options = {"num_workers": size["spawned"], "multiprocessing_context": "spawn"}
        list(torch.utils.data.DataLoader(One(), **options))

    what = f"start of an epoch: {size['spawned']} of the release's 8 workers, our labels opened"
    ways = {"release": spawn, "ours": lambda: ours(True)}
    nothing = lambda *_: ("nothing to compare", True)  # noqa: E731
    bench.race(4, what, "epoch", ways, 1, nothing, targets={"ours": 50})

    replay = Replay(bench, size["epoch"], size["side"], size["batch"], bench.device)
    chunk, half = min(73, -(-size["batch"] // 2)), -(-size["batch"] // 2)
    ours, network = our_epoch(bench, replay, chunk)
    workers, model = size["spawned"] * bench.gpu, copy.deepcopy(network)
    start = copy.deepcopy(network.state_dict())

    def release():
        model.load_state_dict(start)
        return release_epoch(model, replay, bench.device, workers)

    ways, fast = {"release": release, "ours": ours}, {"amp": "bf16", "channels_last": True}
    ways["bf16 + channels_last + fused"], _ = our_epoch(bench, replay, chunk, **fast, fused=True)
    ways[f"{half} images per pass"], _ = our_epoch(bench, replay, half)
    same = close("losses", 0.5)
    note = f"{chunk} images per pass where no other number is named, the release's {half}"
    bench.networks(4, f"an epoch of {bench.arch}", ways, model.train(), same, 8, note=note)


STAGES = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4}


# ---- the report

COLUMNS = "stage, what, release, ours, unit, ratio, TFLOP/s, share, outputs, target".split(", ")


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows, head=True):
    lines = []
    for row in rows:
        ratios, target = row["ratios"], ""
        if "met" in row:
            least = f", {row['least']} per {row['per']}" if "least" in row else ""
            target = f"{row['target']}x{least}: {'met' if row['met'] else 'NOT MET'}"
        cells = [
            row["stage"],
            row["what"] + f"; {row['note']}" * ("note" in row),
            number(row["release"]) + f" (known: {row.get('known')})" * ("known" in row),
            number(row["ours"]),
            f"{row['unit']} / {row['per']}",
            f"{row['ratio']:.3g} ({min(ratios):.3g} to {max(ratios):.3g}, n = {row['n']})",
            f"{row['tflops']:.3g}" if "tflops" in row else "",
            f"{row['share']:.0%} of {row['ceiling'].split('_')[0]}" if "share" in row else "",
            row["same"],
            target,
        ]
        lines.append(cells)
    lines = [COLUMNS, ["---"] * len(COLUMNS)] * head + lines
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def markdown(result):
    m, versions, seconds = result["machine"], result["versions"], result["seconds"]
    where = f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} torch threads"
    made = f"commit {result['commit']}, {result['date']}, {seconds} s"
    lines = [
        f"# The release's way and ours on {m.get('gpu') or m['cpu']}",
        f"`{result['command']}`, {made}. {where}; load before: {result['load_before'][0]:.2f}. "
        f"torch {versions['torch']}, Pillow {versions['pillow']}. Inputs: {result['inputs']}.",
        "All measured, both sides in this run, in turns; rates and ratios are medians (least to "
        "most, n turns); one torch thread wherever CPU-seconds are counted.",
        table(result["rows"]),
    ]
    for title, values in (("Measured ceilings, TFLOP/s", "ceilings"), ("Counted GFLOP", "flops")):
        scale = 1e9 if values == "flops" else 1
        words = ", ".join(f"{k} {v / scale:,.4g}" for k, v in result[values].items())
        lines.append(f"{title}: {words}.")
    peaks = [f"{n}: {json.dumps(peak)}" for n, peak in result["peak_memory"].items()]
    lines.append(f"Peak memory of this process up to each stage: {'; '.join(peaks)}.")
    for name, value in result["facts"].items():
        lines.append(f"{name.replace('_', ' ')}: {json.dumps(value)}.")
    for row in result["rows"]:
        for name, costs in row.get("top_costs", {}).items():
            lines.append(f"Top costs, stage {row['stage']}, {row['what']}, {name}:")
            lines.append("\n".join(f"- {seconds:.3f} s `{what}`" for what, seconds in costs))
    return "\n\n".join(lines) + "\n"


def differing(rows, crops):
    """What says that our outputs are not the release's: one text each."""
    found = [f"stage {r['stage']}, {r['what']}: {r['same']}" for r in rows if not r["agree"]]
    odd = {side: n for side, n in crops.items() if n}
    return found + [f"stage 3, crops of {side} px: {n} bytes differ" for side, n in odd.items()]


def get_args(argv=None):
    parser = Parser("misc.benchmark", __doc__)
    parser.flag("--device", default="auto", help="auto, cpu or cuda")
    parser.flag("--stage", nargs="+", type=int, choices=STAGES, default=list(STAGES))
    words = "photographs [$D4M_TEST_DATA, else pictures made from noise]"
    parser.flag("--images", default=os.environ.get("D4M_TEST_DATA"), metavar="DIR", help=words)
    words = "of stages 3-4 [resnet18; on a CPU convnet_mini]"
    parser.flag("--arch", type=models.model_name, help=words)
    words = "name what each way spends its time in (one more turn)"
    parser.flag("--profile", action="store_true", help=words)
    words = "only see that all of it runs; the figures mean nothing"
    parser.flag("--quick", action="store_true", help=words)
    words = "folder of NAME.json and NAME.md"
    parser.flag("--out", type=Path, default=Path("output/benchmarks"), help=words)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    device, stages = runtime.this_process(args.device).device, sorted(set(args.stage))
    if device.type == "cpu":
        torch.set_num_threads(1)  # for the ceilings, too, of which its rows are shares
    name = "cpu"
    if device.type == "cuda":
        name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    name += "-stage" + "".join(map(str, stages)) if stages != list(STAGES) else ""
    name += f"-{args.arch}".replace(":", "-") * bool(args.arch) + "-profile" * args.profile
    flags = f" --arch {args.arch}" * bool(args.arch) + " --profile" * args.profile
    started, size = time.perf_counter(), SIZES["quick" if args.quick else device.type]
    pictures, kind = photographs(args.images, 16 if args.quick else 256)
    arch = args.arch or ("resnet18" if device.type == "cuda" else "convnet_mini")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="d4m-benchmark-") as root:
        bench = Bench(device, size, pictures, Path(root), args.profile, arch)
        result = {
            "command": f"python -m misc.benchmark --device {device.type} --stage "
            + " ".join(map(str, stages))
            + flags,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(device),
            "load_before": os.getloadavg(),
            "versions": output.library_versions(),
            "inputs": kind,
            "ceilings": bench.ceilings,
            "flops": real_flops(),
            "peak_memory": {},
            "facts": bench.facts,
            "rows": bench.rows,
        }
        for stage in stages:
            STAGES[stage](bench)
            result["differ"] = differing(bench.rows, bench.facts["crop_bytes_that_differ"])
            result["peak_memory"][stage] = output.peak_memory(device)
            result["seconds"] = round(time.perf_counter() - started, 1)
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
