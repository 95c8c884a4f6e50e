"""Teachers and students by name, and how a teacher's weights are found (paper, 3.3 and 4.1).

    model = create_model("resnet18", num_classes=10, image_size=224)
    teacher, facts = load_teacher("resnet18", None, "imagenette", folders, 224)  # 10 of 1000

A new network is one entry in MODELS. At 224 px these are torchvision's; at 64 px and below the
ResNets get a 3x3 stem without max-pool, as usual for CIFAR and Tiny-ImageNet.
"""

import hashlib
import re
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from distillation import datasets
from scripts import files, output
from scripts.runtime import refuse

PUBLIC = "torchvision"  # --teacher_checkpoint torchvision: what None means, said in a launcher

# What torchvision's weights="DEFAULT" (the release) means today; a later one may choose others.
V1, V2 = "IMAGENET1K_V1", "IMAGENET1K_V2"
TEACHER_WEIGHTS = {"resnet18": V1, "resnet50": V2, "resnet101": V2, "mobilenet_v2": V2}
TEACHER_WEIGHTS |= {"efficientnet_b0": V1, "shufflenet_v2_x0_5": V1, "swin_t": V1}
TEACHER_WEIGHTS |= {"vit_b_16": V1, "vgg11": V1}

# ---- networks


class ConvNet(nn.Sequential):
    """`depth` blocks of 3x3 convolution, instance norm, ReLU, 2x2 average pool; one linear layer:
    as in DM, MTT and TESLA, whose depth is 3 up to 32 px, 4 up to 64 px, 5 above.
    """

    def __init__(self, num_classes, image_size, width=128, depth=None):
        depth = depth or (3 if image_size <= 32 else 4 if image_size <= 64 else 5)
        if image_size >> depth < 1:
            refuse(f"--input_size {image_size}: too small for a ConvNet of depth {depth}")
        blocks = []
        for n in range(depth):  # (B, 3, S, S) -> (B, width, S >> depth, S >> depth)
            blocks += [nn.Conv2d(width if n else 3, width, 3, padding=1)]
            blocks += [nn.GroupNorm(width, width)]  # instance norm with scale and shift
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
    "convnet6": partial(ConvNet, depth=6),
    # for the demo, on the image at half size: 4,000 images per CPU-second
    "convnet_mini": lambda n, size: nn.Sequential(nn.AvgPool2d(2), ConvNet(n, size // 2, 32, 2)),
    "resnet_ap10": _resnet_ap10,
}


def model_name(text):
    """argparse type: a name in MODELS, where `-` and `_` are equal, or `timm:NAME`."""
    name = text if text.startswith("timm:") else text.replace("-", "_")
    if name not in MODELS and not name.startswith("timm:"):
        refuse(f"--model/--arch {text}: expected one of {', '.join(MODELS)}, or timm:NAME")
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


def read_state_dict(path, flag):
    """{name: tensor} from a safetensors or torch file, without unpickling any code.

    A plain state dict, or one under "state_dict" or "model", without torch's "module." and
    "_orig_mod." prefixes.
    """
    unpickled = partial(torch.load, map_location="cpu", weights_only=True)
    load = safetensors.torch.load_file if Path(path).suffix == ".safetensors" else unpickled
    try:
        state = load(path)
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        reason = f"({error!s:.200}); only plain tensors are loaded"
        refuse(f"{flag} {path}: cannot be read as weights {reason}")
    for key in ("state_dict", "model"):
        inner = state.get(key) if isinstance(state, dict) else None
        state = inner if isinstance(inner, dict) else state
    if not (state and isinstance(state, dict) and all(map(torch.is_tensor, state.values()))):
        refuse(f"{flag} {path}: no state dict (names with tensors), nor under state_dict or model")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", str(k)): v for k, v in state.items()}


def load_state(model, state, what):
    """A missing, unknown or misshapen tensor is one line."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        refuse(f"{what}: the weights of another architecture: {error!s:.300}")


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
    Returns (model, facts): {"arch", "weights", "sha256", "classes", "columns", "arguments"}; the
    last are train_teacher's flags and images, else None.
    """
    folders, where, arguments, owned = list(folders), f"{flag} {checkpoint}", None, None
    if checkpoint in (None, PUBLIC):
        state, weights, digest = _public_weights(name, dataset, image_size)
        where, owned = f"{flag} {weights}: {name}", list(datasets.known_prompts("imagenet"))
    elif Path(checkpoint).is_dir():
        manifest = _teacher_manifest(name, Path(checkpoint), dataset, image_size, flag)
        state = read_state_dict(Path(checkpoint) / "model.safetensors", flag)
        weights, digest = "train_teacher", manifest["files"]["model.safetensors"]["sha256"]
        owned = [c["folder"] for c in manifest["classes"]]
        arguments = manifest["arguments"] | manifest["inputs"]
    else:
        state, weights, digest = read_state_dict(checkpoint, flag), "file", files.sha256(checkpoint)
    with torch.device("meta"):
        *_, (last, _) = create_model(name, 2, image_size).named_parameters()  # its head's bias
    if last not in state or state[last].ndim != 1:
        refuse(f"{where}: lacks {last}: the weights of another architecture than {name}")
    count = len(state[last])
    if owned is None:  # a file does not say: the data set's, the images' or ImageNet's, by name
        ours, imagenet = (list(datasets.known_prompts(of)) for of in (dataset, "imagenet"))
        owned = next((c for c in (ours, folders, imagenet) if len(c) == count), folders)
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


def _public_weights(name, dataset, image_size):
    """(state dict, name, digest of the values) of torchvision's or timm's ImageNet weights."""
    if name.startswith("timm:"):
        model, weights = _timm(name, pretrained=True), "timm pretrained"
        _check_input(name, model.pretrained_cfg, image_size, dataset)
        state = model.state_dict()
    elif name not in TEACHER_WEIGHTS or image_size <= 64:
        instead = "train a teacher with matching.train_teacher and pass it as --teacher_checkpoint"
        refuse(f"--arch {name}: nobody publishes weights for {image_size} px; {instead}")
    else:
        import torchvision.models

        weights = f"torchvision {TEACHER_WEIGHTS[name]}"
        published = torchvision.models.get_model_weights(name)[TEACHER_WEIGHTS[name]]
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
