"""Whole training runs with real ranks: scores, equal replicas, records, and a resume that loses no bit."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch")

from hvd_qoda.sinks import read_steps
from tests.launcher import RankPool, horovodrun, run_ranks

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "launch" / "train" / "mnist.py")
SMALL = ("--model-size", "small", "--batch-size", "16")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def train(run_dir: Path, *arguments: str, ranks: int = 2) -> dict[str, Any]:
    """Run the training program; returns its summary."""
    outcome = horovodrun([sys.executable, PROGRAM, *SMALL, "--run-dir", str(run_dir), *arguments], ranks)
    assert outcome.returncode == 0, outcome.stdout
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the training program without horovodrun."""
    return subprocess.run(
        [sys.executable, PROGRAM, *SMALL, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def train_in_this_rank(run_dir: str, *arguments: str) -> int:
    """The training program's main function, called within a rank; returns its exit status."""
    from launch.train.mnist import main

    return main([*SMALL, "--threads", "1", "--run-dir", run_dir, *arguments])


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[RankPool, RankPool]]:
    """Two ranks that train, and two others that resume: starting processes is what takes the time here."""
    with RankPool(2) as first, RankPool(2) as second:
        yield first, second


@pytest.mark.parametrize(
    "arguments",
    [
        ("--optimizer", "qodadam", "--compression", "qoda", "--exchange", "allgather", "--update-levels-at", "3,8"),
        ("--optimizer", "qoda", "--compression", "qoda", "--exchange", "reduce_scatter", "--update-levels-at", "5,7"),
        ("--optimizer", "qodadam", "--route", "overlap", "--fusion-buffer-mb", "0.02", "--exchange", "by_bytes"),
        ("--optimizer", "sgd", "--compression", "none"),
    ],
    ids=["qodadam-allgather", "qoda-reduce_scatter", "qodadam-overlap", "sgd-fp32"],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    pools: tuple[RankPool, RankPool], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    def run(pool: RankPool, name: str, steps: int, *further: str) -> dict[str, Any]:
        options = [*arguments, "--steps", str(steps), "--seed", "3", *further]
        assert pool.run(train_in_this_rank, str(tmp_path / name), *options, timeout=180) == [0, 0]
        summary: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())
        return summary

    one_pool, another_pool = pools
    whole = run(one_pool, "whole", 10)
    first = run(one_pool, "parts", 5, "--checkpoint-every", "5")
    resumed = run(another_pool, "parts", 10, "--resume", str(tmp_path / "parts"))
    assert first["model_sha256"] != whole["model_sha256"]
    assert resumed["started_at_step"] == 5
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert resumed["replicas_identical"]
    one, other = (read_steps(tmp_path / name / "steps.jsonl") for name in ("whole", "parts"))
    assert [record.step for record in other] == list(range(1, 11))
    assert [record.scalars["loss"] for record in one] == [record.scalars["loss"] for record in other]
    assert [record.registry_version for record in one] == [record.registry_version for record in other]


def test_a_compressed_run_sends_fewer_bytes_and_learns(pools: tuple[RankPool, RankPool], tmp_path: Path) -> None:
    def run(name: str, *compression: str) -> dict[str, Any]:
        options = ("--steps", "60", "--batch-size", "32", "--update-levels-at", "10", *compression)
        assert pools[0].run(train_in_this_rank, str(tmp_path / name), *options) == [0, 0]
        summary: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text())
        return summary

    plain = run("plain", "--compression", "none")
    coded = run("coded", "--compression", "qoda", "--exchange", "by_bytes", "--measure-error-every", "5")
    for summary in (plain, coded):
        assert summary["replicas_identical"]
        assert summary["test_accuracy"] > 0.8
        assert summary["ranks"] == 2
    # An all-reduce among two ranks sends as many bytes as there are in the gradient.
    assert plain["bytes_sent_per_step"] == 4 * plain["parameters"]
    layer_types = coded["layer_types"]
    assert sum(entry["coordinates"] for entry in layer_types.values()) == coded["parameters"]
    in_types = sum(entry["bytes_sent_per_step"] for entry in layer_types.values())
    assert in_types == pytest.approx(coded["bytes_sent_per_step"])
    gradients = in_types - layer_types["control"]["bytes_sent_per_step"]
    assert 5.5 < plain["bytes_sent_per_step"] / gradients < 6.4
    assert 5.0 < coded["bits_per_coordinate"] < 5.3
    assert plain["bits_per_coordinate"] is None
    assert coded["layer_types"]["feed_forward"]["bits"] == 5
    assert coded["layer_types"]["bias"]["bits"] == 32
    assert 0 < coded["layer_types"]["feed_forward"]["relative_error"] < 0.1
    assert coded["layer_types"]["convolution"]["relative_error"] > 0


def test_half_precision_halves_the_bytes(tmp_path: Path) -> None:
    summary = train(tmp_path / "run", "--steps", "3", "--compression", "fp16")
    assert summary["bytes_sent_per_step"] == 2 * summary["parameters"]
    assert summary["replicas_identical"]


def test_one_process_trains_alone_and_sends_nothing(tmp_path: Path) -> None:
    outcome = alone("--steps", "4", "--run-dir", str(tmp_path), "--json", str(tmp_path / "copy.json"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "nothing is compressed" in outcome.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == json.loads((tmp_path / "copy.json").read_text())
    assert summary["bytes_sent_per_step"] == 0
    assert summary["ranks"] == 1


def mistake_in_this_rank(*arguments: str) -> tuple[int, str]:
    """Exit status of the training program's main function, and what it has printed on stderr."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        return train_in_this_rank(*arguments), printed.getvalue()


def test_mistakes_around_checkpoints_leave_with_a_message(tmp_path: Path) -> None:
    run_dir = str(tmp_path)
    assert alone("--steps", "2", "--checkpoint-every", "2", "--threads", "1", "--run-dir", run_dir).returncode == 0
    outcome = alone("--steps", "4", "--run-dir", run_dir)
    assert outcome.returncode == 2, outcome.stdout + outcome.stderr
    assert "holds checkpoints of an earlier run" in outcome.stderr
    with RankPool(1) as ranks:
        for arguments, message in (
            (("--steps", "2", "--resume", run_dir), "none is left"),
            (("--steps", "4", "--resume", run_dir, "--seed", "1"), "seed: checkpoint 0, now 1"),
            (("--steps", "4", "--resume", str(tmp_path / "absent")), "no checkpoint at"),
            (("--steps", "4", "--data", str(tmp_path / "absent"), "--resume", run_dir), "train-images-idx3-ubyte"),
        ):
            ((status, error),) = ranks.run(mistake_in_this_rank, run_dir, *arguments)
            assert status == 2
            assert message in error


def replicas_that_differ_in_one_bit() -> tuple[bool, bool]:
    import horovod.torch as hvd
    import torch

    from launch.train.ranks import Ranks, replicas_identical

    ranks = Ranks(hvd.rank(), hvd.size(), hvd.local_size())
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.0)
    before = replicas_identical(model, ranks)
    if ranks.rank == 1:
        with torch.no_grad():
            model.bias[1] = -0.0
    return before, replicas_identical(model, ranks)


def test_replicas_that_differ_in_one_bit_are_noticed_on_every_rank() -> None:
    assert run_ranks(replicas_that_differ_in_one_bit, 2) == [(True, False), (True, False)]
