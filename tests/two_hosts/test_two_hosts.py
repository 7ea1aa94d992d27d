"""Two ranks on each of two hosts, as far as Horovod knows: the hierarchical exchange, and what "auto" learns of hosts.

In a folder of its own, so that the ranks of other tests are stopped before these start.
"""

import copy
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

hvd = pytest.importorskip("horovod.torch", reason="needs Horovod: build it with launch/build_horovod.sh")

import hvd_qoda  # noqa: E402
from hvd_qoda.errors import UnsupportedError  # noqa: E402
from hvd_qoda.hosts import Hosts  # noqa: E402
from tests.horovod.training import (  # noqa: E402
    assert_gradients,
    bits_of,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    make_qoda,
    train,
)
from tests.launcher import RankPool, horovodrun  # noqa: E402

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[RankPool]:
    with RankPool(4, hosts="localhost:2,127.0.0.1:2") as pool:
        yield pool


def hierarchical() -> list[bytes]:
    assert (hvd.local_size(), hvd.cross_size()) == (2, 2)
    model = make_model()
    compressor = make_qoda(model, exchange="hierarchical", measure_error_every=1)
    optimizer = make_optimizer(model, compressor)
    for step in range(3):
        optimizer.zero_grad()
        own = local_gradients(model, lambda step=step: loss_of(model, step))
        loss_of(model, step).backward()
        optimizer.synchronize()
        assert_gradients(model, compressor, own, hosts=Hosts((0, 0, 1, 1)))
        with optimizer.skip_synchronize():
            optimizer.step()
    return bits_of(model.parameters())


def test_hierarchical_on_two_hosts_is_what_it_is_by_definition(two_hosts: RankPool) -> None:
    results = two_hosts.run(hierarchical)
    assert all(result == results[0] for result in results)


def overlapping() -> list[bytes]:
    model = make_model()
    compressor = make_qoda(model, exchange="hierarchical", fusion_buffer_mb=0.02)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = hvd_qoda.DistributedOptimizer(adam, model.named_parameters(), compressor, model=model)
    losses = train(model, optimizer, range(12))
    assert losses[-1] < losses[0]
    assert compressor.traffic.calls["all_to_all"] > 12
    return bits_of(model.parameters())


def test_hierarchical_in_fusion_buffers(two_hosts: RankPool) -> None:
    results = two_hosts.run(overlapping)
    assert all(result == results[0] for result in results)


def resumed() -> None:
    """All parameters are quantized: the sums of Horovod's own all-reduce depend on what it happens to fuse."""

    def new_run() -> tuple[Any, Any, Any]:
        model = make_model()
        compressor = make_qoda(model, exchange="hierarchical", layers=[{"name": "*", "bits": 5}])
        return model, make_optimizer(model, compressor), compressor

    run = new_run()
    train(run[0], run[1], range(3))
    saved = copy.deepcopy([part.state_dict() for part in run])
    train(run[0], run[1], range(3, 6))
    again = new_run()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(again[0], again[1], range(3, 6))
    assert bits_of(again[0].parameters()) == bits_of(run[0].parameters())


def test_hierarchical_resumes_exactly(two_hosts: RankPool) -> None:
    two_hosts.run(resumed)


def auto_on_two_hosts() -> tuple[list[bytes], dict[str, Any]]:
    model = make_model()
    compressor = make_qoda(model, exchange="auto")
    train(model, make_optimizer(model, compressor), range(24))
    return bits_of(model.parameters()), compressor.state_dict()["choice"]


def test_auto_knows_the_hosts(two_hosts: RankPool) -> None:
    results = two_hosts.run(auto_on_two_hosts)
    assert all(result == results[0] for result in results)
    assert results[0][1]["ranks"] == [4, 2]


def unequal_hosts() -> None:
    three = hvd.add_process_set([0, 1, 2])
    if hvd.rank() < 3:
        model = make_model()
        make_optimizer(model, make_qoda(model, three, exchange="hierarchical"), process_set=three)
        with pytest.raises(UnsupportedError, match="the hosts have 2, 1 ranks"):
            loss_of(model, 0).backward()
    hvd.remove_process_set(three)


def test_hosts_with_unequal_numbers_of_ranks_are_refused(two_hosts: RankPool) -> None:
    two_hosts.run(unequal_hosts)


def test_check_measures_the_link_where_it_is_launched() -> None:
    outcome = horovodrun([sys.executable, "-m", "hvd_qoda.cli", "check", "--json"], 2)
    assert outcome.returncode == 0, outcome.stdout
    text = re.sub(r"(?m)^\[\d+\]<std(out|err)>:", "", outcome.stdout)  # what horovodrun puts before every line
    found = json.loads(text[text.index("{\n") : text.rindex("}") + 1])  # one rank speaks
    assert found["link"]["ranks_of_hosts"] == [2]
    assert set(found["link"]["measured"]) == {"all_reduce", "all_reduce_fp16", "all_gather", "all_to_all"}
    assert found["hosts"]["horovod"]["problem"] is None
