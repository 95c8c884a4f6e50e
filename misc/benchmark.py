"""How fast each stage is: the release's way of working and ours, in turns, on the same inputs, outputs compared.

    python -m misc.benchmark                             # all stages, on the GPU if there is one (at most 8 minutes)
    python -m misc.benchmark --device cpu --stage 3 4 --profile
    python -m misc.benchmark --memory                    # host memory of stage 2 at ImageNet's size, network stubbed
    python -m misc.benchmark --costs                     # time, disk and memory by IPC, from what was measured

The release's way is a small reference of ours at the settings of its launchers: fp16 on a GPU, one image at a time
with its text encoded each time, workers spawned each epoch, crops by Pillow from PNGs that are opened anew, a pickle a
batch, batches of 1024. On a GPU both ways run the Stable Diffusion 1.5 configuration with random weights (speed does
not depend on them, nothing is downloaded) and ResNet-18; on a CPU small networks. Rates are units a second on a GPU,
and units a CPU-second, child processes included, on a CPU. Writes OUT/NAME.json and OUT/NAME.md.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.benchmark", file=sys.stderr)
    sys.exit(2)

import copy
import cProfile
import io
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from distillation import gen_prototype, gen_syn_image
from distillation.datasets import DATASETS, EXTENSIONS, open_split, read_rgb
from distillation.prototypes import Prototypes, class_file, class_prototypes, read_class, write_class
from matching.models import create_model
from matching.soft_labels import (
    PROTOCOL,
    EpochLabels,
    Feed,
    crop_on_cpu,
    draw_batch,
    epoch_batches,
    label_file,
    mix,
    resized_crop_batch,
    teacher_logits,
    write_epoch,
)
from matching.training import Forward, chunks_of, make_optimizer, seeded, soft_loss, train_step
from scripts.checkpoints import speed_up
from scripts.files import library_versions, output_folder, read_json, sha256, write_json, write_manifest, write_text
from scripts.runtime import POSTERIOR, Parser, generator, peak_memory, refuse, resolve_device, this_process

KNOWN = {"crops": 427, "reads": 200}  # of the release's way, a CPU-second: more than 30 % below needs a reason
PROMPT, NEGATIVE = "tench, Tinca tinca", "cartoon, anime, painting"


class Size(NamedTuple):
    """How much is timed. Every number is of units a turn, so that a run stays below 8 minutes."""

    turns: int
    real: bool  # Stable Diffusion 1.5 and ResNets, or small networks
    pictures: int  # different photographs, for replay
    encode: int  # stage 1: images
    workers: int  # stage 1: readers, as the release's launcher
    ipc: int  # stage 1: prototypes of the class
    cached: int  # stage 1: latents of the class in the cache
    synthesis: tuple  # stage 2: images by the release's way, by ours
    steps: int  # stage 2: num_inference_steps
    batch: int  # stages 3-4
    epoch: int  # stage 3-4: images an epoch, for networks
    side: int  # stage 3-4: pixels, for networks
    spawned: int  # stage 3-4: workers that the release starts for an epoch
    matmul: int


SIZES = {
    "cuda": Size(2, True, 1024, 1280, 4, 10, 1300, (4, 64), 50, 1024, 10240, 224, 8, 8192),
    "cpu": Size(3, False, 256, 16, 0, 10, 1300, (4, 16), 10, 1024, 1024, 64, 2, 1536),
    "quick": Size(1, False, 16, 8, 0, 2, 12, (2, 4), 4, 8, 16, 32, 1, 64),
}


# ---- measuring


def spent(device):
    """(seconds, CPU-seconds of this process and its ended children) so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)


def in_turns(ways, turns, device):
    """Every way once a turn, in alternating order: ({name: [(seconds, CPU-seconds)]}, {name: last result})."""
    times, results = {name: [] for name in ways}, {}
    for turn in range(turns):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            before = spent(device)
            results[name] = ways[name]()
            times[name].append(tuple(b - a for a, b in zip(before, spent(device))))
    return times, results


def compare(stage, what, unit, times, counts, device, release="release", ours="ours", **facts):
    """One row of the table. counts: units a turn of each way; facts: same, known, target, flops (a unit), ..."""
    clock = 0 if device.type == "cuda" else 1
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
        **facts,
    }
    if facts.get("flops"):
        seconds = [counts[ours] / max(t[0], 1e-9) for t in times[ours]]
        row["tflops"] = facts["flops"] * statistics.median(seconds) / 1e12
    target = facts.get("target")
    if target:
        row["met"] = bool(row["ratio"] >= target and row["ours"] >= facts.get("least", 0))
    return row


def ceilings(device, n):
    """Measured TFLOP/s of an n x n matrix product by precision, and GB/s of a copy (read + written)."""
    found = {}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        dtypes |= {"tf32": torch.float32, "fp16": torch.float16}
    for name, dtype in dtypes.items():
        n = 256 if device.type == "cpu" and name == "bf16" else n  # seconds a product, without hardware for it
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        found[f"{name}_tflops"] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.empty(4 * 1536**2 if device.type == "cpu" else 4 * n * n, dtype=torch.float32, device=device)
    y = torch.ones_like(x)
    found["copy_gb_per_s"] = 2 * x.nbytes / _best(lambda: x.copy_(y), device) / 1e9
    return found


def _best(function, device, repeats=6, inner=4):
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


# ---- inputs


def photographs(root, count, seed=0):
    """`count` RGB pictures of 224 px: those below `root` (mosaics are cut into tiles), else ones made from noise."""
    found = []
    if root is not None:
        for path in sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in EXTENSIONS):
            image = read_rgb(path)
            w, h = image.size
            if min(w, h) >= 448:
                spots = [(x, y) for y in range(0, h - 223, 224) for x in range(0, w - 223, 224)]
                tiles = (image.crop((x, y, x + 224, y + 224)) for x, y in spots)
            else:
                tiles = [image.resize((224, 224), Image.Resampling.BICUBIC)]
            found += [tile for tile in tiles if np.ptp(np.asarray(tile))]
            if len(found) >= count:
                break
        if not found:
            refuse(f"--images {root}: no images there")
        return [found[i % len(found)] for i in range(count)], "photographs"
    draw = np.random.default_rng(seed)
    for _ in range(count):  # clouds at three scales and some grain: a PNG of 224 px has about 100 kB, as a photograph
        picture = np.zeros((224, 224, 3), np.float32)
        for cells, height in ((4, 70), (20, 35), (80, 18)):
            noise = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            picture += height / 64 * (np.asarray(noise.resize((224, 224), Image.Resampling.BICUBIC), np.float32) - 128)
        picture += draw.normal(0, 4, picture.shape)
        found.append(Image.fromarray(np.clip(picture / 1.5 + 128, 0, 255).astype(np.uint8)))
    return found, "pictures made from noise"


def write_real(pictures, root, count):
    """A class folder of `count` JPEGs of 500 x 375 px, as ImageNet's; returns the Split."""
    folder = root / "real" / "train" / "tench"
    folder.mkdir(parents=True)
    for i in range(count):
        pictures[i % len(pictures)].resize((500, 375), Image.Resampling.BICUBIC).save(
            folder / f"{i:05d}.jpeg", quality=92
        )
    return open_split("imagefolder", root / "real")


class Replay(NamedTuple):
    """A distilled set and the labels of its epochs 0 and 1, in our form and as pickles."""

    files: list
    arrays: list
    batches: list  # the draws of epoch 0
    logits: torch.Tensor
    feed: Feed
    pickles: Path
    labels: Path
    png_bytes: float


def replay_set(pictures, root, count, side, batch_size, device, classes=1000):
    """`count` images of `side` px (pictures repeat), stored; their CutMix draws and random logits of two epochs."""
    root = root / f"replay-{count}-{side}-{batch_size}"
    (root / "labels").mkdir(parents=True)
    files, arrays = [], []
    for i, picture in enumerate(pictures[:count]):
        picture = picture if side == 224 else picture.resize((side, side), Image.Resampling.BILINEAR)
        picture.save(root / f"{i:05d}.png")
        files.append(root / f"{i:05d}.png")
        arrays.append(np.asarray(picture))
    png_bytes = statistics.fmean(f.stat().st_size for f in files)
    files, arrays = ([kind[i % len(kind)] for i in range(count)] for kind in (files, arrays))
    protocol = {**PROTOCOL, "epochs": 2, "batch_size": batch_size, "input_size": side, "mix_type": "cutmix"}
    sizes = torch.full((count, 2), side)
    logits = torch.randn(count, classes, generator=generator(0)).half()
    for epoch in (1, 0):
        parts = epoch_batches(protocol["fkd_seed"], epoch, count, batch_size)
        batches = [
            draw_batch(protocol["fkd_seed"], epoch, n, i, sizes[i], side, protocol) for n, i in enumerate(parts)
        ]
        write_epoch(root / "labels", epoch, batches, logits)
    row = 0
    for n, b in enumerate(batches):
        save_pickle(root, n, b, logits[row : row + len(b.index)])
        row += len(b.index)
    digests = {label_file(e): sha256(root / "labels" / label_file(e)) for e in (0, 1)}
    images = SimpleNamespace(folders=tuple(range(classes)), dataset="imagenet")
    feed = Feed(list(arrays), images, protocol, device, (root / "labels", digests))
    return Replay(files, arrays, batches, logits, feed, root, root / "labels", png_bytes)


# ---- the release's way


def save_pickle(folder, number, batch, logits):
    """What its stage 3 stores of a batch."""
    what = [batch.crop.float(), batch.flip, batch.partner, batch.lam, batch.box.tolist(), logits.clone()]
    torch.save(what, folder / f"batch_{number}.tar")


def load_pickle(folder, number):
    return torch.load(folder / f"batch_{number}.tar", weights_only=True)


class ReleaseFeed(torch.utils.data.Dataset):
    """Batch by batch: every PNG opened anew, cropped, flipped and normalised by itself, stacked; labels unpickled."""

    def __init__(self, files, batches, size, pickles=None):
        self.files, self.batches, self.size, self.pickles = files, batches, size, pickles
        self.facts = DATASETS["imagenet"]

    def __len__(self):
        return len(self.batches)

    def crop(self, i, box, flip):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        with open(self.files[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        image = F.resized_crop(image, *box, [self.size, self.size], InterpolationMode.BILINEAR)
        return F.hflip(image) if flip else image

    def __getitem__(self, number):
        from torchvision.transforms import functional as F

        batch, rows = self.batches[number], []
        for i, box, flip in zip(batch.index.tolist(), batch.crop.tolist(), batch.flip.tolist()):
            rows.append(F.normalize(F.to_tensor(self.crop(i, box, flip)), self.facts.mean, self.facts.std))
        x = torch.utils.data.default_collate(rows)
        return number, x, load_pickle(self.pickles, number)[5] if self.pickles else None

    def loader(self, workers):
        """Its workers are spawned: each imports torch anew, every epoch."""
        return torch.utils.data.DataLoader(
            self, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None
        )

    def mixed(self, device, workers):
        """(batch, mixed images, logits) of an epoch, on the device."""
        for number, x, logits in self.loader(workers):
            batch = self.batches[number]
            x = mix(x.to(device), batch, "cutmix")
            yield batch, x, logits if logits is None else logits.to(device)


class One(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        return torch.zeros(1)


def start_workers(workers):
    """Start an epoch's workers, take one item, end them."""
    for _ in torch.utils.data.DataLoader(One(), num_workers=workers, multiprocessing_context="spawn"):
        pass


def release_latents(pipeline, text, split, size, batch_size, workers, ipc):
    """Stage 1: floats from the readers, batches of 10, text encoded for every image and thrown away, a wait for each
    latent, k-means between the batches. km_expand 1: buffers of ipc rows, the last one dropped."""
    from sklearn.cluster import MiniBatchKMeans

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
    return np.stack(latents)


def release_images(items):
    from torchvision.transforms.functional import to_tensor

    images = []
    for split, i, size in items:
        with open(split.items[0][i], "rb") as file:
            image = Image.open(file).convert("RGB")
        images.append(to_tensor(image.resize((size, size), Image.Resampling.BILINEAR)))
    return torch.stack(images)


def release_synthesis(pipeline, jobs, prototypes, folder, options):
    """Stage 2: one image at a time, both prompts encoded for each, resized and saved before the next."""
    for job in jobs:
        latents = torch.from_numpy(prototypes[job.position].latents[job.prototype : job.prototype + 1])
        noise = generator(*gen_syn_image.image_key(0, job, 0))
        image = pipeline([job.prompt], latents, negative_prompt=[NEGATIVE], generator=[noise], **options).images[0]
        (folder / job.folder).mkdir(parents=True, exist_ok=True)
        image.resize((224, 224)).save(folder / job.file)


def release_epoch(model, release, device, workers, temperature=20.0):
    """Stage 4: an epoch in two accumulation steps a batch, meters read after each."""
    optimizer, losses = make_optimizer(model, False, 1e-3, 0.01), []
    model.train()
    for batch, x, logits in release.mixed(device, workers):
        optimizer.zero_grad()
        for first, end in chunks_of(len(batch.index), -(-len(batch.index) // 2)):
            loss = soft_loss(model(x[first:end]), logits[first:end], temperature) / len(batch.index)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return sum(losses)


def our_epoch(model, feed, forward, batches, fused=False, temperature=20.0):
    """The same epoch as stage 4 trains it."""
    optimizer, total = make_optimizer(model, False, 1e-3, 0.01, fused=fused), 0
    model.train()
    for item in feed.loader([(0, n) for n in range(batches)]):
        count = len(item.batch.index)
        x, logits = forward.lay_out(feed.mixed(item)), item.logits.to(feed.device, non_blocking=True)
        chunks = [(first, slice(first, end)) for first, end in chunks_of(count, -(-count // 2))]
        total += train_step(
            model,
            optimizer,
            chunks,
            count,
            lambda rows, x=x, logits=logits: soft_loss(forward(model, x[rows]), logits[rows], temperature),
            1,
        )
    return float(total)


# ---- networks

LETTERS = [chr(c) for c in range(33, 127)]
VOCABULARY = ["<|startoftext|>", "<|endoftext|>"] + LETTERS + [c + "</w>" for c in LETTERS]
VAE = {
    True: {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    False: {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 4},
}
UNET = {
    True: {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    False: {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
}
TEXT = {
    True: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    False: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def networks(real, side):
    """(VAE, UNet, text encoder) of Stable Diffusion 1.5, or small ones; random weights. side: of latents, pixels."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        sample_size=side,
        **VAE[real],
    )
    unet = UNet2DConditionModel(sample_size=side // 8, **UNET[real])
    words = {"vocab_size": 49408 if real else len(VOCABULARY), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, hidden_act="quick_gelu", **words, **TEXT[real]))
    return vae.eval(), unet.eval(), text.eval()


def pipelines(real, side, device, root):
    """(stage 1's pipeline, stage 2's), sharing their networks, fp16 on a GPU."""
    import diffusers
    from diffusers import PNDMScheduler
    from transformers import CLIPTokenizer

    from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline
    from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline

    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    with seeded(0):
        vae, unet, text = networks(real, side)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "text_encoder": text,
        "tokenizer": CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=77),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    both = StableDiffusionGenLatentsPipeline(**parts), StableDiffusionLatents2ImgPipeline(**parts)
    diffusers.utils.logging.set_verbosity_error()  # of modules to keep in fp32, of which there are none
    for pipeline in both:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    return both


def real_flops():
    """FLOPs of the Stable Diffusion 1.5 configuration and ResNets, counted without computing (meta device)."""
    with torch.device("meta"):
        vae, unet, text = networks(True, 512)
        image, latent = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
        words, tokens = torch.empty(1, 77, 768), torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            found = {
                "vae_encode": flops_of(lambda: vae.encode(image)),
                "unet_step": flops_of(lambda: unet(latent, torch.zeros(1), words)),
                "vae_decode": flops_of(lambda: vae.decode(latent)),
            }
            try:
                found["text"] = flops_of(lambda: text(tokens))
            except (RuntimeError, NotImplementedError):  # its mask looks at the tokens
                found["text"] = 13e9
        found["synthesis"] = 72 * found["unet_step"] + found["vae_decode"]
        resnet, x = create_model("resnet18", 1000, 224), torch.empty(2, 3, 224, 224)
        found["resnet18_forward"] = flops_of(lambda: resnet(x)) // 2
        found["resnet18_training"] = flops_of(lambda: resnet(x).sum().backward()) // 2
    return found


# ---- stage 1


def stage_1(bench):
    """Reading, encoding, the cache, prototype files."""
    size, device, root = bench.size, bench.device, bench.root
    side = 512 if size.real or size.encode > 8 else 64
    split = write_real(bench.pictures, root, size.encode)
    pipeline = pipelines(size.real, side, device, root)[0]
    encoder = pipeline.text_encoder
    tokens = torch.zeros(1, 77, dtype=torch.long, device=device)
    count = size.encode

    images = gen_prototype.SquashedImages(split, side)
    ways = {
        "release": lambda: [release_images([(split, i, side)]) for i in range(min(count, 64))],
        "ours": lambda: [images[0, i] for i in range(min(count, 64))],
    }
    times, found = in_turns(ways, size.turns, torch.device("cpu"))
    same = all(torch.equal((a[0] * 255).round().byte(), b) for a, b in zip(found["release"], found["ours"]))
    bench.add(
        compare(
            1, f"JPEGs read and squashed to {side} px", "image", times, dict.fromkeys(ways, min(count, 64)),
            torch.device("cpu"), same="same pixels" if same else "DIFFERENT", known=KNOWN["reads"],
            note="decoding and PIL's resize are most of it, on both sides",
        ),
        ways,
    )  # fmt: skip

    @torch.no_grad()
    def text():
        encoder(tokens)

    def release():
        return release_latents(pipeline, text, split, side, 10, size.workers, size.ipc)

    def ours(pipeline=pipeline):
        with ThreadPoolExecutor(1) as background:
            for _, latents, _ in gen_prototype.class_latents(
                pipeline, split, [0], side, 32, 0, num_workers=size.workers
            ):
                kmeans = gen_prototype.resolve_kmeans_device("auto", device)
                result = background.submit(class_prototypes, latents, size.ipc, size.ipc, "minibatch", kmeans)
            result.result()
        return latents

    ways = {"release": release, "ours": ours}
    if device.type == "cuda":
        for name in ("channels_last", "channels_last + compile"):
            other = copy.deepcopy(pipeline)
            speed_up(other, True, "compile" in name)
            ways[name] = lambda other=other: ours(other)
    for way in ways.values() if device.type == "cuda" else ():
        way()  # kernels are chosen, or compiled
    times, found = in_turns(ways, size.turns, device)
    flops = flops_of(lambda: pipeline(torch.zeros(1, 3, side, side, device=device)))
    for name in list(ways)[1:]:
        off = np.abs(found["release"].astype(np.float32) - found[name].astype(np.float32)).max()
        scale = np.abs(found["release"].astype(np.float32)).max()
        bench.add(
            compare(
                1, f"images to prototypes{'' if name == 'ours' else ', ' + name}", "image", times,
                dict.fromkeys(ways, count), device, ours=name, same=f"latents differ by {off / scale:.1e} at most",
                flops=flops, ceiling="fp16_tflops" if device.type == "cuda" else "fp32_tflops",
                target=2.5 if size.real else None,
                note="" if size.real else "a tiny encoder, bound by memory: a batch gains nothing on a CPU",
            ),
            {"release": ways["release"], "ours": ways[name]},
        )  # fmt: skip
    rate = bench.rows[-1]["ours"]

    # another IPC: a class of ImageNet's size from the cache, beside the images' rate above
    facts = {"side": side}
    cached = bench.split_of(split, size.cached)
    cache = gen_prototype.LatentCache(root / "cache", cached, facts)
    draw = np.random.default_rng(0)
    latents = draw.normal(0, 1, (size.cached, 4, side // 8, side // 8)).astype(np.float16)
    cache.save(0, latents, [])

    def from_cache():
        assert 0 in cache
        kmeans = gen_prototype.resolve_kmeans_device("auto", device)
        found = cache.load(0)[0]
        class_prototypes(found, size.ipc, size.ipc, "minibatch", kmeans)
        return found

    times, found = in_turns({"cache": from_cache}, size.turns + 1, device)
    clock = 0 if device.type == "cuda" else 1
    rates = [size.cached / t[clock] for t in times["cache"]]
    bench.add({
        "stage": 1, "what": "another IPC: from the cache, against our own way from images", "unit": "image",
        "per": "second" if clock == 0 else "CPU-second", "release": rate, "ours": statistics.median(rates),
        "ratio": statistics.median(rates) / rate, "ratios": [r / rate for r in rates], "n": len(rates),
        "same": "same latents" if np.array_equal(found["cache"], latents) else "DIFFERENT", "target": 12,
        "met": statistics.median(rates) >= 12 * rate,
    }, {"ours": from_cache})  # fmt: skip

    prototypes = Prototypes(latents[: max(size.ipc, 2)], np.ones(max(size.ipc, 2), np.int64))
    write_class(root / "0000_a.safetensors", prototypes, {"class_index": 0, "folder": "a", "prompt": PROMPT})
    classes = 3
    table = {f"{PROMPT} {c}": prototypes.latents.astype(np.float64).tolist() for c in range(classes)}
    (root / "release.json").write_text(json.dumps(table))

    def read_json_file():
        with open(root / "release.json") as file:
            return [torch.tensor(rows, dtype=torch.float16) for rows in json.load(file).values()]

    def read_safetensors():
        for _ in range(20 * classes):
            sha256(root / "0000_a.safetensors")  # as every class is checked when it is read
            found = read_class(root / "0000_a.safetensors")[0].latents
        return found

    ways = {"release": read_json_file, "ours": read_safetensors}
    times, found = in_turns(ways, size.turns, torch.device("cpu"))
    same = np.array_equal(found["release"][0].numpy(), found["ours"])
    bench.add(
        compare(
            1, f"prototypes read, {len(prototypes.latents)} a class: JSON, safetensors and its sha256", "class",
            times, {"release": classes, "ours": 20 * classes}, torch.device("cpu"),
            same="same fp16" if same else "DIFFERENT", target=100,
        ),
        ways,
    )  # fmt: skip


# ---- stage 2


def stage_2(bench):
    """Synthesis."""
    size, device, root = bench.size, bench.device, bench.root
    side = 512 if size.real else 64
    pipeline = pipelines(size.real, side, device, root)[1]
    few, many = size.synthesis
    classes = [{"index": c, "folder": f"class{c}", "prompt": f"{PROMPT} {c}"} for c in range(-(-many // 10))]
    jobs = gen_syn_image.list_jobs(classes, 10, 10)[:many]
    draw = np.random.default_rng(1)
    shape = (10, 4, side // 8, side // 8)
    prototypes = [
        Prototypes(draw.normal(0, 1, shape).astype(np.float16), np.ones(10, np.int64)) for _ in classes
    ]  # fmt: skip
    options = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": size.steps, "eta": 0.0}
    runs = iter(range(1000))

    def release():
        folder = root / f"release-{next(runs)}"
        release_synthesis(pipeline, jobs[:few], prototypes, folder, options)
        return folder

    def ours(pipeline=pipeline, jobs=jobs):
        folder = root / f"ours-{next(runs)}"
        for c in classes:
            (folder / c["folder"]).mkdir(parents=True)
        synthesizer = gen_syn_image.Synthesizer(pipeline, "d4m", 0, 0.7, 8.0, size.steps, NEGATIVE)
        stream = lambda positions: ((p, prototypes[p]) for p in positions)  # noqa: E731
        gen_syn_image.make_images(
            folder, gen_syn_image.cut(jobs, 32), synthesizer, stream, 224, SimpleNamespace(name=None)
        )
        return folder

    ways = {"release": release, "ours": ours}
    if device.type == "cuda":
        for name in ("channels_last", "channels_last + compile"):
            other = copy.deepcopy(pipeline)
            speed_up(other, True, "compile" in name)
            ways[name] = lambda other=other: ours(other)
    for name, way in ways.items() if device.type == "cuda" else ():
        way() if name == "release" else ours(pipeline, jobs[:32]) if name == "ours" else way()
    times, found = in_turns(ways, size.turns, device)

    def once():
        synthesizer = gen_syn_image.Synthesizer(pipeline, "d4m", 0, 0.7, 8.0, size.steps, NEGATIVE)
        synthesizer(jobs[:1], prototypes)

    flops = flops_of(once)
    counts = {name: few if name == "release" else many for name in ways}
    for name in list(ways)[1:]:
        off = max(
            np.abs(np.asarray(read_rgb(found["release"] / j.file), int) - np.asarray(read_rgb(found[name] / j.file)))
            .max()
            for j in jobs[:few]
        )  # fmt: skip
        bench.add(
            compare(
                2, f"prototypes to PNGs{'' if name == 'ours' else ', ' + name}", "image", times, counts, device,
                ours=name, same=f"pixels differ by {off} of 255 at most", flops=flops,
                ceiling="bf16_tflops" if device.type == "cuda" else "fp32_tflops",
                target=6 if size.real else None, share_target=0.45 if size.real else None,
                note="" if size.real else f"tiny networks, {side} px, {size.steps} steps",
            ),
            {"release": ways["release"], "ours": ways[name]},
        )  # fmt: skip


# ---- stages 3 and 4


def stage_3(bench):
    """Crops, feeding, labels made by a teacher."""
    size, device, cpu = bench.size, bench.device, torch.device("cpu")
    count = min(size.batch, 1024)
    replay = replay_set(bench.pictures, bench.root, count, 224, size.batch, cpu)
    bench.facts["png_bytes_224"] = replay.png_bytes
    release = ReleaseFeed(replay.files, replay.batches, 224, replay.pickles)
    batch = replay.batches[0]
    draws = list(zip(batch.index.tolist(), batch.crop.tolist(), batch.flip.tolist()))
    ways = {
        "release": lambda: np.stack([np.asarray(release.crop(*d)) for d in draws]),
        "ours": lambda: crop_on_cpu(replay.arrays, batch.index, batch.crop, batch.flip, 224).numpy(),
    }
    times, found = in_turns(ways, size.turns, cpu)
    differ = int((found["release"] != found["ours"]).sum())
    bench.add(
        compare(
            3, "crops replayed: PNG, crop, flip", "image", times, dict.fromkeys(ways, len(draws)), cpu,
            same=f"{differ} of {found['ours'].size / 1e6:.0f} M bytes differ", known=KNOWN["crops"],
        ),
        ways,
    )  # fmt: skip

    feed = replay.feed

    def fed():
        feed.open, feed.checked = (None, None), set()  # so that the labels' file is opened and hashed again
        item = feed[0, 0]
        return feed.mixed(item), item.logits

    def release_fed():
        return next((x, logits) for _, x, logits in release.mixed(cpu, 0))

    ways = {"release": release_fed, "ours": fed}
    times, found = in_turns(ways, size.turns, cpu)
    same = all(torch.equal(a, b) for a, b in zip(found["release"], found["ours"]))
    bench.add(
        compare(
            3, "feeding: crop, flip, mix, labels to a normalised batch, hash included", "image", times,
            dict.fromkeys(ways, len(draws)), cpu, same="same bits" if same else "DIFFERENT", target=2.5,
            least=1000,
        ),
        ways,
    )  # fmt: skip
    del found, ways
    bench.facts["crop_bytes_that_differ"] = {s: device_crops(bench.pictures, device, s) for s in (224, 64, 32)}

    replay = bench.network_set()
    arch = "resnet18" if size.real else "convnet_mini"
    with seeded(0):
        teacher = create_model(arch, 1000, size.side).eval()
    release = ReleaseFeed(replay.files, replay.batches, size.side)
    workers = size.spawned if device.type == "cuda" else 0
    (bench.root / "made").mkdir()

    def labelled(forward, teacher, amp):
        logits = []
        drawn = Feed(list(replay.arrays), bench.images, replay.feed.protocol, device)
        for item in drawn.loader([(0, n) for n in range(len(replay.batches))]):
            logits.append(teacher_logits([teacher], forward.lay_out(drawn.mixed(item)), amp))
        logits = torch.cat(logits).cpu()
        write_epoch(bench.root / "made", 0, replay.batches, logits)
        return logits

    @torch.no_grad()
    def release_labelled():
        logits = []
        for n, (batch, x, _) in enumerate(release.mixed(device, workers)):
            logits.append(teacher(x).half().cpu())
            save_pickle(bench.root / "made", n, batch, logits[-1])
        return torch.cat(logits)

    teacher = teacher.to(device)
    ways = {"release": release_labelled, "ours": lambda: labelled(Forward(device), teacher, "none")}
    if device.type == "cuda":
        fast = copy.deepcopy(teacher).to(memory_format=torch.channels_last)
        ways["bf16 + channels_last"] = lambda: labelled(Forward(device, channels_last=True), fast, "bf16")
    bench.network_rows(3, f"labels made by {arch}", ways, len(replay.files), teacher, False, {"ours": 5, "bf16": 8})


def device_crops(pictures, device, side, count=1000):
    """Bytes that differ between `resized_crop_batch` on the device and Pillow, over `count` random crops."""
    arrays = [np.asarray(p.resize((side, side), Image.Resampling.BILINEAR)) for p in pictures[:100]]
    count = count if len(arrays) >= 100 else 4 * len(arrays)
    index = torch.arange(count) % len(arrays)
    batch = draw_batch(7, 0, 0, index, torch.full((count, 2), side), side, PROTOCOL)
    images = torch.from_numpy(np.stack(arrays)).to(device)
    found = resized_crop_batch(images[index.to(device)], batch.crop, batch.flip, side).cpu()
    return int((found != crop_on_cpu(arrays, index, batch.crop, batch.flip, side)).sum())


def stage_4(bench):
    """Labels read, the start of an epoch, a student's epoch."""
    size, device, cpu = bench.size, bench.device, torch.device("cpu")
    for batch_size in sorted({size.batch, min(size.batch, 100)}, reverse=True):
        replay = replay_set(bench.pictures, bench.root, 10 * batch_size, 32, batch_size, cpu)
        feed, batches = replay.feed, len(replay.batches)
        sizes = feed.sizes

        def ours(checked=True, feed=feed, sizes=sizes, batches=batches, batch_size=batch_size):
            folder, digests = feed.labels
            epoch = EpochLabels(folder, 0, sizes, 1000, batch_size, 32, digests[label_file(0)], checked)
            return [epoch.batch(n)[1].clone()[:1] for n in range(batches)][0]

        ways = {
            "release": lambda replay=replay, n=batches: [load_pickle(replay.pickles, k)[5][:1] for k in range(n)][0],
            "ours": ours,
            "checked": lambda ours=ours: ours(False),
        }
        times, found = in_turns(ways, 2 * size.turns + 1, cpu)
        same = "same fp16" if torch.equal(found["release"], found["ours"]) else "DIFFERENT"
        for name in ("ours", "checked"):
            what = f"labels read, batch {batch_size}" + ("" if name == "ours" else ", hashed and checked too")
            target = 2.5 if name == "ours" and batch_size == size.batch else None
            note = "" if name == "ours" else "once a file and run; the release checks nothing"
            bench.add(
                compare(
                    4, what, "batch", times, dict.fromkeys(ways, batches), cpu, ours=name, same=same,
                    target=target, note=note,
                ),
                {"release": ways["release"], "ours": ways[name]},
            )  # fmt: skip

    def next_epoch():
        feed.open, feed.checked = (None, None), set()
        feed._stored(0, 0)

    ways = {"release": lambda: start_workers(size.spawned), "ours": next_epoch}
    times, _ = in_turns(ways, size.turns, cpu)
    bench.add(
        compare(
            4, f"start of an epoch: {size.spawned} of the release's 8 workers spawned, against our labels opened",
            "epoch", times, dict.fromkeys(ways, 1), cpu, same="nothing to compare", target=50,
            note=f"all 8 would be {8 // max(size.spawned, 1)} times as much; our readers, if any, live for all epochs",
        )
    )  # fmt: skip

    replay = bench.network_set()
    arch = "resnet18" if size.real else "convnet_mini"
    with seeded(0):
        student = create_model(arch, 1000, size.side).to(device)
    release = ReleaseFeed(replay.files, replay.batches, size.side, replay.pickles)
    workers = size.spawned if device.type == "cuda" else 0

    def trained(model, forward, fused=False):
        replay.feed.open, replay.feed.checked = (None, None), set()
        return our_epoch(model, replay.feed, forward, len(replay.batches), fused)

    ways = {
        "release": lambda: release_epoch(copy.deepcopy(student), release, device, workers),
        "ours": lambda: trained(copy.deepcopy(student), Forward(device)),
    }
    fast = Forward(device, "bf16", True)
    ways["bf16 + channels_last + fused"] = lambda: trained(fast.place(copy.deepcopy(student)), fast, True)
    if device.type == "cuda":
        compiled = Forward(device, "bf16", True, True)
        model = compiled.place(copy.deepcopy(student))
        ways["bf16 + channels_last + fused + compile"] = lambda: trained(model, compiled, True)
    bench.network_rows(4, f"an epoch of {arch}", ways, len(replay.files), student, True, {"ours": 8})


# ---- the run


class Bench:
    """What the stages share: device, sizes, pictures, a temporary folder; the rows as they come."""

    def __init__(self, device, size, pictures, root, profile, log=print):
        self.device, self.size, self.pictures, self.root = device, size, pictures, root
        self.profile, self.rows, self.facts, self.log = profile, [], {}, log
        self.images = SimpleNamespace(folders=tuple(range(1000)), dataset="imagenet")
        self.limits = ceilings(device, size.matmul)
        self._network_set = None

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

    def network_rows(self, stage, what, ways, count, model, training, targets):
        size, device = self.size, self.device
        for way in list(ways.values())[1:] if device.type == "cuda" else ():
            way()  # kernels are chosen, or compiled
        times, found = in_turns(ways, size.turns, device)
        x = torch.randn(2, 3, size.side, size.side, device=device)
        other = copy.deepcopy(model)
        if training:
            flops = flops_of(lambda: other.train()(x).sum().backward()) / 2
        else:
            flops = flops_of(lambda: other(x)) / 2
        for name in list(ways)[1:]:
            a, b = (torch.as_tensor(found[k]).float() for k in ("release", name))
            off = float((a - b).abs().max() / a.abs().max())
            target = targets["bf16"] if "bf16" in name and "bf16" in targets else targets["ours"]
            ceiling = "bf16_tflops" if "bf16" in name else "tf32_tflops" if device.type == "cuda" else "fp32_tflops"
            self.add(
                compare(
                    stage, f"{what}, {size.side} px{'' if name == 'ours' else ', ' + name}", "image", times,
                    dict.fromkeys(ways, count), device, ours=name,
                    same=f"{'losses' if training else 'logits'} differ by {off:.1e} at most", flops=flops,
                    ceiling=ceiling, target=target if size.real else None,
                    note="" if size.real else "no worker on either side",
                ),
                {"release": ways["release"], "ours": ways[name]},
            )  # fmt: skip

    @staticmethod
    def split_of(split, count):
        """The same split with its images repeated to `count`."""
        items = tuple(split.items[0][i % len(split.items[0])] for i in range(count))
        return type(split)(split.dataset, split.name, split.folders, split.prompts, split.class_ids, (items,))


STAGES = {1: stage_1, 2: stage_2, 3: stage_3, 4: stage_4}


def run(device, size, stages, images=None, profile=False, log=print):
    """Everything that is measured, as one JSON value."""
    started, before = time.perf_counter(), os.getloadavg() if hasattr(os, "getloadavg") else None
    memory = {}
    with tempfile.TemporaryDirectory(prefix="d4m-benchmark-") as root:
        pictures, kind = photographs(images, size.pictures)
        bench = Bench(device, size, pictures, Path(root), profile, log)
        for stage in stages:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            STAGES[stage](bench)
            memory[stage] = peak_memory(device)
    return {
        "command": f"python -m misc.benchmark --device {device.type} --stage {' '.join(map(str, stages))}",
        "commit": library_versions().get("git") or _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "load_before": before,
        "versions": library_versions(),
        "inputs": kind,
        "seconds": round(time.perf_counter() - started, 1),
        "ceilings": bench.limits,
        "flops": real_flops(),
        "peak_memory": memory,
        "facts": bench.facts,
        "rows": bench.rows,
    }


def _commit():
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
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


# ---- tables

COLUMNS = ("stage", "what", "release", "ours", "unit", "ratio", "TFLOP/s", "share", "outputs", "target")


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows, head=True):
    lines = []
    if head:
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        known = f" (known: {row['known']})" if row.get("known") else ""
        ratios = row["ratios"]
        spread = f" ({min(ratios):.3g} to {max(ratios):.3g}, n = {row['n']})" if len(ratios) > 1 else " (n = 1)"
        target = ""
        if row.get("target"):
            least = f", {row['least']} a {row['per']}" if row.get("least") else ""
            share = f", share {row['share_target']:.0%}" if row.get("share_target") else ""
            target = f"{row['target']}x{least}{share}: {'met' if row['met'] else 'NOT MET'}"
        cells = [
            row["stage"],
            row["what"] + (f"; {row['note']}" if row.get("note") else ""),
            number(row["release"]) + known,
            number(row["ours"]),
            f"{row['unit']} / {row['per']}",
            f"{row['ratio']:.3g}{spread}",
            f"{row['tflops']:.3g}" if row.get("tflops") else "",
            f"{row['share']:.0%} of {row['ceiling'].split('_')[0]}" if row.get("share") else "",
            row["same"],
            target,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def markdown(result):
    m, c = result["machine"], result["ceilings"]
    lines = [
        f"# The release's way and ours on {m.get('gpu') or m['cpu']}",
        "",
        f"`{result['command']}`, commit {result['commit']}, {result['date']}, {result['seconds']} s. "
        f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} torch threads"
        + (f", {m['gpu']}" if "gpu" in m else "")
        + f"; load before: {(result['load_before'] or ['unknown'])[0]}. "
        f"torch {result['versions'].get('torch')}, Pillow {result['versions'].get('pillow')}. "
        f"Inputs: {result['inputs']}.",
        "",
        "All measured, both sides in this run, in turns; rates and ratios are medians (least to most, n turns).",
        "",
        table(result["rows"]),
        "",
        "Measured ceilings: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in c.items()) + ".",
        "",
        "Counted by PyTorch's FLOP counter, GFLOP a unit: "
        + ", ".join(f"{k} {v / 1e9:,.4g}" for k, v in result["flops"].items())
        + ".",
        "",
        "Peak memory so far after each stage, MiB: "
        + "; ".join(
            f"{k}: {', '.join(f'{n} {v}' for n, v in row.items())}" for k, row in result["peak_memory"].items()
        )
        + ".",
    ]
    differ = result["facts"].get("crop_bytes_that_differ")
    if differ:
        lines += [
            "",
            "Batched crops on the device against Pillow, 1,000 crops a size, bytes that differ: "
            + ", ".join(f"{k} px {v}" for k, v in differ.items())
            + ".",
        ]
    slow = [r for r in result["rows"] if r.get("known") and r["release"] < 0.7 * r["known"]]
    if slow:
        lines += [
            "",
            "More than 30 % below the known rate: "
            + "; ".join(
                f"{r['what']} ({r['known']}: decoding and resizing alone, on an idle core; here "
                "with the release's floats)"
                for r in slow
            )
            + ".",
        ]
    for row in result["rows"]:
        for name, costs in row.get("top_costs", {}).items():
            lines += ["", f"Top costs, stage {row['stage']}, {row['what']}, {name}:", ""]
            lines += [f"- {seconds:.3f} s `{what}`" for what, seconds in costs]
    return "\n".join(lines) + "\n"


# ---- memory of stage 2


def sparse_prototypes(root, classes, ipc, form):
    """A finished prototype folder of that size whose latents are holes in its files: it takes no disk."""
    from distillation.datasets import known_prompts

    chosen = list(known_prompts("imagenet").items())[:classes]
    table = [{"index": c, "folder": f, "prompt": p} for c, (f, p) in enumerate(chosen)]
    settings = {
        "dataset": "imagenet", "ipc": ipc, "km_expand": 1, "kmeans": "minibatch", "size": 512, "seed": 0,
        "classes": None, "max_images_per_class": 0, "dtype": "auto", "prototype_format": form,
    }  # fmt: skip
    folder, shape = root / "prototypes", [ipc, 4, 64, 64]
    files = [class_file(n, c["folder"], form) for n, c in enumerate(table)]
    zeros = Prototypes(np.zeros(shape, np.float16), np.ones(ipc, np.int64))
    with output_folder("--memory", folder, settings, this_process("cpu")):
        for file, c in zip(tqdm(files, desc="prototypes", unit="class"), table):
            facts = {"class_index": c["index"], "folder": c["folder"], "prompt": c["prompt"]}
            if form == "json":
                write_class(folder / file, zeros, facts)
                continue
            latents = 2 * int(np.prod(shape))
            head = json.dumps({
                "__metadata__": {"facts": json.dumps(facts)},
                "cluster_sizes": {"dtype": "I64", "shape": [ipc], "data_offsets": [0, 8 * ipc]},
                "prototypes": {"dtype": "F16", "shape": shape, "data_offsets": [8 * ipc, 8 * ipc + latents]},
            }).encode()  # fmt: skip
            head += b" " * (-len(head) % 8)
            with open(folder / file, "wb") as out:
                out.write(len(head).to_bytes(8, "little") + head)
                out.truncate(8 + len(head) + 8 * ipc + latents)
        facts = {
            "dataset": "imagenet", "ipc": ipc, "km_expand": 1, "vae_sha256": "0" * 64, "latent_shape": shape[1:],
            "classes": table,
        }  # fmt: skip
        write_manifest(folder, "prototypes", settings, files, facts)
    return folder, sum((folder / file).stat().st_size for file in files)


class StubPipeline:
    """The seam of stage 2's networks: answers at once, with pictures of 8 px."""

    unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=SimpleNamespace(in_channels=4))

    def __init__(self):
        self.picture = torch.rand(1, 3, 8, 8, generator=generator(0))

    def encode_prompt(self, prompt, *_, **__):
        return (torch.zeros(1, 77, 768),)

    def __call__(self, latents, **_):
        return SimpleNamespace(images=self.picture.expand(len(latents), -1, -1, -1).clone())


def stage_2_memory(root, classes, ipc, form):
    """Stage 2's own main over prototypes of ImageNet's size, in this process; returns what it needed."""
    folder, size = sparse_prototypes(root, classes, ipc, form)
    before = peak_memory()["host_mib"]
    hashes = {f"{name}_sha256": "0" * 64 for name in ("vae", "unet", "text_encoder", "scheduler", "tokenizer")}
    gen_syn_image.load_synthesis = lambda *_: (StubPipeline(), "fp32", hashes)
    started = time.perf_counter()
    argv = ["--dataset", "imagenet", "--prototype_path", folder, "--ipc", ipc, "--km_expand", 1, "--image_size", 8]
    made = gen_syn_image.main([*map(str, argv), "--device", "cpu", "--save_init_image_path", str(root / "images")])[0]
    timing = read_json(made / "timing.json")
    return {
        "classes": classes, "ipc": ipc, "images": classes * ipc, "prototype_format": form, "prototype_bytes": size,
        "host_mib_of_timing_json": timing["host_mib"], "host_mib_peak": peak_memory()["host_mib"],
        "host_mib_before_stage_2": before, "seconds": round(time.perf_counter() - started, 1), "limit_mib": 2048,
        "note": "pictures of 8 px in place of 512 px, which add 25 MB a batch of 32; networks stubbed",
    }  # fmt: skip


def memory_in_child(root, classes, ipc, form):
    """The same in a process of its own: peaks are of a whole process."""
    code = (
        "import json, sys; from pathlib import Path; from misc.benchmark import stage_2_memory;"
        "found = stage_2_memory(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]);"
        "Path(sys.argv[1], 'found.json').write_text(json.dumps(found))"
    )
    with tempfile.TemporaryDirectory(prefix="d4m-memory-", dir=root) as folder:
        words = [sys.executable, "-c", code, folder, str(classes), str(ipc), form]
        subprocess.run(words, check=True, cwd=Path(__file__).parent.parent)
        return read_json(Path(folder) / "found.json")


# ---- how cost grows

# images a second on one H200, from operation counts and published rates: used until a GPU's JSON is there
ESTIMATES = {"stage 1": 360, "stage 1 cache": 9000, "stage 2": 6.4, "stage 3": 20800, "stage 4": 12500}
REAL_IMAGES, CLASSES, EPOCHS = 1_281_167, 1000, 300
GPU_ROWS = {
    "stage 1": "images to prototypes",
    "stage 1 cache": "another IPC",
    "stage 2": "prototypes to PNGs",
    "stage 3": "labels made by resnet18, 224 px",
    "stage 4": "an epoch of resnet18, 224 px",
}


def gpu_rates(results):
    """({what: images a second}, its mark): measured on a GPU if one of `results` is of one, else estimated."""
    for result in results:
        if "gpu" in result.get("machine", {}):
            rows = {k: [r["ours"] for r in result["rows"] if r["what"].startswith(v)] for k, v in GPU_ROWS.items()}
            if all(rows.values()):
                return {k: v[0] for k, v in rows.items()}, f"measured on {result['machine']['gpu']}"
    return ESTIMATES, "estimated"


def costs(results):
    """Markdown: time, disk and memory of ImageNet-1K by IPC. Each figure ends in m, c or e, see below."""
    rates, origin = gpu_rates(results)
    mark = "c" if origin != "estimated" else "e"
    pngs = [r["facts"]["png_bytes_224"] for r in results if r.get("facts", {}).get("png_bytes_224")]
    png, png_mark = (statistics.fmean(pngs), "c") if pngs else (100e3, "e")

    def hours(seconds, letter=mark):
        if seconds < 180:
            return f"{seconds:.0f} s {letter}"
        return f"{seconds / 60:.0f} min {letter}" if seconds < 5400 else f"{seconds / 3600:.1f} h {letter}"

    def gigabytes(count, letter="c"):
        return f"{count / 1e9:.3g} GB {letter}"

    ipcs, lines, seen = (10, 50, 100, 200), [], EPOCHS * CLASSES
    for gpus in (1, 8):
        # stages 1 to 3 share their work out and never talk; stage 4 sums gradients: 80 % is assumed
        many = gpus if gpus == 1 else gpus * 0.8
        last = mark if gpus == 1 else "e"
        rows = {
            "1 prototypes, from images": [hours(REAL_IMAGES / rates["stage 1"] / gpus)] * 4,
            "1 another IPC, from the cache": [hours(REAL_IMAGES / rates["stage 1 cache"] / gpus)] * 4,
            "2 synthesis": [hours(CLASSES * n / rates["stage 2"] / gpus) for n in ipcs],
            "3 soft labels, ResNet-18, 300 epochs": [hours(seen * n / rates["stage 3"] / gpus) for n in ipcs],
            "4 student, ResNet-18, 300 epochs": [hours(seen * n / rates["stage 4"] / many, last) for n in ipcs],
        }  # fmt: skip
        lines += [f"## Time on {gpus} GPU{'s' * (gpus > 1)}", "", *_by_ipc(ipcs, rows), ""]
    pixels = [CLASSES * n * 224 * 224 * 3 for n in ipcs]
    label = [CLASSES * n * (25 + 2 * CLASSES) for n in ipcs]
    rows = {
        "1 prototypes, safetensors": [gigabytes(CLASSES * n * 4 * 64 * 64 * 2) for n in ipcs],
        "1 prototypes, JSON, 6.7 bytes a number": [gigabytes(CLASSES * n * 4 * 64 * 64 * 6.7, "e") for n in ipcs],
        "1 latent cache": [gigabytes(REAL_IMAGES * 4 * 64 * 64 * 2)] * 4,
        "2 PNGs of 224 px": [gigabytes(CLASSES * n * png, png_mark) for n in ipcs],
        "3 soft labels, fp16, 300 epochs": [gigabytes(EPOCHS * n) for n in label],
        "4 student and results": ["0.05 GB c"] * 4,
    }  # fmt: skip
    lines += ["## Disk", "", *_by_ipc(ipcs, rows), ""]
    weights = {"1": 0.17e9, "2": 2.1e9}
    rows = {
        "1 GPU: fp16 VAE, batch of 32 at 512 px": [gigabytes(weights["1"] + 32 * 0.25e9, "e")] * 4,
        "2 GPU: fp16 Stable Diffusion, batch of 32": [gigabytes(weights["2"] + 32 * 0.45e9, "e")] * 4,
        "3 GPU: set as bytes + a batch of 1024": [gigabytes(n + 1024 * 224 * 224 * 3 * 9 + 4e9, "e") for n in pixels],
        "4 GPU: set as bytes + a chunk of 512": [gigabytes(n + 512 * 2.4e7 + 2e9, "e") for n in pixels],
        "3, 4 host: set in memory (or on its way to the GPU), an epoch's labels, 50,000 test images": [
            gigabytes(p + n + 50_000 * 224 * 224 * 3 + 3e9, "e") for p, n in zip(pixels, label)
        ],
    }  # fmt: skip
    lines += ["## Memory, one process", "", *_by_ipc(ipcs, rows), ""]
    for found in (m for r in results for m in r.get("memory", [])):
        size, peak = found["prototype_bytes"] / 1e9, found["host_mib_peak"]
        lines.append(
            f"Stage 2 over {found['classes']} classes at IPC {found['ipc']} ({found['prototype_format']}, "
            f"{size:.2g} GB of prototypes), networks stubbed: {peak} MiB of host memory at the peak "
            f"m, manifest included; {found['images']:,} images in {found['seconds']} s m."
        )
    return "\n".join([
        "# ImageNet-1K: how cost grows with images a class", "",
        f"m measured, c computed from counts and from measured rates, e estimated. Rates of a GPU: {origin} "
        f"({', '.join(f'{k} {v:,.4g} images/s' for k, v in rates.items())}). `python -m misc.benchmark --costs`", "",
        *lines,
    ]) + "\n"  # fmt: skip


def _by_ipc(ipcs, rows):
    head = ["| | " + " | ".join(f"IPC {n}" for n in ipcs) + " |", "|---|" + "---:|" * len(ipcs)]
    return head + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


# ---- main


def get_args(argv=None):
    parser = Parser(prog="misc.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--stage", nargs="+", type=int, choices=sorted(STAGES), default=sorted(STAGES))
    parser.add_argument(
        "--images", default=None, metavar="DIR", help="photographs [$D4M_TEST_DATA, else made from noise]"
    )
    parser.add_argument("--profile", action="store_true", help="name what each way spends its time in (one more turn)")
    parser.add_argument("--memory", action="store_true", help="only the host memory of stage 2, ImageNet at IPC 200")
    parser.add_argument("--costs", action="store_true", help="only the table of costs by IPC, from OUT/*.json")
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs; the figures mean nothing")
    parser.add_argument("--out", default="output/benchmarks", help="folder of NAME.json and NAME.md")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.costs:
        text = costs([read_json(path) for path in sorted(out.glob("*.json"))])
        write_text(out / "costs.md", text)
        print(text)
        return out / "costs.md"
    if args.memory:
        jobs = [(3, 4, "safetensors")] if args.quick else [(1000, 200, "safetensors"), (3, 200, "json")]
        found = [memory_in_child(None, *job) for job in jobs]
        write_json(out / "memory.json", {"commit": _commit(), "date": time.strftime("%Y-%m-%d"), "memory": found})
        print(json.dumps(found, indent=1))
        return out / "memory.json"
    device = resolve_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as CPU-seconds
    images = args.images or os.environ.get("D4M_TEST_DATA")
    result = run(device, SIZES["quick" if args.quick else device.type], sorted(set(args.stage)), images, args.profile)
    name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()) if device.type == "cuda" else "cpu"
    name += "" if set(args.stage) == set(STAGES) else "-stage" + "".join(map(str, sorted(set(args.stage))))
    name += "-profile" * args.profile
    write_json(out / f"{name}.json", result)
    write_text(out / f"{name}.md", markdown(result))
    print(f"\n{out / name}.json, {out / name}.md: {result['seconds']} s")
    return out / f"{name}.json"


if __name__ == "__main__":
    main()
