"""A reduction to owners: of every slice one rank keeps the result, as where optimizer states are partitioned.

Every rank sends every owner what belongs to it, and the owner decodes the mean of what all have sent. One quantization;
a rank sends about (K-1)/K n bytes, half of what any exchange sends whose result all ranks hold. A damaged message is
noticed by its owner alone, which raises; the others learn of it when they next wait for that rank.
"""

from collections.abc import Mapping, Sequence

import torch

from hvd_qoda.errors import PlanError
from hvd_qoda.gradient_codec import GradientCodec
from hvd_qoda.shares import OwnMessage, SegmentRange, Share, Shares, Stamp, replanned, under_way, used_codebooks
from hvd_qoda.transport import Handle, Transport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["ReduceToOwnerExchange"]


class ReduceToOwnerExchange:
    """Sends every slice to the rank that keeps it; see the module's docstring.

    Args:
        plan: layout of the tensors.
        owners: position of the rank that keeps each segment.
        codebooks: codebooks of the plan's keys.
        transport: the ranks.
        name: of the collective: the same on every rank, and its own for every exchange.
        threads: what runs the codec; by default the calling thread.

    Raises:
        PlanError: unless every segment has an owner among the ranks.
    """

    def __init__(
        self,
        plan: MessagePlan,
        owners: Sequence[int],
        codebooks: Mapping[str, Codebook],
        transport: Transport,
        name: str,
        threads: WorkerThreads | None = None,
    ) -> None:
        if len(owners) != len(plan.segments) or not all(0 <= owner < transport.size for owner in owners):
            raise PlanError(
                f"{len(plan.segments)} segments need as many owners among {transport.size} ranks; got {list(owners)}"
            )
        self.plan = plan
        self.waiting_for = f"{name}.all_to_all"
        self._owners = tuple(owners)
        self._transport = transport
        self._threads = threads
        self.use_codebooks(codebooks)
        self._handle: Handle | None = None
        self._stamp = Stamp(0, 0, 0)

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`."""
        return self._shares.sent_bytes

    @property
    def has_own_message(self) -> bool:
        """See `Exchange`."""
        return True

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`."""
        self._codebooks = codebooks
        self.plan = replanned(self.plan, codebooks)
        self._shares = Shares(self._make_shares(codebooks), self._transport)

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp = stamp
        self._shares.encode(values, stamp, self._transport.size)
        self._handle = self._shares.send(self.waiting_for)

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        self._shares.refuse(reason)
        self._handle = self._shares.send(self.waiting_for)

    def advance(self) -> bool:
        """See `Exchange`."""
        return True

    def ready(self) -> bool:
        """See `Exchange`."""
        return under_way(self._handle).ready()

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`; only the tensors of the segments that this rank keeps are written."""
        handle, self._handle = under_way(self._handle), None
        targets = [piece.of(out) for piece in self._shares.own.pieces]
        self._shares.decode_own_mean(handle.wait(), self._stamp, targets, scale)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.wait()

    def own_message(self) -> OwnMessage:
        """See `Exchange`."""
        return self._own_message(self._shares.messages.clone(), self._stamp, self._shares.shares, self._codebooks)

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """See `Exchange`."""
        return self._own_message(message, stamp, self._make_shares(codebooks), codebooks)

    def _own_message(
        self, message: torch.Tensor, stamp: Stamp, shares: tuple[Share, ...], codebooks: Mapping[str, Codebook]
    ) -> OwnMessage:
        plan = replanned(self.plan, codebooks)
        return OwnMessage(message, stamp, self._transport.rank, plan, shares, used_codebooks(plan, codebooks))

    def _make_shares(self, codebooks: Mapping[str, Codebook]) -> tuple[Share, ...]:
        shares = []
        for rank in range(self._transport.size):
            kept = [index for index, owner in enumerate(self._owners) if owner == rank]
            slices = [self.plan.segments[index].slice for index in kept]
            plan = MessagePlan.build(slices, codebooks)
            pieces = tuple(SegmentRange(index, 0, part.length) for index, part in zip(kept, slices, strict=True))
            shares.append(Share(plan, pieces, GradientCodec(plan, codebooks, self._threads)))
        return tuple(shares)
