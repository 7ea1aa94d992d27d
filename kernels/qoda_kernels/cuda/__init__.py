"""Numba CUDA kernels: `reference.py` for a whole message in one launch. Each must give the reference's bits.

Warps take units (`device_tables.py`) in turn. In a bucket, lane j of a warp first reads coordinates j, j + 32, ... for
the norm, then works on lane j of each tile: eight coordinates, one packed integer, `bits` bytes. All branches but those
in a slice's last tile are the same for the whole warp.

NVVM joins a * b + c into one rounding wherever it can. Here every float32 product and sum that counts is written with
an explicit rounding (`fmul_rn`, `fadd_rn`), and the fused one is written as such (`word32.fused_multiply_add`).

Imports go one way, from `encoding.py`, `decoding.py` and `statistics.py`, which hold the kernels, down to `records.py`.
"""

from numba import types

from qoda_kernels.cuda.checksums import CHECK_BYTES
from qoda_kernels.cuda.decoding import decode_mean, decode_mean_rotated
from qoda_kernels.cuda.encoding import encode, encode_rotated, encode_stratified
from qoda_kernels.cuda.statistics import gather_statistics
from qoda_kernels.cuda.threads import THREADS

__all__ = ["CHECK_BYTES", "SIGNATURES", "THREADS", "launch_bounds"]

_ADDRESS, _WORD = types.uint64, types.uint32
SIGNATURES = {
    "encode": (encode, types.void(*[_ADDRESS] * 5, *[_WORD] * 3)),
    "encode_stratified": (encode_stratified, types.void(*[_ADDRESS] * 5, *[_WORD] * 7)),
    "encode_rotated": (encode_rotated, types.void(*[_ADDRESS] * 5, *[_WORD] * 9)),
    "decode_mean": (
        decode_mean,
        types.void(_ADDRESS, _ADDRESS, _WORD, _ADDRESS, _ADDRESS, _WORD, types.float32, _WORD),
    ),
    "decode_mean_rotated": (
        decode_mean_rotated,
        types.void(_ADDRESS, _ADDRESS, _WORD, _ADDRESS, _ADDRESS, *[_WORD] * 3, types.float32, _WORD),
    ),
    "gather_statistics": (gather_statistics, types.void(_ADDRESS, _ADDRESS, _ADDRESS, _WORD)),
}
# Blocks that a multiprocessor must have registers for; without it ptxas spends more on these.
_BLOCKS = {"encode": 4, "encode_stratified": 3, "encode_rotated": 2, "decode_mean": 4, "decode_mean_rotated": 3}
_SPILLS_BELOW = {"encode": (9, 0)}  # compute capability that the bound of a kernel needs


def launch_bounds(name: str, capability: tuple[int, int]) -> tuple[int, int] | None:
    """Threads of a block and blocks that a multiprocessor must hold; None where ptxas may decide.

    Args:
        name: of `SIGNATURES`.
        capability: of the device.
    """
    if name not in _BLOCKS or capability < _SPILLS_BELOW.get(name, capability):
        return None
    return THREADS, _BLOCKS[name]
