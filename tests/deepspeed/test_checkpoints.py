"""Checkpoints by engine.save_checkpoint: an exact resume, and what happens where the two sides differ."""

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_plugin
from ds_plugin.__main__ import main
from ds_plugin.note import describe
from hvd_qoda.errors import ConfigError
from tests.deepspeed.plain_engine import Small
from tests.deepspeed.training import batches, configuration, digest, engine_of, error_of, train_steps, weights
from tests.launcher import ROOT, RankPool, child_environment

QODA = {"bits": 5, "update_levels": {"at": [3, 6], "every": None, "samples": 3}}
OPTIMIZERS = {
    "QODAdam": {"type": "QODAdam", "params": {"lr": 3e-3}},
    "QODA of workers": {"type": "QODA", "params": {"lr": 0.5, "sum_over": "workers"}},
    "error feedback": {"type": "QODAdam", "params": {"lr": 3e-3}},
}


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def resumed(folder: str, stage: int, dtype: str, optimizer: str) -> dict[str, Any]:
    """Nine steps at once, and nine in two runs cut after the fourth."""
    rank = torch.distributed.get_rank()
    qoda = {
        **QODA,
        "worker_norms": optimizer == "QODA of workers",
        "error_feedback": optimizer == "error feedback",
        "dither": "stratified" if optimizer == "QODAdam" else "independent",
    }
    config = configuration(stage, dtype, qoda, optimizer=OPTIMIZERS[optimizer], gradient_clipping=0.0)
    data = batches(rank)
    with engine_of(config) as engine:
        train_steps(engine, data, 4)
        engine.save_checkpoint(folder, None, {"mine": 7}, True)
        train_steps(engine, data, 5)
        uninterrupted = digest(weights(engine)), ds_plugin.reducer_of(engine).registry.digest
    data = batches(rank)
    with engine_of(config) as engine:
        _, client_state = engine.load_checkpoint(folder)
        for _ in range(4):
            next(data)
        train_steps(engine, data, 5)
        again = digest(weights(engine)), ds_plugin.reducer_of(engine).registry.digest
    files = sorted(path.name for path in Path(folder).glob("*/qoda_rank_*.pt"))
    return {
        "same": uninterrupted == again,
        "mine": client_state.get("mine"),
        "files": files,
        "keys": list(client_state),
    }


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    two_ranks: RankPool, tmp_path: Path, stage: int, optimizer: str
) -> None:
    for found in two_ranks.run(resumed, str(tmp_path), stage, "fp32" if stage % 2 else "bf16", optimizer):
        assert found["same"]
        assert found["mine"] == 7
        assert "qoda" not in found["keys"]
        private = [] if optimizer == "QODAdam" else ["qoda_rank_00000.pt", "qoda_rank_00001.pt"]
        assert found["files"] == private
    shown = describe(tmp_path)
    assert "import ds_plugin" in shown
    assert ("files of single ranks: 2, all there" in shown) == bool(private)
    assert "is known to DeepSpeed only after" in shown
    for name in private[:1]:
        next(tmp_path.rglob(name)).unlink()
        with pytest.raises(ConfigError, match="lacks qoda_rank_00000"):
            describe(tmp_path)


def mixed(folder: str) -> dict[str, Any]:
    """A checkpoint of one configuration under others."""
    heard = Warnings()
    logging.getLogger("ds_plugin").addHandler(heard)
    rank = torch.distributed.get_rank()
    results: dict[str, Any] = {}
    with engine_of(configuration(2, "fp32", QODA)) as engine:
        train_steps(engine, batches(rank), 4)
        engine.save_checkpoint(f"{folder}/compressed")
    with engine_of(configuration(2, "fp32")) as engine:
        path, client_state = engine.load_checkpoint(f"{folder}/compressed")
        results["without the block"] = path is not None and "qoda" in client_state
        results["its warning"] = heard.messages.pop()
        train_steps(engine, batches(rank), 1)
        engine.save_checkpoint(f"{folder}/plain")
    with engine_of(configuration(2, "fp32", QODA)) as engine:
        engine.load_checkpoint(f"{folder}/plain")
        train_steps(engine, batches(rank), 1)
        results["of a run without"] = (list(heard.messages), ds_plugin.reducer_of(engine).step)
        engine.load_checkpoint(f"{folder}/compressed", load_module_only=True)
        results["model only"] = ds_plugin.reducer_of(engine).step
        results["own key"] = error_of(lambda: engine.save_checkpoint(folder, client_state={"qoda": 1}))
    with engine_of(configuration(2, "fp32", {**QODA, "bits": 4})) as engine:
        results["other bits"] = error_of(lambda: engine.load_checkpoint(f"{folder}/compressed"))
    logging.getLogger("ds_plugin").removeHandler(heard)
    return results


def test_checkpoints_of_another_configuration(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(mixed, str(tmp_path)):
        assert found["without the block"]
        assert "this engine has no" in found["its warning"]
        messages, step = found["of a run without"]
        assert len(messages) == 1
        assert "without the" in messages[0]
        assert step == 1
        assert found["model only"] == 1
        assert found["own key"].startswith("ConfigError: client_state has a key 'qoda'")
        assert found["other bits"].startswith(
            "RegistryError: the saved state belongs to another model or configuration"
        )


def saved_small(folder: str) -> list[float]:
    with engine_of(configuration(0, "fp32", {"bits": 5, "min_numel": 16}), Small()) as engine:
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 64)))
            engine.step()
        engine.save_checkpoint(folder)
        return [float(parameter.detach().double().sum()) for parameter in engine.module.parameters()]


def test_deepspeed_alone_goes_on_from_the_same_weights(
    two_ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = two_ranks.run(saved_small, str(tmp_path))[0]
    program = [sys.executable, "-m", "tests.deepspeed.plain_engine", str(tmp_path), str(tmp_path / "meeting")]
    environment = {**child_environment(), "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"weights": weights, "steps": 4, "client_state": found["client_state"], "plug-in": False}
    assert "qoda" in found["client_state"]
    assert main(["check", str(tmp_path)]) == 0
    assert "Without the plug-in DeepSpeed loads it as any other" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "global_step3")]) == 0
    (tmp_path / "global_step3" / "qoda.json").unlink()
    assert main(["check", str(tmp_path)]) == 1
    assert "comes from a training without a 'qoda' block" in capsys.readouterr().err


def saved(folder: str) -> None:
    with engine_of(configuration(0, "fp32", {**QODA, "worker_norms": True})) as engine:
        train_steps(engine, batches(torch.distributed.get_rank()), 4)
        engine.save_checkpoint(folder)


def loaded(folder: str) -> tuple[int, list[str]]:
    heard = Warnings()
    logging.getLogger("ds_plugin").addHandler(heard)
    with engine_of(configuration(0, "fp32", {**QODA, "worker_norms": True})) as engine:
        engine.load_checkpoint(folder)
        train_steps(engine, batches(torch.distributed.get_rank()), 1)
        return ds_plugin.reducer_of(engine).step, heard.messages


def test_another_number_of_ranks(two_ranks: RankPool, four_ranks: RankPool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        two_ranks.run(saved, folder)
        for step, messages in four_ranks.run(loaded, folder):
            assert step == 5
            assert any("saved by 2 ranks, and now there are 4" in message for message in messages)
