"""The optimizers on monotone games: equal to the NumPy transcription, and as fast as the papers' rates say."""

from typing import Any

import numpy as np
import pytest

from hvd_qoda.optim import QODA, QGenX
from tests.optim import numpy_transcription
from tests.optim.games import DIMENSION, LAYER_TYPES, Oracle, Vector, bilinear_game, quantize
from tests.optim.players import Exchange, averaged, parameters_at, play, point_of

WORKERS = 4
SUMS = ("mean", "workers")
START = np.linspace(-1.0, 1.0, DIMENSION)
NOISES = {
    "quantized": {"quantized": True},
    "absolute": {"absolute_noise": 0.1, "quantized": True},
    "relative": {"relative_noise": 0.5, "quantized": True},
}
# Equal to rounding: float64 throughout, and step sizes that shrink differences rather than grow them.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}


def build(
    method: str, exchange: Exchange, sum_over: str = "mean", lr: float = 1.0, q_hat: float = 0.25
) -> QODA | QGenX:
    options = sum_options(exchange, sum_over)
    if method == "qgenx":
        return QGenX(exchange.parameters, lr, world_size=WORKERS, **options)
    return QODA(exchange.parameters, lr, rates=method, q_hat=q_hat, **options)


def sum_options(exchange: Exchange, sum_over: str) -> dict[str, Any]:
    """Options of an optimizer whose gradients are the exchange's means."""
    if sum_over == "mean":
        return {"sum_over": sum_over}
    return {"sum_over": sum_over, "worker_norms": exchange.worker_norms, "gradient_scale": 1.0}


def residuals(method: str, sum_over: str, oracle: Oracle, exchanges: tuple[int, ...]) -> Vector:
    """Residual of the averaged iterate after each number of exchanges."""
    exchange = Exchange(oracle, parameters_at(np.zeros(DIMENSION)))
    optimizer = build(method, exchange, sum_over)
    per_step = 2 if method == "qgenx" else 1
    found = []
    for count in exchanges:
        play(optimizer, exchange, (count - exchange.count) // per_step)
        found.append(oracle.game.residual(averaged(optimizer, exchange.parameters)))
    return np.array(found)


def slope(exchanges: tuple[int, ...], values: Vector) -> float:
    return float(np.polyfit(np.log(exchanges), np.log(values), 1)[0])


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sum_over", SUMS)
@pytest.mark.parametrize(
    ("rates", "q_hat", "lr"), [("equal", 0.25, 1.0), ("separated", 0.25, 0.7), ("separated", 0.1, 1.5)]
)
def test_qoda_equals_transcription(rates: str, q_hat: float, lr: float, sum_over: str, noise: str) -> None:
    steps = 150
    oracle = Oracle(bilinear_game(1, quadratic=0.05), WORKERS, seed=3, **NOISES[noise])
    expected = numpy_transcription.qoda(oracle, START, steps, lr=lr, rates=rates, sum_over=sum_over, q_hat=q_hat)

    exchange = Exchange(oracle, parameters_at(START))
    optimizer = build(rates, exchange, sum_over, lr, q_hat)
    points = play(optimizer, exchange, steps)

    np.testing.assert_allclose(points, expected.half, **TOLERANCE)
    np.testing.assert_allclose(point_of(exchange.parameters), expected.next_half, **TOLERANCE)
    np.testing.assert_allclose(averaged(optimizer, exchange.parameters), expected.average, **TOLERANCE)
    assert optimizer.step_sizes() == pytest.approx({"gamma": expected.gamma[-1], "eta": expected.eta[-1]}, rel=1e-12)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sum_over", SUMS)
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_qgenx_equals_transcription(lr: float, sum_over: str, noise: str) -> None:
    steps = 75
    oracle = Oracle(bilinear_game(1, quadratic=0.05), WORKERS, seed=3, **NOISES[noise])
    expected = numpy_transcription.qgenx(oracle, START, steps, lr=lr, sum_over=sum_over)

    exchange = Exchange(oracle, parameters_at(START))
    optimizer = build("qgenx", exchange, sum_over, lr)
    points = play(optimizer, exchange, steps)

    np.testing.assert_allclose(points, expected.half, **TOLERANCE)
    np.testing.assert_allclose(point_of(exchange.parameters), expected.whole[-1], **TOLERANCE)
    np.testing.assert_allclose(averaged(optimizer, exchange.parameters), expected.average, **TOLERANCE)
    assert optimizer.step_sizes() == pytest.approx({"gamma": expected.gamma[-1], "eta": expected.eta[-1]}, rel=1e-12)


@pytest.mark.parametrize("method", ["equal", "separated", "qgenx"])
def test_sum_over_workers_and_mean_are_equal_for_one_worker(method: str) -> None:
    oracle = Oracle(bilinear_game(1, quadratic=0.05), workers=1, absolute_noise=0.1)
    ends = []
    for sum_over in SUMS:
        exchange = Exchange(oracle, parameters_at(START))
        options = sum_options(exchange, sum_over)
        if method == "qgenx":
            optimizer = QGenX(exchange.parameters, **options)
        else:
            optimizer = QODA(exchange.parameters, rates=method, **options)
        play(optimizer, exchange, 50)
        ends.append(point_of(exchange.parameters))
    np.testing.assert_allclose(ends[0], ends[1], **TOLERANCE)


@pytest.mark.parametrize("method", ["equal", "separated", "qgenx"])
def test_gradient_scale_matches_worker_norms_to_a_summed_gradient(method: str) -> None:
    """op=Sum: the gradient is K times the mean, the reported norms stay raw."""
    oracle = Oracle(bilinear_game(1, quadratic=0.05), WORKERS, absolute_noise=0.1)

    def scaled_oracle(point: Vector, exchange: int) -> Vector:
        return WORKERS * oracle(point, exchange)

    reference = Exchange(scaled_oracle, parameters_at(START))
    play(build(method, reference, "workers"), reference, 50)

    summed = Exchange(scaled_oracle, parameters_at(START))

    def raw_norms() -> object:
        norms = summed.worker_norms()
        return type(norms)(norms.squared_norms / WORKERS**2, norms.squared_changes / WORKERS**2, WORKERS)

    options = {"sum_over": "workers", "worker_norms": raw_norms, "gradient_scale": float(WORKERS)}
    if method == "qgenx":
        optimizer = QGenX(summed.parameters, world_size=WORKERS, **options)
    else:
        optimizer = QODA(summed.parameters, rates=method, **options)
    play(optimizer, summed, 50)
    np.testing.assert_allclose(point_of(summed.parameters), point_of(reference.parameters), **TOLERANCE)


# Merely monotone (no quadratic term), so that the rates are those of the theorems and the residual is the gap.
@pytest.mark.parametrize("sum_over", SUMS)
@pytest.mark.parametrize("method", ["equal", "separated", "qgenx"])
@pytest.mark.parametrize("noise", ["quantized", "relative"])
def test_gap_falls_as_one_over_t_under_relative_noise(noise: str, method: str, sum_over: str) -> None:
    exchanges = (200, 400, 800)
    oracle = Oracle(bilinear_game(0, quadratic=0.0), WORKERS, **NOISES[noise])
    assert slope(exchanges, residuals(method, sum_over, oracle, exchanges)) < -0.85


@pytest.mark.parametrize("sum_over", SUMS)
@pytest.mark.parametrize("method", ["equal", "separated", "qgenx"])
def test_gap_falls_as_one_over_root_t_under_absolute_noise(method: str, sum_over: str) -> None:
    exchanges = (200, 400, 800)
    oracle = Oracle(bilinear_game(0, quadratic=0.0), WORKERS, **NOISES["absolute"])
    found = slope(exchanges, residuals(method, sum_over, oracle, exchanges))
    assert found < -0.45
    if method == "equal":
        assert found > -0.8  # the noise is felt: this is not the rate of relative noise


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("sum_over", SUMS)
def test_qoda_needs_no_more_exchanges_than_qgenx(sum_over: str, noise: str) -> None:
    oracle = Oracle(bilinear_game(0, quadratic=0.05), WORKERS, **NOISES[noise])
    qoda, qgenx = (residuals(method, sum_over, oracle, (1000,))[0] for method in ("equal", "qgenx"))
    assert qoda < qgenx < 0.2 * oracle.game.residual(np.zeros(DIMENSION))


def test_the_quantizer_of_the_games_is_unbiased_and_layer_wise() -> None:
    generator = np.random.default_rng(0)
    vector = generator.standard_normal(DIMENSION)
    samples = np.stack([quantize(vector, generator.random(DIMENSION)) for _ in range(4000)])
    deviation = np.abs(samples.mean(axis=0) - vector)
    assert np.all(deviation <= 5 * samples.std(axis=0) / np.sqrt(len(samples)) + 1e-12)
    for coordinates, intervals in LAYER_TYPES:
        steps = np.abs(samples[:, coordinates]) / np.abs(vector[coordinates]).max() * intervals
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
