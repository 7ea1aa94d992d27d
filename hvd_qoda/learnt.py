"""What levels were learnt from, as few numbers as a record of telemetry should hold.

Statistics hold thousands of numbers; pictures of them (`report.py`) need a histogram and an exponent.
"""

import math

import numpy as np

from hvd_qoda.telemetry import MAGNITUDE_EDGES, LearntRecord
from qoda_kernels.codebook import Codebook
from qoda_kernels.levels import Distribution
from qoda_kernels.magnitudes import MagnitudeStatistics
from qoda_kernels.statistics import ExchangedStatistics, HistogramStatistics, TruncatedNormalStatistics
from qoda_kernels.tails import TAIL_SHARE, fit_tail

__all__ = ["learnt_record"]

_POINTS = 257  # at which the tail of a histogram is read


def learnt_record(statistics: ExchangedStatistics, codebook: Codebook) -> LearntRecord | None:
    """Histogram and tail index of the statistics that a codebook has just learnt from; None where there is neither.

    Where rotated buckets were chosen (`levels="best"`) it tells of the gradients before they are rotated: the levels
    are for other coordinates. Where all buckets are rotated and only bits are planned, ranks exchange norms alone.

    The tail index is the maximum-likelihood exponent gamma of p(g) ~ |g|^(-gamma) over the largest tenth. Codebooks
    that clip have it from the gradients' magnitudes. Others normalise every bucket first, which cuts the tail off at
    the norm: theirs shows a trend rather than the gradients' own exponent.
    """
    if isinstance(statistics, MagnitudeStatistics):
        if not codebook.clip > 0.0:
            return None
        distribution: Distribution = statistics.normalised(codebook.clip)
        gamma = fit_tail(statistics).gamma
        total = statistics.count
    elif isinstance(statistics, HistogramStatistics | TruncatedNormalStatistics):
        distribution = statistics
        total = float(statistics.cumulative_moments(np.array([1.0]))[0][0])
        if isinstance(statistics, HistogramStatistics):
            total += float(statistics.cells[-1, 0])  # those that are their bucket's norm
        gamma = _tail_index(statistics)
    else:
        return None
    if not total > 0.0:
        return None
    below = distribution.cumulative_moments(np.array(MAGNITUDE_EDGES))[0] / total
    shares = np.diff(np.append(below, 1.0))
    return LearntRecord(
        shares=tuple(round(max(float(share), 0.0), 7) for share in shares),
        tail_index=None if math.isnan(gamma) else gamma,
        clip=codebook.clip,
        rotation=codebook.rotation,
    )


def _tail_index(distribution: Distribution) -> float:
    """Hill's estimate from the largest tenth of normalised magnitudes below 1; NaN where they are all equal."""
    whole = float(distribution.cumulative_moments(np.array([1.0]))[0][0])
    start = float(distribution.quantile(np.array([(1.0 - TAIL_SHARE) * whole]))[0])
    if not 0.0 < start < 1.0:
        return math.nan
    points = np.geomspace(start, 1.0, _POINTS)
    weights = np.diff(distribution.cumulative_moments(points)[0])
    middles = np.sqrt(points[:-1] * points[1:])
    excess = float((weights * np.log(middles / start)).sum())
    return 1.0 + float(weights.sum()) / excess if excess > 0.0 else math.nan
