"""exchange="off" under DistributedDataParallel: the host's own all-reduce of a fusion buffer, as it is.

Like DDP itself it divides before it sums: the sum of 16-bit gradients may be beyond their range.
"""

from collections.abc import Mapping, Sequence

import torch

from hvd_qoda.errors import UnsupportedError
from hvd_qoda.shares import OwnMessage, Stamp, under_way
from hvd_qoda.traffic import all_reduce_bytes
from hvd_qoda.transport import Handle, ReducingTransport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan

__all__ = ["AllReduceExchange"]


class AllReduceExchange:
    """Sums by the host, gradients of one dtype in one tensor; a `hvd_qoda.exchange.Exchange` of one phase.

    Args:
        plan: layout of the tensors, with exact codebooks.
        transport: the ranks.
        name: of the collectives: the same on every rank, and its own for every exchange.
    """

    def __init__(self, plan: MessagePlan, transport: ReducingTransport, name: str) -> None:
        self.plan = plan
        self.waiting_for = f"{name}.all_reduce"
        self._transport = transport
        self._dtypes = list(dict.fromkeys(segment.slice.dtype for segment in plan.segments))
        self._handles: list[Handle | None] = []

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`."""
        return round(all_reduce_bytes(self.plan.payload_bytes, self._transport.size))

    @property
    def has_own_message(self) -> bool:
        """See `Exchange`: nothing is quantized."""
        return False

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`; gradients travel without any."""

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._handles = []
        for dtype in self._dtypes:
            together = torch.cat([tensor for tensor in values if tensor.dtype == dtype]).div_(self._transport.size)
            name = f"{self.waiting_for}.{dtype}"
            self._handles.append(self._transport.start_all_reduce(together, name))

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        raise UnsupportedError(f"an all-reduce cannot tell the other ranks why there is no gradient: {reason}")

    def advance(self) -> bool:
        """See `Exchange`."""
        return True

    def ready(self) -> bool:
        """See `Exchange`."""
        return all(under_way(handle).ready() for handle in self._handles)

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`."""
        handles, self._handles = self._handles, []
        for dtype, handle in zip(self._dtypes, handles, strict=True):
            targets = [tensor for tensor in out if tensor.dtype == dtype]
            (mean,) = under_way(handle).wait()
            for target, part in zip(targets, mean.split([target.numel() for target in targets]), strict=True):
                torch.mul(part, scale, out=target)

    def drop(self) -> None:
        """See `Exchange`."""
        handles, self._handles = self._handles, []
        for handle in handles:
            under_way(handle).wait()

    def own_message(self) -> OwnMessage:
        """See `Exchange`."""
        raise UnsupportedError('with exchange="off" no rank has a quantized gradient')

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """See `Exchange`."""
        return self.own_message()
