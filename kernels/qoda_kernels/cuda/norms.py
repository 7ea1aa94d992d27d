"""Norms of buckets (`reference.bucket_norm`), and norm words in a message."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.checksums import checksum_share
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.threads import own_lane, warp_maximum, warp_tree_sum
from qoda_kernels.cuda.values import load_column, magnitude_bits
from qoda_kernels.kernel_constants import HIGH_HALF, INFINITY, LARGEST, NAN


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
def bucket_norm(begin, kind, count, is_l2):
    """Norm of a bucket as float32 bits, NaN where a value is not finite (`reference.bucket_norm`)."""
    lane = own_lane()
    largest = np.uint32(0)
    first = np.uint32(0)
    while first < count:
        column = load_column(begin, kind, word32.add(first, lane), np.uint32(32), count)
        largest = word32.maximum(largest, _largest_of(column))
        first = word32.add(first, np.uint32(256))
    largest = warp_maximum(largest)
    if largest >= INFINITY:
        return NAN
    if is_l2 == np.uint32(0) or largest == np.uint32(0):
        return largest
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
    return word32.minimum(word32.float_bits(libdevice.fmul_rn(root, back)), LARGEST)


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
