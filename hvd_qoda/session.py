"""What the exchanges of one model share from step to step, whichever route its gradients take.

A session knows the model's layer types and codebooks, counts the steps, and does what belongs to every step: ranks
agree before the first one, levels change where a step begins, statistics and worker norms are exchanged where it ends,
telemetry gets its record, and all of it can be saved and resumed exactly.

The routes (`hvd_qoda.horovod.compressor` under the stock optimizer, `hvd_qoda.horovod.gradient_exchange` under ours)
own the exchanges. They say when steps begin and end, and hand over what they have sent.
"""

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from hvd_qoda.agreement import check_agreement
from hvd_qoda.codec_device import CodecDevice
from hvd_qoda.config import QodaConfig
from hvd_qoda.cost_model import QUANTIZED_SCHEMES
from hvd_qoda.description import training_description
from hvd_qoda.error_feedback import ErrorFeedback
from hvd_qoda.errors import ConfigError, QodaError, RankMismatchError, RegistryError
from hvd_qoda.exchange import Exchange, Stamp
from hvd_qoda.fusion import real_numel
from hvd_qoda.learnt import learnt_record
from hvd_qoda.level_updates import LevelMark, LevelUpdates
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.parameters import check_parameters, check_unchanged, refuse_sharded_modules
from hvd_qoda.scheme_choice import SchemeChoice
from hvd_qoda.staging import cpu_values
from hvd_qoda.step_account import StepAccount
from hvd_qoda.telemetry import LayerTypeRecord
from hvd_qoda.traffic import Traffic, TrafficMeter
from hvd_qoda.transport import Transport
from hvd_qoda.worker_vectors import ExactVector, WorkerVectors
from qoda_kernels.codebook import Codebook
from qoda_kernels.registry import COMPRESSIBLE_DTYPES, CodebookRegistry

__all__ = ["ExchangeReports", "GradientRoute", "Session", "sparse_parameters"]

STATE_FORMAT = 2

_logger = logging.getLogger(__name__)


class ExchangeReports(Protocol):
    """Whoever is told what the steps have exchanged; see the methods of `Telemetry`."""

    def start(
        self, config: Mapping[str, Any] | None = None, codebooks: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """The configuration and the code tables, before the first step."""

    def log_exchange(
        self,
        step: int | None,
        layer_types: Iterable[LayerTypeRecord],
        registry_version: int,
        note: str | None = None,
    ) -> None:
        """What a step has exchanged."""

    def rewind(self, step: int) -> None:
        """The steps after this one come once more."""


class GradientRoute(Protocol):
    """Whoever exchanges a session's gradients."""

    def description(self) -> Mapping[str, Any]:
        """What ranks must agree on about the route, as JSON-able values."""

    def connect(self) -> Transport:
        """The ranks that there are now."""

    def exchange_of(self, key: str, dtype: torch.dtype) -> Exchange | None:
        """The exchange of which `Session.observe` was told under this key, for gradients of this dtype.

        None if such gradients are not compressed now.
        """

    def forget(self) -> None:
        """End what is under way and forget it, as well as the ranks; after a failure of the host, too."""


@dataclass(frozen=True)
class _Mark:
    """Where a session stands between two steps: all of its state that a step under way changes before it ends."""

    step: int
    registry: CodebookRegistry
    levels: LevelMark
    choice: Mapping[str, Any] | None
    gradient_order: tuple[str, ...] | None


class Session:
    """Layer types, codebooks, step numbers, statistics, norms and telemetry of one model; the same on every rank.

    Args:
        parameters: the model, or its (name, parameter) pairs in the model's order; the same on every rank.
        config: the configuration; the same on every rank.
        telemetry: receives one record per step.
        name: what the names of its collectives begin with; the same on every rank.
        shapes: parameter name -> its shape, where the host keeps only a part of it in each process.

    Raises:
        RegistryError: for layer rules that match nothing, settings that no codebook can have, or a name given twice.
        ConfigError: for parameters that are not there yet: lazy, or on the meta device.
        UnsupportedError: for sharded parameters, and gradients of a dtype that cannot be sent.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, torch.Tensor]],
        config: QodaConfig,
        telemetry: ExchangeReports | None = None,
        name: str = "",
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        refuse_sharded_modules(parameters)
        pairs = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
        repeated = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        if repeated:
            raise RegistryError(f"parameter names are not unique: {', '.join(repeated)}")
        self.parameters = dict(pairs)
        check_parameters(self.parameters)
        # Those that are known to have sparse gradients.
        self.sparse_parameters = sparse_parameters(parameters) if isinstance(parameters, nn.Module) else frozenset()
        self.config = config
        self.registry = config.build_registry(parameters if isinstance(parameters, nn.Module) else pairs, shapes)
        # The digest, because exchanges of several models may be under way at once.
        self.name = f"hvd_qoda.{name}.{self.registry.digest.hex()}"
        self.lock = threading.RLock()  # with several devices the hosts' hooks run in several threads
        self.meter = TrafficMeter()
        self.step = 0  # number of the step under way, or finished last
        self.gradient_order: tuple[str, ...] | None = None  # in which backward makes them, where a route has found out
        self._given_name = name
        # Weak, so that a route ends with its optimizer, and its hooks with it.
        self._route: weakref.ref[GradientRoute] | None = None
        self._levels = LevelUpdates(config.update_levels, self.registry, learns=config.exchange != "off")
        self.choice = SchemeChoice(_allowed_schemes(config), self.name) if config.exchange == "auto" else None
        self._note: str | None = None
        self._vectors = WorkerVectors() if config.worker_norms else None
        self._feedback = ErrorFeedback() if config.error_feedback else None
        self._codec_device = CodecDevice(config.codec_device, config.dither == "stratified")
        self._telemetry = telemetry
        self._reported_codebooks: dict[str, Codebook] = {}
        self._reported_bytes = 0
        self._account = StepAccount()
        self._before: _Mark | None = None  # where the session stood when the step under way began
        self._agreed_with: Transport | None = None

    @property
    def traffic(self) -> Traffic:
        """What this rank has handed to collectives so far."""
        return self.meter.traffic

    @property
    def stamp(self) -> Stamp:
        """Of the messages of the step under way."""
        return Stamp(self.config.seed, self.step, self.registry.version, self.config.dither, self.config.rotations)

    @property
    def keeps_vectors(self) -> bool:
        """Whether worker norms are exchanged."""
        return self._vectors is not None

    def worker_norms(self) -> WorkerNorms:
        """Norms of the single ranks' quantized gradients in the step that finished last; equal on all ranks.

        Raises:
            ConfigError: unless configured with worker_norms=True.
            QodaError: before the first step has finished.
        """
        if self._vectors is None:
            raise ConfigError("worker_norms: the compressor was made without them; use worker_norms=True")
        return self._vectors.last

    def use_route(self, route: GradientRoute) -> None:
        """Let this route exchange the gradients from now on."""
        before = None if self._route is None else self._route()
        if before is not None:
            before.forget()
        self._route = weakref.ref(route)
        self._agreed_with = None

    def is_used_by(self, route: GradientRoute) -> bool:
        """Whether `use_route` was called with this one last."""
        return self._route is not None and self._route() is route

    def agree_anew(self) -> None:
        """Let ranks compare their descriptions once more before the next step."""
        self._agreed_with = None

    def agree(self, transport: Transport) -> None:
        """Compare what ranks must agree on now, not before the next step; a collective call that waits.

        Raises:
            RankMismatchError: on every rank, if they do not.
            ConfigError: if parameters have been cast since the session was made, so that their codebooks do not fit.
            UnsupportedError: on every rank, with codec_device="gpu", if no GPU can code the gradients.
        """
        check_unchanged(self.parameters, self.registry.parameters)
        check_agreement(transport, {**self._description(), **self._device_verdict(transport, self.registry)})
        self._refuse_device(transport)
        self._agreed_with = transport

    def begin_step(self, transport: Transport, roll_call: Callable[[str], None] = lambda name: None) -> bool:
        """Begin a step; a collective call that waits, if this is the first one with this transport or levels change.

        Args:
            transport: the ranks.
            roll_call: called with a name for a collective, before the first one of the step is started.

        Returns:
            Whether codebooks have changed.

        Raises:
            RankMismatchError: on every rank, if ranks do not agree on model, configuration, version or levels, or some
                cannot have codec_device="gpu".
            UnsupportedError: on every rank, if none can.
        """
        if self._agreed_with is not transport:
            # Under a name of its own, because this session's name depends on what is to be agreed upon.
            roll_call("hvd_qoda.agreement.roll_call")
            self.agree(transport)
        roll_call(f"{self.name}.roll_call")
        self._before = self._mark()
        self.step += 1
        self._account = StepAccount()
        before = self.registry
        verdict = partial(self._device_verdict, transport)
        self.registry = self._levels.begin_step(self.step, before, transport, verdict)
        if self.registry is before:
            return False
        self._refuse_device(transport)
        return True

    def note(self, text: str) -> None:
        """Say what changes in this step, and why: in the log and in the step's record."""
        if self._agreed_with is not None and self._agreed_with.rank == 0:
            _logger.info("step %d: %s", self.step, text)
        self._note = text

    def count_exchange(self) -> None:
        """Give what is sent from now on a step number of its own, while earlier exchanges are still under way."""
        self.step += 1

    def account(self, key: str, coordinates: int, raw_bytes: float, sent_bytes: float, exact: bool = False) -> None:
        """Note what one gradient, or several of one codebook, cost; see `StepAccount.add`."""
        self._account.add(key, coordinates, raw_bytes, sent_bytes, exact)

    def _device_verdict(self, transport: Transport, registry: CodebookRegistry) -> dict[str, str]:
        """Whether codec_device="gpu" can be had on this rank; what ranks compare when codebooks have changed."""
        return {"codec_device='gpu'": self._codec_device.verdict(self._coded_devices(transport), registry)}

    def _refuse_device(self, transport: Transport) -> None:
        self._codec_device.refuse(self._coded_devices(transport), self.registry)

    def _coded_devices(self, transport: Transport) -> set[torch.device]:
        if transport.size == 1 or self.config.exchange == "off":
            return set()
        return {parameter.device for parameter in self.parameters.values() if parameter.requires_grad}

    def coding_device(self, gradients: Sequence[torch.Tensor]) -> torch.device:
        """Where gradients that travel together are to be encoded and decoded; see `CodecDevice.of`."""
        return self._codec_device.of(gradients, self.registry)

    @property
    def error_feedback(self) -> ErrorFeedback:
        """This rank's residuals.

        Raises:
            ConfigError: unless configured with error_feedback=True.
        """
        if self._feedback is None:
            raise ConfigError("error_feedback: the compressor was made without it; use error_feedback=True")
        return self._feedback

    def corrected(self, exchange: Exchange, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What an exchange is to be started with: the gradients, and with error feedback their residuals added.

        To be called before every `Exchange.start`; the result is also what `observe` gets.
        """
        return values if self._feedback is None else self._feedback.corrected(exchange, values)

    def arrived(self, result: torch.Tensor) -> None:
        """Look at a gradient that has arrived, before the step ends: error feedback ignores steps that overflow."""
        if self._feedback is not None:
            self._feedback.arrived(result)

    def observe(self, key: str, exchange: Exchange, values: Sequence[torch.Tensor]) -> None:
        """Statistics, error and norms of gradients that have just been encoded.

        Args:
            key: names the exchange; see `GradientRoute.exchange_of`.
            exchange: whose round has just been started.
            values: what it was started with.
        """
        slices = [segment.slice for segment in exchange.plan.segments]
        for part, tensor in zip(slices, values, strict=True):
            if self._levels.wants(self.step, part.codebook):
                self._levels.gather(part.parameter, tensor, self.registry)
        if self._vectors is None and self._feedback is None and not self._measures_error:
            return
        if self._vectors is None and not exchange.has_own_message:
            return
        own = exchange.own_message()
        if self._measures_error or self._feedback is not None:
            sent = own.decode(values[0].device)
            if self._measures_error:
                for part, tensor, decoded in zip(slices, values, sent, strict=True):
                    self._account.add_error(part.codebook, tensor, decoded)
            if self._feedback is not None:
                self._feedback.keep(exchange, sent)
        if self._vectors is not None:
            self._vectors.add(key, own)

    def observe_exact(self, key: str, codebook: str, gradient: torch.Tensor, parameter: str | None = None) -> None:
        """Note a gradient that travels as it is, outside of our exchanges, before it is sent.

        Args:
            key: the parameter's name, or that of a part of it.
            codebook: key of its codebook.
            gradient: dense. With error feedback what is left of a whole parameter's earlier messages is added to it.
            parameter: the parameter's name, if `key` is not.
        """
        if self._feedback is not None:
            self._feedback.add_to(key, gradient)
        if gradient.dtype in COMPRESSIBLE_DTYPES and self._levels.wants(self.step, codebook):
            # Levels go on following gradients that travel as they are for a while.
            self._levels.gather(parameter or key, cpu_values(gradient), self.registry)
        if self._measures_error:
            self._account.add_exact(codebook)
        if self._vectors is not None:
            self._vectors.add(key, ExactVector((gradient.detach().cpu().clone(),), (key,)))

    def regroup_vectors(self, contents: Mapping[str, Sequence[str]]) -> None:
        """Go on with other exchanges from the next step on, which carry other parameters together.

        Args:
            contents: key to be given to `observe` or `observe_exact` -> parameters, in order.
        """
        if self._vectors is not None:
            sizes = {name: real_numel(entry) for name, entry in self.registry.parameters.items()}
            self._vectors.regroup(contents, sizes)

    def end_step(self, transport: Transport, order: Iterable[str]) -> None:
        """End a step when everything has arrived; a collective call that waits, in some steps or with worker norms.

        Args:
            transport: the ranks.
            order: keys given to `observe` and `observe_exact`, in an order that is the same in every run.
        """
        self._levels.end_step(self.step, self.registry, transport)
        if self._vectors is not None:
            self._vectors.end_step(order, transport)
        if self._feedback is not None:
            self._feedback.end_step()
        sent = self.meter.traffic.sent_bytes
        if self._telemetry is not None:
            self._report(self._telemetry, sent - self._reported_bytes)
        self._reported_bytes = sent
        self._note = None
        self._before = None

    def abandon_step(self) -> None:
        """Forget the step under way; its number stays used."""
        self._levels.abandon_step()
        if self._vectors is not None:
            self._vectors.abandon_step()
        if self._feedback is not None:
            self._feedback.abandon_step()
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to give the bits of an uninterrupted one.

        Plain values that JSON can hold, the same on every rank; but with worker_norms=True or error_feedback=True
        "rank_private" holds the last messages or the residuals of this rank (tensors): then every rank saves its own
        state, and loads that.

        Within a step it is the state before that step, as the model's weights are: a resumed run takes the step anew.
        """
        with self.lock:
            mark = self._before or self._mark()
            return {
                "format": STATE_FORMAT,
                "step": mark.step,
                "registry": mark.registry.state_dict(),
                "levels": self._levels.state_dict(mark.levels),
                "choice": mark.choice,
                "gradient_order": None if mark.gradient_order is None else list(mark.gradient_order),
                "rank_private": self._private_state(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. To be called on every rank; whether they agree is checked anew.

        Where "rank_private" is None, the messages before and the residuals are taken for zero vectors. Set it to None
        on every rank to do so on purpose, with another number of ranks for example.

        Raises:
            ConfigError: for something else than such a state.
            RegistryError: for the state of another model, of other codebooks, or with statistics of another sort.
            RankMismatchError: for the private state of another rank.
        """
        with self.lock:
            if state.get("format") != STATE_FORMAT:
                raise ConfigError(
                    f"the compressor's state has format {state.get('format')!r}; this version reads {STATE_FORMAT}"
                )
            registry = self.registry.restored(state["registry"])
            self._levels.load_state_dict(state["levels"])
            self._attached.forget()
            self.abandon_step()
            self._agreed_with = None
            self.registry = registry
            if self.choice is not None:
                self.choice.load_state_dict(state["choice"])
            order = state["gradient_order"]
            self.gradient_order = None if order is None else tuple(order)
            self.step = int(state["step"])
            if self._telemetry is not None:
                self._telemetry.rewind(self.step)
            self._load_private_state(state["rank_private"])

    def _mark(self) -> _Mark:
        choice = None if self.choice is None else self.choice.state_dict()
        return _Mark(self.step, self.registry, self._levels.mark(), choice, self.gradient_order)

    @property
    def _attached(self) -> GradientRoute:
        route = None if self._route is None else self._route()
        if route is None:
            raise QodaError("the optimizer that exchanged these gradients does not exist any more: make another one")
        return route

    @property
    def _measures_error(self) -> bool:
        every = self.config.measure_error_every
        return every > 0 and (self.step - 1) % every == 0

    def _description(self) -> dict[str, Any]:
        described = training_description(self._given_name, self.config, self.registry, self.step, self._levels)
        choice = None if self.choice is None else self.choice.state_dict()
        return {**described, **self._attached.description(), "choice of the exchange": choice}

    def _report(self, telemetry: ExchangeReports, sent_bytes: int) -> None:
        codebooks = self.registry.codebooks
        if not self._reported_codebooks:
            telemetry.start(self.config.to_dict(), {key: book.to_dict() for key, book in codebooks.items()})
        changed = [key for key, book in codebooks.items() if self._reported_codebooks.get(key) != book]
        learnt = {key: learnt_record(read, codebooks[key]) for key, read in self._levels.take_learnt().items()}
        records = self._account.records(codebooks, sent_bytes, changed, learnt)
        telemetry.log_exchange(self.step, records, self.registry.version, self._note)
        self._reported_codebooks = dict(codebooks)

    def _private_state(self) -> dict[str, Any] | None:
        if self._vectors is None and self._feedback is None:
            return None
        transport = self._agreed_with or self._attached.connect()  # the host may have been shut down since
        vectors = {} if self._vectors is None else self._vectors.state_dict()
        residuals = {} if self._feedback is None else self._feedback.state_dict()
        return {"rank": transport.rank, "size": transport.size, **vectors, **residuals}

    def _load_private_state(self, state: Mapping[str, Any] | None) -> None:
        if self._vectors is not None:
            self._vectors.forget()
        if self._feedback is not None:
            self._feedback.forget()
        if state is None or (self._vectors is None and self._feedback is None):
            return
        transport = self._attached.connect()
        ours, theirs = (transport.rank, transport.size), (state["rank"], state["size"])
        if ours != theirs:
            raise RankMismatchError(
                f"the state was saved by position {theirs[0]} of {theirs[1]} ranks and is loaded at position "
                f"{ours[0]} of {ours[1]}. With worker_norms=True or error_feedback=True every rank saves and "
                'loads its own state; to start with zero vectors instead, set state["rank_private"] to None on every '
                "rank."
            )
        if self._vectors is not None and "previous" in state:
            self._vectors.load_state_dict(state, self._attached.exchange_of)
        if self._feedback is not None and "residuals" in state:
            self._feedback.load_state_dict(state)


def sparse_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that get sparse gradients: those of `torch.nn` embeddings made with sparse=True."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    weights = {id(embedding.weight) for embedding in embeddings}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in weights)


def _allowed_schemes(config: QodaConfig) -> tuple[str, ...]:
    """What exchange="auto" may choose from."""
    own_messages = config.worker_norms or config.error_feedback
    exchanges = ("allgather", "reduce_scatter") if own_messages else QUANTIZED_SCHEMES
    return ("off", *exchanges)
