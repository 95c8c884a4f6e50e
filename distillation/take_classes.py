"""D4M-G (paper, table 2): a data set's classes, taken out of the distilled images of a larger one
by wnid, and resized.

    python -m distillation.take_classes --dataset tiny_imagenet \\
        --image_path output/images/imagenet_ipc50_s0.7_g8_kmexpand1

All 200 wnids of Tiny-ImageNet are among the 1000 of ImageNet-1K, so nothing but the folder name
decides. The result has the form of stage 2, so that stages 3 and 4 treat it like images distilled
from the smaller set itself.
"""

import re
from pathlib import Path

import numpy as np

from distillation import datasets, image_folder
from scripts import output, runtime
from scripts.runtime import Parser, entry_point, refuse


def taken_classes(dataset, manifest, where):
    """The manifest's classes of `dataset`, in its order and with its indices; prompts stay what
    made the images."""
    has = {c["folder"]: c["prompt"] for c in manifest["classes"]}
    wanted = list(datasets.known_prompts(dataset)) or list(has)
    missing = [folder for folder in wanted if folder not in has]
    if missing:
        lacks = f"{where} lacks {len(missing)} of its {len(wanted)} classes"
        refuse(f"--dataset {dataset}: {lacks}, first {missing[0]}")
    return [{"index": n, "folder": f, "prompt": has[f]} for n, f in enumerate(wanted)]


def get_args(argv=None):
    parser = Parser("distillation.take_classes", __doc__)
    source = "finished images of the larger data set"
    parser.flag("--image_path", required=True, metavar="DIR", help=source)
    whose = "whose classes are taken"
    parser.setting("--dataset", type=datasets.name, default="tiny_imagenet", help=whose)
    image_folder.add_size_flags(parser)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    source, each = Path(args.image_path), args.image_size**2 * 2

    def name(ipc):
        stem = f"{args.dataset}_ipc{ipc}_from_{source.resolve().name}"
        return output.folder_name(stem, *args.settings.parts())

    if args.dry_run and not output.is_complete(source):
        ipc = int((re.findall(r"_ipc(\d+)", source.name) or [0])[0])
        count = len(datasets.known_prompts(args.dataset)) * ipc
        waits_for = f"{source}: python -m distillation.gen_syn_image makes it"
        folder = Path(args.save_init_image_path) / name(ipc)
        return output.plan(folder, 0, count, count * each, waits_for)
    manifest = image_folder.read_images("--image_path", source)
    classes = taken_classes(args.dataset, manifest, f"--image_path {source}")
    ipc = manifest["ipc"]
    jobs = image_folder.list_jobs(classes, ipc, ipc)
    where = ("--save_init_image_path", args.save_init_image_path, name(ipc), "images")
    settings = {"arm": f"{manifest['arm']}-g", "ipc": ipc, **args.settings}
    made_by = {part: manifest[part] for part in ("arguments", "inputs")}
    inputs = {"source": manifest["content"], "source_manifest": made_by}
    with output.Output(*where, settings, inputs, process) as out:
        todo = out.todo(jobs, lambda job: [job.file], each)
        with out.progress(total=len(todo), desc="take", unit="image") as bar:
            for job in out.steps(todo):
                output.check_file("--image_path", source, job.file, manifest)
                try:
                    picture = datasets.read_rgb(source / job.file)
                except datasets.BadImage as error:
                    refuse(error)
                image_folder.save_png(out, job.file, np.array(picture), args.image_size)
                bar.update()
        image_folder.finish_images(out, jobs, classes, lambda job: {"source": job.file})
    return out.folder


if __name__ == "__main__":
    main()
