"""Nothing is unpickled, no code comes from a model's folder, no name becomes a path elsewhere."""

import contextlib
import json
import pickle
import shutil
from functools import cache
from pathlib import Path

import pytest

from distillation import gen_prototype, gen_syn_image
from matching import generate_soft_label, training
from scripts import files, generators
from tests.conftest import HOSTILE, STAGE_1, STAGE_2, copy, everything, picture_folder, reseal

SMALL = [*STAGE_1, "--ipc", "1", "--max_images_per_class", "2"]
FOLDERS = ["--dataset", "imagefolder", "--data_dir", "data", "--size", "32", "--num_workers", "0"]
DECODED = ["--dataset", "imagefolder", "--arm", "decoded", "--image_size", "32"]
LOAD = cache(generators.load)  # each checkpoint once


@pytest.fixture
def run(model, monkeypatch, tmp_path, capsys):
    """run(main, *argv): what a stage returns, or None if it refuses; it writes below output/."""
    monkeypatch.setattr(generators, "load", LOAD)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")

    def end(main, *argv):
        made, before = None, everything(tmp_path)
        flags = model if "distillation.gen" in main.__module__ else []
        capsys.readouterr()
        try:
            made = main([*flags, *map(str, argv)])
        except SystemExit as leaving:  # a traceback fails the test
            lines = capsys.readouterr().err.splitlines()
            assert leaving.code == 2 and sum(line.startswith("error: ") for line in lines) == 1
        new = everything(tmp_path) - before - {"here/output"}
        assert not [path for path in new if not path.startswith("here/output/")]
        assert not Path(HOSTILE["absolute"]).exists()
        return made[0] if isinstance(made, list) else made

    return end


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_makes_no_file_elsewhere(name, run, prototypes):
    """A prompt of the release's file or a label file, a flag, a class of a manifest or folder."""
    text, latents = HOSTILE[name], [[[[0.0] * 8] * 8] * 4]
    Path("release.json").write_text(json.dumps({text: latents, "a cat": latents}))
    folder = run(gen_syn_image.main, *DECODED, "--prototype_path", "release.json")
    assert not folder or {path.name for path in folder.glob("*/")} == {"0000", "0001"}

    lines = "\n".join([text, *"one two three four five six seven eight nine".split()])
    Path("labels.txt").write_bytes(lines.encode(errors="surrogatepass"))
    folder = run(gen_prototype.main, *SMALL, "--label_file_path", "labels.txt")
    assert not folder or len(list(folder.glob("0*"))) == len(list(folder.glob("000?_?.json"))) == 3

    flags = [*STAGE_2, "--arm", "decoded", "--prototype_path"]
    named = run(gen_syn_image.main, *flags, prototypes, "--negative_prompt=" + text)
    assert named or name == "lone surrogate"
    mine, plain = copy(prototypes, "."), text.encode(errors="replace").decode()
    manifest = files.read_json(mine / "manifest.json")
    manifest["classes"][0]["folder"] = plain
    manifest["files"][f"0000_{plain}.json"] = manifest["files"].pop("0000_0.json")
    reseal(mine, classes=manifest["classes"], files=manifest["files"])
    assert run(gen_syn_image.main, *flags, mine) is None

    picture_folder("data", ["cat"])
    with contextlib.suppress(OSError, ValueError):  # a name that this file system does not take
        shutil.copytree("data/train/cat", f"data/train/{text.lstrip('/')}", dirs_exist_ok=True)
    run(gen_prototype.main, *FOLDERS)


def test_no_part_of_a_folders_name_is_a_path(run, prototypes):
    mine = copy(prototypes, ".")
    reseal(mine, parts={"size": ["/../../../../escaped"]})
    run(gen_syn_image.main, *STAGE_2, "--prototype_path", mine)


def test_a_name_of_200_bytes_leaves_room_for_numbers_and_suffixes(run):
    name = "\u00e9" * 100
    picture_folder("data", [name])
    folder = run(gen_prototype.main, *FOLDERS)
    images = run(gen_syn_image.main, *DECODED, "--prototype_path", folder)
    assert (images / name / f"{name}_0000.png").is_file()


CODE = "import os\nos.makedirs('executed', exist_ok=True)\nclass Evil: pass\n"
NAMED = {  # where: (file of a model's folder, what is changed in it)
    "VAE": ("model_index.json", {"vae": ["evil", "Evil"]}),
    "text": ("text_encoder/config.json", {"model_type": "x", "auto_map": {"AutoModel": "evil.E"}}),
}


@pytest.mark.parametrize("where", NAMED)
def test_code_in_a_models_folder_is_not_executed(where, run, prototypes, tiny_sd):
    folder, (path, change) = copy(tiny_sd, "."), NAMED[where]
    for place in (".", "vae", "text_encoder"):
        (folder / place / "evil.py").write_text(CODE)
    (folder / path).write_text(json.dumps({**files.read_json(folder / path), **change}))
    evil = ["--diffusion_checkpoints_path", folder]
    run(gen_prototype.main, *SMALL, *evil)
    run(gen_syn_image.main, *STAGE_2, *evil, "--prototype_path", prototypes)
    assert not Path("executed").exists()


PAYLOAD = b"cos\nmkdir\n(S'executed'\ntR."  # unpickled, it makes a folder


def test_a_pickle_is_refused_wherever_a_file_is_read(random, model, tiny_sd, refused):
    folder, cifar = copy(tiny_sd, "."), Path("data/cifar-10-batches-py")
    cifar.mkdir(parents=True)  # torchvision reads these only with the published checksums
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    evil = [vae.rename(vae.with_suffix(".bin")), cifar / "data_batch_1", Path("x.ckpt")]
    for path in [*evil, Path("x.safetensors")]:
        path.write_bytes(PAYLOAD)
    for path in ("x.ckpt", "x.safetensors", folder):
        refused(gen_prototype.main, [*STAGE_1, "--diffusion_checkpoints_path", path], path)
    for path in ("x.ckpt", "x.safetensors"):
        argv = ["--data", random, "--arch", "convnet_mini", "--teacher_checkpoint", path]
        refused(generate_soft_label.main, argv, path)
    refused(gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", "x.ckpt"], "x.ckpt")
    refused(lambda _: training.read_checkpoint(Path("x.ckpt"), 3), [], "x.ckpt", "not of this run")
    refused(gen_prototype.main, [*model, "--dataset", "cifar10", "--data_dir", "data"], "data")
    assert not Path("executed").exists()
    pickle.loads(PAYLOAD)
    assert Path("executed").exists(), "the payload would not have worked"
