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

from misc import benchmark, figures
from scripts import files, output, runtime
from scripts.runtime import Parser, entry_point, number, refuse

# what tells two rows apart
KEYS = ("arm", "ipc", "draw", "student", "recipe", "epochs", "batch_size", "labels")
NAMES = {arm: figures.ARMS[arm][0] for arm in ("d4m", "random", "text", "noise", "decoded")}
NAMES["noise"] += " (noise)"
GAINS = {  # what may lift D4M
    "weighted": "D4M, --loss_weights cluster",
    "mode": "D4M, --guide mode",
    "keep_confident": "D4M, the most confident of 4 candidates",
    "keep_hard": "D4M, the least confident of 4 candidates",
    "gmm": "D4M, --kmeans gmm",
    "combined": "D4M, the mixture, mode guidance and the most confident of 4",
}
# what saves time or space, in no sentence
VARIANTS = GAINS | {"dpmpp": "D4M, DPM++ with 20 steps", "top_1": "D4M, --label_top_k 1 of 10"}
DRAWS = 8  # of the main rows; later draws choose settings, and count in no claim
BEST_TEXT = "text, its best guidance"  # of those that were tried on the later draws
# The primary claims, named before any of their rows was run: with soft labels at IPC 10, over DRAWS
# draws, D4M's images are worth more than those of the other arm.
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


def verdicts(pairs):
    """One sentence's parts for each ({draw: top1} of ours, of the other): a paired t-test with
    Holm's correction over all of them; what is not complete counts as p = 1.

    Returns [(word, details)]: seen, the opposite is seen, not seen (the interval excludes effects
    of SMALL and more), open, or not run.
    """
    from scipy.stats import ttest_1samp

    gaps = [differences(*pair) for pair in pairs]
    complete = [len(gap) >= DRAWS for gap in gaps]
    tested = zip(gaps, complete)
    adjusted = holm([float(ttest_1samp(gap, 0).pvalue) if all_ else 1.0 for gap, all_ in tested])
    found = []
    for (ours, other), gap, p, whole in zip(pairs, gaps, adjusted, complete):
        if len(gap) < 2:
            found.append(("not run", f"{len(gap)} of {DRAWS} draws"))
            continue
        [(mean, half)] = intervals([gap])
        both = sorted(ours.keys() & other.keys())
        means = [fmean(side[draw] for draw in both) for side in (ours, other)]
        words = f"{means[0]:.1f} against {means[1]:.1f}, {gap_text(mean, half)}"
        if not whole:
            found.append(("open", f"{words}, {len(gap)} of {DRAWS} draws"))
            continue
        word = "not seen" if mean + half < SMALL else "open"
        if p < 0.05:
            word = "seen" if mean > 0 else "the opposite is seen"
        found.append((word, f"{words}, p = {p:.2g}, {len(gap)} draws"))
    return found


def gap_text(mean, half):
    # z: no "-0.0"
    return f"{mean:+z.1f}" + (f" [{mean - half:+z.1f}, {mean + half:+z.1f}]" if half else "")


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
    """{(ipc, labels): {arm: {draw: top1}}} of recipe d4m on the network; refuses two epochs."""
    found = {}
    for (ipc, recipe, student, epochs, labels), arms in cells(rows).items():
        if (student, recipe) == (network, "d4m"):
            if (ipc, labels) in found:
                refuse(f"--results: IPC {ipc} was run with several epochs, such as {epochs}")
            found[ipc, labels] = arms
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
    known = [*NAMES, *sorted(arm for arm in arms if arm.startswith("text_g"))]
    return [arm for arm in known if arm in arms] + sorted(set(arms) - set(known))


def value_text(mean, half):
    return f"{mean:.1f}" + (f" ± {half:.1f}" if half else "")


# ---- the page

HEAD = """# What is D4M worth? CIFAR-10 and a small Stable Diffusion of our own

Stable Diffusion's weights know the world; these know the 50,000 training pictures of CIFAR-10 and
nothing else. So this measures the method, not the paper's numbers. **A draw** is one seed of
everything: the order in which k-means sees the pictures, the real pictures that are chosen, the
noise of synthesis, crops and CutMix, and the student's initial weights. Every number is a mean over
draws of top-1 in percent on the 10,000 test pictures, last epoch; arms are compared draw by draw.
"""
CLAIMED = """## What is seen

The four primary claims were named before any of these rows was run, after an earlier experiment on
one draw: soft labels, IPC 10, {network}, {draws} draws. A difference is in points, with its 95 %
interval; p is of a paired t-test, with Holm's correction over the four. Not seen: effects of
{small} points and more are excluded. Open: neither seen nor excluded.
"""
GAINED = """
What may lift D4M, against plain D4M, on the same terms, with a Holm correction of its own:
"""
DETAILS = """## Details

The pictures were re-encoded as JPEG before they came here: results are of "CIFAR-10, re-encoded".
Recipe d4m has the loss, temperature, crops and CutMix of D4M's ImageNet recipe at 32 px, in batches
of 25: its batch of 1024 would be one AdamW step per epoch. There are 1,200 steps at every IPC: 300
epochs at IPC 10, as the recipe, 1,200 at IPC 1 and 60 at IPC 50. Soft labels are made while the
student trains, with the numbers of stage 3. ± and [ ] are 95 % intervals by Student's t over draws,
for this generator and this teacher, which all draws share; fewer than {draws} draws share one
variance, pooled over the arms beside them as if they scattered alike.
"""
PAIRS = """
All rows, and D4M minus each arm, paired by draw. No verdict beyond the claims above: among so many
intervals some miss.
"""
TRIAL = """
Draws {first} and later chose settings, and count in nothing above. They show what fewer epochs than
the recipe's 300 change, and which guidance is best for text-to-image.
"""


def table(head, lines):
    """Markdown, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]


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
    lines = [[texts.get((arm, place), "not run") for place in places] for arm in arms]
    return table(head, [[name_of(arm), *line] for arm, line in zip(arms, lines)])


def pair_table(rows, later=False):
    """Every arm of the main or the later draws beside D4M, all else equal: one row for both kinds
    of labels."""
    lines = {}
    for (*where, labels), arms in sorted(cells(rows, later).items()):
        plain, names = arms.get("d4m", {}), ordered(arms)
        gaps = {arm: differences(plain, arms[arm]) for arm in names if arm != "d4m"}
        gaps = {arm: gap for arm, gap in gaps.items() if gap}
        texts = dict(zip(gaps, (gap_text(*pair) for pair in intervals(list(gaps.values())))))
        for arm in names:
            line = lines.setdefault((*where, names.index(arm), arm), {})
            mean = f"{fmean(arms[arm].values()):.1f}"
            line[labels] = [mean, texts.get(arm, ""), str(len(arms[arm]))]
    body = []
    for (ipc, recipe, student, epochs, _, arm), line in lines.items():
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
    ours = soft.get("d4m", {})
    arms = [best if arm == BEST_TEXT else arm for arm in CLAIMS]
    judged = verdicts([(ours, soft.get(arm, {})) for arm in arms])
    claims = []
    for arm, claim, (word, details) in zip(arms, CLAIMS.values(), judged):
        if claim == CLAIMS[BEST_TEXT] and arm:
            claim = claim.replace("guidance", f"guidance, {arm.partition('_g')[2] or 8}")
        claims.append(f"- **{word}**: {claim}: {details}")
    places = [(labels, arm) for labels in ("soft", "hard") for arm in of_place(found, 10, labels)]
    places = [(labels, arm) for labels, arm in places if arm in GAINS]
    sides = [(of_place(found, 10, labels), arm) for labels, arm in places]
    judged = verdicts([(arms[arm], arms.get("d4m", {})) for arms, arm in sides])
    gains = [
        f"- **{word}**: {name_of(arm)}, {labels} labels: {details}"
        for (labels, arm), (word, details) in zip(places, judged)
    ]
    return claims, gains


def describe(about):
    """Where and with what the rows were run."""
    model, teacher = about["model"], about["teacher"]
    machine, versions = about["machine"], about["versions"]
    counts, steps, where = model["parameters"], model["steps"], machine.get("gpu", machine["cpu"])
    psnr = f"{model['reconstruction_psnr_db']} dB PSNR on {model['reconstruction_psnr_on']}"
    generator = f"VAE {counts['vae']:,} parameters, {psnr}; UNet {counts['unet']:,} parameters"
    steps = f"{steps['vae']:,} + {steps['unet']:,} training steps"
    known = f"{teacher['images_per_class'] or 'all'} pictures per class"
    used = f"torch {versions['torch']}, diffusers {versions['diffusers']}"
    return [
        f"- generator {model['name']}: {generator}; {steps}",
        f"- teacher {teacher['arch']}, trained on {known}: {teacher['top1']:.1f}",
        f"- {where}; {used}; `{about['command']}`",
    ]


def markdown(about, rows):
    network = about["teacher"]["arch"]
    filled = {"draws": DRAWS, "small": SMALL, "first": DRAWS + 1, "network": network}
    claims, gains = sentences(rows, network)
    lines = [HEAD, CLAIMED.format(**filled), *claims]
    lines += [GAINED, *gains] if gains else []
    figure = "![top-1 by arm, IPC and labels, with 95 % intervals](cifar10_small.png)"
    lines += ["", figure, "", *main_table(main_cells(rows, network)), ""]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines += [DETAILS.format(**filled), *describe(about), f"- run at commit {commits}"]
    lines += [PAIRS, *pair_table(rows), TRIAL.format(**filled), *pair_table(rows, later=True)]
    return "\n".join(lines) + "\n"


def plot(rows, network):
    """Figure: top-1 of every arm, its mean with the interval and its draws, by labels and IPC."""
    found, plt = main_cells(rows, network), figures.pyplot()
    arms = ordered({arm for place in found.values() for arm in place})
    size = (figures.PAGE, 0.28 * len(arms) + 0.9)
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axes, labels in zip(panels, ("soft", "hard")):
        for n, ipc in enumerate(sorted({ipc for ipc, _ in found})):
            groups = of_place(found, ipc, labels)
            values = intervals([list(draws.values()) for draws in groups.values()])
            style = {"fmt": figures.MARKERS[n], "color": f"C{n}", "capsize": 2, "markersize": 4}
            for (arm, draws), (mean, half) in zip(groups.items(), values):
                y = arms.index(arm)
                axes.scatter(draws.values(), [y + 0.3] * len(draws), s=3, color="0.6")
                axes.errorbar(mean, y, xerr=half, **style, label=f"IPC {ipc}")
        axes.set_yticks(range(len(arms)), map(name_of, arms))
        axes.set(title=f"{labels} labels", xlabel="Top-1 accuracy (%)")
        axes.grid(True, axis="x")
    panels[0].invert_yaxis()
    drawn = dict(zip(*panels[0].get_legend_handles_labels()[::-1]))
    if len(drawn) > 1:
        panels[1].legend(drawn.values(), drawn.keys(), loc="best")
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
