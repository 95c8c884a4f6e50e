"""The families of generators, one class each: all that is known of what a checkpoint is made of.

A family says what of its checkpoints works (`WORKS`), what it takes for a class (`CONDITION`) and
how its stock img2img is called. `StableDiffusion` does all for models that are prompted; the
others differ from it in a few lines.
"""

import contextlib
import logging
import math
from functools import lru_cache
from pathlib import Path

import torch

from scripts import checkpoints, samplers
from scripts.checkpoints import config_hash, weights_hash
from scripts.runtime import refuse

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# {setting of a configuration: values that work, the default first}
VAE = {"_class_name": ("AutoencoderKL",), "latent_channels": (4,), "shift_factor": (None, 0)}
VAE |= dict.fromkeys(("latents_mean", "latents_std"), (None,))
VAE["scaling_factor"] = (0.18215, int, float)
SIZE = {"sample_size": (None, int, list)}
UNET = {"_class_name": ("UNet2DConditionModel",), **SIZE}
UNET |= dict.fromkeys(("in_channels", "out_channels"), (4,))
UNET |= dict.fromkeys(("class_embed_type", "num_class_embeds"), (None,))


def _is_not_of_a_long_prompt(record):
    known = "The following part of your input was truncated", "Token indices sequence length"
    return not str(record.msg).startswith(known)  # of which `unread` tells


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x behind the verbs of a generator.

    facts         {"model", "revision", "precision", "vae_sha256", ...}: what manifests say of it
    channels      of its latents
    most_steps    of the schedule that it was trained with (not with part="encoder")
    native_size   of the images that it was trained with, in pixels; None: it does not say
    Weights are hashed in fp32, before they are cast: one checkpoint has one hash in every
    precision. Raises whatever the libraries raise, and ValueError.
    """

    TITLE = "Stable Diffusion 1.x and 2.x"
    CONDITION = "prompt"  # or "imagenet": a class's place among ImageNet-1K's
    NOISE_LEVEL = "schedule"  # the default: see samplers.find_start
    ONE_SIZE = False  # whether it makes no other size than the native one
    # {part: what of its configuration works}
    WORKS = {
        "vae": VAE,
        "unet": {**UNET, "addition_embed_type": (None, "text")},
        "text_encoder": {"_class_name": ("CLIPTextModel",)},
        "scheduler": samplers.SAMPLER,
    }
    DENOISER = "unet"
    PIPELINE = "StableDiffusionLatents2ImgPipeline"
    NONE = ("safety_checker", "feature_extractor")  # parts that are not needed
    OPTIONS = {"requires_safety_checker": False}
    EMBEDS = ("prompt_embeds",)  # of what encode_prompt returns, what denoising takes
    PROMPTS = {}  # other prompts of encode_prompt
    READS = {}  # {tokenizer: how many of its tokens are read, where it would give more}
    LICENCE = None

    def __init__(self, checkpoint, device, precision, part="all", **how):
        import diffusers
        import transformers

        from scripts import pipeline_stable_diffusion_gen_latents as gen_latents

        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()  # of a second, a line in a log
            logging.getLogger(library.__name__).handlers[0].addFilter(_is_not_of_a_long_prompt)
        configs = {name: config for name, config in how["configs"].items() if config is not None}
        self._check_widths(configs)
        self.native_size = checkpoints.native_size(configs[self.DENOISER], configs["vae"])
        self.patch = configs[self.DENOISER].get("patch_size", 1)
        tokenizers = {n: n.replace("text_encoder", "tokenizer") for n in self.WORKS if "text" in n}
        self.tokenizers = [words for name, words in tokenizers.items() if name in configs]
        wanted = [name for name in configs if name != "scheduler"] if part == "all" else ["vae"]
        taken = {*configs, *self.tokenizers} if part == "all" else {"vae"}
        absent = [name for name in (*self.WORKS, *tokenizers.values()) if name not in taken]
        classes = {name: self.WORKS[name]["_class_name"][0] for name in wanted}
        networks = {
            name: getattr(diffusers, cls, None) or getattr(transformers, cls)
            for name, cls in classes.items()
        }
        others = dict.fromkeys((*absent, *self.NONE)) | self.OPTIONS
        if how.get("safety_checker") == "on":
            if "safety_checker" not in others:
                raise ValueError(f"{self.TITLE} has no safety checker")
            from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

            networks["safety_checker"] = StableDiffusionSafetyChecker
            others = {n: p for n, p in others.items() if n not in self.NONE}
        self.pipeline = checkpoints.pipeline(self._pipeline(), checkpoint, networks, others, how)
        self.pipeline.set_progress_bar_config(disable=True)
        parts = self.pipeline.components
        self.networks = {n: p for n, p in parts.items() if isinstance(p, torch.nn.Module)}
        self._check(networks)
        vae, denoiser = self.networks["vae"], self.networks.get(self.DENOISER)
        self.channels = vae.config.latent_channels
        only_vae = (vae, *[None] * 6, None, False)
        self.encoder = gen_latents.StableDiffusionGenLatentsPipeline(*only_vae)
        name = Path(checkpoint).name if Path(checkpoint).exists() else checkpoint
        self.facts = {"model": name, "revision": how.get("revision"), "precision": precision}
        self.facts |= {"licence": self.LICENCE} if self.LICENCE else {}
        self.facts |= {f"{name}_sha256": weights_hash(p) for name, p in self.networks.items()}
        if part == "all":
            weight = how.get("guide_weight") if how.get("guide") == "mode" else None
            self._set_scheduler(how.get("scheduler", "own"), weight)
            for name in ("scheduler", *self.tokenizers):
                self.facts[f"{name}_sha256"] = config_hash(self.pipeline.components[name])
        self.device, self.dtype, self.offload = device, DTYPES[precision], how.get("offload")
        self._cast(self.dtype)
        if how.get("channels_last"):
            for network in filter(None, (vae, denoiser)):
                network.to(memory_format=torch.channels_last)
        if how.get("compile"):
            for module in filter(None, (vae.encoder, vae.decoder, denoiser)):
                module.compile()
        if self.offload:
            self.pipeline.enable_model_cpu_offload(device=device)
        # differs from the release: text is encoded once per class, not once per image
        self.condition = lru_cache(maxsize=64)(self._condition)

    def _pipeline(self):
        """The class of stage 2's pipeline."""
        from scripts import pipeline_stable_diffusion_latents2img as latents2img

        return getattr(latents2img, self.PIPELINE)

    def _check_widths(self, configs):
        """Raises ValueError if the raw configurations are not of one model."""
        takes, gives = self._widths(configs)
        if takes != gives:
            part = self.DENOISER
            raise ValueError(
                f"its {part} takes texts of width {takes}, its text_encoder has {gives}"
            )

    def _widths(self, configs):
        """What the denoiser takes, what the text encoders give."""
        takes, text = configs["unet"].get("cross_attention_dim", 1280), configs["text_encoder"]
        return takes, text.get("hidden_size", 512)

    def _check(self, wanted):
        """Raises ValueError for what would give wrong results in silence."""
        pipe, factor = self.pipeline, self.pipeline.vae.config.scaling_factor
        if not 0 < factor < math.inf:
            raise ValueError(f"the scaling factor of its VAE is {factor}, expected above 0")
        for name in wanted:
            if name not in self.networks:
                raise ValueError(f"it has no {name}")
            lacking = [n for n, p in self.networks[name].named_parameters() if p.is_meta]
            checkpoints.check_whole(name, lacking)
            for weight, tensor in self.networks[name].named_parameters():
                some = tensor.detach().flatten()[:4096]  # of integers: noise without their scales
                if tensor.ndim > 1 and some.abs().max() > 1 and torch.equal(some, some.round()):
                    raise ValueError(f"its {name} holds integers as weights, first {weight}")
        for name in self.tokenizers if self.DENOISER in wanted else ():
            # transformers makes a tokenizer up if its file is not there
            encoder = name.replace("tokenizer", "text_encoder")
            words, config = len(getattr(pipe, name).get_vocab()), getattr(pipe, encoder).config
            expected = config.vocab_size
            padded = -(-words // 128) * 128 if config.model_type == "t5" else words
            if expected not in (words, padded):
                raise ValueError(f"its {name} has {words} words, its {encoder} {expected}")
            length = getattr(pipe, name).model_max_length
            if length > (most := getattr(config, "max_position_embeddings", math.inf)):  # not T5's
                what = f"its {name} has model_max_length {length:g}"
                raise ValueError(f"{what}, its {encoder} takes {most}")

    def _set_scheduler(self, name, guide_weight):
        """--scheduler and --guide: its own, or another with its schedule of noise."""
        own, works = self.pipeline.scheduler, self.WORKS["scheduler"]
        checkpoints.check_settings("scheduler", own.config, works)  # with its defaults
        samplers.check_schedule(own)
        self.most_steps = own.config.num_train_timesteps
        if own.config.get("original_inference_steps"):  # LCM, TCD
            self.most_steps = min(self.most_steps, own.config.original_inference_steps)
        if name != "own" or guide_weight is not None:
            self.pipeline.scheduler = samplers.replaced(own, name, works, guide_weight)

    def _cast(self, dtype):
        device = None if self.offload else self.device  # None: where it is
        for name, network in self.networks.items():
            kept = name == "vae" and self._vae_in_fp32(network)
            of_fp16 = dtype == torch.float16 and getattr(network, "_keep_in_fp32_modules", None)
            named = network.named_modules() if of_fp16 else ()
            exact = [module for part, module in named if part.rsplit(".", 1)[-1] in of_fp16]
            weights = [module.state_dict() for module in exact]
            torch.nn.Module.to(network, device=device, dtype=torch.float32 if kept else dtype)
            for module, state in zip(exact, weights):  # T5's overflow otherwise
                module.float().load_state_dict(state)

    def _vae_in_fp32(self, vae):
        return False

    @contextlib.contextmanager
    def in_fp32(self):
        """Inside, all networks compute in fp32."""
        self._cast(torch.float32)
        yield
        self._cast(self.dtype)

    def latent_shape(self, size):
        """(channels, h, w) of the latent of a square image of `size` pixels."""
        factor = self.encoder.vae_scale_factor
        if size % (factor * self.patch):  # diffusers would resize once more, in silence
            refuse(f"--size {size}: this checkpoint needs a multiple of {factor * self.patch}")
        if self.ONE_SIZE and size != self.native_size:
            refuse(f"--size {size}: this checkpoint makes images of {self.native_size} px only")
        return (self.channels, size // factor, size // factor)

    def encode(self, images, draws):
        """(B, 3, S, S) uint8 -> latents (B, c, h, w); image i's noise comes from draws[i]."""
        return self.encoder(images.to(self.device, non_blocking=True) / 255, draws)

    def unread(self, prompt):
        """The end of a prompt that no text encoder reads; "" if one of them reads all of it."""
        how, found = {"truncation": True, "return_overflowing_tokens": True}, []
        for name in self.tokenizers:
            words = self.pipeline.components[name]
            # in pieces of the longest length
            _, *rest = words(prompt, max_length=self.READS.get(name), **how).input_ids
            rest = [words.decode(piece, skip_special_tokens=True) for piece in rest]
            found.append(" ".join(rest).strip())
        return min(found, key=len, default="")

    @torch.no_grad()
    def _condition(self, prompt):
        """`condition`: what `denoise` takes for one prompt: the EMBEDS, (1, ..., width) each."""
        how = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, **self.PROMPTS}
        found = self.pipeline.encode_prompt(prompt=prompt, device=self.device, **how)
        return found[::2]  # those between are the negative ones, None

    def start(self, strength, steps, noise_level=None):
        """The samplers.Start of `denoise` at this strength; None if no step is left."""
        level = noise_level or self.NOISE_LEVEL
        return samplers.find_start(self.pipeline, steps, strength, level)

    def denoise(
        self, latents, conditions, negative, draws, strength, guidance_scale, steps, modes=None
    ):
        """z_t = sqrt(a_t) z + sqrt(1 - a_t) e at t = strength * T; then the sampler's steps with
        classifier-free guidance, all by stock img2img (paper, section 3).   (B, c, h, w) latents

        conditions    of `condition`, one per latent
        negative      of `condition`, one for all
        draws         one torch.Generator per latent
        modes         of --guide mode: (B, c, h, w) prototypes, drawn to from `latents` of noise
        """
        if modes is not None:
            self.pipeline.scheduler.modes = modes.to(self.device)
        return self.pipeline(
            latents=latents,
            generator=draws,
            strength=strength,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            output_type="latent",
            **self._conditioning(conditions, negative),
        ).images

    def _conditioning(self, conditions, negative):
        """What the pipeline is told of the classes."""
        dtype, told = self.networks[self.DENOISER].dtype, {}
        for name, rows, none in zip(self.EMBEDS, zip(*conditions), negative):
            told[name] = torch.cat(rows).to(dtype)
            told[f"negative_{name}"] = none.to(dtype).expand_as(told[name])
        return told

    @torch.no_grad()
    def decode(self, latents, check=True):
        """Latents (B, c, h, w) -> images (B, 3, H, W) in [0, 1].

        check   blacken what the safety checker flags, if it was loaded
        """
        images = self.pipeline.decode(latents)
        if check and getattr(self.pipeline, "safety_checker", None) is not None:
            pixels = images * 2 - 1
            _, flagged = self.pipeline.run_safety_checker(pixels, self.device, images.dtype)
            images[torch.tensor(flagged)] = 0
        self.pipeline.maybe_free_model_hooks()  # --offload: make room for the denoiser
        return images


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL and its fine-tunes: two text encoders, pooled embeddings, sizes.

    It is told that the picture has the size of the latents and was not cropped, as stock does.
    """

    TITLE, NOISE_LEVEL = "Stable Diffusion XL (without its refiner)", "paper"
    WORKS = {
        "vae": VAE,
        "unet": {**UNET, "addition_embed_type": ("text_time",)},
        "text_encoder": {"_class_name": ("CLIPTextModel",)},
        "text_encoder_2": {"_class_name": ("CLIPTextModelWithProjection",)},
        "scheduler": samplers.UNCLIPPED,
    }
    PIPELINE = "StableDiffusionXLLatents2ImgPipeline"
    NONE, OPTIONS = ("image_encoder", "feature_extractor"), {"add_watermarker": False}
    EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")

    def _widths(self, configs):
        unet, one, two = (configs[n] for n in ("unet", "text_encoder", "text_encoder_2"))
        takes = unet.get("cross_attention_dim"), unet.get("projection_class_embeddings_input_dim")
        sizes = 6 * (unet.get("addition_time_embed_dim") or 0)  # original, crop, target
        width = sum(part.get("hidden_size", 512) for part in (one, two))
        return takes, (width, two.get("projection_dim", 512) + sizes)

    def _vae_in_fp32(self, vae):
        return vae.config.force_upcast  # it overflows in fp16; "fp16-fix" VAEs do not ask for it


class StableDiffusion3(StableDiffusion):
    """Stable Diffusion 3.x, by flow matching: 16 channels, a transformer; T5 where it is there."""

    TITLE, NOISE_LEVEL = "Stable Diffusion 3.x", "paper"
    WORKS = {
        "vae": {n: works for n, works in VAE.items() if n != "shift_factor"}
        | {"latent_channels": (16,)},
        "transformer": {
            "_class_name": ("SD3Transformer2DModel",),
            **dict.fromkeys(("in_channels", "out_channels"), (16,)),
            **SIZE,
        },
        "text_encoder": {"_class_name": ("CLIPTextModelWithProjection",)},
        "text_encoder_2": {"_class_name": ("CLIPTextModelWithProjection",)},
        "text_encoder_3": {"_class_name": ("T5EncoderModel", None)},
        "scheduler": samplers.FLOW,
    }
    DENOISER, PIPELINE = "transformer", "StableDiffusion3Latents2ImgPipeline"
    NONE, OPTIONS = ("image_encoder", "feature_extractor"), {}
    EMBEDS = ("prompt_embeds", "pooled_prompt_embeds")
    PROMPTS = {"prompt_2": None, "prompt_3": None}  # None: the same
    READS = {"tokenizer_3": 256}  # by default, though T5 could read more

    def _widths(self, configs):
        transformer, one, two = (
            configs[n] for n in ("transformer", "text_encoder", "text_encoder_2")
        )
        takes = transformer.get("joint_attention_dim"), transformer.get("pooled_projection_dim")
        width = configs.get("text_encoder_3", {}).get(
            "d_model", takes[0]
        )  # CLIP's are padded to it
        return takes, (width, sum(part.get("projection_dim", 512) for part in (one, two)))


class DiT(StableDiffusion):
    """DiT-XL/2 and its like: classes of ImageNet-1K instead of prompts, guided by the null class.

    Guidance is diffusers': of all channels; the authors' code guides three of the four.
    """

    TITLE, CONDITION, NOISE_LEVEL, ONE_SIZE = "DiT", "imagenet", "paper", True
    WORKS = {
        "vae": VAE,
        "transformer": {
            "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
            "in_channels": (4,),
            "out_channels": (None, 4, 8),
            "num_embeds_ada_norm": (1000,),
            "norm_type": ("ada_norm_zero",),
            **SIZE,
        },
        "scheduler": samplers.UNCLIPPED,
    }
    DENOISER, NONE, OPTIONS = "transformer", (), {"id2label": None}  # names, never asked
    LICENCE = "the published DiT weights: CC BY-NC 4.0"

    def _pipeline(self):
        from scripts.pipeline_dit_latents2img import DiTLatents2ImgPipeline

        return DiTLatents2ImgPipeline

    def _check_widths(self, configs):
        pass  # no texts

    def _condition(self, place):
        """`condition`: of a class's place among ImageNet-1K's 1000; None: the null class."""
        return 1000 if place is None else place

    def _conditioning(self, conditions, negative):
        return {"class_labels": conditions, "null_label": negative}
