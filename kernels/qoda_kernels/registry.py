"""The registry: which codebook every parameter of a model is quantized with.

Every parameter has a layer type (`layer_types.py`), every layer type a codebook; rules change either. Settings of one
parameter are found in this order, later ones winning field by field:

1. the defaults given to `CodebookRegistry.build`;
2. the default rules: types `bias` and `norm`, and parameters of fewer than `min_numel` elements, travel exact (32
   bits), because they are a vanishing share of the bytes and the most sensitive;
3. the user's rules in order, so that a rule which names a bias or a small layer compresses it all the same.

Parameters whose dtype is not float32, float16 or bfloat16 travel exact whatever the rules say.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from qoda_kernels.bit_allocation import Budget, Candidate, allocate
from qoda_kernels.codebook import EXACT_BITS, Codebook
from qoda_kernels.entropy import WEIGHT_TOTAL, coded_bits, level_weights, power_of_four
from qoda_kernels.errors import CodebookError, RegistryError
from qoda_kernels.gaussian import level_probabilities, nearest_codebook, relative_error, stochastic_codebook
from qoda_kernels.layer_types import layer_types, layer_types_of_named_parameters
from qoda_kernels.levels import Distribution, minimum_variance_levels, quantization_variance, uniform_levels
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.statistics import (
    ExchangedStatistics,
    HistogramStatistics,
    NormStatistics,
    StatisticsKind,
    statistics_class,
)
from qoda_kernels.tails import TAIL_SCHEMES, Scheme, TailSettings, learnt_truncation

LEVEL_SCHEMES = ("uniform", "exponential", "adaptive", *TAIL_SCHEMES, "best")
COMPRESSIBLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEFAULT_MIN_NUMEL = 1024
STRATIFIED_SHARE = 0.55
"""Of the error of a mean with independent random numbers, what stratified ones leave: 1/2 + 1/(2 K^2) for K ranks."""

STATE_FORMAT = 1

LearntFrom = Distribution | MagnitudeStatistics | NormStatistics
"""Statistics from which codebooks learn; `CodebookRegistry.statistics_class` says which of them."""

_DEFAULT_TAILS = TailSettings()
_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SELECTORS = ("type", "name", "min_numel", "max_numel")
_SHOWN_DIFFERENCES = 5
_DRAFT_SWEEPS = 2  # at most 3 % more variance than the best levels, a fifth of the time
_NORMAL_SAMPLE = 2**16


@dataclass(frozen=True)
class LayerSettings:
    """How the coordinates of one layer type are quantized.

    Attributes:
        bits: code width, 2 to 8; 32 means exact, and then the other fields have no meaning.
        bucket_size: coordinates that share one norm; a multiple of 128 between 128 and 8192.
        norm: "max" or "l2".
        norm_format: "fp32" or "bf16".
        levels: "uniform", "exponential", "adaptive" (see `codebook`), one of the schemes "tuq", "tnq", "tbq" and
            "laplace", which clip (`tails.py`), or 2^(bits-1) explicit magnitudes from 0 to 1. With rotation "adaptive"
            means those for normal coordinates (`gaussian.py`), which never change; "uniform" is the other choice.
            "best" chooses, at every update, what has the least error by the statistics: adaptive levels without
            rotation, or rotated buckets, rounded to nearest only if `rounding` allows it; until then rotated ones. With
            entropy coding it chooses by the error per bit of the coded messages, also among uniform levels.
        rotation: "none" or "hadamard" (`rotation.py`): buckets of 128, 256, 512 or 1024 coordinates.
        rounding: "stochastic"; or "nearest" for rotated buckets, where `norm` has no meaning.
        tails: how codebooks that clip are fitted.
        is_stratified: whether random numbers are stratified among the ranks: "best" then counts a random rounding's
            error by STRATIFIED_SHARE.
        min_bits: least code width that a plan may choose; None where the width never changes.
        max_bits: likewise, the largest one.
    """

    bits: int = 5
    bucket_size: int = 512
    norm: str = "max"
    norm_format: str = "fp32"
    levels: str | tuple[float, ...] = "adaptive"
    tails: TailSettings = _DEFAULT_TAILS
    min_bits: int | None = None
    max_bits: int | None = None
    rotation: str = "none"
    rounding: str = "stochastic"
    is_stratified: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether values travel raw."""
        return self.bits == EXACT_BITS

    @property
    def is_adaptive(self) -> bool:
        """Whether the levels or the bits follow the gradients' statistics."""
        learns = self.clips or self.levels == "best" or (self.levels == "adaptive" and self.rotation == "none")
        return (learns or self.widths is not None) and not self.is_exact

    @property
    def widths(self) -> range | None:
        """Code widths among which a plan chooses; None where the width never changes."""
        if self.is_exact or self.min_bits is None or self.max_bits is None:
            return None
        return range(self.min_bits, self.max_bits + 1)

    @property
    def clips(self) -> bool:
        """Whether the codebook clips at a value learnt from the gradients' magnitudes."""
        return self.levels in TAIL_SCHEMES and not self.is_exact

    @property
    def learns_from_norms(self) -> bool:
        """Whether only the bits follow the gradients, and squared norms tell all: every bucket is rotated."""
        return self.is_adaptive and self.rotation != "none"

    @property
    def level_scheme(self) -> str:
        """One word: one of LEVEL_SCHEMES, "explicit", or "exact" where there are no levels."""
        if self.is_exact:
            return "exact"
        return self.levels if isinstance(self.levels, str) else "explicit"

    def codebook(self) -> Codebook:
        """Codebook that training starts with.

        Adaptive levels start as the better of uniform and exponential ones, judged by the largest of their variances
        on synthetic normal, Laplace and Student-t3 buckets of 512: exponential up to 4 bits with the max norm and up to
        6 bits with the L2 norm, whose normalised coordinates are of order 1/sqrt(512); else uniform. Codebooks that
        will clip start in the same way, with norms and without clipping: nothing is known yet.

        Raises:
            CodebookError: for impossible values.
        """
        if self.is_exact:
            return Codebook.exact()
        if self.levels == "best":
            return self.candidates[-1].codebook()
        if self.rotation != "none" or self.rounding != "stochastic":
            return self._rotated_codebook()
        fields: dict[str, Any] = {"bucket_size": self.bucket_size, "norm": self.norm, "norm_format": self.norm_format}
        if not isinstance(self.levels, str):
            return Codebook(bits=self.bits, levels=self.levels, **fields)
        if self.levels not in LEVEL_SCHEMES:
            raise CodebookError(
                f"levels must be one of {', '.join(LEVEL_SCHEMES)}, or explicit magnitudes; got {self.levels!r}"
            )
        if self.clips and self.norm != "max":
            raise CodebookError(f'levels {self.levels!r} clip instead of using norms: norm must be "max"')
        starts_exponential = self.bits <= (4 if self.norm == "max" else 6)
        if self.levels == "exponential" or ((self.levels == "adaptive" or self.clips) and starts_exponential):
            return Codebook.exponential(self.bits, **fields)
        return Codebook.uniform(self.bits, **fields)

    @property
    def candidates(self) -> tuple["LayerSettings", ...]:
        """What the levels "best" are chosen among; the last one is what training starts with.

        Raises:
            CodebookError: where the rotation is given.
        """
        if self.rotation != "none":
            raise CodebookError('levels "best" choose the rotation themselves: leave rotation "none"')
        plain = dataclasses.replace(self, levels="adaptive", rounding="stochastic")
        rotated = dataclasses.replace(plain, rotation="hadamard", norm="max")
        nearest = dataclasses.replace(rotated, rounding="nearest")
        return (plain, rotated, nearest) if self.rounding == "nearest" else (plain, rotated)

    def _rotated_codebook(self) -> Codebook:
        if self.rotation == "none":
            raise CodebookError('rounding to nearest is biased without rotation: rotation must be "hadamard"')
        if self.levels not in ("adaptive", "uniform"):
            raise CodebookError(
                f'levels {self.levels!r} are for buckets that are not rotated; with rotation use "adaptive" (for '
                'normal coordinates) or "uniform"'
            )
        is_uniform = self.levels == "uniform"
        if self.rounding == "nearest":
            return nearest_codebook(self.bits, is_uniform, self.bucket_size, self.norm_format)
        if self.norm != "max":
            raise CodebookError('rotated buckets that are rounded at random need norm "max"')
        book = stochastic_codebook(self.bits, self.bucket_size, self.norm_format)
        return book.with_levels(tuple(uniform_levels(self.bits).tolist()), 0) if is_uniform else book


@dataclass(frozen=True)
class LayerRule:
    """Settings, or another layer type, for the parameters that all the given selectors select.

    Attributes:
        type: selector: layer type, after all `as_type` of other rules have been applied.
        name: selector: shell pattern for the parameter's whole name, case-sensitive; "*" also crosses dots.
        min_numel: selector: least number of elements.
        max_numel: selector: largest number of elements.
        as_type: layer type to assign; one of `LAYER_TYPES` or a new name, which gets a codebook of its own.
        bits: as in `LayerSettings`, like the six fields that follow; None leaves the setting as it is.
        bucket_size: coordinates that share one norm.
        norm: "max" or "l2".
        norm_format: "fp32" or "bf16".
        levels: scheme or explicit magnitudes.
        rotation: "none" or "hadamard".
        rounding: "stochastic" or "nearest".
        min_bits: least width that a plan of the bits may choose; a rule that gives `bits` fixes them.
        max_bits: likewise, the largest one.

    Raises:
        RegistryError: for a rule that selects nothing in particular, changes nothing, or contradicts itself.
    """

    type: str | None = None
    name: str | None = None
    min_numel: int | None = None
    max_numel: int | None = None
    as_type: str | None = None
    bits: int | None = None
    bucket_size: int | None = None
    norm: str | None = None
    norm_format: str | None = None
    levels: str | tuple[float, ...] | None = None
    min_bits: int | None = None
    max_bits: int | None = None
    rotation: str | None = None
    rounding: str | None = None

    def __post_init__(self) -> None:
        if self.levels is not None and not isinstance(self.levels, str):
            object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        given = self.to_dict()
        if not any(selector in given for selector in _SELECTORS):
            raise RegistryError(f"rule {self} selects no parameters: give it {', '.join(_SELECTORS)}")
        if not any(field not in _SELECTORS for field in given):
            fields = [field.name for field in dataclasses.fields(self) if field.name not in _SELECTORS]
            raise RegistryError(f"rule {self} changes nothing: give it {', '.join(fields)}")
        if self.min_numel is not None and self.max_numel is not None and self.min_numel > self.max_numel:
            raise RegistryError(f"rule {self}: min_numel is larger than max_numel")
        if self.min_bits is not None and self.max_bits is not None and self.min_bits > self.max_bits:
            raise RegistryError(f"rule {self}: min_bits is larger than max_bits")
        if self.as_type is not None and not _TYPE_NAME.fullmatch(self.as_type):
            raise RegistryError(f"rule {self}: a layer type is lower-case letters, digits and underscores")

    def __str__(self) -> str:
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The fields that are given, as JSON-able values; `LayerRule(**fields)` restores them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.levels, tuple):
            fields["levels"] = list(self.levels)
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `LayerSettings` that the rule sets."""
        names = (field.name for field in dataclasses.fields(LayerSettings))
        return {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}

    def selects(self, name: str, layer_type: str, numel: int) -> bool:
        """Whether all selectors select this parameter."""
        return (
            (self.type is None or self.type == layer_type)
            and (self.name is None or fnmatchcase(name, self.name))
            and (self.min_numel is None or numel >= self.min_numel)
            and (self.max_numel is None or numel <= self.max_numel)
        )


@dataclass(frozen=True)
class ParameterEntry:
    """What the registry knows of one parameter.

    Attributes:
        name: the parameter's name.
        layer_type: its layer type, after the rules.
        codebook: key of its codebook in `CodebookRegistry.codebooks`.
        shape: its shape.
        dtype: its dtype; gradients have the same.
        offset: 64-bit coordinate of its element 0 in the whole model: elements of the parameters before it.
    """

    name: str
    layer_type: str
    codebook: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BitPlanning:
    """By what the widths of codebooks with `LayerSettings.widths` are chosen (`bit_allocation.py`).

    Attributes:
        budget: "variance" for the fewest bytes with no more squared error than `reference` bits everywhere would have;
            "bytes" for the least squared error with no more bytes.
        reference: code width that the budget is that of.
    """

    budget: Budget
    reference: int


@dataclass(frozen=True)
class CodebookRegistry:
    """Codebooks of a model; immutable: an update of levels makes a new registry.

    Attributes:
        parameters: name -> entry, in the model's order; parameters that need no gradient are included, so that
            freezing one moves no other's coordinates.
        settings: codebook key -> settings it was made from.
        codebooks: codebook key -> codebook. The key is the layer type. Where rules split a type, most of its compressed
            elements keep the plain key, and the others' keys say what differs, as in "convolution/8bit".
        version: how many times levels have been updated.
        planning: how bits are planned; None where they never change.
        coding: "fixed", or "huffman": codebooks that may be coded carry weights: of normal coordinates at first, then
            from the statistics of every update. Those that clip, or have no zero, travel with fixed length.
    """

    parameters: Mapping[str, ParameterEntry]
    settings: Mapping[str, LayerSettings]
    codebooks: Mapping[str, Codebook]
    version: int = 0
    planning: BitPlanning | None = None
    coding: str = "fixed"

    @classmethod
    def build(
        cls,
        parameters: nn.Module | Iterable[tuple[str, torch.Tensor]],
        defaults: LayerSettings | None = None,
        rules: Sequence[LayerRule] = (),
        min_numel: int = DEFAULT_MIN_NUMEL,
        shapes: Mapping[str, Sequence[int]] | None = None,
        per_layer: bool = False,
        planning: BitPlanning | None = None,
        coding: str = "fixed",
    ) -> "CodebookRegistry":
        """Registry of a model.

        Args:
            parameters: the model, or where there is none its (name, tensor) pairs in order; only shapes and dtypes are
                read.
            defaults: settings of every parameter that no rule changes; `LayerSettings()` if None.
            rules: the user's rules, called `layers[i]` in messages as in the configuration.
            min_numel: parameters with fewer elements travel exact unless a rule says otherwise.
            shapes: parameter name -> its shape, where the host keeps only a part of it in each process.
            per_layer: whether every compressed parameter has a codebook of its own, with the key "type:name".
            planning: how bits are planned, where settings have more than one width.
            coding: "fixed" or "huffman".

        Raises:
            RegistryError: for a rule that matches nothing, settings that no codebook can have, a parameter given twice.
        """
        named, types = _named_parameters_and_types(parameters, shapes or {})
        resolved = {
            name: _resolve(name, types[name], tensor, defaults or LayerSettings(), rules, min_numel)
            for name, tensor in named.items()
        }
        _check_every_rule_matches(rules, named, types, resolved)
        keys = _codebook_keys(resolved.values())
        settings = {} if per_layer else {key: settings for (_, settings), key in keys.items()}
        entries: dict[str, ParameterEntry] = {}
        offset = 0
        for name, tensor in named.items():
            found = resolved[name]
            key = keys[found.layer_type, found.settings]
            if per_layer:
                key = key if found.settings.is_exact else f"{found.layer_type}:{name}"
                settings[key] = found.settings
            entries[name] = ParameterEntry(name, found.layer_type, key, tuple(tensor.shape), tensor.dtype, offset)
            offset += tensor.numel()
        codebooks = {key: _coded(book, coding) for key, book in _codebooks(settings, entries.values()).items()}
        return cls(entries, settings, codebooks, planning=planning, coding=coding)

    @property
    def adaptive_keys(self) -> tuple[str, ...]:
        """Keys of the codebooks whose levels, bits or entropy codes follow the gradients' statistics."""
        return tuple(key for key, settings in self.settings.items() if settings.is_adaptive or self._counts(key))

    def statistics_class(self, key: str, kind: StatisticsKind) -> type[ExchangedStatistics]:
        """What an adaptive codebook is to learn from; `kind` is meant where there is a choice."""
        settings = self.settings[key]
        if settings.clips:
            return MagnitudeStatistics
        return NormStatistics if settings.learns_from_norms else statistics_class(kind)

    def _counts(self, key: str) -> bool:
        """Whether a codebook's weights follow statistics; what is rotated looks alike whatever the gradient."""
        settings = self.settings[key]
        return self.coding != "fixed" and not settings.is_exact and settings.rotation == "none"

    @property
    def numel(self) -> int:
        """Elements of the whole model."""
        return sum(entry.numel for entry in self.parameters.values())

    @property
    def digest(self) -> bytes:
        """Eight bytes that differ when parameters, codebooks, levels or version differ."""
        text = json.dumps(self.describe(), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    def updated(self, statistics: Mapping[str, LearntFrom]) -> "CodebookRegistry":
        """Registry with minimum-variance levels (QODA, arXiv 2505.14371, step 1), its version one higher.

        Codebooks that clip get the levels and the clip value of their scheme instead (`tails.py`). Where `planning`
        says so, code widths are planned anew first: plans, and so the sizes of messages, change only here.

        Ranks that pass equal statistics get equal registries.

        Args:
            statistics: codebook key -> statistics merged over all ranks, of magnitudes for codebooks that clip, of
                norms at least where all buckets are rotated; adaptive codebooks that are left out keep their levels
                and version.

        Raises:
            RegistryError: for a key that is unknown, whose codebook is not adaptive, or whose statistics are not of
                the kind that its codebook needs.
        """
        version = self.version + 1
        for key in statistics:
            if key not in self.adaptive_keys:
                raise RegistryError(
                    f"codebook {key!r} is not adaptive; the adaptive ones: {_listed(self.adaptive_keys)}"
                )
        codebooks = {**self.codebooks, **self._planned(statistics, version)}
        for key, gathered in statistics.items():
            if self.settings[key].widths is None or self.planning is None:
                codebooks[key] = self._learnt(key, codebooks[key].bits, gathered, version)
            codebooks[key] = _coded(codebooks[key], self.coding, gathered)
        return dataclasses.replace(self, codebooks=codebooks, version=version)

    @property
    def first_codebooks(self) -> dict[str, Codebook]:
        """Codebooks that training starts with, by key."""
        return {key: _coded(settings.codebook(), self.coding) for key, settings in self.settings.items()}

    def _planned(self, statistics: Mapping[str, LearntFrom], version: int) -> dict[str, Codebook]:
        """New codebooks of all keys whose width is planned.

        A budget that the widths allowed for single types cannot keep is exceeded as little as possible.
        """
        keys = [key for key in self.adaptive_keys if key in statistics and self.settings[key].widths is not None]
        if self.planning is None or not keys:
            return {}
        numel = {key: sum(e.numel for e in self.parameters.values() if e.codebook == key) for key in keys}
        found: dict[str, dict[int, Codebook]] = {}
        errors: dict[str, dict[int, float]] = {}
        for key in keys:
            widths = {*(self.settings[key].widths or ()), self.planning.reference}
            # The budget is exact; the other widths' levels are good enough to choose by, and the chosen ones improved.
            found[key] = {
                bits: self._learnt(key, bits, statistics[key], version, is_draft=bits != self.planning.reference)
                for bits in sorted(widths)
            }
            errors[key] = {bits: _squared_error(book, statistics[key]) for bits, book in found[key].items()}
        layers = [
            [Candidate(bits, bits * numel[key], errors[key][bits]) for bits in self.settings[key].widths or ()]
            for key in keys
        ]
        if self.planning.budget == "variance":
            limit = sum(errors[key][self.planning.reference] for key in keys)
            least = sum(min(candidate.error for candidate in layer) for layer in layers)
        else:
            limit = float(sum(self.planning.reference * numel[key] for key in keys))
            least = float(sum(min(candidate.size for candidate in layer) for layer in layers))
        reference = self.planning.reference
        equal = (
            [(self.settings[key].widths or range(0)).index(reference) for key in keys]
            if all(reference in (self.settings[key].widths or ()) for key in keys)
            else None
        )
        plan = allocate(layers, self.planning.budget, max(limit, least), known=equal)
        chosen = {key: layers[i][plan[i]].bits for i, key in enumerate(keys)}
        return {
            key: found[key][bits] if bits == reference else self._learnt(key, bits, statistics[key], version)
            for key, bits in chosen.items()
        }

    def _learnt(
        self,
        key: str,
        bits: int,
        gathered: LearntFrom,
        version: int,
        is_draft: bool = False,
    ) -> Codebook:
        """A codebook of some width with the levels that its scheme takes from statistics; a draft is less exact."""
        settings, old = self.settings[key], self.codebooks[key]
        is_too_little = isinstance(gathered, NormStatistics) and not settings.learns_from_norms
        if isinstance(gathered, MagnitudeStatistics) != settings.clips or is_too_little:
            raise RegistryError(
                f"codebook {key!r} with levels {settings.levels!r} cannot learn from {type(gathered).__name__}"
            )
        if settings.levels == "best":
            return self._best(dataclasses.replace(settings, bits=bits), old, gathered, version)
        base = old if bits == old.bits else dataclasses.replace(settings, bits=bits).codebook()
        if isinstance(gathered, MagnitudeStatistics):
            truncation, _ = learnt_truncation(gathered, cast(Scheme, settings.levels), bits, settings.tails)
            return base.with_levels([float(level) for level in truncation.levels], version, truncation.clip)
        if settings.levels != "adaptive" or settings.rotation != "none":
            return base.with_levels(base.levels, version)
        effort = {"sweeps": _DRAFT_SWEEPS} if is_draft else {}
        levels = minimum_variance_levels(cast(Distribution, gathered), bits, previous=base.levels, **effort)
        return base.with_levels([float(level) for level in levels], version)

    def _best(self, settings: LayerSettings, old: Codebook, gathered: LearntFrom, version: int) -> Codebook:
        """The candidate with the least expected error of the mean over the ranks.

        Errors of rotated buckets are the same share of the squared norm whatever the gradient (`gaussian.py`), so the
        statistics tell them all. Where messages are entropy-coded, candidates differ in bits, too, and equal steps are
        among them: they have larger errors, and codes so much shorter that another width more than makes up for it. A
        bit more divides errors by four, so the least error times 4^bits is taken.
        """
        candidates = settings.candidates
        if self.coding != "fixed":
            equal_steps = (dataclasses.replace(each, levels="uniform") for each in (candidates[0], candidates[-1]))
            candidates = (*candidates, *equal_steps)
        found: list[tuple[float, Codebook]] = []
        for candidate in candidates:
            book = candidate.codebook()
            levels: Sequence[float] = book.levels
            if candidate.rotation == "none" and candidate.levels == "adaptive":
                is_start = old.rotation == "none" and old.bits == book.bits
                start = old.levels if is_start else book.levels
                levels = minimum_variance_levels(cast(Distribution, gathered), book.bits, previous=start).tolist()
            book = _coded(book.with_levels(levels, version), self.coding, gathered)
            is_cancelling = settings.is_stratified and candidate.rounding == "stochastic"
            error = _squared_error(book, gathered) * (STRATIFIED_SHARE if is_cancelling else 1.0)
            bits = coded_bits(book.bits, book.weights) if book.weights else float(book.bits)
            found.append((error * power_of_four(bits), book))
        return min(found, key=lambda pair: pair[0])[1]

    def _restored_codebook(self, fields: Mapping[str, Any]) -> Codebook:
        found = _codebook_of_state(fields)
        return found if found.weights and self.coding != "fixed" else _coded(found, self.coding)

    def describe(self) -> dict[str, Any]:
        """Everything that ranks must agree on, as JSON-able values; `differences` compares two descriptions."""
        return {
            "parameters": [
                {
                    "name": entry.name,
                    "shape": list(entry.shape),
                    "dtype": str(entry.dtype).removeprefix("torch."),
                    "layer_type": entry.layer_type,
                    "codebook": entry.codebook,
                    "offset": entry.offset,
                }
                for entry in self.parameters.values()
            ],
            "codebooks": {
                key: {**codebook.to_dict(), **_scheme(self.settings[key])} for key, codebook in self.codebooks.items()
            },
            "version": self.version,
        }

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, of plain Python values; `restored` takes it back exactly."""
        return {"format": STATE_FORMAT, **self.describe()}

    def restored(self, state: Mapping[str, Any]) -> "CodebookRegistry":
        """This registry with the levels and versions of `state`.

        Raises:
            RegistryError: for a state of another model, of other codebook formats, or that is no state; the message
                names the differences.
        """
        if state.get("format") != STATE_FORMAT:
            raise RegistryError(f"registry state has format {state.get('format')!r}; this version reads {STATE_FORMAT}")
        try:
            found = differences(
                _without_levels(self.describe()), _without_levels(state), "this model", "the saved state"
            )
            codebooks = {key: self._restored_codebook(fields) for key, fields in state["codebooks"].items()}
            version = int(state["version"])
        except (KeyError, TypeError, AttributeError, CodebookError) as error:
            raise RegistryError(f"the registry state is damaged: {error!r}") from error
        if found:
            raise RegistryError(
                "the saved state belongs to another model or configuration: "
                + _shortened(found)
                + "; start from the configuration it was saved with, or train on without the saved state"
            )
        return dataclasses.replace(self, codebooks={key: codebooks[key] for key in self.codebooks}, version=version)


def _coded(codebook: Codebook, coding: str, gathered: LearntFrom | None = None) -> Codebook:
    """The codebook with the weights of its entropy code, from statistics or, without any, of normal coordinates."""
    if coding == "fixed" or not codebook.may_be_coded:
        return dataclasses.replace(codebook, weights=()) if codebook.weights else codebook
    if codebook.rounding == "nearest":
        weights = tuple(int(weight) for weight in np.rint(level_probabilities(codebook) * WEIGHT_TOTAL))
    elif gathered is None or isinstance(gathered, MagnitudeStatistics | NormStatistics) or codebook.rotation != "none":
        weights = _normal_weights(codebook.levels, codebook.bucket_size, codebook.norm)
    else:
        weights = level_weights(codebook.levels, gathered)
    return dataclasses.replace(codebook, weights=weights)


@cache
def _normal_weights(levels: tuple[float, ...], bucket_size: int, norm: str) -> tuple[int, ...]:
    """Weights of levels for normal coordinates, from a fixed sample: the same on every rank."""
    sample = np.random.Generator(np.random.PCG64(0)).standard_normal(_NORMAL_SAMPLE, dtype=np.float32)
    return level_weights(levels, HistogramStatistics.gather(sample, bucket_size, norm))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], here: str, there: str) -> tuple[str, ...]:
    """What two descriptions (`CodebookRegistry.describe`) disagree on, one sentence each; empty if on nothing.

    Args:
        ours: one description.
        theirs: the other.
        here: what to call the first, such as "rank 0".
        there: what to call the second.
    """
    our_parameters = {entry["name"]: entry for entry in ours["parameters"]}
    their_parameters = {entry["name"]: entry for entry in theirs["parameters"]}
    found = _differences_of_entries("parameter", our_parameters, their_parameters, here, there, ignored=("offset",))
    if not found:
        pairs = zip(our_parameters, their_parameters, strict=True)
        found += [
            f"parameter {position} is {mine!r} in {here}, {other!r} in {there}"
            for position, (mine, other) in enumerate(pairs)
            if mine != other
        ][:1]
    found += _differences_of_entries("codebook", ours["codebooks"], theirs["codebooks"], here, there)
    if ours["version"] != theirs["version"]:
        found.append(f"registry version: {ours['version']} in {here}, {theirs['version']} in {there}")
    return tuple(found)


def _differences_of_entries(
    kind: str,
    ours: Mapping[str, Mapping[str, Any]],
    theirs: Mapping[str, Mapping[str, Any]],
    here: str,
    there: str,
    ignored: tuple[str, ...] = (),
) -> list[str]:
    found = [f"{kind} {name!r} is only in {here}" for name in ours if name not in theirs]
    found += [f"{kind} {name!r} is only in {there}" for name in theirs if name not in ours]
    for name in ours:
        for field, mine in ours[name].items() if name in theirs else ():
            other = theirs[name].get(field, mine)  # levels are absent where they are not compared
            if field not in ignored and mine != other:
                found.append(f"{kind} {name!r}: {_difference_of_values(field, mine, other, here, there)}")
    return found


def _difference_of_values(field: str, mine: Any, other: Any, here: str, there: str) -> str:
    if field == "levels" and len(mine) == len(other):
        position = next(position for position, level in enumerate(mine) if level != other[position])
        return f"level {position} of {len(mine)} is {mine[position]} in {here}, {other[position]} in {there}"
    if field == "levels":
        return f"{len(mine)} levels in {here}, {len(other)} in {there}"
    return f"{field} {mine} in {here}, {other} in {there}"


def _without_levels(description: Mapping[str, Any]) -> dict[str, Any]:
    """A description without what updates of levels change."""
    codebooks = {
        key: {name: value for name, value in fields.items() if name not in _learnt_fields(fields)}
        for key, fields in description["codebooks"].items()
    }
    return {**description, "codebooks": codebooks, "version": None}


def _scheme(settings: LayerSettings) -> dict[str, Any]:
    """What a description says of a codebook beyond its own fields."""
    widths = settings.widths
    return {"level_scheme": settings.level_scheme, "widths": None if widths is None else [widths[0], widths[-1]]}


def _learnt_fields(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of a described codebook that follow statistics."""
    if fields["level_scheme"] == "best":
        return ("levels", "version", "bits", "norm", "rotation", "rounding", "spread", "weights")
    if fields.get("widths") is not None:
        return ("levels", "version", "clip", "bits", "spread", "weights")
    is_learnt = fields["level_scheme"] == "adaptive" and fields["rotation"] == "none"
    is_learnt = is_learnt or fields["level_scheme"] in TAIL_SCHEMES
    return ("levels", "version", "clip", "weights") if is_learnt else ("version", "weights")


def _squared_error(codebook: Codebook, gathered: LearntFrom) -> float:
    """Expected squared error of everything that was gathered."""
    if isinstance(gathered, MagnitudeStatistics):
        return gathered.squared_error(codebook.levels, codebook.clip)
    if codebook.rotation != "none":
        return relative_error(codebook) * cast(ExchangedStatistics, gathered).squared_norm
    return quantization_variance(codebook.levels, cast(Distribution, gathered))


def _codebook_of_state(fields: Mapping[str, Any]) -> Codebook:
    return Codebook.from_dict({name: value for name, value in fields.items() if name not in ("level_scheme", "widths")})


def _named_parameters_and_types(
    parameters: nn.Module | Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if isinstance(parameters, nn.Module):
        named = {name: _whole(tensor, shapes.get(name)) for name, tensor in parameters.named_parameters()}
        return named, layer_types(parameters, shapes)
    pairs = list(parameters)
    types = layer_types_of_named_parameters(pairs)
    first_names: dict[int, str] = {}
    for name, tensor in pairs:
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            raise RegistryError(f"parameters {first!r} and {name!r} are one tensor: give it once")
    return dict(pairs), types


def _whole(tensor: torch.Tensor, shape: Sequence[int] | None) -> torch.Tensor:
    """A tensor without memory that has the parameter's whole shape, where the host keeps only a part."""
    return tensor if shape is None else torch.empty(tuple(shape), dtype=tensor.dtype, device="meta")


def _default_rules(min_numel: int) -> tuple[LayerRule, ...]:
    rules = [LayerRule(type="bias", bits=EXACT_BITS), LayerRule(type="norm", bits=EXACT_BITS)]
    if min_numel > 0:
        rules.append(LayerRule(max_numel=min_numel - 1, bits=EXACT_BITS))
    return tuple(rules)


@dataclass(frozen=True)
class _Resolution:
    """What the rules make of one parameter; `rules` are the positions of the user's rules that matched it."""

    layer_type: str
    settings: LayerSettings
    numel: int
    rules: frozenset[int]


def _resolve(
    name: str,
    layer_type: str,
    tensor: torch.Tensor,
    defaults: LayerSettings,
    rules: Sequence[LayerRule],
    min_numel: int,
) -> _Resolution:
    numel = tensor.numel()
    matched = set()
    for position, rule in enumerate(rules):
        if rule.as_type is not None and rule.selects(name, layer_type, numel):
            layer_type = rule.as_type
            matched.add(position)
    for position, rule in enumerate(rules):
        if rule.as_type is None and rule.selects(name, layer_type, numel):
            matched.add(position)
    fields: dict[str, Any] = {}
    for rule in _default_rules(min_numel):
        fields.update(rule.settings if rule.selects(name, layer_type, numel) else {})
    for position in sorted(matched):
        given = rules[position].settings
        if "bits" in given:
            fields.update(min_bits=None, max_bits=None)  # fixed
        fields.update(given)
    settings = dataclasses.replace(defaults, **fields)
    if settings.widths is not None:
        settings = dataclasses.replace(settings, bits=_nearest_width(settings.bits, settings.widths))
    if settings.is_exact or tensor.dtype not in COMPRESSIBLE_DTYPES:
        settings = LayerSettings(bits=EXACT_BITS)  # one value for all: what is not quantized has no other settings
    return _Resolution(layer_type, settings, numel, frozenset(matched))


def _nearest_width(bits: int, widths: range) -> int:
    if not widths:
        raise RegistryError(f"min_bits={widths.start} is larger than max_bits={widths.stop - 1}")
    return min(max(bits, widths[0]), widths[-1])


def _codebooks(settings: Mapping[str, LayerSettings], entries: Iterable[ParameterEntry]) -> dict[str, Codebook]:
    codebooks: dict[str, Codebook] = {}
    for entry in entries:
        if entry.codebook not in codebooks:
            try:
                codebooks[entry.codebook] = settings[entry.codebook].codebook()
            except CodebookError as error:
                raise RegistryError(f"settings of parameter {entry.name!r}: {error}") from error
    return codebooks


def _codebook_keys(resolved: Iterable[_Resolution]) -> dict[tuple[str, LayerSettings], str]:
    """Key of every (layer type, settings) that occurs, in order of first occurrence."""
    sizes: dict[tuple[str, LayerSettings], int] = {}
    for found in resolved:
        group = found.layer_type, found.settings
        sizes[group] = sizes.get(group, 0) + found.numel
    plain: dict[str, LayerSettings] = {}
    for layer_type, settings in sorted(sizes, key=lambda group: (group[1].is_exact, -sizes[group])):
        plain.setdefault(layer_type, settings)
    return {
        (layer_type, settings): layer_type
        if settings == plain[layer_type]
        else f"{layer_type}/{_suffix(settings, plain[layer_type])}"
        for layer_type, settings in sizes
    }


def _suffix(settings: LayerSettings, plain: LayerSettings) -> str:
    """The bits, and every other field that differs from the settings of the plain key: unique within a type."""
    words = [f"{settings.bits}bit"]
    if settings.is_exact:
        return words[0]
    if settings.widths != plain.widths:
        words.append("fixed" if settings.widths is None else f"{settings.min_bits}to{settings.max_bits}")
    if settings.bucket_size != plain.bucket_size:
        words.append(f"bucket{settings.bucket_size}")
    if settings.norm != plain.norm:
        words.append(settings.norm)
    if settings.norm_format != plain.norm_format:
        words.append(settings.norm_format)
    if settings.rotation != plain.rotation:
        words.append("rotated" if settings.rotation != "none" else "unrotated")
    if settings.rounding != plain.rounding:
        words.append(settings.rounding)
    if settings.levels != plain.levels:
        words.append(settings.level_scheme)
        if settings.level_scheme == "explicit":
            words.append(hashlib.blake2b(repr(settings.levels).encode(), digest_size=4).hexdigest())
    return "-".join(words)


def _check_every_rule_matches(
    rules: Sequence[LayerRule],
    named: Mapping[str, torch.Tensor],
    types: Mapping[str, str],
    resolved: Mapping[str, _Resolution],
) -> None:
    matched = frozenset[int]().union(*(found.rules for found in resolved.values()))
    for position, rule in enumerate(rules):
        if position not in matched:
            # A rule that assigns a type sees the types as they were, any other the types as assigned.
            seen = types if rule.as_type is not None else {name: found.layer_type for name, found in resolved.items()}
            reason = _why_nothing_matches(rule, seen, {name: tensor.numel() for name, tensor in named.items()})
            raise RegistryError(f"layers[{position}] {rule} matches no parameter: {reason}")


def _why_nothing_matches(rule: LayerRule, types: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    present = tuple(dict.fromkeys(types.values()))
    if not sizes:
        return "the model has none"
    if rule.type is not None and rule.type not in present:
        nearest = difflib.get_close_matches(rule.type, present, n=1)
        suggestion = f"did you mean {nearest[0]!r}? " if nearest else ""
        return f"none has type {rule.type!r}; {suggestion}the types of this model are {_listed(present)}"
    if rule.name is not None and not any(fnmatchcase(name, rule.name) for name in sizes):
        return f"no name fits {rule.name!r}; the nearest parameter name is {_nearest_name(rule.name, tuple(sizes))!r}"
    fitting = [name for name, size in sizes.items() if _without_sizes(rule).selects(name, types[name], size)]
    if not fitting:
        return f"no parameter of type {rule.type!r} has a name that fits {rule.name!r}"
    smallest, largest = min(sizes[name] for name in fitting), max(sizes[name] for name in fitting)
    return f"those that its other selectors select have {smallest} to {largest} elements"


def _without_sizes(rule: LayerRule) -> LayerRule:
    return dataclasses.replace(rule, name=rule.name or "*", min_numel=None, max_numel=None)


def _nearest_name(pattern: str, names: Sequence[str]) -> str:
    """The name most like the pattern without its wildcards, compared with the name's endings of any length."""
    wanted = pattern.translate(str.maketrans("", "", "*?[]!")).strip(".")

    def similarity(name: str) -> float:
        parts = name.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts)))
        return max(difflib.SequenceMatcher(None, wanted, ending).ratio() for ending in (*endings, *parts))

    return max(names, key=similarity)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"


def _shortened(sentences: Sequence[str]) -> str:
    rest = len(sentences) - _SHOWN_DIFFERENCES
    return "; ".join(sentences[:_SHOWN_DIFFERENCES]) + (f"; and {rest} more" if rest > 0 else "")
