"""Pictures of runs: loss, bytes and quantization error of a compressed run beside a plain one."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from hvd_qoda.telemetry import StepRecord

_BLUE, _ORANGE, _GREY = "#33658a", "#d9731a", "#8a8a8a"
_LEGEND_ROOM = 1.7
_LEAST_LOSS = 1e-8
_LAYER_COLOURS = ("#4b8f5c", "#a4458f", "#7a6a4f", "#5fa8c4", "#c0504d", "#b5a642", "#33658a", "#d9731a", "#8a8a8a")


def compare_runs(path: Path, title: str, runs: Mapping[str, Sequence[StepRecord]], compressed: str) -> None:
    """Draw the steps of `runs` (name -> records), plain first, into the PNG file `path`.

    Three panels: training loss of every run; bytes sent per step of every run; relative quantization error per layer
    type of the run named `compressed`, with a mark where its levels changed.
    """
    figure, (loss, volume, error) = plt.subplots(1, 3, figsize=(14.5, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    colours = dict(zip(runs, (_BLUE, _ORANGE, _GREY), strict=False))
    _draw_losses(loss, runs, colours)
    _draw_bytes(volume, runs, colours)
    _draw_errors(error, runs[compressed])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def running_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and up to `window - 1` values before it, float64 [len(values)]."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(0, end - window)
    return np.asarray((sums[end] - sums[begin]) / (end - begin))


def _draw_losses(axes: Axes, runs: Mapping[str, Sequence[StepRecord]], colours: Mapping[str, str]) -> None:
    first = next(iter(runs))
    for name, records in runs.items():
        steps = [record.step for record in records]
        losses = [record.scalars["loss"] for record in records]
        window = max(1, len(losses) // 20)
        axes.plot(steps, losses, color=colours[name], alpha=0.18, linewidth=0.8)
        # Of the logarithms, as the axis is logarithmic: else one hard batch hides those around it.
        smooth = np.exp(running_mean(np.log(np.maximum(losses, _LEAST_LOSS)), window))
        # The first, plain run is drawn broad, to be seen below another that follows it closely.
        axes.plot(steps, smooth, color=colours[name], linewidth=1.6 if name != first else 4.0, label=name)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="cross entropy (nats)", title="Training loss, rank 0 (line: running geometric mean)")
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_bytes(axes: Axes, runs: Mapping[str, Sequence[StepRecord]], colours: Mapping[str, str]) -> None:
    names = list(runs)
    means = [float(np.mean([record.scalars["bytes_sent"] for record in runs[name]])) / 1e3 for name in names]
    bars = axes.bar(names, means, color=[colours[name] for name in names], width=0.55)
    axes.bar_label(bars, labels=[_amount(mean, means[0]) for mean in means], padding=3)
    axes.set_ylim(0, max(means) * 1.18 or 1)
    axes.set(ylabel="kB per rank and step", title="Bytes sent, measured at the collective calls")
    _tidy(axes)


def _amount(mean: float, plain: float) -> str:
    ratio = f"\n1/{plain / mean:.2f}" if 0 < mean < plain else ""
    return f"{mean:,.1f} kB{ratio}"


def _draw_errors(axes: Axes, records: Sequence[StepRecord]) -> None:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for entry in record.layer_types:
            if entry.relative_error:
                steps, errors = series.setdefault(entry.layer_type, ([], []))
                steps.append(record.step)
                errors.append(entry.relative_error)
    for (name, (steps, errors)), colour in zip(series.items(), _LAYER_COLOURS, strict=False):
        axes.plot(steps, errors, color=colour, alpha=0.18, linewidth=0.8)
        smooth = running_mean(errors, max(1, len(errors) // 50))
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
    for number, step in enumerate(_level_changes(records)):
        label = "levels fitted anew" if number == 0 else None
        axes.axvline(step, ymax=0.82, color=_GREY, linestyle=":", linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="|Q(v) - v|² / |v|²", title="Quantization error per layer type, rank 0")
    if series:
        axes.set_ylim(top=_LEGEND_ROOM * max(max(errors) for _, errors in series.values()))
        axes.legend(frameon=False, ncols=2, loc="upper right")
    _tidy(axes)


def _level_changes(records: Sequence[StepRecord]) -> list[int]:
    pairs = itertools.pairwise(records)
    return [after.step for before, after in pairs if after.registry_version != before.registry_version]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10.5)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    if axes.get_xlabel() == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
