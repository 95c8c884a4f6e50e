"""The paper's tables 1 to 6: every published number, and beside D4M's own what was measured here.

    python -m validate.paper_tables --list                           # the command of every D4M cell
    python -m validate.paper_tables --table 2 --output_root output   # the paper's beside ours
    python -m validate.paper_tables --format latex --output output/tables

A result fills a cell if it is what the cell's command makes: `DRY_RUN=1 sh validate/table2.sh` says
which images, networks and recipe that needs. What was not run stays blank; a result that fills no
cell is listed after the tables, with what differs from the nearest one.
"""

import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

from distillation import datasets
from matching import batches, evaluation, models, train_teacher
from scripts import files, generators, output
from scripts.runtime import Parser, entry_point, refuse
from validate import train_FKD

HERE = Path(__file__).parent
PAPER = files.read_json(HERE / "paper_numbers.json")
DATASET_TITLES, MODEL_TITLES = PAPER["datasets"], PAPER["models"]
# every published number; `make`: the variables that make a row of D4M's own
PAPER_ROWS = PAPER["rows"]


def table_of(row):
    return int(row["table"].removeprefix("Table "))


# ---- what a result needs, to fill a cell


@cache
def students(script, variables=()):
    """What stage 4 is asked to train by a script of this folder; variables: pairs."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "ONLY": "validate/train_FKD"}
    how = {"env": environment | dict(variables), "capture_output": True, "text": True}
    printed = subprocess.run(["sh", HERE / script], check=True, **how).stdout
    lines = [shlex.split(line) for line in printed.splitlines()]
    return [train_FKD.get_args(line[3:]) for line in lines if line[2] == "validate.train_FKD"]


def recipe(settings, hard):
    """{flag: value} of a training that a result has to show; hard labels have no temperature."""
    free = {"arch", "seeds", "fkd_seed", "eval_every", "online", "hard_label", "model"}
    free |= {"loss", "temperature", "ce_weight", "use_fp16"} if hard else set()
    given = {name: value for name, value in settings.items() if value is not None}
    wanted = {**batches.PROTOCOL, "use_fp16": True, **given}
    return {name: value for name, value in wanted.items() if name not in free}


def odd_values(found, wanted):
    """["epochs 3", ...]: what in the dict `found` is not as wanted."""
    return [f"{name} {found.get(name)}" for name, v in wanted.items() if found.get(name) != v]


def odd_in_teacher(arguments):
    """["epochs 3", ...]: what is not train_teacher's own recipe; None: weights of somebody else."""
    if arguments is None:
        return []
    dataset, arch = arguments["dataset"], arguments["arch"]
    own = train_teacher.get_args(["--dataset", dataset, "--arch", arch]).settings
    wanted = {**own, "bn_batch": own["batch_size"]}
    wanted |= {name: arguments[name] for name in ("seed", "eval_every")}  # any will do
    wanted["train_images"] = datasets.ALL[dataset].train_images
    return odd_values(arguments, wanted | {"val_images": PAPER["test_images"].get(dataset)})


def needs(row, checkpoint):
    """{"result", "random", "hard": {name: value}}: what fills a row of D4M's own accuracies.

    random, hard   as many random real images; the distilled images with hard labels
    """
    found, make = {}, row["make"]
    dataset, ipc, teacher = make["DATASET"], int(make["IPC"]), make["TEACHER"]
    classes = len(datasets.known_prompts(dataset))
    public = dataset == "imagenet"
    weights = f"torchvision {models.TEACHER_WEIGHTS[teacher]}" if public else "train_teacher"
    for args in students(f"table{table_of(row)}.sh", tuple(make.items())):
        name, hard = Path(args.train_dir).name, args.hard_label
        random = name == f"{dataset}_ipc{ipc}_random"
        source = "imagenet" if make["METHOD"] == "d4m-g" and not random else dataset
        arm, model = ("random", None) if random else (make["METHOD"], checkpoint)
        wanted = {"arm": arm, "generator": model, "images": name, "classes": classes}
        wanted |= {"count": ipc * classes, "real_images": datasets.ALL[source].train_images}
        wanted |= {"student": args.model, "labels": "hard" if hard else "soft"}
        if not hard:
            wanted |= {"teacher": [teacher], "weights": [weights], "teacher's": []}
            wanted |= {"labels' amp": "none", "labels' channels_last": False}
        wanted |= recipe(args.settings, hard) | {"test_images": PAPER["test_images"][dataset]}
        found["random" if random else "hard" if hard else "result"] = wanted
    return found


def recipe_name(dataset, ipc, student, hard, arguments):
    """Whose recipe this is, by the launchers: d4m (the data set's own), cda, rded ..., or None."""
    for path in sorted(HERE.glob("train_FKD*.sh")):
        shared = "DATASET=" in path.read_text()  # one for every data set
        chosen = (("DATASET", dataset), ("IPC", str(ipc)), ("STUDENT", student)) if shared else ()
        [args] = students(path.name, chosen)
        own = Path(args.train_dir).name.startswith(f"{dataset}_ipc")
        own = own and (hard or not args.hard_label)
        if own and not odd_values(arguments, recipe(args.settings, hard)):
            return path.stem.removeprefix("train_FKD_") if shared else "d4m"
    return None


# ---- results on disk


def _rows(root, row_of, of_students):
    """row_of(path, content) of every results.json below `root`, of students or of teachers."""
    rows = []
    for path in sorted(Path(root).rglob("results.json")):
        found = files.read_json(path)
        if isinstance(found, dict) and "arguments" in found and ("summary" in found) == of_students:
            try:
                rows.append(row_of(path, found))
            except (KeyError, TypeError, AttributeError) as error:
                refuse(f"{path}: not as its stage writes it: {type(error).__name__} {error}")
    return rows


def find_results(root):
    """Every student's result below `root` as one flat row, in the order of their paths."""
    rows, hashes = _rows(root, _student_row, of_students=True), {}
    for row in rows:
        hashes.setdefault(row["generator"], []).append(row["generator_sha256"])
    for row in rows:  # two models may go by one name: the one with most results keeps it
        own = hashes[row["generator"]]
        if row["generator_sha256"] != max(own, key=own.count):
            row["generator"] += " (another model of this name)"
    return rows


def _student_row(path, found):
    """last, best: {"mean", "std", "n", "values"} of top-1."""
    arguments, images, teachers = found["arguments"], found["images"], found["teacher"]
    hashes = [v for k, v in (images["generator"] or {}).items() if k.endswith("_sha256")]
    labels, hard = found["labels"] or {}, arguments["hard_label"]
    row = {"path": str(path), "arguments": arguments, "images": images["name"]}
    row |= {name: images[name] for name in ("arm", "ipc", "classes", "count", "real_images")}
    row |= {"dataset": arguments["dataset"], "student": arguments["model"]}
    row |= {"generator": generator_name(images["generator"]), "generator_sha256": hashes}
    row |= {"teacher": [t["arch"] for t in teachers], "weights": [t["weights"] for t in teachers]}
    row |= {"teacher's": [odd for t in teachers for odd in odd_in_teacher(t["arguments"])]}
    row |= {"labels": "hard" if hard else "soft", "labels' amp": labels.get("amp")}
    row |= {"labels' channels_last": labels.get("channels_last")}
    row |= {which: found["summary"][which]["top1"] for which in ("last", "best")}
    mine = row["dataset"], row["ipc"], row["student"], hard, arguments
    row["recipe"] = recipe_name(*mine) if row["ipc"] else None  # classes of different sizes
    return row


def generator_name(facts):
    """What tables call the model of some images: hub id or folder name, @ its revision; or None."""
    if not facts or facts["revision"] in (None, "main"):
        return facts and facts["model"]
    return f"{facts['model']}@{facts['revision']}"


def find_teachers(root):
    """{(dataset, arch): {"last", "best", "differs"}} of the teachers that were trained below.

    Those that differ in their seed alone are one entry. Of several recipes, the one nearest to the
    data set's own (`differs`: what is not its), then the one over most seeds.
    """
    recipes, chosen = {}, {}
    for network, differs, *top1 in _rows(root, _teacher_row, of_students=False):
        recipes.setdefault((network, differs), []).append(top1)
    for network, differs in sorted(recipes, key=lambda key: (len(key[1]), -len(recipes[key]))):
        last, best = map(evaluation.summary, zip(*recipes[network, differs]))
        chosen.setdefault(network, {"last": last, "best": best, "differs": list(differs)})
    return chosen


def _teacher_row(_, found):
    arguments, top1 = found["arguments"], [found[which]["top1"] for which in ("last", "best")]
    return (arguments["dataset"], arguments["arch"]), tuple(odd_in_teacher(arguments)), *top1


def find_costs(root, dataset, checkpoint):
    """{"one", "batch": {"seconds", "gib", "resumed"}}: of an image alone, and of 32 at a time.

    A run that was stopped leaves no line in the log: its images do not count.
    """
    costs = {}
    for key, batch in (("one", 1), ("batch", 32)):
        folders = sorted(Path(root).glob(f"cost/batch{batch}/images/{dataset}_ipc*_s*"))
        for folder in filter(output.is_complete, folders):
            manifest = output.read_manifest("--output_root", folder, "images")
            timing, inputs = files.read_json(folder / output.TIMING), manifest["inputs"]
            made, size = timing["units"], (inputs["prototype_arguments"] or {}).get("size")
            if made and (generator_name(inputs["generator"]), size) == (checkpoint, 512):
                gib = timing["cuda_mib"] / 1024 if "cuda_mib" in timing else None
                seconds, resumed = timing["process_seconds"] / made, made != manifest["count"]
                costs[key] = {"seconds": seconds, "gib": gib, "resumed": resumed}
    return costs


def measured(root, checkpoint):
    """The paper's rows with what was measured; the results that fill none, each with `why`: what
    differs from the nearest row. Of several that fit, the one over most students counts."""
    results, rows, used, why = find_results(root), [dict(row) for row in PAPER_ROWS], set(), {}
    teachers = [(k, found) for k, found in find_teachers(root).items() if not found["differs"]]
    full = {(DATASET_TITLES.get(d), MODEL_TITLES.get(arch)): found for (d, arch), found in teachers}
    for row in rows:
        if row["method"] == "Full dataset":
            row["result"] = full.get((row["dataset"], row["student"]))
        if "make" not in row:
            continue
        dataset = row["make"]["DATASET"]
        if table_of(row) == 6:
            row |= find_costs(root, dataset, checkpoint)
            continue
        mine = [r for r in results if r["dataset"] == dataset]
        for which, wanted in needs(row, checkpoint).items() if mine else ():
            fit = []
            for r in mine:
                odd = odd_values({**r["arguments"], **r}, wanted)
                why[r["path"]] = min(why.get(r["path"], odd), odd, key=len)
                fit += [] if odd else [r]
            row[which] = max(fit, key=lambda r: r["last"]["n"], default=None)
            used |= {row[which]["path"]} if fit else set()
    others = []
    for r in (r for r in results if r["path"] not in used):
        odd = why.get(r["path"], [f"dataset {r['dataset']}"])
        odd = odd or ["another result over as many students or more is shown"]
        others.append({**r, "teacher": "+".join(r["teacher"]), "result": r, "why": odd})
    return rows, others


# ---- tables


def number(*values, digits=1):
    """27.9, or 27.9 ± 0.3; None is left out."""
    return " ± ".join(f"{value:.{digits}f}" for value in values if value is not None)


def scores(result, which="last"):
    """Mean and sample std over the students of a result; blank where nothing was run."""
    if not result:
        return ""
    drawn = result.get("arguments", {}).get("vary_draws") and result[which]["n"] > 1
    return number(result[which]["mean"], result[which]["std"]) + " (draws too)" * bool(drawn)


def _count(row, which="result"):
    return str(row[which]["last"]["n"]) if row.get(which) else ""


def _baseline(row, which):
    """Its scores, and its number of students where that is not the row's."""
    n = _count(row, which)
    return scores(row.get(which)) + f" (n = {n})" * (n not in ("", _count(row)))


def _cost(row, key, what, digits):
    found = row.get(key, {})
    words = number(found.get(what), digits=digits)
    return words + "*" * bool(words and found["resumed"])


WORDS = {  # column -> what it shows of a row, where that is not the value of this name
    "data set": lambda r: DATASET_TITLES.get(r["dataset"], r["dataset"]),
    "IPC": lambda r: str(r.get("ipc") or ""),
    "teacher": lambda r: r.get("teacher", "").split(" (")[0],  # a note may follow
    "paper": lambda r: number(r["top1"], r.get("std")),
    "measured": lambda r: scores(r.get("result")),
    "best": lambda r: scores(r.get("result"), "best"),
    "n": _count,
    "random real": lambda r: _baseline(r, "random"),
    "hard labels": lambda r: _baseline(r, "hard"),
    "differs from the nearest cell in": lambda r: ", ".join(r["why"][:4]),
    "pixels": lambda r: str(r["resolution"]),
    "paper s/image": lambda r: number(r["sec_per_image"]),
    "measured s/image": lambda r: _cost(r, "one", "seconds", 2),
    "32 at a time": lambda r: _cost(r, "batch", "seconds", 2),
    "paper GB": lambda r: number(r["gpu_gb"]),
    "measured GB": lambda r: _cost(r, "one", "gib", 1),
    "GB of 32": lambda r: _cost(r, "batch", "gib", 1),
}
NOTE = (
    "Top-1 in percent. measured: last epoch, mean ± sample standard deviation over the initial "
    "weights of n students, which share crops, order and CutMix; best: best epoch on the test set. "
    "random real: as many real images per class, same teacher and recipe; hard labels: the same "
    "images with their class index. Blank: not run."
)
COST_NOTE = (
    "Seconds and peak GPU memory of stage 2, one image at a time as the paper, and 32 at a time. "
    "*: made in several runs; of the images of those that ended by themselves. Blank: not run."
)
ACCURACY = "data set, IPC, method, teacher, student, paper, measured, best, n, random real, "
ACCURACY += "hard labels"
OTHERS = "data set, IPC, images, generator, teacher, student, labels, measured, best, n, "
OTHERS += "differs from the nearest cell in"
COST = "data set, method, pixels, paper s/image, measured s/image, 32 at a time, paper GB, "
COST += "measured GB, GB of 32"


def as_words(columns, rows):
    """[titles, then the words of each row], without columns in which no row has a word."""
    grid, optional = [], ("IPC", "teacher", "student", "generator")
    for title in columns.split(", "):
        words = [WORDS[title](row) if title in WORDS else row.get(title) or "" for row in rows]
        if title not in optional or any(words):
            grid.append([title, *words])
    return list(zip(*grid))


def markdown(title, note, columns, rows):
    head, *lines = as_words(columns, rows)
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    lines = [head, ["-" * width for width in widths], *lines]
    lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    return "\n".join([f"### {title}\n", *lines, f"\n{note}\n"])


def latex(title, note, columns, rows):
    """A table with booktabs."""

    def escaped(text):
        return re.sub("([%&_#$])", r"\\\1", text).replace(" ± ", r" $\pm$ ")

    grid = as_words(columns, rows)
    head, *lines = [" & ".join(map(escaped, line)) + r" \\" for line in grid]
    begin = ["% \\usepackage{booktabs}", r"\begin{table}[t]", r"\centering\small"]
    begin += [rf"\caption{{{escaped(f'{title}. {note}')}}}"]
    begin += [rf"\begin{{tabular}}{{{'l' * len(grid[0])}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*begin, *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def as_json(title, note, _, rows):
    """The same rows with every value in full."""
    return files.json_text({"title": title, "note": note, "rows": rows})


FORMATS = {"markdown": (markdown, "md"), "latex": (latex, "tex"), "json": (as_json, "json")}


# ---- main


def get_args(argv=None):
    parser = Parser("validate.paper_tables", __doc__)
    tables = {"nargs": "+", "choices": range(1, 7), "default": range(1, 7), "metavar": "N"}
    parser.flag("--table", type=int, help="which of the six [all]", **tables)
    parser.flag("--dataset", type=datasets.name, metavar="NAME", help="only rows of this data set")
    parser.flag("--list", action="store_true", help="print the command of every D4M cell, and stop")
    parser.flag("--output_root", default="output", help="where stage 4's results.json are")
    model = "whose images count; results with others are listed apart"
    parser.flag("--diffusion_checkpoints_path", default=generators.DEFAULT_CHECKPOINT, help=model)
    parser.flag("--format", choices=list(FORMATS), default="markdown")
    parser.flag("--output", metavar="DIR", help="write DIR/table1.md ... instead of printing them")
    return parser.parse_args(argv)


def list_cells(tables, dataset):
    """Print the command of each of the paper's D4M numbers, with the number as a comment."""
    for row in (row for row in PAPER_ROWS if "make" in row):
        make, n = row["make"], table_of(row)
        value = number(row.get("top1", row.get("sec_per_image")), row.get("std"))
        if value and n in tables and dataset in (None, make["DATASET"]):
            variables = " ".join("=".join(pair) for pair in make.items())
            print(f"{variables} sh validate/table{n}.sh  # table {n}, paper {value}")


@entry_point
def main(argv=None):
    args = get_args(argv)
    if args.list:
        return list_cells(args.table, args.dataset)
    root, model = Path(args.output_root), Path(args.diffusion_checkpoints_path)
    if not root.is_dir():
        refuse(f"--output_root {root}: no such folder")
    checkpoint = model.name if model.exists() else str(model)
    by = "" if checkpoint == generators.DEFAULT_CHECKPOINT else f". Images by {checkpoint}"
    rows, others = measured(root, checkpoint)
    tables = []
    for n in args.table:
        title, form = f"Table {n}: {PAPER['tables'][str(n)]}{by}", (NOTE, ACCURACY)
        form = (COST_NOTE, COST) if n == 6 else form
        tables.append((f"table{n}", title, *form, [row for row in rows if table_of(row) == n]))
    tables.append(("other_results", "Other results: no cell shows them", NOTE, OTHERS, others))
    render, suffix = FORMATS[args.format]
    chosen = [args.dataset, DATASET_TITLES.get(args.dataset)]
    for name, *form, found in tables:
        found = [row for row in found if not args.dataset or row["dataset"] in chosen]
        if found and args.output:
            path = Path(args.output) / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, render(*form, found))
        if found:
            print(path if args.output else render(*form, found))


if __name__ == "__main__":
    main()
