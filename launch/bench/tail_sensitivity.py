#!/usr/bin/env python3
"""How much the error of TUQ and TNQ depends on the fitted exponent gamma and on where the tail begins, gmin.

On recorded gradients (`launch/bench/record_gradients.py`): the power law is fitted to the step before, then gamma is
multiplied by a factor, or gmin is chosen by another rule: a share of the values beyond it, or Kolmogorov-Smirnov's. A
power law is taken everywhere, as in the papers; the library itself takes a Laplace density where the tail is not heavy.
alpha follows by each of the three optima, and the expected squared error of the step itself is computed from its
histogram of magnitudes (rounding and clipping; layer types by codebooks of their own). Printed: geometric mean over all
sets of gradients of that error, divided by that of the fitted power law ("fitted": by that with the optimum
"expected"); with alpha of the least error of the step before ("measured"); and with the best alpha that a search on the
step itself finds for levels of the fitted density.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from launch.bench.quantizers import Gradients, all_gradients
from launch.train.options import HelpFormatter
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.registry import DEFAULT_MIN_NUMEL
from qoda_kernels.tails import (
    LARGEST_GAMMA,
    OPTIMA,
    SMALLEST_GAMMA,
    TAIL_SHARE,
    GminRule,
    Optimum,
    Scheme,
    TailModel,
    TailSettings,
    fit_tail,
    learnt_truncation,
    truncation,
)

SCHEMES: tuple[Scheme, ...] = ("tuq", "tnq")
FACTORS = (0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
SHARES = (0.01, 0.02, 0.05, 0.2, 0.3, 0.45)
LIBRARY = "Laplace where not heavy"
_CLIPS = np.geomspace(1e-2, 1.0, 60)  # of the largest magnitude, for the search


@dataclass(frozen=True)
class Row:
    """Error of one variant on one set of gradients, relative to the squared norm."""

    gradients: str
    scheme: str
    optimum: str
    variant: str
    bits: int
    error: float


def rows(gradients: Gradients, bits: int) -> Iterator[Row]:
    """All variants on one set of gradients."""
    before, now = _by_type(gradients, gradients.before), _by_type(gradients, gradients.now)
    power = sum(read.squared_norm for read in now.values())
    for scheme in SCHEMES:
        for optimum in OPTIMA:
            for variant in _variants():
                error = sum(
                    _error(now[kind], _model(read, variant), scheme, bits, optimum)  # type: ignore[arg-type]  # of OPTIMA
                    for kind, read in before.items()
                )
                yield Row(gradients.name, scheme, optimum, variant, bits, error / power)
        learnt = {
            kind: learnt_truncation(read, scheme, bits, TailSettings("measured"))[0] for kind, read in before.items()
        }
        error = sum(now[kind].squared_error(found.levels, found.clip) for kind, found in learnt.items())
        yield Row(gradients.name, scheme, "measured", "fitted", bits, error / power)
        best = sum(
            min(_error(now[kind], fit_tail(read).model, scheme, bits, "bound", clip * read.largest) for clip in _CLIPS)
            for kind, read in before.items()
        )
        yield Row(gradients.name, scheme, "best alpha", "fitted", bits, best / power)


def _by_type(gradients: Gradients, step: Sequence[Mapping[str, np.ndarray]]) -> dict[str, MagnitudeStatistics]:
    """Magnitudes of all workers' parameters that are quantized, merged by layer type."""
    parts: dict[str, list[MagnitudeStatistics]] = {}
    for worker in step:
        for name, values in worker.items():
            kind = gradients.layer_types[name]
            if values.size >= DEFAULT_MIN_NUMEL and kind not in ("bias", "norm"):
                parts.setdefault(kind, []).append(MagnitudeStatistics.gather(values))
    return {kind: MagnitudeStatistics.merge_in_order(read) for kind, read in parts.items()}


def _variants() -> tuple[str, ...]:
    gammas = [f"gamma x {factor:g}" for factor in FACTORS]
    shares = [f"gmin: {share:g} beyond" for share in SHARES]
    return ("fitted", LIBRARY, *gammas, *shares, "gmin: Kolmogorov-Smirnov")


def _model(read: MagnitudeStatistics, variant: str) -> TailModel:
    rule: GminRule = "kolmogorov_smirnov" if variant.endswith("Smirnov") else "quantile"
    share = float(variant.split()[1]) if variant.endswith("beyond") else TAIL_SHARE
    fit = fit_tail(read, rule, share)
    if variant == LIBRARY or fit.power_law is None:
        return fit.model
    if variant.startswith("gamma"):
        gamma = fit.power_law.gamma * float(variant.rsplit(maxsplit=1)[1])
        return replace(fit.power_law, gamma=min(max(gamma, SMALLEST_GAMMA), LARGEST_GAMMA))
    return fit.power_law


def _error(
    now: MagnitudeStatistics,
    model: TailModel,
    scheme: Scheme,
    bits: int,
    optimum: Optimum,
    clip: float | None = None,
) -> float:
    found = truncation(model, scheme, bits, optimum, clip=clip)
    return now.squared_error(found.levels, found.clip)


def summary(found: Sequence[Row]) -> str:
    """Geometric means over the sets of gradients, relative to the default fit's with the same optimum."""
    lines = [
        f"{'scheme':6s} {'variant':26s} " + " ".join(f"{name:>12s}" for name in (*OPTIMA, "measured", "best alpha"))
    ]
    for scheme in SCHEMES:
        for variant in _variants():
            cells = []
            for optimum in (*OPTIMA, "measured", "best alpha"):
                ratio = _ratio(found, scheme, optimum, variant)
                cells.append(f"{'':12s}" if ratio is None else f"{ratio:12.3f}")
            lines.append(f"{scheme:6s} {variant:26s} " + " ".join(cells))
    return "\n".join(lines)


def _ratio(found: Sequence[Row], scheme: str, optimum: str, variant: str) -> float | None:
    """Of the fitted variant: relative to "expected"; of the others: relative to the fitted one with their optimum."""
    errors = {
        row.gradients: row.error
        for row in found
        if (row.scheme, row.optimum, row.variant) == (scheme, optimum, variant)
    }
    base = ("expected" if variant == "fitted" else optimum, "fitted")
    bases = {row.gradients: row.error for row in found if row.scheme == scheme and (row.optimum, row.variant) == base}
    if not errors:
        return None
    return math.exp(sum(math.log(errors[name] / bases[name]) for name in errors) / len(errors))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print, write."""
    options = _parser().parse_args(arguments)
    found = [row for gradients in all_gradients(options.recordings) for row in rows(gradients, options.bits)]
    if not found:
        print(f"{options.recordings} holds no recordings", file=sys.stderr)
        return 2
    print(summary(found))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({**asdict(row), "error": float(f"{row.error:.5g}")}) for row in found)
        options.json.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="directory with recorded gradients")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=3, help="code width")
    parser.add_argument("--seed", type=int, default=0, help="not used: nothing here is random")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
