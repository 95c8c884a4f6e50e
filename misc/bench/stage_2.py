"""Stage 2: prototypes to PNGs."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import torch

from distillation import gen_syn_image
from distillation.datasets import read_rgb
from distillation.prototypes import Prototypes
from misc.bench.measure import compare, flops_of, in_turns
from misc.bench.networks import sped_up
from scripts.runtime import generator

PER_CLASS = 10


def release_synthesis(pipeline, jobs, prototypes, folder, options):
    """The release's way: one image at a time, both prompts encoded for each, resized and saved before the next."""
    for job in jobs:
        latents = torch.from_numpy(prototypes[job.position].latents[job.prototype : job.prototype + 1])
        noise = generator(*gen_syn_image.image_key(0, job, 0))
        image = pipeline(
            [job.prompt], latents, negative_prompt=[gen_syn_image.NEGATIVE_PROMPT], generator=[noise], **options
        ).images[0]
        (folder / job.folder).mkdir(parents=True, exist_ok=True)
        image.resize((224, 224)).save(folder / job.file)


def stage_2(bench):
    size, device, root = bench.size, bench.device, bench.root
    side = 512 if size.real else 64
    pipeline = bench.pipelines(side)[1]
    few, many = size.synthesis
    classes = [{"index": c, "folder": f"class{c}", "prompt": f"tench {c}"} for c in range(-(-many // PER_CLASS))]
    jobs = gen_syn_image.list_jobs(classes, PER_CLASS, PER_CLASS)[:many]
    draw, shape = np.random.default_rng(1), (PER_CLASS, 4, side // 8, side // 8)
    prototypes = [
        Prototypes(draw.normal(0, 1, shape).astype(np.float16), np.ones(PER_CLASS, np.int64)) for _ in classes
    ]
    options = {"strength": 0.7, "guidance_scale": 8.0, "num_inference_steps": size.steps, "eta": 0.0}
    numbers = count()

    def release(jobs=jobs[:few]):
        folder = root / f"release-{next(numbers)}"
        release_synthesis(pipeline, jobs, prototypes, folder, options)
        return folder

    def ours(pipeline=pipeline):
        folder = root / f"ours-{next(numbers)}"
        folder.mkdir()
        gen_syn_image.make_images(
            folder,
            gen_syn_image.cut(jobs, 32),
            gen_syn_image.Synthesizer(pipeline, "d4m", 0, 0.7, 8.0, size.steps, gen_syn_image.NEGATIVE_PROMPT),
            lambda positions: ((p, prototypes[p]) for p in positions),
            224,
            SimpleNamespace(name=None),
            quiet=True,
        )
        return folder

    ways = {"release": release, "ours": ours}
    ways |= {name: lambda other=other: ours(other) for name, other in sped_up(pipeline, size.faster).items()}
    bench.warm_up(lambda: release(jobs[:1]), *list(ways.values())[1:])
    times, found = in_turns(ways, size.turns, device)
    synthesizer = gen_syn_image.Synthesizer(pipeline, "d4m", 0, 0.7, 8.0, size.steps, gen_syn_image.NEGATIVE_PROMPT)
    flops = flops_of(lambda: synthesizer(jobs[:1], prototypes))
    counts = {name: few if name == "release" else many for name in ways}
    for name in list(ways)[1:]:
        pairs = [[np.asarray(read_rgb(found[k] / job.file), int) for k in ("release", name)] for job in jobs[:few]]
        off, mean = (f([np.abs(a - b) for a, b in pairs]) for f in (np.max, np.mean))
        bench.add(
            compare(
                2, f"prototypes to PNGs{'' if name == 'ours' else ', ' + name}", "image", times, counts, device,
                ours=name, same=f"pixels differ by {off} of 255 at most, {mean:.2g} in the mean", flops=flops,
                agree=mean <= 4 if device.type == "cuda" else off <= 1,  # 36 steps in fp16 on a GPU
                ceiling="bf16_tflops" if device.type == "cuda" else "fp32_tflops",
                target=6 if size.real else None, share_target=0.45 if size.real else None,
                note="" if size.real else f"tiny networks, {side} px, {size.steps} steps",
            ),
            {"release": ways["release"], "ours": ways[name]},
        )  # fmt: skip
    bench.drop_pipelines()
