"""One backward pass: the reduce buckets that have arrived, and what is still to come for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hvd_qoda.ddp.fusion import Filling

__all__ = ["Arrived", "Step"]


class Arrived:
    """A reduce bucket that DDP has handed over.

    Args:
        buffer: its gradients one behind the other; will hold the mean. Or one sparse gradient.
        names: the parameters, in the buffer's order.
        lengths: their elements.
        coding_device: says where gradients are to be coded; called in the exchange's thread.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        names: Sequence[str],
        lengths: Sequence[int],
        coding_device: Callable[[Sequence[torch.Tensor]], torch.device],
    ) -> None:
        self._buffer = buffer
        self._coding_device = coding_device
        self._names = names
        self._lengths = lengths
        self._coded = buffer
        self._missing = len(names)
        on_device = buffer.device.type != "cpu"
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=[buffer.device] if on_device else None
        )
        # The gradients are ready on the stream that is current here, in DDP's thread.
        self._ready = (
            torch.get_device_module(buffer.device).current_stream(buffer.device).record_event() if on_device else None
        )

    @property
    def is_sparse(self) -> bool:
        """Whether this is one sparse gradient."""
        return self._buffer.is_sparse

    def sparse_gradient(self) -> tuple[str, torch.Tensor]:
        """Its parameter, and the gradient."""
        self._wait_until_ready()
        return self._names[0], self._buffer

    def gradients(self) -> dict[str, torch.Tensor]:
        """By parameter: contiguous 1-D tensors where they are coded, to be read and overwritten with the mean."""
        self._wait_until_ready()
        self._coded = self._buffer.to(self._coding_device([self._buffer]))
        return dict(zip(self._names, self._coded.split(list(self._lengths)), strict=True))

    def written(self) -> bool:
        """Note that one gradient has been overwritten; returns whether it was the last one."""
        self._missing -= 1
        return self._missing == 0

    def hand_back(self, sparse_mean: torch.Tensor | None = None) -> None:
        """Let DDP have the mean: what `gradients` holds now, or of a sparse gradient this one."""
        if self._coded is not self._buffer:
            self._buffer.copy_(self._coded)
        self.future.set_result(self._buffer if sparse_mean is None else sparse_mean)

    def _wait_until_ready(self) -> None:
        if self._ready is not None:
            self._ready.synchronize()


@dataclass
class Step:
    """A backward pass under way.

    Attributes:
        fillings: the fusion buffers.
        owners: the reduce bucket that a parameter's gradient came in.
        under_way: fusion buffers and sparse gradients that have been submitted and not finished.
        all_arrived: whether the last reduce bucket has come.
    """

    fillings: list[Filling]
    owners: dict[str, Arrived] = field(default_factory=dict)
    under_way: int = 0
    all_arrived: bool = False

    def take(self, bucket: Arrived, last: bool) -> list[Filling]:
        """Take a reduce bucket's gradients; returns the fusion buffers that are to be sent now.

        Behind the last one also those are sent for which not all gradients have come, because DDP was told to leave
        parameters out.
        """
        due = []
        gradients = {} if bucket.is_sparse else bucket.gradients()
        self.owners.update(dict.fromkeys(gradients, bucket))
        known = {name for filling in self.fillings for name in filling.names}
        frozen = tuple(name for name in gradients if name not in known)
        if frozen:  # since DDP was made; it goes on reducing them
            self.fillings.append(Filling(frozen, {}))
        for filling in self.fillings:
            came = {name: gradients[name] for name in filling.names if name in gradients}
            filling.gradients.update(came)
            if came and filling.is_full:
                due.append(filling)
        if last:
            self.all_arrived = True
            due += [filling for filling in self.fillings if filling.gradients and not filling.is_full]
        self.under_way += len(due) + bucket.is_sparse
        return due
