"""How straight the paths of a flow are: what decides how few steps it can be sampled with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PathReport", "analyze_paths"]


@dataclass(frozen=True)
class PathReport:
    """Paths of dZ = v(Z, t) dt from t = 0 to 1.

    Attributes:
        straightness: S = int_0^1 E|(Z_1 - Z_0) - v(Z_t, t)|^2 dt (Liu et al. 2022, arXiv:2209.03003, eq. 5); 0 for
            straight paths at constant speed.
        energy: int_0^1 E|v(Z_t, t)|^2 dt.
        displacement: E|Z_1 - Z_0|^2; ``energy = displacement + straightness`` up to the error of integration.
        excess: energy / W2^2 - 1, if the squared distance of the two ends was given: the *normalised path energy* (Tong
            et al. 2023, arXiv:2302.00482), with its sign; 0 for an optimal transport.
        ends: [B, ...], Z_1.
    """

    straightness: float
    energy: float
    displacement: float
    excess: float | None
    ends: Tensor


@torch.no_grad()
def analyze_paths(
    velocity: Callable[..., Tensor],
    noise: Tensor,
    *,
    num_steps: int = 100,
    cond: Any = None,
    w2_squared: float | None = None,
) -> PathReport:
    """Integrates a flow with the midpoint rule and measures its paths, all in float64 sums.

    Args:
        velocity: ``velocity(x, t, cond)``, t [B]; ``velocity(x, t)`` without `cond`.
        noise: [B, ...], Z_0.
        num_steps: of the integration, two evaluations each.
        cond: given to the velocity.
        w2_squared: squared 2-Wasserstein distance between the laws of noise and data, for `excess`.

    Raises:
        ValueError: fewer than one step, or a distance that is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"[analyze_paths] num_steps: expected at least 1, got {num_steps}")
    if w2_squared is not None and not w2_squared > 0:
        raise ValueError(f"[analyze_paths] w2_squared: expected a number > 0, got {w2_squared}")
    extra = () if cond is None else (cond,)
    dtype, h, x = torch.promote_types(noise.dtype, torch.float32), 1.0 / num_steps, noise

    def at(state: Tensor, t: float) -> Tensor:
        return velocity(state, torch.full((len(state),), t, dtype=dtype, device=state.device), *extra)

    # sum |d - v|^2 = N |d|^2 - 2 d . sum v + sum |v|^2 with d = Z_1 - Z_0, so that no path needs to be kept.
    total, energy = torch.zeros_like(noise, dtype=torch.float64), torch.zeros(len(noise), dtype=torch.float64)
    for k in range(num_steps):
        middle = x + h / 2 * at(x, k * h)
        v = at(middle, (k + 0.5) * h)
        total += h * v.double()
        energy += h * v.double().square().reshape(len(v), -1).sum(1).cpu()
        x = x + h * v
    moved = (x.double() - noise.double()).reshape(len(noise), -1).cpu()
    displacement = moved.square().sum(1)
    straightness = displacement - 2 * (moved * total.reshape(len(noise), -1).cpu()).sum(1) + energy
    mean_energy = float(energy.mean())
    return PathReport(
        straightness=max(float(straightness.mean()), 0.0),
        energy=mean_energy,
        displacement=float(displacement.mean()),
        excess=None if w2_squared is None else mean_energy / w2_squared - 1,
        ends=x,
    )
