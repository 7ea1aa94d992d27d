"""Level sequences: uniform, exponential, and the sequence of minimum quantization variance.

A sequence for ``bits`` bits has 2**(bits - 1) levels, 0 = l_0 < l_1 < ... = 1: a code is a sign and the index of a
level, and 0 is always a level. Between neighbours the quantizer rounds at random without bias, so a normalised
magnitude u in [l_j, l_{j+1}] costs the variance (l_{j+1} - u)(u - l_j).

Sources: QSGD (arXiv 1610.02132), uniform levels; NUQSGD (1908.06077), exponential levels; ALQ (Faghri et al.,
NeurIPS 2020), minimum variance by coordinate descent; QODA (2505.14371), one sequence per layer type and the variance
bound.

Everything here uses only additions, multiplications, divisions, square roots, comparisons and sequential sums in
float64. These give the same bits on every processor of one architecture, unlike logarithms or matrix products, so
workers that hold equal statistics compute equal levels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qoda_kernels.errors import CodebookError

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
Moments = tuple[Float64Array, Float64Array, Float64Array]

MIN_BITS = 2
MAX_BITS = 8

# Smallest positive level: the reciprocal of every gap then stays a normal float32 number.
SMALLEST_LEVEL = 2.0**-63

# Fitted levels stay this far apart, relative to the upper one. A closer pair would gain nothing (at most a variance of
# 2**-26 u**2), but it would cost the kernels the precision of l / (gap between levels).
SMALLEST_RELATIVE_GAP = 2.0**-12

# A Newton step is kept only if it lowers the variance; one shorter attempt follows the full step.
_NEWTON_LENGTHS = (1.0, 0.25)

# Share of its neighbour's distance that a level may use up in one Newton step.
_NEWTON_REACH = 0.9

# Pivots of the Hessian below this share of the bins' weight are raised to it: the step then descends.
_SMALLEST_PIVOT = 2.0**-6


# A start that is still this far above the best other start's result after these sweeps is given up.
_TRIAL_SWEEPS = 8
_HOPELESS = 1.1


class Distribution(Protocol):
    """Weighted distribution F of the normalised magnitudes u strictly between 0 and 1; not scaled to total weight 1.

    Atoms at exactly 0 and exactly 1 are left out, because they lie on levels and cost no variance.
    """

    def cumulative_moments(self, points: Float64Array) -> Moments:
        """Integrals of 1, u and u**2 over (0, point]; the moments of (a, b] are differences of two of them."""
        ...

    def density(self, points: Float64Array) -> Float64Array:
        """Weight per unit of u at each point."""
        ...

    def quantile(self, weights: Float64Array) -> Float64Array:
        """A point up to which the given weight lies, F^{-1}(weight); weights beyond the total give the last point."""
        ...


def level_count(bits: int) -> int:
    """Number of levels of a codebook of ``bits`` bits, 2**(bits - 1); raises CodebookError outside 2..8."""
    try:
        width = operator.index(bits)
    except TypeError:
        raise CodebookError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, not {bits!r}") from None
    if not MIN_BITS <= width <= MAX_BITS:
        raise CodebookError(f"bits must be from {MIN_BITS} to {MAX_BITS} for a codebook with levels, not {width}")
    return 1 << (width - 1)


def uniform_levels(bits: int) -> Float32Array:
    """Equally spaced levels j / s, s = 2**(bits - 1) - 1 (QSGD).

    Returns float32 [2**(bits - 1)]. Raises CodebookError where bits is not 2..8.
    """
    intervals = level_count(bits) - 1
    return (np.arange(intervals + 1, dtype=np.float64) / intervals).astype(np.float32)


def exponential_levels(bits: int) -> Float32Array:
    """Levels 0, ..., r**2, r, 1 in a geometric sequence (NUQSGD).

    The ratio r is 1/2 up to 7 bits. At 8 bits, 126 halvings would leave the normal range of float32 as soon as they
    meet a norm below 1, so r is the square root of 1/2 there and the smallest level is 2**-63.
    Returns float32 [2**(bits - 1)]. Raises CodebookError where bits is not 2..8.
    """
    count = level_count(bits)
    steps = np.arange(count - 2, -1, -1)
    if count - 2 <= 63:
        positive = np.ldexp(1.0, -steps)
    else:
        positive = np.ldexp(np.where(steps % 2 == 1, math.sqrt(0.5), 1.0), -(steps // 2))
    return np.concatenate(([0.0], positive)).astype(np.float32)


def check_levels(levels: npt.ArrayLike, bits: int, may_lack_zero: bool = False) -> Float32Array:
    """Validate a level sequence and return it as float32 [2**(bits - 1)].

    Raises CodebookError unless the values are 2**(bits - 1) finite numbers that float32 represents exactly, start
    with 0 (or above, if it may lack), end with 1, increase strictly, and have no positive level below 2**-63.
    """
    count = level_count(bits)
    try:
        given = np.asarray(levels, dtype=np.float64)
    except (TypeError, ValueError):
        raise CodebookError(f"levels must be numbers, not {levels!r}") from None
    if given.shape != (count,):
        raise CodebookError(f"{bits} bits need {count} levels in one dimension, not the shape {given.shape}")
    if not np.all(np.isfinite(given)):
        raise CodebookError(f"levels must be finite: {given.tolist()}")
    begins_well = given[0] >= 0.0 if may_lack_zero else given[0] == 0.0
    if not begins_well or given[-1] != 1.0:
        raise CodebookError(f"levels must begin with 0 and end with 1, not {given[0]!r} and {given[-1]!r}")
    fall = np.flatnonzero(np.diff(given) <= 0.0)
    if fall.size:
        j = int(fall[0])
        raise CodebookError(f"levels must increase strictly, but level {j + 1} = {given[j + 1]} <= {given[j]}")
    smallest = given[0] if given[0] > 0.0 else given[1]
    if smallest < SMALLEST_LEVEL:
        raise CodebookError(f"the smallest positive level must be at least 2**-63, not {smallest}")
    rounded = given.astype(np.float32)
    inexact = np.flatnonzero(rounded != given)
    if inexact.size:
        j = int(inexact[0])
        raise CodebookError(f"levels must be float32 numbers, but level {j} = {given[j]!r} is not")
    return rounded


def quantization_variance(levels: npt.ArrayLike, distribution: Distribution) -> float:
    """Psi = sum_j Int_{l_j}^{l_{j+1}} (l_{j+1} - u)(u - l_j) dF(u): the expected squared error of quantization.

    F carries its weights, so with the statistics of this package the result is E|Q(v) - v|**2 summed over everything
    that was gathered, and the results of several layer types add up.
    """
    points = np.asarray(levels, dtype=np.float64)
    return float(np.cumsum(_bin_variances(points, _bin_moments(points, distribution)))[-1])


def variance_bound(levels_of_types: Sequence[npt.ArrayLike], dimension: int, norm: str) -> float:
    """eps_Q with E|Q(v) - v|**2 <= eps_Q |v|_2**2 for every v of ``dimension`` coordinates (QODA, layer-wise bound).

    eps_Q = (r + 1/r)/4 - 1/2 + (L1 sqrt(d))**2 / 4    if d < (2/L1)**2,
    eps_Q = (r + 1/r)/4 - 1/2 + L1 sqrt(d) - 1         otherwise,
    r = the largest l_{j+1}/l_j over j >= 1 and all types, L1 = the largest first positive level. The general form has
    d**(1/min(q, 2)); both norms of this package, "l2" (q = 2) and "max" (q = infinity), give the square root.
    Raises CodebookError for another norm, no levels, or a dimension below 1.
    """
    if norm not in ("max", "l2"):
        raise CodebookError(f'norm must be "max" or "l2", not {norm!r}')
    if not levels_of_types or dimension < 1:
        raise CodebookError("the variance bound needs at least one level sequence and one coordinate")
    ratio = 1.0
    first = 0.0
    for levels in levels_of_types:
        points = np.asarray(levels, dtype=np.float64)
        first = max(first, float(points[1]))
        if points.size > 2:
            ratio = max(ratio, float(np.max(points[2:] / points[1:-1])))
    spread = first * math.sqrt(dimension)
    above_zero = (ratio + 1.0 / ratio) / 4.0 - 0.5
    # spread < 2 is d < (2 / L1)**2; the two forms meet there.
    return above_zero + (spread * spread / 4.0 if spread < 2.0 else spread - 1.0)


def minimum_variance_levels(
    statistics: Distribution,
    bits: int,
    previous: npt.ArrayLike | None = None,
    sweeps: int = 30,
    tolerance: float = 1e-9,
) -> Float32Array:
    """Levels that minimise the quantization variance Psi over the given statistics (ALQ; one call per layer type).

    Coordinate descent with the closed form l_j = F^{-1}(F(c) - Int_a^c (u - a)/(c - a) dF(u)) for a level between its
    neighbours a and c: first all odd levels, then all even ones. A step on all levels together follows each sweep and
    is kept where it lowers Psi, because sweeps alone need a number that grows with the square of the number of levels:
    towards equal variances of all bins, or Newton's, whichever gives less. The descent starts from ``previous`` and
    from greedily inserted, equal-weight, uniform and exponential levels; the best end is kept.

    statistics: either kind of this package, or any Distribution. previous: levels in use now, checked by
    ``check_levels``. sweeps: at most so many per start; a start ends when Psi falls by less than ``tolerance`` times
    itself, or early where another one did better.
    Returns float32 [2**(bits - 1)], never worse than uniform, exponential or previous levels on these statistics, and
    the same bits wherever the statistics are the same. Without any weight: previous, or else uniform.
    Raises CodebookError for impossible bits or previous levels.
    """
    count = level_count(bits)
    uniform = uniform_levels(bits)
    exponential = exponential_levels(bits)
    # previous comes first: of equal candidates the first is taken.
    fixed = [uniform, exponential]
    if previous is not None:
        fixed.insert(0, check_levels(previous, bits))
    total = float(statistics.cumulative_moments(np.ones(1))[0][0])
    if count == 2 or not total > 0.0:
        return fixed[0]
    starts = [
        *(levels.astype(np.float64) for levels in fixed[:-2]),
        _greedy_levels(statistics, count),
        _equal_weight_levels(statistics, total, count),
        *(levels.astype(np.float64) for levels in fixed[-2:]),
    ]
    found = []
    best = math.inf
    for start in starts:
        found.append(_round_levels(_descend(start, statistics, sweeps, tolerance, best)))
        best = min(best, quantization_variance(found[-1], statistics))
    return min(fixed + found, key=lambda levels: quantization_variance(levels, statistics))


def _bin_moments(points: Float64Array, distribution: Distribution) -> Moments:
    zero, one, two = distribution.cumulative_moments(points)
    return np.diff(zero), np.diff(one), np.diff(two)


def _bin_variances(points: Float64Array, moments: Moments) -> Float64Array:
    """Variance of each bin, [levels - 1]; rounding errors below zero are cut off."""
    weight, first, second = moments
    low, high = points[:-1], points[1:]
    return np.maximum((low + high) * first - low * high * weight - second, 0.0)


def _descend(
    start: Float64Array, distribution: Distribution, sweeps: int, tolerance: float, best: float
) -> Float64Array:
    """Lower the variance from one start; give up early where it stays above ``best``, another start's result."""
    levels = start
    variance = quantization_variance(levels, distribution)
    for sweep in range(sweeps):
        moved = _sweep(levels, distribution)
        moments = _bin_moments(moved, distribution)
        variances = _bin_variances(moved, moments)
        spread = _equalise(moved, variances)
        spread_variance = quantization_variance(spread, distribution)
        moved, reached = _newton_step(moved, float(np.cumsum(variances)[-1]), moments, distribution)
        if spread_variance < reached:
            moved, reached = spread, spread_variance
        if not reached < variance:
            break
        settled = variance - reached <= tolerance * variance
        levels, variance = moved, reached
        if settled or (sweep >= _TRIAL_SWEEPS and variance > _HOPELESS * best):
            break
    return levels


def _sweep(levels: Float64Array, distribution: Distribution) -> Float64Array:
    """Move the odd, then the even levels to their minimum between their neighbours, which stay where they are."""
    moved = levels.copy()
    moved[1:-1:2] = _best_between(moved[0::2], moved[1:-1:2], distribution)
    moved[2:-1:2] = _best_between(moved[1::2], moved[2:-1:2], distribution)
    return moved


def _best_between(neighbours: Float64Array, otherwise: Float64Array, distribution: Distribution) -> Float64Array:
    """The closed form for one level in each bin of ``neighbours``; ``otherwise`` in bins where it has no minimum."""
    low, high = neighbours[:-1], neighbours[1:]
    zero, one, _ = distribution.cumulative_moments(neighbours)
    weight = np.diff(zero)
    best = distribution.quantile(zero[1:] - (np.diff(one) - low * weight) / (high - low))
    return np.where((weight > 0.0) & (best > low) & (best < high), best, otherwise)


def _equalise(levels: Float64Array, variances: Float64Array) -> Float64Array:
    """Move all levels along the axis towards the same variance in every bin.

    The best levels of a smooth density f are spaced as f**(-1/3), and all bins then have the same variance V. New
    levels cut the sum of V**(1/4) over the bins into equal parts; the fourth root is the nearest to V**(1/3) that
    square roots reach, and has the same fixed point.
    """
    # A little everywhere, so that levels can cross bins without weight.
    shares = np.sqrt(np.sqrt(variances + 1e-6 * float(np.cumsum(variances)[-1])))
    reached = np.concatenate(([0.0], np.cumsum(shares)))
    inner = np.interp(reached[-1] * (np.arange(1, levels.size - 1) / (levels.size - 1)), reached, levels)
    return _separate(np.concatenate(([0.0], inner, [1.0])))


def _newton_step(
    levels: Float64Array, variance: float, moments: Moments, distribution: Distribution
) -> tuple[Float64Array, float]:
    """One safeguarded Newton step on all inner levels; returns levels and variance, unchanged where it fails.

    dPsi/dl_j = Int_a^{l_j} (u - a) dF - Int_{l_j}^c (c - u) dF; the Hessian is tridiagonal with (c - a) f(l_j) on the
    diagonal and minus the weight of the bin between two levels beside it. moments: those of the levels' bins.
    """
    weight, first, _ = moments
    from_below = first - levels[:-1] * weight
    from_above = levels[1:] * weight - first
    gradient = from_below[:-1] - from_above[1:]
    diagonal = (levels[2:] - levels[:-2]) * distribution.density(levels[1:-1])
    change = np.zeros_like(levels)
    change[1:-1] = _solve_tridiagonal(diagonal, weight, -gradient)
    if not np.all(np.isfinite(change)):
        return levels, variance
    gaps = np.diff(levels)
    closing = -np.diff(change)
    crowded = closing > _NEWTON_REACH * gaps
    reach = float(np.min(_NEWTON_REACH * gaps[crowded] / closing[crowded])) if np.any(crowded) else 1.0
    for length in _NEWTON_LENGTHS:
        moved = levels + (length * reach) * change
        if not np.all(np.diff(moved) > 0.0):
            continue
        reached = quantization_variance(moved, distribution)
        if reached < variance:
            return moved, reached
    return levels, variance


def _solve_tridiagonal(diagonal: Float64Array, weight: Float64Array, right: Float64Array) -> Float64Array:
    """Solve H x = right, H = diagonal with -weight[1:-1] beside it, raising pivots that would not let x descend."""
    size = diagonal.size
    main, beside, x = diagonal.tolist(), weight.tolist(), right.tolist()
    pivots = [0.0] * size
    factor = 0.0
    for j in range(size):
        pivot = main[j] - (beside[j] * factor if j else 0.0)
        # A level without weight on either side stays where it is: any positive pivot does.
        floor = _SMALLEST_PIVOT * (beside[j] + beside[j + 1])
        pivot = max(pivot, floor)
        if pivot <= 0.0:
            pivots[j], factor, x[j] = 1.0, 0.0, 0.0
            continue
        if j:
            x[j] += factor * x[j - 1]
        pivots[j] = pivot
        factor = beside[j + 1] / pivot
    x[-1] /= pivots[-1]
    for j in range(size - 2, -1, -1):
        x[j] = (x[j] + beside[j + 1] * x[j + 1]) / pivots[j]
    return np.array(x)


def _equal_weight_levels(distribution: Distribution, total: float, count: int) -> Float64Array:
    """Start with the same weight in every bin (quantiles of F)."""
    shares = np.arange(1, count - 1, dtype=np.float64) / (count - 1)
    inner = distribution.quantile(total * shares)
    return _separate(np.concatenate(([0.0], inner, [1.0])))


def _greedy_levels(distribution: Distribution, count: int) -> Float64Array:
    """Start by putting the best new level into each bin of large variance until there are ``count`` levels."""
    levels = np.array([0.0, 1.0])
    while levels.size < count:
        variances = _bin_variances(levels, _bin_moments(levels, distribution))
        room = min(count - levels.size, max(1, variances.size // 2))
        split = np.sort(np.argsort(-variances, kind="stable")[:room])
        best = _best_between(levels, 0.5 * (levels[:-1] + levels[1:]), distribution)
        levels = _separate(np.insert(levels, split + 1, best[split]))
    return levels


def _separate(levels: Float64Array) -> Float64Array:
    """Push levels apart to SMALLEST_RELATIVE_GAP, first upwards from 0, then downwards from 1."""
    points = levels.tolist()
    points[0] = 0.0
    points[1] = max(points[1], 2.0 * SMALLEST_LEVEL)
    for j in range(2, len(points)):
        points[j] = max(points[j], points[j - 1] * (1.0 + 2.0 * SMALLEST_RELATIVE_GAP))
    points[-1] = 1.0
    for j in range(len(points) - 2, 0, -1):
        points[j] = min(points[j], points[j + 1] * (1.0 - SMALLEST_RELATIVE_GAP))
    return np.array(points)


def _round_levels(levels: Float64Array) -> Float32Array:
    # The gap that _separate leaves is far above float32's spacing, so the rounded levels still increase strictly.
    return _separate(levels).astype(np.float32)
