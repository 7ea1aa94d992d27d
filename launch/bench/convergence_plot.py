"""A picture of several seeds' scores, one column of dots for each way to train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

_COLOURS = ("#8a8a8a", "#33658a", "#d9731a", "#4b8f5c")
_SPREAD = 0.12


def draw_scores(path: Path, title: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], reference: str) -> None:
    """Draw training loss, test loss and test accuracy of `runs` (name -> runs) into the PNG file `path`.

    A dot is a run, a bar the mean over the seeds, the band the range of the runs called `reference`.
    """
    figure, panels = plt.subplots(1, 3, figsize=(13.5, 4.6), layout="constrained")
    figure.suptitle(f"{title}\ndots: seeds, bars: means, band: range of {reference}", fontsize=11)
    headings = {"train_loss": "training loss (nats)", "test_loss": "test loss (nats)", "test_accuracy": "test accuracy"}
    for axes, (score, heading) in zip(panels, headings.items(), strict=True):
        _draw_score(axes, {name: [float(run[score]) for run in of_name] for name, of_name in runs.items()}, reference)
        axes.set_title(heading, fontsize=10.5)
    panels[-1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_score(axes: Axes, values: Mapping[str, Sequence[float]], reference: str) -> None:
    band = values[reference]
    axes.axhspan(min(band), max(band), color="#33658a", alpha=0.12, linewidth=0)
    for place, (name, colour) in enumerate(zip(values, _COLOURS, strict=True)):
        offsets = np.linspace(-_SPREAD, _SPREAD, len(values[name])) if len(values[name]) > 1 else np.zeros(1)
        axes.plot(place + offsets, values[name], "o", color=colour, markersize=5, alpha=0.85)
        axes.hlines(np.mean(values[name]), place - 0.28, place + 0.28, color=colour, linewidth=2)
    axes.set_xticks(range(len(values)), [name.replace(", ", "\n") for name in values], fontsize=9)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
