"""Stage 2 end to end: names, resume, processes, arms, mismatches, flat or broken images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.datasets import ImageFolder
from transformers import CLIPTextModel

from distillation import gen_prototype, gen_syn_image
from distillation.prototypes import class_bytes, read_class
from distillation.prototypes import main as export
from scripts import files, generators, output
from tests.conftest import STAGE_1, STAGE_2, copy, everything, exits, reseal, tree

NAME = "digits_ipc2_s0.7_g8_kmexpand2_steps2_classes-0-2_max12"


@pytest.fixture
def stage_2(prototypes, model):
    return [*STAGE_2, *model, "--prototype_path", str(prototypes)]


@pytest.fixture
def counted(monkeypatch):
    """counted(cls): a list that grows by the batch size at every call of cls.forward."""

    def count(cls):
        calls, original = [], cls.forward

        def forward(self, x, *args, **kwargs):
            calls.append(len(x))
            return original(self, x, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", forward)
        return calls

    return count


def rows_of(folder):
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


# ---- the folder


def test_the_folder_of_stage_2(images, prototypes):
    assert images.name == NAME
    names = [f"{c}/{c}_000{i}.png" for c in "012" for i in "01"]
    assert sorted(str(p.relative_to(images)) for p in images.rglob("*.png")) == names
    with Image.open(images / "2/2_0001.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB" and not image.text
    rows = rows_of(images)
    assert [row["file_name"] for row in rows] == names and len({r["seed"] for r in rows}) == 6
    expected = {"prompt": "zero", "strength": 0.7, "guidance_scale": 8.0, "prototype": 1}
    assert expected.items() <= rows[1].items()
    sizes = files.read_json(prototypes / "0000_0.json")["cluster_sizes"]
    assert [row["cluster_size"] for row in rows[:2]] == sizes
    manifest = image_folder.read_images("--data", images)
    assert manifest["count"] == 6 and {"README.md", "images.jsonl"} < set(manifest["files"])
    assert image_folder.origin(manifest)["real_images"] == 36


def test_image_folders_have_torchvisions_class_indices(images):
    folder = ImageFolder(images)
    assert folder.classes == ["0", "1", "2"] and folder.targets == [0, 0, 1, 1, 2, 2]


def test_the_data_card_says_how_the_images_were_made(images):
    card = (images / "README.md").read_text()
    assert card.startswith("---\ntask_categories: [image-classification]\n") and "D4M" in card
    assert "3 classes, 32 px PNG" in card and "- guidance_scale: 8.0" in card


@pytest.mark.parametrize("name", ["images.jsonl", "README.md"])
def test_what_a_finished_folder_lost_is_written_again(name, images, stage_2):
    mine = copy(images, "output/images")
    before = tree(mine)
    (mine / name).unlink()
    gen_syn_image.main(stage_2)
    assert tree(mine) == before


# ---- resume and processes


def test_an_interrupted_run_redoes_whole_batches_and_no_other(images, stage_2, counted):
    mine = copy(images, "output/images")
    for name in ("manifest.json", "images.jsonl", "1/1_0001.png"):  # batches of two
        (mine / name).unlink()
    calls = counted(UNet2DConditionModel)
    gen_syn_image.main(stage_2)
    assert calls and set(calls) == {4}  # two images, twice for guidance
    assert tree(mine) == tree(images)


def test_a_resume_takes_the_folders_batch_size(images, stage_2, capsys):
    mine = copy(images, "output/images")
    for name in ("manifest.json", "0/0_0000.png"):
        (mine / name).unlink()
    gen_syn_image.main([*stage_2, "--batch_size", "1"])
    assert "--batch_size 1: output/images" in capsys.readouterr().err
    assert tree(mine) == tree(images)


def test_shards_make_the_same_bytes(images, stage_2):
    for shard in ("1/2", "0/2"):
        [folder] = gen_syn_image.main([*stage_2, "--shard", shard])
        assert output.is_complete(folder) == (shard == "0/2")
    assert tree(folder) == tree(images)


def test_text_is_encoded_once_per_class(stage_2, counted):
    calls = counted(CLIPTextModel)
    gen_syn_image.main(stage_2)
    assert len(calls) == 4  # three classes and the negative prompt


def test_a_signal_at_the_end_of_one_arm_begins_no_other(stage_2, monkeypatch):
    finish, signalled = output.Output.finish, []

    def stop(self, *args):
        finish(self, *args)
        signalled.append(self.folder)
        self.signals.name = "SIGTERM"
        self.leave_if_asked()

    monkeypatch.setattr(output.Output, "finish", stop)
    with exits(75):
        gen_syn_image.main([*stage_2, "--arm", "d4m", "text"])
    assert [folder.name for folder in signalled] == [NAME]


def test_a_dry_run_plans_every_arm_and_writes_nothing(stage_2, model, capsys):
    before = everything(".")
    with exits(0):
        gen_syn_image.main([*stage_2, "--dry_run", "--arm", "d4m", "text"])
    plans = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: ")]
    assert len(plans) == 2 and f"{NAME}: 0 done, 6 to do" in plans[0]
    with exits(0):
        argv = [*STAGE_2, *model, "--prototype_path", "output/gone", "--dry_run"]
        gen_syn_image.main(argv)
    printed = capsys.readouterr().out
    assert "0 done, 20 to do" in printed and "waits for output/gone" in printed
    assert "python -m distillation.gen_prototype" in printed
    assert everything(".") == before


# ---- arms


def test_the_arms_are_four_different_pictures(images, stage_2):
    folders = gen_syn_image.main([*stage_2, "--arm", "decoded", "noise", "text"])
    assert [f.name for f in folders] == [
        "digits_ipc2_decoded_steps2_kmexpand2_classes-0-2_max12",
        "digits_ipc2_noise_steps2_classes-0-2",
        "digits_ipc2_text_steps2_classes-0-2",
    ]
    pictures = {f.name: (f / "0/0_0000.png").read_bytes() for f in [*folders, images]}
    assert len(set(pictures.values())) == 4
    assert "prototype" not in rows_of(folders[1])[0] and rows_of(folders[2])[0]["strength"] == 1.0


def test_only_two_arms_depend_on_the_prototypes(images, model, stage_2):
    other = gen_prototype.main([*STAGE_1, *model, "--seed", "1"])
    argv = [*STAGE_2, *model, "--prototype_path", str(other), "--save_init_image_path", "other"]
    arms = ["--arm", "d4m", "decoded", "noise", "text"]
    theirs = gen_syn_image.main([*argv, *arms])
    assert theirs[0].name == f"{NAME}_protoseed1"
    for ours, folder in zip(gen_syn_image.main([*stage_2, *arms]), theirs):
        same = {path.name: path.read_bytes() for path in ours.rglob("*.png")} == {
            path.name: path.read_bytes() for path in folder.rglob("*.png")
        }
        assert same == (ours.name.split("_")[2] in ("noise", "text"))


def test_fewer_prototypes_than_images_give_several_noises_each(stage_2):
    [folder] = gen_syn_image.main([*stage_2, "--ipc", "4", "--num_prototypes", "2"])
    assert "_protos2_" in folder.name
    rows = rows_of(folder)[:4]
    assert [r["prototype"] for r in rows] == [0, 1, 0, 1] and len({r["seed"] for r in rows}) == 4


def test_the_releases_single_file_gives_the_same_images(images, prototypes, model):
    export([str(prototypes), "release.json"])
    [folder] = gen_syn_image.main([*STAGE_2, *model, "--prototype_path", "release.json"])
    assert folder.name == "digits_ipc2_s0.7_g8_kmexpand2_steps2"
    for path in images.rglob("*.png"):
        assert (folder / path.relative_to(images)).read_bytes() == path.read_bytes()


def test_other_prompts_give_other_images(images, stage_2, refused):
    prompts = ["nought", *"one two three four five six seven eight nine".split()]
    Path("labels.txt").write_text("\n".join(prompts))
    [folder] = gen_syn_image.main([*stage_2, "--label_file_path", "labels.txt"])
    names = ["0/0_0000.png", "1/1_0000.png"]
    same = [(folder / name).read_bytes() == (images / name).read_bytes() for name in names]
    assert same == [False, True] and rows_of(folder)[0]["prompt"] == "nought"
    Path("labels.txt").write_text("\n".join(prompts[:9]))
    argv = [*stage_2, "--label_file_path", "labels.txt"]
    refused(gen_syn_image.main, argv, "labels.txt", "9 prompts")


# ---- 8 mismatches between model, prototypes and data


@pytest.fixture
def mine(prototypes):
    """A copy of a finished prototype folder, to be spoilt."""
    return copy(prototypes, "mine")


def change_model(model, part, **values):
    """A copy of the model with other values in a part's configuration."""
    folder = copy(Path(model[1]), "other")
    config = files.read_json(folder / part)
    (folder / part).write_text(files.json_text({**config, **values}))
    return folder


def another_data_set(mine, model):
    return ["--dataset", "cifar10"], "--dataset cifar10", "was made from digits"


def another_ipc(mine, model):
    return ["--ipc", "3"], "--ipc 3", "holds 2 per class"


def another_buffer_size(mine, model):
    return ["--km_expand", "5"], "--km_expand 5", "was made with 2"


def weights_of_another_vae(mine, model):
    folder = copy(Path(model[1]), "other")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    return ["--diffusion_checkpoints_path", folder], "made with the VAE", "this checkpoint's is"


def another_scaling_factor(mine, model):
    folder = change_model(model, "vae/config.json", scaling_factor=0.13025)
    return ["--diffusion_checkpoints_path", folder], "made with the VAE", "this checkpoint's is"


def two_classes_swapped(mine, model):
    a, b = (mine / name for name in ("0000_0.json", "0001_1.json"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    reseal(mine)
    return [], "0000_0.json", "class_index is 1, the manifest says 0"


def another_latent_size(mine, model):
    path = mine / "0000_0.json"
    found, facts = read_class(path)
    path.write_bytes(class_bytes(found._replace(latents=found.latents[..., :4, :4]), facts))
    reseal(mine)
    return [], "0000_0.json", "(2, 4, 4, 4), expected (2, 4, 8, 8)"


def one_number_changed(mine, model):
    path = mine / "0001_1.json"
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


@pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda f: f.__name__)
def test_a_mismatch_of_model_prototypes_and_data_is_refused(mismatch, mine, model, refused):
    more, *words = mismatch(mine, model)
    argv = [*STAGE_2, *model, "--prototype_path", mine, *more]
    refused(gen_syn_image.main, argv, *words)
    assert not list(Path("output").rglob("*.png"))


@pytest.mark.parametrize("name", ["../escaped", "a/b", "-rf", "nul.txt"])
def test_a_manifest_with_a_hostile_folder_is_refused(name, mine, model, refused):
    classes = files.read_json(mine / "manifest.json")["classes"]
    reseal(mine, classes=[{**classes[0], "folder": name}, *classes[1:]])
    argv = [*STAGE_2, *model, "--prototype_path", mine]
    refused(gen_syn_image.main, argv, "--prototype_path", "its manifest")


def test_an_unfinished_or_missing_folder_is_no_input(mine, model, refused):
    (mine / "manifest.json").unlink()
    argv = [*STAGE_2, *model, "--prototype_path"]
    refused(gen_syn_image.main, [*argv, mine], mine, "not finished")
    refused(gen_syn_image.main, [*argv, "nowhere"], "nowhere", "no such folder")


def test_a_run_does_not_go_on_with_another_scheduler(images, stage_2, model, refused):
    [folder] = gen_syn_image.main(stage_2)
    (folder / "manifest.json").unlink()
    change_model(model, "scheduler/scheduler_config.json", beta_end=0.02)
    name = Path(model[1]).name
    Path("other", name).rename(name)  # the same name, another schedule
    argv = [*stage_2, "--diffusion_checkpoints_path", name]
    refused(gen_syn_image.main, argv, "generator.scheduler_sha256")


def test_a_schedule_of_fewer_steps_than_asked_for(stage_2, model, refused):
    folder = change_model(model, "scheduler/scheduler_config.json", num_train_timesteps=1)
    argv = [*stage_2, "--diffusion_checkpoints_path", folder]
    refused(gen_syn_image.main, argv, "--num_inference_steps 2", "with 1")


FLAGS = {
    "--strength 1.5": ("--strength", "1.5"),
    "--strength 0": ("--strength", "0"),
    "--strength 0.1": ("--num_inference_steps 2", "--strength 0.1", "no step is left"),
    "--streng 0.5": ("--streng",),
    "--guidance_scale 0.5": ("--guidance_scale", "0.5"),  # as good as 1
    "--num_inference_steps 1001": ("--num_inference_steps 1001", "with 1000"),
    "--num_prototypes 3": ("--num_prototypes 3", "holds 2"),
    "--negative_prompt caf\udce9": ("not UTF-8",),
    "--arm all": ("--arm", "all"),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_do_not_fit(flags, stage_2, refused):
    refused(gen_syn_image.main, [*stage_2, *flags.split()], *FLAGS[flags])
    assert not Path("output").exists()


# ---- flat images, images that are not finite, memory


def spoil(monkeypatch, value, times):
    """The first `times` decoded pictures are `value` throughout; returns the list of them."""
    spoilt, original = [], generators.StableDiffusion.decode

    def decode(self, latents, check=True):
        images = original(self, latents, check)
        for row in range(len(images)):
            if len(spoilt) < times:
                images[row] = value
                spoilt.append(row)
        return images

    monkeypatch.setattr(generators.StableDiffusion, "decode", decode)
    return spoilt


def worst_difference(folder, other):
    """Largest difference of a pixel between two image folders with the same names."""
    names = sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    assert names == sorted(p.relative_to(other) for p in other.rglob("*.png")) and names
    worst = 0
    for name in names:
        a, b = (np.array(Image.open(root / name)).astype(int) for root in (folder, other))
        worst = max(worst, np.abs(a - b).max())
    return worst


def test_black_images_are_drawn_again_with_another_seed(images, stage_2, monkeypatch, capsys):
    spoilt = spoil(monkeypatch, 0.0, 5)
    [folder] = gen_syn_image.main([*stage_2, "--batch_size", "6"])
    assert len(spoilt) == 5
    assert capsys.readouterr().err.count("drawn again with the next seed") == 5
    rows, theirs = rows_of(folder), rows_of(images)
    assert [row["attempt"] for row in rows] == [1] * 5 + [0]
    for row, plain in zip(rows, theirs):
        picture = np.array(Image.open(folder / row["file_name"]))
        assert picture.min() < picture.max()
        assert (row["seed"] != plain["seed"]) == bool(row["attempt"])


def test_images_with_nan_are_made_again_in_fp32(images, stage_2, monkeypatch, capsys):
    spoilt = spoil(monkeypatch, float("nan"), 2)
    [folder] = gen_syn_image.main(stage_2)
    assert len(spoilt) == 2 and capsys.readouterr().err.count("made again in fp32") == 2
    assert worst_difference(folder, images) <= 1


@pytest.mark.parametrize(
    "value, words",
    [(0.0, "still a flat picture after 3 other seeds"), (float("nan"), "in fp32 too")],
)
def test_an_image_that_stays_flat_or_nan_is_an_error_that_names_it(
    value, words, stage_2, monkeypatch, refused
):
    spoil(monkeypatch, value, 10**6)
    refused(gen_syn_image.main, stage_2, "0/0_0000.png", words)
    assert not list(Path("output").rglob("*.png"))


@pytest.mark.parametrize("fit", [2, 0])
def test_out_of_gpu_memory_halves_the_batch_and_keeps_the_seeds(
    fit, images, stage_2, monkeypatch, capsys, refused
):
    original = UNet2DConditionModel.forward

    def forward(self, x, *args, **kwargs):
        if len(x) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    if not fit:
        refused(gen_syn_image.main, stage_2, "out of GPU memory with one image")
        return
    [folder] = gen_syn_image.main(stage_2)
    assert "out of GPU memory" in capsys.readouterr().err
    assert worst_difference(folder, images) <= 1 and rows_of(folder) == rows_of(images)
