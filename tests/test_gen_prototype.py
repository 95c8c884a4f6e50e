"""Stage 1 end to end: names, resume, processes, the latent cache, bad images, small classes."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from distillation import gen_prototype, gen_syn_image, random_real
from distillation.prototypes import PrototypeFolder
from scripts import files, generators, output
from scripts.runtime import POSTERIOR, generator
from tests.conftest import STAGE_1, copy, everything, exits, image_folder, picture, tree
from tests.test_datasets import ODD

CPU = torch.device("cpu")


@pytest.fixture
def encoded(monkeypatch):
    """Grows by the batch size at every call of the VAE's encoder."""
    calls, original = [], AutoencoderKL.encode

    def encode(self, x, *args, **kwargs):
        calls.append(len(x))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    return calls


def of_folder(model, *more):
    """Flags of stage 1 on data/, an `imagefolder`."""
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--ipc", "2", "--size", "32"]
    return [*argv, "--num_workers", "0", *model, *map(str, more)]


def test_the_folder_of_stage_1(prototypes):
    assert prototypes.name == "digits-ipc2-kmexpand2_classes-0-2_max12"
    names = ["0000_0.json", "0001_1.json", "0002_2.json", "args.json"]
    names += ["log.jsonl", "manifest.json", "timing.json"]
    assert sorted(p.name for p in prototypes.iterdir()) == names
    facts = files.read_json(prototypes / "0001_1.json")
    assert (facts["class_index"], facts["folder"], facts["prompt"]) == (1, "1", "one")
    assert facts["images"] == 12 == sum(facts["cluster_sizes"])
    assert facts["latent_shape"] == [4, 8, 8] and facts["skipped"] == []
    source = PrototypeFolder(prototypes)
    assert source.per_class == 2 and source.real_images == 36
    assert source.latent_shape == (4, 8, 8) and len(source.vae_sha256) == 64


def test_an_interrupted_run_goes_on_to_the_same_bytes_and_encodes_what_is_missing(
    prototypes, model, encoded
):
    mine = copy(prototypes, "output")
    argv = [*STAGE_1, *model, "--save_prototype_path", "output"]
    for name in ("manifest.json", "0001_1.json"):
        (mine / name).unlink()
    gen_prototype.main(argv)
    assert sum(encoded) == 12  # class 1's images, and no other
    assert tree(mine) == tree(prototypes)
    gen_prototype.main(argv)
    assert sum(encoded) == 12


def test_shards_and_workers_make_the_same_bytes(prototypes, model):
    for shard in ("1/2", "0/2"):
        argv = [*STAGE_1, *model, "--shard", shard, "--num_workers", "1"]
        folder = gen_prototype.main(argv)
        assert output.is_complete(folder) == (shard == "0/2")
    assert tree(folder) == tree(prototypes)


def test_safetensors_hold_the_same_prototypes(prototypes, model):
    folder = gen_prototype.main([*STAGE_1, *model, "--prototype_format", "safetensors"])
    ours, theirs = PrototypeFolder(folder), PrototypeFolder(prototypes)
    for n in range(3):
        assert ours[n].latents.tobytes() == theirs[n].latents.tobytes()


def test_a_dry_run_says_what_it_would_make_and_writes_nothing(model, capsys, prototypes):
    before = everything(".")
    with exits(0):
        gen_prototype.main([*STAGE_1, *model, "--dry_run", "--latent_cache", "cache"])
    printed = capsys.readouterr().out
    assert f"output/prototypes/{prototypes.name}: 0 done, 3 to do" in printed
    assert everything(".") == before


def test_without_kmeans_the_images_of_random_real_go_through_the_vae(model, tiny_sd):
    """`--kmeans none`, then `--arm decoded`: those images, encoded and decoded, and no others."""
    flags = ["--dataset", "digits", "--classes", "0-2", "--ipc", "3", "--seed", "5"]
    stage_1 = [*flags, "--kmeans", "none", "--km_expand", "1", "--num_workers", "0", *model]
    folder = gen_prototype.main([*stage_1, "--latent_cache", "cache"])
    assert folder.name == "digits-ipc3-kmexpand1_seed5_kmeans-none_classes-0-2"
    assert not Path("cache").exists()  # whole classes only
    stage_2 = ["--dataset", "digits", "--ipc", "3", "--km_expand", "1", "--seed", "5", *model]
    stage_2 += ["--prototype_path", str(folder), "--arm", "decoded"]
    [decoded] = gen_syn_image.main(stage_2)
    assert decoded.name == "digits_ipc3_decoded_seed5_kmeans-none_classes-0-2"
    real = random_real.main(flags)
    vae, source = generators.load(str(tiny_sd), CPU, part="encoder"), PrototypeFolder(folder)
    for c in range(3):
        pixels = [np.array(Image.open(real / f"{c}/{c}_000{i}.png")) for i in range(3)]
        pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        latents = vae.encode(pixels, [generator(5, POSTERIOR, c, i) for i in range(3)])
        ours = torch.from_numpy(source[c].latents).float().flatten(1)
        apart = torch.cdist(ours, latents.flatten(1))  # (3, 3)
        assert sorted(apart.argmin(1).tolist()) == [0, 1, 2]
        assert apart.amin(1).max() < 0.01 < 1 < apart.median()


# ---- the latent cache


def test_the_cache_serves_another_ipc_without_encoding(model, encoded):
    cached = [*STAGE_1, *model, "--latent_cache", "cache", "--save_prototype_path"]
    first = gen_prototype.main([*cached, "first"])
    assert "cached_seconds" not in files.read_json(first / "timing.json")
    again = gen_prototype.main([*cached, "again", "--ipc", "3"])
    assert sum(encoded) == 36
    [log] = Path("cache").glob("*/log.jsonl")
    took = sum(row["seconds"] for row in output.log_rows(log.parent))
    assert files.read_json(again / "timing.json")["cached_seconds"] == round(took, 2)
    plain = gen_prototype.main([*STAGE_1, *model, "--ipc", "3", "--save_prototype_path", "plain"])
    assert tree(again) == tree(plain)
    gen_prototype.main([*cached, "other", "--seed", "1"])  # other latents: not of this cache
    assert sum(encoded) == 36 * 3


def test_cached_latents_are_those_of_these_images_or_none(model, refused, encoded):
    image_folder("data", ["cat", "dog"])
    argv = of_folder(model, "--latent_cache", "cache", "--save_prototype_path")
    gen_prototype.main([*argv, "a"])
    assert sum(encoded) == 6
    Image.open("data/train/dog/0.png").rotate(90).save("data/train/dog/0.png")
    gen_prototype.main([*argv, "b"])
    assert sum(encoded) == 6 + 3
    [path] = Path("cache").rglob("*_cat.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    words = ("--latent_cache", "_cat.safetensors", "not those that were written")
    refused(gen_prototype.main, [*argv, "c"], *words)
    path.write_bytes(data[:-3])
    refused(gen_prototype.main, [*argv, "d"], *words[:2], "remove this file")


def test_readers_start_before_a_cached_class_is_handed_out(model, tiny_sd, monkeypatch):
    """The thread of k-means runs from then on, and a fork would copy its locks."""
    started = []

    class Loader(gen_prototype.DataLoader):
        def __iter__(self):
            started.append(self.batch_sampler)
            return super().__iter__()

    class Cache(dict):
        folder, load, save = Path("."), dict.get, lambda self, *_: None

    monkeypatch.setattr(gen_prototype, "DataLoader", Loader)
    settings = gen_prototype.get_args([*STAGE_1, *model]).settings
    split, vae = gen_prototype.open_images(settings, None), generators.load(str(tiny_sd), CPU)
    kept = Cache({0: (np.zeros((12, 4, 8, 8), np.float16), [])})
    classes = gen_prototype.class_latents(vae, split, [0, 1], settings, kept)
    assert next(classes)[0] == 0 and len(started) == 1 and started[0][0][0][0] == 1
    assert next(classes)[1].shape == (12, 4, 8, 8)


# ---- class sizes and bad images


def outcomes(sizes, ipcs, capsys):
    """How many of (class size, ipc, --on_small_class) end in prototypes."""
    made, settings = 0, {"km_expand": 1, "kmeans": "minibatch"}
    for size in sizes:
        latents = np.random.default_rng(size).standard_normal((size, 4, 2, 2)).astype(np.float16)
        for ipc in ipcs:
            for small in ("error", "repeat"):
                s = {**settings, "ipc": ipc, "on_small_class": small}
                try:
                    found = gen_prototype.cluster(latents, s, CPU, "c1")
                except SystemExit as leaving:
                    assert leaving.code == 2 and (size == 0 or (size < ipc and small == "error"))
                    line = capsys.readouterr().err
                    assert line.count("\n") == 1 and f"--ipc {ipc}: class c1" in line
                    continue
                assert found.latents.shape == (ipc, 4, 2, 2) and np.isfinite(found.latents).all()
                assert size < ipc or found.sizes.sum() == size
                made += 1
    return made


def test_every_class_size_gives_prototypes_or_one_line(capsys):
    sizes, ipcs = [0, 1, 2, 9, 10, 11, 49, 50, 60], [1, 2, 10, 11, 50]
    assert outcomes(sizes, ipcs, capsys) == 90 - 10 - 14


@pytest.mark.slow
def test_class_sizes_0_to_60_by_ipc_1_to_50(capsys):
    fits = sum(min(50, size) for size in range(61))
    assert outcomes(range(61), range(1, 51), capsys) == fits + 60 * 50


def test_small_classes_can_be_repeated(model):
    folder = gen_prototype.main([*STAGE_1, *model, "--ipc", "14", "--on_small_class", "repeat"])
    latents = PrototypeFolder(folder)[0].latents
    assert len(latents) == 14 and np.array_equal(latents[:2], latents[12:])


def odd_data_set():
    """A class of three good images, and one of three and all odd ones; names of the bad ones."""
    image_folder("data", ["good", "odd"])
    names = [f"{n:02d}_{file}" for n, (file, _, _) in enumerate(ODD.values())]
    for name, (_, data, _) in zip(names, ODD.values()):
        Path("data/train/odd", name).write_bytes(data)
    os.symlink("/gone", "data/train/odd/zz.png")
    bad = [name for name, (_, _, picture) in zip(names, ODD.values()) if picture is None]
    return [*bad, "zz.png"]


def test_skip_leaves_out_the_bad_images_with_a_list_and_error_names_the_first(model, refused):
    bad = odd_data_set()
    folder = gen_prototype.main(of_folder(model, "--on_bad_image", "skip"))
    facts = files.read_json(folder / "0001_odd.json")
    assert sorted(path.rsplit("/", 1)[1] for path in facts["skipped"]) == bad and len(bad) == 12
    assert facts["images"] == 3 + len(ODD) - 11 == sum(facts["cluster_sizes"])
    refused(gen_prototype.main, of_folder(model), "data/train/odd/zz.png: No such file")
    Path("data/train/odd/zz.png").unlink()
    again = of_folder(model, "--save_prototype_path", "again")
    line = refused(gen_prototype.main, again, "--on_bad_image skip")
    assert any(f"data/train/odd/{name}" in line for name in bad)


@pytest.mark.parametrize("name", [name for name, (*_, picture) in ODD.items() if picture is None])
def test_each_bad_image_alone_stops_the_run_with_its_path(name, refused, tiny_sd, monkeypatch):
    model = stand_in_model(monkeypatch)
    file, data, _ = ODD[name]
    path = image_folder("data", ["c"]) + f"/train/c/{file}"
    Path(path).write_bytes(data)
    refused(gen_prototype.main, of_folder(model), path)
    assert not list(Path("output").rglob("0000*"))


def stand_in_model(monkeypatch):
    """A generator that only halves images, for runs that must not get far."""
    facts = {"vae_sha256": "0", "precision": "fp32"}
    model = SimpleNamespace(facts=facts, device=CPU, latent_shape=lambda size: (3, size, size))
    model.encode = lambda images, draws: images / 2
    monkeypatch.setattr(generators, "load", lambda *args, **how: model)
    return ["--device", "cpu"]


def test_identical_images_in_a_class_are_warned_about(monkeypatch, capsys):
    model = stand_in_model(monkeypatch)
    image_folder("data", ["c"])
    Path("data/train/c/again.png").write_bytes(Path("data/train/c/0.png").read_bytes())
    gen_prototype.main(of_folder(model))
    assert "warning: class c: 1 of 4 images are copies" in capsys.readouterr().err


def test_two_classes_with_one_prompt_stay_two_classes(prototypes, model, capsys):
    prompts = ["crane", "crane", *"two three four five six seven eight nine".split()]
    Path("labels.txt").write_text("\n".join(prompts))
    folder = gen_prototype.main([*STAGE_1, *model, "--label_file_path", "labels.txt"])
    assert "classes 0 and 1 share the prompt 'crane'" in capsys.readouterr().err
    ours, theirs = PrototypeFolder(folder), PrototypeFolder(prototypes)
    assert all((ours[n].latents == theirs[n].latents).all() for n in range(3))


# ---- latents that are not finite, memory


def test_latents_that_are_not_finite_are_made_again_in_fp32(prototypes, model, monkeypatch, capsys):
    """The first answers for 10 images of the 36 hold NaN or infinity; asked again all is well."""
    spoilt, original = [], generators.StableDiffusion.encode
    values = [float("nan"), float("inf"), -float("inf")]

    def encode(self, images, draws):
        latents = original(self, images, draws)
        if len(images) > 1:  # a batch, not a second try
            for row in range(min(len(images), 10 - len(spoilt))):
                latents[row, row % 4, 0, row] = values[row % 3]
                spoilt.append(row)
        return latents

    monkeypatch.setattr(generators.StableDiffusion, "encode", encode)
    source = PrototypeFolder(gen_prototype.main([*STAGE_1, *model]))
    assert capsys.readouterr().err.count("made again in fp32") == 10 == len(spoilt)
    for n in range(3):
        theirs = PrototypeFolder(prototypes)[n].latents
        assert np.allclose(source[n].latents, theirs, atol=2e-3)


def test_a_latent_that_stays_nan_is_an_error_that_names_the_image(model, monkeypatch, refused):
    def encode(self, images, draws):
        return torch.full((len(images), 4, 8, 8), float("nan"))

    monkeypatch.setattr(generators.StableDiffusion, "encode", encode)
    words = ("image ", "of digits train", "NaN or infinity, in fp32 too")
    refused(gen_prototype.main, [*STAGE_1, *model], *words)
    assert not list(Path("output").rglob("0000*"))


def test_out_of_gpu_memory_halves_the_batch(prototypes, model, monkeypatch, capsys):
    original = generators.StableDiffusion.encode

    def encode(self, images, draws):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, images, draws)

    monkeypatch.setattr(generators.StableDiffusion, "encode", encode)
    source = PrototypeFolder(gen_prototype.main([*STAGE_1, *model]))
    assert capsys.readouterr().err.count("out of GPU memory") == 2  # 4, 2: remembered
    for n in range(3):
        ours, theirs = source[n], PrototypeFolder(prototypes)[n]
        assert np.allclose(ours.latents, theirs.latents, atol=2e-3)
        assert (ours.sizes == theirs.sizes).all()


# ---- what is refused


def test_a_run_does_not_go_on_over_other_images(model, refused):
    image_folder("data", ["cat", "dog"])
    folder = gen_prototype.main(of_folder(model))
    for name in ("manifest.json", "0001_dog.json"):
        (folder / name).unlink()
    Image.fromarray(picture(9)).save("data/train/dog/0.png", compress_level=0)
    refused(gen_prototype.main, of_folder(model), "begun with images")


FLAGS = {
    "--ipc 13": ("--ipc 13", "class 0", "only 12 images"),
    "--ipc 0": ("--ipc",),
    "--size 30": ("--size 30", "multiple of 4"),
    "--kmeans_device cuda": ("--kmeans_device cuda", "cpu"),
    "--kmeans_device gpu": ("--kmeans_device",),
    "--dataset mnist": ("--dataset mnist", "imagenet"),
    "--dataset cifar10": ("--data_dir", "cifar-10-batches-py"),
    "--device meta": ("--device meta",),
    "--label_file_path gone.txt": ("gone.txt", "No such file"),
    "--classes 8-11": ("--classes 8-11", "0-9"),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_do_not_fit(flags, model, refused):
    refused(gen_prototype.main, [*STAGE_1, *model, *flags.split()], *FLAGS[flags])
    assert not Path("output").exists()


def test_a_folder_begun_with_other_settings_is_refused_with_both_values(prototypes, model, refused):
    copy(prototypes, "output/prototypes")
    argv = [*STAGE_1, *model, "--on_small_class", "repeat"]
    refused(gen_prototype.main, argv, "on_small_class", '"error"', '"repeat"')
