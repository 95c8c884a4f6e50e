"""Stage 1, prototype learning (paper, section 3.2): every class's images -> VAE latents -> k-means -> prototype files.

    python -m distillation.gen_prototype --dataset imagenet --data_dir data/imagenet --ipc 10 --km_expand 1

The unit of work is the class: each process takes every world-th class, a class's file is written when it is finished,
and the same command goes on where a run stopped.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m distillation.gen_prototype", file=sys.stderr)
    sys.exit(2)

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from distillation.datasets import BadImage, add_dataset_flags, open_split, squash
from distillation.prototypes import (
    FORMATS,
    check_class,
    class_file,
    class_prototypes,
    default_size,
    prototype_folder_name,
    write_class,
)
from scripts.checkpoints import add_checkpoint_flags, cast, load_pipeline, model_name, resolve_dtype, speed_up
from scripts.files import (
    log_rows,
    output_folder,
    require_space,
    settings_digest,
    sweep,
    write_bytes,
    write_manifest,
    write_timing,
)
from scripts.runtime import (
    CHOICE,
    POSTERIOR,
    SHUFFLE,
    MemoryLimit,
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    append_log,
    entry_point,
    generator,
    in_parts,
    log_run,
    natural,
    positive_int,
    progress,
    refuse,
    result_of,
    this_process,
    warn,
)

# ---- encode


class SquashedImages:
    """A Split for a DataLoader: (class position, image position) -> (3, size, size) uint8, or a BadImage's text."""

    def __init__(self, split, size):
        self.split, self.size = split, size

    def __getitem__(self, key):
        position, image = key
        try:
            picture = squash(self.split.read(self.split.items[position][image]), self.size)
        except BadImage as error:
            return str(error)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def gather(images):
    """A batch of `SquashedImages` -> ((B, 3, S, S) uint8 or None, {place: BadImage's text}, thumbnails).

    In the reading process, so that a batch is one piece of shared memory.
    """
    bad = {n: image for n, image in enumerate(images) if isinstance(image, str)}
    good = [image for image in images if not isinstance(image, str)]
    return (torch.stack(good) if good else None), bad, {thumbnail(image) for image in good}


def class_order(split, position, seed):
    """The seeded shuffle of one class's images: k-means sees them in this order."""
    # differs from the release: seeded, and class by class
    return torch.randperm(
        len(split.items[position]), generator=generator(seed, SHUFFLE, split.class_ids[position])
    ).tolist()


def thumbnail(image):
    """Equal for equal pictures: a hash of about 64 x 64 pixels of a (3, S, S) uint8 tensor.   Latents of equal
    pictures differ, each is a sample of its own."""
    step = max(1, image.shape[-1] // 64)
    return hashlib.sha256(image[:, ::step, ::step].numpy().tobytes()).digest()


def encode_batch(pipeline, images, keys, names, limit):
    """(B, 3, S, S) uint8 -> (B, 4, S/8, S/8) float16 latents; image i's noise comes from generator(*keys[i])."""

    def encode(rows):
        part = images if len(rows) == len(images) else images[rows]  # no copy of a whole batch
        pixels = part.to(pipeline.vae.device, non_blocking=True) / 255
        latents = pipeline(pixels, [generator(*keys[i]) for i in rows])
        return latents.to(torch.float16).cpu().contiguous()  # the VAE may answer in channels_last

    rows = list(range(len(images)))
    latents = torch.cat(in_parts(encode, rows, limit))
    for i in (~latents.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        dtype = pipeline.vae.dtype
        cast(pipeline, torch.float32)
        latents[i] = encode([i])[0]
        cast(pipeline, dtype)
        if not latents[i].isfinite().all():
            refuse(f"{names[i]}: its latent holds NaN or infinity, in fp32 too")
        warn(f"{names[i]}: its latent held NaN or infinity in {dtype}; encoded again in fp32")
    return latents


def encode_classes(pipeline, split, positions, size, batch_size, seed, num_workers=0, skip_bad=False, quiet=False):
    """Iterator of (class position, (N, 4, h, w) float16 latents in the class's shuffled order, names of skipped ones).

    Images are read ahead by workers that live for the whole run and start at this call, not at the first class: no
    thread of the caller's lives yet that a fork could catch in the middle. A batch holds images of one class only, so
    that a class is the same bytes whichever process encodes it.
    """
    chunks = []
    for position in positions:
        order = class_order(split, position, seed)
        chunks += [[(position, i) for i in order[s : s + batch_size]] for s in range(0, len(order), batch_size)]
    if not chunks:
        return iter(())
    loader = DataLoader(
        SquashedImages(split, size),
        batch_sampler=chunks,
        num_workers=num_workers,
        collate_fn=gather,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pipeline.vae.device.type == "cuda",
    )
    limit = MemoryLimit(batch_size)
    return _encoded(pipeline, split, positions, chunks, iter(loader), seed, limit, skip_bad, quiet)


def _encoded(pipeline, split, positions, chunks, batches, seed, limit, skip_bad, quiet):
    waiting, latents, skipped, seen = {p: len(split.items[p]) for p in positions}, [], [], set()
    with progress(total=sum(waiting.values()), desc="encode", unit="image", quiet=quiet) as bar:
        for chunk, (images, bad, thumbnails) in zip(chunks, batches):
            position = chunk[0][0]
            items = [split.items[position][i] for _, i in chunk]
            for n, text in bad.items():
                if not skip_bad:
                    refuse(f"{text} (--on_bad_image skip leaves such images out)")
                skipped.append(split.describe(items[n]))
            good = [n for n in range(len(chunk)) if n not in bad]
            seen |= thumbnails
            if good:
                keys = [(seed, POSTERIOR, split.class_ids[position], chunk[n][1]) for n in good]
                names = [split.describe(items[n]) for n in good]
                latents.append(encode_batch(pipeline, images, keys, names, limit))
            bar.update(len(chunk))
            waiting[position] -= len(chunk)
            if not waiting[position]:
                rows = torch.cat(latents).numpy() if latents else np.empty((0,))
                if len(seen) < len(rows):
                    warn(f"class {split.folders[position]}: {len(rows) - len(seen)} of {len(rows)} images are copies")
                yield position, rows, skipped
                latents, skipped, seen = [], [], set()


class LatentCache:
    """One safetensors file a class: another IPC then costs minutes instead of the whole encode.

    The folder's name hashes all that decides the latents, so files of another model, size or seed are never found; the
    class's image names stand in its file, so a changed data set is noticed.

    log    the output folder whose log.jsonl is told what the encoding of each class once took
    """

    def __init__(self, root, split, facts, log=None):
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        self.folder, self.split = Path(root) / f"{split.dataset}-latents-{digest}", split
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"--latent_cache {root}: cannot make a folder there: {error.strerror}")
        sweep(self.folder, locked=False)
        self.log, rows = log, [row for row in log_rows(self.folder) if row.get("event") == "encode"]
        self.took = {row.get("file"): row.get("seconds") for row in rows}

    def files(self):
        """Names of all classes' files."""
        return [f"{c:04d}_{f}.safetensors" for c, f in zip(self.split.class_ids, self.split.folders)]

    def _path(self, position):
        return self.folder / self.files()[position]

    def _names(self, position):
        return self.split.fingerprint([position], missing_ok=True)  # the stage has looked at them before

    def __contains__(self, position):
        """Whether the class is cached and its images are the same; reads no latents."""
        return self._path(position).exists() and self._read(position, "names") == self._names(position)

    def load(self, position):
        """(latents, skipped) of a class that is cached."""
        name = self._path(position).name
        if self.log:
            append_log(self.log, event="cached", file=name, seconds=self.took.get(name))
        return self._read(position, "latents")

    def _read(self, position, what):
        from safetensors import safe_open

        try:
            with safe_open(self._path(position), "numpy") as file:
                facts = json.loads(file.metadata()["facts"])
                if what == "names":
                    return facts["names"]
                latents = file.get_tensor("latents")
            if latents.dtype != np.float16 or len(latents) + len(facts["skipped"]) != len(self.split.items[position]):
                raise ValueError(f"latents of type {latents.dtype} and shape {latents.shape}")
            if hashlib.sha256(latents).hexdigest() != facts["sha256"]:
                raise ValueError("its latents are not those that were written")
        except Exception as error:  # whatever is wrong inside somebody's file
            refuse(f"--latent_cache {self._path(position)}: cannot be read: {error}; remove this file")
        return latents, facts["skipped"]

    def save(self, position, latents, skipped, seconds=None):
        """seconds: what encoding them took; in the log, so that the file is the same bytes from run to run."""
        from safetensors.numpy import save

        latents = np.ascontiguousarray(latents)
        digest = hashlib.sha256(latents).hexdigest()
        facts = {"names": self._names(position), "skipped": skipped, "sha256": digest}
        write_bytes(self._path(position), save({"latents": latents}, {"facts": json.dumps(facts)}))
        append_log(self.folder, event="encode", file=self._path(position).name, seconds=seconds)


def class_latents(pipeline, split, positions, size, batch_size, seed, cache=None, **how):
    """`encode_classes`, in order of `positions`, taking from the cache what is there and adding what is not."""
    cached = {p for p in positions if cache and p in cache}
    encoder = encode_classes(pipeline, split, [p for p in positions if p not in cached], size, batch_size, seed, **how)
    for position in positions:
        if position in cached:
            yield position, *cache.load(position)
            continue
        watch = Stopwatch()
        _, latents, skipped = next(encoder)
        if cache:
            cache.save(position, latents, skipped, watch.seconds)
        yield position, latents, skipped


# ---- cluster


def check_class_sizes(split, ipc, on_small_class, flag="--data_dir"):
    """Refuse, before any encoding, a class that has fewer images than prototypes are asked for."""
    for folder, items in zip(split.folders, split.items):
        if not items:
            refuse(f"{flag}: class {folder} has no images")
        if len(items) < ipc and on_small_class == "error":
            refuse(f"--ipc {ipc}: class {folder} has only {len(items)} images (--on_small_class repeat repeats them)")


def choose_images(split, ipc, seed):
    """The split with at most `ipc` images a class, chosen at random: the same ones for every use of a seed."""

    def chosen(items, class_id):
        order = torch.randperm(len(items), generator=generator(seed, CHOICE, class_id))
        return tuple(items[i] for i in order[:ipc].tolist())

    return replace(split, items=tuple(map(chosen, split.items, split.class_ids)))


def prototypes_or_repeats(latents, ipc, km_expand, method, device, on_small_class, name):
    """The class's k-means prototypes; a class smaller than `ipc` gives its images themselves, repeated in turn."""
    if len(latents) >= ipc:
        return class_prototypes(latents, ipc, km_expand * ipc, method, device)
    if not len(latents) or on_small_class == "error":
        refuse(f"--ipc {ipc}: class {name} has only {len(latents)} readable images")
    found = class_prototypes(latents, len(latents), len(latents), method, device)
    rows = np.arange(ipc) % len(latents)
    return found._replace(latents=found.latents[rows], sizes=found.sizes[rows])


def resolve_kmeans_device(name, device):
    """--kmeans_device: the GPU if encoding runs on one (k-means never stalls it there), else the CPU."""
    if name == "cpu" or device.type != "cuda":
        if name == "cuda":
            refuse(f"--kmeans_device cuda: encoding runs on {device}; k-means can use the GPU only beside it")
        return torch.device("cpu")
    return device


# ---- main


def encoding(args, process):
    """The arguments of `encode_classes` that change no byte."""
    return {
        "num_workers": args.num_workers,
        "skip_bad": args.on_bad_image == "skip",
        "quiet": not process.is_main,
    }


def add_prototype_flags(parser):
    """Flags of stage 1 that distill.py shares."""
    add_dataset_flags(parser)
    group = parser.add_argument_group("prototypes")
    group.add_argument("--ipc", type=positive_int, default=1, help="images, hence prototypes, a class")
    group.add_argument(
        "--km_expand", type=positive_int, default=10, help="k-means is fed in buffers of km_expand * ipc latents"
    )
    group.add_argument(
        "--size", type=positive_int, default=None, help="pixels at which images enter the VAE [512; digits: 32]"
    )
    group.add_argument(
        "--kmeans",
        choices=["minibatch", "full", "none"],
        default="minibatch",
        help="minibatch: the paper's; full: Lloyd's algorithm on all latents of a class; none: the latents of --ipc "
        "random images, those of random_real (decoded, they show what the VAE alone costs)",
    )
    group.add_argument(
        "--kmeans_device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: the GPU if there is one, else the CPU; minibatch only",
    )
    group.add_argument(
        "--on_small_class",
        choices=["error", "repeat"],
        default="error",
        help="a class with fewer images than --ipc: refuse, or repeat its images",
    )
    group.add_argument(
        "--on_bad_image", choices=["error", "skip"], default="error", help="skip keeps a list in the class's file"
    )
    group.add_argument(
        "--latent_cache", default=None, metavar="DIR", help="keep every class's latents here for another --ipc"
    )
    group.add_argument("--seed", type=natural, default=0, help="of shuffling, posterior sampling and synthesis noise")


def get_args(argv=None):
    parser = Parser(prog="distillation.gen_prototype", description=__doc__.split("\n")[0])
    add_prototype_flags(parser)
    parser.add_argument(
        "--prototype_format",
        choices=list(FORMATS),
        default="json",
        help="json, or safetensors: ten times smaller and some hundred times faster to read",
    )
    parser.add_argument("--save_prototype_path", default="output/prototypes", help="the folder is made below this one")
    # differs from the release: 10. The batch only changes speed and the last bits of a latent
    parser.add_argument("--batch_size", type=positive_int, default=32, help="images encoded at once")
    add_checkpoint_flags(parser)
    add_process_flags(parser)
    return parser.parse_args(argv)


def open_training_split(args):
    """The images that stage 1 reads, from the shared flags."""
    split = open_split(
        args.dataset,
        args.data_dir,
        "train",
        args.label_file_path,
        args.classes,
        args.max_images_per_class,
        args.download,
    )
    check_class_sizes(split, args.ipc, args.on_small_class)
    return choose_images(split, args.ipc, args.seed) if args.kmeans == "none" else split


def prototype_settings(args, split, precision, vae_sha256):
    """All that decides the bytes of stage 1, as it stands in args.json and the manifest."""
    return {
        "dataset": args.dataset, "ipc": args.ipc, "km_expand": args.km_expand, "kmeans": args.kmeans,
        "size": args.size or default_size(args.dataset), "seed": args.seed, "batch_size": args.batch_size,
        "classes": args.classes, "max_images_per_class": args.max_images_per_class,
        "on_small_class": args.on_small_class, "on_bad_image": args.on_bad_image,
        "dtype": args.dtype, "precision": precision, "channels_last": args.channels_last, "compile": args.compile,
        "model": model_name(args.diffusion_checkpoints_path), "revision": args.revision, "vae_sha256": vae_sha256,
        "prompts_sha256": hashlib.sha256("\n".join(split.prompts).encode()).hexdigest(),
        "images_sha256": split.fingerprint(missing_ok=args.on_bad_image == "skip"),
        "images": sum(map(len, split.items)),
    }  # fmt: skip


def latent_cache(root, split, settings, log):
    """The cache that fits these settings; None without --latent_cache, and for a few chosen images of each class.

    log    the output folder that uses it
    """
    if not root or settings["kmeans"] == "none":
        return None
    keys = (
        "size",
        "seed",
        "batch_size",
        "precision",
        "channels_last",
        "compile",
        "vae_sha256",
        "on_bad_image",
        "max_images_per_class",
    )
    return LatentCache(root, split, {key: settings[key] for key in keys}, log)


def check_size(size, pipeline):
    """Refuse a --size that the VAE cannot take as it is; diffusers would resize once more, in silence."""
    factor = pipeline.vae_scale_factor
    if size % factor:
        refuse(f"--size {size}: this checkpoint's VAE needs a multiple of {factor}")


def class_table(split):
    """The ordered class list of a manifest."""
    return [{"index": c, "folder": f, "prompt": p} for c, f, p in zip(split.class_ids, split.folders, split.prompts)]


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device, args.shard)
    kmeans_device = resolve_kmeans_device(args.kmeans_device, process.device)
    split = open_training_split(args)
    # here, because diffusers takes seconds to import
    from scripts.pipeline_stable_diffusion_gen_latents import StableDiffusionGenLatentsPipeline

    precision = resolve_dtype(args.dtype, process.device)
    pipeline, hashes = load_pipeline(
        StableDiffusionGenLatentsPipeline,
        args.diffusion_checkpoints_path,
        process.device,
        precision,
        args.revision,
        args.variant,
        vae_only=True,
        config=args.single_file_config,
    )
    settings = prototype_settings(args, split, precision, hashes["vae_sha256"])
    settings["prototype_format"] = args.prototype_format
    speed_up(pipeline, args.channels_last, args.compile)
    size = settings["size"]
    check_size(size, pipeline)
    folder = Path(args.save_prototype_path) / prototype_folder_name(settings)
    latent = 4 * (size // pipeline.vae_scale_factor) ** 2  # numbers in one
    files = [class_file(n, f, args.prototype_format) for n, f in enumerate(split.folders)]
    number = 7 if args.prototype_format == "json" else 2  # bytes
    require_space("--save_prototype_path", folder, len(files) * args.ipc * latent * number, files)

    watch = Stopwatch()
    with output_folder("--save_prototype_path", folder, settings, process, resumable=("batch_size",)) as settings:
        cache = latent_cache(args.latent_cache, split, settings, folder)
        if cache:
            require_space("--latent_cache", cache.folder, settings["images"] * latent * 2, cache.files())
        digest = settings_digest(settings)
        mine = range(process.rank, len(files), process.world)
        todo = [n for n in mine if not (folder / files[n]).exists()]

        def finish_class(position, latents, skipped):
            name = split.folders[position]
            prototypes = prototypes_or_repeats(
                latents, args.ipc, args.km_expand, args.kmeans, kmeans_device, args.on_small_class, name
            )
            facts = {
                "class_index": split.class_ids[position],
                "folder": name,
                "prompt": split.prompts[position],
                "images": len(latents),
                "skipped": skipped,
                "settings_sha256": digest,
            }
            write_class(folder / files[position], prototypes, facts)

        # k-means of one class runs beside the encoding of the next
        with StopSignals() as signals, ThreadPoolExecutor(1) as background:
            pending = None
            for unit in class_latents(
                pipeline, split, todo, size, settings["batch_size"], args.seed, cache, **encoding(args, process)
            ):
                if pending:
                    result_of(pending)
                pending = background.submit(finish_class, *unit)
                if signals.name:
                    result_of(pending)
                    signals.leave_if_asked()
            if pending:
                result_of(pending)
            signals.leave_if_asked()

        cost = log_run(folder, process, watch, len(todo))
        facts = {
            "dataset": args.dataset,
            "ipc": args.ipc,
            "km_expand": args.km_expand,
            "vae_sha256": settings["vae_sha256"],
            "latent_shape": [4, size // pipeline.vae_scale_factor, size // pipeline.vae_scale_factor],
            "classes": class_table(split),
        }
        missing = write_manifest(
            folder, "prototypes", settings, files, facts, partial(check_class, settings_sha256=digest)
        )
        if not missing:
            write_timing(folder)
    left = f"; {len(missing)} classes are left to other processes" if missing else ""
    print(f"{folder}: {len(todo)} of {len(files)} classes made in {cost}{left}")
    return folder


if __name__ == "__main__":
    main()
