"""Optimizer state that survives Horovod's wrapping and broadcast, checkpoints, and parameters of reduced precision.

Three habits of the hosts shape this class.

- ``hvd.DistributedOptimizer`` builds a second optimizer from ``param_groups`` alone: whatever is not in a group is
lost.
  So every option lives in the groups, and options that concern the whole model stand in each of them, equal.
- ``hvd.broadcast_optimizer_state`` sends the tensors of each parameter's state and the options of each group, by name.
A
  rank that resumes from a checkpoint and one that starts afresh must hold the same names, and an empty state makes it
  run a step with zero gradients. So all tensors exist from construction on, with ``step = 0`` where nothing has
  happened yet, and sums over the model are Python floats in the groups, which travel exactly.
- ``torch.optim.Optimizer.load_state_dict`` casts state to the dtype of its parameter and shares tensors with the
  dictionary it was given. Here state is kept in float32 for half-precision parameters, so it is copied as it was saved.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from hvd_qoda.errors import ConfigError, UnsupportedError

Group = dict[str, Any]
State = dict[str, torch.Tensor]
Closure = Callable[[], float]


def state_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Dtype in which the state of `parameter` is kept: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def zeros_of_state(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape and device of `parameter`, in the dtype of its state."""
    return torch.zeros_like(parameter, dtype=state_dtype(parameter), requires_grad=False)


def new_step_counter() -> torch.Tensor:
    """A counter at 0: int64, no dimensions, on the CPU whatever the device of the parameter."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


class EagerStateOptimizer(Optimizer):
    """Base of the optimizers here: state from construction on, model-wide options, exact ``state_dict`` round trips.

    Subclasses name their options and define `_check_options` and `_new_state`.
    """

    MODEL_WIDE_OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Group options that are one value for the whole model."""
    UNSAVED_OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Model-wide options that belong to the running process: left out of ``state_dict`` and kept on loading."""

    def _check_options(self, options: Group) -> None:
        """Raise `ConfigError` or `UnsupportedError` where the options of a group cannot be."""
        raise NotImplementedError

    def _new_state(self, parameter: torch.Tensor, group: Group) -> State:
        """The state of a parameter before its first step."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; options that are model-wide are taken from the groups that are there.

        Raises `ConfigError` where a model-wide option differs, and `UnsupportedError` for parameters that are not real
        floating-point tensors.
        """
        inherited = {name: self.param_groups[0][name] for name in self.MODEL_WIDE_OPTIONS} if self.param_groups else {}
        for name, value in inherited.items():
            if param_group.get(name, value) != value:
                raise ConfigError(
                    f"{name} is one value for the whole model: this parameter group says {param_group[name]!r}, "
                    f"the first one {value!r}."
                )
        options = {**self.defaults, **inherited, **{k: v for k, v in param_group.items() if k != "params"}}
        self._check_options(options)
        param_group.update(options)
        super().add_param_group(param_group)
        for parameter in param_group["params"]:
            if not parameter.is_floating_point():
                self.param_groups.pop()
                raise UnsupportedError(
                    f"{type(self).__name__} optimizes real floating-point parameters; got one of {parameter.dtype}."
                )
        self._prepare_state()

    def state_dict(self) -> dict[str, Any]:
        """State and options, without what belongs to the running process (`UNSAVED_OPTIONS`)."""
        self._prepare_state()
        self.forget_state_of_others()
        packed: dict[str, Any] = super().state_dict()
        for group in packed["param_groups"]:
            for name in self.UNSAVED_OPTIONS:
                group.pop(name, None)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and options; going on gives the bits of the optimizer that was saved.

        Raises `ConfigError` where options are missing (the state of some other optimizer) or impossible.
        """
        unsaved = {name: self.param_groups[0][name] for name in self.UNSAVED_OPTIONS}
        final: dict[str, Any] = {}

        def examine(_: Optimizer, saved: dict[str, Any]) -> None:
            for group in saved["param_groups"]:
                self._check_loaded_options({**group, **unsaved})
            final.update(saved)

        # Registered last, so that it sees what the caller's own hooks have made of the dictionary.
        handle = self.register_load_state_dict_pre_hook(examine)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group in self.param_groups:
            group.update(unsaved)
        self._copy_saved_tensors(final)
        self._prepare_state()
        self.forget_state_of_others()

    def _check_loaded_options(self, options: Group) -> None:
        missing = sorted(set(self.defaults) - set(options))
        if missing:
            raise ConfigError(
                f"this is not a state_dict of {type(self).__name__}: its parameter groups lack {', '.join(missing)}."
            )
        self._check_options(options)

    def _copy_saved_tensors(self, saved: dict[str, Any]) -> None:
        saved_ids: Iterable[int] = chain.from_iterable(group["params"] for group in saved["param_groups"])
        for saved_id, parameter in zip(saved_ids, self._parameters(), strict=True):
            for name, value in saved["state"].get(saved_id, {}).items():
                device = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.detach().to(device=device, copy=True)

    def _parameters(self) -> Iterable[torch.Tensor]:
        """All parameters, in the order of the groups."""
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _prepare_state(self) -> None:
        """Give every trainable parameter its state, on its device.

        Hosts exchange parameters behind the optimizer's back: ``model.to(device)``, unfreezing, ZeRO's partitions.
        State of parameters that no group holds stays: ZeRO steps one group at a time and hides the others meanwhile.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state:
                    for name, value in state.items():
                        if name != "step" and value.device != parameter.device:
                            state[name] = value.to(parameter.device)
                elif parameter.requires_grad or parameter.grad is not None:
                    self.state[parameter] = self._new_state(parameter, group)

    def forget_state_of_others(self) -> None:
        """Drop the state of parameters that no group holds, as after a host has put its own in their place."""
        held = set(self._parameters())
        for parameter in [key for key in self.state if key not in held]:
            del self.state[parameter]

    def _refuse_sparse_gradients(self) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UnsupportedError(
                    f"{type(self).__name__} keeps dense state and takes no sparse gradients (parameter of shape "
                    f"{tuple(parameter.shape)}): build the embedding with sparse=False."
                )


def evaluate(closure: Closure | None) -> float | None:
    """The closure's loss, computed with gradients enabled; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_positive(name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` is a finite number above 0."""
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number; got {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` is a finite number of at least 0."""
    if not 0.0 <= value < float("inf"):
        raise ConfigError(f"{name} must be 0 or a positive number; got {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
