"""Host memory of stage 2 at ImageNet's size: prototypes as holes in files, its networks stubbed at their seam."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from distillation import gen_syn_image
from distillation.datasets import known_prompts
from distillation.prototypes import Prototypes, class_file, write_class
from scripts.files import output_folder, read_json, write_manifest
from scripts.runtime import generator, peak_memory, this_process


def sparse_prototypes(root, classes, ipc, form):
    """A finished prototype folder of that size whose latents are holes in its files: it takes no disk."""
    chosen = list(known_prompts("imagenet").items())[:classes]
    table = [{"index": c, "folder": f, "prompt": p} for c, (f, p) in enumerate(chosen)]
    settings = {
        "dataset": "imagenet", "ipc": ipc, "km_expand": 1, "kmeans": "minibatch", "size": 512, "seed": 0,
        "classes": None, "max_images_per_class": 0, "dtype": "auto", "prototype_format": form,
    }  # fmt: skip
    folder, shape = root / "prototypes", [ipc, 4, 64, 64]
    files = [class_file(n, c["folder"], form) for n, c in enumerate(table)]
    zeros = Prototypes(np.zeros(shape, np.float16), np.ones(ipc, np.int64))
    with output_folder("--memory", folder, settings, this_process("cpu")):
        for file, c in zip(tqdm(files, desc="prototypes", unit="class"), table):
            facts = {"class_index": c["index"], "folder": c["folder"], "prompt": c["prompt"]}
            if form == "json":
                write_class(folder / file, zeros, facts)
                continue
            latents = 2 * int(np.prod(shape))
            head = json.dumps({
                "__metadata__": {"facts": json.dumps(facts)},
                "cluster_sizes": {"dtype": "I64", "shape": [ipc], "data_offsets": [0, 8 * ipc]},
                "prototypes": {"dtype": "F16", "shape": shape, "data_offsets": [8 * ipc, 8 * ipc + latents]},
            }).encode()  # fmt: skip
            head += b" " * (-len(head) % 8)
            with open(folder / file, "wb") as out:
                out.write(len(head).to_bytes(8, "little") + head)
                out.truncate(8 + len(head) + 8 * ipc + latents)
        facts = {
            "dataset": "imagenet", "ipc": ipc, "km_expand": 1, "vae_sha256": "0" * 64, "latent_shape": shape[1:],
            "classes": table,
        }  # fmt: skip
        write_manifest(folder, "prototypes", settings, files, facts)
    return folder, sum((folder / file).stat().st_size for file in files)


class StubPipeline:
    """The seam of stage 2's networks: answers at once, with pictures of 8 px."""

    unet = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=SimpleNamespace(in_channels=4))

    def __init__(self):
        self.picture = torch.rand(1, 3, 8, 8, generator=generator(0))

    def encode_prompt(self, prompt, *_, **__):
        return (torch.zeros(1, 77, 768),)

    def __call__(self, latents, **_):
        return SimpleNamespace(images=self.picture.expand(len(latents), -1, -1, -1).clone())


def stage_2_memory(root, classes, ipc, form):
    """Stage 2's own main over prototypes of ImageNet's size, in this process; returns what it needed."""
    folder, size = sparse_prototypes(root, classes, ipc, form)
    before = peak_memory()["host_mib"]
    hashes = {f"{name}_sha256": "0" * 64 for name in ("vae", "unet", "text_encoder", "scheduler", "tokenizer")}
    gen_syn_image.load_synthesis = lambda *_: (StubPipeline(), "fp32", hashes)
    started = time.perf_counter()
    argv = ["--dataset", "imagenet", "--prototype_path", folder, "--ipc", ipc, "--km_expand", 1, "--image_size", 8]
    made = gen_syn_image.main([*map(str, argv), "--device", "cpu", "--save_init_image_path", str(root / "images")])[0]
    timing = read_json(made / "timing.json")  # until the manifest; `peak_memory` is from there on
    return {
        "classes": classes, "ipc": ipc, "images": classes * ipc, "prototype_format": form, "prototype_bytes": size,
        "host_mib_of_timing_json": timing["host_mib"],
        "host_mib_peak": max(timing["host_mib"], peak_memory()["host_mib"]),
        "host_mib_before_stage_2": before, "seconds": round(time.perf_counter() - started, 1), "limit_mib": 2048,
        "note": "pictures of 8 px in place of 512 px, which add 25 MB a batch of 32; networks stubbed",
    }  # fmt: skip


def memory_in_child(root, classes, ipc, form):
    """The same in a process of its own: peaks are of a whole process."""
    code = (
        "import json, sys; from pathlib import Path; from misc.bench.memory import stage_2_memory;"
        "found = stage_2_memory(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]);"
        "Path(sys.argv[1], 'found.json').write_text(json.dumps(found))"
    )
    with tempfile.TemporaryDirectory(prefix="d4m-memory-", dir=root) as folder:
        words = [sys.executable, "-c", code, folder, str(classes), str(ipc), form]
        subprocess.run(words, check=True, cwd=Path(__file__).parents[2])
        return read_json(Path(folder) / "found.json")
