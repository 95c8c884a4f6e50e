"""The paper's tables 1 to 6: every published number, and beside D4M's own what was measured here.

    python -m validate.paper_tables --list                           # the command of every D4M cell
    python -m validate.paper_tables --table 2 --output_root output   # the paper's beside ours
    python -m validate.paper_tables --format latex --output output/tables

A result fills a cell if it is what the cell's command makes: `DRY_RUN=1 sh validate/table2.sh` says
which images, networks and recipe that needs. What was not run stays blank; a result that fills no
cell is listed after the tables, with what differs from the nearest one. The headline is the last
epoch; the best epoch, chosen on the test set, stands beside it.
"""

import os
import shlex
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

from distillation import datasets
from matching import batches, models, train_teacher, training
from scripts import files, generators, output
from scripts.runtime import Parser, entry_point, refuse
from validate import train_FKD

HERE = Path(__file__).parent
PAPER = files.read_json(HERE / "paper_numbers.json")
DATASET_TITLES, MODEL_TITLES = PAPER["datasets"], PAPER["models"]
WHICH = ("result", "random", "hard")  # D4M's number, and the two that stand beside it


def paper_rows():
    """Every published number, as a dict. `make`: the variables that make a row of D4M's own.

    Table 4 has text-to-image as well, which the paper does not report and a fair run needs.
    """
    return PAPER["rows"]


def table_of(row):
    return int(row["table"].removeprefix("Table "))


def cells():
    """The rows of D4M's own accuracies."""
    return [row for row in paper_rows() if "make" in row and table_of(row) != 6]


# ---- what a result needs, to fill a cell


@cache
def students(script, variables=()):
    """What stage 4 would be asked to train by a script of this folder; variables: pairs."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "ONLY": "validate/train_FKD"}
    environment |= dict(variables)
    run = subprocess.run(["sh", HERE / script], env=environment, capture_output=True, check=True)
    lines = [shlex.split(line) for line in run.stdout.decode().splitlines()]
    return [train_FKD.get_args(line[3:]) for line in lines if line[2] == "validate.train_FKD"]


def recipe(args, hard):
    """{flag: value} of a training that a result has to show; hard labels have no temperature."""
    given = {name: value for name, value in args.settings.items() if value is not None}
    free = {"arch", "seeds", "fkd_seed", "eval_every", "online", "hard_label", "model"}
    free |= {"loss", "temperature", "ce_weight", "use_fp16"} if hard else set()
    wanted = batches.PROTOCOL | {"use_fp16": True} | given
    return {name: value for name, value in wanted.items() if name not in free}


def odd_values(found, wanted):
    """["epochs 3", ...]: what in the dict `found` is not as wanted."""
    odd = [name for name, value in wanted.items() if found.get(name) != value]
    return [f"{name} {found.get(name)}" for name in odd]


def odd_in_teacher(arguments):
    """["epochs 3", ...]: what is not train_teacher's own recipe; None: weights of somebody else."""
    if arguments is None:
        return []
    dataset, arch = arguments["dataset"], arguments["arch"]
    counts = {"train_images": datasets.ALL[dataset].train_images}
    counts["val_images"] = PAPER["test_images"].get(dataset)
    settings = train_teacher.get_args(["--dataset", dataset, "--arch", arch]).settings
    wanted = {**settings, "bn_batch": settings["batch_size"], "seed": arguments["seed"]}
    wanted |= {"eval_every": arguments["eval_every"]} | {k: n for k, n in counts.items() if n}
    return odd_values(arguments, wanted)


@cache
def needs(table, variables, checkpoint):
    """{"result", "random", "hard": (facts, recipe)} of the three results of a cell."""
    found, make = {}, dict(variables)
    dataset, ipc = make["DATASET"], int(make["IPC"])
    classes = len(datasets.known_prompts(dataset))
    for args in students(f"table{table}.sh", variables):
        name, hard = Path(args.train_dir).name, args.hard_label
        random = name == f"{dataset}_ipc{ipc}_random"
        source = "imagenet" if make["METHOD"] == "d4m-g" and not random else dataset
        facts = {
            "arm": "random" if random else make["METHOD"],
            "generator": None if random else checkpoint,
            "images": name,
            "classes": classes,
            "count": ipc * classes,
            "real_images": datasets.ALL[source].train_images,
            "student": args.model,
            "labels": "hard" if hard else "soft",
        }
        if not hard:
            public = f"torchvision {models.TEACHER_WEIGHTS.get(make['TEACHER'])}"
            weights = public if dataset == "imagenet" else "train_teacher"
            facts |= {"teacher": [make["TEACHER"]], "weights": [weights], "teacher's": []}
            facts |= {"labels' amp": "none", "labels' channels_last": False}
        wanted = recipe(args, hard) | {"test_images": PAPER["test_images"][dataset]}
        found["random" if random else "hard" if hard else "result"] = facts, wanted
    return found


def differences(cell, result, which, checkpoint):
    """Why a result is not the number of a cell, or of its baseline `which`; [] if it is."""
    variables = tuple(cell["make"].items())
    if cell["make"]["DATASET"] != result["dataset"]:
        return [f"dataset {result['dataset']}"]
    facts, wanted = needs(table_of(cell), variables, checkpoint)[which]
    return odd_values(result, facts) + odd_values(result["arguments"], wanted)


def recipe_name(dataset, ipc, student, hard, arguments):
    """Whose recipe this is, by the launchers: d4m (the data set's own), cda, rded ..., or None."""
    for path in sorted(HERE.glob("train_FKD*.sh")):
        shared = "DATASET=" in path.read_text()  # one for every data set
        chosen = (("DATASET", dataset), ("IPC", str(ipc)), ("STUDENT", student)) if shared else ()
        [args] = students(path.name, chosen)
        own = Path(args.train_dir).name.startswith(f"{dataset}_ipc") and hard >= args.hard_label
        if own and not odd_values(arguments, recipe(args, hard)):
            return path.stem.removeprefix("train_FKD_") if shared else "d4m"
    return None


# ---- results on disk


def _read(root):
    """(path, content) of the results.json files below `root`, of students and of teachers."""
    for path in sorted(Path(root).rglob("results.json")):
        found = files.read_json(path)
        if isinstance(found, dict) and "arguments" in found:
            yield path, found


def find_results(root):
    """Every student's result below `root` as one flat row, in the order of their paths."""
    rows = [_row(path, found) for path, found in _read(root) if "summary" in found]
    # two models may go by one name: the one with most results keeps it
    for name in {row["generator"] for row in rows} - {None}:
        own = [row for row in rows if row["generator"] == name]
        [(most, _), *_] = Counter(tuple(row["generator_sha256"]) for row in own).most_common()
        for row in own:
            if tuple(row["generator_sha256"]) != most:
                row["generator"] = f"{name} (another model of this name)"
    return rows


def _row(path, found):
    """last, best: {"mean", "std", "n", "values"} of top-1;   generator: see generator_name."""
    try:
        arguments, images, teachers = found["arguments"], found["images"], found["teacher"]
        labels, made_by, hard = found["labels"] or {}, images["generator"], arguments["hard_label"]
        dataset, ipc, student = arguments["dataset"], images["ipc"], arguments["model"]
        return {
            "path": str(path),
            "arguments": arguments,
            "dataset": dataset,
            "ipc": ipc,
            **{name: images[name] for name in ("arm", "classes", "count", "real_images")},
            "images": images["name"],
            "generator": generator_name(made_by),
            "generator_sha256": [v for k, v in (made_by or {}).items() if k.endswith("_sha256")],
            "teacher": [teacher["arch"] for teacher in teachers],
            "weights": [teacher["weights"] for teacher in teachers],
            "teacher's": [odd for t in teachers for odd in odd_in_teacher(t["arguments"])],
            "student": student,
            "recipe": recipe_name(dataset, ipc or 0, student, hard, arguments),
            "labels": "hard" if hard else "soft",
            "labels' amp": labels.get("amp"),
            "labels' channels_last": labels.get("channels_last"),
            "last": found["summary"]["last"]["top1"],
            "best": found["summary"]["best"]["top1"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        refuse(f"{path}: not as stage 4 writes it: {type(error).__name__} {error}")


def generator_name(facts):
    """What tables call the model of some images: hub id or folder name, @ its revision; or None."""
    if facts is None:
        return None
    revision = facts["revision"]
    return facts["model"] + ("" if revision in (None, "main") else f"@{revision}")


def find_teachers(root):
    """{(dataset, arch): {"last", "best", "differs"}} of the teachers that were trained below.

    Those that differ in their seed alone are one entry. Of several recipes, the one nearest to the
    data set's own (`differs`: what is not its), then the one over most seeds.
    """
    groups, best = {}, {}
    for path, found in _read(root):
        if "summary" in found:
            continue
        try:
            made, odd = dict(found["arguments"]), odd_in_teacher(found["arguments"])
            key = files.digest_of({**made, "seed": None, "eval_every": None})
            group = groups.setdefault(key, (odd, (made["dataset"], made["arch"]), []))
        except (KeyError, TypeError, AttributeError) as error:
            refuse(f"{path}: not as train_teacher writes it: {type(error).__name__} {error}")
        group[2].append(found)
    for odd, name, found in sorted(groups.values(), key=lambda g: (len(g[0]), -len(g[2]))):
        top1 = {w: training.summary([f[w]["top1"] for f in found]) for w in ("last", "best")}
        best.setdefault(name, {**top1, "differs": odd})
    return best


def match_all(cell, results, checkpoint):
    """{"result", "random", "hard"} of a cell: the result over most students that fits, or None."""
    found = {}
    for which in WHICH:
        fit = [result for result in results if not differences(cell, result, which, checkpoint)]
        found[which] = max(fit, key=lambda result: result["last"]["n"], default=None)
    return found


def other_results(results, checkpoint):
    """The results that fill no cell, each with `why`: what differs from the nearest."""
    shown = {id(r) for cell in cells() for r in match_all(cell, results, checkpoint).values()}
    rows = []
    for result in results:
        if id(result) not in shown:
            every = [differences(c, result, w, checkpoint) for c in cells() for w in WHICH]
            near = [odd for odd in every if odd[:1] != [f"dataset {result['dataset']}"]] or every
            why = min(near, key=len) or ["another result over as many students or more is shown"]
            rows.append({**result, "result": result, "why": why})
    return rows


def find_costs(root, dataset, checkpoint):
    """{"one", "batch": {"seconds", "gib", "resumed"} or None}: of an image alone, and of 32.

    A run that was stopped leaves no line in the log: its images do not count.
    """
    costs = {"one": None, "batch": None}
    for key, batch in (("one", 1), ("batch", 32)):
        for folder in sorted(Path(root).glob(f"cost/batch{batch}/images/{dataset}_ipc*_s*")):
            if not output.is_complete(folder):
                continue
            manifest = output.read_manifest("--output_root", folder, "images")
            timing, inputs = files.read_json(folder / output.TIMING), manifest["inputs"]
            made, size = timing["units"], (inputs["prototype_arguments"] or {}).get("size")
            if made and (generator_name(inputs["generator"]), size) == (checkpoint, 512):
                gib = timing["cuda_mib"] / 1024 if "cuda_mib" in timing else None
                seconds, resumed = timing["process_seconds"] / made, made != manifest["count"]
                costs[key] = {"seconds": seconds, "gib": gib, "resumed": resumed}
    return costs


# ---- tables


def number(value, std=None, digits=1):
    """27.9, or 27.9 ± 0.3; blank for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def scores(result, which="last"):
    """Mean and sample std over the students of a result; blank where nothing was run."""
    found = result and result.get(which)
    return number(found["mean"], found["std"]) if found else ""


def _students(result):
    return str(result["last"]["n"]) if result else ""


def _baseline(row, which):
    """Its scores, and its number of students where that is not the row's."""
    found = row.get(which)
    same = not found or _students(found) == _students(row.get("result"))
    return scores(found) + ("" if same else f" (n = {_students(found)})")


def _cost(row, key, what, digits):
    found = row.get(key) or {}
    star = "*" if found.get("resumed") and found[what] is not None else ""
    return number(found.get(what), digits=digits) + star


def _word(value):
    return "+".join(value) if isinstance(value, list) else value or ""


WORDS = {  # column -> what it shows of a row
    "data set": lambda r: DATASET_TITLES.get(r["dataset"], r["dataset"]),
    "IPC": lambda r: str(r.get("ipc") or ""),
    "method": lambda r: r["method"],
    "images": lambda r: r["images"],
    "generator": lambda r: _word(r["generator"]),
    "teacher": lambda r: _word(r.get("teacher")).split(" (")[0],
    "student": lambda r: _word(r.get("student")),
    "labels": lambda r: r["labels"],
    "paper": lambda r: number(r["top1"], r.get("std")),
    "measured": lambda r: scores(r.get("result")),
    "best": lambda r: scores(r.get("result"), "best"),
    "n": lambda r: _students(r.get("result")),
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
COLUMNS = (
    "data set, IPC, method, teacher, student, paper, measured, best, n, random real, hard labels"
)
COST_COLUMNS = "data set, method, pixels, paper s/image, measured s/image, 32 at a time, paper GB, \
measured GB, GB of 32"
OTHER_COLUMNS = "data set, IPC, images, generator, teacher, student, labels, measured, best, n, \
differs from the nearest cell in"
NOTE = (
    "Top-1 in percent, mean ± sample standard deviation over n students; measured: last epoch, "
    "best: best epoch on the test set. random real: as many real images per class, same teacher "
    "and recipe; hard labels: the same images with their class index. Blank: not run."
)
COST_NOTE = (
    "Seconds and peak GPU memory of stage 2, one image at a time as the paper, and 32 at a time. "
    "*: made in several runs; of the images of those that ended by themselves. Blank: not run."
)


def table_rows(table, results, teachers, root, checkpoint):
    """The rows of a table, as dicts, with what was measured."""
    rows = []
    for row in (dict(row) for row in paper_rows() if table_of(row) == table):
        if row["method"] == "Full dataset":
            for (dataset, arch), found in teachers.items():
                titles = DATASET_TITLES.get(dataset), MODEL_TITLES.get(arch)
                if titles == (row["dataset"], row["student"]) and not found["differs"]:
                    row["result"] = found
        elif "make" in row and table == 6:
            row |= find_costs(root, row["make"]["DATASET"], checkpoint)
        elif "make" in row:
            row |= match_all(row, results, checkpoint)
        rows.append(row)
    return rows


def as_words(columns, rows):
    """[titles, then the words of each row], without columns in which no row has a word."""
    grid = [[title, *map(WORDS[title], rows)] for title in columns.split(", ")]
    optional = ("IPC", "teacher", "student", "generator")
    return list(zip(*(c for c in grid if c[0] not in optional or any(c[1:]))))


def markdown(title, note, columns, rows):
    head, *lines = as_words(columns, rows)
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    lines = [head, ["-" * width for width in widths], *lines]
    lines = [" | ".join(word.ljust(n) for word, n in zip(line, widths)) for line in lines]
    return "\n".join([f"### {title}\n", *(f"| {line} |" for line in lines), f"\n{note}\n"])


def latex(title, note, columns, rows):
    """A table with booktabs."""
    head, *lines = [" & ".join(map(_escape, w)) + r" \\" for w in as_words(columns, rows)]
    caption = rf"\caption{{{_escape(f'{title}. {note}')}}}"
    begin = ["% \\usepackage{booktabs}", r"\begin{table}[t]", r"\centering\small", caption]
    begin += [rf"\begin{{tabular}}{{{'l' * (head.count(' & ') + 1)}}}", r"\toprule"]
    end = [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join([*begin, head, r"\midrule", *lines, *end])


def _escape(text):
    text = "".join(f"\\{c}" if c in "%&_#$" else c for c in text)
    return text.replace(" ± ", r" $\pm$ ")


def as_json(title, note, columns, rows):
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
    model = "the model whose images count; results with others are listed apart"
    parser.flag("--diffusion_checkpoints_path", default=generators.DEFAULT_CHECKPOINT, help=model)
    parser.flag("--format", choices=list(FORMATS), default="markdown")
    folder = "write DIR/table1.md ... instead of printing them"
    parser.flag("--output", metavar="DIR", help=folder)
    return parser.parse_args(argv)


def list_cells(tables, dataset):
    """Print the command of each of the paper's D4M numbers, with the number as a comment."""
    for row in paper_rows():
        value = number(row.get("top1", row.get("sec_per_image")), row.get("std"))
        make, table = row.get("make", {}), table_of(row)
        if make and value and table in tables and dataset in (None, make["DATASET"]):
            variables = " ".join(f"{name}={value}" for name, value in make.items())
            print(f"{variables} sh validate/table{table}.sh  # table {table}, paper {value}")


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
    results, teachers = find_results(root), find_teachers(root)
    tables = []
    for n in args.table:
        rows = table_rows(n, results, teachers, root, checkpoint)
        form = (COST_NOTE, COST_COLUMNS) if n == 6 else (NOTE, COLUMNS)
        tables.append((f"table{n}", f"Table {n}: {PAPER['tables'][str(n)]}{by}", *form, rows))
    others = ("other_results", "Other results: no cell shows them", NOTE, OTHER_COLUMNS)
    tables.append((*others, other_results(results, checkpoint)))
    render, suffix = FORMATS[args.format]
    chosen = [args.dataset, DATASET_TITLES.get(args.dataset)]
    for name, title, note, columns, rows in tables:
        rows = [row for row in rows if not args.dataset or row["dataset"] in chosen]
        if rows and args.output:
            path = Path(args.output) / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, render(title, note, columns, rows))
            print(path)
        elif rows:
            print(render(title, note, columns, rows))


if __name__ == "__main__":
    main()
