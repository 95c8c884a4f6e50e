"""Files that are whole or absent, output folders that resume, and the manifests that pass between the stages.

A unit of work is a file (or a few). It is written under a temporary name in its own folder, flushed, fsynced and
renamed, so "exists" means "finished". An output folder holds `args.json` (what decides its bytes, written first), the
units (each with a digest of args.json, so that no other run's is adopted), and `manifest.json` (the same arguments,
facts for the next stage, size and sha256 of each file), written last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import unicodedata
from pathlib import Path

from scripts.runtime import refuse, warn

FORMAT_VERSION = 1
ARGS, MANIFEST, TIMING, LOG = "args.json", "manifest.json", "timing.json", "log.jsonl"
VOLATILE = {TIMING, LOG}  # seconds, memory, host and absolute paths live here and nowhere else
_TEMPORARY = re.compile(r"^\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.tmp$")
_GUARD = ".lock"  # held for a moment by who takes a lock of the folder, or sweeps it
_held = {}  # {path: open file} of the locks that this process holds


# ---- whole files


def _host():
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())


@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as temporary:` write `temporary`; on leaving without an error it becomes `path`, durably."""
    # differs from the release: it writes in place, and its reruns take half a file for a whole one
    path = Path(path)
    name = path.name if len(path.name.encode()) <= 100 else hashlib.sha256(path.name.encode()).hexdigest()[:32]
    temporary = path.with_name(f".{name}.{_host()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        refuse(
            f"cannot write {path}: {error.strerror or error} ({free_space(path.parent) / 2**20:.0f} MiB free there)"
        )
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def _fsync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot sync a folder; the rename is atomic all the same
    finally:
        os.close(descriptor)


def write_bytes(path, data):
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path, text):
    write_bytes(path, text.encode("utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=False, allow_nan=False) + "\n")


def _no_duplicates(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return dict(pairs)


def _no_constant(name):
    raise ValueError(f"{name} is not a number")


def read_json(path, data=None):
    """Strict JSON: refuses, naming the file, what is not UTF-8, has a key twice, or holds NaN or Infinity.

    data   the file's bytes, where they were read already
    """
    try:
        text = (Path(path).read_bytes() if data is None else data).decode("utf-8")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}: cannot be read as JSON: {error}")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space(folder):
    """Bytes free where `folder` is, or would be made."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(flag, folder, needed, files=()):
    """Refuse to start what cannot fit: `needed` bytes in all, less the share of `files` that is there already."""
    if files:
        needed *= sum(not (Path(folder) / name).exists() for name in files) / len(files)
    free = free_space(folder)
    if needed > free:
        refuse(f"{flag} {folder}: needs about {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there")


RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)  # devices, on Windows


def safe_name(text, longest=200):
    """Whether `text` can be a folder or file name anywhere: no separators, no leading dot, dash or space, nothing
    invisible, no device name, at most `longest` bytes, which leaves room for a number and a suffix."""
    return (
        isinstance(text, str)
        and bool(text)
        and text[0] not in ".- "
        and text[-1] not in ". "
        and len(text.encode("utf-8", "surrogatepass")) <= longest
        and not re.search(r'[/\\:*?"<>|]', text)
        and not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") for c in text)
        and not RESERVED.match(text)
    )


def colliding_names(names):
    """The first two of `names` that are one name where case or Unicode form does not count, or None."""
    seen = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None


# ---- output folders


def output_name(stem, options, defaults):
    """`stem` plus `_<name><value>` for each option that is not its default: the one rule that names every output
    folder.

    output_name("cifar10_ipc10", {"steps": 25, "kmeans": "full", "seed": 0}, {"steps": 50, "kmeans": "minibatch",
    "seed": 0}) is "cifar10_ipc10_steps25_kmeans-full". Text that is no plain word enters as a hash: no path derives
    from a prompt.
    """
    parts = [stem]
    for name, value in options.items():
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            parts.append(name if value else f"no-{name}")
        elif isinstance(value, int):
            parts.append(f"{name}{value}")  # all digits: seeds 1234567 and 1234568 are two folders
        elif isinstance(value, float):
            parts.append(f"{name}{value:g}")
        else:
            text = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            plain = re.fullmatch(r"[A-Za-z0-9+.-]{1,40}", text)
            parts.append(f"{name}-{text if plain else hashlib.sha256(text.encode()).hexdigest()[:8]}")
    return "_".join(parts)


@contextlib.contextmanager
def output_folder(flag, folder, settings, process, resumable=()):
    """Make or re-open the output `folder` for this process: locked, swept, and made with the same `settings`.

    settings    {flag: value} of all that decides the bytes. A folder begun with other values is refused, naming the
                flag and both values - except for flags in `resumable`, where the folder's own value is taken (with a
                warning).
    Yields the settings to work with.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"{flag} {folder}: cannot make this folder: {error.strerror}")
    with contextlib.ExitStack() as stack:
        with _guard(flag, folder):  # one at a time, so that no two processes begin it with different settings
            stack.enter_context(_lock(flag, folder, process))
            sweep(folder)
            settings = _begin(flag, folder, json.loads(json.dumps(settings)), resumable)
        yield settings


def _begin(flag, folder, settings, resumable):
    """args.json: written at the first start, compared at every other."""
    if (folder / ARGS).exists():
        return _same_settings(flag, folder, read_json(folder / ARGS), settings, resumable)
    leftover = next((p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in VOLATILE), None)
    if leftover:
        refuse(f"{flag} {folder}: not made by this stage (it holds {leftover}, no {ARGS}); choose an empty folder")
    write_json(folder / ARGS, settings)
    return settings


def _same_settings(flag, folder, before, now, resumable):
    if not isinstance(before, dict):
        refuse(f"{folder / ARGS}: expected a JSON object")
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):  # say what differs inside
            inner = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            name, old, new = f"{name}.{inner}", old.get(inner), new.get(inner)
        if name not in resumable:
            refuse(
                f"{flag} {folder}: begun with {name} {_short(old)}, now {name} {_short(new)}; choose another folder"
            )
        warn(f"--{name} {new}: {folder} was begun with {old}, which is used, so that its files stay the same")
        now = {**now, name: old}
    return now


def _short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def _lock(flag, folder, process):
    """One writer a (folder, rank, world). A flock dies with its process, so it is never stale; its text names who."""
    path = folder / f".lock-{process.rank}-of-{process.world}"
    file = _take(flag, folder, path, patience=0.2)
    try:
        with contextlib.suppress(OSError):  # a full disk: locked all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        for other in _other_locks(folder):  # the same folder at another number of processes
            if not other.name.endswith(f"-of-{process.world}") and not other.is_dir():
                with contextlib.suppress(FileNotFoundError), open(other, "r+", encoding="utf-8") as held:
                    if not _flock(held):
                        _refuse_held(flag, folder, held)
                    other.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)
        _release(path)


@contextlib.contextmanager
def _guard(flag, folder):
    """For a moment, the only process that takes a lock in `folder` or sweeps it."""
    path = folder / _GUARD
    _take(flag, folder, path, patience=60)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _release(path)


def _take(flag, folder, path, patience):
    """The open and locked file `path`; refuses, naming its holder, what is not free within `patience` seconds."""
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            refuse(f"{flag} {folder}: cannot write there: {error.strerror}")
        if not _flock(file, patience):
            with file:
                _refuse_held(flag, folder, file)
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            _held[path.absolute()] = file
            return file
        file.close()  # its last holder removed it between our open and our lock


def _release(path):
    with contextlib.suppress(OSError):  # a full disk: its text was not written
        _held.pop(path.absolute()).close()


def _forget_locks():
    """In a forked child: a lock is its parent's, and must die with it even if a reading process outlives it."""
    for path in list(_held):
        _release(path)


os.register_at_fork(after_in_child=_forget_locks)


def _flock(file, patience=0.0):
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        except OSError as error:  # a file system without locks: say so, and trust the user
            warn(f"{file.name}: no file locks here ({error.strerror}); make sure that no second job writes there")
            return True


def _refuse_held(flag, folder, file):
    file.seek(0)
    refuse(f"{flag} {folder}: {file.read() or 'another process'} is writing there")


def _other_locks(folder):
    return [path for path in Path(folder).glob(".lock-*") if path.absolute() not in _held]


def _alone(folder):
    """Whether no other process holds a lock in `folder`; None where that cannot be known."""
    for path in _other_locks(folder):
        try:
            with open(path, "r+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            return False
        except OSError:
            return None
    return True


def sweep(folder, locked=True):
    """Remove what killed processes left half-written: once nobody else works in `folder`, every temporary file.

    Called with the guard held. Where locks do not work or are not used, only those of dead processes of this machine.
    """
    alone = _alone(folder) if locked else None
    if alone is False:
        return
    for path in Path(folder).rglob(".*.tmp"):
        match = _TEMPORARY.match(path.name)
        if match and (alone or (match["host"] == _host() and not _alive(int(match["pid"])))):
            with contextlib.suppress(IsADirectoryError):  # not ours
                path.unlink(missing_ok=True)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def settings_digest(settings):
    """sha256 of the settings of an output folder, which its units and checkpoints carry."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_unit(path, found, wanted):
    """Refuse a unit that says another digest of settings than its folder's."""
    if found != wanted:
        refuse(f"{path}: not made with the settings in {ARGS} beside it; remove it to have it made again")


# ---- manifests


def library_versions():
    """Versions of what computes: recorded, so that a difference can be looked up; never compared, never refused."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "diffusers", "transformers", "accelerate", "scikit-learn", "numpy", "pillow"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def write_manifest(folder, stage, settings, files, facts, check=None):
    """Write `folder`/manifest.json if every one of `files` (relative paths) is there; returns the missing ones.

    check   called with the path of each file that the manifest is to vouch for; refuses what is none of this run's
    Idempotent: whichever process finds all units present writes it, and two that do write the same bytes. A manifest
    that is there already is not written again; a file that is no longer what it says is refused.
    """
    folder = Path(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        return missing
    with _guard(stage, folder):
        sweep(folder)
    if is_complete(folder):
        manifest = read_manifest(stage, folder, stage)
        if sorted(manifest["files"]) != sorted(files) or manifest["arguments"] != json.loads(json.dumps(settings)):
            refuse(
                f"{stage} {folder}: its {MANIFEST} is of other files or arguments; remove that file to write it anew"
            )
        return []
    for name in files if check else ():
        check(folder / name)
    entries = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(files)
    }
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "stage": stage,
            "arguments": settings,
            **facts,
            "content": content_digest(entries),
            "versions": library_versions(),
            "files": entries,
        },
    )
    return []


def content_digest(entries):
    """One sha256 over the names and sha256s of a folder's files: equal if and only if all files are."""
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def is_complete(folder):
    """Whether the folder has its manifest; its files were all there when it was written."""
    return (Path(folder) / MANIFEST).is_file()


def read_manifest(flag, folder, stage, verify=False):
    """The manifest of a finished folder of `stage`, after checking its files against it.

    Sizes are compared for every file; a file written after the manifest (or all, with `verify`) is hashed. Refuses, in
    one line, a folder that is missing, unfinished, of another stage or format, or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        refuse(f"{flag} {folder}: no such folder{_near(folder)}")
    if not is_complete(folder):
        begun = (folder / ARGS).exists()
        refuse(
            f"{flag} {folder}: no {MANIFEST}; "
            + (
                f"its {stage} stage is not finished: run it again to go on"
                if begun
                else f"this is not an output of the {stage} stage"
            )
        )
    manifest = read_json(folder / MANIFEST)
    check_manifest(flag, folder, manifest, stage)
    written = (folder / MANIFEST).stat().st_mtime
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            refuse(f"{flag} {folder}: {name} is missing, its manifest lists it")
        stat = path.stat()
        if stat.st_size != entry["size"]:
            refuse(f"{flag} {folder}: {name} has {stat.st_size} bytes, its manifest says {entry['size']}")
        if verify or stat.st_mtime > written:
            check_file(flag, folder, name, manifest)
    return manifest


def check_manifest(flag, folder, manifest, stage):
    """Refuse a manifest of another shape, format version or stage."""
    where = f"{flag} {folder}: {MANIFEST}"
    if not isinstance(manifest, dict):
        refuse(f"{where} is not a JSON object")
    if manifest.get("format_version") != FORMAT_VERSION:
        refuse(
            f"{where} has format version {_short(manifest.get('format_version'))}, this code reads {FORMAT_VERSION}"
        )
    if manifest.get("stage") != stage:
        refuse(f"{where} is of the stage {_short(manifest.get('stage'))}, expected {stage}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("arguments"), dict):
        refuse(f"{where} lacks its files or arguments")
    for name, entry in files.items():
        if not all(safe_name(part, 255) for part in name.split("/")):
            refuse(f"{where} lists {name!r}, which is not a plain relative path")
        if not (
            isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        ):
            refuse(f"{where}: the entry of {name} lacks size or sha256")
    if manifest.get("content") != content_digest(files):
        refuse(f"{where} was edited: its content digest does not fit its files")


def wrong_field(record, fields):
    """The first of `fields` {name: type} that `record` lacks or has of another type; None if it has all of them."""
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return name
    return None


def check_file(flag, folder, name, manifest):
    """Refuse a file whose content is not what the manifest says (hashed where it is first read)."""
    if sha256(Path(folder) / name) != manifest["files"][name]["sha256"]:
        refuse_changed(flag, folder, name)


def refuse_changed(flag, folder, name):
    refuse(f"{flag} {folder}: the content of {name} is not what its manifest says: changed since it was made")


def log_rows(folder):
    """The rows of `folder`/log.jsonl that can be read: half a line is left by a kill, none by a full disk."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (Path(folder) / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_timing(folder):
    """`folder`/timing.json from the `event: run` lines of its log.jsonl, over all processes and restarts.

    seconds: the longest-working process's sum; process_seconds: of all; units; host_mib, cuda_mib: a process's largest
    peak, of this stage alone but where "since_start_of_process" or "peak_of" (which stages) stands beside it;
    cached_seconds: what another run spent on the latents that came from a cache, null where nobody knows.
    """
    by_rank, total, cached = {}, {"units": 0}, {}
    for row in log_rows(folder):
        if row.get("event") == "cached":  # a class that was taken again after a stop counts once
            cached[row.get("file")] = row.get("seconds")
        if row.get("event") == "run" and all(
            isinstance(row.get(n), (int, float)) for n in ("rank", "seconds", "units")
        ):
            by_rank[row["rank"]] = by_rank.get(row["rank"], 0) + row["seconds"]
            total["units"] += row["units"]
            for name in ("host_mib", "cuda_mib"):
                if name in row:
                    total[name] = max(total.get(name, 0), row[name])
            total |= {name: row[name] for name in ("since_start_of_process", "peak_of") if name in row}
    seconds = {
        "seconds": round(max(by_rank.values(), default=0), 2),
        "process_seconds": round(sum(by_rank.values()), 2),
    }
    if cached:
        known = all(isinstance(value, (int, float)) for value in cached.values())
        total["cached_seconds"] = round(sum(cached.values()), 2) if known else None
    write_json(Path(folder) / TIMING, {**seconds, "processes": len(by_rank), **total})


def _near(folder):
    """' (there is A, B)' for an error about a folder that does not exist."""
    if not folder.parent.is_dir():
        return ""
    names = sorted(p.name for p in folder.parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    return f" (there is {', '.join(names[:4])}{' ...' if len(names) > 4 else ''})" if names else ""
