"""Stage 4 (paper, 3.3 and 4): a student on synthetic images and soft labels, tested on real images.

    python -m validate.train_FKD --train_dir output/images/NAME \\
        --fkd_path output/labels/NAME_resnet18_mix-cutmix --val_dir data/imagenet \\
        --model resnet18 --cos -T 20 --gradient_accumulation_steps 2
    sh validate/train_FKD.sh

Minimises KL(teacher(x), student(x)) over the replayed crops of the labels (the default), over crops
that the teacher labels during training (--online: same draws, same numbers), or trains on class
indices (--hard_label). Writes OUTPUT_DIR/<name>/results.json (arguments, a row per epoch, last and
best top-1/top-5 by seed, mean and std), the weights, and manifest.json. The same command goes on
from the last checkpoint of a stopped run, to the same weights.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import torch

from distillation import datasets
from matching import batches, generate_soft_label, labels, models, ranks, training
from matching import images as image_sets
from matching.feed import Feed
from scripts import files, output, runtime
from scripts.runtime import JITTER, Parser, number, refuse

RETIRED = {
    "--keep_topk": "nothing used it",
    "--start_epoch": "the same command resumes from its checkpoint",
    "--wandb_project": "use --tracker wandb, and wandb's own WANDB_PROJECT",
    "--wandb_api_key": "use --tracker wandb after `wandb login`; a command line is public",
    "--seed": "use --seeds",
}


def get_args(argv=None):
    parser = Parser("validate.train_FKD", __doc__, RETIRED)
    flag, setting = parser.flag, parser.setting
    parser.heading("data")
    flag("--train_dir", help="an image folder of stage 2, or any other")
    where = "its labels folder of stage 3, or the folder above (not with --online, --hard_label)"
    flag("--fkd_path", help=where)
    flag("--val_dir", help="the real data set's root (not for digits)")
    known = "the data set of the images [what their manifest says]"
    setting("--dataset", type=datasets.name, metavar="NAME", help=known)
    flag("--output_dir", default="output/students", help="the folder is made below this one")
    flag("--verify", action="store_true", help="hash every label file at the start")
    switch = {"action": "store_true", "default": False}
    setting("--online", help="the teacher labels during training; no labels folder", **switch)
    setting("--hard_label", help="train on class indices; no teacher", **switch)
    flag("--evaluate", metavar="CHECKPOINT", help="only test these weights on --val_dir")

    parser.heading("student")
    positive, natural, factor = number(float, above=0), number(int, 0), number(float, 0)
    below_one, share = number(float, 0, below=1), number(float, above=0, most=1)
    setting("--model", type=models.model_name, default="resnet18", help="see matching/models.py")
    setting("--sgd", short="opt-sgd", help="SGD instead of AdamW", **switch)
    setting("--adamw_lr", type=positive, default=0.001, short="lr", help="peak")
    decay = "on matrices and convolutions only"
    setting("--adamw_weight_decay", type=factor, default=0.01, short="wd", help=decay)
    setting("-lr", "--learning_rate", type=positive, default=1.024, short="lr", help="of SGD")
    setting("--weight_decay", type=factor, default=3e-5, short="wd", help="of SGD")
    setting("--momentum", type=below_one, default=0.875, short="momentum", help="of SGD")
    schedule = {"default": "linear", "short": "schedule", "help": "learning rate by epoch"}
    setting("--schedule", choices=training.SCHEDULES, **schedule)
    cosine = {"action": "store_const", "const": "cosine", "default": "linear"}
    flag("--cos", dest="schedule", help="same as --schedule cosine", **cosine)
    stretch = "cosine over this many times the epochs; 2 ends at half (RDED)"
    setting("--cos_stretch", type=number(float, 1), default=1.0, short="stretch", help=stretch)
    steps = "of --schedule step, at 2/3 and 5/6 of the epochs"
    setting("--step_factor", type=share, default=0.2, short="factor", help=steps)
    warmup = "linear, before the schedule"
    setting("--warmup_epochs", type=natural, default=0, short="warmup", help=warmup)
    loss = "kl (paper); mse_ce: squared error of logits + --ce_weight x cross-entropy (EDC)"
    setting("--loss", choices=training.LOSSES, default="kl", short="loss", help=loss)
    both = "of both sides of the KL; no T^2 factor"
    setting("-T", "--temperature", type=positive, default=3.0, short="T", help=both)
    setting("--ce_weight", type=factor, default=0.025, short="ce", help="of --loss mse_ce")
    ema = "decay of averaged weights, which are tested; 0: none"
    setting("--ema", type=below_one, default=0.0, short="ema", help=ema)
    refresh = "an extra forward on un-mixed images refreshes BatchNorm (RDED)"
    setting("--bn_refresh", short="bnrefresh", help=refresh, **switch)
    jitter = "with --hard_label: strength (Minimax: 0.4)"
    setting("--color_jitter", type=factor, default=0.0, short="jitter", help=jitter)
    noise = "with --hard_label: PCA noise (Minimax: 0.1)"
    setting("--lighting", type=factor, default=0.0, short="lighting", help=noise)
    seeds = {"nargs": "+", "type": natural, "default": [0], "short": "seeds"}
    setting("--seeds", help="one student from scratch for each", **seeds)

    batches.add_batch_flags(parser, stored=True)
    generate_soft_label.add_teacher_flags(parser, None)
    training.add_training_flags(parser)
    flag("--tracker", help="tensorboard, wandb, ... through accelerate")
    runtime.add_process_flags(parser)
    workers = {"type": natural, "default": argparse.SUPPRESS, "help": "same as --num_workers"}
    flag("-j", "--workers", dest="num_workers", **workers)
    args = parser.parse_args(argv)

    own = "--online" if args.online else "--hard_label" if args.hard_label else None
    needed = "the labels of stage 3 (or --online, or --hard_label)"
    teacher = args.arch or args.teacher_checkpoint
    if args.shard != "0/1":
        refuse(f"--shard {args.shard}: training is one job; use torchrun for several processes")
    if args.online and args.hard_label:
        refuse("--online and --hard_label: only one of them")
    if not args.train_dir and not args.evaluate:
        refuse("--train_dir: missing; an image folder of stage 2")
    if own and args.fkd_path:
        refuse(f"--fkd_path {args.fkd_path}: not with {own}, which reads no labels")
    if not (own or args.fkd_path or args.evaluate):
        refuse(f"--fkd_path: missing; {needed}")
    if args.hard_label and teacher:
        refuse("--hard_label: has no teacher; drop --arch and --teacher_checkpoint")
    if (args.color_jitter or args.lighting) and not args.hard_label:
        refuse("--color_jitter, --lighting: only with --hard_label; a teacher labels without them")
    if len(set(args.seeds)) < len(args.seeds):
        refuse(f"--seeds {' '.join(map(str, args.seeds))}: a seed stands twice")
    return args


# ---- what a student learns from

BATCH = tuple(batches.PROTOCOL)


class Lessons:
    """Images with labels that are stored, made now, or their classes: see training.train.

    stem       name of the labels, stored or not, which names the result
    settings   a Settings, with the batches' values that the labels were made with
    facts      of each teacher;   made: {"amp", "channels_last"} of its labels; None: hard labels
    content    digest of stored labels;   labelled: their epochs
    """

    def __init__(self, images, settings, process, num_workers):
        self.arrays, self.process, self.num_workers = None, process, num_workers
        if images.foreign:  # its content is known only from its pixels
            self.arrays, images = image_sets.load_pixels("--train_dir", images, num_workers)
        self.images, self.settings = images, settings.filled(dataset=images.dataset)
        self.networks, self.facts, self.stored = [], [], None
        self.content = self.made = self.labelled = None
        hard = settings["hard_label"]
        self.loss = training.hard_loss if hard else training.LOSSES[settings["loss"]]

    @property
    def count(self):
        return len(self.images.files)

    def inputs(self):
        """Hashes of what is learnt from."""
        teachers = [[facts["arch"], facts["sha256"]] for facts in self.facts]
        contents = {"images": self.images.content, "labels_content": self.content}
        return {**contents, "teacher": teachers}

    def replay(self, path, checkpoints, verify):
        """Take the labels that stage 3 made of these images; refuses others."""
        given = {**self.settings, "teacher_checkpoint": checkpoints}
        folder, manifest = labels.open_labels(path, self.images, given, verify)
        made, self.facts = manifest["arguments"], manifest["teacher"]
        fixed = {name: made[name] for name in (*BATCH, "use_fp16", "arch")}
        self.settings, self.stem = self.settings.filled(**fixed), folder.resolve().name
        self.stored = folder, {name: entry["sha256"] for name, entry in manifest["files"].items()}
        self.content, self.labelled = manifest["content"], made["epochs"]
        self.made = {name: made[name] for name in ("amp", "channels_last")}

    def draw(self, checkpoints):
        """Draw the batches now, for teachers that label them (--online) or for the classes."""
        size = self.images.image_size or datasets.ALL[self.images.dataset].image_size
        usual = {**batches.PROTOCOL, "input_size": size, "use_fp16": True}
        settings = self.settings = self.settings.filled(**usual)
        batches.check_scales(settings["min_scale_crops"], settings["max_scale_crops"])
        if settings["hard_label"]:
            self.stem = labels.labels_name(self.images.name, ["hard"], settings.only(BATCH))
            return
        settings = self.settings = settings.filled(arch=["resnet18"])
        where = self.images.dataset, self.images.folders, settings["input_size"]
        loaded = generate_soft_label.load_teachers(
            settings["arch"], checkpoints, *where, self.process.device
        )
        self.networks, self.facts = loaded
        self.made = {"amp": "none", "channels_last": False}
        named = settings.only([*BATCH, "use_fp16"])
        self.stem = f"{labels.labels_name(self.images.name, settings['arch'], named)}_online"

    def cut(self, accumulation_steps):
        """Settle --bn_batch: the images of one forward pass."""
        given, batch_size = self.settings["bn_batch"], self.settings["batch_size"]
        world = self.process.world
        size = training.chunk_size(batch_size, world, accumulation_steps, given)
        self.settings["bn_batch"] = size

    def network(self):
        classes, size = len(self.images.folders), self.settings["input_size"]
        return models.create_model(self.settings["model"], classes, size)

    def files_of(self, seed):
        return [f"student_seed{seed}.safetensors", f"seed{seed}.json"]

    def loader(self, keys):
        arrays, rows_of = self.arrays, self.needed if self.process.world > 1 else None
        if arrays is None:
            arrays, _ = image_sets.load_pixels("--train_dir", self.images, self.num_workers)
        where = self.process.device, self.stored, rows_of
        self.feed = Feed(arrays, self.images, self.settings, *where)
        return self.feed.loader(keys, self.num_workers)

    def own(self, count):
        """The rows of a batch of `count` that this process trains on."""
        where = self.settings["bn_batch"], self.process.rank, self.process.world
        return training.rank_chunks(count, *where)[1]

    def needed(self, count):
        """Its own rows; with --online the blocks that hold them, as the teacher takes them.

        So no batch of the teacher depends on the number of processes.
        """
        rows, every, size = self.own(count), torch.arange(count), generate_soft_label.TEACHER_ROWS
        return every[torch.isin(every // size, rows // size)] if self.networks else rows

    def part(self, item):
        """The training.Part of an item of the feed."""
        s, count, device = self.settings, len(item.batch.index), self.process.device
        own, logits, change = self.own(count), item.logits, None
        if s["color_jitter"] or s["lighting"]:
            g = runtime.generator(s["fkd_seed"], JITTER, item.epoch, item.number)
            strength = s["color_jitter"], s["lighting"]
            change = partial(color_jitter, strength=strength, facts=self.feed.facts, g=g)
        x = self.feed.mixed(item, change)
        unmixed = self.feed.unmixed(item) if s["bn_refresh"] else None
        if self.networks:
            logits = generate_soft_label.teacher_logits(self.networks, x, half=s["use_fp16"])
            if item.rows is not None:  # more rows are here than this process trains on
                where = batches.sent(torch.searchsorted(item.rows, own), device)
                x, logits = x[where], logits[where]
                unmixed = None if unmixed is None else unmixed[where]
        elif logits is not None:
            logits = batches.sent(logits if item.rows is None else logits[own], device)
        targets = self.images.targets[item.batch.index]
        classes = (batches.sent(targets[i], device) for i in (own, item.batch.partner[own]))
        return training.Part(count, x, training.Goal(logits, *classes, item.batch.lam), unmixed)


GRAY = (0.299, 0.587, 0.114)
# of ImageNet's RGB covariance (Krizhevsky et al. 2012), as the whole field uses them
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def color_jitter(x, rows, count, strength, facts, g):
    """Minimax: brightness, contrast and saturation in random order, then PCA noise.

    x          (n, 3, S, S) normalised: the rows `rows` of a batch of `count`. The draws are of the
               whole batch, so that processes agree
    strength   (largest change of the three, standard deviation of the noise);   facts: mean, std
    """
    jitter, lighting = strength
    order = torch.rand(count, 3, generator=g).argsort(1)[rows].to(x.device)  # which comes when
    alpha = (torch.rand(count, 3, generator=g) * 2 - 1)[rows].to(x.device) * jitter
    noise = torch.randn(count, 3, generator=g)[rows].to(x.device) * lighting
    constants = (facts.mean, facts.std, GRAY)
    mean, std, gray = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in constants)
    x = x * std + mean
    for place in range(3):
        kind = order[:, place].view(-1, 1, 1, 1)
        shade = (x * gray).sum(1, keepdim=True)  # (n, 1, S, S)
        flat = shade.mean((2, 3), keepdim=True)
        dark = torch.zeros_like(shade)
        towards = torch.where(kind == 0, dark, torch.where(kind == 1, flat, shade))
        x = x + alpha[:, place].view(-1, 1, 1, 1) * (towards - x)
    values, vectors = (torch.tensor(v, device=x.device) for v in (EIGENVALUES, EIGENVECTORS))
    x = x + ((noise * values) @ vectors.T).view(-1, 3, 1, 1)
    return (x - mean) / std


def open_test(dataset, root, folders):
    """The real test images of the classes `folders`, in that order."""
    known = list(folders) if datasets.known_prompts(dataset) else None
    split = datasets.open_split(dataset, root, "val", classes=known, flag="--val_dir")
    missing = [f for f in folders if f not in split.folders]
    if missing:
        count = f"{len(missing)} of {len(folders)} missing"
        refuse(f"--val_dir {root}: has no class {missing[0]} ({count})")
    where = [split.folders.index(f) for f in folders]
    names = ("folders", "prompts", "class_ids", "items")
    kept = {name: tuple(getattr(split, name)[i] for i in where) for name in names}
    split = dataclasses.replace(split, **kept)
    datasets.check_class_sizes(split, 1, flag=f"--val_dir {root}")
    return split


def student_name(stem, settings, labelled=None):
    """`{labels}_{model}` plus what is not the default.   labelled: epochs of stored labels"""
    epochs = settings["epochs"]
    train = [] if labelled in (None, epochs) else [f"train{epochs}"]
    other = ("adamw_lr", "adamw_weight_decay")  # of the optimiser that is not used
    other = other if settings["sgd"] else ("learning_rate", "weight_decay")
    aside = {*BATCH, *other, "arch", "use_fp16", "bn_batch", "amp", "seeds"}
    shown = ["bn_batch", *(name for name in settings if name not in aside), "amp", "seeds"]
    parts = settings.filled(bn_batch=settings["batch_size"]).only(shown).parts()
    return output.folder_name(f"{stem}_{settings['model'].replace(':', '-')}", *train, *parts)


# ---- main


@runtime.entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    forward = training.Forward(process.device, args.amp, args.channels_last, args.compile)
    where = args.train_dir, args.val_dir
    if args.evaluate:
        how = args.num_workers, forward, process
        return evaluate_weights(args.evaluate, args.settings, *where, *how)
    sources = [generate_soft_label.missing_inputs(args.train_dir, args.teacher_checkpoint)]
    if args.fkd_path:
        sources.append(output.awaited(args.fkd_path, "matching.generate_soft_label"))
    missing = "; ".join(filter(None, sources))
    if process.dry_run and missing:
        return plan_student(args.settings, *where, args.fkd_path, args.output_dir, missing)
    images = image_sets.open_images("--train_dir", args.train_dir, args.dataset)
    lessons = Lessons(images, args.settings, process, args.num_workers)
    if args.fkd_path:
        lessons.replay(args.fkd_path, args.teacher_checkpoint, args.verify)
    else:
        lessons.draw(args.teacher_checkpoint)
    lessons.cut(args.gradient_accumulation_steps)
    settings, test = lessons.settings, open_test(images.dataset, args.val_dir, images.folders)
    training.check_warmup(args.warmup_epochs, settings["epochs"])
    inputs = {**lessons.inputs(), "test_images": test.count, "test_sha256": test.fingerprint()}
    name = student_name(lessons.stem, settings, lessons.labelled)
    where = ("--output_dir", args.output_dir, name, "student", settings, inputs, process)
    with (
        ranks.joined(process, args.tracker, args.output_dir) as accelerator,
        output.Output(*where, together=True) as out,
    ):
        states = training.open_seeds(out, args.seeds, lessons)
        if states:
            track = args.tracker and tracking(accelerator, settings)
            size = settings["input_size"]
            score = training.tester(test, size, forward, process, args.num_workers)
            training.train(out, states, lessons, forward, score, args.checkpoint_every, track)
        if process.is_main:
            finish(out, lessons)
    return out.folder


def tracking(accelerator, settings):
    """The function that hands a seed's row to the trackers."""
    plain = {name: v for name, v in settings.items() if isinstance(v, (bool, int, float, str))}
    accelerator.init_trackers("d4m", plain)

    def track(seed, row):
        values = {f"seed{seed}/{name}": value for name, value in row.items() if name != "epoch"}
        accelerator.log(values, step=row["epoch"])

    return track


def finish(out, lessons):
    """results.json, without seconds or paths: equal runs give equal bytes. Then the manifest."""
    images, epochs = lessons.images, out.settings["epochs"]
    names = [lessons.files_of(seed)[1] for seed in out.settings["seeds"]]
    seeds = [training.read_rows(out, name, epochs) for name in names]
    scores = {
        which: {k: training.summary([seed[which][k] for seed in seeds]) for k in ("top1", "top5")}
        for which in ("last", "best")
    }
    known = ("arch", "weights", "sha256", "arguments")
    results = {
        "arguments": out.settings | out.inputs,
        "images": {"name": images.name, "classes": len(images.folders), **images.facts()},
        "teacher": [{name: facts[name] for name in known} for facts in lessons.facts],
        "labels": lessons.made,
        "summary": scores,
        "seeds": seeds,
    }
    classes = [{"index": c, "folder": f} for c, f in enumerate(images.folders)]
    facts = {"dataset": images.dataset, "classes": classes, "images": images.facts()}
    out.finish(facts, {"results.json": lambda: files.json_text(results)}, "epochs")
    top1 = scores["last"]["top1"]
    spread = "" if top1["std"] is None else f" +- {top1['std']:.2f}"
    print(f"{out.folder}: top-1 {top1['mean']:.2f}{spread} (n = {top1['n']})")


def evaluate_weights(path, settings, train_dir, val_dir, num_workers, forward, process):
    """--evaluate: prints and returns {"top1", "top5"} of a file of weights on the test images."""
    dataset, size, name = settings["dataset"], settings["input_size"], settings["model"]
    if train_dir:
        images = image_sets.open_images("--train_dir", train_dir, dataset)
        dataset, folders, size = images.dataset, images.folders, size or images.image_size
    elif dataset:
        folders = datasets.open_split(dataset, val_dir, "val", flag="--val_dir").folders
    else:
        refuse("--evaluate: needs --dataset (or --train_dir), to know the classes")
    size = size or datasets.ALL[dataset].image_size
    state = models.read_state_dict(path, "--evaluate")
    with training.seeded(0):
        model = models.create_model(name, len(folders), size)
    models.load_state(model, state, f"--evaluate {path}")
    model, test = forward.place(model), open_test(dataset, val_dir, folders)
    with ranks.joined(process):
        scores = training.tester(test, size, forward, process, num_workers)(model)
    if process.is_main:
        found = f"top-1 {scores['top1']:.2f}, top-5 {scores['top5']:.2f}"
        print(f"{path}: {found} on {test.count} images")
    return scores


def plan_student(settings, train_dir, val_dir, fkd_path, root, waits_for):
    """--dry_run where the images, the labels or the teacher have yet to be made."""
    name, size, classes, _ = image_sets.outlook("--train_dir", train_dir, settings["dataset"])
    dataset, seeds = settings["dataset"] or name.split("_ipc")[0], len(settings["seeds"])
    if dataset in datasets.ALL:  # the rest is checked all the same
        datasets.open_split(dataset, val_dir, "val", flag="--val_dir")
    network = settings["model"], classes, settings["input_size"] or size
    build = partial(models.create_model, *network)
    needed = 4 * seeds * models.parameters_of(build) if all(network) else 0
    folder = Path(root) / student_name(Path(fkd_path or name).name, settings)
    output.plan(folder, 0, 2 * seeds, needed, waits_for)
    return folder


if __name__ == "__main__":
    main()
