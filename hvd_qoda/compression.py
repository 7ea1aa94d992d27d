"""What users write: `compression=hvd_qoda.Compression.qoda(model, bits=5)`.

import horovod.torch as hvd, hvd_qoda
compression = hvd_qoda.Compression.qoda(model, bits=5, layers=[{"type": "embedding", "bits": 8}])
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), compression=compression
)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hvd_qoda.config import QodaConfig
from hvd_qoda.errors import ConfigError
from hvd_qoda.telemetry import Telemetry

if TYPE_CHECKING:  # importing hvd_qoda does not need Horovod
    from hvd_qoda.horovod import MeteredCompressor, QodaCompressor
    from hvd_qoda.horovod.metered import HorovodCompression

__all__ = ["Compression"]


class Compression:
    """Compressors for the stock `hvd.DistributedOptimizer`, to stand beside `hvd.Compression`."""

    @staticmethod
    def qoda(
        model_or_named_parameters: nn.Module | Iterable[tuple[str, torch.Tensor]],
        *,
        process_set: Any = None,
        telemetry: Telemetry | None = None,
        config: QodaConfig | None = None,
        name: str = "",
        **keywords: Any,
    ) -> QodaCompressor:
        """Layer-wise quantized gradients.

        Works with every option of `hvd.DistributedOptimizer` but op=hvd.Adasum, groups with sparse gradients, and
        `hvd.join()`. One compressor per model: with two optimizers whose steps alternate (a GAN), make one for each.

        The exchange "auto" measures the link and the codec before the first step, within about a second, predicts what
        every scheme costs, tries the best few for some steps, and keeps the one with the shortest steps; that may be
        "off", Horovod's own all-reduce. It looks again every 1,000 steps. As it depends on time, another run may choose
        otherwise; a scheme that is named never changes. The choice is saved with the state.

        Args:
            model_or_named_parameters: the model; or (name, parameter) pairs, from whose names the layer types are then
                guessed. The same on every rank.
            process_set: the one given to the optimizer; None for all ranks.
            telemetry: receives one record per step.
            name: tells models apart whose parameters have equal names and shapes and whose exchanges are under way at
                the same time, as with two critics that step after both have run backward; the same on every rank.
            config: configuration; or give its keys as keywords, over the environment's and the defaults.
            keywords: keys of `QodaConfig`, such as bits=5.

        Raises:
            ConfigError: for unknown keys or impossible values, and where config and keywords are both given.
            RegistryError: for layer rules that match nothing.
            ImportError: without Horovod.
        """
        _need_horovod()
        from hvd_qoda.horovod import QodaCompressor
        from hvd_qoda.horovod.elastic import register_state_handler

        if config is not None and keywords:
            raise ConfigError(f"give either config or keywords ({', '.join(keywords)}), not both")
        register_state_handler()
        chosen = QodaConfig.load(**keywords) if config is None else config
        return QodaCompressor(model_or_named_parameters, chosen, process_set, telemetry, name)

    @staticmethod
    def metered(
        compression: HorovodCompression, *, process_set: Any = None, telemetry: Telemetry | None = None
    ) -> MeteredCompressor:
        """One of Horovod's own compressors, with its bytes counted as those of `qoda` are.

        Args:
            compression: such as `hvd.Compression.none` or `hvd.Compression.fp16`.
            process_set: the one given to the optimizer; None for all ranks.
            telemetry: receives one record per step.

        Raises:
            ImportError: without Horovod.
        """
        _need_horovod()
        from hvd_qoda.horovod import MeteredCompressor
        from hvd_qoda.horovod.elastic import register_state_handler

        register_state_handler()
        return MeteredCompressor(compression, process_set, telemetry)


def _need_horovod() -> None:
    """Raise ImportError with advice where Horovod is missing."""
    try:
        import hvd_qoda.horovod  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "hvd_qoda.Compression needs Horovod with PyTorch. Its release does not build with current PyTorch: "
            "launch/build_horovod.sh in the project's repository makes a wheel that does."
        ) from error
