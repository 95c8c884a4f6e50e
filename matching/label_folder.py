"""Finding the labels of some images, and refusing those that do not fit them (what the release accepts in silence).

    folder, manifest = open_labels("output/labels", images, {"mix_type": "cutmix"})

Everything in the labels' manifest is compared with the images' and with the command line before the first step.
"""

from pathlib import Path

from distillation.datasets import DATASETS
from matching.soft_labels import PROTOCOL, label_file
from scripts.files import ARGS, MANIFEST, is_complete, read_json, read_manifest, sha256, wrong_field
from scripts.runtime import refuse

NUMBER = (int, float)
ARGUMENTS = {
    "epochs": int,
    "batch_size": int,
    "input_size": int,
    "min_scale_crops": NUMBER,
    "max_scale_crops": NUMBER,
    "flip": NUMBER,
    "mix_type": str,
    "mixup": NUMBER,
    "cutmix": NUMBER,
    "fkd_seed": int,
    "use_fp16": bool,
    "amp": str,
    "channels_last": bool,
    "arch": list,
    "teacher_sha256": list,
}
TEACHER = {"arch": str, "weights": str, "sha256": str}
HASHED_AT_START = 2**29  # bytes of labels: about a second


def open_labels(path, images, given, verify=False):
    """(folder, manifest) of the labels of `images`, found at `path` or one folder below; refuses all that does not
    fit.

    given   {flag: value} of the command line, None where not given
    """
    path = Path(path)
    if (path / MANIFEST).exists() or (path / ARGS).exists() or not path.is_dir():
        manifest = read_manifest("--fkd_path", path, "soft_labels")
        refuse_any(mismatches(path, manifest, images, given))
        return path, _hashed(path, manifest, verify)
    below = sorted(p for p in path.iterdir() if p.name.startswith(images.name + "_") and is_complete(p))
    found = [(p, read_manifest("--fkd_path", p, "soft_labels")) for p in below]
    fit = [(p, manifest) for p, manifest in found if not mismatches(p, manifest, images, given)]
    if len(fit) == 1:
        return fit[0][0], _hashed(*fit[0], verify)
    if len(found) == 1:
        refuse_any(mismatches(*found[0], images, given))
    names = ", ".join(p.name for p, _ in (fit or found)[:4])
    what = f"{len(fit)} label folders fit: {names}" if fit else f"{len(found)} label folders, none fits: {names}"
    refuse(f"--fkd_path {path}: holds for {images.name} {what if found else 'no finished labels'}; name one")


def _hashed(folder, manifest, verify):
    """The manifest, after hashing all label files if they are few; a large set's are hashed as each is first read."""
    if verify or sum(entry["size"] for entry in manifest["files"].values()) < HASHED_AT_START:
        read_manifest("--fkd_path", folder, "soft_labels", verify=True)
    return manifest


def refuse_any(problems):
    """Refuse what does not fit, the first three differences in one line; nothing if there is none."""
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        refuse("; ".join(problems[:3]) + more)


def mismatches(folder, manifest, images, given):
    """What in the labels does not fit the images or the command line: one line a difference, naming both values."""
    where = f"--fkd_path {folder}"
    settings, of = manifest["arguments"], manifest.get("images")
    if (folder / ARGS).exists() and read_json(folder / ARGS) != settings:
        return [f"{where}: its {MANIFEST} and its {ARGS} disagree: one of them was edited"]
    odd = (
        wrong_field(settings, ARGUMENTS)
        or wrong_field(manifest, {"dataset": str, "images": dict, "classes": list, "teacher": list})
        or next((wrong_field(t, TEACHER) for t in manifest["teacher"] if wrong_field(t, TEACHER)), None)
    )
    if odd or not all(isinstance(c, dict) and isinstance(c.get("folder"), str) for c in manifest["classes"]):
        return [f"{where}: its {MANIFEST} does not say {odd or 'classes'}"]
    counts = (len(settings["arch"]), len(settings["teacher_sha256"]), len(manifest["teacher"]))
    if min(settings[name] for name in ("epochs", "batch_size", "input_size")) < 1 or len(set(counts)) > 1:
        return [f"{where}: its {MANIFEST} has no epochs, an empty batch, no input size or no teachers"]
    if settings["mix_type"] not in ("mixup", "cutmix", "none"):
        return [f"{where}: its {MANIFEST} says mix_type {settings['mix_type']!r}"]
    epochs = settings["epochs"]
    if epochs != len(manifest["files"]) or set(manifest["files"]) != {label_file(epoch) for epoch in range(epochs)}:
        return [f"{where}: its {MANIFEST} lists {len(manifest['files'])} files for {epochs} epochs"]
    problems = []

    def differ(what, theirs, ours, whose=f"{images.root}"):
        if theirs != ours:
            problems.append(f"{where}: labels of {what} {theirs}, {whose} has {ours}")

    differ("the data set", manifest["dataset"], images.dataset)
    theirs, ours = [c["folder"] for c in manifest["classes"]], list(images.folders)
    if len(theirs) != len(ours):
        differ("classes numbering", len(theirs), len(ours))
    elif theirs != ours:
        k = next(k for k in range(len(ours)) if theirs[k] != ours[k])
        differ(f"class {k} =", theirs[k], ours[k])
    differ("images numbering", of.get("count"), len(images.files))
    differ("images of size", of.get("image_size"), images.image_size)
    differ("the arm", of.get("arm"), images.arm)
    if not problems:  # whatever differs above also changes the content
        differ("images with the content", str(of.get("content"))[:12], images.content[:12])
    facts = DATASETS[images.dataset]
    differ(
        "mean and std", [manifest.get("mean"), manifest.get("std")], [list(facts.mean), list(facts.std)], "this code"
    )
    for name in PROTOCOL:
        if given.get(name) is None:
            continue
        if name == "epochs":
            if given[name] > settings[name]:
                problems.append(f"--epochs {given[name]}: {where[2:]} holds {settings[name]} epochs")
        elif given[name] != settings[name]:
            problems.append(f"--{name} {given[name]}: the labels of {where} were made with {settings[name]}")
    if given.get("arch") not in (None, settings["arch"]):
        problems.append(f"--arch {' '.join(given['arch'])}: the teacher of {where} is {' '.join(settings['arch'])}")
    if given.get("use_fp16") not in (None, settings["use_fp16"]):
        problems.append(f"--use_fp16 {given['use_fp16']}: the labels of {where} were made with {settings['use_fp16']}")
    checkpoints = given.get("teacher_checkpoint") or []
    if checkpoints and len(checkpoints) != len(settings["arch"]):
        problems.append(
            f"--teacher_checkpoint: {len(checkpoints)} paths, {where} has {len(settings['arch'])} teachers"
        )
    for checkpoint, digest in zip(checkpoints, settings["teacher_sha256"]):
        now = teacher_file_digest(checkpoint)
        if now != digest:
            problems.append(
                f"--teacher_checkpoint {checkpoint}: has sha256 {now[:12]}, the teacher of {where} had {digest[:12]}"
            )
    return problems


def teacher_file_digest(checkpoint):
    path = Path(checkpoint)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        refuse(f"--teacher_checkpoint {checkpoint}: no such file")
    return sha256(path)
