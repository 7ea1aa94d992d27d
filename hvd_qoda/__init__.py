"""Layer-wise quantized gradients and the QODA optimizers for Horovod and `DistributedDataParallel`.

import horovod.torch as hvd, hvd_qoda
optimizer = hvd.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), compression=hvd_qoda.Compression.qoda(model, bits=5)
)
"""

from hvd_qoda import ddp
from hvd_qoda.compression import Compression
from hvd_qoda.config import LayerRule, QodaConfig, UpdateLevels
from hvd_qoda.distributed_optimizer import DistributedOptimizer
from hvd_qoda.errors import (
    CodebookError,
    ConfigError,
    ExchangeTimeoutError,
    PlanError,
    QodaError,
    RankMismatchError,
    RegistryError,
    UnsupportedError,
    WireError,
)
from hvd_qoda.optim import QODA, QGenX, QODAdam, WorkerNorms, WorkerNormsSource
from hvd_qoda.sinks import ConsoleSink, JsonLinesSink, TensorBoardSink, WandbSink, read_json_lines, read_steps
from hvd_qoda.telemetry import LayerTypeRecord, StepRecord, Telemetry
from qoda_kernels import __version__

__all__ = [
    "QODA",
    "CodebookError",
    "Compression",
    "ConfigError",
    "ConsoleSink",
    "DistributedOptimizer",
    "ExchangeTimeoutError",
    "JsonLinesSink",
    "LayerRule",
    "LayerTypeRecord",
    "PlanError",
    "QGenX",
    "QODAdam",
    "QodaConfig",
    "QodaError",
    "RankMismatchError",
    "RegistryError",
    "StepRecord",
    "Telemetry",
    "TensorBoardSink",
    "UnsupportedError",
    "UpdateLevels",
    "WandbSink",
    "WireError",
    "WorkerNorms",
    "WorkerNormsSource",
    "__version__",
    "ddp",
    "read_json_lines",
    "read_steps",
]
