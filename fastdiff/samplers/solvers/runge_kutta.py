"""Runge-Kutta methods on dx/dt = alpha' data + sigma' noise, in the schedule's own t.

For a flow that is dx/dt = data - noise; for EDM dx/dsigma = noise, as in Karras et al. 2022 (arXiv:2206.00364), eq. 3;
for a VP schedule the ODE of Song et al. 2021 (arXiv:2011.13456), eq. 13, smooth in t up to both ends. The step onto
sigma = 0, where a VP schedule's sigma' is infinite and a prediction would be its own input, goes by the predictions
of the steps before, at the method's order (Karras et al. take Euler's step there).
"""

from __future__ import annotations

from collections.abc import Callable

from fastdiff.samplers.solvers._exponential import extrapolate
from fastdiff.samplers.solvers._run import Evaluation, Point, Run, Stage, Sum
from fastdiff.samplers.solvers.singlestep import two_stage

__all__ = ["heun", "heun_step", "midpoint", "rk4", "rk4_step"]


def heun(run: Run) -> tuple[Stage, ...]:
    """Heun's method: Karras et al. 2022, Algorithm 1."""
    return _one_step(run, 2, heun_step)


def heun_step(run: Run, now: Evaluation, to: Point) -> Sum:
    h, k_1 = to.t - now.point.t, run.slope(now)
    k_2 = run.slope(run.evaluate(now.x + h * k_1, to))
    return now.x + h / 2 * (k_1 + k_2)


def midpoint(run: Run) -> tuple[Stage, ...]:
    """The explicit midpoint rule."""
    return _one_step(run, 2, midpoint_step)


def midpoint_step(run: Run, now: Evaluation, to: Point) -> Sum:
    h, half = to.t - now.point.t, run.at((now.point.t + to.t) / 2)
    return now.x + h * run.slope(run.evaluate(now.x + h / 2 * run.slope(now), half))


def rk4(run: Run) -> tuple[Stage, ...]:
    """The classical method of fourth order (Kutta, 1901)."""
    return _one_step(run, 4, rk4_step)


def rk4_step(run: Run, now: Evaluation, to: Point) -> Sum:
    h, half = to.t - now.point.t, run.at((now.point.t + to.t) / 2)
    k_1 = run.slope(now)
    k_2 = run.slope(run.evaluate(now.x + h / 2 * k_1, half))
    k_3 = run.slope(run.evaluate(now.x + h / 2 * k_2, half))
    k_4 = run.slope(run.evaluate(now.x + h * k_3, to))
    return now.x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def _one_step(run: Run, order: int, step: Callable[[Run, Evaluation, Point], Sum]) -> tuple[Stage, ...]:
    known: list[Evaluation] = []
    x = run.start
    for now, to in zip(run.points[:-1], run.points[1:], strict=True):
        known = [run.evaluate(x, now), *known[: order - 1]]
        if to.sigma == 0.0:
            x = extrapolate(run, known, to)
        elif run.schedule.kind == "vp" and now.sigma == 0.0:  # an inversion; sigma' is infinite
            x, _ = two_stage(run, known[0], to)
        else:
            x = step(run, known[0], to)
        run.completed()
    return run.finish(x)
