"""The threads that run kernels: all ranges, errors, forks, and how many there are."""

import os
import threading
import time
from pathlib import Path

import pytest

from qoda_kernels import worker_threads
from qoda_kernels.errors import QodaError, ThreadCountError
from qoda_kernels.worker_threads import WorkerThreads, allotted_threads


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_range_is_run_once(count: int) -> None:
    threads = WorkerThreads(count)
    for length in (0, 1, 2, 3, 17):
        seen: list[int] = []
        threads.run(seen.append, range(length))
        assert sorted(seen) == list(range(length))


def test_no_threads_at_all_is_an_error_of_ours() -> None:
    with pytest.raises(ThreadCountError, match="at least 1 thread") as caught:
        WorkerThreads(0)
    assert isinstance(caught.value, QodaError)


def test_ranges_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)
    WorkerThreads(3).run(lambda _: together.wait(), range(3))
    assert not together.broken


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_error_in_any_range_is_raised_after_all_have_ended(bad: int) -> None:
    ended = []

    def work(index: int) -> None:
        if index == bad:
            raise ValueError(f"range {index}")
        ended.append(index)

    with pytest.raises(ValueError, match=f"range {bad}"):
        WorkerThreads(3).run(work, range(3))
    assert len(ended) == 2


def test_threads_work_in_a_forked_child_and_from_several_threads() -> None:
    threads = WorkerThreads(2)
    threads.run(lambda _: None, range(2))
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        threads.run(seen.append, range(4))
        os._exit(0 if sorted(seen) == [0, 1, 2, 3] else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0

    totals = [0] * 4

    def caller(index: int) -> None:
        for _ in range(50):
            found: list[int] = []
            threads.run(found.append, range(5))
            totals[index] += sum(found)

    callers = [threading.Thread(target=caller, args=(index,)) for index in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join(timeout=30)
    assert totals == [500] * 4


def test_a_slow_range_does_not_keep_the_others_waiting() -> None:
    threads = WorkerThreads(2)
    slow, others = threading.Event(), []

    def work(index: int) -> None:
        if index == 0:
            assert slow.wait(timeout=20)
            return
        others.append(index)
        if len(others) == 7:
            slow.set()

    threads.run(work, range(8))
    assert sorted(others) == list(range(1, 8))


def test_many_jobs_in_a_row_and_with_pauses_are_complete_when_they_return() -> None:
    threads = WorkerThreads(3)
    for number in range(300):
        seen: list[int] = []
        threads.run(seen.append, range(6))
        assert len(seen) == 6
        if number % 50 == 0:
            time.sleep(0.002)


def test_helpers_end_with_their_owner() -> None:
    threads = WorkerThreads(2)
    before = threading.active_count()
    threads.run(lambda _: time.sleep(0.01), range(2))
    assert threading.active_count() == before + 1
    del threads
    assert threading.active_count() == before


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
