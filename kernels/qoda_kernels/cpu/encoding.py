"""The kernels that quantize and pack the buckets of a message."""

from functools import cache

import numpy as np
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.arguments import (
    CODES_BEGIN,
    CODES_END,
    COORDINATE,
    ENCODE,
    END,
    FIRST,
    FLOAT32,
    LENGTH,
    NORMS_BEGIN,
    SEGMENT,
)
from qoda_kernels.cpu.checksums import sum_bytes
from qoda_kernels.cpu.compilation import Kernel, compile_kernel, inline, kernel
from qoda_kernels.cpu.half_precision import widen_values
from qoda_kernels.cpu.level_tables import METHODS
from qoda_kernels.cpu.memory import bytes_at, write_norm
from qoda_kernels.cpu.norms import LIMITS, l2_norm, max_magnitude, round_up_to_bfloat16, scale_of_bucket
from qoda_kernels.cpu.partial_tiles import copy_planes, join_rows, spread_rows
from qoda_kernels.kernel_constants import (
    HIGH_WORD,
    INFINITY,
    L2_LANES,
    LARGEST,
    MAGNITUDE,
    NAN,
    ROWS,
    SCALE_FIELD,
    SCALE_UP,
    SCALED,
    SIGN,
    WEYL,
)
from qoda_kernels.reference import fraction_bits

SUMMED_BUCKETS = 32  # whose codes are summed for the checksum while they are in the cache
COORDINATES_AHEAD = 2048  # that are asked for before they are quantized; they fit into the first cache twice


@kernel
def _clip_values(source: np.uint64, length: int, limit: np.uint32, target: np.uint64) -> None:
    """Copy float32 values, lowering their magnitudes to a limit, given as float32 bits."""
    given = carray(word32.float_pointer(np.uint64(source)), (length,), np.float32)
    clipped = carray(word32.float_pointer(np.uint64(target)), (length,), np.float32)
    for place in range(length):
        word = word32.float_bits(given[place])
        magnitude = word32.minimum(word32.bit_and(word, MAGNITUDE), limit)
        clipped[place] = word32.float_from_bits(word32.bit_or(magnitude, word32.bit_and(word, SIGN)))


@kernel
def scale_values(source: np.uint64, length: int, factor: np.float32, target: np.uint64) -> None:
    """Copy float32 values, multiplied by a factor; source and target may be the same address."""
    given = carray(word32.float_pointer(np.uint64(source)), (length,), np.float32)
    scaled = carray(word32.float_pointer(np.uint64(target)), (length,), np.float32)
    for place in range(length):
        scaled[place] = np.float32(given[place] * factor)


@inline
def encode_tiles(  # type: ignore[no-untyped-def]  # Numba infers
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
            spread_rows(source, rest, row_length, lanes, tail_values)
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
            copy_planes(tail_codes, lanes, bits, row_length, packed, row_length)
            if is_nearest:
                join_rows(tail_values, rest, row_length, lanes, False, tile_place)


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
    limit = LIMITS[kind]

    @kernel
    def encode(  # type: ignore[no-untyped-def]  # Numba infers
        values, parts, message, key, bucket_size, norm_bytes, is_l2, clip, lines, levels, cells
    ):
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(tile, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        sums = np.empty(L2_LANES, dtype=np.float32)
        scratch_address = np.uint64(scratch.ctypes.data)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        # Of several buckets at once, so that the processor need not wait for each before it quantizes it.
        group = max(1, COORDINATES_AHEAD // bucket_size)
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
                    largest = max_magnitude(bucket, length)
                else:
                    if number % group == 0:
                        for later in range(min(group, buckets - number)):
                            rest = part[LENGTH] - begin - later * bucket_size
                            place = given + np.uint64(4 * later * bucket_size)
                            magnitudes[later] = max_magnitude(place, min(bucket_size, rest))
                    largest = magnitudes[number % group]
                norm_limit = limit
                scaled = np.uint32(0)
                scale = scale_of_bucket(largest, clip)
                if scale != np.float32(1.0):
                    scale_values(bucket, length, scale, scratch_address)
                    bucket = scratch_address
                    largest = word32.float_bits(np.float32(word32.float_from_bits(largest) * scale))
                    scaled = SCALED
                    norm_limit = LARGEST if scale == SCALE_UP else word32.subtract(limit, SCALE_FIELD)
                norm_bits = largest
                if norm_bits >= INFINITY:
                    norm_bits = NAN
                elif clip > 0 and norm_bits > 0:
                    norm_bits = clip
                elif is_l2 and norm_bits > 0:
                    norm_bits = l2_norm(bucket, length, norm_bits, sums)
                if norm_bytes == 2:
                    norm_bits = round_up_to_bfloat16(norm_bits)
                write_norm(norms + np.uint64(number * norm_bytes), norm_bytes, word32.bit_or(norm_bits, scaled))
                codes = message + np.uint64(codes_begin)
                if norm_bits == np.uint32(0) or norm_bits >= INFINITY:
                    bytes_at(codes, codes_end - codes_begin)[:] = np.uint8(0)
                else:
                    norm_bits = word32.minimum(norm_bits, norm_limit)
                    norm = word32.float_from_bits(norm_bits)
                    if clip > 0 and largest > norm_bits:
                        _clip_values(bucket, length, norm_bits, scratch_address)
                        bucket = scratch_address
                    encode_tiles(
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
                if (number + 1) % SUMMED_BUCKETS == 0:
                    total += sum_bytes(message, summed, codes_end)
                    summed = codes_end
            padding = bytes_at(message + np.uint64(part[CODES_END]), part[END] - part[CODES_END])
            padding[:] = np.uint8(0)
            total += sum_bytes(message, summed, part[CODES_END])
            total += sum_bytes(message, part[NORMS_BEGIN], part[NORMS_BEGIN] + buckets * norm_bytes)
        tiles.keep((scratch, tail_values, tail_codes))
        return total

    return compile_kernel(encode, ENCODE, f"encodes {bits} bits ({method})")
