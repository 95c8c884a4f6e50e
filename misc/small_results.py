"""The results of validate/cifar10_small.sh: every cell that was run, and what of the paper's claims is seen in them.

    python -m misc.small_results --output_root output/cifar10_small/cpu --scale cpu --data_dir data/cifar10 \\
        --results misc/results

Writes the part of this scale into RESULTS/cifar10_small.json, then cifar10_small.md from all parts, and one picture
a scale: images by diffusion, a row an arm. The page names the machine that it is made on: the one that trained.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.small_results", file=sys.stderr)
    sys.exit(2)

import time
from pathlib import Path

import torch

from distillation.datasets import DATASETS, open_split
from matching.models import count_parameters, create_model, load_teacher
from matching.soft_labels import load_pixels, open_images
from matching.training import Forward, evaluate, validation_pixels
from misc.bench.measure import commit, machine
from misc.figures import ARM_METHODS, draw_grid, read_image
from misc.report import time_table
from scripts.checkpoints import load_pipeline
from scripts.files import library_versions, read_json, read_manifest, write_json, write_text
from scripts.runtime import Parser, entry_point, refuse, resolve_device
from validate.paper_tables import find_results, number

DATASET, SIZE = "cifar10", 32
STRENGTH, GUIDANCE = 0.7, 8.0  # the paper's
VAE_ONLY = "Real through the VAE"
# Arms in the order of the table; those of the sweep follow, by strength and guidance.
ARMS = ["D4M", "Random real", VAE_ONLY, "Decoded prototypes", "Text-to-image", "w/o prototypes", "D4M, full k-means"]


# ---- what was run


def arm_title(arguments):
    """How the table calls an image folder, from the arguments in its manifest."""
    arm, stage_1 = arguments["arm"], arguments.get("prototype_arguments") or {}
    if arm == "decoded" and stage_1.get("kmeans") == "none":
        return VAE_ONLY
    title = ARM_METHODS[arm]
    if arm == "d4m":
        title += ", full k-means" if stage_1.get("kmeans") == "full" else ""
        title += f", strength {arguments['strength']:g}" if arguments["strength"] != STRENGTH else ""
        title += f", guidance {arguments['guidance_scale']:g}" if arguments["guidance_scale"] != GUIDANCE else ""
    return title


def rank(title):
    return (ARMS.index(title), "") if title in ARMS else (len(ARMS), title)


def find_cells(root, generator, teachers):
    """[{arm, ipc, teacher, student, recipe, labels, top1: {mean, std, n, values}, images}] of all students below.

    generator    hashes of the model's networks;   teachers: {sha256: arch} of those below the root
    Refuses what another model or teacher made, and two results of one cell: all would be taken for this experiment's.
    """
    cells = {}
    for found in find_results(root / "students"):
        settings, where = found["arguments"], f"--output_root {root}: {Path(found['path']).parent.name}"
        arguments = read_manifest("--output_root", root / "images" / found["images"], "images")["arguments"]
        if found["generator"] and found["generator_sha256"] != generator:
            refuse(f"{where}: its images were made by another {found['generator']} than --model")
        for arch, digest in settings["teacher"]:
            if teachers.get(digest) != arch:
                refuse(f"{where}: its labels are of a {arch} that is not in {root / 'teachers'}")
        cell = {
            "arm": arm_title(arguments),
            "ipc": found["ipc"],
            # `recipe` of paper_tables names the paper's own values only; here they are adapted to 32 px
            "recipe": "rd3" if settings["bn_refresh"] else "d4m",
            "epochs": settings["epochs"],
            "batch_size": settings["batch_size"],
            "student": found["student"],
            "teacher": " ".join(found["teacher"]) or None,
            "labels": found["labels"],
            "seeds": settings["seeds"],
            "top1": found["last"],
            "images": found["images"],
        }
        key = tuple(cell[name] for name in ("arm", *KEYS))
        if key in cells:
            refuse(f"{where}: a second result of {cell_name(cell)}; keep one of them below the root")
        cells[key] = cell
    if not cells:
        refuse(f"--output_root {root}: no student of stage 4 is there")
    order = ("ipc", "recipe", "epochs", "batch_size", "student")
    return sorted(cells.values(), key=lambda c: (*(c[k] for k in order), c["teacher"] or "", rank(c["arm"])))


def find_teachers(root):
    """{sha256 of the weights: folder} of the finished teachers."""
    folders = sorted(path.parent for path in (root / "teachers").glob("*/manifest.json"))
    return {
        read_manifest("--output_root", folder, "teacher")["files"]["model.safetensors"]["sha256"]: folder
        for folder in folders
    }


@torch.no_grad()
def through_vae(pixels, pipeline, rows=250):
    """(N, S, S, 3) uint8 -> the decoded means of their posteriors, likewise."""
    vae, parts = pipeline.vae, []
    for part in pixels.split(rows):
        x = part.to(vae.device).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        parts.append(((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)


def judge(root, folders, names, data_dir, pipeline, device):
    """What each teacher says: {arch: {"test", "test_through_vae": top-1, "images": {image folder: top-1}}}.

    Its accuracy on a synthetic set says whether the pictures are taken for their class.
    """
    facts, forward, found = DATASETS[DATASET], Forward(device), {}
    test = open_split(DATASET, data_dir, "val", flag="--data_dir")
    pixels, targets = validation_pixels(test, SIZE, device)
    decoded = through_vae(pixels, pipeline)
    for folder in folders:
        results = read_json(folder / "results.json")
        arch = results["arguments"]["arch"]
        network = load_teacher(arch, folder, DATASET, test.folders, SIZE, "--output_root")[0].to(device)

        def top1(pixels, targets, network=network):
            return round(evaluate(network, pixels, targets, forward, facts.mean, facts.std)["top1"], 2)

        found[arch] = {
            "images_a_class": results["arguments"]["max_images_per_class"] or "all",
            "test": top1(pixels, targets),
            "test_through_vae": top1(decoded, targets),
            "images": {},
        }
        for name in names:
            images = open_images("--output_root", root / "images" / name)
            arrays, images = load_pixels("--output_root", images)
            found[arch]["images"][name] = top1(torch.stack([torch.tensor(a) for a in arrays]), images.targets)
    return found


# ---- claims


CLAIMS = [  # (the claim, {field: value} of the better cell, of the worse one); other fields are equal
    ("Prototypes help: D4M above text-to-image (table 4)", {"arm": "D4M"}, {"arm": "Text-to-image"}),
    ("Prototypes help: D4M above the release's random initialisation (table 4)", {"arm": "D4M"},
     {"arm": "w/o prototypes"}),
    ("Diffusion helps: D4M above its decoded prototypes (section 3)", {"arm": "D4M"}, {"arm": "Decoded prototypes"}),
    ("Distilled images are worth more than as many random real ones", {"arm": "D4M"}, {"arm": "Random real"}),
    ("Soft labels beat hard ones, on D4M's images (section 3.3)", {"arm": "D4M", "labels": "soft"},
     {"arm": "D4M", "labels": "hard"}),
]  # fmt: skip
NOT_HERE = (
    "Above other methods (tables 1-3)",
    "Synthesis-time matching adds nothing (table 3)",
    "2.7 s and 6.1 GB an image (table 6)",
)
KEYS = ("ipc", "recipe", "epochs", "batch_size", "student", "teacher", "labels")


def pairs_of(cells, better, worse):
    """The pairs of cells that differ in what a claim says and in nothing else."""
    free = {key for key in (*better, *worse)} | ({"teacher"} if "labels" in better else set())
    for a in cells:
        if any(a[key] != value for key, value in better.items()):
            continue
        for b in cells:
            same = all(a[key] == b[key] for key in KEYS if key not in free)
            if same and all(b[key] == value for key, value in worse.items()):
                yield a, b


def cell_name(cell):
    teacher = f", teacher {cell['teacher']}" if cell["teacher"] else ""
    return f"{cell['arm']}, {cell['labels']}, IPC {cell['ipc']}, {cell['recipe']}, {cell['student']}{teacher}"


def verdict(better, worse):
    """One sentence of a pair of cells, by Welch's t-test over their students: seen if p < 0.05."""
    from scipy.stats import ttest_ind_from_stats

    a, b = better["top1"], worse["top1"]
    what = f"{number(a['mean'], a['std'])} against {number(b['mean'], b['std'])} ({cell_name(better)}"
    if min(a["n"], b["n"]) < 2:
        return f"not tested: {what}; n = 1)"
    sides = [side[key] for side in (a, b) for key in ("mean", "std", "n")]
    same = a["std"] == b["std"] == 0
    p = float(a["mean"] == b["mean"]) if same else float(ttest_ind_from_stats(*sides, equal_var=False).pvalue)
    word = "not seen" if p >= 0.05 else "seen" if a["mean"] > b["mean"] else "the opposite is seen"
    return f"{word}: {what}; p = {p:.2g}, n = {a['n']} and {b['n']})"


def transfer(cells):
    """Claims that compare more than two arms: {claim: [sentences]}."""
    found = {
        "Soft labels transfer over architectures: above hard ones for students of another make-up than the teacher "
        "(table 5)": [
            verdict(a, b)
            for a, b in pairs_of(cells, {"arm": "D4M", "labels": "soft"}, {"arm": "D4M", "labels": "hard"})
            if a["teacher"] != a["student"]
        ],
        "Accuracy grows with IPC (figure 6)": [],
    }
    growing = found["Accuracy grows with IPC (figure 6)"]
    for a in cells:
        for b in cells:
            same = all(a[key] == b[key] for key in KEYS if key != "ipc") and a["arm"] == b["arm"] == "D4M"
            if same and a["ipc"] > b["ipc"]:
                growing.append(verdict(a, b))
    sweep = [c for c in cells if c["arm"].startswith("D4M") and "k-means" not in c["arm"] and c["labels"] == "soft"]
    for what, default in (("strength", STRENGTH), ("guidance", GUIDANCE)):
        claim = f"The paper's {what} of {default:g} is better than others"
        found[claim] = [
            verdict(base, c).replace(" against ", f" against {c['arm'].removeprefix('D4M, ')}: ")
            for base in (c for c in sweep if c["arm"] == "D4M")
            for c in sweep
            if what in c["arm"] and all(c[key] == base[key] for key in KEYS)
        ]
    return found


def claims(cells):
    """{claim: [one sentence a pair of cells]}; "not tested" where no pair of cells was run."""
    found = {text: [verdict(a, b) for a, b in pairs_of(cells, *sides)] for text, *sides in CLAIMS}
    found |= {**transfer(cells), **dict.fromkeys(NOT_HERE, [])}
    return {text: sentences or ["not tested"] for text, sentences in found.items()}


def summary(sentences):
    """ "seen in 2 of 3 pairs, ..." where a claim has several; "" for one."""
    words = [sentence.split(":")[0] for sentence in sentences]
    if len(words) == 1:
        return ""
    counts = ", ".join(f"{word} in {words.count(word)}" for word in dict.fromkeys(words))
    return f"{counts} of {len(words)} pairs:<br>"


# ---- the page


def table(part):
    """Markdown: a row an arm, its soft and hard labels side by side."""
    several = {key: len({c[key] for c in part["cells"]}) > 1 for key in ("ipc", "recipe", "student")}
    titles = [{"ipc": "IPC"}.get(key, key) for key, more in several.items() if more]
    teachers = sorted({c["teacher"] for c in part["cells"] if c["teacher"]})
    head = ["trained on", *titles, *(f"soft, {t}" for t in teachers), "hard"]
    head += [f"taken for its class by {t}" for t in teachers]
    lines = ["| " + " | ".join(head) + " |", "|---" * (1 + len(titles)) + "|---:" * (2 * len(teachers) + 1) + "|"]
    rows = {}
    for c in part["cells"]:
        key = (c["arm"], *(str(c[k]) for k, more in several.items() if more))
        rows.setdefault(key, {"images": c["images"]})[c["teacher"] or "hard"] = c["top1"]
    for key, row in rows.items():
        scores = [row.get(column) for column in (*teachers, "hard")]
        cells = [
            number(s["mean"], s["std"]) + (f" (n = {s['n']})" if s["n"] != 3 else "") if s else "" for s in scores
        ]
        judged = [number(part["teachers"][t]["images"][row["images"]]) for t in teachers]
        lines.append("| " + " | ".join([*key, *cells, *judged]) + " |")
    return lines


SCALES = {"cpu": "CPU scale", "gpu": "GPU scale"}
HEAD = """# CIFAR-10, distilled by a small Stable Diffusion of our own

Stable Diffusion's weights know the world; these know the 50,000 training pictures of CIFAR-10 and nothing else. So
this measures the method, not the paper's numbers. The pictures were re-encoded as JPEG before they came here: results
are of "CIFAR-10, re-encoded". Made by `sh validate/cifar10_small.sh`; every cell that was run is in the table.
Top-1 in percent on the 10,000 test pictures, last epoch, mean ± sample standard deviation over n = 3 students where n
is not given. "Seen" is said where Welch's t-test over the students gives p < 0.05; it speaks of these images: which
real ones were drawn, and the noise of the synthetic ones, are one draw each. With a dozen pairs one may be chance.
Not run: anything on a GPU, the same on 64-px photographs, and Stable Diffusion itself at 512 px.
"""


def markdown(parts):
    lines = [HEAD]
    for scale, title in SCALES.items():
        if scale not in parts:
            lines += [f"## {title}", "", "Not run.", ""]
            continue
        part = parts[scale]
        model, hardware = part["model"], part["machine"]
        where = ", ".join(f"{value} {key}" if key == "cores" else str(value) for key, value in hardware.items()
                          if key in ("gpu", "cpu", "cores"))  # fmt: skip
        lines += [
            f"## {title}",
            "",
            f"{where}; torch {part['versions']['torch']}, diffusers {part['versions']['diffusers']}; this page by "
            f"commit {part['commit']}; {part['date']}. `{part['command']}`",
            "",
            f"- generator: VAE {model['parameters']['vae']:,} parameters, latents {model['latent']}, "
            f"{model['reconstruction_psnr_db']} dB PSNR on {model['reconstruction_psnr_on']}; UNet "
            f"{model['parameters']['unet']:,} parameters; {model['steps']['vae']:,} + {model['steps']['unet']:,} "
            "steps of training",
        ]
        for arch, t in part["teachers"].items():
            lines.append(
                f"- teacher {arch}, trained on {t['images_a_class']} pictures a class: {t['test']:.1f}; of the test "
                f"pictures sent through the VAE it gets {t['test_through_vae']:.1f}"
            )
        for student, count in part["students"].items():
            lines.append(f"- student {student}: {count:,} parameters")
        shared = {key: sorted({str(c[key]) for c in part["cells"]}) for key in (*KEYS[:4], "seeds")}
        words = {"ipc": "IPC", "batch_size": "batch"}
        lines.append("- " + "; ".join(f"{words.get(key, key)} {', '.join(v)}" for key, v in shared.items()))
        lines += ["", *table(part), "", f"![images by diffusion, a row an arm](cifar10_small_{scale}.png)", ""]
        lines += ["| the paper's claim | here |", "|---|---|"]
        for claim, sentences in part["claims"].items():
            lines.append(f"| {claim} | {summary(sentences)}{'<br>'.join(sentences)} |")
        lines += ["", "Seconds of all processes, some of which ran side by side:", "", *part["seconds"]]
    return "\n".join(lines).rstrip() + "\n"


def picture(root, cells):
    """Figure: images that diffusion made, a row an arm, a column a class; None without any.

    No decoded prototypes, and none at low strength: k-means re-draws weak centres, so that some are one photograph.
    """
    real = ("Random real", VAE_ONLY, "Decoded prototypes", "D4M, strength 0.3", "D4M, strength 0.5")
    shown = {c["arm"]: c["images"] for c in cells if c["arm"] not in real}
    if not shown:
        return None
    sets = [open_images("--output_root", root / "images" / name) for name in shown.values()]
    rows = [[read_image(images, folder, 0) for folder in images.folders] for images in sets]
    names = [
        arm.removeprefix("D4M, ").replace("Text-to-image", "text").replace("full k-means", "Lloyd") for arm in shown
    ]
    return draw_grid(rows, names, list(sets[0].folders))


def get_args(argv=None):
    parser = Parser(prog="misc.small_results", description=__doc__.split("\n")[0])
    parser.add_argument("--output_root", type=Path, required=True, help="OUT of the launcher")
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--model", default="misc/tiny-sd-cifar10", help="the generator's folder")
    parser.add_argument("--data_dir", required=True, help="CIFAR-10, for the teachers' say on its test pictures")
    parser.add_argument("--results", type=Path, required=True, help="where the page is written")
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    from scripts.pipeline_stable_diffusion_latents2img import StableDiffusionLatents2ImgPipeline

    args = get_args(argv)
    device = resolve_device(args.device)
    root, page = args.output_root, args.results / "cifar10_small.json"
    pipeline, hashes = load_pipeline(StableDiffusionLatents2ImgPipeline, args.model, device, "fp32")
    generator = tuple(hashes[f"{network}_sha256"] for network in ("unet", "vae", "text_encoder"))
    teachers = find_teachers(root)
    archs = {digest: read_json(folder / "results.json")["arguments"]["arch"] for digest, folder in teachers.items()}
    cells = find_cells(root, generator, archs)
    manifest = read_manifest("--model", args.model, "tiny_sd")
    names = list(dict.fromkeys(c["images"] for c in cells))
    factor = manifest["arguments"]["vae_factor"]
    keep = ("parameters", "steps", "reconstruction_psnr_db", "reconstruction_psnr_on", "content")
    part = {
        "command": f"{'SCALE=gpu ' if args.scale == 'gpu' else ''}sh validate/cifar10_small.sh",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "versions": library_versions(),
        "model": {key: manifest[key] for key in keep} | {"latent": f"4 x {SIZE // factor} x {SIZE // factor}"},
        "teachers": judge(root, teachers.values(), names, args.data_dir, pipeline, device),
        "students": {
            name: count_parameters(create_model(name, 10, SIZE)) for name in sorted({c["student"] for c in cells})
        },
        "cells": cells,
        "claims": claims(cells),
        "seconds": time_table(root),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    parts = {**(read_json(page) if page.exists() else {}), args.scale: part}
    write_json(page, parts)
    figure = picture(root, cells)
    if figure:
        figure.savefig(args.results / f"cifar10_small_{args.scale}.png", dpi=150, metadata={"Software": None})
    text = markdown(parts)
    write_text(page.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
