"""Prefix codes, bit streams and protocols: exact, optimal, short, and safe against damaged bytes."""

import heapq
import itertools
import json

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoda_kernels import bit_streams, entropy, entropy_reference, reference
from qoda_kernels.ans import AnsCode
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.errors import CodebookError, PlanError, WireError
from qoda_kernels.levels import Distribution, Moments, minimum_variance_levels, uniform_levels
from qoda_kernels.prefix_codes import MAX_WORD_BITS, PrefixCode, elias_gamma_word, huffman_code, huffman_lengths
from qoda_kernels.statistics import HistogramStatistics
from tests.kernels.codebooks import context, single_slice_plan

BITS = range(2, 9)
ByteArray = npt.NDArray[np.uint8]


def random_codes(length: int, bits: int, seed: int, decay: float = 0.3) -> ByteArray:
    """Codes with geometric levels and random signs, minus zero included."""
    rng = np.random.default_rng(seed)
    levels = np.minimum(rng.geometric(decay, length) - 1, 2 ** (bits - 1) - 1)
    return (levels | rng.integers(0, 2, length) << (bits - 1)).astype(np.uint8)


def without_minus_zero(codes: ByteArray, bits: int) -> ByteArray:
    return np.where(codes == 1 << (bits - 1), np.uint8(0), codes)


def weights_for(bits: int, decay: float = 0.3) -> list[int]:
    return [int(2**32 * (1 - decay) ** level) for level in range(2 ** (bits - 1))]


def encoded(code: entropy.SliceCode | AnsCode, packed: ByteArray, lanes: int = 32) -> ByteArray:
    out = np.full(code.maximum_bytes(packed.size), 0xAB, dtype=np.uint8)
    return out[: code.encode(packed, lanes, out)]


def decoded(code: entropy.SliceCode | AnsCode, data: ByteArray, packed_bytes: int, lanes: int = 32) -> ByteArray:
    packed = np.empty(packed_bytes, dtype=np.uint8)
    assert code.decode(data, lanes, packed) == data.size
    return packed


def heap_huffman_cost(weights: list[int]) -> int:
    """Total weight of the optimal code without limit: the sum of all merged pairs."""
    heap = list(weights)
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        cost += pair
        heapq.heappush(heap, pair)
    return cost


def kraft_sum(lengths: list[int]) -> int:
    """Sum of 2^-length in units of 2^-MAX_WORD_BITS."""
    return sum(1 << (MAX_WORD_BITS - length) for length in lengths if length)


class TestPrefixCodes:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 10**6), min_size=2, max_size=200))
    def test_huffman_lengths_are_optimal(self, weights: list[int]) -> None:
        lengths = huffman_lengths(weights, limit=len(weights))
        assert sum(w * length for w, length in zip(weights, lengths, strict=True)) == heap_huffman_cost(weights)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 1000), min_size=2, max_size=6), st.integers(3, 4))
    def test_limited_lengths_are_optimal(self, weights: list[int], limit: int) -> None:
        lengths = huffman_lengths(weights, limit)
        candidates = itertools.product(range(1, limit + 1), repeat=len(weights))
        best = min(
            sum(w * length for w, length in zip(weights, candidate, strict=True))
            for candidate in candidates
            if sum(2.0**-length for length in candidate) <= 1
        )
        assert sum(w * length for w, length in zip(weights, lengths, strict=True)) == best

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 2**60), min_size=2, max_size=256), st.integers(8, MAX_WORD_BITS))
    def test_canonical_code_is_complete_and_free_of_prefixes(self, weights: list[int], limit: int) -> None:
        code = huffman_code(weights, [True] * len(weights), limit)
        assert max(code.lengths) <= limit
        assert kraft_sum(list(code.lengths)) == 1 << MAX_WORD_BITS
        words = sorted(f"{word:0{length}b}" for word, length in zip(code.words, code.lengths, strict=True))
        assert not any(after.startswith(before) for before, after in itertools.pairwise(words))
        by_length = sorted(range(len(weights)), key=lambda s: (code.lengths[s], s))
        aligned = [code.words[s] << (limit - code.lengths[s]) for s in by_length]
        assert aligned == sorted(aligned)

    def test_equal_weights_are_ordered_by_symbol(self) -> None:
        assert huffman_lengths([1, 1, 1], 4) == [2, 2, 1]
        assert PrefixCode.canonical([2, 2, 1]).words == (0b10, 0b11, 0b0)

    def test_impossible_codes_are_refused(self) -> None:
        with pytest.raises(CodebookError, match="Kraft"):
            PrefixCode.canonical([1, 1, 1])
        with pytest.raises(CodebookError, match="5 symbols"):
            huffman_lengths([1] * 5, 2)
        with pytest.raises(CodebookError, match="no prefix code"):
            PrefixCode((), ())
        with pytest.raises(CodebookError, match="14 bits"):
            PrefixCode((0, 1), (1, 15))

    @pytest.mark.parametrize("bits", BITS)
    def test_elias_code_is_complete(self, bits: int) -> None:
        code = entropy.elias_gamma(bits)
        used = code.encode_table[np.unique(entropy._without_minus_zero(bits))]
        assert kraft_sum((used >> 16).tolist()) == 1 << MAX_WORD_BITS

    def test_elias_words(self) -> None:
        assert [elias_gamma_word(level, 8) for level in range(8)] == [
            (0b1, 1), (0b010, 3), (0b011, 3), (0b00100, 5), (0b00101, 5), (0b00110, 5), (0b00111, 5), (0b000, 3),
        ]  # fmt: skip


class TestStreams:
    @settings(max_examples=60, deadline=None)
    @given(
        length=st.one_of(st.integers(0, 40), st.integers(0, 5000)),
        bits=st.integers(2, 8),
        lanes=st.sampled_from([16, 32]),
        decay=st.floats(0.02, 0.98),
        code_decay=st.floats(0.02, 0.98),
        elias=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_round_trip_equals_reference(
        self, length: int, bits: int, lanes: int, decay: float, code_decay: float, elias: bool, seed: int
    ) -> None:
        codes = random_codes(length, bits, seed, decay)
        packed = reference.pack(codes, bits, lanes)
        code = entropy.elias_gamma(bits) if elias else entropy.huffman(bits, weights_for(bits, code_decay))
        data = encoded(code, packed, lanes)
        kept = without_minus_zero(codes, bits)
        symbols = entropy_reference.symbols_of_codes(kept, bits, lanes)
        prefix_code = prefix_code_of(code)
        assert data.tobytes() == entropy_reference.encode(symbols, prefix_code)
        np.testing.assert_array_equal(entropy_reference.decode(data.tobytes(), symbols.size, prefix_code), symbols)
        np.testing.assert_array_equal(entropy_reference.codes_of_symbols(symbols, length, bits, lanes), kept)
        np.testing.assert_array_equal(decoded(code, data, packed.size, lanes), reference.pack(kept, bits, lanes))

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("extra", [-1, 0, 1, 8, 9000])
    def test_round_trip_over_chunks(self, bits: int, extra: int) -> None:
        symbols = 2 * entropy_reference.CHUNK_SYMBOLS + extra
        codes = random_codes(symbols * entropy_reference.codes_per_symbol(bits), bits, seed=bits)
        packed = reference.pack(codes, bits, 32)
        code = entropy.huffman(bits, weights_for(bits))
        data = encoded(code, packed)
        kept = reference.pack(without_minus_zero(codes, bits), bits, 32)
        np.testing.assert_array_equal(decoded(code, data, packed.size), kept)

    def test_bytes_of_one_symbol(self) -> None:
        # One code of 5 bits, level 1, negative: eight symbols, of which the first is it and seven are zero.
        code = entropy.huffman(5, weights_for(5))
        zero, one = code.encode_table[0], code.encode_table[16 + 1]
        data = encoded(code, reference.pack(np.array([17], dtype=np.uint8), 5, 32))
        sizes = np.frombuffer(data[:8].tobytes(), dtype="<u2")
        assert sizes.tolist() == [1, 1, 1, 1]
        assert data[8] == (one & 0xFF) | (zero & 0xFF) << (one >> 16)
        assert data[12:].tolist() == [0] * entropy_reference.TAIL_BYTES

    @pytest.mark.parametrize("bits", BITS)
    def test_worst_case_fits_into_maximum(self, bits: int) -> None:
        code = entropy.huffman(bits, weights_for(bits, 0.9))
        worst = np.uint8(int(np.argmax(code.lengths)))
        symbols = np.full(3 * entropy_reference.CHUNK_SYMBOLS + 40, worst)
        lanes_of_slice = symbols.size * entropy_reference.codes_per_symbol(bits) // 8
        codes = entropy_reference.codes_of_symbols(symbols, 8 * lanes_of_slice, bits, 32)
        packed = reference.pack(codes, bits, 32)
        assert encoded(code, packed).size <= code.maximum_bytes(packed.size)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("length", [0, 1, 77, 70_001])
    def test_counted_levels_and_unpacked_codes(self, bits: int, length: int) -> None:
        codes = random_codes(length, bits, seed=length)
        packed = reference.pack(codes, bits, 16)
        counts = np.bincount(codes & (2 ** (bits - 1) - 1), minlength=2 ** (bits - 1))
        np.testing.assert_array_equal(bit_streams.count_levels(packed, length, bits, 16), counts)
        unpacked = bit_streams.unpack(packed, bits, 16)
        again = np.empty_like(packed)
        bit_streams.pack(unpacked, bits, 16, again)
        np.testing.assert_array_equal(again, packed)
        if length % 128 == 0:
            np.testing.assert_array_equal(unpacked[:length], codes)

    def test_wrong_buffers_are_refused(self) -> None:
        code = entropy.huffman(4, weights_for(4))
        packed = reference.pack(random_codes(1000, 4, 1), 4, 32)
        data = encoded(code, packed)
        with pytest.raises(PlanError, match="output"):
            code.encode(packed, 32, np.empty(code.maximum_bytes(packed.size) - 1, dtype=np.uint8))
        with pytest.raises(PlanError, match="table"):
            bit_streams.encode(packed, 5, 32, code.encode_table, np.empty(10**6, dtype=np.uint8))
        with pytest.raises(PlanError, match="contiguous"):
            code.encode(np.repeat(packed, 2)[::2], 32, np.empty(10**6, dtype=np.uint8))
        with pytest.raises(PlanError, match="contiguous"):
            code.decode(np.repeat(data, 2)[::2], 32, packed)


def prefix_code_of(code: entropy.SliceCode) -> PrefixCode:
    """The prefix code behind a slice code, first bits of words highest again."""
    lengths = np.where(entropy._is_normal(code.bits), code.lengths, 0).tolist()
    words = [
        int(f"{int(e) & 0xFFFF:0{n}b}"[::-1], 2) if n else 0 for e, n in zip(code.encode_table, lengths, strict=True)
    ]
    return PrefixCode(tuple(words), tuple(lengths))


class TestDamage:
    """Damaged bytes raise WireError, or by chance decode to other symbols; they never read or write elsewhere."""

    def check(self, code: entropy.SliceCode | AnsCode, data: ByteArray, packed_bytes: int) -> bool:
        """Decode between guard bytes; returns whether the damage was noticed."""
        guarded = np.full(packed_bytes + 128, 0x5A, dtype=np.uint8)
        before = data.copy()
        try:
            used = code.decode(data, 32, guarded[64:-64])
            noticed = False
            assert 0 < used <= data.size
        except WireError:
            noticed = True
        assert (guarded[:64] == 0x5A).all()
        assert (guarded[-64:] == 0x5A).all()
        np.testing.assert_array_equal(before, data)
        return noticed

    @pytest.mark.parametrize("bits", BITS)
    def test_flipped_bits(self, bits: int) -> None:
        rng = np.random.default_rng(bits)
        noticed = 0
        code = entropy.huffman(bits, weights_for(bits))
        for trial in range(400):
            packed = reference.pack(random_codes(int(rng.integers(1, 3000)), bits, trial), bits, 32)
            data = encoded(code, packed).copy()
            for place in rng.integers(data.size, size=rng.integers(1, 4)):
                data[place] ^= np.uint8(1 << rng.integers(8))
            noticed += self.check(code, data, packed.size)
        assert noticed > 40

    def test_directory_is_checked(self) -> None:
        code = entropy.huffman(5, weights_for(5))
        packed = reference.pack(random_codes(40_000, 5, 3), 5, 32)
        data = encoded(code, packed)
        for stream in range(12):
            for change in (-1, 1, 300, -300, 60_000):
                damaged = data.copy()
                sizes = damaged[:24].view("<u2")
                sizes[stream] = (int(sizes[stream]) + change) % 65536
                assert self.check(code, damaged, packed.size)
                if stream < 11:  # one stream's loss is the next one's gain: the end stays where it was
                    sizes[stream + 1] = (int(sizes[stream + 1]) - change) % 65536
                    assert self.check(code, damaged, packed.size)

    @pytest.mark.parametrize("length", [0, 1, 100, 20_000])
    def test_truncation(self, length: int) -> None:
        code = entropy.huffman(5, weights_for(5))
        packed = reference.pack(random_codes(length, 5, 3), 5, 32)
        data = encoded(code, packed)
        for size in {0, 1, 7, 8, data.size // 2, data.size - 8, data.size - 1} - {data.size}:
            assert self.check(code, data[:size].copy(), packed.size)

    def test_random_bytes(self) -> None:
        rng = np.random.default_rng(5)
        codes = [entropy.huffman(bits, weights_for(bits)) for bits in BITS]
        noticed = 0
        for _ in range(3000):
            code = codes[rng.integers(len(codes))]
            packed_bytes = code.bits * int(rng.integers(0, 200))
            data = rng.integers(0, 256, int(rng.integers(0, 400)), dtype=np.uint8)
            if data.size > 8:
                data[1:8:2] = 0  # sizes that may fit, so that streams are read
                data[-8:] = 0
            noticed += self.check(code, data, packed_bytes)
        assert noticed > 2500

    def test_padding_bits_must_be_zero(self) -> None:
        code = entropy.huffman(5, weights_for(5))
        data = encoded(code, reference.pack(np.array([0], dtype=np.uint8), 5, 32)).copy()
        data[8] |= 0x80
        assert self.check(code, data, 5)

    def test_stream_of_nothing(self) -> None:
        code = entropy.huffman(8, weights_for(8))
        data = encoded(code, np.zeros(1, dtype=np.uint8))  # one symbol: three streams are empty
        assert data[:8].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
        longer = np.insert(data, 9, 0)
        longer[2] = 1
        assert self.check(code, longer, 1)


class HalfNormal:
    """|N(0, s)| cut off at 1, by a fine sum: true probabilities that no statistics made."""

    def __init__(self, deviation: float, atoms: float = 0.0) -> None:
        self.points = (np.arange(200_000) + 0.5) / 200_000
        weights = np.exp(-0.5 * (self.points / deviation) ** 2)
        self.weights = weights / weights.sum()

    def cumulative_moments(self, points: npt.NDArray[np.float64]) -> Moments:
        index = np.searchsorted(self.points, points, side="right")
        sums = [np.concatenate([[0.0], np.cumsum(self.weights * self.points**power)])[index] for power in range(3)]
        return sums[0], sums[1], sums[2]

    def density(self, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        raise AssertionError("level probabilities need no density")

    def quantile(self, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        raise AssertionError("level probabilities need no quantiles")


TYPES: tuple[tuple[int, float, Distribution], ...] = (
    (4, 0.6, HalfNormal(0.08)),
    (4, 0.3, HalfNormal(0.3)),
    (5, 0.1, HalfNormal(0.02)),
)


class TestLengths:
    def test_level_probabilities_are_the_formula(self) -> None:
        distribution = HalfNormal(0.3)
        levels = np.array([0.0, 0.1, 0.35, 1.0])
        expected = np.zeros(4)
        for u, weight in zip(distribution.points, distribution.weights, strict=True):
            j = int(np.searchsorted(levels, u, side="right")) - 1
            share = (u - levels[j]) / (levels[j + 1] - levels[j])
            expected[j] += weight * (1 - share)
            expected[j + 1] += weight * share
        np.testing.assert_allclose(entropy.level_probabilities(levels, distribution), expected, rtol=1e-9)

    def test_coordinates_at_zero_and_one_count(self) -> None:
        values = np.zeros(512, dtype=np.float32)
        values[:128] = 2.0
        statistics = HistogramStatistics.gather(values, 512, "max")
        np.testing.assert_allclose(entropy.level_probabilities(uniform_levels(3), statistics), [0.75, 0, 0, 0.25])

    def test_without_statistics_all_levels_are_equal(self) -> None:
        weights = entropy.level_weights(uniform_levels(4), HistogramStatistics.empty())
        assert weights == (entropy.WEIGHT_TOTAL // 8,) * 8

    def test_bounds_with_true_probabilities(self) -> None:
        """Code lengths of both protocols stay below their bounds, and are measured as expected.

        Three types of 4 and 5 bits, entropy 1.955: bounds 2.955 and 4.250, codes 2.026 and 2.776 bits per coordinate.
        """
        total = 300_000
        rng = np.random.default_rng(11)
        own: list[tuple[float, npt.NDArray[np.float64]]] = []
        for bits, share, distribution in TYPES:
            own.append((share, entropy.level_probabilities(uniform_levels(bits), distribution)))
        weights = [np.rint(p * 2**32).astype(np.int64).tolist() for _, p in own]
        counts = [int(total * share) for share, _ in own]
        main = entropy.main_protocol({str(m): (TYPES[m][0], weights[m]) for m in range(3)})
        shared = entropy.alternating_protocol({str(m): (TYPES[m][0], weights[m], counts[m]) for m in range(3)})
        main_bits = shared_bits = 0
        expected_main = expected_shared = 0.0
        for m, (share, p) in enumerate(own):
            bits = TYPES[m][0]
            levels = rng.choice(p.size, size=counts[m], p=p)
            codes = (levels | rng.integers(0, 2, counts[m]) << (bits - 1)).astype(np.uint8)
            packed = reference.pack(codes, bits, 32)
            main_bits += 8 * encoded(main[str(m)], packed).size
            shared_bits += 8 * encoded(shared[str(m)], packed).size
            expected_main += share * main[str(m)].expected_length(p)
            expected_shared += share * shared[str(m)].expected_length(p)
            np.testing.assert_array_equal(
                decoded(shared[str(m)], encoded(shared[str(m)], packed), packed.size),
                reference.pack(without_minus_zero(codes, bits), bits, 32),
            )
        assert main_bits / total == pytest.approx(expected_main, rel=0.005)
        assert shared_bits / total == pytest.approx(expected_shared, rel=0.005)
        assert main_bits / total < entropy.main_bound(own)
        assert shared_bits / total < entropy.alternating_bound(own)
        entropies = sum(share * entropy.coordinate_entropy(p) for share, p in own)
        assert entropies <= expected_main < expected_shared
        assert [entropies, entropy.main_bound(own), expected_main] == pytest.approx([1.955, 2.955, 2.026], abs=1e-3)
        assert [entropy.alternating_bound(own), expected_shared] == pytest.approx([4.250, 2.776], abs=1e-3)

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("deviation", [0.05, 0.1, 0.3, 1.0])
    def test_bounds_for_single_types(self, bits: int, deviation: float) -> None:
        p = entropy.level_probabilities(uniform_levels(bits), HalfNormal(deviation))
        code = entropy.huffman(bits, np.rint(p * 2**32).astype(np.int64).tolist())
        assert entropy.coordinate_entropy(p) <= code.expected_length(p) + 1e-9
        assert code.expected_length(p) < entropy.main_bound([(1.0, p)])

    @pytest.mark.parametrize("bits", range(3, 9))
    @pytest.mark.parametrize("kind", ["gauss", "laplace", "t3"])
    def test_length_is_within_2_5_percent_of_entropy(self, bits: int, kind: str) -> None:
        rng = np.random.default_rng(1)
        size = 1 << 19
        draw = {"gauss": rng.standard_normal(size), "laplace": rng.laplace(size=size), "t3": rng.standard_t(3, size)}
        values = draw[kind].astype(np.float32)
        adapted = minimum_variance_levels(HistogramStatistics.gather(values, 512, "max"), bits)
        for codebook in (Codebook.uniform(bits), Codebook(bits, tuple(adapted.tolist()))):
            packed = quantized(values, codebook)
            counts = bit_streams.count_levels(packed, size, bits, 32)
            measured = 8 * encoded(entropy.huffman(bits, counts.tolist()), packed).size / size
            limit = entropy.coordinate_entropy(counts / size)
            assert limit <= measured * 1.001  # a sample's entropy, and neighbours share a norm
            assert measured <= 1.025 * limit

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.floats(0.1, 10.0))
    def test_stale_tables_cost_the_divergence(self, seed: int, concentration: float) -> None:
        """Where assumed probabilities q are powers of two, words have -log2 q bits: the cost is D(p || q) exactly."""
        assumed = np.array([2.0**-j for j in range(1, 9)] + [2.0**-11] * 8)
        assert assumed.sum() == 1.0
        code = entropy.huffman(5, (assumed * 2**20).astype(int).tolist())
        true = np.random.default_rng(seed).dirichlet(np.full(16, concentration))
        extra = code.expected_length(true) - entropy.coordinate_entropy(true)
        assert extra == pytest.approx(entropy.stale_penalty(true, assumed), abs=1e-9)

    def test_stale_penalty_of_impossible_levels_is_infinite(self) -> None:
        assert entropy.stale_penalty([0.5, 0.5], [1.0, 0.0]) == np.inf
        assert entropy.stale_penalty([1.0, 0.0], [0.5, 0.5]) == 1.0


def quantized(values: npt.NDArray[np.float32], codebook: Codebook) -> ByteArray:
    """Lane-planar codes of values."""
    plan = single_slice_plan(values.size, codebook)
    message = Codec(plan, {"other": codebook}).encode([torch.from_numpy(values)], context())
    segment = plan.segments[0]
    return message.numpy()[segment.codes_begin : segment.codes_begin + segment.codes_bytes]


class TestProtocols:
    def test_ranks_with_merged_statistics_build_the_same_code(self) -> None:
        rng = np.random.default_rng(4)
        parts = [HistogramStatistics.gather(rng.laplace(size=4096).astype(np.float32), 512, "max") for _ in range(4)]
        codes = []
        for _ in range(4):
            sent = [HistogramStatistics.from_array(part.to_array()) for part in parts]
            weights = entropy.level_weights(uniform_levels(5), HistogramStatistics.merge_in_order(sent))
            weights = tuple(json.loads(json.dumps(weights)))
            codes.append(entropy.alternating_protocol({"a": (5, weights, 100), "b": (3, (5, 3, 1, 1), 9)}))
        assert len({code["a"].digest for code in codes}) == len({code["b"].digest for code in codes}) == 1
        other = entropy.alternating_protocol({"a": (5, weights, 10), "b": (3, (5, 3, 1, 1), 900)})
        assert other["a"].digest != codes[0]["a"].digest

    @pytest.mark.parametrize("bits", BITS)
    def test_levels_never_seen_have_words(self, bits: int) -> None:
        weights = [1] + [0] * (2 ** (bits - 1) - 1)
        code = entropy.huffman(bits, weights)
        codes = without_minus_zero(np.arange(1 << bits, dtype=np.uint8), bits)
        packed = reference.pack(codes, bits, 32)
        np.testing.assert_array_equal(decoded(code, encoded(code, packed), packed.size), packed)
        assert code.lengths.max() <= entropy.LONGEST_WORD
        assert code.lengths[0] == 1

    def test_words_of_another_type_are_damage(self) -> None:
        codes = entropy.alternating_protocol({"a": (5, weights_for(5), 5000), "b": (5, weights_for(5, 0.6), 4000)})
        packed = reference.pack(random_codes(4000, 5, 1), 5, 32)
        data = encoded(codes["a"], packed)
        with pytest.raises(WireError, match="damaged"):
            decoded(codes["b"], data, packed.size)

    def test_pairs_share_one_prefix_code(self) -> None:
        types = {"a": (8, weights_for(8), 5000), "b": (2, [5, 1], 4000), "c": (3, weights_for(3), 0)}
        codes = entropy.alternating_protocol(types)
        used = [code.encode_table[np.unique(entropy._without_minus_zero(code.bits))] for code in codes.values()]
        assert kraft_sum((np.concatenate(used) >> 16).tolist()) == 1 << MAX_WORD_BITS
        assert codes["a"].decode_table.size == 1 << int(max(code.lengths.max() for code in codes.values()))

    def test_wrong_weights_are_refused(self) -> None:
        with pytest.raises(CodebookError, match="8 level weights"):
            entropy.huffman(4, [1, 2, 3])
        with pytest.raises(CodebookError, match="level weights >= 0"):
            entropy.huffman(2, [1, -2])
        with pytest.raises(CodebookError, match="coordinates"):
            entropy.alternating_protocol({"a": (2, [1, 1], -1)})
        with pytest.raises(CodebookError, match="probabilities"):
            entropy.symbol_probabilities([0.5, 0.5], 4)

    def test_padded_sizes_are_few_and_near(self) -> None:
        sizes = {entropy.padded_size(size) for size in range(1 << 16, 1 << 17)}
        assert len(sizes) <= entropy.SIZE_STEPS + 1
        for size in [0, 1, 255, 256, 257, 12_345, 2**20 - 1, 2**20, 2**20 + 1, 2**31 - 1]:
            padded = entropy.padded_size(size)
            assert size <= padded <= max(256, size * (1 + 1 / 32) + 1)
            assert entropy.padded_size(padded) == padded
            assert padded % 8 == 0


class TestAns:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("constriction")

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("length", [0, 1, 9, 200_000])
    def test_round_trip_at_the_entropy(self, bits: int, length: int) -> None:
        codes = random_codes(length, bits, seed=3)
        packed = reference.pack(codes, bits, 32)
        counts = bit_streams.count_levels(packed, length, bits, 32)
        code = AnsCode.of_weights(bits, counts.tolist())
        data = encoded(code, packed)
        kept = reference.pack(without_minus_zero(codes, bits), bits, 32)
        np.testing.assert_array_equal(decoded(code, data, packed.size), kept)
        if length > 1000:
            assert 8 * data.size / length <= 1.003 * entropy.coordinate_entropy(counts / length)

    def test_damage(self) -> None:
        rng = np.random.default_rng(9)
        packed = reference.pack(random_codes(2000, 5, 1), 5, 32)
        code = AnsCode.of_weights(5, weights_for(5))
        data = encoded(code, packed)
        for _ in range(200):
            damaged = data.copy()
            damaged[rng.integers(data.size)] ^= np.uint8(1 << rng.integers(8))
            TestDamage().check(code, damaged, packed.size)
        for size in (0, 3, 4, data.size - 4):
            assert TestDamage().check(code, data[:size].copy(), packed.size)


@pytest.mark.parametrize("bits", BITS)
def test_expected_bits_of_coded_coordinates(bits: int) -> None:
    weights = weights_for(bits)
    code = entropy.huffman(bits, weights)
    expected = code.expected_length(np.array(weights) / sum(weights))
    assert entropy.coded_bits(bits, weights) == pytest.approx(expected, rel=1e-12)


@given(exponent=st.floats(0.0, 10.0))
def test_powers_of_four_are_near(exponent: float) -> None:
    assert entropy.power_of_four(exponent) == pytest.approx(4.0**exponent, rel=0.012)
    assert entropy.power_of_four(round(exponent)) == 4.0 ** round(exponent)


def test_ans_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(CodebookError, match="pip install constriction"):
        AnsCode.of_weights(2, [1, 1])
