"""Bytes that leave a rank, counted at the collective calls.

A rank's sent bytes follow from the payload that it hands to each collective, whoever started the collective:
all-reduce 2 (K-1)/K of the payload (reduce-scatter followed by all-gather), reduce-scatter (K-1)/K of it, all-gather
K-1 times the payload, all-to-all everything but the rank's own share. What the host adds on its own (negotiation,
TCP/IP headers) is not counted, neither for compressed nor for plain gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "Traffic",
    "TrafficMeter",
    "all_gather_bytes",
    "all_reduce_bytes",
    "all_to_all_bytes",
    "reduce_scatter_bytes",
]


def all_reduce_bytes(payload: int, size: int) -> float:
    """Bytes that one rank sends in an all-reduce: 2 (K-1)/K of the payload.

    Args:
        payload: bytes handed to the collective.
        size: number of ranks, K.
    """
    return 2 * (size - 1) / size * payload


def reduce_scatter_bytes(payload: int, size: int) -> float:
    """Bytes that one rank sends in a reduce-scatter, or on average in a reduction to one rank: (K-1)/K of the payload.

    Args:
        payload: bytes handed to the collective.
        size: number of ranks, K.
    """
    return (size - 1) / size * payload


def all_gather_bytes(payload: int, size: int) -> int:
    """Bytes that one rank sends in an all-gather: its payload reaches K-1 others.

    Args:
        payload: bytes that this rank contributes.
        size: number of ranks, K.
    """
    return (size - 1) * payload


def all_to_all_bytes(send_bytes: Sequence[int], rank: int) -> int:
    """Bytes that one rank sends in an all-to-all: every share but its own.

    Args:
        send_bytes: bytes for each destination.
        rank: this rank's position.
    """
    return sum(send_bytes) - send_bytes[rank]


@dataclass(frozen=True)
class Traffic:
    """Totals of a meter at one moment.

    Attributes:
        sent: bytes that left this rank, by collective ("all_reduce", "reduce_scatter", "all_gather", "all_to_all").
        calls: collectives started, by the same names.
    """

    sent: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sent", dict(self.sent))
        object.__setattr__(self, "calls", dict(self.calls))

    @property
    def sent_bytes(self) -> int:
        """All bytes sent, rounded to whole ones."""
        return round(sum(self.sent.values()))

    def __sub__(self, earlier: "Traffic") -> "Traffic":
        """Traffic between an earlier moment and this one."""
        return Traffic(
            {name: value - earlier.sent.get(name, 0) for name, value in self.sent.items()},
            {name: value - earlier.calls.get(name, 0) for name, value in self.calls.items()},
        )


class TrafficMeter:
    """Adds up the bytes that this rank sends. Each method returns the bytes it has added."""

    def __init__(self) -> None:
        self._sent: dict[str, float] = {}
        self._calls: dict[str, int] = {}

    def all_reduce(self, payload: int, size: int) -> float:
        """Note an all-reduce of `payload` bytes among `size` ranks."""
        return self._add("all_reduce", all_reduce_bytes(payload, size))

    def all_gather(self, payload: int, size: int) -> float:
        """Note an all-gather to which this rank contributes `payload` bytes."""
        return self._add("all_gather", all_gather_bytes(payload, size))

    def all_to_all(self, send_bytes: Sequence[int], rank: int) -> float:
        """Note an all-to-all with `send_bytes[j]` bytes for rank j."""
        return self._add("all_to_all", all_to_all_bytes(send_bytes, rank))

    def host(self, collective: str, sent: float) -> float:
        """Note what a collective of the host's own sends from this rank."""
        return self._add(collective, sent)

    @property
    def traffic(self) -> Traffic:
        """Totals so far."""
        return Traffic(self._sent, self._calls)

    def _add(self, collective: str, sent: float) -> float:
        # Bytes of an all-reduce may be fractions; only totals are rounded.
        self._sent[collective] = self._sent.get(collective, 0) + sent
        self._calls[collective] = self._calls.get(collective, 0) + 1
        return sent
