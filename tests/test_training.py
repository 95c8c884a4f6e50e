"""The loop that trains teachers and students: losses, exact steps, restarts, several processes."""

import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from matching import evaluation, labels, models, ranks, train_teacher, training
from scripts import files
from scripts.runtime import Process
from tests.conftest import SUBSET, exits, picture_folder, tree
from validate import train_FKD

OFTEN = ["--checkpoint_every", "1", "--eval_every", "1", "--num_workers", "0", "--device", "cpu"]
TEACHER = [*SUBSET, *OFTEN, "--arch", "convnet_mini", "--epochs", "3", "--batch_size", "8"]
CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    "schedule, options, expected",
    [
        ("cosine", {}, [1, 0.75, 0.25]),  # D4M
        ("linear", {}, [1, 2 / 3, 1 / 3]),  # the release without --cos; others in test_recipes
        ("constant", {}, [1, 1, 1]),
        ("linear", {"warmup_epochs": 100}, [1 / 101, 1, 0.5]),
    ],
)
def test_learning_rates(schedule, options, expected):
    """At the start, a third and two thirds of 300 epochs."""
    rates = [training.lr_factor(schedule, epoch, 300, **options) for epoch in (0, 100, 200)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("kept", [1, 3, 4])
@pytest.mark.parametrize("temperature", [0.5, 20.0])
def test_the_kl_over_the_largest_logits_and_the_rest(kept, temperature):
    """As probabilities, summed over the rest; with one class in the rest it is the KL of all."""
    draw = torch.Generator().manual_seed(0)
    z, t = (torch.randn(6, 5, generator=draw, dtype=torch.float64) * 4 for _ in range(2))
    z.requires_grad_(True)
    top, none = t.argsort(1, descending=True)[:, :kept], torch.zeros(6, dtype=torch.int64)

    def events(x):
        p = (x / temperature).softmax(1)
        others = torch.ones_like(p).scatter(1, top, 0)
        return torch.cat([p.gather(1, top), (p * others).sum(1, keepdim=True)], 1)

    p, q = events(z), events(t)
    expected = (q * (q.log() - p.log())).sum()
    [gradient] = torch.autograd.grad(expected, z)
    shortened = labels.top_and_rest(t, top, temperature)
    goal = training.Goal(shortened, none, none, top=top)
    found = training.kl_loss(z, goal, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], gradient, rtol=0, atol=1e-12)
    whole = training.kl_loss(z, training.Goal(t, none, none), temperature)
    assert (abs(whole - found) < 1e-12) == (kept == 4) and found <= whole + 1e-12


def new_learner(network, forward=None, device=CPU, loss=training.hard_loss, **settings):
    """A Learner without a run."""
    usual = {"sgd": True, "learning_rate": 0.1, "weight_decay": 0, "momentum": 0, "fused": False}
    usual |= {"schedule": "constant", "epochs": 2, "bn_batch": 4, "ema": 0, "bn_refresh": False}
    usual["decay_on"] = "weights"
    lessons = SimpleNamespace(settings={**usual, **settings}, loss=loss, part=lambda part: part)
    lessons.network = lambda: models.create_model(network, 3, 32).to(device)
    return training.Learner(lessons, 0, forward or training.Forward(CPU))


def test_the_average_starts_from_the_initial_weights(small_net):
    """EDC: average <- decay average + (1 - decay) weights, from the first step on."""
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    learner, part = new_learner(small_net, ema=0.9), training.Part(4, x, training.Goal(None, y, y))
    expected = [p.clone() for p in learner.model.parameters()]
    for _ in range(2):
        learner.train_epoch([part], Process(0, 1, CPU), SimpleNamespace(update=print))
        expected = [0.9 * e + 0.1 * p for e, p in zip(expected, learner.model.parameters())]
        for mean, e in zip(learner.tested.parameters(), expected):
            torch.testing.assert_close(mean, e)
        assert torch.equal(learner.tested[1].running_var, learner.model[1].running_var)


def test_the_extra_forward_sees_the_images_of_the_step(small_net):
    """RDED: its CutMix is in place, so BatchNorm's statistics move twice on the mixed images."""
    x, y, found = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), []
    for steps, refresh in ((2, False), (1, True)):
        learner = new_learner(small_net, learning_rate=0, bn_refresh=refresh)
        for _ in range(steps):
            part = training.Part(4, x, training.Goal(None, y, y))
            learner.step(part, [(0, slice(0, 4))], 1, (0,))
        found.append(learner.model[1].state_dict())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(*(state[name] for state in found))


# ---- exact steps


@pytest.mark.parametrize("count", [3, 7])
def test_the_gradient_of_a_batch_is_that_of_its_mean_loss(count):
    """However it is cut, and however many images it has."""
    learner = new_learner("convnet_mini", training.Forward(CPU, "fp64"), learning_rate=0)
    x, y = torch.randn(count, 3, 32, 32).double(), torch.arange(count) % 3
    part = training.Part(count, x, training.Goal(None, y, y))
    torch.nn.functional.cross_entropy(learner.model(x), y).backward()
    expected = [p.grad.clone() for p in learner.model.parameters()]
    for size in (count, 3, 2):
        learner.step(part, ranks.rank_chunks(count, size, Process(0, 1, CPU))[0], 1, (0,))
        for p, gradient in zip(learner.model.parameters(), expected):
            torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "count, size, world",
    [(1024, 73, 7), (9, 4, 2), (5, 8, 3), (1, 4, 2), (3, 2, 1), (12, 1, 5)],
)
def test_chunks_cover_a_batch_once(count, size, world):
    per_rank = [ranks.rank_chunks(count, size, Process(rank, world, CPU)) for rank in range(world)]
    rows = torch.cat([rows for _, rows in per_rank])
    assert rows.sort().values.tolist() == list(range(count))
    for chunks, own in per_rank:
        for first, rows in chunks:
            assert own[rows].tolist() == list(range(first, first + rows.stop - rows.start))
    lengths = [rows.stop - rows.start for chunks, _ in per_rank for _, rows in chunks]
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= max(1.05 * size, 3)
    assert min(lengths) > 1 or count == 1 or size == 1
    if count == 1024:  # as on the seven GPUs of the release
        assert sorted(lengths) == [73] * 12 + [74] * 2


@pytest.mark.parametrize("more", [False, True], ids=["", "top logits and weights"])
def test_a_step_waits_for_no_device(more):
    """On the meta device, which has no values: whatever would wait for a GPU's fails here."""
    device, forward = torch.device("meta"), training.Forward(CPU)
    forward.place = lambda model: model
    settings = {"sgd": False, "adamw_lr": 1e-3, "adamw_weight_decay": 0.01, "temperature": 20.0}
    settings["bn_refresh"] = True
    learner = new_learner("convnet_mini", forward, device, training.kl_loss, ema=0.9, **settings)
    with device:
        classes, x = torch.empty(8, dtype=torch.int64), torch.empty(8, 3, 32, 32)
        goal = training.Goal(torch.empty(8, 3), classes, classes)
        if more:
            top = torch.empty(8, 2, dtype=torch.int64)
            goal = goal._replace(top=top, weights=torch.empty(8))
        part = training.Part(8, x, goal)
    for _ in range(2):
        loss = learner.step(part, [(0, slice(0, 4)), (4, slice(4, 8))], 1, (0,))
    assert loss.device == device


# ---- tests on real images


def test_test_images_are_cropped_as_torchvision_does():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    draw = np.random.default_rng(0)
    theirs = Compose([Resize(256, InterpolationMode.BILINEAR), CenterCrop(224)])
    tight = Compose([Resize(224, InterpolationMode.BILINEAR), CenterCrop(224)])
    for w, h in ((300, 200), (200, 300), (256, 256), (97, 150)):
        image = Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8))
        assert np.array_equal(evaluation.centre_crop(image, 224), theirs(image))
        assert np.array_equal(evaluation.centre_crop(image, 224, 224), tight(image))


def test_test_images_are_those_of_the_training_classes_in_their_order(tmp_path, refused, capsys):
    picture_folder(tmp_path, ["ant", "cat", "dog"], split="val")
    split = evaluation.open_test("--val_dir", tmp_path, "imagefolder", ["dog", "ant"])
    assert [items[0].parent.name for items in split.items] == ["dog", "ant"] and split.count == 6
    assert "classes that training does not know are left out, first cat" in capsys.readouterr().err
    lacking = partial(evaluation.open_test, "--val_dir", tmp_path, "imagefolder", ["ant", "elk"])
    refused(lambda argv: lacking(), [], "--val_dir", "no class elk", "1 of 2")
    picture_folder(tmp_path / "b", ["ant"])
    one = partial(evaluation.open_test, "--val_dir", tmp_path / "b", "imagefolder", ["ant"])
    refused(lambda argv: one(), [], "expected one folder of val images")
    assert one(on_train=True).name == "train"


def test_top_5_over_batches_of_several_lengths():
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.arange(7, 0, -1.0).expand(len(x), 7)

    shown, half = (torch.zeros(7, 4, 4, 3, dtype=torch.uint8), torch.arange(7)), (0.5, 0.5, 0.5)
    forward = training.Forward(CPU)
    scores = evaluation.evaluate(Constant(), *shown, forward, half, half, rows=3)
    assert scores == {"top1": pytest.approx(100 / 7), "top5": pytest.approx(500 / 7)}


# ---- stopped, killed, spoilt


SEEDS = ["--seeds", 0, 1, "--ema", 0.9]


@pytest.mark.parametrize("kind, more", [("student", SEEDS), ("teacher", [])])
def test_interrupted_is_straight_through(kind, more, flags, tmp_path, epochs, monkeypatch):
    straight = run(flags[kind], tmp_path / "straight", *more)
    expected, counted = list(epochs), training.Learner.train_epoch
    epochs.clear()

    def stopping(self, *args):
        if (self.seed, len(self.rows)) in stops:
            stops.remove((self.seed, len(self.rows)))
            os.kill(os.getpid(), signal.SIGUSR1)
        return counted(self, *args)

    stops = [expected[1], expected[-1]]
    monkeypatch.setattr(training.Learner, "train_epoch", stopping)
    for _ in range(2):  # in the middle, and at the very end
        with exits(75):
            run(flags[kind], tmp_path / "stopped", *more)
    stopped = run(flags[kind], tmp_path / "stopped", *more)
    assert epochs == expected and tree(straight) == tree(stopped)
    assert not list(stopped.glob("checkpoint*"))


SPOILT = {
    "an empty optimiser": {"optimizer": {}},
    "another network": {"model": {"w": torch.zeros(2)}},
    "no rows": {"rows": None},
    "no epoch": {"rows": []},
    "rows of other epochs": {"rows": [{"epoch": 5}, {"epoch": 6}]},
    "more epochs than there are": {"rows": [{"epoch": n} for n in range(9)]},
}


def test_a_killed_run_repeats_only_what_came_after_its_checkpoint(flags, tmp_path, epochs, refused):
    pair, more = flags["student"], ["--checkpoint_every", 2]
    straight = run(pair, tmp_path / "straight", *more)

    def killed():  # at the last moment, as by kill -9
        training.Learner.finish = lambda *_: os._exit(9)
        run(pair, tmp_path / "killed", *more)

    assert forked(killed) == [9]
    [path] = tmp_path.glob("killed/*/checkpoint_seed0.pt")
    whole, words = path.read_bytes(), (path, "remove it to train this seed again")
    for spoilt in SPOILT.values():
        state = {**torch.load(path, weights_only=True), **spoilt}
        torch.save({k: v for k, v in state.items() if v is not None}, path)
        refused(lambda argv: run(pair, tmp_path / "killed", *more), [], *words)
        path.write_bytes(whole)
    epochs.clear()
    assert tree(run(pair, tmp_path / "killed", *more)) == tree(straight) and epochs == [(0, 2)]


@pytest.mark.parametrize("kind, flag", [("student", "adamw_lr"), ("teacher", "learning_rate")])
def test_what_ends_a_training_names_the_flag(kind, flag, flags, tmp_path, refused, monkeypatch):
    main, argv = flags[kind]
    argv = [*argv, "--output_dir", tmp_path, f"--{flag}", "1e30"]
    refused(main, argv, f"the loss is nan; lower --{flag}")
    assert not list(tmp_path.rglob("*.safetensors"))
    full = MagicMock(side_effect=torch.OutOfMemoryError)
    monkeypatch.setattr(training.Learner, "step", full)
    refused(main, argv, "out of GPU memory", "--bn_batch")


# ---- several processes


def forked(*functions):
    """Run functions at once in forked processes, ranks of one job; returns their statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world, children = len(functions), []
    for rank, function in enumerate(functions):
        children.append(os.fork())
        if children[-1]:
            continue
        code = 1
        try:
            if world > 1:
                ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
                ranked |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in ranked.items()})
                sys.stderr = open(f"stderr{rank}", "w", buffering=1)
            function()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def error(rank):
    lines = Path(f"stderr{rank}").read_text().splitlines()
    assert not any("Traceback" in line for line in lines), lines
    [line] = [line for line in lines if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_two_processes_train_as_one(kind, flags, teacher, random, tmp_path):
    """Batches of 5 in chunks of 2: rank 0 has two, rank 1 one; the teacher's stay whole."""
    pair, more = flags[kind], ["--amp", "fp64", "--bn_batch", 2]
    if kind == "student":
        online = ["--train_dir", random, "--online", "--arch", "convnet_mini", "--model"]
        online += ["convnet_mini", "--teacher_checkpoint", teacher, "--epochs", 3]
        online += ["--batch_size", 5, "--mix_type", "cutmix", *OFTEN]
        pair = train_FKD.main, list(map(str, online))
    one, both = run(pair, tmp_path / "one", *more), partial(run, pair, tmp_path / "two", *more)
    assert forked(both, both) == [0, 0]
    two = tmp_path / "two" / one.name
    assert largest_difference(weights(one), weights(two)) < 1e-9
    rows = "seed1000.json" if kind == "teacher" else "seed0.json"
    ours, theirs = (files.read_json(folder / rows)["rows"] for folder in (one, two))
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["top1"] == b["top1"]


@pytest.mark.parametrize("bn_batch, chunks", [(2, (3, 2)), (16, (3, 0))])
def test_batch_norm_is_the_mean_over_processes_weighted_by_chunks(
    bn_batch, chunks, flags, tmp_path, small_net, monkeypatch
):
    """Batches of 5, 5 and 2; a process without a chunk counts nothing."""
    average, names = ranks.average_buffers, ("1.running_mean", "1.running_var")

    def saving(model, seen, world):
        torch.save({"seen": seen, **model.state_dict()}, f"rank{os.environ['RANK']}.pt")
        average(model, seen, world)

    monkeypatch.setattr(ranks, "average_buffers", saving)
    more = ["--model", small_net, "--bn_batch", bn_batch, "--epochs", 1]
    both = partial(run, flags["student"], tmp_path / "two", *more)
    assert forked(both, both) == [0, 0]
    a, b = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    [path] = (tmp_path / "two").glob("*/student_seed0.safetensors")
    (m, n), saved = chunks, load_file(path)
    assert (a["seen"], b["seen"]) == chunks
    for name in names:
        torch.testing.assert_close(saved[name], (m * a[name] + n * b[name]) / (m + n))
    assert (a[name] - b[name]).abs().max() > 1e-3
    assert saved["1.num_batches_tracked"] == sum(chunks) // 2


def signalled(pair, *argv):
    """A training that gets a stop signal in its first epoch, and leaves its checkpoint."""
    step = training.Learner.step
    training.Learner.step = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), step(*args))[1]
    run(pair, *argv)


def test_processes_that_would_train_apart_are_refused(flags, tmp_path):
    """Two nodes, each with a disk of its own: only rank 0's has a checkpoint, or a finished run."""
    pair, more = flags["student"], ["--bn_batch", 16]
    assert forked(partial(signalled, pair, "node-0", *more)) == [75]
    for trained in (1, 3):
        both = [partial(run, pair, f"node-{rank}", *more) for rank in (0, 1)]
        assert forked(*both) == [2, 2]
        for rank in (0, 1):
            assert "ranks do not see the same --output_dir" in error(rank)
            assert f"0 and {trained} epochs" in error(rank)
        run(pair, "node-0", *more)
    both = [partial(run, pair, tmp_path / "rates", "--adamw_lr", lr) for lr in (0.1, 0.2)]
    assert forked(*both) == [2, 2]
    assert all("started with different settings" in error(rank) for rank in (0, 1))


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
    whole = partial(run, pair, tmp_path / "whole", *more)
    assert forked(whole, whole) == [0, 0]

    def dying():
        counted = training.Learner.train_epoch
        training.Learner.train_epoch = lambda self, *args: (
            os._exit(9) if self.rows else counted(self, *args)
        )
        run(pair, tmp_path / "died", *more)

    other = partial(run, pair, tmp_path / "died", *more)
    assert forked(other, dying) == [2, 9]
    assert "another of the 2 processes has died; run the same command to go on" in error(0)
    [folder] = (tmp_path / "died").iterdir()
    assert (folder / "checkpoint_seed0.pt").exists()
    assert forked(other, other) == [0, 0] and tree(folder) == tree(tmp_path / "whole" / folder.name)
