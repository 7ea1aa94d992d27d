"""Ranks shared by all tests of a folder: starting them takes longer than most checks.

What they import and compile stays with them. A test that leaves something behind, or needs its own variables, takes a
`RankPool` of its own, which costs it about half a second (`tests.launcher`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher import RankPool


class SharedRanks:
    """Two and four ranks for the tests of one folder, whose conftest.py makes this its fixtures and hooks.

        _RANKS = SharedRanks(Path(__file__).parent, RankPool)
        two_ranks, four_ranks = _RANKS.fixture(2), _RANKS.fixture(4)
        pytest_runtest_teardown = _RANKS.stop_behind_the_last_test
        pytest_sessionfinish = _RANKS.stop
        pytest_collection_modifyitems = _RANKS.mark

    Args:
        folder: of the tests.
        pool: makes that many ranks; they start with their first call.
    """

    def __init__(self, folder: Path, pool: Callable[[int], RankPool]) -> None:
        self._folder = folder
        self._pools = {size: pool(size) for size in (2, 4)}

    def fixture(self, size: int) -> Any:
        """A fixture that gives so many ranks."""

        @pytest.fixture
        def ranks() -> RankPool:
            return self._pools[size]

        return ranks

    def stop_behind_the_last_test(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        """Stop the ranks behind the folder's last test: idle ones may poll, which slows down all tests that follow."""
        if nextitem is None or self._folder not in nextitem.path.parents:
            self.stop()

    def stop(self) -> None:
        """Stop the ranks that run."""
        for pool in self._pools.values():
            pool.close()

    def mark(self, items: list[pytest.Item]) -> None:
        """Mark the folder's tests that use ranks."""
        for item in items:
            if self._folder in item.path.parents and "ranks" in " ".join(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.distributed)
