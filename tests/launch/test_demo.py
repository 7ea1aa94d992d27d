"""The demo from end to end, with few steps: its summary, records, plot and messages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("horovod.torch")

from launch.train.demo import update_steps

ROOT = Path(__file__).resolve().parents[2]
RUN_KEYS = {"test_accuracy", "train_loss", "bytes_sent_per_step", "step_ms"}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/train/demo.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_demo_writes_what_it_promises(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    outcome = demo("--steps", "30", "--run-dir", str(tmp_path / "demo"), "--json", str(copy))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(summary) == {"fp32", "qoda", "bits_per_coordinate", "compression_ratio", "replicas_identical"}
    assert json.loads(copy.read_text()) == summary
    for name in ("fp32", "qoda"):
        assert set(summary[name]) >= RUN_KEYS
        assert summary[name]["steps"] == 30
        assert (tmp_path / "demo" / name / "steps.jsonl").read_text().count('"event": "step"') == 30
    assert summary["replicas_identical"] is True
    assert summary["fp32"]["bytes_sent_per_step"] == 4 * 296_770
    assert summary["compression_ratio"] == pytest.approx(
        summary["fp32"]["bytes_sent_per_step"] / summary["qoda"]["bytes_sent_per_step"]
    )
    # Two updates of the levels within 30 steps cost more than they would in a longer run.
    assert 5.0 < summary["compression_ratio"] < 6.4
    assert 5.0 < summary["bits_per_coordinate"] < 5.2
    assert summary["fp32"]["test_accuracy"] > 0.5
    assert summary["qoda"]["test_accuracy"] > 0.5
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    for shown in ("test accuracy", "bytes sent per rank and step", "error [3], feed_forward", "demo.png"):
        assert shown in outcome.stdout


def test_a_failure_of_a_rank_is_shown(tmp_path: Path) -> None:
    outcome = demo("--steps", "2", "--run-dir", str(tmp_path / "demo"), "--data", str(tmp_path / "absent"))
    assert outcome.returncode == 1
    assert "The end of its output" in outcome.stderr
    assert "train-images-idx3-ubyte" in outcome.stderr
    assert not (tmp_path / "demo" / "summary.json").exists()


@pytest.mark.parametrize(("steps", "expected"), [(300, "20,100"), (30, "2,10"), (1, "1")])
def test_levels_are_fitted_early_and_once_more(steps: int, expected: str) -> None:
    assert update_steps(steps) == expected
