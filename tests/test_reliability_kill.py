"""SIGKILL, SIGTERM and SIGUSR1 at random instants of all four stages: nothing is lost, nothing is made twice."""

import signal

import pytest

from misc import kill_test


def survives(root, model, kills, number=signal.SIGKILL, world=1, **options):
    """Runs the kill test, prints its report (pytest -s shows it), and asserts that nothing went wrong."""
    reports = kill_test.run(root, model, kills, number, world, seed=kills, **options)
    kill_test.print_report(reports, number, world, 0)
    assert [problem for r in reports.values() for problem in r["problems"]] == []
    assert sum(r["counted"] for r in reports.values()) == kills and len(reports) == 4
    assert not any(r["unreadable"] or r["different"] or r["too_much"] for r in reports.values())
    return reports


def test_kills_over_the_four_stages(tiny_sd, tmp_path):
    survives(tmp_path, tiny_sd, 8, size="small")


@pytest.mark.slow
def test_200_kills_over_the_four_stages(tiny_sd, tmp_path):
    reports = survives(tmp_path, tiny_sd, 200)
    assert all(sum(n > 0 for n in kill_test.histogram(r["shares"])) >= 5 for r in reports.values())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_50_stop_signals(number, world, tiny_sd, tmp_path):
    """25 of each kind for one process, and as many for two."""
    survives(tmp_path, tiny_sd, 25, number, world, size="small")


@pytest.mark.slow
def test_40_kills_of_one_of_two_ranks(tiny_sd, tmp_path):
    survives(tmp_path, tiny_sd, 40, world=2, size="small")


def test_the_harness_notices_a_stage_that_writes_over_its_files(tmp_path, monkeypatch):
    """A file written in place is found half-written: the test can fail."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.json").write_text("whole")
    wanted = kill_test.tree(tmp_path / "out")
    (tmp_path / "out/a.json").write_text("who")
    (tmp_path / "out/checkpoint_seed0.pt").write_bytes(b"PK half a checkpoint")
    assert len(kill_test.damaged(tmp_path / "out", wanted)) == 2


def test_the_harness_notices_work_that_is_done_twice(tmp_path):
    """A unit written again with the same bytes, and an epoch trained again, are more than was missing."""
    (tmp_path / "out").mkdir()
    for name in "ab":
        (tmp_path / "out" / name).write_text(name)
    stage = kill_test.Stage("1 prototypes", None, [], tmp_path / "out", [["a"], ["b"], ["c"]], "a")
    harness = kill_test.Harness(stage, 1, None)
    before = harness.finished_units()
    assert harness.progress() == 2 / 3 and harness.too_much(before, 0, True) is None
    (tmp_path / "new").write_text("b")
    (tmp_path / "new").rename(tmp_path / "out/b")
    assert "['b'] were there and were written again" in harness.too_much(before, 0, True)
    harness.stage = stage._replace(tally=tmp_path / "tally")
    (tmp_path / "tally").write_bytes(b"...")
    assert harness.too_much({}, 0, True) is None and "1 were missing" in harness.too_much({}, 2, True)
