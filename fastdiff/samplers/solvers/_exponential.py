"""Exponential integration of the probability-flow ODE: the weights that all multistep solvers share.

With data D and noise E (x = alpha D + sigma E), the ODE is solved exactly by (DPM-Solver++, Lu et al. 2022,
arXiv:2211.01095, eq. 8; DPM-Solver, arXiv:2206.00927, eq. 3.4)

    x_t = sigma_t / sigma_s x_s + sigma_t int_s^t D d(alpha / sigma)
        = alpha_t / alpha_s x_s + alpha_t int_s^t E d(sigma / alpha)

For constant D or E this is DDIM's step, alpha_t D_s + sigma_t E_s, finite at both ends. :func:`extrapolate` adds the
rest: D - D_s (or E - E_s) replaced by the polynomial through known values and integrated, with a polynomial in

- lambda = log(alpha / sigma), as in the papers, where the times of the run are even in it; or
- a *bounded* variable in which the ODE's solution is smooth up to both ends. In lambda it is not: towards data D
  depends on (sigma / alpha)^2, and with times that are even in t the steps in lambda do not shrink there, so that
  second-order methods fall to order one. The variable is sigma^2 / (sigma^2 + alpha sqrt(alpha^2 + sigma^2)) for D
  (like (sigma / alpha)^2 towards data and 1 - alpha / sigma towards noise) and sigma / (alpha + sigma) for E.

A polynomial that would multiply errors of the model more than `LIMIT` times loses its oldest node; so coinciding nodes,
infinite lambdas and wildly uneven steps lower the order of that step instead of giving infinities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastdiff.samplers.solvers._run import Evaluation, Point, Run, Sum

__all__ = ["between", "extrapolate", "radau_point"]

LIMIT = 16.0  # the sum of absolute weights over their sum; 15 for cubic extrapolation by one even step
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
Levels = tuple[np.ndarray, np.ndarray]


def extrapolate(
    run: Run,
    known: Sequence[Evaluation],
    to: Point,
    *,
    form: str = "auto",
    half: bool = False,
    score: bool = False,
    base: Sum | None = None,
) -> Sum:
    """The state at `to` from evaluations at and before (or beyond) the present.

    Args:
        run: says which variable to interpolate in.
        known: the present evaluation first, then others; as many as the order of the method.
        to: where to.
        form: ``"data"`` integrates D, ``"noise"`` E; ``"auto"``: D towards data, E towards noise; ``"sde"``: the
            mean of the reverse SDE in place of the ODE, with D.
        half: in lambda and with two nodes, half the difference in place of the integral of the line, as
            DPM-Solver++ (Algorithms 1 and 2) and UniPC with B_2 (Zhao et al. 2023, arXiv:2302.04867) have it.
        score: outside lambda, integrate alpha E / sigma where sigma < alpha; for methods that evaluate the model at
            states of lower order, to which D answers one to one near data, and E / sigma hardly.
        base: the state to go from, where it is not the one that the model was asked about.
    """
    now = known[0]
    if form == "auto":
        form = _form(run, now.point, score)
    elif form == "noise" and score and _form(run, now.point, score) == "score":
        form = "score"
    points = [e.point for e in known]
    total = _total(points[0], to, form)
    while len(points) > 1 and math.isfinite(total) and total != 0.0:
        weights = _weights(points, to, form, run.logarithmic, half)
        spread = abs(total - sum(weights)) + sum(abs(w) for w in weights)
        if spread <= LIMIT * abs(total):
            if form == "score":
                step = _ratio(form, points[0], to) * now.x + (total - sum(weights)) * _score(now)
                for w, other in zip(weights, known[1:], strict=False):
                    step = step + w * _score(other)
            else:
                step = _constant(run, form, now, to)
                for w, other in zip(weights, known[1:], strict=False):
                    step = step + w * (other.noise - now.noise if form == "noise" else other.data - now.data)
            break
        points.pop()
    else:
        step = _constant(run, form, now, to)
    return step if base is None else step + _ratio(form, now.point, to) * (base - now.x)


def _ratio(form: str, now: Point, to: Point) -> float:
    """What a change of the state at `now` becomes at `to`, with all evaluations as they are."""
    return to.sigma / now.sigma if form == "data" else to.alpha / now.alpha


def _constant(run: Run, form: str, now: Evaluation, to: Point) -> Sum:
    """The step for a D or E that does not change."""
    if form != "sde":
        return run.mix(now, to)
    shrink = now.point.alpha * to.sigma / (now.point.sigma * to.alpha)
    return (to.sigma / now.point.sigma * shrink) * now.x + _total(now.point, to, form) * now.data


def _score(e: Evaluation) -> Sum:
    return (e.point.alpha / e.point.sigma) * e.noise


def between(run: Run, now: Point, to: Point, part: float) -> Point:
    """A point on the way, `part` of it in the variable of interpolation."""
    if run.logarithmic and math.isfinite(now.log_snr) and math.isfinite(to.log_snr):
        return run.at(run.schedule.time_at(math.exp(-(now.log_snr + part * (to.log_snr - now.log_snr)))))
    first, last = (float(_data_variable((np.array(p.alpha), np.array(p.sigma)))) for p in (now, to))
    return _at_variable(run, first + part * (last - first))


def radau_point(run: Run, now: Point, to: Point) -> Point:
    """The point s_2 for which the line through the values at `now` and s_2 integrates parabolas exactly.

    For short steps it is 2/3 of the way, which is taken in lambda as in DPM-Solver-3.
    """
    if (run.logarithmic and math.isfinite(now.log_snr) and math.isfinite(to.log_snr)) or now == to:
        return between(run, now, to, 2 / 3)
    form = _form(run, now, score=True)
    levels, measure, _ = _path(now, to, form)
    first = float(_data_variable((np.array(now.alpha), np.array(now.sigma))))
    u = _data_variable(levels) - first
    return _at_variable(run, first + float((measure @ u**2) / (measure @ u)))


def _at_variable(run: Run, u: float) -> Point:
    """The inverse of `_data_variable`: with q = (1 - u) / u = r sqrt(1 + r^2), r = alpha / sigma."""
    if u <= 0.0:
        return run.at(run.schedule.time_at(0.0))
    q = max(1 - u, 0.0) / u
    r2 = 2 * q * q / (1 + math.sqrt(1 + 4 * q * q))
    return run.at(run.schedule.time_at(1 / math.sqrt(r2) if r2 > 0 else math.inf))


def _form(run: Run, now: Point, score: bool) -> str:
    if not run.forward:
        return "noise"
    return "score" if score and not run.logarithmic and 0 < now.sigma < now.alpha else "data"


def _total(now: Point, to: Point, form: str) -> float:
    """The integral of 1, which is the weight of a constant D or E."""
    if form == "score":
        return to.alpha * ((to.sigma / to.alpha) ** 2 - (now.sigma / now.alpha) ** 2) / 2
    if form == "sde":
        return to.alpha * (1 - (now.alpha * to.sigma / (now.sigma * to.alpha)) ** 2)
    if form == "data":
        return to.alpha - to.sigma * now.alpha / now.sigma if now.sigma > 0 else math.nan
    return to.sigma - to.alpha * now.sigma / now.alpha if now.alpha > 0 else math.nan


def _weights(points: Sequence[Point], to: Point, form: str, logarithmic: bool, half: bool) -> list[float]:
    """Integrals of the Lagrange polynomials of all nodes but the first."""
    lambdas = [p.log_snr for p in points]
    variable = _noise_variable if form == "noise" else _data_variable
    if logarithmic and all(map(math.isfinite, [to.log_snr, *lambdas])):
        variable = _log_variable
        if half and len(points) == 2:
            gap = lambdas[1] - lambdas[0]
            total = _total(points[0], to, form)
            return [total * (to.log_snr - lambdas[0]) / (2 * gap)] if gap else [math.inf]
    nodes = variable((np.array([p.alpha for p in points]), np.array([p.sigma for p in points])))
    levels, measure, scale = _path(points[0], to, form)
    u = variable(levels)
    weights = []
    for j in range(1, len(points)):
        polynomial = np.ones_like(u)
        for i in range(len(points)):
            if i != j:
                gap = nodes[j] - nodes[i]
                if gap == 0:
                    return [math.inf] * (len(points) - 1)
                polynomial = polynomial * (u - nodes[i]) / gap
        weights.append(float(scale * (measure @ polynomial)))
    return weights


def _log_variable(levels: Levels) -> np.ndarray:
    return np.log(levels[0]) - np.log(levels[1])


def _data_variable(levels: Levels) -> np.ndarray:
    alpha, sigma = levels
    return sigma**2 / (sigma**2 + alpha * np.hypot(alpha, sigma))


def _noise_variable(levels: Levels) -> np.ndarray:
    return levels[1] / (levels[0] + levels[1])


def _path(now: Point, to: Point, form: str) -> tuple[Levels, np.ndarray, float]:
    """Levels along the way from `now` to `to` (up to a common factor), quadrature weights, and a factor.

    The variable of integration is alpha / sigma for D and sigma / alpha for E, divided by its value at the end where
    that may be infinite: alpha_t int_{w_s}^1 D dw with w = (alpha / sigma) / (alpha_t / sigma_t).
    """
    if form == "score":
        w, measure = _quadrature(now.sigma / now.alpha, to.sigma / to.alpha)
        return (np.ones_like(w), w), measure * w, to.alpha
    if form == "sde":  # x_t = ... + 2 alpha_t int w D dw
        levels, measure, scale = _path(now, to, "data")
        return levels, 2 * measure * levels[0] / to.alpha, scale
    first, second = (now.alpha, now.sigma) if form == "data" else (now.sigma, now.alpha)
    first_to, second_to = (to.alpha, to.sigma) if form == "data" else (to.sigma, to.alpha)
    if first * second_to <= first_to * second:  # the ratio grows
        w, measure = _quadrature(first * second_to / (second * first_to), 1.0)
        grown, other, scale = w * first_to, np.full_like(w, second_to), first_to
    else:
        w, measure = _quadrature(first / second, first_to / second_to)
        grown, other, scale = w, np.ones_like(w), second_to
    return ((grown, other) if form == "data" else (other, grown)), measure, scale


def _quadrature(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre on panels of [a, b], a, b >= 0, of which the ends are at most 4 apart in ratio."""
    low, high = min(a, b), max(a, b)
    edges = [high]
    while low < edges[-1] / 4 and edges[-1] > 1e-9 * high:
        edges.append(edges[-1] / 4)
    if edges[-1] > low:
        edges.append(low)
    ends = np.array(edges[::-1])
    half = np.diff(ends)[:, None] / 2
    points = (ends[:-1, None] + half) + half * _NODES
    return points.ravel(), (half * _WEIGHTS).ravel() * (1.0 if b >= a else -1.0)
