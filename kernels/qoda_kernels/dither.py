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

**Stratified** numbers make the errors of S ranks cancel: rank k's number falls into stratum (k + s_i) mod S of [0, 1),
where the shift s_i of coordinate i is common to all ranks, and is uniform inside it. Each rank's number is exactly
uniform, so each message stays unbiased; the mean's variance falls to 1/2 + 1/(2 S^2) of independent numbers' for
unrelated gradients and to 1/S for equal ones. The number belongs to the signed axis: where the coordinate is negative,
u becomes 1 - u; else unrelated gradients would gain nothing. The shift takes 8 bits of a hash that is common to the
ranks: in a tile, row r of 0, 1 gives its bytes 0 to 3 to rows r, r + 2, r + 4, r + 6. Each exchange rotates all ranks
by a common uniform number, which makes the stratum uniform even where S does not divide 256.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

WEYL_MULTIPLIER = 0x9E3779B1
FIRST_MULTIPLIER = 0x21F0AAAD
SECOND_MULTIPLIER = 0xD35A2D97
HIGH_WORD_MULTIPLIER = 0x85EBCA6B
MAX_STRATA = 64  # for more ranks, ranks k and k + 64 share a stratum
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class DitherKey:
    """What selects one stream of random numbers.

    Attributes:
        first: word of the key; the same for `second`.
        second: see `first`.
        common_first: word of the key that all ranks of one exchange share; 0 with one stratum.
        common_second: likewise.
        position: of the rank among the strata.
        strata: their number S; 1 for independent numbers.
    """

    first: int
    second: int
    common_first: int = 0
    common_second: int = 0
    position: int = 0
    strata: int = 1

    @classmethod
    def derive(cls, seed: int, counter: int, rank: int, phase: int, ranks: int = 1) -> "DitherKey":
        """Key of one rank's message in one exchange.

        Args:
            seed: the user's seed, taken modulo 2^64.
            counter: number of the exchange, counted over the whole training.
            rank: position of the sender in its group.
            phase: 0 for the first quantization, 1 for the second (reduce-scatter + all-gather).
            ranks: number of ranks among which the numbers are stratified; 1 for independent numbers.
        """
        return _derived(seed, counter, rank, phase, ranks)

    @cached_property
    def words(self) -> npt.NDArray[np.uint32]:
        """The fields in order, for kernels."""
        fields = (self.first, self.second, self.common_first, self.common_second, self.position, self.strata)
        return np.array(fields, dtype=np.uint32)

    @cached_property
    def packed(self) -> tuple[int, ...]:
        """The same six words as three of 64 bits, as they lie in memory."""
        return tuple(self.words.view(np.uint64).tolist())


@lru_cache(maxsize=64)  # a model of many small messages asks for the same key again and again
def _derived(seed: int, counter: int, rank: int, phase: int, ranks: int) -> DitherKey:
    packed = struct.pack("<QQII", seed & (2**64 - 1), counter, rank, phase)
    first, second = struct.unpack("<II", hashlib.blake2b(packed, digest_size=8, person=b"hvd-qoda").digest())
    if ranks == 1:
        return DitherKey(first, second)
    packed = struct.pack("<QQII", seed & (2**64 - 1), counter, ranks, phase)
    digest = hashlib.blake2b(packed, digest_size=16, person=b"hvd-qoda-common").digest()
    common_first, common_second, rotation = struct.unpack("<IIQ", digest)
    strata = min(ranks, MAX_STRATA)
    return DitherKey(first, second, common_first, common_second, (rank + rotation) % strata, strata)


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


def stratified(
    random: npt.NDArray[np.uint32], common: npt.NDArray[np.uint32], key: DitherKey
) -> npt.NDArray[np.uint32]:
    """16 random bits in the stratum of the key's rank: floor((65536 j + U) / S) for stratum j and U = `random`.

    The division is a multiplication by 1/S in float32, rounded once and exact here: a quotient plus 1/(2 S) is at least
    1/(2 S) >= 2^-7 away from the next integer, and the error is below 2^-7.

    Args:
        random: uint32, any shape: 16 independent random bits for each coordinate.
        common: uint32 of the same shape: 8 bits each, common to all ranks.
        key: of the message.
    """
    strata = np.uint32(key.strata)
    moved = (common * strata >> np.uint32(8)) + np.uint32(key.position)
    stratum = np.where(moved >= strata, moved - strata, moved)
    return (stratum << np.uint32(16) | random) // strata
