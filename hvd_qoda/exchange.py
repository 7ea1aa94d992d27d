"""Exchanges: how the messages of one plan travel, and what every rank decodes from them.

- `AllGatherExchange`: every rank sends its message to every other (the paper's broadcast). One quantization; a rank
  sends (K-1) n bytes.
- `ReduceScatterExchange`: the plan is split into K shares of whole buckets. Phase 1 sends each share to its owner, who
  decodes the mean of what all ranks sent, in float32, and encodes it again (with random numbers of its own: phase 1 of
  the key); phase 2 sends the owners' messages to everybody. Two quantizations; a rank sends 2 (K-1)/K n bytes. The
  owner uses what it has sent, decoded, like everybody else: else its replica would differ from the others. Gradients
  of 16 bits count as float32 here, so that the mean is not rounded twice: codes take the same bytes, exact values more.
- `hvd_qoda.reduce_to_owner.ReduceToOwnerExchange`: every slice goes to the one rank that keeps the result.
- `hvd_qoda.hierarchical.HierarchicalExchange`: exact inside a host, one of these two between hosts.

All are started without waiting. `Exchange.advance` does whatever can be done without waiting, such as moving from
phase 1 to phase 2; `PendingExchanges` advances all exchanges while it waits for one. That matters: an owner that waited
for one parameter's second phase before it had sent another's would stop every rank.

An exchange is made once per plan and keeps its message buffers until codebooks change, which they do between rounds. It
carries one round at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from hvd_qoda.errors import QodaError, RankMismatchError, WireError
from hvd_qoda.gradient_codec import GradientCodec
from hvd_qoda.shares import (
    OwnMean,
    OwnMessage,
    Share,
    Shares,
    Stamp,
    empty_message,
    in_float32,
    pieces_of,
    replanned,
    under_way,
    used_codebooks,
    with_dtypes_of,
    write_refusal,
)
from hvd_qoda.traffic import all_gather_bytes
from hvd_qoda.transport import Handle, Transport, wait_until
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan
from qoda_kernels.worker_threads import WorkerThreads

__all__ = [
    "WORTH_A_ROUND_TRIP_BYTES",
    "AllGatherExchange",
    "Exchange",
    "OwnMessage",
    "PendingExchanges",
    "ReduceScatterExchange",
    "Stamp",
    "exchange_by_bytes",
    "wait_for_last_phase",
]

WORTH_A_ROUND_TRIP_BYTES = 2**16
"""What a second phase must save; half a millisecond at 1 Gbit/s."""


class Exchange(Protocol):
    """The way of one plan's messages."""

    @property
    def plan(self) -> MessagePlan:
        """Layout of the tensors."""

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this rank in one round, headers and padding included."""

    @property
    def waiting_for(self) -> str:
        """Name of the collective under way, for messages."""

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """Encode and decode with other levels from the next round on.

        Where formats differ, such as the bits, the plan becomes another one and messages get other sizes: every rank
        does so between the same two rounds.
        """

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """Encode and send without waiting; `values` may change as soon as this returns.

        Args:
            values: one contiguous 1-D tensor per segment of the plan, on the device that is to encode them.
            stamp: identifies the step.
        """

    def start_refused(self, reason: str) -> None:
        """Take part in a round without a gradient: every rank's `finish` raises RankMismatchError with the reason."""

    def advance(self) -> bool:
        """Do what can be done without waiting; returns whether only `finish` is left (which may still have to wait)."""

    def ready(self) -> bool:
        """Whether `finish` would return at once."""

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """Wait, and decode the ranks' mean.

        Args:
            out: contiguous 1-D tensors, one per segment, with the slices' dtypes, on the device that is to decode;
                written.
            scale: factor of the mean.

        Raises:
            WireError: when a message is damaged or not the expected one.
            RankMismatchError: when another rank refused the messages; it raises the reason itself.
            ExchangeTimeoutError: when a peer did not take part in time.
        """

    def drop(self) -> None:
        """Wait for the round under way, and forget it."""

    @property
    def has_own_message(self) -> bool:
        """Whether what this rank sends is its own gradient, quantized."""

    def own_message(self) -> OwnMessage:
        """A copy of what this rank sent in the last round: its own quantized gradient, hatV_k of the papers.

        Raises:
            UnsupportedError: without `has_own_message`.
        """

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """An `own_message` of an earlier run, from its bytes and the stamp and codebooks of its step."""


class AllGatherExchange:
    """Every rank sends its message to every other; see the module's docstring.

    Args:
        plan: layout of the tensors.
        codebooks: codebooks of the plan's keys.
        transport: the ranks.
        name: of the collective: the same on every rank, and its own for every exchange.
        threads: what runs the codec; by default the calling thread.
    """

    def __init__(
        self,
        plan: MessagePlan,
        codebooks: Mapping[str, Codebook],
        transport: Transport,
        name: str,
        threads: WorkerThreads | None = None,
    ) -> None:
        self.plan = plan
        self.waiting_for = f"{name}.all_gather"
        self._transport = transport
        self._threads = threads
        self._message = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._handle: Handle | None = None
        self._stamp = Stamp(0, 0, 0)
        self.use_codebooks(codebooks)

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`."""
        return all_gather_bytes(self.plan.message_bytes, self._transport.size)

    @property
    def has_own_message(self) -> bool:
        """See `Exchange`."""
        return True

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`."""
        self._codebooks = codebooks
        self.plan = replanned(self.plan, codebooks)
        self._share = self._make_share(self.plan, codebooks)
        if self._message.numel() != self.plan.message_bytes:
            self._message = empty_message(self.plan.message_bytes)

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp = stamp
        rank, size = self._transport.rank, self._transport.size
        self._share.codec.encode(values, stamp.context(0, rank, 0, size), out=self._message)
        self._send()

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        write_refusal(self._message, reason)
        self._send()

    def advance(self) -> bool:
        """See `Exchange`."""
        return True

    def ready(self) -> bool:
        """See `Exchange`."""
        return under_way(self._handle).ready()

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`."""
        handle, self._handle = under_way(self._handle), None
        self._share.decode_mean(handle.wait(), self._stamp, 0, out, scale)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.wait()

    def own_message(self) -> OwnMessage:
        """See `Exchange`."""
        return self._own_message(self._message.clone(), self._stamp, self._share, self._codebooks)

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """See `Exchange`."""
        share = self._make_share(replanned(self.plan, codebooks), codebooks)
        return self._own_message(message, stamp, share, codebooks)

    def _send(self) -> None:
        sizes = [self.plan.message_bytes] * self._transport.size
        self._handle = self._transport.start_all_gather(self._message, sizes, self.waiting_for)

    def _own_message(
        self, message: torch.Tensor, stamp: Stamp, share: Share, codebooks: Mapping[str, Codebook]
    ) -> OwnMessage:
        return OwnMessage(
            message, stamp, self._transport.rank, share.plan, (share,), used_codebooks(share.plan, codebooks)
        )

    def _make_share(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> Share:
        return Share(plan, pieces_of(plan, plan), GradientCodec(plan, codebooks, self._threads))


class ReduceScatterExchange:
    """Shares go to their owners, the owners' means to everybody; see the module's docstring.

    Args:
        plan: layout of the tensors.
        codebooks: codebooks of the plan's keys.
        transport: the ranks.
        name: of the collectives: the same on every rank, and its own for every exchange.
        threads: what runs the codec; by default the calling thread.
    """

    def __init__(
        self,
        plan: MessagePlan,
        codebooks: Mapping[str, Codebook],
        transport: Transport,
        name: str,
        threads: WorkerThreads | None = None,
    ) -> None:
        self.plan = plan
        self._wide = in_float32(plan, codebooks)
        self._name = name
        self._transport = transport
        self._threads = threads
        self.use_codebooks(codebooks)
        self._stamp = Stamp(0, 0, 0)
        self._first: Handle | None = None
        self._second: Handle | None = None
        self._failure: QodaError | None = None

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`."""
        return self._shares.sent_bytes + self._mean.sent_bytes

    @property
    def has_own_message(self) -> bool:
        """See `Exchange`."""
        return True

    @property
    def waiting_for(self) -> str:
        """See `Exchange`."""
        return f"{self._name}.{'all_to_all' if self._second is None else 'all_gather'}"

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`."""
        self._codebooks = codebooks
        self.plan = replanned(self.plan, codebooks)
        self._wide = replanned(self._wide, codebooks)
        self._shares = Shares(self._make_shares(self._wide, codebooks), self._transport)
        self._mean = OwnMean(self._shares, self._transport)

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp, self._second, self._failure = stamp, None, None
        self._mean.lie_beside(values)
        self._shares.encode(with_dtypes_of(self._wide, values), stamp, self._transport.size)
        self._first = self._shares.send(self.waiting_for)

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        self._second, self._failure = None, None
        self._shares.refuse(reason)
        self._first = self._shares.send(self.waiting_for)

    def advance(self) -> bool:
        """See `Exchange`."""
        if self._first is not None and self._first.ready():
            handle, self._first = self._first, None
            messages = handle.wait()
            try:
                self._mean.decode(messages, self._stamp)
                self._mean.encode(self._stamp)
            except (WireError, RankMismatchError) as error:
                # The others are waiting for this share: they must learn that there is none.
                self._failure = error
                self._mean.refuse(str(error))
            self._second = self._mean.send(f"{self._name}.all_gather")
        return self._second is not None

    def ready(self) -> bool:
        """See `Exchange`."""
        return self.advance() and under_way(self._second).ready()

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`."""
        wait_for_last_phase(self, self._transport)
        handle, self._second = under_way(self._second), None
        messages = handle.wait()
        if self._failure is not None:
            raise self._failure
        self._shares.decode_means(messages, self._stamp, out, scale)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._first is not None:
            wait_for_last_phase(self, self._transport)
        if self._second is not None:
            handle, self._second = self._second, None
            handle.wait()

    def own_message(self) -> OwnMessage:
        """See `Exchange`."""
        return self._own_message(self._shares.messages.clone(), self._stamp, self._shares.shares, self._codebooks)

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """See `Exchange`."""
        shares = self._make_shares(replanned(self._wide, codebooks), codebooks)
        return self._own_message(message, stamp, shares, codebooks)

    def _own_message(
        self, message: torch.Tensor, stamp: Stamp, shares: tuple[Share, ...], codebooks: Mapping[str, Codebook]
    ) -> OwnMessage:
        return OwnMessage(message, stamp, self._transport.rank, self.plan, shares, used_codebooks(self.plan, codebooks))

    def _make_shares(self, wide: MessagePlan, codebooks: Mapping[str, Codebook]) -> tuple[Share, ...]:
        plans = wide.split(self._transport.size)
        return tuple(
            Share(plan, pieces_of(wide, plan), GradientCodec(plan, codebooks, self._threads)) for plan in plans
        )


class PendingExchanges:
    """The exchanges under way, advanced together.

    Args:
        timeout_s: seconds after which a wait gives up.
        where: this rank, for messages.
    """

    def __init__(self, timeout_s: float, where: str) -> None:
        self._timeout_s = timeout_s
        self._where = where
        self._first_phase: list[Exchange] = []
        self._all: dict[int, Exchange] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, exchange: Exchange) -> None:
        """Take over a started exchange.

        Nothing is advanced here: how many collectives a rank has started at a line of the user's program must not
        depend on time (see `hvd_qoda.horovod.transport`).
        """
        self._all[id(exchange)] = exchange
        self._first_phase.append(exchange)

    def finish(self, exchange: Exchange, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """Wait for one exchange while all others advance, and decode it; see `Exchange.finish`."""
        self._wait(exchange)
        exchange.finish(out, scale)

    def drop(self) -> None:
        """Wait for all rounds under way, and forget them."""
        for exchange in list(self._all.values()):
            self._wait(exchange)
            exchange.drop()

    def _wait(self, exchange: Exchange) -> None:
        wait_until(
            lambda: self._advance_until(exchange), self._timeout_s, lambda: f"{self._where}: {exchange.waiting_for!r}"
        )
        del self._all[id(exchange)]

    def _advance_until(self, exchange: Exchange) -> bool:
        # All of them, in whatever order they become ready: ranks differ in the order of their gradients.
        if self._first_phase:
            self._first_phase = [waiting for waiting in self._first_phase if not waiting.advance()]
        return exchange.ready()


def wait_for_last_phase(exchange: Exchange, transport: Transport) -> None:
    """Advance an exchange until only `Exchange.finish` is left.

    Raises:
        ExchangeTimeoutError: when a peer did not take part in time.
    """
    wait_until(
        exchange.advance, transport.timeout_s, lambda: f"{exchange.waiting_for!r} among the ranks {transport.ranks}"
    )


def exchange_by_bytes(plan: MessagePlan, codebooks: Mapping[str, Codebook], size: int) -> str:
    """The scheme for a plan, by its bytes alone: the same answer on every rank.

    A reduce-scatter is chosen where it saves a rank 64 KiB or more. For less it is not worth its second quantization
    and its all-to-all, which hosts do not fuse with others: a round trip for every plan. No link speed is asked.

    Args:
        plan: layout of the tensors.
        codebooks: codebooks of the plan's keys.
        size: number of ranks, K.

    Returns:
        "allgather" or "reduce_scatter".
    """
    if size <= 2:
        return "allgather"
    shares = sum(share.message_bytes for share in in_float32(plan, codebooks).split(size))
    # A rank sends its message K-1 times; or, on average over the ranks, (K-1)/K of all shares in each of two phases.
    saved = (size - 1) * plan.message_bytes - 2 * (size - 1) / size * shares
    return "reduce_scatter" if saved >= WORTH_A_ROUND_TRIP_BYTES else "allgather"
