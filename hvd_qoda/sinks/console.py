"""Records as lines of text, for somebody who watches."""

from __future__ import annotations

from collections.abc import Callable

from hvd_qoda.telemetry import LayerTypeRecord, StartRecord, StepRecord, TelemetryError

__all__ = ["ConsoleSink"]


class ConsoleSink:
    """Prints one line for the first record, for every step divisible by `every`, and for the last record; and notes.

    every: in steps, at least 1, else TelemetryError.
    layer_types: print a row per layer type below each line.
    write: takes one line of plain text; give a progress bar's own print function to keep it intact.
    """

    def __init__(self, every: int = 100, layer_types: bool = False, write: Callable[[str], object] = print) -> None:
        if every < 1:
            raise TelemetryError(f"every is {every}, expected 1 or more")
        self._every = every
        self._layer_types = layer_types
        self._write = write
        self._printed: int | None = None
        self._last: StepRecord | None = None

    @property
    def every_rank(self) -> bool:
        """False: rank 0 prints."""
        return False

    def start(self, start: StartRecord) -> None:
        """Print the bits of each layer type."""
        bits = ", ".join(f"{name} {table.get('bits', '?')}" for name, table in start.codebooks.items())
        if bits:
            self._write(f"bits per layer type: {bits}")

    def write(self, record: StepRecord) -> None:
        """Print the record if its turn has come."""
        self._last = record
        if record.note is not None:
            self._write(f"step {record.step}: {record.note}")
        if self._printed is None or record.step % self._every == 0:
            self._print(record)

    def close(self, failed: bool = False) -> None:
        """Print the last record unless it is printed already."""
        if self._last is not None and self._last.step != self._printed:
            self._print(self._last)

    def _print(self, record: StepRecord) -> None:
        self._printed = record.step
        self._write(_summary(record))
        if self._layer_types:
            width = max((len(entry.layer_type) for entry in record.layer_types), default=0)
            for entry in record.layer_types:
                self._write(_row(entry, width))


def _summary(record: StepRecord) -> str:
    parts = [f"step {record.step}"]
    if record.layer_types:
        parts.append(f"sent {_size(record.sent_bytes)} of {_size(record.raw_bytes)}")
        if record.compression_ratio is not None:
            parts.append(f"ratio {record.compression_ratio:.2f}")
        if record.relative_error is not None:
            parts.append(f"error {record.relative_error:.2e}")
    parts.extend(f"{name} {value:.4g}" for name, value in {**record.step_sizes, **record.scalars}.items())
    return "  ".join(parts)


def _row(entry: LayerTypeRecord, width: int) -> str:
    error = "" if entry.relative_error is None else f"  error {entry.relative_error:.2e}"
    sizes = f"{_size(entry.sent_bytes):>10} of {_size(entry.raw_bytes):>10}"
    return f"  {entry.layer_type:<{width}}  {entry.bits:>2} bits  {entry.coordinates:>12,} coordinates  {sizes}{error}"


def _size(count: int) -> str:
    """Bytes in decimal units."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
