"""Parity with the first edition (commit f7dba0e): four small stages against recorded values.

    python -m pytest tests/test_parity.py
    PYTHONPATH=. python tests/test_parity.py tests/parity_record.json    # record anew

Teacher, prototypes, images, soft labels and students of three digits are made by the command lines
alone, and only output files are read. The draws of stage 3 are exact on every machine. All else is
exact, to the bit, on a machine like the recorded one (CPU, capability, versions of libraries); on
others floating-point sums may come out in another order, and the tolerances below hold.
"""

import base64
import hashlib
import importlib
import importlib.metadata
import json
import platform
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

RECORD = Path(__file__).with_name("parity_record.json")
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "scikit-learn", "pillow")
DRAWS = ("index", "crop", "flip", "partner", "box", "lam")
TOLERANCE = {
    "prototypes": 4e-3,  # two steps of fp16 at 2
    "pixels": 2.0,  # of 255
    "logits": 5e-3,  # stored as fp16
    "weights": 1e-3,  # a tensor's first values, sum / sqrt(n) and norm, relative where above 1
    "top1": 1.6,  # two of 133 test images
}
# a convolution's bias before instance norm changes nothing: its gradient is rounding noise, which
# AdamW blows up to steps of the learning rate
NOISE = {"1.0.bias": 0.05, "1.4.bias": 0.05}


# ---- one run, by command lines


def main_of(module):
    return importlib.import_module(module).main


def run_stages(out):
    """Runs all stages below `out`; returns {stage: the folder it made}."""
    model = Path(__file__).resolve().parent.parent / "misc" / "tiny-sd-digits"
    if not model.is_dir():  # the test file lies outside the tree
        model = Path.cwd() / "misc" / "tiny-sd-digits"
    sd = ["--diffusion_checkpoints_path", str(model)]
    quiet = ["--device", "cpu", "--num_workers", "0"]
    digits = ["--dataset", "digits", *quiet]
    chosen = ["--classes", "0-2", "--max_images_per_class", "30"]
    two = ["--ipc", "2", "--km_expand", "3"]
    made = {}

    def stage(name, module, flag, *argv):
        root = out / name
        main_of(module)([*map(str, argv), flag, str(root)])
        [made[name]] = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]

    teacher = "--arch convnet_mini --epochs 3 --batch_size 15 --seed 0".split()
    stage("teacher", "matching.train_teacher", "--output_dir", *digits, *chosen, *teacher)
    latents = [*digits, *sd, *chosen, *two, "--batch_size", "8"]
    stage("prototypes", "distillation.gen_prototype", "--save_prototype_path", *latents)
    synthesis = [*digits, *sd, *two, "--num_inference_steps", "5", "--batch_size", "4"]
    synthesis += ["--prototype_path", made["prototypes"]]
    stage("images", "distillation.gen_syn_image", "--save_init_image_path", *synthesis)
    batches = "--epochs 2 --batch_size 4 --mix_type cutmix --min_scale_crops 0.5".split()
    batches += [*quiet, "--data", made["images"], "--arch", "convnet_mini"]
    batches += ["--teacher_checkpoint", made["teacher"]]
    stage("labels", "matching.generate_soft_label", "--fkd_path", *batches)
    student = [*quiet, "--train_dir", made["images"], "--model", "convnet_mini"]
    student += ["--adamw_lr", "0.005"]
    soft = ["--fkd_path", made["labels"], "--cos", "--seeds", "0", "1"]
    stage("soft", "validate.train_FKD", "--output_dir", *student, *soft)
    hard = "--hard_label --epochs 2 --batch_size 4 --mix_type mixup".split()
    stage("hard", "validate.train_FKD", "--output_dir", *student, *hard)
    return made


# ---- what the run left, read from its files


def read_run(made):
    """{name: array} of everything that is compared, in plain numpy."""
    found = {}
    for c in range(3):
        facts = json.loads((made["prototypes"] / f"000{c}_{c}.json").read_text(encoding="utf-8"))
        found[f"prototypes {c}"] = np.asarray(facts["prototypes"], dtype=np.float16)
        found[f"cluster sizes {c}"] = np.asarray(facts["cluster_sizes"], dtype=np.int64)
        for i in range(2):
            with Image.open(made["images"] / f"{c}/{c}_{i:04d}.png") as picture:
                found[f"pixels {c} {i}"] = np.asarray(picture.convert("RGB"))
    for epoch in range(2):
        tensors = load_file(made["labels"] / f"epoch_{epoch:04d}.safetensors")
        for name in DRAWS:
            found[f"draws {epoch} {name}"] = tensors[name].numpy()
        found[f"logits {epoch}"] = tensors["logits"].numpy()
    students = [("soft", "student_seed0"), ("soft", "student_seed1"), ("hard", "student_seed0")]
    for stage, file in [("teacher", "model"), *students]:
        for name, tensor in sorted(load_file(made[stage] / f"{file}.safetensors").items()):
            found[f"weights {stage} {file} {name}"] = tensor.numpy()
    teacher = json.loads((made["teacher"] / "results.json").read_text())
    found["top1 teacher"] = np.asarray([teacher["last"]["top1"]])
    for stage in ("soft", "hard"):
        seeds = json.loads((made[stage] / "results.json").read_text())["seeds"]
        rows = seeds.values() if isinstance(seeds, dict) else seeds
        found[f"top1 {stage}"] = np.asarray([row["last"]["top1"] for row in rows])
    return found


def sha256(array):
    head = f"{array.dtype} {list(array.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def close_to(name, array):
    """What is kept for other machines: the array itself, or a summary of a weight tensor."""
    if not name.startswith("weights"):
        return array
    flat = array.astype(np.float64).reshape(-1)
    whole = [flat.sum() / np.sqrt(len(flat)), np.linalg.norm(flat)]
    return np.concatenate([flat[:8], whole]).astype(np.float32)


def machine():
    """All that may change the last bits of a sum."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():  # virtual machines hide the name: family and model tell
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
        cpu = " / ".join(facts.get(key, "?") for key in ("model name", "cpu family", "model"))
    capability = torch.backends.cpu.get_cpu_capability()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"cpu": cpu, "capability": capability, **versions}


# ---- the record


def pack(array):
    data = zlib.compress(np.ascontiguousarray(array).tobytes(), 9)
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "data": base64.b64encode(data).decode(),
    }


def unpack(packed):
    data = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(data, packed["dtype"]).reshape(packed["shape"])


def record(found):
    return {
        "machine": machine(),
        "values": {
            name: {"sha256": sha256(array), **pack(close_to(name, array))}
            for name, array in found.items()
        },
    }


def problem(name, array, kept, exact):
    """What is wrong with one array, or None."""
    if sha256(array) == kept["sha256"]:
        return None
    if exact or name.startswith("draws") and not name.endswith("lam"):
        return f"{name}: differs from the record"
    ours, theirs = close_to(name, array), unpack(kept)
    if ours.shape != theirs.shape:
        return f"{name}: shape {ours.shape}, recorded {theirs.shape}"
    scale = np.maximum(1, np.abs(theirs.astype(np.float64)))
    off = float((np.abs(ours.astype(np.float64) - theirs.astype(np.float64)) / scale).max())
    if name.startswith("pixels"):
        off = float(np.abs(ours.astype(int) - theirs.astype(int)).max())
    allowed = NOISE.get(name.split()[-1]) or TOLERANCE.get(name.split()[0], 1e-9)
    return f"{name}: off by {off:.3g}, allowed {allowed:g}" if off > allowed else None


# ---- tests


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return read_run(run_stages(tmp_path_factory.mktemp("parity")))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def kept():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_same_things_are_made(found, kept):
    assert sorted(found) == sorted(kept["values"])


@pytest.mark.parametrize(
    "kind", ["prototypes", "cluster", "pixels", "draws", "logits", "weights", "top1"]
)
def test_as_the_first_edition(found, kept, kind):
    exact = machine() == kept["machine"]
    names = [name for name in found if name.split()[0] == kind and name in kept["values"]]
    problems = [problem(name, found[name], kept["values"][name], exact) for name in names]
    assert names and not list(filter(None, problems))


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(record(read_run(run_stages(Path(folder)))), indent=1)
    Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
