#!/usr/bin/env python3
"""Bytes and losses of a Transformer on text with planned bits (`bits="auto"`), against equal bits and fp32.

Every run is `launch/train/language_model.py` with two processes over gloo and ZeRO 2, on the text that scikit-learn
ships. Runs of one seed have the same weights and batches, so their losses are compared seed by seed. Bytes are those
of gradients and of the exchange of statistics, all steps included. Finished runs are kept in the file of results and
not repeated, so the work can be done in pieces.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import write_json

_ROOT = Path(__file__).resolve().parents[2]
_AUTO = "--bits auto --codebooks per_layer"
_NEAREST = "--rotation hadamard --rounding nearest"
METHODS = {
    "fp32": "--bits 32",
    "5 bits": "--bits 5",
    "auto, bytes of 4 bits, best": f"{_AUTO} --reference-bits 4 --bits-budget bytes --levels best --rounding nearest",
    "auto, variance of 4 bits, rotation": f"{_AUTO} --reference-bits 4 --bits-budget variance {_NEAREST}",
    "auto, variance of 5 bits, rotation": f"{_AUTO} --reference-bits 5 --bits-budget variance {_NEAREST}",
    "auto, variance of 5 bits, rotation, planned often": f"{_AUTO} --reference-bits 5 --bits-budget variance "
    f"{_NEAREST} --update-levels-at 10,20,50,100,150,200,250",
}
EQUAL_BITS = "5 bits"


def train(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run; its losses, and its bytes of gradients and statistics per rank and step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["launch/train/language_model.py", "--zero", "2", "--threads", "1", "--run-dir", folder]
        command += ["--steps", str(options.steps), "--seed", str(seed), *shlex.split(METHODS[method])]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=options.timeout, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
        records = [json.loads(line) for line in (Path(folder) / "steps.jsonl").read_text().splitlines()]
    last = records[-1]["sent_bytes"] if summary["gradient_bytes_per_step"] is not None else None
    return {
        "method": method,
        "seed": seed,
        "train_loss": summary["train_loss"],
        "test_loss": summary["test_loss"],
        "bytes_per_step": summary["gradient_bytes_per_step"],
        "bytes_of_the_last_step": last,
    }


def table(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error of each method, and of its differences, seed by seed, from fp32 and from equal bits."""
    of = {method: {run["seed"]: run for run in runs if run["method"] == method} for method in METHODS}
    rows = []
    for method, found in of.items():
        if not found:
            continue
        losses = [found[seed]["test_loss"] for seed in sorted(found)]
        row: dict[str, Any] = {
            "method": method,
            "options": METHODS[method],
            "seeds": sorted(found),
            "test_loss": _mean_and_error(losses),
            "test_loss_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "train_loss": _mean_and_error([run["train_loss"] for run in found.values()]),
        }
        for other in ("fp32", EQUAL_BITS):
            common = sorted(found.keys() & of[other].keys()) if other != method else []
            if common:
                differences = [found[seed]["test_loss"] - of[other][seed]["test_loss"] for seed in common]
                row[f"test_loss_minus_{other.replace(' ', '_')}"] = _mean_and_error(differences)
        if method != "fp32":
            for name in ("bytes_per_step", "bytes_of_the_last_step"):
                row[name] = statistics.fmean(run[name] for run in found.values())
                equal = [run[name] for run in of[EQUAL_BITS].values()]
                row[f"{name}_of_equal_bits"] = row[name] / statistics.fmean(equal) if equal else None
        rows.append(row)
    return rows


def _mean_and_error(values: Sequence[float]) -> list[float | None]:
    """Mean, and its standard error where there are two values or more."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return [statistics.fmean(values), error]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    for row in rows:
        words = [f"{row['method']:49s} {len(row['seeds'])} seeds  held-out loss {_text(row['test_loss'])}"]
        for name, value in row.items():
            if name.startswith("test_loss_minus"):
                words.append(f"{name.removeprefix('test_loss_')} {_text(value, '+')}")
        if row.get("bytes_per_step_of_equal_bits") is not None:
            words.append(f"bytes {row['bytes_per_step']:.0f} ({row['bytes_per_step_of_equal_bits']:.3f})")
            words.append(f"last step ({row['bytes_of_the_last_step_of_equal_bits']:.3f})")
        print("  ".join(words))


def _text(value: Sequence[float | None], sign: str = "") -> str:
    mean, error = value
    return f"{mean:{sign}.4f}" + ("" if error is None else f" +- {error:.4f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs that are missing, print the table, write it."""
    options = _parser().parse_args(arguments)
    kept = json.loads(options.json.read_text()) if options.json is not None and options.json.exists() else None
    if kept is not None and kept["steps"] != options.steps:
        print(f"{options.json} holds runs of {kept['steps']} steps", file=sys.stderr)
        return 2
    runs: list[dict[str, Any]] = [] if kept is None else kept["runs"]
    for seed in range(options.seed, options.seed + options.seeds):
        for method in options.methods:
            if any((run["method"], run["seed"]) == (method, seed) for run in runs):
                continue
            runs.append(train(method, seed, options))
            print(runs[-1], flush=True)
            if options.json is not None:
                write_json(options.json, {"steps": options.steps, "rows": table(runs), "runs": runs})
    show(table(runs))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to run")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each method")
    parser.add_argument("--seed", type=not_negative, default=0, help="the first of the seeds; the others follow it")
    parser.add_argument("--steps", type=positive, default=300, help="of each run")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="for each run")
    parser.add_argument("--json", type=Path, metavar="PATH", help="file of results, read and written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
