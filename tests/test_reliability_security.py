"""Nothing is unpickled, no code comes from a model folder, no path from a name: 19 hostile names, malicious files."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reliability import HOSTILE, STAGE_1, STAGE_2, everything, image_folder

from distillation import gen_prototype, gen_syn_image
from scripts.files import colliding_names, content_digest, safe_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def loaded():
    """Stage 2's networks, loaded once for all tests of this file."""
    original, found = gen_syn_image.load_synthesis, {}

    def load(args, process):
        key = args.diffusion_checkpoints_path
        if key not in found:
            found[key] = original(args, process)
        return found[key]

    return load


def ends_well(main, argv):
    """Run a stage; returns the output folder, or None if it refused. Anything else - a traceback - fails the test."""
    try:
        folder = main([str(a) for a in argv])
    except SystemExit as leaving:
        assert leaving.code == 2
        return None
    return folder[0] if isinstance(folder, list) else folder


def nothing_outside(before, tmp_path, *allowed):
    new = everything(tmp_path) - before
    assert not [name for name in new if not name.startswith(allowed)], new
    assert not Path(HOSTILE["absolute"]).exists() and not (tmp_path.parent / "escaped").exists()


def test_there_are_19_of_them():
    assert len(HOSTILE) == len(set(HOSTILE.values())) == 19


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_makes_no_file_outside_the_output_folder(name, made, model, loaded, tmp_path, monkeypatch):
    """As a class folder, a prompt in a label file, a key of a JSON file, a class of a manifest, a flag."""
    monkeypatch.setattr(gen_syn_image, "load_synthesis", loaded)
    text = HOSTILE[name]
    assert not safe_name(text)
    before = everything(tmp_path)

    # the release's {prompt: prototypes}: a prompt it may be, a folder's name never
    latents = np.zeros((1, 4, 8, 8)).tolist()
    Path("release.json").write_text(json.dumps({text: latents, "a cat": latents}))
    short = ["--ipc", "1", "--dataset", "imagefolder", "--num_inference_steps", "2", "--image_size", "32", *model]
    folder = ends_well(gen_syn_image.main, ["--prototype_path", "release.json", *short])
    if folder:
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["0000", "0001"]

    # a manifest of stage 1 that names a class so, and is consistent with itself
    shutil.copytree(made[0], "prototypes")
    manifest = json.loads(Path("prototypes/manifest.json").read_text())
    manifest["classes"][0]["folder"] = text
    manifest["files"][f"0000_{text}.json"] = manifest["files"].pop("0000_0.json")
    manifest["content"] = content_digest_or_none(manifest["files"])
    Path("prototypes/manifest.json").write_text(json.dumps(manifest))
    assert ends_well(gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", "prototypes"]) is None

    # a line of a label file
    prompts = [text, *"one two three four five six seven eight nine".split()]
    Path("labels.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8", errors="surrogatepass", newline="")
    folder = ends_well(gen_prototype.main, [*STAGE_1, *model, "--label_file_path", "labels.txt"])
    if folder:
        assert {p.name for p in folder.glob("0*.json")} == {"0000_0.json", "0001_1.json", "0002_2.json"}

    # a flag that enters the name of the folder
    if "\x00" not in text and "\udcff" not in text:
        random = ["--negative_prompt=" + text, "--prototype_path", "release.json", *short]
        Path("release.json").write_text(json.dumps({"a cat": latents}))
        folder = ends_well(gen_syn_image.main, random)
        assert folder.parent == Path("output/images")

    # a class folder
    try:
        (tmp_path / "data/train").mkdir(parents=True)
        os.makedirs(os.path.join("data/train", text.lstrip("/") or "."), exist_ok=True)
        image_folder("data", ["cat"])
        shutil.copy("data/train/cat/0.png", os.path.join("data/train", text.lstrip("/") or "."))
    except (OSError, ValueError):
        pass  # this file system does not take the name
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--size", "32", "--num_workers", "0", *model]
    ends_well(gen_prototype.main, argv)
    allowed = (
        "output",
        "data",
        "release.json",
        "prototypes",
        "labels.txt",
        "escaped" if "escaped" in text else "data",
    )
    nothing_outside(before, tmp_path, *allowed)


def content_digest_or_none(files):
    try:
        return content_digest(files)
    except UnicodeEncodeError:
        return "0"


def test_class_folders_that_are_one_name_elsewhere_are_refused(model, refused):
    """NFC and NFD, upper and lower case: one folder on a Mac or under Windows."""
    for number, names in enumerate((["caf\u00e9", "cafe\u0301"], ["Cat", "cat"])):
        image_folder(f"data{number}", names)
        argv = ["--dataset", "imagefolder", "--data_dir", f"data{number}", *model]
        refused(gen_prototype.main, argv, "are one on some file systems")
    assert colliding_names(["cat", "dog"]) is None


def test_a_name_of_200_bytes_is_taken_all_the_way(model, loaded, monkeypatch):
    """The longest name that is let in fits with suffix, number and the temporary file's name."""
    monkeypatch.setattr(gen_syn_image, "load_synthesis", loaded)
    name = "\u00e9" * 100
    image_folder("data", [name])
    flags = ["--dataset", "imagefolder", "--ipc", "1", *model]
    folder = gen_prototype.main([*flags, "--data_dir", "data", "--size", "32", "--num_workers", "0"])
    [images] = gen_syn_image.main([*flags, "--prototype_path", str(folder), "--num_inference_steps", "2"])
    assert (images / name / f"{name}_0000.png").is_file()


# ---- malicious files


class Payload:
    """Unpickling this leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, (os.path.abspath("executed"),)


def pickled_weights(folder):
    """The VAE's weights as a pickle, as older checkpoints have them."""
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save(Payload(), folder / "vae/diffusion_pytorch_model.bin")


def code_beside_the_weights(folder):
    """A model_index.json that takes the pipeline and the VAE from a Python file in the model's folder."""
    code = "import os\nos.makedirs('executed', exist_ok=True)\nclass AutoencoderKL: pass\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "vae/evil.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["evil", "Evil"], "vae": ["evil", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))


def code_named_by_a_config(folder):
    """A text encoder whose configuration maps its class to remote code."""
    code = "import os\nos.makedirs('executed', exist_ok=True)\nclass CLIPTextModel: pass\n"
    (folder / "text_encoder/modeling_evil.py").write_text(code)
    path = folder / "text_encoder/config.json"
    config = {**json.loads(path.read_text()), "model_type": "evil", "auto_map": {"AutoModel": "modeling_evil.Evil"}}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("spoil", [pickled_weights, code_beside_the_weights, code_named_by_a_config])
def test_a_malicious_model_folder_executes_nothing(spoil, made, model, tmp_path):
    shutil.copytree(model[1], "evil-model")
    spoil(Path("evil-model"))
    evil = ["--diffusion_checkpoints_path", "evil-model", "--device", "cpu"]
    first = ends_well(gen_prototype.main, [*STAGE_1, *evil])
    second = ends_well(gen_syn_image.main, [*STAGE_2, *evil, "--prototype_path", str(made[0])])
    assert not Path("executed").exists()
    if spoil is pickled_weights:
        assert first is None and second is None


def test_pickles_are_refused_wherever_a_file_is_read(made, model, refused, tmp_path):
    with open("evil.ckpt", "wb") as file:
        pickle.dump(Payload(), file)
    shutil.copy("evil.ckpt", "evil.safetensors")
    shutil.copy("evil.ckpt", "evil.json")
    for name, words in (("evil.ckpt", "only .safetensors files are read"), ("evil.safetensors", "cannot be loaded")):
        refused(gen_prototype.main, [*STAGE_1, "--device", "cpu", "--diffusion_checkpoints_path", name], name, words)
    refused(
        gen_syn_image.main, [*STAGE_2, *model, "--prototype_path", "evil.json"], "evil.json", "cannot be read as JSON"
    )
    refused(gen_prototype.main, [*STAGE_1, *model, "--label_file_path", "evil.ckpt"], "evil.ckpt")
    # CIFAR's own files are pickles: torchvision reads them only with the published checksum
    Path("data/cifar-10-batches-py").mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        shutil.copy("evil.ckpt", f"data/cifar-10-batches-py/{name}")
    shutil.copy("evil.ckpt", "data/cifar-10-batches-py/batches.meta")
    refused(gen_prototype.main, ["--dataset", "cifar10", "--data_dir", "data", *model], "--data_dir data")
    assert not Path("executed").exists()
    pickle.loads(Path("evil.ckpt").read_bytes())
    assert Path("executed").exists(), "the payload would not have worked"


def test_a_pickled_teacher_is_refused(refused):
    models = pytest.importorskip("matching.models")
    torch.save({"state_dict": Payload()}, "teacher.pth")

    def load(argv):
        models.load_teacher("resnet18", "teacher.pth", "digits", ("0", "1"), 32)

    refused(load, [], "teacher.pth")
    assert not Path("executed").exists()


@pytest.mark.parametrize("word", ["weights_only=False", "pickle.load", "trust_remote_code=True", "eval(", "exec("])
def test_the_source_has_no_such_word(word):
    """`model.eval()` is not `eval(`: the word stands alone."""
    folders = ("distillation", "matching", "validate", "scripts", "misc")
    files = [
        p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".sh", ".sbatch")
    ]
    assert len(files) > 20
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            at = line.find(word)
            while at >= 0:
                assert at and (line[at - 1].isalnum() or line[at - 1] in "._"), (
                    f"{path}, line {number}: {line.strip()}"
                )
                at = line.find(word, at + 1)
