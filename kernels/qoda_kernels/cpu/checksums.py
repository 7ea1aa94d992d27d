"""The checksum of a payload (`wire.py`): what runs of bytes add to its total."""

from functools import cache

import numpy as np

from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.arguments import SUM_BYTES
from qoda_kernels.cpu.compilation import Kernel, compile_kernel, kernel
from qoda_kernels.cpu.memory import bytes_at
from qoda_kernels.kernel_constants import CHECKSUM, HEADER_BYTES

_SUM_STEP = 64  # bytes


@kernel
def _share_of_bytes(message: np.uint64, begin: int, end: int) -> np.uint64:
    """What bytes of a message, one by one, add to its checksum's total."""
    data = bytes_at(np.uint64(message), end)
    total = np.uint64(0)
    for place in range(begin, end):
        offset = place - HEADER_BYTES
        weight = np.uint64(1) + CHECKSUM * np.uint64(offset // 4 + 1)
        total += weight * (np.uint64(data[place]) << np.uint64(8 * (offset % 4)))
    return total


@kernel
def sum_bytes(message: np.uint64, begin: int, end: int) -> np.uint64:
    """What a run of bytes adds to the checksum's total: A + CHECKSUM_MULTIPLIER B of `wire.py`, modulo 2^64.

    Args:
        message: address of the message.
        begin: first byte, counted from the message's start, at least HEADER_BYTES.
        end: byte behind the last one.
    """
    first = begin + -begin % 4
    steps = (end - first) // _SUM_STEP
    if steps < 1:
        return _share_of_bytes(message, begin, end)
    last = first + steps * _SUM_STEP
    word = np.uint64((first - HEADER_BYTES) // 4 + 1)
    total = tiles.sum_words(np.uint64(message) + np.uint64(first), steps, word, CHECKSUM)
    return total + _share_of_bytes(message, begin, first) + _share_of_bytes(message, last, end)


@cache
def byte_summer() -> Kernel:
    """Kernel `sum_bytes`."""
    return compile_kernel(sum_bytes, SUM_BYTES, "sums a checksum")
