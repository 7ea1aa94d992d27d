"""Reads the file of an offline W&B run: the transaction log `run-<id>.wandb`.

Seven bytes of file header, then blocks of 32 KiB as in LevelDB's log: pieces of checksum (4 bytes), length (2),
kind (1) and data; a record may be split over several pieces, and what is shorter than a piece's header at a block's
end is padding.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE_HEADER = 7
_BLOCK = 32 * 1024
_PIECE = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineRun:
    """What a run logged."""

    run_id: str
    project: str
    config: dict[str, Any]
    config_updates: int  # records that changed the configuration
    history: list[dict[str, Any]]
    exit_code: int | None

    def row(self, step: int) -> dict[str, Any]:
        rows = [row for row in self.history if row["_step"] == step]
        assert len(rows) == 1, f"step {step} is in the history {len(rows)} times"
        return rows[0]


def offline_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))


def read_finished_run(path: Path, timeout: float = 30.0) -> OfflineRun:
    """The run once its end is in the file: W&B's service goes on writing for a moment after `finish` has returned."""
    deadline = time.monotonic() + timeout
    while True:
        run = read_offline_run(path)
        if run.exit_code is not None:
            return run
        assert time.monotonic() < deadline, f"{path} has no end after {timeout} s"
        time.sleep(0.05)


def read_offline_run(path: Path) -> OfflineRun:
    """What the file holds now; a record that is not complete yet is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, project, exit_code, updates = "", "", None, 0
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    for data in _pieces_joined(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id, project = record.run.run_id, record.run.project
            config |= _items(record.run.config.update)
        elif kind == "config":
            updates += 1
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item) | {"_step": record.history.step.num})
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return OfflineRun(run_id, project, config, updates, history, exit_code)


def _items(items: Any) -> dict[str, Any]:
    """W&B takes dictionaries of a history row apart (`nested_key`); here they are whole again."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return values


def _pieces_joined(content: bytes) -> list[bytes]:
    assert content[:4] in (b"", b":W&B"), "not a W&B transaction log"
    records: list[bytes] = []
    joined, position = b"", _FILE_HEADER
    while position + _PIECE.size <= len(content):
        rest = _BLOCK - position % _BLOCK
        if rest < _PIECE.size:
            position += rest
            continue
        _, length, kind = _PIECE.unpack_from(content, position)
        position += _PIECE.size
        data = content[position : position + length]
        if len(data) < length:
            break
        position += length
        joined = data if kind in (_FULL, _FIRST) else joined + data
        if kind in (_FULL, _LAST):
            records.append(joined)
        else:
            assert kind in (_FIRST, _MIDDLE), f"unknown kind {kind} of piece"
    return records
