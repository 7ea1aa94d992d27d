"""Shares of a plan: the parts that have messages of their own, and what every exchange does with them.

An all-gather's plan is one share; a reduce-scatter has as many as ranks, and a message for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hvd_qoda.errors import QodaError, RankMismatchError, WireError
from hvd_qoda.gradient_codec import GradientCodec
from hvd_qoda.traffic import all_gather_bytes, all_to_all_bytes
from hvd_qoda.transport import Handle, Transport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.wire import MessageContext

_REFUSAL = b"REFUSED"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Stamp:
    """What all messages of one step have in common.

    Attributes:
        seed: the user's seed.
        counter: number of the exchange, counted over the whole training.
        registry_version: version of the codebooks.
        dither: "independent" or "stratified" random numbers of the ranks whose messages are averaged.
        rotations: "common" to these ranks, or "separate" ones.
    """

    seed: int
    counter: int
    registry_version: int
    dither: str = "independent"
    rotations: str = "common"

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
        key = self.seed, self.counter, source, phase, version, source, destination
        return MessageContext(*key, strata, self.rotations)


@dataclass(frozen=True)
class SegmentRange:
    """Where a segment of a share lies in the whole plan: a range of the elements of one of its segments."""

    segment: int
    begin: int
    end: int

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The range of the whole plan's tensors, a view."""
        return tensors[self.segment][self.begin : self.end]


@dataclass(frozen=True)
class Share:
    """A part of a plan with messages of its own."""

    plan: MessagePlan
    pieces: tuple[SegmentRange, ...]
    codec: GradientCodec

    def decode_mean(
        self,
        messages: Sequence[torch.Tensor],
        stamp: Stamp,
        destination: int,
        out: Sequence[torch.Tensor],
        scale: float,
    ) -> None:
        """Decode the mean, times `scale`, of all ranks' messages of the first phase to this share.

        Args:
            messages: in the order of the ranks.
            stamp: of the step.
            destination: this share's index.
            out: contiguous 1-D tensors, one per segment of the share; written.
            scale: factor of the mean.

        Raises:
            WireError: when a message is damaged or not the expected one.
            RankMismatchError: when another rank refused.
        """
        for source, message in enumerate(messages):
            check_not_refused(message, source)
        contexts = [stamp.context(0, source, destination) for source in range(len(messages))]
        self.codec.decode_mean(messages, contexts, out=out, scale=scale / len(messages))

    def decode(self, message: torch.Tensor, context: MessageContext, out: Sequence[torch.Tensor], scale: float) -> None:
        """Decode one message into the share's place in the whole plan's tensors."""
        targets = [piece.of(out) for piece in self.pieces]
        wanted = [segment.slice.dtype for segment in self.plan.segments]
        if [target.dtype for target in targets] == wanted:
            self.codec.decode_mean([message], [context], out=targets, scale=scale)
            return
        parts = empty_tensors(self.plan, targets[0].device)
        for target, part in zip(targets, self.codec.decode_mean([message], [context], parts, scale), strict=True):
            target.copy_(part)


class Shares:
    """The shares of a plan, one for each rank, and this rank's messages to their owners, end to end in one buffer.

    Args:
        shares: in the order of the ranks' positions.
        transport: the ranks.
    """

    def __init__(self, shares: Sequence[Share], transport: Transport) -> None:
        self.shares = tuple(shares)
        self.own = self.shares[transport.rank]
        self.sizes = [share.plan.message_bytes for share in shares]
        self.messages = empty_message(sum(self.sizes))
        self._transport = transport

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this rank when its messages go to the owners."""
        return all_to_all_bytes(self.sizes, self._transport.rank)

    def encode(self, values: Sequence[torch.Tensor], stamp: Stamp, ranks: int = 1) -> None:
        """Encode a message for every owner.

        Args:
            values: one contiguous 1-D tensor per segment of the whole plan.
            stamp: of the step.
            ranks: see `Stamp.context`.
        """
        for owner, (share, message) in enumerate(zip(self.shares, self.messages.split(self.sizes), strict=True)):
            parts = [piece.of(values) for piece in share.pieces]
            share.codec.encode(parts, stamp.context(0, self._transport.rank, owner, ranks), out=message)

    def refuse(self, reason: str) -> None:
        """Write to every owner why there is no message."""
        for message in self.messages.split(self.sizes):
            write_refusal(message, reason)

    def send(self, name: str) -> Handle:
        """Start the all-to-all that takes every owner its message from every rank."""
        received = [self.sizes[self._transport.rank]] * self._transport.size
        return self._transport.start_all_to_all(self.messages, self.sizes, received, name)

    def decode_own_mean(
        self, received: Sequence[torch.Tensor], stamp: Stamp, out: Sequence[torch.Tensor], scale: float = 1.0
    ) -> None:
        """Decode the mean of what all ranks have sent this one; see `Share.decode_mean`."""
        self.own.decode_mean(received, stamp, self._transport.rank, out, scale)

    def decode_means(
        self, received: Sequence[torch.Tensor], stamp: Stamp, out: Sequence[torch.Tensor], scale: float
    ) -> None:
        """Decode what every owner has sent in the second phase into the whole plan's tensors.

        Raises:
            WireError: when a message is damaged or not the expected one.
            RankMismatchError: when an owner refused.
        """
        for owner, (share, message) in enumerate(zip(self.shares, received, strict=True)):
            check_not_refused(message, owner)
            share.decode(message, stamp.context(1, owner, owner), out, scale)


class OwnMean:
    """The mean of the share that this rank owns, and the message with it to everybody: the second phase.

    Args:
        shares: the plan's.
        transport: the ranks.
    """

    def __init__(self, shares: Shares, transport: Transport) -> None:
        self.values = empty_tensors(shares.own.plan)
        self._message = empty_message(shares.own.plan.message_bytes)
        self._shares = shares
        self._transport = transport

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this rank when its message goes to everybody."""
        return all_gather_bytes(self._message.numel(), self._transport.size)

    def lie_beside(self, values: Sequence[torch.Tensor]) -> None:
        """Move the room for the mean to the device where the gradients are."""
        if self.values and values and self.values[0].device != values[0].device:
            self.values = [torch.empty_like(tensor, device=values[0].device) for tensor in self.values]

    def decode(self, received: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """Form the mean of what all ranks have sent this one; see `Share.decode_mean`."""
        self._shares.decode_own_mean(received, stamp, self.values)

    def encode(self, stamp: Stamp) -> None:
        """Write the mean into the message."""
        place = self._transport.rank
        self._shares.own.codec.encode(self.values, stamp.context(1, place, place), out=self._message)

    def refuse(self, reason: str) -> None:
        """Write into the message why there is no mean."""
        write_refusal(self._message, reason)

    def send(self, name: str) -> Handle:
        """Start the all-gather of all owners' messages."""
        return self._transport.start_all_gather(self._message, self._shares.sizes, name)


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
    shares: tuple[Share, ...]
    codebooks: Mapping[str, Codebook]

    def decode(self, device: torch.device = _CPU) -> list[torch.Tensor]:
        """The quantized gradient: one tensor per segment of the plan, in float32 (float64 where the slice is).

        Args:
            device: where the tensors are to lie.

        Raises:
            WireError: if the bytes are damaged.
        """
        slices = [segment.slice for segment in self.plan.segments]
        out = [torch.empty(part.length, dtype=wide_dtype(part.dtype), device=device) for part in slices]
        sizes = [share.plan.message_bytes for share in self.shares]
        if self.message.numel() != sum(sizes):
            raise WireError(f"a kept message has {self.message.numel()} bytes, expected {sum(sizes)}")
        for destination, (share, message) in enumerate(zip(self.shares, self.message.split(sizes), strict=True)):
            share.decode(message, self.stamp.context(0, self.source, destination), out, 1.0)
        return out


def pieces_of(plan: MessagePlan, share: MessagePlan) -> tuple[SegmentRange, ...]:
    """Place of every segment of a share; both are in the same order."""
    pieces = []
    index = 0
    for segment in share.segments:
        part = segment.slice
        while not _contains(plan.segments[index].slice, part):
            index += 1
        begin = part.start - plan.segments[index].slice.start
        pieces.append(SegmentRange(index, begin, begin + part.length))
    return tuple(pieces)


def replanned(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> MessagePlan:
    """The plan itself, or one of the same slices where the codebooks have other formats now."""
    if all(segment.format == codebooks[segment.slice.codebook].format for segment in plan.segments):
        return plan
    return MessagePlan.build([segment.slice for segment in plan.segments], codebooks)


def used_codebooks(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> dict[str, Codebook]:
    """The codebooks that a plan's segments name."""
    return {segment.slice.codebook: codebooks[segment.slice.codebook] for segment in plan.segments}


def _contains(whole: Slice, part: Slice) -> bool:
    inside = whole.start <= part.start and part.start + part.length <= whole.start + whole.length
    return whole.parameter == part.parameter and inside


def in_float32(plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> MessagePlan:
    """The plan with 16-bit slices as float32; the codes take the same bytes."""
    slices = [segment.slice for segment in plan.segments]
    wide = [replace(part, dtype=wide_dtype(part.dtype)) for part in slices]
    return plan if wide == slices else MessagePlan.build(wide, codebooks)


def empty_tensors(plan: MessagePlan, device: torch.device = _CPU) -> list[torch.Tensor]:
    """One tensor per segment, of its dtype, on a device, with arbitrary contents."""
    return [torch.empty(segment.slice.length, dtype=segment.slice.dtype, device=device) for segment in plan.segments]


def empty_message(size: int) -> torch.Tensor:
    """Host memory for so many bytes of messages; page-locked where the process uses CUDA, for fast copies."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_initialized())


def with_dtypes_of(plan: MessagePlan, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, converted where a segment of the plan has another dtype."""
    return [tensor.to(segment.slice.dtype) for tensor, segment in zip(values, plan.segments, strict=True)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16-bit floats, else the dtype itself."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def under_way(handle: Handle | None) -> Handle:
    """The handle of a round that has been started; QodaError if there is none."""
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
