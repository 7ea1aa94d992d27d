"""The threads that run kernels: all ranges, errors, forks, and how many there are."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from numba import carray, njit, types

from qoda_kernels import worker_threads
from qoda_kernels.errors import KernelError, QodaError, ThreadCountError
from qoda_kernels.tasks import words_pointer
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads, compiled_task

pytestmark = pytest.mark.timed

SLEEP = types.ExternalFunction("usleep", types.int32(types.uint32))
LONG = 2000  # naps of a millisecond: what is waited for has failed
ATTEMPTS = 5  # a job that comes while a helper falls asleep goes without it


@njit(nogil=True)
def count_call(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    """Count the call in the context's word of the index; the result is the index."""
    carray(words_pointer(context), (index + 1,), np.uint64)[index] += np.uint64(1)
    return np.uint64(index)


@njit(nogil=True)
def meet(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    """Wait until the first call of every thread has begun; the result is 1 where it came to that."""
    words = carray(words_pointer(context), (3,), np.uint64)
    words[index] = np.uint64(1)
    for _ in range(LONG):
        if words[0] + words[1] + words[2] == np.uint64(3):
            return np.uint64(1)
        SLEEP(np.uint32(1000))
    return np.uint64(0)


@njit(nogil=True)
def fail_once(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    """Fail for the index in the context's first word; count the other calls behind it."""
    words = carray(words_pointer(context), (index + 2,), np.uint64)
    if words[0] == np.uint64(index):
        raise MemoryError("no memory")
    words[index + 1] += np.uint64(1)
    return np.uint64(0)


@njit(nogil=True)
def wait_for_others(context, index):  # type: ignore[no-untyped-def]  # Numba infers
    """The first call waits for the seven others; the result is 1 where it has seen them."""
    words = carray(words_pointer(context), (8,), np.uint64)
    if index > 0:
        words[index] = np.uint64(1)
        return np.uint64(0)
    for _ in range(LONG):
        if words[1:].sum() == np.uint64(7):
            return np.uint64(1)
        SLEEP(np.uint32(1000))
    return np.uint64(0)


def zeros(count: int) -> npt.NDArray[np.uint64]:
    return np.zeros(count, dtype=np.uint64)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_index_is_called_once_and_the_results_are_summed(count: int) -> None:
    threads, task = WorkerThreads(count), compiled_task(count_call)
    for length in (0, 1, 2, 3, 17):
        seen = zeros(length)
        assert threads.run(task, seen, length) == length * (length - 1) // 2
        assert seen.tolist() == [1] * length


def test_no_threads_at_all_is_an_error_of_ours() -> None:
    with pytest.raises(ThreadCountError, match="at least 1 thread") as caught:
        WorkerThreads(0)
    assert isinstance(caught.value, QodaError)


def test_calls_run_at_the_same_time() -> None:
    threads = WorkerThreads(3)
    assert 3 in (threads.run(compiled_task(meet), zeros(3), 3) for _ in range(ATTEMPTS))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_failure_of_any_call_is_raised_after_all_have_ended(count: int, bad: int) -> None:
    words = zeros(4)
    words[0] = bad
    with pytest.raises(KernelError, match="a kernel of the codec failed") as caught:
        WorkerThreads(count).run(compiled_task(fail_once), words, 3)
    assert isinstance(caught.value, QodaError)
    assert words[1:].tolist() == [int(index != bad) for index in range(3)]


def test_threads_work_in_a_forked_child_and_from_several_threads() -> None:
    threads, task = WorkerThreads(2), compiled_task(count_call)
    threads.run(task, zeros(2), 2)
    child = os.fork()
    if child == 0:
        seen = zeros(4)
        threads.run(task, seen, 4)
        os._exit(0 if seen.tolist() == [1] * 4 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0

    totals = [0] * 4

    def caller(index: int) -> None:
        for _ in range(50):
            totals[index] += threads.run(task, zeros(5), 5)

    callers = [threading.Thread(target=caller, args=(index,)) for index in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join(timeout=30)
    assert totals == [500] * 4


def test_a_slow_call_does_not_keep_the_others_waiting() -> None:
    threads = WorkerThreads(2)
    assert 1 in (threads.run(compiled_task(wait_for_others), zeros(8), 8) for _ in range(ATTEMPTS))


def test_many_jobs_in_a_row_and_with_pauses_are_complete_when_they_return() -> None:
    threads, task = WorkerThreads(3), compiled_task(count_call)
    for number in range(300):
        seen = zeros(6)
        threads.run(task, seen, 6)
        assert seen.tolist() == [1] * 6
        if number % 50 == 0:
            time.sleep(0.002)


def test_helpers_end_with_their_owner() -> None:
    threads = WorkerThreads(2)
    before = threading.active_count()
    threads.run(compiled_task(count_call), zeros(2), 2)
    assert threading.active_count() == before + 1
    del threads
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be kept off a processor here")
def test_a_helper_that_is_woken_keeps_off_the_callers_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1024)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, processors: moved.append(processors))
    threads, task = WorkerThreads(2), compiled_task(count_call)
    for _ in range(LONG):
        threads.run(task, zeros(2), 2)
        time.sleep(0.001)
        if moved:
            break
    assert len(moved[0]) == 1023


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_the_quota_of_a_control_group_counts(files: dict[str, str], wanted: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert worker_threads._processor_quota(tmp_path) == wanted


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1", "HOROVOD_LOCAL_SIZE": "8"}, 2),
        ({"HOROVOD_LOCAL_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"OMP_NUM_THREADS": "", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 4),
    ],
)
def test_threads_follow_the_hosts_allotment(
    environ: dict[str, str], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_threads, "_usable_processors", lambda: 8)
    assert allotted_threads(environ) == wanted
