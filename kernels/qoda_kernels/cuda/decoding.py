"""The kernels that decode several messages to their scaled sum, and check that each is the expected one."""

import numpy as np
from numba import cuda, types
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.checksums import fold_checksum, sum_piece
from qoda_kernels.cuda.compilation import device, kernel
from qoda_kernels.cuda.exact import decode_exact
from qoda_kernels.cuda.norms import common_scale, extreme_norm, extreme_norms_from, finished_extreme, load_norm
from qoda_kernels.cuda.rotation import rotate_back, sign_word
from qoda_kernels.cuda.threads import WARPS, is_last_block, own_lane, own_warp, warp_count, warp_maximum
from qoda_kernels.cuda.units import copy_table, count_in_unit, find_segment, place_in_tiles, scratch_of_warp
from qoda_kernels.cuda.values import fill_with_nan, item_shift, store_if, store_value


@device
def _add_row(total, word, row, bits, mask, norm, table, levels):
    """Add norm times the level of a row's code, from the word of four rows."""
    code = word32.bit_and(word32.shift_right(word, word32.multiply(np.uint32(row), bits)), mask)
    return libdevice.fadd_rn(total, libdevice.fmul_rn(norm, memory.element(table, word32.add(levels, code))))


@device
def _store_sum(out, kind, index, count, total, scale, rotates, table, scratch, common, sender_count):
    """Store one sum times the scale; where it is still rotated, as it is in shared memory.

    `common` is 0 unless the bucket is extreme.
    """
    if rotates:
        if index < count:
            table[word32.add(scratch, index)] = total
    else:
        value = libdevice.fmul_rn(total, scale)
        if common != np.float32(0.0):
            value = finished_extreme(value, kind, False, common, scale, sender_count)
        store_if(out, kind, index, count, value)


@device
def _decode_bucket(out, kind, segment, number, senders, sender_count, scale, table, rotation):
    """Decode one bucket of all messages, sum in their order, times the scale; `rotation` is as for `_encode_bucket`."""
    lane = own_lane()
    bits = memory.load_word(segment + records.BITS)
    lanes = memory.load_word(segment + records.LANES)
    bucket_size = memory.load_word(segment + records.UNIT_LENGTH)
    norm_bytes = memory.load_word(segment + records.NORM_BYTES)
    levels = memory.load_word(segment + records.LEVELS)
    begin = np.uint64(number) * np.uint64(bucket_size)
    count = count_in_unit(memory.load_long(segment + records.LENGTH), begin, bucket_size)
    norm_offset = word32.add(memory.load_word(segment + records.BEGIN), word32.multiply(number, norm_bytes))

    largest = np.uint32(0)
    sender = lane
    while sender < sender_count:
        message = memory.load_long(senders + records.SENDER_BYTES * np.uint64(sender) + records.SENDER_MESSAGE)
        largest = word32.maximum(largest, load_norm(message + np.uint64(norm_offset), norm_bytes))
        sender = word32.add(sender, np.uint32(32))
    may_rotate, rotation_first, rotation_second, scratch = rotation
    rotates = may_rotate and memory.load_word(segment + records.ROTATES) != np.uint32(0)
    largest = warp_maximum(largest)
    common = np.float32(0.0)
    if largest >= extreme_norms_from(kind, rotates):
        common = common_scale(senders, sender_count, norm_offset, norm_bytes, largest)
        if common != common:
            fill_with_nan(out, kind, segment, number)
            return
    bucket_bytes = word32.multiply(word32.shift_right(bucket_size, np.uint32(3)), bits)
    offset = word32.add(memory.load_word(segment + records.CODES_BEGIN), word32.multiply(number, bucket_bytes))
    out += begin << np.uint64(item_shift(kind))
    mask = word32.subtract(word32.shift_left(np.uint32(1), bits), np.uint32(1))
    middle = np.uint64(word32.shift_left(bits, np.uint32(2)))
    tile = word32.shift_left(lanes, np.uint32(3))
    half, together, tile_lane = place_in_tiles(lanes)
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
                message = memory.load_long(senders + records.SENDER_BYTES * np.uint64(sender) + records.SENDER_MESSAGE)
                word = load_norm(message + np.uint64(norm_offset), norm_bytes)
                norm = word32.float_from_bits(word)
                if common != np.float32(0.0):
                    norm = extreme_norm(word, kind, rotates, common)
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
            _store_sum(out, kind, index, count, t0, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t1, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t2, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t3, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t4, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t5, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t6, scale, rotates, table, scratch, common, sender_count)
            index = word32.add(index, stride)
            _store_sum(out, kind, index, count, t7, scale, rotates, table, scratch, common, sender_count)
        tile_begin = word32.add(tile_begin, word32.multiply(together, tile))
        number_of_tile = word32.add(number_of_tile, together)
    if rotates:
        place = memory.load_long(segment + records.COORDINATE) + begin
        cuda.syncwarp()
        rotate_back(table, scratch, count, sign_word(place, rotation_first, rotation_second))
        index = lane
        while index < count:
            value = memory.element(table, word32.add(scratch, index))
            value = libdevice.fmul_rn(value, scale)
            if common != np.float32(0.0):
                value = finished_extreme(value, kind, True, common, scale, sender_count)
            store_value(out, kind, index, value)
            index = word32.add(index, np.uint32(32))
        cuda.syncwarp()


@device
def _word_of_header(address, word):
    return memory.load_word(address + np.uint64(4) * np.uint64(word))


@device
def _check_messages(plan, senders, sender_count, counter):
    """Whether every message is the expected one; notes the first that is not. For one thread, after all sums."""
    totals = memory.load_long(plan + records.PLAN_TOTALS)
    status = memory.load_long(plan + records.PLAN_STATUS)
    is_good = True
    for sender in range(sender_count):
        total = memory.atomic_add_long(totals + np.uint64(8) * np.uint64(sender), np.uint64(0))
        memory.store_long(totals + np.uint64(8) * np.uint64(sender), np.uint64(0))
        record = senders + records.SENDER_BYTES * np.uint64(sender)
        message = memory.load_long(record + records.SENDER_MESSAGE)
        is_equal = True
        for word in range(records.HEADER_WORDS):
            expected = _word_of_header(record + records.SENDER_HEADER, word)
            if word == records.COUNTER_WORD:
                expected = word32.add(expected, counter)
            elif word == records.CHECKSUM_WORD:
                expected = fold_checksum(total)
            if _word_of_header(message, word) != expected:
                is_equal = False
        if not is_equal and is_good and memory.load_word(status + records.REFUSED) == np.uint32(0):
            memory.store_word(status + records.REFUSED_SENDER, np.uint32(sender))
            for word in range(records.HEADER_WORDS):
                expected = _word_of_header(record + records.SENDER_HEADER, word)
                if word == records.COUNTER_WORD:
                    expected = word32.add(expected, counter)
                elif word == records.CHECKSUM_WORD:
                    expected = fold_checksum(total)
                memory.store_word(status + records.EXPECTED + np.uint64(4) * np.uint64(word), expected)
                received = _word_of_header(message, word)
                memory.store_word(status + records.RECEIVED + np.uint64(4) * np.uint64(word), received)
            cuda.threadfence_system()
            memory.store_word(status + records.REFUSED, np.uint32(1))
        is_good = is_good and is_equal
    return is_good


@device
def _decode_messages(plan, senders, sender_count, outputs, rotation, counter, scale, pieces):
    """Decode several messages; see `decode_mean`."""
    table = cuda.shared.array(0, types.float32)
    verdict = cuda.shared.array(1, types.uint32)
    copy_table(memory.load_long(plan + records.PLAN_LEVELS), memory.load_word(plan + records.PLAN_LEVEL_FLOATS), table)
    may_rotate, rotation_first, rotation_second = rotation
    scratch = scratch_of_warp(plan, memory.load_word(plan + records.PLAN_LEVEL_FLOATS))
    own_rotation = may_rotate, rotation_first, rotation_second, scratch
    segments = memory.load_long(plan + records.PLAN_SEGMENTS)
    segment_count = memory.load_word(plan + records.PLAN_SEGMENT_COUNT)
    payload_bytes = memory.load_word(plan + records.PLAN_PAYLOAD_BYTES)
    totals = memory.load_long(plan + records.PLAN_TOTALS)
    units = memory.load_word(plan + records.PLAN_UNITS)

    # Sums are done between the units, in proportion, so that both find the bytes in the cache.
    checks = word32.multiply(pieces, sender_count)
    check = own_warp()
    unit = check
    while unit < units or check < checks:
        if check < checks and np.uint64(check) * np.uint64(units) <= np.uint64(unit) * np.uint64(checks):
            piece = check // sender_count
            sender = word32.subtract(check, word32.multiply(np.uint32(piece), sender_count))
            message = memory.load_long(senders + records.SENDER_BYTES * np.uint64(sender) + records.SENDER_MESSAGE)
            total = sum_piece(message, np.uint32(piece), payload_bytes)
            if own_lane() == np.uint32(0):
                memory.atomic_add_long(totals + np.uint64(8) * np.uint64(sender), total)
            check = word32.add(check, warp_count())
        else:
            index = find_segment(segments, segment_count, unit)
            segment = segments + records.SEGMENT_BYTES * np.uint64(index)
            out = memory.load_long(outputs + np.uint64(8) * np.uint64(index))
            kind = memory.load_word(segment + records.KIND)
            number = word32.subtract(unit, memory.load_word(segment + records.FIRST_UNIT))
            if memory.load_word(segment + records.BITS) == records.EXACT:
                decode_exact(out, kind, segment, number, senders, sender_count, scale)
            else:
                _decode_bucket(out, kind, segment, number, senders, sender_count, scale, table, own_rotation)
            unit = word32.add(unit, warp_count())

    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        verdict[0] = np.uint32(0)
        workspace = memory.load_long(plan + records.PLAN_WORKSPACE)
        if is_last_block(workspace):
            memory.store_word(workspace + records.FINISHED_BLOCKS, np.uint32(0))
            if not _check_messages(plan, senders, sender_count, counter):
                verdict[0] = np.uint32(1)
    cuda.syncthreads()
    if verdict[0] != np.uint32(0):
        unit = word32.shift_right(np.uint32(cuda.threadIdx.x), np.uint32(5))
        while unit < units:
            index = find_segment(segments, segment_count, unit)
            segment = segments + records.SEGMENT_BYTES * np.uint64(index)
            out = memory.load_long(outputs + np.uint64(8) * np.uint64(index))
            number = word32.subtract(unit, memory.load_word(segment + records.FIRST_UNIT))
            fill_with_nan(out, memory.load_word(segment + records.KIND), segment, number)
            unit = word32.add(unit, np.uint32(WARPS))


@kernel
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
        counter = memory.load_word(step + records.COUNTER)
    rotation = False, np.uint32(0), np.uint32(0)
    _decode_messages(plan, senders, sender_count, outputs, rotation, counter, scale, pieces)


@kernel
def decode_mean_rotated(
    plan, senders, sender_count, outputs, step, rotation_first, rotation_second, counter, scale, pieces
):
    """Decode several messages, some of whose codebooks rotate.

    It takes the arguments of `decode_mean`, and before counter the fields of the `RotationKey`, uint32.
    """
    if step != np.uint64(0):
        rotation_first = memory.load_word(step + records.ROTATION_FIRST)
        rotation_second = memory.load_word(step + records.ROTATION_SECOND)
        counter = memory.load_word(step + records.COUNTER)
    rotation = True, rotation_first, rotation_second
    _decode_messages(plan, senders, sender_count, outputs, rotation, counter, scale, pieces)
