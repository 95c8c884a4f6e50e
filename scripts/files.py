"""Files that are whole or absent, strict JSON, and names that are safe on every file system.

A file is written under a temporary name in its own folder, flushed to disk and renamed, so "exists"
means "finished".
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import unicodedata
from functools import lru_cache
from pathlib import Path

from scripts.runtime import refuse, warn

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # the file system cannot


def write(path, data, tag=None, once=False):
    """`data`, bytes or text, to `path`: whole or not at all.

    tag    marks the temporary name `.{name}.{tag}.tmp`; by default with this machine and process
    once   a `path` that another process made meanwhile stays as it is
    """
    # differs from the release: it writes in place, and its reruns take half a file for a whole one
    path, tag = Path(path), tag or f"{socket.gethostname()}-{os.getpid()}"
    temporary = path.with_name(f".{path.name[-40:]}.{tag}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        _sync(temporary, os.O_RDWR)
        if once:
            with contextlib.suppress(OSError):  # it is there, or links do not work here
                os.link(temporary, path)
        if not (once and path.exists()):
            os.replace(temporary, path)
        _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        free = f"{free_space(path.parent) / 2**20:.0f} MiB free there"
        refuse(f"cannot write {path}: {error.strerror or error} ({free})")
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path, mode):
    try:
        descriptor = os.open(path, mode)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        _warn_once("no fsync on this file system; a power cut may lose files")


_warn_once = lru_cache(warn)


def json_text(value):
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path, data=None):
    """Strict JSON: refuses what is not UTF-8, has a key twice, or holds NaN or Infinity.

    data   the file's bytes, if they were read already
    """
    try:
        text = (Path(path).read_bytes() if data is None else data).decode("utf-8")
        strict = {"object_pairs_hook": _no_duplicates, "parse_constant": int}  # int("NaN") fails
        return json.loads(text, **strict)
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}: cannot be read as JSON: {error}")


def _no_duplicates(pairs):
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value):
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def free_space(folder):
    """Bytes free where `folder` is, or would be made."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:  # some mounted object stores do not say
        return math.inf
    return usage.free if usage.total else math.inf


def require_space(flag, folder, needed):
    """Refuse to start what cannot fit; needed: bytes."""
    free = free_space(folder)
    if needed > free:
        mib = f"about {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there"
        refuse(f"{flag} {folder}: needs {mib}")


WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE)


def safe_name(text, longest=200):
    """Whether `text` can be a folder or file name anywhere: no separator, no leading dot, dash or
    space, nothing invisible, no device name, at most `longest` bytes."""
    return (
        isinstance(text, str)
        and text != ""
        and text[0] not in ".- "
        and text[-1] not in ". "
        and len(text.encode("utf-8", "surrogatepass")) <= longest
        and not re.search(r'[/\\:*?"<>|]', text)
        and not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") for c in text)
        and not WINDOWS_DEVICE.match(text)
    )


def colliding_names(names):
    """The first two of `names` that are the same on a file system that ignores case or Unicode
    form, or None."""
    seen = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None
