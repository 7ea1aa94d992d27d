"""From a column of eight coordinates to the indices of their levels (`reference.fixed_point`)."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.values import magnitude_bits
from qoda_kernels.kernel_constants import INFINITY, LOW_HALF, ROUNDING_BITS


@device
def clipped(column, norm_bits):
    """Magnitudes of a column, at most the norm: with codebooks that do not clip none is larger."""
    return (
        word32.float_from_bits(word32.minimum(magnitude_bits(column[0]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[1]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[2]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[3]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[4]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[5]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[6]), norm_bits)),
        word32.float_from_bits(word32.minimum(magnitude_bits(column[7]), norm_bits)),
    )


@device
def multiplied(column, factor):
    """A column times a factor."""
    return (
        libdevice.fmul_rn(column[0], factor),
        libdevice.fmul_rn(column[1], factor),
        libdevice.fmul_rn(column[2], factor),
        libdevice.fmul_rn(column[3], factor),
        libdevice.fmul_rn(column[4], factor),
        libdevice.fmul_rn(column[5], factor),
        libdevice.fmul_rn(column[6], factor),
        libdevice.fmul_rn(column[7], factor),
    )


@device
def _least_lines(table, slopes, steps, x):
    """For each of eight x, the least of the lines slope_i x + intercept_i. One read of a line serves all eight."""
    infinity = word32.float_from_bits(INFINITY)
    p0, p1, p2, p3, p4, p5, p6, p7 = infinity, infinity, infinity, infinity, infinity, infinity, infinity, infinity
    line = slopes
    end = word32.add(slopes, steps)
    while line < end:
        slope = memory.element(table, line)
        intercept = memory.element(table, word32.add(line, steps))
        p0 = libdevice.fminf(p0, word32.fused_multiply_add(slope, x[0], intercept))
        p1 = libdevice.fminf(p1, word32.fused_multiply_add(slope, x[1], intercept))
        p2 = libdevice.fminf(p2, word32.fused_multiply_add(slope, x[2], intercept))
        p3 = libdevice.fminf(p3, word32.fused_multiply_add(slope, x[3], intercept))
        p4 = libdevice.fminf(p4, word32.fused_multiply_add(slope, x[4], intercept))
        p5 = libdevice.fminf(p5, word32.fused_multiply_add(slope, x[5], intercept))
        p6 = libdevice.fminf(p6, word32.fused_multiply_add(slope, x[6], intercept))
        p7 = libdevice.fminf(p7, word32.fused_multiply_add(slope, x[7], intercept))
        line = word32.add(line, np.uint32(1))
    return p0, p1, p2, p3, p4, p5, p6, p7


@device
def _on_own_line(table, levels, steps, x):
    """Position of x by bisection of the levels, then the line of its interval."""
    step = word32.shift_right(word32.add(steps, np.uint32(1)), np.uint32(1))
    index = np.uint32(0)
    while step > np.uint32(0):
        middle = word32.add(index, step)
        if memory.element(table, word32.add(levels, middle)) <= x:
            index = middle
        step = word32.shift_right(step, np.uint32(1))
    index = word32.minimum(index, word32.subtract(steps, np.uint32(1)))
    slope = word32.add(word32.add(levels, index), word32.add(steps, np.uint32(1)))
    return word32.fused_multiply_add(memory.element(table, slope), x, memory.element(table, word32.add(slope, steps)))


@device
def positions(method, table, rounding, steps, x):
    """Positions of eight normalised magnitudes on the scale of level indices, times 2^F (`reference.fixed_point`).

    With uniform levels x are magnitudes, which `_level` multiplies.
    """
    if method == records.UNIFORM:
        return x
    if method == records.MINIMUM:
        return _least_lines(table, rounding, steps, x)
    return (
        _on_own_line(table, rounding, steps, x[0]),
        _on_own_line(table, rounding, steps, x[1]),
        _on_own_line(table, rounding, steps, x[2]),
        _on_own_line(table, rounding, steps, x[3]),
        _on_own_line(table, rounding, steps, x[4]),
        _on_own_line(table, rounding, steps, x[5]),
        _on_own_line(table, rounding, steps, x[6]),
        _on_own_line(table, rounding, steps, x[7]),
    )


@device
def sign_bits(a, b, c, d, bits):
    """Sign bits of four rows, where they belong in the rows' word."""
    first = word32.shift_right(word32.float_bits(a), np.uint32(31))
    second = word32.shift_left(word32.shift_right(word32.float_bits(b), np.uint32(31)), bits)
    third = word32.shift_left(word32.shift_right(word32.float_bits(c), np.uint32(31)), word32.add(bits, bits))
    triple = word32.multiply(np.uint32(3), bits)
    fourth = word32.shift_left(word32.shift_right(word32.float_bits(d), np.uint32(31)), triple)
    signs = word32.bit_or(word32.bit_or(first, second), word32.bit_or(third, fourth))
    return word32.shift_left(signs, word32.subtract(bits, np.uint32(1)))


@device
def _level(position, factor, random, fraction, steps):
    """Index of the level of one coordinate: its position is multiplied by a factor, and 16 random bits are added.

    The bits of 1.5 * 2^23 plus the random number are those of their sum, which has the ulp 1.
    """
    start = word32.add(ROUNDING_BITS, word32.shift_right(random, word32.subtract(np.uint32(16), fraction)))
    total = word32.fused_multiply_add(position, factor, word32.float_from_bits(start))
    dithered = word32.subtract(word32.float_bits(total), ROUNDING_BITS)
    return word32.minimum(word32.shift_right(dithered, fraction), steps)


@device
def add_levels(low, high, row, upper, lower, factor, random, bits, fraction, steps):
    """Levels of rows `row` and `row + 4` added to the words of rows 0-3 and 4-7."""
    shift = word32.multiply(np.uint32(row), bits)
    upper_level = _level(upper, factor, word32.bit_and(random, LOW_HALF), fraction, steps)
    lower_level = _level(lower, factor, word32.shift_right(random, np.uint32(16)), fraction, steps)
    low = word32.bit_or(low, word32.shift_left(upper_level, shift))
    return low, word32.bit_or(high, word32.shift_left(lower_level, shift))
