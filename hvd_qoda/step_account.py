"""What one step has exchanged, by layer type, for telemetry."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hvd_qoda.telemetry import LayerTypeRecord, LearntRecord
from qoda_kernels.codebook import EXACT_BITS, Codebook

__all__ = ["CONTROL", "StepAccount"]

CONTROL = "control"
"""Layer type under which the bytes that belong to no gradient are recorded: roll calls, statistics, worker norms."""


@dataclass
class _Sums:
    coordinates: int = 0
    raw_bytes: float = 0.0
    sent_bytes: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    measured: bool = False
    quantized: bool = False


class StepAccount:
    """Adds up one step's exchanges."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, key: str, coordinates: int, raw_bytes: float, sent_bytes: float, exact: bool = False) -> None:
        """Note one tensor.

        Args:
            key: of its codebook.
            coordinates: its elements.
            raw_bytes: what the host's own all-reduce of it would send from this rank.
            sent_bytes: what this rank sends for it, everything included.
            exact: whether it travels as it is, whatever its codebook.
        """
        sums = self._sums.setdefault(key, _Sums())
        sums.coordinates += coordinates
        sums.raw_bytes += raw_bytes
        sums.sent_bytes += sent_bytes
        sums.quantized = sums.quantized or not exact

    def add_error(self, key: str, values: torch.Tensor, decoded: torch.Tensor) -> None:
        """Note the quantization error of one tensor: `values` sent, `decoded` arrived; both 1-D."""
        sums = self._sums.setdefault(key, _Sums())
        exact = values.double()  # the squares of very small or large gradients do not fit float32
        sums.squared_error += float((decoded.double() - exact).square().sum())
        sums.squared_norm += float(exact.square().sum())
        sums.measured = True

    def add_exact(self, key: str) -> None:
        """Note that a tensor had no quantization error."""
        self._sums.setdefault(key, _Sums()).measured = True

    def records(
        self,
        codebooks: Mapping[str, Codebook],
        total_bytes: float,
        show_levels: Iterable[str],
        learnt: Mapping[str, LearntRecord | None] | None = None,
    ) -> list[LayerTypeRecord]:
        """One record per codebook that took part, and one of the control bytes.

        Args:
            codebooks: the step's codebooks.
            total_bytes: all bytes that left this rank in the step; what no tensor explains is control.
            show_levels: keys of the codebooks whose levels are to be recorded.
            learnt: what codebooks, by key, have just learnt from.
        """
        shown = set(show_levels)
        records = [
            LayerTypeRecord(
                layer_type=key,
                bits=codebooks[key].bits if sums.quantized else EXACT_BITS,
                coordinates=sums.coordinates,
                raw_bytes=round(sums.raw_bytes),
                sent_bytes=round(sums.sent_bytes),
                relative_error=_relative_error(sums),
                levels=codebooks[key].levels if key in shown and not codebooks[key].is_exact else None,
                learnt=(learnt or {}).get(key),
            )
            for key, sums in self._sums.items()
        ]
        control = round(total_bytes - sum(sums.sent_bytes for sums in self._sums.values()))
        if control > 0:
            records.append(LayerTypeRecord(CONTROL, EXACT_BITS, 0, 0, control))
        return records


def _relative_error(sums: _Sums) -> float | None:
    if not sums.measured:
        return None
    return sums.squared_error / sums.squared_norm if sums.squared_norm else 0.0
