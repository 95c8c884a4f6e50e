"""Files that are whole or absent, strict JSON, and names that are safe on every file system.

A file is written under a temporary name in its own folder, flushed to disk and renamed, so "exists"
means "finished".
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import unicodedata
from functools import lru_cache
from pathlib import Path

from scripts.runtime import refuse, warn

NO_FSYNC = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EBADF,
)  # a file system's "I cannot do that"


@contextlib.contextmanager
def atomic(path, tag=None, once=False):
    """`with atomic(path) as temporary:` write `temporary`; on leaving without an error it becomes
    `path`, durably.

    tag    marks the temporary name `.{name}.{tag}.tmp`; by default with this machine and process
    once   a `path` that another process made meanwhile stays as it is
    """
    # differs from the release: it writes in place, and its reruns take half a file for a whole one
    path = Path(path)
    name = (
        path.name
        if len(path.name.encode()) <= 100
        else hashlib.sha256(path.name.encode()).hexdigest()[:32]
    )
    temporary = path.with_name(f".{name}.{tag or f'{socket.gethostname()}-{os.getpid()}'}.tmp")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        if not (once and _linked(temporary, path)):
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
        _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        refuse(
            f"cannot write {path}: {error.strerror or error} "
            f"({free_space(path.parent) / 2**20:.0f} MiB free there)"
        )
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _linked(temporary, path):
    """Whether `path` is there now without overwriting one; False where links do not work."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def _sync(path, mode):
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        _warn_once(f"{Path(path).parent}: no fsync on this file system; a power cut may lose files")
    finally:
        os.close(descriptor)


_warn_once = lru_cache(warn)


def write(path, data, tag=None, once=False):
    """`data`, bytes or text, to `path`, whole or not at all; `tag` and `once` as for `atomic`."""
    with atomic(path, tag, once) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def json_text(value):
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path, data=None):
    """Strict JSON: refuses, naming the file, what is not UTF-8, has a key twice, or holds NaN or
    Infinity.

    data   the file's bytes, if they were read already
    """
    try:
        text = (Path(path).read_bytes() if data is None else data).decode("utf-8")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}: cannot be read as JSON: {error}")


def _no_duplicates(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return dict(pairs)


def _no_constant(name):
    raise ValueError(f"{name} is not a number")


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
    return shutil.disk_usage(folder).free


def require_space(flag, folder, needed):
    """Refuse to start what cannot fit; needed: bytes."""
    free = free_space(folder)
    if needed > free:
        refuse(
            f"{flag} {folder}: needs about {needed / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free there"
        )


RESERVED = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?$", re.IGNORECASE
)  # devices, on Windows


def safe_name(text, longest=200):
    """Whether `text` can be a folder or file name anywhere: no separator, no leading dot, dash or
    space, nothing
    invisible, no device name, at most `longest` bytes, which leaves room for a number and a
    suffix."""
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
    """The first two of `names` that are the same on a file system that ignores case or Unicode
    form, or None."""
    seen = {}
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            return seen[key], name
        seen[key] = name
    return None
