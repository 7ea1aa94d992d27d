"""The transport over the process groups of `torch.distributed`.

Order. `torch.distributed` does not know names: a group's collectives are matched between ranks by the order in which
they are started. So whoever uses this transport starts them in the same order on every rank, and nobody else uses its
groups meanwhile. An exchange of two phases starts its second one when the first has come in, at a time that differs
from rank to rank. Where several such exchanges are under way at once, give the transport a group of its own for
all-to-alls, and start the second phases in the order of the first ones.

Devices. Gloo moves bytes in host memory, NCCL on the GPU. A message elsewhere is copied there, and what arrives is
copied back to the message's device.

Sizes. Backends gather equal sizes only. Messages of different sizes are padded to the longest one; the meter counts
what is really sent.
"""

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hvd_qoda.errors import ConfigError, RankLostError, RankMismatchError
from hvd_qoda.torch_distributed.lasting import Lasting
from hvd_qoda.traffic import TrafficMeter
from hvd_qoda.transport import DEFAULT_TIMEOUT_S, Handle, late, wait_until

__all__ = ["TorchTransport"]

# The same function: torch 2.13 gave it this name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchTransport:
    """Collectives among the ranks of a process group, counted by a meter.

    Args:
        group: the process group; None for the default one, of all ranks.
        all_to_all_group: a group of the same ranks that carries the all-to-alls; None for `group`.
        meter: counts the bytes handed to the collectives.
        timeout_s: seconds after which a wait gives up. The group's own timeout, which torch sets, stays in force.

    Raises:
        ConfigError: if `torch.distributed` is not initialised, or the two groups have different ranks.
        RankMismatchError: if this process is not in the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        all_to_all_group: dist.ProcessGroup | None = None,
        meter: TrafficMeter | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group() before the first "
                "training step"
            )
        if -1 in (dist.get_rank(group), dist.get_rank(all_to_all_group)):
            raise RankMismatchError(
                f"rank {dist.get_rank()} exchanges gradients but is not in the process group given for that"
            )
        self._gathers = _Lane(group)
        self._all_to_alls = self._gathers if all_to_all_group is None else _Lane(all_to_all_group)
        self.meter = TrafficMeter() if meter is None else meter
        self.timeout_s = timeout_s
        self.ranks = self._gathers.ranks
        if self._all_to_alls.ranks != self.ranks:
            raise ConfigError(
                f"all_to_all_group has the ranks {self._all_to_alls.ranks}, group has {self.ranks}; they must be equal"
            )
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)

    @property
    def host_name(self) -> str:
        """See `hvd_qoda.transport.ReducingTransport`."""
        return socket.gethostname()

    def start_all_gather(self, message: torch.Tensor, receive_bytes: Sequence[int], name: str) -> Handle:
        """See `hvd_qoda.transport.Transport`; `receive_bytes` must be the same on every rank."""
        _check_sent(message, receive_bytes[self.rank], f"rank {dist.get_rank()}: all-gather {name!r}")
        longest = max(receive_bytes)
        lane = self._gathers
        self.meter.all_gather(longest, self.size)
        sent = lane.moved(_padded(message, longest))
        received = torch.empty(self.size * longest, dtype=torch.uint8, device=sent.device)
        work = _all_gather(received, sent, group=lane.group, async_op=True) if longest else None
        parts = [slice(k * longest, k * longest + length) for k, length in enumerate(receive_bytes)]
        return _TorchHandle(self, lane, work, f"all-gather {name!r}", sent, received, parts, message.device)

    def start_all_to_all(
        self, message: torch.Tensor, send_bytes: Sequence[int], receive_bytes: Sequence[int], name: str
    ) -> Handle:
        """See `hvd_qoda.transport.Transport`."""
        _check_sent(message, sum(send_bytes), f"rank {dist.get_rank()}: all-to-all {name!r}")
        lane = self._all_to_alls
        self.meter.all_to_all(send_bytes, self.rank)
        sent = lane.moved(message)
        received = torch.empty(sum(receive_bytes), dtype=torch.uint8, device=sent.device)
        work = dist.all_to_all_single(
            received, sent, list(receive_bytes), list(send_bytes), group=lane.group, async_op=True
        )
        ends = [sum(receive_bytes[: k + 1]) for k in range(self.size)]
        parts = [slice(end - length, end) for end, length in zip(ends, receive_bytes, strict=True)]
        return _TorchHandle(self, lane, work, f"all-to-all {name!r}", sent, received, parts, message.device)

    def start_all_reduce(self, values: torch.Tensor, name: str) -> Handle:
        """See `hvd_qoda.transport.ReducingTransport`."""
        lane = self._gathers
        self.meter.all_reduce(values.nbytes, self.size)
        summed = lane.moved(values)
        work = dist.all_reduce(summed, group=lane.group, async_op=True)
        parts = [slice(0, values.numel())]
        return _TorchHandle(self, lane, work, f"all-reduce {name!r}", summed, summed, parts, values.device)


class _Lane:
    """A process group, and the device whose memory it sends from."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.ranks = tuple(dist.get_process_group_ranks(group))
        # Such as "cpu:gloo,cuda:nccl".
        self._backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))

    def moved(self, message: torch.Tensor) -> torch.Tensor:
        """The message in memory from which this group sends."""
        backend = self._backends.get(message.device.type)
        if backend is not None and (backend != "gloo" or message.device.type == "cpu"):
            return message
        if "cpu" in self._backends:
            return message.cpu()
        device_type = next(iter(self._backends))
        return message.to(torch.device(device_type, torch.get_device_module(device_type).current_device()))


class _TorchHandle:
    """One collective under way."""

    def __init__(
        self,
        transport: TorchTransport,
        lane: _Lane,
        work: Any,
        name: str,
        sent: torch.Tensor,
        received: torch.Tensor,
        parts: Sequence[slice],
        device: torch.device,
    ) -> None:
        self.name = name
        self._transport = transport
        self._work = work
        self._received = received
        self._parts = parts
        self._device = device
        self._began = time.monotonic()
        self._lasting = Lasting(lane.group or dist.group.WORLD, work, _held(sent, received))
        if work is not None:
            self._lasting.begin()

    def ready(self) -> bool:
        if self._work is None:
            return True
        if not self._work.is_completed():
            return False
        self._lasting.end()
        return True

    def wait(self) -> list[torch.Tensor]:
        timeout_s = self._transport.timeout_s
        where = f"rank {dist.get_rank()}: {self.name} among the ranks {self._transport.ranks}"
        wait_until(self.ready, timeout_s, lambda: where)
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:  # the host's own
                if time.monotonic() - self._began >= timeout_s:  # the group's deadline came a moment before ours
                    raise late(where, timeout_s) from error
                raise RankLostError(
                    f"{where} failed: a rank has ended, or its connection is gone, or it takes other steps ({error})"
                ) from error
        received = self._received.to(self._device)
        return [received[part] for part in self._parts]


def _held(*tensors: torch.Tensor) -> torch.futures.Future[Sequence[torch.Tensor]]:
    """Something that holds tensors without Python.

    Whoever drops a tensor last but for its Python object needs the interpreter for that. Gloo's threads do so behind a
    collective, and PyTorch (2.13) aborts a process that ends meanwhile (pull request 179291 of pytorch/pytorch).
    """
    future: torch.futures.Future[Sequence[torch.Tensor]] = torch.futures.Future()
    future.set_result(list(tensors))
    return future


def _check_sent(message: torch.Tensor, expected: int, what: str) -> None:
    if message.numel() != expected:
        raise RankMismatchError(f"{what} is to send {message.numel()} bytes, and the ranks expect {expected}")


def _padded(message: torch.Tensor, length: int) -> torch.Tensor:
    if message.numel() == length:
        return message
    return torch.nn.functional.pad(message, (0, length - message.numel()))
