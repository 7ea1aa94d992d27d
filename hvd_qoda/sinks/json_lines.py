"""Records as JSON lines: one file, one JSON object per line, written at once and safe to append to.

Lines: {"event": "start", "format": 1, "rank", "after_step", "config", "codebooks"} and {"event": "step", "step", ...}
    with the keys of
`StepRecord.to_dict`. The JSON is strict: NaN and infinities are the strings "NaN", "Infinity" and "-Infinity", so that
they stay different from null, which means "not measured".
"""

from __future__ import annotations

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from hvd_qoda.telemetry import StartRecord, StepRecord, TelemetryError

__all__ = ["JsonLinesSink", "read_json_lines", "read_steps"]

_FORMAT = 1
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_NUMERIC = ("compression_ratio", "relative_error", "step_sizes", "scalars", "layer_types")


class JsonLinesSink:
    """Appends every record to a file, each line handed to the operating system whole before `write` returns.

    path: the file; folders are made. With "{rank}" in it every rank writes a file of its own, otherwise rank 0 only.

    An existing file is continued: a resumed run goes on after its last checkpoint, another run begins with a start line
        of its own,
    and `read_steps` tells them apart. A last line cut short by a crash is removed first. Raises TelemetryError if the
    file holds something else, OSError if it cannot be written; a write that fails half-way is taken back, so that later
    lines stay readable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._template = os.fspath(path)
        self._file: FileIO | None = None

    @property
    def every_rank(self) -> bool:
        """True where the path names the rank."""
        return "{rank}" in self._template

    def path(self, rank: int = 0) -> Path:
        """The file that a rank writes."""
        return Path(self._template.replace("{rank}", str(rank)))

    def start(self, start: StartRecord) -> None:
        """Open the file and append the start line."""
        if self._file is None:
            path = self.path(start.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_to_append(path)
        self._append(
            {
                "event": "start",
                "format": _FORMAT,
                "rank": start.rank,
                "after_step": start.after_step,
                "config": start.config,
                "codebooks": start.codebooks,
            }
        )

    def write(self, record: StepRecord) -> None:
        """Append the record's line."""
        self._append({"event": "step", **record.to_dict()})

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            raise TelemetryError("JsonLinesSink: start() comes before write()")
        line = memoryview(json.dumps(_strict(entry), allow_nan=False).encode() + b"\n")
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of a file as written, oldest first, with NaN and infinities restored in the steps' numbers.

    A last line without line feed was cut short by a crash and is left out. Raises TelemetryError, naming the line, if
    one is not an event of this format.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def read_steps(path: str | os.PathLike[str]) -> list[StepRecord]:
    """The steps of the file's last run, each once, in order.

    Where a run was resumed from a checkpoint, the steps that it did again replace the earlier ones. Raises as
    `read_json_lines`.
    """
    steps: list[StepRecord] = []
    for entry in read_json_lines(path):
        if entry["event"] == "step":
            steps.append(StepRecord.from_dict({key: value for key, value in entry.items() if key != "event"}))
        else:
            after = entry["after_step"]
            steps = [] if after is None else [record for record in steps if record.step <= after]
    return steps


def _open_to_append(path: Path) -> FileIO:
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by close()
    try:
        _check_and_repair(path, file)
    except BaseException:
        file.close()
        raise
    return file


def _check_and_repair(path: Path, file: FileIO) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(0)
    first = file.readline()
    if not first.endswith(b"\n") or _parse(path, 1, first)["event"] != "start":
        raise TelemetryError(f"{path} exists and does not begin with a start line of telemetry: choose another path")
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.readall().rfind(b"\n") + 1)


def _parse(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise TelemetryError(f"{os.fspath(path)}, line {number}: not JSON ({error})") from error
    if not isinstance(entry, dict) or entry.get("event") not in ("start", "step"):
        raise TelemetryError(f"{os.fspath(path)}, line {number}: not an event of telemetry")
    if entry["event"] == "start":
        if entry.get("format") != _FORMAT:
            raise TelemetryError(f"{os.fspath(path)}, line {number}: format {entry.get('format')}, expected {_FORMAT}")
        return entry
    return {key: _restore(value) if key in _NUMERIC else value for key, value in entry.items()}


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    return value


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        # A layer type may be called anything: its name is no number.
        return {key: entry if key == "layer_type" else _restore(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_restore(entry) for entry in value]
    return value
