"""The models that ship are what their manifests say; their trainer resumes to the same bytes."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from distillation import datasets
from matching import models
from misc import train_tiny_sd
from scripts import files, output
from tests import test_parity
from tests.conftest import ROOT, everything, exits, tree

DIGITS, PHOTOGRAPHS = (ROOT / "misc" / f"tiny-sd-{name}" for name in ("digits", "cifar10"))
SHORT = "--dataset digits --classes 0 7 --max_images_per_class 12 --vae_channels 16 16 "
SHORT += "--vae_factor 2 --vae_steps 3 --unet_channels 16 16 --unet_steps 3 --text_width 16 "
SHORT += "--vae_batch_size 8 --unet_batch_size 8 --sample_guidance 1"


def train(folder, *more):
    argv = [*SHORT.split(), "--sample_every", "0", "--device", "cpu", "--num_workers", "0", *more]
    train_tiny_sd.main([*argv, "--output_dir", str(folder)])
    return {n: b for n, b in tree(folder).items() if "samples/" not in n}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return train(folder, "--sample_every", "2")  # looking at it changes nothing


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DIGITS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- the models that ship


@pytest.mark.parametrize("model, mib, columns", [(DIGITS, 3, 12), (PHOTOGRAPHS, 7, 6)])
def test_is_small_and_holds_what_its_manifest_lists_and_no_pickle(model, mib, columns):
    listed = set(output.read_manifest("MODEL", model, "tiny_sd", verify=True)["files"])
    found = {p.relative_to(model).as_posix(): p for p in model.rglob("*") if p.is_file()}
    assert set(found) == listed | {output.MANIFEST, output.ARGS}
    assert sum(path.stat().st_size for path in found.values()) <= mib * 2**20
    assert {path.suffix for path in found.values()} <= {".json", ".safetensors", ".png", ".md"}
    with Image.open(model / "samples.png") as image:  # six per class from text: no photograph
        assert image.width == columns * (2 * 32 + 2)


def test_was_trained_on_the_training_split_as_it_is_now():
    manifest = output.read_manifest("MODEL", DIGITS, "tiny_sd")
    split = datasets.open_split("digits", None, "train")
    assert manifest["split"] == {"name": "train", "images": split.count, "sha256": split.digest()}
    assert split.digest() != datasets.open_split("digits", None, "val").digest()
    assert [c["prompt"] for c in manifest["classes"]] == list(split.prompts)
    assert manifest["reconstruction_psnr_db"] >= 30 and manifest["reconstruction_psnr_on"] == "val"


@pytest.mark.parametrize("model, preset", [(DIGITS, "digits"), (PHOTOGRAPHS, "cpu")])
def test_was_trained_with_the_preset_as_it_is_now(model, preset):
    found = output.read_manifest("MODEL", model, "tiny_sd")["arguments"]
    argv = ["--output_dir", "x", "--dataset", found["dataset"], "--preset", preset]
    now = {**train_tiny_sd.get_args(argv).settings}
    now["flip"] = now["flip"] == "on"
    names = [n for n in found if n in now and n.startswith(("vae", "unet", "text", "ema", "kl"))]
    names += ["flip", "image_size", "prompt_dropout"]
    assert {n: found[n] for n in names} == {n: now[n] for n in names} and len(names) > 15


def test_is_configured_as_stable_diffusion_v1_5(pipeline):
    wanted = {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1}
    wanted |= {"set_alpha_to_one": False, "beta_start": 0.00085, "beta_end": 0.012}
    config = {**wanted, "prediction_type": "epsilon", "num_train_timesteps": 1000}
    made = train_tiny_sd.tiny_pipeline()
    for scheduler in (pipeline.scheduler, made.scheduler):
        assert type(scheduler).__name__ == "PNDMScheduler"
        assert {key: scheduler.config[key] for key in config} == config
    assert pipeline.safety_checker is None and pipeline.vae_scale_factor == 4


def test_latents_have_unit_variance_and_prompts_give_their_digits(pipeline):
    split = datasets.open_split("digits", None, "train")
    pixels, labels = train_tiny_sd.load_images(split, 32)
    means, stds = train_tiny_sd.encode_all(pipeline.vae, pixels[::7], False)
    draws = torch.randn(means.shape, generator=torch.Generator().manual_seed(0))
    latents = (means.float() + stds.float() * draws) * pipeline.vae.config.scaling_factor
    assert abs(float(latents.std()) - 1) < 0.05
    average = torch.stack([pixels[labels == c].float().mean(0) for c in range(10)]) / 255
    made = train_tiny_sd.text_samples(pipeline, split.prompts, 1, 0, 4.0)[:, 0]
    nearest = torch.cdist(made.flatten(1), average.flatten(1)).argmin(1)
    assert (nearest == torch.arange(10)).sum() >= 9


@pytest.mark.parametrize("text", ["", "the digit 7!", "grün, 漢字"])
def test_tokenizer_takes_any_text(pipeline, text, tmp_path):
    tokenizer = pipeline.tokenizer
    tokenizer.save_pretrained(tmp_path)
    settings = {"padding": "max_length", "truncation": True}
    ids = tokenizer(text, **settings).input_ids
    assert ids == type(tokenizer).from_pretrained(tmp_path)(text, **settings).input_ids
    assert len(ids) == tokenizer.model_max_length and tokenizer.eos_token_id in ids
    bare = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(bare).replace(" ", "") == text.replace(" ", "")
    assert len(tokenizer("zero").input_ids) == 3  # a word of the prompts is one token


# ---- training


# sha256 of the weights that SHORT gives in the first edition (commit f7dba0e), with one thread
FIRST = {
    "text_encoder/model": "9615cdd86cd45446ee53975f",
    "unet/diffusion_pytorch_model": "a45d0b23c2319ef213e281f1",
    "vae/diffusion_pytorch_model": "f0402cd555e6a42889904035",
}


def test_an_interrupted_run_ends_in_the_same_bytes(straight, capsys):
    for _ in range(2):  # left inside the VAE, and inside the UNet
        with exits(75):
            train("resumed", "--stop_after", "2")
        assert Path("resumed", train_tiny_sd.CHECKPOINT).exists()
    assert train("resumed") == straight
    assert b'"dtype": "float32"' in straight["text_encoder/config.json"]  # as diffusers takes it
    if test_parity.machine() == files.read_json(test_parity.RECORD)["machine"]:
        weights = {name: straight[f"{name}.safetensors"] for name in FIRST}
        assert {n: hashlib.sha256(b).hexdigest()[:24] for n, b in weights.items()} == FIRST
    capsys.readouterr()
    train("resumed")
    assert "finished already" in capsys.readouterr().out


def test_samples_show_no_real_image_where_none_is_wanted(straight):
    text = train("text", "--samples", "text")
    with Image.open("text/samples.png") as image:
        assert image.width == 6 * (2 * 32 + 2)
    changed = {name for name in straight if straight[name] != text[name]}
    assert changed == {"samples.png", "README.md", output.MANIFEST, output.ARGS}


def test_minutes_set_the_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torch.utils.benchmark.Timer",
        lambda *_, **__: SimpleNamespace(timeit=lambda n: SimpleNamespace(mean=0.1)),
    )
    settings = {"vae_share": 0.25, "minutes": 4, "vae_steps": 7}
    trainer = train_tiny_sd.Trainer(None, torch.device("cpu"), settings, 1, 0, 0)
    assert trainer.number_of_steps("vae", None) == int(60 / 0.11)
    assert trainer.number_of_steps("unet", None) == int(180 / 0.11)
    settings["minutes"] = 0
    assert trainer.number_of_steps("vae", None) == 7


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--vae_channels", "16", "16"], "--vae_factor is 4"),
        (["--vae_channels", "16", "16", "24"], "--vae_channels 24: not a multiple of 16"),
        (["--image_size", "36"], "--image_size 36: not a multiple of 8"),
        (["--unet_batch_size", "5000"], "--unet_batch_size 5000: there are only 1352"),
        (["--perceptual_checkpoint", "nowhere"], "--perceptual_checkpoint nowhere"),
        (["--shard", "0/2"], "trained by one process"),
        (["--vae_lr", "nan"], "--vae_lr"),
        (["--ema_decay", "1"], "--ema_decay"),
    ],
)
def test_refusals(flags, words, refused):
    refused(train_tiny_sd.main, ["--output_dir", "m", *flags], words)
    assert not everything(".")


def test_dry_run_makes_nothing(capsys):
    train("m", "--dry_run")
    assert "plan: m: 0 done, 1 files to do" in capsys.readouterr().out and not everything(".")


def test_the_perceptual_distance_is_zero_for_equal_images_and_moves_the_decoded_ones():
    network = models.create_model("convnet_mini", 10, 32).eval().requires_grad_(False)
    distance = train_tiny_sd.feature_distance(network, (0.5,) * 3, (0.5,) * 3)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert float(distance(pixels, pixels)) == 0
    decoded = (pixels + 0.1 * torch.randn_like(pixels)).requires_grad_()
    distance(decoded, pixels).backward()
    assert decoded.grad.abs().sum() > 0


def test_the_loss_weighs_noise_levels_by_min_snr():
    """min(SNR, gamma) / SNR per image, against the formula written out; gamma 0: squared error."""
    alphas = train_tiny_sd.tiny_pipeline().scheduler.alphas_cumprod
    timesteps, which = torch.tensor([5, 300, 700, 999]), torch.tensor([2, 0, 2, 1])
    latents, noise, answer = torch.randn((3, 4, 4, 8, 8), generator=torch.Generator())

    def unet(noised, t, embeddings):
        signal = alphas[t].view(-1, 1, 1, 1)
        assert torch.allclose(noised, signal.sqrt() * latents + (1 - signal).sqrt() * noise)
        assert torch.equal(embeddings[:, 0, 0], which)  # each latent has its own text
        return SimpleNamespace(sample=answer)

    def loss(gamma):
        texts = lambda tokens: SimpleNamespace(last_hidden_state=tokens[:, :, None])  # noqa: E731
        known = (torch.tensor([[0], [1], [2]]), which, latents, noise, timesteps, alphas, gamma)
        return [float(x) for x in train_tiny_sd.diffusion_loss(unet, texts, *known)]

    errors, snr = (answer - noise).square().mean((1, 2, 3)), (alphas / (1 - alphas))[timesteps]
    assert loss(0) == pytest.approx([float(errors.mean())] * 2)
    weights = torch.tensor([min(s, 5) / s for s in snr.tolist()])
    assert weights[0] < 1 == weights[3]
    assert loss(5.0) == pytest.approx([float((weights * errors).mean()), float(errors.mean())])


@pytest.mark.parametrize("attention, levels", [("inner", 2), ("middle", 0)])
def test_attention_is_where_the_flag_says(attention, levels):
    unet = train_tiny_sd.make_unet(16, 16, [16, 16, 32], 1, attention)
    crossed = [type(block).__name__ for block in unet.down_blocks]
    assert sum("CrossAttn" in name for name in crossed) == levels
    assert "CrossAttn" in type(unet.mid_block).__name__
    prompts = torch.randn(2, 4, 16)
    assert unet(torch.randn(2, 4, 16, 16), 3, prompts).sample.shape == (2, 4, 16, 16)
