"""Whole messages, entropy-coded: restored but for minus zeros, in few sizes, or refused."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qoda_kernels import bit_streams, entropy
from qoda_kernels.ans import AnsCode
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.coded_message import MessageCoder
from qoda_kernels.errors import PlanError, WireError
from qoda_kernels.layout import HEADER_BYTES, MessagePlan, Slice
from tests.kernels.codebooks import context

CODEBOOKS = {
    "wide": Codebook.uniform(5),
    "narrow": Codebook.exponential(3, bucket_size=128, norm_format="bf16"),
    "off": Codebook.exact(),
}
WEIGHTS = {"wide": [2 ** (20 - j) for j in range(16)], "narrow": [4, 3, 2, 1]}
CODES = {key: entropy.huffman(CODEBOOKS[key].bits, weights) for key, weights in WEIGHTS.items()}


def make_plan(*lengths: int) -> MessagePlan:
    keys = ("wide", "narrow", "off")
    slices = [Slice(f"p{i}", 0, n, torch.float32, keys[i % 3], 10_000 * i) for i, n in enumerate(lengths)]
    return MessagePlan.build(slices, CODEBOOKS)


def message_of(plan: MessagePlan, seed: int) -> npt.NDArray[np.uint8]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(segment.slice.length, generator=generator) for segment in plan.segments]
    return Codec(plan, CODEBOOKS).encode(values, context(0)).numpy()


def coded(coder: MessageCoder, message: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    out = np.full(coder.maximum_bytes, 0xAB, dtype=np.uint8)
    return out[: coder.encode(message, out)].copy()


PLANS = ((), (0,), (5000, 3000, 50), (1, 4096, 7, 20_000, 0, 3, 100, 513), (70_001, 2, 2, 300, 129))


@pytest.mark.parametrize("lengths", PLANS)
def test_restored_message_differs_in_minus_zeros_only(lengths: tuple[int, ...]) -> None:
    plan = make_plan(*lengths)
    coder = MessageCoder(plan, CODES)
    message = message_of(plan, seed=len(lengths))
    short = coded(coder, message)
    assert short.size == entropy.padded_size(short.size) <= coder.maximum_bytes
    restored = np.full_like(message, 0xAB)
    coder.decode(short, restored)
    for segment in plan.segments:
        before = message[segment.begin : segment.end]
        after = restored[segment.begin : segment.end]
        np.testing.assert_array_equal(before[: segment.norms_bytes], after[: segment.norms_bytes])
        if segment.format.is_exact or segment.slice.codebook == "off":
            np.testing.assert_array_equal(before, after)
        elif segment.codes_bytes:
            codes = [
                bit_streams.unpack(
                    data[segment.codes_begin : segment.codes_begin + segment.codes_bytes].copy(),
                    segment.format.bits,
                    segment.format.lanes,
                )
                for data in (message, restored)
            ]
            minus_zero = 1 << (segment.format.bits - 1)
            different = codes[0] != codes[1]
            assert (codes[0][different] == minus_zero).all()
            assert (codes[1][different] == 0).all()
            assert not after[segment.norms_bytes + segment.codes_bytes :].any()
    twice = np.empty_like(message)
    coder.decode(coded(coder, restored), twice)
    np.testing.assert_array_equal(twice, restored)


def test_large_messages_become_shorter() -> None:
    plan = make_plan(200_000, 100_000)
    message = message_of(plan, seed=1)
    counts = {
        segment.slice.codebook: bit_streams.count_levels(
            message[segment.codes_begin : segment.codes_begin + segment.codes_bytes],
            segment.slice.length,
            segment.format.bits,
            segment.format.lanes,
        ).tolist()
        for segment in plan.segments
    }
    codes = {key: entropy.huffman(CODEBOOKS[key].bits, counts[key]) for key in counts}
    assert coded(MessageCoder(plan, codes), message).size < 0.95 * message.size


def test_sizes_hardly_change_between_steps() -> None:
    plan = make_plan(50_000, 30_000)
    coder = MessageCoder(plan, CODES)
    assert len({coded(coder, message_of(plan, seed)).size for seed in range(20)}) <= 2


def test_segments_without_code_are_copied() -> None:
    plan = make_plan(5000, 3000, 50)
    message = message_of(plan, seed=2)
    short = coded(MessageCoder(plan, {}), message)
    np.testing.assert_array_equal(short[: message.size], message)


@pytest.mark.parametrize("kind", ["main", "alternating"])
def test_damage_is_noticed_or_harmless(kind: str) -> None:
    """Without the header's checksum, which catches the rest: no crash, and no message of another size."""
    plan = make_plan(9000, 5000, 40)
    types = {key: (CODEBOOKS[key].bits, WEIGHTS[key], 5000) for key in WEIGHTS}
    coder = MessageCoder(plan, CODES if kind == "main" else entropy.alternating_protocol(types))
    short = coded(coder, message_of(plan, seed=3))
    rng = np.random.default_rng(6)
    noticed = 0
    for _ in range(1500):
        damaged = short.copy()
        damaged[rng.integers(HEADER_BYTES, short.size)] ^= np.uint8(1 << rng.integers(8))
        restored = np.empty(plan.message_bytes, dtype=np.uint8)
        try:
            coder.decode(damaged, restored)
        except WireError:
            noticed += 1
    assert noticed > (100 if kind == "main" else 500)


def test_truncated_and_lengthened_messages() -> None:
    plan = make_plan(9000, 5000, 40)
    coder = MessageCoder(plan, CODES)
    short = coded(coder, message_of(plan, seed=3))
    used = int(np.flatnonzero(short)[-1]) + 1
    restored = np.empty(plan.message_bytes, dtype=np.uint8)
    for size in [0, 31, 32, 100, 3000, used - 161, used - 5, used - 1]:
        with pytest.raises(WireError):
            coder.decode(short[:size].copy(), restored)
    coder.decode(np.concatenate([short, np.zeros(64, dtype=np.uint8)]), restored)
    with pytest.raises(WireError, match="behind"):
        coder.decode(np.concatenate([short, np.ones(1, dtype=np.uint8)]), restored)


def test_wrong_buffers_and_codes_are_refused() -> None:
    plan = make_plan(9000, 5000)
    coder = MessageCoder(plan, CODES)
    message = message_of(plan, seed=3)
    with pytest.raises(PlanError, match="buffers"):
        coder.encode(message[:-1], np.empty(coder.maximum_bytes, dtype=np.uint8))
    with pytest.raises(PlanError, match="buffers"):
        coder.encode(message, np.empty(coder.maximum_bytes - 1, dtype=np.uint8))
    with pytest.raises(PlanError, match="buffer"):
        coder.decode(message, np.empty(plan.message_bytes + 1, dtype=np.uint8))
    with pytest.raises(PlanError, match="5 bits"):
        MessageCoder(plan, {"wide": CODES["narrow"]})


def test_ans_is_a_code_like_any_other() -> None:
    pytest.importorskip("constriction")
    plan = make_plan(9000, 5000)
    coder = MessageCoder(plan, {key: AnsCode.of_weights(CODEBOOKS[key].bits, WEIGHTS[key]) for key in WEIGHTS})
    message = message_of(plan, seed=4)
    restored, by_huffman = np.empty_like(message), np.empty_like(message)
    coder.decode(coded(coder, message), restored)
    huffman = MessageCoder(plan, CODES)
    huffman.decode(coded(huffman, message), by_huffman)
    np.testing.assert_array_equal(restored, by_huffman)
