"""Sampling times that minimise the exact discretisation error of a solver on given data.

Align Your Steps (Sabour et al. 2024, arXiv:2404.14507) optimises times against an upper bound on the KL that is
estimated by sampling. For Gaussian data the error itself is known exactly and cheaply, for mixtures it is computed on
fixed paths; so here the error of the very solver and step count is what is minimised.

Times are t_k = t_0 + (t_N - t_0) sum_{j<k} softmax(g)_j: monotone whatever g is. g is that of the times started from,
plus a piecewise-linear function of a few knots, so that a long run has no more parameters than a short one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.analysis.budget import propagate
from fastdiff.analysis.gaussians import diagonal_kl, diagonal_w2
from fastdiff.analysis.oracles import GaussianOracle, MixtureOracle, Oracle
from fastdiff.samplers import Plan, make_plan, schedules

__all__ = ["OptimisedTimes", "discretisation_error", "optimise_times", "run_plan"]

MEASURES = ("w2", "kl")


@dataclass(frozen=True)
class OptimisedTimes:
    """What `optimise_times` found.

    Attributes:
        times: [N + 1] float64.
        before, after: the error on the times started from and on `times`.
        history: the error after every iteration.
        plan: the optimised run, for ``fastdiff.samplers.sample(..., plan=plan)``. Times are best for the interpolation
            that they were found with: another plan on them needs ``interpolation=plan.interpolation``.
        schedule: `fastdiff.samplers.schedules.from_times` of them, for any number of steps.
    """

    times: Tensor
    before: float
    after: float
    history: tuple[float, ...]
    plan: Plan
    schedule: schedules.Schedule


def discretisation_error(oracle: Oracle, plan: Plan, *, measure: str = "w2", paths: int = 256) -> float:
    """What the steps of a plan alone do wrong: exact network, exact start, compared at the plan's last time.

    Args:
        oracle: the data. Gaussian: distance of the laws, exact. Mixture: root mean square distance between the end
            points of the run and of the probability flow from the same starts (its closed form in one dimension,
            else a fine Runge-Kutta run), for plans that draw no noise.
        plan: from noise to data.
        measure: ``"w2"`` or, for Gaussian data, ``"kl"`` (exact || run).
        paths: number of starts for a mixture.

    Raises:
        ValueError: an unknown measure, or a mixture with a plan that draws noise or with ``"kl"``.
    """
    return _objective(oracle, plan.schedule, float(plan.times[0]), float(plan.times[-1]), measure, paths)(plan)


def optimise_times(
    oracle: Oracle,
    schedule: schedules.Schedule,
    solver: str,
    steps: int,
    *,
    prediction: str = "epsilon",
    times: Tensor | None = None,
    measure: str = "w2",
    knots: int = 8,
    iterations: int = 40,
    paths: int = 256,
    callback: Callable[[int, float], None] | None = None,
    **options: Any,
) -> OptimisedTimes:
    """Finds the times of a run for which the solver is most accurate on this data.

    First and last time stay. Give the spectrum of real data, with more different variances than knots: the errors of a
    few variances can be made to cancel exactly, which helps no others.

    Args:
        oracle: the data; see `discretisation_error`.
        schedule: the noise levels, and the times to start from.
        solver: name of a solver.
        steps: N, at least 2.
        prediction: as for `fastdiff.samplers.make_plan`.
        times: [N + 1], others to start from.
        measure: ``"w2"`` or, for Gaussian data, ``"kl"``.
        knots: parameters, at least 2; no more than N are used.
        iterations: of quasi-Newton's method (BFGS with forward differences).
        paths: as for `discretisation_error`.
        callback: ``callback(iteration, error)``.
        **options: the solver's.

    Returns:
        Times that are never worse than those started from.

    Raises:
        ValueError: an argument is not one of these or out of range.
    """
    if steps < 2 or knots < 2 or iterations < 1:
        got = f"{steps}, {knots}, {iterations}"
        raise ValueError(f"[optimise_times] steps, knots, iterations: expected at least 2, 2, 1, got {got}")

    def plan_on(points: Tensor) -> Plan:
        return make_plan(solver, schedule, steps, prediction=prediction, times=points, **options)

    first = plan_on(schedule.times(steps) if times is None else times)
    base = first.times.numpy()
    low, span = base[0], base[-1] - base[0]
    logits = np.log(np.diff(base) / span)
    spline = _hats(steps, min(knots, steps))
    error = _objective(oracle, schedule, float(base[0]), float(base[-1]), measure, paths)

    def points_of(theta: np.ndarray) -> Tensor:
        g = logits + spline @ theta
        weights = np.exp(g - g.max())
        inner = low + span * np.cumsum(weights)[:-1] / weights.sum()
        return torch.from_numpy(np.concatenate([base[:1], inner, base[-1:]]))

    def loss(theta: np.ndarray) -> float:
        points = points_of(theta)
        if not bool((points.diff() * span > 0).all()):
            return math.inf
        value = error(plan_on(points))
        return math.log(value) if value > 0 else -700.0

    theta, history = _bfgs(loss, np.zeros(spline.shape[1]), iterations, callback)
    before, after = error(first), math.exp(history[-1])
    best = first if after >= before else plan_on(points_of(theta))
    return OptimisedTimes(
        times=best.times,
        before=before,
        after=min(before, after),
        history=tuple(math.exp(v) for v in history),
        plan=best,
        schedule=schedules.from_times(schedule, best.times),
    )


def run_plan(plan: Plan, model: Callable[..., Tensor], x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Follows a plan step by step in float64, from a *state* x at its first level: slow, and plain enough to check by.

    Args:
        plan: any.
        model: ``model(x, t)``, t [].
        x: [B, ...], the state that the model is first asked about.
        generator: for plans that draw noise.
    """
    depth = 1 + max((lag for stage in plan.stages for (_, lag), _ in stage.terms), default=0)
    states: list[Tensor] = [x.double()]
    outputs: list[Tensor] = []
    noises: list[Tensor] = []
    for stage in plan.stages:
        outputs.insert(0, model(states[0], torch.tensor(stage.time, dtype=torch.float64)))
        noises.insert(0, torch.randn(x.shape, generator=generator, dtype=torch.float64) if plan.stochastic else x)
        kinds = {"x": states, "m": outputs, "n": noises}
        terms = [c * kinds[kind][lag] for (kind, lag), c in stage.terms]
        states.insert(0, torch.stack(terms).sum(0))
        for kept in (states, outputs, noises):
            del kept[depth:]
    return states[0]


def _objective(
    oracle: Oracle, schedule: schedules.Schedule, first: float, last: float, measure: str, paths: int
) -> Callable[[Plan], float]:
    if measure not in MEASURES:
        raise ValueError(f"[discretisation_error] measure: expected one of {MEASURES}, got {measure!r}")
    start = (schedule.alpha(first), schedule.sigma(first))
    end = (schedule.alpha(last), schedule.sigma(last))
    if isinstance(oracle, GaussianOracle):
        mean, variance = (v.numpy() for v in oracle.components())
        exact = (end[0] * mean, end[0] ** 2 * variance + end[1] ** 2)
        distance = diagonal_w2 if measure == "w2" else diagonal_kl
        return lambda plan: distance(exact, propagate(oracle, plan, start="exact").final)
    if not isinstance(oracle, MixtureOracle) or measure != "w2":
        raise ValueError(f"[discretisation_error] measure: expected 'w2' for {type(oracle).__name__}, got {measure!r}")
    x = oracle.diffuse(paths, *start, torch.Generator().manual_seed(0))
    if math.prod(oracle.shape) == 1:
        target = oracle.path(x, start, end)
    else:
        fine = _fine_plan(schedule, first, last)
        target = run_plan(fine, oracle.model(schedule, fine.prediction), x)

    def distance_of_paths(plan: Plan) -> float:
        if plan.stochastic:
            raise ValueError(f"[discretisation_error] plan: expected one without noise, got {plan.solver!r}")
        got = run_plan(plan, oracle.model(plan.schedule, plan.prediction), x)
        return float((got - target).square().reshape(paths, -1).sum(1).mean().sqrt())

    return distance_of_paths


def _fine_plan(schedule: schedules.Schedule, first: float, last: float, steps: int = 200) -> Plan:
    """Runge-Kutta on times that are even in the angle atan(sigma / alpha): bounded at both ends."""
    a, b = (math.atan2(schedule.sigma(t), schedule.alpha(t)) for t in (first, last))
    inner = schedule.time_at(torch.linspace(a, b, steps + 1, dtype=torch.float64)[1:-1].tan())
    ends = (torch.tensor([t], dtype=torch.float64) for t in (first, last))
    start, end = ends
    return make_plan("rk4", schedule, steps, prediction="v", times=torch.cat([start, inner, end]))


def _hats(size: int, knots: int) -> np.ndarray:
    """[size, knots]: piecewise-linear interpolation from knots."""
    position = np.linspace(0, knots - 1, size)
    return np.maximum(1 - np.abs(position[:, None] - np.arange(knots)), 0.0)


def _bfgs(
    loss: Callable[[np.ndarray], float], x: np.ndarray, iterations: int, callback: Callable[[int, float], None] | None
) -> tuple[np.ndarray, list[float]]:
    """Minimises by BFGS with a backtracking line search (Nocedal & Wright, algorithm 6.1); never goes up."""
    size, step = len(x), 1e-5
    inverse, value = np.eye(size), loss(x)
    history = [value]

    def gradient(at: np.ndarray, here: float) -> np.ndarray:
        return np.array([(loss(at + step * unit) - here) / step for unit in np.eye(size)])

    g = gradient(x, value)
    for iteration in range(iterations):
        direction = -inverse @ g
        if float(direction @ g) >= 0:
            inverse, direction = np.eye(size), -g
        length = min(1.0, 2.0 / max(float(np.abs(direction).max()), 1e-12))
        for _ in range(25):
            candidate = x + length * direction
            new = loss(candidate)
            if new <= value + 1e-4 * length * float(direction @ g):
                break
            length /= 2
        else:
            break
        new_gradient = gradient(candidate, new)
        s, y = candidate - x, new_gradient - g
        x, improvement, value, g = candidate, value - new, new, new_gradient
        history.append(value)
        if callback is not None:
            callback(iteration + 1, math.exp(value))
        curvature = float(s @ y)
        if curvature > 1e-12:
            left = np.eye(size) - np.outer(s, y) / curvature
            inverse = left @ inverse @ left.T + np.outer(s, s) / curvature
        if improvement < 1e-4:
            break
    return x, history
