"""What training a teacher and training a student share: optimiser, schedule, exact accumulation, evaluation,
checkpoints.

A global batch is cut into chunks of `bn_batch` images, which is what BatchNorm sees together; each chunk is one
forward and backward pass, its loss is its sum over the images of the *whole* batch, and the ranks' gradients are
summed. So the gradient is that of the whole batch for any number of chunks, accumulation steps and processes, also for
the short last batch.
"""

import contextlib
import copy
import io
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from distillation.datasets import DATASETS, BadImage, squash
from matching.soft_labels import fits_gpu, in_threads, normalise
from scripts.files import atomic, check_unit, settings_digest
from scripts.runtime import positive_int, refuse, seed_of

# ---- optimiser, schedule


def parameter_groups(model, weight_decay):
    """Weight decay on matrices and convolutions only, as the release."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model, sgd, lr, weight_decay, momentum=0.9, fused=False):
    groups = parameter_groups(model, weight_decay)
    options = {"fused": True} if fused else {}
    if sgd:
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, **options)
    return torch.optim.AdamW(groups, lr=lr, **options)


def lr_factor(schedule, epoch, epochs, cos_stretch=1.0, warmup_epochs=0, step_factor=0.2):
    """Learning rate of `epoch` (0-based) over the peak.

    cosine   (1 + cos(pi t / (Z E))) / 2: to 0 for Z = 1 (the release's --cos), to half for Z = 2 (RDED, EDC; RD3's
             zeta)
    linear   1 - t / E (the release without --cos)
    step     x step_factor at 2/3 and 5/6 of the epochs (Minimax)
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    t, total = epoch - warmup_epochs, epochs - warmup_epochs
    if schedule == "cosine":
        return (1 + math.cos(math.pi * t / (cos_stretch * total))) / 2
    if schedule == "linear":
        return 1 - t / total
    if schedule == "constant":
        return 1.0
    return step_factor ** sum(epoch >= milestone for milestone in (2 * epochs // 3, 5 * epochs // 6))


def check_warmup(warmup_epochs, epochs):
    """Refuse a warm-up that never ends."""
    if warmup_epochs >= epochs:
        refuse(f"--warmup_epochs {warmup_epochs}: not below the {epochs} epochs of training")


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- losses


def soft_loss(outputs, logits, temperature):
    """KL(teacher || student) summed over the rows, both at temperature T and without T^2, as the release."""
    log_p = F.log_softmax(outputs / temperature, 1)
    q = F.softmax(logits.to(outputs.dtype) / temperature, 1)
    return F.kl_div(log_p, q, reduction="sum")


def hard_loss(outputs, targets, other, lam):
    """Cross-entropy on class indices, mixed by lambda, summed over the rows.   targets, other (B,)"""
    loss = F.cross_entropy(outputs, targets, reduction="sum")
    if lam == 1:
        return loss
    return lam * loss + (1 - lam) * F.cross_entropy(outputs, other, reduction="sum")


def mse_ce_loss(outputs, logits, targets, other, lam, ce_weight):
    """EDC: mean squared error of the logits (mean over classes) + ce_weight x cross-entropy, summed over the rows."""
    mse = F.mse_loss(outputs, logits.to(outputs.dtype), reduction="sum") / outputs.shape[1]
    return mse + ce_weight * hard_loss(outputs, targets, other, lam)


def checked_loss(loss, epoch, flag):
    """The mean loss of an epoch; refuses to go on from one that is no number: none that follows would be."""
    if not math.isfinite(loss):
        refuse(f"epoch {epoch}: the loss is {loss}; lower {flag}")
    return loss


# ---- colours (Minimax's hard-label protocol)

GRAY = (0.299, 0.587, 0.114)
# eigenvalues and eigenvectors of ImageNet's RGB covariance (Krizhevsky et al. 2012), as the whole field uses them
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def color_jitter(x, rows, count, jitter, lighting, mean, std, g):
    """Brightness, contrast and saturation in random order by up to +- jitter, then PCA noise, on normalised images.

    x (n, 3, S, S) are the rows `rows` of a batch of `count`: the draws are of the whole batch, so that ranks agree.
    """
    order = torch.rand(count, 3, generator=g).argsort(1)[rows].to(x.device)  # op at each of three places
    alpha = (torch.rand(count, 3, generator=g) * 2 - 1)[rows].to(x.device) * jitter
    noise = torch.randn(count, 3, generator=g)[rows].to(x.device) * lighting
    mean, std, gray = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (mean, std, GRAY))
    x = x * std + mean
    for place in range(3):
        op = order[:, place].view(-1, 1, 1, 1)
        shade = (x * gray).sum(1, keepdim=True)  # (n, 1, S, S)
        flat = shade.mean((2, 3), keepdim=True)
        towards = torch.where(op == 0, torch.zeros_like(shade), torch.where(op == 1, flat, shade))
        x = x + alpha[:, place].view(-1, 1, 1, 1) * (towards - x)
    values, vectors = torch.tensor(EIGENVALUES, device=x.device), torch.tensor(EIGENVECTORS, device=x.device)
    x = x + ((noise * values) @ vectors.T).view(-1, 3, 1, 1)
    return (x - mean) / std


# ---- chunks and ranks


def chunk_size(batch_size, world, accumulation_steps, bn_batch):
    """Images of one forward and backward pass: --bn_batch, else batch / (processes x steps), rounded up."""
    # differs from the release: --bn_batch fixes what there depends on the number of GPUs
    return min(bn_batch or -(-batch_size // (world * accumulation_steps)), batch_size)


def chunks_of(count, size):
    """(first, end) of each chunk of a batch of `count`: pieces of equal length, to one image, of about `size`.

    A remainder of few images would get a BatchNorm of its own: 1024 in chunks of 73 are 12 of 73 and 2 of 74, as in
    the release, not 14 of 73 and one of 2. A chunk may for that be a twentieth longer than `size`.
    """
    pieces = math.ceil(count / (1.05 * size))
    if size > 1:
        pieces = max(1, min(pieces, count // 2))  # BatchNorm cannot train on a single image
    ends = [round(n * count / pieces) for n in range(pieces + 1)]
    return list(zip(ends[:-1], ends[1:]))


def rank_chunks(count, size, rank, world):
    """This rank's chunks of a batch of `count`: [(first row in the batch, slice of the rank's rows)], and its rows."""
    mine, start, out = chunks_of(count, size)[rank::world], 0, []
    for first, end in mine:
        out.append((first, slice(start, start + end - first)))
        start += end - first
    rows = [torch.arange(first, end) for first, end in mine]
    return out, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


def sum_over_ranks(tensors, world):
    """Add up lists of tensors over all processes, in place, in one message a dtype.

    Not DDP: ranks may hold different numbers of chunks, also none, and DDP averages over ranks.
    """
    if world == 1:
        return
    import torch.distributed as dist

    for dtype in sorted({t.dtype for t in tensors}, key=str):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        _all_reduce(flat, world, dist.ReduceOp.SUM)
        for t, part in zip(same, flat.split([t.numel() for t in same])):
            t.copy_(part.view_as(t))


def _all_reduce(flat, world, operation):
    import torch.distributed as dist

    try:
        dist.all_reduce(flat, operation)
    except RuntimeError as error:
        reason = str(error).split("\n")[0][:200]
        refuse(f"another of the {world} processes has died; run the same command to go on ({reason})")


def check_ranks(folder, settings, epochs, process):
    """Refuse ranks that would train apart: with other settings, or from other checkpoints (a node's own disk, a late
    network file system). Their gradients are summed, so nothing else would show it.

    epochs   how many this rank finds trained, one number a seed
    """
    if process.world == 1:
        return
    low, high = _extremes([int(settings_digest(settings)[:12], 16)], process)
    if low != high:  # first, as the seeds are among the settings
        refuse(f"--output_dir {folder}: the {process.world} processes were started with different settings")
    for low, high in zip(*_extremes(epochs, process)):
        if low != high:
            refuse(f"ranks do not see the same --output_dir {folder}: epoch {low} and {high}")


def _extremes(values, process):
    """The least and the largest over all processes of each of some integers."""
    import torch.distributed as dist

    found = torch.tensor([*values, *(-v for v in values)], device=process.device)
    _all_reduce(found, process.world, dist.ReduceOp.MIN)
    found = found.tolist()
    return found[: len(values)], [-v for v in found[len(values) :]]


def sum_gradients(model, world):
    if world > 1:
        for p in model.parameters():
            if p.requires_grad and p.grad is None:  # this rank had no chunk
                p.grad = torch.zeros_like(p)
        sum_over_ranks([p.grad for p in model.parameters() if p.requires_grad], world)


@torch.no_grad()
def average_buffers(model, chunks, world):
    """BatchNorm's running statistics as the mean over ranks, weighted by the chunks that each has seen."""
    if world == 1:
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    counters = [b for b in model.buffers() if not b.is_floating_point() and b.ndim == 0]
    seen = torch.tensor([float(chunks)], device=next(model.parameters()).device)
    for b in buffers:
        b.mul_(chunks)
    sum_over_ranks([*buffers, *counters, seen], world)
    for b in buffers:
        b.div_(seen.to(b.dtype)[0])
    for b in counters:
        b.div_(world, rounding_mode="floor")


def has_random_layers(model):
    """Whether a forward pass in train mode draws numbers (dropout, stochastic depth)."""
    return any(
        any(word in type(m).__name__.lower() for word in ("dropout", "stochasticdepth", "droppath"))
        for m in model.modules()
    )


@contextlib.contextmanager
def seeded(*key, device="cpu"):
    """PyTorch's global generators set from `key` inside, and as they were afterwards: for weights and dropout."""
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*key))
        yield


# ---- exponential average


class Average:
    """EMA of a model's weights (EDC), after each step: average <- decay average + (1 - decay) weights."""

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model):
        for mean, p in zip(self.model.parameters(), model.parameters()):
            mean.lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def copy_buffers(self, model):
        for mean, b in zip(self.model.buffers(), model.buffers()):
            mean.copy_(b)


# ---- evaluation


def validation_pixels(split, size, device, rank=0, world=1, num_workers=0, flag="--val_dir"):
    """Test images of this rank as bytes: (n, size, size, 3) uint8 and (n,) class indices; on a GPU if they fit there.

    Small data sets (CIFAR, Tiny-ImageNet, digits) are taken whole; others are resized to size * 256 / 224 on the
    shorter side and cropped in the middle, as the release.
    """
    whole = DATASETS[split.dataset].image_size <= 64
    items = [(item, c) for c, names in enumerate(split.items) for item in names][rank::world]
    out = np.empty((len(items), size, size, 3), np.uint8)

    def read(k):
        try:
            image = split.read(items[k][0])
        except BadImage as error:
            return str(error)
        as_it_is = size <= 64 and image.size == (size, size)
        out[k] = np.asarray(squash(image, size) if whole or as_it_is else centre_crop(image, size))

    for problem in in_threads(read, range(len(items)), num_workers, "reading test images"):
        if problem:
            refuse(f"{flag} {problem}")
    pixels, targets = torch.from_numpy(out), torch.tensor([c for _, c in items], dtype=torch.int64)
    if device.type == "cuda" and fits_gpu("the test images", out.nbytes, device, "sent there at every test"):
        return pixels.to(device), targets.to(device)
    return pixels, targets


def centre_crop(image, size):
    """torchvision's Resize(size * 256 / 224) on the shorter side and CenterCrop(size), by Pillow."""
    short = size * 256 // 224
    w, h = image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def evaluate(model, pixels, targets, forward, mean, std, world=1, rows=256):
    """{"top1", "top5"} in percent over all ranks.   pixels (n, S, S, 3) uint8, targets (n,)

    mean, std   of the data set, for normalisation
    """
    model.eval()
    device = forward.device
    correct = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images: read back once
    correct[2] = len(targets)
    for part, target in zip(pixels.split(rows), targets.split(rows)):
        x = forward.lay_out(normalise(part.to(device, non_blocking=True), mean, std))
        outputs = forward(model, x)
        best = outputs.topk(min(5, outputs.shape[1]), 1).indices
        hits = best == target.to(device, non_blocking=True)[:, None]
        correct[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
    sum_over_ranks([correct], world)
    top1, top5, count = correct.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


def summary(values):
    """{"mean", "std", "n", "values"} over seeds; the sample standard deviation, None for one seed."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": values,
    }


# ---- checkpoints


def save_checkpoint(path, state, settings_sha256):
    """A dict of tensors and plain values, whole or absent; the same bytes for the same values."""
    buffer = io.BytesIO()
    torch.save({**state, "settings_sha256": settings_sha256}, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path, epochs, settings_sha256):
    """What save_checkpoint wrote before the last of `epochs`; refuses, in one line, what is none or another run's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        reason = str(error).split("\n")[0] or type(error).__name__
        refuse(f"{path}: not a checkpoint ({reason[:200]}); remove it to begin anew")
    if not isinstance(state, dict) or not {"epoch", "model", "optimizer", "rows"} <= state.keys():
        refuse(f"{path}: not a checkpoint of this stage; remove it to begin anew")
    epoch, rows = state["epoch"], state["rows"]
    whole = type(epoch) is int and 0 <= epoch < epochs and isinstance(rows, list) and len(rows) == epoch
    if not (whole and all(isinstance(row, dict) for row in rows)):
        refuse(f"{path}: not after one of the {epochs} epochs, with a row for each; remove it to begin anew")
    check_unit(path, state.get("settings_sha256"), settings_sha256)
    return state


def restore(path, state, model, optimizer, average=None):
    """Put what load_checkpoint gave into a network, its optimiser and its Average; refuses what is of others."""
    try:
        plain(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.model.load_state_dict(state["ema"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        refuse(f"{path}: of another network or optimiser ({reason}); remove it to begin anew")


def save_weights(path, model):
    import safetensors.torch

    state = {k: v.detach().cpu().contiguous() for k, v in plain(model).state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(state))


def plain(model):
    """The network inside a compiled one."""
    return getattr(model, "_orig_mod", model)


def checkpoint_path(folder, seed):
    return Path(folder) / f"checkpoint_seed{seed}.pt"


# ---- steps


class Forward:
    """How forward passes run, for a teacher and a student alike; the values are those of the flags."""

    def __init__(self, device, amp="none", channels_last=False, compiled=False):
        self.device, self.amp, self.channels_last, self.compiled = device, amp, channels_last, compiled

    def place(self, model):
        model = model.to(self.device, torch.float64 if self.amp == "fp64" else torch.float32)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return torch.compile(model) if self.compiled else model

    def lay_out(self, x):
        x = x.double() if self.amp == "fp64" else x
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp == "bf16")

    def __call__(self, model, x):
        """Logits in float32 (float64 with --amp fp64)."""
        with self.autocast():
            outputs = model(x)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def train_step(model, optimizer, chunks, count, loss_of, world, key=None):
    """One optimiser step on a batch of `count` images; returns this rank's share of the mean loss.

    chunks    [(first row, slice)] of this rank; loss_of(slice) -> loss summed over those rows
    key       seeds the forward passes of networks with dropout; None for networks without
    """
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for first, rows in chunks:
        # differs from the release: divided by the batch as it is, so the last, shorter one counts in full
        with seeded(*key, first, device=device) if key else contextlib.nullcontext():
            loss = loss_of(rows) / count
        loss.backward()
        total += loss.detach().float()
    sum_gradients(model, world)
    optimizer.step()
    return total


def add_training_flags(parser):
    """Flags of speed that a teacher's and a student's training share."""
    group = parser.add_argument_group("batches and speed")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="cuts a batch further")
    group.add_argument(
        "--bn_batch",
        type=positive_int,
        default=None,
        help="images that BatchNorm sees together (the release: 73); default: batch / (processes x steps)",
    )
    group.add_argument(
        "--amp",
        choices=("none", "bf16", "fp64"),
        default="none",
        help="precision of forward passes; fp64 compares numbers of processes",
    )
    group.add_argument("--channels_last", action="store_true", help="memory layout for tensor cores")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--fused", action="store_true", help="the optimiser's fused kernel")
    group.add_argument("--checkpoint_every", type=positive_int, default=10, help="epochs between two checkpoints")
    group.add_argument("--eval_every", type=positive_int, default=50, help="epochs between two tests (and the last)")
