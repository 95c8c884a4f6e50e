"""Teachers and students by name, and how a teacher's weights and columns are found (paper, sections 3.3 and 4.1).

    model = create_model("resnet18", num_classes=10, image_size=224)
    teacher, facts = load_teacher("resnet18", None, "imagenette", folders, 224)  # 10 columns of ImageNet's head

At 224 px these are torchvision's networks; at 64 px and below the ResNets get a 3x3 stem without max-pool, which is
the usual recipe for CIFAR and Tiny-ImageNet. The ConvNets are those of DM / MTT / TESLA: instance norm and average
pooling.
"""

import math
import re
import urllib.error
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distillation.datasets import DATASETS, WNID, known_prompts
from scripts.files import MANIFEST, is_complete, read_manifest, sha256
from scripts.runtime import refuse

PUBLIC = "torchvision"  # --teacher_checkpoint torchvision: said aloud in a launcher, it is what None means

# What torchvision's weights="DEFAULT" (the release) means today, pinned, so that a later torchvision gives the same
# labels.
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

# ---- ConvNet


def instance_norm(channels):
    """Instance norm as the ConvNets of the field write it: one group a channel, with scale and shift."""
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Sequential):
    """`depth` blocks of 3x3 convolution, instance norm, ReLU, 2x2 average pool; then one linear layer.

    Depth 3, width 128, 10 classes, 32 px: 320,010 parameters.
    """

    def __init__(self, num_classes, image_size, width=128, depth=3):
        if image_size >> depth < 1:
            refuse(f"--input_size {image_size}: too small for a ConvNet of depth {depth}")
        blocks, channels = [], 3
        for _ in range(depth):  # (B, 3, S, S) -> (B, width, S >> depth, S >> depth)
            blocks += [
                nn.Conv2d(channels, width, 3, padding=1),
                instance_norm(width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
            channels = width
        super().__init__(*blocks, nn.Flatten(), nn.Linear(width * (image_size >> depth) ** 2, num_classes))


def _convnet(width):
    """Width 128 is the field's; 64 for measurements on a CPU."""

    def build(num_classes, image_size):
        depth = 3 if image_size <= 32 else 4 if image_size <= 64 else 5
        return ConvNet(num_classes, image_size, width, depth)

    return build


def _convnet_mini(num_classes, image_size):
    """For the demo: a ConvNet of width 32, depth 2, on the image at half size; trains 4,000 images a CPU-second."""
    return nn.Sequential(nn.AvgPool2d(2), ConvNet(num_classes, image_size // 2, width=32, depth=2))


# ---- ResNetAP


class BlockAP(nn.Module):
    """Residual block of two 3x3 convolutions that halves its map by average pooling, not stride (IDC, Minimax)."""

    def __init__(self, channels_in, channels, halve):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norm1 = instance_norm(channels)
        self.pool = nn.AvgPool2d(2) if halve else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = instance_norm(channels)
        self.shortcut = nn.Identity()
        if halve or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, bias=False),
                nn.AvgPool2d(2) if halve else nn.Identity(),
                instance_norm(channels),
            )

    def forward(self, x):
        y = self.pool(F.relu(self.norm1(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _resnet_ap10(num_classes, image_size):
    """ResNetAP-10: a block a stage, instance norm; stem 7x7 + 4x4 pool above 128 px, else 3x3 (2x2 pool above 64)."""
    kernel, pool = (7, 4) if image_size > 128 else (3, 2) if image_size > 64 else (3, 1)
    widths = (64, 128, 256, 512)
    model = nn.Sequential(
        nn.Conv2d(3, 64, kernel, padding=kernel // 2, bias=False),
        instance_norm(64),
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


# ---- torchvision


def _torchvision(name):
    def build(num_classes, image_size):
        import torchvision.models  # 2 CPU-seconds, which ConvNets do not need

        size = {"image_size": image_size} if name == "vit_b_16" else {}
        if size and image_size % 16:
            refuse(f"--input_size {image_size}: {name} needs a multiple of 16")
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **size)
        if image_size <= 64:
            _small_stem(model, name, image_size)
        return model

    return build


def _small_stem(model, name, image_size):
    """The stem of small images: ResNets a 3x3 convolution without max-pool, MobileNet-V2 a stride of 1 at 32 px."""
    if name.startswith("resnet"):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif name == "mobilenet_v2" and image_size <= 32:
        model.features[0][0].stride = (1, 1)


MODELS = {
    **{name: _torchvision(name) for name in TEACHER_WEIGHTS},
    "convnet_w128": _convnet(128),
    "convnet_w64": _convnet(64),
    "convnet6": lambda num_classes, image_size: ConvNet(num_classes, image_size, 128, depth=6),
    "convnet_mini": _convnet_mini,
    "resnet_ap10": _resnet_ap10,
}


def model_name(text):
    """argparse type: a model's name, `-` and `_` taken alike except after `timm:`."""
    name = text if text.startswith("timm:") else text.replace("-", "_")
    if name not in MODELS and not name.startswith("timm:"):
        refuse(f"--model/--arch {text}: expected one of {', '.join(MODELS)}, or timm:NAME")
    return name


def create_model(name, num_classes, image_size):
    """A network from scratch: (B, 3, image_size, image_size), normalised -> (B, num_classes) logits.

    Draws its weights from PyTorch's global generator: see `training.seeded` for how the callers fix that.
    """
    if not name.startswith("timm:"):
        return MODELS[model_name(name)](num_classes, image_size)
    return _timm(name, pretrained=False, num_classes=num_classes)


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


# ---- teachers


def load_teacher(name, checkpoint, dataset, folders, image_size, flag="--teacher_checkpoint"):
    """A frozen teacher in eval mode whose columns are the classes `folders`, in that order, and what is known of it.

    checkpoint    None or "torchvision": its pinned ImageNet weights (timm's own for timm:NAME); a folder made by
                  train_teacher; or a safetensors / torch file with a state dict, also under "state_dict" or "model" or
                  with a "module." prefix
    Returns (model, facts); facts = {"arch", "weights", "sha256", "classes", "columns", "arguments"}, without any path;
    arguments: train_teacher's, None for other weights.
    """
    folders, arguments = list(folders), None
    if checkpoint == PUBLIC:
        checkpoint = None
    if checkpoint is None:
        state, weights, digest = _public_weights(name, image_size, dataset)
        owned = list(known_prompts("imagenet"))
    elif Path(checkpoint).is_dir():
        state, weights, digest, owned, arguments = _teacher_folder(name, Path(checkpoint), dataset, image_size, flag)
    else:
        state = read_state_dict(checkpoint, flag)
        weights, digest, owned = "file", sha256(checkpoint), None
    classes = _head_size(name, state, image_size, f"{flag} {checkpoint}" if checkpoint else f"{name} {weights}")
    if owned is not None and classes != len(owned):
        refuse(f"{flag} {checkpoint}: its head has {classes} classes, {len(owned)} are listed for it")
    if owned is None:
        owned = _guess_classes(classes, dataset, folders, flag, checkpoint)
    columns = _columns(owned, folders, dataset, flag, checkpoint or weights)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        model = create_model(name, len(owned), image_size)
    load_state(model, state, f"{flag} {checkpoint}" if checkpoint else f"{name} {weights}")
    model.eval().requires_grad_(False)
    if columns is not None:
        model = nn.Sequential(model, Columns(columns)).eval()
    return model, {
        "arch": name,
        "weights": weights,
        "sha256": digest,
        "classes": len(owned),
        "columns": columns,
        "arguments": arguments,
    }


class Columns(nn.Module):
    """Keeps some columns of a head: (B, 1000) logits -> (B, n)."""

    def __init__(self, columns):
        super().__init__()
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, logits):
        return logits.index_select(1, self.columns)


def ranges(numbers):
    """[0, 1, 2, 7] -> '0-2, 7'."""
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    texts = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:10], f"... {texts[-1]}"])


def _check_input(name, expects, image_size, dataset):
    """Refuse timm's weights where images do not arrive as they were trained.   expects: a model's pretrained_cfg"""
    facts, wanted = DATASETS[dataset], tuple(expects.get("input_size") or ())[-2:]
    theirs, ours = [*expects["mean"], *expects["std"]], [*facts.mean, *facts.std]
    if not all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(theirs, ours, strict=True)):
        refuse(
            f"--arch {name}: its weights are for mean {tuple(expects['mean'])} and std {tuple(expects['std'])}, "
            f"images of {dataset} have {facts.mean} and {facts.std}"
        )
    if expects.get("fixed_input_size") and wanted != (image_size, image_size):
        refuse(f"--input_size {image_size}: {name} takes {' x '.join(map(str, wanted))} px and nothing else")


def _public_weights(name, image_size, dataset):
    """(state dict, weights name, sha256) of torchvision's (or timm's) published ImageNet weights."""
    if name.startswith("timm:"):
        model = _timm(name, pretrained=True)
        _check_input(name, model.pretrained_cfg, image_size, dataset)
        state = model.state_dict()
        return state, "timm pretrained", state_digest(state)
    if name not in TEACHER_WEIGHTS:
        refuse(f"--arch {name}: nobody publishes weights for it; train some with matching.train_teacher and pass them")
    if image_size <= 64:
        refuse(
            f"--arch {name}: torchvision's weights are for 224 px, the input is {image_size} px; train a teacher with "
            "matching.train_teacher and pass it with --teacher_checkpoint"
        )
    import torchvision.models

    weights = torchvision.models.get_model_weights(name)[TEACHER_WEIGHTS[name]]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        refuse(f"--arch {name}: cannot fetch {weights.url} ({error}); fetch it elsewhere and put it at {cache}")
    return state, f"torchvision {TEACHER_WEIGHTS[name]}", state_digest(state)


def _teacher_folder(name, folder, dataset, image_size, flag):
    """(state dict, weights name, sha256, class folders, arguments) of an output of train_teacher."""
    manifest = read_manifest(flag, folder, "teacher")
    kinds = {"dataset": str, "arch": str, "image_size": int, "mean": list, "std": list, "classes": list}
    odd = next((name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)), None)
    if odd or not all(isinstance(c, dict) and isinstance(c.get("folder"), str) for c in manifest["classes"]):
        refuse(f"{flag} {folder}: its manifest does not say {odd or 'classes'}")
    facts = DATASETS[dataset]
    wnids = all(WNID.match(c["folder"]) for c in manifest["classes"])
    for what, theirs, ours in (
        ("data set", manifest["dataset"], manifest["dataset"] if wnids else dataset),
        ("architecture", manifest["arch"], name),
        ("input size", manifest["image_size"], image_size),
        ("normalisation", [manifest["mean"], manifest["std"]], [list(facts.mean), list(facts.std)]),
    ):
        if theirs != ours:
            refuse(f"{flag} {folder}: its {what} is {theirs}, here it is {ours}")
    path = folder / "model.safetensors"
    digest = sha256(path) if path.is_file() else None
    if digest is None or digest != manifest["files"].get(path.name, {}).get("sha256"):
        refuse(f"{flag} {folder}: model.safetensors is not what its manifest says: changed since it was made")
    owned = [c["folder"] for c in manifest["classes"]]
    return read_state_dict(path, flag), "train_teacher", digest, owned, manifest["arguments"]


def read_state_dict(path, flag):
    """Tensors by name from a safetensors or torch file, without unpickling any code; refuses what is none.

    Takes a plain state dict, one under "state_dict" or "model", and names with torch's "module." or "_orig_mod."
    prefix.
    """
    path = Path(path)
    if path.is_dir():
        hint = f"; it has a {MANIFEST}" if is_complete(path) else ""
        refuse(f"{flag} {path}: is a folder, expected a file{hint}")
    if not path.is_file():
        refuse(f"{flag} {path}: no such file")
    import safetensors
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise: all of it is a bad file
        reason = str(error).split("\n")[0] or type(error).__name__
        refuse(f"{flag} {path}: cannot be read as weights ({reason[:200]}); only plain tensors are loaded")
    while isinstance(state, dict) and any(isinstance(state.get(k), dict) for k in ("state_dict", "model")):
        state = next(state[k] for k in ("state_dict", "model") if isinstance(state.get(k), dict))
    if not (isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values())):
        refuse(f"{flag} {path}: holds no state dict (names with tensors), also not under 'state_dict' or 'model'")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(k)): v for k, v in state.items()}


def state_digest(state):
    """sha256 over names, shapes and values of a state dict: the same for the same weights in whatever file."""
    import hashlib

    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_state(model, state, what):
    """Load `state` into `model`; a missing, unknown or misshapen tensor is one line."""
    own = model.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    for problem, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            refuse(f"{what}: {problem} {keys[0]} ({len(keys)} such tensors): the weights of another architecture")
    if wrong:
        k = wrong[0]
        refuse(
            f"{what}: {k} has shape {list(state[k].shape)}, expected {list(own[k].shape)} ({len(wrong)} such tensors)"
        )
    model.load_state_dict(state, strict=False)


def _head_size(name, state, image_size, what):
    """Classes of the head in a state dict: the length of what is this architecture's last parameter."""
    with torch.device("meta"):
        last = list(dict(create_model(name, 2, image_size).named_parameters()))[-1]
    if last not in state or state[last].ndim != 1:
        refuse(f"{what}: lacks {last}: the weights of another architecture than {name}")
    return len(state[last])


def _guess_classes(count, dataset, folders, flag, checkpoint):
    """The class folders of a bare checkpoint: the data set's, ImageNet's for 1000 classes, or as many as the images
    have.

    Nothing in such a file says its class order; that of torchvision's ImageFolder (sorted folder names) is what every
    public training script uses.
    """
    known = list(known_prompts(dataset))
    if count == len(known):
        return known
    if count == len(folders):
        return folders
    if count == 1000:
        return list(known_prompts("imagenet"))
    refuse(f"{flag} {checkpoint}: its head has {count} classes, the images have {len(folders)} of {dataset}")


def _columns(owned, folders, dataset, flag, what):
    """Positions of `folders` among the teacher's classes `owned`; None if they are the same. Refuses another order."""
    if owned == folders:
        return None
    position = {folder: i for i, folder in enumerate(owned)}
    unknown = [folder for folder in folders if folder not in position]
    if unknown:
        if len(owned) == 1000 and not all(map(WNID.match, folders)):
            refuse(
                f"{flag} {what}: a teacher of ImageNet's 1000 classes needs class folders named by wnid (n01440764), "
                f"{dataset} has {unknown[0]!r}"
            )
        refuse(
            f"{flag} {what}: the class {unknown[0]!r} is not among the teacher's {len(owned)} ({len(unknown)} such)"
        )
    columns = [position[folder] for folder in folders]
    if columns != sorted(columns):
        k = next(i for i in range(len(columns) - 1) if columns[i] > columns[i + 1])
        refuse(
            f"{flag} {what}: its class order is not the images': {folders[k]} is column {columns[k]}, "
            f"{folders[k + 1]} is column {columns[k + 1]}"
        )
    return columns
