"""Constants of the CPU and CUDA kernels, in the 32- and 64-bit types in which Numba takes them up.

Kernels take constants from here, not from where they are defined: a kernel on disk is too old when one has another
value (`compiled_sources.py`).
"""

import numpy as np

from qoda_kernels import codebook, dither, layout, reference, rotation, wire

# Float32 as bits.
MAGNITUDE, SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
INFINITY, NAN, LARGEST = np.uint32(reference.INFINITY_BITS), np.uint32(reference.NAN_BITS), np.uint32(0x7F7FFFFF)
LARGEST_OF = {name: np.uint32(number.view(np.uint32)) for name, number in reference.LARGEST.items()}  # of each dtype
HALF_NAN = np.uint32(0x7E00)  # of float16
LOW_HALF, HIGH_HALF = np.uint32(0x0000FFFF), np.uint32(0xFFFF0000)

ROUNDING_BITS = np.uint32(0x4B400000)  # of 1.5 * 2^23: x + it has the ulp 1, so the low bits are rint(x)

FIRST_MULTIPLIER, SECOND_MULTIPLIER = np.uint32(dither.FIRST_MULTIPLIER), np.uint32(dither.SECOND_MULTIPLIER)
WEYL, HIGH_WORD = np.uint32(dither.WEYL_MULTIPLIER), np.uint32(dither.HIGH_WORD_MULTIPLIER)
# Extreme buckets (`reference.py`).
TINY, HUGE = np.uint32(reference.TINY.view(np.uint32)), np.uint32(reference.HUGE.view(np.uint32))  # float32 bits
SCALE_UP, SCALE_DOWN, MEAN_BOUND = reference.SCALE_UP, reference.SCALE_DOWN, reference.MEAN_BOUND
SCALED = np.uint32(reference.SCALED_BIT)
SCALE_FIELD = np.uint32(64 << 23)  # what SCALE_UP adds to the bits of a float32
CHECKSUM, OF_ZEROS = np.uint64(wire.CHECKSUM_MULTIPLIER), np.uint32(wire.CHECKSUM_OF_ZEROS)

# Python's numbers.
ROWS, L2_LANES = codebook.ROWS, reference.L2_LANES
SIGN_LANES, SECOND_BLOCK_BIT = rotation.LANES, rotation.SECOND_BLOCK_BIT
HEADER_BYTES = layout.HEADER_BYTES
