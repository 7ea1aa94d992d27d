"""Clipped codebooks for heavy-tailed gradients: the TQSGD family.

A gradient's coordinate g is first clipped to [-alpha, alpha], then rounded without bias to points of that range: TUQ
equally spaced, TNQ of the density p(g)^(1/3), TBQ with one spacing in |g| <= k alpha and a wider one outside (arXiv
2402.01798), and TNQ for a Laplace density (its companion, 2402.01160). alpha trades the bias of clipping against the
variance of rounding.

Models of the density p, of the values that are not zero (two-sided, symmetric):

- `PowerLaw`: p(g) = rho (gamma - 1) gmin^(gamma - 1) |g|^(-gamma) for |g| > gmin, of equal height below;
  rho is the mass of one tail.
- `Laplace`: p(g) = exp(-|g|/b) / (2 b).

Expected error of one element with s intervals, 2402.01798:

    E(alpha) = Q(alpha) alpha^2 / s^2 + 2 Int_alpha^inf (g - alpha)^2 p(g) dg,

where Q is P(|g| <= alpha) for TUQ; I(alpha)^3 / (4 alpha^2), I = Int_{-alpha}^{alpha} p^(1/3), for TNQ; and
[(P_in k^2)^(1/3) + (P_out (1-k)^2)^(1/3)]^3 for TBQ. The first term bounds the variance of rounding, Delta^2/4 in an
interval; its average is Delta^2/6. So alpha can be chosen in three ways (`Optimum`):

- "fixed_point", as the papers do: dE/dalpha = 0 with Q held fixed,
  alpha = gmin [2 rho s^2 / ((gamma - 2) Q(alpha))]^(1/(gamma - 1)); for TUQ that is
  gmin [2 rho (s^2/(gamma - 2) + 1)]^(1/(gamma - 1)). A Laplace density has none: "bound" is taken.
- "bound": the minimum of E; for TUQ gmin [rho (2 s^2/(gamma - 2) - (gamma - 3))]^(1/(gamma - 1)), for TNQ with a
  Laplace density 3 b ln(1 + sqrt(6) s / 9).
- "expected": the same with Delta^2/6, which is s^2 -> 1.5 s^2; for the Laplace density 3 b ln(1 + s/3).

Where statistics of the magnitudes are at hand, there is a fourth: "measured", the alpha of least squared error of these
very magnitudes, by search, with the power law's levels or the Laplace density's, whichever are better. No model's tail
is trusted with alpha then; models only shape the levels.

The papers' s is 2^bits - 1, without a point at 0. The code words here have a true zero, so s = 2^bits - 2, of which
2^(bits-1) - 1 lie on either side.

With a mean over K workers the first term falls to 1/K; a bias that all workers share does not (`workers`).
Everything computed from equal statistics is equal on every processor (`elementary.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from qoda_kernels.codebook import LARGEST_CLIP, SMALLEST_CLIP
from qoda_kernels.elementary import exponential, logarithm, power
from qoda_kernels.errors import CodebookError
from qoda_kernels.levels import Float32Array, Float64Array, level_count
from qoda_kernels.magnitudes import EDGES, MagnitudeStatistics

Scheme = Literal["tuq", "tnq", "tbq", "laplace"]
Optimum = Literal["fixed_point", "bound", "expected"]
LearntOptimum = Literal["fixed_point", "bound", "expected", "measured"]
GminRule = Literal["quantile", "kolmogorov_smirnov"]
TAIL_SCHEMES: tuple[str, ...] = get_args(Scheme)
OPTIMA: tuple[str, ...] = get_args(Optimum)

SMALLEST_GAMMA = 3.01  # the clipping error is finite only for gamma > 3
LARGEST_GAMMA = 60.0
TAIL_SHARE = 0.1  # of the values that are not zero, beyond gmin, by the quantile rule
LARGEST_TAIL_SHARE = 0.5  # of those beyond gmin, by the Kolmogorov-Smirnov rule
FEWEST_TAIL_VALUES = 50  # fewer are no evidence of a power law

_THIRD = 1.0 / 3.0
_FIRST_GRID, _GRID, _ZOOMS = 64, 16, 12  # intervals and rounds of the one-dimensional searches
_SEARCH_OCTAVES = 12  # below the largest magnitude, in which "measured" looks for alpha
_SEARCH_GRID, _SEARCH_ZOOMS = 16, 3
_SMALLEST_RELATIVE_GAP = 2.0**-12  # between levels, as in `levels.py`


@dataclass(frozen=True)
class TailSettings:
    """How codebooks that clip are fitted.

    Attributes:
        optimum: how alpha is chosen: "fixed_point" (the papers'), "bound", "expected" or "measured"; see the file's
            docstring.
        gmin: where the tail begins: "quantile" or "kolmogorov_smirnov"; see `fit_tail`.
        tail_share: share of the values beyond gmin, for "quantile"; between 0 and 0.5.
    """

    optimum: LearntOptimum = "measured"
    gmin: GminRule = "quantile"
    tail_share: float = TAIL_SHARE


class TailModel(Protocol):
    """A symmetric density p, known by four functions; arguments and results are float64 arrays."""

    @property
    def scale(self) -> float:
        """A magnitude about which alpha is searched; the smallest alpha that makes sense."""

    def inside(self, alpha: npt.ArrayLike) -> Float64Array:
        """P(|g| <= alpha)."""

    def clipping_error(self, alpha: npt.ArrayLike) -> Float64Array:
        """2 Int_alpha^inf (g - alpha)^2 p(g) dg."""

    def spread(self, alpha: npt.ArrayLike) -> Float64Array:
        """I(alpha) = Int_{-alpha}^{alpha} p(g)^(1/3) dg."""

    def spread_inverse(self, value: npt.ArrayLike) -> Float64Array:
        """The alpha of which `spread` is this value."""


@dataclass(frozen=True)
class PowerLaw:
    """Uniform body up to gmin, power-law tails beyond; see the file's docstring.

    Raises:
        CodebookError: unless gamma > 3, gmin > 0 and 0 < rho < 1/2.
    """

    gamma: float
    gmin: float
    rho: float

    def __post_init__(self) -> None:
        if not (self.gamma > 3.0 and self.gmin > 0.0 and 0.0 < self.rho < 0.5):
            raise CodebookError(f"a power law needs gamma > 3, gmin > 0 and 0 < rho < 0.5; got {self}")

    @property
    def scale(self) -> float:
        """See `TailModel`: gmin."""
        return self.gmin

    @property
    def _body_height(self) -> float:
        return (1.0 - 2.0 * self.rho) / (2.0 * self.gmin)

    @property
    def _body_spread(self) -> float:
        return 2.0 * self.gmin * float(power(self._body_height, _THIRD))

    @property
    def _tail_factor(self) -> float:
        """Factor of gmin^(1 - gamma/3) - alpha^(1 - gamma/3) in half the spread of the tails, times gmin^(...)."""
        # p^(1/3) = (rho (gamma - 1) / gmin)^(1/3) x^(-gamma/3) with x = |g| / gmin
        height = float(power(self.rho * (self.gamma - 1.0) / self.gmin, _THIRD))
        return height * self.gmin / (self.gamma / 3.0 - 1.0)

    def inside(self, alpha: npt.ArrayLike) -> Float64Array:
        """See `TailModel`."""
        x = np.asarray(alpha, dtype=np.float64) / self.gmin
        tail = 1.0 - 2.0 * self.rho * power(np.maximum(x, 1.0), 1.0 - self.gamma)
        return np.where(x <= 1.0, (1.0 - 2.0 * self.rho) * x, tail)

    def clipping_error(self, alpha: npt.ArrayLike) -> Float64Array:
        """See `TailModel`; 4 rho gmin^(gamma-1) alpha^(3-gamma) / ((gamma-2)(gamma-3)) for alpha >= gmin."""
        a = np.asarray(alpha, dtype=np.float64)
        x = np.maximum(a / self.gmin, 1.0)
        g = self.gamma
        beyond = 4.0 * self.rho * self.gmin**2 * power(x, 3.0 - g) / ((g - 2.0) * (g - 3.0))
        # Below gmin: part of the body, and the whole tail's moments about alpha.
        rest = np.maximum(self.gmin - a, 0.0)
        body = 2.0 * self._body_height * rest * rest * rest / 3.0
        first, second = (g - 1.0) / (g - 2.0) * self.gmin, (g - 1.0) / (g - 3.0) * self.gmin**2
        tail = 2.0 * self.rho * (second - 2.0 * a * first + a * a)
        return np.where(a >= self.gmin, beyond, body + tail)

    def spread(self, alpha: npt.ArrayLike) -> Float64Array:
        """See `TailModel`."""
        x = np.asarray(alpha, dtype=np.float64) / self.gmin
        tail = 2.0 * self._tail_factor * (1.0 - power(np.maximum(x, 1.0), 1.0 - self.gamma / 3.0))
        return self._body_spread * np.minimum(x, 1.0) + tail

    def spread_inverse(self, value: npt.ArrayLike) -> Float64Array:
        """See `TailModel`."""
        v = np.asarray(value, dtype=np.float64)
        share = np.maximum(1.0 - np.maximum(v - self._body_spread, 0.0) / (2.0 * self._tail_factor), 1e-300)
        beyond = power(share, 1.0 / (1.0 - self.gamma / 3.0))
        return self.gmin * np.where(v <= self._body_spread, v / self._body_spread, beyond)


@dataclass(frozen=True)
class Laplace:
    """Density exp(-|g|/b) / (2 b); b is the mean of |g|. Raises CodebookError unless b > 0."""

    b: float

    def __post_init__(self) -> None:
        if not self.b > 0.0:
            raise CodebookError(f"a Laplace density needs a positive mean magnitude; got {self.b}")

    @property
    def scale(self) -> float:
        """See `TailModel`: b / 4."""
        return self.b / 4.0

    def inside(self, alpha: npt.ArrayLike) -> Float64Array:
        """See `TailModel`."""
        return 1.0 - exponential(-np.asarray(alpha, dtype=np.float64) / self.b)

    def clipping_error(self, alpha: npt.ArrayLike) -> Float64Array:
        """See `TailModel`: 2 b^2 exp(-alpha/b)."""
        return 2.0 * self.b * self.b * exponential(-np.asarray(alpha, dtype=np.float64) / self.b)

    def spread(self, alpha: npt.ArrayLike) -> Float64Array:
        """See `TailModel`: 6 b (2 b)^(-1/3) (1 - exp(-alpha/(3 b)))."""
        return self._whole_spread * (1.0 - exponential(-np.asarray(alpha, dtype=np.float64) / (3.0 * self.b)))

    def spread_inverse(self, value: npt.ArrayLike) -> Float64Array:
        """See `TailModel`."""
        share = np.maximum(1.0 - np.asarray(value, dtype=np.float64) / self._whole_spread, 1e-300)
        return -3.0 * self.b * logarithm(share)

    @property
    def _whole_spread(self) -> float:
        return 6.0 * self.b * float(power(2.0 * self.b, -_THIRD))


@dataclass(frozen=True)
class TailFit:
    """A power law fitted to the magnitudes of one layer type, and whether it describes them.

    Attributes:
        laplace: the Laplace density with the same mean magnitude.
        power_law: the fitted power law; None without enough values to fit one.
        is_heavy: whether the power law describes the tail better than an exponential one: what `model` goes by.
        gamma: exponent by maximum likelihood, before it is raised to SMALLEST_GAMMA; NaN without a fit.
        gamma_positive: the same of the positive values' tail alone; NaN with fewer than FEWEST_TAIL_VALUES.
        gamma_negative: likewise, of the negative ones'.
        tail_values: number of values beyond gmin.
        distance: Kolmogorov-Smirnov distance between the tail and its power law.
        likelihood_ratio: log-likelihood of the power law less that of an exponential tail, per value beyond gmin.
    """

    laplace: Laplace
    power_law: PowerLaw | None
    is_heavy: bool
    gamma: float
    gamma_positive: float
    gamma_negative: float
    tail_values: int
    distance: float
    likelihood_ratio: float

    @property
    def model(self) -> TailModel:
        """The power law where the tail is heavy, else the Laplace density."""
        return self.power_law if self.is_heavy and self.power_law is not None else self.laplace

    @property
    def is_clamped(self) -> bool:
        """Whether the exponent had to be raised to SMALLEST_GAMMA."""
        return self.gamma < SMALLEST_GAMMA


def fit_tail(
    statistics: MagnitudeStatistics, gmin_rule: GminRule = "quantile", tail_share: float = TAIL_SHARE
) -> TailFit:
    """Fit a power law to the tails of magnitudes, by maximum likelihood (Clauset, Shalizi and Newman, 2009).

    gamma = 1 + n / sum ln(|g_j| / gmin) over the n values beyond gmin, and rho = n / (2 N), N the values that are not
    zero. gmin is an edge of the statistics' grid. The tail counts as heavy if its likelihood is larger than that of an
    exponential tail of the same mean; both are computed from the same sums.

    Args:
        statistics: merged over all ranks.
        gmin_rule: "quantile": the largest edge that has at least `tail_share` of the values beyond it;
            "kolmogorov_smirnov": the edge whose power law is nearest to the tail, among those with at most half of the
            values and at least FEWEST_TAIL_VALUES beyond.
        tail_share: for the first rule.

    Raises:
        CodebookError: for statistics without values, or a tail share outside (0, 0.5).
    """
    count = statistics.count
    if not count > 0.0:
        raise CodebookError("no tail can be fitted to statistics without values")
    if not 0.0 < tail_share < 0.5:
        raise CodebookError(f"the share of the tail must be between 0 and 0.5; got {tail_share!r}")
    laplace = Laplace(statistics.absolute_sum / count)
    tails = _Tails(*statistics.above())
    if gmin_rule == "quantile":
        edge = _last_edge(tails.counts, max(tail_share * count, FEWEST_TAIL_VALUES))
    elif gmin_rule == "kolmogorov_smirnov":
        edge = _nearest_power_law(tails, count)
    else:
        raise CodebookError(f'gmin_rule must be "quantile" or "kolmogorov_smirnov"; got {gmin_rule!r}')
    if edge is None or not tails.counts[edge] < count:
        nothing = math.nan
        return TailFit(laplace, None, False, nothing, nothing, nothing, 0, nothing, nothing)
    gamma = tails.gamma(edge)
    sides = [_Tails(*statistics.above(sign)) for sign in (1, -1)]
    positive, negative = (side.gamma(edge) if side.counts[edge] >= FEWEST_TAIL_VALUES else math.nan for side in sides)
    number = float(tails.counts[edge])
    rho = min(number / (2.0 * count), 0.5 - 1e-6)
    law = PowerLaw(min(max(gamma, SMALLEST_GAMMA), LARGEST_GAMMA), float(EDGES[edge]), rho)
    ratio = tails.likelihood_ratio(edge)
    return TailFit(
        laplace, law, ratio > 0.0, gamma, positive, negative, int(number), tails.distance(edge, gamma), ratio
    )


@dataclass(frozen=True)
class _Tails:
    """Number, sum of |g| and sum of ln |g| of what lies beyond each edge of the grid."""

    counts: Float64Array
    sums: Float64Array
    logarithms: Float64Array

    def gamma(self, edge: int) -> float:
        """Maximum-likelihood exponent with this edge as gmin."""
        excess = float(self.logarithms[edge] - self.counts[edge] * logarithm(EDGES[edge]))
        return LARGEST_GAMMA if excess <= 0.0 else min(1.0 + float(self.counts[edge]) / excess, LARGEST_GAMMA)

    def distance(self, edge: int, gamma: float) -> float:
        """Largest difference of the two distribution functions, at the edges of the grid."""
        observed = self.counts[edge:] / self.counts[edge]
        expected = power(EDGES[edge:] / EDGES[edge], 1.0 - gamma)
        return float(np.max(np.abs(observed - expected)))

    def likelihood_ratio(self, edge: int) -> float:
        """Mean log-likelihood of the power law less that of an exponential tail, both beyond this edge."""
        gmin, number = float(EDGES[edge]), float(self.counts[edge])
        gamma = self.gamma(edge)
        mean_excess = float(self.sums[edge]) / number - gmin
        mean_logarithm = float(self.logarithms[edge]) / number - float(logarithm(gmin))
        if mean_excess <= 0.0:
            return 0.0
        law = float(logarithm((gamma - 1.0) / gmin)) - gamma * mean_logarithm
        return law + float(logarithm(mean_excess)) + 1.0


def _last_edge(counts: Float64Array, least: float) -> int | None:
    """The last edge with at least so many values beyond it."""
    enough = np.flatnonzero(counts >= least)
    return int(enough[-1]) if enough.size else None


def _nearest_power_law(tails: _Tails, count: float) -> int | None:
    allowed = (tails.counts >= FEWEST_TAIL_VALUES) & (tails.counts <= LARGEST_TAIL_SHARE * count)
    best: tuple[float, int] | None = None
    for edge in np.flatnonzero(allowed).tolist():
        if best is not None and tails.counts[edge] == tails.counts[best[1]]:
            continue
        found = (tails.distance(edge, tails.gamma(edge)), edge)
        best = found if best is None or found < best else best
    return None if best is None else best[1]


@dataclass(frozen=True)
class Truncation:
    """A clipped codebook.

    Attributes:
        clip: alpha.
        levels: float32 [2^(bits-1)], the magnitudes that can be sent, divided by alpha; from 0 to 1.
        error: expected squared error of one element under the model, by the formula that alpha minimises or bounds.
        is_clamped: whether alpha came out below the model's gmin and was raised to it.
    """

    clip: float
    levels: Float32Array
    error: float
    is_clamped: bool


def truncation(
    model: TailModel,
    scheme: Scheme,
    bits: int,
    optimum: Optimum = "bound",
    workers: int = 1,
    clip: float | None = None,
) -> Truncation:
    """Clip value and levels of one of the four schemes.

    Args:
        model: density of the values that are not zero. For "laplace" it must be a `Laplace`.
        scheme: "tuq", "tnq", "tbq", or "laplace", which is "tnq" for a Laplace density.
        bits: code width, 2 to 8. With 2 bits there is one interval on either side: all schemes equal "tuq".
        optimum: how alpha is chosen; see the file's docstring.
        workers: over how many workers the mean is taken, K.
        clip: alpha, if it is given and not to be chosen: with the largest magnitude nothing is clipped, and "tuq" is
            QSGD, "tnq" the papers' NQSGD.

    Raises:
        CodebookError: for a clip value that is not positive, impossible bits, an unknown scheme or optimum, or fewer
            than one worker.
    """
    half = level_count(bits) - 1
    if scheme not in TAIL_SCHEMES:
        raise CodebookError(f"the scheme must be one of {', '.join(TAIL_SCHEMES)}; got {scheme!r}")
    if optimum not in OPTIMA:
        raise CodebookError(f"the optimum must be one of {', '.join(OPTIMA)}; got {optimum!r}")
    if workers < 1:
        raise CodebookError(f"the mean is taken over at least one worker; got {workers}")
    if scheme == "laplace" and not isinstance(model, Laplace):
        raise CodebookError(f"scheme 'laplace' needs a Laplace density; got {model}")
    squared_intervals = (2.0 * half) ** 2 * workers * (1.5 if optimum == "expected" else 1.0)
    if half == 1:
        scheme = "tuq"
    rounding = _ROUNDING[scheme]

    def error(alpha: Float64Array) -> Float64Array:
        return rounding(model, alpha) / squared_intervals + model.clipping_error(alpha)

    if clip is not None:
        if not clip > 0.0:
            raise CodebookError(f"the clip value must be positive; got {clip!r}")
        alpha = clip
    elif optimum == "fixed_point" and isinstance(model, PowerLaw):
        alpha = _fixed_point(model, lambda a: rounding(model, a) / (a * a), squared_intervals)
    elif scheme == "tuq" and isinstance(model, PowerLaw):
        # dE/dalpha = 0 in closed form.
        gamma = model.gamma
        inner = model.rho * (2.0 * squared_intervals / (gamma - 2.0) - (gamma - 3.0))
        alpha = model.gmin * float(power(max(inner, 0.0), 1.0 / (gamma - 1.0))) if inner > 0.0 else 0.0
    else:
        alpha = _minimum(error, model.scale, 1e4 * model.scale)
    is_clamped = clip is None and alpha < model.scale
    if is_clamped:
        alpha = model.scale
    points = _POINTS[scheme](model, alpha, half)
    return Truncation(alpha, _as_levels(points / alpha), float(error(np.array([alpha]))[0]), is_clamped)


def _fixed_point(model: PowerLaw, share: Callable[[Float64Array], Float64Array], squared_intervals: float) -> float:
    """The papers' alpha = gmin [2 rho s^2 / ((gamma - 2) Q(alpha))]^(1/(gamma - 1)), Q = share(alpha)."""
    factor = 2.0 * model.rho * squared_intervals / (model.gamma - 2.0)
    alpha = model.gmin * float(power(factor, 1.0 / (model.gamma - 1.0)))
    for _ in range(200):
        quotient = factor / float(share(np.array([max(alpha, model.gmin)]))[0])
        before, alpha = alpha, model.gmin * float(power(quotient, 1.0 / (model.gamma - 1.0)))
        if abs(alpha - before) <= 1e-14 * alpha:
            break
    return alpha


def _uniform_rounding(model: TailModel, alpha: Float64Array) -> Float64Array:
    return model.inside(alpha) * alpha * alpha


def _nonuniform_rounding(model: TailModel, alpha: Float64Array) -> Float64Array:
    spread = model.spread(alpha)
    return 0.25 * spread * spread * spread


def _two_scale_rounding(model: TailModel, alpha: Float64Array) -> Float64Array:
    return _best_cut(model, alpha)[1]


def _best_cut(model: TailModel, alpha: Float64Array) -> tuple[Float64Array, Float64Array]:
    """For each alpha the k with the least Q alpha^2 for continuous numbers of intervals, and that value."""
    column = alpha[:, None]

    def value(k: Float64Array) -> Float64Array:
        inner, outer = _cut_parts(model, column, k)
        total = inner + outer
        return column * column * total * total * total

    k = _minima(value, np.full(alpha.shape, 1e-3), np.full(alpha.shape, 1.0 - 1e-6))
    return k, value(k[:, None])[:, 0]


def _cut_parts(model: TailModel, alpha: Float64Array, k: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(P_in k^2)^(1/3) and (P_out (1 - k)^2)^(1/3)."""
    inside = model.inside(k * alpha)
    outside = np.maximum(model.inside(alpha) - inside, 0.0)
    return power(inside * k * k, _THIRD), power(outside * (1.0 - k) * (1.0 - k), _THIRD)


def _uniform_points(model: TailModel, alpha: float, half: int) -> Float64Array:
    return alpha * (np.arange(half + 1) / half)


def _nonuniform_points(model: TailModel, alpha: float, half: int) -> Float64Array:
    """Points x_k with Int_0^{x_k} lambda = k, lambda proportional to p^(1/3)."""
    whole = float(model.spread(np.array([alpha]))[0])
    points = model.spread_inverse(whole * (np.arange(half + 1) / half))
    points[0], points[-1] = 0.0, alpha
    return points


def _two_scale_points(model: TailModel, alpha: float, half: int) -> Float64Array:
    """The better of the two whole splits about the best continuous one, each with its own best k."""
    clip = np.array([alpha])
    inner, outer = (float(part[0]) for part in _cut_parts(model, clip, _best_cut(model, clip)[0]))
    wanted = half * inner / (inner + outer)
    best: tuple[float, int, float] | None = None
    for number in sorted({min(max(int(wanted) + step, 1), half - 1) for step in (0, 1)}):

        def value(k: Float64Array, number: int = number) -> Float64Array:
            inside = model.inside(k * alpha)
            outside = np.maximum(model.inside(alpha) - inside, 0.0)
            return inside * (k / number) ** 2 + outside * ((1.0 - k) / (half - number)) ** 2

        k = _minimum(value, 1e-3, 1.0 - 1e-6)
        found = (float(value(np.array([k]))[0]), number, k)
        best = found if best is None or found < best else best
    assert best is not None
    _, number, k = best
    below = k * (np.arange(number + 1) / number)
    above = k + (1.0 - k) * (np.arange(1, half - number + 1) / (half - number))
    return alpha * np.concatenate((below, above))


_ROUNDING: dict[str, Callable[[TailModel, Float64Array], Float64Array]] = {
    "tuq": _uniform_rounding,
    "tnq": _nonuniform_rounding,
    "tbq": _two_scale_rounding,
    "laplace": _nonuniform_rounding,
}
_POINTS: dict[str, Callable[[TailModel, float, int], Float64Array]] = {
    "tuq": _uniform_points,
    "tnq": _nonuniform_points,
    "tbq": _two_scale_points,
    "laplace": _nonuniform_points,
}


def _minimum(function: Callable[[Float64Array], Float64Array], low: float, high: float) -> float:
    """Where a function of one variable is least between two positive numbers."""
    found = _minima(lambda grid: function(grid[0])[None], np.array([low]), np.array([high]))
    return float(found[0])


def _minima(function: Callable[[Float64Array], Float64Array], low: Float64Array, high: Float64Array) -> Float64Array:
    """Where each of several functions is least, by ever finer geometric grids.

    Args:
        function: maps [functions, points] to [functions, points].
        low: positive, [functions].
        high: larger, [functions].
    """
    rows = np.arange(low.size)
    place = low
    for zoom in range(_ZOOMS):
        count = _GRID if zoom else _FIRST_GRID
        shares = np.arange(count + 1) / count
        grid = low[:, None] * exponential(logarithm(high / low)[:, None] * shares)
        best = np.argmin(function(grid), axis=1)
        place = grid[rows, best]
        low, high = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, count)]
    return place


def _as_levels(points: Float64Array) -> Float32Array:
    """Levels from 0 to 1 as float32, pushed apart where the model would let them meet."""
    spread = points.tolist()
    spread[-1] = 1.0
    for j in range(len(spread) - 2, 0, -1):
        spread[j] = min(spread[j], spread[j + 1] * (1.0 - _SMALLEST_RELATIVE_GAP))
    spread[0] = 0.0
    return np.array(spread).astype(np.float32)


def learnt_truncation(
    statistics: MagnitudeStatistics, scheme: Scheme, bits: int, settings: TailSettings | None = None
) -> tuple[Truncation, TailFit]:
    """Clip value and levels from statistics: what a layer type is quantized with after an update.

    Where the tail is not heavy, the Laplace density stands in for the power law. alpha is never larger than the largest
    magnitude seen. Raises CodebookError as `fit_tail` and `truncation` do.
    """
    chosen = settings or TailSettings()
    fit = fit_tail(statistics, chosen.gmin, chosen.tail_share)
    if chosen.optimum == "measured":
        return _measured_truncation(statistics, fit, scheme, bits), fit
    model = fit.laplace if scheme == "laplace" else fit.model
    found = truncation(model, scheme, bits, chosen.optimum)
    clip = min(max(min(found.clip, statistics.largest), SMALLEST_CLIP), LARGEST_CLIP)
    if clip == found.clip:
        return found, fit
    return truncation(model, scheme, bits, chosen.optimum, clip=clip), fit


def _measured_truncation(statistics: MagnitudeStatistics, fit: TailFit, scheme: Scheme, bits: int) -> Truncation:
    """The best alpha for these magnitudes, found on ever finer grids, and the better model's levels."""
    models: list[TailModel] = [fit.laplace]
    if fit.power_law is not None and scheme != "laplace":
        models.append(fit.power_law)
    best: tuple[float, Truncation] | None = None
    for model in models:
        high = min(max(statistics.largest, SMALLEST_CLIP), LARGEST_CLIP)
        low = max(high * 2.0**-_SEARCH_OCTAVES, SMALLEST_CLIP)
        for _ in range(_SEARCH_ZOOMS):
            shares = np.arange(_SEARCH_GRID + 1) / _SEARCH_GRID
            grid = (low * exponential(logarithm(high / low) * shares)).tolist()
            found = [truncation(model, scheme, bits, "expected", clip=clip) for clip in grid]
            errors = [statistics.squared_error(each.levels, each.clip) / statistics.count for each in found]
            place = errors.index(min(errors))
            if best is None or errors[place] < best[0]:
                best = errors[place], replace(found[place], error=errors[place])
            low, high = grid[max(place - 1, 0)], grid[min(place + 1, _SEARCH_GRID)]
    assert best is not None
    return best[1]
