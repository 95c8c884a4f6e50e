"""Training a network, teacher or student: one loop, one checkpoint, one stop (paper, 3.3 and 4.1).

    states = open_seeds(out, seeds, lessons)                     # {seed: its checkpoint}
    train(out, states, lessons, forward, test, checkpoint_every)  # one network per seed

A batch is cut into chunks of `bn_batch` images: what BatchNorm sees together. A chunk is one
forward and backward pass, its loss is divided by the images of the whole batch, and the gradients
of all processes are summed. So a step's gradient is that of the whole batch for any number of
chunks and processes, also for the short last batch.
"""

import contextlib
import copy
import io
import math
import statistics
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from distillation import datasets
from matching import batches, models, ranks
from matching.images import fits_gpu, in_threads
from scripts import files
from scripts.runtime import DROPOUT, WEIGHTS, memory_for, number, refuse, seed_of


def add_training_flags(parser):
    """The flags that a teacher's and a student's training share."""
    count, precisions = number(int, 1), ("none", "bf16", "fp64")
    parser.heading("chunks and speed")
    parser.flag("--gradient_accumulation_steps", type=count, default=1, help="cuts a batch further")
    seen = "images that BatchNorm sees together (the release: 73) [batch / (processes x steps)]"
    parser.setting("--bn_batch", type=count, short="bn", help=seen)
    amp = "precision of forward passes; fp64 compares numbers of processes"
    parser.setting("--amp", choices=precisions, default="none", short="amp", help=amp)
    fast = partial(parser.setting, action="store_true", default=False)
    fast("--channels_last", help="memory layout for tensor cores")
    fast("--compile", help="torch.compile the network")
    fast("--fused", help="the optimiser's fused kernel")
    parser.setting("--eval_every", type=count, default=50, help="epochs between two tests")
    parser.flag("--checkpoint_every", type=count, default=10, help="epochs between checkpoints")


# ---- optimiser and schedule

SCHEDULES = ("linear", "cosine", "step", "constant")


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


# ---- losses: of the outputs, their goal, and whatever settings they name; summed over the rows


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


def kl_loss(outputs, goal, temperature, **_):
    """KL(teacher || student), both at temperature T and without T^2, as the release."""
    log_p = F.log_softmax(outputs / temperature, 1)
    q = F.softmax(goal.logits.to(outputs.dtype) / temperature, 1)
    return F.kl_div(log_p, q, reduction="sum")


def hard_loss(outputs, goal, label_smoothing=0.0, **_):
    """Cross-entropy on class indices, mixed by lambda."""
    entropy = partial(F.cross_entropy, reduction="sum", label_smoothing=label_smoothing)
    loss = entropy(outputs, goal.targets)
    if goal.lam == 1:
        return loss
    return goal.lam * loss + (1 - goal.lam) * entropy(outputs, goal.partners)


def mse_ce_loss(outputs, goal, ce_weight, **_):
    """EDC: squared error of the logits (mean over classes) + ce_weight x cross-entropy."""
    mse = F.mse_loss(outputs, goal.logits.to(outputs.dtype), reduction="sum") / outputs.shape[1]
    return mse + ce_weight * hard_loss(outputs, goal)


LOSSES = {"kl": kl_loss, "mse_ce": mse_ce_loss}  # {--loss: function}


# ---- chunks


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
    """PyTorch's global generators set from `key` inside, and restored: for weights and dropout."""
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*key))
        yield


def seeds(key, *more, device):
    """`seeded` for a network with dropout; nothing for one without, which has no key."""
    return seeded(*key, *more, device=device) if key else contextlib.nullcontext()


def train_step(model, optimizer, chunks, count, loss_of, world, key=None):
    """One optimiser step on a batch of `count` images; returns this process's share of the loss.

    chunks    this process's, of rank_chunks;   loss_of(rows) -> loss summed over those rows
    key       seeds the forward passes of a network with dropout; None for others
    """
    optimizer.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for first, rows in chunks:
        # differs from the release: divided by the batch as it is, so a short one counts in full
        with seeds(key, first, device=device):
            loss = loss_of(rows) / count
        loss.backward()
        total += loss.detach().float()
    ranks.sum_gradients(model, world)
    optimizer.step()
    return total


# ---- tests


def validation_pixels(split, size, process, num_workers=0, flag="--val_dir"):
    """Test images of this process: (n, size, size, 3) uint8, (n,) classes; on a GPU if they fit.

    Small data sets (CIFAR, Tiny-ImageNet, digits) are taken whole. Others are resized to
    size * 256 / 224 on the shorter side and cropped in the middle, as the release.
    """
    whole, device = datasets.ALL[split.dataset].image_size <= 64, process.device
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
    if device.type == "cuda" and fits_gpu("the test images", out.nbytes, device, "sent each time"):
        return pixels.to(device), targets.to(device)
    return pixels, targets


def centre_crop(image, size):
    """torchvision's Resize(size * 256 / 224) of the shorter side and CenterCrop, by Pillow."""
    short = size * 256 // 224
    w, h = image.size
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.crop((left, top, left + size, top + size))


@torch.no_grad()
def evaluate(model, pixels, targets, forward, mean, std, world=1, rows=256):
    """{"top1", "top5"} in percent over all processes.   pixels (n, S, S, 3) uint8, targets (n,)"""
    model.eval()
    device = forward.device
    correct = torch.zeros(3, dtype=torch.int64, device=device)  # top-1, top-5, images
    correct[2] = len(targets)
    for part, target in zip(pixels.split(rows), targets.split(rows)):
        x = batches.normalise(part.to(device, non_blocking=True), mean, std)
        outputs = forward(model, forward.lay_out(x))
        best = outputs.topk(min(5, outputs.shape[1]), 1).indices
        hits = best == target.to(device, non_blocking=True)[:, None]
        correct[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
    ranks.sum_over_ranks([correct], world)
    top1, top5, count = correct.tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


def tester(split, size, forward, process, num_workers=0):
    """The function network -> {"top1", "top5"} on the images of `split`."""
    pixels, targets = validation_pixels(split, size, process, num_workers)
    facts = datasets.ALL[split.dataset]
    options = {"mean": facts.mean, "std": facts.std, "world": process.world}
    return partial(evaluate, pixels=pixels, targets=targets, forward=forward, **options)


def summary(values):
    """{"mean", "std", "n", "values"} over seeds; the sample std, None for one seed."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}


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
    """One seed's network, optimiser, average of the weights, and rows: what a checkpoint holds."""

    def __init__(self, lessons, seed, forward):
        settings = lessons.settings
        with seeded(seed, WEIGHTS):
            model = lessons.network()
        self.lessons, self.seed, self.forward, self.rows = lessons, seed, forward, []
        self.random, self.model = has_random_layers(model), forward.place(model)
        sgd, rest = settings["sgd"], (settings["momentum"], settings["fused"])
        self.rate = "learning_rate" if sgd else "adamw_lr"  # the flag that says the peak
        decay = settings["weight_decay" if sgd else "adamw_weight_decay"]
        self.optimizer = make_optimizer(self.model, sgd, settings[self.rate], decay, *rest)
        self.parts = {"model": plain(self.model), "optimizer": self.optimizer}
        if settings["ema"]:  # EDC's average, which starts from the initial weights
            self.parts["average"] = copy.deepcopy(plain(self.model)).requires_grad_(False)
            # not swa_utils.AveragedModel: it waits for the GPU at every step
            self.move = torch.optim.swa_utils.get_ema_multi_avg_fn(settings["ema"])
        self.average = self.parts.get("average")

    @property
    def tested(self):
        return self.model if self.average is None else self.average

    def restore(self, path, state):
        """Go on from a checkpoint; refuses that of another network or optimiser."""
        try:
            for name, part in self.parts.items() if state["rows"] else ():
                part.load_state_dict(state[name])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:200]
            refuse(f"{path}: of another network or optimiser ({reason}); remove it to begin anew")
        self.rows = state["rows"]

    def save(self, out, path):
        """One checkpoint: the same bytes for the same values."""
        state, buffer = {name: part.state_dict() for name, part in self.parts.items()}, io.BytesIO()
        torch.save({**state, "rows": self.rows}, buffer)
        out.write(path.name, buffer.getvalue())

    def finish(self, out, path):
        """Weights, then rows; then the checkpoint goes."""
        weights, rows = self.lessons.files_of(self.seed)
        state = plain(self.tested).state_dict()
        state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        out.write(weights, safetensors.torch.save(state))
        out.write(rows, files.json_text({"seed": self.seed, "rows": self.rows}))
        path.unlink(missing_ok=True)

    def train_epoch(self, items, process, bar):
        """One epoch over `items`; returns its row {"epoch", "lr", "loss"}."""
        settings, model, epoch = self.lessons.settings, self.model.train(), len(self.rows)
        names = ("schedule", "epochs", "cos_stretch", "warmup_epochs", "step_factor")
        lr = settings[self.rate] * lr_factor(epoch=epoch, **{n: settings[n] for n in names})
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total, seen, steps = torch.zeros((), device=process.device), 0, 0
        for steps, item in enumerate(items, 1):
            part = self.lessons.part(item)
            where = settings["bn_batch"], process.rank, process.world
            chunks, _ = rank_chunks(part.count, *where)
            key = (self.seed, DROPOUT, epoch, steps - 1) if self.random else None
            total += self.step(part, chunks, process.world, key)
            seen += len(chunks)
            bar.update(part.count)
        ranks.average_buffers(model, seen, process.world)
        if self.average is not None:
            for mean, b in zip(self.average.buffers(), plain(model).buffers()):
                mean.copy_(b)
        ranks.sum_over_ranks([total], process.world)
        loss = total.item() / steps
        if not math.isfinite(loss):  # no later one would be finite
            refuse(f"epoch {epoch}: the loss is {loss}; lower --{self.rate}")
        return {"epoch": epoch, "lr": lr, "loss": loss}

    def step(self, part, chunks, world, key):
        """One step on this process's part of a batch; returns its share of the loss."""
        model, forward, settings = self.model, self.forward, self.lessons.settings
        x = forward.lay_out(part.x)
        if part.unmixed is not None:  # RDED: un-mixed images refresh BatchNorm's statistics
            unmixed = forward.lay_out(part.unmixed)
            for first, rows in chunks:
                with torch.no_grad(), seeds(key, first, 1, device=x.device):
                    forward(model, unmixed[rows])

        def loss_of(rows):
            return self.lessons.loss(forward(model, x[rows]), part.goal.of(rows), **settings)

        loss = train_step(model, self.optimizer, chunks, part.count, loss_of, world, key)
        if self.average is not None:
            weights = [list(m.parameters()) for m in (self.average, plain(model))]
            self.move(*weights, None)
        return loss


def open_seeds(out, seeds, lessons):
    """{seed: (path, state) of its checkpoint} of the seeds that are not finished.

    With --dry_run: prints what would be trained, and exits. Refuses processes that would train
    apart, before any gradient is summed.
    """
    epochs, states = lessons.settings["epochs"], {}
    weights = 4 * models.parameters_of(lessons.network)
    todo = out.todo(seeds, lessons.files_of, weights)
    out.units = len(seeds) * epochs  # what the closing line counts
    for seed in seeds:
        path = out.folder / f"checkpoint_seed{seed}.pt"
        if seed in todo:
            states[seed] = path, read_checkpoint(path, epochs)
        elif out.process.is_main:
            path.unlink(missing_ok=True)  # killed between its last file and this
    done = [len(states[seed][1]["rows"]) if seed in states else epochs for seed in seeds]
    ranks.check_ranks(out, done)
    if states:  # weights twice, the optimiser's two averages and ours, once at a time
        files.require_space(out.flag, out.folder, 5 * weights + 2**20)
    return states


def read_checkpoint(path, epochs):
    """What `Learner.save` wrote after one of the epochs before the last; no rows: no checkpoint."""
    if not path.exists():
        return {"rows": []}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done = [row["epoch"] for row in state["rows"]]
        if done != list(range(len(done))) or not 0 < len(done) < epochs:
            raise ValueError(f"not after one of the {epochs} epochs")
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        refuse(f"{path}: not a checkpoint of this run ({reason}); remove it to begin anew")
    return state


def train(out, states, lessons, forward, test, checkpoint_every, track=None):
    """Train one network per seed, one after the other, over one loader.

    states    of `open_seeds`;   test: network -> {"top1", "top5"};   track: (seed, row) -> None
    lessons   settings: {flag: value} of batches, optimiser, schedule and loss
              count: images of an epoch;   network() -> a new one;   loss: a function as those above
              loader(keys): iterator over [(epoch, number)];   part: its item -> Part
              files_of: seed -> names of its weights (safetensors) and rows (JSON)
    """
    settings, epochs = lessons.settings, lessons.settings["epochs"]
    numbers = range(batches.batches_of(lessons.count, settings["batch_size"]))
    left = [epoch for _, state in states.values() for epoch in range(len(state["rows"]), epochs)]
    items = lessons.loader([(epoch, number) for epoch in left for number in numbers])
    bar = out.progress(total=len(left) * lessons.count, desc="training", unit="image")
    if ranks.stop_asked(out):  # while images were read
        ranks.leave_together(out)
    with bar, memory_for("in training", "lower --bn_batch, or raise --gradient_accumulation_steps"):
        for seed, (path, state) in states.items():
            learner = Learner(lessons, seed, forward)
            learner.restore(path, state)
            for done in range(len(learner.rows) + 1, epochs + 1):
                row = learner.train_epoch(islice(items, len(numbers)), out.process, bar)
                if done % settings["eval_every"] == 0 or done == epochs:
                    row |= test(learner.tested)
                    bar.set_postfix(seed=seed, top1=f"{row['top1']:.2f}")
                learner.rows.append(row)
                out.made += 1
                if track:
                    track(seed, row)
                asked = ranks.stop_asked(out)
                if out.process.is_main and done == epochs:
                    learner.finish(out, path)
                elif out.process.is_main and (done % checkpoint_every == 0 or asked):
                    learner.save(out, path)
                if asked:
                    ranks.leave_together(out)


def read_rows(out, name, epochs):
    """{"seed", "last", "best", "rows"} of a finished seed, from its file of rows."""
    try:
        found = files.read_json(out.folder / name)
        rows, keep = found["rows"], ("epoch", "top1", "top5")
        tested = [{k: row[k] for k in keep} for row in rows if "top1" in row]
        if [row["epoch"] for row in rows] != list(range(epochs)):
            raise ValueError(f"does not hold {epochs} epochs")
        best = max(tested, key=lambda row: row["top1"])
        return {"seed": found["seed"], "last": tested[-1], "best": best, "rows": rows}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        reason = f"({type(error).__name__}: {error})"
        refuse(
            f"{out.folder / name}: not a seed's rows {reason}; remove it to train this seed again"
        )
