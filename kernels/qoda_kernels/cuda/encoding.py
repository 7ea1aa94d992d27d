"""The kernels that encode a whole message, and how one bucket is quantized and packed.

Rotation and stratified random numbers have kernels of their own, so that others need no more registers.
"""

import numpy as np
from numba import cuda, types
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.checksums import checksum_share, fold_checksum, share_of_planes
from qoda_kernels.cuda.compilation import device, kernel
from qoda_kernels.cuda.dither import hash_coordinate, stratified
from qoda_kernels.cuda.exact import encode_exact
from qoda_kernels.cuda.norms import bfloat16_norm, bucket_norm, bucket_scale, lowered_norm, powers_of_scale, store_norm
from qoda_kernels.cuda.rotation import place_rotated, sign_word
from qoda_kernels.cuda.rounding import add_levels, clipped, multiplied, positions, sign_bits
from qoda_kernels.cuda.shared_buckets import shared_column, shared_l2_norm, shared_maximum, shared_sum, store_products
from qoda_kernels.cuda.threads import WARPS, is_last_block, own_lane, own_warp, warp_count, warp_sum
from qoda_kernels.cuda.units import copy_table, count_in_unit, find_segment, place_in_tiles, scratch_of_warp
from qoda_kernels.cuda.values import item_shift, load_column
from qoda_kernels.kernel_constants import (
    HIGH_HALF,
    HIGH_WORD,
    INFINITY,
    LARGEST,
    LOW_HALF,
    NAN,
    SCALED,
    WEYL,
)


@device
def _store_padding(message, segment):
    """Zero the bytes behind a segment's codes."""
    place = word32.add(memory.load_word(segment + records.CODES_END), own_lane())
    if place < memory.load_word(segment + records.END):
        memory.store_byte(message + np.uint64(place), np.uint32(0))


@device
def _store_zeros(message, offset, count):
    place = own_lane()
    while place < count:
        memory.store_byte(message + np.uint64(word32.add(offset, place)), np.uint32(0))
        place = word32.add(place, np.uint32(32))


@device
def _encode_bucket(values, kind, segment, message, number, table, key, rotation):
    """Quantize and pack one bucket; returns the lane's share of the checksum.

    `rotation` holds whether there are codebooks that rotate, as the compiler knows, the words of their key, and the
    first float of the warp's part of the shared memory.
    """
    lane = own_lane()
    bits = memory.load_word(segment + records.BITS)
    lanes = memory.load_word(segment + records.LANES)
    bucket_size = memory.load_word(segment + records.UNIT_LENGTH)
    norm_bytes = memory.load_word(segment + records.NORM_BYTES)
    length = memory.load_long(segment + records.LENGTH)
    begin = np.uint64(number) * np.uint64(bucket_size)
    count = count_in_unit(length, begin, bucket_size)
    place = memory.load_long(segment + records.COORDINATE) + begin
    values += begin << np.uint64(item_shift(kind))
    bucket_bytes = word32.multiply(word32.shift_right(bucket_size, np.uint32(3)), bits)
    offset = word32.add(memory.load_word(segment + records.CODES_BEGIN), word32.multiply(number, bucket_bytes))
    total = np.uint64(0)

    may_rotate, rotation_first, rotation_second, scratch = rotation
    rotates = may_rotate and memory.load_word(segment + records.ROTATES) != np.uint32(0)
    is_l2 = memory.load_word(segment + records.IS_L2)
    clip = memory.load_word(segment + records.CLIP)
    may_scale = clip == np.uint32(0) and not rotates
    norm_bits, scale = bucket_norm(values, kind, count, np.uint32(0) if rotates else is_l2, may_scale)
    if clip != np.uint32(0) and norm_bits != np.uint32(0) and norm_bits < INFINITY:
        norm_bits = clip
    spread = np.float32(0.0)  # above 0: to nearest
    power = np.float32(0.0)
    back = np.float32(0.0)
    used_bits = np.uint32(0)  # of the norm by which rotated coordinates are divided
    if rotates and norm_bits != np.uint32(0) and norm_bits < INFINITY:
        up, down = powers_of_scale(norm_bits)
        scale = bucket_scale(norm_bits)
        back = libdevice.fmul_rn(down, scale)
        place_rotated(values, kind, count, up, sign_word(place, rotation_first, rotation_second), table, scratch)
        spread = memory.load_float(segment + records.SPREAD)
        if spread > np.float32(0.0):
            power = shared_sum(table, scratch, count, True)
            root = libdevice.fsqrt_rn(libdevice.fdiv_rn(power, np.float32(np.int32(count))))
            used_bits = word32.float_bits(libdevice.fmul_rn(root, spread))
        else:
            norm_bits = shared_maximum(table, scratch, count)
            if is_l2 != np.uint32(0):
                norm_bits = shared_l2_norm(table, scratch, count, norm_bits)
            norm_bits = word32.float_bits(libdevice.fmul_rn(word32.float_from_bits(norm_bits), back))
    if norm_bytes == np.uint32(2):
        rounded_up = word32.bit_and(word32.add(norm_bits, LOW_HALF), HIGH_HALF)
        norm_bits = NAN if norm_bits >= INFINITY else rounded_up
    if rotates and spread == np.float32(0.0) and norm_bits != np.uint32(0) and norm_bits < INFINITY:
        forth = libdevice.fmul_rn(up, libdevice.fdiv_rn(np.float32(1.0), scale))
        used_bits = word32.float_bits(libdevice.fmul_rn(word32.float_from_bits(norm_bits), forth))
    is_scaled = scale != np.float32(1.0)
    sign = SCALED if is_scaled else np.uint32(0)
    if lane == np.uint32(0) and spread == np.float32(0.0):
        total += store_norm(message, segment, number, norm_bytes, word32.bit_or(norm_bits, sign))
    if rotates:
        norm_bits = used_bits
    elif norm_bits < INFINITY:
        norm_bits = lowered_norm(norm_bits, kind, scale)
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
    method = memory.load_word(segment + records.METHOD)
    rounding = memory.load_word(segment + records.ROUNDING)
    norm = word32.float_from_bits(norm_bits)
    if rotates:
        scale = np.float32(1.0)
    elif is_scaled:  # the norm is that of the scaled bucket, and no coordinate is larger
        norm_bits = INFINITY
    factor = np.float32(1.0)
    multiplier = libdevice.fdiv_rn(np.float32(1.0), norm)
    if method == records.UNIFORM:
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
    half, together, tile_lane = place_in_tiles(lanes)
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
                v = shared_column(table, scratch, first, stride, count)
            else:
                v = load_column(values, kind, first, stride, count)
            low = sign_bits(v[0], v[1], v[2], v[3], bits)
            high = sign_bits(v[4], v[5], v[6], v[7], bits)
            x = multiplied(multiplied(clipped(v, norm_bits), scale), multiplier)
            y = positions(method, table, rounding, steps, x)
            weyl = word32.multiply(word32.add(low_place, first), WEYL)
            row_weyl = word32.multiply(stride, WEYL)
            common = np.uint32(0), np.uint32(0)
            if strata > np.uint32(1):
                common = (
                    hash_coordinate(weyl, common_first, common_second),
                    hash_coordinate(word32.add(weyl, row_weyl), common_first, common_second),
                )
            random = word32.bit_and(hash_coordinate(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = stratified(random, common[0], 0, low, high, bits, position, strata, inverse)
            low, high = add_levels(low, high, 0, y[0], y[4], factor, random, bits, fraction, steps)
            weyl = word32.add(weyl, row_weyl)
            random = word32.bit_and(hash_coordinate(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = stratified(random, common[1], 1, low, high, bits, position, strata, inverse)
            low, high = add_levels(low, high, 1, y[1], y[5], factor, random, bits, fraction, steps)
            weyl = word32.add(weyl, row_weyl)
            random = word32.bit_and(hash_coordinate(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = stratified(random, common[0], 2, low, high, bits, position, strata, inverse)
            low, high = add_levels(low, high, 2, y[2], y[6], factor, random, bits, fraction, steps)
            weyl = word32.add(weyl, row_weyl)
            random = word32.bit_and(hash_coordinate(weyl, key_first, key_second), random_bits)
            if strata > np.uint32(1):
                random = stratified(random, common[1], 3, low, high, bits, position, strata, inverse)
            low, high = add_levels(low, high, 3, y[3], y[7], factor, random, bits, fraction, steps)

            if spread > np.float32(0.0):
                magnitudes = memory.load_word(segment + records.MAGNITUDES)
                store_products(table, scratch, first, stride, count, low, high, bits, steps, magnitudes)

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
                    total += checksum_share(byte_offset, byte)
                else:
                    byte_sum = word32.add(byte_sum, byte)
                    weighted_sum = word32.add(weighted_sum, word32.multiply(byte, plane))
                packed = packed >> np.uint64(8)
                byte_offset = word32.add(byte_offset, stride)
                plane = word32.add(plane, np.uint32(1))
        number_of_tile = word32.add(number_of_tile, together)
    if spread > np.float32(0.0):
        cuda.syncwarp()
        ratio = libdevice.fdiv_rn(power, shared_sum(table, scratch, count, False))
        norm_bits = word32.minimum(word32.float_bits(libdevice.fmul_rn(ratio, back)), LARGEST)
        if lane == np.uint32(0):
            norm_bits = bfloat16_norm(norm_bits, norm_bytes, np.uint32(0x8000))
            total += store_norm(message, segment, number, norm_bytes, word32.bit_or(norm_bits, sign))
    words = word32.shift_right(lanes, np.uint32(2))
    return total + share_of_planes(word32.add(offset, tile_lane), byte_sum, weighted_sum, words)


@device
def _encode_message(plan, header, values, message, key, rotation, counter):
    """Encode a whole message; a key of a single stratum that is known to the compiler costs nothing."""
    table = cuda.shared.array(0, types.float32)
    sums = cuda.shared.array(WARPS, types.uint64)
    copy_table(
        memory.load_long(plan + records.PLAN_ROUNDING), memory.load_word(plan + records.PLAN_ROUNDING_FLOATS), table
    )
    segments = memory.load_long(plan + records.PLAN_SEGMENTS)
    segment_count = memory.load_word(plan + records.PLAN_SEGMENT_COUNT)
    units = memory.load_word(plan + records.PLAN_UNITS)
    may_rotate, rotation_first, rotation_second = rotation
    scratch = scratch_of_warp(plan, memory.load_word(plan + records.PLAN_ROUNDING_FLOATS))
    own_rotation = may_rotate, rotation_first, rotation_second, scratch
    total = np.uint64(0)
    unit = own_warp()
    while unit < units:
        index = find_segment(segments, segment_count, unit)
        segment = segments + records.SEGMENT_BYTES * np.uint64(index)
        own_values = memory.load_long(values + np.uint64(8) * np.uint64(index))
        kind = memory.load_word(segment + records.KIND)
        number = word32.subtract(unit, memory.load_word(segment + records.FIRST_UNIT))
        if memory.load_word(segment + records.BITS) == records.EXACT:
            total += encode_exact(own_values, kind, segment, message, number)
        else:
            total += _encode_bucket(own_values, kind, segment, message, number, table, key, own_rotation)
        unit = word32.add(unit, warp_count())

    total = warp_sum(total)
    if own_lane() == np.uint32(0):
        sums[np.uint32(cuda.threadIdx.x) >> np.uint32(5)] = total
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        total = np.uint64(0)
        for warp in range(WARPS):
            total += sums[warp]
        workspace = memory.load_long(plan + records.PLAN_WORKSPACE)
        memory.atomic_add_long(workspace + records.TOTAL, total)
        if is_last_block(workspace):
            total = memory.atomic_add_long(workspace + records.TOTAL, np.uint64(0))
            memory.store_long(workspace + records.TOTAL, np.uint64(0))
            memory.store_word(workspace + records.FINISHED_BLOCKS, np.uint32(0))
            for word in range(records.HEADER_WORDS):
                value = memory.load_word(header + np.uint64(4) * np.uint64(word))
                if word == records.COUNTER_WORD:
                    value = word32.add(value, counter)
                elif word == records.CHECKSUM_WORD:
                    value = fold_checksum(total)
                memory.store_word(message + np.uint64(4) * np.uint64(word), value)


@kernel
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
        key_first = memory.load_word(step + records.KEY_FIRST)
        key_second = memory.load_word(step + records.KEY_SECOND)
        counter = memory.load_word(step + records.COUNTER)
    key = key_first, key_second, np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(1)
    _encode_message(plan, header, values, message, key, (False, np.uint32(0), np.uint32(0)), counter)


@kernel
def encode_stratified(
    plan, header, values, message, step, key_first, key_second, common_first, common_second, position, strata, counter
):
    """Encode a whole message with random numbers that are stratified among the ranks.

    It takes the arguments of `encode`, and between key_second and counter the other fields of the `DitherKey`, uint32.
    """
    if step != np.uint64(0):
        key_first = memory.load_word(step + records.KEY_FIRST)
        key_second = memory.load_word(step + records.KEY_SECOND)
        common_first = memory.load_word(step + records.COMMON_FIRST)
        common_second = memory.load_word(step + records.COMMON_SECOND)
        position = memory.load_word(step + records.POSITION)
        strata = memory.load_word(step + records.STRATA)
        counter = memory.load_word(step + records.COUNTER)
    key = key_first, key_second, common_first, common_second, position, strata
    _encode_message(plan, header, values, message, key, (False, np.uint32(0), np.uint32(0)), counter)


@kernel
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
        key_first = memory.load_word(step + records.KEY_FIRST)
        key_second = memory.load_word(step + records.KEY_SECOND)
        common_first = memory.load_word(step + records.COMMON_FIRST)
        common_second = memory.load_word(step + records.COMMON_SECOND)
        position = memory.load_word(step + records.POSITION)
        strata = memory.load_word(step + records.STRATA)
        rotation_first = memory.load_word(step + records.ROTATION_FIRST)
        rotation_second = memory.load_word(step + records.ROTATION_SECOND)
        counter = memory.load_word(step + records.COUNTER)
    key = key_first, key_second, common_first, common_second, position, strata
    _encode_message(plan, header, values, message, key, (True, rotation_first, rotation_second), counter)
