"""Gradients on their way to and from the CPU codecs."""

import logging
from collections.abc import Callable
from functools import cache

import torch

__all__ = ["cpu_values", "result_buffer", "stored", "written_back"]

_logger = logging.getLogger(__name__)


def cpu_values(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's elements in row-major order, whatever its strides and device: a contiguous 1-D CPU tensor.

    Shares memory with the gradient where it can.
    """
    if gradient.device.type != "cpu":
        _warn_of_staging(gradient.device.type)
    return gradient.detach().cpu().reshape(-1)


def result_buffer(gradient: torch.Tensor) -> torch.Tensor:
    """Where new elements of a gradient are to be written: a contiguous 1-D CPU tensor of its dtype, for `stored`.

    The gradient's own memory where it is contiguous and on the CPU.
    """
    if _is_plain(gradient):
        return gradient.detach().view(-1)
    return torch.empty(gradient.numel(), dtype=gradient.dtype)


def stored(gradient: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor that holds the new elements in the gradient's shape and on its device.

    Args:
        gradient: the gradient itself is returned if `result_buffer` has given its own memory.
        values: what `result_buffer` returned for it, written.
    """
    if _is_plain(gradient):
        return gradient
    # Not into the gradient itself: several of its elements may lie in one place (an expanded tensor).
    result = torch.empty_like(gradient, requires_grad=False)
    result.copy_(values.view(gradient.shape))
    return result


def written_back(gradient: torch.Tensor, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Let `fill` write new elements, and return a tensor that holds them in the gradient's shape.

    Args:
        gradient: gives shape, dtype and device. Where it is contiguous and on the CPU its own memory is written.
        fill: writes a contiguous 1-D CPU tensor of the gradient's dtype.
    """
    values = result_buffer(gradient)
    fill(values)
    return stored(gradient, values)


def _is_plain(gradient: torch.Tensor) -> bool:
    return gradient.device.type == "cpu" and gradient.is_contiguous()


@cache
def _warn_of_staging(device_type: str) -> None:
    """Once per process."""
    _logger.warning(
        "gradients on %s are copied to the CPU, quantized there, and copied back; this costs time in every step",
        device_type,
    )
