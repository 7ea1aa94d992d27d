"""The optimizers QODA and QODAdam in a DeepSpeed configuration, and under ZeRO's partitions.

DeepSpeed looks an optimizer's name up in `torch.optim`, and asks ZeRO whether it has been tested.

ZeRO gives the optimizer one flat partition per rank and group, and steps one group at a time. QODAdam works coordinate
by coordinate and does not notice. QODA's step sizes need norms over the whole model: the ranks' parts are added up, in
rank order and float64, and one group is the limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero import utils as zero_utils

from ds_plugin.reducer import GradientReducer
from hvd_qoda.errors import UnsupportedError
from hvd_qoda.optim import QODA, QGenX, QODAdam, WorkerNorms
from hvd_qoda.optim.state import EagerStateOptimizer
from hvd_qoda.torch_distributed import TorchTransport
from hvd_qoda.transport import all_gather_array

__all__ = ["adapt_optimizer", "register_names", "worker_sums"]


def register_names() -> None:
    """Let `"optimizer": {"type": "QODA"}` and `"QODAdam"` resolve, with ZeRO too."""
    for optimizer in (QODA, QODAdam):
        setattr(torch.optim, optimizer.__name__, optimizer)
        if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def adapt_optimizer(engine: Any, transport: TorchTransport) -> None:
    """Prepare one of our optimizers for what the engine's wrapper has made of its parameters, with a block or without.

    Args:
        engine: whose optimizer has just been made.
        transport: the data-parallel ranks, over which ZeRO parts the model.

    Raises:
        UnsupportedError: for QODA with experts, several parameter groups, or several of ZeRO 3's sub-groups; for QGenX
            with ZeRO.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, EagerStateOptimizer):
        return
    optimizer.forget_state_of_others()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # wrappers of 16-bit models take a step with zero gradients to have state created
    if isinstance(optimizer, QODA) and engine.has_moe_layers:
        raise UnsupportedError(
            "QODA computes its step sizes from norms over the whole model, and ranks hold different experts: use "
            "QODAdam"
        )
    if isinstance(optimizer, QODA) and engine.zero_optimization_stage() > 0:
        _refuse_several_groups(engine, optimizer)
        optimizer.param_groups[0]["sum_of_parts"] = lambda part: _sum_over_ranks(transport, part)
    if isinstance(optimizer, QGenX) and engine.zero_optimization_stage() > 0:
        raise UnsupportedError(
            "QGenX computes its step sizes from norms over the whole model, and ZeRO gives each rank a part of it: set "
            "zero_optimization.stage to 0, or use QODA, whose norms are added up over the ranks"
        )


@contextmanager
def worker_sums(engine: Any, reducer: GradientReducer) -> Iterator[None]:
    """While DeepSpeed makes its optimizer: give QODA with sum_over="workers" the source of its norms.

    Raises:
        UnsupportedError: where the gradients have no constant scale to those that were exchanged.
    """
    parameters = engine.optimizer_params() or {}
    if engine.optimizer_name() != QODA.__name__ or parameters.get("sum_over") != "workers":
        yield
        return

    def norms() -> WorkerNorms:
        # Wrappers of 16-bit models take a step with zero gradients to have state created.
        return reducer.worker_norms() if reducer.step else WorkerNorms(0.0, 0.0, reducer.transport.size)

    sources = {"worker_norms": norms, "gradient_scale": _gradient_scale(engine, reducer)}
    engine._config.optimizer_params = {**parameters, **sources}
    try:
        yield
    finally:
        engine._config.optimizer_params = parameters


def _gradient_scale(engine: Any, reducer: GradientReducer) -> float:
    """By how much the gradients that the optimizer sees exceed the mean of those that were exchanged."""
    where = 'optimizer.params.sum_over="workers" needs'
    if not reducer.config.worker_norms:
        raise UnsupportedError(f'{where} "worker_norms": true in the "qoda" block')
    if engine.gradient_predivide_factor() != 1.0 or engine.gradient_clipping() > 0.0 or engine.has_moe_layers:
        raise UnsupportedError(
            f"{where} gradients that are a constant multiple of those exchanged: leave out gradient_predivide_factor "
            'and experts, set gradient_clipping to 0 (DeepSpeed clips at 1.0 by default), or use sum_over="mean"'
        )
    stage = engine.zero_optimization_stage()
    by_engine = stage == 0 or (stage < 3 and not engine.zero_reduce_scatter())
    divided_after = by_engine and engine.gradient_average and engine.postscale_gradients()
    return 1.0 if divided_after else float(reducer.transport.size)


def _refuse_several_groups(engine: Any, optimizer: QODA) -> None:
    parts = len(getattr(engine.optimizer, "fp16_groups", optimizer.param_groups))
    if len(optimizer.param_groups) > 1 or parts > 1:
        raise UnsupportedError(
            f"QODA computes its step sizes from norms over the whole model, and ZeRO steps {max(parts, 2)} parts of it "
            "one after the other: give it one parameter group (ZeRO 3: a zero_optimization.sub_group_size of at least "
            "the model's size), or use QODAdam"
        )


def _sum_over_ranks(transport: TorchTransport, part: float) -> float:
    total = 0.0
    for value in all_gather_array(transport, np.array(part), "ds_plugin.norm"):
        total += float(value)
    return total
