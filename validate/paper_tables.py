"""The paper's tables 1 to 6: every published number, and beside D4M's own the one that was measured here.

    python -m validate.paper_tables --list                                  # the command that produces each D4M cell
    python -m validate.paper_tables --table 2 --output_root output          # paper beside measured, as markdown
    python -m validate.paper_tables --format latex --output output/tables

Reads `paper_numbers.json` and the results.json files below the output root. A result belongs to a cell if data set,
images (by the name that their flags give them), teacher, student and recipe are the cell's; nothing else is ever
filled in, and what was not run stays blank. The headline is the last epoch; the best epoch, chosen on the test set, is
shown beside it.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m validate.paper_tables", file=sys.stderr)
    sys.exit(2)

import json
from pathlib import Path
from typing import NamedTuple

from distillation.datasets import dataset_name
from matching.models import TEACHER_WEIGHTS
from scripts.files import read_json, write_text
from scripts.runtime import Parser, refuse

NUMBERS = Path(__file__).with_name("paper_numbers.json")
TABLES = (1, 2, 3, 4, 5, 6)
DATASET_TITLES = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet-1K", "tiny_imagenet": "Tiny-ImageNet",
}  # fmt: skip
MODEL_TITLES = {
    "convnet_w128": "ConvNet-W128", "resnet18": "ResNet-18", "resnet50": "ResNet-50", "resnet101": "ResNet-101",
    "mobilenet_v2": "MobileNet-V2", "efficientnet_b0": "EfficientNet-B0", "swin_t": "Swin-T", "vit_b_16": "ViT-B",
}  # fmt: skip
# the paper's row labels -> what our images are called; the two rows without prototypes are one label in the paper
METHODS = {
    "D4M": "d4m",
    "D4M-G": "d4m-g",
    "D4M w/o STM (=D4M)": "d4m",
    "D4M w/ STM (BN matching with R18)": "stm",
    "D4M w/ prototype": "d4m",
    "D4M w/o prototype (random init)": "noise",
}
TITLES = {
    1: "CIFAR-10/100",
    2: "ImageNet-1K and Tiny-ImageNet",
    3: "synthesis-time matching (STM)",
    4: "with and without prototypes",
    5: "across architectures, IPC 50",
    6: "cost of an image",
}


class Cell(NamedTuple):
    """One number of the paper's that is D4M's own.

    arm      d4m, d4m-g, stm, noise, or text (table 4's true text-to-image, which the paper does not report)
    paper    its row of paper_numbers.json
    """

    table: int
    dataset: str
    ipc: int | None
    arm: str
    teacher: str | None
    student: str | None
    paper: dict

    @property
    def command(self):
        """What produces it, from the repository root."""
        words = ["sh", f"validate/table{self.table}.sh", "--dataset", self.dataset]
        if self.table == 6:
            return " ".join(words)
        words += ["--ipc", str(self.ipc), "--method", self.arm, "--teacher", self.teacher, "--student", self.student]
        return " ".join(words)


def paper_rows():
    return json.loads(NUMBERS.read_text(encoding="utf-8"))


def _key(title, titles):
    """'ConvNet-W128 (issue #7)' -> 'convnet_w128'"""
    plain = title.split(" (")[0]
    return next(key for key, value in titles.items() if value == plain)


def cell_of(row):
    """The Cell of a row of paper_numbers.json, or None for another method's."""
    if row["method"] not in METHODS:
        return None
    return Cell(
        int(row["table"].split()[1]),
        _key(row["dataset"], DATASET_TITLES),
        row.get("ipc"),
        METHODS[row["method"]],
        _key(row["teacher"], MODEL_TITLES) if "teacher" in row else None,
        _key(row["student"], MODEL_TITLES) if "student" in row else None,
        row,
    )


def paper_cells(table=None):
    """Every D4M cell of the paper, in its order."""
    cells = [cell for cell in map(cell_of, paper_rows()) if cell]
    return [cell for cell in cells if table in (None, cell.table)]


# ---- what the images of a cell are called


def images_name(dataset, ipc, arm):
    """The image folder that stages 1-2 make for an arm with the paper's flags."""
    d4m = f"{dataset}_ipc{ipc}_s0.7_g8_kmexpand1"
    if arm == "d4m-g":
        return f"{dataset}_ipc{ipc}_from_" + images_name("imagenet", ipc, "d4m")
    return {"d4m": d4m, "stm": f"{d4m}_stm"}.get(arm, f"{dataset}_ipc{ipc}_{arm}")


# ---- recipes: which values of results.json make one

_D4M = {
    "epochs": 300, "batch_size": 1024, "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.01, "schedule": "cosine",
    "cos_stretch": 1.0, "warmup_epochs": 0, "loss": "kl", "temperature": 20.0, "min_scale_crops": 0.08,
    "max_scale_crops": 1.0, "mix_type": "cutmix", "cutmix": 1.0, "ema": 0.0, "bn_refresh": False,
}  # fmt: skip
RDED_LR = {
    "resnet18": 1e-3, "resnet50": 1e-3, "resnet101": 1e-3, "efficientnet_b0": 2e-3, "mobilenet_v2": 2.5e-3,
    "vgg11": 5e-4, "swin_t": 1e-4, "vit_b_16": 1e-4,
}  # fmt: skip
_RDED = {**_D4M, "min_scale_crops": 0.5, "cos_stretch": 2.0, "bn_refresh": True}
RECIPES = {
    "d4m": _D4M,
    "d4m-cifar": {**_D4M, "epochs": 500, "batch_size": 100},
    "cda": {**_D4M, "batch_size": 128},
    "rded": {k: v for k, v in _RDED.items() if k not in ("batch_size", "lr")},
    "rd3": {**{k: v for k, v in _RDED.items() if k != "cos_stretch"}, "epochs": 400, "batch_size": 50},
    "edc": {
        **{k: v for k, v in _RDED.items() if k != "temperature"}, "batch_size": 100, "loss": "mse_ce",
        "ce_weight": 0.025, "ema": 0.99, "bn_refresh": False,
    },
    "minimax-hard": {
        "batch_size": 64, "optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4, "schedule": "step", "step_factor": 0.2,
        "loss": "ce", "mix_type": "cutmix",
    },
}  # fmt: skip
OF_SOFT_LABELS = {"loss", "temperature", "ce_weight"}  # hard labels have no say in these


def recipe_name(arguments):
    """The recipe whose every value is in `arguments` of a results.json; None if it is none of them."""
    hard = arguments["labels"] == "hard"
    for name, values in RECIPES.items():
        wanted = {k: v for k, v in values.items() if not (hard and k in OF_SOFT_LABELS and name != "minimax-hard")}
        if (hard or name != "minimax-hard") and all(arguments.get(k) == v for k, v in wanted.items()):
            return name
    return None


def paper_recipe(dataset):
    """The recipe of the tables: the paper's; for CIFAR, where it is silent, DD-Ranking's settings."""
    return "d4m-cifar" if dataset.startswith("cifar") else "d4m"


# ---- results


def read_result(path):
    """A results.json of stage 4 as one flat row, or None for another file of that name.

    last, best   {"mean", "std", "n", "values"} of top-1;   made_by: folders whose timing.json says what its images
                 cost
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {"arguments", "images", "summary", "seeds"} <= set(found):
        return None
    arguments, images = found["arguments"], found["images"]
    root = path.parent.parent.parent
    d4m = images["name"].split("_from_")[-1].removesuffix("_stm")
    made_by = [root / "images" / images["name"]]
    if images["arm"] != "random":
        made_by.append(root / "prototypes" / _prototypes_name(d4m))
    return {
        "path": str(path),
        "dataset": arguments["dataset"],
        "ipc": images["ipc"],
        "arm": images["arm"],
        "images": images["name"],
        "teacher": [t["arch"] for t in found["teacher"]],
        "weights": [t["weights"] for t in found["teacher"]],
        "classes": images.get("classes"),
        "count": images.get("count"),
        "student": arguments["model"],
        "labels": "hard" if arguments["labels"] == "hard" else "soft",
        "recipe": recipe_name(arguments),
        "arguments": arguments,
        "last": found["summary"]["last"]["top1"],
        "best": found["summary"]["best"]["top1"],
        "made_by": made_by,
    }


def _prototypes_name(images):
    """imagenet_ipc10_s0.7_g8_kmexpand1 -> imagenet-ipc10-kmexpand1"""
    dataset, _, rest = images.partition("_ipc")
    ipc = rest.split("_")[0]
    expand = rest.rsplit("kmexpand", 1)[1] if "kmexpand" in rest else "1"
    return f"{dataset}-ipc{ipc}-kmexpand{expand}"


def find_results(root):
    """Every student's result below `root`, in the order of their paths."""
    rows = [read_result(path) for path in sorted(Path(root).rglob("results.json"))]
    return [row for row in rows if row]


def find_teachers(root):
    """{(dataset, arch): top-1} of the teachers that were trained below `root`."""
    teachers = {}
    for path in sorted(Path(root).rglob("results.json")):
        found = read_json(path)
        if isinstance(found, dict) and "parameters" in found and "arch" in found.get("arguments", {}):
            a = found["arguments"]
            if a.get("classes") is None and not a.get("max_images_per_class"):
                teachers[a["dataset"], a["arch"]] = found["last"]["top1"]
    return teachers


CLASSES = {"imagenet": 1000, "tiny_imagenet": 200, "cifar10": 10, "cifar100": 100}


def paper_weights(cell):
    """What results.json calls the weights of a cell's teacher: torchvision's pinned ones, else ours."""
    return f"torchvision {TEACHER_WEIGHTS[cell.teacher]}" if cell.dataset == "imagenet" else "train_teacher"


def match(cell, results, arm=None, labels="soft"):
    """The result of a cell (or of its baseline: `arm` and `labels`), or None. Of several the one over most seeds."""
    arm = arm or cell.arm
    name = images_name(cell.dataset, cell.ipc, arm)
    found = [
        row
        for row in results
        if row["dataset"] == cell.dataset
        and row["images"] == name
        and row["arm"] == arm
        and row["student"] == cell.student
        and row["labels"] == labels
        and (labels == "hard" or (row["teacher"] == [cell.teacher] and row["weights"] == [paper_weights(cell)]))
        and row["recipe"] == paper_recipe(cell.dataset)
        and row["arguments"].get("amp") == "none"
        and row["classes"] == CLASSES[cell.dataset]
        and row["count"] == cell.ipc * CLASSES[cell.dataset]
    ]
    return max(found, key=lambda row: row["last"]["n"], default=None)


def match_all(cell, results):
    """{"result", "random", "hard"} of a cell."""
    return {
        "result": match(cell, results),
        "random": match(cell, results, arm="random"),
        "hard": match(cell, results, labels="hard"),
    }


def measure_cost(folder):
    """{"sec_per_image", "gpu_gb" or None, "count"} of an image folder that was made in one go; else None."""
    folder = Path(folder)
    if not ((folder / "timing.json").is_file() and (folder / "manifest.json").is_file()):
        return None
    timing, count = read_json(folder / "timing.json"), read_json(folder / "manifest.json")["count"]
    if timing["units"] != count:
        return None  # a resumed folder's batches were made twice
    gpu = timing["cuda_mib"] / 1024 if "cuda_mib" in timing else None
    return {"sec_per_image": timing["process_seconds"] / count, "gpu_gb": gpu, "count": count}


def find_costs(root, dataset):
    """{"one": measure with one image at a time, "batch": with 32} of table 6's runs below `root`."""
    names = {"one": "batch1", "batch": "batch32"}
    return {
        key: next(
            filter(
                None, map(measure_cost, sorted((Path(root) / "cost" / name / "images").glob(f"{dataset}_ipc*_s*")))
            ),
            None,
        )
        for key, name in names.items()
    }


# ---- tables


def table_rows(table, measure, teachers=None, costs=None):
    """The rows of a table as dicts, the paper's and ours side by side.

    measure    cell -> {"result", "random", "hard"};   teachers {(dataset, arch): top-1};   costs: dataset ->
               find_costs
    """
    rows = []
    for paper in paper_rows():
        if paper["table"] != f"Table {table}":
            continue
        cell = cell_of(paper)
        row = {"dataset": paper["dataset"], "ipc": paper.get("ipc"), "method": paper["method"]}
        row |= {"teacher": paper.get("teacher"), "student": paper.get("student"), "ours": cell is not None}
        if table == 6:
            found = costs(cell.dataset) if cell and costs else {"one": None, "batch": None}
            row |= {"resolution": paper["resolution"], "paper": paper["sec_per_image"], "paper_gb": paper["gpu_gb"]}
            rows.append(row | found)
            continue
        row |= {"paper": paper["top1"], "paper_std": paper.get("std")}
        if paper["method"] == "Full dataset" and teachers:
            top1 = teachers.get((_key(paper["dataset"], DATASET_TITLES), _key(paper["student"], MODEL_TITLES)))
            row["result"] = top1 and {"last": {"mean": top1, "std": None, "n": 1}, "best": None}
        rows.append(row | (measure(cell) if cell else {}))
        if cell and cell.arm == "noise":  # the paper has one row without prototypes, a fair run has two
            rows[-1]["method"] += ": noise from t = 0.7 T"
            text = cell._replace(arm="text")
            rows.append({**row, "method": "D4M w/o prototype: text-to-image", "paper": None, **measure(text)})
    return rows


def number(value, std=None, digits=1):
    """27.9, or 27.9 ± 0.3; blank for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def scores(result, which="last"):
    """Mean and sample std over the seeds of a result; blank where nothing was run."""
    found = result and result.get(which)
    return number(found["mean"], found["std"]) if found else ""


COLUMNS = {
    "data set": lambda r: r["dataset"],
    "IPC": lambda r: str(r["ipc"] or ""),
    "method": lambda r: r["method"],
    "teacher": lambda r: (r["teacher"] or "").split(" (")[0],
    "student": lambda r: r["student"] or "",
    "paper": lambda r: number(r["paper"], r["paper_std"]),
    "measured": lambda r: scores(r.get("result")),
    "best": lambda r: scores(r.get("result"), "best"),
    "n": lambda r: str(r["result"]["last"]["n"]) if r.get("result") else "",
    "random real": lambda r: scores(r.get("random")),
    "hard labels": lambda r: scores(r.get("hard")),
}


def _cost(key, what, digits):
    return lambda r: number(r[key] and r[key][what], digits=digits)


COST_COLUMNS = {
    "data set": lambda r: r["dataset"],
    "method": lambda r: r["method"],
    "pixels": lambda r: str(r["resolution"]),
    "paper s/image": lambda r: number(r["paper"]),
    "measured s/image": _cost("one", "sec_per_image", 2),
    "measured, batch 32": _cost("batch", "sec_per_image", 2),
    "paper GB": lambda r: number(r["paper_gb"]),
    "measured GB": _cost("one", "gpu_gb", 1),
    "batch 32 GB": _cost("batch", "gpu_gb", 1),
}


def columns_of(table, rows):
    """{title: function}, without teacher, student or IPC where no row has one."""
    columns = dict(COST_COLUMNS if table == 6 else COLUMNS)
    for title in ("teacher", "student", "IPC"):
        if title in columns and not any(columns[title](row) for row in rows):
            del columns[title]
    return columns


NOTES = (
    "Top-1 in percent, mean ± sample standard deviation over n students; measured: last epoch, best: best epoch on "
    "the test set. random real: as many real images a class, same teacher and recipe; hard labels: the same images "
    "with their class index. Blank: not run."
)
COST_NOTES = "Seconds and peak GPU memory of stage 2, one image at a time as the paper, and 32. Blank: not run."


def markdown(table, rows, title=None):
    columns = columns_of(table, rows)
    lines = [f"### {title or f'Table {table}: {TITLES[table]}'}", ""]
    grid = [list(columns), *[[f(row) for f in columns.values()] for row in rows]]
    widths = [max(len(line[c]) for line in grid) for c in range(len(columns))]
    for n, line in enumerate(grid):
        lines.append("| " + " | ".join(word.ljust(width) for word, width in zip(line, widths)) + " |")
        if n == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, "", COST_NOTES if table == 6 else NOTES, ""])


def latex(table, rows, title=None):
    """A table with booktabs; a rule between data sets and numbers of images a class, D4M's own rows in bold."""
    columns = columns_of(table, rows)
    align = "".join("l" if name in ("data set", "method", "teacher", "student") else "r" for name in columns)
    heading = title or f"Table {table}: {TITLES[table]}"
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}[t]",
        "\\centering\\small",
        f"\\caption{{{_escape(heading)}. {_escape(COST_NOTES if table == 6 else NOTES)}}}",
        f"\\begin{{tabular}}{{{align}}}",
        "\\toprule",
        " & ".join(_escape(name) for name in columns) + " \\\\",
        "\\midrule",
    ]
    before = None
    for row in rows:
        group = row["dataset"], row["ipc"]
        if before not in (None, group):
            lines.append("\\midrule")
        before = group
        words = [_escape(f(row)) for f in columns.values()]
        if row["ours"]:
            words = [f"\\textbf{{{w}}}" if name == "method" else w for name, w in zip(columns, words)]
        lines.append(" & ".join(words) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _escape(text):
    text = "".join(f"\\{c}" if c in "%&_#$" else c for c in text)
    return text.replace(" ± ", " $\\pm$ ").replace("→", "$\\rightarrow$")


def as_json(table, rows, title=None):
    """The same rows with every value in full."""

    def plain(value):
        if isinstance(value, dict) and "path" in value:
            return {k: value[k] for k in ("path", "last", "best", "recipe", "images", "teacher", "student")}
        return value

    rows = [{k: plain(v) for k, v in row.items()} for row in rows]
    head = {"table": table, "title": title or TITLES[table]}
    return json.dumps({**head, "rows": rows}, indent=1, ensure_ascii=False, default=str) + "\n"


FORMATS = {"markdown": (markdown, "md"), "latex": (latex, "tex"), "json": (as_json, "json")}


# ---- main


def get_args(argv=None):
    parser = Parser(prog="validate.paper_tables", description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=int, nargs="+", choices=TABLES, default=list(TABLES), help="which tables")
    parser.add_argument("--dataset", type=dataset_name, default=None, help="only rows of this data set")
    parser.add_argument(
        "--list", action="store_true", help="print the command of every D4M cell, one a line, and stop"
    )
    parser.add_argument("--output_root", default="output", help="results.json files are looked for below it")
    parser.add_argument("--format", choices=list(FORMATS), default="markdown")
    parser.add_argument(
        "--output", default=None, metavar="DIR", help="write DIR/table1.md ... instead of printing them"
    )
    return parser.parse_args(argv)


def list_cells(tables, dataset=None):
    """One line a D4M cell: the command, and the paper's number as a comment."""
    lines = []
    for cell in paper_cells():
        if cell.table in tables and dataset in (None, cell.dataset):
            paper = cell.paper
            value = number(paper.get("top1"), paper.get("std")) if cell.table != 6 else f"{paper['sec_per_image']} s"
            lines.append(f"{cell.command}  # table {cell.table}, paper {value}")
    return lines


def main(argv=None):
    args = get_args(argv)
    if args.list:
        print("\n".join(list_cells(args.table, args.dataset)))
        return
    if not Path(args.output_root).is_dir():
        refuse(f"--output_root {args.output_root}: no such folder")
    results, teachers = find_results(args.output_root), find_teachers(args.output_root)
    render, suffix = FORMATS[args.format]
    for table in args.table:
        rows = table_rows(
            table,
            lambda cell: match_all(cell, results),
            teachers,
            lambda dataset: find_costs(args.output_root, dataset),
        )
        if args.dataset:
            rows = [row for row in rows if row["dataset"] == DATASET_TITLES.get(args.dataset)]
        if not rows:
            continue
        text = render(table, rows)
        if args.output:
            Path(args.output).mkdir(parents=True, exist_ok=True)
            path = Path(args.output) / f"table{table}.{suffix}"
            write_text(path, text)
            print(path)
        else:
            print(text)


if __name__ == "__main__":
    main()
