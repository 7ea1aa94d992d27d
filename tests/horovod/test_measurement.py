"""The cost model's measurements among real ranks: quick, and the same numbers and choices everywhere."""

import time

import horovod.torch as hvd
import pytest

from hvd_qoda.cost_model import Choice, CodecSpeed, Layout, Link, choose
from hvd_qoda.horovod import HorovodTransport
from hvd_qoda.hosts import gather_hosts
from hvd_qoda.measurement import measure_codec, measure_link
from qoda_kernels.codebook import Codebook
from tests.launcher import RankPool

LAYOUTS = [Layout(elements, 4 * elements, 5 * elements // 8 + 32) for elements in (10_000, 1_000_000, 25_000_000)]


def measured() -> tuple[Link, CodecSpeed, list[Choice], float, int]:
    transport = HorovodTransport()
    codec = measure_codec(Codebook.uniform(5), transport)  # compiles
    hvd.barrier()
    begin = time.perf_counter()
    hosts = gather_hosts(transport)
    link = measure_link(transport, hosts)
    measure_codec(Codebook.uniform(5), transport)
    seconds = time.perf_counter() - begin
    choices = [choose(layout, hosts.ranks, link, codec) for layout in LAYOUTS]
    return link, codec, choices, seconds, hosts.ranks.hosts


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_measure_the_same_and_choose_the_same(two_ranks: RankPool, four_ranks: RankPool, size: int) -> None:
    results = (two_ranks if size == 2 else four_ranks).run(measured)
    link, codec, choices, seconds, hosts = results[0]
    for other in results[1:]:
        assert other[:3] == (link, codec, choices)
    assert hosts == 1
    assert seconds < 5.0  # one second on a quiet machine
    for cost in (link.all_reduce, link.all_gather, link.all_to_all):
        assert 1e-6 < cost.fixed_s < 0.5
        assert 1e-12 < cost.seconds_per_byte < 1e-6
    assert link.within_host is None
