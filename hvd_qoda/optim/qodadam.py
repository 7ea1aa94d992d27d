"""QODAdam: the optimistic form of Adam, for networks."""

import math
from typing import overload

import torch

from hvd_qoda.errors import ConfigError
from hvd_qoda.optim.dual_averaging import Parameters
from hvd_qoda.optim.state import (
    Closure,
    EagerStateOptimizer,
    Group,
    State,
    check_not_negative,
    evaluate,
    new_step_counter,
    state_dtype,
    zeros_of_state,
)


class QODAdam(EagerStateOptimizer):
    r"""Optimistic Adam: QODA's reuse of the previous dual vector, with Adam's step per coordinate.

    With gradient :math:`g_t`, bias-corrected moments :math:`\hat m_t = (1-\beta_1) \sum_{s \le t} \beta_1^{t-s} g_s /
    (1-\beta_1^t)`, :math:`\hat v_t` alike of :math:`g_s^2`, and :math:`u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon)`::

        p <- p - 2 a u_t + a u_{t-1},          u_0 = 0

    (the form in the GAN code that the authors of QODA released; optimistic Adam, arXiv 1711.00141). Written as in
    `QODA`, the model holds the extrapolated point: with :math:`p_t = Z_t - a u_{t-1}`, :math:`Z_{t+1} = Z_t - a u_t`
    and :math:`p_{t+1} = Z_{t+1} - a u_t`. That is how it is computed, so where a schedule changes a, the extrapolation
    that is taken back is the one that was made. weight_decay is decoupled: :math:`Z_{t+1} = (1 - a w) Z_t - a u_t`.

    lr: a. betas: decay of the two moments, each in [0, 1). eps: added to the root. weight_decay: w. All may differ
    between groups. The GAN code has betas of (0.5, 0.9); on small classifiers those, and (0.5, 0.999), learnt more
    slowly in the first few hundred steps than Adam's (0.9, 0.999), which are the default here.

    State per parameter, in float32 (float64 for float64 parameters): both moments and the extrapolation a u_{t-1}. A
    half-precision parameter is rounded once per step; no float32 copy of it is kept. A parameter without gradient is
    left alone. Raises `ConfigError` for impossible options, `UnsupportedError` for sparse gradients and for complex or
    integer parameters.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check_options(self, options: Group) -> None:
        check_not_negative("lr", options["lr"])
        check_not_negative("eps", options["eps"])
        check_not_negative("weight_decay", options["weight_decay"])
        betas = options["betas"]
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas must be two numbers in [0, 1); got {betas!r}.")

    def _new_state(self, parameter: torch.Tensor, group: Group) -> State:
        names = ("first_moment", "second_moment", "extrapolation")
        return {"step": new_step_counter(), **{name: zeros_of_state(parameter) for name in names}}

    def step_sizes(self) -> dict[str, float]:
        """The base rate, as both ``gamma`` and ``eta``; of further groups as ``gamma/1``, ``eta/1``, ..."""
        sizes = {}
        for index, group in enumerate(self.param_groups):
            suffix = f"/{index}" if index else ""
            sizes["gamma" + suffix] = sizes["eta" + suffix] = float(group["lr"])
        return sizes

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss, if there is a closure.

        Raises `UnsupportedError` for sparse gradients (nothing has changed then).
        """
        loss = evaluate(closure)
        self._refuse_sparse_gradients()
        self._prepare_state()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update(parameter: torch.Tensor, gradient: torch.Tensor, state: State, group: Group) -> None:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    gradient = gradient.to(state_dtype(parameter))
    state["step"] += 1
    step = int(state["step"])
    first, second, extrapolation = state["first_moment"], state["second_moment"], state["extrapolation"]

    # For half-precision parameters a float32 copy is worked on, and rounded into the parameter at the end.
    point = parameter.to(extrapolation.dtype)
    point.add_(extrapolation)
    if group["weight_decay"]:
        point.mul_(1.0 - lr * group["weight_decay"])
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = second.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    torch.div(first, root, out=extrapolation)
    extrapolation.mul_(lr / (1.0 - beta1**step))
    point.sub_(extrapolation, alpha=2.0)
    if point is not parameter:
        parameter.copy_(point)
