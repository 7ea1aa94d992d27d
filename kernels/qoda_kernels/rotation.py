"""Random rotation of buckets: signs, then orthonormal Walsh-Hadamard transforms; definition in NumPy.

A rotated bucket has nearly normal coordinates, whatever the gradient's distribution, and keeps its Euclidean norm.
The rotation is linear. Where it is common to all ranks of an exchange, a receiver sums rotated values and rotates back
once. With a rotation of its own for every rank each message is rotated back alone: then deterministic rounding makes
errors on every rank that are independent of the others', however alike their gradients, and cancel in the mean.
It stays inside a bucket: layouts, tails and the shares of a reduce-scatter are those of codebooks that do not rotate.

A bucket of n coordinates, m the largest power of two that is not above n: the first m coordinates get random signs and
are transformed; if n is larger, the last m coordinates then get other signs and are transformed, too. So every
coordinate is mixed with m - 1 others, and any n is possible.

The transform combines coordinates m/2 apart, then m/4 apart, ..., then neighbours: (a, b) becomes (a + b, a - b). At
the end everything is multiplied by 1/sqrt(m), rounded to float32. Sums and products are rounded one by one.

Signs are bits of hashes like those of `dither.py`: coordinate p of a block of the
bucket whose first coordinate has the number c gets bit p // 32 (plus 16 in the second block, which has at most 512
coordinates) of the hash of c + p % 32.
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from qoda_kernels.dither import DitherKey, hash32

Float32Array = npt.NDArray[np.float32]

LANES = 32  # coordinates whose signs come from one hash lie so far apart
SECOND_BLOCK_BIT = 16
ROTATED_BUCKET_SIZES = (128, 256, 512, 1024)


@dataclass(frozen=True)
class RotationKey:
    """What selects the signs of one exchange's rotations.

    Attributes:
        first: word of the key; the same for `second`.
        second: see `first`.
    """

    first: int
    second: int

    @classmethod
    def derive(cls, seed: int, counter: int, phase: int, rank: int | None = None) -> "RotationKey":
        """Key common to all ranks, or of one.

        Args:
            seed: the user's seed, taken modulo 2^64.
            counter: number of the exchange, counted over the whole training.
            phase: 0 for the first quantization, 1 for the second (reduce-scatter + all-gather).
            rank: position of the sender whose key it is; None for the common one.
        """
        return _derived(seed, counter, phase, rank)

    @cached_property
    def words(self) -> npt.NDArray[np.uint32]:
        """Both words, for kernels."""
        return np.array((self.first, self.second), dtype=np.uint32)

    @cached_property
    def packed(self) -> int:
        """Both words as one of 64 bits, as they lie in memory."""
        return int(self.words.view(np.uint64)[0])


@lru_cache(maxsize=64)
def _derived(seed: int, counter: int, phase: int, rank: int | None) -> RotationKey:
    packed = struct.pack("<QQI", seed & (2**64 - 1), counter, phase)
    packed += b"" if rank is None else struct.pack("<I", rank)
    first, second = struct.unpack("<II", hashlib.blake2b(packed, digest_size=8, person=b"hvd-qoda-rotate").digest())
    return RotationKey(first, second)


def largest_power_of_two(length: int) -> int:
    """The largest power of two that is not above a positive length."""
    return 1 << (length.bit_length() - 1)


def inverse_root(length: int) -> np.float32:
    """1 / sqrt(length) as float32, for a power of two."""
    return np.float32(np.float64(length) ** -0.5)


def rotate(bucket: Float32Array, coordinate: int, key: RotationKey) -> Float32Array:
    """A bucket, rotated.

    Args:
        bucket: float32 [n], n at most 1024 and then a power of two if above 512; finite.
        coordinate: number of its first coordinate in the whole model.
        key: of the exchange.
    """
    size = largest_power_of_two(bucket.size)
    result = bucket.copy()
    result[:size] = _transformed(result[:size] * _signs(size, 0, coordinate, key), inverse_root(size))
    if size < bucket.size:
        second = _signs(size, SECOND_BLOCK_BIT, coordinate, key)
        result[-size:] = _transformed(result[-size:] * second, inverse_root(size))
    return result


def rotate_back(bucket: Float32Array, coordinate: int, key: RotationKey) -> Float32Array:
    """The inverse of `rotate`, up to rounding."""
    size = largest_power_of_two(bucket.size)
    result = bucket.copy()
    if size < bucket.size:
        second = _signs(size, SECOND_BLOCK_BIT, coordinate, key)
        result[-size:] = _transformed(result[-size:], inverse_root(size)) * second
    result[:size] = _transformed(result[:size], inverse_root(size)) * _signs(size, 0, coordinate, key)
    return result


def _transformed(values: Float32Array, factor: np.float32) -> Float32Array:
    distance = values.size // 2
    while distance:
        pairs = values.reshape(-1, 2, distance)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).ravel()
        distance //= 2
    return values * factor


def _signs(size: int, first_bit: int, coordinate: int, key: RotationKey) -> Float32Array:
    high, low = divmod(coordinate, 2**32)
    numbers = np.arange(low, low + LANES, dtype=np.uint64).astype(np.uint32)
    words = hash32(numbers, high, DitherKey(key.first, key.second))
    place = np.arange(size)
    bits = words[place % LANES] >> (place // LANES + first_bit).astype(np.uint32) & np.uint32(1)
    return np.where(bits == 1, np.float32(-1.0), np.float32(1.0))
