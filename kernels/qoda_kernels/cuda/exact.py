"""Units whose values travel as they are: copied into a message, and summed over messages."""

import numpy as np
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.checksums import checksum_share
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.threads import own_lane
from qoda_kernels.cuda.units import count_in_unit
from qoda_kernels.cuda.values import DOUBLE_NAN, item_shift, load_value, store_value


@device
def encode_exact(values, kind, segment, message, number):
    """Copy one unit of an exact segment; returns its share of the checksum."""
    begin = memory.load_word(segment + records.BEGIN)
    bytes_of_unit = word32.shift_left(memory.load_word(segment + records.UNIT_LENGTH), item_shift(kind))
    first = word32.multiply(number, bytes_of_unit)
    used = word32.subtract(memory.load_word(segment + records.CODES_END), begin)
    padded = word32.subtract(memory.load_word(segment + records.END), begin)
    last = word32.minimum(word32.add(first, bytes_of_unit), padded)
    is_word_aligned = (values & np.uint64(3)) == np.uint64(0)
    total = np.uint64(0)
    place = word32.add(first, word32.shift_left(own_lane(), np.uint32(2)))
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
        total += checksum_share(offset, word)
        place = word32.add(place, np.uint32(128))
    return total


@device
def decode_exact(out, kind, segment, number, senders, sender_count, scale):
    """Sum one unit of an exact segment over the messages, in float32 (float64 for float64), times the scale."""
    unit_length = memory.load_word(segment + records.UNIT_LENGTH)
    begin = np.uint64(number) * np.uint64(unit_length)
    count = count_in_unit(memory.load_long(segment + records.LENGTH), begin, unit_length)
    first_byte = begin << np.uint64(item_shift(kind))
    out += first_byte
    first_byte += np.uint64(memory.load_word(segment + records.BEGIN))
    index = own_lane()
    while index < count:
        place = first_byte + (np.uint64(index) << np.uint64(item_shift(kind)))
        if kind == records.FLOAT64:
            wide = np.float64(-0.0)
            sender = np.uint32(0)
            while sender < sender_count:
                message = memory.load_long(senders + records.SENDER_BYTES * np.uint64(sender) + records.SENDER_MESSAGE)
                wide = libdevice.dadd_rn(wide, memory.load_double(message + place))
                sender = word32.add(sender, np.uint32(1))
            wide = libdevice.dmul_rn(wide, np.float64(scale))
            if wide != wide:
                wide = memory.double_from_bits(DOUBLE_NAN)
            memory.store_double(out + np.uint64(8) * np.uint64(index), wide)
        else:
            total = np.float32(-0.0)
            sender = np.uint32(0)
            while sender < sender_count:
                message = memory.load_long(senders + records.SENDER_BYTES * np.uint64(sender) + records.SENDER_MESSAGE)
                total = libdevice.fadd_rn(total, load_value(message + place, kind))
                sender = word32.add(sender, np.uint32(1))
            store_value(out, kind, index, libdevice.fmul_rn(total, scale))
        index = word32.add(index, np.uint32(32))
