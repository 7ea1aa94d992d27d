"""Message plans: sizes from metadata, alignment, tails, and shares for a reduce-scatter."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoda_kernels.codebook import Codebook
from qoda_kernels.errors import PlanError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice

CODEBOOKS = {
    "convolution": Codebook.uniform(5),
    "embedding": Codebook.uniform(8, bucket_size=128, norm_format="bf16"),
    "output": Codebook.exponential(3, bucket_size=1024, norm="l2"),
    "bias": Codebook.exact(),
}


@st.composite
def plans(draw: Any) -> MessagePlan:
    slices = []
    offset = 0
    for index in range(draw(st.integers(0, 6))):
        length = draw(st.one_of(st.integers(0, 40), st.integers(0, 20_000)))
        start = draw(st.integers(0, 1000))
        key = draw(st.sampled_from(sorted(CODEBOOKS)))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        slices.append(Slice(f"layer{index}", start, length, dtype, key, offset))
        offset += start + length
    return MessagePlan.build(slices, CODEBOOKS)


def wanted_bytes(length: int, key: str, dtype: torch.dtype) -> int:
    """Size of a segment without padding, from the definition in the wire format."""
    if key == "bias":
        return length * dtype.itemsize
    codebook = CODEBOOKS[key]
    lanes = 16 if codebook.bucket_size == 128 else 32
    tail = length % (8 * lanes)
    codes = (length - tail) * codebook.bits // 8 + codebook.bits * -(-tail // 8)
    return codes + -(-length // codebook.bucket_size) * (2 if codebook.norm_format == "bf16" else 4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plan=plans())
def test_sizes_alignment_and_padding(plan: MessagePlan) -> None:
    position = HEADER_BYTES
    for segment in plan.segments:
        used = wanted_bytes(segment.slice.length, segment.slice.codebook, segment.slice.dtype)
        assert segment.begin == position
        assert segment.begin % 16 == 0
        assert segment.norms_bytes + segment.codes_bytes == used
        assert 0 <= segment.end - segment.begin - used <= 15
        position = segment.end
    assert plan.message_bytes == position
    assert plan.payload_bytes == position - HEADER_BYTES


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plan=plans(), count=st.integers(1, 9))
def test_split_covers_every_coordinate_once_in_whole_buckets(plan: MessagePlan, count: int) -> None:
    shares = plan.split(count)
    assert len(shares) == count
    for whole in plan.segments:
        parts = [s for share in shares for s in share.segments if s.slice.parameter == whole.slice.parameter]
        position = whole.slice.start
        for part in parts:
            assert part.slice.start == position
            assert part.slice.length > 0
            assert (part.slice.start - whole.slice.start) % whole.format.bucket_size == 0
            assert (part.slice.codebook, part.slice.offset) == (whole.slice.codebook, whole.slice.offset)
            position += part.slice.length
        assert position == whole.slice.start + whole.slice.length


def test_split_is_balanced_in_bytes() -> None:
    slices = [Slice("big", 0, 100_000, torch.float32, "convolution", 0)]
    slices += [Slice(f"small{i}", 0, 3000, torch.float32, "embedding", 100_000 + 3000 * i) for i in range(10)]
    plan = MessagePlan.build(slices, CODEBOOKS)
    sizes = [share.message_bytes for share in plan.split(4)]
    assert max(sizes) < 1.03 * sum(sizes) / 4


def test_header_and_norms_cost_less_than_0_15_bits_per_coordinate() -> None:
    for length in (65536, 100_001, 10**6):
        plan = MessagePlan.build([Slice("w", 0, length, torch.float32, "convolution", 0)], CODEBOOKS)
        assert plan.message_bytes * 8 / length <= 5.15
        assert sum(share.message_bytes for share in plan.split(4)) * 8 / length <= 5.15


def test_random_numbers_follow_the_parameters_own_coordinates() -> None:
    plan = MessagePlan.build([Slice("w", 10, 5000, torch.float32, "convolution", 2**40)], CODEBOOKS)
    shares = plan.split(2)
    second = shares[1].segments[0].slice
    assert plan.segments[0].slice.coordinate == 2**40 + 10
    assert second.coordinate == 2**40 + second.start


@pytest.mark.parametrize(
    "change",
    [
        {"length": 999},
        {"start": 1},
        {"parameter": "v"},
        {"codebook": "output"},
        {"offset": 1},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_digest_tells_plans_apart(change: dict[str, Any]) -> None:
    fields = {
        "parameter": "w",
        "start": 0,
        "length": 1000,
        "dtype": torch.float32,
        "codebook": "embedding",
        "offset": 0,
    }
    one, same = (MessagePlan.build([Slice(**fields)], CODEBOOKS) for _ in range(2))
    other = MessagePlan.build([Slice(**{**fields, **change})], CODEBOOKS)
    assert one.digest == same.digest
    assert one.digest != other.digest


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"'w' has dtype torch\.int64"):
        MessagePlan.build([Slice("w", 0, 4, torch.int64, "bias", 0)], CODEBOOKS)
    with pytest.raises(PlanError, match=r"'w' has dtype torch\.float64.*at 5 bits"):
        MessagePlan.build([Slice("w", 0, 4, torch.float64, "convolution", 0)], CODEBOOKS)
    with pytest.raises(PlanError, match="codebook 'attention'"):
        MessagePlan.build([Slice("w", 0, 4, torch.float32, "attention", 0)], CODEBOOKS)
    with pytest.raises(PlanError, match="2 GiB"):
        MessagePlan.build([Slice("w", 0, 2**29, torch.float32, "bias", 0)], CODEBOOKS)
    with pytest.raises(PlanError, match="at least one share"):
        MessagePlan.build([], CODEBOOKS).split(0)
