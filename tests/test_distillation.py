"""Stages 1 and 2 end to end on digits with a tiny random Stable Diffusion: resume, processes, arms, refusals."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_tiny_sd, tree
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from distillation import distill, gen_prototype, gen_syn_image, random_real
from distillation.prototypes import PrototypeFolder
from scripts.checkpoints import load_pipeline
from scripts.files import read_json
from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline
from scripts.runtime import POSTERIOR, generator

CLASSES = ["--dataset", "digits", "--classes", "0-2"]
STAGE_1 = [
    *CLASSES,
    "--ipc",
    "2",
    "--km_expand",
    "2",
    "--max_images_per_class",
    "9",
    "--batch_size",
    "4",
    "--num_workers",
    "0",
]
STAGE_2 = ["--dataset", "digits", "--ipc", "2", "--km_expand", "2", "--num_inference_steps", "5", "--batch_size", "4"]
NAME_1 = "digits-ipc2-kmexpand2_classes-0-2_max9"
NAME_2 = "digits_ipc2_s0.7_g8_kmexpand2_steps5_classes-0-2_max9"


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return ["--diffusion_checkpoints_path", str(tiny_sd), "--device", "cpu"]


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """(prototype folder, image folder), made once, in one go."""
    root = tmp_path_factory.mktemp("made")
    prototypes = gen_prototype.main([*STAGE_1, *model, "--save_prototype_path", f"{root}/prototypes"])
    [images] = gen_syn_image.main(
        [*STAGE_2, *model, "--prototype_path", f"{prototypes}", "--save_init_image_path", f"{root}/images"]
    )
    return prototypes, images


def test_names_and_contents_of_the_two_folders(made):
    prototypes, images = made
    assert prototypes.name == NAME_1 and images.name == NAME_2
    assert sorted(p.name for p in prototypes.iterdir()) == [
        "0000_0.json",
        "0001_1.json",
        "0002_2.json",
        "args.json",
        "log.jsonl",
        "manifest.json",
        "timing.json",
    ]
    facts = json.loads((prototypes / "0001_1.json").read_text())
    assert (facts["class_index"], facts["folder"], facts["prompt"]) == (1, "1", "one")
    assert facts["images"] == 9 == sum(facts["cluster_sizes"]) and facts["latent_shape"] == [4, 8, 8]
    assert sorted(str(p.relative_to(images)) for p in images.rglob("*.png")) == [
        f"{c}/{c}_000{i}.png" for c in "012" for i in "01"
    ]
    with Image.open(images / "2/2_0001.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
    rows = [json.loads(line) for line in (images / "images.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows][:2] == ["0/0_0000.png", "0/0_0001.png"]
    assert {"prompt": "zero", "strength": 0.7, "guidance_scale": 8.0, "prototype": 1}.items() <= rows[1].items()
    assert len({r["seed"] for r in rows}) == 6
    sizes = json.loads((prototypes / "0000_0.json").read_text())["cluster_sizes"]
    assert [r["cluster_size"] for r in rows[:2]] == sizes
    manifest = json.loads((images / "manifest.json").read_text())
    assert manifest["stage"] == "images" and manifest["count"] == 6 and "README.md" in manifest["files"]


def test_image_folders_have_torchvisions_class_indices(made):
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(made[1])
    assert folder.classes == ["0", "1", "2"] and folder.targets == [0, 0, 1, 1, 2, 2]


def test_distill_makes_the_same_pngs_without_a_prototype_file(made, model, capsys):
    [folder] = distill.main([*STAGE_1, *model, "--num_inference_steps", "5"])
    assert capsys.readouterr().out.endswith("GiB (stages 1 and 2)\n")
    assert folder.name == made[1].name
    theirs = {k: v for k, v in tree(made[1]).items() if k.endswith(".png")}
    assert {k: v for k, v in tree(folder).items() if k.endswith(".png")} == theirs and len(theirs) == 6


def test_an_interrupted_stage_1_goes_on_to_the_same_bytes_and_encodes_only_what_is_missing(made, model, counted):
    argv = [*STAGE_1, *model]
    shutil.copytree(made[0], f"output/prototypes/{NAME_1}")
    mine = Path(f"output/prototypes/{NAME_1}")
    for name in ("manifest.json", "0001_1.json"):
        (mine / name).unlink()
    encoded = counted(AutoencoderKL, "encode")
    gen_prototype.main(argv)
    assert sum(encoded) == 9  # class 1's images, and no other
    assert tree(mine) == tree(made[0])
    del encoded[:]
    gen_prototype.main(argv)
    assert encoded == []


def test_an_interrupted_stage_2_redoes_whole_batches_and_no_other(made, model, counted):
    shutil.copytree(made[1], f"output/images/{NAME_2}")
    mine = Path(f"output/images/{NAME_2}")
    for name in ("manifest.json", "images.jsonl", "1/1_0001.png"):  # batch 0 holds images 0-3, batch 1 images 4-5
        (mine / name).unlink()
    (mine / "2/.2_0000.png.some-host.1.tmp").write_bytes(b"half")
    calls = counted(UNet2DConditionModel, "forward")
    gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(made[0])])
    assert calls and set(calls) == {8}  # four images, twice for guidance
    assert tree(mine) == tree(made[1])


def test_text_is_encoded_once_a_class(made, model, counted):
    calls = counted(CLIPTextModel, "forward")
    gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(made[0])])
    assert len(calls) == 4  # three classes and the negative prompt


@pytest.mark.parametrize("world", [2, 5])
def test_any_number_of_processes_makes_the_same_bytes(made, model, monkeypatch, world):
    """Ranks one after the other; with 5 of them some have nothing to do."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        prototypes = gen_prototype.main([*STAGE_1, *model])
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        [images] = gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(prototypes)])
    assert tree(prototypes) == tree(made[0]) and tree(images) == tree(made[1])


def test_without_kmeans_the_random_real_images_go_through_the_vae(model, counted, tmp_path):
    """`--kmeans none` then `--arm decoded`: the images of random_real, encoded and decoded, and no others."""
    flags = [*CLASSES, "--ipc", "3", "--seed", "5"]
    encoded = counted(AutoencoderKL, "encode")
    stage_1 = [*flags, "--kmeans", "none", "--km_expand", "1", "--num_workers", "0", "--latent_cache", "cache"]
    prototypes = gen_prototype.main([*stage_1, *model, "--batch_size", "4"])
    assert prototypes.name == "digits-ipc3-kmexpand1_seed5_kmeans-none_classes-0-2" and sum(encoded) == 9
    assert not Path("cache").exists()  # whole classes only
    stage_2 = ["--dataset", "digits", "--ipc", "3", "--km_expand", "1", "--seed", "5", "--arm", "decoded"]
    [decoded] = gen_syn_image.main([*stage_2, "--prototype_path", str(prototypes), *model])
    assert decoded.name == "digits_ipc3_decoded_seed5_kmeans-none_classes-0-2"
    real = random_real.main([*flags, "--device", "cpu"])
    pipeline, _ = load_pipeline(
        StableDiffusionGenLatentsPipeline, model[1], torch.device("cpu"), "fp32", vae_only=True
    )
    for c, (_, p) in enumerate(PrototypeFolder(prototypes).stream(range(3))):
        pixels = np.stack([np.array(Image.open(real / f"{c}/{c}_000{i}.png")) for i in range(3)])
        draws = [generator(5, POSTERIOR, c, i) for i in range(3)]
        latents = pipeline(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, draws).half().numpy()  # (3, 4, 8, 8)
        apart = torch.cdist(*(torch.from_numpy(x).float().flatten(1) for x in (p.latents, latents)))  # (3, 3)
        assert sorted(apart.argmin(1).tolist()) == [0, 1, 2] and apart.amin(1).max() < 0.01 < 1 < apart.median()


def test_the_latent_cache_serves_another_ipc_without_encoding(made, model, counted):
    encoded = counted(AutoencoderKL, "encode")
    gen_prototype.main([*STAGE_1, *model, "--latent_cache", "cache"])
    assert sum(encoded) == 27
    del encoded[:]
    argv = [*STAGE_1, *model, "--ipc", "3", "--save_prototype_path"]
    cached = gen_prototype.main([*argv, "a", "--latent_cache", "cache"])
    assert encoded == []
    assert tree(cached) == tree(gen_prototype.main([*argv, "b"]))
    gen_prototype.main([*argv, "c", "--latent_cache", "cache", "--seed", "1"])  # other latents: not from this cache
    assert sum(encoded) == 54


def test_what_cached_latents_took_is_known_to_who_uses_them(model, monkeypatch):
    """Figure 8 draws IPC 3 at the time that its prototypes would have taken without the run before."""
    monkeypatch.setattr(gen_prototype, "Stopwatch", lambda: SimpleNamespace(seconds=100.0))
    first = gen_prototype.main([*STAGE_1, *model, "--latent_cache", "cache", "--save_prototype_path", "p"])
    assert "cached_seconds" not in read_json(first / "timing.json")
    argv = [*STAGE_1, *model, "--ipc", "3", "--latent_cache", "cache", "--save_prototype_path"]
    assert read_json(gen_prototype.main([*argv, "a"]) / "timing.json")["cached_seconds"] == 3 * 100.0
    [log] = Path("cache").glob("*/log.jsonl")
    log.unlink()  # a cache of before
    assert read_json(gen_prototype.main([*argv, "b"]) / "timing.json")["cached_seconds"] is None
    argv = [*STAGE_1, *model, "--ipc", "3", "--latent_cache", "cache", "--num_inference_steps", "5"]
    [both] = distill.main([*argv, "--save_init_image_path", "c"])
    assert read_json(both / "timing.json")["cached_seconds"] is None


def test_readers_start_before_the_first_class_is_handed_out(model, monkeypatch):
    """Also if it comes from the cache: the caller's thread of k-means runs from then on, and a fork would copy it."""
    started = []

    class Loader(gen_prototype.DataLoader):
        def __iter__(self):
            started.append(self.batch_sampler)
            return super().__iter__()

    class Cache(dict):
        load, save = dict.get, lambda self, *_: None

    monkeypatch.setattr(gen_prototype, "DataLoader", Loader)
    split = gen_prototype.open_training_split(gen_prototype.get_args([*STAGE_1, *model]))
    pipeline, _ = load_pipeline(
        StableDiffusionGenLatentsPipeline, model[1], torch.device("cpu"), "fp32", vae_only=True
    )
    kept = {0: (np.zeros((9, 4, 8, 8), np.float16), [])}
    classes = gen_prototype.class_latents(pipeline, split, [0, 1], 32, 4, 0, Cache(kept), quiet=True)
    assert next(classes)[0] == 0 and len(started) == 1 and started[0][0][0][0] == 1
    assert next(classes)[1].shape == (9, 4, 8, 8)
    assert [p for p, *_ in gen_prototype.class_latents(None, split, [0], 32, 4, 0, Cache(kept))] == [0]


def test_the_arms_without_prototypes_start_from_pure_noise(made, model):
    folders = gen_syn_image.main(
        [*STAGE_2, *model, "--prototype_path", str(made[0]), "--arm", "decoded", "noise", "text"]
    )
    assert [f.name for f in folders] == [
        "digits_ipc2_decoded_steps5_kmexpand2_classes-0-2_max9",
        "digits_ipc2_noise_steps5_classes-0-2",
        "digits_ipc2_text_steps5_classes-0-2",
    ]
    pictures = {f.name: (f / "0/0_0000.png").read_bytes() for f in [*folders, made[1]]}
    assert len(set(pictures.values())) == 4


def test_noise_and_text_do_not_depend_on_the_prototypes(made, model):
    from distillation.gen_syn_image import Job, Synthesizer
    from scripts.checkpoints import load_pipeline
    from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline

    pipeline, _ = load_pipeline(StableDiffusionLatents2ImgPipeline, model[1], torch.device("cpu"), "fp32")
    source, job = PrototypeFolder(made[0]), Job(0, 0, "0", "zero", 0, 0)
    other = {0: source[1]}
    for arm, same in (("d4m", False), ("decoded", False), ("noise", True), ("text", True)):
        make = Synthesizer(pipeline, arm, 0, 0.7, 8.0, 5, "")
        assert np.array_equal(make([job], {0: source[0]}), make([job], other)) is same


def test_fewer_prototypes_than_images_give_several_noises_each(made, model):
    argv = [
        "--dataset",
        "digits",
        "--ipc",
        "4",
        "--num_prototypes",
        "2",
        "--km_expand",
        "2",
        "--num_inference_steps",
        "2",
    ]
    [folder] = gen_syn_image.main([*argv, *model, "--prototype_path", str(made[0])])
    assert "_protos2_" in folder.name
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()][:4]
    assert [r["prototype"] for r in rows] == [0, 1, 0, 1] and len({r["seed"] for r in rows}) == 4


def test_random_real_images_are_the_data_sets_own_and_change_with_the_seed():
    first = random_real.main([*CLASSES, "--ipc", "3", "--image_size", "8"])
    second = random_real.main([*CLASSES, "--ipc", "3", "--image_size", "8", "--seed", "1"])
    assert first.name == "digits_ipc3_random_imagesize8_classes-0-2" and second.name.endswith(
        "_seed1_imagesize8_classes-0-2"
    )
    from distillation.datasets import open_split

    split = open_split("digits", None)
    real = {split.arrays[row].tobytes() for row in split.items[1]}
    chosen = [np.array(Image.open(p)).tobytes() for p in sorted((first / "1").iterdir())]
    assert len(set(chosen)) == 3 and set(chosen) <= real
    assert chosen != [np.array(Image.open(p)).tobytes() for p in sorted((second / "1").iterdir())]


def test_a_resume_takes_the_folders_batch_size(made, model, capsys):
    shutil.copytree(made[1], f"output/images/{NAME_2}")
    mine = Path(f"output/images/{NAME_2}")
    for name in ("manifest.json", "0/0_0000.png"):
        (mine / name).unlink()
    gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(made[0]), "--batch_size", "1"])
    assert "--batch_size 1: output/images" in capsys.readouterr().err
    assert tree(mine) == tree(made[1])


def test_distill_resumes_with_the_folders_batch_size(made, model, capsys):
    argv = [*STAGE_1, *model, "--num_inference_steps", "5"]
    [folder] = distill.main(argv)
    whole = tree(folder)
    for name in ("manifest.json", "0/0_0000.png"):
        (folder / name).unlink()
    distill.main([*argv, "--batch_size", "1"])
    assert "was begun with 4" in capsys.readouterr().err
    assert tree(folder) == whole


def test_the_keys_of_all_draws_differ_pairwise():
    """Also after numpy's zero padding: (0, 5) and (0, 5, 0) seed alike, so the second number tells the uses apart."""
    from scripts import runtime

    streams = [
        runtime.SHUFFLE,
        runtime.POSTERIOR,
        runtime.SYNTHESIS,
        runtime.START,
        runtime.CHOICE,
        runtime.ORDER,
        runtime.BATCH,
        runtime.JITTER,
        runtime.WEIGHTS,
        runtime.DROPOUT,
        runtime.AUGMENT,
        runtime.STM,
    ]
    assert len(set(streams)) == len(streams) and 0 not in streams
    keys = [(seed, stream, a, b) for seed in range(2) for stream in streams for a in range(3) for b in range(3)]
    assert len({runtime.seed_of(*key) for key in keys}) == len(keys)


def test_running_out_of_memory_is_remembered(capsys):
    from scripts.runtime import MemoryLimit, in_parts

    calls, limit = [], MemoryLimit(32)

    def fits_eight(items):
        calls.append(len(items))
        if len(items) > 8:
            raise torch.OutOfMemoryError
        return list(items)

    for _ in range(2):
        assert sum(in_parts(fits_eight, list(range(20)), limit), []) == list(range(20))
    assert calls == [20, 10, 5, 5, 5, 5, 5, 5, 5, 5]
    assert capsys.readouterr().err.count("out of GPU memory") == 2


def test_a_rerun_needs_space_only_for_what_is_missing(tmp_path, refused, monkeypatch):
    from scripts import files

    monkeypatch.setattr(files, "free_space", lambda folder: 60)
    refused(lambda argv: files.require_space("--out", tmp_path, 100, ["a", "b"]), [], "--out", "needs about")
    (tmp_path / "a").touch()
    files.require_space("--out", tmp_path, 100, ["a", "b"])


def test_what_does_not_fit_is_refused_in_one_line(made, model, refused, tmp_path):
    prototypes = str(made[0])
    stage_2 = [*STAGE_2, *model, "--prototype_path"]
    refused(gen_syn_image.main, [*stage_2, prototypes, "--ipc", "3"], "--ipc 3", "holds 2 a class")
    refused(gen_syn_image.main, [*stage_2, prototypes, "--km_expand", "1"], "--km_expand 1", "was made with 2")
    refused(
        gen_syn_image.main, [*stage_2, prototypes, "--dataset", "cifar10"], "--dataset cifar10", "made from digits"
    )
    refused(gen_syn_image.main, [*stage_2, "nowhere"], "--prototype_path nowhere", "no such folder")
    refused(gen_syn_image.main, [*stage_2, prototypes, "--strength", "1.5"], "--strength", "1.5")
    refused(gen_syn_image.main, [*stage_2, prototypes, "--streng", "0.5"], "--streng")
    refused(gen_prototype.main, [*STAGE_1, *model, "--ipc", "10"], "--ipc 10", "class 0", "9 images")
    refused(gen_prototype.main, ["--dataset", "cifar10", "--ipc", "1"], "--data_dir", "cifar-10-batches-py")
    refused(gen_prototype.main, [*STAGE_1, *model, "--kmeans_device", "cuda"], "--kmeans_device cuda", "cpu")
    refused(gen_prototype.main, [*STAGE_1, *model, "--kmeans_device", "gpu"], "--kmeans_device")
    refused(gen_prototype.main, ["--dataset", "mnist"], "--dataset mnist", "imagenet")
    other = build_tiny_sd(tmp_path, seed=1)
    argv = [*STAGE_2, "--device", "cpu", "--diffusion_checkpoints_path", other, "--prototype_path", prototypes]
    line = refused(gen_syn_image.main, argv, "VAE")
    assert PrototypeFolder(made[0]).vae_sha256[:12] in line


def test_an_unfinished_prototype_folder_is_no_input(made, model, refused):
    shutil.copytree(made[0], "half")
    (Path("half") / "manifest.json").unlink()
    refused(gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", "half"], "half", "not finished")


def test_a_folder_of_other_settings_is_refused_with_both_values(made, model, refused):
    shutil.copytree(made[0], f"output/prototypes/{NAME_1}")
    argv = [*STAGE_1, *model, "--on_small_class", "repeat"]
    refused(gen_prototype.main, argv, "on_small_class", '"error"', '"repeat"')


def test_small_classes_can_be_repeated(model):
    folder = gen_prototype.main([*STAGE_1, *model, "--ipc", "11", "--on_small_class", "repeat"])
    latents = PrototypeFolder(folder)[0].latents
    assert len(latents) == 11 and np.array_equal(latents[:2], latents[9:])
