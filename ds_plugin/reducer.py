"""What an engine's gradients go through: plans and exchanges of its buckets; one reducer per engine.

Steps and exchanges. DeepSpeed reduces a model in buckets, and with ZeRO 2 and 3 in every micro-batch. Each bucket is an
exchange with a number of its own, on which the random numbers depend. A step begins with the first bucket after the
engine's last optimizer step and ends before its next one; what belongs to a step is the session's (`hvd_qoda.session`).
Steps that the loss scaler skips count like any other.

Schemes. Where only one rank keeps a coordinate (ZeRO 1, 2, 3), a bucket is quantized once and each slice sent to its
owner; with exchange="allgather" to everybody, as in the paper. Where all keep it, the exchanges are those of Horovod.
Buckets that hold nothing to quantize are left to the host.
"""

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ds_plugin.backend import HostReduction
from ds_plugin.reports import Reports
from ds_plugin.slices import Piece
from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import RankMismatchError, UnsupportedError
from hvd_qoda.exchange import Exchange, Stamp
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.reduce_to_owner import ReduceToOwnerExchange
from hvd_qoda.schemes import make_exchange
from hvd_qoda.session import Session
from hvd_qoda.staging import values_on
from hvd_qoda.torch_distributed import TorchTransport
from hvd_qoda.traffic import Traffic, all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes
from hvd_qoda.transport import all_gather_array
from qoda_kernels.errors import WireError
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.registry import CodebookRegistry
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["GradientReducer"]

_MOST_ROUTES = 1024  # different buckets whose exchanges are kept: models with varying graphs make ever new ones
_PRIVATE = "rank_private"  # key of the session's state


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

    def key_of_piece(self, index: int) -> str:
        """Under which the session knows a piece that the host has reduced."""
        return f"{self.number}.{index}"


_DIFFERENT_LAYERS = (
    "Ranks may have gradients of different parameters in one bucket, if they used different layers in this backward "
    "pass: under ZeRO 1 and 2 that needs a zero_optimization.reduce_bucket_size that holds the whole model (and "
    "engine.backward(loss), not loss.backward()), or every rank must use every layer, if only with a factor of 0"
)


def _digest(values: Any) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(repr(values).encode(), digest_size=16).digest(), np.int64)


class GradientReducer:
    """Reduces the gradients of one engine.

    Args:
        session: of the engine's model.
        reports: what the session reports to.
        group: the data-parallel process group, among whose ranks levels and settings are agreed on.
        threads: threads of the codec.
        settings: of DeepSpeed, that ranks must agree on.
    """

    def __init__(
        self, session: Session, reports: Reports, group: Any, threads: int, settings: Mapping[str, Any]
    ) -> None:
        self._session = session
        self.reports = reports
        self._group = group
        self._threads = WorkerThreads(threads)
        self._settings = dict(settings)
        self._transports: dict[Any, TorchTransport] = {}
        self._routes: OrderedDict[Any, _Route] = OrderedDict()
        self._routes_made = 0
        self._saved_routes: dict[str, Mapping[str, Any]] = {}  # of a checkpoint that is being loaded, by number
        self._exchanges = 0  # number of the exchange under way, or finished last
        self._in_step = False
        self._fills_by_arrival = settings["zero_optimization.stage"] in (1, 2)
        self._is_finite = True  # what has arrived on this rank in the step under way
        session.use_route(self)

    @property
    def has_private_state(self) -> bool:
        """Whether `private_state` is not None."""
        return self.config.worker_norms or self.config.error_feedback

    @property
    def config(self) -> QodaConfig:
        """The configuration."""
        return self._session.config

    @property
    def registry(self) -> CodebookRegistry:
        """Layer types and codebooks, with the levels of the step under way or finished last."""
        return self._session.registry

    @property
    def step(self) -> int:
        """Number of the step under way, or finished last, over the whole training; the first one is 1."""
        return self._session.step

    @property
    def traffic(self) -> Traffic:
        """What this rank has handed to collectives for gradients since the reducer was made."""
        return self._session.traffic

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
        return self._session.worker_norms()

    def agree(self) -> None:
        """Compare everything that ranks must agree on; a collective call that waits.

        Raises:
            RankMismatchError: on every rank, naming what differs.
        """
        self._session.agree(self.transport)

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
            self._leave_to_host(flat, pieces, route, raw_bytes, host, transport)
            return
        staged = values_on(self._session.coding_device([flat]), flat)
        values = [staged[piece.position : piece.end] for piece in pieces]
        sent = self._session.corrected(route.exchange, values)
        config, version = self.config, self.registry.version
        stamp = Stamp(config.seed, self._exchanges, version, config.dither, config.rotations)
        route.exchange.start(sent, stamp)
        self._account(route.exchange, raw_bytes)
        self._session.observe(str(route.number), route.exchange, sent)
        try:
            route.exchange.finish(values, scale=1.0 if average else float(transport.size))
        except WireError as error:
            raise WireError(f"{error}. {_DIFFERENT_LAYERS}" if self._fills_by_arrival else str(error)) from error
        self._look_for_overflow(_kept(values, pieces, transport.rank))
        if staged.device != flat.device:
            flat.copy_(staged)

    def pass_by(self, kind: str, payload: int) -> None:
        """Count gradients that the host reduces as they are, outside of `reduce`; among the step's control bytes.

        Args:
            kind: "all_reduce" or "all_gather".
            payload: bytes that this rank hands over.
        """
        self._begin_step()
        measure = {"all_reduce": all_reduce_bytes, "all_gather": all_gather_bytes}[kind]
        self._session.meter.host(kind, measure(payload, self.transport.size))

    def end_step(self) -> None:
        """To be called before the engine's optimizer steps; a collective call that waits.

        Raises:
            UnsupportedError: if no gradient has come by in the first step: the host has another way for them.
        """
        if self._in_step:
            self._in_step = False
            self._agree_on_overflow()
            keys = [
                key
                for route in sorted(self._routes.values(), key=lambda route: route.number)
                for key in (str(route.number), *(route.key_of_piece(index) for index in range(len(route.keys))))
            ]
            self._session.end_step(self.transport, keys)
        elif self.step == 0 and self.transport.size > 1:
            raise UnsupportedError(
                "DeepSpeed takes its first optimizer step, and no gradient has come by ds_plugin: they were reduced on "
                'a way that it does not know, or not at all. Remove the "qoda" block to train without compression.'
            )

    def loss_scale_changed(self, factor: float) -> None:
        """Keep what error feedback has kept in the unit of the gradients to come.

        Args:
            factor: new loss scale / old one.
        """
        if self.config.error_feedback and factor != 1.0:
            self._session.error_feedback.scale(factor)

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have in common, of plain values; with `private_state` all that a resumed run needs.

        Within a step it is the session's state before that step, as DeepSpeed saves no accumulated gradients: a resumed
        run takes the whole step anew. Numbers of exchanges are not used again.
        """
        common = {key: value for key, value in self._session.state_dict().items() if key != _PRIVATE}
        return {"session": common, "exchanges": self._exchanges, "ranks": self.transport.size}

    def private_state(self) -> dict[str, Any] | None:
        """What only this rank has (tensors); None if there is nothing such."""
        private = self._session.state_dict()[_PRIVATE]
        if private is None:
            return None
        routes = [
            {
                "number": route.number,
                "dtype": str(dtype).removeprefix("torch."),
                "pieces": [dataclasses.asdict(Piece(*fields)) for fields in contents],
            }
            for (contents, dtype, _), route in self._routes.items()
        ]
        return {"routes": routes, "session": private}

    def load_state_dict(self, state: Mapping[str, Any], private: Mapping[str, Any] | None) -> None:
        """Go on where the states were taken; a collective call that waits.

        Args:
            state: from `state_dict`, on any rank.
            private: from `private_state` on this rank; None to start with zero vectors.

        Raises:
            ConfigError: for something else than such a state.
            RegistryError: for the state of another model or of other codebooks.
            RankMismatchError: for the private state of another rank, or if the ranks have loaded different states.
        """
        self._saved_routes = {} if private is None else {str(saved["number"]): saved for saved in private["routes"]}
        own = None if private is None else private["session"]
        self._session.load_state_dict({**state["session"], _PRIVATE: own})
        self._saved_routes = {}
        self._exchanges, self._in_step = int(state["exchanges"]), False
        self.agree()

    def close(self) -> None:
        """Finish the telemetries that were made for this engine."""
        self.reports.close()

    def description(self) -> Mapping[str, Any]:
        """See `hvd_qoda.session.GradientRoute`."""
        return {"DeepSpeed": self._settings, "exchanges": self._exchanges}

    def connect(self) -> TorchTransport:
        """See `hvd_qoda.session.GradientRoute`."""
        return self.transport

    def exchange_of(self, key: str, dtype: torch.dtype) -> Exchange | None:
        """See `hvd_qoda.session.GradientRoute`; asked only while a checkpoint is loaded."""
        # All up to this one, in their order, so that they get their numbers again.
        for number in sorted(map(int, self._saved_routes)):
            saved = self._saved_routes[str(number)]
            pieces = tuple(Piece(**fields) for fields in saved["pieces"])
            route = self._route(pieces, getattr(torch, saved["dtype"]), self._group)
            if number == int(key):
                return route.exchange
        return None

    def forget(self) -> None:
        """See `hvd_qoda.session.GradientRoute`."""
        self._routes.clear()
        self._routes_made = 0

    def _begin_step(self) -> None:
        if self._in_step:
            return
        self._in_step = True
        if self._session.begin_step(self.transport):
            for route in self._routes.values():
                if route.exchange is not None:
                    route.exchange.use_codebooks(self.registry.codebooks)

    def _agree_on_overflow(self) -> None:
        """Let error feedback forget a step on all ranks if one of them has received what is not finite."""
        if self.config.error_feedback:
            flags = all_gather_array(self.transport, np.array([self._is_finite]), "ds_plugin.finite")
            if not flags.all():
                self._session.arrived(torch.tensor(float("inf"), device="cpu"))
        self._is_finite = True

    def _transport(self, group: Any) -> TorchTransport:
        if group not in self._transports:
            made = TorchTransport(group, meter=self._session.meter, timeout_s=self.config.timeout_s)
            # One for all groups of the same ranks: DeepSpeed has several, and a checkpoint does not tell them apart.
            same = (known for known in self._transports.values() if known.ranks == made.ranks)
            self._transports[group] = next(same, made)
        return self._transports[group]

    def _route(self, pieces: tuple[Piece, ...], dtype: torch.dtype, group: Any) -> _Route:
        # Without their places, which may differ between ranks and steps.
        contents = tuple((piece.parameter, piece.start, piece.length, 0, piece.owner) for piece in pieces)
        key = (contents, dtype, self._transport(group).ranks)
        if key in self._routes:
            self._routes.move_to_end(key)
            return self._routes[key]
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.popitem(last=False)
        self._routes[key] = self._new_route(pieces, dtype, group)
        return self._routes[key]

    def _new_route(self, pieces: tuple[Piece, ...], dtype: torch.dtype, group: Any) -> _Route:
        entries = [self.registry.parameters[piece.parameter] for piece in pieces]
        keys = tuple(entry.codebook for entry in entries)
        number, self._routes_made = self._routes_made, self._routes_made + 1
        transport = self._transport(group)
        codebooks = self.registry.codebooks
        if transport.size == 1 or all(codebooks[key].is_exact for key in keys):
            return _Route(number, keys, None)
        slices = [
            Slice(entry.name, piece.start, piece.length, dtype, entry.codebook, entry.offset)
            for entry, piece in zip(entries, pieces, strict=True)
        ]
        plan = MessagePlan.build(slices, codebooks)
        name = f"ds_plugin.bucket.{number}"
        owners = [piece.owner for piece in pieces if piece.owner is not None]
        scheme = "by_bytes" if self.config.exchange == "auto" else self.config.exchange
        if owners and scheme != "allgather":
            exchange: Exchange = ReduceToOwnerExchange(plan, owners, codebooks, transport, name, self._threads)
        else:
            exchange = make_exchange(scheme, plan, codebooks, transport, name, self._threads)
        return _Route(number, keys, exchange)

    def _leave_to_host(
        self,
        flat: torch.Tensor,
        pieces: Sequence[Piece],
        route: _Route,
        raw_bytes: float,
        host: HostReduction,
        transport: TorchTransport,
    ) -> None:
        total = sum(piece.length for piece in pieces)
        values = [flat[piece.position : piece.end] for piece in pieces]
        for index, (key, piece) in enumerate(zip(route.keys, pieces, strict=True)):
            self._session.observe_exact(route.key_of_piece(index), key, values[index], piece.parameter)
            share = raw_bytes * piece.length / total
            self._session.account(key, piece.length, share, share)
        self._look_for_overflow(values)  # before: of other ranks' results this one may see nothing
        with self._equal_layouts(values, pieces, transport):
            host.run()
        self._look_for_overflow(_kept(values, pieces, self.transport.rank))
        self._session.meter.host(host.kind, raw_bytes)

    @contextmanager
    def _equal_layouts(
        self, values: Sequence[torch.Tensor], pieces: Sequence[Piece], transport: TorchTransport
    ) -> Iterator[None]:
        """While the host adds up a buffer place by place: where ranks hold it in different orders, in the model's.

        ZeRO 1 and 2 fill their buckets in the order of backward, which differs between ranks that use different
        layers.
        """
        if transport.size == 1 or not self._fills_by_arrival or len(pieces) == 1:
            yield
            return
        places = [(piece.parameter, piece.start, piece.length, piece.owner) for piece in pieces]
        positions = [piece.position for piece in pieces]
        found = all_gather_array(transport, np.stack([_digest(places), _digest(positions)]), "ds_plugin.layout")
        if any((other[0] != found[0][0]).any() for other in found):
            raise RankMismatchError(_DIFFERENT_LAYERS)
        if all((other[1] == found[0][1]).all() for other in found):
            yield
            return
        total = sum(piece.length for piece in pieces)
        if sorted(positions)[0] != 0 or max(piece.end for piece in pieces) != total:
            raise RankMismatchError(_DIFFERENT_LAYERS)
        packed = torch.cat(list(values))
        buffer = values[positions.index(0)].as_strided((total,), (1,))
        buffer.copy_(packed)
        yield
        for value, result in zip(values, buffer.clone().split([piece.length for piece in pieces]), strict=True):
            value.copy_(result)

    def _look_for_overflow(self, values: Sequence[torch.Tensor]) -> None:
        """With error feedback, notice that DeepSpeed will skip this step; see `ErrorFeedback.arrived`."""
        if self.config.error_feedback:
            self._is_finite = self._is_finite and all(bool(torch.isfinite(value).all()) for value in values)

    def _account(self, exchange: Exchange, raw_bytes: float) -> None:
        """Divide a bucket's bytes among its codebooks."""
        segments = exchange.plan.segments
        occupied = sum(segment.end - segment.begin for segment in segments)
        total = exchange.plan.coordinates
        for segment in segments:
            length = segment.slice.length
            sent = exchange.sent_bytes * (segment.end - segment.begin) / occupied
            self._session.account(segment.slice.codebook, length, raw_bytes * length / total, sent)


def _check_inside(flat: torch.Tensor, pieces: Sequence[Piece]) -> None:
    """Pieces lie in the buffer, and do not overlap."""
    position = 0
    for piece in sorted(pieces, key=lambda piece: piece.position):
        if piece.position < position:
            raise UnsupportedError(f"the gradients of {piece.parameter!r} overlap others in DeepSpeed's buffer")
        position = piece.end
    if not pieces or position > flat.numel() or flat.dim() != 1 or not flat.is_contiguous():
        raise UnsupportedError(
            f"DeepSpeed reduces a {flat.dtype} {list(flat.shape)}, and the gradients announced for it end at place "
            f"{position}: ds_plugin does not know what this is"
        )


def _kept(values: Sequence[torch.Tensor], pieces: Sequence[Piece], rank: int) -> list[torch.Tensor]:
    """What this rank keeps of a buffer."""
    return [value for value, piece in zip(values, pieces, strict=True) if piece.owner in (None, rank)]


def _host_bytes(host: HostReduction, payload: int, size: int) -> float:
    return (all_reduce_bytes if host.kind == "all_reduce" else reduce_scatter_bytes)(payload, size)
