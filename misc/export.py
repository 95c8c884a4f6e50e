"""An image folder in the form that somebody else's tool reads.

    python -m misc.export output/images/NAME --to hf --push ME/NAME     # Hugging Face: parquet
    python -m misc.export output/images/NAME --to webdataset            # tar shards
    python -m misc.export output/images/NAME --to ddranking --teacher_checkpoint output/teachers/T
    python -m misc.export output/images/NAME --to release --prototype_path P --fkd_path L

Writes EXPORT_PATH/<name>_<form>/. Any folder with one sub-folder per class will do; one that is not
ours has no prompts and seeds. docs/export.md says what each form holds, and what it cannot.
"""

import contextlib
import hashlib
import io
import json
import re
import tarfile
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from distillation import datasets, image_folder, prototype_files
from matching import batches, labels, models
from matching import images as image_sets
from scripts import files, output, runtime
from scripts.runtime import Parser, entry_point, reason_of, refuse, warn

NEXT = {  # {form: the command that reads it}
    "hf": """python -c "import datasets; print(datasets.load_dataset('{0}')['train'].features)\"""",
    "ddranking": 'cd {0} && python -c "from ddranking import config, metrics; '
    "c = config.Config.from_file('ddranking.yaml'); "
    "print(metrics.LabelRobustScoreSoft(config=c).compute_metrics(image_path='images'))\"",
    "release": "the release's train_FKD.py --train-dir {0}/images --fkd-path {0}/fkd, or without "
    "labels its generate_soft_label.py --data {0}/images",
    "webdataset": "python -c \"import glob, webdataset; found = glob.glob('{0}/*.tar'); "
    "print(next(iter(webdataset.WebDataset(found, shardshuffle=False)))['json'])\"",
}
SHARD_BYTES = 2**28  # of images in a parquet or tar file


class Picture(NamedTuple):
    file: str  # relative path
    label: int  # position of its class
    number: int  # within its class
    row: dict  # of images.jsonl; empty in a foreign folder


def pictures_of(images, manifest):
    """Every Picture of an ImageSet, in class order."""
    rows = image_sets.read_rows("FOLDER", images.root, manifest) if manifest else {}
    found, counts = [], [0] * len(images.folders)
    for i in images.targets.argsort(stable=True).tolist():
        file, label = images.files[i], int(images.targets[i])
        found.append(Picture(file, label, counts[label], rows.get(file, {})))
        counts[label] += 1
    return found


def cut_shards(pictures, images, name):
    """{file: [Picture]} of about SHARD_BYTES each.   name: formatted with their number and count"""
    parts, room = [], 0
    for picture in pictures:
        size = (images.root / picture.file).stat().st_size
        if not parts or room < size:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append(picture)
        room -= size
    return {name.format(n, len(parts)): part for n, part in enumerate(parts)}


# Each form below gives ({file: function that returns its bytes}, what it is made of beside images).

# ---- Hugging Face


def hf(pictures, images, read):
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        refuse("--to hf: parquet needs pyarrow; pip install pyarrow")
    parts = cut_shards(pictures, images, "data/train-{:05d}-of-{:05d}.parquet")
    units = {name: partial(parquet, part, images.folders, read) for name, part in parts.items()}
    return units, {}


def parquet(part, names, read):
    """The bytes of one file, whose schema tells `datasets` the classes' names."""
    import pyarrow
    from pyarrow import parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    label = {"_type": "ClassLabel", "names": list(names)}
    types = {"prompt": pyarrow.string(), "seed": pyarrow.uint64(), "cluster_size": pyarrow.int64()}
    features = {name: {"_type": "Value", "dtype": str(kind)} for name, kind in types.items()}
    features = {"image": {"_type": "Image"}, "label": label, **features}
    columns = {"image": pyarrow.array([(read(p.file), p.file) for p in part], image)}
    columns["label"] = pyarrow.array([p.label for p in part], pyarrow.int64())
    for name, kind in types.items():
        columns[name] = pyarrow.array([p.row.get(name) for p in part], kind)
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    table, stream = pyarrow.table(columns).replace_schema_metadata(described), io.BytesIO()
    parquet.write_table(table, stream, row_group_size=100)  # as `datasets` writes images
    return stream.getvalue()


def card(pictures, images, manifest, licence):
    """README.md of the parquet files."""
    made, known = images.generator or {}, datasets.known_prompts(images.dataset)
    how = image_folder.MADE_AS.get(images.arm.removesuffix("-g"), "by another method")
    revision = f", revision {made.get('revision') or 'not recorded'}" * bool(made)
    prompts = {images.folders[p.label]: p.row.get("prompt") for p in pictures}
    rows = [f"| {name} | {prompt or known.get(name, '')} |\n" for name, prompt in prompts.items()]
    arguments = files.json_text(manifest["arguments"]) if manifest else "not known\n"
    return f"""---
license: {licence}
task_categories: [image-classification]
tags: [dataset-distillation]
configs:
- config_name: default
  data_files: [{{split: train, path: "data/*.parquet"}}]
---
# {images.name}

{len(images.files)} images of {len(images.folders)} classes of {images.dataset}. Made as: {how}.

- base model: {made.get("model") or ("not known" if images.foreign else "none")}{revision}
- licence of the base model: {made.get("licence") or "see the model; that of the real images, too"}
- columns: image; label; prompt; seed of the image's noise; cluster_size, the real images that its
  prototype stands for; null where there is none, or nobody knows

| class, in the order of the labels | prompt |
|---|---|
{"".join(rows)}
Arguments:
```
{arguments}```
"""


def push(folder, repository):
    """Upload a finished export to a data set repository of the hub."""
    import huggingface_hub

    what = {"repo_type": "dataset", "allow_patterns": ["README.md", "data/*.parquet"]}
    try:
        url = huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, **what)
    except Exception as error:  # its own kinds, and those of the network
        hint = "is it made (hf repo create --repo-type dataset), are you logged in (hf auth login)?"
        refuse(f"--push {repository}: {reason_of(error)}; {hint}")
    print(url)


# ---- WebDataset


def webdataset(pictures, images, read):
    # image by image, not class by class: readers shuffle within a few thousand at most
    mixed = sorted(pictures, key=lambda p: (p.number, p.label))
    keys = {p.file: f"{n:08d}" for n, p in enumerate(mixed)}  # a key ends at its first dot
    parts = cut_shards(mixed, images, "train-{:06d}.tar")
    units = {name: partial(tar, part, images, keys, read) for name, part in parts.items()}
    return units, {}


def tar(part, images, keys, read):
    """The bytes of one shard: KEY.png, KEY.cls, KEY.json of each image, without dates or owners."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for p in part:
            row = {"file_name": p.file, "folder": images.folders[p.label], **p.row}
            about = json.dumps(row, ensure_ascii=False).encode()
            members = {Path(p.file).suffix[1:].lower(): read(p.file)}
            members |= {"cls": b"%d" % p.label, "json": about}
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{keys[p.file]}.{kind}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return stream.getvalue()


# ---- the release of D4M


def release(pictures, images, read, manifest, prototype_path, fkd_path):
    # differs from the release: 0003 for 3, so that ImageFolder's order is that of the classes
    width, units, inputs = len(str(len(images.folders) - 1)), {}, {}
    if prototype_path:
        source = prototype_files.PrototypeFolder(prototype_path)
        if manifest and manifest["inputs"].get("prototypes") != source.content:
            refuse(f"--prototype_path {prototype_path}: {images.root} is of other prototypes")
        inputs["prototypes"] = source.content
        units[f"{source.folder.resolve().name}.json"] = partial(prototype_json, prototype_path)
    if fkd_path:
        batch_files, inputs["labels"] = batches_of(images, fkd_path)
        units |= batch_files
    for p in pictures:
        number, kind = f"{p.label:0{width}d}", Path(p.file).suffix.lower()
        units[f"images/{number}/{number}-image{p.number:04d}{kind}"] = partial(read, p.file)
    return units, inputs


def prototype_json(folder):
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        path = Path(place) / "prototypes.json"
        prototype_files.main([str(folder), str(path)])
        return path.read_bytes()


def batches_of(images, fkd_path):
    """({fkd/epoch_0/batch_0.tar: ...}, content) of stored labels: what import_labels reads.

    That form does not say which images a batch is of: its readers draw the order again, from
    RandomSampler and seed 42. Labels in another order are refused: the release would train on them,
    each with another image.
    """
    folder, manifest = labels.open_labels(fkd_path, images, {}, verify=True)
    made, where, count = manifest["arguments"], f"--fkd_path {folder}", len(images.files)
    size, facts = made["batch_size"], datasets.ALL[images.dataset]
    if made.get("label_top_k"):
        refuse(f"{where}: holds the {made['label_top_k']} largest logits, that form needs all")
    if count > size and count % size == 1:
        refuse(f"{where}: {count} images in batches of {size}: the release's last one would have 1")
    place = images.targets.argsort(stable=True).argsort()  # of an image among those exported
    opened = lru_cache(1)(lambda epoch: labels.EpochLabels(folder, epoch, count, size))
    for epoch, order in zip(range(made["epochs"]), batches.release_orders(count, 42)):
        if not place[opened(epoch).draws["index"].long()].equal(order):
            what = "their images are not in the order of the release's sampler"
            refuse(f"{where}: {what}: make them with --order release (and --fkd_seed 42)")
    if made["input_size"] != 224 or facts.mean != datasets.ALL["imagenet"].mean:
        theirs = "the release's students crop to 224 px and use ImageNet's mean and std"
        warn(f"{where}: {made['input_size']} px of {images.dataset}; {theirs}")
    sizes = [Image.open(images.root / file).size[::-1] for file in images.files]
    of, steps = (opened, torch.tensor(sizes), made), batches.batches_of(count, size)
    return {
        f"fkd/epoch_{epoch}/batch_{nth}.tar": partial(batch_file, epoch, nth, *of)
        for epoch in range(made["epochs"])
        for nth in range(steps)
    }, manifest["content"]


def batch_file(epoch, nth, opened, sizes, made):
    """[crops, flips, partners, lambda, box, logits] of a batch, as the release saves them.

    sizes   (N, 2): height and width of all images;   made: the labels' arguments
    """
    (index, crop, flip, partner, box, lam), logits, *_ = opened(epoch).batch(nth)
    crop = (crop.double() / sizes[index].repeat(1, 2)).float()  # as shares of the image
    if made["mix_type"] == "cutmix":
        # the lambda that was drawn is not known: one that gives this box, of an even side
        top, left, bottom, right = box = box.tolist()
        side = (max(bottom - top, right - left) + 1) // 2 * 2
        lam = max(0.0, 1 - ((side + 0.5) / made["input_size"]) ** 2)
    mix = {"cutmix": (partner, lam, box), "mixup": (partner, lam, None), "none": [None] * 3}
    stream = io.BytesIO()
    torch.save([crop, flip.clone(), *mix[made["mix_type"]], logits.clone()], stream)
    return stream.getvalue()


# ---- DD-Ranking 0.2.0

CIFAR_COLOURS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # DD-Ranking's, of both
IMAGENET_COLOURS = datasets.ALL["imagenet"].mean, datasets.ALL["imagenet"].std
SMALL = {"convnet_w128": "ConvNet-3", "convnet_bn": "ConvNet-3-BN"}
TINY, LARGE = {"resnet18": "ResNet-18-BN", "convnet_bn": "ConvNet-4-BN"}, "ResNet-18-BN"
# {data set: its name, colours, {teacher: its name}, epochs and batch as in its configs of D4M}
DDRANKING = {
    "cifar10": ("CIFAR10", CIFAR_COLOURS, SMALL, 500, 100),
    "cifar100": ("CIFAR100", CIFAR_COLOURS, SMALL, 500, 100),
    "tiny_imagenet": ("TinyImageNet", IMAGENET_COLOURS, TINY, 300, 1024),
    "imagenet": ("ImageNet1K", IMAGENET_COLOURS, {"resnet18": LARGE}, 300, 1024),
}


def ddranking(pictures, images, read, arch, checkpoint):
    """What LabelRobustScoreSoft(soft_label_mode="M", random_data_format="image") takes."""
    known = len(datasets.known_prompts(images.dataset))
    if images.dataset not in DDRANKING or len(images.folders) != known or not images.ipc:
        what = f"one number of images for every class of {', '.join(DDRANKING)}"
        refuse(f"--to ddranking: takes {what}, not {images.root}")
    name, colours, names, *_ = DDRANKING[images.dataset]
    arch = arch or next(iter(names))
    if arch not in names:
        refuse(f"--arch {arch}: for {name} DD-Ranking judges by {', '.join(names)}")
    facts = datasets.ALL[images.dataset]
    which = arch, checkpoint, images.dataset, images.folders, facts.image_size
    teacher, about = models.load_teacher(*which)
    path = f"teachers/{name}/{names[arch]}/ckpt_best.pt"
    units = {path: partial(weights, teacher, (facts.mean, facts.std), colours)}
    units["ddranking.yaml"] = partial(configuration, images, names[arch], facts.image_size)
    for p in pictures:
        image = f"images/{p.label:05d}/{p.number:05d}{Path(p.file).suffix.lower()}"
        units[image] = partial(read, p.file)
    return units, {"teacher": about["sha256"]}


def weights(teacher, ours, theirs):
    """A teacher's file under the names of DD-Ranking's networks, for its mean and std of pixels.

    The first convolution undoes its normalisation, (x - mean) / std, and does ours. Where the means
    differ (CIFAR-100) that is exact but for the outermost pixels, beside which both pad with zeros.
    """
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    (mean, std), (its_mean, its_std) = (torch.tensor(c).view(2, 1, 3, 1, 1) for c in (ours, theirs))
    first, shift = next(iter(state)), (its_mean - mean) / std
    if shift.any():  # only its ConvNets, which have a bias
        state[first.replace("weight", "bias")] += (state[first] * shift).sum((1, 2, 3))
    state[first] *= its_std / std
    if isinstance(teacher, models.ConvNet):
        head = str(len(teacher) - 1)
        part = {str(n): f"features.{n}" for n in range(len(teacher))} | {head: "classifier"}
        state = {re.sub(r"^\d+", lambda n: part[n[0]], k): value for k, value in state.items()}
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def configuration(images, network, size):
    """ddranking.yaml, with the values of its own configurations of D4M."""
    name, (mean, std), _, epochs, batch_size = DDRANKING[images.dataset]
    colours, public = f"{{mean: {list(mean)}, std: {list(std)}}}", str(network == LARGE).lower()
    own = "null"
    if size > 64:
        own = "[{name: Resize, args: {size: 256}}, {name: CenterCrop, args: {size: 224}}, "
        own += f"{{name: ToTensor}}, {{name: Normalize, args: {colours}}}]"
    return f"""\
# DD-Ranking 0.2.0. Paths are from this folder.
dataset: {name}
real_data_path: ./dataset  # CIFAR is downloaded to it; others: a link to the folder of train/, val/
ipc: {images.ipc}
im_size: [{size}, {size}]
model_name: {network}
stu_use_torchvision: {public}
tea_use_torchvision: {public}
teacher_dir: ./teachers
teacher_model_names: [{network}]
data_aug_func: cutmix
aug_params: {{beta: 1.0}}
use_aug_for_hard: false
use_zca: false
custom_train_trans:
  - {{name: RandomResizedCrop, args: {{size: {size}, scale: [0.08, 1.0]}}}}
  - {{name: RandomHorizontalFlip, args: {{p: 0.5}}}}
  - {{name: ToTensor}}
  - {{name: Normalize, args: {colours}}}
custom_val_trans: {own}
soft_label_mode: M  # the teacher labels; mode S, with stored labels, fails in this release
soft_label_criterion: kl
loss_fn_kwargs: {{temperature: 20.0, scale_loss: false}}
optimizer: adamw
lr_scheduler: cosine
weight_decay: 0.01
momentum: 0.9
num_eval: 5
num_epochs: {epochs}  # tested every 20
syn_batch_size: {batch_size}
real_batch_size: 256
num_workers: 4
eval_full_data: {str(network != LARGE).lower()}  # the score of full data: only known for ResNet-18
random_data_format: image
save_path: ./scores/scores.csv
device: cuda
dist: false
""".encode()


# ---- main

# flags of one form
FLAGS = {"license": "hf", "push": "hf", "arch": "ddranking", "teacher_checkpoint": "ddranking"}
FLAGS |= {"prototype_path": "release", "fkd_path": "release"}


def get_args(argv=None):
    parser = Parser("misc.export", __doc__)
    parser.flag("folder", help="an image folder of stage 2, or any other")
    parser.setting("--to", choices=list(NEXT), required=True, help="who reads it")
    known = "the data set of the images [what their manifest says]"
    parser.flag("--dataset", type=datasets.name, metavar="NAME", help=known)
    parser.flag("--export_path", default="output/exports", help="the folder is made below this one")
    parser.heading("--to hf")
    parser.setting("--license", default="other", help="for the card, as the hub spells it")
    parser.flag("--push", metavar="REPO", help="upload to this data set repository of the hub")
    parser.heading("--to ddranking")
    network = {"type": models.model_name, "help": "the teacher [convnet_w128; from 64 px resnet18]"}
    parser.setting("-a", "--arch", **network)
    path = {"metavar": "PATH", "help": "its weights, as in stage 3 [torchvision's]"}
    parser.flag("--teacher_checkpoint", **path)
    parser.heading("--to release")
    parser.flag("--prototype_path", help="the prototypes, for the single JSON")
    parser.flag("--fkd_path", help="labels of these images, for FKD's batches")
    runtime.add_process_flags(parser)
    args = parser.parse_args(argv)
    for name, form in FLAGS.items():
        if args.to != form and getattr(args, name) != parser.get_default(name):
            refuse(f"--{name}: only with --to {form}")
    return args


@entry_point
def main(argv=None):
    args = get_args(argv)
    process = runtime.this_process(args.device, args.shard, args.dry_run, args.wait)
    images = image_sets.open_images("FOLDER", args.folder, args.dataset)
    manifest = None if images.foreign else image_folder.read_images("FOLDER", images.root)
    paths, digests = [images.root / file for file in images.files], images.digests
    if images.foreign:
        found = image_sets.in_threads(files.sha256, paths, args.num_workers, "hashing images")
        digests = dict(zip(images.files, found))
        content = output.content_digest({file: {"sha256": d} for file, d in digests.items()})
        images = images._replace(content=content)

    def read(file):
        data = (images.root / file).read_bytes()
        if hashlib.sha256(data).hexdigest() != digests[file]:
            refuse(f"FOLDER {images.root}: {file} was changed since it was made")
        return data

    pictures = pictures_of(images, manifest)
    forms = {"hf": hf, "webdataset": webdataset}
    sources = {"prototype_path": args.prototype_path, "fkd_path": args.fkd_path}
    forms["release"] = partial(release, manifest=manifest, **sources)
    forms["ddranking"] = partial(ddranking, arch=args.arch, checkpoint=args.teacher_checkpoint)
    units, inputs = forms[args.to](pictures, images, read)
    derived = {"README.md": lambda: card(pictures, images, manifest, args.license)}
    size = sum(path.stat().st_size for path in paths) // len(units)
    facts = {"dataset": images.dataset, "classes": list(images.folders), "made_by": None}
    if manifest:
        facts["made_by"] = {name: manifest[name] for name in ("arm", "arguments", "inputs")}
    where = ("--export_path", args.export_path, f"{images.name}_{args.to}", "export")
    inputs = {"images": images.content, **inputs}
    with output.Output(*where, args.settings, inputs, process) as out:
        todo = out.todo(units, lambda name: [name], size)
        for name in out.steps(out.progress(items=todo, desc=args.to, unit="file")):
            (out.folder / name).parent.mkdir(parents=True, exist_ok=True)
            out.write(name, units[name]())
        out.finish(facts, derived if args.to == "hf" else None, "files")
    if process.is_main and not process.dry_run and output.is_complete(out.folder):
        if args.push:
            push(out.folder, args.push)
        print(f"next: {NEXT[args.to].format(out.folder)}")
    return out.folder


if __name__ == "__main__":
    main()
