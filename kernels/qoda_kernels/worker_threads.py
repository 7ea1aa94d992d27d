"""A few threads that run kernels on ranges of buckets.

Kernels release the GIL, and buckets do not depend on each other, so a message is cut into runs of whole buckets and the
result is the same for any number of threads. Numba's own threading is not used: its layers abort when two Python
threads use them, or spin, or do not survive a fork.

The work takes tens of microseconds, and so does waking a thread, or waiting for the GIL. So a message is one compiled
call, the calling thread begins at once, and every thread takes the next range by an atomic addition when done with one:
a thread that comes late takes fewer. After its last range a helping thread watches for more for some tens of
microseconds before it sleeps, because a step's messages often come in a row; between steps nobody uses the processor.
It sleeps at a semaphore and never enters Python, for then it would have to be woken twice: for the job, and when the
caller lets go of the GIL. Nothing waits for a helper that has not begun.

A helper keeps off the processor that the caller runs on: Linux likes to wake a thread where the waking one runs,
and then each keeps the other from running.
"""

import contextlib
import ctypes
import math
import os
import platform
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from qoda_kernels.compilation import cached_kernel
from qoda_kernels.errors import KernelError, ThreadCountError


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


@dataclass(frozen=True)
class Task:
    """Compiled functions that any thread may call without the GIL: one for every index, and one that ends the job.

    Attributes:
        address: of the machine code of (context: uint64, index: int64) -> uint64, with Numba's calling convention.
        ending: likewise of (context: uint64, results: uint64, count: int64) -> uint64, which gets the address of the
            results in order; its own result is the job's.
        owners: keep the machine code.
    """

    address: int
    ending: int
    owners: tuple[Any, ...]


def compiled_task(function: Any, ending: Any = None) -> Task:
    """The task of functions of `numba.njit`, which must not use Python objects; they may raise.

    Args:
        function: (context, index).
        ending: (context, results, count); by default the sum of the results, modulo 2^64.
    """
    last = _total if ending is None else ending
    return Task(_compiled(function, _TASK), _compiled(last, _ENDING), (function, last))


class WorkerThreads:
    """Runs a task for several indices at once; the calling thread takes part.

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

    def run(self, task: Task, context: bytes, count: int) -> int:
        """Call the task for every index below a count, in any order, then its ending; returns when that has ended.

        Args:
            task: what to call.
            context: bytes of any meaning; the task gets their address.
            count: number of indices.

        Returns:
            What the ending returns.

        Raises:
            KernelError: when a call failed, such as for want of memory; the others are made all the same.
        """
        if self.count > 1 and count > 1:
            helpers = self._of_this_process()
            if helpers.is_taken.acquire(blocking=False):
                try:
                    return helpers.work(task, context, count, self.count)
                finally:
                    helpers.is_taken.release()
        return _worker()(0, 1, task.address, task.ending, context, count, 0)

    def _of_this_process(self) -> "_Helpers":
        process = os.getpid()
        helpers = self._helpers.get(process)
        if helpers is None:
            helpers = self._helpers.setdefault(process, _Helpers())
            weakref.finalize(self, helpers.stop)
        return helpers


def _serve(words: npt.NDArray[np.uint64], place: int, looks: int) -> None:
    """What a helping thread does; it keeps the memory that it watches, whoever else lets go of it."""
    _server()(words.ctypes.data, place, looks)


class _Helpers:
    """The helping threads of one process."""

    def __init__(self) -> None:
        self.is_taken = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._words = np.zeros(_HELPERS_WORDS, dtype=np.uint64)
        self._address = self._words.ctypes.data
        self._semaphore = ctypes.c_void_p(self._address + _WORD_BYTES * _SEMAPHORE)
        self._avoided: int | None = None
        if _libc().sem_init(self._semaphore, 0, 0) != 0:
            raise KernelError("this system has no semaphores for the threads that help to code: set OMP_NUM_THREADS=1")

    def work(self, task: Task, context: bytes, count: int, threads: int) -> int:
        """Do a job with so many threads; by one caller at a time."""
        work, looks = _worker(), _looks_of_watch()
        while len(self._threads) < threads - 1:
            place = len(self._threads) + 1
            thread = threading.Thread(target=_serve, args=(self._words, place, looks), name="hvd-qoda", daemon=True)
            thread.start()
            self._threads.append(thread)
        if _HAS_AFFINITY:
            self._leave_to_caller(_libc().sched_getcpu())
        return work(self._address, threads, task.address, task.ending, context, count, looks)

    def stop(self) -> None:
        """End the threads."""
        self._words[_IS_STOPPED] = 1
        for _ in self._threads:
            _libc().sem_post(self._semaphore)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_SECONDS_TO_STOP)

    def _leave_to_caller(self, processor: int) -> None:
        """Let the helpers run elsewhere: a thread is often woken where the one that wakes it runs, and in its way."""
        if processor == self._avoided:
            return
        self._avoided = processor
        others = os.sched_getaffinity(os.getpid()) - {processor}
        for thread in self._threads if others else []:
            with contextlib.suppress(OSError):  # a host that forbids it: the thread helps less often
                os.sched_setaffinity(thread.native_id or 0, others)


_LOCAL_SIZES = ("HOROVOD_LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_SECONDS_TO_STOP = 1.0
_HAS_AFFINITY = hasattr(os, "sched_setaffinity")
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_SECONDS_OF_WATCH = 6e-5
_TRIAL_LOOKS = 2000
_TRIALS = 5

# Fields of the memory that the threads of a process share, uint64 each, by lines of the cache.
_JOBS = 0  # number of jobs so far
_JOB = 1  # address of the present one; 0 when there is none to begin
_IS_STOPPED = 2  # 1 when the helpers are to end
_ACTIVE = 8  # helpers that may be in a job
_ASLEEP = 9  # helpers that have gone to sleep, or are about to, since somebody was last woken
_SEMAPHORE = 16  # a sem_t, where they sleep
_HELPERS_WORDS = 32
_WORD_BYTES = 8

# Fields of a job, likewise.
_RESULTS = 0  # their address
_FAILURES = 1  # number of calls that failed
_FUNCTION = 2
_CONTEXT = 3
_COUNT = 4
_THREADS = 5
_TAKEN = 8  # how many indices of each thread's run are taken, one line of the cache each
_LINE = 8

_TASK = types.uint64(types.uint64, types.int64)
_ENDING = types.uint64(types.uint64, types.uint64, types.int64)
_BYTES = types.Bytes(types.uint8, 1, "C", readonly=True)


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


def _place(builder: Any, arguments: Any) -> Any:
    """Pointer to a uint64, given its structure's address and its number."""
    word = ir.IntType(64)
    address = builder.add(arguments[0], builder.mul(arguments[1], word(8)))
    return builder.inttoptr(address, word.as_pointer())


@intrinsic
def _load(context: Any, address: Any, field: Any) -> tuple[Signature, Callable[..., Any]]:
    """The uint64 in a field, read anew every time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_place(builder, arguments), "seq_cst", 8)

    return types.uint64(types.uint64, types.int64), generate


def _exchanging(operation: str) -> Callable[..., tuple[Signature, Callable[..., Any]]]:
    def typing(context: Any, address: Any, field: Any, value: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.atomic_rmw(operation, _place(builder, arguments), arguments[2], "seq_cst")

        return types.uint64(types.uint64, types.int64, types.uint64), generate

    return typing


_add = intrinsic(_exchanging("add"))  # (address, field, value): add to a field; returns what was there
_store = intrinsic(_exchanging("xchg"))  # likewise, replace


@intrinsic
def _pause(context: Any) -> tuple[Signature, Callable[..., Any]]:
    """Wait some nanoseconds, for the benefit of a core's other thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_X86:
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), pause), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _call(context: Any, function: Any, job_context: Any, index: Any, job: Any) -> tuple[Signature, Callable[..., Any]]:
    """Call a task by its address; 0 for a failure, which is counted in the job."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        convention, word = context.call_conv, ir.IntType(64)
        kind = convention.get_function_type(_TASK.return_type, _TASK.args)
        pointer = builder.inttoptr(arguments[0], kind.as_pointer())
        status, result = convention.call_function(builder, pointer, _TASK.return_type, _TASK.args, arguments[1:3])
        failed = builder.zext(status.is_error, word)
        builder.atomic_rmw("add", _place(builder, (arguments[3], word(_FAILURES))), failed, "seq_cst")
        return builder.select(status.is_error, word(0), result)

    return types.uint64(types.uint64, types.uint64, types.int64, types.uint64), generate


def calls(signature: Signature) -> Callable[..., Any]:
    """A function (address, arguments) for kernels: calls a compiled kernel of the signature; errors go on upwards."""

    @intrinsic
    def call(context: Any, address: Any, arguments: Any) -> tuple[Signature, Callable[..., Any]]:
        def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
            convention = context.call_conv
            function = convention.get_function_type(signature.return_type, signature.args)
            pointer = builder.inttoptr(values[0], function.as_pointer())
            unpacked = cgutils.unpack_tuple(builder, values[1])
            status, result = convention.call_function(builder, pointer, signature.return_type, signature.args, unpacked)
            with cgutils.if_unlikely(builder, status.is_error):
                convention.return_status_propagate(builder, status)
            return result

        return signature.return_type(types.uint64, types.Tuple(signature.args)), generate

    return call


_call_ending = calls(_ENDING)
_yield_processor = types.ExternalFunction("sched_yield", types.int32())
_sleep_at = types.ExternalFunction("sem_wait", types.int32(types.uint64))
_wake_one = types.ExternalFunction("sem_post", types.int32(types.uint64))


@intrinsic
def _address_of(context: Any, data: Any) -> tuple[Signature, Callable[..., Any]]:
    """Address of the first of some bytes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        begin = context.make_helper(builder, signature.args[0], arguments[0]).data
        return builder.ptrtoint(begin, ir.IntType(64))

    return types.uint64(data), generate


@cached_kernel
def _total(context: np.uint64, results: np.uint64, count: int) -> np.uint64:
    """An ending: the sum of the results, modulo 2^64."""
    total = np.uint64(0)
    for index in range(count):
        total += _load(results, index)
    return total


@cached_kernel
def _take_part(job: np.uint64, place: int) -> None:
    """Call a job's task for the indices of a thread's own run, then of the others' runs, that nobody has taken."""
    function, context, results = _load(job, _FUNCTION), _load(job, _CONTEXT), _load(job, _RESULTS)
    count, threads = np.int64(_load(job, _COUNT)), np.int64(_load(job, _THREADS))
    for other in range(threads):
        run = (place + other) % threads
        begin, end = count * run // threads, count * (run + 1) // threads
        taken = _TAKEN + _LINE * run
        index = begin + np.int64(_add(job, taken, np.uint64(1)))
        while index < end:
            _store(results, index, _call(function, context, index, job))
            index = begin + np.int64(_add(job, taken, np.uint64(1)))


@cached_kernel
def _work(
    helpers: np.uint64,
    threads: int,
    function: np.uint64,
    ending: np.uint64,
    context: bytes,
    count: int,
    most_looks: int,
) -> np.uint64:
    """Do a job; returns what its ending returns.

    Args:
        helpers: address of the memory that is shared with the helpers; not read with one thread.
        threads: number of runs that the indices are cut into: of helpers and the caller.
        function: address of the task.
        ending: address of its ending.
        context: the task's context.
        count: number of indices.
        most_looks: how often to look in a row whether the helpers have ended before other processes may run.
    """
    memory = np.zeros(_TAKEN + _LINE * threads + count, dtype=np.uint64)
    job = np.uint64(memory.ctypes.data)
    results = job + np.uint64(_WORD_BYTES * (_TAKEN + _LINE * threads))
    memory[_RESULTS] = results
    memory[_FUNCTION] = function
    memory[_CONTEXT] = _address_of(context)
    memory[_COUNT] = np.uint64(count)
    memory[_THREADS] = np.uint64(threads)
    if threads == 1:
        _take_part(job, 0)
    else:
        _store(helpers, _JOB, job)
        _add(helpers, _JOBS, np.uint64(1))
        # A helper says that it falls asleep, then looks for jobs; here in the other order: nobody sleeps through one.
        for _ in range(_store(helpers, _ASLEEP, np.uint64(0))):
            _wake_one(helpers + np.uint64(_WORD_BYTES * _SEMAPHORE))
        _take_part(job, 0)
        # A helper says that it is active, then looks for a job; here in the other order: who comes now finds none.
        _store(helpers, _JOB, np.uint64(0))
        looks = 0
        while _load(helpers, _ACTIVE) != np.uint64(0):
            looks += 1
            if looks > most_looks:  # the helper may be waiting for this processor
                _yield_processor()
            else:
                _pause()
    if memory[_FAILURES] != np.uint64(0):
        raise KernelError("a kernel of the codec failed: there was no memory for its scratch space; free some")
    result = _call_ending(ending, (memory[_CONTEXT], results, count))
    memory[_RESULTS] = np.uint64(0)  # used last, for Numba frees an array after its last use
    return result


@cached_kernel
def _watch(helpers: np.uint64, known: np.uint64, most_looks: int) -> bool:
    """Whether a job comes after the known number of them, or the helpers are stopped, within so many looks."""
    for _ in range(most_looks):
        _pause()
        if _load(helpers, _JOBS) != known or _load(helpers, _IS_STOPPED) != np.uint64(0):
            return True
    return False


@cached_kernel
def _help(helpers: np.uint64, place: int, most_looks: int) -> None:
    """Take part in jobs until the helpers are stopped.

    Args:
        helpers: address of the shared memory.
        place: number of this helper, from 1.
        most_looks: for how many looks to watch for the next job before sleeping.
    """
    known = np.uint64(0)
    while _load(helpers, _IS_STOPPED) == np.uint64(0):
        jobs = _load(helpers, _JOBS)
        if jobs != known:
            known = jobs
            _add(helpers, _ACTIVE, np.uint64(1))
            job = _load(helpers, _JOB)
            if job != np.uint64(0):
                _take_part(job, place)
            _add(helpers, _ACTIVE, np.uint64(2**64 - 1))
        elif not _watch(helpers, known, most_looks):
            _add(helpers, _ASLEEP, np.uint64(1))
            if _load(helpers, _JOBS) == known:
                _sleep_at(helpers + np.uint64(_WORD_BYTES * _SEMAPHORE))


def _compiled(function: Any, signature: Signature) -> int:
    """Address of the machine code of a function of `numba.njit`, which keeps it."""
    function.compile(signature)
    compiled = function.overloads[signature.args]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return address


@cache
def _worker() -> Callable[..., int]:
    """Function `_work`, compiled; it releases the GIL."""
    word, number = types.uint64, types.int64
    signature = word(word, number, word, word, _BYTES, number, number)
    _work.compile(signature)
    function: Callable[..., int] = _work.get_overload(signature)
    return function


@cache
def _server() -> Callable[[int, int, int], None]:
    """Function `_help`, compiled; it releases the GIL."""
    signature = types.void(types.uint64, types.int64, types.int64)
    _help.compile(signature)
    function: Callable[[int, int, int], None] = _help.get_overload(signature)
    return function


@cache
def _watcher() -> Callable[[int, int, int], bool]:
    """Function `_watch`, compiled; it releases the GIL."""
    signature = types.boolean(types.uint64, types.uint64, types.int64)
    _watch.compile(signature)
    function: Callable[[int, int, int], bool] = _watch.get_overload(signature)
    return function


@cache
def _looks_of_watch() -> int:
    """How many looks of a watching thread take _SECONDS_OF_WATCH; a pause takes 10 to 50 ns, as the processor likes."""
    nobody = np.zeros(_HELPERS_WORDS, dtype=np.uint64)
    seconds = []
    for _ in range(_TRIALS):
        begin = time.perf_counter()
        _watcher()(nobody.ctypes.data, 0, _TRIAL_LOOKS)
        seconds.append(time.perf_counter() - begin)
    return max(1, round(_SECONDS_OF_WATCH / min(seconds) * _TRIAL_LOOKS))


@cache
def _libc() -> ctypes.PyDLL:
    """The C library of this process; its functions are called with the GIL, for they take less time than it does."""
    return ctypes.PyDLL(None)
