"""Exchanges under way on a host that matches collectives by their order.

Ranks start exchanges in the same order, but the second phases become possible at times that differ from rank to rank.
`OrderedExchanges` keeps the order of each kind of collective the same on every rank: exchanges leave their first phase
in the order in which they were submitted, and one that has no further phase begins only after all before it have left
theirs. First phases of reduce-scatters (all-to-alls) overtake second phases (all-gathers) only where the transport has
a group for each.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from hvd_qoda.exchange import ReduceScatterExchange

__all__ = ["OrderedExchanges", "Round"]


class Phases(Protocol):
    """What `OrderedExchanges` needs to know of an exchange; see `hvd_qoda.exchange.Exchange`."""

    @property
    def waiting_for(self) -> str:
        """Name of the collective under way."""

    def advance(self) -> bool:
        """Do what can be done without waiting; returns whether only `finish` is left."""

    def ready(self) -> bool:
        """Whether `finish` would return at once."""

    def drop(self) -> None:
        """Wait for the round under way, and forget it."""


@dataclass(frozen=True)
class Round:
    """One round of an exchange.

    Attributes:
        exchange: the exchange.
        start: encodes and sends.
        finish: decodes; called when the exchange is ready.
    """

    exchange: Phases
    start: Callable[[], None]
    finish: Callable[[], None]


class OrderedExchanges:
    """Rounds of exchanges, in the order of their submission.

    Args:
        two_groups: whether the transport has a group of its own for all-to-alls.
    """

    def __init__(self, two_groups: bool) -> None:
        self._two_groups = two_groups
        self._waiting: deque[Round] = deque()
        self._first_phase: deque[Round] = deque()
        self._last_phase: deque[Round] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._first_phase) + len(self._last_phase)

    @property
    def waiting_for(self) -> str:
        """Names of the collectives under way, for messages."""
        return ", ".join(repr(r.exchange.waiting_for) for r in [*self._first_phase, *self._last_phase])

    def submit(self, item: Round) -> None:
        """Take a round; it starts in `advance`."""
        self._waiting.append(item)

    def advance(self) -> bool:
        """Do what can be done without waiting; returns whether anything was done."""
        done = self._leave_first_phase()
        # One start at a time, so that a second phase is not kept waiting by the encoding of many fusion buffers.
        if self._waiting and self._may_start(self._waiting[0]):
            item = self._waiting.popleft()
            item.start()
            self._first_phase.append(item)
            done = True
            self._leave_first_phase()
        if self._last_phase and self._last_phase[0].exchange.ready():
            self._last_phase.popleft().finish()
            done = True
        return done

    def drop(self) -> None:
        """Wait for the rounds that have started, and forget all."""
        self._waiting.clear()
        for item in [*self._last_phase, *self._first_phase]:
            item.exchange.drop()
        self._first_phase.clear()
        self._last_phase.clear()

    def forget(self) -> None:
        """Forget all rounds, those that have started too, without waiting: after a failure nobody answers."""
        for rounds in (self._waiting, self._first_phase, self._last_phase):
            rounds.clear()

    def _leave_first_phase(self) -> bool:
        left = False
        while self._first_phase and self._first_phase[0].exchange.advance():
            self._last_phase.append(self._first_phase.popleft())
            left = True
        return left

    def _may_start(self, item: Round) -> bool:
        if not self._first_phase:
            return True
        together = [item, *self._first_phase]
        return self._two_groups and all(isinstance(r.exchange, ReduceScatterExchange) for r in together)
