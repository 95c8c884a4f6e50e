"""Stage 1, prototype learning (paper, section 3.2): images -> latents -> k-means -> prototypes.

    python -m distillation.gen_prototype --dataset imagenet --data_dir data/imagenet \\
        --ipc 10 --km_expand 1

The unit of work is the class: each process takes every world-th class, a class's file is written
when it is finished, and the same command goes on where a run stopped.
"""

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from distillation import datasets, prototypes
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, number, refuse, warn

# ---- encode


class SquashedImages:
    """For a DataLoader: (class position, image) -> (3, S, S) uint8, or the text of a BadImage."""

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __getitem__(self, key):
        position, image = key
        try:
            picture = self.split.read(self.split.items[position][image])
            picture = datasets.squash(picture, self.size)
        except datasets.BadImage as error:
            return str(error)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def gather(images):
    """A batch of `SquashedImages` -> ((B, 3, S, S) uint8 or None, {place: text}, thumbnails).

    In the reading process, so that a batch is one piece of shared memory.
    """
    bad = {n: image for n, image in enumerate(images) if isinstance(image, str)}
    good = [image for image in images if not isinstance(image, str)]
    return (torch.stack(good) if good else None), bad, {thumbnail(image) for image in good}


def thumbnail(image):
    """A hash of about 64 x 64 pixels of a (3, S, S) uint8 tensor: equal for equal pictures."""
    step = max(1, image.shape[-1] // 64)
    return hashlib.sha256(image[:, ::step, ::step].numpy().tobytes()).digest()


def class_order(split, position, seed):
    """The seeded shuffle of one class's images: k-means sees them in this order."""
    # differs from the release: seeded, and class by class
    draw = runtime.generator(seed, runtime.SHUFFLE, split.class_ids[position])
    return torch.randperm(len(split.items[position]), generator=draw).tolist()


def encode_batch(model, images, keys, names, limit):
    """(B, 3, S, S) uint8 -> latents (B, c, h, w) float16; image i's noise has the key keys[i]."""

    def encode(rows):
        part = images if len(rows) == len(images) else images[rows]  # no copy of a whole batch
        latents = model.encode(part, [runtime.generator(*keys[i]) for i in rows])
        return latents.to(torch.float16).cpu().contiguous()  # it may come in channels_last

    latents = torch.cat(runtime.in_parts(encode, list(range(len(images))), limit))
    generators.mend(model, latents, lambda i: encode([i]), names)
    return latents


def encode_classes(model, split, positions, settings, num_workers=0, quiet=False):
    """Iterator of (class position, latents (N, c, h, w) float16 in `class_order`, skipped images).

    settings    size, batch_size, seed and on_bad_image
    The workers that read ahead start at this call: no thread lives yet that a fork could catch in
    the middle. A batch holds images of one class, so that a class is the same bytes in any process.
    """
    batches, step = [], settings["batch_size"]
    for position in positions:
        keys = [(position, image) for image in class_order(split, position, settings["seed"])]
        batches += [keys[start : start + step] for start in range(0, len(keys), step)]
    if not batches:
        return iter(())
    loader = DataLoader(
        SquashedImages(split, settings["size"]),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=gather,
        prefetch_factor=4 if num_workers else None,
        pin_memory=model.device.type == "cuda",
    )
    return _encoded(model, split, positions, settings, zip(batches, iter(loader)), quiet)


def _encoded(model, split, positions, settings, batches, quiet):
    waiting = {position: len(split.items[position]) for position in positions}
    limit, total = runtime.MemoryLimit(settings["batch_size"]), sum(waiting.values())
    latents, skipped, seen = [], [], set()
    with runtime.progress(total=total, desc="encode", unit="image", quiet=quiet) as bar:
        for batch, (images, bad, thumbnails) in batches:
            position = batch[0][0]
            if bad and settings["on_bad_image"] == "error":
                refuse(f"{next(iter(bad.values()))} (--on_bad_image skip leaves such images out)")
            names = [split.describe(split.items[position][image]) for _, image in batch]
            key = (settings["seed"], runtime.POSTERIOR, split.class_ids[position])
            keys = [(*key, image) for n, (_, image) in enumerate(batch) if n not in bad]
            if keys:
                good = [name for n, name in enumerate(names) if n not in bad]
                latents.append(encode_batch(model, images, keys, good, limit))
            skipped += [names[n] for n in bad]
            seen |= thumbnails
            bar.update(len(batch))
            waiting[position] -= len(batch)
            if not waiting[position]:
                rows = torch.cat(latents).numpy() if latents else np.empty((0,))
                if len(seen) < len(rows):
                    copies = f"{len(rows) - len(seen)} of {len(rows)} images are copies"
                    warn(f"class {split.folders[position]}: {copies}")
                yield position, rows, skipped
                latents, skipped, seen = [], [], set()


# ---- latents kept for another run

DECISIVE = ("size", "seed", "batch_size", "channels_last", "compile", "on_bad_image")
DECISIVE += ("max_images_per_class",)


class LatentCache:
    """One safetensors file per class: another IPC then costs minutes instead of the whole encode.

    The folder's name hashes all that decides the latents, so files of another model, size or seed
    are never found. The names of a class's images stand in its file: a changed data set is noticed.

    log    function that is told, as keywords, what the encoding of each class once took
    """

    def __init__(self, root, split, settings, facts, log):
        key = {name: settings[name] for name in DECISIVE}
        key |= {name: facts[name] for name in ("precision", "vae_sha256")}
        self.folder = Path(root) / f"{split.dataset}-latents-{files.digest_of(key)[:12]}"
        self.split, self.log = split, log
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"--latent_cache {root}: cannot make a folder there: {error.strerror}")
        rows = [row for row in output.log_rows(self.folder) if row.get("event") == "encode"]
        self.took = {row.get("file"): row.get("seconds") for row in rows}

    def _path(self, position):
        where = (self.split.class_ids[position], self.split.folders[position], "safetensors")
        return self.folder / prototypes.class_file(*where)

    def __contains__(self, position):
        """Whether the class is cached and its images are the same; reads no latents."""
        exists = self._path(position).exists()
        return exists and self._read(position)["names"] == self._names(position)

    def _names(self, position):
        return self.split.fingerprint([position], missing_ok=True)  # links were checked before

    def load(self, position):
        """(latents, skipped) of a class that is cached."""
        name = self._path(position).name
        self.log(event="cached", file=name, seconds=self.took.get(name))
        facts = self._read(position, with_latents=True)
        return facts["latents"], facts["skipped"]

    def _read(self, position, with_latents=False):
        from safetensors import safe_open

        path = self._path(position)
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads(file.metadata()["facts"])
                if with_latents:
                    facts["latents"] = file.get_tensor("latents")
                    if hashlib.sha256(facts["latents"]).hexdigest() != facts["sha256"]:
                        raise ValueError("its latents are not those that were written")
        except Exception as error:  # whatever is wrong inside somebody's file
            refuse(f"--latent_cache {path}: cannot be read: {error}; remove this file")
        return facts

    def save(self, position, latents, skipped, seconds):
        """seconds: what encoding took; only the log holds it, so that equal files stay equal."""
        from safetensors.numpy import save

        latents, path = np.ascontiguousarray(latents), self._path(position)
        facts = {"names": self._names(position), "skipped": skipped}
        facts["sha256"] = hashlib.sha256(latents).hexdigest()
        files.write(path, save({"latents": latents}, {"facts": json.dumps(facts)}))
        output.append_log(self.folder, event="encode", file=path.name, seconds=seconds)


def open_cache(root, split, settings, facts, log):
    """The LatentCache; None without --latent_cache, and for a few chosen images of each class."""
    if root and settings["kmeans"] != "none":
        return LatentCache(root, split, settings, facts, log)


def class_latents(model, split, positions, settings, cache=None, num_workers=0, quiet=False):
    """`encode_classes`, taking from the cache what is there and adding what is not."""
    cached = {position for position in positions if cache and position in cache}
    rest = [position for position in positions if position not in cached]
    if cache:
        numbers = math.prod(model.latent_shape(settings["size"]))
        needed = sum(len(split.items[position]) for position in rest) * numbers * 2
        files.require_space("--latent_cache", cache.folder, needed)
    encoder = encode_classes(model, split, rest, settings, num_workers, quiet)
    for position in positions:
        if position in cached:
            yield position, *cache.load(position)
            continue
        start = time.perf_counter()
        _, latents, skipped = next(encoder)
        if cache:
            cache.save(position, latents, skipped, round(time.perf_counter() - start, 2))
        yield position, latents, skipped


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
    return torch.device("cpu") if name == "cpu" or device.type != "cuda" else device


# ---- main


def declare(parser):
    """The flags of stage 1, in the order in which settings name its folder; distill has them too.

    Returns the settings' names.
    """
    count, whole = number(int, 1), number(int, 0)
    parser.heading("prototypes")
    parser.setting("--ipc", type=count, default=1, help="images and prototypes per class")
    buffers = "k-means is fed in buffers of km_expand * ipc latents"
    parser.setting("--km_expand", type=count, default=10, help=buffers)
    size, enter = datasets.default("encode_size"), "pixels of images in the VAE [512; digits: 32]"
    parser.setting("--size", type=count, default=size, short="size", help=enter)
    use = "of shuffling, posterior sampling and synthesis noise"
    parser.setting("--seed", type=whole, default=0, short="seed", help=use)
    kinds = "minibatch: the paper's; full: Lloyd's algorithm on all latents of a class; none: the "
    kinds += "latents of --ipc random images, those of random_real (what the VAE alone costs)"
    names = ["minibatch", "full", "none"]
    parser.setting("--kmeans", choices=names, default=names[0], short="kmeans", help=kinds)
    names, where = ["auto", "cpu", "cuda"], "auto: the GPU if there is one; minibatch only"
    parser.flag("--kmeans_device", choices=names, default="auto", help=where)
    names, small = (
        ["error", "repeat"],
        "a class with fewer images than --ipc: refuse, or repeat them",
    )
    parser.setting("--on_small_class", choices=names, default="error", help=small)
    names, bad = ["error", "skip"], "skip keeps a list in the class's file"
    parser.setting("--on_bad_image", choices=names, default="error", help=bad)
    kept = "keep every class's latents here for another --ipc"
    parser.flag("--latent_cache", metavar="DIR", help=kept)
    # differs from the release: 10. The batch only changes speed and the last bits of a latent
    parser.setting("--batch_size", type=count, default=32, help="images at once")
    datasets.add_dataset_flags(parser)
    generators.add_generator_flags(parser)
    return list(parser.shorts)


def get_args(argv=None):
    parser = Parser("distillation.gen_prototype", __doc__)
    declare(parser)
    parser.heading("output")
    names, fast = prototypes.FORMATS, "safetensors: ten times smaller, some hundred times faster"
    parser.setting("--prototype_format", choices=names, default="json", help=fast)
    below = "the folder is made below this one"
    parser.flag("--save_prototype_path", default="output/prototypes", help=below)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


def open_images(settings, root, label_file=None, download=False):
    """The Split that stage 1 reads; classes that are too small are refused."""
    part = (settings["classes"], settings["max_images_per_class"])
    split = datasets.open_split(settings["dataset"], root, "train", label_file, *part, download)
    datasets.check_class_sizes(split, settings["ipc"], settings["on_small_class"])
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
    split = open_images(args.settings, args.data_dir, args.label_file_path, args.download)
    how = {name: getattr(args, name) for name in generators.FLAGS}
    model = generators.load(args.diffusion_checkpoints_path, process.device, part="encoder", **how)
    shape, form = model.latent_shape(args.size), args.prototype_format
    stem = f"{args.dataset}-ipc{args.ipc}-kmexpand{args.km_expand}"
    name = output.folder_name(stem, *args.settings.parts())
    where = ("--save_prototype_path", args.save_prototype_path, name, "prototypes")
    inputs = inputs_of(split, model, args.settings)
    with output.Output(*where, args.settings, inputs, process, resumable=("batch_size",)) as out:
        names = [prototypes.class_file(n, f, form) for n, f in enumerate(split.folders)]
        bytes_each = args.ipc * math.prod(shape) * (7 if form == "json" else 2)
        todo = out.todo(range(len(names)), lambda n: [names[n]], bytes_each)
        cache = open_cache(args.latent_cache, split, out.settings, model.facts, out.log)
        how = (out.settings, cache, args.num_workers, not process.is_main)
        classes = datasets.class_table(split)

        def write_class(position, latents, skipped):
            index, folder, prompt = classes[position].values()
            found = cluster(latents, args.settings, kmeans_device, folder)
            facts = {"class_index": index, "folder": folder, "prompt": prompt}
            facts |= {"images": len(latents), "skipped": skipped}
            out.write(names[position], prototypes.class_bytes(found, facts, form))

        for unit in out.steps(class_latents(model, split, todo, *how)):
            out.later(write_class, *unit)  # k-means runs beside the encoding of the next class
        facts = {name: args.settings[name] for name in ("dataset", "ipc", "km_expand")}
        facts |= {"classes": classes, "latent_shape": shape, "parts": parts_of(args.settings)}
        out.finish(facts, words="classes")
    return out.folder


if __name__ == "__main__":
    main()
