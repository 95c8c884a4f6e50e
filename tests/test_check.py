"""The preflight: every problem in one go, launchers started with stand-ins, and nothing written."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from reliability import STAGE_1, STAGE_2, everything, image_folder

from misc import check

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def preflight(capsys):
    """preflight(*argv) -> (status, its problems, its plan)"""

    def run(*argv):
        capsys.readouterr()
        status = 0
        try:
            check.main([str(a) for a in argv])
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        problems = [line.removeprefix("problem: ") for line in err.splitlines()]
        assert all(line.startswith("problem: ") for line in err.splitlines()), err
        assert (status == 2) == bool(problems) and status in (0, 2)
        return status, problems, out

    return run


def test_a_run_that_will_work_gets_a_plan_with_estimates(preflight, made, model, tmp_path):
    before = everything(tmp_path)
    for argv in (
        ["distillation.gen_prototype", *STAGE_1, *model],
        ["distillation/gen_syn_image.py", *STAGE_2, *model, "--prototype_path", made[0]],
        ["distillation.distill", *STAGE_1, *model],
        ["distillation.random_real", "--dataset", "digits", "--ipc", "3"],
        ["matching.train_teacher", "--dataset", "digits", "--arch", "convnet_mini", "--device", "cpu"],
        ["validate.train_FKD", "--train_dir", made[1], "--hard_label", "--model", "convnet_mini", "--device", "cpu"],
    ):
        status, problems, plan = preflight(*argv)
        assert status == 0, problems
        assert "disk: " in plan and "time: " in plan and plan.count("(estimate") >= 2 and "no problem found" in plan
    assert everything(tmp_path) == before


def test_every_problem_is_said_not_only_the_first(preflight, tmp_path):
    image_folder("data", ["good"], count=5)
    image_folder("data", ["small"], count=2)
    Path("data/train/void").mkdir()
    Path("data/train/good/zz.jpg").write_bytes(b"<html>")
    Path("labels.txt").write_text("good\n\nvoid\n")
    Path("output").write_text("a file where the folder should be")
    Path("cache").mkdir()
    status, problems, _ = preflight(
        "distillation.gen_prototype", "--dataset", "imagefolder", "--data_dir", "data", "--ipc", "3",
        "--label_file_path", "labels.txt", "--diffusion_checkpoints_path", "no/such/model", "--device", "cuda:99",
    )  # fmt: skip
    assert status == 2
    for words in (
        "--ipc 3: class small has only 2 images",
        "class void has no images",
        "zz.jpg: not an image",
        "labels.txt, line 2: is blank",
        "--diffusion_checkpoints_path no/such/model",
        "--device cuda:99",
        "output/prototypes: cannot be made",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    assert len(problems) == 7


def test_weights_are_read_as_far_as_their_headers(preflight, model):
    broken = Path(shutil.copytree(model[1], "broken"))
    weights = broken / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.rmtree(broken / "unet")
    flags = ["--diffusion_checkpoints_path", "broken", "--device", "cpu"]
    _, problems, _ = preflight("distillation.distill", *STAGE_1, *flags)
    assert any("its header says" in problem for problem in problems)
    assert any("unet/ holds no .safetensors" in problem for problem in problems)


def test_weights_that_no_stage_could_load(preflight, model):
    """What lies beside the weights is missing, or they are another network's."""
    broken, flags = Path(shutil.copytree(model[1], "broken")), ["--diffusion_checkpoints_path", "broken"]
    (broken / "unet/config.json").unlink()
    shutil.rmtree(broken / "tokenizer")
    vae = broken / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(broken / "text_encoder/model.safetensors", vae)
    _, problems, _ = preflight("distillation.distill", *STAGE_1, *flags, "--device", "cpu")
    assert len(problems) == 3
    for words in ("unet/config.json is missing", "tokenizer/ is missing", "vae/ holds 0 of the"):
        assert any(words in problem for problem in problems), problems
    assert preflight("distillation.distill", *STAGE_1, *model)[1] == []


def test_a_broken_link_hides_no_other_problem(preflight):
    image_folder("data", ["cat", "dog"])
    Path("data/train/cat/zz.png").symlink_to("gone")
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--ipc", "9", "--device", "cpu"]
    argv += ["--diffusion_checkpoints_path", "/nope"]
    plan, problems, _ = preflight("distillation.gen_prototype", *argv)
    assert plan and any("zz.png" in problem for problem in problems)
    assert any("cat has only 4 images" in problem for problem in problems)
    assert any("/nope" in problem for problem in problems)


def test_disk_is_summed_over_the_outputs(preflight, model, monkeypatch):
    monkeypatch.setattr(check, "free_space", lambda folder: 1000)
    _, problems, _ = preflight("distillation.gen_prototype", *STAGE_1, *model, "--latent_cache", "cache")
    [line] = problems
    assert "--latent_cache --save_prototype_path" in line and "1000 B are free" in line


def test_what_does_not_fit_the_prototypes_is_found_before_the_unet_is_loaded(preflight, made, model, tmp_path):
    from conftest import build_tiny_sd

    stage_2 = ["distillation.gen_syn_image", *STAGE_2, "--device", "cpu", "--prototype_path", made[0]]
    other = build_tiny_sd(tmp_path, seed=1)
    _, problems, _ = preflight(*stage_2, "--diffusion_checkpoints_path", other, "--ipc", "3")
    assert any("holds 2 a class" in p for p in problems) and any("made with the VAE" in p for p in problems)


def test_labels_that_are_missing_or_do_not_fit(preflight, made):
    flags = ["validate.train_FKD", "--model", "convnet_mini", "--device", "cpu", "--fkd_path", "labels"]
    _, problems, _ = preflight(*flags, "--train_dir", made[1])
    assert any("--fkd_path labels: no such folder" in problem for problem in problems)
    _, problems, _ = preflight(*flags, "--train_dir", "nowhere", "--val_dir", "void")
    assert len(problems) == 3
    _, problems, _ = preflight("matching.generate_soft_label", "--data", made[1], "--teacher_checkpoint", "gone")
    assert any("gone" in problem for problem in problems)


LAUNCHERS = ["distillation/gen_prototype_cf10.sh", "distillation/distill_nette.sh", "matching/matching_cf10.sh"]
LAUNCHERS += ["validate/train_FKD_rded.sh", "matching/train_teacher_tnimgnt.sh"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_are_read_by_running_them_with_stand_ins(launcher, preflight, monkeypatch):
    monkeypatch.setenv("OUT", os.path.abspath("out"))
    monkeypatch.setenv("DATA_DIR", os.path.abspath("no-data"))
    status, problems, plan = preflight(ROOT / launcher)
    assert status == 2 and any("no such folder" in problem for problem in problems)
    assert not Path("out").exists()


def test_a_launcher_takes_overriding_flags_and_processes(preflight, monkeypatch, model):
    monkeypatch.setenv("OUT", os.path.abspath("out"))
    monkeypatch.setenv("NUM_GPUS", "4")
    Path("labels.txt").write_text("\n".join("zero one two three four five six seven eight nine".split()))
    flags = ["--dataset", "digits", "--size", "32", "--label_file_path", os.path.abspath("labels.txt"), *model]
    status, problems, plan = preflight(ROOT / "distillation/gen_prototype_cf10.sh", *flags)
    assert "distillation.gen_prototype, 4 processes" in plan and "1,352 train images" in plan
    assert not problems


def seconds_of(plan):
    """The plan's whole time in seconds."""
    number, unit = re.search(r"in all: ([0-9.]+) (days|h|min|s),", plan).groups()
    return float(number) * {"days": 86400, "h": 3600, "min": 60, "s": 1}[unit]


@pytest.mark.parametrize(
    "variables, processes, share",
    [
        ({"NUM_GPUS": "2"}, 2, 5 / 10),  # ten classes: the unit of work is the class
        ({"NUM_GPUS": "4"}, 4, 3 / 10),
        ({"TORCHRUN_ARGS": "--nnodes=2 --nproc-per-node 3 --rdzv_backend c10d"}, 6, 2 / 10),
        ({"TORCHRUN_ARGS": "--nnodes 1:2 --nproc_per_node=1"}, 2, 5 / 10),
        ({}, 1, 1),
    ],
)
def test_the_time_is_that_of_all_processes(variables, processes, share, preflight, monkeypatch, model):
    monkeypatch.setenv("OUT", os.path.abspath("out"))
    monkeypatch.setitem(check.RATES, "cpu", (1e-5, 1e-5))  # hours, not fractions of a second
    flags = ["--dataset", "digits", *model]
    alone = seconds_of(preflight("distillation.gen_prototype", *flags)[2])
    assert alone > 60
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, problems, plan = preflight(ROOT / "distillation/gen_prototype_cf10.sh", *flags, "--size", "32")
    assert f"distillation.gen_prototype, {processes} process" in plan
    assert seconds_of(plan) == pytest.approx(share * alone, rel=0.1), plan
    _, _, plan = preflight("distillation.gen_prototype", *flags, "--shard", f"0/{processes}")
    assert seconds_of(plan) == pytest.approx(share * alone, rel=0.1), plan


def test_memory_is_that_of_a_rank(preflight, made, monkeypatch):
    """Without --bn_batch a batch is split over the ranks; pixels are kept by each of them."""
    monkeypatch.setenv("OUT", os.path.abspath("out"))
    flags = ["--train_dir", made[1], "--hard_label", "--model", "convnet_mini", "--device", "cpu", "--batch_size", "6"]
    plans = []
    for gpus in ("1", "3"):
        Path("launch.sh").write_text(f'torchrun --nproc_per_node {gpus} -m validate.train_FKD "$@"\n')
        status, problems, plan = preflight("launch.sh", *flags)
        assert status == 0, problems
        plans.append(plan)
    assert "for 6 images at once" in plans[0] and "for 2 images at once" in plans[1]
    assert "of pixels a process, for 3" in plans[1]
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    assert any("of pixels a process" in problem for problem in preflight("launch.sh", *flags)[1])


def test_more_processes_than_gpus_are_a_problem(preflight, model, monkeypatch):
    monkeypatch.setenv("OUT", os.path.abspath("out"))
    monkeypatch.setenv("NUM_GPUS", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    flags = ["--dataset", "digits", "--size", "32", *model[:2]]
    _, problems, _ = preflight(ROOT / "distillation/gen_prototype_cf10.sh", *flags)
    assert any("local process 3 needs CUDA device 3, this machine has 2" in problem for problem in problems)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\x00", b"torchrun --nproc_per_node 0 -m distillation.random_real --shard 3"]
)
def test_launchers_of_anything(text, preflight):
    Path("launch.sh").write_bytes(text)
    status, problems, _ = preflight("launch.sh")
    assert status == 2 and problems


def test_steps_that_follow_from_each_other_are_not_problems(preflight):
    status, problems, plan = preflight(ROOT / "scripts/demo.sh")
    assert status == 0, problems
    assert plan.count("an earlier command will make it") >= 3


@pytest.mark.parametrize("what", ["no/such/launcher.sh", "misc.report", "--help-me"])
def test_what_is_no_stage_is_one_problem(what, preflight, capsys):
    try:
        status, problems, _ = preflight(what)
    except AssertionError:
        status, problems = 2, [what]
    assert status == 2 and len(problems) == 1
