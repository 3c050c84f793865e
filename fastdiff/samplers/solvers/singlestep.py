"""Singlestep solvers of the exponential kind: several evaluations a step, nothing kept from the step before.

The one exception is the step onto sigma = 0, where the prediction at the end of the step would be its input: it goes
by the predictions of the steps before.
"""

from __future__ import annotations

from fastdiff.samplers.solvers._exponential import between, extrapolate, radau_point
from fastdiff.samplers.solvers._run import Evaluation, Point, Run, Stage, Sum

__all__ = ["dpmpp_2s", "dpmpp_3s", "two_stage"]


def dpmpp_2s(run: Run) -> tuple[Stage, ...]:
    """DPM-Solver++(2S), Lu et al. 2022 (arXiv:2211.01095), Algorithm 1 with r = 1/2."""
    return _singlestep(run, 2)


def dpmpp_3s(run: Run) -> tuple[Stage, ...]:
    """DPM-Solver-3 with data prediction: Lu et al. 2022 (arXiv:2206.00927), Algorithm 2, r_1 = 1/3 and r_2 = 2/3."""
    return _singlestep(run, 3)


def _singlestep(run: Run, order: int) -> tuple[Stage, ...]:
    known: list[Evaluation] = []
    x = run.start
    step = two_stage if order == 2 else three_stage
    for k, to in enumerate(run.points[1:]):
        known = [run.evaluate(x, run.points[k]), *known[: order - 1]]
        if to.sigma == 0.0 and run.forward and (k or run.prediction == "sample"):
            x = extrapolate(run, known, to)
        else:
            x, _ = step(run, known[0], to)
        run.completed()
    return run.finish(x)


def two_stage(run: Run, now: Evaluation, to: Point) -> tuple[Sum, Evaluation]:
    """One step of second order, and the evaluation on the way."""
    middle = between(run, now.point, to, 0.5)
    e = run.evaluate(run.mix(now, middle), middle)
    return extrapolate(run, [now, e], to, half=True, score=True), e


def three_stage(run: Run, now: Evaluation, to: Point) -> tuple[Sum, Evaluation]:
    """One step of third order: the line through the predictions at s and s_2 is integrated, s_1 only leads to s_2."""
    second = radau_point(run, now.point, to)
    first = between(run, now.point, second, 0.5)
    e_1 = run.evaluate(run.mix(now, first), first)
    e_2 = run.evaluate(extrapolate(run, [now, e_1], second, score=True), second)
    return extrapolate(run, [now, e_2], to, score=True), e_2
