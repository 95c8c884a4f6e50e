"""Labels of the public release, and of SRe2L, imported once as labels of stage 3.

    python -m matching.import_labels --data IMAGES --dataset imagenet --arch resnet18 \\
        --labels imagenet_ipc10_label18
    python -m validate.train_FKD --train_dir IMAGES --dataset imagenet --fkd_path output/labels ...

Their `epoch_0/batch_0.tar` ... hold the draws and the logits of each batch. What they do not say:
which images a batch is of (their order is drawn again from --fkd_seed), the teacher (--arch), and
how crops and mixing were drawn (null in the manifest, unless a flag says it).
"""

import math
from pathlib import Path

import torch

from distillation import datasets
from matching import batches, labels, models
from matching import images as image_sets
from scripts import files, output, runtime
from scripts.runtime import Parser, entry_point, refuse, warn


def read_parts(path):
    """(mix type, {name: tensor}, lambda, box) of a batch file: nothing in it is checked yet."""
    try:
        with torch.serialization.safe_globals(models.VALUES):  # a box's corners are numpy's
            parts = torch.load(path, map_location="cpu", weights_only=True)
        crop, flip, partner, lam, box, logits = parts
        mix_type = "none" if partner is None else "mixup" if box is None else "cutmix"
        every = torch.arange(len(crop))
        partner = every if partner is None else partner
        lam, (top, left, bottom, right) = float(1 if lam is None else lam), map(int, box or [0] * 4)
        tensors = {"crops": crop, "flips": flip, "partners": partner, "logits": logits}
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise TypeError("expected [crops, flips, partners, lambda, box, logits]")
    except Exception as error:  # whatever is wrong inside somebody's file
        refuse(f"{path}: not a batch of labels: {type(error).__name__}: {str(error)[:200]}")
    return mix_type, tensors, lam, [top, left, bottom, right]


def read_batch(path, index, sizes, classes, settings):
    """(Batch, logits) of a batch file.   index (B,): its images;   sizes (B, 2): height, width"""
    mix_type, tensors, lam, box = read_parts(path)
    count, half = len(index), torch.float16 if settings["use_fp16"] else torch.float32
    forms = {"crops": (torch.float32, (count, 4)), "flips": (torch.bool, (count,))}
    forms |= {"partners": (torch.int64, (count,)), "logits": (half, (count, classes))}
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.shape) != forms[name]:
            found = f"{tensor.dtype}, {tuple(tensor.shape)}"
            refuse(f"{path}: holds {name} of {found}, expected {forms[name]} for these images")
    crop, flip, partner, logits = tensors.values()
    # shares of height and width in fp32; Pillow's crop rounds the corners to pixels, as here
    shares = crop.double() * sizes.repeat(1, 2)  # top, left, height, width
    first, last = shares[:, :2].round(), (shares[:, :2] + shares[:, 2:]).round()
    crop = torch.cat([first, last - first], 1)
    inside = (first >= 0) & (last > first) & (last <= sizes)
    same, rows = mix_type == settings["mix_type"], partner.sort().values
    (top, left, bottom, right), size = box, settings["input_size"]
    side = int(size * math.sqrt(1 - lam)) // 2 * 2 if 0 <= lam <= 1 else 0

    def fits(low, high):  # a side of the box, clipped at the image's border
        clipped = (low == 0 or high == size) and high - low < side
        return 0 <= low <= high <= size and (high - low == side or clipped)

    questions = {
        f"a batch mixed by {mix_type}, not {settings['mix_type']}": same,
        "crops that are not whole pixels of these images": ((crop - shares).abs() < 0.01).all(),
        "crops outside the images": inside.all(),
        "partners that are not the rows of the batch": rows.equal(torch.arange(count)),
        "logits that are NaN or infinite": logits.isfinite().all(),
        f"lambda {lam}": 0 <= lam <= 1,
        f"a box of another --input_size than {size}": fits(top, bottom) and fits(left, right),
    }
    for words, fine in questions.items():
        if not fine:
            refuse(f"{path}: holds {words}")
    if mix_type == "cutmix":
        # differs from the release: lambda is what the clipped box leaves (only mse_ce uses it)
        lam = 1 - (bottom - top) * (right - left) / size**2
    return batches.Batch(index, crop.long(), flip, partner, torch.tensor(box), lam), logits


def read_epoch(folder, order, sizes, classes, settings):
    """([Batch], logits (N, classes)) of an epoch_k folder."""
    indices = order.tensor_split(batches.cuts(len(order), settings["batch_size"])[1:-1])
    named = [(folder / f"batch_{n}.tar", index) for n, index in enumerate(indices)]
    drawn, logits = zip(*(read_batch(path, i, sizes[i], classes, settings) for path, i in named))
    return drawn, torch.cat(logits)


def check_order(root, drawn, logits, targets):
    """Warn if the labels know nothing of the classes of their images: then the order is another."""
    named = [(b.index if b.lam >= 0.5 else b.index[b.partner]) for b in drawn]  # the larger part
    count, classes = logits.shape
    right = int((logits.argmax(1) == targets[torch.cat(named)]).sum())
    if right <= count / classes + 3 * math.sqrt(count / classes * (1 - 1 / classes)):
        known = f"of {count} labels of epoch 0 {right} name the class of their image"
        hint = "are --data, --dataset and --fkd_seed those of the labels?"
        warn(f"--labels {root}: {known}, {count / classes:.0f} would by chance: {hint}")


def open_source(root, count, given):
    """({setting: value} that the files say, their digest).   count: of images;   given: settings"""
    where, epochs = f"--labels {root}", len(list(root.glob("epoch_*")))
    steps = len(list(root.glob("epoch_0/batch_*.tar")))
    if not steps:
        refuse(f"{where}: holds no epoch_0/batch_0.tar")
    if (given["epochs"] or 0) > epochs:
        refuse(f"--epochs {given['epochs']}: {where} holds {epochs}")
    epochs = given["epochs"] or epochs  # the first ones
    paths = [root / f"epoch_{e}/batch_{b}.tar" for e in range(epochs) for b in range(steps)]
    sizes = [path.stat().st_size for path in paths]  # an error if one is missing
    mix_type, tensors, *_ = read_parts(paths[0])
    rows = len(tensors["crops"])
    if steps != batches.batches_of(count, rows):
        refuse(f"{where}: {steps} batches of {rows} per epoch do not fit the {count} of --data")
    half = tensors["logits"].dtype == torch.float16
    said = {"epochs": epochs, "batch_size": rows, "mix_type": mix_type, "use_fp16": half}
    for name, value in said.items():
        if given.get(name) not in (None, value):
            refuse(f"--{name} {given[name]}: {where} was made with {value}")
    return said, files.digest_of([sizes, files.sha256(paths[0])])


def get_args(argv=None):
    parser = Parser("matching.import_labels", __doc__)
    parser.flag("--data", required=True, metavar="DIR", help="the image folder that was labelled")
    known = "the data set of the images [what their manifest says]"
    parser.flag("--dataset", type=datasets.name, metavar="NAME", help=known)
    parser.flag("--labels", required=True, metavar="DIR", help="holds epoch_0/batch_0.tar ...")
    parser.flag("--fkd_path", default="output/labels", help="the folder is made below this one")
    name = {"nargs": "+", "type": models.model_name, "required": True}
    parser.setting("-a", "--arch", **name, help="the teacher, which the files do not name")
    batches.add_batch_flags(parser, stored=True)
    runtime.add_process_flags(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    images, root = image_sets.open_images("--data", args.data, args.dataset), Path(args.labels)
    said, digest = open_source(root, len(images.files), args.settings)
    usual = args.settings.filled(**{**batches.PROTOCOL, "input_size": images.pixels})
    named = runtime.Settings({**usual, **said}, usual.defaults, usual.shorts)
    name = f"{labels.labels_name(images.name, args.arch, named)}_imported"
    used = {name: usual[name] for name in ("input_size", "fkd_seed")}
    used["order"] = "release"
    settings = {**args.settings, **said, **used, "amp": None, "channels_last": None}

    arrays, images = image_sets.load_pixels("--data", images, args.num_workers)
    sizes = torch.tensor([array.shape[:2] for array in arrays])
    count, classes, facts = len(arrays), len(images.folders), datasets.ALL[images.dataset]
    order = next(batches.release_orders(count, settings["fkd_seed"]))
    first = read_epoch(root / "epoch_0", order, sizes, classes, settings)
    check_order(root, *first, images.targets)
    if facts.mean != datasets.ALL["imagenet"].mean:
        theirs = "the release's teacher saw them with ImageNet's mean and std"
        warn(f"--data {args.data}: {theirs}, the student will with {images.dataset}'s")

    inputs = {"dataset": images.dataset, "images": images.content, "labels": digest}
    size = labels.label_bytes(count, classes, settings)
    where = ("--fkd_path", args.fkd_path, name, "soft_labels", settings, inputs, process)
    with output.Output(*where) as out:
        todo = out.todo(range(settings["epochs"]), lambda e: [labels.label_file(e)], size)
        orders = zip(range(settings["epochs"]), batches.release_orders(count, settings["fkd_seed"]))
        with out.progress(total=len(todo) * count, desc="labels", unit="image") as bar:
            for epoch, order in out.steps(pair for pair in orders if pair[0] in todo):
                which = (root / f"epoch_{epoch}", order, sizes, classes, settings)
                labels.write_epoch(out, epoch, *read_epoch(*which))
                bar.update(count)
        unknown = dict.fromkeys(("weights", "sha256", "columns", "arguments"))
        made_of = {"dataset": images.dataset, "images": images.facts()}
        made_of["teacher"] = [{"arch": a, "classes": classes, **unknown} for a in args.arch]
        made_of["classes"] = [{"index": c, "folder": f} for c, f in enumerate(images.folders)]
        out.finish({**made_of, "mean": facts.mean, "std": facts.std}, words="epochs")
    return out.folder


if __name__ == "__main__":
    main()
