"""Latent -> image: a prototype noised to `strength`, denoised and decoded (paper, section 3)."""

import torch
from diffusers import StableDiffusion3Img2ImgPipeline as Stock3
from diffusers import StableDiffusionImg2ImgPipeline as Stock
from diffusers import StableDiffusionXLImg2ImgPipeline as StockXL


class Decoder:
    """For pipelines: decoding alone."""

    @torch.no_grad()
    def decode(self, latents):
        """Without diffusion: latents (B, c, h, w), scaled -> images (B, 3, H, W) in [0, 1]."""
        config = self.vae.config
        latents = latents.to(self._execution_device, self.vae.dtype) / config.scaling_factor
        if config.shift_factor:
            latents = latents + config.shift_factor
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


class Latents2Img(Decoder):
    """Stock img2img, given latents: it takes an `image` of c channels for scaled latents."""

    def __call__(self, prompt=None, latents=None, **kwargs):
        """Synthesize images from prototypes.

        latents    (B, c, h, w), clean, already times vae.config.scaling_factor
        prompt     B prompts, or None with prompt_embeds (B, tokens, width) in kwargs
        kwargs     as for stock img2img: strength, guidance_scale, num_inference_steps,
                   negative_prompt, generator, ...
        Raises ValueError for latents of another shape, and for a number of prompts other than B.
        """
        channels = self.vae.config.latent_channels
        if latents is None or latents.ndim != 4 or latents.shape[1] != channels:
            shape = None if latents is None else tuple(latents.shape)
            raise ValueError(f"latents: expected (B, {channels}, h, w), got {shape}")
        given = [prompt] if isinstance(prompt, str) else prompt
        if prompt is None:
            given = kwargs["prompt_embeds"]
        if len(given) != len(latents):
            raise ValueError(f"{len(given)} prompts for {len(latents)} latents")
        return super().__call__(prompt=prompt, image=latents, **kwargs)

    def prepare_latents(self, image, timestep, batch, per_prompt, dtype, *device_and_generator):
        """In fp32: PyTorch 2.11 draws another noise in half precision, 2.15 does not."""
        how = (batch, per_prompt, torch.float32, *device_and_generator)
        return super().prepare_latents(image, timestep, *how).to(dtype)


class StableDiffusionLatents2ImgPipeline(Latents2Img, Stock):
    """Of Stable Diffusion 1.x and 2.x."""


class StableDiffusionXLLatents2ImgPipeline(Latents2Img, StockXL):
    """Of Stable Diffusion XL."""


class StableDiffusion3Latents2ImgPipeline(Latents2Img, Stock3):
    """Of Stable Diffusion 3.x, whose stock has to be told the size."""

    def __call__(self, prompt=None, latents=None, **kwargs):
        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        return super().__call__(prompt, latents, height=height, width=width, **kwargs)
