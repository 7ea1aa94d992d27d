"""A sparse gradient under DistributedDataParallel: every rank gets the rows of all ranks, exactly.

Rows differ in number from rank to rank: ranks gather the numbers first, eight bytes each, and then the rows. Like DDP
itself, ranks divide before they sum. Repeated rows are added up in rank order, so that the mean has the same bits
everywhere.
"""

import numpy as np
import torch

from hvd_qoda.errors import WireError
from hvd_qoda.shares import under_way
from hvd_qoda.traffic import all_gather_bytes
from hvd_qoda.transport import Handle, Transport, wait_until

__all__ = ["SparseGather"]

_COUNT_BYTES = 8


class SparseGather:
    """Gathers one sparse gradient, in a `hvd_qoda.ddp.ordered.Round`.

    Args:
        parameter: its name.
        gradient: a sparse COO tensor of any dtype; not changed.
        transport: the ranks.
    """

    def __init__(self, parameter: str, gradient: torch.Tensor, transport: Transport) -> None:
        self.waiting_for = f"rows of {parameter!r}"
        self._gradient = gradient
        self._transport = transport
        self._row_bytes = gradient.itemsize * gradient.shape[gradient.sparse_dim() :].numel()
        self._index_bytes = gradient.sparse_dim() * torch.int64.itemsize
        self._message = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._counts: Handle | None = None
        self._rows: Handle | None = None
        self._numbers: list[int] = []  # of rows, by rank

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave this rank."""
        return all_gather_bytes(_COUNT_BYTES + self._message.numel(), self._transport.size)

    @property
    def coordinates(self) -> int:
        """Values that this rank sends."""
        return int(self._gradient._values().numel())

    def start(self) -> None:
        """Send the number of rows."""
        gradient = self._gradient.coalesce()  # fewer rows
        self._gradient = gradient
        parts = (gradient.indices().t(), gradient.values())
        self._message = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
        count = torch.from_numpy(np.array([gradient._nnz()], dtype="<i8").view(np.uint8))
        sizes = [_COUNT_BYTES] * self._transport.size
        self._counts = self._transport.start_all_gather(count, sizes, f"{self.waiting_for}, their number")

    def advance(self) -> bool:
        """Send the rows as soon as all numbers are known; returns whether only `finish` is left.

        Raises:
            WireError: for an impossible number of rows.
        """
        if self._counts is not None and self._counts.ready():
            handle, self._counts = self._counts, None
            self._numbers = [int.from_bytes(part.cpu().numpy().tobytes(), "little") for part in handle.wait()]
            most = self._gradient.shape[: self._gradient.sparse_dim()].numel()
            if max(self._numbers) > most:
                raise WireError(
                    f"{self.waiting_for}: a rank announced {max(self._numbers)} rows, at most {most} are possible; a "
                    "message was damaged, or the ranks disagree on the model"
                )
            sizes = [number * (self._index_bytes + self._row_bytes) for number in self._numbers]
            self._rows = self._transport.start_all_gather(self._message, sizes, self.waiting_for)
        return self._rows is not None

    def ready(self) -> bool:
        """Whether `finish` would return at once."""
        return self.advance() and under_way(self._rows).ready()

    def finish(self) -> torch.Tensor:
        """The ranks' mean, coalesced; the same bits on every rank.

        Raises:
            WireError: for a row that the gradient does not have.
        """
        received = under_way(self._rows).wait()
        self._rows = None
        like = self._gradient
        indices, values = [], []
        for number, message in zip(self._numbers, received, strict=True):
            split = number * self._index_bytes
            # Copies, because parts of a message need not be aligned.
            indices.append(message[:split].clone().view(torch.int64).view(number, like.sparse_dim()))
            values.append(message[split:].clone().view(like.dtype).view(number, *like.shape[like.sparse_dim() :]))
        rows = torch.cat(values) / len(received)
        try:
            gathered = torch.sparse_coo_tensor(torch.cat(indices).t(), rows, like.shape, check_invariants=True)
        except RuntimeError as error:
            raise WireError(f"{self.waiting_for}: a damaged message ({error})") from error
        return gathered.coalesce()

    def drop(self) -> None:
        """Wait for what is under way, and forget it."""
        if self._counts is not None:
            wait_until(self.advance, self._transport.timeout_s, lambda: self.waiting_for)
        handle, self._rows = self._rows, None
        if handle is not None:
            handle.wait()
