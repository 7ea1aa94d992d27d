"""The codec that works where the gradients are: on the CPU, or on the GPU that holds them. The bits are the same.

Messages lie on the host, or on the same GPU; what lies elsewhere is copied. A call on a GPU uses torch's current stream
and waits for it: what it has read may then change, what it has written is there for every stream and thread, and a
damaged message has raised.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec, combined, have_one_rotation
from qoda_kernels.device_codec import CudaRuntime, DeviceCodec, DeviceRuntime
from qoda_kernels.errors import PlanError
from qoda_kernels.layout import MessagePlan
from qoda_kernels.wire import MessageContext
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["GradientCodec", "runtime_of"]

_logger = logging.getLogger(__name__)


@cache
def runtime_of(device: torch.device) -> DeviceRuntime | None:
    """What runs our kernels on a device; None for the CPU and for devices that they are not written for."""
    return CudaRuntime(device) if device.type == "cuda" else None


class GradientCodec(Codec):
    """Encodes and decodes the messages of one plan on the device of the tensors it is called with.

    Where tensors lie on several devices, or the kernels do not take the plan, the CPU works on copies.
    """

    def __init__(
        self, plan: MessagePlan, codebooks: Mapping[str, Codebook], threads: WorkerThreads | None = None
    ) -> None:
        """See `Codec`."""
        super().__init__(plan, codebooks, threads)
        self._on_devices: dict[torch.device, _OnDevice | None] = {}

    def encode(
        self, values: Sequence[torch.Tensor], context: MessageContext, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Codec.encode`.

        Args:
            values: contiguous 1-D tensors with the slices' dtypes and lengths, of any device.
            context: identifies the message and selects the random numbers.
            out: uint8 [message_bytes] of any device; new host memory by default.
        """
        found = self._on_device_of(values)
        if found is not None:
            message = torch.empty(self.plan.message_bytes, dtype=torch.uint8, device="cpu") if out is None else out
            found.encode(values, context, message)
            return message
        staged = _on_cpu(values)
        if out is None or out.is_cpu:
            return super().encode(staged, context, out)
        return out.copy_(super().encode(staged, context))

    def decode_mean(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        out: Sequence[torch.Tensor] | None = None,
        scale: float | None = None,
    ) -> list[torch.Tensor]:
        """See `Codec.decode_mean`.

        Args:
            messages: contiguous uint8 tensors [message_bytes] of any device, one per sender.
            contexts: what each message must be.
            out: contiguous 1-D tensors with the slices' dtypes and lengths, of any device; new ones on the CPU by
                default. Where WireError is raised they may hold NaN.
            scale: factor of the sum.
        """
        found = None if out is None else self._on_device_of(out)
        if out is not None and found is not None:
            found.decode_mean(messages, contexts, out, scale)
            return list(out)
        staged = _on_cpu(messages)
        if out is None or all(tensor.is_cpu for tensor in out):
            return super().decode_mean(staged, contexts, out, scale)
        for tensor, result in zip(out, super().decode_mean(staged, contexts, None, scale), strict=True):
            tensor.copy_(result)
        return list(out)

    def _on_device_of(self, tensors: Sequence[torch.Tensor]) -> "_OnDevice | None":
        """The codec of the device where all of these are, if there is one."""
        if not tensors:
            return None
        device = tensors[0].device
        if device not in self._on_devices:
            self._on_devices[device] = self._made_for(device)
        found = self._on_devices[device]
        return None if found is None or any(tensor.device != device for tensor in tensors) else found

    def _made_for(self, device: torch.device) -> "_OnDevice | None":
        runtime = runtime_of(device)
        if runtime is None:
            return None
        try:
            return _OnDevice(self.plan, self._codebooks, runtime)
        except PlanError as error:
            _logger.warning("a message is coded on the CPU, not on %s: %s", device, error)
            return None


def _on_cpu(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return tensors if all(tensor.is_cpu for tensor in tensors) else [tensor.cpu() for tensor in tensors]


class _OnDevice:
    """A device codec and its buffers.

    Every call ends with everything done. So the buffers can be used again, and calls may come from several threads,
    each with a current stream of its own, one after the other.
    """

    def __init__(self, plan: MessagePlan, codebooks: Mapping[str, Codebook], runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._codec = DeviceCodec(plan, codebooks, runtime.device, runtime)
        self._size = plan.message_bytes
        self._rotates = any(book.rotation != "none" for book in codebooks.values())
        self._room = [self._empty()]  # of messages that lie elsewhere

    def encode(self, values: Sequence[torch.Tensor], context: MessageContext, out: torch.Tensor) -> None:
        is_here = out.device == self._runtime.device and out.data_ptr() % 16 == 0
        encoded = self._codec.encode(values, context, out if is_here else self._room[0])
        if not is_here:
            # Beside the kernel in stream order, and into page-locked memory where the caller has such.
            out.copy_(encoded, non_blocking=True)
        self._runtime.synchronise()

    def decode_mean(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        out: Sequence[torch.Tensor],
        scale: float | None,
    ) -> None:
        if not self._rotates or have_one_rotation(contexts):
            self._decode(messages, contexts, out, scale)
            return
        pairs = zip(messages, contexts, strict=True)
        decoded = (self._decoded_alone(message, context, out) for message, context in pairs)
        combined(decoded, 1.0 / len(messages) if scale is None else scale, out)
        self._runtime.synchronise()

    def _decoded_alone(
        self, message: torch.Tensor, context: MessageContext, like: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        result = [torch.empty_like(tensor) for tensor in like]
        self._decode([message], [context], result, 1.0)
        return result

    def _decode(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        out: Sequence[torch.Tensor],
        scale: float | None,
    ) -> None:
        self._codec.decode_mean(self._placed(messages), contexts, out, scale)
        self._runtime.synchronise()
        self._codec.check()

    def _placed(self, messages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The messages on the device, at multiples of 16 bytes."""
        while len(self._room) < len(messages):
            self._room.append(self._empty())
        placed = []
        for message, room in zip(messages, self._room, strict=False):
            is_here = message.device == self._runtime.device and message.data_ptr() % 16 == 0
            if not is_here and message.numel() == self._size:
                placed.append(room.copy_(message, non_blocking=True))
            else:
                placed.append(message)  # in place; or of a size that the codec refuses
        return placed

    def _empty(self) -> torch.Tensor:
        return torch.empty(self._size, dtype=torch.uint8, device=self._runtime.device)
