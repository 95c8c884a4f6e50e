"""K-means is scikit-learn's own sequence of calls, also in the port; files keep every bit."""

import json
import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans

from distillation import prototype_files, prototypes
from distillation.label_files import known_prompts
from distillation.prototype_files import (
    FORMATS,
    PrototypeFolder,
    ReleaseFile,
    class_bytes,
    read_class,
)
from distillation.prototypes import Prototypes, class_prototypes
from scripts import files
from tests.conftest import copy, reseal


def latents(n, seed=0, shape=(4, 4, 4), modes=5):
    """n latents in clusters of very unequal size, as fp16."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((modes, *shape)) * 3
    which = np.minimum(draw.geometric(0.5, n) - 1, modes - 1)
    return (centres[which] + draw.standard_normal((n, *shape))).astype(np.float16)


def sklearn_sequence(rows, k, batch_size):
    """The release's loop, with the last short buffer fitted too."""
    kmeans = MiniBatchKMeans(n_clusters=k, random_state=0, batch_size=batch_size, n_init="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        for start in range(0, len(rows), batch_size):
            kmeans.partial_fit(rows[start : start + batch_size])
    return kmeans.cluster_centers_


@pytest.mark.parametrize("n, k, expand", [(100, 10, 1), (103, 10, 1), (137, 5, 10), (7, 7, 10)])
def test_class_prototypes_equal_scikit_learns_own_sequence(n, k, expand):
    data = latents(n)
    found = class_prototypes(data, k, k * expand)
    expected = sklearn_sequence(data.reshape(n, -1), k, k * expand).astype(np.float16)
    assert np.array_equal(found.latents, expected.reshape(k, 4, 4, 4))
    assert found.latents.dtype == np.float16 and found.sizes.sum() == n


@pytest.mark.parametrize("seed", range(2))
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
    assert np.allclose(ours, sklearn_sequence(rows, 20, 20), rtol=1e-12)


def test_full_is_lloyds_algorithm_and_none_takes_the_first():
    data = latents(80)
    rows = data.reshape(80, -1).astype(np.float64)
    expected = KMeans(4, random_state=0, n_init=1).fit(rows).cluster_centers_
    found = class_prototypes(data, 4, 8, method="full")
    assert np.array_equal(found.latents.reshape(4, -1), expected.astype(np.float16))
    assert np.array_equal(class_prototypes(data, 4, 8, method="none").latents, data[:4])
    same = class_prototypes(np.zeros((3, 4, 1, 1), dtype=np.float16), 3, 3, "none")
    assert same.sizes.tolist() == [3, 0, 0]  # of equal centres the first is the nearest


def test_gmm_is_em_with_one_variance_per_component():
    """A tight cluster within reach of a wide one, which k-means cuts in two."""
    draw, means = np.random.default_rng(0), np.zeros((2, 4))
    means[1, 0] = 6
    which = np.arange(250) < 50
    longer = [0.3, 0.3, 0.3, 1]  # one side of the tight one, of which "diag" and "full" make more
    spread = np.where(which[:, None], longer, 4)
    rows = means[which.astype(int)] + draw.standard_normal((250, 4)) * spread
    data = rows.reshape(250, 1, 2, 2).astype(np.float16)
    rows, variance, share = (
        data.reshape(250, 4).astype(float),
        np.array([16, 0.09]),
        np.full(2, 0.5),
    )
    for _ in range(100):
        square = ((rows[:, None] - means) ** 2).sum(2)
        density = share * np.exp(-square / (2 * variance)) / variance**2  # of 4 dimensions
        belongs = density / density.sum(1, keepdims=True)
        share, means = belongs.mean(0), belongs.T @ rows / belongs.sum(0)[:, None]
        square = ((rows[:, None] - means) ** 2).sum(2)
        variance = (belongs * square).sum(0) / belongs.sum(0) / 4
    found, full = (class_prototypes(data, 2, 2, method) for method in ("gmm", "full"))
    order = found.sizes.argsort()[::-1]
    assert np.allclose(found.latents.reshape(2, 4)[order], means, atol=0.01)
    assert found.sizes[order].tolist() == np.bincount(density.argmax(1)).tolist()
    assert found.sizes.min() < 60 < full.sizes.min()
    again = class_prototypes(data, 2, 2, "gmm")
    assert np.array_equal(again.latents, found.latents)


@pytest.mark.filterwarnings("ignore:.*distinct clusters")
@pytest.mark.parametrize("k, n", [(1, 1), (10, 60)])
@pytest.mark.parametrize("method", ["minibatch", "gmm"])
def test_a_class_of_one_repeated_picture_has_finite_prototypes(method, k, n):
    same = np.repeat(latents(1), n, 0)
    found = class_prototypes(same, k, k, method)
    assert np.allclose(found.latents, same[:1], atol=1e-2) and found.sizes.sum() == n


# ---- files


@pytest.mark.parametrize("form", FORMATS)
def test_every_fp16_number_survives_its_file_in_any_memory_order(form):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = np.moveaxis(every[np.isfinite(every)].reshape(-1, 8, 8, 4), 3, 1)
    written = Prototypes(every, np.arange(len(every)))
    facts = {"class_index": 3, "folder": "n01440764", "prompt": "tench, Tinca tinca"}
    data = class_bytes(written, facts, form)
    read, found = read_class(f"0003_n01440764.{form}", data)
    assert read.latents.tobytes() == every.tobytes() and found == facts
    assert np.array_equal(read.sizes, written.sizes)
    if form == "json":
        rows = [line.strip("[],") for line in data.decode().splitlines() if line[:1] == "["]
        assert rows == [",".join(row.astype("U")) for row in every.reshape(len(every), -1)]


def text(latents, sizes=(1,), shape=(1, 1, 1)):
    facts = {"latent_shape": shape, "cluster_sizes": sizes, "prototypes": latents}
    return json.dumps(facts).encode()


SPOILT = [b"[1]", text([]), text([["x"]]), text([[1.0]], shape=(2, 2, 2))]
SPOILT += [text([[1.0]], sizes=(1, 2)), text([[1e9]])]  # the last is infinite in fp16


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("data", SPOILT)
def test_a_spoilt_prototype_file_is_one_line(data, refused):
    for name in ("a/0000_x.json", "a/0000_x.safetensors"):
        refused(lambda argv: read_class(*argv, data), [name], name)


def folder_of(prototypes, dataset, folders, prompts):
    """A prototype folder of other classes, as if stage 1 had made it: those of the fixture anew."""
    mine, classes = copy(prototypes, "."), []
    for n, (folder, prompt) in enumerate(zip(folders, prompts)):
        found, _ = read_class(prototypes / f"000{n % 3}_{n % 3}.json")
        facts = {"class_index": n, "folder": folder, "prompt": prompt}
        found = found._replace(latents=found.latents + np.float16(n))
        (mine / f"{n:04d}_{folder}.json").write_bytes(class_bytes(found, facts))
        classes.append({"index": n, "folder": folder, "prompt": prompt})
    entries = {
        p.name: {"size": p.stat().st_size, "sha256": files.sha256(p)} for p in mine.glob("0*")
    }
    known = [f"{n:04d}_{folder}.json" for n, folder in enumerate(folders)]
    reseal(mine, dataset=dataset, classes=classes, files={name: entries[name] for name in known})
    return mine


def test_the_releases_file_is_written_and_read_back_exactly(prototypes, refused):
    digits = known_prompts("digits")
    mine = folder_of(prototypes, "digits", digits, digits.values())
    prototype_files.main([str(mine), "release.json"])
    assert list(files.read_json("release.json")) == list(digits.values())
    theirs, ours = ReleaseFile("release.json", "digits"), PrototypeFolder(mine)
    assert theirs.classes == ours.classes and theirs.latent_shape == ours.latent_shape == (4, 8, 8)
    for n in range(10):
        assert theirs[n].latents.tobytes() == ours[n].latents.tobytes()
    refused(prototype_files.main, [mine, "."], "is a folder")
    refused(prototype_files.main, [prototypes, "other.json"], "3 of the 10 classes of digits")
    classes = [{**c, "prompt": "zero"} if c["index"] == 3 else c for c in ours.classes]
    reseal(mine, classes=classes)
    refused(prototype_files.main, [mine, "other.json"], "two classes", "'zero'")


ONE = np.zeros((1, 4, 2, 2))


def test_the_place_of_a_key_is_its_class_whatever_it_says():
    """The release's cifar-100.txt is in the order of superclasses: `beaver` holds class 0."""
    theirs = {"beaver": ONE, "dolphin": ONE + 1, **{f"x{n}": ONE + n for n in range(2, 100)}}
    files.write("r.json", json.dumps({key: rows.tolist() for key, rows in theirs.items()}))
    ours = known_prompts("cifar100")
    for keys, prompts in ((False, ours.values()), (True, theirs)):
        source = ReleaseFile("r.json", "cifar100", keys)
        assert [c["prompt"] for c in source.classes] == list(prompts)
        assert [c["folder"] for c in source.classes] == list(ours)
        assert [source[n].latents.ravel()[0] for n in range(100)] == list(range(100))
    source = ReleaseFile("r.json", "imagefolder")  # numbered in the file's order
    assert source.classes[2] == {"index": 2, "folder": "0002", "prompt": "x2"}


RELEASE = {  # text of the file, what the line says
    "fewer keys": ({"crane": ONE.tolist()}, "1 keys, digits has 10 classes", "share a prompt"),
    "nothing": ({}, "expected a JSON object"),
    "shapes": ({f"{n}": ONE.tolist() * (1 + n // 9) for n in range(10)}, "not rectangular lists"),
    "numbers": ({f"{n}": (ONE + 1e9 * (n > 8)).tolist() for n in range(10)}, "'9': holds NaN"),
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("what", RELEASE)
def test_a_release_file_that_cannot_be_used(what, refused):
    table, *words = RELEASE[what]
    files.write("r.json", json.dumps(table))
    refused(lambda argv: ReleaseFile(*argv, "digits"), ["r.json"], "r.json", *words)
