"""The device codec on the PTX machine: its kernels compiled for a GPU, run by NumPy."""

import functools
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.device_codec import DeviceCodec
from qoda_kernels.layout import MessagePlan
from tests.kernels.ptx_machine import Machine, Memory, Program

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")

from numba import cuda
from numba.cuda import dispatcher

from qoda_kernels import cuda as kernels

Capability = tuple[int, int]


@functools.cache
def compile_ptx(name: str, capability: Capability) -> str:
    """PTX of a kernel; device functions take the capability from the current device, of which there is none here."""
    function, signature = kernels.SIGNATURES[name]
    device = SimpleNamespace(compute_capability=capability)
    with mock.patch.object(dispatcher, "get_current_device", return_value=device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounds = kernels.launch_bounds(name, capability)
        text, _ = cuda.compile(function, signature, device=False, abi="numba", cc=capability, launch_bounds=bounds)
    return str(text)


@functools.cache
def program(name: str) -> Program:
    return Program.parse(compile_ptx(name, (9, 0)))


class PtxRuntime:
    """A runtime (`device_codec.DeviceRuntime`) whose device is the machine and whose memory is the host's."""

    device = torch.device("cpu")

    def __init__(self, multiprocessors: int, *, together: bool) -> None:
        self.multiprocessors = multiprocessors
        self.memory = Memory()
        self.launches: list[str] = []
        self.capturing = False
        self._together = together
        self._kept: list[torch.Tensor] = []

    def expose(self, tensor: torch.Tensor) -> torch.Tensor:
        """Let kernels touch a tensor, and nothing beside it."""
        self._kept.append(tensor)
        self.memory.expose(tensor.view(torch.uint8).numpy())
        return tensor

    def upload(self, array: npt.NDArray[Any], out: torch.Tensor | None = None) -> torch.Tensor:
        source = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        return self.expose(_aligned(source)) if out is None else out.copy_(source)

    def host_visible(self, size: int) -> torch.Tensor:
        return self.expose(_aligned(torch.zeros(size, dtype=torch.uint8)))

    def launch(self, name: str, blocks: int, shared_bytes: int, arguments: tuple[int | float, ...]) -> None:
        self.launches.append(name)
        machine = Machine(program(name), self.memory)
        machine.launch(blocks, kernels.THREADS, arguments, shared_bytes, together=self._together)

    def synchronise(self) -> None:
        """The machine is done when a launch returns."""

    def is_capturing(self) -> bool:
        return self.capturing


class PtxDevice:
    """A device (`device_checks.Device`) made of runtimes."""

    def __init__(self, multiprocessors: int = 1, *, together: bool = True) -> None:
        self.runtime = PtxRuntime(multiprocessors, together=together)

    def codec(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> DeviceCodec:
        return DeviceCodec(plan, codebooks, self.runtime.device, self.runtime)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.runtime.expose(_aligned(tensor))

    def synchronise(self) -> None:
        """The machine is done when a launch returns."""


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy at a multiple of 16 bytes."""
    size = tensor.numel() * tensor.dtype.itemsize
    room = torch.empty(size + 16, dtype=torch.uint8)
    begin = -room.data_ptr() % 16
    return room[begin : begin + size].view(tensor.dtype).copy_(tensor)
