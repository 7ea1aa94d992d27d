"""The transport over Horovod by itself."""

import time

import horovod.torch as hvd
import pytest
import torch

from hvd_qoda.errors import ExchangeTimeoutError, RankMismatchError
from hvd_qoda.horovod import HorovodTransport
from tests.launcher import RankPool


def numbered(length: int, value: int) -> torch.Tensor:
    return torch.full((length,), value, dtype=torch.uint8)


def unequal_lengths_as_expected() -> None:
    """Messages and shares of different sizes, some of them empty."""
    transport = HorovodTransport(timeout_s=20.0)
    rank, size = transport.rank, transport.size
    lengths = [0, 5, 300, 7]
    received = transport.start_all_gather(numbered(lengths[rank], rank), lengths, "gather").wait()
    assert [part.tolist() for part in received] == [[k] * lengths[k] for k in range(size)]
    # Rank k sends rank j a share of k * j bytes of value 10 k + j.
    shares = [numbered(rank * j, 10 * rank + j) for j in range(size)]
    receive = [k * rank for k in range(size)]
    handle = transport.start_all_to_all(torch.cat(shares), [len(s) for s in shares], receive, "exchange")
    assert [part.tolist() for part in handle.wait()] == [[10 * k + rank] * (k * rank) for k in range(size)]
    assert transport.meter.traffic.sent["all_gather"] == 3 * lengths[rank]
    assert transport.meter.traffic.sent["all_to_all"] == sum(len(s) for s in shares) - rank * rank


def test_messages_of_different_sizes(four_ranks: RankPool) -> None:
    four_ranks.run(unequal_lengths_as_expected)


def unexpected_lengths() -> list[str]:
    """Horovod gathers unequal sizes without a word."""
    transport = HorovodTransport(timeout_s=20.0)
    rank, size = transport.rank, transport.size
    gather = transport.start_all_gather(numbered(6 if rank == 1 else 5, rank), [5] * size, "unequal")
    with pytest.raises(RankMismatchError) as gathered:
        gather.wait()
    sends = [4, 4] if rank == 1 else [5, 3]  # eight bytes altogether, but not as expected
    exchange = transport.start_all_to_all(numbered(8, rank), sends, [4, 4], "unequal")
    with pytest.raises(RankMismatchError) as exchanged:
        exchange.wait()
    return [str(gathered.value), str(exchanged.value)]


def test_horovod_unequal_all_gather_sizes_do_not_pass_silently(two_ranks: RankPool) -> None:
    for rank, (gathered, exchanged) in enumerate(two_ranks.run(unexpected_lengths)):
        assert f"rank {rank}: all-gather 'unequal' brought 11 bytes, expected [5, 5]" in gathered
        assert f"rank {rank}: all-to-all 'unequal' brought [{'5, 4' if rank == 0 else '3, 4'}] bytes" in exchanged


def deadline() -> float:
    transport = HorovodTransport(timeout_s=1.0)
    seconds = 0.0
    message = numbered(3, 1)
    if hvd.rank() == 0:
        handle = transport.start_all_gather(message, [3, 3], "late")
        begin = time.monotonic()
        with pytest.raises(ExchangeTimeoutError, match=r"rank 0: all-gather 'late' among the ranks \(0, 1\)"):
            handle.wait()
        seconds = time.monotonic() - begin
    hvd.barrier()
    if hvd.rank() != 0:
        handle = transport.start_all_gather(message, [3, 3], "late")
    transport.timeout_s = 20.0
    assert len(handle.wait()) == 2  # it can be waited for again
    return seconds


def test_waits_end_at_the_deadline(two_ranks: RankPool) -> None:
    assert 1.0 <= two_ranks.run(deadline)[0] < 5.0


def roll_call() -> None:
    """What is started leaves only after every rank has answered, and then in any order of waiting."""
    transport = HorovodTransport(timeout_s=20.0)
    transport.require_roll_call("roll call")
    handles = [transport.start_all_gather(numbered(2, k), [2, 2], f"after roll call {k}") for k in range(3)]
    for k, handle in reversed(list(enumerate(handles))):
        assert [part.tolist() for part in handle.wait()] == [[k, k], [k, k]]
    assert transport.meter.traffic.calls == {"all_reduce": 1, "all_gather": 3}


def test_roll_call_holds_back_and_releases(two_ranks: RankPool) -> None:
    two_ranks.run(roll_call)


def ranks_of_a_set() -> tuple[int, ...]:
    chosen = hvd.add_process_set([1, 3])
    try:
        if not chosen.included():
            with pytest.raises(RankMismatchError, match=r"not in the compressor's process set \[1, 3\]"):
                HorovodTransport(chosen)
            return ()
        transport = HorovodTransport(chosen, timeout_s=20.0)
        transport.require_roll_call("not needed here")
        received = transport.start_all_gather(numbered(1, hvd.rank()), [1, 1], "set").wait()
        assert [part.item() for part in received] == [1, 3]
        return (transport.rank, transport.size, *transport.ranks)
    finally:
        hvd.barrier()
        hvd.remove_process_set(chosen)


def test_process_set(four_ranks: RankPool) -> None:
    assert four_ranks.run(ranks_of_a_set) == [(), (0, 2, 1, 3), (), (1, 2, 1, 3)]
