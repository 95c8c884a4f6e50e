"""Everything below a folder of outputs on one page: results, curves, pictures, times, commands.

    python -m misc.report output/demo                        # also half-way through a run
    python -m misc.report output --data_dir data/imagenet    # with the accuracy of every class

Writes report.html (one file; no network, no script) and results.csv (one line per student of a
folder) there, and prints the results as markdown. A setting is named by what differs from the
others of its table, as the manifests say; draws and seeds are told apart. A folder below that has
a report of its own (output/demo) is another run and is left out.
"""

import base64
import contextlib
import csv
import io
import json
import os
import platform
import re
import shlex
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distillation import datasets, prototype_files
from matching import evaluation, models, training
from matching import images as image_sets
from misc import figures
from scripts import files, generators, output
from scripts.runtime import Parser, Refusal, entry_point, refuse, this_process
from validate import paper_tables

STAGES = {  # of a manifest: (title, folder of its outputs, what to say where nothing used one)
    "teacher": ("teachers, on real images", "teachers", ""),
    "prototypes": ("1 prototypes", "prototypes", "no images of these prototypes yet"),
    "images": ("2 images", "images", "no labels or student of these images yet"),
    "soft_labels": ("3 soft labels", "labels", "no student of these labels yet"),
    "student": ("4 students", "students", ""),
}
KINDS = ("soft", "hard")  # labels
NO_EFFECT = ("online", "loss", "temperature", "ce_weight", "use_fp16")  # with hard labels
REAL_ARMS = ("random", "decoded")  # above MANY classes, shown of SOME only
MANY, SOME, FEW = 100, 10, 6  # FEW: points of a curve
PER_CLASS, PER_ROW, PER_PAGE = 10, 20, 12_000  # thumbnails at most
QUICK = 2000  # test images at most for accuracy by class, where nobody says --data_dir
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2")
DAMAGE = (Refusal, OSError, KeyError, TypeError, AttributeError, ValueError, IndexError)


# ---- what is there


class Run(NamedTuple):
    """One folder of a stage."""

    folder: Path
    name: str  # below OUTPUT
    stage: str
    given: dict  # args.json
    results: dict
    timing: dict
    log: list
    manifest: dict | None  # None: not finished, or damaged
    trouble: str


def open_run(folder, root):
    stage = next((s for s, facts in STAGES.items() if facts[1] == folder.parent.name), "other")
    found, log = [{}, {}, {}], output.log_rows(folder)
    manifest, trouble = None, ""
    try:
        for n, name in enumerate((output.ARGS, "results.json", output.TIMING)):
            if (folder / name).exists():
                found[n] = dict(files.read_json(folder / name))
        found[2] = {k: v for k, v in found[2].items() if isinstance(v, (int, float))}
        if output.is_complete(folder):
            stage = files.read_json(folder / output.MANIFEST)["stage"]
            manifest = output.read_manifest("", folder, stage)
        elif found[0]:
            count = sum(path.is_file() for path in folder.rglob("[!.]*"))
            trouble = f"not finished: {count} files so far"
            when = log[-1]["time"][:16].replace("T", " ") if log else ""
            trouble += f", last sign of life {when} UTC" * bool(log)
            for path in sorted(folder.glob("seed*.json")):
                last = files.read_json(path)["rows"][-1]
                trouble += f"; {path.stem} is finished with {last['top1']:.1f} %"
    except DAMAGE as error:
        trouble = reason(error, folder)
    return Run(folder, folder.relative_to(root).as_posix(), stage, *found, log, manifest, trouble)


def reason(error, folder):
    if not isinstance(error, Refusal):
        return f"damaged, or not as its stage writes it: {type(error).__name__} {error}"
    return str(error).replace(f"{folder}: ", "").replace(f"{folder}/", "").strip()


def find_runs(root):
    """(Runs below `root`, stage by stage; {name: path} of other folders; those left out)."""
    runs, others, apart = [], {}, []
    for where, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if Path(where) != root and "report.html" in names:
            apart.append(Path(where).relative_to(root).as_posix())
            below.clear()
        elif {output.ARGS, output.MANIFEST, "results.json"} & {*names}:
            runs.append(open_run(Path(where), root))
            below.clear()
        else:
            others[os.path.basename(where)] = Path(where)
    order = [*STAGES, *(run.stage for run in runs)]
    return sorted(runs, key=lambda run: order.index(run.stage)), others, apart


def flags_of(run):
    """{"--flag": its last word} of the command that made a folder, as its log says."""
    words = [str(word) for row in run.log for word in row.get("command") or []]
    words = [part for word in words for part in word.split("=", word.startswith("--"))]
    return dict(zip(words, words[1:]))


def lacking(runs):
    """[(Run, what is not there yet)] of the folders that are damaged, unfinished or not used."""
    used, found = json.dumps([run.given.get("inputs") for run in runs]), []
    for run in runs:
        unused = STAGES.get(run.stage, ("", "", ""))[2]
        if run.trouble:
            found.append((run, run.trouble))
        elif unused and run.manifest and run.manifest["content"] not in used:
            found.append((run, unused))
    return found


def each(runs, function, trouble):
    """Iterator of function(run); what a damaged folder raises goes to the list `trouble`."""
    for run in runs:
        try:
            yield function(run)
        except DAMAGE as error:
            trouble.append((run, reason(error, run.folder)))


# ---- settings, named by what differs


def flat(value, name=""):
    """{"prototype size": 32, ...}: nested settings by their path, without hashes."""
    if not isinstance(value, dict):
        return {} if re.search("[0-9a-f]{64}", str(value)) else {name: value}
    found = {}
    for key, part in value.items():
        key = re.sub("_?(arguments|inputs|manifest)$", "", key)
        found |= flat(part, f"{name} {key}".strip())
    return found


def differing(settings, draws=False):
    """The names whose values are not the same in all dicts, each thing once; seeds if `draws`."""
    names = dict.fromkeys(name for given in settings for name in given)
    values = {name: [json.dumps(given.get(name)) for given in settings] for name in names}
    twice = {n for n in names if " " in n and values.get(n.split()[-1]) == values[n]}
    differ = [n for n in names if len({*values[n]}) > 1 and n not in twice]
    seeds = [n for n in differ if n.endswith(("seed", "seeds"))]
    return [n for n in differ if n not in seeds] + seeds * draws


def in_words(settings, names):
    """["guidance_scale 8", "no sgd"] of the settings called `names`."""
    words = []
    for name in names:
        value = settings.get(name)
        if isinstance(value, bool):
            words.append(name if value else f"no {name}")
        elif value is not None:
            value = "+".join(map(str, value)) if isinstance(value, list) else value
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return words


def title_of(arm):
    return figures.ARMS.get(arm, (arm, arm))[1]


def made_by(manifest):
    """The settings of stages 1 and 2 behind an image folder."""
    return flat({"arguments": manifest["arguments"], "inputs": manifest["inputs"]})


def read_results(runs, trouble):
    """Every student's result, as paper_tables reads it, with the settings on the way to it."""
    finished = [run for run in runs if run.results and not run.trouble]
    images = [run.manifest for run in runs if run.manifest and run.stage == "images"]
    made = {manifest["content"]: made_by(manifest) for manifest in images}

    def read(run):
        found = paper_tables.find_results(run.folder)  # none in a teacher's
        for r in found:
            teachers = {f"teacher {n or ''}": t for n, t in enumerate(run.results["teacher"])}
            how = flat({"": r["arguments"], **teachers, "labels": run.results["labels"]})
            idle = NO_EFFECT if r["labels"] == "hard" else ()
            r["trained"] = {name: value for name, value in how.items() if name not in idle}
            r["made"] = made.get(r["arguments"].get("images"), {})
            every = {**r["made"], **r["trained"]}
            r["draw"] = {name: value for name, value in every.items() if name.endswith("seed")}
            values, r["run"] = [map(float, r[which]["values"]) for which in ("last", "best")], run
            r["students"] = list(zip(r["arguments"]["seeds"], *values, strict=True))
            seeds = [one["rows"] for one in run.results["seeds"]]
            columns = ("epoch", "top1", "loss")
            r["curves"] = [[[row.get(c) for c in columns] for row in rows] for rows in seeds]
        return found

    return sum(each(finished, read, trouble), [])


def name_settings(results):
    """Give the results of a table their `name`: the images, and what differs from the others."""
    how, groups = {}, defaultdict(list)
    for kind in KINDS:
        how |= dict.fromkeys(differing([r["trained"] for r in results if r["labels"] == kind]))
    for r in results:
        same = [other for other in results if other["arm"] == r["arm"]]
        words = in_words(r["made"], differing([o["made"] for o in same if o["made"]]))
        words += in_words(r["trained"], how)
        several = not r["made"] and len({other["images"] for other in same}) > 1
        part = datasets.of_all(r["dataset"], r["classes"])
        name = title_of(r["arm"]) + f": {r['images']}" * (several or r["arm"] == "foreign")
        r["name"] = ", ".join([name + f" ({part})" * bool(part), *words])
        groups[r["name"], r["labels"], json.dumps(r["draw"])].append(r)
    for same in groups.values():
        students = {one for r in same for one in r["students"]}
        if len({seed for seed, *_ in students}) < len(students):  # another model, or machine
            for r in same:
                r["name"] += f" [{r['run'].folder.name}]"


def cell(results):
    """{"mean", "std", ...} of one setting; `over` what ± is, `within` a draw, `draws`.

    One draw: ± is over its students. Several: over the means of the draws. No results: None.
    """
    if not results:
        return None
    groups = defaultdict(dict)  # {draw: {seed: its top-1}}; two folders may hold the same student
    for r in results:
        groups[json.dumps(r["draw"])] |= {seed: top1 for seed, top1, _ in r["students"]}
    counts = sorted({len(group) for group in groups.values()})
    over = " or ".join(map(str, counts)) + " seed" + "s" * (counts != [1])
    over = f"{len(groups)} draws of {over}" if len(groups) > 1 else over
    varied = any(r["arguments"].get("vary_draws") for r in results)
    drawn = [evaluation.summary([*group.values()]) for group in groups.values()]
    found = {"over": over + ", each its own draws" * varied, "within": None, **drawn[0]}
    if len(groups) > 1:
        found |= evaluation.summary([one["mean"] for one in drawn])
        spreads = [one["std"] ** 2 for one in drawn if one["std"] is not None]
        found["within"] = float(np.mean(spreads) ** 0.5) if spreads else None
    draws = [r["draw"] for r in results]
    listed = {n: dict.fromkeys(str(draw.get(n)) for draw in draws) for n in differing(draws, True)}
    return found | {"draws": "; ".join(f"{n} {', '.join(v)}" for n, v in listed.items())}


def make_tables(results, runs, root, notes):
    """One table per data set, images per class and student; notes: what could not be looked up."""
    teachers, cells, why, tables = defaultdict(list), {}, {}, []
    try:
        finished = [run for run in runs if run.results and not run.trouble]
        for run in (run for run in finished if run.stage == "teacher"):
            score = f"{run.results['last']['top1']:.1f} ({run.folder.name})"
            teachers[run.results["arguments"]["dataset"]].append(score)
        if any(r["dataset"] in paper_tables.DATASET_TITLES for r in results):
            rows, others = paper_tables.measured(root, generators.DEFAULT_CHECKPOINT)
            filled = [row for row in reversed(rows) if "path" in (row.get("result") or {})]
            cells = {row["result"]["path"]: row for row in filled}
            why = {other["path"]: other["why"] for other in others}
    except DAMAGE as error:
        notes.append(f"The teachers and the paper's numbers could not be looked up: {error}")
    groups = defaultdict(list)
    for r in results:
        groups[r["dataset"], r["ipc"] or 0, r["student"]].append(r)
    for (dataset, ipc, student), own in sorted(groups.items()):
        titles = paper_tables.DATASET_TITLES.get(dataset), paper_tables.MODEL_TITLES.get(student)
        name_settings(own)
        own.sort(key=place)
        rows = defaultdict(lambda: {"soft": [], "hard": [], "paper": None, "why": []})
        for r in own:
            row = rows[r["name"]]
            row[r["labels"]].append(r)
            row["paper"] = cells.get(r["path"], row["paper"])
            if (r["arm"], r["labels"], bool(titles[0])) == ("d4m", "soft", True):
                odd = why.get(r["path"], row["why"])
                row["why"] = [word for word in odd if not word.startswith(("images ", "count "))]
        for row in rows.values():
            row |= {kind: cell(row[kind]) for kind in KINDS}
        overs = [row[kind]["over"] for row in rows.values() for kind in KINDS if row[kind]]
        over = max(overs, key=overs.count)
        spread = "one seed" if over == "1 seed" else f"± over {over}"
        many = f"{ipc} images" if ipc else "different numbers of images"
        table = {"title": f"{dataset}, {many} per class, student {student}", "rows": rows}
        table |= {"dataset": dataset, "results": own, "over": over}
        found = ", ".join(teachers[dataset])
        table["teachers"] = f"Teachers, on real images: {found}." * bool(found)
        table["spread"] = spread + " where nothing else is said" * (len(set(overs)) > 1)
        table["kinds"] = [kind for kind in KINDS if any(row[kind] for row in rows.values())]
        table["tested"] = sorted({r["arguments"].get("test_images") or 0 for r in own})
        lines = [row for row in paper_tables.PAPER_ROWS if row.get("ipc", ipc) == ipc]
        lines = [row for row in lines if (row["dataset"], row.get("student")) == titles]
        lines = [row for row in lines if paper_tables.table_of(row) < 3]
        scores = [paper_tables.number(row["top1"], row.get("std")) for row in lines]
        table["published"] = [f"{row['method']} {score}" for row, score in zip(lines, scores)]
        tables.append(table)
    return tables


def place(result):
    """Where a result stands in its table: by arm, then by name with numbers in their order."""
    order = [*figures.ARMS, result["arm"]]
    name = re.sub(r"\d+", lambda number: number[0].zfill(9), result["name"])
    return order.index(result["arm"]), name


# ---- drawings


@contextlib.contextmanager
def drawing():
    """matplotlib.pyplot for SVG in a page: words stay words, and a prompt is no formula."""
    plt = figures.pyplot()
    words = {"svg.fonttype": "none", "svg.hashsalt": "d4m", "text.parse_math": False}
    with plt.rc_context(words | {"font.size": 9, "axes.labelsize": 9, "savefig.bbox": None}):
        yield plt


def svg(figure):
    """A figure as SVG for the page: what is black takes the colour of the text; no dates."""
    text, undated = io.StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=undated)
    figures.pyplot().close(figure)
    text = re.sub(r'<g id="[a-z0-9]+_\d+">', "<g>", text.getvalue())
    return re.sub("#000000|#b0b0b0", "currentColor", text[text.index("<svg") :])


def draw_curves(results):
    """[{"kind", "legend", "drawn": {title: SVG}, "tested": epochs}]: a line per student."""
    from matplotlib.ticker import LogLocator

    found, styles = [], {}
    for n, name in enumerate(dict.fromkeys(r["name"] for r in results)):
        styles[name] = COLOURS[n % len(COLOURS)], DASHES[n // len(COLOURS) % len(DASHES)]
    for kind in KINDS:
        own, drawn = [r for r in results if r["labels"] == kind], {}
        for column, title in enumerate(("test accuracy, %", "training loss"), 1):
            with drawing() as plt:
                figure, axes = plt.subplots(figsize=(4.4, 2.6), layout="constrained")
                for name, rows in [(r["name"], rows) for r in own for rows in r["curves"]]:
                    colour, dashes = styles[name]
                    dashes = (0, [float(n) for n in dashes.split()]) if dashes else "-"
                    points = [(row[0] + 1, row[column]) for row in rows if row[column] is not None]
                    few = len(points) < FEW  # a line would say what nobody measured
                    style = {"color": colour, "ls": "" if few else dashes, "marker": "o" * few}
                    axes.plot(*zip(*points), lw=1, ms=3, alpha=0.8, **style)
                axes.set(xlabel="epoch", ylabel=title)
                axes.grid(True, alpha=0.3)
                low, high = axes.dataLim.intervaly
                if column == 2 and 0 < 20 * low < high < np.inf:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
                    axes.minorticks_off()
                drawn[title] = svg(figure)
        legend = {r["name"]: styles[r["name"]] for r in own}
        rows = [row for r in own for rows in r["curves"] for row in rows if row[1] is not None]
        item = {"kind": kind, "legend": legend, "drawn": drawn}
        found += [{**item, "tested": sorted({row[0] + 1 for row in rows})}] if own else []
    return found


def draw_latents(run, others):
    """{"name", "legend", "drawn": {caption: SVG}} of a prototype folder."""
    from sklearn.decomposition import PCA

    source, drawn = prototype_files.PrototypeFolder(run.folder, ""), {}
    folders = [c["folder"] for c in source.classes]
    chosen = [folders.index(name) for name in figures.choose_classes(None, folders, SOME)]
    found, colours = [source[position] for position in chosen], figures.class_colours(len(chosen))
    rows = np.concatenate([p.latents.reshape(len(p.latents), -1) for p in found]).astype(float)
    sizes = np.concatenate([p.sizes for p in found])
    colour = colours.repeat(source.per_class, 0)
    with drawing() as plt:
        if len(rows) > 2:
            figure, axes = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
            pca, area = PCA(2, random_state=0).fit(rows), 12 + 90 * sizes / sizes.max()
            figures.scatter(axes, pca.transform(rows), colour, s=area, alpha=0.75)
            first, second = 100 * pca.explained_variance_ratio_
            axes.set(xlabel=f"PC 1 ({first:.0f} %)", ylabel=f"PC 2 ({second:.0f} %)")
            drawn[f"Principal components, {len(chosen)} classes; area: cluster size"] = svg(figure)
        for name, path in others.items():
            if name.startswith(f"{source.dataset}-latents-"):
                with contextlib.suppress(*DAMAGE):  # those of another size
                    figure = figures.latents(path, run.folder, None, None, 6)
                    drawn["Latents, in the colour of the nearest prototype (star)"] = svg(figure)
    prompts = [figures.short(source.classes[position]["prompt"]) for position in chosen]
    hexes = ["#" + bytes((255 * colour[:3]).round().astype("u1")).hex() for colour in colours]
    legend = {prompt: (colour, None) for prompt, colour in zip(prompts, hexes)}
    return {"name": run.name, "legend": legend, "drawn": drawn}


# ---- accuracy by class


def by_class(result, data_dir, process, test_sets):
    """{class folder: top-1 in percent}, mean over a result's saved students."""
    run, given, facts = result["run"], result["arguments"], datasets.ALL[result["dataset"]]
    own = flags_of(run).get("--val_dir")
    if own and Path(own).is_dir() and (data_dir or given["test_images"] <= QUICK):
        data_dir = own  # one report may be of several data sets
    if not run.manifest:
        refuse("no weights beside results.json")
    if facts.needs and not data_dir:
        refuse(f"--data_dir {own or 'ROOT'}, the real data set's, tests students class by class")
    folders, size = [c["folder"] for c in run.manifest["classes"]], given["input_size"]
    key = (
        result["dataset"],
        str(data_dir),
        *folders,
        size,
        given["test_resize"],
        given["test_on_train"],
    )
    if key not in test_sets:
        where = "--data_dir", data_dir, result["dataset"], folders
        split = evaluation.open_test(*where, on_train=given["test_on_train"])
        how = size, process, 4, given["test_resize"], "--data_dir"
        test_sets[key] = evaluation.validation_pixels(split, *how)
    (pixels, targets), forward, scores = test_sets[key], training.Forward(process.device), []
    for seed in given["seeds"]:
        path = run.folder / f"student_seed{seed}.safetensors"
        model = models.create_model(result["student"], len(folders), size)
        models.load_state(model, models.read_state_dict(path, ""), str(path))
        model = forward.place(model)
        for c in range(len(folders)):
            part = pixels[targets == c], targets[targets == c]
            found = evaluation.evaluate(model, *part, forward, facts.mean, facts.std)
            scores.append(found["top1"])
    means = np.reshape(scores, (-1, len(folders))).mean(0)
    return dict(zip(folders, means.tolist()))


def add_classes(table, data_dir, process, test_sets):
    """`classes` of a table: (settings, rows of the worst classes first), or why there is none."""
    columns = {}
    for r in table["results"]:
        if r["name"] not in columns and r["labels"] == table["kinds"][0]:
            try:
                columns[r["name"]] = by_class(r, data_dir, process, test_sets)
            except DAMAGE as error:
                table["classes"] = reason(error, r["run"].folder)
                return
    first, prompts = next(iter(columns.values())), datasets.known_prompts(table["dataset"])
    rows = [[prompts.get(name, name), name] for name in sorted(first, key=first.get)]
    rows = [row + [scores.get(row[1]) for scores in columns.values()] for row in rows]
    table["classes"] = list(columns), rows


# ---- gallery


def thumbnail(path, side):
    """A data: address of an image, at most `side` pixels wide and high; None if it is damaged."""
    try:
        image = datasets.read_rgb(path)
    except datasets.BadImage:
        return None
    form, how = ("png", {}) if max(image.size) <= 48 else ("webp", {"quality": 60, "method": 0})
    image.thumbnail((side, side), reducing_gap=2)
    data = io.BytesIO()
    image.save(data, form, **how)
    return f"data:image/{form};base64,{base64.b64encode(data.getvalue()).decode()}"


def open_sets(runs, others, results, trouble):
    """{data set: [{"arm", "title", "prompts", "paths" by class, "rows" by path}]}, real first."""
    own, found = [run for run in runs if run.manifest and run.stage == "images"], defaultdict(list)

    def read(run):
        arm, paths, rows = run.manifest["arm"], defaultdict(list), {}
        same = [r.manifest for r in own if r.manifest["dataset"] == run.manifest["dataset"]]
        same = [made_by(manifest) for manifest in same if manifest["arm"] == arm]
        words = in_words(made_by(run.manifest), differing(same, draws=True))
        for name in filter(lambda name: "/" in name, sorted(run.manifest["files"])):
            paths[name.split("/")[0]].append(run.folder / name)
        for line in (run.folder / "images.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[run.folder / row["file_name"]] = row
            if arm == "decoded":
                row.pop("seed", None)  # no noise
        prompts = {c["folder"]: c["prompt"] for c in run.manifest["classes"]}
        title = ", ".join([title_of(arm), *words])
        item = {"arm": arm, "title": title, "prompts": prompts, "paths": paths, "rows": rows}
        found[run.manifest["dataset"]].append(item)

    list(each(own, read, trouble))
    inside = {run.folder.name for run in own}
    outside = {(r["images"], r["dataset"]): r for r in results if r["images"] not in inside}
    for (name, dataset), r in outside.items():
        given = Path(flags_of(r["run"]).get("--train_dir", ""))  # it may lie anywhere
        folder = given if given.name == name and given.is_dir() else others.get(name, Path(name))
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                opened = image_sets.open_images("", folder, dataset)
        except DAMAGE as error:
            trouble.append((r["run"], f"its images are not shown: {reason(error, folder)}"))
            continue
        known = datasets.known_prompts(dataset)
        item = {"prompts": {f: known.get(f, f) for f in opened.folders}, "rows": {}}
        item["paths"] = dict(zip(opened.folders, opened.paths()))
        found[dataset].append({"arm": r["arm"], "title": r["name"], **item})
    order = [*REAL_ARMS, *figures.ARMS, "foreign"]
    for sets in found.values():
        sets.sort(key=lambda s: order.index(s["arm"]) if s["arm"] in order else len(order))
    return found


def make_gallery(found, root):
    """[{"dataset", "titles", "classes", "most", "row", "some"}] of `open_sets`, with thumbnails."""
    galleries, jobs = [], []
    for dataset, sets in found.items():
        prompts = {f: p for s in sets for f, p in s["prompts"].items()}
        few = SOME if len(prompts) > MANY else len(prompts)
        some, first = (figures.choose_classes(None, list(prompts), n) for n in (few, SOME))
        count = sum(len(some if s["arm"] in REAL_ARMS else prompts) for s in sets)
        most = max(1, min(PER_CLASS, PER_PAGE // len(found) // max(1, count)))
        side, classes = 128 if count * most <= 2000 else 96, []
        for folder, prompt in prompts.items():
            shown = []
            for s in sets:
                hidden = s["arm"] in REAL_ARMS and folder not in some
                paths, pictures = [] if hidden else s["paths"].get(folder, []), []
                for path in paths[:most]:
                    link = os.path.relpath(path, root)
                    pictures.append({"link": link, "name": path.name, **s["rows"].get(path, {})})
                    jobs.append((pictures[-1], path, side))
                shown.append({"title": s["title"], "count": len(paths), "pictures": pictures})
            asked = {picture.get("prompt") for s in shown for picture in s["pictures"]} - {None}
            item = {"title": figures.short(prompt, 40), "folder": folder, "prompts": asked}
            classes.append({**item, "sets": shown, "first": folder in first})
        item = {"dataset": dataset, "titles": [s["title"] for s in sets], "classes": classes}
        item |= {"most": most, "row": max(2, min(most, PER_ROW // len(sets)))}
        galleries.append(item | {"some": few if few < len(prompts) else None})

    def draw(job):
        job[0]["src"] = thumbnail(*job[1:])

    if jobs:
        image_sets.in_threads(draw, jobs, os.cpu_count() or 1, "thumbnails")
    return galleries


# ---- the page


def costs(runs):
    """{title of a stage: number of its folders, sums and largest values of their timing.json}"""
    found = {}
    for stage in dict.fromkeys(run.stage for run in runs if run.timing):
        own = [run.timing for run in runs if run.stage == stage and run.timing]
        total = {n: sum(t.get(n, 0) for t in own) for n in ("seconds", "process_seconds")}
        total |= {n: max(t.get(n, 0) for t in own) for n in ("host_mib", "cuda_mib")}
        found[STAGES.get(stage, (stage,))[0]] = total | {"folders": len(own)}
    return found


def commands(runs):
    """The words, quoted, of what was run, in its order, each once; what the logs know of."""
    rows = [row for run in runs for row in run.log if isinstance(row.get("command"), list)]
    rows.sort(key=lambda row: str(row.get("time")))
    words = [("python", *map(shlex.quote, map(str, row["command"]))) for row in rows]
    return list(dict.fromkeys(words))


def versions(runs):
    """{title: {library: version}}: of this process, and what the folders were made with."""
    here, found = output.library_versions() | {"system": platform.platform()}, defaultdict(list)
    if torch.cuda.is_available():
        here |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    for run in (run for run in runs if run.manifest):
        found[json.dumps(run.manifest.get("versions"))].append(run.name)
    made = {f"made with ({len(v)} folders, first {v[0]})": json.loads(k) for k, v in found.items()}
    return {"report written with": here, **made}


def markdown(tables):
    """The short tables that are printed."""
    texts = []
    for table in tables:
        lines = []
        for name, row in table["rows"].items():
            line = {"trained on": name}
            for kind in table["kinds"]:
                found = row[kind]
                words = paper_tables.number(found["mean"], found["std"]) if found else "not run"
                differs = found and found["over"] != table["over"]
                line[kind] = words + (f" ({found['over']})" if differs else "")
            lines.append(line)
        note = f"Top-1 of the last epoch, in percent; {table['spread']}. {table['teachers']}"
        columns = ", ".join(["trained on", *table["kinds"]])
        texts.append(paper_tables.markdown(table["title"], note.strip(), columns, lines))
    return "\n".join(texts)


def csv_text(tables):
    """One line per student of a folder; a column for each setting that has several values."""
    results = [r for table in tables for r in table["results"]]
    settings, text = [{**r["made"], **r["trained"]} for r in results], io.StringIO()
    head = "dataset ipc student name labels student_seed top1 best_top1 folder".split()
    names = [n for n in differing(settings, True) if n not in (*head, "seeds")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head + names)
    for r, given in zip(results, settings):
        own = [r["run"].name, *(given.get(name) for name in names)]
        writer.writerows([*(r[name] for name in head[:5]), *one, *own] for one in r["students"])
    return text.getvalue()


def get_args(argv=None):
    parser, what = Parser("misc.report", __doc__), "holds images/, students/, ..."
    parser.flag("root", nargs="?", metavar="OUTPUT", default="output", help=what)
    where = "the real data set's root, for accuracy by class [small sets: as stage 4 was told]"
    parser.flag("--data_dir", help=where)
    parser.flag("--device", default="auto", help="where students are tested, class by class")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    import jinja2

    args = get_args(argv)
    root = Path(args.root)
    runs, others, apart = find_runs(root)
    left = f"Left out, with a report of their own: {', '.join(apart)}.\n" if apart else ""
    if not runs:
        refuse(f"{root}: holds no output of any stage. {left}".strip())
    notes, trouble = [], []
    results = read_results(runs, trouble)
    tables = make_tables(results, runs, root, notes)
    process, test_sets = this_process(args.device), {}
    for table in tables:
        table["curves"] = draw_curves(table["results"])
        add_classes(table, args.data_dir, process, test_sets)
    prototypes = [run for run in runs if run.manifest and run.stage == "prototypes"]
    latents = list(each(prototypes, lambda run: draw_latents(run, others), trouble))
    galleries = make_gallery(open_sets(runs, others, results, trouble), root)
    facts = {"title": root.resolve().name, "runs": runs, "apart": apart, "notes": notes}
    facts |= {"lacking": lacking(runs) + trouble, "latents": latents, "galleries": galleries}
    facts |= {"tables": tables, "stages": costs(runs), "commands": commands(runs)}
    text, how = Path(__file__).with_suffix(".html.j2").read_text("utf-8"), {"autoescape": True}
    template = jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, **how)
    page = template.render(facts, versions=versions(runs), few=FEW, flat=flat)
    files.write(root / "report.html", page)
    files.write(root / "results.csv", csv_text(tables))
    print(f"\n{markdown(tables)}\n{left}{root / 'results.csv'}\n{root / 'report.html'}")


if __name__ == "__main__":
    main()
