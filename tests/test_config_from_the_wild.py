"""Configurations as they come: damaged, hostile, or of odd types. Each is valid, or a short `ConfigError` at once."""

import fractions
import json
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_plugin.__main__ import main as plugin_command
from hvd_qoda.config import QodaConfig, UpdateLevels
from hvd_qoda.errors import ConfigError

LONGEST = 1000
DEEP = 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

FILES = {
    "deep.json": "[" * DEEP,
    "deep-objects.json": '{"a":' * DEEP + "1" + "}" * DEEP,
    "deep-but-short.json": '{"layers": ' + "[" * 60 + "]" * 60 + "}",
    "long-number.json": '{"seed": ' + "9" * 5000 + "}",
    "long-key.json": json.dumps({"k" * 50_000: 1}),
    "long-value.json": json.dumps({"exchange": "v" * 50_000}),
    "long-list.json": json.dumps({"levels": [0.5] * 100_000}),
    "many-keys.json": json.dumps({f"key{number}": number for number in range(5000)}),
    "twice.json": '{"bits": 4, "bits": 5}',
    "twice-inside.json": '{"qoda": {"bits": 4, "bits": 5}}',
    "nan.json": '{"timeout_s": NaN}',
    "infinity.json": '{"fusion_buffer_mb": Infinity}',
    "self.json": '{"self": 1}',
    "cls.json": '{"cls": 1, "values": 2}',
    "not-utf8.json": "\udcff",
    "large.json": " " * (2**20 + 1),
    "empty.json": "",
    "deep.yaml": "[" * DEEP,
    "deep-block.yaml": "".join(" " * level + "a:\n" for level in range(1000)),
    "bomb.yaml": BOMB,
    "anchor.yaml": "bits: &b 4\n",
    "long-number.yaml": "seed: " + "9" * 5000,
    "date.yaml": "exchange: 2026-01-01\n",
    "binary.yaml": "exchange: !!binary aGVsbG8=\n",
    "object.yaml": "exchange: !!python/object/apply:os.getcwd []\n",
    "set.yaml": "layers: !!set {a, b}\n",
    "twice.yaml": "bits: 4\nbits: 5\n",
    "list-as-key.yaml": "[1, 2]: 3\n",
    "number-as-key.yaml": "1: 3\n",
    "yes.yaml": "error_feedback: yes\n",
    "sixty.yaml": "bits: 1:30\n",
    "tabs.yaml": "\tbits: 4\n",
    "control.yaml": "bits: \x07\n",
    "empty.yaml": "",
}


def check(call: Any) -> str:
    """The message of the ConfigError that a call raises, which must be short and quick."""
    begin = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        call()
    # Generous beside one second: the machine may be busy.
    assert time.perf_counter() - begin < 10
    message = str(caught.value)
    assert len(message) <= LONGEST
    return message


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name].encode("utf-8", errors="surrogateescape"))
    assert name in check(lambda: QodaConfig.load(path))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_the_check_of_the_plug_in(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """The same files as a whole DeepSpeed configuration, and as the block of one."""
    path, block = tmp_path / name, tmp_path / f"block-{name}"
    path.write_bytes(FILES[name].encode("utf-8", errors="surrogateescape"))
    block.write_bytes(b'{"qoda": ' + path.read_bytes() + b"}")
    for file in (path, block):
        assert plugin_command(["check", str(file)]) == 1
        said = capsys.readouterr()
        assert 0 < len(said.err) <= LONGEST + 20
        assert said.err.startswith("error: ") or "has no block" in said.err


@pytest.mark.parametrize("path", ["a\0b.json", "absent.json", ".", "x.toml", "n" * 5000 + ".json"])
def test_paths(path: str) -> None:
    check(lambda: QodaConfig.load(path))


def test_words_that_yaml_would_convert_stay_words(tmp_path: Path) -> None:
    path = tmp_path / "qoda.yaml"
    path.write_text("exchange: off\nbits: 4\ntimeout_s: 1e2\nerror_feedback: true\nlayers: [{name: no, bits: 32}]\n")
    config = QodaConfig.load(path, environ={})
    assert (config.exchange, config.bits, config.timeout_s, config.error_feedback) == ("off", 4, 100.0, True)
    assert config.layers[0].name == "no"


@pytest.mark.parametrize(
    "keywords",
    [
        {"levels": [0, 10**400, 1, 2]},
        {"levels": [0.0, float("nan"), 0.5, 1.0]},
        {"levels": range(10**9)},
        {"levels": [[0.0]] * 4},
        {"seed": 10**5000},
        {"seed": -(10**5000)},
        {"bits": 10**5000},
        {"min_numel": 10**5000 * -1},
        {"timeout_s": 10**5000},
        {"update_levels": {"samples": 10**5000, "at": "x"}},
        {"bits": fractions.Fraction(5)},
        {"bits": Decimal(5)},
        {"bits": True},
        {"bits": np.float64(5.0)},
        {"bits": np.array([5])},
        {"bits": torch.tensor([5])},
        {"timeout_s": 1j},
        {"exchange": b"off"},
        {"layers": [{"type": "x" * 10_000}]},
        {"layers": {"type": "norm"}},
        {"x" * 10_000: 1},
        {"self": 1},
    ],
    ids=lambda keywords: str(next(iter(keywords)))[:20],
)
def test_keywords(keywords: dict[str, Any]) -> None:
    check(lambda: QodaConfig(**keywords))


@pytest.mark.parametrize("five", [np.int64(5), np.uint8(5), torch.tensor(5), np.array(5)])
def test_numbers_of_numpy_and_torch(five: Any) -> None:
    config = QodaConfig(bits=five, timeout_s=np.float32(2.0), layers=[{"type": "norm", "bits": five}])
    assert config.to_dict() == QodaConfig(bits=5, timeout_s=2.0, layers=[{"type": "norm", "bits": 5}]).to_dict()
    assert type(config.bits) is int


def test_environment() -> None:
    check(lambda: QodaConfig.load(environ={"CGX_COMPRESSION_QUANTIZATION_BITS": "9" * 5000}))
    check(lambda: QodaConfig.load(environ={"CGX_COMPRESSION_BUCKET_SIZE": "x" * 50_000}))


@pytest.mark.parametrize("every", [None, 7, 10**12])
@pytest.mark.parametrize("at", [(), (3,), (1, 20, 40)])
@pytest.mark.parametrize("samples", [1, 4, 30])
def test_steps_that_gather_are_those_before_an_update(every: int | None, at: tuple[int, ...], samples: int) -> None:
    updates = UpdateLevels(every=every, at=at, samples=samples)
    for step in range(1, 60):
        due = any(updates.is_due(later) for later in range(step + 1, step + samples + 1))
        assert updates.gathers(step) == due


def test_many_samples_take_no_time() -> None:
    begin = time.perf_counter()
    assert QodaConfig(update_levels={"samples": 10**12, "at": [], "every": 10**13}).update_levels.gathers(1) is False
    assert time.perf_counter() - begin < 10


def valid_or_short_error(make: Callable[[], QodaConfig]) -> QodaConfig | None:
    message = ""
    try:
        return make()
    except ConfigError as error:
        message = str(error)
    assert 0 < len(message) <= LONGEST
    return None


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["auto", "best", "off"]),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=10), inside, max_size=4),
    max_leaves=12,
)
_KEYS = st.sampled_from([*QodaConfig.model_fields, "qoda", "modules", "ignore_modules"]) | st.text(max_size=10)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_any_values_are_valid_or_a_short_error(values: dict[str, Any]) -> None:
    config = valid_or_short_error(lambda: QodaConfig.from_dict(values))
    if config is not None:
        assert QodaConfig.from_dict(config.to_dict()) == config


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200) | _VALUES.map(yaml.safe_dump) | _VALUES.map(json.dumps), is_json=st.booleans())
def test_any_text_is_valid_or_a_short_error(tmp_path_factory: pytest.TempPathFactory, text: str, is_json: bool) -> None:
    path = tmp_path_factory.getbasetemp() / ("any.json" if is_json else "any.yaml")
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    valid_or_short_error(lambda: QodaConfig.load(path, environ={}))
