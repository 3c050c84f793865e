"""log alpha of VP schedules as a smooth function of t, and its inverse.

Functions here take a float, an array or a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Function", "beta_values", "bounded", "cosine_log_alpha", "log_alpha_of", "namespace", "require", "time_of"]

_DEGREE = 24  # of the polynomial through log alpha_bar; its last coefficients are below 1e-16


def beta_values(betas: str | Sequence[float] | Tensor, T: int, first: float | None, last: float | None) -> np.ndarray:
    if not isinstance(betas, str):
        values = torch.as_tensor(betas, dtype=torch.float64).cpu().numpy()
        require("vp", values.shape == (T,), "betas", f"num_train_timesteps={T} values", values.shape)
        require("vp", bool(((values > 0) & (values < 1)).all()), "betas", "values in (0, 1)", values)
        return values
    if betas == "linear":
        low, high = 1e-4 if first is None else first, 0.02 if last is None else last
    elif betas == "scaled_linear":
        low, high = 8.5e-4 if first is None else first, 0.012 if last is None else last
    else:
        raise ValueError(f"[vp] betas: expected 'linear', 'scaled_linear', 'cosine' or numbers, got {betas!r}")
    require("vp", 0 < low < 1, "beta_start", "a number in (0, 1)", low)
    require("vp", 0 < high < 1, "beta_end", "a number in (0, 1)", high)
    return np.linspace(low, high, T) if betas == "linear" else np.linspace(low**0.5, high**0.5, T) ** 2


Function = Callable[[Any], Any]  # of a float, an array or a tensor


def log_alpha_of(betas: np.ndarray, *, smooth: bool) -> tuple[Function, Function]:
    """log alpha(t) and its derivative, through the sums of log(1 - beta) / 2 at t = 0..T-1 and 0 at t = -1."""
    T = len(betas)
    values = 0.5 * np.cumsum(np.log1p(-betas))
    if smooth:
        # log alpha = (t + 1) g(t): zero at -1 exactly. g is a polynomial in z, t scaled to [-1, 1].
        scale = T / 2
        knots = np.arange(T, dtype=np.float64) + 1
        series = np.polynomial.chebyshev.chebfit(knots / scale - 1, values / knots, min(_DEGREE, T - 1))
        small = np.abs(series) > 1e-18
        g = series[: int(small.nonzero()[0][-1]) + 1].tolist()
        rate = (np.polynomial.chebyshev.chebder(g) / scale).tolist()

        def value(t: Any) -> Any:
            return (t + 1) * _chebyshev(g, (t + 1) / scale - 1)

        def derivative(t: Any) -> Any:
            z = (t + 1) / scale - 1
            return _chebyshev(g, z) + (t + 1) * _chebyshev(rate, z)

        return value, derivative
    # A cubic spline, natural at both ends, on t = -1..T-1.
    points = np.append(0.0, values)
    second = np.zeros(T + 1)
    matrix = np.diag(np.full(T - 1, 4.0)) + np.diag(np.ones(T - 2), 1) + np.diag(np.ones(T - 2), -1)
    second[1:-1] = np.linalg.solve(matrix, 6 * np.diff(points, 2))
    slope = np.diff(points) - (2 * second[:-1] + second[1:]) / 6
    array = np.stack([points[:-1], slope, second[:-1] / 2, np.diff(second) / 6])
    tensor = torch.from_numpy(array)

    def piece(t: Any) -> tuple[Any, Any]:
        if isinstance(t, Tensor):
            index = (t + 1).floor().clamp(0, T - 1).long()
            return tensor.to(t.device)[:, index], t + 1 - index
        index = np.clip(np.floor(t + 1), 0, T - 1).astype(np.int64)
        return array[:, index], t + 1 - index

    def spline(t: Any) -> Any:
        (c0, c1, c2, c3), u = piece(t)
        return c0 + u * (c1 + u * (c2 + u * c3))

    def spline_rate(t: Any) -> Any:
        (_, c1, c2, c3), u = piece(t)
        return c1 + u * (2 * c2 + 3 * u * c3)

    return spline, spline_rate


def _chebyshev(series: list[float], z: Any) -> Any:
    """Clenshaw's recurrence."""
    b1 = b2 = 0.0 * z
    for c in series[:0:-1]:
        b1, b2 = c + 2 * z * b1 - b2, b1
    return series[0] + z * b1 - b2


def cosine_log_alpha(T: int) -> tuple[Function, Function, float]:
    """log cos(phi) / cos(phi_0), its derivative, and the time at which it reaches what the last beta leaves.

    That is 0.03 before T - 1 for T = 1000: cut to 0.999, it makes the last alpha_bar a little larger than the formula.
    """
    offset, unit = 0.008, math.pi / 2 / 1.008
    first = math.log(math.cos(offset * unit))

    def angle(t: Any) -> Any:
        return ((t + 1) / T + offset) * unit

    def value(t: Any) -> Any:
        xp = namespace(t)
        return xp.log(xp.cos(angle(t))) - first

    def derivative(t: Any) -> Any:
        return -namespace(t).tan(angle(t)) * unit / T

    start = (math.acos(math.cos(angle(T - 2.0)) * math.sqrt(1e-3)) / unit - offset) * T - 1
    return value, derivative, start


def time_of(function: Function, rate: Function, value: Any, low: float, high: float) -> Any:
    """The time in [low, high] at which a falling function takes a value; the nearer end beyond its range."""
    if not np.ndim(value):
        return _time_of_float(function, rate, float(value), low, high)
    t = np.zeros_like(value) + (low + high) / 2
    a, b = np.full_like(t, low), np.full_like(t, high)
    with np.errstate(invalid="ignore"):
        for _ in range(60):  # Newton's, or halving where it leaves the bracket
            excess = function(t) - value
            a, b = np.where(excess >= 0, t, a), np.where(excess <= 0, t, b)
            new = t - excess / rate(t)
            new = np.where((new > a) & (new < b), new, (a + b) / 2)
            done = np.all(np.abs(new - t) <= 1e-15 * (high - low))
            t = new
            if done:
                break
    return np.where(value >= function(low), low, np.where(value <= function(high), high, t))


def _time_of_float(function: Function, rate: Function, value: float, low: float, high: float) -> float:
    """The same for one number, without the price of arrays."""
    if value >= function(low):
        return low
    if value <= function(high):
        return high
    t, a, b = (low + high) / 2, low, high
    for _ in range(60):
        excess = float(function(t)) - value
        a, b = (t if excess >= 0 else a), (t if excess <= 0 else b)
        new = t - excess / float(rate(t))
        new = new if a < new < b else (a + b) / 2
        if abs(new - t) <= 1e-15 * (high - low):
            return new
        t = new
    return t


def bounded(t: Any, low: float, high: float) -> Any:
    """t cut to [low, high]; a float stays one, whose arithmetic is ten times as fast as numpy's."""
    return min(max(t, low), high) if isinstance(t, float) else namespace(t).clip(t, low, high)


def namespace(t: Any) -> Any:
    return torch if isinstance(t, Tensor) else np


def require(function: str, ok: bool, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"[{function}] {argument}: expected {expected}, got {got!r}")
