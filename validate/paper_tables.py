"""The paper's tables 1 to 6: every published number, and beside D4M's own the one that was measured here.

    python -m validate.paper_tables --list                                  # the command that produces each D4M cell
    python -m validate.paper_tables --table 2 --output_root output          # paper beside measured, as markdown
    python -m validate.paper_tables --format latex --output output/tables

Reads `paper_numbers.json` and the results.json files below the output root. A result belongs to a cell if data set,
images (by the name that their flags give them), the Stable Diffusion that made them, teacher, student and recipe are
the cell's; what was not run stays blank, and a result that is no cell's is listed after the tables with what differs.
The headline is the last epoch; the best epoch, chosen on the test set, is shown beside it.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m validate.paper_tables", file=sys.stderr)
    sys.exit(2)

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from distillation.datasets import DATASETS, dataset_name
from matching.models import TEACHER_WEIGHTS
from matching.train_teacher import default_recipe
from matching.training import summary
from scripts.checkpoints import DEFAULT_CHECKPOINT, model_name
from scripts.files import read_json, write_text, wrong_field
from scripts.runtime import Parser, refuse

NUMBERS = Path(__file__).with_name("paper_numbers.json")
TABLES = (1, 2, 3, 4, 5, 6)
OTHER = "other"  # the table of what is no cell's number
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
    OTHER: "results that are no cell's number",
}
CLASSES = {"imagenet": 1000, "tiny_imagenet": 200, "cifar10": 10, "cifar100": 100}
TRAIN_IMAGES = {"imagenet": 1281167, "tiny_imagenet": 100000, "cifar10": 50000, "cifar100": 50000}
TEST_IMAGES = {"imagenet": 50000, "tiny_imagenet": 10000, "cifar10": 10000, "cifar100": 10000}


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


def table_cells(table=None):
    """`paper_cells`, and table 4's rows without prototypes twice: as noise, and as the text-to-image of a fair run."""
    cells = []
    for cell in paper_cells(table):
        cells.append(cell)
        if cell.arm == "noise":
            cells.append(cell._replace(arm="text", paper={**cell.paper, "top1": None, "method": "text-to-image"}))
    return cells


# ---- what the images of a cell are called


def images_name(dataset, ipc, arm):
    """The image folder that stages 1-2 make for an arm with the paper's flags."""
    d4m = f"{dataset}_ipc{ipc}_s0.7_g8_kmexpand1"
    if arm == "d4m-g":
        return f"{dataset}_ipc{ipc}_from_" + images_name("imagenet", ipc, "d4m")
    return {"d4m": d4m, "stm": f"{d4m}_stm"}.get(arm, f"{dataset}_ipc{ipc}_{arm}")


# ---- recipes: which values of results.json make one


def _image_size(arguments):
    return DATASETS[arguments["dataset"]].image_size


def _rded_batch(arguments):
    """100 images at IPC 10 and 200 above; half of that on small sets."""
    full = 200 if arguments["ipc"] > 10 else 100
    return full if arguments["dataset"] == "imagenet" else full // 2


def _minimax_epochs(arguments):
    return 2000 if arguments["ipc"] <= 10 else 1500 if arguments["ipc"] < 100 else 1000


# A function takes the other arguments, and the images' IPC.
_D4M = {
    "epochs": 300, "batch_size": 1024, "bn_batch": 73, "optimizer": "adamw", "lr": 0.001, "weight_decay": 0.01,
    "schedule": "cosine", "cos_stretch": 1.0, "warmup_epochs": 0, "loss": "kl", "temperature": 20.0, "use_fp16": True,
    "input_size": _image_size, "min_scale_crops": 0.08, "max_scale_crops": 1.0, "flip": 0.5, "mix_type": "cutmix",
    "cutmix": 1.0, "color_jitter": 0.0, "lighting": 0.0, "ema": 0.0, "bn_refresh": False,
}  # fmt: skip
RDED_LR = {
    "resnet18": 1e-3, "resnet50": 1e-3, "resnet101": 1e-3, "efficientnet_b0": 2e-3, "mobilenet_v2": 2.5e-3,
    "vgg11": 5e-4, "swin_t": 1e-4, "vit_b_16": 1e-4,
}  # fmt: skip
_RDED = {**_D4M, "min_scale_crops": 0.5, "cos_stretch": 2.0, "bn_refresh": True}
RECIPES = {
    "d4m": _D4M,
    "d4m-cifar": {**_D4M, "epochs": 500, "batch_size": 100, "bn_batch": 100},
    "cda": {**_D4M, "batch_size": 128, "bn_batch": 128},
    "rded": {
        **_RDED, "batch_size": _rded_batch, "bn_batch": lambda a: a["batch_size"],
        "lr": lambda a: RDED_LR.get(a["model"], 1e-3),
    },
    "rd3": {
        **_RDED, "epochs": 400, "batch_size": 50, "bn_batch": 50,
        "cos_stretch": lambda a: 1.0 if a["model"] == "resnet18" else 2.0,
    },
    "edc": {
        **{k: v for k, v in _RDED.items() if k != "temperature"}, "batch_size": 100, "bn_batch": 100,
        "loss": "mse_ce", "ce_weight": 0.025, "ema": 0.99, "bn_refresh": False,
    },
    "minimax-hard": {
        "epochs": _minimax_epochs, "batch_size": 64, "bn_batch": 64, "optimizer": "sgd", "lr": 0.01,
        "momentum": 0.9, "weight_decay": 5e-4, "schedule": "step", "step_factor": 0.2, "warmup_epochs": 0,
        "loss": "ce", "input_size": _image_size, "min_scale_crops": 0.5, "max_scale_crops": 1.0, "flip": 0.5,
        "mix_type": "cutmix", "cutmix": 1.0, "color_jitter": 0.4, "lighting": 0.1, "ema": 0.0, "bn_refresh": False,
    },
}  # fmt: skip
OF_SOFT_LABELS = {"loss", "temperature", "ce_weight", "use_fp16"}  # hard labels have no say in these


def recipe_differences(name, arguments, ipc):
    """["epochs 3", ...]: the values in `arguments` of a results.json that are not the recipe's.

    ipc    images a class; 0 where their number differs from class to class
    """
    hard, odd = arguments["labels"] == "hard", []
    if not hard and name == "minimax-hard":
        return [f"labels {arguments['labels']}"]
    for key, wanted in RECIPES[name].items():
        if hard and key in OF_SOFT_LABELS and name != "minimax-hard":
            continue
        if arguments.get(key) != (wanted({**arguments, "ipc": ipc}) if callable(wanted) else wanted):
            odd.append(f"{key} {arguments.get(key)}")
    return odd


def recipe_name(arguments, ipc):
    """The recipe whose every value is in `arguments` of a results.json; None if it is none of them."""
    return next((name for name in RECIPES if not recipe_differences(name, arguments, ipc)), None)


def paper_recipe(dataset):
    """The recipe of the tables: the paper's; for CIFAR, where it is silent, DD-Ranking's settings."""
    return "d4m-cifar" if dataset.startswith("cifar") else "d4m"


# ---- results


def read_result(path):
    """A results.json of stage 4 as one flat row, or None for another file of that name.

    last, best   {"mean", "std", "n", "values"} of top-1;   generator: see `generator_name`
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {"arguments", "images", "summary", "seeds"} <= set(found):
        return None
    _check_result(path, found)
    arguments, images = found["arguments"], found["images"]
    return {
        "path": str(path),
        "dataset": arguments["dataset"],
        "ipc": images.get("ipc"),
        "arm": images["arm"],
        "images": images["name"],
        "generator": generator_name(images.get("generator")),
        "generator_sha256": _hashes(images.get("generator")),
        "teacher": [t["arch"] for t in found["teacher"]],
        "weights": [t["weights"] for t in found["teacher"]],
        "teacher_differs": [odd for t in found["teacher"] for odd in teacher_differences(t.get("arguments"))],
        "classes": images.get("classes"),
        "count": images.get("count"),
        "real_images": images.get("real_images"),
        "student": arguments["model"],
        "labels": "hard" if arguments["labels"] == "hard" else "soft",
        "labelled": found.get("labels") or {},
        "recipe": recipe_name(arguments, images.get("ipc") or 0),
        "arguments": arguments,
        "last": found["summary"]["last"]["top1"],
        "best": found["summary"]["best"]["top1"],
    }


SAID = {  # what a result must say of itself, part by part
    "arguments": {"dataset": str, "model": str, "labels": str},
    "images": {"name": str, "arm": str},
    "summary": {"last": dict, "best": dict},
}
TRAINED = {"dataset": str, "arch": str}  # and a teacher of train_teacher's


def _check_result(path, found):
    """Refuse a student's results.json that does not say what tables need, such as an edited one."""
    parts = [(name, found[name], fields) for name, fields in SAID.items()]
    parts += [(f"summary.{which}", (found["summary"] or {}).get(which), {"top1": dict}) for which in ("last", "best")]
    teachers = found.get("teacher")
    if not isinstance(teachers, list):
        refuse(f"{path}: no list of teachers in it")
    parts += [("teacher", teacher, {"arch": str, "weights": str}) for teacher in teachers]
    own = [t["arguments"] for t in teachers if isinstance(t, dict) and t.get("arguments") is not None]
    parts += [("teacher.arguments", arguments, TRAINED) for arguments in own]
    _check_parts(path, parts)


def _check_parts(path, parts):
    for name, record, fields in parts:
        odd = wrong_field(record, fields)
        if odd:
            refuse(f"{path}: no {odd} in its {name}")
        if record.get("dataset", "imagenet") not in DATASETS:
            refuse(f"{path}: its {name} say the data set {record['dataset']!r}, which is unknown")


def generator_name(facts):
    """What tables call the Stable Diffusion of some images: its hub id or folder name, @ another revision; or None."""
    if facts is None:
        return None
    return facts["model"] if facts["revision"] in (None, "main") else f"{facts['model']}@{facts['revision']}"


def _hashes(facts):
    return tuple((facts or {}).get(f"{network}_sha256") for network in ("unet", "vae", "text_encoder"))


def find_results(root):
    """Every student's result below `root`, in the order of their paths."""
    rows = [row for row in map(read_result, sorted(Path(root).rglob("results.json"))) if row]
    # two models may go by one name: the one with most results keeps it
    for name in {row["generator"] for row in rows} - {None}:
        own = [row for row in rows if row["generator"] == name]
        (most, _), *others = Counter(row["generator_sha256"] for row in own).most_common()
        for row in own if others else []:
            if row["generator_sha256"] != most:
                row["generator"] = f"{name} (unet {str(row['generator_sha256'][0])[:8]})"
    return rows


def find_teachers(root):
    """{(dataset, arch): {"last", "best", "differs"}} of the teachers that were trained below `root`.

    Those that differ in their seed alone are one entry; of several recipes the one that is nearest to the data set's
    (`differs`: what is not its), then the one over most seeds.
    """
    groups = {}
    for path in sorted(Path(root).rglob("results.json")):
        found = read_json(path)
        if isinstance(found, dict) and "parameters" in found and "arch" in found.get("arguments", {}):
            arguments = found["arguments"]
            _check_parts(path, [("arguments", arguments, TRAINED)])
            rest = {k: v for k, v in arguments.items() if k not in ("seed", "eval_every")}
            key = (arguments["dataset"], arguments["arch"]), json.dumps(rest, sort_keys=True)
            groups.setdefault(key, (teacher_differences(arguments), []))[1].append(found)
    best = {}
    for (name, _), (differs, found) in sorted(groups.items(), key=lambda entry: (len(entry[1][0]), -len(entry[1][1]))):
        scores = {which: summary([f[which]["top1"] for f in found]) for which in ("last", "best")}
        best.setdefault(name, {**scores, "differs": differs})
    return best


def teacher_differences(arguments):
    """["epochs 3", ...]: what is not as train_teacher's own recipe for this data set and network has it.

    arguments    train_teacher's; None for weights that are not its
    """
    if arguments is None:
        return []
    dataset = arguments["dataset"]
    recipe = default_recipe(dataset, arguments["arch"])
    wanted = recipe._asdict() | {
        "bn_batch": recipe.batch_size, "input_size": DATASETS[dataset].image_size, "momentum": 0.9,
        "schedule": "cosine", "label_smoothing": 0.0, "min_scale_crops": 0.08, "max_scale_crops": 1.0,
        "classes": None, "max_images_per_class": 0, "amp": "none",
        "train_images": TRAIN_IMAGES.get(dataset, arguments.get("train_images")),
        "val_images": TEST_IMAGES.get(dataset, arguments.get("val_images")),
    }  # fmt: skip
    return [f"{name} {arguments.get(name)}" for name, value in wanted.items() if arguments.get(name) != value]


def paper_weights(cell):
    """What results.json calls the weights of a cell's teacher: torchvision's pinned ones, else ours."""
    return f"torchvision {TEACHER_WEIGHTS[cell.teacher]}" if cell.dataset == "imagenet" else "train_teacher"


def differences(cell, row, arm, labels, checkpoint):
    """Why a result is not the number of a cell (or its baseline's: `arm` and `labels`), in words; [] if it is.

    checkpoint   what manifests call the Stable Diffusion whose images count
    """
    facts = {
        "data set": (row["dataset"], cell.dataset),
        "arm": (row["arm"], arm),
        "generator": (row["generator"], None if arm == "random" else checkpoint),
        "images": (row["images"], images_name(cell.dataset, cell.ipc, arm)),
        "classes": (row["classes"], CLASSES[cell.dataset]),
        "number of images": (row["count"], cell.ipc * CLASSES[cell.dataset]),
        "real images": (row["real_images"], TRAIN_IMAGES["imagenet" if arm == "d4m-g" else cell.dataset]),
        "student": (row["student"], cell.student),
        "labels": (row["labels"], labels),
        "precision": (row["arguments"].get("amp"), "none"),
        "test images": (row["arguments"].get("test_images"), TEST_IMAGES[cell.dataset]),
    }
    if labels == "soft":
        facts["teacher"] = row["teacher"], [cell.teacher]
        facts["weights"] = row["weights"], [paper_weights(cell)]
        facts["labels' precision"] = row["labelled"].get("amp"), "none"
        facts["labels' channels_last"] = row["labelled"].get("channels_last"), False
    odd = [f"{what} {_word(has)}" for what, (has, wanted) in facts.items() if has != wanted]
    if labels == "soft":
        odd += [f"teacher's {word}" for word in row["teacher_differs"]]
    return odd + recipe_differences(paper_recipe(cell.dataset), row["arguments"], row["ipc"] or 0)


def _word(value):
    return "+".join(value) if isinstance(value, list) else str(value)


BASELINES = {"result": (None, "soft"), "random": ("random", "soft"), "hard": (None, "hard")}  # (arm, labels)


def match_all(cell, results, checkpoint=DEFAULT_CHECKPOINT):
    """{"result", "random", "hard"} of a cell: a row of `find_results` each, or None; of several that of most seeds."""
    near = [row for row in results if (row["dataset"], row["student"]) == (cell.dataset, cell.student)]
    return {
        which: max(
            (row for row in near if not differences(cell, row, arm or cell.arm, labels, checkpoint)),
            key=lambda row: row["last"]["n"],
            default=None,
        )
        for which, (arm, labels) in BASELINES.items()
    }


def other_rows(results, checkpoint=DEFAULT_CHECKPOINT, datasets=tuple(CLASSES)):
    """The results of the paper's data sets that are no cell's number, each with what differs from the nearest cell."""
    cells, rows = [cell for cell in table_cells() if cell.table != 6], []
    shown = {id(row) for cell in cells for row in match_all(cell, results, checkpoint).values()}
    for row in results:
        if row["dataset"] in datasets and id(row) not in shown:
            every = (
                differences(cell, row, arm or cell.arm, labels, checkpoint)
                for cell in cells
                if cell.dataset == row["dataset"]
                for arm, labels in BASELINES.values()
            )
            why = min(every, key=len) or ["another result over as many seeds or more is shown"]
            keep = ("dataset", "ipc", "images", "generator", "teacher", "student", "labels")
            rows.append({"ours": False, **{name: row[name] for name in keep}, "result": row, "why": why})
    return rows


def measure_cost(folder):
    """{"sec_per_image", "gpu_gb" or None, "count", "resumed"} of a finished image folder; None where no run says it.

    A run that was stopped leaves no line in the log: its seconds are not known, and its images do not count.
    """
    folder = Path(folder)
    if not ((folder / "timing.json").is_file() and (folder / "manifest.json").is_file()):
        return None
    timing, count = read_json(folder / "timing.json"), read_json(folder / "manifest.json")["count"]
    made = timing["units"]
    if not made:
        return None
    gpu = timing["cuda_mib"] / 1024 if "cuda_mib" in timing else None
    return {
        "sec_per_image": timing["process_seconds"] / made,
        "gpu_gb": gpu,
        "count": count,
        "resumed": made != count,
    }


def find_costs(root, dataset, checkpoint=DEFAULT_CHECKPOINT):
    """{"one": measure with one image at a time, "batch": with 32} of table 6's runs below `root`."""
    found = {}
    for key, name, batch_size in (("one", "batch1", 1), ("batch", "batch32", 32)):
        folders = sorted((Path(root) / "cost" / name / "images").glob(f"{dataset}_ipc*_s*"))
        fit = (measure_cost(folder) for folder in folders if _costs(folder, checkpoint, batch_size))
        found[key] = next(filter(None, fit), None)
    return found


def _costs(folder, checkpoint, batch_size):
    """Whether a folder is table 6's: the paper's generator, 512 px, batches of this size."""
    if not (folder / "args.json").is_file():
        return False
    made = read_json(folder / "args.json")
    stage1 = made.get("prototype_arguments") or {}
    name = generator_name({"model": made.get("model"), "revision": made.get("revision")})
    return (name, stage1.get("size"), made.get("batch_size")) == (checkpoint, 512, batch_size)


# ---- tables


def table_rows(table, measure, teachers=None, costs=None):
    """The rows of a table as dicts, the paper's and ours side by side.

    measure    cell -> {"result", "random", "hard"};   teachers: of find_teachers;   costs: dataset -> find_costs
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
            found = teachers.get((_key(paper["dataset"], DATASET_TITLES), _key(paper["student"], MODEL_TITLES)))
            row["result"] = None if not found or found["differs"] else found
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


def _baseline(row, which):
    """The scores of a baseline, and how many students it has where that is not the row's n."""
    found, n = row.get(which), row["result"]["last"]["n"] if row.get("result") else None
    same = not found or found["last"]["n"] == n
    return scores(found) + ("" if same else f" (n = {found['last']['n']})")


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
    "random real": lambda r: _baseline(r, "random"),
    "hard labels": lambda r: _baseline(r, "hard"),
}


def _cost(key, what, digits):
    star = lambda found: "*" if found and found["resumed"] and found[what] is not None else ""  # noqa: E731
    return lambda r: number(r[key] and r[key][what], digits=digits) + star(r[key])


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


def _shortened(why, most=5):
    """The first words of `differences`, without the values that have a column of their own."""
    words = [w.split()[0] if w.split()[0] in ("generator", "images", "student", "labels") else w for w in why[:most]]
    return ", ".join(words + ["..."] * (len(why) > most))


OTHER_COLUMNS = {
    "data set": lambda r: DATASET_TITLES[r["dataset"]],
    "IPC": lambda r: str(r["ipc"] or ""),
    "images": lambda r: r["images"],
    "generator": lambda r: r["generator"] or "",
    "teacher": lambda r: _word(r["teacher"]),
    "student": lambda r: r["student"],
    "labels": lambda r: r["labels"],
    "measured": lambda r: scores(r["result"]),
    "best": lambda r: scores(r["result"], "best"),
    "n": lambda r: str(r["result"]["last"]["n"]),
    "differs from the nearest cell in": lambda r: _shortened(r["why"]),
}


def columns_of(table, rows):
    """{title: function}, without teacher, student or IPC where no row has one."""
    columns = dict({6: COST_COLUMNS, OTHER: OTHER_COLUMNS}.get(table, COLUMNS))
    for title in ("teacher", "student", "IPC", "generator"):
        if title in columns and not any(columns[title](row) for row in rows):
            del columns[title]
    return columns


NOTES = (
    "Top-1 in percent, mean ± sample standard deviation over n students; measured: last epoch, best: best epoch on "
    "the test set. random real: as many real images a class, same teacher and recipe; hard labels: the same images "
    "with their class index; over n students too, where nothing else is said. Blank: not run."
)
COST_NOTES = (
    "Seconds and peak GPU memory of stage 2, one image at a time as the paper, and 32 at a time. Blank: not run, for "
    "memory also: not on a GPU. *: made in several runs; of the images of those that ended by themselves."
)
OTHER_NOTES = "Top-1 in percent, mean ± sample standard deviation over n students; no cell above shows these."


def notes(table):
    return {6: COST_NOTES, OTHER: OTHER_NOTES}.get(table, NOTES)


def heading(table, addition=""):
    """'Table 1: CIFAR-10/100', and what a reader has to know of its numbers."""
    title = f"Other results: {TITLES[OTHER]}" if table == OTHER else f"Table {table}: {TITLES[table]}"
    return f"{title}. {addition}" if addition else title


def file_name(table, suffix):
    return f"other_results.{suffix}" if table == OTHER else f"table{table}.{suffix}"


def markdown(table, rows, title):
    columns = columns_of(table, rows)
    lines = [f"### {title}", ""]
    grid = [list(columns), *[[f(row) for f in columns.values()] for row in rows]]
    widths = [max(len(line[c]) for line in grid) for c in range(len(columns))]
    for n, line in enumerate(grid):
        lines.append("| " + " | ".join(word.ljust(width) for word, width in zip(line, widths)) + " |")
        if n == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, "", notes(table), ""])


def latex(table, rows, title):
    """A table with booktabs; a rule between data sets and numbers of images a class, D4M's own rows in bold."""
    columns = columns_of(table, rows)
    right = ("IPC", "n", "measured", "best", "pixels", "random real", "hard labels")
    align = "".join("r" if name in right or name.startswith(("paper", "measured")) else "l" for name in columns)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}[t]",
        "\\centering\\small",
        f"\\caption{{{_escape(title)}. {_escape(notes(table))}}}",
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


def as_json(table, rows, title):
    """The same rows with every value in full."""

    def plain(value):
        if isinstance(value, dict) and "path" in value:
            keep = ("path", "last", "best", "recipe", "images", "generator", "generator_sha256", "teacher", "student")
            return {k: value[k] for k in keep}
        return value

    rows = [{k: plain(v) for k, v in row.items()} for row in rows]
    return json.dumps({"table": table, "title": title, "rows": rows}, indent=1, ensure_ascii=False) + "\n"


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
    parser.add_argument(
        "--diffusion_checkpoints_path",
        default=DEFAULT_CHECKPOINT,
        help="the Stable Diffusion whose images count; results with others are listed apart",
    )
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
    checkpoint = model_name(args.diffusion_checkpoints_path)
    for table in args.table:
        rows = table_rows(
            table,
            lambda cell: match_all(cell, results, checkpoint),
            teachers,
            lambda dataset: find_costs(args.output_root, dataset, checkpoint),
        )
        if args.dataset:
            rows = [row for row in rows if row["dataset"] == DATASET_TITLES.get(args.dataset)]
        show(table, rows, args.format, args.output, generator_note(checkpoint))
    others = other_rows(results, checkpoint, [args.dataset] if args.dataset else tuple(CLASSES))
    show(OTHER, others, args.format, args.output)


def generator_note(checkpoint):
    """What a table's heading says of images of another model than the paper's."""
    return "" if checkpoint == DEFAULT_CHECKPOINT else f"Images by {checkpoint} (the paper: Stable Diffusion v1-5)"


def show(table, rows, form, folder=None, addition=""):
    """Print a table, or write it into `folder`; one without rows is left out."""
    if not rows:
        return
    render, suffix = FORMATS[form]
    text = render(table, rows, heading(table, addition))
    if folder is None:
        print(text)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / file_name(table, suffix)
    write_text(path, text)
    print(path)


if __name__ == "__main__":
    main()
