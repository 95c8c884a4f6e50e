"""Image generators: what stages 1 and 2 ask of a diffusion model; Stable Diffusion is the first.

    model = load("stable-diffusion-v1-5/stable-diffusion-v1-5", device, "fp16")
    latents = model.encode(images, draws)                                  # stage 1
    latents = model.denoise(latents, conditions, negative, draws, ...)     # stage 2
    images = model.decode(latents)

Another family is one class with the public names of `StableDiffusion` and one entry of `FAMILIES`.
What of a family works stands in its table `WORKS`; a checkpoint's configurations are held against
it before any weights are read.
Nothing outside this file and the two pipelines knows what a family is made of.
"""

import contextlib
import hashlib
import json
import math
import re
from functools import lru_cache
from pathlib import Path

import torch

from scripts.runtime import one_line, reason_of, refuse, warn

DEFAULT_CHECKPOINT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SETTINGS = ("dtype", "channels_last", "compile")
# the flags that `load` takes under their own names
FLAGS = (*SETTINGS, "revision", "variant", "single_file_config", "safety_checker")

# what stock img2img draws right from: given the exact noise it starts at t = strength * T and ends
# at the clean latent (tests/test_generators.py); flow matching, EDM, consistency models do not
SAMPLERS = """PNDM DDIM DDIMParallel DDPM DDPMParallel EulerDiscrete EulerAncestralDiscrete LCM TCD
    HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DEISMultistep DPMSolverMultistep LMSDiscrete
    DPMSolverSinglestep UniPCMultistep SASolver"""
NEVER = "thresholding use_flow_sigmas use_beta_sigmas use_exponential_sigmas use_lu_lambdas"
SAMPLER = {
    "_class_name": tuple(f"{name}Scheduler" for name in SAMPLERS.split()),
    "prediction_type": ("epsilon", "v_prediction"),
    "interpolation_type": ("linear",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "skip_prk_steps": (True,),
    **dict.fromkeys(NEVER.split(), (None, False)),
}


def add_generator_flags(parser):
    """The flags that say which generator is used, and in which precision."""
    parser.heading("generator")
    path = "a hub id, a folder in diffusers format, or a single .safetensors file"
    parser.flag("--diffusion_checkpoints_path", default=DEFAULT_CHECKPOINT, help=path)
    parser.flag("--revision", help="a branch, tag or commit of the hub id")
    offline = "for a single file without internet: a folder that holds its configuration"
    parser.flag("--single_file_config", metavar="DIR", help=offline)
    parser.flag("--variant", help="load weight files of this variant, such as fp16")
    auto, switch = "auto: fp16 on CUDA, fp32 elsewhere", {"action": "store_true", "default": False}
    parser.setting("--dtype", default="auto", choices=["auto", *DTYPES], short="dtype", help=auto)
    parser.setting("--channels_last", **switch, help="memory format; changes the last bits")
    parser.setting("--compile", **switch, help="torch.compile; changes the last bits")


def load(checkpoint, device, dtype="auto", **how):
    """The generator of a checkpoint, on `device`.

    dtype    "fp16", "bf16", "fp32", or "auto": fp16 on CUDA, fp32 elsewhere
    how      the other FLAGS; part="encoder" loads only what stage 1 needs
    Refuses a checkpoint that is missing, incomplete, not safetensors or of an unknown family.
    """
    from diffusers import DiffusionPipeline  # takes seconds

    flag, path = f"--diffusion_checkpoints_path {checkpoint}", Path(checkpoint)
    revision = None if path.is_file() else how.get("revision")
    single, config = path.suffix == ".safetensors", how.get("single_file_config")
    if path.is_file() and not single:
        refuse(f"{flag}: only .safetensors files are read, others may hold code")
    if not path.exists() and (single or checkpoint[0] in "./~" or checkpoint.count("/") > 1):
        refuse(f"{flag}: no such file or folder")
    if dtype == "auto":
        dtype = "fp16" if device.type == "cuda" else "fp32"
    try:
        source = _single_file_source(path) if single else checkpoint
        index = DiffusionPipeline.load_config(config or source, revision=revision)
        family = str(index.get("_class_name"))
        if family not in FAMILIES:
            raise ValueError(f"it is a {family}; what works: {', '.join(FAMILIES)}")
        configs = _read_configs(config or source, revision, index, FAMILIES[family].WORKS)
        return FAMILIES[family](checkpoint, device, dtype, configs=configs, **how)
    except Exception as error:  # whatever a damaged checkpoint makes the libraries raise
        hint = ""
        if not path.exists():
            hint = ". Offline, gated or misspelt? Where there is internet, after accepting its "
            hint += f"licence on the hub: hf download {checkpoint} --local-dir DIR"
        elif single and not config:
            hint = ". Without internet, name its configuration: --single_file_config DIR"
        reason = one_line(error) if isinstance(error, ValueError) else reason_of(error)
        refuse(f"{flag}: cannot be loaded: {reason}{hint}")


def _single_file_source(path):
    """The hub id of the model that diffusers takes a single file for, by its header alone."""
    from diffusers.loaders import single_file_utils as single
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = single.infer_diffusers_model_type(weights)
    if kind not in ("v1", "v2"):
        raise ValueError(f"its weights are those of {kind}; what works: Stable Diffusion v1, v2")
    if "model.diffusion_model.input_blocks.0.0.weight" not in weights:
        raise ValueError("it is no whole Stable Diffusion: its UNet is missing")
    return single.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def mend(model, results, again, names):
    """Make again in fp32, in place, the rows of `results` (B, ...) that hold NaN or infinity.

    again    row number -> (1, ...);   names: what messages call the rows
    """
    for n in (~results.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        with model.in_fp32():
            results[n] = again(n)[0].to(results)
        if not results[n].isfinite().all():
            refuse(f"{names[n]}: NaN or infinity, in fp32 too")
        warn(f"{names[n]}: NaN or infinity in {model.facts['precision']}; made again in fp32")


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x behind the four verbs of a generator.

    facts         {"model", "revision", "precision", "vae_sha256", ...}: what manifests say of it
    channels      of its latents
    most_steps    of the schedule that it was trained with (not with part="encoder")
    native_size   of the images that it was trained with, in pixels; None: it does not say
    Weights are hashed in fp32, before they are cast: one checkpoint has one hash in every
    precision. Raises whatever the libraries raise, and ValueError.
    """

    # {part: {setting of its configuration: values that work, the default first}}
    WORKS = {
        "vae": {
            "_class_name": ("AutoencoderKL",),
            "latent_channels": (4,),
            "shift_factor": (None, 0),
        },
        "unet": {
            "_class_name": ("UNet2DConditionModel",),
            **dict.fromkeys(("in_channels", "out_channels"), (4,)),
            "addition_embed_type": (None, "text"),
            **dict.fromkeys(("class_embed_type", "num_class_embeds"), (None,)),
        },
        "text_encoder": {"_class_name": ("CLIPTextModel",)},
        "scheduler": SAMPLER,
    }

    def __init__(self, checkpoint, device, precision, part="all", safety_checker="off", **how):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
        from transformers import CLIPTextModel

        from scripts import pipeline_stable_diffusion_gen_latents as gen_latents

        unet, vae, text = (how["configs"][part] for part in ("unet", "vae", "text_encoder"))
        takes, gives = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)
        if takes != gives:
            raise ValueError(f"its unet takes texts of width {takes}, its text_encoder has {gives}")
        self.native_size = _native_size(unet, vae)
        networks, absent = {"vae": AutoencoderKL}, []
        if part == "all":
            networks |= {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
        else:
            absent += ["unet", "text_encoder", "tokenizer", "scheduler"]
        if safety_checker == "on":
            networks["safety_checker"] = StableDiffusionSafetyChecker
        else:
            absent += ["safety_checker", "feature_extractor"]
        self.pipeline = _pipeline(checkpoint, networks, absent, how)
        self.pipeline.set_progress_bar_config(disable=True)
        parts = self.pipeline.components
        self.networks = {n: p for n, p in parts.items() if isinstance(p, torch.nn.Module)}
        self._check(networks)
        vae, unet = self.networks["vae"], self.networks.get("unet")
        self.channels = vae.config.latent_channels
        self.encoder = gen_latents.StableDiffusionGenLatentsPipeline(
            **parts, requires_safety_checker=False
        )
        name = Path(checkpoint).name if Path(checkpoint).exists() else checkpoint
        self.facts = {"model": name, "revision": how.get("revision"), "precision": precision}
        self.facts |= {f"{name}_sha256": weights_hash(p) for name, p in self.networks.items()}
        if part == "all":
            schedule = parts["scheduler"].config
            _check_settings("scheduler", schedule, SAMPLER)  # with its defaults
            self.most_steps = schedule.num_train_timesteps
            if schedule.get("original_inference_steps"):  # LCM, TCD
                self.most_steps = min(self.most_steps, schedule.original_inference_steps)
            for name in ("scheduler", "tokenizer"):
                self.facts[f"{name}_sha256"] = config_hash(parts[name])
        self.device, self.dtype = device, DTYPES[precision]
        self._cast(self.dtype)
        if how.get("channels_last"):
            for network in filter(None, (vae, unet)):
                network.to(memory_format=torch.channels_last)
        if how.get("compile"):
            for module in filter(None, (vae.encoder, vae.decoder, unet)):
                module.compile()
        # differs from the release: text is encoded once per class, not once per image
        self.condition = lru_cache(maxsize=64)(self._condition)

    def _check(self, wanted):
        """Raises ValueError for what would give wrong results in silence."""
        pipe, factor = self.pipeline, self.pipeline.vae.config.scaling_factor
        if not 0 < factor < math.inf:
            raise ValueError(f"the scaling factor of its VAE is {factor}, expected above 0")
        for name in wanted:
            if name not in self.networks:
                raise ValueError(f"it has no {name}")
            _check_whole(name, [n for n, p in self.networks[name].named_parameters() if p.is_meta])
        if "unet" in wanted:
            # transformers makes a tokenizer up if its file is not there
            words, expected = len(pipe.tokenizer.get_vocab()), pipe.text_encoder.config.vocab_size
            if words != expected:
                raise ValueError(f"its tokenizer has {words} words, its text_encoder {expected}")

    def _cast(self, dtype):
        for network in self.networks.values():
            torch.nn.Module.to(network, device=self.device, dtype=dtype)

    @contextlib.contextmanager
    def in_fp32(self):
        """Inside, all networks compute in fp32."""
        self._cast(torch.float32)
        yield
        self._cast(self.dtype)

    def latent_shape(self, size):
        """(channels, h, w) of the latent of a square image of `size` pixels."""
        factor = self.pipeline.vae_scale_factor
        if size % factor:  # diffusers would resize once more, in silence
            refuse(f"--size {size}: this checkpoint's VAE needs a multiple of {factor}")
        return (self.channels, size // factor, size // factor)

    def encode(self, images, draws):
        """(B, 3, S, S) uint8 -> latents (B, c, h, w); image i's noise comes from draws[i]."""
        return self.encoder(images.to(self.device, non_blocking=True) / 255, draws)

    def unread(self, prompt):
        """The end of a prompt that is too long for the text encoder; "" if it reads all of it."""
        how = {"truncation": True, "return_overflowing_tokens": True}
        words = self.pipeline.tokenizer
        _, *rest = words(prompt, **how).input_ids  # in pieces of the longest length
        return " ".join(words.decode(piece, skip_special_tokens=True) for piece in rest).strip()

    @torch.no_grad()
    def _condition(self, prompt):
        """`condition`: what `denoise` takes for one prompt, (1, tokens, width)."""
        encode = self.pipeline.encode_prompt
        return encode(prompt, self.device, 1, do_classifier_free_guidance=False)[0]

    def denoise(self, latents, conditions, negative, draws, strength, guidance_scale, steps):
        """z_t = sqrt(a_t) z + sqrt(1 - a_t) e at t = strength * T; then the sampler's steps with
        classifier-free guidance, all by stock img2img (paper, section 3).   (B, c, h, w) latents

        conditions    of `condition`, one per latent
        negative      of `condition`, one for all
        draws         one torch.Generator per latent
        """
        dtype = self.networks["unet"].dtype
        prompts = torch.cat(conditions).to(dtype)
        return self.pipeline(
            latents=latents,
            prompt_embeds=prompts,
            negative_prompt_embeds=negative.to(dtype).expand_as(prompts),
            generator=draws,
            strength=strength,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            output_type="latent",
        ).images

    @torch.no_grad()
    def decode(self, latents, check=True):
        """Latents (B, c, h, w) -> images (B, 3, H, W) in [0, 1].

        check   blacken what the safety checker flags, if it was loaded
        """
        images = self.pipeline.decode(latents)
        if check and self.pipeline.safety_checker is not None:
            pixels = images * 2 - 1
            _, flagged = self.pipeline.run_safety_checker(pixels, self.device, images.dtype)
            images[torch.tensor(flagged)] = 0
        return images


def _read_configs(source, revision, index, table):
    """{part: its raw configuration}. Raises ValueError for what is not in the `table` of WORKS.

    index   model_index.json, whose classes are loaded, whatever the configurations say
    """
    from diffusers import AutoencoderKL, PNDMScheduler

    found = {}
    for part, settings in table.items():
        reader = PNDMScheduler if part == "scheduler" else AutoencoderKL  # for the file's name
        found[part] = reader.load_config(source, subfolder=part, revision=revision)
        _check_settings(part, found[part], settings)
        if part in index:
            _check_settings(part, {**found[part], "_class_name": index[part][-1]}, settings)
    return found


def _check_settings(part, config, settings):
    """Raises ValueError for a setting with a value that is not in the table."""
    for name, works in settings.items():
        value = config.get(name, works[0])
        if value not in works:
            what = "is" if name == "_class_name" else f"has {name}"
            works = ", ".join(map(str, works))
            raise ValueError(f"its {part} {what} {value}; what works: {works}")


def _native_size(unet, vae):
    """Pixels of the images that a UNet was trained with, by the two raw configurations."""
    size = unet.get("sample_size")
    size = size[0] if isinstance(size, list) else size
    if size and size < 64 and re.match(r"0\.[0-8]\.", unet.get("_diffusers_version", "")):
        size = 64  # as diffusers: that of its first versions is wrong
    return size and size * 2 ** (len(vae["block_out_channels"]) - 1)


# by what model_index.json calls its class
NAMES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
FAMILIES = dict.fromkeys(NAMES, StableDiffusion)


def _pipeline(checkpoint, networks, absent, how):
    """Stage 2's pipeline, in fp32.   networks: {name: class};   absent: names of other parts"""
    from scripts import pipeline_stable_diffusion_latents2img as latents2img

    cls, others = latents2img.StableDiffusionLatents2ImgPipeline, dict.fromkeys(absent)
    others["requires_safety_checker"] = False
    where, precision = {"revision": how.get("revision")}, {"dtype": torch.float32}
    if Path(checkpoint).is_file():
        config = how.get("single_file_config")
        return cls.from_single_file(checkpoint, config=config, **precision, **others)
    form = {"use_safetensors": True, "output_loading_info": True}
    variants = _variants(checkpoint, networks, _names(checkpoint, **where), how.get("variant"))
    for name, network in networks.items():
        options = {"subfolder": name, "variant": variants[name], **where, **precision, **form}
        others[name], report = network.from_pretrained(checkpoint, **options)
        _check_whole(name, report["missing_keys"])
    return cls.from_pretrained(checkpoint, **where, **others)


CONVERT = "python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('%s', "
CONVERT += "use_safetensors=False).save_pretrained('NEW')\""


def _names(checkpoint, revision):
    """The names of a checkpoint's files, "vae/config.json", ...: of a folder, or a hub id."""
    import huggingface_hub as hub

    if not Path(checkpoint).exists():
        try:
            return hub.list_repo_files(checkpoint, revision=revision)
        except Exception:  # no internet: what was downloaded before
            checkpoint = hub.snapshot_download(checkpoint, revision=revision, local_files_only=True)
    return [path.relative_to(checkpoint).as_posix() for path in Path(checkpoint).glob("*/*")]


def _variants(checkpoint, parts, names, wanted):
    """{part: variant of its weights}: the one `wanted`, or the only one if just a precision."""
    chosen = {}
    for part in parts:
        form = rf"{part}/(?:diffusion_pytorch_)?model(?:\.([a-z]\w*))?(?:-\d.*)?\.safetensors"
        found = {m[1] for m in map(re.compile(form).fullmatch, names) if m}
        chosen[part] = wanted
        if wanted not in found and len(found) == 1 and {wanted, *found} <= {None, "fp16", "bf16"}:
            [chosen[part]] = found
        if chosen[part] not in found:
            held = ", ".join(f"--variant {v}" if v else "plain ones" for v in found) or "none"
            if not found and any(re.match(rf"{part}/.*\.bin$", name) for name in names):
                held = f"only .bin, which may hold code; where you trust it: {CONVERT % checkpoint}"
            what = f"{wanted or 'plain'} .safetensors weights of its {part}"
            raise ValueError(f"no {what}, there are {held}")
    taken = {part: variant for part, variant in chosen.items() if variant != wanted}
    if taken:
        which = ", ".join(f"{part} ({variant or 'plain'})" for part, variant in taken.items())
        warn(f"{checkpoint}: takes the only weights that are there: {which}")
    return chosen


def _check_whole(name, missing):
    """Raises ValueError for missing weights: both libraries fill them with random numbers."""
    if missing:
        raise ValueError(f"weights are missing from it, first {name} {min(missing)}")


def weights_hash(network):
    """sha256 of a network's weights rounded to fp16, so that precision variants of one model agree.

    A VAE's scaling factor belongs to it: prototypes are multiplied by it.
    """
    state, config = hashlib.sha256(), getattr(network, "config", None)
    for name in ("scaling_factor", "shift_factor"):
        state.update(f"{name} {getattr(config, name, None)}\n".encode())
    for name, tensor in sorted(network.state_dict().items()):
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16)
        state.update(f"{name} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def config_hash(part):
    """sha256 of a scheduler's or tokenizer's class, settings and vocabulary."""
    if hasattr(part, "get_vocab"):
        vocabulary = sorted(part.get_vocab().items())
        state = {"vocabulary": vocabulary, "length": part.model_max_length}
    else:
        state = {name: value for name, value in part.config.items() if not name.startswith("_")}
    text = json.dumps({"class": type(part).__name__, **state}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
