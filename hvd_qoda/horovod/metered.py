"""Bytes of Horovod's own compressors, counted as ours are: for baselines that are measured alike."""

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import horovod.torch as hvd
import torch

from hvd_qoda.telemetry import LayerTypeRecord, Telemetry
from hvd_qoda.traffic import Traffic, TrafficMeter, all_reduce_bytes

__all__ = ["HorovodCompression", "MeteredCompressor"]

ALL_LAYERS = "all"
"""Layer type under which everything is recorded: Horovod's compressors treat all layers alike."""


class HorovodCompression(Protocol):
    """Anything that `hvd.DistributedOptimizer(..., compression=...)` takes."""

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The tensor to all-reduce, and a context."""

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The gradient, from what the all-reduce returned."""


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
        self._outstanding = 0
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
            if self._outstanding == 0:
                self._step += 1
                self._sums = _Sums()
            self._outstanding += 1
            size = self._process_set.size()
            self._sums.bits = max(self._sums.bits, 8 * compressed.itemsize)
            self._sums.coordinates += tensor.numel()
            self._sums.raw_bytes += all_reduce_bytes(tensor.nbytes, size)
            self._sums.sent_bytes += self._meter.all_reduce(compressed.nbytes, size)
            return compressed, (context,)

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Called by Horovod."""
        if ctx is None:  # a sparse gradient, which compress() has not seen
            return self._compression.decompress(tensor, None)
        with self._lock:
            result = self._compression.decompress(tensor, ctx[0])
            self._outstanding -= 1
            if self._outstanding == 0 and self._telemetry is not None:
                self._report(self._telemetry)
            return result

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
