"""Configuration: one validated schema for keyword arguments, JSON, YAML and the environment, for every front end.

The same words mean the same everywhere. What is given in several places is taken from the first of: explicit keyword
arguments, environment variables, a file, the defaults; a key's value replaces the whole value of the places behind it.
Every mistake raises `ConfigError`, which names the key, the value and, for unknown words, the nearest known one.
"""

import difflib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails
from torch import nn

from hvd_qoda.config_files import read_json, read_yaml, shortened, shown
from hvd_qoda.errors import CodebookError, ConfigError
from qoda_kernels.codebook import (
    EXACT_BITS,
    MAX_BITS,
    MAX_BUCKET_SIZE,
    MIN_BITS,
    MIN_BUCKET_SIZE,
    Codebook,
)
from qoda_kernels.layer_types import LAYER_TYPES
from qoda_kernels.registry import (
    DEFAULT_MIN_NUMEL,
    LEVEL_SCHEMES,
    BitPlanning,
    CodebookRegistry,
    LayerRule,
    LayerSettings,
)
from qoda_kernels.tails import TAIL_SCHEMES, TAIL_SHARE, TailSettings

__all__ = ["ENVIRONMENT", "AutoBits", "LayerRule", "QodaConfig", "Tails", "UpdateLevels"]

ENVIRONMENT: Mapping[str, str] = {
    "CGX_COMPRESSION_QUANTIZATION_BITS": "bits",
    "CGX_COMPRESSION_BUCKET_SIZE": "bucket_size",
    "CGX_COMPRESSION_MINIMAL_SIZE": "min_numel",
    "CGX_FUSION_BUFFER_SIZE_MB": "fusion_buffer_mb",
}
"""Environment variables of torch_cgx that are read, and the key each one sets."""

DEFAULT_FUSION_BUFFER_MB = 16.0
"""At 1 Gbit/s and 5 bits a message of so much takes 20 ms: long beside a round trip, short beside a backward pass."""

_PLANNED_CODINGS = ("alternating", "elias", "ans")
_MOST_SENTENCES = 5  # about wrong keys, in one message
_BLOCK = "qoda"  # the key under which a host's file carries this configuration


def _check_bits(bits: int) -> int:
    if bits != EXACT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"must be {MIN_BITS} to {MAX_BITS}, or {EXACT_BITS} for no compression")
    return bits


def _check_bits_or_auto(bits: Any) -> Any:
    if bits == "auto":
        return bits
    if not isinstance(bits, int) or isinstance(bits, bool):
        raise ValueError("must be a whole number or 'auto'")
    return _check_bits(bits)


def _check_bucket_size(size: int) -> int:
    if size % MIN_BUCKET_SIZE or not MIN_BUCKET_SIZE <= size <= MAX_BUCKET_SIZE:
        raise ValueError(f"must be a multiple of {MIN_BUCKET_SIZE} between {MIN_BUCKET_SIZE} and {MAX_BUCKET_SIZE}")
    return size


def _check_levels(levels: Any) -> str | tuple[float, ...]:
    if isinstance(levels, str):
        if levels not in LEVEL_SCHEMES:
            raise ValueError(
                f"must be {_alternatives(LEVEL_SCHEMES)}, or a list of levels{_nearest(levels, LEVEL_SCHEMES)}"
            )
        return levels
    # Their number first: of a range that Python keeps as three numbers there may be any.
    if not isinstance(levels, Sequence) or (count := _length(levels)) > 1 << (MAX_BITS - 1):
        raise ValueError(f"must be {_alternatives(LEVEL_SCHEMES)}, or a list of levels, {1 << (MAX_BITS - 1)} at most")
    if not all(_is_number(level) for level in levels):
        raise ValueError(f"must be {_alternatives(LEVEL_SCHEMES)}, or a list of levels")
    bits = count.bit_length()
    if not MIN_BITS <= bits <= MAX_BITS or count != 1 << (bits - 1):
        raise ValueError(f"b bits need 2^(b-1) levels, b from {MIN_BITS} to {MAX_BITS}; got {count}")
    return Codebook(bits=bits, levels=tuple(levels)).levels


def _length(values: Sequence[Any]) -> int:
    try:
        return len(values)
    except OverflowError:  # longer than any list
        return sys.maxsize


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _with_own_numbers(value: Any) -> Any:
    """A value in which NumPy's and torch's scalars have become Python's, at any depth."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _with_own_numbers(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_own_numbers(part) for part in value]
    return value


def _rule_fields(rule: Any) -> Any:
    return rule.to_dict() if isinstance(rule, LayerRule) else rule


_Bits = Annotated[int, AfterValidator(_check_bits)]
_BitsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_check_bits_or_auto)]
_Width = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
_BucketSize = Annotated[int, AfterValidator(_check_bucket_size)]
_Levels = Annotated[str | tuple[float, ...], BeforeValidator(_check_levels)]
_Norm = Literal["max", "l2"]
_NormFormat = Literal["fp32", "bf16"]
_Rotation = Literal["none", "hadamard"]
_Rounding = Literal["stochastic", "nearest"]
_Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    # Strict: "5" and true are not the number 5 or 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerRuleFields(_Model):
    """The keys of one entry of `layers`; see `LayerRule`."""

    type: str | None = None
    name: str | None = None
    min_numel: _Count | None = None
    max_numel: _Count | None = None
    as_type: str | None = None
    bits: _Bits | None = None
    bucket_size: _BucketSize | None = None
    norm: _Norm | None = None
    norm_format: _NormFormat | None = None
    levels: _Levels | None = None
    min_bits: _Width | None = None
    max_bits: _Width | None = None
    rotation: _Rotation | None = None
    rounding: _Rounding | None = None

    @model_validator(mode="after")
    def _is_a_rule(self) -> "LayerRuleFields":
        self.to_rule()
        return self

    @model_serializer
    def _given_fields(self) -> dict[str, Any]:
        return self.to_rule().to_dict()

    def to_rule(self) -> LayerRule:
        return LayerRule(**{name: getattr(self, name) for name in type(self).model_fields})


class UpdateLevels(_Model):
    """When adaptive levels are recomputed, and from what. Steps are counted from 1.

    - `at`: steps at which levels are updated, in increasing order.
    - `every`: after the last of these, also at every multiple of this many steps; null for never.
    - `statistics`: what ranks exchange about their gradients, "histogram" or "truncated_normal".
    - `samples`: over how many steps before an update the statistics are gathered.

    The defaults are the settings that the authors of ALQ released (NeurIPS 2020).
    """

    at: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = (100, 2000)
    every: Annotated[int, Field(ge=1)] | None = 10_000
    statistics: Literal["histogram", "truncated_normal"] = "histogram"
    samples: Annotated[int, Field(ge=1)] = 10

    @field_validator("at")
    @classmethod
    def _increases(cls, at: tuple[int, ...]) -> tuple[int, ...]:
        if any(earlier >= later for earlier, later in itertools.pairwise(at)):
            raise ValueError("must be in increasing order")
        return at

    @property
    def happens(self) -> bool:
        """Whether there is any step at which levels are updated."""
        return bool(self.at) or self.every is not None

    def is_due(self, step: int) -> bool:
        """Whether levels are updated at the beginning of this step, from statistics of the steps before it."""
        if step in self.at:
            return True
        return self.every is not None and step % self.every == 0 and step > max(self.at, default=0)

    def gathers(self, step: int) -> bool:
        """Whether this step's gradients belong to the samples of an update that follows within `samples` steps."""
        last = max(self.at, default=0)
        due = [planned for planned in self.at if planned > step]
        if self.every is not None:
            due.append((max(step, last) // self.every + 1) * self.every)
        return min(due, default=math.inf) <= step + self.samples


class Tails(_Model):
    """How codebooks that clip are fitted to the gradients: the levels "tuq", "tnq", "tbq" and "laplace".

    - `optimum`: how the clip value is chosen: "fixed_point" (as in the TQSGD papers), "bound" (least worst-case
      rounding and clipping error), "expected" (least average error), all three of the fitted density, or "measured"
      (least error of the gathered magnitudes themselves). Default "measured".
    - `gmin`: where the power-law tail begins, "quantile" or "kolmogorov_smirnov". Default "quantile".
    - `tail_share`: share of the values that lie beyond gmin, for "quantile". Default 0.1.
    """

    optimum: Literal["fixed_point", "bound", "expected", "measured"] = "measured"
    gmin: Literal["quantile", "kolmogorov_smirnov"] = "quantile"
    tail_share: Annotated[float, Field(gt=0.0, lt=0.5)] = TAIL_SHARE

    def to_settings(self) -> TailSettings:
        """The same for `qoda_kernels`."""
        return TailSettings(self.optimum, self.gmin, self.tail_share)


class AutoBits(_Model):
    """How code widths are planned with bits="auto": anew at every update of the levels, from the same statistics.

    - `budget`: "variance" for the fewest bytes with no more squared error than `reference` bits everywhere would have;
      "bytes" for the least squared error with no more bytes. Default "variance".
    - `reference`: the width that the budget is that of, and that training starts with. Default 5.
    - `min_bits`: least width. Default 2.
    - `max_bits`: largest width. Default 8.
    """

    budget: Literal["variance", "bytes"] = "variance"
    reference: _Width = 5
    min_bits: _Width = MIN_BITS
    max_bits: _Width = MAX_BITS

    @field_validator("max_bits")
    @classmethod
    def _is_not_below(cls, max_bits: int, info: ValidationInfo) -> int:
        if max_bits < info.data.get("min_bits", MIN_BITS):
            raise ValueError(f"is smaller than min_bits={info.data['min_bits']}")
        return max_bits


class QodaConfig(_Model):
    """Configuration of layer-wise quantized gradients; immutable, equal on all ranks.

    - `bits`: code width, 2 to 8, of every parameter that no rule changes; 32 means no compression; "auto" plans them
      (see `AutoBits`). Default 5.
    - `auto_bits`: how "auto" plans: `budget`, `reference`, `min_bits`, `max_bits`.
    - `codebooks`: whether parameters share one "per_type" or have one each, "per_layer". Default "per_type".
    - `bucket_size`: coordinates that share one norm; a multiple of 128 between 128 and 8192. Default 512.
    - `norm`: what normalises a bucket, "max" or "l2". Default "max".
    - `norm_format`: how norms travel, "fp32" or "bf16" (rounded up). Default "fp32".
    - `levels`: "uniform", "exponential", "adaptive" (least variance), "tuq", "tnq", "tbq" or "laplace" (clipped, for
      heavy tails; biased), "best" (at every update, per layer type, what has the least error: "adaptive" or rotated
      buckets; rounded to nearest only with rounding="nearest"; with entropy coding, per bit of the coded messages, and
      also among uniform levels) or 2^(bits-1) numbers. Default "adaptive".
    - `tails`: how levels that clip are fitted: `optimum`, `gmin`, `tail_share` (see `Tails`).
    - `rotation`: "none", or "hadamard": buckets (128, 256, 512 or 1024 coordinates) are rotated at random before they
      are quantized: then one codebook suits all gradients. Default "none".
    - `rotations`: "common" to all ranks: a mean is rotated back once; or "separate": each rank's message is rotated
      back alone, and errors of rounding to nearest cancel in the mean of gradients that are alike. Default "common".
    - `rounding`: "stochastic" (unbiased), or "nearest", for rotated buckets: less error, unbiased only on average over
      the rotations (EDEN), and not where a bucket has hardly any values but zeros. Default "stochastic".
    - `coding`: "fixed", code words of `bits` bits; or "huffman", one entropy code per codebook, agreed upon with the
      levels: the same results from fewer bytes, for more work. Needs exchange="allgather". Default "fixed".
    - `exchange`: "auto" (measures, and may choose "off"), "allgather" (quantized once), "reduce_scatter" (twice, fewer
      bytes), "hierarchical" (exact inside a host), "by_bytes" (one of the first two, by bytes alone) or "off" (the
      host's own all-reduce of all gradients). Default "auto".
    - `error_feedback`: whether what a message leaves out is added to the next gradient. Default false.
    - `seed`: seed of the random rounding, 0 to 2^64 - 1. Default 0.
    - `dither`: "independent", or "stratified": the ranks' random roundings are chosen so that their errors cancel in
      the mean; each rank's stays unbiased. Default "independent".
    - `layers`: rules, later ones win: selectors `type`, `name` (shell pattern), `min_numel`, `max_numel`; and `bits`,
      `bucket_size`, `norm`, `norm_format`, `levels`, `rotation`, `rounding`, `min_bits` and `max_bits` (bounds for
      bits="auto"), or `as_type`, which assigns another layer type. Default none.
    - `update_levels`: when adaptive levels are recomputed: `at`, `every`, `statistics`, `samples` (see `UpdateLevels`).
    - `min_numel`: parameters with fewer elements, like biases and norms, are not compressed unless a rule says so.
      Default 1024.
    - `measure_error_every`: steps between measurements of the quantization error, 0 for never. Default 100.
    - `worker_norms`: whether the squared norms that QODA with `sum_over="workers"` needs are exchanged. Default false.
    - `fusion_buffer_mb`: megabytes (2^20 bytes) of gradients that `hvd_qoda.DistributedOptimizer` and
      `hvd_qoda.ddp` send in one message at most, more than 0 (the former sends a quarter of all gradients in one
      message, or half of them by exchanges with all-to-alls, if that is between 2 MiB and this, so that backward hides
      the first ones' way); under Horovod's stock optimizer every parameter has messages of its own. Default 16.
    - `codec_device`: what codes gradients that lie on a GPU: "auto" (that GPU if its kernels pass a self check, else
      the CPU; the same bits either way), "cpu", or "gpu" (an error where the check fails). A message whose codebooks
      do not fit into the GPU's shared memory is coded on the CPU in any case, with a warning. Default "auto".
    - `timeout_s`: seconds to wait for other ranks before `ExchangeTimeoutError`. Default 300: a rank may evaluate or
      save a checkpoint between two steps.

    Raises:
        ConfigError: naming every key that is unknown or has an impossible value.
    """

    bits: _BitsOrAuto = 5
    auto_bits: AutoBits = AutoBits()
    codebooks: Literal["per_type", "per_layer"] = "per_type"
    bucket_size: _BucketSize = 512
    norm: _Norm = "max"
    norm_format: _NormFormat = "fp32"
    levels: _Levels = "adaptive"
    rotation: _Rotation = "none"
    rotations: Literal["common", "separate"] = "common"
    rounding: _Rounding = "stochastic"
    coding: Literal["fixed", "huffman"] = "fixed"
    exchange: Literal["auto", "allgather", "reduce_scatter", "hierarchical", "by_bytes", "off"] = "auto"
    error_feedback: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    dither: Literal["independent", "stratified"] = "independent"
    layers: Annotated[
        tuple[Annotated[LayerRuleFields, BeforeValidator(_rule_fields)], ...],
        Field(strict=False),
    ] = ()
    update_levels: UpdateLevels = UpdateLevels()
    tails: Tails = Tails()
    min_numel: _Count = DEFAULT_MIN_NUMEL
    measure_error_every: _Count = 100
    worker_norms: bool = False
    fusion_buffer_mb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = DEFAULT_FUSION_BUFFER_MB
    codec_device: Literal["auto", "cpu", "gpu"] = "auto"
    timeout_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 300.0

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**{key: _with_own_numbers(value) for key, value in values.items()})
        except ValidationError as error:
            sentences = [_sentence(type(self), details) for details in error.errors()[:_MOST_SENTENCES]]
            further = error.error_count() - len(sentences)
            raise ConfigError(
                shortened("; ".join([*sentences, f"and {further} more"][: None if further else -1]))
            ) from None
        self._check_layer_types()
        self._check_updates()
        self._check_own_messages()
        self._check_rotation()
        self._check_coding()

    @field_validator("levels")
    @classmethod
    def _levels_fit_bits(cls, levels: str | tuple[float, ...], info: ValidationInfo) -> str | tuple[float, ...]:
        bits = info.data.get("bits", EXACT_BITS)  # absent if itself impossible; levels have no use at 32 bits
        if isinstance(levels, tuple) and bits == "auto":
            raise ValueError("a list of levels fits one code width: bits cannot be 'auto'")
        if isinstance(levels, tuple) and bits != EXACT_BITS and len(levels) != 1 << (bits - 1):
            raise ValueError(f"bits={bits} needs {1 << (bits - 1)} levels; got {len(levels)}")
        return levels

    @field_validator("coding", mode="before")
    @classmethod
    def _coding_exists(cls, coding: Any) -> Any:
        if coding in _PLANNED_CODINGS:
            raise ValueError("is not available in this version; use 'huffman' or 'fixed'")
        return coding

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "") -> "QodaConfig":
        """Configuration from a mapping with the keys above.

        If the mapping has a key "qoda", that block is taken and the rest is left to the host. The lists `modules` and
        `ignore_modules` of CGX's Horovod fork become rules on names that contain theirs, after those of `layers`.

        Args:
            values: the mapping.
            source: where it comes from, for messages.
        """
        with _naming(source):
            return cls(**_plain_values(values))

    @classmethod
    def from_json(cls, path: str | Path) -> "QodaConfig":
        """Configuration from a JSON file, a DeepSpeed configuration with a "qoda" block included."""
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "QodaConfig":
        """Configuration from a YAML file, one of CGX's Horovod fork included."""
        return cls.from_dict(read_yaml(path), str(path))

    @classmethod
    def from_keywords(cls, **keywords: Any) -> "QodaConfig":
        """Configuration from keyword arguments alone: no environment, no file."""
        return cls(**keywords)

    @classmethod
    def from_environment(
        cls, base: "QodaConfig | None" = None, environ: Mapping[str, str] | None = None
    ) -> "QodaConfig":
        """`base` (or the defaults) with what the environment variables of torch_cgx set, see `ENVIRONMENT`.

        Args:
            base: configuration to change.
            environ: variables; `os.environ` if None.
        """
        return cls(**{**(base or cls()).to_dict(), **_environment_values(cls, environ)})

    @classmethod
    def load(
        cls, path: str | Path | None = None, environ: Mapping[str, str] | None = None, **keywords: Any
    ) -> "QodaConfig":
        """Configuration from all places: keywords before environment before file before defaults.

        Args:
            path: a .json, .yaml or .yml file, if any.
            environ: variables; `os.environ` if None, `{}` to read none.
            keywords: the keys above.
        """
        values: dict[str, Any] = {}
        if path is not None:
            with _naming(str(path)):
                values = _plain_values(_read(Path(path)))
                cls(**values)  # so that the message names the file
        return cls(**{**values, **_environment_values(cls, environ), **keywords})

    @property
    def settings(self) -> LayerSettings:
        """Settings of parameters that no rule changes."""
        auto = self.auto_bits if self.bits == "auto" else None
        return LayerSettings(
            bits=self.auto_bits.reference if self.bits == "auto" else self.bits,
            bucket_size=self.bucket_size,
            norm=self.norm,
            norm_format=self.norm_format,
            levels=self.levels,
            tails=self.tails.to_settings(),
            min_bits=None if auto is None else auto.min_bits,
            max_bits=None if auto is None else auto.max_bits,
            rotation=self.rotation,
            rounding=self.rounding,
            is_stratified=self.dither == "stratified",
        )

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        """The rules of `layers`."""
        return tuple(layer.to_rule() for layer in self.layers)

    def build_registry(
        self,
        parameters: nn.Module | Iterable[tuple[str, torch.Tensor]],
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> CodebookRegistry:
        """Registry of a model, or of its (name, tensor) pairs.

        Args:
            parameters: the model, or the pairs.
            shapes: parameter name -> its shape, where the host keeps only a part of it in each process.

        Raises:
            RegistryError: for a rule that matches nothing.
        """
        planning = BitPlanning(self.auto_bits.budget, self.auto_bits.reference) if self.bits == "auto" else None
        return CodebookRegistry.build(
            parameters,
            self.settings,
            self.rules,
            self.min_numel,
            shapes,
            self.codebooks == "per_layer",
            planning,
            self.coding,
        )

    def to_dict(self) -> dict[str, Any]:
        """All keys as JSON-able values; `from_dict` restores the configuration exactly."""
        return self.model_dump(mode="json")

    def canonical_json(self) -> str:
        """One text for equal configurations and different texts for different ones, for digests and messages."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def _check_layer_types(self) -> None:
        types = (*LAYER_TYPES, *(layer.as_type for layer in self.layers if layer.as_type is not None))
        for position, layer in enumerate(self.layers):
            if layer.type is not None and layer.type not in types:
                raise ConfigError(
                    f"layers[{position}].type={shown(layer.type)}: no layer type{_nearest(layer.type, types)}; "
                    f"the types are {', '.join(types)}"
                )

    def _check_own_messages(self) -> None:
        if self.exchange == "hierarchical" and (self.worker_norms or self.error_feedback):
            raise ConfigError(
                "exchange='hierarchical' quantizes the mean of each host's ranks, but worker_norms and error_feedback "
                "need every rank's own quantized gradient; use exchange='allgather', 'reduce_scatter' or 'auto'"
            )

    def _check_coding(self) -> None:
        if self.coding != "fixed" and self.exchange != "allgather":
            raise ConfigError(
                f"coding={self.coding!r} makes messages of unequal sizes, which exchange={self.exchange!r} does not "
                "send (and exchange='auto' does not predict); use exchange='allgather' or coding='fixed'"
            )

    def _check_rotation(self) -> None:
        rotates = "hadamard" in (self.rotation, *(layer.rotation for layer in self.layers)) or self.levels == "best"
        if self.rotations == "separate" and not rotates:
            raise ConfigError(
                'rotations="separate" needs buckets that are rotated: give rotation="hadamard", for all or in a rule '
                'of `layers`, or levels="best"'
            )
        if self.rotation == "none" and self.rounding == "stochastic" and self.levels != "best":
            return
        try:
            self.settings.codebook()
        except CodebookError as error:
            given = f"levels={self.levels!r}, rotation={self.rotation!r}, rounding={self.rounding!r}"
            raise ConfigError(shortened(f"{given}: {error}")) from None

    def _check_updates(self) -> None:
        schemes = ((self.levels, self.rotation), *((layer.levels, layer.rotation) for layer in self.layers))
        learnt = [
            scheme
            for scheme, rotation in schemes
            if scheme in (*TAIL_SCHEMES, "best") or (scheme == "adaptive" and rotation != "hadamard")
        ]
        if self.bits == "auto" and not self.update_levels.happens:
            raise ConfigError('update_levels: bits="auto" needs `at` or `every`')
        for position, layer in enumerate(self.layers):
            if self.bits != "auto" and (layer.min_bits is not None or layer.max_bits is not None):
                raise ConfigError(f'layers[{position}]: min_bits and max_bits are bounds for bits="auto"')
            if self.bits == "auto" and layer.bits is None and isinstance(layer.levels, tuple):
                raise ConfigError(f"layers[{position}].levels: a list of levels fits one code width: give `bits`, too")
        if learnt and not self.update_levels.happens:
            raise ConfigError(
                f"update_levels: {learnt[0]} levels need `at` or `every`; for levels that never change use "
                "levels='uniform' or 'exponential'"
            )


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put the place that a configuration came from before the messages about it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(shortened(f"{source}: {error}") if source else str(error)) from None


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path)
    raise ConfigError(f"the name of a configuration file ends in .json, .yaml or .yml; got {shown(path.name)}")


def _plain_values(values: Any) -> dict[str, Any]:
    """The configuration's own block, CGX's lists of modules translated to rules."""
    block = _mapping(values)
    if _BLOCK in block:
        misplaced = [key for key in block if key in QodaConfig.model_fields or key in ("modules", "ignore_modules")]
        if misplaced:
            raise ConfigError(f"{misplaced[0]}: stands beside the block {_BLOCK!r}; move it inside")
        block = _mapping(block[_BLOCK])
    values = {key: value for key, value in block.items() if key not in ("modules", "ignore_modules")}
    rules = _rules_of_cgx(block.get("modules"), block.get("ignore_modules"))
    if rules:
        layers = values.get("layers", ())
        if not isinstance(layers, (list, tuple)):
            raise ConfigError(f"layers={shown(layers)}: must be a list")
        values["layers"] = [*layers, *rules]
    return values


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"a configuration maps keys to values; got {shown(values)}")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{shown(key)}: keys are words")
    return dict(values)


def _rules_of_cgx(modules: Any, ignored: Any) -> list[dict[str, Any]]:
    """Rules that mean what the two lists of CGX's Horovod fork mean.

    There, a module's settings apply wherever its name occurs in a parameter's name, and ignored modules are never
    compressed, whatever else is said of them.
    """
    rules: list[dict[str, Any]] = []
    words = {"quantization_bits": "bits", "bucket_size": "bucket_size"}
    for position, module in enumerate(_listing("modules", modules)):
        where = f"modules[{position}]"
        if not isinstance(module, Mapping) or not isinstance(module.get("name"), str):
            raise ConfigError(f"{where}={shown(module)}: must have a name")
        for key in module:
            if key != "name" and key not in words:
                raise ConfigError(
                    f"{where}.{key}: unknown key{_nearest(str(key), ('name', *words))}; "
                    f"the keys are {', '.join(('name', *words))}"
                )
        settings = {words[key]: value for key, value in module.items() if key in words}
        with _naming(where):
            QodaConfig(**settings)
        if settings:
            rules.append({"name": _containing(module["name"]), **settings})
    for position, name in enumerate(_listing("ignore_modules", ignored)):
        if not isinstance(name, str):
            raise ConfigError(f"ignore_modules[{position}]={shown(name)}: must be a name")
        rules.append({"name": _containing(name), "bits": EXACT_BITS})
    return rules


def _listing(key: str, values: Any) -> Sequence[Any]:
    if values is None:
        return ()
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"{key}={shown(values)}: must be a list")
    return values


def _containing(name: str) -> str:
    """Shell pattern for the names that contain this one."""
    literal = "".join(f"[{character}]" if character in "*?[" else character for character in name)
    return f"*{literal}*"


def _environment_values(cls: type[QodaConfig], environ: Mapping[str, str] | None) -> dict[str, Any]:
    variables = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for variable, key in ENVIRONMENT.items():
        text = variables.get(variable, "").strip()
        if not text:
            continue
        try:
            values[key] = int(text)
        except ValueError:
            raise ConfigError(f"{variable}={shown(text)}: must be a whole number") from None
        with _naming(f"environment variable {variable}"):
            cls(**{key: values[key]})
    return values


_MESSAGES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a word",
    "tuple_type": "must be a list",
    "model_type": "must map keys to values",
    "greater_than": "must be larger than {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be finite",
}


def _sentence(model: type[_Model], details: ErrorDetails) -> str:
    """What is wrong with one key."""
    location, kind, context = details["loc"], details["type"], details.get("ctx", {})
    key = shown(_path(location)).strip("'\"")
    if kind == "extra_forbidden":
        known = tuple(_model_at(model, location).model_fields)
        return f"{key}: unknown key{_nearest(str(location[-1]), known)}; the keys are {', '.join(known)}"
    if kind == "literal_error":
        words = _literals(model, location)
        message = f"must be {_alternatives(words)}{_nearest(details['input'], words)}"
    elif kind == "value_error":
        message = str(context["error"])
    else:
        message = _MESSAGES[kind].format(**context) if kind in _MESSAGES else details["msg"]
    return f"{key}={shown(details['input'])}: {message}"


def _path(location: Sequence[int | str]) -> str:
    """A key as one would write it, such as layers[3].bits."""
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return words.removeprefix(".")


def _model_at(model: type[_Model], location: Sequence[int | str]) -> type[_Model]:
    """The model whose key the last part of the location is."""
    if location[0] == "layers" and len(location) > 1:
        return LayerRuleFields
    blocks: dict[str, type[_Model]] = {"update_levels": UpdateLevels, "tails": Tails, "auto_bits": AutoBits}
    return blocks.get(str(location[0]), model) if len(location) > 1 else model


def _literals(model: type[_Model], location: Sequence[int | str]) -> tuple[str, ...]:
    annotation = _model_at(model, location).model_fields[str(location[-1])].annotation
    parts = [annotation, *get_args(annotation)]
    return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


def _nearest(word: Any, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.5) if isinstance(word, str) else []
    return f"; did you mean {found[0]!r}?" if found else ""


def _alternatives(words: Sequence[str]) -> str:
    quoted = [repr(word) for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
