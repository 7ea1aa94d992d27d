"""Compiled tasks of a message, for `worker_threads.py`: which kernel works on which parts, told by addresses.

A task is a row of a table, made once: a kernel, the parts it works on, and the codebook's numbers and tables. What
changes with every call is its context, words of 64 bits: the message, the random key, the tensors. A task takes both by
address, so that threads that never enter Python can run it.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from qoda_kernels import cpu, word32
from qoda_kernels.worker_threads import Task, compiled_task

Words = npt.NDArray[np.uint64]

# Kinds of tasks; each has one signature of kernels.
PLAIN, ROTATED, EXACT = range(3)

# Fields of a task, uint64 each; arrays as address and number of elements.
_KIND = 0
_KERNEL = 1  # address
_PARTS, _PART_COUNT = 2, 3
_SCALARS = 4  # bucket_size, norm_bytes, is_l2, clip; or the one number of a kernel for exact values
_LINES, _LINE_COUNT = 8, 9
_LEVELS, _LEVEL_COUNT = 10, 11
_CELLS = 12  # of 2 elements
_SPREAD = 13  # float32 bits
_MAGNITUDES, _MAGNITUDE_COUNT = 14, 15
_ROOTS = 16  # of cpu.ROOTS
_TASK_WORDS = 17

# Fields of a context, uint64 each.
_TABLE = 0  # address of the tasks
_MESSAGE = 1  # address of the message to encode
_SCALE = 2  # of the sum of decoded messages, float32 bits
_KEY = 3  # uint32 [6]
_ROTATION = 6  # uint32 [2]
_SOURCE_COUNT = 7
_SOURCES = 8  # addresses of the tensors to encode or of the messages to decode; then those of the tensors to write

_BYTES = 8  # of a word
_NO_KEY = (0, 0, 0)
_kernel = njit(nogil=True, error_model="numpy", cache=True)
_inline = njit(inline="always", nogil=True, error_model="numpy")


class TaskTable:
    """Tasks that differ in what they work on, and everything whose address they hold."""

    def __init__(self, rows: "Sequence[TaskRow]") -> None:
        """Lay out a table.

        Args:
            rows: any number of them.
        """
        self.count = len(rows)
        self._rows = list(rows)
        self._words = np.array([row.words() for row in rows], dtype=np.uint64).reshape(self.count, _TASK_WORDS)
        self.address = self._words.ctypes.data


@dataclass(frozen=True)
class TaskRow:
    """One task: a kernel, its parts, and its arguments that never change.

    Attributes:
        kind: PLAIN, ROTATED or EXACT.
        kernel: an encoder of that kind, or a decoder.
        parts: int64 [n, cpu.PART_FIELDS].
        scalars: bucket_size, norm_bytes, and to encode is_l2 and clip; item_bytes or the dtype's kind for exact values.
        lines: float32, to encode.
        levels: float32.
        cells: uint32 [2], to encode.
        spread: float32, to encode rotated buckets.
        magnitudes: float32, likewise.
    """

    kind: int
    kernel: cpu.Kernel
    parts: npt.NDArray[np.int64]
    scalars: tuple[int, ...]
    lines: npt.NDArray[np.float32] | None = None
    levels: npt.NDArray[np.float32] | None = None
    cells: npt.NDArray[np.uint32] | None = None
    spread: float = 0.0
    magnitudes: npt.NDArray[np.float32] | None = None

    def words(self) -> list[int]:
        """The row of the table."""
        words = [0] * _TASK_WORDS
        words[_KIND], words[_KERNEL] = self.kind, self.kernel.address
        words[_PARTS], words[_PART_COUNT] = self.parts.ctypes.data, len(self.parts)
        words[_SCALARS : _SCALARS + len(self.scalars)] = [int(scalar) for scalar in self.scalars]
        words[_SPREAD] = float32_bits(self.spread)
        for place, array in ((_LINES, self.lines), (_LEVELS, self.levels), (_MAGNITUDES, self.magnitudes)):
            if array is not None:
                words[place : place + 2] = array.ctypes.data, array.size
        words[_ROOTS] = cpu.ROOTS.ctypes.data
        if self.cells is not None:
            words[_CELLS] = self.cells.ctypes.data
        return words


def encode_context(
    table: TaskTable, message: int, key: tuple[int, ...], rotation: int, tensors: Sequence[int]
) -> Words:
    """Context of the tasks that encode one message.

    Args:
        table: rows with encoders.
        message: its address.
        key: `DitherKey.packed`.
        rotation: `RotationKey.packed`.
        tensors: their addresses.
    """
    return np.array([table.address, message, 0, *key, rotation, len(tensors), *tensors], dtype=np.uint64)


def decode_context(
    table: TaskTable, messages: Sequence[int], tensors: Sequence[int], scale: int, rotation: int
) -> Words:
    """Context of the tasks that decode messages.

    Args:
        table: rows with decoders.
        messages: their addresses.
        tensors: addresses of what is written.
        scale: factor of the sum, float32 bits.
        rotation: `RotationKey.packed`.
    """
    words = [table.address, 0, scale, *_NO_KEY, rotation, len(messages), *messages, *tensors]
    return np.array(words, dtype=np.uint64)


def sum_context(message: int, cuts: Sequence[int]) -> Words:
    """Context of the tasks that sum a message's bytes; they return what the bytes add to the checksum's total.

    Args:
        message: its address.
        cuts: first bytes of the runs, then the byte behind the last one.
    """
    return np.array([cpu.byte_summer().address, message, *cuts], dtype=np.uint64)


def float32_bits(value: float) -> int:
    """Bits of a number rounded to float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@cache
def encode_task() -> Task:
    """The task that encodes parts of a message; it returns what they add to the checksum's total."""
    return compiled_task(_encode)


@cache
def decode_task() -> Task:
    """The task that decodes parts of messages."""
    return compiled_task(_decode)


@cache
def sum_task() -> Task:
    """The task that sums a run of a message's bytes (`sum_context`)."""
    return compiled_task(_sum)


def _calls(signature: Signature) -> Callable[..., Any]:
    """A function (address, arguments) for kernels: calls a compiled kernel of the signature; errors go on upwards."""

    @intrinsic
    def call(context: Any, address: Any, arguments: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
            convention = context.call_conv
            function = convention.get_function_type(signature.return_type, signature.args)
            pointer = builder.inttoptr(values[0], function.as_pointer())
            unpacked = cgutils.unpack_tuple(builder, values[1])
            status, result = convention.call_function(builder, pointer, signature.return_type, signature.args, unpacked)
            with cgutils.if_unlikely(builder, status.is_error):
                convention.return_status_propagate(builder, status)
            return result

        return signature.return_type(types.uint64, types.Tuple(signature.args)), generate

    return call


_call_encoder, _call_rotated_encoder = _calls(cpu.ENCODE), _calls(cpu.ENCODE_ROTATED)
_call_decoder, _call_rotated_decoder = _calls(cpu.DECODE), _calls(cpu.DECODE_ROTATED)
_call_copy, _call_exact_sum = _calls(cpu.COPY), _calls(cpu.SUM)
_call_byte_summer = _calls(cpu.SUM_BYTES)


words_pointer = intrinsic(word32.pointer(types.uint64))
_half_words_pointer = intrinsic(word32.pointer(types.uint32))
_numbers_pointer = intrinsic(word32.pointer(types.int64))


@_inline
def _words_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(words_pointer(address), (count,), np.uint64)


@_inline
def _half_words_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(_half_words_pointer(address), (count,), np.uint32)


@_inline
def _floats_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(word32.float_pointer(address), (np.int64(count),), np.float32)


@_inline
def _parts_of(task):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(_numbers_pointer(task[_PARTS]), (np.int64(task[_PART_COUNT]), cpu.PART_FIELDS), np.int64)


@_kernel
def _encode(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    head = _words_at(context, _SOURCES)
    task = _words_at(head[_TABLE] + np.uint64(_BYTES * _TASK_WORDS * index), _TASK_WORDS)
    values = _words_at(context + np.uint64(_BYTES * _SOURCES), np.int64(head[_SOURCE_COUNT]))
    parts = _parts_of(task)
    message = head[_MESSAGE]
    key = _half_words_at(context + np.uint64(_BYTES * _KEY), 6)
    first = np.int64(task[_SCALARS])
    if task[_KIND] == np.uint64(EXACT):
        return _call_copy(task[_KERNEL], (values, parts, message, key, first))
    norm_bytes = np.int64(task[_SCALARS + 1])
    is_l2 = task[_SCALARS + 2] != np.uint64(0)
    clip = np.uint32(task[_SCALARS + 3])
    lines = _floats_at(task[_LINES], task[_LINE_COUNT])
    levels = _floats_at(task[_LEVELS], task[_LEVEL_COUNT])
    cells = _half_words_at(task[_CELLS], 2)
    if task[_KIND] == np.uint64(PLAIN):
        return _call_encoder(
            task[_KERNEL], (values, parts, message, key, first, norm_bytes, is_l2, clip, lines, levels, cells)
        )
    rotation = _half_words_at(context + np.uint64(_BYTES * _ROTATION), 2)
    spread = word32.float_from_bits(np.uint32(task[_SPREAD]))
    magnitudes = _floats_at(task[_MAGNITUDES], task[_MAGNITUDE_COUNT])
    return _call_rotated_encoder(
        task[_KERNEL],
        (
            values,
            parts,
            message,
            key,
            rotation,
            first,
            norm_bytes,
            is_l2,
            clip,
            lines,
            levels,
            cells,
            spread,
            magnitudes,
            _floats_at(task[_ROOTS], cpu.ROOTS.size),
        ),
    )


@_kernel
def _decode(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    head = _words_at(context, _SOURCES)
    task = _words_at(head[_TABLE] + np.uint64(_BYTES * _TASK_WORDS * index), _TASK_WORDS)
    count = np.int64(head[_SOURCE_COUNT])
    messages = _words_at(context + np.uint64(_BYTES * _SOURCES), count)
    results = _words_at(context + np.uint64(_BYTES * (_SOURCES + count)), 1)  # and more: nobody asks how many
    parts = _parts_of(task)
    scale = word32.float_from_bits(np.uint32(head[_SCALE]))
    first = np.int64(task[_SCALARS])
    if task[_KIND] == np.uint64(EXACT):
        _call_exact_sum(task[_KERNEL], (messages, results, parts, scale, first))
        return np.uint64(0)
    norm_bytes = np.int64(task[_SCALARS + 1])
    levels = _floats_at(task[_LEVELS], task[_LEVEL_COUNT])
    if task[_KIND] == np.uint64(PLAIN):
        _call_decoder(task[_KERNEL], (messages, results, parts, scale, first, norm_bytes, levels))
        return np.uint64(0)
    rotation = _half_words_at(context + np.uint64(_BYTES * _ROTATION), 2)
    roots = _floats_at(task[_ROOTS], cpu.ROOTS.size)
    _call_rotated_decoder(task[_KERNEL], (messages, results, parts, scale, rotation, first, norm_bytes, levels, roots))
    return np.uint64(0)


@_kernel
def _sum(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    words = _words_at(context, index + 4)
    return _call_byte_summer(words[0], (words[1], np.int64(words[index + 2]), np.int64(words[index + 3])))
