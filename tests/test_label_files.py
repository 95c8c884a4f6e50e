"""The forms of label files that circulate give the prompts of their classes; others are refused."""

import json
from pathlib import Path

import pytest

from distillation import label_files
from tests.conftest import picture_folder

NETTE, EVERY = label_files.known_prompts("imagenette"), label_files.known_prompts("imagenet")
PROMPTS, SHORT = list(NETTE.values()), [p.split(",")[0] for p in NETTE.values()]
ROWS = list(enumerate(NETTE.items()))
IN_OTHER_ORDER = [2, 0, 1, *range(3, 10)]


def lines(form, rows=ROWS):
    """One line per class; `form` has {i}, {j} = i + 1, {wnid} and {prompt}."""
    return "\n".join(form.format(i=i, j=i + 1, wnid=wnid, prompt=p) for i, (wnid, p) in rows)


def read(tmp_path, text, folders=NETTE, dataset="imagenette"):
    (tmp_path / "labels.txt").write_text(text)
    return label_files.read_label_file(tmp_path / "labels.txt", list(folders), dataset)


def reading(*given):
    return lambda argv: read(*given)


SEPARATORS = (
    "{}: {}",
    "{}:{}",
    "{}\t{}",
    "{} = {}",
    "{}, {}",
    "{},{}",
    "{} {}",
    "{} - {}",
    "{};{}",
)
BEFORE = (*SEPARATORS, "{}. {}", "{}) {}", "[{}] {}", '"{}": "{}",', " {}: '{}',")


@pytest.mark.parametrize("separator", BEFORE)
def test_a_number_or_a_wnid_before_or_behind_the_prompt(separator, tmp_path):
    rows = [row for row in ROWS if "'" not in row[1][1]]
    for key in ("{i}", "{j}", "{wnid}"):
        text = lines(separator.format(key, "{prompt}"), rows)
        assert read(tmp_path, text) == PROMPTS
        if key == "{wnid}" or ":" in separator:  # in another order
            moved = text.split("\n")[::-1]
            assert read(tmp_path, "\n".join(moved)) == PROMPTS
        if separator in SEPARATORS:
            assert read(tmp_path, lines(separator.format("{prompt}", key), rows)) == PROMPTS


def test_python_and_json_literals(tmp_path):
    """The best known list of ImageNet, Keras's, a list, torchvision's class_to_idx."""
    python = "{" + ",\n ".join(f"{i}: {p!r}" for i, p in enumerate(EVERY.values())) + "}"
    keras = {str(i): [wnid, p.replace(" ", "_")] for i, (wnid, p) in enumerate(NETTE.items())}
    assert read(tmp_path, python) == PROMPTS
    assert read(tmp_path, json.dumps(keras)) == [p.replace("_", " ") for p in PROMPTS]
    assert read(tmp_path, json.dumps(PROMPTS, indent=1)) == PROMPTS
    assert read(tmp_path, json.dumps({p: i for i, p in enumerate(PROMPTS)})) == PROMPTS


def test_files_of_all_of_imagenet_serve_a_part_of_it(tmp_path):
    every = list(enumerate(EVERY.items()))
    numbers = [(i, row) for i, row in every if row[0] in NETTE]
    assert read(tmp_path, lines("{prompt}", every)) == PROMPTS
    assert read(tmp_path, lines("{wnid} {j} {prompt}", every[::-1])) == PROMPTS  # map_clsloc.txt
    assert read(tmp_path, lines("{i} {prompt}", numbers)) == PROMPTS
    assert read(tmp_path, lines("{i}\t{wnid}\t{prompt}")) == PROMPTS


PLAIN = {
    "commas": ["bird, Aves", "cat, Felis catus", "dog, Canis familiaris"],
    "digits first": ["4-lane road", "2-lane road", "1-lane road"],
    "digits last": ["Boeing 747", "Boeing 737", "Audi 2012"],
    "numbered rooms": ["room 1", "room 2", "room 3"],
    "years": ["2012 Acura", "2012 BMW", "2010 Audi"],
    "colons": ["16:9 screen", "10:30 on a clock", "2001: A Space Odyssey"],
    "brackets": ["[V] bird", "(cat:1.3)", "dog [blurred]"],
    "quotation marks": ['a so-called "cat"', "a carpenter's kit", "rock 'n' roll"],
    "other letters": ["一只鸟", "一只猫", "狗"],
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_prompt_is_never_cut(name, tmp_path):
    assert read(tmp_path, "\n".join(PLAIN[name]), "abc", "imagefolder") == PLAIN[name]


def test_a_folders_name_before_its_prompt(tmp_path):
    folders, right = ["bird", "café", "dog"], ["sings", "gate 2", "barks"]
    for form in ("{}\t{}", "{}: {}", "{}={}", "{},{}", "{} -> {}", "a/{}/,{}", "{}   {}"):
        rows = zip(("Dog", "cafe\u0301", "bird"), right[::-1])  # as a Mac writes it
        text = "\n".join(form.format(*row) for row in rows)
        assert read(tmp_path, text, folders, "imagefolder") == right
    numbers = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...
    text = "\n".join(f"{i}: thing{i}s" for i in range(12))
    assert read(tmp_path, text, numbers, "imagefolder") == [f"thing{i}s" for i in numbers]


ELEVEN = sorted(map(str, range(11)))  # 0, 1, 10, 2, ...
CLASSES = [f"class_{i}" for i in ELEVEN]
NUMBERED = ("{} p{}x", "{}. p{}x", "{}) p{}x", "{} - p{}x", "{}, p{}x", "{}: p{}x", "class {} p{}x")


@pytest.mark.parametrize("folders", [ELEVEN, CLASSES], ids=["numbers", "class_"])
@pytest.mark.parametrize("form", [*NUMBERED, "p{}x {}", "p{}x\t{}", "class_{} p{}x"])
def test_a_number_names_the_folder_that_holds_it(form, folders, tmp_path):
    text = "\n".join(form.format(i, i) for i in range(11))
    assert read(tmp_path, text, folders, "imagefolder") == [f"p{i}x" for i in ELEVEN]


MORE = {
    "a YAML list": lines("- {prompt}"),
    "an en dash": lines("{i} – {prompt}"),
    "a word before": lines("class {i}: {prompt}"),
    "a word and _": lines("class_{i}: {prompt}"),
    "capitals": lines("{wnid} {prompt}").replace("n0", "N0"),
    "a header": "index,name\n" + lines("{i},{prompt}"),
    "a comment": "# ours\n" + lines("{prompt}"),
    "blank lines": "\n" + lines("{wnid} {prompt}\n"),
    "JSON of dicts": json.dumps([{"name": p, "id": i} for i, (_, p) in ROWS], indent=1),
    "JSON lines": "\n".join(json.dumps({"wnid": w, "id": 0, "name": p}) for w, p in NETTE.items()),
    "a dict of dicts": json.dumps({wnid: {"label": p} for wnid, p in NETTE.items()}),
    "paths": lines("train/{wnid} {prompt}"),
    "a table's numbers": lines("{i}.0,{prompt},"),
    "a wide colon": lines("{i}：{prompt}"),
    "a Chinese comma": lines("{i}、{prompt}"),
    "a bullet": lines("• {prompt}"),
    "a label": lines("label {i}: {prompt}"),
    "a joined wnid": lines("{wnid}_{prompt}"),
    "an archive": lines("{wnid}.tar {prompt}"),
    "curly quotes": lines("“{prompt}”"),
}


@pytest.mark.parametrize("name", MORE)
def test_more_forms(name, tmp_path, capsys):
    assert read(tmp_path, MORE[name]) == PROMPTS
    is_less = name in ("a header", "a comment", "blank lines")
    assert ("left out and not counted" in capsys.readouterr().err) == is_less


@pytest.mark.parametrize("dataset", ["imagenet", "tiny_imagenet", "cifar100", "digits"])
@pytest.mark.parametrize("form", ["a photo of a {}", "{} in the wild", "a {}, high quality"])
def test_sentences_with_the_names_of_the_classes(form, dataset, tmp_path, refused, capsys):
    known = label_files.known_prompts(dataset)
    prompts = [form.format(prompt.split(",")[0]) for prompt in known.values()]
    assert read(tmp_path, "\n".join(prompts), known, dataset) == prompts
    assert "is the prompt of" not in capsys.readouterr().err
    moved = "\n".join(prompts[1:] + prompts[:1])
    refused(lambda argv: read(tmp_path, moved, known, dataset), [], "line 1: ", "is the prompt of")


REFUSED = {
    lines("{prompt}", [ROWS[i] for i in IN_OTHER_ORDER]): "line 1: 'cassette player' is the prompt",
    "\n".join([SHORT[1], SHORT[0], *SHORT[2:]]): "line 1: 'English springer' is the prompt of n021",
    lines("{i}: {prompt}", [(n, ROWS[i][1]) for n, i in enumerate(IN_OTHER_ORDER)]): "line 1: 'cas",
    lines("{i}: {prompt}").replace("4:", "3:"): "line 5: number 3",
    lines("{i}: {prompt}").replace("9:", "10:"): "line 10: number 10",
    lines("{i}: {prompt}").replace("6: ", ""): "line 7: some lines have a folder name or number",
    lines("a photo of a {prompt}", ROWS[1:] + ROWS[:1]): "line 1: 'a photo of a English springer",
    lines("{wnid} {prompt}").replace("n03028079", "church:"): "line 5: some lines have a folder",
    "{0: 'tench',\n 1: golf ball}": "line 2: not {0: 'tench', ...}: invalid syntax",
    json.dumps([{"name": p, "prompt": p} for p in PROMPTS]): "line 1: not {0: 'tench', ...}",
    "\u200b" + lines("{prompt}"): "line 1: holds the control character '\\u200b'",
    lines('{prompt}"'): "line 1: has a stray quote mark",
    "\n".join(list(NETTE)[::-1]): "line 1: 'n03888257' holds a wnid, expected a prompt",
    lines("{wnid} 1300"): "line 1: '1300': the numbers are not understood",
    "\n".join(
        f"{chr(97 + i)}) {p}" for i, p in enumerate(PROMPTS)
    ): "line 1: a) is neither a class",
    lines("{prompt} # ours"): "line 1: holds a comment, a placeholder or a path: # ours",
    lines("a photo of a {{}}"): "line 1: holds a comment, a placeholder or a path: {}",
    json.dumps({wnid: [p, "thing"] for wnid, p in NETTE.items()}): "line 1: has more than one tab",
    json.dumps({"id2label": dict(enumerate(PROMPTS))}): "line 1: not {0: 'tench', ...}",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_understood_is_refused_with_its_line(text, tmp_path, refused):
    refused(lambda argv: read(tmp_path, text), [], "labels.txt, " + REFUSED[text])


def test_prompts_that_fit_other_folders(tmp_path, refused, capsys):
    folders = ["cassette", "springer", "tench"]

    def check(prompts, *words):
        text = "\n".join(prompts)
        refused(lambda argv: read(tmp_path, text, folders, "imagefolder"), [], *words)

    check(["tench", "English springer", "cassette player"], "line 1: 'tench'", "cassette's")
    check(["a photo of a springer", "a tench", "a cassette"], "line 1: 'a photo", "of springer")
    prompts = ["held by a springer", "springer", "fish"]
    assert read(tmp_path, "\n".join(prompts), folders, "imagefolder") == prompts
    assert "warning: --label_file_path" in capsys.readouterr().err
    prompts = [f"{folder} at sea" for folder in folders]
    assert read(tmp_path, "\n".join(prompts), folders, "imagefolder") == prompts
    assert "is the TAB behind it missing?" in capsys.readouterr().err
    keyed = "\n".join(f"{f}\t{p}" for f, p in zip(folders, folders[::-1]))  # as one wants
    assert read(tmp_path, keyed, folders, "imagefolder") == folders[::-1]
    assert "line 1: 'tench' is the prompt of tench" in capsys.readouterr().err
    bare = "\n".join(f"thing{i}s" for i in range(12))
    numbers = sorted(map(str, range(12)))
    words = "line 3: in sorted order this is folder '10', by its number it is '2'"
    refused(lambda argv: read(tmp_path, bare, numbers, "imagefolder"), [], words)
    classes, words = [f"class_{i}" for i in numbers], "line 3: in sorted order this is folder 'cl"
    refused(lambda argv: read(tmp_path, bare, classes, "imagefolder"), [], words)
    one = lines("a {prompt}").replace("a tench, Tinca tinca", "a golf ball on grass")
    assert read(tmp_path, one)[0] == "a golf ball on grass"
    assert "line 1: 'a golf ball on grass' is the prompt of n0344" in capsys.readouterr().err


def test_numbers_and_blanks_beside_a_folders_name(tmp_path, refused):
    folders, right = ["hot_dog", "ice_cream", "pie"], ["sausage", "cone", "crust"]
    for form in ("{0}: {1}", "{2},{0},{1}", "{0},{2},{1}"):
        rows = [(f.replace("_", " "), p, n) for n, (f, p) in enumerate(zip(folders, right))]
        text = "\n".join(form.format(*row) for row in rows)
        assert read(tmp_path, text, folders, "imagefolder") == right
    for text in ("300 hot dog\n20 ice cream\n1 pie", "hot dog,300\nice cream,250\npie,120"):
        refused(reading(tmp_path, text, folders, "imagefolder"), [], "numbers are")


def test_the_list_of_another_data_set_is_refused(tmp_path, refused):
    woof = [p.split(",")[0] for p in label_files.known_prompts("imagewoof").values()]
    for text in ("\n".join(woof), "\n".join(f"a photo of a {p}" for p in woof)):
        refused(reading(tmp_path, text), [], "labels.txt")
    ten = list(label_files.known_prompts("cifar10"))
    text = "\n".join(PROMPTS)
    refused(reading(tmp_path, text, ten, "cifar10"), [], "are those of imagenette")


MOVED = {"cifar10": "{}s", "cifar100": "{key}: {}", "imagefolder": "a photo of {}s"}


@pytest.mark.parametrize("dataset", MOVED)
def test_shifted_plurals_and_shifted_keyed_lists_are_refused(dataset, tmp_path, refused):
    known = label_files.known_prompts(dataset)
    folders = list(known) or ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Tern"]
    names = list(known.values()) or ["black footed albatros", "laysan albatros", "tern"]
    rows = zip(folders, names[1:] + names[:1])
    text = "\n".join(MOVED[dataset].format(name, key=folder) for folder, name in rows)
    refused(reading(tmp_path, text, folders, dataset), [], "is the prompt of")


def test_the_public_class_lists_that_name_one_class_twice(tmp_path, capsys):
    """Many lists call both sunglass and sunglasses "sunglasses"."""
    prompts = ["sunglasses" if "sunglass" in p else p for p in EVERY.values()]
    assert read(tmp_path, "\n".join(prompts), EVERY, "imagenet") == prompts
    assert "share the prompt 'sunglasses'" in capsys.readouterr().err


def test_folders_and_prompts_are_shown_at_the_start(tmp_path, model, capsys):
    from distillation import gen_prototype

    picture_folder("data", [f"class_{i:02d}" for i in range(12)], 1)
    (tmp_path / "labels.txt").write_text("\n".join(f"{i}: thing{i}s" for i in range(12)))
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--num_workers", "0", "--dry_run"]
    gen_prototype.main([*argv, *model, "--label_file_path", "labels.txt"])
    shown = [line for line in capsys.readouterr().err.splitlines() if "prompt of" in line]
    assert shown == [f"prompt of class_{i:02d}: thing{i}s" for i in range(10)]


def test_a_prompt_that_the_model_does_not_read_to_its_end_is_named(capsys, model):
    """Once at the start of stage 2, with its class."""
    from distillation import distill

    picture_folder("data", ["long", "short"], 1)
    prompts = ["a " * 30 + "tail", "a dog"]  # of 32 tokens two are its start and end
    Path("labels.txt").write_text("\n".join(prompts))
    argv = ["--dataset", "imagefolder", "--data_dir", "data", "--num_workers", "0", "--dry_run"]
    distill.main([*argv, *model, "--label_file_path", "labels.txt"])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "too long" in line]
    ending = "which does not read 'tail'"
    assert warnings == [f"warning: long: its prompt is too long for this model, {ending}"]
