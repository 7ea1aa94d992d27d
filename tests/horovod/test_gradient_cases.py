"""Gradients of every dtype, layout and memory format under both of Horovod's optimizers; see `tests.gradient_cases`."""

from typing import Any

import horovod.torch as hvd
import pytest
import torch

import hvd_qoda
from hvd_qoda.errors import UnsupportedError
from tests.gradient_cases import CASES, CaseModel, bits, compared, expected, verdict
from tests.horovod.training import make_optimizer, make_qoda
from tests.launcher import RankPool

FRONTS = ("stock", "overlapping")
HOSTS_OWN = "sparse_bfloat16"  # stock Horovod gathers rows itself, and refuses this dtype by name


def every_case(front: str, exchange: str) -> dict[str, tuple[str, bytes]]:
    found = {}
    for name, case in CASES.items():
        if (front, name) == ("stock", HOSTS_OWN):
            continue
        model = CaseModel(case)
        try:
            compression = make_qoda(model, exchange=exchange)
        except UnsupportedError as error:
            found[name] = ("refused" if "'weight'" in str(error) else str(error), b"")
            continue
        optimizer: Any
        if front == "stock":
            optimizer = make_optimizer(model, compression)
        else:
            plain = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer = hvd_qoda.DistributedOptimizer(plain, model=model, compression=compression)
        for _ in range(2):  # buffers are filled anew behind the first step
            optimizer.zero_grad()
            model(hvd.rank()).backward()
            optimizer.synchronize()
        gradient = model.parameter.grad
        found[name] = (verdict(model, gradient, hvd.size()), bits(gradient))
    return found


@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter", "off"])
@pytest.mark.parametrize("front", FRONTS)
def test_every_gradient_is_quantized_or_exact_or_refused_by_name(
    two_ranks: RankPool, front: str, exchange: str
) -> None:
    wanted = expected(CASES, quantize=exchange != "off")
    if front == "stock":
        del wanted[HOSTS_OWN]
    assert compared(two_ranks.run(every_case, front, exchange)) == wanted
