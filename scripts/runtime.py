"""What every stage script shares: refusals, flags, processes, seeds, stop signals, logs.

Randomness is passed, never ambient: `generator(seed, SYNTHESIS, class, image)` is a fresh CPU generator for one unit
of work, so a result never depends on what ran before it, on the number of processes, or on a restart.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from tqdm import tqdm

EXIT_REFUSED = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: nothing is wrong, run the same command again
EXIT_INTERRUPTED = 130  # what a shell says of Ctrl-C
LARGEST = 2**63 - 1  # of an integer in a flag: more fits no tensor
LARGEST_FLOAT = 3e38  # and of a float: more is infinite in float32


class Refusal(SystemExit):
    """What `refuse` raises in a background thread; `result_of` prints it in the main one."""


def refuse(message) -> NoReturn:
    """Print one line to stderr and leave with status 2: the one way in which this project turns bad input down."""
    line = " ".join(str(message).split())
    if threading.current_thread() is not threading.main_thread():
        raise Refusal(line)
    _say(f"error: {line}")
    raise SystemExit(EXIT_REFUSED)


def result_of(future):
    """The result of background work; if it was refused there, it is refused here, once however many threads failed."""
    try:
        return future.result()
    except Refusal as refusal:
        refuse(refusal.code)


def warn(message):
    """Print one line to stderr and go on."""
    _say(f"warning: {' '.join(str(message).split())}")


def _say(line):
    """One line on stderr, not behind a progress bar that stands there; a name that is not UTF-8 is escaped."""
    tqdm.write(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.stderr.flush()


def entry_point(main):
    """What every script's `main` wears, so that trouble which no check can foresee is one line and status 2, too.

    That is: the system refuses a file (it vanished, its name is too long, the disk fails), or a reading process died.
    Ctrl-C is one line and status 130.
    """

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except OSError as error:
            if error.filename is None:
                raise
            refuse(f"{error.filename}: {error.strerror}")
        except torch.OutOfMemoryError as error:
            refuse(f"out of GPU memory: {str(error).splitlines()[0]}")
        except RuntimeError as error:
            if str(error).startswith("DataLoader worker"):
                refuse("a reading process died, most likely for want of memory; --num_workers 0 reads in this one")
            if "DefaultCPUAllocator" not in str(error):
                raise
            refuse(f"out of memory: {str(error).splitlines()[0]}")
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 60) : error.end + 60]
            refuse(f"{near!a}: a name that is not UTF-8; rename it")
        except MemoryError as error:
            refuse(f"out of memory: {error}")
        except KeyboardInterrupt:
            _say("interrupted; run the same command to go on")
            raise SystemExit(EXIT_INTERRUPTED) from None

    return run


class _Help(argparse.HelpFormatter):
    """Adds the default to a flag's help where there is one and the text does not already say it."""

    def _get_help_string(self, action):
        says = action.help and ("default" in action.help or "[" in action.help)
        bare = action.default in (None, False, argparse.SUPPRESS) or not action.option_strings
        return action.help if says or bare else f"{action.help or ''} (default: %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for the stage scripts.

    `--km_expand` and `--km-expand` are the same flag, abbreviations are errors, every error is one line with status 2,
    and `retired` flags of the release ({"--flag": why}) are named instead of being "unrecognized".
    """

    def __init__(self, *args, retired=None, **kwargs):
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.retired = retired or {}

    def parse_known_args(self, args=None, namespace=None):
        args = [_underscored(a) for a in (sys.argv[1:] if args is None else args)]
        for arg in args:
            if not arg.isascii() and any(0xD800 <= ord(letter) <= 0xDFFF for letter in arg):
                refuse(f"{arg!a}: not UTF-8")  # no manifest could name it
            flag = arg.split("=", 1)[0]
            if flag in self.retired:
                refuse(f"{flag}: {self.retired[flag]}")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        refuse(f"{self.prog}: {message}")


def _underscored(arg):
    """`--a-b=c-d` -> `--a_b=c-d`; everything that is not a long flag is left alone."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def add_process_flags(parser):
    """The flags that say where a stage runs; none of them changes its result."""
    group = parser.add_argument_group("where it runs (changes no result)")
    group.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    group.add_argument("--shard", default="0/1", metavar="I/N", help="make only part I of N, on a shared file system")
    group.add_argument("--num_workers", type=natural, default=4, help="image-reading processes; 0 reads in this one")


def positive_int(text, most=LARGEST):
    """argparse type: an integer of at least 1."""
    value = natural(text, most)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def epoch_count(text):
    """argparse type: a number of epochs; a million have a file, or a row of results, each."""
    return positive_int(text, 10**6)


def natural(text, most=LARGEST):
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text[:40]} is more than {most}")
    return value


def finite(text):
    """argparse type: a float that is neither NaN nor infinite, in float32 either."""
    value = float(text)
    if not abs(value) < LARGEST_FLOAT:  # NaN is not below anything
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def positive(text):
    """argparse type: a float above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text):
    """argparse type: a float of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def at_least_one(text):
    """argparse type: a float of at least 1."""
    value = finite(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def unit_interval(text):
    """argparse type: a float in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def below_one(text):
    """argparse type: a float in [0, 1): a decay, a momentum."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


# ---- processes


class Process(NamedTuple):
    """This process among all that make one output: `rank` of `world`, working on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def this_process(device="auto", shard="0/1") -> Process:
    """Rank, world size and device, from torchrun's environment and `--shard i/n`.

    Shard i of n of a job of w processes holds ranks i*w .. i*w + w - 1 of n*w: shards and processes compose.
    Refuses a WORLD_SIZE that nobody gave this process a rank in, which would do all the work in every process.
    From here on a stop signal leaves with status 75, and `peak_memory` is that of this stage.
    """
    _leave_at_once()
    world, rank, local_rank = _environment("WORLD_SIZE", 1), _environment("RANK", 0), _environment("LOCAL_RANK", 0)
    if world > 1 and not ("RANK" in os.environ and "MASTER_ADDR" in os.environ):
        refuse(
            f"WORLD_SIZE={world}, but this process has no RANK and MASTER_ADDR: start it with torchrun, or unset it"
        )
    if not 0 <= rank < world:
        refuse(f"RANK={rank} is outside WORLD_SIZE={world}")
    index, count = parse_shard(shard)
    process = Process(index * world + rank, count * world, resolve_device(device, local_rank))
    forget_peak_memory(process.device)
    return process


def parse_shard(text):
    """ "0/2" -> (0, 2)"""
    index, _, count = str(text).partition("/")
    if not (re.fullmatch("[0-9]{1,9}", index) and re.fullmatch("[0-9]{1,9}", count) and int(index) < int(count)):
        refuse(f"--shard {text}: expected I/N with 0 <= I < N, such as 0/2")
    return int(index), int(count)


def _environment(name, default):
    """A count that torchrun left in the environment."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        refuse(f"{name}={text}: expected a number, as torchrun sets it")
    return int(text)


def resolve_device(name="auto", local_rank=0) -> torch.device:
    """`auto` -> cuda, else mps, else cpu; one CUDA device a local process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "mps", "cuda"):
        refuse(f"--device {name}: expected auto, cpu, mps, cuda or cuda:N")
    if device.type == "mps" and not torch.backends.mps.is_available():
        refuse(f"--device {name}: this machine, or this PyTorch, has no MPS")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            refuse(f"--device {name}: local process {local_rank} needs CUDA device {index}, this machine has {count}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def join_processes(process, tracker=None, folder=None):
    """accelerate's Accelerator for the stages whose ranks talk (training); None where there is nothing to join.

    Without CUDA the ranks need `cpu=True`: a bare one makes every rank believe that it is rank 0 of 1.
    """
    if process.world == 1 and tracker is None:
        return None
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(cpu=process.device.type == "cpu", log_with=tracker, project_dir=folder)
    except (ValueError, RuntimeError) as error:  # a port that is none, a host that does not answer
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        what = f"{process.world} processes cannot meet at {at}" if process.world > 1 else f"--tracker {tracker}"
        refuse(f"{what}: {str(error).splitlines()[0]}")
    if accelerator.num_processes != process.world:
        refuse(f"{process.world} processes were asked for, accelerate sees {accelerator.num_processes}; use torchrun")
    if tracker and not accelerator.log_with:
        refuse(f"--tracker {tracker}: this package is not installed")
    return accelerator


# ---- seeds

# What a key draws: its second number, so that no two uses share a generator. A key is (seed, stream, ...).
SHUFFLE, POSTERIOR, SYNTHESIS, START, CHOICE, ORDER, BATCH, JITTER, WEIGHTS, DROPOUT, AUGMENT, STM = range(1, 13)


def seed_of(*key) -> int:
    """A 63-bit seed from integers such as (seed, SYNTHESIS, class, image), by numpy's SeedSequence hash."""
    return int(np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key) -> torch.Generator:
    """A CPU generator for one unit of work; equal keys give equal draws on every machine."""
    return torch.Generator().manual_seed(seed_of(*key))


# ---- stop signals


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's and torchrun's warnings


def _leave_at_once():
    """While nothing is at hand - loading, or writing the manifest - a stop signal ends the process, with status 75."""
    owner = os.getpid()

    def leave(number, _frame):
        if os.getpid() != owner:  # a reading process that inherited this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        os.write(2, f"\n{signal.Signals(number).name}: left at once; run the same command to go on\n".encode())
        raise SystemExit(EXIT_STOPPED)

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, leave)


class StopSignals:
    """Turns SIGTERM and SIGUSR1 into a flag that the loops read between two units."""

    def __init__(self):
        self.name = None

    def __enter__(self):
        self._before = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        self.name = signal.Signals(number).name

    def leave_if_asked(self):
        """Between two units: leave with status 75 if a signal came."""
        if self.name:
            _say(f"{self.name}: left after a finished unit; run the same command to go on")
            raise SystemExit(EXIT_STOPPED)


# ---- bars and logs


def progress(items=None, quiet=False, **options):
    """tqdm's bar, drawn by one process (`quiet` in the others) and by none under TQDM_DISABLE=1.

    Not `disable=quiet`: False, said aloud, beats that variable.
    """
    return tqdm(items, **options, **({"disable": True} if quiet else {}))


def append_log(folder, **row):
    """One line of `folder`/log.jsonl; the only file, with timing.json, that may differ between equal runs."""
    row = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **row}
    path = Path(folder) / "log.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    except OSError as error:  # no result hangs on it
        warn(f"{path}: cannot be written: {error.strerror}")


PROC = Path("/proc/self")  # Linux: the high-water mark of resident memory can be read there, and set back


def peak_memory(device=None):
    """Peak memory of this process, in MiB: resident (shared pages included), and allocated on the CUDA device.

    Since `this_process` was called or a run was logged; where the system cannot set its mark back, since the process
    began, and "since_start_of_process" says so. Reading processes count for themselves.
    """
    peak = {"host_mib": round(_resident_peak())}
    if device is not None and torch.device(device).type == "cuda":
        peak["cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    if _whole_process:
        peak["since_start_of_process"] = True
    return peak


def _resident_peak():
    """MiB"""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 2**10
    # in bytes on macOS; on Linux in KiB, and the mark of a larger parent outlives the start of a new program
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


_whole_process = False  # whether the mark could not be set back


def forget_peak_memory(device):
    """From here on, `peak_memory` is that of what follows (and of what is still held)."""
    global _whole_process
    try:
        (PROC / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size
    except OSError:
        _whole_process = True
    if device.type == "cuda":
        torch.cuda.init()  # or there is nothing that could be reset
        torch.cuda.reset_peak_memory_stats(device)


def log_run(folder, process, watch, units, stages=None):
    """The line of `folder`/log.jsonl from which timing.json is made; returns "12 s, peak memory 1.2 GiB", to print.

    watch    a Stopwatch; units: how many this process made
    stages   which ones, if more than the folder's own ran in this process: their peak is one
    """
    peak = peak_memory(process.device)
    of = {"peak_of": stages} if stages else {}
    append_log(folder, event="run", rank=process.rank, seconds=watch.seconds, units=units, **peak, **of)
    forget_peak_memory(process.device)
    words = [f"{watch.seconds:.0f} s, peak memory {peak['host_mib'] / 2**10:.2f} GiB"]
    if "cuda_mib" in peak:
        words.append(f"{peak['cuda_mib'] / 2**10:.2f} GiB on the GPU")
    note = stages or ("the whole process" if _whole_process else "")
    return ", ".join(words) + (f" ({note})" if note else "")


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self):
        self.start = time.perf_counter()

    @property
    def seconds(self):
        return time.perf_counter() - self.start


# ---- GPU memory


@contextlib.contextmanager
def memory_for(what, flag):
    """Running out of GPU memory inside is one line that names the flag to lower, where nothing can be halved."""
    try:
        yield
    except torch.OutOfMemoryError:
        refuse(f"out of GPU memory {what}: {flag}")


class MemoryLimit:
    """How many items fit into the GPU's memory at once: `most`, halved each time that they do not."""

    def __init__(self, most):
        self.most = most


def in_parts(function, items, limit):
    """`function` on at most `limit.most` items at a time, on fewer from the first time that memory runs out.

    Returns the list of the parts' results. The items, their seeds and their order stay; only the size of what is
    computed at once changes.
    """
    results, done = [], 0
    while done < len(items):
        part = items[done : done + limit.most]
        try:
            results.append(function(part))
            done += len(part)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                refuse("out of GPU memory with one image at a time: use --dtype fp16, or a larger GPU")
        torch.cuda.empty_cache()  # outside the except block: the traceback no longer holds the failed batch
        limit.most = len(part) // 2
        warn(f"out of GPU memory with {len(part)} images at a time: going on with {limit.most}, here and from now on")
    return results
