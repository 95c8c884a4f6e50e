"""The paper's figures 4 to 8 from our outputs: one subcommand each, a PNG and a PDF.

python -m misc.figures grid --images output/images/A output/images/B --names D4M Random
python -m misc.figures ipc --output_root output --dataset imagenet
python -m misc.figures tsne --images output/images/A --data_dir data/imagenet --classes 0-9
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from distillation import datasets, prototype_files
from matching import batches, evaluation, models
from matching.images import open_images
from scripts import files, generators, output, runtime
from scripts.runtime import Parser, entry_point, number, refuse
from validate import paper_tables

ARMS = {  # arm: (its name in figures, what a report calls its images)
    "d4m": ("D4M", "D4M"),
    "random": ("Random real", "random real images"),
    "decoded": ("Decoded prototypes", "decoded prototypes, no diffusion"),
    "text": ("Text-to-image", "text-to-image, no prototypes"),
    "noise": ("w/o prototypes", "denoised noise, no prototypes (release's random initialisation)"),
    "stm": ("D4M w/ STM", "D4M, optimised further (STM)"),
    "d4m-g": ("D4M-G", "D4M of a larger data set (D4M-G)"),
}
PAPER_IMAGES = "s0.7_g8_kmexpand1"  # in the name of the paper's images
MARKERS = "os^DvPX*"
STYLE = {"font.family": "serif", "figure.dpi": 100, "savefig.bbox": "tight", "pdf.fonttype": 42}
STYLE |= {"lines.linewidth": 1.4, "lines.markeredgewidth": 1, "grid.linewidth": 0.3}
STYLE |= {"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False}
COLUMN, PAGE = 3.4, 7.0  # inches: one column and the page of a two-column paper


def pyplot():
    """matplotlib.pyplot in our style, without a screen."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # told apart also by colour-blind readers and in grey print
    plt.style.use(["seaborn-v0_8-paper", "seaborn-v0_8-colorblind", STYLE])
    return plt


def short(prompt, length=20):
    """The first synonym of a prompt, cut at a word: 'tench, Tinca tinca' -> 'tench'."""
    name = prompt.split(",")[0].strip()
    return name if len(name) <= length else name[:length].rsplit(" ", 1)[0] + "…"


# ---- figures 4 and 5: grids of images


def open_sets(folders, names, dataset=None):
    """The methods to compare: (ImageSets, names); the arm's name where none is given."""
    sets = [open_images("--images", folder, dataset) for folder in folders]
    names = names or [ARMS.get(s.arm, (s.name,))[0] for s in sets]
    if len(names) != len(sets):
        refuse(f"--names: {len(names)} names for {len(sets)} image folders")
    return sets, names


def files_of(found, folder):
    """The paths of one class of an ImageSet, in order."""
    if folder not in found.folders:
        refuse(f"--images {found.root}: has no class {folder}")
    mine = (found.targets == found.folders.index(folder)).nonzero().flatten().tolist()
    return [found.root / found.files[n] for n in mine]


def choose_classes(words, folders, count):
    """Class folders by name, index or range; by default `count` spread evenly over all."""
    picks = np.linspace(0, len(folders) - 1, min(count, len(folders))).round().astype(int)
    if words:
        picks = [n for word in words for n in datasets.class_positions([word], folders)]
    return [folders[n] for n in picks]


def titles_of(found, folders):
    """A readable name for each class folder: from the images' manifest, else the known prompts."""
    prompts = datasets.known_prompts(found.dataset)
    if not found.foreign:
        classes = files.read_json(found.root / output.MANIFEST)["classes"]
        prompts |= {c["folder"]: c["prompt"] for c in classes}
    return [short(prompts.get(folder, folder)) for folder in folders]


def draw_grid(rows, names, titles, side=PAGE / 10):
    """rows: paths of images (None: blank), one row per name; titles: one per column.   -> figure

    All are shown at the size of the largest, `side` inches, pixel by pixel if they are small.
    """
    from torchvision.utils import make_grid

    blank = Image.new("RGB", (1, 1), "white")
    pictures = [datasets.read_rgb(path) if path else blank for row in rows for path in row]
    size, gap = max(picture.width for picture in pictures), 2
    pictures = [torch.from_numpy(np.array(p.resize((size, size), 0))) for p in pictures]
    pictures = torch.stack(pictures).permute(0, 3, 1, 2)
    sheet = make_grid(pictures, len(titles), padding=gap, pad_value=255).permute(1, 2, 0)
    figure, axes = pyplot().subplots(figsize=(side * len(titles), side * len(rows)))
    axes.imshow(sheet.numpy(), interpolation="nearest" if size <= 64 else "lanczos", aspect="auto")
    for axis, texts in ((axes.xaxis, titles), (axes.yaxis, names)):
        middles = [gap + size / 2 + n * (size + gap) for n in range(len(texts))]
        # points, of what there is for each; a letter is 0.6 of its size wide
        room = 72 * side * len(texts) / sum(map(bool, texts)) / 0.6
        fontsize = max(4.5, min(8, room / max(1, *map(len, texts))))
        axis.set_ticks(middles, texts, fontsize=fontsize)
    axes.set_yticklabels(names, rotation=90 * (max(map(len, names)) > 2), va="center")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.subplots_adjust(0, 0, 1, 1)
    return figure


def grid(images, names, dataset, classes, count, image):
    sets, names = open_sets(images, names, dataset)
    folders = choose_classes(classes, sets[0].folders, count)
    rows = [[files_of(found, folder) for folder in folders] for found in sets]
    for few in (paths for row in rows for paths in row if image >= len(paths)):
        refuse(f"--image {image}: {few[0].parent} has {len(few)} images")
    rows = [[paths[image] for paths in row] for row in rows]
    return draw_grid(rows, names, titles_of(sets[0], folders), PAGE / len(folders))


def row(images, names, class_folder, count):
    sets, names = open_sets(images, names)
    [folder] = choose_classes([class_folder] if class_folder else None, sets[0].folders, 1)
    rows = [files_of(found, folder) for found in sets]
    count = min(count, *map(len, rows))
    titles = titles_of(sets[0], [folder]) + [""] * (count - 1)  # above the first image
    return draw_grid([paths[:count] for paths in rows], names, titles, PAGE / count)


# ---- figures 6 and 8: curves


class Curve(NamedTuple):
    """What the points of a curve share.

    method   an arm's or the paper's name;   rest: hard labels, recipe, generator and images, each
             only where it is not the paper's;   paper: published, not measured
    """

    method: str
    teacher: str
    student: str
    rest: str = ""
    paper: bool = False

    @property
    def networks(self):
        return self.student, self.teacher or self.student

    @property
    def title(self):
        titles = paper_tables.MODEL_TITLES
        words = titles.get(self.student, self.student)
        if self.teacher not in ("", self.student):
            teachers = [titles.get(name, name) for name in self.teacher.split("+")]
            words = "+".join(teachers) + "→" + words
        words = f"{self.method} ({', '.join(filter(None, [words, self.rest]))})"
        return words + ", paper" * self.paper


def curve_of(result):
    arm, dataset, ipc = result["arm"], result["dataset"], result["ipc"]
    names = {"d4m": PAPER_IMAGES, "stm": f"{PAPER_IMAGES}_stm"}
    names["d4m-g"] = f"from_imagenet_ipc{ipc}_{PAPER_IMAGES}"
    variant = result["images"].removeprefix(f"{dataset}_ipc{ipc}_")
    variant = variant.removeprefix(names.get(arm, arm)).removeprefix("_")
    paper = (None, generators.DEFAULT_CHECKPOINT)
    rest = ["hard labels"] if result["labels"] == "hard" else []
    rest += [] if result["recipe"] == "d4m" else [result["recipe"] or "own recipe"]
    rest += [] if result["generator"] in paper else [result["generator"]]
    rest += [variant] if variant else []
    method = ARMS.get(arm, (arm,))[0]
    return Curve(method, "+".join(result["teacher"]), result["student"], ", ".join(rest))


def paper_curves(dataset, methods):
    """{Curve: [(ipc, top1)]} of table 2 (table 1 for CIFAR)."""
    names = {title: name for name, title in paper_tables.MODEL_TITLES.items()}
    curves, title = {}, paper_tables.DATASET_TITLES.get(dataset)
    for line in paper_tables.PAPER_ROWS:
        mine = line["dataset"] == title and line["table"] in ("Table 1", "Table 2")
        if mine and line["method"] in methods and {"student", "ipc"} <= line.keys():
            teacher = line.get("teacher", line["student"]).split(" (")[0]  # a note may follow
            networks = (names.get(title, title) for title in (teacher, line["student"]))
            curve = Curve(line["method"], *networks, paper=True)
            curves.setdefault(curve, []).append((line["ipc"], line["top1"]))
    return {curve: sorted(points) for curve, points in curves.items()}


def measured_curves(root, dataset, arms, x_of):
    """{Curve: [(x, mean, std)]} of the results below `root`; at one IPC that of most seeds."""
    if not Path(root).is_dir():
        refuse(f"--output_root {root}: no such folder")
    best, curves = {}, {}
    for result in paper_tables.find_results(root):
        if result["dataset"] == dataset and result["arm"] in arms and result["ipc"]:
            key = curve_of(result), result["ipc"]
            if key not in best or result["last"]["n"] > best[key]["last"]["n"]:
                best[key] = result
    for (curve, _), result in best.items():
        x, last = x_of(result), result["last"]
        if x is not None:
            curves.setdefault(curve, []).append((x, last["mean"], last["std"] or 0.0))
    return {curve: sorted(curves[curve]) for curve in sorted(curves)}


def draw_curves(curves, xlabel, xs=None):
    """Colour says the networks (the method, if all have one network), marker the method; the
    paper's are dashed.   -> figure"""
    methods = list(dict.fromkeys((curve.method, curve.rest) for curve in curves))
    by_size = lambda networks: [(len(name), name) for name in networks]  # noqa: E731
    networks = sorted({curve.networks for curve in curves}, key=by_size)  # ResNet-18, ResNet-101
    figure, axes = pyplot().subplots(figsize=(COLUMN, 2.6))
    drawn = []
    # the one that ends highest first: the legend reads as the lines do
    for curve, points in sorted(curves.items(), key=lambda c: (c[0].paper, -c[1][-1][1])):
        place = methods.index((curve.method, curve.rest))
        colour = networks.index(curve.networks) if len(networks) > 1 else place
        style = {"color": f"C{colour}", "marker": MARKERS[place % len(MARKERS)]}
        if curve.paper:
            style |= {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "zorder": 1}
            drawn += axes.plot(*zip(*points), label=curve.title, **style)
        else:
            drawn.append(axes.errorbar(*zip(*points), capsize=2, label=curve.title, **style))
    axes.legend(handles=drawn, loc="upper left", bbox_to_anchor=(1.0, 1.02), labelspacing=0.35)
    axes.set(xlabel=xlabel, ylabel="Top-1 accuracy (%)", xscale="log")
    axes.grid(True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if xs:
        axes.set_xticks(xs)
        axes.minorticks_off()
    return figure


def ipc(output_root, dataset, arms, paper):
    curves = measured_curves(output_root, dataset, arms, lambda result: result["ipc"])
    curves |= paper_curves(dataset, paper)
    if not curves:
        refuse(f"--output_root {output_root}: no results of {dataset}, and none of the paper")
    xs = sorted({point[0] for points in curves.values() for point in points})
    return draw_curves(curves, "Images per class", xs)


def hours(result):
    """Process-hours of all that made a result's images; None where a part is not known."""
    root = Path(result["path"]).parents[2]
    seconds = seconds_made(root, root / "images" / result["images"])
    return seconds and seconds / 3600


def seconds_made(root, folder):
    """Of an output folder and what it was made from: the prototypes of arms that start from them,
    the images of STM and D4M-G - of these, the share that was taken."""
    if not ((folder / output.TIMING).is_file() and output.is_complete(folder)):
        return None
    timing, manifest = (files.read_json(folder / n) for n in (output.TIMING, output.MANIFEST))
    cached, source = timing.get("cached_seconds", 0), manifest["inputs"].get("source")
    if cached is None:
        return None
    own, taken = timing["process_seconds"] + cached, source is not None
    if manifest.get("arm") in ("d4m", "decoded"):
        source = manifest["inputs"].get("prototypes")
    if source is None:  # no prototypes, or made in the same process
        return own
    for path in root.glob(f"*/*/{output.MANIFEST}"):
        before = files.read_json(path)
        if before.get("content") == source:
            seconds = seconds_made(root, path.parent)
            share = manifest["count"] / before["count"] if taken else 1
            return None if seconds is None else own + seconds * share
    return None


def time(output_root, dataset, arms, paper):
    curves = measured_curves(output_root, dataset, arms, hours)
    of = "Table 6", paper_tables.DATASET_TITLES.get(dataset)
    rows = [row for row in paper_tables.PAPER_ROWS if (row["table"], row["dataset"]) == of]
    seconds = {row["method"]: row["sec_per_image"] for row in rows}
    for curve, points in paper_curves(dataset, paper).items():
        if curve.method in seconds:
            each = len(datasets.known_prompts(dataset)) * seconds[curve.method] / 3600
            curves[curve] = [(count * each, top1) for count, top1 in points]
    if not curves:
        refuse(f"--output_root {output_root}: no results of {dataset} with a timing.json")
    return draw_curves(curves, "Process-hours of distillation (paper: V100)")


# ---- figure 7: t-SNE


@torch.no_grad()
def features(model, pictures, size, facts, device):
    """PIL images -> (N, d) float32 numpy array, the input of the model's last linear layer."""
    last, found = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1], []
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().cpu()))
    square = [p if p.size == (size, size) else datasets.squash(p, size) for p in pictures]
    for part in torch.from_numpy(np.stack(square)).split(64):  # (B, size, size, 3) uint8
        model(batches.normalise(part.to(device), facts.mean, facts.std))
    hook.remove()
    return torch.cat(found).numpy()


def tsne(
    images, names, classes, data_dir, split, real_per_class, arch, teacher_checkpoint, seed, device
):
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    (sets, names), device = open_sets(images, names), runtime.this_process(device).device
    first, dataset = sets[0], sets[0].dataset
    facts = datasets.ALL[dataset]
    size = first.image_size or facts.image_size
    chosen = classes or choose_classes(None, first.folders, 10)  # a thousand are no picture
    real = datasets.open_split(dataset, data_dir, split, None, chosen, real_per_class)
    # the whole head, so that a checkpoint of all classes fits; features do not depend on it
    model, _ = models.load_teacher(arch, teacher_checkpoint, dataset, first.folders, size)
    crop = datasets.squash if facts.image_size <= 64 else evaluation.centre_crop
    groups = [[[crop(real.read(item), size) for item in items] for items in real.items]]
    for found in sets:
        paths = [files_of(found, folder) for folder in real.folders]
        groups.append([[datasets.read_rgb(path) for path in of_class] for of_class in paths])
    labels = [np.repeat(np.arange(len(group)), list(map(len, group))) for group in groups]
    model = model.to(device)
    rows = [features(model, sum(group, []), size, facts, device) for group in groups]
    # one embedding for all panels, so that they can be compared; PCA first, as t-SNE's authors do
    ends, rows = np.cumsum(list(map(len, rows)))[:-1], np.concatenate(rows)
    rows = PCA(min(50, *rows.shape), random_state=seed).fit_transform(rows)
    perplexity = min(30, (len(rows) - 1) / 3)
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    points = np.split(embedding.fit_transform(rows), ends)
    panels_size = (min(PAGE, 2.7 * len(sets)), 2.7)
    figure, panels = pyplot().subplots(1, len(sets), figsize=panels_size, squeeze=False)
    colours = class_colours(len(real.folders))
    for axes, name, own, own_labels in zip(panels[0], names, points[1:], labels[1:]):
        scatter(axes, points[0], colours[labels[0]], s=7, alpha=0.35, rasterized=True)
        scatter(axes, own, colours[own_labels], s=46, marker="*", edgecolors="black")
        axes.set_title(name)
    figure.subplots_adjust(wspace=0.06)
    words = "real test image" if split == "val" else "real training image"
    entries = [(words, "o", "black"), ("image of the set", "*", "black")]
    entries += [(short(p), "o", colour) for p, colour in zip(real.prompts, colours)]
    for label, marker, colour in entries:
        panels[0][-1].plot([], [], marker, color=colour, label=label)
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)
    return figure


def class_colours(count):
    """(count, 4) RGBA."""
    import matplotlib

    return matplotlib.colormaps["tab10" if count <= 10 else "tab20"](np.arange(count) % 20)


def scatter(axes, points, colours, **style):
    """Points without ticks: these planes have no units."""
    width = 0.5 if "edgecolors" in style else 0
    axes.scatter(*points.T, c=colours, linewidths=width, **style)
    axes.set(xticks=[], yticks=[])


# ---- latents and their prototypes


def latents(latent_cache, prototype_path, dataset, classes, count):
    """A class's latents on their first two principal components, in the colour of the nearest
    prototype (a star)."""
    from matplotlib.collections import LineCollection
    from sklearn.decomposition import PCA

    if not dataset and not output.is_complete(prototype_path):
        refuse(f"--prototype_path {prototype_path}: no finished folder; name its --dataset")
    source = prototype_files.open_prototypes(prototype_path, dataset)
    folders = [c["folder"] for c in source.classes]
    chosen = [folders.index(folder) for folder in choose_classes(classes, folders, count)]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (2.2 * columns, 2.2 * rows)
    figure, panels = pyplot().subplots(rows, columns, figsize=size, squeeze=False)
    for axes in panels.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, position in zip(panels.flat, chosen):
        own = source.classes[position]
        found = cached_latents(latent_cache, own), source[position].latents
        rows, centres = (x.reshape(len(x), -1).astype(np.float64) for x in found)
        nearest = ((centres**2).sum(1) - 2 * rows @ centres.T).argmin(1)  # (N,)
        pca, colours = PCA(2, random_state=0).fit(rows), class_colours(len(centres))
        points, stars = pca.transform(rows), pca.transform(centres)
        scatter(axes, points, colours[nearest], s=7, alpha=0.55)
        scatter(axes, stars, colours, s=75, marker="*", edgecolors="black")
        lines = np.stack([points, stars[nearest]], 1)  # (N, 2, 2)
        style = {"colors": colours[nearest], "linewidths": 0.3, "alpha": 0.35}
        axes.add_collection(LineCollection(lines, **style))
        first, second = 100 * pca.explained_variance_ratio_
        axes.set(xlabel=f"PC 1 ({first:.0f} %)", ylabel=f"PC 2 ({second:.0f} %)")
        axes.set_title(short(own["prompt"]))
    figure.tight_layout(pad=0.6)
    return figure


def cached_latents(root, own):
    """(N, c, h, w) of one class from a latent cache: its folder, or the --latent_cache above."""
    from safetensors.numpy import load_file

    name = prototype_files.class_file(own["index"], own["folder"], "safetensors")
    found = sorted(p for p in {Path(root) / name, *Path(root).glob(f"*/{name}")} if p.is_file())
    if len(found) != 1:
        hint = f"name one of them, such as {found[0].parent}" if found else "run stage 1 with it"
        refuse(f"--latent_cache {root}: {len(found)} files {name}; {hint}")
    return load_file(found[0])["latents"]


# ---- main

FIGURES = {  # subcommand: (function, name of its files, help)
    "grid": (grid, "figure4", "methods as rows, classes as columns (figure 4)"),
    "row": (row, "figure5", "one class, methods as rows, images as columns (figure 5)"),
    "ipc": (ipc, "figure6", "accuracy over images per class (figure 6)"),
    "tsne": (tsne, "figure7", "t-SNE of features of real and synthetic images (figure 7)"),
    "time": (time, "figure8", "accuracy against the time of distillation (figure 8)"),
    "latents": (latents, "latents", "a class's latents with their prototypes"),
}


def get_args(argv=None):
    parser, count, subs = Parser("misc.figures", __doc__), number(int, 1), {}
    kinds = parser.add_subparsers(dest="figure", required=True)
    for name, (_, stem, words) in FIGURES.items():
        sub = subs[name] = kinds.add_parser(name, doc=words, help=words)
        sub.flag("--output", default=f"output/figures/{stem}", help="without .png and .pdf")
    for sub in (subs["grid"], subs["row"], subs["tsne"]):
        sub.flag("--images", nargs="+", required=True, metavar="DIR", help="one folder per method")
        sub.flag("--names", nargs="+", help="what to call them")
    for sub in (subs["grid"], subs["tsne"], subs["latents"]):
        sub.flag("--classes", nargs="+", help="folders, indices or ranges [some, spread evenly]")
    for name, most in (("grid", 10), ("row", 10), ("latents", 6)):
        subs[name].flag("--count", type=count, default=most, help="images of a row, or classes")
    for sub in (subs["ipc"], subs["time"]):
        sub.flag("--output_root", default="output", help="results.json are looked for below it")
        sub.flag("--dataset", type=datasets.name, default="imagenet")
        sub.flag("--arms", nargs="+", default=["d4m", "random"], help="image arms that are drawn")
        sub.flag("--paper", nargs="*", default=["D4M", "SRe2L"], help="methods of its tables")
    known = "the data set of the images [what their manifest, or their classes' names, say]"
    subs["grid"].flag("--dataset", type=datasets.name, metavar="NAME", help=known)
    subs["grid"].flag("--image", type=number(int, 0), default=0, help="which image of each class")
    subs["row"].flag("--class_folder", help="folder or index of the class [the first]")
    sub = subs["tsne"]
    sub.flag("--data_dir", help="the real data set's root (not for digits)")
    sub.flag("--split", choices=["train", "val"], default="val", help="of the real images")
    sub.flag("--real_per_class", type=count, default=50)
    sub.flag("--arch", type=models.model_name, default="resnet18", help="whose features")
    sub.flag("--teacher_checkpoint", help="its weights [torchvision's]")
    sub.flag("--seed", type=number(int, 0), default=0)
    sub.flag("--device", default="auto")
    sub = subs["latents"]
    sub.flag("--latent_cache", required=True, metavar="DIR", help="as stage 1 wrote it")
    sub.flag("--prototype_path", required=True, help="a folder of stage 1")
    sub.flag("--dataset", type=datasets.name, help="of a single file of the release")
    return parser.parse_args(argv)


@entry_point
def main(argv=None):
    options = vars(get_args(argv))
    function, _, _ = FIGURES[options.pop("figure")]
    path = options.pop("output")
    del options["settings"]
    figure = function(**options)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # without dates, so that equal figures are equal files
    figure.savefig(f"{path}.png", dpi=300, metadata={"Software": None})
    undated = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    figure.savefig(f"{path}.pdf", metadata=undated)
    pyplot().close(figure)
    print(f"{path}.png {path}.pdf")
    return figure


if __name__ == "__main__":
    main()
