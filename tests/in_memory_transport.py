"""Ranks without a host: several transports in one process, whose collectives finish when all of them have started."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from hvd_qoda.traffic import TrafficMeter
from hvd_qoda.transport import Handle, wait_until

Result = TypeVar("Result")


class InMemoryGroup:
    """`size` transports that reach each other; collectives are matched by name.

    Args:
        size: number of ranks.
        change: called with (collective, source, destination, bytes) for everything delivered; what it returns arrives.
        local_size: ranks on each host.
    """

    def __init__(
        self,
        size: int,
        change: Callable[[str, int, int, torch.Tensor], torch.Tensor] | None = None,
        local_size: int = 1,
    ) -> None:
        self.size = size
        self.local_size = local_size
        self.change = change or (lambda name, source, destination, received: received)
        self.started: dict[str, dict[int, list[torch.Tensor]]] = {}
        self.lock = threading.Lock()
        self.transports = [InMemoryTransport(self, rank) for rank in range(size)]

    def run(self, function: Callable[["InMemoryTransport"], Result]) -> list[Result]:
        """Call a function that waits, in a thread for each rank; returns the results in rank order."""
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(function, self.transports))


class InMemoryTransport:
    def __init__(self, group: InMemoryGroup, rank: int) -> None:
        self.host_name = f"host{rank // group.local_size}"
        self.rank = rank
        self.size = group.size
        self.ranks = tuple(range(group.size))
        self.timeout_s = 2.0
        self.meter = TrafficMeter()
        self._group = group

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        self.meter.all_gather(message.numel(), self.size)
        return self._start([message] * self.size, name)

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        self.meter.all_to_all(send_bytes, self.rank)
        return self._start(list(message.split(list(send_bytes))), name)

    def start_all_reduce(self, values: torch.Tensor, name: str) -> Handle:
        self.meter.all_reduce(values.nbytes, self.size)
        return InMemorySum(self._start([values] * self.size, name))

    def _start(self, shares: list[torch.Tensor], name: str) -> "InMemoryHandle":
        with self._group.lock:
            contributions = self._group.started.setdefault(name, {})
            assert self.rank not in contributions, f"{name} is under way a second time"
            contributions[self.rank] = shares
            return InMemoryHandle(self._group, self.rank, name, contributions)


class InMemorySum:
    def __init__(self, gathered: "InMemoryHandle") -> None:
        self.name = gathered.name
        self._gathered = gathered

    def ready(self) -> bool:
        return self._gathered.ready()

    def wait(self) -> list[torch.Tensor]:
        return [torch.stack(self._gathered.wait()).sum(dim=0)]


class InMemoryHandle:
    def __init__(
        self, group: InMemoryGroup, rank: int, name: str, contributions: dict[int, list[torch.Tensor]]
    ) -> None:
        self.name = name
        self._group = group
        self._rank = rank
        self._contributions = contributions

    def ready(self) -> bool:
        with self._group.lock:
            finished = len(self._contributions) == self._group.size
            if finished and self._group.started.get(self.name) is self._contributions:
                del self._group.started[self.name]
            return finished

    def wait(self) -> list[torch.Tensor]:
        wait_until(self.ready, self._group.transports[self._rank].timeout_s, lambda: self.name)
        sources = sorted(self._contributions)
        parts = [self._contributions[source][self._rank].clone() for source in sources]
        return [
            self._group.change(self.name, source, self._rank, part) for source, part in zip(sources, parts, strict=True)
        ]
