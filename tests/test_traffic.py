import pytest

from hvd_qoda.traffic import Traffic, TrafficMeter, all_gather_bytes, all_reduce_bytes, all_to_all_bytes


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 100), (4, 150), (8, 175)])
def test_all_reduce_sends_the_payload_twice_but_for_the_own_share(size: int, expected: float) -> None:
    assert all_reduce_bytes(100, size) == expected


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 100), (4, 300)])
def test_all_gather_sends_the_payload_to_every_other_rank(size: int, expected: int) -> None:
    assert all_gather_bytes(100, size) == expected


def test_all_to_all_sends_everything_but_the_own_share() -> None:
    assert all_to_all_bytes([10, 20, 40], rank=1) == 50


def test_meter_adds_up_by_collective_and_returns_what_it_added() -> None:
    meter = TrafficMeter()
    assert meter.all_reduce(100, 4) == 150
    assert meter.all_reduce(10, 4) == 15
    assert meter.all_gather(7, 3) == 14
    assert meter.all_to_all([1, 2, 3], 2) == 3
    assert meter.traffic == Traffic(
        {"all_reduce": 165, "all_gather": 14, "all_to_all": 3}, {"all_reduce": 2, "all_gather": 1, "all_to_all": 1}
    )
    assert meter.traffic.sent_bytes == 182


def test_traffic_is_a_snapshot_and_differences_are_what_came_between() -> None:
    meter = TrafficMeter()
    meter.all_gather(5, 2)
    before = meter.traffic
    meter.all_gather(6, 2)
    meter.all_reduce(1, 3)
    between = meter.traffic - before
    assert before.sent_bytes == 5
    assert between.calls == {"all_gather": 1, "all_reduce": 1}
    assert between.sent == {"all_gather": 6, "all_reduce": pytest.approx(4 / 3)}
    assert between.sent_bytes == 7
