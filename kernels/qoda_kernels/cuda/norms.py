"""Norms of buckets (`reference.bucket_norm`), and norm words in a message."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.checksums import checksum_share
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.threads import own_lane, warp_maximum, warp_tree_sum
from qoda_kernels.cuda.values import load_column, magnitude_bits
from qoda_kernels.kernel_constants import (
    HIGH_HALF,
    HUGE,
    INFINITY,
    LARGEST,
    MAGNITUDE,
    MEAN_BOUND,
    NAN,
    SCALE_DOWN,
    SCALE_FIELD,
    SCALE_UP,
    SCALED,
    SIGN,
    TINY,
)

_ONE = np.uint32(127 << 23)
_LARGEST_HALF, _LARGEST_BFLOAT16 = np.uint32(0x477FE000), np.uint32(0x7F7F0000)
_LARGE_HALF_NORM = np.uint32(137 << 23)  # 1024; coordinates may exceed a rotated bucket's norm 32 times


@device
def _largest_of(column):
    first = word32.maximum(magnitude_bits(column[0]), magnitude_bits(column[1]))
    second = word32.maximum(magnitude_bits(column[2]), magnitude_bits(column[3]))
    third = word32.maximum(magnitude_bits(column[4]), magnitude_bits(column[5]))
    fourth = word32.maximum(magnitude_bits(column[6]), magnitude_bits(column[7]))
    return word32.maximum(word32.maximum(first, second), word32.maximum(third, fourth))


@device
def add_square(total, value, scale):
    """A float32 sum, plus the square of a value times a scale."""
    scaled = libdevice.fmul_rn(value, scale)
    return libdevice.fadd_rn(total, libdevice.fmul_rn(scaled, scaled))


@device
def bucket_scale(largest):
    """`reference.bucket_scale` of a bucket that is not clipped, given the bits of its largest magnitude."""
    scale = np.float32(1.0)
    if largest >= HUGE:
        if largest < INFINITY:
            scale = SCALE_DOWN
    elif largest < TINY and largest > np.uint32(0):
        scale = SCALE_UP
    return scale


@device
def bucket_norm(begin, kind, count, is_l2, may_scale):
    """Norm of a bucket as float32 bits, NaN where a value is not finite, and what the bucket must be multiplied by.

    The norm is that of the scaled bucket (`reference.bucket_norm` and `bucket_scale`); scaled only if may_scale.
    """
    lane = own_lane()
    largest = np.uint32(0)
    first = np.uint32(0)
    while first < count:
        column = load_column(begin, kind, word32.add(first, lane), np.uint32(32), count)
        largest = word32.maximum(largest, _largest_of(column))
        first = word32.add(first, np.uint32(256))
    largest = warp_maximum(largest)
    if largest >= INFINITY:
        return NAN, np.float32(1.0)
    bucket_factor = np.float32(1.0)
    if may_scale:
        bucket_factor = bucket_scale(largest)
    if is_l2 == np.uint32(0) or largest == np.uint32(0):
        return word32.float_bits(libdevice.fmul_rn(word32.float_from_bits(largest), bucket_factor)), bucket_factor
    exponent = word32.shift_right(largest, np.uint32(23))
    field = np.uint32(253)
    if exponent >= np.uint32(253):
        field = np.uint32(1)
    elif exponent > np.uint32(0):
        field = word32.subtract(np.uint32(254), exponent)
    scale = word32.float_from_bits(word32.shift_left(field, np.uint32(23)))
    total = np.float32(0.0)
    first = np.uint32(0)
    while first < count:
        column = load_column(begin, kind, word32.add(first, lane), np.uint32(32), count)
        total = add_square(total, column[0], scale)
        total = add_square(total, column[1], scale)
        total = add_square(total, column[2], scale)
        total = add_square(total, column[3], scale)
        total = add_square(total, column[4], scale)
        total = add_square(total, column[5], scale)
        total = add_square(total, column[6], scale)
        total = add_square(total, column[7], scale)
        first = word32.add(first, np.uint32(256))
    root = libdevice.fsqrt_rn(warp_tree_sum(total))
    back = word32.float_from_bits(word32.shift_left(word32.subtract(np.uint32(254), field), np.uint32(23)))
    length = libdevice.fmul_rn(root, libdevice.fmul_rn(back, bucket_factor))
    return word32.minimum(word32.float_bits(length), LARGEST), bucket_factor


@device
def powers_of_scale(largest):
    """`reference.powers_of_scale`."""
    exponent = word32.shift_right(largest, np.uint32(23))
    field = np.uint32(253)
    if exponent >= np.uint32(253):
        field = np.uint32(1)
    elif exponent > np.uint32(0):
        field = word32.subtract(np.uint32(254), exponent)
    up = word32.float_from_bits(word32.shift_left(field, np.uint32(23)))
    return up, word32.float_from_bits(word32.shift_left(word32.subtract(np.uint32(254), field), np.uint32(23)))


@device
def load_norm(address, norm_bytes):
    """Norm word at an address as float32 bits."""
    if norm_bytes == np.uint32(4):
        return memory.load_word(address)
    return word32.shift_left(np.uint32(memory.load_half_word(address)), np.uint32(16))


@device
def bfloat16_norm(norm_bits, norm_bytes, addend):
    """A norm that is not NaN as it travels, given what is added before a bfloat16 is cut off."""
    if norm_bytes == np.uint32(2):
        return word32.bit_and(word32.add(norm_bits, addend), HIGH_HALF)
    return norm_bits


@device
def store_norm(message, segment, number, norm_bytes, norm_bits):
    """Store a bucket's norm word; returns its share of the checksum, which belongs to one lane."""
    norm_offset = word32.add(memory.load_word(segment + records.BEGIN), word32.multiply(number, norm_bytes))
    if norm_bytes == np.uint32(2):
        upper = word32.shift_right(norm_bits, np.uint32(16))
        memory.store_half_word(message + np.uint64(norm_offset), upper)
        return checksum_share(norm_offset, upper)
    memory.store_word(message + np.uint64(norm_offset), norm_bits)
    return checksum_share(norm_offset, norm_bits)


@device
def largest_bits(kind):
    """Largest finite number of a dtype, as float32 bits."""
    if kind == records.FLOAT16:
        return _LARGEST_HALF
    return LARGEST if kind == records.FLOAT32 else _LARGEST_BFLOAT16


@device
def lowered_norm(norm_bits, kind, scale):
    """The norm of a scaled bucket as it is read: at most the largest finite number of the dtype."""
    if scale > np.float32(1.0):
        return norm_bits
    largest = largest_bits(kind)
    if scale < np.float32(1.0):
        largest = word32.subtract(largest, SCALE_FIELD)
    return word32.minimum(norm_bits, largest)


@device
def extreme_norms_from(kind, rotates):
    """The least norm word, as float32 bits, with which a bucket must be decoded as an extreme one.

    With float16 there are more of them: norms beyond its largest number, which are lowered, and those of rotated
    buckets with which a result might be beyond it.
    """
    if kind != records.FLOAT16:
        return HUGE
    return _LARGE_HALF_NORM if rotates else word32.add(_LARGEST_HALF, np.uint32(1))


@device
def common_scale(senders, sender_count, norm_offset, norm_bytes, largest):
    """What the norms of an extreme bucket are multiplied by (`reference.common_norms`); NaN if one is not finite.

    `largest` is the largest of the norm words. The result is the same in all lanes of the warp.
    """
    rank = np.uint32(0)  # 3: not finite, 2: huge, 1: not below 1
    sender = own_lane()
    while sender < sender_count:
        message = memory.load_long(senders + records.SENDER_BYTES * np.uint64(sender) + records.SENDER_MESSAGE)
        word = load_norm(message + np.uint64(norm_offset), norm_bytes)
        magnitude = word32.bit_and(word, MAGNITUDE)
        if magnitude >= INFINITY:
            rank = np.uint32(3)
        elif magnitude >= HUGE or (word >= SCALED and magnitude >= _ONE):
            rank = word32.maximum(rank, np.uint32(2))
        elif magnitude >= _ONE:
            rank = word32.maximum(rank, np.uint32(1))
        sender = word32.add(sender, np.uint32(32))
    rank = warp_maximum(rank)
    if rank == np.uint32(3):
        return word32.float_from_bits(NAN)
    if rank == np.uint32(2):
        return SCALE_DOWN
    if rank == np.uint32(0) and largest >= SCALED:
        return SCALE_UP
    return np.float32(1.0)


@device
def extreme_norm(word, kind, rotates, common):
    """A norm of an extreme bucket, multiplied by the common scale."""
    magnitude = word32.bit_and(word, MAGNITUDE)
    power = np.float32(1.0)
    if word >= SCALED:
        power = SCALE_DOWN if magnitude < _ONE else SCALE_UP
    if not rotates and power >= np.float32(1.0):
        limit = largest_bits(kind)
        if power > np.float32(1.0):
            limit = word32.subtract(limit, SCALE_FIELD)
        magnitude = word32.minimum(magnitude, limit)
    return libdevice.fmul_rn(libdevice.fmul_rn(word32.float_from_bits(magnitude), common), power)


@device
def finished_extreme(value, kind, rotates, common, scale, sender_count):
    """A sum over an extreme bucket, already times the scale: the common scale undone, and lowered if it is a mean."""
    word = word32.float_bits(libdevice.fmul_rn(value, libdevice.fdiv_rn(np.float32(1.0), common)))
    magnitude = word32.bit_and(word, MAGNITUDE)
    bound = libdevice.fmul_rn(libdevice.fabsf(scale), np.float32(np.int32(sender_count)))
    if bound <= MEAN_BOUND and magnitude <= INFINITY:
        limit = largest_bits(kind)
        if rotates and kind == records.FLOAT32:
            limit = _LARGEST_BFLOAT16
        magnitude = word32.minimum(magnitude, limit)
    return word32.float_from_bits(word32.bit_or(magnitude, word32.bit_and(word, SIGN)))
