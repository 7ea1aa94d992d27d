"""Norms of buckets (`reference.bucket_norm`), as they travel and as they are read; sums over a bucket."""

import numpy as np
import numpy.typing as npt
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.arguments import BFLOAT16, FLOAT16, FLOAT32
from qoda_kernels.cpu.compilation import inline, kernel
from qoda_kernels.cpu.memory import read_norm
from qoda_kernels.kernel_constants import (
    HIGH_HALF,
    HUGE,
    INFINITY,
    L2_LANES,
    LARGEST,
    LARGEST_OF,
    LOW_HALF,
    MAGNITUDE,
    NAN,
    SCALE_DOWN,
    SCALE_FIELD,
    SCALE_UP,
    SCALED,
    SIGN,
    TINY,
)

# Float32 bits of the largest finite number of each dtype, and of the largest result of a mean over rotated buckets.
_ONE = np.uint32(127 << 23)
LIMITS = {kind: LARGEST_OF[name] for kind, name in ((FLOAT32, "float32"), (FLOAT16, "float16"), (BFLOAT16, "bfloat16"))}
ROTATED_LIMITS = {**LIMITS, FLOAT32: LIMITS[BFLOAT16]}


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


@inline
def scale_of_bucket(largest, clip):  # type: ignore[no-untyped-def]  # Numba infers
    """`reference.bucket_scale`, given the bits of a bucket's largest magnitude."""
    scale = np.float32(1.0)
    if clip == 0 and (largest < TINY or largest >= HUGE):
        if largest >= HUGE and largest < INFINITY:
            scale = SCALE_DOWN
        elif largest > 0 and largest < TINY:
            scale = SCALE_UP
    return scale


@inline
def read_norms(messages, norm_begin, norm_bytes, limit, extreme, norms):  # type: ignore[no-untyped-def]  # Numba infers
    """Read one bucket's norm of each message; returns whether one is extreme: then `read_extreme_norms` must follow.

    Args:
        messages: uint64 [K], addresses.
        norm_begin: first byte of the norm word, counted from a message's start.
        norm_bytes: 2 or 4.
        limit: float32 bits to which greater norms are lowered.
        extreme: the least norm word, as float32 bits, that is extreme; at most HUGE.
        norms: address of float32 [K], written.
    """
    largest = np.uint32(0)
    read = carray(word32.word_pointer(norms), (messages.size,), np.uint32)
    for source in range(messages.size):
        word = read_norm(messages[source] + np.uint64(norm_begin), norm_bytes)
        largest = word32.maximum(largest, word)
        read[source] = word32.minimum(word, limit)
    return largest >= extreme


@kernel
def read_extreme_norms(
    messages: npt.NDArray[np.uint64], norm_begin: int, norm_bytes: int, limit: np.uint32, norms: np.uint64
) -> np.float32:
    """`reference.common_norms`; the power that undoes the scaling is NaN where a norm is not finite.

    The arguments are those of `read_norms`; the limit is infinite with rotated buckets.
    """
    is_huge, is_scaled, is_small = False, False, True
    for source in range(messages.size):
        word = read_norm(messages[source] + np.uint64(norm_begin), norm_bytes)
        magnitude = word32.bit_and(word, MAGNITUDE)
        if magnitude >= INFINITY:
            return word32.float_from_bits(NAN)
        is_small = is_small and magnitude < _ONE
        if word >= SCALED:
            is_scaled = True
            is_huge = is_huge or magnitude >= _ONE
        else:
            is_huge = is_huge or magnitude >= HUGE
    common, power = np.float32(1.0), np.float32(1.0)
    if is_huge:
        common, power = SCALE_DOWN, SCALE_UP
    elif is_small and is_scaled:
        common, power = SCALE_UP, SCALE_DOWN
    read = carray(word32.float_pointer(np.uint64(norms)), (messages.size,), np.float32)
    for source in range(messages.size):
        word = read_norm(messages[source] + np.uint64(norm_begin), norm_bytes)
        magnitude = word32.bit_and(word, MAGNITUDE)
        if word < SCALED:
            read[source] = np.float32(word32.float_from_bits(word32.minimum(magnitude, limit)) * common)
        elif magnitude < _ONE:
            read[source] = np.float32(np.float32(word32.float_from_bits(magnitude) * common) * SCALE_DOWN)
        else:
            if limit < INFINITY:
                magnitude = word32.minimum(magnitude, word32.subtract(limit, SCALE_FIELD))
            read[source] = np.float32(np.float32(word32.float_from_bits(magnitude) * common) * SCALE_UP)
    return power


@kernel
def finish_extreme(address: np.uint64, length: int, power: np.float32, limit: np.uint32) -> None:
    """Multiply sums by a power and lower their magnitudes to a limit, given as float32 bits; NaN stays, as one NaN."""
    sums = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for place in range(length):
        word = word32.float_bits(np.float32(sums[place] * power))
        magnitude = word32.bit_and(word, MAGNITUDE)
        if magnitude > INFINITY:
            sums[place] = word32.float_from_bits(NAN)
        else:
            lowered = word32.minimum(magnitude, limit)
            sums[place] = word32.float_from_bits(word32.bit_or(lowered, word32.bit_and(word, SIGN)))
