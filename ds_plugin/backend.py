"""The communication backend in front of DeepSpeed's own: gradients are quantized, everything else passes through.

`deepspeed.comm` sends every collective through one backend object, and none of its calls knows parameters. So whoever
knows that a call reduces gradients says so, and which ones, by a `GradientScope` around the call; outside such a scope
(norms, overflow flags, parameters, anything of other engines) the backend is DeepSpeed's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.comm import comm
from deepspeed.comm.torch import TorchBackend
from torch import distributed

from ds_plugin.slices import Piece
from hvd_qoda.errors import UnsupportedError

__all__ = ["GradientScope", "Reducer", "gradients", "install", "uninstall"]


class Reducer(Protocol):
    """What reduces gradients in place of the host."""

    def reduce(
        self,
        flat: torch.Tensor,
        pieces: Sequence[Piece],
        group: Any,
        average: bool,
        host: "HostReduction",
    ) -> None:
        """Write the ranks' sum (or mean) into a flat buffer; see `ds_plugin.reducer.GradientReducer.reduce`."""


@dataclass(frozen=True)
class HostReduction:
    """What the host would do with a buffer.

    Attributes:
        kind: "all_reduce" or "reduce_scatter"; the latter also for reductions to one rank.
        run: does it, and leaves what this rank keeps of the result in the buffer.
    """

    kind: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class GradientScope:
    """Says that the next reduction is one of gradients.

    Attributes:
        reducer: what reduces them.
        pieces: what the buffer consists of.
    """

    reducer: Reducer
    pieces: tuple[Piece, ...]


_scope: ContextVar[GradientScope | None] = ContextVar("ds_plugin.gradient_scope", default=None)


@contextmanager
def gradients(reducer: Reducer, pieces: Sequence[Piece]) -> Iterator[None]:
    """Within it, in this thread, reductions are reductions of these gradients."""
    token = _scope.set(GradientScope(reducer, tuple(pieces)))
    try:
        yield
    finally:
        _scope.reset(token)


class _Finished:
    """The handle of a collective that is over."""

    def wait(self) -> None:
        return None

    def is_completed(self) -> bool:
        return True


class QodaBackend:
    """Mixed into the class of the live backend by `install`, whose state it shares.

    Attributes:
        qoda_live_backend: the live backend.
        qoda_users: number of engines that need this one.
    """

    qoda_live_backend: TorchBackend
    qoda_users: int

    def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        """As `torch.distributed.all_reduce`."""
        plain = super().all_reduce  # type: ignore[misc]  # of the live backend's class
        op = distributed.ReduceOp.SUM if op is None else op
        scope = _scope.get()
        if scope is None:
            return plain(tensor, op, group, async_op)
        host = HostReduction("all_reduce", lambda: plain(tensor, op, group, False))
        scope.reducer.reduce(tensor.view(-1), scope.pieces, group, _is_average(op), host)
        return _Finished() if async_op else None

    def reduce(self, tensor: torch.Tensor, dst: int, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        """As `torch.distributed.reduce`; `dst` is a global rank."""
        plain = super().reduce  # type: ignore[misc]  # of the live backend's class
        op = distributed.ReduceOp.SUM if op is None else op
        scope = _scope.get()
        if scope is None:
            return plain(tensor=tensor, dst=dst, op=op, group=group, async_op=async_op)
        host = HostReduction("reduce_scatter", lambda: plain(tensor=tensor, dst=dst, op=op, group=group))
        scope.reducer.reduce(tensor.view(-1), scope.pieces, group, _is_average(op), host)
        return _Finished() if async_op else None

    def reduce_scatter_tensor(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        op: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        """As `torch.distributed.reduce_scatter_tensor`; the output may be a part of the input."""
        plain = super().reduce_scatter_tensor  # type: ignore[misc]  # of the live backend's class
        op = distributed.ReduceOp.SUM if op is None else op
        scope = _scope.get()
        if scope is None:
            return plain(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        flat = input_tensor.view(-1)
        own = flat.narrow(0, distributed.get_rank(group) * output_tensor.numel(), output_tensor.numel())
        own = own.view_as(output_tensor)

        def run() -> None:
            plain(output_tensor, input_tensor, op=op, group=group)
            own.copy_(output_tensor)

        scope.reducer.reduce(flat, scope.pieces, group, _is_average(op), HostReduction("reduce_scatter", run))
        output_tensor.copy_(own)
        return _Finished() if async_op else None


def install() -> QodaBackend:
    """Put a `QodaBackend` before the live backend, unless one is there; returns it, for `uninstall`.

    Raises:
        UnsupportedError: where DeepSpeed does not communicate by torch.distributed.
    """
    live = comm.cdb
    if not isinstance(live, QodaBackend):
        if not isinstance(live, TorchBackend):
            raise UnsupportedError(
                f"DeepSpeed communicates by {type(live).__name__}; ds_plugin needs torch.distributed: call "
                "deepspeed.init_distributed() before deepspeed.initialize(), and use no other backend"
            )
        front: Any = object.__new__(type("QodaBackend", (QodaBackend, type(live)), {}))
        front.__dict__ = live.__dict__  # shared: no second process group, and what one of them learns both know
        front.qoda_live_backend, front.qoda_users = live, 0
        comm.cdb = live = front
    live.qoda_users += 1
    return live


def uninstall(front: QodaBackend) -> None:
    """Take it away again if no other engine needs it."""
    front.qoda_users -= 1
    if front.qoda_users == 0 and comm.cdb is front:
        comm.cdb = front.qoda_live_backend
        del front.qoda_live_backend, front.qoda_users


def _is_average(op: Any) -> bool:
    # DeepSpeed's own enumeration and torch's have the same names.
    name = str(op).rsplit(".", 1)[-1].upper()
    if name not in ("SUM", "AVG"):
        raise UnsupportedError(f"gradients are reduced by {op}; compressed gradients can be summed or averaged")
    return name == "AVG"
