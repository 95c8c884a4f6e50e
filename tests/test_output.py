"""The frame of every stage: names, settings, locks, signals, disk, manifest, --dry_run."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from scripts import files, output
from scripts.runtime import Parser, Process, add_process_flags, entry_point, number, this_process
from tests.conftest import ROOT, everything, exits, reseal, tree

UNITS = 5


def stage(argv, at_unit=None, extra=None):
    """A stage in its shortest form: UNITS files of text.

    at_unit(out, n)   called before unit n is written
    extra(parser)     declares more flags
    """
    return entry_point(lambda argv: _stage(argv, at_unit, extra))(argv)


def _stage(argv, at_unit, extra):
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
    name = output.folder_name("stem", *args.settings.parts())
    inputs = {"source": args.source}
    with output.Output(
        "--root", args.root, name, "fake", args.settings, inputs, process, resumable=("batch_size",)
    ) as out:
        todo = out.todo(range(UNITS), lambda n: [f"c{n}/unit{n}.txt"], bytes_each=1000)
        for n in out.steps(todo):
            if at_unit:
                at_unit(out, n)
            out.write(f"c{n}/unit{n}.txt", f"{args.word} {n} {out.settings['batch_size']}\n" * 100)
        out.finish({"count": UNITS}, {"list.txt": lambda: "all"}, "files")
    return out.folder


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


@pytest.mark.parametrize(
    "flags, name",
    {
        "stem": [],
        "stem_steps25": ["--steps", "25"],
        "stem_word-b_steps1234567": ["--word", "b", "--steps", "1234567"],
        "stem_word-2a97516c": ["--word", "../.."],
    }.items(),
    ids=str,
)
def test_folder_name(flags, name):
    flags, name = name, flags
    if "2a97516c" in name:
        found = stage(flags).name
        assert found.startswith("stem_word-") and "/" not in found and "." not in found
    else:
        assert stage(flags).name == name


@pytest.mark.parametrize("flags, words", [(["--word", "b"], "word"), (["--source", "t"], "source")])
def test_a_folder_of_another_run_is_refused(flags, words, refused):
    folder = stage([])
    (folder / output.MANIFEST).unlink()
    before = tree(folder)
    argv = ["--root", "root", *flags]
    if words == "word":  # the name would differ: the same name by hand
        folder.rename(folder.with_name("stem_word-b"))
        folder = folder.with_name("stem_word-b")
    refused(stage, argv, "begun with", words)
    assert tree(folder) == before


def test_a_folder_keeps_its_batch_size(capsys):
    straight = tree(stage(["--root", "straight"]))
    with exits(75):
        stage([], at_unit=stop_at(2))
    folder = stage(["--batch_size", "9"])
    assert tree(folder) == straight
    assert "begun with 4, which is used" in capsys.readouterr().err


def test_somebody_elses_folder_is_refused(refused):
    os.makedirs("root/stem")
    files.write("root/stem/notes.txt", "mine")
    refused(stage, [], "holds notes.txt")
    assert everything("root/stem") == {"notes.txt"}


# ---- resume, signals, processes


def stop_at(unit, signum=signal.SIGTERM):
    return lambda out, n: os.kill(os.getpid(), signum) if n == unit else None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_after_the_unit_at_hand(signum, capsys):
    straight = tree(stage(["--root", "straight"]))
    with exits(75):
        stage([], at_unit=stop_at(2, signum))
    said = capsys.readouterr().err
    assert said.count("run the same command to go on") == 1 and signum.name in said
    assert everything("root/stem") >= {"c0/unit0.txt", "c2/unit2.txt"}
    assert not everything("root/stem") & {"c3", output.MANIFEST, ".lock-0-of-1"}
    assert tree(stage([])) == straight


def test_an_empty_unit_is_made_again():
    straight = tree(stage(["--root", "straight"]))
    with exits(75):
        stage([], at_unit=stop_at(2))
    open("root/stem/c1/unit1.txt", "w").close()
    assert tree(stage([])) == straight


def test_a_signal_while_the_manifest_is_written(monkeypatch):
    def slow(path, digest=files.sha256):
        os.kill(os.getpid(), signal.SIGTERM)
        return digest(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "sha256", slow)
        with exits(75):
            stage([])
    assert not output.is_complete("root/stem") and output.is_complete(stage([]))


def test_a_signal_while_loading():
    this_process("cpu")
    with exits(75):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


@pytest.mark.parametrize("world", [2, 5, 7])
def test_shards_in_any_order_give_the_same_bytes(world, capsys):
    straight = tree(stage(["--root", "straight"]))
    for n in reversed(range(world)):
        assert not output.is_complete("root/stem")
        folder = stage(["--shard", f"{n}/{world}"])
    assert tree(folder) == straight
    assert "other processes have the rest" in capsys.readouterr().out


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_every_unit_is_one_processs(world, runs):
    shares = []
    for rank in range(world):
        process = Process(rank, world, torch.device("cpu"))
        with output.Output("--root", "root", "stem", "fake", {}, {}, process) as out:
            shares.append(out.todo(range(UNITS), lambda n: [f"{n}.txt"], 1, runs=runs))
    assert sorted(sum(shares, [])) == list(range(UNITS))
    assert not runs or sum(shares, []) == list(range(UNITS))  # neighbours stay together


def test_an_error_of_ours_ends_the_stage():
    with pytest.raises(KeyError):
        stage([], at_unit=lambda out, n: {}[n])
    with pytest.raises(ZeroDivisionError):  # beside what follows
        stage([], at_unit=lambda out, n: out.later(lambda: 1 / 0))


def test_a_finished_folder_is_not_signed_again(refused):
    folder = stage([])
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.txt")}
    stage([])
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.txt")}
    (folder / "c1/unit1.txt").unlink()
    (folder / "list.txt").unlink()
    (folder / output.TIMING).unlink()
    straight = tree(stage(["--root", "straight"]))
    assert tree(stage([])) == straight and (folder / output.TIMING).exists()
    text = (folder / "c1/unit1.txt").read_text()
    (folder / "c1/unit1.txt").write_text(text.replace("a", "b"))
    refused(stage, [], "c1/unit1.txt", "changed since it was made")


def in_background(code):
    """A Python process that runs `code` here."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", f"from tests.test_output import *; {code}"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


def wait_for(path):
    for _ in range(600):
        if os.path.exists(path):
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_two_jobs_in_one_folder(refused):
    """The second says who holds the folder; with --wait it waits; a killed job holds nothing."""
    hold = "stage([], at_unit=lambda out, n: (open('begun', 'w'), time.sleep(60 if n else 0)))"
    first = in_background(hold)
    wait_for("begun")
    line = refused(stage, [], "is writing there", f"process {first.pid} on")
    assert "root/stem" in line
    refused(stage, ["--shard", "0/2"], f"process {first.pid} on")
    second = in_background("stage(['--wait'])")
    assert f"waiting for process {first.pid} on" in second.stdout.readline()
    first.kill()
    assert second.wait(60) == 0 and output.is_complete("root/stem")


def test_a_reader_that_outlives_its_job_holds_nothing():
    code = "stage([], at_unit=lambda out, n: os.fork() or (open('begun', 'w'), time.sleep(20)))"
    job = in_background(code)
    wait_for("begun")
    job.kill()
    assert output.is_complete(stage([]))


def test_only_the_leftovers_of_dead_processes_are_swept():
    with exits(75):
        stage(["--shard", "0/2"], at_unit=stop_at(0))
    folder = "root/stem"
    for name in ("c0/.unit0.txt.0-of-2.tmp", "c0/.unit0.txt.1-of-2.tmp"):
        files.write(f"{folder}/{name}", "half")
    files.write(f"{folder}/.lock-1-of-2", "")
    files.write(f"{folder}/.lock-9-of-2", "")  # of a rank that works elsewhere
    files.write(f"{folder}/c0/.unit1.txt.9-of-2.tmp", "at work")
    take = f"f = open('{folder}/.lock-9-of-2', 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    other = in_background(f"{take}; open('held', 'w'); time.sleep(60)")
    wait_for("held")
    stage(["--shard", "0/2"])
    other.kill()
    left = {name for name in everything(folder) if name.endswith(".tmp")}
    assert left == {"c0/.unit1.txt.9-of-2.tmp"}


def test_a_file_system_without_locks(monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert output.is_complete(stage([]))
    assert "no file locks here" in capsys.readouterr().err


# ---- disk


@pytest.mark.parametrize("limit", [200, 350])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(limit, refused):
    straight = tree(stage(["--root", "straight"]))
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


def test_every_changed_byte_of_a_manifest_is_noticed(refused):
    folder = stage([])
    path = folder / output.MANIFEST
    text = path.read_text()
    for n in range(3, len(text) - 3, 37):
        path.write_text(text[:n] + ("1" if text[n] != "1" else "2") + text[n + 1 :])
        refused(lambda argv: output.read_manifest("--x", folder, "fake"), [], "manifest.json")


@pytest.mark.parametrize("name", ["../escaped", "/etc/passwd", "c0/../../x", ".hidden", "a\x00b"])
def test_a_manifest_names_nothing_outside_its_folder(name, refused):
    folder = stage([])
    entries = files.read_json(folder / output.MANIFEST)["files"]
    reseal(folder, files={**entries, name: {"size": 1, "sha256": "0"}})
    refused(lambda argv: output.read_manifest("--x", folder, "fake"), [], "plain relative path")


@pytest.mark.parametrize(
    "folder, words",
    {
        "nowhere": "no such folder (there is root)",
        "root/stem": "not finished: run it again",
        "root": "not made by the fake stage",
    }.items(),
)
def test_a_folder_that_is_no_output(folder, words, refused):
    with exits(75):
        stage([], at_unit=stop_at(1))
    refused(lambda argv: output.read_manifest("--x", folder, "fake"), [], "--x", words)


def test_a_cut_file_is_refused_whatever_its_date(refused):
    folder = stage([])
    path, before = folder / "c1/unit1.txt", (folder / "c1/unit1.txt").stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as half a copy with its times
    words = "has 599 bytes, expected 600"
    refused(lambda argv: output.read_manifest("--x", folder, "fake"), [], words)


def test_a_manifest_of_other_files_is_not_taken_for_this_runs(refused):
    folder = stage([])
    (folder / "c1/unit1.txt").rename(folder / "c1/unit9.txt")
    entries = files.read_json(folder / output.MANIFEST)["files"]
    entries["c1/unit9.txt"] = entries.pop("c1/unit1.txt")
    reseal(folder, files=entries)
    refused(stage, [], "manifest.json lists other files")


def test_another_stage_is_refused(refused):
    folder = stage([])
    refused(lambda argv: output.read_manifest("--x", folder, "images"), [], '"fake"', "images")


@pytest.mark.parametrize("damage", [b"{half a li", b"\xff\xfe", b'[1]\n{"event": "run"}\n'])
def test_a_damaged_log_stops_nothing(damage):
    with exits(75):
        stage([], at_unit=stop_at(1))
    with open("root/stem/log.jsonl", "ab") as file:
        file.write(damage + b"\n")
    timing = files.read_json(stage([]) / output.TIMING)
    assert timing["units"] >= UNITS - 2 and timing["host_mib"] > 0


def test_timing_is_summed_over_processes_and_restarts():
    stage(["--shard", "0/2"])
    timing = files.read_json(stage(["--shard", "1/2"]) / output.TIMING)
    assert timing["processes"] == 2 and timing["units"] == UNITS
    assert timing["seconds"] <= timing["process_seconds"]


# ---- --dry_run


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(capsys):
    stage(["--dry_run"])
    line = capsys.readouterr().out
    assert "root/stem: 0 done, 5 to do" in line and "MiB free" in line and not everything(".")
    with exits(75):
        stage([], at_unit=stop_at(1))
    before = everything(".")
    stage(["--dry_run"])
    assert "2 done, 3 to do" in capsys.readouterr().out and everything(".") == before


def test_a_dry_run_refuses_what_the_run_would(refused, monkeypatch):
    with exits(75):
        stage([], at_unit=stop_at(1))
    refused(stage, ["--dry_run", "--source", "t"], '"s"', '"t"')
    monkeypatch.setattr(files, "free_space", lambda folder: 1)
    refused(stage, ["--dry_run"], "needs about")


def test_args_json_is_of_the_first_of_two_processes(monkeypatch, refused):
    """Two that begin a folder at the same instant with other inputs: one is refused."""
    exists = type(ROOT).exists

    def late(path):
        if path.name == output.ARGS and not getattr(late, "done", False):
            late.done = True
            text = json.dumps({"arguments": {}, "inputs": {"source": "first"}})
            path.write_text(text)
            return False
        return exists(path)

    monkeypatch.setattr(type(ROOT), "exists", late)
    refused(stage, [], "begun with")
    assert files.read_json("root/stem/args.json")["inputs"] == {"source": "first"}
