"""fp16: an overflow on one rank is seen by all and skipped, as without the plug-in; gradients that are not finite."""

from typing import Any

import pytest
import torch

import ds_plugin
from tests.deepspeed.training import Model, batches, configuration, digest, engine_of, weights
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


def residuals_around_an_overflow(stage: int, parameter: str) -> tuple[list[bool], list[bool]]:
    """Which steps were applied, and which changed this rank's residuals.

    In the third step the parameter's first coordinate, which is not rank 1's to keep, has an infinite gradient there.
    """
    buckets = {"reduce_bucket_size": 100}  # so that small tensors travel by themselves, uncompressed
    config = configuration(stage, "fp16", {"bits": 3, "error_feedback": True}, zero_optimization=buckets)
    model = Model()
    overflow = False

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        first = torch.arange(gradient.numel()).view_as(gradient) == 0
        return gradient.masked_fill(first, float("inf")) if overflow else gradient

    model.get_parameter(parameter).register_hook(spoil)
    with engine_of(config, model) as engine:
        data = batches(torch.distributed.get_rank())
        applied, changed = [], []
        before: dict[str, Any] = {}
        for step in range(4):
            overflow = step == 2 and torch.distributed.get_rank() == 1
            engine.backward(engine(next(data)))
            engine.step()
            applied.append(engine.was_step_applied())
            private = ds_plugin.reducer_of(engine).private_state()
            assert private is not None
            residuals = private["session"]["residuals"]
            unit = engine.optimizer.loss_scale  # a power of two, halved by the overflow, and the residuals with it
            after = {f"{entry['parameter']}:{entry['start']}": digest(entry["values"] / unit) for entry in residuals}
            changed.append(before != after)
            before = after
    return applied, changed


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


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("parameter", ["norm.weight", "linear1.bias"])
def test_residuals_forget_an_overflow_in_a_bucket_left_to_deepspeed(
    two_ranks: RankPool, stage: int, parameter: str
) -> None:
    for applied, changed in two_ranks.run(residuals_around_an_overflow, stage, parameter):
        assert applied == [True, True, False, True]
        assert changed == [True, True, False, True]


def test_in_bf16_too_where_deepspeed_looks_for_it(two_ranks: RankPool) -> None:
    for plain, found in two_ranks.run(compared, 2, "bf16"):
        assert found["applied"] == plain["applied"]
        assert found["skipped"] == plain["skipped"]
