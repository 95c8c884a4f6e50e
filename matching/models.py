"""Teachers and students by name, and how a teacher's weights are found (paper, 3.3 and 4.1).

    model = create_model("resnet18", num_classes=10, image_size=224)
    teacher, facts = load_teacher("resnet18", None, "imagenette", folders, 224)  # 10 of 1000

A new network is one entry in MODELS. At 224 px these are torchvision's networks; at 64 px and below
the ResNets get a 3x3 stem without max-pool, the usual recipe for CIFAR and Tiny-ImageNet. The
ConvNets are those of DM, MTT and TESLA: instance norm and average pooling.
"""

import hashlib
import math
import re
import urllib.error
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distillation import datasets
from scripts import files, output
from scripts.runtime import refuse

PUBLIC = "torchvision"  # --teacher_checkpoint torchvision: what None means, said in a launcher

# What torchvision's weights="DEFAULT" (the release) means today. Pinned, so that a later
# torchvision gives the same labels.
TEACHER_WEIGHTS = {
    "resnet18": "IMAGENET1K_V1",
    "resnet50": "IMAGENET1K_V2",
    "resnet101": "IMAGENET1K_V2",
    "mobilenet_v2": "IMAGENET1K_V2",
    "efficientnet_b0": "IMAGENET1K_V1",
    "shufflenet_v2_x0_5": "IMAGENET1K_V1",
    "swin_t": "IMAGENET1K_V1",
    "vit_b_16": "IMAGENET1K_V1",
    "vgg11": "IMAGENET1K_V1",
}

# ---- networks


class ConvNet(nn.Sequential):
    """`depth` blocks of 3x3 convolution, instance norm, ReLU, 2x2 average pool; one linear layer.

    Depth 3, width 128, 10 classes, 32 px: 320,010 parameters. The field's depth is 3 up to 32 px,
    4 up to 64 px, 5 above.
    """

    def __init__(self, num_classes, image_size, width=128, depth=None):
        depth = depth or (3 if image_size <= 32 else 4 if image_size <= 64 else 5)
        if image_size >> depth < 1:
            refuse(f"--input_size {image_size}: too small for a ConvNet of depth {depth}")
        blocks, channels = [], 3
        for _ in range(depth):  # (B, 3, S, S) -> (B, width, S >> depth, S >> depth)
            blocks += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(width, width),  # instance norm with scale and shift
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
            channels = width
        head = nn.Linear(width * (image_size >> depth) ** 2, num_classes)
        super().__init__(*blocks, nn.Flatten(), head)


def _convnet_mini(num_classes, image_size):
    """For the demo: width 32, depth 2, on the image at half size; 4,000 images per CPU-second."""
    return nn.Sequential(nn.AvgPool2d(2), ConvNet(num_classes, image_size // 2, width=32, depth=2))


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
            norm = nn.GroupNorm(channels, channels)
            self.shortcut = nn.Sequential(conv, nn.AvgPool2d(2), norm)

    def forward(self, x):
        y = self.pool(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _resnet_ap10(num_classes, image_size):
    """ResNetAP-10: one block per stage, instance norm.

    Stem: 7x7 and a 4x4 pool above 128 px, else 3x3 (and a 2x2 pool above 64 px).
    """
    kernel, pool = (7, 4) if image_size > 128 else (3, 2) if image_size > 64 else (3, 1)
    widths = (64, 128, 256, 512)
    model = nn.Sequential(
        nn.Conv2d(3, 64, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(64, 64),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(pool),
        *[BlockAP(widths[max(i - 1, 0)], width, halve=i > 0) for i, width in enumerate(widths)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _torchvision(name):
    def build(num_classes, image_size):
        import torchvision.models  # 2 CPU-seconds, which ConvNets do not need

        size = {"image_size": image_size} if name == "vit_b_16" else {}
        if size and image_size % 16:
            refuse(f"--input_size {image_size}: {name} needs a multiple of 16")
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **size)
        if image_size <= 64 and name.startswith("resnet"):
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
        elif image_size <= 32 and name == "mobilenet_v2":
            model.features[0][0].stride = (1, 1)
        return model

    return build


# {name: function of (num_classes, image_size) that builds it}; a new network is one line
MODELS = {
    **{name: _torchvision(name) for name in TEACHER_WEIGHTS},
    "convnet_w128": lambda num_classes, image_size: ConvNet(num_classes, image_size, 128),
    "convnet_w64": lambda num_classes, image_size: ConvNet(num_classes, image_size, 64),
    "convnet6": lambda num_classes, image_size: ConvNet(num_classes, image_size, 128, depth=6),
    "convnet_mini": _convnet_mini,
    "resnet_ap10": _resnet_ap10,
}


def model_name(text):
    """argparse type: a network's name; `-` and `_` are equal, except after `timm:`."""
    name = text if text.startswith("timm:") else text.replace("-", "_")
    if name not in MODELS and not name.startswith("timm:"):
        refuse(f"--model/--arch {text}: expected one of {', '.join(MODELS)}, or timm:NAME")
    return name


def create_model(name, num_classes, image_size):
    """A new network: (B, 3, image_size, image_size), normalised -> (B, num_classes) logits.

    Draws its weights from PyTorch's global generator; callers set that with `training.seeded`.
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


def read_state_dict(path, flag):
    """{name: tensor} from a safetensors or torch file, without unpickling any code.

    Takes a plain state dict, or one under "state_dict" or "model", and drops torch's "module." and
    "_orig_mod." prefixes. Refuses everything else.
    """
    path = Path(path)
    if not path.is_file():
        refuse(
            f"{flag} {path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}"
        )
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        refuse(
            f"{flag} {path}: cannot be read as weights ({reason}); only plain tensors are loaded"
        )
    while isinstance(state, dict) and (
        inner := [state[k] for k in ("state_dict", "model") if isinstance(state.get(k), dict)]
    ):
        state = inner[0]
    if not (state and isinstance(state, dict) and all(map(torch.is_tensor, state.values()))):
        refuse(f"{flag} {path}: no state dict (names with tensors), nor under state_dict or model")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(k)): v for k, v in state.items()}


def load_state(model, state, what):
    """Load `state` into `model`; a missing, unknown or misshapen tensor is one line."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:])[:300]
        refuse(f"{what}: the weights of another architecture: {reason}")


def state_digest(state):
    """sha256 over names, shapes and values: equal for equal weights in whatever file."""
    import safetensors.torch

    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    return hashlib.sha256(safetensors.torch.save(plain)).hexdigest()


# ---- teachers


class Columns(nn.Module):
    """Keeps some columns of a head: (B, 1000) logits -> (B, n)."""

    def __init__(self, columns):
        super().__init__()
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, logits):
        return logits.index_select(1, self.columns)


def load_teacher(name, checkpoint, dataset, folders, image_size, flag="--teacher_checkpoint"):
    """A frozen teacher in eval mode whose columns are the classes `folders`, in that order.

    checkpoint   None or "torchvision": its pinned ImageNet weights (timm's own for timm:NAME); a
                 folder made by train_teacher; or a file that `read_state_dict` takes
    Returns (model, facts); facts = {"arch", "weights", "sha256", "classes", "columns",
    "arguments"}, without any path; arguments: train_teacher's flags and images, else None.
    """
    folders, where, arguments, owned = list(folders), f"{flag} {checkpoint}", None, None
    if checkpoint in (None, PUBLIC):
        state, weights = _public_weights(name, image_size, dataset)
        digest, owned = state_digest(state), list(datasets.known_prompts("imagenet"))
        where = f"{flag} {weights}: {name}"
    elif Path(checkpoint).is_dir():
        manifest = _teacher_manifest(name, Path(checkpoint), dataset, image_size, flag)
        state = read_state_dict(Path(checkpoint) / "model.safetensors", flag)
        weights, digest = "train_teacher", manifest["files"]["model.safetensors"]["sha256"]
        owned = [c["folder"] for c in manifest["classes"]]
        arguments = manifest["arguments"] | manifest["inputs"]
    else:
        state, weights, digest = read_state_dict(checkpoint, flag), "file", files.sha256(checkpoint)
    count = _head_size(name, state, image_size, where)
    owned = owned or _guess_classes(count, dataset, folders, where)
    if count != len(owned):
        refuse(f"{where}: its head has {count} classes, expected {len(owned)}")
    columns = _columns(owned, folders, dataset, where)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        model = create_model(name, count, image_size)
    load_state(model, state, where)
    model.eval().requires_grad_(False)
    if columns is not None:
        model = nn.Sequential(model, Columns(columns)).eval()
    facts = {"arch": name, "weights": weights, "sha256": digest, "classes": count}
    return model, {**facts, "columns": columns, "arguments": arguments}


def _public_weights(name, image_size, dataset):
    """(state dict, what they are called) of torchvision's or timm's published ImageNet weights."""
    if name.startswith("timm:"):
        model = _timm(name, pretrained=True)
        _check_input(name, model.pretrained_cfg, image_size, dataset)
        return model.state_dict(), "timm pretrained"
    train = "train a teacher with matching.train_teacher and pass it with --teacher_checkpoint"
    if name not in TEACHER_WEIGHTS:
        refuse(f"--arch {name}: nobody publishes weights for it; {train}")
    if image_size <= 64:
        refuse(
            f"--arch {name}: torchvision's are for 224 px, the input is {image_size} px; {train}"
        )
    import torchvision.models

    weights = torchvision.models.get_model_weights(name)[TEACHER_WEIGHTS[name]]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        elsewhere = f"fetch it elsewhere and put it at {cache}"
        refuse(f"--arch {name}: cannot fetch {weights.url} ({error}); {elsewhere}")
    return state, f"torchvision {TEACHER_WEIGHTS[name]}"


def _check_input(name, expects, image_size, dataset):
    """Refuse timm's weights for images that do not arrive as in its pretrained_cfg, `expects`."""
    facts = datasets.ALL[dataset]
    theirs, ours = [*expects["mean"], *expects["std"]], [*facts.mean, *facts.std]
    if not all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(theirs, ours, strict=True)):
        refuse(
            f"--arch {name}: its weights are for mean {tuple(expects['mean'])} and std "
            f"{tuple(expects['std'])}, images of {dataset} have {facts.mean} and {facts.std}"
        )
    wanted = tuple(expects.get("input_size") or ())[-2:]
    if expects.get("fixed_input_size") and wanted != (image_size, image_size):
        size = " x ".join(map(str, wanted))
        refuse(f"--input_size {image_size}: {name} takes {size} px and nothing else")


def _teacher_manifest(name, folder, dataset, image_size, flag):
    """The manifest of a folder made by train_teacher, for this data set, network and size."""
    manifest, facts = output.read_manifest(flag, folder, "teacher"), datasets.ALL[dataset]
    if all(datasets.WNID.match(c["folder"]) for c in manifest["classes"]):
        dataset = manifest["dataset"]  # such folders mean the same class in every data set
    for what, theirs, ours in (
        ("data set", manifest["dataset"], dataset),
        ("architecture", manifest["arch"], name),
        ("input size", manifest["image_size"], image_size),
        ("normalisation", [manifest["mean"], manifest["std"]], [[*facts.mean], [*facts.std]]),
    ):
        if theirs != ours:
            refuse(f"{flag} {folder}: its {what} is {theirs}, here it is {ours}")
    output.check_file(flag, folder, "model.safetensors", manifest)
    return manifest


def _head_size(name, state, image_size, where):
    """Classes of a state dict: the length of what is this architecture's last parameter."""
    with torch.device("meta"):
        *_, (last, _) = create_model(name, 2, image_size).named_parameters()
    if last not in state or state[last].ndim != 1:
        refuse(f"{where}: lacks {last}: the weights of another architecture than {name}")
    return len(state[last])


def _guess_classes(count, dataset, folders, where):
    """Class folders of a bare checkpoint: the data set's, the images', or ImageNet's for 1000.

    Nothing in such a file says its class order. Every public training script has that of
    torchvision's ImageFolder: sorted folder names.
    """
    for owned in (datasets.known_prompts(dataset), folders, datasets.known_prompts("imagenet")):
        if len(owned) == count:
            return list(owned)
    refuse(f"{where}: its head has {count} classes, the images have {len(folders)} of {dataset}")


def _columns(owned, folders, dataset, where):
    """Positions of `folders` among the teacher's classes; None if they are the same list."""
    if owned == folders:
        return None
    position = {folder: i for i, folder in enumerate(owned)}
    unknown = [folder for folder in folders if folder not in position]
    if unknown and len(owned) == 1000 and not all(map(datasets.WNID.match, folders)):
        refuse(
            f"{where}: a teacher of ImageNet's 1000 classes needs class folders named by wnid "
            f"(n01440764), {dataset} has {unknown[0]!r}"
        )
    if unknown:
        refuse(f"{where}: the class {unknown[0]!r} is not among the teacher's {len(owned)}")
    columns = [position[folder] for folder in folders]
    for k in range(1, len(columns)):
        if columns[k - 1] > columns[k]:
            a, b = (f"{folders[i]} is column {columns[i]}" for i in (k - 1, k))
            refuse(f"{where}: its class order is not the images': {a}, {b}")
    return columns


def ranges(numbers):
    """[0, 1, 2, 7] -> '0-2, 7', at most 12 parts."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[n for _, n in run] for _, run in runs]
    texts = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:10], f"... {texts[-1]}"])
