"""Bytes, norm words and values at an address."""

import numpy as np
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu.arguments import FLOAT16, FLOAT32
from qoda_kernels.cpu.compilation import inline
from qoda_kernels.cpu.half_precision import widen_half


@inline
def bytes_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    """Array of so many bytes."""
    return carray(word32.byte_pointer(address), (count,), np.uint8)


@inline
def write_norm(address, norm_bytes, norm_bits):  # type: ignore[no-untyped-def]  # Numba infers
    """Write the upper norm_bytes bytes, 2 or 4, of a norm word."""
    if norm_bytes == 2:
        carray(word32.half_pointer(address), (1,), np.uint16)[0] = np.uint16(norm_bits >> np.uint32(16))
    else:
        carray(word32.word_pointer(address), (1,), np.uint32)[0] = norm_bits


@inline
def read_norm(address, norm_bytes):  # type: ignore[no-untyped-def]  # Numba infers
    """A norm as float32 bits."""
    if norm_bytes == 2:
        half = np.uint32(carray(word32.half_pointer(address), (1,), np.uint16)[0])
        return word32.shift_left(half, np.uint32(16))
    return carray(word32.word_pointer(address), (1,), np.uint32)[0]


@inline
def value_at(address, kind, place):  # type: ignore[no-untyped-def]  # Numba infers
    """A value of up to 32 bits as float32."""
    if kind == FLOAT32:
        return carray(word32.float_pointer(address), (place + 1,), np.float32)[place]
    half = np.uint32(carray(word32.half_pointer(address), (place + 1,), np.uint16)[place])
    if kind == FLOAT16:
        return widen_half(half)
    return word32.float_from_bits(word32.shift_left(half, np.uint32(16)))
