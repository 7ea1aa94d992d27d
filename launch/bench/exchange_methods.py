"""The ways of averaging a gradient that `exchange.py` times, each in every rank.

A method is made once and run several times: `prepare()` writes this rank's gradient, which is not timed; `run()`
averages it and returns when the mean is there.
Gradients are Gaussian, of `elements` float32 values; for PowerSGD they are square matrices of at most 1000 x 1000,
because its message follows the shapes.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from hvd_qoda.cost_model import CodecSpeed, Layout, Link, Ranks, host_bytes, predict
from hvd_qoda.exchange import Exchange, PendingExchanges, Stamp
from hvd_qoda.hosts import gather_hosts
from hvd_qoda.measurement import measure_codec, measure_link
from hvd_qoda.scheme_choice import Costs, SchemeChoice
from hvd_qoda.schemes import make_exchange
from hvd_qoda.traffic import TrafficMeter
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.levels import minimum_variance_levels
from qoda_kernels.statistics import statistics_class
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads

FP32, FP16, POWERSGD, AUTO = "fp32", "fp16", "powersgd4", "auto"
OURS = {"qoda-allgather": "allgather", "qoda-reduce-scatter": "reduce_scatter", "qoda-hierarchical": "hierarchical"}
HOST_METHODS = (FP32, FP16, *OURS, AUTO)
METHODS = (FP32, FP16, POWERSGD, *OURS, AUTO)
SCHEME_OF = {FP32: "off", FP16: "fp16", **OURS}
_POWERSGD_RANK = 4
_SAMPLE = 2**20


@dataclass(frozen=True)
class Setting:
    """What all methods of a run have in common.

    Attributes:
        elements: of the gradient.
        bits: of our codes.
        bucket_size: coordinates that share one norm.
        buffer_mb: 10^6 bytes of gradients in one of our messages.
        seed: of gradients and rounding.
        local_size: ranks on each host.
    """

    elements: int
    bits: int
    bucket_size: int
    buffer_mb: float
    seed: int
    local_size: int


@dataclass
class Method:
    """A method in one rank.

    Attributes:
        prepare: writes the gradient.
        run: averages it.
        result: the mean of the last run, flat.
        formula_bytes: payload that this rank's host sends in one run.
        predicted_s: seconds that the cost model predicts, if it does.
        note: what the table should say of it.
    """

    prepare: Callable[[], object]
    run: Callable[[], None]
    result: Callable[[], torch.Tensor]
    formula_bytes: float
    predicted_s: float | None = None
    note: str = ""


def gradient_of(setting: Setting, rank: int) -> torch.Tensor:
    """A rank's gradient."""
    generator = torch.Generator().manual_seed(setting.seed * 1000 + rank)
    return torch.randn(setting.elements, generator=generator)


def fitted_codebook(setting: Setting) -> Codebook:
    """Levels of minimum variance for rank 0's gradient, as after the first update in a training run."""
    book = Codebook.uniform(setting.bits, bucket_size=setting.bucket_size)
    generator = torch.Generator().manual_seed(setting.seed * 1000)
    sample = torch.randn(min(setting.elements, _SAMPLE), generator=generator).numpy()
    statistics = statistics_class("histogram").gather(sample, setting.bucket_size, book.norm)
    levels = minimum_variance_levels(statistics, setting.bits, previous=book.levels)
    return book.with_levels([float(level) for level in levels], 1)


class HorovodMethods:
    """Makes methods that run over Horovod; call `hvd.init()` before."""

    def __init__(self, setting: Setting) -> None:
        import horovod.torch as hvd

        from hvd_qoda.horovod import HorovodTransport

        self._hvd = hvd
        self._setting = setting
        self._gradient = gradient_of(setting, hvd.rank())
        self._meter = TrafficMeter()
        self.transport = HorovodTransport(meter=self._meter)
        self._threads = WorkerThreads(allotted_threads(os.environ))
        self._books = {"gradient": fitted_codebook(setting)}
        self._counter = 0
        self._hosts = gather_hosts(self.transport)
        self._link, self._codec = self._measured()

    def make(self, name: str) -> Method:
        """One of `HOST_METHODS`."""
        if name in (FP32, FP16):
            return self._host(name)
        if name in OURS:
            return self._ours(OURS[name], self._prediction(OURS[name]).seconds)
        return self._auto()

    def _measured(self) -> tuple[Link, CodecSpeed]:
        elements = self._setting.elements
        link = measure_link(self.transport, self._hosts, largest_bytes=4 * elements)
        return link, measure_codec(self._books["gradient"], self.transport, self._threads, elements=elements)

    def _plans(self) -> list[MessagePlan]:
        size = max(1, round(self._setting.buffer_mb * 1e6 / 4))
        starts = range(0, self._setting.elements, size)
        return [
            MessagePlan.build(
                [Slice("p", s, min(size, self._setting.elements - s), torch.float32, "gradient", 0)], self._books
            )
            for s in starts
        ]

    def _prediction(self, scheme: str) -> Any:
        return predict(scheme, self._layout(scheme), self._ranks, self._link, self._codec)

    def _layout(self, scheme: str) -> Layout:
        layout = Layout.of(self._plans())
        if scheme in ("off", "fp16"):
            layout = Layout(layout.elements, layout.raw_bytes, layout.message_bytes, 1)
        return layout

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.transport.size, self._setting.local_size)

    def _formula_bytes(self, scheme: str, exchanges: Sequence[Exchange]) -> float:
        """Of a host with one rank to the byte; of one with several by the cost model's formula."""
        if exchanges and self._setting.local_size == 1:
            return float(sum(exchange.sent_bytes for exchange in exchanges))
        return host_bytes(scheme, self._layout(scheme), self._ranks)

    def _host(self, name: str) -> Method:
        hvd = self._hvd
        compression = hvd.Compression.none if name == FP32 else hvd.Compression.fp16
        kept: list[torch.Tensor] = []
        values = self._gradient.clone()

        def run() -> None:
            compressed, context = compression.compress(values)
            reduced = hvd.synchronize(hvd.allreduce_async_(compressed, name=f"bench.{name}", op=hvd.Average))
            kept[:] = [compression.decompress(reduced, context)]

        scheme = SCHEME_OF[name]
        sent = self._formula_bytes(scheme, ())
        return Method(
            lambda: values.copy_(self._gradient), run, lambda: kept[0], sent, self._prediction(scheme).seconds
        )

    def _ours(self, scheme: str, predicted_s: float) -> Method:
        exchanges = self._exchanges(scheme)
        values = self._gradient.clone()
        return Method(
            lambda: values.copy_(self._gradient),
            lambda: self._exchange(exchanges, values),
            lambda: values,
            self._formula_bytes(scheme, exchanges),
            predicted_s,
        )

    def _auto(self) -> Method:
        """What `exchange="auto"` does: predicts, tries the best predictions in the first steps, keeps the fastest."""
        plans = {f"buffer{number}": plan for number, plan in enumerate(self._plans())}
        ranks = self._ranks
        costs = Costs(ranks, self._link, self._codec)
        choice = SchemeChoice([scheme for scheme in ranks.schemes if scheme != "fp16"], "bench.choice")
        made: dict[str, list[Exchange]] = {}
        values = self._gradient.clone()

        def run() -> None:
            choice.begin_step(self.transport, lambda: plans, lambda: costs, mixed=False)
            scheme = choice.scheme_for("buffer0")
            if scheme == "off":
                values.copy_(self._hvd.allreduce_(values, name="bench.off", op=self._hvd.Average))
                return
            if scheme not in made:
                made[scheme] = self._exchanges(scheme)
            self._exchange(made[scheme], values)

        while not choice.settled:
            run()
        assert choice.chosen is not None  # after the first step
        scheme, predicted_s = choice.chosen.name, choice.chosen.predicted_s
        sent = self._formula_bytes(scheme, made.get(scheme, ()))
        note = f"chose {scheme}"
        return Method(lambda: values.copy_(self._gradient), run, lambda: values, sent, predicted_s, note)

    def _exchanges(self, scheme: str) -> list[Exchange]:
        return [
            make_exchange(
                scheme, plan, self._books, self.transport, f"bench.{scheme}.{number}", self._threads, self._hosts
            )
            for number, plan in enumerate(self._plans())
        ]

    def _exchange(self, exchanges: Sequence[Exchange], values: torch.Tensor) -> None:
        """Average values in place."""
        pending = PendingExchanges(self.transport.timeout_s, f"rank {self.transport.rank}")
        parts = values.split([exchange.plan.coordinates for exchange in exchanges])
        self._counter += 1
        stamp = Stamp(self._setting.seed, self._counter, 1)
        for exchange, part in zip(exchanges, parts, strict=True):
            exchange.start([part], stamp)
            pending.add(exchange)
        for exchange, part in zip(exchanges, parts, strict=True):
            pending.finish(exchange, [part])


class TorchMethods:
    """Makes methods that run over torch.distributed; call `init_process_group` before."""

    def __init__(self, setting: Setting) -> None:
        import torch.distributed as dist

        self._setting = setting
        self._gradient = gradient_of(setting, dist.get_rank())
        self._size = dist.get_world_size()

    def make(self, name: str) -> Method:
        """PowerSGD through torch's own communication hook."""
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        if name != POWERSGD:
            raise ValueError(f"no method {name!r} over torch.distributed")
        shapes = matrices(self._setting.elements)
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=_POWERSGD_RANK, start_powerSGD_iter=2
        )
        values = self._gradient.clone()
        bucket = _bucket(values, shapes)
        kept = [values]

        def run() -> None:
            kept[:] = [powerSGD_hook.powerSGD_hook(state, bucket).wait()]

        state.iter = state.start_powerSGD_iter  # the first ones would be plain all-reduces
        low_rank = sum(_POWERSGD_RANK * (rows + columns) for rows, columns in shapes)
        rest = self._setting.elements - sum(rows * columns for rows, columns in shapes)
        sent = 2 * (self._size - 1) / self._size * 4 * (low_rank + rest)
        note = f"{len(shapes)} matrices {shapes[0][0]} x {shapes[0][1]}"
        return Method(lambda: values.copy_(self._gradient), run, lambda: kept[0], sent, None, note)


def matrices(elements: int) -> list[tuple[int, int]]:
    """Shapes of equal square matrices, at most 1000 x 1000, that hold nearly so many elements."""
    count = max(1, math.ceil(elements / 1e6))
    side = math.isqrt(elements // count)
    return [(side, side)] * count


def _bucket(values: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> Any:
    """What DDP would hand to the hook: it has no constructor in Python."""
    used = sum(rows * columns for rows, columns in shapes)
    parts = list(values[:used].split([rows * columns for rows, columns in shapes]))
    gradients = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    if used < values.numel():
        gradients.append(values[used:])
    return SimpleNamespace(
        index=lambda: 0, is_last=lambda: True, buffer=lambda: values, gradients=lambda: gradients, parameters=lambda: []
    )
