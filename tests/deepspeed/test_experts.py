"""Mixtures of experts: gradients of experts travel among the ranks that hold them, those of the rest to all."""

from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from torch import nn

import ds_plugin
from tests.deepspeed.training import (
    Model,
    batches,
    configuration,
    digest,
    engine_of,
    error_of,
    make_engine,
    relative_difference,
    train_steps,
)
from tests.launcher import RankPool

SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


class WithExperts(Model):
    """The model of the other tests with four experts as its feed-forward layer, divided among `parts` ranks."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        expert = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 64))
        self.experts = MoE(64, expert, num_experts=4, ep_size=parts, k=1, use_rts=False, min_capacity=16)
        del self.linear1, self.linear2

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        routed, auxiliary, _ = self.experts(self.norm(x))
        logits = self.head((x + routed)[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.01 * auxiliary


def by_kind(engine: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of this rank's experts, and those that all ranks have in common."""
    found: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter in engine.module.parameters():
        found[is_moe_param(parameter)].append(parameter.detach().double().flatten().clone())
    return torch.cat(found[True]), torch.cat(found[False])


def moved(stage: int, parts: int, qoda: dict[str, Any] | None, zero: dict[str, Any]) -> dict[str, Any]:
    """What one step changes: later ones would also see what quantizing did to the others' weights."""
    with engine_of(configuration(stage, "fp32", qoda, zero_optimization=zero, **SGD), WithExperts(parts)) as engine:
        before = by_kind(engine)
        train_steps(engine, batches(torch.distributed.get_rank()), 1)
        after = by_kind(engine)
        experts, common = (end - begin for end, begin in zip(after, before, strict=True))
        calls = dict(ds_plugin.reducer_of(engine).traffic.calls) if qoda else {}
        return {"experts": experts, "common": common, "digests": [digest(part) for part in after], "calls": calls}


def compared(stage: int, parts: int, zero: dict[str, Any] | None = None) -> dict[str, Any]:
    plain, found = (moved(stage, parts, qoda, zero or {}) for qoda in (None, {"bits": 8}))
    return {
        "experts": relative_difference(found["experts"], plain["experts"]),
        "common": relative_difference(found["common"], plain["common"]),
        "digests": found["digests"],
        "quantized": [one != other for one, other in zip(found["digests"], plain["digests"], strict=True)],
        "calls": found["calls"],
    }


def check(ranks: list[dict[str, Any]], parts: int) -> None:
    size = len(ranks)
    for found in ranks:
        assert found["common"] < 0.05
        assert found["experts"] < 0.05
        # With one rank per expert nothing is sent, so nothing is quantized.
        assert found["quantized"] == [parts < size, True]
    assert len({found["digests"][1] for found in ranks}) == 1
    # The expert at the same place of each part is another one; DeepSpeed gives ranks with equal remainder the same.
    for part in range(parts):
        assert len({found["digests"][0] for found in ranks[part::parts]}) == 1
    assert len({found["digests"][0] for found in ranks}) == parts


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks(two_ranks: RankPool, stage: int, parts: int) -> None:
    check(two_ranks.run(compared, stage, parts), parts)


@pytest.mark.parametrize(("stage", "zero"), [(0, {}), (2, {}), (1, {"use_multi_rank_bucket_allreduce": False})])
def test_four_ranks_in_two_groups(four_ranks: RankPool, stage: int, zero: dict[str, Any]) -> None:
    check(four_ranks.run(compared, stage, 2, zero), 2)


def resumed(folder: str, stage: int) -> bool:
    """Six steps at once, and in two runs; levels are fitted in both halves."""
    qoda = {"bits": 5, "update_levels": {"at": [2, 4], "every": None, "samples": 2}}
    rank = torch.distributed.get_rank()
    with engine_of(configuration(stage, "fp32", qoda, **SGD), WithExperts(2)) as engine:
        data = batches(rank)
        train_steps(engine, data, 3)
        engine.save_checkpoint(folder)
        losses = train_steps(engine, data, 3)
        expected = [digest(part) for part in by_kind(engine)]
    with engine_of(configuration(stage, "fp32", qoda, **SGD), WithExperts(2)) as engine:
        engine.load_checkpoint(folder)
        data = batches(rank)
        for _ in range(3):
            next(data)
        return train_steps(engine, data, 3) == losses and [digest(part) for part in by_kind(engine)] == expected


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(four_ranks: RankPool, tmp_path: Any) -> None:
    assert four_ranks.run(resumed, str(tmp_path), 2) == [True] * 4


def refused() -> dict[str, str]:
    def attempt(qoda: dict[str, Any], **settings: Any) -> str:
        return error_of(lambda: make_engine(configuration(0, "fp32", qoda, **settings), WithExperts(2)))

    return {
        "worker_norms": attempt({"worker_norms": True}),
        "error_feedback": attempt({"error_feedback": True}),
        "QODA": attempt({}, optimizer={"type": "QODA", "params": {"lr": 0.3}}),
    }


def test_what_needs_one_model_on_all_ranks_is_refused_by_name(two_ranks: RankPool) -> None:
    for found in two_ranks.run(refused):
        for key, message in found.items():
            assert message.startswith("UnsupportedError"), message
            assert key in message
            assert "experts" in message
