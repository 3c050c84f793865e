"""Adaptive integration of the probability-flow ODE: Dormand-Prince 5(4) with dense output.

dx/dt = alpha' data + sigma' noise (Song et al. 2021, arXiv:2011.13456, eq. 13) in the schedule's own t, from noise to
data or back. The step size is decided on the host, so each step reads one number from the device.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.samplers.plan import DEEPEST, PREDICTIONS
from fastdiff.samplers.schedules import Schedule
from fastdiff.samplers.solvers import conversion

__all__ = ["Trajectory", "solve", "solve_ode"]

# Dormand & Prince, "A family of embedded Runge-Kutta formulae", 1980, as in Hairer, Norsett & Wanner, II.5, Table 5.2.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_B = _A[6]
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # fifth order minus fourth
# Continuous extension of fourth order (Hairer et al., II.6, eq. 6.12), by Shampine's coefficients.
_D = (
    -12715105075 / 11282082432, 0.0, 87487479700 / 32700410799, -10690763975 / 1880347072,
    701980252875 / 199316789632, -1453857185 / 822651844, 69997945 / 29380423,
)  # fmt: skip

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Trajectory:
    """The solution of an ODE.

    Attributes:
        times: accepted times, first to last.
        final: the state at the last time; of :func:`solve` the sample, one step to data further on if the schedule goes
            on to sigma = 0.
        nfe: evaluations of the right-hand side.
        rejected: steps that were tried and not taken.
    """

    times: tuple[float, ...]
    final: Tensor
    nfe: int
    rejected: int
    _pieces: tuple[tuple[Tensor, ...], ...] = ()

    def __call__(self, t: float) -> Tensor:
        """The state at any time between the first and the last, of fourth order.

        Raises:
            ValueError: it was solved without ``dense=True``, or t lies outside.
        """
        if not self._pieces:
            raise ValueError("[Trajectory] dense: expected a solution with dense=True, got one without")
        first, last = self.times[0], self.times[-1]
        if not min(first, last) <= t <= max(first, last):
            raise ValueError(f"[Trajectory] t: expected a time between {first} and {last}, got {t}")
        sign = 1.0 if last >= first else -1.0
        k = bisect_right([sign * s for s in self.times], sign * t) - 1
        k = min(max(k, 0), len(self._pieces) - 1)
        u = (t - self.times[k]) / (self.times[k + 1] - self.times[k])
        v = 1 - u
        # y0 + u (r2 + v (r3 + u (r4 + v r5)))
        return ops.linear_update((1.0, u, u * v, u * v * u, u * v * u * v), self._pieces[k])


def solve(
    model: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    dense: bool = False,
    inverse: bool = False,
    max_steps: int = 10_000,
) -> Trajectory:
    """Solves the probability-flow ODE between noise and data.

    It ends where the times of the schedule do, at the latest at ``schedule.last``, the least noise that the model
    knows, and from there takes DDIM's step to data if the schedule goes on to sigma = 0.

    Args:
        model: ``model(x, t, level) -> prediction`` with t [B] and level = sigma / alpha.
        x: [B, ...], standard normal noise, or data for an inversion.
        schedule: from ``fastdiff.samplers.schedules``.
        prediction: what the model predicts.
        rtol: tolerance relative to the state, per step, above 0.
        atol: absolute tolerance; at least 0.
        dense: keep what a state at any time needs (five tensors a step).
        inverse: from data (taken to be at the time where a run ends before that step) to noise.
        max_steps: give up after so many.

    Returns:
        the trajectory; ``.final`` is the sample.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the tolerance is not met within `max_steps`, or the model's output is not finite.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"[solve] prediction: expected one of {PREDICTIONS}, got {prediction!r}")
    noisy, clean = ode_times(schedule, prediction)
    velocity = flow_of(model, schedule, prediction)
    start = x if inverse else x * _initial_scale(schedule, noisy)
    first, last = (clean, noisy) if inverse else (noisy, clean)
    solution = solve_ode(
        lambda t, state: (velocity(t, state[0]),), (start,), first, last, rtol=rtol, atol=atol, dense=dense,
        max_steps=max_steps,
    )  # fmt: skip
    final, nfe = solution.final, solution.nfe
    if not inverse and schedule.sigma(clean) > 0.0 and schedule.times(1)[-1] == schedule.end:
        t = torch.full((len(final),), clean, dtype=torch.promote_types(final.dtype, torch.float32), device=final.device)
        alpha, sigma = schedule.alpha(clean), schedule.sigma(clean)
        (a, b), _ = conversion(prediction, alpha, sigma)
        final, nfe = ops.linear_update((a, b), (final, model(final, t, sigma / alpha))), nfe + 1
    return Trajectory(solution.times, final, nfe, solution.rejected, solution._pieces)


def ode_times(schedule: Schedule, prediction: str) -> tuple[float, float]:
    """The noisiest and the cleanest time between which the ODE's right-hand side is finite."""
    noisy, clean = schedule.start, schedule.last
    end = float(schedule.times(1)[-1])  # times of one's own may end in more noise
    if schedule.sigma(end) * schedule.alpha(clean) > schedule.sigma(clean) * schedule.alpha(end):
        clean = end
    if prediction == "epsilon" and schedule.alpha(noisy) * DEEPEST < schedule.sigma(noisy):
        noisy = schedule.time_at(DEEPEST)
    if prediction == "sample" and schedule.sigma(clean) * DEEPEST < schedule.alpha(clean):
        clean = schedule.time_at(1 / DEEPEST)
    return noisy, clean


def flow_of(
    model: Callable[[Tensor, Tensor, float], Tensor], schedule: Schedule, prediction: str
) -> Callable[[float, Tensor], Tensor]:
    """dx/dt of the probability-flow ODE, differentiable in x."""

    def velocity(t: float, x: Tensor) -> Tensor:
        p, q = velocity_factors(schedule, prediction, t)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        times = torch.full((len(x),), t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return ops.linear_update((p, q), (x, model(x, times, sigma / alpha if alpha else math.inf)))

    return velocity


def velocity_factors(schedule: Schedule, prediction: str, t: float) -> tuple[float, float]:
    """(p, q) of dx/dt = p x + q pred."""
    (a, b), (c, d) = conversion(prediction, schedule.alpha(t), schedule.sigma(t))
    alpha_rate, sigma_rate = schedule.alpha_rate(t), schedule.sigma_rate(t)
    return alpha_rate * a + sigma_rate * c, alpha_rate * b + sigma_rate * d


def _initial_scale(schedule: Schedule, t: float) -> float:
    return 1.0 if schedule.kind == "vp" else schedule.sigma(t)


# ---------------------------------------------------------------------------------------------------------- any ODE


def solve_ode(
    function: Callable[[float, State], State],
    start: State,
    first: float,
    last: float,
    *,
    rtol: float,
    atol: float,
    dense: bool = False,
    max_steps: int = 10_000,
) -> Trajectory:
    """Dormand-Prince 5(4) for a tuple of tensors; steps by a PI controller (Hairer et al., II.4 and IV.2).

    The error of a step is the largest root mean square over any tensor of any sample, relative to atol + rtol |y|.
    `Trajectory` holds the first tensor; the others' last values are in ``Trajectory.extra``.
    """
    if not rtol > 0 or not atol >= 0 or not math.isfinite(rtol + atol):
        raise ValueError(f"[solve_ode] rtol, atol: expected rtol > 0 and atol >= 0, got {rtol!r}, {atol!r}")
    span = last - first
    if span == 0.0:
        return _Solution((first,), start[0], 0, 0, (), start[1:])
    sign = math.copysign(1.0, span)
    y, t = start, first
    slope = function(t, y)
    nfe, rejected = 1, 0
    h = sign * _first_step(y, slope, abs(span), rtol, atol)
    times, pieces, previous = [t], [], 1.0
    for _ in range(max_steps):
        h = sign * min(abs(h), abs(last - t))
        reaches = abs(last - t) <= abs(h) * (1 + 1e-12)
        slopes = [slope]
        new = y
        for c, row in zip(_C[1:], _A[1:], strict=True):
            new = _combine(y, slopes, [h * a for a in row])
            slopes.append(function(last if reaches and c == 1.0 else t + c * h, new))
        nfe += 6
        error = _error(y, new, slopes, h, rtol, atol)
        if math.isfinite(error) and error <= 1.0:
            if dense:
                pieces.append(_piece(y[0], new[0], [s[0] for s in slopes], h))
            t = last if reaches else t + h
            y, slope = new, slopes[-1]
            times.append(t)
            if reaches:
                return _Solution(tuple(times), y[0], nfe, rejected, tuple(pieces), y[1:])
            error = max(error, 1e-10)
            h *= min(10.0, max(0.2, 0.9 * error**-0.17 * previous**0.04))
            previous = max(error, 1e-4)
        else:
            rejected += 1
            h *= max(0.1, 0.9 * error**-0.2) if math.isfinite(error) else 0.1
            if abs(h) < 1e-14 * max(abs(t), abs(span)):
                raise RuntimeError(
                    f"[solve_ode] step: expected a finite error above tolerance no more at t = {t}, got a step of {h}"
                )
    raise RuntimeError(f"[solve_ode] max_steps: expected the end within {max_steps} steps, got to t = {t} of {last}")


@dataclass(frozen=True)
class _Solution(Trajectory):
    extra: State = ()


def _combine(y: State, slopes: Sequence[State], factors: Sequence[float]) -> State:
    used = [i for i, f in enumerate(factors) if f != 0.0]
    return tuple(
        ops.linear_update([1.0, *(factors[i] for i in used)], [part, *(slopes[i][j] for i in used)])
        for j, part in enumerate(y)
    )


def _error(y: State, new: State, slopes: Sequence[State], h: float, rtol: float, atol: float) -> float:
    used = [i for i, e in enumerate(_ERROR) if e != 0.0]
    worst = []
    for j, (before, after) in enumerate(zip(y, new, strict=True)):
        difference = ops.linear_update([h * _ERROR[i] for i in used], [slopes[i][j] for i in used])
        scale = torch.maximum(before.abs(), after.abs()) * rtol + atol
        worst.append((difference / scale).detach().square().reshape(len(before), -1).mean(1).max().double())
    return math.sqrt(float(torch.stack(worst).max()))


def _first_step(y: State, slope: State, span: float, rtol: float, atol: float) -> float:
    """Hairer et al., II.4: a step that moves the state by a hundredth of itself."""
    sizes = []
    for part in (y, slope):
        norms = [
            (p.abs() / (b.abs() * rtol + atol)).detach().square().reshape(len(p), -1).mean(1).max().double()
            for p, b in zip(part, y, strict=True)
        ]
        sizes.append(math.sqrt(float(torch.stack(norms).max())))
    guess = 0.01 * sizes[0] / sizes[1] if sizes[0] > 1e-5 and sizes[1] > 1e-5 else 1e-6
    return min(guess, span) if math.isfinite(guess) else 1e-3 * span


def _piece(y: Tensor, new: Tensor, slopes: Sequence[Tensor], h: float) -> tuple[Tensor, ...]:
    r2 = ops.linear_update((1.0, -1.0), (new, y))
    r3 = ops.linear_update((h, -1.0), (slopes[0], r2))
    r4 = ops.linear_update((1.0, -h, -1.0), (r2, slopes[6], r3))
    used = [i for i, d in enumerate(_D) if d != 0.0]
    r5 = ops.linear_update([h * _D[i] for i in used], [slopes[i] for i in used])
    return y, r2, r3, r4, r5
