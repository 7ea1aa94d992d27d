"""Buckets that lie in shared memory (`rotation.py`): their columns, sums and norms."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.norms import add_square, powers_of_scale
from qoda_kernels.cuda.threads import own_lane, warp_maximum, warp_tree_sum
from qoda_kernels.cuda.values import magnitude_bits
from qoda_kernels.kernel_constants import LARGEST


@device
def _element_or_zero(table, begin, index, count):
    if index < count:
        return memory.element(table, word32.add(begin, index))
    return np.float32(0.0)


@device
def shared_column(table, begin, first, stride, count):
    """Values at first, first + stride, ..., first + 7 stride of a bucket in shared memory; 0 for those beyond."""
    b = word32.add(first, stride)
    c = word32.add(b, stride)
    d = word32.add(c, stride)
    e = word32.add(d, stride)
    f = word32.add(e, stride)
    g = word32.add(f, stride)
    return (
        _element_or_zero(table, begin, first, count),
        _element_or_zero(table, begin, b, count),
        _element_or_zero(table, begin, c, count),
        _element_or_zero(table, begin, d, count),
        _element_or_zero(table, begin, e, count),
        _element_or_zero(table, begin, f, count),
        _element_or_zero(table, begin, g, count),
        _element_or_zero(table, begin, word32.add(g, stride), count),
    )


@device
def shared_sum(table, begin, count, is_of_squares):
    """Sum of a bucket in shared memory, or of its squares, over the warp (`reference.tree_sum`)."""
    total = np.float32(0.0)
    index = own_lane()
    while index < count:
        value = memory.element(table, word32.add(begin, index))
        if is_of_squares:
            value = libdevice.fmul_rn(value, value)
        total = libdevice.fadd_rn(total, value)
        index = word32.add(index, np.uint32(32))
    return warp_tree_sum(total)


@device
def shared_maximum(table, begin, count):
    """Largest magnitude of a bucket in shared memory, over the warp, as float32 bits."""
    largest = np.uint32(0)
    index = own_lane()
    while index < count:
        largest = word32.maximum(largest, magnitude_bits(memory.element(table, word32.add(begin, index))))
        index = word32.add(index, np.uint32(32))
    return warp_maximum(largest)


@device
def shared_l2_norm(table, begin, count, largest):
    """Euclidean norm of a bucket in shared memory that is not all zero (`reference.bucket_norm`), as float32 bits."""
    up, down = powers_of_scale(largest)
    total = np.float32(0.0)
    index = own_lane()
    while index < count:
        total = add_square(total, memory.element(table, word32.add(begin, index)), up)
        index = word32.add(index, np.uint32(32))
    root = libdevice.fsqrt_rn(warp_tree_sum(total))
    return word32.minimum(word32.float_bits(libdevice.fmul_rn(root, down)), LARGEST)


@device
def store_products(table, begin, first, stride, count, low, high, bits, steps, magnitudes):
    """Replace a column of a bucket by its magnitudes times the levels of its codes, of rows 0-3 and of rows 4-7."""
    index = first
    row = np.uint32(0)
    while index < count and row < np.uint32(8):
        word = low if row < np.uint32(4) else high
        shift = word32.multiply(word32.bit_and(row, np.uint32(3)), bits)
        level = word32.bit_and(word32.shift_right(word, shift), steps)
        place = word32.add(begin, index)
        magnitude = word32.float_from_bits(magnitude_bits(memory.element(table, place)))
        table[place] = libdevice.fmul_rn(magnitude, memory.element(table, word32.add(magnitudes, level)))
        index = word32.add(index, stride)
        row = word32.add(row, np.uint32(1))
