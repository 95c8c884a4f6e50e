"""Latent -> image with a DiT, of which diffusers has no img2img: Stable Diffusion's, in short."""

import torch
from diffusers import DiTPipeline, StableDiffusionImg2ImgPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from scripts.pipeline_stable_diffusion_latents2img import Decoder


class DiTLatents2ImgPipeline(Decoder, DiTPipeline):
    """Stock DiT's loop, begun as Stable Diffusion's img2img begins its own."""

    get_timesteps = StableDiffusionImg2ImgPipeline.get_timesteps
    prepare_extra_step_kwargs = StableDiffusionImg2ImgPipeline.prepare_extra_step_kwargs

    @torch.no_grad()
    def __call__(
        self,
        latents,
        class_labels,
        null_label,
        generator,
        strength,
        guidance_scale,
        num_inference_steps,
        output_type="latent",
    ):
        """latents (B, 4, h, w), clean and scaled; B class_labels -> .images, latents (B, 4, h, w)

        generator   B of torch.Generator
        """
        device, dtype, count = self._execution_device, self.transformer.dtype, len(latents)
        guided = guidance_scale > 1
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps, _ = self.get_timesteps(num_inference_steps, strength, device)
        # in fp32, as in the other pipelines
        noise = randn_tensor(latents.shape, generator, device, torch.float32)
        x = latents.to(device, torch.float32)
        x = self.scheduler.add_noise(x, noise, timesteps[:1].repeat(count)).to(dtype)
        labels = torch.tensor([*class_labels, *[null_label] * (count * guided)], device=device)
        more = self.prepare_extra_step_kwargs(generator, 0.0)
        for t in timesteps:
            both = self.scheduler.scale_model_input(torch.cat([x] * (1 + guided)), t)
            found = self.transformer(both, timestep=t.expand(len(both)), class_labels=labels)
            predicted = found.sample[:, : x.shape[1]]  # the others are learned variances
            if guided:
                of_class, of_none = predicted.chunk(2)
                predicted = of_none + guidance_scale * (of_class - of_none)
            x = self.scheduler.step(predicted, t, x, **more).prev_sample
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=x)
