"""Rounding tables (`reference.RoundingTable`) as the CPU kernels read them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qoda_kernels.cpu import tiles
from qoda_kernels.reference import RoundingTable

METHODS = {"uniform": tiles.UNIFORM, "minimum": tiles.MINIMUM, "cells": tiles.CELLS, "search": tiles.SEARCH}
_MOST_CELLS = 4096
_MOST_MANTISSA_BITS = 10


@dataclass(frozen=True)
class KernelTable:
    """A rounding table as the kernels read it.

    Method "cells" finds the interval without a search: every power of two is cut into 2^m equal cells, few enough to
    stay in the fastest caches and so many that no cell holds two levels. The highest bits of a coordinate tell its
    cell; whether it lies above the level in it tells its line.

    Attributes:
        method: "uniform", "minimum", "search" as in the rounding table, or "cells" in place of "search".
        lines: float32, slope and intercept of each line; with cells 2 lines per cell, for coordinates below and above
            its level.
        levels: float32: the levels; with cells the level in each cell, or 2 where there is none.
        cells: uint32 [2]: with cells the lower end of the first one, as float32 bits, and 23 - m.
    """

    method: str
    lines: npt.NDArray[np.float32]
    levels: npt.NDArray[np.float32]
    cells: npt.NDArray[np.uint32]


def kernel_table(table: RoundingTable) -> KernelTable:
    """The table that makes the kernels give the positions of a rounding table."""
    if table.method == "search":
        for mantissa_bits in range(_MOST_MANTISSA_BITS + 1):
            found = _table_with_cells(table, 23 - mantissa_bits)
            if found is not None:
                return found
    return KernelTable(table.method, _lines(table), table.levels, np.zeros(2, dtype=np.uint32))


def _lines(table: RoundingTable) -> npt.NDArray[np.float32]:
    """Slope and intercept of each line."""
    return np.stack([table.slopes, table.intercepts], axis=1).ravel()


def _table_with_cells(table: RoundingTable, shift: int) -> KernelTable | None:
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
    return KernelTable("cells", _lines(table).reshape(-1, 2)[line].ravel(), levels, cells)
