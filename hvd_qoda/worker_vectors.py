"""The single workers' quantized gradients, as far as the learning rates of QODA and Q-GenX need them.

Every rank knows its own hatV_k, from the messages that it has sent, and keeps those of the exchange before. Their two
numbers |hatV_k|^2 and |hatV_k - previous hatV_k|^2, over the whole model, are all-gathered in float64 and added in rank
order, for every exchange. Messages are kept, not vectors: at 5 bits they take a sixth of the memory.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hvd_qoda.errors import ConfigError, QodaError
from hvd_qoda.exchange import Exchange, OwnMessage, Stamp
from hvd_qoda.optim.worker_norms import WorkerNorms
from hvd_qoda.transport import Transport, all_gather_array
from qoda_kernels.codebook import Codebook

__all__ = ["ExactVector", "OwnVector", "WorkerVectors"]


@dataclass(frozen=True)
class ExactVector:
    """Gradients that travelled unquantized; the same interface as `hvd_qoda.exchange.OwnMessage`.

    Attributes:
        values: the gradients.
        parameters: theirs.
    """

    values: tuple[torch.Tensor, ...]
    parameters: tuple[str, ...]

    def decode(self) -> list[torch.Tensor]:
        """The gradients themselves."""
        return list(self.values)


OwnVector = OwnMessage | ExactVector


class WorkerVectors:
    """This rank's quantized gradient of the exchange before, and the ranks' norms."""

    def __init__(self) -> None:
        self._previous: dict[str, OwnVector] = {}
        self._current: dict[str, OwnVector] = {}
        self._norms: dict[str, tuple[float, float]] = {}
        self._last: WorkerNorms | None = None

    @property
    def last(self) -> WorkerNorms:
        """Norms of the exchange that finished last, equal on all ranks.

        Raises:
            QodaError: before the first one.
        """
        if self._last is None:
            raise QodaError(
                "no exchange has finished yet: ask for worker norms after the first step's gradients arrived"
            )
        return self._last

    def add(self, parameter: str, vector: OwnVector) -> None:
        """Note what this rank has sent for a parameter in this step.

        Raises:
            QodaError: if the parameter had another size in the step before.
        """
        parts = [part.double().view(-1) for part in vector.decode()]
        before = self._previous.get(parameter)
        changes = parts
        if before is not None:
            changes = [a - b.double().view(-1) for a, b in zip(parts, before.decode(), strict=True)]
        self._norms[parameter] = (_squared_norm(parts), _squared_norm(changes))
        self._current[parameter] = vector

    def regroup(self, contents: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> None:
        """Let the vectors before be those of other exchanges; what was in none of them is zero.

        Args:
            contents: key that `add` will be called with -> the parameters, in order.
            sizes: elements of each parameter.
        """
        parts: dict[str, torch.Tensor] = {}
        for vector in self._previous.values():
            parts.update(zip(_parameters(vector), (part.view(-1) for part in vector.decode()), strict=True))
        if parts:
            self._previous = {
                key: ExactVector(tuple(parts.get(n, torch.zeros(sizes[n], device="cpu")) for n in names), tuple(names))
                for key, names in contents.items()
            }

    def end_step(self, order: Iterable[str], transport: Transport) -> None:
        """Exchange this step's norms; a collective call that waits.

        A step with a non-finite gradient on any rank leaves no trace: loss scaling skips it on all of them.

        Args:
            order: what `add` was called with, in an order that is the same in every run, as that of hooks is not.
            transport: the ranks.
        """
        norms, self._norms = self._norms, {}
        current, self._current = self._current, {}
        added = [norms[name] for name in order if name in norms]
        own = np.array([math.fsum(norm[i] for norm in added) for i in (0, 1)])
        sums = np.zeros(2)
        for row in all_gather_array(transport, own, "hvd_qoda.worker_norms"):
            sums += row
        self._last = WorkerNorms(float(sums[0]), float(sums[1]), transport.size)
        if np.isfinite(sums).all():
            # A parameter that took no part keeps what it sent last.
            self._previous.update(current)

    def abandon_step(self) -> None:
        """Forget what this step has added."""
        self._norms, self._current = {}, {}

    def forget(self) -> None:
        """Start anew: the vectors before are zero."""
        self.abandon_step()
        self._previous, self._last = {}, None

    def state_dict(self) -> dict[str, Any]:
        """This rank's vectors (tensors) and the last norms. Another rank has others."""
        last = None if self._last is None else dataclasses.asdict(self._last)
        return {"previous": {name: _vector_state(vector) for name, vector in self._previous.items()}, "last": last}

    def load_state_dict(
        self, state: Mapping[str, Any], exchange_of: Callable[[str, torch.dtype], Exchange | None]
    ) -> None:
        """Go on where `state_dict` was taken, on the same rank.

        Args:
            state: what it returned.
            exchange_of: (parameter, dtype of its gradient) -> its exchange now.

        Raises:
            ConfigError: if a parameter travels in another way now.
            WireError: if a message does not fit its exchange.
        """
        self.forget()
        for name, entry in state["previous"].items():
            self._previous[name] = _restored_vector(name, entry, exchange_of)
        self._last = None if state["last"] is None else WorkerNorms(**state["last"])


def _vector_state(vector: OwnVector) -> dict[str, Any]:
    if isinstance(vector, ExactVector):
        return {"values": list(vector.values), "parameters": list(vector.parameters)}
    return {
        "message": vector.message,
        "dtype": str(vector.plan.segments[0].slice.dtype).removeprefix("torch."),
        "stamp": dataclasses.asdict(vector.stamp),
        "codebooks": {key: codebook.to_dict() for key, codebook in vector.codebooks.items()},
    }


def _restored_vector(
    name: str, entry: Mapping[str, Any], exchange_of: Callable[[str, torch.dtype], Exchange | None]
) -> OwnVector:
    if "values" in entry:
        return ExactVector(tuple(entry["values"]), tuple(entry["parameters"]))
    exchange = exchange_of(name, getattr(torch, entry["dtype"]))
    if exchange is None:
        raise ConfigError(
            f"the saved state holds a compressed gradient of parameter {name!r}, which is not compressed now: resume "
            "with the configuration that the state was saved with"
        )
    codebooks = {key: Codebook.from_dict(fields) for key, fields in entry["codebooks"].items()}
    restored = exchange.restore_own_message(entry["message"], Stamp(**entry["stamp"]), codebooks)
    restored.decode()  # raises here rather than within a step
    return restored


def _parameters(vector: OwnVector) -> tuple[str, ...]:
    if isinstance(vector, ExactVector):
        return vector.parameters
    return tuple(segment.slice.parameter for segment in vector.plan.segments)


def _squared_norm(parts: list[torch.Tensor]) -> float:
    return math.fsum(float(part.square().sum()) for part in parts)
