"""Mode guidance (MGD3, arXiv 2505.18963): early steps of DDPM are drawn to a prototype."""

from diffusers import DDPMScheduler


class ModeGuidedDDPM(DDPMScheduler):
    """In steps with t > T / 2: x_{t-1} = mean + lambda sigma_t (m - x0) + sigma_t noise.

    modes     (B, c, h, w): m, the prototypes, one per sample of the batch
    weight    lambda
    sigma_t is the posterior's standard deviation; x0 is predicted from the guided noise.
    """

    modes, weight = None, 0.0

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        made = super().step(model_output, timestep, sample, generator)
        if timestep > self.config.num_train_timesteps / 2:
            sigma = self._get_variance(timestep) ** 0.5
            away = self.modes.to(sample) - made.pred_original_sample
            made.prev_sample = made.prev_sample + self.weight * sigma * away
        return made if return_dict else (made.prev_sample,)
