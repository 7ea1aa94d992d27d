"""A reduction to owners: of every slice one rank keeps the result, as where optimizer states are partitioned.

Every rank sends every owner what belongs to it, and the owner decodes the mean of what all have sent. One quantization;
a rank sends about (K-1)/K n bytes, half of what any exchange sends whose result all ranks hold.
"""

from collections.abc import Mapping, Sequence

import torch

from hvd_qoda.errors import PlanError
from hvd_qoda.exchange import (
    OwnMessage,
    Piece,
    Share,
    Stamp,
    check_not_refused,
    replanned,
    under_way,
    used_codebooks,
    write_refusal,
)
from hvd_qoda.traffic import all_to_all_bytes
from hvd_qoda.transport import Handle, Transport
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
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
        self._bytes: list[int] = []
        self.use_codebooks(codebooks)
        self._handle: Handle | None = None
        self._stamp = Stamp(0, 0, 0)

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`."""
        return all_to_all_bytes(self._bytes, self._transport.rank)

    @property
    def has_own_message(self) -> bool:
        """See `Exchange`."""
        return True

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`."""
        self._codebooks = codebooks
        self.plan = replanned(self.plan, codebooks)
        self._shares = self._make_shares(codebooks)
        sizes = [share.plan.message_bytes for share in self._shares]
        if sizes != self._bytes:
            self._bytes = sizes
            self._message = torch.empty(sum(sizes), dtype=torch.uint8)

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp = stamp
        rank, size = self._transport.rank, self._transport.size
        for owner, (share, message) in enumerate(zip(self._shares, self._message.split(self._bytes), strict=True)):
            parts = [piece.of(values) for piece in share.pieces]
            share.codec.encode(parts, stamp.context(0, rank, owner, size), out=message)
        self._send()

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        for message in self._message.split(self._bytes):
            write_refusal(message, reason)
        self._send()

    def advance(self) -> bool:
        """See `Exchange`."""
        return True

    def ready(self) -> bool:
        """See `Exchange`."""
        return under_way(self._handle).ready()

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`; only the tensors of the segments that this rank keeps are written."""
        handle, self._handle = under_way(self._handle), None
        messages = handle.wait()
        rank, size = self._transport.rank, self._transport.size
        share = self._shares[rank]
        for source, message in enumerate(messages):
            check_not_refused(message, source)
        contexts = [self._stamp.context(0, source, rank) for source in range(size)]
        targets = [piece.of(out) for piece in share.pieces]
        share.codec.decode_mean(messages, contexts, out=targets, scale=scale / size)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.wait()

    def own_message(self) -> OwnMessage:
        """See `Exchange`."""
        return self._own_message(self._message.clone(), self._stamp, self._shares, self._codebooks)

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """See `Exchange`."""
        return self._own_message(message, stamp, self._make_shares(codebooks), codebooks)

    def _send(self) -> None:
        received = [self._bytes[self._transport.rank]] * self._transport.size
        self._handle = self._transport.start_all_to_all(self._message, self._bytes, received, self.waiting_for)

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
            pieces = tuple(Piece(index, 0, part.length) for index, part in zip(kept, slices, strict=True))
            shares.append(Share(plan, pieces, Codec(plan, codebooks, self._threads)))
        return tuple(shares)
