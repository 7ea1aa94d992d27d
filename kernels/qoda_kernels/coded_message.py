"""Entropy-coded messages: a message of fixed size, as `layout.py` lays it out, to a shorter one and back.

    bytes 0-31    header, the caller's: not read, and written only as a copy
    segments      one behind the other, each 16-byte aligned: the norm words as they are, then the coded slice;
                  segments without a code and those with few codes are copied as they are
    zeros         up to the next of a few sizes (`entropy.padded_size`)

Which segments are coded follows from the plan; how many bytes they take does not.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.entropy import huffman, padded_size
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import HEADER_BYTES, SEGMENT_ALIGNMENT, MessagePlan, Segment
from qoda_kernels.wire import FLAG_CODED, MessageContext

ByteArray = npt.NDArray[np.uint8]

SMALLEST_CODED_BYTES = 256  # of packed codes: below it, directory and padding would eat up the gain


class CodeOfSlices(Protocol):
    """What codes the slices of one layer type: `entropy.SliceCode` or `ans.AnsCode`."""

    @property
    def bits(self) -> int:
        """Code width."""
        ...

    @property
    def digest(self) -> bytes:
        """Eight bytes that differ when the code differs."""
        ...

    def maximum_bytes(self, packed_bytes: int) -> int:
        """Most bytes of a slice with so many bytes of packed codes."""
        ...

    def encode(self, packed: ByteArray, lanes: int, out: ByteArray) -> int:
        """Write the coded slice; returns its bytes."""
        ...

    def decode(self, data: ByteArray, lanes: int, packed: ByteArray) -> int:
        """Read the coded slice with which `data` begins; returns its bytes, or raises WireError."""
        ...


class MessageCoder:
    """Shortens the messages of one plan, and restores them."""

    def __init__(self, plan: MessagePlan, codes: Mapping[str, CodeOfSlices]) -> None:
        """Match segments with codes.

        Args:
            plan: layout of the messages.
            codes: code of each codebook key; segments of other keys, and exact ones, are copied.

        Raises:
            PlanError: when a code has another width than the segments of its key.
        """
        self.plan = plan
        self._codes = [_code_of(segment, codes) for segment in plan.segments]

    @property
    def maximum_bytes(self) -> int:
        """Most bytes that a coded message can have: the size of `encode`'s output buffer."""
        size = HEADER_BYTES
        for segment, code in zip(self.plan.segments, self._codes, strict=True):
            size += segment.end - segment.begin
            if code is not None:
                size += code.maximum_bytes(segment.codes_bytes) + SEGMENT_ALIGNMENT
        return padded_size(size)

    def encode(self, message: ByteArray, out: ByteArray) -> int:
        """Shorten a message.

        Args:
            message: uint8 [plan.message_bytes].
            out: uint8 [maximum_bytes] or more, written.

        Returns:
            Bytes of the coded message, one of a few sizes; zeros that pad it included.

        Raises:
            PlanError: when the buffers do not fit.
        """
        if message.size != self.plan.message_bytes or out.size < self.maximum_bytes:
            raise PlanError(
                f"a message of {self.plan.message_bytes} bytes is coded into at most {self.maximum_bytes}; "
                f"got buffers of {message.size} and {out.size}"
            )
        out[:HEADER_BYTES] = message[:HEADER_BYTES]
        position = HEADER_BYTES
        for segment, code in zip(self.plan.segments, self._codes, strict=True):
            copied = message[segment.begin : segment.end if code is None else segment.codes_begin]
            out[position : position + copied.size] = copied
            used = position + copied.size
            if code is not None:
                packed = message[segment.codes_begin : segment.codes_begin + segment.codes_bytes]
                used += code.encode(packed, segment.format.lanes, out[used:])
            position = used + -used % SEGMENT_ALIGNMENT
            out[used:position] = 0
        size = padded_size(position)
        out[position:size] = 0
        return size

    def decode(self, coded: ByteArray, message: ByteArray) -> None:
        """Restore a message; minus zeros have become zeros.

        Args:
            coded: uint8, what `encode` wrote, and perhaps more zeros.
            message: uint8 [plan.message_bytes], written; of no use after an error.

        Raises:
            WireError: when the bytes are no coded message of this plan.
            PlanError: when `message` has another size than the plan's.
        """
        if message.size != self.plan.message_bytes:
            raise PlanError(f"the plan's messages have {self.plan.message_bytes} bytes; got a buffer of {message.size}")
        _check_room(coded, 0, HEADER_BYTES)
        message[:HEADER_BYTES] = coded[:HEADER_BYTES]
        position = HEADER_BYTES
        for segment, code in zip(self.plan.segments, self._codes, strict=True):
            copied = message[segment.begin : segment.end if code is None else segment.codes_begin]
            _check_room(coded, position, copied.size)
            copied[:] = coded[position : position + copied.size]
            used = position + copied.size
            if code is not None:
                codes_end = segment.codes_begin + segment.codes_bytes
                used += code.decode(coded[used:], segment.format.lanes, message[segment.codes_begin : codes_end])
                message[codes_end : segment.end] = 0
            position = used + -used % SEGMENT_ALIGNMENT
            _check_room(coded, used, position - used)
            if coded[used:position].any():
                raise WireError("a coded message holds something between two segments")
        if coded[position:].any():
            raise WireError("a coded message holds something behind its last segment")


class CodedMessages:
    """The messages of a codec, shortened for the wire by the codes that its codebooks carry, and checked on arrival.

    A coded message has a header of its own, with FLAG_CODED, and a checksum of the coded bytes. Coding that does not
    make a message shorter is left: the message travels as it is, and is told by its size.
    """

    def __init__(self, codec: Codec, codebooks: Mapping[str, Codebook]) -> None:
        """Build the codes.

        Args:
            codec: of the messages.
            codebooks: its codebooks; slices of those without weights are copied.
        """
        self._codec = codec
        used = {segment.slice.codebook for segment in codec.plan.segments}
        codes = {key: huffman(codebooks[key].bits, codebooks[key].weights) for key in used if codebooks[key].weights}
        self._coder = MessageCoder(codec.plan, codes)

    @property
    def maximum_bytes(self) -> int:
        """Size of the buffer that `shorten` needs."""
        return max(self._coder.maximum_bytes, self._codec.plan.message_bytes)

    def shorten(self, message: torch.Tensor, context: MessageContext, out: torch.Tensor) -> int:
        """Code a message; returns the bytes to send, at most those of the message.

        Args:
            message: uint8 [plan.message_bytes], from `Codec.encode`.
            context: of the message.
            out: uint8 [maximum_bytes], written.
        """
        size = self._coder.encode(message.numpy(), out.numpy())
        if size >= message.numel():
            out[: message.numel()] = message
            return message.numel()
        self._codec.seal(out[:size], context, FLAG_CODED)
        return size

    def restore(self, coded: torch.Tensor, context: MessageContext, out: torch.Tensor) -> torch.Tensor:
        """The message that `Codec.decode_mean` takes.

        Args:
            coded: uint8, as received.
            context: what the message must be.
            out: uint8 [plan.message_bytes], written unless the message travelled as it is.

        Returns:
            `out`, or `coded` itself.

        Raises:
            WireError: when the message is damaged or not the expected one.
        """
        if coded.numel() == self._codec.plan.message_bytes:
            return coded
        self._codec.check_seal(coded, context, FLAG_CODED)
        self._coder.decode(coded.numpy(), out.numpy())
        self._codec.seal(out, context)
        return out


def _code_of(segment: Segment, codes: Mapping[str, CodeOfSlices]) -> CodeOfSlices | None:
    code = codes.get(segment.slice.codebook)
    if code is None or segment.format.is_exact or segment.codes_bytes < SMALLEST_CODED_BYTES:
        return None
    if code.bits != segment.format.bits:
        raise PlanError(
            f"codebook {segment.slice.codebook!r} has {segment.format.bits} bits, but its entropy code has {code.bits}"
        )
    return code


def _check_room(coded: ByteArray, begin: int, size: int) -> None:
    if begin + size > coded.size:
        raise WireError(f"a coded message of {coded.size} bytes ends before byte {begin + size}")
