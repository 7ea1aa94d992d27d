"""Which ranks share a machine, and transports among a part of the ranks.

A `SubgroupTransport` needs nothing of the host but its all-to-all among all ranks, with shares of no bytes for whoever
is not in the subgroup: no process sets or groups of the host's own, which it would have to be told of beforehand, and
one collective serves all subgroups at once. In return all ranks start the same collectives, each for its own subgroup,
and the subgroups have equally many ranks.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvd_qoda.cost_model import Ranks
from hvd_qoda.errors import UnsupportedError
from hvd_qoda.transport import Handle, ReducingTransport, Transport, all_gather_bytes

__all__ = ["Hosts", "SubgroupTransport", "gather_hosts"]

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Hosts:
    """Where the ranks of a group run.

    Attributes:
        of: number of each rank's host; hosts are numbered in the order of their first ranks.
    """

    of: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of ranks on each host."""
        return tuple(self.of.count(host) for host in range(max(self.of) + 1))

    @property
    def ranks(self) -> Ranks:
        """For the cost model: hosts with unequal numbers of ranks count as hosts of single ranks."""
        counts = self.counts
        return Ranks(len(self.of), counts[0] if len(set(counts)) == 1 else 1)

    def local(self, rank: int) -> tuple[int, ...]:
        """Positions of the ranks on the host of one of them, itself included."""
        return tuple(other for other, host in enumerate(self.of) if host == self.of[rank])

    def cross(self, rank: int) -> tuple[int, ...]:
        """Positions of the ranks at the same place of every host, in the order of the hosts.

        Raises:
            UnsupportedError: where the hosts have unequal numbers of ranks.
        """
        self.check_equal()
        place = self.local(rank).index(rank)
        firsts = [self.of.index(host) for host in range(len(self.counts))]
        return tuple(self.local(first)[place] for first in firsts)

    def check_equal(self) -> None:
        """Raise UnsupportedError unless every host has the same number of ranks."""
        if len(set(self.counts)) > 1:
            raise UnsupportedError(
                f"the hosts have {', '.join(map(str, self.counts))} ranks, and a hierarchical exchange needs the same "
                "number on each: start equally many on every host, or use another exchange (allgather, "
                "reduce_scatter, or auto)"
            )


def gather_hosts(transport: ReducingTransport, name: str = "hvd_qoda.hosts") -> Hosts:
    """Find out which ranks share a machine; a collective call that waits.

    Args:
        transport: the ranks.
        name: of the collective; the same on every rank.
    """
    own = hashlib.blake2b(transport.host_name.encode(), digest_size=_DIGEST_BYTES).digest()
    found = all_gather_bytes(transport, own, [_DIGEST_BYTES] * transport.size, name)
    order = list(dict.fromkeys(found))
    return Hosts(tuple(order.index(digest) for digest in found))


class SubgroupTransport:
    """Collectives among some of the ranks; see the module's docstring.

    Args:
        transport: all ranks.
        members: positions among them of this subgroup, in increasing order; this rank is one of them.
    """

    def __init__(self, transport: Transport, members: Sequence[int]) -> None:
        self._transport = transport
        self._members = tuple(members)
        self.rank = self._members.index(transport.rank)
        self.size = len(self._members)
        self.ranks = tuple(transport.ranks[member] for member in self._members)
        self.timeout_s = transport.timeout_s

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        """See `hvd_qoda.transport.Transport`; every rank of every subgroup calls it."""
        copies = message.repeat(self.size)
        return self.start_all_to_all(copies, [message.numel()] * self.size, receive_bytes, name)

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        """See `hvd_qoda.transport.Transport`; every rank of every subgroup calls it."""
        handle = self._transport.start_all_to_all(
            message, self._among_all(send_bytes), self._among_all(receive_bytes), name
        )
        return _SubgroupHandle(handle, self._members)

    def _among_all(self, sizes: Sequence[int]) -> list[int]:
        found = [0] * self._transport.size
        for member, size in zip(self._members, sizes, strict=True):
            found[member] = size
        return found


class _SubgroupHandle:
    def __init__(self, handle: Handle, members: Sequence[int]) -> None:
        self.name = handle.name
        self._handle = handle
        self._members = members

    def ready(self) -> bool:
        return self._handle.ready()

    def wait(self) -> list[torch.Tensor]:
        received = self._handle.wait()
        return [received[member] for member in self._members]
