"""Numbers of lanes, warps and blocks, and what a warp or all blocks find out together."""

import numpy as np
from numba import cuda
from numba.cuda import libdevice

from qoda_kernels import word32
from qoda_kernels.cuda import memory, records
from qoda_kernels.cuda.compilation import device

WARPS, THREADS = records.WARPS, 32 * records.WARPS  # of a block
_ALL_LANES = -1


@device
def own_lane():
    """Number of this thread in its warp."""
    return word32.bit_and(np.uint32(cuda.threadIdx.x), np.uint32(31))


@device
def own_warp():
    """Number of this warp in the grid."""
    in_block = word32.shift_right(np.uint32(cuda.threadIdx.x), np.uint32(5))
    return word32.add(word32.multiply(np.uint32(cuda.blockIdx.x), np.uint32(WARPS)), in_block)


@device
def warp_count():
    """Number of warps in the grid."""
    return word32.multiply(np.uint32(cuda.gridDim.x), np.uint32(WARPS))


@device
def _shuffle(word, distance):
    """A uint32 of the lane at a distance (xor)."""
    return np.uint32(cuda.shfl_xor_sync(_ALL_LANES, np.int32(word), distance))


@device
def warp_maximum(word):
    """Largest of a uint32 over the lanes."""
    for distance in (16, 8, 4, 2, 1):
        word = word32.maximum(word, _shuffle(word, distance))
    return word


@device
def warp_tree_sum(value):
    """Sum of a float32 over the lanes: j with j + 16, then j + 8, ... (`reference.bucket_norm`)."""
    for distance in (16, 8, 4, 2, 1):
        value = libdevice.fadd_rn(value, word32.float_from_bits(_shuffle(word32.float_bits(value), distance)))
    return value


@device
def warp_sum(total):
    """Sum of a uint64 over the lanes, modulo 2^64."""
    for distance in (16, 8, 4, 2, 1):
        low = _shuffle(np.uint32(total & np.uint64(0xFFFFFFFF)), distance)
        high = _shuffle(np.uint32(total >> np.uint64(32)), distance)
        total += np.uint64(high) << np.uint64(32) | np.uint64(low)
    return total


@device
def is_last_block(workspace):
    """Whether all other blocks have come this far; for one thread of each block. What they wrote can then be read."""
    cuda.threadfence()
    finished = memory.atomic_add_word(workspace + records.FINISHED_BLOCKS, np.uint32(1))
    cuda.threadfence()
    return word32.add(finished, np.uint32(1)) == np.uint32(cuda.gridDim.x)
