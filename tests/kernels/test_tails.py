"""Clipped codebooks: closed forms against quadrature and brute-force minimisation, and fits against known densities."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from qoda_kernels.elementary import exponential, logarithm, power
from qoda_kernels.errors import CodebookError, WireError
from qoda_kernels.levels import check_levels, minimum_variance_levels, quantization_variance
from qoda_kernels.magnitudes import EDGES, MagnitudeStatistics
from qoda_kernels.tails import (
    OPTIMA,
    SMALLEST_GAMMA,
    TAIL_SCHEMES,
    Laplace,
    PowerLaw,
    Scheme,
    TailModel,
    TailSettings,
    fit_tail,
    learnt_truncation,
    truncation,
)

POWER_LAWS = [PowerLaw(4.0, 1.0, 0.1), PowerLaw(3.3, 0.02, 0.03), PowerLaw(6.0, 5e-4, 0.2)]
MODELS: list[TailModel] = [*POWER_LAWS, Laplace(0.7)]


def density(model: TailModel, g: float) -> float:
    if isinstance(model, Laplace):
        return math.exp(-abs(g) / model.b) / (2 * model.b)
    assert isinstance(model, PowerLaw)
    if abs(g) <= model.gmin:
        return (1 - 2 * model.rho) / (2 * model.gmin)
    return model.rho * (model.gamma - 1) * model.gmin ** (model.gamma - 1) * abs(g) ** -model.gamma


def integral(function, low: float, high: float, model: TailModel) -> float:  # type: ignore[no-untyped-def]
    """Quadrature, cut at the model's kink and at every decade beyond it."""
    inner = [model.scale * 10.0**k for k in range(6) if low < model.scale * 10.0**k < high]
    return math.fsum(quad(function, a, b, limit=200)[0] for a, b in itertools.pairwise([low, *inner, high]))


def test_elementary_functions_equal_the_librarys() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.lognormal(0, 20, 5000), [1.0, 2.0, 0.5, 1 + 2**-40]])
    np.testing.assert_allclose(logarithm(x), np.log(x), rtol=2e-15, atol=1e-15)
    y = rng.uniform(-600, 600, 5000)
    np.testing.assert_allclose(exponential(y), np.exp(y), rtol=5e-16)
    np.testing.assert_allclose(power(x[:100], -0.3), x[:100] ** -0.3, rtol=1e-14)
    assert power(0.0, 0.5) == 0.0
    assert logarithm(0.0) == -math.inf
    assert exponential(-800.0) == 0.0


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_the_models_functions_are_the_integrals(model: TailModel) -> None:
    far = model.scale * 1e5
    for alpha in (0.4 * model.scale, model.scale, 2.7 * model.scale, 19.0 * model.scale):
        whole = 2 * integral(lambda g: density(model, g), 0, alpha, model)
        assert model.inside(alpha) == pytest.approx(whole, rel=1e-7)
        clipped = 2 * integral(lambda g, a=alpha: (g - a) ** 2 * density(model, g), alpha, far, model)
        if isinstance(model, PowerLaw):  # what lies beyond the quadrature's end
            g = model.gamma
            clipped += 2 * model.rho * (g - 1) * model.gmin ** (g - 1) * far ** (3 - g) / (g - 3)
        assert model.clipping_error(alpha) == pytest.approx(clipped, rel=1e-3)
        spread = 2 * integral(lambda g: density(model, g) ** (1 / 3), 0, alpha, model)
        assert model.spread(alpha) == pytest.approx(spread, rel=1e-7)
        assert model.spread_inverse(model.spread(alpha)) == pytest.approx(alpha, rel=1e-9)


def brute_force_alpha(model: TailModel, scheme: str, squared_intervals: float) -> float:
    """The alpha of least error, by library functions alone."""

    def cut_error(alpha: float, k: float) -> float:
        inner = float(model.inside(k * alpha))
        outer = float(model.inside(alpha)) - inner
        return ((inner * k**2) ** (1 / 3) + (outer * (1 - k) ** 2) ** (1 / 3)) ** 3 * alpha**2

    def error(log_alpha: float) -> float:
        alpha = math.exp(log_alpha)
        if scheme == "tuq":
            rounding = float(model.inside(alpha)) * alpha**2
        elif scheme == "tbq":
            rounding = min(cut_error(alpha, k) for k in np.geomspace(0.01, 0.99, 60))
            rounding = minimize_scalar(lambda k: cut_error(alpha, k), bounds=(0.005, 0.995), method="bounded").fun
        else:
            rounding = float(model.spread(alpha)) ** 3 / 4
        return rounding / squared_intervals + float(model.clipping_error(alpha))

    low = math.log(model.scale)
    found = minimize_scalar(error, bounds=(low, low + 8), method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)


@pytest.mark.parametrize("model", [POWER_LAWS[0], Laplace(0.7)], ids=str)
@pytest.mark.parametrize("scheme", ["tuq", "tnq", "tbq"])
@pytest.mark.parametrize("optimum", ["bound", "expected"])
def test_alpha_is_where_brute_force_finds_the_least_error(model: TailModel, scheme: str, optimum: str) -> None:
    for bits in (3, 5):
        found = truncation(model, scheme, bits, optimum)
        squared = (2**bits - 2) ** 2 * (1.5 if optimum == "expected" else 1.0)
        assert found.clip == pytest.approx(brute_force_alpha(model, scheme, squared), rel=2e-3)
        assert not found.is_clamped
        check_levels(found.levels, bits)


def test_numbers_of_the_papers_formulas() -> None:
    # gamma 4, rho .1, the papers' s = 7: TUQ 1.72 by the fixed point, 1.69 exactly; expected 1.96 and 1.94.
    for s2, by_fixed_point, exact in ((49.0, 1.7213, 1.6869), (73.5, 1.9618, 1.9354)):
        assert (2 * 0.1 * (s2 / 2 + 1)) ** (1 / 3) == pytest.approx(by_fixed_point, abs=1e-4)
        assert (0.1 * (s2 - 1)) ** (1 / 3) == pytest.approx(exact, abs=1e-4)
    assert brute_force_alpha(POWER_LAWS[0], "tuq", 49) == pytest.approx(1.6869, abs=1e-3)
    assert brute_force_alpha(POWER_LAWS[0], "tnq", 49) == pytest.approx(2.2001, abs=1e-3)
    assert brute_force_alpha(POWER_LAWS[0], "tnq", 73.5) == pytest.approx(2.9150, abs=1e-3)
    # Laplace, s = 3, 7, 15.
    for s, alpha in ((3, 1.791), (7, 3.199), (15, 4.877)):
        assert 3 * math.log(1 + math.sqrt(6) * s / 9) == pytest.approx(alpha, abs=1e-3)


def test_closed_forms_with_our_number_of_intervals() -> None:
    model = PowerLaw(4.0, 1.0, 0.1)
    s = 2**4 - 2
    assert truncation(model, "tuq", 4, "fixed_point").clip == pytest.approx((0.2 * (s**2 / 2 + 1)) ** (1 / 3))
    assert truncation(model, "tuq", 4, "bound").clip == pytest.approx((0.1 * (s**2 - 1)) ** (1 / 3))
    for optimum, alpha in (("bound", math.log(1 + math.sqrt(6) * s / 9)), ("expected", math.log(1 + s / 3))):
        assert truncation(Laplace(0.5), "laplace", 4, optimum).clip == pytest.approx(1.5 * alpha, rel=1e-6)
    fixed = truncation(model, "tnq", 4, "fixed_point").clip
    share = float(model.spread(fixed)) ** 3 / (4 * fixed**2)
    assert fixed == pytest.approx((2 * 0.1 * s**2 / (2 * share)) ** (1 / 3), rel=1e-9)


def test_nonuniform_points_have_the_density_of_the_cube_root() -> None:
    model = PowerLaw(4.0, 1.0, 0.1)
    found = truncation(model, "tnq", 5, "bound")
    for j in range(15):
        low, high = (found.clip * float(level) for level in found.levels[j : j + 2])
        share = integral(lambda g: density(model, g) ** (1 / 3), low, high, model)
        assert share * 2 * 15 == pytest.approx(float(model.spread(found.clip)), rel=1e-5)


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_order_of_the_schemes_errors(model: TailModel) -> None:
    for bits in (3, 6):
        uniform, two_scales, nonuniform = (truncation(model, s, bits).error for s in ("tuq", "tbq", "tnq"))
        assert nonuniform < two_scales < uniform


def test_two_scale_levels_have_two_spacings() -> None:
    gaps = np.diff(truncation(PowerLaw(4.0, 1.0, 0.1), "tbq", 5).levels.astype(np.float64))
    assert np.unique(np.round(gaps, 4)).size == 2
    assert np.all(np.diff(gaps) > -1e-6)


def test_a_given_clip_value_is_taken() -> None:
    model = PowerLaw(4.0, 1.0, 0.1)
    chosen = truncation(model, "tnq", 4)
    assert np.array_equal(truncation(model, "tnq", 4, clip=chosen.clip).levels, chosen.levels)
    wider = truncation(model, "tnq", 4, clip=3 * chosen.clip)
    assert wider.clip == 3 * chosen.clip
    assert wider.error > chosen.error
    with pytest.raises(CodebookError, match="positive"):
        truncation(model, "tnq", 4, clip=0.0)


def test_more_workers_clip_less_and_small_tails_are_clamped() -> None:
    model = PowerLaw(4.0, 1.0, 0.1)
    assert truncation(model, "tuq", 3, workers=8).clip > truncation(model, "tuq", 3).clip
    clamped = truncation(PowerLaw(4.0, 1.0, 0.001), "tuq", 2)
    assert clamped.clip == 1.0
    assert clamped.is_clamped


def power_law_sample(gamma: float, count: int, seed: int, negative_gamma: float | None = None) -> np.ndarray:
    """80 % uniform in [-1, 1], the rest in power-law tails beyond 1."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], count)
    exponent = np.where(sign < 0, negative_gamma or gamma, gamma)
    beyond = (1.0 - rng.random(count)) ** (-1.0 / (exponent - 1.0))
    return (sign * np.where(rng.random(count) < 0.8, rng.random(count), beyond)).astype(np.float32)


def test_maximum_likelihood_on_the_grid_equals_that_of_the_sample() -> None:
    values = power_law_sample(4.2, 200_000, 0)
    for rule in ("quantile", "kolmogorov_smirnov"):
        fit = fit_tail(MagnitudeStatistics.gather(values), rule)
        law = fit.power_law
        assert law is not None
        assert fit.is_heavy
        assert not fit.is_clamped
        assert law.gamma == pytest.approx(4.2, abs=0.05)
        tail = np.abs(values[np.abs(values) >= np.float32(law.gmin)]).astype(np.float64)
        assert fit.tail_values == tail.size
        assert law.gamma == pytest.approx(1 + tail.size / np.log(tail / law.gmin).sum(), abs=1e-4)
        assert law.rho == pytest.approx(tail.size / 2 / values.size)
        assert fit.distance < 0.01


def test_kolmogorov_smirnov_finds_where_the_tail_begins() -> None:
    law = fit_tail(MagnitudeStatistics.gather(power_law_sample(4.2, 200_000, 1)), "kolmogorov_smirnov").power_law
    assert law is not None
    assert 1.0 <= law.gmin <= 2.0


def test_both_sides_are_fitted_apart() -> None:
    fit = fit_tail(MagnitudeStatistics.gather(power_law_sample(4.0, 200_000, 2, negative_gamma=7.0)))
    assert fit.gamma_positive == pytest.approx(4.0, abs=0.1)
    assert fit.gamma_negative == pytest.approx(7.0, abs=0.3)
    assert fit.gamma_positive < fit.gamma < fit.gamma_negative


def test_light_tails_fall_back_to_laplace_and_say_so() -> None:
    rng = np.random.default_rng(3)
    for values in (rng.normal(size=50_000), rng.laplace(size=50_000), rng.uniform(-1, 1, 50_000)):
        statistics = MagnitudeStatistics.gather(values.astype(np.float32))
        fit = fit_tail(statistics)
        assert not fit.is_heavy
        assert isinstance(fit.model, Laplace)
        assert fit.model.b == pytest.approx(np.abs(values).mean(), rel=1e-6)
        found, _ = learnt_truncation(statistics, "tuq", 4)
        assert found.clip <= 1.1 * np.abs(values).max()
    heavy = fit_tail(MagnitudeStatistics.gather(rng.standard_t(2.5, 50_000).astype(np.float32)))
    assert heavy.is_heavy
    assert isinstance(heavy.model, PowerLaw)


def test_an_exponent_of_three_or_less_is_raised_and_reported() -> None:
    fit = fit_tail(MagnitudeStatistics.gather(power_law_sample(2.5, 50_000, 4)))
    assert fit.is_clamped
    assert fit.power_law is not None
    assert fit.power_law.gamma == SMALLEST_GAMMA


def test_zeros_do_not_count_and_few_values_give_no_power_law() -> None:
    values = power_law_sample(4.2, 100_000, 5)
    dense, sparse = (
        fit_tail(MagnitudeStatistics.gather(v)) for v in (values, np.append(values, np.zeros(10**6, "f4")))
    )
    assert dense == sparse
    tiny = fit_tail(MagnitudeStatistics.gather(np.array([1.0, -2.0, 0.5], dtype=np.float32)))
    assert tiny.power_law is None
    assert not tiny.is_heavy
    with pytest.raises(CodebookError, match="without values"):
        fit_tail(MagnitudeStatistics.empty())


def test_merged_statistics_are_those_of_everything_together() -> None:
    values = power_law_sample(3.5, 30_000, 6)
    values[::7] = 0.0
    values[11], values[12], values[13], values[14] = np.nan, np.inf, 1e-40, 1e30
    whole = MagnitudeStatistics.gather(values)
    parts = [MagnitudeStatistics.gather(part) for part in np.array_split(values, 5)]
    merged = MagnitudeStatistics.merge_in_order(parts)
    np.testing.assert_allclose(merged.to_array(), whole.to_array(), rtol=1e-12)
    assert merged.skipped == 2
    assert merged.zeros == np.count_nonzero(values == 0)
    back = MagnitudeStatistics.from_array(merged.to_array())
    assert np.array_equal(back.to_array(), merged.to_array())
    with pytest.raises(WireError):
        MagnitudeStatistics.from_array(np.full(MagnitudeStatistics.array_length, -1.0))


def test_cells_are_where_the_edges_say() -> None:
    values = np.array(
        [EDGES[500], np.nextafter(np.float32(EDGES[500]), np.float32(0)), -EDGES[0], 2.0**30], dtype=np.float32
    )
    cells = MagnitudeStatistics.gather(values).cells
    assert cells[0, 501, 0] == 1
    assert cells[1, 1, 0] == 1
    assert cells[0, -1, 0] == 1
    assert cells[0, 500, 0] == 1


def test_the_normalised_distribution_serves_minimum_variance_levels() -> None:
    values = np.random.default_rng(7).laplace(size=20_000).astype(np.float32)
    distribution = MagnitudeStatistics.gather(values).normalised(4.0)
    levels = minimum_variance_levels(distribution, 4).astype(np.float64)
    u = np.abs(values[np.abs(values) <= 4.0]).astype(np.float64) / 4.0
    above = np.searchsorted(levels, u, side="right").clip(1, levels.size - 1)
    exact = float(((levels[above] - u) * (u - levels[above - 1])).sum())
    assert quantization_variance(levels, distribution) == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("scheme", TAIL_SCHEMES)
def test_learnt_levels_are_valid_at_every_width(scheme: str) -> None:
    statistics = MagnitudeStatistics.gather(1e-6 * power_law_sample(3.4, 20_000, 8))
    for bits in (2, 3, 8):
        found, _ = learnt_truncation(statistics, scheme, bits)
        check_levels(found.levels, bits)
        assert 0 < found.clip <= statistics.largest


@pytest.mark.parametrize(
    ("kind", "scheme"), [("power law", "tnq"), ("power law", "tbq"), ("Laplace", "tuq"), ("normal", "tnq")]
)
def test_measured_alpha_has_the_least_error_of_the_values_themselves(kind: str, scheme: Scheme) -> None:
    rng = np.random.default_rng(4)
    draws = {"power law": power_law_sample(3.6, 20_000, 4), "Laplace": rng.laplace(size=20_000)}
    values = draws.get(kind, rng.standard_normal(20_000)).astype(np.float32)
    statistics = MagnitudeStatistics.gather(values)
    measured, fit = learnt_truncation(statistics, scheme, 3, TailSettings("measured"))
    error = statistics.squared_error(measured.levels, measured.clip)
    assert measured.error == pytest.approx(error / statistics.count)
    for optimum in OPTIMA:
        found, _ = learnt_truncation(statistics, scheme, 3, TailSettings(optimum))  # type: ignore[arg-type]  # of OPTIMA
        assert error <= 1.002 * statistics.squared_error(found.levels, found.clip)
    for clip in np.geomspace(0.02, 1.0, 40) * statistics.largest:
        other = truncation(fit.model, scheme, 3, "expected", clip=float(clip))
        assert error <= 1.002 * statistics.squared_error(other.levels, other.clip)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(CodebookError, match="gamma > 3"):
        PowerLaw(3.0, 1.0, 0.1)
    with pytest.raises(CodebookError, match="scheme must be"):
        truncation(Laplace(1.0), "tqq", 3)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(CodebookError, match="Laplace density"):
        truncation(POWER_LAWS[0], "laplace", 3)
    with pytest.raises(CodebookError, match="optimum"):
        truncation(Laplace(1.0), "tuq", 3, "least")  # type: ignore[arg-type]  # the point of the test
