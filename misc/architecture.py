"""docs/architecture.svg: the modules in the order of their imports, drawn from the code.

    python -m misc.architecture docs/architecture.svg

One column per folder. A module imports only from those above it and from columns left of it;
the words are the beginning of its docstring.
"""

import ast
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

from misc import figures

FOLDERS = ("scripts", "distillation", "matching", "validate", "misc")
STAGES = ("gen_prototype", "gen_syn_image", "generate_soft_label", "train_FKD")
WIDTH, HEIGHT, GAP = 2.9, 0.4, 0.2  # inches: of a module, and between columns


def read_modules(root):
    """{"folder.module": (what it imports, words of its docstring)}, imported ones first.

    Raises graphlib.CycleError for imports in a circle.
    """
    names = [f"{f}.{p.stem}" for f in FOLDERS for p in sorted((root / f).glob("[!_]*.py"))]
    imports, words = {}, {}
    for name in names:
        tree = ast.parse((root / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
        words[name] = textwrap.shorten(ast.get_docstring(tree), 44, placeholder=" …")
        tree.body = [part for part in tree.body if not isinstance(part, ast.If)]  # no __main__
        found = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
        every = {f"{n.module}.{alias.name}" for n in found for alias in n.names}
        imports[name] = ({n.module for n in found} | every) & set(names) - {name}
    order = TopologicalSorter(imports).static_order()
    return {name: (imports[name], words[name]) for name in order}


def draw(modules):
    plt = figures.pyplot()
    columns = {f: [m for m in modules if m.split(".")[0] == f] for f in FOLDERS}
    rows = max(map(len, columns.values()))
    size = (len(FOLDERS) * (WIDTH + GAP), (rows + 1.2) * HEIGHT)
    figure, axes = plt.subplots(figsize=size)
    for n, (folder, mine) in enumerate(columns.items()):
        left = n * (WIDTH + GAP)
        axes.text(left, 0.1, f"{folder}/", fontsize=12, weight="bold")
        for row, module in enumerate(mine):
            top, name = -row * HEIGHT, module.split(".")[1]
            axes.plot([left, left + WIDTH], [top, top], color="0.8", lw=0.6)
            name = name.replace("stable_diffusion", "…")
            weight = "bold" if name in STAGES else "normal"
            axes.text(left, top - 0.17, name, fontsize=9.5, weight=weight)
            axes.text(left, top - 0.32, modules[module][1], fontsize=6.5, color="0.35")
    axes.set(xlim=(0, size[0]), ylim=(-rows * HEIGHT, 1.2 * HEIGHT))
    axes.set_axis_off()
    return figure


if __name__ == "__main__":
    picture = draw(read_modules(Path(__file__).parent.parent))
    plain = {"svg.fonttype": "none", "svg.hashsalt": "d4m", "font.family": "sans-serif"}
    figures.pyplot().rcParams.update(plain)
    picture.savefig(sys.argv[1], facecolor="white", metadata={"Date": None})
