"""The transport over Horovod's collectives, and its errors in our words.

Why there is a roll call. A rank that has called `hvd.join()` takes part in all-reduces with zeros. All-gathers and
all-to-alls are refused, but only while they are new: once Horovod has cached them, it runs them on the joined rank too,
without a tensor, and that rank crashes or hangs. So the first collective of a step is an all-reduce of ones, which a
joined rank answers with zeros, and no other one starts before its answer is there. The first few that are to start are
held back meanwhile, so that there is usually nothing to wait for when the next one comes.

Why nothing here depends on time. Users' operations without names, such as `hvd.allreduce(loss)`, are matched between
ranks by the number of operations that each process has started before. So wherever the user's program can be, every
rank must have started equally many, and what is held back leaves when so many have come, not when the answer has.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_qoda.errors import ConfigError, RankMismatchError, UnsupportedError
from hvd_qoda.traffic import TrafficMeter
from hvd_qoda.transport import DEFAULT_TIMEOUT_S, Handle, wait_until

__all__ = ["HorovodTransport", "join_error"]

_HELD_BACK = 2  # collectives, unless `HorovodTransport.hold_back_nothing` was called


class HorovodTransport:
    """Collectives among the ranks of a Horovod process set, counted by a meter.

    Args:
        process_set: a Horovod process set; None for all ranks.
        meter: counts the bytes handed to the collectives.
        timeout_s: seconds after which a wait gives up.

    Raises:
        ConfigError: if Horovod or the process set is not initialised.
        RankMismatchError: if this process is not in the process set.
    """

    def __init__(
        self, process_set: Any = None, meter: TrafficMeter | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        if not hvd.is_initialized():
            raise ConfigError("Horovod is not initialised: call horovod.torch.init() before the first training step")
        self._process_set = hvd.global_process_set if process_set is None else process_set
        self.meter = TrafficMeter() if meter is None else meter
        self.timeout_s = timeout_s
        if self._process_set.process_set_id is None:
            raise ConfigError(f"{self._process_set} is not initialised: pass it to hvd.init() or hvd.add_process_set()")
        self.ranks = tuple(self._process_set.ranks)
        if not self._process_set.included():
            raise RankMismatchError(
                f"rank {hvd.rank()} exchanges gradients but is not in the compressor's process set {list(self.ranks)}: "
                "give the same process_set to the compressor and to hvd.DistributedOptimizer"
            )
        self.rank = int(self._process_set.rank())
        self.size = int(self._process_set.size())
        self._next_roll_call: str | None = None
        self._roll_call: int | None = None
        self._held_back = _HELD_BACK
        self._joined = False
        self._queue: deque[_HorovodHandle] = deque()

    @property
    def identity(self) -> tuple[int, int, tuple[int, ...]]:
        """Changes when Horovod was started anew with other members (elastic training)."""
        return int(self._process_set.process_set_id), self.rank, self.ranks

    @property
    def host_name(self) -> str:
        """See `hvd_qoda.transport.ReducingTransport`: as the launcher calls the machine, where it says so."""
        return os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()

    def require_roll_call(self, name: str) -> None:
        """Hold back what is started from now on until every rank has shown that it still takes part.

        Only all ranks together can be left by `hvd.join()`, so within a smaller process set this does nothing. If then
        a rank has joined, whatever is started or waited for raises UnsupportedError.

        Args:
            name: of the all-reduce: the same on every rank, and not under way.
        """
        if self.size > 1 and self._process_set.process_set_id == 0:
            self._next_roll_call = name

    def hold_back_nothing(self) -> None:
        """Let the first collective after a roll call wait for the answer; then `begin_roll_call` in good time."""
        self._held_back = 0

    def begin_roll_call(self) -> None:
        """Start the roll call that is required, if there is one; else the next collective does so."""
        if self._next_roll_call is not None:
            ones = torch.ones(1, device="cpu")
            self.meter.all_reduce(ones.nbytes, self.size)
            self._roll_call = hvd.allreduce_async_(ones, name=self._next_roll_call, op=hvd.Sum)
            self._next_roll_call = None

    def await_roll_call(self) -> None:
        """Wait for the answer, and start what was held back.

        Raises:
            UnsupportedError: if a rank has joined.
            ExchangeTimeoutError: if a rank does not answer in time.
        """
        wait_until(self.release, self.timeout_s, lambda: f"rank {hvd.rank()}: roll call of the ranks {self.ranks}")

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        """See `hvd_qoda.transport.Transport`."""
        self.meter.all_gather(message.numel(), self.size)
        return self._start(
            lambda: hvd.allgather_async(message, name=name, process_set=self._process_set),
            f"all-gather {name!r}",
            receive_bytes,
        )

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        """See `hvd_qoda.transport.Transport`."""
        self.meter.all_to_all(send_bytes, self.rank)
        splits = torch.tensor(send_bytes, dtype=torch.int32, device="cpu")
        return self._start(
            lambda: hvd.alltoall_async(message, splits=splits, name=name, process_set=self._process_set),
            f"all-to-all {name!r}",
            receive_bytes,
        )

    def start_all_reduce(self, values: torch.Tensor, name: str) -> Handle:
        """See `hvd_qoda.transport.ReducingTransport`: the mean, for which the host takes one more pass."""
        self.meter.all_reduce(values.nbytes, self.size)
        return self._start(
            lambda: hvd.allreduce_async_(values, name=name, op=hvd.Average, process_set=self._process_set),
            f"all-reduce {name!r}",
            [values.numel()],
        )

    def _start(self, start: Callable[[], int], name: str, receive_bytes: Sequence[int]) -> Handle:
        handle = _HorovodHandle(self, start, name, receive_bytes)
        self._queue.append(handle)
        self.begin_roll_call()
        if self._roll_call is None or len(self._queue) > self._held_back:
            self.await_roll_call()
        return handle

    def release(self) -> bool:
        """Let go what the roll call has held back, if it has been answered; returns whether it has.

        Raises:
            UnsupportedError: if a rank has joined.
        """
        if self._roll_call is not None:
            if not hvd.poll(self._roll_call):
                return False
            roll_call, self._roll_call = self._roll_call, None
            self._joined = round(hvd.synchronize(roll_call).item()) != self.size
        if self._joined:
            raise join_error()
        while self._queue:
            self._queue.popleft().submit()
        return True


class _HorovodHandle:
    """One collective of Horovod, held back or under way."""

    def __init__(
        self, transport: HorovodTransport, start: Callable[[], int], name: str, receive_bytes: Sequence[int]
    ) -> None:
        self.name = name
        self._transport = transport
        self._start = start
        self._started: int | None = None
        self._receive_bytes = list(receive_bytes)

    def submit(self) -> None:
        self._started = self._start()

    def ready(self) -> bool:
        if self._started is None:
            self._transport.release()
        return self._started is not None and bool(hvd.poll(self._started))

    def wait(self) -> list[torch.Tensor]:
        transport = self._transport
        wait_until(
            self.ready, transport.timeout_s, lambda: f"rank {hvd.rank()}: {self.name} among the ranks {transport.ranks}"
        )
        try:
            received = hvd.synchronize(self._started)
        except HorovodInternalError as error:
            if "join" in str(error).lower():
                raise join_error() from error
            raise  # elastic training restores its state on this very type
        lengths = None
        if isinstance(received, tuple):  # an all-to-all also returns the sizes
            received, splits = received
            lengths = splits.tolist()
        expected = self._receive_bytes
        if received.numel() != sum(expected) or (lengths is not None and lengths != expected):
            raise RankMismatchError(
                f"rank {hvd.rank()}: {self.name} brought {lengths or received.numel()} bytes, expected {expected} from "
                f"the ranks {transport.ranks}: the ranks disagree on the model or on its codebooks"
            )
        return list(received.split(expected))


def join_error() -> UnsupportedError:
    """The error for ranks of which another one has called `hvd.join()`."""
    return UnsupportedError(
        "a rank has called hvd.join(), which Horovod does not offer for the all-gathers and all-to-alls that "
        "compressed gradients need. Give every rank the same number of batches (drop the last ones, or repeat some), "
        "or train with an uncompressed hvd.DistributedOptimizer."
    )
