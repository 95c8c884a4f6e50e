"""What the reliability tests share: forked stages with captured output, tiny data sets on disk, hostile names."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

STAGE_1 = ["--dataset", "digits", "--classes", "0-2", "--ipc", "2", "--km_expand", "2", "--max_images_per_class", "9"]
STAGE_1 += ["--batch_size", "4", "--num_workers", "0"]
STAGE_2 = ["--dataset", "digits", "--ipc", "2", "--km_expand", "2", "--num_inference_steps", "2", "--batch_size", "2"]


class Ended(NamedTuple):
    """How a forked run ended: exit status (or minus the signal that killed it), its stdout and stderr."""

    status: int
    out: str
    err: str

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Forked:
    """`function(*args)` in a forked child: what the test process has imported needs no importing again."""

    def __init__(self, folder, function, *args, environment=None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"{os.urandom(4).hex()}.{name}" for name in ("out", "err")]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._child(function, args, environment or {})

    def _child(self, function, args, environment):
        status = 70
        try:
            for number, path in zip((1, 2), self.files):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False, encoding="utf-8") for n in (1, 2))
            os.environ.update(environment)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            function(*args)
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds=120):
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return Ended(os.waitstatus_to_exitcode(status), *(p.read_text(errors="replace") for p in self.files))
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(self.files[1].read_text(errors="replace"))
            time.sleep(0.002)


def forked(folder, function, *args, **kwargs):
    """Run to its end in a forked child."""
    return Forked(folder, function, *args, **kwargs).wait()


def ranks(world, rank):
    """What torchrun puts into the environment of a rank."""
    return {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


def picture(seed, size=(24, 24)):
    """A smooth RGB picture, (H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.array(small.resize(size, Image.Resampling.BICUBIC))


def image_folder(root, classes, count=3):
    """root/train/<class>/<n>.png for an `imagefolder` data set; returns root."""
    for number, name in enumerate(classes):
        folder = Path(root) / "train" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(100 * number + i)).save(folder / f"{i}.png")
    return root


def everything(root):
    """Every path below `root`: what a test compares to see that nothing was written outside an output folder."""
    return {str(p.relative_to(root)) for p in Path(root).rglob("*")}


# 19 names that a class folder, a prompt or a manifest may hold
HOSTILE = {
    "empty": "",
    "dot": ".",
    "parent": "..",
    "climbing": "../../escaped",
    "absolute": "/tmp/d4m-escaped",
    "separator": "cat/dog",
    "backslash": "..\\escaped",
    "nul": "cat\x00dog",
    "newline": "cat\ndog",
    "control": "cat\x1b[2Jdog",
    "300 bytes": "c" * 300,
    "255 bytes": "c" * 255,
    "leading dash": "-rf",
    "trailing dot and space": "cat. ",
    "drive": "C:cat",
    "wildcard": "*?",
    "device": "nul.txt",
    "lone surrogate": "cat\udcff",
    "right-to-left override": "cat\u202egpj",
}
