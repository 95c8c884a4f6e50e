"""The experiment of validate/cifar10_small.sh: runs its rows, and makes the page of them.

    sh validate/cifar10_small.sh                           # which calls this
    python -m misc.small_results --results misc/results    # the page again, from its rows

A row is one student on one draw of images. Its result is added to OUT/log.jsonl as soon as it is
there; then RESULTS/cifar10_small.json gets all rows, and cifar10_small.md and .png are made of it.
"""

import importlib
import math
import re
import shlex
import time
from itertools import product
from pathlib import Path
from statistics import fmean, variance

import numpy as np

from misc import benchmark, figures
from scripts import files, output, runtime
from scripts.runtime import Parser, entry_point, number, refuse

# what tells two rows apart
KEYS = ("arm", "ipc", "draw", "student", "recipe", "epochs", "batch_size", "labels")
NAMES = {arm: figures.ARMS[arm][0] for arm in ("d4m", "random", "text", "noise", "decoded")}
NAMES["noise"] += " (noise)"
NAMES["text"] += ", guidance 8"
GAINS = {  # what may lift D4M, or other images
    "weighted": "D4M, --loss_weights cluster",
    "mode": "D4M, --guide mode",
    "keep_confident": "D4M, the most confident of 4 candidates",
    "keep_hard": "D4M, the least confident of 4 candidates",
    "gmm": "D4M, --kmeans gmm",
    "combined": "D4M, mixture + mode + most confident",
    "d4m_rd3": "D4M, recipe rd3",
    "random_rd3": "Random real, recipe rd3",
}
# what saves time or space, in no sentence
VARIANTS = GAINS | {"dpmpp": "D4M, DPM++ with 20 steps", "top_1": "D4M, --label_top_k 1 of 10"}
DRAWS = 8  # of the main rows; later draws choose settings, and count in no claim
# draws from this one on were run when the claims had been committed; when rd3's first had been seen
NEW, NEW_RD3 = 4, 5
BEST_TEXT = "text, its best guidance"  # of those that were tried on the later draws
# The primary claims: with soft labels at IPC 10, over DRAWS draws, D4M's images are worth more than
# those of the other arm.
CLAIMS = {
    "random": "Distilled images are worth more than as many random real ones",
    BEST_TEXT: "Prototypes help: more than text-to-image at its own best guidance (table 4)",
    "noise": "Prototypes help: more than the release's random initialisation (table 4)",
    "decoded": "Diffusion helps: more than the prototypes decoded without it (section 3)",
}
SMALL = 1.5  # points of top-1: a smaller effect may stay open


# ---- running


def key_of(row):
    return tuple(row[name] for name in KEYS)


def read_plan(path):
    """[(row, [(module, its flags)])]: the steps that lead to each row, its student last.

    path   of command lines as the launcher prints them with DRY_RUN=1: the stages that make an
           image folder, then its students, each with its row as variables in front
    """
    plan, stages, after_student = [], [], False
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        words = shlex.split(line)
        at = words.index("-m")
        step = words[at + 1], tuple(words[at + 2 :])
        found = dict(re.findall(r"^(\w+)=(\S+)$", "\n".join(words[:at]), re.MULTILINE))
        if found:
            row = {name: int(v) if v.isdigit() else v for name, v in found.items()}
            plan.append((row, [*stages, step]))
        else:
            stages = [step] if after_student else [*stages, step]
        after_student = bool(found)
    return plan


def result_of(folder):
    """What a row says beside its keys, from the folder of its one student."""
    found = files.read_json(Path(folder) / "results.json")
    made = output.read_manifest("--output_root", folder, "student")["files"]
    seeds = {name: found["arguments"][name] for name in ("seeds", "fkd_seed")}
    [weights] = (entry["sha256"] for name, entry in made.items() if name.endswith("tensors"))
    row = {"top1": found["summary"]["last"]["top1"]["mean"], "seeds": seeds}
    row |= {"images": found["images"]["name"], "weights_sha256": weights}
    return row | {"teacher_sha256": [teacher["sha256"] for teacher in found["teacher"]]}


def logged_rows(root):
    """The rows that were run below `root`; None: none."""
    rows = output.log_rows(root) if root else []
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if "arm" in row]


def run_step(module, flags):
    return importlib.import_module(module).main(list(flags))


def run_plan(plan, root, known, minutes):
    """Run the rows that are not `known`, each of their stages once, until the time is over.

    All in this process: to start Python and import PyTorch would take longer than a short student.
    """
    end, known, done = time.monotonic() + 60 * minutes, set(known), set()
    for row, (*stages, student) in plan:
        if key_of(row) in known:
            continue
        if time.monotonic() >= end:
            runtime.warn(f"--minutes {minutes:g}: over; the same command goes on")
            return
        for stage in stages:
            if stage not in done:
                run_step(*stage)
                done.add(stage)
        found = row | result_of(run_step(*student)) | {"commit": benchmark.commit() or ""}
        output.append_log(root, **found)
        known.add(key_of(row))
        print(*key_of(row), f"top-1 {found['top1']:.2f}", flush=True)


# ---- statistics over draws


def intervals(groups):
    """[(mean, half of its 95 % interval or None)] of groups of draws, by Student's t.

    Fewer than DRAWS draws share one variance with the other groups:
    s^2 = sum (n - 1) s_i^2 / sum (n - 1).
    """
    from scipy.stats import t

    def squares(group):
        return (len(group) - 1) * variance(group) if len(group) > 1 else 0.0

    found = []
    for group in groups:
        pool = [group] if len(group) >= DRAWS else groups
        free, half = sum(len(one) - 1 for one in pool), None
        if free:
            deviation = math.sqrt(sum(map(squares, pool)) / free)
            half = float(t.ppf(0.975, free)) * deviation / math.sqrt(len(group))
        found.append((fmean(group), half))
    return found


def holm(p_values):
    """Holm's step-down adjustment: the k-th smallest of m is multiplied by m - k + 1."""
    order, adjusted, least = sorted(range(len(p_values)), key=p_values.__getitem__), {}, 0.0
    for k, n in enumerate(order):
        least = max(least, min(1.0, (len(order) - k) * p_values[n]))
        adjusted[n] = least
    return [adjusted[n] for n in range(len(p_values))]


def differences(better, worse):
    """Draw by draw, of {draw: top1}: arms of one draw share its seeds, so they are paired."""
    return [better[draw] - worse[draw] for draw in sorted(better.keys() & worse.keys())]


def against(arms):
    """{arm: (mean of D4M minus it, half of its 95 % interval or None)} of {arm: {draw: top1}}.

    DRAWS draws: by their own differences. Fewer: arms of the same draws share the residual variance
    of randomised blocks, s^2 = sum r^2 / ((arms - 1) (draws - 1)); a difference has 2 s^2 / draws.
    """
    from scipy.stats import t

    ours, found = arms.get("d4m", {}), {}
    blocks = [list(draws.values()) for draws in arms.values() if draws.keys() == ours.keys()]
    for arm in arms.keys() - {"d4m"}:
        gap, half = differences(ours, arms[arm]), None
        if len(gap) >= DRAWS:
            [(_, half)] = intervals([gap])
        elif 1 < len(gap) == len(ours) == len(arms[arm]):
            x = np.array(blocks)
            residual = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
            free = (x.shape[0] - 1) * (x.shape[1] - 1)
            half = t.ppf(0.975, free) * math.sqrt(2 * (residual**2).sum() / free / len(gap))
        if gap:
            found[arm] = fmean(gap), half
    return found


def verdicts(pairs, new, worse):
    """One sentence's parts for each ({draw: top1} of ours, of the other): a paired t-test with
    Holm's correction over all of them; what is not complete counts as p = 1.

    new      the first draw to be given apart, too, or None, for each
    worse    the word for an effect the other way
    Returns [(word, details)]: seen, `worse`, not seen (the interval excludes gains of SMALL and
    more), open, or not finished.
    """
    from scipy.stats import ttest_1samp

    gaps = [differences(*pair) for pair in pairs]
    whole = [len(gap) >= DRAWS for gap in gaps]
    p_values = [float(ttest_1samp(gap, 0).pvalue) if w else 1.0 for gap, w in zip(gaps, whole)]
    found = []
    for (ours, other), gap, p, complete, first in zip(pairs, gaps, holm(p_values), whole, new):
        if not complete:
            found.append(("not finished", f"{len(gap)} of {DRAWS} draws"))
            continue
        [(mean, half)] = intervals([gap])
        both = sorted(ours.keys() & other.keys())
        means = [fmean(side[draw] for draw in both) for side in (ours, other)]
        word = "not seen" if mean + half < SMALL else "open"
        if p < 0.05:
            word = "seen" if mean > 0 else worse
        words = f"{means[0]:.1f} against {means[1]:.1f}, {gap_text(mean, half)}, p = {p:.2g}"
        if first:
            late = [ours[draw] - other[draw] for draw in both if draw >= first]
            words += f" (draws {first} to {DRAWS} alone {gap_text(*intervals([late])[0])})"
        found.append((word, words))
    return found


def gap_text(mean, half):
    return f"{mean:+.2f}" + (f" [{mean - half:+.2f}, {mean + half:+.2f}]" if half else "")


# ---- cells of the page


def cells(rows, later=False):
    """{(ipc, recipe, student, epochs, labels): {arm: {draw: top1}}} of the main or later draws."""
    found = {}
    for row in sorted(rows, key=lambda row: row["draw"]):
        if (row["draw"] > DRAWS) == later:
            key = tuple(row[k] for k in ("ipc", "recipe", "student", "epochs", "labels"))
            draws = found.setdefault(key, {}).setdefault(row["arm"], {})
            if row["draw"] in draws:
                refuse(f"--results: {key_of(row)} was run with another batch size, too")
            draws[row["draw"]] = row["top1"]
    return found


def main_cells(rows, network):
    """{(ipc, labels): {arm: {draw: top1}}} on the network, "arm_recipe" of other recipes than d4m;
    refuses two epochs."""
    found, trained = {}, {}
    for (ipc, recipe, student, epochs, labels), arms in cells(rows).items():
        if student == network:
            if trained.setdefault((ipc, recipe, labels), epochs) != epochs:
                refuse(f"--results: IPC {ipc} was run with several epochs, such as {epochs}")
            arms = {a if recipe == "d4m" else f"{a}_{recipe}": draws for a, draws in arms.items()}
            found.setdefault((ipc, labels), {}).update(arms)
    return found


def best_text(rows, network):
    """The text-to-image arm with the highest mean of soft labels on the later draws, or None."""
    texts = {}
    for (*where, _, labels), arms in cells(rows, later=True).items():
        if (*where, labels) == (10, "d4m", network, "soft"):
            texts |= {arm: draws for arm, draws in arms.items() if arm.startswith("text")}
    if len({tuple(draws) for draws in texts.values()}) > 1:  # some are not there yet
        return None
    return max(texts, key=lambda arm: fmean(texts[arm].values()), default=None)


def name_of(arm):
    return (NAMES | VARIANTS).get(arm, arm.replace("text_g", "Text-to-image, guidance "))


def ordered(arms):
    """D4M, what it is compared with, then what may lift it."""
    texts = sorted(arm for arm in arms if arm.startswith("text_g"))
    known = ["d4m", "random", "text", *texts, "noise", "decoded", "dpmpp", "top_1", *GAINS]
    return [arm for arm in known if arm in arms] + sorted(set(arms) - set(known))


def value_text(mean, half):
    return f"{mean:.1f}" + (f" ± {half:.1f}" if half else "")


# ---- the page


def table(head, lines):
    """Markdown, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def of_place(found, ipc, labels):
    return found.get((ipc, labels), {})


def main_table(found):
    """Means of recipe d4m on the main student: one row per arm, IPC by labels."""
    places = list(product(sorted({ipc for ipc, _ in found}), ("soft", "hard")))
    arms, texts = ordered({*NAMES, *(arm for place in found.values() for arm in place)}), {}
    for place in places:
        groups = of_place(found, *place)
        counts = {len(draws) for draws in groups.values()}
        pairs = zip(groups, intervals([list(draws.values()) for draws in groups.values()]))
        for arm, (mean, half) in pairs:
            few = f" (n = {len(groups[arm])})" if len(counts) > 1 else ""
            texts[arm, place] = value_text(mean, half) + few
    head = ["images"]
    for place in places:
        counts = {len(draws) for draws in of_place(found, *place).values()}
        one = f", n = {counts.pop()}" if len(counts) == 1 else ""
        head.append(f"IPC {place[0]}, {place[1]}{one}")
    lines = [[texts.get((arm, place), "") for place in places] for arm in arms]
    return table(head, [[name_of(arm), *line] for arm, line in zip(arms, lines)])


def pair_table(rows, later=False):
    """Every arm of the main or the later draws beside D4M, all else equal: one row for both kinds
    of labels."""
    lines, names = {}, ordered({row["arm"] for row in rows})
    for (*where, labels), arms in cells(rows, later).items():
        gaps = against(arms)
        for arm, draws in arms.items():
            line = lines.setdefault((*where, names.index(arm), arm), {})
            gap = gap_text(*gaps[arm]) if arm in gaps else ""
            line[labels] = [f"{fmean(draws.values()):.1f}", gap, str(len(draws))]
    body = []
    for (ipc, recipe, student, epochs, _, arm), line in sorted(lines.items()):
        soft, hard = (line.get(labels, [""] * 3) for labels in ("soft", "hard"))
        where = [str(ipc), student, f"{recipe}, {epochs} epochs"]
        draws = " / ".join(dict.fromkeys(filter(None, (soft[2], hard[2]))))
        body.append([name_of(arm), *where, soft[0], soft[1], hard[0], hard[1], draws])
    head = ["images", "IPC", "student", "recipe", "soft", "D4M minus it", "hard", "D4M minus it"]
    return table([*head, "draws"], body)


def sentences(rows, network):
    """([one sentence per claim], [one per gain and labels])"""
    found, best = main_cells(rows, network), best_text(rows, network)
    soft = of_place(found, 10, "soft")
    arms = [best if arm == BEST_TEXT else arm for arm in CLAIMS]
    pairs = [(soft.get("d4m", {}), soft.get(arm, {})) for arm in arms]
    judged = verdicts(pairs, [NEW] * len(pairs), "the opposite is seen")
    guidance = (best or "").partition("_g")[2] or 8
    words = [claim.replace("guidance", f"guidance, {guidance}") for claim in CLAIMS.values()]
    claims = [f"**{word}**: {claim}: {more}" for claim, (word, more) in zip(words, judged)]
    places = [
        (labels, arm) for labels in ("soft", "hard") for arm in ordered(of_place(found, 10, labels))
    ]
    places = [(labels, arm) for labels, arm in places if arm in GAINS]
    pairs, new = [], [NEW_RD3 if arm.endswith("_rd3") else None for _, arm in places]
    for labels, arm in places:
        plain = "random" if arm.startswith("random") else "d4m"
        pairs.append([of_place(found, 10, labels).get(one, {}) for one in (arm, plain)])
    gains = [
        f"**{word}**: {name_of(arm)}, {labels} labels: {more}"
        for (labels, arm), (word, more) in zip(places, verdicts(pairs, new, "costs"))
    ]
    return claims, gains


def markdown(about, rows):
    import jinja2

    network = about["teacher"]["arch"]
    text = Path(__file__).with_suffix(".md.j2").read_text("utf-8")
    claims, gains = sentences(rows, network)
    values = about | {"claims": claims, "gains": gains, "draws": DRAWS, "new": NEW, "small": SMALL}
    values["means"] = main_table(found := main_cells(rows, network))
    values["seen"] = sum(line.startswith("**seen**") for line in claims)
    for arm in ("d4m", "random"):
        values[arm] = fmean(of_place(found, 10, "soft").get(arm, {0: math.nan}).values())
    values |= {"pairs": pair_table(rows), "trial": pair_table(rows, later=True)}
    how = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return jinja2.Template(text, **how).render(values)


def plot(rows, network):
    """Figure: top-1 of every arm, its mean with the interval and its draws, by IPC and labels."""
    found, plt = main_cells(rows, network), figures.pyplot()
    places = sorted({ipc for ipc, _ in found}, key=lambda ipc: (ipc != 10, ipc))
    shown = [{*of_place(found, n, "soft"), *of_place(found, n, "hard")} for n in places]
    arms = [ordered(names - {"top_1"}) for names in shown]  # far from all others
    heights = [len(names) + 2 for names in arms]
    how = {"sharey": "row", "squeeze": False, "height_ratios": heights, "layout": "constrained"}
    size = (figures.PAGE, 0.24 * sum(heights) + 0.4)
    figure, panels = plt.subplots(len(places), 2, figsize=size, **how)
    for line, ipc, names in zip(panels, places, arms):
        for axes, labels in zip(line, ("soft", "hard")):
            groups = of_place(found, ipc, labels)
            values = dict(
                zip(groups, intervals([list(draws.values()) for draws in groups.values()]))
            )
            for y, arm in [(y, arm) for y, arm in enumerate(names) if arm in groups]:
                (mean, half), draws = values[arm], groups[arm].values()
                colour = "C0" if arm == "d4m" else "C1" if arm in VARIANTS else "C2"
                axes.scatter(draws, [y + 0.3] * len(draws), s=3, color="0.6")
                axes.errorbar(mean, y, xerr=half, fmt="o", color=colour, capsize=2, markersize=4)
                if arm == "d4m":
                    axes.axvline(mean, color=colour, linestyle=":", linewidth=0.8)
            axes.set_yticks(range(len(names)), map(name_of, names))
            axes.set_title(f"IPC {ipc}, {labels} labels")
            axes.grid(True, axis="x")
        line[0].invert_yaxis()
    for axes in panels[-1]:
        axes.set_xlabel("Top-1 accuracy (%)")
    return figure


# ---- main


def gather(root, model):
    """Where and with what the rows below `root` were run."""
    made = output.read_manifest("--model", model, "tiny_sd")
    keep = ("parameters", "steps", "reconstruction_psnr_db", "reconstruction_psnr_on")
    [path] = (root / "teachers").glob("*/results.json")
    found = files.read_json(path)
    return {
        "command": "sh validate/cifar10_small.sh",
        "machine": benchmark.machine(runtime.this_process().device),
        "versions": output.library_versions(),
        "model": {"name": Path(model).name, **{key: made[key] for key in keep}},
        "teacher": {
            "arch": found["arguments"]["arch"],
            "sha256": files.sha256(path.with_name("model.safetensors")),
            "images_per_class": found["arguments"]["max_images_per_class"],
            "top1": found["last"]["top1"],
        },
    }


def get_args(argv=None):
    parser = Parser("misc.small_results", __doc__)
    parser.flag("--plan", type=Path, help="commands of rows to run [none: only the page]")
    parser.flag("--minutes", type=number(float, 0), default=85, help="no row begins later")
    parser.flag("--output_root", type=Path, help="OUT of the launcher [none: rows of --results]")
    parser.flag("--model", default="misc/tiny-sd-cifar10", help="the generator's folder")
    parser.flag("--results", type=Path, required=True, help="where the page is written")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    args = get_args(argv)
    page, root = args.results / "cifar10_small.json", args.output_root
    known = files.read_json(page) if page.exists() else {"about": None, "rows": []}
    about, rows = known["about"], known["rows"]
    if args.plan:
        run_plan(read_plan(args.plan), root, map(key_of, rows + logged_rows(root)), args.minutes)
    if logged := logged_rows(root):
        about = gather(root, args.model)
    rows = {key_of(row): row for row in logged + rows}
    if not rows:
        refuse(f"--results {args.results}: holds no {page.name}, and no row was run")
    rows, network = [rows[key] for key in sorted(rows)], about["teacher"]["arch"]
    teachers = {digest for row in rows for digest in row["teacher_sha256"]}
    if teachers - {about["teacher"]["sha256"]}:
        refuse(f"--results {page}: some rows are of another teacher than {about['teacher']}")
    args.results.mkdir(parents=True, exist_ok=True)
    files.write(page, files.json_text({"about": about, "rows": rows}))
    plot(rows, network).savefig(page.with_suffix(".png"), dpi=150, metadata={"Software": None})
    text = markdown(about, rows)
    files.write(page.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
