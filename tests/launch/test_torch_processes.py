"""How a program that ran over torch.distributed ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher import ROOT, child_environment

# Many groups, each with a collective whose tensors Gloo's thread drops last, and a main thread that lends the
# interpreter to nobody unless it sleeps; the groups stay in use, as DeepSpeed's do. Without the sleep about every third
# run aborts.
PROGRAM = """
import sys
import torch
import torch.distributed as dist
from launch.train.torch_processes import end_processes

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
sys.setswitchinterval(10)
groups = [dist.new_group([0, 1]) for _ in range(12)]
works = [dist.all_reduce(torch.ones(10_000), group=group, async_op=True) for group in groups]
sys.modules["in_use"] = [groups, dist.group.WORLD]
while works:
    works.pop().wait()
end_processes()
"""


@pytest.mark.distributed
def test_a_process_may_end_right_after_a_collective(tmp_path: Path) -> None:
    environment = {**child_environment(), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [(rank.communicate(timeout=100)[1], rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [status for _, status in ends] == [0, 0], ends
