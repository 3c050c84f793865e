"""Solvers that draw noise on the way, and multistep sampling of consistency models."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from fastdiff.samplers.solvers._exponential import extrapolate
from fastdiff.samplers.solvers._run import Evaluation, Point, Run, Stage, Sum
from fastdiff.samplers.solvers.runge_kutta import heun_step

__all__ = ["consistency", "dpmpp_2m_sde", "lcm", "restart"]


def dpmpp_2m_sde(run: Run) -> tuple[Stage, ...]:
    """SDE-DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), eq. 18 and Appendix.

    x_t = sigma_t / sigma_s e^-h x_s + alpha_t (1 - e^-2h) D + sigma_t sqrt(1 - e^-2h) z, with D as in the 2M solver.
    """
    known: list[Evaluation] = []
    x = run.start
    for now, to in zip(run.points[:-1], run.points[1:], strict=True):
        known = [run.evaluate(x, now), *known[:1]]
        x = extrapolate(run, known, to, form="sde", half=True)
        spread = to.sigma * math.sqrt(max(1 - _shrink(now, to) ** 2, 0.0))
        if spread > 0:
            x = x + spread * run.noise()
        run.completed()
    return run.finish(x)


def _shrink(now: Point, to: Point) -> float:
    """e^-h, h = lambda_t - lambda_s."""
    return now.alpha * to.sigma / (now.sigma * to.alpha)


def consistency(run: Run) -> tuple[Stage, ...]:
    """Multistep consistency sampling: Song et al. 2023 (arXiv:2303.01469), Algorithm 1.

    The model's data prediction is the consistency function. Between evaluations its data is noised to the next level,
    less the noise of the least level `schedule.last`, which that data still carries.
    """
    rest = run.at(run.schedule.last)
    least = rest.sigma / rest.alpha
    x = run.start
    for k, to in enumerate(run.points[1:]):
        data = run.evaluate(x, run.points[k]).data
        x = data
        if k + 1 < run.steps:
            spread = math.sqrt(max(to.sigma**2 - (to.alpha * least) ** 2, 0.0))
            x = to.alpha * data + spread * run.noise()
        run.completed()
    return run.finish(x)


def lcm(run: Run, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Stage, ...]:
    """Latent consistency models: Luo et al. 2023 (arXiv:2310.04378), Algorithm 3 and eq. 9.

    f = c_skip x + c_out data with c_skip = sigma_data^2 / ((s t)^2 + sigma_data^2) and c_out = s t / sqrt((s t)^2 +
    sigma_data^2), s the timestep scaling. Between evaluations f is noised to the next level.
    """
    x = run.start
    for k, to in enumerate(run.points[1:]):
        e = run.evaluate(x, run.points[k])
        scaled = timestep_scaling * e.point.t
        power = scaled**2 + sigma_data**2
        x = sigma_data**2 / power * e.x + scaled / math.sqrt(power) * e.data
        if k + 1 < run.steps:
            x = to.alpha * x + to.sigma * run.noise()
        run.completed()
    return run.finish(x)


Interval = tuple[float, float, int, int]


def restart(run: Run, intervals: tuple[Interval, ...] = ((0.06, 0.3, 2, 3),), rho: float = 7.0) -> tuple[Stage, ...]:
    """Restart sampling: Xu et al. 2023 (arXiv:2306.14878), Algorithm 2, with Heun steps.

    Each interval is (least, most, times, steps) with levels in sigma / alpha: when the run has come to the time
    nearest to `least`, noise lifts it to `most` and it comes back in so many steps, so many times over. With so few
    steps that none of its times lies below `most` there is nothing to restart: such a run is Heun's and draws no noise.
    """
    for interval in intervals:
        least, most, times, count = interval
        whole = all(isinstance(n, int) and n >= 1 for n in (times, count))
        if not 0.0 < least < most < math.inf or not whole:
            expected = "(least, most, times, steps) with 0 < least < most and integers of at least 1"
            raise ValueError(f"[make_plan] intervals: expected {expected}, got {interval!r}")
    if not 0.0 < rho < math.inf:
        raise ValueError(f"[make_plan] rho: expected a number above 0, got {rho!r}")
    ratios = [p.sigma / p.alpha if p.alpha else math.inf for p in run.points]
    at: dict[int, list[Interval]] = {}
    for interval in intervals:
        inner = range(1, run.steps)
        if inner:
            nearest = min(inner, key=lambda k: abs(ratios[k] - interval[0]))
            if 0.0 < ratios[nearest] < interval[1]:
                at.setdefault(nearest, []).append(interval)
    x = run.start
    known: list[Evaluation] = []
    for k, to in enumerate(run.points[1:]):
        known = [run.evaluate(x, run.points[k]), *known[:1]]
        x = extrapolate(run, known, to) if to.sigma == 0.0 else heun_step(run, known[0], to)
        for _, most, times, steps in at.get(k + 1, []):
            x = _lift(run, x, to, ratios[k + 1], most, times, steps, rho)
            known = []
        run.completed()
    return run.finish(x)


def _lift(run: Run, x: Sum, low: Point, least: float, most: float, times: int, steps: int, rho: float) -> Sum:
    levels = np.linspace(most ** (1 / rho), least ** (1 / rho), steps + 1) ** rho
    points = [run.at(run.schedule.time_at(float(level))) for level in levels[:-1]] + [low]
    high = points[0]
    reached = high.sigma / high.alpha
    for _ in range(times):
        x = high.alpha / low.alpha * x + high.alpha * math.sqrt(max(reached**2 - least**2, 0.0)) * run.noise()
        for now, to in pairwise(points):
            x = heun_step(run, run.evaluate(x, now), to)
    return x
