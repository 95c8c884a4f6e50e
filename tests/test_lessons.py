"""What an image counts in the loss, by the size of its prototype's cluster."""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distillation import gen_syn_image
from matching import images as image_sets
from matching import lessons, training
from scripts import files
from tests.conftest import STAGE_2, copy, reseal
from tests.test_training import forked, largest_difference, weights
from validate import train_FKD

STUDENT = ["--model", "convnet_mini", "--epochs", "2", "--device", "cpu", "--num_workers", "0"]
STUDENT += ["--batch_size", "4"]


@pytest.fixture(scope="module")
def sizes(prototypes):
    """(3 classes, 2 prototypes): the cluster sizes in stage 1's files, of 12 photographs each."""
    paths = sorted(prototypes.glob("000*.json"))
    found = np.array([json.loads(path.read_text())["cluster_sizes"] for path in paths])
    assert (found.sum(1) == 12).all() and (found[:, 0] != found[:, 1]).any()
    return found


def synthesized(prototypes, model, root, *flags):
    where = ["--prototype_path", str(prototypes), "--save_init_image_path", str(root)]
    return gen_syn_image.main([*STAGE_2, *model, *where, *flags])[0]


def train(images, root, *flags, weights=("--loss_weights", "cluster")):
    argv = ["--train_dir", images, "--output_dir", root, *STUDENT, *weights, *flags]
    argv += ["--hard_label"] * ("--online" not in flags)
    return train_FKD.main(list(map(str, argv)))


def counts(folder):
    return image_sets.cluster_weights("--train_dir", image_sets.open_images("--train_dir", folder))


@pytest.mark.parametrize("ipc", [2, 5])
def test_an_image_counts_as_its_share_of_the_photographs(ipc, prototypes, model, sizes, tmp_path):
    """Of two prototypes the first gives three of five images: each stands for a third of n."""
    flags = ["--ipc", str(ipc), "--num_prototypes", "2", "--arm", "decoded"]
    found = counts(synthesized(prototypes, model, tmp_path, *flags)).view(3, ipc)
    for row, (first, second) in zip(found.tolist(), sizes):
        of_image = [
            [first / 3, second / 2][i % 2] if ipc == 5 else [first, second][i] for i in range(ipc)
        ]
        assert row == pytest.approx([n * ipc / 12 for n in of_image])
        assert np.mean(row) == pytest.approx(1)


@pytest.mark.parametrize("loss", ["kl", "top", "mse_ce", "hard"])
def test_each_row_of_a_loss_is_weighted(loss):
    draw = torch.Generator().manual_seed(0)
    z, t = (torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    z.requires_grad_(True)
    targets, partners = (torch.randint(0, 4, (5,), generator=draw) for _ in range(2))
    w, top = torch.rand(5, generator=draw), torch.tensor([[0, 2]] * 5) if loss == "top" else None
    goal = training.Goal(t[:, :3] if loss == "top" else t, targets, partners, 0.3, top, w)
    plain = training.hard_loss if loss == "hard" else training.LOSSES.get(loss, training.kl_loss)
    how = {"temperature": 4.0, "ce_weight": 0.5}
    goals = [goal.of(slice(i, i + 1))._replace(weights=None) for i in range(5)]
    rows = [plain(z[i : i + 1], one, **how) for i, one in enumerate(goals)]
    expected = sum(weight.double() * row for weight, row in zip(w, rows))
    found = plain(z, goal, **how)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (found, expected)))


def test_a_mixed_image_counts_by_the_shares_of_its_two():
    learnt, index = object.__new__(lessons.Lessons), torch.tensor([3, 0, 2])
    learnt.settings = {"bn_batch": 2, "color_jitter": 0, "lighting": 0}
    learnt.process, learnt.teachers = SimpleNamespace(rank=1, world=2, device=index.device), []
    learnt.weights, learnt.images = torch.tensor([1.0, 2, 4, 8]), SimpleNamespace(targets=index)
    learnt.images.targets, learnt.feed = torch.arange(4), SimpleNamespace(mixed=lambda *_: None)
    batch = SimpleNamespace(index=index, partner=torch.tensor([1, 2, 0]), lam=0.75)
    item = SimpleNamespace(batch=batch, rows=torch.arange(3), logits=torch.ones(3, 4), top=None)
    for rank, own in ((0, [0, 1, 2]), (1, [])):  # three images are one chunk of at most 3
        learnt.process.rank = rank
        goal = learnt.part(item).goal
        assert goal.targets.tolist() == [[3, 0, 2][i] for i in own]
        expected = [0.75 * 8 + 0.25 * 1, 0.75 * 1 + 0.25 * 4, 0.75 * 4 + 0.25 * 8]
        assert goal.weights.tolist() == [expected[i] for i in own]


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_weighted_student_for_any_number_of_processes(labels, images, teacher, tmp_path):
    """Batches of 4 in chunks of 2, on one process, and on two."""
    flags = ["--amp", "fp64", "--bn_batch", 2, "--mix_type", "cutmix"]
    if labels == "soft":
        flags += ["--online", "--arch", "convnet_mini", "--teacher_checkpoint", teacher]
    one = train(images, tmp_path / "one", *flags)
    assert "_weights-cluster" in one.name
    assert files.read_json(one / "args.json")["arguments"]["loss_weights"] == "cluster"
    both = partial(train, images, tmp_path / "two", *flags)
    assert forked(both, both) == [0, 0]
    assert largest_difference(weights(one), weights(tmp_path / "two" / one.name)) < 1e-9
    plain = train(images, tmp_path, *flags, weights=())
    assert largest_difference(weights(one), weights(plain)) > 1e-4
    assert plain.name == one.name.replace("_weights-cluster", "")


def test_images_without_cluster_sizes_are_refused(
    images, random, prototypes, model, tmp_path, refused
):
    [text] = [synthesized(prototypes, model, tmp_path, "--arm", "text")]
    foreign, release, lost = (copy(images, tmp_path / name) for name in ("a", "b", "c"))
    (foreign / "manifest.json").unlink()
    (foreign / "args.json").unlink()
    inputs = files.read_json(release / "manifest.json")["inputs"]
    reseal(release, inputs={**inputs, "prototype_arguments": None})
    for folder, words in ((random, "random"), (text, "text"), (foreign, "no manifest")):
        refused(lambda _, f=folder: train(f, tmp_path, "--dataset", "digits"), [], words, "cluster")
    path = lost / "images.jsonl"
    lines, stat = path.read_text().splitlines(), path.stat()
    path.write_text("\n".join([*lines[::-1], ""]))  # as many bytes
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(lambda _: train(lost, tmp_path), [], "images.jsonl is not what its manifest says")
    rows = list(map(json.loads, lines))
    del rows[2]["cluster_size"]
    path.write_text("\n".join(map(json.dumps, rows)))
    reseal(lost)
    for folder in (release, lost):
        refused(lambda _, f=folder: train(f, tmp_path), [], "has no cluster sizes (made as d4m")
    assert not list(tmp_path.glob("*hard*"))


def test_the_data_card_counts_prototypes_of_one_photograph(images, random, sizes):
    count = (sizes == 1).sum()
    said = f"{count} of 6 prototypes stand for a single photograph"
    assert said in (images / "README.md").read_text()
    assert "prototypes stand" not in (random / "README.md").read_text()
