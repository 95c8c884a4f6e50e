"""Prompts of classes: our lists in label-prompt/, and what users bring with --label_file_path."""

import ast
import re
import unicodedata
from functools import partial
from itertools import product
from pathlib import Path

from scripts.runtime import refuse, warn

FOLDER = Path(__file__).parent / "label-prompt"
nfc = partial(unicodedata.normalize, "NFC")  # a Mac writes an accent as a letter of its own
STRONG = r"\s*(?:[:：=|;、\t]|->|→)\s*"  # between a key and its prompt; few prompts hold it
PROMPT_KEYS = ("name", "class_name", "label", "prompt", "text", "caption")  # in JSON of others
WNID = re.compile(r"n\d{8}$")
NUMBER = re.compile(r"^(?:\d+\.(?!\d)|\d+[ _]|n\d{8}[ _.-])\s*")  # before a folder's name
PLURAL = re.compile(r"(?<=[^\W\d_]{2}[^\Ws])s$")  # not that of bus or glass
# a) bird, I. bird, 0x0: bird; not 16:9 screen
ALIEN_KEY = r"(?P<key>[^\s:)\"'“`(\[]{1,40}[:)]|[A-Za-z]\.|[IVXivx]+\.)\s+\S.*"


def known_prompts(dataset):
    """{class folder: prompt} in class order of a data set whose classes are known, else {}."""
    # differs from the release: its lists swap two ImageNet classes, misorder CIFAR-100, and lose
    # Tiny-ImageNet's spaces
    path = FOLDER / f"{dataset}.txt"
    if not path.exists():
        return {}
    return dict(line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())


def read_label_file(path, folders, dataset="imagefolder"):
    """The prompts of `folders` from a text file, in one of the forms that circulate:

        tench, Tinca tinca               line i = prompt of class i
        n01440764: tench, Tinca tinca    the class folder, in any order
        0: tench, Tinca tinca            the class number, from 0 or 1, before or behind

    or a Python or JSON literal of these. A BOM, CRs, bullets, outer spaces and outer quotes are
    taken off, and blank lines, comments and a header left out; what is malformed, or names another
    class, is refused with its line number.
    """
    where = f"--label_file_path {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(f"{where}: not UTF-8 at byte {error.start}")
    lines = _lines(text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n"), where)
    lines = _content(lines, folders, where)
    keys, prompts, say = _keys(lines, folders, where)
    rows = [(n, _prompt(prompt, f"{where}, line {n}")) for n, prompt in enumerate(prompts, 1)]
    _check_prompts(rows, folders, where)
    if not keys and all(" " in p and p.split(" ")[0] in folders for _, p in rows):
        warn(f"{where}: every prompt begins with a class's name; is the TAB behind it missing?")
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
    lines = text.split("\n")
    if len(lines) > 1 and all(re.fullmatch(r"\s*\{.*\}\s*", line) for line in lines):  # JSON lines
        text = f"[{','.join(lines)}]"
    if text.lstrip().startswith(("{", "[")):
        try:
            found = ast.literal_eval(text.strip())
            rows = found.items() if isinstance(found, dict) else found
            lines = ["\t".join(_words(row)) for row in rows] or [""]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            if re.match(r"\s*(\[\s*)?\{", text):  # a prompt may start with a bracket
                line = getattr(error, "lineno", 1)
                reason = getattr(error, "msg", "expected texts and numbers")
                refuse(f"{where}, line {line}: not {{0: 'tench', ...}}: {reason}")
    for n, line in enumerate(lines, 1):
        control = re.search(
            r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u2060\ufeff]", line
        )
        if control:
            refuse(f"{where}, line {n}: holds the control character {control[0]!r}")
    bullet = re.compile(r"\s*[-*•]\s+")  # a list of YAML or Markdown
    bullets = all(map(bullet.match, lines))
    return [(bullet.sub("", line, count=1) if bullets else line).strip(" ") for line in lines]


def _content(lines, folders, where):
    """`lines` without blank lines, comments, and a header before lines that have keys."""
    kept = [line for line in lines if line] or lines
    if not all(line.startswith("#") for line in kept):  # else as "#0 tench"
        kept = [line for line in kept if not line.startswith("#")]
    names = "|".join(map(re.escape, folders))
    for key, behind in product((r"[nN]\d{8}", r"\d{1,5}", names), (False, True)):
        first, *others = _split(kept, key, behind)
        if len(kept) > len(folders) and not first and all(others):
            kept = kept[1:]
            break
    if left := len(lines) - len(kept):
        warn(f"{where}: left out and not counted: {left} blank, comment or header lines")
    return kept


def _words(value):
    """The texts and numbers in nested lists; of {"name": "tench", "id": 0} the name comes last."""
    if isinstance(value, dict):
        [prompt] = [key for key in value if key in PROMPT_KEYS and isinstance(value[key], str)]
        others = [v for key, v in value.items() if key != prompt]
        if len(others) > 1:
            wnids = [v for v in others if WNID.match(str(v))]
            others = wnids or [v for v in others if isinstance(v, int)]
            [_] = others
        value = [*others, value[prompt]]
    if isinstance(value, (list, tuple)):
        return [word for part in value for word in _words(part)]
    if isinstance(value, (str, int)):
        return [str(value)]
    raise ValueError


def _split(lines, key, behind=False):
    """Per line a match with its "key", "prompt", and "strong" separator, or None: no key."""
    between = rf"(?:(?P<strong>{STRONG})|\s*,\s*|\s+[-–—]\s+|\s+)"
    mark = rf"[\"'(\[#]*(?i:(?:class|label|id)[ _-]?)?(?P<key>{key})[\"')\]]*"
    first = rf"{mark}(?!:\d)(?:\.0)?\.?{between}(?P<prompt>.+)"  # 0. tench, not 16:9 screen
    form = rf"(?P<prompt>.+?){between}{mark}" if behind else first
    return [re.fullmatch(form, line) for line in lines]


def _parts(found, where):
    """The keys and the prompts of matches; refuses a line without."""
    for n, match in enumerate(found, 1):
        if not match:
            refuse(f"{where}, line {n}: some lines have a folder name or number, this has none")
    return [m["key"] for m in found], [m["prompt"] for m in found]


def _name(key):
    """A folder as it is compared: train/Dog/ is dog."""
    return nfc(re.split(r"[/\\]", key.strip("\"' /\\"))[-1]).casefold().replace("_", " ")


def _keys(lines, folders, where):
    """(the class folder of each line, or None; the prompts; what to do where they name another).

    A prompt may hold digits and separators ("4-lane road", "Boeing 747"): folder names count where
    most lines have one, numbers where they number the classes.
    """
    numbered = _split(lines, r"\d+")
    rests = [m["prompt"] for m in numbered] if all(numbered) else lines  # 0: n01440764: tench
    if all(map(WNID.match, folders)):  # n01440764_tench, n01440764.tar tench
        rests = [re.sub(r"^([nN]\d{8})(?:\.tar|[_-])\s*(?=\w)", r"\1 ", line) for line in rests]
    for behind in (False, True):
        found = _split(rests, r"(?:\S*[/\\])?[nN]\d{8}", behind)  # or train/n01440764
        if any(found):
            keys, prompts = _parts(found, where)
            keys = [key.lower() for key in keys]
            numbers = _split(prompts, r"\d+")  # as in ILSVRC's map_clsloc.txt
            if all(numbers) and len({m["key"] for m in numbers}) == len(lines):
                prompts = [m["prompt"] for m in numbers]
            return keys, prompts, warn
    names, form = (
        {*map(_name, folders)},
        rf"(?P<key>.+?)(?:{STRONG}|,(?=\S)|\s{{2,}})(?P<prompt>.+)",
    )
    for rest in (rests, lines):  # 0,bird,a bird
        found = [re.fullmatch(form, line) for line in rest]
        known = [m for m in found if m and _name(m["key"]) in names]
        if 2 * len(known) > len(lines):
            break
    to_number = all(m and m["prompt"].isdigit() and not m["key"].isdigit() for m in found)
    tabs = all("\t" in line for line in lines) and not all(numbered)
    if not to_number and (2 * len(known) > len(lines) or tabs):
        keys, prompts = _parts(found, where)
        numbers = _split(prompts, r"\d+")  # bird,0,a bird
        place = {_name(folder): n for n, folder in enumerate(folders)}
        if all(numbers):
            shifts = {int(m["key"]) - place.get(_name(k), -2) for k, m in zip(keys, numbers)}
            prompts = [m["prompt"] for m in numbers] if shifts in ({0}, {1}) else prompts
        return keys, prompts, warn
    coded = [f for f in folders if re.search(r"[\d_]", f) and " " not in f]  # class_10 p10
    starts = "|".join(map(re.escape, sorted(coded, key=len, reverse=True)))
    found = _split([nfc(line) for line in lines], nfc(starts)) if coded == folders else [None]
    if all(found) and all(len({m[k] for m in found}) == len(lines) for k in ("key", "prompt")):
        return *_parts(found, where), warn
    for behind in (False, True):
        keys, prompts = _numbered(_split(lines, r"\d{1,5}", behind), folders, where, behind)
        if keys:
            return keys, prompts, refuse
    found = [re.fullmatch(ALIEN_KEY, line) for line in lines]
    if len(lines) > 1 and all(found) and len({m["key"] for m in found}) == len(lines):
        what = f"{found[0]['key']} is neither a class folder nor its number"
        refuse(f"{where}, line 1: {what}; if it is of the prompt, put that in quotes")
    every = list(known_prompts("imagenet"))
    if len(lines) == len(every) > len(folders) and {*folders} <= {*every}:
        return every, lines, refuse
    for n, (folder, other) in enumerate(zip(sorted(folders), sorted(folders, key=_natural)), 1):
        if folder != other:  # 1, 10, 11, 2
            order = f"in sorted order this is folder {folder!r}, by its number it is {other!r}"
            refuse(f"{where}, line {n}: {order}; write folder, tab, prompt")
    return None, lines, refuse


def _natural(folder):
    """Sorts class_2 before class_10."""
    return [int(t) if i % 2 else t for i, t in enumerate(re.split(r"(\d+)", folder))]


def _numbered(found, folders, where, behind):
    """(class folders, prompts) of lines with numbers, (None, None) where they are of the prompts.

    Where each folder holds one number, as class_10, a number names its folder; else classes are
    numbered from 0 or 1, in order of `folders` or of all of ImageNet.
    """
    every, count = list(known_prompts("imagenet")), len(folders)
    numbers, prompts = [int(m["key"]) for m in found if m], [m["prompt"] for m in found if m]
    strong, most = all(m and m["strong"] for m in found), 1000 if folders[0] in every else count
    orders = [dict(enumerate(order, n)) for order in (folders, every) for n in (0, 1)]
    decimal, inside = all(map(str.isdecimal, folders)), [re.findall(r"\d+", f) for f in folders]
    own = {int(digits[0]): f for digits, f in zip(inside, folders) if len(digits) == 1}
    is_own = len(own) == count and (decimal or bool({*own} & {*numbers}))
    orders, valid = ([own], {*own}) if is_own else (orders, range(most + 1))
    for names in orders if len({*numbers}) == len(found) else ():
        keys = [names.get(n) for n in numbers]
        if {*folders} <= {*keys} and None not in keys:
            in_order = numbers == sorted(numbers) or is_own and (decimal or keys == [*folders])
            if strong or in_order and 2 * len({*prompts}) > len(found):
                return keys, prompts
            if is_own and in_order:  # "digit 0", "digit 1"
                return keys, [m[0] for m in found]
    sure = [m for m in found if m and int(m["key"]) in valid and (m["strong"] or not behind)]
    if strong or 2 * len(sure) > len(found):
        _parts(found, where)
        bad = [n for n, k in enumerate(numbers) if k in numbers[:n] or k not in valid]
        bad = bad or [len(found) - 1]
        each = f"each class needs one, from 0 to {count - 1} or from 1 to {count}"
        each = "each class needs that of its folder's name" if is_own else each
        refuse(f"{where}, line {bad[0] + 1}: number {numbers[bad[0]]}; {each}")
    return None, None


def _prompt(prompt, where):
    """One prompt without its spaces and quotes."""
    prompt = prompt.strip().rstrip(",;").strip()
    if outer := re.fullmatch(r"""(["'`])(.*)\1|“([^”]*)”|‘([^’]*)’""", prompt):
        prompt = (outer[2] or outer[3] or outer[4] or "").strip()
        prompt = prompt.replace(outer[1] * 2, outer[1]) if outer[1] else prompt  # doubled in CSV
    # 001.Albatross, tench.n.01
    prompt = re.sub(r"^\d{3,}\.(?=[^\W\d])|\.[nvasr]\.\d\d$", "", prompt)
    if "\t" in prompt:
        what = "has more than one tab or prompt, or some lines have a folder name and others none"
        refuse(f"{where}: {what}")
    plain = re.sub(r'(?<!\S)"[^"]+"(?![^\s,.;)])', "", prompt)  # a so-called "cat"
    if '"' in plain or prompt[:1] == "'" or prompt[-1:] == "'":
        refuse(f"{where}: has a stray quote mark: {prompt}")
    if not prompt:
        refuse(f"{where}: has no prompt")
    if odd := re.search(r"\s#\s.*|\{\w*\}|^\S*/\S*/\S*$", prompt):
        refuse(f"{where}: holds a comment, a placeholder or a path: {odd[0].strip()}")
    return prompt if " " in prompt else prompt.replace("_", " ")


def _check_prompts(rows, folders, where):
    """A wnid, or numbers alone, are no prompts; nor are the classes' names with their counts."""
    plain, named = [prompt for _, prompt in rows], {*map(_name, folders)}
    counted = [re.fullmatch(r"(?:\d+\W+)?(.+?)(?:\W+\d+)?", prompt) for prompt in plain]
    if wnids := [row for row in rows if re.match(r"[nN]\d{8}\b", row[1])]:
        n, prompt = wnids[0]
        refuse(f"{where}, line {n}: {prompt!r} holds a wnid, expected a prompt")
    if all(m[0].isdecimal() or m[1] != m[0] and _name(m[1]) in named for m in counted):
        refuse(f"{where}, line 1: {plain[0]!r}: the numbers are not understood")


def _by_folder(pairs, folders, where):
    """(folder, row) pairs -> the rows of `folders`; other ImageNet classes may have rows too."""
    rows, own = {}, {_name(folder): folder for folder in folders}
    for key, row in pairs:
        folder = own.get(_name(key), key)
        if folder in rows:
            refuse(f"{where}, line {row[0]}: the folder {folder} stands twice")
        if folder not in folders and not (WNID.match(folder) and WNID.match(folders[0])):
            refuse(f"{where}, line {row[0]}: there is no class folder {folder!r}")
        rows[folder] = row
    missing = [folder for folder in folders if folder not in rows]
    if missing:
        count = f"{len(missing)} of {len(folders)} class folders"
        refuse(f"{where}: no line for {count}, first {missing[0]}")
    return [rows[folder] for folder in folders]


def _check_order(rows, folders, dataset, where, say):
    """Prompts must not be the names of other classes, nor our own list without its spaces.

    rows   [(line, prompt)] of `folders`;   say: refuse, or warn where the file names the folders
    """

    def spaced(text):  # words without the s of a plural
        found = re.findall(r"[^\W_]+", nfc(text).casefold())
        return f" {' '.join(PLURAL.sub('', word) for word in found)} "

    def letters(text):
        return spaced(text).replace(" ", "")

    def words(text):
        return {*re.findall(r"[^\W\d_]{3,}", spaced(text))}

    ours, owners = known_prompts(dataset), {}
    ours = known_prompts("imagenet") if all(map(WNID.match, folders)) else ours
    names = ours or {folder: NUMBER.sub("", folder).replace("_", " ") for folder in folders}
    for folder, prompt in names.items():
        for name in {letters(part) for part in (prompt, *prompt.split(","))} - {""}:
            owners.setdefault(name, set()).add(folder)
    firsts = {}  # {the first name: its classes}
    for folder in ours:
        firsts.setdefault(spaced(names[folder].split(",")[0]), set()).add(folder)
    held = {folder: words(names.get(folder, "")) for folder in folders}
    fits = {}  # {folder: the classes whose name its prompt is}
    for folder, (_, prompt) in zip(folders, rows):
        parts = [owners.get(letters(part), set()) for part in (prompt, *prompt.split(","))]
        fits[folder] = parts[0] or set().union(*parts)
        if not fits[folder] and not ours:
            found = words(prompt)
            least = len(held[folder] & found)  # others must fit better
            fits[folder] = {f for f in folders if len(held[f]) > least and held[f] <= found}
        text = spaced(prompt)  # a photo of a tench
        others = firsts.get(max((name for name in firsts if name in text), key=len, default=""), ())
        own = folder in others  # and "a corn" is no acorn
        if not parts[0] and (own or ours and not fits[folder]):
            own = own or any(spaced(part) in text for part in names.get(folder, "").split(","))
            fits[folder] = {folder} if own else others if len(others) == 1 else set()
    wrong = [folder for folder in folders if fits[folder] and folder not in fits[folder]]
    is_most = len(wrong) > 1 and 2 * len(wrong) > sum(map(bool, fits.values()))
    place = {folder: n for n, folder in enumerate(folders)}
    moves = [(place.get(min(fits[f]), -1) - place[f]) % len(folders) for f in wrong]
    if 2 * max(map(moves.count, moves), default=0) > max(len(folders), 2):
        say = refuse  # shifted; who swaps classes on purpose is warned
    for other in sorted(FOLDER.glob("*.txt")) if known_prompts(dataset) else ():
        theirs = known_prompts(other.stem)
        parts = {letters(part) for p in theirs.values() for part in (p, p.split(",")[0])}
        count = sum(letters(prompt) in parts for _, prompt in rows)
        if len(theirs) == len(folders) and [*theirs] != [*folders] and 2 * count > len(folders):
            refuse(f"{where}: {count} of its prompts are those of {other.stem}, not of {dataset}")
    for folder, (n, prompt) in zip(folders, rows):
        right, line = names.get(folder, prompt), f"{where}, line {n}"
        expected = f"expected {folder}'s {right!r}"
        if ours and letters(prompt) == letters(right) and " " in right and " " not in prompt:
            refuse(f"{line}: {prompt!r} has lost its spaces, {expected}")
        if folder in wrong:
            other = min(fits[folder])
            is_moved = fits.get(other) and other not in fits[other]  # its own prompt is elsewhere
            exact = letters(prompt) == letters(names[other])
            (say if is_moved or is_most or exact else warn)(
                f"{line}: {prompt!r} is the prompt of {other}, {expected}"
            )
