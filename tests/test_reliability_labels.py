"""12 malformed label files are normalised or refused with the line number; the release's three faults are flagged."""

import json

import pytest
from reliability import STAGE_1, STAGE_2, image_folder

from distillation import gen_prototype, gen_syn_image
from distillation.datasets import known_prompts
from distillation.prototypes import PrototypeFolder

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def lines(prompts=DIGITS, end="\n"):
    return "".join(prompt + end for prompt in prompts).encode()


def keyed(prompts=DIGITS, folders="0123456789"):
    return lines([f"{folder}\t{prompt}" for folder, prompt in zip(folders, prompts)])


def changed(number, line):
    return lines([*DIGITS[: number - 1], line, *DIGITS[number:]])


# name: (the file, what the refusal says - or None if it is read as if it were well formed)
MALFORMED = {
    "byte order mark": (b"\xef\xbb\xbf" + lines(), None),
    "CR LF": (lines(end="\r\n"), None),
    "quotes around, spaces outside": (lines([f'  "{prompt}" ' for prompt in DIGITS]), None),
    "blank line": (changed(4, ""), "line 4: is blank"),
    "stray quote": (changed(3, 'two"'), "line 3: has a stray quote mark"),
    "two tabs": (changed(2, "1\tone\tuno"), "line 2: has more than one tab"),
    "a folder twice": (keyed(folders="0123446789"), "line 6: the folder 4 stands twice"),
    "an unknown folder": (keyed(folders="012345678x"), "line 10: there is no class folder 'x'"),
    "wrong count": (lines(DIGITS[:9]), "has 9 prompts, there are 10 classes"),
    "wrong order": (lines(DIGITS[::-1]), "line 1: 'nine' is the prompt of 9"),
    "control character": (changed(8, "sev\x00en"), "line 8: holds the control character"),
    "UTF-16": ("\n".join(DIGITS).encode("utf-16"), "not UTF-8"),
}


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_there_are_12_of_them():
    assert len(MALFORMED) == 12


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_label_file_is_normalised_or_refused_with_its_line(name, made, model, refused, tmp_path):
    content, words = MALFORMED[name]
    (tmp_path / "labels.txt").write_bytes(content)
    stage_1 = [*STAGE_1, *model, "--label_file_path", "labels.txt"]
    stage_2 = [*STAGE_2, *model, "--label_file_path", "labels.txt", "--prototype_path", str(made[0])]
    if words is None:
        manifest = json.loads((gen_prototype.main(stage_1) / "manifest.json").read_text())
        assert [c["prompt"] for c in manifest["classes"]] == DIGITS[:3]
        return
    for main, argv in ((gen_prototype.main, stage_1), (gen_syn_image.main, stage_2)):
        refused(main, argv, "--label_file_path labels.txt", words)
    assert not (tmp_path / "output").exists()


def imitation(dataset):
    """The release's fault in one of its lists, as a file for our flag."""
    prompts = list(known_prompts(dataset).values())
    if dataset == "cifar100":  # superclass order, as on the data set's web page
        order = ["beaver", "dolphin", "otter", "seal", "whale"]
        prompts = order + [p for p in prompts if p not in order]
    elif dataset == "imagenet":
        prompts[134], prompts[517] = prompts[517], prompts[134]
    else:
        prompts = ['"' + p.replace(" ", "") + '"' if "," in p else p.replace(" ", "") for p in prompts]
    return "\n".join(prompts) + "\n"


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("cifar100", "line 1: 'beaver' is the prompt of beaver, expected apple's"),
        ("imagenet", "line 135: 'crane, machine' is the prompt of n03126707"),
        ("tiny_imagenet", "has lost its spaces"),
    ],
)
def test_the_releases_three_faulty_lists_are_flagged_before_any_image_is_read(
    dataset, words, refused, tmp_path, model
):
    prompts = known_prompts(dataset)
    image_folder(tmp_path / "data", prompts, count=0)
    (tmp_path / "labels.txt").write_text(imitation(dataset))
    argv = ["--dataset", dataset, "--data_dir", tmp_path / "data", "--label_file_path", "labels.txt", *model]
    refused(gen_prototype.main, argv, words)


def test_two_classes_with_one_prompt_stay_two_classes(made, model, capsys, tmp_path):
    (tmp_path / "labels.txt").write_bytes(lines(["crane", "crane", *DIGITS[2:]]))
    folder = gen_prototype.main([*STAGE_1, *model, "--label_file_path", "labels.txt"])
    assert "classes 0 and 1 share the prompt 'crane'" in capsys.readouterr().err
    ours, theirs = PrototypeFolder(folder), PrototypeFolder(made[0])
    assert all((ours[n].latents == theirs[n].latents).all() for n in range(3))
