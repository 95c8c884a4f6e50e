"""The experiment on photographs: its launcher's chain closes, its rows are run once and are safe,
and its page says what they say."""

import importlib
import shutil
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from distillation import gen_prototype, gen_syn_image, image_folder
from matching import candidates
from misc import small_results
from scripts import files, output
from tests.conftest import ROOT
from tests.test_launchers import commands, shell

LAUNCHER = "validate/cifar10_small.sh"
MODEL = str(ROOT / "misc" / "tiny-sd-digits")

# ---- the launcher


def parsed(module, words):
    return importlib.import_module(module).get_args(words)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_each_step_takes_what_an_earlier_one_makes(scale, tmp_path):
    """And all of a row is of its draw."""
    made, stage_1, count = set(), {}, 0
    variables = {"SCALE": scale, "OUT": str(tmp_path), "MODEL": MODEL, "DRAWS": "2 9"}
    *steps, (_, module, words) = commands(LAUNCHER, **variables)
    parsed(module, words)
    for program, module, words in steps:
        args = parsed(module, words)
        s, name = args.settings, module.split(".")[1]
        if name == "train_teacher":
            stem = f"cifar10_{args.arch}"
            made.add(f"{args.output_dir}/{output.folder_name(stem, *s.parts())}")
        elif name == "gen_prototype":
            stem = f"cifar10-ipc{args.ipc}-kmexpand{args.km_expand}"
            stage_1[f"{args.save_prototype_path}/{output.folder_name(stem, *s.parts())}"] = args
        elif name == "random_real":
            stem = f"cifar10_ipc{args.ipc}_random"
            folder = output.folder_name(stem, *s.parts())
            made.add(f"{args.save_init_image_path}/{folder}")
        elif name == "gen_syn_image":
            origin = stage_1[args.prototype_path]
            s = gen_syn_image.of_arm(s, args.arm[0])
            parts = gen_prototype.parts_of(origin.settings)
            folder = image_folder.folder_name(s, parts, origin.seed)
            assert origin.seed == args.seed and origin.ipc == args.num_prototypes
            made.add(f"{args.save_init_image_path}/{folder}")
        elif name == "candidates":
            assert args.image_path in made and args.teacher_checkpoint in made
            kept = candidates.kept_per_class("", Path(args.image_path).name, None)
            folder = candidates.folder_name(Path(args.image_path).name, kept, s)
            made.add(f"{args.save_init_image_path}/{folder}")
        elif name == "generate_soft_label":
            assert args.data[0] in made and args.label_top_k == 1
        else:
            row = dict(word.split("=") for word in program[:-1])
            assert args.train_dir in made and {*args.seeds, args.fkd_seed} == {int(row["draw"])}
            assert f"_ipc{row['ipc']}_" in args.train_dir and row["student"] == args.model
            assert f"_seed{row['draw']}" in args.train_dir
            assert (row["epochs"], row["batch_size"]) == (str(args.epochs), str(args.batch_size))
            assert args.hard_label == (row["labels"] == "hard") and args.eval_every == 0
            assert args.hard_label or args.fkd_path or args.teacher_checkpoint[0] in made
            assert (row["arm"] == "top_1") == bool(args.fkd_path)
            count += 1
    assert count > 50


def test_the_design_has_the_draws_that_the_claims_need(tmp_path):
    plan = tmp_path / "plan"
    plan.write_text(
        shell(LAUNCHER, cwd=ROOT, DRY_RUN="1", RECIPES="d4m").stdout.rsplit("python", 1)[0]
    )
    rows, steps = zip(*small_results.read_plan(plan))
    assert max(map(len, steps)) <= 5  # a row's own, none of images for rows that are not wanted
    main = [r for r in rows if r["student"] == "convnet_w64" and r["draw"] <= small_results.DRAWS]
    for ipc, least in ((1, 4), (10, 8), (50, 4)):
        for arm in ("d4m", "random", "text", "noise", "decoded"):
            for labels in ("soft", "hard"):
                found = [r for r in main if (r["arm"], r["ipc"], r["labels"]) == (arm, ipc, labels)]
                assert len({r["draw"] for r in found}) == len(found) >= least


def test_what_it_does_not_know_is_refused_before_anything_runs(tmp_path):
    how = {"PYTHON": "false", "MODEL": MODEL, "OUT": str(tmp_path)}
    for name, value in {"ARMS": "radnom", "SCALE": "tpu", "MODEL": "nowhere"}.items():
        ended = shell(LAUNCHER, cwd=ROOT, **{**how, name: value})
        lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert ended.returncode == 2 and len(lines) == 1
    assert not list(tmp_path.iterdir())


# ---- running


def row_of(arm, draw, top1=50.0, **other):
    row = {"arm": arm, "ipc": 10, "draw": draw, "student": "convnet_w64", "recipe": "d4m"}
    row |= {"epochs": 100, "batch_size": 25, "labels": "soft", "top1": top1, "commit": "abc"}
    return row | {"seeds": {"seeds": [draw], "fkd_seed": draw}, "teacher_sha256": [], **other}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """(calls, plan): a plan whose stages are noted, of which the student --stop is stopped."""
    calls = []

    def stage(argv):
        calls.append(argv)
        if argv == ["--stop"]:
            raise SystemExit(75)
        found = {"arguments": {"seeds": [4], "fkd_seed": 5}, "teacher": [{"sha256": "t"}]}
        found |= {"summary": {"last": {"top1": {"mean": 10.0 + len(argv)}}}}
        found |= {"images": {"name": "x"}}
        files.write(tmp_path / "results.json", files.json_text(found))
        return tmp_path

    made = {"files": {"seed4.json": {}, "student_seed4.safetensors": {"sha256": "w"}}}
    monkeypatch.setattr(output, "read_manifest", lambda *_: made)
    monkeypatch.setitem(sys.modules, "stub_stage", SimpleNamespace(main=stage))
    plan = tmp_path / "plan"
    lines = ["python -m stub_stage --prototypes", "python -m stub_stage --images 'a b'"]
    for labels, word in (("soft", "--soft"), ("hard", "--stop")):
        row = {**row_of("d4m", 1), "labels": labels}
        values = " ".join(f"{name}={row[name]}" for name in small_results.KEYS)
        lines.append(f"{values} python -m stub_stage {word}")
    lines += ["python -m stub_stage --prototypes", "python -m stub_stage --real"]
    values = values.replace("arm=d4m", "arm=random")
    plan.write_text("\n".join([*lines, f"{values} python -m stub_stage --hard"]))
    return calls, plan


def test_a_step_runs_once_and_a_row_is_safe_before_the_next(stub, tmp_path):
    calls, plan = stub
    plan = small_results.read_plan(plan)
    with pytest.raises(SystemExit, match="75"):
        small_results.run_plan(plan, tmp_path, [], 1)
    assert calls == [["--prototypes"], ["--images", "a b"], ["--soft"], ["--stop"]]
    [row] = small_results.logged_rows(tmp_path)
    assert row["top1"] == 11.0 and row["seeds"] == {"seeds": [4], "fkd_seed": 5}
    assert row["weights_sha256"] == "w" and row["commit"]
    assert small_results.key_of(row) == small_results.key_of(plan[0][0])
    calls.clear()  # the same command again, with what was stopped made elsewhere
    known = [small_results.key_of(row) for row, _ in plan[:2]]
    small_results.run_plan(plan, tmp_path, known, 1)
    assert calls == [["--prototypes"], ["--real"], ["--hard"]]
    calls.clear()
    small_results.run_plan(plan, tmp_path, [], 0)
    assert not calls


# ---- statistics


def test_intervals_are_by_students_t_and_pooled_below_the_full_number():
    one = [50.0, 51.0, 52.0, 53.0, 50.0, 51.0, 52.0, 53.0]  # variance 10 / 7
    [(mean, half)] = small_results.intervals([one])
    assert mean == 51.5 and half == pytest.approx(2.364624 * (10 / 7 / 8) ** 0.5, rel=1e-6)
    few = [[1.0, 3.0], [10.0, 14.0, 12.0], [5.0]]  # squares 2 and 8, 1 and 2 degrees of freedom
    found = small_results.intervals(few)
    assert [mean for mean, _ in found] == [2.0, 12.0, 5.0]
    deviation, t = (10 / 3) ** 0.5, 3.182446
    expected = [t * deviation / n**0.5 for n in (2, 3, 1)]
    assert [half for _, half in found] == pytest.approx(expected, rel=1e-6)
    assert small_results.intervals([[5.0]]) == [(5.0, None)]


def test_differences_of_few_draws_share_the_residual_of_arms_and_draws():
    arms = {"d4m": (50, 52, 57), "random": (40, 45, 44), "text": (47, 48, 52)}
    arms = {arm: dict(enumerate(map(float, top1))) for arm, top1 in arms.items()}
    found = small_results.against(arms | {"gmm": {0: 60.0}})
    assert [found[arm][0] for arm in ("random", "text", "gmm")] == [10.0, 4.0, -10.0]
    # residuals by hand: (-1, -3, 4), (-1, 6, -5) and (2, -3, 1) thirds, 4 degrees of freedom
    half = 2.776445 * (2 * (34 / 3) / 4 / 3) ** 0.5
    assert found["random"][1] == found["text"][1] == pytest.approx(half, rel=1e-5)
    assert found["gmm"][1] is None  # one draw
    del arms["text"]  # of two arms it is the paired t-test's
    gap = [10.0, 7.0, 13.0]
    [(_, own)] = small_results.intervals([gap])
    assert small_results.against(arms)["random"] == (10.0, pytest.approx(own))


def test_holm_multiplies_the_smallest_most_and_never_falls():
    assert small_results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert small_results.holm([0.5, 0.9]) == [1.0, 1.0]


NOISE = (0.3, -0.2, 0.1, -0.4, 0.2, -0.1, 0.4, -0.3)  # mean 0, standard deviation 0.2928


@pytest.mark.parametrize(
    "gap, scale, word",
    [(1, 1, "seen"), (-1, 1, "costs"), (0.1, 1, "not seen"), (1, 9, "open")],
)
def test_a_verdict_is_of_paired_draws(gap, scale, word):
    """What all arms of a draw share counts for nothing: here 10 points from draw to draw."""
    from scipy.stats import ttest_rel

    other = {draw: 40.0 + 10 * draw for draw in range(1, 9)}
    ours = {draw: v + gap + scale * n for (draw, v), n in zip(other.items(), NOISE)}
    [(found, details)] = small_results.verdicts([(ours, other)], [None], "costs")
    p = ttest_rel(list(ours.values()), list(other.values())).pvalue
    assert found == word and details.endswith(f"p = {p:.2g}")
    two = [(ours, other), (ours, {})]  # what is not there counts
    corrected = small_results.verdicts(two, [4, None], "")
    assert f"p = {min(1, 2 * p):.2g} (draws 4 to 8 alone" in corrected[0][1]
    assert corrected[1][0] == "not finished"
    few = {draw: top1 for draw, top1 in ours.items() if draw < 8}
    assert (
        small_results.verdicts([(few, other)], [None], "")[0][0] == "not finished"
    )  # no verdict before all are there


# ---- the page


def test_claims_are_of_the_main_draws_and_text_at_its_best_guidance():
    rows = [row_of("d4m", d, 50 + n) for d, n in zip(range(1, 9), NOISE)]
    for arm, top1 in (("random", 48), ("text", 49), ("text_g2", 52), ("mode", 51)):
        rows += [row_of(arm, d, top1) for d in range(1, 9)]
    rows += [row_of(arm, 9, top1) for arm, top1 in (("text", 40), ("text_g2", 60), ("random", 99))]
    rows += [row_of("random", d, 70, student="resnet18") for d in range(1, 9)]
    claims, gains = small_results.sentences(rows, "convnet_w64")
    assert "**seen**" in claims[0] and "50.0 against 48.0, +2.00 [" in claims[0]
    assert (
        "**the opposite is seen**" in claims[1]
        and "guidance, 2 (table 4): 50.0 against 52.0" in claims[1]
    )
    assert (
        claims[2].startswith("**not finished**")
        and claims[3].startswith("**not finished**")
        and len(claims) == 4
    )
    assert (
        len(gains) == 1
        and "**seen**: D4M, --guide mode, soft labels: 51.0 against 50.0" in gains[0]
    )


def test_rows_of_two_trainings_are_not_mixed(refused, tmp_path):
    for arm in ("d4m", "random"):
        rows = [row_of("d4m", 1), row_of(arm, 2, epochs=60)]
        refused(lambda _, r=rows: small_results.main_cells(r, "convnet_w64"), [], "several epochs")
    rows = [row_of("d4m", 1), row_of("d4m", 1, batch_size=50)]
    refused(lambda _: small_results.cells(rows), [], "another batch size")
    page = files.read_json(ROOT / "misc" / "results" / "cifar10_small.json")
    page["rows"].append(row_of("x", 7, teacher_sha256=["another"]))
    files.write(tmp_path / "cifar10_small.json", files.json_text(page))
    refused(small_results.main, ["--results", str(tmp_path)], "another teacher")


def test_the_committed_page_is_what_its_rows_say(tmp_path, refused):
    page = ROOT / "misc" / "results" / "cifar10_small.json"
    refused(small_results.main, ["--results", str(tmp_path)], "holds no cifar10_small.json")
    shutil.copy(page, tmp_path)
    small_results.main(["--results", str(tmp_path)])
    for name in (page.name, f"{page.stem}.md"):
        assert (tmp_path / name).read_bytes() == page.with_name(name).read_bytes()
    assert (tmp_path / f"{page.stem}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_experiment_at_toy_scale(tmp_path, photographs):
    """Every kind of arm with the digits' model; a second run makes nothing, and a row that is made
    again from nothing is the same row."""
    arms = ["combined", "d4m", "decoded", "keep_hard", "mode", "noise", "random", "weighted"]
    variables = {"MODEL": MODEL, "OUT": str(tmp_path / "out"), "ARMS": " ".join(arms)}
    variables |= {"IPCS": "10", "DRAWS": "1", "STUDENTS": "convnet_w64", "RECIPES": "d4m"}
    variables |= {"DATA_DIR": str(photographs / "cifar10"), "EPOCHS": "2"}
    variables |= {"TEACHER_EPOCHS": "1", "TEACHER_IMAGES": "20"}
    variables |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}

    def page(**others):
        ended = shell(LAUNCHER, cwd=ROOT, **{**variables, **others})
        assert ended.returncode == 0, ended.stderr
        where = Path({**variables, **others}["OUT"])
        return where, files.read_json(where / "page" / "cifar10_small.json")["rows"]

    out, rows = page()
    assert [(r["arm"], r["labels"]) for r in rows] == list(product(arms, ("hard", "soft")))
    before = {p: p.stat().st_mtime_ns for p in (out / "students").rglob("*")}
    assert page()[1] == rows and before == {p: p.stat().st_mtime_ns for p in before}
    _, again = page(OUT=str(tmp_path / "again"), ARMS="d4m", LABELS="soft")
    assert again == [row for row in rows if (row["arm"], row["labels"]) == ("d4m", "soft")]
