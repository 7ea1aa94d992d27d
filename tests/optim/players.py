"""Plays the games with the optimizers: K workers simulated in one process, their exchange an average in NumPy."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_qoda.optim import QODA, QGenX, WorkerNorms

Vector = NDArray[np.float64]
SHAPES = ((3, 5), (25,))  # two parameters, 40 coordinates


def parameters_at(point: Vector, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    start, parameters = 0, []
    for shape in SHAPES:
        size = int(np.prod(shape))
        values = torch.tensor(point[start : start + size].reshape(shape), dtype=dtype)
        parameters.append(torch.nn.Parameter(values))
        start += size
    return parameters


def point_of(tensors: list[torch.Tensor]) -> Vector:
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


@dataclass
class Exchange:
    """Averages the workers' vectors into ``.grad`` and reports the norms of the last exchange."""

    sampler: Callable[[Vector, int], Vector]
    parameters: list[torch.nn.Parameter]
    count: int = 0
    before: Vector = field(default_factory=lambda: np.zeros(1))
    last: Vector = field(default_factory=lambda: np.zeros(1))

    def __call__(self) -> None:
        self.before, self.last = self.last, self.sampler(point_of(self.parameters), self.count)
        self.count += 1
        mean, start = np.mean(self.last, axis=0), 0
        for parameter in self.parameters:
            size = parameter.numel()
            values = torch.from_numpy(mean[start : start + size].copy())
            parameter.grad = values.reshape(parameter.shape).to(parameter.dtype)
            start += size

    def worker_norms(self) -> WorkerNorms:
        changes = self.last - self.before
        return WorkerNorms(float(np.sum(self.last**2)), float(np.sum(changes**2)), len(self.last))


def play(optimizer: QODA | QGenX, exchange: Exchange, steps: int) -> list[Vector]:
    """The points X_{t+1/2} at which the last exchange of every step took place."""
    points = []
    for _ in range(steps):
        exchange()
        if isinstance(optimizer, QGenX):
            optimizer.extrapolate()
            exchange()
        points.append(point_of(exchange.parameters))
        optimizer.step()
    return points


def averaged(optimizer: QODA | QGenX, parameters: list[torch.nn.Parameter]) -> Vector:
    targets = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    optimizer.copy_averaged_to(targets)
    return point_of(targets)
