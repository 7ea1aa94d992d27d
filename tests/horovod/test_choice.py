"""exchange="auto" and "off" under Horovod's optimizer and under ours, with real ranks."""

import copy
import json
from typing import Any

import horovod.torch as hvd
import pytest
import torch

import hvd_qoda
from hvd_qoda import scheme_choice
from hvd_qoda.errors import RankMismatchError
from hvd_qoda.telemetry import Telemetry
from tests.horovod.training import (
    ListSink,
    bits_of,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    make_qoda,
    train,
)
from tests.launcher import RankPool

UPDATES = {"at": (4, 9), "every": None, "samples": 3}


SMALL_MB = 0.02  # some fusion buffers for a small model


def new_run(overlaps: bool, telemetry: Telemetry | None = None, **keywords: Any) -> tuple[Any, Any, Any]:
    """Model, compressor and optimizer: Horovod's, or ours that sends gradients in fusion buffers."""
    model = make_model()
    compressor = make_qoda(model, telemetry=telemetry, update_levels=UPDATES, fusion_buffer_mb=SMALL_MB, **keywords)
    if not overlaps:
        return model, compressor, make_optimizer(model, compressor, torch.optim.Adam, lr=0.01)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, compressor, hvd_qoda.DistributedOptimizer(adam, model.named_parameters(), compressor, model=model)


def auto(overlaps: bool) -> tuple[list[bytes], str, list[str | None]]:
    sink = ListSink()
    with Telemetry([sink], rank=hvd.rank()) as telemetry:
        model, compressor, optimizer = new_run(overlaps, telemetry, exchange="auto")
        losses = train(model, optimizer, range(26))
    assert losses[-1] < losses[0]
    assert compressor.registry.version == 2  # levels adapt while gradients travel as they are, too
    raw = [entry.bits for record in sink.records for entry in record.layer_types if entry.layer_type == "feed_forward"]
    assert set(raw) <= {5, 32}
    choice = json.dumps(compressor.state_dict()["choice"], sort_keys=True)
    return bits_of(model.parameters()), choice, [record.note for record in sink.records]


@pytest.mark.parametrize(("size", "overlaps"), [(2, False), (4, False), (4, True)])
def test_all_ranks_choose_and_switch_together(
    two_ranks: RankPool, four_ranks: RankPool, size: int, overlaps: bool
) -> None:
    results = (two_ranks if size == 2 else four_ranks).run(auto, overlaps)
    _, choice, notes = results[0]
    for other in results[1:]:
        assert other == results[0]
    candidates = [candidate["name"] for candidate in json.loads(choice)["candidates"]]
    assert "off" in candidates
    assert "predicted to cost least" in (notes[0] or "")
    if len(candidates) > 1:
        assert any("steps have taken" in (note or "") for note in notes)


def off_is_horovods_own(overlaps: bool) -> None:
    model, compressor, optimizer = new_run(overlaps, exchange="off", worker_norms=True)
    train(model, optimizer, range(6))
    plain = make_model()
    train(plain, make_optimizer(plain, hvd.Compression.none, torch.optim.Adam, lr=0.01), range(6))
    assert bits_of(model.parameters()) == bits_of(plain.parameters())
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert compressor.traffic.sent["all_reduce"] >= 6 * 4 * numel
    assert compressor.worker_norms().squared_norms > 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_off_gives_the_bits_of_plain_horovod(two_ranks: RankPool, overlaps: bool) -> None:
    two_ranks.run(off_is_horovods_own, overlaps)


def collectives_of_a_step_that_is_off(overlaps: bool) -> tuple[dict[str, int], int]:
    model, compressor, optimizer = new_run(overlaps, exchange="off")
    train(model, optimizer, range(2))
    before = compressor.traffic
    train(model, optimizer, [2])
    calls = {name: count for name, count in (compressor.traffic - before).calls.items() if count}
    return calls, len(list(model.parameters()))


@pytest.mark.parametrize("overlaps", [False, True])
def test_off_starts_what_plain_horovod_starts_and_nothing_else(two_ranks: RankPool, overlaps: bool) -> None:
    for calls, parameters in two_ranks.run(collectives_of_a_step_that_is_off, overlaps):
        assert calls == {"all_reduce": parameters}


def joined_while_off() -> tuple[int, int]:
    model, _, optimizer = new_run(True, exchange="off")
    losses = train(model, optimizer, range(2 + hvd.rank()))
    return len(losses), hvd.join()


def test_ranks_may_join_while_the_overlapping_route_is_off(two_ranks: RankPool) -> None:
    assert two_ranks.run(joined_while_off) == [(2, 1), (3, 1)]


def off_in_bfloat16() -> list[bytes]:
    model = make_model().bfloat16()
    compressor = make_qoda(model, exchange="off")
    optimizer = make_optimizer(model, compressor)
    features = torch.randn(8, 40, generator=torch.Generator().manual_seed(hvd.rank())).bfloat16()
    own = local_gradients(model, lambda: model(features).float().square().mean())
    model(features).float().square().mean().backward()
    optimizer.synchronize()
    everyone = hvd.allgather_object(own)
    for name, parameter in model.named_parameters():
        mean = sum(gradients[name].float() for gradients in everyone) / hvd.size()
        assert torch.equal(parameter.grad, mean.bfloat16())
    return bits_of(parameter.grad for parameter in model.parameters())


def test_off_carries_what_horovod_cannot_reduce_exactly(two_ranks: RankPool) -> None:
    results = two_ranks.run(off_in_bfloat16)
    assert results[0] == results[1]


def resumed(overlaps: bool, cut: int) -> None:
    """The bits of the uninterrupted run, from its own state: another run might choose otherwise."""
    before, scheme_choice._FIRST_TRIAL = scheme_choice._FIRST_TRIAL, 1000
    try:
        model, compressor, optimizer = new_run(overlaps, exchange="auto", worker_norms=True)
        train(model, optimizer, range(cut))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), compressor.state_dict()))
        train(model, optimizer, range(cut, 11))
        expected = bits_of(model.parameters())
        choice = compressor.state_dict()["choice"]
        model, compressor, optimizer = new_run(overlaps, exchange="auto", worker_norms=True)
        for part, state in zip((model, optimizer, compressor), saved, strict=True):
            part.load_state_dict(state)
        train(model, optimizer, range(cut, 11))
        assert bits_of(model.parameters()) == expected
        assert compressor.state_dict()["choice"] == choice
    finally:
        scheme_choice._FIRST_TRIAL = before


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_resumed_run_keeps_the_choice(two_ranks: RankPool, overlaps: bool) -> None:
    two_ranks.run(resumed, overlaps, 3)


def other_choice_on_rank_one() -> str:
    model, compressor, optimizer = new_run(False, exchange="auto")
    train(model, optimizer, range(2))
    state = copy.deepcopy(compressor.state_dict())
    if hvd.rank() == 1:
        state["choice"]["check_at"] += 1
    compressor.load_state_dict(state)
    with pytest.raises(RankMismatchError) as caught:
        loss_of(model, 5).backward()
    return str(caught.value)


def test_ranks_with_different_choices_find_out(two_ranks: RankPool) -> None:
    for message in two_ranks.run(other_choice_on_rank_one):
        assert "choice of the exchange: check_at" in message
