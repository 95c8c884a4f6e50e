"""D4M-G (paper, table 2): a data set's classes, taken out of the distilled images of a larger one
by wnid, and resized.

    python -m distillation.take_classes --dataset tiny_imagenet \\
        --image_path output/images/imagenet_ipc50_s0.7_g8_kmexpand1

All 200 wnids of Tiny-ImageNet are among the 1000 of ImageNet-1K: the folder name decides. Stages 3
and 4 treat the result like images distilled from the smaller set itself.
"""

import re
from pathlib import Path

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
    parser, sets = Parser("distillation.take_classes", __doc__), "whose classes are taken"
    source = "finished images of the larger data set"
    parser.flag("--image_path", required=True, metavar="DIR", help=source)
    parser.setting("--dataset", type=datasets.name, default="tiny_imagenet", help=sets)
    image_folder.add_size_flags(parser)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    source, size, root = Path(args.image_path), args.image_size, args.save_init_image_path

    def name(ipc):
        stem = f"{args.dataset}_ipc{ipc}_from_{source.resolve().name}"
        return output.folder_name(stem, *args.settings.parts())

    waits_for = args.dry_run and output.awaited(source, "distillation.gen_syn_image")
    if waits_for:
        ipc = int((re.findall(r"_ipc(\d{1,9})", source.name) or [0])[0])
        count = len(datasets.known_prompts(args.dataset)) * ipc
        return output.plan(Path(root) / name(ipc), 0, count, count * size**2 * 2, waits_for)
    manifest = image_folder.read_images("--image_path", source)
    classes, ipc = taken_classes(args.dataset, manifest, f"--image_path {source}"), manifest["ipc"]
    settings = {"arm": f"{manifest['arm']}-g", "ipc": ipc, **args.settings}
    made_by = {part: manifest[part] for part in ("arguments", "inputs")}
    inputs = {"source": manifest["content"], "source_manifest": made_by}

    def picture(job):
        output.check_file("--image_path", source, job.file, manifest)
        return datasets.read_rgb(source / job.file)

    what = (settings, inputs, process, classes, picture, lambda job: job.file)
    return image_folder.save_real(root, name(ipc), *what)


if __name__ == "__main__":
    main()
