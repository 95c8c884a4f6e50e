"""Stage 4: stored and online labels train the same student, for any cut of the batch, processes and restarts."""

import json
import math
import os
import shutil
import signal
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tree
from PIL import Image
from safetensors.torch import load_file, save
from stage34 import CLASSES, PROTOCOL, copy, make_images, make_teacher, redo_manifest

from matching import generate_soft_label, training
from matching.models import MODELS, create_model
from matching.soft_labels import Item
from matching.training import Forward, lr_factor, rank_chunks, train_step
from scripts.files import read_json, write_json
from validate import train_FKD


class Base:
    """Images, teacher and labels that the tests share; nobody writes into them."""

    def __init__(self, root):
        self.images, self.teacher = make_images(root), make_teacher(root)
        self.teacher_flags = ["--arch", "convnet_mini", "--teacher_checkpoint", str(self.teacher)]
        flags = ["--fkd_path", str(root / "labels"), *self.teacher_flags, *PROTOCOL]
        self.labels = generate_soft_label.main(["--data", str(self.images), *flags])[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("base"))


STUDENT = ["--model", "convnet_mini", "--cos", "-T", "4", "--num_workers", "0", "--eval_every", "2"]


def train(base, root, *more, labels=None, images=None):
    data = ["--train_dir", str(images or base.images), "--fkd_path", str(labels or base.labels)]
    return train_FKD.main([*data, *STUDENT, "--output_dir", str(root), *map(str, more)])


def train_without_labels(base, root, *more):
    return train_FKD.main(
        ["--train_dir", str(base.images), *PROTOCOL, *STUDENT, "--output_dir", str(root), *map(str, more)]
    )


def weights(folder, seed=0):
    return load_file(folder / f"student_seed{seed}.safetensors")


def largest_difference(a, b):
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def results(folder):
    return read_json(folder / "results.json")


def test_a_step_is_made_without_reading_anything_back():
    """On the meta device, which has no values: whatever would wait for a GPU's fails here."""
    with torch.device("meta"):
        model, x, logits = create_model("convnet_mini", 3, 32), torch.empty(8, 3, 32, 32), torch.empty(8, 3)
    optimizer = training.make_optimizer(model, False, 1e-3, 0.01)
    chunks = [(0, slice(0, 4)), (4, slice(4, 8))]
    for _ in range(2):
        loss = train_step(
            model, optimizer, chunks, 8, lambda rows: training.soft_loss(model(x[rows]), logits[rows], 20.0), 1
        )
    assert loss.device.type == "meta"


def test_one_processs_logits_go_to_the_device_from_where_the_loader_put_them():
    """An indexed copy is not pinned. Two processes take theirs."""
    logits, index = torch.randn(8, 3), torch.arange(8)
    job = SimpleNamespace(recipe=train_FKD.Recipe("cosine"), teachers=[], targets=index * 10)
    batch, process = SimpleNamespace(index=index, partner=index.flip(0)), SimpleNamespace(device=torch.device("cpu"))
    feed = SimpleNamespace(mixed=lambda item: torch.zeros(len(index if item.rows is None else item.rows), 3, 2, 2))
    item = Item(0, 0, batch, None, None, None, logits)
    x, found, targets, other = train_FKD.prepare(job, item, feed, process, index)
    assert found.data_ptr() == logits.data_ptr() and len(x) == 8 and torch.equal(other, targets.flip(0))
    mine = torch.tensor([2, 5])
    item = item._replace(rows=torch.tensor([2, 4, 5]), held=index)
    x, found, targets, _ = train_FKD.prepare(job, item, feed, process, mine)
    assert len(x) == 2 and torch.equal(found, logits[mine]) and targets.tolist() == [20, 50]


# ---- the same student


def test_stored_and_online_labels_train_the_same_student(base, tmp_path):
    before = torch.random.get_rng_state()
    stored = train(base, tmp_path / "a", "--seeds", 0, 1)
    online = train_without_labels(base, tmp_path / "b", "--online", *base.teacher_flags, "--seeds", 0, 1)
    for seed in (0, 1):
        assert largest_difference(weights(stored, seed), weights(online, seed)) == 0
    assert results(stored)["seeds"] == results(online)["seeds"]
    assert largest_difference(weights(stored, 0), weights(stored, 1)) > 0.01
    again = train(base, tmp_path / "c", "--seeds", 0, 1, "--num_workers", 2)
    assert tree(stored) == tree(again)  # results.json has no seconds in it
    single = train(base, tmp_path / "d", "--seeds", 1)
    assert largest_difference(weights(stored, 1), weights(single, 1)) == 0
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is as it was
    found = results(stored)
    top1 = [s["last"]["top1"] for s in found["seeds"]]
    assert found["summary"]["last"]["top1"]["n"] == 2
    assert found["summary"]["last"]["top1"]["std"] == pytest.approx(np.std(top1, ddof=1))
    rows = found["seeds"][0]["rows"]
    assert [row["epoch"] for row in rows] == [0, 1, 2] and ["top1" in row for row in rows] == [False, True, True]
    assert str(tmp_path) not in json.dumps(found)


def test_labels_are_found_below_a_root(base, tmp_path, refused):
    direct = train(base, tmp_path / "a")
    assert tree(direct) == tree(train(base, tmp_path / "b", labels=base.labels.parent))
    root = tmp_path / "labels"
    for name in ("x", "y"):
        shutil.copytree(base.labels, root / f"{base.images.name}_{name}")
    refused(lambda argv: train(base, tmp_path / "c", labels=root), [], "2 label folders fit")
    refused(lambda argv: train(base, tmp_path / "c", labels=tmp_path), [], "no finished labels")


def test_accumulated_gradient_is_the_whole_batchs(base, tmp_path):
    """Batches of 5, 5 and 2 in chunks of 2 (2 + 3: none of a single image): float64, no BatchNorm, AdamW."""
    whole = weights(train(base, tmp_path, "--amp", "fp64"))
    for cut in (["--bn_batch", 2], ["--gradient_accumulation_steps", 3], ["--bn_batch", 3]):
        assert largest_difference(whole, weights(train(base, tmp_path, "--amp", "fp64", *cut))) < 1e-9


def test_gradient_of_a_short_batch_is_exact():
    with training.seeded(0):
        model = create_model("convnet_mini", 3, 32).double()
    x, logits = torch.randn(7, 3, 32, 32).double(), torch.randn(7, 3).double()
    gradients = []
    for size in (7, 3, 2):
        chunks, _ = rank_chunks(7, size, 0, 1)

        def loss_of(rows):
            return training.soft_loss(model(x[rows]), logits[rows], 4.0)

        train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), chunks, 7, loss_of, 1)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "count, size, world", [(1024, 73, 7), (10, 4, 2), (9, 4, 2), (5, 8, 3), (1, 4, 2), (3, 2, 1), (12, 1, 5)]
)
def test_chunks_cover_a_batch_once(count, size, world):
    per_rank = [rank_chunks(count, size, rank, world) for rank in range(world)]
    rows = torch.cat([rows for _, rows in per_rank])
    assert rows.sort().values.tolist() == list(range(count))
    lengths = [rows.stop - rows.start for chunks, _ in per_rank for _, rows in chunks]
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= max(1.05 * size, 3)
    assert min(lengths) > 1 or count == 1 or size == 1


def test_running_out_of_gpu_memory_names_the_flag(base, tmp_path, monkeypatch, refused):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_FKD, "train_step", full)
    refused(lambda argv: train(base, tmp_path), [], "out of GPU memory", "--bn_batch")


def test_a_batch_of_1024_is_cut_as_on_the_releases_seven_gpus():
    lengths = [end - first for first, end in training.chunks_of(1024, 73)]
    assert sorted(lengths) == [73] * 12 + [74] * 2


def test_interrupted_and_resumed_is_straight_through(base, tmp_path, monkeypatch):
    flags = ["--seeds", 0, 1, "--ema", 0.9, "--checkpoint_every", 1]
    straight = train(base, tmp_path / "straight", *flags)
    epochs, original = [], train_FKD.train_epoch

    def stopping(job, student, *args):
        epochs.append((student.seed, student.epoch))
        if stop_at == epochs[-1]:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(job, student, *args)

    monkeypatch.setattr(train_FKD, "train_epoch", stopping)
    for stop_at in ((0, 1), (1, 0)):  # noqa: B007 - `stopping` reads it
        with pytest.raises(SystemExit) as leaving:
            train(base, tmp_path / "stopped", *flags)
        assert leaving.value.code == 75
    stop_at = None
    stopped = train(base, tmp_path / "stopped", *flags)
    assert epochs == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert tree(straight) == tree(stopped) and not list(stopped.glob("checkpoint*"))
    epochs.clear()
    train(base, tmp_path / "stopped", *flags)
    assert epochs == []


def test_a_killed_run_repeats_only_what_came_after_its_checkpoint(base, tmp_path, monkeypatch):
    straight = train(base, tmp_path / "straight", "--checkpoint_every", 2)
    monkeypatch.setattr(train_FKD.Student, "finish", lambda self, folder: os._exit(9))  # as kill -9 at the last moment
    child = os.fork()
    if child == 0:
        train(base, tmp_path / "killed", "--checkpoint_every", 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    epochs, original = [], train_FKD.train_epoch
    monkeypatch.setattr(
        train_FKD, "train_epoch", lambda job, student, *a: epochs.append(student.epoch) or original(job, student, *a)
    )
    killed = train(base, tmp_path / "killed", "--checkpoint_every", 2)
    assert epochs == [2] and tree(killed) == tree(straight)


@pytest.fixture
def small_net(monkeypatch):
    """A network with BatchNorm and dropout, by name."""

    def create(num_classes, image_size):
        layers = [torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.5)]
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 8, num_classes))

    monkeypatch.setitem(MODELS, "small_net", create)
    return "small_net"


def test_dropout_is_the_same_with_stored_and_online_labels(base, tmp_path, small_net):
    """A network with dropout and BatchNorm: same bytes again, and stored = online."""
    flags = ["--model", small_net, "--epochs", 2]
    stored = train(base, tmp_path / "a", *flags)
    online = train_without_labels(base, tmp_path / "b", "--online", *base.teacher_flags, *flags)
    assert largest_difference(weights(stored), weights(online)) == 0


def fork_ranks(world, function):
    """Run `function()` in `world` processes with torchrun's environment; forked, so that nothing is imported again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in ranks.items()}, MASTER_ADDR="127.0.0.1")
                function()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_two_ranks_train_as_one(base, tmp_path):
    """Batches of 5 in chunks of 2: rank 0 has two of them, rank 1 has one; the teacher's batches stay whole."""
    flags = ["--online", *base.teacher_flags, "--amp", "fp64", "--bn_batch", 2, "--device", "cpu"]
    single = train_without_labels(base, tmp_path / "one", *flags)
    assert fork_ranks(2, lambda: train_without_labels(base, tmp_path / "two", *flags)) == [0, 0]
    two_ranks = tmp_path / "two" / single.name
    assert largest_difference(weights(two_ranks), weights(single)) < 1e-9
    ours, theirs = results(single)["seeds"][0], results(two_ranks)["seeds"][0]
    assert ours["last"] == theirs["last"]
    assert [r["loss"] for r in ours["rows"]] == pytest.approx([r["loss"] for r in theirs["rows"]], abs=1e-6)


def test_batch_norms_statistics_over_two_ranks_are_the_mean_weighted_by_chunks(tmp_path):
    """Rank 0 has seen 3 chunks and rank 1 has seen 1: (3 a + 1 b) / 4, and a rank without a chunk counts nothing."""
    means = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([5.0, -2.0])}

    def average(seen, name):
        from scripts.runtime import join_processes, this_process

        process = this_process("cpu")
        accelerator = join_processes(process)
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.copy_(means[process.rank])
        norm.running_var.copy_(means[process.rank] ** 2)
        norm.num_batches_tracked.fill_(seen[process.rank])
        training.average_buffers(norm, seen[process.rank], process.world)
        torch.save(norm.state_dict(), tmp_path / f"{name}{process.rank}.pt")
        accelerator.end_training()

    for seen, mean, variance in (((3, 1), [2.0, 1.0], [7.0, 4.0]), ((2, 0), [1.0, 2.0], [1.0, 4.0])):
        assert fork_ranks(2, lambda seen=seen: average(seen, "norm")) == [0, 0]
        for rank in (0, 1):
            state = torch.load(tmp_path / f"norm{rank}.pt", weights_only=True)
            assert state["running_mean"].tolist() == mean and state["running_var"].tolist() == variance
            assert state["num_batches_tracked"] == sum(seen) // 2


def test_a_students_statistics_are_those_of_both_ranks(base, tmp_path, small_net, monkeypatch):
    """What is saved is the weighted mean of what the ranks had; batches of 5 in chunks of 2 are uneven."""
    original = train_FKD.average_buffers

    def average_buffers(model, chunks, world):
        state = {"chunks": chunks, **{name: value.clone() for name, value in model.named_buffers()}}
        torch.save(state, tmp_path / f"rank{os.environ['RANK']}.pt")
        original(model, chunks, world)

    monkeypatch.setattr(train_FKD, "average_buffers", average_buffers)
    flags = ["--model", small_net, "--bn_batch", 2, "--device", "cpu", "--epochs", 1]
    assert fork_ranks(2, lambda: train(base, tmp_path / "two", *flags)) == [0, 0]
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    saved = weights(next((tmp_path / "two").iterdir()))
    assert a["chunks"] > b["chunks"] > 0
    for name in ("1.running_mean", "1.running_var"):
        mean = (a["chunks"] * a[name] + b["chunks"] * b[name]) / (a["chunks"] + b["chunks"])
        torch.testing.assert_close(saved[name], mean)
        assert (saved[name] - a[name]).abs().max() > 1e-3


# ---- losses, schedules, recipes


def test_losses_are_their_formulas(base):
    outputs, logits = (
        torch.randn(4, 3, dtype=torch.float64),
        load_file(base.labels / "epoch_0000.safetensors")["logits"],
    )
    logits, T = logits[:4].double(), 20.0
    p, q = (logits / T).softmax(1), (outputs / T).softmax(1)
    kl = (p * (p.log() - q.log())).sum()  # no T^2; divided by the batch = "batchmean"
    torch.testing.assert_close(training.soft_loss(outputs, logits, T), kl)
    y, other, lam = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 1, 0, 0]), 0.3
    log_q = outputs.log_softmax(1)
    ce = -(lam * log_q[range(4), y] + (1 - lam) * log_q[range(4), other]).sum()
    torch.testing.assert_close(training.hard_loss(outputs, y, other, lam), ce)
    mse = ((outputs - logits) ** 2).mean(1).sum()
    torch.testing.assert_close(training.mse_ce_loss(outputs, logits, y, other, lam, 0.025), mse + 0.025 * ce)


RECIPES = {  # flags of ../recipes, epochs -> learning rate at 0, E / 2, E - 1
    "d4m": (["--cos"], 300, (1e-3, 5e-4, 1e-3 * (1 + math.cos(math.pi * 299 / 300)) / 2)),
    "release without --cos": ([], 300, (1e-3, 5e-4, 1e-3 / 300)),
    "rded": (
        ["--cos", "--cos_stretch", "2"],
        300,
        (1e-3, 1e-3 * (1 + math.cos(math.pi / 4)) / 2, 1e-3 * (1 + math.cos(math.pi * 299 / 600)) / 2),
    ),
    "rd3, zeta 1": (["--cos"], 400, (1e-3, 5e-4, 1e-3 * (1 + math.cos(math.pi * 399 / 400)) / 2)),
    "edc": (
        ["--cos", "--cos_stretch", "2", "--loss", "mse_ce", "--ema", "0.99"],
        300,
        (1e-3, 1e-3 * (1 + math.cos(math.pi / 4)) / 2, 1e-3 * (1 + math.cos(math.pi * 299 / 600)) / 2),
    ),
    "minimax-hard": (
        ["--hard_label", "--sgd", "-lr", "0.01", "--weight_decay", "5e-4", "--momentum", "0.9", "--schedule", "step"],
        2000,
        (1e-2, 1e-2, 1e-2 * 0.04),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_of_the_recipes(name):
    flags, epochs, expected = RECIPES[name]
    data = ["--train_dir", "x"] + ([] if "--hard_label" in flags else ["--fkd_path", "x"])
    recipe = train_FKD.recipe_of(train_FKD.get_args([*data, *flags]))
    rates = [
        recipe.lr
        * lr_factor(recipe.schedule, epoch, epochs, recipe.cos_stretch, recipe.warmup_epochs, recipe.step_factor)
        for epoch in (0, epochs // 2, epochs - 1)
    ]
    assert rates == pytest.approx(expected)


def test_weight_decay_is_on_matrices_only_and_the_row_states_the_rate(base, tmp_path):
    model = create_model("convnet_mini", 3, 32)
    groups = training.make_optimizer(model, False, 1e-3, 0.01).param_groups
    assert groups[0]["weight_decay"] == 0.01 and all(p.ndim >= 2 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0 and all(p.ndim == 1 for p in groups[1]["params"])
    rows = results(train(base, tmp_path, "--adamw_lr", 0.003))["seeds"][0]["rows"]
    assert [row["lr"] for row in rows] == pytest.approx([0.003, 0.003 * 0.75, 0.003 * 0.25])


def test_every_option_of_the_recipes_runs(base, tmp_path, small_net):
    flags = ["--loss", "mse_ce", "--ema", 0.9, "--model", small_net, "--epochs", 1]
    edc, plain = train(base, tmp_path, *flags, "--bn_refresh"), train(base, tmp_path, *flags)
    assert largest_difference(weights(edc), weights(plain)) > 0  # its running statistics have seen un-mixed images
    assert results(edc)["arguments"]["loss"] == "mse_ce" and results(edc)["arguments"]["bn_refresh"]
    hard = train_without_labels(
        base,
        tmp_path,
        "--hard_label",
        "--sgd",
        "-lr",
        0.01,
        "--schedule",
        "step",
        "--color_jitter",
        0.4,
        "--lighting",
        0.1,
    )
    assert results(hard)["teacher"] == [] and results(hard)["arguments"]["loss"] == "ce"
    bf16 = train(base, tmp_path, "--amp", "bf16", "--channels_last", "--epochs", 1)
    assert results(bf16)["arguments"]["epochs"] == 1


def test_results_say_in_which_precision_the_labels_were_made(base, tmp_path):
    flags = ["--fkd_path", str(tmp_path / "labels"), *base.teacher_flags, *PROTOCOL, "--epochs", "1"]
    [labels] = generate_soft_label.main(["--data", str(base.images), *flags, "--amp", "bf16", "--channels_last"])
    stored = results(train(base, tmp_path, labels=labels))
    assert stored["labels"] == {"amp": "bf16", "channels_last": True} and stored["arguments"]["amp"] == "none"
    plain = {"amp": "none", "channels_last": False}
    assert results(train(base, tmp_path, "--amp", "bf16", "--epochs", 1))["labels"] == plain
    online = ["--online", *base.teacher_flags, "--epochs", 1]
    assert results(train_without_labels(base, tmp_path, *online))["labels"] == plain
    assert results(train_without_labels(base, tmp_path, "--hard_label", "--epochs", 1))["labels"] is None


def test_ema_is_the_formula(base, tmp_path):
    model = create_model("convnet_mini", 3, 32)
    average = training.Average(model, 0.9)
    old = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update(model)
    for mean, p, before in zip(average.model.parameters(), model.parameters(), old):
        torch.testing.assert_close(mean, 0.9 * before + 0.1 * p)


def test_color_jitter_of_rows_is_rows_of_the_batch():
    x, mean, std = torch.randn(6, 3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def jittered(rows, strength=0.4, lighting=0.1):
        g = torch.Generator().manual_seed(3)
        return training.color_jitter(x[rows], rows, 6, strength, lighting, mean, std, g)

    whole = jittered(torch.arange(6))
    torch.testing.assert_close(jittered(torch.tensor([1, 4])), whole[[1, 4]])
    torch.testing.assert_close(jittered(torch.arange(6), 0.0, 0.0), x)
    assert (whole - x).abs().max() > 0.05


def test_hard_labels_are_the_images_own_classes(base, tmp_path):
    """Trained a little on class indices, digits are told apart far above chance: targets are not permuted."""
    flags = ["--hard_label", "--epochs", 25, "--mix_type", "none", "--flip", 0, "--min_scale_crops", 0.8]
    folder = train_without_labels(base, tmp_path, *flags, "--adamw_lr", 0.005)
    assert results(folder)["summary"]["last"]["top1"]["mean"] > 70


# ---- testing


def test_evaluate_gives_the_number_of_the_results(base, tmp_path, capsys, refused):
    folder = train(base, tmp_path)
    expected = results(folder)["seeds"][0]["last"]
    path = folder / "student_seed0.safetensors"
    flags = ["--evaluate", str(path), "--model", "convnet_mini", "--train_dir", str(base.images)]
    assert train_FKD.main(flags) == {"top1": expected["top1"], "top5": expected["top5"]}
    assert "top-1" in capsys.readouterr().out
    torch.save({"state_dict": {"module." + k: v for k, v in load_file(path).items()}}, tmp_path / "net.pt")
    assert train_FKD.main([flags[0], str(tmp_path / "net.pt"), *flags[2:]])["top1"] == expected["top1"]
    refused(train_FKD.main, [*flags[:3], "convnet_w128", *flags[4:]], "--evaluate", "another architecture")
    refused(train_FKD.main, flags[:4], "--dataset")


def test_test_images_are_cropped_as_torchvision_does():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    rng = np.random.default_rng(0)
    for w, h in ((300, 200), (200, 300), (256, 256), (97, 150)):
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        theirs = Compose([Resize(256, InterpolationMode.BILINEAR), CenterCrop(224)])(image)
        assert np.array_equal(np.asarray(training.centre_crop(image, 224)), np.asarray(theirs))


def test_top_5_and_uneven_batches():
    pixels, targets = torch.zeros(7, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 5, 6])

    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.arange(7, 0, -1.0).expand(len(x), 7)

    scores = training.evaluate(
        Constant(), pixels, targets, Forward(torch.device("cpu")), (0.5,) * 3, (0.5,) * 3, rows=3
    )
    assert scores == {"top1": pytest.approx(100 / 7), "top5": pytest.approx(500 / 7)}


# ---- what does not fit is refused


def _image(folder, name="1/1_0002.png", angle=90):
    image = Image.open(folder / name)
    image.load()
    image.rotate(angle).save(folder / name)


def _tensor(folder, name, change, epoch=1):
    path = folder / f"epoch_{epoch:04d}.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    path.write_bytes(save(tensors, {"epoch": str(epoch)}))


def _swap(a, b):
    third = a.with_name("third")
    a.rename(third), b.rename(a), third.rename(b)


def _rename_class(images, labels):
    (images / "1").rename(images / "1b")
    classes = [{**c, "folder": c["folder"].replace("1", "1b")} for c in read_json(images / "manifest.json")["classes"]]
    redo_manifest(images, classes=classes)


def _remove_image(images, labels):
    (images / "2/2_0003.png").unlink()
    redo_manifest(images, count=11)


def _other_epoch(images, labels):
    shutil.copy(labels / "epoch_0000.safetensors", labels / "epoch_0001.safetensors")
    redo_manifest(labels)


def _other_size(images, labels):
    for path in images.glob("*/*.png"):
        Image.open(path).resize((48, 48)).save(path)
    redo_manifest(images, image_size=48)


def _edited(key, value):
    def change(images, labels):
        path = labels / "manifest.json"
        manifest = read_json(path)
        manifest["arguments"][key] = value
        write_json(path, manifest)

    return change


def _flip_bit(images, labels):
    path = labels / "epoch_0001.safetensors"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # also when the clock does not tell


def _truncate(images, labels):
    path = labels / "epoch_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _regenerate(images, labels):
    _image(images)
    redo_manifest(images)


def _exchange(images, labels):
    _swap(images / "0/0_0001.png", images / "2/2_0001.png")
    redo_manifest(images)


# Each changes one thing in real outputs of stages 2 and 3: (change of images and labels, flags, what the line says)
MISMATCHES = {
    "images made again with another seed": (_regenerate, [], "content"),
    "one image edited, its manifest not": (lambda i, n: _image(i), [], "1/1_0002.png"),
    "two images exchanged between classes": (_exchange, [], "content"),
    "an image removed": (_remove_image, [], "11"),
    "an image added, its manifest not": (
        lambda i, n: shutil.copy(i / "0/0_0000.png", i / "0/0_0004.png"),
        [],
        "0_0004",
    ),
    "a class renamed": (_rename_class, [], "1b"),
    "a class folder removed": (lambda i, n: shutil.rmtree(i / "2"), [], "2"),
    "images of another size": (_other_size, [], "48"),
    "images of another arm": (lambda i, n: redo_manifest(i, arm="d4m"), [], "d4m"),
    "another data set": (None, ["--dataset", "cifar10"], "cifar10"),
    "another mix type": (None, ["--mix_type", "mixup"], "cutmix"),
    "another alpha": (None, ["--cutmix", "0.5"], "--cutmix 0.5"),
    "another input size": (None, ["--input_size", "64"], "--input_size 64"),
    "another batch size": (None, ["--batch_size", "4"], "--batch_size 4"),
    "more epochs than labels": (None, ["--epochs", "4"], "3 epochs"),
    "another seed of the draws": (None, ["--fkd_seed", "1"], "--fkd_seed 1"),
    "other crops": (None, ["--min_scale_crops", "0.5"], "0.08"),
    "other flips": (None, ["--flip", "0"], "--flip 0"),
    "another precision": (None, ["--no_use_fp16"], "--use_fp16 False"),
    "another teacher": (None, ["--arch", "resnet18"], "convnet_mini"),
    "other weights of the teacher": ("teacher", [], "sha256"),
    "two epochs' files exchanged": (
        lambda i, n: _swap(n / "epoch_0000.safetensors", n / "epoch_0001.safetensors"),
        [],
        "epoch_000",
    ),
    "a file of another epoch, manifest and all": (_other_epoch, [], "holds epoch 0"),
    "a bit of the logits flipped": (_flip_bit, [], "epoch_0001"),
    "a label file cut short": (_truncate, [], "epoch_0001"),
    "a label file missing": (lambda i, n: (n / "epoch_0001.safetensors").unlink(), [], "epoch_0001"),
    "an epoch missing, manifest and all": (
        lambda i, n: [(n / "epoch_0002.safetensors").unlink(), redo_manifest(n)],
        [],
        "2 files",
    ),
    "logits of another number of classes": (
        lambda i, n: [_tensor(n, "logits", lambda t: torch.cat([t, t], 1)), redo_manifest(n)],
        [],
        "[12, 6]",
    ),
    "an image twice in an epoch": (
        lambda i, n: [_tensor(n, "index", lambda t: torch.where(t == 3, 4, t)), redo_manifest(n)],
        [],
        "each once",
    ),
    "crops of larger images": (
        lambda i, n: [_tensor(n, "crop", lambda t: t * 2), redo_manifest(n)],
        [],
        "outside the images",
    ),
    "logits that are not finite": (
        lambda i, n: [_tensor(n, "logits", lambda t: t * torch.inf), redo_manifest(n)],
        [],
        "not finite",
    ),
    "the labels' arguments edited": (_edited("mix_type", "none"), [], "disagree"),
    "another normalisation": (lambda i, n: redo_manifest(n, mean=[0.1, 0.2, 0.3]), [], "mean and std"),
    "labels that are not finished": (lambda i, n: (n / "manifest.json").unlink(), [], "not finished"),
    "labels of another format": (lambda i, n: redo_manifest(n, format_version=99), [], "99"),
    "images given as labels": ("images", [], "stage"),
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_a_mismatch_is_refused_in_one_line(base, tmp_path, refused, what):
    change, flags, word = MISMATCHES[what]
    images, labels = copy(base.images, tmp_path), copy(base.labels, tmp_path)
    if change == "teacher":
        flags = ["--teacher_checkpoint", str(make_teacher(tmp_path, seed=5))]
    elif change == "images":
        labels = images
    elif change:
        change(images, labels)
    refused(lambda argv: train(base, tmp_path / "out", *flags, images=images, labels=labels), [], word)
    assert not list(tmp_path.glob("out/*/student*")) and not list(tmp_path.glob("out/*/checkpoint*"))


@pytest.mark.parametrize("name", ["classes", "images", "teacher", "dataset", "arguments"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [1], {}, {"epochs": True}])
def test_odd_manifests_are_one_line(base, tmp_path, refused, name, value):
    labels = copy(base.labels, tmp_path)
    redo_manifest(labels, **{name: value})
    (labels / "args.json").unlink()
    refused(lambda argv: train(base, tmp_path / "out", labels=labels), [], "--fkd_path")
    if name in ("classes", "dataset"):
        images = copy(base.images, tmp_path)
        redo_manifest(images, **{name: value})
        refused(lambda argv: train(base, tmp_path / "out", images=images), [], "--train_dir")


def test_untouched_copies_are_taken(base, tmp_path):
    assert train(base, tmp_path / "out", images=copy(base.images, tmp_path), labels=copy(base.labels, tmp_path))


def test_flags_that_make_no_sense_are_refused(base, tmp_path, refused):
    main, data = train_FKD.main, ["--train_dir", base.images]
    labels = [*data, "--fkd_path", base.labels, "--output_dir", tmp_path]
    refused(main, [], "--train_dir")
    refused(main, data, "--fkd_path: missing", "--online")
    refused(main, [*labels, "--online"], "not with --online")
    refused(main, [*data, "--online", "--hard_label"], "only one")
    refused(main, [*data, "--hard_label", "--arch", "resnet18"], "no teacher")
    refused(main, [*labels, "--color_jitter", "0.4"], "--hard_label")
    refused(main, [*labels, "--seeds", "1", "1"], "--seeds 1 1")
    refused(main, [*labels, "--shard", "0/2"], "torchrun")
    refused(main, [*labels, "--wandb_api_key", "x"], "--wandb_api_key", "--tracker")
    refused(main, [*labels, "--keep-topk", "1000"], "--keep_topk")
    refused(main, [*labels, "--start-epoch", "5"], "resumes")
    refused(main, [*labels, "--model", "resnet19"], "resnet19")
    refused(main, [*labels, "--temperature", "nan"], "nan")
    refused(main, [*data, "--fkd_path", tmp_path / "none"], "none", "no such folder")
    folder = train(base, tmp_path)
    (folder / "student_seed0.safetensors").write_bytes(b"")
    refused(lambda argv: train(base, tmp_path), [], "student_seed0", "0 bytes")


def test_a_result_begun_with_other_values_is_not_continued(base, tmp_path, refused):
    folder = train(base, tmp_path)
    (folder / "manifest.json").unlink()
    settings = read_json(folder / "args.json")
    write_json(folder / "args.json", {**settings, "eval_every": 7})
    refused(lambda argv: train(base, tmp_path), [], "eval_every", "7", "2")


def test_foreign_images_and_labels_of_them(base, tmp_path, capsys, refused):
    theirs = tmp_path / "theirs"
    for name in CLASSES:
        shutil.copytree(base.images / name, theirs / name)
    flags = ["--dataset", "digits"]
    labels = generate_soft_label.main(
        ["--data", str(theirs), "--fkd_path", str(tmp_path / "labels"), *flags, *base.teacher_flags, *PROTOCOL]
    )[0]
    folder = train(base, tmp_path / "out", *flags, images=theirs, labels=labels)
    assert results(folder)["images"]["foreign"] and capsys.readouterr().err.count("no manifest") == 2
    assert largest_difference(weights(folder), weights(train(base, tmp_path / "out"))) == 0  # the same pixels
    _image(theirs)
    refused(lambda argv: train(base, tmp_path / "b", *flags, images=theirs, labels=labels), [], "content")


def test_tracker_is_optional(base, tmp_path, refused):
    refused(lambda argv: train(base, tmp_path, "--tracker", "nonsense"), [], "--tracker nonsense")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        refused(lambda argv: train(base, tmp_path, "--tracker", "tensorboard"), [], "not installed")
    else:
        train(base, tmp_path, "--epochs", 1, "--tracker", "tensorboard")
        assert list(tmp_path.rglob("events.out*"))
