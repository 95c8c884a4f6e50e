"""Where a newcomer would look: a data set is one entry, a generator is one class."""

from types import SimpleNamespace

import torch

from distillation import (
    datasets,
    distill,
    gen_prototype,
    gen_syn_image,
    image_folder,
    label_files,
    random_real,
)
from distillation.prototype_files import PrototypeFolder, check_model
from scripts import files, generators
from tests.conftest import picture_folder

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
    manifest = image_folder.read_images("--data", folder)
    assert manifest["image_size"] == 16
    assert manifest["classes"][1] == {"index": 1, "folder": "n00000002", "prompt": "a blue bird"}
    assert random_real.main(argv[:6]).name == "birds_ipc2_random"
    picture_folder("few", ["n00000001"])
    argv = ["--dataset", "birds", "--data_dir", "few", *model]
    refused(gen_prototype.main, argv, "--data_dir few", "n00000002", "train/<wnid>/")


class Mosaic:
    """A generator of another family: a latent is the image, three channels at half the size."""

    most_steps, channels = 10, 3

    def __init__(self, checkpoint, device, precision, **how):
        self.device = device
        self.facts = {"model": checkpoint, "revision": None, "precision": precision}
        self.facts["vae_sha256"] = "0" * 64

    def latent_shape(self, size):
        return (3, size // 2, size // 2)

    def encode(self, images, draws):
        noise = torch.stack([torch.randn(1, generator=draw) for draw in draws])
        return images[:, :, ::2, ::2] / 255 + 0.01 * noise[:, :, None, None]

    def condition(self, prompt):
        return torch.tensor([float(len(prompt))])

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
