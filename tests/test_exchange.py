"""Exchanges among several ranks of one process, against what the codec's definition says they must give."""

from collections.abc import Sequence

import pytest
import torch

from hvd_qoda.errors import ConfigError, ExchangeTimeoutError, QodaError, RankMismatchError, WireError
from hvd_qoda.exchange import Exchange, PendingExchanges, Stamp, exchange_by_bytes
from hvd_qoda.schemes import make_exchange
from hvd_qoda.transport import LocalTransport
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.gaussian import relative_error
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.registry import LayerSettings
from tests.in_memory_transport import InMemoryGroup

SCHEMES = ("allgather", "reduce_scatter")
CODEBOOKS = {"body": Codebook.uniform(5, bucket_size=128), "exact": Codebook.exact()}
STAMP = Stamp(seed=3, counter=7, registry_version=1)


def plan_of(*sizes: int, codebook: str = "body", dtype: torch.dtype = torch.float32) -> MessagePlan:
    slices, offset = [], 0
    for index, size in enumerate(sizes):
        slices.append(Slice(f"p{index}", 0, size, dtype, codebook, offset))
        offset += size
    return MessagePlan.build(slices, CODEBOOKS)


def random_values(plan: MessagePlan, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s.slice.length, generator=generator).to(s.slice.dtype) for s in plan.segments]


def new_out(plan: MessagePlan) -> list[torch.Tensor]:
    return [torch.full((s.slice.length,), 99.0, dtype=s.slice.dtype) for s in plan.segments]


def make_all(scheme: str, plan: MessagePlan, group: InMemoryGroup, name: str = "x") -> list[Exchange]:
    return [make_exchange(scheme, plan, CODEBOOKS, transport, name) for transport in group.transports]


def run_round(
    exchanges: Sequence[Exchange], values: Sequence[list[torch.Tensor]], stamp: Stamp = STAMP, scale: float = 1.0
) -> list[list[torch.Tensor]]:
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, stamp)
    while not all([exchange.advance() for exchange in exchanges]):
        pass
    results = []
    for exchange in exchanges:
        out = new_out(exchange.plan)
        exchange.finish(out, scale)
        results.append(out)
    return results


def assert_same_bits(results: Sequence[list[torch.Tensor]]) -> None:
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_gather_gives_every_rank_the_codecs_mean_in_rank_order(size: int) -> None:
    plan = plan_of(700, 3, 128)
    group = InMemoryGroup(size)
    values = [random_values(plan, rank) for rank in range(size)]
    results = run_round(make_all("allgather", plan, group), values)
    codec = Codec(plan, CODEBOOKS)
    contexts = [STAMP.context(0, rank, 0) for rank in range(size)]
    messages = [codec.encode(own, context) for own, context in zip(values, contexts, strict=True)]
    expected = codec.decode_mean(messages, contexts)
    assert_same_bits([expected, *results])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_reduce_scatter_gives_every_rank_the_owners_requantized_means(size: int) -> None:
    plan = plan_of(700, 3, 128)
    group = InMemoryGroup(size)
    values = [random_values(plan, rank) for rank in range(size)]
    results = run_round(make_all("reduce_scatter", plan, group), values)
    expected = new_out(plan)
    for owner, share in enumerate(plan.split(size)):
        codec = Codec(share, CODEBOOKS)
        parts = [
            [own[int(s.slice.parameter[1])][s.slice.start :][: s.slice.length] for s in share.segments]
            for own in values
        ]
        contexts = [STAMP.context(0, rank, owner) for rank in range(size)]
        messages = [codec.encode(part, context) for part, context in zip(parts, contexts, strict=True)]
        mean = codec.decode_mean(messages, contexts)
        context = STAMP.context(1, owner, owner)
        for segment, decoded in zip(
            share.segments, codec.decode_mean([codec.encode(mean, context)], [context]), strict=True
        ):
            part = segment.slice
            expected[int(part.parameter[1])][part.start : part.start + part.length] = decoded
    assert_same_bits([expected, *results])


def test_agreement_in_reduce_scatter_owner_uses_its_own_decoded_share() -> None:
    plan = plan_of(4096)
    values = [random_values(plan, rank) for rank in range(4)]
    results = run_round(make_all("reduce_scatter", plan, InMemoryGroup(4)), values)
    assert_same_bits(results)
    exact = sum(own[0] for own in values) / 4
    # Were the owner's own share not quantized a second time, a quarter of the elements would have half the error.
    errors = (results[0][0] - exact).square().view(4, -1).mean(dim=1)
    assert errors.max() < 2 * errors.min()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exact_segments_are_the_float32_sum_in_rank_order(scheme: str) -> None:
    plan = plan_of(1000, codebook="exact")
    values = [random_values(plan, rank) for rank in range(4)]
    results = run_round(make_all(scheme, plan, InMemoryGroup(4)), values)
    expected = (((values[0][0] + values[1][0]) + values[2][0]) + values[3][0]) * 0.25
    assert_same_bits([[expected], *results])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_16_bit_segments_are_summed_in_float32_and_rounded_once(scheme: str, dtype: torch.dtype) -> None:
    plan = plan_of(300, codebook="exact", dtype=dtype)
    values = [random_values(plan, rank) for rank in range(3)]
    results = run_round(make_all(scheme, plan, InMemoryGroup(3)), values)
    wide = [own[0].float() for own in values]
    expected = (((wide[0] + wide[1]) + wide[2]) * (1 / 3)).to(dtype)
    assert_same_bits(results)
    assert results[0][0].dtype == dtype
    assert torch.allclose(results[0][0].float(), expected.float(), rtol=2**-7, atol=0)
    assert (results[0][0] == expected).float().mean() > 0.99  # the order of scaling may move a tie


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_is_unbiased(scheme: str, dtype: torch.dtype) -> None:
    plan = plan_of(64, dtype=dtype)
    values = [random_values(plan, rank) for rank in range(3)]
    exact = sum(own[0].double() for own in values) / 3
    exchanges = make_all(scheme, plan, InMemoryGroup(3))
    rounds = [run_round(exchanges, values, Stamp(0, counter, 0))[0][0].double() for counter in range(400)]
    samples = torch.stack(rounds)
    standard_error = samples.std(dim=0) / len(rounds) ** 0.5
    rounding = exact.abs() * (0 if dtype == torch.float32 else 2**-8)
    assert ((samples.mean(dim=0) - exact).abs() <= 5 * standard_error + rounding + 1e-7).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stratified_random_numbers_cancel_in_the_mean(scheme: str) -> None:
    """Of the first quantization's error, 47 % go for 4 ranks with unrelated gradients; an owner's second one stays."""
    plan = plan_of(100_000)
    values = [[2 * torch.rand(100_000, generator=torch.Generator().manual_seed(rank)) - 1] for rank in range(4)]
    exact = sum(own[0].double() for own in values) / 4

    def error(scheme: str, dither: str) -> float:
        results = run_round(make_all(scheme, plan, InMemoryGroup(4)), values, Stamp(3, 7, 1, dither))
        assert_same_bits(results)
        return float((results[0][0].double() - exact).square().mean())

    first = error("allgather", "independent")
    saved = error(scheme, "independent") - error(scheme, "stratified")
    assert saved == pytest.approx(first * (1 - 0.53125), rel=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rotated_buckets_agree_on_all_ranks_and_have_the_predicted_error(
    monkeypatch: pytest.MonkeyPatch, scheme: str, rounding: str
) -> None:
    """Slices of odd lengths; in a reduce-scatter the owner quantizes its share of the mean a second time."""
    book = LayerSettings(bits=4, rotation="hadamard", rounding=rounding).codebook()
    monkeypatch.setitem(CODEBOOKS, "body", book)
    plan = plan_of(70_001, 3, 33_333, 700)
    values = [random_values(plan, rank) for rank in range(3)]
    results = run_round(make_all(scheme, plan, InMemoryGroup(3)), values)
    assert_same_bits(results)
    exact = [sum(own[index].double() for own in values) / 3 for index in range(4)]
    error = sum(float((found - want).square().sum()) for found, want in zip(results[0], exact, strict=True))
    power = sum(float(want.square().sum()) for want in exact)
    rounds = {"allgather": 1, "reduce_scatter": 2}[scheme]
    assert error / power == pytest.approx(rounds * relative_error(book), rel=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_numbers_differ_between_ranks_steps_and_phases(scheme: str) -> None:
    """Equal gradients on all ranks: the error of the mean falls as 1/K only if the ranks round independently."""
    plan = plan_of(20_000)
    values = random_values(plan, 0)

    def error(size: int, counter: int) -> torch.Tensor:
        results = run_round(make_all(scheme, plan, InMemoryGroup(size)), [values] * size, Stamp(0, counter, 0))
        return results[0][0] - values[0]

    alone = Codec(plan, CODEBOOKS)
    message = alone.encode(values, STAMP.context(0, 0, 0))
    one = (alone.decode_mean([message], [STAMP.context(0, 0, 0)])[0] - values[0]).square().mean()
    second = one if scheme == "reduce_scatter" else 0.0  # the owner's quantization comes on top
    assert error(8, 1).square().mean() == pytest.approx(float(one / 8 + second), rel=0.25)
    first_step, next_step = error(2, 1), error(2, 2)
    correlation = torch.corrcoef(torch.stack([first_step, next_step]))[0, 1]
    assert abs(correlation) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scale_multiplies_the_mean(scheme: str) -> None:
    plan = plan_of(300)
    values = [random_values(plan, rank) for rank in range(2)]
    exchanges = make_all(scheme, plan, InMemoryGroup(2))
    mean = run_round(exchanges, values)[0][0]
    total = run_round(exchanges, values, scale=2.0)[0][0]
    assert torch.equal(total, 2 * mean)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_may_change_and_buffers_are_used_again(scheme: str) -> None:
    plan = plan_of(513)
    group = InMemoryGroup(2)
    exchanges = make_all(scheme, plan, group)
    values = [random_values(plan, rank) for rank in range(2)]
    expected = run_round(exchanges, [[own[0].clone()] for own in values])
    run_round(exchanges, [[own[0] * 1000] for own in values], Stamp(3, 8, 1))
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, STAMP)
        own[0].zero_()
    while not all([exchange.advance() for exchange in exchanges]):
        pass
    for exchange in exchanges:
        out = new_out(plan)
        exchange.finish(out)
        assert torch.equal(out[0], expected[0][0])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sent_bytes_are_what_the_transport_counted(scheme: str, size: int) -> None:
    plan = plan_of(5000, 10)
    group = InMemoryGroup(size)
    exchanges = make_all(scheme, plan, group)
    run_round(exchanges, [random_values(plan, rank) for rank in range(size)])
    for exchange, transport in zip(exchanges, group.transports, strict=True):
        assert exchange.sent_bytes == transport.meter.traffic.sent_bytes > 0


@pytest.mark.parametrize("size", [3, 4, 8])
@pytest.mark.parametrize("elements", [1, 3000, 20_000, 100_000, 200_000])
def test_exchange_by_bytes_reduce_scatters_what_saves_64_kib(size: int, elements: int) -> None:
    plan = plan_of(elements)
    group = InMemoryGroup(size)
    sent = {s: sum(e.sent_bytes for e in make_all(s, plan, group)) / size for s in SCHEMES}
    chosen = exchange_by_bytes(plan, CODEBOOKS, size)
    assert (chosen == "reduce_scatter") == (sent["allgather"] - sent["reduce_scatter"] >= 65_536)
    assert type(make_all("by_bytes", plan, group)[0]) is type(make_all(chosen, plan, group)[0])
    if elements in (1, 200_000):
        assert chosen == ("allgather" if elements == 1 else "reduce_scatter")


def test_two_ranks_always_all_gather() -> None:
    assert exchange_by_bytes(plan_of(10**6), CODEBOOKS, 2) == "allgather"


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match="ring"):
        make_exchange("ring", plan_of(5), CODEBOOKS, LocalTransport(), "x")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_rank_alone_gets_its_own_quantized_gradient(scheme: str) -> None:
    plan = plan_of(300)
    exchange = make_exchange(scheme, plan, CODEBOOKS, LocalTransport(), "x")
    values = random_values(plan, 0)
    out = run_round([exchange], [values])[0]
    assert exchange.sent_bytes == 0
    assert 0 < (out[0] - values[0]).abs().max() < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_messages_average_to_the_first_quantization(scheme: str, dtype: torch.dtype) -> None:
    plan = plan_of(700, 40, dtype=dtype)
    values = [random_values(plan, rank) for rank in range(3)]
    exchanges = make_all(scheme, plan, InMemoryGroup(3))
    results = run_round(exchanges, values)
    own = [exchange.own_message() for exchange in exchanges]
    mean = sum(message.decode()[0] for message in own) / 3
    assert mean.dtype == torch.float32
    bound = 0.3 if scheme == "reduce_scatter" else 0.02
    assert (mean - results[0][0].float()).abs().max() < bound
    # Kept messages outlive the next round, and survive being saved.
    before = [message.decode() for message in own]
    run_round(exchanges, [[v * 2 for v in part] for part in values], Stamp(3, 8, 1))
    for exchange, message, decoded in zip(exchanges, own, before, strict=True):
        restored = exchange.restore_own_message(message.message, message.stamp, message.codebooks)
        assert_same_bits([decoded, message.decode(), restored.decode()])
    with pytest.raises(WireError):
        exchanges[0].restore_own_message(own[0].message[:-16], STAMP, CODEBOOKS).decode()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_levels_are_used_after_use_codebooks(scheme: str) -> None:
    plan = plan_of(2000)
    values = [random_values(plan, rank) for rank in range(2)]
    exchanges = make_all(scheme, plan, InMemoryGroup(2))
    run_round(exchanges, values)
    changed = {**CODEBOOKS, "body": Codebook.exponential(5, bucket_size=128, version=2)}
    for exchange in exchanges:
        exchange.use_codebooks(changed)
    results = run_round(exchanges, values, Stamp(3, 8, 2))
    assert_same_bits(results)
    fresh = [make_exchange(scheme, plan, changed, t, "y") for t in InMemoryGroup(2).transports]
    assert_same_bits([results[0], run_round(fresh, values, Stamp(3, 8, 2))[0]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_bits_are_used_after_use_codebooks(scheme: str) -> None:
    """A new plan of the bits: messages of another size, and kept messages of before can still be read."""
    group, plan = InMemoryGroup(3), plan_of(3000, 700)
    values = [random_values(plan, rank) for rank in range(3)]
    exchanges = make_all(scheme, plan, group)
    first = run_round(exchanges, values)
    kept, bytes_before = exchanges[1].own_message(), exchanges[1].sent_bytes
    before = kept.decode()
    codebooks = {**CODEBOOKS, "body": Codebook.uniform(8, bucket_size=128)}
    for exchange in exchanges:
        exchange.use_codebooks(codebooks)
    second = run_round(exchanges, values)
    wider = MessagePlan.build([segment.slice for segment in plan.segments], codebooks)
    new = [make_exchange(scheme, wider, codebooks, transport, "y") for transport in group.transports]
    assert_same_bits([*second, *run_round(new, values)])
    assert exchanges[1].sent_bytes == new[1].sent_bytes > bytes_before
    mean = torch.stack([torch.cat(own) for own in values]).mean(dim=0)
    errors = [float((torch.cat(result[0]) - mean).square().sum()) for result in (first, second)]
    assert errors[1] < errors[0] / 16
    again = exchanges[1].restore_own_message(kept.message, kept.stamp, kept.codebooks)
    for one, other, third in zip(before, again.decode(), kept.decode(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def advance_all(exchanges: Sequence[Exchange]) -> None:
    for _ in range(3):
        for exchange in exchanges:
            exchange.advance()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_message_of_another_step_is_refused_by_every_rank(scheme: str) -> None:
    plan = plan_of(300)
    exchanges = make_all(scheme, plan, InMemoryGroup(3))
    for rank, exchange in enumerate(exchanges):
        exchange.start(random_values(plan, rank), Stamp(3, 8 if rank == 1 else 7, 1))
    advance_all(exchanges)
    for exchange in exchanges:
        with pytest.raises(QodaError, match=r"exchange counter|refused"):
            exchange.finish(new_out(plan))


def test_reduce_scatter_owner_that_cannot_decode_tells_the_others() -> None:
    def damage(name: str, source: int, destination: int, received: torch.Tensor) -> torch.Tensor:
        if name.endswith("all_to_all") and (source, destination) == (0, 1):
            received[40] ^= 1
        return received

    plan = plan_of(3000)
    exchanges = make_all("reduce_scatter", plan, InMemoryGroup(3, damage))
    for rank, exchange in enumerate(exchanges):
        exchange.start(random_values(plan, rank), STAMP)
    advance_all(exchanges)
    with pytest.raises(WireError, match="damaged"):
        exchanges[1].finish(new_out(plan))
    for rank in (0, 2):
        with pytest.raises(RankMismatchError, match=r"position 1 refused.*damaged"):
            exchanges[rank].finish(new_out(plan))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_damaged_message_is_an_error(scheme: str) -> None:
    def damage(name: str, source: int, destination: int, received: torch.Tensor) -> torch.Tensor:
        if name.endswith("all_gather") and source == 1:
            received[-1] ^= 128
        return received

    plan = plan_of(3000)
    exchanges = make_all(scheme, plan, InMemoryGroup(2, damage))
    with pytest.raises(WireError, match="damaged"):
        run_round(exchanges, [random_values(plan, rank) for rank in range(2)])


def pending_of(exchanges: Sequence[Exchange]) -> PendingExchanges:
    pending = PendingExchanges(timeout_s=0.2, where="rank 0")
    for exchange in exchanges:
        pending.add(exchange)
    return pending


def test_pending_exchanges_move_all_to_phase_2_while_one_is_waited_for() -> None:
    """Two ranks wait for their parameters in opposite order; neither may wait before the other has what it needs."""
    plan = plan_of(900)
    group = InMemoryGroup(2)
    by_name = {name: make_all("reduce_scatter", plan, group, name) for name in ("a", "b")}
    pending = [PendingExchanges(0.2, f"rank {rank}") for rank in range(2)]
    for rank, order in enumerate(("ab", "ba")):
        for name in order:  # rank 0's are handed over before rank 1's have started: nothing can be advanced yet
            by_name[name][rank].start(random_values(plan, rank), STAMP)
            if rank == 0:
                pending[rank].add(by_name[name][rank])
    # Rank 0 waits for its first alone, and in vain; but it leaves nothing undone that rank 1 needs.
    with pytest.raises(ExchangeTimeoutError, match=r"'a.all_gather'"):
        pending[0].finish(by_name["a"][0], new_out(plan))
    for name in "ba":
        pending[1].add(by_name[name][1])
    for name in "ba":
        pending[1].finish(by_name[name][1], new_out(plan))
    assert len(pending[1]) == 0


def test_pending_exchanges_do_not_wait_for_what_a_peer_has_not_started() -> None:
    plan = plan_of(900)
    group = InMemoryGroup(2)
    early, needed = (make_all("reduce_scatter", plan, group, name) for name in ("early", "needed"))
    early[0].start(random_values(plan, 0), STAMP)  # rank 1 will start this one in its next step
    pending = pending_of([early[0]])
    for rank in range(2):
        needed[rank].start(random_values(plan, rank), STAMP)
    pending.add(needed[0])
    advance_all([needed[1]])
    results = []

    def finish_second() -> None:
        out = new_out(plan)
        needed[1].finish(out)
        results.append(out)

    pending._advance_until(needed[0])
    finish_second()
    out = new_out(plan)
    pending.finish(needed[0], out)
    assert_same_bits([out, *results])
    assert len(pending) == 1


def test_time_out_names_collective_rank_and_what_to_check() -> None:
    plan = plan_of(900)
    for scheme, collective in (("allgather", "all_gather"), ("reduce_scatter", "all_to_all")):
        exchange = make_all(scheme, plan, InMemoryGroup(2), "layer.weight")[0]
        exchange.start(random_values(plan, 0), STAMP)
        pending = pending_of([exchange])
        with pytest.raises(ExchangeTimeoutError, match=rf"rank 0: 'layer.weight.{collective}'.*every rank is alive"):
            pending.finish(exchange, new_out(plan))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dropped_rounds_leave_nothing_under_way(scheme: str) -> None:
    plan = plan_of(900)
    group = InMemoryGroup(2)
    exchanges = make_all(scheme, plan, group)
    for rank, exchange in enumerate(exchanges):
        exchange.start(random_values(plan, rank), STAMP)
    advance_all(exchanges)
    for exchange in exchanges:
        pending = pending_of([exchange])
        pending.drop()
        assert len(pending) == 0
    assert not group.started
    values = [random_values(plan, rank) for rank in range(2)]
    assert_same_bits(run_round(exchanges, values, Stamp(3, 8, 1)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_finish_before_start_is_an_error(scheme: str) -> None:
    exchange = make_exchange(scheme, plan_of(10), CODEBOOKS, LocalTransport(timeout_s=0.05), "x")
    with pytest.raises((QodaError, ExchangeTimeoutError)):
        exchange.finish(new_out(exchange.plan))
