"""The codec in plain NumPy: the definition that every fast kernel must equal bit for bit.

Read in this order: `bucket_norm`, `rounding_table`, `fixed_point`, `quantize`, `pack`, `unpack` and `decode_mean`; for
buckets that are rotated first, `rotation.py` and `quantize_rotated`.

Quantizing coordinate v of a bucket with norm N and levels l_0 .. l_s (s = 2^(bits-1) - 1), arXiv 2505.14371 section 3:
let u = |v| / N lie between l_i and l_{i+1}; the position of u on the scale of level indices is
y = i + (u - l_i) / (l_{i+1} - l_i). The sent index is floor(y + r) with r uniform in [0, 1), so E[index] = y and
E[N * sign(v) * l_index] = v. Here r is a random number of F = min(16, 21 - bits) bits, and y + r is rounded to nearest
in fixed point with as many fraction bits, once, before its floor is taken: 20 bits in all, four fewer than float32 has,
so that the rounding errors of the normalisation never move a coordinate off a level on which it lies. The mean is thus
exact to 2^-(F+1) of a gap.

Extreme buckets. Let M be a bucket's largest magnitude. Where M < 2^-100 the bucket is multiplied by 2^64 first, where
M >= 2^96 by 2^-64, and the sign bit of its norm word, which no norm needs, says so; which of the two it was follows
from the norm: below 1 it was 2^64. Codebooks that clip have a norm within these bounds already. A norm beyond the
largest finite number L of the slice's dtype (an l2 norm, or one that was rounded up) is read as L: it still covers
every coordinate, and then no decoded value exceeds L.

Receivers multiply all norms of a bucket by one power of two, sum, and undo it in the end: 2^-64 where a norm may reach
2^96, 2^64 where none reaches 1 and some were scaled up. So nothing overflows on the way, and nothing is rounded to a
subnormal number but the result. Thus finite gradients decode to finite values, and their mean is finite, for any
codebook. The bounds: the mean of what a message decodes to differs from the gradient by at most 2^-(F+1) of a gap, the
rounding errors of float32, and half the distance of two neighbours in the slice's dtype, whose numbers are the only
results: 2^-150 in float32, which is up to half a subnormal number's own size. Beside a norm of 2^96 or more, what other
messages hold is exact to 2^-86; beside one of 1 or more, to 2^-150. Rotated buckets alone are biased near L: decoded
values beyond it are lowered to it (to the largest bfloat16 with float32, so that their mean over messages does not
overflow either), in means; in sums, as plain addition would, they become infinite.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qoda_kernels.codebook import ROWS, Codebook
from qoda_kernels.dither import DitherKey, hash32, stratified
from qoda_kernels.rotation import RotationKey, rotate, rotate_back

Float32Array = npt.NDArray[np.float32]
UInt32Array = npt.NDArray[np.uint32]
ByteArray = npt.NDArray[np.uint8]

INFINITY_BITS = 0x7F800000
NAN_BITS = 0x7FC00000  # the norm word of a bucket with a NaN or an infinity, and what its coordinates decode to
TINY = np.float32(2.0**-100)  # buckets whose largest magnitude is below it are scaled up
HUGE = np.float32(2.0**96)  # and where it is not below this one, down
SCALE_UP, SCALE_DOWN = np.float32(2.0**64), np.float32(2.0**-64)
SCALED_BIT = 0x80000000  # of the norm word of a scaled bucket
LARGEST = {  # finite number of each dtype
    "float32": np.finfo(np.float32).max,
    "float16": np.float32(65504.0),
    "bfloat16": np.uint32(0x7F7F0000).view(np.float32),
}
LARGEST_ROTATED = {**LARGEST, "float32": LARGEST["bfloat16"]}  # result of a mean over rotated buckets
MEAN_BOUND = np.float32(1.000001)  # a sum of K messages is a mean where K times the scale's magnitude is not above it
L2_LANES = 32
_INFINITE = np.float32(np.inf)
_ROUNDING_CONSTANT = np.float32(1.5 * 2.0**23)


def fraction_bits(bits: int) -> int:
    """Fraction bits F of the fixed-point position of a coordinate between two levels."""
    return min(16, 21 - bits)


def fused_multiply_add(a: Float32Array, x: Float32Array, b: Float32Array) -> Float32Array:
    """A * x + b rounded once to float32.

    The product of two float32 is exact in float64. The sum is rounded to odd there (by the exact error of the addition,
    Knuth's two-sum), which makes the second rounding, to float32, the correct one (Boldo and Melquiond, 2008).
    """
    product = a.astype(np.float64) * x.astype(np.float64)
    addend = b.astype(np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    is_even = (total.view(np.uint64) & np.uint64(1)) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & is_even, np.nextafter(total, towards), total).astype(np.float32)


def bucket_norm(bucket: Float32Array, norm: str, clip: float = 0.0) -> np.float32:
    """Norm of one bucket: NaN where a coordinate is not finite, 0 where all are zero; else the clip value if not 0.

    An l2 norm that overflows is the largest finite number.

    "max" is the largest magnitude. "l2" is the Euclidean norm: coordinates are scaled by a power of two so that squares
    neither overflow nor vanish, lane j of 32 adds the squares of coordinates j, j + 32, ... in order, and the lanes are
    added as a tree (j with j + 16, then j + 8, ...), which every target can do in the same order.
    """
    magnitude = int((bucket.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(initial=0))
    if magnitude >= INFINITY_BITS:
        return _float(NAN_BITS)
    if clip > 0 and magnitude > 0:
        return np.float32(clip)
    if norm == "max" or magnitude == 0:
        return _float(magnitude)
    up, down = powers_of_scale(magnitude)
    scaled = bucket * up
    with np.errstate(over="ignore"):
        length = np.sqrt(tree_sum(scaled * scaled)) * down
    return min(length, LARGEST["float32"])


def bucket_scale(bucket: Float32Array, clip: float = 0.0) -> np.float32:
    """Power of two by which a bucket is multiplied before it is quantized: 1 unless it is extreme."""
    largest = bucket_norm(bucket, "max")
    if clip > 0 or not largest > 0 or TINY <= largest < HUGE:
        return np.float32(1.0)
    return SCALE_UP if largest < TINY else SCALE_DOWN


def powers_of_scale(magnitude: int) -> tuple[np.float32, np.float32]:
    """Power of two that brings a magnitude, given as float32 bits, near 1 (if it is not subnormal), and its inverse."""
    exponent_field = min(max(254 - (magnitude >> 23), 1), 253)
    return _float(exponent_field << 23), _float((254 - exponent_field) << 23)


def tree_sum(values: Float32Array) -> np.float32:
    """Sum in the order described in `bucket_norm`."""
    padded = np.zeros(-(-values.size // L2_LANES) * L2_LANES, dtype=np.float32)
    padded[: values.size] = values
    lanes = np.zeros(L2_LANES, dtype=np.float32)
    for row in padded.reshape(-1, L2_LANES):
        lanes = lanes + row
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return np.float32(lanes[0])


def norm_word(norm: np.float32, norm_format: str, scale: np.float32, to_nearest: bool = False) -> int:
    """Norm as it travels: float32 bits, or bfloat16 bits rounded up so that no coordinate exceeds it, or to nearest.

    Args:
        norm: of the scaled bucket.
        norm_format: "fp32" or "bf16".
        scale: what the bucket was multiplied by.
        to_nearest: where the norm need not cover the coordinates.
    """
    word = int(np.float32(norm).view(np.uint32))
    if word >= INFINITY_BITS:
        word = NAN_BITS
    elif norm_format == "bf16":
        word += 0x8000 if to_nearest else 0xFFFF
    if scale != 1.0:
        word |= SCALED_BIT
    return word if norm_format == "fp32" else word >> 16


def norm_of_word(word: int, norm_format: str, largest: np.float32) -> tuple[np.float32, np.float32]:
    """Norm that the receiver reads, and what it must be multiplied by to be the norm of the bucket before scaling.

    Args:
        word: as received.
        norm_format: "fp32" or "bf16".
        largest: what greater norms are lowered to; infinite with rotated buckets, whose norms may be greater.

    Returns:
        The norm of the scaled bucket, NaN for every word that is not finite, and 1, 2^64 or 2^-64.
    """
    bits = word if norm_format == "fp32" else word << 16
    norm = _float(bits & ~SCALED_BIT)
    if not np.isfinite(norm):
        return _float(NAN_BITS), np.float32(1.0)
    power = np.float32(1.0)
    if bits & SCALED_BIT:
        power = SCALE_DOWN if norm < 1.0 else SCALE_UP
    return norm if power < 1.0 else min(norm, np.float32(largest / power)), power


def common_norms(
    words: Sequence[int], norm_format: str, largest: np.float32
) -> tuple[list[np.float32], np.float32 | None]:
    """Norms of one bucket in several messages, multiplied by one power of two, and what undoes it.

    Args:
        words: norm word of each message.
        norm_format: "fp32" or "bf16".
        largest: as for `norm_of_word`.

    Returns:
        Norms, and 1, 2^64 or 2^-64; None in place of the power where a norm is not finite.
    """
    pairs = [norm_of_word(word, norm_format, largest) for word in words]
    if any(np.isnan(norm) for norm, _ in pairs):
        return [], None
    common = np.float32(1.0)
    if any(power > 1.0 or (power == 1.0 and norm >= HUGE) for norm, power in pairs):
        common = SCALE_DOWN
    elif all(norm < 1.0 for norm, _ in pairs) and any(power < 1.0 for _, power in pairs):
        common = SCALE_UP
    return [norm * common * power for norm, power in pairs], np.float32(1.0) / common


@dataclass(frozen=True)
class RoundingTable:
    """How a normalised magnitude becomes a fixed-point position, prepared once per codebook.

    Attributes:
        method: "uniform" (one multiplication), "minimum" (least of s lines, right where gaps do not decrease), or
            "search" (find the interval, then its line).
        slopes: float32 [s], 2^F / gap_i.
        intercepts: float32 [s], 2^F i - slope_i l_i, so that line i passes through (l_i, 2^F i).
        levels: float32 [s + 1].
    """

    method: str
    slopes: Float32Array
    intercepts: Float32Array
    levels: Float32Array


def rounding_table(codebook: Codebook) -> RoundingTable:
    """Rounding table of a codebook.

    The least of all lines equals the line of u's own interval when the lines' slopes do not increase, that is when gaps
    do not decrease: the lines are then the tangents of a concave function.

    Where rounding is to nearest, the table is that of 0 and the middles of neighbouring levels: the index of a
    coordinate is then the whole part of its position.
    """
    levels = np.array(codebook.levels, dtype=np.float32)
    if codebook.rounding == "nearest":
        levels = np.concatenate([[np.float32(0.0)], (levels[1:] + levels[:-1]) * np.float32(0.5)])
    steps = levels.size - 1
    one = float(1 << fraction_bits(codebook.bits))
    slopes = (one / np.diff(levels.astype(np.float64))).astype(np.float32)
    intercepts = (one * np.arange(steps) - slopes.astype(np.float64) * levels[:-1].astype(np.float64)).astype(
        np.float32
    )
    if np.array_equal(levels, (np.arange(steps + 1) / steps).astype(np.float32)):
        method = "uniform"
    elif codebook.bits <= 5 and bool(np.all(np.diff(slopes) <= 0)):
        method = "minimum"
    else:
        method = "search"
    return RoundingTable(method, slopes, intercepts, levels)


def fixed_point(
    bucket: Float32Array, norm: np.float32, table: RoundingTable, bits: int, random: UInt32Array
) -> UInt32Array:
    """Positions of the coordinates of one bucket on the scale of level indices, times 2^F, plus random numbers.

    The sum is rounded once, to nearest even: added to 1.5 * 2^23, it has the ulp 1.

    Args:
        bucket: float32 [n], finite.
        norm: as the receiver reads it; positive, and not so small that 2^F s / norm overflows.
        table: of the codebook.
        bits: code width.
        random: uint32 [n], of F bits.
    """
    start = _ROUNDING_CONSTANT + random.astype(np.float32)
    magnitudes = np.abs(bucket)
    if table.method == "uniform":
        scale = np.float32((table.levels.size - 1) << fraction_bits(bits)) / norm
        return _whole_part(fused_multiply_add(magnitudes, np.full_like(magnitudes, scale), start))
    normalised = magnitudes * (np.float32(1.0) / norm)
    if table.method == "minimum":
        position = np.full_like(normalised, np.inf)
        for slope, intercept in zip(table.slopes, table.intercepts, strict=True):
            position = np.minimum(position, fused_multiply_add(slope, normalised, intercept))
    else:
        index = np.searchsorted(table.levels[1:-1], normalised, side="right")
        position = fused_multiply_add(table.slopes[index], normalised, table.intercepts[index])
    return _whole_part(position + start)


def _whole_part(total: Float32Array) -> UInt32Array:
    """What has been added to the rounding constant, rounded."""
    return (total - _ROUNDING_CONSTANT).astype(np.uint32)


def tile_shape(length: int, lanes: int) -> list[tuple[int, int, int]]:
    """Tiles of a run of coordinates: (first coordinate, coordinates, lanes) each; only the last can be smaller."""
    full = ROWS * lanes
    tiles = [(first, full, lanes) for first in range(0, length - full + 1, full)]
    tail = length % full
    return [*tiles, (length - tail, tail, -(-tail // ROWS))] if tail else tiles


def dither(length: int, lanes: int, coordinate: int, key: DitherKey) -> UInt32Array:
    """16 random bits for each coordinate of one bucket; with strata, for the signed axis.

    `dither.py` says which rows share a hash.

    Args:
        length: coordinates of the bucket.
        lanes: of a full tile.
        coordinate: number of the bucket's first coordinate in the whole model.
        key: stream of the sender.
    """
    random = np.zeros(length, dtype=np.uint32)
    high, low = divmod(coordinate, 2**32)
    for first, size, tile_lanes in tile_shape(length, lanes):
        upper = np.arange(low + first, low + first + ROWS // 2 * tile_lanes, dtype=np.uint64).astype(np.uint32)
        words = hash32(upper, high, key)
        both = np.concatenate([words & np.uint32(0xFFFF), words >> np.uint32(16)])
        if key.strata > 1:
            common_key = DitherKey(key.common_first, key.common_second)
            common = hash32(upper[: 2 * tile_lanes], high, common_key)
            in_bytes = [common >> np.uint32(8 * number) & np.uint32(0xFF) for number in range(ROWS // 2)]
            both = stratified(both, np.concatenate(in_bytes), key)
        random[first : first + size] = both[:size]
    return random


def quantize(
    values: Float32Array,
    codebook: Codebook,
    coordinate: int,
    key: DitherKey,
    rotation: RotationKey,
    dtype: str = "float32",
) -> tuple[UInt32Array, ByteArray]:
    """Norm words and codes of one slice.

    Args:
        values: float32 [n]; float16 and bfloat16 gradients are widened first, which is exact.
        codebook: not exact.
        coordinate: number of the slice's first coordinate in the whole model.
        key: stream of the sender.
        rotation: of the exchange.
        dtype: "float32", "float16" or "bfloat16": of the slice, and so of what it is decoded to.

    Returns:
        uint32 [buckets] norm words (the low 16 bits count with bf16 norms) and uint8 [n] codes.
    """
    if codebook.rotation != "none":
        return quantize_rotated(values, codebook, coordinate, key, rotation)
    table = rounding_table(codebook)
    norms = np.zeros(-(-values.size // codebook.bucket_size), dtype=np.uint32)
    codes = np.zeros(values.size, dtype=np.uint8)
    for index in range(norms.size):
        part = slice(index * codebook.bucket_size, (index + 1) * codebook.bucket_size)
        scale = bucket_scale(values[part], codebook.clip)
        bucket = values[part] * scale
        word = norm_word(bucket_norm(bucket, codebook.norm, codebook.clip), codebook.norm_format, scale)
        norms[index] = word
        norm, _ = norm_of_word(word, codebook.norm_format, LARGEST[dtype])
        if not norm > 0:
            continue
        if codebook.clip:
            bucket = np.clip(bucket, -norm, norm)
        random = dither(bucket.size, codebook.format.lanes, coordinate + part.start, key)
        codes[part] = _codes(bucket, norm, table, codebook, random, key.strata > 1)
    return norms, codes


def quantize_rotated(
    values: Float32Array, codebook: Codebook, coordinate: int, key: DitherKey, rotation: RotationKey
) -> tuple[UInt32Array, ByteArray]:
    """Norm words and codes of one slice with a codebook that rotates; arguments and result as for `quantize`.

    A bucket is brought near 1 by a power of two, whatever its size, and rotated to x. With stochastic rounding, x is
    quantized like any other bucket, with the norm of x. Rounded to nearest, x is normalised by the last level's
    distance from zero, spread * |x| / sqrt(n), and with the levels q that it is rounded to, the norm word is
    S = |x|^2 / <x, q>: the mean of S q over all rotations of x is x (EDEN, arXiv 2108.08842). Walsh-Hadamard
    transforms with random signs are not all rotations: a bias remains in buckets with no more than about ten values
    that are not zero.
    """
    table = rounding_table(codebook)
    levels = np.array(codebook.levels, dtype=np.float32)
    norms = np.zeros(-(-values.size // codebook.bucket_size), dtype=np.uint32)
    codes = np.zeros(values.size, dtype=np.uint8)
    for index in range(norms.size):
        part = slice(index * codebook.bucket_size, (index + 1) * codebook.bucket_size)
        given = values[part]
        largest, scale = bucket_norm(given, "max"), bucket_scale(given)
        if not largest > 0:
            norms[index] = norm_word(largest, codebook.norm_format, scale)
            continue
        up, down = powers_of_scale(int(largest.view(np.uint32)))
        bucket = rotate(given * up, coordinate + part.start, rotation)
        back, forth = down * scale, up * (1 / scale)  # from x to the scaled bucket, and to x
        if codebook.rounding == "stochastic":
            norms[index] = norm_word(bucket_norm(bucket, codebook.norm) * back, codebook.norm_format, scale)
            norm = norm_of_word(int(norms[index]), codebook.norm_format, _INFINITE)[0] * forth
            random = dither(given.size, codebook.format.lanes, coordinate + part.start, key)
        else:
            power = tree_sum(bucket * bucket)
            norm = np.sqrt(power / np.float32(given.size)) * np.float32(codebook.spread)
            random = np.zeros(given.size, dtype=np.uint32)
        is_stratified = key.strata > 1 and codebook.rounding == "stochastic"
        codes[part] = _codes(np.clip(bucket, -norm, norm), norm, table, codebook, random, is_stratified)
        if codebook.rounding == "nearest":
            rounded = levels[codes[part] & np.uint8(levels.size - 1)]
            with np.errstate(divide="ignore"):
                ratio = power / tree_sum(np.abs(bucket) * rounded)
            norm = min(ratio * back, LARGEST["float32"])
            norms[index] = norm_word(norm, codebook.norm_format, scale, to_nearest=True)
    return norms, codes


def _codes(
    bucket: Float32Array,
    norm: np.float32,
    table: RoundingTable,
    codebook: Codebook,
    random: UInt32Array,
    is_stratified: bool,
) -> ByteArray:
    """Code words of one bucket, given 16 random bits for each coordinate."""
    shift = fraction_bits(codebook.bits)
    sign = bucket.view(np.uint32) >> np.uint32(31)
    if is_stratified:
        random = np.where(sign == 1, np.uint32(0xFFFF) - random, random)
    raised = fixed_point(bucket, norm, table, codebook.bits, random >> np.uint32(16 - shift))
    level = np.minimum(raised >> np.uint32(shift), np.uint32(len(codebook.levels) - 1))
    return (level | sign << np.uint32(codebook.bits - 1)).astype(np.uint8)


def pack(codes: ByteArray, bits: int, lanes: int) -> ByteArray:
    """Codes in lane-planar bytes (`layout.py` describes them)."""
    packed = []
    for first, size, tile_lanes in tile_shape(codes.size, lanes):
        tile = np.zeros(ROWS * tile_lanes, dtype=np.uint64)
        tile[:size] = codes[first : first + size]
        rows = tile.reshape(ROWS, tile_lanes)
        words = np.zeros(tile_lanes, dtype=np.uint64)
        for row in range(ROWS):
            words |= rows[row] << np.uint64(row * bits)
        packed += [(words >> np.uint64(8 * plane)).astype(np.uint8) for plane in range(bits)]
    return np.concatenate(packed) if packed else np.zeros(0, dtype=np.uint8)


def unpack(packed: ByteArray, length: int, bits: int, lanes: int) -> ByteArray:
    """Codes from lane-planar bytes: the inverse of `pack`."""
    codes = np.zeros(length, dtype=np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for first, size, tile_lanes in tile_shape(length, lanes):
        begin = bits * first // ROWS
        planes = packed[begin : begin + bits * tile_lanes].reshape(bits, tile_lanes).astype(np.uint64)
        words = np.zeros(tile_lanes, dtype=np.uint64)
        for plane in range(bits):
            words |= planes[plane] << np.uint64(8 * plane)
        rows = [(words >> np.uint64(row * bits)) & mask for row in range(ROWS)]
        codes[first : first + size] = np.concatenate(rows)[:size].astype(np.uint8)
    return codes


def signed_levels(codebook: Codebook) -> Float32Array:
    """Level of each code word, float32 [2^bits]: level 0 is zero with either sign bit."""
    levels = np.array(codebook.levels, dtype=np.float32)
    return np.concatenate([levels, np.float32(0.0) - levels])


def decode_mean(
    messages: list[tuple[UInt32Array, ByteArray]],
    codebook: Codebook,
    scale: np.float32,
    coordinate: int,
    rotation: RotationKey,
    dtype: str = "float32",
) -> Float32Array:
    """Sum of several workers' values in the order given, in float32, rotated back if need be, times a scale.

    A value is norm times level. Where any worker's bucket is not finite, the result is the NaN 0x7FC00000 throughout
    that bucket. Where the sum is a mean, K |scale| <= 1, no result exceeds the largest finite number of the dtype.

    Args:
        messages: norm words and codes of each worker's slice.
        codebook: of the slice.
        scale: factor of the sum.
        coordinate: number of the slice's first coordinate in the whole model.
        rotation: of the exchange.
        dtype: as for `quantize`; results are still to be rounded to it.
    """
    table, is_rotated = signed_levels(codebook), codebook.rotation != "none"
    result = np.empty(messages[0][1].size, dtype=np.float32)
    is_mean = np.abs(scale) * np.float32(len(messages)) <= MEAN_BOUND
    limit = (LARGEST_ROTATED if is_rotated else LARGEST)[dtype] if is_mean else _INFINITE
    for index in range(messages[0][0].size):
        part = slice(index * codebook.bucket_size, (index + 1) * codebook.bucket_size)
        words = [int(norms[index]) for norms, _ in messages]
        norms, power = common_norms(words, codebook.norm_format, _INFINITE if is_rotated else LARGEST[dtype])
        if power is None:
            result[part] = _float(NAN_BITS)
            continue
        parts = [norm * table[codes[part]] for norm, (_, codes) in zip(norms, messages, strict=True)]
        total = parts[0]
        for addend in parts[1:]:
            total = total + addend
        if is_rotated:
            total = rotate_back(total, coordinate + part.start, rotation)
        with np.errstate(over="ignore"):
            result[part] = np.clip(total * scale * power, -limit, limit)
    return result


def bfloat16_bits(values: Float32Array) -> npt.NDArray[np.uint16]:
    """Bits of float32 values rounded to nearest even in bfloat16; 0x7FC0 for every NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(NAN_BITS >> 16), rounded).astype(np.uint16)


def _float(bits: int) -> np.float32:
    """Float32 with these bits."""
    return np.uint32(bits).view(np.float32)
