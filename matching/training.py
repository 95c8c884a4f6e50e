"""Training a network, teacher or student: one loop, one checkpoint, one stop (paper, 3.3 and 4.1).

    states = open_seeds(out, seeds, files_of, bytes_each, epochs)  # what has yet to be trained
    train(out, states, network, data, loss, test, settings, forward, files_of)

A batch is cut into chunks of `bn_batch` images, which is what BatchNorm sees together. Each chunk is
one forward and backward pass, its loss is divided by the images of the whole batch, and the
gradients of all processes are summed. So the gradient is that of the whole batch for any number of
chunks and processes, also for the short last batch.
"""

import contextlib
import copy
import io
import math
import os
import statistics
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from distillation import datasets
from matching.batches import batches_of, normalise
from matching.images import fits_gpu, in_threads
from matching.models import count_parameters
from scripts import files
from scripts.runtime import DROPOUT, WEIGHTS, memory_for, number, refuse, seed_of

# ---- optimiser and schedule

SCHEDULES = ("linear", "cosine", "step", "constant")
ADAMW = ("adamw_lr", "adamw_weight_decay")  # flags


def make_optimizer(model, sgd, lr, weight_decay, momentum=0.9, fused=False):
    """SGD or AdamW; weight decay on matrices and convolutions only, as the release."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"fused": True} if fused else {}
    if sgd:
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, **options)
    return torch.optim.AdamW(groups, lr=lr, **options)


def lr_factor(schedule, epoch, epochs, cos_stretch=1.0, warmup_epochs=0, step_factor=0.2):
    """Learning rate of `epoch` (from 0) over the peak.

    cosine   (1 + cos(pi t / (Z E))) / 2: to 0 for a stretch Z of 1 (the release's --cos), to half
             for 2 (RDED, EDC; RD3's zeta)
    linear   1 - t / E (the release without --cos)
    step     x step_factor at 2/3 and at 5/6 of the epochs (Minimax)
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
    return step_factor ** sum(epoch >= at for at in (2 * epochs // 3, 5 * epochs // 6))


def check_warmup(warmup_epochs, epochs):
    """Refuse a warm-up that never ends."""
    if warmup_epochs >= epochs:
        refuse(f"--warmup_epochs {warmup_epochs}: not below the {epochs} epochs of training")


# ---- losses


class Goal(NamedTuple):
    """What a network should say of n images: a teacher's logits, or their classes.

    logits     (n, classes), or None for hard labels
    targets    (n,) class of each image;   partners (n,): of the image mixed in
    lam        share of the image itself
    """

    logits: torch.Tensor | None
    targets: torch.Tensor
    partners: torch.Tensor
    lam: float = 1.0

    def of(self, rows):
        """The goal of some rows."""
        logits = None if self.logits is None else self.logits[rows]
        return Goal(logits, self.targets[rows], self.partners[rows], self.lam)


# A loss takes the outputs, their goal and all settings by name, and sums over the rows.


def kl_loss(outputs, goal, temperature, **_):
    """KL(teacher || student), both at temperature T and without T^2, as the release."""
    log_p = F.log_softmax(outputs / temperature, 1)
    q = F.softmax(goal.logits.to(outputs.dtype) / temperature, 1)
    return F.kl_div(log_p, q, reduction="sum")


def hard_loss(outputs, goal, label_smoothing=0.0, **_):
    """Cross-entropy on class indices, mixed by lambda."""
    entropy = partial(F.cross_entropy, reduction="sum", label_smoothing=label_smoothing)
    if goal.lam == 1:
        return entropy(outputs, goal.targets)
    own, other = entropy(outputs, goal.targets), entropy(outputs, goal.partners)
    return goal.lam * own + (1 - goal.lam) * other


def mse_ce_loss(outputs, goal, ce_weight, **_):
    """EDC: squared error of the logits (mean over classes) + ce_weight x cross-entropy."""
    mse = F.mse_loss(outputs, goal.logits.to(outputs.dtype), reduction="sum") / outputs.shape[1]
    return mse + ce_weight * hard_loss(outputs, goal)


LOSSES = {"kl": kl_loss, "mse_ce": mse_ce_loss}  # {--loss: function}, of a teacher's logits


# ---- chunks and processes


def chunk_size(batch_size, world, accumulation_steps, bn_batch):
    """Images of one pass: --bn_batch, else batch / (processes x steps), rounded up."""
    # differs from the release: --bn_batch fixes what there depends on the number of GPUs
    return min(bn_batch or -(-batch_size // (world * accumulation_steps)), batch_size)


def chunks_of(count, size):
    """(first, end) of each chunk of a batch of `count`: of equal length, to one image.

    A remainder of few images would get a BatchNorm of its own: 1024 in chunks of 73 are 12 of 73
    and 2 of 74, as in the release, not 14 of 73 and one of 2. For that, a chunk may be a twentieth
    longer than `size`.
    """
    pieces = math.ceil(count / (1.05 * size))
    if size > 1:
        pieces = max(1, min(pieces, count // 2))  # BatchNorm cannot train on a single image
    ends = [round(n * count / pieces) for n in range(pieces + 1)]
    return list(zip(ends[:-1], ends[1:]))


def rank_chunks(count, size, rank, world):
    """This process's chunks, [(first row in the batch, slice of its own rows)], and its rows."""
    mine, start, out = chunks_of(count, size)[rank::world], 0, []
    for first, end in mine:
        out.append((first, slice(start, start + end - first)))
        start += end - first
    rows = [torch.arange(first, end) for first, end in mine]
    return out, torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)


@contextlib.contextmanager
def joined(process, tracker=None, folder=None):
    """accelerate's Accelerator while processes train together; None where there is only one.

    Without CUDA it needs `cpu=True`: else every process believes that it is rank 0 of 1.
    """
    if process.dry_run or (process.world == 1 and tracker is None):
        yield None
        return
    from accelerate import Accelerator

    try:
        on_cpu = process.device.type == "cpu"
        accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=folder)
    except (ValueError, RuntimeError) as error:  # an invalid port, a host that does not answer
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        met = f"{process.world} processes cannot meet at {at}"
        what = met if process.world > 1 else f"--tracker {tracker}"
        refuse(f"{what}: {str(error).splitlines()[0]}")
    if accelerator.num_processes != process.world:
        found = accelerator.num_processes
        refuse(f"{process.world} processes were asked for, accelerate sees {found}; use torchrun")
    if tracker and not accelerator.log_with:
        refuse(f"--tracker {tracker}: this package is not installed")
    yield accelerator
    accelerator.end_training()


def sum_over_ranks(tensors, world):
    """Add up lists of tensors over all processes, in place, in one message per dtype.

    Not DDP: it averages, and processes may hold different numbers of chunks, also none.
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
        again = "run the same command to go on"
        refuse(f"another of the {world} processes has died; {again} ({reason})")


def check_ranks(out, trained):
    """Refuse processes with different settings, or that see different checkpoints (each node's own
    disk, a late network file system). Gradients are summed, so nothing else would show it.

    trained   epochs that this process finds trained, one number per seed
    """
    process = out.process
    if process.world == 1:
        return
    import torch.distributed as dist

    settings = int(files.digest_of([out.settings, out.inputs])[:12], 16)
    for what, values in (("settings", [settings]), ("checkpoints", trained)):  # seeds are settings
        found = torch.tensor([*values, *(-v for v in values)], device=process.device)
        _all_reduce(found, process.world, dist.ReduceOp.MIN)
        least, negative = found.split(len(values))
        for low, high in zip(least.tolist(), (-negative).tolist()):
            where = f"{out.flag} {out.folder}"
            if low != high and what == "settings":
                refuse(f"{where}: the processes were started with different settings")
            if low != high:
                refuse(f"ranks do not see the same {where}: epoch {low} and {high}")


def sum_gradients(model, world):
    if world > 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:  # this process had no chunk
                p.grad = torch.zeros_like(p)
        sum_over_ranks([p.grad for p in parameters], world)


@torch.no_grad()
def average_buffers(model, chunks, world):
    """BatchNorm's statistics: the mean over processes, weighted by the chunks that each has seen."""
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


# ---- forward passes and steps


class Forward:
    """How forward passes run, by the flags of the same names."""

    def __init__(self, device, amp="none", channels_last=False, compiled=False):
        self.device, self.amp = device, amp
        self.channels_last, self.compiled = channels_last, compiled

    def place(self, model):
        """The network on the device, in its precision and layout."""
        model = model.to(self.device, torch.float64 if self.amp == "fp64" else torch.float32)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return torch.compile(model) if self.compiled else model

    def lay_out(self, x):
        """Images (B, 3, S, S) as the network takes them."""
        x = x.double() if self.amp == "fp64" else x
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def __call__(self, model, x):
        """Logits in float32 (float64 with --amp fp64)."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp == "bf16"):
            outputs = model(x)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def plain(model):
    """The network inside a compiled one."""
    return getattr(model, "_orig_mod", model)


def has_random_layers(model):
    """Whether a forward pass in train mode draws numbers (dropout, stochastic depth)."""
    words = ("dropout", "stochasticdepth", "droppath")
    return any(word in type(m).__name__.lower() for m in model.modules() for word in words)


@contextlib.contextmanager
def seeded(*key, device="cpu"):
    """PyTorch's global generators set from `key` inside, restored afterwards: weights, dropout."""
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*key))
        yield


def train_step(model, optimizer, chunks, count, loss_of, world, key=None):
    """One optimiser step on a batch of `count` images; returns this process's share of the loss.

    chunks    this process's, of rank_chunks;   loss_of(rows) -> loss summed over those rows
    key       seeds the forward passes of a network with dropout; None for others
    """
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for first, rows in chunks:
        # differs from the release: divided by the batch as it is, so the shorter one counts in full
        with seeded(*key, first, device=device) if key else contextlib.nullcontext():
            loss = loss_of(rows) / count
        loss.backward()
        total += loss.detach().float()
    sum_gradients(model, world)
    optimizer.step()
    return total


# ---- tests


def validation_pixels(split, size, process, num_workers=0, flag="--val_dir"):
    """Test images of this process: (n, size, size, 3) uint8, (n,) classes; on a GPU if they fit.

    Small data sets (CIFAR, Tiny-ImageNet, digits) are taken whole. Others are resized to
    size * 256 / 224 on the shorter side and cropped in the middle, as the release.
    """
    whole = datasets.ALL[split.dataset].image_size <= 64
    items = [(item, c) for c, names in enumerate(split.items) for item in names]
    items = items[process.rank :: process.world]
    out = np.empty((len(items), size, size, 3), np.uint8)

    def read(k):
        try:
            image = split.read(items[k][0])
        except datasets.BadImage as error:
            return str(error)
        as_it_is = size <= 64 and image.size == (size, size)
        out[k] = datasets.squash(image, size) if whole or as_it_is else centre_crop(image, size)

    for problem in in_threads(read, range(len(items)), num_workers, "reading test images"):
        if problem:
            refuse(f"{flag} {problem}")
    pixels, targets = torch.from_numpy(out), torch.tensor([c for _, c in items], dtype=torch.int64)
    otherwise = "sent there at every test"
    if process.device.type == "cuda":
        if fits_gpu("the test images", out.nbytes, process.device, otherwise):
            return pixels.to(process.device), targets.to(process.device)
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
def evaluate(model, pixels, targets, forward, dataset, world=1, rows=256):
    """{"top1", "top5"} in percent over all processes.   pixels (n, S, S, 3) uint8, targets (n,)"""
    model.eval()
    facts, device = datasets.ALL[dataset], forward.device
    correct = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images
    correct[2] = len(targets)
    for part, target in zip(pixels.split(rows), targets.split(rows)):
        x = normalise(part.to(device, non_blocking=True), facts.mean, facts.std)
        outputs = forward(model, forward.lay_out(x))
        best = outputs.topk(min(5, outputs.shape[1]), 1).indices
        hits = best == target.to(device, non_blocking=True)[:, None]
        correct[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
    sum_over_ranks([correct], world)
    top1, top5, count = correct.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


def summary(values):
    """{"mean", "std", "n", "values"} over seeds; the sample std, None for one seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


def last_and_best(rows):
    """{"last", "best"}: epoch, top-1 and top-5 of the last test, and of the best one."""
    tested = [row for row in rows if "top1" in row]
    chosen = {"last": tested[-1], "best": max(tested, key=lambda row: row["top1"])}
    return {which: {k: row[k] for k in ("epoch", "top1", "top5")} for which, row in chosen.items()}


# ---- the loop


class Part(NamedTuple):
    """What this process trains on of one batch, on the device.

    count     images of the whole batch
    x         (n, 3, S, S) this process's rows, normalised and mixed;   goal: of the same rows
    unmixed   (n, 3, S, S) the same rows un-mixed, for --bn_refresh; else None
    """

    count: int
    x: torch.Tensor
    goal: Goal
    unmixed: torch.Tensor | None = None


class Learner:
    """One seed's network, optimiser, average of weights, and rows: what a checkpoint holds."""

    def __init__(self, network, settings, seed, forward):
        with seeded(seed, WEIGHTS):
            model = network()
        self.seed, self.rows, self.random = seed, [], has_random_layers(model)
        self.model, self.average = forward.place(model), None
        rate, decay = ("learning_rate", "weight_decay") if settings["sgd"] else ADAMW
        self.flag, self.lr = f"--{rate}", settings[rate]
        options = settings["sgd"], self.lr, settings[decay], settings["momentum"], settings["fused"]
        self.optimizer = make_optimizer(self.model, *options)
        if settings["ema"]:  # EDC's: starts from the initial weights
            self.average = copy.deepcopy(plain(self.model)).requires_grad_(False)
        # its function alone: swa_utils.AveragedModel waits for the GPU at every step
        self.update_average = torch.optim.swa_utils.get_ema_multi_avg_fn(settings["ema"])

    @property
    def tested(self):
        return self.average or self.model

    def state(self):
        average = self.average.state_dict() if self.average else None
        optimizer = self.optimizer.state_dict()
        model = plain(self.model).state_dict()
        return {"model": model, "optimizer": optimizer, "average": average, "rows": self.rows}

    def restore(self, state, path):
        """Go on from what `load_checkpoint` gave; refuses that of another network."""
        try:
            plain(self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average:
                self.average.load_state_dict(state["average"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:200]
            refuse(f"{path}: of another network or optimiser ({reason}); remove it to begin anew")
        self.rows = state["rows"]


def checkpoint_path(out, seed):
    return out.folder / f"checkpoint_seed{seed}.pt"


def load_checkpoint(out, seed, epochs):
    """What `train` saved after an epoch before the last: a state with rows; without, no rows."""
    path = checkpoint_path(out, seed)
    if not path.exists():
        return {"rows": []}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done = [row["epoch"] for row in state["rows"]]
        if done != list(range(len(done))) or not 0 < len(done) < epochs:
            raise ValueError(f"not after one of the {epochs} epochs")
        if state["run"] != run_digest(out):
            raise ValueError("not made with the settings of this run")
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        refuse(f"{path}: not a checkpoint of this run ({reason}); remove it to begin anew")
    return state


def run_digest(out):
    return files.digest_of([out.settings, out.inputs])


def open_seeds(out, seeds, files_of, bytes_each, epochs):
    """{seed: its checkpoint's state} of the seeds that are not finished.

    With --dry_run: prints what would be trained, and exits. All processes must find the same.
    """
    todo = out.todo(seeds, files_of, bytes_each)
    states = {seed: load_checkpoint(out, seed, epochs) for seed in todo}
    check_ranks(out, [len(states[s]["rows"]) if s in states else epochs for s in seeds])
    out.units *= epochs  # what its closing line counts
    for seed in set(seeds) - set(todo):
        if out.process.is_main:  # killed between its last file and this
            checkpoint_path(out, seed).unlink(missing_ok=True)
    return states


def train(out, states, network, data, loss, test, settings, forward, files_of, every, track=None):
    """Train one network per seed, one after the other, over one loader.

    states     of open_seeds;   network() -> a new one
    data       count: images of an epoch;   loader(keys): iterator over [(epoch, number)];
               part(item) -> Part
    loss       of this file;   test(network) -> {"top1", "top5"}
    settings   the flags' values by name; those of the optimiser, schedule and loss among them
    files_of   seed -> names of its weights (safetensors) and rows (JSON)
    every      epochs between two checkpoints
    track      (seed, row) -> None, after every epoch
    """
    process, epochs = out.process, settings["epochs"]
    batches = range(batches_of(data.count, settings["batch_size"]))
    todo = [(s, e) for s in states for e in range(len(states[s]["rows"]), epochs)]
    items = data.loader([(epoch, number) for _, epoch in todo for number in batches])
    bar = out.progress(total=len(todo) * data.count, unit="image")
    with bar, memory_for("in training", "lower --bn_batch, or raise --gradient_accumulation_steps"):
        for seed, state in states.items():
            learner = Learner(network, settings, seed, forward)
            if state["rows"]:
                learner.restore(state, checkpoint_path(out, seed))
            elif process.is_main:
                copies = 4 + bool(learner.average)  # two of the optimiser, one of the finished file
                needed = 4 * copies * count_parameters(learner.model) + 2**20
                files.require_space(out.flag, out.folder, needed)
            while len(learner.rows) < epochs:
                part = islice(items, len(batches))
                row = train_epoch(learner, part, data, loss, settings, forward, process, bar)
                done = len(learner.rows) + 1
                if done % settings["eval_every"] == 0 or done == epochs:
                    row |= test(learner.tested)
                    bar.set_postfix(seed=seed, top1=f"{row['top1']:.2f}")
                learner.rows.append(row)
                if track:
                    track(seed, row)
                out.made += 1
                asked = torch.tensor([float(out.signals.name is not None)], device=process.device)
                sum_over_ranks([asked], process.world)  # all leave, or none
                if process.is_main and done == epochs:
                    finish_seed(out, learner, files_of(seed))
                elif process.is_main and (done % every == 0 or asked):
                    buffer = io.BytesIO()
                    torch.save({**learner.state(), "run": run_digest(out)}, buffer)
                    out.write(checkpoint_path(out, seed).name, buffer.getvalue())
                if asked:
                    # nobody leaves while rank 0 saves: torchrun would kill it
                    sum_over_ranks([asked], process.world)
                    out.signals.name = out.signals.name or "SIGTERM"
                    out.leave_if_asked()


def finish_seed(out, learner, names):
    """Weights, then rows; then the checkpoint goes."""
    import safetensors.torch

    weights, rows = names
    state = plain(learner.tested).state_dict()
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    out.write(weights, safetensors.torch.save(state))
    out.write(rows, files.json_text({"seed": learner.seed, "rows": learner.rows}))
    checkpoint_path(out, learner.seed).unlink(missing_ok=True)


def read_rows(out, name, epochs):
    """(seed, rows, their last and best test) of a finished seed's file."""
    found = files.read_json(out.folder / name)
    try:
        rows = found["rows"]
        if [row["epoch"] for row in rows] != list(range(epochs)):
            raise ValueError(f"not the rows of {epochs} epochs")
        return {"seed": found["seed"], **last_and_best(rows), "rows": rows}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        refuse(f"{out.folder / name}: not rows of this stage ({error}); remove it to train again")


def train_epoch(learner, items, data, loss, settings, forward, process, bar):
    """One epoch over `items`; returns its row {"epoch", "lr", "loss"}."""
    epoch, model = len(learner.rows), learner.model.train()
    names = ("epochs", "cos_stretch", "warmup_epochs", "step_factor")
    rest = {name: settings[name] for name in names}
    lr = learner.lr * lr_factor(settings["schedule"], epoch, **rest)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
    total, seen, number = torch.zeros((), device=process.device), 0, -1
    for number, item in enumerate(items):
        part = data.part(item)
        size = settings["bn_batch"]
        chunks, _ = rank_chunks(part.count, size, process.rank, process.world)
        key = (learner.seed, DROPOUT, epoch, number) if learner.random else None
        if part.unmixed is not None:
            refresh_batch_norm(model, forward, part.unmixed, chunks, key)

        def loss_of(rows, x=forward.lay_out(part.x), goal=part.goal):
            return loss(forward(model, x[rows]), goal.of(rows), **settings)

        total += train_step(
            model, learner.optimizer, chunks, part.count, loss_of, process.world, key
        )
        if learner.average:
            pair = (list(m.parameters()) for m in (learner.average, plain(model)))
            learner.update_average(*pair, None)
        seen += len(chunks)
        bar.update(part.count)
    average_buffers(model, seen, process.world)
    if learner.average:
        for mean, b in zip(learner.average.buffers(), plain(model).buffers()):
            mean.copy_(b)
    sum_over_ranks([total], process.world)
    mean_loss = total.item() / (number + 1)
    if not math.isfinite(mean_loss):  # no later epoch would be finite
        refuse(f"epoch {epoch}: the loss is {mean_loss}; lower {learner.flag}")
    return {"epoch": epoch, "lr": lr, "loss": mean_loss}


@torch.no_grad()
def refresh_batch_norm(model, forward, x, chunks, key):
    """RDED: one more forward in train mode on the un-mixed images, which updates BatchNorm."""
    x = forward.lay_out(x)
    for first, rows in chunks:
        with seeded(*key, first, 1, device=x.device) if key else contextlib.nullcontext():
            forward(model, x[rows])


def add_training_flags(parser):
    """Flags of batches and speed that a teacher's and a student's training share."""
    parser.heading("batches and speed")
    parser.flag(
        "--gradient_accumulation_steps",
        type=number(int, 1),
        default=1,
        help="cuts a batch further",
    )
    parser.setting(
        "--bn_batch",
        type=number(int, 1),
        short="bn",
        help="images that BatchNorm sees together (the release: 73) [batch / (processes x steps)]",
    )
    parser.setting(
        "--amp",
        choices=("none", "bf16", "fp64"),
        default="none",
        short="amp",
        help="precision of forward passes; fp64 compares numbers of processes",
    )
    fast = {"action": "store_true", "default": False}
    parser.setting("--channels_last", **fast, help="memory layout for tensor cores")
    parser.setting("--compile", **fast, help="torch.compile the network")
    parser.setting("--fused", **fast, help="the optimiser's fused kernel")
    every = number(int, 1)
    parser.setting("--eval_every", type=every, default=50, help="epochs between two tests")
    parser.flag("--checkpoint_every", type=every, default=10, help="epochs between two checkpoints")
