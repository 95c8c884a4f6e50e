"""The baseline that every result is to be read against: as many real images a class, chosen at random.

    python -m distillation.random_real --dataset imagenet --data_dir data/imagenet --ipc 10

They keep their aspect ratio (shorter side to the saved size, then the central square), and are written in the form of
stage 2, so that stages 3 and 4 treat them like synthetic ones.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m distillation.random_real", file=sys.stderr)
    sys.exit(2)

from pathlib import Path

import numpy as np
from PIL import Image

from distillation.datasets import DATASETS, BadImage, add_dataset_flags, open_split
from distillation.gen_prototype import check_class_sizes, choose_images, class_table
from distillation.gen_syn_image import finish_folder, list_jobs, picture_digest, save_png
from scripts.files import output_folder, output_name, require_space, write_timing
from scripts.runtime import (
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    entry_point,
    log_run,
    natural,
    positive_int,
    progress,
    refuse,
    this_process,
)


def centre_square(image, size):
    """PIL image -> (size, size): shorter side resized, centre kept."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def get_args(argv=None):
    parser = Parser(prog="distillation.random_real", description=__doc__.split("\n")[0])
    add_dataset_flags(parser)
    parser.add_argument("--ipc", type=positive_int, default=1, help="images a class")
    parser.add_argument("--seed", type=natural, default=0, help="of the choice")
    parser.add_argument("--image_size", type=positive_int, default=None, help="pixels of the saved PNGs [by data set]")
    parser.add_argument("--save_init_image_path", default="output/images", help="the folder is made below this one")
    add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device, args.shard)
    split = open_split(
        args.dataset,
        args.data_dir,
        "train",
        args.label_file_path,
        args.classes,
        args.max_images_per_class,
        args.download,
    )
    check_class_sizes(split, args.ipc, "error")
    chosen = choose_images(split, args.ipc, args.seed)
    size = args.image_size or DATASETS[args.dataset].image_size
    settings = {
        "dataset": args.dataset,
        "arm": "random",
        "ipc": args.ipc,
        "seed": args.seed,
        "image_size": size,
        "classes": args.classes,
        "max_images_per_class": args.max_images_per_class,
        "images_sha256": split.fingerprint(),
        "images": sum(map(len, split.items)),
    }
    name = output_name(
        f"{args.dataset}_ipc{args.ipc}_random",
        {"seed": args.seed, "imagesize": size, "classes": args.classes, "max": args.max_images_per_class},
        {"seed": 0, "imagesize": DATASETS[args.dataset].image_size, "classes": None, "max": 0},
    )
    folder = Path(args.save_init_image_path) / name
    classes = class_table(split)
    jobs = list_jobs(classes, args.ipc, args.ipc)
    require_space("--save_init_image_path", folder, len(jobs) * size**2 * 2, [job.file for job in jobs])
    watch = Stopwatch()
    with output_folder("--save_init_image_path", folder, settings, process) as settings:
        digest = picture_digest(settings)
        todo = [job for job in jobs[process.rank :: process.world] if not (folder / job.file).exists()]
        with StopSignals() as signals:
            for job in progress(todo, desc="random", unit="image", quiet=not process.is_main):
                item = chosen.items[job.position][job.i]
                try:
                    picture = np.array(centre_square(split.read(item), size))
                except BadImage as error:
                    refuse(error)
                save_png(folder / job.file, picture, size, {"source": Path(str(item)).name}, digest)
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
