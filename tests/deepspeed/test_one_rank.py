"""One rank alone: nothing travels, and everything else goes on, level updates included."""

import pytest

import ds_plugin
from tests.deepspeed.training import configuration, run
from tests.launcher import RankPool

UPDATES = {"at": [3], "every": None, "samples": 2}


def updated(stage: int) -> tuple[bool, int]:
    """Whether training has the bits of DeepSpeed's own, and the version of the codebooks in the end."""
    alone = run(configuration(stage), 5)
    versions = []
    original = ds_plugin.reducer_of

    def noted(engine: object) -> object:
        versions.append(original(engine).registry.version)
        return original(engine)

    ds_plugin.reducer_of = noted
    try:
        found = run(configuration(stage, qoda={"bits": 5, "update_levels": UPDATES}), 5)
    finally:
        ds_plugin.reducer_of = original
    return found["digest"] == alone["digest"], versions[-1]


@pytest.mark.distributed
def test_levels_are_updated() -> None:
    environment = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1", "LOCAL_RANK": "0"}
    with RankPool(1, environment, host="torch") as rank:
        for stage in (0, 1, 2, 3):
            assert rank.run(updated, stage) == [(True, 1)]
