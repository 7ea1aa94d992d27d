"""The cost model against cases worked out by hand, and what must hold for all numbers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qoda.cost_model import (
    BUFFER_BYTES,
    CodecSpeed,
    CollectiveCost,
    Layout,
    Link,
    Prediction,
    Ranks,
    break_even_bytes_per_s,
    choose,
    fit_cost,
    host_bytes,
    predict,
)
from hvd_qoda.errors import ConfigError
from hvd_qoda.schemes import make_exchange
from qoda_kernels.codebook import Codebook
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from tests.in_memory_transport import InMemoryGroup

FREE = CodecSpeed(0.0, 0.0)
SLOW_LINK = CollectiveCost(0.001, 1e-8)  # 100 MB/s
LINK = Link(SLOW_LINK, SLOW_LINK, SLOW_LINK, CollectiveCost(0.0001, 1e-10), SLOW_LINK)
LAYOUT = Layout(elements=1_000_000, raw_bytes=4_000_000, message_bytes=640_000)
TIMES = ("encode_s", "decode_s", "store_s", "call_s", "pass_s")
CODEC = CodecSpeed(encode_s=2e-9, decode_s=1e-9, store_s=0.5e-9, call_s=1e-5, pass_s=0.25e-9)


def plan_of(elements: int, bits: int = 5) -> MessagePlan:
    return MessagePlan.build(
        [Slice("w", 0, elements, torch.float32, "body", 0)], {"body": Codebook.uniform(bits, bucket_size=512)}
    )


def test_off_is_an_all_reduce_of_the_gradients() -> None:
    prediction = predict("off", LAYOUT, Ranks(4), LINK, CODEC)
    # 2 * 3/4 * 4 MB = 6 MB at 100 MB/s, and the latency.
    assert prediction.sent_bytes == 6_000_000
    assert prediction.seconds == pytest.approx(0.061)
    assert prediction.coding_s == 0


def test_fp16_sends_half_and_casts_twice() -> None:
    prediction = predict("fp16", LAYOUT, Ranks(4), LINK, CODEC)
    assert prediction.seconds == pytest.approx(0.001 + 0.03 + 2 * 0.25e-3)
    already = replace(LAYOUT, raw_bytes=2_000_000)
    assert predict("fp16", already, Ranks(4), LINK, CODEC).seconds == pytest.approx(0.031)
    slow_sum = replace(LINK, all_reduce_fp16=CollectiveCost(0.002, 2e-8))
    assert predict("fp16", already, Ranks(4), slow_sum, CODEC).seconds == pytest.approx(0.062)


def test_all_gather_sends_to_all_others_and_decodes_everybodys_message() -> None:
    prediction = predict("allgather", LAYOUT, Ranks(4), LINK, CODEC)
    assert prediction.sent_bytes == 3 * 640_000
    sending = 0.001 + 3 * 640_000 * 1e-8
    encode = 1e-5 + 2e-3
    decode = 1e-5 + 4 * 1e-3 + 0.5e-3
    assert prediction.seconds == pytest.approx(encode + sending + decode)
    assert (prediction.coding_s, prediction.sending_s) == pytest.approx((encode + decode, sending))


def test_reduce_scatter_sends_three_quarters_twice_and_codes_a_quarter_more() -> None:
    prediction = predict("reduce_scatter", LAYOUT, Ranks(4), LINK, CODEC)
    shares = 640_000 + 3 * HEADER_BYTES
    assert prediction.sent_bytes == 2 * 0.75 * shares
    sending = 2 * (0.001 + 0.75 * shares * 1e-8)
    encode = 4e-5 + 2e-3
    owner = 1e-5 + 0.25 * (4e-3 + 0.5e-3) + 1e-5 + 0.25 * 2e-3
    decode = 4e-5 + 1e-3 + 0.5e-3
    assert prediction.seconds == pytest.approx(encode + sending + owner + decode)


@pytest.mark.parametrize(("hosts", "across_bytes"), [(2, 640_000 / 2), (4, 2 * 0.75 * (320_000 + 3 * HEADER_BYTES))])
def test_hierarchical_is_exact_inside_a_host(hosts: int, across_bytes: float) -> None:
    ranks = Ranks(2 * hosts, local_size=2)
    prediction = predict("hierarchical", LAYOUT, ranks, LINK, FREE)
    assert prediction.sent_bytes == pytest.approx(2 * 2_000_000 + across_bytes)
    rounds = 1 if hosts == 2 else 2
    assert prediction.seconds == pytest.approx(2 * (1e-4 + 2e6 * 1e-10) + rounds * 1e-3 + across_bytes * 1e-8)


def test_several_messages_overlap_coding_with_sending() -> None:
    codec = CodecSpeed(encode_s=2e-9, decode_s=1e-9)
    four = replace(LAYOUT, messages=4)
    link = Link(*(CollectiveCost(0.001, 1e-8, 0.0002),) * 3)
    # K = 2: encode 2 ms, decode 2 ms, a quarter of each is not hidden; four all-gathers: 1 + 3 * 0.2 ms + 6.4 ms.
    prediction = predict("allgather", four, Ranks(2), link, codec)
    assert prediction.seconds == pytest.approx(0.001 + 0.0016 + 0.0064)
    # 3/4 of the sending at most is hidden behind backward.
    assert predict("allgather", four, Ranks(2), link, codec, overlap_s=0.003).seconds == pytest.approx(0.006)
    assert predict("allgather", four, Ranks(2), link, codec, overlap_s=1.0).seconds == pytest.approx(0.004)
    # On a shared core what is done at once costs as much as one after the other: 4 and 8 ms, or a part of that.
    for overlap, seconds in ((0.0, 0.012), (0.5, 0.0105)):
        shared = replace(codec, overlap=overlap)
        assert predict("allgather", four, Ranks(2), link, shared).seconds == pytest.approx(seconds)
    # Coding is the limit.
    slow = CodecSpeed(encode_s=2e-8, decode_s=1e-8)
    assert predict("allgather", four, Ranks(2), link, slow, overlap_s=1.0).seconds == pytest.approx(0.04)


def test_one_rank_and_empty_layouts_cost_nothing() -> None:
    assert predict("off", LAYOUT, Ranks(1), LINK, CODEC).seconds == 0
    assert predict("allgather", Layout(0, 0, 0, 0), Ranks(4), LINK, CODEC).seconds == 0
    with pytest.raises(ConfigError, match="ring"):
        predict("ring", LAYOUT, Ranks(4), LINK, CODEC)


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("elements", [1000, 100_000])
def test_predicted_bytes_are_those_of_the_exchange(scheme: str, size: int, elements: int) -> None:
    plan = plan_of(elements)
    books = {"body": Codebook.uniform(5, bucket_size=512)}
    exchanges = [make_exchange(scheme, plan, books, t, "x") for t in InMemoryGroup(size).transports]
    sent = sum(exchange.sent_bytes for exchange in exchanges) / size
    predicted = predict(scheme, Layout.of([plan]), Ranks(size), LINK, FREE).sent_bytes
    assert predicted == pytest.approx(sent, abs=2 * size * 16)  # padding of the shares


@pytest.mark.parametrize("scheme", ["off", "fp16", "allgather", "reduce_scatter"])
def test_a_host_with_one_rank_sends_what_its_rank_sends(scheme: str) -> None:
    layout = replace(LAYOUT, messages=3)
    for size in (2, 3, 8):
        predicted = predict(scheme, layout, Ranks(size), LINK, FREE).sent_bytes
        assert host_bytes(scheme, layout, Ranks(size)) == pytest.approx(predicted)


def test_bytes_between_hosts_of_two_ranks() -> None:
    two, four = Ranks(4, local_size=2), Ranks(8, local_size=2)
    assert host_bytes("off", LAYOUT, two) == 6_000_000  # a ring leaves each host once
    assert host_bytes("allgather", LAYOUT, two) == 3 * 640_000
    shares = 640_000 + 3 * HEADER_BYTES
    assert host_bytes("reduce_scatter", LAYOUT, two) == 2 * shares / 2 + 0.75 * shares
    assert host_bytes("hierarchical", LAYOUT, two) == 640_000  # each share once
    assert host_bytes("hierarchical", LAYOUT, four) == pytest.approx(2 * 1.5 * (320_000 + 3 * HEADER_BYTES))
    assert host_bytes("off", LAYOUT, Ranks(4, local_size=4)) == 0
    with pytest.raises(ConfigError, match="ring"):
        host_bytes("ring", LAYOUT, two)


def test_choice_is_the_cheapest_and_says_why() -> None:
    choice = choose(LAYOUT, Ranks(4), LINK, CODEC)
    assert [p.scheme for p in choice.predictions] == ["reduce_scatter", "allgather", "off"]
    assert choice.best is choice.predictions[0]
    assert choice.of("off").seconds == pytest.approx(0.061)
    assert "reduce_scatter is predicted to be the fastest" in choice.reason
    assert "off 61 ms" in choice.reason
    with pytest.raises(ConfigError, match="hierarchical"):
        choice.of("hierarchical")
    assert "hierarchical" in {p.scheme for p in choose(LAYOUT, Ranks(4, 2), LINK, CODEC).predictions}


def test_fast_links_choose_off_and_draws_go_to_the_earlier_scheme() -> None:
    fast = Link.of(Ranks(4), 1e-6, 1e11)
    assert choose(LAYOUT, Ranks(4), fast, CODEC).best.scheme == "off"
    assert choose(LAYOUT, Ranks(1), fast, CODEC, schemes=["allgather", "off"]).best.scheme == "allgather"
    with pytest.raises(ConfigError, match="no scheme"):
        choose(LAYOUT, Ranks(4), fast, CODEC, schemes=[])


def test_fusion_buffers_are_neither_too_small_nor_too_large() -> None:
    layout = Layout.of([plan_of(25_000_000)])
    link = Link.of(Ranks(4), 1e-3, 1.25e8, each_s=5e-4)
    best = choose(layout, Ranks(4), link, CODEC, overlap_s=0.2, schemes=["allgather"], buffers=BUFFER_BYTES).best
    assert best.buffer_bytes is not None
    assert min(BUFFER_BYTES) < best.buffer_bytes < max(BUFFER_BYTES)
    assert best.messages == math.ceil(1e8 / best.buffer_bytes)
    whole = choose(layout, Ranks(4), link, CODEC, overlap_s=0.2, schemes=["allgather"]).best
    assert best.seconds < whole.seconds


def test_link_of_counts_steps_and_shares_the_hosts_connection() -> None:
    link = Link.of(Ranks(8, 4), latency_s=1e-3, bytes_per_s=1e8, local_bytes_per_s=1e9)
    assert link.all_reduce == CollectiveCost(14e-3, 1e-8)
    assert link.all_gather == CollectiveCost(7e-3, 1e-8)
    # Four of the seven others are on the other host; four ranks share its connection.
    assert link.all_to_all.seconds_per_byte == pytest.approx(4 / 7 * 4e-8 + 3 / 7 * 1e-9)
    assert link.between_hosts is not None
    assert link.between_hosts.seconds_per_byte == 4e-8
    assert Link.from_dict(link.to_dict()) == link
    assert Link.from_dict(replace(link, between_hosts=None).to_dict()).between_hosts is None
    with pytest.raises(ConfigError, match="positive bandwidths"):
        Link.of(Ranks(2), 1e-3, 0.0)
    with pytest.raises(ConfigError, match="cannot lie"):
        Ranks(4, 3)


def test_break_even_is_where_compressing_stops_to_pay() -> None:
    # Without latency, K = 2: off sends 4 MB, all-gather 0.64 MB and codes 4 ms: 3.36 MB / 4 ms.
    codec = CodecSpeed(encode_s=2e-9, decode_s=1e-9)
    found = break_even_bytes_per_s(LAYOUT, Ranks(2), codec, 0.0)
    assert found == pytest.approx(3.36e6 / 4e-3, rel=0.01)
    assert break_even_bytes_per_s(LAYOUT, Ranks(2), CodecSpeed(1e3, 1e3), 0.0) == 0.0
    assert break_even_bytes_per_s(LAYOUT, Ranks(1), codec, 0.0) == 0.0
    assert break_even_bytes_per_s(LAYOUT, Ranks(2), FREE, 0.0) == math.inf


def test_fit_recovers_a_line_and_ignores_one_wild_time() -> None:
    sizes = [1e3, 1e3, 1e4, 1e5, 1e6, 1e7]
    times = [0.002 + 3e-9 * n for n in sizes]
    assert fit_cost(sizes, times) == pytest.approx((0.002, 3e-9))
    times[3] = 5.0
    fixed, slope = fit_cost(sizes, times)
    assert slope == pytest.approx(3e-9, rel=0.01)
    assert fixed == pytest.approx(0.002, rel=0.1)
    assert fit_cost([1.0, 2.0], [5.0, 3.0]) == (4.0, 0.0)
    with pytest.raises(ConfigError, match="two different sizes"):
        fit_cost([8.0, 8.0], [1.0, 2.0])


numbers = st.floats(1e-12, 1e-5)
layouts = st.builds(
    lambda elements, bits, messages: Layout(elements, 4 * elements, 32 * messages + elements * bits // 8, messages),
    st.integers(1, 10**9),
    st.integers(2, 8),
    st.integers(1, 50),
)
groups = st.sampled_from([Ranks(2), Ranks(3), Ranks(4, 2), Ranks(16, 4), Ranks(64)])
codecs = st.builds(CodecSpeed, numbers, numbers, numbers, numbers, numbers, overlap=st.floats(0, 1))
latencies = st.floats(0, 1e-2)
bandwidths = st.floats(1e5, 1e12)
factors = st.floats(1, 100)


def all_predictions(
    layout: Layout, ranks: Ranks, latency: float, bandwidth: float, codec: CodecSpeed, overlap: float = 0.0
) -> list[Prediction]:
    link = Link.of(ranks, latency, bandwidth)
    return [predict(scheme, layout, ranks, link, codec, overlap) for scheme in ranks.schemes]


def never_longer(one: list[Prediction], other: list[Prediction]) -> bool:
    return all(a.seconds <= b.seconds * (1 + 1e-9) for a, b in zip(one, other, strict=True))


@settings(max_examples=50, deadline=None)
@given(layouts, groups, latencies, bandwidths, codecs, factors)
def test_a_faster_link_never_takes_longer(
    layout: Layout, ranks: Ranks, latency: float, bandwidth: float, codec: CodecSpeed, factor: float
) -> None:
    slow = all_predictions(layout, ranks, latency, bandwidth, codec)
    assert never_longer(all_predictions(layout, ranks, latency, bandwidth * factor, codec), slow)
    assert never_longer(all_predictions(layout, ranks, latency / factor, bandwidth, codec), slow)
    assert never_longer(all_predictions(layout, ranks, latency, bandwidth, codec, overlap=factor), slow)


@settings(max_examples=50, deadline=None)
@given(layouts, groups, latencies, bandwidths, codecs, factors)
def test_more_elements_and_slower_codecs_never_take_less(
    layout: Layout, ranks: Ranks, latency: float, bandwidth: float, codec: CodecSpeed, factor: float
) -> None:
    base = all_predictions(layout, ranks, latency, bandwidth, codec)
    # "hierarchical" changes its inner scheme with the size, which may make a larger one cheaper at a slow codec.
    larger = Layout(layout.elements * 2, layout.raw_bytes * 2, layout.message_bytes * 2, layout.messages)
    assert never_longer(base[:4], all_predictions(larger, ranks, latency, bandwidth, codec)[:4])
    slower = CodecSpeed(*(getattr(codec, name) * factor for name in TIMES), overlap=codec.overlap)
    assert never_longer(base, all_predictions(layout, ranks, latency, bandwidth, slower))


@settings(max_examples=50, deadline=None)
@given(layouts, groups, latencies, bandwidths, codecs, st.floats(0, 1))
def test_the_choice_is_never_worse_than_off(
    layout: Layout, ranks: Ranks, latency: float, bandwidth: float, codec: CodecSpeed, overlap: float
) -> None:
    choice = choose(
        layout, ranks, Link.of(ranks, latency, bandwidth), codec, overlap, buffers=(None, *BUFFER_BYTES[:2])
    )
    assert choice.best.seconds <= choice.of("off").seconds
    assert choice.best.seconds == min(p.seconds for p in choice.predictions)
    # Nothing is sent in no time, and hiding does not make coding disappear.
    for prediction in choice.predictions:
        upper = prediction.coding_s + prediction.sending_s
        assert prediction.coding_s <= prediction.seconds <= upper * (1 + 1e-9)
