"""Training a network, teacher or student: one loop, one checkpoint, one stop (paper, 3.3 and 4.1).

    train(out, seeds, lessons, forward, make_tester, checkpoint_every)  # one network per seed

A batch is cut into chunks of `bn_batch` images: what BatchNorm sees together. A chunk is one
forward and backward pass, its loss is divided by the images of the whole batch, and the gradients
of all processes are summed: a step's gradient is that of the batch, however it is cut.
"""

import contextlib
import copy
import io
import math
from functools import partial
from itertools import islice
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F

from matching import batches, labels, models, ranks
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
    tests = "epochs between two tests, from epoch 0 on; 0: none; the last is tested too"
    parser.setting("--eval_every", type=number(int, 0), default=50, help=tests)
    parser.flag("--checkpoint_every", type=count, default=10, help="epochs between checkpoints")


# ---- optimiser and schedule

SCHEDULES = ("linear", "cosine", "cos2", "step", "multistep", "constant")
STEPS = {"step": ((2, 3), (5, 6)), "multistep": ((4, 5), (9, 10), (19, 20))}  # of all epochs
DECAYED = ("weights", "all")


def make_optimizer(model, sgd, lr, weight_decay, momentum=0.9, fused=False, decay_on="weights"):
    """SGD or AdamW. Weight decay as the release: on what is called a weight and has more than one
    dimension, so not on Swin's bias tables or ViT's position embedding; or on all parameters.
    """
    groups = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for name, p in model.named_parameters():
        decayed = decay_on == "all" or ("weight" in name and p.ndim > 1)
        groups[0 if decayed else 1]["params"] += [p] if p.requires_grad else []
    options = {"lr": lr, "fused": fused or None, **({"momentum": momentum} if sgd else {})}
    return (torch.optim.SGD if sgd else torch.optim.AdamW)(groups, **options)


def lr_factor(schedule, epoch, epochs, cos_stretch=1.0, warmup_epochs=0, step_factor=0.2, **_):
    """Learning rate of `epoch` (from 0) over the peak."""
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    t, total = epoch - warmup_epochs, epochs - warmup_epochs
    if schedule == "cosine":  # the release's --cos; stretched by 2, to half: RDED, RD3
        return (1 + math.cos(math.pi * t / (cos_stretch * total))) / 2
    if schedule == "linear":  # the release without --cos; stretched by 2, to half: EDC
        return 1 - t / (cos_stretch * total)
    if schedule == "cos2":  # EDC: the cosine until 5/6, then lower at once, and linear to 0
        late = t > 5 * total / 6
        factor = (1 + math.cos(math.pi * min(t / total, 5 / 6) / cos_stretch)) / 2
        return factor * (1 - t / total) if late else factor
    if schedule == "constant":
        return 1.0
    return step_factor ** sum(epoch >= n * epochs // d for n, d in STEPS[schedule])


def check_warmup(warmup_epochs, epochs):
    if warmup_epochs >= epochs:
        refuse(f"--warmup_epochs {warmup_epochs}: not below the {epochs} epochs of training")


# ---- losses, summed over the rows; called as loss(outputs, goal, **settings)


class Goal(NamedTuple):
    """What a network should say of n images: a teacher's logits, or their classes."""

    logits: torch.Tensor | None  # (n, classes); None for hard labels
    targets: torch.Tensor  # (n,) class of each image
    partners: torch.Tensor  # (n,) class of the image mixed in
    lam: float = 1.0  # share of the image itself
    top: torch.Tensor | None = None  # (n, K) with --label_top_k: the classes of K of K + 1 logits
    weights: torch.Tensor | None = None  # (n,) with --loss_weights: what an image counts

    def of(self, rows):
        return Goal(*(v[rows] if isinstance(v, torch.Tensor) else v for v in self))

    def total(self, loss, *args, **options):
        """One of PyTorch's losses, summed over the rows; with weights, each row's times its weight.
        A step divides either by the images of the whole batch, however that is cut.
        """
        if self.weights is None:
            return loss(*args, reduction="sum", **options)
        losses = loss(*args, reduction="none", **options)  # (n,) or (n, classes)
        return (self.weights * losses.reshape(len(losses), -1).sum(1)).sum()


def kl_loss(outputs, goal, temperature, **_):
    """KL(teacher || student), both at temperature T and without T^2, as the release."""
    if goal.top is not None:
        outputs = labels.top_and_rest(outputs, goal.top, temperature)
    log_p = F.log_softmax(outputs / temperature, 1)
    q = F.softmax(goal.logits.to(outputs.dtype) / temperature, 1)
    return goal.total(F.kl_div, log_p, q)


def hard_loss(outputs, goal, label_smoothing=0.0, **_):
    """Cross-entropy on class indices, mixed by lambda."""
    entropy = partial(goal.total, F.cross_entropy, outputs, label_smoothing=label_smoothing)
    loss = entropy(goal.targets)
    if goal.lam == 1:
        return loss
    return goal.lam * loss + (1 - goal.lam) * entropy(goal.partners)


def mse_ce_loss(outputs, goal, ce_weight, **_):
    """EDC: squared error of the logits (mean over classes) + ce_weight x cross-entropy with the
    image's own class, whatever is mixed into it.
    """
    mse = goal.total(F.mse_loss, outputs, goal.logits.to(outputs.dtype)) / outputs.shape[1]
    return mse + ce_weight * goal.total(F.cross_entropy, outputs, goal.targets)


LOSSES = {"kl": kl_loss, "mse_ce": mse_ce_loss}  # {--loss: function}


# ---- forward passes


class Forward:
    """How forward passes run, by the flags of the same names."""

    def __init__(self, device, amp="none", channels_last=False, compiled=False):
        self.device, self.amp, self.compiled = device, amp, compiled
        self.layout = torch.channels_last if channels_last else torch.preserve_format
        self.dtype = torch.float64 if amp == "fp64" else torch.float32

    def place(self, model):
        """The network on the device, in its precision and layout."""
        model = model.to(self.device, self.dtype, memory_format=self.layout)
        if self.compiled:
            model.compile()
        return model

    def __call__(self, model, x):
        """Logits in float32 (float64 with --amp fp64).   x (B, 3, S, S)"""
        x = x.to(self.dtype, memory_format=self.layout)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp == "bf16"):
            return model(x).to(self.dtype)


@contextlib.contextmanager
def seeded(*key, device="cpu"):
    """PyTorch's global generators set from `key` inside, and restored."""
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_of(*key))
        yield


def has_dropout(model):
    """Whether a forward pass in train mode draws numbers: dropout, stochastic depth."""
    words = ("dropout", "stochasticdepth", "droppath")
    return any(word in type(m).__name__.lower() for m in model.modules() for word in words)


# ---- the loop


class Part(NamedTuple):
    """What this process trains on of one batch, on the device."""

    count: int  # images of the whole batch
    x: torch.Tensor  # (n, 3, S, S) this process's rows, normalised and mixed
    goal: Goal  # of the same rows


class Learner:
    """One seed's network, optimiser, average of the weights, and rows: what a checkpoint holds."""

    def __init__(self, lessons, seed, forward):
        self.lessons, self.seed, self.forward, self.rows = lessons, seed, forward, []
        with seeded(seed, WEIGHTS):
            model = lessons.network()
        self.has_dropout, self.model = has_dropout(model), forward.place(model)
        s, sgd = lessons.settings, lessons.settings["sgd"]
        self.lr_flag = "learning_rate" if sgd else "adamw_lr"  # the flag that says the peak
        decay = s["weight_decay" if sgd else "adamw_weight_decay"]
        how = s[self.lr_flag], decay, s["momentum"], s["fused"], s["decay_on"]
        self.optimizer = make_optimizer(self.model, sgd, *how)
        self.parts, self.tested = {"model": self.model, "optimizer": self.optimizer}, self.model
        if s["ema"]:  # EDC's average, which starts from the initial weights, and is tested
            self.tested = copy.deepcopy(self.model).requires_grad_(False)
            self.parts["average"] = self.tested
            # not swa_utils.AveragedModel: it waits for the GPU at every step
            self.update_average = torch.optim.swa_utils.get_ema_multi_avg_fn(s["ema"])

    def restore(self, path, state):
        """Go on from a checkpoint."""
        with reading(path):
            for name, part in self.parts.items() if state["rows"] else ():
                part.load_state_dict(state[name])
        self.rows = state["rows"]

    def save(self, out, path):
        """One checkpoint: the same bytes for the same values."""
        state, buffer = {name: part.state_dict() for name, part in self.parts.items()}, io.BytesIO()
        torch.save({**state, "rows": self.rows}, buffer)
        out.write(path.name, buffer.getvalue())

    def finish(self, out, path):
        """Weights, then rows; then the checkpoint goes."""
        weights, rows = self.lessons.files_of(self.seed)
        state = {k: v.detach().cpu().contiguous() for k, v in self.tested.state_dict().items()}
        out.write(weights, safetensors.torch.save(state))
        out.write(rows, files.json_text({"seed": self.seed, "rows": self.rows}))
        path.unlink(missing_ok=True)

    def train_epoch(self, items, process, bar):
        """One epoch over `items`; returns its row {"epoch", "lr", "loss"}."""
        settings, model, epoch = self.lessons.settings, self.model.train(), len(self.rows)
        lr = settings[self.lr_flag] * lr_factor(epoch=epoch, **settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total, seen, steps = torch.zeros((), device=process.device), 0, 0
        for steps, item in enumerate(items, 1):
            part = self.lessons.part(item)
            chunks, _ = ranks.rank_chunks(part.count, settings["bn_batch"], process)
            total += self.step(part, chunks, process.world, (self.seed, DROPOUT, epoch, steps - 1))
            seen += len(chunks)
            bar.update(part.count)
        ranks.average_buffers(model, seen, process.world)
        for mean, value in zip(self.tested.buffers(), model.buffers()):
            mean.copy_(value)  # onto itself without --ema
        ranks.sum_over_ranks([total], process.world)
        loss = total.item() / steps
        if not math.isfinite(loss):  # no later one would be finite
            refuse(f"epoch {epoch}: the loss is {loss}; lower --{self.lr_flag}")
        return {"epoch": epoch, "lr": lr, "loss": loss}

    def seeds(self, *key):
        """For dropout; a network without draws nothing."""
        drawn = self.has_dropout
        return seeded(*key, device=self.forward.device) if drawn else contextlib.nullcontext()

    def step(self, part, chunks, world, key):
        """One optimiser step on this process's part of a batch; returns its share of the loss."""
        total, settings = torch.zeros((), device=part.x.device), self.lessons.settings
        if settings["bn_refresh"]:  # RDED: BatchNorm's statistics move twice per step
            for first, rows in chunks:
                with torch.no_grad(), self.seeds(*key, first, 1):
                    self.forward(self.model, part.x[rows])
        self.optimizer.zero_grad()
        for first, rows in chunks:
            with self.seeds(*key, first):
                outputs = self.forward(self.model, part.x[rows])
                loss = self.lessons.loss(outputs, part.goal.of(rows), **settings)
            # differs from the release: divided by the batch as it is, so a short one counts in full
            loss = loss / part.count
            loss.backward()
            total += loss.detach().float()
        ranks.sum_gradients(self.model, world)
        self.optimizer.step()
        if settings["ema"]:
            self.update_average(*(list(m.parameters()) for m in (self.tested, self.model)), None)
        return total


@contextlib.contextmanager
def reading(path):
    """What fails inside fails for a file that is damaged or of another run: one line."""
    try:
        yield
    except Exception as error:  # torch.load raises whatever a damaged file makes it raise
        reason = f"{type(error).__name__}: {error!s:.200}"
        refuse(f"{path}: not of this run ({reason}); remove it to train this seed again")


def read_checkpoint(path, epochs):
    """What `Learner.save` wrote after one of the epochs before the last; no rows: no checkpoint."""
    if not path.exists():
        return {"rows": []}
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        done = [row["epoch"] for row in state["rows"]]
        if done != list(range(len(done))) or not 0 < len(done) < epochs:
            raise ValueError(f"not after one of the {epochs} epochs")
    return state


def read_rows(out, name):
    """{"seed", "last", "best", "rows"} of a finished seed, from its file of rows."""
    with reading(out.folder / name):
        found = files.read_json(out.folder / name)
        tested = [row for row in found["rows"] if "top1" in row]
        tested = [{name: row[name] for name in ("epoch", "top1", "top5")} for row in tested]
        best = max(tested, key=lambda row: row["top1"])
        return {"seed": found["seed"], "last": tested[-1], "best": best, "rows": found["rows"]}


def open_seeds(out, seeds, lessons):
    """{seed: (path, state) of its checkpoint} of the seeds that are not finished."""
    epochs, states, done = lessons.settings["epochs"], {}, 0
    weights = 4 * models.parameters_of(lessons.network)
    todo = out.todo(seeds, lessons.files_of, weights)
    out.units = len(seeds) * epochs  # what the closing line counts
    for seed in seeds:
        path = out.folder / f"checkpoint_seed{seed}.pt"
        if seed in todo:
            states[seed] = path, read_checkpoint(path, epochs)
        elif out.process.is_main:
            path.unlink(missing_ok=True)  # killed between its last file and this
        done += len(states[seed][1]["rows"]) if seed in todo else epochs
    ranks.check_agreement(out, done)
    if states:  # weights twice, the optimiser's two averages and ours, once at a time
        files.require_space(out.flag, out.folder, 5 * weights + 2**20)
    return states


def train(out, seeds, lessons, forward, make_tester, checkpoint_every, track=None):
    """Train one network per seed, one after the other, over one loader.

    make_tester   () -> function network -> {"top1", "top5"}, once images are wanted
    track         (seed, row) -> None, after each epoch
    lessons       what is trained on: lessons.Lessons of a student, train_teacher.RealImages; has
                  settings   {flag: value} of batches, optimiser, schedule and loss
                  count      images of an epoch;   network: () -> a new network
                  loss       a function as those above;   part: item -> Part
                  loader     [(epoch, number of the batch, seed)] -> iterator of items
                  files_of   seed -> names of its weights (safetensors) and rows (JSON)
    """
    states = open_seeds(out, seeds, lessons)
    if not states:
        return
    test, settings, epochs = make_tester(), lessons.settings, lessons.settings["epochs"]
    numbers = range(batches.batches_of(lessons.count, settings["batch_size"]))
    starts = {seed: len(state["rows"]) for seed, (_, state) in states.items()}
    left = [(epoch, seed) for seed, start in starts.items() for epoch in range(start, epochs)]
    items = lessons.loader([(epoch, number, seed) for epoch, seed in left for number in numbers])
    bar = out.progress(total=len(left) * lessons.count, desc="training", unit="image")
    if ranks.stop_asked(out):  # while images were read
        out.leave_if_asked()
    with bar, memory_for("in training", "lower --bn_batch, or raise --gradient_accumulation_steps"):
        for seed, (path, state) in states.items():
            learner = Learner(lessons, seed, forward)
            learner.restore(path, state)
            for done in range(len(learner.rows) + 1, epochs + 1):
                # one iterator serves all epochs and seeds: an epoch takes its share of it
                row = learner.train_epoch(islice(items, len(numbers)), out.process, bar)
                every = settings["eval_every"]
                if done == epochs or every and row["epoch"] % every == 0:
                    row |= test(learner.tested)
                    bar.set_postfix_str(f"seed {seed}, epoch {done}: top-1 {row['top1']:.2f}")
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
                    ranks.stop_asked(out)  # waits: who leaves while rank 0 saves may get it killed
                    out.leave_if_asked()
