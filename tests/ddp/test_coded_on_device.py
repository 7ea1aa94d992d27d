"""Gradients coded on the device that holds them, under DistributedDataParallel: on the PTX machine."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_qoda import ddp
from tests.coded_on_machine import KERNELS, MachineRuntime, compiled, gradients_on
from tests.launcher import RankPool

STEPS = 3


def trained(options: dict[str, Any]) -> bytes:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    wrapped = DistributedDataParallel(model)
    state = ddp.QodaState(model, **{"timeout_s": 60.0, "min_numel": 100, "update_levels": {"at": (3,)}, **options})
    wrapped.register_comm_hook(state, ddp.comm_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        inputs = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        wrapped(inputs).square().mean().backward()
        optimizer.step()
    assert state.registry.version == 1
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


def on_the_cpu_and_on_the_machine(options: dict[str, Any], texts: dict[str, str]) -> tuple[bytes, bytes, int]:
    runtime = MachineRuntime(texts)
    plain = trained(options)
    with gradients_on(runtime):
        return plain, trained({**options, "codec_device": "gpu"}), len(runtime.launches)


def test_bits_are_those_of_the_cpu(two_ranks: RankPool) -> None:
    options = {"exchange": "reduce_scatter", "error_feedback": True, "fusion_buffer_mb": 0.003}
    outcomes = two_ranks.run(on_the_cpu_and_on_the_machine, options, compiled(KERNELS))
    assert len({bits for plain, coded, _ in outcomes for bits in (plain, coded)}) == 1
    assert min(launches for _, _, launches in outcomes) > 2 * STEPS
