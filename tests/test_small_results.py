"""The experiment on photographs: its launcher's chain closes, its page says what the cells say."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillation import gen_prototype, gen_syn_image, image_folder
from matching import labels
from misc import small_results
from scripts import files, output
from tests.conftest import ROOT
from tests.test_launchers import SHELL, commands, shell

LAUNCHER = "validate/cifar10_small.sh"
MODEL = str(ROOT / "misc" / "tiny-sd-digits")  # only its manifest is looked for
ARMS = 13


# ---- the launcher


def steps(**variables):
    """[(module, parsed arguments)] of all steps but the page."""
    found = [(m, words) for _, m, words in commands(LAUNCHER, MODEL=MODEL, **variables)]
    assert found.pop()[0] == "misc.small_results"
    return [(m.split(".")[1], importlib.import_module(m).get_args(words)) for m, words in found]


CHANGED = {"KM_EXPAND": "10", "TEACHER_EPOCHS": "200", "TEACHER_IMAGES": "0", "BATCH_SIZE": "1024"}


@pytest.mark.parametrize("scale, variables", [("gpu", {}), ("cpu", CHANGED)])
def test_each_step_takes_what_an_earlier_one_makes(scale, variables, tmp_path):
    made, images, trained, stage_1 = set(), [], [], {}
    for name, args in steps(SCALE=scale, OUT=str(tmp_path), **variables):
        s = args.settings
        if name == "train_teacher":
            stem = f"cifar10_{args.arch}"
            made.add(f"{args.output_dir}/{output.folder_name(stem, *s.parts())}")
        elif name == "gen_prototype":
            stem = f"cifar10-ipc{args.ipc}-kmexpand{args.km_expand}"
            stage_1[f"{args.save_prototype_path}/{output.folder_name(stem, *s.parts())}"] = args
        elif name == "random_real":
            images.append(f"{args.save_init_image_path}/cifar10_ipc{args.ipc}_random")
        elif name == "gen_syn_image":
            origin = stage_1[args.prototype_path]
            s = gen_syn_image.of_arm(s, args.arm[0])
            parts = gen_prototype.parts_of(origin.settings)
            folder = image_folder.folder_name(s, parts, origin.seed)
            images.append(f"{args.save_init_image_path}/{folder}")
        elif name == "generate_soft_label":
            assert args.data[0] in images and args.teacher_checkpoint[0] in made
            s = s.filled(input_size=32)
            stem = Path(args.data[0]).name
            made.add(f"{args.fkd_path}/{labels.labels_name(stem, args.arch, s)}")
        else:
            assert args.train_dir in images and 0 not in args.seeds  # the teacher's seed
            assert args.hard_label or args.online or args.fkd_path in made
            assert not args.online or args.teacher_checkpoint[0] in made
            trained.append((args.model, args.hard_label, args.online, args.epochs, args.batch_size))
    assert len(images) == len(set(images)) == ARMS * (1 if scale == "cpu" else 2)
    if scale == "cpu":
        one = [("convnet_w64", hard, False, 300, 1024) for hard in (False, True)]
        assert trained == one * ARMS
    else:
        assert len(trained) == ARMS * 2 * 3 * 2 * 3  # IPCs, students, recipes, 2 teachers and hard
        kinds = {(False, 300, 100), (True, 400, 50), (False, 400, 50)}
        assert {kind[2:] for kind in trained} == kinds


def test_only_the_arms_that_are_asked_for_until_the_time_is_over(tmp_path):
    some = steps(OUT=str(tmp_path), ARMS="random text", IPCS="1 2")
    made = [(n, a.ipc) for n, a in some if n in ("random_real", "gen_syn_image")]
    assert made == [(n, ipc) for ipc in (1, 2) for n in ("random_real", "gen_syn_image")]
    assert [name for name, _ in steps(OUT=str(tmp_path), MINUTES="0")] == ["train_teacher"]


def side_by_side(tmp_path, text):
    """The environment in which the launcher's Python is this script, and two of it run at once."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$*" >> "{tmp_path}/calls"\ncase "$*" in\n{text}\nesac\n')
    stub.chmod(0o755)
    return {"PYTHON": str(stub), "MODEL": MODEL, "OUT": str(tmp_path / "out"), "JOBS": "2"}


@pytest.mark.parametrize("failing", ["--hard_label", "--fkd_path"])
def test_a_step_that_stops_stops_the_launcher_with_its_status(tmp_path, failing):
    environment = side_by_side(tmp_path, f'*"{failing}"*) exit 75 ;;')
    assert shell(LAUNCHER, cwd=ROOT, **environment).returncode == 75
    assert "misc.small_results" not in (tmp_path / "calls").read_text()


def test_a_signal_to_the_launcher_reaches_the_stage_and_ends_both(tmp_path):
    """The stage gets it as SIGTERM, finishes its unit, and no later step starts."""
    text = f"""*--hard_label*)
    trap 'sleep 0.2; echo left >> "{tmp_path}/left"; exit 75' TERM
    echo > "{tmp_path}/ready"
    while :; do sleep 0.05; done ;;"""
    environment = {"PATH": os.environ["PATH"], **side_by_side(tmp_path, text)}
    launcher = subprocess.Popen([SHELL, LAUNCHER], cwd=ROOT, env=environment)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(timeout=20) == 75
    assert (tmp_path / "left").read_text() == "left\n"  # waited for
    calls = (tmp_path / "calls").read_text()
    assert "small_results" not in calls and "random_real" not in calls


@pytest.mark.parametrize(
    "name, value", [("ARMS", "radnom"), ("RECIPES", "rded"), ("SCALE", "tpu"), ("MODEL", "nowhere")]
)
def test_what_it_does_not_know_is_refused_before_anything_runs(tmp_path, name, value):
    variables = {"PYTHON": "false", "MODEL": MODEL, "OUT": str(tmp_path), name: value}
    ended = shell(LAUNCHER, cwd=ROOT, **variables)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and value in ended.stderr


# ---- the page


def cell(arm, mean, std=0.5, n=3, **other):
    top1 = {"mean": mean, "std": std, "n": n, "values": [mean] * n}
    found = {"arm": arm, "ipc": 10, "recipe": "d4m", "epochs": 300, "batch_size": 25}
    found |= {"student": "convnet_w64", "teacher": "convnet_w64", "labels": "soft"}
    found |= {"top1": top1, "images": arm, **other}
    return found | ({"teacher": None} if found["labels"] == "hard" else {})


def test_arms_are_told_apart_by_their_manifests():
    d4m, stage_1 = {"arm": "d4m", "strength": 0.7, "guidance_scale": 8.0}, {"kmeans": "minibatch"}
    title = small_results.arm_title
    assert title(d4m, stage_1) == "D4M"
    assert title({**d4m, "strength": 0.3}, stage_1) == "D4M, strength 0.3"
    assert title({**d4m, "guidance_scale": 2.0}, {"kmeans": "full"}).endswith("k-means, guidance 2")
    assert title({**d4m, "arm": "decoded"}, stage_1) == "Decoded prototypes"
    assert title({**d4m, "arm": "decoded"}, {"kmeans": "none"}) == small_results.VAE_ONLY
    assert title({"arm": "random"}, None) == "Random real"


def test_a_claim_is_seen_only_where_a_t_test_says_so():
    """Three students on each side: Welch's 5 % bound is 2.78 standard errors, not 2."""
    error = (2 * 0.5**2 / 3) ** 0.5  # of the difference of two means
    cases = {2.8: "seen: ", 2.7: "not seen: ", -2.7: "not seen: ", -2.8: "the opposite is seen: "}

    def verdict(*better, **options):
        return small_results.verdict(cell("D4M", *better, **options), cell("x", 50, **options))

    for gap, word in cases.items():
        assert verdict(50 + gap * error).startswith(word)
    assert verdict(90, std=None, n=1).startswith("not tested")
    assert verdict(51, std=0.0).startswith("seen")
    assert verdict(50, std=0.0).startswith("not seen")


def test_what_other_draws_of_images_did_not_show_is_withdrawn():
    def verdict(mean, **labels):
        better = cell("D4M", mean, **labels)
        return small_results.verdict(better, cell("w/o prototypes", 50, **labels))

    assert verdict(60).startswith("withdrawn: ") and "three draws of images" in verdict(60)
    assert verdict(60, labels="hard").startswith("seen: ")
    assert verdict(50).startswith("not seen: ") and verdict(40).startswith("the opposite is seen: ")


def test_claims_compare_cells_that_differ_in_nothing_else():
    other = {"student": "resnet18"}
    cells = [cell("D4M", 40), cell("D4M", 60, ipc=50), cell("D4M", 30, labels="hard")]
    cells += [cell("Text-to-image", 35), cell("Text-to-image", 99, ipc=50, recipe="rd3")]
    cells += [cell("Random real", 45, **other), cell("D4M", 42, **other)]
    cells += [cell("D4M", 20, labels="hard", **other), cell("D4M, guidance 2", 44)]
    cells += [cell("D4M, strength 0.3", 39.5), cell("D4M", 10, epochs=2)]
    cells += [cell("Text-to-image", 90, batch_size=50)]
    cells += [cell("D4M, guidance 2", 30, labels="hard")]
    found = small_results.claims(cells)

    def sentences(start):
        return next(s for claim, s in found.items() if claim.startswith(start))

    [text] = sentences("Prototypes help: D4M above text")
    assert text.startswith("seen: 40.0 ± 0.5 against 35.0 ± ")
    assert sentences("Prototypes help: D4M above the release") == ["not tested"]
    [random] = sentences("Distilled images")
    assert random.startswith("the opposite is seen: 42.0") and "resnet18" in random
    [across] = sentences("Soft labels transfer")
    assert "resnet18, teacher convnet_w64" in across and across.startswith("seen: 42.0")
    [growing] = sentences("Accuracy grows")
    assert growing.startswith("seen: 60.0 ± 0.5 against 40.0")
    guidance, hard = sentences("The paper's guidance of 8")
    assert hard.startswith("not seen: 30.0 ± 0.5 against guidance 2: 30.0") and "hard" in hard
    assert guidance.startswith("the opposite is seen: 40.0 ± 0.5 against guidance 2: 44.0")
    [strength] = sentences("The paper's strength")
    assert strength.startswith("not seen: 40.0 ± 0.5 against strength 0.3: 39.5")
    words = small_results.summary(sentences("Soft labels beat hard"))
    assert words == "seen in 2 of 2 pairs:<br>"


def test_the_committed_page_is_what_its_numbers_say(tmp_path, refused):
    page = ROOT / "misc" / "results" / "cifar10_small.json"
    parts = files.read_json(page)
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert text == small_results.markdown(parts)
    for part in parts.values():
        assert part["claims"] == small_results.claims(part["cells"])
        for found in part["cells"]:
            values = found["top1"]["values"]
            assert found["top1"]["mean"] == pytest.approx(sum(values) / len(values))
            assert found["top1"]["n"] == len(values)
    refused(small_results.main, ["--results", str(tmp_path)], "holds no cifar10_small.json")
    shutil.copy(page, tmp_path)
    small_results.main(["--results", str(tmp_path)])
    for name in (page.name, f"{page.stem}.md"):
        assert (tmp_path / name).read_bytes() == page.with_name(name).read_bytes()


@pytest.mark.slow
def test_the_whole_experiment_at_toy_scale(tmp_path, photographs):
    """Every kind of arm, two students per cell, with the digits' model; a second run makes
    nothing, and another model is refused."""
    variables = {"MODEL": MODEL, "OUT": str(tmp_path / "out"), "IPCS": "2", "EPOCHS": "2"}
    variables |= {"DATA_DIR": str(photographs / "cifar10"), "SEEDS": "0 1", "TEACHER_EPOCHS": "1"}
    variables |= {"ARMS": "d4m random vae decoded noise full s0.3 g2", "TEACHER_IMAGES": "20"}
    variables |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}

    def written():
        found = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and "page" not in p.parts]
        aside = (output.TIMING, output.LOG)
        return {p: p.stat().st_mtime_ns for p in found if p.name not in aside}

    assert shell(LAUNCHER, cwd=ROOT, **variables).returncode == 0
    part = files.read_json(tmp_path / "out" / "page" / "cifar10_small.json")["cpu"]
    assert len(part["cells"]) == 16 and {c["top1"]["n"] for c in part["cells"]} == {2}
    expected = {*small_results.ARMS, "D4M, strength 0.3", "D4M, guidance 2"} - {"Text-to-image"}
    assert {c["arm"] for c in part["cells"]} == expected
    before = written()
    assert shell(LAUNCHER, cwd=ROOT, **variables).returncode == 0
    assert before == written() and len(before) > 100
    other = shutil.copytree(MODEL, tmp_path / "other")
    vae = other / "vae" / "config.json"
    vae.write_text(vae.read_text().replace('"scaling_factor": 0.31803', '"scaling_factor": 0.4'))
    ended = shell(LAUNCHER, cwd=ROOT, **{**variables, "MODEL": str(other)})
    assert ended.returncode == 2 and "error: " in ended.stderr
