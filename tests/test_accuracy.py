"""The table of what the flags of speed do to accuracy is of the students that it names."""

import pytest
from stage34 import PROTOCOL, make_images

from misc.bench import accuracy
from scripts.files import read_json
from validate import train_FKD


def test_differences_are_of_the_same_seed_and_the_table_says_what_was_measured(tmp_path, monkeypatch, refused):
    given = ["--train_dir", str(make_images(tmp_path)), "--hard_label", *PROTOCOL, "--model", "convnet_mini"]
    ran, original = [], train_FKD.main
    monkeypatch.setattr(train_FKD, "main", lambda argv: ran.append(argv) or original(argv))
    argv = ["--name", "few digits", "--seeds", "3", "5", "--device", "cpu", "--out", str(tmp_path / "out"), *given]
    path = accuracy.main(argv)
    entry = read_json(path)["few digits"]
    rows = {row["way"]: row for row in entry["rows"]}
    assert list(rows) == list(accuracy.WAYS) and len(ran) == 1 + 2 * len(rows)
    assert sum("--amp" in argv for argv in ran) == sum("--fused" in argv for argv in ran) == 2 * 2
    assert sum("--compile" in argv for argv in ran) == 2
    plain = rows["as it is"]["top1"]["values"]
    for row in rows.values():
        assert row["difference"]["values"] == [a - b for a, b in zip(row["top1"]["values"], plain)]
        assert row["speed"]["mean"] > 0 and row["top1"]["n"] == 2
    alone = original([*given, "--seeds", "5", "--device", "cpu", "--output_dir", str(tmp_path / "alone")])
    assert read_json(alone / "results.json")["summary"]["last"]["top1"]["mean"] == plain[1]
    accuracy.main([*argv[:1], "again", *argv[2:]])
    text = path.with_suffix(".md").read_text()
    assert "## few digits, n = 2" in text and "## again, n = 2" in text and entry["command"] in text
    assert f"| --amp bf16 | {accuracy.spread(rows['--amp bf16']['top1'], 2)} |" in text
    refused(accuracy.main, ["--name", "x", "--device", "cpu", "--no_such_flag"], "no_such_flag")


@pytest.mark.parametrize("mean, std, text", [(1.234, None, "1.23"), (-0.5, 0.25, "-0.50 ± 0.25")])
def test_spread(mean, std, text):
    assert accuracy.spread({"mean": mean, "std": std}, 2) == text
