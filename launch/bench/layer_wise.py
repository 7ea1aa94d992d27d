#!/usr/bin/env python3
"""What codebooks of their own bring: levels for each layer type, and for each layer, against one for the whole model.

Quantizes recorded gradients (`launch/bench/record_gradients.py`) with levels of least variance, learnt from the step
before, in four ways at the same code width: one codebook for everything; one for each layer type; one for each layer;
and one for each layer with planned bits that take no more bytes ("auto"). Prints, per network, the mean over the
recorded steps of each error divided by that of one codebook, of one worker: what is below 1 is variance saved.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from launch.bench.quantizers import Gradients, all_gradients, learn, literal, squared_errors, through_the_codec
from launch.train.options import HelpFormatter
from qoda_kernels.registry import BitPlanning, CodebookRegistry, LayerRule, LayerSettings

WAYS = ("one", "types", "layers", "auto")
_MIN_BITS, _MAX_BITS = 2, 8


@dataclass(frozen=True)
class Row:
    """Normalised squared errors of one worker at one code width."""

    gradients: str
    layers: int
    layer_types: int
    bits: int
    one: float
    types: float
    layers_error: float
    auto: float


def measure(gradients: Gradients, bits: int, seed: int) -> Row:
    """One set of gradients at one code width, in all four ways."""
    shapes = [(name, torch.zeros(values.size)) for name, values in gradients.now[0].items()]
    rules = tuple(LayerRule(name=literal(name), as_type=kind) for name, kind in gradients.layer_types.items())
    plain = CodebookRegistry.build(shapes, rules=rules)
    kept = [name for name, entry in plain.parameters.items() if not plain.codebooks[entry.codebook].is_exact]
    narrowed = [(name, tensor) for name, tensor in shapes if name in kept]
    errors = {}
    for way in WAYS:
        types = {name: "everything" if way == "one" else gradients.layer_types[name] for name in kept}
        planned = LayerSettings(bits, min_bits=_MIN_BITS, max_bits=_MAX_BITS)
        registry = CodebookRegistry.build(
            narrowed,
            planned if way == "auto" else LayerSettings(bits),
            tuple(LayerRule(name=literal(name), as_type=kind) for name, kind in types.items()),
            per_layer=way in ("layers", "auto"),
            planning=BitPlanning("bytes", bits) if way == "auto" else None,
        )
        registry, _ = learn(registry, gradients.before, False)
        decoded, _ = through_the_codec(registry, None, gradients.now, kept, seed)
        error, power, *_ = squared_errors(gradients, kept, decoded)
        errors[way] = error / power
    kinds = len({gradients.layer_types[name] for name in kept})
    return Row(gradients.name, len(kept), kinds, bits, errors["one"], errors["types"], errors["layers"], errors["auto"])


def summary(rows: Sequence[Row]) -> str:
    """Per network and width, the mean over its recorded steps of the errors relative to one codebook."""
    lines = [f"{'network':24s} layers types bits   per type  per layer  per layer, planned bits"]
    networks = dict.fromkeys((row.gradients.split(",")[0], row.bits) for row in rows)
    for network, bits in networks:
        of_network = [row for row in rows if row.gradients.split(",")[0] == network and row.bits == bits]
        first = of_network[0]
        means = [
            statistics.fmean(getattr(row, way) / row.one for row in of_network)
            for way in ("types", "layers_error", "auto")
        ]
        lines.append(
            f"{network:24s} {first.layers:6d} {first.layer_types:5d} {bits:4d} "
            + " ".join(f"{mean:10.3f}" for mean in means)
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the rows."""
    logging.disable(logging.WARNING)
    options = _parser().parse_args(arguments)
    rows = [
        measure(gradients, bits, options.seed)
        for gradients in all_gradients(options.recordings, options.only)
        for bits in options.bits
    ]
    if not rows:
        print(f"{options.recordings} holds no recordings of that name", file=sys.stderr)
        return 2
    print(summary(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        rounded = [
            {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in asdict(row).items()}
            for row in rows
        ]
        options.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rounded) + "\n]\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True, help="directory with recorded gradients")
    parser.add_argument("--only", help="measure this recording alone")
    parser.add_argument("--bits", type=int, nargs="+", choices=range(2, 9), default=[3, 4, 5], help="code widths")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0, help="of random rounding")
    return parser


if __name__ == "__main__":
    sys.exit(main())
