"""Which layer gets how many bits: a knapsack over layers and code widths.

Every layer i has candidates c with a size S(i, c) and an expected squared error e(i, c). Either the least total size
whose total error stays within a budget is wanted, or the least total error within a budget of size. L-GreCo (arXiv
2210.17357) solves the first for norms of errors; here errors are squared ones, because those of different layers add
up exactly to the error of the whole gradient, and norms do not.

The dynamic program is L-GreCo's: the budgeted quantity is cut into units, every candidate's share rounded up, so a plan
never exceeds its budget; best[i][b] = min over c of best[i-1][b - cost(i, c)] + gain(i, c). Only additions, comparisons
and one division per candidate decide, in a fixed order, so equal inputs give equal plans on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qoda_kernels.errors import CodebookError

Budget = Literal["variance", "bytes"]
UNITS = 10_000  # L-GreCo's


@dataclass(frozen=True)
class Candidate:
    """One way to quantize one layer.

    Attributes:
        bits: code width.
        size: bits that all its code words take.
        error: expected squared error, in the same unit for all layers.
    """

    bits: int
    size: int
    error: float


def allocate(
    layers: Sequence[Sequence[Candidate]],
    budget: Budget,
    limit: float,
    known: Sequence[int] | None = None,
    units: int = UNITS,
) -> tuple[int, ...]:
    """Index of the chosen candidate of each layer.

    Args:
        layers: at least one candidate for each.
        budget: "variance": the least total size with a total error of at most `limit`; "bytes": the least total error
            with a total size of at most `limit`.
        limit: of the budgeted quantity.
        known: a plan, such as equal widths, than which the result is not worse if it keeps within the limit: rounding
            shares up may make it look too expensive.
        units: into how many parts the limit is cut. The plan is at least as good as the best one for a limit smaller
            by a share of layers / units.

    Returns:
        One index per layer. Of equally good plans the one with smaller candidates' indices in the last layers.

    Raises:
        CodebookError: when not even the cheapest candidates keep within the limit, for a layer without candidates, or
            for errors and limits that are not finite.
    """
    if budget not in ("variance", "bytes"):
        raise CodebookError(f'budget must be "variance" or "bytes"; got {budget!r}')
    if not all(layers):
        raise CodebookError("every layer needs at least one candidate")
    weights = [[c.error if budget == "variance" else float(c.size) for c in layer] for layer in layers]
    gains = [[float(c.size) if budget == "variance" else c.error for c in layer] for layer in layers]
    if not (np.isfinite(limit) and limit >= 0.0 and all(np.isfinite(w) for row in weights + gains for w in row)):
        raise CodebookError(f"sizes, errors and the limit must be finite; the limit is {limit!r}")
    cheapest = tuple(row.index(min(row)) for row in weights)
    if _total(weights, cheapest) > limit:
        least = _total(weights, cheapest)
        raise CodebookError(f"the {budget} budget of {limit:g} cannot be kept: the least possible is {least:g}")
    plans = [_planned([[_units(weight, limit, units) for weight in row] for row in weights], gains, units), cheapest]
    if known is not None:
        plans.append(tuple(known))
    # Of equally good plans the first is taken; a sum that is the limit up to rounding errors keeps within it.
    kept = [plan for plan in plans if plan is not None and _total(weights, plan) <= limit * (1.0 + 1e-12)]
    return min(kept, key=lambda plan: _total(gains, plan))


def _total(values: Sequence[Sequence[float]], plan: Sequence[int]) -> float:
    return sum(row[index] for row, index in zip(values, plan, strict=True))


def _planned(costs: Sequence[Sequence[int]], gains: Sequence[Sequence[float]], units: int) -> tuple[int, ...] | None:
    """The plan of least gains that costs at most so many units; None if all cost more."""
    best = np.zeros(units + 1)
    choices: list[npt.NDArray[np.int8]] = []
    for cost_row, gain_row in zip(costs, gains, strict=True):
        reached = np.full(units + 1, np.inf)
        choice: npt.NDArray[np.int8] = np.full(units + 1, -1, dtype=np.int8)
        for index, (cost, gain) in enumerate(zip(cost_row, gain_row, strict=True)):
            if cost > units:
                continue
            candidate = best[: units + 1 - cost] + gain
            is_better = candidate < reached[cost:]
            reached[cost:][is_better] = candidate[is_better]
            choice[cost:][is_better] = index
        best = reached
        choices.append(choice)
    if not np.isfinite(best[units]):
        return None
    left, plan = units, []
    for cost_row, choice in zip(reversed(costs), reversed(choices), strict=True):
        index = int(choice[left])
        plan.append(index)
        left -= cost_row[index]
    return tuple(reversed(plan))


def _units(weight: float, limit: float, units: int) -> int:
    """Units that a weight takes of the limit, rounded up; more than all of them where it exceeds the limit."""
    if weight <= 0.0:
        return 0
    if weight > limit:
        return units + 1
    share = weight / limit * units
    nearest = round(share)
    # A whole number of units must not become one more by a rounding error.
    return int(nearest) if abs(share - nearest) <= 1e-9 * units else int(np.ceil(share))
