#!/usr/bin/env python3
"""Is a damaged message ever taken for a good one, and what does one do whose checksum fits?

Messages of every codebook, with codes of fixed length and Huffman-coded, are damaged in many ways (`DAMAGE`) and
decoded. Each must be refused. Then damage behind the header is sealed again, with a checksum that fits, as somebody
could who knows the format: such a message may be refused or decode to anything, but nothing outside of the message may
be read or written. The decoded bytes and what they are decoded to lie between pages that nobody may touch: one byte too
far ends the program.

The checksum itself (`wire.py`) is tried by changes in which a weak one would let many pass: words that change by
opposite amounts, swapped words, zeroed tails, two bits in any two words. A checksum of 32 bits misses 1 of 2^32 =
4.3e9 changes; how many of the trials it missed is printed, and how many a checksum of either half of its bits would
have missed, which shows a weakness sooner: the halves alone miss more than chance where two bits change the sum B by
opposite amounts. The last row is what two sums cannot see: three words at equal distances, changed by d, -2 d and d.
"""

import argparse
import ctypes
import dataclasses
import mmap
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from rich.console import Console
from rich.table import Table

from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.coded_message import CodedMessages
from qoda_kernels.errors import WireError
from qoda_kernels.gaussian import nearest_codebook, stochastic_codebook
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from qoda_kernels.wire import CHECKSUM_MULTIPLIER, FLAG_CODED, MessageContext

CODEBOOKS = {
    "uniform, 4 bits": Codebook.uniform(4),
    "exponential, 4 bits, bf16 norms": Codebook.exponential(4, norm_format="bf16"),
    "clipped, 4 bits": Codebook.uniform(4, clip=2.0),
    "rotated, to nearest, 4 bits": nearest_codebook(4, False, 512, "fp32"),
    "rotated, stochastic, 4 bits": stochastic_codebook(4, 512, "fp32"),
    "exact": Codebook.exact(),
}
CODINGS = ("fixed", "huffman")
LENGTHS = (1500, 7, 600)  # coordinates of the segments
WEIGHTS = 1 << 20  # of the most frequent level
_CONTEXT = MessageContext(seed=1, counter=2**33 + 5, rank=1, phase=0, registry_version=3, source=1, destination=0)
Words = npt.NDArray[np.uint32]


class GuardedBuffer:
    """Memory between two pages that nobody may touch."""

    def __init__(self, size: int) -> None:
        """Take memory that ends where the second page begins.

        Args:
            size: bytes; where it is a multiple of the page size, the memory begins behind the first page, too.
        """
        page = mmap.PAGESIZE
        room = -(-size // page) * page
        self._memory = mmap.mmap(-1, room + 2 * page)
        view = np.frombuffer(self._memory, dtype=np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for begin in (view.ctypes.data, view.ctypes.data + page + room):
            if protect(begin, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._room = torch.from_numpy(view)[page : page + room]

    def last(self, size: int) -> torch.Tensor:
        """The last bytes, uint8 [size]."""
        return self._room[self._room.numel() - size :]

    def placed(self, data: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor at the end of the memory."""
        target = self.last(data.numel() * data.dtype.itemsize).view(data.dtype)
        return target.copy_(data)


def _flip_bits(data: Words, rng: np.random.Generator) -> Words:
    for _ in range(int(rng.integers(1, 4))):
        data[rng.integers(data.size)] ^= np.uint32(1 << int(rng.integers(32)))
    return data


def _opposite_changes(data: Words, rng: np.random.Generator) -> Words:
    first, second = rng.integers(data.size, size=2)
    change = np.uint32(1 << int(rng.integers(32)))
    with np.errstate(over="ignore"):
        data[first] += change
        data[second] -= change
    return data


def _swap_words(data: Words, rng: np.random.Generator) -> Words:
    places = rng.integers(data.size, size=2)
    data[places] = data[places[::-1]]
    return data


def _zero_tail(data: Words, rng: np.random.Generator) -> Words:
    data[rng.integers(data.size) :] = 0
    return data


def _move_words(data: Words, rng: np.random.Generator) -> Words:
    begin = int(rng.integers(data.size))
    data[begin:] = np.roll(data[begin:], int(rng.integers(1, 9)))
    return data


def _overwrite(data: Words, rng: np.random.Generator) -> Words:
    begin = int(rng.integers(data.size))
    part = data[begin : begin + int(rng.integers(1, 100))]
    part[:] = rng.integers(2**32, size=part.size, dtype=np.uint32)
    return data


def _cut(data: Words, rng: np.random.Generator) -> Words:
    return data[: 4 * int(rng.integers(data.size // 4))].copy()


def _append(data: Words, rng: np.random.Generator) -> Words:
    return np.concatenate([data, rng.integers(2, size=4 * int(rng.integers(1, 9)), dtype=np.uint32)])


DAMAGE: tuple[Callable[[Words, np.random.Generator], Words], ...] = (
    _flip_bits,
    _opposite_changes,
    _swap_words,
    _zero_tail,
    _move_words,
    _overwrite,
    _cut,
    _append,
)


@dataclasses.dataclass
class Subject:
    """A message, and how it is decoded."""

    codec: Codec
    coded: CodedMessages | None
    message: torch.Tensor
    results: list[torch.Tensor]
    room: torch.Tensor
    received: GuardedBuffer
    kept: list[GuardedBuffer]

    @classmethod
    def build(cls, book: Codebook, coding: str, seed: int) -> "Subject | None":
        """Subject with one codebook; None where a codebook has no such coding."""
        if coding == "huffman":
            if not book.may_be_coded:
                return None
            levels = len(book.levels)
            book = dataclasses.replace(book, weights=tuple(WEIGHTS >> min(level, 19) for level in range(levels)))
        books = {"all": book}
        starts = np.cumsum((0, *LENGTHS))
        slices = [
            Slice(f"layer{n}", 0, length, torch.float32, "all", int(starts[n])) for n, length in enumerate(LENGTHS)
        ]
        plan = MessagePlan.build(slices, books)
        codec = Codec(plan, books)
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(length, generator=generator) ** 3 for length in LENGTHS]
        message = codec.encode(values, _CONTEXT)
        coded = None
        size = message.numel()
        if coding == "huffman":
            coded = CodedMessages(codec, books)
            buffer = torch.empty(coded.maximum_bytes, dtype=torch.uint8)
            size = coded.shorten(message, _CONTEXT, buffer)
            message = buffer[:size].clone()
        kept = [GuardedBuffer(4 * length) for length in LENGTHS] + [GuardedBuffer(plan.message_bytes)]
        results = [buffer.last(4 * length).view(torch.float32) for buffer, length in zip(kept, LENGTHS, strict=False)]
        room = kept[-1].last(plan.message_bytes)
        return cls(codec, coded, message, results, room, GuardedBuffer(4 * size + 4096), kept)

    def decode(self, data: Words) -> None:
        """Decode bytes as received; raises WireError where they are refused."""
        received = self.received.placed(torch.from_numpy(data.view(np.uint8)))
        if self.coded is not None:
            received = self.coded.restore(received, _CONTEXT, self.room)
        self.codec.decode_mean([received], [_CONTEXT], self.results)

    def sealed(self, data: Words) -> Words:
        """The same bytes with the header that belongs to them."""
        whole = torch.from_numpy(data.view(np.uint8)).clone()
        is_coded = self.coded is not None and whole.numel() != self.codec.plan.message_bytes
        self.codec.seal(whole, _CONTEXT, FLAG_CODED if is_coded else 0)
        return whole.numpy().view(np.uint32)

    def refuses(self, data: Words) -> bool:
        """Whether bytes are refused."""
        try:
            self.decode(data)
        except WireError:
            return True
        return False


def measure(name: str, coding: str, messages: int, seed: int) -> dict[str, Any] | None:
    """Damage one codebook's message so many times; None where it has no such coding."""
    subject = Subject.build(CODEBOOKS[name], coding, seed)
    if subject is None:
        return None
    good = subject.message.numpy().view(np.uint32).copy()
    subject.decode(good)
    rng = np.random.default_rng(seed)
    tried = found = refused = 0
    while tried < messages:
        damaged = DAMAGE[tried % len(DAMAGE)](good.copy(), rng)
        if damaged.size == good.size and np.array_equal(damaged, good):
            continue
        tried += 1
        found += subject.refuses(damaged)
        if damaged.nbytes >= HEADER_BYTES:
            refused += subject.refuses(subject.sealed(damaged))
        else:
            refused += 1
    return {
        "codebook": name,
        "coding": coding,
        "messages": tried,
        "found": found,
        "accepted_wrongly": tried - found,
        "resealed": tried,
        "resealed_refused": refused,
    }


@njit(nogil=True)
def _folded(total: Any) -> Any:
    return np.uint32((total ^ (total >> np.uint64(32))) & np.uint64(0xFFFFFFFF))


@njit(nogil=True)
def _weight(place: Any) -> Any:
    return np.uint64(1) + np.uint64(CHECKSUM_MULTIPLIER) * np.uint64(place + 1)


@njit(nogil=True)
def _two_bit_changes(words: Any, counts: Any) -> int:
    """Change one bit in each of two words, for all pairs; count what a checksum, and each half of it, would miss."""
    total = np.uint64(0)
    for place in range(words.size):
        total += _weight(place) * np.uint64(words[place])
    good = _folded(total)
    trials = 0
    for first in range(words.size):
        for second in range(first + 1, words.size):
            for one in range(32):
                bit = np.uint32(1) << np.uint32(one)
                change = _weight(first) * (np.uint64(words[first] ^ bit) - np.uint64(words[first]))
                for two in range(32):
                    bit = np.uint32(1) << np.uint32(two)
                    other = _weight(second) * (np.uint64(words[second] ^ bit) - np.uint64(words[second]))
                    _count(_folded(total + change + other) ^ good, counts)
                    trials += 1
    return trials


@njit(nogil=True)
def _count(difference: Any, counts: Any) -> None:
    counts[0] += difference == 0
    counts[1] += (difference & np.uint32(0xFFFF)) == 0
    counts[2] += (difference >> np.uint32(16)) == 0


@njit(nogil=True)
def _random(state: Any) -> Any:
    """SplitMix64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    word = state[0]
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@njit(nogil=True)
def _random_changes(kind: int, trials: int, words: Any, state: Any, counts: Any) -> int:
    """Changes of one kind: the place in `CHANGES`."""
    total = np.uint64(0)
    tails = np.zeros(words.size + 1, dtype=np.uint64)
    for place in range(words.size - 1, -1, -1):
        tails[place] = tails[place + 1] + _weight(place) * np.uint64(words[place])
    total = tails[0]
    done = 0
    size = np.uint64(words.size)
    while done < trials:
        draw = _random(state)
        first, second = np.int64((draw >> np.uint64(40)) % size), np.int64((draw >> np.uint64(8)) % size)
        if kind == 2:  # in a message of random words, renewed for every trial
            base = _random(state)
            _count(_folded(base + tails[first]) ^ _folded(base), counts)
            done += tails[first] != 0
            continue
        base = total
        one, two = np.uint64(words[first]), np.uint64(words[second])
        if kind == 0:
            change = _random(state) & np.uint64(0xFFFFFFFF)
            new_one, new_two = (one + change) & np.uint64(0xFFFFFFFF), (two - change) & np.uint64(0xFFFFFFFF)
            base = _random(state)  # whatever the other words are
        elif kind == 1:
            one, two = _random(state) & np.uint64(0xFFFFFFFF), _random(state) & np.uint64(0xFFFFFFFF)
            new_one, new_two = two, one
            base = _random(state)
        elif kind == 3:
            new_one, new_two = _random(state) & np.uint64(0xFFFFFFFF), two
            base = _random(state)
        else:
            distance = np.int64(1) + second % np.int64(16)
            change = np.uint64(1) << ((draw >> np.uint64(3)) & np.uint64(15))
            middle, last = _weight(first + distance), _weight(first + 2 * distance)
            base = _random(state)
            new = base + (_weight(first) + last) * change - middle * change * np.uint64(2)
            _count(_folded(new) ^ _folded(base), counts)
            done += 1
            continue
        if first == second or (new_one == one and new_two == two):
            continue
        new = base + _weight(first) * (new_one - one) + _weight(second) * (new_two - two)
        _count(_folded(new) ^ _folded(base), counts)
        done += 1
    return done


CHANGES = (
    "opposite changes of two words",
    "two words swapped",
    "tail zeroed",
    "one word replaced",
    "three words changed by d, -2 d, d",
)


def checksum_rows(trials: int, seed: int, words: int = 64) -> list[dict[str, Any]]:
    """How many changes of each kind the checksum misses, in a message of so many words."""
    rng = np.random.default_rng(seed)
    message = rng.integers(1, 2**32, words, dtype=np.uint32)
    rows = []
    counts = np.zeros(3, dtype=np.int64)
    count = _two_bit_changes(message, counts)
    rows.append(_checksum_row("one bit in each of two words, all", count, counts))
    state = np.array([seed], dtype=np.uint64)
    message = rng.integers(1, 2**32, 4096, dtype=np.uint32)
    for kind, name in enumerate(CHANGES):
        counts = np.zeros(3, dtype=np.int64)
        count = _random_changes(kind, trials, message, state, counts)
        rows.append(_checksum_row(name, count, counts))
    return rows


def _checksum_row(name: str, trials: int, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "change": name,
        "trials": trials,
        "missed": int(counts[0]),
        "missed_expected": trials / 2**32,
        "missed_by_low_half": int(counts[1]),
        "missed_by_high_half": int(counts[2]),
        "missed_by_half_expected": trials / 2**16,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--messages", type=positive, default=1000, help="damaged messages of each codebook and coding")
    parser.add_argument("--codebooks", nargs="+", choices=CODEBOOKS, default=list(CODEBOOKS), help="of the messages")
    parser.add_argument("--trials", type=positive, default=10**6, help="of each kind of change against the checksum")
    parser.add_argument("--words", type=positive, default=64, help="of the message whose pairs of bits are all changed")
    parser.add_argument("--seed", type=not_negative, default=0, help="other seeds, other damage")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; the exit status is 1 where a damaged message was accepted."""
    options = parse_arguments(arguments)
    console, rows = Console(), []
    table = Table("codebook", "coding", "messages", "found", "accepted wrongly", "resealed", "of them refused")
    for name in options.codebooks:
        for coding in CODINGS:
            row = measure(name, coding, options.messages, options.seed)
            if row is not None:
                rows.append(row)
                table.add_row(*map(str, row.values()))
    console.print(table)
    checksum = checksum_rows(options.trials, options.seed, options.words)
    table = Table("change", "trials", "missed", "expected", "missed by low half", "by high half", "expected of a half")
    for row in checksum:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    console.print(table)
    if options.json is not None:
        write_json(options.json, {"command": command(), "rows": rows, "checksum": checksum})
    return int(any(row["accepted_wrongly"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
