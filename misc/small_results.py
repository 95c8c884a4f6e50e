"""The results of validate/cifar10_small.sh: every cell, and which of the paper's claims they show.

    python -m misc.small_results --output_root output/cifar10_small/cpu --scale cpu \\
        --data_dir data/cifar10 --results misc/results
    python -m misc.small_results --results misc/results    # the page again, from its numbers

Writes the part of this scale into RESULTS/cifar10_small.json, then cifar10_small.md from all parts,
and one picture per scale: images by diffusion, one row per arm. A part names the machine on which
it is gathered: the one that trained.
"""

import time
from itertools import permutations
from pathlib import Path

import torch

from distillation import datasets
from matching import evaluation, images, models, training
from misc import benchmark, figures, report, train_tiny_sd
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, refuse
from validate import paper_tables

DATASET, SIZE = "cifar10", 32
PAPER = {"strength": 0.7, "guidance": 8.0}
VAE_ONLY = "Real through the VAE"
# in the order of the table; those of the sweep follow, by strength and guidance
ARMS = ["D4M", "Random real", VAE_ONLY, "Decoded prototypes", "Text-to-image", "w/o prototypes"]
ARMS += ["D4M, full k-means"]
KEYS = ("ipc", "recipe", "epochs", "batch_size", "student", "teacher", "labels")


# ---- what was run


def arm_title(arguments, stage_1):
    """What the table calls an image folder, from its settings and those of its prototypes."""
    arm, kmeans = arguments["arm"], (stage_1 or {}).get("kmeans")
    if (arm, kmeans) == ("decoded", "none"):
        return VAE_ONLY
    words = [figures.ARMS[arm][0]]
    if arm == "d4m":
        found = {"strength": arguments["strength"], "guidance": arguments["guidance_scale"]}
        words += ["full k-means"] * (kmeans == "full")
        words += [f"{name} {value:g}" for name, value in found.items() if value != PAPER[name]]
    return ", ".join(words)


def place_of(title):
    return (ARMS.index(title), "") if title in ARMS else (len(ARMS), title)


def find_cells(root, generator, teachers):
    """[{arm, ipc, teacher, student, recipe, labels, top1: {mean, std, n, values}, images}], sorted.

    generator   hashes of the model's networks;   teachers: {sha256: arch} of those below the root
    Refuses what another model or teacher made, and two results of one cell.
    """
    cells = {}
    for found in paper_tables.find_results(root / "students"):
        where = f"--output_root {root}: {Path(found['path']).parent.name}"
        folder, settings = root / "images" / found["images"], found["arguments"]
        made = output.read_manifest("--output_root", folder, "images")
        if found["generator"] and found["generator_sha256"] != generator:
            refuse(f"{where}: its images were made by another {found['generator']} than --model")
        for teacher in files.read_json(found["path"])["teacher"]:
            if teachers.get(teacher["sha256"]) != teacher["arch"]:
                refuse(f"{where}: its labels are of a {teacher['arch']} not in {root / 'teachers'}")
        arm = arm_title(made["arguments"], made["inputs"].get("prototype_arguments"))
        # paper_tables names the paper's own recipes only; here they are adapted to 32 px
        recipe = "rd3" if settings["bn_refresh"] else "d4m"
        cell = {"arm": arm, "ipc": found["ipc"], "recipe": recipe}
        cell |= {name: settings[name] for name in ("epochs", "batch_size")}
        cell |= {"student": found["student"], "teacher": " ".join(found["teacher"]) or None}
        cell |= {"labels": found["labels"], "seeds": settings["seeds"], "top1": found["last"]}
        cell["images"] = found["images"]
        key = tuple(cell[name] for name in ("arm", *KEYS))
        if key in cells:
            refuse(f"{where}: a second result of {cell_name(cell)}; keep one of them")
        cells[key] = cell
    if not cells:
        refuse(f"--output_root {root}: no student of stage 4 is there")
    by_row = lambda c: (*(c[k] or "" for k in KEYS[:6]), place_of(c["arm"]))  # noqa: E731
    return sorted(cells.values(), key=by_row)


def judge(root, teachers, names, data_dir, vae, process):
    """{arch: {"test", "test_through_vae": top-1, "images": {image folder: top-1}}} of the teachers.

    teachers   (folder, arguments) of each
    Its accuracy on a synthetic set says whether the pictures are taken for their class.
    """
    facts, forward, found = datasets.ALL[DATASET], training.Forward(process.device), {}
    test = datasets.open_split(DATASET, data_dir, "val")
    pixels, targets = evaluation.validation_pixels(test, SIZE, process, flag="--data_dir")
    decoded = train_tiny_sd.reconstructions(vae, pixels.permute(0, 3, 1, 2))
    decoded = (decoded * 255).round().byte().permute(0, 2, 3, 1)
    sets = {"test": (pixels, targets), "test_through_vae": (decoded, targets)}
    for name in names:
        flag, made = "--output_root", images.open_images("--output_root", root / "images" / name)
        arrays, _ = images.load_pixels(flag, made)
        sets[name] = torch.stack([torch.tensor(a) for a in arrays]), made.targets
    for folder, made in teachers:
        network, _ = models.load_teacher(made["arch"], folder, DATASET, test.folders, SIZE)
        network, top1 = network.to(process.device), {}
        for name, pair in sets.items():
            score = evaluation.evaluate(network, *pair, forward, facts.mean, facts.std)
            top1[name] = round(score["top1"], 2)
        found[made["arch"]] = {
            "images_a_class": made["max_images_per_class"] or "all",
            **{name: top1.pop(name) for name in ("test", "test_through_vae")},
            "images": top1,
        }
    return found


# ---- claims


BETTER_ARM = {  # claim: the arm that D4M is better than, all else equal
    "Prototypes help: D4M above text-to-image (table 4)": "Text-to-image",
    "Prototypes help: D4M above the release's random initialisation (table 4)": "w/o prototypes",
    "Diffusion helps: D4M above its decoded prototypes (section 3)": "Decoded prototypes",
    "Distilled images are worth more than as many random real ones": "Random real",
}
SOFT = "Soft labels beat hard ones, on D4M's images (section 3.3)"
TRANSFER = (
    "Soft labels transfer over architectures: above hard ones for students of another make-up than "
    "the teacher (table 5)"
)
IPC = "Accuracy grows with IPC (figure 6)"
SWEEP = {
    "The paper's strength of 0.7 is better than others": "D4M, strength",
    "The paper's guidance of 8 is better than others": "D4M, guidance",
}
# what other draws of images say against a difference seen on one
DOUBTED = ("w/o prototypes", "soft", 10, 25, "convnet_w64")
DOUBT = "over three draws of images p = 0.44, checked elsewhere; none are run here yet"
NOT_HERE = (
    "Above other methods (tables 1-3)",
    "Synthesis-time matching adds nothing (table 3)",
    "2.7 s and 6.1 GB an image (table 6)",
)


def recipe_name(cell):
    return f"{cell['recipe']} in batches of {cell['batch_size']}"


def cell_name(cell):
    teacher = f", teacher {cell['teacher']}" if cell["teacher"] else ""
    words = f"IPC {cell['ipc']}, {recipe_name(cell)}, {cell['student']}"
    return f"{cell['arm']}, {cell['labels']}, {words}{teacher}"


def verdict(better, worse):
    """One sentence on two cells, by Welch's t-test over their students: seen if p < 0.05.

    What is seen here and was not on other draws of images is withdrawn until draws are run here.
    """
    from scipy.stats import ttest_ind_from_stats

    a, b = better["top1"], worse["top1"]
    ours, theirs = (paper_tables.number(side["mean"], side["std"]) for side in (a, b))
    other = worse["arm"].removeprefix("D4M, ")
    theirs = theirs if other == worse["arm"] else f"{other}: {theirs}"
    what = f"{ours} against {theirs} ({cell_name(better)}"
    if min(a["n"], b["n"]) < 2:
        return f"not tested: {what}; n = 1)"
    p = float(a["mean"] == b["mean"])
    if a["std"] or b["std"]:
        sides = [side[key] for side in (a, b) for key in ("mean", "std", "n")]
        p = float(ttest_ind_from_stats(*sides, equal_var=False).pvalue)
    seen = "seen" if a["mean"] > b["mean"] else "the opposite is seen"
    seen, why = seen if p < 0.05 else "not seen", f"p = {p:.2g}, n = {a['n']} and {b['n']}"
    cell = tuple(worse[name] for name in ("arm", "labels", "ipc", "batch_size", "student"))
    if seen == "seen" and cell == DOUBTED:
        seen, why = "withdrawn", f"{why}; {DOUBT}"
    return f"{seen}: {what}; {why})"


def claims(cells):
    """{claim: [one sentence per pair of cells that differ in nothing else]}"""
    found = {claim: [] for claim in (*BETTER_ARM, SOFT, TRANSFER, IPC, *SWEEP, *NOT_HERE)}
    for a, b in permutations(cells, 2):
        differ, said = [key for key in ("arm", *KEYS) if a[key] != b[key]], []
        soft = a["labels"] == "soft"
        if a["arm"] != "D4M":
            continue
        if differ == ["arm"]:
            said = [claim for claim, arm in BETTER_ARM.items() if b["arm"] == arm]
            said += [c for c, arm in SWEEP.items() if b["arm"].startswith(arm)]
        elif soft and differ == ["teacher", "labels"]:
            said = [SOFT] + [TRANSFER] * (a["teacher"] != a["student"])
        elif differ == ["ipc"] and a["ipc"] > b["ipc"]:
            said = [IPC]
        for claim in said:
            found[claim].append(verdict(a, b))
    return {claim: sentences or ["not tested"] for claim, sentences in found.items()}


def summary(sentences):
    """ "seen in 2 of 3 pairs, ..." where a claim has several; "" for one."""
    words = [sentence.split(":")[0] for sentence in sentences]
    if len(words) == 1:
        return ""
    counts = ", ".join(f"{word} in {words.count(word)}" for word in dict.fromkeys(words))
    return f"{counts} of {len(words)} pairs:<br>"


# ---- the page


def table(part):
    """Markdown: one row per arm, its soft and hard labels side by side."""
    cells = part["cells"]
    several = [k for k in ("ipc", "recipe", "student") if len({c[k] for c in cells}) > 1]
    teachers = sorted({c["teacher"] for c in cells if c["teacher"]})
    head = ["trained on", *(k.replace("ipc", "IPC") for k in several)]
    head += [*(f"soft, {t}" for t in teachers), "hard"]
    head += [f"taken for its class by {t}" for t in teachers]
    rule = "|---" * (1 + len(several)) + "|---:" * (2 * len(teachers) + 1) + "|"
    lines, rows = ["| " + " | ".join(head) + " |", rule], {}
    for c in cells:
        row = rows.setdefault((c["arm"], *(str(c[k]) for k in several)), {"images": c["images"]})
        row[c["teacher"] or "hard"] = c["top1"]
    for words, row in rows.items():
        for column in (*teachers, "hard"):
            found = row.get(column)
            few = f" (n = {found['n']})" if found and found["n"] != 3 else ""
            words += (paper_tables.number(found["mean"], found["std"]) + few if found else "",)
        judged = [part["teachers"][t]["images"][row["images"]] for t in teachers]
        lines.append("| " + " | ".join([*words, *map(paper_tables.number, judged)]) + " |")
    return lines


SCALES = {"cpu": "CPU scale", "gpu": "GPU scale"}
HEAD = """# CIFAR-10, distilled by a small Stable Diffusion of our own

Stable Diffusion's weights know the world; these know the 50,000 training pictures of CIFAR-10 and
nothing else. So this measures the method, not the paper's numbers. The pictures were re-encoded as
JPEG before they came here: results are of "CIFAR-10, re-encoded". Made by
`sh validate/cifar10_small.sh`; every cell that was run is in the table.

The recipe is no published one. "d4m in batches of 25" has the loss, temperature, crops and CutMix
of D4M's ImageNet recipe at 32 px. Its batch of 1024 would be one AdamW step per epoch on 100
images; 25 makes four. Top-1 in percent on the 10,000 test pictures, last epoch, mean ± sample
standard deviation over the initial weights of n = 3 students where n is not given; the students
share crops, order and CutMix.

"Seen" means that Welch's t-test over the students gives p < 0.05. It speaks of these images: which
real ones were drawn, and the noise of the synthetic ones, are one draw each, and other draws may
say otherwise. Among twenty pairs one may be chance. Not run: other draws of images, anything on a
GPU, the same on 64-px photographs, and Stable Diffusion itself at 512 px.
"""


def describe(part):
    """Markdown: machine, generator, teachers, students and what all cells share."""
    model, hardware, versions = part["model"], part["machine"], part["versions"]
    where = ", ".join(hardware[key] for key in ("gpu", "cpu") if key in hardware)
    counts, steps = model["parameters"], model["steps"]
    made = f"torch {versions['torch']}, diffusers {versions['diffusers']}; gathered by commit "
    made += f"{part['commit']}; {part['date']}. `{part['command']}`"
    psnr = f"{model['reconstruction_psnr_db']} dB PSNR on {model['reconstruction_psnr_on']}"
    vae = f"VAE {counts['vae']:,} parameters, latents {model['latent']}, {psnr}"
    steps = f"{steps['vae']:,} + {steps['unet']:,} training steps"
    lines = [f"{where}, {hardware['cores']} cores; {made}", ""]
    lines += [f"- generator: {vae}; UNet {counts['unet']:,} parameters; {steps}"]
    for arch, t in part["teachers"].items():
        name = f"teacher {arch}, trained on {t['images_a_class']} pictures per class"
        vae = f"of the test pictures sent through the VAE it gets {t['test_through_vae']:.1f}"
        lines.append(f"- {name}: {t['test']:.1f}; {vae}")
    lines += [f"- student {name}: {count:,} parameters" for name, count in part["students"].items()]
    shared, cells = [], [c | {"IPC": c["ipc"], "recipe": recipe_name(c)} for c in part["cells"]]
    for key in ("IPC", "recipe", "epochs", "seeds"):
        shared.append(f"{key} {', '.join(sorted({str(c[key]) for c in cells}))}")
    return [*lines, "- " + "; ".join(shared)]


def markdown(parts):
    lines = [HEAD]
    for scale, title in SCALES.items():
        lines += [f"## {title}", ""]
        if scale not in parts:
            lines += ["Not run.", ""]
            continue
        part = parts[scale]
        picture = f"![images by diffusion, one row per arm](cifar10_small_{scale}.png)"
        lines += [*describe(part), "", *table(part), "", picture, ""]
        lines += ["| the paper's claim | here |", "|---|---|"]
        for claim, sentences in part["claims"].items():
            lines.append(f"| {claim} | {summary(sentences)}{'<br>'.join(sentences)} |")
        lines += ["", "Seconds of all processes, some of which ran side by side:", ""]
        lines += part["seconds"]
    return "\n".join(lines).rstrip() + "\n"


def picture(root, cells):
    """Figure: images that diffusion made, one row per arm, one column per class; None without any.

    No decoded prototypes, and none at low strength: k-means redraws weak centres, so that some are
    one photograph.
    """
    real = ("Random real", VAE_ONLY, "Decoded prototypes", "D4M, strength 0.3", "D4M, strength 0.5")
    shown = {c["arm"]: root / "images" / c["images"] for c in cells if c["arm"] not in real}
    if not shown:
        return None
    sets = [images.open_images("--output_root", folder) for folder in shown.values()]
    rows = [[figures.files_of(found, f)[0] for f in found.folders] for found in sets]
    short = {"Text-to-image": "text", "D4M, full k-means": "Lloyd"}
    names = [short.get(arm, arm.removeprefix("D4M, ")) for arm in shown]
    return figures.draw_grid(rows, names, sets[0].folders)


def get_args(argv=None):
    parser = Parser("misc.small_results", __doc__)
    again = "OUT of the launcher [none: the page is made again from its numbers]"
    parser.flag("--output_root", type=Path, help=again)
    parser.flag("--scale", choices=list(SCALES), default="cpu", help="of --output_root")
    parser.flag("--model", default="misc/tiny-sd-cifar10", help="the generator's folder")
    parser.flag("--data_dir", default="data/cifar10", help="CIFAR-10, to test the teachers")
    parser.flag("--results", type=Path, required=True, help="where the page is written")
    parser.flag("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    return parser.parse_args(argv)


def gather(root, scale, model, data_dir, device):
    """One scale's part of the page: its cells and seconds, and where they were made."""
    process = runtime.this_process(device)
    generator = generators.load(model, process.device, "fp32")
    hashes = [value for name, value in generator.facts.items() if name.endswith("_sha256")]
    teachers = {}
    for path in sorted((root / "teachers").glob(f"*/{output.MANIFEST}")):
        manifest = output.read_manifest("--output_root", path.parent, "teacher")
        digest = manifest["files"]["model.safetensors"]["sha256"]
        teachers[digest] = (path.parent, manifest["arguments"])
    cells = find_cells(root, hashes, {digest: t["arch"] for digest, (_, t) in teachers.items()})
    names = list(dict.fromkeys(c["images"] for c in cells))
    manifest = output.read_manifest("--model", model, "tiny_sd")
    side = SIZE // manifest["arguments"]["vae_factor"]
    keep = ("parameters", "steps", "reconstruction_psnr_db", "reconstruction_psnr_on", "content")
    students, vae = sorted({c["student"] for c in cells}), generator.networks["vae"]
    return {
        "command": f"{'SCALE=gpu ' * (scale == 'gpu')}sh validate/cifar10_small.sh",
        "commit": benchmark.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": benchmark.machine(process.device),
        "versions": output.library_versions(),
        "model": {key: manifest[key] for key in keep} | {"latent": f"4 x {side} x {side}"},
        "teachers": judge(root, teachers.values(), names, data_dir, vae, process),
        "students": {
            name: models.count_parameters(models.create_model(name, 10, SIZE)) for name in students
        },
        "cells": cells,
        "seconds": report.time_table(root),
    }


@entry_point
def main(argv=None):
    args = get_args(argv)
    page = args.results / "cifar10_small.json"
    if not (args.output_root or page.exists()):
        refuse(f"--results {args.results}: holds no {page.name}; --output_root makes it")
    parts, root = files.read_json(page) if page.exists() else {}, args.output_root
    if root:
        parts[args.scale] = gather(root, args.scale, args.model, args.data_dir, args.device)
    for part in parts.values():
        part["claims"] = claims(part["cells"])
    args.results.mkdir(parents=True, exist_ok=True)
    files.write(page, files.json_text(parts))
    figure = root and picture(root, parts[args.scale]["cells"])
    if figure:
        path = args.results / f"cifar10_small_{args.scale}.png"
        figure.savefig(path, dpi=150, metadata={"Software": None})
    text = markdown(parts)
    files.write(page.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
