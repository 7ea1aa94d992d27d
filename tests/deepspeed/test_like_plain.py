"""What DeepSpeed alone can do, the plug-in can: the same bits at 32 bits, near ones at few, equal replicas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_plugin
from tests.deepspeed.training import (
    batches,
    configuration,
    digest,
    engine_of,
    relative_difference,
    train_steps,
    weights,
)
from tests.launcher import RankPool

EXACT = {"bits": 32}
LOW = {"bits": 5, "min_numel": 16}
BLOCKS = (None, EXACT, LOW)


def three(training: Callable[[dict[str, Any] | None], torch.Tensor]) -> dict[str, Any]:
    """A training without a block, with exact gradients and with coded ones; what of it the tests compare."""
    plain, exact, low = (training(block) for block in BLOCKS)
    return {
        "exact": torch.equal(plain, exact),
        "near": relative_difference(low, plain),
        "coded": not torch.equal(plain, low),
        "digest": digest(low),
        "finite": bool(torch.isfinite(low).all()),
    }


def check(results: list[dict[str, Any]], near: float = 0.05) -> None:
    for found in results:
        assert found["exact"]
        assert found["coded"]
        assert found["finite"]
        assert found["near"] < near
        assert found["digest"] == results[0]["digest"]


# -- checkpoints at any time ----------------------------------------------------------------------------------------


def saved_within_a_step(folder: str, stage: int, thrown_away: bool) -> dict[str, Any]:
    """Saved after four steps and a batch more, which belongs to a step of two or is thrown away."""
    rank = torch.distributed.get_rank()
    at_work: list[bool] = []

    def training(block: dict[str, Any] | None) -> torch.Tensor:
        place = f"{folder}/{0 if block is None else block['bits']}"
        # Levels change in the step that is under way.
        updates = {"update_levels": {"at": [5], "every": None, "samples": 1}}
        qoda = None if block is None else {**block, **updates}
        config = configuration(stage, "fp32", qoda, gradient_accumulation_steps=1 if thrown_away else 2)
        data = batches(rank)
        with engine_of(config) as engine:
            train_steps(engine, data, 4)
            engine.backward(engine(next(data)))
            if thrown_away:
                engine.optimizer.zero_grad()
            else:
                engine.step()
            engine.save_checkpoint(place)
            train_steps(engine, batches(rank, seed=1), 3)
            uninterrupted = weights(engine)
        with engine_of(config) as engine:
            engine.load_checkpoint(place)
            assert block is None or ds_plugin.reducer_of(engine).step == 4
            train_steps(engine, batches(rank, seed=1), 3)
            resumed = weights(engine)
        at_work.append(torch.equal(uninterrupted, resumed))
        return resumed

    return {**three(training), "as uninterrupted": at_work}


@pytest.mark.parametrize("thrown_away", [False, True])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_within_a_step(two_ranks: RankPool, tmp_path: Path, stage: int, thrown_away: bool) -> None:
    results = two_ranks.run(saved_within_a_step, str(tmp_path), stage, thrown_away)
    check(results)
    for found in results:  # accumulated gradients are not saved, by DeepSpeed neither
        assert found["as uninterrupted"] == [thrown_away] * 3
