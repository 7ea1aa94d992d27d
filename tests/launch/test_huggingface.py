"""Hugging Face's Trainer under DeepSpeed's launcher, and accelerate's loop under its own, with compressed gradients."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import ROOT, child_environment

MISSING = [p for p in ("deepspeed", "accelerate", "transformers", "sklearn") if importlib.util.find_spec(p) is None]
PROGRAM = "launch/train/huggingface.py"
SMALL = ["--width", "64", "--layers", "1", "--context", "32", "--batch-size", "2", "--threads", "1", "--steps", "6"]
LAUNCHERS = {
    "trainer": ["deepspeed", "--num_gpus", "2", PROGRAM, "--deepspeed", "launch/configs/huggingface-zero2.json"],
    "accelerate": ["accelerate", "launch", "--config_file", "launch/configs/accelerate.yaml", PROGRAM],
}


def run(loop: str, dtype: str, folder: Path) -> dict[str, Any]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**child_environment(), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PATH": path}
    options = [
        "--loop",
        loop,
        "--dtype",
        dtype,
        *SMALL,
        "--run-dir",
        str(folder),
        "--json",
        str(folder / "summary.json"),
    ]
    done = subprocess.run(
        [*LAUNCHERS[loop], *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.distributed
@pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'hvd-qoda[deepspeed,huggingface,train]'"
)
@pytest.mark.parametrize(("loop", "dtype"), [("trainer", "fp32"), ("trainer", "bf16"), ("accelerate", "fp32")])
def test_gradients_are_compressed_and_replicas_agree(loop: str, dtype: str, tmp_path: Path) -> None:
    found = run(loop, dtype, tmp_path)
    assert found["ranks"] == 2
    assert found["steps"] == 6
    assert found["replicas_identical"]
    assert found["losses"][-1] < found["losses"][0]
    # Llama's classes are known: every weight has the type of its place.
    assert found["layer_types"] == ["attention", "embedding", "feed_forward", "norm", "output"]
    # ZeRO 2, two ranks, 5 bits: half of the codes leave this one; DeepSpeed would send all of 32 or 16 bits.
    assert found["gradient_bytes_per_step"] < found["parameters"] * {"fp32": 4 / 11, "bf16": 2 / 5.5}[dtype]
