"""Multistep solvers: one evaluation a step, and those of the steps before.

A first step knows nothing before it. Its error counts once, so a method of order p needs a first step of order p - 1:
DDIM for second order, the two-stage step of `singlestep` for third.
"""

from __future__ import annotations

import numpy as np

from fastdiff.samplers.solvers._exponential import LIMIT, extrapolate
from fastdiff.samplers.solvers._run import Evaluation, Point, Run, Stage, Sum
from fastdiff.samplers.solvers.runge_kutta import rk4_step
from fastdiff.samplers.solvers.singlestep import two_stage

__all__ = ["adams_bashforth", "deis", "dpmpp_2m", "dpmpp_3m", "unipc"]


def dpmpp_2m(run: Run) -> tuple[Stage, ...]:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), Algorithm 2."""
    return _multistep(run, 2, "auto")


def dpmpp_3m(run: Run) -> tuple[Stage, ...]:
    """DPM-Solver++(3M): eq. 8 and 9 of Lu et al. with the parabola through three predictions, integrated exactly."""
    return _multistep(run, 3, "auto")


def deis(run: Run, order: int = 3) -> tuple[Stage, ...]:
    """DEIS, Zhang & Chen 2023 (arXiv:2204.13902), eq. 13-15: the noise as a polynomial of degree order - 1."""
    return _multistep(run, order, "noise")


def unipc(run: Run, order: int = 2) -> tuple[Stage, ...]:
    """UniPC, Zhao et al. 2023 (arXiv:2302.04867), Algorithms 5 and 6: UniP-p, then UniC-p at no further evaluation.

    The model is asked at the predicted states, and the corrected state is never asked about: it only starts the next
    prediction. Both are sums of the same tensors, so the two are one update:
    predicted_(k+1) = R (predicted_k - P_k + C_k) + P_(k+1), with R the ratio of levels.
    """
    known: list[Evaluation] = []
    predicted = run.start
    for k, to in enumerate(run.points[1:]):
        now = run.evaluate(predicted, run.points[k])
        corrected = now.x
        if known:
            # Predicted and corrected state go from the same one, which their difference does not hold.
            nodes = [known[0], now, *known[1:order]]
            corrected = now.x + _uni(run, nodes, now.point) - _uni(run, known[:order], now.point)
        known = [now, *known[:order]]
        if k == 0 and _needs_start(run, order):
            predicted, middle = two_stage(run, now, to)
            known.append(middle)
        else:
            predicted = _uni(run, known[:order], to, corrected)
        run.completed()
    return run.finish(predicted)


def _uni(run: Run, known: list[Evaluation], to: Point, base: Sum | None = None) -> Sum:
    return extrapolate(run, known, to, half=True, score=True, base=base)


def adams_bashforth(run: Run, order: int = 2) -> tuple[Stage, ...]:
    """Adams-Bashforth on dx/dt of the probability-flow ODE with uneven steps, of order 1 to 4.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, III.5; Runge-Kutta starts it where order > 2.
    """
    slopes: list[Sum] = []
    times: list[float] = []
    x = run.start
    for k, to in enumerate(run.points[1:]):
        now = run.evaluate(x, run.points[k])
        if run.schedule.kind == "vp" and now.point.sigma == 0.0:  # an inversion; sigma' is infinite
            x, _ = two_stage(run, now, to)
            run.completed()
            continue
        slopes, times = [run.slope(now), *slopes[: order - 1]], [now.point.t, *times[: order - 1]]
        if order > 2 and k < order - 1 and k + 1 < run.steps:
            x = rk4_step(run, now, to)
        else:
            x = now.x
            for weight, slope in zip(_adams_weights(times, to.t), slopes, strict=False):
                x = x + weight * slope
        run.completed()
    return run.finish(x)


def _adams_weights(times: list[float], to: float) -> list[float]:
    """Integrals from times[0] to `to` of the Lagrange polynomials on `times`, or on fewer where they would be large."""
    h = to - times[0]
    if h == 0.0:
        return [0.0]
    nodes = (np.array(times) - times[0]) / h
    for count in range(len(times), 1, -1):
        if np.diff(nodes[:count]).all():
            moments = 1 / np.arange(1.0, count + 1)
            weights = np.linalg.solve(np.vander(nodes[:count], increasing=True).T, moments)
            if np.abs(weights).sum() <= LIMIT:
                return [float(h * w) for w in weights]
    return [h]


def _needs_start(run: Run, order: int) -> bool:
    """Whether DDIM's first step would cost the order.

    For third order, and from data without noise: there E grows from 0, and it is the first step that misses it.
    """
    return run.steps > 1 and (order > 2 or (order == 2 and run.points[0].sigma == 0.0))


def _multistep(run: Run, order: int, form: str) -> tuple[Stage, ...]:
    known: list[Evaluation] = []
    x = run.start
    for k, to in enumerate(run.points[1:]):
        known = [run.evaluate(x, run.points[k]), *known[: order - 1]]
        if k == 0 and _needs_start(run, order):
            x, middle = two_stage(run, known[0], to)
            known.append(middle)
        else:
            x = extrapolate(run, known, to, form=form, half=True, score=form == "noise")
        run.completed()
    return run.finish(x)
