"""The networks that are timed: Stable Diffusion 1.5's configuration or small ones, with random weights."""

import copy
import json

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from matching.models import create_model
from matching.training import seeded
from misc.bench.measure import flops_of
from scripts.checkpoints import cast, speed_up
from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline
from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline

LETTERS = [chr(c) for c in range(33, 127)]
VOCABULARY = ["<|startoftext|>", "<|endoftext|>"] + LETTERS + [c + "</w>" for c in LETTERS]
VAE = {
    True: {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    False: {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 4},
}
UNET = {
    True: {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    False: {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
}
TEXT = {
    True: {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    False: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def networks(real, side):
    """(VAE, UNet, text encoder) of Stable Diffusion 1.5, or small ones; random weights. side: of latents, pixels."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        sample_size=side,
        **VAE[real],
    )
    unet = UNet2DConditionModel(sample_size=side // 8, **UNET[real])
    words = {"vocab_size": 49408 if real else len(VOCABULARY), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, hidden_act="quick_gelu", **words, **TEXT[real]))
    return vae.eval(), unet.eval(), text.eval()


def pipelines(real, side, device, root):
    """(stage 1's pipeline, stage 2's), sharing their networks, fp16 on a GPU."""
    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    with seeded(0):
        vae, unet, text = networks(real, side)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "text_encoder": text,
        "tokenizer": CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=77),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    both = StableDiffusionGenLatentsPipeline(**parts), StableDiffusionLatents2ImgPipeline(**parts)
    for pipeline in both:
        pipeline.set_progress_bar_config(disable=True)
        cast(pipeline, torch.float16 if device.type == "cuda" else torch.float32)
        pipeline.to(device)
    return both


def sped_up(pipeline, names):
    """{name: a copy of the pipeline}, for "channels_last" and "channels_last + compile"."""
    return {name: speed_up(copy.deepcopy(pipeline), True, "compile" in name) for name in names}


def real_flops():
    """FLOPs of the Stable Diffusion 1.5 configuration and ResNets, counted without computing (meta device)."""
    with torch.device("meta"):
        vae, unet, text = networks(True, 512)
        image, latent = torch.empty(1, 3, 512, 512), torch.empty(1, 4, 64, 64)
        words, tokens = torch.empty(1, 77, 768), torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            found = {
                "vae_encode": flops_of(lambda: vae.encode(image)),
                "unet_step": flops_of(lambda: unet(latent, torch.zeros(1), words)),
                "vae_decode": flops_of(lambda: vae.decode(latent)),
            }
            try:
                found["text"] = flops_of(lambda: text(tokens))
            except (RuntimeError, NotImplementedError):  # its mask looks at the tokens
                found["text"] = 13e9
        found["synthesis"] = 72 * found["unet_step"] + found["vae_decode"]
        resnet, x = create_model("resnet18", 1000, 224), torch.empty(2, 3, 224, 224)
        found["resnet18_forward"] = flops_of(lambda: resnet(x)) // 2
        found["resnet18_training"] = flops_of(lambda: resnet(x).sum().backward()) // 2
    return found
