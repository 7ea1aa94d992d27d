"""Fusion buffers under Horovod: how the gradients of one travel, from where they are read to where they are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import horovod.torch as hvd
import torch

from hvd_qoda.exchange import Exchange
from hvd_qoda.horovod.world import World
from hvd_qoda.session import Session
from hvd_qoda.staging import result_buffer, stored, values_on
from hvd_qoda.traffic import all_reduce_bytes
from hvd_qoda.transport import wait_until

__all__ = ["FusionBuffer", "HostReduction", "Message", "Parcel", "Reduction", "SparseGather"]


@dataclass(frozen=True)
class Reduction:
    """What the optimizer makes of the ranks' gradients.

    Attributes:
        op: `hvd.Average` or `hvd.Sum`.
        predivide_factor: of averages that the host computes: it divides by this before it adds, and multiplies after.
        process_set: the ranks.
    """

    op: Any
    predivide_factor: float
    process_set: Any

    @property
    def averages(self) -> bool:
        """Whether the mean is wanted, and not the sum."""
        return bool(self.op == hvd.Average)

    @property
    def scale(self) -> float:
        """Factor of the mean."""
        return 1.0 if self.averages else float(self.process_set.size())


class Parcel(Protocol):
    """Gradients of one fusion buffer that travel in one way."""

    @property
    def contents(self) -> Mapping[str, tuple[str, ...]]:
        """Key under which the session is told of gradients (`Session.observe`) -> their parameters, in order."""

    def start(self) -> None:
        """Send the gradients without waiting; every parameter holds one."""

    def finish(self) -> None:
        """Wait, and let the parameters hold the ranks' mean or sum."""

    def drop(self) -> None:
        """Wait, and forget what arrives; exchanges of our own are dropped by the world."""


class FusionBuffer:
    """Gradients that are sent together as soon as backward has made all of them.

    Args:
        names: the parameters.
        parcels: how they travel.
    """

    def __init__(self, names: Sequence[str], parcels: Sequence[Parcel]) -> None:
        self.names = tuple(names)
        self.parcels = tuple(parcels)
        self.missing = set(names)  # gradients that have not come in this step

    def reset(self) -> None:
        """Be ready for another step."""
        self.missing = set(self.names)


class Message:
    """Gradients in one message of ours; see `hvd_qoda.fusion.parcels_of`."""

    def __init__(self, key: str, exchange: Exchange, session: Session, world: World, reduction: Reduction) -> None:
        names = [segment.slice.parameter for segment in exchange.plan.segments]
        self.contents = {key: tuple(names)}
        self.exchange = exchange
        self._key = key
        self._session = session
        self._world = world
        self._reduction = reduction
        self._parameters = [session.parameters[name] for name in names]
        self._costs = _costs(exchange, world.transport.size)
        self._occupied = max(1, exchange.plan.payload_bytes)
        self._gradients: list[torch.Tensor] = []
        self._device = torch.device("cpu")  # that encodes and decodes them

    def start(self) -> None:
        """See `Parcel`."""
        self._gradients = [_dense(parameter) for parameter in self._parameters]
        self._device = self._session.coding_device(self._gradients)
        staged = [values_on(self._device, gradient) for gradient in self._gradients]
        values = self._session.corrected(self.exchange, staged)
        self.exchange.start(values, self._session.stamp)
        self._world.pending.add(self.exchange)
        self._session.observe(self._key, self.exchange, values)
        per_byte = self.exchange.sent_bytes / self._occupied  # entropy coding: another number in every step
        for key, coordinates, raw_bytes, occupied, exact in self._costs:
            self._session.account(key, coordinates, raw_bytes, per_byte * occupied, exact)

    def finish(self) -> None:
        """See `Parcel`."""
        gradients, self._gradients = self._gradients, []
        results = [result_buffer(gradient, self._device) for gradient in gradients]
        self._world.pending.finish(self.exchange, results, self._reduction.scale)
        for parameter, gradient, values in zip(self._parameters, gradients, results, strict=True):
            self._session.arrived(values)
            _write(parameter, stored(gradient, values))

    def drop(self) -> None:
        """See `Parcel`."""
        self._gradients = []


class HostReduction:
    """Exact gradients of one dtype, which Horovod reduces together and in place."""

    def __init__(
        self, name: str, parameters: Sequence[str], session: Session, world: World, reduction: Reduction
    ) -> None:
        self.contents = {parameter: (parameter,) for parameter in parameters}
        self._name = f"{session.name}.{name}"
        self._session = session
        self._transport = world.transport
        self._reduction = reduction
        self._parameters = [session.parameters[parameter] for parameter in parameters]
        self._sent: list[torch.Tensor] = []
        self._handle: int | None = None

    def start(self) -> None:
        """See `Parcel`."""
        session, reduction, size = self._session, self._reduction, self._transport.size
        self._sent = [_dense(parameter).contiguous() for parameter in self._parameters]
        for key, gradient in zip(self.contents, self._sent, strict=True):
            codebook = session.registry.parameters[key].codebook
            raw_bytes = all_reduce_bytes(gradient.nbytes, size)
            session.observe_exact(key, codebook, gradient)
            session.account(codebook, gradient.numel(), raw_bytes, raw_bytes, exact=True)
        session.meter.all_reduce(sum(gradient.nbytes for gradient in self._sent), size)
        factor = reduction.predivide_factor if reduction.averages else 1.0
        alone = len(self._sent) == 1  # then it is started as under the stock optimizer
        self._handle = (hvd.allreduce_async_ if alone else hvd.grouped_allreduce_async_)(
            self._sent[0] if alone else self._sent,
            name=self._name,
            op=reduction.op,
            prescale_factor=1.0 / factor,
            postscale_factor=factor,
            process_set=reduction.process_set,
        )

    def finish(self) -> None:
        """See `Parcel`."""
        _wait([self._handle], self._name, self._transport)
        reduced, self._sent, self._handle = self._sent, [], None
        for parameter, gradient in zip(self._parameters, reduced, strict=True):
            self._session.arrived(gradient)
            _write(parameter, gradient)

    def drop(self) -> None:
        """See `Parcel`."""
        if self._handle is not None:
            _wait([self._handle], self._name, self._transport)
        self._sent, self._handle = [], None


class SparseGather:
    """A sparse gradient that stays sparse: every rank gets the rows of all ranks, as under the stock optimizer.

    It travels exactly, and no worker norms are known of it.
    """

    def __init__(self, parameter: str, session: Session, world: World, reduction: Reduction) -> None:
        self.contents: Mapping[str, tuple[str, ...]] = {}
        self._name = f"{session.name}.{parameter}.sparse"
        self._session = session
        self._transport = world.transport
        self._reduction = reduction
        self._parameter = session.parameters[parameter]
        self._codebook = session.registry.parameters[parameter].codebook
        self._handles: list[int] = []

    def start(self) -> None:
        """See `Parcel`."""
        session, size = self._session, self._transport.size
        gradient = self._parameter.grad
        assert gradient is not None  # as every parameter holds one
        if not gradient.is_sparse:
            gradient = gradient.to_sparse(1)
        rows = gradient._values().contiguous()
        # As bytes, because Horovod does not know every dtype.
        parts = [gradient._indices().t().contiguous(), rows.view(torch.uint8)]
        for part, what in zip(parts, ("indices", "values"), strict=True):
            sent_bytes = session.meter.all_gather(part.nbytes, size)
            coordinates = rows.numel() if what == "values" else 0
            session.account(self._codebook, coordinates, sent_bytes, sent_bytes, exact=True)
            name, process_set = f"{self._name}.{what}", self._reduction.process_set
            self._handles.append(hvd.allgather_async(part, name=name, process_set=process_set))

    def finish(self) -> None:
        """See `Parcel`."""
        handles, self._handles = self._handles, []
        indices, values = _wait(handles, self._name, self._transport)
        values = values.view(self._parameter.dtype)
        self._session.arrived(values)
        if self._reduction.averages:
            values = values / self._transport.size
        self._parameter.grad = torch.sparse_coo_tensor(indices.t(), values, self._parameter.shape)

    def drop(self) -> None:
        """See `Parcel`."""
        handles, self._handles = self._handles, []
        _wait(handles, self._name, self._transport)


def _wait(handles: Sequence[int | None], name: str, transport: Any) -> list[torch.Tensor]:
    """What Horovod's collectives have brought."""
    wait_until(
        lambda: all(hvd.poll(handle) for handle in handles),
        transport.timeout_s,
        lambda: f"rank {hvd.rank()}: {name!r} among the ranks {transport.ranks}",
    )
    return [hvd.synchronize(handle) for handle in handles]


def _dense(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    assert gradient is not None  # as every parameter holds one
    return gradient.to_dense() if gradient.is_sparse else gradient


def _write(parameter: torch.Tensor, result: torch.Tensor) -> None:
    """Let the parameter hold a gradient that has arrived, sparse if its own was."""
    gradient = parameter.grad
    parameter.grad = result.to_sparse(gradient.sparse_dim()) if gradient is not None and gradient.is_sparse else result


def _costs(exchange: Exchange, size: int) -> list[tuple[str, int, float, int, bool]]:
    """By codebook: key, coordinates, bytes of the host's all-reduce, bytes in the message, whether exact."""
    segments = exchange.plan.segments
    costs = []
    for key in dict.fromkeys(segment.slice.codebook for segment in segments):
        mine = [segment for segment in segments if segment.slice.codebook == key]
        raw = sum(segment.slice.length * segment.slice.dtype.itemsize for segment in mine)
        occupied = sum(segment.end - segment.begin for segment in mine)
        costs.append(
            (key, sum(s.slice.length for s in mine), all_reduce_bytes(raw, size), occupied, mine[0].format.is_exact)
        )
    return costs
