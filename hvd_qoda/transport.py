"""What an exchange needs from the host: collectives on bytes, started without waiting.

An exchange is written against `Transport` and runs on any host that offers an all-gather and an all-to-all of bytes.
Collectives are matched between ranks by name, not by order: ranks may start them in any order.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from hvd_qoda.errors import ExchangeTimeoutError, RankMismatchError

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "Handle",
    "LocalTransport",
    "ReducingTransport",
    "Transport",
    "all_gather_array",
    "all_gather_bytes",
    "late",
    "wait_until",
]

# A peer may evaluate, write a checkpoint or compile for minutes without being lost.
DEFAULT_TIMEOUT_S = 300.0
_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


class Handle(Protocol):
    """A collective under way."""

    @property
    def name(self) -> str:
        """The collective's name, for messages."""

    def ready(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> list[torch.Tensor]:
        """The received bytes, one uint8 tensor per source rank, in rank order; may be called once.

        The tensors may share memory with each other, and stay valid after the next collective.

        Raises:
            ExchangeTimeoutError: if a peer did not take part before the transport's deadline.
            RankLostError: if a peer's connection is gone.
            RankMismatchError: if a peer sent another number of bytes than expected.
            UnsupportedError: if a peer left by the host's `join()`.
        """


class Transport(Protocol):
    """Collectives among the ranks of one group."""

    @property
    def rank(self) -> int:
        """This process's position in the group, 0 to size - 1."""

    @property
    def size(self) -> int:
        """Number of ranks in the group."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members' numbers in the whole job, for messages."""

    @property
    def timeout_s(self) -> float:
        """Seconds after which a wait gives up."""

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        """Send one message to every rank.

        Args:
            message: uint8, 1-D, contiguous; must not change until the handle's `wait` has returned.
            receive_bytes: size of each rank's message; they may differ.
            name: the same on every rank; not under way a second time.
        """

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        """Send one share to each rank.

        Args:
            message: uint8, 1-D, contiguous: the shares for rank 0, 1, ... one behind the other; must not change until
                the handle's `wait` has returned.
            send_bytes: size of each share.
            receive_bytes: size of the share that each rank sends here.
            name: the same on every rank; not under way a second time.
        """


class ReducingTransport(Transport, Protocol):
    """A transport that also knows the host's own all-reduce, for measuring it, and the machines that ranks run on."""

    @property
    def host_name(self) -> str:
        """Name of the machine that this rank runs on: the same for its ranks, different for those of others."""

    def start_all_reduce(self, values: torch.Tensor, name: str) -> Handle:
        """Let the host reduce a tensor over the ranks, in the way in which it reduces gradients.

        Args:
            values: 1-D, contiguous, of a dtype that the host can reduce; overwritten.
            name: the same on every rank; not under way a second time.

        Returns:
            A handle whose `wait` returns one tensor: the sum, or the mean where the host itself divides.
        """


class LocalTransport:
    """The transport of a group of one: what is sent comes back."""

    rank = 0
    size = 1
    host_name = "localhost"

    def __init__(self, timeout_s: float = DEFAULT_TIMEOUT_S, number: int = 0) -> None:
        self.timeout_s = timeout_s
        self.ranks = (number,)

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        """See `Transport`."""
        return _LocalHandle(message, name)

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        """See `Transport`."""
        return _LocalHandle(message, name)

    def start_all_reduce(self, values: torch.Tensor, name: str) -> Handle:
        """See `ReducingTransport`."""
        return _LocalHandle(values, name)


class _LocalHandle:
    def __init__(self, message: torch.Tensor, name: str) -> None:
        self.name = name
        self._message = message.clone()

    def ready(self) -> bool:
        return True

    def wait(self) -> list[torch.Tensor]:
        return [self._message]


def wait_until(ready: Callable[[], bool], timeout_s: float, describe: Callable[[], str]) -> None:
    """Poll until something is ready.

    Args:
        ready: polled; may do work.
        timeout_s: seconds until this gives up.
        describe: what was waited for, asked only for the error message.

    Raises:
        ExchangeTimeoutError: after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    pause = _FIRST_PAUSE_S
    while not ready():
        if time.monotonic() > deadline:
            raise late(describe(), timeout_s)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def late(what: str, timeout_s: float) -> ExchangeTimeoutError:
    """The error for ranks that have not answered in time.

    Args:
        what: was waited for, and where.
        timeout_s: seconds after which this rank has given up.
    """
    return ExchangeTimeoutError(
        f"{what} did not finish within {timeout_s:g} s. Check that every rank is alive and takes the same steps (the "
        "same number of batches, the same parameters with gradients); if a rank may work for longer between two steps, "
        "raise timeout_s."
    )


def all_gather_bytes(transport: Transport, message: bytes, receive_bytes: Sequence[int], name: str) -> list[bytes]:
    """Gather a few bytes from every rank, and wait for them.

    Args:
        transport: the group.
        message: this rank's bytes; at least one.
        receive_bytes: size of each rank's message.
        name: the same on every rank.

    Returns:
        Every rank's bytes, in rank order.
    """
    sent = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    handle = transport.start_all_gather(sent, receive_bytes, name)
    return [received.numpy().tobytes() for received in handle.wait()]


def all_gather_array(transport: Transport, values: np.ndarray, name: str) -> np.ndarray:
    """Gather a small array from every rank, exactly, and wait for it.

    Args:
        transport: the group.
        values: any dtype and shape, the same on every rank.
        name: the same on every rank.

    Returns:
        Array [size, *values.shape]. Whoever sums it in rank order gets the same bits on every rank.

    Raises:
        RankMismatchError: if a rank's array has another size.
    """
    sent = np.asarray(values, order="C")
    if sent.size == 0:
        return np.empty((transport.size, *sent.shape), dtype=sent.dtype)
    received = all_gather_bytes(transport, sent.tobytes(), [sent.nbytes] * transport.size, name)
    lengths = [len(part) for part in received]
    if lengths != [sent.nbytes] * transport.size:
        raise RankMismatchError(f"{name}: the ranks sent {lengths} bytes, expected {sent.nbytes} from each")
    return np.stack([np.frombuffer(part, dtype=sent.dtype).reshape(sent.shape) for part in received])
