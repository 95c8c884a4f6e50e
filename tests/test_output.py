"""The frame of every stage: names, settings, locks, signals, disk, manifest, --dry_run."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from scripts import files, output
from scripts.runtime import Parser, Process, add_process_flags, number, this_process
from tests.conftest import everything, exits, reseal, tree

UNITS = 5


def stage(argv, at_unit=None, extra=None):
    """A stage in its shortest form: UNITS files of text.

    at_unit(out, n)   called before unit n is written
    extra(parser)     declares more flags
    """
    parser = Parser("tests.stage", "A fake stage.")
    parser.setting("--word", default="a", short="word")
    parser.setting("--steps", type=number(int, 1), default=50, short="steps")
    parser.setting("--batch_size", type=number(int, 1), default=4)
    parser.flag("--root", default="root")
    parser.flag("--source", default="s")
    add_process_flags(parser)
    if extra:
        extra(parser)
    args = parser.parse_args(argv)
    process = this_process("cpu", args.shard, args.dry_run, args.wait)
    where = "--root", args.root, output.folder_name("stem", *args.settings.parts()), "fake"
    how = {"source": args.source}, process, ("batch_size",)
    with output.Output(*where, args.settings, *how) as out:
        todo = out.todo(range(UNITS), lambda n: [f"c{n}/unit{n}.txt"], bytes_each=1000)
        for n in out.steps(todo):
            if at_unit:
                at_unit(out, n)
            out.write(f"c{n}/unit{n}.txt", f"{args.word} {n} {out.settings['batch_size']}\n" * 100)
        out.finish({"count": UNITS}, {"list.txt": lambda: "all"}, "files")
    return out.folder


def stopped(unit, signum=signal.SIGTERM):
    """The folder of a stage that a signal stopped while it made `unit`."""
    with exits(75):
        stage([], at_unit=lambda out, n: os.kill(os.getpid(), signum) if n == unit else None)
    return Path("root/stem")


@pytest.fixture
def straight():
    """The files of a stage that nothing stopped."""
    return tree(stage(["--root", "straight"]))


@pytest.fixture
def unread(refused):
    """unread(folder, *words): its manifest is refused."""
    return lambda folder, *words: refused(
        lambda argv: output.read_manifest("--x", folder, "fake"), [], *words
    )


# ---- settings and names


def test_a_setting_is_one_line(refused):
    """Flag, folder's name, args.json, manifest and the comparison at a restart come from one
    declaration."""

    def colour(parser):
        parser.setting("--colour", default="red", short="col", help="of the result")

    assert stage([], extra=colour).name == "stem"
    folder = stage(["--colour", "blue"], extra=colour)
    assert folder.name == "stem_col-blue"
    assert files.read_json(folder / output.ARGS)["arguments"]["colour"] == "blue"
    assert output.read_manifest("--root", folder, "fake")["arguments"]["colour"] == "blue"
    folder.rename(folder.with_name("stem_col-green"))
    refused(lambda argv: stage(argv, extra=colour), ["--colour", "green"], '"blue"', '"green"')


def test_a_folders_name_holds_every_digit_and_no_path():
    assert stage(["--word", "b", "--steps", "1234567"]).name == "stem_word-b_steps1234567"
    name = stage(["--word", "../.."]).name
    assert name.startswith("stem_word-") and "/" not in name and "." not in name


def test_a_folder_of_another_run_is_refused(refused):
    folder = stopped(3)
    before = tree(folder)
    refused(stage, ["--source", "t"], "begun with source", '"s"', '"t"')
    assert tree(folder) == before


def test_args_json_is_of_the_first_of_two_processes(monkeypatch, refused):
    """Two that begin a folder at the same instant with other inputs: one is refused."""
    exists, first = Path.exists, iter([True])

    def late(path):
        if path.name == output.ARGS and next(first, False):
            path.write_text(json.dumps({"arguments": {}, "inputs": {"source": "first"}}))
            return False
        return exists(path)

    monkeypatch.setattr(Path, "exists", late)
    refused(stage, [], "begun with")
    assert files.read_json("root/stem/args.json")["inputs"] == {"source": "first"}


def test_a_folder_keeps_its_batch_size(capsys, straight):
    stopped(2)
    assert tree(stage(["--batch_size", "9"])) == straight
    assert "begun with 4, which is used" in capsys.readouterr().err


def test_somebody_elses_folder_is_refused(refused):
    os.makedirs("root/stem")
    files.write("root/stem/notes.txt", "mine")
    refused(stage, [], "holds notes.txt")
    assert everything("root/stem") == {"notes.txt"}


# ---- resume, signals, processes


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_after_the_unit_at_hand(signum, capfd, straight):
    names = everything(stopped(2, signum))
    said = capfd.readouterr().err
    assert said.count("run the same command to go on") == 1
    assert said.count(f"{signum.name}: stops after the unit at hand") == 1  # said at once
    assert names >= {"c0/unit0.txt", "c2/unit2.txt"}
    assert not names & {"c3", output.MANIFEST, ".lock-0-of-1"}
    open("root/stem/c1/unit1.txt", "w").close()  # as a power cut leaves one: made again
    assert tree(stage([])) == straight


def test_a_signal_while_the_manifest_is_written_or_while_loading(monkeypatch):
    def slow(path, digest=files.sha256):
        os.kill(os.getpid(), signal.SIGTERM)
        return digest(path)

    with monkeypatch.context() as patched, exits(75):
        patched.setattr(files, "sha256", slow)
        stage([])
    assert not output.is_complete("root/stem") and output.is_complete(stage([]))
    this_process("cpu")
    with exits(75):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


@pytest.mark.parametrize("world", [2, 7])
def test_shards_in_any_order_give_the_same_bytes(world, capsys, straight):
    for n in reversed(range(world)):
        assert not output.is_complete("root/stem")
        folder = stage(["--shard", f"{n}/{world}"])
    assert tree(folder) == straight
    assert "other processes have the rest" in capsys.readouterr().out
    timing = files.read_json(folder / output.TIMING)
    assert timing["processes"] == world and timing["units"] == UNITS
    assert timing["seconds"] <= timing["process_seconds"]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("world", [1, 3, 7])
def test_every_unit_is_one_processs(world, blocks):
    shares = []
    for rank in range(world):
        process = Process(rank, world, torch.device("cpu"))
        with output.Output("--root", "root", "stem", "fake", {}, {}, process) as out:
            shares.append(out.todo(range(UNITS), lambda n: [f"{n}.txt"], 1, blocks=blocks))
    assert sorted(sum(shares, [])) == list(range(UNITS))
    assert not blocks or sum(shares, []) == list(range(UNITS))  # neighbours stay together


def test_an_error_of_ours_ends_the_stage():
    with pytest.raises(KeyError):
        stage([], at_unit=lambda out, n: {}[n])
    with pytest.raises(ZeroDivisionError):  # beside what follows
        stage([], at_unit=lambda out, n: out.later(lambda: 1 / 0))


def test_a_finished_folder_is_not_signed_again(refused, straight):
    folder = stage([])
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.txt")}
    stage([])
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.txt")}
    for name in ("c1/unit1.txt", "list.txt", output.TIMING):
        (folder / name).unlink()
    assert tree(stage([])) == straight and (folder / output.TIMING).exists()
    text = (folder / "c1/unit1.txt").read_text()
    (folder / "c1/unit1.txt").write_text(text.replace("a", "b"))
    refused(stage, [], "c1/unit1.txt", "changed since it was made")


@pytest.fixture
def forked():
    """forked(function): a process that runs it and prints to the file `said`."""
    started = []

    def child(function):
        with open("said", "w", buffering=1) as said, contextlib.redirect_stdout(said):
            function()

    def start(function):
        process = multiprocessing.get_context("fork").Process(target=child, args=(function,))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def wait_for(path, text=""):
    for _ in range(600):
        if os.path.exists(path) and text in Path(path).read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_two_jobs_in_one_folder(refused, forked, monkeypatch):
    """The second says who holds the folder; with --wait it waits; a killed job holds nothing."""
    monkeypatch.setattr(output, "CLEARING", 0.2)

    def hold(out, n):
        Path("begun").touch()
        time.sleep(60 if n else 0)

    first = forked(lambda: stage([], at_unit=hold))
    wait_for("begun")
    for shard in ("0/1", "0/2"):
        words = "root/stem", f"process {first.pid} on", "is writing there"
        refused(stage, ["--shard", shard], *words)
    second = forked(lambda: stage(["--wait"]))
    wait_for("said", f"waiting for process {first.pid} on")
    first.kill()
    second.join(60)
    assert second.exitcode == 0 and output.is_complete("root/stem")


def test_a_reader_that_outlives_its_job_holds_nothing(forked):
    def fork(out, n):
        reader = os.fork() == 0
        Path("begun").touch()
        time.sleep(10 if reader else 60)
        os._exit(0)

    job = forked(lambda: stage([], at_unit=fork))
    wait_for("begun")
    job.kill()
    assert output.is_complete(stage([]))


def test_only_the_leftovers_of_dead_processes_are_swept(forked):
    folder = stopped(0)
    for name in ("c0/.unit0.txt.0-of-2.tmp", "c0/.unit0.txt.1-of-2.tmp", ".lock-1-of-2"):
        files.write(folder / name, "")
    files.write(folder / "c0/.unit1.txt.9-of-2.tmp", "at work")

    def work():  # of a rank that works elsewhere
        lock = open(folder / ".lock-9-of-2", "w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        Path("held").touch()
        time.sleep(60)

    forked(work)
    wait_for("held")
    stage(["--shard", "0/2"])
    left = {name for name in everything(folder) if name.endswith(".tmp")}
    assert left == {"c0/.unit1.txt.9-of-2.tmp"}


def test_a_file_system_without_locks(monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOSYS, "none")))
    assert output.is_complete(stage([]))
    assert "no file locks here" in capsys.readouterr().err


# ---- disk


@pytest.mark.parametrize("limit", [200, 350])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(limit, refused, straight):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        refused(stage, [], "cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = tree("root/stem")
    assert all(straight[name] == data for name, data in found.items() if "lock" not in name)
    assert not [name for name in found if name.endswith(".tmp")]
    assert tree(stage([])) == straight


def test_space_is_asked_for_first_and_only_for_the_rest(monkeypatch, refused):
    monkeypatch.setattr(files, "free_space", lambda folder: 4999)
    refused(stage, [], "--root", "needs about")
    assert not any(name.endswith(".txt") for name in everything("root"))
    os.makedirs("root/stem/c0")
    files.write("root/stem/c0/unit0.txt", "a 0 4\n" * 100)
    assert output.is_complete(stage([]))


# ---- manifest, log


def test_every_changed_byte_of_a_manifest_is_noticed(unread):
    folder = stage([])
    path = folder / output.MANIFEST
    text = path.read_text()
    for n in range(3, len(text) - 3, 97):
        path.write_text(text[:n] + ("1" if text[n] != "1" else "2") + text[n + 1 :])
        unread(folder, "manifest.json")


@pytest.mark.parametrize("name", ["../escaped", "/etc/passwd", "c0/../../x", ".hidden", "a\x00b"])
def test_a_manifest_names_nothing_outside_its_folder(name, unread):
    folder = stage([])
    entries = files.read_json(folder / output.MANIFEST)["files"]
    reseal(folder, files={**entries, name: {"size": 1, "sha256": "0"}})
    unread(folder, "plain relative path")


def test_a_folder_that_is_no_output(unread, refused):
    stopped(1)
    unread("nowhere", "--x", "no such folder (there is root)")
    unread("root/stem", "--x", "not finished: run it again")
    unread("root", "--x", "not made by the fake stage")
    folder = stage(["--word", "b"])
    unread("root/stem", "not finished: run it again", "(there is stem_word-b, finished)")
    unread("root/stem_word-c", "no such folder (there is stem_word-b, finished)")
    folder = stage([])
    refused(lambda argv: output.read_manifest("--x", folder, "images"), [], '"fake"', "images")


def test_a_cut_file_is_refused_whatever_its_date(unread):
    folder = stage([])
    path, before = folder / "c1/unit1.txt", (folder / "c1/unit1.txt").stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as half a copy with its times
    unread(folder, "has 599 bytes, expected 600")


def test_a_manifest_of_other_files_is_not_taken_for_this_runs(refused):
    folder = stage([])
    (folder / "c1/unit1.txt").rename(folder / "c1/unit9.txt")
    entries = files.read_json(folder / output.MANIFEST)["files"]
    entries["c1/unit9.txt"] = entries.pop("c1/unit1.txt")
    reseal(folder, files=entries)
    refused(stage, [], "manifest.json lists other files")


@pytest.mark.parametrize("damage", [b"{half a li", b"\xff\xfe", b'[1]\n{"event": "run"}\n'])
def test_a_damaged_log_stops_nothing(damage):
    with open(stopped(1) / output.LOG, "ab") as file:
        file.write(damage)
    timing = files.read_json(stage([]) / output.TIMING)
    assert timing["units"] == UNITS and timing["host_mib"] > 0


# ---- --dry_run


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(capsys, refused, monkeypatch):
    stage(["--dry_run"])
    line = capsys.readouterr().out
    assert "root/stem: 0 done, 5 files to do" in line and "MiB free" in line and not everything(".")
    stopped(1)
    before = everything(".")
    stage(["--dry_run"])
    assert "2 done, 3 files to do" in capsys.readouterr().out and everything(".") == before
    refused(stage, ["--dry_run", "--source", "t"], '"s"', '"t"')  # as the run would
    monkeypatch.setattr(files, "free_space", lambda folder: 1)
    refused(stage, ["--dry_run"], "needs about")
