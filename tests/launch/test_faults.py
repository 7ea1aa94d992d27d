"""Programs of every shape end in good order. Ranks that die are counted by hand: launch/bench/faults.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.bench.fault_ranks import DDP, ZERO
from tests.launcher import ROOT, child_environment

pytestmark = pytest.mark.distributed


def counted(path: Path, front: str, runs: int) -> list[dict[str, Any]]:
    command = [sys.executable, "launch/bench/faults.py", "--fronts", front, "--faults", "none", "--runs", str(runs)]
    command += ["--ranks", "2", "--jobs", "4", "--timeout-s", "4", "--grace-s", "20", "--end-s", "20"]
    command += ["--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


@pytest.mark.parametrize("front", [DDP, "overlapping Horovod optimizer", "DeepSpeed ZeRO 2"])
def test_programs_end_in_good_order(front: str, tmp_path: Path) -> None:
    """Where model, state and hook die with a function's locals, too: PyTorch aborts if a thread is still about them."""
    if front in ZERO:
        pytest.importorskip("deepspeed")
    (row,) = counted(tmp_path / "ends.json", front, 8 if front == DDP else 3)
    assert row["ended"] == row["runs"]
