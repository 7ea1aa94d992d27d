"""What an engine's gradients go through: plans, exchanges, levels, telemetry; one reducer per engine.

Steps and exchanges. DeepSpeed reduces a model in buckets, and with ZeRO 2 and 3 in every micro-batch. Each bucket is an
exchange with a number of its own, on which the random numbers depend. A step begins with the first bucket after the
engine's last optimizer step and ends before its next one; levels change at a beginning and nowhere else, statistics and
worker norms are exchanged at an end, so that between steps all ranks hold the same state. Steps that the loss scaler
skips count like any other.

Schemes. Where only one rank keeps a coordinate (ZeRO 1, 2, 3), a bucket is quantized once and each slice sent to its
owner; with exchange="allgather" to everybody, as in the paper. Where all keep it, the exchanges are those of Horovod.
Buckets that hold nothing to quantize are left to the host.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ds_plugin.backend import HostReduction
from ds_plugin.slices import Piece
from hvd_qoda.agreement import check_agreement
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError, RankMismatchError, UnsupportedError
from hvd_qoda.exchange import Exchange, ReduceToOwnerExchange, Stamp, make_exchange
from hvd_qoda.level_updates import LevelUpdates
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.staging import cpu_values
from hvd_qoda.step_account import StepAccount
from hvd_qoda.telemetry import Telemetry
from hvd_qoda.torch_distributed import TorchTransport
from hvd_qoda.traffic import Traffic, TrafficMeter, all_reduce_bytes, reduce_scatter_bytes
from hvd_qoda.transport import all_gather_bytes
from hvd_qoda.worker_vectors import ExactVector, WorkerVectors
from qoda_kernels import __version__
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.registry import CodebookRegistry
from qoda_kernels.wire import WIRE_VERSION
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["GradientReducer"]

STATE_FORMAT = 1
_MOST_ROUTES = 1024  # different buckets whose exchanges are kept: models with varying graphs make ever new ones


@dataclass(frozen=True)
class _Route:
    """How one kind of bucket travels.

    Attributes:
        number: counted from 0, in the order in which the kinds were first met.
        keys: key of the codebook of each piece.
        exchange: its exchange; None if the host reduces it.
    """

    number: int
    keys: tuple[str, ...]
    exchange: Exchange | None


class GradientReducer:
    """Reduces the gradients of one engine.

    Args:
        config: the configuration; the same on every rank.
        registry: layer types and codebooks of the model.
        group: the data-parallel process group, among whose ranks levels and settings are agreed on.
        threads: threads of the codec.
    """

    def __init__(self, config: QodaConfig, registry: CodebookRegistry, group: Any, threads: int) -> None:
        self._config = config
        self._registry = registry
        self._meter = TrafficMeter()
        self._transports: dict[Any, TorchTransport] = {}
        self._group = group
        self._threads = WorkerThreads(threads)
        self._levels = LevelUpdates(config.update_levels, registry)
        self._vectors = WorkerVectors() if config.worker_norms else None
        self._routes: OrderedDict[Any, _Route] = OrderedDict()
        self._routes_made = 0
        self._reports: list[_Report] = []
        self._reported_bytes = 0
        self._account = StepAccount()
        self._step = 0  # number of the step under way, or finished last
        self._exchanges = 0  # number of the exchange under way, or finished last
        self._in_step = False

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
        """What this rank has handed to collectives for gradients since the reducer was made."""
        return self._meter.traffic

    @property
    def transport(self) -> TorchTransport:
        """The data-parallel ranks."""
        return self._transport(self._group)

    def worker_norms(self) -> WorkerNorms:
        """Norms of the single ranks' quantized gradients in the step that finished last; equal on all ranks.

        Raises:
            ConfigError: unless configured with "worker_norms": true.
            QodaError: before the first step has finished.
        """
        if self._vectors is None:
            raise ConfigError('worker_norms: the "qoda" block has them off; add "worker_norms": true')
        return self._vectors.last

    def report_to(self, telemetry: Telemetry, close: bool = False) -> None:
        """Send one record per step to a telemetry from now on.

        Args:
            telemetry: receives them.
            close: close it with the engine.
        """
        self._reports.append(_Report(telemetry, close))

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Compare everything that ranks must agree on; a collective call that waits.

        Args:
            settings: the host's settings.

        Raises:
            RankMismatchError: on every rank, naming what differs.
        """
        described = self._registry.describe()
        description = {
            "version of hvd_qoda": __version__,
            "wire version": WIRE_VERSION,
            "configuration": self._config.to_dict(),
            "DeepSpeed": dict(settings),
            "parameter": {
                entry["name"]: f"{entry['dtype']} {entry['shape']}, type {entry['layer_type']}, as {entry['codebook']}"
                for entry in described["parameters"]
            },
            "order of parameters": [entry["name"] for entry in described["parameters"]],
            "codebook": {key: str(fields) for key, fields in described["codebooks"].items()},
            "step": self._step,
            "exchanges": self._exchanges,
            "levels": self._levels.state_dict(),
        }
        check_agreement(self.transport, description, "ds_plugin.agreement")

    def reduce(
        self, flat: torch.Tensor, pieces: Sequence[Piece], group: Any, average: bool, host: HostReduction
    ) -> None:
        """Write the ranks' sum into a buffer of gradients, in place; a collective call that waits.

        Pieces with an owner are written there only. What belongs to no piece (padding) is neither sent nor written.

        Args:
            flat: 1-D.
            pieces: what it consists of.
            group: the process group of the call.
            average: write the mean instead of the sum.
            host: what the host would do.

        Raises:
            RankMismatchError, WireError: if the ranks disagree.
            ExchangeTimeoutError: if a rank did not take part in time.
            UnsupportedError: for pieces that do not lie in the buffer.
        """
        _check_inside(flat, pieces)
        self._begin_step()
        transport = self._transport(group)
        route = self._route(tuple(pieces), flat.dtype, group)
        raw_bytes = _host_bytes(host, flat.numel() * flat.itemsize, transport.size)
        self._exchanges += 1
        if route.exchange is None:
            self._leave_to_host(flat, pieces, route, raw_bytes, host)
            return
        staged = cpu_values(flat)
        values = [staged[piece.position : piece.end] for piece in pieces]
        route.exchange.start(values, Stamp(self._config.seed, self._exchanges, self._registry.version))
        self._observe(route, pieces, values, raw_bytes)
        route.exchange.finish(values, scale=1.0 if average else float(transport.size))
        if flat.device.type != "cpu":
            flat.copy_(staged)

    def end_step(self) -> None:
        """To be called before the engine's optimizer steps; a collective call that waits.

        Raises:
            UnsupportedError: if no gradient has come by in the first step: the host has another way for them.
        """
        if not self._in_step:
            if self._step == 0 and self.transport.size > 1:
                raise UnsupportedError(
                    "DeepSpeed takes its first optimizer step, and no gradient has come by ds_plugin: they were "
                    'reduced on a way that it does not know, or not at all. Remove the "qoda" block to train without '
                    "compression."
                )
            return
        self._in_step = False
        self._levels.end_step(self._step, self._registry, self.transport)
        if self._vectors is not None:
            order = {str(route.number): None for route in self._routes.values()}
            self._vectors.end_step(order, self.transport)
        sent = self._meter.traffic.sent_bytes
        for report in self._reports:
            report.write(self._step, self._config, self._registry, self._account, sent - self._reported_bytes)
        self._reported_bytes = sent

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have in common, of plain values; with `private_state` all that a resumed run needs."""
        return {
            "format": STATE_FORMAT,
            "step": self._step,
            "exchanges": self._exchanges,
            "ranks": self.transport.size,
            "registry": self._registry.state_dict(),
            "levels": self._levels.state_dict(),
        }

    def private_state(self) -> dict[str, Any] | None:
        """What only this rank has (tensors); None if there is nothing such."""
        if self._vectors is None:
            return None
        routes = [
            {
                "number": route.number,
                "dtype": str(dtype).removeprefix("torch."),
                "pieces": [dataclasses.asdict(piece) for piece in pieces],
            }
            for (pieces, dtype, _), route in self._routes.items()
        ]
        rank, size = self.transport.rank, self.transport.size
        return {"rank": rank, "ranks": size, "routes": routes, **self._vectors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], private: Mapping[str, Any] | None) -> None:
        """Go on where the states were taken.

        Args:
            state: from `state_dict`, on any rank.
            private: from `private_state` on this rank; None to start with zero vectors.

        Raises:
            ConfigError: for something else than such a state.
            RegistryError: for the state of another model or of other codebooks.
            RankMismatchError: for the private state of another rank.
        """
        if state.get("format") != STATE_FORMAT:
            raise ConfigError(
                f"the plug-in's state has format {state.get('format')!r}; this version reads {STATE_FORMAT}"
            )
        self._registry = self._registry.restored(state["registry"])
        self._routes.clear()
        self._routes_made = 0
        self._levels.load_state_dict(state["levels"])
        self._step, self._exchanges, self._in_step = int(state["step"]), int(state["exchanges"]), False
        for report in self._reports:
            report.telemetry.rewind(self._step)
        if self._vectors is not None:
            self._vectors.forget()
            if private is not None:
                self._load_private_state(self._vectors, private)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        all_gather_bytes(self.transport, b"0", [1] * self.transport.size, "ds_plugin.barrier")

    def close(self) -> None:
        """Finish the telemetries that were made for this engine."""
        for report in self._reports:
            if report.closes:
                report.telemetry.close()
        self._reports = []

    def _begin_step(self) -> None:
        if self._in_step:
            return
        self._in_step = True
        self._step += 1
        self._account = StepAccount()
        registry = self._levels.begin_step(self._step, self._registry, self.transport)
        if registry is not self._registry:
            self._registry = registry
            for route in self._routes.values():
                if route.exchange is not None:
                    route.exchange.use_codebooks(registry.codebooks)

    def _transport(self, group: Any) -> TorchTransport:
        if group not in self._transports:
            self._transports[group] = TorchTransport(group, meter=self._meter, timeout_s=self._config.timeout_s)
        return self._transports[group]

    def _route(self, pieces: tuple[Piece, ...], dtype: torch.dtype, group: Any) -> _Route:
        key = (pieces, dtype, group)
        if key in self._routes:
            self._routes.move_to_end(key)
            return self._routes[key]
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.popitem(last=False)
        self._routes[key] = self._new_route(pieces, dtype, group)
        return self._routes[key]

    def _new_route(self, pieces: tuple[Piece, ...], dtype: torch.dtype, group: Any) -> _Route:
        entries = [self._registry.parameters[piece.parameter] for piece in pieces]
        keys = tuple(entry.codebook for entry in entries)
        number, self._routes_made = self._routes_made, self._routes_made + 1
        transport = self._transport(group)
        codebooks = self._registry.codebooks
        if transport.size == 1 or all(codebooks[key].is_exact for key in keys):
            return _Route(number, keys, None)
        slices = [
            Slice(entry.name, piece.start, piece.length, dtype, entry.codebook, entry.offset)
            for entry, piece in zip(entries, pieces, strict=True)
        ]
        plan = MessagePlan.build(slices, codebooks)
        name = f"ds_plugin.bucket.{number}"
        owners = [piece.owner for piece in pieces if piece.owner is not None]
        exchange: Exchange
        if owners and self._config.exchange != "allgather":
            exchange = ReduceToOwnerExchange(plan, owners, codebooks, transport, name, self._threads)
        else:
            exchange = make_exchange(self._config.exchange, plan, codebooks, transport, name, self._threads)
        return _Route(number, keys, exchange)

    def _leave_to_host(
        self, flat: torch.Tensor, pieces: Sequence[Piece], route: _Route, raw_bytes: float, host: HostReduction
    ) -> None:
        if self._vectors is not None:
            values = [flat[piece.position : piece.end] for piece in pieces]  # without padding
            self._vectors.add(str(route.number), ExactVector(cpu_values(torch.cat(values)).clone()))
        host.run()
        self._meter.host(host.kind, raw_bytes)
        total = sum(piece.length for piece in pieces)
        for key, piece in zip(route.keys, pieces, strict=True):
            share = raw_bytes * piece.length / total
            self._account.add(key, piece.length, share, share)
            if self._measures_error:
                self._account.add_exact(key)

    def _observe(
        self, route: _Route, pieces: Sequence[Piece], values: Sequence[torch.Tensor], raw_bytes: float
    ) -> None:
        """Bytes, statistics, error and norms of a bucket that has just been encoded."""
        exchange = route.exchange
        assert exchange is not None  # the host's buckets do not come here
        segments = exchange.plan.segments
        occupied = sum(segment.end - segment.begin for segment in segments)
        total = sum(piece.length for piece in pieces)
        for key, piece, segment, value in zip(route.keys, pieces, segments, values, strict=True):
            sent = exchange.sent_bytes * (segment.end - segment.begin) / occupied
            self._account.add(key, piece.length, raw_bytes * piece.length / total, sent)
            if self._levels.wants(self._step, key):
                self._levels.gather(piece.parameter, value, self._registry)
        if self._vectors is None and not self._measures_error:
            return
        own = exchange.own_message()
        if self._measures_error:
            for key, value, decoded in zip(route.keys, values, own.decode(), strict=True):
                self._account.add_error(key, value, decoded)
        if self._vectors is not None:
            self._vectors.add(str(route.number), own)

    @property
    def _measures_error(self) -> bool:
        every = self._config.measure_error_every
        return every > 0 and (self._step - 1) % every == 0

    def _load_private_state(self, vectors: WorkerVectors, private: Mapping[str, Any]) -> None:
        ours = (self.transport.rank, self.transport.size)
        theirs = (private["rank"], private["ranks"])
        if ours != theirs:
            raise RankMismatchError(
                f"the state was saved by position {theirs[0]} of {theirs[1]} ranks and is loaded at position {ours[0]} "
                f"of {ours[1]}"
            )
        exchanges: dict[str, Exchange | None] = {}
        for saved in sorted(private["routes"], key=lambda route: route["number"]):
            pieces = tuple(Piece(**fields) for fields in saved["pieces"])
            route = self._route(pieces, getattr(torch, saved["dtype"]), self._group)
            exchanges[str(saved["number"])] = route.exchange
        vectors.load_state_dict(private, lambda name, dtype: exchanges[name])


class _Report:
    """A telemetry, and what it knows."""

    def __init__(self, telemetry: Telemetry, closes: bool) -> None:
        self.telemetry = telemetry
        self.closes = closes
        self._known: dict[str, Codebook] = {}

    def write(
        self, step: int, config: QodaConfig, registry: CodebookRegistry, account: StepAccount, sent_bytes: int
    ) -> None:
        codebooks = registry.codebooks
        if not self._known:
            self.telemetry.start(config.to_dict(), {key: book.to_dict() for key, book in codebooks.items()})
        changed = [key for key, book in codebooks.items() if self._known.get(key) != book]
        self.telemetry.log_exchange(step, account.records(codebooks, sent_bytes, changed), registry.version)
        self._known = dict(codebooks)


def _check_inside(flat: torch.Tensor, pieces: Sequence[Piece]) -> None:
    """Pieces lie in the buffer, in order, and do not overlap."""
    position = 0
    for piece in pieces:
        if piece.position < position:
            raise UnsupportedError(f"the gradients of {piece.parameter!r} overlap others in DeepSpeed's buffer")
        position = piece.end
    if not pieces or position > flat.numel() or flat.dim() != 1 or not flat.is_contiguous():
        raise UnsupportedError(
            f"DeepSpeed reduces a {flat.dtype} {list(flat.shape)}, and the gradients announced for it end at place "
            f"{position}: ds_plugin does not know what this is"
        )


def _host_bytes(host: HostReduction, payload: int, size: int) -> float:
    return (all_reduce_bytes if host.kind == "all_reduce" else reduce_scatter_bytes)(payload, size)
