"""The embedded digits model is what its manifest says, and its trainer resumes to the same bytes."""

import logging
from pathlib import Path

import pytest
import torch

from distillation.datasets import open_split
from misc import train_tiny_sd
from scripts.files import VOLATILE, read_manifest, sha256

MODEL = Path(__file__).parent.parent / "misc" / "tiny-sd-digits"
PHOTOGRAPHS = MODEL.parent / "tiny-sd-cifar10"
SHORT = (
    "--dataset digits --classes 0 7 --max_images_per_class 12 --vae_channels 16 16 --vae_factor 2 --vae_steps 3 "
    "--unet_channels 16 16 --unet_steps 3 --text_width 16 --vae_batch_size 8 --unet_batch_size 8 "
    "--sample_guidance 1 --sample_every 0"
).split()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionImg2ImgPipeline

    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(MODEL)
    for logger in loggers:
        logger.removeHandler(handler)
    assert not records
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(folder, *more):
    train_tiny_sd.main([*SHORT, "--device", "cpu", "--output_dir", str(folder), *more])


def bytes_of(folder):
    """{file: sha256} of all that must not differ between two runs."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in VOLATILE and p.parent.name != "samples")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


# ------------------------------------------------------------------------------------------------------ embedded model


def test_was_trained_on_the_training_split_as_it_is_now():
    manifest = read_manifest("MODEL", MODEL, "tiny_sd", verify=True)
    split = open_split("digits", None, "train")
    assert manifest["split"]["sha256"] == split.digest() == manifest["arguments"]["split"]
    assert manifest["split"]["images"] == sum(map(len, split.items))
    assert manifest["split"]["sha256"] != open_split("digits", None, "val").digest()
    assert manifest["reconstruction_psnr_db"] >= 30 and manifest["reconstruction_psnr_on"] == "val"
    assert [c["prompt"] for c in manifest["classes"]] == list(split.prompts)


@pytest.mark.parametrize("model, mib", [(MODEL, 3), (PHOTOGRAPHS, 7)])
def test_is_small_and_holds_no_pickle(model, mib):
    files = [path for path in model.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= mib * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".png", ".md"}
    listed = set(read_manifest("MODEL", model, "tiny_sd", verify=True)["files"])
    assert {path.relative_to(model).as_posix() for path in files} == listed | {"manifest.json", "args.json"}


def test_the_photographs_model_is_what_its_card_says():
    from PIL import Image

    manifest = read_manifest("MODEL", PHOTOGRAPHS, "tiny_sd")
    assert manifest["dataset"] == "cifar10"
    assert manifest["split"]["images"] == 50000  # the training split has so many; the test split 10,000
    assert manifest["reconstruction_psnr_on"] == "val" and manifest["reconstruction_psnr_db"] > 35
    assert manifest["arguments"]["prompt_dropout"] == 0.1
    preset = {key: manifest["arguments"][key] for key in train_tiny_sd.PRESETS["cpu"] if key != "flip"}
    assert preset == {key: value for key, value in train_tiny_sd.PRESETS["cpu"].items() if key != "flip"}
    with Image.open(PHOTOGRAPHS / "samples.png") as image:  # six a class from text, and none of the photographs
        assert image.width == 6 * (2 * 32 + 2)


def test_is_configured_as_stable_diffusion_v1_5(pipeline):
    scheduler = pipeline.scheduler
    assert type(scheduler).__name__ == "PNDMScheduler"
    wanted = {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False,
              "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}  # fmt: skip
    assert {key: scheduler.config[key] for key in wanted} == wanted
    assert pipeline.safety_checker is None and not pipeline.config.requires_safety_checker
    assert pipeline.vae_scale_factor == 4 and pipeline.unet.config.sample_size == 8


def test_latents_have_unit_variance(pipeline):
    images, _ = train_tiny_sd.load_images(open_split("digits", None, "train", max_per_class=20), 32)
    means, stds = train_tiny_sd.encode_all(pipeline.vae, images, "cpu", flip=False)
    draws = torch.randn(means.shape, generator=torch.Generator().manual_seed(0))
    latents = (means.float() + stds.float() * draws) * pipeline.vae.config.scaling_factor
    assert abs(float(latents.std()) - 1) < 0.05


def test_prompts_give_their_digits(pipeline):
    split = open_split("digits", None, "train")
    images, labels = train_tiny_sd.load_images(split, 32)
    average = torch.stack([images[labels == c].float().mean(0) for c in range(10)]) / 255  # (10, 3, 32, 32)
    models = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    made = torch.stack(
        [row[0] for row in train_tiny_sd.text_samples(models, split.prompts, 1, 0, torch.device("cpu"), 4)]
    )
    nearest = torch.cdist(made.flatten(1), average.flatten(1)).argmin(1)
    assert (nearest == torch.arange(10)).sum() >= 9


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", ["", "zero", "cartoon, anime, painting", "a photo of the digit 7!", "grün, 漢字"])
def test_tokenizer_takes_any_text(pipeline, text, tmp_path):
    tokenizer = pipeline.tokenizer
    tokenizer.save_pretrained(tmp_path)
    length = tokenizer.model_max_length
    settings = dict(padding="max_length", max_length=length, truncation=True)
    ids = tokenizer(text, **settings).input_ids
    assert ids == type(tokenizer).from_pretrained(tmp_path)(text, **settings).input_ids
    assert len(ids) == length and ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids
    long = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in long  # every byte has a token
    decoded = tokenizer.decode(long, clean_up_tokenization_spaces=False)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_words_of_the_prompts_are_single_tokens(pipeline):
    for prompt in (*open_split("digits", None, "train").prompts, "cartoon", "painting"):
        assert len(pipeline.tokenizer(prompt).input_ids) == 3


# ------------------------------------------------------------------------------------------------------------ training


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, capsys):
    train(tmp_path / "straight", "--sample_every", "2")  # looking at it changes nothing
    for _ in range(2):  # left inside the VAE, and inside the UNet
        with pytest.raises(SystemExit) as left:
            train(tmp_path / "resumed", "--stop_after", "2")
        assert left.value.code == 75 and (tmp_path / "resumed" / train_tiny_sd.CHECKPOINT).exists()
    train(tmp_path / "resumed")
    straight = bytes_of(tmp_path / "straight")
    assert straight == bytes_of(tmp_path / "resumed")
    assert "unet/diffusion_pytorch_model.safetensors" in straight and train_tiny_sd.CHECKPOINT not in straight
    capsys.readouterr()
    train(tmp_path / "straight")
    assert "finished already" in capsys.readouterr().out


def test_minutes_set_the_steps(monkeypatch):
    calls = []

    def loss_at(step):
        calls.append(step)
        return weight.sum(), {"mse": weight.detach().sum()}

    weight = torch.nn.Parameter(torch.zeros(2))
    clock = iter(range(1000))
    monkeypatch.setattr(train_tiny_sd.time, "perf_counter", lambda: next(clock) / 10)  # a step takes 0.1 s
    from contextlib import nullcontext

    assert train_tiny_sd.steps_within(2, loss_at, [weight], nullcontext) == int(120 / 0.11)
    assert weight.grad is None and len(calls) == 13


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vae_channels", "16", "16"], "--vae_factor is 4"),
        (["--vae_channels", "16", "16", "24"], "--vae_channels 24: not a multiple of 16"),
        (["--image_size", "36"], "--image_size 36: not a multiple of 8"),
        (["--unet_batch_size", "5000"], "--unet_batch_size 5000: there are only 1352 training images"),
        (["--perceptual_checkpoint", "nowhere"], "--perceptual_checkpoint nowhere"),
        (["--seed", "-1"], "--seed"),
        (["--vae_lr", "nan"], "--vae_lr"),
        (["--prompt_dropout", "2"], "--prompt_dropout"),
        (["--ema_decay", "1"], "--ema_decay"),
        (["--minutes", "-5"], "--minutes"),
    ],
)
def test_refusals(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train_tiny_sd.main(["--output_dir", str(tmp_path / "m"), *flags])
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_feature_distance_is_zero_for_equal_images_and_reaches_only_the_decoded_ones():
    from matching.models import create_model

    network = create_model("convnet_mini", 10, 32)
    distance = train_tiny_sd.FeatureDistance(network, (0.5,) * 3, (0.5,) * 3, 32)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert float(distance(images, images)) == 0
    decoded = (images + 0.1 * torch.randn_like(images)).requires_grad_()
    distance(decoded, images).backward()
    assert decoded.grad.abs().sum() > 0 and all(p.grad is None for p in network.parameters())


def test_the_loss_weighs_noise_levels_by_min_snr():
    """min(SNR, gamma) / SNR an image, against the formula written out; gamma 0 is the plain squared error."""
    from types import SimpleNamespace

    alphas = train_tiny_sd.make_scheduler().alphas_cumprod
    timesteps = torch.tensor([5, 300, 700, 999])
    draw = torch.Generator().manual_seed(0)
    latents, noise, answer = torch.randn((3, 4, 4, 8, 8), generator=draw)

    def unet(noised, t, embeddings):
        signal = alphas[t].view(-1, 1, 1, 1)
        assert torch.allclose(noised, signal.sqrt() * latents + (1 - signal).sqrt() * noise)
        assert torch.equal(embeddings[:, 0, 0], torch.tensor([2.0, 0.0, 2.0, 1.0]))  # each latent its own text
        return SimpleNamespace(sample=answer)

    def text_encoder(tokens):
        return SimpleNamespace(last_hidden_state=tokens[:, :, None].float())

    def loss(gamma):
        tokens, which = torch.tensor([[0], [1], [2]]), torch.tensor([2, 0, 2, 1])
        return train_tiny_sd.diffusion_loss(
            unet, text_encoder, tokens, which, latents, noise, timesteps, alphas, gamma
        )

    errors = [float(((a - n) ** 2).mean()) for a, n in zip(answer, noise)]
    plain = sum(errors) / 4
    assert [float(x) for x in loss(0)] == pytest.approx([plain, plain])
    snr = [float(alphas[t] / (1 - alphas[t])) for t in timesteps]
    assert snr[0] > 5 > snr[3]
    expected = sum(e * min(s, 5) / s for e, s in zip(errors, snr)) / 4
    assert [float(x) for x in loss(5.0)] == pytest.approx([expected, plain])


@pytest.mark.parametrize("attention, levels", [("inner", 2), ("middle", 0)])
def test_attention_is_where_the_flag_says(attention, levels):
    unet = train_tiny_sd.make_unet(16, [16, 16, 32], 1, attention, 16)
    crossed = [type(block).__name__ for block in unet.down_blocks if "CrossAttn" in type(block).__name__]
    assert len(crossed) == levels and "CrossAttn" in type(unet.mid_block).__name__
    prompt = torch.randn(1, 4, 16)
    assert unet(torch.randn(2, 4, 16, 16), 3, prompt.expand(2, -1, -1)).sample.shape == (2, 4, 16, 16)


def test_a_folder_to_be_handed_on_shows_no_real_image(tmp_path):
    from PIL import Image

    widths = {}
    for samples in ("real", "text"):
        train(tmp_path / samples, "--samples", samples)
        with Image.open(tmp_path / samples / "samples.png") as image:
            widths[samples] = round(image.width / (2 * 32 + 2))
    assert widths == {"real": 12, "text": 6}
    same, differ = bytes_of(tmp_path / "real"), bytes_of(tmp_path / "text")
    changed = {name for name in same if same[name] != differ[name]}
    assert changed == {"samples.png", "README.md", "manifest.json"}  # the model is the same
