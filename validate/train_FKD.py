"""Stage 4 (paper, sections 3.3 and 4): a student on synthetic images and soft labels, tested on real images.

    python -m validate.train_FKD --train_dir output/images/NAME --fkd_path output/labels/NAME_resnet18_mix-cutmix \\
        --val_dir data/imagenet --model resnet18 --cos -T 20 --gradient_accumulation_steps 2
    sh validate/train_FKD.sh

minimises KL(teacher(x), student(x)) over the replayed crops of the labels (the default), over crops that the teacher
labels during training (--online: same draws, same numbers), or trains on class indices (--hard_label). Writes
OUTPUT_DIR/<name>/results.json (arguments, a row an epoch, last and best top-1/top-5 by seed, mean and sample std), the
weights, and manifest.json. The same command continues a stopped run from its last checkpoint to the same weights.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m validate.train_FKD", file=sys.stderr)
    sys.exit(2)

import argparse
import contextlib
from pathlib import Path
from typing import NamedTuple

import torch

from distillation.datasets import DATASETS, dataset_name, known_prompts, open_split
from matching.generate_soft_label import add_teacher_flags, load_teachers, name_extras
from matching.label_folder import open_labels
from matching.models import count_parameters, create_model, load_state, model_name, read_state_dict
from matching.soft_labels import (
    PROTOCOL,
    TEACHER_ROWS,
    Feed,
    ImageSet,
    add_protocol_flags,
    batches_of,
    labels_name,
    load_pixels,
    mix,
    open_images,
    protocol_of,
    sent,
    teacher_logits,
)
from matching.training import (
    Average,
    Forward,
    add_training_flags,
    average_buffers,
    check_ranks,
    check_warmup,
    checked_loss,
    checkpoint_path,
    chunk_size,
    color_jitter,
    evaluate,
    hard_loss,
    has_random_layers,
    load_checkpoint,
    lr_factor,
    make_optimizer,
    mse_ce_loss,
    plain,
    rank_chunks,
    restore,
    save_checkpoint,
    save_weights,
    seeded,
    set_lr,
    soft_loss,
    sum_over_ranks,
    summary,
    train_step,
    validation_pixels,
)
from scripts.files import (
    TIMING,
    check_unit,
    is_complete,
    output_folder,
    output_name,
    read_json,
    read_manifest,
    require_space,
    settings_digest,
    sha256,
    write_json,
    write_manifest,
    write_timing,
    wrong_field,
)
from scripts.runtime import (
    DROPOUT,
    JITTER,
    WEIGHTS,
    Parser,
    StopSignals,
    Stopwatch,
    add_process_flags,
    at_least_one,
    below_one,
    entry_point,
    generator,
    join_processes,
    log_run,
    memory_for,
    natural,
    not_negative,
    positive,
    progress,
    refuse,
    this_process,
    unit_interval,
)

RETIRED = {
    "--keep_topk": "nothing used it",
    "--start_epoch": "the same command resumes from its checkpoint",
    "--wandb_project": "use --tracker wandb, and wandb's own WANDB_PROJECT",
    "--wandb_api_key": "use --tracker wandb after `wandb login`; a key on a command line is public",
    "--seed": "use --seeds",
}


class Recipe(NamedTuple):
    """How a student learns; the defaults are the release's (its launcher sets cosine and temperature 20)."""

    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.875
    schedule: str = "linear"
    cos_stretch: float = 1.0
    step_factor: float = 0.2
    warmup_epochs: int = 0
    loss: str = "kl"
    temperature: float = 3.0
    ce_weight: float = 0.025
    ema: float = 0.0
    bn_refresh: bool = False
    color_jitter: float = 0.0
    lighting: float = 0.0


def get_args(argv=None):
    parser = Parser(prog="validate.train_FKD", description=__doc__.split("\n")[0], retired=RETIRED)
    group = parser.add_argument_group("data")
    group.add_argument("--train_dir", default=None, help="an image folder of stage 2, or any other")
    group.add_argument(
        "--fkd_path",
        default=None,
        help="its labels folder of stage 3, or the folder above (not with --online, --hard_label)",
    )
    group.add_argument("--val_dir", default=None, help="the real data set's root (not for digits)")
    group.add_argument(
        "--dataset", type=dataset_name, default=None, metavar="NAME", help="default: what the images' manifest says"
    )
    group.add_argument(
        "--output_dir", default="output/students", help="results go to a folder below, named by the flags"
    )
    group.add_argument("--verify", action="store_true", help="hash every label file at the start, however many")
    group.add_argument("--online", action="store_true", help="the teacher labels during training; no labels folder")
    group.add_argument("--hard_label", action="store_true", help="train on class indices; no teacher")
    group.add_argument("--evaluate", default=None, metavar="CHECKPOINT", help="only test these weights on --val_dir")

    group = parser.add_argument_group("student")
    group.add_argument("--model", type=model_name, default="resnet18", help="see matching/models.py")
    group.add_argument("--seeds", nargs="+", type=natural, default=[0], help="one student from scratch for each")
    group.add_argument("--sgd", action="store_true", help="SGD instead of AdamW")
    group.add_argument("--adamw_lr", type=positive, default=0.001)
    group.add_argument(
        "--adamw_weight_decay", type=not_negative, default=0.01, help="on matrices and convolutions only"
    )
    group.add_argument("-lr", "--learning_rate", type=positive, default=1.024, help="of SGD")
    group.add_argument("--momentum", type=below_one, default=0.875, help="of SGD")
    group.add_argument("--weight_decay", type=not_negative, default=3e-5, help="of SGD")
    group.add_argument(
        "--schedule", choices=("linear", "cosine", "step", "constant"), default="linear", help="learning rate by epoch"
    )
    group.add_argument(
        "--cos", dest="schedule", action="store_const", const="cosine", help="same as --schedule cosine"
    )
    group.add_argument(
        "--cos_stretch",
        type=at_least_one,
        default=1.0,
        help="cosine over this many times the epochs; 2 ends at half (RDED)",
    )
    group.add_argument(
        "--step_factor", type=unit_interval, default=0.2, help="of --schedule step, at 2/3 and 5/6 of the epochs"
    )
    group.add_argument("--warmup_epochs", type=natural, default=0, help="linear, before the schedule")
    group.add_argument(
        "-T", "--temperature", type=positive, default=3.0, help="of both sides of the KL; no T^2 factor"
    )
    group.add_argument(
        "--loss",
        choices=("kl", "mse_ce"),
        default="kl",
        help="kl (paper); mse_ce: squared error of logits + --ce_weight x cross-entropy (EDC)",
    )
    group.add_argument("--ce_weight", type=not_negative, default=0.025, help="of --loss mse_ce")
    group.add_argument(
        "--ema", type=below_one, default=0.0, help="decay of averaged weights, which are tested; 0: none"
    )
    group.add_argument(
        "--bn_refresh", action="store_true", help="an extra forward on un-mixed images refreshes BatchNorm (RDED)"
    )
    group.add_argument(
        "--color_jitter", type=not_negative, default=0.0, help="with --hard_label: strength (Minimax: 0.4)"
    )
    group.add_argument(
        "--lighting", type=not_negative, default=0.0, help="with --hard_label: PCA noise (Minimax: 0.1)"
    )

    group = parser.add_argument_group("batches (stored labels fix them: a flag that differs is refused)")
    add_protocol_flags(group, stored=True)
    add_teacher_flags(parser, None)
    add_training_flags(parser)
    parser.add_argument("--tracker", default=None, help="tensorboard, wandb, ... through accelerate")
    add_process_flags(parser)
    parser.add_argument(
        "-j", "--workers", dest="num_workers", type=natural, default=argparse.SUPPRESS, help="same as --num_workers"
    )
    args = parser.parse_args(argv)
    _check_flags(args)
    return args


def _check_flags(args):
    if args.shard != "0/1":
        refuse(f"--shard {args.shard}: training is one job; use torchrun for several processes")
    if args.online and args.hard_label:
        refuse("--online and --hard_label: only one of them")
    if args.evaluate:
        return
    if args.train_dir is None:
        refuse("--train_dir: missing; an image folder of stage 2")
    own = "--online" if args.online else "--hard_label" if args.hard_label else None
    if own and args.fkd_path:
        refuse(f"--fkd_path {args.fkd_path}: not with {own}, which reads no labels")
    if not own and args.fkd_path is None:
        refuse("--fkd_path: missing; the labels of stage 3 (or --online, or --hard_label)")
    if args.hard_label and (args.arch or args.teacher_checkpoint):
        refuse("--hard_label: has no teacher; drop --arch and --teacher_checkpoint")
    if (args.color_jitter or args.lighting) and not args.hard_label:
        refuse("--color_jitter, --lighting: only with --hard_label; the teacher's labels are of images without them")
    if len(set(args.seeds)) < len(args.seeds):
        refuse(f"--seeds {' '.join(map(str, args.seeds))}: a seed stands twice")


def recipe_of(args):
    return Recipe(
        optimizer="sgd" if args.sgd else "adamw",
        lr=args.learning_rate if args.sgd else args.adamw_lr,
        weight_decay=args.weight_decay if args.sgd else args.adamw_weight_decay,
        loss="ce" if args.hard_label else args.loss,
        **{
            name: getattr(args, name)
            for name in Recipe._fields
            if name not in ("optimizer", "lr", "weight_decay", "loss")
        },
    )


# ---- inputs


def open_test(dataset, root, folders):
    """The real test images of the classes `folders`, in that order."""
    known = list(known_prompts(dataset))
    split = open_split(dataset, root, "val", classes=list(folders) if known else None, flag="--val_dir")
    missing = [f for f in folders if f not in split.folders]
    if missing:
        refuse(f"--val_dir {root}: has no class {missing[0]} ({len(missing)} of {len(folders)} missing)")
    where = [split.folders.index(f) for f in folders]
    kept = {
        name: tuple(getattr(split, name)[i] for i in where) for name in ("folders", "prompts", "class_ids", "items")
    }
    split = type(split)(split.dataset, split.name, **kept, arrays=split.arrays)
    empty = [f for f, items in zip(split.folders, split.items) if not items]
    if empty:
        refuse(f"--val_dir {root}: the class {empty[0]} has no test image")
    return split


SHORT = {
    "optimizer": "opt",
    "weight_decay": "wd",
    "temperature": "T",
    "cos_stretch": "stretch",
    "step_factor": "factor",
    "warmup_epochs": "warmup",
    "ce_weight": "ce",
    "bn_refresh": "bnrefresh",
    "color_jitter": "jitter",
}
SEED_FILES = (("student_seed", "safetensors"), ("seed", "json"))


def student_name(inputs, recipe, chunk, args):
    """`{labels}_{model}` plus what is not the default."""
    default = Recipe(loss="ce" if args.hard_label else "kl")
    if args.sgd:
        default = default._replace(lr=1.024, weight_decay=3e-5)
    options = {"train": inputs.protocol["epochs"], "bn": chunk}
    defaults = {"train": inputs.label_epochs, "bn": inputs.protocol["batch_size"]}
    for name, value in recipe._asdict().items():
        options[SHORT.get(name, name)] = value
        defaults[SHORT.get(name, name)] = getattr(default, name)
    options |= {"amp": args.amp, "seeds": args.seeds}
    defaults |= {"amp": "none", "seeds": [0]}
    return output_name(f"{inputs.stem}_{args.model.replace(':', '-')}", options, defaults)


class Inputs(NamedTuple):
    """What a student learns from.

    protocol   epochs, batch size, crops, mix ... of its batches; label_epochs: how many epochs are labelled
    labels     (folder, {file: sha256}) of stored labels, else None; content: their digest
    labelled   {"amp", "channels_last"} of the teacher when it made the labels; None for hard ones
    stem       name of the labels, stored or not, which names the result
    """

    images: ImageSet
    arrays: list | None
    protocol: dict
    label_epochs: int
    half: bool
    labels: tuple | None
    content: str | None
    labelled: dict | None
    teachers: list
    teacher_facts: list
    stem: str


def read_inputs(args, process):
    """Images and labels (stored, or how they will be made) that fit each other; pixels only of a foreign folder."""
    images, arrays = open_images("--train_dir", args.train_dir, args.dataset), None
    if images.foreign:  # its content is known only from its pixels
        arrays, images = load_pixels("--train_dir", images, args.num_workers)
    if not (args.online or args.hard_label):
        folder, manifest = open_labels(args.fkd_path, images, vars(args), args.verify)
        settings = manifest["arguments"]
        protocol = {name: settings[name] for name in PROTOCOL} | {"epochs": args.epochs or settings["epochs"]}
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        return Inputs(
            images, arrays, protocol, settings["epochs"], settings["use_fp16"], (folder, digests),
            manifest["content"], {name: settings[name] for name in ("amp", "channels_last")}, [], manifest["teacher"],
            folder.resolve().name,
        )  # fmt: skip
    protocol = protocol_of(vars(args), images.image_size or DATASETS[images.dataset].image_size)
    half, labelled, teachers, facts = args.use_fp16 is not False, None, [], []
    if args.online:
        archs = args.arch or ["resnet18"]
        teachers, facts = load_teachers(
            archs, args.teacher_checkpoint, images.dataset, images.folders, protocol["input_size"], process.device
        )
        labelled = {"amp": "none", "channels_last": False}
        stem = labels_name(images.name, archs, protocol, images.image_size, name_extras(half, **labelled))
        stem += "_online"
    else:
        stem = labels_name(images.name, ["hard"], protocol, images.image_size)
    return Inputs(images, arrays, protocol, protocol["epochs"], half, None, None, labelled, teachers, facts, stem)


# ---- main


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = this_process(args.device)
    forward = Forward(process.device, args.amp, args.channels_last, args.compile)
    if args.evaluate:
        return evaluate_checkpoint(args, process, forward)
    inputs = read_inputs(args, process)
    images, protocol, recipe = inputs.images, inputs.protocol, recipe_of(args)
    check_warmup(recipe.warmup_epochs, protocol["epochs"])
    test = open_test(images.dataset, args.val_dir, images.folders)
    chunk = chunk_size(protocol["batch_size"], process.world, args.gradient_accumulation_steps, args.bn_batch)
    settings = {
        "model": args.model,
        "labels": "online" if args.online else "hard" if args.hard_label else "stored",
        **protocol,
        **recipe._asdict(),
        "seeds": args.seeds,
        "bn_batch": chunk,
        "eval_every": args.eval_every,
        "amp": args.amp,
        "channels_last": args.channels_last,
        "compile": args.compile,
        "fused": args.fused,
        "use_fp16": inputs.half,
        "dataset": images.dataset,
        "images": images.content,
        "labels_content": inputs.content,
        "teacher": [[t["arch"], t["sha256"]] for t in inputs.teacher_facts],
        "test_images": sum(map(len, test.items)),
        "test_sha256": test.fingerprint(),
    }
    folder = Path(args.output_dir) / student_name(inputs, recipe, chunk, args)
    accelerator = join_processes(process, args.tracker, args.output_dir)
    with output_folder("--output_dir", folder, settings, process) as settings:
        complete = is_complete(folder)
        trained = {s: settings["epochs"] if complete else epochs_trained(folder, s, settings) for s in args.seeds}
        check_ranks(folder, settings, list(trained.values()), process)
        if complete:
            read_manifest("--output_dir", folder, "student")
            if process.is_main and not (folder / TIMING).exists():  # killed just after the manifest
                write_timing(folder)
            print(f"{folder}: already there")
        else:
            watch = Stopwatch()
            units = train(args, inputs, test, settings, recipe, folder, trained, process, forward, accelerator)
            if process.is_main:
                cost = log_run(folder, process, watch, units)
                finish_folder(folder, settings, inputs, args.seeds, cost)
    if accelerator:
        accelerator.end_training()
    return folder


def train(args, inputs, test, settings, recipe, folder, trained, process, forward, accelerator):
    """Images to memory (or the device), then every seed; returns the number of epochs trained now.

    trained   {seed: epochs that it is trained already}
    """
    images, protocol, facts = inputs.images, inputs.protocol, DATASETS[inputs.images.dataset]
    chunk = settings["bn_batch"]
    arrays = inputs.arrays or load_pixels("--train_dir", images, args.num_workers)[0]

    def rows_of(count):
        rows = rank_chunks(count, chunk, process.rank, process.world)[1]
        return whole_blocks(rows, count) if args.online else rows

    feed = Feed(arrays, images, protocol, process.device, inputs.labels, rows_of if process.world > 1 else None)
    pixels, targets = validation_pixels(
        test, protocol["input_size"], process.device, process.rank, process.world, args.num_workers
    )

    def test_model(model):
        return evaluate(model, pixels, targets, forward, facts.mean, facts.std, process.world)

    def track(seed, row):
        if args.tracker:
            accelerator.log({f"seed{seed}/{k}": v for k, v in row.items() if k != "epoch"}, step=row["epoch"])

    if args.tracker:
        accelerator.init_trackers("d4m", {"train_dir": args.train_dir, "model": args.model, **recipe._asdict()})
    job = Job(
        args.model, recipe, protocol, len(images.folders), images.targets, chunk, inputs.half, inputs.teachers,
        args.fused, args.eval_every, args.checkpoint_every, settings_digest(settings),
    )  # fmt: skip
    with memory_for("in training", "lower --bn_batch, or raise --gradient_accumulation_steps"):
        return train_students(job, trained, folder, feed, process, forward, test_model, track, args.num_workers)


def finish_folder(folder, settings, inputs, seeds, cost):
    """results.json and the manifest; cost: what `log_run` says."""
    images = inputs.images
    top1 = write_results(folder, settings, inputs, seeds)["summary"]["last"]["top1"]
    files = ["results.json", *(f"{name}{seed}.{end}" for seed in seeds for name, end in SEED_FILES)]
    classes = [{"index": c, "folder": f} for c, f in enumerate(images.folders)]
    facts = {"dataset": images.dataset, "classes": classes, "images": images.facts()}
    write_manifest(folder, "student", settings, files, facts)
    write_timing(folder)
    spread = "" if top1["std"] is None else f" +- {top1['std']:.2f}"
    print(f"{folder}: top-1 {top1['mean']:.2f}{spread} (n = {top1['n']}) in {cost}")


def whole_blocks(rows, count):
    """The rows of each block of TEACHER_ROWS that holds one of `rows`: no teacher's batch depends on ranks."""
    blocks = torch.unique(rows // TEACHER_ROWS)
    every = torch.arange(count)
    return every[torch.isin(every // TEACHER_ROWS, blocks)]


# ---- training


class Job(NamedTuple):
    """What all seeds share."""

    model: str
    recipe: Recipe
    protocol: dict
    classes: int
    targets: torch.Tensor  # class of each image
    chunk: int
    half: bool
    teachers: list
    fused: bool
    eval_every: int
    checkpoint_every: int
    settings_sha256: str | None = None


class Student:
    """What a checkpoint holds of one seed: network, optimiser, average, rows. Dropout has keys, not a state."""

    def __init__(self, job, seed, folder, forward, first=0):
        self.seed, self.path, recipe = seed, checkpoint_path(folder, seed), job.recipe
        self.settings_sha256 = job.settings_sha256
        with seeded(seed, WEIGHTS):
            model = create_model(job.model, job.classes, job.protocol["input_size"])
        self.model = forward.place(model)
        self.average = Average(plain(self.model), recipe.ema) if recipe.ema else None
        self.optimizer = make_optimizer(
            self.model, recipe.optimizer == "sgd", recipe.lr, recipe.weight_decay, recipe.momentum, job.fused
        )
        self.epoch, self.rows, self.random = 0, [], has_random_layers(model)
        if first:
            state = load_checkpoint(self.path, job.protocol["epochs"], job.settings_sha256)
            restore(self.path, state, self.model, self.optimizer, self.average)
            self.epoch, self.rows = state["epoch"], state["rows"]

    @property
    def tested(self):
        return self.average.model if self.average else self.model

    def save(self):
        state = {
            "epoch": self.epoch,
            "model": plain(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.average.model.state_dict() if self.average else None,
            "rows": self.rows,
        }
        save_checkpoint(self.path, state, self.settings_sha256)

    def finish(self, folder):
        """Weights, then rows, then the checkpoint goes: a stop in between repeats at most the last write."""
        weights = folder / f"student_seed{self.seed}.safetensors"
        save_weights(weights, self.tested)
        digests = {"settings_sha256": self.settings_sha256, "weights_sha256": sha256(weights)}
        write_json(folder / f"seed{self.seed}.json", {"seed": self.seed, **digests, "rows": self.rows})
        self.path.unlink(missing_ok=True)


def epochs_trained(folder, seed, settings):
    """How many of a seed's epochs are trained already, by its finished files or its checkpoint."""
    if all((folder / f"{name}{seed}.{end}").exists() for name, end in SEED_FILES):
        return len(read_rows(folder, seed, settings))
    path = checkpoint_path(folder, seed)
    return load_checkpoint(path, settings["epochs"], settings_digest(settings))["epoch"] if path.exists() else 0


def train_students(job, trained, folder, feed, process, forward, test_model, track, num_workers):
    """One student a seed, one after the other, over one loader; returns the number of epochs trained now."""
    epochs, count = job.protocol["epochs"], len(job.targets)
    batches = batches_of(count, job.protocol["batch_size"])
    todo = [(seed, first) for seed, first in trained.items() if first < epochs]
    for seed in trained.keys() - dict(todo).keys():
        if process.is_main:  # killed between its last file and this
            checkpoint_path(folder, seed).unlink(missing_ok=True)
    keys = [(epoch, b) for _, first in todo for epoch in range(first, epochs) for b in range(batches)]
    items = feed.loader(keys, num_workers)
    units = sum(epochs - first for _, first in todo)
    bar = progress(total=units * count, desc=job.model, unit="image", quiet=not process.is_main)
    with StopSignals() as signals, bar:
        for seed, first in todo:
            student = Student(job, seed, folder, forward, first)
            if process.is_main and not student.epoch:
                copies = 4 + bool(student.average)
                require_space("--output_dir", folder, 4 * copies * count_parameters(student.model) + 2**20)
            while student.epoch < epochs:
                row = train_epoch(job, student, items, batches, feed, process, forward, bar)
                asked = torch.tensor([float(signals.name is not None)], device=process.device)
                sum_over_ranks([asked], process.world)
                last = student.epoch == epochs
                if student.epoch % job.eval_every == 0 or last:
                    row |= test_model(student.tested)
                    bar.set_postfix(seed=seed, top1=f"{row['top1']:.2f}")
                student.rows.append(row)
                track(seed, row)
                if process.is_main:
                    if last:
                        student.finish(folder)
                    elif student.epoch % job.checkpoint_every == 0 or asked:
                        student.save()
                if asked:
                    sum_over_ranks([asked], process.world)  # a rank that left while rank 0 saves may get it killed
                    signals.name = signals.name or "SIGTERM"
                    signals.leave_if_asked()
    return units


def train_epoch(job, student, items, batches, feed, process, forward, bar):
    """One epoch over the next `batches` items; returns its row."""
    recipe, epoch = job.recipe, student.epoch
    lr = recipe.lr * lr_factor(
        recipe.schedule, epoch, job.protocol["epochs"], recipe.cos_stretch, recipe.warmup_epochs, recipe.step_factor
    )
    set_lr(student.optimizer, lr)
    model = student.model.train()
    total, seen = torch.zeros((), device=process.device), 0
    for _ in range(batches):
        item = next(items)
        count = len(item.batch.index)
        chunks, own = rank_chunks(count, job.chunk, process.rank, process.world)
        x, logits, targets, other = prepare(job, item, feed, process, own)
        x = forward.lay_out(x)
        key = (student.seed, DROPOUT, epoch, item.number) if student.random else None
        if recipe.bn_refresh:
            refresh_batch_norm(model, forward, feed, item, chunks, own, process, key)

        def loss_of(rows, x=x, logits=logits, targets=targets, other=other, lam=item.batch.lam):
            outputs = forward(model, x[rows])
            if recipe.loss == "kl":
                return soft_loss(outputs, logits[rows], recipe.temperature)
            if recipe.loss == "mse_ce":
                return mse_ce_loss(outputs, logits[rows], targets[rows], other[rows], lam, recipe.ce_weight)
            return hard_loss(outputs, targets[rows], other[rows], lam)

        total += train_step(model, student.optimizer, chunks, count, loss_of, process.world, key)
        if student.average:
            student.average.update(plain(model))
        seen += len(chunks)
        bar.update(count)
    average_buffers(model, seen, process.world)
    if student.average:
        student.average.copy_buffers(plain(model))
    sum_over_ranks([total], process.world)
    flag = "--learning_rate" if recipe.optimizer == "sgd" else "--adamw_lr"
    loss = checked_loss(total.item() / batches, epoch, flag)
    student.epoch += 1
    return {"epoch": epoch, "lr": lr, "loss": loss}


def prepare(job, item, feed, process, own):
    """Input, logits, class and partner's class of this rank's rows, on the device."""
    device, batch = process.device, item.batch
    if job.recipe.color_jitter or job.recipe.lighting:
        x = mixed_with_jitter(job, item, feed)
    else:
        x = feed.mixed(item)
    whole = item.rows is None  # `own` is every row then, and indexing would copy them all to memory that is not pinned
    logits = item.logits
    if logits is not None and not whole:
        logits = logits[own]
    if job.teachers:
        logits = teacher_logits(job.teachers, x, half=job.half)
    if not whole:  # more rows may be here than this rank trains on
        where = sent(torch.searchsorted(item.rows, own), device)
        x = x[where]
        logits = logits[where] if job.teachers else logits
    targets = job.targets[batch.index]
    logits = sent(logits, device) if logits is not None else None
    return x, logits, sent(targets[own], device), sent(targets[batch.partner[own]], device)


def mixed_with_jitter(job, item, feed):
    """As Feed.mixed, with colours jittered before the mix (Minimax)."""
    recipe, seed = job.recipe, job.protocol["fkd_seed"]
    count = len(item.batch.index)
    g = generator(seed, JITTER, item.epoch, item.number)
    held = item.held if item.held is not None else torch.arange(count)
    x = color_jitter(
        feed.unmixed(item), held, count, recipe.color_jitter, recipe.lighting, feed.facts.mean, feed.facts.std, g
    )
    return mix(x, item.batch, job.protocol["mix_type"], item.rows, item.held)


@torch.no_grad()
def refresh_batch_norm(model, forward, feed, item, chunks, own, process, key):
    """RDED: one more forward in train mode, without gradient, on the un-mixed images."""
    x = feed.unmixed(item)
    if item.held is not None:
        x = x[sent(torch.searchsorted(item.held, own), process.device)]
    x = forward.lay_out(x)
    for first, rows in chunks:
        with seeded(*key, first, 1, device=process.device) if key else contextlib.nullcontext():
            forward(model, x[rows])


KEPT = ("epoch", "top1", "top5")


def read_rows(folder, seed, settings):
    """The rows of a finished seed; refuses, in one line, files that no run of these settings has written."""
    path, weights, epochs = folder / f"seed{seed}.json", folder / f"student_seed{seed}.safetensors", settings["epochs"]
    found = read_json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or len(rows) != epochs or not all(isinstance(row, dict) for row in rows):
        refuse(f"{path}: does not hold the rows of {epochs} epochs; remove it to train this seed again")
    for row in [row for row in rows if "top1" in row] + rows[-1:]:
        odd = wrong_field(row, dict.fromkeys(KEPT, (int, float)))
        if odd:
            refuse(f"{path}: a row of a test does not say {odd}; remove it to train this seed again")
    check_unit(path, (found.get("seed"), found.get("settings_sha256")), (seed, settings_digest(settings)))
    if found.get("weights_sha256") != sha256(weights):
        refuse(f"{weights}: not the weights that {path.name} is of; remove both to train this seed again")
    return rows


def write_results(folder, settings, inputs, seeds):
    """results.json: no seconds and no paths in it, so that equal runs give equal bytes."""
    images, by_seed = inputs.images, []
    for seed in seeds:
        rows = read_rows(folder, seed, settings)
        tested = [row for row in rows if "top1" in row]
        by_seed.append(
            {
                "seed": seed,
                "last": {k: tested[-1][k] for k in KEPT},
                "best": {k: max(tested, key=lambda row: row["top1"])[k] for k in KEPT},
                "rows": rows,
            }
        )
    results = {
        "arguments": settings,
        "images": {"name": images.name, "classes": len(images.folders), **images.facts()},
        "teacher": [{k: t.get(k) for k in ("arch", "weights", "sha256", "arguments")} for t in inputs.teacher_facts],
        "labels": inputs.labelled,
        "summary": {
            which: {k: summary([s[which][k] for s in by_seed]) for k in ("top1", "top5")} for which in ("last", "best")
        },
        "seeds": by_seed,
    }
    write_json(folder / "results.json", results)
    return results


def evaluate_checkpoint(args, process, forward):
    """--evaluate: test some weights on --val_dir; prints and returns {"top1", "top5"}."""
    images = open_images("--train_dir", args.train_dir, args.dataset) if args.train_dir else None
    dataset = images.dataset if images else args.dataset
    if dataset is None:
        refuse("--evaluate: needs --dataset (or --train_dir), to know the classes")
    facts = DATASETS[dataset]
    folders = images.folders if images else open_split(dataset, args.val_dir, "val", flag="--val_dir").folders
    size = args.input_size or (images and images.image_size) or facts.image_size
    state = read_state_dict(args.evaluate, "--evaluate")
    with seeded(0, WEIGHTS):
        model = create_model(args.model, len(folders), size)
    load_state(model, state, f"--evaluate {args.evaluate}")
    model = forward.place(model)
    accelerator = join_processes(process)
    test = open_test(dataset, args.val_dir, folders)
    pixels, targets = validation_pixels(test, size, process.device, process.rank, process.world, args.num_workers)
    scores = evaluate(model, pixels, targets, forward, facts.mean, facts.std, process.world)
    if process.is_main:
        count = sum(map(len, test.items))
        print(f"{args.evaluate}: top-1 {scores['top1']:.2f}, top-5 {scores['top5']:.2f} on {count} images")
    if accelerator:
        accelerator.end_training()
    return scores


if __name__ == "__main__":
    main()
