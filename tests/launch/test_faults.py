"""Ranks that are killed, stop, raise or lose their connections: the others raise, end, and leave no half checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.bench.fault_ranks import DDP, FRONTS, ZERO
from tests.launcher import ROOT, child_environment

pytestmark = pytest.mark.distributed

_FAULTS = ("killed", "stopped", "raised", "connections lost")


def counted(path: Path, front: str, faults: tuple[str, ...], runs: int) -> list[dict[str, Any]]:
    command = [sys.executable, "launch/bench/faults.py", "--fronts", front, "--faults", *faults, "--runs", str(runs)]
    command += ["--ranks", "2", "--jobs", "4", "--timeout-s", "4", "--grace-s", "20", "--end-s", "20"]
    command += ["--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


@pytest.mark.parametrize("front", FRONTS)
def test_the_other_ranks_raise(front: str, tmp_path: Path) -> None:
    if front in ZERO:
        pytest.importorskip("deepspeed")
    faults = _FAULTS[:3] if front in ZERO else _FAULTS
    runs = 3 if front == DDP else 1 if front in ZERO else 2
    for row in counted(tmp_path / "faults.json", front, faults, runs):
        assert row["raised"] == row["runs"] == runs
        assert row["orphans"] == 0


@pytest.mark.parametrize("front", [DDP, "overlapping Horovod optimizer", "DeepSpeed ZeRO 2"])
def test_programs_end_in_good_order(front: str, tmp_path: Path) -> None:
    """Where model, state and hook die with a function's locals, too: PyTorch aborts if a thread is still about them."""
    if front in ZERO:
        pytest.importorskip("deepspeed")
    (row,) = counted(tmp_path / "ends.json", front, ("none",), 8 if front == DDP else 3)
    assert row["ended"] == row["runs"]
