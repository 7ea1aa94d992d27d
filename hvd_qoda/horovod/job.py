"""The ranks of a Horovod job, for programs that only look at them."""

from collections.abc import Iterator
from contextlib import contextmanager

import horovod.torch as hvd

from hvd_qoda.horovod.transport import HorovodTransport

__all__ = ["job_ranks"]


@contextmanager
def job_ranks() -> Iterator[HorovodTransport]:
    """All ranks, between Horovod's init and shutdown."""
    hvd.init()
    try:
        yield HorovodTransport()
    finally:
        hvd.shutdown()
