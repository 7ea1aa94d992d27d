"""The language model under DeepSpeed's launcher and torchrun; its configurations; the benchmark of bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")
pytest.importorskip("sklearn")

from ds_plugin.__main__ import main as ds_plugin_main
from launch.bench.deepspeed_bytes import without_floor
from launch.train.data import DataError
from launch.train.language_model import ds_configuration, parse_arguments
from launch.train.text import load_text
from tests.launcher import ROOT, child_environment

CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.json"))
PROGRAM = "launch/train/language_model.py"
SMALL = ["--width", "32", "--layers", "1", "--context", "32", "--batch-size", "2", "--threads", "1"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**child_environment(), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "PATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_sound(path: Path) -> None:
    assert ds_plugin_main(["check", str(path)]) == 0


def test_options_go_before_the_configuration(tmp_path: Path) -> None:
    values = ds_configuration(parse_arguments(["--zero", "1", "--bits", "4", "--dtype", "bf16", "--accumulate", "3"]))
    assert values["zero_optimization"]["stage"] == 1
    assert values["qoda"]["bits"] == 4
    assert values["bf16"] == {"enabled": True}
    assert values["gradient_accumulation_steps"] == 3
    assert "qoda" not in ds_configuration(parse_arguments(["--bits", "32"]))


def test_what_the_given_configuration_says_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS[0])
    with pytest.raises(SystemExit):
        parse_arguments(["--config", path, "--bits", "3", "--dtype", "bf16"])
    assert "--bits, --dtype: with --config" in capsys.readouterr().err
    options = parse_arguments(["--config", path, "--bits", "32", "--steps", "3"])
    assert "qoda" not in ds_configuration(options)
    assert ds_configuration(parse_arguments(["--config", path])) == json.loads(CONFIGS[0].read_text())


def test_text_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 2000)
    text = load_text(tmp_path)
    assert (len(text.train), len(text.test)) == (18000, 2000)
    first = text.batch(3, 0, 4, 16, seed=1)
    assert first.shape == (4, 17)
    assert not first.equal(text.batch(3, 1, 4, 16, seed=1))
    assert first.equal(text.batch(3, 0, 4, 16, seed=1))
    assert len(load_text(None).train) > 20_000
    with pytest.raises(DataError, match="10,000 are needed"):
        load_text(tmp_path / "absent")


@pytest.mark.distributed
def test_training_goes_on_where_it_was_saved_under_either_launcher(tmp_path: Path) -> None:
    common = [PROGRAM, *SMALL, "--zero", "2", "--bits", "5", "--run-dir", str(tmp_path)]
    first = run(["deepspeed", "--num_gpus", "2", *common, "--steps", "4", "--checkpoint-every", "4"])
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    second = run([*torchrun, *common, "--steps", "6", "--resume", "--json", str(tmp_path / "copy.json")])
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    summary: dict[str, Any] = json.loads((tmp_path / "copy.json").read_text())
    assert summary["replicas_identical"]
    assert (summary["started_at_step"], summary["steps"], summary["ranks"]) == (4, 6, 2)
    assert 0 < summary["gradient_bytes_per_step"] < summary["parameters"]
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps][-3:] == [4, 5, 6]
    assert all(line["scalars"]["loss"] > 0 and line["sent_bytes"] > 0 for line in steps)


def test_bytes_of_gradients_are_what_is_beyond_the_floor() -> None:
    base = {"stage": 2, "dtype": "fp32", "processes": 2}
    records = [
        {**base, "method": "qoda-0bit", "seed": -1, "wire_bytes_per_step": 30},
        {**base, "method": "deepspeed", "seed": 0, "wire_bytes_per_step": 150},
    ]
    (found,) = without_floor(records)
    assert found["gradient_bytes_per_step"] == 120
    assert found["other_bytes_per_step"] == 30


@pytest.mark.distributed
def test_the_benchmark_of_bytes(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    options = ["--processes", "2", "--stages", "2", "--dtypes", "fp32", "--steps", "20", "--width", "64"]
    done = run([sys.executable, "launch/bench/deepspeed_bytes.py", *options, "--json", str(path)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    records = {record["method"]: record for record in json.loads(path.read_text())}
    assert set(records) == {"deepspeed", "qoda-5bit"}
    ratio = records["deepspeed"]["gradient_bytes_per_step"] / records["qoda-5bit"]["gradient_bytes_per_step"]
    assert 9 < ratio < 13
    assert all(record["replicas_identical"] for record in records.values())
