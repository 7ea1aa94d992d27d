"""Ranks that are forked: each as if it had been started anew, and none of them left over."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.fork_server import can_fork, server_of
from tests.launcher import RankError, RankPool, child_environment

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not can_fork(), reason="this system has no pidfd_open: ranks are started, not forked"),
]


def described() -> tuple[int, str | None, int, int, bool]:
    """Process, a variable of the pool's, hash of a string, number of CPU threads, and whether a module was imported."""
    imported = "hvd_qoda" in sys.modules
    return os.getpid(), os.environ.get("OF_THE_POOL"), hash("some text"), torch.get_num_threads(), imported


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(30)


def test_ranks_have_their_own_variables_hashes_and_end() -> None:
    found = []
    for value in ("one", "other"):
        with RankPool(2, {"OF_THE_POOL": value}, host="torch") as ranks:
            found += ranks.run(described)
    processes, values, hashes, threads, imported = zip(*found, strict=True)
    assert len(set(processes)) == 4
    assert values == ("one", "one", "other", "other")
    assert hashes[0] != hashes[1]  # so that sets have another order, as in ranks that are started one by one
    assert set(threads) == {1}
    assert all(imported)
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_a_rank_that_dies_is_told_and_replaced() -> None:
    with RankPool(2, host="torch") as ranks:
        before = {process for process, *_ in ranks.run(described)}
        with pytest.raises(RankError, match="rank 1 died"):
            ranks.run(die_on_rank_one, timeout=20)
        after = {process for process, *_ in ranks.run(described)}
    assert not before & after
    assert not any(Path(f"/proc/{process}").exists() for process in before | after)


def test_an_import_that_fails_is_shown() -> None:
    server = server_of(child_environment(), ["no_such_module_anywhere"], 0)
    with pytest.raises(RuntimeError, match="No module named 'no_such_module_anywhere'"):
        server.fork(child_environment(), 1, 2)
