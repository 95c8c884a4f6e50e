"""Every launcher, under the system's sh: its flags are the parsers' own, and the chains close."""

import importlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from matching import training
from tests.conftest import ROOT

SHELL = shutil.which("dash") or "sh"
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("distillation", "matching", "misc", "scripts", "validate")
    for path in [*(ROOT / folder).rglob("*.sh"), *(ROOT / folder).rglob("*.sbatch")]
)
LAUNCHERS = [
    path
    for path in SCRIPTS
    if path.startswith(("distillation", "matching", "validate/train_FKD"))  # one stage each
]
CHAINS = {  # data set: (of stages 1 and 2, 3, 4), IPC by default
    "imagenet": ("imgnt", "matching.sh", "train_FKD.sh", 10),
    "tiny_imagenet": ("tnimgnt", "matching_tnimgnt.sh", "train_FKD_tnimgnt.sh", 50),
    "cifar10": ("cf10", "matching_cf10.sh", "train_FKD_cf10.sh", 10),
    "cifar100": ("cf100", "matching_cf100.sh", "train_FKD_cf100.sh", 10),
    "imagenette": ("nette", "matching_nette.sh", "train_FKD_nette.sh", 10),
    "imagewoof": ("woof", "matching_woof.sh", "train_FKD_woof.sh", 10),
    "imagenet100": ("imgnt100", "matching_imgnt100.sh", "train_FKD_imgnt100.sh", 10),
    "digits": ("digits", "matching_digits.sh", "train_FKD_digits.sh", 10),
}
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


def test_every_script_is_sound_shell():
    odd = [path for path in SCRIPTS if subprocess.run([SHELL, "-n", ROOT / path]).returncode]
    assert not odd and len(SCRIPTS) > 60


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_gives_its_stage_flags_that_it_knows(launcher):
    [(program, module, arguments)] = commands(launcher)
    assert program == ["python"] and module.split(".")[0] == launcher.split("/")[0]
    assert not [word for word in arguments if word.startswith("/")], "an absolute path"
    args, more = parsed(launcher), parsed(launcher, "--num-workers", "3", "--dry_run")
    assert vars(more) == {**vars(args), "num_workers": 3, "dry_run": True}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_dry_run_prints_is_what_is_started(launcher, tmp_path):
    stub = tmp_path / "my python"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    stub.chmod(0o755)
    words = ["--output", "it's", "", 'a "b"', "$HOME *"]
    [(_, module, arguments)] = commands(launcher, *words, OUT="x y", IPC="7")
    assert arguments[-5:] == words
    (tmp_path / "python").symlink_to(stub)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = shell(launcher, *words, cwd=ROOT, OUT="x y", IPC="7", PATH=path)
    assert ran.stdout.split("\0")[:-1] == ["-m", module, *arguments]


def test_torchrun_is_started_when_asked():
    for launcher in LAUNCHERS[::9]:
        [(program, _, _)] = commands(launcher, NUM_GPUS="4")
        assert program == ["torchrun", "--standalone", "--nproc_per_node", "4"]
        [(program, _, _)] = commands(launcher, TORCHRUN_ARGS="--nnodes 2 --rdzv_endpoint host:1")
        assert program == ["torchrun", "--nnodes", "2", "--rdzv_endpoint", "host:1"]


@pytest.mark.parametrize("text", ["x", "0", "-1", "1.5", "2 4"])
def test_an_invalid_number_of_gpus_starts_nothing(text):
    ended = shell("matching/matching.sh", NUM_GPUS=text, PYTHON="false")
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == f"error: NUM_GPUS={text}: expected a number of at least 1\n"


@pytest.mark.parametrize("variables", [{}, {"IPC": "50"}, CHANGED])
@pytest.mark.parametrize("dataset", CHAINS)
def test_each_stages_output_is_the_next_ones_input(dataset, variables):
    from distillation.datasets import ALL
    from matching import labels

    stem, matching, validate, ipc = CHAINS[dataset]
    one = parsed(f"distillation/gen_prototype_{stem}.sh", **variables)
    two = parsed(f"distillation/gen_syn_image_{stem}.sh", **variables)
    three = parsed(f"matching/{matching}", **variables)
    four = parsed(f"validate/{validate}", **variables)
    ipc = int(variables.get("IPC", ipc))
    assert one.dataset == two.dataset == dataset and one.ipc == two.ipc == ipc
    assert one.km_expand == two.km_expand

    assert one.settings.parts() == []  # nothing but these three is in the folder's name
    prototypes = f"{one.save_prototype_path}/{dataset}-ipc{ipc}-kmexpand{one.km_expand}"
    assert two.prototype_path == prototypes

    named = {"strength", "guidance_scale", "num_prototypes"}
    assert two.settings.only(two.settings.keys() - named).parts() == []
    method = f"s{two.strength:g}_g{two.guidance_scale:g}_kmexpand{two.km_expand}"
    images = f"{two.save_init_image_path}/{dataset}_ipc{ipc}_{method}"
    assert three.data == [images] and four.train_dir == images
    assert images.startswith(variables.get("OUT", "output") + "/")

    settings = three.settings.filled(input_size=ALL[dataset].image_size)
    name = labels.labels_name(Path(images).name, three.arch, settings)
    assert four.fkd_path == f"{three.fkd_path}/{name}"


def test_distill_has_the_values_of_both_stages():
    for dataset, (stem, *_) in list(CHAINS.items())[:-1]:
        both = vars(parsed(f"distillation/distill_{stem}.sh"))
        for stage in ("gen_prototype", "gen_syn_image"):
            settings = parsed(f"distillation/{stage}_{stem}.sh").settings
            odd = {name for name, value in settings.items() if both.get(name, value) != value}
            assert not odd, (dataset, stage)


@pytest.mark.parametrize("dataset", CHAINS)
def test_a_recipe_on_another_data_set_has_that_sets_place_size_and_teacher(dataset):
    _, matching, validate, _ = CHAINS[dataset]
    stored, own = parsed(f"matching/{matching}", OUT="x"), parsed(f"validate/{validate}", OUT="x")
    networks = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0"]
    for recipe in ("cda", "rded", "rd3", "edc", "minimax"):
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
    args = parsed("distillation/gen_prototype_imgnt.sh")
    assert (args.dataset, args.ipc, args.km_expand, args.size) == ("imagenet", 10, 1, 512)
    args = parsed("distillation/gen_syn_image_imgnt.sh")
    assert (args.ipc, args.km_expand, args.guidance_scale, args.strength) == (10, 1, 8, 0.7)
    assert args.num_inference_steps == 50 and args.negative_prompt == "cartoon, anime, painting"
    args = parsed("matching/matching.sh")
    assert (args.arch, args.batch_size, args.epochs) == (["resnet18"], 1024, 300)
    assert (args.fkd_seed, args.input_size, args.use_fp16) == (42, 224, True)
    crops = (args.min_scale_crops, args.max_scale_crops, args.mix_type)
    assert crops == (0.08, 1, "cutmix")
    args = parsed("validate/train_FKD.sh")
    assert (args.model, args.batch_size, args.gradient_accumulation_steps) == ("resnet18", 1024, 2)
    assert (args.schedule, args.temperature, args.mix_type) == ("cosine", 20, "cutmix")
    assert args.bn_batch == 73


def test_hard_and_online_labels_have_no_folder():
    hard = parsed("validate/train_FKD.sh", "--hard_label")
    assert hard.hard_label and hard.fkd_path is None and hard.batch_size == 1024
    online = parsed("validate/train_FKD.sh", "--online", "--arch", "resnet50")
    assert online.online and online.fkd_path is None and online.arch == ["resnet50"]


@pytest.mark.parametrize(
    "script",
    ["scripts/demo.sh", "validate/cifar10_small.sh", "misc/train_tiny_sd_cf10.sh"],
)
def test_scripts_of_several_stages_give_flags_that_are_known(script):
    from matching import labels

    made = set()
    for _, module, arguments in commands(script, OUT="x y", ARMS="d4m random vae"):
        if module.startswith("misc"):  # takes seconds to import
            continue
        args = importlib.import_module(module).get_args(arguments)
        if module == "matching.generate_soft_label":
            settings = args.settings.filled(input_size=32)
            names = [Path(data).name for data in args.data]
            made |= {labels.labels_name(name, args.arch, settings) for name in names}
        elif module == "validate.train_FKD" and not args.hard_label:
            assert Path(args.fkd_path).name in made


# ---- recipes


def of_recipe(recipe, **variables):
    return parsed(f"validate/train_FKD{recipe and '_'}{recipe}.sh", **variables)


RDED_LR = {"resnet18": 1e-3, "resnet101": 1e-3, "efficientnet_b0": 2e-3, "mobilenet_v2": 2.5e-3}
RDED_LR |= {"vgg11": 5e-4, "swin_t": 1e-4, "vit_b_16": 1e-4}


def test_values_that_depend_on_ipc_or_student():
    for student, lr in RDED_LR.items():
        assert of_recipe("rded", STUDENT=student).adamw_lr == lr
    batch = [of_recipe("rded", IPC=ipc).batch_size for ipc in ("1", "10", "50", "100")]
    assert batch == [100, 100, 200, 200]
    small = [of_recipe("rded", IPC=ipc, DATASET="imagenette").batch_size for ipc in ("10", "50")]
    assert small == [50, 100]
    assert of_recipe("rd3").cos_stretch == 1
    assert of_recipe("rd3", STUDENT="resnet50").cos_stretch == 2
    epochs = [of_recipe("minimax", IPC=ipc).epochs for ipc in ("10", "20", "50", "100")]
    assert epochs == [2000, 1500, 1500, 1000]
    assert of_recipe("edc").teacher_checkpoint == ["torchvision"] * 4
    refreshed = [of_recipe(r).bn_refresh for r in ("", "cda", "rded", "rd3", "edc", "minimax")]
    assert refreshed == [False, False, True, True, False, False]


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


@pytest.mark.parametrize(
    "recipe, epochs, peak, half, last",
    [
        ("", 300, 1e-3, 0.5, 2.7e-5),
        ("cda", 300, 1e-3, 0.5, 2.7e-5),
        ("rded", 300, 1e-3, 0.853553, 0.502618),
        ("rd3", 400, 1e-3, 0.5, 1.5e-5),
        ("edc", 300, 1e-3, 0.853553, 0.502618),
        ("minimax", 2000, 0.01, 1, 0.04),
    ],
)
def test_learning_rates_at_the_start_the_middle_and_the_end(recipe, epochs, peak, half, last):
    args = of_recipe(recipe)
    assert args.epochs == epochs and (args.learning_rate if args.sgd else args.adamw_lr) == peak
    shape = args.cos_stretch, args.warmup_epochs, args.step_factor
    at = (0, epochs // 2, epochs - 1)
    factors = [training.lr_factor(args.schedule, epoch, epochs, *shape) for epoch in at]
    assert factors == pytest.approx([1, half, last], abs=1e-6)
