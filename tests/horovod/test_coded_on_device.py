"""Gradients coded on the device that holds them, under Horovod: the PTX machine, a wrong one, or a GPU."""

import hashlib
from typing import Any
from unittest import mock

import horovod.torch as hvd
import pytest
import torch

import hvd_qoda
from hvd_qoda import codec_device
from tests.coded_on_machine import KERNELS, FlippingRuntime, MachineRuntime, compiled, gradients_on
from tests.horovod.training import batch, make_model, make_optimizer, make_qoda
from tests.launcher import RankPool

STEPS = 3
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "all-gather": {"exchange": "allgather", "error_feedback": True, "measure_error_every": 1},
    "reduce-scatter": {"exchange": "reduce_scatter", "bits": 4, "norm": "l2", "layers": [{"type": "bias", "bits": 8}]},
}


def trained(overlapping: bool, options: dict[str, Any], device: str = "cpu") -> str:
    model = make_model(width=24).to(device)
    # Levels are fitted before the third step.
    compression = make_qoda(model, **{"update_levels": {"at": (3,)}, "min_numel": 100, **options})
    if overlapping:
        optimizer = hvd_qoda.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model=model, compression=compression
        )
    else:
        optimizer = make_optimizer(model, compression)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, labels = batch(step)
        torch.nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device)).backward()
        optimizer.step()
    digest = hashlib.blake2b()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    assert compression.registry.version == 1
    return digest.hexdigest()


def on_the_cpu_and_on_the_machine(overlapping: bool, options: dict[str, Any], texts: dict[str, str]) -> Any:
    """Twice the same training: on CPUs; and with the machine on rank 0 and then on both."""
    results = [trained(overlapping, options)]
    launches = []
    for on_device in ({0}, {0, 1}):
        runtime = MachineRuntime(texts)
        if hvd.rank() in on_device:
            with gradients_on(runtime):
                results.append(trained(overlapping, {**options, "codec_device": "gpu"}))
        else:
            results.append(trained(overlapping, options))
        launches.append(len(runtime.launches))
    return results, launches


@pytest.mark.parametrize("overlapping", [False, True], ids=["stock", "overlapping"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bits_are_those_of_the_cpu(two_ranks: RankPool, name: str, overlapping: bool) -> None:
    outcomes = two_ranks.run(on_the_cpu_and_on_the_machine, overlapping, CONFIGURATIONS[name], compiled(KERNELS))
    assert len({digest for digests, _ in outcomes for digest in digests}) == 1
    (_, first), (_, second) = outcomes
    assert min(first) > 2 * STEPS
    assert second[0] == 0 < 2 * STEPS < second[1]


def with_a_wrong_bit(texts: dict[str, str]) -> tuple[str, str, bool]:
    runtime = FlippingRuntime(texts)
    options = CONFIGURATIONS["all-gather"]
    plain = trained(True, options)
    with mock.patch.object(codec_device, "runtime_of", return_value=runtime):
        return plain, trained(True, options), bool(runtime.launches)


def test_a_device_that_fails_its_self_check_changes_nothing(two_ranks: RankPool) -> None:
    for plain, found, was_tried in two_ranks.run(with_a_wrong_bit, compiled(KERNELS)):
        assert found == plain
        assert was_tried


def coded_on_either(overlapping: bool, options: dict[str, Any]) -> tuple[str, str]:
    """Gradients on the first GPU, of which all ranks have a part."""
    cpu, gpu = (trained(overlapping, {**options, "codec_device": each}, "cuda:0") for each in ("cpu", "gpu"))
    return cpu, gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU, or torch is a CPU build")
@pytest.mark.gpu
@pytest.mark.parametrize("overlapping", [False, True], ids=["stock", "overlapping"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_gpu_gives_the_bits_of_the_cpu(two_ranks: RankPool, name: str, overlapping: bool) -> None:
    outcomes = two_ranks.run(coded_on_either, overlapping, CONFIGURATIONS[name])
    assert len({digest for outcome in outcomes for digest in outcome}) == 1
