"""How Numba compiles device functions and kernels."""

from collections.abc import Callable
from pathlib import Path

from numba import cuda

from qoda_kernels import kernel_constants, word32
from qoda_kernels.compiled_sources import digest_of, named_after
from qoda_kernels.cuda import records

DIGEST = digest_of(Path(__file__).parent, [word32], [kernel_constants, records])

device = cuda.jit(device=True, forceinline=True)


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """A function that will be compiled as a kernel, and once more when the kernel on disk is too old."""
    return named_after(DIGEST, function)
