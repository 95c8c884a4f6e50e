"""How ImageNet-1K's cost grows with images a class: time, disk and memory, from what was measured."""

import statistics

from misc.bench.stage_4 import BN_BATCH
from misc.check import ENCODE_GIB, GIB, SYNTHESIS_GIB

# images a second on one H200, from operation counts and published rates: used until a GPU's JSON is there
ESTIMATES = {
    "stage 1": 360, "cache, IPC 10": 9000, "cache, IPC 200": 1800, "stage 2": 6.4, "stage 3": 20800, "stage 4": 12500
}  # fmt: skip
REAL_IMAGES, TEST_IMAGES, CLASSES, EPOCHS = 1_281_167, 50_000, 1000, 300
PIXELS = 224 * 224 * 3  # bytes of an image
GPU_ROWS = {
    "stage 1": "images to prototypes",
    "cache, IPC 10": "another IPC, 10 a class, json",
    "cache, IPC 200": "another IPC, 200 a class, json",
    "stage 2": "prototypes to PNGs",
    "stage 3": "labels made by resnet18, 224 px",
    "stage 4": "an epoch of resnet18, 224 px",
}


def gpu_rates(results):
    """({what: images a second}, its mark): measured on a GPU if one of `results` is of one, else estimated."""
    for result in results:
        if "gpu" in result.get("machine", {}):
            rows = {k: [r["ours"] for r in result["rows"] if r["what"].startswith(v)] for k, v in GPU_ROWS.items()}
            if all(rows.values()):
                return {k: v[0] for k, v in rows.items()}, f"measured on {result['machine']['gpu']}"
    return ESTIMATES, "estimated"


def gpu_bytes(ipc, batch_size=32):
    """{stage: bytes of GPU memory, estimated}; where the images do not fit in stages 3-4, they stay in host memory.

    batch_size   of stages 1-2; stages 3-4 have the launchers' batches of 1024, in chunks in stage 4
    """
    images = CLASSES * ipc
    return {
        1: 0.17e9 + batch_size * ENCODE_GIB * GIB,
        2: 2.1e9 + batch_size * SYNTHESIS_GIB * GIB,
        3: images * PIXELS + 1024 * PIXELS * 9 + 4e9,
        4: (images + TEST_IMAGES) * PIXELS + 1024 * PIXELS * 9 + BN_BATCH * 2.4e7 + 2e9,
    }


def costs(results):
    """Markdown: time, disk and memory of ImageNet-1K by IPC. Each figure ends in m, c or e, see below."""
    rates, origin = gpu_rates(results)
    mark = "c" if origin != "estimated" else "e"
    pngs = [r["facts"]["png_bytes_224"] for r in results if r.get("facts", {}).get("png_bytes_224")]
    png, png_mark = (statistics.fmean(pngs), "c") if pngs else (100e3, "e")

    def hours(seconds, letter=mark):
        if seconds < 180:
            return f"{seconds:.0f} s {letter}"
        return f"{seconds / 60:.0f} min {letter}" if seconds < 5400 else f"{seconds / 3600:.1f} h {letter}"

    def gigabytes(count, letter="c"):
        return f"{count / 1e9:.3g} GB {letter}"

    def from_cache(ipc):
        """Seconds of one GPU: k-means and files grow with IPC, reading does not."""
        few, many = (REAL_IMAGES / rates[f"cache, IPC {n}"] for n in (10, 200))
        return few + (many - few) * (ipc - 10) / 190

    ipcs, lines, seen = (10, 50, 100, 200), [], EPOCHS * CLASSES
    for gpus in (1, 8):
        # stages 1 to 3 share their work out and never talk; stage 4 sums gradients: 80 % is assumed
        many = gpus if gpus == 1 else gpus * 0.8
        last = mark if gpus == 1 else "e"
        rows = {
            "1 prototypes, from images": [hours(REAL_IMAGES / rates["stage 1"] / gpus)] * 4,
            "1 another IPC, from the cache": [hours(from_cache(n) / gpus) for n in ipcs],
            "2 synthesis": [hours(CLASSES * n / rates["stage 2"] / gpus) for n in ipcs],
            "3 soft labels, ResNet-18, 300 epochs": [hours(seen * n / rates["stage 3"] / gpus) for n in ipcs],
            "4 student, ResNet-18, 300 epochs": [hours(seen * n / rates["stage 4"] / many, last) for n in ipcs],
        }  # fmt: skip
        lines += [f"## Time on {gpus} GPU{'s' * (gpus > 1)}", "", *_by_ipc(ipcs, rows), ""]
    pixels = [CLASSES * n * PIXELS for n in ipcs]
    label = [CLASSES * n * (25 + 2 * CLASSES) for n in ipcs]
    rows = {
        "1 prototypes, safetensors": [gigabytes(CLASSES * n * 4 * 64 * 64 * 2) for n in ipcs],
        "1 prototypes, JSON, 6.7 bytes a number": [gigabytes(CLASSES * n * 4 * 64 * 64 * 6.7, "e") for n in ipcs],
        "1 latent cache": [gigabytes(REAL_IMAGES * 4 * 64 * 64 * 2)] * 4,
        "2 PNGs of 224 px": [gigabytes(CLASSES * n * png, png_mark) for n in ipcs],
        "3 soft labels, fp16, 300 epochs": [gigabytes(EPOCHS * n) for n in label],
        "4 student and results": ["0.05 GB c"] * 4,
    }  # fmt: skip
    lines += ["## Disk", "", *_by_ipc(ipcs, rows), ""]
    on_gpu = [gpu_bytes(n) for n in ipcs]
    rows = {
        "1 GPU: fp16 VAE, batch of 32 at 512 px": [gigabytes(n[1], "e") for n in on_gpu],
        "2 GPU: fp16 Stable Diffusion, batch of 32": [gigabytes(n[2], "e") for n in on_gpu],
        "3 GPU: set as bytes + a batch of 1024": [gigabytes(n[3], "e") for n in on_gpu],
        f"4 GPU: set and test images as bytes + a chunk of {BN_BATCH}": [gigabytes(n[4], "e") for n in on_gpu],
        "3, 4 host: set in memory (or on its way to the GPU), an epoch's labels, 50,000 test images": [
            gigabytes(p + n + TEST_IMAGES * PIXELS + 3e9, "e") for p, n in zip(pixels, label)
        ],
    }  # fmt: skip
    lines += ["## Memory, one process", "", *_by_ipc(ipcs, rows), ""]
    for found in (m for r in results for m in r.get("memory", [])):
        size, peak = found["prototype_bytes"] / 1e9, found["host_mib_peak"]
        lines.append(
            f"Stage 2 over {found['classes']} classes at IPC {found['ipc']} ({found['prototype_format']}, "
            f"{size:.2g} GB of prototypes), networks stubbed: {peak} MiB of host memory at the peak "
            f"m, manifest included; {found['images']:,} images in {found['seconds']} s m."
        )
    return "\n".join([
        "# ImageNet-1K: how cost grows with images a class", "",
        f"m measured, c computed from counts and from measured rates, e estimated. Rates of a GPU: {origin} "
        f"({', '.join(f'{k} {v:,.4g} images/s' for k, v in rates.items())}). `python -m misc.benchmark --costs`", "",
        *lines,
    ]) + "\n"  # fmt: skip


def _by_ipc(ipcs, rows):
    head = ["| | " + " | ".join(f"IPC {n}" for n in ipcs) + " |", "|---|" + "---:|" * len(ipcs)]
    return head + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
