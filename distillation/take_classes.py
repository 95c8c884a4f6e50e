"""D4M-G (paper, table 2): a data set's classes taken out of the distilled images of a larger one, by wnid, and
resized.

    python -m distillation.take_classes --image_path output/images/imagenet_ipc50_s0.7_g8_kmexpand1 --dataset
    tiny_imagenet

All 200 wnids of Tiny-ImageNet are among the 1000 of ImageNet-1K, so nothing but the folder name decides. The result
has the form of stage 2, so that stages 3 and 4 treat it like images distilled from the smaller set itself.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m distillation.take_classes", file=sys.stderr)
    sys.exit(2)

from pathlib import Path

import numpy as np

from distillation.datasets import DATASETS, BadImage, dataset_name, known_prompts, read_rgb
from distillation.gen_syn_image import finish_folder, list_jobs, picture_digest, read_image_manifest, save_png
from scripts.files import check_file, output_folder, output_name, require_space, write_timing
from scripts.runtime import (
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    entry_point,
    log_run,
    positive_int,
    progress,
    refuse,
    this_process,
)


def taken_classes(dataset, manifest, where):
    """The manifest's classes of `dataset`, in its order and with its indices; prompts stay what made the images."""
    has = {c["folder"]: c for c in manifest["classes"]}
    wanted = list(known_prompts(dataset)) or list(has)
    missing = [folder for folder in wanted if folder not in has]
    if missing:
        refuse(f"--dataset {dataset}: {where} lacks {len(missing)} of its {len(wanted)} classes, first {missing[0]}")
    return [{"index": n, "folder": folder, "prompt": has[folder]["prompt"]} for n, folder in enumerate(wanted)]


def taken_folder_name(dataset, ipc, source, image_size):
    """`tiny_imagenet_ipc50_from_{source folder}`"""
    return output_name(
        f"{dataset}_ipc{ipc}_from_{source}", {"imagesize": image_size}, {"imagesize": DATASETS[dataset].image_size}
    )


def get_args(argv=None):
    parser = Parser(prog="distillation.take_classes", description=__doc__.split("\n")[0])
    parser.add_argument("--image_path", required=True, metavar="DIR", help="finished images of the larger data set")
    parser.add_argument("--dataset", type=dataset_name, default="tiny_imagenet", help="whose classes are taken")
    parser.add_argument("--image_size", type=positive_int, default=None, help="pixels of the saved PNGs [by data set]")
    parser.add_argument("--save_init_image_path", default="output/images", help="the folder is made below this one")
    add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device, args.shard)
    source, where = Path(args.image_path), f"--image_path {args.image_path}"
    manifest = read_image_manifest("--image_path", source)
    size, ipc = args.image_size or DATASETS[args.dataset].image_size, manifest["ipc"]
    classes = taken_classes(args.dataset, manifest, where)
    jobs = list_jobs(classes, ipc, ipc)
    missing = next((job.file for job in jobs if job.file not in manifest["files"]), None)
    if missing:
        refuse(f"{where}: its manifest says ipc {ipc} and does not list {missing}")
    settings = {
        "dataset": args.dataset, "arm": f"{manifest['arm']}-g", "ipc": ipc, "image_size": size,
        "source": manifest["content"], "source_arguments": manifest["arguments"],
    }  # fmt: skip
    folder = Path(args.save_init_image_path) / taken_folder_name(args.dataset, ipc, source.resolve().name, size)
    require_space("--save_init_image_path", folder, len(jobs) * size**2 * 2, [job.file for job in jobs])
    watch = Stopwatch()
    with output_folder("--save_init_image_path", folder, settings, process) as settings:
        digest = picture_digest(settings)
        todo = [job for job in jobs[process.rank :: process.world] if not (folder / job.file).exists()]
        with StopSignals() as signals:
            for job in progress(todo, desc="take", unit="image", quiet=not process.is_main):
                check_file("--image_path", source, job.file, manifest)
                try:
                    picture = np.array(read_rgb(source / job.file))
                except BadImage as error:
                    refuse(error)
                save_png(folder / job.file, picture, size, {"source": job.file}, digest)
                signals.leave_if_asked()
            signals.leave_if_asked()
        cost = log_run(folder, process, watch, len(todo))
        missing = finish_folder(folder, jobs, settings, classes)
        if not missing:
            write_timing(folder)
    print(f"{folder}: {len(todo)} of {len(jobs)} images made in {cost}")
    return folder


if __name__ == "__main__":
    main()
