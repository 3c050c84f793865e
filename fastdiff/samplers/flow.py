"""Sampling of flow models: dx/dt = v(x, t) from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops

__all__ = ["sample_flow_euler"]


@torch.no_grad()
def sample_flow_euler(
    velocity: Callable[[Tensor, Tensor, Any], Tensor],
    x_0: Tensor,
    num_steps: int,
    cond: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Euler's method on the uniform grid t_k = k / num_steps: ``x <- x + v(x, t_k) / num_steps``.

    Args:
        velocity: ``velocity(x, t, cond)`` with x [B,...], t [B] in [0, 1) in x's dtype (float32 at least).
        x_0: [B,...], noise.
        num_steps: at least 1; one model evaluation each, two with guidance.
        cond: what the model is conditioned on, or None.
        guidance_scale: classifier-free guidance, v = v_uncond + guidance_scale * (v_cond - v_uncond); the
            unconditional velocity is asked for with ``cond=None``. At 1 it is not evaluated.

    Returns:
        [B,...], samples; ``x_0`` is left as it was.

    Raises:
        ValueError: fewer than one step, or guidance without a condition.
    """
    if num_steps < 1:
        raise ValueError(f"[sample_flow_euler] num_steps: expected at least 1, got {num_steps}")
    guided = guidance_scale != 1.0
    if guided and cond is None:
        raise ValueError(f"[sample_flow_euler] cond: expected one with guidance_scale={guidance_scale}, got None")
    x, dt = x_0, 1.0 / num_steps
    time_dtype = torch.promote_types(x_0.dtype, torch.float32)
    for k in range(num_steps):
        t = torch.full((len(x),), k / num_steps, device=x.device, dtype=time_dtype)
        uncond = velocity(x, t, None) if guided else None
        x = ops.euler_step(x, velocity(x, t, cond), dt, uncond=uncond, guidance_scale=guidance_scale)
    return x
