"""What DeepSpeed alone can do, the plug-in can: the same bits at 32 bits, near ones at few, equal replicas."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_plugin
from hvd_qoda.optim import QGenX
from tests.deepspeed.training import (
    Model,
    batches,
    configuration,
    digest,
    engine_of,
    error_of,
    relative_difference,
    train_steps,
    weights,
)
from tests.launcher import RankPool

EXACT = {"bits": 32}
LOW = {"bits": 5, "min_numel": 16}
BLOCKS = (None, EXACT, LOW)


def three(training: Callable[[dict[str, Any] | None], torch.Tensor]) -> dict[str, Any]:
    """A training without a block, with exact gradients and with coded ones; what of it the tests compare."""
    plain, exact, low = (training(block) for block in BLOCKS)
    return {
        "exact": torch.equal(plain, exact),
        "near": relative_difference(low, plain),
        "coded": not torch.equal(plain, low),
        "digest": digest(low),
        "finite": bool(torch.isfinite(low).all()),
    }


def check(results: list[dict[str, Any]], near: float = 0.05) -> None:
    for found in results:
        assert found["exact"]
        assert found["coded"]
        assert found["finite"]
        assert found["near"] < near
        assert found["digest"] == results[0]["digest"]


# -- checkpoints at any time ----------------------------------------------------------------------------------------


def saved_within_a_step(folder: str, stage: int, thrown_away: bool) -> dict[str, Any]:
    """Saved after four steps and a batch more, which belongs to a step of two or is thrown away."""
    rank = torch.distributed.get_rank()
    at_work: list[bool] = []

    def training(block: dict[str, Any] | None) -> torch.Tensor:
        place = f"{folder}/{0 if block is None else block['bits']}"
        # Levels change in the step that is under way.
        updates = {"update_levels": {"at": [5], "every": None, "samples": 1}}
        qoda = None if block is None else {**block, **updates}
        config = configuration(stage, "fp32", qoda, gradient_accumulation_steps=1 if thrown_away else 2)
        data = batches(rank)
        with engine_of(config) as engine:
            train_steps(engine, data, 4)
            engine.backward(engine(next(data)))
            if thrown_away:
                engine.optimizer.zero_grad()
            else:
                engine.step()
            engine.save_checkpoint(place)
            train_steps(engine, batches(rank, seed=1), 3)
            uninterrupted = weights(engine)
        with engine_of(config) as engine:
            engine.load_checkpoint(place)
            assert block is None or ds_plugin.reducer_of(engine).step == 4
            train_steps(engine, batches(rank, seed=1), 3)
            resumed = weights(engine)
        at_work.append(torch.equal(uninterrupted, resumed))
        return resumed

    return {**three(training), "as uninterrupted": at_work}


@pytest.mark.parametrize("thrown_away", [False, True])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_within_a_step(two_ranks: RankPool, tmp_path: Path, stage: int, thrown_away: bool) -> None:
    results = two_ranks.run(saved_within_a_step, str(tmp_path), stage, thrown_away)
    check(results)
    for found in results:  # accumulated gradients are not saved, by DeepSpeed neither
        assert found["as uninterrupted"] == [thrown_away] * 3


# -- layers that one rank uses and another does not -----------------------------------------------------------------


class Adapters(nn.Module):
    """A trunk, and an adapter per task: of three, two of equal size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(32, 48)
        self.adapters = nn.ModuleList([nn.Linear(48, 40), nn.Linear(48, 40), nn.Linear(48, 24)])
        self.heads = nn.ModuleList([nn.Linear(40, 1), nn.Linear(40, 1), nn.Linear(24, 1)])

    def forward(self, values: torch.Tensor, task: int, others: bool = False) -> torch.Tensor:
        x = torch.tanh(self.trunk(values))
        loss = torch.zeros(())
        for index, (adapter, head) in enumerate(zip(self.adapters, self.heads, strict=True)):
            if index == task or others:
                loss = loss + (float(index == task) * head(torch.tanh(adapter(x)))).square().mean()
        return loss


def different_layers(stage: int, zero: dict[str, Any], tasks: tuple[int, ...]) -> dict[str, Any]:
    """Ranks use different adapters; the reference is DeepSpeed where every rank uses all, the others by a factor 0."""
    rank = torch.distributed.get_rank()

    def training(block: dict[str, Any] | None) -> torch.Tensor:
        config = configuration(stage, "fp32", block, zero_optimization=zero)
        generator = torch.Generator().manual_seed(rank)
        with engine_of(config, Adapters()) as engine:
            for step in range(4):
                task = tasks[(rank + step) % len(tasks)]
                engine.backward(engine(torch.randn(4, 32, generator=generator), task, others=block is None))
                engine.step()
            return weights(engine)

    return three(training)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (2, {"reduce_scatter": False}),
        (2, {"contiguous_gradients": False}),
        (2, {"overlap_comm": True}),
        (1, {"overlap_comm": True}),
    ],
    ids=str,
)
def test_ranks_that_use_different_layers(two_ranks: RankPool, stage: int, zero: dict[str, Any]) -> None:
    check(two_ranks.run(different_layers, stage, zero, (0, 1)))
    check(two_ranks.run(different_layers, stage, zero, (0, 2, 1)))


def different_layers_in_full_buckets() -> None:
    """Buckets are sent while backward goes on, before it is known what they lack."""
    rank = torch.distributed.get_rank()
    config = configuration(2, "fp32", {**LOW, "timeout_s": 5}, zero_optimization={"reduce_bucket_size": 1000})
    with engine_of(config, Adapters()) as engine:
        engine.backward(engine(torch.ones(4, 32), rank))


def test_different_layers_in_full_buckets_are_named(two_ranks: RankPool) -> None:
    errors = [str(outcome.error) for outcome in two_ranks.outcomes(different_layers_in_full_buckets)]
    assert any("reduce_bucket_size" in error for error in errors), errors
    assert all(error.startswith(("WireError", "RankMismatchError", "ExchangeTimeoutError")) for error in errors), errors


# -- sparse gradients, parameters that come later -------------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 32, sparse=True)
        self.body = nn.Linear(32, 64)
        self.head = nn.Linear(64, 97)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(torch.tanh(self.body(self.embedding(tokens))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def sparse_embedding() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    gathered: list[float] = []

    def training(block: dict[str, Any] | None) -> torch.Tensor:
        model = Sparse()
        config = configuration(0, "fp32", block)
        del config["optimizer"]
        with engine_of(config, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as engine:
            train_steps(engine, batches(rank), 4)
            if block is not None:
                gathered.append(ds_plugin.reducer_of(engine).traffic.sent["all_gather"])
            return weights(engine)

    return {**three(training), "gathered": min(gathered)}


def test_a_sparse_embedding_without_zero(two_ranks: RankPool) -> None:
    results = two_ranks.run(sparse_embedding)
    check(results)
    assert all(found["gathered"] > 4 * 12 * 32 * 4 for found in results)  # rows, of four steps


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def changed_model() -> dict[str, Any]:
    """After initialize() one layer is replaced by another of its shape, one by a larger one, and one is added."""
    rank = torch.distributed.get_rank()
    heard = Warnings()
    logging.getLogger("ds_plugin").addHandler(heard)

    def training(block: dict[str, Any] | None) -> torch.Tensor:
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = configuration(0, "fp32", block)
        del config["optimizer"]
        with engine_of(config, model, optimizer=optimizer) as engine:
            train_steps(engine, batches(rank), 1)
            torch.manual_seed(1)
            model.linear2 = nn.Linear(161, 64)
            model.head = nn.Linear(64, 120)
            model.norm = nn.Sequential(model.norm, nn.Linear(64, 64))
            for changed in (model.linear2, model.head, model.norm[1]):
                optimizer.add_param_group({"params": list(changed.parameters())})
            train_steps(engine, batches(rank), 3)
            return weights(engine)

    found = three(training)
    logging.getLogger("ds_plugin").removeHandler(heard)
    return {**found, "said": heard.messages}


def test_a_model_that_is_changed_after_initialize(two_ranks: RankPool) -> None:
    results = two_ranks.run(changed_model)
    check(results)
    for found in results:
        names = {message.split()[2] for message in found["said"]}
        assert names == {"head.weight", "head.bias", "norm.1.weight", "norm.1.bias"}


# -- optimizers -----------------------------------------------------------------------------------------------------


def muon(stage: int) -> dict[str, Any]:
    rank = torch.distributed.get_rank()

    zero = {"reduce_scatter": stage < 3}  # with ZeRO 3 DeepSpeed refuses it

    def training(block: dict[str, Any] | None) -> torch.Tensor:
        optimizer = {"type": "Muon", "params": {"lr": 1e-2, "momentum": 0.9, "torch_adam": True}}
        config = configuration(stage, "fp32", block, optimizer=optimizer, zero_optimization=zero)
        with engine_of(config) as engine:
            train_steps(engine, batches(rank), 4)
            return weights(engine)

    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes
        return three(training)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon(two_ranks: RankPool, stage: int) -> None:
    check(two_ranks.run(muon, stage), near=0.1)


def qoda_without_block() -> list[torch.Tensor]:
    rank = torch.distributed.get_rank()
    found = []
    for block in (None, EXACT):
        for stage in range(4):
            optimizer = {"type": "QODA", "params": {"lr": 0.5}}
            with engine_of(configuration(stage, "fp32", block, optimizer=optimizer)) as engine:
                train_steps(engine, batches(rank), 5)
                found.append(weights(engine))
    return found


def test_qoda_sums_its_norms_over_the_ranks_without_a_block_too(two_ranks: RankPool) -> None:
    for found in two_ranks.run(qoda_without_block):
        for stage in range(4):
            assert torch.equal(found[stage], found[4 + stage])
            assert relative_difference(found[stage], found[0]) < 1e-5


def qgenx_with_zero() -> str:
    model = Model()
    config = configuration(1, "fp32", zero_allow_untested_optimizer=True)
    del config["optimizer"]
    return error_of(lambda: engine_of(config, model, optimizer=QGenX(model.parameters(), lr=0.1)).__enter__())


def test_qgenx_with_zero_is_refused(two_ranks: RankPool) -> None:
    for found in two_ranks.run(qgenx_with_zero):
        assert found.startswith("UnsupportedError: QGenX computes its step sizes from norms over the whole model")


# -- DeepSpeed's monitor --------------------------------------------------------------------------------------------


def monitored(folder: str) -> None:
    """Trainings whose batch size changes."""
    rank = torch.distributed.get_rank()

    def config(job: str, qoda: dict[str, Any] | None = LOW, **more: Any) -> dict[str, Any]:
        monitor = {"enabled": True, "output_path": folder, "job_name": job}
        return configuration(0, "fp32", qoda, csv_monitor=monitor, **more)

    with engine_of(config("ramp")) as engine:
        train_steps(engine, batches(rank), 2)
        engine.set_train_batch_size(16)
        train_steps(engine, batches(rank), 2)
        engine.save_checkpoint(f"{folder}/of ramp")
    with engine_of(config("resumed", train_micro_batch_size_per_gpu=2)) as engine:
        engine.load_checkpoint(f"{folder}/of ramp")
        train_steps(engine, batches(rank), 2)
    with engine_of(configuration(0, "fp32")) as engine:
        train_steps(engine, batches(rank), 3)
        engine.save_checkpoint(f"{folder}/of plain")
    with engine_of(config("of plain")) as engine:
        engine.load_checkpoint(f"{folder}/of plain")
        train_steps(engine, batches(rank), 2)
    with engine_of(config("unmanaged", gradient_accumulation_steps=4, managed_gradient_accumulation=False)) as engine:
        data = batches(rank)
        for passes in (1, 3, 2):
            for _ in range(passes):
                engine.backward(engine(next(data)))
            engine.step()


def samples_in(folder: Path, job: str, metric: str) -> list[int]:
    file = next((folder / job).rglob(f"{metric.replace('/', '_')}.csv"))
    return [int(line.split(",")[0]) for line in file.read_text().splitlines()[1:]]


def test_records_have_the_sample_counts_of_deepspeed(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(monitored, str(tmp_path))
    expected = {"ramp": [8, 16, 32, 48], "resumed": [52, 56], "of plain": [32, 40], "unmanaged": [8, 32, 48]}
    for job, samples in expected.items():
        assert samples_in(tmp_path, job, "Train/qoda/bytes_sent") == samples
        assert samples_in(tmp_path, job, "Train/Samples/lr") == samples
