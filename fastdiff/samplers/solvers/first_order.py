"""DDIM, DDPM, Euler and Euler-ancestral: one evaluation and one step at a time."""

from __future__ import annotations

import math

from fastdiff.samplers.solvers._run import Point, Run, Stage

__all__ = ["ddim", "ddpm", "euler", "euler_ancestral"]


def ddim(run: Run, eta: float = 0.0) -> tuple[Stage, ...]:
    """Song, Meng & Ermon 2021 (arXiv:2010.02502), eq. 12 and 16; eta = 0 is deterministic, 1 the posterior of DDPM."""
    if not 0.0 <= eta <= 1.0 or (eta > 0.0 and not run.forward):
        expected = "a number in [0, 1]" if run.forward else "0 for an inversion"
        raise ValueError(f"[make_plan] eta: expected {expected}, got {eta!r}")
    x = run.start
    for now, to in zip(run.points[:-1], run.points[1:], strict=True):
        e = run.evaluate(x, now)
        sigma = eta * _posterior(now, to)
        x = to.alpha * e.data + math.sqrt(max(to.sigma**2 - sigma**2, 0.0)) * e.noise
        if sigma > 0:
            x = x + sigma * run.noise()
        run.completed()
    return run.finish(x)


def ddpm(run: Run) -> tuple[Stage, ...]:
    """Ho, Jain & Abbeel 2020 (arXiv:2006.11239), eq. 6 and 7: the Gaussian posterior q(x_s | x_t, data), sampled.

    It equals DDIM with eta = 1, also between timesteps that are not neighbours.
    """
    return ddim(run, eta=1.0)


def euler(run: Run) -> tuple[Stage, ...]:
    """Karras et al. 2022 (arXiv:2206.00364), Algorithm 1 without its correction: x / alpha against sigma / alpha.

    d(x / alpha) / d(sigma / alpha) is the predicted noise, so the step is alpha data + sigma noise at the new level;
    for a flow, x + dt (data - noise).
    """
    if run.schedule.kind != "flow":
        return ddim(run)
    x = run.start
    for now, to in zip(run.points[:-1], run.points[1:], strict=True):
        e = run.evaluate(x, now)
        x = e.x + (to.t - now.t) * run.slope(e)
        run.completed()
    return run.finish(x)


def euler_ancestral(run: Run, eta: float = 1.0) -> tuple[Stage, ...]:
    """Euler to a lower level s_down and fresh noise s_up, as in k-diffusion, on x / alpha against s = sigma / alpha.

    s_up^2 = s_t^2 (s^2 - s_t^2) / s^2 (times eta^2), s_down^2 = s_t^2 - s_up^2. For flows the
    split is made at the same signal-to-noise ratio.
    """
    return ddim(run, eta=eta)


def _posterior(now: Point, to: Point) -> float:
    """Standard deviation of the noise that DDPM adds: in s = sigma / alpha, alpha_t s_t sqrt(1 - s_t^2 / s^2)."""
    if now.sigma == 0.0 or to.alpha == 0.0:
        return 0.0
    part = to.sigma * now.alpha / (now.sigma * to.alpha)
    return to.sigma * math.sqrt(max(1 - part * part, 0.0))
