#!/usr/bin/env python3
"""How long does a training step take between hosts, with gradients exchanged while backward goes on?

  python launch/bench/end_to_end.py --hosts 2,4 --mbit 500,1000,5000 --json launch/results/end_to_end.json

Runs Horovod's optimizer (fp32, fp16) and ours in `sandbox.py`'s hosts, which needs its privileges. Two networks:
"wgan", generator and critic with the 10.4 MB of gradients of QODA's paper, and "transformer", 25 million parameters.
The default is a replay, and rows say so: forward and backward take the time of a stated GPU (an estimate, in the rows),
gradients are recorded from a real backward pass and released at its relative times; coding and exchanging are real and
run beside it. --compute real computes on this machine's cores instead, which ranks share. The optimizer's own update is
left out.

Communication is what fp32's step takes beyond the same step without any exchange ("alone"), as a share of fp32's step.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from launch.bench.exchange import numbers
from launch.bench.exchange_methods import AUTO, FP16, FP32, OURS
from launch.bench.exchange_ranks import ROW
from launch.bench.processors import processor_and_target
from launch.bench.replay import NETWORKS
from launch.sandbox import Job, run_job
from launch.train.options import HelpFormatter, not_negative, positive
from launch.virtual_hosts import Network, SandboxError

METHODS = (FP32, FP16, "qoda-allgather", "qoda-reduce-scatter", AUTO)
_KEYS = ("network", "compute", "hosts", "delay_ms", "mbit", "method")
_ALONE = "alone"
_WIDTH = 120


def measure(options: argparse.Namespace, network: Network, trained: str) -> list[dict[str, Any]]:
    """The rows of one network of hosts and one network to train."""
    order = {
        "network": trained,
        "methods": options.methods,
        "steps": options.steps,
        "bits": options.bits,
        "mb": options.buffer_mb,
        "seed": options.seed,
        "compute": options.compute,
    }
    program = str(Path(__file__).with_name("end_to_end_ranks.py"))
    result = run_job(Job((sys.executable, program, json.dumps(order)), network, "horovod", 1, options.timeout_s))
    lines = [line.split(ROW, 1)[1] for line in result.output.splitlines() if line.startswith(f"[0] {ROW}")]
    if any(result.exit_codes) or len(lines) != len(options.methods) + 1:
        raise SandboxError(f"the ranks ended with {result.exit_codes}:\n{result.output[-3000:]}")
    common = {
        "hosts": network.hosts,
        "mbit": network.mbit,
        "delay_ms": network.delay_ms,
        "network": trained,
        "compute": options.compute,
        "computed_by": NETWORKS[trained].computed_by if options.compute == "replay" else "this machine's cores",
        "oversubscribed": network.hosts > (os.cpu_count() or 1),
        "predicted_s": None,
    }
    return with_shares([{**common, **json.loads(line)} for line in lines])


def with_shares(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one setting with what they have to do with each other: communication's share, and speed-ups."""
    of = {row["method"]: row["median_s"] for row in rows}
    shares: dict[str, float] = {}
    if FP32 in of:
        shares["communication_share"] = max(0.0, 1 - of[_ALONE] / of[FP32])
    return [
        {**row, "alone_s": of[_ALONE], **shares, **({"speedup": of[FP32] / row["median_s"]} if FP32 in of else {})}
        for row in rows
        if row["method"] != _ALONE
    ]


def merged(kept: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by key, new ones in place of old ones."""
    rows = {tuple(row[key] for key in _KEYS): row for row in [*kept, *new]}
    return [rows[key] for key in sorted(rows, key=lambda k: (*k[:4], k[4] or 1e9, METHODS.index(k[5])))]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table(title="training steps")
    for heading in (
        "network",
        "hosts",
        "Mbit/s",
        "method",
        "step ms",
        "alone ms",
        "communication",
        "MB/rank",
        "of fp32",
    ):
        table.add_column(heading, justify="left" if heading in ("network", "method") else "right")
    for row in rows:
        table.add_row(
            f"{row['network']} ({row['compute']})",
            f"{row['hosts']}{'*' if row['oversubscribed'] else ''}",
            f"{row['mbit']:g}" if row["mbit"] else "no limit",
            row["method"],
            f"{1e3 * row['median_s']:.1f}",
            f"{1e3 * row['alone_s']:.1f}",
            f"{row['communication_share']:.0%}" if "communication_share" in row else "",
            f"{row['bytes_per_rank'] / 1e6:.2f}",
            f"{row['speedup']:.2f} x" if "speedup" in row else "",
        )
    console = Console(width=_WIDTH)
    console.print(table)
    console.print("*: more ranks than cores (oversubscribed). Communication: its share of fp32's step.")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up of a step over communication's share of fp32's step, into a PNG file."""
    figure, axes = plt.subplots(figsize=(8.0, 4.8), layout="constrained")
    for method in METHODS[1:]:
        own = [row for row in rows if row["method"] == method and "speedup" in row]
        axes.plot([100 * row["communication_share"] for row in own], [row["speedup"] for row in own], "o", label=method)
    axes.axhline(1.0, color="#8a8a8a", linewidth=0.8)
    axes.set_xlabel("communication, % of the step with fp32 gradients")
    axes.set_ylabel("speed-up of a step over fp32")
    axes.set_ylim(bottom=0)
    computes = ", ".join(sorted({row["compute"] for row in rows}))
    axes.set_title(f"Training steps between hosts in a sandbox, compute: {computes}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def names(known: Sequence[str]) -> Any:
    """Comma-separated names out of the known ones, for argparse."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: choose from {', '.join(known)}")
        return found

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--networks", type=names(list(NETWORKS)), default=",".join(NETWORKS), help="what is trained")
    parser.add_argument("--hosts", type=numbers, default="2,4", help="numbers of hosts")
    parser.add_argument("--mbit", type=numbers, default="500,1000,5000", help="link rates; 0: no limit")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="delay of what a host sends")
    parser.add_argument("--methods", type=names([*METHODS, *OURS]), default=",".join(METHODS), help="what to time")
    parser.add_argument("--compute", choices=("replay", "real"), default="replay", help="forward and backward")
    parser.add_argument("--steps", type=positive, default=7, help="steps of each method that count")
    parser.add_argument("--bits", type=positive, default=5, help="width of our codes")
    parser.add_argument("--buffer-mb", type=float, default=16.0, help="megabytes of gradients in one of our messages")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for one network of hosts")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file, and a plot beside it")
    parser.add_argument("--keep", action="store_true", help="keep the file's other rows, so that a table can be pieced")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the networks and the rounding")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    made_by = {"command": shlex.join(["python", "launch/bench/end_to_end.py", *given]), **processor_and_target()}
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.keep and options.json.exists():
        rows = json.loads(options.json.read_text())
    try:
        for trained in options.networks:
            for hosts in options.hosts:
                for mbit in options.mbit:
                    new = measure(options, Network(int(hosts), mbit, options.delay_ms), trained)
                    rows = merged(rows, [{**row, **made_by} for row in new])
                    if options.json is not None:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        options.json.write_text(json.dumps(rows, indent=1) + "\n")
                        draw(rows, options.json.with_suffix(".png"))
    except SandboxError as error:
        print(f"end_to_end.py: {error}", file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
