"""What a step of diffusers' solvers multiplies its tensors by: functions of a few numbers, in float64, remembered.

A step of any of them is a sum of tensors. The schedulers of diffusers find its coefficients again in every step, with
some ten to sixty operators on tensors of one element, in float32; here a coefficient is rounded once, by the kernel.
None where a coefficient is not finite (a schedule that the solver was not made for): there the original decides.

Solvers: Song, Meng & Ermon 2021 (DDIM); Karras et al. 2022 (Euler with churn); Lu et al. 2022, "DPM-Solver", and "DPM-
Solver++", appendices B and D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

Row = list[float]


def _finite(function: Callable[..., Iterable[float] | None]) -> Callable[..., Row | None]:
    """None instead of infinities, NaN and errors of arithmetic. Remembers what it has found; rows are not changed."""

    @functools.lru_cache(maxsize=8192)
    def checked(*args: Any) -> Row | None:
        try:
            row = function(*args)
        except (ZeroDivisionError, OverflowError, ValueError):
            return None
        if row is None:
            return None
        row = [float(c) for c in row]
        return row if all(map(math.isfinite, row)) else None

    return checked


# ------------------------------------------------------------------------------------------------------------- Euler


@_finite
def euler_data(prediction: str, sigma: float, hat: float) -> Iterable[float] | None:
    """The data x0 from (x, output), x being at the level `hat`, to which churn has raised `sigma`."""
    if prediction == "epsilon":
        return 1.0, -hat
    if prediction == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / math.sqrt(sigma**2 + 1)
    return (0.0, 1.0) if prediction in ("sample", "original_sample") else None


@_finite
def euler_move(prediction: str, sigma: float, hat: float, after: float) -> Iterable[float] | None:
    """The next state from (output, x): x + (after - hat) (x - x0) / hat."""
    data = euler_data(prediction, sigma, hat)
    if data is None:
        return None
    if prediction == "epsilon":
        return after - hat, 1.0
    share = (after - hat) / hat
    return -share * data[1], 1 + share - share * data[0]


# --------------------------------------------------------------------------------------------------------- DPM-Solver


def _levels(sigma: float, flow: bool) -> tuple[float, float, float]:
    """(alpha, sigma, half the log of their ratio squared) of a state alpha x0 + sigma e."""
    alpha = 1 - sigma if flow else 1 / math.sqrt(sigma**2 + 1)
    sigma = sigma if flow else sigma * alpha
    return alpha, sigma, _log(alpha) - _log(sigma)


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


@_finite
def solver_target(algorithm: str, prediction: str, flow: bool, sigma: float) -> Iterable[float] | None:
    """What the solver extrapolates from (x, output): the data for the ++ solvers, the noise for the others."""
    alpha, sigma_t, _ = _levels(sigma, flow)
    if algorithm in ("dpmsolver++", "sde-dpmsolver++"):
        rows: dict[str, Callable[[], Iterable[float]]] = {
            "epsilon": lambda: (1 / alpha, -sigma_t / alpha),
            "v_prediction": lambda: (alpha, -sigma_t),
            "flow_prediction": lambda: (1.0, -sigma),
        }
    else:
        rows = {"sample": lambda: (1 / sigma_t, -alpha / sigma_t), "v_prediction": lambda: (sigma_t, alpha)}
    return rows[prediction]() if prediction in rows else None


@_finite
def solver_step(algorithm: str, kind: str, flow: bool, order: int, after: float, *sigmas: float) -> Iterable[float]:
    """The next state from the newest target, x, the older targets (order - 1 of them) and, of an SDE solver, noise.

    Args:
        algorithm: ``"dpmsolver++"``, ``"dpmsolver"`` or either with ``"sde-"``.
        kind: ``"midpoint"`` or ``"heun"``, of the second order.
        flow: levels are those of a flow, alpha = 1 - sigma.
        order: 1, 2 or 3.
        after: the level where the step goes.
        sigmas: the levels of the targets, newest first, as many as the order.
    """
    alpha_t, sigma_t, lambda_t = _levels(after, flow)
    alpha_s, sigma_s, lambda_s = _levels(sigmas[0], flow)
    h = lambda_t - lambda_s
    noise: list[float] = []
    # The exact solution for a target that is a polynomial in lambda: weights of its value and first two derivatives.
    if algorithm == "dpmsolver++":
        x, e = sigma_t / sigma_s, math.expm1(-h)
        weights = -alpha_t * e, lambda: alpha_t * (e / h + 1), lambda: -alpha_t * ((e + h) / h**2 - 0.5)
    elif algorithm == "dpmsolver":
        x, e = alpha_t / alpha_s, math.expm1(h)
        weights = -sigma_t * e, lambda: -sigma_t * (e / h - 1), lambda: -sigma_t * ((e - h) / h**2 - 0.5)
    elif algorithm == "sde-dpmsolver++":
        x, e = sigma_t / sigma_s * math.exp(-h), math.expm1(-2 * h)
        noise = [sigma_t * math.sqrt(-e)]
        weights = (
            -alpha_t * e,
            lambda: alpha_t * (e / (2 * h) + 1),
            lambda: alpha_t * ((-e - 2 * h) / (2 * h) ** 2 - 0.5),
        )
    elif algorithm == "sde-dpmsolver" and order < 3:
        x, e = alpha_t / alpha_s, math.expm1(h)
        noise = [sigma_t * math.sqrt(math.expm1(2 * h))]
        weights = -2 * sigma_t * e, lambda: -2 * sigma_t * (e / h - 1), lambda: math.nan
    else:
        return [math.nan]
    value, first, second = weights
    if order == 1:
        return [value, x, *noise]
    # Derivatives are differences: D = (m0 - m1) / r0 and, of the third order, that of those.
    r0 = (lambda_s - _levels(sigmas[1], flow)[2]) / h
    if order == 2:
        slope = (value / 2 if kind == "midpoint" else first()) / r0
        return [value + slope, x, -slope, *noise]
    r1 = (_levels(sigmas[1], flow)[2] - _levels(sigmas[2], flow)[2]) / h
    bend = (first() * r0 + second()) / (r0 + r1)  # weight of the difference of the two slopes
    newer, older = (first() + bend) / r0, bend / r1
    return [value + newer, x, -newer - older, older, *noise]
