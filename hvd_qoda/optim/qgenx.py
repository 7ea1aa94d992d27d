"""Q-GenX: the quantized extra-gradient method that QODA is compared with; two exchanges of dual vectors per step."""

from typing import ClassVar, overload

import torch

from hvd_qoda.errors import ConfigError, UnsupportedError
from hvd_qoda.optim.averaging import include_in_average
from hvd_qoda.optim.dual_averaging import DualAveragingOptimizer, Parameters, Part, begin, check_worker_sum
from hvd_qoda.optim.norms import SquaredNorm
from hvd_qoda.optim.state import Closure, Group, State, check_not_negative, evaluate, new_step_counter, zeros_of_state
from hvd_qoda.optim.worker_norms import WorkerNorms, WorkerNormsSource


class QGenX(DualAveragingOptimizer):
    r"""Quantized generalized extra-gradient (arXiv 2308.09187), in its dual-extrapolation form.

    With the mean dual vectors :math:`g_t` at :math:`X_t` and :math:`g_{t+1/2}` at :math:`X_{t+1/2}`, both exchanged::

        X_{t+1/2} = X_t - gamma_t g_t
        Y_{t+1}   = Y_t - g_{t+1/2}
        X_{t+1}   = X_1 + gamma_{t+1} Y_{t+1}

    :math:`\gamma_t = K (1 + \sum_{s<t} \sum_k |\hat V_{k,s} - \hat V_{k,s+1/2}|^2)^{-1/2}` (all of it recalled from the
    paper, whose wording was not at hand). ``sum_over="workers"`` is this formula; ``sum_over="mean"`` puts
    :math:`K^2 |g_s - g_{s+1/2}|^2` for the inner sum, which needs the mean only. For one worker the two are equal.

    Between steps the model holds :math:`X_t`; a step has two phases::

        loss().backward(); optimizer.extrapolate(); optimizer.zero_grad()     # at X_t, moves to X_{t+1/2}
        loss().backward(); optimizer.step(); optimizer.zero_grad()            # at X_{t+1/2}, moves to X_{t+1}

    or one call, ``optimizer.step(closure)``, whose closure clears gradients, computes the loss, runs backward and
    returns the loss. With Horovod's optimizer around it, each backward is followed by ``optimizer.synchronize()``, and
    the step is taken under ``optimizer.skip_synchronize()``; a closure calls ``optimizer.synchronize()`` itself, last.

    lr: base rate that multiplies gamma (see `QODA` on what changing it means). world_size: K.
    sum_over, worker_norms, gradient_scale, average and the handling of missing gradients: as in `QODA`. The source of
    norms is called once per step, after the second exchange, and must report the change since the first.

    Raises `ConfigError` for impossible options and where the source's world size is not `world_size`;
    `UnsupportedError` for ``sum_over="workers"`` without ``worker_norms``, for phases out of order, for sparse
    gradients and for complex or integer parameters.
    """

    MODEL_WIDE_OPTIONS: ClassVar[tuple[str, ...]] = (
        "world_size",
        "sum_over",
        "worker_norms",
        "gradient_scale",
        "average",
        "squared_changes",
        "gamma",
        "eta",
        "extrapolated",
    )
    UNSAVED_OPTIONS: ClassVar[tuple[str, ...]] = ("worker_norms",)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1.0,
        *,
        world_size: int = 1,
        sum_over: str = "mean",
        worker_norms: WorkerNormsSource | None = None,
        gradient_scale: float | None = None,
        average: bool = True,
    ) -> None:
        options = {
            "lr": lr,
            "previous_lr": lr,
            "world_size": world_size,
            "sum_over": sum_over,
            "worker_norms": worker_norms,
            "gradient_scale": gradient_scale,
            "average": average,
        }
        start = {"squared_changes": 0.0, "gamma": float(world_size), "eta": float(world_size), "extrapolated": False}
        super().__init__(params, {**options, **start})
        # Groups taken over from another optimizer (by Horovod) come with its sums, but without its state.
        workers = float(self.param_groups[0]["world_size"])
        self._set_model_wide(squared_changes=0.0, gamma=workers, eta=workers, extrapolated=False)

    def _check_options(self, options: Group) -> None:
        check_not_negative("lr", options["lr"])
        if not isinstance(options["world_size"], int) or options["world_size"] < 1:
            raise ConfigError(f"world_size is the number of workers, at least 1; got {options['world_size']!r}.")
        check_worker_sum(options)

    def _new_state(self, parameter: torch.Tensor, group: Group) -> State:
        names = ["anchor", "dual"]
        if group["sum_over"] == "mean":
            names.append("previous")
        if group["average"]:
            names.append("average")
        return {"step": new_step_counter(), **{name: zeros_of_state(parameter) for name in names}}

    @torch.no_grad()
    def extrapolate(self) -> None:
        """First phase: take ``p.grad`` as the mean dual vector at X_t and write X_{t+1/2} into the parameters."""
        self._refuse_while_averages_are_in("extrapolate()")
        self._refuse_unfinished_exchange()
        if self.param_groups[0]["extrapolated"]:
            raise UnsupportedError("extrapolate() was called twice without step() between.")
        gamma = self.param_groups[0]["gamma"]
        for part in self._taking_part():
            state, lr = part.state, float(part.group["lr"])
            begin(part)
            here = state["dual"] * (part.group["previous_lr"] * gamma)
            part.parameter.copy_(here.add_(state["anchor"]).sub_(part.dual_vector, alpha=lr * gamma))
            if "previous" in state:
                state["previous"].copy_(part.dual_vector)
        self._set_model_wide(extrapolated=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> float: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:
        """Second phase: take ``p.grad`` as the mean dual vector at X_{t+1/2} and write X_{t+1} into the parameters.

        A closure is called for each oracle call that the step still needs: twice, or once after `extrapolate`. Returns
        the loss of its first call. Raises `UnsupportedError` without closure and without `extrapolate` before.
        """
        self._refuse_while_averages_are_in("step()")
        extrapolated = self.param_groups[0]["extrapolated"]
        if closure is None and not extrapolated:
            raise UnsupportedError("QGenX.step() needs extrapolate() before it, or a closure: it has two oracle calls.")
        loss = evaluate(closure)
        if not extrapolated:
            self.extrapolate()
            evaluate(closure)
        self._refuse_unfinished_exchange()
        self._update(self._taking_part())
        return loss

    def _update(self, parts: list[Part]) -> None:
        options = self.param_groups[0]
        changes = options["squared_changes"] + self._change_term(parts)
        gamma = options["world_size"] * (1.0 + changes) ** -0.5
        for part in parts:
            state = part.state
            if int(state["step"]) == 0:
                begin(part)
            include_in_average(state, part.parameter)
            state["dual"].sub_(part.dual_vector)
            part.parameter.copy_(torch.add(state["anchor"], state["dual"], alpha=float(part.group["lr"]) * gamma))
        for group in self.param_groups:
            group["previous_lr"] = float(group["lr"])
        self._set_model_wide(squared_changes=changes, gamma=gamma, eta=gamma, extrapolated=False)

    def _change_term(self, parts: list[Part]) -> float:
        """What this step adds to the sum: ``sum_k |hatV_{k,t} - hatV_{k,t+1/2}|^2``, or K^2 times that of the mean."""
        options = self.param_groups[0]
        workers: int = options["world_size"]
        if options["sum_over"] == "workers":
            norms: WorkerNorms = options["worker_norms"]()
            if norms.world_size != workers:
                raise ConfigError(
                    f"world_size={workers} was given to QGenX, but its worker_norms counts {norms.world_size} workers."
                )
            return workers**2 * norms.change_term(options["gradient_scale"])
        squared = SquaredNorm()
        for part in parts:
            squared.add(part.dual_vector - part.state["previous"])
        return workers**2 * squared.value()

    def _refuse_unfinished_exchange(self) -> None:
        # Horovod's optimizer, built on this class, keeps the exchanges that backward has started here.
        if getattr(self, "_handles", None):
            raise UnsupportedError(
                "gradients are still being exchanged: call optimizer.synchronize() after each backward, "
                "in a closure as its last act."
            )
