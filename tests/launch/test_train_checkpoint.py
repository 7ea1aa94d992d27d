"""Checkpoints: complete or absent, found, and refused where they belong to another run."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("horovod.torch")

from launch.train.checkpoint import (
    CheckpointError,
    check_same_run,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from launch.train.options import parse_options
from launch.train.ranks import Ranks

ALONE = Ranks(rank=0, size=1, local_size=1)


def save(directory: Path, step: int) -> Path:
    return save_checkpoint(directory, step, ALONE, {"weight": torch.full((2,), float(step))}, {"random": step})


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 30)
    shared, own = load_checkpoint(path, ALONE)
    assert shared["step"] == 30
    assert shared["weight"].tolist() == [30.0, 30.0]
    assert own == {"random": 30}


def test_the_latest_checkpoint_of_a_run_is_found_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run / "checkpoints", 5)
    latest = save(run / "checkpoints", 100_000_000)
    (run / "checkpoints" / "step-00000007.partial").mkdir()
    (run / "checkpoints" / "step-99999999999.partial").mkdir()
    assert find_checkpoint(run) == latest
    assert find_checkpoint(run / "checkpoints") == latest
    assert find_checkpoint(latest) == latest


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(tmp_path, 3, ALONE, {"weight": torch.zeros(1)}, {"random": 9})
    assert load_checkpoint(tmp_path, ALONE)[1] == {"random": 9}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


def test_no_checkpoint_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoints"):
        find_checkpoint(tmp_path)


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="written by 1 ranks and this run has 2"):
        load_checkpoint(tmp_path, Ranks(rank=0, size=2, local_size=2))


def decisive(*arguments: str) -> dict[str, Any]:
    return parse_options("", arguments).decides_result()


def test_options_that_decide_the_result_must_agree() -> None:
    with pytest.raises(CheckpointError, match=r"\(bits: checkpoint 5, now 4\)"):
        check_same_run(decisive("--bits", "5"), decisive("--bits", "4"))
    with pytest.raises(CheckpointError, match="seed: checkpoint 0, now 1"):
        check_same_run(decisive(), decisive("--seed", "1"))


def test_options_that_do_not_decide_the_result_may_differ() -> None:
    check_same_run(decisive("--steps", "5"), decisive("--epochs", "2", "--run-dir", "x", "--checkpoint-every", "7"))
    check_same_run(decisive("--compression", "none", "--bits", "3"), decisive("--compression", "none"))
    check_same_run(decisive("--update-levels-at", "3,4"), {**decisive("--update-levels-at", "3,4")})
