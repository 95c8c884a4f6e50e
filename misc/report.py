"""What a folder of outputs amounts to: accuracy by training set, time by stage, and a picture.

    python -m misc.report --output_root output/demo --dataset digits --ipc 10

Prints markdown; writes report.md and grid.png (one row per class) into --output_root.
"""

from pathlib import Path

from distillation import datasets
from misc import figures
from scripts import files, output
from scripts.runtime import Parser, entry_point, number, refuse
from validate import paper_tables

STAGES = {
    "teachers": "teacher, on real images",
    "prototypes": "1 prototypes",
    "images": "2 synthesis, all sets",
    "labels": "3 soft labels, all sets",
    "students": "4 students, all sets and seeds",
}
GRID_ARMS = {"random": "real", "decoded": "prototypes", "d4m": "synthetic"}


def row_name(result, results):
    """Its arm; its image folder where that is another method's or the arm has several; and how many
    classes, if some are missing."""
    arm = result["arm"]
    name = figures.ARMS.get(arm, (arm, arm))[1]
    if arm == "foreign" or len({r["images"] for r in results if r["arm"] == arm}) > 1:
        name = f"{name}: {result['images']}"
    part = datasets.of_all(result["dataset"], result["classes"])
    return name + f" ({part})" * bool(part)


def accuracy_table(root, dataset, ipc):
    """Markdown: one row per training set; top-1 of the last epoch, ± over initial weights."""
    every = [r for r in paper_tables.find_results(root) if r["dataset"] == dataset]
    results = [r for r in every if r["ipc"] == ipc]
    uneven = sorted({r["images"] for r in every if r["ipc"] is None})
    if not results:
        refuse(f"--output_root {root}: no results of stage 4 for --dataset {dataset} --ipc {ipc}")
    lines = []
    for student in dict.fromkeys(r["student"] for r in results):
        mine = [r for r in results if r["student"] == student]
        counts = " or ".join(map(str, sorted({r["last"]["n"] for r in mine})))
        what = f"{dataset}, {ipc} images per class, student {student}: top-1 of the last epoch, %"
        lines += [f"{what}, n = {counts} seeds, mean ± sample std over initial weights", ""]
        lines += ["| trained on | soft labels | hard labels |", "|---|---:|---:|"]
        order = [*figures.ARMS, *sorted({r["arm"] for r in mine} - set(figures.ARMS))]
        rows = {r["path"]: row_name(r, results) for r in mine}
        mine.sort(key=lambda r: order.index(r["arm"]))
        for name in dict.fromkeys(rows[r["path"]] for r in mine):
            cells = []
            for kind in ("soft", "hard"):
                found = [r for r in mine if (rows[r["path"]], r["labels"]) == (name, kind)]
                cells.append(" / ".join(map(paper_tables.scores, found)) or "not run")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for (name, arch), teacher in paper_tables.find_teachers(root).items():
            if name == dataset:
                who = f"full data: the teacher, {arch} (n = {teacher['last']['n']})"
                lines.append(f"| {who} | | {paper_tables.scores(teacher)} |")
        lines.append("")
    if uneven:
        lines += [f"Not shown: {', '.join(uneven)}: classes of different numbers of images", ""]
    return lines


def time_table(root):
    """Markdown: seconds of each stage from its timing.json files."""
    lines, total = ["| stage | seconds |", "|---|---:|"], 0
    for folder, title in STAGES.items():
        paths = sorted((root / folder).glob(f"*/{output.TIMING}"))
        seconds = [files.read_json(path)["seconds"] for path in paths]
        if seconds:
            total += sum(seconds)
            lines.append(f"| {title} ({len(seconds)} runs) | {sum(seconds):.0f} |")
    return [*lines, f"| together, without the start of Python | {total:.0f} |", ""]


def find_images(root, dataset, ipc):
    """{title: finished image folder} of GRID_ARMS, the first folder of each arm."""
    found = {}
    for folder in sorted((root / "images").glob(f"{dataset}_ipc{ipc}_*")):
        if output.is_complete(folder):
            arm = output.read_manifest("--output_root", folder, "images")["arm"]
            found.setdefault(arm, folder)
    return {title: found[arm] for arm, title in GRID_ARMS.items() if arm in found}


def draw_sets(folders, most_rows=20, per_class=6):
    """{title: image folder} -> figure: one block per folder, one row per class."""
    first = next(iter(folders.values()))
    classes = sorted(path.name for path in first.iterdir() if path.is_dir())[:most_rows]
    paths = [[sorted((f / name).glob("*.png")) for f in folders.values()] for name in classes]
    count = min(per_class, *(len(found) for row in paths for found in row))
    rows = [[path for found in row for path in (*found[:count], None)][:-1] for row in paths]
    titles = [title if n == count // 2 else "" for title in folders for n in range(count + 1)]
    return figures.draw_grid(rows, classes, titles[:-1], side=0.5)


def get_args(argv=None):
    parser = Parser("misc.report", __doc__)
    parser.flag("--output_root", type=Path, default="output", help="holds images/, students/, ...")
    parser.flag("--dataset", type=datasets.name, default="imagenet", metavar="NAME")
    parser.flag("--ipc", type=number(int, 1), default=10)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    root = args.output_root
    lines = ["", *accuracy_table(root, args.dataset, args.ipc), *time_table(root)]
    found = find_images(root, args.dataset, args.ipc)
    if found:
        draw_sets(found).savefig(root / "grid.png", dpi=100, metadata={"Software": None})
        lines.append(f"Picture ({' / '.join(found)}, one row per class): {root / 'grid.png'}")
    files.write(root / "report.md", "\n".join(lines).strip() + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
