"""Noise schedules: x_t = alpha(t) data + sigma(t) noise, t being what the model is given.

Everything is float64 and continuous in t, so that float timesteps mean something and a solver's order can be observed.
A schedule also says on which times a run of so many steps is done (:meth:`Schedule.times`).

- :func:`vp`: a trained DDPM schedule; t in [-1, T - 1], where t = k is the k-th training timestep and t = -1 is data.
- :func:`edm`: t is sigma itself, alpha = 1 (Karras et al. 2022, arXiv:2206.00364).
- :func:`flow`: alpha = t, sigma = 1 - t, from noise at t = 0 to data at t = 1 (Liu et al. 2022, arXiv:2209.03003).
- :func:`from_times`: any of these on times of one's own, e.g. optimised ones (Sabour et al. 2024, arXiv:2404.14507).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastdiff.samplers._vp import (
    Function,
    beta_values,
    bounded,
    cosine_log_alpha,
    log_alpha_of,
    namespace,
    require,
    time_of,
)

__all__ = ["Schedule", "edm", "flow", "from_times", "vp"]

Time = TypeVar("Time", float, Tensor)
SPACINGS = ("linspace", "trailing", "leading", "karras")


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule. Made by the functions of this module.

    Attributes:
        name: what it is, in words.
        kind: ``"vp"`` (alpha^2 + sigma^2 = 1), ``"edm"`` (alpha = 1) or ``"flow"`` (alpha + sigma = 1).
        start: the time with the most noise that a run may start from.
        end: the time of data, where sigma = 0.
        last: the time with the least noise that the model knows, where a run ends with ``final="min"``.
        log_spaced: times are spaced in sigma / alpha, so that steps of a logarithmic solver are even.
    """

    name: str
    kind: str
    start: float
    end: float
    last: float
    log_spaced: bool
    # Of a float, an array or a tensor: (alpha, sigma), their derivatives by t, and the time at a sigma / alpha.
    _levels: Callable[[Any], tuple[Any, Any]]
    _rates: Callable[[Any], tuple[Any, Any]]
    _time_at: Callable[[Any], Any]
    _grid: Callable[[int], np.ndarray]
    _range: tuple[float, float]  # of times that alpha and sigma are defined at
    _made_by: tuple[Callable[..., Schedule], tuple[Any, ...]]

    def alpha(self, t: Time) -> Time:
        """The factor of the data at time t, a number or a tensor of any shape, in float64."""
        return _apply(self._levels, t, 0)

    def sigma(self, t: Time) -> Time:
        """The factor of the noise at time t, a number or a tensor of any shape, in float64."""
        return _apply(self._levels, t, 1)

    def alpha_rate(self, t: Time) -> Time:
        """d alpha / dt."""
        return _apply(self._rates, t, 0)

    def sigma_rate(self, t: Time) -> Time:
        """d sigma / dt; not finite where sigma has a vertical tangent, at the data end of a VP schedule."""
        return _apply(self._rates, t, 1)

    def log_snr(self, t: Time) -> Time:
        """lambda = log(alpha / sigma), infinite at an end without data or noise."""
        if isinstance(t, Tensor):
            return self.alpha(t).log() - self.sigma(t).log()
        alpha, sigma = self._levels(float(t))
        if alpha == 0.0 or sigma == 0.0:
            return -math.inf if alpha == 0.0 else math.inf
        return math.log(alpha) - math.log(sigma)

    def time_at(self, ratio: Time) -> Time:
        """The time at which sigma / alpha is `ratio` >= 0, inf included; beyond the schedule its end."""
        if isinstance(ratio, Tensor):
            times = np.asarray(self._time_at(ratio.detach().double().cpu().numpy()))
            return torch.from_numpy(times).to(ratio.device)
        return float(self._time_at(float(ratio)))

    def times(self, steps: int) -> Tensor:
        """[steps + 1] float64: the times of a run, from noise to data.

        Raises:
            ValueError: fewer than one step, or more than T on leading times.
        """
        if isinstance(steps, bool) or int(steps) != steps or steps < 1:
            raise ValueError(f"[Schedule.times] steps: expected an integer of at least 1, got {steps!r}")
        return torch.from_numpy(np.ascontiguousarray(self._grid(int(steps)), dtype=np.float64))

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha(t) data + sigma(t) noise, with t [B] or a number: where training and editing start from."""
        from fastdiff import ops

        t = torch.as_tensor(t, dtype=torch.float64, device=data.device)
        return ops.linear_update((self.alpha(t), self.sigma(t)), (data, noise))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew: a schedule consists of functions."""
        return self._made_by

    def __repr__(self) -> str:
        return f"Schedule({self.name})"


def vp(
    betas: str | Sequence[float] | Tensor = "linear",
    num_train_timesteps: int = 1000,
    spacing: str = "linspace",
    final: str = "zero",
    *,
    beta_start: float | None = None,
    beta_end: float | None = None,
    rho: float = 7.0,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """A variance-preserving schedule of T training timesteps, continuous between them.

    alpha_bar at an integer t is the product of (1 - beta) that training used; between integers it is the smooth
    function through these points (a polynomial of degree 24 in t for linear and scaled-linear betas, the cosine itself
    for cosine betas, a spline for betas given as numbers).

    Args:
        betas: ``"linear"`` (Ho et al. 2020, arXiv:2006.11239), ``"scaled_linear"`` (linear in sqrt(beta); Stable
            Diffusion), ``"cosine"`` (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17, betas at most 0.999), or the T
            betas themselves.
        num_train_timesteps: T; at least 2.
        spacing: times of a run of N steps. ``"linspace"``: evenly from T - 1 to 0. ``"trailing"``: T - 1 - k T / N
            (Lin et al. 2024, arXiv:2305.08891, Table 2). ``"leading"``: from T - T / N to 0 (the first N of
            k T / N), for at most T steps. ``"karras"``: even in (sigma / alpha)^(1 / rho) from T - 1 to 0 (Karras et
            al., eq. 5).
        final: ``"zero"``: the last step goes to data, t = -1, where sigma = 0. ``"min"``: it ends at t = 0.
        beta_start: first beta; 1e-4 for linear and 8.5e-4 for scaled-linear unless given.
        beta_end: last beta; 0.02 and 0.012.
        rho: see ``"karras"``.
        zero_terminal_snr: rescale alpha so that it is 0 at T - 1 and unchanged at 0 (Lin et al., Algorithm 1).

    Raises:
        ValueError: an option is not one of these, or out of range.
    """
    whole = num_train_timesteps == int(num_train_timesteps)
    require("vp", whole and num_train_timesteps >= 2, "num_train_timesteps", "at least 2", num_train_timesteps)
    require("vp", spacing in SPACINGS, "spacing", f"one of {SPACINGS}", spacing)
    require("vp", final in ("zero", "min"), "final", "'zero' or 'min'", final)
    require("vp", 0 < rho < math.inf, "rho", "above 0", rho)
    T = int(num_train_timesteps)
    name = betas if isinstance(betas, str) else "given"
    start = float(T - 1)
    if name in ("cosine", "given"):
        for argument, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            require("vp", value is None, argument, f"None with {name} betas", value)
    if name == "cosine":
        log_alpha, log_alpha_rate, start = cosine_log_alpha(T)
    else:
        log_alpha, log_alpha_rate = log_alpha_of(
            beta_values(betas, T, beta_start, beta_end), smooth=isinstance(betas, str)
        )
    end = -1.0
    lost, factor = 0.0, 1.0  # alpha = (exp(log alpha) - lost) factor
    if zero_terminal_snr:
        lost, first = math.exp(log_alpha(start)), math.exp(log_alpha(0.0))
        factor = first / (first - lost)
        # The rescaled alpha reaches 1 a little before t = -1.
        end = float(time_of(log_alpha, log_alpha_rate, np.log(1 / factor + lost), -1.0, 0.0))

    def levels(t: Any) -> tuple[Any, Any]:
        xp = namespace(t)
        log = log_alpha(bounded(t, -1.0, start))
        if not zero_terminal_snr:
            return xp.exp(log), xp.sqrt(xp.clip(-xp.expm1(2 * log), 0.0, 1.0))
        alpha = xp.clip((xp.exp(log) - lost) * factor * (t < start), 0.0, 1.0)
        alpha = alpha + (1.0 - alpha) * (t <= end)
        return alpha, xp.sqrt((1 - alpha) * (1 + alpha))

    def rates(t: Any) -> tuple[Any, Any]:
        alpha, sigma = levels(t)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = log_alpha_rate(t) * (alpha + lost * factor)
            return rate, -alpha * rate / sigma

    def time_at(ratio: Any) -> Any:
        with np.errstate(divide="ignore"):
            log = np.log(1 / np.hypot(1.0, ratio) / factor + lost)
        return time_of(log_alpha, log_alpha_rate, log, end, start)

    def grid(steps: int) -> np.ndarray:
        if spacing == "karras":
            (alpha, sigma), (alpha_0, sigma_0) = levels(start), levels(0.0)
            deep = sigma > 1e3 * alpha
            first = float(time_at(1e3)) if deep else start
            largest = 1e3 if deep else sigma / alpha
            return _karras(steps, largest, sigma_0 / alpha_0, rho, final, time_at, (first, 0.0), end)
        most = T - (final == "min")  # beyond it, T - T / N would lie behind the first time of the schedule
        if spacing == "leading" and steps > most:
            raise ValueError(f"[Schedule.times] steps: expected at most {most} with leading times, got {steps}")
        if final == "min":
            if spacing == "leading":
                return np.minimum(np.arange(steps, -1, -1) * (start + 1) / (steps + 1), start)
            return np.linspace(start, 0.0, steps + 1)
        if spacing == "linspace":
            points = np.linspace(start, 0.0, steps) if steps > 1 else np.array([start])
        elif spacing == "trailing":
            points = start - np.arange(steps) * (start - end) / steps
        else:
            points = np.minimum(np.arange(steps - 1, -1, -1) * (start + 1) / steps, start)
        return np.append(points, end)

    text = f"vp {name} {spacing} {final}" + (" zero_terminal_snr" if zero_terminal_snr else "")
    given = betas if isinstance(betas, str) else torch.as_tensor(betas, dtype=torch.float64).tolist()
    options: dict[str, Any] = {
        "beta_start": beta_start,
        "beta_end": beta_end,
        "rho": rho,
        "zero_terminal_snr": zero_terminal_snr,
    }
    made_by = partial(vp, **options), (given, T, spacing, final)
    return Schedule(
        text, "vp", start, end, 0.0, spacing == "karras", levels, rates, time_at, grid, (-1.0, T - 1.0), made_by
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, *, final: str = "zero") -> Schedule:
    """x_t = data + t noise with t = sigma, on the grid of Karras et al. 2022 (arXiv:2206.00364), eq. 5.

    Args:
        sigma_min: the smallest noise level that the model is asked about, above 0.
        sigma_max: the largest, above sigma_min.
        rho: levels are even in sigma^(1 / rho).
        final: ``"zero"``: a last step goes from sigma_min to 0. ``"min"``: the run ends at sigma_min.

    Raises:
        ValueError: an option is out of range.
    """
    require("edm", 0 < sigma_min < sigma_max < math.inf, "sigma_min", f"in (0, sigma_max={sigma_max})", sigma_min)
    require("edm", 0 < rho < math.inf, "rho", "above 0", rho)
    require("edm", final in ("zero", "min"), "final", "'zero' or 'min'", final)

    def levels(t: Any) -> tuple[Any, Any]:
        return 0 * t + 1, t

    def rates(t: Any) -> tuple[Any, Any]:
        return 0 * t, 0 * t + 1

    def grid(steps: int) -> np.ndarray:
        return _karras(steps, sigma_max, sigma_min, rho, final, lambda s: s, (sigma_max, sigma_min), 0.0)

    text = f"edm {sigma_min:g}..{sigma_max:g} rho {rho:g} {final}"
    return Schedule(
        text, "edm", sigma_max, 0.0, sigma_min, True, levels, rates, lambda ratio: np.minimum(ratio, sigma_max), grid,
        (0.0, math.inf), (partial(edm, final=final), (sigma_min, sigma_max, rho)),
    )  # fmt: skip


def flow(shift: float = 1.0) -> Schedule:
    """x_t = t data + (1 - t) noise; times even after a shift towards noise.

    Args:
        shift: with s = 1 - t even in [0, 1], the noise level of a step is shift s / (1 + (shift - 1) s) (Esser et al.
            2024, arXiv:2403.03206, eq. 23). 1 leaves times even; larger values spend more steps near noise.

    Raises:
        ValueError: the shift is not above 0.
    """
    require("flow", 0 < shift < math.inf, "shift", "above 0", shift)

    def levels(t: Any) -> tuple[Any, Any]:
        return t, 1 - t

    def rates(t: Any) -> tuple[Any, Any]:
        return 0 * t + 1, 0 * t - 1

    def grid(steps: int) -> np.ndarray:
        k = np.arange(steps + 1)
        # t = 1 - shift s / (1 + (shift - 1) s) with s = 1 - k / N, without the cancellation.
        return k / (k + shift * (steps - k))

    return Schedule(
        f"flow shift {shift:g}", "flow", 0.0, 1.0, 1.0, False, levels, rates, lambda r: 1 / (1 + r), grid, (0.0, 1.0),
        (flow, (shift,)),
    )  # fmt: skip


def from_times(schedule: Schedule, times: Sequence[float] | Tensor) -> Schedule:
    """The same noise levels on times of one's own.

    A run of ``len(times) - 1`` steps uses exactly these times. Another number of steps interpolates: log(sigma / alpha)
    against the number of the step, linearly (Sabour et al. 2024, "Align Your Steps", arXiv:2404.14507), and t itself in
    intervals that end where there is no noise or no data.

    Args:
        schedule: gives alpha and sigma.
        times: at least two, with the noise falling from each to the next.

    Raises:
        ValueError: fewer than two times, or noise that does not fall.
    """
    points = torch.as_tensor(times, dtype=torch.float64).cpu().flatten()
    require("from_times", len(points) >= 2, "times", "at least two", len(points))
    low, high = schedule._range
    inside = bool(((points >= low) & (points <= high)).all())
    require("from_times", inside, "times", f"times of the schedule, {low:g} to {high:g}", points.tolist())
    alpha, sigma = schedule.alpha(points), schedule.sigma(points)
    angle = torch.atan2(sigma, alpha)
    require("from_times", bool((angle.diff() < 0).all()), "times", "sigma / alpha to fall", points.tolist())
    log = torch.where((alpha > 0) & (sigma > 0), sigma.log() - alpha.log(), torch.nan)

    def grid(steps: int) -> np.ndarray:
        if steps == len(points) - 1:
            return points.numpy().copy()
        position = torch.linspace(0, len(points) - 1, steps + 1, dtype=torch.float64)
        left = position.long().clamp(max=len(points) - 2)
        part = position - left
        straight = points[left] + part * (points[left + 1] - points[left])
        level = log[left] + part * (log[left + 1] - log[left])
        result = torch.where(level.isnan() | (part == 0), straight, schedule.time_at(level.nan_to_num(0.0).exp()))
        result[0], result[-1] = points[0], points[-1]
        return result.numpy()

    name = f"{schedule.name} on {len(points)} times"
    return Schedule(
        name, schedule.kind, float(points[0]), schedule.end, schedule.last, False, schedule._levels,
        schedule._rates, schedule._time_at, grid, schedule._range, (from_times, (schedule, points.tolist())),
    )  # fmt: skip


def _karras(
    steps: int,
    largest: float,
    smallest: float,
    rho: float,
    final: str,
    time_at: Function,
    ends: tuple[float, float],
    zero: float,
) -> np.ndarray:
    """Karras et al. 2022, eq. 5, with the first and last time exact."""
    count = steps if final == "zero" else steps + 1
    ramp = np.linspace(0, 1, count) if count > 1 else np.zeros(1)
    levels = (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
    times = np.array(time_at(levels))
    times[0] = ends[0]
    if count > 1:
        times[-1] = ends[1]
    return np.append(times, zero) if final == "zero" else times


def _apply(function: Callable[[Any], tuple[Any, Any]], t: Any, which: int) -> Any:
    return function(t.double())[which] if isinstance(t, Tensor) else float(function(float(t))[which])
