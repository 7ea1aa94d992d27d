"""The transport over torch.distributed's process groups, among real processes with gloo."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hvd_qoda.agreement import check_agreement
from hvd_qoda.errors import ConfigError, ExchangeTimeoutError, RankLostError, RankMismatchError
from hvd_qoda.exchange import PendingExchanges, Stamp
from hvd_qoda.schemes import make_exchange
from hvd_qoda.torch_distributed import TorchTransport
from hvd_qoda.transport import all_gather_array
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from tests.launcher import RankPool


def numbered(length: int, value: int) -> torch.Tensor:
    return torch.full((length,), value, dtype=torch.uint8)


def unequal_lengths_as_expected() -> None:
    """Messages and shares of different sizes, some of them empty."""
    transport = TorchTransport(timeout_s=20.0)
    rank, size = transport.rank, transport.size
    lengths = [0, 5, 300, 7]
    received = transport.start_all_gather(numbered(lengths[rank], rank), lengths, "gather").wait()
    assert [part.tolist() for part in received] == [[k] * lengths[k] for k in range(size)]
    # Rank k sends rank j a share of k * j bytes of value 10 k + j.
    shares = [numbered(rank * j, 10 * rank + j) for j in range(size)]
    receive = [k * rank for k in range(size)]
    handle = transport.start_all_to_all(torch.cat(shares), [len(s) for s in shares], receive, "exchange")
    assert [part.tolist() for part in handle.wait()] == [[10 * k + rank] * (k * rank) for k in range(size)]
    assert transport.meter.traffic.sent["all_gather"] == 3 * 300  # padded to the longest
    assert transport.meter.traffic.sent["all_to_all"] == sum(len(s) for s in shares) - rank * rank
    nothing = transport.start_all_gather(numbered(0, 0), [0] * size, "empty").wait()
    assert [part.numel() for part in nothing] == [0] * size


def test_messages_of_different_sizes(four_ranks: RankPool) -> None:
    four_ranks.run(unequal_lengths_as_expected)


def several_under_way() -> None:
    """Waited for in another order than started."""
    transport = TorchTransport(timeout_s=20.0)
    rank, size = transport.rank, transport.size
    gathers = [transport.start_all_gather(numbered(2, 10 * k + rank), [2] * size, f"{k}") for k in range(4)]
    swaps = [
        transport.start_all_to_all(numbered(size, 10 * k + rank), [1] * size, [1] * size, f"{k}") for k in range(4)
    ]
    for k in (2, 0, 3, 1):
        assert [part.tolist() for part in gathers[k].wait()] == [[10 * k + j] * 2 for j in range(size)]
        assert [part.tolist() for part in swaps[k].wait()] == [[10 * k + j] for j in range(size)]
    array = all_gather_array(transport, np.array([[rank, 0.5]]), "array")
    assert array.tolist() == [[[j, 0.5]] for j in range(size)]


def test_several_collectives_under_way(two_ranks: RankPool) -> None:
    two_ranks.run(several_under_way)


def deadline() -> float:
    transport = TorchTransport(timeout_s=1.0)
    message = numbered(3, 1)
    seconds = 0.0
    if transport.rank == 0:
        handle = transport.start_all_gather(message, [3, 3], "late")
        begin = time.monotonic()
        with pytest.raises(ExchangeTimeoutError, match=r"rank 0: all-gather 'late' among the ranks \(0, 1\)"):
            handle.wait()
        seconds = time.monotonic() - begin
    else:
        time.sleep(1.5)
        handle = transport.start_all_gather(message, [3, 3], "late")
    transport.timeout_s = 20.0
    assert len(handle.wait()) == 2  # it can be waited for again
    return seconds


def test_waits_end_at_the_deadline(two_ranks: RankPool) -> None:
    assert 1.0 <= two_ranks.run(deadline)[0] < 5.0


def ranks_of_a_group() -> tuple[int, ...]:
    chosen, second = dist.new_group([1, 3]), dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        with pytest.raises(RankMismatchError, match="not in the process group"):
            TorchTransport(chosen)
        return ()
    with pytest.raises(ConfigError, match=r"all_to_all_group has the ranks \(0, 1, 2, 3\), group has \(1, 3\)"):
        TorchTransport(chosen, dist.group.WORLD)
    transport = TorchTransport(chosen, second, timeout_s=20.0)
    received = transport.start_all_gather(numbered(1, dist.get_rank()), [1, 1], "group").wait()
    assert [part.item() for part in received] == [1, 3]
    swapped = transport.start_all_to_all(numbered(2, dist.get_rank()), [1, 1], [1, 1], "group").wait()
    assert [part.item() for part in swapped] == [1, 3]
    return (transport.rank, transport.size, *transport.ranks)


def test_process_groups(four_ranks: RankPool) -> None:
    assert four_ranks.run(ranks_of_a_group) == [(), (0, 2, 1, 3), (), (1, 2, 1, 3)]


def wrong_size_of_own_message() -> None:
    transport = TorchTransport()
    with pytest.raises(RankMismatchError, match="to send 4 bytes, and the ranks expect 5"):
        transport.start_all_gather(numbered(4, 0), [5, 5], "short")


def test_own_message_of_a_wrong_size(two_ranks: RankPool) -> None:
    two_ranks.run(wrong_size_of_own_message)


def disagreement() -> str:
    transport = TorchTransport(timeout_s=20.0)
    check_agreement(transport, {"bits": 5})
    with pytest.raises(RankMismatchError) as caught:
        check_agreement(transport, {"bits": 5 + transport.rank, "note": "x" * transport.rank})
    return str(caught.value)


def test_agreement_is_checked_over_it(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(disagreement)
    assert first == second
    assert "bits: 5 on rank 0, 6 on rank 1" in first


def exchanged(scheme: str) -> tuple[bytes, float]:
    """Bits of the mean, and its largest error over the largest gradient."""
    transport = TorchTransport(timeout_s=20.0)
    codebooks = {"w": Codebook.uniform(5, bucket_size=512)}
    plan = MessagePlan.build([Slice("w", 0, 5000, torch.float32, "w", 0)], codebooks)
    exchange = make_exchange(scheme, plan, codebooks, transport, "w")
    generator = torch.Generator().manual_seed(7)
    gradients = [torch.randn(5000, generator=generator) for _ in range(transport.size)]
    pending = PendingExchanges(20.0, "here")
    before = transport.meter.traffic
    exchange.start([gradients[transport.rank]], Stamp(1, 2, 0))
    pending.add(exchange)
    mean = torch.empty(5000)
    pending.finish(exchange, [mean])
    sent = (transport.meter.traffic - before).sent_bytes
    if scheme == "allgather":
        assert sent == exchange.sent_bytes
    else:  # shares differ by a bucket, and are padded
        assert exchange.sent_bytes <= sent <= exchange.sent_bytes + (transport.size - 1) * 512
    error = (mean - torch.stack(gradients).mean(0)).abs().max() / torch.stack(gradients).abs().max()
    return mean.numpy().tobytes(), float(error)


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_exchanges_give_every_rank_the_same_bits(four_ranks: RankPool, scheme: str) -> None:
    outcomes = four_ranks.run(exchanged, scheme)
    assert len({bits for bits, _ in outcomes}) == 1
    assert 0 < outcomes[0][1] < 0.1


def lost_peer() -> str:
    transport = TorchTransport(timeout_s=20.0)
    if transport.rank == 1:
        dist.destroy_process_group()
        return ""
    try:
        transport.start_all_gather(numbered(3, 1), [3, 3], "lost").wait()
    except RankLostError as error:
        return str(error)
    return "nothing was raised"


def test_a_lost_peer_is_an_error_that_says_where() -> None:
    with RankPool(2, host="torch") as ranks:
        told = ranks.run(lost_peer)[0]
    assert "all-gather 'lost' among the ranks (0, 1) failed" in told


def test_without_torch_distributed_initialised() -> None:
    with pytest.raises(ConfigError, match=r"call torch\.distributed\.init_process_group"):
        TorchTransport()
