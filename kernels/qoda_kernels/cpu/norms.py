"""Norms of buckets (`reference.bucket_norm`), sums over a bucket, and norms rounded to bfloat16."""

import numpy as np
import numpy.typing as npt
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.compilation import inline, kernel
from qoda_kernels.kernel_constants import HIGH_HALF, INFINITY, L2_LANES, LARGEST, LOW_HALF, MAGNITUDE, NAN


@kernel
def max_magnitude(address: np.uint64, length: int) -> np.uint32:
    """Largest magnitude of float32 values, as bits; NaN and infinity compare as the largest."""
    groups = length // tiles.GROUP
    largest = np.uint32(0)
    if groups > 0:
        largest = tiles.largest_magnitude(np.uint64(address), groups)
    values = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for index in range(groups * tiles.GROUP, length):
        largest = word32.maximum(largest, word32.bit_and(word32.float_bits(values[index]), MAGNITUDE))
    return largest


@kernel
def _add_in_tree(lanes: npt.NDArray[np.float32]) -> np.float32:
    """Sum of L2_LANES numbers: j with j + 16, then j + 8, ..."""
    width = L2_LANES // 2
    while width > 0:
        for lane in range(width):
            lanes[lane] = np.float32(lanes[lane] + lanes[lane + width])
        width //= 2
    return lanes[0]


@kernel
def sum_of_values(address: np.uint64, length: int, lanes: npt.NDArray[np.float32]) -> np.float32:
    """`reference.tree_sum`."""
    lanes[:] = np.float32(0.0)
    rows = length // L2_LANES
    tiles.add_values(np.uint64(address), rows, lanes)
    values = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for lane in range(length - rows * L2_LANES):
        lanes[lane] = np.float32(lanes[lane] + values[rows * L2_LANES + lane])
    return _add_in_tree(lanes)


@kernel
def sum_of_squares(address: np.uint64, length: int, scale: np.float32, lanes: npt.NDArray[np.float32]) -> np.float32:
    """`reference.tree_sum` of the squares of values times a scale."""
    lanes[:] = np.float32(0.0)
    rows = length // L2_LANES
    tiles.add_squares(np.uint64(address), rows, scale, lanes)
    values = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for lane in range(length - rows * L2_LANES):
        scaled = np.float32(values[rows * L2_LANES + lane] * scale)
        lanes[lane] = np.float32(lanes[lane] + np.float32(scaled * scaled))
    return _add_in_tree(lanes)


@inline
def exponent_of_scale(largest: np.uint32) -> int:
    """Exponent field of the first of `reference.powers_of_scale`; that of the second is 254 less it."""
    return min(max(254 - int(largest >> np.uint32(23)), 1), 253)


@kernel
def l2_norm(address: np.uint64, length: int, largest: np.uint32, lanes: npt.NDArray[np.float32]) -> np.uint32:
    """Euclidean norm of a finite bucket that is not all zero, as float32 bits (`reference.bucket_norm`)."""
    field = exponent_of_scale(largest)
    total = sum_of_squares(address, length, word32.float_from_bits(np.uint32(field << 23)), lanes)
    root = np.float32(np.sqrt(total) * word32.float_from_bits(np.uint32((254 - field) << 23)))
    return word32.minimum(word32.float_bits(root), LARGEST)


@kernel
def round_to_bfloat16(word: np.uint32) -> np.uint32:
    """A non-negative finite norm as float32 bits, rounded to nearest in bfloat16 (halves up)."""
    return word32.bit_and(word32.add(word, np.uint32(0x8000)), HIGH_HALF)


@kernel
def round_up_to_bfloat16(word: np.uint32) -> np.uint32:
    """A non-negative norm as float32 bits, rounded up to bfloat16; NaN for a norm that is not finite."""
    if word >= INFINITY:
        return NAN
    return word32.bit_and(word32.add(word, LOW_HALF), HIGH_HALF)
