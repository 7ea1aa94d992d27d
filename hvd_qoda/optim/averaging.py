"""The averaged iterate: what QODA and Q-GenX return, beside the iterate that the model holds while it trains."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.optim.state import EagerStateOptimizer, State


class AveragedIterateOptimizer(EagerStateOptimizer):
    """An optimizer that can keep the running average of the points ``X_{t+1/2}`` at which gradients were taken.

    The rates of convergence of both papers are those of this average. It is the plain mean over all steps, kept in
    float32 (float64 for float64 parameters): one buffer more per parameter. Buffers that are not parameters (running
    statistics of a normalisation layer) are not averaged; recompute them where a model has them.
    """

    _averages_are_in = False

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within the context the model holds the averaged iterate; afterwards its parameters have their bits back.

        Parameters that have taken no step stay as they are. Raises `UnsupportedError` with ``average=False``, when
        nested, and when a step is tried inside.
        """
        self._refuse_without_average()
        self._refuse_while_averages_are_in("averaged_parameters()")
        averaged = [(parameter, average) for parameter, average in self._averages() if average is not None]
        kept = [parameter.detach().clone() for parameter, _ in averaged]
        self._averages_are_in = True
        try:
            with torch.no_grad():
                for parameter, average in averaged:
                    parameter.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), value in zip(averaged, kept, strict=True):
                    parameter.copy_(value)
            self._averages_are_in = False

    @torch.no_grad()
    def copy_averaged_to(self, targets: Iterable[torch.Tensor]) -> None:
        """Copy the averaged iterate into `targets`, one tensor per parameter in the order of the groups.

        Each target has its parameter's shape, and any floating-point dtype and device. Parameters that have taken no
        step are copied as they are. Raises `UnsupportedError` with ``average=False``, `ConfigError` where number or
        shapes differ (nothing is copied then).
        """
        self._refuse_without_average()
        sources = [parameter if average is None else average for parameter, average in self._averages()]
        destinations = list(targets)
        if _shapes(sources) != _shapes(destinations):
            raise ConfigError(
                f"copy_averaged_to needs one tensor per parameter, of equal shape: "
                f"the optimizer has {_shapes(sources)}, the targets are {_shapes(destinations)}."
            )
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)

    def _averages(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for parameter in self._parameters():
            state = self.state.get(parameter)
            yield parameter, state["average"] if state and int(state["step"]) > 0 else None

    def _refuse_without_average(self) -> None:
        if not self.param_groups[0]["average"]:
            raise UnsupportedError(f"this {type(self).__name__} keeps no average: build it with average=True.")

    def _refuse_while_averages_are_in(self, what: str) -> None:
        if self._averages_are_in:
            raise UnsupportedError(f"{what} inside averaged_parameters(): leave the context first.")


def _shapes(tensors: list[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def include_in_average(state: State, point: torch.Tensor) -> None:
    """Make `point` the ``state["step"]``-th member of the running mean ``state["average"]``, where one is kept."""
    if "average" in state:
        average = state["average"]
        average.lerp_(point.to(average.dtype), 1.0 / int(state["step"]))
