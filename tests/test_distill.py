"""Stages 1 and 2 in one process: the same PNGs, no prototype file."""

import pytest

from distillation import distill, gen_prototype, gen_syn_image, image_folder
from scripts import files
from tests.conftest import STAGE_1, STAGE_2, copy, tree


@pytest.fixture(scope="module")
def argv(model):
    return [*STAGE_1, "--num_inference_steps", "2", "--batch_size", "2", *model]


@pytest.fixture(scope="module")
def distilled(argv, tmp_path_factory):
    root = str(tmp_path_factory.mktemp("distilled"))
    return distill.main([*argv, "--save_init_image_path", root])[0]


def pngs_and_rows(folder):
    return {n: data for n, data in tree(folder).items() if n.endswith((".png", "images.jsonl"))}


def test_the_images_are_those_of_the_two_stages(model, distilled):
    """With batches of one size: the batch decides the last bits."""
    folder = gen_prototype.main([*STAGE_1, *model, "--batch_size", "2"])
    [ours] = gen_syn_image.main([*STAGE_2, *model, "--prototype_path", str(folder)])
    assert ours.name == distilled.name
    assert pngs_and_rows(ours) == pngs_and_rows(distilled) and len(pngs_and_rows(ours)) == 7
    assert not list(distilled.parent.rglob("0000_*"))
    manifest = files.read_json(distilled / "manifest.json")
    assert manifest["inputs"]["prototype_arguments"]["kmeans"] == "minibatch"
    assert image_folder.origin(manifest)["real_images"] == 36


def test_a_resume_takes_the_folders_batch_size(argv, distilled, capsys):
    mine = copy(distilled, "output/images")
    for name in ("manifest.json", "0/0_0000.png"):
        (mine / name).unlink()
    distill.main([*argv, "--batch_size", "1"])
    printed = capsys.readouterr()
    assert "was begun with 2" in printed.err and "6 images (stages 1 and 2) made" in printed.out
    assert tree(mine) == tree(distilled)


def test_the_latent_cache_serves_it(argv, distilled):
    for root in ("a", "b"):
        cached = ["--latent_cache", "cache", "--save_init_image_path", root]
        [folder] = distill.main([*argv, *cached])
        assert pngs_and_rows(folder) == pngs_and_rows(distilled)
    assert "cached_seconds" in files.read_json(folder / "timing.json")


def test_what_it_cannot_do_is_refused(argv, refused, capsys):
    refused(distill.main, [*argv, "--num_prototypes", "1"], "--num_prototypes 1", "--ipc 2")
    refused(distill.main, [*argv, "--size", "30"], "--size 30", "multiple of 4")
    distill.main([*argv, "--dry_run"])
    assert "0 done, 6 files to do" in capsys.readouterr().out
