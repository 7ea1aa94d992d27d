"""Ranks of Horovod, shared by all tests of this folder."""

from pathlib import Path

import pytest

from tests.launcher import RankPool
from tests.shared_ranks import SharedRanks

pytest.importorskip("horovod.torch", reason="needs Horovod: build it with launch/build_horovod.sh")

_RANKS = SharedRanks(Path(__file__).parent, RankPool)
two_ranks, four_ranks = _RANKS.fixture(2), _RANKS.fixture(4)
pytest_runtest_teardown = _RANKS.stop_behind_the_last_test
pytest_sessionfinish = _RANKS.stop
pytest_collection_modifyitems = _RANKS.mark
