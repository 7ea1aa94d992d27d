"""The programs that compare quantizers, on little data: their rivals' formulas, their rows, and their refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("horovod.torch")

from launch.bench import (
    biased_games,
    layer_wise,
    planned_bits,
    quantizers,
    record_gradients,
    rival_quantizers,
    tail_sensitivity,
)
from launch.train import heavy_tails
from tests.kernels.codebooks import round_trip

GAUSSIAN = np.random.default_rng(0).standard_normal(16_384).astype(np.float32)


def error(method: str, bits: int, values: np.ndarray = GAUSSIAN) -> tuple[float, float]:
    decoded, sent = rival_quantizers.RIVALS[method][0](values, bits, np.random.default_rng(1))
    assert decoded.shape == values.shape
    return float(((decoded - values) ** 2).sum() / (values**2).sum()), sent / values.size


def test_eden_reaches_lloyd_max_whatever_the_distribution() -> None:
    """Lloyd-Max errors of the normal distribution (Max, 1960): .1175, .03454, .009497 at 2, 3, 4 bits."""
    heavy = np.random.default_rng(2).standard_t(3, 16_384).astype(np.float32)
    for bits, lloyd_max in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        for values in (GAUSSIAN, heavy):
            found, sent = error("EDEN", bits, values)
            # The scale that makes it unbiased costs a factor 1 / (1 - error).
            assert found == pytest.approx(lloyd_max / (1 - lloyd_max), rel=0.06)
            assert sent == bits + 32 / 512


def test_hadamard_is_its_own_inverse() -> None:
    rows = GAUSSIAN.reshape(-1, 512)
    np.testing.assert_allclose(rival_quantizers.hadamard(rival_quantizers.hadamard(rows)), rows, atol=1e-5)


@pytest.mark.parametrize("method", ["min-max (torch_cgx)", "MXFP4, stochastic", "NVFP4, stochastic"])
def test_stochastic_rivals_are_unbiased(method: str) -> None:
    values = GAUSSIAN[:512]
    rng = np.random.default_rng(3)
    draws = [rival_quantizers.RIVALS[method][0](values, 4, rng)[0] for _ in range(400)]
    deviation = np.mean(draws, axis=0) - values
    assert np.abs(deviation).max() < 5 * np.std(draws, axis=0).max() / np.sqrt(400)
    assert abs(float((deviation * values).sum() / (values**2).sum())) < 0.01


def test_rows_are_complete_and_ours_are_below_qsgd(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = quantizers.synthetic("Laplace", workers=2, size=8192, seed=0)
    monkeypatch.setattr(quantizers, "BITS", (3, 4))
    rows = quantizers.measure(gradients, 0)
    rotated = {row.method for row in rows if row.method.startswith("ours-rot")}
    assert {row.method for row in quantizers.measure(gradients, 0, "ours-rot*")} == {*rotated, "Gaussian bound"}
    by = {(row.method, round(row.bits_on_wire)): row for row in rows}
    assert {row.method for row in rows} >= {"QSGD", "NUQSGD", "ALQ", "EDEN", "ours-adaptive", "ours-auto", "ours-tnq"}
    assert by["ours-adaptive", 4].normalised_error < by["QSGD", 4].normalised_error
    assert 4 + 32 / 512 <= by["ours-adaptive", 4].bits_on_wire < 4.2
    coded = rows[rows.index(by["ours-adaptive", 4]) + 1]
    assert coded.method == "ours-adaptive-coded"
    assert coded.bits_on_wire < by["ours-adaptive", 4].bits_on_wire
    assert coded.normalised_error == by["ours-adaptive", 4].normalised_error
    assert all(row.normalised_error > 0 for row in rows)
    assert "3.1 one worker" in quantizers.summary(rows)


def test_errors_are_interpolated_between_widths() -> None:
    points = [(3.0, 0.1), (5.0, 0.001)]
    assert quantizers.error_at(points, 4.0) == pytest.approx(0.01)
    assert quantizers.error_at(points, 2.9) is None
    assert quantizers.error_at([(4.5, 0.2)], 4.1) == 0.2
    assert quantizers.error_at([(4.5, 0.2)], 6.1) is None


def test_a_transformer_is_recorded_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_gradients, "MOMENTS", {"early": 2})
    monkeypatch.setattr(quantizers, "MOMENTS", ("early",))
    (tmp_path / "text").write_text("to be or not to be " * 40)
    arguments = ["--text", str(tmp_path / "text"), "--out", str(tmp_path), "--workers", "2", "--batch-size", "2"]
    assert record_gradients.main(arguments) == 0
    (gradients,) = quantizers.all_gradients(tmp_path, "text-transformer")
    assert gradients.layer_types["embedding.weight"] == "embedding"
    assert len(gradients.now) == len(gradients.before) == 2
    first, second = (gradients.now[rank]["output.weight"] for rank in range(2))
    assert np.any(first != second)
    assert np.any(gradients.before[0]["output.weight"] != first)


def test_recording_nothing_is_refused(tmp_path: Path) -> None:
    assert record_gradients.main(["--out", str(tmp_path)]) == 2


def test_heavy_tails_runs_once_and_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["--clients", "2", "--iterations", "3", "--batch-size", "4", "--runs", str(tmp_path / "runs.json")]
    methods = ["fp32", "NQSGD", "ours-tnq-feedback", "ours-least-squares-feedback"]
    few += ["--methods", *methods, "--json", str(tmp_path / "table.json")]
    monkeypatch.setattr(heavy_tails, "SmallAlexNet", _Tiny)
    assert heavy_tails.main(few) == 0
    monkeypatch.setattr(heavy_tails, "train", None)  # not called again
    assert heavy_tails.main(few) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in rows] == methods
    assert rows[1]["bits"] == 3
    assert 3.0 < rows[1]["bits_on_wire"] < 3.3
    assert heavy_tails.main([*few, "--lr", "0.5"]) == 2


def test_planned_bits_are_compared_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {("fp32", 3): 2.0, ("fp32", 4): 3.0, ("5 bits", 3): 2.1, ("5 bits", 4): 2.9}

    def train(method: str, seed: int, options: object) -> dict[str, object]:
        sent = None if method == "fp32" else 100.0
        loss = losses.pop((method, seed))  # each once
        fields = {"train_loss": loss, "test_loss": loss, "bytes_per_step": sent, "bytes_of_the_last_step": sent}
        return {"method": method, "seed": seed, **fields}

    monkeypatch.setattr(planned_bits, "train", train)
    few = ["--seed", "3", "--seeds", "2", "--methods", "fp32", "5 bits", "--json", str(tmp_path / "bits.json")]
    assert planned_bits.main(few) == 0
    assert planned_bits.main(few) == 0
    exact, quantized = json.loads((tmp_path / "bits.json").read_text())["rows"]
    assert exact["test_loss"] == pytest.approx([2.5, 0.5])
    assert quantized["test_loss_minus_fp32"] == pytest.approx([0.0, 0.1])
    assert quantized["bytes_per_step_of_equal_bits"] == 1.0
    assert planned_bits.main([*few, "--steps", "9"]) == 2


def test_least_squares_scale_takes_error_from_unbiased_values() -> None:
    (book,) = heavy_tails.CodebookRegistry.build(
        [("w", heavy_tails.torch.zeros(GAUSSIAN.size))],
        heavy_tails.LayerSettings(2, rotation="hadamard", rounding="nearest"),
    ).codebooks.values()
    found = round_trip(GAUSSIAN, book)
    scaled = heavy_tails._least_squares_scale(book) * found
    power = float((GAUSSIAN**2).sum())
    unbiased, biased = (float(((values - GAUSSIAN) ** 2).sum()) / power for values in (found, scaled))
    assert biased == pytest.approx(unbiased / (1 + unbiased), rel=0.01)


def test_layers_of_unlike_scale_gain_from_codebooks_and_bits_of_their_own() -> None:
    rng = np.random.default_rng(0)
    steps = [
        tuple(
            {
                "normal": rng.standard_normal(4096).astype(np.float32),
                "heavy": (0.01 * rng.standard_t(2, 4096)).astype(np.float32),
            }
            for _ in range(2)
        )
        for _ in range(2)
    ]
    types = {"normal": "attention", "heavy": "feed_forward"}
    row = layer_wise.measure(quantizers.Gradients("made, early", types, steps[0], steps[1]), 4, 0)
    assert (row.layers, row.layer_types, row.bits) == (2, 2, 4)
    assert row.types == row.layers_error  # each type is one layer
    assert row.types <= 1.01 * row.one
    assert row.auto < 0.7 * row.types
    assert "made" in layer_wise.summary([row])


def test_a_wrong_gamma_costs_more_than_the_fitted_one_and_the_best_alpha_less() -> None:
    gradients = quantizers.synthetic("Student t3", workers=2, size=40_000, seed=0)
    rows = list(tail_sensitivity.rows(gradients, 3))
    error = {(row.scheme, row.optimum, row.variant): row.error for row in rows}
    assert error["tuq", "best alpha", "fitted"] <= error["tuq", "expected", "fitted"]
    assert error["tuq", "expected", "gamma x 2"] > 1.05 * error["tuq", "expected", "fitted"]
    assert error["tnq", "expected", "fitted"] < error["tuq", "expected", "fitted"]
    assert "Kolmogorov" in tail_sensitivity.summary(rows)


def test_games_are_solved_by_exact_vectors_and_need_feedback_for_top_k(tmp_path: Path) -> None:
    game = biased_games.Game.make(0, 0.05, workers=3)
    np.testing.assert_allclose(game.shifts.sum(axis=0), 0.0, atol=1e-12)
    exact = biased_games.play(game, "none", "exact", 200, 0, 4.0)
    assert exact[0] < 0.2
    assert exact[0] < biased_games.play(game, "none", "top-k", 200, 0, 4.0)[0]
    path = tmp_path / "games.json"
    few = ["--steps", "2", "--seed", "1", "--lr", "1", "--methods", "tnq + feedback", "adaptive", "--json", str(path)]
    assert biased_games.main(few) == 0
    assert len(json.loads(path.read_text())["rows"]) == 2 * 3 * 2


def test_feedback_sends_later_what_was_left_out() -> None:
    messages = biased_games.Messages("top-k + feedback", workers=1, seed=0)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 1, biased_games.DIMENSION))
    sent = sum(messages.exchange(vector, step) for step, vector in enumerate(vectors))
    left = messages._residuals
    np.testing.assert_allclose(sent + left, vectors.sum(axis=0), atol=1e-12)


class _Tiny(heavy_tails.nn.Sequential):
    """16 x 16 pixels."""

    def __init__(self) -> None:
        nn = heavy_tails.nn
        super().__init__(nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 10))
