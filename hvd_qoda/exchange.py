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

An exchange is made once per plan and keeps its message buffers. It carries one round at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from hvd_qoda.errors import QodaError, RankMismatchError, WireError
from hvd_qoda.traffic import all_gather_bytes, all_to_all_bytes
from hvd_qoda.transport import Handle, Transport, wait_until
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext
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
]

WORTH_A_ROUND_TRIP_BYTES = 2**16
"""What a second phase must save; half a millisecond at 1 Gbit/s."""

_REFUSAL = b"REFUSED"


@dataclass(frozen=True)
class Stamp:
    """What all messages of one step have in common.

    Attributes:
        seed: the user's seed.
        counter: number of the exchange, counted over the whole training.
        registry_version: version of the codebooks.
        dither: "independent" or "stratified" random numbers of the ranks whose messages are averaged.
    """

    seed: int
    counter: int
    registry_version: int
    dither: str = "independent"

    def context(self, phase: int, source: int, destination: int, ranks: int = 1) -> MessageContext:
        """Context of the message that `source` encodes for the share `destination`.

        Args:
            phase: 0 or 1.
            source: position of the sender.
            destination: index of the share.
            ranks: to encode, number of the ranks whose messages are averaged with this one; to decode, any.
        """
        strata = ranks if self.dither == "stratified" else 1
        version = self.registry_version
        return MessageContext(self.seed, self.counter, source, phase, version, source, destination, strata)


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
            values: one contiguous 1-D CPU tensor per segment of the plan.
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
            out: contiguous 1-D tensors, one per segment, with the slices' dtypes; written.
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

    def own_message(self) -> "OwnMessage":
        """A copy of what this rank sent in the last round: its own quantized gradient, hatV_k of the papers.

        Raises:
            UnsupportedError: without `has_own_message`.
        """

    def restore_own_message(
        self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]
    ) -> "OwnMessage":
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
        self._message = torch.empty(0, dtype=torch.uint8)
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
            self._message = torch.empty(self.plan.message_bytes, dtype=torch.uint8)

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
        messages = handle.wait()
        size = self._transport.size
        for source, message in enumerate(messages):
            check_not_refused(message, source)
        contexts = [self._stamp.context(0, source, 0) for source in range(size)]
        self._share.codec.decode_mean(messages, contexts, out=out, scale=scale / size)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            handle.wait()

    def own_message(self) -> "OwnMessage":
        """See `Exchange`."""
        return self._own_message(self._message.clone(), self._stamp, self._share, self._codebooks)

    def restore_own_message(
        self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]
    ) -> "OwnMessage":
        """See `Exchange`."""
        share = self._make_share(replanned(self.plan, codebooks), codebooks)
        return self._own_message(message, stamp, share, codebooks)

    def _send(self) -> None:
        sizes = [self.plan.message_bytes] * self._transport.size
        self._handle = self._transport.start_all_gather(self._message, sizes, self.waiting_for)

    def _own_message(
        self, message: torch.Tensor, stamp: Stamp, share: "Share", codebooks: Mapping[str, Codebook]
    ) -> "OwnMessage":
        return OwnMessage(
            message, stamp, self._transport.rank, share.plan, (share,), used_codebooks(share.plan, codebooks)
        )

    def _make_share(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> "Share":
        return Share(plan, pieces_of(plan, plan), Codec(plan, codebooks, self._threads))


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
        self._bytes: list[int] = []
        self.use_codebooks(codebooks)
        self._stamp = Stamp(0, 0, 0)
        self._first: Handle | None = None
        self._second: Handle | None = None
        self._failure: QodaError | None = None

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`."""
        rank, size = self._transport.rank, self._transport.size
        return all_to_all_bytes(self._bytes, rank) + all_gather_bytes(self._bytes[rank], size)

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
        before = self.plan
        self._codebooks = codebooks
        self.plan = replanned(before, codebooks)
        self._wide = replanned(self._wide, codebooks)
        self._shares = self._make_shares(self._wide, codebooks)
        if self._bytes and self.plan is before:
            return
        self._bytes = [share.plan.message_bytes for share in self._shares]
        own = self._shares[self._transport.rank].plan
        self._message = torch.empty(sum(self._bytes), dtype=torch.uint8)
        self._mean = [torch.empty(segment.slice.length, dtype=segment.slice.dtype) for segment in own.segments]
        self._mean_message = torch.empty(own.message_bytes, dtype=torch.uint8)

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp, self._second, self._failure = stamp, None, None
        rank, size = self._transport.rank, self._transport.size
        wide = [tensor.to(s.slice.dtype) for tensor, s in zip(values, self._wide.segments, strict=True)]
        for owner, (share, message) in enumerate(zip(self._shares, self._message.split(self._bytes), strict=True)):
            parts = [piece.of(wide) for piece in share.pieces]
            share.codec.encode(parts, stamp.context(0, rank, owner, size), out=message)
        self._send()

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        self._second, self._failure = None, None
        for message in self._message.split(self._bytes):
            write_refusal(message, reason)
        self._send()

    def advance(self) -> bool:
        """See `Exchange`."""
        if self._first is not None and self._first.ready():
            handle, self._first = self._first, None
            messages = handle.wait()
            try:
                self._encode_mean(messages)
            except (WireError, RankMismatchError) as error:
                # The others are waiting for this share: they must learn that there is none.
                self._failure = error
                write_refusal(self._mean_message, str(error))
            name = f"{self._name}.all_gather"
            self._second = self._transport.start_all_gather(self._mean_message, self._bytes, name)
        return self._second is not None

    def ready(self) -> bool:
        """See `Exchange`."""
        return self.advance() and under_way(self._second).ready()

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`."""
        self._wait_for_first_phase()
        handle, self._second = under_way(self._second), None
        messages = handle.wait()
        if self._failure is not None:
            raise self._failure
        for owner, (share, message) in enumerate(zip(self._shares, messages, strict=True)):
            check_not_refused(message, owner)
            share.decode(message, self._stamp.context(1, owner, owner), out, scale)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._first is not None:
            self._wait_for_first_phase()
        if self._second is not None:
            handle, self._second = self._second, None
            handle.wait()

    def own_message(self) -> "OwnMessage":
        """See `Exchange`."""
        return self._own_message(self._message.clone(), self._stamp, self._shares, self._codebooks)

    def restore_own_message(
        self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]
    ) -> "OwnMessage":
        """See `Exchange`."""
        shares = self._make_shares(replanned(self._wide, codebooks), codebooks)
        return self._own_message(message, stamp, shares, codebooks)

    def _own_message(
        self, message: torch.Tensor, stamp: Stamp, shares: tuple["Share", ...], codebooks: Mapping[str, Codebook]
    ) -> "OwnMessage":
        return OwnMessage(message, stamp, self._transport.rank, self.plan, shares, used_codebooks(self.plan, codebooks))

    def _make_shares(self, wide: MessagePlan, codebooks: Mapping[str, Codebook]) -> tuple["Share", ...]:
        plans = wide.split(self._transport.size)
        return tuple(Share(plan, pieces_of(wide, plan), Codec(plan, codebooks, self._threads)) for plan in plans)

    def _send(self) -> None:
        received = [self._bytes[self._transport.rank]] * self._transport.size
        self._first = self._transport.start_all_to_all(self._message, self._bytes, received, self.waiting_for)

    def _wait_for_first_phase(self) -> None:
        transport = self._transport
        wait_until(self.advance, transport.timeout_s, lambda: f"{self.waiting_for!r} among the ranks {transport.ranks}")

    def _encode_mean(self, messages: Sequence[torch.Tensor]) -> None:
        """The mean of this rank's share, from phase 1 to phase 2."""
        rank, size = self._transport.rank, self._transport.size
        for source, message in enumerate(messages):
            check_not_refused(message, source)
        contexts = [self._stamp.context(0, source, rank) for source in range(size)]
        codec = self._shares[rank].codec
        codec.decode_mean(messages, contexts, out=self._mean, scale=1.0 / size)
        codec.encode(self._mean, self._stamp.context(1, rank, rank), out=self._mean_message)


@dataclass(frozen=True)
class OwnMessage:
    """What one rank has sent in one round, kept beyond the round.

    Attributes:
        message: the bytes, one message per share.
        stamp: of the step.
        source: the rank's position.
        plan: layout of the gradients.
        shares: the parts of the plan that have messages of their own.
        codebooks: of the step, by key.
    """

    message: torch.Tensor
    stamp: Stamp
    source: int
    plan: MessagePlan
    shares: tuple["Share", ...]
    codebooks: Mapping[str, Codebook]

    def decode(self) -> list[torch.Tensor]:
        """The quantized gradient: one tensor per segment of the plan, in float32 (float64 where the slice is).

        Raises:
            WireError: if the bytes are damaged.
        """
        slices = [segment.slice for segment in self.plan.segments]
        out = [torch.empty(part.length, dtype=wide_dtype(part.dtype)) for part in slices]
        sizes = [share.plan.message_bytes for share in self.shares]
        if self.message.numel() != sum(sizes):
            raise WireError(f"a kept message has {self.message.numel()} bytes, expected {sum(sizes)}")
        for destination, (share, message) in enumerate(zip(self.shares, self.message.split(sizes), strict=True)):
            share.decode(message, self.stamp.context(0, self.source, destination), out, 1.0)
        return out


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


@dataclass(frozen=True)
class Piece:
    """Where a segment of a share lies in the whole plan: a range of the elements of one of its segments."""

    segment: int
    begin: int
    end: int

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[self.segment][self.begin : self.end]


@dataclass(frozen=True)
class Share:
    """A part of a plan with messages of its own."""

    plan: MessagePlan
    pieces: tuple[Piece, ...]
    codec: Codec

    def decode(self, message: torch.Tensor, context: MessageContext, out: Sequence[torch.Tensor], scale: float) -> None:
        """Decode one message into the share's place in the whole plan's tensors."""
        targets = [piece.of(out) for piece in self.pieces]
        wanted = [segment.slice.dtype for segment in self.plan.segments]
        if [target.dtype for target in targets] == wanted:
            self.codec.decode_mean([message], [context], out=targets, scale=scale)
            return
        for target, part in zip(targets, self.codec.decode_mean([message], [context], scale=scale), strict=True):
            target.copy_(part)


def pieces_of(plan: MessagePlan, share: MessagePlan) -> tuple[Piece, ...]:
    """Place of every segment of a share; both are in the same order."""
    pieces = []
    index = 0
    for segment in share.segments:
        part = segment.slice
        while not _contains(plan.segments[index].slice, part):
            index += 1
        begin = part.start - plan.segments[index].slice.start
        pieces.append(Piece(index, begin, begin + part.length))
    return tuple(pieces)


def replanned(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> MessagePlan:
    """The plan itself, or one of the same slices where the codebooks have other formats now."""
    if all(segment.format == codebooks[segment.slice.codebook].format for segment in plan.segments):
        return plan
    return MessagePlan.build([segment.slice for segment in plan.segments], codebooks)


def used_codebooks(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> dict[str, Codebook]:
    return {segment.slice.codebook: codebooks[segment.slice.codebook] for segment in plan.segments}


def _contains(whole: Slice, part: Slice) -> bool:
    inside = whole.start <= part.start and part.start + part.length <= whole.start + whole.length
    return whole.parameter == part.parameter and inside


def in_float32(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> MessagePlan:
    """The plan with 16-bit slices as float32; the codes take the same bytes."""
    slices = [segment.slice for segment in plan.segments]
    wide = [replace(part, dtype=wide_dtype(part.dtype)) for part in slices]
    return plan if wide == slices else MessagePlan.build(wide, codebooks)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def under_way(handle: Handle | None) -> Handle:
    if handle is None:
        raise QodaError("this exchange has no round under way: compress() comes before decompress()")
    return handle


def write_refusal(message: torch.Tensor, reason: str) -> None:
    """Fill a message with the reason why there is none."""
    text = (_REFUSAL + reason.encode())[: message.numel()]
    message.zero_()
    message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)


def check_not_refused(message: torch.Tensor, owner: int) -> None:
    """Raise RankMismatchError for a message that holds a refusal."""
    if message[: len(_REFUSAL)].numpy().tobytes() == _REFUSAL:
        reason = message[len(_REFUSAL) :].numpy().tobytes().rstrip(b"\0").decode(errors="replace")
        raise RankMismatchError(f"the rank at position {owner} refused what it received: {reason}")
