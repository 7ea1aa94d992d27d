"""The Horovod front end; importing it needs Horovod."""

from hvd_qoda.horovod.compressor import QodaCompressor
from hvd_qoda.horovod.metered import MeteredCompressor
from hvd_qoda.horovod.transport import HorovodTransport

__all__ = ["HorovodTransport", "MeteredCompressor", "QodaCompressor"]
