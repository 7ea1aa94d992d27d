"""Prefix codes over a small alphabet: length-limited canonical Huffman, and Elias gamma of a level's index.

A code gives every symbol a code word, none of which begins another one. Whoever knows the lengths of canonical code
words knows the words, and whoever knows the symbols' weights knows the lengths: everything here works on integers and
breaks ties by the symbol's number, so ranks that hold equal statistics build equal codes and no table travels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from qoda_kernels.errors import CodebookError

MAX_WORD_BITS = 14  # four code words and seven bits in front of them fit into one 64-bit load
INVALID_ENTRY = 0xFFFF  # decoding entry of bits that begin no code word: its advance passes the end of any stream

UInt32Array = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class PrefixCode:
    """A prefix code.

    Attributes:
        words: code word of each symbol, first bit highest.
        lengths: bits of each code word, at most MAX_WORD_BITS; 0 for a symbol that has none.
    """

    words: tuple[int, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.lengths) or not any(self.lengths):
            raise CodebookError(f"{len(self.words)} code words and {len(self.lengths)} lengths are no prefix code")
        if not 0 <= min(self.lengths) <= max(self.lengths) <= MAX_WORD_BITS:
            raise CodebookError(f"code words have 1 to {MAX_WORD_BITS} bits, not {max(self.lengths)}")

    @classmethod
    def canonical(cls, lengths: Sequence[int]) -> "PrefixCode":
        """The code whose words increase with (length, symbol).

        Args:
            lengths: bits of each symbol's code word; 0 for none.

        Raises:
            CodebookError: when no prefix code has these lengths (Kraft's inequality).
        """
        words = [0] * len(lengths)
        word, previous = 0, 0
        for symbol in sorted((s for s, length in enumerate(lengths) if length), key=lambda s: (lengths[s], s)):
            word <<= lengths[symbol] - previous
            if word >> lengths[symbol]:
                raise CodebookError("code word lengths violate Kraft's inequality")
            words[symbol] = word
            word, previous = word + 1, lengths[symbol]
        return cls(tuple(words), tuple(int(length) for length in lengths))

    @property
    def longest(self) -> int:
        """Bits of the longest code word."""
        return max(self.lengths)

    @cached_property
    def encode_table(self) -> UInt32Array:
        """Per symbol: code word, first bit lowest, and its length in the upper 16 bits; uint32 [symbols]."""
        pairs = zip(self.words, self.lengths, strict=True)
        table = np.array([reverse_bits(word, length) | length << 16 for word, length in pairs], dtype=np.uint32)
        table.setflags(write=False)
        return table

    @cached_property
    def decode_table(self) -> UInt32Array:
        """Per value of the next `longest` bits: length, and the symbol in the upper 16 bits; uint32 [2^longest].

        Bits that begin no code word have the entry INVALID_ENTRY.
        """
        table = np.full(1 << self.longest, INVALID_ENTRY, dtype=np.uint32)
        for symbol, (word, length) in enumerate(zip(self.words, self.lengths, strict=True)):
            if length:
                table[reverse_bits(word, length) :: 1 << length] = length | symbol << 16
        table.setflags(write=False)
        return table


def reverse_bits(word: int, length: int) -> int:
    """The lowest `length` bits of a word in reverse order."""
    return int(f"{word:0{length}b}"[::-1], 2) if length else 0


def huffman_lengths(weights: Sequence[int], limit: int) -> list[int]:
    """Code word lengths of least total weight among all prefix codes with words of at most `limit` bits.

    Package-merge (Larmore and Hirschberg, 1990): in each of `limit` rounds the list of symbols is merged with the pairs
    of the round before; a symbol's length is the number of rounds in which it is among the chosen lightest entries.

    Args:
        weights: of each symbol, >= 0; equal weights are ordered by symbol, symbols before pairs.
        limit: longest code word, in bits.

    Raises:
        CodebookError: when there are more symbols than words of `limit` bits, or fewer than two.
    """
    count = len(weights)
    if not 2 <= count <= 1 << limit:
        raise CodebookError(f"no prefix code of {count} symbols has words of 1 to {limit} bits")
    order = sorted(range(count), key=lambda symbol: (weights[symbol], symbol))
    symbols = [(weights[symbol], False) for symbol in order]
    rounds = [symbols]
    for _ in range(limit - 1):
        last = rounds[-1]
        pairs = [(last[i][0] + last[i + 1][0], True) for i in range(0, len(last) - 1, 2)]
        rounds.append(sorted(symbols + pairs, key=lambda entry: entry[0]))
    lengths = [0] * count
    chosen = 2 * count - 2
    for entries in reversed(rounds):
        pairs_chosen = sum(is_pair for _, is_pair in entries[:chosen])
        for symbol in order[: chosen - pairs_chosen]:
            lengths[symbol] += 1
        chosen = 2 * pairs_chosen
    return lengths


def huffman_code(weights: Sequence[int], used: Sequence[bool], limit: int) -> PrefixCode:
    """Canonical Huffman code of the used symbols.

    Args:
        weights: integer weight of each symbol; zero is allowed.
        used: whether the symbol gets a code word.
        limit: longest code word, in bits.
    """
    symbols = [symbol for symbol, is_used in enumerate(used) if is_used]
    lengths = [0] * len(weights)
    for symbol, length in zip(symbols, huffman_lengths([weights[s] for s in symbols], limit), strict=True):
        lengths[symbol] = length
    return PrefixCode.canonical(lengths)


def elias_gamma_word(level: int, levels: int) -> tuple[int, int]:
    """Code word and length of a level's index: Elias gamma of index + 1 (Elias, 1975).

    The number n = index + 1 with j + 1 binary digits is sent as j zeros and then its digits. `levels` is a power of
    two, 2^k, and only the last level has k zeros, so these zeros alone are its word: no word then stays unused.
    """
    number = level + 1
    digits = number.bit_length()
    if number == levels:
        return 0, digits - 1
    return number, 2 * digits - 1
