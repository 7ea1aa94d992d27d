"""A few threads that run kernels on ranges of buckets.

Kernels release the GIL, and buckets do not depend on each other, so a message is cut into runs of whole buckets and the
result is the same for any number of threads. Numba's own threading is not used: its layers abort when two Python
threads use them, or spin, or do not survive a fork.

The work takes tens of microseconds, and so does waking a thread. So the calling thread begins at once and everybody
takes the next range when done with one: a thread that comes late takes fewer. After its last range a thread watches for
more for some tens of microseconds before it sleeps, because a step's messages often come in a row; between steps
nobody uses the processor.
"""

import math
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from qoda_kernels.errors import ThreadCountError

Range = TypeVar("Range")


def allotted_threads(environ: Mapping[str, str]) -> int:
    """Threads that the host has allotted to this process.

    `OMP_NUM_THREADS` where it is set; else the processors that the process may use (its affinity, and the quota of its
    control group), divided by the ranks of this host as the launchers tell them (`HOROVOD_LOCAL_SIZE`,
    `LOCAL_WORLD_SIZE`, `OMPI_COMM_WORLD_LOCAL_SIZE`).

    Args:
        environ: environment variables, as in `os.environ`.
    """
    given = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if given.isdigit() and int(given) > 0:
        return int(given)
    ranks = next((int(environ[name]) for name in _LOCAL_SIZES if environ.get(name, "").isdigit()), 1)
    return max(1, _usable_processors() // max(1, ranks))


class WorkerThreads:
    """Runs a function on several ranges at once; the calling thread takes part.

    Safe to use from several threads: while one has the helpers, the others work alone. Helpers start with the first
    use, and anew in a forked child, which inherits none.
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
        self._helpers: dict[int, _Helpers] = {}  # by process: of those that a fork has left behind, no thread runs

    def run(self, function: Callable[[Range], None], ranges: Sequence[Range]) -> None:
        """Call function(range) for every range, in any order; returns when all are done.

        An exception of any call is raised, after all calls have ended.
        """
        if self.count == 1 or len(ranges) < 2:
            for part in ranges:
                function(part)
            return
        job = _Job(function, ranges)
        helpers = self._of_this_process()
        if helpers.is_taken.acquire(blocking=False):
            try:
                helpers.work(job, min(self.count, len(ranges)) - 1)
            finally:
                helpers.is_taken.release()
        else:
            job.work()
        if job.failures:
            raise job.failures[0]

    def _of_this_process(self) -> "_Helpers":
        process = os.getpid()
        helpers = self._helpers.get(process)
        if helpers is None:
            helpers = self._helpers.setdefault(process, _Helpers())
            weakref.finalize(self, helpers.stop)
        return helpers


class _Job(Generic[Range]):
    """A function and the ranges that are left; an iterator of a list gives each to one thread (under the GIL)."""

    def __init__(self, function: Callable[[Range], None], ranges: Sequence[Range]) -> None:
        self._function = function
        self._left: Iterator[Range] = iter(list(ranges))
        self.failures: list[BaseException] = []

    def work(self) -> None:
        """Call the function for ranges until none is left."""
        for part in self._left:
            try:
                self._function(part)
            except BaseException as failure:  # raised by `run`, in the caller's thread
                self.failures.append(failure)

    def end(self) -> None:
        """Leave no range to anybody."""
        for _ in self._left:
            pass


class _Helper:
    """One thread, and what the caller knows about it."""

    def __init__(self, helpers: "_Helpers") -> None:
        self.job: _Job[Any] | None = None  # in work
        self._awake = threading.Lock()  # held while there is nothing new
        self._awake.acquire()
        self._thread = threading.Thread(target=self._serve, args=(helpers,), name="hvd-qoda", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the thread look for a job; by one thread at a time."""
        if self._awake.locked():
            self._awake.release()

    def join(self) -> None:
        """Wait for the thread's end, which `_Helpers.stop` has asked for."""
        if self._thread is not threading.current_thread():
            self._thread.join(_SECONDS_TO_STOP)

    def _serve(self, helpers: "_Helpers") -> None:
        watch = _watcher()
        while True:
            watch(helpers.address, helpers.jobs, _WATCHES)
            self._awake.acquire()
            if helpers.is_stopped:
                return
            # The caller looks at self.job only when no range is left: who comes here later finds none.
            self.job = helpers.job
            if self.job is not None:
                self.job.work()
            self.job = None
            helpers.ends[0] += np.uint32(1)


class _Helpers:
    """The helping threads of one process."""

    def __init__(self) -> None:
        self.is_taken = threading.Lock()
        self.job: _Job[Any] | None = None
        self.is_stopped = False
        self._threads: list[_Helper] = []
        self._counters = np.zeros(32, dtype=np.uint32)  # jobs and ends, in different lines of the cache
        self.address = self._counters.ctypes.data
        self.ends = self._counters[16:]
        self._ends_address = self.ends.ctypes.data

    @property
    def jobs(self) -> int:
        """Number of jobs so far, modulo 2^32."""
        return int(self._counters[0])

    def work(self, job: _Job[Any], count: int) -> None:
        """Do a job together with so many helpers; by one thread at a time."""
        while len(self._threads) < count:
            self._threads.append(_Helper(self))
        self.job = job
        try:
            for helper in self._threads[:count]:
                helper.wake()
            self._counters[0] += np.uint32(1)
            job.work()
        finally:
            job.end()
            self._wait(job)
            self.job = None

    def stop(self) -> None:
        """End the threads."""
        self.is_stopped = True
        self._counters[0] += np.uint32(1)
        for helper in self._threads:
            helper.wake()
        for helper in self._threads:
            helper.join()

    def _wait(self, job: _Job[Any]) -> None:
        """Wait until nobody works on a job of which nothing is left, however often the user interrupts."""
        looks = 0
        while True:
            try:
                ends = int(self.ends[0])
                if all(helper.job is not job for helper in self._threads):
                    return
                looks += 1
                if looks > _LOOKS_BEFORE_SLEEP:
                    time.sleep(_SECONDS_OF_SLEEP)
                else:
                    _watcher()(self._ends_address, ends, _WATCHES)
            except KeyboardInterrupt as failure:
                job.failures.append(failure)


_LOCAL_SIZES = ("HOROVOD_LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_SECONDS_TO_STOP = 1.0
_SECONDS_OF_SLEEP = 5e-5
_LOOKS_BEFORE_SLEEP = 10  # waking from sleep takes as long
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_DELAY = 200 if _IS_X86 else 4000
_WATCHES = 1000 if _IS_X86 else 20_000  # some tens of microseconds: x86 pauses for 10 to 45 ns


def _usable_processors() -> int:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(float(found), _processor_quota(_CONTROL_GROUPS))))


def _processor_quota(root: Path) -> float:
    """Processors that the control group mounted here may use (version 2 or 1); infinite where it has no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = [word for name in names for word in (root / name).read_text().split()]
            quota, period = (float(word) for word in words)
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return math.inf


@intrinsic
def _load(context: Any, address: Any) -> tuple[Signature, Callable[..., Any]]:
    """The uint32 at an address, read anew every time; then a short pause for the benefit of a core's other thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        found = builder.load_atomic(place, "acquire", 4)
        if _IS_X86:
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), pause), [])
        return found

    return types.uint32(types.uint64), generate


@njit(nogil=True, cache=True)
def _watch(address: np.uint64, known: np.uint32, times: int) -> None:
    """Return when the uint32 at an address is no longer the known one, or after so many looks at it."""
    for _ in range(times):
        if _load(address) != known:
            for _ in range(_DELAY):  # the caller has the GIL until its kernel runs; to wait for it would be to sleep
                _load(address)
            return


@cache
def _watcher() -> Callable[[int, int, int], None]:
    """Kernel `_watch`, compiled; it releases the GIL."""
    signature = types.void(types.uint64, types.uint32, types.int64)
    _watch.compile(signature)
    function: Callable[[int, int, int], None] = _watch.get_overload(signature)
    return function
