"""Compiled tasks of a message, for `worker_threads.py`: which kernel works on which parts, told by addresses.

A task is a row of a table, made once: a kernel, the parts it works on, and the codebook's numbers and tables. What
changes with every call is its context, words of 64 bits: the message, the random key, the tensors. A task takes both by
address, so that threads that never enter Python can run it.
"""

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, types
from numba.extending import intrinsic

from qoda_kernels import kernel_constants, word32, worker_threads
from qoda_kernels.compilation import cached_kernel
from qoda_kernels.compiled_sources import digest_of, named_after
from qoda_kernels.cpu import arguments
from qoda_kernels.cpu.checksums import byte_summer
from qoda_kernels.cpu.compilation import Kernel, inline
from qoda_kernels.cpu.rotation import ROOTS
from qoda_kernels.layout import HEADER_BYTES
from qoda_kernels.wire import CHECKSUM_OF_ZEROS, HeaderWords
from qoda_kernels.worker_threads import Task, calls, compiled_task

Words = npt.NDArray[np.uint64]

# Kinds of tasks; each has one signature of kernels.
PLAIN, ROTATED, EXACT = range(3)

# Fields of a task, uint64 each; arrays by their addresses.
_KIND = 0
_KERNEL = 1  # address
_PARTS, _PART_COUNT = 2, 3
_SCALARS = 4  # bucket_size, norm_bytes, is_l2, clip; or the one number of a kernel for exact values
_LINES, _LEVELS, _CELLS = 8, 9, 10
_SPREAD = 11  # float32 bits
_MAGNITUDES = 12
_ROOTS = 13  # of cpu.rotation.ROOTS
_TASK_WORDS = 14

# Fields of a context that encodes or decodes, uint64 each.
_TABLE = 0  # address of the tasks
_MESSAGE = 1  # address of the message to encode
_SCALE = 2  # of the sum of decoded messages, float32 bits
_KEY = 3  # uint32 [6]
_ROTATION = 6  # uint32 [2]
_HEADER = 7  # `wire.HeaderWords` of the encoded message
_SOURCE_COUNT = 11
_SOURCES = 12  # addresses of the tensors to encode or of the messages to decode; then those of the tensors to write

# Fields of a context that sums and checks messages, likewise.
_SUMMER = 0  # address of `cpu.checksums.byte_summer`
_RUNS = 1  # that each message is cut into
_MESSAGES = 2  # address and `wire.HeaderWords` of each
_MESSAGE_WORDS = 5

_BYTES = 8  # of a word
_NO_KEY, _NO_HEADER = (0, 0, 0), (0, 0, 0, 0)
_DIGEST = digest_of(Path(arguments.__file__).parent, [word32, worker_threads], [kernel_constants])


def _kernel(function: Callable[..., Any]) -> Any:
    return cached_kernel(named_after(_DIGEST, function))


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
        parts: int64 [n, arguments.PART_FIELDS].
        scalars: bucket_size, norm_bytes, and to encode is_l2 and clip; item_bytes or the dtype's kind for exact values.
        lines: float32, to encode.
        levels: float32.
        cells: uint32 [2], to encode.
        spread: float32, to encode rotated buckets.
        magnitudes: float32, likewise.
    """

    kind: int
    kernel: Kernel
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
        words[_ROOTS] = ROOTS.ctypes.data
        tables = ((_LINES, self.lines), (_LEVELS, self.levels), (_CELLS, self.cells), (_MAGNITUDES, self.magnitudes))
        for place, array in tables:
            if array is not None:
                words[place] = array.ctypes.data
        return words


@cache
def _packer(count: int) -> Callable[..., bytes]:
    """Function that packs so many words."""
    return struct.Struct(f"={count}Q").pack


def encode_context(
    table: TaskTable,
    message: int,
    key: tuple[int, ...],
    rotation: int,
    header: HeaderWords,
    tensors: Sequence[int],
) -> bytes:
    """Context of `encode_task`.

    Args:
        table: rows with encoders.
        message: its address.
        key: `DitherKey.packed`.
        rotation: `RotationKey.packed`.
        header: of the message.
        tensors: their addresses.
    """
    words = table.address, message, 0, *key, rotation, *header, len(tensors), *tensors
    return _packer(len(words))(*words)


def decode_context(
    table: TaskTable, messages: Sequence[int], tensors: Sequence[int], scale: int, rotation: int
) -> bytes:
    """Context of `decode_task`.

    Args:
        table: rows with decoders.
        messages: their addresses.
        tensors: addresses of what is written.
        scale: factor of the sum, float32 bits.
        rotation: `RotationKey.packed`.
    """
    words = table.address, 0, scale, *_NO_KEY, rotation, *_NO_HEADER, len(messages), *messages, *tensors
    return _packer(len(words))(*words)


def check_context(messages: Sequence[tuple[int, ...]], runs: int) -> bytes:
    """Context of `check_task` and `sum_task`, which are called for runs * messages indices.

    Args:
        messages: address of each and what its header must be (`wire.HeaderWords`).
        runs: that each message is cut into, so that several threads can sum it.
    """
    words = byte_summer().address, runs, *itertools.chain.from_iterable(messages)
    return _packer(len(words))(*words)


def float32_bits(value: float) -> int:
    """Bits of a number rounded to float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@cache
def encode_task() -> Task:
    """The task that encodes parts of a message; then it writes the header."""
    return compiled_task(_encode, _seal)


@cache
def decode_task() -> Task:
    """The task that decodes parts of messages."""
    return compiled_task(_decode)


@cache
def check_task() -> Task:
    """The task that compares messages' headers with the expected ones and with their payloads' checksums.

    Its result is 0 if all are equal, else 1 + the number of the first message that is not.
    """
    return compiled_task(_sum, _first_refused)


@cache
def sum_task() -> Task:
    """The task that gives the last word of one message's header: its payload's size, and its checksum times 2^32."""
    return compiled_task(_sum, _last_word_of_one)


_call_encoder, _call_rotated_encoder = calls(arguments.ENCODE), calls(arguments.ENCODE_ROTATED)
_call_decoder, _call_rotated_decoder = calls(arguments.DECODE), calls(arguments.DECODE_ROTATED)
_call_copy, _call_exact_sum = calls(arguments.COPY), calls(arguments.SUM)
_call_byte_summer = calls(arguments.SUM_BYTES)


words_pointer = intrinsic(word32.pointer(types.uint64))
_numbers_pointer = intrinsic(word32.pointer(types.int64))


@inline
def _words_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(words_pointer(address), (count,), np.uint64)


@inline
def _half_words_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(word32.word_pointer(address), (count,), np.uint32)


@inline
def _floats_at(address, count):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(word32.float_pointer(address), (np.int64(count),), np.float32)


@inline
def _parts_of(task):  # type: ignore[no-untyped-def]  # Numba infers
    return carray(_numbers_pointer(task[_PARTS]), (np.int64(task[_PART_COUNT]), arguments.PART_FIELDS), np.int64)


@inline
def _folded(total):  # type: ignore[no-untyped-def]  # Numba infers
    """`wire.fold_checksum`."""
    return (total ^ (total >> np.uint64(32))) & np.uint64(0xFFFFFFFF) ^ np.uint64(CHECKSUM_OF_ZEROS)


@_kernel
def _encode(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    head = _words_at(context, _SOURCES)
    task = _words_at(head[_TABLE] + np.uint64(_BYTES * _TASK_WORDS * index), _TASK_WORDS)
    values = _words_at(context + np.uint64(_BYTES * _SOURCES), np.int64(head[_SOURCE_COUNT]))
    parts = _parts_of(task)
    message = head[_MESSAGE]
    first = np.int64(task[_SCALARS])
    if task[_KIND] == np.uint64(EXACT):
        return _call_copy(task[_KERNEL], (values, parts, message, first))
    key = context + np.uint64(_BYTES * _KEY)
    norm_bytes = np.int64(task[_SCALARS + 1])
    is_l2 = task[_SCALARS + 2] != np.uint64(0)
    clip = np.uint32(task[_SCALARS + 3])
    lines, levels, cells = task[_LINES], task[_LEVELS], task[_CELLS]
    if task[_KIND] == np.uint64(PLAIN):
        return _call_encoder(
            task[_KERNEL], (values, parts, message, key, first, norm_bytes, is_l2, clip, lines, levels, cells)
        )
    rotation = _half_words_at(context + np.uint64(_BYTES * _ROTATION), 2)
    spread = word32.float_from_bits(np.uint32(task[_SPREAD]))
    roots = _floats_at(task[_ROOTS], ROOTS.size)
    codebook = first, norm_bytes, is_l2, clip, lines, levels, cells, spread, task[_MAGNITUDES], roots
    return _call_rotated_encoder(task[_KERNEL], (values, parts, message, key, rotation, *codebook))


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
    norm_bytes, levels = np.int64(task[_SCALARS + 1]), task[_LEVELS]
    if task[_KIND] == np.uint64(PLAIN):
        _call_decoder(task[_KERNEL], (messages, results, parts, scale, first, norm_bytes, levels))
        return np.uint64(0)
    rotation = _half_words_at(context + np.uint64(_BYTES * _ROTATION), 2)
    roots = _floats_at(task[_ROOTS], ROOTS.size)
    _call_rotated_decoder(task[_KERNEL], (messages, results, parts, scale, rotation, first, norm_bytes, levels, roots))
    return np.uint64(0)


@inline
def _header_of(message):  # type: ignore[no-untyped-def]  # Numba infers
    return _words_at(message, HEADER_BYTES // _BYTES)


@inline
def _last_word(payload_bytes, results, begin, count):  # type: ignore[no-untyped-def]  # Numba infers
    """Last word of a header: size and checksum of the payload, given what its parts add to the checksum's total."""
    total = np.uint64(0)
    for result in _words_at(results, begin + count)[begin:]:
        total += result
    return payload_bytes | _folded(total) << np.uint64(32)


@_kernel
def _seal(context, results, count):  # type: ignore[no-untyped-def]  # Numba infers
    """Write the header of an encoded message."""
    head = _words_at(context, _SOURCES)
    header = _header_of(head[_MESSAGE])
    for place in range(3):
        header[place] = head[_HEADER + place]
    header[3] = _last_word(head[_HEADER + 3], results, 0, count)
    return np.uint64(0)


@inline
def _expected(context, number):  # type: ignore[no-untyped-def]  # Numba infers
    """Address of a message to check, and what its header must be."""
    return _words_at(context + np.uint64(_BYTES) * np.uint64(_MESSAGES + _MESSAGE_WORDS * number), _MESSAGE_WORDS)


@_kernel
def _sum(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    """What one run of a message's bytes adds to the checksum's total."""
    head = _words_at(context, _MESSAGES)
    runs = np.int64(head[_RUNS])
    message, run = _expected(context, index // runs), index % runs
    payload_bytes = np.int64(message[4])
    begin, end = HEADER_BYTES + payload_bytes * run // runs, HEADER_BYTES + payload_bytes * (run + 1) // runs
    return _call_byte_summer(head[_SUMMER], (message[0], begin, end))


@_kernel
def _last_word_of_one(context, results, count):  # type: ignore[no-untyped-def]  # Numba infers
    return _last_word(_expected(context, 0)[4], results, 0, count)


@_kernel
def _first_refused(context, results, count):  # type: ignore[no-untyped-def]  # Numba infers
    """1 + number of the first message whose header is not what it must be; 0 where there is none."""
    runs = np.int64(_words_at(context, _MESSAGES)[_RUNS])
    for number in range(count // runs):
        expected = _expected(context, number)
        header = _header_of(expected[0])
        is_equal = header[0] == expected[1] and header[1] == expected[2] and header[2] == expected[3]
        if not is_equal or header[3] != _last_word(expected[4], results, number * runs, runs):
            return np.uint64(number + 1)
    return np.uint64(0)
