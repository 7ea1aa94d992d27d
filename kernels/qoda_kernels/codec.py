"""The codec of one message plan: gradients in, one message out; messages in, their mean out.

Messages and gradients are CPU tensors. Bits equal those of `reference.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels import cpu
from qoda_kernels.codebook import Codebook
from qoda_kernels.dither import DitherKey
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Segment
from qoda_kernels.reference import RoundingTable, rounding_table, signed_levels
from qoda_kernels.wire import Header, MessageContext, check_header, fold_checksum

_KINDS = {torch.float32: cpu.FLOAT32, torch.float16: cpu.FLOAT16, torch.bfloat16: cpu.BFLOAT16}


@dataclass(frozen=True)
class _CodebookTables:
    """What the kernels need of a codebook."""

    codebook: Codebook
    rounding: RoundingTable
    signed_levels: npt.NDArray[np.float32]


class Codec:
    """Encodes and decodes the messages of one plan with fixed codebooks; build a new one when levels change."""

    def __init__(self, plan: MessagePlan, codebooks: Mapping[str, Codebook]) -> None:
        """Prepare the tables of the plan's codebooks.

        Args:
            plan: layout of the messages.
            codebooks: codebook of each key that the plan names.

        Raises:
            PlanError: when a codebook's format is not the one that the plan was laid out for.
        """
        self.plan = plan
        used = {segment.slice.codebook: codebooks[segment.slice.codebook] for segment in plan.segments}
        for segment in plan.segments:
            found = used[segment.slice.codebook].format
            if found != segment.format:
                raise PlanError(
                    f"codebook {segment.slice.codebook!r} has {found}, but the plan was laid out for {segment.format}; "
                    "build a new plan"
                )
        self._tables = {
            key: _CodebookTables(codebook, rounding_table(codebook), signed_levels(codebook))
            for key, codebook in used.items()
            if not codebook.is_exact
        }
        digest = hashlib.blake2b(plan.digest, digest_size=8)
        for key in sorted(used):
            digest.update(used[key].digest)
        self._digest = digest.digest()

    def encode(
        self, values: Sequence[torch.Tensor], context: MessageContext, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode one tensor per segment into one message.

        Args:
            values: contiguous 1-D CPU tensors with the slices' dtypes and lengths.
            context: identifies the message and selects the random numbers.
            out: uint8 [message_bytes] to write into; a new tensor by default.

        Returns:
            uint8 [message_bytes].

        Raises:
            PlanError: when the tensors do not fit the plan.
        """
        self._check_tensors(values)
        message = torch.empty(self.plan.message_bytes, dtype=torch.uint8) if out is None else out
        if message.shape != (self.plan.message_bytes,) or message.dtype != torch.uint8 or not message.is_contiguous():
            raise PlanError(f"the message buffer must be contiguous uint8 [{self.plan.message_bytes}]")
        key = DitherKey.derive(context.seed, context.counter, context.rank, context.phase)
        data = message.numpy()
        for segment, tensor in zip(self.plan.segments, values, strict=True):
            self._encode_segment(segment, tensor, key, data)
        header = Header.expected(self._digest, context, self.plan.payload_bytes, _checksum(data))
        data[:HEADER_BYTES] = np.frombuffer(header.pack(), dtype=np.uint8)
        return message

    def decode_mean(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        out: Sequence[torch.Tensor] | None = None,
        scale: float | None = None,
    ) -> list[torch.Tensor]:
        """Decode several messages of the plan and combine them: sum in the order given, in float32, times a scale.

        The result does not depend on who computes it. Float64 slices are summed in float64.

        Args:
            messages: contiguous uint8 CPU tensors [message_bytes], one per sender.
            contexts: what each message must be; seed and rank are not needed to decode.
            out: contiguous 1-D tensors with the slices' dtypes and lengths to write into; new ones by default.
            scale: factor of the sum; by default 1 / number of messages.

        Raises:
            WireError: when a message is damaged or not the expected one.
            PlanError: when `out` does not fit the plan.
        """
        if not messages or len(messages) != len(contexts):
            raise PlanError(
                f"{len(messages)} messages and {len(contexts)} contexts; there must be one context a message"
            )
        for message, context in zip(messages, contexts, strict=True):
            self._check_message(message, context)
        if out is None:
            out = [torch.empty(s.slice.length, dtype=s.slice.dtype) for s in self.plan.segments]
        self._check_tensors(out)
        factor = np.float32(1.0 / len(messages) if scale is None else scale)
        for segment, result in zip(self.plan.segments, out, strict=True):
            if segment.format.is_exact:
                _sum_exact(segment, messages, factor, result)
            else:
                self._decode_segment(segment, messages, factor, result)
        return list(out)

    def _check_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self.plan.segments):
            raise PlanError(f"{len(tensors)} tensors for a plan of {len(self.plan.segments)} segments")
        for segment, tensor in zip(self.plan.segments, tensors, strict=True):
            wanted = segment.slice
            if tensor.shape != (wanted.length,) or tensor.dtype != wanted.dtype or not tensor.is_contiguous():
                raise PlanError(
                    f"parameter {wanted.parameter!r}: the plan has a contiguous {wanted.dtype} [{wanted.length}], "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.device.type != "cpu":
                raise PlanError(
                    f"parameter {wanted.parameter!r} is on {tensor.device}; this codec works on CPU tensors"
                )

    def _encode_segment(
        self, segment: Segment, tensor: torch.Tensor, key: DitherKey, data: npt.NDArray[np.uint8]
    ) -> None:
        codes = data[segment.codes_begin : segment.codes_begin + segment.codes_bytes]
        data[segment.codes_begin + segment.codes_bytes : segment.end] = 0
        tensor = tensor.detach()
        if not segment.slice.length:
            return
        if segment.format.is_exact:
            codes[:] = tensor.view(torch.uint8).numpy()
            return
        tables = self._tables[segment.slice.codebook]
        norms = data[segment.begin : segment.codes_begin]
        kind = _KINDS[tensor.dtype]
        values = tensor.numpy() if kind == cpu.FLOAT32 else tensor.view(torch.uint16).numpy()
        cpu.quantize(values, kind, tables.codebook, tables.rounding, segment.slice.coordinate, key, norms, codes)

    def _check_message(self, message: torch.Tensor, context: MessageContext) -> None:
        source = context.source
        if message.shape != (self.plan.message_bytes,) or message.dtype != torch.uint8:
            raise WireError(
                f"message from source {source} is {message.dtype} {list(message.shape)}, expected uint8 "
                f"[{self.plan.message_bytes}]; the ranks disagree on the model or on its codebooks"
            )
        if message.device.type != "cpu" or not message.is_contiguous():
            raise WireError(f"message from source {source} must be a contiguous CPU tensor")
        data = message.numpy()
        expected = Header.expected(self._digest, context, self.plan.payload_bytes, _checksum(data))
        check_header(data[:HEADER_BYTES].tobytes(), expected, source)

    def _decode_segment(
        self, segment: Segment, messages: Sequence[torch.Tensor], factor: np.float32, result: torch.Tensor
    ) -> None:
        tables = self._tables[segment.slice.codebook]
        addresses = np.array([message.data_ptr() for message in messages], dtype=np.uint64)
        target = result if result.dtype == torch.float32 else torch.empty(result.shape, dtype=torch.float32)
        cpu.decode_mean(
            addresses,
            segment.begin,
            segment.codes_begin,
            segment.codes_bytes,
            tables.codebook,
            tables.signed_levels,
            factor,
            target.detach().numpy(),
        )
        if target is not result:
            result.copy_(target)


def _sum_exact(segment: Segment, messages: Sequence[torch.Tensor], factor: np.float32, result: torch.Tensor) -> None:
    """Sum of an exact slice over the messages, in rank order, in float32 (float64 for float64 slices)."""
    wide = torch.float64 if result.dtype == torch.float64 else torch.float32
    begin, end = segment.codes_begin, segment.codes_begin + segment.codes_bytes
    parts = [message[begin:end].clone().view(result.dtype).to(wide) for message in messages]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    result.copy_(total * float(factor))


def _checksum(message: npt.NDArray[np.uint8]) -> int:
    """Checksum of a message's payload."""
    word_sum, weighted_sum = cpu.word_sums(message[HEADER_BYTES:].view(np.uint32))
    return fold_checksum(int(word_sum), int(weighted_sum))
