"""diffusers' names of a Stable Diffusion v1's weights -> the names in the original single-file checkpoints."""

import re

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipeline):
    """{name: tensor} of the VAE, the UNet and the text encoder, as in v1-5-pruned.safetensors."""
    unet = pipeline.unet.config
    layers = unet.layers_per_block
    attended = [i for i, kind in enumerate(unet.up_block_types) if kind.startswith("CrossAttn")]
    levels = len(pipeline.vae.config.block_out_channels)
    return {
        **{
            f"first_stage_model.{k}": v
            for k, v in map(lambda kv: _vae(*kv, levels), pipeline.vae.state_dict().items())
        },
        **{f"model.diffusion_model.{_unet(k, layers, attended)}": v for k, v in pipeline.unet.state_dict().items()},
        **{
            f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
            for k, v in pipeline.text_encoder.state_dict().items()
        },
    }


def _vae(name, tensor, levels):
    name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
    for ours, theirs in (
        ("down_blocks", "down"),
        (".resnets.", ".block."),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_norm_out", "norm_out"),
    ):
        name = name.replace(ours, theirs)
    name = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for ours, theirs in ATTENTION.items():
            name = name.replace(ours, theirs)
        tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return name, tensor.contiguous()


def _resnet(name):
    head, _, rest = name.partition(".")
    return f"{RESNET[head]}.{rest}"


def _unet(name, layers, attended):
    head, _, rest = name.partition(".")
    simple = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if head in simple:
        return f"{simple[head]}.{rest}"
    if m := re.match(r"time_embedding\.linear_(\d)\.(.*)", name):
        return f"time_embed.{2 * int(m[1]) - 2}.{m[2]}"
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        return f"middle_block.{2 * int(m[2])}.{_resnet(m[3])}" if m[1] == "resnets" else f"middle_block.1.{m[3]}"
    m = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    side, block, kind, i, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if block in attended else 1}.{rest}"
    at = (
        f"input_blocks.{1 + block * (layers + 1) + i}"
        if side == "down"
        else f"output_blocks.{block * (layers + 1) + i}"
    )
    return f"{at}.0.{_resnet(rest)}" if kind == "resnets" else f"{at}.1.{rest}"
