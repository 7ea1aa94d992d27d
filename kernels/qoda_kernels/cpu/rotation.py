"""Rotation of a slice's last bucket, which can have any length (`qoda_kernels/rotation.py`).

Those of a codebook's bucket size are rotated by vector code (`tiles.rotate`).
"""

import numpy as np
import numpy.typing as npt

from qoda_kernels import word32
from qoda_kernels.cpu.compilation import inline, kernel
from qoda_kernels.kernel_constants import FIRST_MULTIPLIER, SECOND_BLOCK_BIT, SECOND_MULTIPLIER, SIGN, SIGN_LANES, WEYL
from qoda_kernels.rotation import inverse_root

ROOTS = np.array([inverse_root(1 << power) for power in range(11)])  # 1 / sqrt(2^i), for the kernels of rotated buckets


@kernel
def _fill_signs(weyl: np.uint32, first: np.uint32, second: np.uint32, words: npt.NDArray[np.uint32]) -> None:
    """Hashes of SIGN_LANES neighbouring coordinates (`dither.hash32`), whose bits are signs (`rotation.py`)."""
    for lane in range(words.size):
        word = word32.bit_xor(word32.add(weyl, word32.multiply(np.uint32(lane), WEYL)), first)
        word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
        word = word32.bit_xor(word32.multiply(word, FIRST_MULTIPLIER), second)
        word = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))
        word = word32.multiply(word, SECOND_MULTIPLIER)
        words[lane] = word32.bit_xor(word, word32.shift_right(word, np.uint32(15)))


@kernel
def _apply_signs(values: npt.NDArray[np.float32], first_bit: int, words: npt.NDArray[np.uint32]) -> None:
    """Give a block of a bucket the signs that begin at a bit of the words."""
    for place in range(values.size):
        word = words[place % SIGN_LANES]
        bit = word32.shift_left(word, np.uint32(31 - first_bit - place // SIGN_LANES))
        sign = word32.bit_and(bit, SIGN)
        values[place] = word32.float_from_bits(word32.bit_xor(word32.float_bits(values[place]), sign))


@kernel
def _transform(values: npt.NDArray[np.float32], factor: np.float32) -> None:
    """Walsh-Hadamard transform of a power of two of values, times a factor."""
    distance = values.size // 2
    while distance > 0:
        for begin in range(0, values.size, 2 * distance):
            for place in range(begin, begin + distance):
                a, b = values[place], values[place + distance]
                values[place] = np.float32(a + b)
                values[place + distance] = np.float32(a - b)
        distance //= 2
    for place in range(values.size):
        values[place] = np.float32(values[place] * factor)


@inline
def block_power(length):  # type: ignore[no-untyped-def]  # Numba infers
    """Binary logarithm of the largest power of two that is not above a length."""
    power = 0
    while 2 << power <= length:
        power += 1
    return power


@kernel
def rotate_tail(
    values: npt.NDArray[np.float32],
    weyl: np.uint32,
    first: np.uint32,
    second: np.uint32,
    factors: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
) -> None:
    """`rotation.rotate`, in place, for any length.

    Args:
        values: float32 [n], n at most 512 or a power of two.
        weyl: as for `tiles.rotate`; so are first and second.
        first: see there.
        second: see there.
        factors: float32, 1 / sqrt(2^i).
        words: uint32 [SIGN_LANES], scratch.
    """
    _fill_signs(weyl, first, second, words)
    power = block_power(values.size)
    block = values[: 1 << power]
    _apply_signs(block, 0, words)
    _transform(block, factors[power])
    if block.size < values.size:
        block = values[values.size - block.size :]
        _apply_signs(block, SECOND_BLOCK_BIT, words)
        _transform(block, factors[power])


@kernel
def rotate_tail_back(
    values: npt.NDArray[np.float32],
    weyl: np.uint32,
    first: np.uint32,
    second: np.uint32,
    factors: npt.NDArray[np.float32],
    words: npt.NDArray[np.uint32],
) -> None:
    """`rotation.rotate_back`, in place; the arguments are those of `rotate_tail`."""
    _fill_signs(weyl, first, second, words)
    power = block_power(values.size)
    size = 1 << power
    if size < values.size:
        block = values[values.size - size :]
        _transform(block, factors[power])
        _apply_signs(block, SECOND_BLOCK_BIT, words)
    block = values[:size]
    _transform(block, factors[power])
    _apply_signs(block, 0, words)
