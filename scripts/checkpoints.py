"""A checkpoint's files: its configurations, held against what works; its weights; their hashes.

Missing weights are refused: diffusers and transformers would fill them with random numbers.
"""

import hashlib
import json
import re
from pathlib import Path

import torch

from scripts.runtime import warn

# ---- what it is


def single_file_source(path):
    """The hub id of the model that diffusers takes a single file for, by its header alone."""
    from diffusers.loaders import single_file_utils as single
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = single.infer_diffusers_model_type(weights)
    if kind not in ("v1", "v2"):
        what = f"its weights are those of {kind}; as a single file works Stable Diffusion v1, v2"
        raise ValueError(f"{what}; where there is internet: {SPLIT % path}")
    if "model.diffusion_model.input_blocks.0.0.weight" not in weights:
        raise ValueError("it is no whole Stable Diffusion: its UNet is missing")
    return single.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


SPLIT = 'python -c "from diffusers import StableDiffusionXLPipeline as P; '
SPLIT += "P.from_single_file('%s').save_pretrained('NEW')\" makes a folder of that of an SDXL"


def read_configs(source, revision, index, table):
    """{part: its raw configuration, None for what a checkpoint does without}. Raises ValueError
    for what is not in the `table` of WORKS.

    index   model_index.json, whose classes are loaded, whatever the configurations say
    """
    from diffusers import AutoencoderKL, PNDMScheduler

    found = {}
    for part, settings in table.items():
        if index.get(part) == [None, None] and None in settings["_class_name"]:
            found[part] = None
            continue
        reader = PNDMScheduler if part == "scheduler" else AutoencoderKL  # for the file's name
        found[part] = reader.load_config(source, subfolder=part, revision=revision)
        check_settings(part, found[part], settings)
        if part in index:
            check_settings(part, {**found[part], "_class_name": index[part][-1]}, settings)
    return found


def check_settings(part, config, settings):
    """Raises ValueError for a setting whose value is not in the table, nor of a type there."""
    for name, works in settings.items():
        value = config.get(name, works[0])
        if value not in works and type(value) not in works:
            what = "is" if name == "_class_name" else f"has {name}"
            works = ", ".join(getattr(work, "__name__", str(work)) for work in works)
            raise ValueError(f"its {part} {what} {value}; what works: {works}")


def native_size(denoiser, vae):
    """Pixels of the images that a model was trained with, by the two raw configurations."""
    size = denoiser.get("sample_size")
    size = size[0] if isinstance(size, list) else size
    if size and size < 64 and re.match(r"0\.[0-8]\.", denoiser.get("_diffusers_version", "")):
        size = 64  # as diffusers: that of its first versions is wrong
    return size and size * 2 ** (len(vae["block_out_channels"]) - 1)


# ---- what it holds


def pipeline(cls, checkpoint, networks, others, how):
    """The pipeline `cls` of a checkpoint, in fp32.

    networks   {name: class} of what is loaded;   others: what else `cls` is given
    """
    where, precision = {"revision": how.get("revision")}, {"dtype": torch.float32}
    if Path(checkpoint).is_file():
        config = how.get("single_file_config")
        return cls.from_single_file(checkpoint, config=config, **precision, **others)
    others, form = dict(others), {"use_safetensors": True, "output_loading_info": True}
    variants = _variants(checkpoint, networks, _names(checkpoint, **where), how.get("variant"))
    for name, network in networks.items():
        options = {"subfolder": name, "variant": variants[name], **where, **precision, **form}
        others[name], report = network.from_pretrained(checkpoint, **options)
        check_whole(name, report["missing_keys"])
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
                held = "only .bin, which may hold code. The hub's own conversion may be found at "
                held += "--revision refs/pr/1; where you trust it: " + CONVERT % checkpoint
            what = f"{wanted or 'plain'} .safetensors weights of its {part}"
            raise ValueError(f"no {what}, there are {held}")
    taken = {part: variant for part, variant in chosen.items() if variant != wanted}
    if taken:
        which = ", ".join(f"{part} ({variant or 'plain'})" for part, variant in taken.items())
        warn(f"{checkpoint}: takes the only weights that are there: {which}")
    return chosen


def check_whole(name, missing):
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
