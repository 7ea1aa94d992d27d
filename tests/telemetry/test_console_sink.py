from __future__ import annotations

import pytest

from hvd_qoda.sinks.console import ConsoleSink
from hvd_qoda.telemetry import StepRecord, Telemetry, TelemetryError
from tests.telemetry.records import CODEBOOKS, bias, convolution


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry([ConsoleSink(every=10)]) as telemetry:
        telemetry.start({}, CODEBOOKS)
        for step in range(1, 13):
            telemetry.log_exchange(step, [convolution(), bias()], 0)
            telemetry.log(loss=1 / step, step_sizes={"gamma": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "bits per layer type: convolution 3, bias 32",
        "step 1  sent 1.95 kB of 12.40 kB  ratio 6.37  error 2.50e-01  gamma 0.5  loss 1",
        "step 10  sent 1.95 kB of 12.40 kB  ratio 6.37  error 2.50e-01  gamma 0.5  loss 0.1",
        "step 12  sent 1.95 kB of 12.40 kB  ratio 6.37  error 2.50e-01  gamma 0.5  loss 0.08333",
    ]


def test_last_record_is_printed_once() -> None:
    lines: list[str] = []
    with Telemetry([ConsoleSink(every=5, write=lines.append)]) as telemetry:
        for step in range(6):
            telemetry.log(step=step, loss=2.0)
    assert lines == ["step 0  loss 2", "step 5  loss 2"]


def test_rows_per_layer_type() -> None:
    lines: list[str] = []
    ConsoleSink(layer_types=True, write=lines.append).write(
        StepRecord(0, (convolution(), bias(), convolution().__class__("output", 8, 2_500_000, 10_000_000_000, 999)))
    )
    assert lines[1:] == [
        "  convolution   3 bits         3,000 coordinates     1.50 kB of   12.00 kB  error 2.50e-01",
        "  bias         32 bits           100 coordinates       448 B of      400 B",
        "  output        8 bits     2,500,000 coordinates       999 B of   10.00 GB",
    ]


def test_nothing_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry([ConsoleSink(every=1)], rank=1) as telemetry:
        telemetry.log(step=0, loss=1.0)
    assert capsys.readouterr().out == ""


def test_every_is_checked() -> None:
    with pytest.raises(TelemetryError, match="every is 0"):
        ConsoleSink(every=0)
