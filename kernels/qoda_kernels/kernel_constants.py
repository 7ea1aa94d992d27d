"""Constants of the CPU and CUDA kernels, in the 32- and 64-bit types in which Numba takes them up."""

import numpy as np

from qoda_kernels.dither import HIGH_WORD_MULTIPLIER, WEYL_MULTIPLIER
from qoda_kernels.reference import INFINITY_BITS, NAN_BITS
from qoda_kernels.reference import TINY_NORM as _TINY_NORM
from qoda_kernels.reference import TINY_SCALE as _TINY_SCALE
from qoda_kernels.wire import CHECKSUM_MULTIPLIER, CHECKSUM_OF_ZEROS

# Float32 as bits.
MAGNITUDE, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
INFINITY, NAN, LARGEST = np.uint32(INFINITY_BITS), np.uint32(NAN_BITS), np.uint32(0x7F7FFFFF)
HALF_NAN = np.uint32(0x7E00)  # of float16
LOW_HALF, HIGH_HALF = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)

ROUNDING_BITS = np.uint32(0x4B400000)  # of 1.5 * 2^23: x + it has the ulp 1, so the low bits are rint(x)

WEYL, HIGH_WORD = np.uint32(WEYL_MULTIPLIER), np.uint32(HIGH_WORD_MULTIPLIER)
TINY_NORM, TINY_SCALE = np.float32(_TINY_NORM), np.float32(_TINY_SCALE)
CHECKSUM, OF_ZEROS = np.uint64(CHECKSUM_MULTIPLIER), np.uint32(CHECKSUM_OF_ZEROS)
