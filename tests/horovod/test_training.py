"""Training with the stock optimizer: replicas agree, losses are those of fp32, bytes and levels are as promised."""

from typing import Any

import horovod.torch as hvd
import pytest
import torch

from hvd_qoda.compression import Compression
from hvd_qoda.step_account import CONTROL
from hvd_qoda.telemetry import StepRecord, Telemetry
from tests.horovod.training import (
    ListSink,
    assert_gradients,
    bits_of,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    make_qoda,
    train,
)
from tests.launcher import RankPool

SCHEMES = ("allgather", "reduce_scatter", "by_bytes")
LEARNING_RATES = {"SGD": 0.5, "Adam": 0.01}
EARLY_UPDATES = {"at": (3, 6), "every": 4, "samples": 2}


def gradients_are_the_codecs_means(scheme: str) -> None:
    model = make_model()
    compressor = make_qoda(model, exchange=scheme)
    optimizer = make_optimizer(model, compressor)
    for step in range(3):
        own = local_gradients(model, lambda step=step: loss_of(model, step))
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.synchronize()
        assert_gradients(model, compressor, own)
        with optimizer.skip_synchronize():
            optimizer.step()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_the_codecs_means_2(two_ranks: RankPool, scheme: str) -> None:
    two_ranks.run(gradients_are_the_codecs_means, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_the_codecs_means_4(four_ranks: RankPool, scheme: str) -> None:
    four_ranks.run(gradients_are_the_codecs_means, scheme)


def trained(scheme: str, optimizer_name: str = "SGD", steps: int = 25, **keywords: Any) -> dict[str, Any]:
    model = make_model()
    compressor = make_qoda(model, exchange=scheme, update_levels=EARLY_UPDATES, **keywords)
    optimizer = make_optimizer(
        model, compressor, getattr(torch.optim, optimizer_name), lr=LEARNING_RATES[optimizer_name]
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    losses = train(model, optimizer, range(steps))
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return {
        "parameters": bits_of(model.parameters()),
        "optimizer": bits_of(state),
        "codebooks": {key: book.digest for key, book in compressor.registry.codebooks.items()},
        "version": compressor.registry.version,
        "losses": losses,
        "steps": compressor.step,
    }


def trained_plainly(optimizer_name: str = "SGD", steps: int = 25) -> list[float]:
    model = make_model()
    optimizer = make_optimizer(
        model, hvd.Compression.none, getattr(torch.optim, optimizer_name), lr=LEARNING_RATES[optimizer_name]
    )
    return train(model, optimizer, range(steps))


def assert_replicas_agree(results: list[dict[str, Any]]) -> None:
    for key in ("parameters", "optimizer", "codebooks", "version", "steps"):
        assert all(result[key] == results[0][key] for result in results), key


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("optimizer_name", ["SGD", "Adam"])
def test_agreement_replicas_are_bit_identical_and_learn_2(
    two_ranks: RankPool, scheme: str, optimizer_name: str
) -> None:
    results = two_ranks.run(trained, scheme, optimizer_name)
    assert_replicas_agree(results)
    plain = two_ranks.run(trained_plainly, optimizer_name)
    for ours, theirs in zip(results, plain, strict=True):
        assert ours["losses"][-1] < 0.9 * ours["losses"][0]
        assert sum(ours["losses"][-5:]) / 5 == pytest.approx(sum(theirs[-5:]) / 5, rel=0.05)


def test_training_with_rotated_buckets_of_4_bits(two_ranks: RankPool) -> None:
    results = two_ranks.run(trained, "allgather", "Adam", bits=4, rotation="hadamard", rounding="nearest")
    assert_replicas_agree(results)
    plain = two_ranks.run(trained_plainly, "Adam")
    for ours, theirs in zip(results, plain, strict=True):
        assert sum(ours["losses"][-5:]) / 5 == pytest.approx(sum(theirs[-5:]) / 5, rel=0.05)


def test_training_with_the_best_codebooks_planned_widths_and_error_feedback(two_ranks: RankPool) -> None:
    planned = {"bits": "auto", "auto_bits": {"reference": 4}, "codebooks": "per_layer", "error_feedback": True}
    best = {"levels": "best", "rounding": "nearest", "dither": "stratified"}
    results = two_ranks.run(trained, "reduce_scatter", "Adam", 15, **planned, **best)
    assert_replicas_agree(results)
    assert results[0]["version"] > 0
    assert results[0]["losses"][-1] < 0.9 * results[0]["losses"][0]


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_agreement_replicas_are_bit_identical_4(four_ranks: RankPool, scheme: str) -> None:
    assert_replicas_agree(four_ranks.run(trained, scheme, "Adam"))


def test_levels_are_updated_at_the_scheduled_steps_alike_on_all_ranks(four_ranks: RankPool) -> None:
    results = four_ranks.run(trained, "by_bytes", steps=13)
    assert_replicas_agree(results)
    assert results[0]["version"] == 4  # steps 3, 6, 8, 12
    unchanged = four_ranks.run(trained, "by_bytes", steps=2)
    assert unchanged[0]["version"] == 0
    assert unchanged[0]["codebooks"] != results[0]["codebooks"]


def test_training_is_reproducible_whatever_the_order_of_hooks(two_ranks: RankPool) -> None:
    first = two_ranks.run(trained, "reduce_scatter", steps=8)
    second = two_ranks.run(trained, "reduce_scatter", steps=8)
    other_seed = two_ranks.run(trained, "reduce_scatter", steps=8, seed=1)
    assert first[0]["parameters"] == second[0]["parameters"]
    assert first[0]["codebooks"] == second[0]["codebooks"]
    assert first[0]["parameters"] != other_seed[0]["parameters"]


def recorded(scheme: str, steps: int = 7, **keywords: Any) -> dict[str, Any]:
    sink = ListSink()
    model = make_model(width=300)
    with Telemetry([sink], rank=hvd.rank()) as telemetry:
        compressor = make_qoda(
            model, telemetry=telemetry, exchange=scheme, update_levels=EARLY_UPDATES, measure_error_every=3, **keywords
        )
        train(model, make_optimizer(model, compressor), range(steps))
    return {"records": sink.records, "codebooks": sink.codebooks, "traffic": compressor.traffic}


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_records_of_every_step_explain_every_byte(four_ranks: RankPool, scheme: str) -> None:
    for result in four_ranks.run(recorded, scheme):
        records = result["records"]
        assert [record.step for record in records] == list(range(1, 8))
        assert sum(record.sent_bytes for record in records) == pytest.approx(
            result["traffic"].sent_bytes, abs=len(records)
        )
        by_type = {entry.layer_type: entry for entry in records[1].layer_types}
        assert set(by_type) == {"feed_forward", "output", "bias", CONTROL}
        body = by_type["feed_forward"]
        assert (body.bits, body.coordinates) == (5, 40 * 300 + 300 * 300)
        assert body.raw_bytes == body.coordinates * 4 * 2 * 3 // 4
        assert by_type["bias"].sent_bytes == by_type["bias"].raw_bytes
        assert by_type[CONTROL].coordinates == 0
        # Steps 1, 4 and 7 measure the error; levels are told at first and whenever they change: updates at 3 and 6.
        errors = [{e.layer_type: e.relative_error for e in r.layer_types}["feed_forward"] for r in records]
        assert [error is not None for error in errors] == [True, False, False, True, False, False, True]
        assert 1e-4 < errors[0] < 0.2
        told = [{e.layer_type: e.levels for e in r.layer_types}["feed_forward"] for r in records]
        assert [levels is not None for levels in told] == [True, False, True, False, False, True, False]
        assert list(told[0]) == result["codebooks"]["feed_forward"]["levels"]
        assert [record.registry_version for record in records] == [0, 0, 1, 1, 1, 2, 2]


def large_layer_bytes(scheme: str, elements: int, **keywords: Any) -> float:
    """Bytes per coordinate and hop of one large layer, from the meter."""
    model = torch.nn.Linear(elements // 512, 512, bias=False)
    compressor = make_qoda(model, exchange=scheme, **{"bits": 5, "bucket_size": 512, "levels": "uniform", **keywords})
    optimizer = make_optimizer(model, compressor)
    model(torch.randn(4, elements // 512)).square().sum().backward()
    optimizer.step()
    before = compressor.traffic
    model(torch.randn(4, elements // 512)).square().sum().backward()
    optimizer.step()
    sent = (compressor.traffic - before).sent_bytes
    size = hvd.size()
    hops = size - 1 if scheme == "allgather" else 2 * (size - 1) / size
    return 8 * sent / hops / elements


@pytest.mark.parametrize("scheme", ["allgather", "reduce_scatter"])
def test_bytes_per_coordinate_and_hop_stay_below_5_15_bits(four_ranks: RankPool, scheme: str) -> None:
    for elements in (2**16 + 512, 2**20):
        for bits in four_ranks.run(large_layer_bytes, scheme, elements):
            assert 5.0 < bits <= 5.15, elements


def metered(compression: str) -> tuple[list[StepRecord], float]:
    sink = ListSink()
    model = make_model()
    with Telemetry([sink], rank=hvd.rank()) as telemetry:
        compressor = Compression.metered(getattr(hvd.Compression, compression), telemetry=telemetry)
        train(model, make_optimizer(model, compressor), range(3))
    return sink.records, compressor.traffic.sent_bytes


@pytest.mark.parametrize(("compression", "bits"), [("none", 32), ("fp16", 16)])
def test_horovods_own_compressors_are_metered_alike(four_ranks: RankPool, compression: str, bits: int) -> None:
    numel = sum(p.numel() for p in make_model().parameters())
    for records, sent in four_ranks.run(metered, compression):
        expected = round(1.5 * numel * bits / 8)
        assert [record.step for record in records] == [1, 2, 3]
        assert [record.sent_bytes for record in records] == [expected] * 3
        assert [record.raw_bytes for record in records] == [round(1.5 * numel * 4)] * 3
        assert records[0].layer_types[0].bits == bits
        assert sent == pytest.approx(3 * expected, abs=3)
