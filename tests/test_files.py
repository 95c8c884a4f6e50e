"""Whole files, strict JSON, safe names."""

import errno
import os

import pytest

from scripts import files
from tests.conftest import HOSTILE, everything


def test_a_file_is_synced_before_it_gets_its_name(monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, call=call: (done.append(n), call(*a)))
    files.write("a.txt", "whole")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder's entry


def test_no_error_leaves_anything_behind():
    with pytest.raises(KeyError), files.atomic("a.txt") as temporary:
        temporary.write_text("half")
        assert not os.path.exists("a.txt")
        raise KeyError
    assert not everything(".")
    with files.atomic("a.txt", "0-of-1") as temporary:
        temporary.write_text("whole")
        assert everything(".") == {".a.txt.0-of-1.tmp"}  # hidden, and what Output sweeps


def test_a_file_system_that_cannot_sync(monkeypatch, capsys, refused):
    def fsync(_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    error = errno.EINVAL
    for n in range(3):
        files.write(f"{n}.txt", "whole")
    assert capsys.readouterr().err.count("no fsync on this file system") == 1
    assert everything(".") == {"0.txt", "1.txt", "2.txt"}
    error = errno.EIO
    refused(lambda _: files.write("4.txt", "half"), [], "cannot write 4.txt")
    assert everything(".") == {"0.txt", "1.txt", "2.txt"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_first_of_two_writers_wins_where_links_work(links, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "")))
    files.write("a.txt", "first")
    files.write("a.txt", "second", once=True)
    files.write("b.txt", "only", once=True)
    assert open("a.txt").read() == ("first" if links else "second")
    assert open("b.txt").read() == "only" and everything(".") == {"a.txt", "b.txt"}


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


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(name):
    assert not files.safe_name(HOSTILE[name])


def test_names_that_are_safe():
    for name in ("n01440764", "0", "c" * 200, "Zürich", "crane (bird)", "日本"):
        assert files.safe_name(name)
    assert not files.safe_name("日" * 70) and files.safe_name("c" * 250, longest=255)


def test_names_that_some_file_systems_take_for_one():
    assert files.colliding_names(["a", "Cat", "b", "cat"]) == ("Cat", "cat")
    assert files.colliding_names(["caf\u00e9", "cafe\u0301"]) == ("caf\u00e9", "cafe\u0301")
    assert files.colliding_names(["a", "b"]) is None
