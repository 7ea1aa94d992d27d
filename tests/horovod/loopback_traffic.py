"""Program for test_interface_counters.py: trains in a network namespace of its own and prints bytes counted twice.

Run as `unshare --net python -m tests.horovod.loopback_traffic SIZE`: nothing but the ranks uses the loopback interface
there, so its counter holds what they send. Prints a JSON object: case -> [bytes by our meters, bytes by the interface,
bytes that Horovod sends in that time if it has nothing to do], all summed over the ranks.
"""

import json
import sys
import time
from typing import Any

from launch.own_network import bring_loopback_up, loopback_bytes
from tests.launcher import RankPool

ELEMENTS = 2**22
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "allgather": {"exchange": "allgather"},
    "reduce_scatter": {"exchange": "reduce_scatter"},
    "off": {"bits": 32},
    "plain": {},
}


def traffic_of(case: str) -> tuple[int, int, int]:
    """This rank's bytes in a few steps, the interface's (of all ranks) meanwhile, and what Horovod sends idly.

    The last is measured behind the steps; beside them, on a busy machine, it is less.
    """
    import horovod.torch as hvd
    import torch

    from hvd_qoda.compression import Compression

    torch.manual_seed(hvd.rank())
    model = torch.nn.Linear(ELEMENTS // 1024, 1024, bias=False)
    keywords = CASES[case]
    if case == "plain":
        compression: Any = Compression.metered(hvd.Compression.none)
    else:
        compression = Compression.qoda(
            model, levels="uniform", measure_error_every=0, **{"exchange": "by_bytes", **keywords}
        )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=model.named_parameters(), compression=compression
    )

    def step() -> None:
        model(torch.ones(1, ELEMENTS // 1024)).square().sum().backward()
        optimizer.step()

    step()  # compiles, and agrees
    hvd.barrier()
    begin, sent, counted = time.monotonic(), compression.traffic, loopback_bytes()
    for _ in range(STEPS):
        step()
    hvd.barrier()
    seconds, sent, counted = time.monotonic() - begin, compression.traffic - sent, loopback_bytes() - counted
    idle = loopback_bytes()
    time.sleep(1.0)
    idle = loopback_bytes() - idle
    hvd.barrier()
    return sent.sent_bytes, counted, round(idle * seconds)


def main(size: int) -> None:
    """Run all cases."""
    bring_loopback_up()
    with RankPool(size, {"HOROVOD_CYCLE_TIME": "5"}) as ranks:
        results = {}
        for case in CASES:
            by_rank = ranks.run(traffic_of, case)
            results[case] = [sum(ours for ours, *_ in by_rank), *by_rank[0][1:]]
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
