"""Image generators: what stages 1 and 2 ask of a diffusion model, whatever its family.

    model = load("stable-diffusion-v1-5/stable-diffusion-v1-5", device, "fp16")
    latents = model.encode(images, draws)                                  # stage 1
    latents = model.denoise(latents, conditions, negative, draws, ...)     # stage 2
    images = model.decode(latents)

Another family is one class with the public names of `families.StableDiffusion` and one entry of
`FAMILIES`. What of a family works stands in its table `WORKS`; a checkpoint's configurations are
held against it before any weights are read.
Nothing outside this file, families, checkpoints, samplers and the pipelines knows what a family is
made of.
"""

from pathlib import Path

from scripts import checkpoints
from scripts.families import DTYPES, DiT, StableDiffusion, StableDiffusion3, StableDiffusionXL
from scripts.runtime import one_line, reason_of, refuse, warn

DEFAULT_CHECKPOINT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SETTINGS = ("dtype", "channels_last", "compile")
# the flags that `load` takes under their own names
FLAGS = (*SETTINGS, "revision", "variant", "single_file_config", "safety_checker")
FLAGS += ("scheduler", "guide", "guide_weight", "offload")

# by what model_index.json calls its class
FAMILIES = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusion3Img2ImgPipeline": StableDiffusion3,
    "DiTPipeline": DiT,
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
    offload = "keep on the GPU only the network at work: slower, for cards of 12 GB"
    parser.flag("--offload", action="store_true", help=offload)


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
        source = checkpoints.single_file_source(path) if single else checkpoint
        index = DiffusionPipeline.load_config(config or source, revision=revision)
        family = str(index.get("_class_name"))
        if family not in FAMILIES:
            titles = dict.fromkeys(getattr(cls, "TITLE", name) for name, cls in FAMILIES.items())
            raise ValueError(f"it is a {family}; what works: {', '.join(titles)}")
        configs = checkpoints.read_configs(
            config or source, revision, index, FAMILIES[family].WORKS
        )
        return FAMILIES[family](checkpoint, device, dtype, configs=configs, **how)
    except Exception as error:  # whatever a damaged checkpoint makes the libraries raise
        hint = ""
        if not path.exists():
            hint = ". Offline, gated or misspelt? Where there is internet, after accepting its "
            hint += f"licence on the hub: hf download {checkpoint} --local-dir DIR"
        elif single and not config:
            hint = ". Without internet, name its configuration: --single_file_config DIR"
        reason = one_line(error) if isinstance(error, ValueError) else reason_of(error)
        refuse(f"{flag}: cannot be loaded: {reason.rstrip('.')}{hint}")


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
