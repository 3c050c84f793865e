"""The Ornstein-Uhlenbeck setting in which convergence theorems are stated, exactly, for Gaussian data.

Forward process dX = -X dt + sqrt(2) dB: X_u = e^-u X_0 + sqrt(1 - e^-2u) Z. Its reversal, run from noise time u to
u - h with the score frozen at u, is the exponential integrator of Chen et al. 2023 (arXiv:2209.11215, section 2):

    Y <- e^h Y + 2 (e^h - 1) s(u, Y) + sqrt(e^2h - 1) Z

started from N(0, I). Two errors are computed without sampling: the KL of the final *marginal*, by the covariance
recursion, and the KL of the *path* (Girsanov), which is what the theorems bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff.analysis.budget import ModelError, propagate
from fastdiff.analysis.gaussians import diagonal_kl
from fastdiff.analysis.oracles import GaussianOracle
from fastdiff.samplers.solvers import Stage

__all__ = ["OUProcess", "OUScheme", "ou_exponential_integrator", "ou_marginal_kl", "ou_path_kl", "ou_times"]

GRIDS = ("uniform", "half_geometric")


class OUProcess:
    """The levels of the process as a schedule: alpha = e^-u, sigma = sqrt(1 - e^-2u)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-2 * t))


@dataclass(frozen=True, eq=False)
class OUScheme:
    """The exponential integrator as a plan: `error_budget` and `propagate` take it."""

    times: Tensor
    stages: tuple[Stage, ...]
    schedule: OUProcess
    prediction: str = "epsilon"
    initial_scale: float = 1.0


def ou_times(T: float, steps: int, *, delta: float = 0.0, grid: str = "uniform") -> Tensor:
    """Noise times from T down to delta, [steps + 1] float64.

    Args:
        T: where the run starts, > delta.
        steps: at least 1; even for ``"half_geometric"``.
        delta: where it stops early; 0 for the data itself.
        grid: ``"uniform"``; or ``"half_geometric"``: half of the steps even from T to 1, half geometric from 1 to
            delta, as after Theorem 1 of Benton et al. 2024 (arXiv:2308.03686), where a step is proportional to
            min(1, noise time).

    Raises:
        ValueError: a range or option does not fit.
    """
    if grid not in GRIDS:
        raise ValueError(f"[ou_times] grid: expected one of {GRIDS}, got {grid!r}")
    if steps < 1 or not 0 <= delta < T < math.inf:
        raise ValueError(f"[ou_times] T, delta: expected 0 <= delta < T and a step, got {T}, {delta}, {steps} steps")
    if grid == "uniform":
        return torch.linspace(T, delta, steps + 1, dtype=torch.float64)
    if not (0 < delta < 1 < T) or steps % 2:
        raise ValueError(f"[ou_times] delta: expected 0 < delta < 1 < T, even steps, got {delta}, {T}, {steps} steps")
    linear = np.linspace(T, 1.0, steps // 2 + 1)
    geometric = np.geomspace(1.0, delta, steps // 2 + 1)
    return torch.from_numpy(np.concatenate([linear, geometric[1:]]))


def ou_exponential_integrator(times: Tensor) -> OUScheme:
    """The integrator on noise times that fall, [N + 1], the last of them >= 0.

    Raises:
        ValueError: times that do not fall.
    """
    points = torch.as_tensor(times, dtype=torch.float64).cpu()
    if points.dim() != 1 or len(points) < 2 or not bool((points.diff() < 0).all()) or points[-1] < 0:
        raise ValueError(f"[ou_exponential_integrator] times: expected falling times >= 0, got {points.tolist()}")
    stages = []
    for k, (u, v) in enumerate(zip(points[:-1].tolist(), points[1:].tolist(), strict=True)):
        h, sigma = u - v, math.sqrt(-math.expm1(-2 * u))
        terms = (
            (("x", 0), math.exp(h)),
            (("m", 0), -2 * math.expm1(h) / sigma),  # the score is -noise / sigma
            (("n", 0), math.sqrt(math.expm1(2 * h))),
        )
        stages.append(Stage(u, math.exp(-u), sigma, terms, k))
    return OUScheme(points, tuple(stages), OUProcess())


def ou_marginal_kl(oracle: GaussianOracle, times: Tensor, *, relative_error: float = 0.0) -> float:
    """KL(exact marginal at the last time || what the integrator produces from N(0, I)), in nats.

    Args:
        oracle: the data.
        times: noise times.
        relative_error: the network returns (1 + relative_error) times the score.
    """
    scheme = ou_exponential_integrator(times)
    mean, variance = (v.numpy() for v in oracle.components())
    last = float(scheme.times[-1])
    exact = (math.exp(-last) * mean, 1 + (variance - 1) * math.exp(-2 * last))
    return diagonal_kl(exact, propagate(oracle, scheme, error=ModelError(relative=relative_error)).final)


def ou_path_kl(oracle: GaussianOracle, times: Tensor, *, relative_error: float = 0.0) -> float:
    """KL between the paths of the exact reversal and of the integrator, in nats; never less than the marginal's.

    By Girsanov, with r the relative error and c the variances of the data, v(u) = 1 + (c - 1) e^-2u:

        KL(q_T || N(0, I)) + sum_k int E|s(u, Y_u) - (1 + r) s(u_k, Y_u_k)|^2 du
        E|..|^2 = 1 / v(u) + (1 + r)^2 / v(u_k) - 2 (1 + r) e^-(u_k - u) / v(u_k)   for each coordinate
    """
    points = ou_exponential_integrator(times).times.numpy()
    mean, variance = (v.numpy() for v in oracle.components())
    excess, factor = variance - 1, 1 + relative_error
    T = points[0]
    start = diagonal_kl((math.exp(-T) * mean, 1 + excess * math.exp(-2 * T)), (0 * mean, 1 + 0 * mean))
    with np.errstate(divide="ignore"):
        primitive = points[:, None] + 0.5 * np.log1p(excess * np.exp(-2 * points)[:, None])  # of 1 / v(u)
    frozen = 1 + excess * np.exp(-2 * points[:-1])[:, None]
    h = -np.diff(points)[:, None]
    steps = -np.diff(primitive, axis=0) + (factor**2 * h + 2 * factor * np.expm1(-h)) / frozen
    return start + float(steps.sum())
