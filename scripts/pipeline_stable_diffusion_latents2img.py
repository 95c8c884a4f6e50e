"""Latent -> image: a prototype noised to `strength`, denoised and decoded (paper, section 3)."""

import torch
from diffusers import StableDiffusionImg2ImgPipeline


class StableDiffusionLatents2ImgPipeline(StableDiffusionImg2ImgPipeline):
    """Stock img2img, given latents: it takes a 4-channel `image` for latents, already scaled."""

    def __call__(self, prompt=None, latents=None, **kwargs):
        """Synthesize images from prototypes.

        latents    (B, 4, h, w), clean, already times vae.config.scaling_factor
        prompt     B prompts, or None with prompt_embeds (B, tokens, width) in kwargs
        kwargs     as for stock img2img: strength, guidance_scale, num_inference_steps,
                   negative_prompt, generator, ...
        Raises ValueError for latents of another shape, and for a number of prompts other than B.
        """
        if latents is None or latents.ndim != 4 or latents.shape[1] != 4:
            shape = None if latents is None else tuple(latents.shape)
            raise ValueError(f"latents: expected (B, 4, h, w), got {shape}")
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

    @torch.no_grad()
    def decode(self, latents):
        """Without diffusion: latents (B, 4, h, w), scaled -> images (B, 3, H, W) in [0, 1]."""
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(latents).sample
        return self.image_processor.postprocess(images, output_type="pt")
