"""Stage 4 (paper, 3.3 and 4): a student on synthetic images and soft labels, tested on real images.

    python -m validate.train_FKD --train_dir output/images/NAME \\
        --fkd_path output/labels/NAME_resnet18_mix-cutmix --val_dir data/imagenet \\
        --model resnet18 --cos -T 20 --gradient_accumulation_steps 2
    sh validate/train_FKD.sh

Minimises KL(teacher(x), student(x)) over the replayed crops of the labels (the default), over crops
that the teacher labels during training (--online: same draws, same numbers), or trains on class
indices (--hard_label). Writes OUTPUT_DIR/<name>/results.json (arguments, a row per epoch, last and
best top-1/top-5 by seed, mean and std over initial weights), the weights, and manifest.json. The
same command goes on from the last checkpoint of a stopped run, to the same weights. Defaults are
those of the release's parser; the paper's values are in validate/train_FKD.sh.
"""

import argparse
from functools import partial
from pathlib import Path

from distillation import datasets
from matching import batches, evaluation, generate_soft_label, models, ranks, training
from matching import images as image_sets
from matching.lessons import BATCH_SETTINGS, Lessons, drawn
from scripts import files, output, runtime
from scripts.runtime import Parser, number, refuse, warn

RETIRED = {
    "--keep_topk": "nothing used it",
    "--start_epoch": "the same command resumes from its checkpoint",
    "--wandb_project": "use --tracker wandb, and wandb's own WANDB_PROJECT",
    "--wandb_api_key": "use --tracker wandb after `wandb login`; a command line is public",
    "--seed": "use --seeds",
    "--label_top_k": "a flag of stage 3, whose labels say it; others are not stored",
}


def get_args(argv=None):
    parser = Parser("validate.train_FKD", __doc__, RETIRED)
    flag, setting = parser.flag, parser.setting
    switch = partial(setting, action="store_true", default=False)
    parser.heading("data")
    flag("--train_dir", help="an image folder of stage 2, or any other")
    where = "its labels folder of stage 3, or the folder above (not with --online, --hard_label)"
    flag("--fkd_path", help=where)
    flag("--val_dir", help="the real data set's root (not for digits)")
    known = "the data set of the images [what their manifest says]"
    setting("--dataset", type=datasets.name, metavar="NAME", help=known)
    flag("--output_dir", default="output/students", help="the folder is made below this one")
    flag("--verify", action="store_true", help="hash every label file at the start")
    switch("--online", help="the teacher labels during training; no labels folder")
    switch("--hard_label", help="train on class indices; no teacher")
    flag("--evaluate", metavar="CHECKPOINT", help="only test these weights on --val_dir")

    parser.heading("student")
    positive, natural, factor = number(float, above=0), number(int, 0), number(float, 0)
    below_one, share = number(float, 0, below=1), number(float, above=0, most=1)
    setting("--model", type=models.model_name, default="resnet18", help=models.known_names())
    switch("--sgd", short="opt-sgd", help="SGD instead of AdamW")
    setting("--adamw_lr", type=positive, default=0.001, short="lr", help="peak")
    setting("--adamw_weight_decay", type=factor, default=0.01, short="wd", help="of AdamW")
    decayed = "weights: what is called one, with more than one dimension; or all (Minimax)"
    setting("--decay_on", choices=training.DECAYED, default="weights", short="decay", help=decayed)
    setting("-lr", "--learning_rate", type=positive, default=1.024, short="lr", help="of SGD")
    setting("--weight_decay", type=factor, default=3e-5, short="wd", help="of SGD")
    setting("--momentum", type=below_one, default=0.875, short="momentum", help="of SGD")
    schedule = {"default": "linear", "short": "schedule", "help": "learning rate by epoch"}
    setting("--schedule", choices=training.SCHEDULES, **schedule)
    cosine = {"action": "store_const", "const": "cosine", "default": "linear"}
    flag("--cos", dest="schedule", help="same as --schedule cosine", **cosine)
    stretch = "cosine, cos2, linear: over this many times the epochs; 2 ends at half (RDED, EDC)"
    setting("--cos_stretch", type=number(float, 1), default=1.0, short="stretch", help=stretch)
    steps = "of --schedule step, at 2/3 and 5/6 of the epochs, and multistep, at 80, 90, 95 %%"
    setting("--step_factor", type=share, default=0.2, short="factor", help=steps)
    warmup = "linear, before the schedule"
    setting("--warmup_epochs", type=natural, default=0, short="warmup", help=warmup)
    loss = "kl (paper); mse_ce: squared error of logits + --ce_weight x cross-entropy (EDC)"
    setting("--loss", choices=training.LOSSES, default="kl", short="loss", help=loss)
    both = "of both sides of the KL, without T^2 (paper: 20)"
    setting("-T", "--temperature", type=positive, default=3.0, short="T", help=both)
    setting("--ce_weight", type=factor, default=0.025, short="ce", help="of --loss mse_ce")
    sizes = "cluster: an image counts by the size of its prototype's cluster (DDOQ)"
    setting("--loss_weights", choices=["cluster"], short="weights", help=sizes)
    ema = "decay of averaged weights, which are tested; 0: none"
    setting("--ema", type=below_one, default=0.0, short="ema", help=ema)
    refresh = "a forward without gradient before each step, for BatchNorm (RDED)"
    switch("--bn_refresh", short="bnrefresh", help=refresh)
    jitter = "with --hard_label: strength (Minimax: 0.4)"
    setting("--color_jitter", type=factor, default=0.0, short="jitter", help=jitter)
    noise = "with --hard_label: PCA noise (Minimax: 0.1)"
    setting("--lighting", type=factor, default=0.0, short="lighting", help=noise)
    shuffle = "parts of height and of width, in a new order before the crop (RDED: 2); 1: as it is"
    setting("--shuffle_patches", type=number(int, 1), default=1, short="shuffle", help=shuffle)
    evaluation.add_test_flag(parser)
    resize = "shorter side of a test image before its centre crop [256/224; small sets: whole]"
    setting("--test_resize", type=number(int, 1), short="resize", help=resize)
    seeds = {"nargs": "+", "type": natural, "default": [0], "short": "seeds"}
    each = "initial weights (and dropout), one student each; crops, order and CutMix are shared"
    setting("--seeds", help=each, **seeds)
    vary = "crops, order and mixing differ by seed (fkd_seed + seed); not with stored labels"
    switch("--vary_draws", short="varydraws", help=vary)

    batches.add_batch_flags(parser, stored=True)
    generate_soft_label.add_teacher_flags(parser, None)
    training.add_training_flags(parser)
    flag("--tracker", help="tensorboard, wandb, ... through accelerate")
    runtime.add_process_flags(parser)
    workers = {"type": natural, "default": argparse.SUPPRESS, "help": "same as --num_workers"}
    flag("-j", "--workers", dest="num_workers", **workers)
    args = parser.parse_args(argv)
    check_flags(**vars(args))
    return args


def check_flags(train_dir, fkd_path, online, hard_label, evaluate, shard, seeds, **rest):
    """Refuse flags that do not go together."""
    own = "--online" if online else "--hard_label" if hard_label else None
    if shard != "0/1":
        refuse(f"--shard {shard}: training is one job; use torchrun for several processes")
    if online and hard_label:
        refuse("--online and --hard_label: only one of them")
    if not train_dir and not evaluate:
        refuse("--train_dir: missing; an image folder of stage 2")
    if own and fkd_path:
        refuse(f"--fkd_path {fkd_path}: not with {own}, which reads no labels")
    if not (own or fkd_path or evaluate):
        refuse("--fkd_path: missing; the labels of stage 3 (or --online, or --hard_label)")
    if fkd_path and (rest["vary_draws"] or rest["shuffle_patches"] > 1):
        refuse("--vary_draws, --shuffle_patches: not with --fkd_path, whose labels fix every draw")
    if hard_label and (rest["arch"] or rest["teacher_checkpoint"]):
        refuse("--hard_label: has no teacher; drop --arch and --teacher_checkpoint")
    if (rest["color_jitter"] or rest["lighting"]) and not hard_label:
        refuse("--color_jitter, --lighting: only with --hard_label; a teacher labels without them")
    if len(set(seeds)) < len(seeds):
        refuse(f"--seeds {' '.join(map(str, seeds))}: a seed stands twice")


def check_resize(pixels, size):
    if pixels and pixels < size:
        refuse(f"--test_resize {pixels}: below the input's {size} px")


def student_name(stem, settings, labelled=None):
    """`{labels}_{model}` plus what is not the default.   labelled: epochs of stored labels"""
    epochs = settings["epochs"]
    train = [] if labelled in (None, epochs) else [f"train{epochs}"]
    other = ("adamw_lr", "adamw_weight_decay")  # of the optimiser that is not used
    other = other if settings["sgd"] else ("learning_rate", "weight_decay")
    aside = {*BATCH_SETTINGS, *other, "arch", "use_fp16", "bn_batch", "amp", "seeds"}
    shown = ["bn_batch", *(name for name in settings if name not in aside), "amp", "seeds"]
    parts = settings.filled(bn_batch=settings["batch_size"]).only(shown).parts()
    return output.folder_name(f"{stem}_{settings['model'].replace(':', '-')}", *train, *parts)


# ---- main


@runtime.entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    forward = training.Forward(process.device, args.amp, args.channels_last, args.compile)
    where, how = (args.train_dir, args.val_dir), (forward, process, args.num_workers)
    if args.evaluate:
        return evaluate_weights(args.evaluate, args.settings, *where, *how)
    sources = [generate_soft_label.missing_inputs(args.train_dir, args.teacher_checkpoint)]
    if args.fkd_path:
        sources.append(output.awaited(args.fkd_path, "matching.generate_soft_label"))
    if args.dry_run and any(sources):
        waits_for = "; ".join(filter(None, sources))
        return plan_student(args.settings, *where, args.fkd_path, args.output_dir, waits_for)
    images = image_sets.open_images("--train_dir", args.train_dir, args.dataset)
    lessons = Lessons(images, args.settings, process, args.num_workers)
    if args.fkd_path:
        lessons.replay(args.fkd_path, args.teacher_checkpoint, args.verify)
    else:
        lessons.draw(args.teacher_checkpoint)
    settings, steps = lessons.settings, args.gradient_accumulation_steps
    chunk = ranks.chunk_size(settings["batch_size"], process.world, steps, args.bn_batch)
    settings["bn_batch"] = chunk
    training.check_warmup(args.warmup_epochs, settings["epochs"])
    check_resize(args.test_resize, settings["input_size"])
    where, on_train = ("--val_dir", args.val_dir), args.test_on_train
    test = evaluation.open_test(*where, images.dataset, images.folders, on_train=on_train)
    check_apart(args.val_dir, test, images, lessons.facts, args.test_on_train)
    if process.is_main:
        warn_of_equal_weights(settings["model"], args.seeds, lessons.facts)
        if settings["batch_size"] >= lessons.count:
            one = f"all {lessons.count} images are one batch"
            steps = f"{settings['epochs']} steps of the optimiser in all"
            warn(f"--batch_size {settings['batch_size']}: {one}: {steps}")
    if 1 in (chunk, lessons.count):
        what = f"--bn_batch {chunk}: {settings['model']}"
        models.check_single(lessons.network, settings["input_size"], what)
    teachers = [[facts["arch"], facts["sha256"]] for facts in lessons.facts]
    inputs = {"images": lessons.images.content, "labels_content": lessons.content}
    inputs |= {"teacher": teachers, "test_images": test.count, "test_sha256": test.fingerprint()}
    name = student_name(lessons.stem, settings, lessons.labelled)
    where = ("--output_dir", args.output_dir, name, "student", settings, inputs, process)
    with (
        ranks.joined(process, args.tracker, args.output_dir) as accelerator,
        output.Output(*where, together=True) as out,
    ):
        track = partial(log_row, accelerator, settings) if args.tracker else None
        how = *how, args.test_resize
        score = partial(evaluation.tester, test, settings["input_size"], *how)
        training.train(out, args.seeds, lessons, forward, score, args.checkpoint_every, track)
        if process.is_main:
            finish(out, lessons)
    return out.folder


def check_apart(val_dir, test, images, teachers, allowed):
    """Refuse test images that the student's images, or its teacher, come from."""
    made_of = [facts["arguments"] for facts in teachers if facts["arguments"]]
    sources = [(a["images_sha256"], a["max_images_per_class"]) for a in made_of]
    sources += [images.source]
    evaluation.check_apart("--val_dir", val_dir, test, images.paths(), sources, allowed)


def warn_of_equal_weights(model, seeds, teachers):
    """Say which students begin with the weights that their teacher began with."""
    own = [t["arguments"] for t in teachers if t["arguments"] and t["arch"] == model]
    for seed in sorted({made["seed"] for made in own} & {*seeds}):
        same = f"begins with the weights that its teacher ({model}, seed {seed}) began with"
        warn(f"--seeds {seed}: this student {same}, so it follows it more closely than others")


def log_row(accelerator, settings, seed, row):
    """Hand the row of an epoch to the trackers."""
    if not accelerator.trackers:
        kinds = (bool, int, float, str)
        plain = {name: value for name, value in settings.items() if isinstance(value, kinds)}
        accelerator.init_trackers("d4m", plain)
    values = {f"seed{seed}/{name}": value for name, value in row.items() if name != "epoch"}
    accelerator.log(values, step=row["epoch"])


def finish(out, lessons):
    """results.json, without seconds or paths: equal runs give equal bytes. Then the manifest."""
    images = lessons.images
    seeds = [training.read_rows(out, lessons.files_of(n)[1]) for n in out.settings["seeds"]]
    scores = {
        which: {k: evaluation.summary([s[which][k] for s in seeds]) for k in ("top1", "top5")}
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
    top1 = scores["last"]["top1"]
    over = "initial weights" + " and draws" * out.settings["vary_draws"]
    spread = "" if top1["std"] is None else f" ± {top1['std']:.2f} over {over}"
    part = datasets.of_all(images.dataset, len(images.folders))
    spread += f" (n = {top1['n']})" + f" on {part}" * bool(part)
    then, result = ["misc.report", out.folder.parent.parent], f"top-1 {top1['mean']:.2f}{spread}"
    out.finish(facts, {"results.json": lambda: files.json_text(results)}, "epochs", then, result)


def evaluate_weights(path, settings, train_dir, val_dir, forward, process, num_workers):
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
    model = forward.place(model)
    test = evaluation.open_test("--val_dir", val_dir, dataset, folders)
    if train_dir:
        check_apart(val_dir, test, images, [], settings["test_on_train"])
    with ranks.joined(process):
        check_resize(settings["test_resize"], size)
        how = forward, process, num_workers, settings["test_resize"]
        scores = evaluation.tester(test, size, *how)(model)
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
    stem, settings = (Path(fkd_path).name, settings) if fkd_path else drawn(name, settings, size)
    folder = Path(root) / student_name(stem, settings)
    output.plan(folder, 0, 2 * seeds, needed, waits_for)
    return folder


if __name__ == "__main__":
    main()
