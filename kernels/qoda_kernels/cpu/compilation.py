"""How Numba compiles what the CPU kernels are made of, and what it says in the log meanwhile."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

from qoda_kernels import kernel_constants, word32
from qoda_kernels.compilation import cached_kernel
from qoda_kernels.compiled_sources import digest_of, named_after

_LOG = logging.getLogger(__name__)

DIGEST = digest_of(Path(__file__).parent, [word32], [kernel_constants])

inline = njit(inline="always", nogil=True, error_model="numpy")


def kernel(function: Callable[..., Any]) -> Any:
    """A function compiled at its first use, kept on disk, and compiled once more when that is too old."""
    return cached_kernel(named_after(DIGEST, function))


class _CompilationLog(event.Listener):
    """Says in the log what a user is waiting for when a kernel is compiled, not when it is loaded from the cache."""

    def __init__(self, kernel: Any, name: str) -> None:
        self._kernel = kernel
        self._name = name
        self._begin = 0.0

    def on_start(self, event: Any) -> None:
        if event.data["dispatcher"] is self._kernel:
            self._begin = time.perf_counter()
            _LOG.info("compiling the CPU kernel that %s; once on this machine, some seconds", self._name)

    def on_end(self, event: Any) -> None:
        if event.data["dispatcher"] is self._kernel:
            _LOG.info("the CPU kernel that %s is ready after %.1f s", self._name, time.perf_counter() - self._begin)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, which compiled code calls by its address.

    Attributes:
        address: of the machine code, with Numba's calling convention.
        owner: the kernel for Python, which keeps the machine code.
    """

    address: int
    owner: Any


def compile_kernel(kernel: Any, signature: Any, name: str) -> Kernel:
    """A kernel, compiled or loaded from the cache."""
    with event.install_listener("numba:compile", _CompilationLog(kernel, name)):
        kernel.compile(signature)
    compiled = kernel.overloads[signature.args]
    address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return Kernel(address, kernel)
