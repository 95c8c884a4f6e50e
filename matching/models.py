"""Teachers and students by name, and how a teacher's weights are found (paper, 3.3 and 4.1).

    model = create_model("resnet18", num_classes=10, image_size=224)
    teacher, facts = load_teacher("resnet18", None, "imagenette", folders, 224)  # 10 of 1000

A new network is one entry in MODELS. At 224 px these are torchvision's; at 64 px and below the
ResNets get a 3x3 stem without max-pool, as usual for CIFAR and Tiny-ImageNet.
"""

import argparse
import codecs
import hashlib
import re
import types
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path, PosixPath

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from distillation import datasets
from scripts import files, output
from scripts.runtime import one_line, refuse, warn

# --teacher_checkpoint torchvision: what None means, said in a launcher; torchvision:IMAGENET1K_V1
PUBLIC = "torchvision"

# What torchvision's weights="DEFAULT" (the release) means today; a later one may choose others.
V1, V2 = "IMAGENET1K_V1", "IMAGENET1K_V2"
TEACHER_WEIGHTS = {"resnet18": V1, "resnet50": V2, "resnet101": V2, "mobilenet_v2": V2}
TEACHER_WEIGHTS |= {"efficientnet_b0": V1, "shufflenet_v2_x0_5": V1, "swin_t": V1}
TEACHER_WEIGHTS |= {"vit_b_16": V1, "vgg11": V1, "swin_v2_t": V1, "alexnet": V1}

# ---- networks


class ConvNet(nn.Sequential):
    """`depth` blocks of 3x3 convolution, instance norm, ReLU, 2x2 average pool; one linear layer:
    as in DM, MTT and TESLA, whose depth is 3 up to 32 px, 4 up to 64 px, 5 above.
    """

    def __init__(self, num_classes, image_size, width=128, depth=None, norm=None):
        depth = depth or (3 if image_size <= 32 else 4 if image_size <= 64 else 5)
        if image_size >> depth < 1:
            refuse(f"--input_size {image_size}: too small for a ConvNet of depth {depth}")
        blocks = []
        for n in range(depth):  # (B, 3, S, S) -> (B, width, S >> depth, S >> depth)
            blocks += [nn.Conv2d(width if n else 3, width, 3, padding=1)]
            # instance norm with scale and shift
            blocks += [norm(width) if norm else nn.GroupNorm(width, width)]
            blocks += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        head = nn.Linear(width * (image_size >> depth) ** 2, num_classes)
        super().__init__(*blocks, nn.Flatten(), head)


class BlockAP(nn.Module):
    """Residual block that halves its map by average pooling, not by stride (IDC, Minimax)."""

    def __init__(self, channels_in, channels, halve):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(channels, channels)
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(channels, channels)
        self.shortcut = nn.Identity()
        if halve:
            conv = nn.Conv2d(channels_in, channels, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.AvgPool2d(2), nn.GroupNorm(channels, channels))

    def forward(self, x):
        y = self.pool(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _resnet_ap10(num_classes, image_size):
    """ResNetAP-10 (Minimax): one block per stage, instance norm."""
    kernel, pool = (7, 4) if image_size > 128 else (3, 2) if image_size > 64 else (3, 1)
    widths = (64, 128, 256, 512)
    layers = [nn.Conv2d(3, 64, kernel, padding=kernel // 2, bias=False), nn.GroupNorm(64, 64)]
    layers += [nn.ReLU(inplace=True), nn.AvgPool2d(pool)]
    layers += [BlockAP(widths[max(i - 1, 0)], width, i > 0) for i, width in enumerate(widths)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _torchvision(name, num_classes, image_size):
    import torchvision.models  # 2 CPU-seconds, which ConvNets do not need

    size = {"image_size": image_size} if name == "vit_b_16" else {}
    if size and image_size % 16:
        refuse(f"--input_size {image_size}: {name} needs a multiple of 16")
    if name == "alexnet" and image_size < 63:
        refuse(f"--input_size {image_size}: {name} needs 63 px")
    model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **size)
    if image_size <= 64 and name.startswith("resnet"):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif image_size <= 32 and name == "mobilenet_v2":
        model.features[0][0].stride = (1, 1)
    return model


# {name: function of (num_classes, image_size) that builds it}; a new network is one line
MODELS = {
    **{name: partial(_torchvision, name) for name in TEACHER_WEIGHTS},
    "convnet_w128": ConvNet,
    "convnet_w64": partial(ConvNet, width=64),
    "convnet_bn": partial(ConvNet, norm=nn.BatchNorm2d),  # RDED's
    "convnet6": partial(ConvNet, depth=6),
    # for the demo, on the image at half size: 4,000 images per CPU-second
    "convnet_mini": lambda n, size: nn.Sequential(nn.AvgPool2d(2), ConvNet(n, size // 2, 32, 2)),
    "resnet_ap10": _resnet_ap10,
}


def known_names():
    """All of MODELS, for messages and --help."""
    return f"{', '.join(MODELS)}, or timm:NAME"


def model_name(text):
    """argparse type: a name in MODELS, where `-` and `_` are equal, or `timm:NAME`."""
    name = text if text.startswith("timm:") else text.replace("-", "_")
    if name not in MODELS and not name.startswith("timm:"):
        refuse(f"--model/--arch {text}: expected one of {known_names()}")
    return name


def create_model(name, num_classes, image_size):
    """A new network: (B, 3, image_size, image_size), normalised -> (B, num_classes) logits.

    Its weights come from PyTorch's global generator: see `training.seeded`.
    """
    if name.startswith("timm:"):
        return _timm(name, pretrained=False, num_classes=num_classes)
    return MODELS[model_name(name)](num_classes, image_size)


def _timm(name, **options):
    try:
        import timm
    except ImportError:
        refuse(f"--model/--arch {name}: timm is not installed; pip install timm")
    try:
        return timm.create_model(name.removeprefix("timm:"), **options)
    except (RuntimeError, ValueError, OSError) as error:
        refuse(f"--model/--arch {name}: {error}")


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def parameters_of(build):
    """Number of parameters of what `build()` makes, without drawing them."""
    with torch.device("meta"):
        return count_parameters(build())


# ---- weights


# what training scripts save beside the weights: values, whose making runs no code of the file
VALUES = [argparse.Namespace, types.SimpleNamespace, Path, PosixPath, datetime, timedelta]
VALUES += [codecs.encode, np.dtype, np.ndarray]
VALUES += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
for made_by in (np._core.multiarray.scalar, np._core.multiarray._reconstruct):  # of numpy 1 and 2
    VALUES += [(made_by, f"numpy.{c}.multiarray.{made_by.__name__}") for c in ("core", "_core")]
# where they save the weights: taken if a file has several that hold some, such as an average
USUAL = {"state_dict", "model", "model_state_dict", "net", "network", "weights"}
# CIFAR's usual ResNets; FSDP and activation checkpoints
RENAMED = {r"\blinear\.": "fc.", r"\bshortcut\.": "downsample.", r"\b_\w+_wrapped_module\.": ""}
# what training keeps beside a network and a network does without; any other tensor is refused
UNUSED = re.compile(r"(?i)\w*(criterion|loss|ema|averaged|metric|acc|top\d|teacher)\w*(\.|$)")
# under these a file says its classes, in order: a list, {name: column} or {column: name}
CLASS_KEYS = {"class_to_idx", "idx_to_class", "classes", "class_names", "id2label", "label2id"}


def _no_weights(path):
    """What a file that does not load is, by its first bytes; "" where they do not tell."""
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer: fetch the file itself with git lfs pull"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "an HTML page: download the file again"
    is_other = head[8:10] == b'{"' and Path(path).suffix != ".safetensors"
    return "a safetensors file: rename it to .safetensors" if is_other else ""


def read_state_dict(path, flag):
    """{name: tensor} of a file that `read_weights` takes."""
    return read_weights(path, flag)[0]


def read_weights(path, flag):
    """({name: tensor}, its class names in order or None) from a safetensors or torch file, without
    unpickling any code.

    A plain state dict, or one in the wrappings of training scripts: {"net": ..., "epoch": 9}.
    """
    if not Path(path).is_file():
        refuse(f"{flag} {path}: no such file")
    unpickled = partial(torch.load, map_location="cpu", weights_only=True)
    load = safetensors.torch.load_file if Path(path).suffix == ".safetensors" else unpickled
    try:
        with torch.serialization.safe_globals(VALUES):
            found = load(path)
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        if kind := _no_weights(path):
            refuse(f"{flag} {path}: it is {kind}")
        text = one_line(error).split("WeightsUnpickler error: ")[-1].split(" Check the doc")[0]
        alien = re.search(r"GLOBAL (\S+)|(TorchScript)", text)
        what = f"cannot be read as weights ({text or type(error).__name__:.200})"
        if alien:
            load = f'x = torch.load("{path}", weights_only={False})'  # what others may run, not we
            load = f'x = torch.jit.load("{path}")' if alien[2] else load
            save = 'torch.save(x.state_dict(), "weights.pth"), or x["state_dict"] if x is a dict'
            what = (
                f"holds {alien[0].split()[-1]}; if you trust it, save its weights: {load}; {save}"
            )
        refuse(f"{flag} {path}: {what}; only plain tensors are loaded")
    level = {"": found}
    for _ in range(4):
        level = {where: inner for where, inner in level.items() if isinstance(inner, dict)}
        states = {w: {k: v for k, v in d.items() if torch.is_tensor(v)} for w, d in level.items()}
        states = {w: d for w, d in states.items() if any(str(k).endswith("weight") for k in d)}
        if states:
            break
        level = {str(key): inner for outer in level.values() for key, inner in outer.items()}
    taken = states if len(states) == 1 else USUAL & states.keys()
    if len(taken) != 1:
        held = ", ".join(map(str, states or (found if isinstance(found, dict) else [])))
        held = held or f"a {type(found).__name__}"
        what = "several that may be the weights" if states else "no state dict (names with tensors)"
        refuse(f"{flag} {path}: {what}: it holds {held:.200}")
    [name] = taken
    if len(states) > 1:
        warn(f"{flag} {path}: taken are the weights called {name}, of {', '.join(states)}")
    return {str(key): value for key, value in states[name].items()}, _class_order(found)


def _class_order(found):
    """The class names that a file of weights says, in the order of its columns, or None."""
    found = vars(found) if isinstance(found, argparse.Namespace) else found
    for key, inner in found.items() if isinstance(found, dict) else ():
        if key in CLASS_KEYS and isinstance(inner, (dict, list, tuple)):
            rows = inner.items() if isinstance(inner, dict) else enumerate(inner)
            rows = [(b, a) if isinstance(b, int) else (a, b) for a, b in rows]
            if all(isinstance(b, str) and str(a).isdecimal() for a, b in rows):
                return [b for _, b in sorted(rows, key=lambda row: int(row[0]))]
        elif order := _class_order(inner):
            return order
    return None


def fitted(state, model, what):
    """The tensors of `state` by their names in `model`, without the prefixes that wrappers add:
    "module.", "_orig_mod.", "model.backbone." (whose head may stand outside)."""
    names = [name for name in model.state_dict() if "num_batches" not in name]
    renamed = dict(state)
    for pattern, ours in RENAMED.items():
        renamed = {re.sub(pattern, ours, key): value for key, value in renamed.items()}
    for known in (state, renamed):
        ends = [key for key in known if f".{key}".endswith(f".{names[0]}")]
        prefixes = [key.removesuffix(names[0]) for key in ends]
        fit = [p for p in prefixes if all(p + n in known or n in known for n in names)]
        if len(fit) > 1 and "" not in fit:
            refuse(f"{what}: holds several networks: {', '.join(fit)}")
        if fit:
            prefix = "" if "" in fit else fit[0]
            needed = {n for name in names for n in (name, prefix + name)}
            kept = {k: v for k, v in known.items() if k in needed or not UNUSED.match(k)}
            own = {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)}
            return {k: v for k, v in kept.items() if not k.startswith(prefix)} | own
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): v for key, v in state.items()}


def load_state(model, state, what):
    """A missing, unknown or misshapen tensor, or one of integers or with NaN, is one line."""
    state, own = fitted(state, model, what), model.state_dict()
    for name in filter(lambda name: name in state and own[name].is_floating_point(), own):
        value = state[name]
        if not value.is_floating_point() or value.element_size() < 2:
            refuse(f"{what}: {name} is of {value.dtype}: quantised weights are not taken")
        if value.layout != torch.strided or value.is_meta:
            refuse(f"{what}: {name} is sparse, or without values")
        if not value.float().isfinite().all():
            refuse(f"{what}: {name} holds NaN or infinite values")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        refuse(f"{what}: the weights of another architecture: {error!s:.300}")


def check_single(build, size, what):
    """Refuse a network that cannot train on one image alone: BatchNorm of a single value."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            build().train()(torch.zeros(1, 3, size, size))
        except ValueError as error:
            refuse(f"{what} cannot train on one image at a time: BatchNorm: {error}")


# ---- teachers


class Columns(nn.Module):
    """Keeps some columns of a head: (B, 1000) logits -> (B, n)."""

    def __init__(self, columns):
        super().__init__()
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, logits):
        return logits.index_select(1, self.columns)


def is_public(checkpoint):
    """Whether --teacher_checkpoint means torchvision's or timm's weights."""
    return checkpoint is None or str(checkpoint).split(":")[0] == PUBLIC


def load_teacher(name, checkpoint, dataset, folders, image_size, flag="--teacher_checkpoint"):
    """A frozen teacher in eval mode whose columns are the classes `folders`, in that order.

    checkpoint   None or "torchvision": its pinned ImageNet weights (timm's own for timm:NAME);
                 "torchvision:IMAGENET1K_V1": those; a folder made by train_teacher; or a file
                 that `read_state_dict` takes
    Returns (model, facts): {"arch", "weights", "sha256", "classes", "columns", "arguments"}; the
    last are train_teacher's flags and images, else None.
    """
    folders = [datasets.nfc(folder) for folder in folders]
    where, arguments, owned, said = f"{flag} {checkpoint}", None, None, None
    is_file_name = Path(str(checkpoint)).suffix[1:].isalpha()  # teacher.pth, not convnet_lr0.05
    if is_public(checkpoint):
        chosen = str(checkpoint or "").partition(":")[2]
        state, weights, digest = _public_weights(name, dataset, image_size, chosen)
        where, owned = f"{flag} {weights}: {name}", list(datasets.known_prompts("imagenet"))
    elif Path(checkpoint).is_dir() or not (Path(checkpoint).exists() or is_file_name):
        manifest = _teacher_manifest(name, Path(checkpoint), dataset, image_size, flag)
        state = read_state_dict(Path(checkpoint) / "model.safetensors", flag)
        weights, digest = "train_teacher", manifest["files"]["model.safetensors"]["sha256"]
        owned = [datasets.nfc(c["folder"]) for c in manifest["classes"]]
        arguments = manifest["arguments"] | manifest["inputs"]
    else:
        state, said = read_weights(checkpoint, flag)
        weights, digest = "file", files.sha256(checkpoint)
        state = _without_colours(state, dataset, where)
    with torch.device("meta"):
        model = create_model(name, 2, image_size)
    state, [*_, (last, _)] = fitted(state, model, where), model.named_parameters()  # a head's bias
    if last not in state or state[last].ndim != 1:
        refuse(f"{where}: lacks {last}: the weights of another architecture than {name}")
    count = len(state[last])
    if owned is None:  # a file does not say: the data set's, the images' or ImageNet's, by name
        ours, imagenet = (list(datasets.known_prompts(of)) for of in (dataset, "imagenet"))
        owned = next((c for c in (ours, folders, imagenet) if len(c) == count), folders)
    if said and len(said) == count == len(owned):  # an unknown name counts by its place
        prompts = datasets.known_prompts("imagenet") | datasets.known_prompts(dataset)
        called = {c: f"{c}, {prompts.get(c, '')}".casefold().split(", ") for c in owned}
        said = [datasets.nfc(name).casefold() for name in said]
        owned = [next((c for c in (o, *owned) if n in called[c]), o) for n, o in zip(said, owned)]
    if count != len(owned):
        refuse(f"{where}: its head has {count} classes, expected {len(owned)} of {dataset}")
    unknown = [folder for folder in folders if folder not in owned]
    if unknown:
        known = f"the teacher's {len(owned)}, such as {owned[0]!r}"
        refuse(f"{where}: the class {unknown[0]!r} of {dataset} is not among {known}")
    columns = None if owned == folders else [owned.index(folder) for folder in folders]
    if columns and columns != sorted(columns):
        refuse(f"{where}: its class order is not the images': they are its columns {columns[:20]}")
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        model = create_model(name, count, image_size)
    load_state(model, state, where)
    model = nn.Sequential(model, Columns(columns)) if columns else model
    facts = {"arch": name, "weights": weights, "sha256": digest, "classes": count}
    return model.eval().requires_grad_(False), {**facts, "columns": columns, "arguments": arguments}


def _without_colours(state, dataset, where):
    """`state` without the colours of a layer that normalises its input, which must be ours."""
    for key, value in [*state.items()]:
        match = re.search(r"(?:^|\W|_)(?<!running_)(mean|std)$", key)
        if match and value.numel() in (1, 3):
            theirs, ours = value.flatten().tolist(), getattr(datasets.ALL[dataset], match[1])
            if not np.allclose(theirs, ours, atol=1e-3):
                refuse(f"{where}: its {key} is {theirs}, images of {dataset} have {[*ours]}")
            del state[key]
    return state


def _public_weights(name, dataset, image_size, chosen=""):
    """(state dict, name, digest of the values) of torchvision's or timm's ImageNet weights."""
    if chosen and name.startswith("timm:"):
        refuse(f"--teacher_checkpoint {PUBLIC}:{chosen}: timm's weights are part of {name}")
    if name.startswith("timm:"):
        model, weights = _timm(name, pretrained=True), "timm pretrained"
        _check_input(name, model.pretrained_cfg, image_size, dataset)
        state = model.state_dict()
    elif name not in TEACHER_WEIGHTS or image_size <= 64:
        instead = "train a teacher with matching.train_teacher and pass it as --teacher_checkpoint"
        refuse(f"--arch {name}: nobody publishes weights for {image_size} px; {instead}")
    else:
        import torchvision.models

        known, chosen = torchvision.models.get_model_weights(name), chosen or TEACHER_WEIGHTS[name]
        if chosen not in known.__members__:
            has = f"{name} has {', '.join(known.__members__)}"
            refuse(f"--teacher_checkpoint {PUBLIC}:{chosen}: {has}")
        weights, published = f"torchvision {chosen}", known[chosen]
        try:
            state = published.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no route, a firewall's page instead of the file
            cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
            elsewhere = f"fetch it elsewhere and put it at {cache}"
            refuse(f"--arch {name}: cannot fetch {published.url} ({error}); {elsewhere}")
    plain = {name: value.contiguous().clone() for name, value in state.items()}
    return state, weights, hashlib.sha256(safetensors.torch.save(plain)).hexdigest()


def _check_input(name, expects, image_size, dataset):
    """Refuse timm's weights for images that do not arrive as in its pretrained_cfg, `expects`."""
    for what in ("mean", "std"):
        theirs, ours = tuple(expects[what]), getattr(datasets.ALL[dataset], what)
        if any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
            images = f"images of {dataset} have {ours}"
            refuse(f"--arch {name}: its weights are for {what} {theirs}, {images}")
    wanted = tuple(expects.get("input_size") or ())[-2:]
    if expects.get("fixed_input_size") and wanted != (image_size, image_size):
        size = " x ".join(map(str, wanted))
        refuse(f"--input_size {image_size}: {name} takes {size} px and nothing else")


def _teacher_manifest(name, folder, dataset, image_size, flag):
    """The manifest of a folder made by train_teacher, for this data set, network and size."""
    manifest, facts = output.read_manifest(flag, folder, "teacher"), datasets.ALL[dataset]
    if all(datasets.WNID.match(c["folder"]) for c in manifest["classes"]):
        dataset = manifest["dataset"]  # such folders mean the same class in every data set
    ours = {"dataset": dataset, "arch": name, "image_size": image_size}
    for what, value in {**ours, "mean": list(facts.mean), "std": list(facts.std)}.items():
        if manifest[what] != value:
            refuse(f"{flag} {folder}: its {what} is {manifest[what]}, here it is {value}")
    output.check_file(flag, folder, "model.safetensors", manifest)
    return manifest
