"""K-means is scikit-learn's own sequence of calls, on the CPU and in the port; prototype files keep every bit."""

import contextlib
import json

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans

from distillation import prototypes as module
from distillation.prototypes import (
    PrototypeFolder,
    Prototypes,
    ReleaseFile,
    class_file,
    class_prototypes,
    read_class,
    write_class,
)
from scripts.files import write_manifest


def latents(n, seed=0, shape=(4, 4, 4), modes=5):
    """n latents in clusters of very unequal size, as fp16."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((modes, *shape)) * 3
    which = np.minimum(random.geometric(0.5, n) - 1, modes - 1)
    return (centres[which] + random.standard_normal((n, *shape))).astype(np.float16)


def sklearn_sequence(data, k, batch_size):
    """The release's loop, with the last short buffer fitted too."""
    kmeans = MiniBatchKMeans(n_clusters=k, random_state=0, batch_size=batch_size, n_init="auto")
    rows = data.reshape(len(data), -1)
    for start in range(0, len(rows), batch_size):
        kmeans.partial_fit(rows[start : start + batch_size])
    return kmeans.cluster_centers_.reshape(k, *data.shape[1:])


@pytest.mark.parametrize(
    "n, k, expand", [(100, 10, 1), (103, 10, 1), (137, 5, 10), (50, 50, 1), (7, 7, 10), (64, 1, 3)]
)
def test_class_prototypes_equal_sklearns_own_sequence(n, k, expand):
    data = latents(n)
    found = class_prototypes(data, k, k * expand)
    assert np.array_equal(found.latents, sklearn_sequence(data, k, k * expand).astype(np.float16))
    assert found.latents.shape == (k, 4, 4, 4) and found.latents.dtype == np.float16
    assert found.sizes.sum() == n


def test_every_image_is_fitted_also_the_last_short_buffer(monkeypatch):
    seen = []
    original = MiniBatchKMeans.partial_fit
    monkeypatch.setattr(MiniBatchKMeans, "partial_fit", lambda self, x: (seen.append(len(x)), original(self, x))[1])
    class_prototypes(latents(103), 10, 20)
    assert seen == [20] * 5 + [3]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n, k, batch", [(300, 10, 10), (333, 10, 100), (130, 50, 50), (90, 5, 7)])
def test_the_torch_port_equals_sklearn(seed, n, k, batch, monkeypatch):
    rows = np.ascontiguousarray(latents(n, seed).reshape(n, -1), dtype=np.float64)
    reassigned = []
    original = module._reassign
    monkeypatch.setattr(module, "_reassign", lambda *a, **kw: (reassigned.append(1), original(*a, **kw))[1])
    ours = module._minibatch_torch(rows, k, batch, "cpu")
    theirs = module._minibatch_sklearn(rows, k, batch)
    assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()
    assert reassigned, "this case was to exercise the random reassignment"


def test_on_a_gpu_kmeans_has_a_stream_of_its_own(monkeypatch):
    """CUDA stood in for: in the encoder's stream, k-means would wait for a batch of images at every buffer. One stream
    for all classes: each one has memory of its own."""
    streams, made, inside = [], [], []
    module._stream.cache_clear()

    @contextlib.contextmanager
    def enter(found):
        inside.append(found)
        yield
        inside.pop()

    def kmeans(rows, k, batch_size, device):
        made.append((inside[-1], device))
        return module._minibatch_sklearn(rows, k, batch_size)

    monkeypatch.setattr(torch.cuda, "Stream", lambda *how, **more: streams.append((how, more)) or len(streams))
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(module, "_minibatch_torch", kmeans)
    found = class_prototypes(latents(40), 4, 8, device="cuda")
    class_prototypes(latents(40), 4, 8, device="cuda")
    module._stream.cache_clear()
    assert streams == [(("cuda",), {"priority": -1})] and made == [(1, "cuda")] * 2 and not inside
    assert np.array_equal(found.latents, class_prototypes(latents(40), 4, 8).latents)


def test_the_nearest_centre_is_the_first_among_equals():
    rows, centres = torch.zeros(3, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    assert module._nearest(rows, centres).tolist() == [0, 0, 0]


def test_full_is_lloyds_algorithm():
    data = latents(80)
    expected = KMeans(4, random_state=0, n_init=1).fit(data.reshape(80, -1).astype(np.float64)).cluster_centers_
    found = class_prototypes(data, 4, 8, method="full")
    assert np.array_equal(found.latents.reshape(4, -1), expected.astype(np.float16))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_prototypes_survive_their_file_exactly(tmp_path, suffix):
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)][: 3 * 4 * 8 * 8 * 82].reshape(-1, 4, 8, 8)  # fp16 from 0 to 65504 and below
    written = Prototypes(every, np.arange(len(every)))
    facts = {"class_index": 3, "folder": "n01440764", "prompt": "tench, Tinca tinca"}
    write_class(tmp_path / f"0003_n01440764{suffix}", written, facts)
    read, found = read_class(tmp_path / f"0003_n01440764{suffix}")
    assert read.latents.tobytes() == every.tobytes() and np.array_equal(read.sizes, written.sizes)
    assert facts.items() <= found.items()


def test_files_hold_what_the_array_says_not_its_memory_order(tmp_path):
    turned = np.moveaxis(np.random.default_rng(0).standard_normal((2, 3, 3, 4)).astype(np.float16), 3, 1)
    assert not turned.flags["C_CONTIGUOUS"]
    for suffix in (".json", ".safetensors"):
        write_class(tmp_path / f"x{suffix}", Prototypes(turned, np.ones(2, np.int64)), {})
        assert np.array_equal(read_class(tmp_path / f"x{suffix}")[0].latents, turned)


def test_the_jsons_numbers_are_numpys_own_shortest_decimals(tmp_path):
    """All finite fp16 numbers, written by a table that is made once."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    path = tmp_path / "0000_a.json"
    write_class(path, Prototypes(numbers.reshape(2, 4, -1, 1), np.ones(2, np.int64)), {})
    lines = path.read_text().splitlines()[-3:-1]
    assert ",".join(line.strip("[],") for line in lines) == ",".join(numbers.astype("U"))
    assert module._decimals.cache_info().misses == 1


def prototype_folder(folder, classes, k=2, shape=(4, 4, 4), form="json"):
    """A finished prototype folder as stage 1 writes it."""
    folder.mkdir()
    files = []
    for n, (index, name, prompt) in enumerate(classes):
        files.append(class_file(n, name, form))
        data = Prototypes(latents(k, seed=index, shape=shape), np.ones(k, np.int64))
        write_class(folder / files[-1], data, {"class_index": index, "folder": name, "prompt": prompt})
    table = [{"index": i, "folder": f, "prompt": p} for i, f, p in classes]
    facts = {
        "dataset": "imagenet",
        "ipc": k,
        "km_expand": 1,
        "vae_sha256": "0",
        "latent_shape": shape,
        "classes": table,
    }
    write_manifest(folder, "prototypes", {"prototype_format": form, "km_expand": 1}, files, facts)
    return folder


def test_the_releases_json_is_written_and_read_back_exactly(tmp_path):
    classes = [
        (0, "n01440764", "tench, Tinca tinca"),
        (134, "n02012849", "crane, bird"),
        (517, "n03126707", "crane, machine"),
    ]
    folder = prototype_folder(tmp_path / "p", classes)
    module.main([str(folder), str(tmp_path / "release.json")])
    table = json.loads((tmp_path / "release.json").read_text())
    assert list(table) == [prompt for _, _, prompt in classes]
    release, ours = ReleaseFile(tmp_path / "release.json", "imagenet"), PrototypeFolder(folder)
    assert release.classes == ours.classes and release.latent_shape == ours.latent_shape == (4, 4, 4)
    for n in range(3):
        assert release[n].latents.tobytes() == ours[n].latents.tobytes()


def test_two_classes_with_one_prompt_do_not_fit_the_releases_form(tmp_path, refused):
    folder = prototype_folder(tmp_path / "p", [(0, "n01440764", "crane"), (1, "n01443537", "crane")])
    refused(module.main, [folder, tmp_path / "r.json"], "two classes", "'crane'")
    assert not (tmp_path / "r.json").exists()


def test_a_release_file_with_an_unknown_prompt_is_refused(tmp_path, refused):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"Europeanfiresalamander": np.zeros((1, 4, 2, 2)).tolist()}))
    refused(
        lambda argv: ReleaseFile(argv[0], "imagenet"), [path], "Europeanfiresalamander", "not a prompt of imagenet"
    )
