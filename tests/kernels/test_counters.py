"""Numbers beyond 2^31, 2^32 and 2^53: exchange counters, coordinates, and the elements of one layout."""

import pytest
import torch

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec, _cut, _grouped
from qoda_kernels.cpu import arguments
from qoda_kernels.dither import DitherKey
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.rotation import RotationKey
from tests.kernels.codebooks import context, rotated_codebook, single_slice_plan
from tests.kernels.reference_codec import ReferenceCodec

BOUNDS = (2**31, 2**32, 2**53, 2**63)


@pytest.mark.parametrize("bound", BOUNDS)
def test_exchange_counters_are_whole_numbers_of_64_bits(bound: int) -> None:
    """Neighbours have keys of their own, on both sides of every bound; messages equal the reference's."""
    counters = [bound - 1, bound, bound + 1]
    assert len({DitherKey.derive(1, counter, 0, 0) for counter in counters}) == 3
    assert len({RotationKey.derive(1, counter, 0) for counter in counters}) == 3
    for book in (Codebook.uniform(4), rotated_codebook("nearest", 4, 512)):
        plan = single_slice_plan(1300, book)
        codec, twin = Codec(plan, {"other": book}), ReferenceCodec(plan, {"other": book})
        values = [torch.randn(1300, generator=torch.Generator().manual_seed(1))]
        messages = {counter: codec.encode(values, context(counter=counter)) for counter in counters}
        for counter, message in messages.items():
            assert torch.equal(message, twin.encode(values, context(counter=counter)))
            codec.decode_mean([message], [context(counter=counter)])
        with pytest.raises(WireError, match="exchange counter"):
            codec.decode_mean([messages[bound]], [context(counter=bound + 1)])


@pytest.mark.parametrize("bound", BOUNDS)
def test_coordinates_are_whole_numbers_of_64_bits(bound: int) -> None:
    """A slice that lies across a bound has the reference's bits, and is rounded by other numbers than one beside it."""
    for book in (Codebook.uniform(4), rotated_codebook("stochastic", 4, 512)):
        values = [torch.randn(1300, generator=torch.Generator().manual_seed(1))]
        codes = []
        for start, offset in ((700, bound - 1400), (700, bound - 1399), (bound - 700, 0)):
            plan = single_slice_plan(1300, book, start=start, offset=offset)
            message = Codec(plan, {"other": book}).encode(values, context())
            assert torch.equal(message, ReferenceCodec(plan, {"other": book}).encode(values, context()))
            segment = plan.segments[0]
            codes.append(message[segment.codes_begin : segment.end])
        assert not torch.equal(codes[0], codes[1])
        assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("length", [2**31 + 5, 2**32 + 9])
@pytest.mark.parametrize("shares", [1, 2, 7])
def test_layouts_of_more_elements_than_2_to_the_31(length: int, shares: int) -> None:
    """Shares of a reduce-scatter, and the threads' parts, hold every coordinate and every byte once."""
    book = Codebook.uniform(2, bucket_size=8192)
    plan = MessagePlan.build([Slice("w", 0, length, torch.bfloat16, "all", 3)], {"all": book})
    assert plan.coordinates == length
    assert plan.payload_bytes >= length // 4
    next_start = 0
    for share in plan.split(shares):
        (segment,) = share.segments
        assert segment.slice.start == next_start
        next_start += segment.slice.length
    assert next_start == length
    position, codes_end = 0, plan.segments[0].codes_begin
    for runs in _cut(plan, 16):
        for group in _grouped(plan, runs):
            for part in group.parts:
                assert part[arguments.FIRST] == position
                assert part[arguments.CODES_BEGIN] == codes_end
                assert part[arguments.COORDINATE] == 3 + position
                position += int(part[arguments.LENGTH])
                codes_end = int(part[arguments.CODES_END])
    assert position == length
    assert codes_end == plan.segments[0].codes_begin + plan.segments[0].codes_bytes


def test_messages_beyond_2_gib_are_refused_by_name() -> None:
    for length in (2**33, 2**40):
        with pytest.raises(PlanError, match="too large"):
            MessagePlan.build([Slice("w", 0, length, torch.float32, "all", 0)], {"all": Codebook.uniform(4)})
