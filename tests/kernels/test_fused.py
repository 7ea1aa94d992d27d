"""A fused multiply-add made of doubles, for processors without one: rounded once, where rounding twice would show."""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from qoda_kernels.cpu.vectors import Floats

COUNT = 8


@intrinsic
def fused_in_doubles(context: Any, one: Any, two: Any, addend: Any, target: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, two, addend = (Floats.load(builder, address, COUNT) for address in arguments[:3])
        one._fused_in_doubles(two, addend).store(arguments[3])
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 4), generate


@njit
def run(one: int, two: int, addend: int, target: int) -> None:
    fused_in_doubles(np.uint64(one), np.uint64(two), np.uint64(addend), np.uint64(target))


def test_sums_next_to_the_middle_of_two_floats_are_rounded_once() -> None:
    tiny = 2.0**-23
    # (1 + tiny) (1 - tiny) 2^-24 is less than half the distance of two floats near 1 by 2^-70.
    one = np.full(COUNT, 2.0**-24 * (1 + tiny), dtype=np.float32)
    two = np.full(COUNT, 1 - tiny, dtype=np.float32)
    signs = np.array([1, -1] * (COUNT // 2), dtype=np.float32)
    addend = (signs * np.float32(1 + tiny)).astype(np.float32)
    found = np.empty(COUNT, dtype=np.float32)
    factors = (signs * one).astype(np.float32)
    run(*(array.ctypes.data for array in (factors, two, addend, found)))
    np.testing.assert_array_equal(found, addend)
    # Rounded to double first, the sum lies in the middle, and goes to the even neighbour.
    twice = (factors.astype(np.float64) * two + addend).astype(np.float32)
    assert (twice != addend).all()
