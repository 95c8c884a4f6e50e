"""Tiny generators of each family, built from configuration: random weights, images of 32 px.

folder("dit")       # in diffusers format, made once and removed at the end
"""

import functools
import tempfile
from pathlib import Path

import diffusers
import torch
import transformers

from misc import train_tiny_sd

# as published: Stable Diffusion's betas, DiT's, Stable Diffusion 3's shift
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DIT_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
WIDTH = 16  # of each text encoder


def tokenizer():
    return train_tiny_sd.make_tokenizer([], 32)


def text_encoder(cls, words):
    special = {n: getattr(words, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "projection_dim": WIDTH}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(words)}
    sizes["max_position_embeddings"] = words.model_max_length
    return cls(transformers.CLIPTextConfig(**sizes, **special))


def t5():
    """T5's encoder and a tokenizer of letters, one or two; its table is padded to 256 words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    pieces += [(first + second, -2.0) for first in ["", *letters[:5]] for second in letters]
    words = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    sizes = {"d_model": 2 * WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=256, **sizes)), words


def vae(channels=4, **more):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=8,
        latent_channels=channels,
        sample_size=32,
        **more,
    )


def sdxl():
    words, scheduler = tokenizer(), diffusers.EulerDiscreteScheduler
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025),
        text_encoder=text_encoder(transformers.CLIPTextModel, words),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, words),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=scheduler(steps_offset=1, timestep_spacing="leading", **SD_BETAS),
        add_watermarker=False,
    )


def sd3(with_t5=False):
    words, cls = tokenizer(), transformers.CLIPTextModelWithProjection
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    encoder, letters = t5() if with_t5 else (None, None)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text_encoder(cls, words),
        text_encoder_2=text_encoder(cls, words),
        text_encoder_3=encoder,
        tokenizer=words,
        tokenizer_2=tokenizer(),
        tokenizer_3=letters,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **DIT_BETAS)
    return diffusers.DiTPipeline(transformer, vae(), scheduler)


FAMILIES = {
    "sd": lambda: train_tiny_sd.tiny_pipeline(1),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3_t5": lambda: sd3(with_t5=True),
    "dit": dit,
}


ROOT = tempfile.TemporaryDirectory(prefix="d4m-tiny-")


@functools.cache
def folder(family, seed=0):
    """A checkpoint of the family; copy before changing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[family]()
        # untrained transformers end in zeros: nothing would depend on the condition
        for name in ("transformer", "unet"):
            for parameter in getattr(pipeline, name, torch.nn.Module()).parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)
    path = Path(ROOT.name) / f"{family}-{seed}"
    pipeline.save_pretrained(path)
    return path
