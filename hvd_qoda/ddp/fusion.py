"""Which gradients travel together: fusion buffers that do not depend on DDP's reduce buckets.

DDP forms its reduce buckets anew after the first step, and again in a resumed run. Had a message the bounds of a reduce
bucket, those two runs would share gradients out differently, and with a reduce-scatter get different bits. So fusion
buffers are made from the model alone: its parameters in reverse order, in which backward mostly reaches them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from hvd_qoda.fusion import fill_buffers, gradient_slice
from qoda_kernels.layout import MessagePlan
from qoda_kernels.registry import CodebookRegistry, ParameterEntry

__all__ = ["Filling", "fusion_buffers", "plan_of"]


def fusion_buffers(
    entries: Iterable[tuple[ParameterEntry, torch.device]], bytes_at_most: float
) -> list[tuple[str, ...]]:
    """Names of the parameters of every fusion buffer.

    Args:
        entries: parameters that get gradients, and where they lie, in the model's order.
        bytes_at_most: of gradients in one fusion buffer, which all have one dtype and lie on one device; a larger
            parameter has one of its own.
    """
    buffers: list[tuple[str, ...]] = []
    for _, run in groupby(reversed(list(entries)), key=lambda pair: (pair[0].dtype, pair[1])):
        buffers += fill_buffers({entry.name: entry.numel * entry.dtype.itemsize for entry, _ in run}, bytes_at_most)
    return buffers


def plan_of(names: Sequence[str], dtypes: Sequence[torch.dtype], registry: CodebookRegistry) -> MessagePlan:
    """Layout of a fusion buffer's message.

    Args:
        names: the parameters.
        dtypes: of their gradients; DDP hands complex ones over as real numbers.
        registry: layer types and codebooks.

    Raises:
        UnsupportedError: for dtypes that cannot be sent.
    """
    entries = [registry.parameters[name] for name in names]
    return MessagePlan.build([gradient_slice(*part) for part in zip(entries, dtypes, strict=True)], registry.codebooks)


@dataclass
class Filling:
    """A fusion buffer in one step, as far as its gradients have come.

    Attributes:
        names: the parameters whose gradients belong here.
        gradients: those that have come: contiguous 1-D tensors where they are coded.
    """

    names: tuple[str, ...]
    gradients: dict[str, torch.Tensor]

    @property
    def is_full(self) -> bool:
        """Whether every gradient has come."""
        return len(self.gradients) == len(self.names)

    @property
    def present(self) -> tuple[str, ...]:
        """The parameters whose gradients have come, in the buffer's order."""
        return tuple(name for name in self.names if name in self.gradients)
