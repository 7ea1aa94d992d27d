"""Records and sinks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_qoda.telemetry import LayerTypeRecord, StartRecord, StepRecord

LEVELS = (0.0, 0.125, 0.5, 1.0)

CODEBOOKS = {
    "convolution": {"bits": 3, "levels": list(LEVELS), "bucket_size": 512, "norm": "max"},
    "bias": {"bits": 32, "levels": [], "bucket_size": 512, "norm": "max"},
}


def convolution(levels: tuple[float, ...] | None = None, **changes: Any) -> LayerTypeRecord:
    values = {"bits": 3, "coordinates": 3000, "raw_bytes": 12000, "sent_bytes": 1500, "relative_error": 0.25}
    return LayerTypeRecord("convolution", levels=levels, **(values | changes))


def bias(**changes: Any) -> LayerTypeRecord:
    return LayerTypeRecord("bias", **({"bits": 32, "coordinates": 100, "raw_bytes": 400, "sent_bytes": 448} | changes))


class RecordingSink:
    """Keeps what it is told; fails at the named actions."""

    def __init__(self, every_rank: bool = False, fails: Mapping[str, Exception] | None = None) -> None:
        self.every_rank = every_rank
        self.fails = dict(fails or {})
        self.starts: list[StartRecord] = []
        self.records: list[StepRecord] = []
        self.closed: list[bool] = []
        self.events: list[str] = []

    def start(self, start: StartRecord) -> None:
        self._maybe_fail("start")
        self.starts.append(start)
        self.events.append("start")

    def write(self, record: StepRecord) -> None:
        self._maybe_fail("write")
        self.records.append(record)
        self.events.append(f"step {record.step}")

    def close(self, failed: bool = False) -> None:
        self._maybe_fail("close")
        self.closed.append(failed)

    def _maybe_fail(self, action: str) -> None:
        if action in self.fails:
            raise self.fails[action]


class StatefulRecordingSink(RecordingSink):
    """Has one number to carry over."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number = state["number"]
