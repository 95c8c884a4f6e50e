"""Every launcher, under the system's sh: its flags are the parsers' own, and the chains close."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest

from distillation import datasets, gen_prototype, gen_syn_image, image_folder
from matching import labels
from scripts import output
from tests.conftest import ROOT

SHELL = shutil.which("dash") or "sh"
OF_ONE_STAGE = ("distillation/*.sh", "matching/*.sh", "validate/train_FKD*.sh")
LAUNCHERS = [str(path.relative_to(ROOT)) for place in OF_ONE_STAGE for path in ROOT.glob(place)]
LAUNCHERS.sort()
CHAINS = {"imagenet": "imgnt", "tiny_imagenet": "tnimgnt", "cifar10": "cf10", "cifar100": "cf100"}
CHAINS |= {"imagenette": "nette", "imagewoof": "woof", "imagenet100": "imgnt100"}
CHAINS["digits"] = "digits"
RECIPES = ("cda", "rded", "rd3", "edc", "minimax")
CHANGED = {"IPC": "20", "KM_EXPAND": "4", "STRENGTH": "0.50", "OUT": "a b/c"}
CHANGED |= {"EPOCHS": "40", "BATCH_SIZE": "64", "SIZE": "64", "SEED": "1", "STEPS": "25"}
CHANGED |= {"CROPS": "0.30", "FKD_SEED": "7", "TEACHER_EPOCHS": "5", "TEACHER_BATCH": "32"}
CHANGED |= {"TEACHER_LR": "0.050", "TEACHER_SEED": "3"}


def shell(script, *flags, cwd=None, **variables):
    """The finished process of a script, started as the release's README says: from its folder."""
    cwd = cwd or (ROOT / script).parent
    environment = {"PATH": os.environ["PATH"], **variables}
    command = [SHELL, os.path.relpath(ROOT / script, cwd), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@cache
def commands(script, *flags, **variables):
    """[(program, module, arguments)] that a script prints with DRY_RUN=1."""
    ended = shell(script, *flags, **{"DRY_RUN": "1", **variables})
    assert ended.returncode == 0, ended.stderr
    lines = [shlex.split(line) for line in ended.stdout.splitlines()]
    where = [max(n for n, word in enumerate(line) if word == "-m") for line in lines]
    return [(line[:at], line[at + 1], line[at + 2 :]) for line, at in zip(lines, where)]


def parsed(script, *flags, **variables):
    """The arguments that the one stage of a launcher gets."""
    [(_, module, arguments)] = commands(script, *flags, **variables)
    args = importlib.import_module(module).get_args(arguments)
    return args[0] if isinstance(args, tuple) else args


def stages_3_and_4(dataset, **variables):
    """The arguments of a data set's own matching and train_FKD launchers."""
    suffix = "" if dataset == "imagenet" else f"_{CHAINS[dataset]}"
    names = f"matching/matching{suffix}.sh", f"validate/train_FKD{suffix}.sh"
    return [parsed(name, **variables) for name in names]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_gives_its_stage_flags_that_it_knows(launcher):
    [(program, module, arguments)] = commands(launcher)
    assert program == ["python"] and module.split(".")[0] == launcher.split("/")[0]
    assert not [word for word in arguments if word.startswith("/")], "an absolute path"
    args, more = parsed(launcher), parsed(launcher, "--num-workers", "3", "--dry_run")
    assert vars(more) == {**vars(args), "num_workers": 3, "dry_run": True}


@pytest.mark.parametrize("launcher", LAUNCHERS[::9])
def test_what_dry_run_prints_is_what_is_started(launcher, tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    stub.chmod(0o755)
    words = ["--output", "it's", "", 'a "b"', "$HOME *"]
    [(_, module, arguments)] = commands(launcher, *words, OUT="x y", IPC="7")
    assert arguments[-5:] == words
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = shell(launcher, *words, OUT="x y", IPC="7", PATH=path)
    assert ran.stdout.split("\0")[:-1] == ["-m", module, *arguments]


def test_torchrun_is_started_when_asked():
    torchrun = ["-m", "scripts.torchrun"]
    [(program, _, _)] = commands(LAUNCHERS[0], NUM_GPUS="4")
    assert program == ["python", *torchrun, "--standalone", "--nproc_per_node", "4"]
    [(program, _, _)] = commands(LAUNCHERS[-1], TORCHRUN_ARGS="--nnodes 2 --rdzv_endpoint host:1")
    assert program == ["python", *torchrun, "--nnodes", "2", "--rdzv_endpoint", "host:1"]
    for text in ("x", "0", "-1", "2 4"):
        ended = shell("matching/matching.sh", NUM_GPUS=text, PYTHON="false")
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr == f"error: NUM_GPUS={text}: expected a number of at least 1\n"


@pytest.mark.parametrize("text", ["IPC=01", "EPOCHS=1e2", "STRENGTH=70%", "CROPS=0,08", "SEED=x"])
def test_a_number_that_stages_would_write_differently(text):
    name, value = text.split("=")
    ended = shell("validate/train_FKD_cf10.sh", PYTHON="false", **{name: value})
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(f"error: {text}: expected a ") and ended.stderr.count("\n") == 1


def test_a_data_set_with_dashes():
    with_dashes, usual = [
        parsed("validate/train_FKD_rd3.sh", DATASET=name)
        for name in ("tiny-imagenet", "tiny_imagenet")
    ]
    assert vars(with_dashes) == vars(usual)


def test_a_python_that_does_not_look_in_its_own_folder(tmp_path):
    where = {"PYTHONSAFEPATH": "1", "PYTHON": sys.executable, "OUT": str(tmp_path)}
    ended = shell("distillation/random_real.sh", "--help", DATASET="digits", **where)
    assert ended.returncode == 0 and "--ipc" in ended.stdout, ended.stderr


# ---- odd paths


@pytest.fixture
def outside(tmp_path):
    """outside(launcher, *flags, **variables): started in another folder, with a Python that prints
    its own path and its words."""
    program = tmp_path / "my python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\n')
    program.chmod(0o755)

    def start(launcher, *flags, **variables):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(program), **variables}
        command, how = [SHELL, launcher, *flags], {"capture_output": True, "text": True}
        return subprocess.run(command, cwd=tmp_path, env=environment, **how)

    return start


def test_a_launcher_from_another_folder_means_the_paths_there(outside, tmp_path):
    os.makedirs(tmp_path / "my data")
    os.symlink(ROOT / "matching/train_teacher_cf10.sh", tmp_path / "go on.sh")
    os.symlink(ROOT / "matching", tmp_path / "linked")
    places = {"OUT": "new out", "DATA_DIR": "my data", "PYTHON": "./my python", "CDPATH": "/tmp"}
    for launcher in ("go on.sh", "linked/train_teacher_cf10.sh"):
        ended = outside(launcher, "--seed", "1", **places)
        words = ended.stdout.splitlines()
        assert ended.returncode == 0 and words[:3] == [f"{tmp_path}/./my python", "-m", words[2]]
        flags = dict(zip(words[3::2], words[4::2]))
        assert flags["--data_dir"] == f"{tmp_path}/my data"
        assert flags["--output_dir"] == f"{tmp_path}/new out/teachers"
    ended = outside("go on.sh", "--val_dir", "x")
    assert f"started in {tmp_path}: relative paths in flags are from {ROOT}" in ended.stderr
    assert "data/cifar10" in ended.stdout.splitlines()  # what nobody set is the launcher's own


def test_cdpath_leads_no_launcher_away(outside, tmp_path):
    os.makedirs(tmp_path / "matching")
    environment = {"PATH": os.environ["PATH"], "CDPATH": str(tmp_path), "DRY_RUN": "1"}
    command = [SHELL, "matching/matching.sh"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("python -m"), ended.stderr


def test_pythons_that_are_not_there_or_several_words(outside):
    launcher = str(ROOT / "matching/train_teacher_digits.sh")
    ended = outside(launcher, PYTHON="/no such/python")
    assert ended.returncode == 2 and ended.stderr.startswith("error: /no such/python: no such prog")
    assert outside(launcher, PYTHON="echo a b").stdout.startswith("a b -m matching.train_teacher")
    words = outside(launcher, NUM_GPUS="2").stdout.splitlines()
    assert words[1:4] == ["-m", "scripts.torchrun", "--standalone"]


def test_a_launcher_says_the_values_that_it_uses(outside):
    launcher = str(ROOT / "validate/train_FKD_cf10.sh")
    told = outside(launcher, IPC="50", OUT="/a b", STDUENT="x", SEEDS="0 1").stderr.splitlines()
    values = shlex.split(told[-1])
    assert len(told) == 1 and values[0] == "train_FKD_cf10.sh:"
    assert {"IPC=50", "OUT=/a b", "STUDENT=convnet_w128", "SEEDS=0 1", "CROPS=0.08"} < set(values)
    assert not [word for word in values if word.startswith("STDUENT")]
    assert outside(launcher, DRY_RUN="1").stderr == ""


@pytest.mark.parametrize("variables", [{}, CHANGED], ids=["as they are", "changed"])
@pytest.mark.parametrize("dataset", CHAINS)
def test_each_stages_output_is_the_next_ones_input(dataset, variables):
    one = parsed(f"distillation/gen_prototype_{CHAINS[dataset]}.sh", **variables)
    two = parsed(f"distillation/gen_syn_image_{CHAINS[dataset]}.sh", **variables)
    three, four = stages_3_and_4(dataset, **variables)
    ipc = int(variables.get("IPC", 50 if dataset == "tiny_imagenet" else 10))
    assert one.dataset == two.dataset == dataset and one.ipc == two.ipc == ipc
    first = gen_prototype.with_size(one.settings, Mock())  # whatever the checkpoint's own is
    stem = f"{dataset}-ipc{ipc}-kmexpand{one.km_expand}"
    prototypes = output.folder_name(stem, *first.parts())
    assert two.prototype_path == f"{one.save_prototype_path}/{prototypes}"
    assert variables or prototypes == stem
    second = gen_syn_image.of_arm(two.settings, "d4m")
    name = image_folder.folder_name(second, gen_prototype.parts_of(first), one.seed)
    images = f"{two.save_init_image_path}/{name}"
    assert three.data == [images] and four.train_dir == images
    assert images.startswith(variables.get("OUT", "output") + "/")
    settings = three.settings.filled(input_size=datasets.ALL[dataset].image_size)
    name = labels.labels_name(Path(images).name, three.arch, settings)
    assert four.fkd_path == f"{three.fkd_path}/{name}"
    assert four.min_scale_crops == three.min_scale_crops


@pytest.mark.parametrize("variables", [{}, CHANGED], ids=["as they are", "changed"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny_imagenet", "digits"])
def test_a_teacher_is_where_stages_3_and_4_look_for_it(dataset, variables):
    for network in ("convnet_w64", "resnet18"):
        chosen = {**variables, "TEACHER": network, "OUT": "a b"}
        teacher = parsed(f"matching/train_teacher_{CHAINS[dataset]}.sh", **chosen)
        shown = teacher.settings.only(name for name in teacher.settings if name != "bn_batch")
        folder = f"a b/teachers/{output.folder_name(f'{dataset}_{network}', *shown.parts())}"
        assert stages_3_and_4(dataset, **chosen)[0].teacher_checkpoint == [folder]
        recipe = parsed("validate/train_FKD_rd3.sh", DATASET=dataset, **chosen)
        assert recipe.teacher_checkpoint == [folder]


def test_distill_has_the_values_of_both_stages():
    for stem in list(CHAINS.values())[:-1]:
        both = vars(parsed(f"distillation/distill_{stem}.sh"))
        for stage in ("gen_prototype", "gen_syn_image"):
            settings = parsed(f"distillation/{stage}_{stem}.sh").settings
            assert not {n for n, value in settings.items() if both.get(n, value) != value}, stem


@pytest.mark.parametrize("dataset", CHAINS)
def test_a_recipe_on_another_data_set_has_that_sets_place_size_and_teacher(dataset):
    stored, own = stages_3_and_4(dataset, OUT="x")
    networks = {"imagenet": "resnet18 mobilenet_v2 shufflenet_v2_x0_5 alexnet"}
    subset = "resnet18 mobilenet_v2 efficientnet_b0 shufflenet_v2_x0_5"
    small = "resnet18 convnet_w128 mobilenet_v2 shufflenet_v2_x0_5"
    networks = networks.get(dataset, small if own.input_size < 224 else subset).split()
    for recipe in RECIPES:
        args = parsed(f"validate/train_FKD_{recipe}.sh", OUT="x", DATASET=dataset)
        assert args.input_size == own.input_size and own.val_dir in (None, args.val_dir), recipe
        if recipe == "cda":  # its labels are stored under their teacher's name
            assert f"_{stored.arch[0]}_" in Path(args.fkd_path).name
        if args.online:
            assert args.arch == (networks if recipe == "edc" else stored.arch)
            public = "torchvision" if recipe == "rd3" else "torchvision:IMAGENET1K_V1"
            [checkpoint] = stored.teacher_checkpoint or [public]
            known = [checkpoint.replace(stored.arch[0], network) for network in args.arch]
            assert args.teacher_checkpoint == known, recipe
    chosen = {"DATA_DIR": "d", "INPUT_SIZE": "8", "TEACHER": "resnet50"}
    args = parsed("validate/train_FKD_rded.sh", DATASET=dataset, **chosen)
    assert (args.val_dir, args.input_size, args.arch) == ("d", 8, ["resnet50"])
    args = parsed("validate/train_FKD_rded.sh", DATASET=dataset, TEACHER_CHECKPOINT="mine")
    assert args.teacher_checkpoint == ["mine"]


def test_the_imagenet_launchers_keep_the_releases_values():
    one = {"dataset": "imagenet", "ipc": 10, "km_expand": 1, "size": 512}
    two = {"ipc": 10, "km_expand": 1, "guidance_scale": 8, "strength": 0.7}
    two |= {"num_inference_steps": 50, "negative_prompt": "cartoon, anime, painting"}
    three = {"arch": ["resnet18"], "batch_size": 1024, "epochs": 300, "fkd_seed": 42}
    three |= {"input_size": 224, "use_fp16": True, "mix_type": "cutmix"}
    three |= {"min_scale_crops": 0.08, "max_scale_crops": 1}
    four = {"model": "resnet18", "batch_size": 1024, "gradient_accumulation_steps": 2}
    four |= {"schedule": "cosine", "temperature": 20, "mix_type": "cutmix", "bn_batch": 73}
    names = ("distillation/gen_prototype_imgnt", "distillation/gen_syn_image_imgnt")
    names += ("matching/matching", "validate/train_FKD")
    for name, wanted in zip(names, (one, two, three, four)):
        assert vars(parsed(f"{name}.sh")).items() >= wanted.items(), name


def test_hard_and_online_labels_have_no_folder():
    hard = parsed("validate/train_FKD.sh", "--hard_label")
    assert hard.hard_label and hard.fkd_path is None and hard.batch_size == 1024
    online = parsed("validate/train_FKD.sh", "--online", "--arch", "resnet50")
    assert online.online and online.fkd_path is None and online.arch == ["resnet50"]
