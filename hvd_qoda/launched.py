"""Whether a program runs under a launcher, and its ranks if it does."""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from hvd_qoda.transport import ReducingTransport

__all__ = ["launched_ranks"]

_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched_ranks() -> AbstractContextManager[ReducingTransport | None]:
    """Horovod's ranks, for as long as the context lasts; None where no launcher has started this process."""
    if not any(name in os.environ for name in _RANK_VARIABLES) or find_spec("horovod") is None:
        return nullcontext()
    from hvd_qoda.horovod.job import job_ranks

    return job_ranks()
