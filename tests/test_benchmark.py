"""The benchmark runs whole on a CPU, its outputs agree, and its tables say what was measured."""

from pathlib import Path

import pytest
import torch
from conftest import tree

from misc import benchmark
from misc.bench import costs, measure, memory, networks, release, run, stage_1, stage_3, stage_4, tables
from scripts.files import read_json

CHUNKS = set()  # in which students were trained
WRITTEN = set()  # (prototypes, class) of stage 1's files


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    train_epoch = stage_4.train_epoch

    def noted(job, *rest):
        CHUNKS.add(job.chunk)
        return train_epoch(job, *rest)

    write_class = stage_1.write_class

    def written(path, found, facts):
        WRITTEN.add((len(found.latents), facts["class_index"]))
        write_class(path, found, facts)

    out = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("D4M_TEST_DATA", raising=False)
        patch.setattr(stage_1, "write_class", written)
        patch.setattr(stage_4, "BN_BATCH", 5)  # 73 in batches of 1024
        patch.setattr(stage_4, "train_epoch", noted)
        argv = ["--device", "cpu", "--quick", "--profile", "--arch", "convnet-w128", "--out", str(out)]
        path = benchmark.main(argv)
    return read_json(path), path


def test_every_stage_is_there_and_its_outputs_agree(result):
    rows = result[0]["rows"]
    assert [r["stage"] for r in rows] == sorted(r["stage"] for r in rows) and {r["stage"] for r in rows} == {
        1,
        2,
        3,
        4,
    }
    for row in rows:
        assert row["release"] > 0 and row["ours"] > 0 and row["ratio"] > 0, row["what"]
        assert row["agree"] and "DIFFERENT" not in row["same"], row["what"]
        if "differ by" in row["same"] and "bf16" not in row["what"]:
            off = row["same"].split("differ by ")[1].split()[0]
            assert float(off) <= (1 if "pixels" in row["same"] else 1e-3), row["what"]
    assert [row["what"] for row in rows if row["same"].startswith("0 of ")] == ["crops replayed: PNG, crop, flip"]
    assert sum("channels_last" in row["what"] for row in rows) == 4 and result[1].stem == "cpu-convnet_w128-profile"
    assert all(peak["host_mib"] > 100 for peak in result[0]["peak_memory"].values())
    assert result[0]["facts"]["crop_bytes_that_differ"] == {"224": 0, "64": 0, "32": 0}


def test_a_student_of_ours_is_timed_in_the_launchers_chunks(result):
    """And, in an extra row, in the release's: half a batch."""
    assert CHUNKS == {5, 4}
    rows = {row["what"]: row for row in result[0]["rows"] if row["what"].startswith("an epoch of")}
    assert {"an epoch of convnet_w128, 32 px", "an epoch of convnet_w128, 32 px, 4 images a pass"} < set(rows)
    assert all("5 images a pass where no other" in row["note"] for row in rows.values())


def test_a_second_network_is_left_out_when_time_or_memory_is_short(tmp_path, monkeypatch):
    bench, seen = run.Bench(torch.device("cpu"), run.SIZES["quick"], [], tmp_path, False, lambda *_, **__: None), []
    bench.archs = ("small", "large")
    bench.each_arch(3, lambda _, arch: seen.append(arch))
    assert seen == ["small", "large"] and "left_out" not in bench.facts

    def out_of_memory(_, arch):
        if arch == "large":
            raise torch.OutOfMemoryError("no room")

    bench.each_arch(3, out_of_memory)
    monkeypatch.setattr(run, "SECONDS", 0)
    bench.each_arch(4, lambda _, arch: seen.append(arch))
    assert seen == ["small", "large", "small"]
    assert [text.split(":")[0] for text in bench.facts["left_out"]] == ["stage 3, large", "stage 4, large"]


def test_another_ipc_is_timed_with_its_files_at_two_ipcs_in_both_forms(result):
    rows = [row for row in result[0]["rows"] if row["what"].startswith("another IPC")]
    assert [row["what"].split(":")[0] for row in rows] == [
        f"another IPC, {ipc} a class, {form}" for ipc in (2, 4) for form in ("json", "safetensors")
    ]
    assert WRITTEN == {(n, c) for n in (2, 4) for c in (0, 1)} and all(row["target"] == 12 for row in rows)


def test_its_tables_say_what_the_json_says(result):
    found, path = result
    text = path.with_suffix(".md").read_text()
    for row in found["rows"]:
        assert row["what"] in text and row["same"] in text
    assert "Top costs" in text and found["command"] in text and "NOT MET" in text  # nothing is met by 8 images


def test_operation_counts_are_those_of_the_real_configuration(result):
    flops = result[0]["flops"]
    assert flops["vae_encode"] == pytest.approx(1.117e12, rel=0.01)
    assert flops["unet_step"] == pytest.approx(0.803e12, rel=0.01)
    assert flops["vae_decode"] == pytest.approx(2.515e12, rel=0.01)
    assert flops["synthesis"] == pytest.approx(60.4e12, rel=0.01)
    assert flops["resnet18_forward"] == pytest.approx(3.6e9, rel=0.02)


def test_the_real_networks_have_the_known_sizes():
    with torch.device("meta"):
        vae, unet, text = networks.networks(True, 512)
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (vae, unet, text)]
    assert millions == pytest.approx([83.65, 859.52, 123.06], abs=0.01)


def test_memory_of_stage_2_is_that_of_one_class(tmp_path):
    small = memory.sparse_prototypes(tmp_path, 3, 50, "safetensors")
    folder, size = small
    assert size > 3 * 50 * 4 * 64 * 64 * 2
    assert sum(p.stat().st_blocks * 512 for p in folder.glob("*.safetensors")) < size / 10  # holes
    assert len(tree(folder)) == 3 + 2


def test_costs_are_marked_and_prefer_a_gpu(result, tmp_path):
    text = costs.costs([result[0]])
    assert "Rates of a GPU: estimated" in text
    cells = [
        c.strip()
        for line in text.splitlines()
        if line.startswith("| ") and "IPC" not in line
        for c in line.split("|")[2:-1]
    ]
    assert cells and all(cell[-2:] in (" m", " c", " e") for cell in cells)
    rows = [{"what": what, "ours": 100.0} for what in costs.GPU_ROWS.values()]
    gpu = {"machine": {"gpu": "Some GPU"}, "rows": rows, "facts": {}}
    text = costs.costs([result[0], gpu])
    assert "measured on Some GPU" in text and "| 2 synthesis | 100 s c |" in text
    rows[list(costs.GPU_ROWS).index("cache, IPC 200")]["ours"] = 25.0  # four times 3.6 hours
    [line] = [line for line in costs.costs([gpu]).splitlines() if line.startswith("| 1 another IPC")][:1]
    assert line == "| 1 another IPC, from the cache | 3.6 h c | 5.8 h c | 8.6 h c | 14.2 h c |"


def test_outputs_that_differ_end_it_with_status_1(tmp_path, monkeypatch, capsys):
    original = stage_3.crop_on_cpu
    monkeypatch.setattr(stage_3, "crop_on_cpu", lambda *args: original(*args).clamp(max=254))  # white is one off
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--device", "cpu", "--quick", "--stage", "3", "--out", str(tmp_path)])
    found, lines = read_json(tmp_path / "cpu-stage3.json"), capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and [row["agree"] for row in found["rows"]] == [False, True, True, True]
    assert sum(line.startswith("error: outputs differ: stage 3, crops") for line in lines) == len(found["differ"]) > 1


def test_whatever_is_timed_on_a_cpu_has_one_torch_thread(monkeypatch):
    """On a machine with a GPU too, where the networks' side may have all."""
    now = [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    _, seen = measure.in_turns({"release": torch.get_num_threads}, 2, torch.device("cpu"))
    assert seen == {"release": 1} and now == [3]


def test_the_releases_batches_are_pinned_for_a_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    feed = release.ReleaseFeed([], [], 32)
    assert [feed.loader(0, torch.device(name)).pin_memory for name in ("cpu", "cuda")] == [False, True]


def test_the_readmes_memory_is_that_of_the_costs():
    """And counts, in stage 4, the test images."""
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    first = lines.index("| stage | time (estimated) | disk | GPU memory (estimated) |") + 1
    usual, small = costs.gpu_bytes(10), costs.gpu_bytes(10, 8)
    for stage, line in enumerate(lines[first + 1 : first + 5], 1):
        cell = f"{usual[stage] / 1e9:.0f} GB"
        cell += f", {small[stage] / 1e9:.0f} GB with `--batch_size 8`" if stage < 3 else ""
        assert line.startswith(f"| {stage} |") and line.endswith(f"| {cell} |")
    assert usual[4] - 7.5e9 > 10_000 * costs.PIXELS


def test_a_row_knows_whether_its_target_is_met():
    times = {"release": [(4.0, 2.0), (4.0, 2.0)], "ours": [(1.0, 1.0), (1.0, 0.5)]}
    facts = {"same": "same", "target": 2.5}
    counts = {"release": 100, "ours": 100}
    row = measure.compare(3, "feeding", "image", times, counts, torch.device("cpu"), **facts)
    assert row["ratios"] == [2, 4] and row["ratio"] == 3 and row["ours"] == 150 and row["met"]
    assert not measure.compare(3, "x", "image", times, counts, torch.device("cpu"), least=1000, **facts)["met"]
    assert not measure.compare(3, "x", "image", times, counts, torch.device("cpu"), agree=False, **facts)["met"]
    assert "2.5x: met" in tables.table([row])
