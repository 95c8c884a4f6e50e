"""What --amp bf16, --channels_last, --fused and --compile do to a student's accuracy, beside its speed.

    python -m misc.bench.accuracy --name digits --seeds 0 1 2 --train_dir DIR --fkd_path DIR --model convnet_mini ...
    sh misc/bench/accuracy.sh                            # the table of misc/benchmarks/accuracy.md, from nothing

Everything but --name, --seeds, --device and --out goes to validate.train_FKD, which trains a student from scratch for
each seed and each way of computing, in turns, in this process. Speed is of the whole run, reading and tests included,
in seconds on a GPU and in CPU-seconds on a CPU. Writes OUT/accuracy.json, an entry a name, and the table of all,
OUT/accuracy.md.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.bench.accuracy", file=sys.stderr)
    sys.exit(2)

import shlex
import tempfile
import time
from pathlib import Path

import torch

from matching.training import summary
from misc.bench.measure import commit, machine, spent
from scripts.files import library_versions, read_json, write_json, write_text
from scripts.runtime import Parser, natural, resolve_device
from validate import train_FKD

WAYS = {
    "as it is": [],
    "--channels_last": ["--channels_last"],
    "--fused": ["--fused"],
    "--amp bf16": ["--amp", "bf16"],
    "all three": ["--channels_last", "--fused", "--amp", "bf16"],
    "--compile": ["--compile"],
}


def train(way, seed, flags, device):
    """(top-1 in % of the last epoch, seconds or CPU-seconds) of one student."""
    with tempfile.TemporaryDirectory(prefix="d4m-accuracy-") as out:
        before = spent(device)
        argv = [*flags, *WAYS[way], "--seeds", str(seed), "--device", str(device), "--output_dir", out]
        folder = train_FKD.main(argv)
        seconds, cpu_seconds = (b - a for a, b in zip(before, spent(device)))
        top1 = read_json(folder / "results.json")["summary"]["last"]["top1"]["mean"]
    return top1, seconds if device.type == "cuda" else cpu_seconds


def measure(seeds, flags, device):
    """[row of the table] by way: top-1, difference to "as it is" seed by seed, speed over that of "as it is"."""
    train("as it is", seeds[0], [*flags, "--eval_every", "1000"], device)  # files are read, kernels are chosen
    found = {way: [] for way in WAYS}
    for turn, seed in enumerate(seeds):
        for way in list(WAYS)[:: -1 if turn % 2 else 1]:
            found[way].append(train(way, seed, flags, device))
    plain = found["as it is"]
    return [
        {
            "way": way,
            "top1": summary([top1 for top1, _ in results]),
            "difference": summary([a[0] - b[0] for a, b in zip(results, plain)]),
            "speed": summary([b[1] / a[1] for a, b in zip(results, plain)]),
            "seconds": summary([seconds for _, seconds in results]),
        }
        for way, results in found.items()
    ]


def spread(value, digits, sign=""):
    """mean +- sample std"""
    std = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:{sign}.{digits}f}{std}"


def markdown(entries):
    """entries {name: what `main` measured}"""
    lines = ["# What bf16, channels_last, the fused optimiser and compile do to accuracy", ""]
    lines += [
        "Top-1 in % of the last epoch, mean ± sample std over the seeds; difference to the first row seed by seed;",
        "speed of whole runs, reading and tests included, over the first row's. All are off in the faithful preset.",
        "`sh misc/bench/accuracy.sh` makes the images, the labels and this table.",
    ]
    for name, entry in entries.items():
        rows, m = entry["rows"], entry["machine"]
        lines += [
            "",
            f"## {name}, n = {rows[0]['top1']['n']}",
            "",
            f"`{entry['command']}`",
            "",
            f"Commit {entry['commit']}, {entry['date']}, {m.get('gpu') or m['cpu']}, "
            f"torch {entry['versions']['torch']}, torch threads: {m['torch_threads']}; "
            f"{entry['seconds']:.0f} s in all.",
            "",
            f"| way | top-1 | difference | times as fast ({entry['per']}) |",
            "|---|---:|---:|---:|",
        ]
        for row in rows:
            first = row["way"] == "as it is"
            cells = [
                row["way"],
                spread(row["top1"], 2),
                "" if first else spread(row["difference"], 2, "+"),
                "1" if first else spread(row["speed"], 2),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def get_args(argv=None):
    """(our arguments, the flags of train_FKD)"""
    parser = Parser(prog="misc.bench.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--name", required=True, help="title of this entry of the table")
    parser.add_argument("--seeds", nargs="+", type=natural, default=[0, 1, 2], help="students by each way")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", default="output/benchmarks", help="folder of accuracy.json and accuracy.md")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, flags = get_args(argv)
    device, out, started = resolve_device(args.device), Path(args.out), time.perf_counter()
    if device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other would count as CPU-seconds
    rows = measure(args.seeds, flags, device)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "accuracy.json"
    entries = read_json(path) if path.exists() else {}
    words = ["--name", args.name, "--seeds", *map(str, args.seeds), *flags]
    entries[args.name] = {
        "command": f"python -m misc.bench.accuracy {shlex.join(words)}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "versions": library_versions(),
        "seconds": time.perf_counter() - started,
        "per": "seconds" if device.type == "cuda" else "CPU-seconds",
        "rows": rows,
    }
    write_json(path, entries)
    write_text(out / "accuracy.md", markdown(entries))
    print((out / "accuracy.md").read_text(encoding="utf-8"))
    return path


if __name__ == "__main__":
    main()
