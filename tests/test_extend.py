"""Where a newcomer would look: a data set is one entry, a generator one class, a student one line,
a recipe one launcher and one loss.
"""

import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from distillation import datasets, distill, gen_prototype, gen_syn_image, label_files, random_real
from distillation.prototype_files import PrototypeFolder, check_model
from matching import models, train_teacher, training
from scripts import files, generators, output, samplers
from tests.conftest import BATCHES, ROOT, TEACHER, picture_folder
from validate import train_FKD

SMALL = ["--ipc", "2", "--km_expand", "1", "--num_workers", "0"]


def test_a_data_set_is_one_entry_and_its_prompts(tmp_path, monkeypatch, model, refused):
    entry = datasets.DataSet(
        find=datasets.in_wnid_folders,
        needs=datasets.WNIDS,
        teacher=datasets.CIFAR_TEACHER,
        train_images=6,
        image_size=16,
        encode_size=32,
    )
    monkeypatch.setitem(datasets.ALL, "birds", entry)
    monkeypatch.setattr(label_files, "FOLDER", tmp_path)
    (tmp_path / "birds.txt").write_text("n00000001\ta red bird\nn00000002\ta blue bird\n")
    picture_folder("data", ["n00000002", "n00000001", "n00000003"])
    argv = ["--dataset", "birds", "--data_dir", "data", *SMALL, *model]
    [folder] = distill.main([*argv, "--num_inference_steps", "2"])
    assert folder.name == "birds_ipc2_s0.7_g8_kmexpand1_steps2"
    manifest = output.read_manifest("--data", folder, "images")
    assert manifest["image_size"] == 16
    assert manifest["classes"][1] == {"index": 1, "folder": "n00000002", "prompt": "a blue bird"}
    assert random_real.main(argv[:6]).name == "birds_ipc2_random"
    picture_folder("few", ["n00000001"])
    argv = ["--dataset", "birds", "--data_dir", "few", *model]
    refused(gen_prototype.main, argv, "--data_dir few", "n00000002", "train/<wnid>/")


class Mosaic:
    """A generator of another family: a latent is the image, three channels at half the size."""

    most_steps, channels, native_size, WORKS = 10, 3, 32, {}
    TITLE, CONDITION, NOISE_LEVEL, ONE_SIZE = "Mosaic", "prompt", "schedule", False

    def __init__(self, checkpoint, device, precision, **how):
        self.device = device
        self.facts = {"model": checkpoint, "revision": None, "precision": precision}
        self.facts["vae_sha256"] = "0" * 64

    def latent_shape(self, size):
        return (3, size // 2, size // 2)

    def encode(self, images, draws):
        noise = torch.stack([torch.randn(1, generator=draw) for draw in draws])
        return images[:, :, ::2, ::2] / 255 + 0.01 * noise[:, :, None, None]

    def unread(self, prompt):
        return prompt[100:]

    def condition(self, prompt):
        return torch.tensor([float(len(prompt))])

    def start(self, strength, steps, noise_level=None):
        return samplers.Start(strength, steps * strength, 1 - strength, strength, 1)

    def denoise(self, latents, conditions, negative, draws, strength, guidance_scale, steps):
        noise = torch.stack([torch.randn(latents[0].shape, generator=draw) for draw in draws])
        return latents + strength * 0.1 * noise

    def decode(self, latents, check=True):
        return latents.float().clamp(0, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_generator_is_one_class(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(generators.FAMILIES, "MosaicPipeline", Mosaic)
    (tmp_path / "mosaic").mkdir()
    index = {"_class_name": "MosaicPipeline", "_diffusers_version": "0.40.0"}
    (tmp_path / "mosaic/model_index.json").write_text(files.json_text(index))
    model = ["--diffusion_checkpoints_path", str(tmp_path / "mosaic"), "--device", "cpu"]
    digits = ["--dataset", "digits", "--ipc", "2", "--km_expand", "1"]
    argv = [*digits, "--classes", "0-1", "--num_workers", "0", *model]
    folder = gen_prototype.main(argv)
    source = PrototypeFolder(folder)
    assert source.latent_shape == (3, 16, 16)
    stage_2 = [*digits, *model, "--prototype_path", str(folder), "--num_inference_steps", "5"]
    made = gen_syn_image.main([*stage_2, "--arm", "d4m", "decoded", "noise"])
    where = ["--save_init_image_path", "both"]
    [both] = distill.main([*argv, "--num_inference_steps", "5", *where])
    for path in made[0].rglob("*.png"):
        assert (both / path.relative_to(made[0])).read_bytes() == path.read_bytes()
    refused(gen_syn_image.main, [*stage_2, "--num_inference_steps", "11"], "trained with 10")
    other = SimpleNamespace(facts={"vae_sha256": "1"}, channels=3)
    refused(lambda argv: check_model(folder, source, other), [], "made with the VAE")


def linear(num_classes, image_size):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * image_size**2, num_classes))


def test_a_student_is_one_line(random, labels, monkeypatch, refused):
    data, student = ["--train_dir", str(random)], ["--model", "linear", "--output_dir", "out"]
    stored = [*data, *student, "--fkd_path", str(labels), "--num_workers", "0", "--epochs", "2"]
    refused(train_FKD.main, stored, "linear", "convnet_w128")
    monkeypatch.setitem(models.MODELS, "linear", linear)
    folder = train_FKD.main(stored)
    assert folder.name.endswith("_linear_train2")
    weights = models.read_state_dict(folder / "student_seed0.safetensors", "")
    assert weights["1.weight"].shape == (3, 3 * 32**2)
    teacher = train_teacher.main([*TEACHER, "--arch", "linear", "--output_dir", "teachers"])
    online = ["--online", "--arch", "linear", "--teacher_checkpoint", str(teacher)]
    assert train_FKD.main([*data, *student, *online, *BATCHES]).name.endswith("_online_linear")


LAUNCHER = """#!/bin/sh
set -eu
. {root}/scripts/launch.sh
run -m validate.train_FKD --train_dir "${{IMAGES:-NAME}}" --fkd_path "$LABELS" --loss reversed-kl \\
    --model convnet_mini --sgd --learning_rate 0.05 --num_workers 0 \\
    --output_dir "${{OUT:-output}}/students" "$@"
"""


def reversed_kl(outputs, goal, temperature, ce_weight, **_):
    p, q = (F.log_softmax(t.float() / temperature, 1) for t in (outputs, goal.logits))
    kl = F.kl_div(q, p, reduction="sum", log_target=True)
    return kl + ce_weight * training.hard_loss(outputs, goal)


def test_a_recipe_is_a_launcher_and_a_loss_one_function(random, labels, monkeypatch, refused):
    """The loss takes the settings that it names, such as --ce_weight."""
    Path("train_FKD_mine.sh").write_text(LAUNCHER.format(root=ROOT))
    environment = {"DRY_RUN": "1", "IMAGES": str(random), "LABELS": str(labels), "OUT": "out"}

    def command(*flags):
        how = {"env": environment, "check": True, "stdout": subprocess.PIPE, "text": True}
        return shlex.split(subprocess.run(["sh", "train_FKD_mine.sh", *flags], **how).stdout)[3:]

    refused(train_FKD.main, command(), "--loss", "kl", "mse_ce")
    monkeypatch.setitem(training.LOSSES, "reversed-kl", reversed_kl)
    folders = [train_FKD.main(command(*flags)) for flags in ([], ["--ce_weight", "1"])]
    assert folders[0].parent == Path("out/students")
    assert folders[0].name.endswith("_convnet_mini_opt-sgd_lr0.05_loss-reversed-kl")
    rows, more = (files.read_json(f / "results.json")["seeds"][0]["rows"] for f in folders)
    assert more[0]["loss"] > rows[0]["loss"] > 0
