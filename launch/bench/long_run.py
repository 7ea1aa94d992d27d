#!/usr/bin/env python3
"""Does anything grow, or drift apart, over very many steps?

Two ranks on this machine train a small model by every front end, for as many exchanges as wanted or as a number of
seconds allows. Behind a warm-up, in which levels change and everything is compiled and allocated, memory, descriptors
and threads of the processes must stay what they are; the growth is the larger one of the two ranks'. In the end the
ranks' parameters must have equal bits.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from launch.bench.long_run_ranks import DDP, DEEPSPEED, FRONTS, ROW
from launch.train.job import horovodrun
from launch.train.options import HelpFormatter, not_negative, positive
from launch.train.summary import command, write_json

RANKS = 2
_ROOT = Path(__file__).resolve().parents[2]
_START_UP_S = 180  # until a front end's ranks have begun


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--exchanges", type=positive, default=10_000, help="of each front end, behind the warm-up")
    parser.add_argument("--warm-up", type=positive, default=1000, help="exchanges before memory is looked at")
    parser.add_argument("--seconds", type=positive, default=600, help="after which a front end's run ends early")
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=list(FRONTS), help="front ends to run")
    parser.add_argument("--seed", type=not_negative, default=0, help="of the model and the data")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here too; others in it stay")
    return parser.parse_args(arguments)


def launcher(front: str) -> list[str]:
    """Command that starts a program's ranks for a front end."""
    if front in (DDP, DEEPSPEED):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [horovodrun(), "--gloo", "--network-interfaces", "lo", "-np", str(RANKS), sys.executable]


def run(front: str, exchanges: int, warm_up: int, seconds: int, seed: int = 0) -> dict[str, Any]:
    """Row of one front end.

    Raises:
        RuntimeError: where the ranks did not end well, with the end of what they said.
    """
    numbers = map(str, (exchanges, warm_up, seconds, seed))
    program = [str(Path(__file__).with_name("long_run_ranks.py")), front, *numbers]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOROVOD_CYCLE_TIME": "0.1"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    limit = seconds + _START_UP_S + warm_up // 50
    ranks = subprocess.Popen(
        [*launcher(front), *program],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complaints = ranks.communicate(timeout=limit)
    finally:
        if ranks.poll() is None:  # the launcher and its ranks, which nobody else ends
            os.killpg(ranks.pid, signal.SIGKILL)
    for line in said.splitlines():
        if ROW in line:
            row: dict[str, Any] = json.loads(line[line.index(ROW) + len(ROW) :])
            return row
    raise RuntimeError(f"{front}: no row; exit status {ranks.returncode}: {complaints[-2000:]}")


def merged(kept: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Old rows and new ones, in the order of the front ends; new ones replace old ones."""
    by_front = {row["front"]: row for row in (*kept, *rows)}
    return [by_front[front] for front in FRONTS if front in by_front]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; the exit status is 1 where the ranks' bits differ."""
    options = parse_arguments(arguments)
    numbers = options.exchanges, options.warm_up, options.seconds, options.seed
    rows = [run(front, *numbers) for front in options.fronts]
    table = Table("front end", "exchanges", "memory", "descriptors", "threads", "ranks identical", "exchanges/s")
    for row in rows:
        growth = (f"{row['memory_growth_bytes'] / 2**20:+.2f} MiB", *(str(row[f"{n}_growth"]) for n in _COUNTED))
        speed = f"{(row['exchanges'] - row['warm_up']) / row['seconds']:,.0f}"
        table.add_row(row["front"], f"{row['exchanges']:,}", *growth, str(row["ranks_identical"]), speed)
    Console().print(table)
    if options.json is not None:
        kept = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
        write_json(options.json, {"command": command(), "rows": merged(kept, rows)})
    return int(not all(row["ranks_identical"] for row in rows))


_COUNTED = ("descriptors", "threads")

if __name__ == "__main__":
    sys.exit(main())
