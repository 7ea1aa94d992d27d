"""Pictures of what a run has learnt and sent, from the file of records that its telemetry wrote (JSON lines).

Writes PNG files: levels.png (histogram of the normalised magnitudes of each layer type at the last update, with the
levels drawn in; not those of rotated buckets, which are for other coordinates), bits.png (code width of each layer
type, and average over coordinates), error.png (relative error of each layer type), bytes.png (bytes sent per step, of
how many) and tails.png (tail index of each layer type). Pictures of which the records hold nothing are left out and
named. --wandb also logs them to a run of Weights & Biases.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from hvd_qoda.errors import ReportError
from hvd_qoda.sinks.json_lines import read_steps
from hvd_qoda.telemetry import MAGNITUDE_EDGES, LearntRecord, StepRecord
from qoda_kernels.codebook import EXACT_BITS

__all__ = ["NAME", "SUMMARY", "add_options", "pictures", "run", "show"]

NAME = "report"
SUMMARY = "pictures of what a run has learnt and sent"

STEPS_FILE = "steps.jsonl"
_WANDB_MODES = ("online", "offline", "disabled")
_COLOURS = ("#d9731a", "#33658a", "#4b8f5c", "#6b4c9a", "#b03a2e", "#8a6d00", "#2a9d8f", "#555555")
_STYLES = ("-", "--", ":", "-.")
_COLUMNS = 3
_MOST_PANELS = 30  # of layer types whose histograms are drawn, those with the most coordinates
_MOST_NAMED = 16  # curves of one picture that are named
_LEAST_SHARE = 1e-4  # of magnitudes beyond the right end of a histogram's axis


@dataclass(frozen=True)
class _Learnt:
    """The newest histogram of a layer type, and its levels then."""

    step: int
    bits: int
    coordinates: int
    record: LearntRecord
    levels: tuple[float, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `hvd-qoda report`."""
    parser.add_argument("records", type=Path, metavar="RUN", help="a run's folder with steps.jsonl, or such a file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where pictures go; None: the folder of the records")
    parser.add_argument("--wandb", choices=_WANDB_MODES, default="disabled", help="Weights & Biases mode")
    parser.add_argument("--wandb-project", default="hvd-qoda", help="Weights & Biases project")
    parser.add_argument("--wandb-run", metavar="ID", help="go on with this run of Weights & Biases; None: a new one")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Draw the pictures; what was written and what was left out, as plain values, and the exit status.

    Raises:
        ReportError: without records, without matplotlib, or without wandb where it is asked for.
        TelemetryError: for a file that holds something else.
    """
    path: Path = options.records / STEPS_FILE if options.records.is_dir() else options.records
    if not path.is_file():
        raise ReportError(f"{path} does not exist: give the file of a JsonLinesSink, or a folder with {STEPS_FILE}")
    records = [record for record in read_steps(path) if record.layer_types]
    if not records:
        raise ReportError(f"{path} has no record of an exchange: nothing was compressed, or with one process only")
    out: Path = options.out or path.parent
    written, left_out = pictures(records, out)
    if options.wandb != "disabled":
        _log(written, options, path)
    found = {
        "records": str(path),
        "steps": len(records),
        "pictures": [str(picture) for picture in written],
        "left_out": left_out,
    }
    return found, 0


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `run` has found."""
    console.print(f"{found['steps']} steps of {found['records']}", highlight=False)
    for picture in found["pictures"]:
        console.print(f"  {picture}", highlight=False)
    for name, reason in found["left_out"].items():
        console.print(f"  no {name}: {reason}", highlight=False)


def pictures(records: Sequence[StepRecord], out: Path) -> tuple[list[Path], dict[str, str]]:
    """Draw everything that records of exchanges hold.

    Args:
        records: of steps with exchanges, in order.
        out: the folder for the PNG files; made if it is missing.

    Returns:
        The files written; and by name, why others were not.

    Raises:
        ReportError: without matplotlib.
    """
    drawings: tuple[tuple[str, Callable[[Sequence[StepRecord]], Any], str], ...] = (
        ("levels.png", _levels, "levels were not learnt in this run, or its records are older than their histograms"),
        ("bits.png", _bits, "nothing was compressed"),
        ("error.png", _errors, "the quantization error was not measured: measure_error_every"),
        ("bytes.png", _bytes, "nothing was sent"),
        ("tails.png", _tails, "levels were not learnt in this run, or its records are older than their tail index"),
    )
    out.mkdir(parents=True, exist_ok=True)
    written, left_out = [], {}
    for name, draw, reason in drawings:
        figure = draw(records)
        if figure is None:
            left_out[name] = reason
            continue
        figure.savefig(out / name, dpi=110)
        written.append(out / name)
    return written, left_out


def _levels(records: Sequence[StepRecord]) -> Any:
    newest = _newest_learnt(records)
    if not newest:
        return None
    largest = sorted(newest, key=lambda name: -newest[name].coordinates)[:_MOST_PANELS]
    names = [name for name in newest if name in largest]
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = _figure(4.6 * columns, 2.9 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        learnt = newest[name]
        shares = learnt.record.shares[:-1]
        widths = [after - before for before, after in pairwise(MAGNITUDE_EDGES)]
        heights = [share / width for share, width in zip(shares, widths, strict=True)]
        axes.stairs(heights, MAGNITUDE_EDGES, fill=True, color="#c9d6e2")
        for level in learnt.levels if learnt.record.rotation == "none" else ():
            axes.axvline(level, color=_COLOURS[0], linewidth=0.9)
        axes.set_xlim(0.0, _right_end(learnt))
        axes.set_title(f"{name}, {learnt.bits} bits, step {learnt.step}{_remark(learnt.record)}", fontsize=9)
        _plain(axes)
    figure.supxlabel("magnitude divided by its norm or clip value; lines: levels", fontsize=9)
    figure.supylabel("density", fontsize=9)
    return figure


def _remark(record: LearntRecord) -> str:
    """What a picture's title adds of clipping and rotation."""
    if record.rotation != "none":
        return "\nrotated: levels for normal coordinates"
    return f", clipped at {record.clip:.2g}" if record.clip else ""


def _newest_learnt(records: Sequence[StepRecord]) -> dict[str, _Learnt]:
    newest: dict[str, _Learnt] = {}
    for record in records:
        for entry in record.layer_types:
            if entry.learnt is not None and entry.levels is not None:
                newest[entry.layer_type] = _Learnt(
                    record.step, entry.bits, entry.coordinates, entry.learnt, entry.levels
                )
    return newest


def _right_end(learnt: _Learnt) -> float:
    """Where the axis ends: almost everything and at least half of the levels drawn lie below."""
    beyond = learnt.record.shares[-1]
    if beyond > 0.0:
        return 1.02
    for cell in range(len(MAGNITUDE_EDGES) - 2, 0, -1):
        beyond += learnt.record.shares[cell]
        if beyond > _LEAST_SHARE:
            half = learnt.levels[len(learnt.levels) // 2] if learnt.record.rotation == "none" else 0.0
            return 1.02 * max(MAGNITUDE_EDGES[cell + 1], half)
    return 1.02


def _bits(records: Sequence[StepRecord]) -> Any:
    curves: dict[str, list[tuple[int, float]]] = {}
    average: list[tuple[int, float]] = []
    for record in records:
        quantized = [entry for entry in record.layer_types if entry.bits != EXACT_BITS and entry.coordinates]
        for entry in quantized:
            curves.setdefault(entry.layer_type, []).append((record.step, float(entry.bits)))
        if quantized:
            coordinates = sum(entry.coordinates for entry in quantized)
            average.append((record.step, sum(entry.bits * entry.coordinates for entry in quantized) / coordinates))
    if not curves:
        return None
    return _curves({**curves, "average over coordinates": average}, "bits of a code word", is_step=True)


def _errors(records: Sequence[StepRecord]) -> Any:
    curves = _measured(records, lambda entry: entry.relative_error if entry.bits != EXACT_BITS else None)
    return _curves(curves, "squared error of a rank's messages, relative", is_logarithmic=True) if curves else None


def _bytes(records: Sequence[StepRecord]) -> Any:
    if not any(record.sent_bytes for record in records):
        return None
    curves = {
        "sent by this rank": [(record.step, record.sent_bytes / 1e6) for record in records],
        "what the host would have sent": [(record.step, record.raw_bytes / 1e6) for record in records],
    }
    return _curves(curves, "MB per step", is_logarithmic=True)


def _tails(records: Sequence[StepRecord]) -> Any:
    curves = _measured(records, lambda entry: None if entry.learnt is None else entry.learnt.tail_index)
    return _curves(curves, "tail index $\\gamma$ (largest tenth of the magnitudes)", marker="o") if curves else None


def _measured(
    records: Sequence[StepRecord], value: Callable[[Any], float | None]
) -> dict[str, list[tuple[int, float]]]:
    """Layer type -> (step, value) wherever it is known and finite."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for entry in record.layer_types:
            found = value(entry)
            if found is not None and math.isfinite(found):
                curves.setdefault(entry.layer_type, []).append((record.step, found))
    return curves


def _curves(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    label: str,
    is_logarithmic: bool = False,
    is_step: bool = False,
    marker: str | None = None,
) -> Any:
    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            label=name if index < _MOST_NAMED else None,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
            drawstyle="steps-post" if is_step else "default",
            marker=marker or ("o" if len(points) == 1 else None),
            markersize=4,
            linewidth=1.3,
        )
    if is_logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(label, fontsize=9)
    _plain(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float) -> Any:
    """A figure that draws into files alone: no display, and no state of pyplot's."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError("pictures need the package matplotlib: pip install 'hvd-qoda[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _log(written: Sequence[Path], options: argparse.Namespace, records: Path) -> None:
    try:
        import wandb
    except ImportError as error:
        raise ReportError("--wandb needs the package wandb: pip install 'hvd-qoda[wandb]'") from error
    resume = {} if options.wandb_run is None else {"id": options.wandb_run, "resume": "allow"}
    logged = wandb.init(
        project=options.wandb_project,
        mode=options.wandb,
        job_type="report",
        dir=str(options.out or records.parent),
        config={"records": str(records)},
        **resume,
    )
    logged.log({f"qoda/report/{picture.stem}": wandb.Image(str(picture)) for picture in written})
    logged.finish()
