"""What all tests share: a clean environment, a tiny Stable Diffusion, small outputs of each stage.

    from tests.conftest import tree, copy, reseal, picture_folder

Session fixtures (made once, by the stages' own `main`; copy before changing):
    model       flags that choose the tiny, randomly initialised model
    prototypes  stage 1's folder: digits 0-2, 2 prototypes each (STAGE_1)
    images      stage 2's folder of them (STAGE_2)
    random      random_real's folder: digits 0-2, 4 images each
    teacher     train_teacher's folder: digits 0-2, one epoch
    labels      stage 3's folder of `random` by `teacher`: 3 epochs (BATCHES)
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import files, output
from scripts.runtime import entry_point

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

SUBSET = ["--dataset", "digits", "--classes", "0-2", "--max_images_per_class", "12"]
STAGE_1 = [*SUBSET, "--ipc", "2", "--km_expand", "2", "--batch_size", "4", "--num_workers", "0"]
STAGE_2 = ["--dataset", "digits", "--ipc", "2", "--km_expand", "2", "--num_inference_steps", "2"]
STAGE_2 += ["--batch_size", "2"]
TEACHER = [*SUBSET, "--arch", "convnet_mini", "--epochs", "1", "--num_workers", "0"]
# 12 images in batches of 5: two whole ones and a short one
BATCHES = ["--epochs", "3", "--batch_size", "5", "--flip", "0.5", "--mix_type", "cutmix"]
BATCHES += ["--num_workers", "0"]


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    """No test reads the checkout by a relative path, or a variable of the shell that started it."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in LAUNCHERS_READ:
            monkeypatch.delenv(name)
    yield
    if "accelerate" in sys.modules:  # its state is global, and forked tests would inherit it
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


LAUNCHERS_READ = ("OUT", "IPC", "DATA_DIR", "NUM_GPUS", "TORCHRUN_ARGS", "RANK", "WORLD_SIZE")
LAUNCHERS_READ += (
    "DATASET",
    "TEACHER",
    "STUDENT",
    "METHOD",
    "SMOKE",
    "DRY_RUN",
    "PYTHON",
    "EPOCHS",
)


# ---- models and stages


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A Stable Diffusion in diffusers format: random weights, VAE of factor 4, PNDM as in v1-5."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny-sd"), seed=0)


def build_tiny_sd(folder, seed):
    from misc import train_tiny_sd

    train_tiny_sd.tiny_pipeline(seed).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tiny_sd):
    return ["--diffusion_checkpoints_path", str(tiny_sd), "--device", "cpu"]


@pytest.fixture(scope="session")
def prototypes(model, tmp_path_factory):
    from distillation import gen_prototype

    root = str(tmp_path_factory.mktemp("prototypes"))
    return Path(gen_prototype.main([*STAGE_1, *model, "--save_prototype_path", root]))


@pytest.fixture(scope="session")
def images(prototypes, model, tmp_path_factory):
    from distillation import gen_syn_image

    where = ["--prototype_path", str(prototypes)]
    where += ["--save_init_image_path", str(tmp_path_factory.mktemp("images"))]
    return Path(gen_syn_image.main([*STAGE_2, *model, *where])[0])


@pytest.fixture(scope="session")
def random(tmp_path_factory):
    return make_random(tmp_path_factory.mktemp("random"))


def make_random(root, *flags):
    """random_real's folder below `root`: digits 0-2, 4 images each."""
    from distillation import random_real

    where = ["--save_init_image_path", str(root)]
    return Path(random_real.main([*SUBSET, "--ipc", "4", *where, *flags]))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    from matching import train_teacher

    root = str(tmp_path_factory.mktemp("teachers"))
    return Path(train_teacher.main([*TEACHER, "--output_dir", root]))


@pytest.fixture(scope="session")
def labels(random, teacher, tmp_path_factory):
    from matching import generate_soft_label

    argv = ["--data", str(random), "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher)]
    root = str(tmp_path_factory.mktemp("labels"))
    return Path(generate_soft_label.main([*argv, *BATCHES, "--fkd_path", root])[0])


# ---- looking at what a run did


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words): `main` exits with status 2 and one line that holds the words."""

    def check(main, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            entry_point(main)([str(a) for a in argv])
        printed = capsys.readouterr().err
        assert leaving.value.code == 2, printed
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in printed
        for word in words:
            assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"
        return lines[0]

    return check


def tree(folder):
    """{relative path: bytes} of a folder, timing and logs aside."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name not in (output.TIMING, output.LOG)
    }


def everything(root):
    """Every path below `root`: shows whether anything was written where it should not be."""
    return {str(p.relative_to(root)) for p in Path(root).rglob("*")}


def copy(folder, root):
    """A copy of a stage's folder below `root`, times included."""
    return shutil.copytree(folder, Path(root) / folder.name, copy_function=shutil.copy2)


def reseal(folder, **changes):
    """Make a changed folder consistent again: as if a stage had written it so.

    changes   {manifest key: new value}; the files that are there and their hashes are taken anew
    """
    path = folder / output.MANIFEST
    manifest = files.read_json(path)
    names = [name for name in manifest["files"] if (folder / name).is_file()]
    added = (str(p.relative_to(folder)) for p in folder.glob("*/*.png"))
    names += [name for name in added if name not in names]
    entries = {}
    for name in sorted(names):
        size = (folder / name).stat().st_size
        entries[name] = {"size": size, "sha256": files.sha256(folder / name)}
    manifest |= {"files": entries, "content": output.content_digest(entries), **changes}
    manifest.pop("checksum")
    path.write_text(files.json_text({**manifest, "checksum": files.digest_of(manifest)}))


@contextlib.contextmanager
def exits(status):
    """`with exits(75):` what is inside leaves with this status."""
    with pytest.raises(SystemExit) as leaving:
        yield
    assert leaving.value.code == status


# ---- small real inputs


def picture(seed, size=(24, 24)):
    """A smooth RGB picture, (H, W, 3) uint8."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.array(small.resize(size, Image.Resampling.BICUBIC))


def picture_folder(root, classes, count=3, split="train"):
    """root/split/<class>/<n>.png for an `imagefolder` data set; returns root."""
    for number, name in enumerate(classes):
        folder = Path(root) / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            seed = 100 * number + i + 10**4 * (split != "train")  # a test set of its own
            Image.fromarray(picture(seed)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def photographs():
    """The folder of $D4M_TEST_DATA with real photographs (imagenette64/, cifar10/); skips
    without."""
    found = os.environ.get("D4M_TEST_DATA")
    if not found:
        pytest.skip("no real photographs: set D4M_TEST_DATA")
    return Path(found)


# 19 names that a class folder, a prompt or a manifest may hold
HOSTILE = {
    "empty": "",
    "dot": ".",
    "parent": "..",
    "climbing": "../../escaped",
    "absolute": "/d4m-escaped",
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
