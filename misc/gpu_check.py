"""What gpu_check.sh measures beside the tests and the benchmark; needs no data and no weights.

    python -m misc.gpu_check pipeline    # two classes, from JPEGs to a tested student
    python -m misc.gpu_check sizes       # the networks of stages 1-2 by batch size and by switch

On a GPU with Stable Diffusion 1.5's configuration at 512 px and a ResNet-18 at 224 px, both with
random weights; on a CPU at toy size. Writes OUT/pipeline.json or OUT/sizes.json.
"""

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from distillation import gen_prototype, gen_syn_image, random_real
from matching import generate_soft_label, train_teacher
from misc import benchmark
from scripts import files, generators, output, runtime
from scripts.runtime import generator
from validate import train_FKD

SWITCHES = {
    "plain": {},
    "channels_last": {"channels_last": True},
    "channels_last + compile": {"channels_last": True, "compile": True},
}


def pictures(root, count):
    """`count` JPEGs as large as ImageNet's for each of two classes, in train and in val."""
    found, _ = benchmark.photographs(os.environ.get("D4M_TEST_DATA"), 4 * count)
    for n, picture in enumerate(found):
        split, name = ("train", "val")[n % 2], ("a", "b")[n // 2 % 2]
        path = root / split / name / f"{n:04d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((500, 375)).save(path, quality=92)
    return ["--dataset", "imagefolder", "--data_dir", str(root)]


def pipeline(bench):
    """{stage: its timing.json}: all stages by their own `main`."""
    full, where = bench.gpu, ["--device", bench.device.type]
    side, arch = ("224", "resnet18") if full else ("32", "convnet_mini")
    data = pictures(bench.root / "photographs", 40 if full else 8)
    checkpoint = str(benchmark.generator_folder(bench.root, bench.size, full))
    ipc, chosen = ("10", "20") if full else ("2", "2"), ["--diffusion_checkpoints_path", checkpoint]
    how = ["--ipc", ipc[0], "--km_expand", "1", *chosen, *where]
    prototypes = gen_prototype.main([*data, "--size", str(bench.size["pixels"]), *how])
    steps = ["--num_inference_steps", str(bench.size["steps"]), "--image_size", side]
    source = ["--prototype_path", str(prototypes), *data[:2]]
    [images] = gen_syn_image.main([*source, *how, *steps])
    gc.collect()  # the generator: peaks of the next stages are their own
    real = random_real.main([*data, "--ipc", ipc[0], "--image_size", side])
    network = ["--input_size", side, *where]
    teacher = train_teacher.main([*data, "--arch", arch, *network, "--epochs", "3", "-b", "32"])
    network += ["--teacher_checkpoint", str(teacher), "--arch", arch]
    batches = ["--epochs", "5", "--batch_size", ipc[1], "--mix_type", "cutmix"]
    labels = generate_soft_label.main(["--data", str(images), str(real), *network, *batches])
    student = ["--model", arch, "--cos", "-T", "20", "--val_dir", data[3], *where]
    made = {"prototypes": prototypes, "images": images, "teacher": teacher}
    made["labels"] = labels[0]
    for name, folder, path in zip(("student", "student on real"), (images, real), labels):
        made[name] = train_FKD.main(["--train_dir", str(folder), "--fkd_path", str(path), *student])
    return {name: files.read_json(folder / "timing.json") for name, folder in made.items()}


def networks(model, size, batch):
    """{name: a call of that network on a batch}; denoise: six UNet calls with guidance."""
    latents = torch.randn(batch, *model.latent_shape(size), generator=generator(0))
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    draws = [generator(0, n) for n in range(batch)]
    moved = latents.to(model.device, model.dtype)
    text = [model.condition("tench")] * batch, model.condition("")

    return {  # at strength 1 all steps run, PNDM's first twice
        "denoise": lambda: model.denoise(moved, *text, draws, 1.0, 8.0, 5),
        "decode": lambda: model.decode(moved),
        "encode": lambda: model.encode(pixels, draws),
    }


def sizes(bench):
    """A row for every network, switch and batch size."""
    size, counts = bench.size["pixels"], (1, 8, 32) if bench.gpu else (1, 2)
    folder = str(benchmark.generator_folder(bench.root, bench.size, bench.gpu))
    rows, operations = [], {}
    for name, switch in SWITCHES.items():
        model = generators.load(folder, bench.device, **switch)
        for batch in counts[-1:] if "compile" in switch else counts:
            for network, call in networks(model, size, batch).items():
                started = time.perf_counter()
                call()
                first = time.perf_counter() - started
                if network not in operations:
                    with FlopCounterMode(display=False) as counter:
                        call()
                    operations[network] = counter.get_total_flops() / batch
                if bench.gpu:
                    torch.cuda.reset_peak_memory_stats()
                rate = batch * benchmark.per_second(call, bench.device)
                tflops = operations[network] * rate / 1e12
                row = {"network": network, "switch": name, "batch": batch, "first_call_s": first}
                row |= {"images_per_s": rate, "gflop": operations[network] / 1e9}
                share = tflops / bench.ceilings[model.facts["precision"]]
                row |= {"tflops": tflops, "share": share, **output.peak_memory(bench.device)}
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
                rows.append(row)
                yield rows


@runtime.entry_point
def main(argv=None):
    parser = argparse.ArgumentParser("misc.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["pipeline", "sizes"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("output/gpu_check"))
    args = parser.parse_args(argv)
    args.out = args.out.absolute()
    device = runtime.this_process(args.device).device
    size = benchmark.SIZES["cuda" if device.type == "cuda" else "quick"]
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="d4m-gpu-check-") as root:
        os.chdir(root)  # the stages' default folders
        bench = benchmark.Bench(device, size, [], Path(root), None)
        facts = {"machine": benchmark.machine(device), "versions": output.library_versions()}
        facts |= {"commit": benchmark.commit(), "ceilings": bench.ceilings}
        found = sizes(bench) if args.part == "sizes" else [pipeline(bench)]
        for rows in found:
            text = files.json_text({**facts, args.part: rows})
            files.write(args.out / f"{args.part}.json", text)


if __name__ == "__main__":
    main()
