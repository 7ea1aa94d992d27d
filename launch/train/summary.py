"""What a run comes to: totals over its steps' records, and its scores."""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_qoda.telemetry import LayerTypeRecord, StepRecord

_PROJECT = Path(__file__).resolve().parents[2]


def traffic_summary(records: Sequence[StepRecord]) -> dict[str, Any]:
    """Bytes and time per step of `records`, this rank's.

    Keys: `bytes_sent_per_step` (mean, measured at the collective calls), `step_ms` (median: forward, backward, exchange
    and optimizer step).
    """
    return {
        "bytes_sent_per_step": statistics.fmean(record.scalars["bytes_sent"] for record in records),
        "step_ms": statistics.median(record.scalars["step_ms"] for record in records),
    }


def layer_type_summary(records: Sequence[StepRecord]) -> dict[str, dict[str, Any]]:
    """Per layer type: bits, coordinates, bytes per step, and the relative quantization error (mean over the steps)."""
    grouped: dict[str, list[LayerTypeRecord]] = {}
    for record in records:
        for entry in record.layer_types:
            grouped.setdefault(entry.layer_type, []).append(entry)
    return {name: _one_layer_type(entries, len(records)) for name, entries in grouped.items()}


def _one_layer_type(entries: Sequence[LayerTypeRecord], steps: int) -> dict[str, Any]:
    errors = [entry.relative_error for entry in entries if entry.relative_error is not None]
    return {
        "bits": entries[-1].bits,
        "coordinates": entries[-1].coordinates,
        "bytes_raw_per_step": sum(entry.raw_bytes for entry in entries) / steps,
        "bytes_sent_per_step": sum(entry.sent_bytes for entry in entries) / steps,
        "relative_error": statistics.fmean(errors) if errors else None,
    }


def command() -> str:
    """What made a file of results: the program, by its path in the project, and its arguments."""
    program = Path(sys.argv[0]).resolve()
    if program.is_relative_to(_PROJECT):
        program = program.relative_to(_PROJECT)
    return shlex.join(["python", str(program), *sys.argv[1:]])


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `content` as indented JSON, null for NaN and infinities, making the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_strict(content), indent=2, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """`value` with null for what JSON has no number for: the loss of a run that diverged."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def write_everywhere(paths: Iterable[Path | None], content: Mapping[str, Any]) -> None:
    """Write `content` to each of `paths` that is given."""
    for path in paths:
        if path is not None:
            write_json(path, content)
