"""Train a small class-prompted Stable Diffusion from scratch, and save it in diffusers format.

    python -m misc.train_tiny_sd --dataset digits --seed 0 --output_dir output/models/tiny-sd-digits
    python -m misc.train_tiny_sd --dataset cifar10 --data_dir data/cifar10 --output_dir DIR

D4M needs a frozen latent diffusion model that knows the classes by their prompts (paper, section
3.1). Where Stable Diffusion v1-5 is too large, or cannot be had, this makes one of the same parts;
stock diffusers loads it. It is trained on the training split only: first the VAE, then UNet and
text encoder together on its latents. The same command resumes, on a CPU to the same bytes as a run
that was never stopped. `samples/` shows how training goes; it is not part of the model.
"""

import functools
import io
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from distillation import datasets
from matching import images, models
from scripts import files, output, runtime
from scripts.runtime import Parser, generator, number, refuse

# the release's; guidance away from a text that training never showed would be arbitrary
NEGATIVE_PROMPT = "cartoon, anime, painting"
CHECKPOINT, INDEX = "checkpoint.pt", "model_index.json"
END = "</w>"  # of a word, in the tokenizer
VAE, UNET, MEASURE, SAMPLE = range(4)  # second number of the key of every random draw
TRAINED = ("vae", "text_encoder", "unet")
PRESETS = ("digits", "cpu", "gpu")
SAMPLES = {  # what samples.png shows
    "real": "one row per class: three real images, the same three through the VAE, six from text",
    "text": "six images from text, one row per class",
}


# ---- data


def load_images(split, size, num_workers=0):
    """All images of a split: (N, 3, size, size) uint8; (N,) their positions in split.folders."""
    pairs = [(c, item) for c, items in enumerate(split.items) for item in items]

    def read(pair):
        try:
            return np.asarray(datasets.squash(split.read(pair[1]), size))
        except datasets.BadImage as error:
            refuse(f"--data_dir: {error}")

    arrays = images.in_threads(read, pairs, num_workers, f"read {split.name}")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.tensor([c for c, _ in pairs])


def to_unit_range(pixels, device):
    """uint8 -> float32 in [-1, 1], what the VAE takes."""
    return pixels.to(device).float() / 127.5 - 1


def batch_rows(seed, stage, step, count, batch_size):
    """The rows of one step's batch: epochs without replacement; a remainder is left out."""
    epoch, i = divmod(step, count // batch_size)
    order = torch.randperm(count, generator=generator(seed, stage, 0, epoch))
    return order[i * batch_size : (i + 1) * batch_size]


# ---- the model


def make_tokenizer(prompts, length=16):
    """A CLIP tokenizer in which each word of `prompts` is one token; any other text becomes bytes.

    length   tokens per prompt, more if one of `prompts` needs more
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    corpus, words = [*prompts, NEGATIVE_PROMPT], set()
    splitter = CLIPTokenizer().backend_tokenizer
    for text in corpus:
        normal = splitter.normalizer.normalize_str(text)
        words |= {word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal)}
    merges, alphabet = learn_merges(words), sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(byte + END for byte in alphabet)]
    tokens += dict.fromkeys(a + b for a, b in merges)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    make = functools.partial(CLIPTokenizer, vocab=vocabulary, merges=merges)
    longest = max(len(make()(text).input_ids) for text in corpus)
    return make(model_max_length=min(max(length, longest), 77))


def learn_merges(words, limit=4096):
    """Byte-pair encoding of a set of words, up to whole words.

    The tokenizers library has this too, but the order of its merges differs from call to call.
    """
    spelt, merges = [[*word[:-1], word[-1] + END] for word in sorted(words)], []
    while len(merges) < limit:
        pairs = Counter(pair for symbols in spelt for pair in zip(symbols, symbols[1:]))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelt:
            for i in range(len(symbols)):
                if tuple(symbols[i : i + 2]) == best:
                    symbols[i : i + 2] = [best[0] + best[1]]
    return merges


def make_text_encoder(tokenizer, width):
    from transformers import CLIPTextConfig, CLIPTextModel

    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    sizes["max_position_embeddings"] = tokenizer.model_max_length
    ids = {name: getattr(tokenizer, name) for name in special}
    return CLIPTextModel(CLIPTextConfig(**sizes, **ids))


def make_vae(size, channels, layers=1):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=min(16, *channels),
        sample_size=size,
    )


def make_unet(size, text_width, channels, layers=1, attention="inner"):
    """v1-5's UNet in small, for latents of `size` positions per side; attention at all levels but
    the first ("inner"), or in the middle block only ("middle"), twice as fast on a CPU.

    The prompt is added to the time embedding too: else classes are not learnt within minutes.
    """
    from diffusers import UNet2DConditionModel

    cross, inner = "CrossAttn" if attention == "inner" else "", len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", *[f"{cross}DownBlock2D"] * inner),
        up_block_types=(*[f"{cross}UpBlock2D"] * inner, "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=min(16, *channels),
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_pipeline(vae, text_encoder, tokenizer, unet):
    """Text to image, with v1-5's scheduler: 50 steps at strength 0.7 call the UNet 36 times."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    parts["scheduler"] = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas)
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pipeline(seed=0, size=32, vae=(8, 8, 8), unet=(8, 16), text_width=16, length=32):
    """An untrained Stable Diffusion for tests; the same for the same seed.

    vae, unet   channels per level; the latent has size / 2 ** (len(vae) - 1) positions per side
    length      tokens per prompt; every prompt is spelt in bytes
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder, tokenizer = make_vae(size, vae), make_tokenizer([], length)
        text_encoder = make_text_encoder(tokenizer, text_width)
        denoiser = make_unet(size // 2 ** (len(vae) - 1), text_width, unet)
    return make_pipeline(autoencoder, text_encoder, tokenizer, denoiser)


def saved(pipeline):
    """{file name: bytes} of the pipeline in diffusers format, fp16 safetensors."""
    for name in TRAINED:
        getattr(pipeline, name).to("cpu", torch.float16, memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline.save_pretrained(folder, safe_serialization=True)
        # transformers takes the file's dtype where none is asked for, diffusers takes fp32
        config = folder / "text_encoder" / "config.json"
        config.write_text(files.json_text({**files.read_json(config), "dtype": "float32"}))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- training


class Trainer(NamedTuple):
    """How both networks are trained: where, with which settings, and how often to look or to save.

    stop_after   exit after so many steps, as if interrupted; 0: never
    """

    out: output.Output
    device: torch.device
    settings: dict
    checkpoint_every: int
    sample_every: int | None
    stop_after: int

    def fit(self, name, networks, loss_at, sample):
        """Minimise `loss_at(step) -> (loss, figures)` by AdamW, with a warm-up and a cosine to 0.

        networks   a ModuleDict; on return it holds the moving average of its weights, rounded to
                   the fp16 in which they are saved, so that what is measured is what others load
        sample     called with the step, on averaged weights
        Returns {name: steps} of all trainings so far.
        """
        from diffusers.training_utils import EMAModel

        cuda, path = self.device.type == "cuda", self.out.folder / CHECKPOINT
        layout = torch.channels_last if cuda else torch.contiguous_format
        weights = list(networks.to(self.device, memory_format=layout).parameters())
        loss_at = torch.autocast(self.device.type, torch.bfloat16, enabled=cuda)(loss_at)
        lr, batch_size = self.settings[f"{name}_lr"], self.settings[f"{name}_batch_size"]
        # {name: (its steps, those that are done, weights, optimizer, average)}; without the last
        # two when all are done
        state = torch.load(path, "cpu", weights_only=True) if path.exists() else {}
        steps, start, *before = state.get(name, (0, 0))
        if before:
            networks.load_state_dict(before[0])
        optimizer = torch.optim.AdamW(weights, lr, betas=(0.9, 0.99), weight_decay=1e-3)
        decay = self.settings["ema_decay"]
        ema = EMAModel(weights, decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        for part, was in zip((optimizer, ema), before[1:]):
            part.load_state_dict(was)
        ema.to(self.device)
        steps = steps or self.number_of_steps(name, loss_at)
        warmup, quarter = min(100, steps // 10 + 1), max(1, steps // 4)
        sample_every = quarter if self.sample_every is None else self.sample_every

        def save(done, *parts):
            state[name] = (steps, done, *(part.state_dict() for part in parts))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            self.out.write(CHECKPOINT, buffer.getvalue())

        options = {"total": steps * batch_size, "initial": start * batch_size, "unit": "image"}
        with self.out.progress(desc=name, **options) as bar:
            for done in range(start + 1, steps + 1):
                cosine = np.cos(np.pi * max(0, done - 1 - warmup) / max(1, steps - warmup))
                for group in optimizer.param_groups:
                    group["lr"] = lr * float(min(done / warmup, 0.5 * (1 + cosine)))
                loss, figures = loss_at(done - 1)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                ema.step(weights)
                bar.update(batch_size)
                if done % 50 == 0 or done == steps:
                    figures = {key: value.item() for key, value in figures.items()}
                    bar.set_postfix(figures)
                    self.out.log(network=name, step=done, **figures)
                    if not np.isfinite(list(figures.values())).all():
                        refuse(f"--{name}_lr {lr:g}: {name} diverged at step {done}: {figures}")
                if done == steps:
                    ema.copy_to(weights)
                    save(done, networks)
                    break
                stop = done - start == self.stop_after
                if done % self.checkpoint_every == 0 or stop or self.out.stop_signal:
                    save(done, networks, optimizer, ema)
                    self.out.leave_if_asked()
                if stop:
                    print(f"--stop_after {self.stop_after}: run the same command to go on")
                    raise SystemExit(runtime.EXIT_STOPPED)
                if sample_every and done % sample_every == 0:
                    ema.store(weights)
                    ema.copy_to(weights)
                    sample(done)
                    ema.restore(weights)
        for weight in networks.requires_grad_(False).eval().parameters():
            weight.copy_(weight.half())
        return {name: steps for name, (steps, *_) in state.items()}

    def number_of_steps(self, name, loss_at):
        """--{name}_steps, or what fits into its share of --minutes."""
        from torch.utils.benchmark import Timer

        share, minutes = self.settings["vae_share"], self.settings["minutes"]
        minutes *= share if name == "vae" else 1 - share
        if not minutes:
            return self.settings[f"{name}_steps"]
        step = Timer("loss_at(0)[0].backward()", globals={"loss_at": loss_at})
        # 1.1: the optimizer and the averages come on top; these gradients are thrown away
        return max(100, int(minutes * 60 / (1.1 * step.timeit(10).mean)))


# ---- the autoencoder


def feature_distance(network, mean, std):
    """Distance of images in a frozen classifier: its last convolution at its first three
    resolutions, which count alike; normalised over channels at each position, as LPIPS does.

    network     any classifier of (B, 3, H, W) normalised images
    mean, std   its normalisation of images in [0, 1]
    """
    from torchvision.transforms.functional import normalize

    features = {}
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # later layers replace earlier ones of their width
            layer.register_forward_hook(lambda _l, _in, x: features.update({x.shape[-1]: x}))

    def distance(decoded, pixels):  # (B, 3, H, W) in [-1, 1] -> a scalar
        network(normalize(torch.cat([decoded.float(), pixels]).add(1).div(2), mean, std))
        first = sorted(features, reverse=True)[:3]
        total = 0
        for width in first:
            ours, theirs = F.normalize(features[width].float(), dim=1).chunk(2)
            total = total + (ours - theirs).square().sum(1).mean()
        features.clear()
        return total / len(first)

    return distance


def train_vae(trainer, pixels, tests, perceptual):
    """The autoencoder of uint8 `pixels`: squared error + KL from N(0, 1), averaged over the latent,
    + `perceptual` distance. `tests` are only looked at."""
    settings, device, seed = trainer.settings, trainer.device, trainer.settings["seed"]
    # PyTorch draws first weights from its global generator
    torch.manual_seed(runtime.seed_of(seed, VAE))
    vae = make_vae(settings["image_size"], settings["vae_channels"], settings["vae_layers"])
    count, side = settings["vae_batch_size"], settings["image_size"] // settings["vae_factor"]

    def loss_at(step):
        rows, draws = batch_rows(seed, VAE, step, len(pixels), count), generator(seed, VAE, 1, step)
        batch = to_unit_range(pixels[rows], device)
        if settings["flip"] == "on":
            mirrored = torch.rand(count, 1, 1, 1, generator=draws).to(device) < 0.5
            batch = torch.where(mirrored, batch.flip(-1), batch)
        noise = torch.randn(count, 4, side, side, generator=draws).to(device)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample  # (B, 3, H, W)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        parts = {"mse": F.mse_loss(decoded.float(), batch)}
        parts["kl"] = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = parts["mse"] + settings["kl_weight"] * parts["kl"]
        if perceptual:
            parts["perceptual"] = perceptual(decoded, batch)
            loss = loss + settings["perceptual_weight"] * parts["perceptual"]
        return loss, parts

    def sample(step):
        real = tests[:: max(1, len(tests) // 60)][:60]
        pairs = torch.stack([real / 255, reconstructions(vae, real)], 1).flatten(0, 1)
        trainer.out.write(f"samples/vae_{step:06d}.png", png_grid(pairs, 12))

    trainer.fit("vae", torch.nn.ModuleDict({"vae": vae}), loss_at, sample)
    return vae


@torch.no_grad()
def reconstructions(vae, pixels):
    """uint8 -> the decoded means of their posteriors, (N, 3, H, W) in [0, 1]."""
    made = []
    for part in pixels.split(250):
        latents = vae.encode(to_unit_range(part, vae.device)).latent_dist.mean
        made.append(vae.decode(latents).sample.float().cpu() / 2 + 0.5)
    return torch.cat(made).clamp(0, 1)


# ---- UNet and text encoder


@torch.no_grad()
def encode_all(vae, pixels, flip):
    """Mean and std of all images' posteriors, then of mirrored ones: 2 x (N or 2N, 4, h, w) fp16.

    In the VAE's own memory layout, on which the last bits of the UNet's training depend.
    """
    parts, found = [*pixels.split(250), *(pixels.flip(-1).split(250) if flip else [])], []
    for part in runtime.progress(parts, desc="encode", unit="batch"):
        posterior = vae.encode(to_unit_range(part, vae.device)).latent_dist
        found.append((posterior.mean.half(), posterior.std.half()))
    return map(torch.cat, zip(*found))


def diffusion_loss(unet, text_encoder, tokens, which, latents, noise, timesteps, alphas, gamma):
    """Squared error of the predicted noise; with gamma > 0 times min(SNR, gamma) / SNR (Min-SNR,
    arXiv 2303.09556).

    tokens (T, length) all texts; which (B,) the text of each latent; latents, noise (B, 4, h, w);
    timesteps (B,); alphas (1000,) cumulative products   -> weighted loss, plain squared error
    """
    texts, which = torch.unique(which, return_inverse=True)
    embeddings = text_encoder(tokens[texts]).last_hidden_state[which]  # (B, length, width)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    predicted = unet(noised, timesteps, embeddings).sample.float()
    error = F.mse_loss(predicted, noise)
    if not gamma:
        return error, error
    snr = alphas[timesteps] / (1 - alphas[timesteps])  # (B,)
    by_image = (predicted - noise).square().mean((1, 2, 3))
    return (by_image * snr.clamp(max=gamma) / snr).mean(), error


def train_unet(trainer, vae, pixels, labels, prompts, compiled):
    """UNet and text encoder on the latents of `pixels` -> the pipeline, {network: its steps}."""
    settings, device, seed = trainer.settings, trainer.device, trainer.settings["seed"]
    means, stds = encode_all(vae, pixels, settings["flip"] == "on")
    draws = torch.randn(means.shape, generator=generator(seed, MEASURE)).to(device)
    spread = float((means.float() + stds.float() * draws).std())
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    torch.manual_seed(runtime.seed_of(seed, UNET))
    tokenizer = make_tokenizer(prompts)
    text_encoder = make_text_encoder(tokenizer, settings["text_width"])
    sizes = [settings[f"unet_{name}"] for name in ("channels", "layers", "attention")]
    unet = make_unet(means.shape[-1], settings["text_width"], *sizes)
    for parameter in unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    if compiled:
        unet.compile()
    pipeline = make_pipeline(vae, text_encoder, tokenizer, unet)
    texts = [*prompts, "", NEGATIVE_PROMPT]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    tokens = tokens.input_ids.to(device)  # (classes + 2, length)
    alphas, gamma = pipeline.scheduler.alphas_cumprod.to(device), settings["min_snr_gamma"]

    def loss_at(step):
        rows = batch_rows(seed, UNET, step, len(means), settings["unet_batch_size"])
        count, draws = len(rows), generator(seed, UNET, 1, step)
        # half of the dropped prompts become empty, half the negative prompt
        dropped = torch.rand(count, generator=draws) < settings["prompt_dropout"]
        instead = len(prompts) + torch.randint(2, (count,), generator=draws)
        which = torch.where(dropped, instead, labels[rows % len(labels)]).to(device)
        timesteps = torch.randint(len(alphas), (count,), generator=draws).to(device)
        posterior, noise = torch.randn((2, count, *means.shape[1:]), generator=draws).to(device)
        rows = rows.to(device)
        latents = means[rows].float() + stds[rows].float() * posterior  # (B, 4, h, w)
        known = (latents * vae.config.scaling_factor, noise, timesteps, alphas, gamma)
        loss, error = diffusion_loss(unet, text_encoder, tokens, which, *known)
        return loss, {"mse": error.detach()}

    def sample(step):
        made = text_samples(pipeline, prompts[:10], 4, seed, settings["sample_guidance"])
        trainer.out.write(f"samples/unet_{step:06d}.png", png_grid(made.flatten(0, 1), 4))

    trained = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    return pipeline, trainer.fit("unet", trained, loss_at, sample)


# ---- pictures


def png_grid(pictures, columns):
    """(N, 3, H, W) in [0, 1] -> the bytes of a PNG; small pictures are shown twice as large."""
    from torchvision.utils import make_grid

    if pictures.shape[-1] <= 64:
        pictures = pictures.repeat_interleave(2, -1).repeat_interleave(2, -2)
    sheet = make_grid(pictures.clamp(0, 1), columns, padding=2, pad_value=1)[:, 2:, 2:]
    file = io.BytesIO()
    Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def text_samples(pipeline, prompts, count, seed, guidance_scale):
    """Stock text-to-image, 50 steps: (len(prompts), count, 3, H, W) in [0, 1]."""
    draws = [generator(seed, SAMPLE, i) for i in range(len(prompts) * count)]
    options = {"guidance_scale": guidance_scale, "output_type": "pt"}
    kind = pipeline.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        made = pipeline(list(prompts), num_images_per_prompt=count, generator=draws, **options)
    return made.images.float().cpu().unflatten(0, (-1, count))


def final_samples(pipeline, pixels, labels, prompts, settings):
    """samples.png (see SAMPLES)."""
    made = text_samples(pipeline, prompts[:10], 6, settings["seed"], settings["sample_guidance"])
    if settings["samples"] == "text":
        return png_grid(made.flatten(0, 1), 6)
    real = [pixels[labels == c].repeat(3, 1, 1, 1)[:3] for c in range(len(made))]
    rows = [(r / 255, reconstructions(pipeline.vae, r), m) for r, m in zip(real, made)]
    return png_grid(torch.cat([part for row in rows for part in row]), 12)


def model_card(settings, facts):
    """README.md of the model's folder, as the Hugging Face hub reads it."""
    flags = " ".join(f"--{name} {settings[name]}" for name in ("dataset", "preset", "seed"))
    sizes = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    ratio = f"{facts['reconstruction_psnr_db']} dB PSNR on {facts['reconstruction_psnr_on']} images"
    prompts = ", ".join([c["prompt"] for c in facts["classes"]][:10])
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
---
# A tiny Stable Diffusion of {facts["dataset"]}

It shows the mechanics of D4M and is no substitute for Stable Diffusion. Made from scratch by

    python -m misc.train_tiny_sd {flags} --output_dir DIR

- data: {facts["split"]["images"]:,} images of the training split, {settings["image_size"]} px
- its first prompts: {prompts}; other text is accepted, and means nothing to it
- parameters: {sizes}; reconstruction by the VAE: {ratio}
- `manifest.json`: every argument, the digest of the split, the versions, the sha256 of each file
- `samples.png`: {SAMPLES[settings["samples"]]}
"""


# ---- flags


def by_preset(*values):
    """A default that depends on --preset: one value for each of PRESETS."""
    return lambda args: values[PRESETS.index(args.preset)]


def _preset(args):
    cuda = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "digits" if args.dataset == "digits" else "gpu" if cuda else "cpu"


def _factor(args):
    """Keeps the latent at 8 to 32 positions per side up to 256 px."""
    return by_preset(4, 2, 2)(args) if args.image_size <= 32 else 4 if args.image_size <= 64 else 8


def _vae_channels(args):
    """The preset's widths, for as many levels as the factor needs."""
    widths = by_preset([16, 16, 32], [32, 32], [64, 128])(args)
    return (widths + widths[-1:] * 3)[: args.vae_factor.bit_length()]


def get_args(argv=None):
    parser = Parser("misc.train_tiny_sd", __doc__)
    setting, flag = parser.setting, parser.flag
    count, rate, share = number(int, 1), number(float, above=0), number(float, 0, 1)
    natural, weight, decay = number(int, 0), number(float, 0), number(float, 0, below=1)
    flag("--output_dir", required=True, help="the model's folder")
    setting("--seed", type=natural, default=0)
    datasets.add_dataset_flags(parser)
    parser.set_defaults(dataset="digits")
    own_size = lambda args: datasets.ALL[args.dataset].image_size  # noqa: E731
    setting("--image_size", type=count, default=own_size, help="pixels [the data set's]")
    parser.heading("size and length; the default of all of them is the preset's")
    setting("--preset", choices=PRESETS, default=_preset, help="for 5, 60 and 20 minutes")
    setting("--vae_factor", type=int, choices=[1, 2, 4, 8], default=_factor, help="of its latents")
    setting("--vae_channels", type=count, nargs="+", default=_vae_channels, help="one per level")
    setting("--vae_layers", type=count, default=by_preset(1, 1, 2))
    widths = by_preset([32, 64], [32, 64, 128], [128, 256, 256])
    setting("--unet_channels", type=count, nargs="+", default=widths, help="multiples of 16")
    setting("--unet_layers", type=count, default=by_preset(1, 1, 2))
    where = by_preset("middle", "middle", "inner")
    setting("--unet_attention", choices=["inner", "middle"], default=where, help="in which blocks")
    setting("--text_width", type=count, default=by_preset(64, 64, 128))
    setting("--vae_steps", type=count, default=by_preset(500, 6000, 8000))
    setting("--unet_steps", type=count, default=by_preset(1200, 10500, 28000))
    setting("--minutes", type=weight, default=0, help="sets the steps to fit into this; 0: off")
    setting("--vae_share", type=share, default=0.3, help="the VAE's share of --minutes")
    setting("--vae_batch_size", type=count, default=by_preset(32, 16, 256))
    setting("--unet_batch_size", type=count, default=by_preset(64, 64, 256))
    setting("--vae_lr", type=rate, default=by_preset(4e-3, 4e-3, 1e-3))
    setting("--unet_lr", type=rate, default=by_preset(2e-3, 1e-3, 5e-4))
    setting("--ema_decay", type=decay, default=by_preset(0.995, 0.999, 0.9995))
    setting("--flip", choices=["on", "off"], default=by_preset("off", "on", "on"))
    setting("--kl_weight", type=weight, default=1e-5, help="of the KL averaged over a latent")
    setting("--min_snr_gamma", type=weight, default=by_preset(0.0, 5.0, 5.0), help="0: off")
    setting("--prompt_dropout", type=share, default=0.1, help="empty or negative prompts instead")
    parser.heading("perceptual loss of the VAE")
    flag("--perceptual_checkpoint", help="of train_teacher; not who will judge the images")
    flag("--perceptual_arch", help="its architecture, where the checkpoint is a bare file")
    setting("--perceptual_weight", type=weight, default=0.1, help="0 switches it off")
    parser.heading("how it runs")
    setting("--compile", action="store_true", default=False, help="torch.compile the UNet")
    setting("--samples", choices=list(SAMPLES), default="real", help="text: shows no real image")
    setting("--sample_guidance", type=number(float), default=3.0, help="guidance scale of samples")
    flag("--sample_every", type=natural, help="steps; 0: never [a quarter of the training]")
    flag("--checkpoint_every", type=count, default=500, help="steps")
    flag("--stop_after", type=natural, default=0, help="exit after so many steps; 0: never")
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


def check_sizes(settings, count):
    """Refuse networks that do not fit the images; count: training images."""
    size, factor, widths = (settings[n] for n in ("image_size", "vae_factor", "vae_channels"))
    made, coarsest = 2 ** (len(widths) - 1), factor * 2 ** (len(settings["unet_channels"]) - 1)
    if made != factor:
        refuse(f"--vae_channels {widths}: makes a factor of {made}, --vae_factor is {factor}")
    if size % coarsest:
        refuse(f"--image_size {size}: not a multiple of {coarsest}, the UNet's coarsest position")
    for name in ("vae", "unet"):
        for width in settings[f"{name}_channels"]:
            if width % 16:
                refuse(
                    f"--{name}_channels {width}: not a multiple of 16, the normalisation's groups"
                )
        most = settings[f"{name}_batch_size"]
        if count < most:
            refuse(f"--{name}_batch_size {most}: there are only {count} training images")


def load_perceptual(checkpoint, arch, split, size, device):
    """(distance of images, facts) by a folder of train_teacher, or a bare file of `arch`."""
    flag = "--perceptual_checkpoint"
    arch = arch or output.read_manifest(flag, checkpoint, "teacher")["arguments"]["arch"]
    network, facts = models.load_teacher(arch, checkpoint, split.dataset, split.folders, size, flag)
    data = datasets.ALL[split.dataset]
    return feature_distance(network.to(device), data.mean, data.std), facts


@runtime.entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    if process.world > 1:
        refuse(f"--output_dir {args.output_dir}: trained by one process, not {process.world}")
    settings, size, root = args.settings, args.image_size, args.data_dir
    chosen = (args.label_file_path, args.classes, args.max_images_per_class, args.download)
    open_named = functools.partial(datasets.open_split, args.dataset, root)
    split = open_named("train", *chosen)
    check_sizes(settings, split.count)
    sizes = [settings[f"unet_{name}"] for name in ("channels", "layers", "attention")]
    with torch.device("meta"):  # fp32: weights, their average and AdamW's two moments
        needed = 16 * models.count_parameters(make_unet(8, args.text_width, *sizes))
    perceptual, classifier = None, None
    if args.perceptual_checkpoint and args.perceptual_weight:
        waits = output.awaited(args.perceptual_checkpoint, "matching.train_teacher")
        if waits and args.dry_run:
            return output.plan(args.output_dir, 0, 1, needed, waits)
        teacher = (args.perceptual_checkpoint, args.perceptual_arch)
        perceptual, classifier = load_perceptual(*teacher, split, size, process.device)
    inputs = {"images": split.digest(), "prompts": list(split.prompts), "perceptual": classifier}
    inputs["precision"] = "bf16 autocast" if process.device.type == "cuda" else "fp32"
    where = ("--output_dir", args.output_dir, "", "tiny_sd")
    with output.Output(*where, settings, inputs, process, together=True) as out:
        out.todo([INDEX], lambda name: [name], needed)
        if out.complete:
            print(f"{out.folder}: is finished already")
            return
        torch.backends.cudnn.benchmark = True
        pixels, labels = load_images(split, size, args.num_workers)
        places = ("val", "cifar-10-batches-py", "cifar-100-python")
        # None: the images need no folder
        held_out = root is None or any((Path(root) / place).is_dir() for place in places)
        tests = pixels
        if held_out:
            tests, _ = load_images(open_named("val", *chosen), size, args.num_workers)
        every = (args.checkpoint_every, args.sample_every, args.stop_after)
        trainer = Trainer(out, process.device, settings, *every)
        vae = train_vae(trainer, pixels, tests, perceptual)
        error = (reconstructions(vae, tests) - tests / 255).square().mean((1, 2, 3)).clamp(1e-10)
        pipeline, steps = train_unet(trainer, vae, pixels, labels, split.prompts, args.compile)
        facts = {
            "dataset": split.dataset,
            "split": {"name": "train", "images": split.count, "sha256": inputs["images"]},
            "classes": datasets.class_table(split),
            "steps": steps,
            "scaling_factor": vae.config.scaling_factor,
            "reconstruction_psnr_db": round(float((-10 * error.log10()).mean()), 2),
            "reconstruction_psnr_on": "val" if held_out else "train",
            "parameters": {n: models.count_parameters(getattr(pipeline, n)) for n in TRAINED},
        }
        made = {"samples.png": final_samples(pipeline, pixels, labels, split.prompts, settings)}
        made |= {"README.md": model_card(settings, facts), **saved(pipeline)}
        out.write(INDEX, made.pop(INDEX))
        out.made = 1
        out.finish(facts, {name: lambda data=data: data for name, data in made.items()}, "models")
        (out.folder / CHECKPOINT).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
