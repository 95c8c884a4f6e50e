"""What every stage script shares: refusals, flags, processes, seeds, stop signals, GPU memory.

Randomness is passed, never ambient: `generator(seed, SYNTHESIS, class, image)` is a fresh CPU
generator for one unit of work, so a result never depends on what ran before it, on the number of
processes, or on a restart.
"""

import argparse
import atexit
import contextlib
import errno
import functools
import hashlib
import io
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from tqdm import tqdm

EXIT_REFUSED = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: nothing is wrong, run the same command again
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C

# ---- refusals


class Refusal(SystemExit):
    """Bad input, in one line: `entry_point` prints it and leaves with status 2."""


def refuse(message) -> NoReturn:
    """How this project turns bad input down, in any thread."""
    raise Refusal(one_line(message))


def warn(message):
    """Print one line to stderr and go on."""
    _say(f"warning: {one_line(message)}")


def one_line(message):
    """A text without its line ends and the colour codes of a terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(message)).split())


def reason_of(error):
    """What a library's error says, for one line of ours: its own first, at most 200 characters."""
    text = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
    return text if len(text) <= 200 else f"{text[:196]} ..."


def _say(line):
    tqdm.write(line, file=sys.stderr)  # clear of progress bars
    sys.stderr.flush()


def entry_point(main):
    """Decorator of every script's `main`: bad input, and trouble that no check can foresee, is one
    line on stderr and status 2."""

    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):  # a terminal may not know a letter of a path
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        first = iter([True])  # of a hub that does not answer: one line, not two for each try
        logging.getLogger("huggingface_hub.utils._http").addFilter(lambda _: next(first, False))
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")  # of each file
        stderr = sys.stderr or io.StringIO()  # it was closed
        stderr = stderr if stderr.isatty() else _LogFile(stderr)
        try:
            with contextlib.redirect_stderr(stderr):
                return main(argv)
        except KeyboardInterrupt:
            _say("interrupted; run the same command to go on")
            raise SystemExit(EXIT_INTERRUPTED) from None
        except (Refusal, Exception) as error:
            line = _in_one_line(error)
            if line is None:
                raise
            _say(f"error: {line}")
            raise SystemExit(EXIT_REFUSED) from None

    return run


def _in_one_line(error):
    """What to say of trouble that is no mistake of ours; None for what keeps its traceback."""
    if isinstance(error, Refusal):
        return str(error)
    first = reason_of(error)
    written = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO)
    if written or isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename or 'its output'}: {error.strerror}"  # it vanished, the disk fails
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 60) : error.end + 60]
        return f"{near!a}: this name is not UTF-8; rename it"
    if first.startswith("DataLoader worker"):
        return "a reading process died, probably out of memory; --num_workers 0 does without"
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return f"out of memory: {first}" if full or "DefaultCPUAllocator" in str(error) else None


# ---- flags


class Settings(dict):
    """{name: value} of the flags that decide a run's bytes, with their defaults and short names."""

    def __init__(self, values, defaults, shorts):
        super().__init__(values)
        self.defaults, self.shorts = dict(defaults), dict(shorts)

    def only(self, names):
        """The settings called `names`, in that order."""
        return Settings({name: self[name] for name in names}, self.defaults, self.shorts)

    def filled(self, **values):
        """A copy in which settings left open (None) take these values, as their new defaults."""
        changed = {name: value for name, value in values.items() if self[name] is None}
        return Settings({**self, **changed}, {**self.defaults, **values}, self.shorts)

    def parts(self):
        """One part of the folder's name per value that is not the default: ["steps25", ...].

        A text that is not a plain word enters as a hash: no path is made from a prompt.
        """
        parts = []
        for name, value in self.items():
            short = self.shorts.get(name)
            if short is None or value == self.defaults[name]:
                continue
            if isinstance(value, bool):
                parts.append(short if value else f"no-{short}")
            elif isinstance(value, (int, float)):
                parts.append(f"{short}{value:g}" if isinstance(value, float) else f"{short}{value}")
            else:
                text = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                if not re.fullmatch(r"[A-Za-z0-9+.-]{1,40}", text):
                    text = hashlib.sha256(text.encode()).hexdigest()[:8]
                parts.append(f"{short}-{text}")
        return parts


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        default = action.default
        silent = any(default is one for one in (None, False, argparse.SUPPRESS))
        if silent or action.const is not None or "[" in (action.help or "["):
            return action.help
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {words})"


class Parser(argparse.ArgumentParser):
    """The flags of a stage: `setting` declares one that decides bytes, `flag` one that does not.

        parser.setting("--size", type=number(int, 1), default=512, short="size", help="pixels")

    is all that a hyper-parameter needs: the flag, its entry in args.json and the manifest, its
    comparison when a folder is opened again, and its part of the folder's name (`short`; only where
    it is not the default). A default may be a function of the arguments, for what depends on the
    data set. `-` and `_` in flags are equal, as the release mixes them; values never are.
    `retired`: {flag: what to do instead}. --help begins with `doc`.
    """

    def __init__(self, prog, doc, retired=None):
        how = {"usage": f"python -m {prog} [flags]", "formatter_class": _Help}
        super().__init__(prog, description=(doc or "").strip(), allow_abbrev=False, **how)
        self.retired, self.shorts, self.computed, self._into = retired or {}, {}, {}, self

    def heading(self, title):
        """Flags declared from here on stand under this title in --help."""
        self._into = self.add_argument_group(title)

    def flag(self, *names, **options):
        """Declare a flag that changes no byte of the output."""
        return self._into.add_argument(*names, **options)

    def setting(self, *names, short=None, default=None, **options):
        """Declare a flag that decides bytes of the output."""
        plain = {} if callable(default) else {"default": default}
        action = self.flag(*names, **plain, **options)
        if callable(default):
            self.computed[action.dest] = default
        self.shorts[action.dest] = short

    def parse_known_args(self, args=None, namespace=None):
        words = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        for word in words:
            if re.search("[\ud800-\udfff]", word):
                known = sys.getfilesystemencoding()
                hint = "" if known == "utf-8" else f", or not {known}: try again with PYTHONUTF8=1"
                refuse(f"{word!a}: not UTF-8{hint}")  # no manifest could name it
            flag = word.split("=", 1)[0]
            if flag in self.retired:
                refuse(f"{flag}: {self.retired[flag]}")
        args, rest = super().parse_known_args(words, namespace)
        if getattr(args, "download", False) and args.dry_run:  # writes nothing
            args.download = False
        defaults = {name: self.get_default(name) for name in self.shorts}
        for name, default in self.computed.items():
            defaults[name] = default(args)
            if getattr(args, name) is None:
                setattr(args, name, defaults[name])
        values = {name: getattr(args, name) for name in self.shorts}
        args.settings = Settings(values, defaults, self.shorts)
        return args, rest

    def error(self, message):
        refuse(f"{self.prog}: {message}")


def _underscored(word):
    """`--a-b=c-d` -> `--a_b=c-d`, and the user's home for the ~/ that a shell leaves in it or in
    quotes; all else is left alone."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    value = os.path.expanduser(value) if value.startswith("~/") else value
    return flag[:2] + flag[2:].replace("-", "_") + equals + value


def number(kind, least=None, most=None, above=-math.inf, below=math.inf):
    """argparse type: an int or a finite float with least <= x <= most and above < x < below."""
    limit = 2**63 - 1 if kind is int else 3e38  # more fits no tensor, or is infinite in float32
    least, most = (-limit if least is None else least), (limit if most is None else most)
    low = f"at least {least}" if above == -math.inf else f"above {above}"
    high = f"at most {most}" if below == math.inf else f"below {below}"

    def parse(text):
        value = kind(text)
        if not (least <= value <= most and above < value < below):  # NaN is not
            raise argparse.ArgumentTypeError(f"{text[:40]}: expected {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value: ..."
    return parse


def add_process_flags(parser):
    """The flags that say where and how a stage runs."""
    parser.heading("where it runs (changes no result)")
    parser.flag("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    part = "make only part I of N, on a shared file system"
    parser.flag("--shard", default="0/1", metavar="I/N", help=part)
    readers = "image-reading processes; 0: none"
    parser.flag("--num_workers", type=number(int, 0), default=4, help=readers)
    dry = "check everything, say what would be made, and stop"
    parser.flag("--dry_run", action="store_true", help=dry)
    wait = "wait for a folder that another process is writing"
    parser.flag("--wait", action="store_true", help=wait)


# ---- processes


class Process(NamedTuple):
    """This process, `rank` of `world`, on `device`; with --dry_run and --wait."""

    rank: int
    world: int
    device: torch.device
    dry_run: bool = False
    wait: bool = False

    @property
    def is_main(self):
        return self.rank == 0


def this_process(device="auto", shard="0/1", dry_run=False, wait=False) -> Process:
    """Rank, world size and device, from torchrun's environment and `--shard i/n`.

    Shard i of n of a job of w processes holds ranks i*w .. i*w + w - 1 of n*w: shards and processes
    compose. Refuses a WORLD_SIZE without a rank, which would do all the work in every process.
    """
    _stop_at_once()
    place = []
    for name, default in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        text = os.environ.get(name, default)
        if not re.fullmatch("[0-9]{1,9}", text):
            refuse(f"{name}={text}: expected a number, as torchrun sets it")
        place.append(int(text))
    world, rank, local_rank = place
    if world > 1 and not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        refuse(f"WORLD_SIZE={world} without RANK and MASTER_ADDR: use torchrun, or unset it")
    if rank >= world:
        refuse(f"RANK={rank} is outside WORLD_SIZE={world}")
    found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", shard)
    if not found or int(found[1]) >= int(found[2]):
        refuse(f"--shard {shard}: expected I/N with 0 <= I < N, such as 0/2")
    index, count = int(found[1]), int(found[2])
    return Process(index * world + rank, count * world, _device(device, local_rank), dry_run, wait)


def _device(name, local_rank) -> torch.device:
    """`auto` -> cuda, else mps, else cpu; one CUDA device per local process."""
    if name == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, available in there.items() if available), "cpu")
    found = re.fullmatch(r"(cpu|mps|cuda)(?::([0-9]{1,3}))?", name)
    if not found:
        refuse(f"--device {name}: expected auto, cpu, mps, cuda or cuda:N")
    if found[1] == "mps" and not torch.backends.mps.is_available():
        refuse(f"--device {name}: this machine, or this PyTorch, has no MPS")
    if found[1] != "cuda":
        return torch.device(found[1])
    index, count = int(found[2] or local_rank), torch.cuda.device_count()
    if index >= count:
        needs = f"process {local_rank} needs CUDA device {index}, there are {count}"
        refuse(f"--device {name}: {needs}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


# ---- seeds

# A key is (seed, use, ...): no two uses share a generator.
SHUFFLE, POSTERIOR, SYNTHESIS, START, CHOICE, ORDER = range(1, 7)
BATCH, JITTER, WEIGHTS, DROPOUT, AUGMENT, STM, PATCHES = range(7, 14)


def seed_of(*key) -> int:
    """A 63-bit seed from integers such as (seed, SYNTHESIS, class, image): numpy's SeedSequence."""
    sequence = np.random.SeedSequence([int(k) for k in key])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def generator(*key) -> torch.Generator:
    """A CPU generator for one unit of work; equal keys give equal draws on every machine."""
    return torch.Generator().manual_seed(seed_of(*key))


# ---- stop signals

# torchrun's and Slurm's warnings, Grid Engine's, a limit of CPU time
STOP_SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: a closed terminal is no stop
    STOP_SIGNALS.append(signal.SIGHUP)


def tell(text):
    """Print a line from a signal's handler: the signal may have come in the middle of a print.

    What is written to a closed terminal, now or later, is lost.
    """
    for stream, line in {1: "", 2: f"\n{text}\n"}.items():
        try:
            os.write(stream, line.encode())
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def stop(name) -> NoReturn:
    """Leave with status 75 after the stop signal `name`; of several processes the first says so."""
    for again in STOP_SIGNALS:  # `timeout` and torchrun send theirs twice
        signal.signal(again, signal.SIG_IGN)
    if os.environ.get("RANK", "0") == "0":
        tell(f"{name}: stopped; run the same command to go on")
    raise SystemExit(EXIT_STOPPED)


def _stop_at_once():
    """Stop signals end this process at once; an Output lets it finish the unit at hand first."""
    owner = os.getpid()

    def leave(signum, _frame):
        if os.getpid() != owner:  # a process that inherited this handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        stop(signal.Signals(signum).name)

    if threading.current_thread() is threading.main_thread():
        for signum in STOP_SIGNALS:
            signal.signal(signum, leave)


def read_ahead(items, keys, num_workers, **options):
    """Iterator of items[key], made by at most `num_workers` reading processes, one per core.

    A stop signal to the whole process group is for this process to answer: its readers ignore it.
    options: of PyTorch's DataLoader
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(num_workers, cores, len(keys))
    own = torch.Generator()  # else it draws a seed from the global one
    options |= {"sampler": keys, "num_workers": workers, "generator": own}
    if not workers:
        options.pop("prefetch_factor", None)
        return iter(torch.utils.data.DataLoader(items, batch_size=None, **options))
    leaving = torch.multiprocessing.Event()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, signal.SIGINT])
    try:
        options["worker_init_fn"] = functools.partial(_reader, leaving, held)
        return iter(torch.utils.data.DataLoader(items, batch_size=None, **options))
    finally:
        atexit.register(leaving.set)  # runs before PyTorch ends its workers by SIGTERM
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _reader(leaving, held, _number):
    """In a reading process, before it reads: the signals, which were held back so far."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.is_set() else None)
    for signum in (*STOP_SIGNALS[1:], signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # errors of reading go to the main process, not to the screen
    signal.pthread_sigmask(signal.SIG_SETMASK, held)


# ---- progress

LOG_EVERY = 5  # seconds between two lines of progress where there is no terminal


class _LogFile:
    """stderr where it is no terminal: what bars draw over themselves, ours and those of libraries,
    becomes a line now and then, without carriage returns."""

    def __init__(self, file):
        self.file, self.said, self.drawn = file, time.monotonic(), False
        self.shown, self.last = False, ""  # of this bar

    def write(self, text):
        drawn = "\r" in text
        if drawn:
            self.last = one_line(text.rsplit("\r", 1)[-1]) or self.last
            if not self.last or time.monotonic() - self.said < LOG_EVERY:
                text = ""
            else:
                self.said, self.shown = time.monotonic(), True
                text, self.last = f"{self.last}\n", ""
        elif (self.drawn or "\x1b" in text) and not one_line(text):  # its end, or to another's line
            drawn, text = True, f"{self.last}\n" if self.shown and self.last else ""
            self.shown, self.last = False, ""
        self.drawn = drawn
        return self.file.write(text)

    def __getattr__(self, name):
        return getattr(self.file, name)


def progress(items=None, quiet=False, **options):
    """tqdm's bar, drawn by one process (`quiet` in the others) and by none under TQDM_DISABLE=1.

    Not `disable=quiet`: an explicit False would override that variable.
    """
    return tqdm(items, **options, **({"disable": True} if quiet else {}))


# ---- GPU memory


@contextlib.contextmanager
def memory_for(what, flag):
    """Running out of GPU memory inside is one line that names the flag to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        refuse(f"out of GPU memory {what}: {flag}")


class MemoryLimit:
    """How many items fit into GPU memory at once: `most`, halved each time that they do not."""

    def __init__(self, most):
        self.most = most


def in_parts(function, items, limit):
    """[function(part)] with at most `limit.most` items per part, fewer once memory runs out.

    Items, their seeds and their order stay; only the number that is computed at once changes.
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
                why = "out of GPU memory with one image at a time"
                refuse(f"{why}: use --dtype fp16, or a larger GPU")
        torch.cuda.empty_cache()  # here, where no traceback holds the failed batch any more
        limit.most = len(part) // 2
        warn(f"out of GPU memory with {len(part)} images at a time: from now on {limit.most}")
    return results
