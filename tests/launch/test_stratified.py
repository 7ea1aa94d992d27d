"""The program that compares stratified with independent dither, on gradients whose relation is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.bench.stratified import main


def test_error_of_the_mean_falls_as_the_theory_says_and_without_bias(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    layers = {"layer_types": np.array("{}")}
    for moment, related in (("early", False), ("late", True)):
        common = generator.normal(size=20_000).astype(np.float32)
        for worker in range(4):
            own = common if related else generator.normal(size=20_000).astype(np.float32)
            for shift in (-1, 0):
                layers[f"{moment}/{shift}/{worker}/weight"] = own
    np.savez(tmp_path / "network.npz", **layers)  # type: ignore[arg-type]  # names are the keys
    assert main(["--gradients", str(tmp_path), "--draws", "10", "--json", str(tmp_path / "rows.json")]) == 0
    unrelated, equal = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert unrelated["ratio"] == pytest.approx(0.5 + 0.5 / 16, rel=0.1)
    assert equal["ratio"] == pytest.approx(1 / 4, rel=0.1)
    assert unrelated["bias_ratio"] == pytest.approx(1.0, abs=0.15)
    assert len(set(unrelated["message_bytes"].values())) == 1


def test_a_folder_without_recordings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gradients", str(tmp_path)]) == 2
    assert "there is no .npz file" in capsys.readouterr().err
