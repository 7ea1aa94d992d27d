"""The optimizers that a training run can be told to use."""

import torch
from torch import nn

from hvd_qoda.optim import QODA, QODAdam
from launch.train.options import Options

_MOMENTUM = 0.9
# Adam's own: on this network QODAdam learns faster with them than with a smaller first one.
_BETAS = (0.9, 0.999)


def build_optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `options` name, over the parameters of `model`.

    qoda: exact QODA, equal rates (arXiv 2505.14371); qodadam: its form for networks, with Adam's betas; sgd: with
    momentum 0.9. Raises ValueError for another name.
    """
    parameters, rate = model.parameters(), options.learning_rate
    match options.optimizer:
        case "qoda":
            return QODA(parameters, lr=rate, rates="equal")
        case "qodadam":
            return QODAdam(parameters, lr=rate, betas=_BETAS)
        case "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=_MOMENTUM)
        case "adam":
            return torch.optim.Adam(parameters, lr=rate, betas=_BETAS)
    raise ValueError(f"optimizer {options.optimizer!r} is not known")


def step_sizes(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The step sizes of the step just made, by name: gamma and eta where the optimizer adapts them, else the rate."""
    own = getattr(optimizer, "step_sizes", None)
    return dict(own()) if own is not None else {"lr": float(optimizer.param_groups[0]["lr"])}
