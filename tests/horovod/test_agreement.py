"""Ranks that do not run the same thing: every rank raises an error that names the difference, before any gradient."""

import time
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

import hvd_qoda.description as description_module
from hvd_qoda.errors import ExchangeTimeoutError, RankMismatchError, UnsupportedError, WireError
from tests.horovod.training import loss_of, make_model, make_optimizer, make_qoda, one_step, train
from tests.launcher import RankPool

ODD_RANK = 1


Attempt = tuple[str, float, dict[str, int]]


def attempt(model: nn.Module, **keywords: Any) -> Attempt:
    """Train one step; returns the error's message, the seconds until it, and the collectives that were started."""
    compressor = make_qoda(model, **keywords)
    optimizer = make_optimizer(model, compressor)
    begin = time.monotonic()
    with pytest.raises(RankMismatchError) as caught:
        one_step(model, optimizer)
    return str(caught.value), time.monotonic() - begin, dict(compressor.traffic.calls)


def with_other_configuration(ours: dict[str, Any], theirs: dict[str, Any]) -> Attempt:
    return attempt(make_model(), **(theirs if hvd.rank() == ODD_RANK else ours))


def assert_all_name(results: list[Attempt], *words: str) -> None:
    for message, seconds, collectives in results:
        for word in words:
            assert word in message
        assert seconds < 30
        assert collectives == {"all_reduce": 1, "all_gather": 2}  # a roll call and the agreement: no gradient, no token


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ({"bits": 5}, {"bits": 4}, ["configuration: bits: 5 on ranks 0, 2, 3, 4 on rank 1"]),
        ({}, {"layers": [{"name": "2.weight", "bits": 8}]}, ["configuration: layers", "2.weight"]),
        ({"seed": 0}, {"seed": 7}, ["configuration: seed: 0 on ranks 0, 2, 3, 7 on rank 1"]),
        ({"exchange": "allgather"}, {"exchange": "reduce_scatter"}, ["configuration: exchange"]),
        ({}, {"update_levels": {"at": (50,)}}, ["configuration: update_levels: at"]),
    ],
)
def test_horovod_mismatched_configuration(
    four_ranks: RankPool, ours: dict[str, Any], theirs: dict[str, Any], words: list[str]
) -> None:
    assert_all_name(four_ranks.run(with_other_configuration, ours, theirs), *words)


def with_other_model(kind: str) -> Attempt:
    model = make_model()
    if hvd.rank() == ODD_RANK:
        if kind == "shape":
            model = make_model(width=100)
        elif kind == "extra":
            model.append(nn.Linear(7, 7))
        elif kind == "order":
            model = nn.Sequential(*reversed(model))
        elif kind == "dtype":
            model[2].double()
    if kind == "order":
        named = (
            list(model.named_parameters()) if hvd.rank() != ODD_RANK else list(make_model().named_parameters())[::-1]
        )
        compressor = make_qoda(named)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([p for _, p in named], lr=0.1), named_parameters=named, compression=compressor
        )
        begin = time.monotonic()
        with pytest.raises(RankMismatchError) as caught:
            optimizer.synchronize()
        return str(caught.value), time.monotonic() - begin, dict(compressor.traffic.calls)
    model[4].register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return attempt(model)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("shape", ["parameter: 0.weight", "[96, 40]", "[100, 40]", "on rank 1"]),
        ("extra", ["parameter: 5.weight: absent on ranks 0, 2, 3", "[7, 7]"]),
        ("order", ["order of parameters"]),
        ("dtype", ["parameter: 2.weight", "float64"]),
    ],
)
def test_horovod_mismatched_model(four_ranks: RankPool, kind: str, words: list[str]) -> None:
    assert_all_name(four_ranks.run(with_other_model, kind), *words)


def with_other_version() -> Attempt:
    original = description_module.__version__
    if hvd.rank() == ODD_RANK:
        description_module.__version__ = "999.0"
    try:
        return attempt(make_model())
    finally:
        description_module.__version__ = original


def test_horovod_mismatched_library_version(four_ranks: RankPool) -> None:
    assert_all_name(four_ranks.run(with_other_version), "version of hvd_qoda", '"999.0" on rank 1')


def agreeing_after_an_error(error_first: bool) -> list[list[float]]:
    """A mismatch that is caught and mended does no harm to what follows."""
    if error_first:
        with_other_configuration({"bits": 5}, {"bits": 6})
    model = make_model()
    train(model, make_optimizer(model, make_qoda(model)), range(2))
    return [parameter.flatten().tolist() for parameter in model.parameters()]


def test_ranks_can_go_on_after_a_mismatch(two_ranks: RankPool) -> None:
    after_error, undisturbed = (two_ranks.run(agreeing_after_an_error, first) for first in (True, False))
    assert after_error[0] == after_error[1]
    assert after_error == undisturbed


def header_mismatch(scheme: str) -> str:
    """Ranks that drift apart later are caught by the messages' headers, on every rank."""
    model = make_model()
    compressor = make_qoda(model, exchange=scheme, name="drifting")  # leaves exchanges under way: a name of its own
    optimizer = make_optimizer(model, compressor)
    train(model, optimizer, range(2))
    if hvd.rank() == ODD_RANK:
        compressor.session.step += 1
    with pytest.raises((WireError, RankMismatchError)) as caught:
        one_step(model, optimizer)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_later_mismatch_is_caught_from_headers(two_ranks: RankPool, scheme: str) -> None:
    for message in two_ranks.run(header_mismatch, scheme):
        assert "exchange counter" in message


def late_rank() -> str:
    """One rank comes too late: the other gives up at the deadline, says what it waited for, and can wait again."""
    model = make_model()
    compressor = make_qoda(model, timeout_s=6.0)
    optimizer = make_optimizer(model, compressor)
    train(model, optimizer, range(1))
    message = "late"
    if hvd.rank() == 0:
        loss_of(model, 1).backward()
        # Horovod's own wait for the token has no deadline: stand in for its answer.
        token = torch.tensor([1.0, compressor._ranks.tokens._mean])
        with pytest.raises(ExchangeTimeoutError) as caught:
            compressor.decompress(token, compressor._outstanding["2.weight"])
        message = str(caught.value)
    hvd.barrier()
    if hvd.rank() != 0:
        loss_of(model, 1).backward()
    optimizer.step()
    return message


def test_a_rank_that_stays_away_is_reported_at_the_deadline(two_ranks: RankPool) -> None:
    message, other = two_ranks.run(late_rank)
    assert other == "late"
    assert "rank 0: 'hvd_qoda." in message
    assert "2.weight.by_bytes.all_gather' did not finish within 6 s" in message
    assert "every rank is alive" in message


# -- what is refused -------------------------------------------------------------------------------------------------


def adasum() -> str:
    model = make_model()
    optimizer = make_optimizer(model, make_qoda(model), op=hvd.Adasum)
    with pytest.raises(UnsupportedError) as caught:
        one_step(model, optimizer)
    return str(caught.value)


def test_horovod_adasum_is_refused(two_ranks: RankPool) -> None:
    for message in two_ranks.run(adasum):
        assert "Adasum" in message
        assert "op=hvd.Average" in message


def joined(scheme: str, steps_before: int) -> str:
    """The last rank has no more data and joins; the others must be told, not hang or crash."""
    model = make_model()
    # Ranks raise at different gradients, and leave tokens unanswered: names of its own.
    own = f"joined-{scheme}-{steps_before}."
    compressor = make_qoda(model, exchange=scheme, name=own)
    optimizer = make_optimizer(model, compressor, prefix=own)
    train(model, optimizer, range(steps_before))
    message = "joined"
    if hvd.rank() != hvd.size() - 1:
        with pytest.raises(UnsupportedError) as caught:
            train(model, optimizer, [steps_before])
        message = str(caught.value)
    hvd.join()
    return message


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_horovod_join_is_refused_2(two_ranks: RankPool, scheme: str, steps_before: int) -> None:
    *others, last = two_ranks.run(joined, scheme, steps_before)
    assert last == "joined"
    assert all("hvd.join()" in message and "same number of batches" in message for message in others)


def joined_without_compression() -> tuple[int, int]:
    """Where nothing is compressed, Horovod does everything itself, and ranks may join."""
    model = make_model()
    own = "joined-32."
    optimizer = make_optimizer(model, make_qoda(model, bits=32, name=own), prefix=own)
    losses = train(model, optimizer, range(2 + hvd.rank()))
    return len(losses), hvd.join()


def test_horovod_join_works_where_nothing_is_compressed(two_ranks: RankPool) -> None:
    last_to_join = 1
    assert two_ranks.run(joined_without_compression) == [(2, last_to_join), (3, last_to_join)]


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_horovod_join_is_refused_4(four_ranks: RankPool, scheme: str) -> None:
    *others, last = four_ranks.run(joined, scheme, 3)
    assert last == "joined"
    assert all("hvd.join()" in message for message in others)


def other_reduction(op: str) -> str:
    model = make_model()
    compressor = make_qoda(model, name=op)  # leaves exchanges under way: a name of its own
    optimizer = make_optimizer(model, compressor, op=getattr(hvd, op))
    with pytest.raises(UnsupportedError) as caught:
        one_step(model, optimizer)
    return str(caught.value)


@pytest.mark.parametrize("op", ["Min", "Max", "Product"])
def test_other_reductions_are_refused(four_ranks: RankPool, op: str) -> None:
    for message in four_ranks.run(other_reduction, op):
        assert "averaged or summed" in message


def compressor_of_a_set_optimizer_of_all() -> str:
    chosen = hvd.add_process_set([0, 1])
    model = make_model()
    optimizer = make_optimizer(model, make_qoda(model, process_set=chosen))
    with pytest.raises((UnsupportedError, RankMismatchError)) as caught:
        one_step(model, optimizer)
    if hvd.rank() not in (0, 1):
        # What a rank that goes on regardless would send: the token's second element gives it away.
        for name, parameter in model.named_parameters():
            compressed = name in ("0.weight", "2.weight")
            hvd.allreduce_async_(torch.ones(2) if compressed else torch.zeros_like(parameter), name=name)
    return str(caught.value)


def test_horovod_process_set_of_optimizer_and_compressor_must_be_the_same(four_ranks: RankPool) -> None:
    messages = four_ranks.run(compressor_of_a_set_optimizer_of_all)
    assert all("same process_set" in message for message in messages)
    assert "rank 3 exchanges gradients but is not in the compressor's process set [0, 1]" in messages[3]
    four_ranks.close()  # collectives are still under way
