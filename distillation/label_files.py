"""Prompts of classes: our lists in label-prompt/, and what users bring with --label_file_path."""

import ast
import re
import unicodedata
from functools import partial
from pathlib import Path

from scripts.runtime import refuse, warn

FOLDER = Path(__file__).parent / "label-prompt"
nfc = partial(unicodedata.normalize, "NFC")  # a Mac writes an accent as a letter of its own
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
    """The prompts of `folders` from a text file: line i = prompt of class i, or with the class
    folder or its number (from 0 or 1) before or behind, or a Python or JSON literal of these.

    A BOM, CRs, outer spaces and balanced outer quotes are taken off; what is malformed, or names
    another class, is refused with its line number.
    """
    where = f"--label_file_path {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(f"{where}: not UTF-8 at byte {error.start}")
    lines = _lines(text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n"), where)
    keys, prompts, say = _keys(lines, folders, where)
    rows = [(n, _prompt(prompt, f"{where}, line {n}")) for n, prompt in enumerate(prompts, 1)]
    if keys:
        rows = _by_folder(zip(keys, rows), folders, where)
    if len(rows) != len(folders):
        refuse(f"{where}: has {len(rows)} prompts, there are {len(folders)} classes")
    _check_order(rows, folders, dataset, where, say)
    seen = {}
    for folder, (_, prompt) in zip(folders, rows):
        other = seen.setdefault(prompt, folder)
        if other != folder:
            warn(f"{where}: classes {other} and {folder} share the prompt {prompt!r}")
    return [prompt for _, prompt in rows]


def with_prompts(classes, path, dataset):
    """The `classes` of a manifest with the prompts of a label file."""
    folders = list(known_prompts(dataset)) or [c["folder"] for c in classes]
    prompts = dict(zip(folders, read_label_file(path, folders, dataset)))
    return [{**c, "prompt": prompts[c["folder"]]} for c in classes]


def _lines(text, where):
    """The lines of a label file; the entries of a Python or JSON literal as `key: prompt`."""
    lines, first = text.split("\n"), text.lstrip()[:1]
    if first in ("{", "["):
        try:
            found = ast.literal_eval(text.strip())
            lines = list(map(_joined, found.items() if first == "{" else found))
        except Exception as error:  # whatever is wrong inside somebody's file
            if first == "{":  # a prompt may start with a bracket
                line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
                refuse(f"{where}, line {line}: not {{0: 'tench', ...}}: {reason}")
    for n, line in enumerate(lines, 1):
        control = re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]", line)
        if control:
            refuse(f"{where}, line {n}: holds the control character {control[0]!r}")
    return [nfc(line.strip(" ")) for line in lines]


def _joined(value):  # Keras has "0": ["n01440764", "tench"]
    return ": ".join(map(_joined, value)) if isinstance(value, (list, tuple)) else str(value)


def _split(lines, key, behind):
    """Per line a match with its "key", "prompt", and "strong" separator, or None: no key."""
    between = r"(?:(?P<strong>\s*(?:[:=|;\t]|->)\s*|[,.](?=\S))|\s*,\s*|\s+-\s+|\s+)"
    mark = rf"[\"'(\[#]*(?P<key>{key})[\"')\]]*"
    first = rf"{mark}(?![:,.]\d)\.?{between}(?P<prompt>.+)"  # 0. tench, not 16:9 screen
    form = rf"(?P<prompt>.+?){between}{mark}" if behind else first
    return [re.fullmatch(form, line) for line in lines]


def _keys(lines, folders, where):
    """(the class folder of each line, or None; the prompts; what to do where they name another).

    A prompt may hold digits and separators ("4-lane road", "Boeing 747"): a form counts where most
    lines have it, or where its numbers are those of all classes.
    """
    wnid, number, every = WNID.pattern[:-1], r"\d{1,5}", list(known_prompts("imagenet"))
    own, last = "|".join(map(re.escape, map(nfc, folders))), len(folders)
    last = len(every) if {*folders} <= {*every} else last
    lines = [re.sub(rf"^\d+\W+(?={wnid})", "", line) for line in lines]  # 0: n01440764: tench
    forms = (wnid, False), (wnid, True), (own, False), (number, False), (number, True)
    for key, behind in forms:
        found = _split(lines, key, behind)
        matches = [m for m in found if m]
        keys, prompts = [m["key"] for m in matches], [m["prompt"] for m in matches]
        sure = [key == wnid or m["strong"] for m in matches]
        if key == number:
            sure = [m["strong"] or (not behind and int(m["key"]) <= last) for m in matches]
            keys = _by_number(list(map(int, keys)), folders, every)
            if {*folders} <= {*keys} and 2 * len({*prompts}) > len(lines):
                sure = matches
        elif all(re.fullmatch(r"\d+( .+)?" if key == wnid else r"\d+", p) for p in prompts):
            continue  # "tench": 0, or map_clsloc.txt
        if 2 * sum(map(bool, sure)) > len(lines):
            if None in found:
                some = "some lines have a folder name or number, this has none"
                refuse(f"{where}, line {found.index(None) + 1}: {some}")
            return keys, prompts, refuse if key == number else warn
    if len(lines) == len(every) > len(folders) and last == len(every):
        return every, lines, refuse
    if all(map(str.isdecimal, folders)) and sorted(folders, key=int) != list(folders):
        order = f"folders are sorted as text ({', '.join(folders[:4])}), not by number"
        refuse(f"{where}: {order}; write folder, tab, prompt")
    return None, lines, refuse


def _by_number(numbers, folders, every):
    """Class folders by numbers from 0 or 1, in order of `folders` or of all of ImageNet."""
    orders = [dict(enumerate(order, n)) for order in (folders, every) for n in (0, 1)]
    names = orders[0 not in numbers]
    for order in orders:
        if {*folders} <= set(map(order.get, numbers)) <= {*order.values()}:
            names = order
    return [names.get(n, f"number {n}") for n in numbers]


def _prompt(prompt, where):
    """One prompt without its spaces and quotes."""
    prompt = re.sub(r"""^(["'])(.*)\1,?$""", r"\2", prompt.strip()).strip()
    if "\t" in prompt:
        refuse(f"{where}: has more than one tab, or some lines have a folder name and others none")
    if '"' in prompt or prompt[:1] == "'" or prompt[-1:] == "'":
        refuse(f"{where}: has a stray quote mark: {prompt}")
    if not prompt or re.match(r"n\d{8}", prompt):
        refuse(f"{where}: has no prompt {prompt}")
    return prompt if " " in prompt else prompt.replace("_", " ")


def _by_folder(pairs, folders, where):
    """(folder, row) pairs -> the rows of `folders`; other ImageNet classes may have rows too."""
    rows, own = {}, {nfc(folder): folder for folder in folders}
    for key, row in pairs:
        folder = own.get(nfc(key), key)
        if folder in rows:
            refuse(f"{where}, line {row[0]}: the folder {folder} stands twice")
        if folder not in folders and not (WNID.match(folder) and WNID.match(folders[0])):
            refuse(f"{where}, line {row[0]}: there is no class folder {folder!r}")
        rows[folder] = row
    missing = [folder for folder in folders if folder not in rows]
    if missing:
        refuse(f"{where}: has no line for {len(missing)} class folders, first {missing[0]}")
    return [rows[folder] for folder in folders]


def _check_order(rows, folders, dataset, where, say):
    """Prompts must not be the names of other classes, nor our own list without its spaces.

    rows   [(line, prompt)] of `folders`;   say: refuse, or warn where the file names the folders
    """

    def letters(text):
        return re.sub(r"[\W_]+", "", nfc(text).casefold())

    def owners_of(text):  # the whole text's, or those of its parts
        parts = [owners.get(letters(part), set()) for part in (text, *text.split(","))]
        return parts[0] or set().union(*parts)

    of_wnids = "imagenet" if all(map(WNID.match, folders)) else dataset
    ours, owners = known_prompts(dataset) or known_prompts(of_wnids), {}
    names = ours or {folder: folder.replace("_", " ") for folder in folders}
    for folder, prompt in names.items():
        for part in (prompt, *prompt.split(",")):
            owners.setdefault(letters(part), set()).add(folder)
    fits = {folder: owners_of(prompt) for folder, (_, prompt) in zip(folders, rows)}
    for folder, (n, prompt) in zip(folders, rows):
        right, line = names.get(folder, prompt), f"{where}, line {n}"
        expected = f"expected {folder}'s {right!r}"
        if ours and letters(prompt) == letters(right) and " " in right and " " not in prompt:
            refuse(f"{line}: {prompt!r} has lost its spaces, {expected}")
        if fits[folder] and folder not in fits[folder]:
            other = min(fits[folder])
            is_moved = other not in fits.get(other, {other})  # its own prompt is elsewhere
            (say if is_moved else warn)(f"{line}: {prompt!r} is the prompt of {other}, {expected}")
