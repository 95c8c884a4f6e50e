"""Stage 2 end to end: names, resume, processes, arms, mismatches, flat or broken images."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.datasets import ImageFolder
from transformers import CLIPTextModel

from distillation import distill, gen_prototype, gen_syn_image, image_folder, prototype_files
from scripts import families, files, generators, output
from tests import tiny_models
from tests.conftest import STAGE_1, STAGE_2, copy, everything, picture_folder, reseal, tree

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


def pngs(folder):
    return {name: data for name, data in tree(folder).items() if name.endswith(".png")}


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
    origin = image_folder.origin(manifest)
    assert origin["real_images"] == 36 and len(origin["generator"]["unet_sha256"]) == 64
    assert ImageFolder(images).targets == [0, 0, 1, 1, 2, 2]  # torchvision's class indices
    card = (images / "README.md").read_text()
    assert card.startswith("---\ntask_categories: [image-classification]\n") and "D4M" in card
    assert "3 classes, 32 px PNG" in card and "- guidance_scale: 8.0" in card


def test_what_a_finished_folder_lost_is_written_again(images, stage_2):
    mine = copy(images, "output/images")
    for name in ("images.jsonl", "README.md"):
        (mine / name).unlink()
    gen_syn_image.main(stage_2)
    assert tree(mine) == tree(images)


def test_without_its_log_a_folder_does_not_guess_seeds(images, stage_2, capsys):
    """Nobody knows then how often an image was redrawn."""
    mine = copy(images, "output/images")
    for name in ("manifest.json", "images.jsonl", "log.jsonl", "0/0_0000.png"):
        (mine / name).unlink()
    gen_syn_image.main(stage_2)
    assert "4 images are not in log.jsonl" in capsys.readouterr().err
    rows, before = rows_of(mine), rows_of(images)
    assert rows[:2] == before[:2]  # the batch that was made again
    assert {(row["seed"], row["attempt"]) for row in rows[2:]} == {(None, None)}


# ---- resume and processes


def test_an_interrupted_run_redoes_whole_batches_of_the_folders_size(
    images, stage_2, counted, capsys
):
    mine = copy(images, "output/images")
    for name in ("manifest.json", "images.jsonl", "1/1_0001.png"):  # batches of two
        (mine / name).unlink()
    calls = counted(UNet2DConditionModel)
    gen_syn_image.main([*stage_2, "--batch_size", "1"])
    assert calls and set(calls) == {4}  # two images, twice for guidance
    assert "--batch_size 1: output/images" in capsys.readouterr().err
    assert tree(mine) == tree(images)


def test_shards_make_the_same_bytes_and_encode_a_text_once(images, stage_2, counted):
    calls = counted(CLIPTextModel)
    for shard in ("1/2", "0/2"):
        [folder] = gen_syn_image.main([*stage_2, "--shard", shard])
        assert output.is_complete(folder) == (shard == "0/2")
    assert tree(folder) == tree(images)
    assert len(calls) == (2 + 1) + (1 + 1)  # classes and the negative prompt


def test_a_dry_run_plans_every_arm_and_writes_nothing(stage_2, model, capsys):
    before = everything(".")
    gen_syn_image.main([*stage_2, "--dry_run", "--arm", "d4m", "text"])
    plans = [line for line in capsys.readouterr().out.splitlines() if line.startswith("plan: ")]
    assert len(plans) == 2 and f"{NAME}: 0 done, 6 files to do" in plans[0]
    gen_syn_image.main([*STAGE_2, *model, "--prototype_path", "output/gone", "--dry_run"])
    printed = capsys.readouterr().out
    assert "0 done, 20 files to do" in printed
    assert "waits for output/gone: python -m distillation.gen_prototype" in printed
    assert everything(".") == before


def test_a_class_is_the_same_whichever_others_there_are(images, prototypes, model):
    alone = gen_prototype.main([*STAGE_1, *model, "--classes", "1"])
    assert (alone / "0000_1.json").read_bytes() == (prototypes / "0001_1.json").read_bytes()
    [folder] = gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(alone)])
    assert pngs(folder).items() < pngs(images).items()


# ---- arms


def test_the_arms_are_four_pictures_and_two_depend_on_the_prototypes(images, model, stage_2):
    arms = ["--arm", "d4m", "decoded", "noise", "text"]
    folders = gen_syn_image.main([*stage_2, *arms])
    assert [f.name for f in folders] == [
        NAME,
        "digits_ipc2_decoded_steps2_kmexpand2_classes-0-2_max12",
        "digits_ipc2_noise_steps2_classes-0-2",
        "digits_ipc2_text_steps2_classes-0-2",
    ]
    assert len({(f / "0/0_0000.png").read_bytes() for f in folders}) == 4
    assert "prototype" not in rows_of(folders[2])[0] and rows_of(folders[3])[0]["strength"] == 1.0
    other = gen_prototype.main([*STAGE_1, *model, "--seed", "1"])
    argv = [*STAGE_2, *model, "--prototype_path", str(other), "--save_init_image_path", "other"]
    theirs = gen_syn_image.main([*argv, *arms])
    assert theirs[0].name == f"{NAME}_protoseed1"
    assert [pngs(a) == pngs(b) for a, b in zip(folders, theirs)] == [False, False, True, True]


def test_fewer_prototypes_than_images_give_several_noises_each(stage_2):
    [folder] = gen_syn_image.main([*stage_2, "--ipc", "4", "--num_prototypes", "2"])
    assert "_protos2_" in folder.name
    rows = rows_of(folder)[:4]
    assert [r["prototype"] for r in rows] == [0, 1, 0, 1] and len({r["seed"] for r in rows}) == 4


def test_the_releases_single_file_gives_the_same_images(
    images, prototypes, stage_2, model, capsys, refused
):
    """Its keys, in file order, are the classes 0 ... 9, whatever they say."""
    source = prototype_files.PrototypeFolder(prototypes)
    rows = [source[min(c, 2)].latents.astype(float).tolist() for c in range(10)]
    keys = ["two", "zero", "one", *map(str, range(7))]
    Path("release.json").write_text(json.dumps(dict(zip(keys, rows))))
    argv = [*STAGE_2, *model, "--prototype_path", "release.json"]
    gen_syn_image.main([*argv, "--dry_run"])
    name = "digits_ipc2_s0.7_g8_kmexpand2_steps2"
    assert f"{name}: 0 done, 20 files to do" in capsys.readouterr().out
    [folder] = gen_syn_image.main(argv)
    assert folder.name == name and pngs(folder).items() > pngs(images).items()
    assert {row["cluster_size"] for row in rows_of(folder)} == {None}  # nobody knows
    assert "stand for a single" not in (folder / "README.md").read_text()

    [folder] = gen_syn_image.main([*argv, "--release_prompts"])
    assert "_kmexpand2_releaseprompts_" in folder.name and rows_of(folder)[0]["prompt"] == "two"
    assert files.read_json(folder / "manifest.json")["inputs"]["prompts"] == keys
    assert not pngs(folder).items() & pngs(images).items()
    refused(gen_syn_image.main, [*stage_2, "--release_prompts"], "is not the release's JSON file")
    both = ["--release_prompts", "--label_file_path", "labels.txt"]
    refused(gen_syn_image.main, [*argv, *both], "--release_prompts, --label_file_path: only one")


def test_other_prompts_give_other_images(images, stage_2, refused):
    prompts = ["nought", *"one two three four five six seven eight nine".split()]
    Path("labels.txt").write_text("\n".join(prompts))
    argv = [*stage_2, "--label_file_path", "labels.txt"]
    [folder] = gen_syn_image.main(argv)
    names = ["0/0_0000.png", "1/1_0000.png"]
    same = [(folder / name).read_bytes() == (images / name).read_bytes() for name in names]
    assert same == [False, True] and rows_of(folder)[0]["prompt"] == "nought"
    Path("labels.txt").write_text("\n".join(prompts[:9]))
    refused(gen_syn_image.main, argv, "labels.txt", "9 prompts")


# ---- samplers and families


def test_another_sampler_and_noise_level_are_named_and_recorded(images, stage_2, capsys):
    flags = ["--scheduler", "dpmpp", "--noise_level", "paper", "--image_size", "40"]
    [folder] = gen_syn_image.main([*stage_2, *flags])
    parts = "_noise-paper_steps2_scheduler-dpmpp_imagesize40_"
    assert folder.name == NAME.replace("_steps2_", parts)
    manifest, plain = (files.read_json(f / "manifest.json") for f in (folder, images))
    assert manifest["arguments"]["scheduler"] == "dpmpp"
    start, usual = manifest["start"], plain["start"]
    assert (start["noise_level"], usual["noise_level"]) == ("paper", "schedule")
    assert (usual["strength"], usual["timestep"], usual["calls"]) == (0.7, 1, 2)
    said = capsys.readouterr().err
    assert f"d4m: starts at t = {start['timestep']:g}: signal / noise" in said
    assert "images are made at 32 px and enlarged" in said
    assert not pngs(folder).items() & pngs(images).items()
    card = (folder / "README.md").read_text()
    assert "- scheduler: dpmpp\n" in card and "- noise_level: paper\n" in card
    assert "scheduler" not in (images / "README.md").read_text()


def test_mode_guidance(images, stage_2, model, refused):
    """From the noise of --arm text, by another sampler, to the prototypes."""
    guide = ["--guide", "mode", "--num_inference_steps", "4"]
    [folder] = gen_syn_image.main([*stage_2, *guide])
    name = "digits_ipc2_s1_g8_kmexpand2_steps4_guide-mode_classes-0-2_max12"
    assert folder.name == name
    manifest, rows = files.read_json(folder / "manifest.json"), rows_of(folder)
    assert manifest["start"]["calls"] == 4 and manifest["arguments"]["guide_weight"] == 0.1
    assert rows[1]["prototype"] == 1 and rows[1]["strength"] == 1.0
    assert "- guide: mode\n" in (folder / "README.md").read_text()
    [more] = gen_syn_image.main([*stage_2, *guide, "--guide_weight", "3"])
    assert not pngs(more).items() & pngs(folder).items()
    once = [*STAGE_1, *model, *guide, "--batch_size", "2", "--save_init_image_path", "once"]
    [both] = distill.main(once)
    assert both.name == name and max(differences(both, folder)) <= 2
    where = [*stage_2, "--save_init_image_path", "bad"]
    bad = [*where, *guide, "--guide_weight", "1e30"]
    refused(gen_syn_image.main, bad, "0/0_0000.png: NaN or infinity, in fp32 too")
    words = "--strength 0.7: --guide mode starts from noise alone"
    refused(gen_syn_image.main, [*where, *guide, "--strength", "0.7"], words)
    refused(gen_syn_image.main, [*where, *guide, "--arm", "d4m", "text"], "only for --arm d4m")
    refused(gen_syn_image.main, [*where, "--guide_weight", "1"], "there is no --guide")
    assert not list(Path("bad").rglob("*.png"))


def test_each_image_is_guided_to_its_own_prototype(stage_2, monkeypatch):
    denoise, calls = families.StableDiffusion.denoise, []

    def noted(model, latents, *how, **more):
        calls.append((latents, more))
        return denoise(model, latents, *how, **more)

    monkeypatch.setattr(families.StableDiffusion, "denoise", noted)
    for flags in ([], ["--guide", "mode", "--num_inference_steps", "4"]):
        gen_syn_image.main([*stage_2, *flags])
    half = len(calls) // 2
    for (prototypes, plain), (noise, guided) in zip(calls[:half], calls[half:], strict=True):
        assert not plain and torch.equal(guided["modes"], prototypes)
        assert not torch.equal(noise, prototypes)


WNIDS = ["n01440764", "n02102040"]  # ImageNet's classes 0 and 217


def with_family(family, *more):
    """Flags of both stages; the images of the first are in data/."""
    if not Path("data").exists():
        picture_folder("data", WNIDS)
    checkpoint = ["--diffusion_checkpoints_path", str(tiny_models.folder(family))]
    numbers = ["--ipc", "2", "--km_expand", "1"]
    return ["--dataset", "imagefolder", *numbers, "--device", "cpu", *checkpoint, *more]


FIRST = ["--data_dir", "data", "--num_workers", "0"]
SECOND = ["--num_inference_steps", "6", "--image_size", "32", "--batch_size", "2"]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "dit"])
def test_both_stages_with_another_family(family):
    prototypes = gen_prototype.main(with_family(family, *FIRST))
    argv = with_family(family, *SECOND, "--prototype_path", str(prototypes))
    [folder] = gen_syn_image.main(argv)
    assert folder.name == "imagefolder_ipc2_s0.7_g8_kmexpand1_steps6_imagesize32_size32"
    before, manifest = tree(folder), files.read_json(folder / "manifest.json")
    dit = family == "dit"
    places = [0, 0, 217, 217] if dit else [None] * 4
    assert [row.get("condition") for row in rows_of(folder)] == places
    assert ("CC BY-NC 4.0" in (folder / "README.md").read_text()) == dit
    assert manifest["arguments"]["noise_level"] == manifest["start"]["noise_level"] == "paper"
    assert (manifest["arguments"]["negative_prompt"] is None) == dit
    for name in ("manifest.json", f"{WNIDS[1]}/{WNIDS[1]}_0001.png"):
        (folder / name).unlink()
    for shard in ("1/2", "0/2"):
        gen_syn_image.main([*argv, "--shard", shard])
    assert tree(folder) == before
    more = ["--batch_size", "1", "--save_init_image_path", "b"]
    [one_by_one] = gen_syn_image.main([*argv, *more])
    assert max(differences(one_by_one, folder)) <= 2
    if dit:
        [both] = distill.main(with_family(family, *SECOND, *FIRST, "--save_init_image_path", "c"))
        assert max(differences(both, folder)) <= 2
    else:
        noise, text = gen_syn_image.main([*argv, "--arm", "noise", "text"])
        assert min(differences(noise, text)) > 2
        assert files.read_json(text / "manifest.json")["start"]["calls"] == 6


def test_a_vae_that_shifts_otherwise_is_another_one(refused):
    first = with_family("sd3", *FIRST, "--latent_cache", "cache")
    prototypes = gen_prototype.main(first)
    other = change_model([0, tiny_models.folder("sd3")], "vae/config.json", shift_factor=0.1)
    other = ["--diffusion_checkpoints_path", str(other)]
    argv = with_family("sd3", *SECOND, *other, "--prototype_path", prototypes)
    refused(gen_syn_image.main, argv, f"--prototype_path {prototypes}: made with the VAE")
    refused(gen_prototype.main, [*first, *other], "vae_sha256")
    gen_prototype.main([*first, *other, "--save_prototype_path", "other"])
    assert len(list(Path("cache").iterdir())) == 2


def test_a_dit_takes_the_classes_of_imagenet_only(refused, model):
    digits = [*STAGE_1, "--diffusion_checkpoints_path", tiny_models.folder("dit")]
    words = [
        "--dataset digits: a DiT knows only the 1000 classes of ImageNet-1K",
        "by their wnids, not 0",
    ]
    for main in (gen_prototype.main, distill.main):
        refused(main, digits, *words)
    prototypes = gen_prototype.main(with_family("dit", *FIRST))
    argv = with_family("dit", *SECOND, "--prototype_path", str(prototypes))
    refused(gen_syn_image.main, [*argv, "--negative_prompt", "x"], "--negative_prompt: a DiT reads")
    Path("labels.txt").write_text("a fish\na dog\n")
    labels = ["--label_file_path", "labels.txt"]
    refused(gen_syn_image.main, [*argv, *labels], "--label_file_path labels.txt: a DiT reads no")
    refused(distill.main, with_family("dit", *FIRST, *labels), "labels.txt: a DiT reads no")
    theirs = with_family("sdxl", *SECOND, "--prototype_path", str(prototypes))
    refused(gen_syn_image.main, theirs, "made with the VAE")  # of another family
    larger = copy(tiny_models.folder("dit"), "larger")
    config = files.read_json(larger / "transformer/config.json")
    (larger / "transformer/config.json").write_text(files.json_text({**config, "sample_size": 16}))
    argv += ["--diffusion_checkpoints_path", larger]
    refused(gen_syn_image.main, argv, "latents of 8x8", "makes only 64 px")
    assert not list(Path("output").rglob("*.png"))


# ---- mismatches between model, prototypes and data


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


def change_first(mine, change):
    """Another first class, as if stage 1 had written it so."""
    found, facts = prototype_files.read_class(mine / "0000_0.json")
    found = found._replace(latents=change(found.latents))
    (mine / "0000_0.json").write_bytes(prototype_files.class_bytes(found, facts))
    reseal(mine)


def weights_of_another_vae(mine, model):
    path = copy(Path(model[1]), "other") / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    return ["--diffusion_checkpoints_path", path.parents[1]], "made with the VAE", "checkpoint's is"


def another_scaling_factor(mine, model):
    folder = change_model(model, "vae/config.json", scaling_factor=0.13025)
    return ["--diffusion_checkpoints_path", folder], "made with the VAE"


def two_classes_swapped(mine, model):
    (mine / "0000_0.json").rename("first")
    (mine / "0001_1.json").rename(mine / "0000_0.json")
    Path("first").rename(mine / "0001_1.json")
    reseal(mine)
    return [], "0000_0.json", "holds [1, '1', 'one'", "manifest says [0, '0', 'zero'"


def another_latent_size(mine, model):
    change_first(mine, lambda latents: latents[..., :4, :4])
    return [], "0000_0.json", "2, 4, 4, 4]", "2, 4, 8, 8]"


def one_number_changed(mine, model):
    path = mine / "0000_0.json"
    text = path.read_text()
    at, times = text.index('"prototypes": [\n[') + 17, path.stat().st_mtime_ns
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])
    os.utime(path, ns=(times, times))  # noticed also where the clock does not tell
    return [], "0000_0.json", "changed since it was made"


MISMATCHES = [weights_of_another_vae, another_scaling_factor, two_classes_swapped]
MISMATCHES += [another_latent_size, one_number_changed]


@pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda f: f.__name__)
def test_a_mismatch_of_model_prototypes_and_data_is_refused(mismatch, mine, model, refused):
    more, *words = mismatch(mine, model)
    argv = [*STAGE_2, *model, "--prototype_path", mine, *more]
    refused(gen_syn_image.main, argv, *words)
    assert not list(Path("output").rglob("*.png"))


def test_an_unfinished_missing_or_hostile_folder_is_no_input(mine, model, refused):
    argv = [*STAGE_2, *model, "--prototype_path"]
    manifest, hostile = files.read_json(mine / "manifest.json"), mine / "0000_...json"
    manifest["classes"][0]["folder"] = ".."  # its images would lie beside the output folder
    found, facts = prototype_files.read_class(mine / "0000_0.json")
    hostile.write_bytes(prototype_files.class_bytes(found, {**facts, "folder": ".."}))
    entry = {"size": hostile.stat().st_size, "sha256": files.sha256(hostile)}
    manifest["files"] = {hostile.name: entry, **manifest["files"]}
    del manifest["files"]["0000_0.json"]
    reseal(mine, classes=manifest["classes"], files=manifest["files"])
    refused(gen_syn_image.main, [*argv, mine], "--prototype_path", "its manifest")
    (mine / "manifest.json").unlink()
    refused(gen_syn_image.main, [*argv, mine], mine, "not finished")
    refused(gen_syn_image.main, [*argv, "nowhere"], "nowhere", "no such folder")


def test_a_run_does_not_go_on_with_another_scheduler_or_prototypes(
    images, stage_2, mine, model, refused
):
    (copy(images, "output/images") / "manifest.json").unlink()
    name = Path(model[1]).name
    change_model(model, "scheduler/scheduler_config.json", beta_end=0.02).rename(name)
    argv = [*stage_2, "--diffusion_checkpoints_path", name]  # the same name, another schedule
    refused(gen_syn_image.main, argv, "generator.scheduler_sha256")
    change_first(mine, lambda latents: latents * 2)
    refused(gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", mine], "begun with prototyp")


FLAGS = {
    "--dataset cifar10": ("--dataset cifar10", "was made with digits"),
    "--ipc 3": ("--ipc 3", "was made with 2"),
    "--km_expand 5": ("--km_expand 5", "was made with 2"),
    "--strength 1.5": ("--strength", "1.5"),
    "--strength 0.1": ("--num_inference_steps 2", "--strength 0.1", "no step is left"),
    "--guidance_scale 0.5": ("--guidance_scale", "0.5"),  # as good as 1
    "--num_inference_steps 1001": ("--num_inference_steps 1001", "with 1000"),
    "--num_prototypes 3": ("--num_prototypes 3", "was made with 2"),
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


def differences(folder, other):
    """Largest difference of a pixel of each of the six images."""
    found = []
    for name in pngs(other):
        a, b = (np.array(Image.open(root / name)).astype(int) for root in (folder, other))
        found.append(np.abs(a - b).max())
    return found


def test_black_images_are_drawn_again_with_another_seed(images, stage_2, monkeypatch, capsys):
    spoilt = spoil(monkeypatch, 0.0, 5)
    [folder] = gen_syn_image.main([*stage_2, "--batch_size", "6"])
    assert len(spoilt) == 5
    assert capsys.readouterr().err.count("drawn again with the next seed") == 5
    again, rows, theirs = [True] * 5 + [False], rows_of(folder), rows_of(images)
    assert [row["attempt"] for row in rows] == [1] * 5 + [0]
    assert [a["seed"] != b["seed"] for a, b in zip(rows, theirs)] == again
    assert [difference > 1 for difference in differences(folder, images)] == again
    assert all(np.ptp(Image.open(folder / row["file_name"])) > 0 for row in rows)


GUIDED = ["--guide", "mode", "--guide_weight", "3", "--num_inference_steps", "4"]


@pytest.mark.parametrize("how", [[], GUIDED])
def test_images_with_nan_are_made_again_in_fp32(how, stage_2, monkeypatch, capsys):
    """From the same noise; with --guide mode to the same prototypes."""
    [whole] = gen_syn_image.main([*stage_2, *how, "--save_init_image_path", "whole"])
    spoilt = spoil(monkeypatch, float("nan"), 2)
    [folder] = gen_syn_image.main([*stage_2, *how])
    assert len(spoilt) == 2 and capsys.readouterr().err.count("made again in fp32") == 2
    assert max(differences(folder, whole)) <= 1


def test_an_image_that_stays_flat_is_an_error(stage_2, monkeypatch, refused):
    spoil(monkeypatch, 0.0, 10**6)
    refused(gen_syn_image.main, stage_2, "0/0_0000.png", "flat picture after 3 other seeds")
    assert not list(Path("output").rglob("*.png"))


def test_out_of_gpu_memory_halves_the_batch(images, stage_2, monkeypatch, capsys):
    original = UNet2DConditionModel.forward

    def forward(self, x, *args, **kwargs):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    [folder] = gen_syn_image.main(stage_2)
    assert "out of GPU memory" in capsys.readouterr().err
    assert max(differences(folder, images)) <= 1 and rows_of(folder) == rows_of(images)
