"""Stage 1, prototype learning (paper, section 3.2): images -> latents -> k-means -> prototypes.

    python -m distillation.gen_prototype --dataset imagenet --data_dir data/imagenet \\
        --ipc 10 --km_expand 1

The unit of work is the class: each process takes every world-th class, a class's file is written
when it is finished, and the same command goes on where a run stopped.
"""

import hashlib
import itertools
import math
import sys
import time

import numpy as np
import torch

from distillation import datasets, latent_cache, prototype_files, prototypes
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, number, refuse, warn

# ---- encode


class SquashedImages:
    """For read_ahead: (class position, image numbers) -> a batch, made in the reading process.

    A batch is: (B, 3, S, S) uint8 of the images that can be read (None: of none); their numbers;
    {number: what is wrong with it} of the others; and a hash of each picture, about 64 x 64 pixels
    of it, to find copies.
    """

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __getitem__(self, batch):
        position, numbers = batch
        images, bad, hashes = {}, {}, set()
        for n in numbers:
            try:
                picture = self.split.read(self.split.items[position][n])
            except datasets.BadImage as error:
                bad[n] = str(error)
                continue
            pixels = np.array(datasets.squash(picture, self.size))
            images[n] = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
            step = max(1, self.size // 64)
            hashes.add(hashlib.sha256(pixels[::step, ::step].tobytes()).digest())
        return torch.stack(list(images.values())) if images else None, list(images), bad, hashes


def class_order(split, position, seed):
    """The seeded shuffle of one class's images: k-means sees them in this order."""
    # differs from the release: seeded, and class by class
    rng = runtime.generator(seed, runtime.SHUFFLE, split.class_ids[position])
    return torch.randperm(len(split.items[position]), generator=rng).tolist()


def encode_batch(model, images, keys, names, limit):
    """(B, 3, S, S) uint8 -> latents (B, c, h, w) float16; image i's noise has the key keys[i]."""

    def encode(part):
        rngs = [runtime.generator(*keys[i]) for i in part]
        latents = model.encode(images[part.start : part.stop], rngs)
        return latents.to(torch.float16).cpu().contiguous()  # it may come in channels_last

    latents = torch.cat(runtime.in_parts(encode, range(len(images)), limit))
    generators.mend(model, latents, lambda i: encode(range(i, i + 1)), names)
    return latents


def encode_class(model, split, position, batches, settings, limit, bar):
    """One class's latents (N, c, h, w) float16, and what its skipped images are called.

    batches    of SquashedImages
    """
    items, latents, skipped, seen = split.items[position], [], [], set()
    key = (settings["seed"], runtime.POSTERIOR, split.class_ids[position])
    for images, numbers, bad, hashes in batches:
        if bad and settings["on_bad_image"] == "error":
            refuse(f"{next(iter(bad.values()))} (--on_bad_image skip leaves such images out)")
        skipped += [split.describe(items[n]) for n in bad]
        if numbers:
            keys, names = [(*key, n) for n in numbers], [split.describe(items[n]) for n in numbers]
            latents.append(encode_batch(model, images, keys, names, limit))
        seen |= hashes
        bar.update(len(numbers) + len(bad))
    latents = torch.cat(latents).numpy() if latents else np.empty((0,))
    if len(seen) < len(latents):
        copies = f"{len(latents) - len(seen)} of {len(latents)} images are copies"
        warn(f"class {split.folders[position]}: {copies}")
    return latents, skipped


def class_latents(model, split, positions, settings, cache=None, num_workers=0, quiet=False):
    """Iterator of (class position, latents (N, c, h, w) float16 in `class_order`, skipped images).

    settings   size, batch_size, seed and on_bad_image
    cache      a LatentCache: what is there is taken from it, what is not is added
    A batch holds images of one class, so that a class is the same bytes in any process.
    """
    batches, step = {}, settings["batch_size"]
    for position in positions:
        if not cache or position not in cache:
            order = class_order(split, position, settings["seed"])
            starts = range(0, len(order), step)
            batches[position] = [(position, order[start : start + step]) for start in starts]
    total = sum(len(split.items[position]) for position in batches)
    if cache:
        needed = total * math.prod(model.latent_shape(settings["size"])) * 2
        files.require_space("--latent_cache", cache.folder, needed)
    every = [batch for of_class in batches.values() for batch in of_class]
    ahead = {"pin_memory": model.device.type == "cuda", "prefetch_factor": 4}
    images = SquashedImages(split, settings["size"])
    # the workers start here, where no thread lives yet that a fork could catch in the middle
    read = runtime.read_ahead(images, every, num_workers, **ahead)
    limit, quiet = runtime.MemoryLimit(step), quiet or not total
    with runtime.progress(total=total, desc="encode", unit="image", quiet=quiet) as bar:
        for position in positions:
            if position not in batches:
                yield position, *cache.load(position)
                continue
            start, own = time.perf_counter(), itertools.islice(read, len(batches[position]))
            found = encode_class(model, split, position, own, settings, limit, bar)
            if cache:
                cache.save(position, *found, round(time.perf_counter() - start, 2))
            yield position, *found


# ---- cluster


def cluster(latents, settings, device, name):
    """The Prototypes of the class `name`; with --on_small_class repeat, a class smaller than ipc
    gives its images themselves, repeated in turn."""
    ipc, few = settings["ipc"], len(latents)
    if few >= ipc:
        buffer = settings["km_expand"] * ipc
        return prototypes.class_prototypes(latents, ipc, buffer, settings["kmeans"], device)
    if not few or settings["on_small_class"] == "error":
        refuse(f"--ipc {ipc}: class {name} has only {few} images that can be read")
    found = prototypes.class_prototypes(latents, few, few, settings["kmeans"], device)
    rows = np.arange(ipc) % few
    return found._replace(latents=found.latents[rows], sizes=found.sizes[rows])


def resolve_kmeans_device(name, device):
    """--kmeans_device: the GPU if encoding runs on one (k-means never stalls it), else the CPU."""
    if name == "cuda" and device.type != "cuda":
        refuse(f"--kmeans_device cuda: encoding runs on {device}; k-means can use only its GPU")
    return torch.device("cpu") if name == "cpu" else device


# ---- main


def declare(parser):
    """The flags of stage 1 that distill has too; their order is that in the folder's name.

    Returns the settings' names.
    """
    setting, count = parser.setting, number(int, 1)
    parser.heading("prototypes")
    setting("--ipc", type=count, default=1, help="images and prototypes per class")
    setting("--km_expand", type=count, default=10, help="k-means buffers: km_expand * ipc latents")
    setting("--size", type=count, short="size", help="VAE pixels [the checkpoint's own: 512, ...]")
    setting("--seed", type=number(int, 0), default=0, short="seed", help="of all that is drawn")
    kinds = ["minibatch", "full", "gmm", "none"]
    what = "the paper's, Lloyd's, a Gaussian mixture's means, or --ipc random images as they are"
    setting("--kmeans", choices=kinds, default="minibatch", short="kmeans", help=what)
    devices = ["auto", "cpu", "cuda"]
    parser.flag("--kmeans_device", choices=devices, default="auto", help="auto: the GPU, if any")
    small, bad = ["error", "repeat"], ["error", "skip"]
    setting("--on_small_class", choices=small, default="error", help="with fewer than --ipc images")
    setting("--on_bad_image", choices=bad, default="error", help="skip: the class's file lists it")
    parser.flag("--latent_cache", metavar="DIR", help="keeps every latent for another --ipc")
    # differs from the release: 10. The batch only changes speed and the last bits of a latent
    setting("--batch_size", type=count, default=32, help="images at once")
    datasets.add_dataset_flags(parser)
    generators.add_generator_flags(parser)
    return list(parser.shorts)


def get_args(argv=None):
    parser, forms = Parser("distillation.gen_prototype", __doc__), prototype_files.FORMATS
    declare(parser)
    parser.heading("output")
    setting, flag, root = parser.setting, parser.flag, "output/prototypes"
    setting("--prototype_format", choices=forms, default="json", help="safetensors: far faster")
    flag("--save_prototype_path", default=root, help="the folder is made below this one")
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


def with_size(settings, model):
    """The settings with a --size: the generator's own, if none was given."""
    usual = datasets.ALL[settings["dataset"]].encode_size
    size = settings["size"] or model.native_size
    if not size:
        refuse("--size: must be given, the checkpoint does not say what it was trained with")
    model.latent_shape(size)  # refuses what the model cannot take
    if model.native_size not in (None, size):
        warn(f"--size {size}: this checkpoint was trained with images of {model.native_size} px")
    settings = settings.filled(size=size)
    settings.defaults["size"] = usual  # a folder's name says any other
    return settings


def open_images(settings, root, label_file=None, download=False, quiet=False):
    """The Split that stage 1 reads, with its prompts shown; too small classes are refused."""
    part = (settings["classes"], settings["max_images_per_class"])
    split = datasets.open_split(settings["dataset"], root, "train", label_file, *part, download)
    datasets.check_class_sizes(split, settings["ipc"], settings["on_small_class"])
    for folder, prompt in itertools.islice(zip(split.folders, split.prompts), 0 if quiet else 10):
        print(f"prompt of {folder}: {prompt}", file=sys.stderr)
    if settings["kmeans"] == "none":
        return datasets.choose_images(split, settings["ipc"], settings["seed"])
    return split


def inputs_of(split, model, settings):
    """What stage 1 reads: for args.json and the manifest."""
    return {
        "images": split.fingerprint(missing_ok=settings["on_bad_image"] == "skip"),
        "real_images": split.count,
        "prompts": files.digest_of(split.prompts),
        "generator": model.facts,
    }


def parts_of(settings):
    """{setting: [what it adds to a folder's name]}: images made from the prototypes say it too."""
    return {name: settings.only([name]).parts() for name in settings}


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    kmeans_device = resolve_kmeans_device(args.kmeans_device, process.device)
    files_of = (args.data_dir, args.label_file_path, args.download)
    split = open_images(args.settings, *files_of, quiet=not process.is_main)
    how = {name: getattr(args, name) for name in generators.FLAGS if name in args}
    model = generators.load(args.diffusion_checkpoints_path, process.device, part="encoder", **how)
    classes = datasets.class_table(split)
    prototype_files.class_conditions(args.dataset, classes, model)  # refuses what it does not know
    settings = with_size(args.settings, model)
    shape, form = model.latent_shape(settings["size"]), args.prototype_format
    stem = f"{args.dataset}-ipc{args.ipc}-kmexpand{args.km_expand}"
    name = output.folder_name(stem, *settings.parts())
    where = ("--save_prototype_path", args.save_prototype_path, name, "prototypes")
    inputs = inputs_of(split, model, settings)
    with output.Output(*where, settings, inputs, process, resumable=("batch_size",)) as out:
        names = [prototype_files.class_file(n, f, form) for n, f in enumerate(split.folders)]
        bytes_each = args.ipc * math.prod(shape) * (7 if form == "json" else 2)
        todo = out.todo(range(len(names)), lambda n: [names[n]], bytes_each)
        cache = latent_cache.open_cache(args.latent_cache, split, out.settings, model, out.log)
        how = (out.settings, cache, args.num_workers, not process.is_main)

        def write_class(position, latents, skipped):
            index, folder, prompt = classes[position].values()
            found = cluster(latents, settings, kmeans_device, folder)
            facts = {"class_index": index, "folder": folder, "prompt": prompt}
            facts |= {"images": len(latents), "skipped": skipped}
            out.write(names[position], prototype_files.class_bytes(found, facts, form))

        for unit in out.steps(class_latents(model, split, todo, *how)):
            out.later(write_class, *unit)  # k-means runs beside the encoding of the next class
        facts = {name: settings[name] for name in ("dataset", "ipc", "km_expand")}
        facts |= {"classes": classes, "latent_shape": shape, "parts": parts_of(settings)}
        then = ["distillation.gen_syn_image", "--dataset", args.dataset, "--ipc", args.ipc]
        then += ["--km_expand", args.km_expand, "--prototype_path", out.folder]
        then += ["--diffusion_checkpoints_path", args.diffusion_checkpoints_path]
        out.finish(facts, None, "classes", then)
    return out.folder


if __name__ == "__main__":
    main()
