"""Float16 and bfloat16, widened to float32 and rounded to nearest even, with one NaN."""

import numpy as np
import numpy.typing as npt

from qoda_kernels import word32
from qoda_kernels.cpu.arguments import FLOAT16
from qoda_kernels.cpu.compilation import inline, kernel
from qoda_kernels.kernel_constants import HALF_NAN, INFINITY, MAGNITUDE, NAN


@inline
def widen_half(half: np.uint32) -> np.float32:
    """Float32 value of float16 bits: exact, without arithmetic on subnormal numbers."""
    moved = word32.shift_left(word32.bit_and(half, np.uint32(0x7FFF)), np.uint32(13))
    exponent = word32.bit_and(moved, np.uint32(0x0F800000))
    rebased = word32.add(moved, np.uint32(112 << 23))
    if exponent == np.uint32(0x0F800000):
        rebased = word32.add(rebased, np.uint32(112 << 23))
    elif exponent == np.uint32(0):
        shifted = word32.float_from_bits(word32.add(rebased, np.uint32(1 << 23)))
        rebased = word32.float_bits(np.float32(shifted - word32.float_from_bits(np.uint32(113 << 23))))
    sign = word32.shift_left(word32.bit_and(half, np.uint32(0x8000)), np.uint32(16))
    return word32.float_from_bits(word32.bit_or(rebased, sign))


@inline
def rounded_to_half(value: np.float32) -> np.uint32:
    """Bits of a float32 rounded to nearest even in float16; 0x7E00 for NaN."""
    bits = word32.float_bits(value)
    magnitude = word32.bit_and(bits, MAGNITUDE)
    if magnitude > INFINITY:
        return HALF_NAN
    if magnitude >= np.uint32(143 << 23):  # 2^16: infinity
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(113 << 23):  # subnormal: the sum with 1/2 has the ulp 2^-24
        summed = np.float32(word32.float_from_bits(magnitude) + np.float32(0.5))
        half = word32.subtract(word32.float_bits(summed), np.uint32(126 << 23))
    else:
        odd = word32.bit_and(word32.shift_right(magnitude, np.uint32(13)), np.uint32(1))
        rounded = word32.add(magnitude, word32.add(odd, np.uint32(0xFFF)))
        half = word32.shift_right(word32.subtract(rounded, np.uint32(112 << 23)), np.uint32(13))
    sign = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(0x8000))
    return word32.bit_or(half, sign)


@inline
def rounded_to_bfloat16(value: np.float32) -> np.uint32:
    """Bits of a float32 rounded to bfloat16 (`reference.bfloat16_bits`); torch gives NaN other bits elsewhere."""
    bits = word32.float_bits(value)
    odd = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(1))
    rounded = word32.add(bits, word32.add(odd, np.uint32(0x7FFF)))
    if word32.bit_and(bits, MAGNITUDE) > INFINITY:
        rounded = NAN
    return word32.shift_right(rounded, np.uint32(16))


@kernel
def round_values(values: npt.NDArray[np.float32], kind: int, out: npt.NDArray[np.uint16]) -> None:
    """Bits of values rounded to float16 or bfloat16, to nearest even, with one NaN.

    Args:
        values: float32 [n].
        kind: FLOAT16 or BFLOAT16.
        out: uint16 [n], written.
    """
    if kind == FLOAT16:
        for index in range(values.size):
            out[index] = np.uint16(rounded_to_half(values[index]))
    else:
        for index in range(values.size):
            out[index] = np.uint16(rounded_to_bfloat16(values[index]))


@kernel
def widen_values(values: npt.NDArray[np.uint16], kind: int, out: npt.NDArray[np.float32]) -> None:
    """Float32 values of bits of float16 or bfloat16: the inverse of `round_values`, exact."""
    if kind == FLOAT16:
        for index in range(values.size):
            out[index] = widen_half(np.uint32(values[index]))
    else:
        for index in range(values.size):
            out[index] = word32.float_from_bits(word32.shift_left(np.uint32(values[index]), np.uint32(16)))
