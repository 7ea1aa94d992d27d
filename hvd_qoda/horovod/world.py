"""What a route holds for the ranks that it runs among now; made anew when they change (elastic training)."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from hvd_qoda.config import QodaConfig
from hvd_qoda.cost_model import Layout
from hvd_qoda.exchange import Exchange, PendingExchanges, exchange_by_bytes
from hvd_qoda.horovod.transport import HorovodTransport
from hvd_qoda.hosts import Hosts, gather_hosts
from hvd_qoda.measurement import measure_codec, measure_link
from hvd_qoda.scheme_choice import Costs
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
        early_roll_call: whether the route begins a step's roll call itself, in good time, so that its first exchange
            waits for the answer; else the first exchanges are held back meanwhile.
    """

    def __init__(self, session: Session, process_set: Any, early_roll_call: bool = False) -> None:
        self._session = session
        self._process_set = process_set
        config: QodaConfig = session.config
        self.transport = HorovodTransport(process_set, session.meter, config.timeout_s)
        if early_roll_call:
            self.transport.hold_back_nothing()
        self.pending = PendingExchanges(config.timeout_s, f"rank {self.transport.ranks[self.transport.rank]}")
        self._threads = WorkerThreads(allotted_threads(os.environ))
        self._exchanges: list[Exchange] = []
        self._hosts: Hosts | None = None

    def is_current(self) -> bool:
        """Whether the process set has not changed since."""
        return self.transport.identity == HorovodTransport(self._process_set).identity

    def begin_step(self, messages: Callable[[], Mapping[str, MessagePlan]], mixed: bool) -> None:
        """Begin a step of the session, with a roll call; see `Session.begin_step`. The scheme may change.

        Args:
            messages: gives the plans of what can be exchanged quantized, by name, where schemes are to be chosen.
            mixed: whether different messages may have different schemes.
        """
        session = self._session
        if session.begin_step(self.transport, self.transport.require_roll_call):
            self._use_codebooks(session.registry.codebooks)
        self.know_hosts()
        if session.choice is not None:
            said = session.choice.begin_step(self.transport, messages, lambda: self._measure(messages()), mixed)
            if said is not None:
                session.note(said)

    @property
    def common_scheme(self) -> str:
        """The scheme of all messages in this step; "off" as long as nothing has been agreed upon or measured."""
        choice = self._session.choice
        scheme: str = self._session.config.exchange
        if choice is not None:
            scheme = "off" if choice.chosen is None else choice.chosen.name
        if scheme == "mixed":  # saved by a route with a scheme for each message
            return "by_bytes"
        return "off" if scheme == "hierarchical" and self._hosts is None else scheme

    def know_hosts(self) -> None:
        """Find out which ranks share a host, if a scheme needs it; a collective call that waits, once."""
        if self._hosts is None and self._session.config.exchange in ("auto", "hierarchical"):
            self._hosts = gather_hosts(self.transport, f"{self._session.name}.hosts")

    def scheme_of(self, message: str) -> str:
        """The scheme of a message in this step: as configured or, with "auto", as chosen."""
        choice = self._session.choice
        return self._session.config.exchange if choice is None else choice.scheme_for(message)

    def new_exchange(self, plan: MessagePlan, name: str, scheme: str) -> Exchange:
        """An exchange of this plan, which follows the session's codebooks.

        Args:
            plan: layout of the tensors.
            name: added to the session's.
            scheme: a quantized one, or "by_bytes".
        """
        session = self._session
        own_name = f"{session.name}.{name}.{scheme}"
        if scheme == "by_bytes":
            # By the widths that training started with: ranks may meet a parameter first at different steps.
            first = session.registry.first_codebooks
            slices = [segment.slice for segment in plan.segments]
            scheme = exchange_by_bytes(MessagePlan.build(slices, first), first, self.transport.size)
        exchange = make_exchange(
            scheme,
            plan,
            session.registry.codebooks,
            self.transport,
            own_name,
            self._threads,
            self._hosts,
        )
        self._exchanges.append(exchange)
        return exchange

    def new_exact_exchange(self, plan: MessagePlan, name: str) -> Exchange:
        """An exchange that carries the values of a plan as they are: for what the host cannot reduce.

        Args:
            plan: layout of the tensors.
            name: added to the session's.
        """
        slices = [segment.slice for segment in plan.segments]
        books = {part.codebook: Codebook.exact() for part in slices}
        exact = MessagePlan.build(slices, books)
        return make_exchange(
            "by_bytes", exact, books, self.transport, f"{self._session.name}.{name}.exact", self._threads
        )

    def forget_exchanges(self) -> None:
        """Let go of the exchanges made so far."""
        self._exchanges = []

    def _use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        for exchange in self._exchanges:
            exchange.use_codebooks(codebooks)

    def _measure(self, messages: Mapping[str, MessagePlan]) -> Costs:
        """Link and codec, the same on every rank; a collective call that waits."""
        session = self._session
        assert self._hosts is not None  # begin_step() has seen to it
        layout = Layout.of(messages.values())
        elements: Counter[str] = Counter()
        for plan in messages.values():
            for segment in plan.segments:
                elements[segment.slice.codebook] += segment.slice.length
        parameter = next(iter(session.parameters.values()))
        device = parameter.device
        link = measure_link(self.transport, self._hosts, device, layout.raw_bytes, name=f"{session.name}.link")
        codebook = session.registry.codebooks[elements.most_common(1)[0][0]] if elements else Codebook.exact()
        name = f"{session.name}.codec"
        coding = session.coding_device([parameter])
        codec = measure_codec(codebook, self.transport, self._threads, device, name, layout.elements, coding)
        return Costs(self._hosts.ranks, link, codec)
