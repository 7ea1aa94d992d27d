#!/usr/bin/env python3
"""What becomes of the other ranks when one of them is killed, stops, raises, or loses its connections?

  python launch/bench/faults.py --runs 20 --json launch/results/faults.json

Every run starts new ranks on this machine, without a launcher that would end the others, and hits one of them at a
random time in its first steps. Right is only this: every other rank raises an error, ours or the host's, within
`--timeout-s` (what our exchanges and the host's collectives are given) and `--grace-s` (for a busy machine), and its
process ends within `--end-s` more, in which the interpreter is taken down. A rank that was stopped is woken then, and
must end likewise; and the checkpoint that was written last can be read.

Outcomes: `raised`; `ended`: without a fault all ended with status 0; `hung`: a rank had raised nothing at the deadline,
or was still there; `wrong`: a rank ended without an error, or was aborted, or a checkpoint was half written. `orphans`
counts processes that had to be killed. `slowest_s` is the longest time from the fault until the last of the others had
raised, where none hung.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from rich.console import Console
from rich.table import Table

from launch.bench.fault_ranks import DDP, ENDED, FRONTS, STARTED, ZERO, RankOrder, order_line
from launch.train.options import HelpFormatter, positive
from launch.train.summary import command, write_json

FAULTS = {
    "none": None,
    "killed": signal.SIGKILL,
    "stopped": signal.SIGSTOP,
    "raised": signal.SIGUSR1,
    "connections lost": signal.SIGUSR2,
}
RIGHT = ("raised", "ended")
_START_TIMEOUT_S = 120.0
_STEPS_WITHOUT_FAULT = 6
_POLL_S = 0.01
_STACKS_S = 0.5
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """What became of one run.

    Attributes:
        outcome: "raised", "ended" (without a fault), "hung" or "wrong".
        seconds: from the fault until the last of the other ranks had raised.
        orphans: processes that had to be killed.
        errors: what the others raised.
        folder: with the ranks' logs, if they were kept.
        why: what was not right.
    """

    outcome: str
    seconds: float = 0.0
    orphans: int = 0
    errors: list[str] = field(default_factory=list)
    folder: Path | None = None
    why: str = ""


class Nursery:
    """A process that forks ranks of one front end; see `fault_ranks`."""

    def __init__(self, front: str) -> None:
        path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.bench.fault_ranks", front],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=_ROOT,
        )
        self._lock = threading.Lock()
        self._started: dict[tuple[str, int], int] = {}
        self._ended: dict[int, tuple[int, float]] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, order: RankOrder) -> int:
        """Start a rank; returns the number of its process."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(order_line(order))
            self._process.stdin.flush()
        key = (order.folder, order.rank)
        wait_for(lambda: key in self._started, _START_TIMEOUT_S, "a rank's process")
        return self._started[key]

    def end_of(self, process: int) -> tuple[int, float] | None:
        """Exit status of a process and when it ended; None while it lives."""
        return self._ended.get(process)

    def close(self) -> None:
        """End the nursery; its ranks must have ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith(b'["'):
                continue  # somebody's greeting
            word, *values = json.loads(line)
            if word == STARTED:
                folder, rank, process = values
                self._started[folder, rank] = process
            elif word == ENDED:
                process, status = values
                self._ended[process] = (status, time.monotonic())


class Run:
    """Ranks of one run, and the fault that hits one of them."""

    def __init__(self, nursery: Nursery, front: str, fault: str, ranks: int, seed: int, options: argparse.Namespace):
        self._nursery = nursery
        self._front = front
        self._fault = fault
        self._ranks = ranks
        self._seed = seed
        self._options = options
        self._draw = random.Random(seed)
        self._folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self._processes: list[int] = []

    def result(self) -> Result:
        """Start the ranks, hit one, and look at the others until the deadline."""
        with self._host() as variables:
            result = self._outcome(variables)
        if result.outcome in RIGHT or not self._options.keep:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            result.folder = self._folder
        return result

    def _outcome(self, variables: Sequence[dict[str, str]]) -> Result:
        for rank in range(self._ranks):
            order = RankOrder(
                self._front,
                str(self._folder),
                rank,
                self._ranks,
                self._seed,
                self._options.timeout_s,
                0 if FAULTS[self._fault] else _STEPS_WITHOUT_FAULT,
                variables[rank],
            )
            self._processes.append(self._nursery.start(order))
        sent = FAULTS[self._fault]
        if sent is None:
            return self._end_in_order()
        try:
            wait_for(self._all_are_ready, _START_TIMEOUT_S, "the ranks")
        except TimeoutError as error:
            self._kill_the_rest(range(self._ranks))
            return Result("wrong", why=f"the ranks did not start: {error}; {self._errors(range(self._ranks))}")
        time.sleep(self._draw.uniform(0, self._options.within_s))
        victim = self._draw.randrange(self._ranks)
        others = [rank for rank in range(self._ranks) if rank != victim]
        before = [rank for rank in others if self._end_of(rank) is not None]
        if before:
            self._kill_the_rest(range(self._ranks))
            return Result("wrong", why=f"ranks {before} ended before any fault: {self._errors(before)}")
        began, clock = time.monotonic(), time.time()
        os.kill(self._processes[victim], sent)
        limit = self._options.timeout_s + self._options.grace_s
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: all(self._mark(rank, "error").exists() for rank in others), limit, "")
        late = [rank for rank in others if not self._mark(rank, "error").exists() and self._end_of(rank) is None]
        errors = self._errors(others)
        raised = [self._mark(rank, "error").stat().st_mtime for rank in others if self._mark(rank, "error").exists()]
        hung = self._await(others, max(0.0, began + limit + self._options.end_s - time.monotonic()))
        if self._fault == "stopped":
            os.kill(self._processes[victim], signal.SIGCONT)
        hit = self._await([victim], limit + self._options.end_s)
        orphans = len(self._kill_the_rest([*hung, *hit]))
        seconds = max((mark - clock for mark in raised), default=0.0)
        if late or hung or hit:
            why = f"no error of ranks {late}, no end of ranks {hung}, the one that was hit ended: {not hit}"
            return Result("hung", seconds, orphans, errors, why=why)
        why = self._complaint(others, victim)
        return Result("wrong" if why else "raised", seconds, orphans, errors, why=why)

    def _end_in_order(self) -> Result:
        """Without a fault all ranks end with status 0."""
        began = time.monotonic()
        ranks = range(self._ranks)
        living = self._kill_the_rest(self._await(ranks, _START_TIMEOUT_S))
        seconds, errors = time.monotonic() - began, self._errors(ranks)
        if living:
            return Result("hung", seconds, len(living), errors, why=f"no end of ranks {living}")
        statuses = [end[0] for rank in ranks if (end := self._end_of(rank)) is not None]
        if any(statuses):
            return Result("wrong", seconds, 0, errors, why=f"the ranks ended with {statuses}")
        return Result("ended", seconds, 0, errors, why=self._half_checkpoint())

    def _complaint(self, others: Sequence[int], victim: int) -> str:
        """What was not right, though all ended in time; "" if nothing."""
        for rank in others if self._fault == "killed" else [*others, victim]:
            end = self._end_of(rank)
            assert end is not None
            if end[0] != 1:
                return f"rank {rank} ended with {end[0]}"
            if not self._mark(rank, "error").exists():
                return f"rank {rank} ended without an error"
        return self._half_checkpoint()

    def _half_checkpoint(self) -> str:
        files = [self._folder / "checkpoint.pt"]
        latest = self._folder / "checkpoints" / "latest"
        if latest.exists():
            from ds_plugin.note import describe
            from hvd_qoda.errors import ConfigError

            tag = latest.with_name(latest.read_text().strip())
            try:
                describe(tag)
            except ConfigError as error:
                return str(error)
            files += list(tag.glob("*.pt"))
        for path in files:
            try:
                if path.exists():
                    torch.load(path, map_location="cpu", weights_only=False)  # what our own ranks have written
            except Exception as error:  # whatever a damaged file makes it raise
                return f"the checkpoint's {path.name} cannot be read: {error}"
        return ""

    def _await(self, ranks: Sequence[int], limit_s: float) -> list[int]:
        """Wait until these have ended; returns those that have not at the deadline."""
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: all(self._end_of(rank) is not None for rank in ranks), limit_s, "")
        return [rank for rank in ranks if self._end_of(rank) is None]

    def _kill_the_rest(self, ranks: Sequence[int]) -> list[int]:
        living = [rank for rank in ranks if self._end_of(rank) is None]
        for rank in living:
            os.kill(self._processes[rank], signal.SIGQUIT)  # its stacks, for the log
        if living:
            time.sleep(self._options.look_s or _STACKS_S)
        for rank in range(self._ranks):
            if self._end_of(rank) is None:
                os.kill(self._processes[rank], signal.SIGKILL)
        self._await(range(self._ranks), 10.0)
        return living

    def _errors(self, ranks: Sequence[int]) -> list[str]:
        found = []
        for rank in ranks:
            path = self._mark(rank, "error")
            if path.exists():
                error = json.loads(path.read_text())
                found.append(f"{error['type']}: {error['text']}")
        return found

    def _all_are_ready(self) -> bool:
        ranks = range(self._ranks)
        if any(self._end_of(rank) is not None for rank in ranks):
            raise TimeoutError("one has ended")
        return all(self._mark(rank, "ready").exists() for rank in ranks)

    def _mark(self, rank: int, name: str) -> Path:
        return self._folder / f"rank-{rank}.{name}"

    def _end_of(self, rank: int) -> tuple[int, float] | None:
        return self._nursery.end_of(self._processes[rank])

    @contextlib.contextmanager
    def _host(self) -> Iterator[list[dict[str, str]]]:
        """What the host's launcher would tell each rank."""
        if self._front == DDP or self._front in ZERO:
            # The store is here, as it is in torchrun: no rank's fault reaches it.
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(self._ranks)}
            common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_SIZE": str(self._ranks)}
            yield [{**common, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(self._ranks)]
            return
        from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
        from horovod.runner.http.http_server import RendezvousServer

        server = RendezvousServer(0)
        slots = get_host_assignments(parse_hosts(f"localhost:{self._ranks}"), self._ranks)
        port = str(server.start())
        server.init(slots)
        try:
            yield [_horovod_variables(slot, port) for slot in slots]
        finally:
            server.stop()


def _horovod_variables(slot: Any, port: str) -> dict[str, str]:
    numbers = {
        name: str(getattr(slot, name.lower()))
        for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    }
    return {f"HOROVOD_{name}": value for name, value in numbers.items()} | {
        "HOROVOD_HOSTNAME": str(slot.hostname),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def wait_for(ready: Any, limit_s: float, what: str) -> None:
    """Poll until something is ready.

    Raises:
        TimeoutError: after so many seconds.
    """
    deadline = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {limit_s:g} s")
        time.sleep(_POLL_S)


def measure(options: argparse.Namespace, front: str) -> list[dict[str, Any]]:
    """The rows of one front end."""
    plan = [(fault, number) for number in range(options.runs) for fault in options.faults]
    results: dict[str, list[Result]] = {fault: [] for fault in options.faults}
    nursery = Nursery(front)
    console = Console(stderr=True)

    def one(item: tuple[str, int]) -> None:
        fault, number = item
        seed = options.seed + number
        ranks = options.ranks[number % len(options.ranks)]
        result = Run(nursery, front, fault, ranks, seed, options).result()
        results[fault].append(result)
        if result.outcome not in RIGHT:
            console.print(
                f"{front}, {fault}, seed {seed}: {result.outcome}: {result.why} {result.folder or ''}", markup=False
            )
            for error in result.errors:
                console.print("   ", error[:300], markup=False)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, plan))
    nursery.close()
    return [_row(front, fault, options.ranks, results[fault]) for fault in options.faults]


def _row(front: str, fault: str, ranks: Sequence[int], results: Sequence[Result]) -> dict[str, Any]:
    outcomes = Counter(result.outcome for result in results)
    return {
        "front": front,
        "fault": fault,
        "ranks": list(ranks),
        "runs": len(results),
        "raised": outcomes["raised"],
        "ended": outcomes["ended"],
        "hung": outcomes["hung"],
        "wrong": outcomes["wrong"],
        "orphans": sum(result.orphans for result in results),
        "slowest_s": round(max((r.seconds for r in results if r.outcome in RIGHT), default=0.0), 2),
        "errors": dict(Counter(error.split(":")[0] for result in results for error in result.errors)),
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each front end and fault."""
    table = Table(title="What became of the other ranks")
    columns = ("front", "fault", "runs", "raised", "ended", "hung", "wrong", "orphans", "slowest_s")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def _seconds(text: str) -> float:
    """A duration, for argparse."""
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return seconds


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--fronts", nargs="+", default=list(FRONTS), choices=FRONTS, metavar="FRONT", help="what trains"
    )
    parser.add_argument(
        "--faults", nargs="+", default=list(FAULTS), choices=FAULTS, metavar="FAULT", help="what happens"
    )
    parser.add_argument("--ranks", nargs="+", type=positive, default=[2, 3], help="numbers of ranks, in turn")
    parser.add_argument("--runs", type=positive, default=10, help="of each front and fault")
    parser.add_argument("--jobs", type=positive, default=2, help="runs at once")
    parser.add_argument("--timeout-s", type=_seconds, default=4.0, help="what our exchanges are given")
    parser.add_argument("--grace-s", type=_seconds, default=6.0, help="what a rank has beyond that")
    parser.add_argument("--end-s", type=_seconds, default=15.0, help="what a process has to end, after its error")
    parser.add_argument("--within-s", type=_seconds, default=1.0, help="the fault comes so soon after start")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--keep", action="store_true", help="keep the logs of runs that did not end right")
    parser.add_argument("--look-s", type=_seconds, default=0.0, help="wait before a hung rank is killed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; returns 1 if a run did not end right."""
    options = parse(arguments)
    rows: list[dict[str, Any]] = []
    for front in options.fronts:
        rows += measure(options, front)
        if options.json is not None:
            write_json(options.json, {"command": command(), "timeout_s": options.timeout_s, "rows": rows})
    print_table(rows)
    return int(any(row["hung"] or row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
