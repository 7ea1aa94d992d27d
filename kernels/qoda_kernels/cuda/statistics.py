"""The kernel that gathers level statistics (`device_statistics.py`)."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.compilation import device, kernel
from qoda_kernels.cuda.norms import bucket_norm
from qoda_kernels.cuda.threads import own_lane, own_warp, warp_count
from qoda_kernels.cuda.units import count_in_unit, find_segment
from qoda_kernels.cuda.values import item_shift, load_value, magnitude_bits
from qoda_kernels.kernel_constants import INFINITY

_ONE = np.uint32(127 << 23)  # 1, 2^-24 and 2^-8 as float32 bits: the joints of the grid
_LOWEST, _MIDDLE = np.uint32(103 << 23), np.uint32(119 << 23)
_FIRST_CELL, _FIRST_FINE_CELL = np.uint32(2), np.uint32(2 + 16 * 16)
_FRACTION = np.uint64(records.FRACTION_BITS)
_FROM_LOWEST_CELL = np.float32(2.0 ** (24 + records.FRACTION_BITS))


@device
def _cell_and_fraction(bits):
    """Cell of a normalised magnitude, given as float32 bits, and its place in it, times 2^FRACTION_BITS."""
    if bits >= _MIDDLE:
        cell = word32.add(word32.shift_right(word32.subtract(bits, _MIDDLE), np.uint32(17)), _FIRST_FINE_CELL)
        fine = word32.bit_and(bits, np.uint32((1 << 17) - 1))
        return cell, word32.shift_left(fine, np.uint32(records.FRACTION_BITS - 17))
    if bits >= _LOWEST:
        cell = word32.add(word32.shift_right(word32.subtract(bits, _LOWEST), np.uint32(19)), _FIRST_CELL)
        return cell, word32.bit_and(bits, np.uint32((1 << 19) - 1))
    if bits == np.uint32(0):
        return np.uint32(0), np.uint32(0)
    return np.uint32(1), np.uint32(libdevice.fmul_rn(word32.float_from_bits(bits), _FROM_LOWEST_CELL))


@device
def _weight(norm, record):
    """Squared norm in the units of its type's sums."""
    exponent = word32.shift_right(memory.load_word(record + records.GATHERED_LARGEST), np.uint32(23))
    field = word32.subtract(
        word32.add(memory.load_word(record + records.WEIGHT_BITS), np.uint32(1023 + 2 * 126)),
        word32.add(exponent, exponent),
    )
    unit = memory.double_from_bits(np.uint64(field) << np.uint64(52))
    wide = np.float64(norm)
    return np.uint64(libdevice.dadd_rn(libdevice.dmul_rn(libdevice.dmul_rn(wide, wide), unit), np.float64(0.5)))


@device
def _gather_bucket(values, kind, count, norm, record):
    """Add every coordinate of a bucket to its cell."""
    weight = _weight(norm, record)
    index = own_lane()
    while index < count:
        value = load_value(values + (np.uint64(index) << np.uint64(item_shift(kind))), kind)
        ratio = libdevice.fdiv_rn(word32.float_from_bits(magnitude_bits(value)), norm)
        cell, fraction = _cell_and_fraction(word32.minimum(word32.float_bits(ratio), _ONE))
        sums = record + records.SUMS + np.uint64(24) * np.uint64(cell)
        first = (weight * np.uint64(fraction)) >> _FRACTION
        memory.atomic_add_long(sums, weight)
        memory.atomic_add_long(sums + np.uint64(8), first)
        memory.atomic_add_long(sums + np.uint64(16), (first * np.uint64(fraction)) >> _FRACTION)
        index = word32.add(index, np.uint32(32))


@kernel
def gather_statistics(plan, values, gathered, is_first):
    """Gather the level statistics of each codebook (`device_statistics.py`), in two launches.

    Args:
        plan: address of the PLAN record.
        values: address of uint64 addresses of the segments' values.
        gathered: address of the GATHERED records of the codebooks.
        is_first: uint32, 1 to find the largest norms, 0 to add up.
    """
    segments = memory.load_long(plan + records.PLAN_SEGMENTS)
    segment_count = memory.load_word(plan + records.PLAN_SEGMENT_COUNT)
    units = memory.load_word(plan + records.PLAN_UNITS)
    unit = own_warp()
    while unit < units:
        index = find_segment(segments, segment_count, unit)
        segment = segments + records.SEGMENT_BYTES * np.uint64(index)
        if memory.load_word(segment + records.BITS) != records.EXACT:
            kind = memory.load_word(segment + records.KIND)
            bucket_size = memory.load_word(segment + records.UNIT_LENGTH)
            number = word32.subtract(unit, memory.load_word(segment + records.FIRST_UNIT))
            begin = np.uint64(number) * np.uint64(bucket_size)
            count = count_in_unit(memory.load_long(segment + records.LENGTH), begin, bucket_size)
            bucket = memory.load_long(values + np.uint64(8) * np.uint64(index))
            bucket += begin << np.uint64(item_shift(kind))
            record = gathered + records.GATHERED_BYTES * np.uint64(memory.load_word(segment + records.CODEBOOK))
            norm_bits, _ = bucket_norm(bucket, kind, count, memory.load_word(segment + records.IS_L2), False)
            is_finite = norm_bits < INFINITY
            if is_first != np.uint32(0):
                if is_finite and own_lane() == np.uint32(0):
                    memory.atomic_max_word(record + records.GATHERED_LARGEST, norm_bits)
            else:
                if own_lane() == np.uint32(0):
                    memory.atomic_add_long(record + (records.FINITE if is_finite else records.SKIPPED), np.uint64(1))
                if is_finite and norm_bits > np.uint32(0):
                    _gather_bucket(bucket, kind, count, word32.float_from_bits(norm_bits), record)
        unit = word32.add(unit, warp_count())
