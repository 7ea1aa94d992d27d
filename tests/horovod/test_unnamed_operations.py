"""Users' own Horovod operations without names, between backward() and step().

Horovod names them after the number of operations that the process has started before. So at every line of the user's
program all ranks must have started equally many, however much faster one of them is than another.
"""

import random
import time

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from tests.horovod.training import bits_of, loss_of, make_model, make_optimizer, make_qoda
from tests.launcher import run_ranks


def interleaved(scheme: str) -> list[bytes]:
    """Ranks dawdle at random within forward and backward passes, and average numbers without naming them."""
    dawdle = random.Random(hvd.rank())

    def pause(*_: object) -> None:
        time.sleep(dawdle.choice([0.0, 0.0, 0.02]))

    model = make_model()
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.register_full_backward_hook(pause)
    compressor = make_qoda(model, exchange=scheme, layers=[{"name": "*", "bits": 5}], worker_norms=True)
    optimizer = make_optimizer(model, compressor)
    averages = []
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        pause()
        averages.append(hvd.allreduce(loss.detach()))
        loss.backward()
        averages.append(hvd.allreduce(loss.detach()))
        pause()
        optimizer.synchronize()
        averages.append(hvd.allreduce(loss.detach()))
        with optimizer.skip_synchronize():
            optimizer.step()
        averages.append(hvd.allreduce(loss.detach()))
    assert all(torch.equal(average, averages[k // 4 * 4]) for k, average in enumerate(averages))
    return bits_of(model.parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_horovod_unnamed_operations_between_backward_and_step(scheme: str) -> None:
    results = run_ranks(interleaved, 2, scheme, timeout=90)  # new ranks: those of the pool have started unequally many
    assert all(result == results[0] for result in results)
