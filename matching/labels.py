"""Soft labels on disk: one file per epoch, and the check that they are labels of these images.

    folder, manifest = open_labels("output/labels", images, {"mix_type": "cutmix"})
    batch, logits = EpochLabels(folder, epoch, len(images.files), batch_size).batch(0)

A file states every draw of every batch of its epoch, and the teacher's logits. What does not fit
the images or the command line is refused before the first step; the release takes it in silence.
"""

import re
from itertools import zip_longest
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from distillation import datasets
from matching import batches
from scripts import files, output
from scripts.runtime import refuse


def labels_name(images, archs, settings):
    """cifar10_ipc10_random_resnet18_mix-cutmix of the image folder cifar10_ipc10_random."""
    unused = {"mixup", "cutmix"} - {settings["mix_type"]}  # an alpha of what is not done
    shown = settings.only(name for name in settings if name not in unused)
    for values in (shown, shown.defaults):
        values["min_scale_crops"] = "{min_scale_crops:g}-{max_scale_crops:g}".format_map(values)
    teachers = "-".join(re.sub("[^A-Za-z0-9_.-]", "-", arch) for arch in archs)
    return output.folder_name(images, teachers, *shown.parts())


# ---- one epoch's file

# the tensors beside the logits; batch b is rows start[b]:start[b + 1]
FORM = {"epoch": torch.int64, "start": torch.int64, "index": torch.int32, "crop": torch.int32}
FORM |= {"flip": torch.bool, "partner": torch.int32, "box": torch.int32, "lam": torch.float64}


class LabelError(ValueError):
    """A label file that does not fit its manifest or the images; names the file."""


def label_file(epoch):
    return f"epoch_{epoch:04d}.safetensors"


def label_bytes(count, classes, settings):
    """Bytes of one epoch's file, of `count` images."""
    steps = batches.batches_of(count, settings["batch_size"])
    width = 2 if settings["use_fp16"] else 4
    return count * (25 + width * classes) + 32 * steps + 1500


def write_epoch(out, epoch, drawn, logits):
    """[Batch] of an epoch and its logits (N, classes), in the same order, as one file."""
    if not _finite(logits):
        hint = "; --no_use_fp16 keeps numbers above 65,504" if logits.dtype == torch.half else ""
        archs = " ".join(out.settings["arch"])
        refuse(f"--arch {archs}: logits of epoch {epoch} are NaN or infinite{hint}")
    lengths = torch.tensor([0] + [len(batch.index) for batch in drawn])
    tensors = {"epoch": torch.tensor([epoch]), "start": lengths.cumsum(0)}
    for name in ("index", "crop", "flip", "partner"):
        tensors[name] = torch.cat([getattr(batch, name) for batch in drawn])
    tensors["box"] = torch.stack([batch.box for batch in drawn])
    tensors["lam"] = torch.tensor([batch.lam for batch in drawn], dtype=torch.float64)
    tensors = {name: tensor.to(FORM[name]) for name, tensor in tensors.items()}
    data = safetensors.torch.save({**tensors, "logits": logits.contiguous()})
    out.write(label_file(epoch), data)


def _finite(logits):
    """NaN comes through both extremes; in half precision 30 times faster than isfinite().all()."""
    return all(extreme.isfinite() for extreme in logits.aminmax())


class EpochLabels:
    """One epoch's label file of `count` images: draws in memory, logits read batch by batch."""

    def __init__(self, folder, epoch, count, batch_size):
        self.path, self.epoch = Path(folder) / label_file(epoch), epoch
        self.start = batches.cuts(count, batch_size)
        try:
            self.file = safetensors.safe_open(self.path, framework="pt")
            names = set(self.file.keys()) - {"logits"}
            self.draws = {name: self.file.get_tensor(name) for name in names}
            self.logits = self.file.get_slice("logits")
        except Exception as error:  # safetensors has its own errors for damaged headers
            raise LabelError(f"{self.path}: not a label file: {str(error)[:200]}") from None

    def batch(self, nth):
        """(Batch, logits (B, classes)) of the epoch's nth batch."""
        rows = slice(self.start[nth], self.start[nth + 1])
        index, crop, partner = (self.draws[n][rows].long() for n in ("index", "crop", "partner"))
        box, lam = self.draws["box"][nth].long(), float(self.draws["lam"][nth])
        batch = batches.Batch(index, crop, self.draws["flip"][rows], partner, box, lam)
        return batch, self.logits[rows]

    def check(self, sizes, classes, input_size, digest=None):
        """Hash and check the whole file, once: that takes several times longer than reading it.

        sizes    (N, 2) int64: height and width of the images;   classes: columns of the logits
        digest   the manifest's sha256 of the file
        """
        if digest and files.sha256(self.path) != digest:
            raise LabelError(f"{self.path}: not what its manifest says: changed since it was made")
        start, count, steps = self.start, len(sizes), len(self.start) - 1
        lengths, every = torch.tensor(start).diff(), torch.arange(count)
        last = lengths.repeat_interleave(lengths)  # of each row's batch, plus one

        def inside(crop):
            place, extent = crop.long().split(2, 1)  # top and left, height and width
            fits = place + extent <= sizes[self.draws["index"].long()]
            return (fits & (place >= 0) & (extent >= 1)).all()

        questions = {  # shape, whether the tensor is right, and what it holds if not
            "epoch": ([1], lambda t: t == self.epoch, f"another epoch than {self.epoch}"),
            "start": ([steps + 1], lambda t: t.tolist() == start, f"batches not at {start[:4]}"),
            "index": ([count], lambda t: t.sort().values.equal(every.int()), "not each image once"),
            "crop": ([count, 4], inside, "crops outside the images"),
            "flip": ([count], lambda t: True, ""),
            "partner": ([count], lambda t: ((t >= 0) & (t < last)).all(), "partners elsewhere"),
            "box": ([steps, 4], lambda t: ((t >= 0) & (t <= input_size)).all(), "boxes outside"),
            "lam": ([steps], lambda t: ((t >= 0) & (t <= 1)).all(), "lambdas outside 0 to 1"),
        }
        for name, (shape, right, words) in questions.items():
            tensor = self.draws.get(name)
            found = None if tensor is None else (tensor.dtype, list(tensor.shape))
            if found != (FORM[name], shape):
                expected = f"expected {(FORM[name], shape)}"
                raise LabelError(f"{self.path}: holds {name} of {found}, {expected}")
            if not right(tensor):
                raise LabelError(f"{self.path}: holds {words}")
        found = self.logits.get_dtype(), self.logits.get_shape()
        if found not in [(kind, [count, classes]) for kind in ("F16", "F32")]:
            raise LabelError(f"{self.path}: holds logits of {found}, expected {[count, classes]}")
        for rows in map(slice, start, start[1:]):
            if not _finite(self.logits[rows]):
                raise LabelError(f"{self.path}: holds logits that are not finite, in {rows}")


# ---- do they belong to these images?

HASHED_AT_START = 2**29  # bytes of labels: about a second


def open_labels(path, images, given, verify=False):
    """(folder, manifest) of the labels of `images`, at `path` or one folder below it.

    given    {flag: value} of the command line, None where not given
    verify   hash every file now; else those of a large set are hashed as each is first read
    """
    path = Path(path)
    folders = [path]
    if path.is_dir() and not output.is_complete(path) and not (path / output.ARGS).exists():
        below = (p for p in sorted(path.iterdir()) if p.name.startswith(f"{images.name}_"))
        folders = [p for p in below if output.is_complete(p)]
    found = {p: output.read_manifest("--fkd_path", p, "soft_labels") for p in folders}
    problems = {p: mismatches(p, manifest, images, given) for p, manifest in found.items()}
    fit = [p for p in found if not problems[p]]
    if len(found) == 1 and not fit:
        [lines] = problems.values()
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        refuse("; ".join(lines[:3]) + more)
    if len(fit) != 1:
        what = f"of {len(found)} finished labels {len(fit)} fit {images.name}; name one"
        refuse(f"--fkd_path {path}: {what}: {', '.join(p.name for p in (fit or folders)[:4])}")
    [folder] = fit
    if verify or sum(e["size"] for e in found[folder]["files"].values()) < HASHED_AT_START:
        output.read_manifest("--fkd_path", folder, "soft_labels", verify=True)
    return folder, found[folder]


def mismatches(folder, manifest, images, given):
    """One line for each thing in the labels that does not fit the images or the command line."""
    where, made, count = f"--fkd_path {folder}", manifest["arguments"], len(manifest["files"])
    if made["epochs"] != count or set(manifest["files"]) != set(map(label_file, range(count))):
        return [f"{where}: its manifest lists {count} files for {made['epochs']} epochs"]
    of, ours, facts = manifest["images"], images.facts(), datasets.ALL[images.dataset]
    folders = zip_longest([c["folder"] for c in manifest["classes"]], images.folders)
    pairs = [("data set", manifest["dataset"], images.dataset)]
    pairs += [(f"class {k} =", *pair) for k, pair in enumerate(folders)]
    pairs += [(name, of[name], ours[name]) for name in ("count", "image_size", "arm")]
    pairs += [(name, manifest[name], list(getattr(facts, name))) for name in ("mean", "std")]
    if all(theirs == now for _, theirs, now in pairs):  # what differs above changes the content
        pairs = [("images with the content", of["content"][:12], ours["content"][:12])]
    odd = [(what, theirs, now) for what, theirs, now in pairs if theirs != now]
    lines = [f"{where}: made for {what} {a}, {images.root} has {b}" for what, a, b in odd]
    checkpoints = [Path(path) for path in given.get("teacher_checkpoint") or []]
    paths = [path / "model.safetensors" if path.is_dir() else path for path in checkpoints]
    hashes = [teacher["sha256"] or "unknown" for teacher in manifest["teacher"]]
    weights = [f"sha256:{digest[:12]}" for digest in hashes]
    made = {**made, "teacher_checkpoint": weights}
    given = {**given, "teacher_checkpoint": [f"sha256:{files.sha256(p)[:12]}" for p in paths]}
    for name in (*batches.PROTOCOL, "arch", "use_fp16", "teacher_checkpoint"):
        value, theirs = given.get(name), made[name]
        # imported labels do not say everything: what is None cannot be compared
        if value in (None, [], theirs) or theirs is None or (name == "epochs" and value < theirs):
            continue
        if isinstance(value, list):
            value, theirs = " ".join(value), " ".join(theirs)
        lines.append(f"--{name} {value}: the labels of {where} were made with {theirs}")
    return lines
