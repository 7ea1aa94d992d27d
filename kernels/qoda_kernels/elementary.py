"""Logarithm, exponential and powers from exactly rounded operations, for what ranks must compute alike.

The functions of a host's mathematical library differ in the last bit between processors and versions. These use only
additions, multiplications, divisions and scaling by powers of two in float64, element by element, so that equal
arguments give equal bits everywhere. Their relative error is below 1e-15 for moderate arguments.
"""

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_SQRT_HALF = 0.7071067811865476
_LOG2E = 1.4426950408889634
# log(2) in two parts; the upper one has trailing zeros, so that its product with a small whole number is exact.
_LOG2_UPPER, _LOG2_LOWER = 0.693147180369123816490, 1.90821492927058770002e-10
_LOGARITHM_TERMS = 12
_EXPONENTIAL_TERMS = 16


def logarithm(x: npt.ArrayLike) -> Float64Array:
    """Natural logarithm of positive numbers, float64 of the same shape; minus infinity for 0.

    x = m 2^e with m in [1/sqrt(2), sqrt(2)), log m = 2 artanh((m - 1)/(m + 1)).
    """
    values = np.asarray(x, dtype=np.float64)
    mantissa, exponent = np.frexp(np.where(values > 0.0, values, 1.0))
    is_low = mantissa < _SQRT_HALF
    mantissa = np.where(is_low, 2.0 * mantissa, mantissa)
    power = (exponent - is_low).astype(np.float64)
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    series = np.zeros_like(t)
    for k in range(_LOGARITHM_TERMS, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    result = power * _LOG2_UPPER + (2.0 * t * series + power * _LOG2_LOWER)
    return np.asarray(np.where(values > 0.0, result, -np.inf))


def exponential(x: npt.ArrayLike) -> Float64Array:
    """E to the power x, float64 of the same shape; 0 below -700."""
    values = np.asarray(x, dtype=np.float64)
    bounded = np.clip(values, -700.0, 700.0)
    n = np.rint(bounded * _LOG2E)
    r = (bounded - n * _LOG2_UPPER) - n * _LOG2_LOWER
    series = np.ones_like(r)
    for k in range(_EXPONENTIAL_TERMS, 0, -1):
        series = 1.0 + series * (r / k)
    return np.asarray(np.where(values < -700.0, 0.0, np.ldexp(series, n.astype(np.int64))))


def power(x: npt.ArrayLike, exponent: float) -> Float64Array:
    """X to a power, for x >= 0, float64 of the same shape."""
    return exponential(exponent * logarithm(x))
