"""Stage 1 end to end: names, resume, processes, the latent cache, bad images, small classes."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from distillation import distill, gen_prototype, random_real
from distillation.prototype_files import PrototypeFolder
from scripts import files, generators, output
from scripts.runtime import POSTERIOR, generator
from tests.conftest import STAGE_1, build_tiny_sd, copy, picture, picture_folder, tree
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


def close(folder, other):
    """Whether two prototype folders hold nearly the same."""
    pairs = [(PrototypeFolder(folder)[n], PrototypeFolder(other)[n]) for n in range(3)]
    return all(np.allclose(a.latents, b.latents, atol=2e-3) for a, b in pairs)


def test_the_folder_of_stage_1(prototypes):
    assert prototypes.name == "digits-ipc2-kmexpand2_classes-0-2_max12"
    names = ["0000_0.json", "0001_1.json", "0002_2.json", "args.json"]
    names += ["log.jsonl", "manifest.json", "timing.json"]
    assert sorted(p.name for p in prototypes.iterdir()) == names
    facts = files.read_json(prototypes / "0001_1.json")
    assert (facts["class_index"], facts["folder"], facts["prompt"]) == (1, "1", "one")
    assert facts["images"] == 12 == sum(facts["cluster_sizes"]) and facts["skipped"] == []
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
    gen_prototype.main([*argv, "--batch_size", "9"])  # the folder's own is used
    gen_prototype.main(argv)
    assert sum(encoded) == 12  # class 1's images, and no other
    assert tree(mine) == tree(prototypes)


def test_shards_and_workers_make_the_same_bytes(prototypes, model):
    for shard in ("1/2", "0/2"):
        argv = [*STAGE_1, *model, "--shard", shard, "--num_workers", "1"]
        folder = gen_prototype.main(argv)
        assert output.is_complete(folder) == (shard == "0/2")
    assert tree(folder) == tree(prototypes)
    other = ["--prototype_format", "safetensors", "--save_prototype_path", "other"]
    assert close(gen_prototype.main([*STAGE_1, *model, *other]), prototypes)


def test_without_kmeans_the_images_of_random_real_go_through_the_vae(model, tiny_sd):
    """`--kmeans none`: the prototypes are those images' latents, and no others."""
    flags = ["--dataset", "digits", "--classes", "0-2", "--ipc", "3", "--seed", "5"]
    stage_1 = [*flags, "--kmeans", "none", "--km_expand", "1", "--num_workers", "0", *model]
    folder = gen_prototype.main([*stage_1, "--latent_cache", "cache"])
    assert folder.name == "digits-ipc3-kmexpand1_seed5_kmeans-none_classes-0-2"
    assert not Path("cache").exists()  # whole classes only
    real, source = random_real.main(flags), PrototypeFolder(folder)
    vae = generators.load(str(tiny_sd), CPU, part="encoder")
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
    another = ["--diffusion_checkpoints_path", str(build_tiny_sd(Path("another"), seed=1))]
    for n, flags in enumerate((["--seed", "1"], another)):  # other latents: not of this cache
        gen_prototype.main([*cached, f"other{n}", *flags])
        assert sum(encoded) == 36 * (3 + n)


def test_cached_latents_are_those_of_these_images_or_none(model, refused, encoded):
    picture_folder("data", ["cat", "dog"])
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
    words = ("--latent_cache", "_cat.safetensors", "remove this file")
    refused(gen_prototype.main, [*argv, "c"], *words, "not those that were written")
    path.write_bytes(data[:-3])
    refused(gen_prototype.main, [*argv, "d"], *words)
    Path("data/train/dog/9.png").write_bytes(b"x")
    argv = of_folder(model, "--latent_cache", "new", "--save_prototype_path")
    gen_prototype.main([*argv, "e", "--on_bad_image", "skip"])
    refused(gen_prototype.main, [*argv, "f"], "dog/9.png")  # does not serve --on_bad_image error


def test_the_caches_space_is_asked_for_first(model, refused, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda folder: 15_000)  # enough for prototypes
    argv = [*STAGE_1, *model, "--latent_cache", "cache"]
    refused(gen_prototype.main, argv, "--latent_cache cache", "needs about")


# ---- sizes


def test_the_size_is_the_checkpoints_own(model, refused, tiny_sd):
    """A folder's name says it where it is not the data set's 512."""
    picture_folder("data", ["cat", "dog"])
    own = [flag for flag in of_folder(model) if flag not in ("--size", "32")]
    folder = gen_prototype.main(own)
    assert folder.name == "imagefolder-ipc2-kmexpand10_size32"
    assert output.read_manifest("", folder, "prototypes")["arguments"]["size"] == 32
    assert gen_prototype.main(of_folder(model)) == folder
    gen_prototype.main([*own, "--size", "512", "--dry_run"])
    [both] = distill.main([*own, "--num_inference_steps", "2"])
    assert both.name == "imagefolder_ipc2_s0.7_g8_kmexpand10_steps2_size32"
    silent = Path(shutil.copytree(tiny_sd, "silent"))
    config = files.read_json(silent / "unet/config.json")
    (silent / "unet/config.json").write_text(files.json_text({**config, "sample_size": None}))
    argv = [*own, "--diffusion_checkpoints_path", "silent"]
    refused(gen_prototype.main, argv, "--size: must be given")


# ---- class sizes and bad images


SIZES = ([0, 1, 2, 9, 10, 11, 49, 50, 60], [1, 2, 10, 11, 50])
EVERY = pytest.param(range(61), range(1, 51), marks=pytest.mark.slow)


@pytest.mark.parametrize("small", ["error", "repeat"])
@pytest.mark.parametrize("sizes, ipcs", [SIZES, EVERY])
def test_every_class_size_gives_prototypes_or_one_line(sizes, ipcs, small, refused):
    settings = {"km_expand": 1, "kmeans": "minibatch", "on_small_class": small}
    for size in sizes:
        latents = np.random.default_rng(size).standard_normal((size, 4, 2, 2)).astype(np.float16)
        for ipc in ipcs:
            what = (latents, {**settings, "ipc": ipc}, CPU, "c1")
            if size == 0 or (size < ipc and small == "error"):
                refused(lambda _, w=what: gen_prototype.cluster(*w), [], f"--ipc {ipc}: class c1")
                continue
            found = gen_prototype.cluster(*what)
            assert found.latents.shape == (ipc, 4, 2, 2) and np.isfinite(found.latents).all()
            assert size < ipc or found.sizes.sum() == size


def test_skip_lists_the_bad_images_and_error_names_the_first(model, refused, capsys):
    """A class of three good images and a copy, and one of three and all odd ones."""
    picture_folder("data", ["good", "odd"])
    Path("data/train/good/again.png").write_bytes(Path("data/train/good/0.png").read_bytes())
    bad = ["zz.png"]
    for n, (file, data, found) in enumerate(ODD.values()):
        Path(f"data/train/odd/{n:02d}_{file}").write_bytes(data)
        bad += [f"{n:02d}_{file}"] * (found is None)
    os.symlink("/gone", "data/train/odd/zz.png")
    folder = gen_prototype.main(of_folder(model, "--on_bad_image", "skip"))
    assert "warning: class good: 1 of 4 images are copies" in capsys.readouterr().err
    facts = files.read_json(folder / "0001_odd.json")
    assert sorted(Path(path).name for path in facts["skipped"]) == sorted(bad)
    assert facts["images"] == 3 + len(ODD) + 1 - len(bad) == sum(facts["cluster_sizes"])
    refused(gen_prototype.main, of_folder(model), "data/train/odd/zz.png: No such file")
    Path("data/train/odd/zz.png").unlink()
    again = of_folder(model, "--save_prototype_path", "again")
    line = refused(gen_prototype.main, again, "--on_bad_image skip")
    assert any(f"data/train/odd/{name}" in line for name in bad)
    assert not list(Path("again").rglob("0001*"))


def test_two_classes_with_one_prompt_stay_two_classes(prototypes, model, capsys):
    prompts = ["crane", "crane", *"two three four five six seven eight nine".split()]
    Path("labels.txt").write_text("\n".join(prompts))
    folder = gen_prototype.main([*STAGE_1, *model, "--label_file_path", "labels.txt"])
    assert "classes 0 and 1 share the prompt 'crane'" in capsys.readouterr().err
    assert close(folder, prototypes)


# ---- latents that are not finite, memory


@pytest.fixture
def changed_encode(monkeypatch):
    """changed_encode(f): StableDiffusion.encode becomes f(images, latents)."""
    original = generators.StableDiffusion.encode

    def change(function):
        def encode(self, images, draws):
            return function(images, original(self, images, draws))

        monkeypatch.setattr(generators.StableDiffusion, "encode", encode)

    return change


def test_latents_that_are_not_finite_are_made_again_in_fp32(
    prototypes, model, changed_encode, capsys, refused
):
    """The first answers for 10 images of the 36 hold NaN or infinity; asked again all is well."""
    spoilt, values = [], [float("nan"), float("inf"), -float("inf")]

    def spoil(images, latents):
        if len(images) > 1:  # a batch, not a second try
            for row in range(min(len(images), 10 - len(spoilt))):
                latents[row, row % 4, 0, row] = values[row % 3]
                spoilt.append(row)
        return latents

    changed_encode(spoil)
    folder = gen_prototype.main([*STAGE_1, *model])
    assert capsys.readouterr().err.count("made again in fp32") == 10 == len(spoilt)
    assert close(folder, prototypes)
    changed_encode(lambda images, latents: latents * float("nan"))
    argv = [*STAGE_1, *model, "--save_prototype_path", "again"]
    refused(gen_prototype.main, argv, "image ", "of digits train", "NaN or infinity, in fp32 too")
    assert not list(Path("again").rglob("0000*"))


def test_out_of_gpu_memory_halves_the_batch(prototypes, model, changed_encode, capsys):
    def one_at_a_time(images, latents):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return latents

    changed_encode(one_at_a_time)
    folder = gen_prototype.main([*STAGE_1, *model])
    assert capsys.readouterr().err.count("out of GPU memory") == 2  # 4, 2: remembered
    assert close(folder, prototypes)


# ---- what is refused


def test_a_run_does_not_go_on_over_other_images(model, refused):
    picture_folder("data", ["cat", "dog"])
    folder = gen_prototype.main(of_folder(model))
    for name in ("manifest.json", "0001_dog.json"):
        (folder / name).unlink()
    Image.fromarray(picture(9)).save("data/train/dog/0.png", compress_level=0)
    refused(gen_prototype.main, of_folder(model), "begun with images")


FLAGS = {
    "--ipc 13": "class 0 has only 12 images",
    "--size 30": "multiple of 4",
    "--kmeans_device cuda": "encoding runs on cpu",
    "--dataset mnist": "imagenet",
    "--label_file_path gone.txt": "No such file",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_do_not_fit(flags, model, refused):
    argv = [*STAGE_1, *model, *flags.split()]
    refused(gen_prototype.main, argv, flags.split()[1], FLAGS[flags])
    assert not Path("output").exists()
