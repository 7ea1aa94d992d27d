"""Records of the exchanges for `engine.monitor`, which hands them to W&B, TensorBoard, CSV files or Comet."""

from typing import Any

from hvd_qoda.telemetry import StartRecord, StepRecord, flat_metrics

__all__ = ["MonitorSink"]


class MonitorSink:
    """A sink of `hvd_qoda.telemetry` that writes to DeepSpeed's monitor.

    Events are named Train/<metric>, and counted in samples like DeepSpeed's own.

    Args:
        monitor: the engine's monitor.
        samples_per_step: the engine's train_batch_size.
    """

    every_rank = False

    def __init__(self, monitor: Any, samples_per_step: int) -> None:
        self._monitor = monitor
        self._samples_per_step = samples_per_step

    def start(self, start: StartRecord) -> None:
        """See `hvd_qoda.telemetry.Sink`; the monitor has its own way to log the configuration."""

    def write(self, record: StepRecord) -> None:
        """See `hvd_qoda.telemetry.Sink`."""
        samples = record.step * self._samples_per_step
        self._monitor.write_events([(f"Train/{name}", value, samples) for name, value in flat_metrics(record).items()])

    def close(self, failed: bool = False) -> None:
        """See `hvd_qoda.telemetry.Sink`; the monitor belongs to the engine."""
