"""Counter-based random numbers for stochastic rounding: one definition, in NumPy here and in Numba for the kernels.

Every coordinate of the whole model has a 64-bit number. `hash32` of it and a key gives 32 random bits, which serve two
coordinates: in a tile of 8 rows, rows r and r + 4 share the hash of row r's coordinate (r = 0..3); row r takes its low
16 bits, row r + 4 its high 16 bits. No state is kept, so any rank, thread or target computes the same numbers.
Within a bucket only the low word of the number advances, modulo 2^32; the high word is that of the bucket's first
coordinate.

The key (two 32-bit words) comes from (seed, exchange counter, rank, phase) through BLAKE2b, so it differs between
ranks, exchanges and phases. One word enters before the first and the other between the two mixing rounds: with
`coordinate ^ key` alone, two keys would give permutations of one stream. The first multiplication spreads consecutive
coordinates (a Weyl sequence; kernels fold it into constants); without it, or with the second word behind the second
shift, coordinates a few rows apart or two streams were visibly dependent in `tests/kernels/test_dither.py`. The other
two multipliers are those of a public-domain 32-bit hash found by search (hash-prospector).
"""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WEYL_MULTIPLIER = 0x9E3779B1
FIRST_MULTIPLIER = 0x21F0AAAD
SECOND_MULTIPLIER = 0xD35A2D97
HIGH_WORD_MULTIPLIER = 0x85EBCA6B
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class DitherKey:
    """Two 32-bit words that select one stream of random numbers."""

    first: int
    second: int

    @classmethod
    def derive(cls, seed: int, counter: int, rank: int, phase: int) -> "DitherKey":
        """Key of one rank's message in one exchange.

        Args:
            seed: the user's seed, taken modulo 2^64.
            counter: number of the exchange, counted over the whole training.
            rank: position of the sender in its group.
            phase: 0 for the first quantization, 1 for the second (reduce-scatter + all-gather).
        """
        packed = struct.pack("<QQII", seed & (2**64 - 1), counter, rank, phase)
        first, second = struct.unpack("<II", hashlib.blake2b(packed, digest_size=8, person=b"hvd-qoda").digest())
        return cls(first, second)


def hash32(low: npt.NDArray[np.uint32], high: int, key: DitherKey) -> npt.NDArray[np.uint32]:
    """32 random bits for each coordinate.

    Args:
        low: uint32, any shape: low words of the coordinates' numbers in the whole model.
        high: their high word.
        key: the stream.

    Returns:
        uint32 of the same shape.
    """
    word = low * np.uint32(WEYL_MULTIPLIER)
    word ^= np.uint32((key.first + high * HIGH_WORD_MULTIPLIER) & _MASK32)
    word ^= word >> np.uint32(15)
    word *= np.uint32(FIRST_MULTIPLIER)
    word ^= np.uint32(key.second)
    word ^= word >> np.uint32(15)
    word *= np.uint32(SECOND_MULTIPLIER)
    word ^= word >> np.uint32(15)
    return word
