"""Gradients coded on the device that holds them, under DeepSpeed: on the PTX machine, or on a GPU."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.coded_on_machine import KERNELS, MachineRuntime, compiled, gradients_on
from tests.deepspeed.training import configuration, engine_of
from tests.launcher import RankPool

STEPS = 2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs).float().square().mean()


def trained(stage: int, options: dict[str, Any]) -> bytes:
    with engine_of(configuration(stage, "bf16", {"min_numel": 100, **options}), Small()) as engine:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
            engine.backward(engine(torch.randn(4, 20, generator=generator).to(engine.device, torch.bfloat16)))
            engine.step()
        return b"".join(p.detach().float().cpu().numpy().tobytes() for p in engine.module.parameters())


def on_the_cpu_and_on_the_machine(stage: int, texts: dict[str, str]) -> tuple[bytes, bytes, int]:
    runtime = MachineRuntime(texts)
    plain = trained(stage, {})
    with gradients_on(runtime):
        return plain, trained(stage, {"codec_device": "gpu"}), len(runtime.launches)


def test_bits_are_those_of_the_cpu(two_ranks: RankPool) -> None:
    outcomes = two_ranks.run(on_the_cpu_and_on_the_machine, 2, compiled(KERNELS))
    assert len({bits for plain, coded, _ in outcomes for bits in (plain, coded)}) == 1
    assert min(launches for *_, launches in outcomes) > 2 * STEPS


def coded_on_either(stage: int) -> tuple[bytes, bytes]:
    cpu, gpu = (trained(stage, {"codec_device": each}) for each in ("cpu", "gpu"))
    return cpu, gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU, or torch is a CPU build")
@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 2])
def test_a_gpu_gives_the_bits_of_the_cpu(stage: int) -> None:
    environment = {"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0"}  # both ranks on the first GPU, messages over gloo
    with RankPool(2, environment, host="torch") as ranks:
        outcomes = ranks.run(coded_on_either, stage)
    assert len({bits for outcome in outcomes for bits in outcome}) == 1
