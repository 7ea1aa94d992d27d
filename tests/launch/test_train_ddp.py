"""The training program for DistributedDataParallel, under the real torchrun."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launcher import ROOT, child_environment


def torchrun(folder: Path, name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = folder / f"{name}.json"
    outcome = subprocess.run(
        [*command, "launch/train/ddp.py", "--json", str(path), *options],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


@pytest.mark.distributed
def test_training_and_checkpoint(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint.pt"
    summary = torchrun(tmp_path, "whole", "--steps", "6", "--save", str(saved))
    assert summary["replicas_identical"]
    assert summary["bytes_sent_per_step"] < 296_770 * 4 / 5.5  # DDP's all-reduce would send 4 bytes per parameter
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["steps"] == checkpoint["hook"]["step"] == 6


def test_without_torchrun_it_says_how() -> None:
    outcome = subprocess.run(
        [sys.executable, "launch/train/ddp.py"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 2
    assert "run it under torchrun" in outcome.stderr
