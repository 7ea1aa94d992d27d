"""Which device codes the gradients: the GPU that holds them, if its kernels have passed the self check; else the CPU.

Both give the same bits, so ranks need not choose alike. The check is `qoda_kernels.device_check`; it is made when the
first gradients of a device come, and again when codebooks change.
"""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from hvd_qoda.errors import UnsupportedError
from hvd_qoda.gradient_codec import runtime_of
from qoda_kernels.codebook import Codebook
from qoda_kernels.device_check import check_device
from qoda_kernels.device_codec import DeviceRuntime
from qoda_kernels.layout import EXACT_DTYPES
from qoda_kernels.registry import CodebookRegistry

__all__ = ["CodecDevice", "checked_problem", "own_stream"]

_CPU = torch.device("cpu")
_logger = logging.getLogger(__name__)


class CodecDevice:
    """Chooses the device for one model's gradients.

    Args:
        wanted: "auto", "cpu", or "gpu" for an error instead of the CPU.
        stratified: whether random numbers are stratified among the ranks.
    """

    def __init__(self, wanted: Literal["auto", "cpu", "gpu"], stratified: bool) -> None:
        self._wanted = wanted
        self._stratified = stratified
        self._registry: CodebookRegistry | None = None  # whose codebooks were checked
        self._problems: dict[torch.device, str | None] = {}
        self._said: set[str] = set()

    def of(self, gradients: Sequence[torch.Tensor], registry: CodebookRegistry) -> torch.device:
        """Where these gradients are to be coded, together.

        Args:
            gradients: at least one.
            registry: the codebooks of this step.

        Raises:
            UnsupportedError: with "gpu", if their GPU cannot do it; the message says why.
        """
        device = gradients[0].device
        if _needs_no_runtime(device):
            return _CPU
        if self._wanted == "cpu":
            return self._staged(device, "codec_device is 'cpu'")
        if any(gradient.device != device for gradient in gradients):
            return self._staged(device, "gradients that travel together lie on different devices")
        problem = self._problem(device, registry)
        return device if problem is None else self._staged(device, problem)

    def verdict(self, devices: Iterable[torch.device], registry: CodebookRegistry) -> str:
        """What the other ranks must know before gradients come: why these devices cannot do what "gpu" demands.

        A rank that raised alone, at its first gradient, would leave the others waiting for it.

        Args:
            devices: of this rank's gradients.
            registry: the codebooks of the steps to come.

        Returns:
            "possible" where nothing else is found, or demanded. Devices are not named: ranks have different ones.
        """
        return "; ".join(sorted(set(self._refused(devices, registry).values()))) or "possible"

    def refuse(self, devices: Iterable[torch.device], registry: CodebookRegistry) -> None:
        """Raise UnsupportedError unless the verdict is "possible"."""
        for device, problem in self._refused(devices, registry).items():
            self._staged(device, problem)

    def _refused(self, devices: Iterable[torch.device], registry: CodebookRegistry) -> dict[torch.device, str]:
        """Devices of which "gpu" is demanded in vain, and why."""
        if self._wanted != "gpu":
            return {}
        found = {device: self._problem(device, registry) for device in set(devices) if not _needs_no_runtime(device)}
        return {device: problem for device, problem in found.items() if problem is not None}

    def _problem(self, device: torch.device, registry: CodebookRegistry) -> str | None:
        """Why gradients on a device that is not the CPU cannot be coded there; None if they can."""
        runtime = runtime_of(device)
        if runtime is None:
            return "there are no kernels for this kind of device"
        if registry is not self._registry:
            self._registry, self._problems = registry, {}
        if device not in self._problems:
            dtypes = {entry.dtype for entry in registry.parameters.values()} & set(EXACT_DTYPES)
            dtypes.add(torch.float32)  # of means, in a reduce-scatter
            self._problems[device] = checked_problem(runtime, registry.codebooks.values(), dtypes, self._stratified)
        return self._problems[device]

    def _staged(self, device: torch.device, reason: str) -> torch.device:
        """The CPU; each reason is given once."""
        text = f"gradients on {device} are copied to the CPU and coded there, at a cost in every step: {reason}"
        if self._wanted == "gpu":
            raise UnsupportedError(f"codec_device='gpu', but {reason} (gradients on {device})")
        if text not in self._said:
            self._said.add(text)
            _logger.warning("%s", text)
        return _CPU


def _needs_no_runtime(device: torch.device) -> bool:
    return device == _CPU and runtime_of(device) is None


def checked_problem(
    runtime: DeviceRuntime, codebooks: Iterable[Codebook], dtypes: Iterable[torch.dtype], stratified: bool = False
) -> str | None:
    """Why a device cannot code gradients of these dtypes with these codebooks; None if it can."""
    try:
        check_device(runtime, codebooks, sorted(dtypes, key=str), stratified)
    except Exception as error:  # compilers and drivers raise what they like; training goes on without them
        hint = "; the kernels need pip install 'hvd-qoda[cuda]'" if isinstance(error, ImportError) else ""
        return f"its self check failed: {type(error).__name__}: {error}{hint}"
    _logger.info("gradients on %s are coded there: its kernels give the CPU's bits", runtime.device)
    return None


def own_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Lets what this thread does on a device run beside the work of other threads, not behind it."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream: contextlib.AbstractContextManager[object] = torch.cuda.stream(torch.cuda.Stream(device))
    return stream
