"""Image -> latent, z = E(x): a VAE's encoder as a pipeline (paper, section 3.2)."""

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class StableDiffusionGenLatentsPipeline(StableDiffusionImg2ImgPipeline):
    """Stock img2img reduced to its first step; needs only the VAE, the other components may be
    None."""

    @torch.no_grad()
    def __call__(self, images, generator=None):
        """Encode real images.

        images      (B, 3, H, W) in [0, 1]
        generator   one torch.Generator for the batch, or B of them, so that a latent does not
                    depend on its batch
        Returns     (B, c, H/8, W/8): a sample of the posterior, times vae.config.scaling_factor
        Raises ValueError for anything that is not 3-channel: stock img2img would take 4 channels
        (RGBA) for latents.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected (B, 3, H, W), got {tuple(images.shape)}")
        images = self.image_processor.preprocess(images)  # [0, 1] -> [-1, 1]
        posterior = self.vae.encode(images.to(self._execution_device, self.vae.dtype)).latent_dist
        # in fp32: PyTorch 2.11 draws another noise in half precision, 2.15 does not
        latents = DiagonalGaussianDistribution(posterior.parameters.float()).sample(generator)
        if self.vae.config.shift_factor:
            latents = latents - self.vae.config.shift_factor
        return latents.to(self.vae.dtype) * self.vae.config.scaling_factor
