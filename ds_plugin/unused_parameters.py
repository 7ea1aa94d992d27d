"""Parameters that a rank has not used in a backward pass of ZeRO 1 and 2.

Alone, ZeRO lays the gradients that came into buckets and adds those up place by place. Ranks that have used different
layers (an adapter per task, a layer dropped at random) so add gradients of different parameters. With the plug-in a
rank sends zeros for what it has not used, as DeepSpeed does without ZeRO; ranks then have the same parameters in their
buckets, in whatever order, and the reducer puts them in order.

A bucket that is full before backward ends is sent at once, and must hold the same parameters on every rank: where they
do not, the reducer raises.
"""

from typing import Any

import torch

__all__ = ["send_zeros"]


def send_zeros(optimizer: Any) -> None:
    """Give every unused parameter a gradient of zeros, before the last buckets of a backward pass are reduced.

    Args:
        optimizer: ZeRO's, of stage 1 or 2.
    """
    if not optimizer.ignore_unused_parameters:  # then DeepSpeed says which ones are unused
        return
    in_buckets = {entry[2] for bucket in optimizer.ipg_buckets.values() for entry in bucket.params}
    unused = [
        (group, parameter)
        for group, parameters in enumerate(optimizer.bit16_groups)
        for parameter in parameters
        if parameter.requires_grad
        and parameter.numel()
        and optimizer.get_gradient_for_reduction(parameter) is None
        and optimizer.get_param_id(parameter) not in in_buckets
        and not optimizer.params_already_reduced[optimizer.get_param_id(parameter)]
    ]
    by_hooks = optimizer.partition_gradients or optimizer.overlap_comm  # else DeepSpeed lays them into buckets later
    if unused and by_hooks:
        optimizer.setup_buckets()
    for group, parameter in unused:
        if optimizer.use_grad_accum_attribute:
            parameter.grad_accum = torch.zeros_like(parameter, dtype=optimizer.gradient_accumulation_dtype)
        else:
            parameter.grad = torch.zeros_like(parameter)
        if by_hooks:
            optimizer.reduce_independent_p_g_buckets_and_remove_grads(parameter, group)
