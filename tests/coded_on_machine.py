"""Front ends with gradients "on a GPU", without one: the PTX machine stands for it, and host memory for its memory."""

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import torch

from hvd_qoda import codec_device, gradient_codec
from qoda_kernels.device_codec import DeviceRuntime
from tests.kernels.ptx_device import PtxRuntime, compile_ptx, kernels
from tests.kernels.ptx_machine import Array, Machine, Memory, Program, PtxError

KERNELS = ("encode", "decode_mean")
_LARGEST_GAP = 2**20  # between addresses that are looked at as one array
_MULTIPROCESSORS = 4


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
    """A runtime for any tensors of this process.

    Args:
        texts: `compiled()`, perhaps of another process, because compiling takes seconds.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__(_MULTIPROCESSORS, together=True)
        self.memory = HostMemory()
        self._programs = {name: Program.parse(text) for name, text in texts.items()}

    def expose(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor

    def launch(self, name: str, blocks: int, shared_bytes: int, arguments: tuple[int | float, ...]) -> None:
        self.launches.append(name)
        Machine(self._programs[name], self.memory).launch(blocks, kernels.THREADS, arguments, shared_bytes)


class FlippingRuntime(MachineRuntime):
    """Writes one bit of every message wrongly."""

    def launch(self, name: str, blocks: int, shared_bytes: int, arguments: tuple[int | float, ...]) -> None:
        super().launch(name, blocks, shared_bytes, arguments)
        if name.startswith("encode"):
            ctypes.c_uint8.from_address(int(arguments[3]) + 100).value ^= 4


class BrokenRuntime(MachineRuntime):
    """Cannot compile anything."""

    def launch(self, name: str, blocks: int, shared_bytes: int, arguments: tuple[int | float, ...]) -> None:
        raise RuntimeError(f"{name}: no such driver")


def compiled(names: tuple[str, ...] = KERNELS) -> dict[str, str]:
    """PTX of kernels."""
    return {name: compile_ptx(name, (9, 0)) for name in names}


@contextlib.contextmanager
def gradients_on(runtime: DeviceRuntime) -> Iterator[None]:
    """Let a runtime have all gradients of this process, which lie in host memory."""

    def runtime_of(device: torch.device) -> DeviceRuntime:
        return runtime

    with (
        mock.patch.object(gradient_codec, "runtime_of", runtime_of),
        mock.patch.object(codec_device, "runtime_of", runtime_of),
    ):
        yield
