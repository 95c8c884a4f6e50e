"""The paper's figures from our outputs: one subcommand each, a PNG and a PDF.

    python -m misc.figures grid    --images output/images/A output/images/B --names D4M Random --output
                                   output/figures/figure4
    python -m misc.figures row     --images output/images/A output/images/B --class_folder n01440764
    python -m misc.figures ipc     --output_root output --dataset imagenet
    python -m misc.figures tsne    --images output/images/A --data_dir data/imagenet --arch resnet18 --classes 0-9
    python -m misc.figures time    --output_root output --dataset imagenet
    python -m misc.figures latents --latent_cache output/latents --prototype_path output/prototypes/NAME --classes
    0-5

grid is figure 4 (methods as rows, classes as columns), row figure 5 (one class), ipc figure 6 (accuracy over images a
class), tsne figure 7 (features of real and synthetic images), time figure 8 (accuracy against the time of
distillation).
"""

if __name__ == "__main__" and not __package__:  # run by path, our packages would not be found
    import sys

    print("error: run it from the repository root: python -m misc.figures", file=sys.stderr)
    sys.exit(2)

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from distillation.datasets import DATASETS, class_positions, dataset_name, known_prompts, open_split, squash
from distillation.prototypes import open_prototypes, prototype_folder_name
from matching.models import load_teacher, model_name
from matching.soft_labels import load_pixels, normalise, open_images
from matching.training import centre_crop
from scripts.checkpoints import DEFAULT_CHECKPOINT
from scripts.files import ARGS, MANIFEST, TIMING, read_json
from scripts.runtime import Parser, positive_int, refuse, resolve_device
from validate.paper_tables import CLASSES, DATASET_TITLES, MODEL_TITLES, find_results, images_name, paper_rows

# Okabe and Ito's palette: told apart also by colour-blind readers and in grey print
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
STYLE = {
    "font.family": "serif",
    "font.serif": ["DejaVu Serif"],
    "mathtext.fontset": "dejavuserif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.03,
    "pdf.fonttype": 42,
}
COLUMN, PAGE = 3.4, 7.0  # inches: one column and the page of a two-column paper


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def save(figure, output):
    """`output`.png (300 dpi) and `output`.pdf, without dates, so that equal figures are equal files."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = [output.with_name(output.name + suffix) for suffix in (".png", ".pdf")]
    figure.savefig(paths[0], dpi=300, metadata={"Software": None})
    figure.savefig(paths[1], metadata={"CreationDate": None, "Creator": None, "Producer": None})
    _pyplot().close(figure)
    print(" ".join(map(str, paths)))
    return paths


def short(prompt, length=20):
    """The first synonym of a prompt, cut at a word: 'tench, Tinca tinca' -> 'tench'."""
    name = prompt.split(",")[0].strip()
    if len(name) <= length:
        return name
    return name[:length].rsplit(" ", 1)[0] + "…"


# ---- figures 4 and 5: grids of images


def open_sets(paths, names):
    """[(name, ImageSet)] of the methods to compare; the arm's name where none is given."""
    sets = [open_images("--images", path) for path in paths]
    if names and len(names) != len(sets):
        refuse(f"--names: {len(names)} names for {len(sets)} image folders")
    return list(zip(names or [ARM_METHODS.get(s.arm, s.name) for s in sets], sets))


def read_image(images, folder, i, flag="--images"):
    """Image i of a class folder as PIL RGB."""
    if folder not in images.folders:
        refuse(f"{flag} {images.root}: has no class {folder}")
    position = images.folders.index(folder)
    files = [images.files[n] for n in (images.targets == position).nonzero().flatten().tolist()]
    if i >= len(files):
        refuse(f"{flag} {images.root}: class {folder} has {len(files)} images, image {i} is asked for")
    with Image.open(images.root / files[i]) as image:
        return image.convert("RGB")


def choose_classes(words, folders, count):
    """Class folders by name, index or range, in the order of `words`; by default `count` spread evenly over all."""
    if not words:
        picks = np.linspace(0, len(folders) - 1, min(count, len(folders))).round().astype(int)
        return [folders[n] for n in picks]
    return [folders[n] for word in words for n in class_positions([word], folders)]


def titles_of(images, folders):
    """A readable name for each class folder: from the images' manifest, else from the known prompts."""
    prompts = known_prompts(images.dataset)
    manifest = images.root / "manifest.json"
    if manifest.is_file():
        prompts = {**prompts, **{c["folder"]: c.get("prompt", c["folder"]) for c in read_json(manifest)["classes"]}}
    return [short(prompts.get(folder, folder)) for folder in folders]


def draw_grid(rows, names, titles):
    """rows: lists of PIL images, one row a method; titles: one a column.   -> figure"""
    plt = _pyplot()
    columns = len(rows[0])
    label, side = 0.22, (PAGE - 0.22) / columns  # inches
    title = 0.2
    height = title + side * len(rows)
    figure = plt.figure(figsize=(PAGE, height), dpi=100)
    gap, heads, names_drawn = 0.03, [], []
    for r, (row, name) in enumerate(zip(rows, names)):
        for c, image in enumerate(row):
            box = (label + c * side) / PAGE, (height - title - (r + 1) * side + gap / 2) / height
            axes = figure.add_axes((*box, (side - gap) / PAGE, (side - gap) / height))
            # small images are shown as they are, pixel by pixel
            axes.imshow(image, interpolation="nearest" if image.width <= 64 else "lanczos", aspect="auto")
            axes.set_axis_off()
            if r == 0:
                heads.append(axes.set_title(titles[c], fontsize=8, pad=3))
        middle = (height - title - (r + 0.5) * side) / height
        names_drawn.append(
            figure.text(label / 2 / PAGE, middle, name, rotation=90, ha="center", va="center", fontsize=9)
        )
    fit_text(names_drawn, side - 0.05, 9, tall=True)
    fit_text(heads, side - 0.05, 8)
    return figure


def fit_text(texts, room, largest, tall=False):
    """Give all texts one size, the largest at which none is longer than `room` inches."""
    boxes = [text.get_window_extent() for text in texts]
    longest = max([(box.height if tall else box.width) for box in boxes], default=0) / 100
    for text in texts if longest else []:
        text.set_fontsize(max(4.5, min(largest, largest * room / longest)))


def grid(args):
    sets = open_sets(args.images, args.names)
    folders = choose_classes(args.classes, sets[0][1].folders, args.count)
    rows = [[read_image(images, folder, args.image) for folder in folders] for _, images in sets]
    return draw_grid(rows, [name for name, _ in sets], titles_of(sets[0][1], folders))


def row(args):
    sets = open_sets(args.images, args.names)
    folder = choose_classes([args.class_folder] if args.class_folder else [], sets[0][1].folders, 1)[0]
    available = min(
        int((images.targets == images.folders.index(folder)).sum()) for _, images in sets if folder in images.folders
    )
    rows = [[read_image(images, folder, i) for i in range(min(args.count, available))] for _, images in sets]
    title = titles_of(sets[0][1], [folder])  # above the first image
    return draw_grid(rows, [name for name, _ in sets], title + [""] * (len(rows[0]) - 1))


# ---- figures 6 and 8: curves


class Curve(NamedTuple):
    """What the points of one measured curve share.

    recipe, variant    name of the recipe; generator and images. "" where they are the paper's
    """

    arm: str
    labels: str
    teacher: str
    student: str
    recipe: str
    variant: str


def curve_of(result):
    paper, name = images_name(result["dataset"], result["ipc"], result["arm"]), result["images"]
    odd = [result["generator"]] if result["generator"] not in (None, DEFAULT_CHECKPOINT) else []
    shorter = name.removeprefix(paper).removeprefix("_")  # _size64 of images that are the paper's otherwise
    odd += [re.sub(rf"^{result['dataset']}_ipc\d+_", "", shorter)] if name != paper else []
    recipe = "" if result["recipe"] in ("d4m", "d4m-cifar") else result["recipe"] or "own recipe"
    teacher = "+".join(result["teacher"] or ["none"])
    return Curve(result["arm"], result["labels"], teacher, result["student"], recipe, ", ".join(odd))


ARM_METHODS = {
    "d4m": "D4M", "d4m-g": "D4M-G", "random": "Random real", "noise": "w/o prototypes", "text": "Text-to-image",
    "stm": "D4M w/ STM", "decoded": "Decoded prototypes",
}  # fmt: skip


def network_title(teacher, student):
    """'ResNet-18', or 'ResNet-18→ResNet-50' where teacher and student differ."""
    name = MODEL_TITLES.get(student, student)
    if teacher in ("none", "", student):
        return name
    return "+".join(MODEL_TITLES.get(t, t) for t in teacher.split("+")) + "→" + name


def curve_title(curve):
    hard = "hard labels" if curve.labels == "hard" else ""
    words = [network_title(curve.teacher, curve.student), hard, curve.recipe, curve.variant]
    return f"{ARM_METHODS.get(curve.arm, curve.arm)} ({', '.join(filter(None, words))})"


def paper_curves(dataset, methods):
    """{(method, teacher, student): [(ipc, top1)]} of table 2 (table 1 for CIFAR)."""
    curves = {}
    for row in paper_rows():
        if row["table"] in ("Table 1", "Table 2") and row["dataset"] == DATASET_TITLES.get(dataset) and "ipc" in row:
            if row["method"] in methods and "student" in row:
                teacher = row.get("teacher", row["student"]).split(" (")[0]  # a note may follow
                key = row["method"], teacher, row["student"]
                curves.setdefault(key, []).append((row["ipc"], row["top1"]))
    return {key: sorted(points) for key, points in curves.items()}


def measured_curves(root, dataset, arms, x_of):
    """{Curve: [(x, mean, std or 0)]} of the results.json below `root`; of several at one IPC that over most seeds."""
    if not Path(root).is_dir():
        refuse(f"--output_root {root}: no such folder")
    best = {}
    for result in find_results(root):
        if result["dataset"] == dataset and result["arm"] in arms and result["ipc"]:
            key = curve_of(result), result["ipc"]
            if key not in best or result["last"]["n"] > best[key]["last"]["n"]:
                best[key] = result
    curves = {}
    for (curve, _), result in best.items():
        x = x_of(result)
        if x is not None:
            curves.setdefault(curve, []).append((x, result["last"]["mean"], result["last"]["std"] or 0.0))
    return {curve: sorted(curves[curve]) for curve in sorted(curves, key=str)}


def draw_curves(axes, measured, paper):
    """Colour says the networks (the method, if all have one network), marker the method; dashed: the paper's.

    measured    {Curve: [(x, mean, std)]};   paper    {(method, teacher, student): [(x, top1)]}
    """
    networks = [(c.student if c.teacher == "none" else c.teacher, c.student) for c in measured]
    networks += [(_model(t), _model(s)) for _, t, s in paper]
    methods = [(ARM_METHODS.get(c.arm, c.arm), c.labels, c.recipe, c.variant) for c in measured]
    methods += [(m, "soft", "", "") for m, _, _ in paper]
    coloured = networks if len(set(networks)) > 1 else methods
    order = sorted(set(networks), key=_by_size) if coloured is networks else list(dict.fromkeys(methods))
    colours = {what: COLOURS[n % len(COLOURS)] for n, what in enumerate(order)}
    markers = {method: MARKERS[n % len(MARKERS)] for n, method in enumerate(dict.fromkeys(methods))}
    styles = [{"color": colours[what], "marker": markers[m]} for what, m in zip(coloured, methods)]
    drawn = []
    for (curve, points), style in _as_they_end(measured, styles):
        x, y, error = zip(*points)
        drawn.append(axes.errorbar(x, y, error, capsize=2, elinewidth=0.8, label=curve_title(curve), **style))
    for ((method, teacher, student), points), style in _as_they_end(paper, styles[len(measured) :]):
        label = f"{method} ({network_title(_model(teacher), _model(student))}), paper"
        dashed = {"linestyle": (0, (4, 2)), "linewidth": 1.1, "markerfacecolor": "white", "zorder": 1}
        drawn += axes.plot(*zip(*points), label=label, **dashed, **style)
    axes.legend(handles=drawn, loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=2.2, labelspacing=0.35)


def _as_they_end(curves, styles):
    """((key, points), style) of each curve, the one that ends highest first: the legend reads as the lines do."""
    return sorted(zip(curves.items(), styles), key=lambda entry: -entry[0][1][-1][1])


def _model(title):
    """'ResNet-18' -> 'resnet18'; unknown names stay."""
    return next((name for name, known in MODEL_TITLES.items() if known == title), title)


def _by_size(networks):
    """Sorts ResNet-18 before ResNet-101."""
    return [(len(name), name) for name in networks[::-1]]


def finish_axes(axes, xlabel, xs):
    axes.set_xlabel(xlabel)
    axes.set_ylabel("Top-1 accuracy (%)")
    axes.set_xscale("log")
    if xs:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def ipc(args):
    plt = _pyplot()
    measured = measured_curves(args.output_root, args.dataset, args.arms, lambda result: result["ipc"])
    paper = paper_curves(args.dataset, args.paper)
    if not measured and not paper:
        refuse(f"--output_root {args.output_root}: no results.json of {args.dataset}, and the paper has no such curve")
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    draw_curves(axes, measured, paper)
    xs = sorted({point[0] for points in [*measured.values(), *paper.values()] for point in points})
    finish_axes(axes, "Images per class", xs)
    return figure


def distillation_seconds(result):
    """Process-seconds of all that made the images of a result, from timing.json; None where a part is not known."""
    root = Path(result["path"]).parent.parent.parent
    return _seconds(root, root / "images" / result["images"]) or None


def _seconds(root, folder):
    """Stages 1 and 2, and STM, of an image folder. D4M-G: the share of the larger set's time that its images have."""
    if not ((folder / TIMING).is_file() and (folder / ARGS).is_file()):
        return None
    own, made = _spent(folder / TIMING), read_json(folder / ARGS)
    if own is None:
        return None
    if "source" in made:
        source = next((p.parent for p in (root / "images").glob(f"*/{ARGS}") if _is_source(p, made)), None)
        before = source and _seconds(root, source)
        if before is None:
            return None
        return own + before * read_json(folder / MANIFEST)["count"] / read_json(source / MANIFEST)["count"]
    if made["arm"] not in ("d4m", "decoded") or (made["prototype_arguments"] and made["prototypes"] is None):
        return own  # no prototypes, or made in the same process
    if made["prototype_arguments"] is None:  # somebody's prototypes
        return None
    timing = root / "prototypes" / prototype_folder_name(made["prototype_arguments"]) / TIMING
    before = _spent(timing) if timing.is_file() else None
    return None if before is None else own + before


def _spent(timing):
    """Process-seconds of a timing.json, with those of latents that a cache held; None where nobody knows these."""
    found = read_json(timing)
    cached = found.get("cached_seconds", 0.0)
    return None if cached is None else found["process_seconds"] + cached


def _is_source(path, made):
    return path.with_name(MANIFEST).is_file() and read_json(path) == made["source_arguments"]


def paper_times(dataset, methods):
    """{(method, teacher, student): [(hours, top1)]}: table 6's seconds an image times the cell's images."""
    seconds = {
        row["method"]: row["sec_per_image"]
        for row in paper_rows()
        if row["table"] == "Table 6" and row["dataset"] == DATASET_TITLES.get(dataset)
    }
    return {
        key: [(ipc * CLASSES[dataset] * seconds[key[0]] / 3600, top1) for ipc, top1 in points]
        for key, points in paper_curves(dataset, methods).items()
        if key[0] in seconds
    }


def time(args):
    plt = _pyplot()
    hours = lambda result: (s := distillation_seconds(result)) and s / 3600  # noqa: E731
    measured = measured_curves(args.output_root, args.dataset, args.arms, hours)
    paper = paper_times(args.dataset, args.paper)
    if not measured and not paper:
        refuse(f"--output_root {args.output_root}: no results.json of {args.dataset} whose images have a timing.json")
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    draw_curves(axes, measured, paper)
    finish_axes(axes, "Process-hours of distillation (paper: V100)", None)
    return figure


# ---- figure 7: t-SNE


@torch.no_grad()
def features(model, pixels, mean, std, device, rows=64):
    """The input of the last linear layer: (N, S, S, 3) uint8 -> (N, d) float32 numpy array."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    found = []
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().cpu()))
    try:
        for part in pixels.split(rows):
            model(normalise(part.to(device), mean, std))
    finally:
        hook.remove()
    return torch.cat(found).numpy()


def stack_square(pictures, size):
    """PIL images -> (N, size, size, 3) uint8."""
    whole = [p if p.size == (size, size) else squash(p, size) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(p) for p in whole]))


def embed(rows, seed):
    """t-SNE of (N, d) features after PCA to at most 50 dimensions, as its authors advise.   -> (N, 2)"""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = PCA(min(50, *rows.shape), random_state=seed).fit_transform(rows)
    perplexity = min(30, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def tsne(args):
    plt = _pyplot()
    sets = open_sets(args.images, args.names)
    images, device = sets[0][1], resolve_device(args.device)
    chosen = args.classes or choose_classes(None, images.folders, 10)  # a thousand are no picture
    split = open_split(images.dataset, args.data_dir, args.split, classes=chosen, max_per_class=args.real_per_class)
    size = images.image_size or DATASETS[images.dataset].image_size
    facts, folders = DATASETS[images.dataset], list(split.folders)
    # the whole head, so that a checkpoint of all classes fits; features do not depend on the columns
    model, _ = load_teacher(args.arch, args.teacher_checkpoint, images.dataset, list(images.folders), size)
    model.to(device)
    crop = squash if facts.image_size <= 64 else centre_crop
    real = stack_square([crop(split.read(item), size) for items in split.items for item in items], size)
    groups, where = [features(model, real, facts.mean, facts.std, device)], [0]
    classes = [np.repeat(np.arange(len(folders)), [len(items) for items in split.items])]
    for name, other in sets:
        missing = [f for f in folders if f not in other.folders]
        if missing:
            refuse(f"--images {other.root}: has no class {missing[0]} (for {name})")
        keep = [n for n, c in enumerate(other.targets.tolist()) if other.folders[c] in folders]
        arrays, _ = load_pixels("--images", other._replace(files=[other.files[n] for n in keep]))
        pixels = stack_square([Image.fromarray(array) for array in arrays], size)
        groups.append(features(model, pixels, facts.mean, facts.std, device))
        classes.append(np.array([folders.index(other.folders[other.targets[n]]) for n in keep]))
        where.append(len(groups) - 1)
    # one embedding for all panels, so that they can be compared
    points = np.split(embed(np.concatenate(groups), args.seed), np.cumsum([len(g) for g in groups])[:-1])
    figure, panels = plt.subplots(1, len(sets), figsize=(min(PAGE, 2.7 * len(sets)), 2.7), squeeze=False)
    titles = [short(p) for p in split.prompts]
    for axes, (name, _), own, own_classes in zip(panels[0], sets, points[1:], classes[1:]):
        scatter_classes(axes, points[0], classes[0], own, own_classes, len(folders))
        axes.set_title(name)
    figure.subplots_adjust(wspace=0.06)
    legend_of_classes(panels[0][-1], titles, "real test image" if args.split == "val" else "real training image")
    return figure


def class_colours(count):
    import matplotlib

    if count <= 8:
        return COLOURS[:count]
    palette = [*matplotlib.colormaps["tab10" if count <= 10 else "tab20"].colors]
    palette[7 if count <= 10 else 14] = matplotlib_rgb("darkslategray")  # the legend uses grey for all classes
    return [palette[n % len(palette)] for n in range(count)]


def scatter_classes(axes, real, real_classes, own, own_classes, count):
    """Real samples as small pale dots, the others as edged stars, one colour a class; no axes: t-SNE has no units."""
    colours = np.array([matplotlib_rgb(c) for c in class_colours(count)])
    axes.scatter(*real.T, s=7, c=colours[real_classes], alpha=0.35, linewidths=0, rasterized=True)
    axes.scatter(*own.T, s=46, c=colours[own_classes], marker="*", edgecolors="black", linewidths=0.5, zorder=3)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#888888")


def matplotlib_rgb(colour):
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def legend_of_classes(axes, titles, real):
    from matplotlib.lines import Line2D

    dots = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colour, label=title)
        for colour, title in zip(class_colours(len(titles)), titles)
    ]
    kinds = [
        Line2D([], [], marker="o", linestyle="", markersize=3, color="#888888", alpha=0.6, label=real),
        Line2D(
            [],
            [],
            marker="*",
            linestyle="",
            markersize=8,
            color="#888888",
            markeredgecolor="black",
            label="image of the set",
        ),
    ]
    axes.legend(
        handles=kinds + dots, loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0, handletextpad=0.3
    )


# ---- latents and their prototypes


def latents(args):
    plt = _pyplot()
    source = open_prototypes(args.prototype_path, args.dataset or _dataset_of(args.prototype_path))
    folders = [c["folder"] for c in source.classes]
    positions = [folders.index(f) for f in choose_classes(args.classes, folders, args.count)]
    columns = min(3, len(positions))
    rows = -(-len(positions) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.2 * rows), squeeze=False)
    for axes in panels.flat[len(positions) :]:
        axes.set_axis_off()
    for axes, position in zip(panels.flat, positions):
        own = source.classes[position]
        draw_latents(axes, cached_latents(args.latent_cache, own), source[position].latents, short(own["prompt"]))
    figure.tight_layout(pad=0.6)
    return figure


def _dataset_of(path):
    manifest = Path(path) / "manifest.json"
    if not manifest.is_file():
        refuse(f"--prototype_path {path}: no manifest.json in it; a single file also needs --dataset")
    return read_json(manifest)["dataset"]


def cached_latents(root, own):
    """(N, 4, h, w) of one class from a latent cache: its folder, or the folder above that stage 1 was given."""
    from safetensors.numpy import load_file

    name = f"{own['index']:04d}_{own['folder']}.safetensors"
    found = sorted(p for p in {Path(root) / name, *Path(root).glob(f"*/{name}")} if p.is_file())
    if len(found) != 1:
        hint = "run stage 1 with --latent_cache" if not found else f"name one of them, such as {found[0].parent}"
        refuse(f"--latent_cache {root}: {len(found)} files {name}; {hint}")
    return load_file(found[0])["latents"]


def draw_latents(axes, rows, prototypes, title):
    """A class's latents on their first two principal components, in the colour of the nearest prototype (a star)."""
    from sklearn.decomposition import PCA

    rows = rows.reshape(len(rows), -1).astype(np.float64)
    centres = prototypes.reshape(len(prototypes), -1).astype(np.float64)
    distance = (centres**2).sum(1) - 2 * rows @ centres.T  # (N, k), up to |row|^2
    nearest = distance.argmin(1)
    pca = PCA(2, random_state=0).fit(rows)
    points, stars = pca.transform(rows), pca.transform(centres)
    colours = np.array([matplotlib_rgb(c) for c in class_colours(len(centres))])
    for point, n in zip(points, nearest):
        axes.plot(*zip(point, stars[n]), color=colours[n], linewidth=0.3, alpha=0.35, zorder=1)
    axes.scatter(*points.T, s=7, c=colours[nearest], alpha=0.55, linewidths=0, zorder=2)
    axes.scatter(*stars.T, s=75, c=colours, marker="*", edgecolors="black", linewidths=0.6, zorder=3)
    explained = 100 * pca.explained_variance_ratio_
    axes.set_title(title)
    axes.set_xlabel(f"PC 1 ({explained[0]:.0f} %)", labelpad=2)
    axes.set_ylabel(f"PC 2 ({explained[1]:.0f} %)", labelpad=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


# ---- main

FIGURES = {"grid": grid, "row": row, "ipc": ipc, "tsne": tsne, "time": time, "latents": latents}
DEFAULT_OUTPUT = {
    "grid": "figure4", "row": "figure5", "ipc": "figure6", "tsne": "figure7", "time": "figure8", "latents": "latents",
}  # fmt: skip


def get_args(argv=None):
    parser = Parser(prog="misc.figures", description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="figure", required=True, parser_class=Parser)

    def kind(name, help):
        sub = kinds.add_parser(name, help=help, description=help)
        sub.add_argument(
            "--output",
            default=f"output/figures/{DEFAULT_OUTPUT[name]}",
            help="path without suffix; makes .png and .pdf",
        )
        return sub

    def image_flags(sub):
        sub.add_argument("--images", nargs="+", required=True, metavar="DIR", help="image folders, one a method")
        sub.add_argument("--names", nargs="+", default=None, help="what to call them")

    sub = kind("grid", "methods as rows, classes as columns (figure 4)")
    image_flags(sub)
    sub.add_argument("--classes", nargs="+", default=None, help="class folders, indices, or ranges such as 0-9")
    sub.add_argument(
        "--count", type=positive_int, default=10, help="classes, spread evenly, if --classes is not given"
    )
    sub.add_argument("--image", type=int, default=0, help="which image of each class")

    sub = kind("row", "one class, methods as rows, images as columns (figure 5)")
    image_flags(sub)
    sub.add_argument("--class_folder", default=None, help="folder or index of the class [the first]")
    sub.add_argument("--count", type=positive_int, default=10, help="images")

    for name, help in (
        ("ipc", "accuracy over images a class (figure 6)"),
        ("time", "accuracy against the time of distillation (figure 8)"),
    ):
        sub = kind(name, help)
        sub.add_argument("--output_root", default="output", help="results.json files are looked for below it")
        sub.add_argument("--dataset", type=dataset_name, default="imagenet")
        sub.add_argument("--arms", nargs="+", default=["d4m", "random"], help="image arms that are drawn")
        sub.add_argument("--paper", nargs="*", default=["D4M", "SRe2L"], help="methods drawn from the paper's tables")

    sub = kind("tsne", "t-SNE of features of real and synthetic images (figure 7)")
    image_flags(sub)
    sub.add_argument("--data_dir", default=None, help="the real data set's root (not for digits)")
    sub.add_argument("--split", choices=["train", "val"], default="val", help="real images of this split")
    sub.add_argument(
        "--classes", nargs="+", default=None, help="folders, indices, or ranges such as 0-9 [ten, spread evenly]"
    )
    sub.add_argument("--real_per_class", type=positive_int, default=50)
    sub.add_argument("--arch", type=model_name, default="resnet18", help="whose features")
    sub.add_argument("--teacher_checkpoint", default=None, help="its weights [torchvision's]")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="auto")

    sub = kind("latents", "a class's latents with their prototypes")
    sub.add_argument("--latent_cache", required=True, metavar="DIR", help="as stage 1 wrote it")
    sub.add_argument("--prototype_path", required=True, help="a folder of stage 1")
    sub.add_argument("--dataset", type=dataset_name, default=None)
    sub.add_argument("--classes", nargs="+", default=None, help="class folders, indices, or ranges such as 0-5")
    sub.add_argument("--count", type=positive_int, default=6, help="classes, if --classes is not given")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    return save(FIGURES[args.figure](args), args.output)


if __name__ == "__main__":
    main()
