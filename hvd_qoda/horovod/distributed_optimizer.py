"""The optimizer of the overlapping route: what `hvd.DistributedOptimizer` does, with gradients in fusion buffers.

As Horovod does, a class is made from the wrapped optimizer's, so that `isinstance`, learning rate schedulers and
`hvd.broadcast_optimizer_state` see the optimizer that they know; Horovod's functions recognise such classes by their
module. The new object takes over what the wrapped one holds, its state included.
"""

import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import horovod.torch as hvd
import horovod.torch.optimizer
import torch
from torch import nn

from hvd_qoda.compression import Compression
from hvd_qoda.errors import ConfigError, QodaError, UnsupportedError
from hvd_qoda.horovod.compressor import QodaCompressor
from hvd_qoda.horovod.fusion_buffers import Reduction
from hvd_qoda.horovod.gradient_exchange import Fusion, GradientExchange
from hvd_qoda.session import sparse_parameters

__all__ = ["build_optimizer"]

Groups = int | Sequence[Sequence[torch.Tensor]] | None


class _Overlapping(torch.optim.Optimizer):
    """Methods laid over the wrapped optimizer's class, whose own ones are found behind `super(self.__class__, self)`.

    `_gradient_exchange` is None where there is nobody to exchange gradients with.
    """

    _gradient_exchange: GradientExchange | None
    _synchronized: bool
    _should_synchronize: bool

    def synchronize(self) -> None:
        """Let the gradients be the ranks' mean or sum; a collective call. See `GradientExchange.synchronize`."""
        if self._gradient_exchange is not None:
            self._gradient_exchange.synchronize()
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`with optimizer.skip_synchronize(): optimizer.step()` after `synchronize()`, to change gradients between."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchange gradients and step.

        Gradients that a closure computes are exchanged behind each call of it, so that the optimizer sees the ranks'.
        """
        if not self._should_synchronize:
            self._synchronized = False
            return super(self.__class__, self).step(closure)
        if self._synchronized:
            warnings.warn(
                "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(): "
                "gradients are exchanged twice. Use `with optimizer.skip_synchronize(): optimizer.step()`",
                stacklevel=2,
            )
        if closure is None:
            self.synchronize()
            self._synchronized = False
            return super(self.__class__, self).step()

        def exchanged() -> Any:
            loss = closure()
            self.synchronize()
            return loss

        result = super(self.__class__, self).step(exchanged)
        self._synchronized = False
        return result

    # torch wraps the step of every class that has not been wrapped, to call hooks; the class below does so already.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`; not between `backward()` and `step()` or `synchronize()`."""
        if self._gradient_exchange is not None and self._gradient_exchange.has_begun:
            raise QodaError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(): the gradients are being exchanged"
            )
        super(self.__class__, self).zero_grad(set_to_none)

    def fusion_buffers(self) -> list[tuple[str, ...]]:
        """Names of the parameters in every fusion buffer, in the order in which buffers are sent; after a step."""
        return [] if self._gradient_exchange is None else self._gradient_exchange.fusion_buffers

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Backward passes whose gradients are added up before they are exchanged; between steps."""
        if passes < 1:
            raise ConfigError(f"backward_passes_per_step={passes}: must be at least 1")
        self.backward_passes_per_step = passes
        if self._gradient_exchange is not None:
            self._gradient_exchange.passes = passes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; gradients under way are thrown away, on every rank."""
        if self._gradient_exchange is not None:
            self._gradient_exchange.throw_away()
        self._synchronized = False
        self._should_synchronize = True
        super(self.__class__, self).load_state_dict(state_dict)


def build_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
    compression: Any,
    backward_passes_per_step: int,
    op: Any,
    gradient_predivide_factor: float,
    groups: Groups,
    sparse_as_dense: bool,
    process_set: Any,
    model: nn.Module | None,
    fusion_buffer_mb: float | None,
) -> Any:
    """See `hvd_qoda.DistributedOptimizer`."""
    op = hvd.Average if op is None else op
    if backward_passes_per_step < 1:
        raise ConfigError(f"backward_passes_per_step={backward_passes_per_step}: must be at least 1")
    if op not in (hvd.Average, hvd.Sum):
        raise UnsupportedError("compressed gradients are averaged or summed: use op=hvd.Average or op=hvd.Sum")
    if fusion_buffer_mb is not None and not fusion_buffer_mb > 0:
        raise ConfigError(f"fusion_buffer_mb={fusion_buffer_mb}: must be larger than 0")
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ConfigError("gradient_predivide_factor is for op=hvd.Average only")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named = None if named_parameters is None else list(named_parameters)
    if named is not None:
        _check_names(named, parameters)
    compressor = _compressor(compression, model, named, optimizer.param_groups)
    ranks = _process_set(process_set, compressor.process_set)
    built = _rebuilt(optimizer)
    built._compression = compressor  # its state is to live as long as the optimizer
    built._gradient_exchange = None
    built._synchronized = False
    built._should_synchronize = True
    built.backward_passes_per_step = backward_passes_per_step
    session = compressor.session
    names = {id(parameter): name for name, parameter in session.parameters.items()}
    built._parameter_names = {p: names[id(p)] for p in parameters if id(p) in names}  # programs look at Horovod's, too
    sparse = session.sparse_parameters | (frozenset() if model is None else _sparse_names(model, names))
    fusion = Fusion(
        (session.config.fusion_buffer_mb if fusion_buffer_mb is None else fusion_buffer_mb) * 2**20,
        _named_groups(groups, names),
        sparse,
        sparse_as_dense,
    )
    if ranks.included() and (hvd.size() > 1 or os.environ.get("HOROVOD_ELASTIC") == "1"):
        reduction = Reduction(op, gradient_predivide_factor, ranks)
        built._gradient_exchange = GradientExchange(
            session, partial(_parameters, weakref.ref(built)), reduction, fusion, backward_passes_per_step
        )
    return built


def _rebuilt(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer as an object of a class made from its own and the methods above."""
    methods = {name: value for name, value in vars(_Overlapping).items() if name not in ("__dict__", "__weakref__")}
    methods["__module__"] = horovod.torch.optimizer.__name__
    wrapped = type(optimizer)
    built: Any = object.__new__(type(wrapped.__name__, (wrapped,), methods))
    # A learning rate scheduler may have put a step of its own into the object, which would be called instead of ours.
    vars(built).update({name: value for name, value in vars(optimizer).items() if name != "step"})
    return built


def _parameters(optimizer: "weakref.ref[torch.optim.Optimizer]") -> list[torch.Tensor]:
    alive = optimizer()
    return [] if alive is None else [p for group in alive.param_groups for p in group["params"]]


def _check_names(named: list[Any], parameters: Iterable[torch.Tensor]) -> None:
    if any(not isinstance(pair, tuple) for pair in named):
        raise ConfigError("named_parameters must be (name, parameter) tuples, such as model.named_parameters()")
    repeated = sorted(name for name, count in Counter(name for name, _ in named).items() if count > 1)
    if repeated:
        raise ConfigError(f"names in named_parameters must be unique; given twice: {', '.join(repeated)}")
    known = {id(parameter) for _, parameter in named}
    missing = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in known]
    if missing:
        raise ConfigError(f"named_parameters lacks parameters of the optimizer, of shapes {missing}")


def _compressor(
    compression: Any,
    model: nn.Module | None,
    named: list[tuple[str, torch.Tensor]] | None,
    param_groups: list[dict[str, Any]],
) -> QodaCompressor:
    if isinstance(compression, QodaCompressor):
        return compression
    if compression is not None:
        raise ConfigError(
            f"compression={compression!r}: must be made by hvd_qoda.Compression.qoda; Horovod's own compressions are "
            "for hvd.DistributedOptimizer"
        )
    if model is not None:
        return Compression.qoda(model)
    unnamed = [(f"group{i}.{j}", p) for i, group in enumerate(param_groups) for j, p in enumerate(group["params"])]
    return Compression.qoda(unnamed if named is None else named)


def _process_set(of_optimizer: Any, of_compression: Any) -> Any:
    given = [chosen for chosen in (of_optimizer, of_compression) if chosen is not None]
    if len(given) == 2 and given[0].process_set_id != given[1].process_set_id:
        raise ConfigError(
            f"the optimizer is given {given[0]} and its compression {given[1]}: give the same process_set to both"
        )
    return given[0] if given else hvd.global_process_set


def _named_groups(groups: Groups, names: Mapping[int, str]) -> list[list[str]] | int | None:
    if groups is None:
        return None
    if isinstance(groups, int):
        if groups < 1:
            raise ConfigError(f"groups={groups}: must be a positive number, or lists of parameters")
        return groups
    members = [id(parameter) for group in groups for parameter in group]
    if not all(isinstance(parameter, torch.Tensor) for group in groups for parameter in group):
        raise ConfigError("groups must be a number, or lists of parameters")
    if len(set(members)) < len(members):
        raise ConfigError("groups: a parameter can be in one group only")
    unknown = [tuple(p.shape) for group in groups for p in group if id(p) not in names]
    if unknown:
        raise ConfigError(f"groups hold parameters that the compression does not know, of shapes {unknown}")
    return [[names[id(parameter)] for parameter in group] for group in groups]


def _sparse_names(model: nn.Module, names: Mapping[int, str]) -> frozenset[str]:
    own = dict(model.named_parameters())
    return frozenset(names[id(own[name])] for name in sparse_parameters(model) if id(own[name]) in names)
