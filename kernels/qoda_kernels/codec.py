"""The codec of one message plan: gradients in, one message out; messages in, their mean out.

Messages and gradients are CPU tensors. Bits equal those of `reference.py`, for any number of threads.

What can be known before is prepared once: the segments, cut into shares of equal size for the threads, are grouped by
codebook and dtype, and each group is one call of a kernel. So a call of `encode` or `decode_mean` costs a few
microseconds and what the kernels need, for one segment as for hundreds.
"""

import ctypes
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels import tasks
from qoda_kernels.codebook import ROWS, Codebook
from qoda_kernels.cpu import arguments
from qoda_kernels.cpu.decoding import decoder
from qoda_kernels.cpu.encoding import encoder
from qoda_kernels.cpu.exact import exact_decoder, exact_encoder
from qoda_kernels.cpu.level_tables import KernelTable, kernel_table
from qoda_kernels.cpu.rotated import rotated_decoder, rotated_encoder
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.fastest_method import look_up_way, search_method
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Segment
from qoda_kernels.reference import rounding_table, signed_levels
from qoda_kernels.tasks import (
    TaskRow,
    TaskTable,
    check_context,
    check_task,
    decode_context,
    decode_task,
    encode_context,
    encode_task,
    float32_bits,
    sum_task,
)
from qoda_kernels.wire import Header, HeaderWords, MessageContext, check_header, header_words, message_digest
from qoda_kernels.worker_threads import WorkerThreads

_KINDS = {
    torch.float32: arguments.FLOAT32,
    torch.float16: arguments.FLOAT16,
    torch.bfloat16: arguments.BFLOAT16,
    torch.float64: arguments.FLOAT64,
}
_SMALLEST_SHARE = 16_384  # coordinates that are worth a call of a kernel on their own
_SHARES_PER_THREAD = 8  # so that a thread that comes late, or is slow, delays the others little
_SMALLEST_SUMMED_SHARE = 2**19  # bytes of a payload, likewise: sums go at many gigabytes a second


@dataclass(frozen=True)
class _Group:
    """Parts of one share that one call of a kernel works on: all of one codebook and one dtype.

    Attributes:
        codebook: its key.
        dtype: of the tensors.
        parts: int64 [n, arguments.PART_FIELDS].
    """

    codebook: str
    dtype: torch.dtype
    parts: npt.NDArray[np.int64]


class Codec:
    """Encodes and decodes the messages of one plan with fixed codebooks; build a new one when levels change."""

    def __init__(
        self, plan: MessagePlan, codebooks: Mapping[str, Codebook], threads: WorkerThreads | None = None
    ) -> None:
        """Take over a plan; kernels are looked up at the first encode and decode.

        Args:
            plan: layout of the messages.
            codebooks: codebook of each key that the plan names.
            threads: what runs the kernels; by default the calling thread alone.

        Raises:
            PlanError: when a codebook's format is not the one that the plan was laid out for.
        """
        self.plan = plan
        self._threads = WorkerThreads(1) if threads is None else threads
        self._codebooks = {segment.slice.codebook: codebooks[segment.slice.codebook] for segment in plan.segments}
        for segment in plan.segments:
            found = self._codebooks[segment.slice.codebook].format
            if found != segment.format:
                raise PlanError(
                    f"codebook {segment.slice.codebook!r} has {found}, but the plan was laid out for {segment.format}; "
                    "build a new plan"
                )
        self._wanted = [(segment.slice.length, segment.slice.dtype) for segment in plan.segments]
        self._forms = [_contiguous(*wanted) for wanted in self._wanted]
        self._message_form = _contiguous(plan.message_bytes, torch.uint8)
        self._encode_tables: dict[bool, TaskTable] = {}
        digest = hashlib.blake2b(plan.digest, digest_size=8)
        for key in sorted(self._codebooks):
            digest.update(self._codebooks[key].digest)
        self._digest = digest.digest()
        self._rotates = any(book.rotation != "none" for book in self._codebooks.values())
        self._message_digests: dict[tuple[int, int, int], int] = {}

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
        message = torch.empty(self.plan.message_bytes, dtype=torch.uint8, device="cpu") if out is None else out
        if _form(message) != self._message_form:
            raise PlanError(f"the message buffer must be a contiguous CPU uint8 [{self.plan.message_bytes}]")
        key = context.key()
        rotation = context.rotation_key().packed if self._rotates else 0
        is_stratified = key.strata > 1
        table = self._encode_tables.get(is_stratified) or self._encoders(is_stratified)
        addresses = [tensor.data_ptr() for tensor in values]
        words = encode_context(
            table, message.data_ptr(), key.packed, rotation, self._words_of_header(context), addresses
        )
        self._threads.run(encode_task(), words, table.count)
        return message

    def decode_mean(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        out: Sequence[torch.Tensor] | None = None,
        scale: float | None = None,
    ) -> list[torch.Tensor]:
        """Decode several messages of the plan and combine them: sum in the order given, in float32, times a scale.

        Messages with different rotations are decoded one by one, to the slices' dtypes, before they are summed.
        The result does not depend on who computes it. Float64 slices are summed in float64.

        Args:
            messages: contiguous uint8 CPU tensors [message_bytes], one per sender.
            contexts: what each message must be; the seed is needed only to rotate back, the rank only from a rotation
                of its own.
            out: contiguous 1-D tensors with the slices' dtypes and lengths to write into; new ones by default.
            scale: factor of the sum; by default 1 / number of messages.

        Raises:
            WireError: when a message is damaged or not the expected one.
            PlanError: when `out` does not fit the plan, or messages of several exchanges are rotated.
        """
        if not messages or len(messages) != len(contexts):
            raise PlanError(
                f"{len(messages)} messages and {len(contexts)} contexts; there must be one context a message"
            )
        self._check_messages(messages, contexts)
        results = self._new_results() if out is None else list(out)
        self._check_tensors(results)
        factor = 1.0 / len(messages) if scale is None else scale
        if self._rotates and not have_one_rotation(contexts):
            room = [torch.empty_like(result) for result in results]
            pairs = zip(messages, contexts, strict=True)
            decoded = (self._decoded([message], [context], 1.0, room) for message, context in pairs)
            return combined(decoded, factor, results)
        return self._decoded(messages, contexts, factor, results)

    def _decoded(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        scale: float,
        out: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Sum of checked messages that have one rotation, times a scale."""
        results = self._new_results() if out is None else out
        factor = float32_bits(scale)
        rotation = contexts[0].rotation_key().packed if self._rotates else 0
        received, written = [[tensor.data_ptr() for tensor in tensors] for tensors in (messages, results)]
        words = decode_context(self._decoders, received, written, factor, rotation)
        self._threads.run(decode_task(), words, self._decoders.count)
        return results

    def seal(self, message: torch.Tensor, context: MessageContext, flags: int = 0) -> None:
        """Write the header that belongs to a payload which others have written.

        Args:
            message: contiguous uint8 CPU tensor of any size, the header's bytes included.
            context: identifies the message.
            flags: of the header.
        """
        begin = message.data_ptr()
        ctypes.memmove(begin, self._expected(message, context, flags).pack(), HEADER_BYTES)

    def check_seal(self, message: torch.Tensor, context: MessageContext, flags: int = 0) -> None:
        """Compare a message's header with what `seal` would write.

        Raises:
            WireError: naming the first field that differs; also for a message without room for a header.
        """
        if message.numel() < HEADER_BYTES:
            raise WireError(f"message from source {context.source} has {message.numel()} bytes: no room for a header")
        received = ctypes.string_at(message.data_ptr(), HEADER_BYTES)
        check_header(received, self._expected(message, context, flags), context.source)

    def _expected(self, message: torch.Tensor, context: MessageContext, flags: int) -> Header:
        """Header of a message of any size that has a payload."""
        begin, payload_bytes = message.data_ptr(), message.numel() - HEADER_BYTES
        runs = self._runs(payload_bytes)
        words = check_context([(begin, 0, 0, 0, payload_bytes)], runs)
        checksum = self._threads.run(sum_task(), words, runs) >> 32
        return Header.expected(self._digest, context, payload_bytes, checksum, flags)

    @cached_property
    def _groups(self) -> list[_Group]:
        """The plan's segments, cut into several shares for each thread, or into fewer where they are small."""
        total = sum(length for length, _ in self._wanted)
        count = 1
        if self._threads.count > 1:
            count = max(1, min(self._threads.count * _SHARES_PER_THREAD, total // _SMALLEST_SHARE))
        return [group for parts in _cut(self.plan, count) for group in _grouped(self.plan, parts)]

    def _encoders(self, is_stratified: bool) -> TaskTable:
        """The tasks that encode a message; they are made once."""
        tables = {key: _table_of(book) for key, book in self._codebooks.items() if not book.is_exact}

        def row(group: _Group) -> TaskRow:
            book = self._codebooks[group.codebook]
            if book.is_exact:
                return TaskRow(tasks.EXACT, exact_encoder(), group.parts, (group.dtype.itemsize,))
            table, kind = tables[group.codebook], _KINDS[group.dtype]
            clip = float32_bits(book.clip)
            scalars = book.bucket_size, book.format.norm_bytes, book.norm == "l2", clip
            shared = group.parts, scalars, table.lines, table.levels, table.cells
            if book.rotation == "none":
                kernel = encoder(book.bits, book.format.lanes, table.method, kind, is_stratified)
                return TaskRow(tasks.PLAIN, kernel, *shared)
            rounds = is_stratified, book.rounding == "nearest"
            kernel = rotated_encoder(book.bits, book.bucket_size, table.method, kind, *rounds)
            magnitudes = np.array(book.levels, dtype=np.float32)
            return TaskRow(tasks.ROTATED, kernel, *shared, book.spread, magnitudes)

        self._encode_tables[is_stratified] = TaskTable([row(group) for group in self._groups])
        return self._encode_tables[is_stratified]

    @cached_property
    def _decoders(self) -> TaskTable:
        """The tasks that decode messages."""
        levels = {key: signed_levels(book) for key, book in self._codebooks.items() if not book.is_exact}

        def row(group: _Group) -> TaskRow:
            book, kind = self._codebooks[group.codebook], _KINDS[group.dtype]
            if book.is_exact:
                return TaskRow(tasks.EXACT, exact_decoder(), group.parts, (kind,))
            scalars = book.bucket_size, book.format.norm_bytes
            if book.rotation == "none":
                kernel = decoder(book.bits, book.format.lanes, kind, look_up_way(book.bits))
                return TaskRow(tasks.PLAIN, kernel, group.parts, scalars, levels=levels[group.codebook])
            kernel = rotated_decoder(book.bits, book.bucket_size, kind, look_up_way(book.bits))
            return TaskRow(tasks.ROTATED, kernel, group.parts, scalars, levels=levels[group.codebook])

        return TaskTable([row(group) for group in self._groups])

    def _new_results(self) -> list[torch.Tensor]:
        return [torch.empty(length, dtype=dtype, device="cpu") for length, dtype in self._wanted]

    def _check_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        forms = [_form(tensor) for tensor in tensors]
        if forms == self._forms:
            return
        if len(tensors) != len(self._forms):
            raise PlanError(f"{len(tensors)} tensors for a plan of {len(self._forms)} segments")
        index = next(n for n, form in enumerate(forms) if form != self._forms[n])
        self._refuse_tensor(index, tensors[index])

    def _refuse_tensor(self, index: int, tensor: torch.Tensor) -> None:
        wanted = self.plan.segments[index].slice
        if tensor.device.type != "cpu":
            raise PlanError(f"parameter {wanted.parameter!r} is on {tensor.device}; this codec works on CPU tensors")
        raise PlanError(
            f"parameter {wanted.parameter!r}: the plan has a contiguous {wanted.dtype} [{wanted.length}], "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )

    def _check_messages(self, messages: Sequence[torch.Tensor], contexts: Sequence[MessageContext]) -> None:
        expected = []
        for message, context in zip(messages, contexts, strict=True):
            if _form(message) != self._message_form:
                self._refuse_message(message, context.source)
            expected.append((message.data_ptr(), *self._words_of_header(context)))
        runs = self._runs(self.plan.payload_bytes)
        refused = self._threads.run(check_task(), check_context(expected, runs), runs * len(messages))
        if refused:
            self.check_seal(messages[refused - 1], contexts[refused - 1])

    def _refuse_message(self, message: torch.Tensor, source: int) -> None:
        if message.shape != (self.plan.message_bytes,) or message.dtype != torch.uint8:
            raise WireError(
                f"message from source {source} is {message.dtype} {list(message.shape)}, expected uint8 "
                f"[{self.plan.message_bytes}]; the ranks disagree on the model or on its codebooks"
            )
        raise WireError(f"message from source {source} must be a contiguous CPU tensor")

    def _words_of_header(self, context: MessageContext) -> HeaderWords:
        """What the header of the message with a context must be."""
        key = context.phase, context.source, context.destination
        digest = self._message_digests.get(key)
        if digest is None:
            digest = int.from_bytes(message_digest(self._digest, context), "little")
            self._message_digests[key] = digest
        return header_words(digest, context, self.plan.payload_bytes)

    def _runs(self, payload_bytes: int) -> int:
        """Number of runs that a payload is cut into for the threads that sum it."""
        return min(self._threads.count, 1 + payload_bytes // _SMALLEST_SUMMED_SHARE)


_Form = tuple[tuple[int, ...], torch.dtype, bool, bool]


def _form(tensor: torch.Tensor) -> _Form:
    """What is checked of a tensor: shape, dtype, whether it is on the CPU, whether it is contiguous."""
    return tensor.shape, tensor.dtype, tensor.is_cpu, tensor.is_contiguous()


def _contiguous(length: int, dtype: torch.dtype) -> _Form:
    """Form of a contiguous 1-D CPU tensor."""
    return (length,), dtype, True, True


def have_one_rotation(contexts: Sequence[MessageContext]) -> bool:
    """Whether messages can be summed before they are rotated back; False where every rank has a rotation of its own.

    Raises:
        PlanError: for messages of different exchanges, whose sum means nothing.
    """
    if len({context.rotation_key() for context in contexts}) == 1:
        return True
    if len({dataclasses.replace(context, rotations="common").rotation_key() for context in contexts}) > 1:
        raise PlanError(
            "messages of different exchanges are rotated differently and cannot be summed: decode each alone"
        )
    return False


def combined(
    decoded: Iterable[Sequence[torch.Tensor]], scale: float, out: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Sum of what several messages decode to, in the order given, in float32 or float64, times a scale.

    Where the scale is below 1, as in a mean, each addend is multiplied by a power of two at most twice the scale, which
    changes no bits of the result unless a sum would overflow or addends are subnormal.

    Args:
        decoded: of each message, one tensor per segment; they may be the same tensors, written anew.
        scale: factor of the sum, rounded to float32.
        out: tensors of the same lengths and dtypes to write into.
    """
    power = math.ldexp(1.0, min(0, max(-32, math.frexp(scale)[1] - 1)))  # at most the scale, at least half of it
    totals = [result.to(torch.promote_types(result.dtype, torch.float32)) for result in out]  # or `out` itself
    for number, parts in enumerate(decoded):
        for total, part in zip(totals, parts, strict=True):
            if number == 0:
                total.copy_(part).mul_(power)
            else:
                total.add_(part, alpha=power)
    factor = float(np.float32(scale)) / power
    for total, result in zip(totals, out, strict=True):
        result.copy_(total.mul_(factor))
    return list(out)


def _table_of(book: Codebook) -> KernelTable:
    table = rounding_table(book)
    return kernel_table(table, search_method(book.bits) if table.method == "search" else table.method)


def _cut(plan: MessagePlan, count: int) -> list[list[tuple[int, int, int]]]:
    """Shares of a plan with about equally many coordinates: runs (segment, first bucket, bucket behind the last one).

    Segments of one codebook and dtype are put next to each other, so that a share has few groups.
    """
    kinds: dict[tuple[str, torch.dtype], list[int]] = {}
    for index, segment in enumerate(plan.segments):
        if segment.slice.length:
            kinds.setdefault((segment.slice.codebook, segment.slice.dtype), []).append(index)
    total, passed = plan.coordinates, 0
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    for index in (index for indices in kinds.values() for index in indices):
        segment = plan.segments[index]
        bucket = 0
        while bucket < segment.buckets:
            place = passed + bucket * segment.format.bucket_size
            share = min(place * count // total, count - 1)
            share_end = -(-total * (share + 1) // count)  # the first coordinate of the next share
            end = segment.buckets
            if share < count - 1:
                end = min(end, bucket - (place - share_end) // segment.format.bucket_size)
            shares[share].append((index, bucket, end))
            bucket = end
        passed += segment.slice.length
    return [share for share in shares if share]


def _grouped(plan: MessagePlan, runs: Sequence[tuple[int, int, int]]) -> list[_Group]:
    """The runs of a share as groups of parts."""
    found: dict[tuple[str, torch.dtype], list[list[int]]] = {}
    for index, begin, end in runs:
        segment = plan.segments[index]
        key = segment.slice.codebook, segment.slice.dtype
        found.setdefault(key, []).append(_part(index, segment, begin, end))
    return [_Group(*key, np.array(parts, dtype=np.int64)) for key, parts in found.items()]


def _part(index: int, segment: Segment, begin: int, end: int) -> list[int]:
    """Fields of a part, in the order of `cpu.arguments`: the buckets [begin, end) of a segment."""
    size, length = segment.format.bucket_size, segment.slice.length
    first, last = begin * size, min(end * size, length)
    is_last = end == segment.buckets
    if segment.format.is_exact:
        norms_begin, bucket_bytes = segment.begin, size * segment.slice.dtype.itemsize
    else:
        norms_begin = segment.begin + begin * segment.format.norm_bytes
        bucket_bytes = size // ROWS * segment.format.bits
    codes_begin = segment.codes_begin + begin * bucket_bytes
    codes_end = segment.codes_begin + (segment.codes_bytes if is_last else end * bucket_bytes)
    fields = [0] * arguments.PART_FIELDS
    fields[arguments.SEGMENT] = index
    fields[arguments.FIRST] = first
    fields[arguments.LENGTH] = last - first
    fields[arguments.COORDINATE] = (segment.slice.coordinate + first + 2**63) % 2**64 - 2**63  # the low 64 bits
    fields[arguments.NORMS_BEGIN] = norms_begin
    fields[arguments.CODES_BEGIN] = codes_begin
    fields[arguments.CODES_END] = codes_end
    fields[arguments.END] = segment.end if is_last else codes_end
    return fields
