"""Starts Numba's CUDA kernels through the driver.

Numba's own launch takes 18 microseconds of the host's time for eight numbers; this one takes less than one before the
driver's. Numba compiles, links and keeps the kernels; a launch writes the arguments to memory that was laid out
once and calls `cuLaunchKernel`.
"""

import ctypes
import logging
import struct
import threading
import time
from functools import cache
from typing import Any

from qoda_kernels.errors import KernelError

_LOG = logging.getLogger(__name__)
_SLOT = 8  # bytes of an argument, whatever its type
_LOADING = threading.Lock()  # Numba fails where two threads use a device for the first time at once


class CudaKernel:
    """A compiled kernel on one device. Any thread may launch it."""

    def __init__(self, name: str, device_index: int) -> None:
        """Compile a kernel and load it.

        Args:
            name: of `cuda.SIGNATURES`.
            device_index: number of the device.

        Raises:
            Exception: whatever Numba or the driver raises.
        """
        from cuda.bindings import driver
        from numba import cuda as numba_cuda

        from qoda_kernels import cuda as kernels

        function, signature = kernels.SIGNATURES[name]
        self._name, self._driver, self._threads = name, driver, kernels.THREADS
        begin = time.perf_counter()
        _LOG.info("compiling CUDA kernel %s for device %d (once; kept on disk)", name, device_index)
        with numba_cuda.gpus[device_index]:  # makes the device's primary context, which is torch's, the thread's
            bounds = kernels.launch_bounds(name, tuple(numba_cuda.get_current_device().compute_capability))
            dispatcher = numba_cuda.jit(signature, cache=True, launch_bounds=bounds)(function)
            self._compiled = dispatcher.overloads[signature.args]  # loaded as long as this lives
            self._function = int(self._compiled._codelibrary.get_cufunc().handle)
            self._context = self._checked(driver.cuCtxGetCurrent())
        _LOG.info("CUDA kernel %s is ready after %.1f s", name, time.perf_counter() - begin)
        formats = {"uint64": "Q", "uint32": "I4x", "float32": "f4x"}
        self._format = struct.Struct("<" + "".join(formats[kind.name] for kind in signature.args))
        self._arguments = ctypes.create_string_buffer(self._format.size)
        begin_of_arguments = ctypes.addressof(self._arguments)
        addresses = range(begin_of_arguments, begin_of_arguments + self._format.size, _SLOT)
        self._pointers = (ctypes.c_void_p * len(signature.args))(*addresses)
        self._parameters = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()  # of the arguments' memory, from which the driver has copied when it returns

    def launch(self, blocks: int, shared_bytes: int, stream: int, arguments: tuple[int | float, ...]) -> None:
        """Start the kernel.

        Args:
            blocks: of the grid.
            shared_bytes: dynamic shared memory of a block.
            stream: handle of a stream of the device.
            arguments: of the kernel.

        Raises:
            KernelError: when the driver refuses, or an earlier kernel has failed.
        """
        driver = self._driver
        # A thread that has not used the device yet, or uses another one, has another current context, or none.
        is_foreign = self._checked(driver.cuCtxGetCurrent()) != self._context
        if is_foreign:
            self._checked(driver.cuCtxPushCurrent(self._context))
        try:
            with self._lock:
                self._format.pack_into(self._arguments, 0, *arguments)
                started = driver.cuLaunchKernel(
                    self._function, blocks, 1, 1, self._threads, 1, 1, shared_bytes, stream, self._parameters, 0
                )
            self._checked(started)
        finally:
            if is_foreign:
                self._checked(driver.cuCtxPopCurrent())

    def _checked(self, returned: tuple[Any, ...]) -> Any:
        """What a call of the driver gave, as an integer if it is anything; raises if it failed."""
        if returned[0] != 0:
            name = self._driver.cuGetErrorName(returned[0])[1]
            raise KernelError(
                f"the CUDA driver refused the kernel {self._name}: {name.decode() if name else returned[0]}; if an "
                "earlier kernel of any library failed, the process must be started again"
            )
        return int(returned[1]) if len(returned) > 1 else None


def cuda_kernel(name: str, device_index: int) -> CudaKernel:
    """A kernel of `cuda.SIGNATURES` on a device, compiled at its first use."""
    with _LOADING:
        return _loaded(name, device_index)


@cache
def _loaded(name: str, device_index: int) -> CudaKernel:
    return CudaKernel(name, device_index)
