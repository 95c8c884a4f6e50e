"""Stable Diffusion checkpoints: a pipeline from a hub id, a folder or a single file, and a hash of its weights."""

import contextlib
import hashlib
import json
import logging
import math
import re
from pathlib import Path

import torch

from scripts.runtime import refuse

DEFAULT_CHECKPOINT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HUB_HINT = (
    ". Offline, gated or misspelt? Where there is internet: hf download {0} --local-dir DIR (after accepting its "
    "licence on the hub), then --diffusion_checkpoints_path DIR"
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_checkpoint_flags(parser):
    """The flags that say which Stable Diffusion is used, and in which precision."""
    group = parser.add_argument_group("Stable Diffusion")
    group.add_argument(
        "--diffusion_checkpoints_path",
        default=DEFAULT_CHECKPOINT,
        help="a hub id, a folder in diffusers format, or a single .safetensors file",
    )
    group.add_argument("--revision", default=None, help="a branch, tag or commit of the hub id")
    group.add_argument(
        "--single_file_config",
        default=None,
        metavar="DIR",
        help="with a single file and no internet: a folder in diffusers format that has its configuration",
    )
    group.add_argument("--variant", default=None, help="load weight files of this variant, such as fp16")
    group.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: fp16 on CUDA, fp32 elsewhere")
    group.add_argument("--channels_last", action="store_true", help="memory format; changes the last bits")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks; changes the last bits")


def model_name(checkpoint):
    """What manifests call a checkpoint: its hub id, or the last part of its path."""
    return Path(checkpoint).name if Path(checkpoint).exists() else checkpoint


def resolve_dtype(name, device):
    """--dtype -> "fp16", "bf16" or "fp32"."""
    return ("fp16" if device.type == "cuda" else "fp32") if name == "auto" else name


def load_pipeline(
    cls, checkpoint, device, dtype, revision=None, variant=None, vae_only=False, safety_checker=False, config=None
):
    """(pipeline, {"vae_sha256": ...}): `cls`, one of our two, on `device` in `dtype` ("fp16", "bf16", "fp32").

    Weights are read in fp32 and hashed before they are cast, so that one checkpoint has one hash in every precision.

    vae_only        load nothing but the VAE (stage 1): 0.3 GB instead of 4 GB
    config          for a single file: where its configuration is, if not on the hub
    safety_checker  keep the checkpoint's safety checker (it replaces flagged images by black ones)
    Refuses, in one line, a checkpoint that is missing, gated, incomplete, or not a Stable Diffusion. Reads safetensors
    only.
    """
    absent = {} if safety_checker else {"safety_checker": None, "feature_extractor": None}
    if vae_only:
        absent = dict.fromkeys(
            ("safety_checker", "feature_extractor", "text_encoder", "tokenizer", "unet", "scheduler")
        )
    path = Path(checkpoint)
    arguments = {"dtype": torch.float32, "use_safetensors": True, "requires_safety_checker": safety_checker, **absent}
    flag = f"--diffusion_checkpoints_path {checkpoint}"
    if path.suffix and path.is_file() and path.suffix != ".safetensors":
        refuse(f"{flag}: only .safetensors files are read, a {path.suffix} may hold code")
    if not path.exists() and (
        path.suffix == ".safetensors" or checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1
    ):
        refuse(f"{flag}: no such file or folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        refuse(f"{flag}: this folder has no model_index.json, so it is no pipeline in diffusers format")
    try:
        with _logged("diffusers", "transformers") as messages:
            if path.is_file():
                pipeline = cls.from_single_file(str(path), config=config, **arguments)
            else:
                pipeline = cls.from_pretrained(checkpoint, revision=revision, variant=variant, **arguments)
    except Exception as error:  # whatever a damaged file of a checkpoint makes the libraries raise
        hint = "" if path.exists() else HUB_HINT.format(checkpoint)
        if path.is_file() and config is None:
            hint = ". Without internet its configuration has to be named: --single_file_config DIR"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        refuse(f"{flag}: cannot be loaded: {reason}{hint}")
    random = next((text for text in messages if "newly initialized" in text), None)
    if random:  # both libraries fill such gaps with random numbers and go on
        name = re.search(r"^(\S.*?)\s*\|\s*MISSING", random, re.MULTILINE) or re.search(r"\['(.*?)'", random)
        refuse(f"{flag}: weights are missing from it{f', first {name[1]}' if name else ''}")
    pipeline.set_progress_bar_config(disable=True)
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    factor = pipeline.vae.config.scaling_factor
    if not (isinstance(factor, (int, float)) and 0 < factor < math.inf):
        refuse(f"{flag}: the scaling factor of its VAE is {factor!r}, expected a number above 0")
    if not vae_only:  # transformers makes a tokenizer up if its file is not there
        words, wanted = len(pipeline.tokenizer.get_vocab()), pipeline.text_encoder.config.vocab_size
        if words != wanted:
            refuse(f"{flag}: its tokenizer has {words} words, its text_encoder {wanted}")
    hashes = {f"{name}_sha256": weights_hash(network) for name, network in networks.items()}
    cast(pipeline, DTYPES[dtype])
    return pipeline.to(device), hashes


@contextlib.contextmanager
def _logged(*names):
    """The warnings that these loggers write inside."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(min(logger.level, logging.WARNING))  # also where the user wants to hear of errors alone
    try:
        yield messages
    finally:
        for logger, level in zip(loggers, levels):
            logger.removeHandler(handler)
            logger.setLevel(level)


def cast(pipeline, dtype):
    """All networks of a pipeline to `dtype`; diffusers' own `.to(dtype)` warns of modules that are not there."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype=dtype)


def speed_up(pipeline, channels_last=False, compiled=False):
    """channels_last and torch.compile for the networks of a pipeline that it has."""
    for name in ("unet", "vae"):
        module = getattr(pipeline, name, None)
        if module is None:
            continue
        if channels_last:
            module.to(memory_format=torch.channels_last)
        if compiled and name == "unet":
            module.compile()
        elif compiled:
            module.encoder.compile()
            module.decoder.compile()
    return pipeline


def weights_hash(module):
    """sha256 of a network's weights rounded to fp16, so that the precision variants of one model agree.

    A VAE's scaling factor belongs to it: prototypes are multiplied by it.
    """
    state = hashlib.sha256()
    config = getattr(module, "config", None)
    for name in ("scaling_factor", "shift_factor"):
        state.update(f"{name} {getattr(config, name, None)}\n".encode())
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float16)
        state.update(f"{name} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()


def config_hash(part):
    """sha256 of what decides a scheduler's or a tokenizer's doing: its class, settings and vocabulary."""
    state = {"class": type(part).__name__}
    if hasattr(part, "get_vocab"):
        state |= {"vocabulary": sorted(part.get_vocab().items()), "length": part.model_max_length}
    else:
        state |= {name: value for name, value in part.config.items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()
