"""Every family computes as stock diffusers does, starts at the noise level that it says, and
refuses what it does not know. Tiny models with random weights: see tiny_models."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DiTPipeline

from scripts import generators, samplers
from scripts.runtime import generator
from tests import tiny_models
from tests.test_generators import CPU, LINEAR, SCALED, change, drawn, load

BETAS = {"sd": SCALED, "sdxl": SCALED, "dit": LINEAR, "sd3": None, "sd3_t5": None}
GUIDED = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": 5}
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator(0))


@pytest.fixture(scope="module")
def models():
    return {family: load(tiny_models.folder(family)) for family in tiny_models.FAMILIES}


@pytest.fixture(params=["sdxl", "sd3", "dit"])  # Stable Diffusion: test_pipelines
def family(request):
    return request.param


@pytest.fixture
def model(family, models):
    return models[family]


@pytest.fixture
def spoilt(tmp_path):
    """spoilt(family): a copy of its checkpoint, to be changed."""
    return lambda family: Path(shutil.copytree(tiny_models.folder(family), tmp_path / family))


def latents_of(model, count=3):
    return torch.randn(count, model.channels, 8, 8, generator=generator(1))


def told(model, count):
    """(conditions, negative): prompts, or a class and the null class."""
    text = model.CONDITION == "prompt"
    classes = ["tench", "goldfish", "hammerhead"] if text else [0, 1, 999]
    none = "cartoon, anime" if text else None
    return [model.condition(c) for c in classes[:count]], model.condition(none)


def made(model, which, guidance=8.0, negative=None, strength=0.7, steps=5):
    """Latents of some of three images, each with noise of its own."""
    conditions, none = told(model, 3)
    draws = [generator(2, i) for i in which]
    how = ([conditions[i] for i in which], negative or none, draws, strength, guidance, steps)
    return model.denoise(latents_of(model)[list(which)], *how)


# ---- against stock


STOCK = {"sd": "", "sdxl": "XL", "sd3": "3", "sd3_t5": "3"}


@pytest.mark.parametrize("prompted", STOCK)
def test_it_is_stock_img2img_to_the_bit(prompted, models):
    model = models[prompted]
    cls = getattr(diffusers, f"StableDiffusion{STOCK[prompted]}Img2ImgPipeline")
    stock = cls(**model.pipeline.components, **model.OPTIONS)
    stock.set_progress_bar_config(disable=True)
    texts = {"prompt": "tench", "negative_prompt": "cartoon, anime"}
    texts |= {"height": 32, "width": 32} if model.DENOISER == "transformer" else {}
    how = {**GUIDED, "output_type": "pt", "generator": generator(2, 0)}
    theirs = stock(image=latents_of(model)[:1], **texts, **how).images
    assert torch.equal(model.decode(made(model, [0])), theirs)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_dit_is_stocks_loop_to_the_bit_given_its_start(guidance, models, monkeypatch):
    model = models["dit"]
    stock = DiTPipeline(**model.pipeline.components)
    stock.set_progress_bar_config(disable=True)
    how = {"guidance_scale": guidance, "num_inference_steps": 5, "output_type": "pt"}
    theirs = stock([0, 1], generator=[generator(2, i) for i in range(2)], **how).images
    # stock begins with the noise alone
    monkeypatch.setattr(model.pipeline.scheduler, "add_noise", lambda z, noise, t: noise)
    ours = made(model, range(2), guidance, strength=1.0)
    with torch.no_grad():
        pixels = stock.vae.decode(1 / stock.vae.config.scaling_factor * ours).sample
    assert torch.equal((pixels / 2 + 0.5).clamp(0, 1), theirs)


def test_img2img_with_a_dit_by_a_plain_loop(models):
    model = models["dit"]
    pipe, z = model.pipeline, latents_of(model, 1)
    betas = LINEAR.float()
    a = torch.cumprod(1 - betas, 0)
    noise = torch.randn(1, 4, 8, 8, generator=generator(2, 0))
    x = a[400] ** 0.5 * z + (1 - a[400]) ** 0.5 * noise
    with torch.no_grad():
        for t in range(400, -1, -200):
            labels, both = torch.tensor([0, 1000]), torch.cat([x, x])
            e, null = pipe.transformer(both, torch.tensor([t, t]), labels).sample[:, :4]
            e = (null + 8.0 * (e - null))[None]
            clean = (x - (1 - a[t]) ** 0.5 * e) / a[t] ** 0.5
            before = a[t - 200] if t else torch.tensor(1.0)
            x = before**0.5 * clean + (1 - before) ** 0.5 * e
    assert (made(model, [0]) - x).abs().max() < 1e-3 * x.abs().max()


def test_latents_are_shifted_and_scaled_both_ways(model):
    config, vae = model.pipeline.vae.config, model.pipeline.vae
    shift, draws = config.shift_factor or 0, [generator(3, i) for i in range(3)]
    with torch.no_grad():
        posterior = vae.encode(IMAGES / 127.5 - 1).latent_dist
        clean = posterior.sample([generator(3, i) for i in range(3)])
        pixels = (vae.decode(clean).sample / 2 + 0.5).clamp(0, 1)
    latents = model.encode(IMAGES, draws)
    assert (latents - (clean - shift) * config.scaling_factor).abs().max() < 1e-5
    assert (model.decode(latents) - pixels).abs().max() < 1e-5
    assert latents.shape[1:] == model.latent_shape(32) and model.native_size == 32


def test_no_image_depends_on_its_batch_and_each_on_its_class(model):
    together, alone = made(model, range(3)), torch.cat([made(model, [i]) for i in range(3)])
    assert (together - alone).abs().max() < 1e-4 * together.abs().max()
    conditions, none = told(model, 3)
    draws = [generator(2, 0)]
    of_another = model.denoise(latents_of(model)[:1], conditions[1:2], none, draws, 0.7, 8.0, 5)
    assert (of_another - alone[:1]).abs().max() > 1e-3


def test_guidance_off_asks_once_and_not_for_the_negative(model, monkeypatch):
    cls, sizes = type(model.networks[model.DENOISER]), []
    original = cls.forward

    def forward(self, *args, **kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        sizes.append(len(x))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    conditions, none = told(model, 3)
    off = made(model, range(2), guidance=1.0)
    assert set(sizes) == {2}
    assert torch.equal(off, made(model, range(2), guidance=1.0, negative=conditions[2]))
    made(model, range(2))
    assert set(sizes) == {2, 4}


# ---- precision and memory


def test_the_vae_of_an_sdxl_stays_in_fp32_where_it_overflows(spoilt, models):
    folder = spoilt("sdxl")
    model = load(folder, dtype="bf16")
    assert model.networks["vae"].dtype == torch.float32
    assert model.networks["unet"].dtype == torch.bfloat16
    start = model.start(0.7, 5).strength
    half, full = (model.decode(made(m, [0], strength=start)) for m in (model, models["sdxl"]))
    assert half.dtype == torch.float32 and (half - full).abs().mean() < 0.1
    change(folder, "vae/config.json", force_upcast=False)  # "fp16-fix"
    assert load(folder, dtype="bf16", part="encoder").networks["vae"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype, apart", [("fp16", {torch.float32}), ("bf16", set())])
def test_the_parts_of_t5_that_overflow_in_fp16_stay_in_fp32(dtype, apart):
    """As where transformers loads it in this precision, also after something was made again."""
    folder, part, half = tiny_models.folder("sd3_t5"), "text_encoder_3", generators.DTYPES[dtype]
    how = {"subfolder": part, "dtype": half}
    stock = transformers.T5EncoderModel.from_pretrained(folder, **how).state_dict()
    model = load(folder, dtype=dtype)
    for _ in range(2):
        ours = model.networks[part].state_dict()
        types = {name: tensor.dtype for name, tensor in ours.items()}
        assert types == {name: tensor.dtype for name, tensor in stock.items()}
        assert {*types.values()} == {half, *apart}
        assert all(torch.equal(tensor, stock[name]) for name, tensor in ours.items())
        with model.in_fp32():
            assert {p.dtype for p in model.networks[part].parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["sd", "sd3", "dit"])  # whose samplers do not scale what is read
def test_half_precision_starts_from_the_noise_of_fp32(family, models):
    starts = []

    def note(_, args, kwargs):
        starts.append(args[0] if args else kwargs["hidden_states"])

    for model in (load(tiny_models.folder(family), dtype="bf16"), models[family]):
        hook = model.networks[model.DENOISER].register_forward_pre_hook(note, with_kwargs=True)
        made(model, range(2), guidance=1.0, steps=2)
        hook.remove()
    half, full = starts[0], starts[len(starts) // 2]
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.to(torch.bfloat16))


def test_offloading_changes_no_byte(family, models):
    model = load(tiny_models.folder(family), offload=True)
    latents = [m.encode(IMAGES, [generator(i) for i in range(3)]) for m in (model, models[family])]
    assert torch.equal(*latents)
    for _ in range(2):  # the hooks are put on again after each call
        assert torch.equal(*(m.decode(made(m, range(2))) for m in (model, models[family])))
    with model.in_fp32():
        made(model, [0])
    assert model.facts == models[family].facts


# ---- samplers and noise levels


def test_the_papers_start():
    start = samplers.papers_start(0.7)
    assert start.timestep == 701 and start.calls == 36
    assert (round(start.signal, 3), round(start.noise, 3)) == (0.286, 0.958)


def test_the_noise_level_is_the_papers_unless_it_is_stable_diffusion(models):
    starts = {family: model.start(0.7, 50) for family, model in models.items()}
    assert starts["sd"] == models["sd"].start(0.7, 50, "schedule")
    assert (starts["sd"].strength, starts["sd"].timestep) == (0.7, 701)
    assert starts["sdxl"].timestep == 701 and 0.50 <= starts["dit"].timestep / 1000 <= 0.52
    for family, start in starts.items():
        assert abs(start.signal / start.noise - 0.286 / 0.958) < 0.02, family
        assert abs(start.signal**2 + start.noise**2 - 1) < 1e-6
    own = models["dit"].start(0.7, 50, "schedule")
    assert own.timestep == 680 and own.signal < 0.1  # nothing of a prototype is left
    assert models["dit"].start(1.0, 50).calls == 50 and models["sd3"].start(0.01, 50) is None


@pytest.mark.parametrize("steps, strength", [(50, 0.7), (7, 0.7), (20, 0.29), (4, 1.0)])
def test_a_start_is_what_is_run(model, family, steps, strength):
    """Its time, its number of calls, and the share of the latent in what is denoised first."""
    start = model.start(strength, steps)
    predicts = "flow" if BETAS[family] is None else "epsilon"
    scheduler = model.pipeline.scheduler
    _, times = drawn(model, scheduler, predicts, BETAS[family], start.strength, steps)
    assert times[0] == pytest.approx(start.timestep) and len(times) == start.calls


EACH = [(family, name) for family in ("sd", "sdxl", "dit") for name in ("own", *samplers.NAMES)]


@pytest.mark.parametrize("family, name", [*EACH, ("sd3", "own")])
def test_each_sampler_ends_at_the_clean_latent_from_the_papers_level(family, name, models):
    model, flow = models[family], BETAS[family] is None
    own = model.pipeline.scheduler
    if name != "own":
        model.pipeline.scheduler = samplers.replaced(own, name, model.WORKS["scheduler"])
    try:
        start, scheduler = model.start(0.7, 50, "paper"), model.pipeline.scheduler
        assert abs(start.signal / start.noise - 0.286 / 0.958) < 0.02
        how = ("flow" if flow else "epsilon", BETAS[family], start.strength)
        error, times = drawn(model, scheduler, *how)
        assert error < 0.15 and times[0] == pytest.approx(start.timestep)
    finally:
        model.pipeline.scheduler = own


def test_another_sampler_gives_another_image_and_hash(models):
    model, own = load(tiny_models.folder("dit"), scheduler="dpmpp"), models["dit"]
    assert model.facts["scheduler_sha256"] != own.facts["scheduler_sha256"]
    assert model.facts["transformer_sha256"] == own.facts["transformer_sha256"]
    assert (made(model, [0]) - made(own, [0])).abs().max() > 1e-3


LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
ZERO_SNR = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "clip_sample": False}
ZERO_SNR["prediction_type"] = "v_prediction"
UNFIT = [
    ("sd3", {}, "euler", "its own, FlowMatchEulerDiscreteScheduler"),
    ("sd", LCM, "ddim", "its own, LCMScheduler"),
    ("sdxl", ZERO_SNR, "pndm", "cannot follow the noise schedule"),
]


@pytest.mark.parametrize("family, own, name, words", UNFIT)
def test_a_sampler_that_does_not_fit(family, own, name, words, spoilt, refused):
    folder = spoilt(family)
    if own:
        change(folder, "scheduler/scheduler_config.json", **own)
        change(folder, "model_index.json", scheduler=["diffusers", own["_class_name"]])
    refused(lambda argv: load(*argv, scheduler=name), [folder], f"--scheduler {name}: ", words)


# ---- mode guidance


def test_mode_guidance_by_a_plain_loop():
    """MGD3: x = mean + lambda sigma (m - x0) + sigma e where t > 500, from noise, by DDPM."""
    model = load(tiny_models.folder("dit"), guide="mode", guide_weight=0.5)
    start, modes = latents_of(model, 1), torch.randn(1, 4, 8, 8, generator=generator(9))
    a, draw = torch.cumprod(1 - LINEAR.float(), 0), generator(2, 0)
    noise = torch.randn(1, 4, 8, 8, generator=draw)
    x = a[900] ** 0.5 * start + (1 - a[900]) ** 0.5 * noise
    with torch.no_grad():
        for t in range(900, -1, -100):
            labels, both = torch.tensor([0, 1000]), torch.cat([x, x])
            e, null = model.networks["transformer"](both, torch.tensor([t, t]), labels).sample[
                :, :4
            ]
            clean = (x - (1 - a[t]) ** 0.5 * (null + 8.0 * (e - null))) / a[t] ** 0.5
            before = a[t - 100] if t else torch.tensor(1.0)
            alpha = a[t] / before
            mean = before**0.5 * (1 - alpha) * clean + alpha**0.5 * (1 - before) * x
            sigma = ((1 - before) / (1 - a[t]) * (1 - alpha)) ** 0.5
            x = mean / (1 - a[t])
            x = x + 0.5 * sigma * (modes - clean) if t > 500 else x
            x = x + sigma * torch.randn(1, 4, 8, 8, generator=draw) if t else x
    conditions, none = told(model, 1)
    how = ([generator(2, 0)], 1.0, 8.0, 10)
    ours = model.denoise(start, conditions, none, *how, modes=modes)
    assert (ours - x).abs().max() < 1e-3 * x.abs().max()
    plain = load(tiny_models.folder("dit"), scheduler="ddpm")
    draws = ([generator(2, 0)], 1.0, 8.0, 10)
    assert (plain.denoise(start, conditions, none, *draws) - x).abs().max() > 0.1


def test_mode_guidance_of_other_samplers_is_refused(spoilt, refused):
    guide = {"guide": "mode", "guide_weight": 0.1}
    words = ["--guide mode: this checkpoint works only with its own, FlowMatchEuler"]
    refused(lambda argv: load(*argv, **guide), [tiny_models.folder("sd3")], *words)
    words = ["--scheduler dpmpp: --guide mode samples by ddpm"]
    refused(lambda argv: load(*argv, scheduler="dpmpp", **guide), [spoilt("sd")], *words)


# ---- prompts


LONG = [("sdxl", 40, "b"), ("sd3", 40, "b"), ("sd3_t5", 40, ""), ("sd3_t5", 200, "b")]


@pytest.mark.parametrize("family, words, unread", [*LONG, ("dit", 500, "")])
def test_only_what_no_text_encoder_reads_is_unread(family, words, unread, models):
    """CLIP reads 32 tokens here, T5 256: what is unread changes no condition."""
    model = models[family]
    assert model.unread(" ".join("a" * 9)) == ""
    assert model.unread(" ".join("a" * words + "b"))[-1:] == unread
    if family != "dit":
        pair = [model.condition(" ".join("a" * words + last)) for last in "bc"]
        assert all(map(torch.equal, *pair)) == bool(unread)


# ---- what is refused, in stage 1 already


UNKNOWN = [
    # SDXL's refiner, Playground 2.5, an inpainting model
    ("sdxl", "model_index.json", "text_encoder", [None, None], "its text_encoder is None"),
    ("sdxl", "vae/config.json", "latents_mean", [0.1] * 4, "its vae has latents_mean"),
    ("sdxl", "unet/config.json", "in_channels", 9, "its unet has in_channels 9"),
    ("sdxl", "unet/config.json", "cross_attention_dim", 48, "texts of width (48"),
    ("sdxl", "text_encoder_2/config.json", "projection_dim", 8, "texts of width"),
    ("sdxl", "scheduler/scheduler_config.json", "_class_name", "EDMEulerScheduler", "EDMEuler"),
    ("dit", "transformer/config.json", "num_embeds_ada_norm", 10, "num_embeds_ada_norm 10"),
    ("dit", "scheduler/scheduler_config.json", "clip_sample", True, "clip_sample True"),
    ("dit", "transformer/config.json", "norm_type", "ada_norm_single", "ada_norm_single"),
    ("sd3", "scheduler/scheduler_config.json", "use_dynamic_shifting", True, "dynamic_shifting"),
    ("sd3", "transformer/config.json", "pooled_projection_dim", 8, "texts of width (32, 8)"),
    ("sd3", "vae/config.json", "latent_channels", 4, "its vae has latent_channels 4"),
    ("sd3_t5", "text_encoder_3/config.json", "d_model", 8, "texts of width (32, 32)"),
]


@pytest.mark.parametrize("family, file, key, value, words", UNKNOWN)
def test_what_a_family_does_not_know(family, file, key, value, words, spoilt, refused):
    folder = spoilt(family)
    change(folder, file, **{key: value})
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    refused(lambda argv: load(*argv, part="encoder"), [folder], words)


def test_another_family_is_named_with_those_that_work(spoilt, refused):
    folder = spoilt("dit")
    change(folder, "model_index.json", _class_name="PixArtAlphaPipeline")
    works = [family.TITLE for family in generators.FAMILIES.values()]
    refused(lambda argv: load(*argv), [folder], "it is a PixArtAlphaPipeline; what works: ", *works)


def test_the_published_dit_has_no_safetensors_on_main(spoilt, refused, models):
    folder = spoilt("dit")
    older = "Transformer2DModel"  # and this name
    change(folder, "transformer/config.json", _class_name=older)
    change(folder, "model_index.json", transformer=["diffusers", older])
    assert load(folder).facts == {**models["dit"].facts, "model": folder.name}
    [path] = (folder / "transformer").glob("*.safetensors")
    path.rename(path.with_suffix(".bin"))
    words = ["no plain .safetensors weights of its transformer", "--revision refs/pr/1"]
    refused(lambda argv: load(*argv), [folder], *words)


def test_a_checkpoint_that_lacks_a_part_is_refused(spoilt, refused):
    for family, part in (("sdxl", "tokenizer_2"), ("sd3_t5", "tokenizer_3")):
        folder = spoilt(family)
        for path in (folder / part).glob("*"):
            if path.name != "tokenizer_config.json":
                path.unlink()
        refused(lambda argv: load(*argv), [folder], part)
    refused(lambda argv: load(*argv, safety_checker="on"), [tiny_models.folder("dit")], "no safety")


def test_only_one_size_of_a_dit(models, refused):
    refused(lambda argv: models["dit"].latent_shape(64), [], "--size 64", "32 px only")
    assert models["sdxl"].latent_shape(36) == (4, 9, 9)
    refused(lambda argv: models["sd3"].latent_shape(36), [], "--size 36", "multiple of 8")
    assert generators.load(str(tiny_models.folder("dit")), CPU, part="encoder").native_size == 32
