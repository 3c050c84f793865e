"""Rates from errors: the order of a sampler, and how error falls with the number of training samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastdiff.analysis._student import interval_factor

__all__ = ["ObservedOrder", "SampleComplexity", "observed_order", "sample_complexity"]


@dataclass(frozen=True)
class ObservedOrder:
    """A fitted order.

    Attributes:
        order: minus the slope of log(error) against log(steps).
        low, high: interval of the slope (Student's t; wide if few points were left).
        local: orders between neighbours, all of them.
        used: step counts of the fit.
        floor: step counts at which rounding, not the method, decides the error; left out of the fit.
    """

    order: float
    low: float
    high: float
    local: tuple[float, ...]
    used: tuple[int, ...]
    floor: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def observed_order(
    steps: Sequence[int],
    errors: Sequence[float],
    *,
    scale: float = 1.0,
    epsilon: float = 2.0**-52,
    last: int | None = None,
    confidence: float = 0.95,
) -> ObservedOrder:
    """Fits the order of a method to its errors, without the part where rounding has taken over.

    A point is on the rounding floor if its error is at most 4 epsilon sqrt(steps) scale, which that many roundings of
    numbers of size `scale` can reach; or if from its predecessor on the order has fallen below half of the largest
    before, within a factor 1000 of that level.

    Args:
        steps: rising step counts, at least two.
        errors: their errors, >= 0.
        scale: size of the numbers that are computed with.
        epsilon: of their type: 2^-52 for float64, 2^-23 for float32.
        last: fit only the last so many points above the floor, the most asymptotic ones; None: all.
        confidence: of the interval.

    Raises:
        ValueError: counts that do not rise, or fewer than two points above the floor.
    """
    n, e = np.asarray(steps, dtype=float), np.asarray(errors, dtype=float)
    if n.ndim != 1 or n.shape != e.shape or len(n) < 2 or not np.all(np.diff(n) > 0) or n[0] <= 0:
        raise ValueError(f"[observed_order] steps: expected two or more rising counts, got {list(steps)}")
    if not np.all(e >= 0) or not np.all(np.isfinite(e)):
        raise ValueError(f"[observed_order] errors: expected finite numbers >= 0, got {list(errors)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        local = -np.diff(np.log(e)) / np.diff(np.log(n))
    rounding = 4 * epsilon * np.sqrt(n) * scale
    end = len(n)
    for k in range(len(n)):
        before = local[: k - 1].max() if k >= 2 else math.inf
        flat = k >= 2 and e[k] < 1000 * rounding[k] and local[k - 1] < 0.5 * before
        if e[k] <= rounding[k] or flat:
            end = k
            break
    if end < 2:
        raise ValueError(f"[observed_order] errors: expected two or more above rounding, got {list(errors)}")
    begin = 0 if last is None else max(0, end - max(last, 2))
    slope, low, high = _fit(np.log(n[begin:end]), np.log(e[begin:end]), confidence)
    counts = [int(v) for v in n]
    return ObservedOrder(-slope, -high, -low, tuple(map(float, local)), tuple(counts[begin:end]), tuple(counts[end:]))


@dataclass(frozen=True)
class SampleComplexity:
    """Error against the number of samples.

    Attributes:
        sizes: numbers of samples n.
        means: mean error of each.
        lows, highs: confidence intervals of the means.
        rate: r of error ~ C n^-r, fitted to the logarithms of all errors.
        rate_low, rate_high: its interval.
        constant: C.
        errors: all errors, a row for each size.
    """

    sizes: tuple[int, ...]
    means: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    rate: float
    rate_low: float
    rate_high: float
    constant: float
    errors: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def samples_for(self, error: float) -> float:
        """The number of samples at which the fitted line reaches an error (infinite if it does not fall).

        Raises:
            ValueError: an error that is not a positive number.
        """
        if not error > 0:
            raise ValueError(f"[SampleComplexity] error: expected a number > 0, got {error}")
        exponent = math.log(self.constant / error) / self.rate if self.rate > 0 else math.inf
        return math.exp(exponent) if exponent < 700 else math.inf


def sample_complexity(
    run: Callable[[int, int], float],
    sizes: Sequence[int],
    *,
    repeats: int = 5,
    seed: int = 0,
    confidence: float = 0.95,
    callback: Callable[[int, int, float], None] | None = None,
) -> SampleComplexity:
    """Trains, or estimates, on growing samples and fits the rate at which the error falls.

    Args:
        run: ``run(n, seed) -> error > 0``: learn from n samples drawn with that seed and measure the error.
        sizes: two or more rising numbers of samples.
        repeats: runs of each size, at least 2, all with different seeds.
        seed: the first seed.
        confidence: of all intervals.
        callback: ``callback(n, seed, error)`` after every run.

    Raises:
        ValueError: sizes or repeats that do not fit, or an error that is not a positive number.
    """
    counts = [int(n) for n in sizes]
    if len(counts) < 2 or counts[0] < 1 or any(b <= a for a, b in itertools.pairwise(counts)):
        raise ValueError(f"[sample_complexity] sizes: expected two or more rising numbers, got {list(sizes)}")
    if repeats < 2:
        raise ValueError(f"[sample_complexity] repeats: expected at least 2, got {repeats}")
    errors = np.empty((len(counts), repeats))
    for i, n in enumerate(counts):
        for j in range(repeats):
            this = seed + i * repeats + j
            errors[i, j] = value = float(run(n, this))
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"[sample_complexity] run: expected a positive error, got {value} at n = {n}")
            if callback is not None:
                callback(n, this, value)
    means = errors.mean(1)
    half = interval_factor(repeats - 1, confidence) * errors.std(1, ddof=1) / math.sqrt(repeats)
    # Every run counts as a point, so that the interval of the rate knows how far the runs scatter.
    slope, low, high = _fit(np.log(np.repeat(counts, repeats)), np.log(errors.ravel()), confidence)
    constant = math.exp(float(np.mean(np.log(errors))) - slope * float(np.mean(np.log(counts))))
    return SampleComplexity(
        tuple(counts), tuple(map(float, means)), tuple(map(float, np.maximum(means - half, 0.0))),
        tuple(map(float, means + half)), -slope, -high, -low, constant, tuple(tuple(map(float, row)) for row in errors),
    )  # fmt: skip


def _fit(x: np.ndarray, y: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Least-squares slope and its interval."""
    dx = x - x.mean()
    slope = float(dx @ (y - y.mean()) / (dx @ dx))
    freedom = len(x) - 2
    if freedom < 1:
        return slope, -math.inf, math.inf
    residual = y - y.mean() - slope * dx
    half = interval_factor(freedom, confidence) * math.sqrt(float(residual @ residual) / freedom / float(dx @ dx))
    return slope, slope - half, slope + half
