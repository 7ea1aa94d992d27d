"""`hvd-qoda report`: what is recorded at updates of the levels, and the pictures drawn of it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread

from hvd_qoda import cli
from hvd_qoda.learnt import learnt_record
from hvd_qoda.sinks import JsonLinesSink, read_steps
from hvd_qoda.telemetry import (
    MAGNITUDE_EDGES,
    LayerTypeRecord,
    LearntRecord,
    StepRecord,
    Telemetry,
    TelemetryError,
    flat_metrics,
)
from qoda_kernels.codebook import Codebook
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.registry import CodebookRegistry, LayerSettings
from qoda_kernels.statistics import HistogramStatistics, TruncatedNormalStatistics

LEVELS = (0.0, 0.1, 0.4, 1.0)
NAMES = ("levels", "bits", "error", "bytes", "tails")


def pareto(gamma: float, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Values of both signs whose magnitudes have a power law beyond 1."""
    rng = np.random.default_rng(3)
    return ((1.0 + rng.pareto(gamma - 1.0, size)) * rng.choice([-1.0, 1.0], size)).astype(np.float32)


def write_run(path: Path, learns: bool = True, error: float | None = 0.05) -> None:
    shares = [1.0 / len(MAGNITUDE_EDGES)] * len(MAGNITUDE_EDGES)
    with Telemetry([JsonLinesSink(path)]) as telemetry:
        for step in range(1, 6):
            learnt = LearntRecord(tuple(shares), 3.5 + step / 10, 0.01) if learns and step in (2, 4) else None
            entry = LayerTypeRecord("convolution", 3, 1000, 4000, 400, error, LEVELS if learnt else None, learnt)
            exact = LayerTypeRecord("bias", 32, 10, 40, 40, 0.0)
            telemetry.log_exchange(step, [entry, exact], registry_version=int(step >= 2) + int(step >= 4))


@pytest.mark.parametrize("kind", [HistogramStatistics, TruncatedNormalStatistics])
def test_shares_of_normalised_magnitudes_are_counted_by_cell(
    kind: type[HistogramStatistics] | type[TruncatedNormalStatistics],
) -> None:
    values = np.random.default_rng(1).standard_normal(51_200).astype(np.float32)
    found = learnt_record(kind.gather(values, 512, "max"), Codebook.uniform(4))
    assert found is not None
    blocks = np.abs(values.reshape(-1, 512))
    norms = blocks.max(axis=1, keepdims=True)
    expected, _ = np.histogram(
        blocks / norms, bins=[*MAGNITUDE_EDGES, 1.1], weights=np.broadcast_to(norms**2, (100, 512))
    )
    tolerance = 2e-5 if kind is HistogramStatistics else 0.02  # the normal distribution has another tail
    np.testing.assert_allclose(found.shares, expected / expected.sum(), atol=tolerance)
    assert sum(found.shares) == pytest.approx(1.0, abs=1e-5)
    assert found.tail_index is not None
    assert found.clip == 0.0


def test_tail_index_and_clipped_share_are_those_of_the_gradients() -> None:
    values = pareto(4.2, 200_000)
    book = Codebook.uniform(4).with_levels(Codebook.uniform(4).levels, 1, clip=4.0)
    found = learnt_record(MagnitudeStatistics.gather(values), book)
    assert found is not None
    assert found.tail_index == pytest.approx(4.2, abs=0.1)
    assert found.shares[-1] == pytest.approx((np.abs(values) > 4.0).mean(), abs=1e-4)
    assert found.clip == 4.0


def test_a_heavier_tail_has_a_smaller_index_where_norms_are_used() -> None:
    indices = []
    for gamma in (3.5, 8.0):
        found = learnt_record(HistogramStatistics.gather(pareto(gamma, 50_000), 8192, "max"), Codebook.uniform(4))
        assert found is not None
        assert found.tail_index is not None
        indices.append(found.tail_index)
    assert indices[0] < indices[1] - 1.0


def test_statistics_without_values_are_no_record() -> None:
    assert learnt_record(HistogramStatistics.empty(), Codebook.uniform(4)) is None
    assert learnt_record(MagnitudeStatistics.empty(), Codebook.uniform(4)) is None


def test_records_keep_what_was_learnt(tmp_path: Path) -> None:
    write_run(tmp_path / "steps.jsonl")
    records = read_steps(tmp_path / "steps.jsonl")
    learnt = records[1].layer_types[0].learnt
    assert learnt == LearntRecord(tuple([1.0 / 34] * 34), 3.7, 0.01)
    assert records[0].layer_types[0].learnt is None
    assert StepRecord.from_dict(records[1].to_dict()) == records[1]
    assert flat_metrics(records[1])["qoda/convolution/tail_index"] == pytest.approx(3.7)
    assert "qoda/convolution/tail_index" not in flat_metrics(records[0])
    with pytest.raises(TelemetryError, match="33 shares"):
        LearntRecord(tuple([0.0] * 33))


def test_records_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    write_run(tmp_path / "steps.jsonl")
    values = read_steps(tmp_path / "steps.jsonl")[1].to_dict()
    for entry in values["layer_types"]:
        del entry["learnt"]
    assert StepRecord.from_dict(values).layer_types[0].learnt is None
    values = read_steps(tmp_path / "steps.jsonl")[1].to_dict()
    del values["layer_types"][0]["learnt"]["rotation"]
    assert StepRecord.from_dict(values).layer_types[0].learnt == LearntRecord(tuple([1.0 / 34] * 34), 3.7, 0.01)


def test_every_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "steps.jsonl")
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == [str(tmp_path / f"{name}.png") for name in NAMES]
    assert found["left_out"] == {}
    assert found["steps"] == 5
    for name in NAMES:
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[0] > 200
        assert float(picture[..., :3].std()) > 0.01  # something is drawn


def test_pictures_without_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "records.jsonl", learns=False, error=None)
    assert cli.main(["report", str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "no levels.png: levels were not learnt" in text
    assert "no error.png: the quantization error was not measured" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bits.png", "bytes.png"]


def test_a_run_that_chose_rotation_has_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = CodebookRegistry.build([("w", torch.zeros(51_200))], LayerSettings(4, levels="best", rounding="nearest"))
    (key,) = registry.adaptive_keys
    values = np.random.default_rng(1).standard_normal(51_200).astype(np.float32)
    statistics = HistogramStatistics.gather(values, 512, "max")
    book = registry.updated({key: statistics}).codebooks[key]
    assert book.rotation == "hadamard"  # the best for normal coordinates
    learnt = learnt_record(statistics, book)
    assert learnt is not None
    unrotated = learnt_record(statistics, Codebook.uniform(4))
    assert unrotated is not None
    assert (learnt.shares, learnt.rotation, unrotated.rotation) == (unrotated.shares, "hadamard", "none")

    with Telemetry([JsonLinesSink(tmp_path / "steps.jsonl")]) as telemetry:
        record = LayerTypeRecord(key, 4, 51_200, 204_800, 26_000, 0.01, book.levels, learnt)
        telemetry.log_exchange(1, [record], registry_version=1)
    drawn: list[float] = []
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **style: drawn.append(x))
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == {}
    assert (tmp_path / "levels.png").exists()
    assert drawn == []  # its levels are not for these coordinates
    assert read_steps(tmp_path / "steps.jsonl")[0].layer_types[0].learnt == learnt


def test_a_missing_or_empty_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "steps.jsonl does not exist" in capsys.readouterr().err
    with Telemetry([JsonLinesSink(tmp_path / "steps.jsonl")]) as telemetry:
        telemetry.log(step=1, loss=math.pi)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "no record of an exchange" in capsys.readouterr().err


def test_matplotlib_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "steps.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "hvd-qoda[report]" in capsys.readouterr().err


def test_pictures_go_to_weights_and_biases(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from tests.telemetry.offline_wandb import offline_files, read_finished_run

    write_run(tmp_path / "steps.jsonl")
    assert cli.main(["report", str(tmp_path), "--wandb", "offline"]) == 0
    (file,) = offline_files(tmp_path)
    (row,) = read_finished_run(file).history
    assert {f"qoda/report/{name}" for name in NAMES} <= set(row)
