"""Records of the exchanges for `engine.monitor`, which hands them to W&B, TensorBoard, CSV files or Comet."""

from typing import Any

from hvd_qoda.telemetry import StartRecord, StepRecord, Telemetry, flat_metrics

__all__ = ["MonitorSink", "MonitorTelemetry"]


class MonitorSink:
    """A sink of `hvd_qoda.telemetry` that writes to DeepSpeed's monitor.

    Events are named Train/<metric>, and counted in samples like DeepSpeed's own.

    Args:
        monitor: the engine's monitor.
    """

    every_rank = False

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self.samples = 0  # the engine's global_samples behind the step whose record is written next

    def start(self, start: StartRecord) -> None:
        """See `hvd_qoda.telemetry.Sink`; the monitor has its own way to log the configuration."""

    def write(self, record: StepRecord) -> None:
        """See `hvd_qoda.telemetry.Sink`."""
        metrics = flat_metrics(record)
        self._monitor.write_events([(f"Train/{name}", value, self.samples) for name, value in metrics.items()])

    def close(self, failed: bool = False) -> None:
        """See `hvd_qoda.telemetry.Sink`; the monitor belongs to the engine."""


class MonitorTelemetry(Telemetry):
    """A telemetry for DeepSpeed's monitor alone, whose records wait until DeepSpeed has counted the step's samples.

    Args:
        monitor: the engine's monitor.
        rank: the engine's global rank.
    """

    def __init__(self, monitor: Any, rank: int) -> None:
        self._sink = MonitorSink(monitor)
        super().__init__([self._sink], rank=rank)

    def write_step(self, samples: int) -> None:
        """Write the record of the step that has just ended.

        Args:
            samples: the engine's global_samples.
        """
        self._sink.samples = samples
        self.flush()
