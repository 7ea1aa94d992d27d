"""The codec of one message plan for CUDA tensors: one launch a message, one launch a mean.

Same bytes and same bits as `codec.Codec`, without a host synchronisation and without an allocation per step: a message
that is damaged or not the expected one turns the whole result into NaN at once, and into a `WireError` at the next
call. Addresses of tensors are kept in a table on the device that is sent again only when one changes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec, have_one_rotation
from qoda_kernels.cuda_launch import cuda_kernel
from qoda_kernels.device_statistics import GATHERED, empty_records, histograms
from qoda_kernels.device_tables import (
    COUNTER_WORD,
    PLAN,
    SENDER,
    STATUS,
    STEP,
    WARPS,
    WORKSPACE,
    PlanTables,
)
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import MessagePlan
from qoda_kernels.statistics import HistogramStatistics
from qoda_kernels.wire import Header, MessageContext, check_header

_BLOCKS_PER_MULTIPROCESSOR = 4
_MASK32 = 0xFFFFFFFF


class DeviceRuntime(Protocol):
    """What the codec needs of a device."""

    device: torch.device

    def upload(self, array: npt.NDArray[Any], out: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes of an array as a uint8 tensor on the device, in stream order; `out` is written if given."""
        ...

    def host_visible(self, size: int) -> torch.Tensor:
        """Zeroed uint8 tensor of the host that kernels can write by its address."""
        ...

    def launch(self, name: str, blocks: int, shared_bytes: int, arguments: tuple[int | float, ...]) -> None:
        """Start a kernel of `cuda.SIGNATURES`, in stream order."""
        ...

    def synchronise(self) -> None:
        """Wait until everything that was started has been done."""
        ...

    def is_capturing(self) -> bool:
        """Whether launches are being recorded into a CUDA graph."""
        ...

    @property
    def multiprocessors(self) -> int:
        """Number of multiprocessors."""
        ...


class CudaRuntime:
    """A CUDA device, used on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)  # as tensors name it
        self._index = index
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def upload(self, array: npt.NDArray[Any], out: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes of an array as a tensor on the device.

        A copy from pageable memory has read it when the call returns, so the array may be changed at once.
        """
        source = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        target = torch.empty(source.shape, dtype=torch.uint8, device=self.device) if out is None else out
        return target.copy_(source, non_blocking=True)

    def host_visible(self, size: int) -> torch.Tensor:
        """Zeroed page-locked memory, which has the same address on the device."""
        return torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def launch(self, name: str, blocks: int, shared_bytes: int, arguments: tuple[int | float, ...]) -> None:
        """Start a kernel on torch's current stream."""
        # The handle without an object around it, as torch's own generated code asks for it.
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        cuda_kernel(name, self._index).launch(blocks, shared_bytes, stream, arguments)

    def synchronise(self) -> None:
        """Wait for torch's current stream; other threads run on meanwhile."""
        torch.cuda.current_stream(self.device).synchronize()

    def is_capturing(self) -> bool:
        """Whether torch's current stream is being captured."""
        if torch.cuda.current_device() == self._index:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self._index):
            return torch.cuda.is_current_stream_capturing()


class _AddressTable:
    """Addresses of a sequence of tensors, on the device."""

    def __init__(self, runtime: DeviceRuntime, count: int) -> None:
        self._runtime = runtime
        self._addresses: list[int] = []
        self._tensors: tuple[torch.Tensor, ...] | None = None
        self._table = runtime.upload(np.zeros(max(count, 1), dtype=np.uint64))
        self.address = self._table.data_ptr()

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether this very tuple was put in last: then nothing needs to be looked at again."""
        return tensors is self._tensors

    def put(self, tensors: Sequence[torch.Tensor], used: Sequence[int]) -> None:
        """Send the addresses of the tensors with the numbers `used`, where any differs from the last time."""
        addresses = [tensors[index].data_ptr() for index in used]
        if addresses != self._addresses:
            _refuse_capture(self._runtime)
            self._runtime.upload(np.array(addresses, dtype=np.uint64), self._table[: 8 * len(addresses)])
            self._addresses = addresses
        self._tensors = tensors if isinstance(tensors, tuple) else None


def _refuse_capture(runtime: DeviceRuntime) -> None:
    if runtime.is_capturing():
        raise PlanError(
            "tensors or contexts of a captured call must be those of an earlier call outside the capture: call it once "
            "with the same arguments before"
        )


class DeviceCodec(Codec):
    """Encodes and decodes the messages of one plan on a CUDA device.

    Calls return before the device is done and are in order on torch's current stream; use one stream at a time. A tuple
    of tensors that was passed before is not looked at again: pass the same tuple in each step to save the host's time.

    Calls can be captured in a CUDA graph after one call with the same tensors outside the capture. A captured call
    takes key and counter from the device: call `stage` with the step's context before each replay.
    """

    def __init__(
        self,
        plan: MessagePlan,
        codebooks: Mapping[str, Codebook],
        device: torch.device,
        runtime: DeviceRuntime | None = None,
    ) -> None:
        """Prepare the tables of the plan and its codebooks on a device.

        Args:
            plan: layout of the messages.
            codebooks: codebook of each key that the plan names.
            device: where the tensors are.
            runtime: how to use the device; by default through Numba.

        Raises:
            PlanError: when a codebook's format is not the one that the plan was laid out for, or the codebooks do not
                fit into shared memory.
        """
        super().__init__(plan, codebooks)
        from qoda_kernels.cuda import CHECK_BYTES, THREADS

        self._runtime = runtime or CudaRuntime(device)
        self._host_tables = tables = PlanTables.build(plan, codebooks)
        self._device_tables = [self._runtime.upload(part) for part in (tables.segments, tables.rounding, tables.levels)]
        self._workspace = self._runtime.upload(np.zeros(1, dtype=WORKSPACE))
        self._status_memory = self._runtime.host_visible(STATUS.itemsize)
        self._status = self._status_memory.numpy().view(STATUS)
        self._refused = self._status["refused"]
        self._step = self._runtime.upload(np.zeros(1, dtype=STEP))
        self._values = _AddressTable(self._runtime, len(tables.indices))
        self._results = _AddressTable(self._runtime, len(tables.indices))
        self._headers: dict[tuple[int, ...], torch.Tensor] = {}
        self._senders: torch.Tensor | None = None
        self._senders_address = 0
        self._totals: torch.Tensor | None = None
        self._senders_key: tuple[tuple[int, ...], ...] = ()
        self._pieces = -(-plan.payload_bytes // CHECK_BYTES)
        self._warps = THREADS // 32
        self._encode_bytes = self._shared_bytes(tables.rounding.size)
        self._decode_bytes = self._shared_bytes(tables.levels.size)
        self._encode_blocks = self._blocks(0)
        self._device = self._runtime.device
        self._message_shape = (plan.message_bytes,)
        slices = [segment.slice for segment in plan.segments]
        self._forms_on_device = [((part.length,), part.dtype, self._device, True) for part in slices]
        self._plan_record = self._runtime.upload(self._describe_plan(0))
        self._plan_address = self._plan_record.data_ptr()
        self._runtime.synchronise()  # so that calls on other streams find the tables

    def encode(
        self, values: Sequence[torch.Tensor], context: MessageContext, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode one tensor per segment into one message.

        Args:
            values: contiguous 1-D tensors on the device with the slices' dtypes and lengths.
            context: identifies the message and selects the random numbers.
            out: uint8 [message_bytes] on the device to write into; a new tensor by default.

        Returns:
            uint8 [message_bytes].

        Raises:
            PlanError: when the tensors do not fit the plan.
            WireError: when an earlier `decode_mean` met a damaged or unexpected message.
        """
        self.check()
        if not self._values.holds(values):
            self._check_tensors(values)
            self._values.put(values, self._host_tables.indices)
        message = self._new(self.plan.message_bytes, torch.uint8) if out is None else out
        self._check_message_buffer(message, PlanError)
        key = context.key()
        words: tuple[int, ...] = (key.first, key.second)
        name = "encode"
        if key.strata > 1 or self._rotates:
            words += (key.common_first, key.common_second, key.position, key.strata)
            name = "encode_rotated" if self._rotates else "encode_stratified"
        arguments = (
            self._plan_address,
            self._header(context),
            self._values.address,
            message.data_ptr(),
            self._step_address(),
            *words,
            *self._rotation_words(context),
            context.counter & _MASK32,
        )
        self._runtime.launch(name, self._encode_blocks, self._encode_bytes, arguments)
        return message

    def decode_mean(
        self,
        messages: Sequence[torch.Tensor],
        contexts: Sequence[MessageContext],
        out: Sequence[torch.Tensor] | None = None,
        scale: float | None = None,
    ) -> list[torch.Tensor]:
        """Decode several messages of the plan and combine them: sum in the order given, in float32, times a scale.

        Where a message is damaged or not the expected one, all results are NaN, and the next call raises.

        Args:
            messages: contiguous uint8 tensors [message_bytes] on the device, 16-byte aligned, one per sender.
            contexts: what each message must be; the seed is needed only to rotate back, by one rotation for all.
            out: contiguous 1-D tensors with the slices' dtypes and lengths to write into; new ones by default.
            scale: factor of the sum; by default 1 / number of messages.

        Raises:
            WireError: when an earlier call met a damaged or unexpected message.
            PlanError: when messages or `out` do not fit the plan, or rotated messages have different rotations.
        """
        self.check()
        if not messages or len(messages) != len(contexts):
            raise PlanError(
                f"{len(messages)} messages and {len(contexts)} contexts; there must be one context a message"
            )
        if out is None:
            out = tuple(self._new(s.slice.length, s.slice.dtype) for s in self.plan.segments)
        if not self._results.holds(out):
            self._check_tensors(out)
            self._results.put(out, self._host_tables.indices)
        if self._rotates and not have_one_rotation(contexts):
            raise PlanError("every rank has a rotation of its own: decode each alone, and sum with `codec.combined`")
        self._place_senders(messages, contexts)
        arguments = (
            self._plan_address,
            self._senders_address,
            len(messages),
            self._results.address,
            self._step_address(),
            *self._rotation_words(contexts[0]),
            contexts[0].counter & _MASK32,
            float(np.float32(1.0 / len(messages) if scale is None else scale)),
            self._pieces,
        )
        name = "decode_mean_rotated" if self._rotates else "decode_mean"
        self._runtime.launch(name, self._blocks(self._pieces * len(messages)), self._decode_bytes, arguments)
        return list(out)

    def check(self) -> None:
        """Raise if a message decoded so far was refused; later launches need not be done. Clears the refusal.

        Raises:
            WireError: naming the first field that differs.
        """
        if not self._refused[0]:
            return
        record = self._status[0]
        sender = int(record["sender"])
        received, expected = record["received"].tobytes(), record["expected"].tobytes()
        self._refused[0] = 0
        words = np.frombuffer(expected, dtype="<u4")
        header = Header(expected[8:16], *(int(word) for word in words[4:8]))
        source = self._senders_key[sender][2] if sender < len(self._senders_key) else sender
        check_header(received, header, source)

    def gather_statistics(self, values: Sequence[torch.Tensor]) -> Mapping[str, HistogramStatistics]:
        """Level statistics of each quantizing codebook; two launches, then waits for the device.

        The sums are of whole numbers, so they are the same in every run (`device_statistics.py`).

        Args:
            values: as for `encode`.

        Raises:
            PlanError: when the tensors do not fit the plan.
        """
        if not self._values.holds(values):
            self._check_tensors(values)
            self._values.put(values, self._host_tables.indices)
        keys = self._host_tables.codebooks
        lengths = [sum(s.slice.length for s in self.plan.segments if s.slice.codebook == key) for key in keys]
        gathered = self._runtime.upload(empty_records(lengths))
        for is_first in (1, 0):
            arguments = (self._plan_address, self._values.address, gathered.data_ptr(), is_first)
            self._runtime.launch("gather_statistics", self._encode_blocks, 0, arguments)
        return histograms(gathered.cpu().numpy().view(GATHERED), keys)

    def stage(self, context: MessageContext) -> None:
        """Give the context's key and counter to the calls of a CUDA graph that will be replayed next."""
        rotation = context.rotation_key().words
        step = np.array([(*context.key().words, context.counter & _MASK32, *rotation, 0)], dtype=STEP)
        self._runtime.upload(step, self._step)

    def _describe_plan(self, totals: int) -> npt.NDArray[np.void]:
        tables = self._host_tables
        record = np.zeros(1, dtype=PLAN)
        record["segments"], record["rounding"], record["levels"] = (part.data_ptr() for part in self._device_tables)
        record["workspace"], record["status"] = self._workspace.data_ptr(), self._status_memory.data_ptr()
        record["totals"] = totals
        record["segment_count"], record["units"] = len(tables.indices), tables.units
        record["rounding_floats"], record["level_floats"] = tables.rounding.size, tables.levels.size
        record["payload_bytes"], record["rotated"] = self.plan.payload_bytes, tables.rotated
        return record

    def _rotation_words(self, context: MessageContext) -> tuple[int, ...]:
        """Arguments of the kernels that rotate; none for the others."""
        if not self._rotates:
            return ()
        key = context.rotation_key()
        return key.first, key.second

    def _shared_bytes(self, table_floats: int) -> int:
        return 4 * (table_floats + self._host_tables.rotated * WARPS)

    def _header(self, context: MessageContext) -> int:
        """Address on the device of the header of a context without counter and checksum."""
        key = (context.registry_version, context.phase, context.source, context.destination)
        found = self._headers.get(key)
        if found is None:
            _refuse_capture(self._runtime)
            found = self._headers[key] = self._runtime.upload(self._header_words(context, 0))
        return found.data_ptr()

    def _header_words(self, context: MessageContext, counter: int) -> npt.NDArray[np.uint32]:
        header = Header.expected(self._digest, context, self.plan.payload_bytes, 0)
        words = np.frombuffer(header.pack(), dtype="<u4").copy()
        words[COUNTER_WORD] = counter & _MASK32
        return words

    def _place_senders(self, messages: Sequence[torch.Tensor], contexts: Sequence[MessageContext]) -> None:
        """Send what is expected of whom to the device, where it differs from the last time."""
        first = contexts[0].counter
        key = tuple(
            (m.data_ptr(), c.phase, c.source, c.destination, c.registry_version, c.counter - first)
            for m, c in zip(messages, contexts, strict=True)
        )
        for message in messages:  # also where addresses are known: a view of fewer bytes has the same one
            self._check_message_buffer(message, WireError)
        if key == self._senders_key:
            return
        _refuse_capture(self._runtime)
        records = np.zeros(len(messages), dtype=SENDER)
        for record, message, context in zip(records, messages, contexts, strict=True):
            record["message"] = message.data_ptr()
            record["header"] = self._header_words(context, context.counter - first)
        if self._senders is None or self._senders.numel() != records.nbytes:
            self._senders = self._runtime.upload(records)
            self._senders_address = self._senders.data_ptr()
            self._totals = self._runtime.upload(np.zeros(len(messages), dtype=np.uint64))
            self._plan_record = self._runtime.upload(self._describe_plan(self._totals.data_ptr()), self._plan_record)
        else:
            self._runtime.upload(records, self._senders)
        self._senders_key = key

    def _check_message_buffer(self, message: torch.Tensor, error: type[PlanError] | type[WireError]) -> None:
        if (
            message.shape != self._message_shape
            or message.dtype != torch.uint8
            or message.device != self._device
            or not message.is_contiguous()
            or message.data_ptr() % 16
        ):
            raise error(
                f"a message must be contiguous uint8 [{self.plan.message_bytes}] on {self._runtime.device} at a "
                f"multiple of 16 bytes; got {message.dtype} {list(message.shape)} on {message.device}"
            )

    def _check_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        found = [(tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()) for tensor in tensors]
        if found == self._forms_on_device:
            return
        if len(tensors) != len(self.plan.segments):
            raise PlanError(f"{len(tensors)} tensors for a plan of {len(self.plan.segments)} segments")
        index = next(n for n, form in enumerate(found) if form != self._forms_on_device[n])
        wanted, tensor = self.plan.segments[index].slice, tensors[index]
        raise PlanError(
            f"parameter {wanted.parameter!r}: the plan has a contiguous {wanted.dtype} [{wanted.length}] on "
            f"{self._device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )

    def _step_address(self) -> int:
        return self._step.data_ptr() if self._runtime.is_capturing() else 0

    def _blocks(self, checks: int) -> int:
        wanted = -(-(self._host_tables.units + checks) // self._warps)
        return max(1, min(wanted, _BLOCKS_PER_MULTIPROCESSOR * self._runtime.multiprocessors))

    def _new(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(length, dtype=dtype, device=self._runtime.device)
