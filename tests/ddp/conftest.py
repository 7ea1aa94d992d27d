"""Ranks of torch.distributed over gloo, shared by all tests of this folder."""

from functools import partial
from pathlib import Path

from tests.launcher import RankPool
from tests.shared_ranks import SharedRanks

_RANKS = SharedRanks(Path(__file__).parent, partial(RankPool, host="torch"))
two_ranks, four_ranks = _RANKS.fixture(2), _RANKS.fixture(4)
pytest_runtest_teardown = _RANKS.stop_behind_the_last_test
pytest_sessionfinish = _RANKS.stop
pytest_collection_modifyitems = _RANKS.mark
