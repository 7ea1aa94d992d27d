import copy
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.coded_message import CodedMessages
from qoda_kernels.entropy import coded_bits, coordinate_entropy
from qoda_kernels.errors import CodebookError, RegistryError
from qoda_kernels.gaussian import level_probabilities, nearest_codebook, relative_error, stochastic_codebook
from qoda_kernels.levels import exponential_levels, quantization_variance, uniform_levels
from qoda_kernels.registry import CodebookRegistry, LayerRule, LayerSettings, differences
from qoda_kernels.statistics import HistogramStatistics
from tests.kernels.codebooks import context, single_slice_plan

UNIFORM = LayerSettings(levels="uniform")


class SquareDensity:
    """Density 3 (1 - u)^2 on (0, 1): small magnitudes are common, as in gradients."""

    def cumulative_moments(self, points):
        u = np.asarray(points, dtype=np.float64)
        return (
            u**3 - 3 * u**2 + 3 * u,
            3 * (u**2 / 2 - 2 * u**3 / 3 + u**4 / 4),
            3 * (u**3 / 3 - u**4 / 2 + u**5 / 5),
        )

    def density(self, points):
        return 3 * (1 - np.asarray(points, dtype=np.float64)) ** 2

    def quantile(self, weights):
        return 1 - np.cbrt(1 - np.clip(weights, 0.0, 1.0))


class Empty(SquareDensity):
    def cumulative_moments(self, points):
        zeros = np.zeros_like(np.asarray(points, dtype=np.float64))
        return zeros, zeros, zeros


def model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),  # 144 weights: below the threshold
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 3),  # 4608
        nn.Conv2d(32, 32, 3),  # 9216
        nn.Linear(64, 64),
        nn.Linear(64, 32),
    )


def test_defaults():
    registry = CodebookRegistry.build(model())
    assert {name: entry.codebook for name, entry in registry.parameters.items()} == {
        "0.weight": "convolution/32bit",
        "0.bias": "bias",
        "1.weight": "norm",
        "1.bias": "bias",
        "2.weight": "convolution",
        "2.bias": "bias",
        "3.weight": "convolution",
        "3.bias": "bias",
        "4.weight": "feed_forward",
        "4.bias": "bias",
        "5.weight": "output",
        "5.bias": "bias",
    }
    uniform = Codebook.uniform(5, bucket_size=512, norm="max")
    exact = Codebook.exact()
    assert dict(registry.codebooks) == {
        "convolution/32bit": exact,
        "bias": exact,
        "norm": exact,
        "convolution": uniform,
        "feed_forward": uniform,
        "output": uniform,
    }
    assert registry.adaptive_keys == ("convolution", "feed_forward", "output")
    assert registry.version == 0
    assert registry.numel == sum(parameter.numel() for parameter in model().parameters())


def test_entries_carry_shape_dtype_and_cumulative_offsets():
    network = model().to(torch.bfloat16)
    registry = CodebookRegistry.build(network)
    offset = 0
    for name, parameter in network.named_parameters():
        entry = registry.parameters[name]
        assert (entry.name, entry.shape, entry.dtype) == (name, tuple(parameter.shape), torch.bfloat16)
        assert (entry.numel, entry.offset) == (parameter.numel(), offset)
        offset += parameter.numel()


def test_freezing_a_parameter_moves_no_other():
    network = model()
    before = CodebookRegistry.build(network)
    network[2].weight.requires_grad_(False)
    assert CodebookRegistry.build(network).parameters == before.parameters


def test_offsets_beyond_32_bits():
    pairs = [(f"{name}.weight", torch.empty(1 << 17, 1 << 15, device="meta")) for name in "ab"]
    registry = CodebookRegistry.build(pairs)
    assert registry.parameters["b.weight"].offset == 1 << 32


def test_min_numel_is_the_first_size_that_is_compressed():
    def keys(min_numel):
        return CodebookRegistry.build(model(), min_numel=min_numel).parameters

    assert keys(4608)["2.weight"].codebook == "convolution"
    assert keys(4609)["2.weight"].codebook == "convolution/32bit"
    assert keys(0)["0.weight"].codebook == "convolution"


def test_user_rules_beat_default_rules_and_later_ones_earlier():
    rules = [LayerRule(name="*.bias", bits=8), LayerRule(type="convolution", bits=4), LayerRule(name="3.*", bits=6)]
    registry = CodebookRegistry.build(model(), UNIFORM, rules)
    bits = {name: registry.codebooks[entry.codebook].bits for name, entry in registry.parameters.items()}
    assert bits == {
        "0.weight": 4,
        "0.bias": 8,
        "1.weight": 32,
        "1.bias": 8,
        "2.weight": 4,
        "2.bias": 8,
        "3.weight": 6,
        "3.bias": 6,
        "4.weight": 5,
        "4.bias": 8,
        "5.weight": 5,
        "5.bias": 8,
    }


def test_rules_merge_field_by_field():
    rules = [LayerRule(type="convolution", bucket_size=1024), LayerRule(type="convolution", norm="l2")]
    codebooks = CodebookRegistry.build(model(), LayerSettings(bits=6, levels="uniform"), rules).codebooks
    assert codebooks["convolution"] == Codebook.uniform(6, bucket_size=1024, norm="l2")
    assert codebooks["convolution/32bit"] == Codebook.exact()


def test_keys_of_a_split_type_are_unique_and_say_what_differs():
    weights = [(f"l{i}.weight", torch.empty(64, 64 + i)) for i in range(8)] + [("head.weight", torch.empty(8, 256))]
    levels = tuple(float(level) for level in uniform_levels(5) ** 2)
    rules = [
        LayerRule(name="l0.*", bits=8),
        LayerRule(name="l1.*", bits=8, bucket_size=1024),
        LayerRule(name="l2.*", norm="l2"),
        LayerRule(name="l3.*", norm_format="bf16", levels="exponential"),
        LayerRule(name="l4.*", levels=levels),
        LayerRule(name="l5.*", bits=32, bucket_size=128),
    ]
    registry = CodebookRegistry.build(weights, UNIFORM, rules)
    keys = [registry.parameters[name].codebook for name, _ in weights]
    assert keys[:4] == [
        "feed_forward/8bit",
        "feed_forward/8bit-bucket1024",
        "feed_forward/5bit-l2",
        "feed_forward/5bit-bf16-exponential",
    ]
    assert keys[4].startswith("feed_forward/5bit-explicit-")
    assert keys[5:] == ["feed_forward/32bit", "feed_forward", "feed_forward", "output"]
    assert len(registry.codebooks) == 8
    assert registry.codebooks[keys[4]].levels == tuple(np.asarray(levels, np.float32).tolist())
    assert registry.codebooks[keys[1]] == Codebook.uniform(8, bucket_size=1024)


def test_most_of_the_compressed_elements_keep_the_plain_key():
    registry = CodebookRegistry.build(model(), UNIFORM, [LayerRule(name="3.weight", bits=8)])
    assert registry.parameters["3.weight"].codebook == "convolution"
    assert registry.parameters["2.weight"].codebook == "convolution/5bit"


def test_compressed_elements_keep_the_plain_key_even_when_most_are_exact():
    registry = CodebookRegistry.build(model(), UNIFORM, [LayerRule(name="3.weight", bits=32)])
    assert registry.parameters["2.weight"].codebook == "convolution"
    assert registry.parameters["3.weight"].codebook == "convolution/32bit"


def test_as_type_assigns_before_other_rules_look():
    rules = [
        LayerRule(type="router", bits=8),
        LayerRule(type="feed_forward", as_type="attention", norm="l2"),
        LayerRule(name="5.weight", as_type="router"),
        LayerRule(type="attention", bits=3),
    ]
    registry = CodebookRegistry.build(model(), UNIFORM, rules)
    assert registry.parameters["4.weight"].layer_type == "attention"
    assert registry.parameters["5.weight"].layer_type == "router"
    assert registry.codebooks["attention"] == Codebook.uniform(3, norm="l2")
    assert registry.codebooks["router"] == Codebook.uniform(8)
    assert "feed_forward" not in registry.codebooks


def test_dtypes_that_cannot_be_quantized_travel_exact_against_every_rule():
    pairs = [
        ("a.weight", torch.empty(64, 64, dtype=torch.float64)),
        ("b.weight", torch.empty(64, 64, dtype=torch.int64)),
        ("c.weight", torch.empty(64, 64, dtype=torch.complex64)),
        ("d.weight", torch.empty(64, 64, dtype=torch.float16)),
    ]
    registry = CodebookRegistry.build(pairs, rules=[LayerRule(name="*", bits=4)])
    exact = [registry.codebooks[entry.codebook].is_exact for entry in registry.parameters.values()]
    assert exact == [True, True, True, False]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            LayerRule(name="*.bais", bits=8),
            r"layers\[1\] .*no name fits '\*\.bais'.*nearest parameter name is '.*\.bias'",
        ),
        (LayerRule(name="4.wieght", bits=8), r"nearest parameter name is '4\.weight'"),
        (LayerRule(type="convolutoin", bits=8), r"none has type 'convolutoin'; did you mean 'convolution'\?"),
        (
            LayerRule(type="embedding", bits=8),
            r"the types of this model are convolution, bias, norm, feed_forward, output",
        ),
        (LayerRule(type="convolution", min_numel=10**6, bits=8), r"select have 144 to 9216 elements"),
        (LayerRule(max_numel=3, bits=8), r"select have 16 to 9216 elements"),
        (LayerRule(type="convolution", name="4.*", bits=8), r"type 'convolution' has a name that fits '4\.\*'"),
        (LayerRule(type="attention", as_type="output"), r"none has type 'attention'"),
    ],
)
def test_rule_that_matches_nothing(rule, message):
    with pytest.raises(RegistryError, match=message):
        CodebookRegistry.build(model(), rules=[LayerRule(type="convolution", bits=4), rule])


def test_rule_on_a_model_without_parameters():
    assert CodebookRegistry.build(nn.ReLU()).numel == 0
    with pytest.raises(RegistryError, match="the model has none"):
        CodebookRegistry.build(nn.ReLU(), rules=[LayerRule(type="bias", bits=8)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, "selects no parameters"),
        ({"type": "bias"}, "changes nothing"),
        ({"min_numel": 3, "max_numel": 2, "bits": 8}, "min_numel is larger than max_numel"),
        ({"type": "bias", "as_type": "Big/Bias"}, "lower-case"),
    ],
)
def test_impossible_rules(fields, message):
    with pytest.raises(RegistryError, match=message):
        LayerRule(**fields)


def test_rule_round_trip():
    rule = LayerRule(name="*.weight", min_numel=7, bits=2, levels=[0, 1])
    assert LayerRule(**json.loads(json.dumps(rule.to_dict()))) == rule


def test_impossible_settings_name_the_parameter():
    with pytest.raises(RegistryError, match=r"parameter '4\.weight': bits must be"):
        CodebookRegistry.build(model(), rules=[LayerRule(name="4.weight", bits=9)])
    levels = tuple(uniform_levels(5).tolist())
    with pytest.raises(RegistryError, match=r"parameter '4\.weight': .*128 levels"):
        CodebookRegistry.build(model(), LayerSettings(levels=levels), [LayerRule(name="4.weight", bits=8)])
    with pytest.raises(CodebookError, match="uniform, exponential, adaptive"):
        LayerSettings(levels="unifrom").codebook()


@pytest.mark.parametrize(
    ("bits", "norm", "expected"),
    [
        (4, "max", exponential_levels),
        (5, "max", uniform_levels),
        (6, "l2", exponential_levels),
        (7, "l2", uniform_levels),
    ],
)
def test_start_of_adaptive_levels(bits, norm, expected):
    assert LayerSettings(bits=bits, norm=norm).codebook().levels == tuple(expected(bits).tolist())


def test_fixed_schemes():
    assert LayerSettings(bits=8, levels="exponential").codebook() == Codebook.exponential(8)
    assert LayerSettings(bits=3, levels="uniform").codebook() == Codebook.uniform(3)
    assert LayerSettings(bits=32, levels="uniform", bucket_size=1024).codebook() == Codebook.exact()


def test_rotated_codebooks_are_those_for_normal_coordinates_and_never_change():
    rotated = CodebookRegistry.build(model(), LayerSettings(bits=4, rotation="hadamard", rounding="nearest"))
    assert rotated.codebooks["convolution"] == nearest_codebook(4, False, 512, "fp32")
    assert rotated.adaptive_keys == ()
    assert rotated.restored(json.loads(json.dumps(rotated.state_dict()))).digest == rotated.digest
    unbiased = LayerSettings(bits=5, rotation="hadamard", bucket_size=1024, norm_format="bf16")
    assert unbiased.codebook() == stochastic_codebook(5, 1024, "bf16")
    assert LayerSettings(bits=4, rotation="hadamard", levels="uniform").codebook().levels == Codebook.uniform(4).levels
    with pytest.raises(RegistryError, match="rotation none in this model, hadamard in the saved state"):
        CodebookRegistry.build(model(), LayerSettings(bits=4)).restored(rotated.state_dict())
    rules = [LayerRule(name="2.weight", rounding="nearest")]
    keys = CodebookRegistry.build(model(), LayerSettings(rotation="hadamard"), rules).codebooks
    assert keys["convolution/5bit-nearest"].rounding == "nearest"
    assert keys["convolution"].rounding == "stochastic"


def histogram_of(values):
    return HistogramStatistics.gather(values.astype(np.float32), 512, "max")


@pytest.mark.parametrize(
    ("rounding", "is_stratified", "dense"),
    [("nearest", False, "nearest"), ("nearest", True, "nearest"), ("stochastic", False, "stochastic")],
)
def test_the_best_is_chosen_for_each_type(rounding, is_stratified, dense):
    """Heavy tails are rotated; a few values of equal size among zeros lie on levels, and are not."""
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random(50_000) < 0.02, 1.0, 0.0)
    heavy = rng.standard_t(3, 50_000)
    settings = LayerSettings(bits=4, levels="best", rounding=rounding, is_stratified=is_stratified)
    start = CodebookRegistry.build(model(), settings)
    assert {book.rotation for key, book in start.codebooks.items() if not book.is_exact} == {"hadamard"}
    first, second = start.adaptive_keys[:2]
    after = start.updated({first: histogram_of(sparse), second: histogram_of(heavy)})
    assert after.codebooks[first].rotation == "none"
    assert (after.codebooks[second].rotation, after.codebooks[second].rounding) == ("hadamard", dense)
    assert start.restored(json.loads(json.dumps(after.state_dict()))).digest == after.digest
    swapped = after.updated({first: histogram_of(heavy), second: histogram_of(sparse)})
    assert swapped.codebooks[first].rotation == "hadamard"
    assert swapped.codebooks[second].rotation == "none"
    with pytest.raises(CodebookError, match="choose the rotation themselves"):
        LayerSettings(levels="best", rotation="hadamard").codebook()


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_codes_of_rotated_buckets_rounded_to_nearest_come_near_their_entropy(bits):
    settings = LayerSettings(bits, levels="uniform", rotation="hadamard", rounding="nearest")
    (book,) = CodebookRegistry.build([("w", torch.zeros(64, 512))], settings, coding="huffman").codebooks.values()
    gradient = torch.from_numpy(np.random.default_rng(1).standard_t(3, 64 * 512).astype(np.float32))
    codec = Codec(single_slice_plan(gradient.numel(), book), {"other": book})
    coded = CodedMessages(codec, {"other": book})
    out = torch.empty(coded.maximum_bytes, dtype=torch.uint8)
    sent = coded.shorten(codec.encode([gradient], context()), context(), out)
    expected = coordinate_entropy(level_probabilities(book)) + 32 / 512  # and the norms
    assert 8 * sent / gradient.numel() < 1.06 * expected


def test_the_best_is_chosen_by_the_error_per_bit_where_messages_are_coded():
    """Equal steps have larger errors and shorter codes: with fixed length they lose, coded they win."""
    statistics = histogram_of(np.random.default_rng(0).standard_t(3, 50_000))
    chosen = {}
    for coding in ("fixed", "huffman"):
        for rounding in ("stochastic", "nearest"):
            settings = LayerSettings(bits=5, levels="best", rounding=rounding)
            start = CodebookRegistry.build([("w", torch.zeros(100, 500))], settings, coding=coding)
            after = start.updated(dict.fromkeys(start.adaptive_keys, statistics))
            (chosen[coding, rounding],) = after.codebooks.values()
            assert start.restored(json.loads(json.dumps(after.state_dict()))).digest == after.digest
    fixed, coded = chosen["fixed", "nearest"], chosen["huffman", "nearest"]
    assert (fixed.rounding, coded.rounding) == ("nearest", "nearest")
    assert coded.levels == nearest_codebook(5, True, 512, "fp32").levels
    bits = coded_bits(5, coded.weights)
    assert bits < 4.0
    assert relative_error(coded) * 4**bits < 0.6 * relative_error(fixed) * 4**5
    assert chosen["huffman", "stochastic"].rounding == "stochastic"
    assert chosen["huffman", "stochastic"].weights


def test_tensor_under_two_names_is_refused():
    weight = torch.empty(64, 64)
    with pytest.raises(RegistryError, match=r"'a\.weight' and 'b\.weight' are one tensor"):
        CodebookRegistry.build([("a.weight", weight), ("b.weight", weight)])


def test_updated_changes_only_what_was_given():
    registry = CodebookRegistry.build(model(), rules=[LayerRule(type="output", levels="uniform")])
    before = copy.deepcopy(registry)
    updated = registry.updated({"convolution": SquareDensity()})
    assert registry == before
    assert (updated.version, updated.codebooks["convolution"].version) == (1, 1)
    assert dataclasses.replace(
        updated, version=0, codebooks={**updated.codebooks, "convolution": registry.codebooks["convolution"]}
    ) == (registry)
    variance = {
        name: quantization_variance(registry.codebooks["convolution"].levels, SquareDensity())
        for name, registry in (("old", registry), ("new", updated))
    }
    assert variance["new"] < 0.9 * variance["old"]
    twice = updated.updated({"feed_forward": SquareDensity()})
    assert (twice.version, twice.codebooks["feed_forward"].version, twice.codebooks["convolution"].version) == (2, 2, 1)
    assert twice.codebooks["feed_forward"].levels == updated.codebooks["convolution"].levels
    assert updated.updated({}).version == 2


def test_updated_without_any_weight_keeps_the_levels():
    updated = CodebookRegistry.build(model()).updated({"convolution": SquareDensity()})
    assert updated.updated({"convolution": Empty()}).codebooks["convolution"].levels == (
        updated.codebooks["convolution"].levels
    )


@pytest.mark.parametrize("key", ["output", "bias", "convolution/32bit", "nothing"])
def test_update_of_what_is_not_adaptive(key):
    registry = CodebookRegistry.build(model(), rules=[LayerRule(type="output", levels="uniform")])
    with pytest.raises(RegistryError, match=f"'{key}' is not adaptive; the adaptive ones: convolution, feed_forward"):
        registry.updated({key: SquareDensity()})


def test_digest_and_description():
    registry = CodebookRegistry.build(model())
    assert registry.digest == CodebookRegistry.build(model()).digest
    assert len(registry.digest) == 8
    others = [
        registry.updated({"convolution": SquareDensity()}),
        registry.updated({}),
        CodebookRegistry.build(model().to(torch.float16)),
        CodebookRegistry.build(model(), LayerSettings(bits=6)),
        CodebookRegistry.build(model(), UNIFORM),
        CodebookRegistry.build(nn.Sequential(*list(model())[:-1])),
    ]
    assert len({registry.digest, *(other.digest for other in others)}) == 7
    for other in others:
        assert json.loads(json.dumps(other.describe())) == other.describe()
        assert differences(registry.describe(), other.describe(), "rank 0", "rank 1")
    assert differences(registry.describe(), registry.describe(), "rank 0", "rank 1") == ()


def test_differences_are_named():
    ours = CodebookRegistry.build(model()).describe()
    theirs = CodebookRegistry.build(
        nn.Sequential(*list(model())[:-1], nn.Linear(64, 48)), rules=[LayerRule(type="convolution", bits=4)]
    ).describe()
    found = differences(ours, theirs, "rank 0", "rank 3")
    assert "parameter '5.weight': shape [32, 64] in rank 0, [48, 64] in rank 3" in found
    assert "codebook 'convolution': bits 5 in rank 0, 4 in rank 3" in found


def test_order_of_parameters_is_a_difference():
    a, b = ("a.weight", torch.empty(64, 64)), ("b.weight", torch.empty(64, 64))
    rules = [LayerRule(name="*", as_type="feed_forward")]
    ours, theirs = (CodebookRegistry.build(pairs, rules=rules).describe() for pairs in ([a, b], [b, a]))
    assert differences(ours, theirs, "rank 0", "rank 1") == (
        "parameter 0 is 'a.weight' in rank 0, 'b.weight' in rank 1",
    )


@pytest.mark.parametrize("through", ["json", "torch", "pickle"])
def test_state_round_trip_is_exact(through):
    updated = CodebookRegistry.build(model()).updated({"convolution": SquareDensity()}).updated({})
    state = updated.state_dict()
    if through == "json":
        state = json.loads(json.dumps(state))
    elif through == "pickle":
        state = pickle.loads(pickle.dumps(state))
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    restored = CodebookRegistry.build(model()).restored(state)
    assert restored == updated
    assert restored.digest == updated.digest
    assert list(restored.codebooks) == list(updated.codebooks)


def test_registry_can_be_pickled_and_copied():
    registry = CodebookRegistry.build(model())
    assert pickle.loads(pickle.dumps(registry)) == registry == copy.deepcopy(registry)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: CodebookRegistry.build(model()[:-1]), r"parameter '5\.weight' is only in the saved state"),
        (lambda: CodebookRegistry.build(model().half()), r"dtype float16 in this model, float32 in the saved state"),
        (lambda: CodebookRegistry.build(model(), LayerSettings(bits=6)), r"'convolution': bits 6 in this model, 5 in"),
        (lambda: CodebookRegistry.build(model(), LayerSettings(norm="l2")), r"norm l2 in this model, max in"),
        (lambda: CodebookRegistry.build(model(), UNIFORM), r"level_scheme uniform in this model, adaptive in"),
    ],
)
def test_state_of_another_model_or_format_is_refused(other, message):
    state = CodebookRegistry.build(model()).updated({"convolution": SquareDensity()}).state_dict()
    with pytest.raises(RegistryError, match=message):
        other().restored(state)


def test_long_lists_of_differences_are_shortened():
    state = CodebookRegistry.build(model()).state_dict()
    with pytest.raises(RegistryError, match="and 7 more"):
        CodebookRegistry.build(model().half()).restored(state)


def test_explicit_levels_of_the_state_must_be_the_configured_ones():
    def registry(exponent):
        levels = tuple(float(level) for level in uniform_levels(5) ** exponent)
        return CodebookRegistry.build(model(), LayerSettings(levels=levels))

    with pytest.raises(
        RegistryError, match=r"codebook 'convolution': level 1 of 16 is 0\.0044\d* in this model, 0\.0002"
    ):
        registry(2).restored(registry(3).state_dict())


@pytest.mark.parametrize("damage", ["format", "version", "codebooks", "parameters", "levels"])
def test_damaged_state_is_refused(damage):
    registry = CodebookRegistry.build(model())
    state = copy.deepcopy(registry.state_dict())
    if damage == "levels":
        state["codebooks"]["convolution"]["levels"][3] = 2.0
    else:
        del state[damage]
    with pytest.raises(RegistryError, match="format None" if damage == "format" else "damaged"):
        registry.restored(state)
