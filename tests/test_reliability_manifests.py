"""What does not fit is refused in one line: mismatches of model, prototypes and data; class sizes; bad latents."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tree
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from reliability import STAGE_1, STAGE_2, image_folder

from distillation import gen_prototype, gen_syn_image
from distillation.gen_prototype import check_class_sizes, prototypes_or_repeats
from distillation.prototypes import PrototypeFolder, read_class, write_class
from scripts.files import content_digest, sha256
from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline

# ---- 8 mismatches between model, prototypes and data, each injected into what our own stages made


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def prototypes(made):
    """A copy of a finished prototype folder, to be spoilt."""
    shutil.copytree(made[0], "prototypes")
    return Path("prototypes")


def signed_again(folder):
    """Somebody also mended the manifest: sizes, sha256s and content digest fit the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry.update(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
    manifest["content"] = content_digest(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_config(model, part, **values):
    """A copy of the model with other values in a part's configuration."""
    folder = Path(shutil.copytree(model[1], "other-model"))
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(folder)


def another_data_set(prototypes, model):
    return ["--dataset", "cifar10"], "--dataset cifar10", "was made from digits"


def another_ipc(prototypes, model):
    return ["--ipc", "3"], "--ipc 3", "holds 2 a class"


def another_buffer_size(prototypes, model):
    return ["--km_expand", "5"], "--km_expand 5", "was made with 2"


def weights_of_another_vae(prototypes, model):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model[1], "other-model"))
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    return ["--diffusion_checkpoints_path", str(folder)], "made with the VAE", "this checkpoint's is"


def another_scaling_factor(prototypes, model):
    other = change_config(model, "vae/config.json", scaling_factor=0.13025)
    return ["--diffusion_checkpoints_path", other], "made with the VAE", "this checkpoint's is"


def two_classes_swapped(prototypes, model):
    a, b = (prototypes / name for name in ("0000_0.json", "0001_1.json"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    signed_again(prototypes)
    return [], "0000_0.json", "class_index is 1, the manifest says 0"


def another_latent_size(prototypes, model):
    path = prototypes / "0000_0.json"
    found, facts = read_class(path)
    write_class(path, found._replace(latents=found.latents[..., :4, :4]), facts)
    signed_again(prototypes)
    return [], "0000_0.json", "(2, 4, 4, 4), expected (2, 4, 8, 8)"


def one_number_changed(prototypes, model):
    path = prototypes / "0001_1.json"
    text = path.read_text()
    at = text.index('"prototypes": [\n[') + 17
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    return [], "0001_1.json", "changed since it was made"


MISMATCHES = [
    another_data_set,
    another_ipc,
    another_buffer_size,
    weights_of_another_vae,
    another_scaling_factor,
    two_classes_swapped,
    another_latent_size,
    one_number_changed,
]


def test_there_are_8_of_them():
    assert len(MISMATCHES) == 8


@pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda f: f.__name__)
def test_a_mismatch_of_model_prototypes_and_data_is_refused_in_one_line(mismatch, prototypes, model, refused):
    more, *words = mismatch(prototypes, model)
    refused(gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", "prototypes", *more], *words)
    assert not list(Path(".").rglob("*.png")), "the mismatch was noticed after images were made"


def test_a_stage_does_not_go_on_in_a_folder_of_another_model_or_other_images(made, model, refused):
    """Resuming after the data set, the model or its scheduler changed would mix two results in one folder."""
    image_folder("data", ["cat", "dog"])
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--ipc", "2", "--size", "32", "--num_workers", "0"]
    folder = gen_prototype.main([*argv, *model])
    (folder / "manifest.json").unlink()
    (folder / "0001_dog.json").unlink()
    with Image.open("data/train/dog/0.png") as image:
        image.rotate(90).save("data/train/dog/0.png")
    refused(gen_prototype.main, [*argv, *model], "images_sha256")

    stage_2 = [*STAGE_2, "--device", "cpu", "--prototype_path", str(made[0]), "--diffusion_checkpoints_path"]
    [images] = gen_syn_image.main([*stage_2, model[1]])
    (images / "manifest.json").unlink()
    other = change_config(model, "scheduler/scheduler_config.json", beta_end=0.02)
    Path(other).rename(Path(model[1]).name)  # the same name, another schedule
    refused(gen_syn_image.main, [*stage_2, Path(model[1]).name], "scheduler_sha256")


def test_a_finished_folder_is_never_signed_again(made, model, refused):
    """Running a finished stage again makes what was removed, and refuses what was changed."""
    shutil.copytree(made[0], f"output/prototypes/{made[0].name}")
    mine = Path(f"output/prototypes/{made[0].name}")
    (mine / "0001_1.json").unlink()
    assert tree(gen_prototype.main([*STAGE_1, *model])) == tree(made[0])
    text = (mine / "0001_1.json").read_text()
    (mine / "0001_1.json").write_text(text.replace('"one"', '"two"'))
    refused(gen_prototype.main, [*STAGE_1, *model], "0001_1.json", "changed since it was made")


def test_cached_latents_are_those_of_these_images_or_none(made, model, refused, counted):
    """A cached class whose images changed is encoded again; a damaged cache file is refused, not used."""
    image_folder("data", ["cat", "dog"])
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--ipc", "2", "--size", "32", "--num_workers", "0"]
    argv += [*model, "--latent_cache", "cache", "--save_prototype_path"]
    encoded = counted(AutoencoderKL, "encode")
    gen_prototype.main([*argv, "a"])
    assert sum(encoded) == 6
    Image.open("data/train/dog/0.png").rotate(90).save("data/train/dog/0.png")
    gen_prototype.main([*argv, "b"])
    assert sum(encoded) == 6 + 3
    [path] = Path("cache").rglob("*_cat.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(gen_prototype.main, [*argv, "c"], "--latent_cache", "_cat.safetensors", "not those that were written")
    path.write_bytes(data[:-3])
    refused(gen_prototype.main, [*argv, "d"], "--latent_cache", "_cat.safetensors", "remove this file")


# ---- class sizes


class Sizes:
    """A split that knows only how many images its classes have."""

    def __init__(self, *sizes):
        self.folders = [f"c{n}" for n in range(len(sizes))]
        self.items = [range(n) for n in sizes]


def grid(sizes, ipcs, capsys):
    """Number of (size, ipc, what to do with small classes) that ended in prototypes, and that were refused."""
    made, turned_down = 0, 0
    for size in sizes:
        latents = np.random.default_rng(size).standard_normal((size, 4, 2, 2)).astype(np.float16)
        for ipc in ipcs:
            for small in ("error", "repeat"):
                try:
                    check_class_sizes(Sizes(60, size), ipc, small)
                    found = prototypes_or_repeats(latents, ipc, 1, "minibatch", torch.device("cpu"), small, "c1")
                except SystemExit as leaving:
                    assert leaving.code == 2 and (size == 0 or (size < ipc and small == "error"))
                    line = capsys.readouterr().err
                    assert line.count("\n") == 1 and "class c1" in line
                    assert size == 0 or (f"--ipc {ipc}" in line and f"only {size} images" in line)
                    turned_down += 1
                    continue
                assert size >= ipc or small == "repeat"
                assert found.latents.shape == (ipc, 4, 2, 2) and np.isfinite(found.latents).all()
                assert size < ipc or found.sizes.sum() == size
                made += 1
    return made, turned_down


def test_every_class_size_gives_prototypes_or_one_line(capsys):
    made, turned_down = grid([0, 1, 2, 9, 10, 11, 49, 50, 60], [1, 2, 10, 11, 50], capsys)
    assert made + turned_down == 90 and turned_down == 10 + 14


@pytest.mark.slow
def test_class_sizes_0_to_60_by_ipc_1_to_50(capsys):
    made, turned_down = grid(range(61), range(1, 51), capsys)
    assert made + turned_down == 61 * 50 * 2
    print(f"{made} with prototypes, {turned_down} refused, 0 tracebacks")


@pytest.mark.parametrize("k, n", [(1, 1), (2, 7), (10, 10), (10, 60)])
def test_a_class_of_one_repeated_picture_has_finite_prototypes(k, n):
    same = np.repeat(np.random.default_rng(0).standard_normal((1, 4, 2, 2)), n, 0).astype(np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn says that there are fewer distinct points than clusters
        found = prototypes_or_repeats(same, k, 1, "minibatch", torch.device("cpu"), "error", "c")
    assert np.allclose(found.latents, same[:1], atol=1e-2) and found.sizes.sum() == n


def test_small_and_empty_classes_are_named_before_anything_is_loaded(model, refused, monkeypatch):
    monkeypatch.setattr(gen_prototype, "load_pipeline", lambda *a, **k: pytest.fail("the model was loaded"))
    image_folder("data", ["big"], count=5)
    image_folder("data", ["small"], count=3)
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--size", "32", *model]
    refused(gen_prototype.main, [*argv, "--ipc", "4"], "--ipc 4", "class small", "only 3 images")
    Path("data/train/void").mkdir()
    refused(gen_prototype.main, [*argv, "--ipc", "2"], "class void has no images")
    refused(gen_prototype.main, [*argv, "--ipc", "2", "--on_small_class", "repeat"], "class void has no images")


# ---- NaN and infinity, black images, memory


def poisoned(original, calls, values, result=lambda x: x):
    """`original`, whose n-th call (n in `calls`) has one of `values` in each row of its result."""
    count = iter(range(10**6))

    def call(*args, **kwargs):
        answer, n = original(*args, **kwargs), next(count)
        if n in calls:
            result(answer)[:, ..., 0, 0] = values[n % len(values)]
        return answer

    return call


INJECTED = [float("nan"), float("inf"), -float("inf")]


def test_10_latents_that_are_not_finite_are_encoded_again_and_none_is_kept(made, model, monkeypatch, capsys):
    """The VAE's first answers for 10 images of the 27 hold NaN or infinity; asked again it is well."""
    from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline as Pipeline

    spoilt, original = [], Pipeline.__call__

    def call(self, images, generators):
        latents = original(self, images, generators)
        if len(images) > 1 and len(spoilt) < 10:  # a batch, not a second try
            for row in range(min(len(images), 10 - len(spoilt))):
                latents[row, row % 4, 0, row] = INJECTED[row % 3]
                spoilt.append(row)
        return latents

    monkeypatch.setattr(Pipeline, "__call__", call)
    folder = gen_prototype.main([*STAGE_1, *model])
    assert capsys.readouterr().err.count("encoded again in fp32") == 10 == len(spoilt)
    assert all(np.isfinite(PrototypeFolder(folder)[n].latents).all() for n in range(3))
    assert np.allclose(PrototypeFolder(folder)[0].latents, PrototypeFolder(made[0])[0].latents, atol=2e-3)


def test_a_latent_that_stays_nan_is_an_error_that_names_the_image(model, monkeypatch, refused):
    original = AutoencoderKL.encode

    def encode(self, x, *args, **kwargs):
        answer = original(self, x, *args, **kwargs)
        answer.latent_dist.mean[0] = float("nan")
        return answer

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    refused(gen_prototype.main, [*STAGE_1, *model], "image ", "of digits train", "NaN or infinity, in fp32 too")
    assert not list(Path("output").rglob("0000*"))


def synthesize(made, model, *more):
    [folder] = gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(made[0]), *more])
    return folder


def spoil_images(monkeypatch, value, times):
    """The first `times` pictures that synthesis makes are `value` throughout; returns the list of what was spoilt."""
    spoilt, original = [], StableDiffusionLatents2ImgPipeline.__call__

    def call(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        for row in range(len(answer.images)):
            if len(spoilt) < times:
                answer.images[row] = value
                spoilt.append(row)
        return answer

    monkeypatch.setattr(StableDiffusionLatents2ImgPipeline, "__call__", call)
    return spoilt


def test_5_black_images_are_drawn_again_with_another_seed(made, model, monkeypatch, capsys):
    argv = ["--batch_size", "6"]
    plain = synthesize(made, model, *argv, "--save_init_image_path", "plain")
    spoilt = spoil_images(monkeypatch, 0.0, 5)
    folder = synthesize(made, model, *argv)
    assert len(spoilt) == 5 and capsys.readouterr().err.count("drawn again with the next seed") == 5
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    assert [row["attempt"] for row in rows] == [1] * 5 + [0]
    for row in rows:
        with Image.open(folder / row["file_name"]) as image:
            assert np.array(image).min() < np.array(image).max()
    theirs = {r["file_name"]: r for r in map(json.loads, (plain / "images.jsonl").read_text().splitlines())}
    assert all((row["seed"] != theirs[row["file_name"]]["seed"]) == bool(row["attempt"]) for row in rows)


def test_images_with_nan_are_made_again_in_fp32_and_are_what_they_would_have_been(made, model, monkeypatch, capsys):
    spoilt = spoil_images(monkeypatch, float("nan"), 2)
    folder = synthesize(made, model)
    assert len(spoilt) == 2 and capsys.readouterr().err.count("made again in fp32") == 2
    assert worst_difference(folder, made[1]) <= 1


def worst_difference(folder, other):
    """Largest difference of a pixel between two image folders with the same names."""
    names = sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    assert names == sorted(p.relative_to(other) for p in other.rglob("*.png")) and names
    pairs = [[np.array(Image.open(root / name)).astype(int) for root in (folder, other)] for name in names]
    return max(np.abs(a - b).max() for a, b in pairs)


def test_an_image_that_stays_black_or_nan_is_an_error_that_names_it(made, model, monkeypatch, refused):
    argv = [*STAGE_2, *model, "--prototype_path", str(made[0])]
    spoil_images(monkeypatch, 0.0, 10**6)
    refused(gen_syn_image.main, argv, "0/0_0000.png", "still a flat picture after 3 other seeds")
    spoil_images(monkeypatch, float("nan"), 10**6)
    refused(gen_syn_image.main, argv, "0/0_0000.png", "NaN or infinity, in fp32 too")
    assert not list(Path("output").rglob("*.png"))


def small_gpu(original, limit):
    """A network that runs out of memory with more than `limit` rows."""

    def forward(self, x, *args, **kwargs):
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x, *args, **kwargs)

    return forward


def test_out_of_memory_halves_the_batch_and_makes_the_same_files(made, model, monkeypatch, capsys):
    monkeypatch.setattr(AutoencoderKL, "encode", small_gpu(AutoencoderKL.encode, 1))
    folder = gen_prototype.main([*STAGE_1, *model])
    assert "out of GPU memory with 4 images at a time: going on with 2" in capsys.readouterr().err
    for n in range(3):
        ours, theirs = PrototypeFolder(folder)[n], PrototypeFolder(made[0])[n]
        assert np.allclose(ours.latents, theirs.latents, atol=2e-3) and (ours.sizes == theirs.sizes).all()
    monkeypatch.setattr(UNet2DConditionModel, "forward", small_gpu(UNet2DConditionModel.forward, 2))
    images = synthesize(made, model)
    assert "out of GPU memory" in capsys.readouterr().err
    assert worst_difference(images, made[1]) <= 1
    seeds = [[json.loads(row)["seed"] for row in (f / "images.jsonl").open()] for f in (images, made[1])]
    assert seeds[0] == seeds[1]


def test_out_of_memory_with_one_image_is_one_line(made, model, monkeypatch, refused):
    monkeypatch.setattr(UNet2DConditionModel, "forward", small_gpu(UNet2DConditionModel.forward, 0))
    refused(
        gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", str(made[0])], "out of GPU memory with one image"
    )
