"""How fast each stage is: the release's way of working and ours, in turns, on the same inputs, outputs compared.

    python -m misc.benchmark                             # all stages, on the GPU if there is one (at most 8 minutes)
    python -m misc.benchmark --device cpu --stage 3 4 --profile
    python -m misc.benchmark --memory                    # host memory of stage 2 at ImageNet's size, network stubbed
    python -m misc.benchmark --costs                     # time, disk and memory by IPC, from what was measured

The release's way is a small reference of ours at the settings of its launchers (misc/bench/). On a GPU both ways run
the Stable Diffusion 1.5 configuration with random weights (speed does not depend on them, nothing is downloaded),
ResNet-18 and, while the 8 minutes last, ResNet-101; on a CPU small networks. Rates are units a second on a GPU, and
units a CPU-second, child processes included, on a CPU. Writes OUT/NAME.json and OUT/NAME.md, anew after each stage.
Outputs that differ end it with status 1. What bf16 and its like do to accuracy: misc/bench/accuracy.py.
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.benchmark", file=sys.stderr)
    sys.exit(2)

import json
import os
import re
import sys
import time
from pathlib import Path

from matching.models import model_name
from scripts.files import read_json, write_json, write_text
from scripts.runtime import Parser, entry_point, resolve_device

STAGES = (1, 2, 3, 4)


def get_args(argv=None):
    parser = Parser(prog="misc.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--stage", nargs="+", type=int, choices=STAGES, default=STAGES)
    parser.add_argument(
        "--images", default=None, metavar="DIR", help="photographs [$D4M_TEST_DATA, else made from noise]"
    )
    parser.add_argument(
        "--arch", type=model_name, default=None, help="of stages 3-4 [resnet18 resnet101; on a CPU convnet_mini]"
    )
    parser.add_argument("--profile", action="store_true", help="name what each way spends its time in (one more turn)")
    parser.add_argument("--memory", action="store_true", help="only the host memory of stage 2, ImageNet at IPC 200")
    parser.add_argument("--costs", action="store_true", help="only the table of costs by IPC, from OUT/*.json")
    parser.add_argument("--quick", action="store_true", help="only see that all of it runs; the figures mean nothing")
    parser.add_argument("--out", default="output/benchmarks", help="folder of NAME.json and NAME.md")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    # here, because the release's workers import this file anew, and because diffusers takes seconds to import
    if args.costs:
        from misc.bench.costs import costs

        text = costs([read_json(path) for path in sorted(out.glob("*.json")) if path.name != "accuracy.json"])
        write_text(out / "costs.md", text)
        print(text)
        return out / "costs.md"
    if args.memory:
        return measure_memory(out, args.quick)
    import torch

    from misc.bench.run import SIZES, run
    from misc.bench.tables import markdown

    device, stages = resolve_device(args.device), sorted(set(args.stage))
    if device.type == "cpu":
        torch.set_num_threads(1)  # for the ceilings, too, of which its rows are shares
    name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()) if device.type == "cuda" else "cpu"
    name += "" if stages == list(STAGES) else "-stage" + "".join(map(str, stages))
    name += (f"-{args.arch.replace(':', '-')}" if args.arch else "") + "-profile" * args.profile

    def save(result):
        write_json(out / f"{name}.json", result)
        write_text(out / f"{name}.md", markdown(result))

    images = args.images or os.environ.get("D4M_TEST_DATA")
    size = SIZES["quick" if args.quick else device.type]
    result = run(device, size, stages, images, args.profile, args.arch, save)
    print(f"\n{out / name}.json, {out / name}.md: {result['seconds']} s")
    for what in result["differ"]:
        print(f"error: outputs differ: {what}", file=sys.stderr)
    if result["differ"]:
        sys.exit(1)
    return out / f"{name}.json"


def measure_memory(out, quick):
    """--memory: writes OUT/memory.json."""
    from misc.bench.measure import commit
    from misc.bench.memory import memory_in_child

    jobs = [(3, 4, "safetensors")] if quick else [(1000, 200, "safetensors"), (3, 200, "json")]
    found = [memory_in_child(None, *job) for job in jobs]
    write_json(out / "memory.json", {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "memory": found})
    print(json.dumps(found, indent=1))
    return out / "memory.json"


if __name__ == "__main__":
    main()
