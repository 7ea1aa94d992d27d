#!/usr/bin/env python3
"""Error of quantizers at their bits on the wire, on recorded gradients and on synthetic ones.

Recordings come from `launch/bench/record_gradients.py`. What learns, learns from the step before the one that is
measured. Parameters that travel exact by default (biases, norms, small ones) are left out for every method. Our
messages are made and decoded by the real codec, headers and padding counted; the others' bits are those of their codes
and scales. Errors are |Q(v) - v|^2 / |v|^2 of one worker, and of the mean over all workers.

Methods: ours (names begin with "ours-"): levels of least variance per layer type ("ours-adaptive", QODA's), the same
with Huffman-coded messages ("-coded"), with the workers' random numbers stratified ("-stratified"), or with planned
bits per layer ("ours-auto", budget: the bytes of equal bits); rotated buckets, rounded at random ("ours-rotation") or
to nearest with EDEN's scale ("ours-rotation-nearest", with Lloyd's and Max's levels or uniform ones, "-uniform"), by a
rotation common to the workers or by one of each worker's own ("-separate"); the least error of these by the statistics
("ours-best"), or the least per bit of coded messages ("ours-best-coded"); and the schemes that clip ("ours-tuq", ...).
QSGD (uniform levels, buckets of 512, maximum norm), NUQSGD (exponential levels, L2 norm), ALQ's procedure (levels of
least variance from truncated normals, one codebook for all layers, buckets of 8192, L2 norm). The rest is described in
`launch/bench/rival_quantizers.py`.

The summary compares at each width, of one worker and of the mean over the workers: our best method with fixed-length
codes and with entropy coding, the best of the papers that this project follows (QSGD, NUQSGD, ALQ and QODA's levels,
TUQ, TNQ, TBQ; fixed length), and the best of all others; a method that has one width is compared at that one.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import numpy.typing as npt
import torch

from launch.bench.rival_quantizers import RIVALS, eden
from launch.train.options import HelpFormatter, positive
from qoda_kernels import entropy
from qoda_kernels.codebook import Codebook
from qoda_kernels.codec import Codec
from qoda_kernels.coded_message import MessageCoder
from qoda_kernels.gaussian import level_probabilities
from qoda_kernels.layout import MessagePlan, Slice
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.registry import BitPlanning, CodebookRegistry, LayerRule, LayerSettings
from qoda_kernels.statistics import HistogramStatistics, TruncatedNormalStatistics
from qoda_kernels.wire import MessageContext

Float32Array = npt.NDArray[np.float32]
Worker = dict[str, Float32Array]
BITS = tuple(range(2, 9))
MOMENTS = ("early", "middle", "late")
PAPERS = ("QSGD", "NUQSGD", "ALQ", "ours-adaptive", "ours-tuq", "ours-tnq", "ours-tbq")
_SPARE_BITS = 0.1
_KINDS = {"normalised_error": "one worker", "mean_error": "mean"}


@dataclass(frozen=True)
class Gradients:
    """What is quantized.

    Attributes:
        name: how tables call it.
        layer_types: parameter -> layer type.
        before: each worker's gradients of the step before.
        now: each worker's gradients.
    """

    name: str
    layer_types: Mapping[str, str]
    before: tuple[Worker, ...]
    now: tuple[Worker, ...]


@dataclass(frozen=True)
class Measurement:
    """One row of the result; `mean_error` is that of the mean over the workers."""

    gradients: str
    bits_on_wire: float
    method: str
    normalised_error: float
    mean_error: float
    workers: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a summary, write the rows and the picture."""
    logging.disable(logging.WARNING)
    options = _parser().parse_args(arguments)
    rows: list[Measurement] = []
    for gradients in _all_gradients(options):
        rows += measure(gradients, options.seed, options.methods)
        print(f"measured {gradients.name}", flush=True)
    if options.add_to is not None and options.add_to.exists():
        earlier = [Measurement(**row) for row in json.loads(options.add_to.read_text())]
        new = {(row.gradients, row.method) for row in rows}
        rows = [row for row in earlier if (row.gradients, row.method) not in new] + rows
        order = list(dict.fromkeys(row.gradients for row in earlier + rows))
        rows.sort(key=lambda row: order.index(row.gradients))
    print(summary(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("[\n" + ",\n".join(json.dumps(_rounded(row)) for row in rows) + "\n]\n")
    if options.plot is not None:
        from launch.bench.quantizers_plot import draw

        draw(options.plot, rows)
    return 0


def measure(gradients: Gradients, seed: int, pattern: str = "*") -> list[Measurement]:
    """All methods on one set of gradients whose names fit the shell pattern."""
    shapes = [(name, torch.zeros(values.size)) for name, values in gradients.now[0].items()]
    rules = tuple(LayerRule(name=literal(name), as_type=kind) for name, kind in gradients.layer_types.items())
    plain = CodebookRegistry.build(shapes, rules=rules)
    kept = [name for name, entry in plain.parameters.items() if not plain.codebooks[entry.codebook].is_exact]
    rows = []
    for method, (quantizer, widths) in {**RIVALS, "EDEN, common rotation": (eden, BITS)}.items():
        for bits in widths if fnmatchcase(method, pattern) else ():
            decoded, sent = [], 0.0
            for rank, worker in enumerate(gradients.now):
                rng = np.random.default_rng([seed, bits, 0 if "common" in method else rank])
                parts = [quantizer(worker[name], bits, rng) for name in kept]
                decoded.append({name: part[0] for name, part in zip(kept, parts, strict=True)})
                sent += sum(part[1] for part in parts)
            rows.append(_row(gradients, method, kept, decoded, sent))
    types = tuple(LayerRule(name=literal(name), as_type=gradients.layer_types[name]) for name in kept)
    one = tuple(LayerRule(name=literal(name), as_type="everything") for name in kept)
    narrowed = [(name, torch.zeros(gradients.now[0][name].size)) for name in kept]
    for bits in BITS:
        for method, codec in _codecs_methods(bits).items():
            if not any(fnmatchcase(method + suffix, pattern) for suffix, _, _ in codec.variants):
                continue
            rules = one if method == "ALQ" else types
            registry = CodebookRegistry.build(
                narrowed,
                codec.settings,
                rules,
                per_layer=codec.planning is not None,
                planning=codec.planning,
                coding=codec.coding,
            )
            registry, statistics = learn(registry, gradients.before, method == "ALQ")
            for suffix, is_coded, is_stratified in codec.variants:
                used = statistics if is_coded else None
                rotations = "separate" if "-separate" in suffix else "common"
                decoded, sent = through_the_codec(registry, used, gradients.now, kept, seed, is_stratified, rotations)
                rows.append(_row(gradients, method + suffix, kept, decoded, sent))
        bound = 2.0 ** (-2 * bits)
        rows.append(Measurement(gradients.name, bits, "Gaussian bound", bound, bound, 1))
    return rows


@dataclass(frozen=True)
class _Method:
    """A method that the codec measures: its variants are (suffix of the name, entropy-coded, stratified)."""

    settings: LayerSettings
    planning: BitPlanning | None = None
    coding: str = "fixed"
    variants: tuple[tuple[str, bool, bool], ...] = (("", False, False),)


_CODED = (("", False, False), ("-coded", True, False))
_SEPARATE = (("", False, False), ("-separate", False, False))
_SEPARATE_CODED = (("-coded", True, False), ("-separate-coded", True, False))
_STRATIFIED = (("-stratified", False, True), ("-stratified-coded", True, True))


def _codecs_methods(bits: int) -> dict[str, _Method]:
    """What the codec measures at one width, by name."""
    nearest = LayerSettings(bits, rotation="hadamard", rounding="nearest")
    best = LayerSettings(bits, levels="best", rounding="nearest")
    methods = {
        "QSGD": _Method(LayerSettings(bits, levels="uniform")),
        "NUQSGD": _Method(LayerSettings(bits, norm="l2", levels="exponential")),
        "ALQ": _Method(LayerSettings(bits, bucket_size=8192, norm="l2")),
        "ours-adaptive": _Method(LayerSettings(bits), variants=_CODED + _STRATIFIED),
        "ours-adaptive-small-buckets": _Method(LayerSettings(bits, bucket_size=128, norm_format="bf16")),
        "ours-rotation": _Method(LayerSettings(bits, rotation="hadamard"), variants=_STRATIFIED[:1]),
        "ours-rotation-nearest": _Method(nearest, variants=_SEPARATE),
        "ours-rotation-nearest-uniform": _Method(replace(nearest, levels="uniform"), variants=_SEPARATE_CODED),
        "ours-best": _Method(best),
        "ours-best-coded": _Method(best, coding="huffman"),
    }
    for scheme in ("tuq", "tnq", "tbq", "laplace"):
        methods[f"ours-{scheme}"] = _Method(LayerSettings(bits, levels=scheme))
    if bits < max(BITS):  # at the largest width nothing is left to plan
        planning, bounds = BitPlanning("bytes", bits), {"min_bits": min(BITS), "max_bits": max(BITS)}
        methods["ours-auto"] = _Method(LayerSettings(bits, **bounds), planning, variants=_CODED + _STRATIFIED)
        methods["ours-auto-rotation-nearest"] = _Method(replace(nearest, **bounds), planning, variants=_SEPARATE)
        uniform = replace(nearest, levels="uniform", **bounds)
        methods["ours-auto-rotation-nearest-uniform"] = _Method(uniform, planning, variants=_SEPARATE_CODED)
        methods["ours-auto-best"] = _Method(replace(best, **bounds), planning)
        methods["ours-auto-best-coded"] = _Method(replace(best, **bounds), planning, "huffman")
    return methods


def learn(
    registry: CodebookRegistry, before: Sequence[Worker], from_normals: bool
) -> tuple[CodebookRegistry, dict[str, Any]]:
    """The registry after an update from the workers' gradients of the step before, and the statistics."""
    statistics: dict[str, Any] = {}
    for key in registry.adaptive_keys:
        settings = registry.settings[key]  # the norm of "best" codebooks is another one
        kind: Any = TruncatedNormalStatistics if from_normals else HistogramStatistics
        kind = MagnitudeStatistics if settings.clips else kind
        names = [name for name, entry in registry.parameters.items() if entry.codebook == key]
        parts = [kind.gather(worker[name], settings.bucket_size, settings.norm) for worker in before for name in names]
        merged = kind.merge_in_order(parts)
        if merged.squared_norm > 0.0:
            statistics[key] = merged
    return (registry.updated(statistics) if statistics else registry), statistics


def through_the_codec(
    registry: CodebookRegistry,
    statistics: Mapping[str, Any] | None,
    now: Sequence[Worker],
    kept: Sequence[str],
    seed: int,
    is_stratified: bool = False,
    rotations: str = "common",
) -> tuple[list[Worker], float]:
    """What each worker's message decodes to, and the bits of all messages.

    Args:
        registry: of the parameters `kept`.
        statistics: from which it has learnt, for entropy-coded messages; None for the codes that the codebooks carry,
            or for fixed length.
        now: each worker's gradients.
        kept: the parameters to quantize.
        seed: of random rounding.
        is_stratified: whether the workers' random numbers are stratified.
        rotations: "common" to the workers, or "separate".
    """
    slices = [
        Slice(name, 0, entry.numel, torch.float32, entry.codebook, entry.offset)
        for name, entry in registry.parameters.items()
    ]
    plan = MessagePlan.build(slices, registry.codebooks)
    codec = Codec(plan, registry.codebooks)
    if statistics is not None:
        weights = {
            key: (book.bits, _weights(book, statistics.get(key)))
            for key, book in registry.codebooks.items()
            if not book.is_exact
        }
    else:
        weights = {key: (book.bits, book.weights) for key, book in registry.codebooks.items() if book.weights}
    coder = MessageCoder(plan, entropy.main_protocol(weights)) if weights else None
    decoded, sent = [], 0.0
    for rank, worker in enumerate(now):
        strata = len(now) if is_stratified else 1
        context = MessageContext(seed, 1, rank, 0, registry.version, rank, 0, strata, rotations)
        message = codec.encode([torch.from_numpy(worker[name]) for name in kept], context)
        values = codec.decode_mean([message], [context])
        decoded.append({name: value.numpy() for name, value in zip(kept, values, strict=True)})
        size = message.numel()
        if coder is not None:
            size = coder.encode(message.numpy(), np.zeros(coder.maximum_bytes, dtype=np.uint8))
        sent += 8.0 * size
    return decoded, sent


def _weights(book: Codebook, statistics: Any) -> tuple[int, ...]:
    """Of the levels, for their code; those of rotated buckets need no statistics."""
    if book.rounding == "nearest":
        return tuple(int(weight) for weight in np.rint(level_probabilities(book) * entropy.WEIGHT_TOTAL))
    return entropy.level_weights(book.levels, statistics)


def _row(gradients: Gradients, method: str, kept: Sequence[str], decoded: Sequence[Worker], sent: float) -> Measurement:
    error, power, mean_error, mean_power = squared_errors(gradients, kept, decoded)
    numel = sum(worker[name].size for worker in gradients.now for name in kept)
    mean = mean_error / mean_power
    return Measurement(gradients.name, sent / numel, method, error / power, mean, len(gradients.now))


def squared_errors(
    gradients: Gradients, kept: Sequence[str], decoded: Sequence[Worker]
) -> tuple[float, float, float, float]:
    """Squared error and squared norm of all workers' gradients together; and the same two of the workers' mean."""
    error = power = mean_error = mean_power = 0.0
    for name in kept:
        exact = np.stack([worker[name] for worker in gradients.now]).astype(np.float64)
        found = np.stack([worker[name] for worker in decoded]).astype(np.float64)
        error += float(((found - exact) ** 2).sum())
        power += float((exact**2).sum())
        mean_error += float(((found.mean(axis=0) - exact.mean(axis=0)) ** 2).sum())
        mean_power += float((exact.mean(axis=0) ** 2).sum())
    return error, power, mean_error, mean_power


def summary(rows: Sequence[Measurement]) -> str:
    """At each width our best methods against the papers' and against all others; see the file's docstring.

    Errors between two widths are interpolated: their logarithms, linearly over bits on the wire.
    """
    lines = [
        f"{'gradients':30s} bits      error   ours          relative to papers, others; with entropy coding           "
        "relative to papers, others"
    ]
    for name in dict.fromkeys(row.gradients for row in rows):
        of_set = [row for row in rows if row.gradients == name and row.method != "Gaussian bound"]
        for bits in BITS:
            for kind in ("normalised_error", "mean_error"):
                line = _compared(of_set, bits, kind)
                if line:
                    lines.append(f"{name:30s} {bits}.1 {_KINDS[kind]:>10s}   {line}")
    return "\n".join(lines)


def _compared(rows: Sequence[Measurement], bits: int, kind: str) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(row.method, []).append((row.bits_on_wire, getattr(row, kind)))
    at = {method: error_at(points, bits + 0.1) for method, points in curves.items()}
    known = {method: error for method, error in at.items() if error is not None and np.isfinite(error)}
    papers = min((known[method] for method in PAPERS if method in known), default=None)
    others = {method: error for method, error in known.items() if not method.startswith("ours-")}
    words = []
    for is_coded in (False, True):
        ours = {m: e for m, e in known.items() if m.startswith("ours-") and m.endswith("-coded") == is_coded}
        if papers is None or not others:
            return ""
        if not ours:
            words.append("nothing of so many bits")
            continue
        best = min(ours, key=lambda method: ours[method])
        ratios = {method: _ratio(curves[best], curves[method], bits + 0.1) for method in others}
        other = max(ratios, key=lambda method: ratios[method])
        words.append(
            f"{best.removeprefix('ours-'):26s} {ours[best]:.3g} "
            f"{ours[best] / papers:5.2f} {ratios[other]:5.2f} ({other})"
        )
    return "; ".join(words)


def _ratio(ours: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]], bits: float) -> float:
    """Our error over another method's, at so many bits; a method of one width is met at its own, if ours reaches it."""
    at = other[0][0] if len(other) == 1 else bits
    error = error_at(ours, at)
    if error is None:
        at, error = bits, error_at(ours, bits)
    known = error_at(other, bits)
    assert error is not None
    assert known is not None
    return error / known


def error_at(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """Error at so many bits, interpolated; None if unknown. A method that ends just below may leave the rest unused.

    For a method of one width it is that of its point.
    """
    known = sorted(points)
    if len(known) == 1:
        return known[0][1] if bits - 1.0 < known[0][0] <= bits + 0.5 else None
    if not known[0][0] <= bits <= known[-1][0] + _SPARE_BITS:
        return None
    return float(np.exp(np.interp(bits, [p[0] for p in known], np.log([p[1] for p in known]))))


def all_gradients(recordings: Path, only: str | None = None) -> Iterator[Gradients]:
    """Recorded gradients of a directory: all, or those of one network, or of one network and moment."""
    for path in sorted(recordings.glob("*.npz")):
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files if key != "layer_types"}
            types = json.loads(str(file["layer_types"]))
        for moment in MOMENTS:
            name = f"{path.stem}, {moment}"
            if only in (None, name, path.stem):
                steps = [_workers(arrays, f"{moment}/{shift}") for shift in (-1, 0)]
                yield Gradients(name, types, steps[0], steps[1])


def _all_gradients(options: argparse.Namespace) -> Iterator[Gradients]:
    if options.recordings is not None:
        yield from all_gradients(options.recordings, options.only)
    if options.only in (None, "synthetic"):
        for kind in ("Gaussian", "Laplace", "Student t3"):
            yield synthetic(kind, options.workers, options.size, options.seed)


def _workers(arrays: Mapping[str, Float32Array], prefix: str) -> tuple[Worker, ...]:
    workers: dict[int, Worker] = {}
    for key, values in arrays.items():
        if key.startswith(prefix + "/"):
            rank, name = key[len(prefix) + 1 :].split("/", 1)
            workers.setdefault(int(rank), {})[name] = values
    return tuple(workers[rank] for rank in sorted(workers))


def synthetic(kind: str, workers: int, size: int, seed: int) -> Gradients:
    """Workers that share half of their variance; the step before is another draw."""
    rng = np.random.default_rng(seed)
    draw = {
        "Gaussian": lambda: rng.standard_normal(size),
        "Laplace": lambda: rng.laplace(size=size),
        "Student t3": lambda: rng.standard_t(3, size),
    }[kind]
    steps = []
    for _ in range(2):
        common = draw()
        # Each worker has half of the common coordinates and draws the others anew: every one keeps the distribution.
        own = [np.where(rng.random(size) < 0.5, common, draw()).astype(np.float32) for _ in range(workers)]
        steps.append(tuple({"weight": values} for values in own))
    return Gradients(kind, {"weight": "other"}, steps[0], steps[1])


def _rounded(row: Measurement) -> dict[str, Any]:
    """A row with five digits."""
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in asdict(row).items()}


def literal(name: str) -> str:
    """Shell pattern for this name alone."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recordings", type=Path, help="directory with recorded gradients")
    parser.add_argument("--only", help="measure this recording alone, or 'synthetic'")
    parser.add_argument("--methods", default="*", help="measure only methods whose names fit this shell pattern")
    parser.add_argument("--workers", type=positive, default=4, help="of synthetic gradients")
    parser.add_argument("--size", type=positive, default=200_000, help="of synthetic gradients")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    parser.add_argument("--add-to", type=Path, help="take over the other rows of this file, written by an earlier run")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) to this file")
    parser.add_argument("--seed", type=int, default=0, help="of random numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
