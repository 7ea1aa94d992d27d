"""What a route holds for the ranks that it runs among now; made anew when they change (elastic training)."""

import os
from collections.abc import Mapping
from typing import Any

from hvd_qoda.config import QodaConfig
from hvd_qoda.exchange import Exchange, PendingExchanges
from hvd_qoda.horovod.transport import HorovodTransport
from hvd_qoda.schemes import make_exchange
from hvd_qoda.session import Session
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads

__all__ = ["World"]


class World:
    """The transport among the ranks, and what does not outlive a change of their number.

    Args:
        session: whose gradients are exchanged.
        process_set: the Horovod process set; None for all ranks.
        early_roll_call: whether a step's roll call starts with the step, and its first exchange waits for the answer;
            else the first exchanges are held back meanwhile.
    """

    def __init__(self, session: Session, process_set: Any, early_roll_call: bool = False) -> None:
        self._session = session
        self._process_set = process_set
        config: QodaConfig = session.config
        self._early_roll_call = early_roll_call
        self.transport = HorovodTransport(process_set, session.meter, config.timeout_s)
        if early_roll_call:
            self.transport.hold_back_nothing()
        self.pending = PendingExchanges(config.timeout_s, f"rank {self.transport.ranks[self.transport.rank]}")
        self._threads = WorkerThreads(allotted_threads(os.environ))
        self._exchanges: list[Exchange] = []

    def is_current(self) -> bool:
        """Whether the process set has not changed since."""
        return self.transport.identity == HorovodTransport(self._process_set).identity

    def begin_step(self) -> None:
        """Begin a step of the session, with a roll call; see `Session.begin_step`."""
        if self._session.begin_step(self.transport, self.transport.require_roll_call):
            self._use_codebooks(self._session.registry.codebooks)
        if self._early_roll_call:
            self.transport.begin_roll_call()

    def new_exchange(self, plan: MessagePlan, name: str) -> Exchange:
        """An exchange of this plan, by the configured scheme, which follows the session's codebooks.

        Args:
            plan: layout of the tensors.
            name: added to the session's.
        """
        scheme = self._session.config.exchange
        exchange = make_exchange(
            "by_bytes" if scheme == "auto" else scheme,
            plan,
            self._session.registry.codebooks,
            self.transport,
            f"{self._session.name}.{name}",
            self._threads,
        )
        self._exchanges.append(exchange)
        return exchange

    def forget_exchanges(self) -> None:
        """Let go of the exchanges made so far."""
        self._exchanges = []

    def _use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        for exchange in self._exchanges:
            exchange.use_codebooks(codebooks)
