"""The overlapping route: gradients are sent in fusion buffers while backward goes on.

A hook on every parameter notes when its gradient is complete. Fusion buffers are started in one fixed order, each as
soon as all of its gradients have come and all buffers before it are started; so every rank starts the same collectives
in the same order, whatever the order of its hooks. What has not come when the optimizer steps counts as zero. Encoding
runs in the thread of the hook; collectives run in Horovod's thread.

In the first step buffers are filled in the reverse of the model's order. From the second step on they follow the order
in which rank 0's gradients came in the first one; it is saved with the session, because with a reduce-scatter a rank's
random numbers depend on what it owns.

Second phases of a reduce-scatter are not started before the optimizer steps: how many collectives a rank has started at
a line of the user's program must not depend on time (see `hvd_qoda.horovod.transport`).

With exchange="auto" all buffers take one scheme, chosen as under the stock optimizer (`hvd_qoda.scheme_choice`). Where
that is "off", every gradient has a buffer of its own, which Horovod reduces as it does under the stock optimizer: what
is not compressed costs what it costs there.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qoda.errors import QodaError, UnsupportedError
from hvd_qoda.exchange import Exchange
from hvd_qoda.fusion import (
    Gradient,
    fill_buffers,
    host_reduces,
    overlapping_bytes,
    parcels_of,
    split_evenly,
    with_groups,
)
from hvd_qoda.horovod.fusion_buffers import FusionBuffer, HostReduction, Message, Parcel, Reduction, SparseGather
from hvd_qoda.horovod.transport import HorovodTransport
from hvd_qoda.horovod.world import World
from hvd_qoda.session import Session
from hvd_qoda.transport import all_gather_array
from qoda_kernels.layout import MessagePlan

__all__ = ["Fusion", "GradientExchange"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fusion:
    """Which gradients go into one buffer.

    Attributes:
        buffer_bytes: at most so many of gradients in a buffer.
        groups: names that stay together in a buffer of their own; or a number of buffers; None for neither.
        sparse: parameters whose gradients are sparse.
        sparse_as_dense: whether these are quantized like others; else they are gathered as they are.
    """

    buffer_bytes: float
    groups: Sequence[Sequence[str]] | int | None = None
    sparse: frozenset[str] = frozenset()
    sparse_as_dense: bool = False


class GradientExchange:
    """Exchanges the gradients of an optimizer's parameters; a `hvd_qoda.session.GradientRoute`.

    Args:
        session: the model's; this route takes it over.
        parameters: the optimizer's, asked for at every step: groups may be added, and parameters frozen and thawed.
        reduction: what is made of the ranks' gradients.
        fusion: what goes into one buffer.
        passes: backward passes before a gradient is complete.

    Raises:
        UnsupportedError: for parameters that the session does not know.
    """

    def __init__(
        self,
        session: Session,
        parameters: Callable[[], Iterable[torch.Tensor]],
        reduction: Reduction,
        fusion: Fusion,
        passes: int,
    ) -> None:
        self.passes = passes
        self._session = session
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in session.parameters.items()}
        self._reduction = reduction
        self._fusion = fusion
        self._hooked: dict[str, torch.dtype] = {}  # parameters with a hook, by the dtype that buffers were made for
        self._world: World | None = None
        self._buffers: list[FusionBuffer] = []
        self._buffer_of: dict[str, FusionBuffer] = {}
        self._scheme = "off"  # of all buffers
        self._left_to_host = False  # whether Horovod reduces all of them, in which ranks may join
        self._in_step = False
        self._out_of_date = False  # whether buffers must be made anew
        self._started = 0  # buffers started in this step
        self._counts: dict[str, int] = {}  # backward passes since the last step
        self._came: list[str] = []  # gradients complete in this step, in order
        self._warned = False
        session.use_route(self)
        self._follow_parameters()

    @property
    def has_begun(self) -> bool:
        """Whether backward has made gradients that have not been exchanged to the end."""
        return bool(self._counts or self._in_step)

    @property
    def fusion_buffers(self) -> list[tuple[str, ...]]:
        """Parameters of every fusion buffer of the last step, in the order in which buffers are sent."""
        return [buffer.names for buffer in self._buffers]

    def synchronize(self) -> None:
        """Exchange whatever has not been started, and wait for everything; a collective call.

        Raises:
            RankMismatchError: if ranks do not agree on model, configuration, buffers, version or step.
            WireError: if a message is damaged or not the expected one.
            UnsupportedError: if a rank has called `hvd.join()`.
            ExchangeTimeoutError: if a peer did not take part in time.
        """
        if not self._session.is_used_by(self):
            raise QodaError(
                "another optimizer has taken over this one's compression: make a compression for each optimizer"
            )
        with self._session.lock:
            world = self._enter_step()
            self._start_all()
            world.transport.await_roll_call()
            for parcel in self._parcels:
                parcel.finish()
            self._agree_on_order(world)
            self._session.end_step(world.transport, self._contents)
            self._leave_step()

    def throw_away(self) -> None:
        """Forget the gradients that backward has made since the last step; all ranks must do so."""
        with self._session.lock:
            if self._in_step:
                # Names under way must not be used again. After a failure of the host nothing is under way any more.
                try:
                    self._drop_step()
                except (HorovodInternalError, QodaError):
                    self._world, self._buffers = None, []
                self._session.abandon_step()
            self._leave_step()

    # -- GradientRoute -----------------------------------------------------------------------------------------------

    def description(self) -> Mapping[str, Any]:
        """See `hvd_qoda.session.GradientRoute`."""
        return {
            "route": "overlapping optimizer",
            "op": "Average" if self._reduction.averages else "Sum",
            "gradient_predivide_factor": self._reduction.predivide_factor,
            "parameters of fusion buffer": {
                str(number): " ".join(buffer.names) for number, buffer in enumerate(self._buffers)
            },
        }

    def connect(self) -> HorovodTransport:
        """See `hvd_qoda.session.GradientRoute`."""
        return self._connected().transport

    def exchange_of(self, key: str, dtype: torch.dtype) -> Exchange | None:
        """See `hvd_qoda.session.GradientRoute`."""
        self._connected()
        messages = [parcel for parcel in self._parcels if isinstance(parcel, Message)]
        return next((message.exchange for message in messages if key in message.contents), None)

    def forget(self) -> None:
        """See `hvd_qoda.session.GradientRoute`."""
        self.throw_away()
        self._world, self._buffers = None, []

    # -- steps -------------------------------------------------------------------------------------------------------

    @property
    def _parcels(self) -> list[Parcel]:
        return [parcel for buffer in self._buffers for parcel in buffer.parcels]

    @property
    def _contents(self) -> dict[str, tuple[str, ...]]:
        return {key: names for parcel in self._parcels for key, names in parcel.contents.items()}

    def _follow_parameters(self) -> None:
        """Watch the parameters that need gradients now; buffers are out of date if these or their dtypes change."""
        found = {
            self._name_of(parameter): parameter
            for parameter in self._parameters()
            if parameter.requires_grad or self._names.get(id(parameter)) in self._hooked
        }
        dtypes = {name: parameter.dtype for name, parameter in found.items()}
        if dtypes == self._hooked:
            return
        for name, parameter in found.items():
            if name not in self._hooked:
                parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), name))
        self._hooked, self._out_of_date = dtypes, True

    def _name_of(self, parameter: torch.Tensor) -> str:
        name = self._names.get(id(parameter))
        if name is None:
            raise UnsupportedError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that its compression does not know: "
                "make the compression from the model that holds all of the optimizer's parameters"
            )
        return name

    def on_gradient(self, name: str) -> None:
        """A backward pass has added to a parameter's gradient; called by its hook.

        Raises:
            QodaError: if it has done so too often.
        """
        with self._session.lock:
            if not self._session.is_used_by(self):
                return
            count = self._counts.get(name, 0) + 1
            if count > self.passes:
                raise QodaError(
                    f"the gradient of parameter {name!r} was computed more than {self.passes} times before step(): "
                    "increase backward_passes_per_step to accumulate gradients over several backward passes"
                )
            if count == self.passes:
                self._enter_step()
            self._counts[name] = count
            if count == self.passes:
                self._came.append(name)
                if name in self._buffer_of:  # empty gradients are in none
                    self._buffer_of[name].missing.discard(name)
                while self._started < len(self._buffers) and not self._buffers[self._started].missing:
                    self._start_next()

    def _enter_step(self) -> World:
        """Begin a step unless one has begun."""
        if self._world is not None and self._in_step:
            return self._world
        self._follow_parameters()
        if self._out_of_date:
            self._regroup()
        world = self._connected()
        world.begin_step(self._messages, mixed=False)
        if world.common_scheme != self._scheme:
            world.forget_exchanges()
            self._make_buffers(world)
        if not self._left_to_host:
            world.transport.begin_roll_call()
        self._in_step = True
        return world

    def _leave_step(self) -> None:
        for buffer in self._buffers:
            buffer.reset()
        self._in_step = False
        self._started = 0
        self._counts, self._came = {}, []

    def _drop_step(self) -> None:
        """End what is under way. Ranks may have started unequally many buffers: all of them start the rest."""
        self._start_all()
        assert self._world is not None  # as a step has begun
        self._world.transport.await_roll_call()
        self._world.pending.drop()
        for parcel in self._parcels:
            parcel.drop()

    def _start_all(self) -> None:
        while self._started < len(self._buffers):
            self._start_next()

    def _start_next(self) -> None:
        buffer = self._buffers[self._started]
        self._started += 1
        for name in buffer.names:
            self._fill_in(name)
        for parcel in buffer.parcels:
            parcel.start()

    def _fill_in(self, name: str) -> None:
        """Zeros for a gradient that this rank has not computed: other ranks may have one."""
        parameter = self._session.parameters[name]
        if parameter.grad is None:
            if name in self._fusion.sparse:
                rows = parameter.new_empty(0, *parameter.shape[1:])
                indices = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
                parameter.grad = torch.sparse_coo_tensor(indices, rows, parameter.shape)
            else:
                parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        elif parameter.grad.is_sparse and name not in self._fusion.sparse and not self._warned:
            self._warned = True
            _logger.warning(
                "the gradient of parameter %r is sparse, which its module did not tell: it is exchanged like a dense "
                "one. Give model= to hvd_qoda.DistributedOptimizer so that embeddings are known",
                name,
            )

    # -- buffers -----------------------------------------------------------------------------------------------------

    def _connected(self) -> World:
        if self._world is not None and not self._in_step and not self._world.is_current():
            self._world, self._buffers = None, []
        if self._world is None:
            self._world = World(self._session, self._reduction.process_set, early_roll_call=True)
            self._make_buffers(self._world)
        return self._world

    def _regroup(self) -> None:
        """Make other buffers for the steps to come."""
        if self._world is None:
            return
        self._world.forget_exchanges()
        self._make_buffers(self._world)
        self._session.agree_anew()

    def _messages(self) -> dict[str, MessagePlan]:
        """The plans of the buffers, as far as they can be quantized."""
        size = self._connected().transport.size
        plans = [
            parcels_of(self._gradients(names), self._session.registry, size).plan
            for names in self._fused_names()
            if not self._travels_sparse(names)
        ]
        return {str(number): plan for number, plan in enumerate(plans) if plan is not None}

    def _gradients(self, names: Iterable[str]) -> list[Gradient]:
        return [Gradient(self._session.registry.parameters[name], self._hooked[name]) for name in names]

    def _travels_sparse(self, names: Sequence[str]) -> bool:
        return not self._fusion.sparse_as_dense and names[0] in self._fusion.sparse

    def _make_buffers(self, world: World) -> None:
        """Make the buffers, with the scheme of today."""
        self._scheme = world.common_scheme
        self._buffers = [
            FusionBuffer(names, self._new_parcels(number, names, world))
            for number, names in enumerate(self._fused_names())
        ]
        self._buffer_of = {name: buffer for buffer in self._buffers for name in buffer.names}
        self._left_to_host = all(isinstance(parcel, HostReduction) for parcel in self._parcels)
        self._out_of_date = False
        self._session.regroup_vectors(self._contents)

    def _fused_names(self) -> list[tuple[str, ...]]:
        """Names of the parameters of every buffer, in the order in which buffers are started."""
        entries = self._session.registry.parameters
        ordered = [name for name in self._ordered_names() if entries[name].numel > 0]
        alone = self._fusion.sparse if not self._fusion.sparse_as_dense else frozenset[str]()
        sizes = {n: entries[n].numel * self._hooked[n].itemsize for n in ordered if n not in alone}
        groups = self._fusion.groups
        at_most = overlapping_bytes(sum(sizes.values()), self._fusion.buffer_bytes, self._scheme)
        buffers: list[tuple[str, ...]]
        if groups is None and self._scheme == "off" and all(host_reduces(self._hooked[name]) for name in sizes):
            buffers = [(name,) for name in sizes]  # as under the stock optimizer: Horovod itself fuses what has come
        elif groups is None:
            buffers = fill_buffers(sizes, at_most)
        elif isinstance(groups, int):
            buffers = split_evenly(list(sizes), groups)
        else:
            buffers = with_groups(sizes, at_most, groups)
        position = {name: index for index, name in enumerate(ordered)}
        buffers += [(name,) for name in ordered if name in alone]
        return sorted(buffers, key=lambda names: max(position[name] for name in names))

    def _ordered_names(self) -> list[str]:
        """The parameters with hooks, in the order in which backward makes gradients, as far as it is known."""
        usual = [name for name in reversed(list(self._session.registry.parameters)) if name in self._hooked]
        observed = [name for name in self._session.gradient_order or () if name in self._hooked]
        return list(dict.fromkeys([*observed, *usual]))

    def _new_parcels(self, number: int, names: Iterable[str], world: World) -> list[Parcel]:
        session, reduction = self._session, self._reduction
        names = list(names)
        if self._travels_sparse(names):
            return [SparseGather(names[0], session, world, reduction)]
        off = self._scheme == "off"
        ways = parcels_of(self._gradients(names), session.registry, world.transport.size, quantize=not off)
        parcels: list[Parcel] = []
        if ways.plan is not None:
            exact = off or all(segment.format.is_exact for segment in ways.plan.segments)
            key = f"buffer.{number}"
            exchange = (
                world.new_exact_exchange(ways.plan, key) if exact else world.new_exchange(ways.plan, key, self._scheme)
            )
            parcels.append(Message(f"buffer {number}", exchange, session, world, reduction))
        for dtype, reduced in ways.by_host.items():
            kind = str(dtype).removeprefix("torch.")
            parcels.append(HostReduction(f"buffer.{number}.{kind}", reduced, session, world, reduction))
        return parcels

    def _agree_on_order(self, world: World) -> None:
        """After the first step, let all ranks fill buffers in the order in which rank 0's gradients came."""
        if self._session.gradient_order is not None or len(self._buffers) < 2:
            return
        usual = self._ordered_names()
        numbers = {name: number for number, name in enumerate(usual)}
        order = [numbers[name] for name in dict.fromkeys([*self._came, *usual])]
        agreed = all_gather_array(world.transport, np.array(order, dtype=np.int32), f"{self._session.name}.order")[0]
        self._session.gradient_order = tuple(usual[number] for number in agreed)
        self._out_of_date = self._session.gradient_order != tuple(usual)


def _hook(exchange: "weakref.ref[GradientExchange]", name: str) -> Callable[[torch.Tensor], None]:
    """A hook that outlives the exchange without doing anything."""

    def hook(parameter: torch.Tensor) -> None:
        alive = exchange()
        if alive is not None:
            alive.on_gradient(name)

    return hook
