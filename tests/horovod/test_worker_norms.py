"""Worker norms: the sums over ranks of their own quantized gradients' norms, against a direct computation."""

from typing import Any

import horovod.torch as hvd
import numpy as np
import pytest
import torch
from torch import nn

from hvd_qoda.errors import ConfigError, QodaError
from hvd_qoda.exchange import Stamp
from hvd_qoda.optim import QODA, WorkerNorms
from hvd_qoda.schemes import make_exchange
from hvd_qoda.transport import LocalTransport
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from tests.horovod.training import gather, local_gradients, loss_of, make_model, make_optimizer, make_qoda
from tests.launcher import RankPool


def own_vector(compressor: Any, own: dict[str, torch.Tensor], step: int) -> np.ndarray:
    """hatV_k of the all-gather exchange, from the codec's definition; exact parameters as they are."""
    registry, rank = compressor.registry, hvd.rank()
    parts = []
    for name, gradient in own.items():
        entry = registry.parameters[name]
        if registry.codebooks[entry.codebook].is_exact:
            parts.append(gradient.double().view(-1))
            continue
        slices = [Slice(name, 0, gradient.numel(), gradient.dtype, entry.codebook, entry.offset)]
        codec = Codec(MessagePlan.build(slices, registry.codebooks), registry.codebooks)
        context = Stamp(compressor.config.seed, step, registry.version).context(0, rank, 0)
        message = codec.encode([gradient.reshape(-1)], context)
        parts.append(codec.decode_mean([message], [context], scale=1.0)[0].double())
    return torch.cat(parts).numpy()


def norms_of_steps(op: str, levels: str) -> list[tuple[float, float]]:
    model = make_model()
    updates = {"at": (3,), "every": None, "samples": 2}
    compressor = make_qoda(model, exchange="allgather", worker_norms=True, levels=levels, update_levels=updates)
    optimizer = make_optimizer(model, compressor, op=getattr(hvd, op))
    with pytest.raises(QodaError, match="no exchange has finished"):
        compressor.worker_norms()
    previous: np.ndarray | float = 0.0
    found = []
    for step in range(1, 5):
        own = local_gradients(model, lambda step=step: loss_of(model, step))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        norms = compressor.worker_norms()
        vector = own_vector(compressor, own, step)
        mine = torch.tensor([(vector**2).sum(), ((vector - previous) ** 2).sum()], dtype=torch.float64)
        squared_norms, squared_changes = sum(gather(mine, "norms")).tolist()
        assert norms.world_size == hvd.size()
        assert norms.squared_norms == pytest.approx(squared_norms, rel=1e-12)
        assert norms.squared_changes == pytest.approx(squared_changes, rel=1e-12)
        found.append((norms.squared_norms, norms.squared_changes))
        previous = vector
    assert compressor.registry.version == (1 if levels == "adaptive" else 0)
    return found


@pytest.mark.parametrize("op", ["Average", "Sum"])
@pytest.mark.parametrize("levels", ["uniform", "adaptive"])
def test_worker_norms_are_raw_and_over_the_whole_model(four_ranks: RankPool, op: str, levels: str) -> None:
    results = four_ranks.run(norms_of_steps, op, levels)
    assert all(result == results[0] for result in results)


def norms_in_reduce_scatter() -> WorkerNorms:
    """Phase 1 is the worker's own quantization; its error is that of one quantization, not of two."""
    model = make_model()
    compressor = make_qoda(model, exchange="reduce_scatter", worker_norms=True)
    optimizer = make_optimizer(model, compressor)
    own = local_gradients(model, lambda: loss_of(model, 0))
    loss_of(model, 0).backward()
    optimizer.step()
    exact = sum(gather(sum(g.double().square().sum() for g in own.values()).view(1), "exact")).item()
    norms = compressor.worker_norms()
    assert norms.squared_norms == norms.squared_changes
    assert exact < norms.squared_norms < 1.1 * exact  # quantization is unbiased, so it adds its variance
    return norms


def test_worker_norms_in_reduce_scatter(four_ranks: RankPool) -> None:
    results = four_ranks.run(norms_in_reduce_scatter)
    assert all(result == results[0] for result in results)


def skipped_by_loss_scaling() -> None:
    """An infinity on one rank: that step is skipped everywhere, so the vectors before stay those before it."""
    model = nn.Linear(40, 40, bias=False)
    compressor = make_qoda(model, worker_norms=True)
    optimizer = make_optimizer(model, compressor)

    def exchange(value: float) -> WorkerNorms:
        model.weight.grad = torch.full((40, 40), value)
        optimizer.synchronize()
        return compressor.worker_norms()

    exchange(1.0)
    assert not np.isfinite(exchange(float("inf") if hvd.rank() == 1 else 5.0).squared_norms)
    assert exchange(3.0).squared_changes == 1600 * 4.0 * hvd.size()


def test_non_finite_exchange_leaves_no_trace(two_ranks: RankPool) -> None:
    two_ranks.run(skipped_by_loss_scaling)


def qoda_step_sizes() -> list[list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(40, 40, bias=False)
    compressor = make_qoda(model, worker_norms=True)
    optimizer = hvd.DistributedOptimizer(
        QODA(model.parameters(), lr=0.5, sum_over="workers", gradient_scale=1.0, worker_norms=compressor.worker_norms),
        named_parameters=model.named_parameters(),
        compression=compressor,
    )
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(10 * step + hvd.rank()))
        model(x).square().mean().backward()
        optimizer.step()
    return model.weight.tolist()


def test_qoda_with_sum_over_workers_keeps_replicas_equal(two_ranks: RankPool) -> None:
    results = two_ranks.run(qoda_step_sizes)
    assert results[0] == results[1]


def test_asking_for_norms_that_are_not_exchanged_is_an_error() -> None:
    with pytest.raises(ConfigError, match="worker_norms=True"):
        make_qoda(make_model()).worker_norms()


def test_vectors_kept_as_messages_are_small() -> None:
    plan = MessagePlan.build([Slice("p", 0, 2**16, torch.float32, "x", 0)], make_qoda_codebooks())
    exchange = make_exchange("allgather", plan, make_qoda_codebooks(), LocalTransport(), "x")
    exchange.start([torch.randn(2**16)], Stamp(0, 1, 0))
    assert exchange.own_message().message.numel() < 2**16 * 5.2 / 8


def make_qoda_codebooks() -> dict[str, Any]:
    codebooks = make_qoda(nn.Linear(256, 256, bias=False)).registry.codebooks
    return {"x": next(iter(codebooks.values()))}
