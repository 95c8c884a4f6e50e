"""Fuzz: label files, prototype JSON and manifests of any content give a result or one line, and no file elsewhere."""

import contextlib
import io
import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis", reason="pip install hypothesis runs the fuzz tests too")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability import HOSTILE, STAGE_1, STAGE_2, everything
from stage34 import PROTOCOL, make_images, make_teacher

from distillation import gen_prototype, gen_syn_image
from distillation.datasets import read_label_file
from distillation.prototypes import open_prototypes, read_class
from matching import generate_soft_label
from matching.models import load_teacher
from scripts.files import MANIFEST, content_digest, read_json, read_manifest, sha256
from scripts.runtime import Process
from validate import train_FKD

SHORT, LONG = 60, 2000


def examples(count):
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks, derandomize=True, database=None)


def outcome(function, *args):
    """The function's result, or None if it refused in one line. A traceback fails the test."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return function(*args)
    except SystemExit as leaving:
        lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
        assert leaving.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err.getvalue()
        return None


TEXT = st.one_of(st.text(max_size=30), st.sampled_from(list(HOSTILE.values())), st.sampled_from(["0", "1", "zero"]))
NUMBER = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 2**63, 10**400, 1e300, True, False, float("nan")])
)
VALUE = st.recursive(
    st.one_of(st.none(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


def dumped(value):
    """JSON as others write it: NaN and Infinity too."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


# ---- label files

LINE = st.one_of(
    TEXT, st.builds("{}\t{}".format, TEXT, TEXT), st.sampled_from(["zero", "one", '"two"', "", "n01440764 x"])
)
LABELS = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda lines, end, mark: mark + end.join(lines).encode("utf-8", "surrogatepass"),
        st.lists(LINE, min_size=1, max_size=5),
        st.sampled_from(["\n", "\r\n", "\r", "\u2028"]),
        st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    ),
)


def fuzz_labels(content):
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "labels.txt"
        path.write_bytes(content)
        for dataset, folders in (
            ("digits", list("0123456789")),
            ("imagefolder", ["a", "b", "c"]),
            ("imagefolder", ["a"]),
        ):
            prompts = outcome(read_label_file, path, folders, dataset)
            assert prompts is None or (
                len(prompts) == len(folders) and all(p and p == p.strip() and "\n" not in p for p in prompts)
            )
        assert everything(root) == {"labels.txt"}


@examples(SHORT)
@given(LABELS)
def test_label_files(content):
    fuzz_labels(content)


@pytest.mark.slow
@examples(LONG)
@given(LABELS)
def test_label_files_at_length(content):
    fuzz_labels(content)


# ---- prototype JSON: a class's file, and the release's single file

LATENTS = st.one_of(
    VALUE,
    st.lists(st.lists(st.lists(st.lists(NUMBER, max_size=2), max_size=2), min_size=4, max_size=4), max_size=2),
    st.lists(st.lists(st.floats(-3, 3), min_size=16, max_size=16), max_size=3),
)
CLASS_FILE = st.one_of(
    VALUE,
    st.fixed_dictionaries(
        {"prototypes": LATENTS, "latent_shape": st.one_of(VALUE, st.just([4, 2, 2]), st.just([4, -1, 2]))},
        optional={"cluster_sizes": VALUE, "class_index": VALUE, "folder": TEXT, "prompt": VALUE},
    ),
)
RELEASE_FILE = st.one_of(VALUE, st.dictionaries(TEXT, LATENTS, max_size=3))


def fuzz_prototypes(class_value, release_value, cut):
    with tempfile.TemporaryDirectory() as root:
        one, release = Path(root) / "0000_0.json", Path(root) / "release.json"
        one.write_bytes(dumped(class_value)[cut:])
        release.write_bytes(dumped(release_value)[: -cut or None])
        found = outcome(read_class, one)
        assert found is None or found[0].latents.shape[1] == 4
        for dataset in ("digits", "imagefolder"):
            source = outcome(open_prototypes, release, dataset)
            if source is not None:
                assert all(c["folder"].isdigit() for c in source.classes) and len(source.latent_shape) == 3
        assert everything(root) == {"0000_0.json", "release.json"}


@examples(SHORT)
@given(CLASS_FILE, RELEASE_FILE, st.sampled_from([0, 0, 0, 1, 7]))
def test_prototype_json(class_value, release_value, cut):
    fuzz_prototypes(class_value, release_value, cut)


@pytest.mark.slow
@examples(LONG)
@given(CLASS_FILE, RELEASE_FILE, st.sampled_from([0, 0, 0, 1, 7]))
def test_prototype_json_at_length(class_value, release_value, cut):
    fuzz_prototypes(class_value, release_value, cut)


def test_json_that_others_write_is_read_strictly(tmp_path, refused):
    path = tmp_path / "x.json"
    for text in (
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        "[" * 100000,
        "1" * 5000,
        b"\xff{}",
        b"\xef\xbb\xbf{}",
    ):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert outcome(read_json, path) is None


# ---- manifests: any value at any place of a real one, signed so that it is consistent with itself


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value, path, new, rename=None):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def fuzz_manifest(folder, stage, where, new, drop, open_it):
    manifest = json.loads((folder / MANIFEST).read_text())
    path = list(places(manifest))[where % len(list(places(manifest)))]
    changed = put(manifest, path, new)
    if drop and path and isinstance(path[-1], str):
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
    with contextlib.suppress(Exception):
        changed["content"] = content_digest(changed["files"]) if path[:1] == ("files",) else changed["content"]
    with tempfile.TemporaryDirectory() as root:
        copy = Path(shutil.copytree(folder, Path(root) / "folder"))
        (copy / MANIFEST).write_bytes(dumped(changed))
        before = everything(root)
        outcome(read_manifest, "--flag", copy, stage)
        open_it(copy)
        assert {n for n in everything(root) - before if not n.startswith("out")} == set()


def open_as_prototypes(copy):
    """As stage 2 does before it loads anything, and then every class."""
    source = outcome(open_prototypes, copy, "digits")
    if source is None:
        return
    args = gen_syn_image.get_args([*STAGE_2, "--prototype_path", str(copy)])

    def up_to_the_images():
        gen_syn_image.check_prototypes(args, source)
        hashes = {"vae_sha256": source.vae_sha256}
        settings = gen_syn_image.synthesis_settings(args, "d4m", "fp32", hashes)
        name = gen_syn_image.image_folder_name(settings, source.settings)
        jobs = gen_syn_image.list_jobs(source.classes, args.ipc, settings["num_prototypes"])
        for n in range(len(source.classes)):
            source[n]
        return name, jobs

    made = outcome(up_to_the_images)
    if made:
        name, jobs = made
        assert "/" not in name and ".." not in name.split("_")
        assert all((copy / job.file).resolve().is_relative_to(copy.resolve()) for job in jobs)


def open_as_images(copy):
    from matching.soft_labels import load_pixels, open_images

    images = outcome(open_images, "--data", copy)
    if images is not None:
        outcome(load_pixels, "--data", images)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(images, teacher, labels) of three digits."""
    root = tmp_path_factory.mktemp("trained")
    images, teacher = make_images(root, ipc=2), make_teacher(root)
    argv = ["--data", str(images), "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher), *PROTOCOL]
    return images, teacher, generate_soft_label.main([*argv, "--fkd_path", str(root / "labels")])[0]


def open_as_labels(images):
    """As stage 4 does before it trains, up to its folder's name; the args.json agrees with the manifest."""

    def open_it(copy):
        with contextlib.suppress(Exception):
            (copy / "args.json").write_bytes(dumped(json.loads((copy / MANIFEST).read_text())["arguments"]))
        argv = ["--train_dir", str(images), "--fkd_path", str(copy), "--model", "convnet_mini", "--device", "cpu"]
        args = train_FKD.get_args(argv)

        def up_to_the_name():
            inputs = train_FKD.read_inputs(args, Process(0, 1, torch.device("cpu")))
            return train_FKD.student_name(inputs, train_FKD.recipe_of(args), 2, args)

        name = outcome(up_to_the_name)
        assert name is None or ("/" not in name and len(name) < 400)

    return open_it


def open_as_teacher(copy):
    outcome(load_teacher, "convnet_mini", copy, "digits", ["0", "1", "2"], 32)


def fuzz_manifests(made, trained, *change):
    fuzz_manifest(made[0], "prototypes", *change, open_as_prototypes)
    fuzz_manifest(made[1], "images", *change, open_as_images)
    fuzz_manifest(trained[1], "teacher", *change, open_as_teacher)
    fuzz_manifest(trained[2], "soft_labels", *change, open_as_labels(trained[0]))


MANIFESTS = (st.integers(0, 10**6), VALUE, st.booleans())


@examples(SHORT)
@given(*MANIFESTS)
def test_manifests(made, trained, where, new, drop):
    fuzz_manifests(made, trained, where, new, drop)


@pytest.mark.slow
@examples(LONG)
@given(*MANIFESTS)
def test_manifests_at_length(made, trained, where, new, drop):
    fuzz_manifests(made, trained, where, new, drop)


# ---- the stages themselves, on damaged files


def fuzz_stages(made, model, rounds, seed):
    """Damage one file of a prototype folder at random, run stages 2 and 1 on it: status 0, or 2 with one line."""
    rng = random.Random(seed)
    refusals = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as root:
            copy = Path(shutil.copytree(made[0], Path(root) / "output/prototypes" / made[0].name))
            victim = rng.choice(sorted(p for p in copy.iterdir() if p.name not in ("timing.json", "log.jsonl")))
            data = bytearray(victim.read_bytes())
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            victim.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
            before = everything(root)
            stage_2 = [
                *STAGE_2,
                *model,
                "--prototype_path",
                str(copy),
                "--save_init_image_path",
                f"{root}/output/images",
            ]
            refusals += ends(gen_syn_image.main, stage_2) == 2
            ends(gen_prototype.main, [*STAGE_1, *model, "--save_prototype_path", f"{root}/output/prototypes"])
            assert all(name.startswith("output") for name in everything(root) - before)
    return refusals


def ends(main, argv):
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            main(argv)
    except SystemExit as leaving:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert leaving.code == 2 and len(lines) == 1, err.getvalue()
        return 2
    return 0


def test_the_stages_on_damaged_folders(made, model):
    assert fuzz_stages(made, model, 10, seed=0) >= 6


@pytest.mark.slow
def test_the_stages_on_300_damaged_folders(made, model):
    assert fuzz_stages(made, model, 300, seed=1) >= 180


def test_digests_in_these_tests_are_those_of_the_product(made):
    manifest = json.loads((made[0] / MANIFEST).read_text())
    assert all(entry["sha256"] == sha256(made[0] / name) for name, entry in manifest["files"].items())
