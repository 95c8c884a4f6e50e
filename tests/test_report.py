"""The run report: the right numbers under the right names, from whatever there is of a run."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from distillation.datasets import known_prompts
from distillation.image_folder import list_jobs
from misc import report
from scripts import files, output
from tests.conftest import copy, picture, reseal
from tests.test_paper_tables import CIFAR10, fake

DIGITS = ("convnet_mini", "convnet_mini")


def add(root, name, arm, images, mean, fkd_seed=42, seeds=(0, 1, 2), **changed):
    """A student's results.json on digits, 4 images per class."""
    given = {"arguments.fkd_seed": fkd_seed, "arguments.seeds": list(seeds), "n": len(seeds)}
    fake(root, name, "digits", 4, arm, images, *DIGITS, mean, **given, **changed)


def written(root, capsys, *flags):
    """(what was printed, report.html, the rows of results.csv)."""
    report.main([str(root), *flags])
    page = (root / "report.html").read_text()
    with open(root / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    return re.sub(" +", " ", capsys.readouterr().out), page, lines


class Tables(HTMLParser):
    """[the words of each row] of all tables of a page."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, _):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th", "span", "br") or (self.inside and tag != "table")
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] = " ".join([self.rows[-1][-1], *data.split()]).strip()


def row_of(page, name):
    [row] = [row for row in Tables(page).rows if row and row[0].startswith(name)]
    return row[1:]


# ---- numbers and names


def test_a_draw_is_no_seed(tmp_path, capsys):
    add(tmp_path, "a", "d4m", "images", 40.0)
    add(tmp_path, "b", "d4m", "images", 44.0, fkd_seed=43)
    add(tmp_path, "c", "d4m", "images", 20.0, seeds=[0, 1], hard=True)
    add(tmp_path, "d", "d4m", "images", 30.0, seeds=[2, 3], hard=True)
    printed, page, lines = written(tmp_path, capsys)
    assert "| D4M | 42.0 ± 2.8 | 25.0 ± 5.8 (4 seeds) |" in printed
    assert "± over 2 draws of 3 seeds where nothing else is said." in printed
    assert row_of(page, "D4M") == ["42.0 ± 2.8", "25.0 ± 5.8 4 seeds"]
    assert "drawn with fkd_seed 42, 43; within a draw ± 1.0 over seeds" in page
    found = {
        (line["labels"], line["fkd_seed"], line["student_seed"]): line["top1"] for line in lines
    }
    assert len(lines) == len(found) == 10
    assert found["soft", "43", "2"] == "45.0" and found["hard", "42", "3"] == "30.5"


def test_a_setting_is_named_by_what_differs(tmp_path, capsys, random):
    for n, guidance in enumerate((3.0, 8.0)):
        folder = copy(random, tmp_path / "images")
        folder = folder.rename(folder.with_name(f"g{n}"))
        arguments = files.read_json(folder / output.MANIFEST)["arguments"]
        Image.fromarray(picture(n)).save(next(folder.glob("*/*.png")))
        arguments |= {"guidance_scale": guidance, "seed": n}
        reseal(folder, arm="d4m", arguments=arguments)
        content = files.read_json(folder / output.MANIFEST)["content"]
        add(tmp_path, f"s{n}", "d4m", f"g{n}", 50.0 + n, **{"arguments.images": content})
    add(tmp_path, "t", "random", "real", 30.0)
    add(tmp_path, "u", "random", "real", 35.0, **{"arguments.temperature": 4.0})
    add(tmp_path, "v", "foreign", "nine", 45.0, hard=True, **{"images.classes": 9})
    printed, page, lines = written(tmp_path, capsys)
    rows = [line.split(" | ")[0][2:] for line in printed.splitlines() if " | " in line]
    assert rows[2:7] == [
        "D4M, guidance_scale 3, temperature 20",
        "D4M, guidance_scale 8, temperature 20",
        "random real images, temperature 4",
        "random real images, temperature 20",
        "foreign: nine (9 of 10 classes)",
    ]
    assert {(line["guidance_scale"], line["seed"]) for line in lines} == {
        ("3.0", "0"),
        ("8.0", "1"),
        ("", ""),
    }
    assert "<h4>D4M, guidance_scale 8, seed 1</h4>" in page  # the gallery tells draws apart, too


def test_what_no_setting_tells_apart_is_named_by_its_folder(tmp_path, capsys):
    for name, mean in (("a", 40.0), ("b", 60.0)):
        add(tmp_path, name, "d4m", "images", mean)
    printed, page, _ = written(tmp_path, capsys)
    assert "| D4M [a] | 40.0 ± 1.0 |" in printed and "| D4M [b] | 60.0 ± 1.0 |" in printed
    assert "its images are not shown: " in page  # for nobody made them here


def test_a_student_that_stands_in_two_folders_counts_once(tmp_path, capsys):
    add(tmp_path, "a", "d4m", "images", 39.5, seeds=[0, 1])  # 39 and 40
    add(tmp_path, "b", "d4m", "images", 40.0, seeds=[0, 1, 2])
    printed, page, _ = written(tmp_path, capsys)
    assert "| trained on | soft |" in printed and "| D4M | 40.0 ± 1.0 |" in printed
    assert "± over 3 seeds." in printed and "--hard_label" in page  # how the others are made


def test_the_papers_number_stands_beside_its_cell(tmp_path, capsys):
    fake(tmp_path, "a", *CIFAR10, 55.5, **{"arguments.seeds": [0, 1, 2]})
    fake(tmp_path, "b", *CIFAR10, 50, **{"arguments.seeds": [0, 1, 2], "arguments.epochs": 7})
    _, page, _ = written(tmp_path, capsys)
    assert row_of(page, "D4M, epochs 500")[-1] == "56.2 ± 0.4 Table 1"
    assert "differs from the paper’s setting in epochs 7" in page
    assert "no weights beside results.json" in page


# ---- what there is


@pytest.fixture(scope="module")
def chain(tmp_path_factory, request):
    """Real images, their labels, two students of one draw, and their teacher."""
    from validate import train_FKD

    root = tmp_path_factory.mktemp("chain")
    for name, place in {"random": "images", "labels": "labels", "teacher": "teachers"}.items():
        copy(request.getfixturevalue(name), root / place)
    argv = ["--train_dir", *(root / "images").iterdir(), "--model", "convnet_mini"]
    argv += ["--fkd_path", *(root / "labels").iterdir(), "--seeds", "0", "1"]
    argv += ["--output_dir", root / "students", "--num_workers", "0", "--device", "cpu"]
    train_FKD.main([str(word) for word in argv])
    return root


def test_the_whole_chain(chain, capsys):
    printed, page, _ = written(chain, capsys)
    assert printed.splitlines()[-1] == str(chain / "report.html")
    [path] = chain.glob("students/*/results.json")
    top1 = files.read_json(path)["summary"]["last"]["top1"]["mean"]
    runs, _, _ = report.find_runs(chain)
    [table] = report.make_tables(report.read_results(runs, []), runs, chain, [])
    report.add_classes(table, None, report.this_process("cpu"), {})
    names, rows = table["classes"]
    assert names == ["random real images (3 of 10 classes)"]
    scores = [row[2] for row in rows]
    # digits 0-2 have 45, 46 and 44 test images: nearly the mean of the three
    assert scores == sorted(scores) and abs(sum(scores) / 3 - top1) < 1
    # two curves, one in the legend; a teacher is no student
    assert page.count("<svg") == 3 and row_of(page, "random real")[0].startswith(f"{top1:.1f}")
    assert "Teachers, on real images: " in printed and sys.orig_argv[-1] in unescape(page)
    for word in ("cutmix", "convnet_mini", "mix_type", "torch 2", "Not there yet"):
        assert (word in page) == (word != "Not there yet")
    [picture] = [p for p in chain.glob("images/*/0/*_0000.png")]
    # in the overview and among its class
    assert page.count(f'href="{picture.relative_to(chain)}"') == 2


def test_a_student_is_tested_class_by_class_on_its_own_test_images(chain, tmp_path, monkeypatch):
    runs, _, _ = report.find_runs(chain)
    [table] = report.make_tables(report.read_results(runs, []), runs, chain, [])
    [result], opened, known, seen = table["results"], report.evaluation.open_test, {}, []

    def open_test(flag, root, *more, **how):
        seen.append(root)
        return opened(flag, None, *more, **how)

    monkeypatch.setattr(report.evaluation, "open_test", open_test)
    for place in map(str, (tmp_path, chain)):
        run = result["run"]._replace(log=[{"command": ["x", f"--val_dir={place}"]}])
        report.by_class({**result, "run": run}, None, report.this_process("cpu"), known)
    assert seen == [str(tmp_path), str(chain)]


def test_a_run_with_a_report_of_its_own_is_left_out(tmp_path, capsys, refused):
    add(tmp_path / "demo", "a", "d4m", "images", 40.0)
    written(tmp_path / "demo", capsys)
    refused(report.main, [tmp_path], "Left out, with a report of their own: demo.")
    add(tmp_path, "b", "d4m", "images", 50.0)
    printed, page, lines = written(tmp_path, capsys)
    assert "| D4M | 50.0 ± 1.0 |" in printed and "of their own: demo." in printed
    assert '<a href="demo/report.html">demo</a>' in page
    assert {line["folder"] for line in lines} == {"students/b"}


def test_half_a_run_and_damage_are_said(chain, tmp_path, capsys):
    root = shutil.copytree(chain, tmp_path / "half", copy_function=shutil.copy2)
    [labels], [student] = (root / "labels").iterdir(), (root / "students").iterdir()
    (labels / output.MANIFEST).unlink()
    (student / "results.json").write_text('{"half": ')
    next((root / "images").glob("*/*/*.png")).write_bytes(b"")
    next((root / "teachers").glob("*/log.jsonl")).write_text("{half")
    printed, page, lines = written(root, capsys)
    assert not lines and "No student has finished yet" in page
    said = {row[0].split("/")[0]: row[1] for row in Tables(page).rows if len(row) == 2}
    assert "not finished: " in said["labels"] and "results.json" in said["students"]
    assert "0 bytes, expected" in said["images"] and "teachers" not in said


def test_nothing_that_a_name_holds_is_taken_for_html(chain, tmp_path, capsys):
    evil = '<script>alert("1")</script>$\\frac{'
    root = shutil.copytree(chain, tmp_path / "evil", copy_function=shutil.copy2)
    [folder] = (root / "images").iterdir()
    manifest = files.read_json(folder / output.MANIFEST)
    classes = [{**c, "prompt": evil} for c in manifest["classes"]]
    reseal(folder, classes=classes, arguments={**manifest["arguments"], evil: evil})
    add(root, "x", "foreign", evil, 40.0, hard=True)
    _, page, _ = written(root, capsys)
    assert "<script" not in page and evil in unescape(page)


def test_nothing_is_refused(tmp_path, refused):
    refused(report.main, [tmp_path], "holds no output")


# ---- in a browser


class Browser:
    """A headless Chromium, driven through a pipe by the DevTools protocol."""

    def __init__(self, folder):
        program = shutil.which("chromium") or pytest.skip("no chromium")
        (theirs, self.to), (self.of, back) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]

        def place():  # it reads 3 and writes 4
            copies = os.dup(theirs), os.dup(back)
            os.dup2(copies[0], 3), os.dup2(copies[1], 4)

        how = {"close_fds": False, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([program, *flags], preexec_fn=place, **how)
        os.close(theirs), os.close(back)
        self.unread, self.sent, self.events, self.session = b"", 0, [], {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        attached = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.sent:
            self.events.append(answer)
        return answer["result"]

    def read(self):
        while b"\0" not in self.unread:
            self.unread += os.read(self.of, 2**20) or pytest.fail("chromium has ended")
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, path, width, scheme):
        """Show a page, and wait until it is there."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", features=features)
        before = len(self.events)
        self("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events[before:]):
            self.events.append(self.read())

    def ask(self, script):
        how = {"returnByValue": True, "awaitPromise": True}
        return self("Runtime.evaluate", expression=script, **how)["result"].get("value")

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            how = {"key": key, "windowsVirtualKeyCode": code, "text": "\r"}
            self("Input.dispatchKeyEvent", type=kind, **how)


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "chromium")
    yield browser
    browser("Browser.close")
    browser.process.wait(20)


FIRST_PAINT = "performance.getEntriesByType('paint')[0].startTime"
LOADED = "(i => i.decode().then(() => i.naturalWidth))(document.querySelector('{}'))"


def test_the_page_in_a_browser(chain, capsys, browser):
    written(chain, capsys)
    papers = []
    for width, scheme in ((1280, "light"), (390, "dark")):
        browser.open(chain / "report.html", width, scheme)
        assert browser.ask("document.documentElement.scrollWidth") <= width
        papers.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert len(set(papers)) == 2
    assert browser.ask(LOADED.format("#gallery ~ div img")) == 32
    for what in ("#gallery ~ details", "#gallery ~ details > details"):
        browser.ask(f"document.querySelector('{what} > summary').focus()")
        browser.press("Enter", 13)
    assert browser.ask(LOADED.format("details[open] details[open] img")) == 32
    said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert not [event for event in browser.events if event.get("method") in said]
    asked = [
        e["params"]["request"]["url"] for e in browser.events if "request" in e.get("params", {})
    ]
    assert {re.split("[:;]", url)[0] for url in asked} <= {"file", "data"}


@pytest.mark.slow
def test_a_thousand_classes_of_ten(tmp_path, capsys, browser):
    noise, prompts = (
        np.random.default_rng(0).normal(0, 20, (224, 224, 3)),
        known_prompts("imagenet"),
    )
    for n in range(20):
        pixels = (picture(n, (224, 224)) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    classes = [{"index": n, "folder": f, "prompt": p} for n, (f, p) in enumerate(prompts.items())]
    for arm in ("d4m", "random", "decoded"):
        folder, rows = tmp_path / "images" / arm, []
        for job in list_jobs(classes, 10, 10):
            (folder / job.folder).mkdir(parents=True, exist_ok=True)
            os.link(tmp_path / f"{(7 * job.position + job.i) % 20}.png", folder / job.file)
            rows.append({"file_name": job.file, "prompt": job.prompt, "seed": 2**62 + len(rows)})
        (folder / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
        facts = {"arguments": {"arm": arm}, "inputs": {}, "classes": classes, "stage": "images"}
        (folder / output.MANIFEST).write_text(json.dumps({**facts, "files": {}, "checksum": ""}))
        reseal(folder, dataset="imagenet", arm=arm)
    written(tmp_path, capsys)
    assert (tmp_path / "report.html").stat().st_size < 60e6
    browser.open(tmp_path / "report.html", 1280, "light")
    assert browser.ask(FIRST_PAINT) < 3000
    count = 'document.querySelectorAll("img").length'
    assert browser.ask(count) == 10 * (1000 + 2 * 10) + 3 * 6 * 10  # class by class; overview
