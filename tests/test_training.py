"""The loop that trains teachers and students: losses, exact steps, restarts, several processes."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from matching import models, ranks, train_teacher, training
from scripts import files
from scripts.runtime import this_process
from tests.conftest import ROOT, SUBSET, copy, exits, tree
from validate import train_FKD

OFTEN = ["--checkpoint_every", "1", "--eval_every", "1", "--num_workers", "0", "--device", "cpu"]
TEACHER = [*SUBSET, *OFTEN, "--arch", "convnet_mini", "--epochs", "3", "--batch_size", "8"]


@pytest.fixture(scope="module")
def flags(random, labels):
    """{"student", "teacher"}: (main, flags) of a training of three epochs."""
    student = ["--train_dir", str(random), "--fkd_path", str(labels), "--model", "convnet_mini"]
    student = [*student, *OFTEN, "--cos", "-T", "4"]
    return {"student": (train_FKD.main, student), "teacher": (train_teacher.main, TEACHER)}


def run(pair, root, *more):
    main, argv = pair
    return main([*argv, "--output_dir", str(root), *map(str, more)])


def weights(folder):
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    return {(n, k): v for n in names for k, v in load_file(folder / n).items()}


def largest_difference(a, b):
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.fixture
def epochs(monkeypatch):
    """The (seed, epoch) of every epoch that is trained, as it begins."""
    done, original = [], training.Learner.train_epoch

    def train_epoch(self, *args):
        done.append((self.seed, len(self.rows)))
        return original(self, *args)

    monkeypatch.setattr(training.Learner, "train_epoch", train_epoch)
    return done


@pytest.fixture
def small_net(monkeypatch):
    """A network with BatchNorm and dropout, by name."""

    def create(num_classes, image_size):
        norm = torch.nn.BatchNorm2d(8)
        layers = [torch.nn.Conv2d(3, 8, 3, stride=4), norm, torch.nn.ReLU(), torch.nn.Dropout(0.5)]
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(512, num_classes))

    monkeypatch.setitem(models.MODELS, "small_net", create)
    return "small_net"


# ---- losses, schedules, averages


def test_losses_are_their_formulas():
    draw = torch.Generator().manual_seed(0)
    z, t = (torch.randn(4, 3, dtype=torch.float64, generator=draw) for _ in range(2))
    y, other, lam = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 0]), 0.3
    goal, T, close = training.Goal(t, y, other, lam), 20.0, torch.testing.assert_close
    p, q = (t / T).softmax(1), (z / T).softmax(1)
    kl = (p * (p.log() - q.log())).sum()  # no T^2; divided by the batch it is "batchmean"
    close(training.kl_loss(z, goal, temperature=T, ce_weight=9), kl)
    log_q = z.log_softmax(1)
    ce = -(lam * log_q[range(4), y] + (1 - lam) * log_q[range(4), other]).sum()
    close(training.hard_loss(z, goal, temperature=T), ce)
    smooth = 0.9 * -log_q[range(4), y].sum() - 0.1 * log_q.mean(1).sum()
    close(training.hard_loss(z, training.Goal(None, y, y), label_smoothing=0.1), smooth)
    mse = ((z - t) ** 2).mean(1).sum()
    close(training.mse_ce_loss(z, goal, ce_weight=0.025), mse + 0.025 * ce)
    close(
        training.kl_loss(z[1:3], goal.of(slice(1, 3)), temperature=T) * 0 + 1,
        torch.ones(()).double(),
    )


def test_learning_rates():
    def factors(schedule, epochs, **options):
        at = (0, epochs // 2, epochs - 1)
        return [training.lr_factor(schedule, epoch, epochs, **options) for epoch in at]

    cosine, half = (1 + math.cos(math.pi * 299 / 300)) / 2, (1 + math.cos(math.pi / 4)) / 2
    assert factors("cosine", 300) == pytest.approx([1, 0.5, cosine])  # D4M
    stretched = [1, half, (1 + math.cos(math.pi * 299 / 600)) / 2]
    assert factors("cosine", 300, cos_stretch=2) == pytest.approx(stretched)  # RDED, EDC
    assert factors("linear", 300) == pytest.approx([1, 0.5, 1 / 300])  # the release without --cos
    assert factors("step", 2000) == pytest.approx([1, 1, 0.04])  # Minimax
    assert factors("constant", 7) == [1, 1, 1]
    warm = [training.lr_factor("linear", epoch, 6, warmup_epochs=2) for epoch in range(6)]
    assert warm == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_weight_decay_is_on_matrices_only():
    model = models.create_model("convnet_mini", 3, 32)
    for sgd in (False, True):
        decayed, others = training.make_optimizer(model, sgd, 1e-3, 0.01).param_groups
        assert decayed["weight_decay"] == 0.01 and all(p.ndim >= 2 for p in decayed["params"])
        assert others["weight_decay"] == 0 and all(p.ndim == 1 for p in others["params"])


LEARNT = {"sgd": True, "learning_rate": 0.1, "weight_decay": 0, "momentum": 0, "fused": False}
LEARNT |= {"schedule": "constant", "epochs": 2, "bn_batch": 4, "cos_stretch": 1.0}
LEARNT |= {"warmup_epochs": 0, "step_factor": 0.2, "ema": 0.9}


def test_the_average_starts_from_the_initial_weights(small_net):
    """EDC: average <- decay average + (1 - decay) weights, from the first step on."""
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    lessons = SimpleNamespace(settings=LEARNT, loss=training.hard_loss)
    lessons.network = lambda: models.create_model(small_net, 3, 32)
    lessons.part = lambda _: training.Part(4, x, training.Goal(None, y, y))
    device = torch.device("cpu")
    learner = training.Learner(lessons, 0, training.Forward(device))
    expected = [p.clone() for p in learner.model.parameters()]
    for _ in range(2):
        learner.train_epoch(
            [0], SimpleNamespace(device=device, rank=0, world=1), SimpleNamespace(update=len_of)
        )
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, learner.model.parameters())]
        for mean, e in zip(learner.average.parameters(), expected):
            torch.testing.assert_close(mean, e)
        assert torch.equal(learner.average[1].running_var, learner.model[1].running_var)
    assert learner.tested is learner.average


def len_of(count):
    return count


# ---- exact steps


@pytest.mark.parametrize("count", [3, 7])
def test_the_gradient_of_a_batch_is_that_of_its_mean_loss(count):
    """However it is cut, and however many images it has: the last one is shorter."""
    with training.seeded(0):
        model = models.create_model("convnet_mini", 3, 32).double()
    x, y = torch.randn(count, 3, 32, 32).double(), torch.arange(count) % 3
    goal, optimizer = training.Goal(None, y, y), torch.optim.SGD(model.parameters(), lr=0.0)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for size in (count, 3, 2):
        chunks, _ = training.rank_chunks(count, size, 0, 1)
        loss_of = lambda rows: training.hard_loss(model(x[rows]), goal.of(rows))  # noqa: E731
        training.train_step(model, optimizer, chunks, count, loss_of, 1)
        for p, gradient in zip(model.parameters(), expected):
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [["--bn_batch", 2], ["--gradient_accumulation_steps", 3]])
def test_the_cut_of_a_batch_changes_nothing(flags, tmp_path, cut):
    """Batches of 5, 5 and 2 in chunks of 2 (2 + 3: none of one image): float64, no BatchNorm."""
    for kind in flags:
        whole = weights(run(flags[kind], tmp_path / kind, "--amp", "fp64"))
        parts = weights(run(flags[kind], tmp_path / f"{kind}s", "--amp", "fp64", *cut))
        assert largest_difference(whole, parts) < 1e-9


@pytest.mark.parametrize(
    "count, size, world",
    [(1024, 73, 7), (10, 4, 2), (9, 4, 2), (5, 8, 3), (1, 4, 2), (3, 2, 1), (12, 1, 5)],
)
def test_chunks_cover_a_batch_once(count, size, world):
    per_rank = [training.rank_chunks(count, size, rank, world) for rank in range(world)]
    rows = torch.cat([rows for _, rows in per_rank])
    assert rows.sort().values.tolist() == list(range(count))
    lengths = [rows.stop - rows.start for chunks, _ in per_rank for _, rows in chunks]
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= max(1.05 * size, 3)
    assert min(lengths) > 1 or count == 1 or size == 1


def test_a_batch_of_1024_is_cut_as_on_the_seven_gpus_of_the_release():
    lengths = sorted(end - first for first, end in training.chunks_of(1024, 73))
    assert lengths == [73] * 12 + [74] * 2
    assert training.chunk_size(1024, 7, 2, None) == 74 and training.chunk_size(64, 1, 1, 73) == 64


def test_a_step_waits_for_no_device():
    """On the meta device, which has no values: whatever would wait for a GPU's fails here."""
    device = torch.device("meta")
    settings = {**LEARNT, "sgd": False, "adamw_lr": 1e-3, "adamw_weight_decay": 0.01}
    settings["temperature"] = 20.0
    lessons = SimpleNamespace(settings=settings, loss=training.kl_loss)
    lessons.network = lambda: models.create_model("convnet_mini", 3, 32).to(device)
    forward = training.Forward(torch.device("cpu"))
    forward.place = lambda model: model
    learner = training.Learner(lessons, 0, forward)
    with device:
        classes = torch.empty(8, dtype=torch.int64)
        goal = training.Goal(torch.empty(8, 3), classes, classes)
        part = training.Part(8, torch.empty(8, 3, 32, 32), goal, torch.empty(8, 3, 32, 32))
    for _ in range(2):
        loss = learner.step(part, [(0, slice(0, 4)), (4, slice(4, 8))], 1, None)
    assert loss.device == device and learner.average is not None


# ---- tests


def test_test_images_are_cropped_as_torchvision_does():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    draw = np.random.default_rng(0)
    theirs = Compose([Resize(256, InterpolationMode.BILINEAR), CenterCrop(224)])
    for w, h in ((300, 200), (200, 300), (256, 256), (97, 150)):
        image = Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8))
        assert np.array_equal(training.centre_crop(image, 224), theirs(image))


def test_top_5_over_batches_of_several_lengths():
    pixels, targets = torch.zeros(7, 4, 4, 3, dtype=torch.uint8), torch.arange(7)

    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.arange(7, 0, -1.0).expand(len(x), 7)

    forward, half = training.Forward(torch.device("cpu")), (0.5, 0.5, 0.5)
    scores = training.evaluate(Constant(), pixels, targets, forward, half, half, rows=3)
    assert scores == {"top1": pytest.approx(100 / 7), "top5": pytest.approx(500 / 7)}


# ---- stopped, killed, spoilt


@pytest.mark.parametrize(
    "kind, signum, more",
    [
        ("student", signal.SIGUSR1, ["--seeds", 0, 1, "--ema", 0.9]),
        ("teacher", signal.SIGTERM, []),
    ],
)
def test_interrupted_and_resumed_is_straight_through(
    kind, signum, more, flags, tmp_path, epochs, monkeypatch
):
    straight = run(flags[kind], tmp_path / "straight", *more)
    expected, counted = list(epochs), training.Learner.train_epoch
    epochs.clear()

    def stopping(self, *args):
        if (self.seed, len(self.rows)) in stops:
            stops.remove((self.seed, len(self.rows)))
            os.kill(os.getpid(), signum)
        return counted(self, *args)

    stops = [expected[1], expected[-1]]
    monkeypatch.setattr(training.Learner, "train_epoch", stopping)
    for _ in range(2):  # in the middle, and at the very end
        with exits(75):
            run(flags[kind], tmp_path / "stopped", *more)
    stopped = run(flags[kind], tmp_path / "stopped", *more)
    assert epochs == expected and tree(straight) == tree(stopped)
    assert not list(stopped.glob("checkpoint*"))


def test_a_signal_while_images_are_read_ends_the_run_before_the_first_epoch(
    flags, tmp_path, epochs, monkeypatch
):
    original = training.validation_pixels

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **options)

    monkeypatch.setattr(training, "validation_pixels", signalled)
    with exits(75):
        run(flags["student"], tmp_path)
    assert epochs == [] and not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_killed_run_repeats_only_what_came_after_its_checkpoint(kind, flags, tmp_path, epochs):
    more = ["--checkpoint_every", 2]
    straight = run(flags[kind], tmp_path / "straight", *more)

    def killed():
        training.Learner.finish = lambda *_: os._exit(9)  # as kill -9 at the last moment
        run(flags[kind], tmp_path / "killed", *more)

    assert forked(killed) == [9]
    epochs.clear()
    resumed = run(flags[kind], tmp_path / "killed", *more)
    assert epochs == [(0, 2)] and tree(resumed) == tree(straight)


SPOILT = {
    "no optimiser": {"optimizer": None},
    "an empty optimiser": {"optimizer": {}},
    "another network": {"model": {"w": torch.zeros(2)}},
    "no rows": {"rows": None},
    "no epoch": {"rows": []},
    "rows of other epochs": {"rows": [{"epoch": 5}, {"epoch": 6}]},
    "more epochs than there are": {"rows": [{"epoch": n} for n in range(9)]},
    "rows of anything": {"rows": [1, 2]},
    "NaN": {},
    "no file of torch": b"damaged",
}


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The folder of a student that was stopped in its last epoch."""
    root = tmp_path_factory.mktemp("stopped")

    def stop(*_):
        os._exit(9)

    def killed():
        training.Learner.finish = stop
        run(flags["student"], root)

    assert forked(killed) == [9]
    return next(root.iterdir())


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_refused(what, stopped, flags, tmp_path, refused):
    path = copy(stopped, tmp_path) / "checkpoint_seed0.pt"
    state, changes = torch.load(path, weights_only=True), SPOILT[what]
    if what == "NaN":
        changes = {"model": {k: v * math.nan for k, v in state["model"].items()}}
    if isinstance(changes, bytes):
        path.write_bytes(changes)
    else:
        torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
    words = ["the loss is nan"] if what == "NaN" else [path, "remove it to begin anew"]
    refused(lambda argv: run(flags["student"], tmp_path), [], *words)


def test_a_loss_that_is_not_finite_names_the_flag(flags, tmp_path, refused):
    for kind, flag in (("student", "--adamw_lr"), ("teacher", "--learning_rate")):
        argv = [*flags[kind][1], "--output_dir", tmp_path, flag, "1e30"]
        refused(flags[kind][0], argv, f"the loss is nan; lower {flag}")
        assert not list(tmp_path.rglob("*.safetensors"))


def test_running_out_of_gpu_memory_names_the_flag(flags, tmp_path, monkeypatch, refused):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "train_step", full)
    refused(lambda argv: run(flags["student"], tmp_path), [], "out of GPU memory", "--bn_batch")


# ---- several processes


def forked(*functions):
    """Run functions at once in forked processes, ranks of one job; returns their statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank, function in enumerate(functions):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if len(functions) > 1:
                    ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(functions)}
                    ranked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({name: str(value) for name, value in ranked.items()})
                sys.stderr = open(f"stderr{rank}", "w")
                function()
                code = 0
            except SystemExit as leaving:
                code = leaving.code
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def errors(rank):
    lines = Path(f"stderr{rank}").read_text().splitlines()
    assert not any("Traceback" in line for line in lines), lines
    return [line for line in lines if line.startswith("error: ")]


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_two_processes_train_as_one(kind, flags, teacher, random, tmp_path):
    """Batches of 5 in chunks of 2: rank 0 has two, rank 1 one; the teacher's stay whole."""
    pair, more = flags[kind], ["--amp", "fp64", "--bn_batch", 2]
    if kind == "student":
        online = ["--train_dir", random, "--online", "--arch", "convnet_mini", "--model"]
        online += ["convnet_mini", "--teacher_checkpoint", teacher, "--epochs", 3]
        online += ["--batch_size", 5, "--mix_type", "cutmix", *OFTEN]
        pair = train_FKD.main, list(map(str, online))
    one = run(pair, tmp_path / "one", *more)
    two = lambda: run(pair, tmp_path / "two", *more)  # noqa: E731
    assert forked(two, two) == [0, 0]
    assert largest_difference(weights(one), weights(tmp_path / "two" / one.name)) < 1e-9
    ours, theirs = (
        files.read_json(folder / "seed0.json")["rows"]
        for folder in (one, tmp_path / "two" / one.name)
    )
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["top1"] == b["top1"]


@pytest.mark.parametrize(
    "seen, mean, variance", [((3, 1), [2.0, 1.0], [7.0, 4.0]), ((2, 0), [1.0, 2.0], [1.0, 4.0])]
)
def test_batch_norm_is_the_mean_over_processes_weighted_by_chunks(seen, mean, variance):
    """Rank 0 saw 3 chunks and rank 1 saw 1: (3 a + 1 b) / 4; without a chunk it counts nothing."""
    means = torch.tensor([[1.0, 2.0], [5.0, -2.0]])

    def average():
        process = this_process("cpu")
        with ranks.joined(process):
            norm = torch.nn.BatchNorm1d(2)
            norm.running_mean.copy_(means[process.rank])
            norm.running_var.copy_(means[process.rank] ** 2)
            norm.num_batches_tracked.fill_(seen[process.rank])
            ranks.average_buffers(norm, seen[process.rank], process.world)
            torch.save(norm.state_dict(), f"norm{process.rank}.pt")

    assert forked(average, average) == [0, 0]
    for rank in (0, 1):
        state = torch.load(f"norm{rank}.pt", weights_only=True)
        assert state["running_mean"].tolist() == mean and state["running_var"].tolist() == variance
        assert state["num_batches_tracked"] == sum(seen) // 2


def test_a_students_statistics_are_those_of_both_processes(flags, tmp_path, small_net, monkeypatch):
    original = ranks.average_buffers

    def average_buffers(model, chunks, world):
        state = {"chunks": chunks, **{name: value.clone() for name, value in model.named_buffers()}}
        torch.save(state, f"rank{os.environ['RANK']}.pt")
        original(model, chunks, world)

    monkeypatch.setattr(ranks, "average_buffers", average_buffers)
    more = ["--model", small_net, "--bn_batch", 2, "--epochs", 1]
    two = lambda: run(flags["student"], tmp_path / "two", *more)  # noqa: E731
    assert forked(two, two) == [0, 0]
    a, b = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    [path] = (tmp_path / "two").glob("*/student_seed0.safetensors")
    saved = load_file(path)
    assert a["chunks"] > b["chunks"] > 0
    for name in ("1.running_mean", "1.running_var"):
        mean = (a["chunks"] * a[name] + b["chunks"] * b[name]) / (a["chunks"] + b["chunks"])
        torch.testing.assert_close(saved[name], mean)
        assert (saved[name] - a[name]).abs().max() > 1e-3


def signalled(pair, *argv):
    """A training that gets a stop signal in its first epoch, and leaves its checkpoint."""
    step = training.train_step
    training.train_step = lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), step(*a, **k))[1]
    run(pair, *argv)


def test_processes_that_see_different_folders_are_refused(flags):
    """Two nodes, each with a disk of its own: only rank 0's has a checkpoint, or a finished run."""
    more = ["--bn_batch", 16]
    assert forked(lambda: signalled(flags["student"], "node-0", *more)) == [75]
    for trained in (1, 3):
        both = [lambda root=f"node-{rank}": run(flags["student"], root, *more) for rank in (0, 1)]
        assert forked(*both) == [2, 2]
        for rank in (0, 1):
            [line] = errors(rank)
            assert "ranks do not see the same --output_dir" in line
            assert f"epoch 0 and {trained}" in line
        run(flags["student"], "node-0", *more)


def test_processes_of_different_settings_are_refused(flags, tmp_path):
    both = [lambda lr=lr: run(flags["student"], tmp_path, "--adamw_lr", lr) for lr in (0.1, 0.2)]
    assert forked(*both) == [2, 2]
    for rank in (0, 1):
        assert "started with different settings" in errors(rank)[0]


def test_no_process_leaves_before_the_checkpoint_is_written(flags):
    """srun --kill-on-bad-exit and torchrun kill the others as soon as one has left."""

    def first():
        save = training.Learner.save
        training.Learner.save = lambda *args: (time.sleep(1), save(*args))
        run(flags["student"], "out", "--bn_batch", 4)

    def second():
        try:
            signalled(flags["student"], "out", "--bn_batch", 4)
        finally:
            assert list(Path("out").glob("*/checkpoint_seed0.pt"))

    assert forked(first, second) == [75, 75]


def test_a_process_that_dies_is_one_line_and_a_rerun_goes_on(flags, tmp_path):
    pair, more = flags["student"], ["--bn_batch", 2]
    both = lambda: run(pair, tmp_path / "whole", *more)  # noqa: E731
    assert forked(both, both) == [0, 0]

    def dying():
        counted = training.Learner.train_epoch
        training.Learner.train_epoch = lambda self, *args: (
            os._exit(9) if self.rows else counted(self, *args)
        )
        run(pair, tmp_path / "died", *more)

    other = lambda: run(pair, tmp_path / "died", *more)  # noqa: E731
    assert forked(other, dying) == [2, 9]
    [line] = errors(0)
    assert "another of the 2 processes has died; run the same command to go on" in line
    [folder] = (tmp_path / "died").iterdir()
    assert (folder / "checkpoint_seed0.pt").exists()
    assert forked(other, other) == [0, 0] and tree(folder) == tree(tmp_path / "whole" / folder.name)


SLOWLY = """
import os, pathlib, time
from matching import training
from validate import train_FKD

pathlib.Path("rank-" + os.environ["RANK"]).write_text(str(os.getpid()))
epoch = training.Learner.train_epoch
training.Learner.train_epoch = lambda *args: (time.sleep(2), epoch(*args))[1]
train_FKD.main()
"""


@pytest.mark.slow
def test_torchrun_starts_a_training_again_whose_process_died(flags, tmp_path):
    """--max-restarts: torchrun stops the other and starts both; they go on from the checkpoint."""
    pair, more = flags["student"], ["--bn_batch", 2, "--output_dir", "out"]
    both = lambda: run(pair, tmp_path / "whole", *more[:2])  # noqa: E731
    assert forked(both, both) == [0, 0]
    Path("slowly.py").write_text(SLOWLY)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["--max-restarts=2", "slowly.py", *map(str, [*pair[1], *more])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open("printed", "w") as printed:
        job = subprocess.Popen(launch, env=environment, stdout=printed, stderr=printed)
    while not list(Path("out").glob("*/checkpoint_seed0.pt")) and job.poll() is None:
        time.sleep(0.01)
    before = [int(Path(f"rank-{rank}").read_text()) for rank in (0, 1)]
    os.kill(before[1], signal.SIGKILL)
    assert job.wait(300) == 0, Path("printed").read_text()[-2000:]
    assert not {int(Path(f"rank-{rank}").read_text()) for rank in (0, 1)} & set(before)
    [folder] = Path("out").iterdir()
    assert tree(folder) == tree(tmp_path / "whole" / folder.name)
