"""Numba CPU kernels: `reference.py`, fast. Each must give the reference's bits.

A kernel is compiled per (code width, lanes, rounding method, gradient dtype) on first use and cached on disk. Kernels
release the GIL, allocate nothing but one bucket of scratch, and never read or write outside the arrays they are given.

What makes them fast: all arithmetic on 32-bit words (`word32.py`), rounding to nearest by adding 1.5 * 2^23 and reading
the low bits, one hash for two coordinates, and inner loops over a literal number of lanes that the compiler turns into
vector instructions without shuffles.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types
from numba.extending import overload
from numba.np.unsafe.ndarray import to_fixed_tuple

from qoda_kernels import word32
from qoda_kernels.codebook import ROWS, Codebook
from qoda_kernels.dither import (
    FIRST_MULTIPLIER,
    HIGH_WORD_MULTIPLIER,
    SECOND_MULTIPLIER,
    WEYL_MULTIPLIER,
    DitherKey,
)
from qoda_kernels.reference import (
    INFINITY_BITS,
    L2_LANES,
    NAN_BITS,
    TINY_NORM,
    TINY_SCALE,
    RoundingTable,
    fraction_bits,
)

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
_MOST_CELLS = 2048

_MAGNITUDE, _SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x80000000)
_INFINITY = np.uint32(INFINITY_BITS)
_NAN = np.uint32(NAN_BITS)
_LARGEST = np.uint32(0x7F7FFFFF)
_ROUNDING_CONSTANT = np.float32(1.5 * 2.0**23)  # x + it has the ulp 1, so its low bits are rint(x)
_ROUNDING_BITS = np.uint32(0x4B400000)
_WEYL = np.uint32(WEYL_MULTIPLIER)
_FIRST = np.uint32(FIRST_MULTIPLIER)
_SECOND = np.uint32(SECOND_MULTIPLIER)
_HIGH_WORD = np.uint32(HIGH_WORD_MULTIPLIER)
_TINY_NORM = np.float32(TINY_NORM)
_TINY_SCALE = np.float32(TINY_SCALE)
_LOW_HALF = np.uint32(0xFFFF)

_inline = njit(inline="always", nogil=True, error_model="numpy")
_kernel = njit(nogil=True, error_model="numpy", cache=True)


@_inline
def _hash(weyl: np.uint32, first: np.uint32, second: np.uint32) -> np.uint32:
    """`dither.hash32` of a coordinate.

    Args:
        weyl: low word of the coordinate's number times the Weyl multiplier.
        first: first key word plus the share of the high word.
        second: second key word.
    """
    word = word32.bit_xor(weyl, first)
    word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
    word = word32.bit_xor(word32.multiply(word, _FIRST), second)
    word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
    word = word32.multiply(word, _SECOND)
    return word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))


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


@_kernel
def _max_magnitude(bucket: npt.NDArray[np.float32]) -> np.uint32:
    """Largest magnitude of a bucket, as float32 bits; NaN and infinity compare as the largest."""
    largest = np.uint32(0)
    for index in range(bucket.size):
        largest = word32.maximum(largest, word32.bit_and(word32.float_bits(bucket[index]), _MAGNITUDE))
    return largest


@_kernel
def _l2_norm(bucket: npt.NDArray[np.float32], largest: np.uint32, lanes: npt.NDArray[np.float32]) -> np.uint32:
    """Euclidean norm of a finite bucket that is not all zero, as float32 bits (`reference.bucket_norm`)."""
    field = min(max(254 - int(largest >> np.uint32(23)), 1), 253)
    scale = word32.float_from_bits(np.uint32(field << 23))
    lanes[:] = np.float32(0.0)
    rows = bucket.size // L2_LANES
    for row in range(rows):
        part = bucket[row * L2_LANES : (row + 1) * L2_LANES]
        for lane in range(L2_LANES):
            scaled = np.float32(part[lane] * scale)
            lanes[lane] = np.float32(lanes[lane] + np.float32(scaled * scaled))
    for lane in range(bucket.size - rows * L2_LANES):
        scaled = np.float32(bucket[rows * L2_LANES + lane] * scale)
        lanes[lane] = np.float32(lanes[lane] + np.float32(scaled * scaled))
    width = L2_LANES // 2
    while width > 0:
        for lane in range(width):
            lanes[lane] = np.float32(lanes[lane] + lanes[lane + width])
        width //= 2
    length = np.float32(np.sqrt(lanes[0]) * word32.float_from_bits(np.uint32((254 - field) << 23)))
    return word32.minimum(word32.float_bits(length), _LARGEST)


@_kernel
def _round_up_to_bfloat16(word: np.uint32) -> np.uint32:
    """A non-negative norm as float32 bits, rounded up to bfloat16; NaN for a norm that is not finite."""
    if word >= _INFINITY:
        return _NAN
    return word32.bit_and(word32.add(word, _LOW_HALF), np.uint32(0xFFFF0000))


@_kernel
def word_sums(words: npt.NDArray[np.uint32], first: int) -> tuple[np.uint64, np.uint64]:
    """Sum of 32-bit words, and sum weighted by their positions first, first + 1, ..., modulo 2^64 (`wire.py`)."""
    total = np.uint64(0)
    weighted = np.uint64(0)
    for index in range(words.size):
        word = np.uint64(words[index])
        total += word
        weighted += np.uint64(index + first) * word
    return total, weighted


@dataclass(frozen=True)
class KernelTable:
    """A rounding table as the kernels read it.

    Method "cells" finds the interval without a search: [0, 1] is cut into equal cells, few enough to stay in the
    fastest cache and so many that no cell holds two levels. A coordinate's cell and whether it lies above the level in
    it tell its line.

    Attributes:
        method: "uniform", "minimum", "search" as in the rounding table, or "cells" in place of "search".
        cells: number of cells; 0 for the other methods.
        slopes: float32, of each line; with cells 2 per cell, for coordinates below and above its level.
        intercepts: float32, likewise.
        levels: float32: the levels; with cells the level in each cell, or 2 where there is none.
    """

    method: str
    cells: int
    slopes: npt.NDArray[np.float32]
    intercepts: npt.NDArray[np.float32]
    levels: npt.NDArray[np.float32]


def kernel_table(table: RoundingTable) -> KernelTable:
    """The table that makes the kernels give the positions of a rounding table."""
    if table.method != "search":
        return KernelTable(table.method, 0, table.slopes, table.intercepts, table.levels)
    inner = table.levels[1:-1]
    for cells in (256, 512, 1024, _MOST_CELLS):
        place = (inner * np.float32(cells)).astype(np.int64)
        if np.unique(place).size == inner.size:
            below = np.searchsorted(place, np.arange(cells + 1), side="left")
            line = np.stack([below, np.minimum(below + 1, inner.size)], axis=1).ravel()
            levels = np.full(cells + 1, 2.0, dtype=np.float32)
            levels[place] = inner
            return KernelTable("cells", cells, table.slopes[line], table.intercepts[line], levels)
    return KernelTable("search", 0, table.slopes, table.intercepts, table.levels)


def _position(magnitude, multiplier, slopes, intercepts, levels):  # type: ignore[no-untyped-def]  # Numba infers
    """Position of a magnitude on the scale of level indices, times 2^F (`reference.fixed_point`)."""
    raise AssertionError("for compiled code only")


@overload(_position, inline="always")
def _overload_position(magnitude, multiplier, slopes, intercepts, levels):  # type: ignore[no-untyped-def]  # Numba infers
    if isinstance(slopes, types.NoneType):
        return lambda magnitude, multiplier, slopes, intercepts, levels: np.float32(magnitude * multiplier)
    if isinstance(levels, types.NoneType):
        return lambda magnitude, multiplier, slopes, intercepts, levels: word32.least_line(
            slopes, intercepts, np.float32(magnitude * multiplier)
        )

    def look_up(magnitude, multiplier, slopes, intercepts, levels):  # type: ignore[no-untyped-def]  # Numba infers
        boundaries, count = levels
        normalised = np.float32(magnitude * multiplier)
        cell = word32.truncated(np.float32(normalised * count))
        is_above = word32.is_at_most(word32.element(boundaries, cell), normalised)
        line = word32.bit_or(word32.shift_left(cell, np.uint32(1)), is_above)
        return word32.fused_multiply_add(word32.element(slopes, line), normalised, word32.element(intercepts, line))

    def search(magnitude, multiplier, slopes, intercepts, levels):  # type: ignore[no-untyped-def]  # Numba infers
        table, halvings, last = levels
        normalised = np.float32(magnitude * multiplier)
        index = word32.minimum(word32.last_not_above(table, halvings, normalised), last)
        return word32.fused_multiply_add(word32.element(slopes, index), normalised, word32.element(intercepts, index))

    return look_up if len(levels) == 2 else search


@_inline
def _code(value, random, multiplier, slopes, intercepts, levels, bits, shift):  # type: ignore[no-untyped-def]  # Numba infers
    """Code word of one coordinate, given 16 random bits."""
    word = word32.float_bits(value)
    magnitude = word32.float_from_bits(word32.bit_and(word, _MAGNITUDE))
    position = _position(magnitude, multiplier, slopes, intercepts, levels)
    fixed = word32.subtract(word32.float_bits(np.float32(position + _ROUNDING_CONSTANT)), _ROUNDING_BITS)
    dithered = word32.add(fixed, word32.shift_right(random, np.uint32(16 - shift)))
    level = word32.minimum(word32.shift_right(dithered, np.uint32(shift)), np.uint32((1 << (bits - 1)) - 1))
    sign = word32.bit_and(word32.shift_right(word, np.uint32(32 - bits)), np.uint32(1 << (bits - 1)))
    return word32.bit_or(level, sign)


@_inline
def _lane_words(upper_codes, lower_codes, lane, lanes, bits):  # type: ignore[no-untyped-def]  # Numba infers
    """Codes of one lane's rows 0-3 as one word, and of its rows 4-7 as another."""
    low = np.uint32(0)
    high = np.uint32(0)
    for row in range(ROWS // 2):
        position = np.uint32(row * bits)
        low = word32.bit_or(low, word32.shift_left(np.uint32(upper_codes[row * lanes + lane]), position))
        high = word32.bit_or(high, word32.shift_left(np.uint32(lower_codes[row * lanes + lane]), position))
    return low, high


@_inline
def _plane(low, high, index, bits):  # type: ignore[no-untyped-def]  # Numba infers
    """Byte `index` of a lane's 8 * bits bits; `low` holds the codes of rows 0-3, `high` those of rows 4-7."""
    begin = 8 * index
    middle = 4 * bits
    if begin + 8 <= middle:
        return word32.low_byte(word32.shift_right(low, np.uint32(begin)))
    if begin >= middle:
        return word32.low_byte(word32.shift_right(high, np.uint32(begin - middle)))
    lower = word32.shift_right(low, np.uint32(begin))
    return word32.low_byte(word32.bit_or(lower, word32.shift_left(high, np.uint32(middle - begin))))


@_kernel
def round_to_bfloat16(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint16]) -> None:
    """Bits of values rounded to bfloat16 (`reference.bfloat16_bits`); torch gives NaN other bits on other targets."""
    for index in range(values.size):
        bits = word32.float_bits(values[index])
        odd = word32.bit_and(word32.shift_right(bits, np.uint32(16)), np.uint32(1))
        rounded = word32.add(bits, word32.add(odd, np.uint32(0x7FFF)))
        if word32.bit_and(bits, _MAGNITUDE) > _INFINITY:
            rounded = _NAN
        out[index] = np.uint16(word32.shift_right(rounded, np.uint32(16)))


@cache
def slice_encoder(bits: int, lanes: int, method: str, kind: int) -> Callable[..., None]:
    """Kernel that quantizes and packs one slice; see `quantize` for its arguments."""
    shift = fraction_bits(bits)
    steps = 2 ** (bits - 1) - 1
    uniform_scale = np.float32(steps << shift)
    is_uniform, is_minimum, has_cells = method == "uniform", method == "minimum", method == "cells"
    capacity = 2 * _MOST_CELLS + 2 if has_cells else 128
    tile, half = ROWS * lanes, ROWS // 2 * lanes
    halvings = (0,) * (bits - 1)

    @_kernel
    def encode(  # type: ignore[no-untyped-def]  # Numba infers
        values,
        norms,
        codes,
        coordinate,
        key_first,
        key_second,
        bucket_size,
        norm_bytes,
        is_l2,
        clip,
        cells,
        slope_table,
        intercept_table,
        level_table,
    ):
        scratch = np.empty(bucket_size, dtype=np.float32)
        sums = np.empty(L2_LANES, dtype=np.float32)
        tile_codes = carray(word32.private_bytes(), (tile,), np.uint8)
        upper_codes = tile_codes[:half]
        lower_codes = tile_codes[half:]
        if is_uniform:
            slopes = None
            intercepts = None
            levels = None
        elif is_minimum:
            slopes = to_fixed_tuple(slope_table, steps)
            intercepts = to_fixed_tuple(intercept_table, steps)
            levels = None
        else:
            slopes = word32.private_table(slope_table, capacity)
            intercepts = word32.private_table(intercept_table, capacity)
            table = word32.private_table(level_table, capacity)
            levels = (table, np.float32(cells)) if has_cells else (table, halvings, np.uint32(steps - 1))
        for number in range(norms.size // norm_bytes):
            begin = number * bucket_size
            given = values[begin : begin + bucket_size]
            packed_bucket = codes[begin // ROWS * bits : (begin + bucket_size) // ROWS * bits]
            if kind == FLOAT32:
                bucket = given
            else:
                for index in range(given.size):
                    if kind == FLOAT16:
                        scratch[index] = _widen_half(np.uint32(given[index]))
                    else:
                        word = word32.shift_left(np.uint32(given[index]), np.uint32(16))
                        scratch[index] = word32.float_from_bits(word)
                bucket = scratch[: given.size]
            largest = _max_magnitude(bucket)
            norm_bits = largest
            if norm_bits >= _INFINITY:
                norm_bits = _NAN
            elif clip > 0 and norm_bits > 0:
                norm_bits = clip
            elif is_l2 and norm_bits > 0:
                norm_bits = _l2_norm(bucket, norm_bits, sums)
            if norm_bytes == 2:
                norm_bits = _round_up_to_bfloat16(norm_bits)
            for index in range(norm_bytes):
                position = np.uint32(8 * (index + 4 - norm_bytes))
                norms[number * norm_bytes + index] = word32.low_byte(word32.shift_right(norm_bits, position))
            if norm_bits == np.uint32(0) or norm_bits >= _INFINITY:
                packed_bucket[:] = np.uint8(0)
                continue
            norm = word32.float_from_bits(norm_bits)
            if clip > 0 and largest > norm_bits:
                for index in range(bucket.size):
                    word = word32.float_bits(bucket[index])
                    clipped = word32.minimum(word32.bit_and(word, _MAGNITUDE), norm_bits)
                    scratch[index] = word32.float_from_bits(word32.bit_or(clipped, word32.bit_and(word, _SIGN)))
                bucket = scratch[: bucket.size]
            if norm < _TINY_NORM:
                for index in range(bucket.size):
                    scratch[index] = np.float32(bucket[index] * _TINY_SCALE)
                bucket = scratch[: bucket.size]
                norm = np.float32(norm * _TINY_SCALE)
            multiplier = np.float32((uniform_scale if is_uniform else np.float32(1.0)) / norm)
            place = np.uint64(coordinate) + np.uint64(begin)
            low_place = np.uint32(place & np.uint64(0xFFFFFFFF))
            high_place = np.uint32(place >> np.uint64(32))
            first = word32.add(key_first, word32.multiply(high_place, _HIGH_WORD))
            tiles = bucket.size // tile
            for tile_number in range(tiles):
                upper = bucket[tile_number * tile : tile_number * tile + half]
                lower = bucket[tile_number * tile + half : (tile_number + 1) * tile]
                weyl = word32.multiply(word32.add(low_place, np.uint32(tile_number * tile)), _WEYL)
                for index in range(half):
                    random = _hash(word32.add(weyl, word32.multiply(np.uint32(index), _WEYL)), first, key_second)
                    low_half = word32.bit_and(random, _LOW_HALF)
                    high_half = word32.shift_right(random, np.uint32(16))
                    code = _code(upper[index], low_half, multiplier, slopes, intercepts, levels, bits, shift)
                    upper_codes[index] = word32.low_byte(code)
                    code = _code(lower[index], high_half, multiplier, slopes, intercepts, levels, bits, shift)
                    lower_codes[index] = word32.low_byte(code)
                packed = packed_bucket[tile_number * bits * lanes : (tile_number + 1) * bits * lanes]
                for lane in range(lanes):
                    low, high = _lane_words(upper_codes, lower_codes, lane, lanes, bits)
                    for index in range(bits):
                        packed[index * lanes + lane] = _plane(low, high, index, bits)
            rest = bucket.size - tiles * tile
            tail_lanes = (rest + ROWS - 1) // ROWS
            tail_half = ROWS // 2 * tail_lanes
            tail = bucket[tiles * tile :]
            upper_codes[:tail_half] = np.uint8(0)
            lower_codes[:tail_half] = np.uint8(0)
            weyl = word32.multiply(word32.add(low_place, np.uint32(tiles * tile)), _WEYL)
            for index in range(min(tail_half, rest)):
                random = _hash(word32.add(weyl, word32.multiply(np.uint32(index), _WEYL)), first, key_second)
                low_half = word32.bit_and(random, _LOW_HALF)
                code = _code(tail[index], low_half, multiplier, slopes, intercepts, levels, bits, shift)
                upper_codes[index] = word32.low_byte(code)
                if index + tail_half < rest:
                    high_half = word32.shift_right(random, np.uint32(16))
                    code = _code(
                        tail[index + tail_half], high_half, multiplier, slopes, intercepts, levels, bits, shift
                    )
                    lower_codes[index] = word32.low_byte(code)
            packed = packed_bucket[tiles * bits * lanes :]
            for lane in range(tail_lanes):
                low, high = _lane_words(upper_codes, lower_codes, lane, tail_lanes, bits)
                for index in range(bits):
                    packed[index * tail_lanes + lane] = _plane(low, high, index, bits)

    return encode


@_inline
def _lane_codes(planes, lane, lanes, bits):  # type: ignore[no-untyped-def]  # Numba infers
    """Codes of one lane: rows 0-3 in the low bits of the first word, rows 4-7 in those of the second."""
    low = np.uint32(0)
    high = np.uint32(0)
    middle = 4 * bits
    for index in range(bits):
        byte = np.uint32(planes[index * lanes + lane])
        begin = 8 * index
        if begin < middle:
            low = word32.bit_or(low, word32.shift_left(byte, np.uint32(begin)))
        if begin >= middle:
            high = word32.bit_or(high, word32.shift_left(byte, np.uint32(begin - middle)))
        elif begin + 8 > middle:
            high = word32.bit_or(high, word32.shift_right(byte, np.uint32(middle - begin)))
    return low, high


@cache
def slice_decoder(bits: int, lanes: int) -> Callable[..., None]:
    """Kernel that decodes one slice of several messages and sums it; see `decode_mean` for its arguments."""
    mask = np.uint32((1 << bits) - 1)
    tile, half = ROWS * lanes, ROWS // 2 * lanes

    @_kernel
    def decode(addresses, norms_begin, codes_begin, codes_bytes, out, bucket_size, norm_bytes, levels, scale):  # type: ignore[no-untyped-def]  # Numba infers
        table = word32.private_table(levels, 256)
        tile_codes = carray(word32.private_bytes(), (tile,), np.uint8)
        buckets = (out.size + bucket_size - 1) // bucket_size
        for number in range(buckets):
            begin = number * bucket_size
            bucket = out[begin : begin + bucket_size]
            bucket[:] = np.float32(-0.0)  # the sum of -0 and x is x, whatever the sign of a zero x
            is_finite = True
            for source in range(addresses.size):
                address = np.uint64(addresses[source])
                norm_place = word32.address_to_pointer(address + np.uint64(norms_begin + number * norm_bytes))
                word_bytes = carray(norm_place, (norm_bytes,), np.uint8)
                norm_bits = np.uint32(0)
                for index in range(norm_bytes):
                    position = np.uint32(8 * (index + 4 - norm_bytes))
                    norm_bits = word32.bit_or(norm_bits, word32.shift_left(np.uint32(word_bytes[index]), position))
                if norm_bits >= _INFINITY:
                    is_finite = False
                    continue
                norm = word32.float_from_bits(norm_bits)
                codes_place = word32.address_to_pointer(address + np.uint64(codes_begin))
                codes = carray(codes_place, (codes_bytes,), np.uint8)[begin // ROWS * bits :]
                tiles = bucket.size // tile
                for tile_number in range(tiles):
                    planes = codes[tile_number * bits * lanes : (tile_number + 1) * bits * lanes]
                    for lane in range(lanes):
                        low, high = _lane_codes(planes, lane, lanes, bits)
                        for row in range(ROWS // 2):
                            position = np.uint32(row * bits)
                            code = word32.bit_and(word32.shift_right(low, position), mask)
                            tile_codes[row * lanes + lane] = word32.low_byte(code)
                            code = word32.bit_and(word32.shift_right(high, position), mask)
                            tile_codes[half + row * lanes + lane] = word32.low_byte(code)
                    values = bucket[tile_number * tile : (tile_number + 1) * tile]
                    for index in range(tile):
                        level = word32.element(table, np.uint32(tile_codes[index]))
                        values[index] = np.float32(values[index] + np.float32(norm * level))
                rest = bucket.size - tiles * tile
                tail_lanes = (rest + ROWS - 1) // ROWS
                tail = bucket[tiles * tile :]
                planes = codes[tiles * bits * lanes :]
                for lane in range(tail_lanes):
                    low, high = _lane_codes(planes, lane, tail_lanes, bits)
                    for row in range(ROWS):
                        place = row * tail_lanes + lane
                        if place < rest:
                            word = low if row < ROWS // 2 else high
                            code_shift = np.uint32((row % (ROWS // 2)) * bits)
                            code = word32.bit_and(word32.shift_right(word, code_shift), mask)
                            level = word32.element(table, code)
                            tail[place] = np.float32(tail[place] + np.float32(norm * level))
            if is_finite:
                for index in range(bucket.size):
                    bucket[index] = np.float32(bucket[index] * scale)
            else:
                bucket[:] = word32.float_from_bits(_NAN)

    return decode


def quantize(
    values: npt.NDArray[Any],
    kind: int,
    codebook: Codebook,
    table: KernelTable,
    coordinate: int,
    key: DitherKey,
    norms: npt.NDArray[np.uint8],
    codes: npt.NDArray[np.uint8],
) -> None:
    """Quantize and pack one slice.

    Args:
        values: float32 [n], or uint16 [n] with the bits of float16 or bfloat16; contiguous.
        kind: FLOAT32, FLOAT16 or BFLOAT16.
        codebook: not exact.
        table: `kernel_table` of it.
        coordinate: number of the slice's first coordinate in the whole model.
        key: random stream of the sender.
        norms: uint8, bytes of the norm words, written.
        codes: uint8, exactly the packed size, written.
    """
    encoder = slice_encoder(codebook.bits, codebook.format.lanes, table.method, kind)
    encoder(
        values,
        norms,
        codes,
        np.uint64(coordinate),
        np.uint32(key.first),
        np.uint32(key.second),
        codebook.bucket_size,
        codebook.format.norm_bytes,
        codebook.norm == "l2",
        np.float32(codebook.clip).view(np.uint32),
        table.cells,
        table.slopes,
        table.intercepts,
        table.levels,
    )


def decode_mean(
    addresses: npt.NDArray[np.uint64],
    norms_begin: int,
    codes_begin: int,
    codes_bytes: int,
    codebook: Codebook,
    levels: npt.NDArray[np.float32],
    scale: np.float32,
    out: npt.NDArray[np.float32],
) -> None:
    """Decode one slice of several messages, sum in the order given, and scale.

    Args:
        addresses: uint64 [K], where each message starts in memory; the caller has checked sizes and headers.
        norms_begin: first byte of the slice's norms in each message.
        codes_begin: first byte of its codes.
        codes_bytes: bytes of its codes.
        codebook: not exact.
        levels: float32 [2^bits], `reference.signed_levels`.
        scale: factor of the sum.
        out: float32 [n], written.
    """
    decoder = slice_decoder(codebook.bits, codebook.format.lanes)
    decoder(
        addresses,
        norms_begin,
        codes_begin,
        codes_bytes,
        out,
        codebook.bucket_size,
        codebook.format.norm_bytes,
        levels,
        scale,
    )
