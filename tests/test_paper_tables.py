"""The right cell gets the right number; what is no cell's number stands aside, and says why."""

import json
import re

import pytest

from distillation.datasets import ALL, known_prompts
from matching import batches, evaluation, models, train_teacher
from scripts import files, output
from scripts.generators import DEFAULT_CHECKPOINT
from validate import paper_tables
from validate.paper_tables import PAPER, PAPER_ROWS, table_of

OWN = {"imagenet": "", "tiny_imagenet": "_tnimgnt", "cifar10": "_cf10", "cifar100": "_cf100"}
OWN |= {"digits": "_digits"}
NETWORK = "convnet_w128"
CIFAR10 = ("cifar10", 10, "d4m", "cifar10_ipc10_s0.7_g8_kmexpand1", NETWORK, NETWORK)


def teacher_arguments(dataset, arch, **changed):
    """What train_teacher records of a teacher by its own recipe."""
    settings = train_teacher.get_args(["--dataset", dataset, "--arch", arch]).settings
    counts = ALL[dataset].train_images, PAPER["test_images"].get(dataset)
    own = {"bn_batch": settings["batch_size"], "train_images": counts[0], "val_images": counts[1]}
    return {**settings, **own, **changed}


def fake(root, name, dataset, ipc, arm, images, student, teacher, mean, hard=False, n=3, **changed):
    """A results.json as stage 4 writes it, with top-1 values around `mean`.

    changed   {"images.classes": 7, ...}: other values than those of the paper's run
    """
    [args] = paper_tables.students(f"train_FKD{OWN[dataset]}.sh", (("STUDENT", student),))
    given = {flag: value for flag, value in args.settings.items() if value is not None}
    arguments = {"use_fp16": True, **batches.PROTOCOL, **given, "hard_label": hard}
    arguments |= {"dataset": dataset, "test_images": PAPER["test_images"].get(dataset)}
    classes, source = len(known_prompts(dataset)), "imagenet" if arm == "d4m-g" else dataset
    model = {"model": DEFAULT_CHECKPOINT, "revision": None, "precision": "fp16"}
    made = {"name": images, "arm": arm, "ipc": ipc, "classes": classes, "count": ipc * classes}
    made["real_images"] = ALL[source].train_images
    made["generator"] = None if arm == "random" else {**model, "unet_sha256": "u"}
    found = {"arguments": arguments, "images": made, "teacher": [], "labels": None}
    if not hard:
        public = f"torchvision {models.TEACHER_WEIGHTS.get(teacher)}"
        facts = {"arch": teacher, "weights": public, "sha256": "y", "arguments": None}
        if dataset != "imagenet":
            facts |= {"weights": "train_teacher", "arguments": teacher_arguments(dataset, teacher)}
        found |= {"teacher": [facts], "labels": {"amp": "none", "channels_last": False}}
    values = [mean + i - (n - 1) / 2 for i in range(n)]
    last, best = (evaluation.summary([v + more for v in values]) for more in (0, 0.5))
    found |= {"summary": {"last": {"top1": last}, "best": {"top1": best}}, "seeds": []}
    for where, value in changed.items():
        part, last = part_of(found, where)
        part[last] = value
    folder = root / "students" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(found))


def part_of(found, where):
    """(the part of a nested value that holds it, its key there) of a path like "teacher.0.arch"."""
    *path, last = where.split(".")
    for key in path:
        found = found[int(key) if key.isdigit() else key]
    return found, last


CELLS = [row for row in PAPER_ROWS if "make" in row and table_of(row) != 6]


def test_every_cells_command_makes_that_cell_alone(capsys):
    paper_tables.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    tables = [int(re.search(r"# table (\d)", line)[1]) for line in lines]
    assert [tables.count(n) for n in range(1, 7)] == [4, 24, 18, 12, 15, 2]
    first = "DATASET=imagenet IPC=10 METHOD=d4m TEACHER=resnet18 STUDENT=resnet18"
    assert f"{first} sh validate/table2.sh  # table 2, paper 27.9" in lines
    for row in CELLS:
        make, needs = row["make"], paper_tables.needs(row, "x")
        script = f"table{table_of(row)}.sh"
        assert len(paper_tables.students(script, (*make.items(),))) == 3 == len(needs)
        assert {wanted["student"] for wanted in needs.values()} == {make["STUDENT"]}
        assert paper_tables.DATASET_TITLES[make["DATASET"]] == row["dataset"]
        assert make["IPC"] == str(row["ipc"])


# ---- the right number

MODEL = {"model": "sd15-tuned", "revision": None, "unet_sha256": "u"}
OTHER_MODEL = {"model": DEFAULT_CHECKPOINT, "revision": None, "unet_sha256": "w"}
MORE = "another result over as many students or more is shown"
DECOYS = {  # suffix of its folder -> (what is changed, what it is listed with)
    "a": ({"arguments.batch_size": 7}, "batch_size 7"),
    "b": ({"n": 1}, MORE),
    "c": ({"images.name": "cifar10_ipc10_s0.5_g8_kmexpand1"}, "images cifar10_ipc10_s0.5"),
    "d": ({"teacher.0.arch": "vgg11"}, "teacher ['vgg11']"),
    "e": ({"teacher.0.weights": "file"}, "weights ['file']"),
    "f": ({"images.classes": 7}, "classes 7"),
    "g": ({"arguments.amp": "bf16"}, "amp bf16"),
    "j": ({"arguments.flip": 0.0}, "flip 0.0"),
    "h": ({"images.generator": MODEL}, "generator sd15-tuned"),
    "i": ({"images.generator": OTHER_MODEL}, f"generator {DEFAULT_CHECKPOINT} (another model"),
    "l": ({"arguments.test_images": 100}, "test_images 100"),
    "n": ({"images.real_images": 500}, "real_images 500"),
    "r": ({"labels.amp": "bf16"}, "labels' amp bf16"),
    "s": ({"labels.channels_last": True}, "labels' channels_last True"),
    "t": ({"images.count": 99}, "count 99"),
    "m": ({"teacher.0.arguments.epochs": 3}, "teacher's ['epochs 3']"),
    "o": ({"teacher.0.arguments.bn_batch": 16}, "teacher's ['bn_batch 16']"),
    "q": ({"teacher.0.arguments.train_images": 9}, "teacher's ['train_images 9']"),
}
OF_OUR_TEACHERS = ("m", "o", "q")  # torchvision's say nothing of their training


def key_of(wanted):
    return wanted["images"], wanted["student"], *wanted.get("teacher", [])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Results of every cell and baseline, among decoys that differ in one thing each."""
    root, with_decoys = tmp_path_factory.mktemp("output"), set()
    for row in CELLS:
        for which, wanted in paper_tables.needs(row, "x").items():
            if key_of(wanted) in VALUES:
                continue
            n, dataset = len(VALUES), row["make"]["DATASET"]
            VALUES[key_of(wanted)] = 1 + 0.1 * n  # no other result and no decoy has it
            own = (dataset, int(row["make"]["IPC"]), wanted["arm"], wanted["images"])
            own += (wanted["student"], row["make"]["TEACHER"])
            fake(root, f"{n:03d}", *own, VALUES[key_of(wanted)], which == "hard")
            if which == "result" and dataset not in with_decoys:
                with_decoys.add(dataset)
                for suffix, (changed, _) in DECOYS.items():
                    if dataset != "imagenet" or suffix not in OF_OUR_TEACHERS:
                        changed = {"n": 9, **changed}
                        fake(root, f"{n:03d}{suffix}", *own, 90 + n / 100, **changed)
    return root


VALUES = {}


def test_the_right_cell_gets_the_right_number(root):
    rows, others = paper_tables.measured(root, DEFAULT_CHECKPOINT)
    for row in rows:
        needs = paper_tables.needs(row, "x") if row.get("make", {}).get("STUDENT") else {}
        for which in ("result", "random", "hard"):
            found, wanted = row.get(which), needs.get(which)
            assert bool(found) == bool(wanted)
            if found:
                assert found["last"]["mean"] == pytest.approx(VALUES[key_of(wanted)])
                assert found["last"]["n"] == 3 and found["recipe"] == "d4m"
    names = [row["path"].split("/")[-2] for row in others]
    assert names == sorted(p.name for p in (root / "students").iterdir() if p.name[3:])
    for name, row in zip(names, others):
        assert row["why"][0].startswith(DECOYS[name[3:]][1]), (name, row["why"])


def test_another_generator_fills_cells_only_where_it_is_named(root, capsys):
    rows, _ = paper_tables.measured(root, "sd15-tuned")
    row = next(row for row in rows if row.get("make", {}).get("DATASET") == "cifar10")
    random = VALUES[key_of(paper_tables.needs(row, "x")["random"])]
    assert row["result"]["generator"] == "sd15-tuned" and row["result"]["last"]["mean"] >= 90
    assert row["random"]["last"]["mean"] == pytest.approx(random) and row["hard"] is None
    argv = ["--output_root", str(root), "--table", "1", "--dataset", "cifar10"]
    paper_tables.main([*argv, "--diffusion_checkpoints_path", "sd15-tuned"])
    assert "Images by sd15-tuned" in capsys.readouterr().out.splitlines()[0]
    paper_tables.main(argv)
    text, aside = capsys.readouterr().out.split("### Other results")
    assert "Images by" not in text and aside.count("| CIFAR-10 ") == len(DECOYS)


def test_markdown_latex_and_json_agree(tmp_path, capsys):
    """A baseline over another number of students says so."""
    fake(tmp_path, "d4m", *CIFAR10, 50.0)
    random = (*CIFAR10[:2], "random", "cifar10_ipc10_random", *CIFAR10[4:])
    fake(tmp_path, "random", *random, 45.0, n=2)
    fake(tmp_path, "hard", *CIFAR10, 40.0, hard=True)
    fake(tmp_path, "other", *CIFAR10, 60.0, **{"arguments.epochs": 3})
    for form in paper_tables.FORMATS:
        where = ["--output_root", str(tmp_path), "--format", form, "--output", str(tmp_path)]
        paper_tables.main([*where, "--table", "1", "3", "--dataset", "cifar10"])
    assert "other_results.md" in capsys.readouterr().out
    text, tex = ((tmp_path / f"table1.{suffix}").read_text() for suffix in ("md", "tex"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    body = [line for line in tex.splitlines() if line.endswith("\\\\")]
    rows = json.loads((tmp_path / "table1.json").read_text())["rows"]
    assert len(lines) - 2 == len(body) - 1 == len(rows) and not (tmp_path / "table3.md").exists()
    assert len({line.count("|") for line in lines}) == 1 == len({b.count(" & ") for b in body})
    assert not re.search(r"(?<!\\)[%#_]", tex.replace("% \\usepackage", ""))
    [row] = [row for row in rows if row.get("result")]
    assert row["result"]["last"]["mean"] == 50.0 and row["top1"] == 56.2
    [line] = [line for line in lines if "| 56.2 ± 0.4 |" in line]
    words = [word.strip() for word in line.split("|")[7:-1]]
    assert words == ["50.0 ± 1.0", "50.5 ± 1.0", "3", "45.0 ± 0.7 (n = 2)", "40.0 ± 1.0"]
    [line] = [line for line in body if " 50.0 $\\pm$ 1.0 & " in line]
    assert line.endswith(r"& 3 & 45.0 $\pm$ 0.7 (n = 2) & 40.0 $\pm$ 1.0 \\")


def test_of_several_teachers_the_table_takes_those_of_its_recipe(tmp_path):
    def teacher(name, top1, arch=NETWORK, **changed):
        scores = {which: {"epoch": 1, "top1": top1} for which in ("last", "best")}
        found = {"arguments": teacher_arguments("cifar10", arch, **changed), "parameters": 1}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(found | scores))

    def full():
        rows, _ = paper_tables.measured(tmp_path, "x")
        return next(row for row in rows if row["method"] == "Full dataset")["result"]

    teacher("z", 70.0, epochs=5)
    found = paper_tables.find_teachers(tmp_path)
    assert found["cifar10", NETWORK]["differs"] == ["epochs 5"] and full() is None
    teacher("a", 84.0)
    teacher("b", 86.0, seed=1)
    for name, changed in (("c", {"classes": ["0-4"]}), ("y", {"val_images": 100})):
        teacher(name, 50.0, **changed)
    for seed in range(3):  # another recipe, over more seeds
        teacher(f"x{seed}", 40.0, max_scale_crops=0.9, seed=seed)
    teacher("d", 95.0, arch="resnet18")
    assert (full()["last"]["mean"], full()["last"]["n"]) == (85.0, 2)


def test_what_was_not_run_is_blank(tmp_path, capsys):
    paper_tables.main(["--output_root", str(tmp_path)])
    text = capsys.readouterr().out
    assert text.count("### Table") == 6 and "Other results" not in text
    keys = ("top1", "std", "sec_per_image", "gpu_gb")
    numbers = {f"{row[key]:.1f}" for row in PAPER_ROWS for key in keys if row.get(key)}
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert set(re.findall(r"\d+\.\d+", "\n".join(lines))) == numbers


def test_a_cost_is_the_papers_generators_at_512_pixels(tmp_path, capsys):
    kinds = ((DEFAULT_CHECKPOINT, 512), ("sd-tiny", 512), (DEFAULT_CHECKPOINT, 256))
    for name, units, seconds in (("batch1", 100, 200.0), ("batch32", 40, 20.0)):
        for n, (model, size) in enumerate(kinds):
            folder = tmp_path / "cost" / name / "images" / f"imagenet_ipc10_s0.7_{n}"
            folder.mkdir(parents=True)
            made = {"generator": {"model": model, "revision": None}}
            made["prototype_arguments"] = {"size": size}
            manifest = {"stage": "images", "inputs": made, "count": 100, "files": {}}
            manifest["checksum"] = files.digest_of(manifest)
            (folder / output.MANIFEST).write_text(json.dumps(manifest))
            timing = {"units": units, "process_seconds": seconds * (9 if n else 1)}
            (folder / output.TIMING).write_text(json.dumps({**timing, "cuda_mib": 6144}))
    (tmp_path / "cost/batch1/images/imagenet_ipc10_s1").mkdir()  # not finished yet
    paper_tables.main(["--output_root", str(tmp_path), "--table", "6"])
    lines = [text for text in capsys.readouterr().out.splitlines() if "| D4M " in text]
    shown = [[word.strip() for word in line.split("|")[4:-1]] for line in lines]
    assert shown[0] == ["2.7", "2.00", "0.50*", "6.1", "6.0", "6.0*"]
    assert shown[1] == ["2.7", "", "", "6.1", "", ""]  # Tiny-ImageNet


ODD = ["arguments.hard_label", "summary.last", "teacher.0.arguments.dataset"]


@pytest.mark.parametrize("where", [*ODD, "images.generator.model"])
def test_a_result_that_does_not_say_what_it_is_is_one_line(where, tmp_path, refused):
    fake(tmp_path, "a", *CIFAR10, 50.0)
    path = tmp_path / "students" / "a" / "results.json"
    found = json.loads(path.read_text())
    part, last = part_of(found, where)
    part.pop(last)
    path.write_text(json.dumps(found))
    refused(paper_tables.main, ["--output_root", tmp_path], path)


def test_a_missing_root_is_refused(refused):
    refused(paper_tables.main, ["--output_root", "nowhere"], "--output_root nowhere")


@pytest.mark.parametrize("recipe", ["d4m", "cda", "rded", "rd3", "edc", "minimax"])
def test_a_recipe_is_named_by_its_launcher(recipe):
    dataset = "imagenette" if recipe == "minimax" else "imagenet"
    for ipc, student in ((10, "resnet18"), (50, "mobilenet_v2")):
        chosen = (("DATASET", dataset), ("IPC", str(ipc)), ("STUDENT", student))
        script = "train_FKD.sh" if recipe == "d4m" else f"train_FKD_{recipe}.sh"
        [args] = paper_tables.students(script, chosen)
        wanted = paper_tables.recipe(args.settings, args.hard_label)
        own = (dataset, ipc, student, args.hard_label)
        assert paper_tables.recipe_name(*own, wanted) == recipe
        for name in wanted:
            other = paper_tables.recipe_name(*own, {**wanted, name: 7.5})
            assert other != recipe, f"{name} is no part of what tells {recipe}"
