"""The communication hook for `DistributedDataParallel`, and its state.

DDP calls the hook for every reduce bucket, in the same order on every rank, and waits for the returned futures when
backward ends. The hook hands the bucket to a thread of its own, which encodes, exchanges and decodes while backward
goes on; messages are fusion buffers of our own (`fusion.py`).

Steps. A step begins with DDP's first reduce bucket and ends when the last one's future is complete; passes under
`no_sync()` call no hook and are none. Levels change at its beginning; statistics are exchanged before its end, so that
between steps all ranks hold the same state.

What travels as it is. Gradients with exact codebooks (biases, norms, small tensors by default), of 64 bits and complex
ones travel in the same messages, as raw values; their sum is formed in rank order. Of sparse gradients ranks gather the
rows (`sparse.py`).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvd_qoda.config import QodaConfig
from hvd_qoda.ddp.fusion import Filling, fusion_buffers
from hvd_qoda.ddp.ordered import Round
from hvd_qoda.ddp.sparse import SparseGather
from hvd_qoda.ddp.step import Arrived, Step
from hvd_qoda.ddp.world import World
from hvd_qoda.errors import ConfigError, QodaError
from hvd_qoda.exchange import Exchange
from hvd_qoda.fusion import real_numel
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.session import Session
from hvd_qoda.telemetry import Telemetry
from hvd_qoda.traffic import Traffic, all_reduce_bytes
from hvd_qoda.transport import Transport
from qoda_kernels.registry import CodebookRegistry

__all__ = ["QodaState", "comm_hook"]


def comm_hook(
    state: "QodaState",
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch has it, its stubs do not
) -> torch.futures.Future[torch.Tensor]:
    """Average a reduce bucket's gradients over the ranks, quantized; for `ddp.register_comm_hook(state, comm_hook)`.

    Args:
        state: what was registered.
        bucket: from DDP.

    Returns:
        Future of the bucket's buffer, which then holds the mean, the same bits on every rank. It raises WireError for a
        damaged message, RankLostError if a rank has ended and ExchangeTimeoutError if one did not take part in time;
        `backward()` passes them on as RuntimeError, with these names and their messages in its text.

    Raises:
        RankMismatchError: in the first step, on every rank, if ranks do not agree on model, configuration or version.
        ConfigError: for a bucket with parameters of another model.
    """
    return state.reduce(bucket)


class QodaState:
    """State of `comm_hook`: layer types, codebooks, the step number; one per model, made on every rank.

    It can be pickled, as torch's own hook states can; after unpickling call `attach(model)`. For an exact resume save
    `state_dict()`; one rank's is enough, except with worker_norms or error_feedback.

    Args:
        model: the model, wrapped by DDP or not; or its (name, parameter) pairs, from whose names the layer types are
            then guessed.
        process_group: the one given to DDP; None for the default group. The exchange makes groups of its own with the
            same ranks, so that its collectives do not mix with the program's.
        telemetry: receives one record per step.
        name: tells models apart in messages about ranks that disagree.
        config: configuration; or give its keys as keywords, over the environment's and the defaults.
        keywords: keys of `QodaConfig`, such as bits=5. Here exchange="auto" goes by bytes alone, like "by_bytes";
            "hierarchical" takes ranks of one host name for one host; "off" lets the host add gradients as they are.

    Raises:
        ConfigError: for unknown keys or impossible values, where config and keywords are both given, and for
            exchange="off" with worker_norms or error_feedback, which need quantized gradients.
        RegistryError: for layer rules that match nothing, or a parameter name given twice.
    """

    _session: Session | None
    _world: World | None
    _pass: Step | None  # the backward pass under way

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, torch.Tensor]],
        *,
        process_group: dist.ProcessGroup | None = None,
        telemetry: Telemetry | None = None,
        name: str = "",
        config: QodaConfig | None = None,
        **keywords: Any,
    ) -> None:
        if config is not None and keywords:
            raise ConfigError(f"give either config or keywords ({', '.join(keywords)}), not both")
        self._config = QodaConfig.load(**keywords) if config is None else config
        _refuse_without_quantizing(self._config)
        self._name = name
        self._saved: dict[str, Any] | None = None
        self._make_session(model, process_group, telemetry)

    def attach(
        self,
        model: nn.Module | Iterable[tuple[str, torch.Tensor]],
        process_group: dist.ProcessGroup | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Go on with this model, for a state that comes from a pickle.

        Args:
            model: as given to the constructor; its parameters must have the same names, shapes and dtypes.
            process_group: as given to the constructor.
            telemetry: as given to the constructor.

        Raises:
            RegistryError: for another model.
        """
        saved = self.state_dict()
        self._make_session(model, process_group, telemetry)
        self.load_state_dict(saved)
        self._saved = None

    @property
    def config(self) -> QodaConfig:
        """The configuration."""
        return self._config

    @property
    def registry(self) -> CodebookRegistry:
        """Layer types and codebooks, with the levels of the step under way or finished last."""
        return self._attached.registry

    @property
    def step(self) -> int:
        """Number of the step under way, or finished last, over the whole training; the first one is 1."""
        return self._attached.step

    @property
    def traffic(self) -> Traffic:
        """What this rank has handed to collectives since the state was made."""
        return self._attached.traffic

    def worker_norms(self) -> WorkerNorms:
        """See `hvd_qoda.session.Session.worker_norms`."""
        return self._attached.worker_norms()

    def state_dict(self) -> dict[str, Any]:
        """See `hvd_qoda.session.Session.state_dict`: plain values, the same on every rank but for worker norms.

        Raises:
            QodaError: within a backward pass.
        """
        return self._attached.state_dict() if self._saved is None else self._saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `hvd_qoda.session.Session.load_state_dict`."""
        self._attached.load_state_dict(state)

    def reduce(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # as above
    ) -> torch.futures.Future[torch.Tensor]:
        """See `comm_hook`."""
        session = self._attached
        names = [self._name_of(parameter) for parameter in bucket.parameters()]
        world = self._connected(session)
        if bucket.index() == 0:
            self._begin_step(session, world)
        step = self._pass
        if step is None:
            raise QodaError("DDP's reduce buckets do not begin with the first one: a step was broken off")
        lengths = [real_numel(session.registry.parameters[name]) for name in names]
        coding_device = (lambda gradients: gradients[0].device) if world.sends_exactly else session.coding_device
        arrived = Arrived(bucket.buffer(), names, lengths, coding_device)
        if world.transport.size == 1:  # nothing to exchange, nothing to quantize
            self._pass = None if bucket.is_last() else step
            arrived.hand_back()
        else:
            world.outstanding.add(arrived.future)
            world.thread.submit(partial(self._take, session, world, step, arrived, bucket.is_last()))
        # Through a callback: an error set on a Python future reaches DDP only if somebody raises it.
        return arrived.future.then(lambda future: future.value())

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process."""
        kept = ("_config", "_name")
        return {**{name: self.__dict__[name] for name in kept}, "_saved": self.state_dict()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_process()

    # -- GradientRoute -----------------------------------------------------------------------------------------------

    def description(self) -> Mapping[str, Any]:
        """See `hvd_qoda.session.GradientRoute`."""
        buffers = {f"fusion buffer {number}": list(names) for number, names in enumerate(self._buffers())}
        return {"route": "DistributedDataParallel", **buffers}

    def connect(self) -> Transport:
        """See `hvd_qoda.session.GradientRoute`."""
        return self._connected(self._attached).transport

    def exchange_of(self, key: str, dtype: torch.dtype) -> Exchange | None:
        """See `hvd_qoda.session.GradientRoute`."""
        session = self._attached
        for names in self._buffers():
            if _key(names) == key:
                return self._connected(session).exchange(session.registry, names, [dtype] * len(names))
        return None

    def forget(self) -> None:
        """See `hvd_qoda.session.GradientRoute`."""
        if self._pass is not None:
            self._world = None  # the others may have started other collectives in its groups: make new ones
        if self._world is not None:
            self._world.forget_exchanges()
        self._pass = None

    # -- steps -------------------------------------------------------------------------------------------------------

    def _make_session(
        self,
        model: nn.Module | Iterable[tuple[str, torch.Tensor]],
        process_group: dist.ProcessGroup | None,
        telemetry: Telemetry | None,
    ) -> None:
        source = model.module if isinstance(model, DistributedDataParallel) else model
        self._process_group = process_group
        session = Session(source, self._config, telemetry, self._name)
        self._names = {id(parameter): name for name, parameter in session.parameters.items()}
        self._forget_process()
        self._session = session
        session.use_route(self)

    def _forget_process(self) -> None:
        self._session = None
        self._world = None
        self._pass = None

    @property
    def _attached(self) -> Session:
        if self._session is None:
            raise ConfigError("this state comes from a pickle: call attach(model) on every rank before you use it")
        return self._session

    def _name_of(self, parameter: torch.Tensor) -> str:
        name = self._names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"DDP reduces a parameter of shape {tuple(parameter.shape)} that the hook's state does not know: make "
                "the QodaState from the model that DDP wraps"
            )
        return name

    def _connected(self, session: Session) -> World:
        if self._world is None:
            self._world = World(self._process_group, session)
        return self._world

    def _buffers(self) -> list[tuple[str, ...]]:
        session = self._attached
        wanted = [
            (session.registry.parameters[name], parameter.device)
            for name, parameter in session.parameters.items()
            if parameter.requires_grad and name not in session.sparse_parameters
        ]
        return fusion_buffers(wanted, self._config.fusion_buffer_mb * 2**20)

    def _begin_step(self, session: Session, world: World) -> None:
        world.outstanding.check()
        if self._pass is not None:
            world.settle()  # backward was broken off, on every rank
            session.abandon_step()
        if session.begin_step(world.transport):
            world.forget_exchanges()  # code widths may have changed, and with them the layout of messages
        world.know_hosts()
        if world.transport.size > 1:
            world.begin_pass()
        self._pass = Step([Filling(names, {}) for names in self._buffers()])

    def _take(self, session: Session, world: World, step: Step, bucket: Arrived, last: bool) -> None:
        """In the exchange thread: a reduce bucket has come."""
        due = step.take(bucket, last)
        if bucket.is_sparse:
            name, gradient = bucket.sparse_gradient()
            gather = SparseGather(name, gradient, world.transport)
            deliver = partial(self._finish_sparse, session, world, step, name, gather, bucket)
            world.exchanges.submit(Round(gather, gather.start, deliver))
        for filling in due:
            names = filling.present
            values = [filling.gradients[name] for name in names]
            exchange = world.exchange(session.registry, names, [value.dtype for value in values])
            start = partial(_start, session, world, _key(names), exchange, values)
            finish = partial(self._finish, session, world, step, names, exchange, values)
            world.exchanges.submit(Round(exchange, start, finish))

    def _finish(
        self,
        session: Session,
        world: World,
        step: Step,
        names: tuple[str, ...],
        exchange: Exchange,
        out: list[torch.Tensor],
    ) -> None:
        """Decode a fusion buffer, and hand back the reduce buckets that are complete with it."""
        exchange.finish(out)
        for mean in out:
            session.arrived(mean)
        complete = [step.owners[name] for name in names if step.owners[name].written()]
        self._end_one(session, world, step)
        for bucket in complete:
            world.outstanding.remove(bucket.future)
            bucket.hand_back()

    def _finish_sparse(
        self, session: Session, world: World, step: Step, name: str, gather: SparseGather, bucket: Arrived
    ) -> None:
        """Hand back a sparse gradient."""
        mean = gather.finish()
        session.arrived(mean.values())
        session.account(
            session.registry.parameters[name].codebook,
            gather.coordinates,
            gather.sent_bytes,
            gather.sent_bytes,
            exact=True,
        )
        self._end_one(session, world, step)
        world.outstanding.remove(bucket.future)
        bucket.hand_back(mean)

    def _end_one(self, session: Session, world: World, step: Step) -> None:
        """A fusion buffer or a sparse gradient has arrived; the last one ends the step."""
        step.under_way -= 1
        if step.all_arrived and step.under_way == 0:
            session.end_step(world.transport, [_key(filling.present) for filling in step.fillings])
            world.end_step()
            self._pass = None


def _refuse_without_quantizing(config: QodaConfig) -> None:
    needing = [key for key in ("worker_norms", "error_feedback") if getattr(config, key)]
    if config.exchange == "off" and needing:
        raise ConfigError(
            f'exchange="off" quantizes nothing, and {" and ".join(needing)} need quantized gradients: use "by_bytes", '
            f'"allgather" or "reduce_scatter", or leave out {" and ".join(needing)}'
        )


def _start(session: Session, world: World, key: str, exchange: Exchange, values: list[torch.Tensor]) -> None:
    """Encode and send a fusion buffer."""
    corrected = session.corrected(exchange, values)
    exchange.start(corrected, session.stamp)
    segments = exchange.plan.segments
    per_byte = exchange.sent_bytes / max(1, sum(segment.end - segment.begin for segment in segments))
    for segment, value in zip(segments, values, strict=True):
        sent = per_byte * (segment.end - segment.begin)
        raw = all_reduce_bytes(value.nbytes, world.transport.size)
        session.account(segment.slice.codebook, segment.slice.length, raw, sent, world.sends_exactly)
    session.observe(key, exchange, corrected)


def _key(names: tuple[str, ...]) -> str:
    """Tells the exchanges of a model apart."""
    return f"{names[0]} to {names[-1]}, {len(names)}" if names else ""
