"""The hierarchical exchange among ranks of one process: exact inside a host, the ordinary exchanges between hosts."""

from collections.abc import Sequence

import pytest
import torch

from hvd_qoda.errors import QodaError, RankMismatchError, UnsupportedError, WireError
from hvd_qoda.exchange import Exchange, Stamp, exchange_by_bytes
from hvd_qoda.hosts import Hosts
from hvd_qoda.schemes import make_exchange
from hvd_qoda.transport import LocalTransport
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

BOOKS = {"body": Codebook.uniform(5, bucket_size=128), "exact": Codebook.exact()}
STAMP = Stamp(seed=3, counter=7, registry_version=1)


def plan_of(*sizes: int, codebook: str = "body", dtype: torch.dtype = torch.float32) -> MessagePlan:
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    slices = [
        Slice(f"p{index}", 0, size, dtype, codebook, offset)
        for index, (size, offset) in enumerate(zip(sizes, offsets, strict=True))
    ]
    return MessagePlan.build(slices, BOOKS)


def hosts_of(hosts: int, local: int) -> Hosts:
    return Hosts(tuple(rank // local for rank in range(hosts * local)))


def values_of(plan: MessagePlan, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s.slice.length, generator=generator).to(s.slice.dtype) for s in plan.segments]


def make_all(plan: MessagePlan, group: InMemoryGroup, hosts: Hosts) -> list[Exchange]:
    return [make_exchange("hierarchical", plan, BOOKS, t, "x", hosts=hosts) for t in group.transports]


def start_all(exchanges: Sequence[Exchange], values: Sequence[list[torch.Tensor]], stamp: Stamp = STAMP) -> None:
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, stamp)
    for _ in range(20):
        if all([exchange.advance() for exchange in exchanges]):
            return
    raise AssertionError("the exchanges do not get on")


def run_round(
    exchanges: Sequence[Exchange], values: Sequence[list[torch.Tensor]], stamp: Stamp = STAMP, scale: float = 1.0
) -> list[list[torch.Tensor]]:
    start_all(exchanges, values, stamp)
    results = []
    for exchange in exchanges:
        out = [torch.full((s.slice.length,), 99.0, dtype=s.slice.dtype) for s in exchange.plan.segments]
        exchange.finish(out, scale)
        results.append(out)
    return results


@pytest.mark.parametrize(("hosts", "local"), [(2, 2), (3, 2), (2, 3), (4, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("size", [300, 500_000])  # from three hosts on, the large one is reduce-scattered between them
def test_result_is_the_ordinary_exchange_of_the_hosts_means(hosts: int, local: int, size: int) -> None:
    plan = plan_of(size, 40)
    where = hosts_of(hosts, local)
    values = [values_of(plan, rank) for rank in range(hosts * local)]
    results = run_round(make_all(plan, InMemoryGroup(hosts * local), where), values, scale=3.0)
    expected = [torch.empty_like(tensor) for tensor in values[0]]
    parts = plan.split(local)
    schemes = {exchange_by_bytes(part, BOOKS, hosts) for part in parts}
    scheme = "allgather" if schemes == {"allgather"} else "reduce_scatter"
    assert scheme == ("reduce_scatter" if size > 300 and hosts > 2 else "allgather")
    for part in parts:
        between = [make_exchange(scheme, part, BOOKS, t, "y") for t in InMemoryGroup(hosts).transports]
        slices = [segment.slice for segment in part.segments]
        means = []
        for host in range(hosts):
            ranks = [rank for rank in range(hosts * local) if where.of[rank] == host]
            picked = [[values[r][int(s.parameter[1])][s.start :][: s.length] for s in slices] for r in ranks]
            sums = [sum(tensors[1:], start=tensors[0]) for tensors in zip(*picked, strict=True)]
            means.append([total * float(torch.tensor(1.0 / local)) for total in sums])
        for piece, found in zip(slices, run_round(between, means)[0], strict=True):
            expected[int(piece.parameter[1])][piece.start : piece.start + piece.length] = found
    for result in results:
        for found, wanted in zip(result, expected, strict=True):
            assert torch.equal(found, wanted * 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_is_unbiased_and_equal_on_all_ranks(dtype: torch.dtype) -> None:
    plan = plan_of(200, dtype=dtype)
    exchanges = make_all(plan, InMemoryGroup(4), hosts_of(2, 2))
    values = [values_of(plan, rank) for rank in range(4)]
    exact = sum(own[0].double() for own in values) / 4
    rounds = []
    for counter in range(300):
        results = run_round(exchanges, values, Stamp(0, counter, 0))
        assert all(torch.equal(result[0], results[0][0]) for result in results)
        rounds.append(results[0][0].double())
    samples = torch.stack(rounds)
    standard_error = samples.std(dim=0) / len(rounds) ** 0.5
    rounding = exact.abs() * (0 if dtype == torch.float32 else 2**-8)
    assert ((samples.mean(dim=0) - exact).abs() <= 5 * standard_error + rounding + 1e-7).all()


def test_exact_segments_stay_exact() -> None:
    plan = plan_of(1000, codebook="exact")
    values = [values_of(plan, rank) for rank in range(4)]
    results = run_round(make_all(plan, InMemoryGroup(4), hosts_of(2, 2)), values)
    v = [own[0] for own in values]
    expected = ((v[0] + v[1]) * 0.5 + (v[2] + v[3]) * 0.5) * 0.5
    assert all(torch.equal(result[0], expected) for result in results)


@pytest.mark.parametrize(("hosts", "local"), [(2, 2), (3, 2)])
def test_bytes_are_counted_and_few_of_them_travel_between_hosts(hosts: int, local: int) -> None:
    where = hosts_of(hosts, local)
    between = 0

    def count(name: str, source: int, destination: int, received: torch.Tensor) -> torch.Tensor:
        nonlocal between
        between += received.numel() if where.of[source] != where.of[destination] else 0
        return received

    plan = plan_of(500_000)
    group = InMemoryGroup(hosts * local, count)
    exchanges = make_all(plan, group, where)
    run_round(exchanges, [values_of(plan, rank) for rank in range(hosts * local)])
    for exchange, transport in zip(exchanges, group.transports, strict=True):
        assert exchange.sent_bytes == transport.meter.traffic.sent_bytes
    # All hosts together: each sends its codes to the others, or in two phases (H-1)/H of them each.
    times = hosts * (hosts - 1) if hosts == 2 else 2 * (hosts - 1)
    assert between == pytest.approx(times * plan.message_bytes, rel=0.01)


@pytest.mark.parametrize("size", [300, 500_000])
@pytest.mark.parametrize("stage", ["to_owners", "between_hosts", "from_owners"])
def test_damage_anywhere_is_an_error_and_nobody_waits_for_ever(stage: str, size: int) -> None:
    def damage(name: str, source: int, destination: int, received: torch.Tensor) -> torch.Tensor:
        pair = (0, 2) if stage == "between_hosts" else (0, 1)
        if stage in name and (source, destination) == pair:
            received[40] ^= 1
        return received

    plan = plan_of(size)
    exchanges = make_all(plan, InMemoryGroup(6, damage), hosts_of(3, 2))
    start_all(exchanges, [values_of(plan, rank) for rank in range(6)])
    errors = {}
    for rank, exchange in enumerate(exchanges):
        try:
            exchange.finish([torch.empty(size)])
        except (WireError, RankMismatchError) as error:
            errors[rank] = str(error)
    failures = sorted(errors)
    assert any("damaged" in message for message in errors.values())
    assert all("damaged" in message or "refused" in message for message in errors.values())
    if stage == "to_owners":
        assert failures == [0, 1, 2, 3, 4, 5]  # no host has that share
    elif stage == "from_owners":
        assert failures == [1]
    else:
        assert set(failures) >= {2, 3}


def test_ranks_at_different_steps_find_out() -> None:
    plan = plan_of(300)
    exchanges = make_all(plan, InMemoryGroup(4), hosts_of(2, 2))
    for rank, exchange in enumerate(exchanges):
        exchange.start(values_of(plan, rank), Stamp(3, 8 if rank == 1 else 7, 1))
    for _ in range(10):
        for exchange in exchanges:
            exchange.advance()
    for exchange in exchanges:
        with pytest.raises(QodaError, match=r"exchange counter|refused"):
            exchange.finish([torch.empty(300)])


def test_what_it_cannot_do_is_refused() -> None:
    plan = plan_of(300)
    transport = InMemoryGroup(3).transports[0]
    with pytest.raises(UnsupportedError, match="hosts have 2, 1 ranks"):
        make_exchange("hierarchical", plan, BOOKS, transport, "x", hosts=Hosts((0, 0, 1)))
    with pytest.raises(UnsupportedError, match="share a host"):
        make_exchange("hierarchical", plan, BOOKS, transport, "x")
    exchange = make_exchange("hierarchical", plan, BOOKS, LocalTransport(), "x", hosts=Hosts((0,)))
    assert not exchange.has_own_message
    with pytest.raises(UnsupportedError, match="worker_norms"):
        exchange.own_message()


def test_dropped_rounds_leave_nothing_under_way() -> None:
    plan = plan_of(300)
    group = InMemoryGroup(4)
    exchanges = make_all(plan, group, hosts_of(2, 2))
    values = [values_of(plan, rank) for rank in range(4)]
    start_all(exchanges, values)
    for exchange in exchanges:
        exchange.drop()
    again = run_round(exchanges, values, Stamp(3, 8, 1))
    fresh = run_round(make_all(plan, InMemoryGroup(4), hosts_of(2, 2)), values, Stamp(3, 8, 1))
    assert torch.equal(again[0][0], fresh[0][0])
