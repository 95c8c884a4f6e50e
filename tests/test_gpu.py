"""What only a CUDA device can show: python -m pytest -m gpu. Everything else runs on a CPU too."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook as after_each_step

from distillation.prototypes import class_prototypes
from matching import batches, feed, images
from scripts import generators
from scripts.runtime import generator
from tests import test_end_to_end as end_to_end
from tests.conftest import BATCHES
from validate import train_FKD

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, without]


@pytest.fixture(params=[0.5, 0.0], ids=["crops on the GPU", "crops on the CPU"])
def waiting(monkeypatch, request):
    """waiting("error"): from now on whatever waits for the device raises; "default": no longer."""
    monkeypatch.setattr(images, "RESIDENT_SHARE", request.param)
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n, k, batch", [(1300, 10, 10), (1300, 50, 50), (333, 10, 100)])
def test_kmeans_beside_a_busy_gpu_equals_sklearn(n, k, batch):
    """In the thread and stream of stage 1, while the main stream is busy and frees memory."""
    latents = np.random.default_rng(n).standard_normal((n, 4, 8, 8)).astype(np.float16)
    expected, x = class_prototypes(latents, k, batch), torch.randn(4096, 4096, device=CUDA)
    how = class_prototypes, latents, k, batch, "minibatch", CUDA
    with ThreadPoolExecutor(1) as background:
        running = [background.submit(*how) for _ in range(3)]
        while not all(future.done() for future in running):
            x = torch.nn.functional.normalize(x @ x)
    for found in (future.result() for future in running):
        assert np.array_equal(found.latents, expected.latents)
        assert np.array_equal(found.sizes, expected.sizes)


@pytest.mark.parametrize("mix_type, size", [("none", 224), ("mixup", 64), ("cutmix", 32)])
@pytest.mark.parametrize("rows_of", [None, lambda n: torch.arange(1, n, 2)], ids=["all", "rows"])
def test_batches_have_the_cpus_bits_and_wait_for_nothing(mix_type, size, rows_of, waiting):
    pixels = torch.randint(0, 256, (90, size, size, 3), dtype=torch.uint8, generator=generator(0))
    known = SimpleNamespace(folders=("zero", "one", "two"), dataset="digits")
    changed = {"batch_size": 40, "input_size": size, "mix_type": mix_type, "shuffle_patches": 3}
    protocol, keys = batches.PROTOCOL | changed, [(0, 0), (0, 1), (0, 2)]
    feeds = [
        feed.Feed(list(pixels.numpy()), known, protocol, device, rows_of=rows_of)
        for device in (CUDA, CPU)
    ]
    gpu, cpu = feeds
    assert (gpu.resident is not None) == (images.RESIDENT_SHARE > 0)
    for a, b in zip(gpu.loader(keys), cpu.loader(keys)):
        waiting("error" if a.number else "default")  # the first makes what the device keeps
        mixed = gpu.mixed(a)
        waiting("default")
        assert mixed.device.type == CUDA.type and torch.equal(mixed.cpu(), cpu.mixed(b))


def test_training_waits_for_nothing(waiting, random, teacher, labels):
    """From the end of the first step of an epoch to the end of the second, of three."""
    online = ["--online", "--arch", "convnet_mini", "--teacher_checkpoint", str(teacher), *BATCHES]
    online += ["--shuffle_patches", "2"]
    stored = ["--fkd_path", str(labels), "--ema", "0.9", "--bn_refresh", "--num_workers", "0"]
    student, steps = ["--train_dir", str(random), "--model", "convnet_mini"], []

    def note(*_):
        steps.append("error" if len(steps) % 3 == 0 else "default")
        waiting(steps[-1])

    hook = after_each_step(note)
    try:
        for flags in (stored, online, ["--hard_label", *BATCHES]):
            train_FKD.main([*student, *flags, "--device", str(CUDA)])
    finally:
        hook.remove()
    assert steps == ["error", "default", "default"] * 9


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_close_to_fp32(tiny_sd, dtype):
    """The same noise too, whatever PyTorch draws in half precision."""
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator(0))
    latents = torch.randn(3, 4, 8, 8, generator=generator(0))

    def made(device, precision):
        model = generators.load(str(tiny_sd), device, dtype=precision)
        draws, none = ([generator(use, i) for i in range(3)] for use in (7, 8)), model.condition("")
        encoded = model.encode(pixels, next(draws))
        made = model.denoise(latents, [none] * 3, none, next(draws), 0.9, 1.0, 3)
        return encoded, model.decode(made)

    for half, full in zip(made(CUDA, dtype), made(CPU, "fp32")):
        assert half.dtype == generators.DTYPES[dtype]
        assert (half.float().cpu() - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.parametrize("options", [{}, {"channels_last": True}])
def test_synthesis_is_seeded_image_by_image(tiny_sd, options):
    model = generators.load(str(tiny_sd), CUDA, dtype="fp32", **options)
    latents = torch.randn(4, 4, 8, 8, generator=generator(1))

    def made(which):
        conditions = [model.condition("zero")] * len(which)
        draws = [generator(4, i) for i in which]
        how = conditions, model.condition(""), draws, 0.7, 8.0, 10
        return model.decode(model.denoise(latents[which], *how))

    assert (made([0, 1, 2, 3])[2] - made([2])[0]).abs().max() < 1e-2


def test_all_stages(capsys):
    where = ["--device", str(CUDA), "--num_workers", "2"]
    end_to_end.chain(end_to_end.DIGITS, end_to_end.DIGITS_SD, "8", where)
    assert capsys.readouterr().out.count("GiB on the GPU") == 10
