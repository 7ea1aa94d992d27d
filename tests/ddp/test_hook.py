"""The communication hook in real ranks: the same bits everywhere, whatever DDP is told to do."""

import json
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
import torch.distributed as dist

import hvd_qoda
from hvd_qoda import ddp
from hvd_qoda.errors import ConfigError, QodaError, RegistryError
from hvd_qoda.torch_distributed import TorchTransport
from tests.ddp.training import Net, Run
from tests.launcher import RankPool

QUICK: dict[str, Any] = {"timeout_s": 20.0, "fusion_buffer_mb": 0.2, "update_levels": {"at": [3]}}


def trained(options: dict[str, Any], steps: int = 4, wrap: dict[str, Any] | None = None, **forward: Any) -> Any:
    run = Run({**QUICK, **options}, **(wrap or {}))
    losses = [run.step(step, **forward) for step in range(steps)]
    assert run.state is not None
    assert run.state.step == steps
    return run.bits(), losses, run.state.registry.version, run.state.traffic.sent_bytes


@pytest.mark.parametrize("exchange", ["allgather", "reduce_scatter", "by_bytes"])
def test_every_rank_holds_the_same_bits(four_ranks: RankPool, exchange: str) -> None:
    outcomes = four_ranks.run(trained, {"exchange": exchange})
    assert len({bits for bits, *_ in outcomes}) == 1
    assert {version for _, _, version, _ in outcomes} == {1}  # levels have been fitted before step 3


@pytest.mark.parametrize(("exchange", "rotations"), [("allgather", "common"), ("reduce_scatter", "separate")])
def test_rotated_buckets(two_ranks: RankPool, exchange: str, rotations: str) -> None:
    options = {"bits": 4, "rotation": "hadamard", "rounding": "nearest", "exchange": exchange, "rotations": rotations}
    outcomes = two_ranks.run(trained, options)
    assert len({bits for bits, *_ in outcomes}) == 1
    assert {version for _, _, version, _ in outcomes} == {0}  # nothing to fit


def test_ranks_rotate_by_signs_of_their_own_if_told_to(two_ranks: RankPool) -> None:
    options = {"bits": 4, "rotation": "hadamard", "rounding": "nearest", "exchange": "allgather"}
    common, separate = (
        two_ranks.run(trained, {**options, "rotations": rotations}, steps=1) for rotations in ("common", "separate")
    )
    assert common[0][0] != separate[0][0]


def test_planning_the_bits_of_rotated_buckets_costs_few_bytes(two_ranks: RankPool) -> None:
    """The bytes of histograms are saved, in the steps before the plan; the plan is the same on both ranks."""
    options = {"bits": "auto", "codebooks": "per_layer", "rotation": "hadamard", "exchange": "allgather"}
    sent = {}
    for name, schedule in {"planned": {"at": (3,)}, "not planned": {"at": (9,)}}.items():
        quick = {"every": None, "samples": 2, **schedule}
        outcomes = two_ranks.run(trained, {**options, "update_levels": quick}, steps=2)
        assert len({bits for bits, *_ in outcomes}) == 1
        sent[name] = outcomes[0][3]
    layers = 4  # whose bits are planned
    assert 0 < sent["planned"] - sent["not planned"] <= 2 * 3 * 8 * layers


def test_entropy_coding_changes_bytes_only(two_ranks: RankPool) -> None:
    fixed, coded = (two_ranks.run(trained, {"exchange": "allgather", "coding": name}) for name in ("fixed", "huffman"))
    for (bits, losses, _, sent), (coded_bits, coded_losses, _, coded_sent) in zip(fixed, coded, strict=True):
        assert (coded_bits, coded_losses) == (bits, losses)
        assert coded_sent < 0.97 * sent


def plain_and_quantized() -> tuple[float, float]:
    """Relative distance of the mean gradient from DDP's own, quantized and sent exactly."""
    own = Run()
    own.loss(0).backward()
    distances = []
    for bits in (5, 32):
        run = Run({**QUICK, "bits": bits})
        run.loss(0).backward()
        distances.append(float((run.gradients() - own.gradients()).norm() / own.gradients().norm()))
    return distances[0], distances[1]


def test_the_mean_is_the_mean(two_ranks: RankPool) -> None:
    for quantized, exact in two_ranks.run(plain_and_quantized):
        assert 0.01 < quantized < 0.15
        assert exact < 1e-6


def bytes_of_a_step() -> tuple[float, float]:
    """Bytes of one step's gradients over those of fp32's all-reduce, by telemetry and by the meter."""
    records: list[Any] = []

    class Keep:
        every_rank = True

        def start(self, start: Any) -> None:
            assert start.config is not None

        def write(self, record: Any) -> None:
            records.append(record)

        def close(self, failed: bool = False) -> None: ...

    options = {"timeout_s": 20.0, "levels": "uniform", "measure_error_every": 2}
    with hvd_qoda.Telemetry([Keep()], rank=dist.get_rank()) as telemetry:
        run = Run({**options, "telemetry": telemetry})
        assert run.state is not None
        run.step(0)
        before = run.state.traffic
        run.step(1)
        counted = (run.state.traffic - before).sent_bytes
    first, second = records
    assert [record.step for record in records] == [1, 2]
    kinds = {record.layer_type: record for record in first.layer_types}
    assert {"convolution", "feed_forward", "output", "norm", "bias"} <= set(kinds)
    assert 0 < kinds["feed_forward"].relative_error < 0.05
    assert kinds["bias"].relative_error == 0.0
    assert second.layer_types[0].relative_error is None
    assert abs(second.sent_bytes - counted) < 10  # every layer type is rounded
    return counted / second.raw_bytes, second.raw_bytes / 4


def test_bytes_shrink_and_are_recorded(two_ranks: RankPool) -> None:
    ratio, coordinates = two_ranks.run(bytes_of_a_step)[0]
    assert 5 / 32 < ratio < 5.4 / 32  # codes, norms, headers, and the few exact values
    assert coordinates == sum(parameter.numel() for parameter in Net().parameters())


WRAPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small reduce buckets": ({"bucket_cap_mb": 0.05}, {}),
    "bucket views": ({"gradient_as_bucket_view": True}, {}),
    "static graph": ({"static_graph": True}, {}),
    "unused parameters": ({"find_unused_parameters": True}, {"spare": False}),
}


def test_ddp_options_change_no_bits(two_ranks: RankPool) -> None:
    """DDP's reduce buckets depend on all of these; our messages on none."""
    reference = two_ranks.run(trained, {})
    for name, (wrap, forward) in WRAPS.items():
        outcomes = two_ranks.run(trained, {}, wrap=wrap, **forward)
        assert outcomes[0][0] == outcomes[1][0], name
        if not forward:
            assert outcomes[0][0] == reference[0][0], name


def accumulated() -> tuple[bytes, int, bool]:
    """Three micro-batches, two of them under no_sync(), against their sum in one exchange."""
    run = Run(QUICK)
    assert run.state is not None
    run.optimizer.zero_grad()
    for micro in range(3):
        if micro < 2:
            with run.ddp.no_sync():
                run.loss(0, micro).backward()
        else:
            run.loss(0, micro).backward()
    own = Run()
    with own.ddp.no_sync():
        own.loss(0, 0).backward()
        own.loss(0, 1).backward()
    own.loss(0, 2).backward()
    distance = float((run.gradients() - own.gradients()).norm() / own.gradients().norm())
    return run.gradients().numpy().tobytes(), run.state.step, distance < 0.15


def test_gradient_accumulation(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(accumulated)
    assert first == second
    assert first[1:] == (1, True)


def sixteen_bits(dtype: torch.dtype) -> tuple[bytes, float]:
    run = Run(QUICK, dtype=dtype)
    losses = [run.step(step) for step in range(4)]
    assert all(parameter.grad is not None and parameter.grad.dtype == dtype for parameter in run.model.parameters())
    return run.bits(), losses[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(two_ranks: RankPool, dtype: torch.dtype) -> None:
    (first, loss), (second, _) = two_ranks.run(sixteen_bits, dtype)
    assert first == second
    assert loss == loss


def resumed(how: str) -> tuple[bytes, bytes, bool]:
    """Six steps in one go; and four, then a new model, optimizer, DDP and state, then two."""
    private = {"worker_norms": True, "error_feedback": True}
    options = {**QUICK, **private, "exchange": "reduce_scatter", "update_levels": {"at": [3, 6]}}
    wrap = {"bucket_cap_mb": 0.1}
    whole = Run(options, **wrap)
    for step in range(6):
        whole.step(step)
    first = Run(options, **wrap)
    for step in range(4):
        first.step(step)
    assert first.state is not None
    second = Run(**wrap)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    if how == "pickle":
        state = pickle.loads(pickle.dumps(first.state))
        state.attach(second.ddp)
    else:
        state = ddp.QodaState(second.ddp, **options)
        state.load_state_dict(first.state.state_dict())
    second.register(state)
    for step in range(4, 6):
        second.step(step)
    assert whole.state is not None
    return whole.bits(), second.bits(), whole.state.worker_norms() == state.worker_norms()


@pytest.mark.parametrize("how", ["state_dict", "pickle"])
def test_resume_is_exact(four_ranks: RankPool, how: str) -> None:
    outcomes = four_ranks.run(resumed, how)
    assert len({bits for whole, second, _ in outcomes for bits in (whole, second)}) == 1
    assert all(norms for *_, norms in outcomes)


def disagreement() -> str:
    run = Run({**QUICK, "bits": 4 + dist.get_rank()})
    try:
        run.step(0)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_ranks_that_disagree(two_ranks: RankPool) -> None:
    for told in two_ranks.run(disagreement):
        assert told.startswith("RankMismatchError: the ranks do not agree")
        assert "configuration: bits: 4 on rank 0, 5 on rank 1" in told


def uneven_inputs() -> bytes:
    """Rank 1 has two batches less; DDP's join() lets it answer with zeros."""
    run = Run(QUICK)
    with run.ddp.join():
        for step in range(5 if dist.get_rank() == 0 else 3):
            run.step(step)
    return run.bits()


def test_uneven_inputs_under_join(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(uneven_inputs)
    assert first == second


def late_peer() -> str:
    options = {**QUICK, "levels": "uniform", "timeout_s": 1.0}
    run = Run(options, broadcast_buffers=False)  # forward has no collectives then
    for step in (0, 1):
        run.step(step)
    if dist.get_rank() == 0:
        try:
            run.step(2)
        except Exception as error:  # whatever autograd makes of it
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_missing_peer_is_an_error_at_the_deadline() -> None:
    with RankPool(2, host="torch") as ranks:
        told = ranks.run(late_peer, timeout=60.0)[0]
    assert "ExchangeTimeoutError: rank 0: \"fusion buffer of 'out.bias' to" in told
    assert "did not finish within 1 s" in told


def trained_on_two_hosts(exchange: str) -> Any:
    """As if ranks 0, 1 and ranks 2, 3 had a host each."""
    name = PropertyMock(side_effect=lambda: f"host {dist.get_rank() // 2}")
    with patch.object(TorchTransport, "host_name", new=name):
        return trained({"exchange": exchange}), gradients_beside_ddps_own({"exchange": exchange})


def test_hierarchical_on_two_hosts(four_ranks: RankPool) -> None:
    outcomes = four_ranks.run(trained_on_two_hosts, "hierarchical")
    assert len({bits for (bits, *_), _ in outcomes}) == 1
    assert {version for (_, _, version, _), _ in outcomes} == {1}
    sent = {bytes_sent for (*_, bytes_sent), _ in outcomes}
    assert max(sent) < 1.1 * min(sent)
    assert all(0.01 < distance < 0.15 for _, distance in outcomes)


def gradients_beside_ddps_own(options: dict[str, Any]) -> float:
    """Relative distance of the mean gradient from DDP's own."""
    own, run = Run(), Run({**QUICK, **options})
    for each in (own, run):
        each.loss(0).backward()
    return float((run.gradients() - own.gradients()).norm() / own.gradients().norm())


def uncompressed(dtype: torch.dtype) -> tuple[bytes, float, float]:
    run = Run({**QUICK, "exchange": "off"}, dtype=dtype)
    for step in range(4):
        run.step(step)
    assert run.state is not None
    full = 1.5 * sum(p.numel() * p.itemsize for p in run.model.parameters())  # of an all-reduce by 4 ranks
    sent = run.state.traffic.sent.get("all_reduce", 0) / 4
    return run.bits(), sent / full, gradients_beside_ddps_own({"exchange": "off"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_an_all_reduce(four_ranks: RankPool, dtype: torch.dtype) -> None:
    outcomes = four_ranks.run(uncompressed, dtype)
    assert len({bits for bits, *_ in outcomes}) == 1
    for _, share, distance in outcomes:
        assert share == pytest.approx(1.0)
        assert distance < 1e-6


def large_gradients() -> tuple[bool, int]:
    """Whether the mean of fp16 gradients is right whose sum is not finite; how often levels were fitted before."""
    run = Run({**QUICK, "exchange": "off"}, dtype=torch.float16)
    for step in range(3):
        run.step(step)
    weight = run.model.get_parameter(next(name for name, _ in run.model.named_parameters()))
    weight.register_hook(lambda gradient: torch.full_like(gradient, 30_000.0))
    run.optimizer.zero_grad()
    run.loss(0).backward()
    assert run.state is not None
    assert weight.grad is not None
    return bool((weight.grad == 30_000.0).all()), run.state.registry.version


def test_off_divides_before_it_sums_and_learns_no_levels(four_ranks: RankPool) -> None:
    for is_mean, version in four_ranks.run(large_gradients):
        assert is_mean
        assert version == 0


@pytest.mark.parametrize("needed", ["worker_norms", "error_feedback"])
def test_off_with_what_needs_quantized_gradients_is_refused_before_any_step(needed: str) -> None:
    with pytest.raises(ConfigError, match=f'exchange="off" quantizes nothing, and {needed} need'):
        ddp.QodaState(Net(), exchange="off", **{needed: True})


def another_model() -> None:
    run = Run()
    run.register(ddp.QodaState(Net(), **QUICK))
    with pytest.raises(ConfigError, match="make the QodaState from the model that DDP wraps"):
        run.step(0)


def test_state_of_another_model(two_ranks: RankPool) -> None:
    two_ranks.run(another_model)


def test_states_that_do_not_fit() -> None:
    state = ddp.QodaState(Net(), bits=4)
    with pytest.raises(RegistryError, match="another model or configuration"):
        state.load_state_dict(ddp.QodaState(Net(), bits=5).state_dict())
    with pytest.raises(ConfigError, match="format None"):
        state.load_state_dict({})
    with pytest.raises(ConfigError, match="either config or keywords"):
        ddp.QodaState(Net(), config=hvd_qoda.QodaConfig(), bits=4)
    assert issubclass(ConfigError, QodaError)


def test_the_state_travels_by_pickle(tmp_path: Path) -> None:
    state = ddp.QodaState(Net(), bits=4, seed=3)
    path = tmp_path / "state.pt"
    torch.save(state, path)
    loaded = torch.load(path, weights_only=False)
    assert loaded.state_dict() == json.loads(json.dumps(state.state_dict()))
    assert loaded.config == state.config
    with pytest.raises(ConfigError, match="call attach"):
        loaded.load_state_dict({})
    with pytest.raises(RegistryError):
        loaded.attach(torch.nn.Linear(3, 3))
    loaded.attach(Net())
