"""Whole files, strict JSON, safe names."""

import errno
import os
from unittest.mock import Mock

import pytest

from scripts import files
from tests.conftest import HOSTILE, everything


def test_a_file_is_synced_before_it_gets_its_name(monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(everything(".")), sync(n)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    files.write("a.txt", "whole", "0-of-1")
    # hidden, and as Output sweeps it; then its name, then the folder's entry
    assert done == [{".a.txt.0-of-1.tmp"}, "replace", {"a.txt"}]


def test_a_file_system_that_cannot_sync(monkeypatch, capsys, refused):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EINVAL, "")))
    files._warn_once.cache_clear()
    for n in range(3):
        os.makedirs(f"d{n}")
        files.write(f"d{n}/{n}.txt", "whole")
    assert capsys.readouterr().err.count("no fsync on this file system") == 1
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "")))
    refused(lambda _: files.write("4.txt", "half"), [], "cannot write 4.txt")
    assert {name for name in everything(".") if "." in name} == {f"d{n}/{n}.txt" for n in range(3)}


@pytest.mark.parametrize("answer", [OSError(errno.ENOSYS, ""), (0, 0, 0)], ids=["none", "zeros"])
def test_a_file_system_that_does_not_say_how_much_is_free(answer, monkeypatch):
    usage = Mock(side_effect=[answer] if isinstance(answer, OSError) else None)
    usage.return_value = Mock(total=0, free=0)
    monkeypatch.setattr(files.shutil, "disk_usage", usage)
    files.require_space("--out", "folder/below", 2**50)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_first_of_two_writers_wins(links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "")))
    for text in ("first", "second"):
        files.write("a.txt", text, once=True)
    assert open("a.txt").read() == "first" and everything(".") == {"a.txt"}


@pytest.mark.parametrize(
    "text",
    [b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[Infinity]", b"\xff", b"{", b"", b"[" * 100_000],
    ids=lambda text: str(text[:12]),
)
def test_json_is_strict(text, refused):
    files.write("x.json", text)
    refused(lambda _: files.read_json("x.json"), [], "x.json", "cannot be read as JSON")
    with pytest.raises(ValueError):  # nor is it written
        files.json_text({"a": float("nan")})


def test_names():
    assert not [name for name, text in HOSTILE.items() if files.safe_name(text)]
    for name in ("n01440764", "0", "c" * 200, "Zürich", "crane (bird)", "日本"):
        assert files.safe_name(name)
    assert not files.safe_name("日" * 70) and files.safe_name("c" * 250, longest=255)


def test_names_that_some_file_systems_take_for_one():
    assert files.colliding_names(["a", "Cat", "b", "cat"]) == ("Cat", "cat")
    assert files.colliding_names(["caf\u00e9", "cafe\u0301"]) == ("caf\u00e9", "cafe\u0301")
    assert files.colliding_names(["a", "b"]) is None
