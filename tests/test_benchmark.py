"""The benchmark runs whole on a CPU, its outputs agree, and its tables say what was measured."""

import pytest
import torch

from misc import benchmark
from scripts import files

QUICK = ["--device", "cpu", "--quick"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("benchmark"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("D4M_TEST_DATA", raising=False)
        path = benchmark.main([*QUICK, "--arch", "convnet-w128", "--out", out])
    return files.read_json(path), path


def test_every_stage_is_there_and_its_outputs_agree(result):
    found, path = result
    assert path.stem == "cpu-convnet_w128"
    assert list(dict.fromkeys(row["stage"] for row in found["rows"])) == [1, 2, 3, 4]
    for row in found["rows"]:
        assert row["release"] > 0 and row["ours"] > 0 and row["ratio"] > 0, row["what"]
        assert row["agree"], row["what"]
    crops, feeding = (row for row in found["rows"] if row["what"].startswith(("crops", "feeding")))
    assert crops["same"].startswith("0 of ") and feeding["same"] == "same bits"


def test_the_targets_of_a_cpu_are_asked_for(result):
    targets = {row["what"]: row["target"] for row in result[0]["rows"] if "target" in row}
    assert targets["feeding: crop, flip, mix, labels to a normalised batch, hash included"] == 2.5
    assert targets["labels read, batch 8"] == 2.5  # 1024 where it is not --quick
    assert targets["prototypes read, 10 per class: JSON, safetensors and its sha256"] == 100
    assert [t for what, t in targets.items() if what.startswith("start of an epoch")] == [50]
    assert [t for what, t in targets.items() if what.startswith("another IPC")] == [12] * 4


def test_a_student_of_ours_is_timed_in_smaller_passes_than_the_releases(result):
    rows = [row for row in result[0]["rows"] if row["what"].startswith("an epoch of")]
    assert [row["what"] for row in rows] == [
        "an epoch of convnet_w128, 32 px",
        "an epoch of convnet_w128, 32 px, bf16 + channels_last + fused",
        "an epoch of convnet_w128, 32 px, 4 images per pass",
    ]
    assert all("3 images per pass where no other" in row["note"] for row in rows)
    assert float(rows[2]["same"].split()[3]) < 1e-5  # the same images see each other


def test_its_tables_say_what_the_json_says(result):
    found, path = result
    text = path.with_suffix(".md").read_text()
    for row in found["rows"]:
        assert row["what"] in text and row["same"] in text
    assert found["command"] in text


def bench(tmp_path):
    size = {"turns": 2}
    return benchmark.Bench(torch.device("cpu"), size, [], tmp_path, "convnet_mini")


def test_a_row_knows_whether_its_target_is_met(tmp_path, monkeypatch):
    clock = iter([0, 4, 4, 5, 5, 5.5, 5.5, 9.5])  # release 4 s, ours 1 s; in the other order
    monkeypatch.setattr(benchmark, "spent", lambda _: (0, next(clock)))

    def row(agree=True, **facts):
        here = bench(tmp_path)
        ways = {"release": lambda: 0, "ours": lambda: 1}
        here.race(3, "x", "image", ways, (100, 100), lambda *_: ("same", agree), **facts)
        return here.rows[0]

    first = row(target=2.5)
    assert first["ratios"] == [4, 8] and first["ratio"] == 6 and first["ours"] == 150
    assert first["met"] and "2.5x: met" in benchmark.table([first])
    for odd in ({"least": 1000}, {"agree": False}):
        clock = iter([0, 4, 4, 5, 5, 5.5, 5.5, 9.5])
        assert not row(target=2.5, **odd)["met"]


def test_whatever_is_timed_on_a_cpu_has_one_torch_thread(tmp_path, monkeypatch):
    """On a machine with a GPU too, where the networks' side may have all."""
    now = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    seen = []
    ways = {name: lambda: seen.append(now[0]) for name in ("release", "ours")}
    bench(tmp_path).race(3, "x", "image", ways, (1, 1), lambda *_: ("same", True))
    assert seen == [1] * 4 and now == [3]


def test_outputs_that_differ_end_it_with_status_1(tmp_path, monkeypatch, capsys):
    original = benchmark.crops.crop_on_cpu  # white is one off
    changed = lambda *args: original(*args).clamp(max=254)  # noqa: E731
    monkeypatch.setattr(benchmark.crops, "crop_on_cpu", changed)
    monkeypatch.delenv("D4M_TEST_DATA", raising=False)
    with pytest.raises(SystemExit) as leaving:
        benchmark.main([*QUICK, "--stage", "3", "--out", str(tmp_path)])
    found = files.read_json(tmp_path / "cpu-stage3.json")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert leaving.value.code == 1 and not found["rows"][0]["agree"]
    assert len(errors) == len(found["differ"]) and "stage 3, crops replayed" in errors[0]
