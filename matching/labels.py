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
    """The name of a labels folder, such as cifar10_ipc10_random_resnet18_mix-cutmix.

    images   the name of their folder;   settings: a Settings, of the batches and the precision
    """
    unused = {"mixup", "cutmix"} - {settings["mix_type"]}  # an alpha of what is not done
    shown = settings.only(name for name in settings if name not in unused)
    for values in (shown, shown.defaults):
        values["min_scale_crops"] = "{min_scale_crops:g}-{max_scale_crops:g}".format_map(values)
    teachers = "-".join(re.sub("[^A-Za-z0-9_.-]", "-", arch) for arch in archs)
    return output.folder_name(images, teachers, *shown.parts())


# ---- one epoch's file

FORM = {
    "epoch": torch.int64,
    "start": torch.int64,  # batch b is rows start[b]:start[b + 1]
    "index": torch.int32,
    "crop": torch.int32,
    "flip": torch.bool,
    "partner": torch.int32,
    "box": torch.int32,
    "lam": torch.float64,
}


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
    """All draws of an epoch and its logits, as one safetensors file.

    drawn   [Batch], in order;   logits (N, classes), rows in the order of the batches
    Refuses logits that are not finite.
    """
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
    """One epoch's label file, mapped: draws in memory, logits read batch by batch.

    count   images of the set.   Raises LabelError; `check` finds whatever does not fit.
    """

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
        for wrong, words in self._problems(sizes, classes, input_size):
            if wrong:
                raise LabelError(f"{self.path}: {words}")

    def _problems(self, sizes, classes, input_size):
        """(whether it is so, what is wrong) in turn: each relies on those before it."""
        draws, start, count, steps = self.draws, self.start, len(sizes), len(self.start) - 1
        shapes = {"epoch": [1], "start": [steps + 1], "crop": [count, 4], "box": [steps, 4]}
        shapes["lam"] = [steps]
        expected = {name: (kind, shapes.get(name, [count])) for name, kind in FORM.items()}
        found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in draws.items()}
        for name in sorted({*found, *expected}):
            there, right = found.get(name), expected.get(name)
            yield there != right, f"holds {name} of {there}, expected {right}"
        shape, kind = self.logits.get_shape(), self.logits.get_dtype()
        words = f"logits of shape {shape} in {kind}, expected {[count, classes]} in F16 or F32"
        yield shape != [count, classes] or kind not in ("F16", "F32"), words
        epoch, starts = int(draws["epoch"]), draws["start"].tolist()
        yield epoch != self.epoch, f"holds epoch {epoch}, expected {self.epoch}"
        yield starts != start, f"its batches begin at {starts[:4]}, expected {start[:4]}"
        index, crop, partner = (draws[name].long() for name in ("index", "crop", "partner"))
        each_once = torch.equal(index.sort().values, torch.arange(count))
        yield not each_once, f"its image indices are not the {count} images, each once"
        inside = (crop[:, :2] >= 0).all() and (crop[:, 2:] >= 1).all()
        inside = inside and (crop[:, :2] + crop[:, 2:] <= sizes[index]).all()
        yield not inside, "holds crops outside the images"
        lengths = torch.tensor(start).diff()
        inside = (partner >= 0) & (partner < lengths.repeat_interleave(lengths))
        yield not inside.all(), "holds mix partners outside their batch"
        box, lam = draws["box"], draws["lam"]
        inside = (box >= 0) & (box <= input_size)
        yield not inside.all(), f"holds boxes outside {input_size} px"
        yield not ((lam >= 0) & (lam <= 1)).all(), "holds lambdas outside 0 to 1"
        for rows in map(slice, start, start[1:]):
            words = f"holds logits that are not finite, in rows {rows.start} to {rows.stop}"
            yield not _finite(self.logits[rows]), words


# ---- do they belong to these images?

HASHED_AT_START = 2**29  # bytes of labels: about a second


def open_labels(path, images, given, verify=False):
    """(folder, manifest) of the labels of `images`, at `path` or one folder below it.

    given    {flag: value} of the command line, None where not given
    verify   hash every file now; else those of a large set are hashed as each is first read
    Refuses labels that do not fit.
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
    """What in the labels does not fit the images or the command line.

    One line per difference, naming both values.
    """
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
    weights = [_weights_digest(path) for path in given.get("teacher_checkpoint") or []]
    given = {**given, "teacher_checkpoint": weights or None}
    weights = [f"sha256:{teacher['sha256'][:12]}" for teacher in manifest["teacher"]]
    made = {**made, "teacher_checkpoint": weights}
    for name in (*batches.PROTOCOL, "arch", "use_fp16", "teacher_checkpoint"):
        value, theirs = given.get(name), made[name]
        if value in (None, theirs) or (name == "epochs" and value < theirs):
            continue
        if isinstance(value, list):
            value, theirs = " ".join(value), " ".join(theirs)
        lines.append(f"--{name} {value}: the labels of {where} were made with {theirs}")
    return lines


def _weights_digest(checkpoint):
    path = Path(checkpoint)
    path = path / "model.safetensors" if path.is_dir() else path
    return f"sha256:{files.sha256(path)[:12]}"
