"""The demo's table and picture: every training set in order, and nothing that was not run."""

import json

from PIL import Image

from misc import report
from tests.conftest import make_random
from tests.test_paper_tables import fake


def test_every_arm_has_a_row_in_order_and_stages_their_seconds(tmp_path, capsys):
    students, networks = tmp_path / "students", ("convnet_mini", "convnet_mini")
    for arm, mean in (("text", 40.0), ("random", 30.0), ("d4m", 50.0), ("odd", 9.0)):
        fake(students, arm, "digits", 4, arm, f"digits_ipc4_{arm}", *networks, mean)
    fake(students, "x", "digits", 4, "d4m", "digits_ipc4_d4m", *networks, 20.0, hard=True, n=1)
    fake(students, "y", "digits", 50, "d4m", "digits_ipc50_d4m", *networks, 99.0)
    for n, folder in enumerate(("labels/a", "labels/b", "students/text")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "timing.json").write_text(json.dumps({"seconds": 10 + n}))
    report.main(["--output_root", str(tmp_path), "--dataset", "digits", "--ipc", "4"])
    text = (tmp_path / "report.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "| trained on | soft labels | hard labels |",
        "| D4M | 50.0 ± 1.0 | 20.0 |",
        "| random real images | 30.0 ± 1.0 | not run |",
        "| text-to-image, no prototypes | 40.0 ± 1.0 | not run |",
        "| odd | 9.0 ± 1.0 | not run |",
        "| stage | seconds |",
        "| 3 soft labels, all sets (2 runs) | 21 |",
        "| 4 students, all sets and seeds (1 runs) | 12 |",
        "| together, without the start of Python | 33 |",
    ]
    assert "n = 1 or 3 seeds" in text and not (tmp_path / "grid.png").exists()


def test_sets_of_one_arm_have_rows_of_their_own(tmp_path):
    students, networks = tmp_path / "students", ("convnet_w128", "convnet_w128")
    rows = [("a", "foreign", "nine", 40.0, {"images.classes": 9})]
    rows += [("b", "foreign", "ten", 30.0, {})]
    rows += [("c", "d4m", "s0.5", 50.0, {}), ("d", "d4m", "s0.7", 60.0, {})]
    rows += [("e", "foreign", "uneven", 70.0, {"images.ipc": None})]
    for name, arm, folder, mean, changed in rows:
        fake(students, name, "cifar10", 10, arm, folder, *networks, mean, n=1, **changed)
    lines = report.accuracy_table(tmp_path, "cifar10", 10)
    assert [line for line in lines if line.startswith("| ")][1:] == [
        "| D4M: s0.5 | 50.0 | not run |",
        "| D4M: s0.7 | 60.0 | not run |",
        "| foreign: nine (9 of 10 classes) | 40.0 | not run |",
        "| foreign: ten | 30.0 | not run |",
    ]
    assert lines[-2] == "Not shown: uneven: classes of different numbers of images"


def test_the_picture_shows_every_set(tmp_path):
    folder = make_random(tmp_path / "images")
    assert report.find_images(tmp_path, "digits", 4) == {"real": folder}
    report.draw_sets({"real": folder, "again": folder}).savefig("grid.png")
    with Image.open("grid.png") as image:
        assert image.width > 2 * image.height  # 8 columns, 3 rows


def test_nothing_is_refused(tmp_path, refused):
    argv = ["--output_root", tmp_path, "--dataset", "digits"]
    refused(report.main, argv, "no results of stage 4")
