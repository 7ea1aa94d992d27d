"""A picture of quantizers' errors over their bits on the wire: one panel for each set of gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D


class Row(Protocol):
    """What is drawn of one measurement."""

    gradients: str
    bits_on_wire: float
    method: str
    normalised_error: float


_STYLES = {
    "ours-adaptive": ("#d9731a", "-", "o"),
    "ours-adaptive-coded": ("#d9731a", "--", "o"),
    "ours-auto": ("#b03a2e", "-", "s"),
    "ours-auto-coded": ("#b03a2e", "--", "s"),
    "ours-rotation-stratified": ("#2a9d8f", ":", "^"),
    "ours-rotation-nearest": ("#2a9d8f", "-", "^"),
    "ours-auto-rotation-nearest": ("#c2185b", "-", "D"),
    "ours-auto-rotation-nearest-uniform-coded": ("#c2185b", "--", "D"),
    "ours-auto-best": ("#7a0f3a", ":", "D"),
    "ours-tuq": ("#e0b040", "-", "v"),
    "ours-tnq": ("#c49a1a", "-", "v"),
    "QSGD": ("#33658a", "-", "."),
    "NUQSGD": ("#33658a", ":", "."),
    "ALQ": ("#33658a", "--", "."),
    "min-max (torch_cgx)": ("#4b8f5c", "-", "."),
    "EDEN": ("#6b4c9a", "-", "."),
    "EDEN, common rotation": ("#6b4c9a", "--", "."),
    "Gaussian bound": ("#8a8a8a", "-", None),
}
_SINGLE = ("x", "+", "1", "2", "3", "4", "*", "d")


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw `rows` into the PNG file `path`; of our methods the main ones."""
    names = list(dict.fromkeys(row.gradients for row in rows))
    known = dict.fromkeys(row.method for row in rows)
    methods = [method for method in known if method in _STYLES or not method.startswith("ours-")]
    others = [method for method in methods if method not in _STYLES]
    single = {method: ("#222222", "", _SINGLE[index % len(_SINGLE)]) for index, method in enumerate(others)}
    styles = {method: style for method, style in {**_STYLES, **single}.items() if method in methods}
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(5.2 * columns, 3.6 * lines + 1.6), squeeze=False, layout="constrained", sharex=True
    )
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        for method in methods:
            points = sorted(
                (row.bits_on_wire, row.normalised_error)
                for row in rows
                if row.gradients == name and row.method == method
            )
            if points:
                colour, line, marker = styles[method]
                x, y = zip(*points, strict=True)
                axes.plot(x, y, linestyle=line, color=colour, marker=marker, markersize=4, linewidth=1.2)
        axes.set_yscale("log")
        axes.set_xlim(1, 9)
        axes.set_title(name, fontsize=10)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("bits on the wire per coordinate")
    figure.supylabel("normalised squared error of one worker")
    handles = [
        Line2D([], [], color=colour, linestyle=line, marker=marker, label=method)
        for method, (colour, line, marker) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
