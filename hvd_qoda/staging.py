"""Gradients on their way to and from the codecs, which know real numbers only: complex ones are pairs of them."""

from collections.abc import Callable

import torch

__all__ = ["cpu_values", "result_buffer", "stored", "values_on", "written_back"]

_CPU = torch.device("cpu")


def values_on(device: torch.device, gradient: torch.Tensor) -> torch.Tensor:
    """A gradient's elements in row-major order, whatever its strides and device: a contiguous 1-D tensor on a device.

    Shares memory with the gradient where it can.
    """
    return _real(gradient.detach().to(device)).resolve_neg().reshape(-1)


def cpu_values(gradient: torch.Tensor) -> torch.Tensor:
    """`values_on` the CPU."""
    return values_on(_CPU, gradient)


def result_buffer(gradient: torch.Tensor, device: torch.device = _CPU) -> torch.Tensor:
    """Where new elements of a gradient are to be written: a contiguous 1-D tensor of its (real) dtype on a device.

    The gradient's own memory where it is contiguous and there. To be given to `stored`.
    """
    if gradient.device == device and _is_plain(gradient):
        return _real(gradient.detach()).view(-1)
    return _real(torch.empty(gradient.numel(), dtype=gradient.dtype, device=device)).view(-1)


def stored(gradient: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor that holds the new elements in the gradient's shape and on its device.

    Args:
        gradient: the gradient itself is returned if `result_buffer` has given its own memory.
        values: what `result_buffer` returned for it, written.
    """
    if gradient.device == values.device and _is_plain(gradient):
        return gradient
    # Not into the gradient itself: several of its elements may lie in one place (an expanded tensor).
    result = torch.empty_like(gradient, requires_grad=False)
    _real(result).copy_(values.view(_real(result).shape))
    return result


def written_back(
    gradient: torch.Tensor, fill: Callable[[torch.Tensor], None], device: torch.device = _CPU
) -> torch.Tensor:
    """Let `fill` write new elements, and return a tensor that holds them in the gradient's shape.

    Args:
        gradient: gives shape, dtype and device. Where it is contiguous and on the device its own memory is written.
        fill: writes a contiguous 1-D tensor of the gradient's dtype, or that of its real part.
        device: where that tensor is to lie.
    """
    values = result_buffer(gradient, device)
    fill(values)
    return stored(gradient, values)


def _is_plain(gradient: torch.Tensor) -> bool:
    """Whether the elements lie in memory in row-major order, as they are: a conjugate may be a mere mark."""
    return gradient.is_contiguous() and not gradient.is_conj() and not gradient.is_neg()


def _real(values: torch.Tensor) -> torch.Tensor:
    """A complex tensor as a real one, whose last dimension has the real and the imaginary part; others as they are."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
