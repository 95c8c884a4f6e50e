"""Every launcher, under the system's sh: its flags are the parsers' own, and the chains close."""

import importlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from distillation import datasets
from matching import labels
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
CHANGED |= {"EPOCHS": "40", "BATCH_SIZE": "64"}


def shell(script, *flags, cwd=None, **variables):
    """The finished process of a script, started as the release's README says: from its folder."""
    cwd = cwd or (ROOT / script).parent
    environment = {"PATH": os.environ["PATH"], **variables}
    command = [SHELL, os.path.relpath(ROOT / script, cwd), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def commands(script, *flags, **variables):
    """[(program, module, arguments)] that a script prints with DRY_RUN=1."""
    ended = shell(script, *flags, **{"DRY_RUN": "1", **variables})
    assert ended.returncode == 0, ended.stderr
    lines = [shlex.split(line) for line in ended.stdout.splitlines()]
    where = [line.index("-m") for line in lines]
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
    [(program, _, _)] = commands(LAUNCHERS[0], NUM_GPUS="4")
    assert program == ["torchrun", "--standalone", "--nproc_per_node", "4"]
    [(program, _, _)] = commands(LAUNCHERS[-1], TORCHRUN_ARGS="--nnodes 2 --rdzv_endpoint host:1")
    assert program == ["torchrun", "--nnodes", "2", "--rdzv_endpoint", "host:1"]
    for text in ("x", "0", "-1", "2 4"):
        ended = shell("matching/matching.sh", NUM_GPUS=text, PYTHON="false")
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr == f"error: NUM_GPUS={text}: expected a number of at least 1\n"


@pytest.mark.parametrize("variables", [{}, CHANGED], ids=["as they are", "changed"])
@pytest.mark.parametrize("dataset", CHAINS)
def test_each_stages_output_is_the_next_ones_input(dataset, variables):
    one = parsed(f"distillation/gen_prototype_{CHAINS[dataset]}.sh", **variables)
    two = parsed(f"distillation/gen_syn_image_{CHAINS[dataset]}.sh", **variables)
    three, four = stages_3_and_4(dataset, **variables)
    ipc = int(variables.get("IPC", 50 if dataset == "tiny_imagenet" else 10))
    assert one.dataset == two.dataset == dataset and one.ipc == two.ipc == ipc
    assert one.km_expand == two.km_expand and one.settings.parts() == []
    prototypes = f"{one.save_prototype_path}/{dataset}-ipc{ipc}-kmexpand{one.km_expand}"
    assert two.prototype_path == prototypes
    named = {"strength", "guidance_scale", "num_prototypes"}
    assert two.settings.only(two.settings.keys() - named).parts() == []
    method = f"s{two.strength:g}_g{two.guidance_scale:g}_kmexpand{two.km_expand}"
    images = f"{two.save_init_image_path}/{dataset}_ipc{ipc}_{method}"
    assert three.data == [images] and four.train_dir == images
    assert images.startswith(variables.get("OUT", "output") + "/")
    settings = three.settings.filled(input_size=datasets.ALL[dataset].image_size)
    name = labels.labels_name(Path(images).name, three.arch, settings)
    assert four.fkd_path == f"{three.fkd_path}/{name}"


def test_distill_has_the_values_of_both_stages():
    for stem in list(CHAINS.values())[:-1]:
        both = vars(parsed(f"distillation/distill_{stem}.sh"))
        for stage in ("gen_prototype", "gen_syn_image"):
            settings = parsed(f"distillation/{stage}_{stem}.sh").settings
            assert not {n for n, value in settings.items() if both.get(n, value) != value}, stem


@pytest.mark.parametrize("dataset", CHAINS)
def test_a_recipe_on_another_data_set_has_that_sets_place_size_and_teacher(dataset):
    stored, own = stages_3_and_4(dataset, OUT="x")
    networks = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0"]
    for recipe in RECIPES:
        args = parsed(f"validate/train_FKD_{recipe}.sh", OUT="x", DATASET=dataset)
        assert args.input_size == own.input_size and own.val_dir in (None, args.val_dir), recipe
        if recipe == "cda":  # its labels are stored under their teacher's name
            assert f"_{stored.arch[0]}_" in Path(args.fkd_path).name
        if args.online:
            assert args.arch == (networks if recipe == "edc" else stored.arch)
            [checkpoint] = stored.teacher_checkpoint or ["torchvision"]
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


# ---- recipes


def of_recipe(recipe, **variables):
    return parsed(f"validate/train_FKD{recipe and '_'}{recipe}.sh", **variables)


COSINE = {"schedule": "cosine", "adamw_lr": 1e-3, "sgd": False, "warmup_epochs": 0}
RECIPE = {
    "": COSINE | {"epochs": 300, "cos_stretch": 1, "bn_refresh": False},
    "cda": COSINE | {"epochs": 300, "cos_stretch": 1, "bn_refresh": False},
    "rded": COSINE | {"epochs": 300, "cos_stretch": 2, "bn_refresh": True},
    "rd3": COSINE | {"epochs": 400, "cos_stretch": 1, "bn_refresh": True},
    "edc": COSINE | {"epochs": 300, "cos_stretch": 2, "teacher_checkpoint": ["torchvision"] * 4},
    "minimax": {"schedule": "step", "epochs": 2000, "sgd": True, "learning_rate": 0.01},
}
RDED_LR = {"resnet18": 1e-3, "resnet101": 1e-3, "efficientnet_b0": 2e-3, "mobilenet_v2": 2.5e-3}
RDED_LR |= {"vgg11": 5e-4, "swin_t": 1e-4, "vit_b_16": 1e-4}


def test_recipes_have_their_papers_values():
    for recipe, wanted in RECIPE.items():
        assert vars(of_recipe(recipe)).items() >= wanted.items(), recipe
    for student, lr in RDED_LR.items():
        assert of_recipe("rded", STUDENT=student).adamw_lr == lr
    for ipc, batch, epochs in ((1, 100, 2000), (10, 100, 2000), (50, 200, 1500), (100, 200, 1000)):
        assert of_recipe("rded", IPC=str(ipc)).batch_size == batch
        assert of_recipe("rded", IPC=str(ipc), DATASET="imagenette").batch_size == batch / 2
        assert of_recipe("minimax", IPC=str(ipc)).epochs == epochs
    assert of_recipe("minimax", IPC="20").epochs == 1500
    assert of_recipe("rd3", STUDENT="resnet50").cos_stretch == 2


@pytest.mark.parametrize("recipe, name", [("rded", "batch_size"), ("minimax", "epochs")])
def test_other_images_have_the_values_of_their_own_ipc(recipe, name):
    """IMAGES=imagenet_ipc50_random says how many there are; IPC does for a name that does not."""
    long, short = {"batch_size": (200, 100), "epochs": (1500, 2000)}[name]
    for images in ("x_ipc50_random", "x_ipc50_s0.7_g8_kmexpand1_stm", "a_ipc50_from_b_ipc10_text"):
        args = of_recipe(recipe, IMAGES=images, DATASET="imagenet")
        assert args.train_dir == f"output/images/{images}" and getattr(args, name) == long
    for images in ("x_ipc9", "of_ipcs"):
        assert getattr(of_recipe(recipe, IMAGES=images, DATASET="imagenet"), name) == short
    assert getattr(of_recipe(recipe, IMAGES="mine", IPC="50", DATASET="imagenet"), name) == long
