"""The reduction to owners among several ranks of one process: one quantization, and only owners write."""

import pytest
import torch

from hvd_qoda.errors import PlanError, RankMismatchError, WireError
from hvd_qoda.exchange import PendingExchanges, Stamp
from hvd_qoda.reduce_to_owner import ReduceToOwnerExchange
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.layout import MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

CODEBOOKS = {"body": Codebook.uniform(5, bucket_size=128), "exact": Codebook.exact()}
STAMP = Stamp(seed=3, counter=7, registry_version=1)
# A parameter whose second half another rank keeps, a small one, and one that travels exact.
PARTS = (("p0", 0, 700, "body"), ("p0", 700, 300, "body"), ("p1", 0, 5, "body"), ("p2", 0, 77, "exact"))
OWNERS = (0, 2, 2, 0)  # rank 1 keeps nothing


def plan_of(dtype: torch.dtype = torch.float32) -> MessagePlan:
    offsets = {"p0": 0, "p1": 1000, "p2": 1005}
    slices = [Slice(name, start, length, dtype, key, offsets[name]) for name, start, length, key in PARTS]
    return MessagePlan.build(slices, CODEBOOKS)


def values_of(plan: MessagePlan, rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s.slice.length, generator=generator).to(s.slice.dtype) for s in plan.segments]


def exchanges_of(plan: MessagePlan, group: InMemoryGroup) -> list[ReduceToOwnerExchange]:
    return [ReduceToOwnerExchange(plan, OWNERS, CODEBOOKS, transport, "x") for transport in group.transports]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_owners_get_the_codecs_sum_and_nobody_else_writes(dtype: torch.dtype) -> None:
    plan, group = plan_of(dtype), InMemoryGroup(3)
    values = [values_of(plan, rank) for rank in range(3)]
    exchanges = exchanges_of(plan, group)
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, STAMP)
    for rank, exchange in enumerate(exchanges):
        assert exchange.advance()
        out = [torch.full_like(value, 9.0) for value in values[rank]]
        exchange.finish(out, scale=3.0)
        kept = [index for index, owner in enumerate(OWNERS) if owner == rank]
        share = MessagePlan.build([plan.segments[index].slice for index in kept], CODEBOOKS)
        codec = Codec(share, CODEBOOKS)
        contexts = [STAMP.context(0, source, rank) for source in range(3)]
        messages = [
            codec.encode([values[source][index] for index in kept], context) for source, context in enumerate(contexts)
        ]
        expected = codec.decode_mean(messages, contexts, scale=1.0)
        for index, tensor in enumerate(out):
            wanted = expected[kept.index(index)] if index in kept else torch.full_like(tensor, 9.0)
            assert torch.equal(tensor, wanted)


def test_half_the_bytes_of_an_all_reduce_at_the_same_bits() -> None:
    plan = MessagePlan.build([Slice("p", 0, 65536, torch.float32, "body", 0)] * 4, CODEBOOKS)
    group = InMemoryGroup(4)
    exchanges = [ReduceToOwnerExchange(plan, range(4), CODEBOOKS, t, "x") for t in group.transports]
    for exchange in exchanges:
        assert exchange.sent_bytes == pytest.approx(3 / 4 * plan.message_bytes, rel=0.001)
    for exchange in exchanges:
        exchange.start([torch.zeros(65536)] * 4, STAMP)
    for transport, exchange in zip(group.transports, exchanges, strict=True):
        exchange.drop()
        assert transport.meter.traffic.sent_bytes == exchange.sent_bytes


def test_what_a_rank_has_sent_can_be_kept_and_restored() -> None:
    plan, group = plan_of(), InMemoryGroup(3)
    exchanges = exchanges_of(plan, group)
    for rank, exchange in enumerate(exchanges):
        exchange.start(values_of(plan, rank), STAMP)
    for exchange in exchanges:
        own = exchange.own_message()
        restored = exchange.restore_own_message(own.message, own.stamp, own.codebooks)
        for one, other in zip(own.decode(), restored.decode(), strict=True):
            assert torch.equal(one, other)
        exchange.drop()


def test_a_damaged_message_is_an_error_of_its_owner() -> None:
    def damage(name: str, source: int, destination: int, received: torch.Tensor) -> torch.Tensor:
        if (source, destination) == (1, 2):
            received[-20] ^= 1
        return received

    plan, group = plan_of(), InMemoryGroup(3, damage)
    exchanges = exchanges_of(plan, group)
    values = [values_of(plan, rank) for rank in range(3)]
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, STAMP)
    exchanges[0].finish([torch.empty_like(value) for value in values[0]])
    with pytest.raises(WireError, match="source 1"):
        exchanges[2].finish([torch.empty_like(value) for value in values[2]])


def test_a_refusal_reaches_every_rank() -> None:
    plan, group = plan_of(), InMemoryGroup(3)
    exchanges = exchanges_of(plan, group)
    pending = PendingExchanges(2.0, "here")
    exchanges[0].start_refused("no gradient")
    for rank in (1, 2):
        exchanges[rank].start(values_of(plan, rank), STAMP)
    for exchange in exchanges:
        pending.add(exchange)
        with pytest.raises(RankMismatchError, match="no gradient"):
            pending.finish(exchange, [torch.empty(s.slice.length) for s in plan.segments])


@pytest.mark.parametrize("owners", [(0, 1), (0, 1, 2, 3), (0, 0, 0, -1)])
def test_every_slice_needs_an_owner(owners: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="owners"):
        ReduceToOwnerExchange(plan_of(), owners, CODEBOOKS, InMemoryGroup(3).transports[0], "x")


def test_other_bits_are_used_after_use_codebooks() -> None:
    """A new plan of the bits gives the messages of a new exchange, and kept messages can still be read."""
    plan, group = plan_of(), InMemoryGroup(3)
    exchanges = exchanges_of(plan, group)
    values = [values_of(plan, rank) for rank in range(3)]
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, STAMP)
    for exchange in exchanges:
        exchange.drop()
    kept = exchanges[0].own_message()
    codebooks = {**CODEBOOKS, "body": Codebook.uniform(8, bucket_size=128)}
    wider = MessagePlan.build([segment.slice for segment in plan.segments], codebooks)
    others = [ReduceToOwnerExchange(wider, OWNERS, codebooks, transport, "y") for transport in group.transports]
    for exchange, other, own in zip(exchanges, others, values, strict=True):
        exchange.use_codebooks(codebooks)
        assert exchange.sent_bytes == other.sent_bytes
        exchange.start(own, STAMP)
        other.start(own, STAMP)
        for one, two in zip(exchange.own_message().decode(), other.own_message().decode(), strict=True):
            assert torch.equal(one, two)
    again = exchanges[0].restore_own_message(kept.message, kept.stamp, kept.codebooks)
    for one, two in zip(kept.decode(), again.decode(), strict=True):
        assert torch.equal(one, two)
