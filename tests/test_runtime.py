"""Refusals, flags, processes, seeds, signals and memory limits, as every stage meets them."""

import importlib
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch

from scripts import runtime
from scripts.runtime import Parser, number
from tests.conftest import ROOT, exits, picture_folder

STAGES = {
    "distillation.gen_prototype": ["--dataset", "digits"],
    "distillation.gen_syn_image": ["--dataset", "digits", "--prototype_path", "p"],
    "distillation.distill": ["--dataset", "digits"],
    "distillation.random_real": ["--dataset", "digits"],
    "matching.generate_soft_label": ["--data", "d"],
    "matching.train_teacher": ["--dataset", "digits"],
    "validate.train_FKD": ["--train_dir", "t", "--fkd_path", "f"],
}


def main_of(name):
    return importlib.import_module(name).main


# ---- flags


def parse(*argv, **options):
    parser = Parser("tests.parse", "A parser.", retired={"--gone": "use --size"})
    parser.setting("--size", default=lambda args: 8 * args.ipc, type=int, short="size", help="[8]")
    parser.setting("--ipc", type=number(int, 1), default=1, short="ipc")
    parser.setting("--rate", type=number(float, above=0, below=1), default=0.5, short="rate")
    parser.setting("--open", type=int)
    parser.flag("--where", default="here")
    return parser.parse_args(list(argv))


def test_a_default_may_depend_on_other_flags():
    assert parse("--ipc", "3").size == 24 and parse("--ipc", "3").settings.parts() == ["ipc3"]
    assert parse("--size", "8").settings.parts() == []
    assert parse("--size", "9").settings.parts() == ["size9"]
    assert parse("--rate", "0.12345").settings.parts() == ["rate0.12345"]


def test_settings_that_were_left_open_are_filled():
    settings = parse("--ipc", "2").settings
    assert settings.filled(open=5, ipc=7) == {"size": 16, "ipc": 2, "rate": 0.5, "open": 5}
    assert "where" not in settings and settings["open"] is None
    assert settings.only(["rate", "ipc"]).parts() == ["ipc2"]


def test_dashes_and_underscores_are_equal_in_flags_only():
    assert parse("--where=a-b_c").where == "a-b_c"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--ipc", "0"], "at least 1"),
        (["--ipc", "9" * 30], "expected at"),
        (["--ipc", "1.5"], "invalid int value"),
        (["--rate", "1"], "below 1"),
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "above 0"),
        (["--rate", "1e39"], "below 1"),
        (["--siz", "4"], "unrecognized"),
        (["--gone", "4"], "use --size"),
        (["--gone=4"], "use --size"),
        (["--where", "a\udcff"], "not UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags(argv, words, refused):
    refused(lambda _: parse(*argv), [], words)


# ---- processes


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world, words", [("2", "RANK"), ("two", "expected a number")])
def test_a_world_size_without_a_rank(stage, world, words, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    refused(main_of(stage), STAGES[stage], "WORLD_SIZE", words)


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/0", "0/", "٠/٢"])
def test_odd_shards(shard, refused):
    refused(lambda argv: runtime.this_process("cpu", shard), [], "--shard", "expected I/N")


def test_shards_and_processes_compose(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert runtime.this_process("cpu", "1/3")[:2] == (3, 6)


@pytest.mark.parametrize("device", ["meta", "mps", "gpu", "cuda:99", "cuda:x"])
def test_odd_devices(device, refused):
    refused(lambda argv: runtime.this_process(device), [], f"--device {device}")


def test_more_processes_than_gpus(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    words = "process 3 needs CUDA device 3, there are 2"
    refused(lambda argv: runtime.this_process("cuda"), [], words)


# ---- seeds


def test_no_two_uses_share_a_seed():
    streams = [value for name, value in vars(runtime).items() if name.isupper() and name in KEYS]
    keys = itertools.product((0, 1), streams, (0, 1, 5), (0, 1, 5))
    seeds = [runtime.seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) == 2 * len(KEYS) * 9


KEYS = ("SHUFFLE", "POSTERIOR", "SYNTHESIS", "START", "CHOICE", "ORDER", "BATCH", "JITTER")
KEYS += ("WEIGHTS", "DROPOUT", "AUGMENT", "STM")


# ---- trouble


def test_running_out_of_gpu_memory_halves_the_part(capsys):
    sizes = []

    def work(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum(part)

    limit = runtime.MemoryLimit(8)
    assert sum(runtime.in_parts(work, list(range(10)), limit)) == 45
    assert sizes == [8, 4, 2, 2, 2, 2, 2] and limit.most == 2
    assert "with 8 images at a time" in capsys.readouterr().err


def test_one_image_that_does_not_fit(refused):
    def work(part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    refused(
        lambda _: runtime.in_parts(work, [1], runtime.MemoryLimit(4)), [], "one image at a time"
    )


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError("cannot allocate 9 GiB"), "out of memory: cannot allocate"),
        (RuntimeError("[enforce] DefaultCPUAllocator: not enough memory"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "--num_workers 0"),
        (OSError(5, "Input/output error", "a/file"), "a/file: Input/output error"),
        (UnicodeEncodeError("utf-8", "name\udcff", 4, 5, "x"), "not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_check_can_foresee(error, words, refused):
    def fails(argv):
        raise error

    refused(runtime.entry_point(fails), [], words)


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyError("x"), BrokenPipeError()])
def test_our_own_mistakes_keep_their_traceback(error):
    def fails(argv):
        raise error

    with pytest.raises(type(error)):
        runtime.entry_point(fails)([])


def test_ctrl_c(capsys):
    def interrupted(argv):
        os.kill(os.getpid(), signal.SIGINT)

    # a shell starts what runs in the background with this signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with exits(130):
        runtime.entry_point(interrupted)([])
    signal.signal(signal.SIGINT, before)
    assert "run the same command to go on" in capsys.readouterr().err


def test_a_terminal_that_cannot_say_a_name():
    code = "from scripts.runtime import warn; warn('caf\\u00e9 \\u4e2d\\u6587')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert run.returncode == 0 and "caf\xe9 \\u4e2d".encode("latin-1") in run.stderr


def test_bars_can_be_turned_off():
    assert runtime.progress([1], quiet=True).disable
    code = "from scripts.runtime import progress; list(progress([1], desc='x'))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert run.returncode == 0 and not run.stderr


@pytest.mark.parametrize("flag", ["save_prototype_path", "latent_cache", "label_file_path"])
def test_names_too_long_for_the_system(flag, model, refused, tmp_path):
    picture_folder(tmp_path, ["cat"])
    argv = ["--dataset", "imagefolder", "--data_dir", tmp_path, "--size", "32", *model]
    refused(main_of("distillation.gen_prototype"), [*argv, f"--{flag}", "x" * 300], "x" * 20)
