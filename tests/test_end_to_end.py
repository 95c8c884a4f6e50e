"""All four stages in a row, as the demo and as a user with a folder of photographs runs them."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from test_paper_tables import fake

from distillation import gen_prototype, gen_syn_image, random_real
from matching import generate_soft_label, train_teacher
from misc import report
from validate import train_FKD

MODEL = Path(__file__).resolve().parent.parent / "misc" / "tiny-sd-digits"
QUIET = ["--num_workers", "0", "--device", "cpu"]


def run_all(out, data, sd, size, teacher_epochs, arms):
    """(image folders, results by image folder and kind of labels): stages 1-4 with two images a class."""
    two = ["--ipc", "2", "--km_expand", "1", *QUIET, "--diffusion_checkpoints_path", str(sd)]
    prototypes = gen_prototype.main([*data, *two, "--size", str(size), "--save_prototype_path", f"{out}/prototypes"])
    name = data[data.index("--dataset") + 1]
    saved = ["--image_size", "32", "--num_inference_steps", "5", "--save_init_image_path", f"{out}/images"]
    source = ["--dataset", name, "--prototype_path", str(prototypes), "--arm", *arms]
    images = gen_syn_image.main([*source, *two, *saved])
    images.append(
        random_real.main([*data, "--ipc", "2", "--image_size", "32", "--save_init_image_path", f"{out}/images"])
    )
    small = ["--arch", "convnet_mini", "--input_size", "32", "--output_dir", f"{out}/teachers", *QUIET]
    teacher = train_teacher.main([*data, *small, "--epochs", str(teacher_epochs), "--batch_size", "50"])
    batches = ["--epochs", "2", "--batch_size", "4", "--flip", "0", "--mix_type", "cutmix"]
    labels = generate_soft_label.main(
        [
            "--data",
            *map(str, images),
            "--arch",
            "convnet_mini",
            "--teacher_checkpoint",
            str(teacher),
            *batches,
            *QUIET,
            "--fkd_path",
            f"{out}/labels",
        ]
    )
    student = [
        "--model",
        "convnet_mini",
        "--cos",
        "-T",
        "20",
        "--seeds",
        "0",
        "1",
        *QUIET,
        "--output_dir",
        f"{out}/students",
    ]
    student += ["--val_dir", data[data.index("--data_dir") + 1]] if "--data_dir" in data else []
    for folder, path in zip(images, labels):
        train_FKD.main(["--train_dir", str(folder), "--fkd_path", str(path), *student])
        train_FKD.main(["--train_dir", str(folder), "--hard_label", *batches, *student])
    found = {}
    for path in (out / "students").glob("*/results.json"):
        result = json.loads(path.read_text())
        found[result["images"]["name"], result["arguments"]["labels"]] = result
    return images, found


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_digits_from_scans_to_the_report(tmp_path, capsys):
    data = ["--dataset", "digits", "--classes", "0-2", "--max_images_per_class", "30"]
    images, results = run_all(tmp_path / "out", data, MODEL, 32, 8, ["d4m", "decoded"])
    assert len(images) == 3 and len(results) == 6
    printed = capsys.readouterr().out.splitlines()
    for timing in (tmp_path / "out").rglob("timing.json"):  # every stage's, and its line says the same
        mib = json.loads(timing.read_text())["host_mib"]
        [line] = [line for line in printed if line.startswith(f"{timing.parent}: ")]
        assert line.endswith(f"s, peak memory {mib / 2**10:.2f} GiB") and mib > 100
    assert len(list((tmp_path / "out").rglob("timing.json"))) == 1 + 3 + 1 + 3 + 6
    for result in results.values():
        last = result["summary"]["last"]["top1"]
        assert last["n"] == 2 and len(last["values"]) == 2 and result["arguments"]["model"] == "convnet_mini"
    report.main(["--output_root", str(tmp_path / "out"), "--dataset", "digits", "--ipc", "2"])
    printed = capsys.readouterr().out
    mean = results[images[0].name, "hard"]["summary"]["last"]["top1"]["mean"]
    assert f"{mean:.1f} ±" in next(line for line in printed.splitlines() if line.startswith("| D4M |"))
    assert "random real images" in printed and "2 seeds" in printed and "4 students" in printed
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > grid.height > 100
    assert (tmp_path / "out" / "report.md").read_text().strip() in printed


def test_a_report_of_nothing_is_refused(tmp_path, refused):
    refused(report.main, ["--output_root", tmp_path, "--dataset", "digits", "--ipc", "2"], "no results of stage 4")


def test_a_report_lists_every_arm(tmp_path, capsys):
    for n, arm in enumerate(("foreign", "stm", "d4m", "random"), 1):
        fake(tmp_path, arm, "imagenet", 10, arm, arm, "resnet18", "resnet18", 10.0 * n)
    report.main(["--output_root", str(tmp_path), "--dataset", "imagenet", "--ipc", "10"])
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if " ± 1.0 " in line]
    assert [(name.strip().split(",")[0], score.strip()) for name, score in rows] == [
        ("D4M", "30.0 ± 1.0"), ("random real images", "40.0 ± 1.0"), ("D4M", "20.0 ± 1.0"), ("foreign", "10.0 ± 1.0"),
    ]  # fmt: skip


@pytest.mark.skipif("D4M_TEST_DATA" not in os.environ, reason="D4M_TEST_DATA names a folder of real photographs")
def test_real_photographs_pass_through_all_stages(tmp_path, tiny_sd):
    """Random weights: the pictures are noise, but every stage reads and writes real ones."""
    root = Path(os.environ["D4M_TEST_DATA"]) / "imagenette64"
    data = ["--dataset", "imagefolder", "--data_dir", str(root), "--label_file_path", str(root / "prompts.txt"),
            "--classes", "0-2", "--max_images_per_class", "8"]  # fmt: skip
    images, results = run_all(tmp_path / "out", data, tiny_sd, 64, 1, ["d4m"])
    assert len(results) == 4
    assert all(result["arguments"]["test_images"] > 0 for result in results.values())
    manifest = json.loads((images[0] / "manifest.json").read_text())
    assert [c["prompt"] for c in manifest["classes"]] == ["tench", "English springer", "cassette player"]
