"""The bytes that our meters count are those that the network interface has sent, for plain Horovod and ours alike."""

import json
import subprocess
import sys

import pytest

from launch.own_network import UNSHARE, may_make_a_network
from tests.launcher import ROOT, child_environment


@pytest.mark.distributed
@pytest.mark.skipif(not may_make_a_network(), reason="needs permission for a network namespace (unshare --net)")
@pytest.mark.parametrize("size", [4])
def test_counted_bytes_are_those_of_the_network_interface(size: int) -> None:
    command = [*UNSHARE, sys.executable, "-m", "tests.horovod.loopback_traffic", str(size)]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results) == {"allgather", "reduce_scatter", "off", "plain"}
    for case, (ours, interface, idle) in results.items():
        # The interface also counts TCP/IP headers, and acknowledgements of their own.
        assert interface - idle <= 1.04 * ours, (case, results)
        assert ours <= interface, (case, results)
    assert results["off"][0] == pytest.approx(results["plain"][0], rel=1e-4)
    hops = {"allgather": (size - 1) / (2 * (size - 1) / size), "reduce_scatter": 1.0}
    for case, relative_hops in hops.items():
        ratio = results["plain"][0] / results[case][0]
        assert ratio == pytest.approx(32 / 5.07 / relative_hops, rel=0.02), (case, results)
