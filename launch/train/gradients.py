"""How a run's gradients travel: plain Horovod or the compressor, both metered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
from torch import nn

from hvd_qoda.compression import Compression
from hvd_qoda.exchange import exchange_by_bytes
from hvd_qoda.horovod import MeteredCompressor, QodaCompressor
from hvd_qoda.telemetry import StepRecord, Telemetry
from launch.train.options import Options
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.registry import CodebookRegistry, ParameterEntry


@dataclass(frozen=True)
class GradientPath:
    """What `hvd.DistributedOptimizer` is given as `compression`, and what a run wants to know of it."""

    compression: MeteredCompressor | QodaCompressor

    def sent_bytes(self) -> int:
        """Bytes that this rank has sent so far, counted at the collective calls."""
        return self.compression.traffic.sent_bytes

    def bits_per_coordinate(self, records: Sequence[StepRecord], ranks: int) -> float | None:
        """Bits that one hop carries of the compressed layers, per coordinate; None where nothing is compressed.

        The bytes sent for compressed layers (norms, headers, padding and the compressor's all-reduced token included)
        divided by the coordinates sent: a rank sends every coordinate K-1 times in an all-gather, and 2 (K-1)/K times
        in a reduce-scatter with all-gather. Of this rank, mean over `records`.
        """
        if isinstance(self.compression, MeteredCompressor) or ranks == 1:
            return None
        hops = _coordinates_sent(self.compression, ranks)
        steps = [
            sum(entry.sent_bytes for entry in record.layer_types if entry.layer_type in hops) for record in records
        ]
        coordinates = len(steps) * sum(hops.values())
        return 8 * sum(steps) / coordinates if coordinates else None

    def state_dict(self) -> dict[str, Any]:
        """The compressor's state."""
        return self.compression.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.compression.load_state_dict(state)


def gradient_path(options: Options, model: nn.Module, telemetry: Telemetry) -> GradientPath:
    """The way that `options` name. Raises ConfigError for values that the compressor refuses."""
    if options.compression != "qoda":
        return GradientPath(Compression.metered(getattr(hvd.Compression, options.compression)))
    return GradientPath(
        Compression.qoda(
            model,
            telemetry=telemetry,
            bits=options.bits,
            bucket_size=options.bucket_size,
            levels=options.levels,
            exchange=options.exchange,
            min_numel=options.min_numel,
            measure_error_every=options.measure_error_every,
            seed=options.seed,
            update_levels={"at": options.update_levels_at, "every": options.update_levels_every or None},
        )
    )


def _coordinates_sent(compression: QodaCompressor, ranks: int) -> dict[str, float]:
    """Codebook key of every compressed layer type -> coordinates that a rank sends per step, counted at each hop."""
    registry = compression.registry
    sent: dict[str, float] = {}
    for entry in registry.parameters.values():
        if not registry.codebooks[entry.codebook].is_exact:
            times = _times_sent(_scheme(compression.config.exchange, registry, entry, ranks), ranks)
            sent[entry.codebook] = sent.get(entry.codebook, 0.0) + times * entry.numel
    return sent


def _scheme(configured: str, registry: CodebookRegistry, entry: ParameterEntry, ranks: int) -> str:
    """The exchange that the compressor has chosen for a parameter."""
    if configured != "auto":
        return configured
    whole = Slice(entry.name, 0, entry.numel, entry.dtype, entry.codebook, entry.offset)
    return exchange_by_bytes(MessagePlan.build([whole], registry.codebooks), registry.codebooks, ranks)


def _times_sent(scheme: str, ranks: int) -> float:
    return float(ranks - 1) if scheme == "allgather" else 2.0 * (ranks - 1) / ranks
