"""K-means is scikit-learn's own sequence of calls, also in the port; files keep every bit."""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans

from distillation import prototype_files, prototypes
from distillation.prototype_files import FORMATS, ReleaseFile, class_bytes, read_class
from distillation.prototypes import Prototypes, class_prototypes
from scripts import output
from scripts.runtime import Process


def latents(n, seed=0, shape=(4, 4, 4), modes=5):
    """n latents in clusters of very unequal size, as fp16."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((modes, *shape)) * 3
    which = np.minimum(draw.geometric(0.5, n) - 1, modes - 1)
    return (centres[which] + draw.standard_normal((n, *shape))).astype(np.float16)


def sklearn_sequence(rows, k, batch_size):
    """The release's loop, with the last short buffer fitted too."""
    kmeans = MiniBatchKMeans(n_clusters=k, random_state=0, batch_size=batch_size, n_init="auto")
    for start in range(0, len(rows), batch_size):
        kmeans.partial_fit(rows[start : start + batch_size])
    return kmeans.cluster_centers_


SIZES = [(100, 10, 1), (103, 10, 1), (137, 5, 10), (50, 50, 1), (7, 7, 10), (64, 1, 3)]


@pytest.mark.parametrize("n, k, expand", SIZES)
def test_class_prototypes_equal_scikit_learns_own_sequence(n, k, expand):
    data = latents(n)
    found = class_prototypes(data, k, k * expand)
    expected = sklearn_sequence(data.reshape(n, -1), k, k * expand).astype(np.float16)
    assert np.array_equal(found.latents, expected.reshape(k, 4, 4, 4))
    assert found.latents.dtype == np.float16 and found.sizes.sum() == n


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "n, k, batch", [(300, 10, 10), (333, 10, 100), (130, 50, 50), (90, 5, 7), (600, 4, 8)]
)
def test_the_torch_port_equals_scikit_learn(seed, n, k, batch, monkeypatch):
    rows = np.ascontiguousarray(latents(n, seed).reshape(n, -1), dtype=np.float64)
    reassigned, original = [], prototypes._reassign

    def reassign(*arguments):
        reassigned.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(prototypes, "_reassign", reassign)
    ours = prototypes.minibatch_torch(rows, k, batch, "cpu")
    theirs = sklearn_sequence(rows, k, batch)
    assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()
    assert reassigned, "this case was to exercise the random reassignment"


def test_the_port_takes_more_copies_than_a_buffer_has_rows():
    """Most centres stay empty, and more than half a buffer is never drawn anew."""
    rows = latents(8)[np.arange(107) % 8].reshape(107, -1).astype(np.float64)
    ours = prototypes.minibatch_torch(rows, 20, 20, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn: fewer distinct points than clusters
        assert np.allclose(ours, sklearn_sequence(rows, 20, 20), rtol=1e-12)


def test_the_nearest_centre_is_the_first_among_equals():
    same = np.zeros((3, 4, 1, 1), dtype=np.float16)
    assert class_prototypes(same, 3, 3, "none").sizes.tolist() == [3, 0, 0]


def test_full_is_lloyds_algorithm_and_none_takes_the_first():
    data = latents(80)
    rows = data.reshape(80, -1).astype(np.float64)
    expected = KMeans(4, random_state=0, n_init=1).fit(rows).cluster_centers_
    found = class_prototypes(data, 4, 8, method="full")
    assert np.array_equal(found.latents.reshape(4, -1), expected.astype(np.float16))
    assert np.array_equal(class_prototypes(data, 4, 8, method="none").latents, data[:4])


@pytest.mark.parametrize("k, n", [(1, 1), (2, 7), (10, 10), (10, 60)])
def test_a_class_of_one_repeated_picture_has_finite_prototypes(k, n):
    same = np.repeat(latents(1), n, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn: fewer distinct points than clusters
        found = class_prototypes(same, k, k)
    assert np.allclose(found.latents, same[:1], atol=1e-2) and found.sizes.sum() == n


# ---- files


@pytest.mark.parametrize("form", FORMATS)
def test_every_fp16_number_survives_its_file(form):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(-1, 4, 8, 8)
    written = Prototypes(every, np.arange(len(every)))
    facts = {"class_index": 3, "folder": "n01440764", "prompt": "tench, Tinca tinca"}
    data = class_bytes(written, facts, form)
    read, found = read_class(f"0003_n01440764.{form}", data)
    assert read.latents.tobytes() == every.tobytes() and found == facts
    assert np.array_equal(read.sizes, written.sizes)
    if form == "json":
        rows = [line.strip("[],") for line in data.decode().splitlines() if line[:1] == "["]
        assert rows == [",".join(row.astype("U")) for row in every.reshape(len(every), -1)]


@pytest.mark.parametrize("form", FORMATS)
def test_files_hold_what_the_array_says_not_its_memory_order(form):
    draw = np.random.default_rng(0).standard_normal((2, 3, 3, 4))
    turned = np.moveaxis(draw.astype(np.float16), 3, 1)
    assert not turned.flags["C_CONTIGUOUS"]
    data = class_bytes(Prototypes(turned, np.ones(2, np.int64)), {}, form)
    assert np.array_equal(read_class(f"x.{form}", data)[0].latents, turned)


def text(latents, sizes=(1,), **more):
    facts = {"latent_shape": [1, 1, 1], "cluster_sizes": list(sizes), "prototypes": latents, **more}
    return json.dumps(facts).encode()


SPOILT = {
    "a list": b"[1]",
    "no prototypes": text([]),
    "a size too many": text([[1.0]], sizes=(1, 2)),
    "infinite in fp16": text([[1e9]]),
    "not a number": text([["x"]]),
    "another shape": text([[1.0]], latent_shape=[2, 2, 2]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_prototype_file_is_one_line(what, refused):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy: overflow in cast
        refused(lambda argv: read_class(*argv, SPOILT[what]), ["a/0000_x.json"], "a/0000_x.json")
    refused(lambda argv: read_class(*argv, SPOILT[what]), ["0000_x.safetensors"], "0000_x")


# ---- the release's single file


def prototype_folder(root, classes, k=2, shape=(4, 4, 4), form="json"):
    """A finished prototype folder as stage 1 writes it."""
    settings = {"prototype_format": form, "km_expand": 1}
    inputs = {"generator": {"vae_sha256": "0"}, "real_images": 9}
    process = Process(0, 1, torch.device("cpu"))
    where = ("--save_prototype_path", root, "p", "prototypes")
    with output.Output(*where, settings, inputs, process) as out:
        for n, (index, name, prompt) in enumerate(classes):
            data = Prototypes(latents(k, seed=index, shape=shape), np.ones(k, np.int64))
            facts = {"class_index": index, "folder": name, "prompt": prompt}
            file = prototype_files.class_file(n, name, form)
            out.todo([file], lambda name: [name], 1)
            out.write(file, class_bytes(data, facts, form))
        table = [{"index": i, "folder": f, "prompt": p} for i, f, p in classes]
        facts = {"dataset": "imagenet", "ipc": k, "latent_shape": shape, "parts": {}}
        out.finish({**facts, "classes": table})
    return out.folder


CRANES = [
    (0, "n01440764", "tench, Tinca tinca"),
    (134, "n02012849", "crane, bird"),
    (517, "n03126707", "crane, machine"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_the_releases_file_is_written_and_read_back_exactly(form, tmp_path):
    folder, path = prototype_folder(tmp_path, CRANES, form=form), tmp_path / "release.json"
    prototype_files.main([str(folder), str(path)])
    assert list(json.loads(path.read_text())) == [prompt for _, _, prompt in CRANES]
    theirs, ours = ReleaseFile(path, "imagenet"), prototype_files.PrototypeFolder(folder)
    assert theirs.classes == ours.classes and theirs.latent_shape == ours.latent_shape == (4, 4, 4)
    for n in range(3):
        assert theirs[n].latents.tobytes() == ours[n].latents.tobytes()


def test_what_does_not_fit_the_releases_form(tmp_path, refused):
    folder = prototype_folder(tmp_path, [(0, "n01440764", "crane"), (1, "n01443537", "crane")])
    refused(prototype_files.main, [folder, tmp_path / "r.json"], "two classes", "'crane'")
    refused(prototype_files.main, [folder, "."], "is a folder")
    assert not (tmp_path / "r.json").exists()


ONE = np.zeros((1, 4, 2, 2)).tolist()
RELEASE = {
    "unknown prompt": ({"Europeanfiresalamander": ONE}, "not a prompt of imagenet"),
    "of two classes": ({"crane": ONE}, "is the prompt of two classes"),
    "empty": ({}, "expected a JSON object"),
    "no prompt": ({" ": ONE}, "is not a prompt"),
    "not rectangular": ({"crane, bird": [[1], [2, 3]]}, "not rectangular lists of one shape"),
    "several shapes": (
        {"crane, bird": ONE, "crane, machine": ONE * 2},
        "not rectangular lists of one shape",
    ),
}


@pytest.mark.parametrize("what", RELEASE)
def test_a_release_file_that_cannot_be_used(what, tmp_path, refused, monkeypatch):
    table, words = RELEASE[what]
    (tmp_path / "r.json").write_text(json.dumps(table))
    if what == "of two classes":
        known = {"n02012849": "crane", "n03126707": "crane"}
        names = SimpleNamespace(known_prompts=lambda dataset: known)
        monkeypatch.setattr(prototype_files, "datasets", names)
    refused(lambda argv: ReleaseFile(*argv, "imagenet"), [tmp_path / "r.json"], "r.json", words)
