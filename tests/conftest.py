"""Shared fixtures: everything offline, one torch thread, a tiny randomly initialised Stable Diffusion."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A folder with a Stable Diffusion in diffusers format: random weights, factor-4 VAE, PNDM as in v1-5."""
    return build_tiny_sd(tmp_path_factory.mktemp("tiny-sd"), seed=0)


def build_tiny_sd(folder, seed):
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>"] + letters + [c + "</w>" for c in letters]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def model(tiny_sd):
    """The flags that choose the tiny model."""
    return ["--diffusion_checkpoints_path", str(tiny_sd), "--device", "cpu"]


@pytest.fixture(scope="session")
def made(model, tmp_path_factory):
    """(prototype folder, image folder) of three digits, made once by our own stages for the reliability tests."""
    from reliability import STAGE_1, STAGE_2

    from distillation import gen_prototype, gen_syn_image

    root = tmp_path_factory.mktemp("made")
    prototypes = gen_prototype.main([*STAGE_1, *model, "--save_prototype_path", f"{root}/prototypes"])
    argv = [*STAGE_2, *model, "--prototype_path", str(prototypes), "--save_init_image_path", f"{root}/images"]
    return prototypes, *gen_syn_image.main(argv)


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words): main leaves with status 2, no traceback, and one line of error with the words."""

    def check(main, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in argv])
        assert leaving.value.code == 2
        printed = capsys.readouterr().err
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in printed
        for word in words:
            assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"
        return lines[0]

    return check


@pytest.fixture
def counted(monkeypatch):
    """counted(cls, name) -> a list that grows by the batch size at every call of cls.name."""

    def count(cls, name):
        calls, original = [], getattr(cls, name)

        def wrapper(self, x, *args, **kwargs):
            calls.append(len(x))
            return original(self, x, *args, **kwargs)

        monkeypatch.setattr(cls, name, wrapper)
        return calls

    return count


def tree(folder):
    """{relative path: bytes} of a folder, timing and logs aside."""
    from scripts.files import VOLATILE

    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in VOLATILE
    }
