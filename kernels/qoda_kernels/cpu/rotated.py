"""The kernels for buckets that are rotated before they are quantized, and back after they were summed."""

from functools import cache

import numpy as np
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.arguments import (
    CODES_BEGIN,
    CODES_END,
    COORDINATE,
    DECODE_ROTATED,
    ENCODE_ROTATED,
    END,
    FIRST,
    FLOAT16,
    FLOAT32,
    LENGTH,
    NORMS_BEGIN,
    SEGMENT,
)
from qoda_kernels.cpu.checksums import sum_bytes
from qoda_kernels.cpu.compilation import Kernel, compile_kernel, kernel
from qoda_kernels.cpu.decoding import is_mean, sum_bucket
from qoda_kernels.cpu.encoding import COORDINATES_AHEAD, SUMMED_BUCKETS, encode_tiles, scale_values
from qoda_kernels.cpu.half_precision import round_values, widen_values
from qoda_kernels.cpu.level_tables import METHODS, WAYS
from qoda_kernels.cpu.memory import bytes_at, write_norm
from qoda_kernels.cpu.norms import (
    ROTATED_LIMITS,
    exponent_of_scale,
    finish_extreme,
    l2_norm,
    max_magnitude,
    read_extreme_norms,
    read_norms,
    round_to_bfloat16,
    round_up_to_bfloat16,
    scale_of_bucket,
    sum_of_squares,
    sum_of_values,
)
from qoda_kernels.cpu.rotation import block_power, rotate_tail, rotate_tail_back
from qoda_kernels.kernel_constants import (
    HIGH_WORD,
    HUGE,
    INFINITY,
    L2_LANES,
    LARGEST,
    NAN,
    ROWS,
    SCALED,
    SIGN_LANES,
    WEYL,
)
from qoda_kernels.reference import fraction_bits

LARGE_HALF_NORM = np.uint32(137 << 23)  # 1024: at and above it, a float16 result might overflow


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

    @kernel
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
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(ROWS * lanes, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        sums = np.empty(L2_LANES, dtype=np.float32)
        words = np.empty(SIGN_LANES, dtype=np.uint32)
        bucket = np.uint64(scratch.ctypes.data)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        root = roots[block_power(bucket_size)]
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
                largest = max_magnitude(source, length)
                norm_bits = NAN if largest >= INFINITY else np.uint32(0)
                norm = np.float32(0.0)
                power = np.float32(0.0)
                back = np.float32(0.0)
                scaled = np.uint32(0)
                if largest > np.uint32(0) and largest < INFINITY:
                    field = exponent_of_scale(largest)
                    up = word32.float_from_bits(np.uint32(field << 23))
                    bucket_scale = scale_of_bucket(largest, 0)
                    back = np.float32(word32.float_from_bits(np.uint32((254 - field) << 23)) * bucket_scale)
                    forth = np.float32(up * np.float32(np.float32(1.0) / bucket_scale))
                    if bucket_scale != np.float32(1.0):
                        scaled = SCALED
                    coordinate = np.uint64(part[COORDINATE]) + np.uint64(begin)
                    high_share = word32.multiply(np.uint32(coordinate >> np.uint64(32)), HIGH_WORD)
                    weyl = word32.multiply(np.uint32(coordinate & np.uint64(0xFFFFFFFF)), WEYL)
                    first = word32.add(rotation[0], high_share)
                    if length == bucket_size:
                        tiles.rotate(source, bucket, up, weyl, first, rotation[1], root, whole)
                    else:
                        scale_values(source, length, up, bucket)
                        rotate_tail(scratch[:length], weyl, first, rotation[1], roots, words)
                    if is_nearest:
                        power = sum_of_squares(bucket, length, np.float32(1.0), sums)
                        norm = np.float32(np.sqrt(np.float32(power / np.float32(length))) * spread)
                    else:
                        norm_bits = max_magnitude(bucket, length)
                        if is_l2:
                            norm_bits = l2_norm(bucket, length, norm_bits, sums)
                        norm_bits = word32.float_bits(np.float32(word32.float_from_bits(norm_bits) * back))
                        if norm_bytes == 2:
                            norm_bits = round_up_to_bfloat16(norm_bits)
                        norm = np.float32(word32.float_from_bits(norm_bits) * forth)
                if norm > np.float32(0.0):
                    scale = np.float32((uniform_scale if is_uniform else np.float32(1.0)) / norm)
                    encode_tiles(
                        bucket,
                        length,
                        codes,
                        given + np.uint64(item_bytes * COORDINATES_AHEAD),
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
                        ratio = np.float32(power / sum_of_values(bucket, length, sums))
                        norm_bits = word32.minimum(word32.float_bits(np.float32(ratio * back)), LARGEST)
                        if norm_bytes == 2:
                            norm_bits = round_to_bfloat16(norm_bits)
                else:
                    bytes_at(codes, codes_end - codes_begin)[:] = np.uint8(0)
                write_norm(norms + np.uint64(number * norm_bytes), norm_bytes, word32.bit_or(norm_bits, scaled))
                if (number + 1) % SUMMED_BUCKETS == 0:
                    total += sum_bytes(message, summed, codes_end)
                    summed = codes_end
            padding = bytes_at(message + np.uint64(part[CODES_END]), part[END] - part[CODES_END])
            padding[:] = np.uint8(0)
            total += sum_bytes(message, summed, part[CODES_END])
            total += sum_bytes(message, part[NORMS_BEGIN], part[NORMS_BEGIN] + buckets * norm_bytes)
        tiles.keep((scratch, tail_values, tail_codes))
        return total

    return compile_kernel(encode, ENCODE_ROTATED, f"rotates and encodes {bits} bits ({method})")


@cache
def rotated_decoder(bits: int, bucket_size: int, kind: int, look_up: str) -> Kernel:
    """Kernel that decodes parts of several messages, sums, rotates back, and scales; compiles it if need be.

    The kernel takes a `decoder`'s arguments, with the `RotationKey.words` behind the scale, and in the end ROOTS.

    Args:
        bits: code width.
        bucket_size: of the codebook.
        kind: dtype of the tensors: FLOAT32, FLOAT16 or BFLOAT16.
        look_up: way of looking up levels, of `WAYS`.
    """
    way = WAYS[look_up]
    lanes = 32 if bucket_size % (ROWS * 32) == 0 else 16
    item_bytes = 4 if kind == FLOAT32 else 2
    whole = bucket_size
    limit = ROTATED_LIMITS[kind]
    # Coordinates of a rotated bucket may exceed its norm by the root of its size, 32 at most.
    extreme = LARGE_HALF_NORM if kind == FLOAT16 else HUGE

    @kernel
    def decode(  # type: ignore[no-untyped-def]  # Numba infers
        messages, results, parts, scale, rotation, bucket_size, norm_bytes, levels, roots
    ):
        scratch = np.empty(bucket_size, dtype=np.float32)
        tail_values = np.empty(ROWS * lanes, dtype=np.float32)
        tail_codes = np.empty(bits * lanes, dtype=np.uint8)
        words = np.empty(SIGN_LANES, dtype=np.uint32)
        norms = np.empty(messages.size, dtype=np.float32)
        tail_address, tail_codes_address = np.uint64(tail_values.ctypes.data), np.uint64(tail_codes.ctypes.data)
        norms_address = np.uint64(norms.ctypes.data)
        result_limit = limit if is_mean(messages, scale) else INFINITY
        bucket_bytes = np.int64(bucket_size // ROWS * bits)
        root = roots[block_power(bucket_size)]
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
                is_extreme = read_norms(messages, norm_begin, norm_bytes, LARGEST, extreme, norms_address)
                if is_extreme:
                    power = read_extreme_norms(messages, norm_begin, norm_bytes, INFINITY, norms_address)
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
                coordinate = np.uint64(part[COORDINATE]) + np.uint64(begin)
                high_share = word32.multiply(np.uint32(coordinate >> np.uint64(32)), HIGH_WORD)
                weyl = word32.multiply(np.uint32(coordinate & np.uint64(0xFFFFFFFF)), WEYL)
                first = word32.add(rotation[0], high_share)
                if length == bucket_size:
                    tiles.rotate_back(bucket, scale, weyl, first, rotation[1], root, whole)
                else:
                    rotate_tail_back(sums, weyl, first, rotation[1], roots, words)
                    for place in range(length):
                        value = np.float32(sums[place] * scale)
                        sums[place] = word32.float_from_bits(NAN) if np.isnan(value) else value
                if is_extreme:
                    finish_extreme(bucket, length, power, result_limit)
                if kind != FLOAT32:
                    halves = carray(word32.half_pointer(tensor + np.uint64(2 * begin)), (length,), np.uint16)
                    round_values(sums, kind, halves)
        tiles.keep((scratch, tail_values, tail_codes, norms))

    return compile_kernel(decode, DECODE_ROTATED, f"decodes {bits} bits and rotates back")
