"""Checkpoints from which a run goes on with the bits it would have had without a break.

A checkpoint is a directory `step-00000100` with `shared.pt`, written by rank 0 (model and optimizer, equal on all
ranks), and `rank-0.pt`, `rank-1.pt` ... (what differs between ranks: compression, telemetry and random number state).
On several hosts the run directory must be on a file system that they share.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launch.train.ranks import Ranks, wait_for_all

_NAME = re.compile(r"step-(\d{8,})")
_SHARED = "shared.pt"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, or of a different run; the message says which."""


def save_checkpoint(
    directory: Path, step: int, ranks: Ranks, shared: Mapping[str, Any], own: Mapping[str, Any]
) -> Path:
    """Write the state after `step` steps below `directory`; complete or absent, even if the run dies meanwhile.

    `shared` is written by rank 0 alone, `own` by every rank. Returns the checkpoint's directory.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f"step-{step:08d}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    if ranks.is_first:
        torch.save({"step": step, "ranks": ranks.size, **shared}, partial / _SHARED)
    torch.save(dict(own), partial / _own_name(ranks.rank))
    wait_for_all(ranks, f"checkpoint.written.{step}")
    if ranks.is_first:
        _replace(partial, final)
    wait_for_all(ranks, f"checkpoint.named.{step}")
    return final


def load_checkpoint(path: Path, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """(shared, own) of the checkpoint `path`, or of the latest one where `path` is a run directory.

    Raises CheckpointError where there is none, or where it was written by another number of ranks.
    """
    directory = find_checkpoint(path)
    shared: dict[str, Any] = torch.load(directory / _SHARED, weights_only=True)
    if shared["ranks"] != ranks.size:
        raise CheckpointError(
            f"{directory} was written by {shared['ranks']} ranks and this run has {ranks.size}: "
            "the ranks' random numbers and shares of the data would differ; start it with as many"
        )
    own: dict[str, Any] = torch.load(directory / _own_name(ranks.rank), weights_only=True)
    return shared, own


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` names: itself, or the latest one in it or in its `checkpoints`."""
    if (path / _SHARED).is_file():
        return path
    for parent in (path, path / "checkpoints"):
        found = [entry for entry in parent.glob("step-*") if _NAME.fullmatch(entry.name)]
        if found:
            return max(found, key=lambda entry: int(entry.name.removeprefix("step-")))
    raise CheckpointError(f"no checkpoint at {path}, in it, or in {path / 'checkpoints'}")


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming every option that decides the result and differs."""
    differing = [key for key in sorted(saved.keys() | current.keys()) if _get(saved, key) != _get(current, key)]
    if differing:
        named = "; ".join(f"{key}: checkpoint {_get(saved, key)}, now {_get(current, key)}" for key in differing)
        raise CheckpointError(f"the checkpoint is of a run with other options ({named})")


def _get(options: Mapping[str, Any], key: str) -> Any:
    value = options.get(key, "absent")
    return list(value) if isinstance(value, tuple) else value


def _own_name(rank: int) -> str:
    return f"rank-{rank}.pt"


def _replace(partial: Path, final: Path) -> None:
    if final.exists():
        for old in final.iterdir():
            old.unlink()
        final.rmdir()
    partial.rename(final)
