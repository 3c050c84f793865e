"""Quantiles of Student's t distribution, for intervals of fits on few points."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["interval_factor"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def interval_factor(freedom: int, confidence: float) -> float:
    """The t with P(|T| <= t) = confidence; infinite without a degree of freedom.

    With T = sqrt(n) tan(a), the density of a is proportional to cos(a)^(n - 1), smooth on a bounded interval.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"[analysis] confidence: expected a number in (0, 1), got {confidence}")
    if freedom < 1:
        return math.inf
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) * 2 / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = 0.5 * (low + high)
        inside = scale * 0.5 * angle * float(_WEIGHTS @ np.cos(0.5 * angle * (_NODES + 1)) ** (freedom - 1))
        low, high = (angle, high) if inside < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)
