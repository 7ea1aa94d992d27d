"""Which of several ways to the same bits is the fastest on this processor: measured once, and kept on disk.

Processors differ, and not by what they say they can: a gather takes eight loads' time on one, four times that on the
next, and more where microcode guards it against attacks. So each way is timed here, alone and in the first cache.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qoda_kernels.codebook import Codebook
from qoda_kernels.compilation import folder_of
from qoda_kernels.cpu.compilation import DIGEST
from qoda_kernels.cpu.level_tables import kernel_table
from qoda_kernels.cpu.target import bits_in_registers, has_avx2, has_avx512, target
from qoda_kernels.cpu.timed_parts import LANES, TILES, position_finder, tile_decoder
from qoda_kernels.kernel_constants import ROWS
from qoda_kernels.reference import rounding_table, signed_levels

_LOG = logging.getLogger(__name__)
_ROUNDS = 15  # the shortest counts, so that other work on the machine does not

Clock = Callable[[], float]


def search_method(bits: int) -> str:
    """The method of `level_tables.METHODS` that finds intervals between arbitrary levels the fastest.

    Args:
        bits: code width, 2 to 8.
    """
    question = f"search among {2 ** (bits - 1)} levels"
    return _choices().fastest(question, search_methods(bits), lambda method: _search(bits, method))


def search_methods(bits: int) -> list[str]:
    """The methods among which `search_method` chooses.

    Args:
        bits: code width, 2 to 8.
    """
    if has_avx512():
        return ["registers", "cells", "gathered cells"]
    # Lines of more levels do not fit into 16 registers of 8 numbers.
    return ["registers", "cells"] if has_avx2() and bits <= 6 else ["cells"]


def look_up_way(bits: int) -> str:
    """The way of `level_tables.WAYS` that looks up levels the fastest when messages are decoded.

    Args:
        bits: code width, 2 to 8.
    """
    if bits <= bits_in_registers():
        return "registers"
    candidates = ["registers", "loads", "gathers"] if has_avx512() else ["loads"]
    return _choices().fastest(f"look up {2**bits} levels", candidates, lambda way: _decode(bits, way))


@dataclass
class Choices:
    """What has been measured for one processor.

    Attributes:
        file: where the choices are kept, or None to measure in every process.
        clock: gives seconds.
        made: question -> answer.
    """

    file: Path | None
    clock: Clock
    made: dict[str, str]

    @classmethod
    def load(cls, file: Path | None, clock: Clock = time.perf_counter) -> "Choices":
        """The choices of a file; none where it is absent or not as it was written."""
        made: dict[str, str] = {}
        if file is not None and file.exists():
            try:
                read = json.loads(file.read_text())
                made = {str(question): str(answer) for question, answer in read.items()}
            except (OSError, ValueError, AttributeError) as error:
                _LOG.info("%s is not readable (%s): measured anew", file, error)
        return cls(file, clock, made)

    def fastest(self, question: str, candidates: list[str], run_of: Callable[[str], Callable[[], None]]) -> str:
        """The candidate whose run takes the least time; measured only if there are several and it is not known.

        Args:
            question: what is to be chosen.
            candidates: names, the preferred one of equals first.
            run_of: what to time for a name; called once before it is timed.
        """
        if len(candidates) == 1:
            return candidates[0]
        if self.made.get(question) not in candidates:
            seconds = self._timed({name: run_of(name) for name in candidates})
            self.made[question] = min(candidates, key=seconds.__getitem__)
            told = ", ".join(f"{name} {1e6 * each:.1f} us" for name, each in seconds.items())
            _LOG.info("to %s on this processor: %s (%s)", question, self.made[question], told)
            self._save()
        return self.made[question]

    def _timed(self, runs: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        seconds = dict.fromkeys(runs, float("inf"))
        for run in runs.values():
            run()  # compiles
        for _ in range(_ROUNDS):
            for name, run in runs.items():
                begin = self.clock()
                run()
                seconds[name] = min(seconds[name], self.clock() - begin)
        return seconds

    def _save(self) -> None:
        """Processes that save at the same time have measured the same."""
        if self.file is None:
            return
        try:
            whole = self.file.with_suffix(f".{os.getpid()}")
            whole.write_text(json.dumps(self.made))
            whole.replace(self.file)
        except OSError as error:
            _LOG.info("%s cannot be written (%s): each process measures anew", self.file, error)


@cache
def _choices() -> Choices:
    """The choices for the processor that Numba compiles for, beside the kernels that it has compiled."""
    folder = folder_of(position_finder(4, "cells"))
    if folder is None:
        return Choices.load(None)
    triple, name, features = target()
    processor = hashlib.sha256(" ".join([triple, name, *sorted(features)]).encode()).hexdigest()[:16]
    return Choices.load(folder / f"fastest_methods-{DIGEST}-{processor}.json")


def _general_codebook(bits: int) -> Codebook:
    """Levels that are denser near one, so that no shorter way than a search leads to them."""
    top = 2 ** (bits - 1) - 1
    return Codebook(bits, tuple(float((level / top) ** 0.7) for level in range(top + 1)))


def _search(bits: int, method: str) -> Callable[[], None]:
    table = kernel_table(rounding_table(_general_codebook(bits)), method)
    normal = np.abs(np.random.default_rng(bits).normal(0.0, 0.3, TILES * ROWS * LANES))
    magnitudes = np.minimum(normal, 1.0).astype(np.float32)
    positions = np.empty_like(magnitudes)
    return _timed_on(position_finder(bits, table.method), magnitudes, positions, table.lines, table.levels, table.cells)


def _decode(bits: int, way: str) -> Callable[[], None]:
    codes = np.random.default_rng(bits).integers(0, 256, TILES * bits * LANES).astype(np.uint8)
    values = np.empty(TILES * ROWS * LANES, dtype=np.float32)
    return _timed_on(tile_decoder(bits, way), codes, values, signed_levels(_general_codebook(bits)))


def _timed_on(run: Any, *arrays: np.ndarray[Any, Any]) -> Callable[[], None]:
    """A call of a kernel on the addresses of arrays."""
    addresses = [np.uint64(array.ctypes.data) for array in arrays]

    def timed(arrays: tuple[np.ndarray[Any, Any], ...] = arrays) -> None:
        run(*addresses)

    return timed
