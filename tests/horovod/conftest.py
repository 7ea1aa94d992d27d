"""Ranks shared by all tests of this folder: starting them takes longer than most checks."""

from collections.abc import Iterator

import pytest

from tests.launcher import RankPool

pytest.importorskip("horovod.torch", reason="needs Horovod: build it with launch/build_horovod.sh")


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ranks" in " ".join(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.distributed)
