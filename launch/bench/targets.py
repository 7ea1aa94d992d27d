#!/usr/bin/env python3
"""Do messages and means have the same bits on every processor? Compiles the kernels for several, and compares.

Each target runs in a process of its own: this machine's processor, and those of launch/bench/processors.py that it can
imitate. launch/bench/message_digests.py does the work; its output on another machine can be compared too (--also).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from launch.bench import message_digests
from launch.bench.processors import NATIVE, PROCESSORS, environment_of, obstacle, processor_here
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    targets = [NATIVE, *PROCESSORS]
    parser.add_argument("--targets", nargs="+", choices=targets, default=targets, help="processors to compile for")
    parser.add_argument("--count", type=positive, default=1024 * 1024, help="coordinates, a multiple of 1024")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the values")
    parser.add_argument(
        "--also", nargs=2, action="append", default=[], metavar=("NAME", "FILE"), help="what another machine printed"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the digests here too")
    return parser.parse_args(arguments)


def digests_of(target: str, count: int, seed: int) -> dict[str, str]:
    """What a process that compiles for a target finds; its compiled kernels are not kept."""
    with tempfile.TemporaryDirectory() as cache:
        ran = subprocess.run(
            [sys.executable, message_digests.__file__, "--count", str(count), "--seed", str(seed)],
            env={**os.environ, **environment_of(target), "NUMBA_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode != 0:
        raise SystemExit(f"{target}: {ran.stderr}")
    found: dict[str, str] = json.loads(ran.stdout)
    return found


def table_of(found: Mapping[str, Mapping[str, str]]) -> Table:
    table = Table("codebook", *found, title="digests of four messages and their mean", title_justify="left")
    for name in message_digests.CODEBOOKS:
        table.add_row(name, *(digests[name][:8] for digests in found.values()))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    found: dict[str, dict[str, str]] = {}
    for target in options.targets:
        reason = obstacle(target)
        if reason is not None:
            console.print(f"{target} left out: {reason}")
            continue
        found[target] = digests_of(target, options.count, options.seed)
    for name, file in options.also:
        found[name] = json.loads(Path(file).read_text())
    console.print(table_of(found))
    differing = [name for name in message_digests.CODEBOOKS if len({each[name] for each in found.values()}) > 1]
    console.print(f"different: {', '.join(differing)}" if differing else "the same bits everywhere")
    if options.json is not None:
        content = {
            "machine": {"command": command(), "processor": processor_here(), "coordinates": options.count},
            "all_equal": not differing,
            "targets": found,
        }
        write_json(options.json, content)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
