"""The last tile of a slice, which can have fewer lanes: it is worked on as a full one, in scratch memory."""

import numpy as np
from numba import carray

from qoda_kernels import word32
from qoda_kernels.cpu.compilation import kernel
from qoda_kernels.cpu.memory import bytes_at
from qoda_kernels.kernel_constants import ROWS


@kernel
def spread_rows(source: np.uint64, count: int, tail_lanes: int, lanes: int, target: np.uint64) -> None:
    """Copy the coordinates of a tail, row by row, to a full tile, whose other lanes become 0."""
    given = carray(word32.float_pointer(np.uint64(source)), (count,), np.float32)
    rows = carray(word32.float_pointer(np.uint64(target)), (ROWS, lanes), np.float32)
    rows[:] = np.float32(0.0)
    for row in range(ROWS):
        for lane in range(min(tail_lanes, count - row * tail_lanes)):
            rows[row, lane] = given[row * tail_lanes + lane]


@kernel
def join_rows(source: np.uint64, count: int, tail_lanes: int, lanes: int, is_added: bool, target: np.uint64) -> None:
    """Copy the coordinates of a tail from a full tile, or add them to what is there."""
    rows = carray(word32.float_pointer(np.uint64(source)), (ROWS, lanes), np.float32)
    values = carray(word32.float_pointer(np.uint64(target)), (count,), np.float32)
    for row in range(ROWS):
        for lane in range(min(tail_lanes, count - row * tail_lanes)):
            place = row * tail_lanes + lane
            values[place] = np.float32(values[place] + rows[row, lane]) if is_added else rows[row, lane]


@kernel
def copy_planes(
    source: np.uint64, source_lanes: int, bits: int, lanes: int, target: np.uint64, target_lanes: int
) -> None:
    """Copy the first lanes of a tile's planes to a tile with another number of lanes."""
    given = bytes_at(np.uint64(source), bits * source_lanes)
    planes = bytes_at(np.uint64(target), bits * target_lanes)
    for plane in range(bits):
        for lane in range(lanes):
            planes[plane * target_lanes + lane] = given[plane * source_lanes + lane]
