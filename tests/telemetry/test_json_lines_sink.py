from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hvd_qoda.sinks.json_lines import JsonLinesSink, read_json_lines, read_steps
from hvd_qoda.telemetry import StartRecord, StepRecord, Telemetry, TelemetryError, TelemetryWarning
from tests.telemetry.records import CODEBOOKS, LEVELS, bias, convolution


def run(path: Path, first: int, last: int, state: dict | None = None, loss: float = 0.0) -> dict:
    """Steps first..last-1 of a run that is then cut off; returns its state after the last."""
    telemetry = Telemetry([JsonLinesSink(path)], config={"batch": 32})
    if state is not None:
        telemetry.load_state_dict(state)
    telemetry.start({"bits": 3}, CODEBOOKS)
    for step in range(first, last):
        telemetry.log_exchange(step, [convolution(LEVELS if step == 0 else None), bias()], 0)
        telemetry.log(loss=step + loss, step_sizes={"gamma": 0.5})
    return telemetry.state_dict()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.jsonl"
    records = [
        StepRecord(0, (convolution(LEVELS), bias()), 0, {"gamma": 0.5}, {"loss": 1.0}),
        StepRecord(1, (convolution(), bias()), 1),
        StepRecord(2, scalars={"accuracy": 0.75}),
    ]
    sink = JsonLinesSink(path)
    sink.start(StartRecord({"batch": 32}, CODEBOOKS))
    for record in records:
        sink.write(record)
    sink.close()

    assert read_steps(path) == records
    start, *steps = read_json_lines(path)
    assert start == {
        "event": "start",
        "format": 1,
        "rank": 0,
        "after_step": None,
        "config": {"batch": 32},
        "codebooks": CODEBOOKS,
    }
    assert [step["event"] for step in steps] == ["step"] * 3
    assert steps[0]["sent_bytes"] == 1948
    assert steps[0]["layer_types"][0]["levels"] == list(LEVELS)
    assert steps[1]["layer_types"][0]["levels"] is None
    assert steps[2]["relative_error"] is None


def test_lines_are_strict_json_and_non_finite_numbers_survive(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = JsonLinesSink(path)
    sink.start(StartRecord({"limit": math.inf, "name": "NaN"}, {}))
    scalars = {"up": math.inf, "down": -math.inf, "none": math.nan}
    sink.write(StepRecord(0, (convolution(relative_error=math.nan), bias()), 0, {"gamma": math.inf}, scalars))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    start, step = read_json_lines(path)
    assert start["config"] == {"limit": "Infinity", "name": "NaN"}
    assert (step["scalars"]["up"], step["scalars"]["down"]) == (math.inf, -math.inf)
    assert math.isnan(step["scalars"]["none"])
    assert math.isnan(step["relative_error"])
    (record,) = read_steps(path)
    assert math.isnan(record.layer_types[0].relative_error)
    assert record.layer_types[1].relative_error is None, "not measured is not NaN"
    assert record.step_sizes == {"gamma": math.inf}


def test_a_line_is_in_the_file_before_write_returns(tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "run.jsonl")
    sink.start(StartRecord({}, {}))
    for step in range(3):
        sink.write(StepRecord(step))
        assert len(read_steps(tmp_path / "run.jsonl")) == step + 1


def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    state = run(path, 0, 4)  # steps 0 to 2 are written, 3 is open and in the state
    run(path, 4, 7, state)  # writes 3 to 5, then is lost
    run(path, 4, 6, state, loss=0.5)  # the same checkpoint again
    losses = [(record.step, record.scalars["loss"]) for record in read_steps(path)]
    assert losses == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5)]
    starts = [entry for entry in read_json_lines(path) if entry["event"] == "start"]
    assert [start["after_step"] for start in starts] == [None, 2, 2]


def test_another_run_in_the_same_file_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(path, 0, 5)
    run(path, 0, 3, loss=0.25)
    assert [(record.step, record.scalars["loss"]) for record in read_steps(path)] == [(0, 0.25), (1, 1.25)]
    assert len(read_json_lines(path)) == 1 + 4 + 1 + 2, "nothing is lost"


def test_a_line_cut_short_is_left_out_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    state = run(path, 0, 3)
    with path.open("ab") as file:
        file.write(b'{"event": "step", "st')
    assert [record.step for record in read_steps(path)] == [0, 1]
    run(path, 3, 5, state)
    assert [record.step for record in read_steps(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [b"name,value\n1,2\n", b"no line feed", b'{"event": "step", "step": 0}\n', b"[]\n"])
def test_other_files_are_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(content)
    with pytest.raises(TelemetryError, match=r"results\.csv"):
        JsonLinesSink(path).start(StartRecord({}, {}))
    assert path.read_bytes() == content


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(path, 0, 3)
    lines = path.read_text().splitlines()
    for line, message in (
        ("{oops", "line 2: not JSON"),
        ('{"event": "stop"}', "line 2: not an event"),
        ('{"event": "start", "format": 9}', "line 2: format 9, expected 1"),
    ):
        path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        with pytest.raises(TelemetryError, match=message):
            read_json_lines(path)


def test_each_rank_has_a_file_where_the_path_names_it(tmp_path: Path) -> None:
    for rank in range(2):
        sink = JsonLinesSink(tmp_path / "rank{rank}.jsonl")
        with Telemetry([sink, JsonLinesSink(tmp_path / "zero.jsonl")], rank=rank) as telemetry:
            telemetry.log(step=rank)
        assert sink.path(rank) == tmp_path / f"rank{rank}.jsonl"
    assert {path.name for path in tmp_path.iterdir()} == {"rank0.jsonl", "rank1.jsonl", "zero.jsonl"}
    assert read_json_lines(tmp_path / "rank1.jsonl")[0]["rank"] == 1
    assert [record.step for record in read_steps(tmp_path / "zero.jsonl")] == [0]


class FileThatFills:
    """A file whose next write stores five bytes, and the one after fails; later ones work."""

    def __init__(self, file) -> None:
        self._file = file
        self._answers = [5, None]

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, data) -> int:
        if not self._answers:
            return self._file.write(data)
        answer = self._answers.pop(0)
        if answer is None:
            raise OSError(28, "No space left on device")
        return self._file.write(data[:answer])


def test_a_full_disk_costs_only_the_records_that_did_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    sink = JsonLinesSink(path)
    telemetry = Telemetry([sink])
    for step in range(2):
        telemetry.log(step=step)
    sink._file = FileThatFills(sink._file)
    with pytest.warns(TelemetryWarning, match=r"could not write step 1: OSError: .* No space left on device"):
        telemetry.log(step=2)
    with pytest.warns(TelemetryWarning, match=r"1 of 3 records are missing from JsonLinesSink"):
        telemetry.close()
    assert [record.step for record in read_steps(path)] == [0, 2]


def test_start_comes_first(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match=r"start\(\) comes before write\(\)"):
        JsonLinesSink(tmp_path / "run.jsonl").write(StepRecord(0))


def test_steps_done_again_after_a_rewind_replace_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with Telemetry([JsonLinesSink(path)]) as telemetry:
        for step in (1, 2, 3):
            telemetry.log(step, loss=float(step))
        telemetry.rewind(1)
        telemetry.rewind(5)  # nothing beyond it: no effect
        for step in (2, 3, 4):
            telemetry.log(step, loss=10.0 * step)
    found = [(record.step, record.scalars["loss"]) for record in read_steps(path)]
    assert found == [(1, 1.0), (2, 20.0), (3, 30.0), (4, 40.0)]
