"""Ranks of DeepSpeed on CPUs, over gloo, shared by all tests of this folder."""

from pathlib import Path

import pytest

from tests.launcher import RankPool
from tests.shared_ranks import SharedRanks

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'hvd-qoda[deepspeed]'")


def _pool(size: int) -> RankPool:
    # LOCAL_SIZE is how many devices DeepSpeed's CPU accelerator has.
    environment = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(size), "LOCAL_RANK": "0"}
    return RankPool(size, environment, host="torch", imports=["deepspeed"])


_RANKS = SharedRanks(Path(__file__).parent, _pool)
two_ranks, four_ranks = _RANKS.fixture(2), _RANKS.fixture(4)
pytest_runtest_teardown = _RANKS.stop_behind_the_last_test
pytest_sessionfinish = _RANKS.stop
pytest_collection_modifyitems = _RANKS.mark
