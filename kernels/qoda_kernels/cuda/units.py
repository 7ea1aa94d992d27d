"""Units, the work of a warp (`device_tables.py`): their segments and lengths, the tiles of a lane, shared memory."""

import numpy as np
from numba import cuda

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.compilation import device
from qoda_kernels.cuda.threads import THREADS, own_lane


@device
def find_segment(segments, count, unit):
    """Number of the segment in which a unit lies."""
    low = np.uint32(0)
    high = count
    while word32.add(low, np.uint32(1)) < high:
        middle = word32.shift_right(word32.add(low, high), np.uint32(1))
        if memory.load_word(segments + records.SEGMENT_BYTES * np.uint64(middle) + records.FIRST_UNIT) <= unit:
            low = middle
        else:
            high = middle
    return low


@device
def count_in_unit(length, begin, unit_length):
    """Coordinates of a unit that begins at a coordinate of its slice."""
    rest = length - begin
    return np.uint32(rest) if rest < np.uint64(unit_length) else unit_length


@device
def place_in_tiles(lanes):
    """The first tile on which a lane of the warp works, how many the warp does at once, and its lane in them.

    With tiles of 16 lanes, each half of the warp takes every other one.
    """
    lane = own_lane()
    if lanes == np.uint32(16):
        return word32.shift_right(lane, np.uint32(4)), np.uint32(2), word32.bit_and(lane, np.uint32(15))
    return np.uint32(0), np.uint32(1), lane


@device
def copy_table(address, count, table):
    """Copy a float32 table to shared memory; all threads of the block take part."""
    index = np.uint32(cuda.threadIdx.x)
    while index < count:
        table[index] = memory.load_float(address + np.uint64(4) * np.uint64(index))
        index = word32.add(index, np.uint32(THREADS))
    cuda.syncthreads()


@device
def scratch_of_warp(plan, table_floats):
    """The first float of the warp's part of the shared memory behind a table."""
    in_block = word32.shift_right(np.uint32(cuda.threadIdx.x), np.uint32(5))
    return word32.add(table_floats, word32.multiply(in_block, memory.load_word(plan + records.PLAN_ROTATED)))
