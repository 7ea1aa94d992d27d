#!/usr/bin/env python3
"""How long does averaging a gradient take between hosts: Horovod fp32 and fp16, PowerSGD, and ours in every scheme?

  python launch/bench/exchange.py --hosts 2,4 --mbit 100,500,1000 --json launch/results/exchange.json

Runs each method in `sandbox.py`'s hosts, which needs its privileges. The mean of a whole gradient is timed, nothing
overlaps with computing; encoding and decoding are included. A round ends when the slowest rank has the mean; methods
take turns, and the median over the rounds counts. Bytes are those that a host's interface has sent in a round, packet
headers and the host's negotiation included, averaged over the hosts; `formula_bytes` is the payload alone (with several
ranks on a host `hvd_qoda.cost_model.host_bytes`; what stays inside a host is in neither). Rows with
more ranks than cores are marked oversubscribed: their ranks share cores, which makes whatever needs the processor
slower than on real hosts. `--show launch/results/exchange.json` measures nothing: it prints a file's rows, and how far
predictions are off over all of them.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from launch.bench.exchange_methods import HOST_METHODS, METHODS, POWERSGD, Setting
from launch.bench.exchange_plot import draw_speedups
from launch.bench.exchange_ranks import ROW
from launch.bench.processors import processor_and_target
from launch.sandbox import Job, run_job
from launch.train.options import HelpFormatter, not_negative, positive
from launch.virtual_hosts import Network, SandboxError

SIZES = {"25M": 25_000_000, "2.6M": 2_600_000}
TOLERANCE = 0.02
_WIDTH = 120
_CLOSE = 0.2
_KEYS = ("hosts", "mbit", "delay_ms", "elements", "ranks_per_host", "method")


def measure(options: argparse.Namespace, elements: int, network: Network) -> Iterator[dict[str, Any]]:
    """The rows of one network and one size."""
    setting = Setting(
        elements, options.bits, options.bucket_size, options.buffer_mb, options.seed, options.ranks_per_host
    )
    ranks = network.hosts * options.ranks_per_host
    jobs = {
        "horovod": [name for name in options.methods if name in HOST_METHODS],
        "torch": [name for name in options.methods if name == POWERSGD],
    }
    for host, methods in jobs.items():
        if not methods:
            continue
        order = {
            "host": host,
            "setting": asdict(setting),
            "methods": methods,
            "rounds": options.rounds,
            "budget_s": options.budget_s,
        }
        program = str(Path(__file__).with_name("exchange_ranks.py"))
        command = (sys.executable, program, json.dumps(order))
        result = run_job(Job(command, network, host, options.ranks_per_host, options.timeout_s))
        rows = [line.split(ROW, 1)[1] for line in result.output.splitlines() if line.startswith(f"[0] {ROW}")]
        if any(result.exit_codes) or len(rows) != len(methods):
            raise SandboxError(f"the ranks ended with {result.exit_codes}:\n{result.output[-3000:]}")
        for row in map(json.loads, rows):
            yield {
                "hosts": network.hosts,
                "mbit": network.mbit,
                "delay_ms": network.delay_ms,
                "elements": elements,
                "ranks_per_host": options.ranks_per_host,
                **row,
                "delayed_by": result.delayed_by,
                "oversubscribed": ranks > (os.cpu_count() or 1),
            }


def merged(kept: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by key, new ones in place of old ones."""
    rows = {tuple(row[key] for key in _KEYS): row for row in [*kept, *new]}
    order = {name: position for position, name in enumerate(METHODS)}
    return [rows[key] for key in sorted(rows, key=lambda k: (-k[3], k[4], k[0], k[2], k[1] or 1e9, order[k[5]]))]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table, with what they gain over fp32."""
    fp32 = {tuple(row[key] for key in _KEYS[:-1]): row for row in rows if row["method"] == "fp32"}
    table = Table(title="averaging a gradient")
    for heading in ("elements", "hosts", "Mbit/s", "delay ms", "method", "seconds", "predicted", "MB/rank", "of fp32"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        plain = fp32.get(tuple(row[key] for key in _KEYS[:-1]))
        excess = row["bytes_per_rank"] / row["formula_bytes"] - 1
        table.add_row(
            f"{row['elements'] / 1e6:g}M",
            f"{row['hosts']}{'*' if row['oversubscribed'] else ''}",
            f"{row['mbit']:g}" if row["mbit"] else "no limit",
            f"{row['delay_ms']:g}",
            row["method"] + (f" ({row['note']})" if row["note"] else ""),
            f"{row['median_s']:.3f}",
            f"{row['predicted_s']:.3f}" if row["predicted_s"] is not None else "",
            f"{row['bytes_per_rank'] / 1e6:.2f}" + ("" if abs(excess) <= TOLERANCE else f" ({100 * excess:+.1f} %)"),
            f"{plain['median_s'] / row['median_s']:.2f} x" if plain else "",
        )
    console = Console(width=_WIDTH)
    console.print(table)
    console.print("*: more ranks than cores (oversubscribed). In brackets: bytes off the formula by more than 2 %.")
    errors = [abs(row["predicted_s"] / row["median_s"] - 1) for row in rows if row["predicted_s"] is not None]
    if errors:
        within = sum(error <= _CLOSE for error in errors) / len(errors)
        console.print(
            f"Predicted against measured times: off by {statistics.median(errors):.0%} (median of {len(errors)}), "
            f"{within:.0%} of them within {_CLOSE:.0%}."
        )


def numbers(text: str) -> list[float]:
    """Comma-separated numbers, for argparse."""
    return [float(part) for part in text.split(",")]


def sizes(text: str) -> list[int]:
    """Comma-separated sizes, for argparse: 25M, 2.6M, or numbers of elements."""
    return [SIZES[part] if part in SIZES else int(part) for part in text.split(",")]


def methods(text: str) -> list[str]:
    """Comma-separated names of methods, for argparse."""
    names = text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r}: choose from {', '.join(METHODS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--hosts", type=numbers, default="2,4,8", help="numbers of hosts")
    parser.add_argument("--ranks-per-host", type=positive, default=1, help="ranks on every host")
    parser.add_argument("--mbit", type=numbers, default="100,500,1000,2500,5000,0", help="link rates; 0: no limit")
    parser.add_argument("--delay-ms", type=numbers, default="0", help="link delays")
    parser.add_argument("--elements", type=sizes, default="25M", help="sizes of the gradient: 25M, 2.6M or numbers")
    parser.add_argument(
        "--methods",
        type=methods,
        help="what to time; without it all, but qoda-hierarchical only with --ranks-per-host of 2 or more",
    )
    parser.add_argument("--rounds", type=positive, default=7, help="runs of each method that count")
    parser.add_argument("--budget-s", type=float, default=20.0, help="fewer rounds, but 3, for a method beyond this")
    parser.add_argument("--bits", type=positive, default=5, help="width of our codes")
    parser.add_argument("--bucket-size", type=positive, default=512, help="coordinates that share one norm")
    parser.add_argument("--buffer-mb", type=float, default=16.0, help="10^6 bytes of gradients in one of our messages")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for one network's methods")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows to this file, and a plot beside it")
    parser.add_argument("--show", type=Path, metavar="PATH", help="print the rows of this file instead of measuring")
    parser.add_argument("--keep", action="store_true", help="keep the file's other rows, so that a table can be pieced")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the gradients and the rounding")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    made_by = {"command": shlex.join(["python", "launch/bench/exchange.py", *given]), **processor_and_target()}
    if options.methods is None:
        hierarchy = options.ranks_per_host > 1
        options.methods = [name for name in METHODS if hierarchy or name != "qoda-hierarchical"]
    if options.show is not None:
        show(json.loads(options.show.read_text()))
        return 0
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.keep and options.json.exists():
        rows = json.loads(options.json.read_text())
    try:
        for elements in options.elements:
            for hosts in options.hosts:
                for delay_ms in options.delay_ms:
                    for mbit in options.mbit:
                        network = Network(int(hosts), mbit, delay_ms)
                        new = [{**row, **made_by} for row in measure(options, elements, network)]
                        rows = merged(rows, new)
                        show(new)
                        if options.json is not None:
                            options.json.parent.mkdir(parents=True, exist_ok=True)
                            options.json.write_text(json.dumps(rows, indent=1) + "\n")
                            draw_speedups(rows, options.json.with_suffix(".png"))
    except SandboxError as error:
        print(f"exchange.py: {error}", file=sys.stderr)
        return 1
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
