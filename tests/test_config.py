import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvd_qoda.config import ENVIRONMENT, LayerRule, QodaConfig, UpdateLevels
from hvd_qoda.errors import ConfigError, QodaError, RegistryError
from qoda_kernels.layer_types import LAYER_TYPES
from qoda_kernels.registry import LayerSettings

EXAMPLE = """
{"qoda": {"bits": 5, "bucket_size": 512, "norm": "max", "levels": "adaptive", "coding": "fixed", "exchange": "auto",
          "error_feedback": false, "seed": 0,
          "layers": [{"type": "embedding", "bits": 8}, {"name": "*.bias", "bits": 32}, {"max_numel": 1024, "bits": 32}],
          "update_levels": {"at": [100, 2000], "every": 10000, "statistics": "histogram"}}}
"""

EXAMPLE_RULES = (
    LayerRule(type="embedding", bits=8),
    LayerRule(name="*.bias", bits=32),
    LayerRule(max_numel=1024, bits=32),
)


def test_documented_example(tmp_path):
    path = tmp_path / "qoda.json"
    path.write_text(EXAMPLE)
    config = QodaConfig.from_json(path)
    assert config == QodaConfig(layers=EXAMPLE_RULES)
    assert config.rules == EXAMPLE_RULES
    assert config.settings == LayerSettings(bits=5, bucket_size=512, norm="max", norm_format="fp32", levels="adaptive")
    assert config.update_levels == UpdateLevels(at=[100, 2000], every=10000, statistics="histogram", samples=10)


def test_block_in_a_host_file_and_alone():
    block = json.loads(EXAMPLE)
    host = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, **block}
    assert QodaConfig.from_dict(host) == QodaConfig.from_dict(block) == QodaConfig.from_dict(block["qoda"])


def test_keys_beside_the_block_are_refused():
    with pytest.raises(ConfigError, match=r"^bits: stands beside the block 'qoda'"):
        QodaConfig.from_dict({"qoda": {}, "bits": 4})


# Every wrong value, the key that the message must start with, and words that it must contain.
WRONG = [
    ({"bist": 3}, "bist", "did you mean 'bits'"),
    ({"bucketsize": 512}, "bucketsize", "did you mean 'bucket_size'"),
    ({"bits": 1}, "bits=1", "2 to 8, or 32"),
    ({"bits": 9}, "bits=9", "2 to 8, or 32"),
    ({"bits": "5"}, "bits='5'", "whole number"),
    ({"bits": True}, "bits=True", "whole number"),
    ({"bits": 4.0}, "bits=4.0", "whole number"),
    ({"bucket_size": 64}, "bucket_size=64", "multiple of 128"),
    ({"bucket_size": 500}, "bucket_size=500", "multiple of 128"),
    ({"bucket_size": 16384}, "bucket_size=16384", "multiple of 128"),
    ({"norm": "l1"}, "norm='l1'", "did you mean 'l2'"),
    ({"norm": 2}, "norm=2", "'max' or 'l2'"),
    ({"norm_format": "fp16"}, "norm_format='fp16'", "'fp32' or 'bf16'"),
    ({"levels": "unifrom"}, "levels='unifrom'", "did you mean 'uniform'"),
    ({"levels": 16}, "levels=16", "a list of levels"),
    ({"levels": [0, "a", 1]}, "levels=", "a list of levels"),
    ({"levels": [0, float("nan"), 0.5, 1], "bits": 3}, "levels=", "a list of levels"),
    ({"levels": [0, 0.5, 1]}, "levels=", "2^(b-1) levels"),
    ({"levels": [0, 1]}, "levels=[0, 1]", "bits=5 needs 16"),
    ({"levels": [0, 0.6, 0.5, 1], "bits": 3}, "levels=", "increase"),
    ({"coding": "huffman"}, "coding='huffman'", "use exchange='allgather'"),
    ({"coding": "alternating"}, "coding='alternating'", "not available in this version"),
    ({"coding": "fixd"}, "coding='fixd'", "did you mean 'fixed'"),
    ({"exchange": "reducescatter"}, "exchange='reducescatter'", "did you mean 'reduce_scatter'"),
    ({"error_feedback": 0}, "error_feedback=0", "true or false"),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"rotation": "hadamar"}, "rotation='hadamar'", "did you mean 'hadamard'"),
    ({"rounding": "nearst"}, "rounding='nearst'", "did you mean 'nearest'"),
    ({"rounding": "nearest"}, "levels='adaptive', rotation='none', rounding='nearest'", "biased without rotation"),
    ({"rotation": "hadamard", "levels": "tnq"}, "levels='tnq', rotation='hadamard'", "levels 'tnq' are for buckets"),
    ({"rotation": "hadamard", "norm": "l2"}, "levels='adaptive', rotation='hadamard'", 'need norm "max"'),
    ({"rotation": "hadamard", "levels": "best"}, "levels='best'", "choose the rotation"),
    ({"rotation": "hadamard", "bucket_size": 384}, "levels='adaptive', rotation='hadamard'", "384"),
    ({"layers": [{"name": "x", "rotation": "hadamar"}]}, "layers[0].rotation=", "did you mean 'hadamard'"),
    ({"dither": "stratifed"}, "dither='stratifed'", "did you mean 'stratified'"),
    ({"seed": 2**64}, "seed=18446744073709551616", "less than"),
    ({"min_numel": -1}, "min_numel=-1", "at least 0"),
    ({"measure_error_every": -1}, "measure_error_every=-1", "at least 0"),
    ({"worker_norms": "yes"}, "worker_norms='yes'", "true or false"),
    ({"fusion_buffer_mb": 0}, "fusion_buffer_mb=0", "larger than 0"),
    ({"timeout_s": 0}, "timeout_s=0", "larger than 0"),
    ({"timeout_s": float("inf")}, "timeout_s=inf", "finite"),
    ({"timeout_s": "20"}, "timeout_s='20'", "must be a number"),
    ({"codec_device": "cuda"}, "codec_device='cuda'", "must be"),
    ({"layers": {"type": "norm"}}, "layers=", "must be a list"),
    ({"layers": [3]}, "layers[0]=3", "must map keys to values"),
    ({"layers": [{"bits": 4}]}, "layers[0]=", "selects no parameters"),
    ({"layers": [{"type": "norm"}]}, "layers[0]=", "changes nothing"),
    ({"layers": [{"type": "norm", "bits": 4}, {"nam": "x", "bits": 4}]}, "layers[1].nam", "did you mean 'name'"),
    ({"layers": [{"name": "x", "bits": 4, "seed": 3}]}, "layers[0].seed", "the keys are type, name"),
    ({"layers": [{"type": "nrom", "bits": 4}]}, "layers[0].type='nrom'", "did you mean 'norm'"),
    ({"layers": [{"type": 3, "bits": 4}]}, "layers[0].type=3", "must be a word"),
    ({"layers": [{"name": "x", "bits": 12}]}, "layers[0].bits=12", "2 to 8, or 32"),
    ({"layers": [{"name": "x", "bucket_size": 100}]}, "layers[0].bucket_size=100", "multiple of 128"),
    ({"layers": [{"name": "x", "norm": "maximum"}]}, "layers[0].norm='maximum'", "did you mean 'max'"),
    ({"layers": [{"name": "x", "levels": "adaptiv"}]}, "layers[0].levels='adaptiv'", "did you mean 'adaptive'"),
    ({"layers": [{"min_numel": 9, "max_numel": 8, "bits": 4}]}, "layers[0]=", "min_numel is larger"),
    ({"layers": [{"max_numel": -1, "bits": 4}]}, "layers[0].max_numel=-1", "at least 0"),
    ({"layers": [{"name": "x", "as_type": "A/B"}]}, "layers[0]=", "lower-case"),
    ({"update_levels": None}, "update_levels=None", "must map keys to values"),
    ({"update_levels": {"evry": 5}}, "update_levels.evry", "did you mean 'every'"),
    ({"update_levels": {"at": [0]}}, "update_levels.at[0]=0", "at least 1"),
    ({"update_levels": {"at": [5, 5]}}, "update_levels.at=[5, 5]", "increasing"),
    ({"update_levels": {"every": 0}}, "update_levels.every=0", "at least 1"),
    ({"update_levels": {"samples": 0}}, "update_levels.samples=0", "at least 1"),
    ({"update_levels": {"statistics": "histogramm"}}, "update_levels.statistics=", "did you mean 'histogram'"),
    ({"update_levels": {"at": [], "every": None}}, "update_levels", "`at` or `every`"),
    ({"update_levels": {"at": [], "every": None}, "levels": "tnq"}, "update_levels", "tnq levels need"),
    ({"tails": {"optimum": "fixedpoint"}}, "tails.optimum=", "did you mean 'fixed_point'"),
    ({"tails": {"tail_share": 0.5}}, "tails.tail_share=0.5", "less than 0.5"),
    ({"bits": "auto", "update_levels": {"at": [], "every": None}}, "update_levels", "`at` or `every`"),
    ({"bits": "auto", "levels": [0, 1]}, "levels=[0, 1]", "one code width"),
    ({"bits": "auto", "layers": [{"type": "norm", "levels": [0, 1]}]}, "layers[0].levels", "give `bits`"),
    ({"layers": [{"type": "norm", "min_bits": 4}]}, "layers[0]", 'bits="auto"'),
    ({"bits": "automatic"}, "bits='automatic'", "or 'auto'"),
    ({"auto_bits": {"budget": "byte"}}, "auto_bits.budget='byte'", "did you mean 'bytes'"),
    ({"auto_bits": {"min_bits": 6, "max_bits": 5}}, "auto_bits.max_bits=5", "smaller than min_bits=6"),
    ({"auto_bits": {"reference": 9}}, "auto_bits.reference=9", "at most 8"),
    ({"codebooks": "per_layers"}, "codebooks='per_layers'", "did you mean 'per_layer'"),
    ({"rotations": "separate"}, 'rotations="separate"', 'rotation="hadamard"'),
    ({"rotations": "seperate"}, "rotations='seperate'", "did you mean 'separate'"),
    ({"tails": {"gmax": "quantile"}}, "tails.gmax", "did you mean 'gmin'"),
]


@pytest.mark.parametrize(("values", "start", "words"), WRONG)
def test_wrong_values_name_themselves(values, start, words):
    with pytest.raises(ConfigError) as caught:
        QodaConfig.from_dict(values)
    assert str(caught.value).startswith(start)
    assert words in str(caught.value)
    assert isinstance(caught.value, QodaError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError):
        QodaConfig(**values)


def test_every_key_is_among_the_wrong_values_and_in_the_documentation():
    wrong = {key for values, _, _ in WRONG for key in values}
    assert set(QodaConfig.model_fields) <= wrong
    assert all(f"- `{key}`:" in (QodaConfig.__doc__ or "") for key in QodaConfig.model_fields)
    assert all(f"- `{key}`:" in (UpdateLevels.__doc__ or "") for key in UpdateLevels.model_fields)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError, match=r"bits=9: .*; norm='x': .*; nrom: unknown key; did you mean 'norm'"):
        QodaConfig(bits=9, norm="x", nrom="max")


@pytest.mark.parametrize("values", [3, None, [], "bits", {3: 4}, {"qoda": 5}])
def test_what_is_no_mapping(values):
    with pytest.raises(ConfigError):
        QodaConfig.from_dict(values)


def test_immutable():
    config = QodaConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.bits = 4
    assert config.bits == 5


def test_wrong_levels_do_not_matter_without_compression():
    assert QodaConfig(bits=32, levels=[0, 1]).settings.codebook().is_exact


def test_custom_type_may_be_selected_where_a_rule_assigns_it():
    rules = [{"type": "router", "bits": 8}, {"name": "*.gate.weight", "as_type": "router"}]
    assert len(QodaConfig(layers=rules).rules) == 2
    with pytest.raises(ConfigError, match=r"layers\[0\]\.type='router'"):
        QodaConfig(layers=rules[:1])


bits = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 32])
bucket_sizes = st.integers(1, 64).map(lambda count: 128 * count)
schemes = st.sampled_from(["uniform", "exponential", "adaptive"])
counts = st.integers(0, 10**12)


@st.composite
def explicit_levels(draw, bits):
    interior = draw(
        st.lists(
            st.floats(2**-20, 0.75, width=32), min_size=2 ** (bits - 1) - 2, max_size=2 ** (bits - 1) - 2, unique=True
        )
    )
    return [0.0, *sorted(interior), 1.0]


rules = st.fixed_dictionaries(
    {"name": st.text(min_size=1, max_size=8), "bits": bits},
    optional={
        "type": st.sampled_from(LAYER_TYPES),
        "min_numel": st.integers(0, 100),
        "max_numel": st.integers(100, 10**9),
        "as_type": st.sampled_from([*LAYER_TYPES, "router"]),
        "bucket_size": bucket_sizes,
        "norm": st.sampled_from(["max", "l2"]),
        "norm_format": st.sampled_from(["fp32", "bf16"]),
        "levels": schemes | explicit_levels(3),
    },
)
updates = st.fixed_dictionaries(
    {},
    optional={
        "at": st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True).map(sorted),
        "every": st.none() | st.integers(1, 10**6),
        "statistics": st.sampled_from(["histogram", "truncated_normal"]),
        "samples": st.integers(1, 50),
    },
)


@st.composite
def configurations(draw):
    values = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "bits": bits,
                "bucket_size": bucket_sizes,
                "norm": st.sampled_from(["max", "l2"]),
                "norm_format": st.sampled_from(["fp32", "bf16"]),
                "levels": schemes,
                "coding": st.just("fixed"),
                "exchange": st.sampled_from(["auto", "allgather", "reduce_scatter", "by_bytes", "off"]),
                "error_feedback": st.booleans(),
                "seed": st.integers(0, 2**64 - 1),
                "layers": st.lists(rules, max_size=3),
                "update_levels": updates,
                "min_numel": counts,
                "measure_error_every": counts,
                "worker_norms": st.booleans(),
                "fusion_buffer_mb": st.floats(1e-3, 1e9),
                "timeout_s": st.floats(1e-3, 1e9),
            },
        )
    )
    if values.get("bits") == 4 and draw(st.booleans()):
        values["levels"] = draw(explicit_levels(4))
    return values


@pytest.mark.filterwarnings("error")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(configurations())
def test_round_trip(values):
    config = QodaConfig.from_dict(values)
    again = QodaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.canonical_json() == config.canonical_json()
    assert QodaConfig.from_dict(json.loads(config.canonical_json())) == config
    given_values = {key: value for key, value in config.to_dict().items() if key in values}
    given_values.pop("update_levels", None)
    assert given_values == {key: value for key, value in values.items() if key != "update_levels"}
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_canonical_json_tells_configurations_apart_but_not_orders_of_keys():
    one = QodaConfig(bits=4, seed=1).canonical_json()
    assert one == QodaConfig(seed=1, bits=4).canonical_json()
    assert one != QodaConfig(seed=1, bits=5).canonical_json()
    assert one != QodaConfig(seed=1, bits=4, layers=[{"type": "norm", "bits": 8}]).canonical_json()


def test_updates_are_due_at_the_listed_steps_and_then_at_multiples():
    updates = UpdateLevels(at=(3, 25), every=10, samples=4)
    assert [step for step in range(1, 61) if updates.is_due(step)] == [3, 25, 30, 40, 50, 60]
    gathered = [1, 2, *range(21, 25), *range(26, 30), *range(36, 40)]
    assert [step for step in range(1, 41) if updates.gathers(step)] == gathered
    assert [step for step in range(1, 99) if UpdateLevels(at=(), every=30).is_due(step)] == [30, 60, 90]
    assert [step for step in range(1, 30000) if UpdateLevels().is_due(step)] == [100, 2000, 10000, 20000]
    assert [step for step in range(1, 200) if UpdateLevels(at=(7,), every=None).is_due(step)] == [7]


def test_registry_is_built_from_the_configuration():
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    config = QodaConfig(bits=4, norm="l2", min_numel=0, layers=[{"type": "embedding", "bits": 8, "norm": "max"}])
    registry = config.build_registry(model)
    assert (registry.codebooks["embedding"].bits, registry.codebooks["embedding"].norm) == (8, "max")
    assert (registry.codebooks["output"].bits, registry.codebooks["output"].norm) == (4, "l2")
    with pytest.raises(RegistryError, match=r"layers\[0\]"):
        config.build_registry(nn.Sequential(nn.Linear(64, 64)))


# Files


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.yml"])
def test_load_reads_both_formats(tmp_path, name):
    (tmp_path / name).write_text(EXAMPLE)
    assert QodaConfig.load(tmp_path / name, environ={}) == QodaConfig(layers=EXAMPLE_RULES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"bits": }', r"a\.json is not JSON.*line 1"),
        ("a.yaml", "bits: [", r"a\.yaml is not YAML"),
        ("a.json", '{"bist": 4}', r"a\.json: bist: unknown key"),
        ("a.yaml", "layers: [{name: x, bits: 4}, {name: y, bit: 4}]", r"a\.yaml: layers\[1\]\.bit: unknown key"),
        ("a.toml", "bits = 4", r"ends in \.json, \.yaml or \.yml"),
    ],
)
def test_mistakes_in_files_name_the_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        QodaConfig.load(tmp_path / name, environ={})


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json"):
        QodaConfig.from_json(tmp_path / "none.json")


def test_cgx_file(tmp_path):
    path = tmp_path / "compression.yaml"
    path.write_text(
        "modules:\n"
        "  - name: features\n"
        "    quantization_bits: 2\n"
        "    bucket_size: 1024\n"
        "  - name: fc[0]\n"
        "    quantization_bits: 8\n"
        "  - name: plain\n"
        "ignore_modules:\n"
        "  - bn\n"
        "layers:\n"
        "  - {name: '*', norm: l2}\n"
    )
    config = QodaConfig.from_yaml(path)
    assert config.rules == (
        LayerRule(name="*", norm="l2"),
        LayerRule(name="*features*", bits=2, bucket_size=1024),
        LayerRule(name="*fc[[]0]*", bits=8),
        LayerRule(name="*bn*", bits=32),
    )
    assert config.rules[2].selects("net.fc[0].weight", "feed_forward", 1)
    weights = [(name, torch.empty(64, 64)) for name in ("features.a", "features.bn", "fc[0].a", "b")]
    registry = config.build_registry(weights)
    assert [registry.codebooks[entry.codebook].bits for entry in registry.parameters.values()] == [2, 32, 8, 5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"modules": [{"name": "fc", "bits": 2}]},
            r"modules\[0\]\.bits: unknown key; the keys are name, quantization_bits, bucket_size",
        ),
        ({"modules": [{"name": "fc", "quantization_bits": 1}]}, r"modules\[0\]: bits=1: must be 2 to 8"),
        ({"modules": [{"quantization_bits": 2}]}, r"modules\[0\]=.*must have a name"),
        ({"modules": {"name": "fc"}}, r"modules=.*must be a list"),
        ({"ignore_modules": [3]}, r"ignore_modules\[0\]=3"),
        ({"ignore_modules": "bn"}, r"ignore_modules='bn': must be a list"),
        ({"ignore_modules": ["bn"], "layers": 3}, r"layers=3: must be a list"),
    ],
)
def test_mistakes_in_cgx_lists(values, message):
    with pytest.raises(ConfigError, match=message):
        QodaConfig.from_dict(values)


# Environment


def test_environment_of_torch_cgx():
    environ = {
        "CGX_COMPRESSION_QUANTIZATION_BITS": "4",
        "CGX_COMPRESSION_BUCKET_SIZE": "1024",
        "CGX_COMPRESSION_MINIMAL_SIZE": "16",
        "CGX_COMPRESSION_OTHER": "x",
    }
    base = QodaConfig(seed=7, bits=6)
    assert QodaConfig.from_environment(base, environ) == QodaConfig(seed=7, bits=4, bucket_size=1024, min_numel=16)
    assert QodaConfig.from_environment(base, {}) == base
    assert QodaConfig.from_environment(base, {"CGX_COMPRESSION_QUANTIZATION_BITS": ""}) == base
    off = QodaConfig.from_environment(environ={"CGX_COMPRESSION_QUANTIZATION_BITS": "32"})
    assert off.settings.is_exact


@pytest.mark.parametrize("variable", ENVIRONMENT)
@pytest.mark.parametrize("text", ["abc", "-5", "4.5"])
def test_mistakes_in_the_environment_name_the_variable(variable, text):
    with pytest.raises(ConfigError, match=variable):
        QodaConfig.from_environment(environ={variable: text})


def test_fusion_size_of_cgx_is_read():
    config = QodaConfig.from_environment(environ={"CGX_FUSION_BUFFER_SIZE_MB": "64"})
    assert config == QodaConfig(fusion_buffer_mb=64)


def test_keywords_before_environment_before_file_before_defaults(tmp_path):
    path = tmp_path / "qoda.yaml"
    path.write_text("{bits: 2, bucket_size: 128, min_numel: 3, seed: 9, layers: [{name: x, bits: 8}]}")
    environ = {"CGX_COMPRESSION_QUANTIZATION_BITS": "4", "CGX_COMPRESSION_BUCKET_SIZE": "256"}
    config = QodaConfig.load(path, environ, bits=6, layers=[])
    assert (config.bits, config.bucket_size, config.min_numel, config.norm) == (6, 256, 3, "max")
    assert (config.seed, config.layers) == (9, ())
    assert QodaConfig.load(path, {}).bits == 2


def test_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("CGX_COMPRESSION_QUANTIZATION_BITS", "3")
    assert QodaConfig.load().bits == QodaConfig.from_environment().bits == 3
    assert QodaConfig.from_keywords().bits == 5


def test_explicit_levels_are_rounded_to_float32():
    config = QodaConfig(bits=3, levels=[0, 0.1, 0.3, 1])
    assert config.levels == (0.0, float(np.float32(0.1)), float(np.float32(0.3)), 1.0)
    assert config.settings.codebook().levels == config.levels


def test_import_needs_no_host():
    code = "import sys, hvd_qoda.config; assert not {'horovod', 'deepspeed', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
