"""Saving and resuming: the bits of an uninterrupted run; Horovod's elastic state; what is refused."""

import copy
import io
import json
import logging
from typing import Any

import horovod.torch as hvd
import pytest
import torch

from hvd_qoda.compression import Compression
from hvd_qoda.errors import ConfigError, QodaError, RankMismatchError, RegistryError
from hvd_qoda.horovod.elastic import CompressorStateHandler
from hvd_qoda.telemetry import Telemetry
from tests.horovod.training import ListSink, bits_of, loss_of, make_model, make_optimizer, make_qoda, train
from tests.launcher import RankPool

UPDATES = {"at": (4, 9), "every": None, "samples": 3}


def new_run(scheme: str, **keywords: Any) -> tuple[Any, Any, Any]:
    model = make_model()
    compressor = make_qoda(model, exchange=scheme, update_levels=UPDATES, **keywords)
    return model, compressor, make_optimizer(model, compressor, torch.optim.Adam, lr=0.01)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resumed(scheme: str, cut: int, worker_norms: bool, own_state: bool, within: bool = False, **options: Any) -> None:
    """Eleven steps at once, and eleven in two runs: the same parameters, levels and norms.

    The first run is saved between two steps, or within the step behind the cut, which the second then takes anew.
    """
    keywords = {"worker_norms": worker_norms, **options}
    model, compressor, optimizer = new_run(scheme, **keywords)
    train(model, optimizer, range(11))
    expected = (bits_of(model.parameters()), compressor.registry.digest, compressor.step)
    norms = compressor.worker_norms() if worker_norms else None

    model, compressor, optimizer = new_run(scheme, **keywords)
    train(model, optimizer, range(cut))
    parameters, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    if within:
        loss_of(model, cut).backward()
    state = through_a_file(compressor.state_dict())
    if within:
        optimizer.step()
    if not own_state:
        state = hvd.broadcast_object(state, root_rank=0)  # rank 0's checkpoint serves all

    model, compressor, optimizer = new_run(scheme, **keywords)
    train(model, optimizer, range(1))  # a used compressor forgets what it was doing
    model.load_state_dict(parameters)
    optimizer.load_state_dict(moments)
    compressor.load_state_dict(state)
    train(model, optimizer, range(cut, 11))
    assert (bits_of(model.parameters()), compressor.registry.digest, compressor.step) == expected
    if worker_norms:
        assert compressor.worker_norms() == norms


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("cut", [2, 5, 3])  # among samples for an update, between updates, and within an update's step
def test_resume_is_exact(two_ranks: RankPool, scheme: str, cut: int) -> None:
    two_ranks.run(resumed, scheme, cut, worker_norms=False, own_state=False, within=cut == 3)


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_resume_is_exact_with_worker_norms_from_each_ranks_own_state(two_ranks: RankPool, scheme: str) -> None:
    two_ranks.run(resumed, scheme, 5, worker_norms=True, own_state=True)


@pytest.mark.parametrize(("scheme", "levels"), [("allgather", "tuq"), ("reduce_scatter", "adaptive")])
def test_resume_is_exact_with_error_feedback(two_ranks: RankPool, scheme: str, levels: str) -> None:
    feedback = {"error_feedback": True, "levels": levels, "bits": 3}
    two_ranks.run(resumed, scheme, 5, worker_norms=False, own_state=True, within=True, **feedback)


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_resume_is_exact_across_plans_of_the_bits(two_ranks: RankPool, scheme: str) -> None:
    """Bits, and so the sizes of messages, change at steps 4 and 9; norms need messages of before a change."""
    planned = {"bits": "auto", "codebooks": "per_layer", "auto_bits": {"reference": 4}}
    two_ranks.run(resumed, scheme, 4, worker_norms=True, own_state=True, **planned)
    two_ranks.run(resumed, scheme, 8, worker_norms=True, own_state=True, within=True, **planned)


def bits_are_planned() -> tuple[list[bytes], set[int], list[int]]:
    model = make_model()
    sink = ListSink()
    keywords = {"bits": "auto", "codebooks": "per_layer", "update_levels": {"at": (3,), "every": None, "samples": 2}}
    model[0].weight.register_hook(lambda gradient: 1e-3 * gradient)  # its error will not matter
    with Telemetry([sink]) as telemetry:
        compressor = make_qoda(model, exchange="allgather", telemetry=telemetry, **keywords)
        train(model, make_optimizer(model, compressor), range(4))
    sent = [sum(entry.sent_bytes for entry in record.layer_types if entry.bits < 32) for record in sink.records]
    bits = {compressor.registry.codebooks[e.codebook].bits for e in compressor.registry.parameters.values()}
    return bits_of(model.parameters()), bits, sent


def test_planned_bits_change_what_is_sent_at_the_same_step_on_all_ranks(two_ranks: RankPool) -> None:
    results = two_ranks.run(bits_are_planned)
    assert results[0] == results[1]
    _, bits, sent = results[0]
    assert bits == {2, 6, 32}
    assert sent[0] == sent[1] > sent[2] == sent[3]


def state_is_shared_plain_data() -> str:
    model, compressor, optimizer = new_run("auto")
    train(model, optimizer, range(3))
    return json.dumps(compressor.state_dict(), sort_keys=True)


def test_state_is_json_and_equal_on_all_ranks(four_ranks: RankPool) -> None:
    states = four_ranks.run(state_is_shared_plain_data)
    assert all(state == states[0] for state in states)
    state = json.loads(states[0])
    assert (state["step"], state["rank_private"]) == (3, None)
    assert state["levels"]["merged"]


def of_another_rank() -> None:
    model, compressor, optimizer = new_run("auto", worker_norms=True)
    train(model, optimizer, range(2))
    before = compressor.worker_norms()
    state = hvd.broadcast_object(compressor.state_dict(), root_rank=0)
    if hvd.rank() == 0:
        compressor.load_state_dict(state)
    else:
        with pytest.raises(RankMismatchError, match=r"position 0 of 2 ranks and is loaded at position 1.*rank_private"):
            compressor.load_state_dict(state)
    state["rank_private"] = None
    compressor.load_state_dict(state)
    with pytest.raises(QodaError, match="no exchange has finished"):
        compressor.worker_norms()
    train(model, optimizer, [0])
    after = compressor.worker_norms()
    assert after.squared_changes == after.squared_norms  # the vectors before count as zero
    assert before.squared_changes != before.squared_norms


def test_private_state_of_another_rank_is_refused(two_ranks: RankPool) -> None:
    two_ranks.run(of_another_rank)


def impossible_states() -> None:
    model, compressor, optimizer = new_run("auto")
    train(model, optimizer, range(2))
    state = compressor.state_dict()
    with pytest.raises(ConfigError, match="format"):
        compressor.load_state_dict({})
    with pytest.raises(RegistryError, match="another model or configuration"):
        make_qoda(make_model(width=50)).load_state_dict(state)


def test_impossible_states_are_named(two_ranks: RankPool) -> None:
    two_ranks.run(impossible_states)


def elastic() -> list[bytes]:
    """TorchState keeps the compressor: back after a failure within a step, and rank 0's after a change of ranks."""
    model, compressor, optimizer = new_run("reduce_scatter", worker_norms=True)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=compressor, batch=0)
    assert state.compression is compressor
    state.sync()
    train(model, optimizer, range(3))
    state.save()
    train(model, optimizer, range(3, 5))
    expected = bits_of(model.parameters())
    # Steps 3 and 4 again, after a failure in the middle of a third.
    loss_of(model, 5).backward()
    state.restore()
    hvd.barrier()
    assert compressor.step == 3
    train(model, optimizer, range(3, 5))
    assert bits_of(model.parameters()) == expected
    if hvd.rank() == 1:  # a new rank knows nothing
        compressor.load_state_dict({**make_qoda(make_model(), update_levels=UPDATES).state_dict()})
        assert compressor.step == 0
    state.sync()
    assert compressor.step == 5
    train(model, optimizer, range(5, 7))
    return bits_of(model.parameters())


def test_elastic_state_saves_restores_and_synchronizes_the_compressor(two_ranks: RankPool) -> None:
    results = two_ranks.run(elastic)
    assert results[0] == results[1]


def elastic_residuals() -> tuple[int, list[str]]:
    """A rank that stays keeps its residuals, and says what becomes of the rest when ranks have changed."""
    model, compressor, optimizer = new_run("allgather", error_feedback=True)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=compressor, batch=0)
    state.sync()
    train(model, optimizer, range(2))
    state.save()
    before = compressor.session.error_feedback.state_dict()["residuals"]
    handler = next(h for h in state._handlers.values() if isinstance(h, CompressorStateHandler))
    handler._saved["rank_private"]["size"] = 3  # as if a third rank had been there when it was saved
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hvd_qoda.horovod.elastic").addHandler(listener)
    state.sync()
    state.sync()  # nothing has changed any more, and nothing is said
    after = compressor.session.error_feedback.state_dict()["residuals"]
    assert before
    assert [(e["parameter"], e["start"]) for e in after] == [(e["parameter"], e["start"]) for e in before]
    assert all(torch.equal(old["values"], new["values"]) for old, new in zip(before, after, strict=True))
    train(model, optimizer, range(2, 4))
    return len(before), said


def test_ranks_that_stay_keep_their_residuals(two_ranks: RankPool) -> None:
    for rank, (slices, said) in enumerate(two_ranks.run(elastic_residuals)):
        assert len(said) == 1
        assert f"rank {rank} of 3 is rank {rank} of 2 now" in said[0]
        assert f"({slices} slices)" in said[0]


def metered_steps() -> None:
    """The metered compressor counts on after a step that the host throws away, and where a saved run has stopped."""
    sink = ListSink()
    model = make_model()
    with Telemetry([sink], rank=hvd.rank()) as telemetry:
        compressor = Compression.metered(hvd.Compression.none, telemetry=telemetry)
        optimizer = make_optimizer(model, compressor)
        state = hvd.elastic.TorchState(model=model, optimizer=optimizer, compression=compressor)
        train(model, optimizer, range(2))
        state.save()
        loss_of(model, 2).backward()
        assert compressor.state_dict()["step"] == 2  # as before the step
        optimizer.load_state_dict(optimizer.state_dict())
        hvd.barrier()  # Horovod's own all-reduces of that step must end before their names are used again
        train(model, optimizer, range(3, 5))
        assert compressor.step == 5
        state.restore()
        assert compressor.step == 2
        train(model, optimizer, range(2, 4))
        with pytest.raises(ConfigError, match="format"):
            compressor.load_state_dict({})
    assert [record.step for record in sink.records] == [1, 2, 4, 5, 3, 4]
    numel = sum(p.numel() for p in model.parameters())
    assert [record.layer_types[0].coordinates for record in sink.records] == [numel] * 6


def test_metered_compressor_reports_after_a_step_is_thrown_away_and_resumes(two_ranks: RankPool) -> None:
    two_ranks.run(metered_steps)


def disagreeing_checkpoints() -> str:
    model, compressor, optimizer = new_run("auto")
    train(model, optimizer, range(2))
    early = compressor.state_dict()
    train(model, optimizer, range(2, 5))
    late = compressor.state_dict()
    compressor.load_state_dict(late if hvd.rank() == 1 else early)
    with pytest.raises(RankMismatchError) as caught:
        loss_of(model, 5).backward()
    return str(caught.value)


def test_ranks_that_resume_from_different_checkpoints_find_out(two_ranks: RankPool) -> None:
    for message in two_ranks.run(disagreeing_checkpoints):
        assert "step: 2 on rank 0, 5 on rank 1" in message
        assert "registry version: 0 on rank 0, 1 on rank 1" in message
