"""Rounding tables (`reference.RoundingTable`) as the CPU kernels read them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qoda_kernels.cpu import tiles, vectors
from qoda_kernels.reference import RoundingTable

METHODS = {
    "uniform": tiles.UNIFORM,
    "minimum": tiles.MINIMUM,
    "registers": tiles.IN_REGISTERS,
    "cells": tiles.CELLS,
    "gathered cells": tiles.GATHERED_CELLS,
    "search": tiles.SEARCH,
}
"""How a position is found: the numbers that the kernels know methods by."""

WAYS = {"registers": vectors.REGISTERS, "gathers": vectors.GATHERS, "loads": vectors.LOADS}
"""How a level is looked up."""

_MOST_CELLS = 4096
_MOST_MANTISSA_BITS = 10


@dataclass(frozen=True)
class KernelTable:
    """A rounding table as the kernels read it.

    Method "registers" finds the interval by bisection in tables that lie in registers.

    Methods "cells" and "gathered cells" find the interval without a search, by tables in memory that are read in single
    loads or by gathers. Every power of two is cut into 2^m equal cells, few enough to stay in the fastest caches and so
    many that no cell holds two levels. The highest bits of a coordinate tell its cell; whether it lies above the level
    in it tells its line.

    Attributes:
        method: "uniform", "minimum", "search" as in the rounding table, or another one in place of "search".
        lines: float32, slope and intercept of each line, the last one twice; with cells 2 lines per cell, for
            coordinates below and above its level.
        levels: float32: the levels; with cells the level in each cell, or 2 where there is none.
        cells: uint32 [2]: with cells the lower end of the first one, as float32 bits, and 23 - m; else the number of
            lines, and 0.
    """

    method: str
    lines: npt.NDArray[np.float32]
    levels: npt.NDArray[np.float32]
    cells: npt.NDArray[np.uint32]


def kernel_table(table: RoundingTable, method: str) -> KernelTable:
    """The table that makes the kernels give the positions of a rounding table.

    Args:
        table: of a codebook.
        method: of `METHODS`: the rounding table's own, or in place of "search" another one, which gives the same
            positions. Where levels lie too close to each other for cells, "search" remains.
    """
    if method in ("cells", "gathered cells"):
        for mantissa_bits in range(_MOST_MANTISSA_BITS + 1):
            found = _table_with_cells(table, 23 - mantissa_bits, method)
            if found is not None:
                return found
        method = "search"
    return _table_of_lines(table, method)


def _table_of_lines(table: RoundingTable, method: str) -> KernelTable:
    # With the last line twice there are as many as levels, a power of two.
    lines = np.concatenate([_lines(table), _lines(table)[-2:]])
    return KernelTable(method, lines, table.levels, np.array([table.slopes.size, 0], dtype=np.uint32))


def _lines(table: RoundingTable) -> npt.NDArray[np.float32]:
    """Slope and intercept of each line."""
    return np.stack([table.slopes, table.intercepts], axis=1).ravel()


def _table_with_cells(table: RoundingTable, shift: int, method: str) -> KernelTable | None:
    """Table with cells of which each is a run of 2^shift float32 numbers; None where that does not work."""
    inner = table.levels[1:-1].view(np.uint32)
    lowest = inner[0] >> np.uint32(shift) << np.uint32(shift)
    place = ((inner - lowest) >> np.uint32(shift)).astype(np.int64)
    one = int((np.float32(1.0).view(np.uint32) - lowest) >> np.uint32(shift))  # the cell of 1 and of what is rounded up
    if one >= _MOST_CELLS or np.unique(place).size < inner.size:
        return None
    below = np.searchsorted(place, np.arange(one + 1), side="left")
    line = np.stack([below, np.minimum(below + 1, inner.size)], axis=1).ravel()
    levels = np.full(one + 1, 2.0, dtype=np.float32)
    levels[place] = table.levels[1:-1]
    cells = np.array([lowest, shift], dtype=np.uint32)
    return KernelTable(method, _lines(table).reshape(-1, 2)[line].ravel(), levels, cells)
