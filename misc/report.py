"""What a folder of outputs amounts to: accuracy by training set, the time of each stage, and a picture of the sets.

    python -m misc.report --output_root output/demo --dataset digits --ipc 10

Prints markdown; writes report.md and grid.png (real / prototypes / synthetic, a row a class) into --output_root.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.report", file=sys.stderr)
    sys.exit(2)

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from distillation.datasets import dataset_name
from scripts.files import TIMING, is_complete, read_json, read_manifest, write_text
from scripts.runtime import Parser, positive_int, refuse
from validate.paper_tables import find_results, find_teachers, scores

ARMS = {
    "d4m": "D4M",
    "random": "random real images",
    "decoded": "decoded prototypes, no diffusion",
    "text": "text-to-image, no prototypes",
    "noise": "denoised noise, no prototypes (the release's random initialisation)",
    "stm": "D4M, optimised further (STM)",
    "d4m-g": "D4M of a larger data set (D4M-G)",
}
STAGES = {
    "teachers": "teacher, on real images",
    "prototypes": "1 prototypes",
    "images": "2 synthesis, all sets",
    "labels": "3 soft labels, all sets",
    "students": "4 students, all sets and seeds",
}
GRID_ARMS = {"random": "real", "decoded": "prototypes", "d4m": "synthetic"}


def accuracy_table(root, dataset, ipc):
    """Markdown: a row a training set, soft and hard labels, mean ± sample std of the last epoch's top-1."""
    results = [r for r in find_results(root) if r["dataset"] == dataset and r["ipc"] == ipc]
    if not results:
        refuse(f"--output_root {root}: no results of stage 4 for --dataset {dataset} --ipc {ipc}")
    lines = []
    for student in dict.fromkeys(r["student"] for r in results):
        mine = [r for r in results if r["student"] == student]
        counts = sorted({r["last"]["n"] for r in mine})
        n = f"n = {' or '.join(map(str, counts))} seeds, mean ± sample std"
        lines += [f"{dataset}, {ipc} images a class, student {student}: top-1 of the last epoch, %, {n}", ""]
        lines += ["| trained on | soft labels | hard labels |", "|---|---:|---:|"]
        arms = {r["arm"] for r in mine}
        for arm in [*filter(arms.__contains__, ARMS), *sorted(arms - set(ARMS))]:
            cells = [
                " / ".join(scores(r) for r in mine if (r["arm"], r["labels"]) == (arm, kind)) or "not run"
                for kind in ("soft", "hard")
            ]
            lines.append(f"| {ARMS.get(arm, arm)} | {cells[0]} | {cells[1]} |")
        for (name, arch), teacher in find_teachers(root).items():
            if name == dataset:
                n = teacher["last"]["n"]
                lines.append(f"| full data: the teacher, {arch} (n = {n}) | | {scores(teacher)} |")
        lines.append("")
    return lines


def time_table(root):
    """Markdown: seconds of each stage from its timing.json files; the start of Python is not in them."""
    lines = ["| stage | seconds |", "|---|---:|"]
    total = 0
    for folder, title in STAGES.items():
        seconds = [read_json(path)["seconds"] for path in sorted((root / folder).glob(f"*/{TIMING}"))]
        if seconds:
            total += sum(seconds)
            lines.append(f"| {title} ({len(seconds)} runs) | {sum(seconds):.0f} |")
    return [*lines, f"| together, without the start of Python | {total:.0f} |", ""]


def find_images(root, dataset, ipc, arm):
    """The finished image folder of an arm, or None."""
    for folder in sorted((root / "images").glob(f"{dataset}_ipc{ipc}_*")):
        if is_complete(folder) and read_manifest("--output_root", folder, "images").get("arm") == arm:
            return folder
    return None


def draw_grid(folders, cell=48, most_rows=20, per_class=6):
    """{title: image folder} -> PIL image: a block a folder, a row a class, the first `per_class` pictures of each."""
    classes = sorted(p.name for p in next(iter(folders.values())).iterdir() if p.is_dir())[:most_rows]
    gap, head, side = cell // 3, cell // 2, max(cell, 12 * max(map(len, classes)))
    block = per_class * cell
    width = side + len(folders) * (block + gap)
    sheet = Image.new("RGB", (width, head + cell * len(classes)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=cell * 0.35)
    for b, (title, folder) in enumerate(folders.items()):
        left = side + b * (block + gap)
        draw.text((left + block / 2, head / 2), title, "black", font, anchor="mm")
        for r, name in enumerate(classes):
            for i, path in enumerate(sorted((folder / name).glob("*.png"))[:per_class]):
                with Image.open(path) as image:
                    picture = image.resize((cell - 2, cell - 2), Image.Resampling.BICUBIC)
                sheet.paste(picture, (left + i * cell + 1, head + r * cell + 1))
    for r, name in enumerate(classes):
        draw.text((side / 2, head + (r + 0.5) * cell), name, "black", font, anchor="mm")
    return sheet


def get_args(argv=None):
    parser = Parser(prog="misc.report", description=__doc__.split("\n")[0])
    parser.add_argument("--output_root", type=Path, default=Path("output"), help="holds images/, students/, ...")
    parser.add_argument("--dataset", type=dataset_name, default="imagenet", metavar="NAME")
    parser.add_argument("--ipc", type=positive_int, default=10)
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    lines = ["", *accuracy_table(args.output_root, args.dataset, args.ipc), *time_table(args.output_root)]
    found = {title: find_images(args.output_root, args.dataset, args.ipc, arm) for arm, title in GRID_ARMS.items()}
    found = {title: folder for title, folder in found.items() if folder}
    if found:
        draw_grid(found).save(args.output_root / "grid.png")
        lines.append(f"Picture ({' / '.join(found)}, a row a class): {args.output_root / 'grid.png'}")
    write_text(args.output_root / "report.md", "\n".join(lines).strip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
