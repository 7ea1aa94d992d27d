"""Rotation of buckets in shared memory (`qoda_kernels/rotation.py`).

A bucket lies there, in its warp's part, from its rotation until it is packed or, when messages are decoded, from the
sum until it is stored.
"""

import numpy as np
from numba import cuda
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.dither import hash_coordinate
from qoda_kernels.cuda.threads import own_lane
from qoda_kernels.cuda.values import item_shift, load_value
from qoda_kernels.kernel_constants import HIGH_WORD, SECOND_BLOCK_BIT, WEYL

_ROOT_OF_HALF = np.uint32(0x3F3504F3)  # 2^-0.5 as float32 bits


@device
def _apply_signs(table, begin, size, bit, word):
    """Give a block in shared memory its signs: bits `bit`, `bit` + 1, ... of each lane's word for its rows."""
    index = own_lane()
    while index < size:
        place = word32.add(begin, index)
        sign = word32.shift_left(word32.shift_right(word, bit), np.uint32(31))
        table[place] = word32.float_from_bits(word32.bit_xor(word32.float_bits(memory.element(table, place)), sign))
        bit = word32.add(bit, np.uint32(1))
        index = word32.add(index, np.uint32(32))


@device
def _transform(table, begin, size, factor):
    """Walsh-Hadamard transform of a block in shared memory, a power of two of values, times a factor."""
    cuda.syncwarp()
    half = word32.shift_right(size, np.uint32(1))
    distance = half
    while distance > np.uint32(0):
        index = own_lane()
        while index < half:
            inside = word32.bit_and(index, word32.subtract(distance, np.uint32(1)))
            place = word32.add(begin, word32.subtract(word32.add(index, index), inside))
            other = word32.add(place, distance)
            a = memory.element(table, place)
            b = memory.element(table, other)
            table[place] = libdevice.fadd_rn(a, b)
            table[other] = libdevice.fsub_rn(a, b)
            index = word32.add(index, np.uint32(32))
        cuda.syncwarp()
        distance = word32.shift_right(distance, np.uint32(1))
    index = own_lane()
    while index < size:
        place = word32.add(begin, index)
        table[place] = libdevice.fmul_rn(memory.element(table, place), factor)
        index = word32.add(index, np.uint32(32))
    cuda.syncwarp()


@device
def _block_of(count):
    """The largest power of two that is not above a count, and 1 / its square root (`rotation.inverse_root`)."""
    size = np.uint32(1)
    power = np.uint32(0)
    while word32.add(size, size) <= count:
        size = word32.add(size, size)
        power = word32.add(power, np.uint32(1))
    root = np.uint32(127 << 23)
    if word32.bit_and(power, np.uint32(1)) != np.uint32(0):
        root = _ROOT_OF_HALF
    root = word32.subtract(root, word32.shift_left(word32.shift_right(power, np.uint32(1)), np.uint32(23)))
    return size, word32.float_from_bits(root)


@device
def sign_word(place, first, second):
    """The word whose bits are the signs of the lane's coordinates, in the bucket that begins at a coordinate."""
    first = word32.add(first, word32.multiply(np.uint32(place >> np.uint64(32)), HIGH_WORD))
    number = word32.add(np.uint32(place & np.uint64(0xFFFFFFFF)), own_lane())
    return hash_coordinate(word32.multiply(number, WEYL), first, second)


@device
def _rotate(table, begin, count, word):
    """Rotate a bucket in shared memory (`rotation.rotate`); each lane has written its own coordinates."""
    size, factor = _block_of(count)
    _apply_signs(table, begin, size, np.uint32(0), word)
    _transform(table, begin, size, factor)
    if size < count:
        last = word32.add(begin, word32.subtract(count, size))
        _apply_signs(table, last, size, np.uint32(SECOND_BLOCK_BIT), word)
        _transform(table, last, size, factor)


@device
def rotate_back(table, begin, count, word):
    """The inverse (`rotation.rotate_back`)."""
    size, factor = _block_of(count)
    if size < count:
        last = word32.add(begin, word32.subtract(count, size))
        _transform(table, last, size, factor)
        _apply_signs(table, last, size, np.uint32(SECOND_BLOCK_BIT), word)
    _transform(table, begin, size, factor)
    _apply_signs(table, begin, size, np.uint32(0), word)
    cuda.syncwarp()


@device
def place_rotated(values, kind, count, up, word, table, begin):
    """Read a bucket into shared memory, times a factor, and rotate it there."""
    cuda.syncwarp()
    index = own_lane()
    while index < count:
        value = load_value(values + (np.uint64(index) << np.uint64(item_shift(kind))), kind)
        table[word32.add(begin, index)] = libdevice.fmul_rn(value, up)
        index = word32.add(index, np.uint32(32))
    _rotate(table, begin, count, word)
