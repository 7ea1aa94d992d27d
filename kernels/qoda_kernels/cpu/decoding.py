"""The kernels that decode the buckets of several messages and sum them."""

from functools import cache

import numpy as np
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.arguments import CODES_BEGIN, DECODE, FIRST, FLOAT32, LENGTH, NORMS_BEGIN, SEGMENT
from qoda_kernels.cpu.compilation import Kernel, compile_kernel, inline, kernel
from qoda_kernels.cpu.half_precision import round_values
from qoda_kernels.cpu.level_tables import WAYS
from qoda_kernels.cpu.norms import LIMITS, finish_extreme, read_extreme_norms, read_norms
from qoda_kernels.cpu.partial_tiles import copy_planes, join_rows
from qoda_kernels.kernel_constants import HUGE, INFINITY, MEAN_BOUND, ROWS


@inline
def sum_bucket(  # type: ignore[no-untyped-def]  # Numba infers
    messages, norms, codes_begin, bucket, length, levels, tail_values, tail_codes, bits, lanes, way
):
    """Sum one bucket of all messages.

    The sum, `length` float32, is written to the address `bucket`. `norms` is the address of the messages' norms, as
    `norms.read_norms` writes them; codes_begin the first byte of the codes, counted from a message's start.
    tail_values, of float32 [ROWS, lanes], and tail_codes, of uint8 [bits, lanes], are addresses of scratch memory. way:
    see `vectors.py`.
    """
    tile = ROWS * lanes
    full_tiles = length // tile
    rest = length - full_tiles * tile
    for source in range(messages.size):
        norm = carray(word32.float_pointer(norms), (messages.size,), np.float32)[source]
        codes = messages[source] + np.uint64(codes_begin)
        for tile_number in range(full_tiles):
            place = codes + np.uint64(tile_number * bits * lanes)
            target = bucket + np.uint64(4 * tile_number * tile)
            if source == 0:
                tiles.decode_tile(place, target, norm, levels, bits, lanes, 1, way)
            else:
                tiles.decode_tile(place, target, norm, levels, bits, lanes, 0, way)
        if rest > 0:
            tail_lanes = (rest + ROWS - 1) // ROWS
            place = codes + np.uint64(full_tiles * bits * lanes)
            copy_planes(place, tail_lanes, bits, tail_lanes, tail_codes, lanes)
            tiles.decode_tile(tail_codes, tail_values, norm, levels, bits, lanes, 1, way)
            target = bucket + np.uint64(4 * full_tiles * tile)
            join_rows(tail_values, rest, tail_lanes, lanes, source > 0, target)


@inline
def is_mean(messages, scale):  # type: ignore[no-untyped-def]  # Numba infers
    """Whether the sum of messages times a scale is a mean, which must not overflow (`reference.decode_mean`)."""
    return np.float32(abs(scale) * np.float32(messages.size)) <= MEAN_BOUND


@cache
def decoder(bits: int, lanes: int, kind: int, look_up: str) -> Kernel:
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
        look_up: way of looking up levels, of `WAYS`.
    """
    way = WAYS[look_up]
    tile = ROWS * lanes
    item_bytes = 4 if kind == FLOAT32 else 2
    limit = LIMITS[kind]

    @kernel
    def decode(messages, results, parts, scale, bucket_size, norm_bytes, levels):  # type: ignore[no-untyped-def]  # Numba infers
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(tile, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        norms = np.empty(messages.size, dtype=np.float32)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        norms_address = np.uint64(norms.ctypes.data)
        result_limit = limit if is_mean(messages, scale) else INFINITY
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
                norm_begin = part[NORMS_BEGIN] + number * norm_bytes
                power = np.float32(1.0)
                is_extreme = read_norms(messages, norm_begin, norm_bytes, limit, HUGE, norms_address)
                if is_extreme:
                    power = read_extreme_norms(messages, norm_begin, norm_bytes, limit, norms_address)
                sum_bucket(
                    messages,
                    norms_address,
                    part[CODES_BEGIN] + number * bucket_bytes,
                    bucket,
                    length,
                    levels,
                    tail_address,
                    tail_codes_address,
                    bits,
                    lanes,
                    way,
                )
                for place in range(length):
                    sums[place] = np.float32(sums[place] * scale)
                if is_extreme:
                    finish_extreme(bucket, length, power, result_limit)
                if kind != FLOAT32:
                    halves = carray(word32.half_pointer(tensor + np.uint64(2 * begin)), (length,), np.uint16)
                    round_values(sums, kind, halves)
        tiles.keep((scratch, tail_values, tail_codes, norms))

    return compile_kernel(decode, DECODE, f"decodes {bits} bits")
