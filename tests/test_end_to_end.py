"""All stages in a row, as the demo runs them and on photographs; rules of the whole tree."""

import importlib
import os
import re
import shlex
import subprocess

import pytest

from distillation import gen_prototype, gen_syn_image, random_real
from matching import generate_soft_label, train_teacher
from misc import report
from scripts import files
from tests.conftest import ROOT, everything
from validate import train_FKD

CPU = ["--device", "cpu", "--num_workers", "0"]
DIGITS = ["--dataset", "digits", "--classes", "0-2", "--max_images_per_class", "30"]
DIGITS_SD = ["--diffusion_checkpoints_path", str(ROOT / "misc/tiny-sd-digits")]
BATCHES = ["--epochs", "2", "--batch_size", "4", "--flip", "0", "--mix_type", "cutmix"]


def chain(data, sd, teacher_epochs, where=CPU):
    """Stages 1-4, two images per class: {d4m's and the real images' folder: its row of results}"""
    from torchvision.datasets import ImageFolder

    two, small = ["--ipc", "2", "--km_expand", "1", *where], ["--image_size", "32"]
    prototypes = gen_prototype.main([*data, *two, *sd, "--size", "32"])
    source = ["--prototype_path", str(prototypes), "--num_inference_steps", "5"]
    images = gen_syn_image.main([*data[:2], *two, *sd, *small, *source])
    images.append(random_real.main([*data, "--ipc", "2", *small]))
    network = ["--arch", "convnet_mini", "--input_size", "32", *where]
    teacher = train_teacher.main([*data, *network, "--epochs", teacher_epochs, "-b", "50"])
    network += ["--teacher_checkpoint", str(teacher)]
    labels = generate_soft_label.main(["--data", *map(str, images), *network, *BATCHES])
    student = ["--model", "convnet_mini", "--cos", "-T", "20", "--seeds", "0", "1", *where]
    student += ["--val_dir", data[3]] if data[2] == "--data_dir" else []
    rows = {folder: "" for folder in images}
    for folder, path in zip(images, labels):
        loaded, classes = ImageFolder(folder), files.read_json(folder / "manifest.json")["classes"]
        assert loaded.classes == [c["folder"] for c in classes]
        assert loaded.targets == [0, 0, 1, 1, 2, 2]
        for kind in (["--fkd_path", str(path)], ["--hard_label", *BATCHES]):
            made = train_FKD.main(["--train_dir", str(folder), *kind, *student])
            top1 = files.read_json(made / "results.json")["summary"]["last"]["top1"]
            rows[folder] += f" {top1['mean']:.1f} ± {top1['std']:.1f} |"
    return rows


def test_digits_from_scans_to_the_report(capsys):
    d4m, real = chain(DIGITS, DIGITS_SD, "8").values()
    report.main([])
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for name, row in {"D4M": d4m, "random real images": real}.items():
        assert f"| {name} (3 of 10 classes) |{row}\n" in printed
    assert "± over 2 seeds" in printed and printed.endswith("output/report.html\n")


def test_photographs_from_files_to_students(photographs, model):
    root = str(photographs / "imagenette64")
    data = ["--dataset", "imagefolder", "--data_dir", root, "--classes", "0-2"]
    data += ["--max_images_per_class", "8", "--label_file_path", f"{root}/prompts.txt"]
    for folder in chain(data, model, "1"):
        found = files.read_json(folder / "manifest.json")["classes"]
        assert [c["folder"] for c in found] == ["n01440764", "n02102040", "n02979186"]
        assert [c["prompt"] for c in found] == ["tench", "English springer", "cassette player"]


AFTER_THE_DEMO = """
python -m distillation.distill --dataset digits --diffusion_checkpoints_path misc/tiny-sd-digits
python -m distillation.take_classes --image_path out/images/digits_ipc10_random --dataset digits
python -m matching.stm --image_path out/images/digits_ipc10_random --arch convnet_mini
"""


def test_a_dry_run_of_each_stage_before_anything_exists(capsys):
    """It says what it would make, and waits only for what an earlier one would make."""
    environment = {**os.environ, "DRY_RUN": "1", "OUT": "out"}
    demo = ["sh", str(ROOT / "scripts/demo.sh")]
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    text = subprocess.run(demo, **how).stdout
    text = (text + AFTER_THE_DEMO).replace("misc/tiny", f"{ROOT}/misc/tiny")
    planned, awaited = set(), set()
    for _, _, module, *argv in filter(None, map(shlex.split, text.splitlines())):
        if module == "misc.report":
            continue
        importlib.import_module(module).main([*argv, "--dry_run"])
        for plan in capsys.readouterr().out.splitlines():
            folder, rest = re.match(
                r"plan: (\S+): 0 done, [1-9]\d* files to do, (.*)", plan
            ).groups()
            waits_for = set(re.findall(r"(\S+): python -m", rest))
            assert waits_for <= planned
            assert ("--hard_label" in argv) == ("_hard_" in folder)
            awaited |= waits_for
            planned.add(folder)
    assert "out/prototypes/digits-ipc10-kmexpand1" in awaited and not everything(".")


# ---- rules of the tree

FOLDERS = ["scripts", "distillation", "matching", "validate", "misc"]  # each imports those before
SOURCES = {path: path.read_text() for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
NOWHERE = [r"sys\.path", r"weights_only\s*=\s*False", r"import pickle", r"except:", "fmt: skip"]
NOWHERE += [r"trust_remote_code\s*=\s*True", r"(?<![\w.])(eval|exec)\("]


@pytest.mark.parametrize("pattern", NOWHERE)
def test_what_stands_nowhere(pattern):
    assert not [path for path, text in SOURCES.items() if re.search(pattern, text)]


def test_imports_run_one_way():
    for path, text in SOURCES.items():
        here = FOLDERS.index(path.relative_to(ROOT).parts[0])
        for name in re.findall(rf"^\s*(?:from|import) ({'|'.join(FOLDERS)})\b", text, re.MULTILINE):
            assert FOLDERS.index(name) <= here, f"{path} imports {name}"


def test_only_a_script_and_its_flags_take_args():
    for path, text in SOURCES.items():
        for name in re.findall(r"def (\w+)\((?:[^)]*[\s,])?args\b", text):
            flags = name in ("get_args", "main", "parse_known_args") or f"default={name}" in text
            assert flags, f"{path}: {name}(args)"


def test_only_the_generator_knows_what_it_is_made_of():
    knows = r".*(runtime|generators|families|pipeline_\w+)\.py|.*/misc/.*"
    texts = [text for path, text in SOURCES.items() if not re.fullmatch(knows, str(path))]
    assert not re.search("unet|text_encoder", "".join(texts))


def test_the_code_does_not_grow():
    """What a change adds has to go elsewhere."""
    assert sum(len(text.splitlines()) for text in SOURCES.values()) <= 12429
    path = ["distillation/prototypes", "distillation/gen_prototype", "distillation/gen_syn_image"]
    path += ["matching/batches", "matching/training", "matching/generate_soft_label"]
    path += ["validate/train_FKD", "scripts/pipeline_stable_diffusion_gen_latents"]
    path += ["scripts/pipeline_stable_diffusion_latents2img"]
    assert sum(len(SOURCES[ROOT / f"{name}.py"].splitlines()) for name in path) <= 1990
