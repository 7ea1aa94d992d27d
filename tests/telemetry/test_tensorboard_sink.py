from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hvd_qoda.sinks.tensorboard import TensorBoardSink
from hvd_qoda.telemetry import StepRecord, Telemetry, TelemetryError, flat_metrics
from tests.telemetry.records import CODEBOOKS, LEVELS, bias, convolution


class Writer:
    """Has the methods of SummaryWriter that the sink uses, and keeps their arguments."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], list[float]] = {}
        self.texts: dict[str, str] = {}
        self.calls: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value

    def add_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        self.histograms[tag, step] = values.tolist()

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.texts[tag] = text

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


def log_two_steps(sink: TensorBoardSink) -> list[StepRecord]:
    with Telemetry([sink], config={"batch": 32}, on_error="raise") as telemetry:
        telemetry.start({}, CODEBOOKS)
        telemetry.log_exchange(0, [convolution(LEVELS), bias()], 0)
        telemetry.log(loss=1.5)
        telemetry.log_exchange(1, [convolution(), bias()], 0)
    return [
        StepRecord(0, (convolution(LEVELS), bias()), 0, scalars={"loss": 1.5}),
        StepRecord(1, (convolution(), bias()), 0),
    ]


def test_scalars_histograms_and_texts() -> None:
    writer = Writer()
    records = log_two_steps(TensorBoardSink(writer=writer))
    expected = {(name, r.step): value for r in records for name, value in flat_metrics(r).items()}
    assert writer.scalars == expected
    assert writer.histograms == {("qoda/convolution/levels", 0): list(LEVELS)}
    assert '"batch": 32' in writer.texts["qoda/config"]
    assert '"convolution"' in writer.texts["qoda/codebooks"]
    assert writer.calls == ["flush"], "somebody else's writer stays open"


def test_files_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_two_steps(TensorBoardSink(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("qoda/bytes_sent")] == [(0, 1948.0), (1, 1948.0)]
    assert [event.step for event in events.Histograms("qoda/convolution/levels")] == [0]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TelemetryError, match="pip install tensorboard"):
        Telemetry([TensorBoardSink(tmp_path)]).log(step=0)


def test_one_destination() -> None:
    with pytest.raises(TelemetryError, match="either a directory or an existing writer"):
        TensorBoardSink()
    with pytest.raises(TelemetryError, match="either a directory or an existing writer"):
        TensorBoardSink("folder", writer=Writer())
