"""The optimizers QODA and QODAdam in a DeepSpeed configuration, and under ZeRO's partitions.

DeepSpeed looks an optimizer's name up in `torch.optim`, and asks ZeRO whether it has been tested.

ZeRO gives the optimizer one flat partition per rank and group, and steps one group at a time. QODAdam works coordinate
by coordinate and does not notice. QODA's step sizes need norms over the whole model: the ranks' parts are added up, in
rank order and float64, and one group is the limit.
"""

from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero import utils as zero_utils

from ds_plugin.reducer import GradientReducer
from hvd_qoda.errors import UnsupportedError
from hvd_qoda.optim import QODA, QODAdam
from hvd_qoda.optim.state import EagerStateOptimizer
from hvd_qoda.transport import all_gather_array

__all__ = ["adapt_optimizer", "register_names"]


def register_names() -> None:
    """Let `"optimizer": {"type": "QODA"}` and `"QODAdam"` resolve, with ZeRO too."""
    for optimizer in (QODA, QODAdam):
        setattr(torch.optim, optimizer.__name__, optimizer)
        if optimizer not in zero_utils.ZERO_SUPPORTED_OPTIMIZERS:
            zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(optimizer)


def adapt_optimizer(engine: Any, reducer: GradientReducer) -> None:
    """Prepare one of our optimizers for what the engine's wrapper has made of its parameters.

    Raises:
        UnsupportedError: for QODA with several parameter groups, or several of ZeRO 3's sub-groups.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, EagerStateOptimizer):
        return
    optimizer.forget_state_of_others()
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()  # wrappers of 16-bit models take a step with zero gradients to have state created
    if isinstance(optimizer, QODA) and engine.zero_optimization_stage() > 0:
        _refuse_several_groups(engine, optimizer)
        optimizer.param_groups[0]["sum_of_parts"] = lambda part: _sum_over_ranks(reducer, part)


def _refuse_several_groups(engine: Any, optimizer: QODA) -> None:
    parts = len(getattr(engine.optimizer, "fp16_groups", optimizer.param_groups))
    if len(optimizer.param_groups) > 1 or parts > 1:
        raise UnsupportedError(
            f"QODA computes its step sizes from norms over the whole model, and ZeRO steps {max(parts, 2)} parts of it "
            "one after the other: give it one parameter group (ZeRO 3: a zero_optimization.sub_group_size of at least "
            "the model's size), or use QODAdam"
        )


def _sum_over_ranks(reducer: GradientReducer, part: float) -> float:
    total = 0.0
    for value in all_gather_array(reducer.transport, np.array(part), "ds_plugin.norm"):
        total += float(value)
    return total
