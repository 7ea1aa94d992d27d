"""The digest hand-shake, among several ranks of one process."""

from typing import Any

import pytest

from hvd_qoda.agreement import check_agreement
from hvd_qoda.errors import RankMismatchError
from tests.in_memory_transport import InMemoryGroup


def messages(*descriptions: dict[str, Any]) -> list[str]:
    """Every rank's error message; "" where it found no difference."""

    def check(transport: Any) -> str:
        try:
            check_agreement(transport, descriptions[transport.rank])
        except RankMismatchError as error:
            return str(error)
        return ""

    return InMemoryGroup(len(descriptions)).run(check)


def test_equal_descriptions_agree_at_the_price_of_one_small_all_gather() -> None:
    group = InMemoryGroup(3)
    group.run(lambda transport: check_agreement(transport, {"bits": 5, "layers": ["x" * 10_000]}))
    for transport in group.transports:
        assert transport.meter.traffic.calls == {"all_gather": 1}
        assert transport.meter.traffic.sent_bytes == 2 * 40


def test_every_rank_names_the_keys_values_and_ranks_that_differ() -> None:
    one = {"version": "1.0", "configuration": {"bits": 5, "seed": 0}, "parameter": {"weight": "float32 [3]"}}
    other = {"version": "1.0", "configuration": {"bits": 4, "seed": 0}, "parameter": {}}
    for message in messages(one, other, one):
        assert "configuration: bits: 5 on ranks 0, 2, 4 on rank 1" in message
        assert 'parameter: weight: "float32 [3]" on ranks 0, 2, absent on rank 1' in message
        assert "seed" not in message
        assert "version" not in message


def test_every_rank_may_differ() -> None:
    for message in messages(*({"seed": rank} for rank in range(3))):
        assert "seed: 0 on rank 0, 1 on rank 1, 2 on rank 2" in message


def test_long_lists_of_differences_and_values_are_cut() -> None:
    one = {f"key{i}": i for i in range(20)} | {"long": "a" * 500}
    other = {f"key{i}": -i for i in range(20)} | {"long": "a" * 499 + "b"}
    for message in messages({"long": "a" * 500}, {"long": "a" * 499 + "b"}):
        assert message.count("digest") == 2  # the ends that differ are not shown, so their digests are
        assert len(message) < 600
    for message in messages(one, other):
        assert "key1: 1 on rank 0, -1 on rank 1" in message
        assert "and 12 more" in message


@pytest.mark.parametrize("size", [1, 2])
def test_differences_in_order_of_keys_alone_count(size: int) -> None:
    one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    found = messages(*([one, other][:size]))
    assert all(bool(message) == (size == 2) for message in found)
