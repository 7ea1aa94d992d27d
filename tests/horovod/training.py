"""What the tests of this folder run inside a rank: models, their gradients, and what an exchange must make of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn
from torch.nn import functional as F

from hvd_qoda.compression import Compression
from hvd_qoda.exchange import Stamp
from hvd_qoda.horovod import QodaCompressor
from hvd_qoda.hosts import Hosts
from hvd_qoda.schemes import make_exchange
from hvd_qoda.telemetry import StepRecord
from qoda_kernels.layout import MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

FEATURES, CLASSES = 40, 7
TIMEOUT_S = 20.0


class ListSink:
    """Keeps the records."""

    every_rank = True

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.codebooks: dict[str, Any] = {}

    def start(self, start: Any) -> None:
        self.codebooks = dict(start.codebooks)

    def write(self, record: StepRecord) -> None:
        self.records.append(record)

    def close(self, failed: bool = False) -> None:
        pass


def make_model(seed: int = 0, width: int = 96) -> nn.Sequential:
    """A small network with quantized matrices, an exact output layer, and biases."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def make_optimizer(
    model: nn.Module,
    compression: Any,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    prefix: str = "",
    **options: Any,
) -> Any:
    """The stock distributed optimizer with a compressor.

    `prefix` is put before the parameters' names: for tests that leave Horovod's all-reduces unanswered.
    """
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    return hvd.DistributedOptimizer(
        make(model.parameters(), lr=lr), named_parameters=named, compression=compression, **options
    )


def make_qoda(model: nn.Module, process_set: Any = None, telemetry: Any = None, **keywords: Any) -> QodaCompressor:
    """A compressor with a short deadline and an exchange that time does not change, unless told otherwise."""
    return Compression.qoda(
        model,
        process_set=process_set,
        telemetry=telemetry,
        **{"timeout_s": TIMEOUT_S, "exchange": "by_bytes", **keywords},
    )


def batch(step: int, rank: int | None = None, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's data of one step."""
    generator = torch.Generator().manual_seed(1000 * step + (hvd.rank() if rank is None else rank))
    x = torch.randn(size, FEATURES, generator=generator)
    return x, (x[:, :CLASSES] + 0.3 * torch.randn(size, CLASSES, generator=generator)).argmax(dim=1)


def loss_of(model: nn.Module, step: int, rank: int | None = None) -> torch.Tensor:
    x, y = batch(step, rank)
    return F.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> list[float]:
    """Ordinary training; returns this rank's losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_step(model: nn.Module, optimizer: Any, step: int = 0) -> None:
    """One ordinary step, without zeroing gradients first."""
    loss_of(model, step).backward()
    optimizer.step()


def bits_of(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """The tensors' bytes, for comparing ranks."""
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the gradients; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().to_dense().clone()
        for name, p in model.named_parameters()
    }


def local_gradients(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's own gradient of a loss, without disturbing those that the parameters hold or any hook."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g.to_dense()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def gather(tensor: torch.Tensor, name: str, process_set: Any = None) -> list[torch.Tensor]:
    """Every rank's tensor, unquantized."""
    group = hvd.global_process_set if process_set is None else process_set
    size = group.size()
    data = tensor.reshape(-1).view(torch.uint8)
    parts = hvd.allgather(data, name=f"test.{name}", process_set=group).view(size, -1)
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part in parts]


def expected_means(
    compressor: QodaCompressor,
    own: Mapping[str, torch.Tensor],
    step: int,
    process_set: Any = None,
    hosts: Hosts | None = None,
) -> dict[str, torch.Tensor]:
    """What the compressor's exchanges of a step must give, computed without Horovod from all ranks' gradients.

    Parameters that Horovod reduces itself get the float64 mean.
    """
    registry = compressor.registry
    means = {}
    for name, gradient in own.items():
        entry = registry.parameters[name]
        everyone = gather(gradient, name, process_set)
        exact = registry.codebooks[entry.codebook].is_exact
        if gradient.numel() == 0 or (exact and gradient.dtype != torch.bfloat16):
            means[name] = (sum(g.double() for g in everyone) / len(everyone)).to(gradient.dtype)
            continue
        slices = [Slice(name, 0, gradient.numel(), gradient.dtype, entry.codebook, entry.offset)]
        plan = MessagePlan.build(slices, registry.codebooks)
        group = InMemoryGroup(len(everyone))
        exchanges = [
            make_exchange(compressor.config.exchange, plan, registry.codebooks, t, "x", hosts=hosts)
            for t in group.transports
        ]
        stamp = Stamp(compressor.config.seed, step, registry.version)
        for exchange, values in zip(exchanges, everyone, strict=True):
            exchange.start([values.reshape(-1)], stamp)
        while not all([exchange.advance() for exchange in exchanges]):
            pass
        out = torch.empty(gradient.numel(), dtype=gradient.dtype)
        exchanges[0].finish([out])
        means[name] = out.view(gradient.shape)
    return means


def assert_gradients(
    model: nn.Module,
    compressor: QodaCompressor,
    own: Mapping[str, torch.Tensor],
    scale: float = 1.0,
    process_set: Any = None,
    hosts: Hosts | None = None,
) -> None:
    """The parameters hold `scale` times the mean of what all ranks had: bit for bit where compressed, else nearly."""
    means = expected_means(compressor, own, compressor.step, process_set, hosts)
    codebooks = compressor.registry.codebooks
    for name, parameter in model.named_parameters():
        expected, found = means[name] * scale, parameter.grad
        assert found is not None, name
        found = found.to_dense()
        if codebooks[compressor.registry.parameters[name].codebook].is_exact:
            tolerance = {torch.float16: 4e-3, torch.bfloat16: 2e-2}.get(found.dtype, 1e-5)
            assert torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance * 1e-2), name
        else:
            assert torch.equal(found, expected), (name, (found - expected).abs().max())
