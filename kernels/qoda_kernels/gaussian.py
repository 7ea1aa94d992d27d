"""Codebooks for rotated buckets, whose coordinates are nearly normal: one codebook serves every layer type.

Levels are those of the standard normal distribution, computed once, by exactly rounded operations, so every rank has
the same ones; no statistics are needed. Rounded to nearest, they are Lloyd's and Max's (least squared error; used so in
EDEN, arXiv 2108.08842). Rounded at random, they are of least variance (`levels.py`).
"""

from functools import cache

import numpy as np

from qoda_kernels.codebook import Codebook
from qoda_kernels.errors import CodebookError
from qoda_kernels.levels import (
    Float64Array,
    level_count,
    minimum_variance_levels,
    quantization_variance,
    uniform_levels,
)
from qoda_kernels.statistics import TruncatedNormalStatistics

_CUT = 8.0  # standard deviations at which the normal distribution is cut off
_LLOYD_SWEEPS = 4000
# The last uniform level, in standard deviations: so that hardly a coordinate lies beyond it, yet no bucket of one
# coordinate is rounded to zero.
_UNIFORM_SPREAD = {2: 1.224, 3: 2.5, 4: 3.6}
_WIDEST_UNIFORM_SPREAD = 4.05

# The largest of n normal magnitudes, in standard deviations: about its mean.
_LARGEST_OF = {128: 2.74, 256: 2.97, 512: 3.18, 1024: 3.39}


def _normal(cut: float) -> TruncatedNormalStatistics:
    """The normal distribution in units of its cut-off, which counts in standard deviations."""
    return TruncatedNormalStatistics(np.array([[1.0, 0.0, 1.0 / cut]]))


def _moments_between(points: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Integrals of 1, x, x^2 over |x| between neighbouring points (in standard deviations), the last up to the cut."""
    ends = np.append(points, _CUT) / _CUT
    zero, one, two = (np.diff(moment) for moment in _normal(_CUT).mixture_moments(ends))
    return zero, one * _CUT, two * _CUT**2


@cache
def lloyd_max_levels(bits: int) -> tuple[tuple[float, ...], float]:
    """The magnitudes of the 2^bits levels of least squared error for the standard normal distribution.

    Lloyd's iteration from the points of the optimal density for many levels, the normal one of variance 3. There is no
    level 0.

    Returns:
        2^(bits-1) magnitudes divided by the largest, and the largest, in standard deviations.
    """
    count = level_count(bits)
    start = _normal(_CUT / np.sqrt(3.0))
    total = start.cumulative_moments(np.array([1.0]))[0][0]
    levels = start.quantile((np.arange(count) + 0.5) / count * total) * _CUT
    for _ in range(_LLOYD_SWEEPS):
        zero, one, _ = _moments_between(np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2.0)))
        before, levels = levels, one / zero
        if float(np.max(np.abs(levels - before))) < 1e-9:
            break
    return tuple(float(level) for level in levels / levels[-1]), float(np.float32(levels[-1]))


@cache
def nearest_codebook(bits: int, is_uniform: bool, bucket_size: int, norm_format: str) -> Codebook:
    """Codebook of rotated buckets that are rounded to nearest and scaled without bias (EDEN, arXiv 2108.08842).

    Args:
        bits: code width, 2 to 8.
        is_uniform: equal steps with a zero, which entropy coding wants, in place of the levels of least error.
        bucket_size: 128, 256, 512 or 1024.
        norm_format: "fp32" or "bf16".
    """
    if is_uniform:
        levels = tuple(uniform_levels(bits).tolist())
        spread = _UNIFORM_SPREAD.get(bits, _WIDEST_UNIFORM_SPREAD)
    else:
        levels, spread = lloyd_max_levels(bits)
    return Codebook(
        bits,
        levels,
        bucket_size,
        norm="l2",
        norm_format=norm_format,
        rotation="hadamard",
        rounding="nearest",
        spread=spread,
    )


@cache
def stochastic_codebook(bits: int, bucket_size: int, norm_format: str) -> Codebook:
    """Codebook of rotated buckets that are rounded at random, relative to their largest magnitude: always unbiased.

    Args:
        bits: code width, 2 to 8.
        bucket_size: 128, 256, 512 or 1024.
        norm_format: "fp32" or "bf16".
    """
    if bucket_size not in _LARGEST_OF:
        raise CodebookError(f"rotated buckets have 128, 256, 512 or 1024 coordinates; got {bucket_size!r}")
    levels = tuple(minimum_variance_levels(_normal(_LARGEST_OF[bucket_size]), bits).tolist())
    return Codebook(bits, levels, bucket_size, norm_format=norm_format, rotation="hadamard")


def relative_error(codebook: Codebook) -> float:
    """Expected |Q(v) - v|^2 / |v|^2 of one message with a codebook of rotated buckets, for any v.

    Rounded to nearest, x becomes S q(x) with S = E x^2 / E x q(x). Rounded at random, the largest magnitude is taken to
    be its mean.

    Raises:
        CodebookError: for a codebook that does not rotate.
    """
    if codebook.rotation == "none":
        raise CodebookError("the error of a codebook that does not rotate depends on what is quantized")
    levels = np.array(codebook.levels)
    if codebook.rounding == "stochastic":
        distribution = _normal(_LARGEST_OF[codebook.bucket_size])
        return quantization_variance(levels, distribution) / distribution.squared_norm
    levels = levels * codebook.spread
    zero, one, two = _moments_between(np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2.0)))
    power, product, square = (float(np.cumsum(part)[-1]) for part in (two, levels * one, levels * levels * zero))
    return power * square / product**2 - 1.0


def level_probabilities(codebook: Codebook) -> Float64Array:
    """Probability of each magnitude level, float64 [2^(bits-1)], with a codebook of rotated buckets.

    Raises:
        CodebookError: for a codebook that does not round rotated buckets to nearest.
    """
    if codebook.rounding != "nearest":
        raise CodebookError("only rotated buckets that are rounded to nearest have known probabilities")
    levels = np.array(codebook.levels) * codebook.spread
    zero, _, _ = _moments_between(np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2.0)))
    return zero / float(np.cumsum(zero)[-1])
