"""The kernels for parts whose values travel raw."""

from functools import cache

import numpy as np
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu.arguments import (
    CODES_BEGIN,
    CODES_END,
    COPY,
    END,
    FIRST,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LENGTH,
    SEGMENT,
    SUM,
)
from qoda_kernels.cpu.checksums import sum_bytes
from qoda_kernels.cpu.compilation import Kernel, compile_kernel, kernel
from qoda_kernels.cpu.half_precision import rounded_to_bfloat16, rounded_to_half
from qoda_kernels.cpu.memory import bytes_at, value_at


@kernel
def _copy_exact(values, parts, message, item_bytes):  # type: ignore[no-untyped-def]  # Numba infers
    total = np.uint64(0)
    for index in range(parts.shape[0]):
        part = parts[index]
        size = part[LENGTH] * item_bytes
        source = bytes_at(values[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST]), size)
        target = bytes_at(message + np.uint64(part[CODES_BEGIN]), part[END] - part[CODES_BEGIN])
        target[:size] = source
        target[size:] = np.uint8(0)
        total += sum_bytes(message, part[CODES_BEGIN], part[CODES_END])
    return total


@kernel
def _sum_exact(messages, results, parts, scale, kind):  # type: ignore[no-untyped-def]  # Numba infers
    item_bytes = 8 if kind == FLOAT64 else (4 if kind == FLOAT32 else 2)
    for index in range(parts.shape[0]):
        part = parts[index]
        length = part[LENGTH]
        begin = np.uint64(part[CODES_BEGIN])
        tensor = results[part[SEGMENT]] + np.uint64(item_bytes * part[FIRST])
        if kind == FLOAT64:
            doubles = carray(word32.double_pointer(tensor), (length,), np.float64)
            for place in range(length):
                wide = np.float64(-0.0)
                for source in range(messages.size):
                    received = carray(word32.double_pointer(messages[source] + begin), (length,), np.float64)
                    wide += received[place]
                doubles[place] = wide * np.float64(scale)
            continue
        for place in range(length):
            total = np.float32(-0.0)  # the sum of -0 and x is x, whatever the sign of a zero x
            for source in range(messages.size):
                total = np.float32(total + value_at(messages[source] + begin, kind, place))
            total = np.float32(total * scale)
            if kind == FLOAT32:
                carray(word32.float_pointer(tensor), (length,), np.float32)[place] = total
            else:
                half = rounded_to_half(total) if kind == FLOAT16 else rounded_to_bfloat16(total)
                carray(word32.half_pointer(tensor), (length,), np.uint16)[place] = np.uint16(half)


@cache
def exact_encoder() -> Kernel:
    """Kernel that copies parts whose values travel raw.

    It takes the first three arguments of an `encoder`'s kernel, and item_bytes: the bytes of one value.
    """
    return compile_kernel(_copy_exact, COPY, "copies exact values")


@cache
def exact_decoder() -> Kernel:
    """Kernel that sums parts whose values travel raw, in float32 (float64 for float64).

    It takes the first four arguments of a `decoder`'s kernel, and kind: FLOAT32, FLOAT16, BFLOAT16 or FLOAT64.
    """
    return compile_kernel(_sum_exact, SUM, "sums exact values")
