"""Which gradients travel together: fusion buffers, filled in the order in which backward makes the gradients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from hvd_qoda.errors import UnsupportedError
from hvd_qoda.traffic import all_gather_bytes, all_reduce_bytes
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import EXACT_DTYPES, MessagePlan, Slice
from qoda_kernels.registry import COMPRESSIBLE_DTYPES, CodebookRegistry, ParameterEntry

__all__ = [
    "Gradient",
    "Parcels",
    "fill_buffers",
    "gradient_slice",
    "host_reduces",
    "overlapping_bytes",
    "parcels_of",
    "real_numel",
    "split_evenly",
    "with_groups",
]

_WORTH_A_COLLECTIVE_BYTES = 2**16  # half a millisecond at 1 Gbit/s
_OVERLAPPING_BUFFERS = 4
_WITH_ALL_TO_ALLS = 2  # hosts start all-to-alls one by one, and each exchanges sizes first
_SMALLEST_OVERLAPPING_BYTES = 2**21
_FUSED_BY_HOSTS = ("off", "allgather")  # schemes whose collectives hosts put together where several are under way


@dataclass(frozen=True)
class Gradient:
    """What a fusion buffer needs to know of a gradient.

    Attributes:
        entry: its parameter.
        dtype: its own dtype.
    """

    entry: ParameterEntry
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.entry.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Parcels:
    """How the gradients of one fusion buffer travel.

    Attributes:
        plan: of the message; None where it would be empty.
        by_host: those that the host reduces itself, in tensors of one dtype each.
    """

    plan: MessagePlan | None
    by_host: Mapping[torch.dtype, tuple[str, ...]]


def real_numel(entry: ParameterEntry) -> int:
    """Real numbers in a parameter's gradient: of a complex one the real and imaginary parts."""
    return entry.numel * (2 if entry.dtype.is_complex else 1)


def gradient_slice(entry: ParameterEntry, dtype: torch.dtype) -> Slice:
    """A whole gradient as part of a message; a complex one travels as pairs of real numbers.

    Args:
        entry: its parameter.
        dtype: its own dtype.

    Raises:
        UnsupportedError: for a dtype that no message carries, such as those of 8 bits.
    """
    real = dtype.to_real() if dtype.is_complex else dtype
    if real not in EXACT_DTYPES:
        raise UnsupportedError(
            f"the gradient of parameter {entry.name!r} has dtype {dtype}, which cannot be sent: freeze the parameter "
            "(requires_grad=False), or keep it in another dtype"
        )
    return Slice(entry.name, 0, real_numel(entry), real, entry.codebook, entry.offset)


def host_reduces(dtype: torch.dtype) -> bool:
    """Whether the host's own all-reduce adds up gradients of this dtype: not bfloat16, and no complex numbers."""
    return dtype != torch.bfloat16 and not dtype.is_complex


def overlapping_bytes(total_bytes: float, at_most: float, scheme: str) -> float:
    """Size of fusion buffers of which several are filled in a backward pass, so that it hides the first ones' way.

    Args:
        total_bytes: of all gradients.
        at_most: no larger than that.
        scheme: how they are exchanged.

    Returns:
        A quarter of all gradients, or half of them for exchanges that begin with an all-to-all; but no less than 2 MiB,
        whose fixed costs are small, and no more than `at_most`.
    """
    count = _OVERLAPPING_BUFFERS if scheme in _FUSED_BY_HOSTS else _WITH_ALL_TO_ALLS
    return min(at_most, max(_SMALLEST_OVERLAPPING_BYTES, total_bytes / count))


def fill_buffers(sizes: Mapping[str, int], buffer_bytes: float) -> list[tuple[str, ...]]:
    """Fusion buffers of about this size.

    Args:
        sizes: name -> bytes of its gradient, in the order in which gradients are made.
        buffer_bytes: at most so many in a buffer; a larger gradient has one of its own.
    """
    buffers: list[tuple[str, ...]] = []
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > buffer_bytes:
            buffers.append(tuple(names))
            names, filled = [], 0
        names.append(name)
        filled += size
    return [*buffers, tuple(names)] if names else buffers


def split_evenly(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """At most `count` fusion buffers of equally many gradients, or one more in the first ones."""
    cuts = [len(names) * index // count for index in range(count + 1)]
    return [tuple(names[begin:end]) for begin, end in pairwise(cuts) if begin < end]


def with_groups(
    sizes: Mapping[str, int], buffer_bytes: float, groups: Iterable[Iterable[str]]
) -> list[tuple[str, ...]]:
    """Fusion buffers of which each group has one of its own; the rest is filled by size.

    Args:
        sizes: as for `fill_buffers`.
        buffer_bytes: likewise.
        groups: names that stay together; those without a gradient are left out.
    """
    position = {name: index for index, name in enumerate(sizes)}
    buffers = [tuple(sorted((n for n in group if n in position), key=position.__getitem__)) for group in groups]
    grouped = {name for names in buffers for name in names}
    rest = {name: size for name, size in sizes.items() if name not in grouped}
    # In the order in which they become full.
    return sorted((b for b in [*buffers, *fill_buffers(rest, buffer_bytes)] if b), key=lambda b: position[b[-1]])


def parcels_of(gradients: Sequence[Gradient], registry: CodebookRegistry, size: int, quantize: bool = True) -> Parcels:
    """How the gradients of one fusion buffer travel.

    What is not quantized travels in the message, too, as raw values that are added up in rank order, if the host's own
    all-reduce would not save more bytes than another collective is worth: always with two ranks, and where there is
    little of it. The host reduces what cannot be in a message: all dtypes but those of 16 and 32 bits. It cannot reduce
    bfloat16 and complex numbers.

    Args:
        gradients: in order, none of them empty.
        registry: the codebooks.
        size: number of ranks.
        quantize: if not, everything is exact, and the host reduces all that it can.
    """
    quantized = [g for g in gradients if quantize and _is_quantized(g, registry)]
    exact = [g for g in gradients if g not in quantized]
    movable = sum(g.nbytes for g in exact if g.dtype in (torch.float32, torch.float16))
    saved = all_gather_bytes(movable, size) - all_reduce_bytes(movable, size)
    threshold = _WORTH_A_COLLECTIVE_BYTES if quantized else 0
    in_message = {g.dtype for g in exact if not host_reduces(g.dtype)}
    if quantize and saved <= threshold:
        in_message |= {torch.float32, torch.float16}
    by_host: dict[torch.dtype, tuple[str, ...]] = {}
    for gradient in exact:
        if gradient.dtype not in in_message:
            by_host[gradient.dtype] = (*by_host.get(gradient.dtype, ()), gradient.entry.name)
    slices = [gradient_slice(g.entry, g.dtype) for g in gradients if g in quantized or g.dtype in in_message]
    books = registry.codebooks if quantize else dict.fromkeys(registry.codebooks, Codebook.exact())
    return Parcels(MessagePlan.build(slices, books) if slices else None, by_host)


def _is_quantized(gradient: Gradient, registry: CodebookRegistry) -> bool:
    return gradient.dtype in COMPRESSIBLE_DTYPES and not registry.codebooks[gradient.entry.codebook].is_exact
