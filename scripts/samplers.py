"""Samplers: which of diffusers' schedulers work, and at which noise level img2img starts.

What counts for D4M is signal / noise = sqrt(abar) / sqrt(1 - abar) at the first timestep that is
really run, not the share of a schedule: at strength 0.7 the paper's sampler starts at t = 701 with
0.286 / 0.958.
"""

import functools
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from scripts import checkpoints
from scripts.runtime import refuse

# what stock img2img draws right from: given the exact noise it starts at t = strength * T and ends
# at the clean latent (tests/test_generators.py); EDM and consistency models do not
SAMPLERS = """PNDM DDIM DDIMParallel DDPM DDPMParallel EulerDiscrete EulerAncestralDiscrete LCM TCD
    HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DEISMultistep DPMSolverMultistep LMSDiscrete
    DPMSolverSinglestep UniPCMultistep SASolver"""
NEVER = "thresholding use_flow_sigmas use_beta_sigmas use_exponential_sigmas use_lu_lambdas"
SAMPLER = {
    "_class_name": tuple(f"{name}Scheduler" for name in SAMPLERS.split()),
    "prediction_type": ("epsilon", "v_prediction"),
    "interpolation_type": ("linear",),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "skip_prk_steps": (True,),
    "predict_x0": (True,),
    "solver_type": ("midpoint", "heun", "bh2", "logrho"),  # UniPC's bh1 gives NaN
    **dict.fromkeys(NEVER.split(), (None, False)),
}
# only Stable Diffusion's pipeline turns this off where a checkpoint leaves it on: it clips latents
UNCLIPPED = {**SAMPLER, "clip_sample": (False, None)}
FLOW = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    **dict.fromkeys(
        ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"), (False, None)
    ),
    **dict.fromkeys(("use_karras_sigmas", *NEVER.split()), (None, False)),
}

# --scheduler
NAMES = {"pndm": "PNDM", "ddim": "DDIM", "ddpm": "DDPM", "dpmpp": "DPMSolverMultistep"}
NAMES |= {"euler": "EulerDiscrete", "unipc": "UniPCMultistep"}
LEVELS = ("schedule", "paper")  # --noise_level


def check_schedule(scheduler):
    """Raises ValueError if some timestep has no noise level, or the last one no signal to find."""
    steps, shares = scheduler.config.num_train_timesteps, getattr(scheduler, "alphas_cumprod", ())
    if len(shares) not in (0, steps):  # 0: flow matching
        raise ValueError(f"its scheduler has {len(shares)} trained_betas for {steps} timesteps")
    if len(shares) and shares[-1] < 1e-6 and scheduler.config.prediction_type == "epsilon":
        raise ValueError("its scheduler has zero terminal SNR, which prediction_type epsilon bars")


def replaced(own, name, table, guide_weight=None):
    """The scheduler called `name` with the training schedule of a checkpoint's `own`.

    table          what of a scheduler works in the checkpoint's family
    guide_weight   of --guide mode: it is then ModeGuidedDDPM, and `name` "own" or "ddpm"
    """
    import diffusers

    guided, kind, flag = guide_weight is not None, type(own).__name__, f"--scheduler {name}"
    if guided and name not in ("own", "ddpm"):
        refuse(f"{flag}: --guide mode samples by ddpm")
    name, flag = ("ddpm", "--guide mode") if guided else (name, flag)
    cls = f"{NAMES[name]}Scheduler"
    if cls not in table["_class_name"] or own.config.get("original_inference_steps"):
        refuse(f"{flag}: this checkpoint works only with its own, {kind}")
    # latents are not clipped to [-1, 1], whatever the class's default is
    settings = {"clip_sample": False, "skip_prk_steps": True}
    if guided:
        from scripts.mode_guidance import ModeGuidedDDPM

        other = ModeGuidedDDPM.from_config(own.config, **settings, variance_type="fixed_small")
        other.weight = guide_weight
    else:
        other = getattr(diffusers, cls).from_config(own.config, **settings)
    if not torch.allclose(own.alphas_cumprod, other.alphas_cumprod, atol=1e-6):  # zero-SNR betas
        refuse(f"{flag}: it cannot follow the noise schedule of this checkpoint's own, {kind}")
    checkpoints.check_settings("scheduler", {**other.config, "_class_name": cls}, table)
    return other


# ---- noise levels


class Start(NamedTuple):
    """Where img2img starts.

    strength        what stock img2img is given for it
    timestep        the first that is run, of 1000 as a rule
    signal, noise   sqrt(abar), sqrt(1 - abar) there; their squares add up to 1 for every sampler
    calls           timesteps that are run from there
    """

    strength: float
    timestep: float
    signal: float
    noise: float
    calls: int

    def __str__(self):
        ratio = f"signal / noise {self.signal:.3f} / {self.noise:.3f}"
        return f"starts at t = {self.timestep:g}: {ratio}; {self.calls} timesteps are run"


def start_at(pipeline, steps, strength):
    """The Start of an img2img pipeline, whose scheduler has its timesteps; None: no step is left"""
    if int(steps * strength) < 1:  # PNDM would run the one that it repeats
        return None
    timesteps, _ = pipeline.get_timesteps(steps, strength, "cpu")
    scheduler, t = pipeline.scheduler, timesteps[:1]
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    if hasattr(scheduler, "scale_noise"):  # flow matching: x = (1 - sigma) z + sigma e
        parts = scheduler.scale_noise(one, t, zero), scheduler.scale_noise(zero, t, one)
    else:  # x = sqrt(abar) z + sqrt(1 - abar) e, or z + sigma e
        parts = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
    both = torch.cat(parts).flatten().double()
    signal, noise = (both / both.norm()).tolist()
    return Start(strength, t.item(), signal, noise, len(timesteps))


def find_start(pipeline, steps, strength, level):
    """The Start at `strength`: a share of the schedule of `steps` (level "schedule"), or the noise
    level that the paper's sampler starts at for this strength ("paper"): the nearest step.

    Strength 1 is the whole schedule in either case. None if no step is left.
    """
    pipeline.scheduler.set_timesteps(steps)
    if level == "schedule" or strength == 1:
        return start_at(pipeline, steps, strength)
    wanted = papers_start(strength)
    if not wanted or int(steps * strength) < 1:
        return None
    # halves: the pipelines round strength * steps differently, these reach every step of each
    shares = (n / (2 * steps) for n in range(1, 2 * steps))  # the whole is for strength 1
    starts = [start for share in shares if (start := start_at(pipeline, steps, share))]
    levels = [math.log(max(start.signal, 1e-6) / start.noise) for start in (*starts, wanted)]
    return starts[min(range(len(starts)), key=lambda n: abs(levels[n] - levels[-1]))]


@functools.cache
def papers_start(strength):
    """Where Stable Diffusion v1-5's PNDM starts, with 50 steps."""
    from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **betas)
    scheduler.set_timesteps(50)
    stock, pipeline = StableDiffusionImg2ImgPipeline.get_timesteps, SimpleNamespace()
    pipeline.scheduler, pipeline.get_timesteps = scheduler, functools.partial(stock, pipeline)
    return start_at(pipeline, 50, strength)
