"""The convolutional network for digits, at any width."""

import torch
from torch import nn

SIZES = {"small": 0.5, "medium": 1.0, "large": 2.0}
_CHANNELS = (16, 32, 64)
_HIDDEN = 264
_CELLS = 4
_GROUPS = 8
CLASSES = 10


def width_of(size: str) -> float:
    """The width factor that `--model-size` names: small, medium, large, or a positive number.

    Raises ValueError for anything else.
    """
    if size in SIZES:
        return SIZES[size]
    try:
        width = float(size)
    except ValueError:
        width = 0.0
    if not 0.0 < width <= 64.0:
        raise ValueError(f"model size {size!r}: give {', '.join(SIZES)} or a width factor above 0 and up to 64")
    return width


class DigitNet(nn.Module):
    """Three convolutions with group normalisation, one hidden layer, ten outputs; 296,770 parameters at width 1.

    Takes images float32 [n, 1, side, side], side 8 or more, and returns logits float32 [n, 10]. Channels and hidden
    units grow with `width`, so parameters grow with its square. Group normalisation keeps no running averages, so all
    that differs between ranks is in the gradients.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, third = (_rounded(channels * width) for channels in _CHANNELS)
        hidden = _rounded(_HIDDEN * width)
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.GroupNorm(_GROUPS, first),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.GroupNorm(_GROUPS, second),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(second, third, 3, padding=1),
            nn.GroupNorm(_GROUPS, third),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(_CELLS),
        )
        self.hidden = nn.Linear(third * _CELLS * _CELLS, hidden)
        self.output = nn.Linear(hidden, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, 10] of `images` [n, 1, side, side]."""
        features = self.features(images).flatten(1)
        logits: torch.Tensor = self.output(torch.relu(self.hidden(features)))
        return logits


def _rounded(units: float) -> int:
    """The nearest multiple of the group count, at least one group."""
    return max(_GROUPS, int(units / _GROUPS + 0.5) * _GROUPS)


def parameter_count(model: nn.Module) -> int:
    """Number of trainable values in `model`."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
