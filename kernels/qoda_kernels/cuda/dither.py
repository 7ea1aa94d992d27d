"""Random numbers for rounding, and random signs: functions of the coordinate (`qoda_kernels/dither.py`)."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda.compilation import device
from qoda_kernels.kernel_constants import FIRST_MULTIPLIER, LOW_HALF, SECOND_MULTIPLIER


@device
def hash_coordinate(weyl, first, second):
    """`dither.hash32` of a coordinate, given its number times the Weyl multiplier."""
    word = word32.bit_xor(weyl, first)
    word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
    word = word32.bit_xor(word32.multiply(word, FIRST_MULTIPLIER), second)
    word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
    word = word32.multiply(word, SECOND_MULTIPLIER)
    return word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))


@device
def _in_stratum(random, common, is_negative, position, strata, inverse):
    """`dither.stratified` of 16 random bits and 8 common ones, on the signed axis; inverse is 1 / strata."""
    common = word32.bit_and(common, np.uint32(0xFF))
    moved = word32.add(word32.shift_right(word32.multiply(common, strata), np.uint32(8)), position)
    stratum = word32.minimum(moved, word32.subtract(moved, strata))
    place = np.float32(np.int32(word32.bit_or(word32.shift_left(stratum, np.uint32(16)), random)))
    scaled = word32.fused_multiply_add(place, inverse, libdevice.fmul_rn(inverse, np.float32(0.5)))
    return word32.bit_xor(word32.truncated(scaled), word32.multiply(is_negative, LOW_HALF))


@device
def stratified(random, common, row, low, high, bits, position, strata, inverse):
    """The random halves of rows `row` and `row + 4`, whose signs are in the words of rows 0-3 and 4-7."""
    shift = np.uint32(8 * (row // 2))
    sign_place = word32.subtract(word32.multiply(np.uint32(row + 1), bits), np.uint32(1))
    sign = word32.bit_and(word32.shift_right(low, sign_place), np.uint32(1))
    own = word32.bit_and(random, LOW_HALF)
    upper = _in_stratum(own, word32.shift_right(common, shift), sign, position, strata, inverse)
    sign = word32.bit_and(word32.shift_right(high, sign_place), np.uint32(1))
    own = word32.shift_right(random, np.uint32(16))
    common = word32.shift_right(common, word32.add(shift, np.uint32(16)))
    lower = _in_stratum(own, common, sign, position, strata, inverse)
    return word32.bit_or(upper, word32.shift_left(lower, np.uint32(16)))
