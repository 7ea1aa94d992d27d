"""Entropy-coded messages among several ranks of one process: the results of fixed-length codes, from fewer bytes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hvd_qoda.coded_all_gather import CodedAllGatherExchange
from hvd_qoda.errors import ConfigError, RankMismatchError, WireError
from hvd_qoda.exchange import AllGatherExchange, Exchange, Stamp
from hvd_qoda.schemes import make_exchange
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from qoda_kernels.registry import CodebookRegistry, LayerSettings
from qoda_kernels.statistics import HistogramStatistics
from tests.in_memory_transport import InMemoryGroup

STAMP = Stamp(seed=3, counter=7, registry_version=1)
PARAMETERS = [("layer.weight", torch.empty(300, 200)), ("layer.bias", torch.empty(300))]


def registry_of(coding: str, levels: str = "adaptive", **fields: int) -> CodebookRegistry:
    return CodebookRegistry.build(PARAMETERS, LayerSettings(levels=levels, **fields), coding=coding)  # type: ignore[arg-type]  # ints


def plan_of(registry: CodebookRegistry) -> MessagePlan:
    entries = registry.parameters.values()
    slices = [Slice(e.name, 0, e.numel, torch.float32, e.codebook, e.offset) for e in entries]
    return MessagePlan.build(slices, registry.codebooks)


def values_of(plan: MessagePlan, rank: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = np.random.default_rng(rank)
    lengths = [segment.slice.length for segment in plan.segments]
    return [torch.from_numpy(generator.laplace(0, scale, n).astype(np.float32)) for n in lengths]


def exchanges_of(registry: CodebookRegistry, group: InMemoryGroup) -> list[Exchange]:
    plan = plan_of(registry)
    return [make_exchange("allgather", plan, registry.codebooks, transport, "x") for transport in group.transports]


def run_round(exchanges: Sequence[Exchange], values: Sequence[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    for exchange, own in zip(exchanges, values, strict=True):
        exchange.start(own, STAMP)
    while not all([exchange.advance() for exchange in exchanges]):
        pass
    results = []
    for exchange in exchanges:
        out = [torch.full((s.slice.length,), 9.0) for s in exchange.plan.segments]
        exchange.finish(out)
        results.append(out)
    return results


def statistics_of(plan: MessagePlan) -> HistogramStatistics:
    return HistogramStatistics.gather(values_of(plan, 5)[0].numpy(), 512, "max")


@pytest.mark.parametrize("levels", ["adaptive", "uniform", "exponential"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_are_those_of_fixed_length_codes_and_bytes_are_fewer(size: int, levels: str) -> None:
    results, sent = {}, {}
    for coding in ("fixed", "huffman"):
        registry = registry_of(coding, levels)
        key = registry.parameters["layer.weight"].codebook
        if key in registry.adaptive_keys:
            registry = registry.updated({key: statistics_of(plan_of(registry))})
        exchanges = exchanges_of(registry, InMemoryGroup(size))
        results[coding] = run_round(exchanges, [values_of(exchanges[0].plan, rank) for rank in range(size)])
        sent[coding] = exchanges[0].sent_bytes
        assert isinstance(exchanges[0], CodedAllGatherExchange) == (coding == "huffman")
    for mine, reference in zip(results["huffman"], results["fixed"], strict=True):
        for one, two, first in zip(mine, reference, results["huffman"][0], strict=True):
            torch.testing.assert_close(one, two, rtol=0.0, atol=0.0)  # but for the sign of zeros
            assert one.numpy().tobytes() == first.numpy().tobytes()
    assert size == 1 or sent["huffman"] < 0.95 * sent["fixed"]


def test_statistics_shorten_messages_more_than_the_first_codes() -> None:
    first = registry_of("huffman", "uniform")
    key = first.parameters["layer.weight"].codebook
    updated = first.updated({key: statistics_of(plan_of(first))})
    assert updated.codebooks[key].levels == first.codebooks[key].levels
    sent = []
    for registry in (first, updated):
        exchanges = exchanges_of(registry, InMemoryGroup(2))
        run_round(exchanges, [values_of(exchanges[0].plan, rank) for rank in range(2)])
        sent.append(exchanges[0].sent_bytes)
    assert sent[1] < sent[0]


def test_codes_are_saved_and_restored_and_part_of_the_digest() -> None:
    first = registry_of("huffman")
    key = first.parameters["layer.weight"].codebook
    updated = first.updated({key: statistics_of(plan_of(first))})
    again = registry_of("huffman").restored(updated.state_dict())
    assert again.codebooks == updated.codebooks
    assert again.codebooks[key].weights
    book = updated.codebooks[key]
    other = dataclasses.replace(book, weights=(book.weights[0] + 1, *book.weights[1:]))
    assert other.digest != book.digest
    assert not registry_of("fixed").restored(updated.state_dict()).codebooks[key].weights
    assert "weights" not in registry_of("fixed").codebooks[key].to_dict()


def test_a_message_that_coding_would_lengthen_travels_as_it_is() -> None:
    registry = registry_of("huffman", bits=8)
    key = registry.parameters["layer.weight"].codebook
    weights = (2**30,) + (0,) * 127
    registry = dataclasses.replace(
        registry, codebooks={**registry.codebooks, key: dataclasses.replace(registry.codebooks[key], weights=weights)}
    )
    exchanges = exchanges_of(registry, InMemoryGroup(2))
    run_round(exchanges, [values_of(exchanges[0].plan, rank) for rank in range(2)])
    assert exchanges[0].sent_bytes == exchanges[0].plan.message_bytes + 8


@pytest.mark.parametrize("place", [0, 6, 9, 30, HEADER_BYTES, 400, -1])
def test_a_damaged_message_is_an_error_where_it_arrives(place: int) -> None:
    exchanges = exchanges_of(registry_of("huffman"), InMemoryGroup(2))
    for rank, exchange in enumerate(exchanges):
        exchange.start(values_of(exchange.plan, rank), STAMP)
    assert isinstance(exchanges[0], CodedAllGatherExchange)
    exchanges[0]._sent[place] ^= 1
    while not all([exchange.advance() for exchange in exchanges]):
        pass
    for exchange in exchanges:
        with pytest.raises(WireError):
            exchange.finish([torch.empty(s.slice.length) for s in exchange.plan.segments])


@pytest.mark.parametrize("announced", [0, 2**40])
def test_an_impossible_size_is_an_error_on_every_rank(announced: int) -> None:
    def change(name: str, source: int, destination: int, received: torch.Tensor) -> torch.Tensor:
        if source != 1 or not name.endswith(".sizes"):
            return received
        return torch.frombuffer(bytearray(announced.to_bytes(8, "little")), dtype=torch.uint8)

    exchanges = exchanges_of(registry_of("huffman"), InMemoryGroup(2, change))
    for rank, exchange in enumerate(exchanges):
        exchange.start(values_of(exchange.plan, rank), STAMP)
    while not all([exchange.advance() for exchange in exchanges]):
        pass
    for exchange in exchanges:
        with pytest.raises(WireError, match=f"announced a message of {announced} bytes"):
            exchange.finish([torch.empty(s.slice.length) for s in exchange.plan.segments])


def test_a_refused_round_is_refused_on_every_rank() -> None:
    exchanges = exchanges_of(registry_of("huffman"), InMemoryGroup(2))
    exchanges[0].start(values_of(exchanges[0].plan, 0), STAMP)
    exchanges[1].start_refused("no gradient today")
    while not all([exchange.advance() for exchange in exchanges]):
        pass
    for exchange in exchanges:
        with pytest.raises(RankMismatchError, match="no gradient today"):
            exchange.finish([torch.empty(s.slice.length) for s in exchange.plan.segments])


@pytest.mark.parametrize("scheme", ["reduce_scatter"])
def test_other_exchanges_refuse_codes_of_unequal_length(scheme: str) -> None:
    registry = registry_of("huffman")
    with pytest.raises(ConfigError, match="unequal sizes"):
        make_exchange(scheme, plan_of(registry), registry.codebooks, InMemoryGroup(2).transports[0], "x")


def test_exact_codebooks_need_no_coding() -> None:
    plan = MessagePlan.build([Slice("p", 0, 9, torch.float32, "exact", 0)], {"exact": Codebook.exact()})
    made = make_exchange("allgather", plan, {"exact": Codebook.exact()}, InMemoryGroup(2).transports[0], "x")
    assert type(made) is AllGatherExchange
