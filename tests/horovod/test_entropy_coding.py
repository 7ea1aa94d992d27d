"""Entropy-coded messages under Horovod: training as with fixed-length codes, from fewer bytes; resumed exactly."""

from typing import Any

import horovod.torch as hvd
import pytest
import torch

import hvd_qoda
from tests.horovod.training import bits_of, make_model, make_optimizer, make_qoda, train
from tests.launcher import RankPool

UPDATES = {"at": (3,), "every": 6, "samples": 2}
STEPS = 12
# Nothing is left to Horovod's own all-reduce: with three ranks or more it adds in an order that depends on time.
EVERYTHING = ({"name": "*", "bits": 4},)


def trained(coding: str, overlaps: bool) -> dict[str, Any]:
    model = make_model(width=192)
    settings = {"exchange": "allgather", "update_levels": UPDATES, "coding": coding, "layers": EVERYTHING}
    compressor = make_qoda(model, **settings)
    if overlaps:
        optimizer = hvd_qoda.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model=model, compression=compressor
        )
    else:
        optimizer = make_optimizer(model, compressor)
    losses = train(model, optimizer, range(STEPS))
    return {
        "losses": losses,
        "parameters": bits_of(model.parameters()),
        "sent": compressor.traffic.sent["all_gather"],
        "state": compressor.state_dict(),
        "is_coded": any(book.weights for book in compressor.registry.codebooks.values()),
    }


def resumed(coding: str) -> tuple[bytes, bytes]:
    """Parameters after an uninterrupted run, and after one that was saved and loaded in its middle."""
    found = []
    for interrupted in (False, True):
        model = make_model(width=192)
        settings = {"exchange": "allgather", "update_levels": UPDATES, "coding": coding, "bits": 4}
        compressor = make_qoda(model, **settings)
        optimizer = make_optimizer(model, compressor)
        train(model, optimizer, range(STEPS // 2))
        if interrupted:
            state, weights = compressor.state_dict(), model.state_dict()
            model = make_model(seed=1, width=192)
            model.load_state_dict(weights)
            compressor = make_qoda(model, **settings)
            compressor.load_state_dict(state)
            optimizer = make_optimizer(model, compressor)
        train(model, optimizer, range(STEPS // 2, STEPS))
        found.append(bits_of(model.parameters()))
    return found[0], found[1]


def check(ranks: RankPool, overlaps: bool) -> None:
    fixed, coded = (ranks.run(trained, coding, overlaps) for coding in ("fixed", "huffman"))
    for mine, reference in zip(coded, fixed, strict=True):
        assert mine["losses"] == reference["losses"]
        assert mine["parameters"] == reference["parameters"] == fixed[0]["parameters"]
        assert mine["is_coded"]
        assert not reference["is_coded"]
        assert mine["sent"] < 0.965 * reference["sent"]


@pytest.mark.parametrize("overlaps", [False, True])
def test_training_is_the_same_from_fewer_bytes_2(two_ranks: RankPool, overlaps: bool) -> None:
    check(two_ranks, overlaps)


def test_training_is_the_same_from_fewer_bytes_4(four_ranks: RankPool) -> None:
    check(four_ranks, overlaps=False)


def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(two_ranks: RankPool) -> None:
    for uninterrupted, interrupted in two_ranks.run(resumed, "huffman"):
        assert uninterrupted == interrupted


def ranks_disagree() -> str:
    coding = "huffman" if hvd.rank() else "fixed"
    model = make_model()
    optimizer = make_optimizer(model, make_qoda(model, exchange="allgather", coding=coding))
    with pytest.raises(hvd_qoda.RankMismatchError) as caught:
        train(model, optimizer, range(1))
    return str(caught.value)


def test_ranks_that_disagree_on_the_coding_are_told(two_ranks: RankPool) -> None:
    for message in two_ranks.run(ranks_disagree):
        assert "coding" in message
