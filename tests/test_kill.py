"""Stops at random instants of all four stages: nothing is lost, nothing is made twice."""

import signal

import pytest
import torch

from tests import kill


def survives(root, model, kills, stop=signal.SIGKILL, world=1, **options):
    """Runs the kill test, prints its report (pytest -s shows it); nothing may have gone wrong."""
    reports = kill.run(root, model, kills, stop, world, seed=kills, **options)
    kill.print_report(reports)
    assert [problem for r in reports.values() for problem in r["problems"]] == []
    assert sum(r["counted"] for r in reports.values()) == kills and len(reports) == 4
    return reports


def test_kills_over_the_four_stages(tiny_sd, tmp_path):
    survives(tmp_path, tiny_sd, 8, small=True)


@pytest.mark.slow
def test_200_kills_over_the_four_stages(tiny_sd, tmp_path):
    reports = survives(tmp_path, tiny_sd, 200)
    assert all(sum(n > 0 for n in kill.histogram(r["shares"])) >= 5 for r in reports.values())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signals(stop, world, tiny_sd, tmp_path):
    survives(tmp_path, tiny_sd, 24, stop, world, small=True)


@pytest.mark.slow
def test_kills_of_one_of_two_ranks(tiny_sd, tmp_path):
    survives(tmp_path, tiny_sd, 40, world=2, small=True)


def test_the_kill_test_itself_can_fail(tmp_path):
    folder = tmp_path / "out" / "name"
    folder.mkdir(parents=True)
    for name in ("a", "b", "args.json"):
        (folder / name).write_text(name)
    wanted = kill.tree(folder)
    (folder / ".c.tmp").write_text("hal")  # not under a final name
    torch.save({}, folder / "checkpoint_seed0.pt")
    assert kill.damaged(folder, wanted) == []
    (folder / "a").write_text("half")
    (folder / "checkpoint_seed0.pt").write_bytes(b"PK half a checkpoint")
    assert kill.damaged(folder, wanted) == ["a", "checkpoint_seed0.pt"]

    stage = kill.Stage("1", None, [], tmp_path / "out", [["a"], ["b"], ["c"]])
    before = stage.done()
    (folder / "c").write_text("the third, as it should")
    assert stage.made_twice(before) == []
    (tmp_path / "new").write_text("b")
    (tmp_path / "new").rename(folder / "b")  # the same bytes again
    assert stage.made_twice(before) == [["b"]]
