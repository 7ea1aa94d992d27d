"""Gradients coded on the device that holds them, under DistributedDataParallel: on the PTX machine, or on a GPU."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_qoda import ddp
from hvd_qoda.exchange import AllGatherExchange, Stamp
from hvd_qoda.torch_distributed import TorchTransport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from tests.coded_on_machine import KERNELS, MachineRuntime, compiled, gradients_on
from tests.launcher import RankPool

STEPS = 3
OPTIONS = {"exchange": "reduce_scatter", "error_feedback": True, "fusion_buffer_mb": 0.003}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU, or torch is a CPU build")


def trained(options: dict[str, Any], device: str = "cpu") -> bytes:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)).to(device)
    wrapped = DistributedDataParallel(model)
    state = ddp.QodaState(model, **{"timeout_s": 60.0, "min_numel": 100, "update_levels": {"at": (3,)}, **options})
    wrapped.register_comm_hook(state, ddp.comm_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        wrapped(inputs.to(device)).square().mean().backward()
        optimizer.step()
    assert state.registry.version == 1
    return b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in model.parameters())


def on_the_cpu_and_on_the_machine(options: dict[str, Any], texts: dict[str, str]) -> tuple[bytes, bytes, int]:
    runtime = MachineRuntime(texts)
    plain = trained(options)
    with gradients_on(runtime):
        return plain, trained({**options, "codec_device": "gpu"}), len(runtime.launches)


def test_bits_are_those_of_the_cpu(two_ranks: RankPool) -> None:
    outcomes = two_ranks.run(on_the_cpu_and_on_the_machine, OPTIONS, compiled(KERNELS))
    assert len({bits for plain, coded, _ in outcomes for bits in (plain, coded)}) == 1
    assert min(launches for _, _, launches in outcomes) > 2 * STEPS


def coded_on_either(options: dict[str, Any]) -> tuple[bytes, bytes]:
    """Gradients on the first GPU, of which all ranks have a part; messages over gloo."""
    cpu, gpu = (trained({**options, "codec_device": each}, "cuda:0") for each in ("cpu", "gpu"))
    return cpu, gpu


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter"])
def test_a_gpu_gives_the_bits_of_the_cpu(two_ranks: RankPool, exchange: str) -> None:
    outcomes = two_ranks.run(coded_on_either, {**OPTIONS, "exchange": exchange})
    assert len({bits for outcome in outcomes for bits in outcome}) == 1


def over_nccl() -> bool:
    """An all-gather of one rank over NCCL: a message of gradients on the GPU, and their mean."""
    group = dist.new_group([dist.get_rank()], backend="nccl", use_local_synchronization=True)
    book = Codebook.uniform(5)
    plan = MessagePlan.build([Slice("weight", 0, 3000, torch.float32, "other", 0)], {"other": book})
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    means = []
    for device in ("cpu", "cuda:0"):
        exchange = AllGatherExchange(plan, {"other": book}, TorchTransport(group), f"nccl {device}")
        exchange.start([values.to(device)], Stamp(0, 1, 0))
        out = torch.zeros(3000, device=device)
        exchange.finish([out])
        means.append(out.cpu())
    return torch.equal(*means)


@needs_gpu
@pytest.mark.gpu
def test_messages_over_nccl() -> None:
    if not dist.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    with RankPool(1, host="torch") as rank:
        assert rank.run(over_nccl) == [True]
