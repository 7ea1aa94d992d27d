"""Records as TensorBoard scalars."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from hvd_qoda.telemetry import StartRecord, StepRecord, TelemetryError, flat_metrics

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """Writes the names of `flat_metrics` as scalars, changed levels as histograms, configuration and codebooks as text.

    directory: TensorBoard's log folder; or
    writer: an existing `torch.utils.tensorboard.SummaryWriter`, which then stays open at close.

    Exactly one of them, else TelemetryError. Starting raises TelemetryError if the package tensorboard is not
    installed.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, *, writer: Any = None) -> None:
        if (directory is None) == (writer is None):
            raise TelemetryError("TensorBoardSink takes either a directory or an existing writer")
        self._directory = directory
        self._writer = writer

    @property
    def every_rank(self) -> bool:
        """False: rank 0 writes."""
        return False

    def start(self, start: StartRecord) -> None:
        """Open the folder; log configuration and codebooks."""
        if self._writer is None:
            self._writer = _summary_writer(self._directory)
        step = 0 if start.after_step is None else start.after_step + 1
        for name, table in (("config", start.config), ("codebooks", start.codebooks)):
            text = json.dumps(table, indent=2)
            self._writer.add_text(f"qoda/{name}", f"```\n{text}\n```", step)

    def write(self, record: StepRecord) -> None:
        """Log one step."""
        for name, value in flat_metrics(record).items():
            self._writer.add_scalar(name, value, record.step)
        for entry in record.layer_types:
            if entry.levels:
                self._writer.add_histogram(f"qoda/{entry.layer_type}/levels", np.array(entry.levels), record.step)

    def close(self, failed: bool = False) -> None:
        """Write out what is buffered; close the writer if it was opened here."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._directory is not None:
            self._writer.close()


def _summary_writer(directory: str | os.PathLike[str] | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TelemetryError("TensorBoardSink needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(directory)
