"""What users write: `optimizer = hvd_qoda.DistributedOptimizer(optimizer, model=model, compression=compression)`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:  # importing hvd_qoda does not need Horovod
    from hvd_qoda.horovod import QodaCompressor

__all__ = ["DistributedOptimizer"]


def DistributedOptimizer(  # as Horovod calls it
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: QodaCompressor | None = None,
    backward_passes_per_step: int = 1,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: Any = None,
    *,
    model: nn.Module | None = None,
    fusion_buffer_mb: float | None = None,
) -> Any:
    """An optimizer that exchanges quantized gradients in fusion buffers while backward goes on.

    To be used as `hvd.DistributedOptimizer` is: same arguments, same methods (`step`, `synchronize`,
    `skip_synchronize`, `zero_grad`, `set_backward_passes_per_step`, `load_state_dict`), an object of a class made from
    the given optimizer's. It sends one message for each fusion buffer, where the stock optimizer with the same
    compression sends one for each parameter. What may differ between ranks: the order in which backward makes
    gradients, and which are missing. Beyond the stock optimizer: parameters may be thawed and groups added between
    steps; `step(closure)` exchanges what the closure computes; a sparse gradient may be missing on some ranks.

    Args:
        optimizer: the optimizer to wrap; the new one takes over its state.
        named_parameters: (name, parameter) of all of its parameters; needed if neither model nor compression is given.
        compression: made by `hvd_qoda.Compression.qoda`, one for each optimizer; by default one for the model, with
            what the environment says. Save its state for an exact resume.
        backward_passes_per_step: backward passes whose gradients are added up before they are exchanged.
        op: `hvd.Average` (default) or `hvd.Sum`.
        gradient_predivide_factor: for averages of gradients that Horovod reduces itself: it divides by this before it
            adds, and multiplies after. The mean of quantized gradients is computed in float32 and needs no such care.
        groups: lists of parameters, each to be sent in a buffer of its own; or a number of buffers of equally many
            parameters. By default buffers are filled up to `fusion_buffer_mb`.
        sparse_as_dense: quantize sparse gradients like dense ones; by default ranks exchange their rows as they are.
        process_set: the Horovod process set that exchanges gradients; by default the compression's, or all ranks.
        model: the model; tells layer types, if no compression is given, and which embeddings have sparse gradients.
        fusion_buffer_mb: megabytes (2^20 bytes) of gradients in a buffer; by default as configured.

    Raises:
        ConfigError: for impossible arguments (a ValueError, as Horovod's).
        UnsupportedError: for reductions other than average and sum, and parameters that the compression does not know.
        ImportError: without Horovod.
    """
    from hvd_qoda.horovod.distributed_optimizer import build_optimizer

    return build_optimizer(
        optimizer,
        named_parameters,
        compression,
        backward_passes_per_step,
        op,
        gradient_predivide_factor,
        groups,
        sparse_as_dense,
        process_set,
        model,
        fusion_buffer_mb,
    )
