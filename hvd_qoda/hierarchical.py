"""The hierarchical exchange: exact inside a host, quantized between hosts.

With L ranks on each of H hosts the plan is split into L shares of whole buckets. Phase 1 sends every share, exact, to
its owner on the same host, who sums what its host's ranks sent. Phase 2 is an exchange of the owner's mean among the
owners of the same share on all hosts: an all-gather (quantized once) where that costs no more bytes worth speaking of,
else a reduce-scatter (twice). Phase 3 sends what came out, exact, to all ranks of the host. Between hosts a share
travels once for each host, not once for each rank, and the error of one host's quantization is that of its mean.

Exact values are messages too, of exact codebooks: damage and ranks at different steps are found as everywhere.
Gradients of 16 bits count as float32, so that the mean of a host is not rounded before it is quantized.
"""

from collections.abc import Mapping, Sequence

import torch

from hvd_qoda.errors import QodaError, RankMismatchError, UnsupportedError, WireError
from hvd_qoda.exchange import (
    AllGatherExchange,
    Exchange,
    ReduceScatterExchange,
    exchange_by_bytes,
    wait_for_last_phase,
)
from hvd_qoda.gradient_codec import GradientCodec
from hvd_qoda.hosts import Hosts, SubgroupTransport
from hvd_qoda.shares import (
    OwnMean,
    OwnMessage,
    Share,
    Shares,
    Stamp,
    in_float32,
    pieces_of,
    replanned,
    under_way,
    with_dtypes_of,
)
from hvd_qoda.transport import Handle, Transport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan
from qoda_kernels.worker_threads import WorkerThreads

__all__ = ["HierarchicalExchange"]


class HierarchicalExchange:
    """Exact sums inside a host, quantized between hosts; see the module's docstring.

    Args:
        plan: layout of the tensors.
        codebooks: codebooks of the plan's keys.
        transport: the ranks.
        name: of the collectives: the same on every rank, and its own for every exchange.
        hosts: where the ranks run.
        threads: what runs the codec; by default the calling thread.

    Raises:
        UnsupportedError: where hosts have unequal numbers of ranks.
    """

    def __init__(
        self,
        plan: MessagePlan,
        codebooks: Mapping[str, Codebook],
        transport: Transport,
        name: str,
        hosts: Hosts,
        threads: WorkerThreads | None = None,
    ) -> None:
        self.plan = plan
        self._name = name
        cross = SubgroupTransport(transport, hosts.cross(transport.rank))
        self._local = SubgroupTransport(transport, hosts.local(transport.rank))
        self._wide = in_float32(plan, codebooks)
        quantized = self._wide.split(self._local.size)
        self._shares = Shares([_exact_share(self._wide, part, threads) for part in quantized], self._local)
        # One kind for all shares, because the ranks start the same collectives.
        kinds = {exchange_by_bytes(part, codebooks, cross.size) for part in quantized}
        across = AllGatherExchange if kinds == {"allgather"} else ReduceScatterExchange
        own = quantized[self._local.rank]
        self._across: Exchange = across(own, codebooks, cross, f"{name}.between_hosts", threads)
        self._mean = OwnMean(self._shares, self._local)
        self._stamp = Stamp(0, 0, 0)
        self._first: Handle | None = None
        self._is_across = False
        self._last: Handle | None = None
        self._failure: QodaError | None = None

    @property
    def sent_bytes(self) -> int:
        """See `Exchange`; between the ranks of a host and between hosts."""
        return self._shares.sent_bytes + self._mean.sent_bytes + self._across.sent_bytes

    @property
    def has_own_message(self) -> bool:
        """See `Exchange`: what is quantized is the mean of a host's ranks."""
        return False

    @property
    def waiting_for(self) -> str:
        """See `Exchange`."""
        if self._is_across:
            return self._across.waiting_for
        return f"{self._name}.{'to_owners' if self._last is None else 'from_owners'}"

    def use_codebooks(self, codebooks: Mapping[str, Codebook]) -> None:
        """See `Exchange`."""
        self.plan = replanned(self.plan, codebooks)
        self._across.use_codebooks(codebooks)

    def start(self, values: Sequence[torch.Tensor], stamp: Stamp) -> None:
        """See `Exchange`."""
        self._stamp = stamp
        self._mean.lie_beside(values)
        self._shares.encode(with_dtypes_of(self._wide, values), stamp)
        self._send()

    def start_refused(self, reason: str) -> None:
        """See `Exchange`."""
        self._shares.refuse(reason)
        self._send()

    def advance(self) -> bool:
        """See `Exchange`."""
        if self._first is not None and self._first.ready():
            handle, self._first = self._first, None
            self._start_across(handle.wait())
        if self._is_across and self._across.ready():
            self._is_across = False
            self._start_last()
        return self._last is not None

    def ready(self) -> bool:
        """See `Exchange`."""
        return self.advance() and under_way(self._last).ready()

    def finish(self, out: Sequence[torch.Tensor], scale: float = 1.0) -> None:
        """See `Exchange`."""
        wait_for_last_phase(self, self._local)
        handle, self._last = under_way(self._last), None
        messages = handle.wait()
        if self._failure is not None:
            raise self._failure
        self._shares.decode_means(messages, self._stamp, out, scale)

    def drop(self) -> None:
        """See `Exchange`."""
        if self._first is not None or self._is_across:
            wait_for_last_phase(self, self._local)
        if self._last is not None:
            handle, self._last = self._last, None
            handle.wait()

    def own_message(self) -> OwnMessage:
        """See `Exchange`."""
        raise UnsupportedError(
            "a hierarchical exchange quantizes the mean of each host's ranks, so a rank has no quantized gradient of "
            "its own: with worker_norms=True use exchange='allgather' or 'reduce_scatter'"
        )

    def restore_own_message(self, message: torch.Tensor, stamp: Stamp, codebooks: Mapping[str, Codebook]) -> OwnMessage:
        """See `Exchange`."""
        return self.own_message()

    def _send(self) -> None:
        self._last, self._is_across, self._failure = None, False, None
        self._first = self._shares.send(f"{self._name}.to_owners")

    def _start_across(self, messages: Sequence[torch.Tensor]) -> None:
        """The host's mean of this rank's share, from phase 1 to phase 2."""
        try:
            self._mean.decode(messages, self._stamp)
            self._across.start(self._mean.values, self._stamp)
        except (WireError, RankMismatchError) as error:
            # The other hosts are waiting for this one's share.
            self._failure = error
            self._across.start_refused(str(error))
        self._is_across = True

    def _start_last(self) -> None:
        """The mean of this rank's share over all hosts, from phase 2 to phase 3."""
        try:
            self._across.finish(self._mean.values)
        except (WireError, RankMismatchError) as error:
            self._failure = self._failure or error
        if self._failure is None:
            self._mean.encode(self._stamp)
        else:
            self._mean.refuse(str(self._failure))
        self._last = self._mean.send(f"{self._name}.from_owners")


def _exact_share(plan: MessagePlan, part: MessagePlan, threads: WorkerThreads | None) -> Share:
    """A part of a plan whose messages carry it unquantized."""
    slices = [segment.slice for segment in part.segments]
    books = {piece.codebook: Codebook.exact() for piece in slices}
    exact = MessagePlan.build(slices, books)
    return Share(exact, pieces_of(plan, part), GradientCodec(exact, books, threads))
