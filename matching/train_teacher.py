"""Train a teacher on real images, for the data sets that nobody publishes one for (paper, 4.1).

    python -m matching.train_teacher --dataset digits --arch convnet_mini
    sh matching/train_teacher_cf10.sh

A teacher is a student on real images with hard labels: both are trained by `training.train`. Writes
OUTPUT_DIR/<name>/{model.safetensors, results.json, manifest.json}: a --teacher_checkpoint of stages
3 and 4. The same command goes on from the last checkpoint, to the same weights.
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

from distillation import datasets
from matching import batches, crops, evaluation, models, ranks, training
from scripts import files, output, runtime
from scripts.runtime import AUGMENT, Parser, generator, number, refuse

# what a student's flags decide, and a teacher's do not
FIXED = {"sgd": True, "ema": 0.0, "bn_refresh": False}


class RealImages(torch.utils.data.Dataset):
    """What a teacher learns from: augmented real images and their classes (see training.train).

    Item (epoch, number, seed) -> (images of the whole batch, (n, S, S, 3) uint8, (n,) classes),
    with the rows of this process. Small sets are held in memory, others are read by the loader's
    workers.
    """

    loss = staticmethod(training.hard_loss)

    def __init__(self, split, settings, process, num_workers):
        self.split, self.process, self.num_workers = split, process, num_workers
        self.settings, self.size = {**FIXED, **settings}, settings["input_size"]
        self.items = [item for names in split.items for item in names]
        self.classes = torch.tensor([c for c, names in enumerate(split.items) for _ in names])
        self.count, self.arrays, self.facts = len(self.items), None, datasets.ALL[split.dataset]

    def network(self):
        return models.create_model(self.settings["arch"], len(self.split.folders), self.size)

    def files_of(self, seed):
        return ["model.safetensors", f"seed{seed}.json"]

    def loader(self, keys):
        if self.facts.image_size <= 64:
            images = [datasets.squash(self._read(item), self.size) for item in self.items]
            self.arrays, self.num_workers = list(map(np.asarray, images)), 0
        return runtime.read_ahead(self, keys, self.num_workers)

    def _read(self, item):
        try:
            return self.split.read(item)
        except datasets.BadImage as error:
            refuse(f"--data_dir {error}")

    def __getitem__(self, key):
        epoch, nth, seed = key
        index = batches.epoch_batches(seed, epoch, self.count, self.settings["batch_size"])[nth]
        mine = index[ranks.rank_chunks(len(index), self.settings["bn_batch"], self.process)[1]]
        pixels = np.empty((len(mine), self.size, self.size, 3), np.uint8)
        for k, i in enumerate(mine.tolist()):
            pixels[k] = self.augmented(i, generator(seed, AUGMENT, epoch, i))
        return len(index), torch.from_numpy(pixels), self.classes[mine]

    def augmented(self, i, g):
        """(S, S, 3) uint8"""
        array = np.asarray(self._read(self.items[i])) if self.arrays is None else self.arrays[i]
        mirrored = torch.rand((), generator=g).item() < self.settings["flip"]
        if self.settings["augment"] == "pad_crop":  # torchvision's RandomCrop(32, padding=4)
            pad = self.size // 8
            top, left = torch.randint(2 * pad + 1, (2,), generator=g).tolist()
            array = np.pad(array, ((pad, pad), (pad, pad), (0, 0)))
            array = array[top : top + self.size, left : left + self.size]
        elif self.settings["augment"] == "rrc":
            scale = self.settings["min_scale_crops"], self.settings["max_scale_crops"]
            size = torch.tensor([array.shape[:2]])
            top, left, h, w = batches.draw_crops(size, scale, g)[0].tolist()
            piece = Image.fromarray(array[top : top + h, left : left + w])
            array = np.asarray(crops.resize_exact(piece, self.size))
        elif array.shape != (self.size, self.size, 3):
            array = np.asarray(datasets.squash(Image.fromarray(array), self.size))
        return array[:, ::-1] if mirrored else array

    def part(self, item):
        """The training.Part of an item of the loader."""
        count, *tensors = item
        pixels, classes = (t.to(self.process.device, non_blocking=True) for t in tensors)
        x = batches.normalise(pixels, self.facts.mean, self.facts.std)
        return training.Part(count, x, training.Goal(None, classes, classes))


def common_side(split):
    """The pixels of a side, where all images are squares of one size, by the headers of about 1000
    of them, evenly spread; else None."""
    items, sides = [item for names in split.items for item in names], set()
    for item in items[:: -(-len(items) // 1000)]:
        try:
            with Image.open(item) as image:
                sides.update(image.size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None  # named when it is read
    return sides.pop() if len(sides) == 1 else None


def get_args(argv=None):
    parser = Parser("matching.train_teacher", __doc__)
    setting, natural, share = parser.setting, number(int, 0), number(float, 0, 1)
    parser.heading("recipe (by data set: see distillation/datasets.py)")

    def by_dataset(*names, help, **options):
        def default(args):
            facts, name = datasets.ALL[args.dataset], names[-1].lstrip("-")
            if name == "input_size":  # an imagefolder's: see main
                return None if args.dataset == "imagefolder" else facts.image_size
            value = getattr(facts.teacher, name, None)
            # no norm before a ConvNet's head: at chance at 0.1. 0.01 as DC, DM and MTT
            high = name == "learning_rate" and (value or 0) > 0.02
            return 0.01 if high and args.arch.startswith("convnet") else value

        setting(*names, default=default, help=f"{help} [by data set]", **options)

    count, rate, decay = number(int, 1), number(float, above=0), number(float, 0)
    by_dataset("--epochs", type=number(int, 1, 10**6), short="epochs", help="passes over the data")
    by_dataset("-b", "--batch_size", type=count, short="b", help="images, all processes")
    by_dataset("-lr", "--learning_rate", type=rate, short="lr", help="peak, of SGD")
    by_dataset("--weight_decay", type=decay, short="wd", help="of what --decay_on says")
    # PyTorch's script and the usual recipe of CIFAR decay all parameters; the digits' is our own
    usual = {"default": lambda args: "weights" if args.dataset == "digits" else "all"}
    decayed = "what is called one, with more than one dimension; or all parameters [by data set]"
    setting("--decay_on", choices=training.DECAYED, short="decay", help=decayed, **usual)
    by_dataset("--warmup_epochs", type=natural, short="warmup", help="linear")
    kinds = {"choices": ("pad_crop", "rrc", "none"), "short": "augment"}
    by_dataset("--augment", help="pad by an eighth and crop; RandomResizedCrop; nothing", **kinds)
    by_dataset("--flip", type=share, short="flip", help="probability of a horizontal flip")
    by_dataset("--input_size", type=count, short="size", help="pixels; an imagefolder's own")
    below = number(float, 0, below=1)
    setting("--momentum", type=below, default=0.9, short="momentum", help="of SGD")
    names = training.SCHEDULES
    setting("--schedule", choices=names, default="cosine", short="schedule", help="by epoch")
    setting("--label_smoothing", type=share, default=0.0, short="smooth", help="share")
    area, least = number(float, above=0, most=1), "least share of the area in a crop"
    setting("--min_scale_crops", type=area, default=0.08, short="crops", help=least)
    setting("--max_scale_crops", type=area, default=1.0, short="to", help="largest share")
    datasets.add_dataset_flags(parser)
    parser.flag("--val_dir", help="real test images [--data_dir]")
    evaluation.add_test_flag(parser)
    parser.heading("teacher")
    network = {"default": "resnet18", "help": models.known_names()}
    setting("-a", "--arch", type=models.model_name, **network)
    # far from a student's: one of the same network would begin with the teacher's own weights
    setting("--seed", type=natural, default=1000, short="seed", help="of weights and batches")
    parser.flag("--output_dir", default="output/teachers", help="the folder is made below this one")
    training.add_training_flags(parser)
    runtime.add_process_flags(parser)
    args = parser.parse_args(argv)
    if args.shard != "0/1":
        refuse(f"--shard {args.shard}: training is one job; use torchrun for several processes")
    for name, value in args.settings.items():
        if value is None and name not in ("classes", "bn_batch", "input_size"):
            refuse(f"--{name}: missing; distillation/datasets.py has no recipe of {args.dataset}")
    if args.warmup_epochs != args.settings.defaults["warmup_epochs"]:
        training.check_warmup(args.warmup_epochs, args.epochs)
    batches.check_scales(args.min_scale_crops, args.max_scale_crops)
    return args


@runtime.entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    forward = training.Forward(process.device, args.amp, args.channels_last, args.compile)
    part = args.classes, args.max_images_per_class, args.download
    train = datasets.open_split(args.dataset, args.data_dir, "train", None, *part)
    datasets.check_class_sizes(train, 1)
    root = ("--val_dir", args.val_dir) if args.val_dir else ("--data_dir", args.data_dir)
    how = args.download, args.test_on_train
    val = evaluation.open_test(*root, args.dataset, train.folders, *how)
    trained = train.items if train.arrays is None else [()] * len(train.items)
    evaluation.check_apart(*root, val, trained, [], args.test_on_train)
    inputs = {"train_images": train.count, "images_sha256": train.fingerprint()}
    inputs |= {"val_images": val.count, "val_sha256": val.fingerprint()}
    steps = args.gradient_accumulation_steps
    chunk = ranks.chunk_size(args.batch_size, process.world, steps, args.bn_batch)
    usual = datasets.ALL[args.dataset].image_size
    settings = args.settings.filled(input_size=args.input_size or common_side(train) or usual)
    settings.defaults["input_size"] = usual  # a folder's name says any other
    if 1 in (chunk, train.count):
        network = partial(models.create_model, args.arch, len(train.folders))
        size = settings["input_size"]
        models.check_single(partial(network, size), size, f"--bn_batch {chunk}: {args.arch}")
    shown = settings.only(name for name in settings if name != "bn_batch")
    name = output.folder_name(f"{args.dataset}_{args.arch.replace(':', '-')}", *shown.parts())
    settings = {**settings, "bn_batch": chunk}
    where = ("--output_dir", args.output_dir, name, "teacher", settings, inputs, process)
    with ranks.joined(process), output.Output(*where, together=True) as out:
        lessons = RealImages(train, out.settings, process, args.num_workers)
        how = settings["input_size"], forward, process, args.num_workers
        score = partial(evaluation.tester, val, *how)
        training.train(out, [args.seed], lessons, forward, score, args.checkpoint_every)
        if process.is_main:
            finish(out, lessons)
    return out.folder


def finish(out, lessons):
    """results.json and the manifest."""
    split, facts = lessons.split, lessons.facts
    result = training.read_rows(out, lessons.files_of(out.settings["seed"])[1])
    parameters = models.parameters_of(lessons.network)
    results = {"arguments": out.settings | out.inputs, "parameters": parameters, **result}
    top1, top5 = result["last"]["top1"], result["last"]["top5"]
    made_of = {"dataset": split.dataset, "arch": out.settings["arch"], "image_size": lessons.size}
    made_of |= {"mean": facts.mean, "std": facts.std, "classes": datasets.class_table(split)}
    derived = {"results.json": lambda: files.json_text(results)}
    said = f"top-1 {top1:.2f}, top-5 {top5:.2f}"
    root = output.data_dir_of(out.folder)
    then = ["distillation.distill", "--dataset", split.dataset]
    then += ["--data_dir", root] if root else []
    images = out.folder.parents[1].glob(f"images/{split.dataset}_ipc*/{output.MANIFEST}")
    for path in sorted(images)[:1]:
        then = ["matching.generate_soft_label", "--data", path.parent, "--arch", made_of["arch"]]
        then += ["--teacher_checkpoint", out.folder]
    out.finish({**made_of, "top1": top1}, derived, "epochs", then, said)


if __name__ == "__main__":
    main()
