"""What only a CUDA device can show: python -m pytest -m gpu. Everything else runs on a CPU too."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distillation.prototypes import _minibatch_sklearn, _minibatch_torch, class_prototypes
from matching.models import create_model
from matching.soft_labels import PROTOCOL, Feed, crop_on_cpu, draw_crops, resized_crop_batch, write_epoch
from matching.training import chunks_of, make_optimizer, soft_loss, train_step
from scripts.checkpoints import load_pipeline
from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline
from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline
from scripts.runtime import Process, generator
from validate import train_FKD

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("n, k, batch", [(1300, 10, 10), (1300, 50, 50), (333, 10, 100)])
def test_kmeans_on_the_gpu_equals_sklearn(n, k, batch):
    rows = np.random.default_rng(n).standard_normal((n, 256)).astype(np.float16).astype(np.float64)
    ours, theirs = _minibatch_torch(rows, k, batch, CUDA), _minibatch_sklearn(rows, k, batch)
    assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [224, 64, 32])
def test_crops_on_the_gpu_have_the_cpus_bytes(size):
    images = torch.randint(0, 256, (8, size, size, 3), dtype=torch.uint8, generator=generator(0))
    index = torch.arange(400) % 8
    crop = draw_crops(torch.full((400, 2), size), (0.08, 1.0), generator(1))
    flip = torch.rand(400, generator=generator(2)) < 0.5
    expected = crop_on_cpu([image.numpy() for image in images], index, crop, flip, size)
    found = resized_crop_batch(images[index].to(CUDA), crop, flip, size)
    assert torch.equal(found.cpu(), torch.as_tensor(expected))


def feed_on(device, mix_type, arrays, rows_of=None):
    images = SimpleNamespace(folders=("zero", "one", "two"), dataset="digits")
    protocol = {**PROTOCOL, "epochs": 1, "batch_size": 16, "input_size": 32, "mix_type": mix_type}
    return Feed(list(arrays), images, protocol, device, rows_of=rows_of)


@pytest.fixture
def arrays():
    return list(torch.randint(0, 256, (40, 48, 48, 3), dtype=torch.uint8, generator=generator(0)).numpy())


@pytest.mark.parametrize("mix_type", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("rows_of", [None, lambda count: torch.arange(1, count, 2)])
def test_batches_on_the_gpu_have_the_cpus_bits(arrays, mix_type, rows_of):
    on_gpu, on_cpu = (feed_on(device, mix_type, arrays, rows_of) for device in (CUDA, CPU))
    assert on_gpu.resident is not None and on_cpu.resident is None
    keys = [(0, n) for n in range(3)]
    for a, b in zip(on_gpu.loader(keys), on_cpu.loader(keys)):
        assert torch.equal(on_gpu.mixed(a).cpu(), on_cpu.mixed(b))


@pytest.mark.parametrize("mix_type", ["none", "mixup", "cutmix"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("rows_of", [None, lambda count: torch.arange(count // 2)])
def test_feeding_and_training_wait_for_nothing(arrays, mix_type, resident, rows_of, tmp_path):
    drawn = feed_on(CPU, mix_type, arrays)
    batches = [item.batch for item in drawn.loader([(0, n) for n in range(3)])]
    write_epoch(tmp_path, 0, batches, torch.randn(40, 3, generator=generator(0)).half())
    feed = feed_on(CUDA if resident else CPU, mix_type, arrays, rows_of)
    feed.labels, feed.device = (tmp_path, {}), CUDA
    model = create_model("convnet_mini", 3, 32).to(CUDA)
    optimizer = make_optimizer(model, False, 1e-3, 0.01)
    recipe, targets = train_FKD.Recipe("cosine"), torch.arange(40) % 3
    job = train_FKD.Job("convnet_mini", recipe, drawn.protocol, 3, targets, 4, True, [], False, 1, 1)
    for n, item in enumerate(feed.loader([(0, 0), (0, 1)])):
        own = torch.arange(16) if rows_of is None else item.rows
        # the first batch makes what is kept on the device: means, states of the optimiser
        torch.cuda.set_sync_debug_mode("error" if n else "default")
        try:
            x, logits, _, _ = train_FKD.prepare(job, item, feed, Process(0, 1, CUDA), own)

            def loss_of(rows, x=x, logits=logits):
                return soft_loss(model(x[rows]), logits[rows], 20.0)

            train_step(model, optimizer, chunks_of_rows(len(own)), 16, loss_of, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.device.type == logits.device.type == "cuda" and (feed.resident is not None) == resident


def chunks_of_rows(count):
    return [(first, slice(first, end)) for first, end in chunks_of(count, 4)]


def test_kmeans_beside_a_busy_gpu_equals_sklearn():
    """From the thread and in the stream of stage 1, while the main stream is busy and takes and frees memory."""
    latents = np.random.default_rng(3).standard_normal((400, 4, 16, 16)).astype(np.float16)
    expected, x = class_prototypes(latents, 10, 10), torch.randn(4096, 4096, device=CUDA)
    with ThreadPoolExecutor(1) as background:
        found = [background.submit(class_prototypes, latents, 10, 10, "minibatch", CUDA) for _ in range(5)]
        while not all(future.done() for future in found):
            x = torch.nn.functional.normalize(x @ x)
    for future in found:
        assert np.array_equal(future.result().latents, expected.latents)
        assert np.array_equal(future.result().sizes, expected.sizes)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_pipelines_in_half_precision_are_close_to_fp32(tiny_sd, dtype):
    images = torch.rand(3, 3, 32, 32, generator=generator(0))
    keys = [generator(7, i) for i in range(3)]
    half = load_pipeline(StableDiffusionGenLatentsPipeline, str(tiny_sd), CUDA, dtype, vae_only=True)[0](images, keys)
    full = load_pipeline(StableDiffusionGenLatentsPipeline, str(tiny_sd), CPU, "fp32", vae_only=True)[0]
    assert half.dtype != torch.float32 and half.isfinite().all()
    expected = full(images, [generator(7, i) for i in range(3)])
    assert (half.float().cpu() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"compiled": True}])
def test_synthesis_on_the_gpu_is_seeded_image_by_image(tiny_sd, options):
    from scripts.checkpoints import speed_up

    pipeline = load_pipeline(StableDiffusionLatents2ImgPipeline, str(tiny_sd), CUDA, "fp32")[0]
    speed_up(pipeline, **options)
    latents = torch.randn(4, 4, 8, 8, generator=generator(1))
    how = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": 10, "output_type": "pt"}
    together = pipeline(["zero"] * 4, latents, generator=[generator(4, i) for i in range(4)], **how).images
    alone = pipeline(["zero"], latents[2:3], generator=[generator(4, 2)], **how).images
    assert (together[2] - alone[0]).abs().max() < 1e-2


def test_all_stages_on_the_gpu(tmp_path, monkeypatch):
    """The end-to-end run of tests/test_end_to_end.py on the GPU, with reading processes."""
    import test_end_to_end as end_to_end

    monkeypatch.setattr(end_to_end, "QUIET", ["--num_workers", "2", "--device", "cuda"])
    data = ["--dataset", "digits", "--classes", "0-2", "--max_images_per_class", "30"]
    images, results = end_to_end.run_all(tmp_path / "out", data, end_to_end.MODEL, 32, 8, ["d4m"])
    assert len(images) == 2 and len(results) == 4
