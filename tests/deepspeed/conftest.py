"""Ranks shared by all tests of this folder: starting them takes longer than most checks."""

from pathlib import Path

import pytest

from tests.launcher import RankPool

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'hvd-qoda[deepspeed]'")

_FOLDER = Path(__file__).parent


def _pool(size: int) -> RankPool:
    # LOCAL_SIZE is how many devices DeepSpeed's CPU accelerator has.
    environment = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(size), "LOCAL_RANK": "0"}
    return RankPool(size, environment, host="torch")


_POOLS = {size: _pool(size) for size in (2, 4)}  # they start with their first call


@pytest.fixture
def two_ranks() -> RankPool:
    return _POOLS[2]


@pytest.fixture
def four_ranks() -> RankPool:
    return _POOLS[4]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the ranks behind the last test here."""
    if nextitem is None or _FOLDER not in nextitem.path.parents:
        _close_all()


def pytest_sessionfinish() -> None:
    _close_all()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in " ".join(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.distributed)


def _close_all() -> None:
    for pool in _POOLS.values():
        pool.close()
