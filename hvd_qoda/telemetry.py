"""Telemetry: one record per training step, handed to any number of sinks.

Who calls what. The compressor calls `Telemetry.start` with its configuration and codebooks, and
`Telemetry.log_exchange` when the exchange of a step has been drained, inside the optimizer's step. The training loop
then calls `Telemetry.log` with what only it knows (loss, accuracy, step sizes). Both go into the record of the *open*
step; it is written to the sinks when the next step opens, or at `flush` and `close`:

    with Telemetry([JsonLinesSink("run.jsonl"), ConsoleSink()], rank=hvd.rank(), config=vars(arguments)) as telemetry:
        for batch in batches:
            loss = ...
            optimizer.step()                                               # the compressor calls log_exchange
            telemetry.log(loss=loss, step_sizes=optimizer.step_sizes())    # joins the same step's record

So `log` follows the exchange. Without a compressor the loop numbers the steps itself: `telemetry.log(step=t, loss=l)`.

Nothing here knows a host: byte counts, errors and levels arrive as numbers.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, SupportsFloat, runtime_checkable

import torch

from hvd_qoda.errors import QodaError

__all__ = [
    "MAGNITUDE_EDGES",
    "LayerTypeRecord",
    "LearntRecord",
    "Sink",
    "StartRecord",
    "StatefulSink",
    "StepRecord",
    "Telemetry",
    "TelemetryError",
    "TelemetryWarning",
    "flat_metrics",
]

OnError = Literal["warn", "raise"]

MAGNITUDE_EDGES = (0.0, *(2.0**octave * (1.0 + quarter / 4.0) for octave in range(-8, 0) for quarter in range(4)), 1.0)
"""Edges of the histograms of normalised magnitudes in records: four cells in each octave from 2**-8 to 1."""

_RESERVED_PREFIXES = ("qoda/", "step_size/", "_")


class TelemetryError(QodaError, RuntimeError):
    """Telemetry called in an order, or with values, that have no meaning; or a sink that cannot work."""


class TelemetryWarning(UserWarning):
    """A sink failed while training went on: some records are missing there."""


@dataclass(frozen=True)
class LearntRecord:
    """What new levels were learnt from; of all ranks' gradients since the update before.

    Raises TelemetryError unless there is one share for each cell of MAGNITUDE_EDGES, and one more.
    """

    shares: tuple[float, ...]  # of the magnitudes divided by their norm or clip value, by cell, weighted as the levels'
    # statistics are; the last one is of those at or beyond 1. Zeros are left out.
    tail_index: float | None = None  # exponent gamma of a power law; None: no tail to fit it to
    clip: float = 0.0  # magnitude at which the codebook clips; 0: it does not
    rotation: str = "none"  # of the codebook that was chosen; others than "none": its levels are for rotated buckets,
    # the shares are of the gradients before they are rotated

    def __post_init__(self) -> None:
        if len(self.shares) != len(MAGNITUDE_EDGES):
            raise TelemetryError(f"{len(self.shares)} shares of magnitudes, expected {len(MAGNITUDE_EDGES)}")
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; `LearntRecord(**values)` inverts."""
        return {
            "shares": list(self.shares),
            "tail_index": self.tail_index,
            "clip": self.clip,
            "rotation": self.rotation,
        }


@dataclass(frozen=True)
class LayerTypeRecord:
    """What one layer type (one key of the codebook registry) exchanged in one step.

    Raises TelemetryError for negative counts.
    """

    layer_type: str
    bits: int  # of the codebook; 32: values travelled raw
    coordinates: int  # gradient elements exchanged
    raw_bytes: int  # what the host's own path would have sent from this rank: same collective formula, gradient dtype
    sent_bytes: int  # what this rank sent, headers and padding included
    relative_error: float | None = None  # ||Q(v) - v||^2 / ||v||^2 of this rank's own messages; None: not measured
    levels: tuple[float, ...] | None = None  # given in the first step and whenever they changed
    learnt: LearntRecord | None = None  # given when the levels were learnt anew

    def __post_init__(self) -> None:
        # Tensors' and NumPy's own numbers are as welcome as Python's, but records hold what every sink can write.
        for name in ("bits", "coordinates", "raw_bytes", "sent_bytes"):
            value = operator.index(getattr(self, name))
            if value < 0:
                raise TelemetryError(f"layer type {self.layer_type!r}: {name} is {value}, expected 0 or more")
            object.__setattr__(self, name, value)
        if self.relative_error is not None:
            object.__setattr__(self, "relative_error", float(self.relative_error))
        if self.levels is not None:
            object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; `from_dict` inverts."""
        plain = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        levels = None if self.levels is None else list(self.levels)
        return plain | {"levels": levels, "learnt": None if self.learnt is None else self.learnt.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerTypeRecord:
        """The record that `to_dict` described."""
        learnt = values.get("learnt")  # records written before it was noted have none
        return cls(**{**values, "learnt": None if learnt is None else LearntRecord(**learnt)})


@dataclass(frozen=True)
class StepRecord:
    """Everything known of one step on one rank.

    Raises TelemetryError if a layer type occurs twice.
    """

    step: int
    layer_types: tuple[LayerTypeRecord, ...] = ()  # empty: no exchange was reported in this step
    registry_version: int = 0
    step_sizes: Mapping[str, float] = field(default_factory=dict)  # of the optimizer, by name
    scalars: Mapping[str, float] = field(default_factory=dict)  # what the training loop logged
    note: str | None = None  # what the exchange has changed in this step, and why

    def __post_init__(self) -> None:
        names = [record.layer_type for record in self.layer_types]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise TelemetryError(f"step {self.step}: layer types recorded twice: {', '.join(repeated)}")
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        # Copies, so that nobody's later change reaches the record.
        object.__setattr__(self, "step_sizes", dict(self.step_sizes))
        object.__setattr__(self, "scalars", dict(self.scalars))

    @property
    def coordinates(self) -> int:
        """Gradient elements exchanged, all layer types."""
        return sum(record.coordinates for record in self.layer_types)

    @property
    def raw_bytes(self) -> int:
        """Bytes that the host's own path would have sent, all layer types."""
        return sum(record.raw_bytes for record in self.layer_types)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank sent, all layer types."""
        return sum(record.sent_bytes for record in self.layer_types)

    @property
    def compression_ratio(self) -> float | None:
        """raw_bytes / sent_bytes; None where nothing was sent (one rank, or no exchange)."""
        return self.raw_bytes / self.sent_bytes if self.sent_bytes else None

    @property
    def relative_error(self) -> float | None:
        """Mean of the layer types' relative errors, weighted by coordinates, over those measured; None if none was.

        This is not ||Q(v) - v||^2 / ||v||^2 of the whole gradient: that would need weights ||v||^2, which records do
        not hold.
        """
        return _mean_error(self.layer_types)

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived totals as plain values (floats may be NaN or infinite); `from_dict` inverts."""
        return {
            "step": self.step,
            "registry_version": self.registry_version,
            "raw_bytes": self.raw_bytes,
            "sent_bytes": self.sent_bytes,
            "compression_ratio": self.compression_ratio,
            "relative_error": self.relative_error,
            "layer_types": [record.to_dict() for record in self.layer_types],
            "step_sizes": dict(self.step_sizes),
            "scalars": dict(self.scalars),
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepRecord:
        """The record that `to_dict` described; derived totals are computed anew."""
        return cls(
            step=values["step"],
            layer_types=tuple(LayerTypeRecord.from_dict(entry) for entry in values["layer_types"]),
            registry_version=values["registry_version"],
            step_sizes=values["step_sizes"],
            scalars=values["scalars"],
            note=values.get("note"),  # records written before there were notes have none
        )


@dataclass(frozen=True)
class StartRecord:
    """What a sink is told before the first step, and again if the configuration or the codebooks' formats change."""

    config: Mapping[str, Any]  # plain values: None, bool, int, float, str, lists and string-keyed dictionaries of them
    codebooks: Mapping[str, Mapping[str, Any]]  # layer type -> Codebook.to_dict()
    rank: int = 0
    after_step: int | None = None  # the last step already written; None: a run from its beginning


class Sink(Protocol):
    """Where records go. Errors may be raised freely: `Telemetry` decides what becomes of them."""

    @property
    def every_rank(self) -> bool:
        """Whether all ranks write (each to a place of its own), or rank 0 only."""

    def start(self, start: StartRecord) -> None:
        """Open the place and note configuration and codebooks; called before the first record, and when they change."""

    def write(self, record: StepRecord) -> None:
        """Write one step's record."""

    def close(self, failed: bool = False) -> None:
        """Finish, started or not; `failed` says that training ended with an exception."""


@runtime_checkable
class StatefulSink(Sink, Protocol):
    """A sink with something to carry over into a resumed run."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values; called before `start`."""


class Telemetry:
    """Collects what is said about a step into one `StepRecord` and hands it to the sinks.

    sinks: used on rank 0; on other ranks only those whose `every_rank` is true. Calls are checked alike on every rank.
    rank: this process's rank.
    config: the training program's configuration; `start` adds to it.
    on_error: what becomes of an exception in a sink once it has started. "warn" (default): training is worth more than
        its log, so the first failure of a sink is a `TelemetryWarning` with the whole message, later records are still
        offered to it, and `close` says how many are missing. "raise": TelemetryError. A sink that cannot even start
        always raises: nothing is lost by then.

    Steps increase from record to record. The sinks start at the first `log_exchange` or `log`. Not thread-safe.
    """

    def __init__(
        self,
        sinks: Sequence[Sink] = (),
        rank: int = 0,
        config: Mapping[str, Any] | None = None,
        on_error: OnError = "warn",
    ) -> None:
        if rank < 0:
            raise TelemetryError(f"rank is {rank}, expected 0 or more")
        if on_error not in ("warn", "raise"):
            raise TelemetryError(f"on_error is {on_error!r}, expected 'warn' or 'raise'")
        self.rank = rank
        self.on_error = on_error
        self._sinks = tuple(sinks)
        self._active = tuple(sink for sink in self._sinks if rank == 0 or sink.every_rank)
        self._missing = [0] * len(self._active)  # records that each active sink failed to write
        self._config: dict[str, Any] = _plain_mapping(config or {})
        self._codebooks: dict[str, dict[str, Any]] = {}
        self._announced: tuple[dict[str, Any], dict[str, dict[str, Any]]] | None = None
        self._open: StepRecord | None = None
        self._written_step: int | None = None
        self._written = 0
        self._closed = False

    @property
    def last_step(self) -> int | None:
        """The step of the newest record, open or written; None before the first."""
        return self._written_step if self._open is None else self._open.step

    def start(
        self,
        config: Mapping[str, Any] | None = None,
        codebooks: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Set the configuration and the code tables that sinks log once, before the next record.

        config: added to what is known, a later value of a key winning. Values that are not plain are logged as
            str(value).
        codebooks: layer type -> `Codebook.to_dict()`; replaces what is known; None leaves it.

        Calling again with the same content does nothing. Changed content (compression switched on after a warm-up, say)
        goes to the sinks when the next step opens. Levels that adapt while training travel in the records, not here.
        """
        self._check_not_closed()
        self._config = self._config | _plain_mapping(config or {})
        if codebooks is not None:
            self._codebooks = {str(name): _plain_mapping(table) for name, table in codebooks.items()}

    def log_exchange(
        self,
        step: int | None,
        layer_types: Iterable[LayerTypeRecord],
        registry_version: int,
        note: str | None = None,
    ) -> None:
        """Record a drained exchange; called by the compressor.

        step: the caller's step number; None: the one after the newest, or 0.
        layer_types: one record each. A type met again in the same step is added up: coordinates and bytes are summed,
            errors averaged by coordinates.
        registry_version: of the codebooks used; one per step.
        note: what has changed in this step, and why.

        Raises TelemetryError if the step is older than the open one or already written, or if bits or registry version
        changed within a step.
        """
        self._check_not_closed()
        if step is None:
            step = 0 if self.last_step is None else self.last_step + 1
        opened = self._record_of(operator.index(step))
        if opened.layer_types and opened.registry_version != registry_version:
            raise TelemetryError(
                f"step {opened.step}: exchanged with registry versions {opened.registry_version} and "
                f"{registry_version}; versions change only between steps"
            )
        merged = _merge(opened.step, (*opened.layer_types, *layer_types))
        self._open = dataclasses.replace(
            opened, layer_types=merged, registry_version=registry_version, note=note or opened.note
        )

    def log(
        self,
        step: int | None = None,
        *,
        step_sizes: Mapping[str, SupportsFloat] | None = None,
        **scalars: SupportsFloat,
    ) -> None:
        """Add the training loop's own numbers to a step's record.

        step: leave out after an optimizer step with a compressor: the numbers join the exchange just made. Give it
            where no compressor counts steps. Several calls for one step are merged, a later value winning.
        step_sizes: the optimizer's, by name.
        scalars: anything that `float` takes (numbers, tensors of one element: reading one from a GPU waits for it).

        Raises TelemetryError if no step is open and none is given, if the step is written already, or if it is not the
        one of the exchange just made (`flush` first to go on without exchanges); also for values that are not numbers,
        and for names that begin with "qoda/", "step_size/" or "_".
        """
        self._check_not_closed()
        sizes = {name: _number(f"step size {name!r}", value) for name, value in (step_sizes or {}).items()}
        numbers = {name: _number(f"scalar {name!r}", value) for name, value in scalars.items()}
        for name in numbers:
            if name.startswith(_RESERVED_PREFIXES):
                raise TelemetryError(f"scalar {name!r}: names beginning with {', '.join(_RESERVED_PREFIXES)} are taken")
        opened = self._record_of(self._loop_step(step))
        self._open = dataclasses.replace(
            opened, step_sizes={**opened.step_sizes, **sizes}, scalars={**opened.scalars, **numbers}
        )

    def flush(self) -> None:
        """Write the open step's record, if there is one; after that nothing can be added to it."""
        self._check_not_closed()
        self._flush(self.on_error)

    def close(self, failed: bool = False) -> None:
        """Write the open record and close the sinks; a second call does nothing.

        failed: training ended with an exception. Sinks learn it, and their own errors then become warnings, so that
            they do not hide that exception.
        """
        if self._closed:
            return
        on_error: OnError = "warn" if failed else self.on_error
        self._closed = True
        try:
            # A failed run that never logged leaves a record restored from its checkpoint there.
            if self._announced is not None or not failed:
                self._flush(on_error)
        finally:
            self._close_sinks(failed, on_error)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: the last step written, the open record, the sinks' state (W&B's run id)."""
        return {
            "written_step": self._written_step,
            "open": None if self._open is None else self._open.to_dict(),
            "sinks": [[type(s).__name__, s.state_dict()] for s in self._sinks if isinstance(s, StatefulSink)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; before the first `log_exchange` or `log`, else TelemetryError.

        Sinks get their state by class, in order; state of a sink that is no longer used is left alone.
        """
        self._check_not_closed()
        if self._announced is not None or self._open is not None:
            raise TelemetryError("load_state_dict must come before the first log_exchange or log: sinks have started")
        self._written_step = state["written_step"]
        self._open = None if state["open"] is None else StepRecord.from_dict(state["open"])
        states = list(state["sinks"])
        for sink in self._sinks:
            found = next((entry for entry in states if entry[0] == type(sink).__name__), None)
            if found is not None and isinstance(sink, StatefulSink):
                states.remove(found)
                sink.load_state_dict(found[1])

    def rewind(self, step: int) -> None:
        """Expect the steps after `step` once more, as elastic training does that goes back to an earlier state.

        The open record is written first. Sinks are told by another start record; readers keep the steps done last.
        """
        self._check_not_closed()
        if self.last_step is None or self.last_step <= step:
            return
        self._flush(self.on_error)
        self._written_step = step
        if self._announced is not None:
            self._announce()

    def _loop_step(self, step: int | None) -> int:
        if step is None:
            if self._open is None:
                raise TelemetryError(
                    "log() without step=, and no step is open: call it after the optimizer step whose gradients were "
                    "exchanged with this telemetry, and before flush(). Without a compressor, and with one process, "
                    "where the host exchanges nothing, pass step="
                )
            return self._open.step
        step = operator.index(step)
        if self._open is not None and self._open.layer_types and step > self._open.step:
            raise TelemetryError(
                f"log(step={step}) while step {self._open.step} is open, as its exchange was numbered: leave step= "
                "out, or count alike; where exchanges have ended, call flush() first"
            )
        return step

    def _record_of(self, step: int) -> StepRecord:
        """The open record of `step`, opened now if it is a new step."""
        if self._announced is None:
            self._announce()
        if self._open is not None and step == self._open.step:
            return self._open
        if self.last_step is not None and step <= self.last_step:
            state = "written" if self._open is None else "open"
            raise TelemetryError(
                f"step {step} after step {self.last_step}, which is {state} already: steps must increase; a resumed "
                "run calls load_state_dict, another run needs a Telemetry of its own"
            )
        self.flush()
        if self._announced != (self._config, self._codebooks):
            self._announce()
        self._open = StepRecord(step)
        return self._open

    def _announce(self) -> None:
        first = self._announced is None
        record = StartRecord(self._config, self._codebooks, rank=self.rank, after_step=self._written_step)
        failures = self._offer(lambda sink: sink.start(record))
        if first:
            self._report("could not start", failures, "raise")
        self._announced = (self._config, self._codebooks)
        self._report("could not note what changed", failures, self.on_error)

    def _flush(self, on_error: OnError) -> None:
        if self._open is None:
            return
        if self._announced is None:  # a record restored from a checkpoint, and nothing logged since
            self._announce()
        record, self._open = self._open, None
        self._written_step = record.step
        self._written += 1
        failures = self._offer(lambda sink: sink.write(record))
        for index in failures:
            self._missing[index] += 1
        told = {index: error for index, error in failures.items() if on_error == "raise" or self._missing[index] == 1}
        self._report(f"could not write step {record.step}", told, on_error)

    def _close_sinks(self, failed: bool, on_error: OnError) -> None:
        failures = self._offer(lambda sink: sink.close(failed))
        for sink, missing in zip(self._active, self._missing, strict=True):
            if missing:
                _warn(f"telemetry: {missing} of {self._written} records are missing from {type(sink).__name__}")
        self._report("could not close", failures, on_error)

    def _offer(self, action: Callable[[Sink], None]) -> dict[int, Exception]:
        """Do `action` for every active sink, whether or not others fail; errors by the sinks' position."""
        failures: dict[int, Exception] = {}
        for index, sink in enumerate(self._active):
            try:
                action(sink)
            except Exception as error:  # a sink may raise anything; all of it is told to the user
                failures[index] = error
        return failures

    def _report(self, failure: str, errors: Mapping[int, Exception], on_error: OnError) -> None:
        messages = [
            f"telemetry: {type(self._active[index]).__name__} {failure}: {type(error).__name__}: {error}"
            for index, error in errors.items()
        ]
        if messages and on_error == "raise":
            raise TelemetryError("; ".join(messages)) from next(iter(errors.values()))
        for message in messages:
            _warn(f"{message} (training goes on; further failures to write are counted, and told at close)")

    def _check_not_closed(self) -> None:
        if self._closed:
            raise TelemetryError("this Telemetry is closed: make a new one")


def flat_metrics(record: StepRecord) -> dict[str, float]:
    """The record as metric names and numbers, for trackers of scalars.

    Names: qoda/bytes_raw, qoda/bytes_sent, qoda/compression_ratio, qoda/relative_error, qoda/registry_version;
    qoda/<layer type>/bits, .../bytes_raw, .../bytes_sent, .../relative_error, .../tail_index;
    step_size/<name>; the training loop's scalars under their own names. What was not measured, or not exchanged, is
    absent.
    """
    metrics: dict[str, float | None] = {}
    if record.layer_types:
        metrics["qoda/bytes_raw"] = record.raw_bytes
        metrics["qoda/bytes_sent"] = record.sent_bytes
        metrics["qoda/compression_ratio"] = record.compression_ratio
        metrics["qoda/relative_error"] = record.relative_error
        metrics["qoda/registry_version"] = record.registry_version
    for entry in record.layer_types:
        prefix = f"qoda/{entry.layer_type}"
        metrics[f"{prefix}/bits"] = entry.bits
        metrics[f"{prefix}/bytes_raw"] = entry.raw_bytes
        metrics[f"{prefix}/bytes_sent"] = entry.sent_bytes
        metrics[f"{prefix}/relative_error"] = entry.relative_error
        metrics[f"{prefix}/tail_index"] = None if entry.learnt is None else entry.learnt.tail_index
    metrics.update({f"step_size/{name}": value for name, value in record.step_sizes.items()})
    metrics.update(record.scalars)
    return {name: value for name, value in metrics.items() if value is not None}


def _mean_error(records: Iterable[LayerTypeRecord]) -> float | None:
    measured = [(entry.relative_error, entry.coordinates) for entry in records if entry.relative_error is not None]
    weight = sum(coordinates for _, coordinates in measured)
    if not weight:
        return None
    return sum(error * coordinates for error, coordinates in measured) / weight


def _merge(step: int, records: Iterable[LayerTypeRecord]) -> tuple[LayerTypeRecord, ...]:
    """One record per layer type, in the order first met."""
    groups: dict[str, list[LayerTypeRecord]] = {}
    for record in records:
        groups.setdefault(record.layer_type, []).append(record)
    return tuple(group[0] if len(group) == 1 else _sum(step, group) for group in groups.values())


def _sum(step: int, group: Sequence[LayerTypeRecord]) -> LayerTypeRecord:
    bits = sorted({record.bits for record in group})
    if len(bits) > 1:
        raise TelemetryError(f"step {step}: layer type {group[0].layer_type!r} exchanged with {bits} bits in one step")
    return LayerTypeRecord(
        layer_type=group[0].layer_type,
        bits=bits[0],
        coordinates=sum(record.coordinates for record in group),
        raw_bytes=sum(record.raw_bytes for record in group),
        sent_bytes=sum(record.sent_bytes for record in group),
        relative_error=_mean_error(group),
        levels=next((record.levels for record in reversed(group) if record.levels is not None), None),
        learnt=next((record.learnt for record in reversed(group) if record.learnt is not None), None),
    )


def _number(what: str, value: SupportsFloat) -> float:
    # float() would accept the text "1.5": text in a numeric log is a mistake of the caller.
    if isinstance(value, str | bytes):
        raise TelemetryError(f"{what} is the text {value!r}, expected a number")
    try:
        # float() of a tensor that requires a gradient warns; here the number alone is wanted.
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TelemetryError(
            f"{what} is a {type(value).__name__} that is not one number ({error}); leave out what is not known"
        ) from error


def _plain_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """JSON's own types; anything else becomes text, as a configuration is for reading."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value)


def _warn(message: str) -> None:
    warnings.warn(message, TelemetryWarning, stacklevel=3)
