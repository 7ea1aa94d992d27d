"""A picture of several seeds' losses: over the steps, and at the end, one column of dots for each way to train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

_COLOURS = ("#8a8a8a", "#33658a", "#d9731a", "#e8b07a", "#4b8f5c", "#9fc9ab")
_SPREAD = 0.12


def draw_scores(path: Path, title: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], reference: str) -> None:
    """Draw loss curves, training loss, test loss and test accuracy of `runs` (name -> runs) into the PNG file `path`.

    A line is the mean over the seeds, a dot a run, a bar the mean, the band the range of the runs called `reference`.
    """
    figure, panels = plt.subplots(2, 2, figsize=(13.5, 9.5), layout="constrained")
    figure.suptitle(f"{title}\ndots: seeds, lines and bars: means, band: range of {reference}", fontsize=11)
    curves, *others = panels.flat
    _draw_curves(curves, {name: [run["loss_curve"] for run in of_name] for name, of_name in runs.items()}, reference)
    headings = {"train_loss": "training loss (nats)", "test_loss": "test loss (nats)", "test_accuracy": "test accuracy"}
    for axes, (score, heading) in zip(others, headings.items(), strict=True):
        _draw_score(axes, {name: [float(run[score]) for run in of_name] for name, of_name in runs.items()}, reference)
        axes.set_title(heading, fontsize=10.5)
    others[-1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[Sequence[float]]], reference: str) -> None:
    of_reference = np.array(curves[reference])
    places = np.arange(1, of_reference.shape[1] + 1) / of_reference.shape[1]
    axes.fill_between(places, of_reference.min(axis=0), of_reference.max(axis=0), color="#33658a", alpha=0.12)
    for (name, of_name), colour in zip(curves.items(), _COLOURS, strict=False):
        axes.plot(places, np.mean(np.array(of_name), axis=0), color=colour, label=name, linewidth=1.4)
    axes.set_yscale("log")
    axes.set_xlabel("part of the run", fontsize=9)
    axes.set_title("loss of rank 0's batches (nats)", fontsize=10.5)
    axes.legend(fontsize=8)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)


def _draw_score(axes: Axes, values: Mapping[str, Sequence[float]], reference: str) -> None:
    band = values[reference]
    axes.axhspan(min(band), max(band), color="#33658a", alpha=0.12, linewidth=0)
    for place, (name, colour) in enumerate(zip(values, _COLOURS, strict=False)):
        offsets = np.linspace(-_SPREAD, _SPREAD, len(values[name])) if len(values[name]) > 1 else np.zeros(1)
        axes.plot(place + offsets, values[name], "o", color=colour, markersize=5, alpha=0.85)
        axes.hlines(np.mean(values[name]), place - 0.28, place + 0.28, color=colour, linewidth=2)
    axes.set_xticks(range(len(values)), [name.replace(", ", "\n") for name in values], fontsize=8)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
