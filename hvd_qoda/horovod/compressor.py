"""The compressor for the stock `horovod.torch.DistributedOptimizer`.

Horovod calls `compress(gradient)` when a gradient is ready, all-reduces what it returns, and calls
`decompress(reduced, context)` for all of them when the optimizer steps. `compress` starts an exchange of our own, named
after the parameter, and returns a token (`token.py`); `decompress` waits for the exchange and writes the scaled mean
into the gradient.

Steps. Horovod does not tell the compressor when a step begins. It begins with the first `compress` after all earlier
ones have been answered by `decompress`; levels change there and nowhere else. It ends with the `decompress` that
answers the last one; statistics and worker norms are exchanged there, so that between steps all ranks hold the same
state. Where two optimizers share a compressor and gradients of one or the other are always under way, levels never
change. Every step is one exchange and has a number of its own, on which the random numbers depend: accumulation,
skipped steps and repeated calls of `synchronize()` count like any other.

What travels as it is. Gradients with exact codebooks, those of dtypes that cannot be quantized, and all with the scheme
"off" are all-reduced by Horovod itself; but exact bfloat16 ones, which it cannot reduce, travel as bytes. Empty
gradients do not travel. With exchange="auto" schemes change where a step begins (see `hvd_qoda.scheme_choice`).
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError
from torch import nn

from hvd_qoda.config import QodaConfig
from hvd_qoda.error_feedback import ErrorFeedback
from hvd_qoda.errors import QodaError
from hvd_qoda.exchange import Exchange
from hvd_qoda.horovod.gradient_index import GradientIndex
from hvd_qoda.horovod.parameter_routes import ParameterRoutes, Route
from hvd_qoda.horovod.token import TOKEN_BYTES, TokenScale
from hvd_qoda.horovod.transport import HorovodTransport
from hvd_qoda.horovod.world import World
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.session import Session
from hvd_qoda.staging import values_on, written_back
from hvd_qoda.telemetry import Telemetry
from hvd_qoda.traffic import Traffic, all_reduce_bytes
from qoda_kernels.registry import CodebookRegistry

__all__ = ["QodaCompressor"]


@dataclass(frozen=True)
class _Context:
    """What `decompress` needs to know of one `compress`."""

    route: Route
    gradient: torch.Tensor
    device: torch.device  # that encodes and decodes it


class _Ranks:
    """The ranks, and what is made for them."""

    def __init__(self, session: Session, process_set: Any) -> None:
        self.world = World(session, process_set)
        self.routes = ParameterRoutes(session, self.world)
        self.tokens = TokenScale(self.world.transport.ranks, self.world.transport.rank)


class QodaCompressor:
    """Layer-wise quantization for `hvd.DistributedOptimizer(..., compression=...)`; made by `Compression.qoda`.

    Our own `DistributedOptimizer` takes it, too: it then exchanges the gradients itself, and this object keeps what
    belongs to the training as a whole (codebooks, step number, state, records).

    Args:
        parameters: the model, or its (name, parameter) pairs in the model's order; the same on every rank.
        config: the configuration; the same on every rank.
        process_set: the Horovod process set that exchanges gradients, as given to the optimizer; None for all ranks.
        telemetry: receives one record per step.
        name: what the names of its collectives begin with; the same on every rank.

    Raises:
        RegistryError: for layer rules that match nothing, settings that no codebook can have, or a name given twice.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, torch.Tensor]],
        config: QodaConfig,
        process_set: Any = None,
        telemetry: Telemetry | None = None,
        name: str = "",
    ) -> None:
        self.session = Session(parameters, config, telemetry, name)
        self.process_set = process_set
        self._index = GradientIndex(self.session.parameters)
        self._lock = self.session.lock
        self._outstanding: dict[str, _Context] = {}  # compressed and not yet decompressed, by parameter
        self._taken: set[str] = set()  # parameters compressed in this step
        self._ranks: _Ranks | None = None
        self.session.use_route(self)

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start the exchange of a gradient; called by Horovod.

        Args:
            tensor: the gradient of one of the model's parameters.

        Returns:
            What Horovod is to all-reduce, and the context for `decompress`.

        Raises:
            RankMismatchError: at first use, on every rank, if ranks do not agree on model, configuration or version.
            UnsupportedError: for Adasum, after `hvd.join()` on another rank, for sparse gradients with groups, and for
                tensors that are no gradients of the model.
        """
        with self._lock:
            self._check_route()
            name = self._index.name_of(tensor, self._taken if self._outstanding else ())
            ranks = self._enter_step(name)
            route = ranks.routes.of(name, tensor.dtype)
            device = tensor.device if route.exchange is None else self.session.coding_device([tensor])
            context = _Context(route, tensor, device)
            self._outstanding[name] = context
            self._taken.add(name)
            return self._send(ranks, context), context

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Wait for the exchange of a gradient; called by Horovod.

        Args:
            tensor: what Horovod's all-reduce made of what `compress` returned.
            ctx: the context that `compress` returned; None for sparse gradients, which Horovod gathers itself.

        Returns:
            The ranks' mean, or sum, as the optimizer says; with the gradient's shape, dtype and device.

        Raises:
            WireError: if a message is damaged or not the expected one.
            RankMismatchError: if ranks disagree, or the optimizer reduces over other ranks than the compressor.
            UnsupportedError: for reductions other than average and sum.
            ExchangeTimeoutError: if a peer did not take part in time.
        """
        if ctx is None:
            return tensor
        with self._lock:
            name = ctx.route.entry.name
            context = self._outstanding.get(name)
            if self._ranks is None or context is None or context is not ctx:
                raise QodaError(f"decompress() of parameter {name!r} does not belong to its last compress()")
            result = self._receive(self._ranks, context, tensor)
            self.session.arrived(result)
            del self._outstanding[name]
            if not self._outstanding:
                # In the model's order: hooks run in another order on every rank and in every run.
                self.session.end_step(self._ranks.world.transport, self.registry.parameters)
            return result

    @property
    def config(self) -> QodaConfig:
        """The configuration."""
        return self.session.config

    @property
    def registry(self) -> CodebookRegistry:
        """Layer types and codebooks, with the levels of the step under way or finished last."""
        return self.session.registry

    @property
    def step(self) -> int:
        """Number of the step under way, or finished last, over the whole training; the first one is 1."""
        return self.session.step

    @property
    def traffic(self) -> Traffic:
        """What this rank has handed to collectives since the compressor was made, Horovod's all-reduces included."""
        return self.session.traffic

    def worker_norms(self) -> WorkerNorms:
        """See `Session.worker_norms`."""
        return self.session.worker_norms()

    @property
    def error_feedback(self) -> ErrorFeedback:
        """See `Session.error_feedback`."""
        return self.session.error_feedback

    def state_dict(self) -> dict[str, Any]:
        """See `Session.state_dict`."""
        return self.session.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Session.load_state_dict`."""
        self.session.load_state_dict(state)

    # -- GradientRoute -----------------------------------------------------------------------------------------------

    def description(self) -> Mapping[str, Any]:
        """See `hvd_qoda.session.GradientRoute`."""
        return {"route": "stock optimizer"}

    def connect(self) -> HorovodTransport:
        """See `hvd_qoda.session.GradientRoute`."""
        return self._connected().world.transport

    def exchange_of(self, key: str, dtype: torch.dtype) -> Exchange | None:
        """See `hvd_qoda.session.GradientRoute`."""
        return self._connected().routes.of(key, dtype).exchange

    def forget(self) -> None:
        """See `hvd_qoda.session.GradientRoute`."""
        if self._ranks is not None and self._outstanding:
            # Names under way must not be used again. After a failure of the host nothing is under way any more.
            with contextlib.suppress(HorovodInternalError, QodaError):
                self._ranks.world.pending.drop()
        self._outstanding, self._taken = {}, set()
        self._ranks = None

    # -- steps -------------------------------------------------------------------------------------------------------

    def _check_route(self) -> None:
        if not self.session.is_used_by(self):
            raise QodaError(
                "this compressor belongs to an hvd_qoda.DistributedOptimizer, which exchanges the gradients itself: "
                "make another one for hvd.DistributedOptimizer"
            )

    def _enter_step(self, name: str) -> _Ranks:
        """Begin a step if this parameter's gradient is its first."""
        ranks = self._connected()
        if name in self._outstanding:
            # Horovod has thrown a step away, as its optimizer's load_state_dict() does. Every rank finds that out.
            ranks.world.pending.drop()
            self._outstanding = {}
            self.session.abandon_step()
        if not self._outstanding:
            ranks.routes.begin_step()
            self._taken = set()
        elif name in self._taken:
            # Gradients of another optimizer are still under way, but this one's begin a new exchange. Levels cannot
            # change meanwhile; the next step that begins with nothing under way makes up for it.
            self.session.count_exchange()
            self._taken = set()
        return ranks

    def _connected(self) -> _Ranks:
        if self._ranks is not None and not self._outstanding and not self._ranks.world.is_current():
            self._ranks = None
        if self._ranks is None:
            self._ranks = _Ranks(self.session, self.process_set)
        return self._ranks

    def _send(self, ranks: _Ranks, context: _Context) -> torch.Tensor:
        """Start a gradient's way; returns what Horovod is to all-reduce."""
        session, route, gradient = self.session, context.route, context.gradient
        name, key = route.entry.name, route.entry.codebook
        size = ranks.world.transport.size
        raw_bytes = all_reduce_bytes(gradient.numel() * gradient.itemsize, size)
        if route.by_host:
            session.observe_exact(name, key, gradient)
            sent_bytes = session.meter.all_reduce(gradient.nbytes, size)
            session.account(key, gradient.numel(), raw_bytes, sent_bytes, exact=True)
            return gradient.contiguous()  # Horovod reduces no other memory formats
        sent_bytes = session.meter.all_reduce(TOKEN_BYTES, size)
        if route.exchange is not None:
            values = session.corrected(route.exchange, [values_on(context.device, gradient)])
            route.exchange.start(values, session.stamp)
            ranks.world.pending.add(route.exchange)
            sent_bytes += route.exchange.sent_bytes
            session.observe(name, route.exchange, values)
        session.account(key, gradient.numel(), raw_bytes, sent_bytes, exact=route.is_exact)
        return ranks.tokens.token(gradient.device)

    def _receive(self, ranks: _Ranks, context: _Context, reduced: torch.Tensor) -> torch.Tensor:
        """What arrived for a gradient."""
        exchange = context.route.exchange
        if context.route.by_host:
            return reduced
        if exchange is None:
            return context.gradient
        scale = ranks.tokens.scale(reduced)
        return written_back(
            context.gradient, lambda out: ranks.world.pending.finish(exchange, [out], scale), context.device
        )
