"""Values of gradients: read as float32 from any dtype, and stored rounded."""

import numpy as np

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.threads import own_lane
from qoda_kernels.cuda.units import count_in_unit
from qoda_kernels.kernel_constants import HALF_NAN, INFINITY, MAGNITUDE, NAN

DOUBLE_NAN = np.uint64(0x7FF8000000000000)


@device
def item_shift(kind):
    """Binary logarithm of a value's bytes."""
    if kind == records.FLOAT32:
        return np.uint32(2)
    return np.uint32(3) if kind == records.FLOAT64 else np.uint32(1)


@device
def _load_float16(address):
    return memory.widen_half(memory.load_half_word(address))


@device
def _load_bfloat16(address):
    return word32.float_from_bits(word32.shift_left(np.uint32(memory.load_half_word(address)), np.uint32(16)))


@device
def load_value(address, kind):
    """A value of up to 32 bits as float32."""
    if kind == records.FLOAT32:
        return memory.load_float(address)
    return _load_float16(address) if kind == records.FLOAT16 else _load_bfloat16(address)


@device
def _value_or_zero(begin, kind, index, count):
    if index < count:
        return load_value(begin + (np.uint64(index) << np.uint64(item_shift(kind))), kind)
    return np.float32(0.0)


@device
def _eight_addresses(a, step):
    b = a + step
    c = b + step
    d = c + step
    e = d + step
    f = e + step
    g = f + step
    return a, b, c, d, e, f, g, g + step


@device
def load_column(begin, kind, first, stride, count):
    """Values at first, first + stride, ..., first + 7 stride of `count` values; 0 for those beyond."""
    last = word32.add(first, word32.multiply(np.uint32(7), stride))
    if last < count:
        shift = np.uint64(item_shift(kind))
        a, b, c, d, e, f, g, h = _eight_addresses(begin + (np.uint64(first) << shift), np.uint64(stride) << shift)
        if kind == records.FLOAT32:
            return (
                memory.load_float(a),
                memory.load_float(b),
                memory.load_float(c),
                memory.load_float(d),
                memory.load_float(e),
                memory.load_float(f),
                memory.load_float(g),
                memory.load_float(h),
            )
        if kind == records.FLOAT16:
            return (
                _load_float16(a),
                _load_float16(b),
                _load_float16(c),
                _load_float16(d),
                _load_float16(e),
                _load_float16(f),
                _load_float16(g),
                _load_float16(h),
            )
        return (
            _load_bfloat16(a),
            _load_bfloat16(b),
            _load_bfloat16(c),
            _load_bfloat16(d),
            _load_bfloat16(e),
            _load_bfloat16(f),
            _load_bfloat16(g),
            _load_bfloat16(h),
        )
    return (
        _value_or_zero(begin, kind, first, count),
        _value_or_zero(begin, kind, word32.add(first, stride), count),
        _value_or_zero(begin, kind, word32.add(first, word32.multiply(np.uint32(2), stride)), count),
        _value_or_zero(begin, kind, word32.add(first, word32.multiply(np.uint32(3), stride)), count),
        _value_or_zero(begin, kind, word32.add(first, word32.multiply(np.uint32(4), stride)), count),
        _value_or_zero(begin, kind, word32.add(first, word32.multiply(np.uint32(5), stride)), count),
        _value_or_zero(begin, kind, word32.add(first, word32.multiply(np.uint32(6), stride)), count),
        np.float32(0.0),
    )


@device
def store_value(begin, kind, index, value):
    """Store a float32 as value number `index`, rounded to nearest even; NaN becomes the positive quiet NaN."""
    address = begin + (np.uint64(index) << np.uint64(item_shift(kind)))
    bits = word32.float_bits(value)
    is_nan = word32.bit_and(bits, MAGNITUDE) > INFINITY
    if kind == records.FLOAT32:
        memory.store_word(address, NAN if is_nan else bits)
    elif kind == records.FLOAT16:
        half = np.uint32(memory.round_to_half(value))
        memory.store_half_word(address, HALF_NAN if is_nan else half)
    else:
        odd = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(1))
        rounded = word32.add(bits, word32.add(odd, np.uint32(0x7FFF)))
        memory.store_half_word(address, word32.shift_right(NAN if is_nan else rounded, np.uint32(16)))


@device
def store_if(out, kind, index, count, value):
    """Store a float32 as value number `index`, if there are so many."""
    if index < count:
        store_value(out, kind, index, value)


@device
def fill_with_nan(out, kind, segment, number):
    """NaN in all coordinates of a unit."""
    unit_length = memory.load_word(segment + records.UNIT_LENGTH)
    begin = np.uint64(number) * np.uint64(unit_length)
    count = count_in_unit(memory.load_long(segment + records.LENGTH), begin, unit_length)
    out += begin << np.uint64(item_shift(kind))
    index = own_lane()
    while index < count:
        if kind == records.FLOAT64:
            memory.store_long(out + np.uint64(8) * np.uint64(index), DOUBLE_NAN)
        else:
            store_value(out, kind, index, word32.float_from_bits(NAN))
        index = word32.add(index, np.uint32(32))


@device
def magnitude_bits(value):
    """Magnitude of a float32, as its bits: ordered like the numbers, with NaN above infinity."""
    return word32.bit_and(word32.float_bits(value), MAGNITUDE)
