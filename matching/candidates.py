"""One of several images per prototype, chosen by a teacher, as an image folder of its own.

    python -m distillation.gen_syn_image --ipc 40 --num_prototypes 10 ...   # four of each
    python -m matching.candidates --keep confident --arch convnet_w128 \\
        --image_path output/images/cifar10_ipc40_s0.7_g8_kmexpand1_protos10

The rule is that of the code of CaO2's first stage (arXiv 2506.22637): images that the teacher takes
for their class come first; among these the most confident (CaO2 at IPC 10) or the least confident
(at IPC 50). CaO2 chooses from all images of a class, here each prototype keeps one; where the
teacher takes none for its class, the image closest to that is kept, in CaO2 the next in its order.
CaO2's second stage, which optimises the latents, is not done. The class is the unit of work.
"""

import functools
import re
from pathlib import Path

import torch

from distillation import datasets, gen_syn_image, image_folder
from matching import batches, generate_soft_label, models
from matching import images as image_sets
from scripts import output, runtime
from scripts.runtime import Parser, entry_point, number, refuse


def choose(logits, target, keep):
    """Which of M images is kept, and what the teacher thinks of it.

    logits   (M, classes);   target: the images' class;   keep: "confident" or "hard"
    Returns (number of the image, {"probability" of its class, "right": the teacher takes it for
    its class}).
    """
    p = logits.double().softmax(1)[:, target]
    right = logits.argmax(1) == target
    order = -p if keep == "hard" and right.any() else p
    best = int(torch.where(right | ~right.any(), order, -torch.inf).argmax())
    return best, {"probability": round(p[best].item(), 4), "right": bool(right[best])}


def kept_per_class(where, name, manifest):
    """How many prototypes each class has; refuses fewer than two images of each.

    name   of the folder, which says it where there is no manifest yet
    """
    found, made = re.search(r"_protos(\d{1,9})", name), manifest and manifest["arguments"]
    count = made.get("num_prototypes") if made else found and int(found[1])
    if made and made.get("arm") in ("decoded", "noise", "text"):
        refuse(f"{where}: made as {made['arm']}; there are no different images of one prototype")
    if not count or (made and 2 * count > made["ipc"]):
        what = "not several images of each prototype"
        refuse(f"{where}: {what}; --ipc 40 --num_prototypes 10 of gen_syn_image makes four")
    return count


def folder_name(source, kept, settings):
    """`cifar10_ipc10_confident_convnet_w128_from_` + the name of the candidates' folder."""
    arch = re.sub("[^A-Za-z0-9_.-]", "-", settings["arch"])
    stem = f"{source.split('_ipc')[0]}_ipc{kept}_{settings['keep']}_{arch}_from_{source}"
    return output.folder_name(stem, *settings.parts())


def choose_images(out, jobs, images, rows, teachers, num_workers):
    """Choose and write the images of each class that is not on disk yet.

    jobs   of the images that are kept;   rows: {file: row of images.jsonl} of the candidates
    """
    kept, many = out.settings["ipc"], out.settings["candidates"]
    units, facts = gen_syn_image.cut(jobs, kept), datasets.ALL[images.dataset]
    bytes_each = kept * images.image_size**2 * 2
    todo = out.todo(units, lambda unit: [job.file for job in unit], bytes_each)
    with out.progress(total=len(todo) * kept, desc="candidates", unit="image") as bar:
        for unit in todo:
            files = [job._replace(i=job.i + m * kept).file for job in unit for m in range(many)]
            part = images._replace(files=tuple(files))
            arrays, _ = image_sets.load_pixels("--image_path", part, num_workers)
            pixels = torch.stack([torch.tensor(array) for array in arrays])
            x = batches.normalise(pixels.to(out.process.device), facts.mean, facts.std)
            logits = generate_soft_label.teacher_logits(teachers, x, half=False).cpu()
            chosen = []
            for job, own, names in zip(unit, logits.split(many), gen_syn_image.cut(files, many)):
                best, found = choose(own, job.position, out.settings["keep"])
                source = {**rows[names[best]], "source": names[best]}
                chosen.append({**source, **found, "file_name": job.file})
            out.log(event="images", rows=chosen)  # before the PNGs: images.jsonl is made from it
            for row in chosen:
                out.write(row["file_name"], (images.root / row["source"]).read_bytes())
            bar.update(kept)
            out.made += kept
            out.leave_if_asked()


def get_args(argv=None):
    parser = Parser("matching.candidates", __doc__)
    several = "images of stage 2, several per prototype"
    parser.flag("--image_path", required=True, metavar="DIR", help=several)
    kinds = "of those taken for their class the most, or the least confident"
    parser.setting("--keep", choices=["confident", "hard"], default="confident", help=kinds)
    first = "choose among the first M of each prototype [all]"
    parser.setting("--candidates", type=number(int, 2), metavar="M", short="of", help=first)
    parser.setting("--arch", type=models.model_name, default="resnet18", help="who chooses")
    weights = "its weights: a folder of train_teacher, or a file [torchvision's]"
    parser.flag("--teacher_checkpoint", help=weights)
    where = "the folder is made below this one"
    parser.flag("--save_init_image_path", default="output/images", help=where)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    flag, path, root = "--image_path", args.image_path, args.save_init_image_path
    checkpoints = args.teacher_checkpoint and [args.teacher_checkpoint]
    waits_for = args.dry_run and generate_soft_label.missing_inputs(path, checkpoints)
    source, size, classes, count = image_sets.outlook(flag, path)
    manifest = None
    if not (waits_for and output.awaited(path, "")):
        manifest = image_folder.read_images(flag, path)
    kept = kept_per_class(f"{flag} {path}", source, manifest)
    settings = args.settings.filled(candidates=count // max(classes, 1) // kept)
    many, all_of_it = settings["candidates"], settings.defaults["candidates"]
    if many > all_of_it > 0:
        refuse(f"--candidates {many}: {flag} {path} has {all_of_it} images of each prototype")
    name = folder_name(source, kept, settings)
    if waits_for:
        needed = classes * kept * (size or 0) ** 2 * 2
        return output.plan(Path(root) / name, 0, classes * kept, needed, waits_for)
    images = image_sets.open_images(flag, path)
    which = images.dataset, images.folders, images.image_size, process.device
    teachers, [facts] = generate_soft_label.load_teachers([args.arch], checkpoints, *which)
    inputs = {"source": images.content, "teacher": facts["sha256"]}
    inputs["source_manifest"] = {part: manifest[part] for part in ("arguments", "inputs")}
    settings = {"arm": "candidates", "ipc": kept, **settings}
    where, table = ("--save_init_image_path", root, name, "images"), manifest["classes"]
    candidates = images, image_sets.read_rows(flag, path, manifest)
    with output.Output(*where, settings, inputs, process) as out:
        jobs = image_folder.list_jobs(table, kept, kept)
        choose_images(out, jobs, *candidates, teachers, args.num_workers)
        rows = functools.cache(lambda: image_folder.logged_rows(out.folder, jobs))
        facts = {"dataset": images.dataset, "image_size": size}
        image_folder.finish_images(out, jobs, table, lambda job: rows()[job.file], **facts)
    return out.folder


if __name__ == "__main__":
    main()
