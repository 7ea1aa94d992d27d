"""What QODA and Q-GenX share: a model's part in one step, sums over the model, step sizes, the choice of worker sum."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.optim.averaging import AveragedIterateOptimizer
from hvd_qoda.optim.state import Group, State, check_choice, check_positive, state_dtype, zeros_of_state

Parameters = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Part:
    """A parameter that takes part in a step, with that step's mean dual vector in the dtype of its state."""

    parameter: torch.Tensor
    dual_vector: torch.Tensor
    state: State
    group: Group


class DualAveragingOptimizer(AveragedIterateOptimizer):
    """Base of the optimizers whose iterate is ``X_1 + eta Y`` with model-wide adaptive step sizes.

    A parameter without gradient takes part from its first gradient on; later, a missing gradient counts as zero, which
    is what Horovod makes of it. Frozen parameters do not move.
    """

    def step_sizes(self) -> dict[str, float]:
        """Step sizes as last computed, base rate included: ``gamma`` (extrapolation) and ``eta`` (the way from X_1).

        They are those of the first group; further groups, with their own base rates, follow as ``gamma/1``, ``eta/1``,
        ...
        """
        sizes = {}
        for index, group in enumerate(self.param_groups):
            suffix = f"/{index}" if index else ""
            for name in ("gamma", "eta"):
                sizes[name + suffix] = float(group["lr"]) * group[name]
        return sizes

    def _taking_part(self) -> list[Part]:
        self._refuse_sparse_gradients()
        self._prepare_state()
        parts = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    dual_vector = parameter.grad.to(state_dtype(parameter))
                elif parameter.requires_grad and int(self.state[parameter]["step"]) > 0:
                    dual_vector = zeros_of_state(parameter)
                else:
                    continue
                parts.append(Part(parameter, dual_vector, self.state[parameter], group))
        return parts

    def _set_model_wide(self, **values: float) -> None:
        for group in self.param_groups:
            group.update(values)


def check_worker_sum(options: Group) -> None:
    """Raise unless ``sum_over``, ``worker_norms`` and ``gradient_scale`` go together."""
    check_choice("sum_over", options["sum_over"], ("mean", "workers"))
    if options["gradient_scale"] is not None:
        check_positive("gradient_scale", options["gradient_scale"])
    if options["sum_over"] != "workers":
        return
    if options["worker_norms"] is None:
        raise UnsupportedError(
            'sum_over="workers" needs worker_norms, a source of the single workers\' norms: the averaged gradient does '
            "not hold them. Pass the worker_norms of a compressor that was built with worker_norms=True, or use "
            'sum_over="mean" (for one worker the two are equal).'
        )
    if options["gradient_scale"] is None:
        raise ConfigError(
            'sum_over="workers" needs gradient_scale: the workers\' norms are those of what was exchanged, and the '
            "gradient may have been scaled since. It is 1.0 where the host averages (op=hvd.Average), the number of "
            "ranks where it adds up (op=hvd.Sum)."
        )


def begin(part: Part) -> None:
    """Count a step of the parameter; at its first, what the parameter holds becomes X_1."""
    if int(part.state["step"]) == 0:
        part.state["anchor"].copy_(part.parameter)
    part.state["step"] += 1
