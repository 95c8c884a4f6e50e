"""Train a teacher on real images, for the data sets that nobody publishes one for (paper, section 4.1).

    python -m matching.train_teacher --dataset digits --arch convnet_mini
    sh matching/train_teacher_cf10.sh

Writes OUTPUT_DIR/<name>/{model.safetensors, results.json, manifest.json}; stages 3 and 4 take that folder as
--teacher_checkpoint. The same command resumes from the last checkpoint to the same weights.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m matching.train_teacher", file=sys.stderr)
    sys.exit(2)

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from distillation.datasets import DATASETS, BadImage, add_dataset_flags, open_split, squash
from distillation.gen_prototype import check_class_sizes
from matching.models import count_parameters, create_model, model_name
from matching.soft_labels import (
    batches_of,
    check_scales,
    draw_crops,
    epoch_batches,
    normalise,
    probability,
    resize_exact,
)
from matching.training import (
    Forward,
    add_training_flags,
    average_buffers,
    check_ranks,
    check_warmup,
    checked_loss,
    checkpoint_path,
    chunk_size,
    evaluate,
    has_random_layers,
    load_checkpoint,
    lr_factor,
    make_optimizer,
    plain,
    rank_chunks,
    restore,
    save_checkpoint,
    save_weights,
    seeded,
    set_lr,
    sum_over_ranks,
    train_step,
    validation_pixels,
)
from scripts.files import (
    TIMING,
    is_complete,
    output_folder,
    output_name,
    read_manifest,
    require_space,
    settings_digest,
    write_json,
    write_manifest,
    write_timing,
)
from scripts.runtime import (
    AUGMENT,
    DROPOUT,
    WEIGHTS,
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    below_one,
    entry_point,
    epoch_count,
    generator,
    join_processes,
    log_run,
    memory_for,
    natural,
    not_negative,
    positive,
    positive_int,
    progress,
    refuse,
    this_process,
    unit_interval,
)


class Recipe(NamedTuple):
    """Defaults of one kind of data set."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_epochs: int
    augment: str
    flip: float


# The paper names the teachers and their accuracies only. CIFAR: the usual recipe of 32-px networks (pad-and-crop,
# flip, SGD, cosine). Tiny-ImageNet: the public 64-px ResNet recipe. Others: PyTorch's classification script. Digits:
# short, no flips.
CIFAR = Recipe(200, 128, 0.1, 5e-4, 0, "pad_crop", 0.5)
RECIPES = {
    "digits": Recipe(15, 50, 0.02, 5e-4, 1, "pad_crop", 0.0),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "tiny_imagenet": Recipe(200, 256, 0.2, 1e-4, 5, "rrc", 0.5),
}
IMAGENET = Recipe(90, 256, 0.1, 1e-4, 5, "rrc", 0.5)


# ---- real images


class TrainingImages(Dataset):
    """Item (epoch, batch) -> the rows of that batch that this rank trains on, cropped: (n, S, S, 3) uint8, (n,)
    targets.

    Small sets are held in memory; others are read from disk, batch by batch, in the DataLoader's workers.
    """

    def __init__(self, split, size, recipe, batch_size, seed, scale, chunk, rank, world):
        self.split, self.size, self.recipe = split, size, recipe
        self.batch_size, self.seed, self.scale = batch_size, seed, scale
        self.chunk, self.rank, self.world = chunk, rank, world
        self.items = [item for names in split.items for item in names]
        self.targets = torch.tensor([c for c, names in enumerate(split.items) for _ in names])
        self.arrays = None
        if DATASETS[split.dataset].image_size <= 64:
            self.arrays = [np.asarray(squash(self._read(item), size)) for item in self.items]

    def _read(self, item):
        try:
            return self.split.read(item)
        except BadImage as error:
            refuse(f"--data_dir {error}")

    def batches(self, first, last):
        """Keys of all batches of epochs first .. last - 1."""
        count = batches_of(len(self.items), self.batch_size)
        return [(epoch, number) for epoch in range(first, last) for number in range(count)]

    def __getitem__(self, key):
        epoch, number = key
        index = epoch_batches(self.seed, epoch, len(self.items), self.batch_size)[number]
        rows = rank_chunks(len(index), self.chunk, self.rank, self.world)[1]
        pixels = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for k, i in enumerate(index[rows].tolist()):
            pixels[k] = self._augmented(i, generator(self.seed, AUGMENT, epoch, i))
        return epoch, number, len(index), torch.from_numpy(pixels), self.targets[index[rows]]

    def _augmented(self, i, g):
        """Image i under the draws of `g`: (S, S, 3) uint8."""
        from PIL import Image

        array = self.arrays[i] if self.arrays is not None else np.asarray(self._read(self.items[i]))
        mirrored = torch.rand((), generator=g).item() < self.recipe.flip
        if self.recipe.augment == "pad_crop":  # torchvision's RandomCrop(S, padding=4 at 32 px)
            pad = self.size // 8
            top, left = torch.randint(2 * pad + 1, (2,), generator=g).tolist()
            array = np.pad(array, ((pad, pad), (pad, pad), (0, 0)))[top : top + self.size, left : left + self.size]
        elif self.recipe.augment == "rrc":
            top, left, h, w = draw_crops(torch.tensor([array.shape[:2]]), self.scale, g)[0].tolist()
            array = np.asarray(resize_exact(Image.fromarray(array[top : top + h, left : left + w]), self.size))
        elif array.shape != (self.size, self.size, 3):
            array = np.asarray(squash(Image.fromarray(array), self.size))
        return array[:, ::-1] if mirrored else array


# ---- main


def get_args(argv=None):
    parser = Parser(prog="matching.train_teacher", description=__doc__.split("\n")[0])
    add_dataset_flags(parser)
    parser.add_argument("--val_dir", default=None, help="real test images; default: --data_dir")
    parser.add_argument("-a", "--arch", type=model_name, default="resnet18", help="see matching/models.py")
    parser.add_argument("--input_size", type=positive_int, default=None, help="pixels; default: the data set's")
    parser.add_argument(
        "--output_dir", default="output/teachers", help="results go to a folder below, named by the flags"
    )
    group = parser.add_argument_group("recipe (defaults by data set: see RECIPES in this file)")
    group.add_argument("--epochs", type=epoch_count, default=None)
    group.add_argument("-b", "--batch_size", type=positive_int, default=None, help="images a step, over all processes")
    group.add_argument("-lr", "--learning_rate", type=positive, default=None, help="peak; SGD")
    group.add_argument("--momentum", type=below_one, default=0.9)
    group.add_argument("--weight_decay", type=not_negative, default=None, help="on matrices and convolutions")
    group.add_argument("--warmup_epochs", type=natural, default=None)
    group.add_argument("--schedule", choices=("cosine", "linear", "step", "constant"), default="cosine")
    group.add_argument("--label_smoothing", type=probability, default=0.0)
    group.add_argument(
        "--augment",
        choices=("pad_crop", "rrc", "none"),
        default=None,
        help="pad by an eighth and crop; RandomResizedCrop; nothing",
    )
    group.add_argument("--flip", type=probability, default=None, help="probability of a horizontal flip")
    group.add_argument("--min_scale_crops", type=unit_interval, default=0.08)
    group.add_argument("--max_scale_crops", type=unit_interval, default=1.0)
    group.add_argument("--seed", type=natural, default=0)
    add_training_flags(parser)
    add_process_flags(parser)
    return parser.parse_args(argv)


def default_recipe(dataset, arch):
    """RECIPES' entry; ConvNets have no norm before their head and stay at chance at 0.1: 0.01, as DC, DM and MTT."""
    recipe = RECIPES.get(dataset, IMAGENET)
    if arch.startswith("convnet"):
        return recipe._replace(learning_rate=min(recipe.learning_rate, 0.02 if dataset == "digits" else 0.01))
    return recipe


def recipe_of(args):
    recipe = default_recipe(args.dataset, args.arch)
    given = {name: getattr(args, name) for name in Recipe._fields}
    return recipe._replace(**{name: value for name, value in given.items() if value is not None})


def teacher_name(args, recipe):
    """`{dataset}_{arch}` plus what is not the data set's default."""
    default = default_recipe(args.dataset, args.arch)
    short = {"batch_size": "b", "learning_rate": "lr", "weight_decay": "wd", "warmup_epochs": "warmup"}
    options = {short.get(name, name): value for name, value in recipe._asdict().items()}
    defaults = {short.get(name, name): value for name, value in default._asdict().items()}
    options |= {
        "size": args.input_size or DATASETS[args.dataset].image_size,
        "momentum": args.momentum,
        "schedule": args.schedule,
        "smooth": args.label_smoothing,
        "crops": f"{args.min_scale_crops:g}-{args.max_scale_crops:g}",
        "classes": args.classes,
        "max": args.max_images_per_class,
        "seed": args.seed,
        "amp": args.amp,
    }
    defaults |= {
        "size": DATASETS[args.dataset].image_size,
        "momentum": 0.9,
        "schedule": "cosine",
        "smooth": 0.0,
        "crops": "0.08-1",
        "classes": None,
        "max": 0,
        "seed": 0,
        "amp": "none",
    }
    return output_name(f"{args.dataset}_{args.arch.replace(':', '-')}", options, defaults)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device)
    if args.shard != "0/1":
        refuse(f"--shard {args.shard}: training is one job; use torchrun for several processes")
    recipe = recipe_of(args)
    if args.warmup_epochs is not None:
        check_warmup(args.warmup_epochs, recipe.epochs)
    check_scales(args.min_scale_crops, args.max_scale_crops)
    facts = DATASETS[args.dataset]
    size = args.input_size or facts.image_size
    train = open_split(
        args.dataset, args.data_dir, "train", None, args.classes, args.max_images_per_class, args.download
    )
    val = open_split(args.dataset, args.val_dir or args.data_dir, "val", None, args.classes, download=args.download)
    if val.folders != train.folders:
        odd = sorted(set(val.folders) ^ set(train.folders))[0]
        refuse(f"--val_dir {args.val_dir or args.data_dir}: its classes are not --data_dir's, first {odd}")
    check_class_sizes(train, 1, "error")
    check_class_sizes(val, 1, "error", f"--val_dir {args.val_dir or args.data_dir}")
    chunk = chunk_size(recipe.batch_size, process.world, args.gradient_accumulation_steps, args.bn_batch)
    name = teacher_name(args, recipe)
    folder = Path(args.output_dir) / name
    settings = {
        "dataset": args.dataset,
        "arch": args.arch,
        "input_size": size,
        **recipe._asdict(),
        "momentum": args.momentum,
        "schedule": args.schedule,
        "label_smoothing": args.label_smoothing,
        "min_scale_crops": args.min_scale_crops,
        "max_scale_crops": args.max_scale_crops,
        "classes": args.classes,
        "max_images_per_class": args.max_images_per_class,
        "seed": args.seed,
        "bn_batch": chunk,
        "eval_every": args.eval_every,
        "amp": args.amp,
        "channels_last": args.channels_last,
        "compile": args.compile,
        "fused": args.fused,
        "train_images": sum(map(len, train.items)),
        "images_sha256": train.fingerprint(),
        "val_images": sum(map(len, val.items)),
        "val_sha256": val.fingerprint(),
    }
    accelerator = join_processes(process)
    with output_folder("--output_dir", folder, settings, process) as settings:
        digest = settings_digest(settings)
        complete, checkpoint, first = is_complete(folder), checkpoint_path(folder, args.seed), 0
        if checkpoint.exists() and not complete:
            first = load_checkpoint(checkpoint, recipe.epochs, digest)["epoch"]
        check_ranks(folder, settings, [recipe.epochs if complete else first], process)
        if complete:
            read_manifest("--output_dir", folder, "teacher")
            if process.is_main:
                checkpoint.unlink(missing_ok=True)
                if not (folder / TIMING).exists():  # killed just after the manifest
                    write_timing(folder)
            print(f"{folder}: already there")
            return folder
        watch = Stopwatch()
        forward = Forward(process.device, args.amp, args.channels_last, args.compile)
        result, units = train_teacher(args, recipe, settings, folder, train, val, process, forward, first)
        if process.is_main:
            write_json(folder / "results.json", {"arguments": settings, **result})
            manifest_facts = {
                "dataset": args.dataset,
                "arch": args.arch,
                "image_size": size,
                "mean": facts.mean,
                "std": facts.std,
                "classes": [{"index": c, "folder": f} for c, f in zip(train.class_ids, train.folders)],
                "top1": result["last"]["top1"],
                "train_sha256": train.digest() if train.arrays is not None else None,
            }
            cost = log_run(folder, process, watch, units)
            write_manifest(folder, "teacher", settings, ["model.safetensors", "results.json"], manifest_facts)
            # after the manifest: killed in between, the run goes on from here and not from the beginning
            checkpoint.unlink(missing_ok=True)
            write_timing(folder)
            last = result["last"]
            print(f"{folder}: top-1 {last['top1']:.2f}, top-5 {last['top5']:.2f} in {cost}")
    if accelerator:
        accelerator.end_training()
    return folder


def train_teacher(args, recipe, settings, folder, train, val, process, forward, first=0):
    """The training loop; returns ({"last", "best", "rows", "parameters"}, epochs trained now).

    first   epochs that the checkpoint holds; 0: there is none
    """
    facts, size, device = DATASETS[args.dataset], settings["input_size"], process.device
    classes = len(train.folders)
    with seeded(args.seed, WEIGHTS):
        model = create_model(args.arch, classes, size)
    model = forward.place(model)
    optimizer = make_optimizer(model, True, recipe.learning_rate, recipe.weight_decay, args.momentum, args.fused)
    checkpoint, digest, rows = checkpoint_path(folder, args.seed), settings_digest(settings), []
    if first:
        state = load_checkpoint(checkpoint, recipe.epochs, digest)
        restore(checkpoint, state, model, optimizer)
        rows = state["rows"]
    require_space("--output_dir", folder, 12 * count_parameters(model) + 2**20)
    data = TrainingImages(
        train, size, recipe, recipe.batch_size, args.seed, (args.min_scale_crops, args.max_scale_crops),
        settings["bn_batch"], process.rank, process.world,
    )  # fmt: skip
    pixels, targets = validation_pixels(val, size, device, process.rank, process.world, args.num_workers)
    keys = data.batches(first, recipe.epochs)
    workers = args.num_workers if data.arrays is None else 0
    loader = iter(DataLoader(data, batch_size=None, sampler=keys, num_workers=workers, generator=torch.Generator()))
    random = has_random_layers(model)

    def save(epoch):
        state = {"epoch": epoch, "model": plain(model).state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}
        if process.is_main:
            save_checkpoint(checkpoint, state, digest)

    bar = progress(
        total=(recipe.epochs - first) * len(data.items), desc=args.arch, unit="image", quiet=not process.is_main
    )
    with StopSignals() as signals, bar:
        for epoch in range(first, recipe.epochs):
            lr = recipe.learning_rate * lr_factor(args.schedule, epoch, recipe.epochs, 1.0, recipe.warmup_epochs)
            set_lr(optimizer, lr)
            model.train()
            total, steps, seen = torch.zeros((), device=device), 0, 0
            for _ in range(batches_of(len(data.items), recipe.batch_size)):
                _, number, count, images, labels = next(loader)
                x = forward.lay_out(normalise(images.to(device, non_blocking=True), facts.mean, facts.std))
                labels = labels.to(device, non_blocking=True)
                chunks, _ = rank_chunks(count, settings["bn_batch"], process.rank, process.world)

                def loss_of(rows, x=x, labels=labels):
                    outputs = forward(model, x[rows])
                    return F.cross_entropy(
                        outputs, labels[rows], reduction="sum", label_smoothing=args.label_smoothing
                    )

                key = (args.seed, DROPOUT, epoch, number) if random else None
                with memory_for("in training", "lower --bn_batch, or raise --gradient_accumulation_steps"):
                    total += train_step(model, optimizer, chunks, count, loss_of, process.world, key)
                steps, seen = steps + 1, seen + len(chunks)
                bar.update(count)
            average_buffers(model, seen, process.world)
            asked = torch.tensor([float(signals.name is not None)], device=device)
            sum_over_ranks([total, asked], process.world)
            row = {"epoch": epoch, "lr": lr, "loss": checked_loss(total.item() / steps, epoch, "--learning_rate")}
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == recipe.epochs:
                row |= evaluate(model, pixels, targets, forward, facts.mean, facts.std, process.world)
                bar.set_postfix(top1=f"{row['top1']:.2f}")
            rows.append(row)
            if epoch + 1 < recipe.epochs and ((epoch + 1) % args.checkpoint_every == 0 or asked):
                save(epoch + 1)
                if asked:
                    sum_over_ranks([asked], process.world)  # a rank that left while rank 0 saves may get it killed
                    signals.name = signals.name or "SIGTERM"
                    signals.leave_if_asked()
    if process.is_main:
        save_weights(folder / "model.safetensors", model)
    tested = [row for row in rows if "top1" in row]
    keep = ("epoch", "top1", "top5")
    return {
        "parameters": count_parameters(model),
        "last": {k: tested[-1][k] for k in keep},
        "best": {k: max(tested, key=lambda row: row["top1"])[k] for k in keep},
        "rows": rows,
    }, recipe.epochs - first


if __name__ == "__main__":
    main()
