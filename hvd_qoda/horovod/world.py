"""What a compressor holds for the ranks that it runs among now; made anew when they change (elastic training)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import RankMismatchError
from hvd_qoda.exchange import Exchange, PendingExchanges
from hvd_qoda.horovod.token import TokenScale
from hvd_qoda.horovod.transport import HorovodTransport
from hvd_qoda.schemes import make_exchange
from hvd_qoda.traffic import TrafficMeter
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.registry import COMPRESSIBLE_DTYPES, CodebookRegistry, ParameterEntry
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads

__all__ = ["Route", "World"]


@dataclass(frozen=True)
class Route:
    """How one parameter's gradients travel.

    Attributes:
        entry: the parameter.
        exchange: their exchange; None if Horovod reduces them itself, or if they are empty and do not travel.
        by_host: whether Horovod reduces them itself.
    """

    entry: ParameterEntry
    exchange: Exchange | None
    by_host: bool


class World:
    """The transport among the ranks, and everything whose shape depends on their number.

    Args:
        name: of the compressor: what its collectives' names begin with.
        config: the configuration.
        process_set: the Horovod process set; None for all ranks.
        meter: counts what is handed to the collectives.
    """

    def __init__(self, name: str, config: QodaConfig, process_set: Any, meter: TrafficMeter) -> None:
        self._name = name
        self._config = config
        self._process_set = process_set
        self.transport = HorovodTransport(process_set, meter, config.timeout_s)
        self.tokens = TokenScale(self.transport.ranks, self.transport.rank)
        self.pending = PendingExchanges(config.timeout_s, f"rank {self.transport.ranks[self.transport.rank]}")
        self._threads = WorkerThreads(allotted_threads(os.environ))
        self._routes: dict[tuple[str, torch.dtype], Route] = {}

    def is_current(self) -> bool:
        """Whether the process set has not changed since."""
        return self.transport.identity == HorovodTransport(self._process_set).identity

    def check_private_state(self, state: Mapping[str, Any]) -> None:
        """Raise RankMismatchError unless this state was saved by this rank."""
        ours = (self.transport.rank, self.transport.size)
        theirs = (state["rank"], state["size"])
        if ours != theirs:
            raise RankMismatchError(
                f"the state was saved by position {theirs[0]} of {theirs[1]} ranks and is loaded at position "
                f"{ours[0]} of {ours[1]}. With worker_norms=True every rank saves and loads its own state; to start "
                'with zero vectors instead, set state["rank_private"] to None on every rank.'
            )

    def route(self, registry: CodebookRegistry, name: str, dtype: torch.dtype) -> Route:
        """How a parameter's gradients of this dtype travel.

        Args:
            registry: the codebooks.
            name: of the parameter.
            dtype: of the gradient.
        """
        found = self._routes.get((name, dtype))
        if found is None:
            found = self._routes[name, dtype] = self._new_route(registry, name, dtype)
        return found

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """Go on with other levels."""
        for route in self._routes.values():
            if route.exchange is not None:
                route.exchange.use_codebooks(codebooks)

    def _new_route(self, registry: CodebookRegistry, name: str, dtype: torch.dtype) -> Route:
        entry = registry.parameters[name]
        if entry.numel == 0:
            return Route(entry, None, by_host=False)
        quantized = dtype in COMPRESSIBLE_DTYPES and not registry.codebooks[entry.codebook].is_exact
        # Horovod reduces every dtype that gradients have, except this one.
        if not quantized and dtype != torch.bfloat16:
            return Route(entry, None, by_host=True)
        slices = [Slice(name, 0, entry.numel, dtype, entry.codebook, entry.offset)]
        plan = MessagePlan.build(slices, registry.codebooks)
        exchange = make_exchange(
            "by_bytes" if self._config.exchange == "auto" else self._config.exchange,
            plan,
            registry.codebooks,
            self.transport,
            f"{self._name}.{name}",
            self._threads,
        )
        return Route(entry, exchange, by_host=False)
