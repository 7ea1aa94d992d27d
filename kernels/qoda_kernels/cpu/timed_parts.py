"""The parts of encoding and decoding that there are several ways for, alone, so that the ways can be timed."""

from functools import cache
from typing import Any

import numpy as np

from qoda_kernels.cpu import tiles
from qoda_kernels.cpu.compilation import kernel
from qoda_kernels.cpu.level_tables import METHODS, WAYS
from qoda_kernels.kernel_constants import ROWS

LANES = 16
TILES = 32  # that are worked on: 16 KiB of float32, and as much that is written
REPEATS = 4


@cache
def position_finder(bits: int, method: str) -> Any:
    """Kernel that finds the positions of TILES tiles of magnitudes REPEATS times; its arguments are addresses.

    Args:
        bits: code width.
        method: of `METHODS`.
    """
    number = METHODS[method]

    @kernel
    def find_positions(source, target, lines, levels, cells):  # type: ignore[no-untyped-def]  # Numba infers
        for step in range(REPEATS * TILES):
            offset = np.uint64(4 * ROWS * LANES * (step % TILES))
            tiles.find_positions(source + offset, target + offset, lines, levels, cells, bits, number)

    return find_positions


@cache
def tile_decoder(bits: int, way: str) -> Any:
    """Kernel that decodes TILES tiles REPEATS times; its arguments are addresses.

    Args:
        bits: code width.
        way: of `WAYS`.
    """
    number = WAYS[way]

    @kernel
    def decode_tiles(codes, target, levels):  # type: ignore[no-untyped-def]  # Numba infers
        for step in range(REPEATS * TILES):
            tile = step % TILES
            source, result = codes + np.uint64(bits * LANES * tile), target + np.uint64(4 * ROWS * LANES * tile)
            tiles.decode_tile(source, result, np.float32(1.0), levels, bits, LANES, 1, number)

    return decode_tiles
