"""Several engines, ranks that disagree, optimizers by name, and where the numbers go."""

import copy
import os
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import wandb
from deepspeed.comm import comm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ds_plugin
from ds_plugin.backend import QodaBackend
from hvd_qoda.telemetry import StartRecord, StepRecord, Telemetry
from tests.deepspeed.training import (
    Model,
    batches,
    configuration,
    digest,
    engine_of,
    error_of,
    make_engine,
    relative_difference,
    run,
    train_steps,
    weights,
)
from tests.launcher import RankPool
from tests.telemetry.offline_wandb import offline_files, read_finished_run

QODA = {"bits": 5}


def several_engines() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    alone = run(configuration(3, "fp32"), 3)
    compressed = run(configuration(3, "fp32", QODA), 3)
    live = comm.cdb
    first = make_engine(configuration(3, "fp32", QODA))
    second = make_engine(configuration(3, "fp32"))
    third = make_engine(configuration(2, "fp32", QODA))
    data = [batches(rank), batches(rank), batches(rank)]
    for _ in range(3):  # alternating
        for engine, source in zip((first, second, third), data, strict=True):
            train_steps(engine, source, 1)
    results = {
        "first": digest(weights(first)) == compressed["digest"],
        "second": digest(weights(second)) == alone["digest"],
        "steps": (ds_plugin.reducer_of(first).step, ds_plugin.reducer_of(third).step),
        "no block": error_of(lambda: ds_plugin.require(second)),
        "front": isinstance(comm.cdb, QodaBackend),
    }
    first.destroy()
    results["after the first"] = isinstance(comm.cdb, QodaBackend)
    second.destroy()
    third.destroy()
    results["after the last"] = comm.cdb is live and not isinstance(live, QodaBackend)
    return results


def test_engines_do_not_disturb_each_other(two_ranks: RankPool) -> None:
    for found in two_ranks.run(several_engines):
        assert found["first"]
        assert found["second"]
        assert found["steps"] == (3, 3)
        assert "there is none in its configuration" in found["no block"]
        assert found["front"]
        assert found["after the first"]
        assert found["after the last"]


def disagreements() -> dict[str, str]:
    """Rank 1 has something else each time; nobody trains."""
    rank = torch.distributed.get_rank()

    def attempt(config: dict[str, Any], model: torch.nn.Module | None = None) -> str:
        return error_of(lambda: make_engine(config, model).destroy())

    wider = Model()
    wider.linear1 = torch.nn.Linear(64, 161 + rank)
    wider.linear2 = torch.nn.Linear(161 + rank, 64)
    absent = configuration(1, "fp32", QODA if rank == 0 else None)
    buckets = {"zero_optimization": {"reduce_bucket_size": 10000 + rank}}
    results = {
        "bits": attempt(configuration(0, "fp32", {"bits": 5 + rank})),
        "block": attempt(absent),
        "stage": attempt(configuration(1 + rank, "fp32", QODA)),
        "buckets": attempt(configuration(2, "fp32", QODA, **buckets)),
        "key": attempt(configuration(2, "fp32", {"bitz": 4})),
    }
    results["afterwards"] = run(configuration(2, "fp32", QODA), 1)["digest"]
    return results


def test_ranks_that_disagree_all_raise_an_error_that_says_on_what(two_ranks: RankPool) -> None:
    ranks = two_ranks.run(disagreements)
    for found in ranks:
        for case, words in {
            "bits": ["bits: 5 on rank 0, 6 on rank 1"],
            "block": ['"qoda" block', "absent"],
            "stage": ["zero_optimization.stage: 1 on rank 0, 2 on rank 1"],
            "buckets": ["reduce_bucket_size: 10000 on rank 0, 10001 on rank 1"],
        }.items():
            assert found[case].startswith("RankMismatchError"), (case, found[case])
            for word in words:
                assert word in found[case], (case, found[case])
        assert found["key"].startswith("QodaConfigError")
        assert "did you mean 'bits'" in found["key"]
    assert ranks[0]["afterwards"] == ranks[1]["afterwards"]


def two_groups(model: Model) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]


def optimizers() -> dict[str, Any]:
    """By name; QODAdam with two groups, and QODA, must go the same way in every stage."""
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}
    for name, parameters in (("QODAdam", {"lr": 3e-3}), ("QODA", {"lr": 0.3})):
        ends = []
        for stage in (0, 1, 2, 3):
            config = configuration(stage, "fp32", {"bits": 32}, optimizer={"type": name, "params": parameters})
            model = Model()
            groups = two_groups(model) if name == "QODAdam" else list(model.parameters())
            with engine_of(config, model, model_parameters=groups) as engine:
                train_steps(engine, batches(rank), 4)
                ends.append(weights(engine))
        results[name] = [relative_difference(end, ends[0]) for end in ends]
        results[f"{name} moved"] = relative_difference(
            ends[0], torch.cat([p.detach().double().flatten() for p in Model().parameters()])
        )
    config = configuration(2, "fp32", QODA, optimizer={"type": "QODA", "params": {"lr": 0.3}})
    model = Model()
    results["groups"] = error_of(lambda: make_engine(config, model, model_parameters=two_groups(model)))
    workers = configuration(1, "fp32", QODA, optimizer={"type": "QODA", "params": {"lr": 0.3, "sum_over": "workers"}})
    results["workers"] = error_of(lambda: make_engine(workers))
    return results


def test_our_optimizers_by_name(two_ranks: RankPool) -> None:
    for found in two_ranks.run(optimizers):
        for name in ("QODAdam", "QODA"):
            assert max(found[name]) < 1e-5, found
            assert found[f"{name} moved"] > 1e-3
        assert found["groups"].startswith("UnsupportedError: QODA computes its step sizes from norms")
        assert '"worker_norms": true' in found["workers"]


class ListSink:
    every_rank = False

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def start(self, start: StartRecord) -> None:
        pass

    def write(self, record: StepRecord) -> None:
        self.records.append(record)

    def close(self, failed: bool = False) -> None:
        pass


def reported(folder: str) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    monitor = {
        "csv_monitor": {"enabled": True, "output_path": f"{folder}/csv", "job_name": "run"},
        "tensorboard": {"enabled": True, "output_path": f"{folder}/tensorboard", "job_name": "run"},
        "wandb": {"enabled": True, "project": "tests"},
    }
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": folder, "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true"}
    qoda = {"bits": 5, "measure_error_every": 2, "update_levels": {"at": [3], "every": None, "samples": 2}}
    sink = ListSink()
    with engine_of(configuration(2, "fp32", qoda, **monitor)) as engine:
        ds_plugin.require(engine)
        telemetry = Telemetry([sink], rank=rank)
        ds_plugin.add_telemetry(engine, telemetry)
        train_steps(engine, batches(rank), 5)
        telemetry.close()
        sent = ds_plugin.reducer_of(engine).traffic.sent_bytes
    if rank == 0:
        wandb.finish()
    return {"records": [record.to_dict() for record in sink.records], "sent": sent}


def test_records_reach_the_monitor_and_our_telemetry(two_ranks: RankPool, tmp_path: Path) -> None:
    found = two_ranks.run(reported, str(tmp_path))[0]
    records = found["records"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["registry_version"] for record in records] == [0, 0, 1, 1, 1]
    assert [record["relative_error"] is not None for record in records] == [True, False, True, False, True]
    by_type = {entry["layer_type"]: entry for entry in records[0]["layer_types"]}
    model = Model()
    assert by_type["embedding"]["coordinates"] == model.embedding.weight.numel()
    assert by_type["output"]["coordinates"] == model.head.weight.numel()
    assert by_type["attention"]["bits"] == 5
    assert by_type["bias"]["relative_error"] == 0.0
    assert 0 < by_type["feed_forward"]["relative_error"] < 0.05
    total = sum(parameter.numel() for parameter in model.parameters())
    assert records[0]["raw_bytes"] == total * 4  # of the all-reduce that DeepSpeed would make, with two ranks
    assert sum(record["sent_bytes"] for record in records) == pytest.approx(found["sent"], abs=100)  # whole bytes
    expected = [(8 * record["step"], record["sent_bytes"]) for record in records]  # counted in samples
    check_monitors(tmp_path, "Train/qoda/bytes_sent", expected)


def check_monitors(folder: Path, metric: str, expected: list[tuple[int, int]]) -> None:
    """A metric is in the files of all of DeepSpeed's monitors."""
    file = next(folder.rglob(f"{metric.replace('/', '_')}.csv"))
    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    assert [(int(step), float(value)) for step, value in rows] == expected
    events = EventAccumulator(str(next(folder.glob("tensorboard/**/events*"))))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars(metric)] == expected
    history = read_finished_run(offline_files(folder)[0]).history
    assert [(row["_step"], row[metric]) for row in history if metric in row] == expected


def unread() -> dict[str, str]:
    """An engine without an optimizer reads no block: nothing is there to compress, and `require` says so."""
    config = configuration(0, "fp32", QODA)
    del config["optimizer"]
    engine = make_engine(config)
    try:
        return {"unread": error_of(lambda: ds_plugin.require(engine))}
    finally:
        engine.destroy()


def test_a_block_that_nobody_has_read_is_noticed(two_ranks: RankPool) -> None:
    for found in two_ranks.run(unread):
        assert found["unread"].startswith("ConfigError")
        assert "nobody has read it" in found["unread"]


def initialised_in_parts() -> dict[str, Any]:
    """ZeRO 3 with parameters that were parted when they were made: shapes and layer types are those of the whole."""
    config = configuration(3, "fp32", QODA)
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)):
        model = Model()
    with engine_of(config, model) as engine:
        registry = ds_plugin.reducer_of(engine).registry
        losses = train_steps(engine, batches(torch.distributed.get_rank()), 3)
        return {"types": {n: (e.layer_type, e.shape) for n, e in registry.parameters.items()}, "losses": losses}


def test_parameters_made_in_parts(two_ranks: RankPool) -> None:
    from qoda_kernels.layer_types import layer_types

    model = Model()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for found in two_ranks.run(initialised_in_parts):
        assert found["types"] == {name: (kind, shapes[name]) for name, kind in layer_types(model).items()}
        assert found["losses"][-1] < found["losses"][0] * 1.1
