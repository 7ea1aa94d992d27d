"""Numba CUDA kernels: `reference.py` for a whole message in one launch. Each must give the reference's bits.

Warps take units (`device_tables.py`) in turn. In a bucket, lane j of a warp first reads coordinates j, j + 32, ... for
the norm, then works on lane j of each tile: eight coordinates, one packed integer, `bits` bytes. All branches but those
in a slice's last tile are the same for the whole warp.

NVVM joins a * b + c into one rounding wherever it can. Here every float32 product and sum that counts is written with
an explicit rounding (`fmul_rn`, `fadd_rn`), and the fused one is written as such (`word32.fused_multiply_add`).

Buckets that are rotated (`rotation.py`) lie in shared memory, one for each warp, from their rotation until they are
packed or, when messages are decoded, from the sum until it is stored. Kernels of their own do this, so that others need
no more registers.

Checksum (`wire.py`): the two sums are linear, so each lane adds what its own bytes contribute, in any order. For each
message there is one 64-bit total; the last block to finish folds it. Totals are zeroed again for the next launch.
"""

import numpy as np
from numba import cuda, types
from numba.cuda import libdevice

from qoda_kernels import device_memory as memory
from qoda_kernels import word32
from qoda_kernels.codebook import EXACT_BITS
from qoda_kernels.device_statistics import FRACTION_BITS, GATHERED
from qoda_kernels.device_tables import (
    CHECKSUM_WORD,
    COUNTER_WORD,
    KINDS,
    METHODS,
    PLAN,
    SEGMENT,
    SENDER,
    STATUS,
    STEP,
    WARPS,
    WORKSPACE,
)
from qoda_kernels.dither import FIRST_MULTIPLIER, SECOND_MULTIPLIER
from qoda_kernels.kernel_constants import (
    CHECKSUM,
    HALF_NAN,
    HIGH_HALF,
    HIGH_WORD,
    INFINITY,
    LARGEST,
    LOW_HALF,
    MAGNITUDE,
    NAN,
    OF_ZEROS,
    ROUNDING_BITS,
    TINY_NORM,
    TINY_SCALE,
    WEYL,
)
from qoda_kernels.layout import HEADER_BYTES
from qoda_kernels.rotation import SECOND_BLOCK_BIT

# mypy: disable-error-code="no-untyped-def"
# Numba infers the types of device functions.

THREADS = 32 * WARPS
CHECK_BYTES = 8192  # what one warp sums at a time of a received payload

_WARPS = WARPS
_LONG = types.uint64
_FLOAT32, _FLOAT16, _BFLOAT16, _FLOAT64 = (np.uint32(kind) for kind in KINDS.values())
_UNIFORM, _MINIMUM = np.uint32(METHODS["uniform"]), np.uint32(METHODS["minimum"])
_EXACT = np.uint32(EXACT_BITS)
_DOUBLE_NAN = np.uint64(0x7FF8000000000000)
_FIRST = np.uint32(FIRST_MULTIPLIER)
_SECOND = np.uint32(SECOND_MULTIPLIER)
_HEADER = np.uint32(HEADER_BYTES)
_HEADER_WORDS = np.uint32(HEADER_BYTES // 4)
_ALL = -1  # lanes
_ONE = np.uint32(127 << 23)  # 1, 2^-24 and 2^-8 as float32 bits: the joints of the statistics' grid
_LOWEST, _MIDDLE = np.uint32(103 << 23), np.uint32(119 << 23)
_FIRST_CELL, _FIRST_FINE_CELL = np.uint32(2), np.uint32(2 + 16 * 16)
_FRACTION = np.uint64(FRACTION_BITS)
_FROM_LOWEST_CELL = np.float32(2.0 ** (24 + FRACTION_BITS))

_device = cuda.jit(device=True, forceinline=True)


def _offsets(record):
    return {name: np.uint64(field[1]) for name, field in record.fields.items()}


# Numba takes module-level scalars as constants, so each offset of a field has a name.
_PLAN_SEGMENTS, _PLAN_ROUNDING, _PLAN_LEVELS, _PLAN_WORKSPACE, _PLAN_TOTALS, _PLAN_STATUS = (
    _offsets(PLAN)[name] for name in ("segments", "rounding", "levels", "workspace", "totals", "status")
)
_PLAN_SEGMENT_COUNT, _PLAN_UNITS, _PLAN_ROUNDING_FLOATS, _PLAN_LEVEL_FLOATS, _PLAN_PAYLOAD_BYTES = (
    _offsets(PLAN)[name] for name in ("segment_count", "units", "rounding_floats", "level_floats", "payload_bytes")
)
_COORDINATE, _LENGTH, _BEGIN, _CODES_BEGIN, _CODES_END, _END, _FIRST_UNIT, _UNIT_LENGTH = (
    _offsets(SEGMENT)[name]
    for name in ("coordinate", "length", "begin", "codes_begin", "codes_end", "end", "first_unit", "unit_length")
)
_BITS, _LANES, _KIND, _NORM_BYTES, _IS_L2, _METHOD, _ROUNDING, _LEVELS, _CODEBOOK, _CLIP = (
    _offsets(SEGMENT)[name]
    for name in ("bits", "lanes", "kind", "norm_bytes", "is_l2", "method", "rounding", "levels", "codebook", "clip")
)
_SEGMENT_BYTES = np.uint64(SEGMENT.itemsize)
_TOTAL, _FINISHED_BLOCKS = _offsets(WORKSPACE)["total"], _offsets(WORKSPACE)["finished_blocks"]
_SENDER_MESSAGE, _SENDER_HEADER = _offsets(SENDER)["message"], _offsets(SENDER)["header"]
_SENDER_BYTES = np.uint64(SENDER.itemsize)
_REFUSED, _REFUSED_SENDER, _RECEIVED, _EXPECTED = (
    _offsets(STATUS)[name] for name in ("refused", "sender", "received", "expected")
)
_GATHERED_LARGEST, _WEIGHT_BITS, _FINITE, _SKIPPED, _SUMS = (
    _offsets(GATHERED)[name] for name in ("largest", "weight_bits", "finite", "skipped", "sums")
)
_GATHERED_BYTES = np.uint64(GATHERED.itemsize)
_KEY_FIRST, _KEY_SECOND, _COMMON_FIRST, _COMMON_SECOND, _POSITION, _STRATA, _COUNTER = (
    _offsets(STEP)[name]
    for name in ("key_first", "key_second", "common_first", "common_second", "position", "strata", "counter")
)
_ROTATION_FIRST, _ROTATION_SECOND = (_offsets(STEP)[name] for name in ("rotation_first", "rotation_second"))
_ROTATES, _SPREAD, _MAGNITUDES = (_offsets(SEGMENT)[name] for name in ("rotates", "spread", "magnitudes"))
_PLAN_ROTATED = _offsets(PLAN)["rotated"]
_ROOT_OF_HALF = np.uint32(0x3F3504F3)  # 2^-0.5 as float32 bits


# --- numbers of threads, sums over a warp -----------------------------------------------------------------------------


@_device
def _lane():
    return word32.bit_and(np.uint32(cuda.threadIdx.x), np.uint32(31))


@_device
def _first_warp():
    """Number of this warp in the grid."""
    in_block = word32.shift_right(np.uint32(cuda.threadIdx.x), np.uint32(5))
    return word32.add(word32.multiply(np.uint32(cuda.blockIdx.x), np.uint32(_WARPS)), in_block)


@_device
def _all_warps():
    """Number of warps in the grid."""
    return word32.multiply(np.uint32(cuda.gridDim.x), np.uint32(_WARPS))


@_device
def _shuffle(word, distance):
    """A uint32 of the lane at a distance (xor)."""
    return np.uint32(cuda.shfl_xor_sync(_ALL, np.int32(word), distance))


@_device
def _warp_maximum(word):
    for distance in (16, 8, 4, 2, 1):
        word = word32.maximum(word, _shuffle(word, distance))
    return word


@_device
def _warp_tree_sum(value):
    """Sum of a float32 over the lanes: j with j + 16, then j + 8, ... (`reference.bucket_norm`)."""
    for distance in (16, 8, 4, 2, 1):
        value = libdevice.fadd_rn(value, word32.float_from_bits(_shuffle(word32.float_bits(value), distance)))
    return value


@_device
def _warp_sum(total):
    """Sum of a uint64 over the lanes, modulo 2^64."""
    for distance in (16, 8, 4, 2, 1):
        low = _shuffle(np.uint32(total & np.uint64(0xFFFFFFFF)), distance)
        high = _shuffle(np.uint32(total >> np.uint64(32)), distance)
        total += np.uint64(high) << np.uint64(32) | np.uint64(low)
    return total


# --- tables -----------------------------------------------------------------------------------------------------------


@_device
def _copy_table(address, count, table):
    """Copy a float32 table to shared memory; all threads of the block take part."""
    index = np.uint32(cuda.threadIdx.x)
    while index < count:
        table[index] = memory.load_float(address + np.uint64(4) * np.uint64(index))
        index = word32.add(index, np.uint32(THREADS))
    cuda.syncthreads()


@_device
def _find_segment(segments, count, unit):
    """Number of the segment in which a unit lies."""
    low = np.uint32(0)
    high = count
    while word32.add(low, np.uint32(1)) < high:
        middle = word32.shift_right(word32.add(low, high), np.uint32(1))
        if memory.load_word(segments + _SEGMENT_BYTES * np.uint64(middle) + _FIRST_UNIT) <= unit:
            low = middle
        else:
            high = middle
    return low


@_device
def _count_in_unit(length, begin, unit_length):
    """Coordinates of a unit that begins at a coordinate of its slice."""
    rest = length - begin
    return np.uint32(rest) if rest < np.uint64(unit_length) else unit_length


# --- values of gradients ----------------------------------------------------------------------------------------------


@_device
def _item_shift(kind):
    """Binary logarithm of a value's bytes."""
    if kind == _FLOAT32:
        return np.uint32(2)
    return np.uint32(3) if kind == _FLOAT64 else np.uint32(1)


@_device
def _load_float16(address):
    return memory.widen_half(memory.load_half_word(address))


@_device
def _load_bfloat16(address):
    return word32.float_from_bits(word32.shift_left(np.uint32(memory.load_half_word(address)), np.uint32(16)))


@_device
def _load_value(address, kind):
    if kind == _FLOAT32:
        return memory.load_float(address)
    return _load_float16(address) if kind == _FLOAT16 else _load_bfloat16(address)


@_device
def _value_or_zero(begin, kind, index, count):
    if index < count:
        return _load_value(begin + (np.uint64(index) << np.uint64(_item_shift(kind))), kind)
    return np.float32(0.0)


@_device
def _eight_addresses(a, step):
    b = a + step
    c = b + step
    d = c + step
    e = d + step
    f = e + step
    g = f + step
    return a, b, c, d, e, f, g, g + step


@_device
def _load_column(begin, kind, first, stride, count):
    """Values at first, first + stride, ..., first + 7 stride of `count` values; 0 for those beyond."""
    last = word32.add(first, word32.multiply(np.uint32(7), stride))
    if last < count:
        shift = np.uint64(_item_shift(kind))
        a, b, c, d, e, f, g, h = _eight_addresses(begin + (np.uint64(first) << shift), np.uint64(stride) << shift)
        if kind == _FLOAT32:
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
        if kind == _FLOAT16:
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


@_device
def _store_value(begin, kind, index, value):
    """Store a float32 as value number `index`, rounded to nearest even; NaN becomes the positive quiet NaN."""
    address = begin + (np.uint64(index) << np.uint64(_item_shift(kind)))
    bits = word32.float_bits(value)
    is_nan = word32.bit_and(bits, MAGNITUDE) > INFINITY
    if kind == _FLOAT32:
        memory.store_word(address, NAN if is_nan else bits)
    elif kind == _FLOAT16:
        half = np.uint32(memory.round_to_half(value))
        memory.store_half_word(address, HALF_NAN if is_nan else half)
    else:
        odd = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(1))
        rounded = word32.add(bits, word32.add(odd, np.uint32(0x7FFF)))
        memory.store_half_word(address, word32.shift_right(NAN if is_nan else rounded, np.uint32(16)))


# --- norms ------------------------------------------------------------------------------------------------------------


@_device
def _magnitude_bits(value):
    return word32.bit_and(word32.float_bits(value), MAGNITUDE)


@_device
def _largest_of(column):
    first = word32.maximum(_magnitude_bits(column[0]), _magnitude_bits(column[1]))
    second = word32.maximum(_magnitude_bits(column[2]), _magnitude_bits(column[3]))
    third = word32.maximum(_magnitude_bits(column[4]), _magnitude_bits(column[5]))
    fourth = word32.maximum(_magnitude_bits(column[6]), _magnitude_bits(column[7]))
    return word32.maximum(word32.maximum(first, second), word32.maximum(third, fourth))


@_device
def _add_square(total, value, scale):
    scaled = libdevice.fmul_rn(value, scale)
    return libdevice.fadd_rn(total, libdevice.fmul_rn(scaled, scaled))


@_device
def _norm(begin, kind, count, is_l2):
    """Norm of a bucket as float32 bits, NaN where a value is not finite (`reference.bucket_norm`)."""
    lane = _lane()
    largest = np.uint32(0)
    first = np.uint32(0)
    while first < count:
        column = _load_column(begin, kind, word32.add(first, lane), np.uint32(32), count)
        largest = word32.maximum(largest, _largest_of(column))
        first = word32.add(first, np.uint32(256))
    largest = _warp_maximum(largest)
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
        column = _load_column(begin, kind, word32.add(first, lane), np.uint32(32), count)
        total = _add_square(total, column[0], scale)
        total = _add_square(total, column[1], scale)
        total = _add_square(total, column[2], scale)
        total = _add_square(total, column[3], scale)
        total = _add_square(total, column[4], scale)
        total = _add_square(total, column[5], scale)
        total = _add_square(total, column[6], scale)
        total = _add_square(total, column[7], scale)
        first = word32.add(first, np.uint32(256))
    root = libdevice.fsqrt_rn(_warp_tree_sum(total))
    back = word32.float_from_bits(word32.shift_left(word32.subtract(np.uint32(254), field), np.uint32(23)))
    return word32.minimum(word32.float_bits(libdevice.fmul_rn(root, back)), LARGEST)


@_device
def _load_norm(address, norm_bytes):
    """Norm word at an address as float32 bits."""
    if norm_bytes == np.uint32(4):
        return memory.load_word(address)
    return word32.shift_left(np.uint32(memory.load_half_word(address)), np.uint32(16))


# --- rounding ---------------------------------------------------------------------------------------------------------


@_device
def _hash(weyl, first, second):
    """`dither.hash32` of a coordinate, given its number times the Weyl multiplier."""
    word = word32.bit_xor(weyl, first)
    word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
    word = word32.bit_xor(word32.multiply(word, _FIRST), second)
    word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
    word = word32.multiply(word, _SECOND)
    return word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))


@_device
def _clipped(column, norm_bits):
    """Magnitudes of a column, at most the norm: with codebooks that do not clip none is larger."""
    return (
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[0]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[1]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[2]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[3]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[4]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[5]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[6]), norm_bits)),
        word32.float_from_bits(word32.minimum(_magnitude_bits(column[7]), norm_bits)),
    )


@_device
def _scaled(magnitude, prescale, multiplier):
    return libdevice.fmul_rn(libdevice.fmul_rn(magnitude, prescale), multiplier)


@_device
def _normalised(column, is_tiny, multiplier):
    """A column of magnitudes times a multiplier."""
    if is_tiny:
        return (
            _scaled(column[0], TINY_SCALE, multiplier),
            _scaled(column[1], TINY_SCALE, multiplier),
            _scaled(column[2], TINY_SCALE, multiplier),
            _scaled(column[3], TINY_SCALE, multiplier),
            _scaled(column[4], TINY_SCALE, multiplier),
            _scaled(column[5], TINY_SCALE, multiplier),
            _scaled(column[6], TINY_SCALE, multiplier),
            _scaled(column[7], TINY_SCALE, multiplier),
        )
    return (
        libdevice.fmul_rn(column[0], multiplier),
        libdevice.fmul_rn(column[1], multiplier),
        libdevice.fmul_rn(column[2], multiplier),
        libdevice.fmul_rn(column[3], multiplier),
        libdevice.fmul_rn(column[4], multiplier),
        libdevice.fmul_rn(column[5], multiplier),
        libdevice.fmul_rn(column[6], multiplier),
        libdevice.fmul_rn(column[7], multiplier),
    )


@_device
def _least_lines(table, slopes, steps, x):
    """For each of eight x, the least of the lines slope_i x + intercept_i. One read of a line serves all eight."""
    infinity = word32.float_from_bits(INFINITY)
    p0, p1, p2, p3, p4, p5, p6, p7 = infinity, infinity, infinity, infinity, infinity, infinity, infinity, infinity
    line = slopes
    end = word32.add(slopes, steps)
    while line < end:
        slope = memory.element(table, line)
        intercept = memory.element(table, word32.add(line, steps))
        p0 = libdevice.fminf(p0, word32.fused_multiply_add(slope, x[0], intercept))
        p1 = libdevice.fminf(p1, word32.fused_multiply_add(slope, x[1], intercept))
        p2 = libdevice.fminf(p2, word32.fused_multiply_add(slope, x[2], intercept))
        p3 = libdevice.fminf(p3, word32.fused_multiply_add(slope, x[3], intercept))
        p4 = libdevice.fminf(p4, word32.fused_multiply_add(slope, x[4], intercept))
        p5 = libdevice.fminf(p5, word32.fused_multiply_add(slope, x[5], intercept))
        p6 = libdevice.fminf(p6, word32.fused_multiply_add(slope, x[6], intercept))
        p7 = libdevice.fminf(p7, word32.fused_multiply_add(slope, x[7], intercept))
        line = word32.add(line, np.uint32(1))
    return p0, p1, p2, p3, p4, p5, p6, p7


@_device
def _on_own_line(table, levels, steps, x):
    """Position of x by bisection of the levels, then the line of its interval."""
    step = word32.shift_right(word32.add(steps, np.uint32(1)), np.uint32(1))
    index = np.uint32(0)
    while step > np.uint32(0):
        middle = word32.add(index, step)
        if memory.element(table, word32.add(levels, middle)) <= x:
            index = middle
        step = word32.shift_right(step, np.uint32(1))
    index = word32.minimum(index, word32.subtract(steps, np.uint32(1)))
    slope = word32.add(word32.add(levels, index), word32.add(steps, np.uint32(1)))
    return word32.fused_multiply_add(memory.element(table, slope), x, memory.element(table, word32.add(slope, steps)))


@_device
def _positions(method, table, rounding, steps, x):
    """Positions of eight normalised magnitudes on the scale of level indices, times 2^F (`reference.fixed_point`).

    With uniform levels x are magnitudes, which `_level` multiplies.
    """
    if method == _UNIFORM:
        return x
    if method == _MINIMUM:
        return _least_lines(table, rounding, steps, x)
    return (
        _on_own_line(table, rounding, steps, x[0]),
        _on_own_line(table, rounding, steps, x[1]),
        _on_own_line(table, rounding, steps, x[2]),
        _on_own_line(table, rounding, steps, x[3]),
        _on_own_line(table, rounding, steps, x[4]),
        _on_own_line(table, rounding, steps, x[5]),
        _on_own_line(table, rounding, steps, x[6]),
        _on_own_line(table, rounding, steps, x[7]),
    )


@_device
def _signs(a, b, c, d, bits):
    """Sign bits of four rows, where they belong in the rows' word."""
    first = word32.shift_right(word32.float_bits(a), np.uint32(31))
    second = word32.shift_left(word32.shift_right(word32.float_bits(b), np.uint32(31)), bits)
    third = word32.shift_left(word32.shift_right(word32.float_bits(c), np.uint32(31)), word32.add(bits, bits))
    triple = word32.multiply(np.uint32(3), bits)
    fourth = word32.shift_left(word32.shift_right(word32.float_bits(d), np.uint32(31)), triple)
    signs = word32.bit_or(word32.bit_or(first, second), word32.bit_or(third, fourth))
    return word32.shift_left(signs, word32.subtract(bits, np.uint32(1)))


@_device
def _level(position, factor, random, fraction, steps):
    """Index of the level of one coordinate: its position is multiplied by a factor, and 16 random bits are added.

    The bits of 1.5 * 2^23 plus the random number are those of their sum, which has the ulp 1.
    """
    start = word32.add(ROUNDING_BITS, word32.shift_right(random, word32.subtract(np.uint32(16), fraction)))
    total = word32.fused_multiply_add(position, factor, word32.float_from_bits(start))
    dithered = word32.subtract(word32.float_bits(total), ROUNDING_BITS)
    return word32.minimum(word32.shift_right(dithered, fraction), steps)


@_device
def _add_levels(low, high, row, upper, lower, factor, random, bits, fraction, steps):
    """Levels of rows `row` and `row + 4` added to the words of rows 0-3 and 4-7."""
    shift = word32.multiply(np.uint32(row), bits)
    upper_level = _level(upper, factor, word32.bit_and(random, LOW_HALF), fraction, steps)
    lower_level = _level(lower, factor, word32.shift_right(random, np.uint32(16)), fraction, steps)
    low = word32.bit_or(low, word32.shift_left(upper_level, shift))
    return low, word32.bit_or(high, word32.shift_left(lower_level, shift))


@_device
def _in_stratum(random, common, is_negative, position, strata, inverse):
    """`dither.stratified` of 16 random bits and 8 common ones, on the signed axis; inverse is 1 / strata."""
    common = word32.bit_and(common, np.uint32(0xFF))
    moved = word32.add(word32.shift_right(word32.multiply(common, strata), np.uint32(8)), position)
    stratum = word32.minimum(moved, word32.subtract(moved, strata))
    place = np.float32(np.int32(word32.bit_or(word32.shift_left(stratum, np.uint32(16)), random)))
    scaled = word32.fused_multiply_add(place, inverse, libdevice.fmul_rn(inverse, np.float32(0.5)))
    return word32.bit_xor(word32.truncated(scaled), word32.multiply(is_negative, LOW_HALF))


@_device
def _stratified(random, common, row, low, high, bits, position, strata, inverse):
    """The random halves of rows `row` and `row + 4`, whose signs are in the words of rows 0-3 and 4-7."""
    shift = np.uint32(8 * (row // 2))
    sign_place = word32.subtract(word32.multiply(np.uint32(row + 1), bits), np.uint32(1))
    sign = word32.bit_and(word32.shift_right(low, sign_place), np.uint32(1))
    own = word32.bit_and(random, LOW_HALF)
    upper = _in_stratum(own, word32.shift_right(common, shift), sign, position, strata, inverse)
    sign = word32.bit_and(word32.shift_right(high, sign_place), np.uint32(1))
    own = word32.shift_right(random, np.uint32(16))
    common = word32.shift_right(common, word32.add(shift, np.uint32(16)))
    lower = _in_stratum(own, common, sign, position, strata, inverse)
    return word32.bit_or(upper, word32.shift_left(lower, np.uint32(16)))


# --- checksum ---------------------------------------------------------------------------------------------------------


@_device
def _share(offset, value):
    """What the bytes of a value that begins at a byte of the message add to the checksum's total.

    The value must not reach beyond its 32-bit word.
    """
    place = word32.subtract(offset, _HEADER)
    weight = np.uint64(1) + CHECKSUM * np.uint64(word32.add(word32.shift_right(place, np.uint32(2)), np.uint32(1)))
    shift = word32.shift_left(word32.bit_and(place, np.uint32(3)), np.uint32(3))
    return weight * np.uint64(word32.shift_left(np.uint32(value), shift))


@_device
def _share_of_planes(offset, byte_sum, weighted_sum, words):
    """What bytes at offset, offset + 4 words, offset + 8 words, ... add to the total.

    Args:
        offset: of byte 0, in the message.
        byte_sum: sum of the bytes.
        weighted_sum: sum of n times byte n.
        words: distance of the bytes.
    """
    place = word32.subtract(offset, _HEADER)
    first = np.uint64(word32.add(word32.shift_right(place, np.uint32(2)), np.uint32(1)))
    position_sum = first * np.uint64(byte_sum) + np.uint64(words) * np.uint64(weighted_sum)
    shift = word32.shift_left(word32.bit_and(place, np.uint32(3)), np.uint32(3))
    return (np.uint64(byte_sum) + CHECKSUM * position_sum) << np.uint64(shift)


@_device
def _fold(total):
    return word32.bit_xor(np.uint32((total ^ (total >> np.uint64(32))) & np.uint64(0xFFFFFFFF)), OF_ZEROS)


@_device
def _is_last_block(workspace):
    """Whether all other blocks have come this far; for one thread of each block. What they wrote can then be read."""
    cuda.threadfence()
    finished = memory.atomic_add_word(workspace + _FINISHED_BLOCKS, np.uint32(1))
    cuda.threadfence()
    return word32.add(finished, np.uint32(1)) == np.uint32(cuda.gridDim.x)


@_device
def _place_in_tiles(lanes):
    """The first tile on which a lane of the warp works, how many the warp does at once, and its lane in them.

    With tiles of 16 lanes, each half of the warp takes every other one.
    """
    lane = _lane()
    if lanes == np.uint32(16):
        return word32.shift_right(lane, np.uint32(4)), np.uint32(2), word32.bit_and(lane, np.uint32(15))
    return np.uint32(0), np.uint32(1), lane


# --- rotation ---------------------------------------------------------------------------------------------------------


@_device
def _apply_signs(table, begin, size, bit, word):
    """Give a block in shared memory its signs: bits `bit`, `bit` + 1, ... of each lane's word for its rows."""
    index = _lane()
    while index < size:
        place = word32.add(begin, index)
        sign = word32.shift_left(word32.shift_right(word, bit), np.uint32(31))
        table[place] = word32.float_from_bits(word32.bit_xor(word32.float_bits(memory.element(table, place)), sign))
        bit = word32.add(bit, np.uint32(1))
        index = word32.add(index, np.uint32(32))


@_device
def _transform(table, begin, size, factor):
    """Walsh-Hadamard transform of a block in shared memory, a power of two of values, times a factor."""
    cuda.syncwarp()
    half = word32.shift_right(size, np.uint32(1))
    distance = half
    while distance > np.uint32(0):
        index = _lane()
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
    index = _lane()
    while index < size:
        place = word32.add(begin, index)
        table[place] = libdevice.fmul_rn(memory.element(table, place), factor)
        index = word32.add(index, np.uint32(32))
    cuda.syncwarp()


@_device
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


@_device
def _sign_word(place, first, second):
    """The word whose bits are the signs of the lane's coordinates, in the bucket that begins at a coordinate."""
    first = word32.add(first, word32.multiply(np.uint32(place >> np.uint64(32)), HIGH_WORD))
    number = word32.add(np.uint32(place & np.uint64(0xFFFFFFFF)), _lane())
    return _hash(word32.multiply(number, WEYL), first, second)


@_device
def _rotate(table, begin, count, word):
    """Rotate a bucket in shared memory (`rotation.rotate`); each lane has written its own coordinates."""
    size, factor = _block_of(count)
    _apply_signs(table, begin, size, np.uint32(0), word)
    _transform(table, begin, size, factor)
    if size < count:
        last = word32.add(begin, word32.subtract(count, size))
        _apply_signs(table, last, size, np.uint32(SECOND_BLOCK_BIT), word)
        _transform(table, last, size, factor)


@_device
def _rotate_back(table, begin, count, word):
    """The inverse (`rotation.rotate_back`)."""
    size, factor = _block_of(count)
    if size < count:
        last = word32.add(begin, word32.subtract(count, size))
        _transform(table, last, size, factor)
        _apply_signs(table, last, size, np.uint32(SECOND_BLOCK_BIT), word)
    _transform(table, begin, size, factor)
    _apply_signs(table, begin, size, np.uint32(0), word)
    cuda.syncwarp()


@_device
def _shared_sum(table, begin, count, is_of_squares):
    """Sum of a bucket in shared memory, or of its squares, over the warp (`reference.tree_sum`)."""
    total = np.float32(0.0)
    index = _lane()
    while index < count:
        value = memory.element(table, word32.add(begin, index))
        if is_of_squares:
            value = libdevice.fmul_rn(value, value)
        total = libdevice.fadd_rn(total, value)
        index = word32.add(index, np.uint32(32))
    return _warp_tree_sum(total)


@_device
def _shared_maximum(table, begin, count):
    """Largest magnitude of a bucket in shared memory, over the warp, as float32 bits."""
    largest = np.uint32(0)
    index = _lane()
    while index < count:
        largest = word32.maximum(largest, _magnitude_bits(memory.element(table, word32.add(begin, index))))
        index = word32.add(index, np.uint32(32))
    return _warp_maximum(largest)


@_device
def _powers_of_scale(largest):
    """`reference.powers_of_scale`."""
    exponent = word32.shift_right(largest, np.uint32(23))
    field = np.uint32(253)
    if exponent >= np.uint32(253):
        field = np.uint32(1)
    elif exponent > np.uint32(0):
        field = word32.subtract(np.uint32(254), exponent)
    up = word32.float_from_bits(word32.shift_left(field, np.uint32(23)))
    return up, word32.float_from_bits(word32.shift_left(word32.subtract(np.uint32(254), field), np.uint32(23)))


@_device
def _shared_l2_norm(table, begin, count, largest):
    """Euclidean norm of a bucket in shared memory that is not all zero (`reference.bucket_norm`), as float32 bits."""
    up, down = _powers_of_scale(largest)
    total = np.float32(0.0)
    index = _lane()
    while index < count:
        total = _add_square(total, memory.element(table, word32.add(begin, index)), up)
        index = word32.add(index, np.uint32(32))
    root = libdevice.fsqrt_rn(_warp_tree_sum(total))
    return word32.minimum(word32.float_bits(libdevice.fmul_rn(root, down)), LARGEST)


@_device
def _place_rotated(values, kind, count, up, word, table, begin):
    """Read a bucket into shared memory, times a factor, and rotate it there."""
    cuda.syncwarp()
    index = _lane()
    while index < count:
        value = _load_value(values + (np.uint64(index) << np.uint64(_item_shift(kind))), kind)
        table[word32.add(begin, index)] = libdevice.fmul_rn(value, up)
        index = word32.add(index, np.uint32(32))
    _rotate(table, begin, count, word)


@_device
def _element_or_zero(table, begin, index, count):
    if index < count:
        return memory.element(table, word32.add(begin, index))
    return np.float32(0.0)


@_device
def _shared_column(table, begin, first, stride, count):
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


@_device
def _store_products(table, begin, first, stride, count, low, high, bits, steps, magnitudes):
    """Replace a column of a bucket by its magnitudes times the levels of its codes, of rows 0-3 and of rows 4-7."""
    index = first
    row = np.uint32(0)
    while index < count and row < np.uint32(8):
        word = low if row < np.uint32(4) else high
        shift = word32.multiply(word32.bit_and(row, np.uint32(3)), bits)
        level = word32.bit_and(word32.shift_right(word, shift), steps)
        place = word32.add(begin, index)
        magnitude = word32.float_from_bits(_magnitude_bits(memory.element(table, place)))
        table[place] = libdevice.fmul_rn(magnitude, memory.element(table, word32.add(magnitudes, level)))
        index = word32.add(index, stride)
        row = word32.add(row, np.uint32(1))


@_device
def _bfloat16_norm(norm_bits, norm_bytes, addend):
    """A norm that is not NaN as it travels, given what is added before a bfloat16 is cut off."""
    if norm_bytes == np.uint32(2):
        return word32.bit_and(word32.add(norm_bits, addend), HIGH_HALF)
    return norm_bits


@_device
def _store_norm(message, segment, number, norm_bytes, norm_bits):
    """Store a bucket's norm word; returns its share of the checksum, which belongs to one lane."""
    norm_offset = word32.add(memory.load_word(segment + _BEGIN), word32.multiply(number, norm_bytes))
    if norm_bytes == np.uint32(2):
        upper = word32.shift_right(norm_bits, np.uint32(16))
        memory.store_half_word(message + np.uint64(norm_offset), upper)
        return _share(norm_offset, upper)
    memory.store_word(message + np.uint64(norm_offset), norm_bits)
    return _share(norm_offset, norm_bits)


# --- encode -----------------------------------------------------------------------------------------------------------


@_device
def _encode_exact(values, kind, segment, message, number):
    """Copy one unit of an exact segment; returns its share of the checksum."""
    begin = memory.load_word(segment + _BEGIN)
    bytes_of_unit = word32.shift_left(memory.load_word(segment + _UNIT_LENGTH), _item_shift(kind))
    first = word32.multiply(number, bytes_of_unit)
    used = word32.subtract(memory.load_word(segment + _CODES_END), begin)
    padded = word32.subtract(memory.load_word(segment + _END), begin)
    last = word32.minimum(word32.add(first, bytes_of_unit), padded)
    is_word_aligned = (values & np.uint64(3)) == np.uint64(0)
    total = np.uint64(0)
    place = word32.add(first, word32.shift_left(_lane(), np.uint32(2)))
    while place < last:
        word = np.uint32(0)
        source = values + np.uint64(place)
        if place < used:
            if is_word_aligned and word32.add(place, np.uint32(4)) <= used:
                word = memory.load_word(source)
            else:
                word = np.uint32(memory.load_half_word(source))
                if word32.add(place, np.uint32(2)) < used:
                    upper = np.uint32(memory.load_half_word(source + np.uint64(2)))
                    word = word32.bit_or(word, word32.shift_left(upper, np.uint32(16)))
        offset = word32.add(begin, place)
        memory.store_word(message + np.uint64(offset), word)
        total += _share(offset, word)
        place = word32.add(place, np.uint32(128))
    return total


@_device
def _store_padding(message, segment):
    """Zero the bytes behind a segment's codes."""
    place = word32.add(memory.load_word(segment + _CODES_END), _lane())
    if place < memory.load_word(segment + _END):
        memory.store_byte(message + np.uint64(place), np.uint32(0))


@_device
def _store_zeros(message, offset, count):
    place = _lane()
    while place < count:
        memory.store_byte(message + np.uint64(word32.add(offset, place)), np.uint32(0))
        place = word32.add(place, np.uint32(32))


@_device
def _encode_bucket(values, kind, segment, message, number, table, key, rotation):
    """Quantize and pack one bucket; returns the lane's share of the checksum.

    `rotation` holds whether there are codebooks that rotate, as the compiler knows, the words of their key, and the
    first float of the warp's part of the shared memory.
    """
    lane = _lane()
    bits = memory.load_word(segment + _BITS)
    lanes = memory.load_word(segment + _LANES)
    bucket_size = memory.load_word(segment + _UNIT_LENGTH)
    norm_bytes = memory.load_word(segment + _NORM_BYTES)
    length = memory.load_long(segment + _LENGTH)
    begin = np.uint64(number) * np.uint64(bucket_size)
    count = _count_in_unit(length, begin, bucket_size)
    place = memory.load_long(segment + _COORDINATE) + begin
    values += begin << np.uint64(_item_shift(kind))
    bucket_bytes = word32.multiply(word32.shift_right(bucket_size, np.uint32(3)), bits)
    offset = word32.add(memory.load_word(segment + _CODES_BEGIN), word32.multiply(number, bucket_bytes))
    total = np.uint64(0)

    may_rotate, rotation_first, rotation_second, scratch = rotation
    rotates = may_rotate and memory.load_word(segment + _ROTATES) != np.uint32(0)
    is_l2 = memory.load_word(segment + _IS_L2)
    norm_bits = _norm(values, kind, count, np.uint32(0) if rotates else is_l2)
    clip = memory.load_word(segment + _CLIP)
    if clip != np.uint32(0) and norm_bits != np.uint32(0) and norm_bits < INFINITY:
        norm_bits = clip
    spread = np.float32(0.0)  # above 0: to nearest
    power = np.float32(0.0)
    down = np.float32(0.0)
    used_bits = np.uint32(0)  # of the norm by which rotated coordinates are divided
    if rotates and norm_bits != np.uint32(0) and norm_bits < INFINITY:
        up, down = _powers_of_scale(norm_bits)
        _place_rotated(values, kind, count, up, _sign_word(place, rotation_first, rotation_second), table, scratch)
        spread = memory.load_float(segment + _SPREAD)
        if spread > np.float32(0.0):
            power = _shared_sum(table, scratch, count, True)
            root = libdevice.fsqrt_rn(libdevice.fdiv_rn(power, np.float32(np.int32(count))))
            used_bits = word32.float_bits(libdevice.fmul_rn(root, spread))
        else:
            norm_bits = _shared_maximum(table, scratch, count)
            if is_l2 != np.uint32(0):
                norm_bits = _shared_l2_norm(table, scratch, count, norm_bits)
            scaled = libdevice.fmul_rn(word32.float_from_bits(norm_bits), down)
            norm_bits = word32.minimum(word32.float_bits(scaled), LARGEST)
    if norm_bytes == np.uint32(2):
        rounded_up = word32.bit_and(word32.add(norm_bits, LOW_HALF), HIGH_HALF)
        norm_bits = NAN if norm_bits >= INFINITY else rounded_up
    if rotates and spread == np.float32(0.0) and norm_bits != np.uint32(0) and norm_bits < INFINITY:
        used_bits = word32.float_bits(libdevice.fmul_rn(word32.float_from_bits(norm_bits), up))
    if lane == np.uint32(0) and spread == np.float32(0.0):
        total += _store_norm(message, segment, number, norm_bytes, norm_bits)
    if rotates:
        norm_bits = used_bits
    if begin + np.uint64(count) == length:
        _store_padding(message, segment)

    tile = word32.shift_left(lanes, np.uint32(3))
    tiles = np.uint32(0)
    tiles_length = np.uint32(0)
    while word32.add(tiles_length, tile) <= count:
        tiles_length = word32.add(tiles_length, tile)
        tiles = word32.add(tiles, np.uint32(1))
    tail = word32.subtract(count, tiles_length)
    tail_lanes = word32.shift_right(word32.add(tail, np.uint32(7)), np.uint32(3))
    if norm_bits == np.uint32(0) or norm_bits >= INFINITY:
        used_lanes = word32.add(word32.multiply(tiles, lanes), tail_lanes)
        _store_zeros(message, offset, word32.multiply(used_lanes, bits))
        return total

    steps = word32.subtract(word32.shift_left(np.uint32(1), word32.subtract(bits, np.uint32(1))), np.uint32(1))
    fraction = word32.minimum(np.uint32(16), word32.subtract(np.uint32(21), bits))
    method = memory.load_word(segment + _METHOD)
    rounding = memory.load_word(segment + _ROUNDING)
    norm = word32.float_from_bits(norm_bits)
    is_tiny = not rotates and norm < TINY_NORM
    if is_tiny:
        norm = libdevice.fmul_rn(norm, TINY_SCALE)
    factor = np.float32(1.0)
    multiplier = libdevice.fdiv_rn(np.float32(1.0), norm)
    if method == _UNIFORM:
        factor = libdevice.fdiv_rn(np.float32(np.int32(word32.shift_left(steps, fraction))), norm)
        multiplier = np.float32(1.0)
    high_place = np.uint32(place >> np.uint64(32))
    key_first, key_second, common_first, common_second, position, strata = key
    random_bits = np.uint32(0xFFFFFFFF)
    if spread > np.float32(0.0):
        random_bits = np.uint32(0)
        strata = np.uint32(1)
    key_first = word32.add(key_first, word32.multiply(high_place, HIGH_WORD))
    common_first = word32.add(common_first, word32.multiply(high_place, HIGH_WORD))
    inverse = libdevice.fdiv_rn(np.float32(1.0), np.float32(np.int32(strata)))
    low_place = np.uint32(place & np.uint64(0xFFFFFFFF))

    # The tail is one more tile, with fewer lanes.
    half, together, tile_lane = _place_in_tiles(lanes)
    byte_sum = np.uint32(0)
    weighted_sum = np.uint32(0)
    number_of_tile = half
    while number_of_tile <= tiles:
        stride = lanes
        if number_of_tile == tiles:
            stride = tail_lanes
        if tile_lane < stride:
            first = word32.add(word32.multiply(number_of_tile, tile), tile_lane)
            if rotates:
                v = _shared_column(table, scratch, first, stride, count)
            else:
                v = _load_column(values, kind, first, stride, count)
            low = _signs(v[0], v[1], v[2], v[3], bits)
            high = _signs(v[4], v[5], v[6], v[7], bits)
            x = _normalised(_clipped(v, norm_bits), is_tiny, multiplier)
            y = _positions(method, table, rounding, steps, x)
            weyl = word32.multiply(word32.add(low_place, first), WEYL)
            row_weyl = word32.multiply(stride, WEYL)
            common = np.uint32(0), np.uint32(0)
            if strata > np.uint32(1):
                common = (
                    _hash(weyl, common_first, common_second),
                    _hash(word32.add(weyl, row_weyl), common_first, common_second),
                )
            random = word32.bit_and(_hash(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = _stratified(random, common[0], 0, low, high, bits, position, strata, inverse)
            low, high = _add_levels(low, high, 0, y[0], y[4], factor, random, bits, fraction, steps)
            weyl = word32.add(weyl, row_weyl)
            random = word32.bit_and(_hash(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = _stratified(random, common[1], 1, low, high, bits, position, strata, inverse)
            low, high = _add_levels(low, high, 1, y[1], y[5], factor, random, bits, fraction, steps)
            weyl = word32.add(weyl, row_weyl)
            random = word32.bit_and(_hash(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = _stratified(random, common[0], 2, low, high, bits, position, strata, inverse)
            low, high = _add_levels(low, high, 2, y[2], y[6], factor, random, bits, fraction, steps)
            weyl = word32.add(weyl, row_weyl)
            random = word32.bit_and(_hash(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = _stratified(random, common[1], 3, low, high, bits, position, strata, inverse)
            low, high = _add_levels(low, high, 3, y[3], y[7], factor, random, bits, fraction, steps)

            if spread > np.float32(0.0):
                magnitudes = memory.load_word(segment + _MAGNITUDES)
                _store_products(table, scratch, first, stride, count, low, high, bits, steps, magnitudes)

            middle = np.uint64(word32.shift_left(bits, np.uint32(2)))
            packed = np.uint64(high) << middle | np.uint64(low)
            plane = word32.multiply(number_of_tile, bits)
            end_plane = word32.add(plane, bits)
            byte_offset = word32.add(word32.add(offset, word32.multiply(plane, lanes)), tile_lane)
            is_tail = number_of_tile == tiles
            while plane < end_plane:
                byte = np.uint32(packed & np.uint64(0xFF))
                memory.store_byte(message + np.uint64(byte_offset), byte)
                if is_tail:
                    total += _share(byte_offset, byte)
                else:
                    byte_sum = word32.add(byte_sum, byte)
                    weighted_sum = word32.add(weighted_sum, word32.multiply(byte, plane))
                packed = packed >> np.uint64(8)
                byte_offset = word32.add(byte_offset, stride)
                plane = word32.add(plane, np.uint32(1))
        number_of_tile = word32.add(number_of_tile, together)
    if spread > np.float32(0.0):
        cuda.syncwarp()
        ratio = libdevice.fdiv_rn(power, _shared_sum(table, scratch, count, False))
        norm_bits = word32.minimum(word32.float_bits(libdevice.fmul_rn(ratio, down)), LARGEST)
        if lane == np.uint32(0):
            norm_bits = _bfloat16_norm(norm_bits, norm_bytes, np.uint32(0x8000))
            total += _store_norm(message, segment, number, norm_bytes, norm_bits)
    words = word32.shift_right(lanes, np.uint32(2))
    return total + _share_of_planes(word32.add(offset, tile_lane), byte_sum, weighted_sum, words)


@_device
def _scratch_of_warp(plan, table_floats):
    """The first float of the warp's part of the shared memory behind a table."""
    in_block = word32.shift_right(np.uint32(cuda.threadIdx.x), np.uint32(5))
    return word32.add(table_floats, word32.multiply(in_block, memory.load_word(plan + _PLAN_ROTATED)))


@_device
def _encode_message(plan, header, values, message, key, rotation, counter):
    """Encode a whole message; a key of a single stratum that is known to the compiler costs nothing."""
    table = cuda.shared.array(0, types.float32)
    sums = cuda.shared.array(_WARPS, _LONG)
    _copy_table(memory.load_long(plan + _PLAN_ROUNDING), memory.load_word(plan + _PLAN_ROUNDING_FLOATS), table)
    segments = memory.load_long(plan + _PLAN_SEGMENTS)
    segment_count = memory.load_word(plan + _PLAN_SEGMENT_COUNT)
    units = memory.load_word(plan + _PLAN_UNITS)
    may_rotate, rotation_first, rotation_second = rotation
    scratch = _scratch_of_warp(plan, memory.load_word(plan + _PLAN_ROUNDING_FLOATS))
    own_rotation = may_rotate, rotation_first, rotation_second, scratch
    total = np.uint64(0)
    unit = _first_warp()
    while unit < units:
        index = _find_segment(segments, segment_count, unit)
        segment = segments + _SEGMENT_BYTES * np.uint64(index)
        own_values = memory.load_long(values + np.uint64(8) * np.uint64(index))
        kind = memory.load_word(segment + _KIND)
        number = word32.subtract(unit, memory.load_word(segment + _FIRST_UNIT))
        if memory.load_word(segment + _BITS) == _EXACT:
            total += _encode_exact(own_values, kind, segment, message, number)
        else:
            total += _encode_bucket(own_values, kind, segment, message, number, table, key, own_rotation)
        unit = word32.add(unit, _all_warps())

    total = _warp_sum(total)
    if _lane() == np.uint32(0):
        sums[np.uint32(cuda.threadIdx.x) >> np.uint32(5)] = total
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        total = np.uint64(0)
        for warp in range(_WARPS):
            total += sums[warp]
        workspace = memory.load_long(plan + _PLAN_WORKSPACE)
        memory.atomic_add_long(workspace + _TOTAL, total)
        if _is_last_block(workspace):
            total = memory.atomic_add_long(workspace + _TOTAL, np.uint64(0))
            memory.store_long(workspace + _TOTAL, np.uint64(0))
            memory.store_word(workspace + _FINISHED_BLOCKS, np.uint32(0))
            for word in range(_HEADER_WORDS):
                value = memory.load_word(header + np.uint64(4) * np.uint64(word))
                if word == COUNTER_WORD:
                    value = word32.add(value, counter)
                elif word == CHECKSUM_WORD:
                    value = _fold(total)
                memory.store_word(message + np.uint64(4) * np.uint64(word), value)


def encode(plan, header, values, message, step, key_first, key_second, counter):
    """Encode a whole message with independent random numbers.

    Args:
        plan: address of the PLAN record.
        header: address of the header's words, with counter and checksum 0.
        values: address of uint64 addresses of the segments' values.
        message: address of the message, a multiple of 16.
        step: address of a STEP record to use instead of the next three, or 0.
        key_first: uint32, first word of the random key.
        key_second: uint32, the second.
        counter: uint32, of the exchange.
    """
    if step != np.uint64(0):
        key_first = memory.load_word(step + _KEY_FIRST)
        key_second = memory.load_word(step + _KEY_SECOND)
        counter = memory.load_word(step + _COUNTER)
    key = key_first, key_second, np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(1)
    _encode_message(plan, header, values, message, key, (False, np.uint32(0), np.uint32(0)), counter)


def encode_stratified(
    plan, header, values, message, step, key_first, key_second, common_first, common_second, position, strata, counter
):
    """Encode a whole message with random numbers that are stratified among the ranks.

    It takes the arguments of `encode`, and between key_second and counter the other fields of the `DitherKey`, uint32.
    """
    if step != np.uint64(0):
        key_first = memory.load_word(step + _KEY_FIRST)
        key_second = memory.load_word(step + _KEY_SECOND)
        common_first = memory.load_word(step + _COMMON_FIRST)
        common_second = memory.load_word(step + _COMMON_SECOND)
        position = memory.load_word(step + _POSITION)
        strata = memory.load_word(step + _STRATA)
        counter = memory.load_word(step + _COUNTER)
    key = key_first, key_second, common_first, common_second, position, strata
    _encode_message(plan, header, values, message, key, (False, np.uint32(0), np.uint32(0)), counter)


def encode_rotated(
    plan,
    header,
    values,
    message,
    step,
    key_first,
    key_second,
    common_first,
    common_second,
    position,
    strata,
    rotation_first,
    rotation_second,
    counter,
):
    """Encode a whole message, some of whose codebooks rotate; `strata` may be 1.

    It takes the arguments of `encode_stratified`, and before counter the fields of the `RotationKey`, uint32.
    """
    if step != np.uint64(0):
        key_first = memory.load_word(step + _KEY_FIRST)
        key_second = memory.load_word(step + _KEY_SECOND)
        common_first = memory.load_word(step + _COMMON_FIRST)
        common_second = memory.load_word(step + _COMMON_SECOND)
        position = memory.load_word(step + _POSITION)
        strata = memory.load_word(step + _STRATA)
        rotation_first = memory.load_word(step + _ROTATION_FIRST)
        rotation_second = memory.load_word(step + _ROTATION_SECOND)
        counter = memory.load_word(step + _COUNTER)
    key = key_first, key_second, common_first, common_second, position, strata
    _encode_message(plan, header, values, message, key, (True, rotation_first, rotation_second), counter)


# --- decode -----------------------------------------------------------------------------------------------------------


@_device
def _sum_piece(message, piece, payload_bytes):
    """Total of one piece of a payload, over the warp; the payload is a multiple of 16 bytes."""
    place = word32.add(word32.multiply(piece, np.uint32(CHECK_BYTES)), word32.shift_left(_lane(), np.uint32(4)))
    end = word32.minimum(word32.multiply(word32.add(piece, np.uint32(1)), np.uint32(CHECK_BYTES)), payload_bytes)
    word_sum = np.uint64(0)
    weighted_sum = np.uint64(0)
    while place < end:
        a, b, c, d = memory.load_four_words(message + np.uint64(word32.add(_HEADER, place)))
        first = np.uint64(word32.shift_right(place, np.uint32(2)))
        four = np.uint64(a) + np.uint64(b) + np.uint64(c) + np.uint64(d)
        word_sum += four
        ascending = (
            np.uint64(a) + np.uint64(2) * np.uint64(b) + np.uint64(3) * np.uint64(c) + np.uint64(4) * np.uint64(d)
        )
        weighted_sum += first * four + ascending
        place = word32.add(place, np.uint32(512))
    return _warp_sum(word_sum + CHECKSUM * weighted_sum)


@_device
def _fill_with_nan(out, kind, segment, number):
    """NaN in all coordinates of a unit."""
    unit_length = memory.load_word(segment + _UNIT_LENGTH)
    begin = np.uint64(number) * np.uint64(unit_length)
    count = _count_in_unit(memory.load_long(segment + _LENGTH), begin, unit_length)
    out += begin << np.uint64(_item_shift(kind))
    index = _lane()
    while index < count:
        if kind == _FLOAT64:
            memory.store_long(out + np.uint64(8) * np.uint64(index), _DOUBLE_NAN)
        else:
            _store_value(out, kind, index, word32.float_from_bits(NAN))
        index = word32.add(index, np.uint32(32))


@_device
def _decode_exact(out, kind, segment, number, senders, sender_count, scale):
    """Sum one unit of an exact segment over the messages, in float32 (float64 for float64), times the scale."""
    unit_length = memory.load_word(segment + _UNIT_LENGTH)
    begin = np.uint64(number) * np.uint64(unit_length)
    count = _count_in_unit(memory.load_long(segment + _LENGTH), begin, unit_length)
    first_byte = begin << np.uint64(_item_shift(kind))
    out += first_byte
    first_byte += np.uint64(memory.load_word(segment + _BEGIN))
    index = _lane()
    while index < count:
        place = first_byte + (np.uint64(index) << np.uint64(_item_shift(kind)))
        if kind == _FLOAT64:
            wide = np.float64(-0.0)
            sender = np.uint32(0)
            while sender < sender_count:
                message = memory.load_long(senders + _SENDER_BYTES * np.uint64(sender) + _SENDER_MESSAGE)
                wide = libdevice.dadd_rn(wide, memory.load_double(message + place))
                sender = word32.add(sender, np.uint32(1))
            wide = libdevice.dmul_rn(wide, np.float64(scale))
            if wide != wide:
                wide = memory.double_from_bits(_DOUBLE_NAN)
            memory.store_double(out + np.uint64(8) * np.uint64(index), wide)
        else:
            total = np.float32(-0.0)
            sender = np.uint32(0)
            while sender < sender_count:
                message = memory.load_long(senders + _SENDER_BYTES * np.uint64(sender) + _SENDER_MESSAGE)
                total = libdevice.fadd_rn(total, _load_value(message + place, kind))
                sender = word32.add(sender, np.uint32(1))
            _store_value(out, kind, index, libdevice.fmul_rn(total, scale))
        index = word32.add(index, np.uint32(32))


@_device
def _add_row(total, word, row, bits, mask, norm, table, levels):
    """Add norm times the level of a row's code, from the word of four rows."""
    code = word32.bit_and(word32.shift_right(word, word32.multiply(np.uint32(row), bits)), mask)
    return libdevice.fadd_rn(total, libdevice.fmul_rn(norm, memory.element(table, word32.add(levels, code))))


@_device
def _store_if(out, kind, index, count, value):
    if index < count:
        _store_value(out, kind, index, value)


@_device
def _store_sum(out, kind, index, count, total, scale, rotates, table, scratch):
    """Store one sum times the scale; where it is still rotated, as it is in shared memory."""
    if rotates:
        if index < count:
            table[word32.add(scratch, index)] = total
    else:
        _store_if(out, kind, index, count, libdevice.fmul_rn(total, scale))


@_device
def _decode_bucket(out, kind, segment, number, senders, sender_count, scale, table, rotation):
    """Decode one bucket of all messages, sum in their order, times the scale; `rotation` is as for `_encode_bucket`."""
    lane = _lane()
    bits = memory.load_word(segment + _BITS)
    lanes = memory.load_word(segment + _LANES)
    bucket_size = memory.load_word(segment + _UNIT_LENGTH)
    norm_bytes = memory.load_word(segment + _NORM_BYTES)
    levels = memory.load_word(segment + _LEVELS)
    begin = np.uint64(number) * np.uint64(bucket_size)
    count = _count_in_unit(memory.load_long(segment + _LENGTH), begin, bucket_size)
    norm_offset = word32.add(memory.load_word(segment + _BEGIN), word32.multiply(number, norm_bytes))

    largest = np.uint32(0)
    sender = lane
    while sender < sender_count:
        message = memory.load_long(senders + _SENDER_BYTES * np.uint64(sender) + _SENDER_MESSAGE)
        largest = word32.maximum(largest, _load_norm(message + np.uint64(norm_offset), norm_bytes))
        sender = word32.add(sender, np.uint32(32))
    if _warp_maximum(largest) >= INFINITY:
        _fill_with_nan(out, kind, segment, number)
        return

    may_rotate, rotation_first, rotation_second, scratch = rotation
    rotates = may_rotate and memory.load_word(segment + _ROTATES) != np.uint32(0)
    bucket_bytes = word32.multiply(word32.shift_right(bucket_size, np.uint32(3)), bits)
    offset = word32.add(memory.load_word(segment + _CODES_BEGIN), word32.multiply(number, bucket_bytes))
    out += begin << np.uint64(_item_shift(kind))
    mask = word32.subtract(word32.shift_left(np.uint32(1), bits), np.uint32(1))
    middle = np.uint64(word32.shift_left(bits, np.uint32(2)))
    tile = word32.shift_left(lanes, np.uint32(3))
    half, together, tile_lane = _place_in_tiles(lanes)
    tile_begin = word32.multiply(half, tile)
    number_of_tile = half
    while tile_begin < count:
        rest = word32.subtract(count, tile_begin)
        stride = lanes
        if rest < tile:
            stride = word32.shift_right(word32.add(rest, np.uint32(7)), np.uint32(3))
        if tile_lane < stride:
            first_byte = word32.add(
                word32.add(offset, word32.multiply(word32.multiply(number_of_tile, bits), lanes)), tile_lane
            )
            minus = np.float32(-0.0)  # the sum of -0 and x is x, whatever the sign of a zero x
            t0, t1, t2, t3, t4, t5, t6, t7 = minus, minus, minus, minus, minus, minus, minus, minus
            sender = np.uint32(0)
            while sender < sender_count:
                message = memory.load_long(senders + _SENDER_BYTES * np.uint64(sender) + _SENDER_MESSAGE)
                norm = word32.float_from_bits(_load_norm(message + np.uint64(norm_offset), norm_bytes))
                packed = np.uint64(0)
                byte_offset = first_byte
                shift = np.uint32(0)
                end_shift = word32.shift_left(bits, np.uint32(3))
                while shift < end_shift:
                    byte = np.uint64(memory.load_byte(message + np.uint64(byte_offset)))
                    packed |= byte << np.uint64(shift)
                    byte_offset = word32.add(byte_offset, stride)
                    shift = word32.add(shift, np.uint32(8))
                low = np.uint32(packed & np.uint64(0xFFFFFFFF))
                high = np.uint32((packed >> middle) & np.uint64(0xFFFFFFFF))
                t0 = _add_row(t0, low, 0, bits, mask, norm, table, levels)
                t1 = _add_row(t1, low, 1, bits, mask, norm, table, levels)
                t2 = _add_row(t2, low, 2, bits, mask, norm, table, levels)
                t3 = _add_row(t3, low, 3, bits, mask, norm, table, levels)
                t4 = _add_row(t4, high, 0, bits, mask, norm, table, levels)
                t5 = _add_row(t5, high, 1, bits, mask, norm, table, levels)
                t6 = _add_row(t6, high, 2, bits, mask, norm, table, levels)
                t7 = _add_row(t7, high, 3, bits, mask, norm, table, levels)
                sender = word32.add(sender, np.uint32(1))
            index = word32.add(tile_begin, tile_lane)
            _store_sum(out, kind, index, count, t0, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t1, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t2, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t3, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t4, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t5, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t6, scale, rotates, table, scratch)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t7, scale, rotates, table, scratch)
        tile_begin = word32.add(tile_begin, word32.multiply(together, tile))
        number_of_tile = word32.add(number_of_tile, together)
    if rotates:
        place = memory.load_long(segment + _COORDINATE) + begin
        cuda.syncwarp()
        _rotate_back(table, scratch, count, _sign_word(place, rotation_first, rotation_second))
        index = lane
        while index < count:
            value = memory.element(table, word32.add(scratch, index))
            _store_value(out, kind, index, libdevice.fmul_rn(value, scale))
            index = word32.add(index, np.uint32(32))
        cuda.syncwarp()


@_device
def _word_of_header(address, word):
    return memory.load_word(address + np.uint64(4) * np.uint64(word))


@_device
def _check_messages(plan, senders, sender_count, counter):
    """Whether every message is the expected one; notes the first that is not. For one thread, after all sums."""
    totals = memory.load_long(plan + _PLAN_TOTALS)
    status = memory.load_long(plan + _PLAN_STATUS)
    is_good = True
    for sender in range(sender_count):
        total = memory.atomic_add_long(totals + np.uint64(8) * np.uint64(sender), np.uint64(0))
        memory.store_long(totals + np.uint64(8) * np.uint64(sender), np.uint64(0))
        record = senders + _SENDER_BYTES * np.uint64(sender)
        message = memory.load_long(record + _SENDER_MESSAGE)
        is_equal = True
        for word in range(_HEADER_WORDS):
            expected = _word_of_header(record + _SENDER_HEADER, word)
            if word == COUNTER_WORD:
                expected = word32.add(expected, counter)
            elif word == CHECKSUM_WORD:
                expected = _fold(total)
            if _word_of_header(message, word) != expected:
                is_equal = False
        if not is_equal and is_good and memory.load_word(status + _REFUSED) == np.uint32(0):
            memory.store_word(status + _REFUSED_SENDER, np.uint32(sender))
            for word in range(_HEADER_WORDS):
                expected = _word_of_header(record + _SENDER_HEADER, word)
                if word == COUNTER_WORD:
                    expected = word32.add(expected, counter)
                elif word == CHECKSUM_WORD:
                    expected = _fold(total)
                memory.store_word(status + _EXPECTED + np.uint64(4) * np.uint64(word), expected)
                received = _word_of_header(message, word)
                memory.store_word(status + _RECEIVED + np.uint64(4) * np.uint64(word), received)
            cuda.threadfence_system()
            memory.store_word(status + _REFUSED, np.uint32(1))
        is_good = is_good and is_equal
    return is_good


@_device
def _decode_messages(plan, senders, sender_count, outputs, rotation, counter, scale, pieces):
    """Decode several messages; see `decode_mean`."""
    table = cuda.shared.array(0, types.float32)
    verdict = cuda.shared.array(1, types.uint32)
    _copy_table(memory.load_long(plan + _PLAN_LEVELS), memory.load_word(plan + _PLAN_LEVEL_FLOATS), table)
    may_rotate, rotation_first, rotation_second = rotation
    scratch = _scratch_of_warp(plan, memory.load_word(plan + _PLAN_LEVEL_FLOATS))
    own_rotation = may_rotate, rotation_first, rotation_second, scratch
    segments = memory.load_long(plan + _PLAN_SEGMENTS)
    segment_count = memory.load_word(plan + _PLAN_SEGMENT_COUNT)
    payload_bytes = memory.load_word(plan + _PLAN_PAYLOAD_BYTES)
    totals = memory.load_long(plan + _PLAN_TOTALS)
    units = memory.load_word(plan + _PLAN_UNITS)

    # Sums are done between the units, in proportion, so that both find the bytes in the cache.
    checks = word32.multiply(pieces, sender_count)
    check = _first_warp()
    unit = check
    while unit < units or check < checks:
        if check < checks and np.uint64(check) * np.uint64(units) <= np.uint64(unit) * np.uint64(checks):
            piece = check // sender_count
            sender = word32.subtract(check, word32.multiply(np.uint32(piece), sender_count))
            message = memory.load_long(senders + _SENDER_BYTES * np.uint64(sender) + _SENDER_MESSAGE)
            total = _sum_piece(message, np.uint32(piece), payload_bytes)
            if _lane() == np.uint32(0):
                memory.atomic_add_long(totals + np.uint64(8) * np.uint64(sender), total)
            check = word32.add(check, _all_warps())
        else:
            index = _find_segment(segments, segment_count, unit)
            segment = segments + _SEGMENT_BYTES * np.uint64(index)
            out = memory.load_long(outputs + np.uint64(8) * np.uint64(index))
            kind = memory.load_word(segment + _KIND)
            number = word32.subtract(unit, memory.load_word(segment + _FIRST_UNIT))
            if memory.load_word(segment + _BITS) == _EXACT:
                _decode_exact(out, kind, segment, number, senders, sender_count, scale)
            else:
                _decode_bucket(out, kind, segment, number, senders, sender_count, scale, table, own_rotation)
            unit = word32.add(unit, _all_warps())

    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        verdict[0] = np.uint32(0)
        workspace = memory.load_long(plan + _PLAN_WORKSPACE)
        if _is_last_block(workspace):
            memory.store_word(workspace + _FINISHED_BLOCKS, np.uint32(0))
            if not _check_messages(plan, senders, sender_count, counter):
                verdict[0] = np.uint32(1)
    cuda.syncthreads()
    if verdict[0] != np.uint32(0):
        unit = word32.shift_right(np.uint32(cuda.threadIdx.x), np.uint32(5))
        while unit < units:
            index = _find_segment(segments, segment_count, unit)
            segment = segments + _SEGMENT_BYTES * np.uint64(index)
            out = memory.load_long(outputs + np.uint64(8) * np.uint64(index))
            number = word32.subtract(unit, memory.load_word(segment + _FIRST_UNIT))
            _fill_with_nan(out, memory.load_word(segment + _KIND), segment, number)
            unit = word32.add(unit, np.uint32(_WARPS))


def decode_mean(plan, senders, sender_count, outputs, step, counter, scale, pieces):
    """Decode several messages, sum them in the order given, in float32, times a scale; check every header.

    Args:
        plan: address of the PLAN record.
        senders: address of the SENDER records.
        sender_count: uint32, at least 1.
        outputs: address of uint64 addresses of the segments' results.
        step: address of a STEP record whose counter to use instead of the next, or 0.
        counter: uint32, of the exchange.
        scale: float32.
        pieces: uint32, pieces of CHECK_BYTES in a payload.
    """
    if step != np.uint64(0):
        counter = memory.load_word(step + _COUNTER)
    rotation = False, np.uint32(0), np.uint32(0)
    _decode_messages(plan, senders, sender_count, outputs, rotation, counter, scale, pieces)


def decode_mean_rotated(
    plan, senders, sender_count, outputs, step, rotation_first, rotation_second, counter, scale, pieces
):
    """Decode several messages, some of whose codebooks rotate.

    It takes the arguments of `decode_mean`, and before counter the fields of the `RotationKey`, uint32.
    """
    if step != np.uint64(0):
        rotation_first = memory.load_word(step + _ROTATION_FIRST)
        rotation_second = memory.load_word(step + _ROTATION_SECOND)
        counter = memory.load_word(step + _COUNTER)
    rotation = True, rotation_first, rotation_second
    _decode_messages(plan, senders, sender_count, outputs, rotation, counter, scale, pieces)


# --- statistics -------------------------------------------------------------------------------------------------------


@_device
def _cell_and_fraction(bits):
    """Cell of a normalised magnitude, given as float32 bits, and its place in it, times 2^FRACTION_BITS."""
    if bits >= _MIDDLE:
        cell = word32.add(word32.shift_right(word32.subtract(bits, _MIDDLE), np.uint32(17)), _FIRST_FINE_CELL)
        fine = word32.bit_and(bits, np.uint32((1 << 17) - 1))
        return cell, word32.shift_left(fine, np.uint32(FRACTION_BITS - 17))
    if bits >= _LOWEST:
        cell = word32.add(word32.shift_right(word32.subtract(bits, _LOWEST), np.uint32(19)), _FIRST_CELL)
        return cell, word32.bit_and(bits, np.uint32((1 << 19) - 1))
    if bits == np.uint32(0):
        return np.uint32(0), np.uint32(0)
    return np.uint32(1), np.uint32(libdevice.fmul_rn(word32.float_from_bits(bits), _FROM_LOWEST_CELL))


@_device
def _weight(norm, record):
    """Squared norm in the units of its type's sums."""
    exponent = word32.shift_right(memory.load_word(record + _GATHERED_LARGEST), np.uint32(23))
    field = word32.subtract(
        word32.add(memory.load_word(record + _WEIGHT_BITS), np.uint32(1023 + 2 * 126)), word32.add(exponent, exponent)
    )
    unit = memory.double_from_bits(np.uint64(field) << np.uint64(52))
    wide = np.float64(norm)
    return np.uint64(libdevice.dadd_rn(libdevice.dmul_rn(libdevice.dmul_rn(wide, wide), unit), np.float64(0.5)))


@_device
def _gather_bucket(values, kind, count, norm, record):
    """Add every coordinate of a bucket to its cell."""
    weight = _weight(norm, record)
    index = _lane()
    while index < count:
        value = _load_value(values + (np.uint64(index) << np.uint64(_item_shift(kind))), kind)
        ratio = libdevice.fdiv_rn(word32.float_from_bits(_magnitude_bits(value)), norm)
        cell, fraction = _cell_and_fraction(word32.minimum(word32.float_bits(ratio), _ONE))
        sums = record + _SUMS + np.uint64(24) * np.uint64(cell)
        first = (weight * np.uint64(fraction)) >> _FRACTION
        memory.atomic_add_long(sums, weight)
        memory.atomic_add_long(sums + np.uint64(8), first)
        memory.atomic_add_long(sums + np.uint64(16), (first * np.uint64(fraction)) >> _FRACTION)
        index = word32.add(index, np.uint32(32))


def gather_statistics(plan, values, gathered, is_first):
    """Gather the level statistics of each codebook (`device_statistics.py`), in two launches.

    Args:
        plan: address of the PLAN record.
        values: address of uint64 addresses of the segments' values.
        gathered: address of the GATHERED records of the codebooks.
        is_first: uint32, 1 to find the largest norms, 0 to add up.
    """
    segments = memory.load_long(plan + _PLAN_SEGMENTS)
    segment_count = memory.load_word(plan + _PLAN_SEGMENT_COUNT)
    units = memory.load_word(plan + _PLAN_UNITS)
    unit = _first_warp()
    while unit < units:
        index = _find_segment(segments, segment_count, unit)
        segment = segments + _SEGMENT_BYTES * np.uint64(index)
        if memory.load_word(segment + _BITS) != _EXACT:
            kind = memory.load_word(segment + _KIND)
            bucket_size = memory.load_word(segment + _UNIT_LENGTH)
            number = word32.subtract(unit, memory.load_word(segment + _FIRST_UNIT))
            begin = np.uint64(number) * np.uint64(bucket_size)
            count = _count_in_unit(memory.load_long(segment + _LENGTH), begin, bucket_size)
            bucket = memory.load_long(values + np.uint64(8) * np.uint64(index))
            bucket += begin << np.uint64(_item_shift(kind))
            record = gathered + _GATHERED_BYTES * np.uint64(memory.load_word(segment + _CODEBOOK))
            norm_bits = _norm(bucket, kind, count, memory.load_word(segment + _IS_L2))
            is_finite = norm_bits < INFINITY
            if is_first != np.uint32(0):
                if is_finite and _lane() == np.uint32(0):
                    memory.atomic_max_word(record + _GATHERED_LARGEST, norm_bits)
            else:
                if _lane() == np.uint32(0):
                    memory.atomic_add_long(record + (_FINITE if is_finite else _SKIPPED), np.uint64(1))
                if is_finite and norm_bits > np.uint32(0):
                    _gather_bucket(bucket, kind, count, word32.float_from_bits(norm_bits), record)
        unit = word32.add(unit, _all_warps())


_ADDRESS, _WORD = types.uint64, types.uint32
SIGNATURES = {
    "encode": (encode, types.void(*[_ADDRESS] * 5, *[_WORD] * 3)),
    "encode_stratified": (encode_stratified, types.void(*[_ADDRESS] * 5, *[_WORD] * 7)),
    "encode_rotated": (encode_rotated, types.void(*[_ADDRESS] * 5, *[_WORD] * 9)),
    "decode_mean": (
        decode_mean,
        types.void(_ADDRESS, _ADDRESS, _WORD, _ADDRESS, _ADDRESS, _WORD, types.float32, _WORD),
    ),
    "decode_mean_rotated": (
        decode_mean_rotated,
        types.void(_ADDRESS, _ADDRESS, _WORD, _ADDRESS, _ADDRESS, *[_WORD] * 3, types.float32, _WORD),
    ),
    "gather_statistics": (gather_statistics, types.void(_ADDRESS, _ADDRESS, _ADDRESS, _WORD)),
}
# Threads of a block, and blocks that a multiprocessor must have registers for; without it ptxas spends more on these.
LAUNCH_BOUNDS = {"encode_stratified": (THREADS, 3), "encode_rotated": (THREADS, 2)}
