"""The baseline of every result: as many real images per class, chosen at random.

    python -m distillation.random_real --dataset imagenet --data_dir data/imagenet --ipc 10

They keep their aspect ratio (shorter side to the saved size, then the central square) and are
written in the form of stage 2, so that stages 3 and 4 treat them like synthetic ones.
"""

from pathlib import Path

from PIL import Image

from distillation import datasets, image_folder
from scripts import files, output, runtime
from scripts.runtime import Parser, entry_point, number


def centre_square(image, size):
    """PIL image -> (size, size): shorter side resized, centre kept."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def get_args(argv=None):
    parser, seed = Parser("distillation.random_real", __doc__), number(int, 0)
    parser.setting("--ipc", type=number(int, 1), default=1, help="images per class")
    parser.setting("--seed", type=seed, default=0, short="seed", help="of the choice")
    image_folder.add_size_flags(parser)
    datasets.add_dataset_flags(parser)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    part = (args.label_file_path, args.classes, args.max_images_per_class, args.download)
    split = datasets.open_split(args.dataset, args.data_dir, "train", *part)
    datasets.check_class_sizes(split, args.ipc)
    items = datasets.choose_images(split, args.ipc, args.seed).items
    name = output.folder_name(f"{args.dataset}_ipc{args.ipc}_random", *args.settings.parts())
    inputs = {"images": split.fingerprint(), "real_images": split.count}
    inputs["prompts"] = files.digest_of(split.prompts)

    def picture(job):
        return centre_square(split.read(items[job.position][job.i]), args.image_size)

    def source(job):
        return Path(str(items[job.position][job.i])).name

    what = ({"arm": "random", **args.settings}, inputs, process, datasets.class_table(split))
    return image_folder.save_real(args.save_init_image_path, name, *what, picture, source)


if __name__ == "__main__":
    main()
