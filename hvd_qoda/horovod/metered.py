"""Bytes of Horovod's own compressors, counted as ours are: for baselines that are measured alike."""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import horovod.torch as hvd
import torch

from hvd_qoda.errors import ConfigError
from hvd_qoda.telemetry import LayerTypeRecord, Telemetry
from hvd_qoda.traffic import Traffic, TrafficMeter, all_reduce_bytes

__all__ = ["HorovodCompression", "MeteredCompressor"]

ALL_LAYERS = "all"
"""Layer type under which everything is recorded: Horovod's compressors treat all layers alike."""

STATE_FORMAT = 1


class HorovodCompression(Protocol):
    """Anything that `hvd.DistributedOptimizer(..., compression=...)` takes."""

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor to all-reduce, and a context."""

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The gradient, from what the all-reduce returned."""


class _Call:
    """One `compress` that Horovod has not yet answered by `decompress`."""

    def __init__(self, context: Any) -> None:
        self.context = context


class MeteredCompressor:
    """A compressor around another, which counts what goes to the all-reduces; made by `Compression.metered`.

    Args:
        compression: the one that does the work, such as `hvd.Compression.none`.
        process_set: the Horovod process set of the optimizer; None for all ranks.
        telemetry: receives one record per step.
    """

    def __init__(
        self, compression: HorovodCompression, process_set: Any = None, telemetry: Telemetry | None = None
    ) -> None:
        self._compression = compression
        self._process_set = hvd.global_process_set if process_set is None else process_set
        self._telemetry = telemetry
        self._meter = TrafficMeter()
        self._lock = threading.RLock()
        # Weak: Horovod forgets the calls of a step that its optimizer's load_state_dict() throws away.
        self._outstanding: weakref.WeakSet[_Call] = weakref.WeakSet()
        self._step = 0
        self._sums = _Sums()

    @property
    def step(self) -> int:
        """Number of the step under way, or finished last; the first one is 1."""
        return self._step

    @property
    def traffic(self) -> Traffic:
        """What this rank has handed to all-reduces. Sparse gradients, which Horovod gathers itself, do not count."""
        return self._meter.traffic

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Called by Horovod."""
        with self._lock:
            compressed, context = self._compression.compress(tensor)
            if not self._outstanding:
                self._step += 1
                self._sums = _Sums()
            call = _Call(context)
            self._outstanding.add(call)
            size = self._process_set.size()
            self._sums.bits = max(self._sums.bits, 8 * compressed.itemsize)
            self._sums.coordinates += tensor.numel()
            self._sums.raw_bytes += all_reduce_bytes(tensor.nbytes, size)
            self._sums.sent_bytes += self._meter.all_reduce(compressed.nbytes, size)
            return compressed, call

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Called by Horovod."""
        if ctx is None:  # a sparse gradient, which compress() has not seen
            return self._compression.decompress(tensor, None)
        with self._lock:
            result = self._compression.decompress(tensor, ctx.context)
            self._outstanding.discard(ctx)
            if not self._outstanding and self._telemetry is not None:
                self._report(self._telemetry)
            return result

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting steps: plain values, the same on every rank.

        Within a step it is the state before that step.
        """
        with self._lock:
            return {"format": STATE_FORMAT, "step": self._step - 1 if self._outstanding else self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ConfigError: for something else than such a state.
        """
        with self._lock:
            if state.get("format") != STATE_FORMAT:
                raise ConfigError(
                    f"the metered compressor's state has format {state.get('format')!r}; this version reads "
                    f"{STATE_FORMAT}"
                )
            self._outstanding.clear()
            self._step = int(state["step"])
            if self._telemetry is not None:
                self._telemetry.rewind(self._step)

    def _report(self, telemetry: Telemetry) -> None:
        sums = self._sums
        record = LayerTypeRecord(ALL_LAYERS, sums.bits, sums.coordinates, round(sums.raw_bytes), round(sums.sent_bytes))
        telemetry.log_exchange(self._step, [record], registry_version=0)


@dataclass
class _Sums:
    """Of one step."""

    bits: int = 0
    coordinates: int = 0
    raw_bytes: float = 0.0
    sent_bytes: float = 0.0
