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
