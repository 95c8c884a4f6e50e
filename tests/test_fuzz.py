"""Fuzz: files of any content give a result or one line, and no file elsewhere."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from distillation import gen_prototype, gen_syn_image, prototype_files
from matching import generate_soft_label
from scripts import files
from tests.conftest import HOSTILE, STAGE_2, copy, picture, picture_folder, reseal
from tests.test_security import DECODED, FOLDERS, run  # noqa: F401
from validate import train_FKD

pytest.importorskip("hypothesis", reason="pip install hypothesis runs the fuzz tests too")

from hypothesis import given, settings
from hypothesis import strategies as st

LONG = pytest.param(2000, marks=pytest.mark.slow, id="long")
pytestmark = pytest.mark.parametrize("count", [pytest.param(40, id="short"), LONG])
SMALL = ["--epochs", "1", "--num_workers", "0", "--device", "cpu"]


def tried(count, *strategies):
    """Decorator: runs a check at once, on `count` examples, without what the last one made."""

    def each(check):
        @settings(max_examples=count, deadline=None, derandomize=True, database=None)
        @given(st.tuples(*strategies))
        def one(example):
            shutil.rmtree("output", ignore_errors=True)
            shutil.rmtree("mine", ignore_errors=True)
            check(*example)

        one()

    return each


@pytest.fixture
def readers(prototypes, random, teacher, labels):
    """{a finished folder: (files that the next stage reads, how it is started)}"""
    stage_2 = [*STAGE_2, "--arm", "decoded", "--prototype_path"]
    stage_3 = ["--data", random, "--arch", "convnet_mini", "--teacher_checkpoint", teacher, *SMALL]
    stage_4 = ["--train_dir", random, "--model", "convnet_mini", *SMALL, "--fkd_path"]
    return {
        prototypes: ("0*.json", gen_syn_image.main, *stage_2),
        random: ("*/*.png", generate_soft_label.main, *stage_3, "--data"),
        teacher: ("*.safetensors", generate_soft_label.main, *stage_3, "--teacher_checkpoint"),
        labels: ("*.safetensors", train_FKD.main, *stage_4),
    }


TEXT = st.text(max_size=30) | st.sampled_from([t for t in HOSTILE.values() if "\udcff" not in t])
PLAIN = st.none() | st.booleans() | st.integers(-(10**5), 10**5) | st.floats(-3, 3) | TEXT
NUMBER = st.floats(-3, 3) | st.floats() | st.sampled_from([0, 2**63, 10**400, 1e300, 70000])
VALUE = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
PATH = st.lists(st.integers(0, 10**6), min_size=1, max_size=5)
LINE = TEXT | st.sampled_from(["a cat", "0\ta cat", "one\ta dog", '"two"', "", "n01440764 x"])
FOUR = st.lists(NUMBER, min_size=4, max_size=4).map(lambda row: [[[[v]] for v in row]])


def put(value, path, new):
    """A JSON value with `new` at one place; each number of the path chooses among the children."""
    if not path or not value or not isinstance(value, (dict, list)):
        return new
    key = (list(value) if isinstance(value, dict) else range(len(value)))[path[0] % len(value)]
    changed = value.copy()
    changed[key] = put(value[key], path[1:], new)
    return changed


def damaged(data, draw):
    """Bytes of which some bits are flipped, or which are cut off."""
    data = bytearray(data)
    for place in draw.sample(range(len(data)), draw.choice([1, 1, 5])):
        data[place] ^= 1 << draw.randrange(8)
    return data[: draw.randrange(len(data))] if draw.random() < 0.2 else data


def test_label_files(count, run):  # noqa: F811
    picture_folder("data", ["0", "one"], count=1)

    lines = st.lists(LINE, max_size=3).map("\n".join).map(str.encode)

    @tried(count, st.binary(max_size=99) | lines)
    def check(content):
        Path("labels.txt").write_bytes(content)
        run(gen_prototype.main, *FOLDERS, "--label_file_path", "labels.txt")


@pytest.mark.filterwarnings("ignore:overflow")
def test_prototype_files(count, run, prototypes):  # noqa: F811
    folder = copy(prototypes, ".")
    real = files.read_json(folder / "0000_0.json")

    @tried(count, PATH, VALUE | NUMBER, st.dictionaries(LINE, FOUR | VALUE, max_size=2))
    def check(path, new, release):
        (folder / "0000_0.json").write_text(json.dumps(put(real, path, new)))
        reseal(folder)
        run(prototype_files.main, folder, "output")
        Path("release.json").write_text(json.dumps(release))
        run(gen_syn_image.main, *DECODED, "--prototype_path", "release.json", "--dry_run")


def test_manifests(count, run, readers):  # noqa: F811
    """A changed one is refused. One that agrees with itself is no accident: it may end in a
    traceback, but writes nothing elsewhere."""

    @tried(count, st.sampled_from(list(readers)), PATH, VALUE)
    def check(folder, path, new):
        mine, (_, *reader) = copy(folder, "mine"), readers[folder]
        before = files.read_json(mine / "manifest.json")
        after = put(before, path, new)
        files.write(mine / "manifest.json", files.json_text(after))
        assert (run(*reader, mine) is None) == (json.dumps(before) != json.dumps(after))
        files.write(mine / "manifest.json", files.json_text(before))
        reseal(mine, **{key: value for key, value in after.items() if key != "checksum"})
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            run(*reader, mine)


def test_damaged_files(count, run, readers):  # noqa: F811
    @tried(count, st.sampled_from(list(readers)), st.integers(0, 10**6))
    def check(folder, seed):
        draw, mine, (pattern, *reader) = Random(seed), copy(folder, "mine"), readers[folder]
        victim = draw.choice(sorted(mine.glob(pattern)))
        victim.write_bytes(damaged(victim.read_bytes(), draw))
        os.utime(victim, (0, 0))  # a disk's fault leaves the time as it was
        assert run(*reader, mine) is None


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures(count, run):  # noqa: F811
    draw, forms = Random(0), ("png", "jpeg", "webp", "bmp", "tiff", "ppm")
    for form in forms:
        folder, whole = Path("data/train", form), io.BytesIO()
        folder.mkdir(parents=True)
        Image.fromarray(picture(3)).save(whole, form)
        for n in range(count):
            data = damaged(whole.getvalue(), draw) if n else whole.getvalue()
            (folder / f"{n}.{form}").write_bytes(data)
    made = run(gen_prototype.main, *FOLDERS, "--size", "8", "--on_bad_image", "skip")
    found = [files.read_json(path) for path in made.glob("0*.json")]
    assert [f["images"] + len(f["skipped"]) for f in found] == [count] * len(forms)
    assert sum(len(f["skipped"]) for f in found) > count
