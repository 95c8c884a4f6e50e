"""The two pipelines are diffusers' own loop, bit for bit, at the release's settings."""

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel

from scripts import generators
from scripts.runtime import generator

CPU = torch.device("cpu")
SETTINGS = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": 50, "output_type": "pt"}


IMAGES = torch.rand(3, 3, 32, 32, generator=generator(0))
LATENTS = torch.randn(3, 4, 8, 8, generator=generator(1))


@pytest.fixture(scope="module")
def stable_diffusion(tiny_sd):
    return generators.load(str(tiny_sd), CPU)


@pytest.fixture
def encoder(stable_diffusion):
    return stable_diffusion.encoder


@pytest.fixture
def synthesis(stable_diffusion):
    return stable_diffusion.pipeline


@pytest.fixture
def stock(synthesis):
    stock = StableDiffusionImg2ImgPipeline(**synthesis.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def test_encoding_is_a_sample_of_the_posterior_times_the_scaling_factor(encoder, stock):
    with torch.no_grad():
        posterior = encoder.vae.encode(IMAGES * 2 - 1).latent_dist
    expected = posterior.sample(generator(1)) * encoder.vae.config.scaling_factor
    assert torch.equal(encoder(IMAGES, generator(1)), expected)
    # stock img2img encodes, then noises; here its scheduler adds no noise
    stock.scheduler.add_noise = lambda latents, noise, t: latents
    arguments = (IMAGES * 2 - 1, torch.tensor([1]), 3, 1, torch.float32, CPU)
    assert torch.equal(stock.prepare_latents(*arguments, generator(1)), expected)
    del stock.scheduler.add_noise


def test_synthesis_is_diffusers_loop_with_36_calls(synthesis, monkeypatch):
    """PNDM, 50 steps, strength 0.7: t = 701, 681, ... 1; guidance and decoding written out here."""
    latents = LATENTS[:2]
    prompts, negative = ["zero", "one"], ["cartoon, anime, painting"] * 2
    calls, forward = [], UNet2DConditionModel.forward

    def counting(self, *args, **kwargs):
        calls.append(args)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counting)
    draws = [generator(2, i) for i in range(2)]
    ours = synthesis(prompts, latents, negative_prompt=negative, generator=draws, **SETTINGS)
    assert len(calls) == 36

    pipe = synthesis
    with torch.no_grad():
        text, no_text = pipe.encode_prompt(prompts, CPU, 1, True, negative)
        embeds = torch.cat([no_text, text])
        scheduler = pipe.scheduler
        scheduler.set_timesteps(50)
        timesteps = scheduler.timesteps[50 - 35 :]
        assert timesteps.tolist() == list(range(701, 0, -20))
        noise = [torch.randn(1, 4, 8, 8, generator=generator(2, i)) for i in range(2)]
        x = scheduler.add_noise(latents, torch.cat(noise), timesteps[:1].repeat(2))
        for t in timesteps:
            both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample
            uncond, cond = both.chunk(2)
            x = scheduler.step(uncond + 8.0 * (cond - uncond), t, x).prev_sample
        images = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert torch.equal(ours.images, (images / 2 + 0.5).clamp(0, 1))


def test_synthesis_equals_stock_img2img(synthesis, stock):
    ours = synthesis("two", LATENTS[:1], generator=generator(3), **SETTINGS).images
    theirs = stock("two", image=LATENTS[:1], generator=generator(3), **SETTINGS).images
    assert torch.equal(ours, theirs)


def test_no_latent_and_no_image_depends_on_its_batch(encoder, synthesis):
    prompts, settings = ["zero", "one", "two"], {**SETTINGS, "num_inference_steps": 10}
    for made in (
        lambda which, draws: encoder(IMAGES[which], draws),
        lambda which, draws: (
            synthesis(prompts[which], LATENTS[which], generator=draws, **settings).images
        ),
    ):
        together = made(slice(3), [generator(7, i) for i in range(3)])
        alone = [made(slice(i, i + 1), [generator(7, i)]) for i in range(3)]
        assert (together - torch.cat(alone)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_other_shapes_and_numbers_of_prompts_are_refused(encoder, synthesis, shape):
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        encoder(torch.rand(*shape))
    with pytest.raises(ValueError, match="expected \\(B, 4, h, w\\)"):
        synthesis("zero", torch.rand(*shape).movedim(-1, -3))
    with pytest.raises(ValueError, match="2 prompts for 1 latents"):
        synthesis(["zero", "one"], torch.rand(1, 4, 8, 8))
