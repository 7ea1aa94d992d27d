"""Squared norms over a whole model, in float64."""

import math

import torch


class SquaredNorm:
    """Sum of the squares of all elements of the tensors that were added.

    Every tensor is reduced in float64 when it is added; the results are added exactly (`math.fsum`), so the order of
    the tensors does not matter. Non-finite elements make the sum non-finite.
    """

    def __init__(self) -> None:
        self._norms: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor) -> None:
        """Count in a real tensor of any shape, also an empty one; does not wait for its device."""
        self._norms.append(torch.linalg.vector_norm(tensor, dtype=torch.float64))

    def value(self) -> float:
        """The sum so far, 0 without tensors; waits once for the device of the first tensor."""
        if not self._norms:
            return 0.0
        device = self._norms[0].device
        squares = [norm * norm for norm in torch.stack([norm.to(device) for norm in self._norms]).tolist()]
        return math.fsum(squares) if all(map(math.isfinite, squares)) else sum(squares)
