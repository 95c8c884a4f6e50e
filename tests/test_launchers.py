"""Every launcher, run under the system's sh against a stub: its flags are the parsers' own, and the chains close."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(
    str(p.relative_to(ROOT)) for d in ("distillation", "matching", "validate") for p in (ROOT / d).glob("*.sh")
)
CHAINS = {  # data set: (stage 1, 2, 3, 4), IPC by default
    "imagenet": ("imgnt", "matching.sh", "train_FKD.sh", 10),
    "tiny_imagenet": ("tnimgnt", "matching_tnimgnt.sh", "train_FKD_tnimgnt.sh", 50),
    "cifar10": ("cf10", "matching_cf10.sh", "train_FKD_cf10.sh", 10),
    "cifar100": ("cf100", "matching_cf100.sh", "train_FKD_cf100.sh", 10),
    "imagenette": ("nette", "matching_nette.sh", "train_FKD_nette.sh", 10),
    "imagewoof": ("woof", "matching_woof.sh", "train_FKD_woof.sh", 10),
    "imagenet100": ("imgnt100", "matching_imgnt100.sh", "train_FKD_imgnt100.sh", 10),
}
CHANGED = {"IPC": "20", "KM_EXPAND": "4", "STRENGTH": "0.50", "OUT": "elsewhere", "EPOCHS": "40", "BATCH_SIZE": "64"}
SHELL = shutil.which("dash") or "sh"
STUB = """#!/bin/sh
for argument in "$0" "$@"; do printf '%s\\0' "$argument"; done >> "$RECORD"
printf '\\n' >> "$RECORD"
"""


@pytest.fixture
def record(tmp_path):
    """record(launcher, *flags, **variables) -> [(program, its options, module, arguments)] as a stub saw them."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k not in ("IPC", "OUT", "NUM_GPUS", "TORCHRUN_ARGS", "PYTHON")}

    def run(launcher, *flags, cwd=None, **variables):
        path = tmp_path / "record"
        path.unlink(missing_ok=True)
        environment = {**clean, "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(path), **variables}
        cwd = (
            cwd or (ROOT / launcher).parent
        )  # as the release's README says: cd distillation; sh gen_prototype_imgnt.sh
        subprocess.run([SHELL, os.path.relpath(ROOT / launcher, cwd), *flags], cwd=cwd, env=environment, check=True)
        calls = []
        for line in path.read_bytes().decode().split("\0\n"):
            if line:
                program, *arguments = line.split("\0")
                at = arguments.index("-m")
                calls.append((Path(program).name, arguments[:at], arguments[at + 1], arguments[at + 2 :]))
        return calls

    return run


@pytest.mark.parametrize("text", ["x", "0", "-1", "1.5", "2 4"])
def test_a_number_of_gpus_that_is_none_starts_nothing(text, record, tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError) as ended:
        record("matching/matching.sh", NUM_GPUS=text)
    assert ended.value.returncode == 2 and not (tmp_path / "record").exists()
    assert capfd.readouterr().err == f"error: NUM_GPUS={text}: expected a number of at least 1\n"


def parsed(module, arguments):
    return importlib.import_module(module).get_args(arguments)


def is_table(launcher):
    return re.match(r"validate/(table\d|cifar10_small)", launcher)


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if not is_table(name)])
def test_a_launcher_gives_its_stage_flags_that_it_knows(record, launcher):
    [(program, options, module, arguments)] = record(launcher)
    assert program == "python" and options == []
    assert module.split(".")[0] == launcher.split("/")[0]
    args = vars(parsed(module, arguments))
    [(_, _, _, more)] = record(launcher, "--num-workers", "3", cwd=ROOT)
    assert more == [*arguments, "--num-workers", "3"]
    assert {**args, "num_workers": 3} == vars(parsed(module, more))
    assert not [a for a in arguments if a.startswith("/")], "an absolute path"


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if not is_table(name)])
def test_a_launcher_starts_torchrun_when_asked(record, launcher):
    [(program, options, _, _)] = record(launcher, NUM_GPUS="4")
    assert (program, options) == ("torchrun", ["--standalone", "--nproc_per_node", "4"])
    [(program, options, _, _)] = record(launcher, TORCHRUN_ARGS="--nnodes 2 --rdzv_endpoint host:1")
    assert (program, options) == ("torchrun", ["--nnodes", "2", "--rdzv_endpoint", "host:1"])


@pytest.mark.parametrize("variables", [{}, {"IPC": "50"}, CHANGED])
@pytest.mark.parametrize("dataset", CHAINS)
def test_each_stages_output_is_the_next_ones_input(record, dataset, variables):
    from distillation.datasets import DATASETS
    from distillation.gen_syn_image import image_folder_name, synthesis_settings
    from distillation.prototypes import prototype_folder_name
    from matching.soft_labels import PROTOCOL, labels_name, protocol_of

    stem, matching, validate, ipc = CHAINS[dataset]

    def stage(launcher):
        [(_, _, module, arguments)] = record(launcher, **variables)
        return parsed(module, arguments)

    one, two = stage(f"distillation/gen_prototype_{stem}.sh"), stage(f"distillation/gen_syn_image_{stem}.sh")
    both = stage(f"distillation/distill_{stem}.sh")
    three, four = stage(f"matching/{matching}"), stage(f"validate/{validate}")
    ipc = int(variables.get("IPC", ipc))
    assert one.dataset == two.dataset == both.dataset == dataset and one.ipc == two.ipc == both.ipc == ipc

    settings_1 = {**vars(one), "max_images_per_class": 0}
    prototypes = Path(one.save_prototype_path) / prototype_folder_name(settings_1)
    assert Path(two.prototype_path) == prototypes

    images = Path(two.save_init_image_path) / image_folder_name(synthesis_settings(two, "d4m", "fp16", {}), settings_1)
    settings_12 = {**vars(both), "max_images_per_class": 0}
    distilled = image_folder_name(synthesis_settings(both, "d4m", "fp16", {}), settings_12)
    assert Path(both.save_init_image_path) / distilled == images
    assert [Path(p) for p in three.data] == [images] and Path(four.train_dir) == images

    size = DATASETS[dataset].image_size
    given = {name: getattr(three, name) for name in PROTOCOL}
    labels = Path(three.fkd_path) / labels_name(images.name, three.arch, protocol_of(given, size), size)
    assert Path(four.fkd_path) == labels
    assert str(images).startswith(variables.get("OUT", "output") + "/")


@pytest.mark.parametrize("dataset", CHAINS)
def test_a_recipe_on_another_data_set_has_that_sets_place_size_and_teacher(record, dataset):
    def stage(launcher, **variables):
        [(_, _, module, arguments)] = record(launcher, OUT="elsewhere", **variables)
        return parsed(module, arguments)

    labels, own = stage(f"matching/{CHAINS[dataset][1]}"), stage(f"validate/{CHAINS[dataset][2]}")
    networks = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "efficientnet_b0"]
    for recipe in ("cda", "rded", "rd3", "edc", "minimax"):
        args = stage(f"validate/train_FKD_{recipe}.sh", DATASET=dataset)
        assert (args.val_dir, args.input_size) == (own.val_dir, own.input_size), recipe
        if recipe == "cda":  # its labels are stored under their teacher's name
            assert f"_{labels.arch[0]}_" in Path(args.fkd_path).name
        if args.online:
            assert args.arch == (networks if recipe == "edc" else labels.arch)
            [checkpoint] = labels.teacher_checkpoint or ["torchvision"]
            known = [checkpoint.replace(labels.arch[0], network) for network in args.arch]
            assert args.teacher_checkpoint == known, recipe
    args = stage("validate/train_FKD_rded.sh", DATASET=dataset, DATA_DIR="d", INPUT_SIZE="8", TEACHER="resnet50")
    assert (args.val_dir, args.input_size, args.arch) == ("d", 8, ["resnet50"])
    args = stage("validate/train_FKD_rded.sh", DATASET=dataset, TEACHER_CHECKPOINT="mine")
    assert args.teacher_checkpoint == ["mine"]


@pytest.mark.parametrize(
    "script", sorted(p for p in ROOT.glob("*/*.py") if "__main__" in p.read_text() and "test" not in p.parts[-2])
)
def test_a_script_started_by_path_says_how_it_is_run(script):
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: run it from the repository root: ")


def test_the_imagenet_launchers_keep_the_releases_values(record):
    [(_, _, module, arguments)] = record("distillation/gen_prototype_imgnt.sh")
    args = parsed(module, arguments)
    assert (args.dataset, args.ipc, args.km_expand, args.size) == ("imagenet", 10, 1, 512)
    [(_, _, module, arguments)] = record("distillation/gen_syn_image_imgnt.sh")
    args = parsed(module, arguments)
    assert (args.ipc, args.km_expand, args.guidance_scale, args.strength, args.num_inference_steps) == (
        10,
        1,
        8,
        0.7,
        50,
    )
    assert args.negative_prompt == "cartoon, anime, painting"
    [(_, _, module, arguments)] = record("matching/matching.sh")
    args = parsed(module, arguments)
    assert (args.arch, args.batch_size, args.num_workers, args.epochs) == (["resnet18"], 1024, 8, 300)
    assert (args.fkd_seed, args.input_size, args.min_scale_crops, args.max_scale_crops) == (42, 224, 0.08, 1)
    assert args.mix_type == "cutmix" and args.use_fp16
    [(_, _, module, arguments)] = record("validate/train_FKD.sh")
    args = parsed(module, arguments)
    assert (args.model, args.batch_size, args.gradient_accumulation_steps, args.num_workers) == (
        "resnet18",
        1024,
        2,
        8,
    )
    assert (args.schedule, args.temperature, args.mix_type, args.bn_batch) == ("cosine", 20, "cutmix", 73)
