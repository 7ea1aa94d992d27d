"""Error feedback under the stock optimizer: accumulation, sums, process sets, loss scaling."""

from typing import Any

import horovod.torch as hvd
import pytest
import torch

from hvd_qoda.exchange import Stamp
from hvd_qoda.schemes import make_exchange
from hvd_qoda.transport import LocalTransport
from qoda_kernels.layout import MessagePlan, Slice
from tests.horovod.training import bits_of, local_gradients, loss_of, make_model, make_optimizer, make_qoda
from tests.launcher import RankPool

SETTINGS = {"exchange": "allgather", "levels": "tuq", "bits": 3, "error_feedback": True}


class OneRank(LocalTransport):
    """Encodes as a given rank does; nothing travels."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank


def expected_residual(compressor: Any, name: str, corrected: torch.Tensor, rank: int, step: int) -> torch.Tensor:
    """Corrected gradient less its own message, from the codec's definition."""
    registry = compressor.registry
    entry = registry.parameters[name]
    slices = [Slice(name, 0, corrected.numel(), torch.float32, entry.codebook, entry.offset)]
    exchange = make_exchange(
        "allgather", MessagePlan.build(slices, registry.codebooks), registry.codebooks, OneRank(rank), "y"
    )
    exchange.start([corrected], Stamp(compressor.config.seed, step, registry.version))
    sent: torch.Tensor = exchange.own_message().decode()[0]
    return corrected - sent


def residuals_follow_the_definition(options: dict[str, Any], passes: int) -> list[bytes]:
    model = make_model()
    compressor = make_qoda(model, update_levels={"at": (2,), "every": None, "samples": 1}, **SETTINGS)
    options = {**options, "op": getattr(hvd, options.get("op", "Average")), "backward_passes_per_step": passes}
    optimizer = make_optimizer(model, compressor, **options)
    before: dict[str, torch.Tensor] = {}
    for step in range(1, 4):
        optimizer.zero_grad()
        own: dict[str, torch.Tensor] = {}
        for micro in range(passes):
            for name, gradient in local_gradients(model, lambda m=micro, s=step: loss_of(model, 10 * s + m)).items():
                own[name] = gradient if name not in own else own[name] + gradient
            loss_of(model, 10 * step + micro).backward()
        optimizer.step()
        for name in ("0.weight", "2.weight"):
            corrected = own[name].reshape(-1) + before.get(name, 0.0)
            wanted = expected_residual(compressor, name, corrected, hvd.rank(), step)
            found = compressor.error_feedback.residual(name)
            assert torch.allclose(found, wanted, rtol=0, atol=1e-6), name
            before[name] = found
    assert compressor.registry.codebooks[compressor.registry.parameters["2.weight"].codebook].clip > 0
    return bits_of(model.parameters())


@pytest.mark.parametrize(("options", "passes"), [({}, 1), ({"op": "Sum"}, 2), ({"gradient_predivide_factor": 2.0}, 1)])
def test_residuals_are_of_the_gradients_handed_over(two_ranks: RankPool, options: dict[str, Any], passes: int) -> None:
    results = two_ranks.run(residuals_follow_the_definition, options, passes)
    assert all(result == results[0] for result in results)


def an_overflow_on_one_rank() -> None:
    model = make_model()
    compressor = make_qoda(model, **SETTINGS)
    optimizer = make_optimizer(model, compressor, lr=0.0)
    for step in range(3):
        optimizer.zero_grad()
        factor = float("inf") if step == 1 and hvd.rank() == 1 else 1.0
        (loss_of(model, step) * factor).backward()
        optimizer.step()
        if step == 0:
            before = compressor.error_feedback.residual("2.weight")
        if step == 1:
            assert torch.equal(compressor.error_feedback.residual("2.weight"), before)
            model.load_state_dict(make_model().state_dict())
    assert not torch.equal(compressor.error_feedback.residual("2.weight"), before)


def test_a_step_that_overflows_anywhere_keeps_all_residuals(two_ranks: RankPool) -> None:
    two_ranks.run(an_overflow_on_one_rank)
