"""Statistics of absolute magnitudes: what workers exchange so that all clip at the same value.

Codebooks that clip (`tails.py`) work on gradients themselves, not on values normalised by a bucket. Their statistics
are histograms of |g|, one for each sign, on a fixed logarithmic grid: 8 cells in each octave from 2**-100 to 2**28, one
below and one above. A cell includes its lower end; its index is the exponent and the upper 3 mantissa bits of |g| as
float32. Every cell keeps the number of its values, their sum and the sum of their squares. Sums of logarithms above
any edge of the grid, which a power-law fit needs, follow from these to 1e-5: within a cell of width 9 %,
sum ln g = n (ln m - s**2 / (2 m**2)) with mean m and variance s**2, up to the third moment.

Zeros are counted apart: they cost nothing in any codebook, and a sparse gradient's distribution is that of the rest.
The order of every sum is fixed (see `statistics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from qoda_kernels.compilation import cached_kernel
from qoda_kernels.elementary import logarithm
from qoda_kernels.errors import CodebookError, WireError
from qoda_kernels.levels import Float32Array, Float64Array, quantization_variance
from qoda_kernels.statistics import Mergeable, PiecewiseUniform

_LOWEST_EXPONENT, _TOP_EXPONENT = 27, 155  # exponent fields of 2**-100 and 2**28
_MANTISSA_BITS = 3
_SHIFT = 23 - _MANTISSA_BITS
_REGULAR_CELLS = (_TOP_EXPONENT - _LOWEST_EXPONENT) << _MANTISSA_BITS
MAGNITUDE_CELLS = _REGULAR_CELLS + 2
_COUNTERS = 2  # zeros, values that are not finite


def _edges() -> Float64Array:
    """Lower ends of all cells but the first, and 2**28, float64 [MAGNITUDE_CELLS - 1]."""
    words = np.arange(_LOWEST_EXPONENT << _MANTISSA_BITS, (_TOP_EXPONENT << _MANTISSA_BITS) + 1, dtype=np.int32)
    edges = (words << _SHIFT).view(np.float32).astype(np.float64)
    edges.flags.writeable = False
    return edges


EDGES = _edges()


@dataclass(frozen=True, eq=False)
class MagnitudeStatistics(Mergeable):
    """Sums over the cells of the grid described at the top of this file.

    cells: float64 [2, MAGNITUDE_CELLS, 3], of positive and of negative values: number, sum of |g|, sum of g**2.
    zeros: values that are exactly 0. skipped: values that are not finite.
    """

    array_length: ClassVar[int] = _COUNTERS + 2 * 3 * MAGNITUDE_CELLS

    cells: Float64Array
    zeros: int = 0
    skipped: int = 0

    @classmethod
    def empty(cls) -> Self:
        """Statistics of nothing."""
        return cls(np.zeros((2, MAGNITUDE_CELLS, 3)))

    @classmethod
    def gather(cls, values: Float32Array, bucket_size: int = 0, norm: str = "") -> Self:
        """Statistics of one tensor, float32 [n]; raises CodebookError for another type or shape.

        bucket_size and norm are those of the codebook, and not used: codebooks that clip look at no bucket.
        """
        if values.dtype != np.float32 or values.ndim != 1:
            raise CodebookError(f"statistics need float32 values in one dimension, not {values.dtype} {values.shape}")
        cells = np.zeros((2, MAGNITUDE_CELLS, 3))
        zeros, skipped = _gather(values, cells)
        return cls(cells, zeros, skipped)

    @classmethod
    def merge_in_order(cls, parts: Sequence[Self]) -> Self:
        """Sum of all parts in the order given."""
        cells = np.zeros((2, MAGNITUDE_CELLS, 3))
        for part in parts:
            cells += part.cells
        return cls(cells, sum(part.zeros for part in parts), sum(part.skipped for part in parts))

    @classmethod
    def from_array(cls, array: Float64Array) -> Self:
        """The inverse of ``to_array``; raises WireError where the array cannot be one."""
        if array.dtype != np.float64 or array.shape != (cls.array_length,):
            raise WireError(f"magnitude statistics are float64 ({cls.array_length},), not {array.dtype} {array.shape}")
        if not np.all(np.isfinite(array)) or np.any(array < 0.0):
            raise WireError("magnitude statistics hold a number that is negative or not finite")
        cells = array[_COUNTERS:].reshape(2, MAGNITUDE_CELLS, 3).copy()
        return cls(cells, int(array[0]), int(array[1]))

    def to_array(self) -> Float64Array:
        """Counters, then the cells: float64 [array_length], for the exchange and for checkpoints."""
        return np.concatenate(([self.zeros, self.skipped], self.cells.ravel()))

    @property
    def count(self) -> float:
        """Number of finite values that are not zero."""
        return float(np.cumsum(self._both[:, 0])[-1])

    @property
    def absolute_sum(self) -> float:
        """Sum of |g|."""
        return float(np.cumsum(self._both[:, 1])[-1])

    @property
    def squared_norm(self) -> float:
        """Sum of g**2."""
        return float(np.cumsum(self._both[:, 2])[-1])

    @property
    def largest(self) -> float:
        """Upper end of the last cell that is not empty (2**128 for the open one); 0 without values."""
        used = np.flatnonzero(self._both[:, 0])
        if not used.size:
            return 0.0
        return float(EDGES[used[-1]]) if used[-1] < EDGES.size else 2.0**128

    def above(self, sign: int | None = None) -> tuple[Float64Array, Float64Array, Float64Array]:
        """What lies at or above each edge of the grid: three float64 [EDGES.size].

        Args:
            sign: 1 or -1 for one side alone; None for both.

        Returns:
            The number of values g with |g| >= edge, the sum of their |g|, and the sum of their ln |g|.
        """
        cells = self._both if sign is None else self.cells[0 if sign > 0 else 1]
        count, first, second = cells[1:].T
        used = count > 0.0
        number = np.where(used, count, 1.0)
        mean = np.where(used, first / number, 1.0)
        variance = np.maximum(np.where(used, second / number, 1.0) - mean * mean, 0.0)
        logarithms = count * (logarithm(mean) - variance / (2.0 * mean * mean))
        from_above = (np.cumsum(part[::-1])[::-1] for part in (count, first, np.where(used, logarithms, 0.0)))
        total, sums, logs = from_above
        return total, sums, logs

    def normalised(self, clip: float) -> PiecewiseUniform:
        """Distribution of |g| / clip, also beyond 1, as `levels.minimum_variance_levels` takes it; clip > 0.

        Values of 2**28 and more are left out.
        """
        edges = np.concatenate(([0.0], EDGES)) / clip
        return PiecewiseUniform.from_cells(edges, self._both[:-1] * np.array([1.0, 1.0 / clip, 1.0 / (clip * clip)]))

    def squared_error(self, levels: npt.ArrayLike, clip: float) -> float:
        """Expected squared error, of all values together, of clipping and then rounding at random to clip * levels."""
        distribution = self.normalised(clip)
        ends = np.array([1.0, float(EDGES[-1]) / clip])
        count, first, second = (float(moment[1] - moment[0]) for moment in distribution.cumulative_moments(ends))
        clipping = second - 2.0 * first + count
        return clip * clip * (quantization_variance(levels, distribution) + max(clipping, 0.0))

    @cached_property
    def _both(self) -> Float64Array:
        return np.asarray(self.cells[0] + self.cells[1])


@cached_kernel
def _gather(values: Float32Array, cells: Float64Array) -> tuple[int, int]:
    """Add 1, |g|, g**2 of every value to its cell; returns (zeros, values that are not finite)."""
    zeros = 0
    skipped = 0
    words = values.view(np.int32)
    for index in range(values.size):
        bits = np.int64(words[index]) & 0x7FFFFFFF
        if bits == 0:
            zeros += 1
            continue
        if bits >= 0x7F800000:
            skipped += 1
            continue
        cell = int(bits >> _SHIFT) - (_LOWEST_EXPONENT << _MANTISSA_BITS) + 1
        cell = min(max(cell, 0), _REGULAR_CELLS + 1)
        magnitude = math.fabs(np.float64(values[index]))
        side = 1 if words[index] < 0 else 0
        cells[side, cell, 0] += 1.0
        cells[side, cell, 1] += magnitude
        cells[side, cell, 2] += magnitude * magnitude
    return zeros, skipped
