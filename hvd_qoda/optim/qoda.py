"""QODA: quantized optimistic dual averaging, one exchange of dual vectors per step."""

from collections.abc import Callable
from typing import ClassVar, overload

import torch

from hvd_qoda.errors import ConfigError
from hvd_qoda.optim.averaging import include_in_average
from hvd_qoda.optim.dual_averaging import DualAveragingOptimizer, Parameters, Part, begin, check_worker_sum
from hvd_qoda.optim.norms import SquaredNorm
from hvd_qoda.optim.state import (
    Closure,
    Group,
    State,
    check_choice,
    check_not_negative,
    evaluate,
    new_step_counter,
    zeros_of_state,
)
from hvd_qoda.optim.worker_norms import WorkerNorms, WorkerNormsSource

_NOTHING_SUMMED = {"squared_changes": 0.0, "squared_norms": 0.0, "squared_moves": 0.0, "gamma": 1.0, "eta": 1.0}


class QODA(DualAveragingOptimizer):
    r"""Quantized optimistic dual averaging (arXiv 2505.14371), exact, for one or many workers.

    With the mean dual vector :math:`g_t = \frac1K \sum_k \hat V_{k,t+1/2}`, :math:`g_0 = 0`, :math:`Y_1 = 0`::

        X_{t+1/2} = X_t - gamma_t g_{t-1}          (no oracle call, no exchange)
        Y_{t+1}   = Y_t - g_t
        X_{t+1}   = X_1 + eta_{t+1} Y_{t+1}

    (the three update lines: paper). The model holds :math:`X_{t+1/2}` while gradients are computed; ``step()`` takes
    ``p.grad`` as :math:`g_t`, after the host has averaged it, and writes :math:`X_{t+3/2}` into the parameters.
    :math:`X_1` is what the parameters hold at the first step that brings a non-zero gradient. The result that the paper
    speaks of is the average of :math:`X_{t+1/2}`: see `averaged_parameters`.

    Learning rates, with sums over the whole model in float64 (recalled from the paper, its wording was not at hand):

    - ``rates="equal"``:
      :math:`\eta_t = \gamma_t = (1 + \sum_{s<t} |\hat V_{s+1/2} - \hat V_{s-1/2}|^2)^{-1/2}`;
    - ``rates="separated"``, needing no almost-sure bound:
      :math:`\gamma_t = (1 + \sum_{s\le t-2} |\hat V_{s+1/2}|^2)^{\hat q - 1/2}`,
      :math:`\eta_t = (1 + \sum_{s\le t-2} (|\hat V_{s+1/2}|^2 + |X_s - X_{s+1}|^2))^{-1/2}`.

    What the squared norm of the dual vectors is for K workers could not be confirmed either, so it is an option:
    ``sum_over="mean"`` takes that of the mean, ``sum_over="workers"`` takes :math:`\sum_k |\cdot_k|^2 / K^2`. For one
    worker the two are equal.

    lr: base rate that multiplies gamma and eta; 1 in the paper. It scales the whole way from :math:`X_1`, not only the
    next step: lowering it (with a scheduler) draws the parameters back towards :math:`X_1`. It may differ between
    groups. q_hat: exponent of ``rates="separated"``, in (0, 1/4].
    worker_norms: for ``sum_over="workers"``, where the norms of the exchange just finished come from, called once per
    step. It belongs to the process: it is not part of ``state_dict()``, and loading keeps it.
    gradient_scale: for ``sum_over="workers"``, c, where ``p.grad`` is c times the mean of the vectors that were
    exchanged (``op=Average``: 1; ``op=Sum``: K; gradients exchanged under a constant loss scale s and unscaled before
    the step: 1/s). The worker norms are multiplied by its square. Clipped gradients, or a loss scale that changes, have
    no such c: use ``sum_over="mean"``.
    average: keep the averaged iterate (one buffer more).
    sum_of_parts: where this process holds only a part of the model (ZeRO), adds up the processes' squared norms; called
    with this part's, on every process alike. Like ``worker_norms`` it belongs to the process.

    State per parameter, in float32 (float64 for float64 parameters): X_1, Y, the average, and the previous dual vector
    where the rates need it. A parameter without gradient takes part from its first gradient on; later, a missing
    gradient counts as zero, as under Horovod. What others write into a parameter after its first step is overwritten by
    the next. As for other optimizers, non-finite gradients spoil the state for good: skip such steps.

    Raises `ConfigError` for impossible options, and for ``sum_over="workers"`` without ``gradient_scale``;
    `UnsupportedError` for ``sum_over="workers"`` without ``worker_norms``,
    for sparse gradients and for complex or integer parameters.
    """

    MODEL_WIDE_OPTIONS: ClassVar[tuple[str, ...]] = (
        "rates",
        "q_hat",
        "sum_over",
        "worker_norms",
        "gradient_scale",
        "average",
        "sum_of_parts",
        *_NOTHING_SUMMED,
    )
    UNSAVED_OPTIONS: ClassVar[tuple[str, ...]] = ("worker_norms", "sum_of_parts")

    def __init__(
        self,
        params: Parameters,
        lr: float = 1.0,
        *,
        rates: str = "equal",
        q_hat: float = 0.25,
        sum_over: str = "mean",
        worker_norms: WorkerNormsSource | None = None,
        gradient_scale: float | None = None,
        average: bool = True,
        sum_of_parts: Callable[[float], float] | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "previous_lr": lr,
            "rates": rates,
            "q_hat": q_hat,
            "sum_over": sum_over,
            "worker_norms": worker_norms,
            "gradient_scale": gradient_scale,
            "average": average,
            "sum_of_parts": sum_of_parts,
        }
        super().__init__(params, {**options, **_NOTHING_SUMMED})
        # Groups taken over from another optimizer (by Horovod) come with its sums, but without its state.
        self._set_model_wide(**_NOTHING_SUMMED)

    def _check_options(self, options: Group) -> None:
        check_not_negative("lr", options["lr"])
        check_choice("rates", options["rates"], ("equal", "separated"))
        if not 0.0 < options["q_hat"] <= 0.25:
            raise ConfigError(f"q_hat must lie in (0, 1/4]; got {options['q_hat']!r}.")
        check_worker_sum(options)

    def _new_state(self, parameter: torch.Tensor, group: Group) -> State:
        names = ["anchor", "dual"]
        if group["rates"] == "equal" and group["sum_over"] == "mean":
            names.append("previous")
        if group["average"]:
            names.append("average")
        return {"step": new_step_counter(), **{name: zeros_of_state(parameter) for name in names}}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Take ``p.grad`` as the mean dual vector at X_{t+1/2} and write X_{t+3/2} into the parameters.

        Returns the closure's loss, if there is a closure; it is called once, before anything changes. Gradients that
        are all zero before the first real step change nothing: hosts step once with zeros to have state created.
        Raises `UnsupportedError` for sparse gradients (nothing has changed then).
        """
        self._refuse_while_averages_are_in("step()")
        loss = evaluate(closure)
        parts = self._taking_part()
        if parts:
            self._update(parts)
        return loss

    def _update(self, parts: list[Part]) -> None:
        options = self.param_groups[0]
        term = self._dual_term(parts)
        if term == 0.0 and not any(int(part.state["step"]) for part in parts):
            return
        if options["rates"] == "equal":
            changes = options["squared_changes"] + term
            gamma = eta = (1.0 + changes) ** -0.5
            self._move(parts, gamma, eta)
            self._set_model_wide(squared_changes=changes, gamma=gamma, eta=eta)
        else:
            # The sums end at s = t - 1 for gamma_{t+1} and eta_{t+1}: this step's terms count from the next step on.
            norms, moves = options["squared_norms"], options["squared_moves"]
            gamma = (1.0 + norms) ** (options["q_hat"] - 0.5)
            eta = (1.0 + norms + moves) ** -0.5
            moved = self._move(parts, gamma, eta)
            self._set_model_wide(squared_norms=norms + term, squared_moves=moves + moved, gamma=gamma, eta=eta)

    def _dual_term(self, parts: list[Part]) -> float:
        """What this step adds to the sum: the squared change (equal rates) or norm (separated) of the dual vectors."""
        options = self.param_groups[0]
        equal = options["rates"] == "equal"
        if options["sum_over"] == "workers":
            norms: WorkerNorms = options["worker_norms"]()
            scale = options["gradient_scale"]
            return norms.change_term(scale) if equal else norms.norm_term(scale)
        squared = SquaredNorm()
        for part in parts:
            squared.add(part.dual_vector - part.state["previous"] if equal else part.dual_vector)
        return self._over_model(squared)

    def _move(self, parts: list[Part], gamma: float, eta: float) -> float:
        """Write X_{t+3/2}; returns |X_t - X_{t+1}|^2 over the model for separated rates, else 0."""
        separated = self.param_groups[0]["rates"] == "separated"
        old_eta = self.param_groups[0]["eta"]
        moved = SquaredNorm()
        for part in parts:
            state, lr = part.state, float(part.group["lr"])
            begin(part)
            include_in_average(state, part.parameter)
            old_displacement = state["dual"] * (part.group["previous_lr"] * old_eta) if separated else None
            state["dual"].sub_(part.dual_vector)
            displacement = state["dual"] * (lr * eta)
            if old_displacement is not None:
                moved.add(displacement - old_displacement)
            part.parameter.copy_(displacement.add_(state["anchor"]).sub_(part.dual_vector, alpha=lr * gamma))
            if "previous" in state:
                state["previous"].copy_(part.dual_vector)
        for group in self.param_groups:
            group["previous_lr"] = float(group["lr"])
        return self._over_model(moved) if separated else 0.0

    def _over_model(self, squared: SquaredNorm) -> float:
        sum_of_parts = self.param_groups[0]["sum_of_parts"]
        return squared.value() if sum_of_parts is None else sum_of_parts(squared.value())
