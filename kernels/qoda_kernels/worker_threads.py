"""A few threads that run kernels on ranges of buckets.

Kernels release the GIL, and buckets do not depend on each other, so a slice is cut into runs of whole buckets and the
result is the same for any number of threads. Numba's own threading is not used: its layers abort when two Python
threads use them, or spin, or do not survive a fork.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qoda_kernels.errors import ThreadCountError

Range = TypeVar("Range")


def allotted_threads(environ: Mapping[str, str]) -> int:
    """Threads that the host has allotted to this process.

    `OMP_NUM_THREADS` where it is set; else the processors that the process may use, divided by the ranks of this host
    as the launchers tell them (`HOROVOD_LOCAL_SIZE`, `LOCAL_WORLD_SIZE`, `OMPI_COMM_WORLD_LOCAL_SIZE`).

    Args:
        environ: environment variables, as in `os.environ`.
    """
    given = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if given.isdigit() and int(given) > 0:
        return int(given)
    ranks = next((int(environ[name]) for name in _LOCAL_SIZES if environ.get(name, "").isdigit()), 1)
    return max(1, _usable_processors() // max(1, ranks))


class WorkerThreads:
    """Runs a function on several ranges at once; the calling thread takes a share.

    Safe to use from several threads. Threads start with the first use, and anew in a forked child, which inherits none.
    """

    def __init__(self, count: int) -> None:
        """Allow for so many threads, the caller's included.

        Args:
            count: at least 1; with 1 everything runs in the calling thread.

        Raises:
            ThreadCountError: for fewer.
        """
        if count < 1:
            raise ThreadCountError(f"a codec needs at least 1 thread, the calling one; got {count}")
        self.count = count
        self._executor: ThreadPoolExecutor | None = None
        self._process = 0

    def run(self, function: Callable[[Range], None], ranges: Sequence[Range]) -> None:
        """Call function(range) for every range; returns when all are done.

        An exception of any call is raised, after all calls have ended.
        """
        if self.count == 1 or len(ranges) < 2:
            for part in ranges:
                function(part)
            return
        executor = self._started()
        shares = [ranges[index :: self.count] for index in range(min(self.count, len(ranges)))]
        futures = [executor.submit(_call_all, function, share) for share in shares[1:]]
        try:
            _call_all(function, shares[0])
        finally:
            failures = [future.exception() for future in futures]
        for failure in failures:
            if failure is not None:
                raise failure

    def _started(self) -> ThreadPoolExecutor:
        if self._executor is None or self._process != os.getpid():
            self._executor = ThreadPoolExecutor(self.count - 1, thread_name_prefix="hvd-qoda")
            self._process = os.getpid()
            weakref.finalize(self, self._executor.shutdown, wait=False)
        return self._executor


_LOCAL_SIZES = ("HOROVOD_LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _call_all(function: Callable[[Range], None], ranges: Sequence[Range]) -> None:
    for part in ranges:
        function(part)
