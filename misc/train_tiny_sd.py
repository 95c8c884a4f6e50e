"""Train a small class-prompted Stable Diffusion from scratch, and save it in diffusers format.

    python -m misc.train_tiny_sd --dataset digits --seed 0 --output_dir output/models/tiny-sd-digits
    python -m misc.train_tiny_sd --dataset cifar10 --data_dir data/cifar10 --output_dir DIR

D4M needs a frozen latent diffusion model that knows the classes by their prompts (paper, section
3.1). Where Stable Diffusion v1-5 is too large, or cannot be had, this makes one of the same parts,
configured as v1-5 is; stock diffusers loads it. It is trained on the training split only: first the
VAE, then UNet and text encoder together on its latents.

The same command resumes, on a CPU to the same bytes as a run that was never stopped. `samples/`
shows how training goes; it is not part of the model.
"""

import functools
import io
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer

from distillation import datasets
from matching import images, models
from scripts import files, output, runtime
from scripts.runtime import Parser, generator, number, refuse

# the release's; guidance away from a text that training never showed would be arbitrary
NEGATIVE_PROMPT = "cartoon, anime, painting"
CHECKPOINT, INDEX = "checkpoint.pt", "model_index.json"
END = "</w>"  # of a word, in the tokenizer
VAE, UNET, MEASURE, SAMPLE = range(4)  # second number of the key of every random draw
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


@functools.lru_cache(maxsize=2)
def _permutation(seed, stage, epoch, count):
    return torch.randperm(count, generator=generator(seed, stage, 0, epoch))


def batch_rows(seed, stage, step, count, batch_size):
    """The rows of one step's batch: epochs without replacement; a remainder is left out."""
    epoch, i = divmod(step, count // batch_size)
    return _permutation(seed, stage, epoch, count)[i * batch_size : (i + 1) * batch_size]


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
    merges = learn_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
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
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


def make_text_encoder(tokenizer, width):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
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
    return CLIPTextModel(config)


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
    """v1-5's UNet in small; the prompt is also added to the time embedding.

    size        of the latent, positions per side
    attention   "inner": at all levels but the first; "middle": in the middle block only, which is
                twice as fast on a CPU

    With cross-attention alone, the classes are not learnt within minutes.
    """
    from diffusers import UNet2DConditionModel

    cross = "CrossAttn" if attention == "inner" else ""
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D", *[f"{cross}DownBlock2D"] * (len(channels) - 1)),
        up_block_types=(*[f"{cross}UpBlock2D"] * (len(channels) - 1), "UpBlock2D"),
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
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
    for network in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        network.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pipeline.save_pretrained(folder, safe_serialization=True)
        # transformers takes the file's dtype where none is asked for, diffusers fp32: they agree so
        config = folder / "text_encoder" / "config.json"
        config.write_text(files.json_text({**files.read_json(config), "dtype": "float32"}))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ---- training


class Training:
    """What both trainings share: the settings, one checkpoint file, stop signals, autocast.

    out          the Output of the model's folder;   settings   {flag: value}
    stop_after   leave after so many steps of this process, as if interrupted; 0: never
    """

    def __init__(self, out, device, settings, checkpoint_every, sample_every, stop_after):
        self.out, self.device, self.settings = out, device, settings
        self.checkpoint_every, self.sample_every = checkpoint_every, sample_every
        self.stop_after, self.steps_here = stop_after, 0
        cuda = device.type == "cuda"
        self.memory_format = torch.channels_last if cuda else torch.contiguous_format
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=cuda)
        # weights of finished trainings, number of steps of each, and the training at hand
        self.state, self.path = {"done": {}, "steps": {}, "current": None}, out.folder / CHECKPOINT
        if self.path.exists():
            self.state = torch.load(self.path, map_location="cpu", weights_only=True)

    def save(self):
        with files.atomic(self.path, self.out.tag) as temporary:
            torch.save(self.state, temporary)

    def fit(self, name, modules, loss_at, sample):
        """Minimise `loss_at(step) -> (loss, figures)` with AdamW, a warm-up and a cosine to 0.

        modules   a ModuleDict; on return it holds the moving average of its weights, rounded to
                  fp16, as they are saved: what is measured is what others load
        sample    called with the step, on averaged weights
        """
        from diffusers.training_utils import EMAModel

        lr, batch_size = self.settings[f"{name}_lr"], self.settings[f"{name}_batch_size"]
        parameters, start = list(modules.parameters()), 0
        optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-3)
        decay = self.settings["ema_decay"]
        ema = EMAModel(parameters, decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        if name in self.state["done"]:
            modules.load_state_dict(self.state["done"][name])
            return
        if self.state["current"]:
            start, *states = self.state["current"]
            for what, state in zip((modules, optimizer, ema), states):
                what.load_state_dict(state)
            ema.to(self.device)
        steps = self.number_of_steps(name, loss_at)
        warmup = min(100, steps // 10 + 1)
        sample_every = max(1, steps // 4) if self.sample_every is None else self.sample_every
        options = {"total": steps * batch_size, "initial": start * batch_size, "unit": "image"}
        with self.out.progress(desc=name, **options) as bar:
            for done in range(start + 1, steps + 1):
                cosine = np.cos(np.pi * max(0, done - 1 - warmup) / max(1, steps - warmup))
                for group in optimizer.param_groups:
                    group["lr"] = lr * float(min(done / warmup, 0.5 * (1 + cosine)))
                with self.autocast():
                    loss, figures = loss_at(done - 1)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                ema.step(parameters)
                bar.update(batch_size)
                if done % 50 == 0 or done == steps:
                    figures = {key: float(value) for key, value in figures.items()}
                    if not np.isfinite(list(figures.values())).all():
                        refuse(f"--{name}_lr {lr:g}: {name} diverged at step {done}: {figures}")
                    bar.set_postfix(figures)
                    self.out.log(network=name, step=done, **figures)
                if done < steps:
                    self.checkpoint(done, modules, optimizer, ema)
                    if sample_every and done % sample_every == 0:
                        ema.store(parameters)
                        ema.copy_to(parameters)
                        sample(done)
                        ema.restore(parameters)
        ema.copy_to(parameters)
        self.state["done"][name], self.state["current"] = modules.half_state_dict(), None
        self.save()
