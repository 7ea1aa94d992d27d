"""Gradients on their way to and from the CPU codecs."""

import logging
from collections.abc import Callable
from functools import cache

import torch

__all__ = ["cpu_values", "written_back"]

_logger = logging.getLogger(__name__)


def cpu_values(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's elements in row-major order, whatever its strides and device: a contiguous 1-D CPU tensor.

    Shares memory with the gradient where it can.
    """
    if gradient.device.type != "cpu":
        _warn_of_staging(gradient.device.type)
    return gradient.detach().cpu().reshape(-1)


def written_back(gradient: torch.Tensor, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Let `fill` write new elements, and return a tensor that holds them in the gradient's shape.

    Args:
        gradient: gives shape, dtype and device. Where it is contiguous and on the CPU its own memory is written.
        fill: writes a contiguous 1-D CPU tensor of the gradient's dtype.
    """
    if gradient.device.type == "cpu" and gradient.is_contiguous():
        fill(gradient.detach().view(-1))
        return gradient
    values = torch.empty(gradient.numel(), dtype=gradient.dtype)
    fill(values)
    # Not into the gradient itself: several of its elements may lie in one place (an expanded tensor).
    result = torch.empty_like(gradient, requires_grad=False)
    result.copy_(values.view(gradient.shape))
    return result


@cache
def _warn_of_staging(device_type: str) -> None:
    """Once per process."""
    _logger.warning(
        "gradients on %s are copied to the CPU, quantized there, and copied back; this costs time in every step",
        device_type,
    )
