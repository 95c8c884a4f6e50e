"""Train a small class-prompted Stable Diffusion from scratch, and save it in diffusers format.

    python -m misc.train_tiny_sd --dataset digits --seed 0 --output_dir output/models/tiny-sd-digits
    python -m misc.train_tiny_sd --dataset cifar10 --data_dir data/cifar10 --output_dir output/models/tiny-sd-cifar10

D4M needs a frozen latent diffusion model that knows the classes by their prompts (paper, section 3.1). Where Stable
Diffusion v1-5 is too large, or cannot be had, this makes one of the same make-up: AutoencoderKL, CLIP text encoder
and tokenizer, UNet2DConditionModel, PNDMScheduler as v1-5 configures it. Stock diffusers loads the folder. It is
trained on the training split only: first the VAE, then UNet and text encoder together on its latents.

The same command resumes, on a CPU to the same bytes as a run that was never stopped. The folder holds, beside the
model, `manifest.json` (written last: data set, digest of the split, arguments, reconstruction PSNR), `samples.png`,
`README.md`, and - about this run only - `samples/`, `log.jsonl`, `timing.json`.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.train_tiny_sd", file=sys.stderr)
    sys.exit(2)

import functools
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from distillation.datasets import DATASETS, BadImage, add_dataset_flags, open_split, squash
from matching.soft_labels import probability
from scripts.files import TIMING, atomic, is_complete, output_folder, read_json, write_json, write_manifest, write_text
from scripts.runtime import (
    EXIT_STOPPED,
    Parser,
    StopSignals,
    Stopwatch,
    append_log,
    below_one,
    entry_point,
    generator,
    natural,
    not_negative,
    peak_memory,
    positive,
    positive_int,
    refuse,
    seed_of,
    this_process,
)

NEGATIVE_PROMPT = (
    "cartoon, anime, painting"  # the release's; without it in training, guidance away from it is arbitrary
)
CHECKPOINT = "checkpoint.pt"
END = "</w>"  # of a word, in the tokenizer
VAE, UNET, MEASURE, SAMPLE = range(4)  # first part of the key of every random draw

SAMPLES = {  # contents of samples.png
    "real": "a row a class: three real images, the same three through the VAE, six from text",
    "text": "six images from text, a row a class",
}
# Widths, steps and rates. digits: about 5 minutes on one CPU core; cpu: CIFAR-10 within an hour; gpu: in 20 minutes.
PRESETS = {
    "digits": dict(
        vae_factor=4, vae_channels=[16, 16, 32], vae_layers=1, vae_steps=500, vae_batch_size=32, vae_lr=4e-3,
        unet_channels=[32, 64], unet_layers=1, unet_steps=1200, unet_batch_size=64, unet_lr=2e-3,
        unet_attention="middle", text_width=64, ema_decay=0.995, kl_weight=1e-5, flip="off", min_snr_gamma=0.0,
    ),
    "cpu": dict(
        vae_factor=2, vae_channels=[32, 32], vae_layers=1, vae_steps=6000, vae_batch_size=16, vae_lr=4e-3,
        unet_channels=[32, 64, 128], unet_layers=1, unet_steps=10500, unet_batch_size=64, unet_lr=1e-3,
        unet_attention="middle", text_width=64, ema_decay=0.999, kl_weight=1e-5, flip="on", min_snr_gamma=5.0,
    ),
    "gpu": dict(
        vae_factor=2, vae_channels=[64, 128], vae_layers=2, vae_steps=8000, vae_batch_size=256, vae_lr=1e-3,
        unet_channels=[128, 256, 256], unet_layers=2, unet_steps=28000, unet_batch_size=256, unet_lr=5e-4,
        unet_attention="inner", text_width=128, ema_decay=0.9995, kl_weight=1e-5, flip="on", min_snr_gamma=5.0,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- data


def load_images(split, size):
    """All images of a split, squashed to `size`: (N, 3, size, size) uint8, (N,) position in split.folders."""
    count = sum(map(len, split.items))
    images, labels = torch.empty(count, 3, size, size, dtype=torch.uint8), torch.empty(count, dtype=torch.long)
    pairs = ((c, item) for c, items in enumerate(split.items) for item in items)
    for row, (c, item) in enumerate(tqdm(pairs, f"read {split.name}", total=count, unit="image")):
        try:
            image = split.read(item)
        except BadImage as error:
            refuse(f"--data_dir: {error}")
        images[row] = torch.from_numpy(np.array(squash(image, size))).permute(2, 0, 1)
        labels[row] = c
    return images, labels


def to_unit_range(images, device):
    """uint8 -> float32 in [-1, 1], what the VAE takes."""
    return images.to(device).float() / 127.5 - 1


@functools.lru_cache(maxsize=2)
def _permutation(seed, stage, epoch, count):
    return torch.randperm(count, generator=generator(seed, stage, 0, epoch))


def batch_rows(seed, stage, step, count, batch_size):
    """The rows of one step's batch: whole epochs without replacement, a remainder is left out."""
    epoch, i = divmod(step, count // batch_size)
    return _permutation(seed, stage, epoch, count)[i * batch_size : (i + 1) * batch_size]


# -------------------------------------------------------------------------------------------------------------- models


def make_tokenizer(prompts):
    """A CLIP tokenizer of the words of `prompts`: each is one token, and any other text falls back on its bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    corpus = [*prompts, NEGATIVE_PROMPT]
    splitter = CLIPTokenizer().backend_tokenizer
    words = {
        word for text in corpus
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
    }  # fmt: skip
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(byte + END for byte in alphabet)]
    merges = learn_merges(words, limit=4096)
    tokens += dict.fromkeys(a + b for a, b in merges)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    longest = max(len(tokenizer(text).input_ids) for text in corpus)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=min(max(16, longest), 77))


def learn_merges(words, limit):
    """Byte-pair encoding of a set of words, up to whole words.

    The tokenizers library has a learner of its own, whose order of merges differs from call to call.
    """
    spelt, merges = [[*word[:-1], word[-1] + END] for word in sorted(words)], []
    while len(merges) < limit:
        pairs = Counter(pair for symbols in spelt for pair in zip(symbols, symbols[1:]))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelt:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [best[0] + best[1]]
                i += 1
        spelt = [symbols for symbols in spelt if len(symbols) > 1]
    return merges


def make_text_encoder(tokenizer, width):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae(size, channels, layers):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=min(16, *channels),
        sample_size=size,
    )


def make_unet(size, channels, layers, attention, text_width):
    """v1-5's UNet in small; the prompt is also added to the time embedding.

    attention    "inner": at all levels but the first; "middle": in the middle block only, twice as fast on a CPU
    With cross-attention alone, the class is not learnt within minutes.
    """
    from diffusers import UNet2DConditionModel

    inner = attention == "inner"
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D",)
        + ("CrossAttnDownBlock2D" if inner else "DownBlock2D",) * (len(channels) - 1),
        up_block_types=("CrossAttnUpBlock2D" if inner else "UpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def make_scheduler():
    """v1-5's: under img2img, 50 steps at strength 0.7 are 36 calls of the UNet."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_pipeline(cls, vae, text_encoder, tokenizer, unet):
    return cls(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """What both stages of training share: one checkpoint file, the budget, the log, stop signals, autocast.

    minutes       {stage: 0, or its wall-clock budget; then its number of steps is set once, from the measured speed}
    stop_after    leave after so many steps of this process, as if interrupted; 0 never
    """

    def __init__(self, folder, device, options, minutes, checkpoint_every, sample_every, stop_after, signals):
        self.folder, self.device, self.options, self.minutes = folder, device, options, minutes
        self.checkpoint_every, self.sample_every = checkpoint_every, sample_every
        self.stop_after, self.signals, self.steps_here = stop_after, signals, 0
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        # weights of finished stages, number of steps a stage, and the stage at hand
        self.state = {"done": {}, "steps": {}, "current": None}
        if (folder / CHECKPOINT).exists():
            self.state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def save(self):
        with atomic(self.folder / CHECKPOINT) as temporary:
            torch.save(self.state, temporary)

    def fit(self, name, modules, loss_at, sample):
        """Minimise `loss_at(step) -> (loss, figures)` over `modules`, with AdamW, a warm-up and a cosine to 0.

        modules    {name: module}; on return they hold the moving average of their weights
        sample     called with the step, on averaged weights
        """
        from diffusers.training_utils import EMAModel

        steps, lr, batch_size = (self.options[f"{name}_{key}"] for key in ("steps", "lr", "batch_size"))
        parameters = [p for module in modules.values() for p in module.parameters()]
        if name in self.state["done"]:
            for key, module in modules.items():
                module.load_state_dict(self.state["done"][name][key])
            return
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        ema = EMAModel(parameters, decay=self.options["ema_decay"], use_ema_warmup=True, power=3 / 4, foreach=True)
        start = 0
        if self.state["current"]:
            current = self.state["current"]
            for key, module in modules.items():
                module.load_state_dict(current["modules"][key])
            optimizer.load_state_dict(current["optimizer"])
            ema.load_state_dict(current["ema"])
            ema.to(self.device)
            start = current["step"]
        if name not in self.state["steps"]:
            minutes = self.minutes[name]
            self.state["steps"][name] = steps_within(minutes, loss_at, parameters, self.autocast) if minutes else steps
        steps = self.state["steps"][name]
        warmup = min(100, steps // 10 + 1)
        sample_every = max(1, steps // 4) if self.sample_every is None else self.sample_every
        bar = tqdm(range(start, steps), name, total=steps, initial=start, unit="step", mininterval=0.5)
        watch = Stopwatch()
        for step in bar:
            rate = min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / max(1, steps - warmup))))
            for group in optimizer.param_groups:
                group["lr"] = lr * float(rate)
            with self.autocast():
                loss, figures = loss_at(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            ema.step(parameters)
            self.steps_here += 1
            done = step + 1
            if done % 50 == 0 or done == steps:
                figures = {key: float(value) for key, value in figures.items()}
                if not np.isfinite(list(figures.values())).all():
                    refuse(f"--{name}_lr {lr:g}: the {name} diverged at step {done}: {figures}")
                rate = round((done - start) * batch_size / watch.seconds)
                bar.set_postfix({**{key: f"{value:.4f}" for key, value in figures.items()}, "images/s": rate})
                append_log(self.folder, stage=name, step=done, images_per_second=rate, **figures)
            leaving = self.signals.name or (self.stop_after and self.steps_here >= self.stop_after)
            if done < steps and (done % self.checkpoint_every == 0 or leaving):
                self.state["current"] = {
                    "step": done,
                    "modules": {key: module.state_dict() for key, module in modules.items()},
                    "optimizer": optimizer.state_dict(),
                    "ema": ema.state_dict(),
                }
                self.save()
                self.signals.leave_if_asked()
                if leaving:
                    print(f"left after --stop_after {self.stop_after} steps; run the same command to go on")
                    raise SystemExit(EXIT_STOPPED)
            if sample_every and done % sample_every == 0 and done < steps:
                ema.store(parameters)
                ema.copy_to(parameters)
                sample(done)
                ema.restore(parameters)
        ema.copy_to(parameters)
        self.state["done"][name] = {key: module.state_dict() for key, module in modules.items()}
        self.state["current"] = None
        self.save()


def steps_within(minutes, loss_at, parameters, autocast):
    """How many steps fit into `minutes`, from the time of a few (their gradients are thrown away)."""
    seconds = []
    for step in range(13):
        began = time.perf_counter()
        with autocast():
            loss, figures = loss_at(step)
        loss.backward()
        float(next(iter(figures.values())))  # wait for the device
        seconds.append(time.perf_counter() - began)
    for parameter in parameters:
        parameter.grad = None
    return max(100, int(minutes * 60 / (1.1 * float(np.median(seconds[3:])))))  # 1.1: optimizer, averages


def kl_per_element(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), averaged over the latent's elements."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def vae_loss(vae, perceptual, images, noise, kl_weight, perceptual_weight):
    """Squared error + KL + distance of a classifier's features.

    images (B, 3, H, W) in [-1, 1], noise (B, 4, h, w) -> scalar, {name: figure}
    """
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample  # (B, 3, H, W)
    error = F.mse_loss(decoded.float(), images)
    kl = kl_per_element(posterior.mean.float(), posterior.logvar.float())
    loss = error + kl_weight * kl
    figures = {"mse": error.detach(), "kl": kl.detach()}
    if perceptual is not None:
        distance = perceptual(decoded, images)
        loss = loss + perceptual_weight * distance
        figures["perceptual"] = distance.detach()
    return loss, figures


class FeatureDistance(torch.nn.Module):
    """Distance of two images in a frozen classifier: its last convolution at each of its first three resolutions.

    Features are normalised over channels at each position, as LPIPS does, and all resolutions count alike.
    network        any classifier of (B, 3, H, W) normalised images
    mean, std      its normalisation of images in [0, 1]
    """

    def __init__(self, network, mean, std, size):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.features, last = [], {}

        def note(module, _inputs, output):
            last[output.shape[-1]] = module

        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        hooks = [m.register_forward_hook(note) for m in convolutions]
        with torch.no_grad():
            network(torch.zeros(1, 3, size, size))
        for hook in hooks:
            hook.remove()
        if not last:
            refuse("--perceptual_checkpoint: this classifier has no convolution to take features from")
        for _, module in sorted(last.items(), key=lambda pair: -pair[0])[:3]:
            module.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))

    def forward(self, decoded, images):
        """decoded, images: (B, 3, H, W) in [-1, 1] -> a scalar."""
        self.features.clear()
        pair = torch.cat([decoded.float(), images]).add(1).div(2)
        self.network((pair - self.mean) / self.std)
        distance = 0
        for feature in self.features:
            ours, theirs = F.normalize(feature.float(), dim=1).chunk(2)
            distance = distance + (ours - theirs).square().sum(1).mean()
        count = len(self.features)
        self.features.clear()
        return distance / count


def chunks(count, size):
    return (slice(start, start + size) for start in range(0, count, size))


@torch.no_grad()
def encode_all(vae, images, device, flip, batch_size=250):
    """Posterior of every image (then of every mirrored one): mean and std, (N or 2N, 4, h, w) in fp16."""
    means, stds = [], []
    for mirrored in (False, True) if flip else (False,):
        for part in tqdm(list(chunks(len(images), batch_size)), "encode" + mirrored * " mirrored", unit="batch"):
            batch = to_unit_range(images[part], device)
            posterior = vae.encode(batch.flip(-1) if mirrored else batch).latent_dist
            means.append(posterior.mean.half())
            stds.append(posterior.std.half())
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def psnr(vae, images, device, batch_size=250):
    """Mean over images of the peak signal-to-noise ratio, in dB, of decoding the posterior's mean."""
    ratios = []
    for part in chunks(len(images), batch_size):
        batch = to_unit_range(images[part], device)
        decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        error = ((decoded - batch) / 2).square().mean((1, 2, 3))
        ratios.append(-10 * error.clamp(min=1e-10).log10())
    return float(torch.cat(ratios).mean())


def diffusion_loss(unet, text_encoder, tokens, which, latents, noise, timesteps, alphas_cumprod, min_snr_gamma):
    """Squared error of the predicted noise; with gamma > 0 times min(SNR, gamma) / SNR (Min-SNR, arXiv 2303.09556).

    tokens (T, length) all texts, which (B,) the text of each latent; latents, noise (B, 4, h, w); timesteps (B,)
    -> weighted loss, plain squared error
    """
    texts, which = torch.unique(which, return_inverse=True)
    embeddings = text_encoder(tokens[texts]).last_hidden_state[which]  # (B, length, width)
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    predicted = unet(noised, timesteps, embeddings).sample
    error = F.mse_loss(predicted.float(), noise)
    if not min_snr_gamma:
        return error, error
    snr = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])  # (B,)
    by_image = (predicted.float() - noise).square().mean((1, 2, 3))
    return (by_image * snr.clamp(max=min_snr_gamma) / snr).mean(), error


# ------------------------------------------------------------------------------------------------------------ pictures


def save_grid(path, rows):
    """rows: list of rows of (3, H, W) images in [0, 1] -> one PNG, each pixel twice as large if they are small."""
    size = rows[0][0].shape[-1]
    zoom, gap = (2 if size <= 64 else 1), 2
    wide = max(map(len, rows))
    sheet = Image.new("RGB", (wide * (size * zoom + gap), len(rows) * (size * zoom + gap)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            tile = Image.fromarray(pixels).resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (x * (size * zoom + gap), y * (size * zoom + gap)))
    with atomic(path) as temporary:
        sheet.save(temporary, "PNG")


@torch.no_grad()
def reconstructions(vae, images, device):
    """uint8 images -> the decoded means of their posteriors, in [0, 1]."""
    return vae.decode(vae.encode(to_unit_range(images, device)).latent_dist.mean).sample.float() / 2 + 0.5


def text_samples(models, prompts, count, seed, device, guidance_scale):
    """Stock text-to-image, 50 steps: len(prompts) rows of `count` images in [0, 1]."""
    from diffusers import StableDiffusionPipeline

    pipeline = make_pipeline(StableDiffusionPipeline, **models)
    pipeline.set_progress_bar_config(disable=True)
    texts = [prompt for prompt in prompts for _ in range(count)]
    draws = [generator(seed, SAMPLE, i) for i in range(len(texts))]
    images = []
    for part in chunks(len(texts), 50):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            made = pipeline(texts[part], generator=draws[part], guidance_scale=guidance_scale, output_type="pt")
        images.append(made.images.float().cpu())
    images = torch.cat(images)
    return [list(images[row : row + count]) for row in range(0, len(images), count)]


# ---------------------------------------------------------------------------------------------------------------- main


def get_args(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, help="the model's folder")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add_dataset_flags(parser)
    parser.set_defaults(dataset="digits")
    parser.add_argument("--image_size", type=positive_int, default=None, help="pixels; default: the data set's own")
    group = parser.add_argument_group("size and length (where not given, the preset's)")
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        default=None,
        help="default: digits for the digits, else gpu with CUDA and cpu without",
    )
    group.add_argument(
        "--vae_factor",
        type=int,
        choices=[1, 2, 4, 8],
        help="pixels a latent position, a side; default: the preset's, 4 above 32 px, 8 above 64 px",
    )
    group.add_argument("--vae_channels", type=positive_int, nargs="+", help="one a level; factor 2 has two levels")
    group.add_argument("--vae_layers", type=positive_int)
    group.add_argument("--unet_channels", type=positive_int, nargs="+", help="one a level, multiples of 16")
    group.add_argument("--unet_layers", type=positive_int)
    group.add_argument(
        "--unet_attention", choices=["inner", "middle"], help="at all levels but the first, or in the middle only"
    )
    group.add_argument("--text_width", type=positive_int)
    group.add_argument("--vae_steps", type=positive_int)
    group.add_argument("--unet_steps", type=positive_int)
    group.add_argument(
        "--minutes", type=not_negative, default=0, help="set both numbers of steps to fit into this; 0: off"
    )
    group.add_argument("--vae_share", type=probability, default=0.3, help="the VAE's share of --minutes")
    group.add_argument("--vae_batch_size", type=positive_int)
    group.add_argument("--unet_batch_size", type=positive_int)
    group.add_argument("--vae_lr", type=positive)
    group.add_argument("--unet_lr", type=positive)
    group.add_argument("--ema_decay", type=below_one)
    group.add_argument("--flip", choices=["on", "off"], help="mirrored images too")
    group.add_argument(
        "--kl_weight", type=not_negative, help="of the KL divergence, averaged over a latent's elements"
    )
    group.add_argument(
        "--min_snr_gamma",
        type=not_negative,
        help="a noise level counts min(SNR, gamma) / SNR: structure first, in a short training; 0: all alike",
    )
    group.add_argument(
        "--prompt_dropout",
        type=probability,
        default=0.1,
        help="share of prompts replaced by the empty or the negative prompt, for guidance",
    )
    group = parser.add_argument_group("perceptual loss of the VAE")
    group.add_argument(
        "--perceptual_checkpoint",
        default=None,
        help="a classifier made by matching.train_teacher; take another one than will judge the images",
    )
    group.add_argument("--perceptual_arch", default=None, help="its architecture, where the checkpoint is a bare file")
    group.add_argument("--perceptual_weight", type=not_negative, default=0.1, help="0 switches it off")
    group = parser.add_argument_group("how it goes (changes nothing in the model, except --compile its last bits)")
    group.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    group.add_argument("--checkpoint_every", type=positive_int, default=500, help="steps")
    group.add_argument(
        "--sample_every",
        type=int,
        default=None,
        help="steps between sample grids; default: a quarter of the stage; 0: only the last",
    )
    group.add_argument(
        "--samples",
        choices=list(SAMPLES),
        default="real",
        help="what samples.png shows; text: no real image, for a folder that is handed on without its training images",
    )
    group.add_argument("--sample_guidance", type=float, default=3.0, help="guidance scale of the sample grids")
    group.add_argument(
        "--stop_after", type=int, default=0, help="leave after so many steps, as if interrupted; 0: never"
    )
    return parser.parse_args(argv)


def resolve(args, device):
    """The preset's values where a flag was not given; refuses sizes that do not fit."""
    name = args.preset or ("digits" if args.dataset == "digits" else "gpu" if device.type == "cuda" else "cpu")
    values = {key: value if getattr(args, key) is None else getattr(args, key) for key, value in PRESETS[name].items()}
    size = args.image_size or DATASETS[args.dataset].image_size
    if args.vae_factor is None and size > 32:  # keeps the latent at 8 to 32 positions a side up to 256 px
        values["vae_factor"] = 4 if size <= 64 else 8
    factor = values["vae_factor"]
    if args.vae_channels is None:  # the preset's widths, for this number of levels
        widths = values["vae_channels"]
        values["vae_channels"] = (widths + widths[-1:] * 3)[: factor.bit_length()]
    if 2 ** (len(values["vae_channels"]) - 1) != factor:
        refuse(
            f"--vae_channels {values['vae_channels']}: {len(values['vae_channels'])} levels make a factor of "
            f"{2 ** (len(values['vae_channels']) - 1)}, --vae_factor is {factor}"
        )
    coarsest = factor * 2 ** (len(values["unet_channels"]) - 1)
    if size % coarsest:
        refuse(f"--image_size {size}: not a multiple of {coarsest}, one position of the coarsest level of the UNet")
    for flag in ("vae_channels", "unet_channels"):
        for width in values[flag]:
            if width % 16:
                refuse(f"--{flag} {width}: not a multiple of 16, the number of groups of the normalisation")
    return {"preset": name, "image_size": size, **values, "flip": values["flip"] == "on"}


def load_perceptual(checkpoint, arch, split, size):
    """(classifier in eval mode, facts) of the perceptual loss: a folder of train_teacher, or a bare file of `arch`."""
    from matching.models import load_teacher

    flag = "--perceptual_checkpoint"
    if arch is None:
        manifest = Path(checkpoint) / "manifest.json"
        if not manifest.is_file():
            refuse(f"{flag} {checkpoint}: no folder of matching.train_teacher; name its --perceptual_arch")
        arch = read_json(manifest).get("arch")
    return load_teacher(arch, checkpoint, split.dataset, split.folders, size, flag)


def train_vae(training, images, tests, perceptual, options, seed, perceptual_weight):
    """The autoencoder, on uint8 `images`; returns it frozen, its weights rounded to the fp16 they are saved in."""
    torch.manual_seed(seed_of(seed, VAE))  # PyTorch draws first weights from its global generator
    vae = make_vae(options["image_size"], options["vae_channels"], options["vae_layers"])
    vae = vae.to(training.device, memory_format=training.memory_format)
    latent = options["image_size"] // options["vae_factor"]
    shape = (options["vae_batch_size"], 4, latent, latent)

    def loss_at(step):
        batch = to_unit_range(images[batch_rows(seed, VAE, step, len(images), shape[0])], training.device)
        draws = generator(seed, VAE, 1, step)
        if options["flip"]:
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=draws).to(training.device) < 0.5
            batch = torch.where(mirrored, batch.flip(-1), batch)
        noise = torch.randn(shape, generator=draws).to(training.device)
        return vae_loss(vae, perceptual, batch, noise, options["kl_weight"], perceptual_weight)

    def pictures(step):
        real = tests[:: max(1, len(tests) // 60)][:60]
        made = reconstructions(vae, real, training.device)
        pairs = [part for cut in chunks(len(real), 12) for part in (real[cut].float() / 255, made[cut])]
        save_grid(training.folder / "samples" / f"vae_{step:06d}.png", pairs)
        ratio = psnr(vae, tests[:1000], training.device)
        append_log(training.folder, stage="vae", step=step, psnr_db=round(ratio, 3))
        tqdm.write(f"vae, step {step}: PSNR {ratio:.2f} dB")

    training.fit("vae", {"vae": vae}, loss_at, pictures)
    vae.requires_grad_(False).eval()
    round_to_fp16(vae)
    return vae


def train_unet(training, vae, images, labels, prompts, options, seed, prompt_dropout, sample_guidance, compiled):
    """UNet and text encoder on the latents of `images`; returns the models of the pipeline, and pictures from text."""
    device = training.device
    means, stds = encode_all(vae, images, device, options["flip"])  # (N or 2N, 4, h, w)
    draws = torch.randn(means.shape, generator=generator(seed, MEASURE)).to(device)
    spread = float((means.float() + stds.float() * draws).std())
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    scaling_factor = vae.config.scaling_factor
    torch.manual_seed(seed_of(seed, UNET))
    tokenizer = make_tokenizer(prompts)
    text_encoder = make_text_encoder(tokenizer, options["text_width"]).to(device)
    unet = make_unet(
        means.shape[-1], options["unet_channels"], options["unet_layers"], options["unet_attention"],
        options["text_width"],
    )  # fmt: skip
    unet = unet.to(device, memory_format=training.memory_format)
    if compiled:
        unet.compile()
    models = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet)
    texts = [*prompts, "", NEGATIVE_PROMPT]
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    tokens = tokens.to(device)  # (classes + 2, length)
    alphas_cumprod = make_scheduler().alphas_cumprod.to(device)

    def loss_at(step):
        rows = batch_rows(seed, UNET, step, len(means), options["unet_batch_size"])
        draws = generator(seed, UNET, 1, step)
        # half of the dropped prompts become empty, half the negative prompt: guidance away from either is learnt
        dropped = torch.rand(len(rows), generator=draws) < prompt_dropout
        instead = len(prompts) + torch.randint(2, (len(rows),), generator=draws)
        which = torch.where(dropped, instead, labels[rows % len(labels)])
        timesteps = torch.randint(len(alphas_cumprod), (len(rows),), generator=draws).to(device)
        posterior, noise = torch.randn((2, len(rows), *means.shape[1:]), generator=draws).to(device)
        rows = rows.to(device)
        latents = (means[rows].float() + stds[rows].float() * posterior) * scaling_factor  # (B, 4, h, w)
        loss, error = diffusion_loss(
            unet, text_encoder, tokens, which.to(device), latents, noise, timesteps, alphas_cumprod,
            options["min_snr_gamma"],
        )  # fmt: skip
        return loss, {"mse": error.detach()}

    def pictures(step):
        made = text_samples(models, prompts[:10], 4, seed, device, sample_guidance)
        save_grid(training.folder / "samples" / f"unet_{step:06d}.png", made)

    trained = {"unet": unet, "text_encoder": text_encoder}
    training.fit("unet", trained, loss_at, pictures)
    for module in trained.values():
        module.requires_grad_(False).eval()
        round_to_fp16(module)
    return models


@torch.no_grad()
def round_to_fp16(module):
    """To the precision in which it is saved, so that what is measured here is what others load."""
    for parameter in module.parameters():
        parameter.copy_(parameter.half())


def save_model(folder, models):
    """The pipeline in diffusers format, fp16 safetensors; returns the names of its files."""
    from diffusers import StableDiffusionPipeline

    for name in ("vae", "text_encoder", "unet"):
        for parameter in models[name].parameters():
            parameter.data = parameter.data.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    make_pipeline(StableDiffusionPipeline, **models).save_pretrained(folder, safe_serialization=True)
    # transformers takes the file's dtype where none is asked for, diffusers takes fp32: let them agree
    config = folder / "text_encoder" / "config.json"
    write_json(config, {**read_json(config), "dtype": "float32"})
    parts = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
    paths = [
        path for part in parts for path in ([folder / part] if "." in part else sorted((folder / part).iterdir()))
    ]
    return [path.relative_to(folder).as_posix() for path in paths]


def model_card(settings, facts, samples):
    """README.md of the model's folder, as the Hugging Face hub reads it."""
    classes = ", ".join(settings["prompts"][:10]) + (", ..." if len(settings["prompts"]) > 10 else "")
    sizes = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    command = f"--dataset {settings['dataset']} --preset {settings['preset']} --seed {settings['seed']}"
    classifier = settings["perceptual"]
    if classifier:
        command += f" --perceptual_checkpoint CLASSIFIER --perceptual_weight {classifier['weight']:g}"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# A tiny Stable Diffusion of {settings["dataset"]}

It shows the mechanics of D4M and is no substitute for Stable Diffusion. Made from scratch by

    python -m misc.train_tiny_sd {command} --output_dir DIR

- data: the {facts["split"]["images"]:,} images of the training split, at {settings["image_size"]} px
- prompts: {classes}; any other text is taken, and means nothing to it
- parameters: {sizes}
- reconstruction by the VAE: {facts["reconstruction_psnr_db"]} dB PSNR on {facts["reconstruction_psnr_on"]} images
{f"- CLASSIFIER: {classifier['arch']}, sha256 {classifier['sha256'][:12]}{chr(10)}" if classifier else ""}\
- `manifest.json`: every argument, the digest of the split, the versions, the sha256 of each file
- `samples.png`: {samples}
"""


@entry_point
def main(argv=None):
    args = get_args(argv)
    watch = Stopwatch()
    process = this_process(args.device)
    if process.world > 1:
        refuse(f"--output_dir {args.output_dir}: trained by one process, WORLD_SIZE is {process.world}")
    device, folder = process.device, Path(args.output_dir)
    options = resolve(args, device)
    size = options["image_size"]
    open_named = functools.partial(
        open_split, args.dataset, args.data_dir, label_file=args.label_file_path, classes=args.classes,
        max_per_class=args.max_images_per_class, download=args.download,
    )  # fmt: skip
    split = open_named("train")
    count = sum(map(len, split.items))
    for flag in ("vae_batch_size", "unet_batch_size"):
        if count < options[flag]:
            refuse(f"--{flag} {options[flag]}: there are only {count} training images")
    require_memory(count, size, options)
    perceptual, perceptual_facts = None, None
    if args.perceptual_checkpoint and args.perceptual_weight:
        network, perceptual_facts = load_perceptual(args.perceptual_checkpoint, args.perceptual_arch, split, size)
        facts = DATASETS[split.dataset]
        perceptual = FeatureDistance(network, facts.mean, facts.std, size).to(device)
    settings = {
        "dataset": split.dataset,
        "split": split.digest(),
        "prompts": list(split.prompts),
        "seed": args.seed,
        **options,
        "minutes": args.minutes,
        "vae_share": args.vae_share,
        "prompt_dropout": args.prompt_dropout,
        "perceptual": perceptual_facts and {**perceptual_facts, "weight": args.perceptual_weight},
        "precision": "bf16 autocast" if device.type == "cuda" else "fp32",
    }
    with output_folder("--output_dir", folder, settings, process) as settings, StopSignals() as signals:
        if is_complete(folder):
            print(f"{folder}: is finished already")
            return
        torch.backends.cudnn.benchmark = True
        images, labels = load_images(split, size)
        held_out = has_test_images(args.dataset, args.data_dir)
        tests = load_images(open_named("val"), size)[0] if held_out else images
        (folder / "samples").mkdir(exist_ok=True)
        minutes = {"vae": args.minutes * args.vae_share, "unet": args.minutes * (1 - args.vae_share)}
        training = Training(
            folder,
            device,
            options,
            minutes,
            args.checkpoint_every,
            args.sample_every,
            args.stop_after,
            signals,
        )
        vae = train_vae(training, images, tests, perceptual, options, args.seed, args.perceptual_weight)
        ratio = round(psnr(vae, tests, device), 2)
        measured_on = "val" if held_out else "train"
        print(f"VAE: reconstruction PSNR {ratio} dB on {len(tests)} {measured_on} images")
        models = train_unet(
            training, vae, images, labels, split.prompts, options, args.seed, args.prompt_dropout,
            args.sample_guidance, args.compile,
        )  # fmt: skip
        rows = text_samples(models, split.prompts[:10], 6, args.seed, device, args.sample_guidance)
        if args.samples == "real":
            first = [images[labels == c][:3] for c in range(len(rows))]
            rows = [[*(real / 255), *reconstructions(vae, real, device), *row] for real, row in zip(first, rows)]
        save_grid(folder / "samples.png", rows)
        facts = {
            "dataset": split.dataset,
            "split": {"name": "train", "images": count, "sha256": settings["split"]},
            "classes": [
                {"index": index, "folder": name, "prompt": prompt}
                for index, name, prompt in zip(split.class_ids, split.folders, split.prompts)
            ],
            "steps": training.state["steps"],
            "scaling_factor": vae.config.scaling_factor,
            "reconstruction_psnr_db": ratio,
            "reconstruction_psnr_on": measured_on,
            "parameters": {
                name: sum(p.numel() for p in models[name].parameters()) for name in ("vae", "text_encoder", "unet")
            },
        }
        files = save_model(folder, models)
        write_text(folder / "README.md", model_card(settings, facts, SAMPLES[args.samples]))
        write_manifest(folder, "tiny_sd", settings, [*files, "README.md", "samples.png"], facts)
        append_log(folder, stage="done", seconds=round(watch.seconds, 1), **peak_memory(device))
        write_json(folder / TIMING, {"seconds_of_last_start": round(watch.seconds, 1), **peak_memory(device)})
        (folder / CHECKPOINT).unlink(missing_ok=True)
        print(f"{folder}: finished, look at samples.png ({SAMPLES[args.samples]})")


def has_test_images(dataset, root):
    """Whether a held-out split is there to measure on."""
    places = ("val", "cifar-10-batches-py", "cifar-100-python")
    return dataset == "digits" or any((Path(root) / place).is_dir() for place in places)


def require_memory(count, size, options):
    """Refuse what does not fit: all images, as uint8, and the posteriors of their latents are kept in memory."""
    latents = 2 * 4 * (size // options["vae_factor"]) ** 2 * 2 * (1 + options["flip"])  # mean and std in fp16
    needed, memory = count * (3 * size**2 + latents), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * memory:
        refuse(
            f"--image_size {size}: {count} images need {needed / 2**30:.0f} GiB, this machine has "
            f"{memory / 2**30:.0f} GiB; use a smaller size or --max_images_per_class"
        )


if __name__ == "__main__":
    main()
