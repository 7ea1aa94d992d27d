"""Optimizers: QODA (exact), QODAdam (for networks), QGenX (baseline)."""

from hvd_qoda.optim.qgenx import QGenX
from hvd_qoda.optim.qoda import QODA
from hvd_qoda.optim.qodadam import QODAdam
from hvd_qoda.optim.worker_norms import WorkerNorms, WorkerNormsSource

__all__ = ["QODA", "QGenX", "QODAdam", "WorkerNorms", "WorkerNormsSource"]
