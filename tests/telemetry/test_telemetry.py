from __future__ import annotations

import dataclasses
import io
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hvd_qoda.telemetry import LayerTypeRecord, StepRecord, Telemetry, TelemetryError, TelemetryWarning, flat_metrics
from tests.telemetry.records import CODEBOOKS, LEVELS, RecordingSink, StatefulRecordingSink, bias, convolution


def test_totals_of_a_step() -> None:
    record = StepRecord(7, (convolution(), bias(relative_error=0.0)))
    assert (record.raw_bytes, record.sent_bytes, record.coordinates) == (12400, 1948, 3100)
    assert record.compression_ratio == 12400 / 1948
    assert record.relative_error == pytest.approx(0.25 * 3000 / 3100)


def test_error_is_averaged_over_measured_types_only() -> None:
    assert StepRecord(0, (convolution(), bias(relative_error=None))).relative_error == 0.25
    assert StepRecord(0, (bias(relative_error=None),)).relative_error is None


def test_ratio_is_unknown_where_nothing_is_sent() -> None:
    assert StepRecord(0, (convolution(raw_bytes=0, sent_bytes=0),)).compression_ratio is None
    assert StepRecord(0).compression_ratio is None


def test_records_cannot_change() -> None:
    scalars = {"loss": 1.0}
    record = StepRecord(0, (convolution(),), scalars=scalars)
    scalars["loss"] = 2.0
    assert record.scalars == {"loss": 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.step = 1  # type: ignore[misc]  # the point of the test
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.layer_types[0].bits = 8  # type: ignore[misc]  # the point of the test


def test_records_hold_plain_numbers() -> None:
    entry = LayerTypeRecord(
        "bias", np.int64(5), np.int32(3), torch.tensor(12), np.int64(4), torch.tensor(0.5), torch.tensor([0.0, 1.0])
    )
    assert [type(value) for value in entry.to_dict().values()] == [str, int, int, int, int, float, list, type(None)]
    assert entry.levels == (0.0, 1.0)


def test_impossible_records_are_refused() -> None:
    with pytest.raises(TelemetryError, match=r"'convolution': sent_bytes is -1"):
        convolution(sent_bytes=-1)
    with pytest.raises(TelemetryError, match=r"step 3: layer types recorded twice: bias"):
        StepRecord(3, (bias(), bias()))


def test_a_record_survives_its_dictionary() -> None:
    record = StepRecord(4, (convolution(LEVELS), bias()), 2, {"gamma": 0.5}, {"loss": 1.5})
    assert StepRecord.from_dict(record.to_dict()) == record


def test_flat_metrics() -> None:
    record = StepRecord(4, (convolution(), bias()), 2, {"gamma": 0.5}, {"loss": 1.5})
    assert flat_metrics(record) == {
        "qoda/bytes_raw": 12400,
        "qoda/bytes_sent": 1948,
        "qoda/compression_ratio": 12400 / 1948,
        "qoda/relative_error": 0.25,
        "qoda/registry_version": 2,
        "qoda/convolution/bits": 3,
        "qoda/convolution/bytes_raw": 12000,
        "qoda/convolution/bytes_sent": 1500,
        "qoda/convolution/relative_error": 0.25,
        "qoda/bias/bits": 32,
        "qoda/bias/bytes_raw": 400,
        "qoda/bias/bytes_sent": 448,
        "step_size/gamma": 0.5,
        "loss": 1.5,
    }
    assert flat_metrics(StepRecord(4, scalars={"loss": 1.5})) == {"loss": 1.5}


def test_exchange_and_log_become_one_record() -> None:
    sink = RecordingSink()
    telemetry = Telemetry([sink])
    telemetry.log_exchange(0, [convolution(LEVELS), bias()], 0)
    telemetry.log(loss=2.0, step_sizes={"gamma": 0.1})
    telemetry.log(accuracy=0.5, loss=1.0)
    assert sink.records == [], "a step stays open until the next one"
    telemetry.log_exchange(1, [convolution(), bias()], 0)
    first = StepRecord(0, (convolution(LEVELS), bias()), 0, {"gamma": 0.1}, {"loss": 1.0, "accuracy": 0.5})
    assert sink.records == [first]
    telemetry.close()
    assert sink.records == [first, StepRecord(1, (convolution(), bias()), 0)]
    assert sink.closed == [False]


def test_without_a_compressor_the_loop_numbers_steps() -> None:
    sink = RecordingSink()
    with Telemetry([sink]) as telemetry:
        for step in (1, 2, 5):
            telemetry.log(step=step, loss=float(step))
            telemetry.log(step_ms=3)
    assert [(record.step, record.scalars) for record in sink.records] == [
        (step, {"loss": float(step), "step_ms": 3.0}) for step in (1, 2, 5)
    ]


def test_steps_are_numbered_here_if_the_caller_does_not() -> None:
    sink = RecordingSink()
    with Telemetry([sink]) as telemetry:
        telemetry.log_exchange(None, [convolution()], 0)
        telemetry.log(loss=1)
        telemetry.log_exchange(None, [convolution()], 0)
    with Telemetry([warm_up := RecordingSink()]) as telemetry:
        telemetry.log(step=9, loss=1)
        telemetry.log_exchange(None, [convolution()], 0)
        telemetry.log(loss=2)
    assert [record.step for record in sink.records] == [0, 1]
    assert [(record.step, record.scalars["loss"]) for record in warm_up.records] == [(9, 1.0), (10, 2.0)]


def test_exchanges_of_one_step_are_added_up() -> None:
    sink = RecordingSink()
    with Telemetry([sink]) as telemetry:
        telemetry.log_exchange(3, [convolution(), bias()], 1)
        telemetry.log_exchange(3, [convolution(LEVELS, coordinates=1000, relative_error=0.5)], 1)
    (record,) = sink.records
    assert record.layer_types == (
        convolution(LEVELS, coordinates=4000, raw_bytes=24000, sent_bytes=3000, relative_error=0.3125),
        bias(),
    )


def test_one_step_has_one_registry_version_and_one_width_per_type() -> None:
    telemetry = Telemetry()
    telemetry.log_exchange(3, [convolution()], 1)
    with pytest.raises(TelemetryError, match=r"step 3: exchanged with registry versions 1 and 2"):
        telemetry.log_exchange(3, [bias()], 2)
    with pytest.raises(TelemetryError, match=r"step 3: layer type 'convolution' exchanged with \[3, 5\] bits"):
        telemetry.log_exchange(3, [convolution(bits=5)], 1)


def test_log_needs_a_step() -> None:
    telemetry = Telemetry()
    with pytest.raises(TelemetryError, match=r"no step is open"):
        telemetry.log(loss=1.0)
    telemetry.log_exchange(0, [convolution()], 0)
    telemetry.flush()
    with pytest.raises(TelemetryError, match=r"no step is open"):
        telemetry.log(loss=1.0)


@pytest.mark.parametrize("step", [2, 3])
def test_written_steps_stay_written(step: int) -> None:
    telemetry = Telemetry()
    telemetry.log_exchange(3, [convolution()], 0)
    telemetry.flush()
    with pytest.raises(TelemetryError, match=rf"step {step} after step 3, which is written already"):
        telemetry.log(step=step, loss=1.0)
    with pytest.raises(TelemetryError, match=rf"step {step} after step 3, which is written already"):
        telemetry.log_exchange(step, [convolution()], 0)


def test_loop_and_compressor_that_count_differently_are_told() -> None:
    telemetry = Telemetry()
    telemetry.log_exchange(3, [convolution()], 0)
    with pytest.raises(TelemetryError, match=r"log\(step=4\) while step 3 is open"):
        telemetry.log(step=4, loss=1.0)
    with pytest.raises(TelemetryError, match=r"step 2 after step 3, which is open already"):
        telemetry.log(step=2, loss=1.0)
    telemetry.log(step=3, loss=1.0)
    telemetry.flush()
    telemetry.log(step=4, loss=1.0)
    assert telemetry.last_step == 4


def test_scalars_of_any_numeric_type() -> None:
    sink = RecordingSink()
    with warnings.catch_warnings(), Telemetry([sink]) as telemetry:
        warnings.simplefilter("error")
        loss = torch.tensor([3.0], requires_grad=True) / 2
        telemetry.log(step=0, a=1, b=np.float32(0.5), loss=loss, d=True, e=math.nan)
    scalars = dict(sink.records[0].scalars)
    assert math.isnan(scalars.pop("e"))
    assert scalars == {"a": 1.0, "b": 0.5, "loss": 1.5, "d": 1.0}
    assert {type(value) for value in scalars.values()} == {float}


@pytest.mark.parametrize("value", ["1.5", None, torch.ones(2), [1.0], 1j])
def test_scalars_that_are_no_number(value: object) -> None:
    telemetry = Telemetry()
    with pytest.raises(TelemetryError, match=r"scalar 'loss' is"):
        telemetry.log(step=0, loss=value)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TelemetryError, match=r"step size 'gamma' is"):
        telemetry.log(step=0, step_sizes={"gamma": value})  # type: ignore[dict-item]  # the point of the test


@pytest.mark.parametrize("name", ["qoda/bytes_sent", "step_size/gamma", "_step"])
def test_names_of_our_own_metrics_are_taken(name: str) -> None:
    with pytest.raises(TelemetryError, match=name):
        Telemetry().log(step=0, **{name: 1.0})


def test_only_rank_zero_writes_unless_a_sink_asks_for_all() -> None:
    zero, every = RecordingSink(), RecordingSink(every_rank=True)
    with Telemetry([zero, every], rank=1) as telemetry:
        telemetry.log_exchange(0, [convolution()], 0)
    assert (zero.starts, zero.records, zero.closed) == ([], [], [])
    assert [start.rank for start in every.starts] == [1]
    assert [record.step for record in every.records] == [0]


def test_configuration_and_codebooks_are_announced_once() -> None:
    sink = RecordingSink()
    telemetry = Telemetry([sink], config={"batch": 32, "data": Path("digits"), "seed": 0})
    telemetry.start({"qoda": {"bits": 3, "layers": ({"type": "bias"},)}, "seed": 1}, CODEBOOKS)
    assert sink.starts == [], "sinks start with the first record, so that a checkpoint can be loaded before"
    for step in range(3):
        telemetry.start({"seed": 1}, CODEBOOKS)
        telemetry.log_exchange(step, [convolution()], 0)
    (start,) = sink.starts
    assert start.config == {
        "batch": 32,
        "data": "digits",
        "seed": 1,
        "qoda": {"bits": 3, "layers": [{"type": "bias"}]},
    }
    assert start.codebooks == CODEBOOKS
    assert start.after_step is None


def test_what_changes_later_is_announced_between_records() -> None:
    sink = RecordingSink()
    with Telemetry([sink], config={"batch": 32}) as telemetry:
        telemetry.log(step=0, loss=1.0)
        telemetry.start({"bits": 3}, CODEBOOKS)
        telemetry.log_exchange(1, [convolution()], 0)
    assert sink.events == ["start", "step 0", "start", "step 1"]
    assert [dict(start.config) for start in sink.starts] == [{"batch": 32}, {"batch": 32, "bits": 3}]
    assert [start.after_step for start in sink.starts] == [None, 0]


def test_configuration_of_dataclasses_and_other_values() -> None:
    @dataclasses.dataclass
    class Part:
        rate: float
        dtype: torch.dtype

    sink = RecordingSink()
    telemetry = Telemetry([sink], config={"part": Part(0.1, torch.float16), "object": SimpleNamespace(a=1), 3: None})
    telemetry.log(step=0)
    assert sink.starts[0].config == {
        "part": {"rate": 0.1, "dtype": "torch.float16"},
        "object": "namespace(a=1)",
        "3": None,
    }


def test_a_sink_that_cannot_start_stops_the_first_step() -> None:
    telemetry = Telemetry([RecordingSink(fails={"start": PermissionError("folder is read-only")})])
    with pytest.raises(TelemetryError, match=r"RecordingSink could not start: PermissionError: folder is read-only"):
        telemetry.log_exchange(0, [convolution()], 0)


def test_a_sink_that_fails_warns_once_and_counts() -> None:
    broken, sound = RecordingSink(fails={"write": OSError(28, "No space left on device")}), RecordingSink()
    telemetry = Telemetry([broken, sound])

    def steps() -> None:
        for step in range(5):
            if step == 4:  # steps 0 to 2 have been written by now, in vain
                broken.fails.clear()
            telemetry.log_exchange(step, [convolution()], 0)
        telemetry.close()

    with pytest.warns(TelemetryWarning) as caught:
        steps()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert "RecordingSink could not write step 0: OSError: [Errno 28] No space left on device" in messages[0]
    assert "3 of 5 records are missing from RecordingSink" in messages[1]
    assert [record.step for record in broken.records] == [3, 4]
    assert [record.step for record in sound.records] == [0, 1, 2, 3, 4]


def test_a_sink_that_fails_may_stop_the_training() -> None:
    broken, sound = RecordingSink(fails={"write": OSError("disk full")}), RecordingSink()
    telemetry = Telemetry([broken, sound], on_error="raise")
    telemetry.log_exchange(0, [convolution()], 0)
    with pytest.raises(TelemetryError, match=r"could not write step 0: OSError: disk full") as caught:
        telemetry.log_exchange(1, [convolution()], 0)
    assert isinstance(caught.value.__cause__, OSError)
    assert [record.step for record in sound.records] == [0], "another sink's failure keeps nothing from a sink"


def test_sinks_do_not_hide_the_error_that_ended_training() -> None:
    broken, sound = RecordingSink(fails={"write": OSError("a"), "close": OSError("b")}), RecordingSink()

    def training() -> None:
        with Telemetry([broken, sound], on_error="raise") as telemetry:
            telemetry.log_exchange(0, [convolution()], 0)
            raise ZeroDivisionError

    with pytest.warns(TelemetryWarning) as caught, pytest.raises(ZeroDivisionError):
        training()
    assert [str(warning.message).split(" (")[0].removeprefix("telemetry: ") for warning in caught] == [
        "RecordingSink could not write step 0: OSError: a",
        "1 of 1 records are missing from RecordingSink",
        "RecordingSink could not close: OSError: b",
    ]
    assert [record.step for record in sound.records] == [0]
    assert sound.closed == [True]


def test_a_sink_that_cannot_close_is_told_and_the_others_close() -> None:
    broken, sound = RecordingSink(fails={"close": OSError("gone")}), RecordingSink()
    telemetry = Telemetry([broken, sound], on_error="raise")
    with pytest.raises(TelemetryError, match=r"could not close: OSError: gone"):
        telemetry.close()
    assert sound.closed == [False]


def test_closed_is_closed() -> None:
    sink = RecordingSink()
    telemetry = Telemetry([sink])
    telemetry.close()
    telemetry.close()
    assert sink.closed == [False]
    for call in (
        lambda: telemetry.log(step=0),
        lambda: telemetry.log_exchange(0, [], 0),
        telemetry.flush,
        telemetry.start,
    ):
        with pytest.raises(TelemetryError, match="closed"):
            call()


def test_arguments_are_checked() -> None:
    with pytest.raises(TelemetryError, match=r"on_error is 'ignore'"):
        Telemetry(on_error="ignore")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TelemetryError, match=r"rank is -1"):
        Telemetry(rank=-1)


def test_resuming_goes_on_as_if_never_interrupted() -> None:
    def steps(telemetry: Telemetry, first: int, last: int) -> None:
        for step in range(first, last):
            telemetry.log_exchange(step, [convolution(sent_bytes=step)], 0)
            telemetry.log(loss=step)

    whole = RecordingSink()
    with Telemetry([whole]) as telemetry:
        steps(telemetry, 0, 6)

    before, after = RecordingSink(), StatefulRecordingSink(0)
    telemetry = Telemetry([RecordingSink(), StatefulRecordingSink(17), before])
    steps(telemetry, 0, 3)
    checkpoint = io.BytesIO()
    torch.save(telemetry.state_dict(), checkpoint)
    checkpoint.seek(0)
    with Telemetry([after]) as telemetry:
        telemetry.load_state_dict(torch.load(checkpoint, weights_only=True))
        assert telemetry.last_step == 2
        telemetry.log(loss=2)  # a checkpoint may be taken before the loop has logged
        steps(telemetry, 3, 6)
    assert before.records + after.records == whole.records
    assert after.starts[0].after_step == 1
    assert after.number == 17


def test_state_is_loaded_before_the_first_step() -> None:
    state = Telemetry().state_dict()
    telemetry = Telemetry()
    telemetry.log(step=0)
    with pytest.raises(TelemetryError, match="must come before the first"):
        telemetry.load_state_dict(state)


def test_a_restored_record_is_written_at_the_end_of_a_run_without_steps() -> None:
    telemetry = Telemetry()
    telemetry.log_exchange(5, [convolution()], 0)
    state = telemetry.state_dict()
    for failed, expected in ((False, [5]), (True, [])):
        sink = RecordingSink()
        resumed = Telemetry([sink])
        resumed.load_state_dict(state)
        resumed.close(failed=failed)
        assert [record.step for record in sink.records] == expected
