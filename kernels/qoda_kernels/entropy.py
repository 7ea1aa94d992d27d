"""Entropy coding of quantized coordinates: code words from agreed level weights, protocols, lengths.

What all workers must agree on is the **level weights** of each layer type: whole numbers proportional to the
probabilities p_j of its levels, either from the statistics that fitted the levels (`level_weights`) or counted in
earlier messages (`bit_streams.count_levels`, summed over the workers). Both are exact integers, so no table travels.

Two protocols (arXiv 2505.14371, section on coding; the names' assignment is the paper's):

- **main**: one Huffman code per layer type; the type is known from a coordinate's position in the message.
- **alternating**: one Huffman code over all pairs (type, symbol), so that a code word carries its type.

Where no weights are known yet, Elias gamma of the level's index serves. Both signs of a level are equally likely; the
sign is part of the code word, and zero has none (minus zero is sent as zero, which decodes to the same value).

A code word stands for a symbol of one, two or four codes (`entropy_reference.py`), which brings narrow codes close to
their entropy: a code word per code cannot be shorter than one bit.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qoda_kernels import bit_streams
from qoda_kernels.entropy_reference import codes_per_symbol
from qoda_kernels.errors import CodebookError
from qoda_kernels.levels import Distribution, Float64Array, level_count
from qoda_kernels.prefix_codes import INVALID_ENTRY, PrefixCode, UInt32Array, elias_gamma_word, huffman_code
from qoda_kernels.statistics import HistogramStatistics

ByteArray = npt.NDArray[np.uint8]

WEIGHT_TOTAL = 1 << 32  # about the sum of level weights made from probabilities
LONGEST_WORD = 12  # of one type's code: its decoding table then stays in the first-level cache
LONGEST_SHARED_WORD = 14  # of the alternating protocol's code
SIZE_STEPS = 32  # sizes between two powers of two
_SMALLEST_SIZE = 256
_MOST_CODES = 4


def level_probabilities(levels: npt.ArrayLike, statistics: Distribution) -> Float64Array:
    """Probability p_j of each level (QODA, arXiv 2505.14371).

    p_j = Int_{l_{j-1}}^{l_j} (u - l_{j-1})/(l_j - l_{j-1}) dF + Int_{l_j}^{l_{j+1}} (l_{j+1} - u)/(l_{j+1} - l_j) dF.

    Args:
        levels: 0 = l_0 < ... < l_last = 1.
        statistics: F. The weights are those of the statistics: squared norms of buckets. Only histograms hold the
            coordinates at exactly 0 and 1, which lie on levels.

    Returns:
        float64 [levels]; all equal where the statistics have no weight.
    """
    points = np.asarray(levels, dtype=np.float64)
    zero, one, _ = statistics.cumulative_moments(points)
    weight, first, gap = np.diff(zero), np.diff(one), np.diff(points)
    shares = np.zeros(points.size)
    shares[1:] += np.maximum(first - points[:-1] * weight, 0.0) / gap
    shares[:-1] += np.maximum(points[1:] * weight - first, 0.0) / gap
    if isinstance(statistics, HistogramStatistics):
        shares[0] += statistics.cells[0, 0]
        shares[-1] += statistics.cells[-1, 0]
    total = float(np.cumsum(shares)[-1])
    return shares / total if total > 0.0 else np.full(points.size, 1.0 / points.size)


def level_weights(levels: npt.ArrayLike, statistics: Distribution) -> tuple[int, ...]:
    """Level probabilities as whole numbers that add up to about WEIGHT_TOTAL; see `level_probabilities`."""
    return tuple(int(weight) for weight in np.rint(level_probabilities(levels, statistics) * WEIGHT_TOTAL))


@dataclass(frozen=True, eq=False)
class SliceCode:
    """The code of one layer type: packed codes of a slice to bit streams and back.

    Attributes:
        bits: code width.
        lengths: int64 [2^bits of a symbol], bits of each symbol's code word; a symbol that contains minus zero has the
            length of the one with zero.
        encode_table: for `bit_streams.encode`.
        decode_table: for `bit_streams.decode`.
    """

    bits: int
    lengths: npt.NDArray[np.int64]
    encode_table: UInt32Array
    decode_table: UInt32Array

    @classmethod
    def of_prefix_code(cls, bits: int, code: PrefixCode) -> "SliceCode":
        """Code whose words are those of a prefix code of the symbols without minus zero."""
        entries = code.encode_table[_without_minus_zero(bits)]
        return cls(bits, (entries >> np.uint32(16)).astype(np.int64), entries, code.decode_table)

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that differ when any code word differs."""
        described = [np.array([self.bits]), self.encode_table, self.decode_table]
        return hashlib.blake2b(b"".join(part.astype("<u4").tobytes() for part in described), digest_size=8).digest()

    def maximum_bytes(self, packed_bytes: int) -> int:
        """Most bytes of a slice with so many bytes of packed codes."""
        return bit_streams.maximum_bytes(packed_bytes, self.bits, int(self.lengths.max()))

    def encode(self, packed: ByteArray, lanes: int, out: ByteArray) -> int:
        """Entropy-code the lane-planar codes of one slice; returns the bytes written (`bit_streams.encode`)."""
        return bit_streams.encode(packed, self.bits, lanes, self.encode_table, out)

    def decode(self, data: ByteArray, lanes: int, packed: ByteArray) -> int:
        """Codes of the slice with which `data` begins; returns its bytes, or raises (`bit_streams.decode`)."""
        return bit_streams.decode(data, self.bits, lanes, self.decode_table, packed)

    def expected_length(self, probabilities: npt.ArrayLike) -> float:
        """Bits per coordinate, sign included, when levels occur with these probabilities (float [levels])."""
        shares = symbol_probabilities(probabilities, self.bits)
        return float(np.dot(shares, self.lengths)) / codes_per_symbol(self.bits)


def huffman(bits: int, weights: Sequence[int]) -> SliceCode:
    """Canonical Huffman code of one layer type.

    Args:
        bits: code width.
        weights: of each level, >= 0; levels without weight get long code words.

    Raises:
        CodebookError: when the weights do not fit the code width.
    """
    used = _is_normal(bits)
    code = huffman_code(_symbol_weights(_check_weights(bits, weights), bits), used.tolist(), LONGEST_WORD)
    return SliceCode.of_prefix_code(bits, code)


def coded_bits(bits: int, weights: Sequence[int]) -> float:
    """Bits per coordinate of `huffman`'s code where levels occur as often as the weights say: the same on every rank.

    Raises:
        CodebookError: when the weights do not fit the code width.
    """
    code = huffman(bits, weights)
    symbols = _symbol_weights(_check_weights(bits, weights), bits)
    total = sum(weight * int(length) for weight, length in zip(symbols, code.lengths, strict=True))
    return total / max(sum(symbols) * codes_per_symbol(bits), 1)


def power_of_four(exponent: float) -> float:
    """4^exponent, the exponent rounded to 1/64, by correctly rounded operations: the same on every rank."""
    whole, rest = divmod(round(64 * exponent), 64)
    power, root = math.ldexp(1.0, 2 * whole), 4.0
    for place in (32, 16, 8, 4, 2, 1):
        root = math.sqrt(root)
        power *= root if rest & place else 1.0
    return power


def main_protocol(types: Mapping[str, tuple[int, Sequence[int]]]) -> dict[str, SliceCode]:
    """One code per layer type.

    Args:
        types: code width and level weights of each type.
    """
    return {name: huffman(bits, weights) for name, (bits, weights) in types.items()}


def alternating_protocol(types: Mapping[str, tuple[int, Sequence[int], int]]) -> dict[str, SliceCode]:
    """One code over all pairs (type, symbol): each type's code is its part of it, and words of other types are invalid.

    Args:
        types: code width, level weights and number of coordinates of each type, the same order on every rank.

    Raises:
        CodebookError: when there are more than 2^LONGEST_SHARED_WORD pairs, or weights do not fit.
    """
    weights: list[int] = []
    used: list[bool] = []
    for name, (bits, given, coordinates) in types.items():
        if coordinates < 0:
            raise CodebookError(f"type {name!r} has {coordinates} coordinates")
        own = _check_weights(bits, given)
        group = codes_per_symbol(bits)
        # Symbols of this type, times 2^140 / (sum of the type's symbol weights), in whole numbers.
        scale = (coordinates * (_MOST_CODES // group) << 140) // max(2 * sum(own), 1) ** group
        weights += [weight * scale for weight in _symbol_weights(own, bits)]
        used += _is_normal(bits).tolist()
    code = huffman_code(weights, used, LONGEST_SHARED_WORD)
    codes = {}
    begin = 0
    for name, (bits, _, _) in types.items():
        end = begin + (1 << bits * codes_per_symbol(bits))
        symbols = code.decode_table >> np.uint32(16)
        is_own = (symbols >= begin) & (symbols < end) & (code.decode_table != INVALID_ENTRY)
        own_entries = code.decode_table - np.uint32(begin << 16)
        entries = code.encode_table[begin:end][_without_minus_zero(bits)]
        lengths = (entries >> np.uint32(16)).astype(np.int64)
        codes[name] = SliceCode(bits, lengths, entries, np.where(is_own, own_entries, np.uint32(INVALID_ENTRY)))
        begin = end
    return codes


def elias_gamma(bits: int) -> SliceCode:
    """Elias gamma of the level's index, then the sign of levels that are not zero (QSGD, arXiv 1610.02132)."""
    group = codes_per_symbol(bits)
    levels = level_count(bits)
    words = [0] * (1 << bits * group)
    lengths = [0] * len(words)
    for symbol in np.flatnonzero(_is_normal(bits)).tolist():
        for place in range(group):
            code = symbol >> place * bits & (1 << bits) - 1
            level = code & levels - 1
            word, length = elias_gamma_word(level, levels)
            if level:
                word, length = word << 1 | code >> bits - 1, length + 1
            words[symbol] = words[symbol] << length | word
            lengths[symbol] += length
    return SliceCode.of_prefix_code(bits, PrefixCode(tuple(words), tuple(lengths)))


def symbol_probabilities(probabilities: npt.ArrayLike, bits: int) -> Float64Array:
    """Probability of each symbol, float64 [2^bits of a symbol], from those of the levels, independent of each other."""
    levels = np.asarray(probabilities, dtype=np.float64)
    if levels.shape != (level_count(bits),):
        raise CodebookError(f"{bits} bits need {level_count(bits)} probabilities, not {levels.shape}")
    codes = np.concatenate([levels, np.zeros(levels.size)])
    codes[1 : levels.size] = codes[levels.size + 1 :] = levels[1:] / 2.0
    symbols = codes
    for _ in range(codes_per_symbol(bits) - 1):
        symbols = np.multiply.outer(symbols, codes).ravel()
    return symbols


def entropy(probabilities: npt.ArrayLike) -> float:
    """H = -sum p log2 p in bits; terms with p = 0 are 0."""
    p = np.asarray(probabilities, dtype=np.float64)
    p = p[p > 0.0]
    return float(-np.sum(p * np.log2(p)))


def coordinate_entropy(probabilities: npt.ArrayLike) -> float:
    """Entropy of one coordinate: of its level, plus one bit of sign where the level is not zero."""
    return entropy(probabilities) + 1.0 - float(np.asarray(probabilities, dtype=np.float64)[0])


def main_bound(types: Sequence[tuple[float, npt.ArrayLike]]) -> float:
    """Bound of the main protocol in bits per coordinate: sum_m mu_m [H(l^m) + 1 + (1 - p_0^m)].

    Args:
        types: mu_m, the share of coordinates, and the level probabilities of each type. The norms come on top.
    """
    return sum(share * (coordinate_entropy(probabilities) + 1.0) for share, probabilities in types)


def alternating_bound(types: Sequence[tuple[float, npt.ArrayLike]]) -> float:
    """Bound of the alternating protocol in bits per coordinate: that of the main protocol plus H(mu)."""
    return entropy([share for share, _ in types]) + main_bound(types)


def stale_penalty(true: npt.ArrayLike, assumed: npt.ArrayLike) -> float:
    """Bits per coordinate that an ideal code for the assumed level probabilities costs more: D(true || assumed)."""
    p, q = np.asarray(true, dtype=np.float64), np.asarray(assumed, dtype=np.float64)
    used = p > 0.0
    if np.any(q[used] <= 0.0):
        return math.inf
    return float(np.sum(p[used] * np.log2(p[used] / q[used])))


def padded_size(size: int) -> int:
    """The next of a few sizes: a multiple of 1/32 of the power of two below it, at least 256 bytes.

    Messages of nearly equal content then have equal sizes, which the host's caches recognise; at most 3.1 % is added.
    """
    if size <= _SMALLEST_SIZE:
        return _SMALLEST_SIZE
    step = (1 << (size - 1).bit_length() - 1) // SIZE_STEPS
    return -(-size // step) * step


def _check_weights(bits: int, weights: Sequence[int]) -> list[int]:
    given = [int(weight) for weight in weights]
    if len(given) != level_count(bits) or min(given) < 0:
        raise CodebookError(f"{bits} bits need {level_count(bits)} level weights >= 0; got {list(weights)}")
    return given


def _symbol_weights(weights: Sequence[int], bits: int) -> list[int]:
    """Weight of each symbol: the product over its codes of twice the weight of zero, or of the level's weight."""
    own = [2 * weights[0], *weights[1:]]
    codes = [*own, 0, *own[1:]]
    return [math.prod(factors) for factors in itertools.product(codes, repeat=codes_per_symbol(bits))]


def _without_minus_zero(bits: int) -> npt.NDArray[np.intp]:
    """Per symbol: the symbol with zero in place of minus zero."""
    group = codes_per_symbol(bits)
    code = np.arange(1 << bits)
    code[1 << bits - 1] = 0
    symbols = np.arange(1 << bits * group)
    parts = [code[symbols >> place * bits & (1 << bits) - 1] << place * bits for place in range(group)]
    return np.sum(parts, axis=0).astype(np.intp)


def _is_normal(bits: int) -> npt.NDArray[np.bool_]:
    """Per symbol: whether it contains no minus zero."""
    normal = _without_minus_zero(bits)
    return normal == np.arange(normal.size)
