"""Front ends with gradients "on a GPU", without one: the PTX machine stands for it, and host memory for its memory."""

import contextlib
import ctypes
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from hvd_qoda import codec_device, gradient_codec
from qoda_kernels.device_codec import DeviceRuntime
from tests.kernels.ptx_device import PtxRuntime
from tests.kernels.ptx_machine import Array, Memory, PtxError

_LARGEST_GAP = 2**20  # between addresses that are looked at as one array


class HostMemory(Memory):
    """All of the process's memory: gradients come from anywhere. Bounds are what the kernels' own tests look at."""

    def _locate(self, addresses: Array, size: int, alignment: int) -> list[tuple[Array, Array, Array]]:
        if np.any(addresses % np.uint64(alignment)):
            raise PtxError(f"misaligned access of {alignment} bytes")
        order = np.argsort(addresses, kind="stable")
        ordered = addresses[order]
        cuts = np.flatnonzero(np.diff(ordered) > _LARGEST_GAP) + 1
        located = []
        for threads, places in zip(np.split(order, cuts), np.split(ordered, cuts), strict=True):
            if threads.size:
                begin, end = int(places[0]), int(places[-1]) + size
                part = np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))
                first = (places - np.uint64(begin)).astype(np.int64)
                located.append((threads, part, first[:, None] + np.arange(size)))
        return located


class MachineRuntime(PtxRuntime):
    """A runtime for tensors that its user makes."""

    def __init__(self) -> None:
        super().__init__(1, together=True)
        self.memory = HostMemory()

    def expose(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor


@contextlib.contextmanager
def gradients_on(runtime: DeviceRuntime) -> Iterator[None]:
    """Let a runtime take the place of the CPU's codec."""

    def runtime_of(device: torch.device) -> DeviceRuntime:
        return runtime

    with (
        mock.patch.object(gradient_codec, "runtime_of", runtime_of),
        mock.patch.object(codec_device, "runtime_of", runtime_of),
    ):
        yield
