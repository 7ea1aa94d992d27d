"""Thousands of exchanges by every front end, with real ranks: nothing grows, and the ranks' bits stay equal."""

import pytest

pytest.importorskip("horovod.torch")
pytest.importorskip("deepspeed")

from launch.bench import long_run

MOST_GROWTH = 64 * 2**20  # bytes: coarse, for allocators still settle; `long_run.py` shows what is left in the long run


@pytest.mark.distributed
@pytest.mark.parametrize("front", long_run.FRONTS)
def test_nothing_grows_over_ten_thousand_exchanges(front: str) -> None:
    """As many as fit into some seconds, where the machine is slow."""
    row = long_run.run(front, exchanges=10_000, warm_up=300, seconds=15)
    assert row["ranks_identical"]
    assert row["exchanges"] > 300
    assert row["descriptors_growth"] == row["threads_growth"] == 0
    assert row["memory_growth_bytes"] < MOST_GROWTH


def test_new_rows_replace_old_ones_in_the_order_of_the_front_ends() -> None:
    old = [{"front": long_run.DDP, "exchanges": 1}, {"front": long_run.DEEPSPEED, "exchanges": 2}]
    new = [{"front": long_run.FRONTS[0], "exchanges": 3}, {"front": long_run.DDP, "exchanges": 4}]
    assert [row["exchanges"] for row in long_run.merged(old, new)] == [3, 4, 2]
