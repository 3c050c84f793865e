"""The measurements of ``fastdiff certify``: one solver on one schedule, against oracles that know the answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _native
from fastdiff.cli._certify_fit import FIRST, observe
from fastdiff.cli._certify_promises import ENDS_AT_DATA, ERROR_CALLS, ORDER_SCHEDULES, PROMISES
from fastdiff.cli._certify_targets import ALL, GAUSSIANS, Oracle
from fastdiff.samplers import SOLVERS, Plan, make_plan, sample
from fastdiff.samplers.schedules import Schedule

__all__ = ["DTYPES", "INVERSIONS", "SCHEDULES", "Perfect", "cell_of", "finite", "order", "precision", "weak_order"]

SCHEDULES = {**ORDER_SCHEDULES, **ENDS_AT_DATA}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
_FLOOR = 1e-11  # of float64 runs: hundreds of steps and states of size 10 leave some 1e-13
_PRECISION_CALLS = 40
INVERSIONS = 50


@functools.cache
def schedule(name: str) -> Schedule:
    return SCHEDULES[name]()


@functools.cache
def oracle() -> Oracle:
    return Oracle(ALL)


@functools.lru_cache(maxsize=65536)
def _levels(name: str, t: float) -> tuple[float, float]:
    found = schedule(name)
    return found.alpha(t), found.sigma(t)


@dataclass
class Perfect:
    """A perfect network for a schedule and a prediction type. Remembers the times it was asked at."""

    schedule: str
    prediction: str
    oracle: Oracle
    times: list[float] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        time = float(t[0])
        self.times.append(time)
        output = self.oracle.predict(x.double(), *_levels(self.schedule, time), self.prediction)
        return output.to(x.dtype)


def run(plan: Plan, name: str, dtype: torch.dtype, *, device: str = "cpu") -> tuple[Tensor, Tensor, Perfect]:
    """(where the points ended, where they should have, the network)."""
    model = Perfect(name, plan.prediction, oracle())
    first, last = float(plan.times[0]), float(plan.times[-1])
    start = model.oracle.state(*_levels(name, first)) / plan.initial_scale
    end = sample(model, start.to(device, dtype), plan=plan, seed=0 if plan.stochastic else None)
    return end.double().cpu(), model.oracle.state(*_levels(name, last)), model


# --------------------------------------------------------------------------------------------------- deterministic


def order(solver: str, name: str, prediction: str, inverse: bool = False) -> dict[str, Any]:
    """The observed order in float64, and whether the network was asked at the times of the plan.

    With `inverse` of the same plan from data to noise.
    """
    promise, failures = PROMISES[solver], []

    def measure(calls: int) -> tuple[int, float]:
        plan = _plan(solver, name, prediction, calls)
        plan = plan.reversed() if inverse else plan
        end, exact, model = run(plan, name, torch.float64)
        if model.times != [stage.time for stage in plan.stages]:
            failures.append(f"{plan.steps} steps: the model was not asked at the times of the plan (rounded?)")
        return len(model.times), (end - exact).abs().max().item()

    found = observe(measure, floor=_FLOOR)
    reference = name == next(iter(ORDER_SCHEDULES))
    if not promise.kept_by(found.order, reference=reference):
        what = "order of the inversion" if inverse else "order"
        failures.append(f"{what} {found.order:.2f}, promised {promise.text(reference=reference)}")
    at = [error for called, error in zip(found.nfe, found.errors, strict=True) if called <= ERROR_CALLS]
    if reference and not inverse and not at[-1] <= promise.error:
        failures.append(f"error {at[-1]:.1e} at {ERROR_CALLS} evaluations, promised ≤ {promise.error:g}")
    return {
        **cell_of(solver, name, prediction),
        "inverse": inverse,
        "nfe": found.nfe,
        "errors": found.errors,
        "order": found.order,
        "fitted": found.used,
        "ok": not failures,
        "failures": failures,
    }


def _plan(solver: str, name: str, prediction: str, calls: int) -> Plan:
    """With as many steps as take about so many evaluations."""
    steps = max(1, round(calls / _stages_per_step(solver, name)))
    if "leading" in name:
        steps = min(steps, 999)  # more than the timesteps of training make no sense there
    return make_plan(solver, schedule(name), steps, prediction=prediction)


@functools.cache
def _stages_per_step(solver: str, name: str) -> int:
    return round(make_plan(solver, schedule(name), 8, prediction="v").nfe / 8)


def precision(solver: str, name: str, prediction: str, devices: Sequence[str]) -> list[dict[str, Any]]:
    """float32 and bfloat16 runs, by the kernels of every device and by the reference, against the float64 run."""
    plan = _plan(solver, name, prediction, _PRECISION_CALLS)
    truth, _, _ = run(plan, name, torch.float64)
    cells = []
    for dtype in ("float32", "bfloat16"):
        allowed = rounding(plan, name, torch.finfo(DTYPES[dtype]).eps)
        for device, backend in [*((device, "auto") for device in devices), ("cpu", "reference")]:
            with _native.use_backend(backend):
                end, _, _ = run(plan, name, DTYPES[dtype], device=device)
            error = (end - truth).abs().max().item()
            failures = [] if error <= allowed else [f"{error:.1e} from the float64 run, allowed {allowed:.1e}"]
            cells.append(
                {
                    **cell_of(solver, name, prediction, dtype),
                    "device": device,
                    "backend": backend,
                    "nfe": plan.nfe,
                    "error": error,
                    "allowed": allowed,
                    "ok": not failures,
                    "failures": failures,
                }
            )
    return cells


def rounding(plan: Plan, name: str, eps: float) -> float:
    """How far rounding may carry a run: every stage rounds each of its terms, and its error is carried to the end.

    A term rounds by eps / 2 of its size, once where it was stored and once for the time that the network was given; an
    error in a state shrinks (or grows) like the distance between neighbouring exact paths, of which the largest growth
    over the points is taken.
    """
    known = oracle()
    last = _levels(name, float(plan.times[-1]))
    spread_end = known.state(*last)
    gaps_end = _gaps(spread_end)
    states = [known.state(stage.alpha, stage.sigma) for stage in plan.stages]
    outputs = [
        known.predict(x, stage.alpha, stage.sigma, plan.prediction)
        for x, stage in zip(states, plan.stages, strict=True)
    ]
    sizes = {"x": [x.abs().max().item() for x in states], "m": [m.abs().max().item() for m in outputs]}
    total = 0.0
    for k, stage in enumerate(plan.stages):
        local = sum(abs(c) * (4.0 if kind == "n" else sizes[kind][k - lag]) for (kind, lag), c in stage.terms)
        after = states[k + 1] if k + 1 < len(states) else spread_end
        total += eps * local * max(1.0, (gaps_end / _gaps(after)).max().item())
    return total


def _gaps(x: Tensor) -> Tensor:
    points = x.reshape(-1, 6)  # the points of one target side by side
    return points.diff(dim=1).abs()


# ------------------------------------------------------------------------------------------------------- stochastic


def weak_order(solver: str, name: str, prediction: str) -> dict[str, Any]:
    """How fast the variance of a Gaussian target comes right, exactly; and that drawn samples have these moments.

    On a Gaussian target every state is an affine function of the initial noise and the drawn noises, so mean and
    variance after a run follow from the plan's coefficients without any sampling. A run of many samples then has to
    agree within five standard errors.
    """
    promise, failures = PROMISES[solver], []

    def measure(calls: int) -> tuple[int, float]:
        plan, worst = _plan(solver, name, prediction, calls), 0.0
        for target in GAUSSIANS:
            mean, deviation = _moments(plan, name, target.means[0], target.deviations[0])
            alpha, sigma = _levels(name, float(plan.times[-1]))
            right = math.hypot(alpha * target.deviations[0], sigma)
            worst = max(worst, abs(deviation - right), abs(mean - alpha * target.means[0]))
        return plan.nfe, worst

    found = observe(measure, floor=_FLOOR)
    reference = name == next(iter(ORDER_SCHEDULES))
    if not promise.kept_by(found.order, reference=reference):
        failures.append(f"order {found.order:.2f} of the moments, promised {promise.text(reference=reference)}")
    at = [error for called, error in zip(found.nfe, found.errors, strict=True) if called <= ERROR_CALLS]
    if reference and not at[-1] <= promise.error:
        failures.append(f"error {at[-1]:.1e} of the moments at {ERROR_CALLS} evaluations, promised ≤ {promise.error:g}")
    if reference and promise.consistent is not None:
        off = _inconsistency(solver, name, prediction)
        if not off <= promise.consistent:
            failures.append(f"moments with a perfect consistency function {off:.1e} off, ≤ {promise.consistent:g}")
    plan = _plan(solver, name, prediction, FIRST)
    z = _drawn(plan, name)
    if not z <= 5:
        failures.append(f"{plan.steps} steps: moments of drawn samples are {z:.1f} standard errors off")
    return {
        **cell_of(solver, name, prediction),
        "nfe": found.nfe,
        "errors": found.errors,
        "order": found.order,
        "fitted": found.used,
        "standard_errors": z,
        "ok": not failures,
        "failures": failures,
    }


def _inconsistency(solver: str, name: str, prediction: str) -> float:
    """How far mean and deviation are from the data's, with a perfect consistency function as the network."""
    alpha, sigma = _levels(name, schedule(name).last)
    least = sigma / alpha if solver == "consistency" else 0.0  # where the paths are said to end
    plan, worst = make_plan(solver, schedule(name), 4, prediction=prediction), 0.0
    for target in GAUSSIANS:
        m, s = target.means[0], target.deviations[0]
        mean, deviation = _moments(plan, name, m, s, least)
        worst = max(worst, abs(mean - m), abs(deviation - math.hypot(s, least)))
    return worst


def _moments(plan: Plan, name: str, m: float, s: float, least: float | None = None) -> tuple[float, float]:
    """Mean and standard deviation at the end of a run on N(m, s^2), from the plan's coefficients.

    The network is perfect; with `least`, a perfect consistency function to that ratio of sigma to alpha.
    """
    first = _levels(name, float(plan.times[0]))
    # A state as [constant, weight of the initial state's standard normal, weights of the noises].
    state = np.zeros(2 + len(plan.stages))
    state[0], state[1] = first[0] * m, math.hypot(first[0] * s, first[1])
    states, outputs = [state], []
    for k, stage in enumerate(plan.stages):
        slope, offset = _affine(m, s, stage.alpha, stage.sigma, plan.prediction, least)
        output = slope * states[k]
        output[0] += offset
        outputs.append(output)
        following = np.zeros_like(state)
        for (kind, lag), c in stage.terms:
            if kind == "n":
                following[2 + k - lag] += c
            else:
                following += c * (states if kind == "x" else outputs)[k - lag]
        states.append(following)
    return float(states[-1][0]), float(np.linalg.norm(states[-1][1:]))


def _affine(
    m: float, s: float, alpha: float, sigma: float, prediction: str, least: float | None = None
) -> tuple[float, float]:
    """(slope, offset) of a perfect network's output in x; with `least`, see `_moments`."""
    variance = (alpha * s) ** 2 + sigma**2
    data, noise = alpha * s * s / variance, sigma / variance
    if least is not None:
        data = math.hypot(s, least) / math.sqrt(variance)
        noise = (1 - alpha * data) / sigma
    at_zero = m - data * alpha * m, -noise * alpha * m  # of data and noise, at x = 0
    if prediction == "epsilon":
        return noise, at_zero[1]
    if prediction == "sample":
        return data, at_zero[0]
    a, b = (alpha, -sigma) if prediction == "v" else (-1.0, 1.0)
    return a * noise + b * data, a * at_zero[1] + b * at_zero[0]


def _drawn(plan: Plan, name: str, samples: int = 16384) -> float:
    """Samples of the kernels in float32: the largest deviation of mean and variance, in standard errors."""
    worst = 0.0
    for index, target in enumerate(GAUSSIANS):
        m, s = target.means[0], target.deviations[0]
        generator = torch.Generator().manual_seed(index)
        alpha, sigma = _levels(name, float(plan.times[0]))
        noise = torch.randn(samples, 1, generator=generator)
        start = (alpha * m + math.hypot(alpha * s, sigma) * noise) / plan.initial_scale

        def model(x: Tensor, t: Tensor, cond: Any = None, m: float = m, s: float = s) -> Tensor:
            slope, offset = _affine(m, s, *_levels(name, float(t[0])), plan.prediction)
            return slope * x + offset

        end = sample(model, start, plan=plan, generator=generator).double()
        mean, deviation = _moments(plan, name, m, s)
        worst = max(worst, abs(end.mean().item() - mean) / (deviation / math.sqrt(samples)))
        variance = (end - mean).square().mean().item()
        worst = max(worst, abs(variance / deviation**2 - 1) / math.sqrt(2 / samples))
    return worst


# ---------------------------------------------------------------------------------------------------------- finite


def finite(solver: str, name: str, counts: Sequence[int], predictions: Sequence[str], every: int) -> dict[str, Any]:
    """Runs in float32 with each number of steps: finite results, and no exception.

    Numbers up to `every` are run with all prediction types, larger ones with each in its turn. A solver that draws no
    noise also runs from data to noise with up to `INVERSIONS` steps, with the next prediction type.
    """
    not_finite: list[str] = []
    raised, runs = {}, 0
    inverted = not SOLVERS[solver].stochastic
    generator = torch.Generator().manual_seed(0)
    for steps in counts:
        times = _times(name, steps)
        turn = steps % len(predictions)
        chosen = predictions if steps <= every else [predictions[turn]]
        cases = [(times, prediction, "") for prediction in chosen]
        if inverted and steps <= INVERSIONS:
            cases.append((times.flip(0), predictions[turn - 1], " inverse"))
        for case, prediction, way in cases:
            runs += 1
            try:
                plan = make_plan(solver, schedule(name), None, times=case, prediction=prediction)
                start = oracle().state(*_levels(name, float(plan.times[0])))[:, : _Affine.points] / plan.initial_scale
                end = sample(_Affine(name, prediction), start.float(), plan=plan, generator=generator)
                if not end.isfinite().all():
                    not_finite.append(f"{steps} {prediction}{way}")
            except Exception as error:
                raised[f"{steps} {prediction}{way}"] = _text(error)
    failures = []
    if not_finite:
        failures.append(f"not finite with {_some(not_finite)} steps")
    if raised:
        failures.append(f"raised with {_some(list(raised))} steps: {next(iter(raised.values()))}")
    return {
        "solver": solver,
        "schedule": name,
        "counts": [min(counts), max(counts)],
        "runs": runs,
        "not_finite": not_finite,
        "raised": raised,
        "ok": not failures,
        "failures": failures,
    }


@functools.lru_cache(maxsize=4096)
def _times(name: str, steps: int) -> Tensor:
    return schedule(name).times(steps)


class _Affine:
    """A perfect network for the Gaussians alone, in float32: one product and one sum."""

    points = 6 * len(GAUSSIANS)

    def __init__(self, name: str, prediction: str) -> None:
        self.name, self.prediction = name, prediction

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        slope, offset = _coefficients(self.name, self.prediction, float(t[0]))
        return torch.addcmul(offset, slope, x)


@functools.lru_cache(maxsize=65536)
def _coefficients(name: str, prediction: str, t: float) -> tuple[Tensor, Tensor]:
    pairs = [_affine(g.means[0], g.deviations[0], *_levels(name, t), prediction) for g in GAUSSIANS]
    slope, offset = torch.tensor(pairs, dtype=torch.float32).repeat_interleave(6, 0).unbind(1)
    return slope, offset


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" ... ({len(names)} in all)" if len(names) > 4 else "")


def cell_of(solver: str, name: str, prediction: str, dtype: str = "float64") -> dict[str, Any]:
    """What says which measurement a cell is of."""
    return {"solver": solver, "schedule": name, "prediction": prediction, "dtype": dtype}
