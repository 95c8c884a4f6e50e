"""The two pipelines are diffusers' own loop, bit for bit, at the release's settings."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from ldm import single_file
from safetensors.torch import save_file

from scripts.checkpoints import load_pipeline, weights_hash
from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline
from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline
from scripts.runtime import generator

CPU = torch.device("cpu")
SETTINGS = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": 50, "output_type": "pt"}


@pytest.fixture(scope="module")
def encoder(tiny_sd):
    return load_pipeline(StableDiffusionGenLatentsPipeline, str(tiny_sd), CPU, "fp32", vae_only=True)[0]


@pytest.fixture(scope="module")
def synthesis(tiny_sd):
    return load_pipeline(StableDiffusionLatents2ImgPipeline, str(tiny_sd), CPU, "fp32")[0]


def test_encode_is_the_posterior_sample_times_the_scaling_factor(encoder):
    images = torch.rand(3, 3, 32, 32, generator=generator(0))
    with torch.no_grad():
        posterior = encoder.vae.encode(images * 2 - 1).latent_dist
    expected = posterior.sample(generator(1)) * encoder.vae.config.scaling_factor
    assert torch.equal(encoder(images, generator(1)), expected)
    assert expected.shape == (3, 4, 8, 8)


def test_encode_equals_the_stock_pipelines_own_encoding(encoder, synthesis):
    """Stock img2img encodes and then noises; its noise is taken off again by asking for it at zero noise level."""
    images = torch.rand(2, 3, 32, 32, generator=generator(0))
    stock = StableDiffusionImg2ImgPipeline(**synthesis.components, requires_safety_checker=False)
    stock.scheduler.add_noise = lambda latents, noise, t: latents
    expected = stock.prepare_latents(images * 2 - 1, torch.tensor([1]), 2, 1, torch.float32, CPU, generator(5))
    del stock.scheduler.add_noise
    assert torch.equal(encoder(images, generator(5)), expected)


def test_one_generator_an_image_makes_latents_independent_of_their_batch(encoder):
    images = torch.rand(4, 3, 32, 32, generator=generator(0))
    together = encoder(images, [generator(7, i) for i in range(4)])
    alone = torch.cat([encoder(images[i : i + 1], [generator(7, i)]) for i in range(4)])
    assert (together - alone).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_encoding_refuses_what_is_not_three_channel(encoder, shape):
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        encoder(torch.rand(*shape))


def test_synthesis_is_diffusers_loop_with_36_unet_calls(synthesis, counted):
    """PNDM at 50 steps and strength 0.7: t = 701, 681, ... 1; guidance and decoding written out here."""
    latents = torch.randn(2, 4, 8, 8, generator=generator(1))
    prompts, negative = ["zero", "one"], ["cartoon, anime, painting"] * 2
    calls = counted(UNet2DConditionModel, "forward")
    ours = synthesis(
        prompts, latents, negative_prompt=negative, generator=[generator(2, i) for i in range(2)], **SETTINGS
    )
    assert len(calls) == 36

    pipe = synthesis
    with torch.no_grad():
        text, no_text = pipe.encode_prompt(prompts, CPU, 1, True, negative)
        embeds = torch.cat([no_text, text])
        scheduler = pipe.scheduler
        scheduler.set_timesteps(50)
        timesteps = scheduler.timesteps[50 - 35 :]
        assert timesteps.tolist() == list(range(701, 0, -20))
        noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator(2, i)) for i in range(2)])
        x = scheduler.add_noise(latents, noise, timesteps[:1].repeat(2))
        for t in timesteps:
            uncond, cond = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample.chunk(2)
            x = scheduler.step(uncond + 8.0 * (cond - uncond), t, x).prev_sample
        images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert torch.equal(ours.images, (images / 2 + 0.5).clamp(0, 1))


def test_synthesis_equals_stock_img2img(synthesis):
    latents = torch.randn(1, 4, 8, 8, generator=generator(1))
    stock = StableDiffusionImg2ImgPipeline(**synthesis.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    ours = synthesis("two", latents, generator=generator(3), **SETTINGS).images
    assert torch.equal(ours, stock("two", image=latents, generator=generator(3), **SETTINGS).images)


def test_a_batch_equals_single_images(synthesis):
    latents = torch.randn(3, 4, 8, 8, generator=generator(1))
    prompts = ["zero", "one", "two"]
    together = synthesis(prompts, latents, generator=[generator(4, i) for i in range(3)], **SETTINGS).images
    for i in range(3):
        alone = synthesis(prompts[i], latents[i : i + 1], generator=[generator(4, i)], **SETTINGS).images
        assert (together[i] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 8, 8, 8)])
def test_synthesis_refuses_latents_of_another_shape(synthesis, shape):
    with pytest.raises(ValueError, match="expected \\(B, 4, h, w\\)"):
        synthesis("zero", torch.rand(*shape))


def test_synthesis_refuses_another_number_of_prompts(synthesis):
    with pytest.raises(ValueError, match="2 prompts for 1 latents"):
        synthesis(["zero", "one"], torch.rand(1, 4, 8, 8))


def test_stage_1_loads_only_the_vae(encoder, synthesis):
    assert [name for name, part in encoder.components.items() if part is not None] == ["vae"]
    assert weights_hash(encoder.vae) == weights_hash(synthesis.vae)
    assert synthesis.safety_checker is None


def rewritten(tiny_sd, tmp_path, part, change):
    """The checkpoint with the weights of one network passed through `change`."""
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(tiny_sd, tmp_path / "copy")
    [path] = (copy / part).glob("*.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})
    return copy


def test_the_hubs_older_names_of_the_text_encoders_weights_are_read(synthesis, tiny_sd, tmp_path):
    """As in stable-diffusion-v1-5's own file."""
    old = rewritten(tiny_sd, tmp_path, "text_encoder", lambda w: {f"text_model.{k}": v for k, v in w.items()})
    _, hashes = load_pipeline(StableDiffusionLatents2ImgPipeline, str(old), torch.device("cpu"), "fp32")
    assert hashes["text_encoder_sha256"] == weights_hash(synthesis.text_encoder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_checkpoint_that_lacks_weights_is_refused(part, tiny_sd, tmp_path, refused):
    """The libraries would fill the gap with random numbers."""
    lacking = rewritten(tiny_sd, tmp_path, part, lambda w: dict(list(w.items())[1:]))
    refused(
        lambda argv: load_pipeline(StableDiffusionLatents2ImgPipeline, *argv, torch.device("cpu"), "fp32"),
        [lacking],
        "--diffusion_checkpoints_path",
    )


def test_a_single_file_gives_the_same_networks_as_the_folder(synthesis, tiny_sd, tmp_path, refused):
    path = tmp_path / "v1.safetensors"
    save_file(single_file(synthesis), path)
    for cls, names in (
        (StableDiffusionLatents2ImgPipeline, ["vae", "unet", "text_encoder"]),
        (StableDiffusionGenLatentsPipeline, ["vae"]),
    ):
        loaded, _ = load_pipeline(cls, str(path), CPU, "fp32", vae_only=len(names) == 1, config=str(tiny_sd))
        for name in names:
            assert weights_hash(getattr(loaded, name)) == weights_hash(getattr(synthesis, name))
        assert (loaded.unet is None) == (len(names) == 1)
    latents = torch.randn(1, 4, 8, 8, generator=generator(1))
    loaded, _ = load_pipeline(StableDiffusionLatents2ImgPipeline, str(path), CPU, "fp32", config=str(tiny_sd))
    images = [pipe("two", latents, generator=generator(3), **SETTINGS).images for pipe in (loaded, synthesis)]
    assert torch.equal(*images)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_one_checkpoint_has_one_hash_in_every_precision(tiny_sd, dtype):
    cast, hashes = load_pipeline(StableDiffusionGenLatentsPipeline, str(tiny_sd), CPU, dtype, vae_only=True)
    assert cast.vae.dtype != torch.float32
    plain = load_pipeline(StableDiffusionGenLatentsPipeline, str(tiny_sd), CPU, "fp32", vae_only=True)
    assert hashes == plain[1] == {"vae_sha256": weights_hash(plain[0].vae)}


def test_weights_hash_sees_values_and_not_precision(encoder):
    before = weights_hash(encoder.vae)
    parameter = next(encoder.vae.parameters())
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(saved.half().float())
        assert weights_hash(encoder.vae) == before
        parameter.view(-1)[0] += 1
    assert weights_hash(encoder.vae) != before
    with torch.no_grad():
        parameter.copy_(saved)


@pytest.mark.parametrize(
    "checkpoint, words",
    [
        ("no/such/folder/at/all", "no such file or folder"),
        ("no-such-owner/no-such-model", "hf download no-such-owner/no-such-model"),
        ("missing.safetensors", "no such file or folder"),
    ],
)
def test_a_missing_checkpoint_is_one_line(refused, checkpoint, words):
    def load(argv):
        load_pipeline(StableDiffusionGenLatentsPipeline, argv[0], CPU, "fp32", vae_only=True)

    refused(load, [checkpoint], f"--diffusion_checkpoints_path {checkpoint}", words)


def test_files_that_may_hold_code_and_folders_that_are_no_pipeline_are_refused(refused, tmp_path):
    def load(argv):
        load_pipeline(StableDiffusionGenLatentsPipeline, argv[0], CPU, "fp32", vae_only=True)

    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused(load, [tmp_path / "model.ckpt"], "only .safetensors")
    refused(load, [tmp_path], "model_index.json")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    refused(load, [tmp_path / "broken.safetensors"], "cannot be loaded")
