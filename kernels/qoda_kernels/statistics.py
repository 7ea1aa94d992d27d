"""Statistics of normalised magnitudes: what workers exchange so that all compute the same levels.

Two kinds share the protocol ``LevelStatistics``. Both describe u = |v| / norm, every coordinate weighted by the squared
norm of its bucket, the exact weight for the variance of quantization; so sums over the weights are squared errors.

- ``HistogramStatistics``: every coordinate, summed into cells; exact up to the grid.
- ``TruncatedNormalStatistics`` (ALQ, Faghri et al., NeurIPS 2020): mean and standard deviation of sampled buckets,
  read as a mixture of normal distributions truncated to [-1, 1].

``NormStatistics`` are what planning the bits of rotated buckets needs: three numbers. Rotated coordinates are nearly
normal whatever the gradient, so their levels never change, and the error of each width is a known share of the squared
norm (`gaussian.relative_error`).

The grid, fixed for the wire: cell 0 holds u = 0; cell 1 holds (0, 2**-24); then 16 equal cells in each octave from
2**-24 to 2**-8; then 64 in each from 2**-8 to 1; the last cell holds u = 1. A cell includes its lower end. Apart from
the first two, the index is the exponent and the upper 4 or 6 mantissa bits of u as float32, hence exact everywhere.

The order of every sum is fixed, and what is computed from merged statistics calls no exponential or error function of
the host, whose last bit differs between processors: ranks that merge the same arrays in the same order agree exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol, Self

import numpy as np

from qoda_kernels.compilation import cached_kernel
from qoda_kernels.errors import CodebookError, WireError
from qoda_kernels.levels import Distribution, Float32Array, Float64Array, Moments

StatisticsKind = Literal["histogram", "truncated_normal"]

# Exponents of float32 at the grid's joints: 2**-24, 2**-8, 1.
_LOWEST_EXPONENT, _MIDDLE_EXPONENT, _TOP_EXPONENT = 103, 119, 127
_FIRST_REGULAR_CELL = 2
_FIRST_FINE_CELL = _FIRST_REGULAR_CELL + 16 * (_MIDDLE_EXPONENT - _LOWEST_EXPONENT)
_CELL_OF_ONE = _FIRST_FINE_CELL + 64 * (_TOP_EXPONENT - _MIDDLE_EXPONENT)
CELL_COUNT = _CELL_OF_ONE + 1

# Sampled buckets that truncated-normal statistics keep.
BLOCK_COUNT = 64

# Numbers before the cells or blocks in an exchanged array: buckets read, buckets skipped.
_COUNTERS = 2

# A cell's uniform piece is no narrower than this part of its upper end, so that densities stay finite.
_NARROWEST_PIECE = 2.0**-40

# Standard deviations below this are raised to it; smaller ones mean a bucket of equal values.
_SMALLEST_DEVIATION = 2.0**-20


class ExchangedStatistics(Protocol):
    """Statistics of one layer type: gathered locally, exchanged as an array of fixed length, merged in rank order."""

    array_length: ClassVar[int]

    @classmethod
    def empty(cls) -> Self:
        """Statistics of nothing."""
        ...

    @classmethod
    def gather(cls, values: Float32Array, bucket_size: int, norm: str) -> Self:
        """Statistics of one tensor: float32, one-dimensional; the bucket grid starts at its first element."""
        ...

    @classmethod
    def merge_in_order(cls, parts: Sequence[Self]) -> Self:
        """Statistics of all parts together, summed in the order given."""
        ...

    def merge(self, other: Self) -> Self:
        """Statistics of both together."""
        ...

    @classmethod
    def from_array(cls, array: Float64Array) -> Self:
        """The inverse of ``to_array``; raises WireError where the array cannot be one."""
        ...

    def to_array(self) -> Float64Array:
        """Everything as float64 [array_length]: for the exchange and for checkpoints."""
        ...

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of all values: what Psi is divided by for a relative error."""
        ...


class Mergeable(ABC):
    """Statistics of two parts are those of a list of them."""

    @classmethod
    @abstractmethod
    def merge_in_order(cls, parts: Sequence[Self]) -> Self:
        """Statistics of all parts together, summed in the order given."""

    def merge(self, other: Self) -> Self:
        """Statistics of both together."""
        return self.merge_in_order((self, other))


class LevelStatistics(Distribution, ExchangedStatistics, Protocol):
    """Statistics of normalised magnitudes, from which levels of least variance are computed."""

    statistics_kind: ClassVar[StatisticsKind]

    @property
    def bucket_count(self) -> int:
        """Finite buckets read."""
        ...

    @property
    def skipped_buckets(self) -> int:
        """Buckets left out because their norm is not finite."""
        ...

    @property
    def weight(self) -> float:
        """Sum over coordinates of the squared norm of their bucket."""
        ...


def statistics_class(kind: StatisticsKind) -> type[LevelStatistics]:
    """The class for a kind of statistics; raises CodebookError for an unknown one."""
    for candidate in (HistogramStatistics, TruncatedNormalStatistics):
        if candidate.statistics_kind == kind:
            return candidate
    raise CodebookError(f'statistics must be "histogram" or "truncated_normal", not {kind!r}')


@dataclass(frozen=True, eq=False)
class PiecewiseUniform:
    """A distribution of constant density between breakpoints: the model of what lies inside the cells of the grid.

    starts, widths, densities: float64 [pieces], in increasing order, all with weight; before: three arrays [pieces],
    the integrals of 1, u, u**2 over everything below a piece.
    """

    starts: Float64Array
    widths: Float64Array
    densities: Float64Array
    before: Moments

    @classmethod
    def from_cells(cls, edges: Float64Array, cells: Float64Array) -> PiecewiseUniform:
        """Fit to cells [n, 3] of (sum w, sum w u, sum w u**2) between edges [n + 1].

        With mean and variance of a cell in units of its width, and mean >= 1/2 (else mirrored): where an interval of
        uniform density around the mean has that variance and fits into the cell, it is taken; otherwise the cell is
        cut in two, with the cut and the two weights from the moments. Both are the same where they meet, and both
        keep all three moments, except for cells whose weight is mostly at the ends: those keep weight and mean.
        """
        used = cells[:, 0] > 0.0
        low, high = edges[:-1][used], edges[1:][used]
        weight, first, second = cells[used].T
        width = high - low
        average = first / weight
        mean = np.clip((average - low) / width, 0.0, 1.0)
        variance = np.maximum(second / weight - average * average, 0.0) / (width * width)

        mirrored = mean < 0.5
        mean = np.where(mirrored, 1.0 - mean, mean)
        half = np.maximum(np.sqrt(3.0 * variance), _NARROWEST_PIECE * high / width)
        fits = mean + half <= 1.0
        excess = np.maximum(2.0 * mean - 1.0, _NARROWEST_PIECE)
        cut = np.clip((3.0 * (variance + mean * mean) - 2.0 * mean) / excess, excess, 1.0 - _NARROWEST_PIECE)
        below_cut = np.clip(1.0 + cut - 2.0 * mean, 0.0, 1.0)

        # Each cell becomes three pieces, some of them without width or weight: (nothing, uniform, nothing) or (cut).
        ends = np.stack((np.where(fits, mean - half, cut), np.where(fits, mean + half, 1.0)))
        shares = np.stack((np.where(fits, 0.0, below_cut), np.where(fits, 1.0, 1.0 - below_cut)))
        zeros = np.zeros_like(mean)
        ends = np.vstack((zeros, np.clip(ends, 0.0, 1.0), zeros + 1.0))
        shares = np.vstack((shares, zeros))
        ends = np.where(mirrored, 1.0 - ends[::-1], ends)
        shares = np.where(mirrored, shares[::-1], shares)
        starts = (low + width * ends[:-1]).T.ravel()
        stops = (low + width * ends[1:]).T.ravel()
        masses = (weight * shares).T.ravel()
        keep = (masses > 0.0) & (stops > starts)
        return cls._from_pieces(starts[keep], stops[keep], masses[keep])

    @classmethod
    def _from_pieces(cls, starts: Float64Array, stops: Float64Array, masses: Float64Array) -> PiecewiseUniform:
        middles = 0.5 * (starts + stops)
        squares = (starts * starts + starts * stops + stops * stops) / 3.0
        totals = [np.cumsum(masses * power) for power in (np.ones_like(masses), middles, squares)]
        zero, one, two = (np.concatenate(([0.0], total)) for total in totals)
        widths = stops - starts
        return cls(starts, widths, masses / widths, (zero[:-1], one[:-1], two[:-1]))

    def cumulative_moments(self, points: Float64Array) -> Moments:
        """Integrals of 1, u and u**2 over (0, point]."""
        if not self.starts.size:
            return np.zeros_like(points), np.zeros_like(points), np.zeros_like(points)
        piece = np.maximum(np.searchsorted(self.starts, points, side="right") - 1, 0)
        start = self.starts[piece]
        length = np.clip(points - start, 0.0, self.widths[piece])
        mass = self.densities[piece] * length
        zero, one, two = (below[piece] for below in self.before)
        first = mass * (start + 0.5 * length)
        second = mass * (start * (start + length) + length * length / 3.0)
        return zero + mass, one + first, two + second

    def density(self, points: Float64Array) -> Float64Array:
        """Weight per unit of u."""
        if not self.starts.size:
            return np.zeros_like(points)
        piece = np.maximum(np.searchsorted(self.starts, points, side="right") - 1, 0)
        offset = points - self.starts[piece]
        return np.where((offset >= 0.0) & (offset < self.widths[piece]), self.densities[piece], 0.0)

    def quantile(self, weights: Float64Array) -> Float64Array:
        """F^{-1}; where a gap fits as well, its upper end."""
        if not self.starts.size:
            return np.zeros_like(weights)
        zero = self.before[0]
        piece = np.maximum(np.searchsorted(zero, weights, side="right") - 1, 0)
        length = np.clip((weights - zero[piece]) / self.densities[piece], 0.0, self.widths[piece])
        return self.starts[piece] + length


class _TabulatedDistribution(ABC):
    """The methods of Distribution, answered by a table on the grid that is made at first use."""

    @abstractmethod
    def _cells(self) -> Float64Array:
        """Sums of w, w u, w u**2 between _INNER_EDGES, [edges - 1, 3]."""

    @cached_property
    def _table(self) -> PiecewiseUniform:
        return PiecewiseUniform.from_cells(_INNER_EDGES, self._cells())

    def cumulative_moments(self, points: Float64Array) -> Moments:
        """Integrals of 1, u and u**2 over (0, point], without the atoms at 0 and 1."""
        return self._table.cumulative_moments(points)

    def density(self, points: Float64Array) -> Float64Array:
        """Weight per unit of u at each point."""
        return self._table.density(points)

    def quantile(self, weights: Float64Array) -> Float64Array:
        """A point up to which the given weight lies."""
        return self._table.quantile(weights)


@dataclass(frozen=True, eq=False)
class HistogramStatistics(Mergeable, _TabulatedDistribution):
    """Sums over the cells of the grid described at the top of this file.

    cells: float64 [CELL_COUNT, 3], the sums of w, w u and w u**2, w = squared norm of the coordinate's bucket.
    """

    statistics_kind: ClassVar[StatisticsKind] = "histogram"
    array_length: ClassVar[int] = _COUNTERS + 3 * CELL_COUNT

    cells: Float64Array
    bucket_count: int = 0
    skipped_buckets: int = 0

    @classmethod
    def empty(cls) -> Self:
        """Statistics of nothing."""
        return cls(_frozen(np.zeros((CELL_COUNT, 3))))

    @classmethod
    def gather(cls, values: Float32Array, bucket_size: int, norm: str) -> Self:
        """Statistics of one tensor, every coordinate counted.

        values: float32 [n], any n; the last bucket may be shorter. bucket_size: coordinates that share a norm.
        norm: "max" or "l2". Buckets of zeros weigh nothing; buckets with a non-finite norm are skipped and counted.
        Raises CodebookError for other types, shapes, sizes or norms.
        """
        _check_gather(values, bucket_size, norm)
        cells = np.zeros((CELL_COUNT, 3))
        bucket_count, skipped = _gather_cells(values, bucket_size, norm == "l2", cells)
        return cls(_frozen(cells), bucket_count, skipped)

    @classmethod
    def merge_in_order(cls, parts: Sequence[Self]) -> Self:
        """Sum of all parts in the order given; the same as merging one after the other."""
        cells = np.zeros((CELL_COUNT, 3))
        for part in parts:
            cells += part.cells
        return cls(_frozen(cells), *_bucket_counts(parts))

    @classmethod
    def from_array(cls, array: Float64Array) -> Self:
        """The inverse of ``to_array``; raises WireError where the array cannot be one."""
        _check_array(array, cls.array_length, cls.statistics_kind)
        if np.any(array < 0.0):
            raise WireError("histogram statistics hold a negative sum")
        return cls(_frozen(array[_COUNTERS:].reshape(CELL_COUNT, 3)), int(array[0]), int(array[1]))

    def to_array(self) -> Float64Array:
        """Counters, then the cells row by row: float64 [array_length]."""
        return np.concatenate(([self.bucket_count, self.skipped_buckets], self.cells.ravel()))

    @property
    def weight(self) -> float:
        """Sum over coordinates of the squared norm of their bucket."""
        return float(np.cumsum(self.cells[:, 0])[-1])

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of all values."""
        return float(np.cumsum(self.cells[:, 2])[-1])

    def _cells(self) -> Float64Array:
        return self.cells[1:-1]


@dataclass(frozen=True, eq=False)
class TruncatedNormalStatistics(Mergeable, _TabulatedDistribution):
    """A mixture of normal distributions truncated to [-1, 1], folded to magnitudes: F = sum_n w_n TN(m_n, s_n).

    blocks: float64 [n, 3], n <= BLOCK_COUNT: weight, mean and standard deviation of the signed normalised coordinates
    of one sampled bucket. The weight is its squared norm times its length times the number of buckets per sample.
    For the levels, the mixture's closed-form moments are taken once per cell of the grid.
    """

    statistics_kind: ClassVar[StatisticsKind] = "truncated_normal"
    array_length: ClassVar[int] = _COUNTERS + 3 * BLOCK_COUNT

    blocks: Float64Array
    bucket_count: int = 0
    skipped_buckets: int = 0

    @classmethod
    def empty(cls) -> Self:
        """Statistics of nothing."""
        return cls(_frozen(np.zeros((0, 3))))

    @classmethod
    def gather(cls, values: Float32Array, bucket_size: int, norm: str) -> Self:
        """Statistics of at most BLOCK_COUNT buckets of one tensor, evenly spaced from the first.

        values: float32 [n], any n; the last bucket may be shorter. bucket_size: coordinates that share a norm.
        norm: "max" or "l2". Buckets of zeros weigh nothing; buckets with a non-finite norm are skipped and counted.
        Raises CodebookError for other types, shapes, sizes or norms.
        """
        _check_gather(values, bucket_size, norm)
        buckets = -(-values.size // bucket_size)
        samples = min(buckets, BLOCK_COUNT)
        blocks = np.zeros((samples, 3))
        bucket_count, skipped = _gather_blocks(values, bucket_size, norm == "l2", buckets, blocks)
        if samples:
            blocks[:, 0] *= buckets / samples
        return cls(_frozen(blocks[blocks[:, 0] > 0.0]), bucket_count, skipped)

    @classmethod
    def merge_in_order(cls, parts: Sequence[Self]) -> Self:
        """Blocks of all parts in the order given; more than BLOCK_COUNT are joined to that many.

        Joining sorts by standard deviation and cuts into groups of about equal weight; a group keeps its weight, mean
        and mean square.
        """
        blocks = np.concatenate([np.zeros((0, 3)), *(part.blocks for part in parts)])
        if len(blocks) > BLOCK_COUNT:
            blocks = _join_blocks(blocks)
        return cls(_frozen(blocks), *_bucket_counts(parts))

    @classmethod
    def from_array(cls, array: Float64Array) -> Self:
        """The inverse of ``to_array``; raises WireError where the array cannot be one."""
        _check_array(array, cls.array_length, cls.statistics_kind)
        blocks = array[_COUNTERS:].reshape(BLOCK_COUNT, 3)
        if np.any(array[:_COUNTERS] < 0.0) or np.any(blocks[:, 0] < 0.0) or np.any(blocks[:, 2] < 0.0):
            raise WireError("truncated-normal statistics hold a negative count, weight or standard deviation")
        if np.any(np.abs(blocks[:, 1:]) > 1.0):
            raise WireError("truncated-normal statistics hold a mean or standard deviation beyond 1")
        return cls(_frozen(blocks[blocks[:, 0] > 0.0]), int(array[0]), int(array[1]))

    def to_array(self) -> Float64Array:
        """Counters, then the blocks, unused ones with weight 0: float64 [array_length]."""
        array = np.zeros(self.array_length)
        array[:_COUNTERS] = self.bucket_count, self.skipped_buckets
        array[_COUNTERS : _COUNTERS + self.blocks.size] = self.blocks.ravel()
        return array

    @property
    def weight(self) -> float:
        """Sum over coordinates of the squared norm of their bucket, estimated from the samples."""
        return float(np.cumsum(np.append(0.0, self.blocks[:, 0]))[-1])

    @property
    def squared_norm(self) -> float:
        """Sum of the squares of all values, estimated from the samples."""
        weight, mean, deviation = self.blocks.T
        return float(np.cumsum(np.append(0.0, weight * (mean * mean + deviation * deviation)))[-1])

    def mixture_moments(self, points: Float64Array) -> Moments:
        """Integrals of 1, u and u**2 over (0, point] in closed form, for points in [0, 1]; what the table is made of.

        For N(m, s) between a and b, A = (a - m)/s, B = (b - m)/s: M0 = Phi(B) - Phi(A);
        M1 = m M0 - s (phi(B) - phi(A)); M2 = (m**2 + s**2) M0 - s ((b + m) phi(B) - (a + m) phi(A)). Folding adds
        [-point, 0]; division by Phi((1 - m)/s) - Phi((-1 - m)/s) truncates.
        """
        moments = np.zeros((3, points.size))
        _mixture_moments(self.blocks, np.ascontiguousarray(points), moments)
        return moments[0], moments[1], moments[2]

    def _cells(self) -> Float64Array:
        cells = np.diff(np.stack(self.mixture_moments(_INNER_EDGES)), axis=1).T
        # Far below the mixture's scale the closed form cancels to rounding errors; a cell there weighs next to nothing.
        return np.where(cells[:, :1] > 0.0, np.maximum(cells, 0.0), 0.0)


@dataclass(frozen=True)
class NormStatistics(Mergeable):
    """The squared norm of a layer, over its finite buckets.

    squared_norm: sum of the squares of their values. bucket_count: finite buckets; skipped_buckets: the others.
    """

    array_length: ClassVar[int] = _COUNTERS + 1

    squared_norm: float
    bucket_count: int = 0
    skipped_buckets: int = 0

    @classmethod
    def empty(cls) -> Self:
        """Statistics of nothing."""
        return cls(0.0)

    @classmethod
    def gather(cls, values: Float32Array, bucket_size: int, norm: str) -> Self:
        """Statistics of one tensor, float32 [n]; the last bucket may be shorter.

        norm: that of the codebook, and not used. Raises CodebookError for other types, shapes, sizes or norms.
        """
        _check_gather(values, bucket_size, norm)
        return cls(*_gather_squares(values, bucket_size))

    @classmethod
    def merge_in_order(cls, parts: Sequence[Self]) -> Self:
        """Sum of all parts in the order given."""
        total = 0.0
        for part in parts:
            total += part.squared_norm
        return cls(total, *_bucket_counts(parts))

    @classmethod
    def from_array(cls, array: Float64Array) -> Self:
        """The inverse of ``to_array``; raises WireError where the array cannot be one."""
        _check_array(array, cls.array_length, "norm")
        if np.any(array < 0.0):
            raise WireError("norm statistics hold a negative sum")
        return cls(float(array[2]), int(array[0]), int(array[1]))

    def to_array(self) -> Float64Array:
        """Counters, then the squared norm: float64 [array_length]."""
        return np.array([self.bucket_count, self.skipped_buckets, self.squared_norm], dtype=np.float64)


def _bucket_counts(
    parts: Sequence[HistogramStatistics | TruncatedNormalStatistics | NormStatistics],
) -> tuple[int, int]:
    """Finite and skipped buckets of all parts."""
    return sum(part.bucket_count for part in parts), sum(part.skipped_buckets for part in parts)


def _inner_edges() -> Float64Array:
    """Ends of the cells between 0 and 1, cells 1 to CELL_COUNT - 2."""
    coarse = np.arange(_LOWEST_EXPONENT << 4, _MIDDLE_EXPONENT << 4, dtype=np.int32) << 19
    fine = np.arange(_MIDDLE_EXPONENT << 6, (_TOP_EXPONENT << 6) + 1, dtype=np.int32) << 17
    return np.concatenate(([0.0], np.concatenate((coarse, fine)).view(np.float32).astype(np.float64)))


def _frozen(array: Float64Array) -> Float64Array:
    copy = np.array(array, dtype=np.float64)
    copy.flags.writeable = False
    return copy


_INNER_EDGES = _frozen(_inner_edges())


def _check_gather(values: Float32Array, bucket_size: int, norm: str) -> None:
    if values.dtype != np.float32 or values.ndim != 1:
        raise CodebookError(f"statistics need float32 values in one dimension, not {values.dtype} {values.shape}")
    if bucket_size < 1:
        raise CodebookError(f"the bucket size must be positive, not {bucket_size}")
    if norm not in ("max", "l2"):
        raise CodebookError(f'norm must be "max" or "l2", not {norm!r}')


def _check_array(array: Float64Array, length: int, kind: str) -> None:
    if array.dtype != np.float64 or array.shape != (length,):
        raise WireError(f"{kind} statistics are float64 ({length},), not {array.dtype} {array.shape}")
    if not np.all(np.isfinite(array)):
        raise WireError(f"{kind} statistics hold a number that is not finite")


def _join_blocks(blocks: Float64Array) -> Float64Array:
    """Join blocks [n, 3] to at most BLOCK_COUNT, keeping the sums of w, w m and w (m**2 + s**2)."""
    weight, mean, deviation = blocks[np.argsort(blocks[:, 2], kind="stable")].T
    ends = np.cumsum(weight)
    middles = (ends - 0.5 * weight) / ends[-1]
    group = np.minimum((middles * BLOCK_COUNT).astype(np.int64), BLOCK_COUNT - 1)
    total = np.bincount(group, weight)
    used = total > 0.0
    total = total[used]
    average = np.bincount(group, weight * mean)[used] / total
    square = np.bincount(group, weight * (mean * mean + deviation * deviation))[used] / total
    return np.stack((total, average, np.sqrt(np.maximum(square - average * average, 0.0))), axis=1)


@cached_kernel
def _bucket_norm(bucket: Float32Array, use_l2: bool) -> np.float32:
    """Norm of one bucket as float32; NaN or infinity where a value is not finite."""
    if use_l2:
        total = 0.0
        for value in bucket:
            total += np.float64(value) * np.float64(value)
        return np.float32(math.sqrt(total))
    largest = np.int32(0)
    for bits in bucket.view(np.int32):
        largest = max(largest, bits & np.int32(0x7FFFFFFF))
    return np.int32(largest).view(np.float32)


@cached_kernel
def _gather_cells(values: Float32Array, bucket_size: int, use_l2: bool, cells: Float64Array) -> tuple[int, int]:
    """Add w, w u, w u**2 of every coordinate to its cell; returns (finite buckets, skipped buckets)."""
    finite = 0
    skipped = 0
    for begin in range(0, values.size, bucket_size):
        bucket = values[begin : begin + bucket_size]
        norm = _bucket_norm(bucket, use_l2)
        if not math.isfinite(norm):
            skipped += 1
            continue
        finite += 1
        if norm == 0.0:
            continue
        weight = np.float64(norm) * np.float64(norm)
        for value in bucket:
            # An l2 norm rounded down may leave a quotient just above 1.
            u = min(np.float32(abs(value)) / norm, np.float32(1.0))
            bits = np.int64(np.float32(u).view(np.int32))
            if bits >= _MIDDLE_EXPONENT << 23:
                cell = (bits >> 17) - (_MIDDLE_EXPONENT << 6) + _FIRST_FINE_CELL
            elif bits >= _LOWEST_EXPONENT << 23:
                cell = (bits >> 19) - (_LOWEST_EXPONENT << 4) + _FIRST_REGULAR_CELL
            else:
                cell = np.int64(bits > 0)
            exact = np.float64(u)
            cells[cell, 0] += weight
            cells[cell, 1] += weight * exact
            cells[cell, 2] += weight * exact * exact
    return finite, skipped


@cached_kernel
def _gather_squares(values: Float32Array, bucket_size: int) -> tuple[float, int, int]:
    """Sum of squares over the finite buckets, one after the other; their number, and that of the others."""
    total = 0.0
    finite = 0
    skipped = 0
    for begin in range(0, values.size, bucket_size):
        squares = 0.0
        for value in values[begin : begin + bucket_size]:
            squares += np.float64(value) * np.float64(value)
        if math.isfinite(squares):  # squares of float32 values do not overflow
            total += squares
            finite += 1
        else:
            skipped += 1
    return total, finite, skipped


@cached_kernel
def _gather_blocks(
    values: Float32Array, bucket_size: int, use_l2: bool, buckets: int, blocks: Float64Array
) -> tuple[int, int]:
    """Fill blocks [n, 3] from n evenly spaced buckets; returns (finite buckets, skipped buckets)."""
    finite = 0
    skipped = 0
    for n in range(blocks.shape[0]):
        begin = n * buckets // blocks.shape[0] * bucket_size
        bucket = values[begin : begin + bucket_size]
        norm = _bucket_norm(bucket, use_l2)
        if not math.isfinite(norm):
            skipped += 1
            continue
        finite += 1
        if norm == 0.0:
            continue
        total = 0.0
        for value in bucket:
            total += np.float64(value)
        scale = np.float64(norm)
        mean = total / bucket.size / scale
        squares = 0.0
        for value in bucket:
            deviation = np.float64(value) / scale - mean
            squares += deviation * deviation
        blocks[n, 0] = scale * scale * bucket.size
        blocks[n, 1] = max(-1.0, min(mean, 1.0))
        blocks[n, 2] = min(math.sqrt(squares / bucket.size), 1.0)
    return finite, skipped


# exp(z**2) erfc(z) / 2 for z in [0, 6] as a polynomial in y = (10/3) z / (z + 4) - 1, lowest power first: a Chebyshev
# fit in 50 digits, absolute error below 2e-17 before rounding.
_TAIL = np.array(
    [
        0.14486105816173211,
        -0.16536269001261458,
        0.10370058899575484,
        -0.053323015570378295,
        0.022505427547181954,
        -0.0077090948567362086,
        0.002080474491029884,
        -0.00041224920300823186,
        4.8064745446871846e-05,
        1.024863642031012e-06,
        -1.4994866314798614e-06,
        1.746673364582885e-07,
        2.7919067467497513e-08,
        -8.243396621986675e-09,
        -4.2967377996880563e-10,
        3.156965489994472e-10,
        6.226723664747793e-12,
        -1.0406517177620088e-11,
    ]
)
_INVERSE_FACTORIALS = np.array([1.0 / math.factorial(k) for k in range(14)])
_LOG2E = 1.4426950408889634
# log(2) in two parts; the upper one has trailing zeros, so that its product with a small whole number is exact.
_LOG2_UPPER, _LOG2_LOWER = 0.693147180369123816490, 1.90821492927058770002e-10
_SQRT_HALF = 0.7071067811865476
_INVERSE_SQRT_2PI = 0.3989422804014327


@cached_kernel
def _normal(x: float) -> tuple[float, float]:
    """Distribution function and density of the standard normal, absolute error about 2e-16, from exact arithmetic."""
    z = abs(x) * _SQRT_HALF
    if z > 6.0:
        return (1.0 if x > 0.0 else 0.0), 0.0
    # exp(-t) = 2**-n exp(-r), |r| <= log(2) / 2.
    t = 0.5 * x * x
    n = math.floor(t * _LOG2E + 0.5)
    r = (t - n * _LOG2_UPPER) - n * _LOG2_LOWER
    power = 0.0
    for k in range(13, -1, -1):
        power = _INVERSE_FACTORIALS[k] - r * power
    decay = math.ldexp(power, -n)
    y = (10.0 / 3.0) * z / (z + 4.0) - 1.0
    tail = 0.0
    for k in range(17, -1, -1):
        tail = _TAIL[k] + y * tail
    tail *= decay
    return (1.0 - tail if x > 0.0 else tail), _INVERSE_SQRT_2PI * decay


@cached_kernel
def _mixture_moments(blocks: Float64Array, points: Float64Array, moments: Float64Array) -> None:
    """Add the folded moments over (0, point] of every truncated normal to moments [3, points]."""
    for block in range(blocks.shape[0]):
        m = blocks[block, 1]
        s = max(blocks[block, 2], _SMALLEST_DEVIATION)
        scale = blocks[block, 0] / (_normal((1.0 - m) / s)[0] - _normal((-1.0 - m) / s)[0])
        middle, peak = _normal(-m / s)
        for i in range(points.size):
            point = points[i]
            above, density_above = _normal((point - m) / s)
            below, density_below = _normal((-point - m) / s)
            weight = above - below
            first = m * (above - 2.0 * middle + below) - s * (density_above - 2.0 * peak + density_below)
            second = (m * m + s * s) * weight - s * ((point + m) * density_above + (point - m) * density_below)
            moments[0, i] += scale * weight
            moments[1, i] += scale * first
            moments[2, i] += scale * second
