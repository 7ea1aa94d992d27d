"""The comparison over seeds: its statistics, its verdicts, and the whole program with two steps."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("horovod.torch")

from launch.bench import convergence
from launch.bench.convergence import (
    ADAM,
    ALL_GATHER,
    FP32,
    HIERARCHICAL,
    REDUCE_SCATTER,
    STRATIFIED,
    cases,
    earlier_summary,
    judge,
    paired_differences,
    parse_arguments,
    statistics_of,
)
from launch.train.job import Job, run_job
from launch.train.options import parse_options
from tests.launcher import RankPool

ROOT = Path(__file__).resolve().parents[2]


def runs(losses: list[float], accuracies: list[float]) -> list[dict[str, Any]]:
    return [
        {"train_loss": loss, "test_loss": 2 * loss, "test_accuracy": accuracy, "bytes_sent_per_step": 100.0}
        for loss, accuracy in zip(losses, accuracies, strict=True)
    ]


def all_cases() -> dict[str, list[dict[str, Any]]]:
    return {
        ADAM: runs([0.2, 0.4], [0.90, 0.92]),
        FP32: runs([0.1, 0.3], [0.91, 0.91]),
        ALL_GATHER: runs([0.25, 0.35], [0.9, 0.9]),
        STRATIFIED[ALL_GATHER]: runs([0.25, 0.35], [0.9, 0.9]),
        REDUCE_SCATTER: runs([0.25, 0.37], [0.9, 0.9]),
        STRATIFIED[REDUCE_SCATTER]: runs([0.25, 0.35], [0.9, 0.9]),
    }


def test_mean_spread_and_range() -> None:
    scores = statistics_of(runs([1.0, 2.0, 6.0], [0.5, 0.5, 0.8]))
    assert scores["train_loss"]["mean"] == pytest.approx(3.0)
    assert scores["train_loss"]["std"] == pytest.approx(7.0**0.5)
    assert (scores["test_accuracy"]["min"], scores["test_accuracy"]["max"]) == (0.5, 0.8)
    assert statistics_of(runs([1.0], [0.5]))["train_loss"]["std"] == 0.0


def test_a_mean_loss_above_the_range_of_fp32_is_noticed() -> None:
    verdicts = judge({name: statistics_of(of_case) for name, of_case in all_cases().items()})
    assert verdicts[f"{ALL_GATHER}: mean train_loss is not above the range of fp32"]
    assert not verdicts[f"{REDUCE_SCATTER}: mean train_loss is not above the range of fp32"]
    assert verdicts["QODAdam's mean test accuracy is at least Adam's"]


def test_on_several_hosts_all_exchanges_are_compared(tmp_path: Path) -> None:
    hosts = "localhost:2,127.0.0.1:2"
    compared = {case.name: case.options for case in cases(parse_arguments(["--np", "4", "--hosts", hosts]))}
    assert list(compared) == [FP32, ALL_GATHER, REDUCE_SCATTER, HIERARCHICAL]
    assert compared[HIERARCHICAL][-2:] == ("--exchange", "hierarchical")
    scores = {name: statistics_of(runs([0.1, 0.3], [0.9, 0.9])) for name in compared}
    assert set(judge(scores).values()) == {True}
    command = Job(Path("mnist.py"), (), 4, tmp_path, hosts=hosts).command()
    assert command[command.index("-H") + 1] == hosts
    assert "-H" not in Job(Path("mnist.py"), (), 4, tmp_path).command()


def test_differences_are_taken_seed_by_seed() -> None:
    differences = paired_differences(all_cases())
    assert differences[FP32]["train_loss"] == {"mean": 0.0, "standard_error": 0.0}
    assert differences[ADAM]["train_loss"]["mean"] == pytest.approx(0.1)
    assert differences[ADAM]["train_loss"]["standard_error"] == pytest.approx(0.0)
    assert differences[ALL_GATHER]["train_loss"]["standard_error"] == pytest.approx(0.05)
    one_seed = {name: of_case[:1] for name, of_case in all_cases().items()}
    assert paired_differences(one_seed)[ADAM]["train_loss"]["standard_error"] is None


def train_in_this_rank(arguments: list[str]) -> int:
    from launch.train.mnist import main

    return main(arguments)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_the_program_writes_scores_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the runs is started as users start them; the others take ranks that run already."""
    started: list[str] = []

    def run_in(ranks: RankPool, job: Job, on_step: Any) -> dict[str, Any]:
        started.append(job.run_dir.name)
        if len(started) == 1:
            return run_job(job, on_step)
        assert ranks.run(train_in_this_rank, [*job.arguments, "--run-dir", str(job.run_dir)]) == [0, 0]
        summary: dict[str, Any] = json.loads((job.run_dir / "summary.json").read_text())
        return summary

    arguments = ["--seeds", "1", "--steps", "2", "--update-levels-at", "2", "--run-dir", str(tmp_path / "runs")]
    arguments += ["--json", str(tmp_path / "scores.json"), "--plot", str(tmp_path / "scores.png")]
    with RankPool(2) as ranks:
        monkeypatch.setattr(convergence, "run_job", partial(run_in, ranks))
        assert convergence.main(arguments) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert list(result["cases"]) == list(all_cases())
    assert len(set(started)) == len(all_cases())
    for case in result["cases"].values():
        assert [run["seed"] for run in case["runs"]] == [0]
        assert len(case["runs"][0]["loss_curve"]) == 2
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "QODAdam, reduce-scatter" in capsys.readouterr().out
    again = subprocess.run(
        [sys.executable, "launch/bench/convergence.py", *arguments, "--reuse"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["cases"] == result["cases"]


def test_only_a_run_of_equal_options_is_taken_over(tmp_path: Path) -> None:
    def job(*arguments: str) -> Job:
        return Job(Path("mnist.py"), arguments, 2, tmp_path)

    assert earlier_summary(job("--steps", "3")) is None
    options = parse_options("", ["--steps", "3", "--run-dir", str(tmp_path)]).as_json()
    (tmp_path / "summary.json").write_text(json.dumps({"options": options, "ranks": 2}))
    assert earlier_summary(job("--steps", "3")) is not None
    assert earlier_summary(job("--steps", "4")) is None
    assert earlier_summary(job("--steps", "3", "--update-levels-at", "5")) is None
