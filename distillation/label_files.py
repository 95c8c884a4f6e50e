"""Prompts of classes: our lists in label-prompt/, and what users bring with --label_file_path."""

import re
from pathlib import Path

from scripts.runtime import refuse, warn

FOLDER = Path(__file__).parent / "label-prompt"
WNID = re.compile(r"n\d{8}$")


def known_prompts(dataset):
    """{class folder: prompt} in class order of a data set whose classes are known, else {}."""
    # differs from the release: its lists swap two ImageNet classes, misorder CIFAR-100, and lose
    # Tiny-ImageNet's spaces
    path = FOLDER / f"{dataset}.txt"
    if not path.exists():
        return {}
    return dict(line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())


def read_label_file(path, folders, dataset="imagefolder"):
    """The prompts of `folders` from a text file: line i = prompt of class i, or
    `folder<TAB>prompt` (also `wnid prompt`).

    A BOM, CRs, outer spaces and balanced outer quotes are taken off; what is malformed, or our own
    list in another order, is refused with its line number.
    """
    where = f"--label_file_path {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(f"{where}: not UTF-8 at byte {error.start}")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    rows = [_row(line, f"{where}, line {n}") for n, line in enumerate(lines, 1)]
    if len({folder is None for folder, _ in rows}) > 1:
        refuse(f"{where}: some lines have a folder name, others have none")
    if rows[0][0] is None:
        prompts = [prompt for _, prompt in rows]
        _check_order(prompts, folders, dataset, where)
    else:
        prompts = _by_folder(rows, folders, where)
    seen = {}
    for folder, prompt in zip(folders, prompts):
        other = seen.setdefault(prompt, folder)
        if other != folder:
            warn(f"{where}: classes {other} and {folder} share the prompt {prompt!r}")
    return prompts


def with_prompts(classes, path, dataset):
    """The `classes` of a manifest with the prompts of a label file."""
    folders = list(known_prompts(dataset)) or [c["folder"] for c in classes]
    prompts = dict(zip(folders, read_label_file(path, folders, dataset)))
    return [{**c, "prompt": prompts[c["folder"]]} for c in classes]


def _row(line, where):
    """One line -> (folder or None, prompt)."""
    control = re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", line)
    if control:
        refuse(f"{where}: holds the control character {control[0]!r}")
    folder, tab, prompt = line.partition("\t")
    if not tab:
        wnid, _, rest = line.strip().partition(" ")
        folder, prompt = (wnid, rest) if rest and WNID.match(wnid) else (None, line)
    if "\t" in prompt:
        refuse(f"{where}: has more than one tab")
    prompt = prompt.strip()
    if len(prompt) > 1 and prompt[0] == prompt[-1] and prompt[0] in "\"'":
        prompt = prompt[1:-1].strip()
    if '"' in prompt or prompt[:1] == "'" or prompt[-1:] == "'":
        refuse(f"{where}: has a stray quote mark: {prompt}")
    if not prompt:
        refuse(f"{where}: has no prompt")
    return folder and folder.strip(), prompt


def _by_folder(rows, folders, where):
    """[(folder, prompt)] -> the prompts of `folders`; other ImageNet classes may have rows too."""
    prompts, known = {}, {*folders, *known_prompts("imagenet")}
    for n, (folder, prompt) in enumerate(rows, 1):
        if folder in prompts:
            refuse(f"{where}, line {n}: the folder {folder} stands twice")
        if folder not in known:
            refuse(f"{where}, line {n}: there is no class folder {folder!r}")
        prompts[folder] = prompt
    missing = [folder for folder in folders if folder not in prompts]
    if missing:
        refuse(f"{where}: has no line for {len(missing)} class folders, first {missing[0]}")
    return [prompts[folder] for folder in folders]


def _check_order(prompts, folders, dataset, where):
    """A bare list of prompts must not be our own list in another order or without its spaces."""

    def letters(prompt):
        return re.sub(r"[^a-z0-9]", "", prompt.lower())

    if len(prompts) != len(folders):
        refuse(f"{where}: has {len(prompts)} prompts, there are {len(folders)} classes")
    of_wnids = "imagenet" if all(map(WNID.match, folders)) else dataset
    ours = known_prompts(dataset) or known_prompts(of_wnids)
    owner = {letters(prompt): folder for folder, prompt in reversed(ours.items())}
    for n, (folder, prompt) in enumerate(zip(folders, prompts), 1):
        right, other = ours.get(folder, prompt), owner.get(letters(prompt))
        expected = f"expected {folder}'s {right!r}"
        if other == folder and " " in right and " " not in prompt:
            refuse(f"{where}, line {n}: {prompt!r} has lost its spaces, {expected}")
        if other not in (None, folder) and prompt != right:
            refuse(f"{where}, line {n}: {prompt!r} is the prompt of {other}, {expected}")
