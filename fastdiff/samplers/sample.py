"""Running a plan: one call of the model and one ``ops.linear_update`` for every stage.

Nothing is read back from the device, and the states live in a few buffers that are allocated before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.samplers.plan import Plan, make_plan
from fastdiff.samplers.schedules import Schedule

__all__ = ["sample"]

Model = Callable[[Tensor, Tensor, Any], Tensor]


@torch.no_grad()
def sample(
    model: Model,
    noise: Tensor,
    *,
    solver: str = "dpmpp_2m",
    schedule: Schedule | None = None,
    steps: int = 20,
    plan: Plan | None = None,
    prediction: str = "epsilon",
    cond: Any = None,
    guidance_scale: float = 1.0,
    generator: torch.Generator | None = None,
    callback: Callable[..., Tensor | None] | None = None,
    progress: bool = False,
) -> Tensor:
    if plan is None:
        plan = make_plan(solver, schedule, steps, prediction=prediction)
    x = noise * plan.initial_scale
    xs, ms = [x], []
    for stage in plan.stages:
        t = torch.full((len(x),), stage.time, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        m = model(x, t, cond)
        if guidance_scale != 1.0:
            u = model(x, t, None)
            m = ops.linear_update((1 - guidance_scale, guidance_scale), (u, m))
        ms = [m, *ms[:3]]
        tensors, coefficients = [], []
        for (kind, lag), c in stage.terms:
            tensors.append(torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) if kind == "n" else (xs if kind == "x" else ms)[lag])
            coefficients.append(c)
        x = ops.linear_update(coefficients, tensors)
        xs = [x, *xs[:3]]
    return x
