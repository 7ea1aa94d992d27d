"""How a run's gradients travel: plain Horovod or the compressor, both metered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from hvd_qoda.compression import Compression
from hvd_qoda.distributed_optimizer import DistributedOptimizer
from hvd_qoda.exchange import exchange_by_bytes
from hvd_qoda.fusion import Gradient, parcels_of
from hvd_qoda.horovod import MeteredCompressor, QodaCompressor
from hvd_qoda.telemetry import StepRecord, Telemetry
from launch.train.options import Options, codebook_settings


@dataclass(frozen=True)
class GradientPath:
    """The compression of a run, the optimizer that uses it, and what a run wants to know of both.

    Attributes:
        compression: what the distributed optimizer is given.
        optimizer: the distributed optimizer.
        overlaps: whether it is ours, which sends fusion buffers while backward goes on; else Horovod's.
    """

    compression: MeteredCompressor | QodaCompressor
    optimizer: Any
    overlaps: bool

    def sent_bytes(self) -> int:
        """Bytes that this rank has sent so far, counted at the collective calls."""
        return self.compression.traffic.sent_bytes

    def bits_per_coordinate(self, records: Sequence[StepRecord], ranks: int) -> float | None:
        """Bits that one hop carries of the compressed layers, per coordinate; None where nothing is compressed.

        The bytes sent for compressed layers (norms, headers, padding and the compressor's all-reduced token included)
        divided by the coordinates sent: a rank sends every coordinate K-1 times in an all-gather, and 2 (K-1)/K times
        in a reduce-scatter with all-gather. Of this rank, mean over `records`. Not stated for exchanges that change
        from step to step ("auto"), or that mostly carry exact values ("hierarchical", "off").
        """
        if isinstance(self.compression, MeteredCompressor) or ranks == 1:
            return None
        if self.compression.config.exchange in ("auto", "hierarchical", "off"):
            return None
        sent_together = [(name,) for name in self.compression.registry.parameters]
        hops = _coordinates_sent(
            self.compression, self.optimizer.fusion_buffers() if self.overlaps else sent_together, ranks
        )
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


def gradient_path(
    options: Options, model: nn.Module, optimizer: torch.optim.Optimizer, telemetry: Telemetry
) -> GradientPath:
    """The way that `options` name, with `optimizer` wrapped. Raises ConfigError for values that are refused."""
    compression = _compression(options, model, telemetry)
    if options.route == "overlap":
        return GradientPath(compression, DistributedOptimizer(optimizer, compression=compression, model=model), True)
    named = model.named_parameters()
    return GradientPath(compression, hvd.DistributedOptimizer(optimizer, named, compression), False)


def _compression(options: Options, model: nn.Module, telemetry: Telemetry) -> Any:
    if options.compression != "qoda":
        return Compression.metered(getattr(hvd.Compression, options.compression))
    return Compression.qoda(
        model,
        telemetry=telemetry,
        **codebook_settings(options),
        bucket_size=options.bucket_size,
        exchange=options.exchange,
        min_numel=options.min_numel,
        measure_error_every=options.measure_error_every,
        fusion_buffer_mb=options.fusion_buffer_mb,
        seed=options.seed,
        update_levels={"at": options.update_levels_at, "every": options.update_levels_every or None},
    )


def _coordinates_sent(
    compression: QodaCompressor, sent_together: Sequence[tuple[str, ...]], ranks: int
) -> dict[str, float]:
    """Codebook key of every compressed layer type -> coordinates that a rank sends per step, counted at each hop.

    `sent_together`: the parameters of every message.
    """
    registry = compression.registry
    sent: dict[str, float] = {}
    for names in sent_together:
        times = _times_sent(_scheme(compression, names, ranks), ranks)
        for entry in (registry.parameters[name] for name in names):
            if not registry.codebooks[entry.codebook].is_exact:
                sent[entry.codebook] = sent.get(entry.codebook, 0.0) + times * entry.numel
    return sent


def _scheme(compression: QodaCompressor, names: Sequence[str], ranks: int) -> str:
    """The exchange that carries these parameters together."""
    if compression.config.exchange != "by_bytes":
        return compression.config.exchange
    registry = compression.registry
    entries = [registry.parameters[name] for name in names if registry.parameters[name].numel]
    plan = parcels_of([Gradient(entry, entry.dtype) for entry in entries], registry, ranks).plan
    return "allgather" if plan is None else exchange_by_bytes(plan, registry.codebooks, ranks)


def _times_sent(scheme: str, ranks: int) -> float:
    return float(ranks - 1) if scheme == "allgather" else 2.0 * (ranks - 1) / ranks
