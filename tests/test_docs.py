"""What README and docs/ print: every command works, every file and name is there."""

import importlib
import os
import re
import subprocess

import pytest

from misc.architecture import read_modules
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# programs that a page calls, replaced by one that writes down how it was called
CALLED = ("python", "torchrun", "pip", "sbatch", "hf", "pre-commit", "bash")
RECORDER = '#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" >"$(mktemp "$CALLS/XXXXXX")"\n'
COMMAND = r"`((?:[A-Z0-9_]+=\S* )*(?:sh|python -m|sbatch|bash|pip) [^`]+)`"


def scripts_of(text):
    """The blocks of shell of a page, and the commands within its lines."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return blocks + re.findall(COMMAND, re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Runs shell in the repository; returns the calls of CALLED, [[program, argument, ...]]."""
    (tmp_path / "bin").mkdir()
    for name in CALLED:
        (tmp_path / "bin" / name).write_text(RECORDER)
        (tmp_path / "bin" / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.mkdir()
    known = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(calls)}
    known |= {"OUT": str(tmp_path / "out"), "HOME": str(tmp_path)}

    def run(script):
        for path in calls.iterdir():
            path.unlink()
        how = {"cwd": ROOT, "env": known, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(["sh", "-eu", "-c", script + "\nwait"], **how)
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        return [path.read_text().split("\0")[:-1] for path in calls.iterdir()]

    return run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page(page, called, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"digits_ipc1_{name}/0").mkdir(parents=True)
        (tmp_path / f"digits_ipc1_{name}/0/0.png").touch()
    sets = f"{tmp_path}/digits_ipc1_one {tmp_path}/digits_ipc1_two"
    stand_for = {" ...": "", "FOLDER FOLDER": sets, "FORM": "hf"}
    for script in scripts_of(page.read_text(encoding="utf-8")):
        for word, value in stand_for.items():
            script = script.replace(word, value)
        for program, *words in called(script):
            if program == "sbatch":
                [job] = [word for word in words if word.endswith(".sbatch")]
                assert (ROOT / job).is_file(), script
            if program == "python" and words[:1] == ["-m"]:
                check_module(words[1], words[2:], script)


def check_module(name, argv, script):
    """Its command line can be parsed: no flag is unknown, no value impossible."""
    if name == "pytest":
        return
    module = importlib.import_module(name)
    if not argv or not hasattr(module, "get_args"):  # the page only names the module
        return
    try:
        module.get_args(argv)
    except SystemExit as error:
        assert error.code in (0, None), f"{script}: {name} {argv}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    for link in links:
        assert (page.parent / link).exists(), link
    folders = "scripts|distillation|matching|validate|misc|tests"
    for path in re.findall(rf"`((?:{folders})/[a-z][\w./-]*)[ `:]", text):
        assert (ROOT / path).exists() or "NAME" in path, path
    for path, name in re.findall(r"`(\w+/\w+\.py):(?:\w+\.)?(\w+)", text):
        assert re.search(rf"(def|class) {name}\b|^{name}\b", (ROOT / path).read_text(), re.M), name
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_the_picture_of_the_modules_shows_all_of_them():
    picture = (ROOT / "docs/architecture.svg").read_text()
    for name in read_modules(ROOT):
        assert f">{name.split('.')[1].replace('stable_diffusion', '…')}<" in picture, name


def test_pages_are_short():
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= (140 if page.name == "README.md" else 150), page
        assert page.name != "README.md" or max(map(len, lines)) <= 200
