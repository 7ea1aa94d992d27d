"""fp16: an overflow on one rank is seen by all and skipped, as without the plug-in; gradients that are not finite."""

from typing import Any

import pytest
import torch

from tests.deepspeed.training import batches, configuration, digest, engine_of, weights
from tests.launcher import RankPool


def overflowing(stage: int, dtype: str, qoda: dict[str, Any] | None) -> dict[str, Any]:
    """Six steps, of which one has an infinite gradient on rank 1 only."""
    rank = torch.distributed.get_rank()
    with engine_of(configuration(stage, dtype, qoda)) as engine:
        data = batches(rank)
        applied, scales = [], []
        for step in range(6):
            loss = engine(next(data))
            if step == 3 and rank == 1:
                loss = loss * float("inf")
            engine.backward(loss)
            engine.step()
            applied.append(engine.was_step_applied())
            if dtype == "fp16":
                scales.append(
                    engine.optimizer.loss_scale_config.cur_scale if stage == 0 else engine.optimizer.loss_scale
                )
        found = weights(engine)
        return {
            "applied": applied,
            "scales": [float(scale) for scale in scales],
            "skipped": engine.skipped_steps,
            "finite": bool(found.isfinite().all()),
            "digest": digest(found),
        }


def with_error_feedback(stage: int) -> dict[str, Any]:
    return overflowing(stage, "fp16", {"bits": 3, "error_feedback": True})


def compared(stage: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return overflowing(stage, dtype, None), overflowing(stage, dtype, {"bits": 5})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_is_skipped_as_without_the_plug_in(two_ranks: RankPool, stage: int) -> None:
    ranks = two_ranks.run(compared, stage, "fp16")
    for plain, found in ranks:
        assert found["applied"] == plain["applied"] == [True, True, True, False, True, True]
        assert found["scales"] == plain["scales"]
        assert found["skipped"] == plain["skipped"] == 1
        assert found["finite"]
    assert ranks[0][1]["digest"] == ranks[1][1]["digest"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_residuals_forget_a_skipped_step_on_all_ranks(two_ranks: RankPool, stage: int) -> None:
    ranks = two_ranks.run(with_error_feedback, stage)
    for found in ranks:
        assert found["applied"] == [True, True, True, False, True, True]
        assert found["finite"]
    assert ranks[0]["digest"] == ranks[1]["digest"]


def test_in_bf16_too_where_deepspeed_looks_for_it(two_ranks: RankPool) -> None:
    for plain, found in two_ranks.run(compared, 2, "bf16"):
        assert found["applied"] == plain["applied"]
        assert found["skipped"] == plain["skipped"]
