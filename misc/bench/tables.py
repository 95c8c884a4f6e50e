"""The benchmark's result as markdown."""

COLUMNS = ("stage", "what", "release", "ours", "unit", "ratio", "TFLOP/s", "share", "outputs", "target")


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows, head=True):
    lines = []
    if head:
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        known = f" (known: {row['known']})" if row.get("known") else ""
        ratios = row["ratios"]
        spread = f" ({min(ratios):.3g} to {max(ratios):.3g}, n = {row['n']})" if len(ratios) > 1 else " (n = 1)"
        target = ""
        if row.get("target"):
            least = f", {row['least']} a {row['per']}" if row.get("least") else ""
            share = f", share {row['share_target']:.0%}" if row.get("share_target") else ""
            target = f"{row['target']}x{least}{share}: {'met' if row['met'] else 'NOT MET'}"
        cells = [
            row["stage"],
            row["what"] + (f"; {row['note']}" if row.get("note") else ""),
            number(row["release"]) + known,
            number(row["ours"]),
            f"{row['unit']} / {row['per']}",
            f"{row['ratio']:.3g}{spread}",
            f"{row['tflops']:.3g}" if row.get("tflops") else "",
            f"{row['share']:.0%} of {row['ceiling'].split('_')[0]}" if row.get("share") else "",
            row["same"],
            target,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def markdown(result):
    m, c = result["machine"], result["ceilings"]
    lines = [
        f"# The release's way and ours on {m.get('gpu') or m['cpu']}",
        "",
        f"`{result['command']}`, commit {result['commit']}, {result['date']}, {result['seconds']} s. "
        f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} torch threads"
        + (f", {m['gpu']}" if "gpu" in m else "")
        + f"; load before: {(result['load_before'] or ['unknown'])[0]}. "
        f"torch {result['versions'].get('torch')}, Pillow {result['versions'].get('pillow')}. "
        f"Inputs: {result['inputs']}.",
        "",
        "All measured, both sides in this run, in turns; rates and ratios are medians (least to most, n turns); one "
        "torch thread wherever CPU-seconds are counted.",
        "",
        table(result["rows"]),
        "",
        "Measured ceilings: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in c.items()) + ".",
        "",
        "Counted by PyTorch's FLOP counter, GFLOP a unit: "
        + ", ".join(f"{k} {v / 1e9:,.4g}" for k, v in result["flops"].items())
        + ".",
        "",
        "Peak memory of the benchmark's own process in each stage, both ways and their inputs in it, MiB: "
        + "; ".join(
            f"{k}: {', '.join(f'{n} {v}' for n, v in row.items())}" for k, row in result["peak_memory"].items()
        )
        + ".",
    ]
    differ = result["facts"].get("crop_bytes_that_differ")
    if differ:
        lines += [
            "",
            "Batched crops on the device against Pillow, 1,000 crops a size, bytes that differ: "
            + ", ".join(f"{k} px {v}" for k, v in differ.items())
            + ".",
        ]
    if result["facts"].get("left_out"):
        lines += ["", "Left out: " + "; ".join(result["facts"]["left_out"]) + "."]
    slow = [r for r in result["rows"] if r.get("known") and r["release"] < 0.7 * r["known"]]
    if slow:
        lines += [
            "",
            "More than 30 % below the known rate: "
            + "; ".join(
                f"{r['what']} ({r['known']}: decoding and resizing alone, on an idle core; here "
                "with the release's floats)"
                for r in slow
            )
            + ".",
        ]
    for row in result["rows"]:
        for name, costs in row.get("top_costs", {}).items():
            lines += ["", f"Top costs, stage {row['stage']}, {row['what']}, {name}:", ""]
            lines += [f"- {seconds:.3f} s `{what}`" for what, seconds in costs]
    return "\n".join(lines) + "\n"
