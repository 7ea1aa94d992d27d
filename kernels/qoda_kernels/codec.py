"""The codec of one message plan: gradients in, one message out; messages in, their mean out.

Messages and gradients are CPU tensors. Bits equal those of `reference.py`, for any number of threads.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels import cpu
from qoda_kernels.codebook import ROWS, Codebook
from qoda_kernels.dither import DitherKey
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Segment
from qoda_kernels.reference import rounding_table, signed_levels
from qoda_kernels.wire import Header, MessageContext, check_header, fold_checksum
from qoda_kernels.worker_threads import WorkerThreads

_KINDS = {torch.float32: cpu.FLOAT32, torch.float16: cpu.FLOAT16, torch.bfloat16: cpu.BFLOAT16}


_SMALLEST_PART = 32_768  # coordinates (or words of a checksum) for which another thread is worth its start


@dataclass(frozen=True)
class _Part:
    """A run of whole buckets of one segment: what one thread works on.

    Attributes:
        segment: index of the segment in the plan.
        first: first coordinate, in the slice.
        last: coordinate behind the last one.
        norms_begin: first byte of the norm words, counted from the message's start.
        norms_bytes: their size.
        codes_begin: first byte of the codes or raw values.
        codes_bytes: their size.
    """

    segment: int
    first: int
    last: int
    norms_begin: int
    norms_bytes: int
    codes_begin: int
    codes_bytes: int


@dataclass(frozen=True)
class _CodebookTables:
    """What the kernels need of a codebook."""

    codebook: Codebook
    rounding: cpu.KernelTable
    signed_levels: npt.NDArray[np.float32]


class Codec:
    """Encodes and decodes the messages of one plan with fixed codebooks; build a new one when levels change."""

    def __init__(
        self, plan: MessagePlan, codebooks: Mapping[str, Codebook], threads: WorkerThreads | None = None
    ) -> None:
        """Prepare the tables of the plan's codebooks.

        Args:
            plan: layout of the messages.
            codebooks: codebook of each key that the plan names.
            threads: what runs the kernels; by default the calling thread alone.

        Raises:
            PlanError: when a codebook's format is not the one that the plan was laid out for.
        """
        self.plan = plan
        self._threads = WorkerThreads(1) if threads is None else threads
        self._parts = [
            part
            for index, segment in enumerate(plan.segments)
            for part in _parts_of(index, segment, self._threads.count)
        ]
        used = {segment.slice.codebook: codebooks[segment.slice.codebook] for segment in plan.segments}
        for segment in plan.segments:
            found = used[segment.slice.codebook].format
            if found != segment.format:
                raise PlanError(
                    f"codebook {segment.slice.codebook!r} has {found}, but the plan was laid out for {segment.format}; "
                    "build a new plan"
                )
        self._tables = {
            key: _CodebookTables(codebook, cpu.kernel_table(rounding_table(codebook)), signed_levels(codebook))
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
        self._threads.run(lambda part: self._encode_part(part, values, key, data), self._parts)
        header = Header.expected(self._digest, context, self.plan.payload_bytes, self._checksum(data))
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
        # Kernels write float32; 16-bit results are rounded from it.
        wide = [torch.empty(r.shape, dtype=torch.float32) if r.dtype.itemsize == 2 else r for r in out]
        self._threads.run(lambda part: self._decode_part(part, messages, factor, wide), self._parts)
        for result, found in zip(out, wide, strict=True):
            if result.dtype == torch.bfloat16:
                cpu.round_to_bfloat16(found.numpy(), result.detach().view(torch.uint16).numpy())
            elif found is not result:
                result.copy_(found)
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

    def _encode_part(
        self, part: _Part, tensors: Sequence[torch.Tensor], key: DitherKey, data: npt.NDArray[np.uint8]
    ) -> None:
        segment = self.plan.segments[part.segment]
        data[segment.codes_begin + segment.codes_bytes : segment.end] = 0
        codes = data[part.codes_begin : part.codes_begin + part.codes_bytes]
        values = tensors[part.segment].detach()[part.first : part.last]
        if segment.format.is_exact:
            codes[:] = values.view(torch.uint8).numpy()
            return
        tables = self._tables[segment.slice.codebook]
        kind = _KINDS[values.dtype]
        array = values.numpy() if kind == cpu.FLOAT32 else values.view(torch.uint16).numpy()
        norms = data[part.norms_begin : part.norms_begin + part.norms_bytes]
        coordinate = segment.slice.coordinate + part.first
        cpu.quantize(array, kind, tables.codebook, tables.rounding, coordinate, key, norms, codes)

    def _decode_part(
        self, part: _Part, messages: Sequence[torch.Tensor], factor: np.float32, results: Sequence[torch.Tensor]
    ) -> None:
        segment = self.plan.segments[part.segment]
        result = results[part.segment].detach()[part.first : part.last]
        if segment.format.is_exact:
            _sum_exact(part, messages, factor, segment.slice.dtype, result)
            return
        tables = self._tables[segment.slice.codebook]
        addresses = np.array([message.data_ptr() for message in messages], dtype=np.uint64)
        cpu.decode_mean(
            addresses,
            part.norms_begin,
            part.codes_begin,
            part.codes_bytes,
            tables.codebook,
            tables.signed_levels,
            factor,
            result.numpy(),
        )

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
        expected = Header.expected(self._digest, context, self.plan.payload_bytes, self._checksum(data))
        check_header(data[:HEADER_BYTES].tobytes(), expected, source)

    def _checksum(self, message: npt.NDArray[np.uint8]) -> int:
        """Checksum of a message's payload."""
        words = message[HEADER_BYTES:].view(np.uint32)
        sums: list[tuple[int, int]] = []

        def add(bounds: tuple[int, int]) -> None:
            total, weighted = cpu.word_sums(words[bounds[0] : bounds[1]], bounds[0] + 1)
            sums.append((int(total), int(weighted)))

        pieces = min(self._threads.count, 1 + words.size // _SMALLEST_PART)
        cuts = [words.size * index // pieces for index in range(pieces + 1)]
        self._threads.run(add, list(pairwise(cuts)))
        return fold_checksum(sum(total for total, _ in sums), sum(weighted for _, weighted in sums))


def _parts_of(index: int, segment: Segment, threads: int) -> list[_Part]:
    """A segment cut into one run of whole buckets per thread, or fewer where it is small; none where it is empty."""
    length, bucket_size = segment.slice.length, segment.format.bucket_size
    if segment.format.is_exact:
        return [_Part(index, 0, length, segment.begin, 0, segment.codes_begin, segment.codes_bytes)] if length else []
    count = min(threads, segment.buckets, 1 + length // _SMALLEST_PART)
    cuts = [segment.buckets * number // count for number in range(count + 1)] if count else []
    bucket_codes = bucket_size // ROWS * segment.format.bits
    parts = []
    for begin, end in pairwise(cuts):
        norms_begin = segment.begin + begin * segment.format.norm_bytes
        codes_begin = segment.codes_begin + begin * bucket_codes
        codes_end = min(segment.codes_begin + end * bucket_codes, segment.codes_begin + segment.codes_bytes)
        first, last = begin * bucket_size, min(end * bucket_size, length)
        norms_bytes = (end - begin) * segment.format.norm_bytes
        parts.append(_Part(index, first, last, norms_begin, norms_bytes, codes_begin, codes_end - codes_begin))
    return parts


def _sum_exact(
    part: _Part, messages: Sequence[torch.Tensor], factor: np.float32, dtype: torch.dtype, result: torch.Tensor
) -> None:
    """Sum of an exact slice over the messages, in rank order, in the precision of the result."""
    end = part.codes_begin + part.codes_bytes
    values = [message[part.codes_begin : end].clone().view(dtype).to(result.dtype) for message in messages]
    total = values[0]
    for value in values[1:]:
        total = total + value
    result.copy_(total * float(factor))
