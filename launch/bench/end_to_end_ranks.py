"""What one rank of `end_to_end.py` does: train with every method in turns, print rows as JSON lines."""

import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
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

_logger = logging.getLogger("hvd_qoda.session")


class StandStill(torch.optim.Optimizer):
    """An optimizer whose step takes no time: a GPU's would take about a millisecond."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        """Leave the parameters as they are."""


class Notes(logging.Handler):
    """Keeps what `hvd_qoda` says of its choice of a scheme."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one sentence."""
        self.said.append(record.getMessage())

    def __enter__(self) -> None:
        _logger.setLevel(logging.INFO)
        _logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        _logger.removeHandler(self)


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


class Training:
    """A model that is trained with one method; the same on every rank but for the data.

    Args:
        method: its name.
        order: what `main` was given.
    """

    def __init__(self, method: str, order: dict[str, Any]) -> None:
        network = NETWORKS[order["network"]]
        self.method = method
        self._model = network.build(order["seed"])
        torch.manual_seed(1000 * order["seed"] + hvd.rank())  # of the data
        if order["compute"] == "replay":
            recordings = record(self._model)
            self._replay = Replay(self._model, recordings, network.forward_ms / 1e3, network.backward_ms / 1e3)
        else:
            self._replay = None
        self._optimizer = optimizer_of(method, self._model, order)
        self._seconds: list[float] = []
        self._sent: list[int] = []
        self._notes = Notes()
        with self._notes:
            for _ in range(_SETTLING_STEPS.get(method, _WARM_UP_STEPS)):
                self._step()

    def measure(self) -> None:
        """A step that counts."""
        hvd.barrier()
        before = interface_bytes()[1]
        begin = time.perf_counter()
        self._step()
        self._seconds.append(time.perf_counter() - begin)
        hvd.barrier()
        self._sent.append(interface_bytes()[1] - before)

    def row(self) -> dict[str, Any]:
        """Median step time of the slowest rank and bytes that a host's interface has sent in a step."""
        of_ranks = hvd.allgather_object((self._seconds, self._sent))
        slowest = [max(times) for times in zip(*(ranks for ranks, _ in of_ranks), strict=True)]
        return {
            "method": self.method,
            "median_s": statistics.median(slowest),
            "least_s": min(slowest),
            "largest_s": max(slowest),
            "steps": len(slowest),
            "bytes_per_rank": round(statistics.fmean(statistics.median(counted) for _, counted in of_ranks)),
            "elements": sum(parameter.numel() for parameter in self._model.parameters()),
            "choice": self._notes.said,
        }

    def _step(self) -> None:
        self._optimizer.zero_grad()
        if self._replay is None:
            self._model.forward().backward()
        else:
            self._replay.backward(self._replay.forward())
        self._optimizer.step()


def main(arguments: Sequence[str]) -> int:
    """`end_to_end_ranks.py JSON`: network, methods, steps, bits, seed."""
    order = json.loads(arguments[0])
    torch.set_num_threads(1)
    hvd.init()
    trainings = [Training(method, order) for method in (ALONE, *order["methods"])]
    for _ in range(order["steps"]):  # in turns: what disturbs the machine for a while disturbs all methods alike
        for training in trainings:
            training.measure()
    for training in trainings:
        row = training.row()
        if hvd.rank() == 0:
            print(ROW + json.dumps(row), flush=True)
    hvd.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
