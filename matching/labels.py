"""Soft labels on disk: one file per epoch, and the check that they are labels of these images.

    folder, manifest = open_labels("output/labels", images, {"mix_type": "cutmix"})
    batch, logits, _ = EpochLabels(folder, epoch, len(images.files), batch_size).batch(0)

A file states every draw of every batch of its epoch, and the teacher's logits; with --label_top_k
the largest of them, and how much the rest weigh. What does not fit the images or the command line
is refused before the first step; the release takes it in silence.
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
from scripts.runtime import number, refuse


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
# only with --label_top_k: the classes of the logits, the rest of `top_and_rest`, its temperature
FORM |= {"top": torch.int16, "rest": torch.float32, "temperature": torch.float64}


class LabelError(ValueError):
    """A label file that does not fit its manifest or the images; names the file."""


def label_file(epoch):
    return f"epoch_{epoch:04d}.safetensors"


def label_bytes(count, classes, settings):
    """Bytes of one epoch's file, of `count` images."""
    steps = batches.batches_of(count, settings["batch_size"])
    width, kept = 2 if settings["use_fp16"] else 4, settings.get("label_top_k")
    row = (width + 2) * kept + 4 if kept else width * classes
    return count * (25 + row) + 32 * steps + 1500


def add_top_k_flags(parser):
    parser.heading("smaller files, for students with the KL loss")
    kept = {"type": number(int, 1), "metavar": "K", "short": "top"}
    fewer = "store the K largest logits, and what the others weigh at -T"
    parser.setting("--label_top_k", **kept, help=fewer)
    above = {"type": number(float, above=0), "short": "T"}
    parser.setting("-T", "--temperature", **above, help="the students', only with --label_top_k")


def check_top_k(settings, classes):
    """Refuse a --label_top_k without its temperature, or that leaves no class out.

    classes   0: not known yet
    """
    kept = settings["label_top_k"]
    if (kept is None) != (settings["temperature"] is None):
        refuse("--label_top_k, --temperature: one needs the other: the student's -T")
    if kept and classes and kept >= classes:
        refuse(f"--label_top_k {kept}: the images have {classes} classes, at most {classes - 1}")


def top_and_rest(logits, top, temperature):
    """The logits of the classes `top`, and one logit for all others together, which has their
    probability at this temperature.   (n, classes), (n, K) int64 -> (n, K + 1)

    LPQLD (arXiv 2604.18135) keeps the K largest logits too, and renormalises them or spreads what
    is left evenly. Here the rest is one event with its own weight, and the KL over K + 1 events is
    exact; at another temperature the rest would weigh something else.
    """
    rest = logits.scatter(1, top, -torch.inf).div(temperature).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, top), temperature * rest], 1)


def write_epoch(out, epoch, drawn, logits, top_k=None, temperature=None):
    """[Batch] of an epoch and its logits (N, classes), in the same order, as one file.

    top_k   keep this many logits of each row, and what the rest weigh at `temperature`
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
    if top_k:
        top = logits.float().topk(top_k, 1).indices
        rest = top_and_rest(logits.float(), top, temperature)[:, -1] / temperature
        logits, at = logits.gather(1, top), torch.tensor([temperature], dtype=torch.float64)
        tensors |= {"top": top, "rest": rest, "temperature": at}
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
            names = set(self.file.keys())
            self.large = {name: self.file.get_slice(name) for name in names & {"logits", "top"}}
            self.draws = {name: self.file.get_tensor(name) for name in names - {*self.large}}
            self.logits, self.top = self.large["logits"], self.large.get("top")
        except Exception as error:  # safetensors has its own errors for damaged headers
            raise LabelError(f"{self.path}: not a label file: {str(error)[:200]}") from None

    def batch(self, nth):
        """(Batch, logits (B, classes), None) of the epoch's nth batch; with --label_top_k
        (Batch, logits (B, K + 1) as from `top_and_rest`, their classes (B, K))."""
        rows = slice(self.start[nth], self.start[nth + 1])
        index, crop, partner = (self.draws[n][rows].long() for n in ("index", "crop", "partner"))
        box, lam = self.draws["box"][nth].long(), float(self.draws["lam"][nth])
        batch = batches.Batch(index, crop, self.draws["flip"][rows], partner, box, lam)
        if self.top is None:
            return batch, self.logits[rows], None
        rest = self.draws["rest"][rows, None] * self.draws["temperature"].float()
        return batch, torch.cat([self.logits[rows].float(), rest], 1), self.top[rows].long()

    def check(self, sizes, classes, input_size, digest=None, temperature=None):
        """Hash and check the whole file, once: that takes several times longer than reading it.

        sizes    (N, 2) int64: height and width of the images;   classes: columns of the logits
        digest   the manifest's sha256 of the file;   temperature: of a student on top-K logits
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
        if self.top is not None:
            made_at = f"the rest at another temperature than {temperature}"
            questions["rest"] = ([count], _finite, "rests that are not finite")
            questions["temperature"] = ([1], lambda t: t == temperature, made_at)
        for name, (shape, right, words) in questions.items():
            tensor = self.draws.get(name)
            found = None if tensor is None else (tensor.dtype, list(tensor.shape))
            if found != (FORM[name], shape):
                expected = f"expected {(FORM[name], shape)}"
                raise LabelError(f"{self.path}: holds {name} of {found}, {expected}")
            if not right(tensor):
                raise LabelError(f"{self.path}: holds {words}")
        kept = classes
        if self.top is not None:  # at least one class is in the rest
            kept = min((self.logits.get_shape() or [0])[-1], classes - 1)
        for name, part in self.large.items():
            found, kinds = (part.get_dtype(), part.get_shape()), {"top": ["I16"]}
            if found not in [(kind, [count, kept]) for kind in kinds.get(name, ["F16", "F32"])]:
                raise LabelError(f"{self.path}: holds {name} of {found}, expected {[count, kept]}")
        for rows in map(slice, start, start[1:]):
            if not _finite(self.logits[rows]):
                raise LabelError(f"{self.path}: holds logits that are not finite, in {rows}")
            if self.top is not None:
                top = self.top[rows].sort(1).values
                if top.min() < 0 or top.max() >= classes or (top.diff(dim=1) < 1).any():
                    what = f"top that is not {kept} of {classes} classes"
                    raise LabelError(f"{self.path}: holds {what}, in {rows}")


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
    only = "kl" if made.get("label_top_k") else None
    made = {**made, "teacher_checkpoint": weights, "loss": only}
    given = {**given, "teacher_checkpoint": [f"sha256:{files.sha256(p)[:12]}" for p in paths]}
    asked = ("arch", "use_fp16", "teacher_checkpoint", "loss", "temperature")
    for name in (*batches.PROTOCOL, *asked):
        value, theirs = given.get(name), made.get(name)
        # imported labels do not say everything: what is None cannot be compared
        if value in (None, [], theirs) or theirs is None or (name == "epochs" and value < theirs):
            continue
        if isinstance(value, list):
            value, theirs = " ".join(value), " ".join(theirs)
        lines.append(f"--{name} {value}: the labels of {where} were made with {theirs}")
    return lines
