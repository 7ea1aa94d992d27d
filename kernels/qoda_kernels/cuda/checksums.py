"""The checksum of a payload (`wire.py`).

Its two sums are linear, so each lane adds what its own bytes contribute, in any order. For each message there is one
64-bit total; the last block to finish folds it. Totals are zeroed again for the next launch.
"""

import numpy as np

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.threads import own_lane, warp_sum
from qoda_kernels.kernel_constants import CHECKSUM, OF_ZEROS

CHECK_BYTES = 8192  # what one warp sums at a time of a received payload


@device
def checksum_share(offset, value):
    """What the bytes of a value that begins at a byte of the message add to the checksum's total.

    The value must not reach beyond its 32-bit word.
    """
    place = word32.subtract(offset, records.HEADER_BYTES)
    weight = np.uint64(1) + CHECKSUM * np.uint64(word32.add(word32.shift_right(place, np.uint32(2)), np.uint32(1)))
    shift = word32.shift_left(word32.bit_and(place, np.uint32(3)), np.uint32(3))
    return weight * np.uint64(word32.shift_left(np.uint32(value), shift))


@device
def share_of_planes(offset, byte_sum, weighted_sum, words):
    """What bytes at offset, offset + 4 words, offset + 8 words, ... add to the total.

    Args:
        offset: of byte 0, in the message.
        byte_sum: sum of the bytes.
        weighted_sum: sum of n times byte n.
        words: distance of the bytes.
    """
    place = word32.subtract(offset, records.HEADER_BYTES)
    first = np.uint64(word32.add(word32.shift_right(place, np.uint32(2)), np.uint32(1)))
    position_sum = first * np.uint64(byte_sum) + np.uint64(words) * np.uint64(weighted_sum)
    shift = word32.shift_left(word32.bit_and(place, np.uint32(3)), np.uint32(3))
    return (np.uint64(byte_sum) + CHECKSUM * position_sum) << np.uint64(shift)


@device
def sum_piece(message, piece, payload_bytes):
    """Total of one piece of a payload, over the warp; the payload is a multiple of 16 bytes."""
    place = word32.add(word32.multiply(piece, np.uint32(CHECK_BYTES)), word32.shift_left(own_lane(), np.uint32(4)))
    end = word32.minimum(word32.multiply(word32.add(piece, np.uint32(1)), np.uint32(CHECK_BYTES)), payload_bytes)
    word_sum = np.uint64(0)
    weighted_sum = np.uint64(0)
    while place < end:
        a, b, c, d = memory.load_four_words(message + np.uint64(word32.add(records.HEADER_BYTES, place)))
        first = np.uint64(word32.shift_right(place, np.uint32(2)))
        four = np.uint64(a) + np.uint64(b) + np.uint64(c) + np.uint64(d)
        word_sum += four
        ascending = (
            np.uint64(a) + np.uint64(2) * np.uint64(b) + np.uint64(3) * np.uint64(c) + np.uint64(4) * np.uint64(d)
        )
        weighted_sum += first * four + ascending
        place = word32.add(place, np.uint32(512))
    return warp_sum(word_sum + CHECKSUM * weighted_sum)


@device
def fold_checksum(total):
    """The checksum, given the total of a whole payload."""
    return word32.bit_xor(np.uint32((total ^ (total >> np.uint64(32))) & np.uint64(0xFFFFFFFF)), OF_ZEROS)
