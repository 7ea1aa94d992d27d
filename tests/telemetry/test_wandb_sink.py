from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hvd_qoda
from hvd_qoda.sinks.weights_and_biases import WandbSink
from hvd_qoda.telemetry import StepRecord, Telemetry, TelemetryError, TelemetryWarning, flat_metrics
from tests.telemetry.offline_wandb import OfflineRun, offline_files, read_finished_run
from tests.telemetry.records import CODEBOOKS, LEVELS, bias, convolution

LATER_LEVELS = (0.0, 0.0625, 0.25, 1.0)


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B says nothing, reports nothing, and keeps its own files out of the home folder."""
    folder = tmp_path_factory.mktemp("wandb-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        for name in ("WANDB_SILENT", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
            patch.setenv(name, "true")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_CONSOLE", "off")
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(folder))
        yield


def log_three_steps(telemetry: Telemetry) -> list[StepRecord]:
    telemetry.start({"qoda": {"bits": 3, "layers": [{"type": "bias", "bits": 32}]}}, CODEBOOKS)
    records = [
        StepRecord(10, (convolution(LEVELS), bias()), 0, {"gamma": 0.5}, {"loss": 2.0}),
        StepRecord(11, (convolution(relative_error=0.125), bias()), 0, {"gamma": 0.25}, {"loss": math.nan}),
        StepRecord(12, (convolution(LATER_LEVELS), bias()), 1, {"gamma": 0.125}, {"loss": 1.0, "accuracy": 0.5}),
    ]
    for record in records:
        telemetry.log_exchange(record.step, record.layer_types, record.registry_version)
        telemetry.log(step_sizes=record.step_sizes, **record.scalars)
    return records


def the_run(directory: Path) -> OfflineRun:
    (path,) = offline_files(directory)
    return read_finished_run(path)


def table(directory: Path, entry: dict[str, Any]) -> list[list[Any]]:
    (path,) = directory.glob(f"wandb/offline-run-*/files/{entry['path']}")
    return json.loads(path.read_text())["data"]


def test_an_offline_run_holds_everything(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    sink = WandbSink("offline", project="tests", directory=folder, name="a run")
    with Telemetry([sink], config={"batch": 32}, on_error="raise") as telemetry:
        records = log_three_steps(telemetry)

    run = the_run(folder)
    assert (run.project, run.exit_code) == ("tests", 0)
    assert run.config["batch"] == 32
    assert run.config["qoda"] == {"bits": 3, "layers": [{"type": "bias", "bits": 32}]}
    assert run.config["codebooks"] == CODEBOOKS
    assert run.config_updates == 1, "configuration and code tables are logged once"

    assert [row["_step"] for row in run.history] == [10, 11, 12]
    for record in records:
        row = run.row(record.step)
        for name, value in flat_metrics(record).items():
            assert row[name] == pytest.approx(value, nan_ok=True), name

    assert "qoda/levels" not in run.row(11)
    assert "qoda/convolution/levels" not in run.row(11)
    for step, version, levels in ((10, 0, LEVELS), (12, 1, LATER_LEVELS)):
        rows = [["convolution", 3, version, index, level] for index, level in enumerate(levels)]
        assert table(folder, run.row(step)["qoda/levels"]) == rows
        histogram = run.row(step)["qoda/convolution/levels"]
        assert histogram["_type"] == "histogram"
        assert sum(histogram["values"]) == len(levels)


def test_a_long_run_is_read_back(tmp_path: Path) -> None:
    """Several blocks of the log, and records that cross them."""
    with Telemetry([WandbSink("offline", directory=tmp_path)], on_error="raise") as telemetry:
        for step in range(200):
            telemetry.log_exchange(step, [convolution(sent_bytes=step), bias()], 0)
            telemetry.log(loss=step / 8)
    run = the_run(tmp_path)
    assert offline_files(tmp_path)[0].stat().st_size > 2 * 32 * 1024
    assert [(row["_step"], row["loss"]) for row in run.history] == [(step, step / 8) for step in range(200)]
    assert [row["qoda/convolution/bytes_sent"] for row in run.history] == list(range(200))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Telemetry([WandbSink("offline", directory=tmp_path)], rank=1) as telemetry:
        log_three_steps(telemetry)
    assert list(tmp_path.iterdir()) == []


def test_disabled_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Telemetry([WandbSink("disabled", directory=tmp_path / "folder")]) as telemetry:
        log_three_steps(telemetry)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_chooses_the_mode_where_the_program_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Telemetry([WandbSink(directory=tmp_path)]) as telemetry:
        telemetry.log(step=0, loss=1.0)
    assert the_run(tmp_path).row(0)["loss"] == 1.0


def test_a_failed_training_is_a_failed_run(tmp_path: Path) -> None:
    def training() -> None:
        with Telemetry([WandbSink("offline", directory=tmp_path)]) as telemetry:
            telemetry.log(step=0, loss=1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        training()
    run = the_run(tmp_path)
    assert run.exit_code == 1
    assert run.row(0)["loss"] == 1.0, "what was logged before the failure is kept"


def test_a_resumed_run_continues_under_its_id(tmp_path: Path) -> None:
    first = Telemetry([WandbSink("offline", directory=tmp_path / "first")])
    first.log(step=0, loss=1.0)
    first.log(step=1, loss=2.0)
    state = first.state_dict()
    first.close()
    with Telemetry([WandbSink("offline", directory=tmp_path / "second")]) as second:
        second.load_state_dict(state)
        second.log(step=2, loss=3.0)
    runs = the_run(tmp_path / "first"), the_run(tmp_path / "second")
    assert runs[0].run_id == runs[1].run_id == state["sinks"][0][1]["run_id"]
    assert [(row["_step"], row["loss"]) for row in runs[1].history] == [(1, 2.0), (2, 3.0)]


def test_online_resume_asks_for_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wandb.init is asked for; nothing goes online."""
    import wandb

    asked: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        asked.append(arguments)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(wandb, "init", init)
    resumed, named = WandbSink("online", group="g"), WandbSink("online", id="own", resume="must")
    for sink in (resumed, named):
        sink.load_state_dict({"run_id": "abc"})
        with pytest.raises(TelemetryError, match=r"WandbSink could not start: ConnectionError: no network in tests"):
            Telemetry([sink]).log(step=0)
    assert asked == [
        {"mode": "online", "project": "hvd-qoda", "group": "g", "id": "abc", "resume": "allow"},
        {"mode": "online", "project": "hvd-qoda", "id": "own", "resume": "must"},
    ]


def test_an_existing_run_is_joined_and_left_open(tmp_path: Path) -> None:
    import wandb

    with wandb.init(mode="offline", project="mine", dir=tmp_path, config={"batch": 8, "depth": 3}) as run:
        for _ in range(5):
            run.log({"before": 1.0})
        with Telemetry([WandbSink(run=run)], config={"batch": 32}, on_error="raise") as telemetry:
            log_three_steps(telemetry)
        run.log({"after": 1.0})
    logged = the_run(tmp_path)
    assert logged.config["depth"] == 3
    assert logged.config["batch"] == 32
    ours = [row for row in logged.history if "qoda_step" in row]
    assert [(row["qoda_step"], row["step_size/gamma"]) for row in ours] == [(10, 0.5), (11, 0.25), (12, 0.125)]
    assert [row["_step"] for row in logged.history] == list(range(9)), "no row is refused"


def test_an_active_run_is_not_taken_over(tmp_path: Path) -> None:
    import wandb

    with (
        wandb.init(mode="offline", project="mine", dir=tmp_path),
        pytest.raises(TelemetryError, match=r"WandbSink\(run=wandb\.run\)"),
    ):
        Telemetry([WandbSink("offline", directory=tmp_path)]).log(step=0)


def test_a_run_that_ends_under_the_sink_is_told(tmp_path: Path) -> None:
    import wandb

    run = wandb.init(mode="offline", project="mine", dir=tmp_path)
    telemetry = Telemetry([WandbSink(run=run)])
    telemetry.log(step=0, loss=1.0)
    run.finish()
    with pytest.warns(TelemetryWarning, match=r"WandbSink could not write step 0: UsageError"):
        telemetry.flush()


def test_mode_is_checked() -> None:
    with pytest.raises(TelemetryError, match=r"'of-line', expected one of online, offline, disabled"):
        WandbSink("of-line")


def test_start_comes_first() -> None:
    with pytest.raises(TelemetryError, match=r"start\(\) comes before write\(\)"):
        WandbSink("offline").write(StepRecord(0))


WITHOUT_TRACKERS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("wandb", "horovod", "deepspeed", "tensorboard"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import hvd_qoda.telemetry, hvd_qoda.sinks
from hvd_qoda.sinks import ConsoleSink, JsonLinesSink, WandbSink
from hvd_qoda.telemetry import Telemetry, TelemetryError

with Telemetry([WandbSink("disabled"), ConsoleSink(), JsonLinesSink(sys.argv[1])]) as telemetry:
    telemetry.log(step=0, loss=1.0)
Telemetry([WandbSink("offline")], rank=1).log(step=0)
try:
    Telemetry([WandbSink("offline")]).log(step=0)
except TelemetryError as error:
    print(error)
"""


def test_wandb_is_needed_only_where_it_is_used(tmp_path: Path) -> None:
    root = Path(hvd_qoda.__file__).parents[1]
    search = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRACKERS, str(tmp_path / "run.jsonl")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert result.returncode == 0, result.stderr
    assert "WandbSink needs the package wandb: pip install 'hvd-qoda[wandb]'" in result.stdout
