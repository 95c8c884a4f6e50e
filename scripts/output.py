"""The frame of every stage: its output folder, from the name to the manifest.

    with Output("--out", root, name, "prototypes", settings, inputs, process) as out:
        todo = out.todo(classes, lambda c: [class_file(c)], bytes_each)  # what is missing
        for c in out.steps(todo):  # leaves between two units after a signal
            out.write(class_file(c), data)
        out.finish(facts)

The folder holds `args.json` (settings and hashes of the inputs, written first and compared at every
start), the units, and `manifest.json` (the same, facts for the next stage, size and sha256 of every
file), written last. A process locks its (rank, world) of the folder and works on its own share of
the units, so any number of processes may work there.
"""

import contextlib
import datetime
import difflib
import fcntl
import hashlib
import json
import os
import resource
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from scripts import files
from scripts.runtime import STOP_SIGNALS, progress, refuse, stop, tell, warn

ARGS, MANIFEST, TIMING, LOG = "args.json", "manifest.json", "timing.json", "log.jsonl"
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "accelerate")
LIBRARIES += ("scikit-learn", "numpy", "pillow")
CLEARING = 2  # seconds that a process may hold another's lock, to clear up behind it


def folder_name(stem, *parts):
    """`stem`, then each of `parts` behind an underscore: how every output folder is named."""
    return "_".join([stem, *parts])


class Planned(Exception):
    """--dry_run has said what would be made: ends the body of `with Output(...)`, nothing else."""


class Output:
    """One output folder of a stage.

    flag       the flag that says where, for messages; the folder is `root`/`name`
    stage      what the manifest calls it: prototypes, images, soft_labels, student, teacher
    settings   {flag: value} of all flags that decide bytes; afterwards the values in use
    inputs     {what: hash or facts} of everything that the stage reads
    process    a Process; with dry_run nothing is made: `todo` prints the plan and leaves
    resumable  settings of which a folder that was begun keeps its own value, with a warning
    together   all processes work on the same units (training), and only rank 0 writes

    complete     whether the manifest was there at the start
    stop_signal  the name of a stop signal that came, or None
    """

    def __init__(
        self, flag, root, name, stage, settings, inputs, process, resumable=(), together=False
    ):
        if name and not files.safe_name(name, 255):  # a forged manifest may have a say in it
            refuse(f"{flag} {root}: the folder would be called {name!r}")
        self.flag, self.folder, self.stage, self.process = flag, Path(root) / name, stage, process
        self.settings = json.loads(json.dumps(settings))  # as args.json will give them back
        self.inputs = json.loads(json.dumps(inputs))
        self.resumable, self.together = resumable, together
        self.names, self.made, self.units, self.stop_signal = [], 0, 0, None
        self.tag = f"{process.rank}-of-{process.world}"
        self._pending, self._background = None, ThreadPoolExecutor(1)

    def __enter__(self):
        with (
            contextlib.ExitStack() as stack
        ):  # what is done here is undone if the folder is refused
            if not self.process.dry_run:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock(stack)
            self._begin()
            for signum in STOP_SIGNALS:
                stack.callback(self._restore, signum, signal.signal(signum, self._note_stop))
            stack.enter_context(self._background)
            self._undo = stack.pop_all()
        self.complete = is_complete(self.folder)
        self.start = time.perf_counter()
        if not self.process.dry_run:  # a report says what was run
            self.log(event="start", command=sys.orig_argv[1:])
        if self.process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.process.device)
        return self

    def __exit__(self, kind, *_):
        self._undo.close()
        return kind is Planned

    # ---- one process per (folder, rank, world)

    def _lock(self, stack):
        """Lock this (rank, world) of the folder and clear up behind killed processes.

        The system's locks die with their process, so none is ever stale. `lockf`, not `flock`: a
        reading process would inherit that one and keep it when its parent is killed.
        """
        mine = self.folder / f".lock-{self.tag}"
        file = stack.enter_context(self._take(mine))
        stack.callback(mine.unlink, missing_ok=True)  # before the file is closed
        with contextlib.suppress(OSError):  # a full disk: locked all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._sweep(self.tag)
        for other in set(self.folder.glob(".lock-*-of-*")) - {mine}:
            same_run = other.name.endswith(f"-of-{self.process.world}")
            file = self._take(other, required=not same_run)
            if file:  # nobody works there
                self._sweep(other.name.removeprefix(".lock-"))
                other.unlink(missing_ok=True)
                file.close()

    def _take(self, path, required=True):
        """`path`, open and locked; None if another process holds it and it is not `required`.

        With --wait waits for whoever holds it, else no longer than CLEARING.
        """
        since, told = time.monotonic(), False
        while True:
            file = open(path, "a+b", buffering=0)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                who = file.read().decode() or "another process"
            except OSError as error:  # a file system without locks
                warn(f"{path}: no file locks here ({error.strerror}); start no second job there")
                return file
            else:
                if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
                who = None  # its last holder removed it between our open and our lock
            file.close()
            if who and not required:
                return None
            if who and time.monotonic() - since > CLEARING:
                if not self.process.wait:
                    refuse(f"{self.flag} {self.folder}: {who} is writing there")
                if not told:
                    print(f"{self.folder}: waiting for {who}, which is writing there", flush=True)
                told = True
            time.sleep(0.05)

    def _sweep(self, tag):
        """Remove what a killed process of this (rank, world) left half-written."""
        for path in self.folder.rglob(f".*.{tag}.tmp"):
            with contextlib.suppress(IsADirectoryError):  # not ours
                path.unlink(missing_ok=True)

    # ---- settings and inputs

    def _begin(self):
        """args.json: written at the first start, compared at every other."""
        path, now = self.folder / ARGS, {"arguments": self.settings, "inputs": self.inputs}
        if not path.exists():
            names = sorted(path.name for path in self.folder.glob("[!.]*"))
            odd = [name for name in names if name not in (ARGS, TIMING, LOG)]
            if odd:
                where = f"{self.flag} {self.folder}"
                refuse(f"{where}: not made by this stage: it holds {odd[0]}, no {ARGS}")
            if self.process.dry_run:
                return
            files.write(path, files.json_text(now), self.tag, once=True)
        before = files.read_json(path)
        while difference := _difference(before, now):
            (kind, *names), old, new = difference
            name = ".".join(names) or kind
            if kind == "arguments" and name in self.resumable:
                warn(f"--{name} {new}: {self.folder} was begun with {old}, which is used")
                self.settings[name] = old
                continue
            values = f"{name} {_short(old)}, now {name} {_short(new)}"
            refuse(f"{self.flag} {self.folder}: begun with {values}; remove it or choose another")

    # ---- units

    def todo(self, units, files_of, bytes_each, blocks=False):
        """The units of this process that are not on disk yet; checks that all others fit there.

        units       all units of the folder, in order
        files_of    unit -> its files, relative paths; they are what messages count
        bytes_each  bytes of one unit's files
        blocks      a process takes one block of neighbours instead of every world-th unit
        With --dry_run: prints what would be made and leaves the `with` block.
        """
        units, rank, world = list(units), self.process.rank, self.process.world
        self.names += [name for unit in units for name in files_of(unit)]
        self.units = len(self.names)
        lacking = [not all(self._has(name) for name in files_of(unit)) for unit in units]
        needed = sum(lacking) * bytes_each
        files.require_space(self.flag, self.folder, needed)
        if self.process.dry_run:
            to_do = sum(len(files_of(unit)) for unit, lacks in zip(units, lacking) if lacks)
            plan(self.folder, self.units - to_do, to_do, needed)
            raise Planned
        mine = range(rank, len(units), world)
        if self.together:
            mine = range(len(units))
        elif blocks:
            mine = range(rank * len(units) // world, (rank + 1) * len(units) // world)
        return [units[n] for n in mine if lacking[n]]

    def _has(self, name):
        """Whether a unit's file is there; an empty one is what a power cut leaves without fsync."""
        path = self.folder / name
        return path.is_file() and path.stat().st_size > 0

    def steps(self, items):
        """`items` one by one; between two of them, leaves with status 75 if a stop signal came."""
        for item in items:
            yield item
            self.made += 1
            self.leave_if_asked()

    def _restore(self, signum, handler):
        if signal.getsignal(signum) == self._note_stop:  # `stop` ignores what comes after the first
            signal.signal(signum, handler)

    def _note_stop(self, signum, _frame):
        name = signal.Signals(signum).name
        if self.process.is_main and not self.stop_signal:
            tell(f"{name}: stops after the unit at hand")
        self.stop_signal = name

    def leave_if_asked(self):
        """Between two units: exit with status 75 if a stop signal came."""
        if self.stop_signal:
            self.flush()
            self._log_run()
            stop(self.stop_signal)

    def progress(self, **options):
        """A bar (tqdm) that only rank 0 draws."""
        return progress(quiet=not self.process.is_main, **options)

    def write(self, name, data):
        """A unit's file, bytes or text: whole or absent."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        files.write(path, data, self.tag)

    def later(self, function, *args):
        """Run `function(*args)` beside what follows, one at a time; errors come with the next."""
        self.flush()
        self._pending = self._background.submit(function, *args)

    def flush(self):
        """Wait for what `later` has begun."""
        if self._pending:
            self._pending.result()
        self._pending = None

    def log(self, **row):
        """One line of log.jsonl."""
        append_log(self.folder, rank=self.process.rank, **row)

    # ---- the end

    def finish(self, facts, derived=None, words="units", then=None, result=None):
        """When all units are there: the derived files, the manifest, timing.json; a closing line.

        facts     {name: value} for the next stage, beside settings and inputs
        derived   {file name: function that returns its text}: made from the units (images.jsonl)
        words     what the units are called
        then      module and flags of the command that takes the folder on, to be printed
        result    what was found, to be printed
        """
        self.flush()
        self.leave_if_asked()
        cost = self._log_run()
        missing = [name for name in self.names if not self._has(name)]
        if not missing:
            for name, text in (derived or {}).items():
                if not self.complete or not (self.folder / name).is_file():
                    self.write(name, text())
            self._write_manifest([*self.names, *(derived or {})], facts)
            write_timing(self.folder, self.tag)
        left = "; other processes have the rest" if missing else ""
        made = f"{self.made} of {self.units} {words} made in {cost}{left}"
        made = "finished before" if self.complete and not self.made else made
        print(f"{self.folder}: {made}" + f"; {result}" * bool(result))
        launcher = os.environ.get("D4M_NEXT")  # of a launcher; "none": of a script of many stages
        if then and not missing and self.process.is_main and launcher != "none":
            print("next:", launcher or shlex.join(["python", "-m", *map(str, then)]))

    def _log_run(self):
        """Log what timing.json is made from; returns "12 s, peak memory 1.2 GiB", to print."""
        seconds, peak = time.perf_counter() - self.start, peak_memory(self.process.device)
        self.log(event="run", seconds=round(seconds, 2), units=self.made, **peak)
        gpu = f", {peak['cuda_mib'] / 2**10:.2f} GiB on the GPU" if "cuda_mib" in peak else ""
        return f"{seconds:.0f} s, peak memory {peak['host_mib'] / 2**10:.2f} GiB{gpu}"

    def _write_manifest(self, names, facts):
        """Idempotent: two processes that both find every unit write the same bytes."""
        if is_complete(self.folder):
            manifest = read_manifest(self.flag, self.folder, self.stage)
            if sorted(manifest["files"]) != sorted(names):
                refuse(f"{self.flag} {self.folder}: its {MANIFEST} lists other files; remove it")
            return
        entries = {}
        for name in sorted(names):
            self.leave_if_asked()
            path = self.folder / name
            entries[name] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
        manifest = {"stage": self.stage, "arguments": self.settings, "inputs": self.inputs, **facts}
        manifest |= {"content": content_digest(entries), "versions": library_versions()}
        manifest["files"] = entries
        manifest = json.loads(json.dumps(manifest))
        self.write(MANIFEST, files.json_text({**manifest, "checksum": files.digest_of(manifest)}))


def plan(folder, done, todo, needed, waits_for=None):
    """--dry_run: print one line on what would be made.

    done, todo   files;   needed: bytes;   waits_for: as from `awaited`
    """
    space = f"{needed / 2**20:.1f} MiB of {files.free_space(folder) / 2**20:.0f} MiB free"
    waits = f"; waits for {waits_for}" if waits_for else ""
    print(f"plan: {folder}: {done} done, {todo} files to do, {space}{waits}")


def awaited(path, module):
    """What to run first if an earlier stage has yet to make or finish `path`; None if it is there.

    For --dry_run, which then checks the rest and calls `plan`.
    """
    path = Path(path)
    begun = (path / ARGS).exists() and not is_complete(path)
    return f"{path}: python -m {module} makes it" if begun or not path.exists() else None


def _difference(before, now):
    """(path of keys, old value, new value) where two JSON values first differ, or None."""
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := _difference(before.get(key), now.get(key)):
                return (key, *found[0]), *found[1:]
        return None
    return (), before, now


def _short(value):
    if isinstance(value, str) and len(value) > 60:  # a hash as a rule
        value = f"{value[:12]}..."
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- manifests


def library_versions():
    """Versions of what computes: recorded, so that a difference can be looked up; never
    compared."""
    versions = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def content_digest(entries):
    """One sha256 over the names and sha256s of a folder's files."""
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def is_complete(folder):
    """Whether the folder has its manifest; all its files were there when that was written."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(flag, folder, stage, verify=False):
    """The manifest of a finished folder of `stage`, after checking its files against it.

    Sizes are compared for every file; a file written after the manifest (or all, with `verify`) is
    hashed. Refuses a folder that is missing, unfinished, of another stage, edited or changed. The
    checksum is no signature: what names a file is confined to the folder, and values are checked
    where they are used.
    """
    folder = Path(folder)
    where = f"{flag} {folder}"
    if not folder.is_dir():
        refuse(f"{where}: no such folder{_neighbours(folder)}")
    if not is_complete(folder):
        what = f"not made by the {stage} stage"
        if (folder / ARGS).exists():
            what = f"its {stage} stage is not finished: run it again to go on"
        refuse(f"{where}: no {MANIFEST}: {what}{_neighbours(folder)}")
    manifest = files.read_json(folder / MANIFEST)
    checksum = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if checksum != files.digest_of(manifest):
        refuse(f"{where}: {MANIFEST} was edited or damaged: its checksum does not fit")
    if manifest.get("stage") != stage:
        made_by = _short(manifest.get("stage"))
        refuse(f"{where}: {MANIFEST} is of the stage {made_by}, expected {stage}")
    written = (folder / MANIFEST).stat().st_mtime
    for name, entry in manifest["files"].items():
        if not all(files.safe_name(part, 255) for part in name.split("/")):
            refuse(f"{where}: {MANIFEST} lists {name!r}, which is not a plain relative path")
        path = folder / name
        if not path.is_file():
            refuse(f"{where}: {name} is missing, its manifest lists it")
        stat = path.stat()
        if stat.st_size != entry["size"]:
            refuse(f"{where}: {name} has {stat.st_size} bytes, expected {entry['size']}")
        if verify or stat.st_mtime > written:
            check_file(flag, folder, name, manifest)
    return manifest


def _neighbours(folder):
    """What is beside `folder`, for messages: finished folders, the most like it first; else any."""
    beside = [path for path in sorted(folder.parent.glob("[!.]*/")) if path.name != folder.name]
    finished = [path.name for path in beside if is_complete(path)]
    names = finished or [path.name for path in beside]
    close = difflib.get_close_matches(folder.name, names, n=4, cutoff=0)
    listed = ", ".join(close) + " ..." * (len(names) > len(close))
    return f" (there is {listed}{', finished' * bool(finished)})" if names else ""


def check_file(flag, folder, name, manifest, data=None):
    """Refuse a file whose content (`data`, if it is at hand) is not what the manifest says."""
    found = files.sha256(Path(folder) / name) if data is None else hashlib.sha256(data).hexdigest()
    if found != manifest["files"][name]["sha256"]:
        refuse(f"{flag} {folder}: {name} is not what its manifest says: changed since it was made")


# ---- log and timing


def append_log(folder, **row):
    """One line of `folder`/log.jsonl; with timing.json the only file that differs in equal runs."""
    row = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **row}
    try:
        with open(Path(folder) / LOG, "a+b") as file:
            file.seek(-min(1, file.tell()), os.SEEK_END)
            after_half_a_line = file.read(1) not in (b"", b"\n")  # which a kill has left
            text = "\n" * after_half_a_line + json.dumps(row, ensure_ascii=False, default=str)
            file.write(f"{text}\n".encode())
    except OSError as error:  # no result depends on it
        warn(f"{folder}/{LOG}: cannot be written: {error.strerror}")


def data_dir_of(folder, depth=4):
    """The --data_dir that a stage's folder, or what it was made from, was made with; else None.

    A guess for messages: it stands in the logs alone.
    """
    for row in log_rows(folder) if depth else ():
        words = row.get("command") if row.get("event") == "start" else None
        pairs = dict(zip(words, words[1:])) if isinstance(words, list) else {}
        sources = (pairs.get(flag) for flag in ("--prototype_path", "--image_path", "--data"))
        found = (data_dir_of(path, depth - 1) for path in sources if path)
        if data_dir := pairs.get("--data_dir") or next(filter(None, found), None):
            return data_dir
    return None


def log_rows(folder):
    """The rows of `folder`/log.jsonl that can be read: a kill may leave half a line."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (Path(folder) / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def peak_memory(device):
    """Peak memory of this process since it began, in MiB: resident, and on its CUDA device."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes on macOS, else KiB
    peak = {"host_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)}
    if device.type == "cuda":
        peak["cuda_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return peak


def write_timing(folder, tag=None):
    """`folder`/timing.json from the `run` rows of its log, over all processes and restarts.

    seconds: of the process that worked longest; process_seconds: of all; host_mib, cuda_mib: the
    largest peak of one process; cached_seconds: what another run spent on latents that came from a
    cache, null where that is not known.
    """
    rows, by_rank = log_rows(folder), Counter()
    runs = [row for row in rows if row.get("event") == "run" and "seconds" in row]
    for row in runs:
        by_rank[row["rank"]] += row["seconds"]
    timing = {
        "seconds": round(max(by_rank.values(), default=0), 2),
        "process_seconds": round(by_rank.total(), 2),
        "processes": len(by_rank),
        "units": sum(row["units"] for row in runs),
    }
    for name in ("host_mib", "cuda_mib"):
        if peaks := [row[name] for row in runs if name in row]:
            timing[name] = max(peaks)
    cached = {row["file"]: row["seconds"] for row in rows if row.get("event") == "cached"}
    if cached:
        unknown = None in cached.values()
        timing["cached_seconds"] = None if unknown else round(sum(cached.values()), 2)
    files.write(Path(folder) / TIMING, files.json_text(timing), tag)
