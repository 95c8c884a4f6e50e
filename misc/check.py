"""Preflight: all that can be known before the GPU is busy, and a plan with estimated time and disk.

    python -m misc.check distillation/gen_prototype_imgnt.sh --ipc 50     # a launcher, with flags that override it
    python -m misc.check validate.train_FKD --train_dir ... --fkd_path ...     # or a stage and its flags

Checks paths, class folders against labels, image counts against IPC, a sample of images by decoding them, that local
weights can be read, free disk against the estimate, and GPU memory against the batch size. One line a problem - all of
them, not only the first - and then exit status 2. Nothing is written, and no launcher runs a stage: it is started with
stand-ins for `python` and `torchrun` that note their arguments.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.check", file=sys.stderr)
    sys.exit(2)

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from distillation.datasets import DATASETS, BadImage, known_prompts, open_split, read_label_file
from distillation.prototypes import default_size, open_prototypes
from scripts.files import free_space, read_json
from scripts.runtime import EXIT_REFUSED, Parser, entry_point, parse_shard, resolve_device

SAMPLE = 64  # images decoded of a data set
SHOWN = 5  # problems of one kind that are listed each
GIB = 2**30

# ---- estimates. TFLOP of Stable Diffusion 1.5 at 512 px, counted by PyTorch's FLOP counter; the rest are guesses.
ENCODE_TFLOP, UNET_TFLOP, DECODE_TFLOP = 1.117, 0.803, 2.515  # an image, one sample, an image
SD15_PARAMETERS = {"vae": 83_653_863, "unet": 859_520_964}
RATES = {"cuda": (390, 150), "mps": (5, 3), "cpu": (0.2, 0.1)}  # TFLOP/s: diffusion; training (H200 for cuda)
ENCODE_GIB, SYNTHESIS_GIB = 0.55, 0.9  # of GPU memory for each 512 px image of a batch, in fp16

STAGES = (
    "distillation.gen_prototype",
    "distillation.gen_syn_image",
    "distillation.distill",
    "distillation.random_real",
    "matching.train_teacher",
    "matching.generate_soft_label",
    "validate.train_FKD",
)


class Plan:
    """What was found: problems (one line each), notes, and for each command its time, disk and memory.

    world    processes of the command at hand, over all its nodes and shards; local: those of one machine
    """

    def __init__(self):
        self.problems, self.notes, self.disk, self.seconds, self.roots = [], [], [], 0.0, set()
        self.world = self.local = 1

    def problem(self, text):
        line = " ".join(str(text).split())
        if line not in self.problems:
            self.problems.append(line)

    def note(self, text):
        self.notes.append(text)

    def try_to(self, function, *args, **kwargs):
        """The function's result; what it refuses becomes a problem, and None is returned."""
        err = io.StringIO()
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
                result = function(*args, **kwargs)
        except SystemExit:
            result = None
        for line in err.getvalue().replace("\r", "\n").splitlines():
            if line.startswith("error: "):
                self.problem(line.removeprefix("error: "))
            elif line.startswith("warning: "):
                self.note(line)
        return result

    def output(self, flag, root, needed):
        """An output of `needed` bytes below `root`."""
        self.roots.add(Path(root).absolute())
        self.disk.append((flag, Path(root).absolute(), needed))
        self.note(f"disk: {readable(needed)} below {root} (estimate)")

    def time(self, seconds, what, units):
        """What one process does in `seconds`, as `units` that are dealt out whole to all processes."""
        seconds *= -(-units // self.world) / max(units, 1)
        self.seconds += seconds
        on = f", on {self.world} processes" if self.world > 1 else ""
        self.note(f"time: {duration(seconds)} {what}{on} (estimate)")

    def host_memory(self, flag, needed):
        """`needed` bytes in each process of one machine."""
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        each = f"{readable(needed)} of pixels a process" + (f", for {self.local}" if self.local > 1 else "")
        self.note(f"host memory: {each}, {readable(total)} in this machine")
        if needed * self.local > total:
            self.problem(f"{flag}: needs {each}; this machine has {readable(total)}")

    def comes_later(self, flag, path):
        """Whether `path` is missing because an earlier command of this launcher will make it."""
        path = Path(path).absolute()
        if path.exists() or not self.roots & {path, *path.parents}:
            return False
        self.note(f"{flag} {path.name}: an earlier command will make it; not checked")
        return True

    def check_disk(self):
        """Free space against the sum of all outputs on one file system."""
        groups = {}
        for flag, folder, needed in self.disk:
            there = folder
            while not there.exists():
                there = there.parent
            if not os.access(there, os.W_OK):
                self.problem(f"{flag} {folder}: cannot be made, {there} is not writable")
            if not there.is_dir():
                self.problem(f"{flag} {folder}: cannot be made, {there} is no folder")
                continue
            group = groups.setdefault(os.stat(there).st_dev, [there, 0, set()])
            group[1] += needed
            group[2].add(flag)
        for there, needed, flags in groups.values():
            if needed > free_space(there):
                self.problem(
                    f"{' '.join(sorted(flags))}: about {readable(needed)} are needed in {there}, "
                    f"{readable(free_space(there))} are free"
                )


def readable(size):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration(seconds):
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


# ---- real images


def check_split(plan, args, split="train", flag="--data_dir", root=None, ipc=None, on_small="error"):
    """Folders, counts, labels, and a sample of the images; the Split, or None."""
    classes = getattr(args, "classes", None)
    found = plan.try_to(
        open_split, args.dataset, root, split, None, classes, getattr(args, "max_images_per_class", 0), flag=flag
    )
    label_file = getattr(args, "label_file_path", None)
    folders = list(known_prompts(args.dataset)) or (list(found.folders) if found else None)
    if label_file and folders and not (classes and args.dataset == "imagefolder"):
        plan.try_to(read_label_file, label_file, folders, args.dataset)
    if found is None:
        return None
    small = [(f, len(items)) for f, items in zip(found.folders, found.items) if not items]
    if ipc and on_small == "error":
        small += [(f, len(items)) for f, items in zip(found.folders, found.items) if 0 < len(items) < ipc]
    for folder, count in small[:SHOWN]:
        plan.problem(
            f"{flag}: class {folder} has no images"
            if not count
            else f"--ipc {ipc}: class {folder} has only {count} images"
        )
    if len(small) > SHOWN:
        plan.problem(f"{flag}: {len(small) - SHOWN} more classes are empty or smaller than --ipc {ipc}")
    check_sample(plan, found, getattr(args, "on_bad_image", "error"), flag)
    count = sum(map(len, found.items))
    plan.note(f"{flag}: {count:,} {split} images in {len(found.folders)} classes")
    return found


def check_sample(plan, split, on_bad, flag):
    """Decode some images of every kind of class: first, last and random ones."""
    every = [item for items in split.items for item in items]
    if not every or split.arrays is not None:
        return
    # the smallest files are the likeliest to be broken
    chosen = random.Random(0).sample(every, min(len(every), 4 * SAMPLE))
    chosen.sort(key=lambda p: Path(p).stat().st_size if Path(p).exists() else 0)
    chosen = chosen[: SAMPLE // 2] + random.Random(1).sample(every, min(len(every), SAMPLE // 2))
    bad = []
    for item in dict.fromkeys(chosen):
        try:
            split.read(item)
        except BadImage as error:
            bad.append(str(error))
    for text in bad[:SHOWN]:
        if on_bad == "error":
            plan.problem(f"{text} (--on_bad_image skip leaves such images out)")
        else:
            plan.note(f"left out: {text}")
    if len(bad) > SHOWN:
        plan.problem(f"{flag}: {len(bad) - SHOWN} more of {len(chosen)} images that were tried cannot be decoded")


# ---- weights


def check_checkpoint(plan, checkpoint, parts):
    """{part: number of parameters} of a local Stable Diffusion, from the headers of its safetensors; {} if remote."""
    flag, path = f"--diffusion_checkpoints_path {checkpoint}", Path(checkpoint)
    if path.is_file():
        if path.suffix != ".safetensors":
            plan.problem(f"{flag}: only .safetensors files are read, a {path.suffix} may hold code")
            return {}
        size = sum(tensors_of(plan, flag, path).values())
        return {"all": size} if size else {}
    if not path.is_dir():
        local = cached_snapshot(checkpoint)
        if local is None:
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                plan.problem(
                    f"{flag}: neither a file or folder here nor in the hub's cache, and HF_HUB_OFFLINE is set"
                )
            elif checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1:
                plan.problem(f"{flag}: no such file or folder")
            else:
                plan.note(f"{flag}: not on this machine; it will be fetched from the hub (4 GB), which was not tried")
            return {}
        path = local
    if not (path / "model_index.json").is_file():
        plan.problem(f"{flag}: this folder has no model_index.json, so it is no pipeline in diffusers format")
        return {}
    sizes = {}
    for part in parts:
        files = sorted((path / part).glob("*.safetensors"))
        if not files:
            plan.problem(f"{flag}: {part}/ holds no .safetensors")
            continue
        tensors = [tensors_of(plan, flag, file) for file in files]
        # variants such as fp16 lie beside the full weights: the largest is counted
        sizes[part] = max(sum(held.values()) for held in tensors)
        if all(tensors):
            check_part(plan, flag, path / part, set().union(*tensors))
    if "unet" in parts and not (path / "scheduler/scheduler_config.json").is_file():
        plan.problem(f"{flag}: scheduler/scheduler_config.json is missing")
    if "text_encoder" in parts and not any((path / "tokenizer").glob("*.json")):
        plan.problem(f"{flag}: tokenizer/ is missing")
    return sizes


def check_part(plan, flag, folder, names):
    """A problem if a part lacks its config.json, or holds another network's tensors than those that it asks for."""
    import diffusers

    if not (folder / "config.json").is_file():
        plan.problem(f"{flag}: {folder.name}/config.json is missing")
        return
    kind = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}.get(folder.name)
    config = plan.try_to(read_json, folder / "config.json")
    if kind is None or config is None:  # transformers renames a text encoder's tensors while it loads them
        return
    try:
        with torch.device("meta"):
            wanted = set(getattr(diffusers, kind).from_config(config).state_dict())
    except Exception as error:  # a config may hold anything, and diffusers raises anything
        plan.problem(f"{flag}: {folder.name}/config.json describes no {kind}: {str(error).splitlines()[0][:100]}")
        return
    if len(wanted & names) < len(wanted) / 2:  # diffusers knows other names of a few, so all need not be there
        plan.problem(
            f"{flag}: {folder.name}/ holds {len(wanted & names)} of the {len(wanted)} tensors of its config.json"
        )


def tensors_of(plan, flag, file):
    """{name: number of parameters} from a safetensors header; a damaged or shortened file is a problem, and {}."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < 10**8:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max(tensor["data_offsets"][1] for tensor in tensors.values())
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"{file.stat().st_size} bytes, its header says {8 + length + end}")
        return {name: torch.Size(tensor["shape"]).numel() for name, tensor in tensors.items()}
    except (AttributeError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        plan.problem(f"{flag}: {file} cannot be read: {error}")
        return {}


def cached_snapshot(name):
    """The folder of a hub id in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_vae(plan, source, args):
    """The prototypes' VAE against the checkpoint's: loads only the VAE, on the CPU."""
    if not Path(args.diffusion_checkpoints_path).exists() or not source.vae_sha256:
        return
    from scripts.checkpoints import load_pipeline
    from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline

    loaded = plan.try_to(
        load_pipeline, StableDiffusionGenLatentsPipeline, args.diffusion_checkpoints_path, torch.device("cpu"), "fp32",
        args.revision, args.variant, vae_only=True, config=args.single_file_config,
    )  # fmt: skip
    if loaded is not None and loaded[1]["vae_sha256"] != source.vae_sha256:
        plan.problem(
            f"--prototype_path {args.prototype_path}: made with the VAE {source.vae_sha256[:12]}, "
            f"this checkpoint's is {loaded[1]['vae_sha256'][:12]}"
        )


def share(sizes, part):
    """Size of a checkpoint's network relative to Stable Diffusion 1.5's; 1 where it is not known."""
    return sizes[part] / SD15_PARAMETERS[part] if sizes.get(part) else 1.0


def check_memory(plan, flag, needed_gib, device):
    """GPU memory against an estimate."""
    if device is None or device.type != "cuda":
        plan.note(f"memory: about {needed_gib:.1f} GiB for {flag} (estimate; no CUDA device here to compare with)")
        return
    total = torch.cuda.mem_get_info(device)[0] / GIB
    plan.note(f"memory: about {needed_gib:.1f} of {total:.1f} GiB free on {device} for {flag} (estimate)")
    if needed_gib > total:
        plan.problem(f"{flag}: needs about {needed_gib:.1f} GiB (estimate), {device} has {total:.1f} GiB free")


# ---- the stages


def check_stage_1(plan, args, device):
    if getattr(args, "data_dir", None) is None and args.dataset != "digits":
        plan.problem(f"--data_dir: missing; the images of {args.dataset}")
        split = None
    else:
        split = check_split(plan, args, root=args.data_dir, ipc=args.ipc, on_small=args.on_small_class)
    sizes = check_checkpoint(plan, args.diffusion_checkpoints_path, ["vae"])
    size = args.size or default_size(args.dataset)
    count = sum(map(len, split.items)) if split else 0
    classes = len(split.folders) if split else len(known_prompts(args.dataset))
    latent = 4 * (size // 8) ** 2
    if hasattr(args, "save_prototype_path"):
        width = 7 if args.prototype_format == "json" else 2
        plan.output("--save_prototype_path", args.save_prototype_path, classes * args.ipc * latent * width)
    if args.latent_cache:
        plan.output("--latent_cache", args.latent_cache, count * latent * 2)
    area, vae = (size / 512) ** 2, share(sizes, "vae")
    rate = RATES[device.type if device else "cuda"][0]
    plan.time(count * ENCODE_TFLOP * area * vae / rate, f"to encode {count:,} images at {size} px", classes)
    check_memory(
        plan, f"--batch_size {args.batch_size}", 0.2 * vae + args.batch_size * ENCODE_GIB * area * vae, device
    )
    return split


def check_stage_2(plan, args, device):
    from distillation.gen_syn_image import check_prototypes, check_steps

    arms = getattr(args, "arm", ["d4m"])
    plan.try_to(check_steps, arms, args.strength, args.num_inference_steps)
    sizes = check_checkpoint(plan, args.diffusion_checkpoints_path, ["vae", "unet", "text_encoder"])
    classes, latent_side = len(known_prompts(args.dataset)), (getattr(args, "size", None) or 512) // 8
    if hasattr(args, "prototype_path") and not plan.comes_later("--prototype_path", args.prototype_path):
        source = plan.try_to(open_prototypes, args.prototype_path, args.dataset, args.verify)
        if source is not None:
            plan.try_to(check_prototypes, args, source)
            check_vae(plan, source, args)
            classes, latent_side = len(source.classes), source.latent_shape[-1]
            if args.label_file_path:
                known = list(known_prompts(args.dataset)) or [c["folder"] for c in source.classes]
                plan.try_to(read_label_file, args.label_file_path, known, args.dataset)
    images = classes * args.ipc
    pixels = args.image_size or DATASETS[args.dataset].image_size
    plan.output("--save_init_image_path", args.save_init_image_path, len(arms) * images * pixels**2 * 2)
    area, unet = (latent_side / 64) ** 2, share(sizes, "unet")
    calls = {"decoded": 0, "text": args.num_inference_steps + 1}
    steps = [calls.get(arm, int(args.num_inference_steps * args.strength) + 1) for arm in arms]
    guided = 2 if args.guidance_scale > 1 else 1
    flops = sum(images * (s * guided * UNET_TFLOP * unet + DECODE_TFLOP * share(sizes, "vae")) for s in steps) * area
    rate, batches = RATES[device.type if device else "cuda"][0], -(-images // args.batch_size)
    plan.time(flops / rate, f"to make {images * len(arms):,} images", batches)
    needed = 2.1 * unet + args.batch_size * SYNTHESIS_GIB * area * share(sizes, "vae")
    check_memory(plan, f"--batch_size {args.batch_size}", needed, device)


def check_distill(plan, args, device):
    check_stage_1(plan, args, device)
    check_stage_2(plan, args, device)


def check_random_real(plan, args, device):
    split = check_split(plan, args, root=args.data_dir, ipc=args.ipc)
    pixels = args.image_size or DATASETS[args.dataset].image_size
    count = (len(split.folders) if split else len(known_prompts(args.dataset))) * args.ipc
    plan.output("--save_init_image_path", args.save_init_image_path, count * pixels**2 * 2)
    plan.time(count / 100, f"to choose {count:,} images", count)


def costs(model, size):
    """(TFLOP of a forward pass, bytes kept for the backward pass) of one image, by running it on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    kept, seen = 0, set()

    def pack(tensor):
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            kept += tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen |= weights
    x = torch.zeros(2, 3, size, size)  # two: a BatchNorm of one value refuses
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(x)
    return counter.get_total_flops() / 2e12, kept / 2


def check_network(plan, flag, name, classes, size):
    """A network by name: (TFLOP an image, bytes an image, parameters), or None."""
    from matching.models import count_parameters, create_model

    with torch.random.fork_rng(devices=[]):
        model = plan.try_to(create_model, name, classes, size)
    if model is None:
        return None
    try:
        return *costs(model, size), count_parameters(model)
    except RuntimeError as error:
        plan.problem(f"{flag} {name}: cannot take {size} px images: {str(error).splitlines()[0]}")


def check_training(plan, args, name, classes, size, images, epochs, batch_size, out, device, students=1):
    """Time, memory and disk of training a network."""
    from matching.training import chunk_size, chunks_of

    chunk = chunk_size(batch_size, plan.world, args.gradient_accumulation_steps, args.bn_batch)
    chunks = chunks_of(min(batch_size, images), chunk)
    found = check_network(plan, "--arch/--model", name, classes, size)
    if found is None:
        return
    tflop, kept, parameters = found
    rate = RATES[device.type if device else "cuda"][1]
    seconds = 3 * tflop * images * epochs * students / rate
    plan.time(seconds, f"to train {name}, {epochs} epochs of {images:,} images", len(chunks))
    plan.output("--output_dir", out, students * 4 * parameters + 2 * 12 * parameters)
    chunk = max(end - first for first, end in chunks)
    check_memory(plan, f"{chunk} images at once", (chunk * kept + 20 * parameters) / GIB, device)


def check_teacher(plan, args, device):
    from matching.train_teacher import recipe_of

    recipe = plan.try_to(recipe_of, args)
    split = check_split(plan, args, root=args.data_dir) if args.data_dir or args.dataset == "digits" else None
    if split is None and args.data_dir is None:
        plan.problem(f"--data_dir: missing; the images of {args.dataset}")
    check_split(plan, args, "val", "--val_dir" if args.val_dir else "--data_dir", args.val_dir or args.data_dir)
    if split is None or recipe is None:
        return
    size = args.input_size or DATASETS[args.dataset].image_size
    count = sum(map(len, split.items))
    check_training(
        plan,
        args,
        args.arch,
        len(split.folders),
        size,
        count,
        recipe.epochs,
        recipe.batch_size,
        args.output_dir,
        device,
    )


def check_stage_3(plan, args, device):
    from matching.generate_soft_label import load_teachers
    from matching.soft_labels import label_bytes, open_images, protocol_of

    for data in args.data:
        if plan.comes_later("--data", data):
            continue
        images = plan.try_to(open_images, "--data", data, args.dataset)
        if images is None:
            continue
        protocol = plan.try_to(protocol_of, vars(args), images.image_size or DATASETS[images.dataset].image_size)
        if protocol is None:
            continue
        check_images(plan, "--data", images)
        later = [c for c in args.teacher_checkpoint or [] if plan.comes_later("--teacher_checkpoint", c)]
        if not later:
            cpu, size = torch.device("cpu"), protocol["input_size"]
            with torch.random.fork_rng(devices=[]):
                plan.try_to(
                    load_teachers, args.arch, args.teacher_checkpoint, images.dataset, images.folders, size, cpu
                )
        count, epochs, tflop = len(images.files), protocol["epochs"], 0.0
        for arch in args.arch:
            found = check_network(plan, "--arch", arch, len(images.folders), protocol["input_size"])
            tflop += found[0] if found else 0
        batches = -(-count // protocol["batch_size"])
        plan.output(
            "--fkd_path", args.fkd_path, epochs * label_bytes(count, len(images.folders), batches, args.use_fp16)
        )
        rate = RATES[device.type if device else "cuda"][1] / 2
        plan.time(tflop * count * epochs / rate, f"to label {epochs} epochs of {count:,} images", epochs)
        plan.host_memory("--data", 3 * count * (images.image_size or protocol["input_size"]) ** 2)


def check_images(plan, flag, images):
    """Decode a sample of a synthetic set."""
    from distillation.datasets import read_rgb

    chosen = random.Random(0).sample(images.files, min(len(images.files), SAMPLE))
    bad = []
    for file in chosen:
        try:
            read_rgb(images.root / file)
        except BadImage as error:
            bad.append(str(error))
    for text in bad[:SHOWN]:
        plan.problem(f"{flag} {text}")
    plan.note(
        f"{flag} {images.root}: {len(images.files):,} images in {len(images.folders)} classes of {images.dataset}"
    )


def check_stage_4(plan, args, device):
    from matching.generate_soft_label import load_teachers
    from matching.label_folder import open_labels
    from matching.soft_labels import PROTOCOL, load_pixels, open_images, protocol_of
    from validate.train_FKD import open_test

    if args.evaluate:
        if not Path(args.evaluate).exists():
            plan.problem(f"--evaluate {args.evaluate}: no such file")
        return
    if plan.comes_later("--train_dir", args.train_dir):
        return
    images = plan.try_to(open_images, "--train_dir", args.train_dir, args.dataset)
    if images is None:
        for flag, path in (("--fkd_path", args.fkd_path), ("--val_dir", args.val_dir)):
            if path and not Path(path).is_dir() and not plan.comes_later(flag, path):
                plan.problem(f"{flag} {path}: no such folder")
        return
    check_images(plan, "--train_dir", images)
    if images.foreign:
        _, images = plan.try_to(load_pixels, "--train_dir", images, args.num_workers) or (None, images)
    protocol = None
    if args.online or args.hard_label:
        protocol = plan.try_to(protocol_of, vars(args), images.image_size or DATASETS[images.dataset].image_size)
    elif not plan.comes_later("--fkd_path", args.fkd_path):
        found = plan.try_to(open_labels, args.fkd_path, images, vars(args), args.verify)
        if found:
            protocol = {name: found[1]["arguments"][name] for name in PROTOCOL}
            protocol["epochs"] = args.epochs or protocol["epochs"]
    if args.online and protocol:
        cpu, size = torch.device("cpu"), protocol["input_size"]
        with torch.random.fork_rng(devices=[]):
            plan.try_to(
                load_teachers,
                args.arch or ["resnet18"],
                args.teacher_checkpoint,
                images.dataset,
                images.folders,
                size,
                cpu,
            )
    test = None
    if args.val_dir is None and images.dataset != "digits":
        plan.problem(f"--val_dir: missing; the real images of {images.dataset}")
    else:
        test = plan.try_to(open_test, images.dataset, args.val_dir, images.folders)
        if test is not None:
            check_sample(plan, test, "error", "--val_dir")
            plan.note(f"--val_dir: {sum(map(len, test.items)):,} test images")
    if protocol:
        size, count = protocol["input_size"], len(images.files)
        check_training(
            plan, args, args.model, len(images.folders), size, count, protocol["epochs"], protocol["batch_size"],
            args.output_dir, device, len(args.seeds),
        )  # fmt: skip
        tested = sum(map(len, test.items)) / plan.world if test else 0
        plan.host_memory("--train_dir", int(3 * (count * (images.image_size or size) ** 2 + tested * size**2)))


CHECKS = {
    "distillation.gen_prototype": check_stage_1,
    "distillation.gen_syn_image": check_stage_2,
    "distillation.distill": check_distill,
    "distillation.random_real": check_random_real,
    "matching.train_teacher": check_teacher,
    "matching.generate_soft_label": check_stage_3,
    "validate.train_FKD": check_stage_4,
}


# ---- launchers

STAND_IN = (
    '#!/bin/sh\n{ for word in "$PWD" "$@"; do printf \'%s\\0\' "$word"; done; printf \'\\n\\0\'; } >> "$D4M_CHECK"\n'
)


def commands_of(plan, launcher, flags):
    """[(module, its flags, nodes, processes a node, folder)] of what a launcher would start, in order, and where."""
    launcher = Path(launcher)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record"
        for name in ("python", "python3", "torchrun"):
            path = Path(folder) / name
            path.write_text(STAND_IN)
            path.chmod(0o755)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHON"}
        environment |= {"PATH": f"{folder}:{os.environ.get('PATH', '')}", "D4M_CHECK": str(record)}
        try:
            run = subprocess.run(
                ["sh", str(launcher.absolute()), *flags], env=environment, cwd=launcher.parent, timeout=60,
                capture_output=True, text=True, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            plan.problem(f"{launcher}: did not end within 60 s with stand-ins for python and torchrun")
            return []
        if run.returncode:
            plan.problem(f"{launcher}: status {run.returncode}: {run.stderr.strip()[-200:]}")
        text = record.read_text() if record.exists() else ""
    found = []
    for command in text.split("\n\0"):
        words = command.split("\0")[:-1]
        if "-m" in words:
            at = words.index("-m")
            nodes, local = (torchrun_count(words[:at], name) for name in ("nnodes", "nproc_per_node"))
            found.append((words[at + 1], words[at + 2 :], nodes, local, words[0]))
    if not found:
        plan.problem(f"{launcher}: starts no stage")
    return found


def torchrun_count(words, name):
    """The value of torchrun's --`name`, `-` and `_` alike, with a blank or a `=`; the most of a range of nodes."""
    text = next(
        (value or following for flag, _, value, following in map(split_flag, words, [*words[1:], ""]) if flag == name),
        "1",
    )
    if text in ("auto", "gpu", "cpu"):
        return max(1, os.cpu_count() if text == "cpu" else torch.cuda.device_count())
    number = text.rpartition(":")[2]
    return max(1, int(number)) if number.isdecimal() else 1


def split_flag(word, following):
    flag, equals, value = word.partition("=")
    return flag.lstrip("-").replace("-", "_"), equals, value, following


def check_command(plan, module, flags, nodes, local):
    """One stage with its flags, on `nodes` machines with `local` processes each."""
    plan.note(f"\n{module}, {nodes * local} process{'es' if nodes * local > 1 else ''}")
    if module not in CHECKS:
        plan.note(f"{module}: not a stage, not checked")
        return
    args = plan.try_to(importlib.import_module(module).get_args, flags)
    if args is None:
        return
    _, shards = plan.try_to(parse_shard, args.shard) or (0, 1)
    plan.local, plan.world = local, nodes * local * shards
    if torch.cuda.is_available() and local > 1:  # is there a device for the last of them?
        plan.try_to(resolve_device, args.device, local - 1)
    device = plan.try_to(resolve_device, args.device)
    for word in ("diffusion_checkpoints_path", "label_file_path"):
        value = getattr(args, word, None)
        if word == "label_file_path" and value and not Path(value).is_file():
            plan.problem(f"--{word} {value}: no such file")
            args.label_file_path = None
    CHECKS[module](plan, args, device)


def get_args(argv=None):
    parser = Parser(prog="misc.check", description=__doc__.split("\n")[0])
    parser.add_argument("what", help=f"a launcher (a .sh file), or one of {', '.join(STAGES)}")
    # the rest belongs to what is checked: taken as it stands
    words = list(sys.argv[1:] if argv is None else argv)
    return parser.parse_args(words[:1]).what, words[1:]


@entry_point
def main(argv=None):
    what, flags = get_args(argv)
    plan = Plan()
    if what.endswith(".sh"):
        if not Path(what).is_file():
            plan.problem(f"{what}: no such launcher")
        elif shutil.which("sh") is None:
            plan.problem(f"{what}: there is no sh on this machine")
        commands = [] if plan.problems else commands_of(plan, what, flags)
    else:
        module = what.removesuffix(".py").replace("/", ".")
        if module not in CHECKS:
            plan.problem(f"{what}: expected a launcher (.sh) or one of {', '.join(STAGES)}")
        commands = [(module, flags, 1, 1, ".")] if module in CHECKS else []
    for *command, folder in commands:
        with contextlib.chdir(folder):
            check_command(plan, *command)
    plan.check_disk()
    for note in plan.notes:
        print(note)
    if commands:
        total = sum(needed for _, _, needed in plan.disk)
        print(
            f"\nin all: {duration(plan.seconds)}, {readable(total)} of disk (estimates; for a GPU, those of one H200)"
        )
    for problem in plan.problems:
        print(f"problem: {problem}", file=sys.stderr)
    if plan.problems:
        raise SystemExit(EXIT_REFUSED)
    print("no problem found")
    return plan


if __name__ == "__main__":
    main()
