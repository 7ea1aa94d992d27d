"""Where an engine's records go: its monitor, and whatever telemetries the user adds later."""

from collections.abc import Iterable, Mapping
from typing import Any

from hvd_qoda.telemetry import LayerTypeRecord, Telemetry

__all__ = ["Reports"]


class Reports:
    """Hands what a session reports to several telemetries."""

    def __init__(self) -> None:
        self._all: list[Telemetry] = []
        self._own: list[Telemetry] = []
        self._started: tuple[Any, Any] | None = None

    def add(self, telemetry: Telemetry, close: bool = False) -> None:
        """Report to a telemetry from now on.

        Args:
            telemetry: receives the records.
            close: close it with the engine.
        """
        if self._started is not None:
            telemetry.start(*self._started)
        self._all.append(telemetry)
        if close:
            self._own.append(telemetry)

    def start(
        self, config: Mapping[str, Any] | None = None, codebooks: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """See `Telemetry.start`."""
        self._started = (config, codebooks)
        for telemetry in self._all:
            telemetry.start(config, codebooks)

    def log_exchange(
        self,
        step: int | None,
        layer_types: Iterable[LayerTypeRecord],
        registry_version: int,
        note: str | None = None,
    ) -> None:
        """See `Telemetry.log_exchange`."""
        records = list(layer_types)
        for telemetry in self._all:
            telemetry.log_exchange(step, records, registry_version, note)

    def rewind(self, step: int) -> None:
        """See `Telemetry.rewind`."""
        for telemetry in self._all:
            telemetry.rewind(step)

    def close(self) -> None:
        """Close the telemetries that belong to the engine."""
        for telemetry in self._own:
            telemetry.close()
        self._all, self._own = [], []
