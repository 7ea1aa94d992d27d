"""What one rank of `end_to_end.py` does: train for some steps with every method, print rows as JSON lines."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import horovod.torch as hvd
import torch
from torch import nn

import hvd_qoda
from launch.bench.exchange_methods import AUTO, FP16, FP32, OURS
from launch.bench.exchange_ranks import ROW
from launch.bench.replay import NETWORKS, Replay, record
from launch.virtual_hosts import interface_bytes

ALONE = "alone"
_SETTLING_STEPS = {AUTO: 24}  # longer than the trials of the first steps
_WARM_UP_STEPS = 3


class StandStill(torch.optim.Optimizer):
    """An optimizer whose step takes no time: a GPU's would take about a millisecond."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Leave the parameters as they are."""


def optimizer_of(method: str, model: nn.Module, order: dict[str, Any]) -> Any:
    """The optimizer that exchanges gradients by this method."""
    plain = StandStill(model.parameters())
    if method == ALONE:
        return plain
    if method in (FP32, FP16):
        compression = hvd.Compression.none if method == FP32 else hvd.Compression.fp16
        return hvd.DistributedOptimizer(plain, model.named_parameters(), compression)
    own = hvd_qoda.Compression.qoda(
        model, bits=order["bits"], exchange=OURS.get(method, "auto"), seed=order["seed"], fusion_buffer_mb=order["mb"]
    )
    return hvd_qoda.DistributedOptimizer(plain, model=model, compression=own)


def timed(method: str, order: dict[str, Any]) -> dict[str, Any]:
    """Median step time of the slowest rank and bytes that a host's interface has sent in a step."""
    network = NETWORKS[order["network"]]
    model = network.build(order["seed"])
    torch.manual_seed(1000 * order["seed"] + hvd.rank())  # of the data
    replayed = Replay(model, record(model), network.forward_ms / 1e3, network.backward_ms / 1e3)
    optimizer = optimizer_of(method, model, order)

    def replayed_step() -> None:
        optimizer.zero_grad()
        replayed.backward(replayed.forward())
        optimizer.step()

    def real_step() -> None:
        optimizer.zero_grad()
        model.forward().backward()
        optimizer.step()

    step: Callable[[], None] = replayed_step if order["compute"] == "replay" else real_step
    for _ in range(_SETTLING_STEPS.get(method, _WARM_UP_STEPS)):
        step()
    seconds, sent = [], []
    for _ in range(order["steps"]):
        hvd.barrier()
        before = interface_bytes()[1]
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
        hvd.barrier()
        sent.append(interface_bytes()[1] - before)
    of_ranks = hvd.allgather_object((seconds, sent))
    slowest = [max(times) for times in zip(*(ranks for ranks, _ in of_ranks), strict=True)]
    return {
        "median_s": statistics.median(slowest),
        "least_s": min(slowest),
        "largest_s": max(slowest),
        "steps": len(slowest),
        "bytes_per_rank": round(statistics.fmean(statistics.median(counted) for _, counted in of_ranks)),
        "elements": sum(parameter.numel() for parameter in model.parameters()),
    }


def main(arguments: Sequence[str]) -> int:
    """`end_to_end_ranks.py JSON`: network, methods, steps, bits, seed."""
    order = json.loads(arguments[0])
    torch.set_num_threads(1)
    hvd.init()
    for method in (ALONE, *order["methods"]):
        row = timed(method, order)
        if hvd.rank() == 0:
            print(ROW + json.dumps({"method": method, **row}), flush=True)
    hvd.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
