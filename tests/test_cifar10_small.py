"""The experiment on photographs: its launcher's chain closes, and its page says what the cells say."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import test_launchers
from test_launchers import ROOT, SHELL, parsed

from misc import small_results
from misc.small_results import VAE_ONLY, arm_title, claims, markdown, pairs_of, rank, verdict
from scripts.files import VOLATILE, read_json

record = test_launchers.record
LAUNCHER = "validate/cifar10_small.sh"
MODEL = str(ROOT / "misc" / "tiny-sd-digits")  # any finished one: only its manifest is looked for here
DATA = Path(os.environ.get("D4M_TEST_DATA", "")) / "cifar10"


# ---- the launcher


@pytest.fixture
def calls(record):
    """calls(**variables) -> [(module, parsed arguments)] up to the page, as a stub saw them."""

    def run(**variables):
        found = record(LAUNCHER, cwd=ROOT, MODEL=MODEL, JOBS="1", **variables)
        return [(module.split(".")[1], parsed(module, arguments)) for _, _, module, arguments in found]

    return run


def folder_of(name, args, origin):
    from distillation.gen_syn_image import image_folder_name, synthesis_settings

    if name == "random_real":
        return f"cifar10_ipc{args.ipc}_random"
    return image_folder_name(synthesis_settings(args, args.arm[0], "fp32", {}), vars(origin))


CHANGED = {
    "KM_EXPAND": "10",
    "TEACHER_EPOCHS": "200",
    "TEACHER_BATCH": "128",
    "TEACHER_IMAGES": "0",
    "BATCH_SIZE": "1024",
}


@pytest.mark.parametrize("scale, variables", [("cpu", {}), ("gpu", {}), ("cpu", CHANGED)])
def test_each_step_takes_what_an_earlier_one_makes(calls, scale, variables, tmp_path):
    from distillation.prototypes import prototype_folder_name
    from matching.soft_labels import PROTOCOL, labels_name, protocol_of
    from matching.train_teacher import recipe_of, teacher_name

    steps, arms = calls(SCALE=scale, OUT=str(tmp_path), **variables), 13
    teachers = [f"{tmp_path}/teachers/{teacher_name(a, recipe_of(a))}" for name, a in steps if name == "train_teacher"]
    prototypes, labels, made, trained, origin = set(), set(), [], [], None
    for name, args in steps:
        if name == "gen_prototype":
            origin = args
            prototypes.add(f"{tmp_path}/prototypes/{prototype_folder_name(vars(args))}")
        elif name in ("gen_syn_image", "random_real"):
            if name == "gen_syn_image":
                assert args.prototype_path in prototypes
            made.append(f"{args.save_init_image_path}/{folder_of(name, args, origin)}")
        elif name == "generate_soft_label":
            assert args.data[0] in made and args.teacher_checkpoint[0] in teachers
            given = protocol_of({key: getattr(args, key) for key in PROTOCOL}, 32)
            labels.add(f"{args.fkd_path}/{labels_name(Path(args.data[0]).name, args.arch, given, 32)}")
        elif name == "train_FKD":
            assert args.train_dir in made and not {0} & set(args.seeds)
            assert args.hard_label or args.online or args.fkd_path in labels
            assert not args.online or args.teacher_checkpoint[0] in teachers
            trained.append((args.model, args.hard_label, args.online, args.epochs, args.batch_size))
    assert [name for name, _ in steps][-1] == "small_results"
    ipcs = 1 if scale == "cpu" else 2
    assert len(made) == len(set(made)) == arms * ipcs
    if scale == "cpu":
        batch = int(variables.get("BATCH_SIZE", 25))
        assert trained == [("convnet_w64", hard, False, 300, batch) for hard in (False, True)] * arms
    else:
        dirs = [args.train_dir for name, args in steps if name == "train_FKD"]
        assert list(dict.fromkeys(dirs[:39])) == made[:13]  # the first student sees every arm before the second does
        assert len(trained) == arms * 2 * 3 * 2 * 3  # IPCs, students, recipes, soft by either teacher and hard
        assert {t[2:] for t in trained} == {(False, 300, 100), (True, 400, 50), (False, 400, 50)}


def test_arms_come_in_their_order_and_stop_when_the_time_is_over(calls, tmp_path):
    some = calls(SCALE="cpu", OUT=str(tmp_path), ARMS="random text", IPCS="1 2")
    assert [(name, args.ipc) for name, args in some if name in ("random_real", "gen_syn_image")] == [
        ("random_real", 1), ("gen_syn_image", 1), ("random_real", 2), ("gen_syn_image", 2)
    ]  # fmt: skip
    none = calls(SCALE="cpu", OUT=str(tmp_path), MINUTES="0")
    assert [name for name, _ in none] == ["train_teacher", "small_results"]


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(
    "failing", ["matching.train_teacher", "distillation.gen_syn_image", "--hard_label", "--fkd_path"]
)
def test_a_step_that_stops_stops_the_launcher_with_its_status(tmp_path, failing, jobs):
    """A stage that was asked to leave (status 75) is no failure to be passed over."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\necho "$*" >> "{tmp_path}/calls"\ncase "$*" in *"{failing}"*) exit 75 ;; esac\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "MODEL": MODEL, "OUT": str(tmp_path / "out"), "JOBS": jobs}
    ended = subprocess.run([SHELL, LAUNCHER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 75
    assert "misc.small_results" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("jobs, child", [("1", "matching.train_teacher"), ("2", "--hard_label"), ("2", "--fkd_path")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_the_stage_and_ends_both(tmp_path, number, jobs, child):
    """The stage gets it as SIGTERM, finishes its unit, and no later step starts."""
    stub = tmp_path / "python"
    stub.write_text(
        f"""#!/bin/sh
echo "$*" >> "{tmp_path}/calls"
case "$*" in *"{child}"*)
    trap 'sleep 0.2; echo left >> "{tmp_path}/left"; exit 75' TERM
    echo > "{tmp_path}/ready"
    while :; do sleep 0.05; done ;;
esac
"""
    )
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "MODEL": MODEL, "OUT": str(tmp_path / "out"), "JOBS": jobs}
    launcher = subprocess.Popen(
        [SHELL, LAUNCHER], cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        # a test run in the background ignores Ctrl-C, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == 75
    assert (tmp_path / "left").read_text() == "left\n"  # waited for
    calls = (tmp_path / "calls").read_text()
    assert "small_results" not in calls and "random_real" not in calls


def test_an_arm_or_a_recipe_that_there_is_not_is_refused_before_anything_runs(tmp_path):
    for name, value, word in (("ARMS", "d4m radnom", "radnom"), ("RECIPES", "rded", "rded"), ("SCALE", "tpu", "tpu")):
        environment = {**os.environ, "PYTHON": "false", "MODEL": MODEL, "OUT": str(tmp_path), name: value}
        ended = subprocess.run([SHELL, LAUNCHER], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and word in ended.stderr


def test_a_launcher_without_its_model_says_how_to_make_it(tmp_path):
    environment = {**os.environ, "MODEL": str(tmp_path / "nowhere")}
    ended = subprocess.run([SHELL, LAUNCHER], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and "train_tiny_sd_cf10.sh" in ended.stderr


# ---- the page


def cell(arm, mean, std=0.5, n=3, **other):
    top1 = {"mean": mean, "std": std, "n": n, "values": [mean] * n}
    base = {
        "arm": arm, "ipc": 10, "recipe": "d4m", "epochs": 300, "batch_size": 25, "student": "convnet_w64",
        "teacher": "convnet_w64", "labels": "soft",
    }  # fmt: skip
    found = {**base, "top1": top1, "images": arm, **other}
    return found | ({"teacher": None} if found["labels"] == "hard" else {})


def test_arms_are_told_apart_by_their_manifests():
    d4m = {"arm": "d4m", "strength": 0.7, "guidance_scale": 8.0, "prototype_arguments": {"kmeans": "minibatch"}}
    assert arm_title(d4m) == "D4M"
    assert arm_title({**d4m, "strength": 0.3}) == "D4M, strength 0.3"
    assert arm_title({**d4m, "guidance_scale": 2.0}) == "D4M, guidance 2"
    assert arm_title({**d4m, "prototype_arguments": {"kmeans": "full"}}) == "D4M, full k-means"
    assert arm_title({**d4m, "arm": "decoded"}) == "Decoded prototypes"
    assert arm_title({**d4m, "arm": "decoded", "prototype_arguments": {"kmeans": "none"}}) == VAE_ONLY
    assert arm_title({"arm": "random"}) == "Random real"
    assert rank("D4M") < rank("Random real") < rank("D4M, full k-means") < rank("D4M, guidance 2")


def test_a_claim_is_seen_only_where_a_t_test_says_so():
    """Three students a side: Welch's 5 % bound is 2.78 standard errors, not 2."""
    error = (2 * 0.5**2 / 3) ** 0.5  # of the difference of two means
    for gap, word in ((2.8, "seen: "), (2.7, "not seen: "), (-2.7, "not seen: "), (-2.8, "the opposite is seen: ")):
        assert verdict(cell("D4M", 50 + gap * error), cell("Text-to-image", 50)).startswith(word)
    assert verdict(cell("D4M", 90, std=None, n=1), cell("Text-to-image", 10)).startswith("not tested")
    assert verdict(cell("D4M", 51, std=0.0), cell("Text-to-image", 50, std=0.0)).startswith("seen")
    assert verdict(cell("D4M", 50, std=0.0), cell("Text-to-image", 50, std=0.0)).startswith("not seen")


def test_claims_compare_cells_that_differ_in_nothing_else():
    cells = [
        cell("D4M", 40), cell("D4M", 60, ipc=50), cell("D4M", 30, labels="hard"), cell("Text-to-image", 35),
        cell("Text-to-image", 99, ipc=50, recipe="rd3"), cell("Random real", 45, student="resnet18"),
        cell("D4M", 42, student="resnet18"), cell("D4M", 20, student="resnet18", labels="hard"),
        cell("D4M, guidance 2", 44), cell("D4M, strength 0.3", 39.5),
        cell("D4M", 10, epochs=2), cell("Text-to-image", 90, batch_size=50),
    ]  # fmt: skip
    found = claims(cells)

    def sentences(start):
        return next(s for claim, s in found.items() if claim.startswith(start))

    assert len(list(pairs_of(cells, {"arm": "D4M"}, {"arm": "Text-to-image"}))) == 1
    assert [s[:32] for s in sentences("Prototypes help: D4M above text")] == ["seen: 40.0 ± 0.5 against 35.0 ± "]
    assert sentences("Prototypes help: D4M above the release") == ["not tested"]
    [random] = sentences("Distilled images")
    assert random.startswith("the opposite is seen: 42.0") and "resnet18" in random
    assert len(sentences("Soft labels beat hard")) == 2
    [across] = sentences("Soft labels transfer")
    assert "resnet18, teacher convnet_w64" in across and across.startswith("seen: 42.0")
    [growing] = sentences("Accuracy grows")
    assert growing.startswith("seen: 60.0 ± 0.5 against 40.0")
    [guidance] = sentences("The paper's guidance of 8")
    assert guidance.startswith("the opposite is seen: 40.0 ± 0.5 against guidance 2: 44.0")
    assert sentences("The paper's strength")[0].startswith("not seen: 40.0 ± 0.5 against strength 0.3: 39.5")
    assert sentences("2.7 s and 6.1 GB") == ["not tested"]
    assert small_results.summary(sentences("Soft labels beat hard")) == "seen in 2 of 2 pairs:<br>"
    assert small_results.summary(["not tested"]) == ""


def test_the_committed_page_is_what_its_numbers_say():
    """misc/results: every cell is in the table, and no sentence says other than the numbers do."""
    page = ROOT / "misc" / "results" / "cifar10_small.json"
    parts = read_json(page)
    assert page.with_suffix(".md").read_text(encoding="utf-8") == markdown(parts)
    for part in parts.values():
        assert part["claims"] == claims(part["cells"])
        for c in part["cells"]:
            values = c["top1"]["values"]
            assert c["top1"]["mean"] == pytest.approx(sum(values) / len(values)) and c["top1"]["n"] == len(values)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs D4M_TEST_DATA with cifar10")
def test_the_whole_experiment_at_toy_scale(tmp_path):
    """Every kind of arm, two students a cell, with the digits' model: the page has all; a second run makes nothing."""
    environment = {
        **os.environ, "MODEL": MODEL, "OUT": str(tmp_path / "out"), "DATA_DIR": str(DATA), "IPCS": "2", "EPOCHS": "2",
        "ARMS": "d4m random vae decoded noise full s0.3 g2", "SEEDS": "0 1", "TEACHER_EPOCHS": "1",
        "TEACHER_IMAGES": "20", "TQDM_DISABLE": "1",
    }  # fmt: skip
    subprocess.run([SHELL, LAUNCHER], cwd=ROOT, env=environment, check=True)
    part = read_json(tmp_path / "out" / "page" / "cifar10_small.json")["cpu"]
    assert len(part["cells"]) == 16 and {c["top1"]["n"] for c in part["cells"]} == {2}
    assert {c["arm"] for c in part["cells"]} == {
        *small_results.ARMS, "D4M, strength 0.3", "D4M, guidance 2"
    } - {"Text-to-image"}  # fmt: skip
    work = ("images", "labels", "latents", "prototypes", "students", "teachers")

    def written():
        files = [p for name in work for p in (tmp_path / "out" / name).rglob("*") if p.is_file()]
        return {p: p.stat().st_mtime_ns for p in files if p.name not in VOLATILE}

    before = written()
    subprocess.run([SHELL, LAUNCHER], cwd=ROOT, env=environment, check=True)
    assert before == written() and len(before) > 100
    other = {**environment, "MODEL": str(shutil.copytree(MODEL, tmp_path / "other"))}
    vae = tmp_path / "other" / "vae" / "config.json"
    vae.write_text(vae.read_text().replace('"scaling_factor": 0.31803', '"scaling_factor": 0.4'))
    ended = subprocess.run([SHELL, LAUNCHER], cwd=ROOT, env=other, capture_output=True, text=True)
    assert ended.returncode == 2 and "error: " in ended.stderr  # nothing of one model goes under another's name
