"""Entropy-coded slices in plain Python: the definition that `bit_streams.py` must equal byte for byte.

A **symbol** is as many codes as fit into a byte: four of 2 bits, two of 3 or 4 bits, one of 5 to 8 bits. Its codes are
consecutive rows of one lane of the lane-planar layout (`layout.py`), the first row lowest. Symbols are ordered by tile,
then row, then lane; for 2, 4 and 8 bits they are the bytes of the packed codes as they lie.

The symbols are cut into **chunks** of CHUNK_SYMBOLS, and each chunk into STREAMS **streams** of equal length (the last
ones of the last chunk are shorter). Decoders read the streams of a chunk side by side, and chunks in any order.

    directory     uint16, little-endian, [chunks * STREAMS]: bytes of each stream
    streams       one behind the other; code words fill each byte from its lowest bit, first bit of a word first;
                  the last byte is filled up with zeros
    TAIL_BYTES    zero bytes, so that 8 bytes can be loaded anywhere in a stream
"""

import numpy as np
import numpy.typing as npt

from qoda_kernels.codebook import ROWS
from qoda_kernels.errors import WireError
from qoda_kernels.prefix_codes import PrefixCode
from qoda_kernels.reference import tile_shape

ByteArray = npt.NDArray[np.uint8]

CHUNK_SYMBOLS = 16384
STREAMS = 4
TAIL_BYTES = 8


def codes_per_symbol(bits: int) -> int:
    """Codes in one symbol: the largest power of two whose codes fit into a byte."""
    return {2: 4, 3: 2, 4: 2}.get(bits, 1)


def symbols_of_codes(codes: ByteArray, bits: int, lanes: int) -> ByteArray:
    """Symbols of one slice.

    Args:
        codes: uint8 [n], in the order of the coordinates.
        bits: code width.
        lanes: of a full tile.
    """
    group = codes_per_symbol(bits)
    symbols = []
    for first, size, tile_lanes in tile_shape(codes.size, lanes):
        tile = np.zeros(ROWS * tile_lanes, dtype=np.uint8)
        tile[:size] = codes[first : first + size]
        rows = tile.reshape(ROWS // group, group, tile_lanes)
        shifts = np.arange(0, group * bits, bits, dtype=np.uint8).reshape(1, group, 1)
        symbols.append(np.bitwise_or.reduce(rows << shifts, axis=1).ravel())
    return np.concatenate(symbols) if symbols else np.zeros(0, dtype=np.uint8)


def codes_of_symbols(symbols: ByteArray, length: int, bits: int, lanes: int) -> ByteArray:
    """Codes of one slice from its symbols: the inverse of `symbols_of_codes`."""
    group = codes_per_symbol(bits)
    codes = np.zeros(length, dtype=np.uint8)
    begin = 0
    for first, size, tile_lanes in tile_shape(length, lanes):
        count = ROWS // group * tile_lanes
        rows = symbols[begin : begin + count].reshape(ROWS // group, 1, tile_lanes)
        shifts = np.arange(0, group * bits, bits, dtype=np.uint8).reshape(1, group, 1)
        codes[first : first + size] = ((rows >> shifts) & np.uint8((1 << bits) - 1)).ravel()[:size]
        begin += count
    return codes


def stream_bounds(symbols: int) -> list[tuple[int, int]]:
    """First symbol and end of every stream of every chunk."""
    bounds = []
    for begin in range(0, symbols, CHUNK_SYMBOLS):
        end = min(begin + CHUNK_SYMBOLS, symbols)
        share = -(-(end - begin) // STREAMS)
        bounds += [(min(begin + i * share, end), min(begin + (i + 1) * share, end)) for i in range(STREAMS)]
    return bounds


def encode(symbols: ByteArray, code: PrefixCode) -> bytes:
    """Directory, streams and tail of one slice.

    Args:
        symbols: uint8 [n], each with a code word.
        code: of the slice's layer type.
    """
    streams = []
    for begin, end in stream_bounds(symbols.size):
        bits = "".join(f"{code.words[s]:0{code.lengths[s]}b}" for s in symbols[begin:end].tolist())
        octets = [bits[i : i + 8][::-1] for i in range(0, len(bits), 8)]
        streams.append(bytes(int(octet, 2) for octet in octets))
    directory = np.array([len(stream) for stream in streams], dtype="<u2").tobytes()
    return directory + b"".join(streams) + bytes(TAIL_BYTES)


def decode(data: bytes, symbols: int, code: PrefixCode) -> ByteArray:
    """Symbols of one slice.

    Args:
        data: what `encode` returned.
        symbols: their number.
        code: of the slice's layer type.

    Raises:
        WireError: when these bytes encode no such number of symbols.
    """
    meaning = {
        (length, word): s for s, (word, length) in enumerate(zip(code.words, code.lengths, strict=True)) if length
    }
    bounds = stream_bounds(symbols)
    position = 2 * len(bounds)
    if len(data) < position + TAIL_BYTES:
        raise WireError("an entropy-coded slice is shorter than its directory")
    sizes = np.frombuffer(data[:position], dtype="<u2").tolist()
    result = []
    for (begin, end), size in zip(bounds, sizes, strict=True):
        bits = "".join(f"{octet:08b}"[::-1] for octet in data[position : position + size])
        position += size
        read = 0
        for _ in range(begin, end):
            word = length = 0
            while (length, word) not in meaning:
                if read == len(bits) or length == code.longest:
                    raise WireError("a stream ends before its last code word, or holds bits that are no code word")
                word, length, read = 2 * word + int(bits[read]), length + 1, read + 1
            result.append(meaning[length, word])
        if len(bits) - read >= 8 or "1" in bits[read:]:
            raise WireError("a stream is longer than its code words")
    if data[position:] != bytes(TAIL_BYTES):
        raise WireError("an entropy-coded slice does not end with its streams")
    return np.array(result, dtype=np.uint8)
