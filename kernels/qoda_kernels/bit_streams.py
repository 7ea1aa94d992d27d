"""Numba kernels of the bit streams that `entropy_reference.py` defines: the same bytes, fast.

The encoder joins the code words of four symbols before it touches the bit position, so that the chain of dependent
instructions is one step per four symbols. The decoder reads the four streams of a chunk in turns: while one waits for
its table, the others go on. A position never passes the end of its stream by more than one bit, so damaged bytes can
lead to wrong symbols and then to an error, but not out of bounds. Words are little-endian, as on x86-64 and arm64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from qoda_kernels.codebook import ROWS
from qoda_kernels.compilation import cached_kernel
from qoda_kernels.entropy_reference import CHUNK_SYMBOLS, STREAMS, TAIL_BYTES, codes_per_symbol
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.prefix_codes import MAX_WORD_BITS, UInt32Array

ByteArray = npt.NDArray[np.uint8]

_STREAM_SYMBOLS = CHUNK_SYMBOLS // STREAMS
_MAX_STREAM_BYTES = -(-_STREAM_SYMBOLS * MAX_WORD_BITS // 8)

_inline = njit(nogil=True, error_model="numpy")


@intrinsic
def _load64(context: Any, array: Any, index: Any) -> tuple[Signature, Callable[..., Any]]:
    """Eight bytes of a contiguous uint8 array from a byte index that is known to lie inside, as uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, types.int64), generate


@intrinsic
def _store64(context: Any, array: Any, index: Any, word: Any) -> tuple[Signature, Callable[..., Any]]:
    """Write a uint64 to a contiguous uint8 array at a byte index that is known to lie inside."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.gep(data, [arguments[1]])
        builder.store(arguments[2], builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, types.uint64), generate


@_inline
def _encode_stream(symbols, begin, end, table, out, position):  # type: ignore[no-untyped-def]  # Numba infers
    """Write one stream from byte `position` on; returns the byte behind it. Up to 7 bytes beyond are overwritten."""
    buffer = np.uint64(0)
    used = np.uint64(0)
    low = np.uint64(0xFFFF)
    half = np.uint64(16)
    whole = end - (end - begin) % 4
    for index in range(begin, whole, 4):
        first = np.uint64(table[symbols[index]])
        second = np.uint64(table[symbols[index + 1]])
        third = np.uint64(table[symbols[index + 2]])
        fourth = np.uint64(table[symbols[index + 3]])
        front_length = (first >> half) + (second >> half)
        front = (first & low) | (second & low) << (first >> half)
        back = (third & low) | (fourth & low) << (third >> half)
        buffer |= (front | back << front_length) << used
        used += front_length + (third >> half) + (fourth >> half)
        _store64(out, position, buffer)
        position += np.int64(used >> np.uint64(3))
        buffer >>= used & np.uint64(56)
        used &= np.uint64(7)
    for index in range(whole, end):
        entry = np.uint64(table[symbols[index]])
        buffer |= (entry & low) << used
        used += entry >> half
        _store64(out, position, buffer)
        position += np.int64(used >> np.uint64(3))
        buffer >>= used & np.uint64(56)
        used &= np.uint64(7)
    if used:
        _store64(out, position, buffer)
        position += 1
    return position


@_inline
def _decode_four(data, position, stop, table, mask, symbols, index):  # type: ignore[no-untyped-def]  # Numba infers
    """Decode four symbols of one stream; returns the new bit position, at most `stop`."""
    word = _load64(data, position >> 3) >> np.uint64(position & 7)
    first = np.uint64(table[word & mask])
    word >>= first & np.uint64(63)
    second = np.uint64(table[word & mask])
    word >>= second & np.uint64(63)
    third = np.uint64(table[word & mask])
    word >>= third & np.uint64(63)
    fourth = np.uint64(table[word & mask])
    symbols[index] = np.uint8(first >> np.uint64(16))
    symbols[index + 1] = np.uint8(second >> np.uint64(16))
    symbols[index + 2] = np.uint8(third >> np.uint64(16))
    symbols[index + 3] = np.uint8(fourth >> np.uint64(16))
    low = np.uint64(0xFFFF)
    advance = (first & low) + (second & low) + (third & low) + (fourth & low)
    return min(position + np.int64(advance), stop)


@_inline
def _decode_rest(data, position, stop, table, mask, symbols, begin, end):  # type: ignore[no-untyped-def]  # Numba infers
    """Decode symbols of one stream one by one; returns the new bit position, at most `stop`."""
    for index in range(begin, end):
        word = _load64(data, position >> 3) >> np.uint64(position & 7)
        entry = np.uint64(table[word & mask])
        symbols[index] = np.uint8(entry >> np.uint64(16))
        position = min(position + np.int64(entry & np.uint64(0xFFFF)), stop)
    return position


@_inline
def _ends_well(data, position, begin, end):  # type: ignore[no-untyped-def]  # Numba infers
    """Whether a stream of the bytes [begin, end) was read to its last byte, with zeros behind its last bit."""
    if position <= 8 * (end - 1) or position > 8 * end:
        return position == 8 * begin and begin == end
    return (position & 7) == 0 or (np.int64(data[end - 1]) >> (position & 7)) == 0


@cached_kernel
def _encode_chunk(symbols, table, out, position, sizes):  # type: ignore[no-untyped-def]  # Numba infers
    """Write the streams of one chunk from byte `position` on and their sizes; returns the byte behind them."""
    share = (symbols.size + STREAMS - 1) // STREAMS
    for stream in range(STREAMS):
        begin = min(stream * share, symbols.size)
        end = min(begin + share, symbols.size)
        behind = _encode_stream(symbols, begin, end, table, out, position)
        sizes[stream] = behind - position
        position = behind
    return position


@cached_kernel
def _decode_chunk(data, bounds, table, symbols):  # type: ignore[no-untyped-def]  # Numba infers
    """Decode one chunk; returns the first stream that does not end with its last symbol, or -1.

    bounds: int64 [STREAMS + 1], bytes at which the streams begin, and the end of the last one.
    """
    size = symbols.size
    share = (size + STREAMS - 1) // STREAMS
    mask = np.uint64(table.size - 1)
    begin1, begin2, begin3 = min(share, size), min(2 * share, size), min(3 * share, size)
    position0, position1, position2, position3 = 8 * bounds[0], 8 * bounds[1], 8 * bounds[2], 8 * bounds[3]
    stop0, stop1, stop2, stop3 = 8 * bounds[1] + 1, 8 * bounds[2] + 1, 8 * bounds[3] + 1, 8 * bounds[4] + 1
    common = (size - begin3) // 4 * 4
    for index in range(0, common, 4):
        position0 = _decode_four(data, position0, stop0, table, mask, symbols, index)
        position1 = _decode_four(data, position1, stop1, table, mask, symbols, begin1 + index)
        position2 = _decode_four(data, position2, stop2, table, mask, symbols, begin2 + index)
        position3 = _decode_four(data, position3, stop3, table, mask, symbols, begin3 + index)
    position0 = _decode_rest(data, position0, stop0, table, mask, symbols, common, begin1)
    position1 = _decode_rest(data, position1, stop1, table, mask, symbols, begin1 + common, begin2)
    position2 = _decode_rest(data, position2, stop2, table, mask, symbols, begin2 + common, begin3)
    position3 = _decode_rest(data, position3, stop3, table, mask, symbols, begin3 + common, size)
    if not _ends_well(data, position0, bounds[0], bounds[1]):
        return 0
    if not _ends_well(data, position1, bounds[1], bounds[2]):
        return 1
    if not _ends_well(data, position2, bounds[2], bounds[3]):
        return 2
    if not _ends_well(data, position3, bounds[3], bounds[4]):
        return 3
    return -1


@cached_kernel
def _gather_symbols(packed, lanes, width, rows, symbols):  # type: ignore[no-untyped-def]  # Numba infers
    """Symbols of whole tiles, and perhaps of the last one, from their byte planes.

    width: bits of a symbol, not 8. rows: symbols in a lane.
    """
    mask = np.uint8((1 << width) - 1)
    for first in range(0, symbols.size, rows * lanes):
        tile_lanes = min(lanes, (symbols.size - first) // rows)
        planes = packed[first * width // 8 :]
        for row in range(rows):
            plane = row * width >> 3
            shift = row * width & 7
            target = symbols[first + row * tile_lanes : first + (row + 1) * tile_lanes]
            lower = planes[plane * tile_lanes : (plane + 1) * tile_lanes]
            if shift + width <= 8:
                for lane in range(tile_lanes):
                    target[lane] = np.uint8(lower[lane] >> shift) & mask
            else:
                upper = planes[(plane + 1) * tile_lanes : (plane + 2) * tile_lanes]
                for lane in range(tile_lanes):
                    target[lane] = np.uint8((lower[lane] >> shift) | (upper[lane] << (8 - shift))) & mask


@cached_kernel
def _scatter_symbols(symbols, lanes, width, rows, packed):  # type: ignore[no-untyped-def]  # Numba infers
    """Byte planes of whole tiles, and perhaps of the last one, from their symbols; see `_gather_symbols`."""
    packed[:] = np.uint8(0)
    for first in range(0, symbols.size, rows * lanes):
        tile_lanes = min(lanes, (symbols.size - first) // rows)
        planes = packed[first * width // 8 :]
        for row in range(rows):
            plane = row * width >> 3
            shift = row * width & 7
            source = symbols[first + row * tile_lanes : first + (row + 1) * tile_lanes]
            lower = planes[plane * tile_lanes : (plane + 1) * tile_lanes]
            for lane in range(tile_lanes):
                lower[lane] |= np.uint8(source[lane] << shift)
            if shift + width > 8:
                upper = planes[(plane + 1) * tile_lanes : (plane + 2) * tile_lanes]
                for lane in range(tile_lanes):
                    upper[lane] |= np.uint8(source[lane] >> (8 - shift))


@cached_kernel
def _encode(packed, lanes, width, rows, table, out, sizes):  # type: ignore[no-untyped-def]  # Numba infers
    """Write all streams of one slice from the first byte of `out` on and their sizes; returns their bytes."""
    count = packed.size * 8 // width
    scratch = np.empty(CHUNK_SYMBOLS if width != 8 else 0, dtype=np.uint8)
    position = 0
    for begin in range(0, count, CHUNK_SYMBOLS):
        end = min(begin + CHUNK_SYMBOLS, count)
        symbols = packed[begin * width // 8 : end * width // 8]
        if width != 8:
            _gather_symbols(symbols, lanes, width, rows, scratch[: end - begin])
            symbols = scratch[: end - begin]
        number = begin // CHUNK_SYMBOLS * STREAMS
        position = _encode_chunk(symbols, table, out, position, sizes[number : number + STREAMS])
    return position


@cached_kernel
def _decode(data, bounds, lanes, width, rows, table, packed):  # type: ignore[no-untyped-def]  # Numba infers
    """Decode all chunks of one slice; returns the number of the first damaged stream, or -1."""
    count = packed.size * 8 // width
    scratch = np.empty(CHUNK_SYMBOLS if width != 8 else 0, dtype=np.uint8)
    for begin in range(0, count, CHUNK_SYMBOLS):
        end = min(begin + CHUNK_SYMBOLS, count)
        chunk = packed[begin * width // 8 : end * width // 8]
        symbols = chunk if width == 8 else scratch[: end - begin]
        number = begin // CHUNK_SYMBOLS * STREAMS
        damaged = _decode_chunk(data, bounds[number : number + STREAMS + 1], table, symbols)
        if damaged >= 0:
            return number + damaged
        if width != 8:
            _scatter_symbols(symbols, lanes, width, rows, chunk)
    return -1


@cached_kernel
def _count_symbols(packed, lanes, width, rows, counts):  # type: ignore[no-untyped-def]  # Numba infers
    """Add the occurrences of each symbol of one slice to counts [4, 2^width], whose rows are to be added up.

    Neighbours count in different rows, so that runs of one symbol do not wait for their own counter.
    """
    count = packed.size * 8 // width
    scratch = np.empty(CHUNK_SYMBOLS if width != 8 else 0, dtype=np.uint8)
    for begin in range(0, count, CHUNK_SYMBOLS):
        end = min(begin + CHUNK_SYMBOLS, count)
        symbols = packed[begin * width // 8 : end * width // 8]
        if width != 8:
            _gather_symbols(symbols, lanes, width, rows, scratch[: end - begin])
            symbols = scratch[: end - begin]
        for index in range(symbols.size):
            counts[index & 3, symbols[index]] += 1


def unpack(packed: ByteArray, bits: int, lanes: int) -> ByteArray:
    """Codes from lane-planar bytes, those that fill up the last lanes included: a fast `reference.unpack`."""
    _check_buffer(packed, "packed codes")
    if bits == 8:
        return packed.copy()
    codes = np.empty(packed.size * 8 // bits, dtype=np.uint8)
    _gather_symbols(packed, lanes, bits, ROWS, codes)
    return codes


def pack(codes: ByteArray, bits: int, lanes: int, packed: ByteArray) -> None:
    """Write the lane-planar bytes of codes, a multiple of 8 of them: the inverse of `unpack`."""
    _check_buffer(packed, "packed codes")
    if bits == 8:
        packed[:] = codes
    else:
        _scatter_symbols(codes, lanes, bits, ROWS, packed)


def symbol_count(packed_bytes: int, bits: int) -> int:
    """Symbols of a slice with so many bytes of packed codes."""
    return packed_bytes * 8 // (bits * codes_per_symbol(bits))


def directory_bytes(packed_bytes: int, bits: int) -> int:
    """Bytes of the directory of a slice with so many bytes of packed codes."""
    return 2 * STREAMS * -(-symbol_count(packed_bytes, bits) // CHUNK_SYMBOLS)


def maximum_bytes(packed_bytes: int, bits: int, longest: int) -> int:
    """Most bytes that a slice can need when entropy-coded, for any codes.

    Args:
        packed_bytes: of its packed codes.
        bits: code width.
        longest: longest code word, in bits.
    """
    directory = directory_bytes(packed_bytes, bits)
    return directory + directory // 2 + symbol_count(packed_bytes, bits) * longest // 8 + TAIL_BYTES


def count_levels(packed: ByteArray, length: int, bits: int, lanes: int) -> npt.NDArray[np.int64]:
    """How often each level occurs in one slice: what `entropy.huffman` wants, once summed over slices and workers.

    Args:
        packed: uint8, lane-planar codes, contiguous.
        length: coordinates of the slice; the zeros that fill up its last lanes are not counted.
        bits: code width.
        lanes: of a full tile.

    Returns:
        int64 [2^(bits - 1)].
    """
    _check_buffer(packed, "packed codes")
    group = codes_per_symbol(bits)
    counts = np.zeros((4, 1 << bits * group), dtype=np.int64)
    _count_symbols(packed, lanes, bits * group, ROWS // group, counts)
    per_code = counts.sum(axis=0).reshape((1 << bits,) * group)
    per_level = np.zeros(1 << bits - 1, dtype=np.int64)
    for axis in range(group):
        one_code = per_code.sum(axis=tuple(other for other in range(group) if other != axis))
        per_level += one_code.reshape(2, -1).sum(axis=0)
    per_level[0] -= 8 * packed.size // bits - length
    return per_level


def encode(packed: ByteArray, bits: int, lanes: int, table: UInt32Array, out: ByteArray) -> int:
    """Entropy-code one slice.

    Args:
        packed: uint8, lane-planar codes (`layout.py`), contiguous.
        bits: code width.
        lanes: of a full tile.
        table: uint32 [2^bits of a symbol], `PrefixCode.encode_table` with an entry for each symbol that occurs.
        out: uint8, at least `maximum_bytes`, written.

    Returns:
        Bytes written.

    Raises:
        PlanError: when the table or the output is too small, or a buffer is not contiguous uint8.
    """
    for buffer, name in ((packed, "packed codes"), (out, "output")):
        _check_buffer(buffer, name)
    group = codes_per_symbol(bits)
    longest = int(table.max()) >> 16
    if table.size != 1 << bits * group or out.size < maximum_bytes(packed.size, bits, longest):
        raise PlanError(
            f"{packed.size} bytes of {bits}-bit codes need a table of {1 << bits * group} words and "
            f"{maximum_bytes(packed.size, bits, longest)} bytes of output; got {table.size} and {out.size}"
        )
    directory = directory_bytes(packed.size, bits)
    sizes = np.zeros(directory // 2, dtype=np.uint16)
    streams_bytes = _encode(packed, lanes, bits * group, ROWS // group, table, out[directory:], sizes)
    out[:directory] = sizes.astype("<u2", copy=False).view(np.uint8)
    end = directory + int(streams_bytes)
    out[end : end + TAIL_BYTES] = 0
    return end + TAIL_BYTES


def decode(data: ByteArray, bits: int, lanes: int, table: UInt32Array, packed: ByteArray) -> int:
    """Lane-planar codes of one slice from its entropy-coded bytes.

    Args:
        data: uint8, begins with the slice; what follows it is not read as part of it.
        bits: code width.
        lanes: of a full tile.
        table: uint32 [2^longest], `PrefixCode.decode_table`.
        packed: uint8, written.

    Returns:
        Bytes of `data` that belong to the slice.

    Raises:
        WireError: when these bytes encode no such slice; `packed` then holds nothing of use.
        PlanError: when a buffer is not contiguous uint8.
    """
    for buffer, name in ((data, "data"), (packed, "packed codes")):
        _check_buffer(buffer, name)
    group = codes_per_symbol(bits)
    directory = directory_bytes(packed.size, bits)
    if data.size < directory + TAIL_BYTES:
        raise WireError(f"an entropy-coded slice has {data.size} bytes, its directory alone has {directory}")
    sizes = data[:directory].copy().view("<u2").astype(np.int64)
    if sizes.size and int(sizes.max()) > _MAX_STREAM_BYTES:
        raise WireError(f"a stream of {int(sizes.max())} bytes is too long; at most {_MAX_STREAM_BYTES} are possible")
    bounds = np.concatenate([[directory], directory + np.cumsum(sizes)]).astype(np.int64)
    end = int(bounds[-1])
    if end + TAIL_BYTES > data.size:
        raise WireError(f"the streams of a slice end at byte {end + TAIL_BYTES} of {data.size}")
    if data[end : end + TAIL_BYTES].any():
        raise WireError("an entropy-coded slice does not end with its streams")
    damaged = int(_decode(data, bounds, lanes, bits * group, ROWS // group, table, packed))
    if damaged >= 0:
        raise WireError(f"stream {damaged} of a slice does not end with its last code word: the message was damaged")
    return end + TAIL_BYTES


def _check_buffer(buffer: ByteArray, name: str) -> None:
    if buffer.dtype != np.uint8 or buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise PlanError(f"{name} must be contiguous uint8 of one dimension; got {buffer.dtype} {list(buffer.shape)}")
