"""One of several images per prototype: CaO2's rule, and an image folder like any other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from distillation import gen_prototype, gen_syn_image
from matching import candidates, generate_soft_label, models
from matching import images as image_sets
from scripts import files
from tests.conftest import STAGE_1, STAGE_2, copy, everything, make_random, reseal, tree
from validate import train_FKD

SIX = ["--ipc", "6", "--num_prototypes", "2"]  # three of each prototype


@pytest.fixture(scope="module")
def three(prototypes, model, tmp_path_factory):
    where = ["--prototype_path", str(prototypes), "--num_inference_steps", "5"]
    where += ["--save_init_image_path", str(tmp_path_factory.mktemp("three"))]
    return gen_syn_image.main([*STAGE_2, *model, *where, *SIX])[0]


@pytest.fixture
def arguments(three, teacher):
    def listed(*more, path=three):
        argv = ["--image_path", path, "--arch", "convnet_mini", "--teacher_checkpoint", teacher]
        argv += ["--save_init_image_path", "out", "--device", "cpu", *more]
        return [str(a) for a in argv]

    return listed


# of class 1: right by far, wrong, right by little; none right
SEEN = torch.tensor([[0.0, 4, 0], [3, 2.9, 0], [0, 1, 0.5], [0, 3, 0]])
WRONG = torch.tensor([[5.0, 0, 0], [5, 4, 0], [5, 4.5, 4]])


@pytest.mark.parametrize(
    "keep, logits, best", [("confident", SEEN, 0), ("hard", SEEN, 2), ("confident", WRONG, 2)]
)
def test_the_rule(keep, logits, best):
    found, said = candidates.choose(logits, 1, keep)
    p = np.exp(logits[best].numpy().astype(float))
    assert found == best and said["right"] == (logits is SEEN)
    assert said["probability"] == round(p[1] / p.sum(), 4)
    assert candidates.choose(WRONG, 1, "hard")[0] == 2  # the closest to right


def opinion(teacher, path, target, classes):
    """(taken for its class, probability of that) of one PNG."""
    model, _ = models.load_teacher("convnet_mini", teacher, "digits", classes, 32)
    x = torch.tensor(np.asarray(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        p = model((x - 0.5) / 0.5).softmax(1)[0]
    return p.argmax().item() == target, p[target].item()


def check_choice(folder, source, teacher, classes, keep):
    """Each image is the one of its three that the teacher says; returns how many there are."""
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    theirs = image_sets.read_rows("", source, files.read_json(source / "manifest.json"))
    for row in rows:
        c, prototype = row["folder"], int(row["file_name"][-5])
        names = [f"{c}/{c}_{i:04d}.png" for i in range(prototype, 6, 2)]
        target = classes.index(c)
        seen = {name: opinion(teacher, source / name, target, classes) for name in names}
        right = [name for name in names if seen[name][0]]
        sign = -1 if keep == "hard" and right else 1
        assert row["source"] == max(right or names, key=lambda name: sign * seen[name][1])
        assert row["probability"] == pytest.approx(seen[row["source"]][1], abs=1e-4)
        assert (folder / row["file_name"]).read_bytes() == (source / row["source"]).read_bytes()
        for name in ("seed", "prototype", "cluster_size", "prompt"):
            assert row[name] == theirs[row["source"]][name]
    return len(rows)


@pytest.mark.parametrize("keep", ["confident", "hard"])
def test_one_of_each_prototype_is_kept(keep, three, teacher, arguments, capsys):
    folder = candidates.main(arguments("--keep", keep))
    assert folder.name == f"digits_ipc2_{keep}_convnet_mini_from_{three.name}"
    assert "6 of 6 images made" in capsys.readouterr().out
    assert check_choice(folder, three, teacher, ("0", "1", "2"), keep) == 6
    for shard in ("1/2", "0/2"):
        again = candidates.main(
            arguments("--keep", keep, "--shard", shard, "--save_init_image_path", "two")
        )
    assert tree(again) == tree(folder)


def test_a_teacher_of_more_classes_with_logits_that_half_precision_rounds(
    model, teacher, arguments, tmp_path
):
    """Digits 1 and 2 are its columns 0 and 1 here; 256 more in each logit changes no softmax."""
    large = copy(teacher, tmp_path)
    weights = load_file(large / "model.safetensors")
    save_file({**weights, "1.9.bias": weights["1.9.bias"] + 256}, large / "model.safetensors")
    reseal(large)
    made = gen_prototype.main([*STAGE_1, *model, "--classes", "1-2"])
    argv = [*STAGE_2, *model, "--prototype_path", str(made), "--num_inference_steps", "5", *SIX]
    [source] = gen_syn_image.main(argv)
    folder = candidates.main(arguments("--teacher_checkpoint", large, path=source))
    assert check_choice(folder, source, large, ("1", "2"), "confident") == 4


def test_the_images_are_images_like_any_other(three, arguments, teacher):
    """Labelled, learnt from with the weights of their prototypes' clusters, tested apart."""
    folder = candidates.main(arguments("--candidates", 2))
    assert folder.name.endswith("_of2")
    manifest, made = (files.read_json(f / "manifest.json") for f in (folder, three))
    known = {"arm": "candidates", "ipc": 2, "dataset": "digits", "image_size": 32, "count": 6}
    assert manifest.items() >= known.items()
    of_two = {f"{c}/{c}_{i:04d}.png" for c in range(3) for i in range(4)}  # of each prototype
    rows = image_sets.read_rows("", folder, manifest)
    assert {row["source"] for row in rows.values()} <= of_two
    assert manifest["inputs"]["source"] == made["content"]
    weights = files.sha256(teacher / "model.safetensors")
    assert manifest["inputs"]["teacher"] == weights
    chosen, whole = (image_sets.open_images("--data", f) for f in (folder, three))
    assert chosen.source == whole.source != (None, 0) and chosen.generator == whole.generator
    sizes = [[rows[f"{c}/{c}_000{i}.png"]["cluster_size"] for i in range(2)] for c in range(3)]
    counts = image_sets.cluster_weights("--train_dir", chosen)
    assert counts.view(3, 2).tolist() == [pytest.approx([n / 6 for n in row]) for row in sizes]
    made_as, said = (folder / "README.md").read_text(), (three / "README.md").read_text()
    assert "one chosen by a classifier" in made_as
    count = f"{sum(n == 1 for row in sizes for n in row)} of 6 prototypes stand for a single"
    assert count in made_as and count in said
    where = ["--teacher_checkpoint", teacher, "--device", "cpu", "--num_workers", 0]
    where += ["--epochs", 1, "--batch_size", 4, "--arch", "convnet_mini"]
    [soft] = generate_soft_label.main([*map(str, ["--data", folder, *where])])
    argv = ["--train_dir", folder, "--fkd_path", soft, "--model", "convnet_mini", *where[2:]]
    student = train_FKD.main([*map(str, argv), "--loss_weights", "cluster"])
    assert files.read_json(student / "results.json")["images"]["arm"] == "candidates"


def test_what_cannot_be_chosen_from_is_refused(three, images, arguments, tmp_path, refused):
    for path in (images, make_random(tmp_path)):
        refused(candidates.main, arguments(path=path), "not several images of each prototype")
    refused(candidates.main, arguments("--candidates", 4), "--candidates 4", "has 3 images")
    refused(candidates.main, arguments("--candidates", 1), "--candidates")
    refused(candidates.main, arguments("--arch", "resnet18"), "--teacher_checkpoint")
    refused(candidates.main, arguments(path=tmp_path / "none"), "none")
    assert not Path("out").exists()
    candidates.main(arguments("--shard", "0/2"))
    refused(candidates.main, arguments("--keep", "hard", "--candidates", 9), "--candidates 9")


def test_a_dry_run_names_the_folder_and_what_comes_before(three, arguments, tmp_path, capsys):
    candidates.main(arguments("--dry_run"))
    name = f"digits_ipc2_confident_convnet_mini_from_{three.name}"
    assert capsys.readouterr().out.startswith(f"plan: out/{name}: 0 done, 6 files to do")
    path = "out/cifar10_ipc40_s0.7_g8_kmexpand1_protos10"
    candidates.main(["--image_path", path, "--teacher_checkpoint", "teachers/x", "--dry_run"])
    line = capsys.readouterr().out
    name = "cifar10_ipc10_confident_resnet18_from_cifar10_ipc40_s0.7_g8_kmexpand1_protos10"
    assert f"output/images/{name}: 0 done, 100 files to do, 0.2 MiB" in line
    assert "protos10: python -m distillation.gen_syn_image makes it" in line
    assert "teachers/x: python -m matching.train_teacher makes it" in line
    assert everything(tmp_path) == set()
