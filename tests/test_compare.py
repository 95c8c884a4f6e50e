"""validate/compare.sh and best_*.sh: every folder, and random real images, by one recipe."""

import importlib
import shutil
from functools import partial

import pytest

from distillation import gen_syn_image, image_folder
from scripts import output
from tests.conftest import ROOT
from tests.test_launchers import commands, shell

FLAGS = ["--num_workers", "0"]


def test_every_folder_is_trained_on_by_one_recipe(tmp_path):
    folders = ["x/digits_ipc10_s0.7_g8_kmexpand1", "x/digits_ipc10_s0.5_g8_kmexpand1", "/y/it's $1"]
    run = commands("validate/compare.sh", *folders, *FLAGS, OUT="a b", SEEDS="3 4")
    modules = ["distillation.random_real", "misc.figures", "matching.train_teacher"]
    assert [module for _, module, _ in run] == [
        *modules,
        *["validate.train_FKD"] * 8,
        "misc.report",
    ]
    parsed = [importlib.import_module(module).get_args(argv) for _, module, argv in run[:-1]]
    random, figure, teacher, *students = parsed
    every = [*folders, "a b/images/digits_ipc10_random"]
    assert (random.dataset, random.ipc) == ("digits", 10)
    assert figure.images == every and figure.dataset == "digits"
    assert figure.names == ["D4M s0.7", "D4M s0.5", "it's $1", "random real"]
    assert [s.train_dir for s in students] == [folder for folder in every for _ in "ab"]
    assert [(s.online, s.hard_label) for s in students] == [(True, False), (False, True)] * 4
    for labels in (students[::2], students[1::2]):
        assert len({str(s.settings) for s in labels}) == 1 and labels[0].seeds == [3, 4]
    assert students[0].teacher_checkpoint == ["a b/teachers/digits_convnet_mini"]
    given = commands("validate/compare.sh", *folders, TEACHER_CHECKPOINT="mine", NUM_GPUS="2")
    lines = [" ".join([*program, module, *words]) for program, module, words in given]
    assert len(lines) == len(run) - 1 and "--teacher_checkpoint mine" in lines[2]
    several = ["--nproc_per_node 2" in line for line in lines]
    assert several == [True, False, *[True] * 8, False]  # a figure and a report: one process


def test_a_teachers_folder_says_its_network_and_size(tmp_path):
    said = ' "arch": "convnet_w64",\n "image_size": 64,\n'
    (tmp_path / "manifest.json").write_text('{\n "arguments": {\n  "arch": "x"\n },\n' + said)
    own = {"DATASET": "imagefolder", "TEACHER_CHECKPOINT": str(tmp_path)}
    run = commands("validate/compare.sh", "x_ipc2_y", *FLAGS, **own)
    [soft, _] = [argv for _, module, argv in run if module == "validate.train_FKD"][:2]
    found = importlib.import_module("validate.train_FKD").get_args(soft)
    assert (found.arch, found.model, found.input_size) == (["convnet_w64"], "convnet_w64", 64)


def test_a_teacher_that_is_there_is_taken(tmp_path):
    for script in ROOT.glob("*/*.sh"):
        (tmp_path / script.parent.name).mkdir(exist_ok=True)
        shutil.copy(script, tmp_path / script.parent.name)
    compare = partial(commands, tmp_path / "validate/compare.sh", "x/digits_ipc2_y", *FLAGS)
    assert "matching.train_teacher" in [module for _, module, _ in compare()]
    folder = tmp_path / "output/teachers/digits_convnet_mini_epochs3"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{\n "arch": "convnet_mini",\n "image_size": 32\n}')
    _, _, (_, module, argv), *_ = compare(TEACHER_EPOCHS="3")
    assert module == "validate.train_FKD"
    assert argv[argv.index("--teacher_checkpoint") + 1] == str(folder.relative_to(tmp_path))
    assert "matching.train_teacher" in [module for _, module, _ in compare(OUT="mine")]


def test_its_help_is_what_stands_at_its_top():
    ended = shell("validate/compare.sh", "--help", PYTHON="none")
    assert ended.returncode == 0 and ended.stdout.startswith("Any image folders under one recipe")
    assert "\n  DATASET=cifar10 sh validate/compare.sh" in ended.stdout and not ended.stderr


def test_what_cannot_be_compared_is_one_line(tmp_path):
    other, path = "cifar10_ipc50_x", str(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0/1.png").touch()
    wrong = {
        "no folder: sh": [],
        "no such folder": ["digits_ipc10_x"],
        "no folder says its data set": [path],
    }
    for words, folders in wrong.items():
        ended = shell("validate/compare.sh", *folders)
        assert ended.returncode == 2 and words in ended.stderr and ended.stderr.count("\n") == 1
    ended = shell("validate/compare.sh", "x_ipc2_y", DRY_RUN="1", DATASET="imagefolder")
    assert ended.returncode == 2 and "set TEACHER_CHECKPOINT" in ended.stderr
    own = {"DATASET": "imagefolder", "TEACHER_CHECKPOINT": "typo"}
    ended = shell("validate/compare.sh", "x_ipc2_y", DRY_RUN="1", **own)
    assert ended.returncode == 2 and "typo: has no manifest.json; set TEACHER" in ended.stderr
    ended = shell("validate/compare.sh", "digits_ipc10_x", other, DRY_RUN="1")
    assert ended.returncode == 2 and f"{other}: 50 images per class, not IPC=10" in ended.stderr


def test_as_many_random_real_images_as_the_folders_hold_whatever_they_are_called(tmp_path):
    for name in ("A/digits_ipc10_x", "B/train", "B/val", "C/images", "D/images"):
        for place in ("0/1.png", "0/2.JPG", "0/.3.png", "0/notes.txt", "1/1.png", "1/2.png"):
            (tmp_path / name / place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / place).touch()
    (tmp_path / "C/images/args.json").write_text(
        '{\n "arguments": {\n  "dataset": "cifar10"\n }\n}'
    )
    for place in ("B/val/0/3.png", "cover.png"):
        (tmp_path / place).touch()
    named, foreign, ours, same = [
        f"{tmp_path}/{n}" for n in ("A/digits_ipc10_x", "B", "C/images", "D/images")
    ]
    run = commands("validate/compare.sh", named, foreign, *FLAGS)
    [argv] = [argv for _, module, argv in run if module == "distillation.random_real"]
    assert importlib.import_module("distillation.random_real").get_args(argv).ipc == 2
    assert commands("validate/compare.sh", ours)[0][2][:2] == ["--dataset", "cifar10"]
    (tmp_path / "A/digits_ipc10_x/2").mkdir()
    wrong = {
        f"{named}: 2 images per class, not IPC=10": ([named], {"IPC": "10"}),
        f"{ours}: images of cifar10, not DATASET=digits": ([named, ours], {}),
        "two folders are called images; rename one": ([ours, same], {}),
        f"{foreign}: its class folders hold 2 3 images": ([foreign], {"DATASET": "digits"}),
    }
    (tmp_path / "B/train/0/3.png").touch()
    for words, (folders, variables) in wrong.items():
        ended = shell("validate/compare.sh", *folders, **variables)
        assert ended.returncode == 2 and ended.stderr == f"error: {words}\n" and not ended.stdout


@pytest.mark.parametrize("smoke", ["", "1"])
@pytest.mark.parametrize("name", ["cifar10_small", "imgnt"])
def test_the_best_launchers_give_both_sets_of_images_one_recipe(name, smoke):
    variables = {"SEED": "7", "SEEDS": "5", "SMOKE": smoke}  # of cifar10_small no rehearsal
    run = commands(f"validate/best_{name}.sh", *FLAGS, OUT="a b", **variables)
    assert run.pop()[1] == "misc.report"
    parsed = [importlib.import_module(module).get_args(argv) for _, module, argv in run]
    _, images, random, *teacher, ours, theirs = parsed
    root = "a b/smoke" if smoke and name == "imgnt" else "a b"
    of_d4m = image_folder.folder_name(gen_syn_image.of_arm(images.settings, "d4m"), {}, 7)
    assert ours.train_dir in (f"{root}/images/{of_d4m}", f"{root}/images/{of_d4m}_size32")
    assert theirs.train_dir == f"{root}/images/{images.dataset}_ipc10_random_seed7"
    assert ours.settings == theirs.settings and ours.online and ours.seeds == [5]
    assert random.seed == 7 and random.dataset == images.dataset and ours.epochs == 400
    assert ours.teacher_checkpoint == theirs.teacher_checkpoint
    assert len(teacher) == (bool(smoke) or name != "imgnt")  # ImageNet's is torchvision's
    for args in teacher:
        shown = args.settings.only(n for n in args.settings if n != "bn_batch").parts()
        folder = output.folder_name(f"{args.dataset}_{args.arch}", *shown)
        assert ours.teacher_checkpoint == [f"{root}/teachers/{folder}"]


def test_the_best_launchers_from_elsewhere(tmp_path):
    for name, folder in (("cifar10_small", "output/cifar10_small/best"), ("imgnt", "output")):
        run = commands(ROOT / f"validate/best_{name}.sh", cwd=tmp_path)
        assert run[-1][1:] == ("misc.report", [folder])
    run = commands("validate/best_cifar10_small.sh", TEACHER_CHECKPOINT="mine")
    students = [argv for _, module, argv in run if module == "validate.train_FKD"]
    assert all(argv[argv.index("--teacher_checkpoint") + 1] == "mine" for argv in students)
    assert "matching.train_teacher" not in [module for _, module, _ in run]
