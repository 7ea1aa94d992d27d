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

What travels as it is. Gradients with exact codebooks, and those of dtypes that cannot be quantized, are all-reduced by
Horovod itself; but exact bfloat16 ones, which it cannot reduce, travel as bytes. Empty gradients do not travel.
"""

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from horovod.common.exceptions import HorovodInternalError
from torch import nn

from hvd_qoda.agreement import check_agreement
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError, QodaError, RegistryError
from hvd_qoda.exchange import Stamp
from hvd_qoda.horovod.gradient_index import GradientIndex
from hvd_qoda.horovod.token import TOKEN_BYTES
from hvd_qoda.horovod.world import Route, World
from hvd_qoda.level_updates import LevelUpdates
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.staging import cpu_values, written_back
from hvd_qoda.step_account import StepAccount
from hvd_qoda.telemetry import Telemetry
from hvd_qoda.traffic import Traffic, TrafficMeter, all_reduce_bytes
from hvd_qoda.worker_vectors import ExactVector, WorkerVectors
from qoda_kernels import __version__
from qoda_kernels.codebook import Codebook
from qoda_kernels.registry import CodebookRegistry
from qoda_kernels.wire import WIRE_VERSION

__all__ = ["QodaCompressor"]

STATE_FORMAT = 2


@dataclass(frozen=True)
class _Context:
    """What `decompress` needs to know of one `compress`."""

    route: Route
    gradient: torch.Tensor


class QodaCompressor:
    """Layer-wise quantization for `hvd.DistributedOptimizer(..., compression=...)`; made by `Compression.qoda`.

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
        pairs = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
        repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        if repeated:
            raise RegistryError(f"parameter names are not unique: {', '.join(repeated)}")
        self._config = config
        self._given_name = name
        self._registry = config.build_registry(parameters if isinstance(parameters, nn.Module) else pairs)
        # The digest, because exchanges of several models may be under way at once.
        self._name = f"hvd_qoda.{name}.{self._registry.digest.hex()}"
        self._index = GradientIndex(dict(pairs))
        self._levels = LevelUpdates(config.update_levels, self._registry)
        self._vectors = WorkerVectors() if config.worker_norms else None
        self._process_set = process_set
        self._telemetry = telemetry
        self._reported_codebooks: dict[str, Codebook] = {}
        self._meter = TrafficMeter()
        self._reported_bytes = 0
        self._account = StepAccount()
        self._lock = threading.RLock()  # with several devices Horovod's hooks run in several threads
        self._step = 0  # number of the step under way, or finished last
        self._outstanding: dict[str, _Context] = {}  # compressed and not yet decompressed, by parameter
        self._taken: set[str] = set()  # parameters compressed in this step
        self._world: World | None = None
        self._agreed = False

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
            name = self._index.name_of(tensor, self._taken if self._outstanding else ())
            world = self._enter_step(name)
            context = _Context(world.route(self._registry, name, tensor.dtype), tensor)
            self._outstanding[name] = context
            self._taken.add(name)
            return self._send(world, context), context

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
            if self._world is None or context is None or context is not ctx:
                raise QodaError(f"decompress() of parameter {name!r} does not belong to its last compress()")
            result = self._receive(self._world, context, tensor)
            del self._outstanding[name]
            if not self._outstanding:
                self._end_step(self._world)
            return result

    @property
    def config(self) -> QodaConfig:
        """The configuration."""
        return self._config

    @property
    def registry(self) -> CodebookRegistry:
        """Layer types and codebooks, with the levels of the step under way or finished last."""
        return self._registry

    @property
    def step(self) -> int:
        """Number of the step under way, or finished last, over the whole training; the first one is 1."""
        return self._step

    @property
    def traffic(self) -> Traffic:
        """What this rank has handed to collectives since the compressor was made, Horovod's all-reduces included."""
        return self._meter.traffic

    def worker_norms(self) -> WorkerNorms:
        """Norms of the single ranks' quantized gradients in the step that finished last; equal on all ranks.

        Raises:
            ConfigError: unless configured with worker_norms=True.
            QodaError: before the first step has finished.
        """
        if self._vectors is None:
            raise ConfigError("worker_norms: the compressor was made without them; use worker_norms=True")
        return self._vectors.last

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to give the bits of an uninterrupted one.

        Plain values that JSON can hold, the same on every rank; but with worker_norms=True "rank_private" holds the
        last messages of this rank (tensors): then every rank saves its own state, and loads that.

        Raises:
            QodaError: between `backward()` and `optimizer.step()`.
        """
        with self._lock:
            if self._outstanding:
                raise QodaError("state_dict() within a step: call it after optimizer.step() and before backward()")
            return {
                "format": STATE_FORMAT,
                "step": self._step,
                "registry": self._registry.state_dict(),
                "levels": self._levels.state_dict(),
                "rank_private": self._private_state(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. To be called on every rank; whether they agree is checked anew.

        Where "rank_private" is None, the messages before are taken for zero vectors. Set it to None on every rank to do
        so on purpose, with another number of ranks for example.

        Raises:
            ConfigError: for something else than such a state.
            RegistryError: for the state of another model or of other codebooks.
            RankMismatchError: for the private state of another rank.
        """
        with self._lock:
            if state.get("format") != STATE_FORMAT:
                raise ConfigError(
                    f"the compressor's state has format {state.get('format')!r}; this version reads {STATE_FORMAT}"
                )
            registry = self._registry.restored(state["registry"])
            self._forget_world()
            self._registry = registry
            self._levels.load_state_dict(state["levels"])
            self._step = int(state["step"])
            if self._telemetry is not None:
                self._telemetry.rewind(self._step)
            if self._vectors is not None:
                self._load_private_state(self._vectors, state["rank_private"])

    def _enter_step(self, name: str) -> World:
        """Begin a step if this parameter's gradient is its first."""
        world = self._connected()
        if name in self._outstanding:
            # Horovod has thrown a step away, as its optimizer's load_state_dict() does. Every rank finds that out.
            self._abandon_step(world)
        if not self._outstanding:
            self._begin_step(world)
        elif name in self._taken:
            # Gradients of another optimizer are still under way, but this one's begin a new exchange. Levels cannot
            # change meanwhile; the next step that begins with nothing under way makes up for it.
            self._step += 1
            self._taken = set()
        return world

    def _connected(self) -> World:
        if self._world is not None and not self._outstanding and not self._world.is_current():
            self._world, self._agreed = None, False
        if self._world is None:
            self._world = World(self._name, self._config, self._process_set, self._meter)
        return self._world

    def _begin_step(self, world: World) -> None:
        if not self._agreed:
            # Under a name of its own, because this compressor's name depends on what is to be agreed upon.
            world.transport.require_roll_call("hvd_qoda.agreement.roll_call")
            check_agreement(world.transport, self._description())
            self._agreed = True
        world.transport.require_roll_call(f"{self._name}.roll_call")
        self._step += 1
        self._taken = set()
        self._account = StepAccount()
        registry = self._levels.begin_step(self._step, self._registry, world.transport)
        if registry is not self._registry:
            self._registry = registry
            world.use_codebooks(registry.codebooks)

    def _end_step(self, world: World) -> None:
        self._levels.end_step(self._step, self._registry, world.transport)
        if self._vectors is not None:
            self._vectors.end_step(self._registry.parameters, world.transport)
        sent = self._meter.traffic.sent_bytes
        if self._telemetry is not None:
            self._report(self._telemetry, sent - self._reported_bytes)
        self._reported_bytes = sent

    def _abandon_step(self, world: World) -> None:
        world.pending.drop()
        self._outstanding = {}
        self._levels.abandon_step()
        if self._vectors is not None:
            self._vectors.abandon_step()

    def _forget_world(self) -> None:
        """Start anew among whatever ranks there are then."""
        if self._world is not None and self._outstanding:
            # Names under way must not be used again. After a failure of the host nothing is under way any more.
            with contextlib.suppress(HorovodInternalError, QodaError):
                self._abandon_step(self._world)
        self._outstanding, self._taken = {}, set()
        self._world, self._agreed = None, False

    def _send(self, world: World, context: _Context) -> torch.Tensor:
        """Start a gradient's way; returns what Horovod is to all-reduce."""
        route, gradient = context.route, context.gradient
        key = route.entry.codebook
        size = world.transport.size
        raw_bytes = all_reduce_bytes(gradient.numel() * gradient.itemsize, size)
        if route.by_host:
            if self._vectors is not None:
                self._vectors.add(route.entry.name, ExactVector(gradient.detach().cpu().clone()))
            if self._measures_error:
                self._account.add_exact(key)
            self._account.add(key, gradient.numel(), raw_bytes, self._meter.all_reduce(gradient.nbytes, size))
            return gradient
        sent_bytes = self._meter.all_reduce(TOKEN_BYTES, size)
        if route.exchange is not None:
            values = cpu_values(gradient)
            route.exchange.start([values], Stamp(self._config.seed, self._step, self._registry.version))
            world.pending.add(route.exchange)
            sent_bytes += route.exchange.sent_bytes
            self._observe(route, values)
        self._account.add(key, gradient.numel(), raw_bytes, sent_bytes)
        return world.tokens.token(gradient.device)

    def _observe(self, route: Route, values: torch.Tensor) -> None:
        """Statistics, error and norms of a gradient that has just been encoded."""
        entry = route.entry
        if self._levels.wants(self._step, entry.codebook):
            self._levels.gather(entry.name, values, self._registry)
        if route.exchange is None or (self._vectors is None and not self._measures_error):
            return
        own = route.exchange.own_message()
        if self._measures_error:
            self._account.add_error(entry.codebook, values, own.decode()[0])
        if self._vectors is not None:
            self._vectors.add(entry.name, own)

    def _receive(self, world: World, context: _Context, reduced: torch.Tensor) -> torch.Tensor:
        """What arrived for a gradient."""
        exchange = context.route.exchange
        if context.route.by_host:
            return reduced
        if exchange is None:
            return context.gradient
        scale = world.tokens.scale(reduced)
        return written_back(context.gradient, lambda out: world.pending.finish(exchange, [out], scale))

    @property
    def _measures_error(self) -> bool:
        every = self._config.measure_error_every
        return every > 0 and (self._step - 1) % every == 0

    def _report(self, telemetry: Telemetry, sent_bytes: int) -> None:
        codebooks = self._registry.codebooks
        if not self._reported_codebooks:
            telemetry.start(self._config.to_dict(), {key: book.to_dict() for key, book in codebooks.items()})
        changed = [key for key, book in codebooks.items() if self._reported_codebooks.get(key) != book]
        records = self._account.records(codebooks, sent_bytes, changed)
        telemetry.log_exchange(self._step, records, self._registry.version)
        self._reported_codebooks = dict(codebooks)

    def _description(self) -> dict[str, Any]:
        """Everything that ranks must agree on."""
        registry = self._registry.describe()
        return {
            "version of hvd_qoda": __version__,
            "wire version": WIRE_VERSION,
            "name": self._given_name,
            "configuration": self._config.to_dict(),
            "parameter": {
                entry["name"]: f"{entry['dtype']} {entry['shape']}, type {entry['layer_type']}, as {entry['codebook']}"
                for entry in registry["parameters"]
            },
            "order of parameters": [entry["name"] for entry in registry["parameters"]],
            "codebook": {key: _summary(fields) for key, fields in registry["codebooks"].items()},
            "registry version": registry["version"],
            "step": self._step,
            "statistics": self._levels.state_dict(),
        }

    def _private_state(self) -> dict[str, Any] | None:
        if self._vectors is None:
            return None
        transport = (self._world or self._connected()).transport  # Horovod may have been shut down since
        return {"rank": transport.rank, "size": transport.size, **self._vectors.state_dict()}

    def _load_private_state(self, vectors: WorkerVectors, state: Mapping[str, Any] | None) -> None:
        if state is None:
            vectors.forget()
            return
        world = self._connected()
        world.check_private_state(state)
        vectors.load_state_dict(state, lambda name, dtype: world.route(self._registry, name, dtype).exchange)


def _summary(codebook: Mapping[str, Any]) -> str:
    """A codebook in one line."""
    levels = hashlib.blake2b(json.dumps(codebook["levels"]).encode(), digest_size=4).hexdigest()
    return (
        f"{codebook['bits']} bits, bucket {codebook['bucket_size']}, {codebook['norm']} norm as "
        f"{codebook['norm_format']}, {codebook['level_scheme']} levels {levels} of version {codebook['version']}"
    )
