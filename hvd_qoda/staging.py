"""Gradients on their way to and from the codecs."""

from collections.abc import Callable

import torch

__all__ = ["cpu_values", "result_buffer", "stored", "values_on", "written_back"]

_CPU = torch.device("cpu")


def values_on(device: torch.device, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's elements in row-major order, whatever its strides and device: a contiguous 1-D tensor on a device.

    Shares memory with the gradient where it can.
    """
    return gradient.detach().to(device).reshape(-1)


def cpu_values(gradient: torch.Tensor) -> torch.Tensor:
    """`values_on` the CPU."""
    return values_on(_CPU, gradient)


def result_buffer(gradient: torch.Tensor, device: torch.device = _CPU) -> torch.Tensor:
    """Where new elements of a gradient are to be written: a contiguous 1-D tensor of its dtype on a device.

    The gradient's own memory where it is contiguous and there. To be given to `stored`.
    """
    if gradient.device == device and gradient.is_contiguous():
        return gradient.detach().view(-1)
    return torch.empty(gradient.numel(), dtype=gradient.dtype, device=device)


def stored(gradient: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor that holds the new elements in the gradient's shape and on its device.

    Args:
        gradient: the gradient itself is returned if `result_buffer` has given its own memory.
        values: what `result_buffer` returned for it, written.
    """
    if gradient.device == values.device and gradient.is_contiguous():
        return gradient
    # Not into the gradient itself: several of its elements may lie in one place (an expanded tensor).
    result = torch.empty_like(gradient, requires_grad=False)
    result.copy_(values.view(gradient.shape))
    return result


def written_back(
    gradient: torch.Tensor, fill: Callable[[torch.Tensor], None], device: torch.device = _CPU
) -> torch.Tensor:
    """Let `fill` write new elements, and return a tensor that holds them in the gradient's shape.

    Args:
        gradient: gives shape, dtype and device. Where it is contiguous and on the device its own memory is written.
        fill: writes a contiguous 1-D tensor of the gradient's dtype.
        device: where that tensor is to lie.
    """
    values = result_buffer(gradient, device)
    fill(values)
    return stored(gradient, values)
