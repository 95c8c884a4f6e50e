"""Refusals, flags, processes, seeds, signals and memory limits, as every stage meets them."""

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

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


# ---- flags


def parse(*argv):
    parser = Parser("tests.parse", "A parser.", retired={"--gone": "use --size"})
    parser.setting("--size", default=lambda args: 8 * args.ipc, type=int, short="size", help="[8]")
    parser.setting("--ipc", type=number(int, 1), default=1, short="ipc")
    parser.setting("--rate", type=number(float, above=0, below=1), default=0.5, short="rate")
    parser.setting("--open", type=int)
    parser.flag("--where", default="here")
    return parser.parse_args(list(argv))


def test_settings_name_what_is_not_the_default():
    for argv, parts in {
        ("--ipc", "3"): ["ipc3"],  # and so --size is 24
        ("--size", "8"): [],
        ("--size", "9"): ["size9"],
        ("--rate", "0.12345"): ["rate0.12345"],
    }.items():
        assert parse(*argv).settings.parts() == parts
    home = [parse("--where=~/a-b"), parse("--where", "~/a-b")]  # as a shell leaves it in quotes
    assert {args.where for args in home} == {os.path.expanduser("~/a-b")}
    args = parse("--ipc", "2", "--where=a-b_c")
    assert args.settings == {"size": 16, "ipc": 2, "rate": 0.5, "open": None}
    assert args.settings.filled(open=5, ipc=7) == {**args.settings, "open": 5}
    assert args.settings.only(["rate", "ipc"]).parts() == ["ipc2"] and args.where == "a-b_c"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--ipc", "0"], "at least 1"),
        (["--ipc", "9" * 30], "expected at"),
        (["--ipc", "1.5"], "invalid int value"),
        (["--rate", "1"], "below 1"),
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "above 0"),
        (["--siz", "4"], "unrecognized"),
        (["--gone=4"], "use --size"),
        (["--where", "a\udcff"], "not UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_flags(argv, words, refused):
    refused(lambda _: parse(*argv), [], words)


# ---- processes


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(WORLD_SIZE=..., ...): the environment of a process that it starts."""

    def start(**names):
        for name, value in {**names, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize("stage", STAGES)
def test_a_world_size_without_a_rank(stage, refused, monkeypatch):
    main = importlib.import_module(stage).main
    for world, words in {"2": "RANK", "two": "expected a number"}.items():
        monkeypatch.setenv("WORLD_SIZE", world)
        refused(main, STAGES[stage], "WORLD_SIZE", words)


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "1/0", "0/", "٠/٢"])
def test_odd_shards(shard, refused):
    refused(lambda argv: runtime.this_process("cpu", shard), [], "--shard", "expected I/N")


def test_shards_and_processes_compose(torchrun):
    torchrun(WORLD_SIZE="2", RANK="1")
    assert runtime.this_process("cpu", "1/3")[:2] == (3, 6)


def test_odd_devices(refused, torchrun, monkeypatch):
    for name in ("meta", "mps", "gpu", "cuda:99", "cuda:x"):
        refused(lambda argv, name=name: runtime.this_process(name), [], f"--device {name}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun(WORLD_SIZE="4", RANK="3", LOCAL_RANK="3")
    words = "process 3 needs CUDA device 3, there are 2"
    refused(lambda argv: runtime.this_process("cuda"), [], words)


def test_no_two_uses_share_a_seed():
    uses = "SHUFFLE POSTERIOR SYNTHESIS START CHOICE ORDER BATCH JITTER WEIGHTS DROPOUT AUGMENT STM"
    streams = [getattr(runtime, name) for name in uses.split()]
    keys = list(itertools.product((0, 1), streams, (0, 1, 5), (0, 1, 5)))
    assert len({runtime.seed_of(*key) for key in keys}) == len(keys)


# ---- trouble


def test_running_out_of_gpu_memory_halves_the_part(capsys, refused):
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
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    refused(lambda _: runtime.in_parts(full, [1], limit), [], "one image at a time")


@pytest.mark.parametrize(
    "error, words",
    [
        (MemoryError("cannot allocate 9 GiB"), "out of memory: cannot allocate"),
        (RuntimeError("[enforce] DefaultCPUAllocator: not enough memory"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "--num_workers 0"),
        (OSError(5, "Input/output error", "a/file"), "a/file: Input/output error"),
        (OSError(32, "Broken pipe"), "its output: Broken pipe"),  # of a print to `head`
        (UnicodeEncodeError("utf-8", "name\udcff", 4, 5, "x"), "not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_check_can_foresee(error, words, refused):
    refused(Mock(side_effect=error, __name__="main"), [], words)


@pytest.mark.parametrize("error", [RuntimeError("shape"), KeyError("x"), BrokenPipeError()])
def test_our_own_mistakes_keep_their_traceback(error):
    with pytest.raises(type(error)):
        runtime.entry_point(Mock(side_effect=error, __name__="main"))([])


def test_ctrl_c(capsys):
    # a shell starts what runs in the background with this signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with exits(130):
        runtime.entry_point(lambda argv: os.kill(os.getpid(), signal.SIGINT))([])
    signal.signal(signal.SIGINT, before)
    assert "run the same command to go on" in capsys.readouterr().err


def test_bars_can_be_turned_off_and_a_terminal_may_not_know_a_letter():
    assert runtime.progress([1], quiet=True).disable
    code = "from scripts.runtime import *; list(progress([1])); warn('caf\\u00e9 \\u4e2d')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    env["PYTHONIOENCODING"] = "latin-1"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert run.returncode == 0 and run.stderr == b"warning: caf\xe9 \\u4e2d\n"


def python(code, **environment):
    """The finished Python process of some code that begins with `from scripts.runtime import *`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    code = f"from scripts.runtime import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)


def test_help_shows_defaults_as_they_are_typed(capsys):
    parser = Parser("tests.help", "A parser.")
    parser.setting("--warmup", type=float, default=0.0, help="epochs")
    parser.setting("--arms", nargs="+", default=["d4m", "text"], help="of 5 %% at most")
    parser.flag("--quiet", action="store_true", help="no bars")
    parser.flag("--more", help="[all]")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    words = capsys.readouterr().out
    assert "epochs (default: 0.0)" in words and "5 % at most (default: d4m text)" in words
    assert words.count("default") == 2


def test_help_without_docstrings():
    run = python("Parser('a.b', one_line.__doc__).parse_args(['--help'])", PYTHONOPTIMIZE="2")
    assert run.returncode == 0 and b"python -m a.b" in run.stdout, run.stderr


def test_results_are_printed_where_the_terminal_does_not_know_a_letter():
    for coding, said in {
        "latin-1": b"caf\xe9 \\u4e2d\n",
        "ascii:strict": b"caf\\xe9 \\u4e2d\n",
    }.items():
        run = python("entry_point(lambda argv: print('café 中'))([])", PYTHONIOENCODING=coding)
        assert (run.returncode, run.stdout) == (0, said), run.stderr


def test_messages_are_one_line_without_colours():
    text = "\x1b[1mbold\x1b[0m\n  second"
    assert runtime.one_line(text) == "bold second"
    assert runtime.reason_of(OSError(text)) == "bold" and runtime.reason_of(OSError()) == "OSError"
    assert len(runtime.reason_of(ValueError("long " * 200))) == 200


@pytest.mark.parametrize(
    "system, module", [("fcntl", "distillation.gen_prototype"), ("resource", "misc.report")]
)
def test_a_system_without_file_locks_is_told_where_it_works(system, module, tmp_path):
    (tmp_path / f"{system}.py").write_text(f"raise ImportError('No module named {system}')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", module, "--help"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "Linux, macOS or Windows' WSL" in run.stderr


# ---- progress and reading processes


BARS = """
runtime.LOG_EVERY = int(os.environ["EVERY"])
@entry_point
def main(argv):
    for _ in progress(range(3)):
        for _ in tqdm(range(40), mininterval=0, desc="lib", leave=False):
            tqdm.write("said")
main([])
"""


@pytest.mark.parametrize("every", ["0", "60"])
def test_a_log_has_a_line_of_progress_now_and_then(every):
    """Whatever bars draw, ours or a library's, one in the other: lines, no carriage returns."""
    run = python("from scripts import runtime" + BARS, EVERY=every, TQDM_DISABLE="")
    assert run.returncode == 0 and run.stdout.count(b"said") == 120
    assert b"\r" not in run.stderr and b"\x1b" not in run.stderr and b"\n\n" not in run.stderr
    assert (b"lib: " in run.stderr) if every == "0" else run.stderr == b""


def test_a_log_shows_the_end_of_a_bar_that_it_showed(tmp_path):
    with open(tmp_path / "log", "w+") as file:
        log = runtime._LogFile(file)
        log.said -= runtime.LOG_EVERY
        for text in ("\r1/3", "\r2/3", "\r3/3", "\n", "\r0/9", "\r9/9", "\n"):
            log.write(text)
        file.seek(0)
        assert file.read() == "1/3\n3/3\n"


SLOW = """
class Items:
    def __getitem__(self, key): time.sleep(0.1); return key
"""


def test_more_readers_than_cores_are_not_started_and_none_outlives_its_process():
    code = "import warnings; warnings.simplefilter('error')\n" + SLOW
    code += "read = read_ahead(Items(), list(range(50)), 999, prefetch_factor=2); print(next(read))"
    run = python(code)  # leaves with its readers at work
    assert (run.returncode, run.stdout, run.stderr) == (0, b"0\n", b"")
    code = SLOW + "print(*read_ahead(Items(), [3, 1], 0, prefetch_factor=2))"
    assert python(code).stdout == b"3 1\n"


STAGE = f"""
from scripts import output
from scripts.runtime import *
{SLOW}
@entry_point
def main(argv):
    process = this_process("cpu")
    with output.Output("--root", "root", "stem", "fake", {{}}, {{}}, process) as out:
        read = read_ahead(Items(), list(range(200)), 2)
        for n in out.steps(read):
            out.write(f"{{n}}.txt", "x")
main([])
"""


ALONE, SHARED = ["-c", STAGE], ["-m", "scripts.torchrun", "--nproc_per_node", "2", "stage.py"]
SIGNALS = [("SIGTERM", 75, ALONE), ("SIGHUP", 75, ALONE), ("SIGUSR1", 75, ALONE)]
SIGNALS += [("SIGUSR2", 75, ALONE), ("SIGXCPU", 75, SHARED)]
SIGNALS += [("SIGINT", 130, ALONE), ("SIGTERM", 75, SHARED)]


@pytest.mark.parametrize("number, status, command", SIGNALS)
def test_a_signal_to_the_whole_process_group(number, status, command, tmp_path):
    """As `kill -- -PGID`, `timeout`, Ctrl-C and Slurm send it: readers leave it to the stage."""
    (tmp_path / "stage.py").write_text(STAGE)
    how = {"stderr": subprocess.PIPE, "start_new_session": True, "text": True}

    def as_from_a_terminal():  # nohup, or a job in the background, would have it ignore these
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    how["preexec_fn"] = as_from_a_terminal
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    stage = subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=env, **how)
    while not (tmp_path / "root/stem/3.txt").exists():
        assert stage.poll() is None
        time.sleep(0.02)
    for _ in range(2):  # `timeout` sends its own twice
        os.killpg(stage.pid, getattr(signal, number))
        time.sleep(0.01 if status == 75 else 3)
        if status == 130:
            break
    said = stage.communicate(timeout=30)[1]
    assert stage.returncode == status and said.count("run the same command to go on") == 1
    assert "Traceback" not in said and "reading process" not in said
    assert status == 130 or f"{number}: stops after the unit at hand" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(stage.pid, 0)


def test_torchrun_leaves_as_the_processes_that_refuse(tmp_path):
    command = [sys.executable, *SHARED[:-1], "-m", "distillation.random_real", "--ipc", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "--ipc: 0: expected" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_names_too_long_for_the_system(model, refused, tmp_path):
    picture_folder(tmp_path, ["cat"])
    main = importlib.import_module("distillation.gen_prototype").main
    argv = ["--dataset", "imagefolder", "--data_dir", tmp_path, "--size", "32", *model]
    for flag in ("--save_prototype_path", "--latent_cache", "--label_file_path"):
        refused(main, [*argv, flag, "x" * 300], "x" * 20)
