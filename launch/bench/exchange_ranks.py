"""What one rank of `exchange.py` does: time the methods in turns, count bytes at the interface, print JSON lines."""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: make the project's folder importable instead of this one
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from launch.bench.exchange_methods import HorovodMethods, Method, Setting, TorchMethods
from launch.virtual_hosts import interface_bytes

ROW = "ROW "


class Group:
    """What the timing needs of either host.

    Args:
        host: "horovod" or "torch".
    """

    def __init__(self, host: str) -> None:
        self._horovod: Any = None
        if host == "horovod":
            import horovod.torch as hvd

            hvd.init()
            self._horovod = hvd
            self.rank, self.size = hvd.rank(), hvd.size()
        else:
            import torch.distributed as dist

            dist.init_process_group("gloo")
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._horovod is not None:
            self._horovod.barrier()
        else:
            torch.distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """One object of every rank."""
        if self._horovod is not None:
            found: list[Any] = self._horovod.allgather_object(value)
            return found
        objects: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(objects, value)
        return objects


class Trial:
    """Times and bytes of one method; the same on every rank.

    The first run is not counted: it compiles, and connects.
    """

    def __init__(self, name: str, method: Method) -> None:
        self.name = name
        self._method = method
        self._times: list[float] = []
        self._sent: list[float] = []

    def run(self, group: Group) -> None:
        """Run the method once more; a round ends when the slowest rank has the mean."""
        self._method.prepare()
        group.barrier()
        before = interface_bytes()[1]
        begin = time.perf_counter()
        self._method.run()
        seconds = time.perf_counter() - begin
        group.barrier()
        counted = interface_bytes()[1] - before
        found = group.gather((seconds, counted))
        self._times.append(max(entry[0] for entry in found))
        self._sent.append(statistics.fmean(entry[1] for entry in found))

    def wants_more(self, rounds: int, budget_s: float) -> bool:
        """Whether there are to be more runs: as many as the budget allows, at least three that count."""
        return len(self._times) <= rounds and (len(self._times) < 4 or sum(self._times) <= budget_s)

    def row(self, group: Group) -> dict[str, Any]:
        """Median time and bytes of the runs that count."""
        digest = hashlib.sha256(self._method.result().numpy().tobytes()).hexdigest()
        identical = len(set(group.gather(digest))) == 1
        formula = statistics.fmean(group.gather(self._method.formula_bytes))
        kept = self._times[1:]
        return {
            "method": self.name,
            "median_s": statistics.median(kept),
            "least_s": min(kept),
            "largest_s": max(kept),
            "rounds": len(kept),
            "bytes_per_rank": round(statistics.median(self._sent[1:])),
            "formula_bytes": round(formula),
            "predicted_s": self._method.predicted_s,
            "ranks_identical": identical,
            "note": self._method.note,
        }


def main(arguments: Sequence[str]) -> int:
    """`exchange_ranks.py JSON`: the setting, the host, the methods, the rounds and the seconds for each."""
    order = json.loads(arguments[0])
    torch.set_num_threads(1)
    group = Group(order["host"])
    setting = Setting(**order["setting"])
    makers: HorovodMethods | TorchMethods
    makers = HorovodMethods(setting) if order["host"] == "horovod" else TorchMethods(setting)
    make: Callable[[str], Method] = makers.make
    trials = [Trial(name, make(name)) for name in order["methods"]]
    going = trials
    while going:  # in turns: what disturbs the machine for a while disturbs all methods alike
        for trial in going:
            trial.run(group)
        going = [trial for trial in going if trial.wants_more(order["rounds"], order["budget_s"])]
    for trial in trials:
        row = trial.row(group)
        if group.rank == 0:
            print(ROW + json.dumps(row), flush=True)
    group.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
