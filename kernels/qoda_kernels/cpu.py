"""Numba CPU kernels: `reference.py`, fast. Each must give the reference's bits.

A kernel works on a list of **parts**, runs of whole buckets of any segments of a message, all with one codebook and one
dtype; messages and tensors come as addresses, so that a call costs the host about a microsecond. Kernels are compiled
per (code width, lanes, rounding method, gradient dtype) and cached on disk. They release the GIL, allocate nothing but
one bucket of scratch, and never read or write outside the tensors.

What makes them fast: one pass over the memory, in which the next tile is asked for while this one is in work; all
arithmetic on vectors of 32-bit words (`tiles.py`), rounding to nearest by adding 1.5 * 2^23 and reading the low bits,
one hash for two coordinates, and codes that stay in registers until they are packed.
"""

import logging
import time
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types
from numba.core import event

from qoda_kernels import tiles, word32
from qoda_kernels.codebook import ROWS
from qoda_kernels.compilation import cached_kernel
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
    SIGN,
    TINY_NORM,
    TINY_SCALE,
    WEYL,
)
from qoda_kernels.layout import HEADER_BYTES
from qoda_kernels.reference import (
    L2_LANES,
    RoundingTable,
    fraction_bits,
)
from qoda_kernels.rotation import LANES as SIGN_LANES
from qoda_kernels.rotation import SECOND_BLOCK_BIT, inverse_root

_LOG = logging.getLogger(__name__)

FLOAT32, FLOAT16, BFLOAT16, FLOAT64 = range(4)
METHODS = {"uniform": tiles.UNIFORM, "minimum": tiles.MINIMUM, "cells": tiles.CELLS, "search": tiles.SEARCH}
_MOST_CELLS = 4096
_MOST_MANTISSA_BITS = 10

# Fields of a part, int64 each. Bytes are counted from the message's start.
SEGMENT = 0  # number of the tensor
FIRST = 1  # first coordinate, in the tensor
LENGTH = 2  # coordinates
COORDINATE = 3  # number of the first coordinate in the whole model
NORMS_BEGIN = 4  # first byte of the norm words
CODES_BEGIN = 5  # first byte of the codes or raw values
CODES_END = 6  # first byte behind them
END = 7  # first byte behind the padding that follows them, if any
PART_FIELDS = 8

_GROUP = tiles.GROUP
_FIRST, _SECOND = np.uint32(FIRST_MULTIPLIER), np.uint32(SECOND_MULTIPLIER)
ROOTS = np.array([inverse_root(1 << power) for power in range(11)])  # 1 / sqrt(2^i), for the kernels of rotated buckets
_SUM_STEP = 64  # bytes
_CHUNK = 32  # buckets whose codes are summed for the checksum while they are in the cache
_AHEAD = 2048  # coordinates that are asked for before they are quantized; they fit into the first cache twice


def _digest_of_sources() -> int:
    """A number that changes with the text of any module that kernels are made of."""
    names = ("tiles", "vectors", "word32", "kernel_constants")
    return zlib.crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names))


# Numba compiles a cached kernel anew when its own file changes, not when a module that it uses does; but it compares
# what the kernel's closure holds.
_SOURCES = _digest_of_sources()

_inline = njit(inline="always", nogil=True, error_model="numpy")


@_inline
def _widen_half(half: np.uint32) -> np.float32:
    """Float32 value of float16 bits: exact, without arithmetic on subnormal numbers."""
    moved = word32.shift_left(word32.bit_and(half, np.uint32(0x7FFF)), np.uint32(13))
    exponent = word32.bit_and(moved, np.uint32(0x0F800000))
    rebased = word32.add(moved, np.uint32(112 << 23))
    if exponent == np.uint32(0x0F800000):
        rebased = word32.add(rebased, np.uint32(112 << 23))
    elif exponent == np.uint32(0):
        shifted = word32.float_from_bits(word32.add(rebased, np.uint32(1 << 23)))
        rebased = word32.float_bits(np.float32(shifted - word32.float_from_bits(np.uint32(113 << 23))))
    sign = word32.shift_left(word32.bit_and(half, np.uint32(0x8000)), np.uint32(16))
    return word32.float_from_bits(word32.bit_or(rebased, sign))


@_inline
def _rounded_to_half(value: np.float32) -> np.uint32:
    """Bits of a float32 rounded to nearest even in float16; 0x7E00 for NaN."""
    bits = word32.float_bits(value)
    magnitude = word32.bit_and(bits, MAGNITUDE)
    if magnitude > INFINITY:
        return HALF_NAN
    if magnitude >= np.uint32(143 << 23):  # 2^16: infinity
        half = np.uint32(0x7C00)
    elif magnitude < np.uint32(113 << 23):  # subnormal: the sum with 1/2 has the ulp 2^-24
        summed = np.float32(word32.float_from_bits(magnitude) + np.float32(0.5))
        half = word32.subtract(word32.float_bits(summed), np.uint32(126 << 23))
    else:
        odd = word32.bit_and(word32.shift_right(magnitude, np.uint32(13)), np.uint32(1))
        rounded = word32.add(magnitude, word32.add(odd, np.uint32(0xFFF)))
        half = word32.shift_right(word32.subtract(rounded, np.uint32(112 << 23)), np.uint32(13))
    sign = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(0x8000))
    return word32.bit_or(half, sign)


@_inline
def _rounded_to_bfloat16(value: np.float32) -> np.uint32:
    """Bits of a float32 rounded to bfloat16 (`reference.bfloat16_bits`); torch gives NaN other bits elsewhere."""
    bits = word32.float_bits(value)
    odd = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(1))
    rounded = word32.add(bits, word32.add(odd, np.uint32(0x7FFF)))
    if word32.bit_and(bits, MAGNITUDE) > INFINITY:
        rounded = NAN
    return word32.shift_right(rounded, np.uint32(16))


@cached_kernel
def round_values(values: npt.NDArray[np.float32], kind: int, out: npt.NDArray[np.uint16]) -> None:
    """Bits of values rounded to float16 or bfloat16, to nearest even, with one NaN.

    Args:
        values: float32 [n].
        kind: FLOAT16 or BFLOAT16.
        out: uint16 [n], written.
    """
    if kind == FLOAT16:
        for index in range(values.size):
            out[index] = np.uint16(_rounded_to_half(values[index]))
    else:
        for index in range(values.size):
            out[index] = np.uint16(_rounded_to_bfloat16(values[index]))


@cached_kernel
def widen_values(values: npt.NDArray[np.uint16], kind: int, out: npt.NDArray[np.float32]) -> None:
    """Float32 values of bits of float16 or bfloat16: the inverse of `round_values`, exact."""
    if kind == FLOAT16:
        for index in range(values.size):
            out[index] = _widen_half(np.uint32(values[index]))
    else:
        for index in range(values.size):
            out[index] = word32.float_from_bits(word32.shift_left(np.uint32(values[index]), np.uint32(16)))


@cached_kernel
def _max_magnitude(address: np.uint64, length: int) -> np.uint32:
    """Largest magnitude of float32 values, as bits; NaN and infinity compare as the largest."""
    groups = length // _GROUP
    largest = np.uint32(0)
    if groups > 0:
        largest = tiles.largest_magnitude(np.uint64(address), groups)
    values = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for index in range(groups * _GROUP, length):
        largest = word32.maximum(largest, word32.bit_and(word32.float_bits(values[index]), MAGNITUDE))
    return largest


@cached_kernel
def _add_in_tree(lanes: npt.NDArray[np.float32]) -> np.float32:
    """Sum of L2_LANES numbers: j with j + 16, then j + 8, ..."""
    width = L2_LANES // 2
    while width > 0:
        for lane in range(width):
            lanes[lane] = np.float32(lanes[lane] + lanes[lane + width])
        width //= 2
    return lanes[0]


@cached_kernel
def _sum_of_values(address: np.uint64, length: int, lanes: npt.NDArray[np.float32]) -> np.float32:
    """`reference.tree_sum`."""
    lanes[:] = np.float32(0.0)
    rows = length // L2_LANES
    tiles.add_values(np.uint64(address), rows, lanes)
    values = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for lane in range(length - rows * L2_LANES):
        lanes[lane] = np.float32(lanes[lane] + values[rows * L2_LANES + lane])
    return _add_in_tree(lanes)


@cached_kernel
def _sum_of_squares(address: np.uint64, length: int, scale: np.float32, lanes: npt.NDArray[np.float32]) -> np.float32:
    """`reference.tree_sum` of the squares of values times a scale."""
    lanes[:] = np.float32(0.0)
    rows = length // L2_LANES
    tiles.add_squares(np.uint64(address), rows, scale, lanes)
    values = carray(word32.float_pointer(np.uint64(address)), (length,), np.float32)
    for lane in range(length - rows * L2_LANES):
        scaled = np.float32(values[rows * L2_LANES + lane] * scale)
        lanes[lane] = np.float32(lanes[lane] + np.float32(scaled * scaled))
    return _add_in_tree(lanes)


@_inline
def _exponent_of_scale(largest: np.uint32) -> int:
    """Exponent field of the first of `reference.powers_of_scale`; that of the second is 254 less it."""
    return min(max(254 - int(largest >> np.uint32(23)), 1), 253)


@cached_kernel
def _l2_norm(address: np.uint64, length: int, largest: np.uint32, lanes: npt.NDArray[np.float32]) -> np.uint32:
    """Euclidean norm of a finite bucket that is not all zero, as float32 bits (`reference.bucket_norm`)."""
    field = _exponent_of_scale(largest)
    total = _sum_of_squares(address, length, word32.float_from_bits(np.uint32(field << 23)), lanes)
    root = np.float32(np.sqrt(total) * word32.float_from_bits(np.uint32((254 - field) << 23)))
    return word32.minimum(word32.float_bits(root), LARGEST)


@cached_kernel
def _fill_signs(weyl: np.uint32, first: np.uint32, second: np.uint32, words: npt.NDArray[np.uint32]) -> None:
    """Hashes of SIGN_LANES neighbouring coordinates (`dither.hash32`), whose bits are signs (`rotation.py`)."""
    for lane in range(words.size):
        word = word32.bit_xor(word32.add(weyl, word32.multiply(np.uint32(lane), WEYL)), first)
        word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
        word = word32.bit_xor(word32.multiply(word, _FIRST), second)
        word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
        word = word32.multiply(word, _SECOND)
        words[lane] = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))


@cached_kernel
def _apply_signs(values: npt.NDArray[np.float32], first_bit: int, words: npt.NDArray[np.uint32]) -> None:
    """Give a block of a bucket the signs that begin at a bit of the words."""
    for place in range(values.size):
        word = words[place % SIGN_LANES]
        bit = word32.shift_left(word, np.uint32(31 - first_bit - place // SIGN_LANES))
        sign = word32.bit_and(bit, SIGN)
        values[place] = word32.float_from_bits(word32.bit_xor(word32.float_bits(values[place]), sign))


@cached_kernel
def _transform(values: npt.NDArray[np.float32], factor: np.float32) -> None:
    """Walsh-Hadamard transform of a power of two of values, times a factor."""
    distance = values.size // 2
    while distance > 0:
        for begin in range(0, values.size, 2 * distance):
            for place in range(begin, begin + distance):
                a, b = values[place], values[place + distance]
                values[place] = np.float32(a + b)
                values[place + distance] = np.float32(a - b)
        distance //= 2
    for place in range(values.size):
        values[place] = np.float32(values[place] * factor)


@_inline
def _block_size(length):  # type: ignore[no-untyped-def]  # Numba infers
    """Binary logarithm of the largest power of two that is not above a length."""
    power = 0
    while 2 << power <= length:
        power += 1
    return power


@cached_kernel
def _rotate_tail(
    values: npt.NDArray[np.float32],
    weyl: np.uint32,
    first: np.uint32,
    second: np.uint32,
    factors: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
) -> None:
    """`rotation.rotate`, in place, for any length.

    Args:
        values: float32 [n], n at most 512 or a power of two.
        weyl: as for `tiles.rotate`; so are first and second.
        first: see there.
        second: see there.
        factors: float32, 1 / sqrt(2^i).
        words: uint32 [SIGN_LANES], scratch.
    """
    _fill_signs(weyl, first, second, words)
    power = _block_size(values.size)
    block = values[: 1 << power]
    _apply_signs(block, 0, words)
    _transform(block, factors[power])
    if block.size < values.size:
        block = values[values.size - block.size :]
        _apply_signs(block, SECOND_BLOCK_BIT, words)
        _transform(block, factors[power])


@cached_kernel
def _rotate_tail_back(
    values: npt.NDArray[np.float32],
    weyl: np.uint32,
    first: np.uint32,
    second: np.uint32,
    factors: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
) -> None:
    """`rotation.rotate_back`, in place; the arguments are those of `_rotate_tail`."""
    _fill_signs(weyl, first, second, words)
    power = _block_size(values.size)
    size = 1 << power
    if size < values.size:
        block = values[values.size - size :]
        _transform(block, factors[power])
        _apply_signs(block, SECOND_BLOCK_BIT, words)
    block = values[:size]
    _transform(block, factors[power])
    _apply_signs(block, 0, words)


@_inline
def _write_norm(address, norm_bytes, norm_bits):  # type: ignore[no-untyped-def]  # Numba infers
    """Write the upper norm_bytes bytes, 2 or 4, of a norm word."""
    if norm_bytes == 2:
        carray(word32.half_pointer(address), (1,), np.uint16)[0] = np.uint16(norm_bits >> np.uint32(16))
    else:
        carray(word32.word_pointer(address), (1,), np.uint32)[0] = norm_bits


@_inline
def _read_norm(address, norm_bytes):  # type: ignore[no-untyped-def]  # Numba infers
    """A norm as float32 bits."""
    if norm_bytes == 2:
        half = np.uint32(carray(word32.half_pointer(address), (1,), np.uint16)[0])
        return word32.shift_left(half, np.uint32(16))
    return carray(word32.word_pointer(address), (1,), np.uint32)[0]


@cached_kernel
def _round_to_bfloat16(word: np.uint32) -> np.uint32:
    """A non-negative finite norm as float32 bits, rounded to nearest in bfloat16 (halves up)."""
    return word32.bit_and(word32.add(word, np.uint32(0x8000)), HIGH_HALF)


@cached_kernel
def _round_up_to_bfloat16(word: np.uint32) -> np.uint32:
    """A non-negative norm as float32 bits, rounded up to bfloat16; NaN for a norm that is not finite."""
    if word >= INFINITY:
        return NAN
    return word32.bit_and(word32.add(word, LOW_HALF), HIGH_HALF)


@_inline
def _bytes_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(word32.byte_pointer(address), (count,), np.uint8)


@cached_kernel
def _share_of_bytes(message: np.uint64, begin: int, end: int) -> np.uint64:
    """What bytes of a message, one by one, add to its checksum's total."""
    data = _bytes_at(np.uint64(message), end)
    total = np.uint64(0)
    for place in range(begin, end):
        offset = place - HEADER_BYTES
        weight = np.uint64(1) + CHECKSUM * np.uint64(offset // 4 + 1)
        total += weight * (np.uint64(data[place]) << np.uint64(8 * (offset % 4)))
    return total


@cached_kernel
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


@dataclass(frozen=True)
class KernelTable:
    """A rounding table as the kernels read it.

    Method "cells" finds the interval without a search: every power of two is cut into 2^m equal cells, few enough to
    stay in the fastest caches and so many that no cell holds two levels. The highest bits of a coordinate tell its
    cell; whether it lies above the level in it tells its line.

    Attributes:
        method: "uniform", "minimum", "search" as in the rounding table, or "cells" in place of "search".
        lines: float32, slope and intercept of each line; with cells 2 lines per cell, for coordinates below and above
            its level.
        levels: float32: the levels; with cells the level in each cell, or 2 where there is none.
        cells: uint32 [2]: with cells the lower end of the first one, as float32 bits, and 23 - m.
    """

    method: str
    lines: npt.NDArray[np.float32]
    levels: npt.NDArray[np.float32]
    cells: npt.NDArray[np.uint32]


def kernel_table(table: RoundingTable) -> KernelTable:
    """The table that makes the kernels give the positions of a rounding table."""
    if table.method == "search":
        for mantissa_bits in range(_MOST_MANTISSA_BITS + 1):
            found = _table_with_cells(table, 23 - mantissa_bits)
            if found is not None:
                return found
    return KernelTable(table.method, _lines(table), table.levels, np.zeros(2, dtype=np.uint32))


def _lines(table: RoundingTable) -> npt.NDArray[np.float32]:
    """Slope and intercept of each line."""
    return np.stack([table.slopes, table.intercepts], axis=1).ravel()


def _table_with_cells(table: RoundingTable, shift: int) -> KernelTable | None:
    """Table with cells of which each is a run of 2^shift float32 numbers; None where that does not work."""
    inner = table.levels[1:-1].view(np.uint32)
    lowest = inner[0] >> np.uint32(shift) << np.uint32(shift)
    place = ((inner - lowest) >> np.uint32(shift)).astype(np.int64)
    one = int((np.float32(1.0).view(np.uint32) - lowest) >> np.uint32(shift))  # the cell of 1 and of what is rounded up
    if one >= _MOST_CELLS or np.unique(place).size < inner.size:
        return None
    below = np.searchsorted(place, np.arange(one + 1), side="left")
    line = np.stack([below, np.minimum(below + 1, inner.size)], axis=1).ravel()
    levels = np.full(one + 1, 2.0, dtype=np.float32)
    levels[place] = table.levels[1:-1]
    cells = np.array([lowest, shift], dtype=np.uint32)
    return KernelTable("cells", _lines(table).reshape(-1, 2)[line].ravel(), levels, cells)


_FLOATS, _WORDS, _PARTS = types.float32[::1], types.uint32[::1], types.int64[:, ::1]
_ADDRESS, _ADDRESSES = types.uint64, types.uint64[::1]
_CODEBOOK = (types.int64, types.int64, types.boolean, types.uint32, *[_ADDRESS] * 3)
_ROTATION = (types.float32, _ADDRESS, _FLOATS)
ENCODE = types.uint64(_ADDRESSES, _PARTS, _ADDRESS, _ADDRESS, *_CODEBOOK)
ENCODE_ROTATED = types.uint64(_ADDRESSES, _PARTS, _ADDRESS, _ADDRESS, _WORDS, *_CODEBOOK, *_ROTATION)
DECODE = types.void(_ADDRESSES, _ADDRESSES, _PARTS, types.float32, types.int64, types.int64, _ADDRESS)
DECODE_ROTATED = types.void(
    _ADDRESSES, _ADDRESSES, _PARTS, types.float32, _WORDS, types.int64, types.int64, _ADDRESS, _FLOATS
)
COPY = types.uint64(_ADDRESSES, _PARTS, _ADDRESS, types.int64)
SUM = types.void(_ADDRESSES, _ADDRESSES, _PARTS, types.float32, types.int64)
SUM_BYTES = types.uint64(types.uint64, types.int64, types.int64)


class _CompilationLog(event.Listener):
    """Says in the log what a user is waiting for when a kernel is compiled, not when it is loaded from the cache."""

    def __init__(self, kernel: Any, name: str) -> None:
        self._kernel = kernel
        self._name = name
        self._begin = 0.0

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] is self._kernel:
            self._begin = time.perf_counter()
            _LOG.info("compiling the CPU kernel that %s; once on this machine, some seconds", self._name)

    def on_end(self, event: Any) -> None:
        if event.data["dispatcher"] is self._kernel:
            _LOG.info("the CPU kernel that %s is ready after %.1f s", self._name, time.perf_counter() - self._begin)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, which compiled code calls by its address.

    Attributes:
        address: of the machine code, with Numba's calling convention.
        owner: the kernel for Python, which keeps the machine code.
    """

    address: int
    owner: Any


def _compiled(kernel: Any, signature: Any, name: str) -> Kernel:
    """A kernel, compiled or loaded from the cache."""
    with event.install_listener("numba:compile", _CompilationLog(kernel, name)):
        kernel.compile(signature)
    compiled = kernel.overloads[signature.args]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return Kernel(address, kernel)


@cached_kernel
def _clip_values(source: np.uint64, length: int, limit: np.uint32, target: np.uint64) -> None:
    """Copy float32 values, lowering their magnitudes to a limit, given as float32 bits."""
    given = carray(word32.float_pointer(np.uint64(source)), (length,), np.float32)
    clipped = carray(word32.float_pointer(np.uint64(target)), (length,), np.float32)
    for place in range(length):
        word = word32.float_bits(given[place])
        magnitude = word32.minimum(word32.bit_and(word, MAGNITUDE), limit)
        clipped[place] = word32.float_from_bits(word32.bit_or(magnitude, word32.bit_and(word, SIGN)))


@cached_kernel
def _scale_values(source: np.uint64, length: int, factor: np.float32, target: np.uint64) -> None:
    """Copy float32 values, multiplied by a factor; source and target may be the same address."""
    given = carray(word32.float_pointer(np.uint64(source)), (length,), np.float32)
    scaled = carray(word32.float_pointer(np.uint64(target)), (length,), np.float32)
    for place in range(length):
        scaled[place] = np.float32(given[place] * factor)


# The last tile of a slice can have fewer lanes; it is worked on as a full one, in scratch memory.


@cached_kernel
def _spread_rows(source: np.uint64, count: int, tail_lanes: int, lanes: int, target: np.uint64) -> None:
    """Copy the coordinates of a tail, row by row, to a full tile, whose other lanes become 0."""
    given = carray(word32.float_pointer(np.uint64(source)), (count,), np.float32)
    rows = carray(word32.float_pointer(np.uint64(target)), (ROWS, lanes), np.float32)
    rows[:] = np.float32(0.0)
    for row in range(ROWS):
        for lane in range(min(tail_lanes, count - row * tail_lanes)):
            rows[row, lane] = given[row * tail_lanes + lane]


@cached_kernel
def _join_rows(source: np.uint64, count: int, tail_lanes: int, lanes: int, is_added: bool, target: np.uint64) -> None:
    """Copy the coordinates of a tail from a full tile, or add them to what is there."""
    rows = carray(word32.float_pointer(np.uint64(source)), (ROWS, lanes), np.float32)
    values = carray(word32.float_pointer(np.uint64(target)), (count,), np.float32)
    for row in range(ROWS):
        for lane in range(min(tail_lanes, count - row * tail_lanes)):
            place = row * tail_lanes + lane
            values[place] = np.float32(values[place] + rows[row, lane]) if is_added else rows[row, lane]


@cached_kernel
def _copy_planes(
    source: np.uint64, source_lanes: int, bits: int, lanes: int, target: np.uint64, target_lanes: int
) -> None:
    """Copy the first lanes of a tile's planes to a tile with another number of lanes."""
    given = _bytes_at(np.uint64(source), bits * source_lanes)
    planes = _bytes_at(np.uint64(target), bits * target_lanes)
    for plane in range(bits):
        for lane in range(lanes):
            planes[plane * target_lanes + lane] = given[plane * source_lanes + lane]


@_inline
def _encode_tiles(  # type: ignore[no-untyped-def]  # Numba infers
    bucket,
    length,
    codes,
    ahead,
    coordinate,
    key,
    scale,
    limit,
    lines,
    levels,
    cells,
    magnitudes,
    tail_values,
    tail_codes,
    bits,
    lanes,
    tile_bytes,
    shift,
    method,
    is_stratified,
    is_limited,
    is_nearest,
):
    """Quantize and pack one bucket, `length` float32 at the address `bucket`, into packed codes at the address `codes`.

    Where rounding is to nearest, the bucket's coordinates are replaced as in `tiles.encode_tile`, which explains most
    of the arguments. `ahead` is the address of values that will be wanted soon, as many as the bucket has, tile_bytes
    for a tile; `coordinate` (uint64) the number of the bucket's first coordinate in the whole model; tail_values, of
    float32 [ROWS, lanes], and tail_codes, of uint8 [bits, lanes], are addresses of scratch memory. No argument is an
    array: those of an inlined function are counted references, which cost much here.
    """
    tile = ROWS * lanes
    high_share = word32.multiply(np.uint32(coordinate >> np.uint64(32)), HIGH_WORD)
    low_place = np.uint32(coordinate & np.uint64(0xFFFFFFFF))
    full_tiles = length // tile
    rest = length - full_tiles * tile
    for tile_number in range(full_tiles + (1 if rest > 0 else 0)):
        tile_place = bucket + np.uint64(4 * tile_number * tile)
        source = tile_place
        target = codes + np.uint64(tile_number * bits * lanes)
        row_length = lanes
        if tile_number == full_tiles:
            row_length = (rest + ROWS - 1) // ROWS
            _spread_rows(source, rest, row_length, lanes, tail_values)
            source, target = tail_values, tail_codes
        else:
            tiles.prefetch(ahead + np.uint64(tile_number * tile_bytes), tile_bytes)
        tiles.encode_tile(
            source,
            target,
            word32.multiply(word32.add(low_place, np.uint32(tile_number * tile)), WEYL),
            word32.multiply(np.uint32(row_length), WEYL),
            key,
            high_share,
            scale,
            limit,
            lines,
            levels,
            cells,
            magnitudes,
            bits,
            lanes,
            shift,
            method,
            is_stratified,
            is_limited,
            is_nearest,
        )
        if tile_number == full_tiles:
            packed = codes + np.uint64(tile_number * bits * lanes)
            _copy_planes(tail_codes, lanes, bits, row_length, packed, row_length)
            if is_nearest:
                _join_rows(tail_values, rest, row_length, lanes, False, tile_place)


@cache
def encoder(bits: int, lanes: int, method: str, kind: int, is_stratified: bool) -> Kernel:
    """Kernel that quantizes and packs parts; compiles it if need be.

    The kernel takes:
        values: uint64, addresses of the message's tensors.
        parts: int64 [n, PART_FIELDS].
        message: address of the message, written where the parts lie.
        key: address of uint32 [6], `DitherKey.words`.
        bucket_size, norm_bytes, is_l2, clip (float32 bits): of the codebook.
        lines, levels, cells: addresses of its `KernelTable`.

    It returns what the written bytes add to the checksum's total (`sum_bytes`).

    Args:
        bits: code width.
        lanes: of a full tile.
        method: of the `KernelTable`.
        kind: dtype of the tensors: FLOAT32, FLOAT16 or BFLOAT16.
        is_stratified: whether the key has several strata.
    """
    shift = fraction_bits(bits)
    uniform_scale = np.float32((2 ** (bits - 1) - 1) << shift)
    number_of_method = METHODS[method]
    is_uniform = method == "uniform"
    tile = ROWS * lanes
    item_bytes = 4 if kind == FLOAT32 else 2
    tile_bytes = item_bytes * ROWS * lanes
    has_strata = int(is_stratified)
    sources = _SOURCES

    @cached_kernel
    def encode(  # type: ignore[no-untyped-def]  # Numba infers
        values, parts, message, key, bucket_size, norm_bytes, is_l2, clip, lines, levels, cells
    ):
        _ = sources
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(tile, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        sums = np.empty(L2_LANES, dtype=np.float32)
        scratch_address = np.uint64(scratch.ctypes.data)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        # Of several buckets at once, so that the processor need not wait for each before it quantizes it.
        group = max(1, _AHEAD // bucket_size)
        magnitudes = np.empty(group, dtype=np.uint32)
        bytes_ahead = np.uint64(item_bytes * group * bucket_size)
        total = np.uint64(0)
        for index in range(parts.shape[0]):
            part = parts[index]
            tensor = values[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST])
            buckets = (part[LENGTH] + bucket_size - 1) // bucket_size
            norms = message + np.uint64(part[NORMS_BEGIN])
            summed = part[CODES_BEGIN]
            for number in range(buckets):
                begin = number * bucket_size
                length = min(bucket_size, part[LENGTH] - begin)
                given = tensor + np.uint64(item_bytes * begin)
                codes_begin = part[CODES_BEGIN] + number * bucket_bytes
                codes_end = min(codes_begin + bucket_bytes, part[CODES_END])
                bucket = given
                if kind != FLOAT32:
                    halves = carray(word32.half_pointer(given), (length,), np.uint16)
                    widen_values(halves, kind, scratch)
                    bucket = scratch_address
                    largest = _max_magnitude(bucket, length)
                else:
                    if number % group == 0:
                        for later in range(min(group, buckets - number)):
                            rest = part[LENGTH] - begin - later * bucket_size
                            place = given + np.uint64(4 * later * bucket_size)
                            magnitudes[later] = _max_magnitude(place, min(bucket_size, rest))
                    largest = magnitudes[number % group]
                norm_bits = largest
                if norm_bits >= INFINITY:
                    norm_bits = NAN
                elif clip > 0 and norm_bits > 0:
                    norm_bits = clip
                elif is_l2 and norm_bits > 0:
                    norm_bits = _l2_norm(bucket, length, norm_bits, sums)
                if norm_bytes == 2:
                    norm_bits = _round_up_to_bfloat16(norm_bits)
                _write_norm(norms + np.uint64(number * norm_bytes), norm_bytes, norm_bits)
                codes = message + np.uint64(codes_begin)
                if norm_bits == np.uint32(0) or norm_bits >= INFINITY:
                    _bytes_at(codes, codes_end - codes_begin)[:] = np.uint8(0)
                else:
                    norm = word32.float_from_bits(norm_bits)
                    if clip > 0 and largest > norm_bits:
                        _clip_values(bucket, length, norm_bits, scratch_address)
                        bucket = scratch_address
                    if norm < TINY_NORM:
                        _scale_values(bucket, length, TINY_SCALE, scratch_address)
                        bucket = scratch_address
                        norm = np.float32(norm * TINY_SCALE)
                    _encode_tiles(
                        bucket,
                        length,
                        codes,
                        given + bytes_ahead,
                        np.uint64(part[COORDINATE]) + np.uint64(begin),
                        key,
                        np.float32((uniform_scale if is_uniform else np.float32(1.0)) / norm),
                        norm,
                        lines,
                        levels,
                        cells,
                        levels,
                        tail_address,
                        tail_codes_address,
                        bits,
                        lanes,
                        tile_bytes,
                        shift,
                        number_of_method,
                        has_strata,
                        0,
                        0,
                    )
                if (number + 1) % _CHUNK == 0:
                    total += sum_bytes(message, summed, codes_end)
                    summed = codes_end
            padding = _bytes_at(message + np.uint64(part[CODES_END]), part[END] - part[CODES_END])
            padding[:] = np.uint8(0)
            total += sum_bytes(message, summed, part[CODES_END])
            total += sum_bytes(message, part[NORMS_BEGIN], part[NORMS_BEGIN] + buckets * norm_bytes)
        tiles.keep((scratch, tail_values, tail_codes))
        return total

    return _compiled(encode, ENCODE, f"encodes {bits} bits ({method})")


@_inline
def _sum_bucket(  # type: ignore[no-untyped-def]  # Numba infers
    messages, norm_begin, codes_begin, bucket, length, norm_bytes, levels, tail_values, tail_codes, bits, lanes
):
    """Sum one bucket of all messages; returns whether all its norms are finite, and else leaves the sum unfinished.

    The sum, `length` float32, is written to the address `bucket`. norm_begin and codes_begin are the first bytes of the
    norm word and of the codes, counted from a message's start. tail_values, of float32 [ROWS, lanes], and tail_codes,
    of uint8 [bits, lanes], are addresses of scratch memory.
    """
    tile = ROWS * lanes
    full_tiles = length // tile
    rest = length - full_tiles * tile
    for source in range(messages.size):
        norm_bits = _read_norm(messages[source] + np.uint64(norm_begin), norm_bytes)
        if norm_bits >= INFINITY:
            return False
        norm = word32.float_from_bits(norm_bits)
        codes = messages[source] + np.uint64(codes_begin)
        for tile_number in range(full_tiles):
            place = codes + np.uint64(tile_number * bits * lanes)
            target = bucket + np.uint64(4 * tile_number * tile)
            if source == 0:
                tiles.decode_tile(place, target, norm, levels, bits, lanes, 1)
            else:
                tiles.decode_tile(place, target, norm, levels, bits, lanes, 0)
        if rest > 0:
            tail_lanes = (rest + ROWS - 1) // ROWS
            place = codes + np.uint64(full_tiles * bits * lanes)
            _copy_planes(place, tail_lanes, bits, tail_lanes, tail_codes, lanes)
            tiles.decode_tile(tail_codes, tail_values, norm, levels, bits, lanes, 1)
            target = bucket + np.uint64(4 * full_tiles * tile)
            _join_rows(tail_values, rest, tail_lanes, lanes, source > 0, target)
    return True


@cache
def decoder(bits: int, lanes: int, kind: int) -> Kernel:
    """Kernel that decodes parts of several messages, sums them in the order given, and scales; compiles it if need be.

    The kernel takes:
        messages: uint64 [K], addresses of the messages, whose sizes and headers have been checked.
        results: uint64, addresses of the tensors, written.
        parts: int64 [n, PART_FIELDS].
        scale: float32, factor of the sum.
        bucket_size, norm_bytes: of the codebook.
        levels: address of float32 [2^bits], `reference.signed_levels`.

    Args:
        bits: code width.
        lanes: of a full tile.
        kind: dtype of the tensors: FLOAT32, FLOAT16 or BFLOAT16.
    """
    tile = ROWS * lanes
    item_bytes = 4 if kind == FLOAT32 else 2
    sources = _SOURCES

    @cached_kernel
    def decode(messages, results, parts, scale, bucket_size, norm_bytes, levels):  # type: ignore[no-untyped-def]  # Numba infers
        _ = sources
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(tile, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        for index in range(parts.shape[0]):
            part = parts[index]
            tensor = results[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST])
            buckets = (part[LENGTH] + bucket_size - 1) // bucket_size
            for number in range(buckets):
                begin = number * bucket_size
                length = min(bucket_size, part[LENGTH] - begin)
                bucket = np.uint64(scratch.ctypes.data)
                if kind == FLOAT32:
                    bucket = tensor + np.uint64(4 * begin)
                sums = carray(word32.float_pointer(bucket), (length,), np.float32)
                is_finite = _sum_bucket(
                    messages,
                    part[NORMS_BEGIN] + number * norm_bytes,
                    part[CODES_BEGIN] + number * bucket_bytes,
                    bucket,
                    length,
                    norm_bytes,
                    levels,
                    tail_address,
                    tail_codes_address,
                    bits,
                    lanes,
                )
                if is_finite:
                    for place in range(length):
                        sums[place] = np.float32(sums[place] * scale)
                else:
                    sums[:] = word32.float_from_bits(NAN)
                if kind != FLOAT32:
                    halves = carray(word32.half_pointer(tensor + np.uint64(2 * begin)), (length,), np.uint16)
                    round_values(sums, kind, halves)
        tiles.keep((scratch, tail_values, tail_codes))

    return _compiled(decode, DECODE, f"decodes {bits} bits")


@cache
def rotated_encoder(
    bits: int, bucket_size: int, method: str, kind: int, is_stratified: bool, is_nearest: bool
) -> Kernel:
    """Kernel that rotates, quantizes and packs parts (`reference.quantize_rotated`); compiles it if need be.

    The kernel takes an `encoder`'s arguments, with the `RotationKey.words` behind the key, and in the end:
        spread: float32, of the codebook.
        magnitudes: address of float32 [2^(bits-1)], its levels.
        roots: ROOTS.

    Args:
        bits: code width.
        bucket_size: of the codebook.
        method: of the `KernelTable`.
        kind: dtype of the tensors: FLOAT32, FLOAT16 or BFLOAT16.
        is_stratified: whether the key has several strata.
        is_nearest: whether coordinates are rounded to nearest.
    """
    lanes = 32 if bucket_size % (ROWS * 32) == 0 else 16
    shift = fraction_bits(bits)
    uniform_scale = np.float32((2 ** (bits - 1) - 1) << shift)
    number_of_method = METHODS[method]
    is_uniform = method == "uniform"
    item_bytes = 4 if kind == FLOAT32 else 2
    tile_bytes = item_bytes * ROWS * lanes
    has_strata = int(is_stratified and not is_nearest)
    to_nearest = int(is_nearest)
    whole = bucket_size
    sources = _SOURCES

    @cached_kernel
    def encode(  # type: ignore[no-untyped-def]  # Numba infers
        values,
        parts,
        message,
        key,
        rotation,
        bucket_size,
        norm_bytes,
        is_l2,
        clip,
        lines,
        levels,
        cells,
        spread,
        magnitudes,
        roots,
    ):
        _ = sources
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(ROWS * lanes, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        sums = np.empty(L2_LANES, dtype=np.float32)
        words = np.empty(SIGN_LANES, dtype=np.uint32)
        bucket = np.uint64(scratch.ctypes.data)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        root = roots[_block_size(bucket_size)]
        total = np.uint64(0)
        for index in range(parts.shape[0]):
            part = parts[index]
            tensor = values[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST])
            buckets = (part[LENGTH] + bucket_size - 1) // bucket_size
            norms = message + np.uint64(part[NORMS_BEGIN])
            summed = part[CODES_BEGIN]
            for number in range(buckets):
                begin = number * bucket_size
                length = min(bucket_size, part[LENGTH] - begin)
                given = tensor + np.uint64(item_bytes * begin)
                codes_begin = part[CODES_BEGIN] + number * bucket_bytes
                codes_end = min(codes_begin + bucket_bytes, part[CODES_END])
                codes = message + np.uint64(codes_begin)
                source = given
                if kind != FLOAT32:
                    widen_values(carray(word32.half_pointer(given), (length,), np.uint16), kind, scratch)
                    source = bucket
                largest = _max_magnitude(source, length)
                norm_bits = NAN if largest >= INFINITY else np.uint32(0)
                norm = np.float32(0.0)
                power = np.float32(0.0)
                down = np.float32(0.0)
                if largest > np.uint32(0) and largest < INFINITY:
                    field = _exponent_of_scale(largest)
                    up = word32.float_from_bits(np.uint32(field << 23))
                    down = word32.float_from_bits(np.uint32((254 - field) << 23))
                    coordinate = np.uint64(part[COORDINATE]) + np.uint64(begin)
                    high_share = word32.multiply(np.uint32(coordinate >> np.uint64(32)), HIGH_WORD)
                    weyl = word32.multiply(np.uint32(coordinate & np.uint64(0xFFFFFFFF)), WEYL)
                    first = word32.add(rotation[0], high_share)
                    if length == bucket_size:
                        tiles.rotate(source, bucket, up, weyl, first, rotation[1], root, whole)
                    else:
                        _scale_values(source, length, up, bucket)
                        _rotate_tail(scratch[:length], weyl, first, rotation[1], roots, words)
                    if is_nearest:
                        power = _sum_of_squares(bucket, length, np.float32(1.0), sums)
                        norm = np.float32(np.sqrt(np.float32(power / np.float32(length))) * spread)
                    else:
                        norm_bits = _max_magnitude(bucket, length)
                        if is_l2:
                            norm_bits = _l2_norm(bucket, length, norm_bits, sums)
                        norm = np.float32(word32.float_from_bits(norm_bits) * down)
                        norm_bits = word32.minimum(word32.float_bits(norm), LARGEST)
                        if norm_bytes == 2:
                            norm_bits = _round_up_to_bfloat16(norm_bits)
                        norm = np.float32(0.0)
                        if norm_bits < INFINITY:
                            norm = np.float32(word32.float_from_bits(norm_bits) * up)
                if norm > np.float32(0.0):
                    scale = np.float32((uniform_scale if is_uniform else np.float32(1.0)) / norm)
                    _encode_tiles(
                        bucket,
                        length,
                        codes,
                        given + np.uint64(item_bytes * _AHEAD),
                        coordinate,
                        key,
                        scale,
                        norm,
                        lines,
                        levels,
                        cells,
                        magnitudes,
                        tail_address,
                        tail_codes_address,
                        bits,
                        lanes,
                        tile_bytes,
                        shift,
                        number_of_method,
                        has_strata,
                        1,
                        to_nearest,
                    )
                    if is_nearest:
                        ratio = np.float32(power / _sum_of_values(bucket, length, sums))
                        norm_bits = word32.minimum(word32.float_bits(np.float32(ratio * down)), LARGEST)
                        if norm_bytes == 2:
                            norm_bits = _round_to_bfloat16(norm_bits)
                else:
                    _bytes_at(codes, codes_end - codes_begin)[:] = np.uint8(0)
                _write_norm(norms + np.uint64(number * norm_bytes), norm_bytes, norm_bits)
                if (number + 1) % _CHUNK == 0:
                    total += sum_bytes(message, summed, codes_end)
                    summed = codes_end
            padding = _bytes_at(message + np.uint64(part[CODES_END]), part[END] - part[CODES_END])
            padding[:] = np.uint8(0)
            total += sum_bytes(message, summed, part[CODES_END])
            total += sum_bytes(message, part[NORMS_BEGIN], part[NORMS_BEGIN] + buckets * norm_bytes)
        tiles.keep((scratch, tail_values, tail_codes))
        return total

    return _compiled(encode, ENCODE_ROTATED, f"rotates and encodes {bits} bits ({method})")


@cache
def rotated_decoder(bits: int, bucket_size: int, kind: int) -> Kernel:
    """Kernel that decodes parts of several messages, sums, rotates back, and scales; compiles it if need be.

    The kernel takes a `decoder`'s arguments, with the `RotationKey.words` behind the scale, and in the end ROOTS.

    Args:
        bits: code width.
        bucket_size: of the codebook.
        kind: dtype of the tensors: FLOAT32, FLOAT16 or BFLOAT16.
    """
    lanes = 32 if bucket_size % (ROWS * 32) == 0 else 16
    item_bytes = 4 if kind == FLOAT32 else 2
    whole = bucket_size
    sources = _SOURCES

    @cached_kernel
    def decode(  # type: ignore[no-untyped-def]  # Numba infers
        messages, results, parts, scale, rotation, bucket_size, norm_bytes, levels, roots
    ):
        _ = sources
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(ROWS * lanes, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        words = np.empty(SIGN_LANES, dtype=np.uint32)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        root = roots[_block_size(bucket_size)]
        for index in range(parts.shape[0]):
            part = parts[index]
            tensor = results[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST])
            buckets = (part[LENGTH] + bucket_size - 1) // bucket_size
            for number in range(buckets):
                begin = number * bucket_size
                length = min(bucket_size, part[LENGTH] - begin)
                bucket = np.uint64(scratch.ctypes.data)
                if kind == FLOAT32:
                    bucket = tensor + np.uint64(4 * begin)
                sums = carray(word32.float_pointer(bucket), (length,), np.float32)
                is_finite = _sum_bucket(
                    messages,
                    part[NORMS_BEGIN] + number * norm_bytes,
                    part[CODES_BEGIN] + number * bucket_bytes,
                    bucket,
                    length,
                    norm_bytes,
                    levels,
                    tail_address,
                    tail_codes_address,
                    bits,
                    lanes,
                )
                if not is_finite:
                    sums[:] = word32.float_from_bits(NAN)
                else:
                    coordinate = np.uint64(part[COORDINATE]) + np.uint64(begin)
                    high_share = word32.multiply(np.uint32(coordinate >> np.uint64(32)), HIGH_WORD)
                    weyl = word32.multiply(np.uint32(coordinate & np.uint64(0xFFFFFFFF)), WEYL)
                    first = word32.add(rotation[0], high_share)
                    if length == bucket_size:
                        tiles.rotate_back(bucket, scale, weyl, first, rotation[1], root, whole)
                    else:
                        _rotate_tail_back(sums, weyl, first, rotation[1], roots, words)
                        for place in range(length):
                            value = np.float32(sums[place] * scale)
                            sums[place] = word32.float_from_bits(NAN) if np.isnan(value) else value
                if kind != FLOAT32:
                    halves = carray(word32.half_pointer(tensor + np.uint64(2 * begin)), (length,), np.uint16)
                    round_values(sums, kind, halves)
        tiles.keep((scratch, tail_values, tail_codes))

    return _compiled(decode, DECODE_ROTATED, f"decodes {bits} bits and rotates back")


@cached_kernel
def _copy_exact(values, parts, message, item_bytes):  # type: ignore[no-untyped-def]  # Numba infers
    total = np.uint64(0)
    for index in range(parts.shape[0]):
        part = parts[index]
        size = part[LENGTH] * item_bytes
        source = _bytes_at(values[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST]), size)
        target = _bytes_at(message + np.uint64(part[CODES_BEGIN]), part[END] - part[CODES_BEGIN])
        target[:size] = source
        target[size:] = np.uint8(0)
        total += sum_bytes(message, part[CODES_BEGIN], part[CODES_END])
    return total


@_inline
def _value_at(address, kind, place):  # type: ignore[no-untyped-def]  # Numba infers
    """A value of up to 32 bits as float32."""
    if kind == FLOAT32:
        return carray(word32.float_pointer(address), (place + 1,), np.float32)[place]
    half = np.uint32(carray(word32.half_pointer(address), (place + 1,), np.uint16)[place])
    if kind == FLOAT16:
        return _widen_half(half)
    return word32.float_from_bits(word32.shift_left(half, np.uint32(16)))


@cached_kernel
def _sum_exact(messages, results, parts, scale, kind):  # type: ignore[no-untyped-def]  # Numba infers
    item_bytes = 8 if kind == FLOAT64 else (4 if kind == FLOAT32 else 2)
    for index in range(parts.shape[0]):
        part = parts[index]
        length = part[LENGTH]
        begin = np.uint64(part[CODES_BEGIN])
        tensor = results[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST])
        if kind == FLOAT64:
            doubles = carray(word32.double_pointer(tensor), (length,), np.float64)
            for place in range(length):
                wide = np.float64(-0.0)
                for source in range(messages.size):
                    received = carray(word32.double_pointer(messages[source] + begin), (length,), np.float64)
                    wide += received[place]
                doubles[place] = wide * np.float64(scale)
            continue
        for place in range(length):
            total = np.float32(-0.0)  # the sum of -0 and x is x, whatever the sign of a zero x
            for source in range(messages.size):
                total = np.float32(total + _value_at(messages[source] + begin, kind, place))
            total = np.float32(total * scale)
            if kind == FLOAT32:
                carray(word32.float_pointer(tensor), (length,), np.float32)[place] = total
            else:
                half = _rounded_to_half(total) if kind == FLOAT16 else _rounded_to_bfloat16(total)
                carray(word32.half_pointer(tensor), (length,), np.uint16)[place] = np.uint16(half)


@cache
def exact_encoder() -> Kernel:
    """Kernel that copies parts whose values travel raw.

    It takes the first three arguments of an `encoder`'s kernel, and item_bytes: the bytes of one value.
    """
    return _compiled(_copy_exact, COPY, "copies exact values")


@cache
def exact_decoder() -> Kernel:
    """Kernel that sums parts whose values travel raw, in float32 (float64 for float64).

    It takes the first four arguments of a `decoder`'s kernel, and kind: FLOAT32, FLOAT16, BFLOAT16 or FLOAT64.
    """
    return _compiled(_sum_exact, SUM, "sums exact values")


@cache
def byte_summer() -> Kernel:
    """Kernel `sum_bytes`."""
    return _compiled(sum_bytes, SUM_BYTES, "sums a checksum")
