"""The codec: several segments in one message, agreement, and what is refused on arrival."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from qoda_kernels.wire import WIRE_VERSION
from qoda_kernels.worker_threads import WorkerThreads
from tests.kernels.codebooks import context, single_slice_plan

CODEBOOKS = {"convolution": Codebook.uniform(5), "output": Codebook.exponential(3), "bias": Codebook.exact()}
PARTS = [
    ("convolution", 3000, torch.float32),
    ("bias", 17, torch.float32),
    ("output", 1, torch.bfloat16),
    ("output", 0, torch.float32),
    ("bias", 5, torch.bfloat16),
    ("bias", 3, torch.float64),
    ("convolution", 700_000, torch.float16),
]


def several_segments() -> tuple[Codec, list[list[torch.Tensor]]]:
    slices, offset = [], 0
    for index, (key, length, dtype) in enumerate(PARTS):
        slices.append(Slice(f"layer{index}", 0, length, dtype, key, offset))
        offset += length
    generator = torch.Generator().manual_seed(0)
    values = [[torch.randn(n, generator=generator).to(dtype) for _, n, dtype in PARTS] for _ in range(3)]
    return Codec(MessagePlan.build(slices, CODEBOOKS), CODEBOOKS), values


def test_several_segments_in_one_message() -> None:
    codec, values = several_segments()
    contexts = [context(rank) for rank in range(3)]
    messages = [codec.encode(tensors, where) for tensors, where in zip(values, contexts, strict=True)]
    mean = codec.decode_mean(messages, contexts)
    for index, (key, length, dtype) in enumerate(PARTS):
        assert mean[index].dtype == dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exact = (values[0][index].to(wide) + values[1][index].to(wide) + values[2][index].to(wide)) * float(
            np.float32(1 / 3)
        )
        if key == "bias":
            assert torch.equal(mean[index], exact.to(dtype))
        elif length:
            error = (mean[index].float() - exact).abs().max()
            assert 0 < error < max(v[index].float().abs().max() for v in values)


def test_every_rank_decodes_the_same_bits_and_buffers_are_reused() -> None:
    codec, values = several_segments()
    contexts = [context(rank) for rank in range(3)]
    messages = [codec.encode(tensors, where) for tensors, where in zip(values, contexts, strict=True)]
    first = codec.decode_mean(messages, contexts, scale=1.0)
    buffers = [torch.full_like(tensor, 7.0) for tensor in first]
    moved = [message.clone() for message in messages]
    second = codec.decode_mean(moved, contexts, out=buffers, scale=1.0)
    for one, other, buffer in zip(first, second, buffers, strict=True):
        assert torch.equal(one, other)
        assert other is buffer
    again = codec.encode(values[0], contexts[0], out=moved[1])
    assert again is moved[1]
    assert torch.equal(again, messages[0])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(count: int) -> None:
    codec, values = several_segments()
    several = Codec(codec.plan, CODEBOOKS, WorkerThreads(count))
    contexts = [context(rank) for rank in range(3)]
    messages = [codec.encode(tensors, where) for tensors, where in zip(values, contexts, strict=True)]
    for tensors, where, message in zip(values, contexts, messages, strict=True):
        assert torch.equal(several.encode(tensors, where), message)
    for one, other in zip(codec.decode_mean(messages, contexts), several.decode_mean(messages, contexts), strict=True):
        assert torch.equal(one, other)


def test_dither_differs_between_ranks_phases_and_exchanges() -> None:
    codec = Codec(single_slice_plan(4096, CODEBOOKS["convolution"]), {"other": CODEBOOKS["convolution"]})
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    payloads = [
        codec.encode([values], where)[HEADER_BYTES:]
        for where in (context(0), context(1), context(0, phase=1), context(0, counter=4), context(0, seed=8))
    ]
    for index, one in enumerate(payloads):
        for other in payloads[index + 1 :]:
            assert (one != other).float().mean() > 0.3


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_message_is_an_error(data: st.DataObject) -> None:
    """Any flipped bit, swapped or zeroed words, or another size is a WireError and never a result."""
    codec, values = several_segments()
    message = codec.encode(values[0], context())
    kind = data.draw(st.sampled_from(["flip", "swap", "zero", "shorten", "lengthen"]))
    damaged = message.clone()
    words = damaged.view(torch.int32)
    if kind == "flip":
        damaged[data.draw(st.integers(0, message.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "swap":
        first, second = (data.draw(st.integers(0, words.numel() - 1)) for _ in range(2))
        words[[first, second]] = words[[second, first]]
    elif kind == "zero":
        begin = data.draw(st.integers(0, words.numel() - 1))
        words[begin : begin + data.draw(st.integers(1, 100))] = 0
    elif kind == "shorten":
        damaged = damaged[: -data.draw(st.integers(1, message.numel() - 1))]
    else:
        damaged = torch.cat([damaged, torch.zeros(16, dtype=torch.uint8)])
    if torch.equal(damaged, message):
        codec.decode_mean([damaged], [context()])
        return
    with pytest.raises(WireError):
        codec.decode_mean([damaged], [context()])


def test_a_message_whose_payload_and_checksum_are_zeros_is_damaged() -> None:
    codec, values = several_segments()
    message = codec.encode(values[0], context())
    message[HEADER_BYTES - 4 :] = 0
    with pytest.raises(WireError, match="payload checksum is 0"):
        codec.decode_mean([message], [context()])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"counter": 4}, "exchange counter is 3, expected 4"),
        ({"registry_version": 2}, "registry version is 0, expected 2"),
        ({"phase": 1}, "digest"),
        ({"destination": 1}, "digest"),
        ({"source": 1}, "message from source 1: digest"),
    ],
)
def test_the_wrong_message_is_named(fields: dict[str, int], words: str) -> None:
    codec, values = several_segments()
    message = codec.encode(values[0], context())
    with pytest.raises(WireError, match=words):
        codec.decode_mean([message], [context(**fields)])


def test_other_levels_plans_and_versions_are_refused() -> None:
    codec, values = several_segments()
    message = codec.encode(values[0], context())
    levels = [(j / 15) ** 2 for j in range(16)]
    others = {**CODEBOOKS, "convolution": CODEBOOKS["convolution"].with_levels(levels, 0)}
    with pytest.raises(WireError, match="digest"):
        Codec(codec.plan, others).decode_mean([message], [context()])
    message[4] = WIRE_VERSION + 1
    with pytest.raises(WireError, match=f"wire version is {WIRE_VERSION + 1}, expected {WIRE_VERSION}"):
        codec.decode_mean([message], [context()])


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    codec, values = several_segments()
    with pytest.raises(PlanError, match="6 tensors for a plan of 7"):
        codec.encode(values[0][:-1], context())
    with pytest.raises(
        PlanError, match=r"'layer0': the plan has a contiguous torch.float32 \[3000\], got torch.float16"
    ):
        codec.encode([values[0][0].half(), *values[0][1:]], context())
    with pytest.raises(PlanError, match="layer0"):
        codec.encode([torch.randn(6000)[::2], *values[0][1:]], context())
    with pytest.raises(PlanError, match="build a new plan"):
        Codec(codec.plan, {**CODEBOOKS, "convolution": Codebook.uniform(4)})
    with pytest.raises(PlanError, match="one context a message"):
        codec.decode_mean([], [])


def test_message_size_is_a_function_of_metadata_only() -> None:
    codebook = CODEBOOKS["convolution"]
    codec = Codec(single_slice_plan(5000, codebook), {"other": codebook})
    sizes = {codec.encode([values], context()).numel() for values in (torch.zeros(5000), torch.randn(5000))}
    assert sizes == {codec.plan.message_bytes}
