"""What an optimizer needs to know about the single workers' dual vectors, besides their mean.

The learning rates of QODA (arXiv 2505.14371) and Q-GenX (arXiv 2308.09187) contain sums over the workers,
``sum_k |hatV_k|^2 / K^2``. An averaged gradient does not hold them, so an exchange that knows its own messages reports
them: each rank's two numbers are all-gathered in float64 and added in rank order, so that every rank holds the same
bits.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class WorkerNorms:
    """Squared norms over the whole model of the dual vectors exchanged last, added over the workers.

    squared_norms: ``sum_k |hatV_k|^2``; squared_changes: ``sum_k |hatV_k - previous hatV_k|^2``, where the vector
    before the first is zero; world_size: K. Both sums are float64 and raw: they are those of the vectors on the wire,
    before any clipping, loss scaling, accumulation or ``op=Sum`` changed the gradient.
    """

    squared_norms: float
    squared_changes: float
    world_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"WorkerNorms.world_size is the number of workers, at least 1; got {self.world_size}.")
        if self.squared_norms < 0.0 or self.squared_changes < 0.0:
            raise ValueError(
                f"WorkerNorms holds squared norms, which are not negative; got squared_norms={self.squared_norms}, "
                f"squared_changes={self.squared_changes}."
            )

    def norm_term(self, gradient_scale: float = 1.0) -> float:
        """``sum_k |c hatV_k|^2 / K^2`` for ``c = gradient_scale``."""
        return self.squared_norms * gradient_scale**2 / self.world_size**2

    def change_term(self, gradient_scale: float = 1.0) -> float:
        """``sum_k |c hatV_k - c previous hatV_k|^2 / K^2`` for ``c = gradient_scale``."""
        return self.squared_changes * gradient_scale**2 / self.world_size**2


class WorkerNormsSource(Protocol):
    """Anything that, called without arguments, returns the `WorkerNorms` of the exchange that finished last.

    QODA calls it once per step; Q-GenX, which exchanges twice per step, once after the second exchange.
    """

    def __call__(self) -> WorkerNorms:
        """The norms, equal bit for bit on every rank."""
        ...
