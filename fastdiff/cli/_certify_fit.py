"""The observed order of a solver: how fast its error falls with the number of model evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["METHOD", "Fit", "fit", "observe"]

_POINTS, _SETTLED = 3, 0.05
FIRST, ENOUGH, LAST = 20, 320, 1280
METHOD = (
    f"Order: least-squares slope of log(error) against log(NFE) over the last {_POINTS} runs. NFE doubles from "
    f"{FIRST} to {ENOUGH}, and on to at most {LAST} until the slopes of the last two doublings agree within "
    f"{_SETTLED}; runs from the first whose error is below the rounding floor on are left out. Error: the largest over "
    "all points of all targets."
)


@dataclass(frozen=True)
class Fit:
    """Model evaluations and errors, and the slope over the last few; NaN where fewer than two errors count."""

    nfe: list[int]
    errors: list[float]
    order: float
    used: int


def observe(
    measure: Callable[[int], tuple[int, float]], *, floor: float, enough: int = ENOUGH, last: int = LAST
) -> Fit:
    """Fit the order of what `measure` returns, (NFE, error), for about so many model evaluations.

    Args:
        measure: a run of about so many evaluations.
        floor: errors below it are rounding.
        enough: go so far in any case.
        last: and so far where the slope has not settled.
    """
    points: list[tuple[int, float]] = []
    calls = FIRST
    while calls <= last:
        point = measure(calls)
        if not points or point[0] > points[-1][0]:
            points.append(point)
        if not math.isfinite(point[1]) or (calls >= enough and (point[1] < floor or _settled(points))):
            break
        calls *= 2
    return fit(points, floor=floor)


def fit(points: list[tuple[int, float]], *, floor: float) -> Fit:
    """Fit the order to (NFE, error) pairs, in ascending NFE, up to the first error below `floor`."""
    above = []
    for calls, error in points:
        if not math.isfinite(error) or error < floor:
            break
        above.append((math.log(calls), math.log(error)))
    order, last = math.nan, above[-_POINTS:]
    if len(last) >= 2 and all(math.isfinite(error) for _, error in points):
        x_mean, y_mean = (sum(values) / len(last) for values in zip(*last, strict=True))
        order = -sum((x - x_mean) * (y - y_mean) for x, y in last) / sum((x - x_mean) ** 2 for x, _ in last)
    return Fit([calls for calls, _ in points], [error for _, error in points], order, len(last))


def _settled(points: list[tuple[int, float]]) -> bool:
    if len(points) < 3 or any(error <= 0 for _, error in points[-3:]):
        return False
    (n0, e0), (n1, e1), (n2, e2) = points[-3:]
    return abs(math.log(e1 / e0) / math.log(n1 / n0) - math.log(e2 / e1) / math.log(n2 / n1)) <= _SETTLED
