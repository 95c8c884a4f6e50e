"""What an image folder is: `{class}/{class}_0000.png`, images.jsonl, a data card, a manifest."""

import io
import json
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from distillation import datasets
from scripts import files, output
from scripts.runtime import number, refuse, warn

FROM_PROTOTYPES = ("d4m", "decoded")  # arms


class Job(NamedTuple):
    """One image to make: number `i` of class `position`, from prototype number `prototype`."""

    position: int
    class_id: int  # in the whole data set
    folder: str
    prompt: str
    i: int
    prototype: int
    condition: str | int  # what the generator takes for the class: its prompt, as a rule

    @property
    def file(self):
        return f"{self.folder}/{self.folder}_{self.i:04d}.png"


def list_jobs(classes, ipc, num_prototypes, conditions=None):
    """Every image, class by class; where prototypes are fewer, each gives several images.

    conditions   what the generator takes for each class [its prompt]
    """
    conditions = conditions or [c["prompt"] for c in classes]
    return [
        Job(position, c["index"], c["folder"], c["prompt"], i, i % num_prototypes, condition)
        for position, (c, condition) in enumerate(zip(classes, conditions))
        for i in range(ipc)
    ]


def add_size_flags(parser):
    """The flags of everything that writes images."""
    pixels = {"type": number(int, 1), "default": datasets.default("image_size")}
    parser.setting("--image_size", **pixels, short="imagesize", help="of a PNG [by data set]")
    root, below = "output/images", "the folder is made below this one"
    parser.flag("--save_init_image_path", default=root, help=below)


# ---- writing


def folder_name(settings, parts, prototype_seed):
    """`{dataset}_ipc{ipc}_s{strength}_g{guidance}_kmexpand{k}` or `{dataset}_ipc{ipc}_{arm}`, plus
    what is not the default in stage 2, then in stage 1.

    parts    {setting of stage 1: [what it adds]};   prototype_seed: None if not known
    """
    s, arm, from_prototypes = settings, settings["arm"], settings["arm"] in FROM_PROTOTYPES
    method = f"s{s['strength']:g}_g{s['guidance_scale']:g}_kmexpand{s['km_expand']}"
    stem = f"{s['dataset']}_ipc{s['ipc']}_{method if arm == 'd4m' else arm}"
    silent = {"noise": (), "text": ("strength", "noise_level")}
    silent = silent.get(arm, ("strength", "guidance_scale"))
    words = s.only([name for name in s if name not in silent]).parts()
    if arm == "decoded" and parts and s["km_expand"] != 1:
        words.append(f"kmexpand{s['km_expand']}")
    for name, more in parts.items():
        if name in ("size", "classes") or (from_prototypes and name not in ("seed", "dtype")):
            words += more
    if from_prototypes and prototype_seed not in (None, s["seed"]):
        words.append(f"protoseed{prototype_seed}")
    return output.folder_name(stem, *words)


def save_pngs(out, jobs, pictures, image_size):
    """(H, W, 3) uint8 -> PNGs of image_size: Pillow's default filter, bicubic, as the release."""
    for job, picture in zip(jobs, pictures):
        image, stream = Image.fromarray(picture), io.BytesIO()
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size))
        image.save(stream, format="PNG")
        out.write(job.file, stream.getvalue())


def save_real(root, name, settings, inputs, process, classes, picture_of, source_of):
    """A whole image folder of pictures that are there already; returns it.

    picture_of    job -> PIL image; may raise BadImage
    source_of     job -> what images.jsonl says that it was
    """
    jobs, size = list_jobs(classes, settings["ipc"], settings["ipc"]), settings["image_size"]
    where = ("--save_init_image_path", root, name, "images")
    with output.Output(*where, settings, inputs, process) as out:
        todo = out.todo(jobs, lambda job: [job.file], size**2 * 2)
        with out.progress(total=len(todo), desc=settings["arm"], unit="image") as bar:
            for job in out.steps(todo):
                try:
                    picture = picture_of(job)
                except datasets.BadImage as error:
                    refuse(error)
                save_pngs(out, [job], [np.array(picture)], size)
                bar.update()
        finish_images(out, jobs, classes, lambda job: {"source": source_of(job)})
    return out.folder


def logged_rows(folder, jobs):
    """{file: what images.jsonl says of it}, as the log has it from when the image was made.

    Where the log was lost, nobody knows how often an image was drawn again: its seed is null.
    """
    lines = [line["rows"] for line in output.log_rows(folder) if line.get("event") == "images"]
    rows = {row["file_name"]: row for line in lines for row in line}
    lost = [job.file for job in jobs if job.file not in rows]
    if lost:
        warn(f"{folder}: {len(lost)} images are not in {output.LOG}, so images.jsonl has no seed")
    return rows | {name: {"seed": None, "attempt": None} for name in lost}


def finish_images(out, jobs, classes, row_of, words="images", **facts):
    """Write images.jsonl, the data card and the manifest, once every PNG is there.

    row_of    job -> what images.jsonl says of it beside its class
    facts     what else the manifest says: dataset, arm, ipc and image_size, where they are not
              among the settings
    """
    names, known = ("dataset", "arm", "ipc", "image_size"), {**out.settings, **facts}
    facts |= {name: known[name] for name in names} | {"count": len(jobs), "classes": classes}

    def line(job):
        row = {"file_name": job.file, "class_index": job.class_id, "folder": job.folder}
        return json.dumps({**row, "prompt": job.prompt, **row_of(job)}, ensure_ascii=False) + "\n"

    # not metadata.jsonl: under that name Hugging Face's imagefolder drops the folder labels
    derived = {"images.jsonl": lambda: "".join(map(line, jobs))}
    made = facts, out.settings, out.inputs
    derived["README.md"] = lambda: data_card(*made, map(json.loads, map(line, jobs)))
    out.finish(facts, derived, words, _next_stage(out.folder, facts["dataset"]))
    if words_of_loaders := misread([c["folder"] for c in classes]):
        print(f"{out.folder}: {words_of_loaders}")


def misread(folders):
    """What to say where a class is called like a split: who misreads it, what reads it right."""
    for name in folders:
        if set(re.split("[-._ 0-9]", name)) & datasets.EVERY_SPLIT:
            return (
                f'class {name} is called like a split: load_dataset("imagefolder", data_dir=DIR) '
                'and timm\'s create_dataset("", DIR) may lose the others; what reads them: '
                'load_dataset(DIR), ImageFolder(DIR), create_dataset("", DIR, search_split=False)'
            )
    return ""


def _next_stage(folder, dataset):
    """The command of stage 3; where it needs a teacher that is not there, of that."""
    if datasets.ALL[dataset].teacher == datasets.IMAGENET_TEACHER and dataset != "imagefolder":
        return ["matching.generate_soft_label", "--data", folder, "--arch", "resnet18"]
    teachers = sorted((folder.parent.parent / "teachers").glob(f"{dataset}_*/{output.MANIFEST}"))
    if not teachers:
        root = output.data_dir_of(folder) or datasets.usual_root(dataset)
        words = ["matching.train_teacher", "--dataset", dataset]
        return [*words, "--data_dir", root] if root else words
    arch = ["--arch", files.read_json(teachers[0])["arch"]]
    words = ["matching.generate_soft_label", "--data", folder, *arch]
    return [*words, "--teacher_checkpoint", teachers[0].parent]


MADE_AS = {
    "d4m": "prototypes noised, denoised under the class prompt and decoded (D4M, arXiv 2407.15138)",
    "decoded": "prototypes decoded without diffusion",
    "noise": "noise denoised from t = strength * T, no prototypes",
    "text": "text-to-image, no prototypes",
    "random": "real images chosen at random",
    "candidates": "of several images per prototype, one chosen by a classifier (CaO2, 2506.22637)",
    "stm": "images optimised further against a classifier's BatchNorm statistics (SRe2L's recover)",
}


def data_card(facts, settings, inputs, rows):
    """README.md of the image folder: a Hugging Face data card.   rows: of images.jsonl"""
    arm, taken = facts["arm"].removesuffix("-g"), facts["arm"].endswith("-g")
    how = MADE_AS[arm] + "; classes taken out of a larger distilled data set" * taken
    made = {"arguments": {}, "inputs": inputs}
    while "source_manifest" in made["inputs"]:  # optimised, chosen or taken from other images
        made = made["inputs"]["source_manifest"]
    settings = {**made["arguments"], **settings}
    if settings.get("guide") == "mode" and arm == "d4m":
        how = "noise denoised under the class prompt, drawn to prototypes (MGD3, 2505.18963)"
    if settings.get("negative_prompt", "") is None:  # of a family without prompts
        how = how.replace("class prompt", "class")
    names = ("model", "licence", "strength", "noise_level", "guidance_scale")
    names += ("scheduler", "num_inference_steps", "guide", "seed")
    details, usual = (
        {**settings, **(made["inputs"].get("generator") or {})},
        ("schedule", "own", "none"),
    )
    names = [name for name in names if details.get(name, "own") not in usual]
    listed = "".join(f"- {name}: {details[name]}\n" for name in names)
    warning, sizes = misread([c["folder"] for c in facts["classes"]]), cluster_sizes(inputs, rows)
    single = f" {list(sizes.values()).count(1)} of {len(sizes)} prototypes stand for a single"
    single = f"{single} photograph, which their images may show." if sizes else ""
    return f"""---
task_categories: [image-classification]
tags: [dataset-distillation]
configs:
- config_name: default
  data_files: [{{split: train, path: "*/*.png"}}]
  drop_labels: false
---
# {facts["dataset"]}, {facts["ipc"]} images per class

{len(facts["classes"])} classes, {facts["image_size"]} px PNG, one folder per class. Made as: {how}.

{listed}
`images.jsonl` has one line per image; `manifest.json` has every argument and the sha256 of every
file. The licences of the model and of the real images apply.{single}

`datasets.load_dataset(DIR)` (Hugging Face) and `torchvision.datasets.ImageFolder(DIR)` load it.
{warning}
"""


# ---- reading


def read_images(flag, folder):
    """The manifest of a finished image folder, which lists every image of its classes."""
    manifest, where = output.read_manifest(flag, folder, "images"), f"{flag} {folder}: its manifest"
    ipc = min(manifest["ipc"], len(manifest["files"]))  # a forged one could fill the memory
    for job in list_jobs(manifest["classes"], ipc, 1):
        if job.file not in manifest["files"]:
            refuse(f"{where} does not list {job.file}")
    if manifest["dataset"] not in datasets.ALL:
        refuse(f"{where} names an unknown data set {manifest['dataset']!r}")
    return manifest


def cluster_sizes(inputs, rows):
    """{(class folder, prototype): how many photographs its cluster holds}; {} where nobody knows.

    That is without prototypes, with the release's file, or after the log of the images was lost.
    inputs   of the manifest;   rows: of images.jsonl
    """
    while "source_manifest" in inputs:
        inputs = inputs["source_manifest"]["inputs"]
    rows = list(rows)
    known = inputs.get("prototype_arguments") and all("cluster_size" in row for row in rows)
    return {(r["folder"], r["prototype"]): r["cluster_size"] for r in rows} if known else {}


def origin(manifest):
    """{"generator": facts or None, "real_images": count or None}: what the images were made from,
    also where they were made of other images."""
    inputs = manifest["inputs"]
    while "source_manifest" in inputs:
        inputs = inputs["source_manifest"]["inputs"]
    return {name: inputs.get(name) for name in ("generator", "real_images")}
