"""What the hook holds for the ranks that it runs among: the transport, the exchanges, and the thread."""

import datetime
import os
import threading
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from hvd_qoda.ddp.all_reduce import AllReduceExchange
from hvd_qoda.ddp.fusion import plan_of
from hvd_qoda.ddp.ordered import OrderedExchanges
from hvd_qoda.ddp.worker import ExchangeThread
from hvd_qoda.errors import QodaError, RankLostError
from hvd_qoda.exchange import Exchange
from hvd_qoda.hosts import Hosts, gather_hosts
from hvd_qoda.schemes import make_exchange
from hvd_qoda.session import Session
from hvd_qoda.torch_distributed import TorchTransport
from hvd_qoda.torch_distributed.lasting import Lasting
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan
from qoda_kernels.registry import CodebookRegistry
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads

__all__ = ["Outstanding", "World"]


class Outstanding:
    """Futures that DDP waits for, and the error that ended the exchange, if any; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: list[torch.futures.Future[torch.Tensor]] = []
        self._failure: Exception | None = None

    def add(self, future: torch.futures.Future[torch.Tensor]) -> None:
        """Note that DDP waits for it; it fails at once where the exchange has failed."""
        with self._lock:
            if self._failure is None:
                self._futures.append(future)
                return
        _fail(future, self._failure)

    def remove(self, future: torch.futures.Future[torch.Tensor]) -> None:
        """Note that it is complete."""
        with self._lock:
            self._futures.remove(future)

    def fail(self, error: Exception) -> None:
        """Let everybody who waits have the error."""
        with self._lock:
            self._failure = self._failure or error
            futures, self._futures = self._futures, []
        for future in futures:
            _fail(future, error)

    def check(self) -> None:
        """Raise QodaError if the exchange has failed."""
        if self._failure is not None:
            raise QodaError(
                "gradients cannot be exchanged any more, because an earlier exchange failed; restart the ranks"
            ) from self._failure


class World:
    """The ranks, and everything whose shape depends on their number.

    Made on every rank at the same time: it makes process groups.

    Args:
        process_group: of the ranks; None for all.
        session: whose gradients are exchanged.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, session: Session) -> None:
        scheme = session.config.exchange
        ranks = TorchTransport(process_group).ranks
        timeout = datetime.timedelta(seconds=session.config.timeout_s)
        gathers = _new_group(process_group, ranks, timeout)
        # Two NCCL communicators may block each other when their kernels start in another order on every rank.
        two_groups = "nccl" not in dist.get_backend_config(gathers)
        all_to_alls = _new_group(process_group, ranks, timeout) if two_groups else None
        # DDP's group, because DDP may have collectives of its own under way when backward is broken off.
        self._in_pass = Lasting(process_group or dist.group.WORLD)
        self._session = session
        self._timeout_s = session.config.timeout_s
        self.transport = TorchTransport(gathers, all_to_alls, session.meter, self._timeout_s)
        self.exchanges = OrderedExchanges(two_groups)
        self.outstanding = Outstanding()
        where = f"rank {dist.get_rank()}"
        device = next((p.device for p in session.parameters.values()), torch.device("cpu"))
        self.thread = ExchangeThread(self.exchanges, self._timeout_s, where, self.outstanding.fail, device)
        self._threads = WorkerThreads(allotted_threads(os.environ))
        self._scheme = "by_bytes" if scheme == "auto" else scheme
        self._hosts: Hosts | None = None
        self._made: dict[tuple[tuple[str, ...], tuple[torch.dtype, ...]], Exchange] = {}
        self._used: set[tuple[tuple[str, ...], tuple[torch.dtype, ...]]] = set()

    @property
    def sends_exactly(self) -> bool:
        """Whether all gradients travel as they are."""
        return self._scheme == "off"

    def know_hosts(self) -> None:
        """Find out which ranks share a host, if the exchange needs it; a collective call that waits, once."""
        if self._hosts is None and self._scheme == "hierarchical":
            self._hosts = gather_hosts(self.transport)

    def exchange(self, registry: CodebookRegistry, names: Sequence[str], dtypes: Sequence[torch.dtype]) -> Exchange:
        """The exchange of a fusion buffer.

        Args:
            registry: layer types and codebooks.
            names: parameters of the gradients in it.
            dtypes: of the gradients.
        """
        key = (tuple(names), tuple(dtypes))
        self._used.add(key)
        found = self._made.get(key)
        if found is None:
            found = self._new_exchange(plan_of(names, dtypes, registry), registry.codebooks, names)
            self._made[key] = found
        return found

    def _new_exchange(self, plan: MessagePlan, codebooks: Mapping[str, Codebook], names: Sequence[str]) -> Exchange:
        name = f"fusion buffer of {names[0]!r} to {names[-1]!r}"
        if not self.sends_exactly:
            return make_exchange(self._scheme, plan, codebooks, self.transport, name, self._threads, self._hosts)
        exact = MessagePlan.build(
            [segment.slice for segment in plan.segments], dict.fromkeys(codebooks, Codebook.exact())
        )
        return AllReduceExchange(exact, self.transport, name)

    def begin_pass(self) -> None:
        """A backward pass begins: nobody waits for DDP's collectives if it is broken off and the program ends."""
        self._in_pass.begin()

    def end_step(self) -> None:
        """Forget exchanges that have not been asked for in this step."""
        self._in_pass.end()
        self._made = {key: exchange for key, exchange in self._made.items() if key in self._used}
        self._used = set()

    def forget_exchanges(self) -> None:
        """Let go of all exchanges."""
        self._made, self._used = {}, set()

    def settle(self) -> None:
        """Wait until nothing is under way, and forget what has not been sent."""
        done = threading.Event()

        def drop() -> None:
            try:
                self.exchanges.drop()
            finally:
                done.set()

        self.thread.submit(drop)
        done.wait(self._timeout_s)
        self.outstanding.check()


def _fail(future: torch.futures.Future[torch.Tensor], error: Exception) -> None:
    future.set_exception(error)  # type: ignore[arg-type]  # torch gives the error the result's type


def _new_group(
    process_group: dist.ProcessGroup | None, ranks: Sequence[int], timeout: datetime.timedelta
) -> dist.ProcessGroup:
    """A group of the same ranks; waits for them.

    Raises:
        RankLostError: if one of them does not make it in time.
    """
    try:
        return dist.new_group(list(ranks), timeout, backend=_backend(process_group), use_local_synchronization=True)
    except RuntimeError as error:  # the host's own
        raise RankLostError(
            f"rank {dist.get_rank()}: a process group for the exchange could not be made among the ranks {ranks} "
            f"within {timeout.total_seconds():g} s: a rank has ended, or does not take its first step ({error})"
        ) from error


def _backend(process_group: dist.ProcessGroup | None) -> str:
    """What `new_group` is to be told so that its backends are those of this group."""
    config = str(dist.get_backend_config(process_group))
    backends = dict(entry.split(":") for entry in config.split(","))
    names = set(backends.values())
    return names.pop() if len(names) == 1 else config
