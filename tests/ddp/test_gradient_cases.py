"""Gradients of every dtype, layout and memory format under the hook; see `tests.gradient_cases`."""

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvd_qoda import ddp
from hvd_qoda.errors import UnsupportedError
from tests.gradient_cases import CASES, CaseModel, bits, compared, expected, verdict
from tests.launcher import RankPool

SENT = {name: case for name, case in CASES.items() if name != "expanded"}  # torch cannot broadcast such a parameter


def every_case(exchange: str) -> dict[str, tuple[str, bytes]]:
    found = {}
    for name, case in SENT.items():
        model = CaseModel(case)
        try:
            state = ddp.QodaState(model, exchange=exchange, timeout_s=20.0)
        except UnsupportedError as error:
            found[name] = ("refused" if "'weight'" in str(error) else str(error), b"")
            continue
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(state, ddp.comm_hook)
        for _ in range(2):  # DDP forms its buckets anew behind the first step
            wrapped.zero_grad()
            wrapped(dist.get_rank()).backward()
        gradient = model.parameter.grad
        found[name] = (verdict(model, gradient, dist.get_world_size()), bits(gradient))
    return found


@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter", "off"])
def test_every_gradient_is_quantized_or_exact_or_refused_by_name(two_ranks: RankPool, exchange: str) -> None:
    assert compared(two_ranks.run(every_case, exchange)) == expected(SENT, quantize=exchange != "off")
