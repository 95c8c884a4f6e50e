"""A checkpoint is whole or refused, has one hash in every form, and computes as stock does."""

import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from scripts import checkpoints, files, generators, samplers
from scripts.runtime import generator
from tests.conftest import ROOT

CPU = torch.device("cpu")


def load(checkpoint, **how):
    return generators.load(str(checkpoint), CPU, **how)


@pytest.fixture(scope="module")
def whole(tiny_sd):
    return load(tiny_sd)


@pytest.fixture
def other(tiny_sd, tmp_path):
    """A copy of the checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "other"))


def rewrite(folder, part, change):
    """Pass the weights of one network through `change`."""
    [path] = (folder / part).glob("*.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})


def change(folder, file, **values):
    """Set values of a JSON file."""
    (folder / file).write_text(files.json_text({**files.read_json(folder / file), **values}))


def synthesize(model, seed=1):
    latents = torch.randn(1, 4, 8, 8, generator=generator(seed))
    conditions, negative = [model.condition("two")], model.condition("cartoon")
    return model.denoise(latents, conditions, negative, [generator(3)], 0.7, 8.0, 6)


# ---- what it computes


def test_denoise_and_decode_are_one_call_of_the_pipeline(whole):
    ours = whole.decode(synthesize(whole))
    how = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": 6, "output_type": "pt"}
    latents = torch.randn(1, 4, 8, 8, generator=generator(1))
    prompts = {"prompt": "two", "negative_prompt": "cartoon"}
    stock = whole.pipeline(latents=latents, generator=[generator(3)], **prompts, **how)
    assert torch.equal(ours, stock.images)


def test_shapes_and_facts(whole, refused):
    refused(lambda argv: whole.latent_shape(30), [], "--size 30", "multiple of 4")
    assert whole.latent_shape(32) == (4, 8, 8) and whole.channels == 4
    assert whole.most_steps == 1000 and whole.facts["precision"] == "fp32"
    parts = ("vae", "unet", "text_encoder", "scheduler", "tokenizer")
    assert {f"{part}_sha256" for part in parts} < set(whole.facts)


def test_the_end_of_a_prompt_that_is_not_read(whole):
    most = whole.pipeline.tokenizer.model_max_length - 2
    assert whole.unread("") == whole.unread(" ".join("a" * most)) == ""
    assert whole.unread(" ".join("a" * most + "bc")) == "b c"


def test_libraries_do_not_repeat_what_is_said_of_long_prompts(other, capfd):
    model = load(other)
    for text in ("ab", "cd"):
        model.condition(" ".join(text * 500))
    assert "truncated" not in (said := capfd.readouterr().err) and "Token indices" not in said
    assert "Loading weights" not in said


def test_stage_1_loads_only_what_it_needs(tiny_sd, whole):
    encoder = load(tiny_sd, part="encoder")
    assert list(encoder.networks) == ["vae"] and encoder.pipeline.tokenizer is None
    assert encoder.facts["vae_sha256"] == whole.facts["vae_sha256"]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    draws = [[generator(1, i) for i in range(2)] for _ in range(2)]
    assert torch.equal(encoder.encode(images, draws[0]), whole.encode(images, draws[1]))


def test_what_is_not_finite_is_made_again_in_fp32(tiny_sd):
    model = load(tiny_sd, part="encoder", dtype="bf16")
    vae, results = model.networks["vae"], torch.tensor([[7.0], [torch.nan]])
    again = lambda n: torch.full((1, 1), float(vae.dtype == torch.float32))  # noqa: E731
    generators.mend(model, results, again, ["a", "b"])
    assert results.tolist() == [[7.0], [1.0]] and vae.dtype == torch.bfloat16


def test_the_safety_checker_blackens_what_it_flags(whole, tiny_sd, monkeypatch, refused):
    latents = torch.randn(2, 4, 8, 8, generator=generator(1))
    plain = whole.decode(latents)
    assert plain.flatten(1).amax(1).min() > 0

    def run_safety_checker(images, device, dtype):
        assert images.min() >= -1 and images.max() <= 1
        return images, [False, True]

    monkeypatch.setitem(whole.pipeline.__dict__, "safety_checker", object())
    monkeypatch.setattr(whole.pipeline, "run_safety_checker", run_safety_checker)
    checked = whole.decode(latents)
    assert torch.equal(checked[0], plain[0]) and checked[1].max() == 0
    assert torch.equal(whole.decode(latents, check=False), plain)
    refused(lambda argv: load(tiny_sd, safety_checker="on"), [], "cannot be loaded")


# ---- samplers


class Answer(tuple):
    sample = property(lambda self: self[0])


class KnowsTheAnswer(torch.nn.Module):
    """A denoiser whose answer is exact: all images are the latent `clean`."""

    dtype, device = torch.float32, CPU

    def __init__(self, denoiser, clean, predicts, betas):
        super().__init__()
        self.config, self.clean, self.predicts, self.times = denoiser.config, clean, predicts, []
        self.add_embedding = getattr(denoiser, "add_embedding", None)  # an SDXL's pipeline looks
        if betas is not None:
            share = torch.cumprod(1 - betas, 0)
            self.log_ratios = (share / (1 - share)).log().numpy()

    def forward(self, x=None, t=None, hidden_states=None, timestep=None, **_):
        x, t = (hidden_states if x is None else x), (timestep if t is None else t)
        self.times.append(float(t.flatten()[0]))
        clean = self.clean.repeat(len(x) // len(self.clean), 1, 1, 1)
        if self.predicts == "flow":  # x = (1 - s) z + s e
            return Answer([(x - clean) / (self.times[-1] / 1000)])
        ratio = torch.tensor(np.interp(self.times[-1], range(1000), self.log_ratios))
        a = torch.sigmoid(ratio).float()
        noise = (x - a**0.5 * clean) / (1 - a) ** 0.5
        is_v = self.predicts == "v_prediction"
        return Answer([a**0.5 * noise - (1 - a) ** 0.5 * clean if is_v else noise])


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS |= {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False}
SCALED = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LINEAR = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)


def drawn(model, scheduler, predicts="epsilon", betas=SCALED, start=0.7, steps=50):
    """(error of the latent that a sampler ends at, times at which the denoiser is asked)."""
    clean = torch.randn(2, model.channels, 8, 8, generator=generator(1))
    parts = dict(model.pipeline.components)
    conditions = [model.condition("two" if "tokenizer" in parts else 2)] * 2
    negative, own = model.condition("" if "tokenizer" in parts else None), model.pipeline
    denoiser = KnowsTheAnswer(model.networks[model.DENOISER], clean, predicts, betas)
    parts |= {model.DENOISER: denoiser, "scheduler": scheduler}
    networks = {**model.networks, model.DENOISER: denoiser}
    try:
        model.pipeline = type(own)(**parts, **model.OPTIONS)
        model.pipeline.set_progress_bar_config(disable=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "networks", networks)
            how = (negative, [generator(2), generator(3)], start, 8.0, steps)
            made = model.denoise(clean, conditions, *how)
        return (made - clean).abs().max().item(), denoiser.times
    finally:
        model.pipeline = own


@pytest.mark.parametrize("predicts", samplers.SAMPLER["prediction_type"])
@pytest.mark.parametrize("name", samplers.SAMPLER["_class_name"])
def test_a_sampler_starts_at_the_strength_and_ends_at_the_clean_latent(name, predicts, whole):
    """0.03 of the noise stays where a schedule ends at t = 0, as Stable Diffusion's does."""
    scheduler = getattr(diffusers, name).from_config({**BETAS, "prediction_type": predicts})
    error, times = drawn(whole, scheduler, predicts)
    assert error < 0.15 and abs(times[0] - 700) < 40


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
UNFIT = [
    ("EDMEulerScheduler", {}),  # noise
    ("DPMSolverMultistepInverseScheduler", {}),
    ("UniPCMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", {"solver_type": "bh1"}),  # NaN, as the next
    ("UniPCMultistepScheduler", {"predict_x0": False}),
    ("DDIMScheduler", {"thresholding": True}),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
]


@pytest.mark.parametrize("name, settings", UNFIT)
def test_a_sampler_that_does_not_is_refused_in_stage_1_already(
    name, settings, whole, other, refused
):
    error, times = drawn(whole, getattr(diffusers, name).from_config({**BETAS, **settings}))
    assert not error <= 0.15 or abs(times[0] - 700) > 40
    change(other, "scheduler/scheduler_config.json", **settings)
    change(other, "model_index.json", scheduler=["diffusers", name])  # whose class is loaded
    words = "its scheduler has " if settings else f"its scheduler is {name}"
    refused(lambda argv: load(*argv, part="encoder"), [other], words, "what works: ")


def test_a_samplers_defaults_are_checked_too(other, refused):
    config = files.read_json(other / "scheduler/scheduler_config.json")
    del config["skip_prk_steps"]
    (other / "scheduler/scheduler_config.json").write_text(files.json_text(config))
    refused(lambda argv: load(*argv), [other], "its scheduler has skip_prk_steps False")


NO_SIGNAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
SCHEDULES = [
    ("DDIMScheduler", NO_SIGNAL, "zero terminal SNR"),
    ("EulerDiscreteScheduler", NO_SIGNAL, "zero terminal SNR"),
    ("DPMSolverMultistepScheduler", NO_SIGNAL, "zero terminal SNR"),
    ("PNDMScheduler", {"trained_betas": [0.01] * 9}, "9 trained_betas for 1000 timesteps"),
]


@pytest.mark.parametrize("name, settings, words", SCHEDULES)
def test_a_schedule_that_a_denoiser_of_noise_cannot_follow(name, settings, words, other, refused):
    change(other, "model_index.json", scheduler=["diffusers", name])
    change(other, "scheduler/scheduler_config.json", **settings)
    refused(lambda argv: load(*argv), [other], f"its scheduler has {words}")
    if settings is NO_SIGNAL:
        change(other, "scheduler/scheduler_config.json", prediction_type="v_prediction")
        load(other)


def test_a_consistency_model_takes_no_more_steps_than_it_was_made_for(other):
    change(other, "scheduler/scheduler_config.json", original_inference_steps=8)
    change(other, "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    assert load(other).most_steps == 8


# ---- one hash for one model


def test_a_hash_sees_values_and_not_precision(tiny_sd, whole):
    for dtype in ("fp16", "bf16"):
        model = load(tiny_sd, part="encoder", dtype=dtype)
        assert model.networks["vae"].dtype == generators.DTYPES[dtype]
        assert model.facts["vae_sha256"] == whole.facts["vae_sha256"]
    vae = load(tiny_sd, part="encoder").networks["vae"]
    # an fp16 variant's file holds these values
    assert checkpoints.weights_hash(vae.half().float()) == whole.facts["vae_sha256"]
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert checkpoints.weights_hash(vae) != whole.facts["vae_sha256"]


def test_older_names_of_the_text_encoders_weights_are_read(other, whole):
    """As in stable-diffusion-v1-5's own file."""
    rewrite(other, "text_encoder", lambda w: {f"text_model.{k}": v for k, v in w.items()})
    name = "text_encoder_sha256"
    assert load(other).facts[name] == whole.facts[name]


def test_a_single_file_gives_the_same_networks_and_picture(other, tmp_path, refused):
    shutil.rmtree(other / "unet")
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    kinds |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}
    size = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}
    attention = {"attention_head_dim": 4, "cross_attention_dim": 16}
    UNet2DConditionModel(**kinds, **size, **attention).save_pretrained(
        other / "unet"
    )  # v1-5's kind
    path, config, whole = tmp_path / "v1.safetensors", str(other), load(other)
    weights = single_file(whole.pipeline)
    save_file(weights, path)
    model = load(path, single_file_config=config)
    same = [name for name in whole.facts if name.endswith("_sha256")]
    assert [model.facts[name] for name in same] == [whole.facts[name] for name in same]
    assert torch.equal(synthesize(model), synthesize(whole))
    assert list(load(path, part="encoder", single_file_config=config).networks) == ["vae"]
    lost = next(name for name in weights if name.endswith("mlp.fc1.weight"))
    for part in ("model.diffusion_model.out.2.weight", "first_stage_model.quant_conv.bias", lost):
        save_file({k: v for k, v in weights.items() if k != part}, path)
        refused(lambda argv: load(*argv, single_file_config=config), [path], path)
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    xl = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
    wrong = {"inpainting": {**weights, conv: torch.zeros(8, 9, 3, 3)}}
    wrong |= {"xl_base": {**weights, xl: torch.zeros(1)}}
    wrong["UNet is missing"] = {"lora_unet.lora_up.weight": torch.zeros(2, 2)}
    for words, tensors in wrong.items():
        save_file(tensors, path)
        encoder = {"single_file_config": config, "part": "encoder"}
        refused(lambda argv, how=encoder: load(*argv, **how), [path], words)


# ---- checkpoints that are not whole


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
@pytest.mark.parametrize("how", ["lacks a weight", "is cut off", "is empty", "is quantized"])
def test_weights_that_are_not_whole(how, part, other, refused):
    """Both libraries take what is there, and draw the rest at random, anew at each start."""
    [path] = (other / part).glob("*.safetensors")
    if how == "lacks a weight":
        lost = min(name for name, value in load_file(path).items() if value.ndim == 2)
        rewrite(other, part, lambda w: {k: v for k, v in w.items() if k != lost})
        words = ["weights are missing from it", lost.split(".")[-1]]
    elif how == "is quantized":  # some layers, to integers whose scales are elsewhere
        lost = next(name for name, value in load_file(path).items() if value.ndim == 2)
        rewrite(other, part, lambda w: {**w, lost: (w[lost] * 99).round().to(torch.int8)})
        words = [f"its {part} holds integers as weights, first {lost}"]
    else:
        path.write_bytes(path.read_bytes()[:-50] if how == "is cut off" else b"")
        words = ["cannot be loaded"]
    refused(lambda argv: load(*argv), [other], f"--diffusion_checkpoints_path {other}", *words)


def test_a_tokenizer_that_is_gone(other, refused):
    """transformers makes one of a few words up."""
    for path in (other / "tokenizer").glob("*"):
        if path.name != "tokenizer_config.json":
            path.unlink()
    refused(lambda argv: load(*argv), [other], "its tokenizer has 2 words, its text_encoder")


@pytest.mark.parametrize("length, said", [(500, "500"), (None, "1e+30")])
def test_a_tokenizer_that_gives_more_than_the_encoder_takes(length, said, other, refused):
    change(other, "tokenizer/tokenizer_config.json", model_max_length=length)
    refused(lambda argv: load(*argv), [other], f"model_max_length {said},", "takes 32")


STAGE_1 = [
    ("model_index.json", "_class_name", "FluxPipeline"),
    ("model_index.json", "_class_name", "PixArtAlphaPipeline"),
    ("model_index.json", "_class_name", "StableDiffusionInpaintPipeline"),
    ("model_index.json", "text_encoder", ["transformers", "T5EncoderModel"]),
    ("model_index.json", "scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
    ("model_index.json", "scheduler", ["diffusers", "CMStochasticIterativeScheduler"]),
    ("vae/config.json", "_class_name", "AutoencoderTiny"),
    ("vae/config.json", "latent_channels", 16),
    ("vae/config.json", "shift_factor", 0.1),
    ("unet/config.json", "in_channels", 9),
    ("unet/config.json", "out_channels", 8),
    ("unet/config.json", "addition_embed_type", "text_time"),
    ("unet/config.json", "class_embed_type", "projection"),
    ("unet/config.json", "cross_attention_dim", 768),
    ("unet/config.json", "sample_size", "64"),
    ("vae/config.json", "scaling_factor", "0.18"),
    ("vae/config.json", "scaling_factor", None),
]


@pytest.mark.parametrize("file, key, value", STAGE_1)
def test_another_kind_of_checkpoint_is_refused_before_anything_is_loaded(
    file, key, value, other, refused
):
    change(other, file, **{key: value})
    for path in other.rglob("*.safetensors"):
        path.unlink()
    value = value[-1] if isinstance(value, list) else value
    words = "its unet takes texts of width 768" if key == "cross_attention_dim" else f" {value}"
    refused(lambda argv: load(*argv, part="encoder"), [other], words)


def rename(folder, end, parts=("vae", "unet", "text_encoder")):
    for path in (path for part in parts for path in (folder / part).glob("*.safetensors")):
        path.rename(path.with_name(path.name.split(".")[0] + end))


def test_weights_of_one_precision_are_found(other, whole, capsys, refused):
    rename(other, ".fp16.safetensors")
    assert load(other).facts == {**whole.facts, "model": "other"}
    words = "the only weights that are there: vae (fp16), unet (fp16), text_encoder (fp16)"
    assert words in capsys.readouterr().err
    rename(other, ".safetensors", ["vae"])
    assert load(other, variant="fp16").facts["vae_sha256"] == whole.facts["vae_sha256"]
    assert "that are there: vae (plain)" in capsys.readouterr().err
    rename(other, ".non_ema.safetensors", ["unet"])
    words = ["no plain .safetensors weights of its unet", "there are --variant non_ema"]
    refused(lambda argv: load(*argv), [other], *words)
    rename(other, ".bin", ["vae"])
    words = [
        "no plain .safetensors weights of its vae",
        "only .bin",
        "python -c",
        "save_pretrained",
    ]
    refused(lambda argv: load(*argv, part="encoder"), [other], *words)


@pytest.mark.parametrize("name", ["fp16", None])
def test_a_hub_id_that_was_downloaded_before(name, tiny_sd, tmp_path, monkeypatch, whole):
    folder = tmp_path / "models--me--tiny"
    shutil.copytree(tiny_sd, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    rename(folder / "snapshots" / ("a" * 40), f".{name}.safetensors" if name else ".safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load("me/tiny", part="encoder")
    assert model.facts["vae_sha256"] == whole.facts["vae_sha256"] and model.native_size == 32


def test_the_native_size(other, whole):
    """By the UNet's configuration; diffusers' first versions wrote 32 for Stable Diffusion's 64."""
    assert whole.native_size == 32 == load(other, part="encoder").native_size
    for size, version, right in ((24, "0.40.0", 96), ([24, 24], "0.40.0", 96), (32, "0.6.0", 256)):
        change(other, "unet/config.json", sample_size=size, _diffusers_version=version)
        assert load(other, part="encoder").native_size == right
    change(other, "unet/config.json", sample_size=None)
    assert load(other, part="encoder").native_size is None


CONFIGS = [
    ("vae/config.json", "scaling_factor", 0),  # all prototypes would be zero
    ("unet/config.json", "attention_head_dim", 0),
    ("text_encoder/config.json", "hidden_size", 7),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
    ("model_index.json", "_class_name", ["evil", "Pipeline"]),
]


@pytest.mark.parametrize("file, key, value", CONFIGS)
def test_values_in_a_models_configuration(file, key, value, other, refused):
    config = files.read_json(other / file)
    (other / file).write_text(files.json_text({**config, key: value}))
    refused(lambda argv: load(*argv), [other], f"--diffusion_checkpoints_path {other}")


MISSING = {
    "no/such/folder/at/all": "no such file or folder",
    "no-such-owner/no-such-model": "hf download no-such-owner/no-such-model",
    "missing.safetensors": "no such file or folder",
    "model.ckpt": "only .safetensors",
    "broken.safetensors": "cannot be loaded",
    "empty": "model_index.json",
}


@pytest.mark.parametrize("checkpoint", MISSING)
def test_checkpoints_that_are_missing_hold_code_or_are_none(refused, checkpoint):
    for name in ("model.ckpt", "broken.safetensors"):
        Path(name).write_bytes(b"x" * 100)
    Path("empty").mkdir()
    refused(lambda argv: load(*argv), [checkpoint], checkpoint, MISSING[checkpoint])


def test_nothing_else_knows_what_a_generator_is_made_of():
    known = ("generators.py", "families.py", "checkpoints.py", "samplers.py")
    for folder in ("scripts", "distillation", "matching", "validate"):
        for path in (ROOT / folder).glob("*.py"):
            if path.name not in known and not path.name.startswith("pipeline_"):
                found = re.search(r"unet|text_encoder|tokenizer|scheduler\.", path.read_text())
                assert not found, f"{path}: {found[0]}"


# ---- diffusers' names of a Stable Diffusion v1's weights -> those of the original single files

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE = {"down_blocks": "down", ".resnets.": ".block.", "conv_shortcut": "nin_shortcut"}
VAE |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_norm_out": "norm_out"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipeline):
    """{name: tensor} of all three networks, as in v1-5-pruned.safetensors."""
    unet, found = pipeline.unet.config, {}
    attended = [i for i, kind in enumerate(unet.up_block_types) if kind.startswith("CrossAttn")]
    levels = len(pipeline.vae.config.block_out_channels)
    for name, tensor in pipeline.vae.state_dict().items():
        attention = "mid_block.attentions.0" in name and tensor.ndim == 2
        tensor = tensor[:, :, None, None] if attention else tensor
        found[f"first_stage_model.{vae_name(name, levels)}"] = tensor.contiguous()
    for name, tensor in pipeline.unet.state_dict().items():
        name = unet_name(name, unet.layers_per_block, attended)
        found[f"model.diffusion_model.{name}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        name = name.removeprefix("text_model.")
        found[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return found


def vae_name(name, levels):
    def up(found):
        return f"decoder.up.{levels - 1 - int(found[1])}"

    name = re.sub(r"decoder\.up_blocks\.(\d+)", up, name)
    words = {**VAE, **(ATTENTION if "attentions.0" in name else {})}
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    return re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)


def resnet_name(name):
    head, _, rest = name.partition(".")
    return f"{RESNET[head]}.{rest}"


def unet_name(name, layers, attended):
    head, _, rest = name.partition(".")
    simple = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    if head in simple:
        return f"{simple[head]}.{rest}"
    if m := re.match(r"time_embedding\.linear_(\d)\.(.*)", name):
        return f"time_embed.{2 * int(m[1]) - 2}.{m[2]}"
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        if m[1] == "attentions":
            return f"middle_block.1.{m[3]}"
        return f"middle_block.{2 * int(m[2])}.{resnet_name(m[3])}"
    blocks = r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)"
    side, block, kind, i, rest = re.match(blocks, name).groups()
    block, i = int(block), int(i)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    at = block * (layers + 1) + i
    if kind == "upsamplers":
        return f"output_blocks.{at + layers}.{2 if block in attended else 1}.{rest}"
    at = f"input_blocks.{at + 1}" if side == "down" else f"output_blocks.{at}"
    return f"{at}.0.{resnet_name(rest)}" if kind == "resnets" else f"{at}.1.{rest}"
