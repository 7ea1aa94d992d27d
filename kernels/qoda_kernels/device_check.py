"""The self check of a device: a few small messages, encoded and decoded there, against the bits of the CPU's codec.

It covers what the given codebooks and dtypes need: every kernel that their plans launch, whole buckets and ragged
tails, zeros, values far apart, buckets that are not finite, tensors at odd addresses, sums over senders, and a damaged
message.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.device_codec import DeviceCodec, DeviceRuntime
from qoda_kernels.errors import KernelError, WireError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from qoda_kernels.wire import MessageContext

__all__ = ["check_device"]

_SENDERS = 2
_CODEBOOKS_TOGETHER = 8  # in one message: what many need may not fit into shared memory
_COUNTER = 5
_BITS_VIEWS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_device(
    runtime: DeviceRuntime,
    codebooks: Iterable[Codebook],
    dtypes: Sequence[torch.dtype],
    stratified: bool = False,
) -> None:
    """Compare a device with the CPU.

    Args:
        runtime: the device.
        codebooks: those that will be used.
        dtypes: of the gradients; 64-bit floats only travel with exact codebooks.
        stratified: whether random numbers are stratified among the ranks.

    Raises:
        KernelError: naming what differs.
        Exception: whatever compiling or launching the kernels raises.
    """
    books = list({book.digest: book for book in codebooks}.values())
    plain = [book for book in books if book.rotation == "none"]
    # One rotated codebook in a message makes the kernels for rotated ones handle all of it.
    for together in [plain] if len(plain) == len(books) else [plain, books]:
        for begin in range(0, len(together), _CODEBOOKS_TOGETHER):
            _check_message(runtime, together[begin : begin + _CODEBOOKS_TOGETHER], dtypes, stratified)


def _check_message(
    runtime: DeviceRuntime, books: Sequence[Codebook], dtypes: Sequence[torch.dtype], stratified: bool
) -> None:
    codebooks = {str(index): book for index, book in enumerate(books)}
    plan = _plan(codebooks, dtypes)
    cpu, device = Codec(plan, codebooks), DeviceCodec(plan, codebooks, runtime.device, runtime)
    strata = _SENDERS if stratified else 1
    contexts = [MessageContext(7, _COUNTER, rank, 0, 3, rank, 0, strata) for rank in range(_SENDERS)]
    messages = []
    for context in contexts:
        values = _values(plan, codebooks, context.rank)
        message = cpu.encode(values, context)
        encoded = device.encode([_shifted(tensor, runtime.device) for tensor in values], context).cpu()
        if not torch.equal(message, encoded):
            place = int((message != encoded).nonzero()[0])
            raise KernelError(f"encoding differs from the CPU's at byte {place}: {_part_at(plan, codebooks, place)}")
        messages.append(message)
    wanted = cpu.decode_mean(messages, contexts)
    found = _decoded(runtime, device, messages, contexts)
    device.check()
    for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if not _same(one, other.cpu()):
            raise KernelError(f"decoding differs from the CPU's: {_described(plan, codebooks, index)}")
    damaged = messages[-1].clone()
    damaged[HEADER_BYTES + 1] ^= 16
    _decoded(runtime, device, [*messages[:-1], damaged], contexts)
    try:
        device.check()
    except WireError:
        return
    raise KernelError("a damaged message was decoded like a good one")


def _decoded(
    runtime: DeviceRuntime, codec: DeviceCodec, messages: Sequence[torch.Tensor], contexts: Sequence[MessageContext]
) -> list[torch.Tensor]:
    # Each in memory of its own, at a multiple of 16 bytes.
    placed = [runtime.upload(message.numpy()) for message in messages]
    slices = [segment.slice for segment in codec.plan.segments]
    results = [_shifted(torch.zeros(part.length, dtype=part.dtype, device="cpu"), runtime.device) for part in slices]
    codec.decode_mean(placed, contexts, results)
    runtime.synchronise()
    return results


def _shifted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device, at a multiple of its elements' size only, as gradients in a flat buffer may lie."""
    return torch.cat([tensor.new_zeros(1), tensor]).to(device)[1:]


def _plan(codebooks: Mapping[str, Codebook], dtypes: Sequence[torch.dtype]) -> MessagePlan:
    slices: list[Slice] = []
    coordinate = 2**32 - 700  # so that coordinates pass 32 bits
    for key, book in codebooks.items():
        for dtype in dtypes:
            if book.is_exact or dtype != torch.float64:
                for length in (3 * book.bucket_size + 77, 5):
                    slices.append(Slice(f"{key}.{len(slices)}", 0, length, dtype, key, coordinate))
                    coordinate += length
    return MessagePlan.build(slices, codebooks)


def _values(plan: MessagePlan, codebooks: Mapping[str, Codebook], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for segment in plan.segments:
        part, book = segment.slice, codebooks[segment.slice.codebook]
        values = torch.randn(part.length, generator=generator, device="cpu") ** 3
        values[::7] = 0.0
        size = book.bucket_size
        values[size : 2 * size] *= 1e-4
        if not book.is_exact and part.length > 2 * size:  # the bits of a NaN that is added up are the processor's
            values[2 * size + 3 : 2 * size + 5] = torch.tensor([float("nan"), float("inf")], device="cpu")
        tensors.append(values.to(part.dtype))
    return tensors


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bits, and NaN in the same places."""
    view = _BITS_VIEWS[one.dtype.itemsize]
    return bool(((one.view(view) == other.view(view)) | (one.isnan() & other.isnan())).all())


def _part_at(plan: MessagePlan, codebooks: Mapping[str, Codebook], place: int) -> str:
    for index, segment in enumerate(plan.segments):
        if segment.begin <= place < segment.end:
            return _described(plan, codebooks, index)
    return "header or padding"


def _described(plan: MessagePlan, codebooks: Mapping[str, Codebook], index: int) -> str:
    part = plan.segments[index].slice
    return f"{part.length} values of {part.dtype} with {codebooks[part.codebook].format}"
